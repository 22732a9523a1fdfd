"""Understanding the differences in Foundation Models (Sieber et al., 2024, arXiv 2405.15731).

Three parts. Every row of the framework's table is held to its mixer's own formula, and six planted faults
must be seen. A state-space model made from a normalised attention must have the same map, and another where
the tie between decay and input scale is broken. And recall: the paper says that more state a channel, n,
brings linear attention nearer to softmax, and that a free normaliser beats linear attention. Two layers of
width 32, eight heads; everything around the mixer is the same; the better of two learning rates is chosen for
each mixer on other sequences than those that count. The control sees its own position alone.
Status: the rules and sizes are our choice; the paper trains for 64 epochs on up to 512 tokens.
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
    from torch import nn

    from regard.studies.outcome import Outcome

DIM, HEADS, LAYERS, BATCH = 32, 8, 2, 32
RATES = (3e-3, 1e-2)
MIXERS = {
    "softmax": 16, "linear_4": 4, "linear_8": 8, "linear_16": 16, "normalised_16": 16, "blind": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How many draws of random inputs, seeds and steps of training; pairs to recall."""

    draws: int = 5
    lengths: tuple[int, ...] = (9, 33)
    seeds: int = 3
    steps: int = 500
    pairs: int = 8
    length: int = 32
    symbols: int = 64
    rates: int = 2


def accuracy(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=f"recall accuracy, {about}", over="seeds", low=0, high=1, unit="%")


def difference(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=about, over="draws", low=0)


def above(measure: str, control: str, threshold: float = 0.0, **options: Any) -> Rule:
    return Rule(
        measure=measure, comparison="above", threshold=threshold, control=control, paired=True, **options
    )


@study("dynamical-systems-framework")
class DynamicalSystemsFramework(Study):
    """Attention, state-space models and recurrences as one system: exact? equal? and what recall needs."""

    title = (
        "Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent "
        "Neural Networks"
    )
    paper = "Sieber et al. 2024, arXiv 2405.15731"
    quantities = (
        difference("error", "largest error of a system against its mixer's formula, all rows"),
        difference("fault", "the same of systems with a planted fault, the smallest"),
        difference("same", "difference of the maps of a normalised attention and of the SSD made from it"),
        difference("untied", "the same, with the step size raised by a tenth in the decay alone"),
        accuracy("softmax", "softmax attention, n = 16"),
        accuracy("linear_4", "linear attention, n = 4"),
        accuracy("linear_8", "linear attention, n = 8"),
        accuracy("linear_16", "linear attention, n = 16"),
        accuracy("normalised_16", "normalised attention (exp), n = 16"),
        accuracy("blind", "attention to the own position alone"),
    )
    claims = (
        Claim(
            name="oracle",
            text="Every row of the table is its mixer, to rounding, and a planted fault is seen.",
            rules=(
                Rule(measure="error", comparison="below", threshold=1e-12),
                above("fault", "error", 1e-3),
            ),
            main=True,
        ),
        Claim(
            name="equal",
            text="Normalised attention whose normaliser grows is a state-space model, and only with the tie.",
            rules=(
                Rule(measure="same", comparison="below", threshold=1e-10),
                above("untied", "same", 1e-3),
            ),
            main=True,
            paper="section 4.2",
        ),
        Claim(
            name="state",
            text="More state a channel brings linear attention nearer to softmax in recall.",
            rules=(above("linear_8", "linear_4"), above("linear_16", "linear_8")),
            needs=(above("softmax", "blind", 0.3), above("softmax", "linear_4", 0.05)),
            main=True,
            paper="recall of linear attention rises with n",
        ),
        Claim(
            name="normaliser",
            text="A normaliser of its own recalls better than linear attention's, at the same n.",
            rules=(above("normalised_16", "linear_16"),),
            needs=(above("softmax", "blind", 0.3),),
            paper="normalised attention, exponential, beats linear attention",
        ),
    )
    full, quick = (
        Size(),
        Size(draws=3, lengths=(9,), seeds=1, steps=6, pairs=4, length=20, symbols=16, rates=1),
    )

    def steps(self) -> Iterable[Step]:
        for draw in range(self.size.draws):
            yield Step(f"systems, draw {draw}", self.systems, cost=0.1)
        for seed in range(self.size.seeds):
            for name in MIXERS:
                yield Step(f"recall, {name}, seed {seed}", partial(self.recall, name, seed))

    def systems(self) -> dict[str, Any]:
        """Measure every row, every fault, and the two models with and without the tie."""
        import torch

        from regard.attention.dsf.faults import FAULTS, error_of, with_fault
        from regard.attention.dsf.formulas import ROWS, draw

        generator = torch.Generator().manual_seed(torch.initial_seed())
        errors = {name: max(error_of(draw(name, n, generator)) for n in self.size.lengths) for name in ROWS}
        faults = {
            name: min(error_of(with_fault(name, n, generator)) for n in self.size.lengths) for name in FAULTS
        }
        return {"errors": errors, "faults": faults, **tied(generator)}

    def recall(self, name: str, seed: int) -> dict[str, list[float]]:
        """Train a model with one mixer at each learning rate; return its accuracies.

        They are on sequences to choose the rate by, and on others that count. All mixers see the same data.
        """
        rates = RATES[: self.size.rates]
        with one_thread():
            runs = [self._train(name, rate, seed, i / len(rates)) for i, rate in enumerate(rates)]
        return {which: [run[which] for run in runs] for which in ("choose", "count")}

    def _train(self, name: str, rate: float, seed: int, done: float) -> dict[str, float]:
        import torch
        from torch.nn.functional import cross_entropy

        from regard.models.tiny import TinyModel
        from regard.tasks.recall import IGNORE, Recall

        size = self.size
        task = Recall(pairs=size.pairs, length=size.length, symbols=size.symbols)
        torch.manual_seed(1000 * self.seed + seed)
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        model = TinyModel(size.symbols, DIM, [mixer(name) for _ in range(LAYERS)])
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.1)
        plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, size.steps, pct_start=0.1)
        for step in range(size.steps):
            tokens, targets = task.batch(BATCH, generator)
            loss = cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            plan.step()
            self.tick(done + (step + 1) / size.steps / size.rates)
        with torch.no_grad():
            others = (task.batch(256, generator) for _ in range(2))
            choose, count = (task.accuracy(model(tokens), targets) for tokens, targets in others)
        return {"choose": choose, "count": count}

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        systems, runs = sorted_out(results)
        return {
            "error": [max(told["errors"].values()) for told in systems],
            "fault": [min(told["faults"].values()) for told in systems],
            "same": [told["same"] for told in systems],
            "untied": [told["untied"] for told in systems],
            **{name: [told["count"][best(runs[name])] for told in runs[name]] for name in MIXERS},
        }

    def details(self, results: Results) -> dict[str, Any]:
        systems, runs = sorted_out(results)
        rows = {name: max(told["errors"][name] for told in systems) for name in systems[0]["errors"]}
        faults = {name: min(told["faults"][name] for told in systems) for name in systems[0]["faults"]}
        chance = 1 / (self.size.symbols - 1 - (self.size.symbols - 1) // 2)
        rates = {name: RATES[best(runs[name])] for name in MIXERS}
        told = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        return {
            "rows": rows, "faults": faults, "chance": chance, "runs": runs,
            "remarks": [f"A guess is right in {chance:.1%}.", f"Learning rates chosen: {told}."],
        }  # fmt: skip

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.dynamical_systems_framework_picture import draw

        draw(outcome, figure)


def tied(generator: Any) -> dict[str, float]:
    """Return how far a normalised attention is from the SSD model made from it, and from an untied one."""
    import torch

    from regard.attention.dsf.rows import normalized_attention
    from regard.attention.dsf.ssm import ssd, ssd_of_normalized

    q, k = torch.randn(2, 33, 4, generator=generator, dtype=torch.float64)
    eta = torch.randn(33, generator=generator, dtype=torch.float64).exp().cumsum(0)
    delta, a, b, c = ssd_of_normalized(q, k, eta)
    phi = normalized_attention(q, k, eta, 3).phi()
    same, untied = ssd(delta, a, b, c, 3).phi(), ssd(delta, 1.1 * a, b, c, 3).phi()
    return {"same": float((phi - same).abs().max()), "untied": float((phi - untied).abs().max())}


def mixer(name: str) -> nn.Module:
    """Return the mixer of one layer, with fresh weights."""
    from regard.attention import LinearAttention, NormalizedAttention, SlidingWindow, Softmax
    from regard.models.tiny import Heads

    n = MIXERS[name]
    if name.startswith("normalised"):
        layer: nn.Module = NormalizedAttention(dim=DIM, heads=HEADS, key_width=n).build()
        return layer
    specs = {"softmax": Softmax(), "blind": SlidingWindow(1)}
    return Heads(DIM, HEADS, n, specs.get(name, LinearAttention()).build())


def sorted_out(results: Results) -> tuple[list[Any], dict[str, list[Any]]]:
    """Return the results of the draws, and of the runs by mixer."""
    systems = [told for name, told in results.items() if name.startswith("systems")]
    runs = {m: [told for name, told in results.items() if name.startswith(f"recall, {m}, ")] for m in MIXERS}
    return systems, runs


def best(runs: Sequence[Mapping[str, Sequence[float]]]) -> int:
    """Return which learning rate has the highest mean accuracy on the sequences to choose by."""
    means = [sum(values) for values in zip(*(told["choose"] for told in runs), strict=True)]
    return means.index(max(means))
