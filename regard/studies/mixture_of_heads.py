"""MoH: Multi-Head Attention as Mixture-of-Head Attention (Jin et al., 2024, arXiv 2410.11842).

Three parts. The layer must be its definition, and the dense layer where all heads are on. One layer of 8
narrow heads, whose positions are each told how far to look back (`regard.tasks.look_back`), is trained dense,
routed, routed by chance and weighted without being routed, then converted from dense and tuned. And
SmolLM2's heads are routed, 7 of 9 on, as it came and by the paper's recipe: some steps dense, then routed,
beside dense, chance and heads pruned for good, all tuned the same; its attention weights alone are tuned.
Status: tasks, sizes and rules are our choice; the paper tunes on 100B tokens and more.
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

    from regard.studies.mixture_of_heads_language import Language
    from regard.studies.outcome import Outcome

ARMS = {
    "dense8": "8 heads without gates",
    "dense4": "4 heads without gates",
    "moh": "1 shared head and 3 of 7",
    "unbalanced": "the same without a balance",
    "chance": "the same, heads by chance and weights learned",
    "all_on": "1 shared head and 7 of 7",
}
CONVERTED = {
    "query_norm": "converted from dense, 4 shared and 2 of 4 by query norm, tuned",
    "random": "the same, heads by chance",
    "learned": "the same, by a learned router",
    "dense": "dense, tuned the same",
}
UNTUNED = {
    "plain": "as it is",
    "full": "by query norm, all heads on",
    "query_norm": "by query norm, not tuned",
    "output_norm": "by what heads give, not tuned",
    "random": "by chance, not tuned",
    "magnitude": "pruned by weights, not tuned",
}
TUNED = {
    "dense": "dense, tuned",
    "query_norm": "by query norm, tuned",
    "query_norm_loose": "by query norm, tuned without a balance",
    "learned": "by a learned router, tuned",
    "random": "by chance, tuned",
    "magnitude": "pruned by weights, tuned",
}


@dataclass(frozen=True)
class Size:
    """Seeds and steps of the small model, steps and text of SmolLM2, or of a tiny model in its place."""

    seeds: int = 3
    steps: int = 500
    convert_steps: int = 100
    asked: int = 256
    dense_steps: int = 10
    tuning_steps: int = 30
    length: int = 127
    windows: int = 6
    tiny: bool = False


def share(name: str, about: str, unit: str = "%") -> Quantity:
    return Quantity(name=name, about=about, low=0, high=1, unit=unit)


def loss(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=f"loss of SmolLM2 in nats, {about}", over="texts", low=0)


def rule(comparison: str, measure: str, control: str, threshold: float = 0.0, **options: Any) -> Rule:
    return Rule(
        measure=measure, comparison=comparison, threshold=threshold, control=control, paired=True, **options
    )


above, below = partial(rule, "above"), partial(rule, "below")
LEARNS = Rule(measure="all_on", comparison="above", threshold=0.9)


@study("mixture-of-heads")
class MixtureOfHeadsStudy(Study):
    """Do tokens that choose their heads need fewer of them, and can a trained model be taught to?"""

    title = "MoH: Multi-Head Attention as Mixture-of-Head Attention"
    paper = "Jin et al. 2024, arXiv 2410.11842"
    quantities = (
        Quantity(name="error", about="the layer against its definition", over="draws", low=0),
        Quantity(name="unlike", about="a layer with heads off, against it", over="draws", low=0),
        *(share(name, f"answers, {about}") for name, about in ARMS.items()),
        *(
            Quantity(name=f"information{end}", about=f"what chosen heads tell of the task, nats{of}", low=0)
            for end, of in (("", ""), ("_chance", ", by chance"))
        ),
        *(
            share(f"use{end}", f"entropy of the use of heads over its largest{of}", "")
            for end, of in (("", ""), ("_unbalanced", ", without a balance"))
        ),
        *(share(f"small_{name}", f"answers, {about}") for name, about in CONVERTED.items()),
        share("small_untuned", "answers, converted by query norm and not tuned"),
        *(loss(f"came_{name}", about) for name, about in UNTUNED.items()),
        loss("adapted_query_norm", "by query norm, after the dense stage"),
        *(loss(f"tuned_{name}", about) for name, about in TUNED.items()),
        Quantity(
            name="returned", about="share of what routing cost that tuning brings back", over="texts",
            low=-2, high=2, unit="%",
        ),
        *(
            Quantity(name=f"even_{name}", about=f"use of its heads, {about}", over="texts", low=0, high=1)
            for name, about in (("tuned", "tuned"), ("loose", "without a balance"), ("came", "not tuned"))
        ),
    )  # fmt: skip
    claims = (
        Claim(
            name="exact",
            text="The layer is its definition, and the dense layer where all heads are on.",
            rules=(below("error", "unlike", factor=1e-3),),
            main=True,
        ),
        Claim(
            name="gain",
            text="4 of 8 heads, chosen and weighted by each token, answer more than 8 heads without gates.",
            rules=(above("moh", "dense8"),),
            needs=(LEARNS,),
            main=True,
            paper="with half of the heads 84.8 to 84.7 % of ImageNet, 43.9 to 45.4 over language tasks",
        ),
        Claim(
            name="keeps",
            text="They answer as well as all 8 heads, weighted and not routed.",
            rules=(above("moh", "all_on", -0.02),),
            needs=(LEARNS,),
        ),
        Claim(
            name="choice",
            text="They answer more than as many heads by chance, whose weights are learned.",
            rules=(above("moh", "chance", 0.02),),
            needs=(LEARNS,),
        ),
        Claim(
            name="tasks",
            text="Which heads are chosen tells of the task of a position.",
            rules=(above("information", "information_chance", 0.1),),
            needs=(LEARNS,),
            paper="heads are used differently by classes and tasks, its figures",
        ),
        Claim(
            name="even",
            text="The balance makes the use of heads more even.",
            rules=(above("use", "use_unbalanced"),),
            needs=(LEARNS,),
        ),
        Claim(
            name="converted",
            text="A trained layer, converted to 6 of 8 heads and tuned, answers as one tuned dense.",
            rules=(
                above("small_query_norm", "small_dense", -0.05),
                above("small_query_norm", "small_untuned"),
            ),
            main=True,
        ),
        Claim(
            name="score",
            text="Before tuning, SmolLM2's heads chosen by query norm cost less than heads by chance.",
            rules=(below("came_query_norm", "came_random"),),
        ),
        Claim(
            name="oracle",
            text="Before tuning, heads chosen by what they give cost less than heads by chance.",
            rules=(below("came_output_norm", "came_random"),),
        ),
        Claim(
            name="returns",
            text="Thirty steps bring back more than half of what routing SmolLM2 by query norm cost.",
            rules=(
                Rule(measure="returned", comparison="above", threshold=0.5),
                below("tuned_query_norm", "adapted_query_norm"),
            ),
            main=True,
            paper="over 95 % of the quality after 10B tokens",
        ),
        Claim(
            name="worth",
            text="Tuned the same, heads chosen by query norm cost less than by chance, and than pruned ones.",
            rules=(
                below("tuned_query_norm", "tuned_random"),
                below("tuned_query_norm", "tuned_magnitude"),
            ),
            main=True,
        ),
        Claim(
            name="learned",
            text="Tuned the same, a learned router costs less than query norms.",
            rules=(below("tuned_learned", "tuned_query_norm"),),
        ),
        Claim(
            name="price",
            text="Tuned the same, SmolLM2 with 7 of 9 heads by query norm is within 0.1 nats of dense.",
            rules=(below("tuned_query_norm", "tuned_dense", 0.1),),
            paper="61.6 to 64.0 over 14 tasks for LLaMA3-8B, with further data",
        ),
        Claim(
            name="loads",
            text="The balance makes the use of SmolLM2's heads more even.",
            rules=(above("even_tuned", "even_loose"),),
        ),
    )
    full = Size()
    quick = Size(
        seeds=1, steps=2, convert_steps=1, asked=4, dense_steps=1, tuning_steps=3, length=16, windows=2,
        tiny=True,
    )  # fmt: skip

    def __init__(self, size: Size, seed: int) -> None:
        super().__init__(size, seed)
        self.known: Language | None = None

    def steps(self) -> Iterable[Step]:
        for draw in range(3):
            yield Step(f"exact, draw {draw}", exactness, cost=0.02)
        for seed in range(self.size.seeds):
            yield Step(f"small, seed {seed}", partial(self.small, seed))
        yield Step("untuned", self.untuned, cost=0.7)
        for number, way in enumerate(TUNED):
            yield Step(f"tuned, {way}", partial(self.tuned, way), cost=1.5 if number else 2.5)

    def small(self, seed: int) -> dict[str, float]:
        """Train the layer in every way; return right answers, and how heads are chosen."""
        import copy

        import torch

        from regard.studies import mixture_of_heads_parts as parts

        size, found = self.size, {}
        pieces = len(parts.LAYERS) + len(CONVERTED)
        text = parts.TASK.batch(size.asked, torch.Generator().manual_seed(10_000 + self.seed))
        done, models = 0, {}

        def train(name: str, model: Any, steps: int, beta: float = parts.BETA) -> None:
            nonlocal done
            generator = torch.Generator().manual_seed(1000 * self.seed + seed)
            parts.train_looker(model, steps, generator, lambda x: self.tick((done + x) / pieces), beta)
            done += 1
            found[name] = parts.accuracy(model, text)

        with one_thread():
            for name, layer in parts.LAYERS.items():
                torch.manual_seed(1000 * self.seed + seed)
                models[name] = parts.Looker(layer())
                train(name, models[name], size.steps, 0.0 if name == "unbalanced" else parts.BETA)
            for name, end in (("moh", ""), ("chance", "_chance"), ("unbalanced", "_unbalanced")):
                told = parts.choices(models[name], text)
                found[f"information{end}"], found[f"use{end}"] = told["information"], told["entropy"]
            trained = models["dense8"]
            found["small_untuned"] = parts.accuracy(parts.convert(trained, "query_norm", 4, 2), text)
            for kind in CONVERTED:
                twin = kind == "dense"
                model = copy.deepcopy(trained) if twin else parts.convert(trained, kind, 4, 2)
                train(f"small_{kind}", model, size.convert_steps)
        return found

    def language(self) -> Language:
        """SmolLM2 and its text, loaded once."""
        if self.known is None:
            from regard.studies.mixture_of_heads_language import Language

            self.known = Language(self.size, self.seed)
        return self.known

    def untuned(self) -> dict[str, Any]:
        """Return losses of SmolLM2 as it came, with its heads routed each way."""
        with one_thread():
            return self.language().untuned(self.seed)

    def tuned(self, way: str) -> dict[str, Any]:
        """Return losses before and after the routed stage."""
        with one_thread():
            return self.language().tuned(way, self.tick)

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        small = [results[f"small, seed {s}"] for s in range(self.size.seeds)]
        draws = [told for name, told in results.items() if name.startswith("exact")]
        came, tuned = results["untuned"], {way: results[f"tuned, {way}"] for way in TUNED}
        before, after = tuned["query_norm"]["before"], tuned["query_norm"]["after"]
        triples = zip(before, after, tuned["dense"]["before"], tuned["dense"]["after"], strict=True)
        names = [q.name for q in self.quantities if q.name in small[0]]
        return {
            **{name: [told[name] for told in draws] for name in ("error", "unlike")},
            **{name: [told[name] for told in small] for name in names},
            **{f"came_{way}": came[way] for way in UNTUNED},
            "adapted_query_norm": before,
            **{f"tuned_{way}": told["after"] for way, told in tuned.items()},
            "returned": [returned(*four) for four in triples],
            "even_tuned": tuned["query_norm"]["even"],
            "even_loose": tuned["query_norm_loose"]["even"],
            "even_came": came["even"],
        }

    def details(self, results: Results) -> dict[str, Any]:
        size = self.size
        tokens = (size.dense_steps + size.tuning_steps) * size.length
        return {
            "remarks": [
                f"SmolLM2: {size.dense_steps} steps dense and {size.tuning_steps} routed, {tokens} tokens in "
                f"all, one seed; held out {size.windows} windows of {size.length}.",
            ],
            "before": {way: results[f"tuned, {way}"]["before"] for way in TUNED},
            "after": {way: results[f"tuned, {way}"]["after"] for way in TUNED},
        }

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.mixture_of_heads_picture import draw

        draw(outcome, figure)


def returned(before: float, after: float, dense_before: float, dense_after: float) -> float:
    """Share of the loss over dense that is gone after tuning, within -2 and 2."""
    cost = before - dense_before
    found = 1 - (after - dense_after) / cost if cost > 0 else 0.0
    return max(-2.0, min(2.0, found))


def exactness() -> dict[str, float]:
    """Compare layers with their definition and with the dense layer, on random inputs."""
    import torch

    from regard.attention import MultiHeadAttention
    from regard.attention.moh import MoHAttention

    x = torch.randn(2, 160, 24, dtype=torch.float64)
    dense = MultiHeadAttention(24, 6, positions="rotary").double()
    whole, errors = dense(x), []
    kinds: tuple[Any, ...] = ("query_norm", "learned")
    for kind in kinds:
        errors.append(float((MoHAttention.of(dense, 2, 4, kind=kind)(x) - whole).detach().abs().max()))
        some = MoHAttention.of(dense, 2, 2, kind=kind, fine_tune=False).eval()
        errors.append(float((some(x) - some.reference(x)).detach().abs().max()))
    few = MoHAttention.of(dense, 2, 2, kind="query_norm").eval()
    return {"error": max(errors), "unlike": float((few(x) - whole).detach().abs().max())}
