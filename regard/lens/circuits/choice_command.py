"""`regard run chinchilla-circuits`: how a model answers multiple choice, and which heads do that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regard.errors import RegardError

if TYPE_CHECKING:
    from regard.cli.request import Request, SystemParser
    from regard.lens.circuits.choice_roles import ChoiceHeads
    from regard.runtime.table import Table
    from regard.tasks.questions import Question

LABELS = ("ABCD", "next", "random", "1234", "shuffled")
SHOWN = 8


def command(parser: SystemParser) -> None:
    """Ask multiple-choice questions by label and by content, and take the labels' logits apart over heads and
    MLPs; keep heads to a few directions of their queries and keys.
    """
    parser.takes("model", "seed")
    parser.add_argument(
        "data", nargs="?", metavar="DATA.csv", help="questions as MMLU has them (default: simple ones)"
    )
    parser.add_argument("--count", type=int, default=40, help="questions, at most (default: 40)")
    parser.add_argument("--shots", type=int, default=0, help="answered questions in front (default: 0)")
    parser.add_argument("--labels", choices=LABELS, default="ABCD", help="of the options (default: ABCD)")
    parser.add_argument(
        "--totals", action="store_true", help="patch every head and MLP too, which takes minutes"
    )
    parser.add_argument(
        "--compress", nargs="+", metavar="LAYER.HEAD", help="keep these heads to few directions"
    )
    parser.set_defaults(run=answer)


def answer(request: Request) -> dict[str, Any]:
    options = request.options
    heads = [_head(name) for name in options.compress or ()]
    questions, shots = _questions(options)
    from regard.lens.circuits.choice_roles import categorise
    from regard.lens.circuits.choosing import answer_choices
    from regard.tasks.questions import choices

    asked = choices(request.tokenizer, questions, labels=options.labels, shots=shots, seed=options.seed)
    request.check_length(max(len(ids) for ids in asked.ids))
    answered = answer_choices(request.model, asked, tokenizer=request.tokenizer)
    request.say(f"{request.source.name}: {answered.said()}")
    request.say(f"It gives one place {answered.favourite:.0%} of the answers.")
    found = categorise(request.model, asked, totals=options.totals, seed=options.seed)
    _print_nodes(request, found)
    told = {
        "model": request.source.name, "questions": len(asked), "by_label": answered.by_label,
        "by_content": answered.by_content, "does_task": answered.does_task, "net": found.total,
        "output_nodes": [list(node) for node in found.nodes],
        "roles": {role: [list(head) for head in members] for role, members in found.roles().items()},
    }  # fmt: skip
    if heads:
        from regard.lens.circuits.compressing import compress, mutate

        ranks = compress(request.model, asked, heads, seed=options.seed)
        _print_table(
            request, "Queries and keys of these heads kept to some directions, and to random ones:", ranks
        )
        forms = mutate(request.model, request.tokenizer, questions, heads, seed=options.seed)
        _print_table(request, "Three directions of the first form in others:", forms)
        told |= {"ranks": list(ranks.rows()), "forms": list(forms.rows())}
    return told


def _questions(options: Any) -> tuple[list[Question], list[Question]]:
    from regard.tasks.questions import read_questions, simple_questions

    if options.count < 4 or options.shots < 0:
        raise RegardError(f"--count is {options.count} and --shots {options.shots}; give at least 4 and 0.")
    if options.data is None:
        shots = simple_questions(options.shots, seed=options.seed + 1) if options.shots else []
        return simple_questions(options.count, seed=options.seed), shots
    every = read_questions(options.data)
    if len(every) <= options.shots:
        raise RegardError(
            f"{options.data} has {len(every)} questions, and --shots takes {options.shots} of them."
        )
    return every[options.shots :][: options.count], every[: options.shots]


def _head(name: str) -> tuple[int, int]:
    layer, _, head = name.partition(".")
    if not (layer.isdigit() and head.isdigit()):
        raise RegardError(f"--compress takes LAYER.HEAD, such as 23.3, and not {name!r}.")
    return int(layer), int(head)


def _print_nodes(request: Request, found: ChoiceHeads) -> None:
    request.say()
    count, net = len(found.nodes), found.total
    request.say(f"Net logit of the right label {net:+.2f}; {count} nodes make 80 % of all for it:")
    for alias, head, effect in found.nodes[:SHOWN]:
        request.say(f"  {alias:10}{'MLP' if head is None else head!s:>4}{effect:>+8.2f}")
    request.say()
    if not found.answered.does_task:
        request.say(
            "Heads that carry the right label are not told of a model that does no better than chance."
        )
    for role, members in found.roles().items():
        some = ", ".join(f"{alias.rpartition('.')[2]}.{head}" for alias, head in members[:SHOWN])
        more = f" and {len(members) - SHOWN} more" if len(members) > SHOWN else ""
        request.say(f"  {role:16}{some or 'none'}{more}")


def _print_table(request: Request, title: str, table: Table) -> None:
    request.say()
    request.say(title)
    rows = list(table.rows())
    names = list(rows[0])
    widths = {name: max(len(name), 17 if name == "form" else 6) + 2 for name in names}
    request.say("".join(f"{name:>{widths[name]}}" for name in names))
    for row in rows:
        request.say("".join(f"{_cell(row[name]):>{widths[name]}}" for name in names))


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
