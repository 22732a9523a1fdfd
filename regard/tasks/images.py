"""Images with one label each, a part to train on and a part held out: the digits, and what all sets share.

    x = (image / 255 - mean) / std          mean and std of each channel over the training part

`textures.py` makes images, `image_folder.py` reads them. The digits are scikit-learn's (Alpaydin and Kaynak,
1998, the test part of the UCI set "Optical recognition of handwritten digits"), 1,797 of 8 x 8 pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from regard.errors import RegardError, ShapeMismatch

if TYPE_CHECKING:
    from torch import Generator, Tensor

LARGEST = 4096


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images, a part to train on and a part held out.

    Attributes:
        name: what they are, in a word.
        classes: names, two at least; a label is the number of one.
        train, held_out: uint8 [N, C, H, W], on the CPU, all of one size.
        train_labels, held_out_labels: int64 [N].

    Raises:
        ShapeMismatch: where parts or labels do not fit together.
        RegardError: where there are fewer than two classes, a part is empty, or a label is no class.
    """

    name: str
    classes: tuple[str, ...]
    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor

    def __post_init__(self) -> None:
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise RegardError(f"classes are {list(self.classes)}; there must be two at least, all different.")
        for part, images, labels in (
            ("train", self.train, self.train_labels), ("held_out", self.held_out, self.held_out_labels),
        ):  # fmt: skip
            _check(part, images, labels, len(self.classes))
        if self.train.shape[1:] != self.held_out.shape[1:]:
            raise ShapeMismatch(
                f"train has images {list(self.train.shape[1:])} and held_out "
                f"{list(self.held_out.shape[1:])}; all must be of one size."
            )

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return int(self.train.shape[1])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return int(self.train.shape[2]), int(self.train.shape[3])

    def digest(self) -> str:
        """Return a hash of images, labels and classes, the same for the same data."""
        found = hashlib.sha256("\0".join(self.classes).encode())
        for part in (self.train, self.train_labels, self.held_out, self.held_out_labels):
            found.update(str(tuple(part.shape)).encode() + part.contiguous().numpy().tobytes())
        return found.hexdigest()

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of each channel of the training part, of values 0 to 1."""
        flat = self.train.movedim(1, 0).flatten(1).double() / 255
        deviation = flat.std(1, correction=0).clamp(min=1 / 255)
        return tuple(flat.mean(1).tolist()), tuple(deviation.tolist())

    def resized(self, size: int) -> Images:
        """Return the same with images of `size` x `size` pixels, stretched where they were not square."""
        check_size(size)
        if self.size == (size, size):
            return self
        return replace(self, train=resized(self.train, size), held_out=resized(self.held_out, size))

    def __str__(self) -> str:
        height, width = self.size
        kind = "grey" if self.channels == 1 else "colour"
        return (
            f"{self.name}: {len(self.classes)} classes, {len(self.train):,} images to train on, "
            f"{len(self.held_out):,} held out, {height} x {width} {kind}"
        )


@lru_cache(maxsize=4)
def digits(size: int = 8, held_out: float = 0.2, seed: int = 0) -> Images:
    """Return scikit-learn's handwritten digits, grey.

    Args:
        size: height and width; those beyond 8 are interpolated.
        held_out: share of each class that is held out.
        seed: of what is held out.

    Raises:
        RegardError: where scikit-learn is missing, or an argument will not do.

    Example:
        >>> str(digits())
        'digits: 10 classes, 1,438 images to train on, 359 held out, 8 x 8 grey'
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise RegardError(
            'the digits are packaged with scikit-learn, which is missing; pip install "regard[images]".'
        ) from None
    import torch

    check_size(size)
    found = load_digits()
    images = torch.from_numpy(found.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(found.target).long()
    return split("digits", [str(n) for n in range(10)], images, labels, held_out, seed).resized(size)


def split(
    name: str, classes: Sequence[str], images: Tensor, labels: Tensor, held_out: float = 0.2, seed: int = 0
) -> Images:
    """Return images with a share of each class held out, drawn by seed.

    Args:
        name, classes: as in `Images`.
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        held_out: share of each class, above 0 and below 1; one image at least, and not all.
        seed: of the draw.

    Raises:
        RegardError: where the share is none, or a class has fewer than two images.

    Example:
        >>> import torch
        >>> black = torch.zeros(10, 1, 4, 4, dtype=torch.uint8)
        >>> found = split("night", ["a", "b"], black, torch.arange(10) % 2)
        >>> found.held_out_labels.bincount().tolist()
        [1, 1]
    """
    import torch

    _check("images", images, labels, len(classes))
    if isinstance(held_out, bool) or not isinstance(held_out, int | float) or not 0 < held_out < 1:
        raise RegardError(f"held_out is {held_out!r}; it must be above 0 and below 1.")
    generator = torch.Generator().manual_seed(seed)
    kept, out = [], []
    for number, word in enumerate(classes):
        members = (labels == number).nonzero()[:, 0]
        if len(members) < 2:
            raise RegardError(
                f"class {word!r} has {len(members)} images; it needs one to train on and one to hold out."
            )
        members = members[torch.randperm(len(members), generator=generator)]
        cut = min(max(1, round(held_out * len(members))), len(members) - 1)
        out.append(members[:cut])
        kept.append(members[cut:])
    train, rest = (torch.cat(chosen).sort().values for chosen in (kept, out))
    return Images(name, tuple(classes), images[train], labels[train], images[rest], labels[rest])


def normalized(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return images uint8 [B, C, H, W] as float32, less the mean of each channel and over its deviation."""
    import torch

    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != len(mean):
        kind = str(images.dtype).removeprefix("torch.")
        raise ShapeMismatch(
            f"images must be uint8 [batch, {len(mean)}, height, width], and are {kind} {list(images.shape)}."
        )
    shift, scale = (torch.tensor(x, device=images.device).view(1, -1, 1, 1) for x in (mean, std))
    return (images / 255 - shift) / scale


def augmented(images: Tensor, generator: Generator, shift: int = 0, flip: bool = False) -> Tensor:
    """Return each image moved by up to `shift` pixels both ways, and half of them mirrored left to right.

    Args:
        images: [B, C, H, W], of any type; what comes in at a border repeats the border.
        generator: of all chance, on the CPU.
        shift: most pixels, 0 for none.
        flip: whether to mirror.

    Example:
        >>> import torch
        >>> row = torch.arange(4).view(1, 1, 1, 4)
        >>> augmented(row, torch.Generator().manual_seed(1), shift=1).flatten().tolist()
        [1, 2, 3, 3]
    """
    import torch

    batch, _, height, width = images.shape
    moves = torch.randint(-shift, shift + 1, (2, batch, 1), generator=generator)
    mirrored = torch.rand(batch, 1, generator=generator) < (0.5 if flip else 0.0)
    across = torch.arange(width).expand(batch, -1)
    rows = (torch.arange(height) + moves[0]).clamp(0, height - 1)
    columns = (torch.where(mirrored, width - 1 - across, across) + moves[1]).clamp(0, width - 1)
    chosen = (torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :])
    found = images.movedim(1, 3)[tuple(x.to(images.device) for x in chosen)]
    return found.movedim(3, 1).contiguous()


def resized(images: Tensor, size: int) -> Tensor:
    """Return images uint8 [N, C, H, W] as [N, C, size, size], interpolated between pixels, or averaged."""
    import torch
    import torch.nn.functional as F

    parts = [
        F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True).round().clamp(0, 255)
        for part in images.split(1024)
    ]
    return torch.cat([part.to(torch.uint8) for part in parts])


def check_size(size: Any) -> None:
    """Refuse what is no height and width of an image."""
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= LARGEST:
        raise RegardError(f"the image size is {size!r}; it must be a whole number from 1 to {LARGEST}.")


def _check(part: str, images: Tensor, labels: Tensor, classes: int) -> None:
    import torch

    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        kind = str(images.dtype).removeprefix("torch.")
        raise ShapeMismatch(
            f"{part} must be uint8 [images, 1 or 3, height, width], and is {kind} {list(images.shape)}."
        )
    if labels.dtype != torch.int64 or tuple(labels.shape) != (len(images),):
        raise ShapeMismatch(f"the labels of {part} must be int64 [{len(images)}].")
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise RegardError(
            f"the labels of {part} are {int(labels.min())} to {int(labels.max())}; there are {classes} "
            "classes."
        )
