"""`regard run self-familiarity`: how familiar a model is with concepts, and whether it should answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.errors import RegardError
from regard.lens.familiarity.gate import Decision, Gate
from regard.lens.familiarity.scoring import AGGREGATES, Familiarity, SelfFamiliarity
from regard.lens.familiarity.threshold import Threshold, everyday_concepts
from regard.runtime.table import Table
from regard.tasks.concepts import find_concepts

if TYPE_CHECKING:
    from regard.cli.request import Request, SystemParser

WIDE = 44


def command(parser: SystemParser) -> None:
    """Ask a model how well it knows the concepts of an instruction, and answer only where it knows them well
    enough. Concepts are explained, and found back from explanations in which their names are blotted out.
    """
    parser.takes("model", "text")
    parser.add_argument(
        "--concept", action="append", metavar="WORDS",
        help="score this, or several, in place of those found in --text",
    )  # fmt: skip
    parser.add_argument("--beams", type=int, default=8, help="of the search (default: 8; the paper: 30)")
    parser.add_argument(
        "--explain-tokens", type=int, default=48, metavar="N", help="at most (default: 48; the paper: 200)"
    )
    parser.add_argument(
        "--guess-tokens", type=int, default=8, metavar="N",
        help="beyond those of the name (default: 8; the paper: 15)",
    )  # fmt: skip
    parser.add_argument("--aggregate", choices=AGGREGATES, default="weighted", help="default: weighted")
    parser.add_argument("--plain", action="store_true", help="leave the chat template out")
    parser.add_argument("--threshold", metavar="FILE|NUMBER", help="a fitted one, or a number from 0 to 1")
    parser.add_argument(
        "--calibrate", metavar="FILE",
        help="fit a threshold, and keep it there; a run that was stopped goes on from FILE.scores",
    )  # fmt: skip
    parser.add_argument(
        "--familiar", metavar="FILE", help="with --calibrate: a concept a line (default: packaged, about 200)"
    )
    parser.add_argument(
        "--unfamiliar", metavar="FILE", help="with --calibrate: a concept a line that no model can know"
    )
    parser.add_argument("--answer", action="store_true", help="let the model answer --text where it may")
    parser.add_argument("--new-tokens", type=int, default=60, metavar="N", help="of the answer (default: 60)")
    parser.set_defaults(run=answer)


def answer(request: Request) -> dict[str, Any]:
    """Do what was asked for, and return it as JSON takes it."""
    options = request.options
    _check(request)
    if options.calibrate:
        return _calibrate(request)
    text = None if options.text is None else request.text.words.strip()
    concepts = options.concept or find_concepts(text or "")
    if not concepts:
        raise RegardError(f"no concept was found in {text!r}; name what it is about with --concept.")
    limit = _limit(options.threshold)
    known = _known(request)
    known.check_concepts(concepts)
    found = known.score_instruction(text or "", concepts)
    request.say(f"{request.source.name}, {known.beams} beams, explanations of {known.explain_tokens} tokens")
    request.say()
    request.say(str(_table(found.concepts)))
    told = {
        "model": request.source.name, "settings": known.settings, "instruction": text, "score": found.score,
        "concepts": [each.as_dict() for each in found.concepts],
    }  # fmt: skip
    request.say()
    if limit is None:
        request.say(f"Together {found.score:.3g} ({known.aggregate}, the rarest first).")
        return told
    gate = Gate(known, limit)
    decision = gate.judge(found)
    request.say(f"{decision.reason[:1].upper()}{decision.reason[1:]}.")
    told |= {"threshold": gate.threshold, "answered": decision.answered, "reason": decision.reason}
    if options.answer:
        told["answer"] = _answered(request, known, gate, decision, text or "")
    return told


def _check(request: Request) -> None:
    options = request.options
    if options.calibrate and (options.text is not None or options.concept or options.threshold):
        raise RegardError("--calibrate fits a threshold; leave --text, --concept and --threshold out.")
    if not options.calibrate and (options.familiar or options.unfamiliar):
        raise RegardError("--familiar and --unfamiliar are for --calibrate FILE.")
    if not options.calibrate and options.text is None and not options.concept:
        raise RegardError("give an instruction with --text, or concepts with --concept.")
    if options.answer and (options.text is None or options.threshold is None):
        raise RegardError("--answer needs an instruction, --text, and a --threshold.")
    if options.new_tokens < 1:
        raise RegardError(f"--new-tokens is {options.new_tokens}; it must be at least 1.")


def _known(request: Request) -> SelfFamiliarity:
    options = request.options
    tokenizer = request.tokenizer
    return SelfFamiliarity(
        request.model, tokenizer, beams=options.beams, explain_tokens=options.explain_tokens,
        guess_tokens=options.guess_tokens, aggregate=options.aggregate,
        template="plain" if options.plain else None,
    )  # fmt: skip


def _limit(given: str | None) -> Threshold | float | None:
    if given is None:
        return None
    try:
        number = float(given)
    except ValueError:
        return Threshold.load(given)
    if not 0 <= number <= 1:
        raise RegardError(f"--threshold is {given}; a score is from 0 to 1, and so must it be.")
    return number


def _table(found: tuple[Familiarity, ...]) -> Table:
    return Table({
        "concept": [each.concept for each in found],
        "score": [each.score for each in found],
        "masked explanation": [_short(each.masked) for each in found],
        "best answer with the name": [_short(each.answer) for each in found],
    })  # fmt: skip


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WIDE else line[: WIDE - 1] + "…"


def _answered(request: Request, known: SelfFamiliarity, gate: Gate, decision: Decision, text: str) -> str:
    """What the model answers, or the words in place of it."""
    written = gate.words(decision)
    if decision.answered:
        written = known.write([text], max_new_tokens=request.options.new_tokens)[0].strip()
    request.say()
    request.say(written)
    return written


def _calibrate(request: Request) -> dict[str, Any]:
    """Fit a threshold and write it."""
    options = request.options
    path = Path(options.calibrate)
    familiar = everyday_concepts() if options.familiar is None else _lines(options.familiar)
    unfamiliar = [] if options.unfamiliar is None else _lines(options.unfamiliar)
    if not path.parent.is_dir():
        raise RegardError(f"--calibrate {path}: there is no folder {path.parent}.")
    known, kept = _known(request), path.with_name(path.name + ".scores")
    found = known.calibrate(familiar, unfamiliar, resume=kept, name=request.source.name)
    found.save(path)
    kept.unlink(missing_ok=True)
    request.say(
        f"{request.source.name}: familiar begins at {found.value:.3g} ({found.low:.3g} to {found.high:.3g}), "
        f"from {len(found.familiar)} familiar and {len(found.unfamiliar)} unfamiliar concepts."
    )
    request.say(f"The threshold is in {path}.")
    return {
        "model": request.source.name, "settings": known.settings, "threshold": found.value, "low": found.low,
        "high": found.high, "familiar": dict(found.familiar), "unfamiliar": dict(found.unfamiliar),
    }  # fmt: skip


def _lines(path: str) -> list[str]:
    try:
        found = [line.strip() for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as failure:
        raise RegardError(f"cannot read {path}: {getattr(failure, 'strerror', None) or 'no text'}.") from None
    if not found:
        raise RegardError(f"{path} names no concept; write one a line.")
    return found
