"""`regard run explanation-agreement`: which tokens matter by several methods, and how far these agree."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.cli import given
from regard.errors import RegardError

if TYPE_CHECKING:
    from regard.cli.request import Request, SystemParser
    from regard.lens.explanations.compared import Comparison

QUICK = ("gradnorm", "gradxinput", "occlusion", "average", "norm", "rollout")
DEFAULT = "Then, Mary and John went to the market. John gave a basket to"
MOST_TEXTS, MOST_TOKENS = 200, 512


def command(parser: SystemParser) -> None:
    """Score the tokens of texts by several methods, print how far the methods agree beside random scores, and
    whether the output follows the tokens that each ranks first. Needs the extra `explain` for gradients.
    """
    parser.takes("model", "seed")
    parser.add_argument(
        "--text", metavar="FILE|-|WORDS",
        help="a text; every line of a file is one (default: a sentence on who was given a basket)",
    )  # fmt: skip
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help=f"two or more (default: {' '.join(QUICK)})"
    )
    parser.add_argument(
        "--target", nargs="+", metavar="TOKEN",
        help="a class or next token by number or words; two are subtracted (default: what is predicted)",
    )  # fmt: skip
    parser.add_argument("--baseline", type=int, metavar="ID", help="token that stands for a removed one")
    parser.add_argument(
        "--measure", default="kendall", metavar="NAME", help="of agreement (default: kendall)"
    )
    parser.add_argument("--topk", type=int, metavar="K", help="agreement of the K tokens ranked first")
    parser.add_argument("--drop-first", action="store_true", help="leave out the first token")
    parser.add_argument("--report", metavar="FILE", help="write a page with every token coloured")
    parser.set_defaults(run=answer)


def answer(request: Request) -> dict[str, Any]:
    options = request.options
    texts, origin = _texts(options.text)
    report = _report(options.report, request)
    methods = list(options.methods or QUICK)
    if len(set(methods)) < 2:
        raise RegardError("--methods names one method, and agreement takes two at least.")
    if options.topk is not None and options.topk < 1:
        raise RegardError(f"--topk is {options.topk}; it must be 1 at least.")
    from regard.lens.explanations.compared import compare_methods
    from regard.lens.explanations.measures import MEASURES
    from regard.lens.explanations.methods import check_methods

    check_methods(methods)
    measure = "topk" if options.topk is not None else options.measure
    if measure not in MEASURES:
        raise RegardError(f"--measure is {measure!r}; it must be one of {', '.join(MEASURES)}.")
    target = _target(options)
    lengths = [len(request.tokenizer(text)["input_ids"]) for text in texts]
    if max(lengths) > MOST_TOKENS:
        raise RegardError(f"A text has {max(lengths)} tokens; explanations take {MOST_TOKENS} at most.")
    with request.progress("Explaining", len(texts)) as advance:
        found = compare_methods(
            request.model, request.tokenizer, texts, methods, target, seed=options.seed,
            baseline=_baseline(options, request.tokenizer), tick=lambda: advance(1),
        )  # fmt: skip
    told = _said(request, found, measure, origin)
    if report is not None:
        _write_page(report, request, found, origin)
        request.say()
        request.say(f"Open {report} in a browser to see every token.")
    return told


def _said(request: Request, found: Comparison, measure: str, origin: str) -> dict[str, Any]:
    options = request.options
    more = {} if options.topk is None else {"k": options.topk}
    agreed = found.agreement(measure, drop_first=options.drop_first, **more)
    first = next(iter(found.explanations.values()))[0]
    request.say(f"{request.source.name}, {origin}: {first.said().split(': ', 1)[-1]}")
    request.say()
    tokens: dict[str, list[Any]] = {"position": list(range(len(first.tokens))), "token": list(first.tokens)}
    scores = {name: each[0].values.tolist() for name, each in found.explanations.items()}
    from regard.runtime.table import Table, finite

    request.say(str(Table({**tokens, **scores}, title=f"scores of the tokens, {first.target}")))
    request.say()
    request.say(str(agreed.matrix))
    request.say()
    request.say("~ marks what random scores reach.")
    for finding in found.findings():
        request.say(finding.text)
    return {
        "model": request.source.name, "texts": len(found), "origin": origin, "measure": measure,
        "explanations": {
            name: [{"tokens": list(e.tokens), "values": e.values.tolist(), "target": e.target,
                    "error": e.error} for e in each]
            for name, each in found.explanations.items()
        },
        "agreement": [_plain(row, finite) for row in agreed.table.rows()],
        "faithfulness": [_plain(row, finite) for row in found.faithfulness.rows()],
        "left_out": dict(found.left_out), "said": [finding.text for finding in found.findings()],
    }  # fmt: skip


def _plain(row: dict[str, Any], finite: Any) -> dict[str, Any]:
    return {key: finite(value) if isinstance(value, float) else value for key, value in row.items()}


def _texts(told: str | None) -> tuple[list[str], str]:
    if told is None:
        return [DEFAULT], "one sentence"
    words, origin = given.read_text(told)
    texts = [line.strip() for line in words.splitlines() if line.strip()]
    if len(texts) > MOST_TEXTS:
        raise RegardError(f"The text ({origin}) has {len(texts)} lines; {MOST_TEXTS} are taken at most.")
    return texts, origin if len(texts) == 1 else f"{len(texts)} lines of {origin}"


def _target(options: Any) -> Any:
    if options.target is None:
        return (" Mary", " John") if options.text is None else "predicted"
    if len(options.target) > 2:
        raise RegardError(f"--target takes one or two, and got {len(options.target)}.")
    found = [int(each) if each.isdigit() else each for each in options.target]
    return found[0] if len(found) == 1 else tuple(found)


def _baseline(options: Any, tokenizer: Any) -> Any:
    """The token of --baseline, or [PAD]; for the sentence that is packaged, token 0 where there is none."""
    if options.baseline is not None:
        return options.baseline
    if getattr(tokenizer, "pad_token_id", None) is not None:
        return "pad"
    if options.text is not None:
        raise RegardError("The tokenizer has no [PAD]; give the id of a token in its place with --baseline.")
    return 0


def _report(path: str | None, request: Request) -> Path | None:
    return None if path is None else given.check_report(path, False, (request.path,))


def _write_page(path: Path, request: Request, found: Comparison, origin: str) -> None:
    from regard.report import Report, Section

    section = Section(
        title=f"Explanations of {origin}", short="tokens", findings=found.findings(), panels=found.panels()
    )
    facts = [
        type(request.model).__name__,
        f"{len(found)} text{'s' * (len(found) != 1)}",
        f"{len(found.methods)} methods",
    ]
    Report(title=request.source.name, facts=facts, sections=[section], tokens=request.tokenizer).save(path)
