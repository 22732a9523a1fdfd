"""The report that `regard inspect` writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from regard.cli.looking import RECORDER, Look
from regard.report import Recorder, Report, Section
from regard.runtime.protocol import Lens

COLOURS = ("sinks", "first")


def recording(lenses: dict[str, Lens]) -> dict[str, Lens]:
    """Return the lenses, and beside them the one that keeps the patterns for the page."""
    return {**lenses, RECORDER: Recorder(name=RECORDER)}


def write(
    path: Path, look: Look, lenses: dict[str, Lens], main: dict[str, Any], probe: dict[str, Any]
) -> Report:
    """Write the page of one look; `main` and `probe` lose what the recorder kept.

    Args:
        main, probe: results by lens, on the text and on the probe.
    """
    sections = []
    for title, short, results in (
        (f"On {look.origin} ({look.tokens:,} tokens)", "text", main),
        (f"On {look.probe_words}", "probe", probe),
    ):
        recorded = results.pop(RECORDER, ())
        said = {name: (lenses[name], result) for name, result in results.items()}
        if said:
            section = Section.of(title, said, short=short, recorded=recorded)
            kept = [f for f in section.findings if results is probe or f.lens not in probe]
            sections.append(replace(section, findings=kept))
    page = Report(
        title=look.name,
        facts=[look.size, f"{look.tokens:,} tokens"],
        sections=sections,
        tokens=look.tokenizer,
        colours=COLOURS,
    )
    page.save(path)
    return page
