"""Indirect objects: who was given something?

    Then, Mary and John went to the market. John gave a basket to        -> Mary, the indirect object (IO)

The subject S is named twice, and the model must answer with the other name. Places: `IO`, `S1`, `S1+1` (the
token after S1), `S2` and `END`.

    corrupt="abc"      three other names: nothing is repeated                        Wang et al.
    corrupt="swap"     S2 is the other name, so that the answer is S                 Merullo et al.
    corrupt="absent"   S1 is the first prompt's IO, and IO a third name              O'Neill et al.

Sources: Wang et al., 2023, arXiv 2211.00593 (the task); Merullo et al., 2024, arXiv 2310.08744; O'Neill and
Bui, 2024, arXiv 2405.12522. Status: our own sentences, of their form.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from regard.errors import RegardError
from regard.tasks.prompts import Prompts, Written, check_count, gather_prompts, single_tokens

NAMES = (
    "Mary", "John", "Anna", "Tom", "Peter", "Sarah", "James", "Alice", "David", "Emma", "Paul", "Laura",
    "Mark", "Julia", "Daniel", "Kate", "Simon", "Helen", "Robert", "Jane", "Henry", "Rose", "Frank",
    "Grace", "Jack", "Lisa", "George", "Amy", "Adam", "Maria", "William", "Susan", "Michael", "Rachel",
    "Thomas", "Linda", "Charles", "Emily", "Steven", "Victoria",
)  # fmt: skip
PLACES = (
    "market",
    "garden",
    "station",
    "library",
    "school",
    "beach",
    "office",
    "museum",
    "harbour",
    "church",
)
OBJECTS = ("basket", "letter", "book", "ticket", "drink", "ring", "map", "flower", "coin", "key")
TEMPLATES = (
    "Then, {A} and {B} went to the {place}. {S} gave a {object} to",
    "After {A} and {B} met at the {place}, {S} handed a {object} to",
    "When {A} and {B} came back from the {place}, {S} passed a {object} to",
    "While {A} and {B} were walking to the {place}, {S} offered a {object} to",
    "One day {A} and {B} worked at the {place}, and {S} sold a {object} to",
    "Before {A} and {B} left the {place}, {S} showed a {object} to",
)
ORDERS = ("mixed", "ABBA", "BABA")
CORRUPTIONS = ("abc", "swap", "absent")


def ioi(
    tokenizer: Any,
    count: int = 32,
    *,
    seed: int = 0,
    order: str = "mixed",
    corrupt: str = "abc",
    names: Sequence[str] = NAMES,
    templates: Sequence[str] = TEMPLATES,
) -> Prompts:
    """Return prompts whose answer is the name that is not repeated.

    Args:
        tokenizer: of transformers.
        count: how many; orders and templates take turns.
        seed: of names, places and objects.
        order: `ABBA` names IO first, `BABA` the subject; `mixed` takes turns.
        corrupt: what the other side is, see above.
        names: to choose from; those that are not one token are left out.
        templates: sentences with {A}, {B}, {S}, {place} and {object}.

    Raises:
        RegardError: for an unknown order or corruption, a template without its parts, or fewer than six
            names (three for others than "abc") that are one token.

    Example:
        >>> prompts = ioi(tokenizer, 4)                                         # doctest: +SKIP
        >>> prompts.pairs[0].clean                                              # doctest: +SKIP
        'Then, Anna and Mark went to the garden. Mark gave a key to'
    """
    _check(count, order, corrupt, templates)
    needed = 6 if corrupt == "abc" else 3
    ids, left_out = single_tokens(tokenizer, names, "names", needed)
    generator, known = random.Random(seed), sorted(ids)
    written = []
    for number in range(count):
        template = templates[number // 2 % len(templates)]
        first = order == "ABBA" or (order == "mixed" and number % 2 == 0)
        people = generator.sample(known, needed)
        words = {"place": generator.choice(PLACES), "object": generator.choice(OBJECTS)}
        written.append(_written(template, first, people, words, corrupt, ids))
    return gather_prompts("ioi", tokenizer, written, "logit", left_out)


def _written(
    template: str, io_first: bool, people: list[str], words: dict[str, str], corrupt: str, ids: dict[str, int]
) -> Written:
    io, subject = people[:2]

    def filled(io: str, subject: str, again: str) -> str:
        a, b = (io, subject) if io_first else (subject, io)
        return template.format(A=a, B=b, S=again, **words)

    clean = filled(io, subject, subject)
    other = {
        "swap": lambda: filled(io, subject, io),
        "absent": lambda: filled(people[2], io, subject),
        "abc": lambda: filled(*people[3:6]),
    }[corrupt]()
    first, second = clean.index(subject), clean.rindex(subject)
    after = first + len(subject)
    places = {
        "IO": clean.index(io) + len(io),
        "S1": after,
        "S1+1": after + 1 + len(clean[after + 1 :].split()[0]) if clean[after] == " " else after + 1,
        "S2": second + len(subject),
        "END": len(clean),
    }
    return Written(clean, other, (ids[io],), (ids[subject],), places)


def _check(count: int, order: str, corrupt: str, templates: Sequence[str]) -> None:
    check_count(count)
    for name, value, known in (("order", order, ORDERS), ("corrupt", corrupt, CORRUPTIONS)):
        if value not in known:
            raise RegardError(f"{name} is {value!r}; it must be one of {', '.join(known)}.")
    for template in templates:
        lacking = [part for part in ("{A}", "{B}", "{S}") if part not in template]
        if lacking:
            raise RegardError(f"the template {template!r} lacks {', '.join(lacking)}.")
