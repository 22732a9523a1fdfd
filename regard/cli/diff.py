"""`regard diff`: which heads of two models, or of one before and after a change, do something else."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.cli import given
from regard.cli.command import Parser, say
from regard.errors import RegardError
from regard.weights.quiet import busy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regard.cli.changes import Changes
    from regard.cli.comparing import Comparison
    from regard.cli.looking import Look
    from regard.runtime.segments import Mark

PAGE = "regard-diff.html"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = Parser(
        prog="regard diff",
        description=__doc__,
        epilog='such as: regard diff base/ tuned/ --text notes.txt; regard diff --edit "scale-heads '
        'heads=18.8,20.4"; regard diff --swap "sliding-window window=64 layers=3-29"',
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL",
        help="two models, before and after; or one, with --edit or --swap (default: SmolLM2-135M-Instruct)",
    )  # fmt: skip
    parser.add_argument(
        "--edit", action="append", metavar="'NAME KEY=VALUE ...'", help="an edit; may be given again"
    )
    parser.add_argument("--edits", metavar="FILE", help="edits that regard.save_edits wrote")
    parser.add_argument(
        "--swap", action="append", metavar="'NAME KEY=VALUE ...'",
        help="a mechanism in place of attention; layers=0-5 says where",
    )  # fmt: skip
    parser.add_argument("--text", metavar="FILE|-|WORDS", help="what to read (default: a packaged passage)")
    parser.add_argument(
        "--span", action="append", metavar="NAME=WORDS",
        help="tell what attention goes to these words; may be given again (default: to each sentence)",
    )  # fmt: skip
    parser.add_argument(
        "--chat", action="store_true",
        help="read the text as a user's message, or a JSON list of messages, by the model's chat template",
    )  # fmt: skip
    parser.add_argument(
        "--generate", type=int, default=0, metavar="N", help="go on with N tokens, both sides"
    )
    parser.add_argument("--layers", metavar="0-5,7", help="layers to look at (default: all)")
    parser.add_argument("--lens", action="extend", nargs="+", metavar="NAME", help="measurements to compare")
    parser.add_argument("--json", metavar="FILE|-", help="write all numbers as JSON")
    parser.add_argument("--csv", metavar="FILE|-", help="write one line a head as CSV")
    parser.add_argument("--report", metavar="FILE", help=f"where to write the page (default: {PAGE})")
    parser.add_argument("--no-report", action="store_true", help="write no page")
    parser.add_argument("--device", help="such as cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", help="such as float32 or bfloat16 (default: float32)")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Compare, print what changed, and write it where that is asked for."""
    _check_sides(options)
    text, origin = given.read_text(options.text)
    if options.generate < 0:
        raise RegardError(f"--generate is {options.generate}; it must be 0 at least.")
    layers = given.parse_layers(options.layers)
    outputs = given.check_outputs(options.json, options.csv)
    page = options.report or (None if options.no_report else PAGE)
    report = given.check_report(page, options.no_report, outputs)
    with busy("Starting"):
        from regard.cli import changed, parts
        from regard.cli.changes import parse_changes
    spans = parts.parse_spans(options.span, text)
    changes = parse_changes(options.edit, options.swap)
    look, found = _compared(options, changes, (text, origin), spans, layers, report is not None)
    if report is not None:
        with busy(f"Writing {report}"):
            changed.write_page(report, look, found)
    json_path, csv_path = outputs
    if json_path is not None:
        _write(json_path, changed.as_json(look, found))
    if csv_path is not None:
        _write(csv_path, changed.as_csv(found))
    if given.STANDARD not in outputs:
        changed.print_changed(look, found, report)
    return 0


def _check_sides(options: argparse.Namespace) -> None:
    changed = bool(options.edit or options.swap or options.edits)
    if len(options.models) > 2:
        raise RegardError(f"diff compares two models, and got {len(options.models)}.")
    if len(options.models) == 2 and changed:
        raise RegardError(
            "diff compares two models, or one before and after --edit, --edits or --swap; give either."
        )
    if len(options.models) < 2 and not changed:
        raise RegardError("diff needs two models, or one and an --edit, --edits or --swap.")


def _compared(
    options: argparse.Namespace,
    changes: Changes,
    text: tuple[str, str],
    named: list[tuple[str, str]],
    layers: list[int] | None,
    page: bool,
) -> tuple[Look, Comparison]:
    """Run both sides; two models are held one after the other."""
    from regard.cli import comparing, paging, parts
    from regard.cli.looking import Look, chosen_lenses
    from regard.weights import Source

    for source in options.models:
        Source.find(source)
    if options.edits:
        changes = _with_saved(changes, options)
    lenses = chosen_lenses(options.lens)
    opened = paging.recording(lenses) if page else lenses
    words, marks = _read(options, text[0])

    def loaded(source: str | None) -> Look:
        return Look.of(
            source, words, text[1], layers, options.dtype, options.device, lenses, special=not options.chat
        )

    def seen(look: Look, name: str) -> comparing.Side:
        return comparing.look_at(look, opened, layers, options.lens is not None, name, options.generate)

    look = loaded(options.models[0] if options.models else None)
    changes.check(look.model)
    places = parts.places(look.tokenizer, words, named, marks, not options.chat)
    _check_room(look, options.generate)
    before = seen(look, look.name)
    texts = comparing.control(look, lenses, layers)
    if changes:
        with changes.applied(look.model):
            after = seen(look, f"with {changes.words}")
        return look, comparing.compare(before, after, look, texts, places)
    first = _without_weights(look)
    other = loaded(options.models[1])
    comparing.check_alike(first, other)
    return other, comparing.compare(before, seen(other, other.name), other, texts, places)


def _read(options: argparse.Namespace, text: str) -> tuple[str, Sequence[Mark]]:
    """The text as the model reads it, and where the roles of a chat stand."""
    from regard.cli import parts
    from regard.weights import Source

    first = Source.find(options.models[0] if options.models else None)
    if options.generate and not first.skeleton().can_generate():
        raise RegardError(f"{first.name} does not generate text; leave --generate out.")
    return parts.as_chat(first.tokenizer, text, first.name) if options.chat else (text, ())


def _check_room(look: Look, count: int) -> None:
    if look.longest is not None and look.tokens + count > look.longest:
        raise RegardError(
            f"{look.name} takes {look.longest} tokens; the text has {look.tokens}, and --generate asks for "
            f"{count} more."
        )


def _with_saved(changes: Changes, options: argparse.Namespace) -> Changes:
    """Add the edits of a file, having made sure that they are for this model, before its weights are read."""
    from dataclasses import replace

    from regard.edit.files import load_edits
    from regard.runtime.anatomy import root_of
    from regard.weights import Source

    model = root_of(Source.find(options.models[0] if options.models else None).skeleton())
    words = ", ".join(filter(None, [changes.words, options.edits]))
    return replace(changes, edits=[*changes.edits, *load_edits(options.edits, model)], words=words)


def _without_weights(look: Look) -> Look:
    """Let go of the first model's weights before the second's are read."""
    look.model.to("meta")
    return look


def _write(path: Path, text: Any) -> None:
    from regard.runtime.table import write_text

    if path == given.STANDARD:
        say(text)
    else:
        write_text(path, text)
