"""The check of every op: cases of what its kernel gives beside what its reference gives, for `self_check` to judge."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from tinylora.kernels import add_norm, attention, decode_attention, decode_linear, rope, shrink, swiglu
from tinylora.kernels.accuracy import Case, Check, Outputs
from tinylora.kernels.correction import Correction
from tinylora.kernels.frozen import FrozenLinear
from tinylora.kernels.fused_linear import fused_linear, fused_linear_ref
from tinylora.kernels.packing import Packing
from tinylora.kernels.reduce_dm import reduce_dm_ref, reduce_dm_triton
from tinylora.kernels.sampling import sample_ref, sample_triton
from tinylora.kernels.token_logprobs import token_logprobs_ref, token_logprobs_triton


def normals(device: torch.device, dtype: torch.dtype, seed: int) -> Callable[..., Tensor]:
    """randn(*shape): one draw after another, by the device's own generator: a CPU's takes a second for 50 million.

    `exact` is to be computed from the rounded inputs, widened again: the rounding of inputs is nobody's error.
    """
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64, device=device).to(dtype)


def reduce_dm_check(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[Case]:
    if dtype != torch.float32:
        return  # it refuses half precision
    randn = normals(device, dtype, seed)
    shapes = ((2, 28, [300, 1, 77, 128], None), (2, 3, [5, 0, 4000], [2, 0, 2]), (3, 9, [70], [1]))
    for r, segments, lengths, adapters in shapes:
        s, t = (randn(sum(lengths) + 3, r * segments) for _ in range(2))
        sequence_adapter = None if adapters is None else torch.tensor(adapters, device=device)
        arguments = (lengths, 1 if adapters is None else 3, sequence_adapter, r)
        ours, plain = reduce_dm_triton(s, t, *arguments), reduce_dm_ref(s, t, *arguments)
        yield (f"r {r}, {segments} segments", ours, plain, reduce_dm_ref(s.double(), t.double(), *arguments))


def correction(
    randn: Callable[..., Tensor], rows: int, width: int, out: int, segments: int = 1, r: int = 2, adapters: int = 0
) -> Correction:
    """A random one, kept t and s included; adapters = 0 is one adapter for all rows."""
    A, Bt = randn(segments * r, width), randn(segments * r, out)
    M = randn(max(1, adapters), segments, r, r).float()
    row_adapter = (torch.arange(rows, device=A.device) * 7 % adapters) if adapters else None
    kept = [torch.full((rows, segments * r), torch.nan, device=A.device) for _ in range(2)]
    return Correction(A / width**0.5, Bt / out**0.5, M, row_adapter, *kept)


def _wide(x: Any) -> Any:
    """A tensor, correction or heads in fp64, with buffers of their own for s and t; anything else as it is."""
    if isinstance(x, Correction):
        kept = [torch.full_like(k, torch.nan, dtype=torch.float64) if k is not None else None for k in (x.t, x.s)]
        return Correction(x.A.double(), x.Bt.double(), x.M.double(), x.row_adapter, *kept)
    if isinstance(x, rope.Heads):
        return dataclasses.replace(x, q_norm=_wide(x.q_norm), k_norm=_wide(x.k_norm))
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _plain_copy(x: Any) -> Any:
    """The same with buffers of its own for s and t."""
    if isinstance(x, Correction):
        t, s = (None if k is None else torch.full_like(k, torch.nan) for k in (x.t, x.s))
        return dataclasses.replace(x, t=t, s=s)
    return x


def _padded_case(
    label: str,
    kernel: Callable[..., Any],
    plain: Callable[..., Any],
    arguments: Sequence[Any],
    width: int,  # of the padded output
    c: Correction | None,  # whose z or sM is in its pad
    kept: Literal["t", "s"],
    one: float,  # what follows z in the pad
    which: int | None = None,  # of several outputs, the padded one; the others are compared as they are
) -> Case:
    """Compare the row and its z, the kept t or s, and the pad's tail, which must be exact."""

    def outputs(f: Callable[..., Any], args: Sequence[Any]) -> list[Tensor]:
        got = f(*args)
        every = list(got) if isinstance(got, tuple) else [got]
        i = 0 if which is None else which
        out, mine = every[i], next((x for x, y in zip(args, arguments, strict=True) if y is c), None)
        rank = 0 if c is None else c.rank
        every[i : i + 1] = [out[:, :width], out[:, width : width + rank]]
        if mine is not None:
            tail = out[:, width + rank :] if f is kernel else torch.zeros_like(out[:, width + rank :])
            if f is not kernel:
                tail[:, :1] = one
            every += [getattr(mine, kept).clone(), tail]
        return [x for x in every if x.numel()]

    ours = outputs(kernel, arguments)
    return (
        label,
        tuple(ours),
        tuple(outputs(plain, [_plain_copy(x) for x in arguments])),
        tuple(outputs(plain, [_wide(x) for x in arguments])),
    )


def launcher(module: ModuleType, name: str, device: torch.device) -> Callable[..., Any]:
    """An op's kernel: Triton's on a GPU and where it is interpreted, C's on a CPU."""
    native = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"
    return getattr(module, f"{name}_{'native' if native else 'triton'}")


def sizes(device: torch.device, small: Sequence[tuple[int, ...]], real: Sequence[tuple[int, ...]]) -> Sequence[tuple[int, ...]]:
    """Small ones for the interpreter, which runs one program after another."""
    return small if device.type == "cpu" else real


def shrink_check(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[Case]:
    randn = normals(device, dtype, seed)
    for T, K, segments, r, adapters in sizes(
        device, ((3, 40, 1, 2, 0), (7, 72, 3, 1, 3)), ((77, 3584, 1, 2, 0), (2309, 896, 3, 2, 5), (64, 18944, 1, 8, 2))
    ):
        x, c = randn(T, K), correction(randn, T, K, 16, segments, r, adapters)

        def run(op: Callable[..., Tensor], x: Tensor, c: Correction) -> Outputs:
            z = op(x, c)
            assert c.t is not None
            return z, c.t

        ours, plain = run(launcher(shrink, "shrink", device), x, c), run(shrink.shrink_ref, x, _plain_copy(c))
        yield (f"{T} x {K}, {segments} segments of {r}", ours, plain, run(shrink.shrink_ref, x.double(), _wide(c)))


def add_norm_check(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[Case]:
    randn = normals(device, dtype, seed)
    for T, K, adapters in sizes(device, ((5, 40, 0), (3, 72, 2)), ((77, 896, 3), (2051, 3584, 0), (2048, 4096, 5))):
        inner, outer = (correction(randn, T, K, K, n, 2, adapters) for n in (1, 3))
        x, y, z, w = randn(T, K), randn(T, K + 16), randn(T, 2), randn(K)
        for label, given in (
            ("", (y, z, inner, outer)),
            (" first", (None, None, None, outer)),
            (" last", (y, None, None, None)),
        ):
            y_, z_, i, o = given
            ops = (launcher(add_norm, "add_norm", device), add_norm.add_norm_plain)
            forward = (x, y_, z_, w, 1e-6, i, o)
            yield _padded_case(f"forward{label} {T} x {K}", *ops, forward, K, o, "t", 1.0, 1)
        rstd = (x.float().square().mean(1, keepdim=True) + 1e-6).rsqrt()
        for label, dx, i in (("", randn(T, K + 16), inner), (" last", None, None)):
            backward = (dx, randn(T, K + 16), x, rstd, w, i)
            back = (launcher(add_norm, "add_norm_backward", device), add_norm.add_norm_backward_plain)
            yield _padded_case(f"backward{label} {T} x {K}", *back, backward, K, i, "s", 0.0)


def swiglu_check(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[Case]:
    randn = normals(device, dtype, seed)
    for T, F, adapters in sizes(device, ((5, 40, 0), (3, 72, 2)), ((77, 4864, 3), (2051, 2048, 0), (5, 18944, 0))):
        x, dh = randn(T, 2 * F + 16), randn(T, F + 16)
        inner, outer = correction(randn, T, F, 2 * F, 2, 2, adapters), correction(randn, T, F, 24, 1, 2, adapters)
        for label, i, o in (("", inner, outer), (" off", None, None)):
            ops, back = (
                (launcher(swiglu, "swiglu", device), swiglu.swiglu_plain),
                (launcher(swiglu, "swiglu_backward", device), swiglu.swiglu_backward_plain),
            )
            yield _padded_case(f"forward{label} {T} x {F}", *ops, (x, F, o), F, o, "t", 1.0)
            yield _padded_case(f"backward{label} {T} x {F}", *back, (dh, x, F, i), 2 * F, i, "s", 0.0)


def rope_check(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[Case]:
    randn = normals(device, dtype, seed)
    small = ((5, 3, 1, 8, 0), (3, 8, 4, 12, 2))
    if launcher(rope, "rope", device) is rope.rope_native:  # which takes heads of 16 numbers on
        small = ((5, 3, 1, 16, 0), (3, 8, 4, 48, 2))
    shapes = sizes(device, small, ((77, 14, 2, 64, 3), (1031, 28, 4, 128, 0)))
    for T, heads, kv_heads, D, adapters in shapes:
        cos, sin = rope.rope_tables(torch.arange(T, device=device) * 3, randn(D // 2).float().exp(), dtype)
        for label, q_norm, k_norm in (("", None, None), (" q/k norm", randn(D), randn(D))):
            h = rope.Heads(heads, kv_heads, D, q_norm, k_norm, 1e-6)
            qkv, c = randn(T, h.width + 16), correction(randn, T, 24, h.width, 3, 2, adapters)
            arguments = (qkv, cos, sin, h)
            rows = (
                launcher(rope, "rope", device)(*arguments),
                rope.rope_plain(*arguments),
                rope.rope_plain(*map(_wide, arguments)),
            )
            yield (f"forward{label} {heads}+{kv_heads} x {D}", *rows)
            # (heads, T, D) transposed: how attention hands its gradients over
            grads = [randn(n, T, D).transpose(0, 1) for n in (heads, kv_heads, kv_heads)]
            backward = (*grads, None if q_norm is None else qkv, cos, sin, h, c)
            ops = (launcher(rope, "rope_backward", device), rope.rope_backward_plain)
            yield _padded_case(f"backward{label} {heads}+{kv_heads} x {D}", *ops, backward, h.width, c, "s", 0.0)


def fused_linear_check(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[Case]:
    randn = normals(device, dtype, seed)
    shapes = sizes(
        device,
        ((5, 24, 40, 2, 1), (70, 72, 48, 6, 0)),
        ((7, 896, 896, 2, 0), (200, 1152, 896, 6, 1), (300, 896, 4864, 2, 0), (2051, 1152, 896, 8, 1)),
    )

    def fused(x: Tensor, z: Tensor | None, weight: Tensor, Bt: Tensor | None, bias: Tensor | None) -> Tensor:
        y = x.new_empty(len(x), len(weight) + 16)[:, : len(weight)]
        fused_linear(x, z, weight, Bt, bias, y)
        return y

    for T, N, K, R, has_bias in shapes:
        x, weight = randn(T, K + 64)[:, :K], randn(N, K + 64)[:, :K] / K**0.5
        update = (randn(T, K + 16)[:, K : K + R], weight, randn(R, N), randn(N) if has_bias else None)
        transposed = (randn(T, R), weight.T, randn(R, K), None)
        plain = (None, weight, None, None)
        for label, first, rest in (("", x, update), (" W^T", randn(T, N), transposed), (" bare", x, plain)):
            exact = fused_linear_ref(*map(_wide, (first, *rest)))
            yield (f"{T} x {N} x {K}{label}", fused(first, *rest), fused_linear_ref(first, *rest), exact)


def decode_linear_check(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[Case]:
    """Every number of n8 tiles, with and without splits of K, each epilogue; ends of N, K and T inside of a tile."""
    if dtype == torch.float32:
        return  # it multiplies half precision alone
    randn = normals(device, dtype, seed)
    for T, N, K, segments, r, adapters, epilogue in (
        (1, 1152, 896, 3, 2, 0, "bias"),
        (7, 896, 896, 1, 2, 3, "residual"),
        (16, 9728, 896, 2, 2, 2, "swiglu"),
        (33, 896, 4864, 1, 2, 0, "residual"),
        (64, 1152, 896, 3, 4, 5, "bias"),
        (20, 2 * 1000, 200, 2, 1, 0, "swiglu"),
        (5, 130, 72, 1, 8, 2, ""),
        (9, 300, 333, 0, 0, 0, ""),
        (8, 20000, 256, 2, 2, 0, "swiglu"),
        (64, 3584, 3584, 1, 2, 4, "residual"),
    ):
        if device.type == "cpu":  # a test of this check, with the reference in the kernel's place
            N, K = N // 8, K // 8
        bias = randn(N) if epilogue == "bias" else None
        group = FrozenLinear(randn(N, K + 64 - K % 8)[:, :K] / K**0.5, bias)
        c = dataclasses.replace(correction(randn, T, K, N, segments, r, adapters), t=None, s=None) if segments else None
        x, residual = randn(T, K + 24 - K % 8)[:, :K], randn(T, N) if epilogue == "residual" else None
        wide, gated = FrozenLinear(group.weight.double(), _wide(bias)), epilogue == "swiglu"
        ours = decode_linear.decode_linear_cuda(x, group, c, residual, gated)
        plain = decode_linear.decode_linear_ref(x, group, c, residual, gated)
        real = decode_linear.decode_linear_ref(x.double(), wide, _wide(c), _wide(residual), gated)
        yield (f"{T} x {N} x {K} {epilogue}", ours, plain, real)


def decode_attention_check(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[Case]:
    """A step's way through a paged cache: q, the cache as it is then, the attention's output, and o's z."""
    randn = normals(device, dtype, seed)
    small, real = (
        ((4, 2, 16, 4, 1, 9, 23), (3, 1, 48, 8, 5, 64)),
        ((14, 2, 64, 64, 1, 64, 65, 700), (28, 4, 128, 64, 3, 256, 1500)),
    )
    for heads, kv_heads, D, size, *lengths in sizes(device, small, real):
        slots, most, h = len(lengths), max(lengths) // size + 1, rope.Heads(heads, kv_heads, D)
        c = correction(randn, slots, heads * D, 32, 1, 2, 2)
        pages = [randn(slots * most + 1, kv_heads, size, D) for _ in range(2)]
        table = torch.arange(slots * most, device=device).flip(0).view(slots, most).to(torch.int32)  # pages in no order
        view = decode_attention.CacheView(torch.tensor(lengths, device=device) - 1, table, size, 0, dtype)
        tables = rope.rope_tables(view.positions, randn(D // 2).float().exp(), dtype)
        arguments: list[Any] = [randn(slots, h.width + 16), *tables, *pages, c]

        def kernels(qkv, cos, sin, keys, values, c, view=view, h=h):
            keys, values = keys.clone(), values.clone()
            q = launcher(rope, "rope_cache", device)(qkv, cos, sin, h, keys, values, view.positions, view.table)
            return q, keys, values, *launcher(decode_attention, "decode_attention", device)(q, keys, values, view, c)

        def plain(qkv, cos, sin, keys, values, c, view=view, h=h):
            keys, values, view = keys.clone(), values.clone(), dataclasses.replace(view, dtype=qkv.dtype)
            q, k, v = rope.rope_plain(qkv, cos, sin, h)
            page, place = view.place
            keys[page, :, place], values[page, :, place] = k, v
            return q, keys, values, *decode_attention.decode_attention_plain(q, keys, values, view, c)

        ours, theirs, exact = kernels(*arguments), plain(*map(_plain_copy, arguments)), plain(*map(_wide, arguments))
        yield (f"{heads}+{kv_heads} x {D}, pages of {size}", ours, theirs, exact)


def packed_attention_check(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[Case]:
    """Sequences and suffixes in one pack, with gradients, against whole sequences that repeat their prefixes."""
    randn = normals(device, dtype, seed)
    for heads, kv_heads, D, lengths, prefixes in ((4, 2, 32, [5, 1, 17], []), (3, 1, 48, [9, 4, 3, 1, 8, 2], [1, 0, 0, 1])):
        layout = Packing(lengths, prefixes, dtype, device, None)
        T = sum(lengths)
        q, k, v = randn(T, heads, D), randn(T, kv_heads + 1, D)[:, 1:], randn(T, 2 * kv_heads, D)[:, :kv_heads]
        dout = randn(T, heads, D)
        rows: list[int] = []  # of the pack, for each row of whole sequences
        where: list[int] = []  # which of these are a sequence's own
        starts = layout.starts.tolist()
        for i, n in enumerate(lengths):
            parent = prefixes[i - layout.whole] if i >= layout.whole else None
            ahead = [] if parent is None else list(range(starts[parent], starts[parent] + lengths[parent]))
            where += range(len(rows) + len(ahead), len(rows) + len(ahead) + n)
            rows += [*ahead, *range(starts[i], starts[i] + n)]
        whole = [n + b for n, b in zip(lengths, layout.before, strict=True)]

        def ours(q: Tensor, k: Tensor, v: Tensor, layout: Packing = layout) -> Tensor:
            return attention.NativeAttention.apply(q, k, v, layout)

        def plain(q: Tensor, k: Tensor, v: Tensor, rows=rows, whole=whole, where=where) -> Tensor:
            return attention.packed_attention_ref(q[rows], k[rows], v[rows], whole)[where]

        def run(op: Callable[..., Tensor], *inputs: Tensor) -> Outputs:
            *inputs, dy = (x.detach().requires_grad_() for x in inputs)  # type: ignore[assignment]
            out = op(*inputs)
            return out.detach(), *torch.autograd.grad(out, inputs, dy.detach())

        wide = (x.double() for x in (q, k, v, dout))
        yield (f"{lengths} + {prefixes}", run(ours, q, k, v, dout), run(plain, q, k, v, dout), run(plain, *wide))


def sampling_check(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[Case]:
    """u in the middle of some likely token's share of [0, 1), so that rounding cannot change which token it is."""
    randn = normals(device, dtype, seed)
    for rows, vocab in ((7, 9000), (3, 50), (33, 4096)):  # of one row, twice plain's error is a matter of luck
        logits = 4 * randn(rows, vocab)
        logits[:, vocab // 3] = 24  # more than any other: no ties
        for temperature in (1.3, 0.0):
            p = (logits.double() / (temperature or 1.0)).softmax(1)
            likely = p.argsort(1, descending=True)[torch.arange(rows), torch.arange(rows) % 4]  # (rows,)
            cdf = p.cumsum(1) - p / 2  # (rows, vocab): the middle of each share
            u = cdf.gather(1, likely[:, None]).squeeze(1)
            ours = sample_triton(logits, temperature, 1.0, 0, u)
            plain = sample_ref(logits, temperature, 1.0, 0, u)
            exact = sample_ref(logits.double(), temperature, 1.0, 0, u)
            yield (f"{rows} of {vocab} at temperature {temperature}", ours, plain, exact)


def token_logprobs_check(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[Case]:
    """Log-prob, entropy and the gradient of the hidden states."""
    randn = normals(device, dtype, seed)
    for rows, width, vocab in ((70, 96, 1000), (3, 64, 129)):
        hidden, head, dlogp = randn(rows, width), randn(vocab, width) / 4, randn(rows).float()
        tokens = (randn(rows).double().abs() * vocab / 5).long().clamp(max=vocab - 1)

        def run(op: Callable[..., tuple[Tensor, Tensor]], x: Tensor, w: Tensor, dy: Tensor, y: Tensor = tokens) -> Outputs:
            x = x.detach().requires_grad_()
            logp, entropy = op(x, w, y, 0.7)
            return logp.detach(), entropy.detach(), *torch.autograd.grad(logp, x, dy.to(logp.dtype))

        exact = run(token_logprobs_ref, hidden.double(), head.double(), dlogp)
        ours, plain = (run(op, hidden, head, dlogp) for op in (token_logprobs_triton, token_logprobs_ref))
        yield (f"{rows} x {width} x {vocab}", ours, plain, exact)


# The check of each op, under the name that the op gives `runs_triton`.
CHECKS: dict[str, Check] = {
    "fused_linear": fused_linear_check,
    "shrink": shrink_check,
    "add_norm": add_norm_check,
    "swiglu": swiglu_check,
    "rope": rope_check,
    "decode_attention": decode_attention_check,
    "reduce_dm": reduce_dm_check,
    "sampling": sampling_check,
    "token_logprobs": token_logprobs_check,
}


# The same of the C kernels, under the names that the ops give `runs_native`.
NATIVE_CHECKS: dict[str, Check] = {
    **{op: CHECKS[op] for op in ("shrink", "add_norm", "swiglu", "rope", "decode_attention")},
    "packed_attention": packed_attention_check,
}


# The same of the CUDA C++ kernels, which have to be compiled first.
CUDA_CHECKS: dict[str, Check] = {"decode_linear": decode_linear_check}
