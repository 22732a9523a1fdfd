"""What `regard diff` says of a comparison: on the terminal, on the page, as JSON and as CSV."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from regard.cli import effects_shown
from regard.cli.comparing import Comparison
from regard.cli.grid import PLAIN_SHADES, SHADES, grid
from regard.cli.looking import RECORDER, Look
from regard.cli.page import Page
from regard.cli.shown import MAPS
from regard.lens.sentences import head, number, size
from regard.runtime.difference import NOISE, Difference
from regard.runtime.findings import Finding
from regard.runtime.table import Table, finite

FORMAT = 1
NAMED = 3


def findings(found: Comparison) -> list[Finding]:
    """Return in words what changed: predictions, outputs, then each lens, the most changed first."""
    said = [_predicted(found)] if found.prediction is not None else []
    said += effects_shown.findings(found.effects)
    quiet = []
    for name, (d, probed) in _ranked(found):
        if d.changed(column_of(name, d)):
            said.append(_sentence(name, d, probed))
        else:
            quiet.append(_quantity(name, d, probed))
    if quiet:
        said.append(Finding(f"No head changed beyond the control in {', '.join(quiet)}."))
    return said


def _ranked(found: Comparison) -> list[tuple[str, tuple[Difference, bool]]]:
    return sorted(found.differences.items(), key=lambda item: -_share(item[0], item[1][0]))


def _quantity(lens: str, d: Difference, probed: bool) -> str:
    return f"{lens}.{column_of(lens, d)}" + ("@probe" if probed else "")


def column_of(lens: str, d: Difference) -> str:
    """Return the quantity that stands for a lens."""
    column = MAPS[lens][0] if lens in MAPS else d.columns[0]
    return column if column in d.columns else d.columns[0]


def _share(lens: str, d: Difference) -> float:
    """How far the most changed head is beyond the control, and so how telling a lens is."""
    column = column_of(lens, d)
    sizes = np.abs(d.change(column))
    largest = float(np.nanmax(sizes)) if np.isfinite(sizes).any() else 0.0
    noise = d.noise.get(column, math.nan)
    return largest / noise if noise > 0 else largest


def _predicted(found: Comparison) -> Finding:
    p = found.prediction
    assert p is not None
    return Finding(
        f"Next token, over the last {p.positions} positions: loss {p.loss_before:.3f} before and "
        f"{p.loss_after:.3f} after, in nats a token; the distributions differ by {p.divergence:.3g} nats "
        f"(KL), and the likeliest token is the same at {p.agreement:.0%}."
    )


def _sentence(lens: str, d: Difference, probed: bool) -> Finding:
    column, heads = column_of(lens, d), d.changed(column_of(lens, d))
    noise = d.noise.get(column, math.nan)
    between = "two probes" if probed else "the two halves of the text"
    control = f"by more than {size(noise)}, which {NOISE} % of heads stay within between {between}"
    if not math.isfinite(noise):
        control = "at all; the text is too short for a control"
    values = dict(zip(d.before.names, zip(d.before[column], d.after[column], strict=True), strict=True))
    most = ", then ".join(
        f"{head(h)} from {size(float(values[h][0]))} to {size(float(values[h][1]))}" for h in heads[:NAMED]
    )
    count = f"{len(heads)} of {number(len(d.before), 'head')} changed {control}"
    return Finding(f"{_quantity(lens, d, probed)}: {count}; most {most}.", tuple(heads), lens)


def summary(found: Comparison) -> Table:
    """Return one row a lens: its means, how much it changed, the control, and how many heads changed."""
    rows: dict[str, list[Any]] = {}
    for name, (d, probed) in found.differences.items():
        column = column_of(name, d)
        told = next(row for row in d.quantities.rows() if row["quantity"] == column)
        told["quantity"] = _quantity(name, d, probed)
        for key, value in told.items():
            rows.setdefault(key.replace("_", " "), []).append(value)
    return Table(rows)


def print_changed(look: Look, found: Comparison, report: Path | None) -> None:
    """Print what changed, the quantities side by side, and the map of what changed most."""
    page = Page()
    page.line(f"{found.before.name} → {found.after.name}", "bold")
    page.line(found.before.size)
    page.line()
    page.line(f"On {look.origin} ({look.tokens} tokens)", "bold")
    for finding in findings(found):
        page.sentence(finding.text)
    page.line()
    for line in str(summary(found)).splitlines():
        page.line(line)
    _print_map(page, found)
    effects_shown.print_effects(page, found.effects)
    if report is not None:
        page.line()
        page.line(f"Open {report} in a browser to see every head before and after.")
    page.show()


def _print_map(page: Page, found: Comparison) -> None:
    name, (d, probed) = _ranked(found)[0]
    column = column_of(name, d)
    if not d.changed(column):
        return
    sizes = np.abs(d.table.grid(f"{column} change"))
    sizes[~(sizes > 0).any(1)] = np.nan
    shades = SHADES if page.holds(SHADES) else PLAIN_SHADES
    page.line()
    on = ", on the random tokens" if probed else ""
    page.line(f"size of the change in {name}.{column}{on}, in layers where there is any", "bold")
    for line in grid(sizes, percent=False, width=page.width, shades=shades):
        page.line(line)


def write_page(path: Path, look: Look, found: Comparison) -> None:
    """Write the page: what changed, maps of the changes, and the patterns of both sides."""
    from regard.report import Report, Section

    name, (most, _) = _ranked(found)[0]
    maps = [p for d, _ in found.differences.values() for p in d.panels()]
    panels = [*maps, *effects_shown.panels(found.effects)]
    recorded = [side.main.pop(RECORDER, ()) for side in (found.before, found.after)]
    sections = [
        Section(
            title=f"What changed on {look.origin} ({look.tokens:,} tokens)", short="before",
            findings=findings(found), panels=panels, recorded=recorded[0],
        ),
        Section(title=f"After: {found.after.name}", short="after", recorded=recorded[1]),
    ]  # fmt: skip
    Report(
        title=f"{found.before.name} → {found.after.name}",
        facts=[found.before.size, f"{look.tokens:,} tokens"],
        sections=sections,
        tokens=look.tokenizer,
        colours=(most.panels()[0].title, f"{column_of(name, most)}: change"),
    ).save(path)


def as_json(look: Look, found: Comparison) -> str:
    """Return every number of a comparison; docs/diff.md tells the keys."""
    document = {
        "format": FORMAT,
        "before": found.before.name,
        "after": found.after.name,
        "text": {"origin": look.origin, "tokens": look.tokens},
        "prediction": None if found.prediction is None else dataclasses.asdict(found.prediction),
        **effects_shown.as_json(found.effects),
        "on_text": {name: _told(d) for name, d in found.text.items()},
        "on_probe": {name: _told(d) for name, d in found.probe.items()},
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _told(d: Difference) -> dict[str, Any]:
    return {
        "quantities": [_finite(row) for row in d.quantities.rows()],
        "heads": [_finite(row) for row in d.table.table.rows()],
    }


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {key: finite(value) for key, value in row.items()}


def as_csv(found: Comparison) -> str:
    """Return one line a head; columns are `lens.column before`, `after` and `change`, and `@probe`."""
    columns: dict[str, dict[Any, float]] = {}
    names: dict[Any, None] = {}
    for suffix, part in (("", found.text), ("@probe", found.probe)):
        for lens, d in part.items():
            for column, values in d.table.columns.items():
                columns[f"{lens}.{column}{suffix}"] = dict(zip(d.before.names, values.tolist(), strict=True))
            names.update(dict.fromkeys(d.before.names))
    told = {name: [values.get(h, math.nan) for h in names] for name, values in columns.items()}
    return Table({"site": [s for s, _ in names], "head": [h for _, h in names], **told}).to_csv()
