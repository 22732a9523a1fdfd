"""Training of classifiers of texts, with adversarial attention or without, in the one loop of `loop.py`.

    loss = mean cross-entropy + lambda_s (what the adversary adds)
    lambda_s = lambda min(1, s / ramp)                     ramp: an epoch for a virtual adversary, else none

Every text with a label is seen once an epoch, in an order that depends on the seed and the epoch alone; texts
without a label are mixed in. accelerate chooses the device and the mixed precision.

Source: Kitada and Iyatomi, 2020 and 2021, arXiv 2009.12064 and 2104.08763; optimiser and schedule as in
`schedule.py`. Status: partly our choice (the ramp, the schedule).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import RegardError, ShapeMismatch
from regard.objectives.accelerated import accelerated
from regard.objectives.adversarial.loss import AdversarialLoss, Adversary
from regard.objectives.adversarial.virtual import AttentionVirtualAdversary
from regard.objectives.checkpoint import Log
from regard.objectives.loop import Loop, in_words
from regard.objectives.mixed_batches import MixedBatches, Padding, Row
from regard.objectives.schedule import PRECISIONS, Schedule, check_count, device_of
from regard.runtime.edits.targets import Layer
from regard.tasks.labelled import Labelled

EPOCHS = 8


@dataclass(frozen=True, kw_only=True)
class TextRecipe(Schedule):
    """How to train a classifier of texts; a batch is of texts with a label.

    Attributes:
        longest: tokens of a text; what is beyond is cut off.
        ratio: texts without a label for each with one.
        ramp: epochs in which lambda grows; default 1 for a virtual adversary and 0 otherwise.
        accumulate: pieces that a batch is computed in, to save memory.
        precision: "no", or "bf16" for bfloat16 where that is safe.
    """

    batch: int = 32
    rate: float = 1e-3
    decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    longest: int = 256
    ratio: float = 1.0
    ramp: float | None = None
    accumulate: int = 1
    precision: str = "no"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("longest", self.longest, 1)
        check_count("accumulate", self.accumulate, 1)
        for name in ("ratio", "ramp"):
            if not 0 <= (getattr(self, name) or 0) < float("inf"):
                raise RegardError(f"{name} is {getattr(self, name)}; it must be a finite number from 0.")
        if self.precision not in PRECISIONS:
            raise RegardError(f"precision is {self.precision!r}; it must be one of {', '.join(PRECISIONS)}.")


def train_texts(
    model: nn.Module,
    tokenizer: Any,
    data: Labelled,
    *,
    adversary: Adversary | None = None,
    unlabelled: Iterable[str] = (),
    layers: Sequence[Layer] | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    recipe: TextRecipe | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    device: str | None = None,
    about: Mapping[str, Any] | None = None,
    tick: Callable[[float], None] | None = None,
    **options: Any,
) -> Log:
    """Train a classifier of texts in place, and return how it went.

    Args:
        model: gives logits [B, classes] of `input_ids` and `attention_mask`: an `AttendingClassifier`, or one
            of transformers for sequence classification.
        tokenizer: of transformers, with a padding token.
        data: as `read_labelled(path)` gives it.
        adversary: `AttentionAdversary`, `AttentionVirtualAdversary`, or None for plain training.
        unlabelled: texts without a label, which a virtual adversary alone has a use for.
        layers: of a model of transformers, whose scores are perturbed; default all.
        epochs: times that each text is seen; 8 by default, as in the paper.
        steps: optimiser steps, in place of `epochs`.
        recipe: all that makes a `TextRecipe`, in place of `epochs`, `steps` and `options`.
        out, resume, evaluate_every, checkpoint_every, device, about, tick: as for `train_images`.
        options: fields of `TextRecipe`, as in `rate=2e-3, batch=16`.

    Returns:
        The losses of every step, and held-out loss and accuracy.

    Raises:
        RegardError: where an argument will not do, the file in `out` is of another training, texts without a
            label come without a virtual adversary, or the loss is no longer finite.
        ShapeMismatch: where the model has another number of classes.

    Example:
        >>> from regard.models.attending import AttendingClassifier
        >>> from regard.tasks.labelled import reviews, word_tokenizer
        >>> from regard.objectives.adversarial import AttentionAdversary
        >>> data = reviews(32, 8)
        >>> words = word_tokenizer([text for text, _ in data.train])
        >>> model = AttendingClassifier(len(words))
        >>> adversary = AttentionAdversary(eps=1.0)
        >>> log = train_texts(model, words, data, adversary=adversary, steps=2, device="cpu")
        >>> len(log.losses), sorted(log.measures[-1][1])
        (2, ['accuracy'])
    """
    pool = list(unlabelled)
    if pool and not isinstance(adversary, AttentionVirtualAdversary):
        raise RegardError("texts without a label were given; an AttentionVirtualAdversary alone uses them.")
    _check(model, data)
    recipe = recipe or recipe_of(data, epochs, steps, **options)
    loss_of = AdversarialLoss(model, adversary, layers)
    batches = _Batches(tokenizer, data, pool, recipe)
    epoch, ramp = len(batches.order), _ramp(recipe, adversary)
    told = {"recipe": asdict(recipe), "adversary": describe(adversary), "data": batches.digest(),
            "layers": None if layers is None else list(layers), "about": dict(about or {})}  # fmt: skip
    with accelerated(device, recipe.precision, recipe.accumulate, "train_texts") as accelerator:
        model.to(accelerator.device)

        def descend(step: int) -> float:
            total = 0.0
            for batch, share in batches.pieces(step, accelerator.device):
                with accelerator.autocast():
                    loss, _ = loss_of(batch, min(1.0, (step + 1) / (ramp * epoch)) if ramp else 1.0)
                accelerator.backward(loss * share * recipe.accumulate)
                total += float(loss.detach()) * share
            return total

        def judge() -> tuple[float, dict[str, float]]:
            loss, right = held_out(model, tokenizer, data, recipe.batch, recipe.longest)
            return loss, {"accuracy": right}

        return Loop(
            model=model, recipe=recipe, descend=descend, judge=judge, told=told, out=out, resume=resume,
            evaluate_every=epoch if evaluate_every is None else evaluate_every,
            checkpoint_every=epoch if checkpoint_every is None else checkpoint_every,
            tick=tick, words=_words,
        ).run()  # fmt: skip


def recipe_of(
    data: Labelled, epochs: int | None = None, steps: int | None = None, **options: Any
) -> TextRecipe:
    """Return a recipe of so many epochs, or steps, over the training part of some data."""
    if epochs is not None and steps is not None:
        raise RegardError("both epochs and steps were given; give one.")
    if steps is None:
        epochs = EPOCHS if epochs is None else epochs
        check_count("epochs", epochs, 1)
        batch = TextRecipe.of("train_texts", **options).batch
        steps = epochs * -(-len(data.train) // min(batch, len(data.train)))
    return TextRecipe.of("train_texts", **options, steps=steps)


def describe(adversary: Adversary | None) -> dict[str, Any] | None:
    """Return what an adversary is, as JSON holds it."""
    if adversary is None:
        return None
    fields = {name: value for name, value in vars(adversary).items() if name != "generator"}
    return {"kind": type(adversary).__name__, **fields}


@torch.no_grad()
def held_out(
    model: nn.Module, tokenizer: Any, data: Labelled, batch: int = 32, longest: int = 256
) -> tuple[float, float]:
    """Return the mean loss in nats, and the share of held-out texts that are told rightly."""
    was_training, device = model.training, device_of(model)
    model.eval()
    total, right = 0.0, 0
    for part in coded(tokenizer, data.held_out, batch, longest):
        inputs = {name: x.to(device) for name, x in part.items()}
        labels = inputs.pop("labels")
        logits = model(**inputs).logits.float()
        total += float(F.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(1) == labels).sum())
    model.train(was_training)
    return total / len(data.held_out), right / len(data.held_out)


def rows_of(tokenizer: Any, texts: Sequence[str], longest: int) -> list[list[int]]:
    """Return the token ids of texts, cut where they are too long."""
    found = tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"] if texts else []
    return [list(ids) for ids in found]


def coded(
    tokenizer: Any, pairs: Sequence[tuple[str, int]], batch: int, longest: int
) -> list[dict[str, Tensor]]:
    """Return batches of texts in their order: `input_ids`, `attention_mask` [B, T] and `labels` [B]."""
    rows: list[Row] = [
        {"input_ids": ids, "labels": label}
        for ids, (_, label) in zip(
            rows_of(tokenizer, [text for text, _ in pairs], longest), pairs, strict=True
        )
    ]
    pad = Padding(pad_of(tokenizer))
    return [pad(rows[start : start + batch]) for start in range(0, len(rows), batch)]


def pad_of(tokenizer: Any) -> int:
    """Return the token that stands for nothing.

    Raises:
        RegardError: where there is none.
    """
    if tokenizer.pad_token_id is None:
        raise RegardError("the tokenizer has no padding token; set tokenizer.pad_token first.")
    return int(tokenizer.pad_token_id)


class _Batches:
    """What each step reads, in pieces."""

    def __init__(self, tokenizer: Any, data: Labelled, pool: list[str], recipe: TextRecipe) -> None:
        texts = rows_of(tokenizer, [text for text, _ in data.train], recipe.longest)
        self.rows: list[Row] = [
            {"input_ids": ids, "labels": label} for ids, (_, label) in zip(texts, data.train, strict=True)
        ]
        labelled = len(self.rows)
        self.rows += [{"input_ids": ids} for ids in rows_of(tokenizer, pool, recipe.longest)]
        lengths = [len(row["input_ids"]) for row in self.rows]
        self.order = MixedBatches(lengths, labelled, recipe.batch, recipe.ratio, recipe.seed)
        self.pad, self.count = Padding(pad_of(tokenizer)), recipe.accumulate

    def pieces(self, step: int, device: torch.device) -> list[tuple[dict[str, Tensor], float]]:
        """Batches, each with its share of the texts with a label."""
        chosen = self.order.at(step)
        known = [row for row in chosen if row < self.order.labelled]
        others = chosen[len(known) :]
        count = min(self.count, len(known))
        found = []
        for number in range(count):
            part = known[number::count]
            batch = self.pad([self.rows[row] for row in (*part, *others[number::count])])
            found.append(({name: x.to(device) for name, x in batch.items()}, len(part) / len(known)))
        return found

    def digest(self) -> str:
        """What tells these texts from others."""
        import hashlib
        import json

        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()[:16]


def _ramp(recipe: TextRecipe, adversary: Adversary | None) -> float:
    if recipe.ramp is not None:
        return recipe.ramp
    return 1.0 if isinstance(adversary, AttentionVirtualAdversary) else 0.0


def _check(model: nn.Module, data: Labelled) -> None:
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    if labels not in (None, len(data.names)):
        raise ShapeMismatch(
            f"the model has {labels} classes (num_labels), and the data {len(data.names)}: "
            f"{', '.join(data.names)}."
        )


def _words(log: Log) -> str:
    accuracy = f", {log.measures[-1][1]['accuracy']:.1%} right" if log.measures else ""
    return in_words(log) + accuracy
