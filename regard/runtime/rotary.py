"""Queries and keys before rotary positions, from those after: the model's own rotation, turned back.

    R(p)^-1 x = R(-p) x / a^2        with R(p) x = a (x cos + half(x) sin) as the model's file computes it

`a` is the factor that some long-context variants put on cos and sin. Positions that are not rotary leave
queries and keys as they are. Status: our choice; agrees with what the projections give.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import UnsupportedModel
from regard.runtime.anatomy import Anatomy
from regard.runtime.call import Call
from regard.runtime.site import Site

NAMES = ("rope_theta", "rope_parameters", "rotary_dim", "rotary_pct")


class Rotary:
    """The rotation of a model's queries and keys.

    Args:
        anatomy: of the model.

    Raises:
        UnsupportedModel: where positions are rotary in a way that is not understood.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self.name = type(anatomy.root).__name__
        self.angles = _angles(anatomy.root)
        config = getattr(anatomy.root, "config", None)
        if self.angles is None and any(getattr(config, name, None) is not None for name in NAMES):
            raise UnsupportedModel(
                f"{self.name} has rotary positions, and no part that gives their angles could be found, so "
                "queries and keys before them cannot be told."
            )

    def turned(self, call: Call, x: Tensor, at: Tensor, *, back: bool = False) -> Tensor:
        """Return vectors of a call as they are after rotation, or with `back` as they were before.

        Args:
            x: [B, n, D], of any heads.
            at: whose positions they are of, array indices [B, n].

        Raises:
            UnsupportedModel: for a model that runs with a cache here, or rotates otherwise.
        """
        if self.angles is None:
            return x
        given = call.extra.get("position_ids")
        if given is None:
            given = torch.arange(call.query_length, device=x.device)[None] + call.q_offset
        positions = given.expand(len(x), -1).to(at.device).gather(1, at)
        cos, sin = self.angles(x, positions.to(x.device))  # [B, n, R]
        if back:
            square = cos.square() + sin.square()
            cos, sin = cos / square, -sin / square
        rotate, width = self._rotate(call.site), cos.shape[-1]
        turned = rotate(x[:, None, :, :width], x[:, None, :, :width], cos, sin)[0][:, 0]
        return torch.cat([turned, x[..., width:]], -1)

    def _rotate(self, site: Site) -> Callable[..., Any]:
        found = getattr(sys.modules[type(site.module).__module__], "apply_rotary_pos_emb", None)
        if found is None:
            raise UnsupportedModel(
                f"{type(site.module).__name__} rotates queries and keys in a way that regard does not know."
            )
        return found


def _angles(root: nn.Module) -> nn.Module | None:
    """The module that gives cos and sin of positions; None where there is none.

    Raises:
        UnsupportedModel: where it wants more than positions, such as the kind of layer.
    """
    every = [m for m in root.modules() if "RotaryEmbedding" in type(m).__name__]
    if not every:
        return None
    wanted = [
        p
        for p in inspect.signature(every[0].forward).parameters.values()
        if p.default is inspect.Parameter.empty
    ]
    if len(wanted) != 2 or len({type(m) for m in every}) > 1:
        raise UnsupportedModel(
            f"{type(root).__name__} has several kinds of rotary positions, so queries and keys before them "
            "cannot be told."
        )
    return every[0]
