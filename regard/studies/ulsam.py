"""ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks (2006.15102).

Four parts. The groups at once are held to the loop over them, beside one whose groups are off by a channel.
MobileNet-V2 at 224 x 224 is counted plain, with two and with four layers replaced, and with attention added
to two. And small MobileNet-V2s learn which of ten marks stands on a disc, everything else being the same
(`ulsam_parts.py`): as they are, and with two layers that keep their shape replaced by subspace attention in
four groups or one, by nothing, which is the control that tells whether attention does anything, or by
squeezed channel weights. Of the trained maps it is asked how far they are from even.
Status: the rules and sizes are our choice; the paper's figures are of ImageNet and three sets of photographs.
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

ARMS = {
    "full": "no layer replaced", "ulsam": "subspace attention, four groups",
    "one_map": "subspace attention, one group", "identity": "nothing in their place",
    "squeeze": "squeezed channel weights",
}  # fmt: skip
COUNTS = {"two": "two replaced", "four": "four replaced", "added": "attention added to two"}
SEED = 1000


@dataclass(frozen=True)
class Size:
    """Draws, seeds, steps of training, and images to train on."""

    draws: int = 5
    seeds: int = 3
    steps: int = 200
    images: int = 8000


def above(measure: str, control: str, threshold: float = 0.0, **options: Any) -> Rule:
    options = {"paired": True, **options}
    return Rule(measure=measure, comparison="above", threshold=threshold, control=control, **options)


def share(name: str, about: str, over: str = "seeds", low: float = 0.0) -> Quantity:
    return Quantity(name=name, about=about, over=over, low=low, high=1, unit="%")


@study("ulsam")
class ULSAMStudy(Study):
    """Does subspace attention in the place of layers do more than leaving the layers out?"""

    title = "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks"
    paper = "Saini et al. 2020, arXiv 2006.15102"
    quantities = (
        Quantity(name="error", about="groups at once against the loop, float64", over="draws", low=0),
        Quantity(name="fault", about="the same, groups off by a channel", over="draws", low=0),
        *(share(f"operations_{n}", f"fewer operations of V2, {t}", "counts", -1) for n, t in COUNTS.items()),
        *(share(f"parameters_{n}", f"fewer parameters of V2, {t}", "counts", -1) for n, t in COUNTS.items()),
        *(share(f"right_{arm}", f"marks named rightly, {told}") for arm, told in ARMS.items()),
        share("kept", "parameters with subspace attention over those of all layers"),
        Quantity(name="spare", about="parameters with attention over those with nothing, less 1", low=0),
        share("most", "largest weight of a trained map, both places"),
        share("even", "what it would be in an even map"),
        share("flat", "trained maps that are even"),
    )  # fmt: skip
    claims = (
        Claim(
            name="fused",
            text="All groups at once are the loop over the groups, and a shift by a channel is seen.",
            rules=(
                Rule(measure="error", comparison="below", threshold=1e-11),
                above("fault", "error", 1e-3),
            ),
            main=True,
        ),
        Claim(
            name="counts",
            text="Two layers of MobileNet-V2 replaced save 13 % of operations and parameters, four 25 %.",
            rules=(
                above("operations_two", "operations_added", 0.12, least=1),
                above("parameters_two", "parameters_added", 0.12, least=1),
                above("operations_four", "operations_added", 0.24, least=1),
                above("parameters_four", "parameters_added", 0.24, least=1),
            ),
            main=True,
            paper="13 % of both with 0.27 points more on ImageNet, 25 % of both with 1 more on photographs",
        ),
        Claim(
            name="better than nothing",
            text="Marks are named better with subspace attention in place of two layers than with nothing.",
            rules=(above("right_ulsam", "right_identity"),),
            needs=(
                Rule(measure="right_full", comparison="above", threshold=0.5),
                Rule(measure="spare", comparison="below", threshold=0.02),
            ),
            main=True,
            paper="not in the paper, which has no such control",
        ),
        Claim(
            name="as good as the layers",
            text="It costs less than 2 points against all layers, at four fifths of the parameters or fewer.",
            rules=(
                above("right_ulsam", "right_full", -0.02),
                Rule(measure="kept", comparison="below", threshold=0.8),
            ),
            needs=(Rule(measure="right_full", comparison="above", threshold=0.5),),
            main=True,
            paper="0.27 points more on ImageNet with 13 % fewer parameters (four groups)",
        ),
        Claim(
            name="subspaces",
            text="Four maps name marks better than one.",
            rules=(above("right_ulsam", "right_one_map"),),
            needs=(Rule(measure="right_full", comparison="above", threshold=0.5),),
            main=True,
            paper="MobileNet-V2 on ImageNet, added: 71.64 with four groups, 71.31 with one, 71.25 without",
        ),
        Claim(
            name="channel weights",
            text="It names marks better than squeezed channel weights in the same places.",
            rules=(above("right_ulsam", "right_squeeze"),),
            needs=(Rule(measure="right_full", comparison="above", threshold=0.5),),
        ),
        Claim(
            name="uneven maps",
            text="The largest weight of a trained map is over three times that of an even one.",
            rules=(above("most", "even", factor=3.0),),
            paper="not the paper's",
        ),
    )  # fmt: skip
    full, quick = Size(), Size(draws=3, seeds=1, steps=2, images=64)

    def steps(self) -> Iterable[Step]:
        for draw in range(self.size.draws):
            yield Step(f"fused, draw {draw}", self.fused, cost=0.02)
        yield Step("counts", self.counts, cost=0.05)
        for seed in range(self.size.seeds):
            for arm in ARMS:
                yield Step(f"{arm}, seed {seed}", partial(self.learned, arm, seed))

    def fused(self) -> dict[str, float]:
        """Hold the groups at once to the loop."""
        from regard.studies.ulsam_parts import fused

        return fused()

    def counts(self) -> dict[str, float]:
        """Count MobileNet-V2."""
        from regard.studies.ulsam_parts import counted

        return counted()

    def learned(self, arm: str, seed: int) -> dict[str, Any]:
        """Train an arm; return its accuracy, parameters and maps."""
        from regard.studies.ulsam_parts import learned

        with one_thread():
            return learned(arm, SEED * self.seed + seed, self.size.steps, self.size.images, self.tick)

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        arms = {arm: named(results, f"{arm}, seed ") for arm in ARMS}
        sizes = {arm: [told["parameters"] for told in found] for arm, found in arms.items()}
        fused = named(results, "fused, ")
        maps = [told["maps"] for told in arms["ulsam"]]
        return {
            **{name: [told[name] for told in fused] for name in ("error", "fault")},
            **{name: [value] for name, value in results["counts"].items()},
            **{f"right_{arm}": [told["right"] for told in found] for arm, found in arms.items()},
            "kept": [a / b for a, b in zip(sizes["ulsam"], sizes["full"], strict=True)],
            "spare": [a / b - 1 for a, b in zip(sizes["ulsam"], sizes["identity"], strict=True)],
            **{name: [sum(m[name] for m in one) / len(one) for one in maps] for name in maps[0][0]},
        }

    def details(self, results: Results) -> dict[str, Any]:
        sizes = {arm: results[f"{arm}, seed 0"]["parameters"] for arm in ARMS}
        places = [told["maps"] for told in named(results, "ulsam, seed ")]
        return {"parameters": sizes, "maps": places, "remarks": ["A guess is right in 10 %."]}

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.ulsam_picture import draw

        draw(outcome, figure)


def named(results: Results, start: str) -> list[Any]:
    """Return the results of the steps whose name begins so."""
    return [told for name, told in results.items() if name.startswith(start)]
