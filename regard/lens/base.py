"""What lenses share: means over rows, quantities that need a whole sequence, and their tables."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from regard.engines.rows import RowBlock
from regard.errors import NothingObserved, RegardError
from regard.runtime.call import Call
from regard.runtime.head_table import HeadTable
from regard.runtime.protocol import Lens
from regard.runtime.run import Run
from regard.runtime.tally import Tally

Kind = TypeVar("Kind", bound=HeadTable)
MAIN_KINDS = ("text", "decoder", "encoder", "image", "vision")


class Place(Protocol):
    """A `Site`, or anything else with its alias, that numbers can be kept for."""

    @property
    def alias(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def layer(self) -> int: ...
    @property
    def name(self) -> str: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Measure(Lens):
    """A lens that says in a few words what it measures, whose idea that was, and what it needs."""

    definition: ClassVar[str] = ""
    source: ClassVar[str] = ""
    needs: ClassVar[str] = "no attention was opened"


@dataclass(frozen=True, kw_only=True, eq=False)
class RowMeans(Measure):
    """A lens whose columns are sums over rows, divided by how many rows they were taken over.

    A row counts once, whichever sequence, forward or decoding step it is of. Under beam search every
    row computed counts, also of a beam that is dropped later.
    """

    columns: ClassVar[tuple[str, ...]] = ()

    def measure(self, block: RowBlock) -> Any:
        """Return what is needed of a block; its tensors must not be views of the block's own."""
        raise NotImplementedError

    def total(self, call: Call, parts: list[Any]) -> tuple[Tensor, Tensor]:
        """Return sums [columns, H] over the rows of a call, and their counts [columns, 1 or H].

        Args:
            parts: what `measure` returned for each of its blocks.
        """
        raise NotImplementedError

    def weights(self, block: RowBlock) -> None:
        block.run.state(self, block.site).setdefault("parts", []).append(self.measure(block))

    def end_call(self, call: Call) -> None:
        parts = call.run.state(self, call.site).pop("parts", None)
        if parts:
            total, count = self.total(call, parts)
            self.tally.mean(call.site, "columns", total, count.cpu())

    def result(self) -> HeadTable:
        """Return one row a head, with the columns that the class lists.

        Raises:
            NothingObserved: where no call was seen that this lens applies to.
        """
        found = self.tally.get("columns")
        values = {alias: dict(zip(self.columns, x, strict=True)) for alias, x in found.items()}
        return head_table(HeadTable, self, values)


class Record(NamedTuple):
    """The state that a lens keeps for one place in a run that may go on."""

    run: weakref.ref[Run]
    place: Place
    state: dict[str, Any]


class SequenceTally(Tally):
    """A tally that also counts the sequences still open: those of a run that may go on.

    A run ends when nobody can continue it. Until then its state is kept aside, and every reading is
    made as if it had ended now.

    Args:
        fold: `fold(tally, place, state)` turns the state of a run that has ended into numbers.
    """

    def __init__(self, fold: Callable[[Tally, Place, dict[str, Any]], None]) -> None:
        super().__init__()
        self.fold = fold
        self.records: list[Record] = []

    def open(self, run: Run, place: Place, state: dict[str, Any]) -> None:
        """Keep the state of a run at a place; `run` itself is not kept alive."""
        if not self.records or self.records[-1].run() is not run:
            self.close()
        self.records.append(Record(weakref.ref(run), place, state))

    def close(self, everything: bool = False) -> None:
        """Fold the runs that have ended, or all of them; what goes on after that begins anew."""
        ended = [r for r in self.records if everything or r.run() is None]
        self.records = [r for r in self.records if not everything and r.run() is not None]
        for record in ended:
            self.fold(self, record.place, record.state)
            record.state.clear()

    def settled(self) -> Tally:
        """Return a plain tally of everything seen so far, open runs as they stand now."""
        tally = Tally()
        Tally.merge(tally, self)
        for record in self.records:
            self.fold(tally, record.place, record.state)
        return tally

    def merge(self, other: Tally) -> None:
        """Add everything that `other` has seen, after everything this has."""
        self.close(everything=True)
        super().merge(other.settled() if isinstance(other, SequenceTally) else other)

    def get(self, name: str) -> dict[str, Any]:
        return self.settled().get(name)

    def count(self, name: str) -> dict[str, Tensor]:
        return self.settled().count(name)

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.settled().export()

    def __bool__(self) -> bool:
        return bool(self.aliases or self.records)


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceLens(Measure):
    """A lens whose numbers are taken from whole sequences, `generate()` included.

    Per-sequence state is kept in the run, where it follows the beams: a beam counts with the rows it
    was continued from, and a beam that was dropped does not count.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "tally", SequenceTally(self.fold))

    def fresh(self) -> Lens:
        twin = super().fresh()
        object.__setattr__(twin, "tally", SequenceTally(twin.fold))  # type: ignore[attr-defined]
        return twin

    def fold(self, tally: Tally, place: Place, state: dict[str, Any]) -> None:
        """Add to `tally` what `state` says of sequences that have ended; `state` is left as it is."""
        raise NotImplementedError

    def state(self, run: Run, place: Place, part: int = 0) -> dict[str, Any]:
        """Return the state of this lens for a place in a run; what is kept in it is folded at the end."""
        state = run.state(self, place, part)
        if not state:
            state["open"] = True
            self.tally.open(run, place, state)  # type: ignore[attr-defined]
        return state


def head_table(
    kind: type[Kind],
    lens: Measure,
    values: dict[str, dict[str, Any]],
    about: Mapping[str, Any] | None = None,
) -> Kind:
    """Build the table of a lens' result from `{alias: {column: [H]}}`.

    Args:
        about: what else the table should say of itself, plain JSON values.

    Raises:
        NothingObserved: where there is nothing; the message says what the lens needs.
    """
    if not values:
        raise NothingObserved(f"{type(lens).__name__} has seen nothing: {lens.needs}.")
    kinds = {alias.rpartition(".")[0] for alias in values}
    main = next((k for k in MAIN_KINDS if k in kinds), None)
    said = {
        "lens": lens.name or type(lens).__name__,
        "definition": lens.definition,
        "source": lens.source,
        "main": main,
    }
    return cast(Kind, kind.from_columns(values, about={**said, **(about or {})}))


def accumulate(state: dict[str, Any], name: str, value: Tensor) -> None:
    """Add `value` to `state[name]`, which may become it: it must not be changed later."""
    state[name] = state[name] + value if name in state else value


def check_position(position: int) -> None:
    """Refuse what is no position counted from the first real token.

    Raises:
        RegardError: naming it.
    """
    if isinstance(position, bool) or not isinstance(position, int) or position < 0:
        raise RegardError(f"position is {position!r}; it is counted from the first real token, 0.")


def first_real(call: Call) -> Tensor:
    """Return the array index of each sequence's first real key of this call, int64 [B]."""
    if call.valid_keys is not None and call.pad_left is None:
        return call.valid_keys.int().argmax(1)
    if call.pad_left is None:
        return torch.zeros(call.q.shape[0], dtype=torch.long, device=call.q.device)
    return call.pad_left.to(torch.long)


def room(state: dict[str, Any], name: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """Return `state[name]`, zeros at first, with room for `shape[-1]` along its last dimension.

    It grows by half when it is full, so that decoding does not copy it at every step.
    """
    old: Tensor | None = state.get(name)
    if old is None:
        state[name] = like.new_zeros(*shape)
    elif old.shape[-1] < shape[-1]:
        wider = max(shape[-1], old.shape[-1] * 3 // 2)
        state[name] = torch.cat([old, old.new_zeros(*old.shape[:-1], wider - old.shape[-1])], -1)
    return state[name]
