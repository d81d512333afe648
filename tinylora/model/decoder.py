"""The decoder: Qwen2/2.5, Qwen3 and Llama 3.x, frozen. One layer loop serves scoring, update, prefill and decode.

Tokens travel packed: (T,) ids with positions, many sequences one after another, boundaries in cu_seqlens. A decode step is
T = one token for each slot. What differs is only how a token attends, so the loop takes that as an argument.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylora.kernels.add_norm import add_norm
from tinylora.kernels.attention import decode_attention, packed_attention, suffix_attention
from tinylora.kernels.correction import Correction
from tinylora.kernels.frozen_linear import NARROW, FrozenLinear, pad_rows, padded_rows
from tinylora.kernels.linear import linear
from tinylora.kernels.reduce_dm import reduce_dm
from tinylora.kernels.rope import Heads, rope, rope_tables
from tinylora.kernels.shrink import shrink
from tinylora.kernels.swiglu import swiglu
from tinylora.model.config import ModelConfig, rope_frequencies

# The seven projections of a layer, as the four groups that share an input; reading order is the adapter's module order.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
PROJECTIONS = tuple(name for group in GROUPS for name in group)

Matrices = Sequence[Tensor | None]  # one M (adapters, segments, r, r) per group, layer after layer; None: adapter off
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q (T, H, D), k and v (T, Hkv, D) -> (T, H, D)


def module_name(layer: int, projection: str) -> str:
    """The Hugging Face name of a projection, without ".weight"."""
    block = "mlp" if projection in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"model.layers.{layer}.{block}.{projection}"


@dataclass
class Layer:
    input_norm: Tensor  # (hidden,)
    qkv: FrozenLinear
    q_norm: Tensor | None  # (head_dim,)
    k_norm: Tensor | None  # (head_dim,)
    o: FrozenLinear
    post_norm: Tensor  # (hidden,)
    gate_up: FrozenLinear
    down: FrozenLinear

    @property
    def groups(self) -> tuple[FrozenLinear, ...]:
        return self.qkv, self.o, self.gate_up, self.down


class KVCache:
    """Keys and values of every layer: (layers, slots, kv_heads, capacity, head_dim) each."""

    def __init__(self, config: ModelConfig, slots: int, capacity: int, like: Tensor) -> None:
        shape = (config.num_layers, slots, config.num_kv_heads, capacity, config.head_dim)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)

    def select(self, slots: Tensor) -> None:
        """Keep these slots, in this order; the others are gone. A slot may be named more than once."""
        n = len(slots)
        if n > self.keys.shape[1]:
            self.keys, self.values = self.keys.index_select(1, slots), self.values.index_select(1, slots)
            return
        for cells in (*self.keys, *self.values):  # in place, layer by layer: fresh memory costs more than the copy
            cells[:n] = cells.index_select(0, slots)
        self.keys, self.values = self.keys[:, :n], self.values[:, :n]

    def reserve(self, positions: int, growth: int) -> None:
        """Make room for this many positions, and `growth` more where there was too little."""
        missing = positions - self.keys.shape[3]
        if missing > 0:
            pad = (0, 0, 0, missing + growth)
            self.keys, self.values = F.pad(self.keys, pad), F.pad(self.values, pad)


class _Gather(torch.autograd.Function):
    """The matrices as they are; their gradient is one reduction over the s and t of all linears, when the last s is there."""

    @staticmethod
    def forward(ctx, s, t, lengths, sequence_adapter, *matrices):  # type: ignore[no-untyped-def]
        ctx.s, ctx.t, ctx.lengths, ctx.sequence_adapter = s, t, lengths, sequence_adapter
        ctx.shapes = [m.shape for m in matrices]
        ctx.set_materialize_grads(False)  # none of them gets a gradient of its own
        return tuple(m.view_as(m) for m in matrices)

    @staticmethod
    def backward(ctx, *_):  # type: ignore[no-untyped-def]
        adapters, _, r, _ = ctx.shapes[0]
        dM = reduce_dm(ctx.s, ctx.t, ctx.lengths, adapters, ctx.sequence_adapter, r)
        return (None, None, None, None, *dM.split([shape[1] for shape in ctx.shapes], 1))


class Decoder:
    """A frozen model. Every forward takes the adapters' matrices; without them it is the base model."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,  # (vocab, hidden)
        layers: list[Layer],
        norm: Tensor,  # (hidden,)
        head: Tensor,  # (vocab, hidden)
        digests: dict[str, str],  # content hash of each tensor as stored
        path: Path,
    ) -> None:
        self.config, self.embedding, self.layers, self.norm, self.head = config, embedding, layers, norm, head
        self.digests, self.path = digests, path
        self.frequencies = rope_frequencies(config).to(embedding.device)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def narrow(self) -> int:
        """Ranks are padded to a multiple of this: on a CPU, so that a row's bits do not depend on its batch."""
        return NARROW if self.device.type == "cpu" else 1

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    # ---- what an adapter attaches to ------------------------------------------------------------------------------------

    def weights(self, projections: Sequence[str]) -> dict[str, Tensor]:
        """The frozen weights (N, K) of these projections by module name, views of the fused ones, in module order."""
        found = {}
        for i, layer in enumerate(self.layers):
            for names, group in zip(GROUPS, layer.groups, strict=True):
                parts = group.weight.split([self.config.shape(n)[0] for n in names])
                found.update({module_name(i, n): w for n, w in zip(names, parts, strict=True) if n in projections})
        return found

    def pack_factors(self, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Put the factors A (r, K), B (N, r) of the named modules beside their weights; others have no correction."""
        for i, layer in enumerate(self.layers):
            for names, group in zip(GROUPS, layer.groups, strict=True):
                segments = [factors.get(module_name(i, n)) for n in names]
                group.A = group.Bt = None
                group.unpack()
                if any(s is not None for s in segments):
                    group.pack(segments, [self.config.shape(n)[0] for n in names], self.narrow)

    # ---- forward --------------------------------------------------------------------------------------------------------

    def corrections(
        self,
        matrices: Matrices | None,
        row_adapter: Tensor | None = None,  # (T,) int64
        lengths: Sequence[int] = (),  # of the packed sequences, each with one adapter; wanted for gradients alone
    ) -> list[Correction | None]:
        """A correction for each fused linear, or None; with room for s and t where a gradient will want them."""
        groups = [group for layer in self.layers for group in layer.groups]
        row_adapter = None if row_adapter is None else pad_rows(row_adapter)
        if matrices is None:
            return [None] * len(groups)
        used = [m for m in matrices if m is not None]
        s = t = None
        if torch.is_grad_enabled() and any(m.requires_grad for m in used):
            columns, rows = sum(m.shape[1] * m.shape[2] for m in used), padded_rows(sum(lengths), self.device)
            # zeros: below the lowest layer that needs a gradient nobody writes s, and M gets none
            s, t = (used[0].new_zeros(rows, columns) for _ in range(2))
            sequence_adapter = None
            if row_adapter is not None:
                starts = torch.tensor([0, *lengths[:-1]], device=row_adapter.device).cumsum(0)
                sequence_adapter = row_adapter[starts]
            used = list(_Gather.apply(s, t, lengths, sequence_adapter, *used))
        corrections: list[Correction | None] = []
        column, remaining = 0, iter(used)
        for group, m in zip(groups, matrices, strict=True):
            if m is None:
                corrections.append(None)
                continue
            if group.A is None or group.Bt is None:
                raise ValueError("matrices were given to a model that holds no factors; pack them first")
            own = slice(column, column + len(group.A))
            column = own.stop
            kept = (None, None) if s is None or t is None else (t[:, own], s[:, own])
            corrections.append(Correction(group.A, group.Bt, next(remaining), row_adapter, *kept))
        return corrections

    def forward(
        self,
        tokens: Tensor,  # (T,) int64
        positions: Tensor,  # (T,) int64
        attend: Attend,
        corrections: Sequence[Correction | None],  # of each fused linear
    ) -> Tensor:  # (T, hidden), after the final norm
        c = self.config
        rows = len(tokens)
        tokens, positions = pad_rows(tokens), pad_rows(positions)
        cos, sin = rope_tables(positions, self.frequencies, self.dtype)  # (T, head_dim)
        x, y, below = self.embedding[tokens], None, None  # (T, hidden)
        for i, layer in enumerate(self.layers):
            qkv, o, gate_up, down = corrections[4 * i : 4 * i + 4]
            x, h = add_norm(x, y, None, layer.input_norm, c.norm_eps, below, qkv)
            heads = Heads(c.num_heads, c.num_kv_heads, c.head_dim, layer.q_norm, layer.k_norm, c.norm_eps)
            q, k, v = rope(linear(h, layer.qkv, qkv), cos, sin, heads, qkv)
            out = pad_rows(attend(i, q[:rows], k[:rows], v[:rows]).flatten(1))  # (T, H * D)
            z = None if o is None else shrink(out, o)
            x, h = add_norm(x, linear(out, layer.o, o), z, layer.post_norm, c.norm_eps, o, gate_up)
            h = swiglu(linear(h, layer.gate_up, gate_up), c.intermediate_size, gate_up, down)
            y, below = linear(h, layer.down, down), down
        _, h = add_norm(x, y, None, self.norm, c.norm_eps, below, None)
        return h[:rows]

    def packed(
        self,
        tokens: Tensor,  # (T,) int64: whole sequences one after another, then suffixes
        lengths: Sequence[int],  # of the sequences and suffixes; they sum to T
        matrices: Matrices | None = None,
        row_adapter: Tensor | None = None,  # (T,)
        cache: KVCache | None = None,  # filled with the keys and values of sequence b in slot b
        prefixes: Sequence[int] = (),  # for each of the last len(prefixes) lengths, a suffix: the sequence it continues
    ) -> Tensor:  # (T, hidden)
        """Hidden states of whole sequences: scoring, update, and prefill where a cache is given.

        A suffix continues an earlier sequence without repeating it, so a prompt is scored once for all its completions.
        """
        device, whole = tokens.device, len(lengths) - len(prefixes)
        lengths_ = torch.tensor(lengths, device=device)
        starts = lengths_.cumsum(0) - lengths_
        parents = torch.tensor(prefixes, device=device, dtype=torch.long)
        before = torch.cat([lengths_.new_zeros(whole), lengths_[parents]])  # tokens ahead of each sequence or suffix
        sequence = torch.arange(len(lengths), device=device).repeat_interleave(lengths_)  # (T,)
        place = torch.arange(len(tokens), device=device) - starts[sequence]
        longest, split = max(lengths[:whole]), sum(lengths[:whole])
        slots, places = sequence[:split], place[:split]
        if prefixes:
            own, ahead = lengths_[whole:], before[whole:, None]  # (suffixes,), (suffixes, 1)
            rows = int(own.max()) + int(-own.max() % NARROW)
            position = torch.arange(int((own + before[whole:]).max()), device=device)  # (length,)
            keys = torch.where(position < ahead, starts[parents, None] + position, starts[whole:, None] + position - ahead)
            keys = keys.clamp_max(len(tokens) - 1)  # beyond its own tokens a suffix sees nothing; any row will do
            future = position > ahead[:, :, None] + torch.arange(rows, device=device)[:, None]  # (suffixes, rows, length)
            bias = torch.zeros(future.shape, dtype=self.dtype, device=device).masked_fill_(future, -torch.inf)
            index = (sequence[split:] - whole) * rows + place[split:]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if cache is not None:
                cache.keys[layer, slots, :, places] = k
                cache.values[layer, slots, :, places] = v
            out = packed_attention(q[:split], k[:split], v[:split], slots * longest + places, whole, longest)
            return torch.cat([out, suffix_attention(q[split:], k, v, index, keys, bias)]) if prefixes else out

        return self.forward(tokens, place + before[sequence], attend, self.corrections(matrices, row_adapter, lengths))

    def decode(
        self,
        tokens: Tensor,  # (slots,) int64: the newest token of each slot
        positions: Tensor,  # (slots,) int64: its position
        cache: KVCache,
        longest: int,  # more than every position: how far the cache is read
        corrections: Sequence[Correction | None],  # from `corrections`, good for as many steps as the slots stay
    ) -> Tensor:  # (slots, hidden)
        """One step for every slot of the cache: writes the token's keys and values, attends to all before it."""
        slots = torch.arange(len(tokens), device=tokens.device)
        future = torch.arange(longest, device=tokens.device) > positions[:, None]  # (slots, longest)
        bias = torch.zeros(future.shape, dtype=self.dtype, device=tokens.device).masked_fill_(future, -torch.inf)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.keys[layer], cache.values[layer]
            keys[slots, :, positions] = k
            values[slots, :, positions] = v
            return decode_attention(q, keys[:, :, :longest], values[:, :, :longest], bias)

        return self.forward(tokens, positions, attend, corrections)

    @torch.no_grad()
    def logits(self, input_ids: Tensor, matrices: Matrices | None = None) -> Tensor:
        """input_ids (B, T) int64 without padding -> (B, T, vocab) float32."""
        batch, length = input_ids.shape
        hidden = self.packed(input_ids.to(self.device).flatten(), [length] * batch, matrices)
        return F.linear(pad_rows(hidden), self.head)[: batch * length].float().unflatten(0, (batch, length))
