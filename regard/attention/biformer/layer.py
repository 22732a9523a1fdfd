"""Bi-level routing attention with its projections and LePE, from x to x on a map.

    q, k, v = x W_qkv + b,  split as (3, heads, dim / heads)
    out = W_o (bra(q, k, v) + LePE(v)) + b        LePE: depthwise 5 x 5 convolution, with bias

Maps are channels-last, [B, H, W, dim].

Source: Zhu et al., 2023, arXiv 2303.08810, section 3; LePE is of Dong et al., 2022, arXiv 2107.00652. Status:
agrees with the official code by running both, its older module (ops/bra_legacy.py) and its newer one
(ops/bra_nchw.py), whose weights load. Hidden padding is ours; `mask_padding=False` and `pad_input=True` give
what the newer and the older do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard.attention.biformer.function import check_valid, masks_of
from regard.attention.biformer.regions import (
    MOST_AXES,
    Numbers,
    Regions,
    check_topk,
    counts_of,
    regions_of,
)
from regard.attention.biformer.route import RegionRouting, attend_routed, route, weights_by_definition
from regard.attention.block import Block, Grid, chosen_queries
from regard.attention.costs import Costs
from regard.attention.registry import Spec, mechanism
from regard.errors import RegardError, ShapeMismatch

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
OFFICIAL = {"qkv.qkv": "qkv", "wo": "proj", "qkv_linear": "qkv", "output_linear": "proj"}


class BRA(Block):
    """A layer of bi-level routing attention; the module of `BiLevelRoutingGrid`.

    Parameters are `qkv`, `lepe` and `proj`; `load_state_dict` also takes the names of both official modules.

    Args:
        dim: width of x.
        heads: number of heads; it divides dim.
        regions: along each axis; one number for all or one for each.
        topk: how many regions each region attends to.
        lepe: width of the convolution, odd; 0 for none.
        scale: factor on q k^T; default 1 / sqrt(dim), as the published models have it. Pass
            (dim / heads) ** -0.5 for that of most other attention.
        auto_pad, mask_padding: see `bi_level_routing_attention`.
        pad_input: whether padding goes to x, where it gets the bias of `qkv` and counts as any other token,
            as in the older official module.
        axes: of the map, 1 to 3.
        device, dtype: of the parameters.

    Raises:
        RegardError: where the numbers do not fit together.

    Example:
        >>> layer = BRA(64, 2, regions=7, topk=4)
        >>> layer(torch.randn(2, 28, 14, 64)).shape
        torch.Size([2, 28, 14, 64])
    """

    def __init__(
        self, dim: int, heads: int = 8, regions: Numbers = 7, topk: int = 4, lepe: int = 5,
        scale: float | None = None, auto_pad: bool = True, mask_padding: bool = True,
        pad_input: bool = False, axes: int = 2, *, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        _checked(dim, heads, regions, topk, lepe, axes)
        self.dim, self.heads, self.regions, self.topk, self.axes = dim, heads, regions, topk, axes
        self.scale = dim**-0.5 if scale is None else scale
        self.auto_pad, self.mask_padding, self.pad_input = auto_pad, mask_padding, pad_input
        self.shows = "rows" if axes == 2 else None
        made = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, 3 * dim, **made)
        self.proj = nn.Linear(dim, dim, **made)
        self.lepe: nn.Module | None = None
        if lepe:
            self.lepe = CONVOLUTIONS[axes - 1](dim, dim, lepe, padding=lepe // 2, groups=dim, **made)
        self.register_load_state_dict_pre_hook(_rename)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the outputs of x [B, X1.., dim], of its shape.

        Args:
            valid: bool [B, X1..], False at tokens that are padding.

        Raises:
            ShapeMismatch: where x is of other axes or width, or `valid` not of its shape.
            RegardError: where the map has fewer positions than regions along an axis, or must not be padded.
        """
        return self._run(x, valid, fast=True)

    def reference(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        return self._run(x, valid, fast=False)

    def routing(self, x: Tensor, valid: Tensor | None = None) -> RegionRouting:
        """Return which regions each region of x attends to.

        Example:
            >>> BRA(16, 2, regions=3, topk=2).routing(torch.randn(1, 9, 6, 16)).index.shape
            torch.Size([1, 9, 2])
        """
        return self._prepared(x, valid).routing

    def choose(self, q: Tensor, k: Tensor, regions: Regions, real: Tensor | None) -> RegionRouting:
        """Return the regions that each region chooses; a subclass may choose otherwise, as controls do.

        Args:
            q, k: [B, R, T, heads, dim / heads], region by region.
            regions: how the map is cut.
            real: bool [B|1, R, T], tokens that are no padding; None for all.
        """
        return route(q, k, regions, self.topk, real)

    def grids(self, x: Tensor) -> tuple[Grid, Grid]:
        """Return height and width of x [B, H, W, dim], twice: queries and keys share the plane."""
        if self.axes != 2:
            return super().grids(x)
        self._check_input(x, None)
        return (x.shape[1], x.shape[2]), (x.shape[1], x.shape[2])

    def rows(self, x: Tensor, queries: Tensor | Sequence[int]) -> Tensor:
        """Return the weights of chosen queries over all positions, [B, heads, Q, H W].

        Positions in regions that were not chosen have 0. A row sums to less than 1 where padding is attended.

        Example:
            >>> rows = BRA(16, 2, regions=3, topk=2).rows(torch.randn(1, 9, 6, 16), [0, 53])
            >>> rows.shape, rows.gt(0).sum(-1).unique().tolist()
            (torch.Size([1, 2, 2, 54]), [12])
        """
        grid, _ = self.grids(x)
        chosen = chosen_queries(queries, grid).to(x.device)
        call = self._prepared(x, None)
        places = self._plan(x).places(x.device)
        weights = weights_by_definition(
            call.q, call.k, call.routing, self.scale, call.visible, places[chosen]
        )
        return weights[..., places].to(x.dtype)

    def multiply_adds(self, x: Tensor) -> int:
        """Return the multiply-adds of a forward on x: projections, LePE, routing and attention."""
        plan = self._plan(x)
        tokens, filters = plan.count * plan.tokens, 0
        if self.lepe is not None:
            filters = self.lepe.weight[0, 0].numel()  # type: ignore[index]
        attended = 2 * tokens * min(self.topk, plan.count) * plan.tokens + plan.count**2
        return len(x) * self.dim * (4 * self.dim * tokens + filters * x[0, ..., 0].numel() + attended)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, regions={self.regions}, topk={self.topk}"

    def example(self, generator: torch.Generator) -> Tensor:
        grid = [2 * n + 1 for n in counts_of(self.regions, self.axes)]
        return torch.randn(2, *grid, self.dim, generator=generator, dtype=torch.float64)

    def _plan(self, x: Tensor) -> Regions:
        plan = regions_of(x.shape[1:-1], self.regions, self.auto_pad)
        check_topk(self.topk, plan.count)
        return plan

    def _run(self, x: Tensor, valid: Tensor | None, fast: bool) -> Tensor:
        call = self._prepared(x, valid)
        plan, q, k, v = call.plan, call.q, call.k, call.v
        if fast:
            out = attend_routed(q, k, v, call.routing.index, self.scale, call.visible)
        else:
            weights = weights_by_definition(q, k, call.routing, self.scale, call.visible)
            values = v.flatten(1, 2).transpose(1, 2).to(weights.dtype)
            out = (weights @ values).transpose(1, 2).unflatten(1, v.shape[1:3]).to(v.dtype)
        out = plan.joined(out).flatten(-2)
        if self.lepe is not None:
            values = plan.joined(v.flatten(3))
            if call.valid is not None:
                values = values.masked_fill(~call.valid[..., None], 0.0)
            out = out + self.lepe(values.movedim(-1, 1)).movedim(1, -1)
        found: Tensor = self.proj(out)
        return found[(slice(None), *(slice(n) for n in x.shape[1:-1]))] if self.pad_input else found

    def _prepared(self, x: Tensor, valid: Tensor | None) -> _Call:
        """The projections of x by region, and who looks where."""
        self._check_input(x, valid)
        given = plan = self._plan(x)
        if self.pad_input:
            x, valid = plan.padded(x), None if valid is None else ~plan.padded(~valid)
            plan = Regions(tuple(x.shape[1:-1]), plan.counts)
        real, visible = masks_of(plan, valid, self.mask_padding, x.device)
        parts = self.qkv(plan.split(x))
        kept = plan.real(x.device)
        if kept is not None and not self.mask_padding:
            parts = parts.masked_fill(~kept[..., None], 0.0)
        q, k, v = parts.unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return _Call(plan, q, k, v, self.choose(q, k, given, real), visible, valid)

    def _check_input(self, x: Tensor, valid: Tensor | None) -> None:
        if x.ndim != self.axes + 2 or x.shape[-1] != self.dim or not all(x.shape[1:]):
            raise ShapeMismatch(f"x is {list(x.shape)}; it must be [batch, {self.axes} axes, {self.dim}].")
        check_valid(valid, x.shape[:-1])


@dataclass(frozen=True, eq=False)
class _Call:
    """q, k and v [B, R, T, H, D] of a map, who looks where, keys that may be seen, and real positions."""

    plan: Regions
    q: Tensor
    k: Tensor
    v: Tensor
    routing: RegionRouting
    visible: Tensor | None
    valid: Tensor | None


def own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of official modules under the names that they have here.

    Args:
        state: of ops/bra_legacy.py, ops/bra_nchw.py or what holds them; other names stay.

    Example:
        >>> [*own_names({"attn.wo.bias": torch.zeros(2), "attn.qkv.qkv.bias": torch.zeros(6)})]
        ['attn.proj.bias', 'attn.qkv.bias']
    """
    found = {}
    for name, x in state.items():
        own = f".{name}"
        for theirs, ours in OFFICIAL.items():
            own = own.replace(f".{theirs}.", f".{ours}.")
        square = own.endswith((".qkv.weight", ".proj.weight")) and x.shape[2:] == (1, 1)
        found[own[1:]] = x.flatten(1) if square else x
    return found


def _rename(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    given = {name: state.pop(name) for name in [*state] if name.startswith(prefix)}
    found = own_names({name.removeprefix(prefix): x for name, x in given.items()})
    state.update({prefix + name: x for name, x in found.items()})


def _checked(dim: Any, heads: Any, regions: Any, topk: Any, lepe: Any, axes: Any) -> None:
    for name, value in (("dim", dim), ("heads", heads)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RegardError(f"{name} is {value!r}; it must be a whole number from 1.")
    if dim % heads:
        raise RegardError(f"dim is {dim}, which {heads} heads do not divide.")
    if axes not in range(1, MOST_AXES + 1):
        raise RegardError(f"axes is {axes!r}; it must be 1, 2 or 3.")
    if not isinstance(lepe, int) or lepe < 0 or (lepe and not lepe % 2):
        raise RegardError(f"lepe is {lepe!r}; it must be an odd number, or 0 for no convolution.")
    check_topk(topk, math.prod(counts_of(regions, axes)))


@mechanism("bi-level-routing-grid")
@dataclass(frozen=True, kw_only=True)
class BiLevelRoutingGrid(Spec):
    """Attention of the regions of a map to those they choose: a layer from x to x.

    Attributes:
        dim: width of x.
        heads: number of heads; it divides dim.
        regions: along each axis; one number for all or one for each.
        topk: how many regions each region attends to.
        lepe: width of the convolution of the values, odd; 0 for none.
        axes: of the map, 1 to 3.

    Example:
        >>> layer = BiLevelRoutingGrid(dim=32, heads=2, regions=(4, 3), topk=2).build()
        >>> layer(torch.randn(2, 16, 9, 32)).shape
        torch.Size([2, 16, 9, 32])
    """

    module: ClassVar = BRA
    costs: ClassVar = Costs(time="T k T/R D", memory="T D")
    dim: int
    heads: int
    regions: Numbers = 7
    topk: int = 4
    lepe: int = 5
    axes: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.regions, list):
            object.__setattr__(self, "regions", tuple(self.regions))
        _checked(self.dim, self.heads, self.regions, self.topk, self.lepe, self.axes)

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return (
            cls(dim=8, heads=2, regions=(3, 4), topk=2),
            cls(dim=12, heads=3, regions=5, topk=2, axes=1),
            cls(dim=8, heads=1, regions=2, topk=8, lepe=3, axes=3),
        )
