"""Triton kernels of attention to listed key blocks: outputs, and the gradients of queries, keys and values.

A unit is a key head with the group of G query heads that share its lists, or one query head. A query block
has G R rows, R of each head, in tiles of BM. `outputs_kernel` and `queries_kernel` take a tile of rows over
all its listed keys, BN at a time; `keys_kernel` takes a key block, or BN keys of it, over the query blocks
that list it, from lists that were turned round, so that nothing is added up atomically. -1 lists no block.

Scores, softmax and sums are float32; products are of what the inputs are. D and Dv are padded to BD and BV.
`mask` is uint8 [B, Hu, Q, G, R, N] by its strides, those of dimensions of 1 being 0. Rows have slots,
[B, H, LIMIT]: row i of a query block j is slot j R + i, and the same row of `q` unless `rows` are given.
"""

from __future__ import annotations

import triton
import triton.language as tl

from regard.engines.scan_kernels import _dot


@triton.jit
def _tile(rows, unit, j, first, tile, HU, LIMIT, r_b, r_h, r_q, G: tl.constexpr, R: tl.constexpr,
          BM: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Rows of a tile: query head [BM], slot, row of `q`, which have a slot, and which have a row."""
    batch, m = unit // HU, tile * BM + tl.arange(0, BM)
    head = (unit % HU) * G + m // R
    slot = (first + j) * R + m % R
    inside = (m < G * R) & (slot < LIMIT)
    row, real = slot, inside
    if ROWS:
        place = rows + batch * r_b + head * r_h + (first + j) * r_q + m % R
        row = tl.load(place, mask=inside, other=-1)
        real = inside & (row >= 0)
    return head, slot, row, inside, real


@triton.jit
def _vectors(x, rows, columns, there, width, stride):
    """Rows `rows` of the matrix at `x`, [n, columns]; 0 where not `there`."""
    inside = there[:, None] & (columns[None, :] < width)
    return tl.load(x + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _shown(mask, batch, hu, j, m, c, seen, m_b, m_h, m_q, m_g, m_r, m_n, R: tl.constexpr):
    """What a mask shows of what is `seen`, rows m [., 1] or [1, .] and listed columns c the other way."""
    place = mask + batch * m_b + hu * m_h + j * m_q + (m // R) * m_g + (m % R) * m_r + c * m_n
    return seen & (tl.load(place, mask=seen, other=0) != 0)


@triton.jit
def _listed(index, c, N, S, KB: tl.constexpr):
    """The keys of listed columns c, and which are there."""
    block = tl.load(index + c // KB, mask=c < N, other=-1)
    key = block * KB + c % KB
    return key, (block >= 0) & (key < S)


@triton.jit
def outputs_kernel(
    q, k, v, index, rows, mask, out, lse, scale, S, N, LIMIT, first, HU, PER,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, i_b, i_h, i_q, r_b, r_h, r_q,
    m_b, m_h, m_q, m_g, m_r, m_n,
    D: tl.constexpr, DV: tl.constexpr, G: tl.constexpr, R: tl.constexpr, KB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    ROWS: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs and logsumexps of a tile of rows; a program a tile, query block and unit."""
    tile, j, unit = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    batch, hu = unit // HU, unit % HU
    head, slot, row, inside, real = _tile(
        rows, unit, j, first, tile, HU, LIMIT, r_b, r_h, r_q, G, R, BM, ROWS
    )
    columns, values = tl.arange(0, BD), tl.arange(0, BV)
    queries = _vectors(q + batch * q_b, head * q_h + row * q_t, columns, real, D, 1)
    k += batch * k_b + (hu // PER) * k_h
    v += batch * v_b + (hu // PER) * v_h
    index += batch * i_b + hu * i_h + (first + j) * i_q
    best = tl.full((BM,), float("-inf"), tl.float32)
    total, mixed = tl.zeros((BM,), tl.float32), tl.zeros((BM, BV), tl.float32)
    for start in range(0, N, BN):
        c = start + tl.arange(0, BN)
        key, there = _listed(index, c, N, S, KB)
        keys = _vectors(k, key, columns, there, D, k_t)
        scores = _dot(queries, tl.trans(keys), PRECISION) * scale
        seen = real[:, None] & there[None, :]
        if MASK:
            m = (tile * BM + tl.arange(0, BM))[:, None]
            seen = _shown(mask, batch, hu, j, m, c[None, :], seen, m_b, m_h, m_q, m_g, m_r, m_n, R)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weights, shrink = tl.exp(scores - finite[:, None]), tl.exp(best - finite)
        total = total * shrink + tl.sum(weights, 1)
        read = _vectors(v, key, values, there, DV, v_t)
        mixed = mixed * shrink[:, None] + _dot(weights.to(read.dtype), read, PRECISION)
        best = higher
    some = tl.where(total > 0, total, 1.0)
    line = (batch * HU * G + head) * LIMIT + slot
    tl.store(lse + line, tl.where(total > 0, best + tl.log(some), float("-inf")), mask=inside)
    place = out + line[:, None] * DV + values[None, :]
    tl.store(place, mixed / some[:, None], mask=inside[:, None] & (values[None, :] < DV))


@triton.jit
def queries_kernel(
    q, k, v, index, rows, mask, to_out, lse, share, to_q, scale, S, N, LIMIT, first, HU, PER,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, i_b, i_h, i_q, r_b, r_h, r_q,
    m_b, m_h, m_q, m_g, m_r, m_n,
    D: tl.constexpr, DV: tl.constexpr, G: tl.constexpr, R: tl.constexpr, KB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    ROWS: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of the rows of a tile, by slot; a program a tile, query block and unit."""
    tile, j, unit = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    batch, hu = unit // HU, unit % HU
    head, slot, row, inside, real = _tile(
        rows, unit, j, first, tile, HU, LIMIT, r_b, r_h, r_q, G, R, BM, ROWS
    )
    columns, values = tl.arange(0, BD), tl.arange(0, BV)
    line = (batch * HU * G + head) * LIMIT + slot
    queries = _vectors(q + batch * q_b, head * q_h + row * q_t, columns, real, D, 1)
    wanted = _vectors(to_out, line, values, real, DV, DV)
    sums, shares = tl.load(lse + line, mask=real, other=0.0), tl.load(share + line, mask=real, other=0.0)
    sums = tl.where(sums == float("-inf"), float("inf"), sums)
    k += batch * k_b + (hu // PER) * k_h
    v += batch * v_b + (hu // PER) * v_h
    index += batch * i_b + hu * i_h + (first + j) * i_q
    found = tl.zeros((BM, BD), tl.float32)
    for start in range(0, N, BN):
        c = start + tl.arange(0, BN)
        key, there = _listed(index, c, N, S, KB)
        keys = _vectors(k, key, columns, there, D, k_t)
        read = _vectors(v, key, values, there, DV, v_t)
        seen = real[:, None] & there[None, :]
        if MASK:
            m = (tile * BM + tl.arange(0, BM))[:, None]
            seen = _shown(mask, batch, hu, j, m, c[None, :], seen, m_b, m_h, m_q, m_g, m_r, m_n, R)
        scores = tl.where(seen, _dot(queries, tl.trans(keys), PRECISION) * scale, float("-inf"))
        weights = tl.exp(scores - sums[:, None])
        slopes = weights * (_dot(wanted, tl.trans(read), PRECISION) - shares[:, None]) * scale
        found += _dot(slopes.to(keys.dtype), keys, PRECISION)
    place = to_q + line[:, None] * D + columns[None, :]
    tl.store(place, found, mask=inside[:, None] & (columns[None, :] < D))


@triton.jit
def keys_kernel(
    q, k, v, rows, mask, order, starts, to_out, lse, share, to_k, to_v, scale, S, LIMIT, first, HU, PER,
    NB, SUBS, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, s_b, s_h, r_b, r_h, r_q,
    m_b, m_h, m_q, m_g, m_r, m_n,
    D: tl.constexpr, DV: tl.constexpr, G: tl.constexpr, R: tl.constexpr, KB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    ROWS: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of the keys and values of a block, or of BN of them; a program one, and key head.

    `order` [B, Hu, Q n] has the places of the lists, sorted by the block listed there; those of block i are
    from `starts`[i], [B, Hu, blocks + 1].
    """
    part, unit = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    heads = HU // PER
    batch, shared, block = unit // heads, unit % heads, part // SUBS
    inside = (part % SUBS) * BN + tl.arange(0, BN)
    key = block * KB + inside
    there = (inside < KB) & (key < S)
    columns, values = tl.arange(0, BD), tl.arange(0, BV)
    keys = _vectors(k + batch * k_b + shared * k_h, key, columns, there, D, k_t)
    read = _vectors(v + batch * v_b + shared * v_h, key, values, there, DV, v_t)
    line_k = to_k + (unit * S + key[:, None]) * D + columns[None, :]
    line_v = to_v + (unit * S + key[:, None]) * DV + values[None, :]
    of_k = tl.load(line_k, mask=there[:, None] & (columns[None, :] < D), other=0.0)
    of_v = tl.load(line_v, mask=there[:, None] & (values[None, :] < DV), other=0.0)
    for member in range(PER):
        hu = shared * PER + member
        begin = tl.load(starts + batch * s_b + hu * s_h + block)
        end = tl.load(starts + batch * s_b + hu * s_h + block + 1)
        for place in range(begin, end):
            entry = tl.load(order + batch * o_b + hu * o_h + place).to(tl.int64)
            j, c = entry // NB, (entry % NB) * KB + inside
            for tile in range((G * R + BM - 1) // BM):
                head, slot, row, _, real = _tile(
                    rows, batch * HU + hu, j, first, tile, HU, LIMIT, r_b, r_h, r_q, G, R, BM, ROWS
                )
                line = (batch * HU * G + head) * LIMIT + slot
                queries = _vectors(q + batch * q_b, head * q_h + row * q_t, columns, real, D, 1)
                wanted = _vectors(to_out, line, values, real, DV, DV)
                sums = tl.load(lse + line, mask=real, other=0.0)
                shares = tl.load(share + line, mask=real, other=0.0)
                sums = tl.where(sums == float("-inf"), float("inf"), sums)
                seen = there[:, None] & real[None, :]
                if MASK:
                    m = (tile * BM + tl.arange(0, BM))[None, :]
                    seen = _shown(mask, batch, hu, j, m, c[:, None], seen, m_b, m_h, m_q, m_g, m_r, m_n, R)
                scores = tl.where(seen, _dot(keys, tl.trans(queries), PRECISION) * scale, float("-inf"))
                weights = tl.exp(scores - sums[None, :])
                of_v += _dot(weights.to(wanted.dtype), wanted, PRECISION)
                slopes = weights * (_dot(read, tl.trans(wanted), PRECISION) - shares[None, :]) * scale
                of_k += _dot(slopes.to(queries.dtype), queries, PRECISION)
    tl.store(line_k, of_k, mask=there[:, None] & (columns[None, :] < D))
    tl.store(line_v, of_v, mask=there[:, None] & (values[None, :] < DV))
