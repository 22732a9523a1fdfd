"""HiP: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning (Lee et al., arXiv 2406.09827).

SmolLM2-135M-Instruct, untouched but for its attention from the fourth layer on, reads a novel in which a pass
key is hidden, and is asked for it: 1,000 tokens, of which a query reads some 208 (128 found in the tree, a
window of 64, 16 first), and 2,000, of which it reads 336. The prompt is read at once, the key generated from
the cache, with a search for each token, or one for 8, the paper's interval. Controls of the same budget: the
same tree with random scores, a window and first tokens alone, and an oracle, the blocks that dense attention
gives the most weight. From the same runs: the loss on the later half of the novel, and how much of dense
attention is kept.
Status: task, sizes and rules are our choice, after the specification's figures; the paper asks 7B models.
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

    from regard.studies.outcome import Outcome

WAYS = ("dense", "tree", "refresh", "oracle", "random", "window")
READ = ("dense", "tree", "oracle", "random", "window")
LONG = ("dense", "tree", "random", "window")
FOUND = ("tree", "oracle", "random")
KEPT = (*FOUND, "window")


@dataclass(frozen=True)
class Size:
    """Prompts, their lengths and where keys stand in them, the budgets, and whether a tiny model is asked."""

    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7)
    length: int = 1000
    k: int = 128
    long_depths: tuple[float, ...] = (0.1, 0.45, 0.8)
    long_length: int = 2000
    long_k: int = 256
    window: int = 64
    exact_length: int = 300
    tiny: bool = False


def nats(name: str, about: str, over: str = "prompts", high: float = float("inf")) -> Quantity:
    low = -float("inf") if high == 0 else 0.0
    return Quantity(name=name, about=about, over=over, low=low, high=high, unit="nats")


def share(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=about, over="prompts", low=0, high=1, unit="%")


def rule(comparison: str, measure: str, control: str, threshold: float = 0.0, **options: Any) -> Rule:
    return Rule(
        measure=measure, comparison=comparison, threshold=threshold, control=control, paired=True, **options
    )


above, below, within = (partial(rule, comparison) for comparison in ("above", "below", "within"))
READS = Rule(measure="right_dense", comparison="above", threshold=0.6)
TOLD = {
    "dense": "dense attention",
    "tree": "HiP",
    "refresh": "HiP, a search for 8 tokens",
    "oracle": "the blocks of the most dense weight",
    "random": "the tree with random scores",
    "window": "a window and first tokens",
}


@study("hip-attention")
class HiPStudy(Study):
    """Does a tree search find, untrained, the few keys that a pretrained model needs?"""

    title = "HiP: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning"
    paper = "Lee et al. 2024, arXiv 2406.09827"
    quantities = (
        Quantity(name="error", about="logits where all is found, against dense", over="draws", low=0),
        Quantity(name="unlike", about="logits where little is, against dense", over="draws", low=0),
        *(nats(f"key_{way}", f"log-probability of the key's tokens, {TOLD[way]}", high=0) for way in WAYS),
        *(share(f"right_{way}", f"keys generated right, {TOLD[way]}") for way in WAYS),
        *(nats(f"loss_{way}", f"loss on the novel, {TOLD[way]}") for way in READ),
        *(share(f"kept_{way}", f"dense attention that is kept, {TOLD[way]}") for way in KEPT),
        *(share(f"recall_{way}", f"heaviest 64 far keys that are kept, {TOLD[way]}") for way in FOUND),
        *(nats(f"long_{way}", f"as key_{way}, of 2,000 tokens", "long prompts", 0) for way in LONG),
    )
    claims = (
        Claim(
            name="exact",
            text="Where the budget covers the text, the model is as it was.",
            rules=(below("error", "unlike", factor=1e-3),),
            main=True,
        ),
        Claim(
            name="retrieval",
            text="A pass key is found as by dense attention, within half a nat.",
            rules=(within("key_dense", "key_tree", 0.5),),
            needs=(READS,),
            main=True,
            paper="pass keys found as by dense attention",
        ),
        Claim(
            name="search",
            text="It is the search that finds it: the same tree with random scores does not.",
            rules=(above("key_tree", "key_random", 0.5), above("right_tree", "right_random", 0.3)),
            needs=(READS,),
            main=True,
        ),
        Claim(
            name="streaming",
            text="A window and first tokens of the same budget do not find it.",
            rules=(above("key_tree", "key_window", 0.5), above("right_tree", "right_window", 0.3)),
            needs=(READS,),
            main=True,
            paper="StreamingLLM fails on pass keys",
        ),
        Claim(
            name="longer",
            text="The same holds at 2,000 tokens with twice the budget.",
            rules=(
                within("long_dense", "long_tree", 0.5),
                above("long_tree", "long_random", 0.5),
                above("long_tree", "long_window", 0.5),
            ),
        ),
        Claim(
            name="kept",
            text="It keeps more of dense attention than the random tree and than the window.",
            rules=(above("kept_tree", "kept_random"), above("kept_tree", "kept_window")),
        ),
        Claim(
            name="oracle",
            text="The best blocks there are would keep less than 5 % more of it.",
            rules=(below("kept_oracle", "kept_tree", 0.05),),
        ),
        Claim(
            name="language",
            text="Its loss on the novel is less than 0.05 nats above dense, and below the random tree's.",
            rules=(below("loss_tree", "loss_dense", 0.05), below("loss_tree", "loss_random")),
            paper="perplexity as with dense attention",
        ),
        Claim(
            name="window_language",
            text="On the novel it loses less than the window does.",
            rules=(below("loss_tree", "loss_window"),),
        ),
        Claim(
            name="refresh",
            text="One search serves 8 generated tokens about as well as one for each.",
            rules=(within("key_refresh", "key_tree", 0.5),),
            needs=(READS,),
            paper="the interval of all its commands",
        ),
    )
    full = Size()
    quick = Size(
        depths=(0.3,), length=200, k=16, long_depths=(0.5,), long_length=260, long_k=32, window=16,
        exact_length=90, tiny=True,
    )  # fmt: skip

    model: Any
    tokenizer: Any

    def prepare(self) -> None:
        from regard.studies.hip_attention_parts import subject

        self.model, self.tokenizer = subject(self.size.tiny)

    def steps(self) -> Iterable[Step]:
        size = self.size
        for draw in range(3):
            yield Step(f"exact, draw {draw}", partial(self.exact, draw))
        for key, depth in enumerate(size.depths):
            for way in WAYS:
                yield Step(f"key {key}, {way}", partial(self.ask, way, depth, key))
        for key, depth in enumerate(size.long_depths):
            for way in LONG:
                cost = size.long_length / size.length
                yield Step(f"long key {key}, {way}", partial(self.ask_long, way, depth, key), cost=cost)

    def exact(self, draw: int) -> dict[str, float]:
        """Compare the model's logits where all is found, and where little is, with its own."""
        from regard.studies.hip_attention_parts import exactness

        return exactness(self.model, self.tokenizer, self.size.exact_length, self._seed(draw))

    def ask(self, way: str, depth: float, key: int) -> dict[str, Any]:
        """Ask for a key in one way; with dense attention, measure what others keep of it."""
        size = self.size
        kept = KEPT if way == "dense" else ()
        return self._asked(way, size.length, depth, key, size.k, kept)

    def ask_long(self, way: str, depth: float, key: int) -> dict[str, Any]:
        """The same of a longer text."""
        size = self.size
        return self._asked(way, size.long_length, depth, key, size.long_k, ())

    def _asked(
        self, way: str, length: int, depth: float, key: int, k: int, kept: Sequence[str]
    ) -> dict[str, Any]:
        from regard.studies.hip_attention_parts import asked
        from regard.tasks.passkey import Passkey

        hidden = Passkey(length=length, depth=depth, seed=self._seed(key))
        layers = 0 if self.size.tiny else 3
        return asked(
            self.model, self.tokenizer, hidden, way, k=k, window=self.size.window, dense_layers=layers,
            kept=kept,
        )  # fmt: skip

    def _seed(self, number: int) -> int:
        return 1000 * self.seed + number

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        exact = [told for name, told in results.items() if name.startswith("exact")]
        keys, longer = range(len(self.size.depths)), range(len(self.size.long_depths))
        return {
            **{name: [told[name] for told in exact] for name in ("error", "unlike")},
            **{
                f"{what}_{way}": [results[f"key {n}, {way}"][what] for n in keys]
                for what, ways in (("key", WAYS), ("right", WAYS), ("loss", READ))
                for way in ways
            },
            **{
                f"{what}_{way}": [mean(results[f"key {n}, dense"][what][way]) for n in keys]
                for what, ways in (("kept", KEPT), ("recall", FOUND))
                for way in ways
            },
            **{f"long_{way}": [results[f"long key {n}, {way}"]["key"] for n in longer] for way in LONG},
        }

    def details(self, results: Results) -> dict[str, Any]:
        kept = [results[f"key {n}, dense"]["kept"] for n in range(len(self.size.depths))]
        by_layer = {
            way: [mean(layer) for layer in zip(*(told[way] for told in kept), strict=True)] for way in KEPT
        }
        longer = range(len(self.size.long_depths))
        right = {way: int(sum(results[f"long key {n}, {way}"]["right"] for n in longer)) for way in LONG}
        said = ", ".join(f"{TOLD[way]} {count}" for way, count in right.items())
        return {
            "kept_by_layer": by_layer,
            "first_layer": 0 if self.size.tiny else 3,
            "long_right": right,
            "remarks": [f"Of {len(longer)} keys in 2,000 tokens were generated right: {said}."],
        }

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.hip_attention_picture import draw

        draw(outcome, figure)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
