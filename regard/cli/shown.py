"""What `regard inspect` prints: the findings in words, then a layers x heads map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regard.cli.grid import PLAIN_SHADES, SHADES, grid
from regard.cli.looking import PROBE_LENSES, Look
from regard.cli.page import Page
from regard.lens import LENSES
from regard.runtime.difference import heads_of
from regard.runtime.head_table import HeadTable

MAPS = {
    "sinks": ("first", "attention on the first token, in per cent"),
    "column-mass": ("first", "mean attention that the first token receives, in per cent"),
    "entropy": ("normalised", "entropy, in per cent of the greatest possible"),
    "mean-distance": ("distance", "mean distance of attention, in tokens"),
    "previous-token": ("score", "attention to the token before, in per cent"),
    "duplicate-token": ("score", "attention to the same token earlier, in per cent"),
    "induction": ("score", "attention to what followed the same token earlier, in per cent"),
    "value-norm": ("drain", "size of the first token's value, relative to the others'"),
    "head-output-norm": ("norm", "size of what each head writes into the residual stream"),
}


def print_look(
    look: Look, main: dict[str, Any], probe: dict[str, Any], all_maps: bool, report: Path | None = None
) -> None:
    """Print what was found.

    Args:
        look: the model and the text.
        main: results on the text, by name of the lens.
        probe: results on the random tokens.
        all_maps: show the map of every lens, rather than that of the first there is.
        report: where the page to look at was written, if it was.
    """
    page = Page()
    page.line(_headline(look))
    page.line()
    page.line(f"On {look.origin} ({look.tokens} tokens)", "bold")
    for name, result in main.items():
        _say(page, name, result, name in probe)
    if probe:
        page.line()
        page.line(f"On {look.probe_words}", "bold")
    for name, result in probe.items():
        for finding in LENSES[name].findings(result):
            page.sentence(finding.text)
    maps = [name for name in (*MAPS, *main) if name in main and heads_of(main[name]) is not None]
    for name in list(dict.fromkeys(maps))[: None if all_maps else 1]:
        _map(page, name, heads_of(probe.get(name, main[name])), name in probe)
    if report is not None:
        page.line()
        page.line(f"Open {report} in a browser to see every head.")
    page.show()


def _headline(look: Look) -> Any:
    from rich.text import Text

    return Text.assemble((look.name, "bold"), f", {look.size}")


def _say(page: Page, name: str, result: Any, probed: bool) -> None:
    """The sentences of a lens; the rows themselves, of one that has neither sentences nor a map."""
    findings = () if name in PROBE_LENSES else LENSES[name].findings(result)
    for finding in findings:
        page.sentence(finding.text)
    if not findings and not probed and heads_of(result) is None:
        page.sentence(f"{name}:")
        for line in str(result.table).splitlines():
            page.line(f"  {line}")


def _map(page: Page, name: str, table: HeadTable | None, probed: bool) -> None:
    assert table is not None
    column, title = MAPS.get(name) or (next(iter(table.columns)), "")
    shades = SHADES if page.holds(SHADES) else PLAIN_SHADES
    page.line()
    page.line((title or f"{name}: {column}") + (", on the random tokens" if probed else ""), "bold")
    for line in grid(table.grid(column), percent="per cent" in title, width=page.width, shades=shades):
        page.line(line)
