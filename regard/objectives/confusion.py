"""How often each class is taken for each other, on the held-out images, as numbers and as a picture."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import RegardError, ShapeMismatch
from regard.objectives.schedule import device_of
from regard.runtime.table import write_bytes
from regard.tasks.images import Images, normalized

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_NUMBERS, MOST_NAMES = 20, 60


@dataclass(frozen=True, eq=False)
class Confusion:
    """How images of each class were classified.

    Attributes:
        classes: names.
        matrix: int64 [classes, classes]; how many images of the class of the row were taken for that of the
            column.
        loss: mean cross-entropy, in nats, without smoothing.
    """

    classes: tuple[str, ...]
    matrix: Tensor
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of images that were classified rightly."""
        return float(self.matrix.diagonal().sum()) / max(1, int(self.matrix.sum()))

    def worst(self, count: int = 5) -> list[tuple[str, str, int]]:
        """Return (class, what it was taken for, how often) of the most frequent mistakes.

        Example:
            >>> Confusion(("a", "b"), torch.tensor([[3, 2], [0, 4]]), 0.5).worst()
            [('a', 'b', 2)]
        """
        wrong = self.matrix.clone().fill_diagonal_(0)
        numbers = wrong.flatten().argsort(descending=True, stable=True)[:count].tolist()
        pairs = [divmod(number, len(self.classes)) for number in numbers]
        return [(self.classes[i], self.classes[j], int(wrong[i, j])) for i, j in pairs if wrong[i, j]]

    def save(self, path: str | Path, title: str = "") -> None:
        """Draw it into a PNG file, whole or not at all; colours are shares of each row.

        Raises:
            RegardError: where matplotlib is missing, or the file cannot be written.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise RegardError(
                'pictures are drawn by matplotlib, which is missing; pip install "regard[images]".'
            ) from None
        side = min(14.0, 3.5 + 0.42 * len(self.classes))
        figure = Figure(figsize=(side + 0.6, side), layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        shares = self.matrix / self.matrix.sum(1, keepdim=True).clamp(min=1)
        drawn = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
        self._label(axes)
        held_out = f"{self.accuracy:.1%} of {int(self.matrix.sum()):,} held-out images right"
        axes.set_title(f"{title}\n{held_out}" if title else held_out, loc="left", fontsize=10)
        bar = figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.03)
        bar.set_label("share of the class")
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
        write_bytes(path, content.getvalue())

    def _label(self, axes: Axes) -> None:
        """Names at both sides, and numbers in the cells while there is room."""
        axes.set(xlabel="taken for", ylabel="class")
        if len(self.classes) <= MOST_NAMES:
            names = [word if len(word) <= 18 else f"{word[:17]}…" for word in self.classes]
            slanted = max(map(len, names)) > 3
            axes.set_xticks(
                range(len(names)), names, rotation=45 if slanted else 0, ha="right" if slanted else "center"
            )
            axes.set_yticks(range(len(names)), names)
        if len(self.classes) > MOST_NUMBERS:
            return
        for i, row in enumerate(self.matrix.tolist()):
            for j, count in enumerate(row):
                if count:
                    colour = "white" if count > 0.5 * sum(row) else "black"
                    axes.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=8)


@torch.no_grad()
def confusion(model: nn.Module, data: Images, *, batch: int = 64) -> Confusion:
    """Return how a model classifies the held-out images.

    Args:
        model: as `train_images` takes it; in evaluation mode meanwhile.
        data: normalised by `image_mean` and `image_std` of the model's config, or by its training part.
        batch: images at once.

    Example:
        >>> from regard.models.images import image_model
        >>> from regard.tasks.textures import textures
        >>> data = textures(16, kinds=("dots", "grain"), train=2, held_out=3)
        >>> confusion(image_model("nat-nano", num_labels=2), data).matrix.sum(1)
        tensor([3, 3])
    """
    config = getattr(model, "config", None)
    mean, std = getattr(config, "image_mean", None), getattr(config, "image_std", None)
    if mean is None or std is None:
        mean, std = data.statistics()
    was_training, device, count = model.training, device_of(model), len(data.classes)
    model.eval()
    found, total = torch.zeros(count * count, dtype=torch.int64), 0.0
    for images, labels in zip(data.held_out.split(batch), data.held_out_labels.split(batch), strict=True):
        logits = logits_of(model, normalized(images.to(device), mean, std)).float().cpu()
        if logits.shape[1] != count:
            raise ShapeMismatch(f"the model gives {logits.shape[1]} logits, and there are {count} classes.")
        total += float(F.cross_entropy(logits, labels, reduction="sum"))
        found += torch.bincount(labels * count + logits.argmax(1), minlength=count * count)
    model.train(was_training)
    return Confusion(data.classes, found.view(count, count), total / len(data.held_out))


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits of a model, whether it gives them alone or in an object."""
    found = model(images)
    logits = getattr(found, "logits", found)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        raise RegardError(f"{type(model).__name__} must return logits [batch, classes], or .logits.")
    return logits
