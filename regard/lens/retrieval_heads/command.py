"""`regard run retrieval-heads`: what a model loses without its retrieval heads, and how alike two maps are.

    similarity = Pearson's correlation of two models' scores, all heads of all layers in one row

Source: Wu et al., 2024, arXiv 2404.15574, section 3 (similarity) and 4 (masking). Status: partly our choice
(the controls).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regard.errors import RegardError
from regard.lens.retrieval_heads.answering import answer, rouge_recall
from regard.lens.retrieval_heads.detection import detect
from regard.lens.retrieval_heads.official import read_official
from regard.runtime.edits import ScaleHeads
from regard.runtime.head_list import HeadList
from regard.runtime.head_table import HeadTable
from regard.runtime.protocol import Edit
from regard.runtime.table import finite
from regard.tasks.needle_controls import copying, knowing
from regard.tasks.needles import needle

if TYPE_CHECKING:
    from regard.cli.request import Request, SystemParser

LISTS = 8
TASKS = {"needle": "hidden facts", "copying": "lists to copy", "knowing": "known words"}


def command(parser: SystemParser) -> None:
    """Switch off the retrieval heads of a model, then as many random heads, and print what it still finds:
    hidden facts, lists to copy, words that it knows without a text. Or correlate two files of scores.
    """
    parser.takes("model", "seed")
    parser.add_argument(
        "--list",
        metavar="FILE",
        help="a list that `regard heads --save` wrote (default: search)",
    )
    parser.add_argument("--mask", type=int, default=10, metavar="K", help="how many heads (default: 10)")
    parser.add_argument("--mode", choices=("zero", "uniform"), default="zero", help="what a head then gives")
    parser.add_argument("--scope", choices=("all", "decode"), default="all", help="where (default: all)")
    parser.add_argument("--draws", type=int, default=3, help="sets of random heads (default: 3)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a prompt (default: 256)")
    parser.add_argument(
        "--correlate", nargs=2, metavar=("A", "B"),
        help="only compare two files: lists of `regard heads`, or scores of the official code",
    )  # fmt: skip
    parser.set_defaults(run=_answer)


def _answer(request: Request) -> dict[str, Any]:
    options = request.options
    if options.correlate:
        return _correlate(request, *options.correlate)
    if options.mask < 1 or options.draws < 1:
        raise RegardError("--mask and --draws take numbers from 1.")
    rouge_recall()
    given = None if options.list is None else HeadList.load(options.list)
    request.check_length(options.length)
    prompts = needle(request.tokenizer, lengths=(options.length,), depths=(0.5,), seed=options.seed)
    searched, asked = prompts.halves()
    model, name = request.model, request.source.name
    if given is None:
        given = detect(model, request.tokenizer, searched, name=name).list(options.mask)
    heads = given.top(options.mask)
    edits = {
        "no head off": (),
        f"the {options.mask} leading off": (heads,),
        f"{options.mask} random off": tuple(heads.control(options.seed + i) for i in range(options.draws)),
    }
    tasks = {
        "needle": asked,
        "copying": copying(request.tokenizer, LISTS, seed=options.seed),
        "knowing": knowing(request.tokenizer),
    }
    found: dict[str, dict[str, list[float]]] = {}
    for how, sets in edits.items():
        masks: list[list[Edit]] = [
            [ScaleHeads(heads=some, mode=options.mode, scope=options.scope)] for some in sets
        ]
        found[how] = {
            task: [answer(model, request.tokenizer, some, *mask).mean for mask in masks or [[]]]
            for task, some in tasks.items()
        }
    _print(request, heads, found)
    return {
        "model": name, "heads": [list(head) for head in heads], "mode": options.mode, "scope": options.scope,
        "length": options.length, "seed": options.seed, "recall": found,
    }  # fmt: skip


def _print(request: Request, heads: HeadList, found: dict[str, dict[str, list[float]]]) -> None:
    named = ", ".join(f"{site.rpartition('.')[2]}.{head}" for site, head in heads)
    request.say(f"{request.source.name}: heads {named} (layer.head)")
    request.say()
    request.say("Recall of the words asked for, mean over prompts:")
    request.say(f"  {'':22}" + "".join(f"{words:>16}" for words in TASKS.values()))
    for how, told in found.items():
        request.say(f"  {how:22}" + "".join(f"{_range(told[task]):>16}" for task in TASKS))


def _range(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.0%}"
    return f"{np.mean(values):.0%} ({min(values):.0%}-{max(values):.0%})"


def _correlate(request: Request, first: str, second: str) -> dict[str, Any]:
    """Compare two files of scores."""
    one, two = _scores(first), _scores(second)
    rows = {name: value for name, value in zip(two.names, two["score"], strict=True)}
    pairs = [(x, rows[name]) for name, x in zip(one.names, one["score"], strict=True) if name in rows]
    if len(pairs) < len(one) or len(pairs) < len(two):
        raise RegardError(
            f"{first} has scores of {len(one)} heads and {second} of {len(two)}, {len(pairs)} the same; "
            "only models of one shape can be compared."
        )
    values = np.array(pairs).T
    pearson = float(np.corrcoef(values)[0, 1])
    spearman, shared = one.rank_correlation(two, "score"), one.overlap(two, "score", min(10, len(one)))
    request.say(f"{len(pairs)} heads: Pearson {pearson:.2f}, Spearman {spearman:.2f}")
    request.say(f"Leading heads: {shared}")
    told = {"pearson": finite(pearson), "spearman": finite(spearman), "shared": shared.shared}
    return {**told, "shared_by_chance": shared.expected, "heads": len(pairs)}


def _scores(path: str) -> HeadTable:
    """Read scores, in either form."""
    try:
        form = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no JSON"
        raise RegardError(f"{path} cannot be read: {reason}.") from None
    return HeadList.load(path).table if isinstance(form, dict) and "format" in form else read_official(path)
