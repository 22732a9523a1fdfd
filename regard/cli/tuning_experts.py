"""`regard run tunable-experts`: which experts fire for a behaviour, and what it is without them.

Source: Dahlke et al., 2025, arXiv 2502.11096. Status: partly our choice (the controls).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.errors import RegardError

if TYPE_CHECKING:
    from regard.cli.request import Request, SystemParser

LABORATORY = "closed-places"
ACTIONS = {"off": "off", "on": "forced on", "gain": "scaled"}


def command(parser: SystemParser) -> None:
    """Rank the experts of a mixture-of-experts model by how much more they fire for a behaviour, turn the
    leading ones off, on or down, and print how often answers show it then, beside random experts.
    """
    add = parser.add_argument
    add("--model", metavar="MODEL", default=LABORATORY,
        help=f"folder or Hub name (default: {LABORATORY}, a small one that learned to refuse)")  # fmt: skip
    add("--device", help="such as cpu or cuda (default: cpu)")
    add("--dtype", help="such as float32 or bfloat16 (default: float32)")
    parser.takes("seed")
    add("--behaviour", metavar="FILE", help="prompts that show it, one a line")
    add("--others", metavar="FILE", help="prompts that do not; default: sorted by what the model answers")
    add("--shows", metavar="REGEX", help="what an answer that shows it has (default: words of refusal)")
    add("--count", type=int, default=10, metavar="N", help="how many experts (default: 10)")
    add("--experts", metavar="4.143,3.7", help="LAYER.EXPERT pairs, instead of the leading ones")
    add("--edits", metavar="FILE", help="a saved set, instead of the leading ones")
    add(
        "--kind",
        choices=("mean", "risk", "contrast", "welch"),
        default="mean",
        help="of score (default: mean)",
    )
    add("--value", choices=("weight", "count"), default="weight", help="what is summed (default: weight)")
    add("--last", action="store_true", help="only the last token of a prompt counts")
    add("--action", choices=tuple(ACTIONS), default="off", help="(default: off)")
    add(
        "--mode", choices=("drop", "silence", "refill"), default="drop", help="what off means (default: drop)"
    )
    add("--scope", choices=("all", "prompt", "generated"), default="all", help="which tokens (default: all)")
    add("--strength", type=float, metavar="G", help="factor of --action gain (0.5); weight of --action on")
    add("--random", type=int, default=10, metavar="N", help="random sets beside them (default: 10)")
    add("--neutral", metavar="FILE", help="plain texts whose loss is measured, one a line")
    add(
        "--prompts",
        type=int,
        default=60,
        metavar="N",
        help="prompts of each set to try, at most (60)",
    )
    add("--tokens", type=int, default=24, metavar="N", help="of an answer (default: 24)")
    add(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="use the chat template (default: if there is one)",
    )
    add("--save", metavar="FILE", help="write the experts and what is done to them")
    add("--report", metavar="FILE", help="write a page with the map of experts and all answers")
    add("--picture", metavar="FILE", help="write a picture of the map and the rates")
    parser.set_defaults(run=_answer)


def _answer(request: Request) -> dict[str, Any]:
    options = request.options
    _check(options)
    from regard.cli import experts_tried as tried

    prompts = tried.Prompts.of(options)
    found = tried.try_experts(request, prompts)
    if options.save is not None:
        from regard.edit.files import save_edits

        save_edits(options.save, request.model, found.edit)
    if options.report is not None:
        found.page(request.source.name).save(options.report)
    if options.picture is not None:
        found.picture(Path(options.picture))
    for line in found.lines(request.source.name):
        request.say(line)
    for what, path in (("The set is", options.save), ("A page to look at is", options.report),
                       ("The picture is", options.picture)):  # fmt: skip
        if path is not None:
            request.say(f"{what} in {path}.")
    return found.as_json(request.source.name)


def _check(options: argparse.Namespace) -> None:
    """Refuse what will not do, before a model is looked for."""
    for name in ("count", "random", "prompts", "tokens"):
        if getattr(options, name) < 1:
            raise RegardError(f"--{name} is {getattr(options, name)}; it must be at least 1.")
    if options.behaviour is None and (options.others is not None or options.model != LABORATORY):
        raise RegardError("--behaviour FILE is needed: prompts that show what is looked for, one a line.")
    if options.experts is not None and options.edits is not None:
        raise RegardError("--experts and --edits both say which experts; give either.")
    if options.strength is not None and options.action == "off":
        raise RegardError("--strength is for --action gain or on; what is off has none.")
    from regard.edit.experts.effects import REFUSALS, shows

    options.shows = REFUSALS if options.shows is None else options.shows
    shows(options.shows)
    for name in ("save", "report", "picture"):
        path = getattr(options, name)
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise RegardError(f"--{name}: there is no folder {Path(path).parent} to write to.")
