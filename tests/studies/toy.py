"""Studies of dice, for the tests of the framework: no model, no time, every outcome known."""

import random
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from regard.studies import Claim, Quantity, Rule, Step, Study


@dataclass(frozen=True)
class Size:
    """How many dice are thrown, and how often each."""

    dice: int = 6
    throws: int = 200


class Dice(Study):
    """A die that is loaded towards six, beside one that is not."""

    title = "Of Loaded Dice"
    paper = "A. Uthor 2024, arXiv 2401.00001"
    quantities = (
        Quantity(name="loaded", about="mean of a loaded die", low=1, high=6, unit="points"),
        Quantity(name="fair", about="mean of a fair die", low=1, high=6, unit="points"),
    )
    claims = (
        Claim(
            name="more",
            text="A loaded die shows more.",
            rules=(Rule(measure="loaded", comparison="above", threshold=0.5, control="fair", paired=True),),
            main=True,
            paper="1.2 points",
        ),
        Claim(
            name="double",
            text="It shows twice as much.",
            rules=(Rule(measure="loaded", comparison="above", threshold=0, control="fair", factor=2),),
        ),
    )
    full, quick = Size(), Size(dice=3, throws=50)
    ran: ClassVar[list[int]] = []

    def steps(self):
        for number in range(self.size.dice):
            yield Step(f"die {number}", partial(self.throw, number))

    def throw(self, number):
        type(self).ran.append(number)
        chance = random.Random(1000 * self.seed + number)
        fair = [chance.randint(1, 6) for _ in range(self.size.throws)]
        return {
            "fair": sum(fair) / len(fair),
            "loaded": sum(6 if chance.random() < 0.4 else x for x in fair) / len(fair),
        }

    def measure(self, results):
        return {name: [told[name] for told in results.values()] for name in ("loaded", "fair")}

    def draw(self, outcome, figure):
        axis = figure.subplots()
        axis.bar(["loaded", "fair"], [outcome.value("loaded"), outcome.value("fair")])
