"""Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs (Guo et al.,
2024, arXiv 2410.13835).

On SmolLM2-135M-Instruct: sinks, drained values and residual peaks on 80 tokens of prose and of Python,
beside copies with random weights; the heads whose sink differs between the two, kept on a second pair of
texts, beside the two halves of one passage; and the loss where heads at work on a kind of text are forced
onto its first token, beside those that are dormant on it. Heads are chosen on one half of the texts and
forced on the other. On Bigram-Backcopy: models of width 64 on 64 characters, with softmax or ReLU, AdamW or
SGD, one or three layers; the paper has width 256, 256 characters and 10,000 steps or more. Status: agrees
with the official code (what is measured, the task, the model); the sizes and rules are our choice.
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

TOKENS = 80
DOMAINS = ("prose", "code")
TOYS: dict[str, dict[str, Any]] = {
    "softmax": {"layers": 1, "attention": "softmax", "optimiser": "adamw", "rate": 3e-3, "batch": 32},
    "relu": {"layers": 1, "attention": "relu", "optimiser": "adamw", "rate": 3e-3, "batch": 32},
    "deep": {"layers": 3, "attention": "softmax", "optimiser": "adamw", "rate": 3e-3, "batch": 16},
    "sgd": {"layers": 3, "attention": "softmax", "optimiser": "sgd", "rate": 0.3, "batch": 16},
}


@dataclass(frozen=True)
class Size:
    """How many texts a domain and untrained copies; heads to force; seeds and steps of the small models."""

    texts: int = 12
    copies: int = 3
    forced: int = 10
    seeds: int = 3
    shallow_steps: int = 800
    deep_steps: int = 500
    sgd_steps: int = 1000


def share(name: str, about: str, over: str = "texts") -> Quantity:
    return Quantity(name=name, about=about, over=over, low=0, high=1, unit="%")


def size(name: str, about: str, over: str = "texts", unit: str = "") -> Quantity:
    return Quantity(name=name, about=about, over=over, low=0, unit=unit)


def rise(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=f"rise of the loss, {about}", over="texts", unit="nats")


def rule(comparison: str, measure: str, threshold: float, control: str | None = None, **more: Any) -> Rule:
    return Rule(measure=measure, comparison=comparison, threshold=threshold, control=control, **more)


above, below = partial(rule, "above"), partial(rule, "below")


@study("active-dormant-heads")
class ActiveDormantHeads(Study):
    """Sinks, drains and peaks of a language model; heads that idle by domain; a task on which they form."""

    title = "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs"
    paper = "Guo et al. 2024, arXiv 2410.13835"
    quantities = (
        share("sinks", "heads with over 0.3 of their attention on the first token"),
        share("sinks_random", "the same with random weights", "copies"),
        size("drain", "value of the first token over the others', median head"),
        size("drain_random", "the same with random weights", "copies"),
        size("peak", "residual norm of the first token over the largest other, at its highest"),
        size("peak_random", "the same with random weights", "copies"),
        size(
            "kept",
            "heads with a contrast of prose and code over 0.3 that keep its sign on other texts",
            "pairs",
        ),
        size("kept_halves", "the same for two halves of one passage of prose", "pairs"),
        rise("active", "heads at work on the text's domain forced onto the first token"),
        rise("dormant", "heads dormant on it forced instead"),
        rise("random", "as many random heads of the same layers as those at work"),
        share("toy_sink", "weight on <s> where nothing is copied, softmax, one layer", "seeds"),
        share("toy_sink_before", "the same before training", "seeds"),
        share("toy_copy", "weight of triggers on the token before, softmax, one layer", "seeds"),
        size("column", "column of <s> over the median column, softmax", "seeds"),
        size("column_relu", "the same with ReLU attention", "seeds"),
        size("toy_loss", "loss at triggers, softmax", "seeds", "nats"),
        size("toy_loss_relu", "the same with ReLU attention", "seeds", "nats"),
        size("toy_drain", "value of <s> over the others', softmax, one layer", "seeds"),
        size("toy_drain_relu", "the same with ReLU attention", "seeds"),
        size("toy_peak", "residual norm of <s> over the largest other, one layer", "seeds"),
        size("deep_peak", "the same with three layers, AdamW", "seeds"),
        size("sgd_peak", "the same with three layers, SGD", "seeds"),
        share(
            "deep_sink", "weight on <s> where nothing is copied, three layers, AdamW, most of any", "seeds"
        ),
        share("sgd_sink", "the same with SGD", "seeds"),
        size("deep_loss", "loss at triggers, three layers, AdamW", "seeds", "nats"),
        size("sgd_loss", "the same with SGD", "seeds", "nats"),
    )
    claims = (
        Claim(
            name="extremes",
            text="A pretrained model has sinks, drained values and a residual peak; one with random "
            "weights has none.",
            rules=(
                above("sinks", 0.3, "sinks_random"), below("sinks_random", 0.1),
                below("drain", 0.0, "drain_random", factor=0.5), above("drain_random", 0.8),
                above("peak", 0.0, "peak_random", factor=10), below("peak_random", 2),
            ),
            main=True,
            paper="all three in Llama-2, Llama-3.1 and OLMo",
        ),
        Claim(
            name="contrast",
            text="At least 5 heads are sinks on one domain alone, of prose and code, and on other texts too; "
            "between halves of one passage there are far fewer.",
            rules=(above("kept", 4.5), above("kept", 0.0, "kept_halves", factor=3)),
            main=True,
            paper="layer 16 head 25 of Llama-2-7B",
        ),
        Claim(
            name="work",
            text="Forcing heads at work on a domain onto the first token costs more there than forcing those "
            "that are dormant on it.",
            rules=(above("active", 0.0, "dormant", paired=True),),
        ),
        Claim(
            name="toy",
            text="On Bigram-Backcopy a softmax head parks on <s> where nothing is copied, and "
            "copies at triggers.",
            rules=(
                above("toy_sink", 0.7), above("toy_copy", 0.7),
                above("toy_sink", 0.3, "toy_sink_before", paired=True),
            ),
            main=True,
        ),
        Claim(
            name="relu",
            text="ReLU attention learns as much and has no sink.",
            rules=(
                below("column_relu", 2), below("column_relu", 0.0, "column", factor=0.5, paired=True),
                below("toy_loss_relu", 0.02, "toy_loss", paired=True),
            ),
            main=True,
            paper="Fig. 7c: ReLU removes all three",
        ),
        Claim(
            name="relu_drain",
            text="ReLU attention drains no value either: <s> has at least half of the others'.",
            rules=(above("toy_drain_relu", 0.5), above("toy_drain_relu", 0.0, "toy_drain", paired=True)),
            paper="Fig. 7c: ReLU removes all three",
        ),
        Claim(
            name="depth",
            text="A residual peak needs depth: with three layers it is at least twice as high as with one.",
            rules=(above("deep_peak", 0.0, "toy_peak", factor=2),),
            needs=(below("deep_loss", 0.2),),
        ),
        Claim(
            name="sgd",
            text="SGD in place of Adam removes the peak and leaves the sink.",
            rules=(
                below("sgd_peak", 0.0, "deep_peak", factor=0.5, paired=True),
                above("sgd_sink", 0.0, "deep_sink", factor=0.5, paired=True),
            ),
            needs=(above("deep_peak", 2), below("sgd_loss", 0.2)),
            paper="residual peaks need Adam",
        ),
    )  # fmt: skip
    full = Size()
    quick = Size(texts=4, copies=1, forced=2, seeds=1, shallow_steps=4, deep_steps=2, sgd_steps=2)

    def prepare(self) -> None:
        import regard
        from regard.tasks.passages import code_passages, passages

        self.model, tokenizer = regard.load()
        both = {"prose": passages(), "code": code_passages()}
        self.texts = {
            domain: [tokenizer(p.text, return_tensors="pt").input_ids[0] for p in found[: self.size.texts]]
            for domain, found in both.items()
        }

    def steps(self) -> Iterable[Step]:
        for domain in (*DOMAINS, "later"):
            for number in range(self.size.texts):
                yield Step(f"{domain} {number}", partial(self.text, domain, number), cost=1)
        for copy in range(self.size.copies):
            yield Step(f"untrained copy {copy}", self.untrained, cost=4)
        yield Step("forced heads", self.forced, cost=8 * self.size.texts)
        for seed in range(self.size.seeds):
            for name in TOYS:
                yield Step(f"toy {name}, seed {seed}", partial(self.toy, name, seed), cost=60)

    def text(self, domain: str, number: int) -> dict[str, Any]:
        """Measure the first tokens of a text, or for `later` the next ones of a passage of prose."""
        from regard.studies.active_dormant_heads_parts import extremes

        ids = self.texts["prose" if domain == "later" else domain][number]
        return extremes(self.model, ids[TOKENS : 2 * TOKENS] if domain == "later" else ids[:TOKENS])

    def untrained(self) -> dict[str, Any]:
        """Measure a passage in a copy of the model with fresh random weights."""
        from regard.studies.active_dormant_heads_parts import extremes

        return extremes(type(self.model)(self.model.config).eval(), self.texts["prose"][0][:TOKENS])

    def forced(self) -> dict[str, list[float]]:
        """Choose heads on the even texts, force them on the odd ones, and return how the loss rises."""
        from regard.studies.active_dormant_heads_parts import rises

        texts = {domain: [ids[:TOKENS] for ids in found] for domain, found in self.texts.items()}
        return rises(self.model, texts, self.size.forced, self.seed, self.tick)

    def toy(self, name: str, seed: int) -> dict[str, Any]:
        """Train a small model, and return what formed inside."""
        from regard.studies.active_dormant_heads_parts import trained

        options = TOYS[name]
        steps = {"deep": self.size.deep_steps, "sgd": self.size.sgd_steps}
        return trained(
            **options, steps=steps.get(name, self.size.shallow_steps), seed=1000 * self.seed + seed,
            tick=self.tick,
        )  # fmt: skip

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        from regard.studies.active_dormant_heads_parts import kept

        found = {kind: [told for name, told in results.items() if name.startswith(kind)]
                 for kind in (*DOMAINS, "later", "untrained")}  # fmt: skip
        texts = found["prose"] + found["code"]
        runs = {n: [told for step, told in results.items() if step.startswith(f"toy {n},")] for n in TOYS}
        last = {name: [run["measures"][-1] for run in some] for name, some in runs.items()}
        ratio = {
            n: [told["column.0"] / told["median_column.0"] for told in last[n]] for n in ("softmax", "relu")
        }
        return {
            **{name: [told[name] for told in texts] for name in ("sinks", "drain", "peak")},
            **{f"{name}_random": [told[name] for told in found["untrained"]]
               for name in ("sinks", "drain", "peak")},
            "kept": kept(found["prose"], found["code"]),
            "kept_halves": kept(found["prose"], found["later"]),
            **results["forced heads"],
            "toy_sink": [told["sink.0"] for told in last["softmax"]],
            "toy_sink_before": [run["measures"][0]["sink.0"] for run in runs["softmax"]],
            "toy_copy": [told["copy.0"] for told in last["softmax"]],
            "column": ratio["softmax"], "column_relu": ratio["relu"],
            "toy_loss": [told["trigger_loss"] for told in last["softmax"]],
            "toy_loss_relu": [told["trigger_loss"] for told in last["relu"]],
            "toy_drain": [told["drain.0"] for told in last["softmax"]],
            "toy_drain_relu": [told["drain.0"] for told in last["relu"]],
            "toy_peak": [most(told, "peak") for told in last["softmax"]],
            **{f"{n}_peak": [most(told, "peak") for told in last[n]] for n in ("deep", "sgd")},
            **{f"{n}_sink": [most(told, "sink") for told in last[n]] for n in ("deep", "sgd")},
            **{f"{n}_loss": [told["trigger_loss"] for told in last[n]] for n in ("deep", "sgd")},
        }  # fmt: skip

    def details(self, results: Results) -> dict[str, Any]:
        runs = {step.removeprefix("toy "): told for step, told in results.items() if step.startswith("toy ")}
        first = {
            domain: [[round(x, 4) for x in told["first"]] for step, told in results.items()
                     if step.startswith(domain)]
            for domain in (*DOMAINS, "later")
        }  # fmt: skip
        return {"first": first, "norms": results["prose 0"]["norms"], "toys": runs}

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.active_dormant_heads_picture import draw

        draw(outcome, figure)


def most(told: Mapping[str, float], name: str) -> float:
    """Return the largest value of a measure over layers."""
    return max(value for key, value in told.items() if key.startswith(f"{name}."))
