"""What the outcome of `quantizable-transformers` tells besides its measures, and its picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from regard.studies.picture import COLOURS, intervals

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

SHORT = {
    "w8a8": "8 bits: all", "w16a16": "16 bits: all (control)", "inputs": "8 bits: linear inputs",
    "down": "8 bits: down-projections", "others": "8 bits: the other inputs",
    "percentile": "8 bits: linear inputs, percentile", "weights": "8 bits: weights",
}  # fmt: skip


def collect(results: Mapping[str, Any], heads: Iterable[str]) -> dict[str, Any]:
    """Return the curves over the blocks, the runs of the heads, and remarks."""
    texts = results["outliers"]["texts"]
    curves = {name: np.mean([text[name] for text in texts], 0).round(2).tolist() for name in texts[0]}
    runs = {n: [r for step, r in results.items() if step.startswith(f"head, {n}, ")] for n in heads}
    errors = ", ".join(f"{n} {np.mean([run['error'] for run in found]):.1e}" for n, found in runs.items())
    return {
        "curves": curves,
        "runs": runs,
        "remarks": [
            f"Mean square error of the trained heads: {errors}.",
            "Over all blocks, the highest kurtosis without the first token is "
            f"{max(curves['kurtosis_rest']):,.0f}: some texts have a second token like the first.",
        ],
    }


def draw(
    outcome: Outcome,
    figure: Figure,
    heads: Mapping[str, str],
    rounded: Iterable[str],
    alphas: Sequence[float],
) -> None:
    """Draw four panels: outliers over the blocks, loss in few bits, range of scores, clipping afterwards."""
    (blocks, bits), (ranges, clipped) = figure.subplots(2, 2)
    _blocks(blocks, outcome.details["curves"])
    _bars(
        bits, outcome, {f"loss_{n}": SHORT[n] for n in rounded}, "loss, nats (line: as the model is)", "w16"
    )
    bits.axvline(outcome.value("loss"), color="#222222", linewidth=1)
    bits.set_title("What few bits cost")
    _bars(
        ranges,
        outcome,
        {f"range_{n}": about for n, about in heads.items()},
        "range of a row's scores",
        "soft",
    )
    ranges.set_title("A head that must often add nothing, trained")
    means, reach = intervals(outcome, [f"clip_{alpha:g}" for alpha in alphas])
    clipped.errorbar(alphas, means, yerr=reach, marker="o", color=COLOURS["blue"], capsize=3)
    clipped.set(title="Clipping the pretrained model", xlabel="alpha, length 64", ylabel="loss, nats")
    figure.suptitle(
        f"Outliers and 8 bits: SmolLM2-135M-Instruct on {outcome.size['texts']} passages of 64 tokens; one "
        f"head trained, {outcome.size['seeds']} seeds{', quick run' if outcome.quick else ''}. Lines on bars "
        "are 95 % intervals.",
        fontsize=10.5,
    )


def _blocks(axis: Axes, curves: Mapping[str, Sequence[float]]) -> None:
    x = range(len(curves["kurtosis"]))
    for name, colour in (("infinity", "blue"), ("kurtosis", "orange")):
        axis.plot(x, curves[name], color=COLOURS[colour], label=name)
        axis.plot(
            x, curves[f"{name}_rest"], "--", color=COLOURS[colour], label=f"{name}, without first token"
        )
    axis.set(title="Outliers of what blocks hand on", xlabel="block", yscale="log")
    axis.legend(fontsize=8, frameon=False)


def _bars(axis: Axes, outcome: Outcome, labels: Mapping[str, str], title: str, control: str) -> None:
    means, reach = intervals(outcome, list(labels))
    shades = [COLOURS["grey" if name.partition("_")[2].startswith(control) else "blue"] for name in labels]
    axis.barh(range(len(labels)), means, xerr=reach, color=shades, ecolor="#222222", height=0.6)
    axis.set_yticks(range(len(labels)), list(labels.values()), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(title)
