"""What `regard inspect --lens circuits` prints: the heads of each stage, their roles, and a map."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from regard.cli.grid import PLAIN_SHADES, SHADES, grid
from regard.cli.looking import Look
from regard.cli.page import Page
from regard.lens.circuits.panels import circuit_findings

if TYPE_CHECKING:
    from regard.cli.circuit_looking import Found


def print_circuit(look: Look, found: Found, report: Path | None = None) -> None:
    """Print what was found."""
    from rich.text import Text

    page, circuit = Page(), found.circuit
    page.line(Text.assemble((look.name, "bold"), f", {look.size}"))
    page.line()
    page.line(f"On {found.said}", "bold")
    for finding in circuit_findings(circuit, found.roles):
        page.sentence(finding.text)
    stage = circuit.stages[0]
    page.line()
    page.line(f"{stage}: effect on the answer, in per cent of the corrupt prompts' change", "bold")
    shades = SHADES if page.holds(SHADES) else PLAIN_SHADES
    values = 100 * circuit.effects.grid(stage)
    for line in grid(values, percent=False, width=page.width, shades=shades):
        page.line(line)
    if report is not None:
        page.line()
        page.line(f"Open {report} in a browser for the graph, and to see every head.")
    page.show()
