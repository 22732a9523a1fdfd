"""You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet (arXiv 2405.21022).

Four parts. The fast forms are held to the sum as written, with keys scaled by 1, 10 and 80, beside the fast
form without its guard. One scan: images of 8 x 8 random colours, one of them marked, every pixel to be
labelled with its colour; two layers of width 64 that differ in the mixing alone: LightNet in all directions,
one scan with a fixed decay, two such scans in opposite directions, and softmax. Positions: the label is the
colour of the pixel above, by LightNet without positions, with MD-TPE, with MD-LRPE, with both. And the decay
that LightNet's reviewers asked about, exp(z_{t-1} - z_t), for random keys and in the models trained here.
Status: the rules and sizes are our choice; the paper's own tables, on ImageNet and language, are not here.
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

DIM, HEADS, LAYERS, BATCH, RATE, GUESS = 64, 4, 2, 16, 3e-3, 1 / 8
SCANS = ("lightnet", "one_scan", "two_scans", "softmax")
POSITIONS = ("none", "tpe", "lrpe", "both")
DECAYS = (1, 10, 100, 1000)


@dataclass(frozen=True)
class Size:
    """How many draws of random inputs, seeds, and steps of training; rounds of the mixers' times."""

    draws: int = 5
    length: int = 300
    seeds: int = 3
    steps: int = 300
    rounds: int = 5
    timed: int = 4096


def difference(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=about, over="draws", low=0)


def accuracy(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=f"pixels labelled rightly, {about}", low=0, high=1, unit="%")


def share(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=about, over="draws", low=0, high=1)


def above(measure: str, control: str, threshold: float = 0.0, **options: Any) -> Rule:
    return Rule(
        measure=measure, comparison="above", threshold=threshold, control=control, paired=True, **options
    )


@study("lightnet")
class LightNetStudy(Study):
    """One scan that sees the whole image, what positions add, and how fast the decay saturates."""

    title = "You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet"
    paper = "Qin et al. 2024, arXiv 2405.21022"
    quantities = (
        difference("error", "largest error of the fast forms, keys x 1, 10 and 80, float64"),
        difference("unguarded", "the same without the guard, keys x 80 (1e6 where it is no number)"),
        difference("turned", "last causal row against that of all directions"),
        difference("reach", "gradient of the first output by the last input, LightNet in all directions"),
        difference("reach_scan", "the same in one scan with a fixed decay"),
        *(accuracy(f"{name}_before", f"before the marked one, {name}") for name in SCANS),
        *(accuracy(f"{name}_after", f"from the marked one on, {name}") for name in SCANS),
        *(accuracy(f"above_{name}", f"by the one above, positions: {name}") for name in POSITIONS),
        *(share(f"decay_{t}", f"mean decay at step {t}, normal keys") for t in DECAYS),
        Quantity(name="decay_trained", about="the same at step 63 in trained models", low=0, high=1),
    )  # fmt: skip
    claims = (
        Claim(
            name="exact",
            text="The fast forms are the sum as written, whatever the keys, and not without their guard.",
            rules=(
                Rule(measure="error", comparison="below", threshold=1e-11),
                Rule(measure="turned", comparison="below", threshold=1e-12),
                above("unguarded", "error", 1e-3),
            ),
            main=True,
        ),
        Claim(
            name="one scan",
            text="One scan of LightNet lets pixels see what comes after them; one scan with decays does not.",
            rules=(
                above("lightnet_before", "one_scan_before", 0.5),
                above("reach", "reach_scan", 1e-6),
            ),
            needs=(above("one_scan_after", "one_scan_before", 0.3),),
            main=True,
            paper="one scan covers several dimensions, where decays need one for each direction",
        ),
        Claim(
            name="two scans",
            text="One scan of LightNet labels as well as two scans with decays, within 5 points.",
            rules=(
                Rule(measure="lightnet_before", comparison="within", threshold=0.05,
                     control="two_scans_before", paired=True),
            ),
            needs=(above("two_scans_before", "one_scan_before", 0.5),),
            main=True,
            paper="on par with or ahead of models with several scans",
        ),
        Claim(
            name="MD-TPE",
            text="Without positions LightNet sees a bag of pixels; MD-TPE tells which stands above.",
            rules=(above("above_tpe", "above_none", 0.1),),
            main=True,
            paper="both encodings are used together",
        ),
        Claim(
            name="MD-LRPE",
            text="MD-LRPE alone tells something of which pixel stands above.",
            rules=(above("above_lrpe", "above_none", 0.1),),
            main=True,
            paper="both encodings are used together",
        ),
        Claim(
            name="saturation",
            text="For random keys the decay soon tends to 1: from step 1 to 1000 it rises by more than 0.3.",
            rules=(above("decay_1000", "decay_1", 0.3),),
            paper="not the paper's; its reviewers asked",
        ),
    )  # fmt: skip
    full, quick = Size(), Size(draws=3, length=150, seeds=1, steps=3, rounds=1, timed=256)

    def steps(self) -> Iterable[Step]:
        for draw in range(self.size.draws):
            yield Step(f"forms, draw {draw}", self.forms, cost=0.1)
        for seed in range(self.size.seeds):
            for name in SCANS:
                yield Step(f"marker, {name}, seed {seed}", partial(self.marker, name, seed))
            for name in POSITIONS:
                yield Step(f"above, {name}, seed {seed}", partial(self.above, name, seed))
        yield Step("times", self.times, cost=0.2)

    def forms(self) -> dict[str, Any]:
        """Measure the forms against the sum, gradients' reach and the decay of random keys."""
        import torch

        return {**errors(self.size.length), **reach(), "decay": decays(torch.randn(64, max(DECAYS) + 1, 16))}

    def marker(self, name: str, seed: int) -> dict[str, Any]:
        """Train on marked pixels; return accuracies before and after the mark, and the decays."""
        import torch

        task, model, generator = self._trained("marker", name, seed)
        with torch.no_grad():
            images, labels, parts = task.batch(256, generator)
            right = (model(images).argmax(-1) == labels).double()
            found: dict[str, Any] = {
                "before": float(right[parts == 0].mean()), "after": float(right[parts == 1].mean())
            }  # fmt: skip
            if name == "lightnet":
                found["decay"] = self._decays(model, images)
        return found

    def above(self, name: str, seed: int) -> float:
        """Train on the colour above; return the accuracy."""
        import torch

        task, model, generator = self._trained("above", name, seed)
        with torch.no_grad():
            images, labels, _ = task.batch(256, generator)
            right = (model(images).argmax(-1) == labels).double()
        return float(right[labels >= 0].mean())

    def _trained(self, kind: str, name: str, seed: int) -> Any:
        """The task, the trained model, and the generator to draw further images from."""
        import torch
        from torch.nn.functional import cross_entropy

        from regard.models.pixels import PixelModel
        from regard.tasks.pixels import Pixels

        task = Pixels(kind=kind)
        torch.manual_seed(1000 * self.seed + seed)
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        tpe = HEADS if name in ("tpe", "both") else 0
        model = PixelModel(task.symbols, task.colours, DIM, [mixer(name) for _ in range(LAYERS)], tpe)
        optimizer = torch.optim.AdamW(model.parameters(), RATE)
        plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, self.size.steps, pct_start=0.1)
        with one_thread():
            for step in range(self.size.steps):
                images, labels, _ = task.batch(BATCH, generator)
                loss = cross_entropy(model(images).flatten(0, 2), labels.flatten())
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                plan.step()
                self.tick((step + 1) / self.size.steps)
        return task, model, generator

    def _decays(self, model: Any, images: Any) -> list[float]:
        """The mean decay of a trained model at every step of its scans, both layers."""
        import torch

        seen: list[Any] = []
        hooks = [m.keys.register_forward_hook(lambda _, __, out: seen.append(out)) for m in model.mixers]
        model(images)
        for hook in hooks:
            hook.remove()
        return [round(float(x), 5) for x in decay(torch.cat(seen)).mean((0, 2))]

    def times(self) -> dict[str, float]:
        """Time the mixing alone, on one thread: LightNet, one scan, two scans; milliseconds, medians."""
        import statistics
        import time

        import torch

        from regard.attention.lightnet import lightnet_attention
        from regard.engines.scan import scan

        q, k, v = torch.randn(3, 1, HEADS, self.size.timed, DIM // HEADS).unbind()
        rates = torch.full((HEADS,), -0.1)
        cases: dict[str, Any] = {
            "lightnet": lambda: lightnet_attention(q, k, v, causal=False),
            "one scan": lambda: scan(q, k, v, rates),
            "two scans": lambda: (scan(q, k, v, rates), scan(q.flip(2), k.flip(2), v.flip(2), rates)),
        }
        found: dict[str, list[float]] = {name: [] for name in cases}
        with torch.no_grad(), one_thread():
            for _ in range(self.size.rounds + 1):
                for name, work in cases.items():
                    start = time.perf_counter()
                    work()
                    found[name].append(1e3 * (time.perf_counter() - start))
        return {name: round(statistics.median(took[1:]), 3) for name, took in found.items()}

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        forms, marks = named(results, "forms"), {n: named(results, f"marker, {n},") for n in SCANS}
        single = {name: [told[name] for told in forms] for name in ("error", "unguarded", "turned")}
        return {
            **single,
            **{name: [told[name] for told in forms] for name in ("reach", "reach_scan")},
            **{f"{name}_{part}": [told[part] for told in marks[name]] for name in SCANS
               for part in ("before", "after")},
            **{f"above_{name}": named(results, f"above, {name},") for name in POSITIONS},
            **{f"decay_{t}": [told["decay"][str(t)] for told in forms] for t in DECAYS},
            "decay_trained": [told["decay"][-1] for told in marks["lightnet"]],
        }  # fmt: skip

    def details(self, results: Results) -> dict[str, Any]:
        times = results["times"]
        told = ", ".join(f"{name} {took:g} ms" for name, took in times.items())
        return {
            "decays": [told["decay"] for told in named(results, "marker, lightnet,")],
            "times": times,
            "remarks": [
                f"A guess is right in {GUESS:.1%}.",
                f"Mixing {self.size.timed} positions, {HEADS} heads of {DIM // HEADS}, one thread: {told}.",
            ],
        }

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.lightnet_picture import draw

        draw(outcome, figure)


def mixer(name: str) -> nn.Module:
    """Return the mixer of one layer, with fresh weights."""
    from regard.attention import LightNetGrid
    from regard.models.pixels import DecayLayer, SoftmaxLayer

    if name in ("one_scan", "two_scans"):
        return DecayLayer(DIM, HEADS, both=name == "two_scans")
    if name == "softmax":
        return SoftmaxLayer(DIM, HEADS)
    layer: nn.Module = LightNetGrid(
        dim=DIM, heads=HEADS, gate_rank=DIM, lrpe=name in ("lrpe", "both")
    ).build()
    return layer


def errors(length: int) -> dict[str, float]:
    """Return the largest errors of the fast forms, without the guard, and of the last row."""
    import torch

    from regard.attention.lightnet import additive, lightnet_attention

    q, k, v = torch.randn(3, 1, 2, length, 8, dtype=torch.float64).unbind()
    error = 0.0
    for keys in (1, 10, 80):
        exact, _ = lightnet_attention(q, keys * k, v, causal=True, method="naive")
        for method in ("chunk", "safe", "recurrent"):
            found, _ = lightnet_attention(q, keys * k, v, causal=True, method=method)
            error = max(error, float((found - exact).abs().max()))
    single = additive.piece_of(q.float(), 80 * k.float(), v.float(), None)
    state = additive.empty(single.q, single.k, single.v, angles=False)
    top = single.k.amax(2)
    out, _ = additive.factorised(single, state, top)
    unguarded = float((out - exact).abs().max().nan_to_num(1e6, 1e6, 1e6).clamp(max=1e6))
    whole, _ = lightnet_attention(q, 80 * k, v, causal=False)
    return {"error": error, "unguarded": unguarded, "turned": float((whole - exact)[:, :, -1].abs().max())}


def reach() -> dict[str, float]:
    """Return the gradient of the first output by the last value, without order and in a scan with decay."""
    import torch

    from regard.attention.lightnet import lightnet_attention
    from regard.engines.scan import scan

    q, k, v = torch.randn(3, 16, 2, 64, 8, dtype=torch.float64).unbind()
    v.requires_grad_()
    outs = {
        "reach": lightnet_attention(q, k, v, causal=False)[0],
        "reach_scan": scan(q, k, v, torch.tensor([-0.1, -0.2], dtype=torch.float64))[0],
    }
    return {
        name: float(torch.autograd.grad(out[:, :, 0].abs().sum(), v)[0][:, :, -1].abs().mean())
        for name, out in outs.items()
    }


def decay(k: Any) -> Any:
    """exp(z_{t-1} - z_t) of logits [..., T, D], at steps 1 to T - 1."""
    z = k.double().logcumsumexp(-2)
    return (z[..., :-1, :] - z[..., 1:, :]).exp()


def decays(k: Any) -> dict[str, float]:
    """The mean decay of logits [B, T, D] at some steps."""
    found = decay(k)
    return {str(t): float(found[:, t - 1].mean()) for t in DECAYS}


def named(results: Results, start: str) -> list[Any]:
    """Return the results of the steps whose names start so."""
    return [told for name, told in results.items() if name.startswith(start)]
