"""What the study of agreeing explanations trains, explains and counts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regard.lens.explanations import Agreement, Comparison, compare_methods
from regard.lens.explanations.methods import ATTENTION
from regard.models.attending import AttendingClassifier, BagClassifier, Classified, embedded
from regard.studies.classifying_parts import trained
from regard.tasks.labelled import Labelled, reviews, sentences, word_tokenizer

GRADIENTS = ("gradxinput", "ig", "deeplift", "occlusion")
ATTRIBUTIONS = ("gradnorm", "gradxinput", "ig", "gradshap", "occlusion", "lime")
OF_MODEL = {
    "bilstm": ("average", "norm"),
    "transformer": ("average", "norm", "rollout", "flow", "norm-rollout"),
}
PROMPTED = ("gradnorm", "gradxinput", "ig", "gradshap", "occlusion", "average", "norm", "rollout", "flow")
MEASURES: dict[str, dict[str, Any]] = {
    "kendall": {}, "top 5": {"measure": "topk", "k": 5}, "weighted": {"measure": "weighted"},
    "kendall, first token dropped": {"drop_first": True},
}  # fmt: skip
BATCH = 32
TRAINED_ON = {"reviews": 4000, "sentences": 8000}
RATES = {"bilstm": 3e-3, "transformer": 1e-3}
Tick = Callable[[float], None]


class Real(nn.Module):
    """A classifier that is told which of its tokens are padding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Any:
        return self.model(input_ids=ids, attention_mask=(ids != 0).long())


class XorClassifier(nn.Module):
    """Logits of a layer of rectified units over the sum of the embeddings."""

    def __init__(self, vocabulary: int, dim: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.network = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, 2))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Classified:
        e, mask = embedded(self.embed, input_ids, attention_mask, inputs_embeds)
        return Classified(self.network((e * mask[..., None]).sum(1)))


def known_case(seed: int, texts: int, samples: int, steps: int) -> dict[str, Any]:
    """Return how far methods agree on a linear classifier, where they must, and on an XOR, where not.

    A text of the linear one has twelve different words of 200, of the XOR twelve of 20 with words 0 and 1.
    """
    torch.manual_seed(seed)
    source = random.Random(seed)
    linear = BagClassifier(204).double().eval()
    found: dict[str, Any] = {}
    ids = [[4 + word for word in source.sample(range(200), 12)] for _ in range(texts)]
    told = _explained(linear, None, ids, (*GRADIENTS, "lime"), samples, "zero", "logit", seed)
    agreed = told.agreement()
    found["linear"] = {"same": _least(agreed, GRADIENTS), "lime": mean_of(agreed, "gradxinput", "lime"),
                       "random": mean_of(agreed, "gradxinput", "random")}  # fmt: skip
    xor, right = _trained_xor(seed, steps)
    both = [source.sample([4, 5, *source.sample(range(6, 24), 10)], 12) for _ in range(texts)]
    told = _explained(xor, None, both, GRADIENTS, samples, "zero", "logit", seed)
    found["xor"] = {"same": _least(told.agreement(), GRADIENTS), "accuracy": right}
    return found


def _trained_xor(seed: int, steps: int) -> tuple[nn.Module, float]:
    generator = torch.Generator().manual_seed(seed)

    def batch(count: int = 64) -> tuple[Tensor, Tensor]:
        ids = 6 + torch.rand(count, 18, generator=generator).argsort(1)[:, :12]
        there = torch.rand(count, 2, generator=generator) < 0.5
        for word in (0, 1):
            ids[:, word] = torch.where(there[:, word], 4 + word, ids[:, word])
        return ids, (there[:, 0] ^ there[:, 1]).long()

    model = trained(XorClassifier(24), batch, steps, 1e-2, lambda share: None)
    ids, labels = batch(500)
    with torch.no_grad():
        return model.double(), float((model(input_ids=ids).logits.argmax(1) == labels).float().mean())


def classifier_case(
    kind: str, task: str, seed: int, texts: int, samples: int, steps: int, tick: Tick
) -> dict[str, Any]:
    """Train a classifier on a task, and return how its explanations of held-out texts agree."""
    torch.manual_seed(seed)
    data = {"reviews": reviews, "sentences": sentences}[task](TRAINED_ON[task], seed=seed)
    tokenizer = word_tokenizer([text for text, _ in data.train])
    model = trained_classifier(kind, data, tokenizer, seed, steps, lambda share: tick(share / 2))
    chosen = [text for text, _ in data.held_out[:texts]]
    done = iter(range(1, texts + 1))
    told = compare_methods(
        model, tokenizer, chosen, (*ATTRIBUTIONS, *OF_MODEL[kind]), samples=samples, seed=seed,
        tick=lambda: tick(0.5 + next(done) / (2 * texts)),
    )  # fmt: skip
    return {**summary(told), "accuracy": accuracy(model, tokenizer, data)}


def trained_classifier(
    kind: str, data: Labelled, tokenizer: Any, seed: int, steps: int, tick: Tick
) -> nn.Module:
    """Return a small classifier of a kind in `OF_MODEL`, in evaluation mode."""
    from regard.models.tiny_distilbert import tiny_distilbert

    kinds: dict[str, Callable[[int], Any]] = {"bilstm": AttendingClassifier, "transformer": tiny_distilbert}
    model = kinds[kind](len(tokenizer))
    ids, labels = _padded(tokenizer, data.train)
    generator = torch.Generator().manual_seed(seed)

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(ids), (BATCH,), generator=generator)
        longest = int((ids[rows] != 0).sum(1).max())
        return ids[rows, :longest], labels[rows]

    trained(Real(model), batch, steps, RATES[kind], tick)
    return model.eval()


def accuracy(model: nn.Module, tokenizer: Any, data: Labelled) -> float:
    """Return the share of held-out texts that are told rightly."""
    ids, labels = _padded(tokenizer, data.held_out)
    with torch.no_grad():
        return float((Real(model)(ids).logits.argmax(1) == labels).float().mean())


def _padded(tokenizer: Any, pairs: Iterable[tuple[str, int]]) -> tuple[Tensor, Tensor]:
    texts, labels = zip(*pairs, strict=True)
    coded = tokenizer(list(texts), padding=True, return_tensors="pt")
    return coded["input_ids"], torch.tensor(labels)


def prompt_case(model: Any, tokenizer: Any, pair: Any, steps: int, seed: int) -> dict[str, Any]:
    """Return how explanations of one prompt of the language model agree, integrated gradients as they are."""
    told = compare_methods(
        model, tokenizer, [pair.clean], PROMPTED, (pair.correct[0], pair.wrong[0]), baseline=0, steps=steps,
        most_steps=steps, faithful=False, seed=seed,
    )  # fmt: skip
    return summary(told, unconverged=True)


def summary(told: Comparison, unconverged: bool = False) -> dict[str, Any]:
    """Return agreement of all pairs by several measures, gains over random orders, and errors."""
    agreed = {name: told.agreement(**options, unconverged=unconverged) for name, options in MEASURES.items()}
    rows = told.faithfulness.rows() if told.faithful else ()
    gains = {row["method"]: [row["deletion"], row["insertion"]] for row in rows}
    ig = told.explanations["ig"]
    return {
        "pairs": {name: pair_means(found) for name, found in agreed.items()},
        "within_chance": float(np.mean([not a for a in _told(agreed["kendall"])])),
        "gains": gains,
        "ig_error": [float(e.error or 0.0) for e in ig],
        "ig_difference": [e.value - e.value_baseline for e in ig],
        "ig_converged": fmean(e.converged for e in ig),
        "tokens": fmean(len(e.tokens) for e in ig),
        "seconds": dict(told.seconds),
    }


def pair_means(found: Agreement) -> dict[str, float | None]:
    """Return `first|second` -> mean over texts; None where no text defines it."""
    mean = found.mean
    return {
        f"{found.methods[i]}|{found.methods[j]}": None
        if np.isnan(mean[i, j])
        else round(float(mean[i, j]), 5)
        for i in range(len(found.methods))
        for j in range(i + 1, len(found.methods))
    }


def _told(found: Agreement) -> list[bool]:
    size = len(found.methods) - 1
    return [bool(found.told[i, j]) for i in range(size) for j in range(i + 1, size)]


def mean_of(found: Agreement, first: str, second: str) -> float:
    return float(np.nanmean(found.of(first, second)))


def _least(found: Agreement, names: Sequence[str]) -> float:
    return min(mean_of(found, a, b) for i, a in enumerate(names) for b in names[i + 1 :])


def _explained(
    model: nn.Module, tokenizer: Any, ids: Sequence[Any], methods: Sequence[str], samples: int, baseline: Any,
    of: str, seed: int,
) -> Comparison:  # fmt: skip
    return compare_methods(
        model, tokenizer, ids, methods, baseline=baseline, of=of, samples=samples, seed=seed, faithful=False
    )


def kind_of(pair: str) -> str:
    """Return what a pair is: two attributions, attention and an attribution, two of attention, or other."""
    names = pair.split("|")
    if any(name == "random" or name.endswith(" again") for name in names):
        return "other"
    return ("attributions", "mixed", "attention")[sum(name in ATTENTION for name in names)]
