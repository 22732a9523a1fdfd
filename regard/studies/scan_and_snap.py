"""Scan and Snap: Understanding Training Dynamics and Token Composition in 1-layer Transformer (Tian et al.,
2023, arXiv 2305.16380).

Syn-Small: two next tokens, ten context tokens that both have and ten of each alone; SGD with momentum 0.9,
tables that begin at zero, 100 steps of 128 sequences of 128 tokens. Beside it the same with attention
frozen, with contexts that tell nothing, and by Adam. Syn-Medium: three last tokens of two next tokens each,
60 steps, at several rates. The identity of Theorem 3 is followed along the exact flow, where its assumption
is nearly true (a decoder 300 times as fast as attention) and where it is not. What is measured is the exact
attention, in nats and shares. Status: agrees with the paper (data, model, settings); the rules are our
choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from regard.studies.base import Results, Step, Study
from regard.studies.claims import Claim, Quantity, Rule
from regard.studies.registry import study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

RATIOS = (1, 2, 5, 10)
RATES_Z = (0.5, 3)
SMALL: dict[str, dict[str, Any]] = {
    "plain": {},
    "frozen": {"rate_z": 0.0},
    "telling nothing": {"shared": True},
    "adam": {"optimiser": "adam", "rate_z": 0.05, "rate_y": 0.05},
}


@dataclass(frozen=True)
class Size:
    """How many seeds; steps of the two settings and of the flow."""

    seeds: int = 5
    small: int = 100
    medium: int = 60
    flow: int = 1000


def number(name: str, about: str, unit: str = "", **more: Any) -> Quantity:
    return Quantity(name=name, about=about, unit=unit, low=0, **more)


def rule(comparison: str, measure: str, threshold: float, control: str | None = None, **more: Any) -> Rule:
    return Rule(measure=measure, comparison=comparison, threshold=threshold, control=control, **more)


above, below = partial(rule, "above"), partial(rule, "below")


@study("scan-and-snap")
class ScanAndSnap(Study):
    """How attention learns in one layer: which tokens it leaves, whose order it keeps, when it stops."""

    title = "Scan and Snap: Understanding Training Dynamics and Token Composition in 1-layer Transformer"
    paper = "Tian et al. 2023, arXiv 2305.16380"
    quantities = (
        number("common", "attention on common tokens at the end", "%", high=1),
        number("common_frozen", "the same with attention frozen", "%", high=1),
        number("common_nothing", "the same where contexts tell nothing", "%", high=1),
        Quantity(name="tau", about="order of the distinct tokens kept, the least over steps", low=-1, high=1),
        Quantity(name="tau_adam", about="the same by Adam", low=-1, high=1),
        number("early", "fall of that attention in the first 20 % of the steps", high=1),
        number("late", "change of it in the last 50 %", high=1),
        number("moved", "largest entry of Z"),
        number("moved_nothing", "the same where contexts tell nothing"),
        number("winner", "share of the heaviest among the distinct tokens at the end", "%", high=1),
        number("winner_start", "the same before the first step", "%", high=1),
        *(number(f"entropy_{r}", f"entropy at the end, decoder {r} times as fast", "nats") for r in RATIOS),
        *(number(f"entropy_z{z:g}", f"entropy at the end, attention at rate {z:g}", "nats") for z in RATES_Z),
        number("identity", "error of Theorem 3, decoder 300 times as fast", over="pairs of tokens"),
        number("identity_equal", "the same at equal rates", over="pairs of tokens"),
    )
    claims = (
        Claim(
            name="scan",
            text="Attention leaves the common tokens, by 30 % at least, and keeps the order of the "
            "distinct ones.",
            rules=(below("common", 0.0, "common_frozen", factor=0.7), above("tau", 0.9)),
            main=True,
            paper="Theorems 2 and 3, Figs. 2 to 4",
        ),
        Claim(
            name="snap",
            text="It moves more in the first fifth of the steps than in the last half.",
            rules=(above("early", 0.0, "late", paired=True),),
            main=True,
            paper="Theorem 4",
        ),
        Claim(
            name="nothing",
            text="Where contexts tell nothing, attention has nothing to learn.",
            rules=(below("moved_nothing", 0.0, "moved", factor=0.1, paired=True),),
        ),
        Claim(
            name="ratio",
            text="The faster the decoder beside attention, the less sparse attention ends.",
            rules=(
                above("entropy_10", 0.08, "entropy_1", paired=True),
                above("entropy_5", 0.0, "entropy_2", paired=True),
                above("entropy_10", 0.0, "entropy_5", paired=True),
            ),
            main=True,
            paper="section 6: beyond a ratio of about 2",
        ),
        Claim(
            name="rate",
            text="The faster attention learns, the sparser it ends.",
            rules=(below("entropy_z3", 0.0, "entropy_z0.5", paired=True),),
            paper="section 6",
        ),
        Claim(
            name="several",
            text="No winner takes all: the heaviest has less than half of what distinct tokens have, though "
            "more "
            "than at first.",
            rules=(below("winner", 0.5), above("winner", 0.0, "winner_start", paired=True)),
        ),
        Claim(
            name="identity",
            text="Theorem 3 holds to a thousandth where the decoder is fast, and not where it is not.",
            rules=(below("identity", 1e-3), above("identity_equal", 0.0, "identity", factor=10, paired=True)),
            paper="r(t) = r(0) exp(2 (z(t) - z(0)))",
        ),
    )  # fmt: skip
    full = Size()
    quick = Size(seeds=1, small=4, medium=2, flow=3)

    def steps(self) -> Iterable[Step]:
        for seed in range(self.size.seeds):
            for name in SMALL:
                yield Step(f"small {name}, seed {seed}", partial(self.small, name, seed), cost=2)
            for ratio in RATIOS:
                yield Step(f"medium ratio {ratio}, seed {seed}", partial(self.medium, 1.0, ratio, seed))
            for rate in RATES_Z:
                yield Step(f"medium rate {rate:g}, seed {seed}", partial(self.medium, rate, 1.0, seed))
        for name, faster in (("fast", 300.0), ("equal", 1.0)):
            yield Step(f"flow {name}", partial(self.flow, faster), cost=8)

    def small(self, name: str, seed: int) -> dict[str, Any]:
        """Train on Syn-Small, and return what was seen."""
        from regard.objectives.scan_snap import train_scan_snap
        from regard.tasks.scan_snap import TokenComposition

        options = dict(SMALL[name])
        data = TokenComposition(shared=options.pop("shared", False))
        seen = train_scan_snap(
            data, steps=self.size.small, seed=1000 * self.seed + seed, tick=self.tick, **options
        )
        assert seen.z is not None
        own = seen.attention[:, 0, data.distinct(0)]
        return {
            **{name: [round(x, 6) for x in values] for name, values in seen.measures.items()},
            "moved": float(seen.z.abs().max()),
            "winner": [float(own[i].max() / own[i].sum()) for i in (0, -1)],
            "distinct": [[round(float(x), 5) for x in row] for row in own[:, ::3].T],
            "snap": seen.snap,
        }  # fmt: skip

    def medium(self, rate: float, ratio: float, seed: int) -> list[float]:
        """Train on Syn-Medium from random tables, and return the entropy at every step."""
        import torch

        from regard.models.scan_snap import ScanSnapModel
        from regard.objectives.scan_snap import train_scan_snap
        from regard.tasks.scan_snap import TokenComposition

        data = TokenComposition(num_last=3, next_per_last=2)
        torch.manual_seed(1000 * self.seed + seed)
        seen = train_scan_snap(
            data, ScanSnapModel(data.vocabulary, start=0.01), steps=self.size.medium, rate_z=rate,
            rate_y=rate * ratio, seed=1000 * self.seed + seed, tick=self.tick,
        )  # fmt: skip
        return [round(x, 5) for x in seen.measures["entropy"]]

    def flow(self, ratio: float) -> list[float]:
        """Follow the exact flow, and return the error of Theorem 3 for pairs of distinct tokens."""
        from regard.objectives.scan_snap import flow
        from regard.studies.scan_and_snap_parts import identity_errors
        from regard.tasks.scan_snap import TokenComposition

        data = TokenComposition()
        seen = flow(data, steps=self.size.flow, size=0.01, rate_y=ratio, tick=self.tick)
        return identity_errors(data, seen)

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        small = {n: [told for s, told in results.items() if s.startswith(f"small {n},")] for n in SMALL}
        plain, nothing = small["plain"], small["telling nothing"]

        def entropies(kind: str) -> list[float]:
            return [told[-1] for step, told in results.items() if step.startswith(f"medium {kind},")]

        return {
            "common": [told["common"][-1] for told in plain],
            "common_frozen": [told["common"][-1] for told in small["frozen"]],
            "common_nothing": [told["common"][-1] for told in nothing],
            "tau": [min(told["tau"]) for told in plain],
            "tau_adam": [min(told["tau"]) for told in small["adam"]],
            "early": [abs(told["common"][0] - told["common"][len(told["common"]) // 5]) for told in plain],
            "late": [abs(told["common"][len(told["common"]) // 2] - told["common"][-1]) for told in plain],
            "moved": [told["moved"] for told in plain],
            "moved_nothing": [told["moved"] for told in nothing],
            "winner": [told["winner"][1] for told in plain],
            "winner_start": [told["winner"][0] for told in plain],
            **{f"entropy_{r}": entropies(f"ratio {r}") for r in RATIOS},
            **{f"entropy_z{z:g}": entropies(f"rate {z:g}") for z in RATES_Z},
            "identity": results["flow fast"],
            "identity_equal": results["flow equal"],
        }

    def details(self, results: Results) -> dict[str, Any]:
        courses = {
            f"ratio {r}": [told for step, told in results.items() if step.startswith(f"medium ratio {r},")]
            for r in RATIOS
        }
        return {"small": {name: results[f"small {name}, seed 0"] for name in SMALL}, "entropy": courses}

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.scan_and_snap_picture import draw

        draw(outcome, figure)
