"""Is the rollout's policy the update's? A stop where it evidently is not, and the proof that `--exact` asks for.

A rollout that has lost its adapter, or has another one, differs from the update by as much as adapters do: often by less than
a fixed limit for half precision. So part of each step's tokens is scored under the base too, and what counts is

    |update - rollout|    beside    |base - rollout| and |base - update|, the adapter's size on either side: means over tokens

The second side is there for the adapter that is lost: base - rollout is then rounding alone.

Both sides run the same operations on the same adapter, so their log-probs of the same tokens differ by rounding alone: on a
CPU by 1e-6 at most and mostly not at all, in half precision by about 0.005 a token. With `--exact` they are equal bit for
bit, because on a CPU every product has a multiple of 8 rows and every attention covers the same number of keys. That rests on
the matrix library's choice of inner kernels on this processor, so it is checked before a run, and refused where it fails.
"""

from collections.abc import Sequence

import torch

from tinylora.engine.rollout import Completion, Sampling, keeps_slots, rollout
from tinylora.errors import InputError
from tinylora.rl.policy import Policy, adapter_of, baseline_of
from tinylora.rl.update import Batch, base_logps, score

LIMIT = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}  # nats a token, on average
SHARE = 32  # one in so many of a step's tokens is scored under the base
FIRST = 32  # tokens of each completion on which rounding is measured: the first few are surer than most, and differ by less
ROUNDING = 1e-6  # nats a token: what counts as rounding where less was measured


def require_same_policy(mean: float | None, largest: float | None, dtype: torch.dtype, exact: bool, step: int) -> None:
    """InputError where the step's |log p(update) - log p(rollout)| cannot be rounding; with `exact`, where it is not 0."""
    if mean is None or largest is None:
        return
    if not mean <= LIMIT[dtype]:  # NaN too
        raise InputError(
            f"step {step}: the rollout was not sampled from the adapter that is trained: log-probs differ by {mean:.2g} nats a "
            f"token on average, where rounding explains {LIMIT[dtype]:g}. Nothing was learned from it; please report this"
        )
    if exact and largest > 0:
        raise InputError(f"step {step}: --exact, but a log-prob of the update differs from the rollout's by {largest:.2g}")


def measured_rounding(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    generations: int,
    sampling: Sampling,
    cache_bytes: int,
    microbatch_tokens: int,
) -> float:
    """Mean |log p(update) - log p(rollout)| of the base, where both are the same function, by a short rollout of it.

    The first FIRST tokens of two prompts' completions; on a GPU of all, since the step then finds these slots again, with
    their graphs.
    """
    prompts = prompts if keeps_slots(policy.model) else prompts[:2]
    if baseline := baseline_of(policy):
        baseline.matrices(off=True)
    limits = [min(FIRST, sampling.max_completion_length)] * (len(prompts) * generations)
    found = rollout(policy.model, None, prompts, generations, sampling, cache_bytes=cache_bytes, limits=limits)
    repeated = [p for p in prompts for _ in range(generations)]
    logp = base_logps(policy, repeated, found, sampling.temperature, microbatch_tokens)
    return (logp - logp.new_tensor([x for c in found for x in c.logprobs])).abs().mean().item()


def require_own_adapter(
    policy: Policy,
    batch: Batch,  # after the first iteration's update
    temperature: float,
    microbatch_tokens: int,
    whole: float | None,  # mean |update - rollout| of all the step's tokens
    rounding: float,
    step: int,
) -> float | None:
    """Mean |base - rollout| on 1 / SHARE of the step's tokens, None without one. InputError where the rollout's adapter is not
    the update's: where |update - rollout| exceeds half of that, and twice the rounding over the whole step.

    Asked only where the adapter is seen: where |base - rollout| or |base - update| exceeds four times the rounding. The latter
    because of a rollout that has lost its adapter: its |base - rollout| is rounding.
    """
    left = sum(len(c.tokens) for c in batch.completions) // SHARE
    few: dict[int, Completion] = {}  # by number
    for i in batch.old_logps:
        if left > 0:
            c = batch.completions[i]
            few[i] = Completion(c.tokens[:left], c.logprobs[:left], c.finished)
            left -= len(few[i].tokens)
    if not few or whole is None:
        return None
    base = base_logps(policy, [batch.prompts[i] for i in few], list(few.values()), temperature, microbatch_tokens)
    rolled_out = base.new_tensor([x for c in few.values() for x in c.logprobs])
    updated = torch.cat([batch.old_logps[i][: len(c.tokens)] for i, c in few.items()])
    pairs = ((base, rolled_out), (base, updated), (updated, rolled_out))
    size, effect, apart = ((a - b).abs().mean().item() for a, b in pairs)
    rounding = max(rounding, ROUNDING)
    if max(size, effect) > 4 * rounding and whole > 2 * rounding and apart > size / 2:
        raise InputError(
            f"step {step}: the rollout was not sampled from the adapter that is trained: log-probs differ by {apart:.2g} nats "
            f"a token on average from the update's, by {size:.2g} from the base's, where rounding explains {rounding:.1g}. "
            "Nothing was learned from it; please report this"
        )
    return size


def fix_capacity(policy: Policy, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    """Make the model exact for prompts and completions of these lengths, and prove it on three of the prompts.

    InputError on a GPU, and where a sequence's bits depend on how many are decoded or scored with it.
    """
    adapter = adapter_of(policy)
    model = adapter.model
    if model.device.type != "cpu":
        raise InputError("--exact works on a CPU only so far: add --device cpu, or leave it out")
    longest = max(map(len, prompts)) + sampling.max_completion_length
    model.cover(longest)
    few = Sampling(min(24, sampling.max_completion_length), sampling.temperature or 1.0, seed=sampling.seed)
    v = 0.05 * torch.randn(adapter.v.shape, generator=torch.Generator().manual_seed(0)).to(adapter.v)
    with torch.no_grad():
        matrices = adapter.matrices(v)
        some = sorted(prompts, key=len)[:: max(1, len(prompts) // 2)][:3]  # a short, a middling, a long one
        found = [rollout(model, matrices, some, 7, few, slots=slots) for slots in (21, 8, 3)]
        tokens, logprobs = [c.tokens for c in found[0]], [c.logprobs for c in found[0]]
        whole = list(range(len(tokens)))
        for pack in (whole, whole[3:4], whole[5:13]):
            logp, _ = score(adapter, matrices, [p for p in some for _ in range(7)], found[0], pack, few.temperature)
            want = torch.tensor([x for i in pack for x in logprobs[i]])
            _refuse("scored", logp, want)
        for other in found[1:]:
            if [c.tokens for c in other] != tokens:
                raise InputError("--exact: on this machine a completion depends on how many are decoded with it")
            flat = [torch.tensor([x for c in run for x in c.logprobs]) for run in (other, found[0])]
            _refuse("decoded", *flat)


def _refuse(what: str, found: torch.Tensor, want: torch.Tensor) -> None:
    difference = (found - want).abs().max().item()
    if difference > 0:
        raise InputError(
            f"--exact: on this machine a token's log-prob depends on what is {what} with it (by {difference:.1g}); leave it out"
        )
