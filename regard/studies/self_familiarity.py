"""Zero-Resource Hallucination Prevention for Large Language Models (Luo, Xiao, Ma, 2023, arXiv 2309.02654).

    s(c) = exp mean log p(the best answer that names c | c's explanation, the name blotted out)

SmolLM2-135M-Instruct, 8 beams, explanations of 48 tokens, answers of 8 tokens beyond the name. Every seed
takes famous names that no other takes, two of two words and one of one word, and three invented ones beside
them: the two-word names with their last words exchanged, so that words and tokens are the same, and a word
of syllables with as many tokens. Set beside the score: the name's likelihood alone, the explanation's, the
likelihood of the name straight after the masked explanation, the model's own word, the agreement of
samples, word frequency and token count. Controls: the explanation of another name, and nothing masked. The
threshold is fitted on other, everyday concepts. The paper takes models of 7B to 13B and 515 questions, with
grades by GPT-4. Status: partly our choice (names, baselines, sizes); the rules are ours, set before the
run.
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

BASELINES = {
    "name": "the likelihood of the name alone",
    "forward": "the likelihood of the explanation",
    "backward": "the likelihood of the name straight after the masked explanation",
    "yes": "the model's word that it knows it",
    "agreement": "how far three sampled explanations agree",
    "frequency": "the frequency of its words",
    "tokens": "the number of its tokens",
}


@dataclass(frozen=True)
class Size:
    """Seeds; pairs of two-word names and single words of each; names for the two controls, of either group;
    everyday concepts for the threshold; beams, tokens of explanations and guesses; samples and their tokens.
    """

    seeds: int = 10
    pairs: int = 1
    singles: int = 1
    controls: int = 1
    everyday: int = 16
    beams: int = 8
    explain_tokens: int = 48
    guess_tokens: int = 8
    samples: int = 3
    sample_tokens: int = 16


def share(name: str, about: str, unit: str = "%") -> Quantity:
    return Quantity(name=name, about=about, low=0, high=1, unit=unit)


def auc(name: str, about: str) -> Quantity:
    return share(name, f"AUC, famous against invented names, {about}", "")


def rule(comparison: str, measure: str, control: str | None, threshold: float = 0.0, **options: Any) -> Rule:
    paired = control is not None
    return Rule(
        comparison=comparison, measure=measure, control=control, threshold=threshold, paired=paired, **options
    )


above, below, within = (partial(rule, comparison) for comparison in ("above", "below", "within"))


@study("self-familiarity")
class SelfFamiliarityStudy(Study):
    """Famous and invented names, told apart by whether a model finds them back in its own explanation."""

    title = "Zero-Resource Hallucination Prevention for Large Language Models"
    paper = "Luo, Xiao and Ma 2023, arXiv 2309.02654"
    quantities = (
        auc("auc", "of the familiarity score"),
        *(auc(f"auc_{name}", f"of {what}") for name, what in BASELINES.items()),
        auc("auc_crossed", "of the score, two-word names against the same with last words exchanged"),
        auc("auc_crossed_name", "as auc_crossed, of the likelihood of the name alone"),
        auc("auc_crossed_frequency", "as auc_crossed, of the frequency of words"),
        auc("auc_nonce", "of the score, single words against words of syllables"),
        share("score", "familiarity score of famous names, mean of those that the controls take", ""),
        share("score_invented", "the same of invented names", ""),
        share("swapped", "score of the same famous names, each with the explanation of another name", ""),
        share("unmasked", "score of the same famous names, nothing masked", ""),
        share("unmasked_invented", "the same of the invented names", ""),
        share("accuracy", "share of names told right by the threshold from everyday concepts"),
        share("accuracy_always", "the same, every name taken for familiar"),
        share("withheld", "share of invented names that the threshold withholds"),
        share("withheld_famous", "share of famous names that it withholds"),
        Quantity(name="rank_frequency", about="rank correlation of score and word frequency", low=-1, high=1),
        Quantity(name="rank_tokens", about="rank correlation of score and number of tokens", low=-1, high=1),
    )
    claims = (
        Claim(
            name="tells",
            text="The score tells famous names from invented ones, and better than their number of tokens.",
            rules=(above("auc", None, 0.5), above("auc", "auc_tokens")),
            main=True,
            paper="best AUC of all methods on four models of 7B and 13B; no figure quoted",
        ),
        Claim(
            name="name",
            text="It tells them better than the likelihood of the name alone.",
            rules=(above("auc", "auc_name"),),
            main=True,
        ),
        Claim(
            name="words",
            text="It tells them where the invented names have the words and tokens of the famous ones.",
            rules=(above("auc_crossed", None, 0.5), above("auc_crossed", "auc_crossed_frequency")),
            main=True,
        ),
        Claim(
            name="explanation",
            text="With the explanation of another name, famous names score less than half.",
            rules=(below("swapped", "score", factor=0.5),),
            main=True,
        ),
        Claim(
            name="masking",
            text="With nothing masked, famous and invented names both score above 0.7, and invented ones "
            "more than masked.",
            rules=(
                above("unmasked", None, 0.7),
                above("unmasked_invented", None, 0.7),
                above("unmasked_invented", "score_invented"),
            ),
            main=True,
        ),
        Claim(
            name="others",
            text="It tells them better than explanation, direct guess, self-report and samples.",
            rules=tuple(above("auc", f"auc_{name}") for name in ("forward", "backward", "yes", "agreement")),
            paper="best against parameter-, prompt- and sampling-based methods",
        ),
        Claim(
            name="gate",
            text="The threshold from everyday concepts tells more names right than answering always does, "
            "and withholds more invented names than famous ones.",
            rules=(above("accuracy", "accuracy_always"), above("withheld", "withheld_famous")),
        ),
    )
    full = Size()
    quick = Size(
        seeds=1, pairs=1, singles=1, controls=1, everyday=10, beams=2, explain_tokens=6, guess_tokens=2,
        samples=2, sample_tokens=4,
    )  # fmt: skip

    def prepare(self) -> None:
        import regard

        self.model, self.tokenizer = regard.load()

    def steps(self) -> Iterable[Step]:
        yield Step("threshold", self.threshold, cost=40)
        for seed in range(self.size.seeds):
            yield Step(f"seed {seed}", partial(self.one, seed), cost=100)

    def threshold(self) -> dict[str, Any]:
        """Fit the threshold on everyday concepts."""
        from regard.studies.self_familiarity_parts import calibrated

        return calibrated(self.model, self.tokenizer, self.size, self.seed)

    def one(self, seed: int) -> dict[str, Any]:
        """Score the names of one seed, and everything set beside the score."""
        from regard.studies.self_familiarity_parts import measured

        return measured(self.model, self.tokenizer, self.size, self.seed, seed, self.tick)

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        from regard.studies.self_familiarity_parts import summed

        limit = results["threshold"]["value"]
        runs = [summed(result, limit) for name, result in results.items() if name != "threshold"]
        return {quantity.name: [run[quantity.name] for run in runs] for quantity in self.quantities}

    def details(self, results: Results) -> dict[str, Any]:
        from regard.studies.self_familiarity_picture import collect

        return collect(results)

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.self_familiarity_picture import draw

        draw(outcome, figure)
