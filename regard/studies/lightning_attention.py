"""Various Lengths, Constant Speed (Qin et al., 2024, arXiv 2405.17381), small.

Exactness: in chunks and step by step, lightning attention is the masked product, to rounding, whatever the
rates; a state that is off by one position's decay, as a cache of the other convention, is seen. Speed: time a
token of the chunked form from 4,096 to 16,384 tokens, beside the masked product from 1,024 to 4,096.
Positions: TransNormerLLM of two layers without LRPE learns a Markov source of second order (32 symbols), in
which order is all, with the decay as its only sign of position; the control has no decay. Softmax attention
with rotary positions, in a Llama-like decoder of the same width, is there for what happens beyond the trained
length.
Status: the rules and sizes are our choice; the paper trains 385 M parameters.
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

MODELS = ("alibi", "paper", "none", "softmax")
SYMBOLS, DIM, HEADS, LAYERS, TRAINED, LONGER = 32, 64, 4, 2, 64, 256
KINDS = ("alibi", "paper", "minimax", "none")


@dataclass(frozen=True)
class Size:
    """How many random inputs and their lengths, timed rounds and lengths, seeds and steps of training."""

    draws: int = 5
    lengths: tuple[int, ...] = (1, 63, 64, 65, 1000)
    rounds: int = 5
    scale: int = 1024
    seeds: int = 3
    steps: int = 400
    batch: int = 32


def loss(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=f"held-out loss {about}", low=0, unit="nats")


def rule(comparison: str, measure: str, control: str | None, threshold: float, paired: bool = True) -> Rule:
    return Rule(
        measure=measure,
        comparison=comparison,
        threshold=threshold,
        control=control,
        paired=paired and control is not None,
    )


@study("lightning-attention")
class LightningAttentionStudy(Study):
    """Is it exact, is its speed constant, and does the decay alone say where a token stands?"""

    title = "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention"
    paper = "Qin et al. 2024, arXiv 2405.17381"
    quantities = (
        Quantity(name="error", about="largest error of chunks and steps", over="draws", low=0),
        Quantity(name="fault", about="the same, with a state that aged one position less", over="draws",
        low=0), Quantity(
            name="growth", about="time a token in chunks, 16,384 tokens over 4,096", over="rounds", low=0
        ),
        Quantity(
            name="growth_masked", about="the same of the masked product, 4,096 over 1,024", over="rounds",
            low=0
        ),
        *(
            loss(f"{name}_{length}", f"with {what} at {length} symbols")
            for name, what in (
                ("alibi", "`alibi` rates"), ("paper", "`paper` rates"), ("none", "no decay"),
                ("softmax", "softmax and rotary positions"),
            )
            for length in (TRAINED, LONGER)
        ),
    )  # fmt: skip
    claims = (
        Claim(
            name="exact",
            text="In chunks and step by step it is the masked product, to rounding, and a fault is seen.",
            rules=(rule("below", "error", None, 1e-10), rule("above", "fault", "error", 1e-3)),
            main=True,
        ),
        Claim(
            name="speed",
            text="A token takes as long in 16,384 as in 4,096, where a masked product takes longer.",
            rules=(rule("below", "growth", None, 1.5), rule("above", "growth_masked", "growth", 1.0)),
            main=True,
            paper="tokens a second constant from 1K to 128K (GPU, training)",
        ),
        Claim(
            name="alibi",
            text="Slow decay (`alibi`) is enough of a position: without it the loss is over 0.1 nats higher.",
            rules=(rule("above", "none_64", "alibi_64", 0.1),),
            needs=(rule("below", "alibi_64", None, 3.0),),
            main=True,
            paper="decay alone 4.834, the best with positions 4.728 (perplexity, 385 M)",
        ),
        Claim(
            name="paper",
            text="So is the paper's own, steeper decay.",
            rules=(rule("above", "none_64", "paper_64", 0.1),),
            needs=(rule("below", "paper_64", None, 3.0),),
            main=True,
        ),
        Claim(
            name="longer",
            text="Trained at 64, models with decay do not get worse at 256, where rotary softmax does.",
            rules=(
                rule("below", "alibi_256", "alibi_64", 0.1),
                rule("below", "paper_256", "paper_64", 0.1),
                rule("above", "softmax_256", "softmax_64", 0.1),
            ),
        ),
    )
    full = Size()
    quick = Size(draws=3, lengths=(1, 65), rounds=3, scale=64, seeds=1, steps=6, batch=4)

    def prepare(self) -> None:
        from regard.tasks.markov import markov

        self.data = markov(symbols=SYMBOLS, seed=self.seed)

    def steps(self) -> Iterable[Step]:
        yield Step("speed", self.speed, cost=1.5)
        for draw in range(self.size.draws):
            yield Step(f"exactness, draw {draw}", self.exactness, cost=0.2)
        for seed in range(self.size.seeds):
            for name in MODELS:
                yield Step(f"training, {name}, seed {seed}", partial(self.training, name, seed))

    def exactness(self) -> dict[str, float]:
        """Hold chunks and steps to the masked product, in float64, at one random input a length and kind."""
        import torch

        from regard.attention import decay_rates, lightning_attention

        errors, faults = [0.0], []
        for length in self.size.lengths:
            for kind in KINDS:
                q, k, v = torch.randn(3, 2, HEADS, length, 16, dtype=torch.float64).unbind()
                rates = decay_rates(HEADS, 1, 4, kind)
                exact = lightning_attention(q, k, v, rates, method="naive")
                for method in ("chunk", "tiles", "recurrent"):
                    found = lightning_attention(q, k, v, rates, method=method)
                    errors.append(float((found - exact).abs().max()))
                if length > 1 and kind != "none":
                    faults.append(off_by_one(q, k, v, rates, exact))
        return {"error": max(errors), "fault": min(faults)}

    def speed(self) -> dict[str, list[float]]:
        """Time chunks and the masked product, eight heads of width 64, float32."""
        import torch

        from regard.attention import decay_rates, lightning_attention
        from regard.studies.rounds import in_rounds

        rates, unit, cases = decay_rates(8), self.size.scale, {}
        for method, times in (("chunk", (4, 16)), ("naive", (1, 4))):
            for count in times:
                given = torch.randn(3, 1, 8, count * unit, 64).unbind()
                cases[f"{method} {count}"] = partial(lightning_attention, *given, rates, method=method)
        seconds = in_rounds(cases, self.size.rounds)
        return {name: list(found) for name, found in seconds.items()}

    def training(self, name: str, seed: int) -> dict[str, float]:
        """Train one model at 64 symbols, and return its held-out loss there and at 256."""
        import torch

        from regard.objectives.language import evaluate, train

        with one_thread():
            torch.manual_seed(1000 * self.seed + seed)
            model, size = model_of(name), self.size
            options: dict[str, Any] = {
                "steps": size.steps, "batch": size.batch, "length": TRAINED, "seed": 1000 * self.seed + seed,
                "evaluate_every": size.steps, "windows": 1,
            }  # fmt: skip
            train(model, self.data, tick=self.tick, **options)
            windows = 64 if size.seeds > 1 else 4
            return {
                str(length): evaluate(model, self.data, length, windows=windows)
                for length in (TRAINED, LONGER)
            }

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        exact = [told for name, told in results.items() if name.startswith("exactness")]
        speed = results["speed"]
        losses = {
            f"{model}_{length}": [
                told[str(length)] for name, told in results.items() if name.startswith(f"training, {model},")
            ]
            for model in MODELS
            for length in (TRAINED, LONGER)
        }
        return {
            "error": [told["error"] for told in exact],
            "fault": [told["fault"] for told in exact],
            "growth": growth(speed, "chunk 4", "chunk 16"),
            "growth_masked": growth(speed, "naive 1", "naive 4"),
            **losses,
        }

    def details(self, results: Results) -> dict[str, Any]:
        from regard.tasks.markov import entropy_rate, markov

        best = entropy_rate(markov(symbols=SYMBOLS, seed=self.seed), SYMBOLS, seed=self.seed)
        unit = self.size.scale
        micro = {
            f"{name.split()[0]} {int(name.split()[1]) * unit}": 1e6
            * min(found)
            / (int(name.split()[1]) * unit)
            for name, found in results["speed"].items()
        }
        told = ", ".join(f"{name} {value:.1f}" for name, value in micro.items())
        return {
            "best": best, "microseconds": micro,
            "remarks": [
                f"Who knows the source has a loss of {best:.2f} nats.",
                f"Microseconds a token, the fastest round: {told}.",
            ],
        }  # fmt: skip

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.lightning_attention_picture import draw

        draw(outcome, figure)


def growth(seconds: Mapping[str, Sequence[float]], short: str, long: str) -> list[float]:
    """Return the time a token of one case over that of another with a quarter of its tokens, by round."""
    return [b / a / 4 for a, b in zip(seconds[short], seconds[long], strict=True)]


def off_by_one(q: Any, k: Any, v: Any, rates: Any, exact: Any) -> float:
    """Return the error where a cache holds exp(-s) S in place of S, the other convention."""
    from regard.attention import lightning_attention

    half = q.shape[2] // 2
    first, second = ([x[:, :, at] for x in (q, k, v)] for at in (slice(half), slice(half, None)))
    _, state = lightning_attention(first[0], first[1], first[2], rates, return_state=True)
    aged = state * (-rates).exp()[:, None, None]
    found = lightning_attention(second[0], second[1], second[2], rates, initial_state=aged, method="chunk")
    return float((found - exact[:, :, half:]).abs().max())


def model_of(name: str) -> nn.Module:
    """Return a model of two layers with fresh weights: TransNormerLLM, or a Llama-like decoder."""
    from regard.models.decoder import Decoder
    from regard.models.transnormer import TNLConfig, TNLForCausalLM

    if name == "softmax":
        return Decoder(SYMBOLS, dim=DIM, layers=LAYERS, heads=HEADS, mechanism="softmax")
    config = TNLConfig(
        vocab_size=SYMBOLS,
        hidden_size=DIM,
        hidden_dim=DIM,
        intermediate_size=2 * DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        decay=name,
        linear_use_lrpe_list=[],
        pad_token_id=None,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model: nn.Module = TNLForCausalLM(config)
    return model
