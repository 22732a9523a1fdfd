"""The picture of an outcome: written whole or not at all, colours that a colour-blind reader tells apart."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.runtime.table import write_bytes
from regard.studies.base import Study
from regard.studies.outcome import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours; grey is for controls
COLOURS = {
    "blue": "#0072B2",
    "orange": "#D55E00",
    "green": "#009E73",
    "pink": "#CC79A7",
    "sky": "#56B4E9",
    "yellow": "#E69F00",
    "grey": "#7A7A7A",
}
SIZE = (13.0, 8.0)
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "svg.fonttype": "none",
}


def have_matplotlib() -> bool:
    """Whether pictures can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def save_picture(study: Study, outcome: Outcome, folder: Path) -> Path | None:
    """Draw an outcome into `NAME.png`, and return its path.

    Without matplotlib none is drawn, an older one is removed, and None is returned.

    Raises:
        RegardError: where it cannot be written.
    """
    path = folder / f"{outcome.name}.png"
    if not have_matplotlib():
        path.unlink(missing_ok=True)
        return None
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained", facecolor="white")
        study.draw(outcome, figure)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=100, metadata={"Software": None})
    write_bytes(path, drawn.getvalue())
    return path


def intervals(outcome: Outcome, names: list[str]) -> tuple[list[float], list[list[float]]]:
    """Return means, and how far their intervals reach down and up, as `Axes.errorbar` takes them."""
    means, below, above = [], [], []
    for name in names:
        found = outcome.measures[name]
        value = outcome.value(name)
        means.append(value)
        below.append(0.0 if found["low"] is None else value - found["low"])
        above.append(0.0 if found["high"] is None else found["high"] - value)
    return means, [below, above]


def percent(axis: Axes, most: float = 1.0) -> Any:
    """Show shares on the vertical axis in per cent, from 0 to `most`."""
    from matplotlib.ticker import PercentFormatter

    axis.set_ylim(0, most)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    return axis
