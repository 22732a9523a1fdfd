"""Colored objects: which colour has the thing that is asked for?

    Q: On the desk, there is a red pencil, an orange cup, and a blue bowl. What color is the cup?
    A: Orange
    Q: On the table, you see a green jug, a black ring, and a white ball. What color is the ball?
    A:                                                                                        -> " White"

One question is answered, the other is to be. The corrupt prompt has the same things and asks for another of
them. The wrong tokens are the two other colours. Places: `colour` (the right one in the list), `object` (in
the list), `asked` (in the question) and `END`.

Source: the task is of BIG-bench (Srivastava et al., 2023, arXiv 2206.04615) in the form of Merullo et al.,
2024, arXiv 2310.08744. Status: our own list of things.
"""

from __future__ import annotations

import random
from typing import Any

from regard.tasks.prompts import Prompts, Written, check_count, gather_prompts, single_token, single_tokens

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white", "pink", "gray")
OBJECTS = (
    "pencil", "cup", "bowl", "plate", "book", "ring", "ball", "bag", "box", "hat", "key", "lamp",
    "watch", "coin", "bottle", "knife", "shirt", "phone",
)  # fmt: skip
SURFACES, VERBS = ("table", "desk", "floor"), ("there is", "you see", "I see")
ASKED = 3


def colored_objects(tokenizer: Any, count: int = 32, *, seed: int = 0) -> Prompts:
    """Return prompts that go on with the colour of one of three things.

    Args:
        tokenizer: of transformers.
        count: how many.
        seed: of things, colours and the order.

    Raises:
        RegardError: where too few words are one token.

    Example:
        >>> colored_objects(tokenizer, 1).pairs[0].clean[-5:]                   # doctest: +SKIP
        'l?\\nA:'
    """
    check_count(count)
    names, lost = single_tokens(tokenizer, OBJECTS, "objects", 2 * ASKED)
    small, lost_too = single_tokens(tokenizer, COLOURS, "colours", ASKED)
    big = {word: single_token(tokenizer, f" {word.title()}") for word in small}
    colours = {word: found for word, found in big.items() if found is not None}
    generator, things = random.Random(seed), sorted(names)
    written = []
    for _ in range(count):
        chosen = generator.sample(things, 2 * ASKED)
        shot, _, shown = _question(generator, chosen[:ASKED], list(colours))
        front = f"{shot.format(asked=chosen[0])} {shown[0].title()}\n"
        question, ends, shown = _question(generator, chosen[ASKED:], list(colours))
        place, other = generator.sample(range(ASKED), 2)
        asked = chosen[ASKED + place]
        clean, corrupt = (front + question.format(asked=each) for each in (asked, chosen[ASKED + other]))
        wrong = tuple(colours[c] for i, c in enumerate(shown) if i != place)
        others = [i for i in range(ASKED) if i != place]
        places = {
            "colour": len(front) + ends[place][0],
            "object": len(front) + ends[place][1],
            **{f"wrong {n}": len(front) + ends[i][0] for n, i in enumerate(others, 1)},
            "asked": len(clean) - len("?\nA:"),
            "END": len(clean),
        }
        written.append(Written(clean, corrupt, (colours[shown[place]],), wrong, places))
    return gather_prompts("colored_objects", tokenizer, written, "logit", [*lost, *lost_too])


def _question(
    generator: random.Random, things: list[str], known: list[str]
) -> tuple[str, list[tuple[int, int]], list[str]]:
    """Return a question with {asked} in it, where each thing's colour and name end, and the colours."""
    colours = generator.sample(known, ASKED)
    text = f"Q: On the {generator.choice(SURFACES)}, {generator.choice(VERBS)} "
    ends = []
    for number, (colour, thing) in enumerate(zip(colours, things, strict=True)):
        text += ("", ", ", ", and ")[number] + ("an " if colour[0] in "aeiou" else "a ") + colour
        ends.append((len(text), len(text) + 1 + len(thing)))
        text += f" {thing}"
    return text + ". What color is the {asked}?\nA:", ends, colours
