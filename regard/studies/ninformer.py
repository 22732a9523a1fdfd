"""NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function (arXiv 2403.02411).

Small models classify the packaged handwritten digits, 8 x 8, cut into 16 patches: NiNformer; the same with a
gate of 1, in which no token hears of another before the mean; with u + v in place of u * v; with a LayerNorm
of its own for each sublayer; MLP-Mixer; and a ViT with learned positions. All have as many parameters within
3 %, the width inside the MLPs being what is varied, fresh weights by torch, dropout of 0.1, and the official
recipe: Adam at 1e-3, no decay, no schedule. Every seed draws anew what is held out, weights and batches.

Each is also trained on a tenth of the labels, and tested on held-out digits that are moved by two pixels. The
cost of a step, forward and backward, of one block of the official sizes (d 256, h 512) is timed beside one of
attention with the same MLP, for 16 to 1024 tokens; by multiply-adds they cost the same at 640.
Status: the recipe is the paper's, sizes and rules are our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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

NINFORMER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "dropout": 0.1}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "nin": ("ninformer-digits", {}),
    "mixer": ("mixer-digits", {"token_size": 64}),
    "vit": ("vit-digits", {}),
    "one": ("ninformer-digits", {"gate": "one"}),
    "add": ("ninformer-digits", {"gate": "add"}),
    "apart": ("ninformer-digits", {"share_norm": False}),
}
SHOWN = {"num_channels": 1, "num_labels": 10}
BATCH, RATE, MOVED = 64, 1e-3, 2
TOKENS, DIM, HIDDEN, HEADS = (16, 64, 256, 1024), 256, 512, 8


@dataclass(frozen=True)
class Size:
    """How many seeds, steps with all labels and with a tenth, and rounds of timing."""

    seeds: int = 5
    steps: int = 450
    few_steps: int = 150
    rounds: int = 9


def accuracy(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=f"held-out digits named rightly, {about}", low=0, high=1, unit="%")


def above(measure: str, control: str, threshold: float = 0.0) -> Rule:
    return Rule(measure=measure, comparison="above", threshold=threshold, control=control, paired=True)


WORDS = {
    "nin": "NiNformer", "mixer": "MLP-Mixer", "vit": "ViT", "one": "gate of 1", "add": "u + v",
    "apart": "two LayerNorms a block",
}  # fmt: skip


@study("ninformer")
class NiNformerStudy(Study):
    """Does a gate that a mixer makes classify as well as a Mixer and a ViT, and where is it cheaper?"""

    title = "NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function"
    paper = "Abdullah and Aydin 2024, arXiv 2403.02411"
    quantities = (
        *(accuracy(name, word) for name, word in WORDS.items()),
        *(accuracy(f"{name}_few", f"{word}, a tenth of the labels") for name, word in WORDS.items()),
        *(accuracy(f"{name}_moved", f"{word}, moved by 2 pixels") for name, word in WORDS.items()),
        *(
            Quantity(name=f"{kind}_{tokens}", about=f"a step of one block, {word}, {tokens} tokens",
                     over="rounds", low=0, unit="ms")
            for kind, word in (("gating", "gating"), ("attention", "attention")) for tokens in TOKENS
        ),
    )  # fmt: skip
    claims = (
        Claim(
            name="tokens talk",
            text="What the gate brings from other tokens is worth more than 10 points.",
            rules=(above("nin", "one", 0.1),),
            main=True,
        ),
        Claim(
            name="not below Mixer",
            text="NiNformer is not more than 1 point below MLP-Mixer.",
            rules=(above("nin", "mixer", -0.01),),
            needs=(above("mixer", "one", 0.05),),
            main=True,
            paper="higher than MLP-Mixer on MNIST, CIFAR-10 and CIFAR-100",
        ),
        Claim(
            name="not below Mixer, few labels",
            text="With a tenth of the labels it is not more than 2 points below MLP-Mixer.",
            rules=(above("nin_few", "mixer_few", -0.02),),
        ),
        Claim(
            name="order",
            text="It is above both MLP-Mixer and ViT.",
            rules=(above("nin", "mixer"), above("nin", "vit")),
            paper="higher than both on MNIST, CIFAR-10 and CIFAR-100",
        ),
        Claim(
            name="product",
            text="Multiplying the branches is better than adding them.",
            rules=(above("nin", "add"), above("nin_few", "add_few")),
        ),
        Claim(
            name="one norm",
            text="Sharing the LayerNorm changes the accuracy by less than 1 point.",
            rules=(Rule(measure="nin", comparison="within", threshold=0.01, control="apart", paired=True),),
        ),
        Claim(
            name="moved",
            text="Moved by two pixels, digits are named as well as by MLP-Mixer, within 2 points.",
            rules=(above("nin_moved", "mixer_moved", -0.02),),
        ),
        Claim(
            name="cost",
            text="A gating block takes longer than one of attention at 64 tokens, and less long at 1024.",
            rules=(above("gating_64", "attention_64"), above("attention_1024", "gating_1024")),
        ),
    )  # fmt: skip
    full, quick = Size(), Size(seeds=1, steps=4, few_steps=2, rounds=1)

    def steps(self) -> Iterable[Step]:
        yield Step("cost", self.cost, cost=1.0)
        for seed in range(self.size.seeds):
            for name in ARMS:
                yield Step(f"{name}, seed {seed}", partial(self.train, name, seed))

    def cost(self) -> dict[str, list[float]]:
        """Time forward and backward of one block with either mixing, one thread, one item."""
        from regard.studies.rounds import in_rounds

        cases = {f"{kind}_{n}": step_of(kind, n) for n in TOKENS for kind in ("gating", "attention")}
        with one_thread():
            return in_rounds(cases, self.size.rounds)

    def train(self, name: str, seed: int) -> dict[str, Any]:
        """Train on all labels and on a tenth; return accuracies and how large the residual stream gets."""
        import torch

        from regard.tasks.images import digits, normalized

        data = digits(seed=1000 * self.seed + seed)
        mean, std = data.statistics()
        images, labels = normalized(data.train, mean, std), data.train_labels
        held, wanted = normalized(data.held_out, mean, std), data.held_out_labels
        few = tenth(labels, torch.Generator().manual_seed(seed))
        with one_thread():
            model = self._fitted(name, seed, images, labels, self.size.steps)
            small = self._fitted(
                name, seed, images[few], labels[few], self.size.few_steps, before=self.size.steps
            )
            with torch.no_grad():
                out = model(held, output_hidden_states=True)
                sizes = [float(x.square().mean().sqrt()) for x in out.hidden_states]
                moved = [right(model, x, wanted) for x in shifted(held)]
                return {
                    "all": right(model, held, wanted), "few": right(small, held, wanted),
                    "moved": sum(moved) / len(moved), "sizes": sizes,
                    "parameters": sum(p.numel() for p in model.parameters()),
                }  # fmt: skip

    def _fitted(
        self, name: str, seed: int, images: Tensor, labels: Tensor, steps: int, before: int = 0
    ) -> Any:  # fmt: skip
        import torch

        torch.manual_seed(1000 * self.seed + seed)
        generator = torch.Generator().manual_seed(seed)
        model = built(name).train()
        optimizer = torch.optim.Adam(model.parameters(), RATE)
        for step in range(steps):
            chosen = torch.randint(len(images), (BATCH,), generator=generator)
            loss = model(images[chosen], labels=labels[chosen]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self.tick((before + step + 1) / (self.size.steps + self.size.few_steps))
        return model.eval()

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        found: dict[str, Sequence[float]] = {}
        for name in ARMS:
            runs = [told for step, told in results.items() if step.startswith(f"{name}, seed")]
            for end, key in (("", "all"), ("_few", "few"), ("_moved", "moved")):
                found[name + end] = [told[key] for told in runs]
        return {**found, **{case: [1e3 * s for s in took] for case, took in results["cost"].items()}}

    def details(self, results: Results) -> dict[str, Any]:
        first = {name: results[f"{name}, seed 0"] for name in ARMS}
        from statistics import median

        ratios = [
            median(results["cost"][f"gating_{n}"]) / median(results["cost"][f"attention_{n}"]) for n in TOKENS
        ]
        return {
            "parameters": {name: told["parameters"] for name, told in first.items()},
            "residual": {name: first[name]["sizes"] for name in ("nin", "add", "apart")},
            "ratios": ratios, "tokens": list(TOKENS), "equal_at": crossing(TOKENS, ratios),
            "remarks": [f"By multiply-adds both blocks cost the same at {2 * HIDDEN - 1.5 * DIM:g} tokens."],
        }  # fmt: skip

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.ninformer_picture import draw

        draw(outcome, figure)


def built(name: str) -> Any:
    """Return a fresh model of an arm, with as many parameters as NiNformer, nearly, and torch's weights."""
    from torch import nn

    from regard.models.images import image_model, matched

    preset, own = ARMS[name]
    goal = image_model("ninformer-digits", **{**SHOWN, **NINFORMER})
    options = {**SHOWN, "hidden_size": NINFORMER["hidden_size"], "dropout": NINFORMER["dropout"], **own}
    if name == "nin":
        return goal
    wanted = sum(p.numel() for p in goal.parameters())
    width = matched(preset, wanted, "intermediate_size", **options).intermediate_size
    model = image_model(preset, intermediate_size=width, **options)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()
    return model


def tenth(labels: Tensor, generator: Any) -> Tensor:
    """Return the places of a tenth of each class, drawn."""
    import torch

    kept = []
    for label in labels.unique():
        places = (labels == label).nonzero()[:, 0]
        kept.append(places[torch.randperm(len(places), generator=generator)[: len(places) // 10]])
    return torch.cat(kept)


def right(model: Any, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that a model names rightly."""
    return float((model(images).logits.argmax(-1) == labels).double().mean())


def shifted(images: Tensor) -> list[Tensor]:
    """Return images moved by two pixels up, down, left and right; what comes in repeats the border."""
    from torch.nn.functional import pad

    (height, width), n = images.shape[2:], MOVED
    wide = pad(images, (n, n, n, n), mode="replicate")
    return [
        wide[:, :, y : y + height, x : x + width] for y, x in ((2 * n, n), (0, n), (n, 2 * n), (n, 0))
    ]  # fmt: skip


def step_of(kind: str, tokens: int) -> Callable[[], Any]:
    """Return forward and backward of a block of gating or attention, d 256 and h 512."""
    import torch

    from regard.attention.ninformer import NiNBlock
    from regard.models.patches.vit import PlainViTConfig, ViTLayer

    side = int(tokens**0.5)
    if kind == "gating":
        block: Any = NiNBlock(DIM, tokens, HIDDEN)
        x = torch.randn(1, tokens, DIM)
    else:
        config = PlainViTConfig(hidden_size=DIM, num_attention_heads=HEADS, intermediate_size=HIDDEN)
        block, x = ViTLayer(config, 0.0), torch.randn(1, side, side, DIM)
    wanted = list(block.parameters())

    def step() -> None:
        torch.autograd.grad(block(x).sum(), wanted)

    return step


def crossing(tokens: Sequence[int], ratios: Sequence[float]) -> float | None:
    """Return where the ratio of costs comes down to 1, between sizes by powers; None where it does not.

    Example:
        >>> crossing((16, 64, 256), (1.5, 2.0, 0.5))
        128.0
    """
    from math import exp, log

    for i in range(len(tokens) - 1, 0, -1):
        before, after = ratios[i - 1], ratios[i]
        if before > 1 >= after:
            share = log(before) / log(before / after)
            return round(exp(log(tokens[i - 1]) + share * log(tokens[i] / tokens[i - 1])), 6)
    return None
