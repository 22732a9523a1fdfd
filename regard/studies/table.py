"""The page that tabulates all outcomes of a folder, made from their JSON files and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regard.errors import RegardError
from regard.runtime.table import write_text
from regard.studies.claims import shown
from regard.studies.outcome import MARKS, Outcome, outcomes_in

INTRODUCTION = """# Outcomes of the studies

Every study tests one paper's claims small, by rules written before it ran, and reports what came out.
[The page on studies](../study.md) says what a verdict means and how to run one. This page is made from the
JSON files beside it, by `regard study --table docs/results`; each of those was made by the command it holds,
with `--out docs/results`. Intervals are at 95 %.
"""


def write_page(folder: str | Path) -> Path:
    """Write `README.md` into a folder, from the full outcomes in it, and return its path.

    Raises:
        RegardError: where there is none, one is damaged, or the page cannot be written.
    """
    path = Path(folder) / "README.md"
    if not path.parent.is_dir():
        raise RegardError(f"there is no folder {folder}.")
    outcomes = outcomes_in(folder)
    if not outcomes:
        raise RegardError(f"{folder} holds no outcome of a full study.")
    write_text(path, page(outcomes, Path(folder)))
    return path


def page(outcomes: Mapping[str, Outcome], folder: Path) -> str:
    """Return the page as Markdown.

    Args:
        outcomes: slug -> outcome.
        folder: where the pictures are looked for.
    """
    rows = [
        [
            f"[{slug}](#{slug})",
            found.paper,
            f"{MARKS[found.verdict]} {found.verdict}",
            found.held,
            f"{found.seconds:.0f} s",
        ]
        for slug, found in outcomes.items()
    ]
    overview = _table(["study", "paper", "verdict", "claims", "took"], rows)
    parts = [INTRODUCTION, overview, *(_section(found, folder) for found in outcomes.values())]
    return "\n".join(parts)


def _section(found: Outcome, folder: Path) -> str:
    picture = f"![What {found.study} measured]({found.name}.png)\n"
    where = found.machine["accelerator"] or found.machine["processor"]
    told = [
        f"## {found.study}\n",
        f"*{found.title}* ({found.paper}). Verdict on its main claims (in bold): **{found.verdict}**.\n",
    ]
    if not found.rules_first:
        told.append("The rules were changed after the first step had run.\n")
    if (folder / f"{found.name}.png").is_file():
        told.append(picture)
    told.append(_claims(found))
    told += [f"{remark}\n" for remark in found.details.get("remarks", [])]
    told.append(_measures(found))
    told.append(
        f"[{found.name}.json]({found.name}.json): `{found.command}`, finished {found.finished} after "
        f"{found.seconds:.0f} s of steps on {found.machine['cores']} cores of {where}, "
        f"torch {found.versions['torch']}, transformers {found.versions['transformers']}.\n"
    )
    return "\n".join(told)


def _claims(found: Outcome) -> str:
    rows = []
    for claim in found.claims:
        rules = [*claim["needs"], *claim["rules"]]
        text = f"**{claim['text']}**" if claim["main"] else claim["text"]
        rows.append(
            [
                text,
                f"{MARKS[claim['verdict']]} {claim['verdict']}",
                "<br>".join(f"`{rule['text']}`" for rule in rules),
                "<br>".join(_contrast(rule, found.measures) for rule in rules),
                claim["paper"] or "-",
            ]
        )
    return _table(["claim", "verdict", "rule", "measured", "in the paper"], rows)


def _contrast(rule: Mapping[str, Any], measures: Mapping[str, Any]) -> str:
    unit = measures[rule["measure"]]["unit"]
    p = "" if rule["p"] is None else f", p {_p(rule['p'])}"
    why = f" ({rule['why']})" if rule["why"] else ""
    return f"{shown(rule['value'], unit)}{_interval(rule, unit)}{p}{why}"


def _measures(found: Outcome) -> str:
    rows = []
    for name, measure in found.measures.items():
        unit = measure["unit"]
        values = f"{len(measure['values'])} {measure['over']}"
        number = f"{shown(measure['value'], unit)}{_interval(measure, unit)}"
        rows.append([f"`{name}`", measure["about"], number, values])
    return _table(["measure", "what it is", "mean", "over"], rows)


def _interval(told: Mapping[str, Any], unit: str) -> str:
    if told["low"] is None:
        return ""
    return f" ({shown(told['low'], unit)} to {shown(told['high'], unit)})"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
