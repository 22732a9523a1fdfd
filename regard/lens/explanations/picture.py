"""A heat map of agreement."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from regard.errors import RegardError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.lens.explanations.pairs import Agreement


def draw_agreement(found: Agreement, path: str | Path | None = None) -> Figure:
    """Draw the means of all pairs; a cell within chance is grey and in brackets.

    Raises:
        RegardError: where matplotlib is not installed, or the path cannot be written.
    """
    try:
        from matplotlib import pyplot
    except ImportError as missing:
        raise RegardError('plot() needs matplotlib; run `pip install "regard[plot]"`.') from missing
    size = 2.4 + 0.55 * len(found.methods)
    figure, axis = pyplot.subplots(figsize=(size + 0.8, size), layout="constrained")
    pyplot.close(figure)
    cells(axis, found)
    axis.set_title(f"{found.measure}, {len(found.lengths)} texts", fontsize=10)
    figure.supxlabel(
        "Brackets: random scores reach as far.\nAgreement does not show that a method is right.", fontsize=8
    )
    if path is not None:
        try:
            figure.savefig(path, dpi=150)
        except (OSError, ValueError) as failure:
            raise RegardError(f"cannot write {path}: {failure}.") from failure
    return figure


def cells(axis: Axes, found: Agreement) -> None:
    """Draw the lower triangle into an axis."""
    size = len(found.methods)
    shown = np.where(np.tri(size, k=-1, dtype=bool), found.mean, np.nan)
    axis.imshow(shown, cmap="RdBu", vmin=-1, vmax=1)
    for i in range(size):
        for j in range(i):
            if np.isfinite(shown[i, j]):
                text = f"{shown[i, j]:.2f}" if found.told[i, j] else f"({shown[i, j]:.2f})"
                ink = "white" if abs(shown[i, j]) > 0.6 else "black" if found.told[i, j] else "#777777"
                axis.text(j, i, text, ha="center", va="center", fontsize=7, color=ink)
    axis.set_xticks(range(size - 1), found.methods[:-1], rotation=60, ha="right", fontsize=8)
    axis.set_yticks(range(1, size), found.methods[1:], fontsize=8)
    axis.set_xlim(-0.5, size - 1.5)
    axis.set_ylim(size - 0.5, 0.5)
    axis.spines[:].set_visible(False)
