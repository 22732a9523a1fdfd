"""What the outcome of `self-familiarity` tells besides its measures, and its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from regard.studies.picture import COLOURS, intervals

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

SIGNS = {
    "score": ("auc", "familiarity"),
    "name_likelihood": ("auc_name", "name alone"),
    "forward": ("auc_forward", "explanation"),
    "backward": ("auc_backward", "direct guess"),
    "yes": ("auc_yes", "says yes"),
    "agreement": ("auc_agreement", "agreement"),
    "frequency": ("auc_frequency", "word frequency"),
    "tokens": ("auc_tokens", "token count"),
}
GROUPS = {
    ("crossed", True): ("famous,\ntwo words", "blue"),
    ("crossed", False): ("words\nexchanged", "orange"),
    ("nonce", True): ("famous,\none word", "blue"),
    ("nonce", False): ("syllables", "orange"),
}
DRAWS = 1999


def collect(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return every name with its scores, AUCs over all names, comparisons on the same names, and remarks."""
    threshold = results["threshold"]
    seeds = [result["names"] for name, result in results.items() if name != "threshold"]
    rows = [row for names in seeds for row in names]
    pooled = {sign: _pooled(rows, sign) for sign in SIGNS}
    crossed = [row for row in rows if row["kind"] == "crossed"]
    pooled["score, words exchanged"] = _pooled(crossed, "score")
    pooled["name_likelihood, words exchanged"] = _pooled(crossed, "name_likelihood")
    return {
        "threshold": threshold,
        "pooled": pooled,
        "against": _against(seeds),
        "names": [{key: _short(value) for key, value in row.items()} for row in rows],
        "remarks": _remarks(rows, threshold, pooled),
    }


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _area(famous: np.ndarray, invented: np.ndarray) -> float:
    difference = famous[:, None] - invented[None, :]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def _pooled(rows: Sequence[Mapping[str, Any]], sign: str) -> list[float]:
    """AUC over all names, with its 95 % bootstrap interval over names."""
    both = [np.array([row[sign] for row in rows if row["famous"] is real]) for real in (True, False)]
    source = np.random.default_rng(0)
    drawn = [_area(*(source.choice(side, len(side)) for side in both)) for _ in range(DRAWS)]
    return [round(float(x), 4) for x in (_area(*both), *np.quantile(drawn, (0.025, 0.975)))]


def _against(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Every other sign less the score, in the share of a seed's invented names that a famous one is above."""
    from regard.studies.paired import compare_paired

    places = {
        sign: [_above(row[sign], names, sign) for names in seeds for row in names if row["famous"]]
        for sign in SIGNS
    }
    own = places.pop("score")
    return [
        {
            "sign": found.name, "share": found.treated, "score": found.baseline,
            "difference": found.effect.value, "low": found.effect.low, "high": found.effect.high,
            "p": found.p,
        }
        for found in compare_paired(places, own)
    ]  # fmt: skip


def _above(value: float, names: Sequence[Mapping[str, Any]], sign: str) -> float:
    return _area(np.array([value]), np.array([row[sign] for row in names if not row["famous"]]))


def _remarks(
    rows: Sequence[Mapping[str, Any]], threshold: Mapping[str, Any], pooled: Mapping[str, Sequence[float]]
) -> list[str]:
    limit = threshold["value"]
    famous = sorted((row for row in rows if row["famous"]), key=lambda row: row["score"])
    invented = sorted((row for row in rows if not row["famous"]), key=lambda row: row["score"])
    answered = np.mean([row["score"] > limit for row in rows])
    held, kept = (np.mean([row["score"] <= limit for row in side]) for side in (invented, famous))
    best = max(sorted({row["score"] for row in rows}), key=lambda x: _right(rows, x))
    both = " and ".join(f"{row['name']} ({row['score']:.3f})" for row in famous[:2])
    fooled = " and ".join(f"{row['name']} ({row['score']:.3f})" for row in invented[-2:][::-1])
    value, low, high = pooled["score"]
    return [
        f"The AUC over all {len(rows)} names is {value:.2f}, bootstrap interval {low:.2f} to {high:.2f}.",
        f"The threshold from {len(threshold['scores'])} everyday concepts is {limit:.3f} "
        f"({threshold['low']:.3f} to {threshold['high']:.3f}): {answered:.0%} of the names are answered; "
        f"withheld are {held:.0%} of the invented and {kept:.0%} of the famous ones.",
        f"The best threshold for these very names, {best:.3f}, would tell {_right(rows, best):.0%} right.",
        f"Least familiar of the famous are {both}; most familiar of the invented {fooled}.",
    ]


def _right(rows: Sequence[Mapping[str, Any]], limit: float) -> float:
    return float(np.mean([(row["score"] > limit) == row["famous"] for row in rows]))


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw every name's score, AUCs of all signs, of exchanged words, and the controls."""
    top, bottom = figure.subplots(2, 2, width_ratios=(1.35, 1))
    size = outcome.size
    _scores(top[0], outcome)
    _areas(top[1], outcome)
    _controls(bottom[0], outcome)
    _crossed(bottom[1], outcome)
    quick = ", quick run" if outcome.quick else ""
    names = 2 * (2 * size["pairs"] + size["singles"])
    figure.suptitle(
        f"Self-familiarity in SmolLM2-135M: {size['seeds']} seeds of {names} names, {size['beams']} beams, "
        f"explanations of {size['explain_tokens']} tokens{quick}. Lines are 95 % intervals over seeds.",
        fontsize=10.5,
    )


def _scores(axis: Axes, outcome: Outcome) -> None:
    source, limit = np.random.default_rng(0), outcome.details["threshold"]["value"]
    for place, ((kind, famous), (_, colour)) in enumerate(GROUPS.items()):
        values = [
            row["score"]
            for row in outcome.details["names"]
            if row["kind"] == kind and row["famous"] is famous
        ]
        at = place + source.uniform(-0.28, 0.28, len(values))
        axis.scatter(at, values, s=22, alpha=0.75, linewidth=0, color=COLOURS[colour])
        axis.hlines(np.median(values), place - 0.36, place + 0.36, color="#222222", linewidth=2)
    axis.axhline(limit, color="#222222", linestyle=":", linewidth=1)
    axis.annotate(
        f"threshold from everyday concepts, {limit:.3f}", (0.99, limit), (0, 3), fontsize=9, ha="right",
        xycoords=("axes fraction", "data"), textcoords="offset points",
    )  # fmt: skip
    axis.set_xticks(range(len(GROUPS)), [label for label, _ in GROUPS.values()])
    axis.set(title="How familiar is each name? (line: median)", ylabel="familiarity score", ylim=(0, None))


def _areas(axis: Axes, outcome: Outcome) -> None:
    means, reach = intervals(outcome, [name for name, _ in SIGNS.values()])
    colours = [COLOURS["blue" if sign == "score" else "grey"] for sign in SIGNS]
    at = np.arange(len(SIGNS))[::-1]
    axis.barh(at, means, 0.7, xerr=reach, color=colours, ecolor="#222222")
    axis.axvline(0.5, color="#222222", linestyle=":", linewidth=1)
    axis.set_yticks(at, [label for _, label in SIGNS.values()])
    axis.set(
        title="What tells famous from invented?", xlabel="AUC, mean over seeds (chance 0.5)", xlim=(0, 1)
    )


def _controls(axis: Axes, outcome: Outcome) -> None:
    bars = {
        "score": ("famous", "blue"), "swapped": ("famous, another\nname's explanation", "grey"),
        "unmasked": ("famous,\nnothing masked", "sky"), "score_invented": ("invented", "orange"),
        "unmasked_invented": ("invented,\nnothing masked", "yellow"),
    }  # fmt: skip
    means, reach = intervals(outcome, list(bars))
    axis.bar(
        range(len(bars)),
        means,
        0.65,
        yerr=reach,
        color=[COLOURS[c] for _, c in bars.values()],
        ecolor="#222222",
    )
    axis.set_xticks(range(len(bars)), [label for label, _ in bars.values()], fontsize=9)
    axis.set(title="Does the explanation carry it? Does masking matter?", ylabel="mean score", ylim=(0, 1))


def _crossed(axis: Axes, outcome: Outcome) -> None:
    bars = {
        "auc_crossed": ("familiarity,\nwords exchanged", "blue"),
        "auc_crossed_name": ("name alone,\nwords exchanged", "grey"),
        "auc_crossed_frequency": ("word frequency,\nwords exchanged", "grey"),
        "auc_nonce": ("familiarity,\nsyllables", "sky"),
    }
    means, reach = intervals(outcome, list(bars))
    axis.bar(
        range(len(bars)),
        means,
        0.6,
        yerr=reach,
        color=[COLOURS[c] for _, c in bars.values()],
        ecolor="#222222",
    )
    axis.axhline(0.5, color="#222222", linestyle=":", linewidth=1)
    axis.set_xticks(range(len(bars)), [label for label, _ in bars.values()], fontsize=9)
    axis.set(title="The same words, other pairs: is it only frequency?", ylabel="AUC", ylim=(0, 1))
