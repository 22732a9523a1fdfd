"""Analyzing Fine-tuning Representation Shift for Multimodal LLMs (Khayatan et al., 2025, arXiv 2501.03012).

    Delta_k = mean of b_m - a_m over the samples of concept k    u_k + Delta_k against the fine-tuned concepts

Three parts. Planted: states of five clusters, each moved its own way, all alike, or not at all. Sentiment: on
SmolLM2-135M-Instruct the difference of mean states of positive and negative reviews is added to negative ones
of other adjectives; beside it random vectors of its norm, and the difference of shuffled labels. Fine-tuning:
SmolLM2 with LoRA on captions whose colours go by the scene; beside it colours drawn whatever the scene, and
captions without any, which is the placebo. Shifts come of one half of captions that no training has (other
places, sentences and things), and are held against the other half and against one shift for all, another
concept's, a random vector and the placebo's. The paper takes vision-language models of 7B and Visual Genome.
Status: paper only (the rules are ours, set before the run); text in place of images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from regard.studies.base import Results, Step, Study
from regard.studies.claims import Claim, Quantity, Rule
from regard.studies.registry import study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

HOW = {
    "shifted": "with its own shift", "common": "with one shift for all", "other": "with another concept's",
    "unshifted": "as it was",
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Seeds of each part; reviews of each sentiment, layers, alphas, random vectors; sentences and places of
    captions, those trained on, steps, batch, rate, the first block adapted, the layers read, fine-tunes;
    whether a random model.
    """

    planted: int = 5
    seeds: int = 3
    reviews: int = 20
    layers: tuple[int, ...] = (8, 14, 18, 22, 26)
    alphas: tuple[float, ...] = (0.25, 0.5, 0.75, 1.5, 2.0, 3.0)
    draws: int = 10
    frames: int = 4
    places: int = 3
    captions: int = 48
    steps: int = 16
    batch: int = 8
    rate: float = 2e-3
    tuned: int = 22
    read: tuple[int, ...] = (24, 27, 29)
    kinds: tuple[str, ...] = ("scene", "drawn", "none")
    tiny: bool = False


def rule(comparison: str, measure: str, control: str | None, threshold: float = 0.0, **options: Any) -> Rule:
    return Rule(
        comparison=comparison, measure=measure, control=control, threshold=threshold,
        paired=control is not None, **options,
    )  # fmt: skip


above, below, within = (partial(rule, comparison) for comparison in ("above", "below", "within"))


def share(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=about, unit="%")


def cosine(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=about, low=-1, high=1)


@study("representation-shift")
class RepresentationShift(Study):
    """Concepts before and after fine-tuning, what moves them, and steering by it."""

    title = "Analyzing Fine-tuning Representation Shift for Multimodal LLMs Steering alignment"
    paper = "Khayatan et al. 2025, arXiv 2501.03012"
    quantities = (
        *(
            cosine(f"{kind}_{how}", f"planted, {what}: cosine of a concept {words} with its partner")
            for kind, what in (("own", "each cluster moved its way"), ("alike", "all moved alike"),
                               ("still", "none moved"))
            for how, words in HOW.items()
        ),
        cosine("still_consistency", "planted, none moved: mean cosine of a sample's shift and its concept's"),
        cosine("still_chance", "what it is by chance, 1 / sqrt(samples)"),
        Quantity(name="still_distance", about="planted, none moved: distance to partner, other half", low=0),
        Quantity(name="still_distance_same", about="the same, on the samples that the shift comes of", low=0),
        *(
            share(f"closed_{layer}", f"share of the gap of sentiment closed, last position, layer {layer}")
            for layer in Size().layers
        ),
        *(
            share(f"{name}_{layer}", f"the same of {words}, layer {layer}")
            for layer in (22, 26)
            for name, words in (
                ("random", "the random vector that does most, either way"),
                ("shuffled", "shuffled labels, mean size of five"),
                ("negated", "the vector negated"), ("whole", "the vector at all positions"),
                ("half", "the vector times 0.5"),
            )
        ),
        *(
            share(f"{kind}_explained_{how}", f"{words}: held-out shift explained {HOW[how]}, layer 27")
            for kind, words in (("scene", "by scene"), ("drawn", "colours drawn"), ("none", "no colours"))
            for how in ("shifted", "common", "other")
        ),
        share("scene_gain", "colours by scene: explained by own shifts less by one for all, layer 27"),
        share("drawn_gain", "colours drawn: the same"),
        *(
            cosine(f"scene_cosine_{how}", f"by scene: cosine of a concept {words} with its partner, layer 27")
            for how, words in HOW.items()
        ),
        cosine("scene_cosine_24", "the same, with its own shift, layer 24"),
        cosine("scene_cosine_29", "the same, with its own shift, layer 29"),
        Quantity(name="scene_norm", about="norm of a shift over that of states, colours by scene", low=0),
        Quantity(name="none_norm", about="the same, no colours", low=0),
        Quantity(name="scene_accuracy", about="captions whose likeliest colour is the scene's, by scene",
                 low=0, high=1, unit="%"),
        *(
            Quantity(name=f"right_{name}", about=f"logit of the scene's colour over the others', {words}")
            for name, words in (
                ("plain", "as it was"), ("tuned", "fine-tuned"), ("concept", "each concept's shift added"),
                ("common", "one for all added"), ("other", "another concept's added"),
            )
        ),
        *(
            Quantity(name=f"colour_{name}", about=f"probability of a colour, {words}", low=0, high=1,
                     unit="%")
            for name, words in (
                ("plain", "as it was"), ("tuned", "fine-tuned"), ("common", "one shift for all added"),
                ("random", "a random vector of its norm added"),
                ("placebo", "the placebo's shift at its norm added"),
            )
        ),
    )  # fmt: skip
    claims = (
        Claim(
            name="planted",
            text="Where each cluster moves its own way, its own shift finds it again, one shift "
            "for all does not.",
            rules=(above("own_shifted", None, 0.95), above("own_shifted", "own_common", 0.2)),
        ),
        Claim(
            name="alike",
            text="Where all move alike, shifts of concepts bring nothing over one for all.",
            rules=(within("alike_shifted", "alike_common", 0.02), above("alike_shifted", "alike_unshifted")),
        ),
        Claim(
            name="still",
            text="Where nothing moves, nothing is gained, and consistency is at chance.",
            rules=(
                within("still_shifted", "still_unshifted", 0.02),
                within("still_consistency", "still_chance", 0.05),
            ),
        ),
        Claim(
            name="circular",
            text="On the samples that the shift comes of, recovery looks perfect even where nothing moves.",
            rules=(below("still_distance_same", "still_distance", factor=0.1),),
        ),
        Claim(
            name="sentiment",
            text="The difference of means at layers 22 and 26 closes 80 to 120 % of the gap; none "
            "of ten random "
            "vectors of its norm moves more than 20 %.",
            rules=(
                *(above(f"closed_{layer}", None, 0.8) for layer in (22, 26)),
                *(below(f"closed_{layer}", None, 1.2) for layer in (22, 26)),
                *(within(f"random_{layer}", None, 0.2) for layer in (22, 26)),
                *(above(f"closed_{layer}", f"random_{layer}", 0.5) for layer in (22, 26)),
            ),
            main=True,
            paper="answers of VQAv2 steered in LLaVA-1.5, by count",
        ),
        Claim(
            name="labels",
            text="A difference of shuffled labels, at the same norm, closes less than half of "
            "what the labels do.",
            rules=tuple(below(f"shuffled_{layer}", f"closed_{layer}", factor=0.5) for layer in (22, 26)),
        ),
        Claim(
            name="depth",
            text="The effect grows with depth.",
            rules=(above("closed_26", "closed_18"), above("closed_18", "closed_8")),
            paper="the last layer is best for answers",
        ),
        Claim(
            name="positions",
            text="Steering all positions does more than the last alone; half the vector does "
            "less; negated it "
            "does the opposite.",
            rules=(
                *(above(f"whole_{layer}", f"closed_{layer}") for layer in (22, 26)),
                *(below(f"half_{layer}", f"closed_{layer}") for layer in (22, 26)),
                *(below(f"negated_{layer}", None) for layer in (22, 26)),
            ),
        ),
        Claim(
            name="concepts",
            text="Where fine-tuning moves scenes to colours of their own, a shift for each "
            "concept explains more of "
            "held-out shifts than one for all, by 5 points or more, and than another concept's.",
            rules=(
                above("scene_explained_shifted", "scene_explained_common", 0.05),
                above("scene_explained_shifted", "scene_explained_other"),
            ),
            needs=(above("scene_accuracy", None, 0.5),),
            main=True,
            paper="shifted concepts approach the fine-tuned ones; one shift for all is not tried",
        ),
        Claim(
            name="recovery",
            text="Shifted concepts are nearer to the fine-tuned ones than unshifted, and than "
            "with one shift for all.",
            rules=(
                above("scene_cosine_shifted", "scene_cosine_unshifted"),
                above("scene_cosine_shifted", "scene_cosine_common"),
            ),
            needs=(above("scene_accuracy", None, 0.5),),
            main=True,
            paper="nearer than unshifted, for most concepts",
        ),
        Claim(
            name="drawn",
            text="Where colours do not go by the scene, a shift for each concept brings less than "
            "half as much.",
            rules=(below("drawn_gain", "scene_gain", factor=0.5),),
        ),
        Claim(
            name="placebo",
            text="A fine-tune on captions without colours moves concepts less than half as far.",
            rules=(below("none_norm", "scene_norm", factor=0.5),),
        ),
        Claim(
            name="causal",
            text="Added to the model as it was, a shift for each concept brings the scene's own "
            "colour forward more "
            "than one for all, and than another concept's.",
            rules=(above("right_concept", "right_common"), above("right_concept", "right_other")),
            needs=(above("scene_accuracy", None, 0.5),),
        ),
        Claim(
            name="colours",
            text="One shift for all makes colours likelier than a random vector of its norm does, "
            "and than the "
            "placebo's shift at its norm.",
            rules=(above("colour_common", "colour_random"), above("colour_common", "colour_placebo")),
            needs=(above("colour_tuned", "colour_plain"),),
        ),
        Claim(
            name="deeper",
            text="Deeper layers recover better.",
            rules=(above("scene_cosine_29", "scene_cosine_24"),),
            paper="as in the paper's figure over layers",
        ),
    )
    full = Size()
    quick = replace(
        full, planted=1, seeds=1, reviews=2, alphas=(0.5,), draws=1, frames=2, places=1, captions=8, steps=1,
        batch=4, tiny=True,
    )  # fmt: skip

    def prepare(self) -> None:
        from regard.studies.representation_shift_parts import loaded

        self.model, self.tokenizer = loaded(self.size.tiny)
        self.scenes: Any = None

    def steps(self) -> Iterable[Step]:
        for seed in range(self.size.planted):
            yield Step(f"planted, seed {seed}", partial(self.planted, seed), cost=1)
        for seed in range(self.size.seeds):
            yield Step(f"sentiment, seed {seed}", partial(self.sentiment, seed), cost=60)
        for seed in range(self.size.seeds):
            yield Step(f"fine-tunes, seed {seed}", partial(self.tuned, seed), cost=300)

    def planted(self, seed: int) -> dict[str, Any]:
        """Recover planted shifts."""
        from regard.studies.representation_shift_parts import planted

        return planted(1000 * self.seed + seed)

    def sentiment(self, seed: int) -> dict[str, Any]:
        """Steer by the difference of means."""
        from regard.studies.representation_shift_parts import sentiment

        return sentiment(self.model, self.tokenizer, self.size, 1000 * self.seed + seed, self.tick)

    def tuned(self, seed: int) -> dict[str, Any]:
        """Fine-tune three times, analyse the shifts, and add them."""
        from regard.studies.representation_shift_parts import Scenes, tuned

        if self.scenes is None:
            self.scenes = Scenes(self.model, self.tokenizer, self.size)
        return tuned(self.scenes, self.size, 1000 * self.seed + seed, self.tick)

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        from regard.studies.representation_shift_picture import measured

        return measured(results, self.size)

    def details(self, results: Results) -> dict[str, Any]:
        from regard.studies.representation_shift_picture import collect

        return collect(results, self.size)

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.representation_shift_picture import draw

        draw(outcome, figure)
