"""Triton kernels of the recurrence: a pass over chunks for the states, the rest for all chunks at once.

Chunks, and the products in them, are those of `pieces.py`. Where a decay is the same for all channels (KIND
1) the scores of a chunk are (q_i . k_j) exp(b_i - b_j); where it differs by channel (KIND 2) they are summed
channel by channel, a key at a time, so that chunks are short. KIND 0 is no decay. No exponent is positive.

Sums are float32; products are of what the inputs are. D and Dv are padded to BD and BV, T to chunks of C.
`seg` [B, T] numbers the packed sequences. All states are float32 [.., D, Dv].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _matrix(x, rows, columns, height, width, stride):
    """Rows and columns of the matrix at `x`; 0 outside."""
    inside = (rows[:, None] < height) & (columns[None, :] < width)
    return tl.load(x + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """a @ b in float32; `wide` for the interpreter, which cannot multiply bfloat16."""
    if PRECISION == "wide":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _exponents(g, at, columns, T, D, g_t, KIND: tl.constexpr):
    """Exponents of a chunk, [C, 1] or [C, BD]."""
    if KIND == 2:
        return _matrix(g, at, columns, T, D, g_t).to(tl.float32)
    else:
        return tl.load(g + at * g_t, mask=at < T, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _sequences(seg, at, start, T, C: tl.constexpr):
    """The sequences of a chunk's positions, of the position before it, and of its last."""
    before = tl.load(seg + tl.maximum(start - 1, 0))
    end = tl.load(seg + tl.minimum(start + C, T) - 1)
    return tl.load(seg + tl.minimum(at, T - 1)), tl.where(start == 0, 0, before), end


@triton.jit
def _left(b, of, C: tl.constexpr, KIND: tl.constexpr, STARTS: tl.constexpr):
    """What is left at i of what j wrote, [C, C]; for a decay by channel, whether anything can be."""
    lower = tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]
    seen = lower
    if STARTS:
        seen = seen & (of[:, None] == of[None, :])
    if KIND == 1:
        return tl.where(seen, tl.exp(tl.where(lower, b - tl.trans(b), 0.0)), 0.0)
    else:
        return tl.where(seen, 1.0, 0.0)


@triton.jit
def _key(k, b, j, start, columns, T, D, k_t, C: tl.constexpr):
    """Key j of a chunk, [BD], and what of each of its channels is left at every position, [C, BD]."""
    place = (start + j) * k_t + columns
    key = tl.load(k + place, mask=columns < tl.where(start + j < T, D, 0), other=0.0).to(tl.float32)
    there = tl.sum(tl.where(tl.arange(0, C)[:, None] == j, b, 0.0), 0)
    return key, tl.exp(tl.minimum(b - there[None, :], 0.0))


@triton.jit
def _scores(
    queries, k, b, left, at, start, columns, T, D, k_t,
    C: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The scores of a chunk, [C, C]."""
    if KIND == 2:
        scores = tl.zeros((C, C), tl.float32)
        for j in range(C):
            key, share = _key(k, b, j, start, columns, T, D, k_t, C)
            column = tl.sum(queries * share * key[None, :], 1)
            scores = tl.where(tl.arange(0, C)[None, :] == j, column[:, None], scores)
        return scores * left
    else:
        keys = _matrix(k, at, columns, T, D, k_t)
        return _dot(queries, tl.trans(keys), PRECISION) * left


@triton.jit
def states_kernel(
    k, v, g, seg, first, states, last, T, N, HKV,
    k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t,
    D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    KIND: tl.constexpr, STARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The states before each chunk, and that after the last; a program a head and block of Dv."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // HKV, row % HKV
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    columns, values = tl.arange(0, BD), tl.program_id(0) * BV + tl.arange(0, BV)
    inside = (columns[:, None] < D) & (values[None, :] < DV)
    place = columns[:, None] * DV + values[None, :]
    state = tl.load(first + row * D * DV + place, mask=inside, other=0.0)
    for n in range(N):
        tl.store(states + (row * N + n) * D * DV + place, state, mask=inside)
        at = n * C + tl.arange(0, C)
        stored = _matrix(k, at, columns, T, D, k_t)
        keys = stored.to(tl.float32)
        if KIND != 0:
            exponents = _exponents(g + batch * g_b + head * g_h, at, columns, T, D, g_t, KIND)
            total = tl.sum(exponents, 0)
            keys = keys * tl.exp(total[None, :] - tl.cumsum(exponents, 0))
            state *= tl.exp(total)[:, None]
        if STARTS:
            of, before, end = _sequences(seg + batch * T, at, n * C, T, C)
            keys = tl.where((of == end)[:, None], keys, 0.0)
            state = tl.where(before == end, state, 0.0)
        written = _matrix(v, at, values, T, DV, v_t)
        state += _dot(tl.trans(keys.to(stored.dtype)), written, PRECISION)
    tl.store(last + row * D * DV + place, state, mask=inside)


@triton.jit
def outputs_kernel(
    q, k, v, g, seg, states, out, T, N, H, G,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t,
    D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    KIND: tl.constexpr, STARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of a chunk from its inputs and the state before it; a program a chunk, head, Dv block."""
    n, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    batch, head = row // H, row % H
    shared, start = head // G, n * C
    k += batch * k_b + shared * k_h
    columns, values = tl.arange(0, BD), tl.program_id(0) * BV + tl.arange(0, BV)
    at = start + tl.arange(0, C)
    queries = _matrix(q + batch * q_b + head * q_h, at, columns, T, D, q_t)
    aged, b, of = queries.to(tl.float32), tl.zeros((C, 1), tl.float32), at
    if KIND != 0:
        b = tl.cumsum(_exponents(g + batch * g_b + shared * g_h, at, columns, T, D, g_t, KIND), 0)
        aged = aged * tl.exp(b)
    if STARTS:
        of, before, _ = _sequences(seg + batch * T, at, start, T, C)
        aged = tl.where((of == before)[:, None], aged, 0.0)
    scores = _scores(
        queries, k, b, _left(b, of, C, KIND, STARTS), at, start, columns, T, D, k_t, C, KIND, PRECISION
    )
    written = _matrix(v + batch * v_b + shared * v_h, at, values, T, DV, v_t)
    state = _matrix(states + ((batch * (H // G) + shared) * N + n) * D * DV, columns, values, D, DV, DV)
    found = _dot(scores.to(written.dtype), written, PRECISION)
    found += _dot(aged.to(queries.dtype), state.to(queries.dtype), PRECISION)
    inside = (at[:, None] < T) & (values[None, :] < DV)
    tl.store(out + row * T * DV + at[:, None] * DV + values[None, :], found, mask=inside)


@triton.jit
def later_kernel(
    q, to_out, g, seg, to_last, later, to_first, T, N, HKV, G,
    q_b, q_h, q_t, o_b, o_h, o_t, g_b, g_h, g_t,
    D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    KIND: tl.constexpr, STARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of the states after each chunk, and of that before the first."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // HKV, row % HKV
    columns, values = tl.arange(0, BD), tl.program_id(0) * BV + tl.arange(0, BV)
    inside = (columns[:, None] < D) & (values[None, :] < DV)
    place = columns[:, None] * DV + values[None, :]
    state = tl.load(to_last + row * D * DV + place, mask=inside, other=0.0)
    for i in range(N):
        n = N - 1 - i
        tl.store(later + (row * N + n) * D * DV + place, state, mask=inside)
        at = n * C + tl.arange(0, C)
        share, seen = tl.full((C, 1), 1.0, tl.float32), at >= 0
        if KIND != 0:
            exponents = _exponents(g + batch * g_b + head * g_h, at, columns, T, D, g_t, KIND)
            share = tl.exp(tl.cumsum(exponents, 0))
            state *= tl.exp(tl.sum(exponents, 0))[:, None]
        if STARTS:
            of, before, end = _sequences(seg + batch * T, at, n * C, T, C)
            seen = of == before
            state = tl.where(before == end, state, 0.0)
        for member in range(G):
            one = head * G + member
            queries = _matrix(q + batch * q_b + one * q_h, at, columns, T, D, q_t)
            aged = tl.where(seen[:, None], queries.to(tl.float32) * share, 0.0).to(queries.dtype)
            given = _matrix(to_out + batch * o_b + one * o_h, at, values, T, DV, o_t).to(queries.dtype)
            state += _dot(tl.trans(aged), given, PRECISION)
    tl.store(to_first + row * D * DV + place, state, mask=inside)
