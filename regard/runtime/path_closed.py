"""Path patching without a run of the layers between: with all heads and MLPs held, a path is a sum.

    d        = (z_corrupt - z_clean) W_O of the sender, or the change of its MLP's output         [N, D]
    logits   = unembed(final_norm(x + d))                       x: the clean stream after the last block
    q, k, v  = proj(norm(x_l + d)) of a receiver in layer l     x_l: the clean stream entering it

The norms are those of x + d, not held. Against the same path with held MLPs the result is exact; where MLPs
follow, it is that part of the effect that no MLP carries. Blocks that put a norm or a scale on what they add
have no such form, which is tried out on one head and refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regard.errors import RegardError, UnsupportedModel
from regard.runtime.anatomy import Anatomy
from regard.runtime.attribution import ends_of
from regard.runtime.path_stages import Held, Sender
from regard.runtime.protocol import Edit
from regard.runtime.recorded import tile
from regard.runtime.run import Run
from regard.runtime.site import Point, Site

OFF = 0.02


@dataclass(frozen=True, eq=False)
class GivenStream(Edit):
    """Gives a block the stream that it enters with, [B, 1, D]."""

    alias: str
    stream: Tensor

    def points(self, anatomy: Anatomy) -> Iterable[Point]:
        return [Point("residual_pre", self.alias)]

    def hidden(self, point: Point, x: Tensor, run: Run) -> Tensor:
        return self.stream.to(x.dtype)


class Streams:
    """The clean residual stream at the position, and what each sender would add to it.

    Args:
        points: what the clean run was at the position, with `residual_pre` of all blocks and `residual` of
            the last, [N, D] each.
    """

    def __init__(
        self, anatomy: Anatomy, sites: Sequence[Site], held: Held, points: Mapping[Point, Tensor]
    ) -> None:
        self.anatomy, self.held = anatomy, held
        self.sites = {site.alias: site for site in sites}
        self.entering = {str(p.layer): x for p, x in points.items() if p.kind == "residual_pre"}
        self.leaving = next(x for p, x in points.items() if p.kind == "residual")

    def added(self, sender: Sender) -> Tensor:
        """Return d of a sender, [N, D]."""
        alias, head = sender
        if head is None:
            return self.held.corrupt_mlps[alias] - self.held.clean_mlps[alias]
        weight = self.anatomy.output_weight(self.sites[alias], self.held.heads(alias))[:, head].detach()
        return (self.held.corrupt[alias][:, head] - self.held.clean[alias][:, head]) @ weight.T

    def given(self, alias: str, senders: Sequence[Sender]) -> GivenStream:
        """Return the edit that lets a receiver's block see the g-th sender in the g-th part of the batch."""
        added = torch.cat([self.added(sender) for sender in senders])
        return GivenStream(alias, (tile(self.entering[alias], len(senders)) + added)[:, None])

    def logits(self, senders: Sequence[Sender], tokens: Tensor | None) -> Tensor:
        """Return the logits of each sender, [G * N, V]; NaN but for `tokens`, where these are given."""
        norm, unembedding = ends_of(self.anatomy)
        added = torch.cat([self.added(sender) for sender in senders])
        with torch.no_grad():
            final = norm(tile(self.leaving, len(senders)) + added)
            if tokens is None:
                whole: Tensor = unembedding(final)
                return whole
            weight, bias = unembedding.weight, getattr(unembedding, "bias", None)
            if int(tokens.min()) < 0 or int(tokens.max()) >= len(weight):  # type: ignore[arg-type]
                raise RegardError(f"tokens has an id that logits over {len(weight)} tokens do not have.")  # type: ignore[arg-type]
            found = final @ weight[tokens].T  # type: ignore[index]
            found = found if bias is None else found + bias[tokens]
            out = torch.full((len(final), len(weight)), torch.nan, dtype=found.dtype)  # type: ignore[arg-type]
            out[:, tokens] = found
            return out


def require_sum(root: nn.Module, before: Tensor, ran: Tensor, closed: Tensor) -> None:
    """Refuse a model in which the closed form of one head is not what a run gives.

    Args:
        before: what there is without a change; NaN is not compared.
        ran, closed: what there is with it.

    Raises:
        UnsupportedModel: where they differ by more than 2 % of the change.
    """
    off, change = ((x - y).nan_to_num(0.0).abs().max() for x, y in ((ran, closed), (ran, before)))
    if not float(off) <= OFF * float(change) + 1e-6 * float(before.nan_to_num(0.0).abs().max()):
        raise UnsupportedModel(
            f"The blocks of {type(root).__name__} add something else than their heads and MLP, or its logits "
            "are scaled or capped, so that effects have no closed form; use exact=True."
        )
