"""Attention of query blocks over lists of key blocks.

    scores_ij = scale q_i . k_j           j in a listed block, and visible
    lse_i     = log sum_j exp(scores_ij)
    out_i     = sum_j exp(scores_ij - lse_i) v_j

Everything sparse or local is an index and this: neighbourhoods, pruning, routing, landmarks. Parts of the
keys that were attended to separately (a window, first tokens, routed blocks) are joined by their logsumexps.

Operations O(T * n * key_block); beside inputs, outputs and their gradients, memory is that of one piece
(`block_tiles.py`). The backward pass takes the weights anew from the logsumexp.
Sources: the logsumexp as all that backward needs, Dao et al., 2022, arXiv 2205.14135, appendix B; as what
joins parts, Rabe and Staats, 2021, arXiv 2112.05682, section 2.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.engines.block_tiles import Lists, Tiles, Visible
from regard.engines.blocks_triton import attend_triton
from regard.engines.scan_triton import uses_triton
from regard.errors import RegardError, ShapeMismatch


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    *,
    key_block: int = 1,
    query_block: int | None = None,
    rows: Tensor | None = None,
    visible: Visible | Tensor | None = None,
    scale: float | None = None,
    merge: bool = True,
    clear: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return softmax attention of query blocks over the key blocks that each lists, and its logsumexp.

    A block that is listed twice counts twice. A row that sees nothing has output 0 and logsumexp -inf. The
    softmax is taken in float32, or float64 where `q` is. Gradients flow through both results, and have no
    gradients of their own.

    Args:
        q: [B, H, T, D].
        k: [B, Hkv, S, D]; consecutive query heads share a key head.
        v: [B, Hkv, S, Dv].
        index: int64 [B|1, 1|Hkv|H, Q, n], key blocks by number: block i is the keys from i * key_block. The
            last may be short. -1 is no block. Where query heads of a key head share a list, one gather serves
            them: give the index by key head.
        key_block: keys in a block.
        query_block: consecutive rows in a query block, the last may be short; 1 by default.
        rows: int64 [B|1, 1|H, Q, R], the rows of each query block, -1 for none; instead of `query_block`.
        visible: which of the listed keys a row sees; default all. Either bool [B|1, 1|H, Q|1, R, N] with
            N = n * key_block, or a function of query positions [B|1, 1|H, Q', R, 1] and key positions
            [B|1, 1|H, Q', 1, N], int64 indices into `q` and `k`, of some of the query blocks in order, that
            returns bool that broadcasts with them. Where there is no key it is asked about key 0, and where
            there is no row about any.
        scale: factor on q k^T; default 1 / sqrt(D).
        merge: whether the listed blocks share one softmax; else each has its own.
        clear: a promise that saves time: of the blocks that each query block lists, so many, from the first,
            exist, are whole and visible to all its rows. A function `visible` need not be asked about them.
        backend: `torch` or `triton`; by default `triton` on a GPU where it can be used.

    Returns:
        out [B, H, T, Dv] in the type of `q`, and the logsumexp [B, H, T]. With `rows`, [B, H, Q, R, Dv] and
        [B, H, Q, R]. Without `merge`, [B, H, T, n, Dv] and [B, H, T, n], or [B, H, Q, R, n, Dv] and
        [B, H, Q, R, n].

    Raises:
        ShapeMismatch: where shapes do not fit.
        RegardError: where a block or row is listed that is not there, or for a backend that is unknown or
            cannot take the inputs.

    Example:
        >>> q = k = torch.zeros(1, 1, 4, 1)
        >>> v = torch.arange(4.0).view(1, 1, 4, 1)
        >>> index = torch.tensor([[0, -1], [0, 1]]).view(1, 1, 2, 2)
        >>> attend_blocks(q, k, v, index, key_block=2, query_block=2)[0].flatten().tolist()
        [0.5, 0.5, 1.5, 1.5]
    """
    lists, units = _lists(q, k, v, index, key_block, query_block, rows, visible)
    if clear < 0:
        raise RegardError(f"clear is {clear}; it must be a number of listed blocks.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not merge:
        return _apart(q, k, v, lists, units, scale, backend)
    by_triton = uses_triton(backend, q, k, v)
    if clear and not by_triton and not isinstance(visible, Tensor):
        lists = replace(lists, clear=min(clear, index.shape[3]))
    if _empty(q, lists):
        shape = q.shape[:3] if rows is None else (*q.shape[:2], *lists.index.shape[2:3], lists.size)
        return _nothing(q, v, shape)
    if by_triton:
        return attend_triton(q, k, v, lists, scale, units)
    if _few(lists, k):
        k, v, lists = _fetched(k, v, lists, units, q.shape[1] // units)
    out, lse = _Blocks.apply(q, k, v, lists, scale, units)
    return out, lse


def merge_parts(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Join attention over disjoint sets of keys into attention over all of them.

    Args:
        parts: (out [..., Dv], logsumexp [...]) of each, as `attend_blocks` returns them.

    Returns:
        out and logsumexp; of a row that sees nothing in any part, 0 and -inf.

    Example:
        >>> one = torch.tensor([1.0]), torch.tensor(0.0)
        >>> none = torch.tensor([5.0]), torch.tensor(-torch.inf)
        >>> merge_parts(one, none)[0].item(), merge_parts(one, one)[1].exp().item()
        (1.0, 2.0)
    """
    if not parts:
        raise RegardError("merge_parts was given no parts; it needs at least one.")
    sums = torch.stack([lse for _, lse in parts])
    highest = sums.detach().amax(0)
    highest = torch.where(highest == -torch.inf, 0.0, highest)
    shares = (sums - highest).exp()
    whole = shares.sum(0)
    some = whole > 0
    weights = shares / torch.where(some, whole, 1.0)
    out = weights[0][..., None] * parts[0][0]
    for w, (x, _) in zip(weights[1:], parts[1:], strict=True):
        out = torch.addcmul(out, w[..., None], x.to(out.dtype))
    lse = torch.where(some, torch.where(some, whole, 1.0).log() + highest, -torch.inf)
    return out.to(parts[0][0].dtype), lse


def listed_mask(
    index: Tensor, start: int, stop: int, keys: int, *, key_block: int = 1, query_block: int = 1
) -> Tensor:
    """Return which keys are listed for rows `start:stop`, for looking at what was chosen.

    Args:
        index: int64 [B|1, H|1, Q, n], as `attend_blocks` takes it.
        keys: S, number of keys.

    Returns:
        bool [B|1, H|1, stop - start, S].

    Example:
        >>> listed_mask(torch.tensor([1, -1]).view(1, 1, 1, 2), 0, 1, 3, key_block=2).flatten().tolist()
        [False, False, True]
    """
    first, last = start // query_block, max(start, stop - 1) // query_block + 1
    some = index[:, :, first:last]
    blocks = -(-keys // key_block)
    found = torch.zeros(*some.shape[:3], blocks + 1, dtype=torch.bool, device=index.device)
    found = found.scatter_(3, torch.where(some < 0, blocks, some), True)[..., :blocks]
    of_rows = torch.arange(start, stop, device=index.device) // query_block - first
    return found.repeat_interleave(key_block, 3)[..., :keys].index_select(2, of_rows)


def _lists(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, key_block: int, query_block: int | None,
    rows: Tensor | None, visible: Visible | Tensor | None,
) -> tuple[Lists, int]:  # fmt: skip
    """Check a call, and return who reads what and the number of units to a batch row."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.shape[0] != q.shape[0]:
            raise ShapeMismatch(f"{name} is {list(x.shape)}; it must be [batch, heads, time, dim].")
    batch, heads, length, width = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    if k.shape[3] != width or v.shape[1:3] != k.shape[1:3] or not kv_heads or heads % kv_heads:
        raise ShapeMismatch(
            f"k {list(k.shape)} and v {list(v.shape)} do not fit q {list(q.shape)}: their heads must divide "
            "those of q, and keys be as wide as queries."
        )
    _check_list("index", index, batch, {1, kv_heads, heads}, -(-keys // max(1, key_block)))
    if key_block < 1 or (query_block is not None and query_block < 1):
        raise RegardError(f"key_block is {key_block} and query_block {query_block}; both must be at least 1.")
    if rows is not None:
        if query_block is not None:
            raise RegardError("both rows and query_block were given; rows says all.")
        _check_list("rows", rows, batch, {1, heads}, length)
        size = rows.shape[3]
    else:
        size = query_block or 1
    blocks = index.shape[2]
    wanted = rows.shape[2] if rows is not None else -(-length // size)
    if blocks != wanted:
        raise ShapeMismatch(f"index lists {blocks} query blocks, and there are {wanted}.")
    if isinstance(visible, Tensor):
        listed = index.shape[3] * key_block
        _check_visible(visible, ({1, batch}, {1, heads}, {1, blocks}, {1, size}, {1, listed}))
    units = heads if index.shape[1] == heads else kv_heads
    return Lists(index, key_block, keys, size, rows, visible), units


def _check_visible(visible: Tensor, fits: tuple[set[int], ...]) -> None:
    fitting = visible.ndim == 5 and all(n in some for n, some in zip(visible.shape, fits, strict=True))
    if not fitting or visible.dtype != torch.bool:
        kind = str(visible.dtype).removeprefix("torch.")
        allowed = ", ".join(" or ".join(str(n) for n in sorted(some)) for some in fits)
        raise ShapeMismatch(f"visible is {kind} {list(visible.shape)}; it must be bool [{allowed}].")


def _check_list(name: str, x: Tensor, batch: int, heads: set[int], count: int) -> None:
    if x.ndim != 4 or x.dtype != torch.int64 or x.shape[0] not in (1, batch) or x.shape[1] not in heads:
        kind = str(x.dtype).removeprefix("torch.")
        allowed = " or ".join(str(n) for n in sorted(heads))
        raise ShapeMismatch(
            f"{name} is {kind} {list(x.shape)}; it must be int64 [1 or {batch}, {allowed}, query blocks, n]."
        )
    if x.numel() and (int(x.min()) < -1 or int(x.max()) >= count):
        raise RegardError(
            f"{name} lists {int(x.min())} to {int(x.max())}; there are 0 to {count - 1}, and -1 for none."
        )


def _empty(q: Tensor, lists: Lists) -> bool:
    return q.shape[0] * q.shape[1] * lists.blocks * lists.size * lists.listed == 0 or not lists.keys


def _nothing(q: Tensor, v: Tensor, shape: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_zeros(*shape, v.shape[3]), q.new_full(shape, -torch.inf, dtype=wide)


def _few(lists: Lists, k: Tensor) -> bool:
    """Whether so little is listed that laying all keys beside their values would cost more."""
    return lists.blocks * lists.listed * max(1, lists.index.shape[1] // k.shape[1]) < lists.keys


def _fetched(k: Tensor, v: Tensor, lists: Lists, units: int, group: int) -> tuple[Tensor, Tensor, Lists]:
    """Return the listed keys and values alone, of every unit, and the lists as they read these."""
    lists = replace(lists, clear=0)
    keys, exist = lists.listed_keys(0, lists.blocks)
    visible = _seen(lists, keys, exist, group)
    batch, kv_heads = k.shape[:2]
    places = keys.expand(batch, units, -1, -1).reshape(batch, kv_heads, -1, 1)
    k, v = (
        x.gather(2, places.expand(-1, -1, -1, x.shape[3])).view(batch, units, -1, x.shape[3]) for x in (k, v)
    )
    index = torch.arange(lists.blocks, device=k.device).view(1, 1, -1, 1)
    return k, v, Lists(index, lists.listed, k.shape[2], lists.size, lists.rows, visible)


def _seen(lists: Lists, keys: Tensor, exist: Tensor | None, group: int) -> Tensor | None:
    """All that is visible, bool [B|1, H|1, Q|1, R|1, N], or None."""
    mask = lists.mask(0, lists.blocks, group)
    if mask is None:
        return None
    if mask.shape[3] == 1 and mask.shape[1] > 1 and group > 1:
        mask = mask.expand(-1, -1, -1, group, -1, -1)
    return mask.transpose(2, 3).flatten(1, 2)


def _apart(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists, units: int, scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Attention with a softmax to each listed block: every block is a list of its own."""
    n, size, length = lists.index.shape[3], lists.size, q.shape[2]
    rows = lists.rows
    if rows is None:
        rows = torch.arange(lists.blocks * size, device=q.device).view(1, 1, -1, size)
        rows = torch.where(rows < length, rows, -1)
    visible = lists.visible
    if isinstance(visible, Tensor):
        visible = visible.expand(-1, -1, lists.blocks, -1, lists.listed).unflatten(4, (n, -1))
        visible = visible.transpose(3, 4).flatten(2, 3)
    out, lse = attend_blocks(
        q, k, v, lists.index.flatten(2)[..., None], key_block=lists.key_block,
        rows=rows.repeat_interleave(n, 2), visible=visible, scale=scale, backend=backend,
    )  # fmt: skip
    out, lse = (x.unflatten(2, (lists.blocks, n)).transpose(3, 4) for x in (out, lse[..., None]))
    out, lse = (out, lse) if lists.rows is not None else (x.flatten(2, 3)[:, :, :length] for x in (out, lse))
    return out, lse[..., 0]


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float, units: int
    ) -> tuple[Tensor, Tensor]:
        tiles = Tiles(q, k, v, lists, scale, units)
        shape = (q.shape[0] * units, tiles.group, lists.blocks, lists.size)
        out, sums = q.new_empty(*shape, v.shape[3]), q.new_empty(*shape, 1, dtype=tiles.wide)
        for piece in tiles.pieces():
            keys, values = tiles.listed(tiles.blocks_of(piece))
            scores = tiles.scores(piece, tiles.queries(piece), keys)
            weights = torch.softmax(scores, -1, out=tiles.room("weights", *scores.shape))
            best = scores.amax(-1, True)
            mixed = torch.bmm(weights, values, out=tiles.room("mixed", *scores.shape[:2], v.shape[3]))
            lse = best - weights.amax(-1, True).log_()
            if piece.hidden is not None:
                nothing = best == -torch.inf
                mixed.masked_fill_(nothing, 0.0)
                lse.masked_fill_(nothing, -torch.inf)
            tiles.write(piece, mixed, out)
            tiles.write(piece, lse, sums)
        out, sums = _by_row(out, q, lists), _by_row(sums, q, lists)
        if lists.rows is not None:
            absent = (lists.rows < 0)[..., None]
            out.masked_fill_(absent, 0.0)
            sums.masked_fill_(absent, -torch.inf)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.given = lists, scale, units
        ctx.set_materialize_grads(False)
        return out, sums[..., 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: Tensor | None, of_lse: Tensor | None) -> Any:
        q, k, v, out, sums = ctx.saved_tensors
        lists, scale, units = ctx.given
        tiles = Tiles(q, k, v, lists, scale, units)
        nothing = sums == -torch.inf
        share = torch.zeros_like(sums) if of_lse is None else -of_lse[..., None].to(tiles.wide)
        of_out = torch.zeros_like(out) if of_out is None else of_out
        share = share + (of_out.to(tiles.wide) * out).sum(-1, True)
        of_q, of_k, of_v = _gradients(
            tiles,
            tiles.by_block(of_out.masked_fill(nothing, 0.0)),
            tiles.by_block(sums.masked_fill(nothing, torch.inf)),
            tiles.by_block(share.masked_fill(nothing, 0.0)),
        )
        if lists.rows is None:
            of_q = _by_row(of_q, q, lists)
        else:
            flat = of_q.new_zeros(q.shape[:3].numel(), q.shape[3])
            of_q = flat.index_add_(0, tiles.flat_rows(), of_q.reshape(-1, q.shape[3])).view(q.shape)
        of_k, of_v = (x.view(*k.shape[:2], -1, x.shape[-1])[:, :, : k.shape[2]] for x in (of_k, of_v))
        return of_q.to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype), None, None, None


def _by_row(x: Tensor, q: Tensor, lists: Lists) -> Tensor:
    """[U, G, Q, R, D] as [B, H, T, D], or as [B, H, Q, R, D] where rows are given."""
    x = x.view(*q.shape[:2], *x.shape[2:])
    return x if lists.rows is not None else x.flatten(2, 3)[:, :, : q.shape[2]]


def _gradients(tiles: Tiles, of_out: Tensor, lse: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the queries [U, G, Q, R, D], and of all units' keys and values.

    With p the weights, the scores have the gradient p_ij (of_out_i . v_j - share_i), where share_i is
    of_out_i . out_i less the gradient of the logsumexp.
    """
    width, values = tiles.width, tiles.values
    count = tiles.batch * tiles.kv_heads * tiles.key_blocks
    of_q = lse.new_empty(*lse.shape[:4], width)
    of_k = lse.new_zeros(count, tiles.lists.key_block * width)
    of_v = lse.new_zeros(count, tiles.lists.key_block * values)
    for piece in tiles.pieces():
        blocks = tiles.blocks_of(piece)
        keys, vs = tiles.listed(blocks)
        queries = tiles.queries(piece)
        weights = tiles.scores(piece, queries, keys).sub_(tiles.rows(piece, lse, "lse")).exp_()
        wanted = tiles.rows(piece, of_out, "wanted")
        room = tiles.room("of keys", *keys.shape[:2], max(width, values))
        listed = room.view(-1)[: vs.numel()].view(vs.shape)
        torch.bmm(weights.transpose(1, 2), wanted, out=listed)
        of_v.index_add_(0, blocks, listed.view(len(blocks), -1))
        scores = torch.bmm(wanted, vs.transpose(1, 2), out=tiles.room("weights", *weights.shape))
        scores.sub_(tiles.rows(piece, share, "share")).mul_(weights)
        tiles.write(piece, torch.bmm(scores, keys).mul_(tiles.scale), of_q)
        listed = room.view(-1)[: keys.numel()].view(keys.shape)
        torch.bmm(scores.transpose(1, 2), queries, out=listed)
        of_k.index_add_(0, blocks, listed.view(len(blocks), -1))
    return of_q, of_k.view(-1, width), of_v.view(-1, values)
