"""What the search for retrieval heads found: scores a head, and what came of every prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from regard.errors import NothingObserved
from regard.lens.sentences import number, where
from regard.runtime.findings import Finding
from regard.runtime.head_list import TOP, HeadList, list_panel
from regard.runtime.head_table import HeadTable
from regard.runtime.panels import LinePanel, MapPanel, TablePanel, head_map

RETRIEVAL = 0.1
ANSWERED = 0.5
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Record:
    """One prompt.

    Attributes:
        fact: what was asked.
        length, depth: of the prompt.
        response: what the model wrote.
        recall: share of the answer's words in it.
        chance: the score of a head that looks anywhere.
    """

    fact: str
    length: int
    depth: float
    response: str
    recall: float
    chance: float

    @property
    def counted(self) -> bool:
        """Whether the answer was found: over half of its words."""
        return self.recall > ANSWERED


@dataclass(frozen=True, eq=False)
class RetrievalScores(HeadTable):
    """Retrieval scores of all heads; only prompts that were answered count.

    Columns: `score`, the mean over them; `active`, in what share of them the score is above 0; `first` and
    `second`, the score over two halves of the facts. NaN where no prompt was answered.

    Attributes:
        records: one a prompt, in their order.
        each: scores of every counted prompt, float64 [counted, heads], in the order of the rows.
    """

    records: Sequence[Record] = field(default=())
    each: Scores = field(default_factory=lambda: np.zeros((0, 0)))

    @property
    def counted(self) -> int:
        """How many prompts were answered, and so count."""
        return sum(record.counted for record in self.records)

    @property
    def answered(self) -> float:
        """Mean recall of the answers, over all prompts."""
        return float(np.mean([record.recall for record in self.records]))

    @property
    def chance(self) -> float:
        """The score of a head that looks at a token at random, over the counted prompts."""
        found = [record.chance for record in self.records if record.counted]
        return float(np.mean(found)) if found else float("nan")

    def list(self, count: int = TOP) -> HeadList:
        """Return the leading heads, to save and to steer with.

        Raises:
            NothingObserved: where no prompt was answered, so that there is no ranking.
        """
        if not self.counted:
            raise NothingObserved(
                f"0 of {len(self.records)} prompts were answered, so no head has a score; begin the answers "
                "(stem=True), shorten the texts, or take a larger model."
            )
        about = {**self.about, "kind": "retrieval", "chance": self.chance}
        return HeadList(HeadTable(self.sites, self.heads, self.columns, about), count)

    def panels(self) -> tuple[MapPanel, ...]:
        """Return `score` and `active` as one map of heads."""
        columns = {name: values for name, values in self.columns.items() if name in ("score", "active")}
        about = {**self.about, "lens": "retrieval"}
        return (head_map(HeadTable(self.sites, self.heads, columns, about)),)

    def depths(self) -> LinePanel:
        """Return how well prompts were answered, by the depth of the needle."""
        depths = sorted({record.depth for record in self.records})
        lines = {
            f"{length} tokens": [self._recall(length, depth) for depth in depths]
            for length in sorted({record.length for record in self.records})
        }
        return LinePanel(
            title="How much of the needle was found again", x=[f"{depth:g}" for depth in depths], lines=lines,
            x_label="depth of the needle, 1 the end of the text", y_label="recall of its words",
        )  # fmt: skip

    def _recall(self, length: int, depth: float) -> float:
        found = [r.recall for r in self.records if (r.length, r.depth) == (length, depth)]
        return float(np.mean(found)) if found else float("nan")

    def findings(self) -> tuple[Finding, ...]:
        """Return what a person would say: which heads retrieve, and whether the ranking can be trusted."""
        asked = number(len(self.records), "prompt")
        if not self.counted:
            said = f"None of {asked} with a needle was answered, so no head has a retrieval score."
            return (Finding(said, (), "retrieval"),)
        heads = where(self, "score", lambda score: score >= RETRIEVAL)
        best = ", ".join(f"layer {s.rpartition('.')[2]} head {h} {v:.2f}" for s, h, v in self.top("score", 3))
        never = int((self["score"] == 0).sum())
        return (
            Finding(
                f"{self.counted} of {asked} were answered. {len(heads)} of {len(self)} heads have a "
                f"retrieval score of at least {RETRIEVAL:g} ({best}); {never} never copy, and a head that "
                f"looks anywhere would have {self.chance:.4f}.",
                heads,
                "retrieval",
            ),
            *_stability(self.list(min(TOP, len(self)))),
        )


def leading_panel(found: RetrievalScores, count: int = TOP) -> tuple[TablePanel, ...]:
    """Return the leading heads as a table for a page; nothing where no prompt was answered."""
    if not found.counted:
        return ()
    return (list_panel(found.list(min(count, len(found))), ("active", "first", "second")),)


def _stability(found: HeadList) -> tuple[Finding, ...]:
    if found.shared is None:
        return (
            Finding("One fact alone was answered, so the ranking is held against nothing.", (), "retrieval"),
        )
    said = (
        f"Two halves of the facts rank the heads alike at {found.correlation:.2f} (Spearman), and of the "
        f"first {len(found)} heads they share {found.shared.shared} (chance {found.shared.expected:.1f})."
    )
    return (Finding(said, (), "retrieval"),)


def score_table(
    names: Sequence[tuple[str, int]], each: Scores, records: Sequence[Record], about: Mapping[str, Any]
) -> RetrievalScores:
    """Return the table.

    Args:
        names: `(alias, head)` of the columns of `each`.
        each: scores [counted, heads].
        records: of all prompts.
    """
    counted = [record for record in records if record.counted]
    facts = list(dict.fromkeys(record.fact for record in records))
    halves = [np.array([r.fact in set(facts[half::2]) for r in counted], dtype=bool) for half in (0, 1)]
    columns = {
        "score": _mean(each), "active": _mean(each > 0),
        "first": _mean(each[halves[0]]), "second": _mean(each[halves[1]]),
    }  # fmt: skip
    heads = np.array([head for _, head in names], dtype=np.int64)
    return RetrievalScores(tuple(site for site, _ in names), heads, columns, about, tuple(records), each)


def _mean(values: npt.NDArray[Any]) -> Scores:
    if not len(values):
        return np.full(values.shape[1], np.nan)
    return np.asarray(values, dtype=np.float64).mean(0)
