"""Which experts tell one class of prompts from the others, and sets of experts to hold them against.

    mean       mean use over the class - mean use over all others
    risk       share of the class that uses an expert at all - that of all others
    contrast   (A - B) / (A + B) of the two means
    welch      Welch's t of the two

Source: Dahlke et al., 2025, arXiv 2502.11096, section 3 (`mean`). Status: paper only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

from regard.errors import RegardError, ShapeMismatch
from regard.runtime.table import Table

Kind = Literal["mean", "risk", "contrast", "welch"]
Expert = tuple[int, int]


@dataclass(frozen=True, eq=False)
class ExpertTable:
    """A score for every expert.

    Attributes:
        layers: numbers of the layers that have experts.
        scores: float64 [L, E]; NaN where a layer has fewer.
        about: what they are; plain JSON.
    """

    layers: Sequence[int]
    scores: npt.NDArray[np.float64]
    about: dict[str, Any]

    def top(self, count: int, *, largest: bool = True) -> list[tuple[int, int, float]]:
        """Return (layer, expert, score) of the leading experts.

        Args:
            largest: False for those that fire less.
        """
        order = np.argsort(self.scores if not largest else -self.scores, axis=None, kind="stable")
        places = [np.unravel_index(i, self.scores.shape) for i in order]
        known = [(int(r), int(e)) for r, e in places if np.isfinite(self.scores[r, e])]
        return [(self.layers[r], e, float(self.scores[r, e])) for r, e in known[:count]]

    def experts(self, count: int, *, largest: bool = True) -> list[Expert]:
        """Return the leading experts, as `tune_experts` takes them."""
        return [(layer, expert) for layer, expert, _ in self.top(count, largest=largest)]

    @property
    def table(self) -> Table:
        """All experts, the largest score first."""
        rows = self.top(self.scores.size)
        layers, experts, scores = zip(*rows, strict=True)
        return Table({"layer": list(layers), "expert": list(experts), "score": list(scores)})


def differential(
    use: Tensor, layers: Sequence[int], labels: Sequence[Any], target: Any, *, kind: Kind = "mean"
) -> ExpertTable:
    """Score experts by how much more one class of prompts uses them.

    Args:
        use: from `record_experts`, [N, L, E].
        layers: from the same.
        labels: the class of each prompt.
        target: the class that is held against all others.
        kind: see above.

    Raises:
        ShapeMismatch: for labels of another number.
        RegardError: where the class, or all others, are empty, or `kind` is unknown.
    """
    if len(labels) != len(use):
        raise ShapeMismatch(f"{len(labels)} labels beside {len(use)} prompts; one a prompt.")
    if kind not in get_args(Kind):
        raise RegardError(f"kind is {kind!r}; it must be one of {', '.join(get_args(Kind))}.")
    mine = np.array([label == target for label in labels])
    if not mine.any() or mine.all():
        which = "every prompt" if mine.all() else "no prompt"
        raise RegardError(f"{which} is of the class {target!r}; it takes some of it and some of others.")
    values = use.double().numpy()
    inside, outside = values[mine], values[~mine]
    scores = _scores(inside, outside, kind)
    about = {"kind": kind, "target": str(target), "inside": len(inside), "outside": len(outside)}
    return ExpertTable(list(layers), scores, about)


def _scores(inside: Any, outside: Any, kind: str) -> npt.NDArray[np.float64]:
    if kind == "risk":
        inside, outside = (np.where(np.isnan(x), np.nan, x > 0) for x in (inside, outside))
    first, second = inside.mean(0), outside.mean(0)
    if kind == "contrast":
        with np.errstate(invalid="ignore", divide="ignore"):
            found = (first - second) / (first + second)
        return np.where((first + second) == 0, 0.0, found)
    if kind == "welch":
        from scipy.stats import ttest_ind

        if min(len(inside), len(outside)) < 2:
            raise RegardError("Welch's t takes two prompts of each side at least.")
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.nan_to_num(ttest_ind(inside, outside, equal_var=False).statistic) + 0 * first
    return np.asarray(first - second)


def control_experts(
    table: ExpertTable, like: Sequence[Expert], *, seed: int = 0, matched: bool = True
) -> list[Expert]:
    """Return as many experts, drawn at random from all but those given.

    Args:
        matched: as many of each layer as are given of it.

    Raises:
        RegardError: where there are not enough.
    """
    taken, generator = set(like), random.Random(seed)
    free = [(layer, e) for layer, e, _ in table.top(table.scores.size) if (layer, e) not in taken]
    if not matched:
        if len(free) < len(like):
            raise RegardError(f"{len(like)} control experts are needed, and {len(free)} are left.")
        return sorted(generator.sample(sorted(free), len(like)))
    drawn = []
    for layer in sorted({layer for layer, _ in like}):
        wanted = sum(one == layer for one, _ in like)
        pool = sorted(expert for expert in free if expert[0] == layer)
        if len(pool) < wanted:
            raise RegardError(f"layer {layer} has {len(pool)} other experts, and {wanted} are needed.")
        drawn += generator.sample(pool, wanted)
    return sorted(drawn)
