"""Training of image classifiers: smoothed cross-entropy, on accelerate, in the one loop of `loop.py`.

    loss = (1 - e) ce(logits, label) + e mean_c ce(logits, c)          e the smoothing

Every image of the training part is seen once an epoch, in an order that depends on the seed and the epoch
alone, moved and mirrored by chance that depends on the seed and the step alone. accelerate chooses the device
and the mixed precision and divides accumulated gradients.

Source: smoothing is Szegedy et al., 2015, arXiv 1512.00567, section 7; optimiser and schedule as in
`schedule.py`. Status: our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import RegardError, ShapeMismatch
from regard.objectives.accelerated import accelerated
from regard.objectives.checkpoint import Log
from regard.objectives.confusion import confusion, logits_of
from regard.objectives.loop import Loop, in_words
from regard.objectives.schedule import PRECISIONS, Schedule, check_count, mixed
from regard.tasks.images import Images, augmented, normalized

EPOCHS = 20


@dataclass(frozen=True, kw_only=True)
class ImageRecipe(Schedule):
    """How to train an image classifier; a batch is of images, and no larger than the training part.

    Attributes:
        smoothing: share of the target that is spread over all classes.
        shift: pixels by which an image is moved at most, both ways.
        flip: whether half of the images are mirrored left to right.
        accumulate: pieces that a batch is computed in, to save memory.
        precision: "no", or "bf16" for bfloat16 where that is safe.
    """

    batch: int = 64
    rate: float = 2e-3
    decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    smoothing: float = 0.1
    shift: int = 1
    flip: bool = False
    accumulate: int = 1
    precision: str = "no"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("shift", self.shift, 0)
        check_count("accumulate", self.accumulate, 1)
        if self.accumulate > self.batch:
            raise RegardError(f"accumulate is {self.accumulate}, and a batch has {self.batch} images.")
        if not 0 <= self.smoothing < 1:
            raise RegardError(f"smoothing is {self.smoothing}; it must be from 0 to below 1.")
        if self.precision not in PRECISIONS:
            raise RegardError(f"precision is {self.precision!r}; it must be one of {', '.join(PRECISIONS)}.")


def train_images(
    model: nn.Module,
    data: Images,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    recipe: ImageRecipe | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    device: str | None = None,
    about: Mapping[str, Any] | None = None,
    tick: Callable[[float], None] | None = None,
    **options: Any,
) -> Log:
    """Train an image classifier in place, and return how it went.

    Images are normalised by mean and deviation of the training part, or by `image_mean` and `image_std` of
    the model's config where these are set; they, the image size and the classes are written there.

    Args:
        model: an `ImageModel`, or any module that makes logits [B, classes], or an object with `.logits`, of
            float32 images [B, C, H, W].
        data: as `digits()`, `textures()` and `image_folder(path)` give it.
        epochs: times that each image is seen; 20 by default.
        steps: optimiser steps, in place of `epochs`.
        recipe: all that makes an `ImageRecipe`, in place of `epochs`, `steps` and `options`.
        out: folder for `checkpoint.safetensors`, made where it is missing; None keeps nothing.
        resume: go on from the file in `out`, if there is one; False begins anew and replaces it.
        evaluate_every: steps between held-out losses; by default an epoch.
        checkpoint_every: steps between files; by default an epoch. A run that is killed loses no more.
        device: such as "cpu" or "cuda:1"; by default accelerate's choice, a GPU where there is one.
        about: what the model is, as JSON holds it; a file of another model is refused by it.
        tick: called with the share of steps done; in place of the progress bar, which only a terminal sees.
        options: fields of `ImageRecipe`, as in `rate=1e-3, flip=True`.

    Returns:
        The losses of every step, and held-out loss and accuracy; `confusion(model, data)` says more.

    Raises:
        RegardError: where an argument will not do, model and data do not fit, the file in `out` is of another
            training, or the loss is no longer finite.

    Example:
        >>> from regard.models.images import image_model
        >>> from regard.tasks.textures import textures
        >>> data = textures(16, kinds=("dots", "grain"), train=8, held_out=4)
        >>> model = image_model("nat-nano", num_labels=2)
        >>> log = train_images(model, data, steps=2, batch=8)
        >>> len(log.losses), [sorted(found) for _, found in log.measures]
        (2, [['accuracy'], ['accuracy']])
    """
    if not isinstance(data, Images):
        raise RegardError(f"data must be Images, as digits() gives, and is {type(data).__name__}.")
    recipe = recipe or recipe_of(data, epochs, steps, **options)
    check_fit(model, data)
    _check_pieces(model, data, recipe)
    mean, std = _described(model, data)
    told = {"recipe": asdict(recipe), "data": data.digest(), "about": dict(about or {})}
    batches, epoch = _Batches(data, recipe), per_epoch(data, recipe.batch)
    with accelerated(device, recipe.precision, recipe.accumulate, "train_images") as accelerator:
        model.to(accelerator.device)

        def descend(step: int) -> float:
            images, labels = (part.to(accelerator.device) for part in batches.at(step))
            images, total = normalized(images, mean, std), 0.0
            pieces = min(recipe.accumulate, len(labels))
            for x, y in zip(images.tensor_split(pieces), labels.tensor_split(pieces), strict=True):
                with accelerator.autocast():
                    logits = logits_of(model, x)
                loss = F.cross_entropy(logits.float(), y, label_smoothing=recipe.smoothing)
                share = len(y) / len(labels)
                accelerator.backward(loss * share * recipe.accumulate)
                total += float(loss.detach()) * share
            return total

        def judge() -> tuple[float, dict[str, float]]:
            found = confusion(model, data, batch=recipe.batch)
            return found.loss, {"accuracy": found.accuracy}

        return Loop(
            model=model, recipe=recipe, descend=descend, judge=judge, told=told, out=out, resume=resume,
            evaluate_every=epoch if evaluate_every is None else evaluate_every,
            checkpoint_every=epoch if checkpoint_every is None else checkpoint_every,
            tick=tick, words=_words,
        ).run()  # fmt: skip


def recipe_of(
    data: Images, epochs: int | None = None, steps: int | None = None, **options: Any
) -> ImageRecipe:
    """Return a recipe of so many epochs, or steps, over the training part of some data."""
    if epochs is not None and steps is not None:
        raise RegardError("both epochs and steps were given; give one.")
    recipe = ImageRecipe.of("train_images", **options, **({} if steps is None else {"steps": steps}))
    if steps is not None:
        return recipe
    epochs = EPOCHS if epochs is None else epochs
    check_count("epochs", epochs, 1)
    return ImageRecipe.of("train_images", **options, steps=epochs * per_epoch(data, recipe.batch))


def per_epoch(data: Images, batch: int) -> int:
    """Return the steps of an epoch; what is left over of the last batch waits for the next order."""
    return max(1, len(data.train) // batch)


def check_fit(model: nn.Module, data: Images) -> None:
    """Refuse data of other channels or classes than a model has, or too small for it."""
    config = getattr(model, "config", None)
    channels, labels = getattr(config, "num_channels", None), getattr(config, "num_labels", None)
    if channels not in (None, data.channels):
        raise ShapeMismatch(
            f"the model takes {channels} channels (num_channels), and {data.name} has {data.channels}."
        )
    if labels not in (None, len(data.classes)):
        raise ShapeMismatch(
            f"the model has {labels} classes (num_labels), and {data.name} has {len(data.classes)}."
        )
    least = int(getattr(model, "smallest_image", 1))
    if min(data.size) < least:
        height, width = data.size
        raise ShapeMismatch(
            f"images of {data.name} are {height} x {width} pixels; {type(model).__name__} needs {least} x "
            f"{least} at least."
        )


def _check_pieces(model: nn.Module, data: Images, recipe: ImageRecipe) -> None:
    """Refuse pieces of one image for a model with batch norms, which cannot train on them."""
    size = min(recipe.batch, len(data.train))
    if size // min(recipe.accumulate, size) < 2 and any(
        isinstance(m, nn.BatchNorm2d) for m in model.modules()
    ):
        raise RegardError(
            f"a piece of a batch has one image (batch {size}, accumulate {recipe.accumulate}); the batch "
            f"norms of {type(model).__name__} need two."
        )


def _described(model: nn.Module, data: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation to normalise with; they, size and classes are written into the config."""
    config: Any = getattr(model, "config", None)
    mean, std = getattr(config, "image_mean", None), getattr(config, "image_std", None)
    found = data.statistics() if mean is None or std is None else (tuple(mean), tuple(std))
    if config is not None:
        config.image_mean, config.image_std = list(found[0]), list(found[1])
        config.image_size = list(data.size)
        config.id2label = dict(enumerate(data.classes))
        config.label2id = {word: number for number, word in enumerate(data.classes)}
    return found


class _Batches:
    """Images uint8 [B, C, H, W] and labels [B] of a step, which depend on the seed and the step alone."""

    def __init__(self, data: Images, recipe: ImageRecipe) -> None:
        self.data, self.recipe = data, recipe
        self.size, self.epoch = min(recipe.batch, len(data.train)), per_epoch(data, recipe.batch)
        self._order = lru_cache(maxsize=1)(self._drawn)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        recipe = self.recipe
        epoch, number = divmod(step, self.epoch)
        chosen = self._order(epoch)[number * self.size : (number + 1) * self.size]
        generator = torch.Generator().manual_seed(mixed(recipe.seed, step))
        images = augmented(self.data.train[chosen], generator, recipe.shift, recipe.flip)
        return images, self.data.train_labels[chosen]

    def _drawn(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(mixed(self.recipe.seed, epoch))
        return torch.randperm(len(self.data.train), generator=generator)


def _words(log: Log) -> str:
    accuracy = f", {log.measures[-1][1]['accuracy']:.1%} right" if log.measures else ""
    return in_words(log) + accuracy
