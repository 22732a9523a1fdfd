"""What a lens or an edit is: a few optional methods that the runtime calls at the stages of attention."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from regard.runtime.tally import Tally

if TYPE_CHECKING:
    from regard.runtime.anatomy import Anatomy
    from regard.runtime.call import Call
    from regard.runtime.findings import Finding
    from regard.runtime.site import Point


@dataclass(frozen=True)
class Wanted:
    """What a lens or edit asks of one attention call.

    Attributes:
        heads: the query heads it needs, or None for all of them.
        rows: the query range `(start, stop)` it needs, as array indices of this call, or None for all.
    """

    heads: Sequence[int] | None = None
    rows: tuple[int, int] | None = None


EVERYTHING = Wanted()


class Stage:
    """Base of `Lens` and `Edit`: every method below is optional, and is only called where defined.

        wants(call) -> None | Wanted           which calls, heads and rows; default: everything. An edit
                                               that is meant for a call and idle this time wants no heads
        points(anatomy) -> iterable of Point   which points `hidden` is called at; default: none
        prepare(run, kwargs)                   before each forward of the model; may change `kwargs`
        inputs(call)                           call.q, call.k, call.v are set
        scores(block)                          block.scores are set, scaled and masked, before softmax
        weights(block)                         block.weights are set
        head_outputs(call)                     call.head_outputs are set, [B, H, T, Dv]
        hidden(point, x, run)                  at the points asked for
        plane(plane)                           a lens, before a block on a plane runs; see `planes`
        end_call(call)                         after an attention call
        step(run, tokens)                      after each generated token; tokens [B]

    A lens' methods return nothing. An edit's `inputs` returns (q, k, v), `scores`, `weights`,
    `head_outputs` and `hidden` return the new tensor; None leaves it as it was. Keys and values may come
    back one for each query head, as `call.expand()` gives them.
    """

    def wants(self, call: Call) -> Wanted | None:
        return EVERYTHING

    def points(self, anatomy: Anatomy) -> Iterable[Point]:
        return ()


STAGE_METHODS = (
    "prepare",
    "inputs",
    "scores",
    "weights",
    "head_outputs",
    "hidden",
    "plane",
    "end_call",
    "step",
)


def asked(stage: Stage, call: Call) -> Wanted | None:
    """Return what `stage` wants of `call`; nothing at sites that its session keeps from it."""
    only = getattr(stage, "only", None)
    return stage.wants(call) if only is None or call.site.alias in only else None


def defines(stage: Stage, method: str) -> bool:
    """Whether a lens or edit has the optional `method`."""
    return callable(getattr(stage, method, None))


@dataclass(frozen=True, kw_only=True, eq=False)
class Lens(Stage):
    """Reads a stage. Options are the fields of the subclass; what was seen is kept in `tally`.

    Attributes:
        name: under which a session keeps the result; needed where two lenses of one class are used.
        before: read what arrived, before all edits, rather than what the model uses.
        only: aliases of the sites that the session lets it see; None for all.
    """

    name: str | None = None
    before: bool = False
    tally: Tally = field(default_factory=Tally, init=False, repr=False)
    only: frozenset[str] | None = field(default=None, init=False, repr=False)

    def fresh(self) -> Lens:
        """Return a copy with the same options that has seen nothing."""
        twin = copy.copy(self)
        object.__setattr__(twin, "tally", Tally())
        return twin

    def merge(self, other: Lens) -> None:
        """Add what `other`, a lens of the same class and options, has seen."""
        self.tally.merge(other.tally)

    def result(self) -> Any:
        """Return what was seen so far; raises `NothingObserved` where nothing was."""
        raise NotImplementedError(f"{type(self).__name__} has no result()")

    @classmethod
    def findings(cls, result: Any) -> tuple[Finding, ...]:
        """Return what a person would say of a result, each with its control; default nothing."""
        return ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit(Stage):
    """Changes a stage, and returns the new value.

    Besides the methods of `Stage` an edit may define:

        survey(block)            a read-only pass over weights as the edits before it left them, made
                                 over the whole call before any of its own changes
        surveys(call)            whether it needs that pass for this call; default yes
        hooks(anatomy)           pairs of a module that no point stands for, such as a router, and
                                 `hook(output, run)`, which returns what it is to give, or None
        attend(call, inner)      the whole call at once; returns head outputs [B, H, T, Dv];
                                 `inner(call)` computes what would have happened, any number of times
        named(anatomy)           aliases of the sites that it names. A session in which one of them was
                                 never called, or nothing that the edit wants, ends in `NothingObserved`
    """


Inner = Callable[["Call"], torch.Tensor]
__all__ = ["EVERYTHING", "STAGE_METHODS", "Edit", "Inner", "Lens", "Stage", "Wanted", "defines"]
