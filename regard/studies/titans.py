"""Titans: Learning to Memorize at Test Time (Behrouz et al., 2024, arXiv 2501.00663).

Four parts. The fast paths must be the sequential definition, and a memory of other chunks must not. Untrained
memories of one matrix are written with random keys, and asked: gradient descent against the sum that linear
attention keeps, rescaled as well as it can be; newest and all pairs; keys that are written twice; larger
chunks. And trained: two layers of width 64 recall pairs that left the attention window four times over, with
the memory as gate and as context, against the same layers whose memory answers nothing.
Status: the rules and sizes are our choice; the paper trains 170M parameters and more.
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
    from torch import Tensor

    from regard.studies.outcome import Outcome

WIDTH, STEP = 32, 0.5
CHUNKS = (1, 4, 8, 16)
DIM, HEADS, LAYERS, BATCH = 64, 4, 2, 32
WAYS = {"mag": "gate", "mac": "context"}
MODELS = ("mag", "mac", "mag_blind", "mac_blind")


@dataclass(frozen=True)
class Size:
    """How many draws, seeds and steps of training; the task that is trained."""

    draws: int = 20
    seeds: int = 3
    steps: int = 400
    rate: float = 5e-3
    pairs: int = 3
    symbols: int = 10
    window: int = 4
    asked: int = 512


def off(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=f"relative squared error of {about}", over="draws", low=0)


def share(name: str, about: str, over: str = "seeds") -> Quantity:
    return Quantity(name=name, about=about, over=over, low=0, high=1, unit="%")


def above(measure: str, control: str, threshold: float = 0.0) -> Rule:
    return Rule(measure=measure, comparison="above", threshold=threshold, control=control, paired=True)


@study("titans")
class Titans(Study):
    """Does a memory that learns while it reads keep what attention forgets, and what do chunks cost?"""

    title = "Titans: Learning to Memorize at Test Time"
    paper = "Behrouz et al. 2024, arXiv 2501.00663"
    quantities = (
        off("exact", "chunks, pieces and the closed form against the sequential definition"),
        off("other", "the same against a memory of other chunks"),
        off("new", "the newest 4 of 64 pairs, gradient memory"),
        off("new_sum", "the newest 4 of 64 pairs, linear attention"),
        off("all", "all 64 pairs, gradient memory"),
        off("all_sum", "all 64 pairs, linear attention"),
        off("few_new", "the newest 4 of 16 pairs, gradient memory"),
        off("few_new_sum", "the newest 4 of 16 pairs, linear attention"),
        off("few_all", "all 16 pairs, gradient memory"),
        off("few_all_sum", "all 16 pairs, linear attention"),
        *(off(f"new_{b}", f"the newest 4 of 64 pairs, in chunks of {b}") for b in CHUNKS[1:]),
        share("latest", "keys written twice that answer with the later value, gradient memory", "draws"),
        share("latest_sum", "the same, linear attention", "draws"),
        share("mag", "recall at 4 windows, memory as gate"),
        share("mac", "recall at 4 windows, memory as context"),
        share("mag_blind", "the same layers trained with a memory that answers nothing, gate"),
        share("mac_blind", "the same layers trained with a memory that answers nothing, context"),
        share("mag_silenced", "the trained gate model, its memory silenced when asked"),
        share("mac_silenced", "the trained context model, its memory silenced when asked"),
    )
    claims = (
        Claim(
            name="exact",
            text="Chunks, pieces and the closed form are the sequential definition; other chunks are not.",
            rules=(
                Rule(measure="exact", comparison="below", threshold=1e-10),
                above("other", "exact", 1e-3),
            ),
            main=True,
        ),
        Claim(
            name="newest",
            text="Gradient descent keeps the newest pairs far better than the sum of linear attention.",
            rules=(above("new_sum", "new", 0.2), above("few_new_sum", "few_new", 0.1)),
            main=True,
        ),
        Claim(
            name="price",
            text="It pays with the older ones: over all 64 pairs it is worse than the sum.",
            rules=(above("all", "all_sum"),),
        ),
        Claim(
            name="rewritten",
            text="A key that is written again answers with its later value; in linear attention it does not.",
            rules=(above("latest", "latest_sum", 0.3),),
            main=True,
        ),
        Claim(
            name="chunks",
            text="Larger chunks, with gradients at their start, keep the newest pairs worse.",
            rules=(above("new_4", "new"), above("new_8", "new_4"), above("new_16", "new_8")),
            main=True,
            paper="chunks are offered as a way to train in parallel",
        ),
        *(
            Claim(
                name=name,
                text=f"With a memory as {word}, small models recall what left their window four times over.",
                rules=(above(name, f"{name}_blind", 0.2),),
                needs=(Rule(measure=f"{name}_blind", comparison="below", threshold=0.15),),
                main=name == "mag",
                paper="needle in 16K tokens: 96 % and more",
            )
            for name, word in WAYS.items()
        ),
        *(
            Claim(
                name=f"{name}_silenced",
                text=f"What they recall comes from the memory as {word}: silenced, they lose it.",
                rules=(above(name, f"{name}_silenced", 0.2),),
                needs=(above(name, f"{name}_blind", 0.2),),
            )
            for name, word in WAYS.items()
        ),
    )
    full, quick = Size(), Size(draws=6, seeds=1, steps=2, asked=16)

    def steps(self) -> Iterable[Step]:
        for draw in range(self.size.draws):
            yield Step(f"memories, draw {draw}", untrained, cost=0.01)
        for seed in range(self.size.seeds):
            for name in MODELS:
                yield Step(f"recall, {name}, seed {seed}", partial(self.recall, name, seed))

    def recall(self, name: str, seed: int) -> dict[str, float]:
        """Train a model; return the accuracy on new sequences, as it is and with its memory silenced."""
        import torch
        from torch.nn.functional import cross_entropy

        from regard.models.decoder import Decoder
        from regard.studies.titans_parts import silenced, spec

        size = self.size
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        torch.manual_seed(1000 * self.seed + seed)
        model = Decoder(
            2 * size.symbols + 1, dim=DIM, layers=LAYERS, heads=HEADS,
            mechanism=spec(name[:3], DIM, HEADS, size.window),
        )  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), size.rate, weight_decay=0.1)
        plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, size.rate, size.steps, pct_start=0.1)
        blind = name.endswith("blind")
        with one_thread(), silenced(model, blind):
            for step in range(size.steps):
                tokens, answers = self.batch(BATCH, generator)
                logits = model(tokens)[:, -2 * size.pairs :: 2]
                loss = cross_entropy(logits.flatten(0, 1), answers.flatten())
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                plan.step()
                self.tick((step + 1) / size.steps)
        tokens, answers = self.batch(size.asked, generator)
        found = {}
        for label, quiet in (("accuracy", blind), ("silenced", True)):
            with torch.no_grad(), one_thread(), silenced(model, quiet):
                chosen = model(tokens)[:, -2 * size.pairs :: 2].argmax(-1)
            found[label] = float((chosen == answers).float().mean())
        return found

    def batch(self, count: int, generator: Any) -> tuple[Tensor, Tensor]:
        """Return sequences of pairs, fillers for four windows, and the keys asked in another order.

        Returns:
            tokens [count, 4 pairs + 4 windows], and the value of each key asked, [count, pairs].
        """
        import torch

        size = self.size
        keys = 1 + torch.rand(count, size.symbols, generator=generator).argsort(1)[:, : size.pairs]
        values = torch.randint(1 + size.symbols, 1 + 2 * size.symbols, keys.shape, generator=generator)
        order = torch.rand(keys.shape, generator=generator).argsort(1)
        asked, answers = keys.gather(1, order), values.gather(1, order)
        shown, questions = (torch.stack(x, -1).flatten(1) for x in ((keys, values), (asked, answers)))
        filler = torch.zeros(count, 4 * size.window, dtype=torch.int64)
        return torch.cat([shown, filler, questions], 1), answers

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        draws = [told for name, told in results.items() if name.startswith("memories")]
        runs = {m: [results[f"recall, {m}, seed {s}"] for s in range(self.size.seeds)] for m in MODELS}
        return {
            **{name: [told[name] for told in draws] for name in draws[0]},
            **{name: [run["accuracy"] for run in told] for name, told in runs.items()},
            **{f"{name}_silenced": [run["silenced"] for run in runs[name]] for name in ("mag", "mac")},
        }

    def details(self, results: Results) -> dict[str, Any]:
        chance = 1 / self.size.symbols
        seen = 1 / self.size.pairs
        remarks = [f"A guess is right in {chance:.0%}, among the {self.size.pairs} shown in {seen:.0%}."]
        return {"chance": chance, "among_shown": seen, "chunks": list(CHUNKS), "remarks": remarks}

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.titans_picture import draw

        draw(outcome, figure)


def untrained() -> dict[str, float]:
    """Write random pairs into memories of one matrix, and ask for them."""
    import torch

    from regard.studies.titans_parts import answers, exactness, latest, random_keys

    torch.set_grad_enabled(False)
    try:
        k = random_keys(64, WIDTH)
        v = torch.randn(64, WIDTH, dtype=torch.float64)
        found = exactness()
        for pairs, name in ((64, ""), (16, "few_")):
            keys, values = k[:pairs], v[:pairs]
            for rule, told in answers(keys, values, STEP).items():
                found[f"{name}new{rule}"] = relative(told[-4:], values[-4:], "sum" in rule)
                found[f"{name}all{rule}"] = relative(told, values, "sum" in rule)
        for chunk in CHUNKS[1:]:
            found[f"new_{chunk}"] = relative(answers(k, v, STEP, chunk)[""][-4:], v[-4:])
        return {**found, **latest(k[:16], v[:16], v[16:32], STEP)}
    finally:
        torch.set_grad_enabled(True)


def relative(found: Tensor, expected: Tensor, rescaled: bool = False) -> float:
    """Return |found - expected|^2 / |expected|^2, with the best factor on what was found where `rescaled`."""
    if rescaled:
        found = found * ((found * expected).sum() / (found * found).sum())
    return float((found - expected).square().sum() / expected.square().sum())
