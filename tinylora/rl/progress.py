"""The progress line of a run: what its last step says, a dead batch first of all."""

from typing import Any


def progress_line(row: dict[str, Any]) -> str:
    speed = f"{row['tokens_per_second']:,.0f} tok/s"
    norm = f"|v| {row['adapter/norm']:.3f}, " if "adapter/norm" in row else ""
    if "frac_reward_zero_std" not in row:
        return f"loss {row['loss']:.4f}, {norm}{speed}"
    dead = row["frac_reward_zero_std"]
    if dead == 1:
        right, none = row["frac_reward_zero_std/all_right"], row.get("frac_reward_zero_std/unscored", 0)
        kind = "all right" if right == 1 else "all wrong" if right == 0 else "of equal rewards"
        kind = "without a reward" if none == 1 else kind
        said = f"DEAD BATCH: every group is {kind}, nothing to learn from"
    else:
        said = f"{dead:.0%} dead groups"
    reward = "none" if row["reward"] is None else f"{row['reward']:.3f}"
    accuracy = f"accuracy {row['accuracy']:.1%}, " if "accuracy" in row else ""
    length = f"length {row['completions/mean_length']:.0f}, {row['completions/clipped_ratio']:.0%} cut off, "
    return f"reward {reward}, {accuracy}{said}, {length}{norm}{speed}"
