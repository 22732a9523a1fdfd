"""Softmax attention of some rows of each head only: a head costs as much as the rows that are chosen of it.

    out_bht = softmax(scale * q_bht k_b^T + mask) v_b     where `chosen` [B, H, T] is True, and 0 elsewhere

Rows are gathered head by head, a block of them meets the keys up to its last row. Heads with about as many
rows go together, heads of which most rows are chosen go to `scaled_dot_product_attention` as they are: rows
that are gathered cost nearly twice what they cost in one piece. Where a head has one row, as in decoding,
nothing is gathered: keys of heads that are left out are not read, unless a head that shares them is chosen.
Memory is linear in T, also under autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.engines.masks import MASKED, Mask
from regard.engines.reshaped import attend_reshaped
from regard.engines.rows import AttentionInputs, attend
from regard.errors import RegardError, ShapeMismatch

LEAST_KEYS, LEAST_ROWS = 4096, 128
MOST = 0.55
ALIKE = 0.8
MIN_BLOCK, BLOCK, ROOM = 64, 256, 2**25


def attend_chosen(
    x: AttentionInputs,
    chosen: Tensor,
    *,
    offset: int | None = None,
    valid: Tensor | None = None,
    least: tuple[int, int] = (LEAST_ROWS, LEAST_KEYS),
    most: float = MOST,
) -> Tensor:
    """Return softmax attention of the chosen rows, [B, H, T, Dv]; 0 in the others.

    Args:
        x: the call; soft-caps, biases, sink logits and dropout are refused.
        chosen: bool [B, H, T].
        offset: where the mask is nothing but causal order, in which row i stands at key i + `offset`, and
            `valid`; None reads the mask.
        valid: bool [B, S], False where a key is padding; only together with `offset`.
        least: rows, and keys of a single row, from which leaving out is quicker than computing all.
        most: share of a head's rows up to which it is.

    Raises:
        ShapeMismatch: where `chosen` does not fit.
        RegardError: for what it refuses.

    Example:
        >>> from regard.attention import Context
        >>> q, k, v = torch.randn(3, 1, 2, 300, 8)
        >>> chosen = torch.rand(1, 2, 300) < 0.5
        >>> out = attend_chosen(Context.of(q, k).inputs(q, k, v), chosen, offset=0)
        >>> bool((out[~chosen] == 0).all())
        True
    """
    _check(x, chosen)
    length = x.q.shape[2]
    if chosen.all():
        return attend(x)
    if length == 1 and x.k.shape[2] >= least[1]:
        read = chosen.view(len(chosen), x.kv_heads, -1).any(-1)
        return attend(x).masked_fill(~chosen[..., None], 0) if read.all() else _one_row(x, chosen)
    counts = chosen.sum(-1).flatten()
    plain = offset == 0 and valid is None and length == x.k.shape[2]
    whole = counts > most * length if plain else counts.sum() > most * chosen.numel()
    if length < max(2, least[0]) or whole.all():
        return attend(x).masked_fill(~chosen[..., None], 0)
    return _gathered(x, chosen, whole & plain, offset, valid)


def _check(x: AttentionInputs, chosen: Tensor) -> None:
    if chosen.dtype != torch.bool or chosen.shape != x.q.shape[:3]:
        raise ShapeMismatch(
            f"chosen must be bool {list(x.q.shape[:3])}, and is "
            f"{str(chosen.dtype).removeprefix('torch.')} {list(chosen.shape)}."
        )
    refused = {
        "a soft-cap": x.softcap is not None, "a position bias": x.bias is not None,
        "sink logits": x.sink_logits is not None, "dropout of weights": x.dropout > 0,
    }  # fmt: skip
    for words, there in refused.items():
        if there:
            raise RegardError(f"rows cannot be left out under {words}; compute all heads (sparse=False).")


def _gathered(
    x: AttentionInputs, chosen: Tensor, whole: Tensor, offset: int | None, valid: Tensor | None
) -> Tensor:
    """All pairs of a batch row and a head, a bucket of pairs at a time; `whole` ones as they are."""
    batch, heads, length, _ = x.q.shape
    out = x.v.new_zeros(batch * heads, length, x.v.shape[3])
    counts = chosen.sum(-1).flatten().masked_fill(whole, 0)
    if whole.any():
        pairs = whole.nonzero()[:, 0]
        part = _whole(x, pairs).masked_fill(~chosen.flatten(0, 1)[pairs, :, None], 0)
        out = out.index_copy(0, pairs, part)
    for pairs, most in _buckets(counts):
        index = _rows(chosen.flatten(0, 1)[pairs], most)
        some = _some(x, pairs, index)
        mask = _mask(x, pairs, index, offset, valid)
        part = _softmax(replace(some, mask=mask))[0].to(out.dtype)
        taken = (torch.arange(most, device=index.device) < counts[pairs, None]).nonzero(as_tuple=True)
        out = out.index_put((pairs[taken[0]], index[taken]), part[taken])
    return out.view(batch, heads, length, -1)


def _softmax(x: AttentionInputs) -> Tensor:
    if type(x.mask) is Mask:
        return attend(x)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x.q, x.k, x.v)):
        return attend_reshaped(x, _weights)
    if isinstance(x.mask, _Ordered) and x.mask.valid is None:
        return _ordered(x, x.mask)
    parts = []
    for start in range(0, x.q.shape[2], BLOCK):
        rows = x.q[:, :, start : start + BLOCK]
        stop = start + rows.shape[2]
        first, last = x.mask.bounds(start, stop)
        mask = _added(x.mask.rows(start, stop, first, last), x.q.dtype)
        k, v = x.k[:, :, first:last], x.v[:, :, first:last]
        parts.append(F.scaled_dot_product_attention(rows, k, v, mask, scale=x.scale))
    return torch.cat(parts, 2)


def _ordered(x: AttentionInputs, mask: _Ordered) -> Tensor:
    """Rows in causal order; of what is added to scores only the corner is not 0, and is made anew."""
    pairs, length, keys = x.q.shape[1], x.q.shape[2], x.k.shape[2]
    size = min(BLOCK, max(MIN_BLOCK, keys // 16))
    group = min(pairs, max(1, ROOM // (size * keys)))
    room = x.q.new_zeros(1, group, min(size, length), keys)
    out = x.v.new_empty(1, pairs, length, x.v.shape[3])
    at = torch.arange(keys, device=x.q.device)
    for first in range(0, pairs, group):
        some = slice(first, first + group)
        for start in range(0, length, size):
            places = mask.places[some, start : start + size]
            stop = start + places.shape[1]
            low, high = min(mask.lowest[start:stop]) + 1, min(keys, max(mask.highest[start:stop]) + 1)
            added = room[:, : places.shape[0], : places.shape[1], :high]
            corner = added[..., low:]
            corner.masked_fill_((at[low:high] > places[..., None])[None], torch.finfo(added.dtype).min)
            q, k, v = x.q[:, some, start:stop], x.k[:, some, :high], x.v[:, some, :high]
            out[:, some, start:stop] = F.scaled_dot_product_attention(q, k, v, added, scale=x.scale)
            corner.zero_()
    return out


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as what is added to scores; a row that sees nothing then has no NaN."""
    lowest = torch.finfo(dtype).min
    if mask is None or mask.dtype != torch.bool:
        return mask if mask is None else mask.clamp(min=lowest).to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)


def _weights(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


def _whole(x: AttentionInputs, pairs: Tensor) -> Tensor:
    """Causal attention of heads of which most rows are chosen, [P, T, Dv]."""
    q, k, v = _of_pairs(x, pairs)
    return F.scaled_dot_product_attention(q, k, v, None, 0.0, True, scale=x.scale)[0]


def _of_pairs(x: AttentionInputs, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of some pairs, [1, P, T, D] and [1, P, S, D]."""
    heads, kv_heads = x.heads, x.kv_heads
    keys = pairs // heads * kv_heads + pairs % heads // (heads // kv_heads)
    return (
        x.q.flatten(0, 1).index_select(0, pairs)[None],
        x.k.flatten(0, 1).index_select(0, keys)[None],
        x.v.flatten(0, 1).index_select(0, keys)[None],
    )


def _some(x: AttentionInputs, pairs: Tensor, index: Tensor) -> AttentionInputs:
    q, k, v = _of_pairs(x, pairs)
    rows = q[0].gather(1, index[..., None].expand(-1, -1, q.shape[-1]))[None]
    return replace(x, q=rows, k=k, v=v)


def _buckets(counts: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Pairs with about as many rows, int64 [P], and the most rows that one of them has."""
    order = counts.argsort(descending=True)
    sizes, start = counts[order].tolist(), 0
    while start < len(sizes) and sizes[start] > 0:
        stop = start
        while stop < len(sizes) and sizes[stop] >= max(1, ALIKE * sizes[start]):
            stop += 1
        yield order[start:stop], sizes[start]
        start = stop


def _rows(chosen: Tensor, most: int) -> Tensor:
    """The chosen rows of each pair in ascending order, int64 [P, most]; beyond them row 0."""
    length = chosen.shape[1]
    at = torch.arange(length, device=chosen.device).expand_as(chosen)
    index = at.masked_fill(~chosen, length).sort(-1).values[:, :most]
    return index.masked_fill(index == length, 0)


def _mask(x: AttentionInputs, pairs: Tensor, index: Tensor, offset: int | None, valid: Tensor | None) -> Mask:
    if offset is not None:
        known = None if valid is None else valid[pairs // x.heads]
        return _Ordered(index + offset, x.k.shape[2], known)
    rows = x.mask.rows(0, x.mask.queries, 0, x.mask.keys)
    if rows is None:
        return Mask(index.shape[1], x.k.shape[2])
    return _Taken(rows.to(x.q.device), pairs // x.heads, pairs % x.heads, index, x.k.shape[2])


class _Ordered(Mask):
    """Row n of pair p sees the keys up to place [p, n], of those that are valid [p]."""

    def __init__(self, places: Tensor, keys: int, valid: Tensor | None) -> None:
        super().__init__(places.shape[1], keys)
        self.places, self.valid = places, valid
        self.lowest, self.highest = places.amin(0).tolist(), places.amax(0).tolist()

    def bounds(self, start: int, stop: int) -> tuple[int, int]:
        return 0, min(self.keys, max(1, max(self.highest[start:stop]) + 1))

    def rows(self, start: int, stop: int, first: int, last: int) -> Tensor:
        keys = torch.arange(first, last, device=self.places.device)
        seen = keys <= self.places[:, start:stop, None]
        return (seen if self.valid is None else seen & self.valid[:, None, first:last])[None]

    def apply(self, scores: Tensor, start: int, stop: int, first: int, last: int) -> Tensor:
        if self.valid is not None:
            return super().apply(scores, start, stop, first, last)
        corner = max(first, min(self.lowest[start:stop]) + 1)
        if corner < last:
            hidden = ~self.rows(start, stop, corner, last)
            scores[..., corner - first :].masked_fill_(hidden, MASKED)
        return scores


class _Taken(Mask):
    """The rows of a dense mask that are chosen."""

    def __init__(self, dense: Tensor, batch: Tensor, heads: Tensor, index: Tensor, keys: int) -> None:
        super().__init__(index.shape[1], keys)
        self.dense, self.index = dense, index
        self.batch = batch if dense.shape[0] > 1 else torch.zeros_like(batch)
        self.heads = heads if dense.shape[1] > 1 else torch.zeros_like(heads)

    def rows(self, start: int, stop: int, first: int, last: int) -> Tensor:
        at = self.index[:, start:stop] if self.dense.shape[2] > 1 else self.index[:, start:stop] * 0
        return self.dense[self.batch[:, None], self.heads[:, None], at, first:last][None]


def _one_row(x: AttentionInputs, chosen: Tensor) -> Tensor:
    """Decoding: key heads that a chosen head reads, each with its chosen heads as rows."""
    batch, heads, _, width = x.q.shape
    group = heads // x.kv_heads
    mask = x.mask.rows(0, 1, 0, x.k.shape[2])  # [B|1, H|1, 1, S]
    if mask is not None:
        mask = mask.to(x.q.device).expand(batch, heads, -1, -1).unflatten(1, (-1, group))[:, :, :, 0]
        mask = mask if mask.dtype == torch.bool else mask.to(x.q.dtype)
    q = x.q.reshape(batch, x.kv_heads, group, width)
    parts: list[Tensor] = []
    places: list[int] = []
    on = chosen.view(batch, x.kv_heads, group).tolist()
    for b in range(batch):
        for first, stop, some in _runs(on[b]):
            rows = q[b : b + 1, first:stop, some]
            own = None if mask is None else mask[b : b + 1, first:stop, some]
            found = F.scaled_dot_product_attention(
                rows, x.k[b : b + 1, first:stop], x.v[b : b + 1, first:stop], own, scale=x.scale
            )
            parts.append(found.flatten(0, 2))
            places += [b * heads + kv * group + g for kv in range(first, stop) for g in some]
    out = x.v.new_zeros(batch * heads, x.v.shape[3])
    if parts:
        out = out.index_copy(0, torch.tensor(places, device=out.device), torch.cat(parts))
    return out.view(batch, heads, 1, -1)


def _runs(on: list[list[bool]]) -> Iterator[tuple[int, int, list[int]]]:
    """Neighbouring key heads of which the same heads of the group are chosen: from, to, which."""
    first = 0
    for kv in range(1, len(on) + 1):
        if kv == len(on) or on[kv] != on[first]:
            some = [g for g, there in enumerate(on[first]) if there]
            if some:
                yield first, kv, some
            first = kv
