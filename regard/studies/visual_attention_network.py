"""Visual Attention Network (arXiv 2202.09741): its reach, its cost, what the product adds, what it learns.

Five parts. The decomposition is held to the one 23 x 23 convolution that it composes. Gradients tell how far
the gate reaches. Time of large-kernel attention and of softmax attention over all positions, by pixels. The
Jacobian at two inputs tells whether the operator follows the input, with the product and with a sum in its
place. And training, arms that differ in the gate alone (`visual_attention_network_parts.py`): pairs of pixels
4 or 14 apart, beside a gate of 5 x 5, which over two blocks reaches 13, and none; and textures of 32 x 32 by
small VANs of equal parameters, beside a gate by a dense 9 x 9 convolution and one that sees no neighbours.
Status: the rules and sizes are our choice; the paper's own figures are of ImageNet, COCO and ADE20K.
"""

from __future__ import annotations

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

NEAR, FAR = 4, 14
PAIRS = (("product", FAR), ("near", FAR), ("sum", FAR), ("product", NEAR), ("near", NEAR), ("none", NEAR))
TEXTURES = ("product", "sum", "plain", "blind")
SEED = 1000


@dataclass(frozen=True)
class Size:
    """Draws, rounds and sides of the times, seeds and steps of pairs, of textures and images a class."""

    draws: int = 8
    rounds: int = 5
    sides: tuple[int, ...] = (32, 64, 128)
    seeds: int = 3
    steps: int = 200
    texture_seeds: int = 5
    texture_steps: int = 250
    images: int = 160


def drawn(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=about, over="draws", low=0)


def share(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=about, low=0, high=1, unit="%")


def above(measure: str, control: str, threshold: float = 0.0, **options: Any) -> Rule:
    options = {"paired": True, **options}
    return Rule(measure=measure, comparison="above", threshold=threshold, control=control, **options)


@study("visual-attention-network")
class VisualAttentionNetworkStudy(Study):
    """How far does large-kernel attention see, at what cost, and does that help it to learn?"""

    title = "Visual Attention Network"
    paper = "Guo et al. 2022, arXiv 2202.09741"
    quantities = (
        drawn("inside", "decomposed against dense 23 x 23, interior, float64"),
        drawn("border", "the same, the border too"),
        drawn("reach", "positions along a row that move one number of the gate"),
        drawn("reach_near", "the same, 5 x 5 alone"),
        Quantity(name="growth", about="exponent of time in pixels", over="rounds"),
        Quantity(name="growth_dense", about="the same, softmax attention of all positions", over="rounds"),
        drawn("moved", "Jacobian at one input less that at another, product"),
        drawn("moved_sum", "the same, sum in place of the product"),
        *(share(f"{kind}_{distance}", f"pairs {distance} apart, {kind}") for kind, distance in PAIRS),
        *(share(f"textures_{kind}", f"textures, {kind}") for kind in TEXTURES),
        Quantity(name="spread", about="most over fewest parameters of the arms on textures, less 1", low=0),
    )  # fmt: skip
    claims = (
        Claim(
            name="decomposition",
            text="Two convolutions are one of 23 x 23 inside, and not at the border, where each pads.",
            rules=(
                Rule(measure="inside", comparison="below", threshold=1e-12),
                above("border", "inside", 1e-3),
            ),
            main=True,
            paper="section 3.1, where the kernel is called 21 x 21",
        ),
        Claim(
            name="reach",
            text="The gate sees 23 positions along an axis, 18 more than with its first convolution alone.",
            rules=(
                Rule(measure="reach", comparison="above", threshold=22.5),
                Rule(measure="reach", comparison="below", threshold=23.5),
                above("reach", "reach_near", 17.5),
            ),
            main=True,
        ),
        Claim(
            name="linear cost",
            text="Time grows with the pixels to a power below 1.2, that of softmax attention by 0.5 more.",
            rules=(
                Rule(measure="growth", comparison="below", threshold=1.2),
                above("growth_dense", "growth", 0.5),
            ),
            main=True,
            paper="linear in pixels, table 1",
        ),
        Claim(
            name="adaptive",
            text="The operator follows the input, and with a sum in place of the product it does not.",
            rules=(
                Rule(measure="moved_sum", comparison="below", threshold=1e-12),
                above("moved", "moved_sum", 1e-3),
            ),
            main=True,
            paper="adaptability, table 1",
        ),
        Claim(
            name="distance",
            text="It tells how pixels 14 apart lie, 30 points better than a gate of 5 x 5.",
            rules=(
                Rule(measure=f"product_{FAR}", comparison="above", threshold=0.9),
                above(f"product_{FAR}", f"near_{FAR}", 0.3),
            ),
            needs=(above(f"product_{NEAR}", f"none_{NEAR}", 0.2),),
            main=True,
            paper="long-range dependence, table 1",
        ),
        Claim(
            name="textures, by reach",
            text="With equal parameters it labels textures better than a gate by a dense 9 x 9 convolution.",
            rules=(above("textures_product", "textures_plain"),),
            needs=(Rule(measure="spread", comparison="below", threshold=0.02),),
            main=True,
            paper="not the paper's; it compares backbones on ImageNet",
        ),
        Claim(
            name="textures, by space",
            text="With equal parameters it labels textures better than a gate that sees no neighbours.",
            rules=(above("textures_product", "textures_blind"),),
            needs=(Rule(measure="spread", comparison="below", threshold=0.02),),
            main=True,
            paper="without the gate's convolutions ImageNet accuracy falls",
        ),
        Claim(
            name="product",
            text="The product labels textures better than a sum.",
            rules=(above("textures_product", "textures_sum"),),
            paper="a sum takes B0 on ImageNet from 75.4 to 74.6 (the repository's issue 32)",
        ),
    )
    full = Size()
    quick = Size(
        draws=3, rounds=1, sides=(16, 32), seeds=1, steps=2, texture_seeds=1, texture_steps=2, images=8
    )

    def steps(self) -> Iterable[Step]:
        for draw in range(self.size.draws):
            yield Step(f"rules, draw {draw}", self.rules, cost=0.05)
        yield Step("times", self.times, cost=0.2)
        for seed in range(self.size.seeds):
            for kind, distance in PAIRS:
                cost = 0.4 if kind in ("near", "none") else 1.0
                work = partial(self.pairs, kind, distance, seed)
                yield Step(f"pairs, {kind} at {distance}, seed {seed}", work, cost=cost)
        for seed in range(self.size.texture_seeds):
            for kind in TEXTURES:
                yield Step(f"textures, {kind}, seed {seed}", partial(self.textures, kind, seed), cost=0.5)

    def rules(self) -> dict[str, float]:
        """Measure the decomposition, the reach and the Jacobians."""
        from regard.studies import visual_attention_network_parts as parts

        with one_thread():
            return {
                **parts.decomposed(),
                "reach": parts.reached("product"), "reach_near": parts.reached("near"),
                "moved": parts.operator_moved("product"), "moved_sum": parts.operator_moved("sum"),
            }  # fmt: skip

    def times(self) -> dict[str, list[float]]:
        """Time both kinds of attention at every side."""
        from regard.studies.rounds import in_rounds
        from regard.studies.visual_attention_network_parts import ways

        cases = {f"{way} {side}": work for side in self.size.sides for way, work in ways(side).items()}
        with one_thread():
            return in_rounds(cases, self.size.rounds)

    def pairs(self, kind: str, distance: int, seed: int) -> float:
        """Train an arm on pairs; return its accuracy."""
        from regard.studies.visual_attention_network_parts import apart

        with one_thread():
            return apart(kind, distance, SEED * self.seed + seed, self.size.steps, self.tick)

    def textures(self, kind: str, seed: int) -> list[float]:
        """Train an arm on textures; return its accuracy and its parameters."""
        from regard.studies.visual_attention_network_parts import of_textures
        from regard.tasks.textures import textures

        number = SEED * self.seed + seed
        given = textures(32, train=self.size.images, held_out=50, seed=number)
        with one_thread():
            return list(of_textures(kind, given, number, self.size.texture_steps, self.tick))

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        from regard.studies.visual_attention_network_parts import exponents

        rules = named(results, "rules, ")
        textures = {kind: named(results, f"textures, {kind}, ") for kind in TEXTURES}
        counts = [[found[1] for found in arm] for arm in textures.values()]
        return {
            **{name: [told[name] for told in rules] for name in rules[0]},
            "growth": exponents(results["times"], "gated"),
            "growth_dense": exponents(results["times"], "dense"),
            **{f"{kind}_{at}": named(results, f"pairs, {kind} at {at}, ") for kind, at in PAIRS},
            **{f"textures_{kind}": [found[0] for found in arm] for kind, arm in textures.items()},
            "spread": [max(arms) / min(arms) - 1 for arms in zip(*counts, strict=True)],
        }

    def details(self, results: Results) -> dict[str, Any]:
        times = {name: 1e3 * sorted(took)[len(took) // 2] for name, took in results["times"].items()}
        counts = {kind: results[f"textures, {kind}, seed 0"][1] for kind in TEXTURES}
        return {
            "milliseconds": times, "parameters": counts,
            "remarks": ["A guess is right in 50 % of the pairs and 12.5 % of the textures."],
        }  # fmt: skip

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.visual_attention_network_picture import draw

        draw(outcome, figure)


def named(results: Results, start: str) -> list[Any]:
    """Return the results of the steps whose name begins so."""
    return [told for name, told in results.items() if name.startswith(start)]
