"""Scaling Local Self-Attention for Parameter Efficient Visual Backbones (HaloNet, arXiv 2103.12731).

Five parts. The formula: random maps, blocks and halos, plain and strided, outputs and gradients against one
query after another, beside four planted faults. Shifts by a block and by a pixel. Marks: at each mark of an
image of 16 x 16 the brightness two columns to the right is asked of one layer: with a halo, without, without
in blocks as large as the window was, and with a halo but no positions. Images: made textures of 16 x 16, and
four networks of equal parameters that differ in what mixes positions inside bottlenecks: halo attention, the
same without halo, 3 x 3 convolutions, and attention of every pixel to itself alone. Cost: maps of 32 x 32 to
96 x 96, beside the usual unfolding and dense attention under the mask.
Status: sizes and rules are our choice, those of marks by a prototype; the paper's figures are of ImageNet.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from regard.studies.base import Results, Step, Study
from regard.studies.claims import Claim, Quantity, Rule
from regard.studies.registry import study
from regard.studies.threads import one_thread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

MARKS: dict[str, dict[str, Any]] = {
    "halo": {"block": 4, "halo": 2},
    "blocks": {"block": 4, "halo": 0},
    "window": {"block": 8, "halo": 0},
    "unplaced": {"block": 4, "halo": 2, "relative": False},
}
NETWORK: dict[str, Any] = {
    "widths": [32, 64], "inner": [16, 32], "heads": [1, 2], "stem_width": 16, "num_channels": 1,
}  # fmt: skip
NETWORKS: dict[str, dict[str, Any]] = {
    "halo": {},
    "blocks": {"halo": 0},
    "convolution": {"attends": [[], []]},
    "alone": {"block": 1, "halo": 0},
}
PIXELS, KINDS = 16, 8


@dataclass(frozen=True)
class Size:
    """How many draws, rounds, seeds and steps; which sides of maps; textures of each kind."""

    draws: int = 8
    rounds: int = 7
    sides: tuple[int, ...] = (32, 48, 64, 96)
    seeds: int = 3
    steps: int = 250
    network_seeds: int = 3
    network_steps: int = 200
    textures: int = 160


def difference(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=about, over="draws", low=0)


def share(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=about, low=0, high=1, unit="%")


def above(measure: str, control: str, threshold: float = 0.0, **options: Any) -> Rule:
    options = {"paired": True, **options}
    return Rule(measure=measure, comparison="above", threshold=threshold, control=control, **options)


@study("halonet")
class HaloNetStudy(Study):
    """Is the formula exact, does the halo carry across blocks, what does it cost, does it serve on images?"""

    title = "Scaling Local Self-Attention for Parameter Efficient Visual Backbones"
    paper = "Vaswani et al. 2021, arXiv 2103.12731"
    quantities = (
        difference("error", "largest error of outputs and gradients against the rule, float64"),
        difference("fault", "the same against the rule with a planted fault, the smallest of four"),
        difference("moved_block", "interior after a shift by a block, float32"),
        difference("moved_pixel", "interior after a shift by a pixel"),
        *(share(f"inside_{name}", f"marks told rightly in the block, {name}") for name in MARKS),
        *(share(f"across_{name}", f"marks told rightly across its edge, {name}") for name in MARKS),
        *(share(f"images_{name}", f"textures told rightly, {name}") for name in NETWORKS),
        Quantity(name="growth", about="exponent of time in pixels, block 8, halo 3", over="rounds"),
        Quantity(name="growth_dense", about="the same, SDPA under the mask", over="rounds"),
        Quantity(name="time", about="the largest map", over="rounds", low=0, unit=" ms"),
        Quantity(name="time_unfolded", about="the same, unfolded", over="rounds", low=0, unit=" ms"),
    )
    claims = (
        Claim(
            name="formula",
            text="Outputs and gradients are those of the formula, strided too, and a planted fault is seen.",
            rules=(
                Rule(measure="error", comparison="below", threshold=1e-11),
                above("fault", "error", 1e-3),
            ),
            main=True,
            paper="section 2",
        ),
        Claim(
            name="across blocks",
            text="With a halo a layer reads across the edge of its block; without one it cannot.",
            rules=(
                Rule(measure="across_halo", comparison="above", threshold=0.95),
                Rule(measure="across_blocks", comparison="below", threshold=0.6),
                Rule(measure="across_window", comparison="below", threshold=0.6),
                above("across_halo", "across_blocks", 0.35),
                above("across_halo", "across_window", 0.35),
            ),
            needs=(
                Rule(measure="inside_blocks", comparison="above", threshold=0.95),
                Rule(measure="inside_window", comparison="above", threshold=0.95),
            ),
            main=True,
            paper="section 2: the halo restores what blocks cut",
        ),
        Claim(
            name="positions",
            text="Without its relative positions a window does not know which pixel is two to the right.",
            rules=(
                above("across_halo", "across_unplaced", 0.2),
                above("inside_halo", "inside_unplaced", 0.2),
            ),
        ),
        Claim(
            name="linear cost",
            text="Time grows with the pixels to a power below 1.2, and that of dense attention far faster.",
            rules=(
                Rule(measure="growth", comparison="below", threshold=1.2),
                above("growth_dense", "growth", 0.5),
            ),
            main=True,
            paper="linear in pixels",
        ),
        Claim(
            name="faster than unfolding",
            text="It takes less than two thirds of the time of padding, unfolding and plain products.",
            rules=(above("time_unfolded", "time", factor=1.5),),
        ),
        Claim(
            name="equal parameters",
            text="With equal parameters halo attention tells textures better than 3 x 3 convolutions.",
            rules=(above("images_halo", "images_convolution"),),
            needs=(above("images_halo", "images_alone", 0.05),),
            paper="state of the art on ImageNet in the parameter-limited setting",
        ),
        Claim(
            name="halo on images",
            text="With equal parameters it tells textures better than attention inside blocks alone.",
            rules=(above("images_halo", "images_blocks"),),
            needs=(above("images_halo", "images_alone", 0.05),),
        ),
        Claim(
            name="shifts",
            text="A shift by a block shifts the interior; a shift by a pixel does not.",
            rules=(
                Rule(measure="moved_block", comparison="below", threshold=1e-5),
                above("moved_pixel", "moved_block", 0.1),
            ),
        ),
    )
    full, quick = (
        Size(),
        Size(
            draws=3, rounds=1, sides=(16, 24), seeds=1, steps=3, network_seeds=1, network_steps=2, textures=3
        ),
    )

    def steps(self) -> Iterable[Step]:
        for draw in range(self.size.draws):
            yield Step(f"formula, draw {draw}", partial(self.formula, draw), cost=0.3)
        yield Step("growth", self.growth)
        for seed in range(self.size.seeds):
            for name in MARKS:
                yield Step(f"marks, {name}, seed {seed}", partial(self.train_marks, name, seed))
        for seed in range(self.size.network_seeds):
            for name in NETWORKS:
                yield Step(f"images, {name}, seed {seed}", partial(self.train_network, name, seed), cost=2)

    def formula(self, draw: int) -> dict[str, float]:
        """Measure errors on random maps, those of the faults, and shifts."""
        from regard.studies.halonet_parts import FAULTS, drawn, error_of, moved

        chance = random.Random(f"{self.seed}/{draw}")
        cases = [drawn(chance, stride) for stride in (1, 2)]
        with one_thread():
            faults = {f"fault {fault}": error_of(cases[1], fault) for fault in FAULTS}
            errors = [error_of(case) for case in cases]
            return {"error": max(errors), **faults, "moved_block": moved(4), "moved_pixel": moved(1)}

    def growth(self) -> dict[str, list[float]]:
        """Time the three ways on maps of all sides, one thread."""
        import torch

        from regard.studies.halonet_parts import ways
        from regard.studies.rounds import in_rounds

        cases = {f"{name} {side}": work for side in self.size.sides for name, work in ways(side).items()}
        with one_thread(), torch.no_grad():
            return in_rounds(cases, self.size.rounds)

    def train_marks(self, name: str, seed: int) -> dict[str, float]:
        """Train one layer on marks; return the accuracy inside and across."""
        from regard.studies.halonet_parts import marked_accuracy

        with one_thread():
            return marked_accuracy(MARKS[name], self.size.steps, 1000 * self.seed + seed, self.tick)

    def train_network(self, name: str, seed: int) -> dict[str, float]:
        """Train a network on textures; return the accuracy on held-out ones, and its parameters."""
        import torch

        from regard.objectives.confusion import confusion
        from regard.objectives.images import train_images
        from regard.tasks.textures import textures

        data = textures(
            PIXELS, channels=1, train=self.size.textures, held_out=40, seed=1000 * self.seed + seed
        )
        torch.manual_seed(1000 * self.seed + seed)
        model = network(name)
        count = sum(p.numel() for p in model.parameters())
        with one_thread():
            train_images(
                model, data, steps=self.size.network_steps, batch=min(32, KINDS * self.size.textures),
                rate=3e-3, device="cpu", evaluate_every=self.size.network_steps, tick=self.tick, seed=seed,
            )  # fmt: skip
            return {"accuracy": confusion(model, data).accuracy, "parameters": count}

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        from regard.studies.halonet_parts import FAULTS

        draws, growth = named(results, "formula"), results["growth"]
        side = self.size.sides[-1]
        return {
            **{name: [told[name] for told in draws] for name in ("error", "moved_block", "moved_pixel")},
            "fault": [min(told[f"fault {fault}"] for fault in FAULTS) for told in draws],
            **{f"{where}_{name}": [told[where] for told in named(results, f"marks, {name},")]
               for name in MARKS for where in ("inside", "across")},
            **{f"images_{name}": [told["accuracy"] for told in named(results, f"images, {name},")]
               for name in NETWORKS},
            "growth": exponents(growth, "halo"),
            "growth_dense": exponents(growth, "dense"),
            "time": [1e3 * seconds for seconds in growth[f"halo {side}"]],
            "time_unfolded": [1e3 * seconds for seconds in growth[f"unfolded {side}"]],
        }  # fmt: skip

    def details(self, results: Results) -> dict[str, Any]:
        from regard.studies.halonet_parts import FAULTS

        draws = named(results, "formula")
        parameters = {name: named(results, f"images, {name},")[0]["parameters"] for name in NETWORKS}
        return {
            "faults": {fault: min(told[f"fault {fault}"] for told in draws) for fault in FAULTS},
            "milliseconds": {name: 1e3 * median(took) for name, took in results["growth"].items()},
            "parameters": parameters,
            "remarks": [
                "A guess at a mark is right in 50 %, at a texture in 12.5 %. Parameters of the networks: "
                + ", ".join(f"{name} {count:,}" for name, count in parameters.items()) + "."
            ],
        }  # fmt: skip

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.halonet_picture import draw

        draw(outcome, figure)


def named(results: Results, start: str) -> list[Any]:
    """Return the results of the steps whose name begins so."""
    return [told for name, told in results.items() if name.startswith(start)]


def exponents(times: Mapping[str, Sequence[float]], way: str) -> list[float]:
    """Return the slope of log time over log pixels, by least squares, of every round."""
    import math

    took = {int(name.split()[1]): seconds for name, seconds in times.items() if name.startswith(f"{way} ")}
    x = [2 * math.log(side) for side in took]
    mean = sum(x) / len(x)
    rounds = zip(*took.values(), strict=True)
    return [
        sum((a - mean) * math.log(seconds) for a, seconds in zip(x, one, strict=True))
        / sum((a - mean) ** 2 for a in x)
        for one in rounds
    ]


def network(name: str) -> Any:
    """Return one of the networks with fresh weights, its bottlenecks as wide as makes parameters equal."""
    import torch

    from regard.models.images import image_model

    def count(options: dict[str, Any]) -> int:
        with torch.device("meta"):
            model = image_model("halonet-small", num_labels=KINDS, **options)
        return sum(p.numel() for p in model.parameters())

    wanted, heads = count(NETWORK), NETWORK["heads"]
    fits = [{**NETWORK, **NETWORKS[name], "inner": [n * inner for n in heads]} for inner in range(4, 40)]
    best = min(fits, key=lambda options: abs(count(options) - wanted))
    return image_model("halonet-small", num_labels=KINDS, **best)
