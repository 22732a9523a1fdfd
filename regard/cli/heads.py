"""`regard heads`: rank the heads of a model by what they do, and keep the list to steer with."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.cli import given
from regard.cli.command import Parser, say
from regard.errors import RegardError
from regard.weights.quiet import busy

if TYPE_CHECKING:
    from regard.cli.head_kinds import Ranking

KINDS = {
    "retrieval": "copy a fact out of a text, asked for it (Wu et al. 2024)",
    "induction": "look at what followed the same token earlier (Olsson et al. 2022)",
    "sink": "park their attention on the first token (Gu et al. 2024)",
    "dormant": "are sinks on one domain of text and at work on another (Guo et al. 2024)",
    "vision": "move when the image is taken away (He et al. 2024)",
}
ONLY = {
    "retrieval": ("needles", "length", "depth", "steps", "chat", "no_stem", "resume"),
    "dormant": ("against",),
    "vision": ("image",),
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = Parser(
        prog="regard heads",
        description=__doc__,
        epilog="; ".join(f"{kind}: heads that {what}" for kind, what in KINDS.items()),
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL",
        help="a folder, a .gguf file or a name on the Hub (default: SmolLM2-135M-Instruct)",
    )  # fmt: skip
    parser.add_argument("--kind", choices=list(KINDS), default="retrieval", help="default: retrieval")
    parser.add_argument("--top", type=int, metavar="N", help="how many lead (default: 10)")
    parser.add_argument("--save", metavar="FILE", help="keep the list, for regard.steer and --edit")
    parser.add_argument("--json", metavar="FILE|-", help="write all numbers as JSON")
    parser.add_argument("--report", metavar="FILE", help="write a page with the map of heads")
    parser.add_argument(
        "--text", metavar="FILE|-|WORDS",
        help="retrieval: what the fact is hidden in; sink and dormant: what to read (default: packaged)",
    )  # fmt: skip
    parser.add_argument(
        "--against", metavar="FILE|-|WORDS", help="dormant: the other domain (default: code of Python)"
    )
    parser.add_argument("--image", metavar="FILE", action="append", help="vision: an image, or several")
    parser.add_argument("--needles", metavar="FILE", help="retrieval: facts, a JSON object a line")
    parser.add_argument(
        "--length", type=int, nargs="+", metavar="N", help="retrieval: tokens of a prompt (256)"
    )
    parser.add_argument(
        "--depth", type=float, nargs="+", metavar="D", help="retrieval: from 0 to 1 (0.2 0.8)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="retrieval: tokens of an answer at most")
    parser.add_argument("--chat", action="store_true", help="retrieval: use the model's chat template")
    parser.add_argument("--no-stem", action="store_true", help="retrieval: do not begin the answer")
    parser.add_argument("--resume", metavar="FILE", help="retrieval: keep what is done there, and go on")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--device", help="such as cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", help="such as float32 or bfloat16 (default: float32)")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Rank the heads, print the list, and write it where that is asked for."""
    _check(options)
    json_path, _ = given.check_outputs(options.json, None)
    save, resume = (given.check_output(getattr(options, name), f"--{name}") for name in ("save", "resume"))
    report = given.check_report(options.report, False, (json_path, save)) if options.report else None
    if given.STANDARD in (save, resume):
        raise RegardError("--save and --resume write to files, and `-` is none.")
    with busy("Starting"):
        from regard.cli.head_kinds import rank
    found = rank(options)
    if save is not None:
        found.heads.save(save)
    if report is not None:
        from regard.cli.head_kinds import write_report

        write_report(found, report)
    if json_path is not None:
        _write(json_path, json.dumps(_as_json(found), indent=1, allow_nan=False) + "\n")
    if json_path != given.STANDARD:
        _print(found, save, report)
    return 0


def _check(options: argparse.Namespace) -> None:
    if options.top is not None and options.top < 1:
        raise RegardError(f"--top is {options.top}; it must be at least 1.")
    for kind, names in ONLY.items():
        used = [name for name in names if getattr(options, name) not in (None, False)]
        if used and options.kind != kind:
            option = used[0].replace("_", "-")
            raise RegardError(f"--{option} is for --kind {kind}; this is --kind {options.kind}.")
    if options.kind == "vision" and not options.image:
        raise RegardError("--kind vision needs an image; give --image FILE.")
    if options.text is not None and options.kind in ("induction", "vision"):
        raise RegardError(f"--kind {options.kind} reads no text of yours; leave --text out.")


def _print(found: Ranking, save: Path | None, report: Path | None) -> None:
    from regard.cli.page import Page

    page, table = Page(), found.heads.table
    page.line(found.title, "bold")
    page.line(f"Heads that {KINDS[found.kind]}")
    page.line(f"on {found.origin}.")
    page.line()
    names = [name for name in ("score", *found.shown) if name in table.columns]
    page.line(f"  {'rank':>4}  {'layer':>8}  {'head':>4}" + "".join(f"  {name:>9}" for name in names), "dim")
    for rank, (site, head) in enumerate(found.heads, 1):
        row = table.at(site, head)
        layer = site.rpartition(".")[2] if site.startswith(f"{table.about.get('main')}.") else site
        page.line(f"  {rank:>4}  {layer:>8}  {head:>4}" + "".join(f"  {row[name]:>9.3f}" for name in names))
    page.line()
    for sentence in found.said():
        page.sentence(sentence)
    for what, path in (("The list is", save), ("A page to look at is", report)):
        if path is not None:
            page.line(f"{what} in {path}.")
    page.show()


def _as_json(found: Ranking) -> dict[str, Any]:
    from regard.runtime.table import finite

    heads = found.heads
    return {
        "kind": found.kind, "origin": found.origin, "about": _plain(heads.about), "top": len(heads),
        "rank_correlation": finite(heads.correlation),
        "shared": None if heads.shared is None else heads.shared.shared,
        "shared_by_chance": None if heads.shared is None else heads.shared.expected,
        "chance": finite(found.chance),
        "leading": [[site, head, score] for site, head, score in heads.ranked],
        "heads": [{k: finite(v) for k, v in row.items()} for row in heads.table.table.rows()],
    }  # fmt: skip


def _plain(told: dict[str, Any]) -> dict[str, Any]:
    from regard.runtime.table import finite

    return {key: finite(value) if isinstance(value, float) else value for key, value in told.items()}


def _write(path: Path, text: str) -> None:
    from regard.runtime.table import write_text

    if path == given.STANDARD:
        say(text)
    else:
        write_text(path, text)
