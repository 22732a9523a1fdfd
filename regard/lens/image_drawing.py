"""A map over its image, as a picture for files and notebooks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from regard.errors import RegardError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(
    values: Tensor, pixels: Tensor, title: str, kind: str, at: tuple[float, float] | None,
    path: str | Path | None,
) -> Figure:  # fmt: skip
    """Draw an image and beside it a map [H, W] over it; a gate on a scale that diverges from zero.

    Raises:
        RegardError: where matplotlib is not installed, or the path cannot be written.
    """
    try:
        from matplotlib import pyplot
    except ImportError as missing:
        raise RegardError('draw() needs matplotlib; run `pip install "regard[plot]"`.') from missing
    height, width = pixels.shape[1:]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(6.6, 3.2), layout="constrained")
    pyplot.close(figure)
    shown = seen_pixels(pixels).permute(1, 2, 0).numpy()
    left.imshow(shown, extent=(0, width, height, 0))
    right.imshow(shown.mean(-1), cmap="gray", extent=(0, width, height, 0))
    signed = kind == "gate"
    most = float(values.abs().max()) or 1.0
    drawn = right.imshow(
        values.numpy(), cmap="RdBu_r" if signed else "viridis", vmin=-most if signed else 0, vmax=most,
        alpha=0.75, extent=(0, width, height, 0), interpolation="nearest",
    )  # fmt: skip
    if at is not None:
        for axis in (left, right):
            axis.plot(at[1], at[0], "o", markerfacecolor="none", markeredgecolor="#ff5a1f", markersize=9)
    for axis in (left, right):
        axis.set_axis_off()
    figure.suptitle(title, fontsize=10)
    figure.colorbar(drawn, ax=right, shrink=0.85, label=kind)
    if path is not None:
        try:
            figure.savefig(path, dpi=150)
        except (OSError, ValueError) as failure:
            raise RegardError(f"cannot write {path}: {failure}.") from failure
    return figure


def seen_pixels(pixels: Tensor) -> Tensor:
    """Return an image [C, H, W] as it can be seen, float32 [3, H, W] from 0 to 1.

    One whose numbers are not already from 0 to 1, or to 255, is spread from its lowest to its highest.
    """
    image = pixels.float().nan_to_num()
    image = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    low, high = float(image.min()), float(image.max())
    if low >= 0 and high <= 1:
        return image
    if low >= 0 and 1 < high <= 255 and high > 16:
        return image / 255
    return (image - low) / max(high - low, 1e-12)
