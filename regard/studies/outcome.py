"""What a study found: what its JSON holds, and the lines for the terminal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regard.errors import RegardError
from regard.runtime.table import write_text
from regard.studies.claims import HOLDS, VERDICTS, shown

FORMAT = 1
MARKS = dict(zip(VERDICTS, ("✓", "✗", "?"), strict=True))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of one run of a study.

    Attributes:
        study: its slug.
        title: the paper's title.
        paper: authors, year, arXiv id.
        quick: whether it ran at the size for a try, whose verdict says little.
        verdict: `holds`, `does not hold here` or `cannot be told at this size`.
        claims: each with its verdict and its rules, each with its numbers.
        measures: name -> what it is, mean, 95 % interval and values.
        details: what else the study reports.
        rules_first: whether the rules are those written down before the first step ran.
        size: what the study was given.
        seed: what all chance was derived from.
        command: what ran it.
        steps: name and seconds of each.
        seconds: all steps together, those of an earlier run included.
        machine: what it ran on.
        versions: of Python, regard and packages.
        finished: date.
        format: of the file.
    """

    study: str
    title: str
    paper: str
    quick: bool
    verdict: str
    claims: list[dict[str, Any]]
    measures: dict[str, dict[str, Any]]
    details: dict[str, Any]
    rules_first: bool
    size: dict[str, Any]
    seed: int
    command: str
    steps: list[dict[str, Any]]
    seconds: float
    machine: dict[str, Any]
    versions: dict[str, str]
    finished: str
    format: int = field(default=FORMAT)

    @property
    def name(self) -> str:
        """The stem of its files; a quick outcome has one of its own, and never replaces a full one."""
        return f"{self.study}.quick" if self.quick else self.study

    @property
    def held(self) -> str:
        """How many of its claims hold, in words."""
        count = sum(claim["verdict"] == HOLDS for claim in self.claims)
        return f"{count} of {len(self.claims)} claims hold"

    def value(self, measure: str) -> float:
        """Return the mean of a measure; NaN where it is not a number.

        Raises:
            RegardError: where there is no such measure.
        """
        if measure not in self.measures:
            raise RegardError(f"no measure {measure!r}; there are {', '.join(self.measures)}.")
        found = self.measures[measure]["value"]
        return float("nan") if found is None else float(found)

    def to_json(self) -> str:
        """Return the outcome as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def write(self, folder: str | Path) -> Path:
        """Write `NAME.json` into a folder, whole or not at all, and return its path.

        Raises:
            RegardError: where it cannot be written.
        """
        path = Path(folder) / f"{self.name}.json"
        write_text(path, self.to_json())
        return path

    def lines(self) -> list[str]:
        """Return what a person reads first: the verdict, then every claim with its numbers."""
        quick = " (quick run: it shows that the study works, not what is true)" if self.quick else ""
        told = [f"{self.study}: {self.verdict}{quick}", f"{self.title} ({self.paper})"]
        if not self.rules_first:
            told.append("The rules were changed after its first step had run.")
        for claim in self.claims:
            told.append(f"  {MARKS[claim['verdict']]} {claim['text']}")
            for rule in (*claim["needs"], *claim["rules"]):
                told.append(f"      {measured(rule, self.measures)}")
        told.append(f"{self.held}; {self.seconds:.0f} s, seed {self.seed}")
        return told

    def __str__(self) -> str:
        return "\n".join(self.lines())


def measured(rule: Mapping[str, Any], measures: Mapping[str, Any]) -> str:
    """Return a rule of an outcome and what it came to, in one line."""
    unit = measures[rule["measure"]]["unit"]
    sides = f"{rule['measure']} {shown(measures[rule['measure']]['value'], unit)}"
    if rule["control"]:
        sides += f", {rule['control']} {shown(measures[rule['control']]['value'], unit)}"
    interval = "" if rule["low"] is None else f" ({shown(rule['low'], unit)} to {shown(rule['high'], unit)})"
    found = f"{shown(rule['value'], unit)}{interval}"
    why = f" [{rule['why']}]" if rule["why"] else ""
    return f"{rule['verdict']}: {rule['text']}; measured {found} ({sides}){why}"


def read_outcome(path: str | Path) -> Outcome:
    """Return the outcome that a file holds.

    Raises:
        RegardError: where it cannot be read, or is no outcome of this format.
    """
    try:
        told = json.loads(Path(path).read_text("utf-8"))
        outcome = Outcome(**told)
    except OSError as error:
        raise RegardError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError) as error:
        raise RegardError(f"{path} is no outcome of a study: {error}.") from None
    if outcome.format != FORMAT or outcome.verdict not in VERDICTS:
        raise RegardError(f"{path} is an outcome of another format ({outcome.format}).")
    return outcome


def outcomes_in(folder: str | Path) -> dict[str, Outcome]:
    """Return the full outcomes in a folder, slug -> outcome, in alphabetical order.

    Raises:
        RegardError: where one is damaged, or its name is not that of its study.
    """
    found = {}
    for path in sorted(Path(folder).glob("*.json")):
        if path.name.endswith(".quick.json") or '"study"' not in path.read_text("utf-8", "replace"):
            continue
        outcome = read_outcome(path)
        if outcome.name != path.stem:
            raise RegardError(f"{path} holds the outcome of {outcome.name}, and should have its name.")
        found[outcome.study] = outcome
    return found
