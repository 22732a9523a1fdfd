"""Neighbourhood attention as functions of q, k and v, heads last but one, as in NATTEN.

    o_i = sum_j softmax_j(scale q_i . k_j [+ bias]) v_j        j the neighbours of i, and the additional keys

Source: Hassani et al., 2024, arXiv 2403.04690; Hassani et al., 2023, arXiv 2204.07143 (neighbourhoods and the
bias), Hassani and Shi, 2022, arXiv 2209.15001 (dilation). Status: agrees with natten 0.21.7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.attention.neighborhood.flex import attend_flex
from regard.attention.neighborhood.rules import (
    Flags,
    Numbers,
    axes_of,
    check_additional,
    check_bias,
    check_grids,
    index_of,
    mask_of,
)
from regard.engines.blocks import attend_blocks, merge_parts
from regard.engines.grids import Axis
from regard.engines.neighborhoods import attend_neighborhoods
from regard.errors import RegardError

IMPLS = ("tiles", "index", "dense", "flex")
ROWS = 64


def na1d(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: Numbers, stride: Numbers = 1, dilation: Numbers = 1,
    is_causal: Flags = False, *, scale: float | None = None, additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None, rpb: Tensor | None = None, return_lse: bool = False,
    impl: str = "tiles",
) -> Any:  # fmt: skip
    """Return attention of each position of a sequence to its nearest keys, [B, X, H, Dv].

    Args:
        q: [B, X, H, D]; k: [B, X, Hkv, D]; v: [B, X, Hkv, Dv]. H is a multiple of Hkv.
        kernel_size: how many keys a query sees, from 2, its own included; even ones have one more before it
            than after. At a border the window is moved inside.
        stride: so many queries in a row share the window of the middle one, at most kernel_size.
        dilation: distance between the keys of a window.
        is_causal: whether a window ends at its query; it then shrinks at the start.
        scale: factor on q k^T; default 1 / sqrt(D).
        additional_keys, additional_values: [B, M, Hkv, D] and [B, M, Hkv, Dv], which all queries see as well.
        rpb: bias by relative position, [H, 2 kernel_size - 1], not in causal order.
        return_lse: whether to return the logsumexp of the scores as well, [B, X, H].
        impl: "tiles", the fast path on any device; "index", lists of keys; "dense", the definition; "flex",
            FlexAttention, compiled, on a GPU.

    Raises:
        ShapeMismatch: where tensors do not fit together.
        RegardError: where an option will not do on this grid.

    Example:
        >>> q, k, v = torch.randn(3, 1, 20, 2, 8)
        >>> na1d(q, k, v, 5, is_causal=True).shape
        torch.Size([1, 20, 2, 8])
    """
    options = (kernel_size, stride, dilation, is_causal)
    return _attend(1, q, k, v, options, scale, (additional_keys, additional_values), rpb, return_lse, impl)


def na2d(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: Numbers, stride: Numbers = 1, dilation: Numbers = 1,
    is_causal: Flags = False, *, scale: float | None = None, additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None, rpb: Tensor | None = None, return_lse: bool = False,
    impl: str = "tiles",
) -> Any:  # fmt: skip
    """Return attention of each position of a plane to its nearest keys, [B, X, Y, H, Dv].

    Args:
        q, k, v: as in `na1d`, [B, X, Y, heads, dim].
        kernel_size, stride, dilation, is_causal: one for both axes or one for each; see `na1d`.
        rpb: [H, 2 k1 - 1, 2 k2 - 1].
        scale, additional_keys, additional_values, return_lse, impl: as in `na1d`.

    Example:
        >>> q, k, v = torch.randn(3, 1, 14, 9, 2, 8)
        >>> na2d(q, k, v, 7, dilation=(2, 1)).shape
        torch.Size([1, 14, 9, 2, 8])
    """
    options = (kernel_size, stride, dilation, is_causal)
    return _attend(2, q, k, v, options, scale, (additional_keys, additional_values), rpb, return_lse, impl)


def na3d(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: Numbers, stride: Numbers = 1, dilation: Numbers = 1,
    is_causal: Flags = False, *, scale: float | None = None, additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None, rpb: Tensor | None = None, return_lse: bool = False,
    impl: str = "tiles",
) -> Any:  # fmt: skip
    """Return attention of each position of a volume or video to its nearest keys, [B, X, Y, Z, H, Dv].

    Args:
        q, k, v: as in `na1d`, [B, X, Y, Z, heads, dim].
        kernel_size, stride, dilation, is_causal: one for all axes or one for each; see `na1d`.
        rpb: [H, 2 k1 - 1, 2 k2 - 1, 2 k3 - 1].
        scale, additional_keys, additional_values, return_lse, impl: as in `na1d`.

    Example:
        >>> q, k, v = torch.randn(3, 1, 6, 8, 8, 2, 8)
        >>> na3d(q, k, v, (4, 3, 3), is_causal=(True, False, False)).shape
        torch.Size([1, 6, 8, 8, 2, 8])
    """
    options = (kernel_size, stride, dilation, is_causal)
    return _attend(3, q, k, v, options, scale, (additional_keys, additional_values), rpb, return_lse, impl)


def _attend(
    count: int, q: Tensor, k: Tensor, v: Tensor, options: tuple[Any, ...], scale: float | None,
    additional: tuple[Tensor | None, Tensor | None], rpb: Tensor | None, return_lse: bool, impl: str,
) -> Any:  # fmt: skip
    check_grids(q, k, v, count)
    axes = axes_of(q.shape[1:-2], *options)
    check_bias(rpb, axes, q.shape[-2])
    check_additional(*additional, k, v)
    if impl not in IMPLS:
        raise RegardError(f"impl is {impl!r}; it must be one of {', '.join(IMPLS)}.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = attend_grid(q, k, v, axes, scale=scale, bias=rpb, impl=impl)
    if additional[0] is not None and additional[1] is not None:
        out, lse = merge_parts((out, lse), _to_all(q, additional[0], additional[1], scale))
    return (out, lse) if return_lse else out


def attend_grid(
    q: Tensor, k: Tensor, v: Tensor, axes: tuple[Axis, ...], *, scale: float, bias: Tensor | None = None,
    impl: str = "tiles",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return attention on a grid, [B, X1.., H, Dv], and its logsumexp, by one of `IMPLS`; checks nothing."""
    if impl == "tiles":
        return attend_neighborhoods(q, k, v, axes, scale=scale, bias=bias)
    if impl == "dense":
        return _dense(q, k, v, axes, scale, bias)
    if impl == "flex":
        return attend_flex(q, k, v, axes, scale, bias)
    if bias is not None:
        raise RegardError("impl='index' adds no rpb; use tiles or dense.")
    index = index_of(axes).to(q.device)
    rows, keys, values = _by_head(q, k, v)
    out, lse = attend_blocks(rows, keys, values, index[None, None], scale=scale)
    return _by_place(out, q), _by_place(lse[..., None], q)[..., 0]


def _by_head(*given: Tensor) -> list[Tensor]:
    """[B, X1.., H, D] as [B, H, N, D]."""
    return [x.flatten(1, -3).transpose(1, 2) for x in given]


def _by_place(x: Tensor, q: Tensor) -> Tensor:
    """[B, H, N, D] as [B, X1.., H, D]."""
    return x.transpose(1, 2).reshape(*q.shape[:-1], x.shape[-1])


def _to_all(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of all queries to keys [B, M, Hkv, D] that all see."""
    (flat,) = _by_head(q)
    index = torch.zeros(1, 1, -(-flat.shape[2] // ROWS), 1, dtype=torch.int64, device=q.device)
    out, lse = attend_blocks(
        flat, keys.transpose(1, 2), values.transpose(1, 2), index, key_block=keys.shape[1], query_block=ROWS,
        scale=scale,
    )  # fmt: skip
    return _by_place(out, q), _by_place(lse[..., None], q)[..., 0]


def _dense(
    q: Tensor, k: Tensor, v: Tensor, axes: tuple[Axis, ...], scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition: all scores, in float32 or float64, of which the mask hides those that are far."""
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    (rows,), group = _by_head(q), q.shape[-2] // max(1, k.shape[-2])
    keys, values = (x.repeat_interleave(group, 1).to(kind) for x in _by_head(k, v))
    scores = rows.to(kind) @ keys.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias.to(kind).flatten(1)[:, places(axes).to(q.device)]
    scores = scores.masked_fill(~mask_of(axes).to(q.device), -torch.inf)
    out, lse = scores.softmax(-1) @ values, scores.logsumexp(-1, keepdim=True)
    return _by_place(out, q).to(v.dtype), _by_place(lse, q)[..., 0]


def places(axes: Sequence[Axis]) -> Tensor:
    """Return where in a bias table each query and key stand, int64 [N, N]; anywhere where it cannot see it.

    The table goes by (key - query) div dilation + k - 1 along each axis.
    """
    place = torch.zeros(1, 1, dtype=torch.int64)
    for axis in axes:
        at = torch.arange(axis.length) // axis.dilation
        apart = (at - at[:, None] + axis.kernel - 1).clamp(0, 2 * axis.kernel - 2)
        place = (place * (2 * axis.kernel - 1))[:, None, :, None] + apart[None, :, None, :]
        place = place.flatten(2).flatten(0, 1)
    return place
