"""A ranked list of heads that knows which model it is of: found once, saved, and used to steer.

rank correlation    Spearman's, of the scores on two sets of prompts that share none
shared              of the leading heads on each, how many are the same, beside what chance gives
chance              what the score would be of a head that does nothing in particular
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regard.errors import RegardError
from regard.runtime.head_statistics import Overlap
from regard.runtime.head_table import Head, HeadTable
from regard.runtime.model_identity import check_same
from regard.runtime.panels import TablePanel
from regard.runtime.table import Table

if TYPE_CHECKING:
    from regard.runtime.anatomy import Anatomy

SCORE, FIRST, SECOND = "score", "first", "second"
OUTSIDE = 100
TOP = 10


@dataclass(frozen=True, eq=False)
class HeadList(Sequence[Head]):
    """The leading heads of a table, best first, as `(alias, head)`.

    It stands wherever an edit takes heads, and is refused there for another model.

    Attributes:
        table: all heads: `score`; `first` and `second`, the same on the two sets of prompts.
        leading: how many lead.
        about: `kind`, `model` (what `identify` says), `chance` and what else is to be said; plain JSON.

    Example:
        >>> with regard.steer(model, ScaleHeads(heads=HeadList.load("retrieval.json").top(5))):
        ...     model(ids)                                                      # doctest: +SKIP
    """

    table: HeadTable
    leading: int = TOP

    def __post_init__(self) -> None:
        if SCORE not in self.table.columns or "model" not in self.table.about:
            raise RegardError(
                "a list of heads has a column `score`, and says in `about` whose heads they are."
            )
        seen = int(np.isfinite(self.table[SCORE]).sum())
        if isinstance(self.leading, bool) or not 1 <= self.leading <= seen:
            raise RegardError(f"{self.leading} heads were asked for, and {seen} have a score.")

    @property
    def about(self) -> dict[str, Any]:
        return dict(self.table.about)

    @property
    def ranked(self) -> list[tuple[str, int, float]]:
        """The leading heads with their scores, best first."""
        return self.table.top(SCORE, self.leading)

    def __len__(self) -> int:
        return self.leading

    def __getitem__(self, index: Any) -> Any:
        return [(site, head) for site, head, _ in self.ranked][index]

    def __iter__(self) -> Iterator[Head]:
        return iter([(site, head) for site, head, _ in self.ranked])

    @property
    def correlation(self) -> float:
        """Rank correlation of the scores on the two sets of prompts; NaN where there were not two."""
        if not {FIRST, SECOND} <= set(self.table.columns):
            return math.nan
        both = np.isfinite(self.table[FIRST] + self.table[SECOND])
        if both.sum() < 2:
            return math.nan
        return self.table.rank_correlation(self.table, FIRST, other_column=SECOND)

    @property
    def shared(self) -> Overlap | None:
        """How many of the leading heads the two sets of prompts share; None where there were not two."""
        if not {FIRST, SECOND} <= set(self.table.columns):
            return None
        both = np.isfinite(self.table[FIRST] + self.table[SECOND])
        if both.sum() < self.leading:
            return None
        return self.table.overlap(self.table, FIRST, self.leading, other_column=SECOND)

    def top(self, k: int) -> HeadList:
        """Return the k leading heads.

        Raises:
            RegardError: where there are not so many.
        """
        return replace(self, leading=k)

    def control(self, seed: int = 0, *, outside: int = OUTSIDE) -> list[Head]:
        """Return as many heads, drawn at random from those that do not lead.

        Args:
            outside: how many leading heads are never drawn; fewer where that would leave less than three
                times as many as are needed.

        Raises:
            RegardError: where the table has not twice as many heads.
        """
        names = [(site, head) for site, head, _ in self.table.top(SCORE, len(self.table))]
        barred = max(self.leading, min(outside, len(names) - 3 * self.leading))
        if len(names) - barred < self.leading:
            raise RegardError(
                f"{self.leading} control heads are needed, and {len(names)} heads have a score."
            )
        return sorted(random.Random(seed).sample(names[barred:], self.leading))

    def check(self, anatomy: Anatomy) -> None:
        """Refuse a model that these heads are not of.

        Raises:
            RegardError: naming both models.
        """
        check_same(self.table.about["model"], anatomy, f"this list of {self.about.get('kind', 'some')} heads")

    def save(self, path: str | Path) -> None:
        """Write everything as JSON, whole or not at all."""
        replace(self.table, about={**self.table.about, "count": self.leading}).save(path)

    @classmethod
    def load(cls, path: str | Path) -> HeadList:
        """Read what `save` wrote.

        Raises:
            RegardError: where the file is missing, or holds no list of heads.
        """
        table = HeadTable.load(path)
        if SCORE not in table.columns or not {"model", "count"} <= set(table.about):
            raise RegardError(f"{path} holds a table of heads and no list; `regard heads --save` writes one.")
        about = dict(table.about)
        count = about.pop("count")
        return cls(replace(table, about=about), int(count))

    def __repr__(self) -> str:
        some = ", ".join(f"{site} {head}" for site, head in self[:3]) + ", ..." * (self.leading > 3)
        return f"HeadList({self.leading} of {len(self.table)} heads: {some})"


def list_panel(heads: HeadList, columns: Sequence[str] = ()) -> TablePanel:
    """Return a list as a table for a page, each row opening its head.

    Args:
        columns: shown beside the score.
    """
    rows = [heads.table.at(*head) for head in heads]
    names = {"site": [site for site, _ in heads], "head": [head for _, head in heads]}
    values = {name: [row[name] for row in rows] for name in (SCORE, *columns)}
    return TablePanel(title="Leading heads", table=Table({**names, **values}), heads=list(heads))


def check_made_for(heads: Any, anatomy: Anatomy) -> None:
    """Refuse a list of heads that was made for another model; heads that are no such list pass."""
    if isinstance(heads, HeadList):
        heads.check(anatomy)
