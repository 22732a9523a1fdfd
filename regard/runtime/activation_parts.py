"""What activation patching takes from one run and gives to another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from regard.runtime.anatomy import Anatomy
from regard.runtime.call import Call
from regard.runtime.protocol import Edit, Lens, Wanted
from regard.runtime.row_patch import collect
from regard.runtime.run import Run
from regard.runtime.session import Session
from regard.runtime.site import Point, Site

STREAM = {"residual": "residual_pre", "attention": "attention", "mlp": "mlp"}


class Node(NamedTuple):
    """What one patch replaces: a tensor of a layer, or one head of it."""

    kind: str
    alias: str
    head: int | None = None

    @property
    def point(self) -> Point:
        return Point(STREAM[self.kind], self.alias)


@dataclass(frozen=True, eq=False)
class Source:
    """What the other run had, at all positions.

    Attributes:
        streams: (kind, alias) -> [N, T, D].
        heads: alias -> [N, H, T, Dv].
    """

    streams: Mapping[tuple[str, str], Tensor]
    heads: Mapping[str, Tensor]

    @classmethod
    def of(cls, root: nn.Module, sites: Sequence[Site], ids: Tensor, kinds: Iterable[str]) -> Source:
        """Run a side once, and keep what its nodes of some kinds are."""
        streams = [Node(kind, site.alias) for kind in kinds if kind in STREAM for site in sites]
        found = collect(root, {"input_ids": ids}, [node.point for node in streams]) if streams else {}
        heads: dict[str, Tensor] = {}
        with torch.no_grad(), Session(root, [HeadOutputs(kind=sites[0].kind)]) as session:
            root(input_ids=ids, use_cache=False)
        heads = session[HeadOutputs]
        return cls({(node.kind, node.alias): found[node.point] for node in streams}, heads)


@dataclass(frozen=True, eq=False)
class HeadOutputs(Lens):
    """Keeps the head outputs of every site of a kind, [N, H, T, Dv]."""

    kind: str

    def fresh(self) -> HeadOutputs:
        twin = super().fresh()
        object.__setattr__(twin, "found", {})
        assert isinstance(twin, HeadOutputs)
        return twin

    def wants(self, call: Call) -> Wanted | None:
        return Wanted() if call.site.kind == self.kind else None

    def head_outputs(self, call: Call) -> None:
        assert call.head_outputs is not None
        self.found[call.site.alias] = call.head_outputs.detach().clone()  # type: ignore[attr-defined]

    def result(self) -> dict[str, Tensor]:
        return dict(self.found)  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class GivenNodes(Edit):
    """Gives the g-th part of the batch what the g-th node was in the other run, at some positions.

    Attributes:
        nodes: one a part; all of one layer.
        source: the other run.
        positions: where, in its prompts.
        start: position of the first token that is fed.
    """

    nodes: Sequence[Node]
    source: Source
    positions: Sequence[int]
    start: int

    def wants(self, call: Call) -> Wanted | None:
        alias = call.site.alias
        return Wanted() if any(n.head is not None and n.alias == alias for n in self.nodes) else None

    def head_outputs(self, call: Call) -> Tensor:
        assert call.head_outputs is not None
        out = call.head_outputs.clone()
        fed = [p - self.start for p in self.positions]
        for part, node in zip(out.chunk(len(self.nodes)), self.nodes, strict=True):
            if node.head is not None and node.alias == call.site.alias:
                part[:, node.head, fed] = self.source.heads[node.alias][:, node.head, self.positions]
        return out

    def points(self, anatomy: Anatomy) -> Iterable[Point]:
        return dict.fromkeys(node.point for node in self.nodes if node.head is None)

    def hidden(self, point: Point, x: Tensor, run: Run) -> Tensor:
        out = x.clone()
        fed = [p - self.start for p in self.positions]
        for part, node in zip(out.chunk(len(self.nodes)), self.nodes, strict=True):
            if node.head is None and node.point == point:
                part[:, fed] = self.source.streams[node.kind, node.alias][:, self.positions]
        return out
