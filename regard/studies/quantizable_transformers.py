"""Quantizable Transformers (Bondarenko et al., 2023, arXiv 2306.12929).

Three parts. A pretrained model, SmolLM2-135M-Instruct, measured: where its outliers are, and what 8 bits
cost it, with 16 bits as the control. One head trained to look values up, half of whose queries must add
nothing: how far apart its scores are in the end, with softmax, clipped softmax and a gate. And clipping put
into the pretrained model at inference, which the method is not meant for.
Status: sizes and rules are our choice; the paper trains BERT, OPT and ViT, which takes a GPU.
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
    from torch import Tensor, nn

    from regard.studies.outcome import Outcome

LENGTH, BATCH, RATE, TESTED = 64, 32, 1e-2, 256
HEADS = {"softmax": None, "clipped_05": 0.5, "clipped_09": 0.9, "clipped_15": 1.5, "gated": None}
ALPHAS = (0.0, 0.5, 1.0, 2.0, 4.0)
ROUNDED: dict[str, dict[str, Any]] = {
    "w8a8": {},
    "w16a16": {"bits": 16},
    "inputs": {"weights": False, "residual": False},
    "down": {"weights": False, "residual": False, "only": ("*down_proj",)},
    "others": {"weights": False, "residual": False, "skip": ("*down_proj",)},
    "percentile": {"weights": False, "residual": False, "percentile": 99.999},
    "weights": {"activations": False},
}


@dataclass(frozen=True)
class Size:
    """How many passages to measure and to calibrate on; seeds and steps of training."""

    texts: int = 8
    calibration: int = 4
    seeds: int = 3
    steps: int = 1200


def loss(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=f"loss, {about}", over="texts", low=0, unit="nats")


def spread(name: str, about: str) -> Quantity:
    return Quantity(name=f"range_{name}", about=f"largest minus smallest score of a row, {about}", low=0)


def noise(name: str, about: str) -> Quantity:
    return Quantity(name=f"nothing_{name}", about=f"mean square of what should be nothing, {about}", low=0)


def rule(measure: str, comparison: str, control: str, threshold: float = 0.0, **options: Any) -> Rule:
    return Rule(
        measure=measure, comparison=comparison, control=control, threshold=threshold, paired=True, **options
    )


TOLD = {
    "softmax": "softmax", "clipped_05": "clipped, alpha 0.5", "clipped_09": "clipped, alpha 0.9",
    "clipped_15": "clipped, alpha 1.5", "gated": "softmax and a gate",
}  # fmt: skip
SAID = {
    "w8a8": "weights, inputs of linear layers and residual stream in 8 bits",
    "w16a16": "the same in 16 bits",
    "inputs": "inputs of linear layers in 8 bits",
    "down": "inputs of the MLPs' down-projections in 8 bits",
    "others": "inputs of all linear layers but those in 8 bits",
    "percentile": "inputs of linear layers in 8 bits, ranges at the percentile 99.999",
    "weights": "weights alone in 8 bits",
}


@study("quantizable-transformers")
class QuantizableTransformers(Study):
    """Outliers of a pretrained model, what 8 bits cost it, and heads that learn to do nothing."""

    title = "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing"
    paper = "Bondarenko et al. 2023, arXiv 2306.12929"
    quantities = (
        Quantity(name="infinity", about="largest activation after the worst block", over="texts", low=0),
        Quantity(name="infinity_rest", about="the same without the first token", over="texts", low=0),
        Quantity(name="kurtosis", about="kurtosis after the worst block", over="texts", low=0),
        Quantity(name="kurtosis_rest", about="the same without the first token", over="texts", low=0),
        loss("loss", "as the model is"),
        *(loss(f"loss_{name}", about) for name, about in SAID.items()),
        *(loss(f"clip_{alpha:g}", f"softmax clipped at inference, alpha {alpha:g}") for alpha in ALPHAS),
        *(spread(name, about) for name, about in TOLD.items()),
        *(noise(name, about) for name, about in TOLD.items()),
    )
    claims = (
        Claim(
            name="first",
            text="In the worst block, nine tenths of the outliers stand at the first token.",
            rules=(
                rule("kurtosis_rest", "below", "kurtosis", factor=0.1),
                rule("infinity_rest", "below", "infinity", factor=0.1),
            ),
            main=True,
            paper="over 97 % of BERT's outliers stand at delimiters",
        ),
        Claim(
            name="bits",
            text="Eight bits a tensor ruin a model with outliers, and sixteen do not.",
            rules=(
                rule("loss_w8a8", "above", "loss", 0.5),
                rule("loss_w16a16", "within", "loss", 0.05),
            ),
            main=True,
            paper="BERT's perplexity from 4.49 to 1294, OPT-125M's from 15.84 to 21.18",
        ),
        Claim(
            name="range",
            text="Clipping (alpha 0.9) at least halves the distance of scores that training ends with.",
            rules=(rule("range_clipped_09", "below", "range_softmax", factor=0.5),),
            main=True,
        ),
        Claim(
            name="nothing",
            text="A clipped head says less where it should say nothing.",
            rules=(rule("nothing_clipped_09", "below", "nothing_softmax"),),
        ),
        Claim(
            name="gate",
            text="A gate lowers the distance of scores too.",
            rules=(rule("range_gated", "below", "range_softmax"),),
        ),
        Claim(
            name="activations",
            text="It is activations, not weights, that eight bits are too few for.",
            rules=(rule("loss_inputs", "above", "loss_weights"),),
        ),
        Claim(
            name="down",
            text="Of the linear layers, the MLPs' down-projections bear most of the loss.",
            rules=(rule("loss_down", "above", "loss_others"),),
        ),
        Claim(
            name="inference",
            text="Clipping is no edit of a model trained without it: alpha 2 costs over 0.3 nats.",
            rules=(rule("clip_2", "above", "clip_0", 0.3),),
        ),
    )
    full, quick = Size(), Size(texts=1, calibration=1, seeds=1, steps=20)

    def prepare(self) -> None:
        import regard
        from regard.tasks.passages import passages

        self.model, tokenizer = regard.load()
        found = [tokenizer(p.text, return_tensors="pt")["input_ids"][:, :LENGTH] for p in passages()]
        self.texts = found[: self.size.texts]
        self.others = found[self.size.texts : self.size.texts + self.size.calibration]

    def steps(self) -> Iterable[Step]:
        yield Step("outliers", self.outliers, cost=self.size.texts / 4)
        for name in ROUNDED:
            yield Step(f"rounded, {name}", partial(self.rounded, name), cost=self.size.texts)
        for alpha in ALPHAS:
            yield Step(f"clipped, {alpha:g}", partial(self.clipped, alpha), cost=self.size.texts / 2)
        for seed in range(self.size.seeds):
            for name in HEADS:
                cost = self.size.steps / 200
                yield Step(f"head, {name}, seed {seed}", partial(self.head, name, seed), cost=cost)

    def outliers(self) -> dict[str, Any]:
        """Measure the outliers of each text, and its loss."""
        import torch

        import regard
        from regard.lens import Outliers

        found = []
        for ids in self.texts:
            with torch.no_grad(), regard.watch(self.model, Outliers(tensors=["residual"])) as seen:
                self.model(ids)
            table = seen[Outliers].table
            found.append({name: list(table[name]) for name in ("infinity", "kurtosis", *REST)})
        return {"texts": found, "losses": self.losses()}

    def losses(self) -> list[float]:
        """Return the loss on each text."""
        import torch

        with torch.no_grad():
            return [float(self.model(ids, labels=ids).loss) for ids in self.texts]

    def rounded(self, name: str) -> list[float]:
        """Return the losses in few bits, with ranges from other texts."""
        from regard.edit.simulated_int8 import simulate_int8

        with simulate_int8(self.model, self.others, **ROUNDED[name]):
            return self.losses()

    def clipped(self, alpha: float) -> list[float]:
        """Return the losses with the softmax clipped at inference."""
        import regard
        from regard.attention import ClippedSoftmax

        with regard.swap(self.model, ClippedSoftmax(alpha=alpha, length=LENGTH)):
            return self.losses()

    def head(self, name: str, seed: int) -> dict[str, float]:
        """Train one head, and return its error, the range of its scores, and what it says for nothing."""
        import torch

        from regard.tasks.lookup import Lookup

        task = Lookup()
        torch.manual_seed(1000 * self.seed + seed)
        draws = torch.Generator().manual_seed(1000 * self.seed + seed)
        model = one_head(name, task.dim, task.width, task.length)
        optimizer = torch.optim.Adam(model.parameters(), RATE)
        for step in range(self.size.steps):
            inputs, targets, _ = task.batch(BATCH, draws)
            error = (model(inputs) - targets).square().mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            self.tick((step + 1) / self.size.steps)
        with torch.no_grad():
            inputs, targets, wants = task.batch(TESTED, draws)
            out, scores = model(inputs), model.scores(inputs)
        apart = scores.amax(-1) - scores.amin(-1)
        return {
            "error": float((out - targets).square().mean()),
            "range": float(apart.mean()),
            "range_idle": float(apart[~wants].mean()),
            "nothing": float(out[~wants].square().mean()),
        }

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        told = results["outliers"]
        worst = [text["kurtosis"].index(max(text["kurtosis"])) for text in told["texts"]]
        names = ("infinity", "kurtosis", *REST)
        values = {n: [text[n][at] for text, at in zip(told["texts"], worst, strict=True)] for n in names}
        runs = {n: [r for step, r in results.items() if step.startswith(f"head, {n}, ")] for n in HEADS}
        return {
            **values,
            "loss": told["losses"],
            **{f"loss_{name}": results[f"rounded, {name}"] for name in ROUNDED},
            **{f"clip_{alpha:g}": results[f"clipped, {alpha:g}"] for alpha in ALPHAS},
            **{f"range_{name}": [run["range"] for run in found] for name, found in runs.items()},
            **{f"nothing_{name}": [run["nothing"] for run in found] for name, found in runs.items()},
        }

    def details(self, results: Results) -> dict[str, Any]:
        from regard.studies.quantizable_transformers_picture import collect

        return collect(results, HEADS)

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.quantizable_transformers_picture import draw

        draw(outcome, figure, TOLD, SAID, ALPHAS)


REST = ("infinity_rest", "kurtosis_rest")


def one_head(name: str, dim: int, width: int, length: int) -> Any:
    """Return one head with its projections, which sees all positions."""
    import torch
    from torch import nn

    from regard.attention import ClippedSoftmax, Context, Softmax
    from regard.attention.gates import HeadGate

    alpha = HEADS[name]

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.keys = nn.Linear(dim, width), nn.Linear(dim, width)
            self.values, self.output = nn.Linear(dim, width), nn.Linear(width, width)
            self.gate = HeadGate(dim, 1, kind="joint") if name == "gated" else None
            spec = Softmax() if alpha is None else ClippedSoftmax(alpha=alpha, length=length)
            self.mechanism: nn.Module = spec.build()

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part(x)[:, None] for part in (self.queries, self.keys, self.values))
            out = self.mechanism(q, k, v, Context.of(q, k, causal=False))
            out = out if self.gate is None else out * self.gate(x)
            mixed: Tensor = self.output(out[:, 0])
            return mixed

        def scores(self, x: Tensor) -> Tensor:
            return torch.einsum("btd,bsd->bts", self.queries(x), self.keys(x)) / width**0.5

    return Head()
