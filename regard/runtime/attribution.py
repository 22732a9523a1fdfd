"""What every head and MLP adds to a logit directly, with the final norm held as it was.

    x = embedding + sum_l (sum_h z_lh W_O,lh + b_l + mlp_l)      the residual stream at the position, [D]
    logit_j = sum_n  s (n - c(n)) g . u_j  +  b_norm . u_j  +  b_j      over the nodes n of that sum

with u_j the unembedding of token j, g the gain of the norm, c(n) the mean of n over the width (LayerNorm;
0 for RMSNorm), and s = (mean (x - c(x))^2 + eps)^-1/2 that of the unmodified run. All rows sum to the logits
up to rounding, which every call checks. Logits are those that the unembedding gives, before a soft-cap.

Source: the linear view of Elhage et al., 2021, "A Mathematical Framework for Transformer Circuits"; with the
scale of the norm held, Lieberum et al., 2023, arXiv 2307.09458, section 2. Status: paper only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from regard.errors import RegardError, ShapeMismatch, UnsupportedModel
from regard.runtime.anatomy import Anatomy, anatomy_of, require_attention, root_of
from regard.runtime.head_table import HeadTable
from regard.runtime.row_patch import collect
from regard.runtime.site import Point, Site

TOLERANCE = 2e-3


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A final norm as the linear map that it is at one input.

    Attributes:
        gain, bias: float64 [D].
        centred: whether it takes the mean out.
        scale: s of each sequence, float64 [B, 1].
    """

    gain: Tensor
    bias: Tensor
    centred: bool
    scale: Tensor

    def __call__(self, node: Tensor) -> Tensor:
        """Return what a node [B, D] becomes, without the bias."""
        node = node - node.mean(-1, keepdim=True) if self.centred else node
        return node * self.scale * self.gain


@dataclass(frozen=True, eq=False)
class LogitAttribution:
    """What each node adds to some logits.

    Attributes:
        heads: float64 [L, H, B, K], of the sites in `sites`; NaN beyond the heads that a site has.
        mlps: float64 [L, B, K], of the blocks in `blocks`.
        rest: name -> float64 [B, K]: `embedding`, `attention_bias`, `norm_bias`, `unembedding_bias`.
        logits: of the model, float32 [B, K].
        sites, blocks: aliases.
    """

    heads: Tensor
    mlps: Tensor
    rest: Mapping[str, Tensor]
    logits: Tensor
    sites: tuple[str, ...]
    blocks: tuple[str, ...]

    @property
    def total(self) -> Tensor:
        """The sum of all rows, float64 [B, K]: the logits, up to rounding."""
        return self.heads.nansum((0, 1)) + self.mlps.sum(0) + sum(self.rest.values())

    def net(self) -> LogitAttribution:
        """Return the effect on the first token minus the mean effect on the others, as one column.

        Raises:
            RegardError: where there is one token only.
        """
        if self.logits.shape[1] < 2:
            raise RegardError("a net effect needs two tokens at least: the right one and what it beats.")

        def one(x: Tensor) -> Tensor:
            return x[..., :1] - x[..., 1:].mean(-1, keepdim=True)

        rest = {name: one(x) for name, x in self.rest.items()}
        return LogitAttribution(
            one(self.heads), one(self.mlps), rest, one(self.logits), self.sites, self.blocks
        )

    def table(self, column: str = "direct") -> HeadTable:
        """Return the mean over prompts of each head's effect on the first token.

        Args:
            column: what to call it; take `net()` before for a logit difference.
        """
        mean = self.heads[..., 0].mean(2)
        values = {
            alias: {column: row[~row.isnan()].numpy()} for alias, row in zip(self.sites, mean, strict=True)
        }
        about = {"definition": "what a head adds to the logit directly, the final norm held"}
        return HeadTable.from_columns(values, about=about)

    def output_nodes(self, share: float = 0.8) -> list[tuple[str, int | None, float]]:
        """Return the fewest nodes whose positive effects make a share of all positive ones, largest first.

        Args:
            share: in (0, 1].

        Returns:
            (alias of the layer, head or None for its MLP, mean effect).
        """
        if not 0 < share <= 1:
            raise RegardError(f"share is {share}; it must be above 0 and at most 1.")
        nodes: list[tuple[str, int | None, float]] = []
        for alias, row in zip(self.sites, self.heads[..., 0].mean(2), strict=True):
            nodes += [(alias, h, float(x)) for h, x in enumerate(row) if x > 0]
        nodes += [
            (a, None, float(x)) for a, x in zip(self.blocks, self.mlps[..., 0].mean(1), strict=True) if x > 0
        ]
        nodes.sort(key=lambda node: -node[2])
        sums = np.cumsum([node[2] for node in nodes])
        wanted = int(np.searchsorted(sums, share * sums[-1] * (1 - 1e-12))) + 1 if len(nodes) else 0
        return nodes[:wanted]


def attribute_logits(
    model: nn.Module, inputs: Mapping[str, Any], tokens: Tensor, *, position: int = -1
) -> LogitAttribution:
    """Return what every head and MLP adds to the logits of some tokens at one position.

    Args:
        model: a causal language model whose blocks add to a residual stream.
        inputs: keyword arguments of its forward, batch B; not padded on the side of `position`.
        tokens: ids, int64 [K], or [B, K] for others for each sequence.
        position: whose logits; array index.

    Raises:
        UnsupportedModel: where the final norm or unembedding cannot be found or is not understood, and where
            what blocks add is not the sum of their heads and MLP.
        ShapeMismatch: for tokens of another shape.

    Example:
        >>> found = attribute_logits(model, inputs, torch.tensor([mary, john]))     # doctest: +SKIP
        >>> found.net().table().top("direct", 3)                                    # doctest: +SKIP
    """
    root = root_of(model)
    anatomy = anatomy_of(root)
    require_attention(anatomy)
    norm, unembedding = ends_of(anatomy)
    sites = [site for site in anatomy.sites if site.kind == anatomy.main]
    points = node_points(anatomy, sites, position)
    values = {point: x.double() for point, x in collect(root, inputs, points).items()}
    _check_shapes(root, values)
    at = {(p.kind, p.layer, p.head): x for p, x in values.items()}
    last = sites[-1].alias
    stream = at["residual", last, None]
    frozen = _frozen(norm, stream, at["final_norm", None, None])
    columns = _columns(unembedding, tokens, len(stream))

    def effect(node: Tensor) -> Tensor:
        return torch.einsum("bd,bdk->bk", frozen(node), columns)

    heads, attention_bias = _head_nodes(anatomy, sites, at)
    mlps = [at["mlp", site.alias, None] for site in sites]
    _check_sum(
        root, at["residual_pre", sites[0].alias, None] + sum(attention_bias) + sum(mlps) + _all(heads), stream
    )
    most = max(len(each) for each in heads)
    empty = torch.full((len(stream), columns.shape[2]), torch.nan, dtype=torch.float64)
    bias = _bias(unembedding, tokens, len(stream))
    found = LogitAttribution(
        torch.stack(
            [torch.stack([effect(x).cpu() for x in each] + [empty] * (most - len(each))) for each in heads]
        ),
        torch.stack([effect(x).cpu() for x in mlps]),
        {
            "embedding": effect(at["residual_pre", sites[0].alias, None]).cpu(),
            "attention_bias": effect(sum(attention_bias, torch.zeros_like(stream))).cpu(),
            "norm_bias": torch.einsum("d,bdk->bk", frozen.bias, columns).cpu(),
            "unembedding_bias": bias.cpu(),
        },
        at["logits", None, None].gather(1, _rows(tokens, len(stream)).to(stream.device)).float().cpu(),
        tuple(site.alias for site in sites),
        tuple(site.alias for site in sites),
    )
    _check_logits(root, found)
    return found


def node_points(anatomy: Anatomy, sites: list[Site], position: int) -> list[Point]:
    """Return the points that logits are made of at a position: heads, MLPs, stream and the rest."""
    points = [Point("residual_pre", sites[0].alias, position=position)]
    for site in sites:
        if site.heads is None:
            raise UnsupportedModel(f"{type(site.module).__name__} does not say how many heads it has.")
        points += [Point("head", site.alias, head, position) for head in range(site.heads)]
        points += [Point(kind, site.alias, position=position) for kind in ("attention", "mlp")]
    points.append(Point("residual", sites[-1].alias, position=position))
    return [*points, Point("final_norm", position=position), Point("logits", position=position)]


def ends_of(anatomy: Anatomy) -> tuple[nn.Module, nn.Module]:
    """Return the final norm and the unembedding.

    Raises:
        UnsupportedModel: where one of them cannot be found or read.
    """
    name = type(anatomy.root).__name__
    if anatomy.unembedding is None:
        raise UnsupportedModel(f"{name} has no unembedding, so nothing is added to a logit.")
    if anatomy.final_norm is None:
        raise UnsupportedModel(
            f"{name} has no final norm that regard can find, so logits cannot be taken apart."
        )
    if not isinstance(getattr(anatomy.unembedding, "weight", None), Tensor):
        raise UnsupportedModel(f"the unembedding of {name} has no weight that can be read (quantised?).")
    return anatomy.final_norm, anatomy.unembedding


def _check_shapes(root: nn.Module, values: Mapping[Point, Tensor]) -> None:
    batch = {len(x) for x in values.values()}
    if len(batch) > 1:
        raise UnsupportedModel(
            f"{type(root).__name__} joins sequences and positions inside its blocks, so no position can be "
            "told."
        )


def _frozen(norm: nn.Module, stream: Tensor, output: Tensor) -> FrozenNorm:
    """Read a norm's gain and bias off what it makes of known inputs, and hold its scale at `stream`."""
    weight = next(norm.parameters())
    width = stream.shape[-1]
    ones = torch.ones(width, device=weight.device, dtype=weight.dtype)
    signs = ones.clone()
    signs[1::2] = -1.0
    with torch.no_grad():
        bias, of_ones, of_signs = (norm(x[None])[0].double() for x in (torch.zeros_like(ones), ones, signs))
    eps = next(
        (float(getattr(norm, n)) for n in ("eps", "variance_epsilon", "norm_eps") if hasattr(norm, n)), 0.0
    )
    centred = bool((of_ones - bias).abs().max() < 1e-2 * (of_signs - bias).abs().max())
    gain = (of_signs - bias) * signs.double() * (1 + eps) ** 0.5
    spread = stream - stream.mean(-1, keepdim=True) if centred else stream
    scale = (spread.square().mean(-1, keepdim=True) + eps).rsqrt()
    found = FrozenNorm(gain, bias, centred, scale)
    close = 1e-3 * float(output.abs().max())
    if not torch.allclose(found(stream) + bias, output, rtol=1e-3, atol=close):
        raise UnsupportedModel(
            f"the final norm {type(norm).__name__} is neither a LayerNorm nor an RMSNorm, so it cannot be "
            "held."
        )
    return found


def _head_nodes(
    anatomy: Anatomy, sites: list[Site], at: Mapping[Any, Tensor]
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Return what each head writes, [B, D] each, and what the attention of each layer writes beside."""
    heads, beside = [], []
    for site in sites:
        weight = anatomy.output_weight(site).detach().double()  # [D, H, Dv]
        wrote = [at["head", site.alias, h] @ weight[:, h].T for h in range(weight.shape[1])]
        heads.append(wrote)
        beside.append(at["attention", site.alias, None] - sum(wrote))
    return heads, beside


def _all(heads: list[list[Tensor]]) -> Tensor:
    return torch.stack([x for each in heads for x in each]).sum(0)


def _check_sum(root: nn.Module, made: Tensor, stream: Tensor) -> None:
    off = float((made - stream).abs().max() / stream.abs().max())
    if not off < TOLERANCE:
        raise UnsupportedModel(
            f"The blocks of {type(root).__name__} add something else than their heads and MLP (norms or "
            f"scales on the branches; off by {off:.1%}), so its logits cannot be taken apart."
        )


def _check_logits(root: nn.Module, found: LogitAttribution) -> None:
    off = float((found.total - found.logits).abs().max())
    if not off < TOLERANCE * max(1.0, float(found.logits.abs().max())):
        raise UnsupportedModel(
            f"the parts of {type(root).__name__} sum to logits that are off by {off:.2g}: it scales or "
            "caps them."
        )


def _rows(tokens: Tensor, batch: int) -> Tensor:
    if tokens.ndim not in (1, 2) or (tokens.ndim == 2 and len(tokens) != batch):
        raise ShapeMismatch(f"tokens are {list(tokens.shape)}; they must be [K] or [{batch}, K].")
    return tokens if tokens.ndim == 2 else tokens.expand(batch, -1)


def _columns(unembedding: nn.Module, tokens: Tensor, batch: int) -> Tensor:
    """The unembedding of each token, float64 [B, D, K]."""
    weight = cast(Tensor, unembedding.weight).detach()
    rows = _rows(tokens, batch).to(weight.device)
    if int(rows.min()) < 0 or int(rows.max()) >= len(weight):
        raise RegardError(f"tokens has an id that logits over {len(weight)} tokens do not have.")
    return weight[rows].double().transpose(1, 2)


def _bias(unembedding: nn.Module, tokens: Tensor, batch: int) -> Tensor:
    bias = getattr(unembedding, "bias", None)
    rows = _rows(tokens, batch)
    if not isinstance(bias, Tensor):
        return torch.zeros(rows.shape, dtype=torch.float64)
    return bias.detach()[rows.to(bias.device)].double()
