"""What the outcome of `attention-sink-emergence` tells besides its measures, and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from regard.studies.attention_sink_emergence_curves import draw_trainings
from regard.studies.claims import shown
from regard.studies.picture import COLOURS, intervals, percent
from regard.studies.statistics import mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

KINDS = {
    "natural": ("natural text", "blue", "o"),
    "bos": ("the same after a BOS token", "sky", "D"),
    "random": ("random tokens", "orange", "s"),
    "repeated": ("control: one token repeated", "grey", "^"),
    "untrained": ("control: untrained copy", "pink", "v"),
}
BARS = {
    "natural": ("first token of the text", "blue"),
    "later": ("the strongest of tokens 2 to 8", "grey"),
    "in_front": ("a random token put in front", "blue"),
    "displaced": ("the text's first token, now second", "grey"),
    "second_hidden": ("second token, the first hidden from later ones", "blue"),
    "second": ("second token, nothing hidden", "grey"),
}


def collect(
    texts: Sequence[Any],
    noise: Sequence[Any],
    copies: Sequence[Any],
    eps: Sequence[float],
    lengths: Sequence[int],
) -> dict[str, Any]:
    """Return curves with their intervals, the map of heads, and remarks, from the results of the steps."""
    runs = {
        **{kind: [told[kind] for told in texts] for kind in ("natural", "bos")},
        **{kind: [told[kind] for told in noise] for kind in ("random", "repeated")},
        "untrained": [told for copy in copies for told in copy],
    }
    found = {
        "eps": list(eps),
        "lengths": list(lengths),
        "places": {kind: _curve([run["places"] for run in told]) for kind, told in runs.items()},
        "by_eps": {kind: _curve([run["eps"] for run in told]) for kind, told in runs.items()},
        "by_length": {
            f"{e:g}": _curve([[told["lengths"][str(n)][i] for n in lengths] for told in texts])
            for i, e in enumerate(eps)
        },
        "alpha": _average([run["alpha"] for run in runs["natural"]], 4),
        "peaks": {kind: _average([run["peaks"] for run in runs[kind]], 2) for kind in KINDS},
    }
    return {**found, "remarks": _remarks(found, texts)}


def _curve(values: Sequence[Sequence[float]]) -> list[list[float | None]]:
    """Return mean, lower and upper end at each point, from one row a text or draw."""
    estimates = [mean(column) for column in np.asarray(values, dtype=float).T]
    return [[round(e.value, 4), *(None if x is None else round(x, 4) for x in (e.low, e.high))]
            for e in estimates]  # fmt: skip


def _average(values: Sequence[Any], digits: int) -> Any:
    return np.round(np.mean(np.asarray(values, dtype=float), axis=0), digits).tolist()


def _remarks(found: dict[str, Any], texts: Sequence[Any]) -> list[str]:
    alpha, at = np.asarray(found["alpha"]), found["eps"].index(0.3)
    sunk = alpha > 0.3
    curve = [point[0] for point in found["by_eps"]["natural"]]
    by_eps = ", ".join(f"{shown(rate, '%')} at {e:g}" for e, rate in zip(found["eps"], curve, strict=True))
    begins = sum(told["begins_with_bos"] for told in texts)
    return [
        f"The tokenizer adds no BOS token of its own: {begins} of {len(texts)} passages began with one. With "
        f"one in front the rate is {shown(found['places']['bos'][0][0], '%')}.",
        f"The rate depends on the threshold: on natural text it is {by_eps}.",
        f"The order matters: α averaged over the texts first and then held against 0.3 gives "
        f"{shown(sunk.mean(), '%')}, and the metric, text by text, {shown(curve[at], '%')}.",
        f"In {int((sunk.mean(1) > 0.5).sum())} of {len(sunk)} layers more than half of the heads have a "
        f"sink; layers 0 and 1 have {int(sunk[:2].sum())} in {sunk[:2].size} heads.",
    ]


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw eight panels: heads, positions, thresholds; lengths, position or token, norms; trainings."""
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, 1.5 * height)
    top, bottom, last = np.ravel(np.asarray(figure.subfigures(3, 1)))
    draw_trainings(last, outcome.details["trainings"])
    heads, places, thresholds = top.subplots(1, 3)
    lengths, tokens, norms = bottom.subplots(1, 3)
    told, size = outcome.details, outcome.size
    _heads(heads, np.asarray(told["alpha"]))
    _curves(places, told["places"], list(range(1, len(told["places"]["natural"]) + 1)))
    places.set(title="Which position is a sink?", xlabel="position", ylabel="heads with a sink")
    places.legend(loc="upper right", fontsize=9)
    _curves(thresholds, told["by_eps"], told["eps"])
    thresholds.set(title="At which threshold?", xlabel="ε, the least α that counts", xticks=told["eps"])
    _lengths(lengths, told)
    _bars(tokens, outcome)
    _norms(norms, told["peaks"])
    quick = ", quick run" if outcome.quick else ""
    figure.suptitle(
        f"Attention sinks in SmolLM2-135M-Instruct: {size['texts']} passages, {size['draws']} random "
        f"sequences{quick}; below, trainings of small models,\n{size['seeds']} seeds, bands from least to "
        "most. A head has a sink where the token's mean attention α is above ε (ε = 0.3 and T = 64\ntokens "
        "unless said otherwise). Other bands, and lines on bars, are 95 % intervals.",
        fontsize=10.5,
    )


def _heads(axis: Axes, alpha: np.ndarray) -> None:
    image = axis.imshow(alpha, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axis.set(title="Which heads? Natural text, first token", xlabel="head", ylabel="layer")
    axis.set_xticks(range(alpha.shape[1]))
    axis.spines[:].set_visible(False)
    axis.figure.colorbar(image, ax=axis, label="α, mean over passages", shrink=0.9)


def _curves(axis: Axes, curves: dict[str, Any], x: Sequence[float]) -> None:
    for kind, (label, colour, marker) in KINDS.items():
        points = np.asarray(curves[kind], dtype=float)
        dashed = "--" if label.startswith("control") else "-"
        shade = COLOURS[colour]
        axis.plot(x, points[:, 0], dashed, color=shade, marker=marker, markersize=5, label=label)
        axis.fill_between(x, points[:, 1], points[:, 2], color=shade, alpha=0.2, linewidth=0)
    percent(axis, 1.01)


def _lengths(axis: Axes, told: dict[str, Any]) -> None:
    x = told["lengths"]
    for eps, curve in told["by_length"].items():
        points = np.asarray(curve, dtype=float)
        shade = COLOURS["blue" if float(eps) == 0.3 else "grey"]
        axis.plot(x, points[:, 0], marker="o", markersize=5, color=shade)
        axis.fill_between(x, points[:, 1], points[:, 2], color=shade, alpha=0.15, linewidth=0)
        axis.annotate(f"ε = {eps}", (x[-1], points[-1, 0]), (7, 0), textcoords="offset points", va="center",
                      color=shade, fontsize=9)  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_xlim(x[0] * 0.9, x[-1] * 1.7)
    axis.set(title="At which length? Natural text", xlabel="tokens T", ylabel="heads with a sink")
    axis.set_xticks(x, [str(n) for n in x])
    axis.minorticks_off()
    percent(axis, 1.01)


def _bars(axis: Axes, outcome: Outcome) -> None:
    means, reach = intervals(outcome, list(BARS))
    places = [0.0, 1.0, 2.6, 3.6, 5.2, 6.2]
    colours = [COLOURS[colour] for _, colour in BARS.values()]
    axis.barh(places, means, xerr=reach, color=colours, height=0.55, ecolor="#222222")
    for place, value, further, (label, _) in zip(places, means, reach[1], BARS.values(), strict=True):
        axis.annotate(label, (0, place - 0.33), (1, 1), textcoords="offset points", fontsize=9)
        axis.annotate(shown(value, "%"), (value + further, place), (5, 0), textcoords="offset points",
                      va="center", fontsize=9)  # fmt: skip
    axis.set_yticks([])
    axis.invert_yaxis()
    axis.spines["left"].set_visible(False)
    axis.set(
        title="The position, or the token on it?", xlabel="heads with a sink (grey: control)", xlim=(0, 1)
    )
    axis.xaxis.set_major_formatter("{x:.0%}")


def _norms(axis: Axes, peaks: dict[str, Any]) -> None:
    for kind in ("natural", "random", "repeated", "untrained"):
        label, colour, _ = KINDS[kind]
        dashed = "--" if label.startswith("control") else "-"
        axis.plot(range(len(peaks[kind])), peaks[kind], dashed, color=COLOURS[colour], label=label)
    axis.set_yscale("log")
    axis.set(title="Norm of the residual stream", xlabel="layer", ylabel="first token / largest other")
    axis.legend(fontsize=9, loc="center right", bbox_to_anchor=(0.95, 0.42))
