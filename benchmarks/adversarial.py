"""What does a step of training cost with adversarial attention, beside a plain step on the same texts?

A step is forward, backward and the optimizer's, in seconds of the processor on one thread, so that what else
runs hardly counts. `bilstm` is the model of the paper, a BiLSTM of 128 a direction on embeddings of 300 with
tanh attention; `encoder` a BERT of four layers of 128, every one perturbed. `at` is measured as training runs
it and with the gradient of the clean loss taken twice (`at_twice`), `vat` on texts with labels; `mixed` has
labels for half of the texts. Before that, losses and gradients are held to the passes written out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.timing import interleaved
from regard.objectives.adversarial import (
    AdversarialLoss,
    AttentionAdversary,
    AttentionVirtualAdversary,
)
from regard.objectives.adversarial.reach import reach

BATCH, WORDS, EPS = 32, 8000, 1.0
TOLERANCE = {"at": 2e-5, "vat": 1e-3}
"""A power step is as exact as the difference of two predictions."""
MOST = {"at": 2.2, "vat": 3.2}
Batch = dict[str, Tensor]


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return a row a model and length."""
    torch.set_grad_enabled(True)
    torch.set_num_threads(1)
    quick = options.quick
    rounds = options.rounds or (1 if quick else 15)
    return [
        _row(kind, length, rounds, quick)
        for kind in ("bilstm", "encoder")
        for length in ([8] if quick else [24, 64])
    ]


def _row(kind: str, length: int, rounds: int, quick: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = (_bilstm if kind == "bilstm" else _encoder)(quick)
    batch = _texts(4 if quick else BATCH, length, quick)
    _check(kind, model, batch)
    times = interleaved(_steps(model.train(), batch), rounds, extra=0)
    ratios = {name: times.ratio(name, "plain") for name in ("at", "at_twice", "vat", "mixed")}
    return {
        "case": [kind, length],
        "parameters": sum(p.numel() for p in model.parameters()),
        "plain_ms": 1e3 * times.median("plain"),
        **{f"{name}_over_plain": ratio for name, ratio in ratios.items()},
        "within": all(ratios[name] <= most for name, most in MOST.items()),
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def _bilstm(quick: bool) -> nn.Module:
    from regard.models.attending_pretrained import AttendingConfig, AttendingModel

    return AttendingModel(AttendingConfig(200 if quick else WORDS, dim=300, hidden_size=256, num_labels=2))


def _encoder(quick: bool) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    width = 32 if quick else 128
    config = BertConfig(
        vocab_size=200 if quick else WORDS, hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=2 if quick else 4, num_attention_heads=4, num_labels=2,
        initializer_range=0.1,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def _texts(count: int, length: int, quick: bool) -> Batch:
    """Texts between half the length and all of it."""
    ids = torch.randint(5, 200 if quick else WORDS, (count, length))
    lengths = torch.randint(length // 2, length + 1, (count, 1))
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.randint(2, (count,))}


def _steps(model: nn.Module, batch: Batch) -> dict[str, Callable[[], float]]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    port = reach(model)
    valid = port.valid(batch["attention_mask"])
    at, vat = AttentionAdversary(eps=EPS), AttentionVirtualAdversary(eps=EPS)
    half = dict(batch, labels=batch["labels"].where(torch.arange(len(batch["labels"])) % 2 == 0, -100))

    def step(loss_of: Callable[[], Tensor]) -> Callable[[], float]:
        def work() -> float:
            started = time.process_time()
            optimizer.zero_grad(set_to_none=True)
            loss_of().backward()
            optimizer.step()
            return time.process_time() - started

        return work

    def twice() -> Tensor:
        logits_of = port.reader(**inputs)
        return at(lambda added: F.cross_entropy(logits_of(added), batch["labels"]), valid)[0]

    with_at, with_vat = AdversarialLoss(model, at), AdversarialLoss(model, vat)
    return {
        "plain": step(lambda: F.cross_entropy(model(**inputs).logits, batch["labels"])),
        "at": step(lambda: with_at(batch)[0]),
        "at_twice": step(twice),
        "vat": step(lambda: with_vat(batch)[0]),
        "mixed": step(lambda: with_vat(half)[0]),
    }


def _check(kind: str, model: nn.Module, batch: Batch) -> None:
    """Hold loss and gradients of AT to two passes written out, and those of VAT to four."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    port = reach(model)
    valid, logits_of = port.valid(batch["attention_mask"]), port.reader(**inputs)
    _, told = AttentionAdversary(eps=EPS)(
        lambda added: F.cross_entropy(logits_of(added), batch["labels"]), valid
    )
    fresh = port.reader(**inputs)
    zero = tuple(torch.zeros(m.shape) for m in valid)
    plain = F.cross_entropy(fresh(zero), batch["labels"])
    expected = plain + F.cross_entropy(fresh(told.perturbation), batch["labels"])
    found = AdversarialLoss(model, AttentionAdversary(eps=EPS))(batch)[0]
    _alike(kind, "at", model, found, expected)
    chance = [torch.Generator().manual_seed(1) for _ in range(2)]
    adversaries = [AttentionVirtualAdversary(eps=EPS, generator=one) for one in chance]
    fresh = port.reader(**inputs)
    added, _ = adversaries[0](fresh, valid)
    expected = F.cross_entropy(fresh(zero), batch["labels"]) + added
    _alike(kind, "vat", model, AdversarialLoss(model, adversaries[1])(batch)[0], expected)


def _alike(kind: str, name: str, model: nn.Module, found: Tensor, expected: Tensor) -> None:
    gradients = []
    for loss in (found, expected):
        model.zero_grad(set_to_none=True)
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    off = float((found - expected).detach().abs())
    for one, other in zip(*gradients, strict=True):
        if one is not None and other is not None:
            off = max(off, float((one - other).abs().max() / other.abs().max().clamp_min(1e-3)))
        elif (one is None) != (other is None):
            off = float("inf")
    if not off <= TOLERANCE[name]:
        raise WrongResult(f"{kind}, {name} is off by {off:.1e}")


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    return answer("adversarial", parser(__doc__).parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
