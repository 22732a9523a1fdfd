"""Landmark attention as a function of queries, keys, values and where the landmarks are."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.attention.checks import check_call
from regard.attention.landmark.fast import Regular, attend_regular
from regard.attention.landmark.groups import grouped_softmax
from regard.attention.matrices import score_matrix
from regard.attention.mechanism import Context
from regard.engines.rows import expand_heads
from regard.errors import RegardError, ShapeMismatch

IMPLS = (None, "blocks", "matrix")


def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_landmark: Tensor,
    *,
    causal: bool = True,
    valid: Tensor | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Return attention by a grouped softmax over blocks that landmarks close, [B, H, T, Dv].

    Mohtashami and Jaggi, 2023, arXiv 2305.16300, section 3.1.

    Args:
        q: [B, H, T, D], the last T of S positions.
        k: [B, Hkv, S, D]; H is a multiple of Hkv.
        v: [B, Hkv, S, Dv].
        is_landmark: bool [B, S] or [S], anywhere.
        causal: must be True: blocks are those before a token.
        valid: bool [B, S], False at padding.
        scale: factor on q k^T; default 1 / sqrt(D).
        impl: "blocks", where landmarks stand at every L-th key, in memory O(T S / L); "matrix", the
            definition, for landmarks anywhere, in memory O(T S); None picks "blocks" where it can.

    Raises:
        ShapeMismatch: where the tensors do not fit.
        RegardError: for NaN or infinity, causal=False, or "blocks" where landmarks are not regular.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 12, 8)
        >>> marks = torch.arange(12) % 4 == 3
        >>> landmark_attention(q, k, v, marks).shape
        torch.Size([1, 2, 12, 8])
    """
    marks = _checked(q, k, v, is_landmark, causal, valid)
    if impl not in IMPLS:
        raise RegardError(f"impl is {impl!r}; it must be blocks, matrix or None.")
    block = regular_block(marks) if valid is None else None
    if impl == "blocks" and block is None:
        raise RegardError(
            "the landmarks do not stand at every L-th key of rows without padding, as impl='blocks' needs; "
            "leave impl out."
        )
    if block is not None and impl != "matrix":
        how = Regular(block, k.shape[2] - q.shape[2], q.shape[-1] ** -0.5 if scale is None else scale)
        return attend_regular(q, k, v, how)[0].to(v.dtype)
    weights, _ = _grouped(q, k, marks, valid, scale)
    return (weights @ expand_heads(v, q.shape[1]).to(weights.dtype)).to(v.dtype)


def landmark_gates(
    q: Tensor,
    k: Tensor,
    is_landmark: Tensor,
    *,
    valid: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return the share of its attention that each row gives each closed block, [B, H, T, N].

    What is left of 1 goes to the row's own block. N is the largest number of landmarks in a row of the batch.

    Args:
        q, k, is_landmark, valid, scale: as for `landmark_attention`.

    Example:
        >>> q = k = torch.zeros(1, 1, 3, 4)
        >>> landmark_gates(q, k, torch.tensor([False, True, False])).flatten().tolist()
        [0.0, 0.0, 0.5]
    """
    marks = _checked(q, k, k, is_landmark, True, valid)
    return _grouped(q, k, marks, valid, scale)[1]


def regular_block(is_landmark: Tensor) -> int | None:
    """Return L where every L-th key of all rows, and no other, is a landmark; else None.

    Without any landmark that is one block, longer than the text.

    Args:
        is_landmark: bool [B, S].

    Example:
        >>> regular_block(torch.tensor([[False, False, True, False]]))
        3
    """
    keys = is_landmark.shape[-1]
    at = is_landmark[0].nonzero() if len(is_landmark) else is_landmark.new_zeros(0, 1, dtype=torch.int64)
    block = int(at[0]) + 1 if len(at) else keys + 2
    wanted = torch.arange(1, keys + 1, device=is_landmark.device) % block == 0
    return block if block > 1 and bool((is_landmark == wanted).all()) else None


def _grouped(
    q: Tensor, k: Tensor, marks: Tensor, valid: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    ctx = Context.of(q, k)
    scores = score_matrix(q if scale is None else q * (scale * q.shape[-1] ** 0.5), k, ctx, None)
    visible = torch.ones(1, dtype=torch.bool, device=q.device) if valid is None else valid[:, None, None]
    return grouped_softmax(scores, marks if valid is None else marks & valid, visible)


def _checked(
    q: Tensor, k: Tensor, v: Tensor, is_landmark: Tensor, causal: bool, valid: Tensor | None
) -> Tensor:
    """Refuse what does not fit; the landmarks, [B, S]."""
    check_call(q, k, v)
    if not causal:
        raise RegardError("landmark attention is causal: a block is closed by what comes after it.")
    if q.shape[2] > k.shape[2]:
        raise ShapeMismatch(f"{q.shape[2]} causal queries need as many keys, and there are {k.shape[2]}.")
    wanted = (q.shape[0], k.shape[2])
    if is_landmark.dtype != torch.bool or tuple(is_landmark.shape) not in (wanted, wanted[1:]):
        raise ShapeMismatch(
            f"is_landmark must be bool {list(wanted)} or [{wanted[1]}], and is "
            f"{str(is_landmark.dtype).removeprefix('torch.')} {list(is_landmark.shape)}."
        )
    if valid is not None and (valid.dtype != torch.bool or tuple(valid.shape) != wanted):
        raise ShapeMismatch(f"valid must be bool {list(wanted)}, and is {list(valid.shape)}.")
    return is_landmark.expand(wanted)
