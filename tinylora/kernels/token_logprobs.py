"""Log-probability and entropy of given tokens under a frozen LM head, without all logits in memory at once.

    l = h W^T / temperature    logp = l[token] - logsumexp(l)    entropy = logsumexp(l) - sum_v softmax(l)_v l_v
    dh = (g (onehot(token) - softmax(l)) / temperature) W          dW does not exist; entropy is a metric, without gradient

Plain PyTorch goes through blocks of rows and tiles of the vocabulary, once: the gradient for g = 1 is a mean of the head's
rows, which is summed along with the exponentials, so two products serve both directions where a second pass makes it three. A
vocabulary of one tile takes the very operations of sampling, so rollout and update agree to the bit. The Triton forward keeps
three numbers for each row and share of the vocabulary, and its logits are never rounded below fp32. Its backward writes a chunk
of dlogits, in the head's precision, for cuBLAS to multiply. Nothing depends on the order in which blocks run.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylora.kernels import dispatch
from tinylora.kernels.launch import launch, tl, triton
from tinylora.kernels.products import CHAIN, onednn_linear, pad_rows

ROWS, TILE = 512, 1024  # plain PyTorch holds logits of this many rows and tokens at a time
SPLITS = 16  # shares of the vocabulary: with 1024 rows in blocks of 128 they fill a GPU of 132 processors
BUDGET = {"_share": (255, 98_336), "_combine": (64, 0), "_dlogits": (224, 98_336)}  # registers, bytes of shared memory


def token_logprobs_ref(hidden: Tensor, head: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The formula with all logits at once, differentiable by autograd: the oracle."""
    logp = log_softmax_at(F.linear(hidden, head), temperature)
    return logp.gather(1, tokens[:, None]).squeeze(1), -(logp.exp() * logp).sum(1)


def log_softmax_at(logits: Tensor, temperature: float) -> Tensor:
    """log softmax of logits / temperature in at least fp32; rollout and update share it."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.log_softmax(wide / temperature, -1)


def _slices(total: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, total)) for i in range(0, total, size)]


def _forward(hidden: Tensor, head: Tensor, tokens: Tensor, temperature: float, slope: Tensor | None) -> tuple[Tensor, Tensor]:
    """logp and entropy of a block of rows; `slope` (rows, hidden), where it is wanted, gets the gradient of logp.

    Running sums relative to the largest logit so far, of all tokens but the row's own for the slope, so that nothing cancels
    where its probability is almost 1: total = sum e^(l - most), moment = sum e^(l - most) (l - most), rest = sum_others
    e^(l - most), mean = sum_others e^(l - most) W.
    """
    most = total = moment = chosen = rest = hidden.new_zeros(
        len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32)
    )
    mean = None if slope is None else most.new_zeros(hidden.shape)
    product = onednn_linear if hidden.shape[1] <= CHAIN else F.linear
    for tile in _slices(len(head), TILE):
        logits = product(hidden, head[tile])  # (rows, TILE)
        logits = (logits if logits.dtype == torch.float64 else logits.float()).div_(temperature)
        inside = (tokens >= tile.start) & (tokens < tile.stop)
        place = (tokens - tile.start).clamp(0, logits.shape[1] - 1)[:, None]  # (rows, 1)
        chosen = torch.where(inside, logits.gather(1, place).squeeze(1), chosen)
        largest = logits.amax(1) if tile.start == 0 else torch.maximum(most, logits.amax(1))
        shift = most - largest
        logits.sub_(largest[:, None])
        weights = logits.exp()
        moment = shift.exp() * (moment + shift * total) + torch.linalg.vecdot(weights, logits)
        total = shift.exp() * total + weights.sum(1)
        most = largest
        if mean is not None:
            weights.scatter_(1, place, torch.where(inside[:, None], 0.0, weights.gather(1, place)))
            rest = shift.exp() * rest + weights.sum(1)
            mean.mul_(shift.exp()[:, None]).add_(onednn_linear(weights.to(head.dtype), head[tile].T))
    if slope is not None and mean is not None:
        slope.copy_(head[tokens]).mul_(rest[:, None]).sub_(mean).div_(temperature * total[:, None])
    return chosen - most - total.log(), total.log() - moment / total


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, tokens, temperature, wants_slope):
        slope = hidden.new_empty(hidden.shape, dtype=torch.promote_types(hidden.dtype, torch.float32)) if wants_slope else None
        parts = []
        for rows in _slices(len(hidden), ROWS):
            own = None if slope is None else slope[rows]
            parts.append(_forward(hidden[rows], head, tokens[rows], temperature, own))
        logp, entropy = map(torch.cat, zip(*parts, strict=True)) if parts else hidden.new_zeros(2, 0)
        ctx.save_for_backward(slope)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, dlogp, _):
        (slope,) = ctx.saved_tensors
        return (slope * dlogp[:, None]).to(ctx.dtype), None, None, None, None


class _OneTile(torch.autograd.Function):
    """A vocabulary of one tile."""

    @staticmethod
    def forward(ctx, hidden, head, tokens, temperature):
        parts = []
        for rows in _slices(len(hidden), ROWS):
            logits = F.linear(hidden[rows], head)
            logp = log_softmax_at(logits, temperature)
            chosen, entropy = logp.gather(1, tokens[rows, None]).squeeze(1), -(logp.exp() * logp).sum(1)
            place = logp.argmax(1, keepdim=True)
            most = logits.gather(1, place).to(logp.dtype) / temperature  # (rows, 1)
            parts.append((chosen, entropy, most.squeeze(1), -logp.gather(1, place).squeeze(1)))
        chosen, entropy, most, log_total = map(torch.cat, zip(*parts, strict=True)) if parts else hidden.new_zeros(4, 0)
        ctx.save_for_backward(hidden, head, tokens, most, log_total)  # most + log_total is the logsumexp
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    def backward(ctx, dlogp, _):
        hidden, head, tokens, most, log_total = ctx.saved_tensors
        dhidden = hidden.new_zeros(hidden.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
        for rows in _slices(len(hidden), ROWS):
            g = dlogp[rows, None] / ctx.temperature  # (rows, 1)
            dlogits = F.linear(hidden[rows], head)
            dlogits = (dlogits if dlogits.dtype == torch.float64 else dlogits.float()).div_(ctx.temperature)
            dlogits.sub_(most[rows, None]).sub_(log_total[rows, None]).exp_().mul_(-g)
            dlogits.scatter_add_(1, tokens[rows, None], g)
            dhidden[rows] += dlogits.to(head.dtype) @ head
        return dhidden.to(hidden.dtype), None, None, None


@triton.jit
def _logits(
    hidden_ptr,  # (T, width)
    head_ptr,  # (vocab, width)
    rows,  # (ROWS,) int64
    columns,  # (COLUMNS,) int64
    T,
    vocab,
    width,
    stride_hidden,
    stride_head,
    temperature,
    DEPTH: tl.constexpr,
):
    """One tile (ROWS, COLUMNS) of the logits in fp32. Outside (T, vocab) it repeats the last row and column: no mask."""
    k = tl.arange(0, DEPTH)
    x_ptr = hidden_ptr + tl.minimum(rows, T - 1)[:, None] * stride_hidden + k[None, :]  # (ROWS, DEPTH)
    w_ptr = head_ptr + tl.minimum(columns, vocab - 1)[None, :] * stride_head + k[:, None]  # (DEPTH, COLUMNS)
    tile = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
    for start in range(0, width, DEPTH):
        x = tl.load(x_ptr, (k < width - start)[None, :], 0.0)
        w = tl.load(w_ptr, (k < width - start)[:, None], 0.0)
        tile = tl.dot(x, w, tile, input_precision="ieee")  # by default fp32 would be multiplied as TF32
        x_ptr += DEPTH
        w_ptr += DEPTH
    return tile / temperature


@triton.jit
def _share(
    hidden_ptr,  # (T, width)
    head_ptr,  # (vocab, width)
    tokens_ptr,  # (T,) int64
    chosen_ptr,  # (T,): the token's logit
    shares_ptr,  # (splits, 3, T): max, sum e^(l - max), sum e^(l - max) (l - max)
    T,
    vocab,
    width,
    stride_hidden,
    stride_head,
    temperature,
    tiles,  # of COLUMNS tokens in a share
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    split = tl.program_id(0)  # neighbours read the same rows, which stay in the cache
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.load(tokens_ptr + rows, rows < T, -1)
    lowest = -1e30  # adds nothing, and unlike -inf gives no NaN when a zero multiplies it
    top = tl.full((ROWS,), lowest, tl.float32)
    mass, moment, chosen = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    first, end = split * tiles * COLUMNS, tl.minimum((split + 1) * tiles * COLUMNS, vocab)
    for start in range(first, end, COLUMNS):
        columns = start + tl.arange(0, COLUMNS).to(tl.int64)
        tile = _logits(hidden_ptr, head_ptr, rows, columns, T, vocab, width, stride_hidden, stride_head, temperature, DEPTH)
        chosen += tl.sum(tl.where(columns[None, :] == token[:, None], tile, 0.0), 1)
        tile = tl.where((columns < vocab)[None, :], tile, lowest)
        new = tl.maximum(top, tl.max(tile, 1))
        below = tile - new[:, None]
        p = tl.exp(below)
        drop = top - new
        moment = tl.exp(drop) * (moment + mass * drop) + tl.sum(p * below, 1)
        mass = tl.exp(drop) * mass + tl.sum(p, 1)
        top = new
    out = shares_ptr + split.to(tl.int64) * 3 * T + rows
    tl.store(out, top, rows < T)
    tl.store(out + T, mass, rows < T)
    tl.store(out + 2 * T, moment, rows < T)
    tl.store(chosen_ptr + rows, chosen, (rows < T) & (token >= first) & (token < end))


@triton.jit
def _combine(
    chosen_ptr,  # (T,)
    shares_ptr,  # (splits, 3, T)
    logp_ptr,  # (T,)
    entropy_ptr,  # (T,)
    lse_ptr,  # (T,)
    T,
    splits,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    share_ptr = shares_ptr + rows
    top = tl.load(share_ptr, rows < T, 0.0)
    mass = tl.load(share_ptr + T, rows < T, 1.0)
    moment = tl.load(share_ptr + 2 * T, rows < T, 0.0)
    for _ in range(1, splits):
        share_ptr += 3 * T
        other = tl.load(share_ptr, rows < T, 0.0)
        other_mass = tl.load(share_ptr + T, rows < T, 1.0)
        new = tl.maximum(top, other)
        a, b = tl.exp(top - new), tl.exp(other - new)
        moment = a * (moment + mass * (top - new))
        moment += b * (tl.load(share_ptr + 2 * T, rows < T, 0.0) + other_mass * (other - new))
        mass = a * mass + b * other_mass
        top = new
    log_mass = tl.log(mass)
    tl.store(lse_ptr + rows, top + log_mass, rows < T)
    tl.store(logp_ptr + rows, tl.load(chosen_ptr + rows, rows < T, 0.0) - top - log_mass, rows < T)
    tl.store(entropy_ptr + rows, log_mass - moment / mass, rows < T)


@triton.jit
def _dlogits(
    hidden_ptr,  # (T, width)
    head_ptr,  # (vocab, width)
    tokens_ptr,  # (T,) int64
    lse_ptr,  # (T,)
    dlogp_ptr,  # (T,)
    out_ptr,  # (T, vocab)
    T,
    vocab,
    width,
    stride_hidden,
    stride_head,
    stride_out,
    temperature,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # neighbours read the same part of the head
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS).to(tl.int64)
    tile = _logits(hidden_ptr, head_ptr, rows, columns, T, vocab, width, stride_hidden, stride_head, temperature, DEPTH)
    token = tl.load(tokens_ptr + rows, rows < T, -1)
    g = tl.load(dlogp_ptr + rows, rows < T, 0.0) / temperature
    p = tl.exp(tile - tl.load(lse_ptr + rows, rows < T, 0.0)[:, None])
    d = g[:, None] * (tl.where(columns[None, :] == token[:, None], 1.0, 0.0) - p)
    inside = (rows < T)[:, None] & (columns < vocab)[None, :]
    tl.store(out_ptr + rows[:, None] * stride_out + columns[None, :], d.to(out_ptr.dtype.element_ty), inside)


def config(dtype: torch.dtype) -> dict[str, Any]:
    """Blocks of the products, the largest that spill nothing on any of three generations: 128 x 256 did, on all three."""
    if dtype == torch.float32:
        return {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32, "num_warps": 4, "num_stages": 2}
    return {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3}


def shares(vocab: int, columns: int) -> tuple[int, int]:
    """Shares of the vocabulary and the tiles of `columns` tokens in each, none empty; a row's bits depend on no other row."""
    tiles = triton.cdiv(vocab, columns)
    each = triton.cdiv(tiles, SPLITS)
    return triton.cdiv(tiles, each), each


def chunk_rows(rows: int) -> int:
    """Rows of dlogits in memory: under a twentieth of them beyond 2560, in whole blocks; 1024 are enough for a good GEMM."""
    return min(1024, max(128, rows // 20 // 128 * 128))


class _TokenLogprobsTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, tokens, temperature):
        (rows, width), vocab, options = hidden.shape, len(head), config(hidden.dtype)
        splits, tiles = shares(vocab, options["COLUMNS"])
        logp, entropy, lse = hidden.new_empty(3, rows, dtype=torch.float32)
        chosen = torch.full_like(logp, torch.nan)  # a token outside the vocabulary has no logit
        parts = logp.new_empty(splits, 3, rows)
        sizes = (rows, vocab, width, hidden.stride(0), head.stride(0), temperature)
        grid = (splits, triton.cdiv(rows, options["ROWS"]))
        launch(_share, grid, hidden, head, tokens, chosen, parts, *sizes, tiles, **options)
        launch(_combine, (triton.cdiv(rows, 128),), chosen, parts, logp, entropy, lse, rows, splits, ROWS=128, num_warps=4)
        ctx.save_for_backward(hidden, head, tokens, lse)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, dlogp, _):
        hidden, head, tokens, lse = ctx.saved_tensors
        (rows, width), vocab, options = hidden.shape, len(head), config(hidden.dtype)
        size = chunk_rows(rows)
        # rows of the buffer start at multiples of 64 elements, for wide stores; its columns beyond vocab are never read
        buffer = hidden.new_empty(min(rows, size), triton.cdiv(vocab, 64) * 64)[:, :vocab]
        dhidden, dlogp = torch.empty_like(hidden), dlogp.contiguous()
        for start in range(0, rows, size):
            chunk = slice(start, min(start + size, rows))
            count = chunk.stop - start
            strides = (hidden.stride(0), head.stride(0), buffer.stride(0))
            grid = (triton.cdiv(count, options["ROWS"]), triton.cdiv(vocab, options["COLUMNS"]))
            tensors = (hidden[chunk], head, tokens[chunk], lse[chunk], dlogp[chunk], buffer)
            launch(_dlogits, grid, *tensors, count, vocab, width, *strides, ctx.temperature, **options)
            torch.mm(buffer[:count], head, out=dhidden[chunk])
        return dhidden, None, None, None


def token_logprobs_triton(hidden: Tensor, head: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """`token_logprobs` in bf16, fp16 or fp32; a token outside the vocabulary gives NaN. Raises ValueError on a strided head."""
    if head.stride(1) != 1:
        raise ValueError(f"the head's rows must be contiguous; its strides are {head.stride()}")
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    return _TokenLogprobsTriton.apply(hidden, head, tokens.contiguous(), float(temperature))


def token_logprobs(
    hidden: Tensor,  # (T, hidden)
    head: Tensor,  # (vocab, hidden), frozen
    tokens: Tensor,  # (T,) int64
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # (T,), (T,), at least fp32
    """Log-probability of tokens[i] after hidden[i], and the entropy there, with a gradient for hidden through the first."""
    if dispatch.runs_triton("token_logprobs", hidden):
        return token_logprobs_triton(hidden, head, tokens, temperature)
    rows = len(hidden)
    hidden, tokens = pad_rows(hidden), pad_rows(tokens)
    if len(head) <= TILE:
        logp, entropy = _OneTile.apply(hidden, head, tokens, temperature)
    else:
        wants_slope = torch.is_grad_enabled() and hidden.requires_grad
        logp, entropy = _TokenLogprobs.apply(hidden, head, tokens, temperature, wants_slope)
    return logp[:rows], entropy[:rows]
