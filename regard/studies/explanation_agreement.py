"""A Song of (Dis)agreement: Evaluating the Evaluation of Explainable AI in NLP (Neely et al., 2205.04559).

Three parts. Known cases: a linear bag of embeddings, where gradient times input, integrated gradients,
DeepLIFT and occlusion are one thing, and an XOR, where they are not. Classifiers: a BiLSTM with tanh
attention and a small DistilBERT, on made reviews and on sentences of two novels, three seeds each;
Kendall's tau of every pair of methods, absolute scores of the probability of the predicted class, special
tokens kept, as in the paper. SmolLM2-135M-Instruct: indirect-object prompts of 15 tokens, logit(IO) -
logit(S), baseline the embedding of token 0, 16 steps of integrated gradients, which do not converge. An
"attention pair" is one method of attention and one attribution; the best is that of the highest mean.
"Itself" is LIME under another seed. Status: our choice of tasks, sizes and of 0.5 for "strongly";
thresholds of the language model by a prototype.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from regard.studies.base import Results, Step, Study
from regard.studies.claims import Claim, Quantity, Rule
from regard.studies.registry import study
from regard.studies.threads import one_thread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

MODELS = {"bilstm": "the BiLSTM", "transformer": "the DistilBERT"}
TASKS = ("reviews", "sentences")
CASES = [(model, task) for model in MODELS for task in TASKS]
STRONG = 0.5
GRADIENTS = "gradnorm|gradxinput"
PROMPT_TOKENS = 15


@dataclass(frozen=True)
class Size:
    """How many seeds, texts of each, samples of LIME, steps of training; prompts of the language model."""

    seeds: int = 3
    texts: int = 10
    samples: int = 300
    steps: int = 400
    known_samples: int = 1000
    prompts: int = 8
    gradient_steps: int = 16


def tau(name: str, about: str, over: str = "seeds") -> Quantity:
    return Quantity(name=name, about=about, over=over, low=-1, high=1)


def below(measure: str, threshold: float = STRONG) -> Rule:
    return Rule(measure=measure, comparison="below", threshold=threshold)


def above(measure: str, threshold: float) -> Rule:
    return Rule(measure=measure, comparison="above", threshold=threshold)


def over(measure: str, control: str, threshold: float = 0.0) -> Rule:
    return Rule(measure=measure, comparison="above", threshold=threshold, control=control, paired=True)


def learnt(model: str) -> tuple[Rule, ...]:
    """What must have worked: the classifier has learnt, and agreement can be seen where there is some."""
    rules = [(above(f"{model}_{t}_accuracy", 0.75), above(f"{model}_{t}_itself", STRONG)) for t in TASKS]
    return tuple(rule for pair in rules for rule in pair)


@study("explanation-agreement")
class ExplanationAgreement(Study):
    """Do explanations agree where they must, and does attention agree with any attribution?"""

    title = "A Song of (Dis)agreement: Evaluating the Evaluation of Explainable AI in NLP"
    paper = "Neely et al. 2022, arXiv 2205.04559"
    quantities = (
        tau("linear_same", "least mean tau of gradient x input, IG, DeepLIFT and occlusion, linear"),
        tau("linear_lime", "tau of LIME and gradient x input, linear"),
        tau("linear_random", "tau of random scores and gradient x input, linear"),
        tau("xor_same", "least mean tau of the same four, XOR"),
        *(
            quantity
            for model, task in CASES
            for quantity in (
                Quantity(name=f"{model}_{task}_accuracy", about="held-out texts told rightly", low=0, high=1,
                         unit="%"),
                tau(f"{model}_{task}_attention", "the best attention pair"),
                tau(f"{model}_{task}_attributions", "the best pair of two attributions"),
                tau(f"{model}_{task}_itself", "LIME under two seeds"),
            )
        ),
        tau("prompts_attention", "the best attention pair, SmolLM2", "prompts"),
        tau("prompts_gradients", "gradient norm and gradient x input, SmolLM2", "prompts"),
        tau("prompts_next", "the best other pair that is not two of attention, SmolLM2", "prompts"),
        tau("prompts_rollout", "rollout and occlusion, SmolLM2", "prompts"),
        tau("prompts_average", "attention average and occlusion, SmolLM2", "prompts"),
        tau("prompts_random", "random scores and every method, mean, SmolLM2", "prompts"),
    )  # fmt: skip
    claims = (
        Claim(
            name="linear",
            text="On a linear classifier gradient x input, IG, DeepLIFT and occlusion coincide, LIME nearly.",
            rules=(
                above("linear_same", 0.999),
                above("linear_lime", 0.9),
                over("linear_same", "linear_random", 0.5),
            ),
            main=True,
        ),
        Claim(
            name="xor",
            text="On an XOR they do not.",
            rules=(below("xor_same", 0.9), over("linear_same", "xor_same", 0.1)),
            main=True,
        ),
        *(
            Claim(
                name=f"attention, {model}",
                text=f"No attention-based explanation of {said} correlates strongly with any attribution.",
                rules=tuple(
                    rule
                    for task in TASKS
                    for rule in (
                        below(f"{model}_{task}_attention"),
                        over(f"{model}_{task}_itself", f"{model}_{task}_attention"),
                    )
                ),
                needs=learnt(model),
                main=True,
                paper="none does, for either model and any of five datasets",
            )
            for model, said in MODELS.items()
        ),
        Claim(
            name="no pair, transformer",
            text="No two attributions of the DistilBERT correlate strongly.",
            rules=tuple(
                rule
                for task in TASKS
                for rule in (
                    below(f"transformer_{task}_attributions"),
                    over(f"transformer_{task}_itself", f"transformer_{task}_attributions"),
                )
            ),
            needs=learnt("transformer"),
            paper="no pair does",
        ),
        Claim(
            name="some pairs, BiLSTM",
            text="Some attributions of the BiLSTM correlate strongly, more than attention with any.",
            rules=tuple(
                rule
                for task in TASKS
                for rule in (
                    above(f"bilstm_{task}_attributions", STRONG),
                    over(f"bilstm_{task}_attributions", f"bilstm_{task}_attention"),
                )
            ),
            needs=learnt("bilstm"),
            paper="some do",
        ),
        Claim(
            name="attention, SmolLM2",
            text="No attention pair is above 0.3; rollout and average stay below 0.5 with occlusion.",
            rules=(
                below("prompts_attention", 0.3),
                below("prompts_rollout"),
                below("prompts_average"),
                over("prompts_gradients", "prompts_attention"),
            ),
            main=True,
        ),
        Claim(
            name="highest pair, SmolLM2",
            text="Gradient norm and gradient x input are the pair that agrees most.",
            rules=(over("prompts_gradients", "prompts_next"),),
        ),
        Claim(
            name="floor, SmolLM2",
            text="Random scores agree with no method beyond 0.14, and less than the two gradients do.",
            rules=(
                Rule(measure="prompts_random", comparison="within", threshold=0.14),
                over("prompts_gradients", "prompts_random"),
            ),
        ),
    )
    full = Size()
    quick = Size(seeds=1, texts=2, samples=10, steps=6, known_samples=20, prompts=1, gradient_steps=2)

    def prepare(self) -> None:
        import regard
        from regard.tasks.ioi import ioi

        self.model, self.tokenizer = regard.load()
        made = ioi(self.tokenizer, 12 * self.size.prompts, seed=self.seed)
        self.pairs = [p for p in made.pairs if len(p.clean_ids) == PROMPT_TOKENS][: self.size.prompts]

    def steps(self) -> Iterable[Step]:
        for seed in range(self.size.seeds):
            yield Step(f"known cases, seed {seed}", partial(self.known, seed), cost=2)
        for seed in range(self.size.seeds):
            for model, task in CASES:
                work = partial(self.classifier, model, task, seed)
                yield Step(f"{model}, {task}, seed {seed}", work, cost=6)
        for number in range(self.size.prompts):
            yield Step(f"prompt {number}", partial(self.prompt, number), cost=4)

    def known(self, seed: int) -> dict[str, Any]:
        """Measure the linear classifier and the XOR."""
        from regard.studies.explanation_agreement_parts import known_case

        with one_thread():
            steps = 2 * self.size.steps
            return known_case(1000 * self.seed + seed, self.size.texts, self.size.known_samples, steps)

    def classifier(self, model: str, task: str, seed: int) -> dict[str, Any]:
        """Train a classifier and compare its explanations."""
        from regard.studies.explanation_agreement_parts import classifier_case

        size = self.size
        with one_thread():
            return classifier_case(
                model, task, 1000 * self.seed + seed, size.texts, size.samples, size.steps, self.tick
            )

    def prompt(self, number: int) -> dict[str, Any]:
        """Compare explanations of one prompt of the language model."""
        from regard.studies.explanation_agreement_parts import prompt_case

        pair = self.pairs[number]
        steps = self.size.gradient_steps
        return prompt_case(self.model, self.tokenizer, pair, steps, 1000 * self.seed + number)

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        known, prompts = named(results, "known"), named(results, "prompt")
        found = {
            **{f"linear_{name}": [k["linear"][name] for k in known] for name in ("same", "lime", "random")},
            "xor_same": [k["xor"]["same"] for k in known],
        }
        for model, task in CASES:
            runs = named(results, f"{model}, {task}")
            found[f"{model}_{task}_accuracy"] = [run["accuracy"] for run in runs]
            found[f"{model}_{task}_itself"] = [taus(run)["lime|lime again"] for run in runs]
            for kind, name in (("mixed", "attention"), ("attributions", "attributions")):
                best = best_pair(runs, kind)
                found[f"{model}_{task}_{name}"] = [taus(run)[best] for run in runs]
        other = [best_pair(prompts, "mixed"), best_pair(prompts, "attributions", GRADIENTS)]
        most = max(other, key=lambda pair: mean_tau(prompts, pair))
        return {
            **found,
            "prompts_attention": [taus(run)[other[0]] for run in prompts],
            "prompts_gradients": [taus(run)[GRADIENTS] for run in prompts],
            "prompts_next": [taus(run)[most] for run in prompts],
            "prompts_rollout": [taus(run)["occlusion|rollout"] for run in prompts],
            "prompts_average": [taus(run)["occlusion|average"] for run in prompts],
            "prompts_random": [
                fmean(t for pair, t in taus(run).items() if pair.endswith("|random")) for run in prompts
            ],
        }

    def details(self, results: Results) -> dict[str, Any]:
        from regard.studies.explanation_agreement_picture import collect

        groups = {f"{model}, {task}": named(results, f"{model}, {task}") for model, task in CASES}
        return collect({**groups, "SmolLM2": named(results, "prompt")}, self.size)

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.explanation_agreement_picture import draw

        draw(outcome, figure)


def named(results: Results, start: str) -> list[Any]:
    """Return the results of the steps whose name begins so."""
    return [told for name, told in results.items() if name.startswith(start)]


def taus(run: Any) -> dict[str, float]:
    """Return Kendall's tau of every pair that is defined."""
    return {pair: t for pair, t in run["pairs"]["kendall"].items() if t is not None}


def mean_tau(runs: Sequence[Any], pair: str) -> float:
    return fmean(taus(run)[pair] for run in runs)


def best_pair(runs: Sequence[Any], kind: str, without: str = "") -> str:
    """Return the pair of a kind with the highest mean over runs that all define it."""
    from regard.studies.explanation_agreement_parts import kind_of

    pairs = [
        p for p in taus(runs[0]) if kind_of(p) == kind and p != without and all(p in taus(r) for r in runs)
    ]
    return max(pairs, key=lambda pair: mean_tau(runs, pair))
