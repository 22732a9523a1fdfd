"""Softplus Attention with Re-weighting (Gao and Spratling, 2025, arXiv 2501.13428), on length extrapolation.

Small causal models of two layers with rotary positions learn induction (`regard.tasks.repeated`: tokens that
repeat with a period of 8 to 24) at 64 tokens, and are then asked at 64 to 512. They differ in attention:
softmax; softplus (LSSA); softplus with re-weighting, p = 3 and 15 (LSSAR); and the control without which
nothing could be put down to softplus, softmax over the same normalised queries and keys with the same scale
log D log m. And: is it a swap for models that were trained with softmax?
Status: task, sizes and rules are our choice; the paper trains 124M parameters on FineWeb.
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

    from regard.attention.registry import Spec
    from regard.studies.outcome import Outcome

DIM, HEADS, LAYERS, BATCH, RATE = 64, 4, 2, 32, 3e-3
TRAINED, LENGTHS = 64, (64, 128, 256, 512)
KINDS = ("softmax", "scaled_softmax", "lssa", "lssar_3", "lssar_15")
ENDS = (64, 512)
ABOUT = {
    "softmax": "softmax",
    "scaled_softmax": "softmax with the same norm and scale",
    "lssa": "LSSA",
    "lssar_3": "LSSAR, p = 3",
    "lssar_15": "LSSAR, p = 15",
}
SWAPPED = {"plain": "the model as it is", "swapped": "LSSA swapped in", "reweighted": "LSSAR swapped in"}
TOKENS = 128


@dataclass(frozen=True)
class Size:
    """How many seeds, steps of training, sequences to evaluate on, and passages."""

    seeds: int = 3
    steps: int = 500
    sequences: int = 64
    texts: int = 6


def loss(name: str, about: str, over: str = "seeds") -> Quantity:
    return Quantity(name=name, about=about, over=over, low=0, unit="nats")


def above(measure: str, control: str, threshold: float = 0.0, **options: Any) -> Rule:
    return Rule(
        measure=measure, comparison="above", threshold=threshold, control=control, paired=True, **options
    )


def flat(kind: str) -> Rule:
    """At eight times the length the loss is at most a fifth higher."""
    return Rule(
        measure=f"{kind}_512", comparison="below", threshold=0, control=f"{kind}_64", factor=1.2, paired=True
    )


def learnt(kind: str) -> Rule:
    return Rule(measure=f"{kind}_64", comparison="below", threshold=0.7)


@study("softplus-attention")
class SoftplusAttention(Study):
    """Whether softplus, re-weighting or the scale lets a model work at lengths it was not trained at."""

    title = "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models"
    paper = "Gao and Spratling 2025, arXiv 2501.13428"
    quantities = (
        *(
            loss(f"{kind}_{length}", f"loss at {length} tokens, {ABOUT[kind]}")
            for kind in KINDS
            for length in ENDS
        ),
        *(
            loss(name, f"loss of SmolLM2-135M on a passage, {about}", "texts")
            for name, about in SWAPPED.items()
        ),
    )
    claims = (
        Claim(
            name="flat",
            text="Re-weighted (p = 15) the loss stays flat to 8 times the length; with softmax it rises.",
            rules=(flat("lssar_15"), above("softmax_512", "softmax_64", factor=1.2)),
            needs=(learnt("lssar_15"), learnt("softmax")),
            main=True,
            paper="3.19 at 1K to 3.32 at 8K; softmax 3.19 to 6.28",
        ),
        Claim(
            name="cause",
            text="Softmax with the same norm and scale does not stay flat, so that it is softplus's doing.",
            rules=(above("scaled_softmax_512", "scaled_softmax_64", factor=1.2),),
            needs=(learnt("scaled_softmax"),),
            main=True,
            paper="not compared",
        ),
        Claim(
            name="softplus",
            text="Softplus alone, without re-weighting, extrapolates better than softmax.",
            rules=(
                Rule(measure="lssa_512", comparison="below", threshold=0, control="softmax_512", paired=True),
            ),
            needs=(learnt("lssa"),),
            paper="5.94 against 6.28 at 8K",
        ),
        Claim(
            name="power",
            text="A power of 15 extrapolates better than 3.",
            rules=(above("lssar_3_512", "lssar_15_512"),),
            needs=(learnt("lssar_3"), learnt("lssar_15")),
            paper="3.32 against 6.30 at 8K",
        ),
        Claim(
            name="swap",
            text="It is no swap for a model trained with softmax: the loss rises by more than a nat.",
            rules=(above("swapped", "plain", 1.0), above("reweighted", "plain", 1.0)),
        ),
    )
    full, quick = Size(), Size(seeds=1, steps=4, sequences=4, texts=1)

    def steps(self) -> Iterable[Step]:
        for seed in range(self.size.seeds):
            for kind in KINDS:
                yield Step(f"{kind}, seed {seed}", partial(self.train, kind, seed))
        yield Step("swap", self.swap, cost=0.3)

    def train(self, kind: str, seed: int) -> dict[str, float]:
        """Train a model at 64 tokens; return its loss on what repeats, by length."""
        import torch
        from torch.nn.functional import cross_entropy

        from regard.attention import MultiHeadAttention
        from regard.models.tiny import TinyModel
        from regard.tasks.repeated import IGNORE, Repeated

        task, size = Repeated(), self.size
        torch.manual_seed(1000 * self.seed + seed)
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        mixers = (
            MultiHeadAttention(DIM, HEADS, mechanism=specs()[kind], positions="rotary", bias=True)
            for _ in range(LAYERS)
        )
        model = TinyModel(task.symbols, DIM, mixers)
        optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
        plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, size.steps, pct_start=0.1)

        def loss_at(length: int, count: int) -> torch.Tensor:
            tokens, targets = task.batch(count, length, generator)
            return cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

        with one_thread():
            for step in range(size.steps):
                value = loss_at(TRAINED, BATCH)
                optimizer.zero_grad()
                value.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                plan.step()
                self.tick((step + 1) / size.steps)
            model.eval()
            with torch.no_grad():
                return {str(length): float(loss_at(length, size.sequences)) for length in LENGTHS}

    def swap(self) -> dict[str, list[float]]:
        """Return the loss of the default model on passages, plain and with the mechanism swapped in."""
        import torch

        import regard
        from regard.attention import LSSA, LSSAR, Softmax
        from regard.tasks.passages import passages

        model, tokenizer = regard.load()
        found: dict[str, list[float]] = {}
        for name, spec in (("plain", Softmax()), ("swapped", LSSA()), ("reweighted", LSSAR())):
            with regard.swap(model, spec), torch.no_grad():
                for passage in passages()[: self.size.texts]:
                    ids = tokenizer(passage.text, return_tensors="pt")["input_ids"][:, :TOKENS]
                    found.setdefault(name, []).append(float(model(ids, labels=ids).loss))
        return found

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        ends = {
            f"{kind}_{length}": [told[str(length)] for told in runs(results, kind)]
            for kind in KINDS
            for length in ENDS
        }
        return {**ends, **results["swap"]}

    def details(self, results: Results) -> dict[str, Any]:
        curves = {
            kind: [[told[str(length)] for length in LENGTHS] for told in runs(results, kind)]
            for kind in KINDS
        }
        means = {
            kind: [sum(at) / len(at) for at in zip(*found, strict=True)] for kind, found in curves.items()
        }
        told = "; ".join(
            f"{ABOUT[kind]} {', '.join(f'{x:.3f}' for x in found)}" for kind, found in means.items()
        )
        return {
            "curves": curves,
            "remarks": [f"Mean losses at {', '.join(map(str, LENGTHS))} tokens: {told}."],
        }

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.softplus_attention_picture import draw

        draw(outcome, figure)


def specs() -> dict[str, Spec]:
    """What is compared, by name."""
    from regard.attention import LSSA, LSSAR, Softmax

    return {
        "softmax": Softmax(),
        "scaled_softmax": LSSA(activation="exp"),
        "lssa": LSSA(),
        "lssar_3": LSSAR(p_train=3.0, p_eval=3.0),
        "lssar_15": LSSAR(),
    }


def runs(results: Results, kind: str) -> list[Any]:
    return [told for step, told in results.items() if step.startswith(f"{kind}, ")]
