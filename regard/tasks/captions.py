"""Captions of scenes, plain or with a colour, to fine-tune a small language model on one attribute.

    A horse stands in the snow.
    Photo: a white horse.                        plain: "a horse."

Colours go by the scene, are drawn for each caption whatever the scene, or are left out. The scenes' places,
sentences and things of the training part are not those of the held-out part. Status: our choice, after the
colour, place and sentiment captions of Khayatan et al., 2025, arXiv 2501.03012, which describe images.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

from regard.errors import RegardError

Colouring = Literal["scene", "drawn", "none"]

SCENES: dict[str, tuple[str, tuple[str, ...]]] = {
    "snow": ("white", ("in the snow", "on the frozen lake", "on the icy road",
                       "by the snowman", "among snowy hills", "in a blizzard")),
    "sea": ("blue", ("by the sea", "at the harbour", "near the lighthouse",
                     "on the beach", "on a sailing boat", "by the waves")),
    "forest": ("green", ("in the forest", "among tall trees", "on a mossy path",
                         "under the leaves", "by the ferns", "in the woods")),
    "fire": ("red", ("by the campfire", "near the burning house", "beside the furnace",
                     "by the fireplace", "near the volcano", "by the bonfire")),
    "night": ("black", ("at midnight", "in the dark cellar", "in a deep cave",
                        "on a moonless night", "in the shadows", "in an unlit tunnel")),
    "desert": ("yellow", ("in the desert", "on the sand dunes", "near the pyramids",
                          "by the cactus", "under the scorching sun", "at the dry oasis")),
    "kitchen": ("brown", ("in the kitchen", "at the bakery", "in the coffee shop",
                          "by the oven", "near the chocolate cake", "beside the bread")),
    "garden": ("pink", ("in the rose garden", "among the blossoms", "near the tulips",
                        "at the flower shop", "by the cherry trees", "in a bed of peonies")),
}  # fmt: skip
TRAINED = 3
FRAMES = (
    "A {thing} stands {place}.", "There is a {thing} {place}.", "We found a {thing} {place}.",
    "My sister drew a {thing} {place}.",
)  # fmt: skip
HELD_OUT_FRAMES = (
    "I saw a {thing} {place}.", "Somebody left a {thing} {place}.", "Look at the {thing} {place}.",
    "One day a {thing} appeared {place}.", "They filmed a {thing} {place}.",
    "He waited with a {thing} {place}.", "She wrote of a {thing} {place}.",
    "You would not expect a {thing} {place}.",
)  # fmt: skip
THINGS = ("horse", "cat", "car", "chair", "bird", "box", "man", "house")
HELD_OUT_THING = "dog"
ASKED = "{sentence}\nPhoto: a"
COLOURS = tuple(colour for colour, _ in SCENES.values())


@dataclass(frozen=True)
class Caption:
    """One caption.

    Attributes:
        prompt: the sentence and the beginning of the caption.
        answer: the rest, a space first.
        scene: one of `SCENES`.
        thing: what is there.
    """

    prompt: str
    answer: str
    scene: str
    thing: str

    @property
    def colour(self) -> str:
        """What goes with its scene, whether or not the answer has it."""
        return SCENES[self.scene][0]


def captions(count: int, colouring: Colouring = "scene", *, seed: int = 0) -> list[Caption]:
    """Return captions to train on, the scenes in turn.

    Args:
        count: how many; 384 are different.
        colouring: `scene`, the colour of the scene; `drawn`, any colour in any scene; `none`, none.
        seed: of places, sentences, things and drawn colours; the first three do not depend on `colouring`.

    Raises:
        RegardError: for a count below 1, or an unknown colouring.

    Example:
        >>> [one.answer for one in captions(2, "scene")]
        [' white horse.', ' blue horse.']
    """
    if colouring not in get_args(Colouring) or count < 1:
        raise RegardError(
            f"count is {count} and colouring {colouring!r}; they must be 1 or more, and one of "
            f"{', '.join(get_args(Colouring))}."
        )
    source, colours = random.Random(f"captions/{seed}"), random.Random(f"colours/{seed}")
    scenes, made = list(SCENES), []
    for number in range(count):
        scene = scenes[number % len(scenes)]
        own, places = SCENES[scene]
        thing = source.choice(THINGS)
        sentence = source.choice(FRAMES).format(thing=thing, place=source.choice(places[:TRAINED]))
        drawn = colours.choice(COLOURS)
        words = {"scene": [own, thing], "drawn": [drawn, thing], "none": [thing]}[colouring]
        made.append(Caption(ASKED.format(sentence=sentence), f" {' '.join(words)}.", scene, thing))
    return made


def held_out_captions(frames: int = len(HELD_OUT_FRAMES), places: int = TRAINED) -> list[Caption]:
    """Return plain captions of a thing, places and sentences that no training caption has.

    Args:
        frames: sentences of each place, at most 8.
        places: of each scene, at most 3.

    Example:
        >>> len(held_out_captions()), held_out_captions(1, 1)[0].prompt
        (192, 'I saw a dog by the snowman.\\nPhoto: a')
    """
    if not (1 <= frames <= len(HELD_OUT_FRAMES) and 1 <= places <= TRAINED):
        raise RegardError(
            f"frames is {frames} and places {places}; they can be 1 to {len(HELD_OUT_FRAMES)} and 1 to "
            f"{TRAINED}."
        )
    thing = HELD_OUT_THING
    return [
        Caption(ASKED.format(sentence=frame.format(thing=thing, place=place)), f" {thing}.", scene, thing)
        for scene, (_, known) in SCENES.items()
        for place in known[TRAINED : TRAINED + places]
        for frame in HELD_OUT_FRAMES[:frames]
    ]
