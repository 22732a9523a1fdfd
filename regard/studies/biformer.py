"""BiFormer: Vision Transformer with Bi-Level Routing Attention (arXiv 2303.08810).

Four parts. Planted directions: regions of 16 tokens lie around one of 12 directions, with noise as large; how
much of dense attention lies inside four regions that are routed, drawn, nearest, or best? Recall: one layer
learns to read values from the region with the same tag, beside drawn and nearest regions and full attention,
and again where all queries share a vector. Cost: scores of both levels with as many regions as make them
fewest. Images: small BiFormers on packaged digits and made textures, beside the same with drawn or nearest
regions, all regions, no attention but the convolution beside it, and convolutions with as many parameters.
Status: sizes and rules are our choice; the paper trains on ImageNet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from regard.studies.base import Results, Step, Study
from regard.studies.claims import Claim, Quantity, Rule
from regard.studies.registry import study
from regard.studies.threads import one_thread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

RATE, CHANCE = 3e-3, 1 / 16
SHARES = {"pure": 1.0, "mixed": 0.6, "stray": 0.3}
WAYS = ("routed", "best", "random", "nearest")
ARMS = {"routed": "four routed regions", "random": "four random regions", "nearest": "the four nearest",
        "full": "all regions"}  # fmt: skip
SHARED = {"shared_routed": "four routed regions, queries share a vector",
          "shared_full": "all regions, queries share a vector"}  # fmt: skip
SETS = ("digits", "textures")
MODELS = {"routed": "two routed regions", "random": "two random regions", "nearest": "the two nearest",
          "full": "all regions", "none": "the convolution beside attention alone",
          "convolved": "convolutions of as many parameters"}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How many draws, seeds, steps and asked maps; sides of maps; epochs, images a class."""

    draws: int = 5
    seeds: int = 3
    steps: int = 500
    fewer: int = 300
    asked: int = 16
    sides: tuple[int, ...] = (24, 48, 96, 192, 384)
    epochs: tuple[int, int] = (6, 8)
    images: int = 160


def mass(way: str, name: str) -> Quantity:
    about = f"dense attention inside four regions, {way}, {SHARES[name]:.0%} of tokens on theme"
    return Quantity(name=f"{name}_{way}", about=about, over="draws", low=0, high=1, unit="%")


def share(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=about, low=0, high=1, unit="%")


def above(measure: str, control: str, threshold: float = 0.0, factor: float = 1.0) -> Rule:
    return Rule(
        measure=measure, comparison="above", threshold=threshold, control=control, factor=factor, paired=True
    )


def below(measure: str, threshold: float, **options: Any) -> Rule:
    return Rule(measure=measure, comparison="below", threshold=threshold, **options)


def learned(measure: str) -> Rule:
    return Rule(measure=measure, comparison="above", threshold=0.9)


@study("biformer")
class BiFormerStudy(Study):
    """Do mean queries and keys find the regions that matter, when do they not, and what does it cost?"""

    title = "BiFormer: Vision Transformer with Bi-Level Routing Attention"
    paper = "Zhu et al. 2023, arXiv 2303.08810"
    quantities = (
        *(mass(way, name) for name in SHARES for way in WAYS),
        *(share(f"recall_{arm}", f"values recalled, {about}") for arm, about in (ARMS | SHARED).items()),
        *(share(f"found_{arm}", f"queries that look at the right region, {about}")
          for arm, about in (ARMS | SHARED).items() if "full" not in arm),
        Quantity(name="exponent", about="of scores in tokens, at the best number of regions",
                 over="measurements"),
        Quantity(name="exponent_off", about="how far that is from 4/3", over="measurements", low=0),
        Quantity(name="exponent_dense", about="the same, full attention", over="measurements"),
        *(share(f"{name}_{arm}", f"{name} classified rightly, {about}")
          for name in SETS for arm, about in MODELS.items()),
    )  # fmt: skip
    claims = (
        Claim(
            name="finds",
            text="Routing keeps more than 0.9 of what four regions can keep, and far more than others.",
            rules=(
                above("pure_routed", "pure_best", factor=0.9),
                above("pure_routed", "pure_random", 0.3),
                above("pure_routed", "pure_nearest", 0.3),
            ),
            main=True,
        ),
        Claim(
            name="fades",
            text="Where 30 % of a region's tokens are on theme, it keeps less than 0.9 of that.",
            rules=(below("stray_routed", 0.0, control="stray_best", factor=0.9, paired=True),),
        ),
        Claim(
            name="learns",
            text="A layer learns to recall by four routed regions, and not by random or nearest ones.",
            rules=(
                learned("recall_routed"),
                below("recall_random", 0.3),
                below("recall_nearest", 0.3),
                above("recall_routed", "recall_random", 0.3),
                above("recall_routed", "recall_nearest", 0.3),
            ),
            main=True,
        ),
        Claim(
            name="shared vector",
            text="Where all queries share a vector, routing misses what full attention still finds.",
            rules=(
                below("found_shared_routed", 0.1),
                below("recall_shared_routed", -0.5, control="recall_shared_full", paired=True),
            ),
            needs=(learned("recall_shared_full"), learned("found_routed")),
        ),
        Claim(
            name="cost",
            text="Scores grow with the tokens to the power 4/3, and those of full attention far faster.",
            rules=(
                below("exponent_off", 0.05, least=1),
                Rule(
                    measure="exponent_dense", comparison="above", threshold=0.5, control="exponent", least=1
                ),
            ),
            main=True,
            paper="O((HW)^(4/3)), section 3.3",
        ),
        Claim(
            name="images, choice",
            text="Image models with routed regions are better than with random and with nearest ones.",
            rules=tuple(
                above(f"{name}_routed", f"{name}_{arm}") for name in SETS for arm in ("random", "nearest")
            ),
        ),
        Claim(
            name="images, full",
            text="They are less than 2 % behind those that attend to all regions.",
            rules=tuple(below(f"{name}_full", 0.02, control=f"{name}_routed", paired=True) for name in SETS),
        ),
        Claim(
            name="images, attention",
            text="They are better than without attention, and than convolutions of as many parameters.",
            rules=tuple(
                above(f"{name}_routed", f"{name}_{arm}") for name in SETS for arm in ("none", "convolved")
            ),
            paper="ImageNet-1K: BiFormer-S 83.8 % at 4.5 GFLOPs",
        ),
    )  # fmt: skip
    full = Size()
    quick = Size(draws=3, seeds=1, steps=3, fewer=2, asked=2, sides=(12, 24), epochs=(1, 1), images=5)

    def steps(self) -> Iterable[Step]:
        for draw in range(self.size.draws):
            yield Step(f"planted, draw {draw}", self.planted, cost=0.05)
        yield Step("scores", self.scores, cost=0.05)
        for seed in range(self.size.seeds):
            for arm in ARMS | SHARED:
                cost = 5.0 if "full" in arm else 1.0
                yield Step(f"recall, {arm}, seed {seed}", partial(self.recall, arm, seed), cost=cost)
            for name in SETS:
                for arm in MODELS:
                    yield Step(
                        f"{name}, {arm}, seed {seed}", partial(self.classify, name, arm, seed), cost=2.0
                    )

    def planted(self) -> dict[str, dict[str, float]]:
        """Measure what four regions keep, at each share of tokens on theme."""
        from regard.studies.biformer_parts import planted

        return {name: planted(told) for name, told in SHARES.items()}

    def scores(self) -> dict[str, list[int]]:
        """Count the scores of both levels at each side, with as many regions as make them fewest."""
        from regard.studies.biformer_parts import fewest_scores

        found = [fewest_scores(side) for side in self.size.sides]
        return {"regions": [n for n, _ in found], "scores": [n for _, n in found]}

    def recall(self, arm: str, seed: int) -> dict[str, float]:
        """Train one layer to recall; return how well it does on new maps, and whom its queries look at."""
        import torch
        from torch.nn.functional import cross_entropy

        from regard.studies.biformer_parts import RecallModel, recall_batch, recalled

        steps = self.size.fewer if "full" in arm or "shared" in arm else self.size.steps
        torch.manual_seed(1000 * self.seed + seed)
        generator = torch.Generator().manual_seed(1000 * self.seed + seed + 7)
        model = RecallModel(arm.removeprefix("shared_"), shared=arm in SHARED)
        optimizer = torch.optim.AdamW(model.parameters(), RATE)
        with one_thread():
            for step in range(steps):
                batch = recall_batch(4, generator)
                asked = batch["target"] >= 0
                loss = cross_entropy(model(batch)[asked].flatten(0, 1), batch["answers"][asked].flatten())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                self.tick((step + 1) / steps)
            return recalled(model, recall_batch(self.size.asked, generator))

    def classify(self, name: str, arm: str, seed: int) -> dict[str, float]:
        """Train a classifier of images; return its accuracy on those held out, and its parameters."""
        import torch

        from regard.studies.biformer_parts import accuracy, classifier
        from regard.tasks.images import digits
        from regard.tasks.textures import textures

        images = digits() if name == "digits" else textures(32, train=160, held_out=60)
        stride = 1 if name == "digits" else 2
        torch.manual_seed(1000 * self.seed + seed)
        model = classifier(
            arm, len(images.classes), images.channels, embed_dims=[16, 32], head_dim=8, stem_stride=stride
        )
        with one_thread():
            found = accuracy(
                model, images, self.size.epochs[SETS.index(name)], self.size.images * len(images.classes),
                RATE, 1000 * self.seed + seed, self.tick,
            )  # fmt: skip
        return {"accuracy": found, "parameters": sum(p.numel() for p in model.parameters())}

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        draws = [results[f"planted, draw {n}"] for n in range(self.size.draws)]
        seeds = range(self.size.seeds)
        recalls = {arm: [results[f"recall, {arm}, seed {s}"] for s in seeds] for arm in ARMS | SHARED}
        tokens = [side**2 for side in self.size.sides]
        exponent = slope(tokens, results["scores"]["scores"])
        return {
            **{f"{name}_{way}": [draw[name][way] for draw in draws] for name in SHARES for way in WAYS},
            **{f"recall_{arm}": [run["accuracy"] for run in runs] for arm, runs in recalls.items()},
            **{f"found_{arm}": [run["recall"] for run in runs]
               for arm, runs in recalls.items() if "full" not in arm},
            "exponent": [exponent],
            "exponent_off": [abs(exponent - 4 / 3)],
            "exponent_dense": [slope(tokens, [n**2 for n in tokens])],
            **{f"{name}_{arm}": [results[f"{name}, {arm}, seed {s}"]["accuracy"] for s in seeds]
               for name in SETS for arm in MODELS},
        }  # fmt: skip

    def details(self, results: Results) -> dict[str, Any]:
        sizes = {arm: results[f"textures, {arm}, seed 0"]["parameters"] for arm in MODELS}
        return {
            **results["scores"], "sides": list(self.size.sides), "parameters": sizes, "guess": CHANCE,
            "remarks": [f"A guess recalls {CHANCE:.1%}. Parameters of image models: {sizes['routed']:,}; "
                        f"of convolutions {sizes['convolved']:,}."],
        }  # fmt: skip

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.biformer_picture import draw

        draw(outcome, figure)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the exponent of y in x, by least squares of logarithms.

    Example:
        >>> round(slope([1, 2, 4], [3, 12, 48]), 9)
        2.0
    """
    log_x, log_y = ([math.log(n) for n in values] for values in (x, y))
    mean = sum(log_x) / len(log_x)
    spread = sum((a - mean) ** 2 for a in log_x)
    return sum((a - mean) * b for a, b in zip(log_x, log_y, strict=True)) / spread
