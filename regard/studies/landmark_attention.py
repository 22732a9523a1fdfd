"""Landmark Attention: Random-Access Infinite Context Length (Mohtashami and Jaggi, 2023, arXiv 2305.16300).

Four parts. The fast paths must be the definition, and a memory that reads one block must not. Models of two
layers learn at 8 blocks to find a block by its tag and a token in it by its slot (`regard.tasks.tagged`);
they are asked at up to 64, over the whole text and reading two blocks: by landmark, by mean key, the last
ones, any. The same with rotary positions, at which blocks are read anew or where they stood. Small language
models, with landmarks and without, are trained at 248 tokens and read 1,984. And SmolLM2 is given landmarks.
Status: tasks, sizes and rules are our choice; the paper trains at 512 tokens for 240,000 steps.
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

BATCH, RATE, BLOCK, LEARNT, OVER = 16, 3e-3, 16, 0.05, 20
BLOCKS = (8, 32, 64)
READ = ("full", "top1", "top2", "mean", "recent", "random")
TEXT_BLOCK, TEXT_TOP = 32, 4
READINGS = ("landmark", "recent", "random", "none")


@dataclass(frozen=True)
class Size:
    """Seeds of each part, steps, what is asked, and whether a tiny model takes the place of SmolLM2."""

    seeds: int = 3
    steps: int = 3000
    asked: int = 32
    blocks: tuple[int, ...] = BLOCKS
    language_steps: int = 250
    language_blocks: int = 8
    long_blocks: int = 64
    windows: int = 6
    tuning_steps: int = 12
    tiny: bool = False


def share(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=about, low=0, high=1, unit="%")


def loss(name: str, about: str, over: str = "seeds") -> Quantity:
    return Quantity(name=name, about=f"loss in nats, {about}", over=over, low=0)


def rule(comparison: str, measure: str, control: str, threshold: float = 0.0, **options: Any) -> Rule:
    return Rule(
        measure=measure, comparison=comparison, threshold=threshold, control=control, paired=True, **options
    )


above, below = partial(rule, "above"), partial(rule, "below")
LEARNS = Rule(measure="full_8", comparison="above", threshold=0.9)


@study("landmark-attention")
class LandmarkAttention(Study):
    """Does a query find the block that it needs by its landmark, in texts longer than those trained on?"""

    title = "Landmark Attention: Random-Access Infinite Context Length for Transformers"
    paper = "Mohtashami and Jaggi 2023, arXiv 2305.16300"
    quantities = (
        Quantity(name="error", about="fast paths against the definition", over="draws", low=0),
        Quantity(name="unlike", about="a memory that reads one block, against it", over="draws", low=0),
        *(share(f"{way}_{n}", f"answers, {way}, at {n} blocks") for n in BLOCKS for way in READ),
        share("found_64", "questions whose block is among the two of the best landmarks, of 64"),
        share("found_random", "the same among two of 64 blocks at random"),
        *(share(f"anew_{n}", f"answers of rotary models, blocks read at new positions, {n}") for n in BLOCKS),
        *(share(f"stood_{n}", f"the same, blocks read where they stood, {n}") for n in BLOCKS),
        loss("trained", "at the length trained on, with landmarks"),
        loss("plain", "the same, softmax without landmarks"),
        *(loss(f"long_{way}", f"long texts, blocks read: {way}") for way in READINGS),
        loss("long_window", "long texts, softmax in a window of as many tokens"),
        loss("long_plain", "long texts, softmax over all, at positions not trained on"),
        loss("tuned", "SmolLM2 with landmarks, fine-tuned", "texts"),
        loss("untuned", "SmolLM2 with landmarks, as it came", "texts"),
        loss("smollm", "SmolLM2 as it is", "texts"),
    )
    claims = (
        Claim(
            name="exact",
            text="Fast paths, and a memory that reads all, are the definition.",
            rules=(below("error", "unlike", factor=1e-3),),
            main=True,
        ),
        Claim(
            name="retrieval",
            text="Trained at 8 blocks, reading two of 64 by landmark answers as reading all does.",
            rules=(
                below("full_64", "top2_64", 0.1),
                above("top2_64", "random_64", 0.5),
                above("top2_64", "recent_64", 0.5),
            ),
            needs=(LEARNS,),
            main=True,
            paper="retrieval from 32k tokens after training at 512",
        ),
        Claim(
            name="found",
            text="The block of the answer is among the two best landmarks.",
            rules=(above("found_64", "found_random", 0.5),),
            needs=(LEARNS,),
        ),
        Claim(
            name="positions",
            text="Far beyond the length trained on, blocks are better read at new positions than at true.",
            rules=(above("anew_64", "stood_64", 0.2),),
            needs=(Rule(measure="anew_8", comparison="above", threshold=0.9),),
            main=True,
        ),
        Claim(
            name="better_than_mean",
            text="Landmarks choose blocks better than the mean key of a block.",
            rules=(above("top2_64", "mean_64", 0.02),),
            needs=(LEARNS,),
        ),
        Claim(
            name="price",
            text="At the length trained on, landmarks cost less than 0.05 nats of language loss.",
            rules=(below("trained", "plain", 0.05),),
            paper="comparable to Transformer-XL",
        ),
        Claim(
            name="language",
            text="In long texts, blocks chosen by landmark lower the loss, more than blocks at random.",
            rules=(below("long_landmark", "long_none"), below("long_landmark", "long_random")),
            main=True,
        ),
        Claim(
            name="farther",
            text="Blocks chosen by landmark lower it more than as many of the last ones.",
            rules=(below("long_landmark", "long_recent"),),
        ),
        Claim(
            name="window",
            text="They lower it below that of a softmax model in a window of as many tokens.",
            rules=(below("long_landmark", "long_window"),),
        ),
        Claim(
            name="tuning",
            text="A dozen steps of fine-tuning bring SmolLM2 with landmarks much of the way back.",
            rules=(below("tuned", "untuned", -0.3), below("tuned", "smollm", 0.5)),
            paper="15,000 steps for LLaMA 7B",
        ),
    )
    full = Size()
    quick = Size(
        seeds=1, steps=2, asked=2, language_steps=2, language_blocks=2, long_blocks=6, windows=1,
        tuning_steps=2, tiny=True,
    )  # fmt: skip

    def steps(self) -> Iterable[Step]:
        for draw in range(3):
            yield Step(f"exact, draw {draw}", exactness, cost=0.02)
        for seed in range(self.size.seeds):
            for kind in ("plain", "rotary"):
                yield Step(f"find, {kind}, seed {seed}", partial(self.find, kind == "rotary", seed))
            yield Step(f"language, seed {seed}", partial(self.language, seed), cost=2)
        yield Step("smollm", self.tune, cost=3)

    def find(self, rotary: bool, seed: int) -> dict[str, Any]:
        """Train a finder; return the share of right answers of each way to read, at each number of blocks."""
        import torch

        from regard.attention import Landmark
        from regard.studies.landmark_attention_parts import Finder, attending, memory
        from regard.tasks.tagged import Tagged

        task, size = Tagged(block=BLOCK), self.size
        torch.manual_seed(1000 * self.seed + seed)
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        model = Finder(task, rotary)
        optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
        losses: list[float] = []
        with one_thread():
            for step in range(size.steps):
                value = model.loss(task.batch(BATCH, BLOCKS[0], generator))
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                losses.append(float(value.detach()))
                self.tick((step + 1) / size.steps)
                if len(losses) >= OVER and sum(losses[-OVER:]) / OVER < LEARNT:
                    break
            found: dict[str, Any] = {"steps": len(losses)}
            ways = {
                "full": Landmark(BLOCK),
                "top1": memory(BLOCK, 1, rotary=rotary),
                "top2": memory(BLOCK, 2, rotary=rotary),
                **{way: memory(BLOCK, 2, way, rotary=rotary) for way in ("mean", "recent", "random")},
                "stood": memory(BLOCK, 2),
            }
            for blocks in size.blocks:
                text = task.batch(size.asked, blocks, generator)
                for way, spec in ways.items():
                    with torch.no_grad(), attending(model, spec):
                        found[f"{way}_{blocks}"] = model.accuracy(text)
                        if way == "top2":
                            found[f"found_{blocks}"] = model.found(text, 2)
        return found

    def language(self, seed: int) -> dict[str, float]:
        """Train small language models with landmarks and without, and read long texts in all ways."""
        from regard.studies.landmark_attention_language import language

        with one_thread():
            return language(self.size, 1000 * self.seed + seed, self.tick)

    def tune(self) -> dict[str, list[float]]:
        """Fine-tune SmolLM2 with landmarks for a few steps; return losses before, after and without."""
        from regard.studies.landmark_attention_language import tune
        from regard.studies.texts import subject

        size = self.size
        model, tokenizer, data = subject(size.tiny)
        return tune(model, tokenizer, data, size.tuning_steps, size.windows, self.seed, self.tick)

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        seeds = range(self.size.seeds)
        plain = [results[f"find, plain, seed {s}"] for s in seeds]
        rotary = [results[f"find, rotary, seed {s}"] for s in seeds]
        texts = [results[f"language, seed {s}"] for s in seeds]
        draws = [told for name, told in results.items() if name.startswith("exact")]
        last = self.size.blocks[-1]
        return {
            **{name: [told[name] for told in draws] for name in ("error", "unlike")},
            **{f"{way}_{n}": [told[f"{way}_{n}"] for told in plain] for n in BLOCKS for way in READ},
            "found_64": [told[f"found_{last}"] for told in plain],
            "found_random": [2 / last for _ in plain],
            **{f"anew_{n}": [told[f"top2_{n}"] for told in rotary] for n in BLOCKS},
            **{f"stood_{n}": [told[f"stood_{n}"] for told in rotary] for n in BLOCKS},
            **{name: [told[name] for told in texts] for name in texts[0]},
            **results["smollm"],
        }

    def details(self, results: Results) -> dict[str, Any]:
        steps = {
            kind: [results[f"find, {kind}, seed {s}"]["steps"] for s in range(self.size.seeds)]
            for kind in ("plain", "rotary")
        }
        never = sum(n >= self.size.steps for told in steps.values() for n in told)
        return {
            "steps": steps,
            "remarks": [
                f"Finders whose loss was not below {LEARNT} after {self.size.steps} steps: {never}.",
                "A guess answers 6 %, and knows the slot of the block asked for in no case.",
                f"Steps until then: {steps}.",
            ],
        }

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.landmark_attention_picture import draw

        draw(outcome, figure)


def exactness() -> dict[str, float]:
    """Compare fast paths with the definition on random inputs, and something that differs."""
    import torch

    from regard.attention import Landmark, LandmarkMemory, landmark_attention

    q, k, v = torch.randn(3, 1, 2, 120, 16, dtype=torch.float64)
    marks = torch.arange(1, 121) % 8 == 0
    expected = landmark_attention(q, k, v, marks, impl="matrix")
    ways = [
        Landmark(8).build()(q, k, v),
        LandmarkMemory(block=8, top_k=15, local=16, positions="true").build()(q, k, v),
    ]
    few = LandmarkMemory(block=8, top_k=1, positions="true").build()(q, k, v)
    return {
        "error": max(float((way - expected).abs().max()) for way in ways),
        "unlike": float((few - expected).abs().max()),
    }
