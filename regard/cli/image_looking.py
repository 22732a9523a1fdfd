"""The work behind `regard inspect --image`: load an image model, read images as it takes them, run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard import __version__
from regard.cli.given import check_layers
from regard.cli.looking import is_ours
from regard.errors import NothingObserved, RegardError, UnsupportedModel, first_sentence
from regard.lens import LENSES, ImageMaps, SeenMaps
from regard.report.build import image_report
from regard.runtime.anatomy import Anatomy, anatomy_of, require_attention, root_of
from regard.runtime.difference import heads_of
from regard.runtime.protocol import Lens
from regard.runtime.table import finite
from regard.runtime.verbs import watch
from regard.tasks.image_folder import read_image
from regard.weights import Source
from regard.weights.device import check_device, check_dtype
from regard.weights.quiet import busy

MAPS, PREPROCESSOR = "image-maps", "preprocessor_config.json"
FORMAT = 1
SMALLEST_SIDE, USUAL_SIDE = 1, 224


@dataclass(frozen=True)
class Preparation:
    """How images are made ready for a model.

    Attributes:
        height, width: what they are brought to.
        mean, std: by channel, of numbers from 0 to 1; what is taken off, and divided by.
        said: where that was read; empty where nothing says so.
    """

    height: int
    width: int
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    said: str = ""

    @classmethod
    def of(cls, found: Source, size: int | None) -> Preparation:
        """Read it from the folder of a model, or else from its config; a size given comes first."""
        told, said = _preprocessor(found), PREPROCESSOR
        if not told:
            names = ("image_mean", "image_std")
            told = {name: value for name in names if (value := getattr(found.config, name, None))}
            said = "config.json"
        side = told.get("crop_size") or told.get("size") or getattr(found.config, "image_size", None)
        height, width = (size, size) if size is not None else _sides(side)
        mean, std = (tuple(told.get(name) or (0.5,)) for name in ("image_mean", "image_std"))
        if not told.get("do_normalize", True):
            mean, std = (0.0,), (1.0,)
        return cls(height, width, mean, std, said if told else "")

    def words(self) -> str:
        """In words, for the reader to check."""
        told = f"as its {self.said} says" if self.said else "its folder says nothing of it"
        mean, std = (", ".join(f"{v:.3g}" for v in values) for values in (self.mean, self.std))
        return f"{self.height} x {self.width} pixels, mean {mean} and deviation {std} ({told})"

    def ready(self, images: Tensor) -> Tensor:
        """Return images [B, C, H, W] from 0 to 1 as the model takes them."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images - mean) / std


def _preprocessor(found: Source) -> dict[str, Any]:
    path = Path(found.place) / PREPROCESSOR
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RegardError(f"{path} cannot be read: {first_sentence(error)}.") from error
    if not isinstance(told, dict):
        raise RegardError(f"{path} is not what save_pretrained of an image processor writes.")
    return told


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        size = [size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge"))]
    sides = list(size) if isinstance(size, list | tuple) else [size, size]
    if len(sides) == 2 and all(isinstance(n, int) and n >= SMALLEST_SIDE for n in sides):
        return int(sides[0]), int(sides[1])
    return USUAL_SIDE, USUAL_SIDE


@dataclass(frozen=True)
class ImageLook:
    """A model and images, ready to be looked at.

    Attributes:
        name: the model, as the user named it.
        files: of the images.
        images: [B, C, H, W] from 0 to 1.
    """

    model: Any
    anatomy: Anatomy
    name: str
    files: Sequence[str]
    images: Tensor
    preparation: Preparation

    @classmethod
    def of(
        cls, source: str | None, files: Sequence[str], size: int | None, layers: list[int] | None,
        dtype: str | None, device: str | None, lenses: dict[str, Lens],
    ) -> ImageLook:  # fmt: skip
        """Load a model and read images; what can be refused before weights are read is.

        Raises:
            RegardError: where either cannot be done, or the model reads no images or has no such layer.
        """
        check_dtype(dtype)
        check_device(device)
        if source is None:
            raise RegardError("--image needs a MODEL that reads images: a folder that save_pretrained wrote.")
        found = Source.find(source)
        with busy(f"Preparing {found.name}"):
            check_reads_images(found)
            skeleton = root_of(found.skeleton())
            anatomy = anatomy_of(skeleton)
            require_attention(anatomy)
            check_layers(layers, anatomy)
            watch(skeleton, *lenses.values(), layers=layers)
            preparation = Preparation.of(found, size)
            images = _read(files, preparation, getattr(found.config, "num_channels", 3))
        with busy(f"Loading {found.name}"):
            root = root_of(found.read(dtype, device))
        return cls(root, anatomy_of(root), found.name, list(files), images, preparation)

    @property
    def origin(self) -> str:
        """The images in words."""
        return self.files[0] if len(self.files) == 1 else f"{len(self.files)} images"

    def size(self, maps: SeenMaps) -> str:
        """The model in words: layers, what has maps, and its class."""
        counts: dict[str, int] = {}
        for site in maps.sites.values():
            counts[site.head] = counts.get(site.head, 0) + len(site.mean)
        parts = ", ".join(f"{count:,} {word}s" for word, count in counts.items())
        layers = "1 layer" if len(maps.sites) == 1 else f"{len(maps.sites)} layers"
        return f"{layers} with maps, {parts} ({type(self.model).__name__})"

    def run(self, lenses: dict[str, Lens], layers: list[int] | None) -> dict[str, Any]:
        """Return the results of the lenses on the images, each pixel from 0 to 1 as it was read.

        Raises:
            NothingObserved: where one has nothing to say.
        """
        pixels = self.preparation.ready(self.images).to(self.model.device, self.model.dtype)
        seen = watch(self.model, *lenses.values(), layers=layers)
        with torch.no_grad(), seen, busy(f"Looking at {self.origin}"):
            self._forward(pixels)
        found = {}
        for name in lenses:
            try:
                found[name] = seen[name]
            except NothingObserved as nothing:
                raise NothingObserved(
                    f"--lens {name} has nothing to say of {self.name}: {nothing}"
                ) from nothing
        found[MAPS] = replace(found[MAPS], pixels=tuple(self.images))
        return found

    def _forward(self, pixels: Tensor) -> None:
        try:
            self.model(pixel_values=pixels)
        except RegardError:
            raise
        except (ValueError, RuntimeError) as error:
            if is_ours(error):
                raise
            raise UnsupportedModel(
                f"{self.name} ({type(self.model).__name__}) does not take images of "
                f"{pixels.shape[2]} x {pixels.shape[3]} pixels ({first_sentence(error)}); give --image-size."
            ) from error


def check_reads_images(found: Source) -> None:
    """Refuse a model that one image does not feed.

    Raises:
        UnsupportedModel: naming what it takes.
    """
    if found.reads != "pixel_values":
        kind = (found.config.architectures or [type(found.config).__name__])[0]
        raise UnsupportedModel(f"{found.name} ({kind}) takes {found.reads}, not images; leave --image out.")


def _read(files: Sequence[str], preparation: Preparation, channels: int) -> Tensor:
    if channels not in (1, 3):
        raise UnsupportedModel(f"the model takes images of {channels} channels; inspect reads 1 or 3.")
    size = (preparation.height, preparation.width)
    images = [read_image(file, None, channels) for file in files]
    return torch.cat([_fitted(image.float() / 255, size) for image in images])


def _fitted(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of an image [1, C, H, W] that has the proportions of `size`, brought to it."""
    height, width = image.shape[2:]
    scale = max(size[0] / height, size[1] / width)
    resized = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    found = torch.nn.functional.interpolate(
        image, resized, mode="bilinear", align_corners=False, antialias=True
    )
    top, left = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
    return found[:, :, top : top + size[0], left : left + size[1]].clamp(0, 1)


def chosen_lenses(names: Sequence[str] | None, count: int) -> dict[str, Lens]:
    """Return the lenses named, and always `ImageMaps`, which keeps the maps of all images."""
    from regard.lens import find_lens

    lenses: dict[str, Lens] = {MAPS: ImageMaps(name=MAPS, images=count)}
    lenses.update({name: find_lens(name)(name=name) for name in names or () if name != MAPS})
    return lenses


def write_report(path: Path, look: ImageLook, lenses: dict[str, Lens], results: dict[str, Any]) -> None:
    """Write the page to look at."""
    said = {name: (lenses[name], result) for name, result in results.items()}
    maps = results[MAPS]
    page = image_report(look.name, look.size(maps), said, maps)
    replace(page, facts=[look.size(maps), look.origin, look.preparation.words()]).save(path)


def as_json(look: ImageLook, results: dict[str, Any]) -> str:
    """Return every number of the results, and what they were taken from."""
    document = {
        "format": FORMAT, "regard": __version__,
        "model": {
            "name": look.name, "class": type(look.model).__name__,
            "dtype": str(look.model.dtype).removeprefix("torch."), "device": str(look.model.device),
        },
        "images": {
            "files": list(look.files), "height": look.images.shape[2], "width": look.images.shape[3],
            "mean": list(look.preparation.mean), "std": list(look.preparation.std),
        },
        "on_images": {name: _numbers(name, result) for name, result in results.items()},
    }  # fmt: skip
    return json.dumps(document, allow_nan=False, indent=1) + "\n"


def _numbers(name: str, result: Any) -> dict[str, Any]:
    kind: Any = LENSES[name]
    table = heads_of(result)
    about = {"lens": name, "definition": kind.definition, "source": kind.source}
    rows = [{key: finite(value) for key, value in row.items()} for row in result.table.rows()]
    found = {"about": {**about, **(table.about if table is not None else {})}, "rows": rows}
    if isinstance(result, SeenMaps):
        found["sites"] = [
            {
                "site": alias,
                "kind": s.kind,
                "head": s.head,
                "heads": len(s.mean),
                "grid": list(s.mean.shape[1:]),
            }
            for alias, s in result.sites.items()
        ]
    return found
