"""Run every architecture of transformers that calls its attention interface, plain and watched.

    python -m benchmarks.architectures                  # all of them; goes on where it was stopped
    python -m benchmarks.architectures llama qwen3_vl   # these, and print what is wrong in full

Each is built from its own configuration class at tiny size with random weights and run in a process of
its own. The table is written to docs/results/architectures.md and .json.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
KEPT = ("name", "class", "verdict", "reason", "sites", "silent", "unreachable", "off", "notes")
VERDICTS = {
    "works": "watched, it gives what it gives alone",
    "refused": "refused by regard with a reason",
    "wrong": "watched, it gives something else",
    "not built": "cannot be built or run here, at tiny size and without downloads",
}
CHECKS = {
    "idle": "a session that opens nothing",
    "opened": "every row of every call opened",
    "weights": "weights seen against those that the model's own attention computed, call by call",
    "padded": "left padding",
    "attentions": "`output_attentions=True`",
    "sdpa": "beside the model's SDPA attention",
    "generated": "`generate()`, with a cache and left padding",
}


def main(arguments: list[str] | None = None) -> None:
    from tests.support.architectures.listing import architectures
    from tests.support.architectures.sweep import sweep

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", help="modeling files, such as llama; default all")
    parser.add_argument("--jobs", type=int, default=2, help="how many run at a time")
    parser.add_argument("--lines", type=Path, help="where rows are kept, to go on with a stopped run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the table is written")
    options = parser.parse_args(arguments)
    known = architectures()
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(
            f"no modeling file is called {', '.join(unknown)} among the {len(known)} of the interface"
        )
    lines = (
        options.lines
        or Path(tempfile.gettempdir()) / f"regard-architectures-{_versions()['transformers']}.jsonl"
    )
    if options.names and not options.lines:
        lines = Path(tempfile.mkdtemp()) / "some.jsonl"
    names = options.names or list(known)
    rows = sweep(names, lines, options.jobs, report=_report)
    found = [rows[name] for name in names]
    print(_counts(found))
    if not options.names:
        write(found, options.out)
        lines.unlink()
        print(f"written: {options.out / 'architectures.md'}")
    else:
        print("".join(f"\n{row['name']}: {row['trace']}" for row in found if row.get("trace")))


def _report(row: dict[str, Any]) -> None:
    print(f"{row['verdict']:9} {row['name']} ({row['seconds']} s) {row.get('reason', '')}", flush=True)


def _counts(rows: list[dict[str, Any]]) -> str:
    counts = collections.Counter(row["verdict"] for row in rows)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("regard", "torch", "transformers")}


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write the table as Markdown and as JSON."""
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        **_versions(),
        "command": "python -m benchmarks.architectures",
        "seconds": round(sum(row["seconds"] for row in rows)),
    }
    kept = [{key: row[key] for key in KEPT if row.get(key)} for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(map(json.dumps, kept))
    text = f'{{"about": {json.dumps(about)},\n"rows": [\n{lines}\n]}}\n'
    (folder / "architectures.json").write_text(text, encoding="utf-8")
    (folder / "architectures.md").write_text(page(rows, about), encoding="utf-8")


def page(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the Markdown page."""
    by = {verdict: [row for row in rows if row["verdict"] == verdict] for verdict in VERDICTS}
    built = len(rows) - len(by["not built"])
    checked = collections.Counter(key for row in by["works"] for key in row.get("off", {}))
    worst = {
        key: max((row["off"][key] for row in by["works"] if key in row["off"]), default=0) for key in checked
    }
    parts = [
        "# Every architecture of transformers that calls its attention interface",
        f"{len(rows)} modeling files of transformers {about['transformers']} call the interface. {built} of "
        "them can be built here from their own configuration classes, at tiny size with random weights; "
        f"**{len(by['works'])} of {built} ({len(by['works']) / max(built, 1):.1%}) work**, "
        f"{len(by['refused'])} are refused with a reason, {len(by['wrong'])} are wrong.",
        f"{about['date']}, regard {about['regard']}, torch {about['torch']}, transformers "
        f"{about['transformers']}; {about['machine']}; `{about['command']}`, {about['seconds']} s of work.",
        "Works means: in float32, every tensor that comes out differs by at most 1e-5 of its scale from what "
        "the model gives by its own eager attention, every module whose attention ran was seen, as often as "
        "it ran, and the model is as before afterwards. What was compared, and the largest difference among "
        "those that work:",
        _table(("check", "architectures", "largest difference"),
               [(text, checked[key], f"{worst[key]:.1e}") for key, text in CHECKS.items() if key in checked]),
    ]  # fmt: skip
    for verdict in ("refused", "wrong", "not built"):
        if by[verdict]:
            listed = [(row["name"], row["class"], _cell(row["reason"])) for row in by[verdict]]
            parts += [f"## {VERDICTS[verdict].capitalize()}", _table(("file", "class", "why"), listed)]
    works = [(row["name"], row["class"], row["sites"], _seen(row), _cell(_rest(row))) for row in by["works"]]
    parts += ["## Works", _table(("file", "class", "sites", "compared", "not seen, and remarks"), works)]
    return "\n\n".join(parts) + "\n"


def _seen(row: dict[str, Any]) -> str:
    return ", ".join(key for key in CHECKS if key in row["off"])


def _rest(row: dict[str, Any]) -> str:
    classes = sorted({kind for _, kind in row.get("unreachable") or ()})
    words = [f"out of reach: {', '.join(classes)}"] if classes else []
    if row.get("silent"):
        words.append(f"not called: {', '.join(row['silent'])}")
    return "; ".join([*words, *row.get("notes", [])])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


if __name__ == "__main__":
    main()
