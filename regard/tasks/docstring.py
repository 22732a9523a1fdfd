"""Docstrings: the arguments of a function are described in the order in which they stand.

    def port(self, load, size, files, last, unit):
        \"\"\"oil column piece

        :param files: crime population
        :param last: unit dark
        :param                                        -> unit

    corrupt: the arguments of the head and of the description are random, so that nothing tells the next

The wrong tokens are the other arguments of the head. Places: `C_head` (the answer in the head), `B_head` (the
argument before it), `B_doc` (that one in the description) and `END`.

Source: Heimersheim and Janiak, 2023, "A circuit for Python docstrings in a 4-layer attention-only
transformer": two arguments before the three that are described and one after. Status: our own words.
"""

from __future__ import annotations

import random
from typing import Any

from regard.tasks.prompts import Prompts, Written, check_count, gather_prompts, single_tokens

WORDS = (
    "load", "size", "files", "last", "unit", "name", "path", "first", "model", "order", "page", "group",
    "image", "value", "table", "color", "index", "label", "point", "shape", "state", "level", "data",
    "text", "time", "user", "date", "line", "list", "key", "count", "limit", "field", "result",
    "source", "target", "number", "event",
)  # fmt: skip
SAID = (
    "oil", "column", "piece", "crime", "population", "dark", "river", "market", "winter", "paper",
    "office", "garden", "music", "stone", "letter", "doctor", "village", "summer", "bridge", "island",
    "forest", "window",
)  # fmt: skip
BEFORE, DESCRIBED, AFTER = 2, 3, 1


def docstring(tokenizer: Any, count: int = 32, *, seed: int = 0) -> Prompts:
    """Return prompts that go on with the next argument's name.

    Args:
        tokenizer: of transformers.
        count: how many.
        seed: of the words.

    Raises:
        RegardError: where too few of the words are one token.

    Example:
        >>> docstring(tokenizer, 1).places("END")                               # doctest: +SKIP
        tensor([41])
    """
    check_count(count)
    total = BEFORE + DESCRIBED + AFTER
    ids, lost = single_tokens(tokenizer, WORDS, "argument names", 2 * total)
    said, lost_too = single_tokens(tokenizer, SAID, "words", 7)
    generator, known, told = random.Random(seed), sorted(ids), sorted(said)
    written = []
    for _ in range(count):
        arguments, others = generator.sample(known, total), generator.sample(known, total + DESCRIBED - 1)
        words, name = generator.sample(told, 7), generator.choice(told)
        described = arguments[BEFORE : BEFORE + DESCRIBED]
        clean, places = _text(name, arguments, described, words)
        corrupt, _ = _text(name, others[:total], [*others[total:], ""], words)
        wrong = tuple(ids[word] for word in arguments if word != described[-1])
        written.append(Written(clean, corrupt, (ids[described[-1]],), wrong, places))
    return gather_prompts("docstring", tokenizer, written, "logit", [*lost, *lost_too])


def _text(
    name: str, arguments: list[str], described: list[str], words: list[str]
) -> tuple[str, dict[str, int]]:
    """Return a prompt and its places."""
    head = f"def {name}(self, {', '.join(arguments)}):\n"
    lines = [f'    """{" ".join(words[:3])}\n', "\n"]
    for number, argument in enumerate(described[:-1]):
        said = " ".join(words[3 + 2 * number : 5 + 2 * number])
        lines.append(f"    :param {argument}: {said}\n")
    text = head + "".join(lines) + "    :param"
    ends, end = [], len(f"def {name}(self")
    for argument in arguments:
        end += len(f", {argument}")
        ends.append(end)
    place = BEFORE + DESCRIBED - 1
    last = text.rindex(f":param {described[-2]}") + len(f":param {described[-2]}")
    return text, {"B_head": ends[place - 1], "C_head": ends[place], "B_doc": last, "END": len(text)}
