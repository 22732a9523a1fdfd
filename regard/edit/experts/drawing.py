"""The picture of a ranking of experts, and of what turning the leading ones does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from regard.edit.experts.difference import Expert, ExpertTable
from regard.edit.experts.effects import Effect
from regard.errors import RegardError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"behaviour": "#D55E00", "others": "#0072B2"}


def plot_experts(table: ExpertTable, chosen: Sequence[Expert] = (), effects: Sequence[Effect] = ()) -> Figure:
    """Draw the map of experts, and the rates of every condition with Wilson's intervals.

    Args:
        table: scores, one a cell; those that were chosen have a frame.
        chosen: (layer, expert) each.
        effects: from `measure_effects`; none draws the map alone.

    Raises:
        RegardError: where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RegardError('pictures need matplotlib: pip install "regard[plot]".') from None
    figure = Figure(figsize=(11.0 if effects else 6.5, 4.6), layout="constrained")
    parts = figure.subplots(1, 2 if effects else 1, squeeze=False)[0]
    _map(figure, parts[0], table, chosen)
    if effects:
        _rates(parts[1], effects)
    return figure


def _map(figure: Figure, axes: Any, table: ExpertTable, chosen: Sequence[Expert]) -> None:
    most = float(np.nanmax(np.abs(table.scores))) or 1.0
    shown = axes.imshow(table.scores, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    rows = {layer: row for row, layer in enumerate(table.layers)}
    for layer, expert in chosen:
        axes.plot(expert, rows[layer], "s", markersize=8, markerfacecolor="none", markeredgecolor="black")
    step = max(1, len(table.layers) // 12)
    axes.set_yticks(range(0, len(table.layers), step), [str(layer) for layer in table.layers[::step]])
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_title("Use for the behaviour − for the others; framed: chosen", loc="left", fontsize=10)
    figure.colorbar(shown, ax=axes, fraction=0.05, label=f"score ({table.about['kind']})")


def _rates(axes: Any, effects: Sequence[Effect]) -> None:
    for shift, (which, colour) in zip((-0.15, 0.15), COLOURS.items(), strict=True):
        rates = [getattr(effect, which) for effect in effects]
        places = np.arange(len(effects)) + shift
        shares = 100 * np.array([rate.share for rate in rates])
        ends = 100 * np.array([[rate.low, rate.high] for rate in rates]).T
        error = np.abs(ends - shares)
        axes.errorbar(shares, places, xerr=error, fmt="o", color=colour, label=f"prompts: {which}", capsize=2)
    axes.set_yticks(range(len(effects)), [effect.name for effect in effects])
    axes.invert_yaxis()
    axes.set(xlabel="answers that show it (%), with Wilson's 95 % interval", xlim=(-3, 103))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2)
