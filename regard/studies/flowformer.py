"""Flowformer: Linearizing Transformers with Conservation Flows (Wu et al., 2022, arXiv 2202.06258).

Does competition among sources keep linear attention from a trivial average? A classifier of two layers has to
find one marker among 256 tokens, decoys of the same colours included (`regard.tasks.markers`), pools over all
positions and knows none. How many steps it needs until its training loss, a mean over 20 steps, is below 0.5
is counted, up to the last step. Flow-Attention is set beside itself without competition, without allocation
and with the clamp of the official core file, and beside linear attention. All see the same sequences. And a
place where it may not help: causal recall with heads of width 4.
Status: tasks, sizes and rules are our choice; the paper trains on long-range arena and others for hours.
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
    from torch import Tensor, nn

    from regard.attention.registry import Spec
    from regard.studies.outcome import Outcome

DIM, HEADS, LAYERS, BATCH, RATE = 32, 4, 2, 32, 3e-3
LEARNT, OVER, ENOUGH = 0.5, 20, 0.25
NEEDLE = ("flow", "no_competition", "no_allocation", "clamped", "linear")
RECALL = ("flow", "linear", "softmax")
RECALL_HEADS, RECALL_WIDTH, RECALL_RATE = 8, 4, 1e-2
PIECE = 20


@dataclass(frozen=True)
class Size:
    """How many draws and seeds; steps and length of the needle task, steps and pairs of recall."""

    draws: int = 3
    seeds: int = 3
    steps: int = 600
    length: int = 256
    recall_steps: int = 400
    pairs: int = 8


def steps_needed(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=f"steps until the loss is below {LEARNT}, {about}", low=1, high=600)


def accuracy(name: str, about: str) -> Quantity:
    return Quantity(
        name=name, about=f"recall accuracy with heads of width 4, {about}", low=0, high=1, unit="%"
    )


def difference(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=about, over="draws", low=0)


def rule(comparison: str, measure: str, control: str, threshold: float = 0.0, **options: Any) -> Rule:
    return Rule(
        measure=measure, comparison=comparison, threshold=threshold, control=control, paired=True, **options
    )


above, below = partial(rule, "above"), partial(rule, "below")
LEARNS = Rule(measure="flow", comparison="below", threshold=550)


@study("flowformer")
class Flowformer(Study):
    """Whether competition keeps linear attention from averaging, and what the official clamp does to it."""

    title = "Flowformer: Linearizing Transformers with Conservation Flows"
    paper = "Wu et al. 2022, arXiv 2202.06258"
    quantities = (
        difference("error", "largest difference of chunks and of single steps from the definition"),
        difference("unlike", "the same, of Flow-Attention without competition"),
        difference("leak", "how much later positions move earlier outputs, causally"),
        difference("leak_full", "the same where all see all"),
        difference("unconserved", "how far the mean flow out of a source is from 1, conserved"),
        difference("raw", "the same before conservation, flow out over its mean, the largest"),
        steps_needed("flow", "Flow-Attention"),
        steps_needed("no_competition", "without competition"),
        steps_needed("no_allocation", "without allocation"),
        steps_needed("clamped", "clamped to 1 as in the official core file"),
        steps_needed("linear", "linear attention, elu + 1"),
        accuracy("recall_flow", "Flow-Attention"),
        accuracy("recall_linear", "linear attention"),
        accuracy("recall_softmax", "softmax attention"),
    )
    claims = (
        Claim(
            name="needle",
            text="Flow-Attention singles out a token sooner than linear attention, and competition is why.",
            rules=(below("flow", "linear"), below("flow", "no_competition")),
            needs=(LEARNS,),
            main=True,
            paper="competition avoids a trivial attention",
        ),
        Claim(
            name="exact",
            text="Chunks and single steps are the definition, and nothing leaks from later positions.",
            rules=(
                below("error", "unlike", factor=1e-6),
                below("leak", "leak_full", factor=1e-9),
                below("unconserved", "raw", factor=0.01),
            ),
            main=True,
        ),
        Claim(
            name="clamp",
            text="Clamped to 1, as in the official core file, it needs longer.",
            rules=(above("clamped", "flow"),),
            needs=(LEARNS,),
        ),
        Claim(
            name="allocation",
            text="Without allocation it needs longer.",
            rules=(above("no_allocation", "flow"),),
            needs=(LEARNS,),
            paper="part of the mechanism",
        ),
        Claim(
            name="recall",
            text="With heads of width 4 it recalls better than linear attention.",
            rules=(above("recall_flow", "recall_linear"),),
            needs=(Rule(measure="recall_softmax", comparison="above", threshold=0.3),),
        ),
    )
    full = Size()
    quick = Size(draws=3, seeds=1, steps=4, length=32, recall_steps=4, pairs=2)

    def steps(self) -> Iterable[Step]:
        for draw in range(self.size.draws):
            yield Step(f"exact, draw {draw}", exactness, cost=0.1)
        for seed in range(self.size.seeds):
            for name in NEEDLE:
                yield Step(f"needle, {name}, seed {seed}", partial(self.needle, name, seed))
            for name in RECALL:
                yield Step(f"recall, {name}, seed {seed}", partial(self.recall, name, seed))

    def needle(self, name: str, seed: int) -> dict[str, Any]:
        """Train a classifier; return its losses, a mean over each piece of 20 steps, and the steps needed."""
        import torch
        from torch.nn.functional import cross_entropy

        from regard.attention import MultiHeadAttention
        from regard.models.pooled import PooledModel
        from regard.tasks.markers import Markers

        task, size = Markers(length=self.size.length), self.size
        torch.manual_seed(1000 * self.seed + seed)
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        mixers = (
            MultiHeadAttention(DIM, HEADS, mechanism=specs()[name], causal=False, bias=True)
            for _ in range(LAYERS)
        )
        model = PooledModel(task.symbols, task.colours, DIM, mixers)

        def loss() -> Tensor:
            tokens, labels = task.batch(BATCH, generator)
            return cross_entropy(model(tokens), labels)

        losses = self._train(model, loss, size.steps, RATE, stop=ENOUGH)
        return {"needed": first_below(losses, LEARNT), "losses": pieces(losses)}

    def recall(self, name: str, seed: int) -> dict[str, float]:
        """Train a causal model to recall with very narrow heads; return its accuracy on new sequences."""
        import torch
        from torch.nn.functional import cross_entropy

        from regard.models.tiny import Heads, TinyModel
        from regard.tasks.recall import IGNORE, Recall

        pairs = self.size.pairs
        task = Recall(pairs=pairs, length=4 * pairs, symbols=8 * pairs)
        torch.manual_seed(1000 * self.seed + seed)
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        mixers = [
            Heads(DIM, RECALL_HEADS, RECALL_WIDTH, specs()[name].build()) for _ in range(LAYERS)
        ]  # fmt: skip
        model = TinyModel(task.symbols, DIM, mixers)

        def loss() -> Tensor:
            tokens, targets = task.batch(BATCH, generator)
            return cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

        self._train(model, loss, self.size.recall_steps, RECALL_RATE, decay=True)
        with torch.no_grad():
            tokens, targets = task.batch(256, generator)
            return {"accuracy": task.accuracy(model(tokens), targets)}

    def _train(
        self, model: nn.Module, loss_of: Any, steps: int, rate: float, *, decay: bool = False, stop: float = 0
    ) -> list[float]:
        """Train until the mean loss of 20 steps is below `stop`, and return the loss of every step."""
        import torch

        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
        plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1) if decay else None
        losses: list[float] = []
        with one_thread():
            for step in range(steps):
                loss = loss_of()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                if plan is not None:
                    plan.step()
                losses.append(float(loss.detach()))
                self.tick((step + 1) / steps)
                if len(losses) >= OVER and sum(losses[-OVER:]) / OVER < stop:
                    break
        return losses

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        draws = [told for name, told in results.items() if name.startswith("exact")]
        measures = ("error", "unlike", "leak", "leak_full", "unconserved", "raw")
        return {
            **{name: [told[name] for told in draws] for name in measures},
            **{name: [float(told["needed"]) for told in runs(results, "needle", name)] for name in NEEDLE},
            **{
                f"recall_{name}": [told["accuracy"] for told in runs(results, "recall", name)]
                for name in RECALL
            },
        }

    def details(self, results: Results) -> dict[str, Any]:
        curves = {name: [told["losses"] for told in runs(results, "needle", name)] for name in NEEDLE}
        never = {
            name: sum(told["needed"] == self.size.steps for told in runs(results, "needle", name))
            for name in NEEDLE
        }
        told = ", ".join(f"{name} {count}" for name, count in never.items() if count) or "none"
        chance = 1 / (8 * self.size.pairs - 1 - (8 * self.size.pairs - 1) // 2)
        return {
            "curves": curves,
            "chance": chance,
            "remarks": [
                f"Runs not below {LEARNT} at the last step, which count as {self.size.steps}: {told}.",
                f"A guess recalls {chance:.1%}.",
            ],
        }

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.flowformer_picture import draw

        draw(outcome, figure)


def specs() -> dict[str, Spec]:
    """What is compared, by name."""
    from regard.attention import FlowAttention, LinearAttention, Softmax

    return {
        "flow": FlowAttention(),
        "no_competition": FlowAttention(competition=False),
        "no_allocation": FlowAttention(allocation=False),
        "clamped": FlowAttention.preset("core"),
        "linear": LinearAttention(),
        "softmax": Softmax(),
    }


def exactness() -> dict[str, float]:
    """Measure on random inputs what holds exactly, each with something that does not."""
    import torch

    from regard.attention import Context, FlowAttention
    from regard.attention.flow import flow_attention

    q, k, v = torch.randn(3, 1, 2, 100, 8, dtype=torch.float64)
    naive = flow_attention(q, k, v, causal=True, method="naive")
    ways = [flow_attention(q, k, v, causal=True, method=way) for way in ("chunk", "recurrent")]
    without = FlowAttention(competition=False).build()(q, k, v)
    changed = [torch.cat([x[:, :, :60], x[:, :, 60:] + 1], 2) for x in (q, k, v)]
    leaks = [
        flow_attention(*changed, causal=causal)[:, :, :60] - flow_attention(q, k, v, causal=causal)[:, :, :60]
        for causal in (True, False)
    ]
    heads = FlowAttention().build()
    features, keys = heads._pair(q, k, Context.of(q, k, causal=False))
    incoming = heads._flow(features, keys.sum(2))
    leaving = heads._flow(keys, (features / incoming[..., None]).sum(2))
    outgoing = heads._flow(keys, features.sum(2))
    return {
        "error": max(float((way - naive).abs().max()) for way in ways),
        "unlike": float((without - naive).abs().max()),
        "leak": float(leaks[0].abs().max()),
        "leak_full": float(leaks[1].abs().max()),
        "unconserved": float((leaving.mean(-1) - 1).abs().max()),
        "raw": float((outgoing / outgoing.mean(-1, keepdim=True) - 1).abs().max()),
    }


def first_below(losses: Sequence[float], bound: float) -> int:
    """Return after how many steps the mean loss of the last 20 is below a bound; all steps where never."""
    for step in range(OVER, len(losses) + 1):
        if sum(losses[step - OVER : step]) / OVER < bound:
            return step
    return len(losses)


def pieces(losses: Sequence[float]) -> list[float]:
    """Return the mean loss of each whole piece of 20 steps, or of all where there are fewer."""
    cut = [losses[i : i + PIECE] for i in range(0, len(losses) - PIECE + 1, PIECE)] or [losses]
    return [round(sum(piece) / len(piece), 4) for piece in cut]


def runs(results: Results, task: str, name: str) -> list[Any]:
    return [told for step, told in results.items() if step.startswith(f"{task}, {name}, ")]
