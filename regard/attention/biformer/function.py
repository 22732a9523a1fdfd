"""Bi-level routing attention as a function of q, k and v, heads last but one, as in `na2d`.

    the map is cut into regions; each chooses the `topk` regions whose mean key fits its mean query best;
    its tokens attend to all tokens of those.

Choosing costs R^2 C operations for R regions, attention 2 topk N^2 C / R for N tokens, least near R = N^(2/3)
where together they are O(N^(4/3)). Memory beside inputs and outputs is that of one piece of the engine
(`regard/engines/blocks.py`): no region's keys are gathered for all at once.

Source: Zhu et al., 2023, arXiv 2303.08810, section 3. Status: agrees with the official code
(rayleizhu/BiFormer, ops/bra_legacy.py and ops/bra_nchw.py) by running both; hiding padding and `valid` are
ours, for the official code attends to its padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.attention.biformer.regions import MOST_AXES, Numbers, Regions, check_topk, regions_of
from regard.attention.biformer.route import attend_routed, route, weights_by_definition
from regard.errors import RegardError, ShapeMismatch

IMPLS = ("blocks", "dense")


def bi_level_routing_attention(
    q: Tensor, k: Tensor, v: Tensor, regions: Numbers, topk: int, scale: float | None = None, *,
    valid: Tensor | None = None, auto_pad: bool = True, mask_padding: bool = True,
    return_routing: bool = False, impl: str = "blocks",
) -> Any:  # fmt: skip
    """Return attention of each region to the regions it chooses, [B, X1.., H, Dv].

    Args:
        q, k: [B, X1.., H, D], of a line, plane or volume.
        v: [B, X1.., H, Dv].
        regions: S, along each axis; one number for all or one for each.
        topk: how many of the S1 S2.. regions each chooses, from 1; all of them is full attention. A region
            need not choose itself.
        scale: factor on q k^T; default 1 / sqrt(H D), of the full width, as the published models have it.
        valid: bool [B, X1..], False at tokens that are padding: they take part in no mean, are no key, and
            their output is 0. A region without tokens is never chosen.
        auto_pad: whether axes that S does not divide are padded at the end.
        mask_padding: whether that padding is hidden; False for zeros that are attended to, as in the official
            code. Means are of real tokens either way.
        return_routing: whether to return the `RegionRouting` as well.
        impl: "blocks", the fast path on any device, or "dense", the definition.

    Raises:
        ShapeMismatch: where tensors do not fit together.
        RegardError: where an option will not do on this map.

    Example:
        >>> q, k, v = torch.randn(3, 1, 14, 21, 2, 8)
        >>> out, routing = bi_level_routing_attention(q, k, v, 7, topk=4, return_routing=True)
        >>> out.shape, routing.index.shape, int(routing.seen(region=0).sum())
        (torch.Size([1, 14, 21, 2, 8]), torch.Size([1, 49, 4]), 24)
    """
    _check(q, k, v)
    plan = regions_of(q.shape[1:-2], regions, auto_pad)
    check_topk(topk, plan.count)
    check_valid(valid, q.shape[:-2])
    if impl not in IMPLS:
        raise RegardError(f"impl is {impl!r}; it must be one of {', '.join(IMPLS)}.")
    scale = (q.shape[-2] * q.shape[-1]) ** -0.5 if scale is None else scale
    q, k, v = (plan.split(x) for x in (q, k, v))
    real, visible = masks_of(plan, valid, mask_padding, q.device)
    routing = route(q, k, plan, topk, real)
    if impl == "dense":
        weights = weights_by_definition(q, k, routing, scale, visible)
        out = (weights @ v.flatten(1, 2).transpose(1, 2).to(weights.dtype)).transpose(1, 2)
        out = out.unflatten(1, (plan.count, plan.tokens)).to(v.dtype)
    else:
        out = attend_routed(q, k, v, routing.index, scale, visible)
    out = plan.joined(out)
    if valid is not None:
        out = out.masked_fill(~valid[..., None, None], 0.0)
    return (out, routing) if return_routing else out


def masks_of(
    plan: Regions, valid: Tensor | None, mask_padding: bool, device: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Return the tokens that count in means, and those that may be keys, bool [B|1, R, T]; None for all."""
    real = plan.real(device) if valid is None else plan.split(valid)
    if mask_padding:
        return real, real
    return real, None if valid is None else ~plan.split(~valid)


def check_valid(valid: Tensor | None, shape: torch.Size) -> None:
    """Refuse what does not say of each token whether it is real.

    Raises:
        ShapeMismatch: where it is not bool of this shape.
    """
    if valid is not None and (valid.shape != shape or valid.dtype != torch.bool):
        kind = str(valid.dtype).removeprefix("torch.")
        raise ShapeMismatch(f"valid is {kind} {list(valid.shape)}; it must be bool {list(shape)}.")


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not 4 <= x.ndim <= MOST_AXES + 3 or not x.is_floating_point():
            raise ShapeMismatch(
                f"{name} is {list(x.shape)}; it must be floating-point [batch, 1 to {MOST_AXES} axes, heads, "
                "dim]."
            )
    if k.shape != q.shape or v.shape[:-1] != q.shape[:-1] or not q.dtype == k.dtype == v.dtype:
        raise ShapeMismatch(
            f"q is {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)}, of {q.dtype}, {k.dtype} and "
            f"{v.dtype}; they must be of one map, heads and dtype, and q and k of one width."
        )
    if not all(q.shape[1:]) or not v.shape[-1]:
        raise ShapeMismatch(f"q is {list(q.shape)}; a map must have tokens, heads and a width.")
