"""What a study is made of: named steps, quantities measured from their results, claims, a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from regard.errors import RegardError
from regard.studies.claims import Claim, Quantity, check_claims

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """A piece of work whose result is kept, so that a study that was stopped goes on after it.

    Attributes:
        name: unique in the study, such as `seed 0` or `random tokens, seed 3`.
        work: returns plain numbers, strings, lists and dicts. It may use the study's `size`, `seed` and
            what `prepare` made, and nothing of other steps. torch's generator is seeded before it from
            the study's seed and the step's name.
        cost: how long it takes, relative to the others; for the progress bar.
    """

    name: str
    work: Callable[[], Any]
    cost: float = 1.0


class Study:
    """One paper's claim, run small. A subclass gives the class attributes and four methods.

    Attributes:
        slug: the system's name; the decorator sets it.
        title: the paper's title.
        paper: authors, year, arXiv id.
        quantities: what is measured.
        claims: what is to come out, and the rules that decide it.
        full: a frozen dataclass of sizes, for the run that counts.
        quick: another of the same class, for seconds; its outcome is marked.
        size: the one of the two that this run uses.
        seed: a whole number that all chance is derived from.

    Import torch and regard's lenses, models and mechanisms inside methods, not at the top of the file.
    """

    slug: ClassVar[str] = ""
    title: ClassVar[str]
    paper: ClassVar[str]
    quantities: ClassVar[Sequence[Quantity]]
    claims: ClassVar[Sequence[Claim]]
    full: ClassVar[Any]
    quick: ClassVar[Any]

    def __init__(self, size: Any, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.tick: Callable[[float], None] = lambda share: None

    def prepare(self) -> None:
        """Make what steps share, such as a model; called once, before the first step that has to run.

        A long step may call `self.tick(share)` as it goes on, for the progress bar.
        """

    def steps(self) -> Iterable[Step]:
        """Return the steps, in order."""
        raise NotImplementedError

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        """Return the values of every quantity, from the results of the steps by name."""
        raise NotImplementedError

    def details(self, results: Results) -> dict[str, Any]:
        """Return what else belongs in the outcome, plain values: what the picture needs, remarks."""
        return {}

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        """Draw the outcome on an empty figure."""
        raise NotImplementedError


def by_name(quantities: Sequence[Quantity]) -> dict[str, Quantity]:
    """Return quantities, name -> quantity."""
    return {quantity.name: quantity for quantity in quantities}


JUDGING = ("title", "paper", "quantities", "claims", "full", "quick", "measure", "details", "draw")


def check_study(kind: type[Study]) -> None:
    """Refuse a study that lacks a part, or whose claims cannot be tested.

    Raises:
        RegardError: naming the study and the part.
    """
    missing = [name for name in ("title", "paper", "quantities", "claims", "full", "quick") if
               not hasattr(kind, name)]  # fmt: skip
    missing += [name for name in ("steps", "measure", "draw") if getattr(kind, name) is getattr(Study, name)]
    if missing:
        raise RegardError(f"study {kind.slug!r} has no {', '.join(missing)}.")
    sizes = (kind.full, kind.quick)
    if not all(dataclasses.is_dataclass(s) and not isinstance(s, type) for s in sizes) or type(
        kind.full
    ) is not type(kind.quick):
        raise RegardError(f"study {kind.slug!r}: full and quick must be two of one dataclass.")
    named = by_name(kind.quantities)
    try:
        if len(named) < len(kind.quantities):
            raise RegardError(f"two quantities have one name; they are {', '.join(named)}.")
        check_claims(kind.claims, named)
    except RegardError as error:
        raise RegardError(f"study {kind.slug!r}: {error}") from None
