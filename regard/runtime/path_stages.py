"""What path patching holds, keeps and gives: the edits and lenses of its two forwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from regard.runtime.anatomy import Anatomy
from regard.runtime.call import Call
from regard.runtime.protocol import Edit, Lens, Wanted
from regard.runtime.run import Run
from regard.runtime.site import Point

Component = Literal["query", "key", "value"]
COMPONENTS = ("query", "key", "value")
Sender = tuple[str, int | None]


@dataclass(frozen=True, eq=False)
class Held:
    """What heads and MLPs gave at the position: [N, H, Dv] and [N, D], of the clean and the corrupt side."""

    clean: Mapping[str, Tensor]
    corrupt: Mapping[str, Tensor]
    clean_mlps: Mapping[str, Tensor]
    corrupt_mlps: Mapping[str, Tensor]

    def heads(self, alias: str) -> int:
        return self.clean[alias].shape[1]


@dataclass(frozen=True, eq=False)
class Outputs(Lens):
    """Keeps the head outputs of one position, of every site of a kind."""

    kind: str
    at: int

    def fresh(self) -> Outputs:
        twin = super().fresh()
        object.__setattr__(twin, "found", {})
        assert isinstance(twin, Outputs)
        return twin

    def wants(self, call: Call) -> Wanted | None:
        return Wanted() if call.site.kind == self.kind else None

    def head_outputs(self, call: Call) -> None:
        assert call.head_outputs is not None
        self.found[call.site.alias] = call.head_outputs[:, :, self.at].detach().clone()  # type: ignore[attr-defined]

    def result(self) -> dict[str, Tensor]:
        return dict(self.found)  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class FrozenParts(Edit):
    """Gives all heads (and MLPs) of some layers what they gave, but for the sender of each part of the batch.

    Attributes:
        held: what they gave.
        layers: aliases of those that are run.
        senders: of each part of the batch, (alias, head or None for the MLP).
        mlps: whether MLPs are held.
    """

    held: Held
    layers: frozenset[str]
    senders: Sequence[tuple[str, int | None]]
    mlps: bool

    def wants(self, call: Call) -> Wanted | None:
        return Wanted() if call.site.alias in self.layers else None

    def head_outputs(self, call: Call) -> Tensor:
        alias = call.site.alias
        out = torch.cat([self.held.clean[alias]] * len(self.senders))
        parts = out.chunk(len(self.senders))
        for part, (layer, head) in zip(parts, self.senders, strict=True):
            if layer == alias and head is not None:
                part[:, head] = self.held.corrupt[alias][:, head]
        return out[:, :, None]

    def points(self, anatomy: Anatomy) -> Iterable[Point]:
        sending = {layer for layer, head in self.senders if head is None}
        return [Point("mlp", alias) for alias in self.layers if self.mlps or alias in sending]

    def hidden(self, point: Point, x: Tensor, run: Run) -> Tensor:
        alias = str(point.layer)
        clean = self.held.clean_mlps[alias]
        out = torch.cat([clean] * len(self.senders))[:, None] if self.mlps else x.clone()
        for part, (layer, head) in zip(out.chunk(len(self.senders)), self.senders, strict=True):
            if layer == alias and head is None:
                part[:] = self.held.corrupt_mlps[alias][:, None]
        return out


@dataclass(frozen=True, eq=False)
class Received:
    """The receivers by layer, and which of their inputs."""

    heads: Mapping[str, list[int]]
    component: Component

    @property
    def index(self) -> int:
        return COMPONENTS.index(self.component)

    def of(self, call: Call) -> Tensor:
        return (call.q, call.k, call.v)[self.index]

    def own(self, call: Call) -> list[int]:
        """The heads of the component: query heads, or the key heads that they share."""
        group = call.q.shape[1] // self.of(call).shape[1]
        return sorted({head // group for head in self.heads[call.site.alias]})


class Enough(Exception):
    """All receivers have been met, so that the rest of a forward need not run."""


@dataclass(frozen=True, eq=False)
class KeptInputs(Lens):
    """Keeps what the receivers compute, [B, heads, D], and ends the forward at the last of them.

    Attributes:
        received: the receivers.
        last: alias of the last layer among them.
    """

    received: Received
    last: str

    def fresh(self) -> KeptInputs:
        twin = super().fresh()
        object.__setattr__(twin, "found", {})
        assert isinstance(twin, KeptInputs)
        return twin

    def wants(self, call: Call) -> Wanted | None:
        return Wanted() if call.site.alias in self.received.heads else None

    def inputs(self, call: Call) -> None:
        x = self.received.of(call)[:, self.received.own(call), -1]
        self.found[call.site.alias] = x.detach().clone()  # type: ignore[attr-defined]
        if call.site.alias == self.last:
            raise Enough

    def result(self) -> dict[str, Tensor]:
        return dict(self.found)  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class GivenInputs(Edit):
    """Gives the receivers what was kept, at the first of the new positions."""

    received: Received
    values: Mapping[str, Tensor] = field(default_factory=dict)

    def wants(self, call: Call) -> Wanted | None:
        return Wanted() if call.site.alias in self.values else None

    def inputs(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        parts = [call.q, call.k, call.v]
        x = parts[self.received.index].clone()
        x[:, self.received.own(call), x.shape[2] - call.q.shape[2]] = self.values[call.site.alias].to(x.dtype)
        parts[self.received.index] = x
        return parts[0], parts[1], parts[2]
