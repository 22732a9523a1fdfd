"""How well scores of heads find the heads of a circuit that is known.

    AUC         probability that a head of the circuit scores above another one, ties half
    within      the same over pairs of heads of one layer alone, so that the layer's number gives nothing away
    average     precision averaged over the circuit's heads, best score first
    at k        precision TP / k, recall TP / |circuit|, F1 = 2 P R / (P + R), of the k best heads
    balanced    2 s t / (s + t) of the rates of true positives s and true negatives t, which the code of
                O'Neill and Bui, 2024, arXiv 2405.12522, calls F1 in one place

Curves and areas are scikit-learn's. Status: our choice of form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from regard.errors import RegardError
from regard.lens.circuits.truth import known_circuit
from regard.runtime.head_statistics import auc
from regard.runtime.head_table import Head, HeadName, HeadTable

Values = npt.NDArray[np.float64]
UNDEFINED = "the circuit has {}, so no AUC and no average precision can be told"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        auc, average_precision: NaN where the circuit has no head, or every one.
        within_layer: AUC over pairs of one layer; NaN where no layer has heads of both kinds.
        k: how many of the best heads are taken for the circuit.
        precision, recall, f1, balanced_score: of these.
        roc: (share of other heads, share of the circuit's heads) above each threshold, float64 [points, 2].
        best: the k heads, best first.
        said: why something is NaN, or "".
    """

    auc: float
    average_precision: float
    within_layer: float
    k: int
    precision: float
    recall: float
    f1: float
    balanced_score: float
    roc: Values
    best: tuple[Head, ...]
    said: str = ""


def evaluate(
    scores: HeadTable,
    truth: str | Sequence[HeadName],
    *,
    column: str | None = None,
    version: str | None = None,
    k: int | None = None,
) -> Evaluation:
    """Hold scores of heads against a circuit that is known.

    Args:
        scores: of every head, higher where it is likelier to belong; none may be NaN.
        truth: the heads, (layer, head) each; or the task of a published circuit, such as "ioi".
        column: of the table; default its first.
        version: of the published circuit; default its first.
        k: how many heads are taken for the circuit; default as many as it has.

    Raises:
        NoSuchSite: for a head that the table does not have, such as where a list is of another model.
        RegardError: for a list given twice over, a NaN, or a k out of range.

    Example:
        >>> table = HeadTable.from_columns({"text.0": {"score": [0.9, 0.2]}, "text.1": {"score": [0.5, 0.5]}})
        >>> found = evaluate(table, [(0, 0), (1, 1)])
        >>> found.auc, found.precision, found.best[0]
        (0.875, 0.5, ('text.0', 0))
    """
    values = scores[next(iter(scores.columns)) if column is None else column]
    if np.isnan(values).any():
        raise RegardError(f"{int(np.isnan(values).sum())} heads have no score, so they cannot be ranked.")
    inside = members(scores, truth, version)
    count = int(inside.sum())
    k = count if k is None else k
    if not 0 <= k <= len(values):
        raise RegardError(f"k is {k}; the table has {len(values)} heads.")
    order = np.argsort(-values, kind="stable")[:k]
    taken = np.zeros(len(values), dtype=bool)
    taken[order] = True
    hits = int((taken & inside).sum())
    precision, recall = _share(hits, k), _share(hits, count)
    rejected = _share(int((~taken & ~inside).sum()), len(values) - count)
    names = scores.names
    found = Evaluation(
        math.nan, math.nan, within_layer_auc(values, inside, scores.sites), k, precision, recall,
        _mean(precision, recall), _mean(recall, rejected), np.empty((0, 2)),
        tuple(names[i] for i in order), UNDEFINED.format("no head" if not count else "every head"),
    )  # fmt: skip
    return _with_curves(found, values, inside) if 0 < count < len(values) else found


def members(
    table: HeadTable, truth: str | Sequence[HeadName], version: str | None = None
) -> npt.NDArray[np.bool_]:
    """Return which rows of a table belong to a circuit, bool [N].

    Raises:
        NoSuchSite, RegardError: as `evaluate`.
    """
    heads: Sequence[HeadName] = known_circuit(truth, version).heads if isinstance(truth, str) else truth
    rows = [table._row(head) for head in heads]
    if len(set(rows)) < len(rows):
        raise RegardError("the circuit names a head twice.")
    inside = np.zeros(len(table), dtype=bool)
    inside[rows] = True
    return inside


def within_layer_auc(values: Values, inside: npt.NDArray[np.bool_], layers: Sequence[str]) -> float:
    """Return the AUC over all pairs of a head inside and one outside that are of the same layer.

    NaN where there is no such pair.
    """
    won, pairs = 0.0, 0
    groups = np.array(layers)
    for layer in dict.fromkeys(layers):
        own, others = (values[(groups == layer) & side] for side in (inside, ~inside))
        count = len(own) * len(others)
        if count:
            won += auc(own, others) * count
            pairs += count
    return won / pairs if pairs else math.nan


def _with_curves(found: Evaluation, values: Values, inside: npt.NDArray[np.bool_]) -> Evaluation:
    from dataclasses import replace

    try:
        from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
    except ImportError as missing:
        raise RegardError(
            "curves need scikit-learn, which is not installed; run `pip install scikit-learn`."
        ) from missing
    wrong, right, _ = roc_curve(inside, values)
    return replace(
        found, auc=float(roc_auc_score(inside, values)),
        average_precision=float(average_precision_score(inside, values)),
        roc=np.stack([wrong, right], 1), said="",
    )  # fmt: skip


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _mean(first: float, second: float) -> float:
    """The harmonic mean of two shares."""
    return 2 * first * second / (first + second) if first + second else first + second
