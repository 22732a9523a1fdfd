"""Sparse Autoencoders Enable .. Circuit Identification (O'Neill et al., 2024, arXiv 2405.12522).

    score of a head = how many codes it shows in prompts with the task, and in none without

On planted circuits, where class means tell and where they do not, and on SmolLM2-135M-Instruct, where the
truth is the circuit that path patching finds on other prompts: per stage the 2 % of heads with the largest
effect, of at least 2 % of the whole change. Every number stands beside labels shuffled, the difference of
class means and the mere number of the layer. Each prompt set draws its prompts, examples and first weights
anew. Status: sizes and rules are our choice; the paper takes GPT-2 small and published lists.
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

TASKS: dict[str, dict[str, Any]] = {
    "ioi": {"l1": 0.02},
    "greater_than": {"l1": 0.02},
    "docstring": {"l1": 0.05},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "standard": {"standardise": "head"},
    "many": {"train_examples": 40},
}
SAID = {
    "standard": "vectors of each head standardised",
    "many": "trained on 40 prompts instead of 10",
}
KINDS = {"means": "class means differ", "signs": "class means are equal"}


@dataclass(frozen=True)
class Size:
    """Draws of planted circuits, and prompts of each; prompt sets of the model, and prompts in them."""

    draws: int = 5
    planted: int = 100
    sets: int = 5
    prompts: int = 48
    truth: int = 24
    least: float = 0.02
    epochs: int = 500
    tiny: bool = False


def area(name: str, about: str, over: str = "prompt sets") -> Quantity:
    return Quantity(name=name, about=f"AUC, {about}", over=over, low=0, high=1)


def rule(measure: str, comparison: str, control: str | None, threshold: float = 0.0) -> Rule:
    return Rule(
        measure=measure,
        comparison=comparison,
        control=control,
        threshold=threshold,
        paired=control is not None,
    )


def above_chance(name: str, task: str, main: bool = False, paper: str = "") -> Claim:
    return Claim(
        name=name, text=f"On {task} of the model, codes find the circuit better than with labels shuffled.",
        rules=(rule(f"{task}_sae", "above", None, 0.6), rule(f"{task}_sae", "above", f"{task}_shuffled")),
        main=main, paper=paper,
    )  # fmt: skip


@study("sae-circuits")
class SaeCircuits(Study):
    """Whether codes of head outputs find circuits: planted ones, and those that path patching finds."""

    title = "Sparse Autoencoders Enable Scalable and Reliable Circuit Identification in Language Models"
    paper = "O'Neill et al. 2024, arXiv 2405.12522"
    quantities = (
        *(
            area(f"{kind}_{name}", f"{way}, planted, {about}", "draws")
            for name, way in (
                ("sae", "codes"), ("diff", "difference of means"), ("shuffled", "labels shuffled")
            )
            for kind, about in KINDS.items()
        ),
        *(
            area(f"{task}_{name}", f"{about}, {task}")
            for task in TASKS
            for name, about in (
                ("sae", "codes"), ("edges", "pairs of codes"), ("shuffled", "codes, labels shuffled"),
                ("diff", "difference of means"), ("layer", "number of the layer"), ("norm", "mean norm"),
                ("within", "codes, pairs of one layer"),
                ("within_shuffled", "codes, labels shuffled, pairs of one layer"),
                ("within_diff", "difference of means, pairs of one layer"),
            )
        ),
        *(area(f"ioi_{name}", f"codes, ioi, {about}") for name, about in SAID.items()),
        area("ioi_within_standard", f"codes, ioi, {SAID['standard']}, pairs of one layer"),
    )  # fmt: skip
    claims = (
        Claim(
            name="signs",
            text=(
                "Where class means are equal, codes find a planted circuit "
                "that the difference of means misses."
            ),
            rules=(
                rule("signs_sae", "above", None, 0.95),
                rule("signs_diff", "below", None, 0.65),
                rule("signs_sae", "above", "signs_shuffled", 0.2),
            ),
            main=True,
        ),
        Claim(
            name="means",
            text="Where class means differ, codes find a planted circuit too.",
            rules=(rule("means_sae", "above", "means_shuffled", 0.2),),
        ),
        above_chance("ioi", "ioi", main=True, paper="0.868 on GPT-2 small, beside ACDC's 0.873"),
        above_chance("greater", "greater_than", paper="0.855 on GPT-2 small"),
        above_chance("docstring", "docstring", paper="0.869 on attn-only-4l"),
        Claim(
            name="better",
            text="On ioi, codes find the circuit better than the difference of class means.",
            rules=(rule("ioi_sae", "above", "ioi_diff"),),
        ),
        Claim(
            name="layer",
            text="On ioi, codes find the circuit better than the number of the layer does.",
            rules=(rule("ioi_sae", "above", "ioi_layer"),),
        ),
        Claim(
            name="within",
            text="On ioi, codes tell heads of one layer apart, by 0.05 over shuffled labels.",
            rules=(rule("ioi_within", "above", "ioi_within_shuffled", 0.05),),
        ),
        Claim(
            name="standard",
            text="On ioi, standardising the vectors of each head helps to tell heads of one layer apart.",
            rules=(rule("ioi_within_standard", "above", "ioi_within"),),
        ),
        Claim(
            name="few",
            text="On ioi, ten prompts train as good a dictionary as forty, within 0.05.",
            rules=(rule("ioi_many", "within", "ioi_sae", 0.05),),
            paper="5 to 10 examples are enough",
        ),
        Claim(
            name="edges",
            text="On ioi, pairs of codes find heads as well as codes, within 0.05.",
            rules=(rule("ioi_edges", "within", "ioi_sae", 0.05),),
            paper="0.840 against 0.868",
        ),
    )
    full = Size()
    quick = Size(draws=1, planted=40, sets=1, prompts=6, truth=4, least=0.0, epochs=20, tiny=True)

    def prepare(self) -> None:
        import regard

        self.model, self.tokenizer = regard.load()
        if self.size.tiny:
            self.model = small(self.model)

    def steps(self) -> Iterable[Step]:
        for kind in KINDS:
            for draw in range(self.size.draws):
                yield Step(f"planted, {kind}, draw {draw}", partial(self.planted, kind, draw), cost=0.1)
        for task in TASKS:
            yield Step(f"paths, {task}", partial(self.paths, task), cost=12)
            for number in range(self.size.sets):
                variants = ("plain", *VARIANTS) if task == "ioi" else ("plain",)
                work = partial(self.coded, task, number, variants)
                yield Step(f"codes, {task}, set {number}", work, cost=3.0 * len(variants))

    def planted(self, kind: str, draw: int) -> dict[str, float]:
        """Return the AUC of codes, of the difference of means and of shuffled labels."""
        from regard.studies.sae_circuits_parts import planted_aucs

        return planted_aucs(kind, self.size.planted, 1000 * self.seed + draw)

    def prompts(self, task: str, count: int, seed: int, **options: Any) -> Any:
        from regard.tasks.docstring import docstring
        from regard.tasks.greater_than import greater_than
        from regard.tasks.ioi import ioi

        make = {"ioi": ioi, "greater_than": greater_than, "docstring": docstring}[task]
        return make(self.tokenizer, count, seed=1000 * self.seed + seed, **options)

    def paths(self, task: str) -> dict[str, Any]:
        """Return the heads that path patching finds, and how long it took."""
        import time

        from regard.lens.circuits.discover import SHARE, Stage, discover_circuit

        begun = time.perf_counter()
        prompts = self.prompts(task, self.size.truth, 500)
        prompts = replace(prompts, metric="logit") if self.size.tiny else prompts
        stages, share = ((Stage("writers"),), 0.3) if self.size.tiny else (None, SHARE)
        circuit = discover_circuit(self.model, prompts, stages, share=share, progress=False)
        heads = circuit.heads(least=self.size.least)
        return {"heads": [list(head) for head in heads], "seconds": time.perf_counter() - begun}

    def coded(self, task: str, number: int, variants: Sequence[str]) -> dict[str, Any]:
        """Return vectors' scores, plain and in other ways; what they are held against comes later."""
        import time

        from regard.lens.circuits.head_results import head_results
        from regard.studies.sae_circuits_parts import scored

        options = {"corrupt": "absent"} if task == "ioi" else {}
        prompts = self.prompts(task, self.size.prompts, number, **options)
        begun = time.perf_counter()
        sides = ([getattr(p, f"{side}_ids") for p in prompts.pairs] for side in ("clean", "corrupt"))
        results = head_results(self.model, *sides, progress=False)
        read = time.perf_counter() - begun
        found: dict[str, Any] = {"read_seconds": read}
        for done, variant in enumerate(variants):
            given = {**TASKS[task], "epochs": self.size.epochs, **VARIANTS.get(variant, {})}
            if "train_examples" in given:
                given["train_examples"] = min(given["train_examples"], 2 * self.size.prompts)
            found[variant] = scored(results, number + 1000 * self.seed, given)
            self.tick((done + 1) / len(variants))
        return found

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        from regard.studies.sae_circuits_parts import measured

        return measured(results, KINDS, TASKS, VARIANTS)

    def details(self, results: Results) -> dict[str, Any]:
        from regard.studies.sae_circuits_parts import told

        return told(results, TASKS)

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.sae_circuits_picture import draw

        draw(outcome, figure)


def small(model: Any) -> Any:
    """Return a model of the same kind and vocabulary, of two narrow layers with large random weights."""
    import copy

    config = copy.deepcopy(model.config)
    sizes = {
        "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.4,
    }  # fmt: skip
    for name, value in sizes.items():
        setattr(config, name, value)
    return type(model)(config).eval()
