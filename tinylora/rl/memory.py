"""The memory plan: what weights, keys and values, and the update's activations take, before the first step.

    weights        as they lie in memory, and bf16 ones on a CPU once more in the order that decode steps read
    cache          keys and values of as many slots as decode at once, or as many as fit
    activations    bytes a token, which the update keeps from forward to backward, times the tokens of a microbatch

A frozen linear keeps t alone; the rest is what norms, attention and SwiGLU need to compute their gradients again from.
"""

from dataclasses import dataclass

from tinylora.engine.memory import MOST_SLOTS, free_bytes
from tinylora.errors import InputError
from tinylora.model.decoder import Decoder

TOKENS = {"cpu": 4096, "cuda": 16384}  # of a microbatch, where memory allows: more make no product faster
SHARE = 0.9  # of free memory that is planned for


@dataclass
class MemoryPlan:
    """Bytes. `microbatch_tokens` is halved where the plan proves too tight."""

    free: int  # beside the weights, before the first step
    weights: int
    cache: int
    per_token: int
    microbatch_tokens: int
    step: int  # a decode step reads at least: weights and all keys and values, when every slot is at its longest

    def __str__(self) -> str:
        def gb(n: int) -> str:
            return f"{n / 1e9:.2f} GB" if n >= 5e7 else f"{n / 1e6:.1f} MB"

        return (
            f"memory: weights {gb(self.weights)}, keys and values up to {gb(self.cache)}, update {gb(self.activations)} "
            f"({self.microbatch_tokens} tokens of {self.per_token / 1e3:.0f} kB), {gb(self.free)} free; "
            f"a decode step reads up to {gb(self.step)}"
        )

    @property
    def activations(self) -> int:
        return self.per_token * self.microbatch_tokens


def activation_bytes(model: Decoder) -> int:
    """That the update keeps for each token: two norms' inputs, q, k, v and the attention's output, gate and up; and, for one
    layer at a time, what a backward needs at once; in fp32, t and s of every adapted linear."""
    c, size = model.config, model.embedding.element_size()
    attention = 2 * (c.num_heads + c.num_kv_heads) * c.head_dim
    layer = 2 * c.hidden_size + attention + 2 * c.intermediate_size
    ranks = sum(0 if g.A is None else len(g.A) for each in model.layers for g in each.groups)
    at_once = 5 * c.intermediate_size + 4 * c.hidden_size
    return size * (c.num_layers * layer + at_once) + 8 * ranks


def plan_memory(
    model: Decoder,
    longest: int,  # tokens of the longest prompt and completion together
    sequences: int,  # that a rollout is asked for
    microbatch_tokens: int | None,  # at most; None: as many as pay
    free: int | None = None,  # bytes; None: what there is
) -> MemoryPlan:
    """InputError where not even one sequence of the longest kind fits."""
    c, kind = model.config, model.device.type
    size = model.embedding.element_size()
    groups = [g for each in model.layers for g in each.groups]
    blocks = sum(g.weight.nbytes for g in groups if g.has_blocks)  # made by the first decode step
    held = sum(g.weight.nbytes for g in groups) + model.embedding.nbytes + blocks
    held += model.head.nbytes if model.head is not model.embedding else 0
    free = (free_bytes(model) if free is None else free) - blocks
    per_token, per_position = activation_bytes(model), c.cache_bytes(size)
    tokens, usable = min(microbatch_tokens or max(TOKENS[kind], longest), longest * sequences), int(SHARE * free)
    wanted = per_position * longest * min(sequences, MOST_SLOTS[kind])
    if per_token * tokens + wanted > usable:
        tokens = min(tokens, max(longest, max(usable // 2, usable - wanted) // per_token))
    cache = min(wanted, usable - per_token * tokens)
    if cache < per_position * longest:
        least = per_token * longest + per_position * longest
        raise InputError(
            f"out of memory before the first step: a sequence of {longest} tokens needs {least / 1e9:.2f} GB beside the "
            f"weights, and {usable / 1e9:.2f} GB can be used; lower --max-completion-length or --microbatch-tokens"
        )
    return MemoryPlan(free, held, cache, per_token, tokens, held + cache)
