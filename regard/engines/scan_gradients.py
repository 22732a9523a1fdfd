"""The Triton kernel of the gradients of q, k and v in a chunk; see `scan_kernels.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from regard.engines.scan_kernels import _dot, _exponents, _key, _left, _matrix, _scores, _sequences


@triton.jit
def gradients_kernel(
    q, k, v, g, seg, states, later, to_out, to_q, to_k, to_v, T, N, H, G,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, o_b, o_h, o_t,
    D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    KIND: tl.constexpr, STARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients for each query head, [B, H, T, .]; a program a chunk and head.

    What a chunk wrote into the state is counted to the first query head of those that share it.
    """
    n, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = row // H, row % H
    shared, start = head // G, n * C
    one = tl.where(head % G == 0, 1.0, 0.0)
    k += batch * k_b + shared * k_h
    place = ((batch * (H // G) + shared) * N + n) * D * DV
    columns, at = tl.arange(0, BD), start + tl.arange(0, C)
    queries = _matrix(q + batch * q_b + head * q_h, at, columns, T, D, q_t)
    keys = _matrix(k, at, columns, T, D, k_t)
    kind = queries.dtype
    b, of = tl.zeros((C, 1), tl.float32), at
    from_start, to_end = tl.full((C, 1), 1.0, tl.float32), tl.full((C, 1), 1.0, tl.float32) * one
    if KIND != 0:
        exponents = _exponents(g + batch * g_b + shared * g_h, at, columns, T, D, g_t, KIND)
        b = tl.cumsum(exponents, 0)
        from_start, to_end = tl.exp(b), tl.exp(tl.sum(exponents, 0)[None, :] - b) * one
    if STARTS:
        of, before, end = _sequences(seg + batch * T, at, start, T, C)
        from_start = tl.where((of == before)[:, None], from_start, 0.0)
        to_end = tl.where((of == end)[:, None], to_end, 0.0)
    left = _left(b, of, C, KIND, STARTS)
    scores = _scores(queries, k, b, left, at, start, columns, T, D, k_t, C, KIND, PRECISION).to(kind)
    aged = (keys.to(tl.float32) * to_end).to(kind)
    of_scores = tl.zeros((C, C), tl.float32)
    of_q, of_k = tl.zeros((C, BD), tl.float32), tl.zeros((C, BD), tl.float32)
    for block in range(tl.cdiv(DV, BV)):
        values = block * BV + tl.arange(0, BV)
        written = _matrix(v + batch * v_b + shared * v_h, at, values, T, DV, v_t)
        given = _matrix(to_out + batch * o_b + head * o_h, at, values, T, DV, o_t).to(kind)
        state = _matrix(states + place, columns, values, D, DV, DV).to(kind)
        after = _matrix(later + place, columns, values, D, DV, DV).to(kind)
        of_scores += _dot(given, tl.trans(written), PRECISION)
        of_q += _dot(given, tl.trans(state), PRECISION)
        of_k += _dot(written, tl.trans(after), PRECISION)
        found = _dot(tl.trans(scores), given, PRECISION)
        found += _dot(aged, after, PRECISION)
        inside = (at[:, None] < T) & (values[None, :] < DV)
        tl.store(to_v + row * T * DV + at[:, None] * DV + values[None, :], found, mask=inside)
    of_scores, of_q, of_k = of_scores * left, of_q * from_start, of_k * to_end
    if KIND == 2:
        index = tl.arange(0, C)
        for j in range(C):
            key, share = _key(k, b, j, start, columns, T, D, k_t, C)
            column = tl.sum(tl.where(index[None, :] == j, of_scores, 0.0), 1)[:, None] * share
            of_q += column * key[None, :]
            of_k += tl.where(index[:, None] == j, tl.sum(column * queries, 0)[None, :], 0.0)
    else:
        of_scores = of_scores.to(kind)
        of_q += _dot(of_scores, keys, PRECISION)
        of_k += _dot(tl.trans(of_scores), queries, PRECISION)
    inside = (at[:, None] < T) & (columns[None, :] < D)
    tl.store(to_q + row * T * D + at[:, None] * D + columns[None, :], of_q, mask=inside)
    tl.store(to_k + row * T * D + at[:, None] * D + columns[None, :], of_k, mask=inside)
