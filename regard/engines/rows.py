"""Exact attention, a block of query rows at a time, with every stage open.

    scores  = softcap(scale * q k^T) + bias + mask          [B, H, R, K]
    weights = softmax(scores, sink logits in the denominator) [B, H, R, K]
    outputs = dropout(weights) v                            [B, H, R, Dv]

The softmax is taken in float32. Memory is O(B * H * R * S) for one block of R rows; under autograd all
blocks are kept, as O(B * H * T * S), unless the caller checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.engines import stats
from regard.engines.buffers import Buffers
from regard.engines.masks import Mask
from regard.engines.products import Operand, even_pieces

BLOCK_BYTES = {"cpu": 20 * 2**20, "cuda": 2**28}
MIN_ROWS, MAX_ROWS = 16, 128


@dataclass(eq=False)
class AttentionInputs:
    """What one attention call computes with.

    Attributes:
        q: queries [B, H, T, D], after any rotary embedding.
        k: keys [B, Hkv, S, D], not repeated; H is a multiple of Hkv.
        v: values [B, Hkv, S, Dv].
        mask: which keys each row may see.
        scale: factor on q k^T.
        softcap: c in c * tanh(scores / c), or None.
        bias: added to the scores, broadcastable to [B, H, T, S], or None.
        sink_logits: one logit a head [H], or one a head and row [B|1, H, T, 1], that joins the softmax and
            is then dropped; or None.
        dropout: probability, applied to the weights.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    scale: float
    softcap: float | None = None
    bias: Tensor | None = None
    sink_logits: Tensor | None = None
    dropout: float = 0.0

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.q.shape[1]

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.k.shape[1]

    def expand(self) -> tuple[Tensor, Tensor]:
        """Return keys and values per query head, [B, H, S, D] and [B, H, S, Dv]."""
        return expand_heads(self.k, self.heads), expand_heads(self.v, self.heads)


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat each of the Hkv heads of `x` [B, Hkv, S, D] to get [B, heads, S, D]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


class RowBlock:
    """Some query rows of one attention call: data that lenses read and edits replace.

    The columns of `scores` and `weights` are the keys `key_start:key_stop`; none of these rows can
    see any other key. A block's tensors are reused for the next block: clone what must last.

    Attributes:
        start, stop: the query rows, array indices of the call.
        key_start, key_stop: the keys.
        heads: the query heads opened, int64 [H'], or None for all.
        scores: float32 [B, H', R, K], scaled, biased and masked.
        weights: float32 [B, H', R, K]; they exclude a sink logit's share, so rows may sum to under 1.
        query_positions: [B|1, R], absolute; the first real token is 0, padding before it negative.
        key_positions: [B|1, K], likewise.
        valid_rows: bool [B, R], or None where no row is padding.
        valid_keys: bool [B, K], or None.
        call, run, site: the attention call this is part of, set by the runtime.
    """

    def __init__(self, start: int, stop: int, key_start: int, key_stop: int) -> None:
        self.start, self.stop = start, stop
        self.key_start, self.key_stop = key_start, key_stop
        self.heads: Tensor | None = None
        self.scores: Tensor = torch.empty(0)
        self._weights: Tensor | None = None
        self._pristine = True
        self._memo: dict[str, Any] = {}
        self._buffers: Buffers | None = None
        self._values: Operand | None = None
        self.query_positions: Tensor = torch.empty(0)
        self.key_positions: Tensor = torch.empty(0)
        self.valid_rows: Tensor | None = None
        self.valid_keys: Tensor | None = None
        self.call: Any = None
        self.run: Any = None
        self.site: Any = None

    @property
    def weights(self) -> Tensor:
        if self._weights is None:
            raise AttributeError("weights are set only after the softmax of this block")
        return self._weights

    @weights.setter
    def weights(self, value: Tensor) -> None:
        self._weights = value
        self._pristine = False
        self._memo.clear()

    @property
    def column_sum(self) -> Tensor:
        """Sum of the weights over the valid rows, [B, H', K]."""
        return self._once("column_sum", lambda: stats.column_sum(self.weights, self.valid_rows))

    @property
    def logsumexp(self) -> Tensor:
        """log of the softmax denominator, sink logit included, [B, H', R]."""
        return self._once("logsumexp", self._logsumexp)

    @property
    def entropy(self) -> Tensor:
        """Entropy of each row of weights in nats, [B, H', R]; a sink logit's share is not counted."""
        return self._once("entropy", self._entropy)

    @property
    def row_sum(self) -> Tensor:
        """Sum of each row of weights, [B, H', R]: under 1 where a sink logit takes a share."""
        return self._once("row_sum", self._row_sum)

    def _once(self, name: str, compute: Any) -> Any:
        if name not in self._memo:
            self._memo[name] = compute()
        return self._memo[name]

    def _logsumexp(self) -> Tensor:
        if self._pristine and self._weights is not None:
            return stats.logsumexp(self.scores, self.weights)
        return torch.logsumexp(self.scores, -1)

    def _row_sum(self) -> Tensor:
        if self._pristine and self.call is not None and self.call.sink_logits is None:
            return self.weights.new_ones(()).expand(self.weights.shape[:3])
        return stats.row_sum(self.weights)

    def _entropy(self) -> Tensor:
        if not self._pristine:
            return stats.entropy(self.weights)
        whole = self.call is not None and self.call.sink_logits is None
        return stats.softmax_entropy(self.scores, self.weights, self.logsumexp, whole)

    def set_softmax(self, weights: Tensor) -> None:
        """Set `weights` to the softmax of `scores`: statistics may then use both."""
        self._weights = weights
        self._pristine = True
        self._memo.clear()


def sink_column(sinks: Tensor) -> Tensor:
    """Return sink logits, [H] or [B|1, H, T, 1], as a column beside the scores, [B|1, H, T|1, 1]."""
    return sinks if sinks.ndim == 4 else sinks.reshape(1, -1, 1, 1)


def softmax(x: AttentionInputs, block: RowBlock) -> None:
    """Set the weights of a block from its scores."""
    scores = block.scores
    if x.sink_logits is not None:
        sinks = sink_column(x.sink_logits)
        sinks = sinks if block.heads is None else sinks[:, block.heads]
        rows = sinks if sinks.shape[2] == 1 else sinks[:, :, block.start : block.stop]
        column = rows.float().expand(*scores.shape[:3], 1)
        block.set_softmax(torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1])
    else:
        out = None if block._buffers is None else block._buffers.get("weights", tuple(scores.shape))
        block.set_softmax(torch.softmax(scores, -1, out=out))


def row_blocks(
    x: AttentionInputs,
    *,
    heads: Tensor | None = None,
    rows: tuple[int, int] | None = None,
    block_rows: int | None = None,
    reuse: bool | None = None,
    memory: dict[Any, Tensor] | None = None,
) -> Iterator[RowBlock]:
    """Yield blocks of ascending query rows, with their `scores`.

    The consumer may replace `block.scores`, takes the `softmax`, may replace `block.weights`, and gets
    the outputs from `mix`.

    Args:
        x: the call.
        heads: query heads to open, int64 [H'], default all.
        rows: range of query rows, default all.
        block_rows: rows in a block; by default as many as fit a fixed number of bytes.
        reuse: share memory between blocks; by default where autograd does not need them.
        memory: what is shared, kept here for the next call; by default it goes with this one.
    """
    q, k, group = _select(x, heads)
    batch, count = q.shape[0], q.shape[1]
    first_row, last_row = rows or (0, q.shape[2])
    if reuse is None:
        reuse = not (torch.is_grad_enabled() and _needs_grad(x))
    largest = _largest(x, batch * count, first_row, last_row, block_rows)
    store = {} if memory is None else memory
    buffers = Buffers(reuse, q.device, store, {"scores": largest, "weights": largest})
    keys = Operand(k.reshape(batch * (count // group), k.shape[2], k.shape[3]), partial(buffers.get, "keys"))
    values = Operand(_values(x, heads), partial(buffers.get, "values"))
    start = first_row
    while start < last_row:
        stop = min(last_row, start + (block_rows or _fitting(x, start, batch * count)))
        first, last = x.mask.bounds(start, stop)
        block = RowBlock(start, stop, first, last)
        block.heads = heads
        block._buffers, block._values = buffers, values
        block.scores = _scores(x, q, keys, group, block, buffers)
        yield block
        start = stop


def _fitting(x: AttentionInputs, start: int, rows_each: int) -> int:
    visible = x.mask.bounds(start, min(start + MIN_ROWS, x.q.shape[2]))
    fit = _budget(x) // (4 * rows_each * max(1, visible[1] - visible[0]))
    return max(MIN_ROWS, min(MAX_ROWS, fit // MIN_ROWS * MIN_ROWS))


def _largest(x: AttentionInputs, rows_each: int, start: int, stop: int, block_rows: int | None) -> int:
    """How many scores the largest block holds, at most."""
    keys = x.k.shape[2]
    if block_rows:
        return rows_each * min(block_rows, stop - start) * keys
    fit = max(_budget(x) // 4, rows_each * MIN_ROWS * keys)
    return min(fit, rows_each * min(MAX_ROWS, stop - start) * keys)


def _budget(x: AttentionInputs) -> int:
    return BLOCK_BYTES.get(x.q.device.type, BLOCK_BYTES["cuda"])


def _needs_grad(x: AttentionInputs) -> bool:
    return any(t is not None and t.requires_grad for t in (x.q, x.k, x.v, x.bias, x.sink_logits))


def _select(x: AttentionInputs, heads: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Return the queries and keys of the opened heads, and how many queries share a key head."""
    if heads is None:
        return x.q, x.k, x.heads // x.kv_heads
    keys, group = _key_heads(x, heads)
    return x.q.index_select(1, heads), _of_heads(x.k, keys), group


def _key_heads(x: AttentionInputs, heads: Tensor) -> tuple[slice | Tensor, int]:
    """Return the key heads that some query heads use, and how many queries share each.

    Where as many of them share each of a row of key heads, no key is copied: with a long cache that would
    take most of a decoding step.
    """
    group = x.heads // x.kv_heads
    if heads.device.type == "cpu":
        used = [head // group for head in heads.tolist()]
        first, last = min(used), max(used)
        each = len(used) // (last - first + 1)
        if each and used == [key for key in range(first, last + 1) for _ in range(each)]:
            return slice(first, last + 1), each
    return heads // group, 1


def _of_heads(x: Tensor, heads: slice | Tensor) -> Tensor:
    return x[:, heads] if isinstance(heads, slice) else x.index_select(1, heads)


def _scores(
    x: AttentionInputs, q: Tensor, keys: Operand, group: int, block: RowBlock, buffers: Buffers
) -> Tensor:
    batch, heads, _, dim = q.shape
    rows, width = block.stop - block.start, block.key_stop - block.key_start
    matrices, long = batch * heads // group, group * rows
    pieces = even_pieces(matrices, long, q.device) if buffers.reuse else 1
    flat = (matrices * pieces, long // pieces)
    some = q[:, :, block.start : block.stop]
    right = keys.times(pieces)[:, block.key_start : block.key_stop].transpose(1, 2)
    out = buffers.get("scores", (*flat, width), q.dtype)
    if out is None:
        scores = torch.bmm(some.reshape(*flat, dim), right) * x.scale
    elif q.dtype == torch.float32:
        scaled = torch.mul(some, x.scale, out=buffers.get("queries", tuple(some.shape)))
        scores = torch.bmm(scaled.view(*flat, dim), right, out=out)
    else:
        scores = torch.baddbmm(out, some.reshape(*flat, dim), right, beta=0, alpha=x.scale, out=out)
    scores = scores.view(batch, heads, rows, width).float()
    if x.softcap is not None:
        scores = torch.tanh(scores / x.softcap) * x.softcap
    if x.bias is not None:
        scores = scores + _slice(x.bias, block)
    return x.mask.apply(scores, block.start, block.stop, block.key_start, block.key_stop)


def _slice(bias: Tensor, block: RowBlock) -> Tensor:
    """Cut a bias [B|1, H|1, T|1, S] to the heads, rows and keys of a block."""
    if bias.shape[-2] > 1:
        bias = bias[..., block.start : block.stop, :]
    if block.heads is not None and bias.shape[1] > 1:
        bias = bias.index_select(1, block.heads)
    return bias[..., block.key_start : block.key_stop]


def mix(x: AttentionInputs, block: RowBlock, out: Tensor | None = None) -> Tensor:
    """Return the head outputs of a block, [B, H', R, Dv], in the dtype of the values.

    Args:
        out: contiguous memory for them.
    """
    weights = F.dropout(block.weights, x.dropout) if x.dropout else block.weights
    batch, heads, rows, width = weights.shape
    values = block._values or Operand(_values(x, block.heads))
    matrices = len(values.times(1))
    long = batch * heads // matrices * rows
    pieces = 1 if torch.is_grad_enabled() else even_pieces(matrices, long, weights.device)
    right = values.times(pieces)[:, block.key_start : block.key_stop]
    flat = None if out is None else out.view(matrices * pieces, long // pieces, -1)
    left = weights.to(right.dtype).reshape(matrices * pieces, long // pieces, width)
    return torch.bmm(left, right, out=flat).view(batch, heads, rows, -1)


def mix_into(out: Tensor, x: AttentionInputs, block: RowBlock) -> None:
    """Write the head outputs of a block to its heads and rows of `out`, [B, H, T, Dv]."""
    shape = (*block.weights.shape[:3], out.shape[3])
    room = None if block._buffers is None else block._buffers.get("outputs", shape, x.v.dtype)
    part, rows = mix(x, block, room), slice(block.start, block.stop)
    if block.heads is None:
        out[:, :, rows] = part
    else:
        out[:, block.heads, rows] = part


def _values(x: AttentionInputs, heads: Tensor | None) -> Tensor:
    """The values that some heads mix, [B * n, S, Dv]: of n key heads, or of each head again."""
    v = x.v if heads is None else _of_heads(x.v, _key_heads(x, heads)[0])
    return v.reshape(-1, *v.shape[2:])


def attend(x: AttentionInputs) -> Tensor:
    """Return softmax attention of all rows, [B, H, T, Dv].

    One call of `scaled_dot_product_attention`, except under a soft-cap or sink logits, which it does
    not know: those go through row blocks.
    """
    if x.softcap is None and x.sink_logits is None:
        return _sdpa(x)
    parts = []
    for block in row_blocks(x):
        softmax(x, block)
        parts.append(mix(x, block))
    return torch.cat(parts, 2) if parts else x.q.new_zeros(*x.q.shape[:3], x.v.shape[3])


def _sdpa(x: AttentionInputs) -> Tensor:
    mask, causal = x.mask.for_sdpa()
    q, k, v = x.q, x.k, x.v
    if x.bias is not None:
        mask, causal = _with_bias(x, mask, causal), False
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    grouped = x.heads != x.kv_heads
    if grouped and mask is None and k.shape[-1] == v.shape[-1]:
        return F.scaled_dot_product_attention(
            q, k, v, None, x.dropout, causal, scale=x.scale, enable_gqa=True
        )
    if grouped:
        k, v = x.expand()
    return F.scaled_dot_product_attention(q, k, v, mask, x.dropout, causal, scale=x.scale)


def _with_bias(x: AttentionInputs, mask: Tensor | None, causal: bool) -> Tensor:
    assert x.bias is not None
    bias = x.bias[..., : x.k.shape[2]]
    if mask is None and causal:
        mask = x.mask.rows(0, x.mask.queries, 0, x.mask.keys)
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
    return bias + mask
