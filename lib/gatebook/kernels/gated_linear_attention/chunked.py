"""Chunkwise gated linear attention with secondary chunking, in plain PyTorch (§4.3 and §4.4).

Shapes, after the split into N chunks of C tokens: q, k, a `[B, H, N, C, K]`, v `[B, H, N, C, V]`,
states s `[B, H, N + 1, K, V]`. Here a = log α is the gate itself and g its sum from the start of
the chunk. In the paper's names Λ = exp(g), Γ = exp(g_C − g) and γ = exp(g_C), where g_C is the
last row of g. The factor on the output is applied to q first.

A padded token has q = k = v = 0 and gate 1, so it changes neither outputs nor states.

Every decay is the exponential of a difference of two sums g, so its relative error is about
|g_C| · 6e-8 in float32: 1e-6 for ordinary gates, 1e-4 in a chunk that is forgotten e^2000-fold.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def chunked_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    state: Tensor,
    chunk_size: int,
    subchunk: int,
) -> tuple[Tensor, Tensor]:
    """The chunkwise form; arguments and results as `naive_gla`, plus the two block lengths.

    Args:
        q: Queries `[B, T, H, K]`.
        k: Keys `[B, T, H, K]`.
        v: Values `[B, T, H, V]`.
        g: Natural-log gates `[B, T, H, K]`.
        scale: The factor s on the output.
        state: The state before the first token, S_0 `[B, H, K, V]`.
        chunk_size: The paper's C, at least 1; rounded up to a multiple of the sub-chunk.
        subchunk: The paper's c, a power of two.

    Returns:
        The outputs `[B, T, H, V]` and the last state `[B, H, K, V]`.
    """
    length = q.shape[1]
    size = min(chunk_size, length)
    c = min(subchunk, 1 << (size - 1).bit_length())
    size = -(-size // c) * c
    q, k, v, a = (_split(x, size) for x in (q, k, v, g))
    o, state = _ChunkedGLA.apply(q, k, v, a, state, scale, c)
    return o.flatten(2, 3)[:, :, :length].transpose(1, 2), state


def _split(x: Tensor, size: int) -> Tensor:
    x = F.pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % size))
    return x.unflatten(2, (-1, size)).contiguous()  # (B, H, N, C, D)


class _ChunkedGLA(torch.autograd.Function):
    """Forward and backward of the materialised schedule: the states are computed again backward."""

    @staticmethod
    def forward(ctx, q, k, v, a, s0, scale, c):
        ctx.scale, ctx.c = scale, c
        g = a.cumsum(-2)
        p = _scores(q.to(g.dtype) * scale, k.to(g.dtype), g, c, v.dtype)
        s = _states(k, v, g, s0)
        o = p @ v + _mm(q * scale * g.exp(), s[:, :, :-1], v.dtype).to(v.dtype)
        ctx.save_for_backward(q, k, v, g, s0, p)
        return o, s[:, :, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, do, ds_last):
        q, k, v, g, s0, p = ctx.saved_tensors
        dtype, to_start, to_end = v.dtype, g.exp(), (g[..., -1:, :] - g).exp()
        q, k = q.to(g.dtype) * ctx.scale, k.to(g.dtype)
        s = _states(k, v, g, s0)
        ds = _state_gradients(_mm((q * to_start).mT, do, dtype), g, ds_last)
        dv = p.mT @ do + _mm(k * to_end, ds[:, :, 1:], dtype).to(dtype)
        dq = _mm(do, s[:, :, :-1].mT, dtype) * to_start
        dk = _mm(v, ds[:, :, 1:].mT, dtype) * to_end
        _add_score_gradients(_mm(do, v.mT, dtype), q, k, g, ctx.c, dtype, dq, dk)
        da = _gate_gradient(q * dq - k * dk, s[:, :, 1:], ds[:, :, 1:])
        return (dq * ctx.scale).to(dtype), dk.to(dtype), dv, da, ds[:, :, 0], None, None


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrix product in `dtype`, the type of v; the result at least in float32."""
    return (a.to(dtype) @ b.to(dtype)).to(torch.promote_types(dtype, torch.float32))


def _states(k: Tensor, v: Tensor, g: Tensor, s0: Tensor) -> Tensor:
    """S_[i+1] = Diag(γ) S_[i] + (K ⊙ Γ)ᵀ V at every chunk boundary `[B, H, N + 1, K, V]`."""
    to_end = (g[..., -1:, :] - g).exp()
    s = torch.cat([s0.unsqueeze(2), _mm((k * to_end).mT, v, v.dtype)], 2)
    decay = g[..., -1, :].exp().unsqueeze(-1)  # (B, H, N, K, 1)
    for n in range(g.shape[2]):
        s[:, :, n + 1].addcmul_(decay[:, :, n], s[:, :, n])
    return s


def _state_gradients(updates: Tensor, g: Tensor, ds_last: Tensor) -> Tensor:
    """dS_[i] = Diag(γ) dS_[i+1] + (Q ⊙ Λ)ᵀ dO, from the last chunk back to the first."""
    ds = torch.cat([updates, ds_last.unsqueeze(2)], 2)  # (B, H, N + 1, K, V)
    decay = g[..., -1, :].exp().unsqueeze(-1)
    for n in reversed(range(g.shape[2])):
        ds[:, :, n].addcmul_(decay[:, :, n], ds[:, :, n + 1])
    return ds


def _gate_gradient(dlog_b: Tensor, s_end: Tensor, ds_end: Tensor) -> Tensor:
    """d log α_t = Σ_{i ≥ t} d log b_i + (S_C ⊙ dS_C) 1, within each chunk (§4.4, closed form).

    d log b = q ⊙ dq − k ⊙ dk. Taken chunk by chunk, the sum never runs over more than C tokens.
    """
    later = dlog_b.flip(-2).cumsum(-2).flip(-2)
    return later + (s_end * ds_end).sum(-1).unsqueeze(-2)


class _Block(NamedTuple):
    """A block of P that lies wholly below the diagonal: which rows, columns and entries it is."""

    rows: Callable[[Tensor], Tensor]  # view of (..., C, K): the queries of the block
    cols: Callable[[Tensor], Tensor]  # view of (..., C, K): its keys
    entries: Callable[[Tensor], Tensor]  # view of (..., C, C): the block itself
    exact: bool  # computed in the gates' precision rather than in that of v

    def decays(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """e^{g − z} for the queries and e^{z − g} for the keys, z = g at the first query."""
        gq, gk = self.rows(g), self.cols(g)
        z = gq[..., :1, :]
        return (gq - z).exp(), (z - gk).exp()


def _blocks(size: int, c: int) -> Iterator[_Block]:
    """Tiles the strict lower triangle of P by blocks in which no exponent is positive.

    Between sub-chunks as in the paper. Within a sub-chunk the paper goes entry by entry; halving
    it again and again (widths c/2, c/4, …, 1) gives the same numbers from matrix products.
    """
    for i in range(c, size, c):
        rows, cols = slice(i, i + c), slice(0, i)
        yield _Block(
            lambda x, rows=rows: x[..., rows, :],
            lambda x, cols=cols: x[..., cols, :],
            lambda p, rows=rows, cols=cols: p[..., rows, cols],
            exact=False,
        )
    while c > 1:
        c //= 2
        yield _Block(
            lambda x, w=c: x.unflatten(-2, (-1, 2, w))[..., 1, :, :],  # (..., C/2w, w, K)
            lambda x, w=c: x.unflatten(-2, (-1, 2, w))[..., 0, :, :],
            lambda p, w=c: _paired(p, w),
            exact=True,
        )


def _paired(p: Tensor, w: int) -> Tensor:
    """The blocks (second half, first half) of each pair of width w: `[..., C/2w, w, w]`."""
    p = p.unflatten(-1, (-1, 2, w))[..., 0, :].unflatten(-3, (-1, 2, w))[..., 1, :, :, :]
    return p.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _scores(q: Tensor, k: Tensor, g: Tensor, c: int, dtype: torch.dtype) -> Tensor:
    """P ⊙ M of each chunk, `[B, H, N, C, C]` in `dtype`."""
    p = torch.diag_embed((q * k).sum(-1).to(dtype))
    for block in _blocks(q.shape[-2], c):
        decay_q, decay_k = block.decays(g)
        rows, cols = block.rows(q) * decay_q, block.cols(k) * decay_k
        block.entries(p).copy_(_mm(rows, cols.mT, g.dtype if block.exact else dtype))
    return p


def _add_score_gradients(
    dp: Tensor, q: Tensor, k: Tensor, g: Tensor, c: int, dtype: torch.dtype, dq: Tensor, dk: Tensor
) -> None:
    """Adds to dq and dk what flows through P, whose gradient is `dp` (its upper half is unused)."""
    diagonal = dp.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    dq.addcmul_(diagonal, k)
    dk.addcmul_(diagonal, q)
    for block in _blocks(q.shape[-2], c):
        decay_q, decay_k = block.decays(g)
        entries, kind = block.entries(dp), g.dtype if block.exact else dtype
        block.rows(dq).addcmul_(decay_q, _mm(entries, block.cols(k) * decay_k, kind))
        block.cols(dk).addcmul_(decay_k, _mm(entries.mT, block.rows(q) * decay_q, kind))
