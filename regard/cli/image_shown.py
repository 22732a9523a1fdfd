"""What `regard inspect --image` prints: sentences, then numbers a head, or of many channels a layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regard.cli.grid import PLAIN_SHADES, SHADES, grid
from regard.cli.image_looking import MAPS, ImageLook
from regard.cli.page import Page
from regard.lens import SeenMaps
from regard.lens.plane_sums import MEANING
from regard.runtime.protocol import Lens
from regard.runtime.table import Table

WIDE = 32
SHOWN = ("distance", "entropy", "varies", "negative")


def print_look(
    look: ImageLook, lenses: dict[str, Lens], results: dict[str, Any], report: Path | None = None
) -> None:
    """Print what was found: sentences, then numbers a head, or of layers of many channels, a layer."""
    from rich.text import Text

    page, maps = Page(), results[MAPS]
    page.line(Text.assemble((look.name, "bold"), f", {look.size(maps)}"))
    page.line()
    page.line(f"On {look.origin}: {look.preparation.words()}", "bold")
    for name, result in results.items():
        for finding in lenses[name].findings(result):
            page.sentence(finding.text)
    few = {a: site for a, site in maps.sites.items() if site.head != "channel" and len(site.mean) <= WIDE}
    if few:
        _print_heads(page, maps, few)
    if len(few) < len(maps.sites):
        _print_layers(page, maps, [alias for alias in maps.sites if alias not in few])
    if report is not None:
        page.line()
        page.line(f"Open {report} in a browser to see the maps of every layer.")
    page.show()


def _print_heads(page: Page, maps: SeenMaps, few: dict[str, Any]) -> None:
    shades = SHADES if page.holds(SHADES) else PLAIN_SHADES
    table = maps.heads
    for column in [c for c in SHOWN if c in table.columns]:
        values = table.grid(column)
        keep = [alias in few for alias in _ordered(maps, values.shape[0])]
        shown = np.where(np.array(keep)[:, None], values, np.nan)[:, : max(len(s.mean) for s in few.values())]
        if not np.isfinite(shown).any():
            continue
        page.line()
        page.line(f"{column}: {MEANING[column]}", "bold")
        for line in grid(shown, percent=False, width=page.width, shades=shades):
            page.line(line)


def _ordered(maps: SeenMaps, count: int) -> list[str]:
    main = maps.heads.about.get("main")
    return [f"{main}.{number}" for number in range(count)]


def _print_layers(page: Page, maps: SeenMaps, aliases: Sequence[str]) -> None:
    """The median of each number over the channels of each layer."""
    columns: dict[str, list[Any]] = {"layer": [], "positions": [], "maps": []}
    used = [c for c in maps.heads.columns if c != "off_image"]
    for alias in aliases:
        site = maps.sites[alias]
        columns["layer"].append(alias)
        columns["positions"].append(" x ".join(map(str, site.mean.shape[1:])))
        columns["maps"].append(f"{len(site.mean)} {site.head}s")
        for column in used:
            values = np.array([maps.heads.at(alias, head)[column] for head in range(len(site.mean))])
            known = values[np.isfinite(values)]
            columns.setdefault(column, []).append(float(np.median(known)) if len(known) else float("nan"))
    page.line()
    page.line("Median over the channels of each layer", "bold")
    for line in str(Table(columns)).splitlines():
        page.line(line)
