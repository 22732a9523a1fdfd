"""`regard inspect --lens retrieval`: hide facts in texts, and show which heads copy them out."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from regard import __version__
from regard.cli import fit, given
from regard.cli.command import say
from regard.cli.grid import PLAIN_SHADES, SHADES, grid
from regard.cli.looking import RECORDER, Look
from regard.cli.page import Page
from regard.errors import RegardError
from regard.lens.retrieval_heads.answering import rouge_recall
from regard.lens.retrieval_heads.detection import detect
from regard.lens.retrieval_heads.scores import RetrievalScores, leading_panel
from regard.report import Recorder, Report, Section
from regard.runtime.panels import Panel
from regard.runtime.table import finite, write_text
from regard.tasks.needles import DEPTHS, LENGTHS, Asked, Needles, needle, packaged_facts
from regard.weights import Source
from regard.weights.quiet import busy

PROMPTS, LEAST, FORMAT = 24, 4, 1
TITLE = "retrieval score: share of the fact copied while looking at it, in per cent"


def run(options: argparse.Namespace) -> int:
    """Search for retrieval heads; print what was found, and write it where that is asked for."""
    if options.task is not None:
        raise RegardError("--task is for --lens circuits; --lens retrieval has one task.")
    json_path, csv_path = given.check_outputs(options.json, options.csv)
    report = given.check_report(options.report, options.no_report, (json_path, csv_path))
    rouge_recall()
    source = Source.find(options.model)
    with busy(f"Preparing {source.name}"):
        fit.check_reads_text(source)
        prompts = _prompts(source, options.prompts, options.seed or 0)
    look = Look.of(options.model, prompts[0].prompt, "a prompt", None, options.dtype, options.device)
    found = detect(look.model, look.tokenizer, prompts, name=look.name)
    if report is not None:
        with busy(f"Writing {report}"):
            write_report(report, look, prompts, found)
    if json_path is not None:
        _write(json_path, as_json(look, found))
    if csv_path is not None:
        _write(csv_path, found.table.to_csv())
    if given.STANDARD not in (json_path, csv_path):
        _print(look, prompts, found, report)
    return 0


def _prompts(source: Source, count: int | None, seed: int) -> Needles:
    """Return so many prompts, each fact at two depths."""
    facts, count = packaged_facts(), PROMPTS if count is None else count
    most = len(DEPTHS) * len(facts)
    if not LEAST <= count <= most:
        raise RegardError(f"--prompts is {count}; it must be from {LEAST} to {most}.")
    longest = fit.longest(source.skeleton())
    room = LENGTHS[0] if longest is None else min(LENGTHS[0], longest - PROMPTS)
    if room < PROMPTS:
        raise RegardError(f"{source.name} takes {longest} tokens, too few to hide a fact in.")
    made = needle(source.tokenizer, lengths=(room,), facts=facts[: -(-count // len(DEPTHS))], seed=seed)
    return dataclasses.replace(made, prompts=made.prompts[:count])


def write_report(path: Path, look: Look, prompts: Needles, found: RetrievalScores) -> None:
    """Write the page: the map of heads, the leading ones, answers by depth, and patterns on one prompt."""
    shown = _shown(prompts, found)
    look = dataclasses.replace(look, ids=shown.ids[None].to(look.ids.device))
    seen = look.at_text({RECORDER: Recorder(name=RECORDER)}, None, True)
    panels: list[Panel] = [*found.panels(), *leading_panel(found), found.depths()]
    section = Section(
        title=f"On {_words(prompts)}", short="needles", findings=found.findings(), panels=panels,
        recorded=seen[RECORDER],
    )  # fmt: skip
    place = f"tokens {shown.span[0]} to {shown.span[1] - 1}" if shown.span else ""
    facts = [look.size, f"patterns: the prompt in which {shown.answer!r} is hidden ({place})"]
    page = Report(
        title=look.name,
        facts=facts,
        sections=[section],
        tokens=look.tokenizer,
        colours=("retrieval", "score"),
    )
    page.save(path)


def _shown(prompts: Needles, found: RetrievalScores) -> Asked:
    """The first prompt that was answered, or else the first."""
    pairs = zip(prompts, found.records, strict=True)
    return next((asked for asked, record in pairs if record.counted), prompts[0])


def _words(prompts: Needles) -> str:
    facts = f"{len(prompts.facts)} facts hidden in packaged passages"
    return f"{len(prompts)} prompts of {prompts[0].length} tokens, {facts}"


def as_json(look: Look, found: RetrievalScores) -> str:
    """Return every number; docs/look.md tells the keys."""
    document: dict[str, Any] = {
        "format": FORMAT,
        "regard": __version__,
        "model": {"name": look.name, "class": type(look.model).__name__, "layers": look.layers},
        "about": found.about,
        "answered": found.answered,
        "counted": found.counted,
        "chance": finite(found.chance),
        "prompts": [dataclasses.asdict(record) for record in found.records],
        "heads": [{key: finite(value) for key, value in row.items()} for row in found.table.rows()],
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _print(look: Look, prompts: Needles, found: RetrievalScores, report: Path | None) -> None:
    from rich.text import Text

    page = Page()
    page.line(Text.assemble((look.name, "bold"), f", {look.size}"))
    page.line()
    page.line(f"On {_words(prompts)}", "bold")
    for finding in found.findings():
        page.sentence(finding.text)
    if found.counted:
        page.line()
        page.line(TITLE, "bold")
        shades = SHADES if page.holds(SHADES) else PLAIN_SHADES
        for line in grid(found.grid("score"), percent=True, width=page.width, shades=shades):
            page.line(line)
    if report is not None:
        page.line()
        page.line(f"Open {report} in a browser to see every head.")
    page.show()


def _write(path: Path, text: str) -> None:
    if path == given.STANDARD:
        say(text)
    else:
        write_text(path, text)
