"""Images from a folder, where each sub-folder is a class.

    FOLDER/cats/1.png, FOLDER/dogs/2.jpg ...                   a share of each class is held out, by seed
    FOLDER/train/cats/1.png ... FOLDER/test/cats/9.png ...     `test` is held out

All are read into memory, one byte a pixel and channel. Transparent parts become white, and the orientation
that a camera wrote is applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.errors import RegardError
from regard.tasks.images import Images, check_size, split

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
GREY = {"1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F"}


def image_folder(
    folder: str | Path, size: int | None = None, *, channels: int | None = None, held_out: float = 0.2,
    seed: int = 0,
) -> Images:  # fmt: skip
    """Return the images of a folder of classes.

    Args:
        folder: with a sub-folder for each class, or with `train` and `test` that have these.
        size: height and width to bring all to: the shorter side is resized to it, and the middle is cut
            out; None where they are of one size already.
        channels: 3 for colour, 1 for grey; by default grey where all images are.
        held_out: share of each class that is held out, where there is no `test`.
        seed: of that share.

    Raises:
        RegardError: where there is no such folder, fewer than two classes, a class without images, a file
            that cannot be read, images of mixed size without `size`, or no Pillow.

    Example:
        >>> data = image_folder("flowers", 64)        # doctest: +SKIP
    """
    folder = Path(folder)
    if folder.is_file():
        raise RegardError(f"{folder} is a file; it must be a folder of classes, each a sub-folder of images.")
    if not folder.is_dir():
        raise RegardError(f"there is no folder {folder}.")
    if size is not None:
        check_size(size)
    if channels not in (None, 1, 3):
        raise RegardError(f"channels is {channels!r}; it must be 1 for grey or 3 for colour.")
    if not (folder / "train").is_dir() or not (folder / "test").is_dir():
        found = _classes(folder)
        classes = list(found)
        images, labels = _read(found, classes, size, channels)
        return split(folder.resolve().name, classes, images, labels, held_out, seed)
    train, test = _classes(folder / "train"), _classes(folder / "test", least=1)
    classes = list(train)
    strange = [word for word in test if word not in train]
    if strange:
        raise RegardError(f"{folder / 'test' / strange[0]} is a class that {folder / 'train'} does not have.")
    paths = {
        f"{part}/{word}": files
        for part, of in (("train", train), ("test", test))
        for word, files in of.items()
    }
    names = [f"train/{word}" for word in classes]
    images, labels = _read(paths, [*names, *(f"test/{word}" for word in classes)], size, channels)
    seen = labels < len(classes)
    return Images(
        folder.resolve().name, tuple(classes), images[seen], labels[seen], images[~seen],
        labels[~seen] - len(classes),
    )  # fmt: skip


def read_image(path: str | Path, size: int | None = None, channels: int | None = None) -> Tensor:
    """Return one image, uint8 [1, C, H, W]; arguments as in `image_folder`.

    Example:
        >>> image = read_image("flower.jpg", 64)        # doctest: +SKIP
    """
    import numpy
    import torch

    opened = _opened(Path(path), size, channels)
    return torch.from_numpy(numpy.array(opened)).reshape(1, opened.height, opened.width, -1).movedim(3, 1)


def _classes(folder: Path, least: int = 2) -> dict[str, list[Path]]:
    """Class -> its files, both in order of their names."""
    found = {
        part.name: sorted(p for p in part.rglob("*") if p.suffix.lower() in SUFFIXES and _shown(p, part))
        for part in sorted(folder.iterdir())
        if part.is_dir() and not part.name.startswith(".")
    }
    if len(found) < least:
        told = f"one class, {next(iter(found))}" if found else "no sub-folders"
        raise RegardError(
            f"{folder} holds {told}; there must be two classes at least, each a sub-folder of images."
        )
    empty = [word for word, files in found.items() if not files]
    if empty:
        known = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES))
        raise RegardError(f"{folder / empty[0]} holds no image ({known}).")
    return found


def _shown(path: Path, folder: Path) -> bool:
    """Whether a file is a file, and nothing of its name is hidden."""
    return path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)


def _read(
    found: dict[str, list[Path]], classes: Sequence[str], size: int | None, channels: int | None
) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, C, H, W], and the number of the class of each."""
    import numpy
    import torch
    from tqdm import tqdm

    paths = [(path, classes.index(word)) for word, files in found.items() for path in files]
    opened: list[Any] = []
    for path, _ in tqdm(paths, desc="reading images", unit="image", disable=None, leave=False):
        opened.append(_opened(path, size, channels))
        if opened[-1].size != opened[0].size:
            (w, h), (width, height) = opened[0].size, opened[-1].size
            raise RegardError(
                f"images are of mixed size: {paths[0][0]} is {h} x {w} pixels and {path} {height} x {width}; "
                "give a size to bring all to (--image-size)."
            )
    mode = "L" if all(image.mode == "L" for image in opened) else "RGB"
    pixels = numpy.stack([numpy.asarray(image.convert(mode)) for image in opened])
    images = torch.from_numpy(pixels.reshape(*pixels.shape[:3], -1)).movedim(3, 1).contiguous()
    return images, torch.tensor([label for _, label in paths])


def _opened(path: Path, size: int | None, channels: int | None) -> Any:
    """An image of Pillow, grey or colour, resized where asked for."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise RegardError(
            'images are read by Pillow, which is missing; pip install "regard[images]".'
        ) from None
    try:
        with Image.open(path) as file:
            image = _plain(ImageOps.exif_transpose(file), channels)
    except FileNotFoundError:
        raise RegardError(f"there is no file {path}.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).replace(repr(str(path)), "it").rstrip(".")
        raise RegardError(f"{path} cannot be read as an image: {reason}.") from None
    if size is None:
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)


def _plain(image: Any, channels: int | None) -> Any:
    """The image in grey or colour of 8 bits, on white where it is transparent."""
    import numpy
    from PIL import Image

    grey = image.mode in GREY
    if image.mode.startswith("I;16"):
        image = Image.fromarray((numpy.asarray(image) >> 8).astype("uint8"))
    elif image.mode in ("I", "F"):
        raise ValueError(f"it has pixels of 32 bits (mode {image.mode})")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if channels is None:
        return image.convert("L" if grey else "RGB")
    return image.convert("L" if channels == 1 else "RGB")
