"""What the outcome of `explanation-agreement` tells besides its measures, and its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np

from regard.studies.picture import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

SHOWN = {
    "gradnorm": "grad norm", "gradxinput": "grad x input", "ig": "IG", "gradshap": "grad-SHAP",
    "occlusion": "occlusion", "lime": "LIME", "average": "att. average", "norm": "att. norm",
    "rollout": "rollout", "flow": "flow", "norm-rollout": "norm rollout", "random": "random",
}  # fmt: skip


def collect(groups: Mapping[str, Sequence[Any]], size: Any) -> dict[str, Any]:
    """Return mean agreement by group and measure, gains, completeness errors, and remarks."""
    found: dict[str, Any] = {"pairs": {}, "gains": {}, "ig": {}, "within_chance": {}}
    for name, runs in groups.items():
        found["pairs"][name] = {m: _means([run["pairs"][m] for run in runs]) for m in runs[0]["pairs"]}
        found["gains"][name] = {
            method: np.round(np.mean([run["gains"][method] for run in runs], axis=0), 4).tolist()
            for method in runs[0]["gains"]
        }
        errors = [abs(e) for run in runs for e in run["ig_error"]]
        differences = [abs(d) for run in runs for d in run["ig_difference"]]
        found["ig"][name] = {
            "median_error": median(errors), "largest_error": max(errors),
            "median_difference": median(differences),
            "converged": fmean(run["ig_converged"] for run in runs),
        }  # fmt: skip
        found["within_chance"][name] = fmean(run["within_chance"] for run in runs)
    return {**found, "remarks": _remarks(found, groups)}


def _means(told: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    known = {pair: [t[pair] for t in told if t.get(pair) is not None] for pair in told[0]}
    return {pair: round(fmean(values), 4) if values else None for pair, values in known.items()}


def _remarks(found: dict[str, Any], groups: Mapping[str, Sequence[Any]]) -> list[str]:
    ig, dropped = found["ig"], found["pairs"]["SmolLM2"]["kendall, first token dropped"]
    share = found["within_chance"]
    tokens = ", ".join(f"{name} {fmean(run['tokens'] for run in runs):.0f}" for name, runs in groups.items())
    return [
        f"Tokens of a text, on average: {tokens}. At 15 tokens one standard deviation of tau between random "
        "scores is 0.19.",
        "Pairs that cannot be told from random scores: "
        + ", ".join(f"{name} {found:.0%}" for name, found in share.items())
        + " (of SmolLM2: prompt by prompt).",
        "Integrated gradients off by less than 5 %: "
        + ", ".join(f"{name} {told['converged']:.0%}" for name, told in ig.items())
        + f"; on SmolLM2 the median error is {ig['SmolLM2']['median_error']:.2g} beside a difference of "
        f"{ig['SmolLM2']['median_difference']:.2g}.",
        "SmolLM2 with the first token left out: rollout and occlusion "
        f"{dropped['occlusion|rollout']:.2f}, average and occlusion {dropped['occlusion|average']:.2f}.",
        "DeepLIFT and deep-SHAP are missing where a model has gates, norms or a functional softmax.",
    ]


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw five matrices of agreement, and what each method gains over random orders."""
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, 1.35 * height)
    axes = np.ravel(np.asarray(figure.subplots(2, 3)))
    told = outcome.details
    for axis, (name, measures) in zip(axes, told["pairs"].items(), strict=False):
        _matrix(axis, name, measures["kendall"])
    _gains(axes[5], told["gains"])
    size, quick = outcome.size, ", quick run" if outcome.quick else ""
    figure.suptitle(
        f"Kendall's tau of explanations, mean over {size['seeds']} seeds of {size['texts']} texts, and over "
        f"{size['prompts']} prompts of SmolLM2{quick}.\nAgreement does not show that a method is right: the "
        "last panel asks the model itself.",
        fontsize=11,
    )


def _matrix(axis: Axes, name: str, pairs: Mapping[str, float | None]) -> None:
    methods = [m for m in SHOWN if any(m in pair.split("|") for pair in pairs)]
    grid = np.full((len(methods), len(methods)), np.nan)
    for pair, value in pairs.items():
        first, second = pair.split("|")
        if first in methods and second in methods and value is not None:
            i, j = sorted((methods.index(first), methods.index(second)))
            grid[j, i] = value
    axis.imshow(grid, cmap="RdBu", vmin=-1, vmax=1)
    for i, j in zip(*np.nonzero(np.isfinite(grid)), strict=True):
        ink = "white" if abs(grid[i, j]) > 0.6 else "black"
        axis.text(j, i, f"{grid[i, j]:.2f}", ha="center", va="center", fontsize=6, color=ink)
    names = [SHOWN[m] for m in methods]
    axis.set_xticks(range(len(methods) - 1), names[:-1], rotation=60, ha="right", fontsize=7)
    axis.set_yticks(range(1, len(methods)), names[1:], fontsize=7)
    axis.set_ylim(len(methods) - 0.5, 0.5)
    axis.set_xlim(-0.5, len(methods) - 1.5)
    axis.spines[:].set_visible(False)
    axis.grid(False)
    axis.set_title(name, fontsize=10)


def _gains(axis: Axes, gains: Mapping[str, Any]) -> None:
    group = "transformer, reviews"
    names = [m for m in SHOWN if m in gains[group]]
    places = np.arange(len(names))
    for at, (label, colour) in enumerate((("deletion", "blue"), ("insertion", "orange"))):
        values = [gains[group][m][at] for m in names]
        axis.barh(places + 0.4 * at - 0.2, values, 0.38, color=COLOURS[colour], label=label)
    axis.set_yticks(places, [SHOWN[m] for m in names], fontsize=7)
    axis.invert_yaxis()
    axis.axvline(0, color="#444444", linewidth=0.8)
    axis.set_title("Gain over random orders: transformer, reviews", fontsize=10)
    axis.set_xlabel("probability of the predicted class", fontsize=8)
    axis.legend(fontsize=8)
