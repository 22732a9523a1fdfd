"""The grouped softmax where every L-th token is a landmark: row by row of blocks, with gradients by hand.

With p the softmax inside a block b, of log-sum-exp z_b, and s the scores,

    l_b = s_landmark(b)  for b < cur,   l_cur = z_cur          one logit a block
    a   = softmax over b of l_b;   W_j = a_b p_j;   out = W v;   lse = logsumexp over b of l_b

so one exponential a score and one a block is all there is. Backward, with P = dout v^T, D_b = sum_j p_j P_j
and d = dout . out - dlse:

    ds_j = W_j (P_j - D_b) for b < cur,   W_j (P_j - d) for cur,   ds_landmark(b) = a_b (D_b - d)

Of the scores no more than those of some rows exist at a time; backward is left one number a row and block.
Source: Mohtashami and Jaggi, 2023, arXiv 2305.16300, section 3.1; the gradients are ours. Status: agrees with
the definition in `groups.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

NUMBERS = {"cpu": 2**21, "cuda": 2**26}
MOST_ROWS = 128


class Regular(NamedTuple):
    """How rows and keys stand: landmarks end every block of `block` keys; row i is at key `offset` + i."""

    block: int
    offset: int
    scale: float


def attend_regular(q: Tensor, k: Tensor, v: Tensor, how: Regular) -> tuple[Tensor, Tensor]:
    """Return grouped attention [B, H, T, Dv], and the log-sum-exp of its gates and current tokens [B, H, T].

    In float32, or float64 where q is. Gradients, of both, are of first order.

    Args:
        q: [B, H, T, D]; k: [B, Hkv, S, D] and v: [B, Hkv, S, Dv], of which those to `offset` + T are read.
    """
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = (x.to(kind) for x in (q, k, v))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        out, lse = _Regular.apply(q, k, v, how)
        return out, lse
    out, lse, _ = _forward(q, k, v, how, keep=False)
    return out, lse


class _Piece(NamedTuple):
    """Rows start to stop, which see the first `blocks` blocks, all before `full` whole."""

    start: int
    stop: int
    blocks: int
    full: int


def _pieces(q: Tensor, how: Regular) -> Iterator[_Piece]:
    start, length, heads = 0, q.shape[2], max(1, q.shape[0] * q.shape[1])
    budget = NUMBERS.get(q.device.type, NUMBERS["cuda"])
    while start < length:
        first = how.offset + start
        rows = budget // (heads * (first + how.block)) or 1
        rows = min(MOST_ROWS, max(16, rows))
        if rows > how.block:
            rows -= (first + rows) % how.block
        stop = min(length, start + rows)
        blocks = (how.offset + stop - 1) // how.block + 1
        yield _Piece(start, stop, blocks, first // how.block)
        start = stop


class _Tiles:
    """Queries, keys and values with the heads of a group beside each other, keys in whole blocks."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, how: Regular) -> None:
        self.how, self.kv_heads = how, k.shape[1]
        need = -(-(how.offset + q.shape[2]) // how.block) * how.block
        self.q, self.k, self.v = q * how.scale, _whole(k, need), _whole(v, need)

    def rows(self, x: Tensor, piece: _Piece) -> Tensor:
        """Rows of x [B, H, T, N] as [B, Hkv, G R, N]."""
        return x[:, :, piece.start : piece.stop].reshape(x.shape[0], self.kv_heads, -1, x.shape[-1])

    def scores(self, piece: _Piece) -> tuple[Tensor, Tensor]:
        """Scores in blocks [B, H, R, n, L], hidden ones and landmarks -inf, and landmarks' [B, H, R, n]."""
        batch, heads = self.q.shape[:2]
        length = piece.blocks * self.how.block
        scores = self.rows(self.q, piece) @ self.k[:, :, :length].transpose(2, 3)
        scores = scores.view(batch, heads, piece.stop - piece.start, piece.blocks, self.how.block)
        marks = scores[..., -1].clone()
        scores[..., -1] = -torch.inf
        at = self.how.offset + torch.arange(piece.start, piece.stop, device=scores.device)
        near = torch.arange(piece.full * self.how.block, length, device=scores.device)
        later = (near > at[:, None]).view(len(at), -1, self.how.block)
        scores[..., piece.full :, :].masked_fill_(later, -torch.inf)
        return scores, marks

    def own(self, piece: _Piece) -> Tensor:
        """The block of each row, int64 [R, 1]."""
        at = torch.arange(piece.start, piece.stop, device=self.q.device) + self.how.offset
        return (at // self.how.block)[:, None]

    def flat(self, x: Tensor) -> Tensor:
        """[B, H, R, n, L] as [B, Hkv, G R, n L]."""
        return x.view(x.shape[0], self.kv_heads, -1, x.shape[-2] * x.shape[-1])


def _whole(x: Tensor, need: int) -> Tensor:
    have = x.shape[2]
    return x[:, :, :need] if have >= need else F.pad(x, (0, 0, 0, need - have))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, how: Regular, keep: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Out, lse, and of each piece the log of W_j / exp(s_j), [B, H, R, n]."""
    tiles = _Tiles(q, k, v, how)
    out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3])
    kept = []
    for piece in _pieces(q, how):
        scores, marks = tiles.scores(piece)
        top = scores.amax(-1)
        top = top.masked_fill_(top == -torch.inf, 0.0)
        weights = scores.sub_(top[..., None]).exp_()
        sums = weights.sum(-1)
        here, own = torch.arange(piece.blocks, device=q.device), tiles.own(piece)
        logs = sums.log().add_(top)
        logits = torch.where(here < own, marks, logs).masked_fill_(here > own, -torch.inf)
        total = logits.logsumexp(-1)
        shift = logits.sub_(total[..., None])
        factor = shift.exp().div_(sums.masked_fill(sums == 0, 1.0))
        weights = tiles.flat(weights.mul_(factor[..., None]))
        seen = tiles.v[:, :, : weights.shape[-1]]
        out[:, :, piece.start : piece.stop] = (weights @ seen).view(*q.shape[:2], -1, v.shape[3])
        lse[:, :, piece.start : piece.stop] = total
        if keep:
            kept.append(shift.sub_(logs).masked_fill_(here > own, -torch.inf))
    return out, lse, kept


class _Regular(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, how: Regular) -> tuple[Tensor, Tensor]:
        out, lse, kept = _forward(q, k, v, how, keep=True)
        ctx.save_for_backward(q, k, v, out, lse, *kept)
        ctx.how = how
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *kept = ctx.saved_tensors
        how: Regular = ctx.how
        tiles = _Tiles(q, k, v, how)
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(tiles.k), torch.zeros_like(tiles.v)
        mean = (grad * out).sum(-1).sub_(grad_lse)
        for piece, shift in zip(_pieces(q, how), kept, strict=True):
            rows = slice(piece.start, piece.stop)
            scores, marks = tiles.scores(piece)
            weights = scores.add_(shift[..., None]).exp_()
            given, length = tiles.rows(grad, piece), piece.blocks * how.block
            keys, values = tiles.k[:, :, :length], tiles.v[:, :, :length]
            of_weights = (given @ values.transpose(2, 3)).view_as(weights)
            here, own = torch.arange(piece.blocks, device=q.device), tiles.own(piece)
            inner = (weights * of_weights).sum(-1)  # a_b D_b
            gates = torch.where(here < own, (marks - lse[:, :, rows, None]).exp_(), 0.0)
            middle = mean[:, :, rows, None]
            centre = torch.where(here < own, inner / gates.masked_fill(gates == 0, 1.0), middle)
            of_v[:, :, :length] += tiles.flat(weights).transpose(2, 3) @ given
            of_scores = of_weights.sub_(centre[..., None]).mul_(weights)
            of_scores[..., -1] = torch.where(here < own, inner - gates * middle, 0.0)
            of_scores = tiles.flat(of_scores)
            of_q[:, :, rows] = (of_scores @ keys).view(*q.shape[:2], -1, q.shape[3])
            of_k[:, :, :length] += of_scores.transpose(2, 3) @ tiles.rows(tiles.q, piece)
        of_k, of_v = (_whole(x, y.shape[2]) for x, y in ((of_k, k), (of_v, v)))
        return of_q.mul_(how.scale), of_k, of_v, None
