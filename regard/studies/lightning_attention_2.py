"""Lightning Attention-2 (Qin et al., 2024, arXiv 2401.04658), small.

Equality: forwards and backwards, in tiles with gradients written by hand and in chunks by autograd, for
chunks of 1 to 100 and lengths of 1 to 250, against the masked product; rates that are 1 % off are the fault
that must be seen.
Flat cost: time a token forwards and with gradients, and the most memory a token, from 4,096 tokens up, beside
causal SDPA and the masked product; where SDPA is faster, it is said. Free lunch: TransNormerLLM trained from
one seed in chunks, in tiles, and as one masked product has one curve of losses; rates 1 % off do not.
Decoding: time a token along 65,536 tokens, beside one query over keys and values that grow.
Status: the rules and sizes are our choice; the paper measures GPUs.
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

    from regard.studies.outcome import Outcome

HEADS, WIDTH = 2, 64
CHUNKS, LENGTHS = (1, 7, 16, 64, 100), (1, 63, 64, 65, 250)
CURVES = {"whole": 4096, "chunks": 16, "tiles": 24}  # the chunk size that makes each
OFF = 1.01


@dataclass(frozen=True)
class Size:
    """How many random inputs, timed rounds, tokens in 1,024s, seeds, steps of training, and decoded "
    "tokens."""

    draws: int = 5
    rounds: int = 5
    unit: int = 1024
    seeds: int = 3
    steps: int = 200
    decoded: int = 65536
    blocks: int = 16


def cost(name: str, about: str, over: str = "rounds") -> Quantity:
    return Quantity(name=name, about=about, over=over, low=0)


def rule(comparison: str, measure: str, control: str | None, threshold: float, **options: Any) -> Rule:
    options = {"paired": control is not None, **options}
    return Rule(measure=measure, comparison=comparison, threshold=threshold, control=control, **options)


@study("lightning-attention-2")
class LightningAttention2Study(Study):
    """Is the tiled form the same operator, does its cost stay flat, and does training notice?"""

    title = (
        "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models"
    )
    paper = "Qin et al. 2024, arXiv 2401.04658"
    quantities = (
        cost("error", "largest error of outputs and gradients, all chunks and lengths", "draws"),
        cost("fault", "the same with rates 1 % off, the smallest", "draws"),
        cost("forward", "time a token forwards, 32K tokens over 4K"),
        cost("both", "time a token with gradients, 32K tokens over 4K"),
        cost("sdpa", "the same of causal SDPA, 16K over 4K"),
        cost("faster_1k", "SDPA's time over that of chunks, forwards, 1K tokens"),
        cost("faster_16k", "the same at 16K tokens"),
        cost("memory", "most memory a token with gradients, 32K tokens over 4K", "measurements"),
        cost("memory_masked", "the same of the masked product, 4K over 1K", "measurements"),
        cost(
            "apart", "largest difference of the loss curves of chunks, tiles and the masked product", "seeds"
        ),
        cost("apart_off", "the same, chunks with rates 1 % off", "seeds"),
        cost("decoded", "time of decoding a block of tokens, over that of the first", "blocks"),
        cost("decoded_cache", "time of a query over 64K keys and values, over 4K", "rounds"),
    )
    claims = (
        Claim(
            name="equal",
            text="Tiles and chunks are one operator, forwards and backwards, and 1 % in the rates is seen.",
            rules=(rule("below", "error", None, 1e-10), rule("above", "fault", "error", 1e-6)),
            main=True,
        ),
        Claim(
            name="forward",
            text="A token of 32K costs at most half as much again as one of 4K, and with SDPA far more.",
            rules=(
                rule("below", "forward", None, 1.5),
                rule("below", "both", None, 1.5),
                rule("above", "sdpa", "forward", 1.0),
            ),
            main=True,
            paper="tokens a second 38,615 at 1K, 37,364 at 32K (0.4B, training, GPU)",
        ),
        Claim(
            name="ratio",
            text="The longer the text, the further ahead of SDPA.",
            rules=(rule("above", "faster_16k", "faster_1k", 1.0),),
            paper="behind FlashAttention-2 below about 2K, 9 times ahead at 32K (GPU)",
        ),
        Claim(
            name="memory",
            text="Memory a token does not grow either, where the masked product's does.",
            rules=(
                rule("below", "memory", None, 1.5, least=1),
                rule("above", "memory_masked", "memory", 1.0, least=1),
            ),
            main=True,
        ),
        Claim(
            name="lunch",
            text="Training does not notice: the loss curves agree within 1e-4, which rates 1 % off do not.",
            rules=(rule("below", "apart", None, 1e-4), rule("above", "apart_off", "apart", 1e-4)),
            main=True,
            paper="loss 2.229 with version 1, 2.228 with version 2 (0.4B)",
        ),
        Claim(
            name="decoding",
            text="Decoding 65,536 tokens, a token takes as long at the end as at the beginning.",
            rules=(
                rule("below", "decoded", None, 1.5),
                rule("above", "decoded_cache", "decoded", 1.0, paired=False),
            ),
            main=True,
        ),
    )
    full = Size()
    quick = Size(draws=3, rounds=3, unit=32, seeds=1, steps=4, decoded=64, blocks=4)

    def steps(self) -> Iterable[Step]:
        yield Step("speed", self.speed, cost=3)
        yield Step("decoding", self.decoding)
        yield Step("memory", self.memory, cost=0.5)
        for draw in range(self.size.draws):
            yield Step(f"equality, draw {draw}", self.equality, cost=0.2)
        for seed in range(self.size.seeds):
            yield Step(f"training, seed {seed}", partial(self.training, seed), cost=3)

    def equality(self) -> dict[str, float]:
        """Hold outputs and gradients to those of the masked product, in float64."""
        from regard.attention import decay_rates

        errors, faults = [], []
        rates = decay_rates(HEADS, kind="alibi")
        for length in LENGTHS:
            given = drawn(length, batch=1, width=8, double=True)
            exact = with_gradients(given, rates, "naive", 64)
            for chunk in CHUNKS:
                for method in ("chunk", "tiles"):
                    errors.append(apart(with_gradients(given, rates, method, chunk), exact))
            if length > 1:
                faults.append(apart(with_gradients(given, OFF * rates, "tiles", 64), exact))
        return {"error": max(errors), "fault": min(faults)}

    def speed(self) -> dict[str, list[float]]:
        """Time chunks and SDPA, forwards and with gradients, two heads of width 64, float32."""
        from torch.nn.functional import scaled_dot_product_attention

        from regard.studies.rounds import in_rounds

        unit, sdpa = self.size.unit, partial(scaled_dot_product_attention, is_causal=True)
        cases: dict[str, Callable[[], Any]] = {}
        for count in (1, 4, 16, 32):
            given = drawn(count * unit)
            cases[f"chunk {count}"] = partial(lightning, *given)
            if count < 32:
                cases[f"sdpa {count}"] = partial(sdpa, *given)
            if count in (4, 32):
                cases[f"both {count}"] = partial(backwards, lightning, given)
        return in_rounds(cases, self.size.rounds)

    def decoding(self) -> dict[str, Any]:
        """Decode one token after another, and time blocks of them; and queries over keys that are kept."""
        import time

        import torch
        from torch.nn.functional import scaled_dot_product_attention

        from regard.attention import LightningAttention
        from regard.studies.rounds import in_rounds

        mechanism, state, blocks = LightningAttention().build(), None, []
        block = self.size.decoded // self.size.blocks
        with torch.no_grad(), one_thread():
            for done in range(self.size.blocks):
                given = drawn(block)
                start = time.perf_counter()
                for i in range(block):
                    q, k, v = (x[:, :, i : i + 1] for x in given)
                    _, state = mechanism.step(q, k, v, state)
                blocks.append(time.perf_counter() - start)
                self.tick((done + 1) / self.size.blocks)
            q = drawn(1)[0]
            cases = {}
            for count in (4, 64):
                k, v = drawn(count * self.size.unit)[:2]
                cases[str(count)] = partial(_repeat, partial(scaled_dot_product_attention, q, k, v))
            kept = in_rounds(cases, self.size.rounds)
        assert state is not None
        return {"blocks": blocks, "kept": kept, "numbers": sum(x.numel() for x in state)}

    def memory(self) -> dict[str, int]:
        """Measure the most memory that outputs and gradients take."""
        from regard.studies.rounds import peak_bytes

        unit, found = self.size.unit, {}
        for method, counts in (("chunk", (4, 32)), ("tiles", (4, 32)), ("naive", (1, 4))):
            for count in counts:
                given = drawn(count * unit)
                work = partial(backwards, partial(lightning, method=method), given)
                found[f"{method} {count}"] = peak_bytes(work)
        return found

    def training(self, seed: int) -> dict[str, list[float]]:
        """Train one model four times from one seed, and return the curves of its losses."""
        import torch

        from regard.models.transnormer import TNLConfig, TNLForCausalLM
        from regard.objectives.language import train
        from regard.tasks.markov import markov

        data, curves = markov(seed=self.seed), {}
        sizes = {"vocab_size": 32, "hidden_size": 64, "hidden_dim": 64, "intermediate_size": 128}
        with one_thread():
            for place, (name, chunk) in enumerate([*CURVES.items(), ("off", CURVES["chunks"])]):
                torch.manual_seed(1000 * self.seed + seed)
                config = TNLConfig(
                    **sizes, num_hidden_layers=2, num_attention_heads=4, pad_token_id=None, use_cache=False,
                    chunk_size=chunk, tie_word_embeddings=False,
                )  # fmt: skip
                model = TNLForCausalLM(config)
                if name == "off":
                    forget_faster(model)
                log = train(
                    model, data, steps=self.size.steps, batch=8, length=96, windows=1, seed=seed,
                    evaluate_every=self.size.steps, tick=partial(self._part, place),
                )  # fmt: skip
                curves[name] = log.losses
        return curves

    def _part(self, place: int, share: float) -> None:
        self.tick((place + share) / (1 + len(CURVES)))

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        speed, decoding, memory = (results[name] for name in ("speed", "decoding", "memory"))
        exact = [told for name, told in results.items() if name.startswith("equality")]
        curves = [told for name, told in results.items() if name.startswith("training")]
        blocks, kept = decoding["blocks"], decoding["kept"]
        heavier = [memory[f"{method} 32"] / memory[f"{method} 4"] / 8 for method in ("chunk", "tiles")]
        return {
            "error": [told["error"] for told in exact],
            "fault": [told["fault"] for told in exact],
            "forward": over(speed["chunk 32"], speed["chunk 4"], 8),
            "both": over(speed["both 32"], speed["both 4"], 8),
            "sdpa": over(speed["sdpa 16"], speed["sdpa 4"], 4),
            "faster_1k": over(speed["sdpa 1"], speed["chunk 1"]),
            "faster_16k": over(speed["sdpa 16"], speed["chunk 16"]),
            "memory": [max(heavier)],
            "memory_masked": [memory["naive 4"] / memory["naive 1"] / 4],
            "apart": [max(distance(told, name) for name in ("chunks", "tiles")) for told in curves],
            "apart_off": [distance(told, "off") for told in curves],
            "decoded": [block / blocks[0] for block in blocks[1:]],
            "decoded_cache": over(kept["64"], kept["4"]),
        }

    def details(self, results: Results) -> dict[str, Any]:
        speed, unit = results["speed"], self.size.unit
        curves = next(told for name, told in results.items() if name.startswith("training"))
        micro = {name: 1e6 * min(found) / (int(name.split()[1]) * unit) for name, found in speed.items()}
        faster = {
            count * unit: min(speed[f"sdpa {count}"]) / min(speed[f"chunk {count}"]) for count in (1, 4, 16)
        }
        bytes_ = {name: told / (int(name.split()[1]) * unit) for name, told in results["memory"].items()}
        told = ", ".join(f"{ratio:.1f} at {length:,}" for length, ratio in faster.items())
        numbers = results["decoding"]["numbers"]
        return {
            "microseconds": micro, "bytes": bytes_, "unit": unit, "curves": curves,
            "blocks": results["decoding"]["blocks"], "decoded": self.size.decoded,
            "remarks": [
                f"SDPA's time over that of chunks, forwards: {told} tokens; below 1 SDPA is faster.",
                f"The state is {numbers:,} numbers after every token.",
            ],
        }  # fmt: skip

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.lightning_attention_2_picture import draw

        draw(outcome, figure)


def drawn(length: int, batch: int = 1, width: int = WIDTH, double: bool = False) -> tuple[Any, ...]:
    """Return random q, k and v, [batch, HEADS, length, width] each."""
    import torch

    kind = torch.float64 if double else torch.float32
    return torch.randn(3, batch, HEADS, length, width, dtype=kind).unbind()


def lightning(q: Any, k: Any, v: Any, method: str = "chunk") -> Any:
    """Return lightning attention with alibi rates."""
    from regard.attention import decay_rates, lightning_attention

    return lightning_attention(q, k, v, decay_rates(HEADS), method=method)


def backwards(way: Callable[..., Any], given: Sequence[Any]) -> None:
    """Compute outputs and gradients."""
    way(*(x.detach().requires_grad_() for x in given)).sum().backward()


def with_gradients(given: Sequence[Any], rates: Any, method: str, chunk: int) -> list[Any]:
    """Return outputs, the last state, and gradients of q, k, v and of the first state."""
    import torch

    from regard.attention import lightning_attention

    q = given[0]
    start = torch.linspace(-1, 1, HEADS * q.shape[-1] ** 2, dtype=q.dtype).view(1, HEADS, q.shape[-1], -1)
    leaves = [x.detach().clone().requires_grad_() for x in (*given, start)]
    q, k, v, start = leaves
    out, state = lightning_attention(
        q, k, v, rates, initial_state=start, return_state=True, method=method, chunk_size=chunk
    )
    return [out, state, *torch.autograd.grad(out.sin().sum() + state.cos().sum(), leaves)]


def forget_faster(model: Any) -> None:
    """Raise all rates of a TransNormerLLM by 1 %."""
    for layer in model.model.layers:
        layer.token_mixer.rates = tuple(OFF * rate for rate in layer.token_mixer.rates)


def apart(found: Sequence[Any], exact: Sequence[Any]) -> float:
    """Return the largest difference of tensors, one by one."""
    return max(float((a - b).detach().abs().max()) for a, b in zip(found, exact, strict=True))


def distance(curves: Mapping[str, Sequence[float]], name: str) -> float:
    """Return the largest difference of a curve of losses from that of the masked product."""
    return max(abs(a - b) for a, b in zip(curves[name], curves["whole"], strict=True))


def over(long: Sequence[float], short: Sequence[float], tokens: int = 1) -> list[float]:
    """Return the ratio of times a token, round by round."""
    return [a / b / tokens for a, b in zip(long, short, strict=True)]


def _repeat(work: Callable[[], Any], times: int = 20) -> None:
    for _ in range(times):
        work()
