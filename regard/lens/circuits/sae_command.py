"""`regard run sae-circuits`: scores of heads from two files of prompts, or from a task."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.errors import RegardError
from regard.runtime.table import finite

if TYPE_CHECKING:
    from regard.cli.request import Request, SystemParser
    from regard.lens.circuits.evaluation import Evaluation
    from regard.lens.circuits.sae import CircuitScores
    from regard.runtime.head_table import HeadName, HeadTable

TASKS = ("ioi", "greater_than", "docstring")
SHOWN = ("sae", "edges", "mean_diff", "paired_diff", "norm", "layer", "random")
TOP = 10


def command(parser: SystemParser) -> None:
    """Score heads by sparse codes that only prompts with a task show, beside simpler scores; and hold all of
    these against a circuit, a published one or that which path patching finds.
    """
    parser.takes("model", "seed")
    parser.add_argument("positives", nargs="?", metavar="POSITIVES", help="prompts with the task, one a line")
    parser.add_argument("negatives", nargs="?", metavar="NEGATIVES", help="as many prompts without it")
    parser.add_argument("--task", choices=TASKS, help="prompts of a task instead of files")
    parser.add_argument("--count", type=int, default=48, help="prompts of each kind, of a task (default: 48)")
    parser.add_argument(
        "--against", metavar="paths|TASK[:VERSION]|FILE",
        help="circuit to hold the scores against: found by path patching, published, or saved by regard",
    )  # fmt: skip
    parser.add_argument("--trials", type=int, default=5, help="dictionaries to train (default: 5)")
    parser.add_argument("--codes", type=int, default=200, help="atoms of a dictionary (default: 200)")
    parser.add_argument("--l1", type=float, default=0.02, help="weight of sparsity (default: 0.02)")
    parser.add_argument("--examples", type=int, default=10, help="prompts to train on (default: 10)")
    parser.add_argument("--epochs", type=int, default=500, help="steps of training (default: 500)")
    parser.add_argument("--last", action="store_true", help="look at the last position, not the mean of all")
    parser.add_argument("--skip-first", action="store_true", help="leave the first position out of the mean")
    parser.add_argument("--standardise", action="store_true", help="standardise the vectors of each head")
    parser.add_argument("--save", metavar="FILE", help="write the scores as a table of heads, JSON")
    parser.set_defaults(run=answer)


def answer(request: Request) -> dict[str, Any]:
    options = request.options
    _check(options)
    texts = None if options.task else [_lines(path) for path in (options.positives, options.negatives)]
    from regard.lens.circuits.sae import sae_scores

    sides, tokenizer = (texts, request.tokenizer) if texts else (_sides(request), None)
    begun = time.perf_counter()
    found = sae_scores(
        request.model, *sides, tokenizer=tokenizer, n_codes=options.codes, l1=options.l1,
        train_examples=options.examples, epochs=options.epochs, trials=options.trials,
        pool="last" if options.last else "mean", skip_first=options.skip_first,
        standardise="head" if options.standardise else None, seed=options.seed,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    _print_heads(request, found, len(sides[0]), seconds)
    if options.save:
        found.table.save(options.save)
    rows = [{name: finite(value) for name, value in row.items()} for row in found.table.table.rows()]
    told = {
        "model": request.source.name, "task": options.task, "prompts": len(sides[0]), "seconds": seconds,
        "dead": found.dead, "degenerate": found.degenerate, "seed": options.seed, "heads": rows,
    }  # fmt: skip
    return told | _held(request, found.table)


def _check(options: Any) -> None:
    given = [path for path in (options.positives, options.negatives) if path]
    if bool(options.task) == bool(given) or len(given) == 1:
        raise RegardError("give POSITIVES and NEGATIVES, or --task.")
    if options.count < 2:
        raise RegardError(f"--count is {options.count}; 2 prompts of each kind are the least.")
    if options.against == "paths" and not options.task:
        raise RegardError("--against paths needs --task, whose answers are patched.")
    if options.save and not Path(options.save).parent.is_dir():
        raise RegardError(f"--save: there is no folder {Path(options.save).parent}.")
    if options.against and options.against != "paths":
        _named(options.against)


def _lines(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RegardError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}.") from error
    return [line for line in lines if line.strip()]


def _prompts(request: Request, count: int, seed: int, **options: Any) -> Any:
    from regard.tasks.docstring import docstring
    from regard.tasks.greater_than import greater_than
    from regard.tasks.ioi import ioi

    make: dict[str, Callable[..., Any]] = {"ioi": ioi, "greater_than": greater_than, "docstring": docstring}
    return make[request.options.task](request.tokenizer, count, seed=seed, **options)


def _sides(request: Request) -> Any:
    options = {"corrupt": "absent"} if request.options.task == "ioi" else {}
    prompts = _prompts(request, request.options.count, request.options.seed, **options)
    return [[getattr(pair, f"{side}_ids") for pair in prompts.pairs] for side in ("clean", "corrupt")]


def _named(against: str) -> list[HeadName]:
    """The heads of a published circuit, or of a file."""
    if Path(against).is_file():
        from regard.lens.circuits.discover import Circuit

        return list(Circuit.load(against).heads())
    from regard.lens.circuits.truth import known_circuit

    task, _, version = against.partition(":")
    return list(known_circuit(task, version or None).heads)


def _held(request: Request, table: HeadTable) -> dict[str, Any]:
    """Hold every column against the circuit asked for."""
    against = request.options.against
    if not against:
        return {}
    from regard.lens.circuits.evaluation import evaluate

    begun = time.perf_counter()
    circuit = _patched(request) if against == "paths" else _named(against)
    seconds = time.perf_counter() - begun
    found = {name: evaluate(table, circuit, column=name) for name in SHOWN}
    said = f", found by path patching in {seconds:.0f} s" if against == "paths" else ""
    request.say()
    request.say(f"Against {against}, {len(circuit)} heads{said}:")
    request.say(f"  {'':12}{'AUC':>7}{'in layer':>10}{'precision':>11}{'recall':>8}{'F1':>6}")
    for name, one in found.items():
        request.say(
            f"  {name:12}{one.auc:>7.3f}{one.within_layer:>10.3f}{one.precision:>11.2f}{one.recall:>8.2f}"
            f"{one.f1:>6.2f}"
        )
    if found["sae"].said:
        request.say(f"{found['sae'].said}.")
    return {"circuit": [list(h) for h in circuit], "against": {n: _plain(one) for n, one in found.items()}}


def _patched(request: Request) -> list[HeadName]:
    from regard.lens.circuits.discover import discover_circuit

    count = min(request.options.count, 24)
    prompts = _prompts(request, count, request.options.seed + 500)
    return list(discover_circuit(request.model, prompts).heads(least=0.02))


def _print_heads(request: Request, found: CircuitScores, prompts: int, seconds: float) -> None:
    table = found.table
    request.say(f"{request.source.name}, {len(table)} heads, {prompts} + {prompts} prompts, {seconds:.0f} s")
    request.say()
    request.say("Heads with the most codes that positive prompts alone show:")
    request.say(f"  {'':12}" + "".join(f"{name:>12}" for name in SHOWN))
    for site, head, _ in table.top("sae", TOP):
        values = table.at(site, head)
        request.say(f"  {site + ' ' + str(head):12}" + "".join(f"{values[name]:>12.3g}" for name in SHOWN))
    if found.said():
        request.say(found.said())


def _plain(found: Evaluation) -> dict[str, float | None]:
    names = ("auc", "average_precision", "within_layer", "precision", "recall", "f1")
    return {name: finite(getattr(found, name)) for name in names}
