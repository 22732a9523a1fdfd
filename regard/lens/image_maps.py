"""What an image model weights the positions of its images with: maps, and rows of weights of some positions.

Of a block with one map a head the map M is taken as it is. Of one with queries, and of a vision transformer's
attention A over its patches, the map is what each position receives, and some rows of A are kept beside it:

    M_j = mean over queries i of A_ij

averaged over all images, with the numbers of `plane_sums` for each head, and

    varies = 1 - sum_j (mean M_j)^2 / sum_j mean (M_j^2)      0 where the map is the same for all images

Images are gone through one by one, and queries in parts, so that memory grows with heads and positions, not
with their square. Weights on a class token, registers, or padding are told as `off_image`.
Source: our choice; distances as in Dosovitskiy et al., 2020, arXiv 2010.11929, appendix D.7, in the plane.
Status: paper only for the distance, our choice for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.engines.rows import RowBlock
from regard.errors import NothingObserved, RegardError
from regard.lens.base import Measure, head_table
from regard.lens.image_result import SeenMaps, SiteMaps
from regard.lens.patches import patches_of
from regard.lens.plane_sums import COLUMNS, Grid, PlaneSums, of_maps, spread_positions
from regard.lens.registry import lens
from regard.lens.sentences import size
from regard.runtime.call import Call
from regard.runtime.findings import Finding
from regard.runtime.head_table import HeadTable
from regard.runtime.planes import Plane, pixels_of
from regard.runtime.protocol import EVERYTHING, Wanted
from regard.runtime.run import Run

CELLS = 2**20
NOTHING = 1e-6


@dataclass(frozen=True)
class _Images:
    """Where the images themselves are kept in a tally."""

    alias: str = "pixels.0"
    kind: str = "pixels"
    layer: int = 0
    name: str = ""


@lens("image-maps")
@dataclass(frozen=True, kw_only=True, eq=False)
class ImageMaps(Measure):
    """Measure and keep the maps of an image model; the result is a `SeenMaps`.

    It reads blocks that show maps or rows (`Block.shows`), and attention over the patches of `pixel_values`.

    Attributes:
        images: keep the maps of so many images singly, the first seen; 0 for the means alone.
        positions: of each kept image, keep the rows of at most so many positions, in even steps; 0 for none.
            Memory is 2 bytes x heads x positions x H W an image and layer.

    Raises:
        RegardError: where a number is below 0.
    """

    definition = (
        "weights over the positions of an image: of a block with queries, the mean that each receives"
    )
    source = "distance: Dosovitskiy et al. 2020, arXiv 2010.11929; the rest our choice"
    needs = (
        "it takes a model whose blocks show maps or rows, or a vision transformer of patches run with "
        "pixel_values [B, C, H, W]"
    )

    images: int = 1
    positions: int = 256

    def __post_init__(self) -> None:
        for name in ("images", "positions"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise RegardError(f"{name} is {value!r}; it must be a whole number from 0.")

    def prepare(self, run: Run, kwargs: dict[str, Any]) -> None:
        pixels = pixels_of(run)
        wanted = self.images - len(self.tally.get("image").get(_Images.alias, ()))
        for image in () if pixels is None else pixels[: max(0, wanted)]:
            self.tally.append(_Images(), "image", image.detach().float().cpu().clone())

    def plane(self, plane: Plane) -> None:
        image = pixels_of(plane.run)
        if plane.shows == "maps":
            found = plane.maps()
            about = {"kind": found.kind, "head": found.head, "shows": "maps"}
            total, count = of_maps(found.values, found.kind)
            self._note(plane.site, found.values, about, total, count)
            return
        if image is None:
            raise RegardError(
                f"ImageMaps found no image [B, C, H, W] among the arguments of {plane.site.name}."
            )
        for item in range(len(plane.x)):
            self._rows(plane, item, (image.shape[2], image.shape[3]))

    def _rows(self, plane: Plane, item: int, pixels: Grid) -> None:
        queries, keys = plane.grids()
        sums = PlaneSums(queries, keys, pixels)
        count = queries[0] * queries[1]
        chosen = self._chosen(plane.site, queries)
        kept = []
        step = 1
        start = 0
        while start < count:
            at = torch.arange(start, min(count, start + step))
            rows = plane.rows(item, at)
            sums.add(rows, at)
            inside = chosen[(chosen >= start) & (chosen < start + len(at))]
            kept.append(rows[0][:, inside - start].half().cpu())
            start += len(at)
            step = max(1, CELLS // (rows.shape[1] * rows.shape[3]))
        about = {"shows": "rows", "others": 0}
        self._finish(plane.site, sums, about, torch.cat(kept, 1)[None] if len(chosen) else None)

    def wants(self, call: Call) -> Wanted | None:
        return EVERYTHING if patches_of(call) is not None else None

    def weights(self, block: RowBlock) -> None:
        call = block.call
        patches = patches_of(call)
        assert patches is not None
        state = block.run.state(self, block.site, call.part)
        if not state:
            state["sums"] = PlaneSums(patches.grid, patches.grid, patches.pixels)
            state["chosen"], state["kept"], state["others"] = self._chosen(block.site, patches.grid), [], []
        rows = block.weights
        if rows.shape[3] < call.key_length:
            whole = rows.new_zeros(*rows.shape[:3], call.key_length)
            whole[..., block.key_start : block.key_stop] = rows
            rows = whole
        rows = rows[..., patches.others :]
        at = torch.arange(block.start, block.start + rows.shape[2]) - patches.others
        inside = at >= 0
        keep = slice(0, self._room(block.site))
        if not inside.all() and len(state["chosen"]):
            state["others"].append(rows[keep][:, :, ~inside].half().cpu())
        if inside.any():
            rows, at = rows[:, :, inside], at[inside]
            state["sums"].add(rows, at)
            own = torch.isin(at, state["chosen"])
            state["kept"].append(rows[keep][:, :, own].half().cpu())

    def end_call(self, call: Call) -> None:
        state = call.run.state(self, call.site, call.part)
        if "sums" not in state:
            return
        patches = patches_of(call)
        assert patches is not None
        kept = torch.cat([*state["others"], *state["kept"]], 2) if len(state["chosen"]) else None
        self._finish(call.site, state["sums"], {"shows": "rows", "others": patches.others}, kept)
        state.clear()

    def _finish(self, site: Any, sums: PlaneSums, about: dict[str, Any], rows: Tensor | None) -> None:
        """Add what a block or layer with queries gave; `rows` are [B, heads, others + Q, H W], or None."""
        total, count = sums.columns()
        values = sums.mean_received()
        if rows is not None:
            for kept in rows[: min(len(values), self._room(site))]:
                self.tally.append(site, "rows", kept.unflatten(-1, sums.keys).clone())
        about = {**about, "kind": "probability", "head": "head", "queries": list(sums.queries)}
        self._note(site, values, about, total, count)

    def _note(self, site: Any, values: Tensor, about: dict[str, Any], total: Tensor, count: Tensor) -> None:
        """Add maps [B, heads, H, W] and sums of numbers."""
        for kept in values[: self._room(site)]:
            self.tally.append(site, "kept", kept.float().cpu().clone())
        values = values.double()
        self.tally.mean(site, "map", values.sum(0), len(values))
        self.tally.mean(site, "square", values.square().sum(0), len(values))
        self.tally.mean(site, "columns", total, count.cpu())
        if site.alias not in self.tally.get("about"):
            self.tally.append(site, "about", about)

    def _room(self, site: Any) -> int:
        return max(0, self.images - len(self.tally.get("kept").get(site.alias, ())))

    def _chosen(self, site: Any, queries: Grid) -> Tensor:
        if not self.positions or not self._room(site):
            return torch.zeros(0, dtype=torch.int64)
        return spread_positions(queries, self.positions)

    def result(self) -> SeenMaps:
        """Return the maps and numbers of all sites seen.

        Raises:
            NothingObserved: where the model shows no map over an image.
        """
        found = {name: self.tally.get(name) for name in ("map", "square", "columns", "about", "kept", "rows")}
        if not found["map"]:
            raise NothingObserved(f"ImageMaps has seen nothing: {self.needs}.")
        values, sites = {}, {}
        for alias, mean in found["map"].items():
            count = int(self.tally.count("map")[alias])
            numbers = dict(zip(COLUMNS, found["columns"][alias], strict=True))
            numbers["varies"] = _varies(mean, found["square"][alias], count)
            values[alias] = numbers
            rows = found["rows"].get(alias, [])
            about = found["about"][alias][0]
            queries = about.get("queries")
            at = spread_positions(tuple(queries), self.positions).tolist() if rows else []
            sites[alias] = SiteMaps(
                kind=about["kind"], head=about["head"], mean=mean.float(), seen=count,
                images=tuple(found["kept"].get(alias, ())), rows=tuple(r.float() for r in rows),
                queries=tuple(queries) if queries else None, at=tuple(at), others=about.get("others", 0),
            )  # fmt: skip
        used = [c for c in (*COLUMNS, "varies") if any(_told(c, x[c]) for x in values.values())]
        values = {alias: {c: x[c] for c in used} for alias, x in values.items()}
        images = tuple(self.tally.get("image").get(_Images.alias, ()))
        return SeenMaps(head_table(HeadTable, self, values), sites, images)

    @classmethod
    def findings(cls, result: SeenMaps) -> tuple[Finding, ...]:
        return tuple(
            finding
            for column, most, least in SAID
            if column in result.heads.columns
            for finding in _said(result, column, most, least)
        )


SAID = (
    ("distance", "looks furthest, {} pixels away on average", "nearest, {}"),
    ("entropy", "weights positions most evenly, at {} of the greatest entropy", "most sharply, at {}"),
    ("border", "is the most drawn to the border, {} times as much as even weights", "the least, {} times"),
    (
        "off_image",
        "puts the most weight on what is no position (a class token, padding), {}",
        "the least, {}",
    ),
    ("varies", "differs most between images, by {} of its size", "least, by {}"),
)


def _said(result: SeenMaps, column: str, most: str, least: str) -> tuple[Finding, ...]:
    high = result.heads.top(column, 1)
    low = result.heads.top(column, 1, largest=False)
    if not high or (column == "varies" and high[0][2] < NOTHING):
        return ()
    ends = [result.named(*row[:2]) for row in (high[0], low[0])]
    told = [size(row[2]) for row in (high[0], low[0])]
    if told[0] == told[1]:
        return ()
    text = f"{ends[0][0].upper()}{ends[0][1:]} {most.format(told[0])}; {ends[1]} {least.format(told[1])}."
    return (Finding(text, (high[0][:2], low[0][:2]), "image-maps"),)


def _told(column: str, values: Tensor) -> bool:
    """Whether a column says anything: some number is known, and of weight off the image some is not 0."""
    known = values[~values.isnan()]
    return bool((known != 0).any()) if column == "off_image" else len(known) > 0


def _varies(mean: Tensor, square: Tensor, count: int) -> Tensor:
    """Share of a map's squared size that differs between images, [heads]; NaN of one image."""
    if count < 2:
        return torch.full((len(mean),), torch.nan, dtype=torch.float64)
    whole = square.sum((1, 2))
    return torch.where(whole > 0, 1 - mean.square().sum((1, 2)) / whole.clamp_min(1e-300), 0.0)
