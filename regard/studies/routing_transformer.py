"""Efficient Content-Based Sparse Attention with Routing Transformers (Roy et al., 2020, arXiv 2003.05997).

Four parts. One cluster of all tokens must be dense attention, and outputs must not move with later tokens,
which they do by the published selection. Tokens around planted directions: the mass of dense attention that
learned centroids keep, beside random centroids and random keys. Recall, trained: one head finds the token of
the same key among 256, where it may read 24 of a cluster; beside dense attention, a window, random clusters
and centroids that do not learn. And language: small models on two packaged novels, half of the heads routed
or all near by.
Status: the rules and sizes are our choice; the paper trains models of a hundred times the size on TPUs.
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

ARMS = ("dense", "window", "random", "fixed", "routing", "causal_fixed", "causal")
TEXTS = ("full", "local", "random", "routing")
ABOUT = {
    "dense": "dense attention", "window": "the last 24 tokens", "random": "clusters by chance",
    "fixed": "centroids that stay at noise", "routing": "k-means",
    "causal_fixed": "last 24 of the two nearest clusters, centroids at noise",
    "causal": "last 24 of the two nearest clusters, k-means",
}  # fmt: skip
TEXT_ABOUT = {
    "full": "all heads see all", "local": "all heads see near blocks", "random": "half routed by chance",
    "routing": "half routed by k-means",
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How many draws, seeds and steps of training; pairs of recall, tokens of a text."""

    draws: int = 10
    seeds: int = 3
    steps: int = 250
    batch: int = 8
    pairs: int = 128
    asked: int = 32
    text_steps: int = 100
    text_length: int = 256
    windows: int = 16


def off(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=about, over="draws", low=0)


def share(name: str, about: str, over: str = "seeds") -> Quantity:
    return Quantity(name=name, about=about, over=over, low=0, high=1, unit="%")


def above(measure: str, control: str, threshold: float = 0.0) -> Rule:
    return Rule(measure=measure, comparison="above", threshold=threshold, control=control, paired=True)


def below(measure: str, control: str, threshold: float = 0.0) -> Rule:
    return Rule(measure=measure, comparison="below", threshold=threshold, control=control, paired=True)


@study("routing-transformer")
class RoutingTransformer(Study):
    """Does k-means find the tokens to attend to, and does a model learn with it what its windows miss?"""

    title = "Efficient Content-Based Sparse Attention with Routing Transformers"
    paper = "Roy et al. 2020, arXiv 2003.05997"
    quantities = (
        off("exact", "relative error of one cluster of all against dense attention"),
        off("inexact", "the same of two clusters of half of them"),
        off("leak_topw", "relative change of earlier outputs with later tokens, published selection"),
        off("leak_causal", "the same, causal selection"),
        share("mass_learned", "dense attention kept by centroids of k-means", "draws"),
        share("mass_fixed", "dense attention kept by random centroids", "draws"),
        share("mass_random", "dense attention kept by as many random keys", "draws"),
        off("seen_learned", "keys a query sees, of 512, by centroids of k-means"),
        off("seen_fixed", "keys a query sees, of 512, by random centroids"),
        *(share(arm, f"recall by {about}") for arm, about in ABOUT.items()),
        share("held", "tokens in some cluster, k-means, after training"),
        *(
            Quantity(name=f"text_{name}", about=f"held-out loss in nats, {about}", low=0)
            for name, about in TEXT_ABOUT.items()
        ),
    )
    claims = (
        Claim(
            name="exact",
            text="One cluster of all tokens is dense attention of normalised queries and keys.",
            rules=(
                Rule(measure="exact", comparison="below", threshold=1e-9),
                above("inexact", "exact", 1e-3),
            ),
        ),
        Claim(
            name="order",
            text="By the published selection later tokens move earlier outputs; by the causal one none does.",
            rules=(
                Rule(measure="leak_causal", comparison="below", threshold=1e-9),
                above("leak_topw", "leak_causal", 0.01),
            ),
        ),
        Claim(
            name="planted",
            text="Of planted clusters k-means keeps 9/10 of dense attention, random centroids far less.",
            rules=(
                Rule(measure="mass_learned", comparison="above", threshold=0.9),
                above("mass_learned", "mass_fixed", 0.3),
                above("mass_learned", "mass_random", 0.6),
            ),
            main=True,
        ),
        Claim(
            name="recall",
            text="A head of balanced clusters learns to recall; k-means better than centroids that stay.",
            rules=(above("routing", "random", 0.3), above("routing", "fixed")),
            needs=(Rule(measure="dense", comparison="above", threshold=0.9),),
            main=True,
            paper="content-based sparsity against fixed patterns",
        ),
        Claim(
            name="local",
            text="A window of as many tokens does not.",
            rules=(above("routing", "window", 0.3),),
            needs=(Rule(measure="dense", comparison="above", threshold=0.9),),
        ),
        Claim(
            name="causal",
            text="With the causal selection k-means is better than centroids that stay, too.",
            rules=(above("causal", "causal_fixed"),),
            needs=(Rule(measure="dense", comparison="above", threshold=0.9),),
        ),
        Claim(
            name="text",
            text="Language models with half of the heads routed predict better than with near blocks alone.",
            rules=(below("text_routing", "text_local"),),
            main=True,
            paper="Wikitext-103: perplexity 15.8, local attention 19.8 with as many layers",
        ),
        Claim(
            name="text_control",
            text="And better than with the same heads routed by chance.",
            rules=(below("text_routing", "text_random"),),
        ),
    )
    full = Size()
    quick = Size(
        draws=3, seeds=1, steps=2, batch=2, pairs=16, asked=2, text_steps=2, text_length=32, windows=2
    )

    def steps(self) -> Iterable[Step]:
        from regard.studies.routing_transformer_parts import leak, planted

        for draw in range(self.size.draws):
            yield Step(f"planted, draw {draw}", planted, cost=0.02)
            yield Step(f"order, draw {draw}", leak, cost=0.01)
        for seed in range(self.size.seeds):
            for arm in ARMS:
                yield Step(f"recall, {arm}, seed {seed}", partial(self.recall, arm, seed))
            for name in TEXTS:
                yield Step(f"text, {name}, seed {seed}", partial(self.text, name, seed))

    def recall(self, arm: str, seed: int) -> dict[str, float]:
        """Train one head; return its accuracy on new sequences, and the share of tokens in a cluster."""
        import torch
        from torch.nn.functional import cross_entropy

        from regard.studies.routing_transformer_parts import recall_batch, recall_model

        size = self.size
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        torch.manual_seed(1000 * self.seed + seed + 7)
        model = recall_model(arm)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        with one_thread():
            for step in range(size.steps):
                keys, values, answers = recall_batch(size.batch, size.pairs, generator)
                logits = model(keys, values)[:, size.pairs :]
                loss = cross_entropy(logits.flatten(0, 1), answers.flatten())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                self.tick((step + 1) / size.steps)
            model.eval()
            with torch.no_grad():
                keys, values, answers = recall_batch(size.asked, size.pairs, generator)
                found = model(keys, values)[:, size.pairs :].argmax(-1)
                return {"accuracy": float((found == answers).float().mean()), **held(model, keys, values)}

    def text(self, name: str, seed: int) -> float:
        """Train a language model on two novels; return its loss on the part held out, in nats a token."""
        import torch

        from regard.objectives import train
        from regard.studies.routing_transformer_parts import language_model
        from regard.tasks.corpus import packaged

        size = self.size
        torch.manual_seed(1000 * self.seed + seed)
        with one_thread():
            log = train(
                language_model(name), packaged(512), steps=size.text_steps, batch=8, length=size.text_length,
                seed=1000 * self.seed + seed, windows=size.windows, evaluate_every=size.text_steps,
                tick=self.tick,
            )  # fmt: skip
        return log.held_out[-1][1]

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        draws = range(self.size.draws)
        told = [{**results[f"planted, draw {n}"], **results[f"order, draw {n}"]} for n in draws]
        seeds = range(self.size.seeds)
        runs = {arm: [results[f"recall, {arm}, seed {s}"] for s in seeds] for arm in ARMS}
        return {
            **{name: [draw[name] for draw in told] for name in told[0]},
            **{arm: [run["accuracy"] for run in found] for arm, found in runs.items()},
            "held": [run["held"] for run in runs["routing"]],
            **{f"text_{name}": [results[f"text, {name}, seed {s}"] for s in seeds] for name in TEXTS},
        }

    def details(self, results: Results) -> dict[str, Any]:
        keys = {
            arm: sum(results[f"recall, {arm}, seed {s}"]["keys"] for s in range(self.size.seeds))
            / self.size.seeds
            for arm in ARMS
        }
        told = ", ".join(f"{n:.0f} ({ABOUT[arm]})" for arm, n in keys.items())
        return {
            "chance": 1 / 16,
            "keys": keys,
            "remarks": [f"Keys that a question reads after training: {told}.", "A guess is right in 6 %."],
        }

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.routing_transformer_picture import draw

        draw(outcome, figure)


def held(model: Any, keys: Any, values: Any) -> dict[str, float]:
    """Return the share of tokens that see a key, and how many keys a question sees."""
    x = model.keys(keys) + model.values(values)
    q = (x @ model.shared)[:, None]
    seen = model.attention.looked_at(q, q)(0, q.shape[2])[:, 0]
    half = seen.shape[1] // 2
    return {"held": float(seen.any(-1).float().mean()), "keys": float(seen[:, half:].sum(-1).float().mean())}
