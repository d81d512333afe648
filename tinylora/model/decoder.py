"""The decoder: Qwen2/2.5, Qwen3 and Llama 3.x, frozen. One layer loop serves scoring, update, prefill and decode.

Tokens travel packed: (T,) ids with positions, many sequences one after another. A decode step is T = one token for each
slot. What differs is only how a token attends, so the loop takes that as an argument.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylora.hashes import base_hash
from tinylora.kernels import dispatch
from tinylora.kernels.add_norm import add_norm
from tinylora.kernels.attention import packed_attention
from tinylora.kernels.correction import Correction
from tinylora.kernels.decode_attention import CacheView, decode_attention, rope_into_cache
from tinylora.kernels.decode_linear import decode_linear, takes
from tinylora.kernels.frozen import FrozenLinear
from tinylora.kernels.linear import linear
from tinylora.kernels.packing import Packing
from tinylora.kernels.products import NARROW, pad_rows, padded_rows
from tinylora.kernels.reduce_dm import reduced_together
from tinylora.kernels.rope import Heads, rope, rope_tables
from tinylora.kernels.shrink import shrink
from tinylora.kernels.swiglu import swiglu
from tinylora.model.cache import KVCache
from tinylora.model.config import GROUPS, PROJECTIONS, ModelConfig, module_name, rope_frequencies

Matrices = Sequence[Tensor | None]  # one M (adapters, segments, r, r) per group, layer after layer; None: adapter off


@dataclass
class Block:
    """What one layer's attention needs beside its qkv rows."""

    cos: Tensor  # (T, head_dim)
    sin: Tensor  # (T, head_dim)
    heads: Heads
    qkv: Correction | None
    o: Correction | None


# layer, qkv's output (T, width or padded), Block -> the attention's output (T, H * D) and o's z (T, R)
Attend = Callable[[int, Tensor, Block], tuple[Tensor, Tensor | None]]


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
        self.hashed: dict[str, tuple[torch.dtype, str]] = {}  # the same with the dtype in the file, as `parts.Base` has it
        self.name = str(path)  # or what the user typed for it, as `load_model` says
        self.frequencies = rope_frequencies(config).to(embedding.device)
        self.kept: Any = None  # what a rollout leaves for the next, a `slots.Kept`; None while one runs
        self.capacity: int | None = None  # keys that every attention covers, for `--exact`; None: as many as it needs

    @property
    def base_hash(self) -> str:
        """Of all its tensors as stored: tells this base from others."""
        return base_hash(self.digests)

    @property
    def public_name(self) -> str:
        """Its name for other programs, which do not know those of the built-in models."""
        return self.name if "/" in self.name or Path(self.name).exists() else str(self.path)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def backend(self) -> str:
        """The name of what its operations run as."""
        return dispatch.backend(self.device.type)

    @property
    def narrow(self) -> int:
        """Ranks are padded to a multiple of this: for a CPU's plain products, whose bits would depend on the batch."""
        return NARROW if self.device.type == "cpu" and not dispatch.runs_native("shrink", self.embedding) else 1

    @property
    def dtype(self) -> torch.dtype:
        """Of its rows, its embedding and its head."""
        return self.embedding.dtype

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of its layers' weights, and what their products are rounded to: on a CPU it may be bf16 beside rows in fp32."""
        return self.layers[0].qkv.weight.dtype

    def cover(self, longest: int) -> None:
        """Make every attention from now on cover as many keys as sequences of up to `longest` tokens have, for `--exact`."""
        self.capacity = longest + -longest % NARROW

    # ---- what an adapter attaches to ------------------------------------------------------------------------------------

    def modules(self) -> list[list[str]]:
        """The names of the modules that each fused linear holds, in module order."""
        return [[module_name(i, n) for n in names] for i in range(len(self.layers)) for names in GROUPS]

    def weights(self, projections: Sequence[str] = PROJECTIONS) -> dict[str, Tensor]:
        """The frozen weights (N, K) of these projections by module name, views of the fused ones, in module order."""
        found = {}
        for i, layer in enumerate(self.layers):
            for names, group in zip(GROUPS, layer.groups, strict=True):
                parts = group.weight.split([self.config.shape(n)[0] for n in names])
                found.update({module_name(i, n): w for n, w in zip(names, parts, strict=True) if n in projections})
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Every weight by its Hugging Face name, as views of the fused ones."""
        c, found = self.config, {f"{name}.weight": w for name, w in self.weights().items()}
        for i, layer in enumerate(self.layers):
            prefix = f"model.layers.{i}"
            for names, group in zip(GROUPS, layer.groups, strict=True):
                if group.bias is not None:
                    parts = group.bias.split([c.shape(n)[0] for n in names])
                    found |= {f"{module_name(i, n)}.bias": b for n, b in zip(names, parts, strict=True)}
            found |= {
                f"{prefix}.input_layernorm.weight": layer.input_norm,
                f"{prefix}.post_attention_layernorm.weight": layer.post_norm,
            }
            for name, norm in (("q_norm", layer.q_norm), ("k_norm", layer.k_norm)):
                if norm is not None:
                    found[f"{prefix}.self_attn.{name}.weight"] = norm
        found |= {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        return found if c.tied_head else found | {"lm_head.weight": self.head}

    def pack_factors(self, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Put the factors A (r, K), B (N, r) of the named modules beside their weights; others have no correction."""
        if self.kept is not None:
            self.kept.slots.clear()  # their graphs read the factors before
        for i, layer in enumerate(self.layers):
            for names, group in zip(GROUPS, layer.groups, strict=True):
                segments = [factors.get(module_name(i, n)) for n in names]
                group.A = group.Bt = None
                group.unpack()
                if any(s is not None for s in segments):
                    group.pack(segments, [self.config.shape(n)[0] for n in names], self.narrow)

    def segments(self, r: int) -> list[int]:
        """How many segments of rank r the factors packed beside each fused linear have, padding included; 0: none are."""
        return [0 if group.A is None else len(group.A) // r for layer in self.layers for group in layer.groups]

    def zero_matrices(self) -> Matrices | None:
        """M = 0 (1, segments, r, r) for every group that holds factors; None where none does. On a GPU, where no segments are
        added for the sake of `narrow`."""
        matrices: list[Tensor | None] = []
        for layer in self.layers:
            for names, group in zip(GROUPS, layer.groups, strict=True):
                r = 0 if group.A is None else len(group.A) // len(names)
                matrices.append(torch.zeros(1, len(names), r, r, device=self.device) if r else None)
        return matrices if any(m is not None for m in matrices) else None

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
            used = reduced_together(s, t, lengths, sequence_adapter, used)
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
        whole: bool = False,  # by `decode_linear`: a linear computes its own z, and does what follows it
    ) -> Tensor:  # (T, hidden), after the final norm
        c = self.config
        rows = len(tokens)
        tokens, positions = pad_rows(tokens), pad_rows(positions)
        cos, sin = rope_tables(positions, self.frequencies, self.dtype)  # (T, head_dim)
        x, y, below = self.embedding[tokens], None, None  # (T, hidden)
        for i, layer in enumerate(self.layers):
            qkv, o, gate_up, down = corrections[4 * i : 4 * i + 4]
            heads = Heads(c.num_heads, c.num_kv_heads, c.head_dim, layer.q_norm, layer.k_norm, c.norm_eps)
            if whole:
                _, h = add_norm(x, None, None, layer.input_norm, c.norm_eps, None, None)
                out, _ = attend(i, decode_linear(h, layer.qkv, qkv), Block(cos, sin, heads, None, None))
                x = decode_linear(out, layer.o, o, residual=x)
                _, h = add_norm(x, None, None, layer.post_norm, c.norm_eps, None, None)
                x = decode_linear(decode_linear(h, layer.gate_up, gate_up, swiglu=True), layer.down, down, residual=x)
                continue
            x, h = add_norm(x, y, None, layer.input_norm, c.norm_eps, below, qkv)
            out, z = attend(i, linear(h, layer.qkv, qkv), Block(cos, sin, heads, qkv, o))  # (T, H * D), (T, R)
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
        prefixes: Sequence[int] = (),  # for each of the last len(prefixes) lengths, a suffix: the sequence it continues
        kept: tuple[Tensor, Tensor] | None = None,  # gets keys and values, (layers, T, kv_heads, head_dim) each
    ) -> Tensor:  # (T, hidden)
        """Hidden states of whole sequences: scoring, update, and prefill where keys and values are kept.

        A suffix continues an earlier sequence without repeating it, so a prompt is scored once for all its completions.
        """
        layout = Packing(lengths, prefixes, self.dtype, tokens.device, self.capacity)
        rows = len(tokens)

        def attend(layer: int, qkv: Tensor, b: Block) -> tuple[Tensor, Tensor | None]:
            q, k, v = (x[:rows] for x in rope(qkv, b.cos, b.sin, b.heads, b.qkv))
            if kept is not None:  # as copies: k and v are parts of the tensor that q is in
                kept[0][layer], kept[1][layer] = k, v
            out = pad_rows(packed_attention(q, k, v, layout).flatten(1))
            return out, None if b.o is None else shrink(out, b.o)

        return self.forward(tokens, layout.positions, attend, self.corrections(matrices, row_adapter, lengths))

    def decode(
        self,
        tokens: Tensor,  # (slots,) int64: the newest token of each slot
        positions: Tensor,  # (slots,) int64: its position
        cache: KVCache,
        longest: int,  # more than every position: how far a cache without pages is read
        corrections: Sequence[Correction | None],  # from `corrections`, good for as many steps as the slots stay
    ) -> Tensor:  # (slots, hidden)
        """One step for every slot of the cache: writes the token's keys and values, attends to all before it."""
        view = CacheView(positions, cache.table, cache.page_size, self.capacity or longest, self.dtype)

        def attend(layer: int, qkv: Tensor, b: Block) -> tuple[Tensor, Tensor | None]:
            keys, values = cache.keys[layer], cache.values[layer]
            q = rope_into_cache(qkv, b.cos, b.sin, b.heads, keys, values, view)
            return decode_attention(q, keys, values, view, b.o)

        groups = (group for layer in self.layers for group in layer.groups)
        whole = all(takes(len(tokens), *each) for each in zip(groups, corrections, strict=True))
        return self.forward(tokens, positions, attend, corrections, whole)

    @torch.no_grad()
    def logits(self, input_ids: Tensor, matrices: Matrices | None = None) -> Tensor:
        """input_ids (B, T) int64 without padding -> (B, T, vocab) float32."""
        batch, length = input_ids.shape
        hidden = self.packed(input_ids.to(self.device).flatten(), [length] * batch, matrices)
        return F.linear(pad_rows(hidden), self.head)[: batch * length].float().unflatten(0, (batch, length))
