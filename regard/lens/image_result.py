"""What `ImageMaps` saw: maps of every layer and head over the image, rows of some positions, and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from regard.errors import NoSuchSite, NothingObserved, RegardError
from regard.lens.plane_sums import MEANING, centres
from regard.lens.sentences import layer
from regard.runtime.head_table import HeadTable
from regard.runtime.image_panel import ImagePanel
from regard.runtime.panels import MapPanel
from regard.runtime.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Position = tuple[float, float]


@dataclass(frozen=True, eq=False)
class SiteMaps:
    """The maps of one block or layer.

    Attributes:
        kind: "probability", "factor" or "gate", as `regard.attention.block.MAP_KINDS` says.
        head: what has a map of its own: "head", "channel" or "group".
        mean: float32 [heads, H, W], over all images seen.
        seen: how many they were.
        images: [heads, H, W] of each image that was kept.
        rows: float32 [heads, others + positions, H, W] of each such image, of a block with queries: first the
            rows of tokens that are no position, such as a class token, then those of `at`.
        queries: height and width of the plane of the queries, or None where there are none.
        at: which positions of that plane have rows, y W + x.
        others: how many tokens are no position.
    """

    kind: str
    head: str
    mean: Tensor
    seen: int
    images: tuple[Tensor, ...] = ()
    rows: tuple[Tensor, ...] = ()
    queries: tuple[int, int] | None = None
    at: tuple[int, ...] = ()
    others: int = 0


@dataclass(frozen=True, eq=False)
class SeenMaps:
    """Maps over the image, and numbers of each head.

    Attributes:
        heads: numbers a head; `regard.lens.plane_sums` has their formulas.
        sites: alias -> maps.
        pixels: the images kept, float32 [C, H, W], as the model was given them.

    Example:
        >>> with regard.watch(model, ImageMaps()) as seen:                    # doctest: +SKIP
        ...     model(pixel_values)
        >>> seen[ImageMaps].map(0, 1).shape                                   # doctest: +SKIP
        torch.Size([14, 14])
    """

    heads: HeadTable
    sites: Mapping[str, SiteMaps]
    pixels: tuple[Tensor, ...] = ()

    @property
    def table(self) -> Table:
        """One row a head."""
        return self.heads.table

    def site(self, layer: int | str) -> SiteMaps:
        """Return all of one layer, by number or alias.

        Raises:
            NoSuchSite: where it was not seen.
        """
        return self.sites[self._alias(layer)]

    def map(self, layer: int | str, head: int, image: int | None = None) -> Tensor:
        """Return the map of one head, float32 [H, W].

        Args:
            layer: number or alias, such as `image.3`.
            head: head, channel or group.
            image: which of the images kept; None for the mean over all that were seen.

        Raises:
            NoSuchSite: for a layer or head that was not seen.
            NothingObserved: for an image that was not kept.
        """
        found = self.site(layer)
        self._check(layer, head)
        return (found.mean if image is None else self._kept(found.images, image))[head]

    def rows(
        self, layer: int | str, head: int, at: Position | None = None, image: int = 0, other: int = 0
    ) -> Tensor:
        """Return what one position attends to, float32 [H, W].

        Args:
            layer, head: as in `map`.
            at: where in the image, pixels (y, x) from the top left; the nearest position kept is taken. None
                for a token that is no position, such as a class token.
            image: which of the images kept.
            other: which such token, where `at` is None.

        Raises:
            NoSuchSite: for a layer or head that was not seen, or has no such token.
            NothingObserved: where no rows were kept.
        """
        found = self.site(layer)
        self._check(layer, head)
        if found.queries is None:
            raise NothingObserved(f"{self._alias(layer)} has one map a {found.head} and no rows; use map().")
        rows = self._kept(found.rows, image)[head]
        if at is None:
            if not 0 <= other < found.others:
                raise NoSuchSite(f"{self._alias(layer)} has {found.others} tokens that are no position.")
            return rows[other]
        return rows[found.others + self._nearest(found, at, image)]

    def named(self, site: str, head: int) -> str:
        """Return a head in words, such as `layer 3 channel 5`."""
        return f"{layer(site)} {self.sites[site].head} {head}"

    def draw(
        self, layer: int | str, head: int, image: int = 0, at: Position | None = None,
        path: str | Path | None = None,
    ) -> Figure:  # fmt: skip
        """Draw a map beside its image, or with `at` what that position attends to.

        Raises:
            RegardError: where matplotlib is not installed, or the path cannot be written.
        """
        from regard.lens.image_drawing import draw

        values = self.map(layer, head, image) if at is None else self.rows(layer, head, at, image)
        title = self.named(self._alias(layer), head)
        return draw(values, self._kept(self.pixels, image), title, self.site(layer).kind, at, path)

    def plot(self, column: str | None = None, path: str | Path | None = None) -> Figure:
        """Draw a column of `heads` as a heat map; see `HeadTable.plot`."""
        return self.heads.plot(column, path)

    def panels(self) -> tuple[MapPanel | ImagePanel, ...]:
        """Return the map of heads, and the maps over the images kept, or the mean map, of each layer."""
        shown = [
            ImagePanel(
                site=alias, kind=s.kind, head=s.head, pixels=self.pixels,
                maps=tuple(x.numpy() for x in s.images) or (s.mean.numpy(),),
                rows=tuple(x.numpy() for x in s.rows), queries=s.queries, at=s.at, others=s.others,
            )
            for alias, s in self.sites.items()
        ]  # fmt: skip
        (whole,) = self.heads.panels()
        numbers = [
            replace(whole, values={column: grid}, note=MEANING[column])
            for column, grid in whole.values.items()
        ]
        return (*numbers, *shown)

    def save(self, path: str | Path) -> None:
        """Write `heads` as JSON; see `HeadTable.save`."""
        self.heads.save(path)

    def _alias(self, layer: int | str) -> str:
        if isinstance(layer, int):
            kinds = list(dict.fromkeys(alias.rpartition(".")[0] for alias in self.sites))
            main = self.heads.about.get("main")
            layer = f"{main if main in kinds else kinds[0]}.{layer}"
        if layer not in self.sites:
            raise NoSuchSite(f"no map of {layer} was seen; there are those of {', '.join(self.sites)}.")
        return layer

    def _check(self, layer: int | str, head: int) -> None:
        found = self.site(layer)
        if not 0 <= head < len(found.mean):
            raise NoSuchSite(
                f"{self._alias(layer)} has no {found.head} {head}; it has 0 to {len(found.mean) - 1}."
            )

    def _kept(self, kept: tuple[Tensor, ...], image: int) -> Tensor:
        if not 0 <= image < len(kept):
            raise NothingObserved(
                f"image {image}: {len(kept)} were kept; ask for more with ImageMaps(images=)."
            )
        return kept[image]

    def _nearest(self, found: SiteMaps, at: Position, image: int) -> int:
        height, width = self._kept(self.pixels, image).shape[1:]
        if not (0 <= at[0] < height and 0 <= at[1] < width):
            raise RegardError(f"at is {at}; it must be (y, x) within {height} x {width} pixels.")
        assert found.queries is not None
        own = centres(found.queries, (height, width))[list(found.at)]
        apart: Tensor = (own - own.new_tensor(at)).square().sum(-1)
        return int(apart.argmin())

    def _repr_html_(self) -> str:
        return self.heads._repr_html_()

    def __str__(self) -> str:
        return str(self.heads)
