"""Training and attacking small attending classifiers, for the studies of adversarial attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from regard.models.attending import AttendingClassifier
from regard.objectives.adversarial import AttentionAdversary, AttentionVirtualAdversary, reach
from regard.objectives.adversarial.attack import robustness_curve
from regard.objectives.adversarial.directions import random_unit, scaled
from regard.objectives.adversarial.loss import Adversary
from regard.objectives.adversarial.measures import measure_attention
from regard.objectives.adversarial.reach import Reach
from regard.objectives.adversarial.virtual import divergence
from regard.objectives.texts import coded, train_texts
from regard.studies.threads import one_thread
from regard.tasks.cue_words import CueSentences
from regard.tasks.labelled import Labelled, word_tokenizer

RATE, LONGEST, CHUNK, NEVER = 3e-3, 64, 100, 10**9
CURVE = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
Tick = Callable[[float], None]


def adversary_of(name: str, eps: float) -> Adversary | None:
    """Return the adversary of a condition: `none`, a variant, or `vat` and `random_vat`."""
    if name == "none":
        return None
    if name in ("vat", "random_vat"):
        return AttentionVirtualAdversary(eps=eps, variant="vat" if name == "vat" else "random")
    return AttentionAdversary(eps=eps, variant=name)  # type: ignore[arg-type]


def trained_and_judged(
    data: Labelled, name: str, *, epochs: int, eps: float, seed: int, tick: Tick,
    unlabelled: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Train a BiLSTM with tanh attention under a condition, and return how it bears attacks.

    Returns:
        `accuracy`, `attacked` and `loss` by eps of `CURVE`, and the same under random perturbations, means of
        `correlation`, `entropy` and, where the words that matter are known, `mass` and `auprc`.
    """
    tokenizer = word_tokenizer([text for text, _ in data.train], framed=False)
    torch.manual_seed(seed)
    model = AttendingClassifier(len(tokenizer))
    with one_thread():
        train_texts(
            model, tokenizer, data, adversary=adversary_of(name, eps), unlabelled=unlabelled, epochs=epochs,
            rate=RATE, seed=seed, device="cpu", evaluate_every=NEVER, checkpoint_every=NEVER, tick=tick,
        )  # fmt: skip
        batches = coded(tokenizer, data.held_out, CHUNK, LONGEST)
        return _judged(reach(model.eval()), batches, _evidence(data, tokenizer, batches), eps, seed)


def _judged(
    port: Reach, batches: list[dict[str, Tensor]], evidence: list[Tensor] | None, eps: float, seed: int
) -> dict[str, Any]:
    curve = robustness_curve(port, batches, CURVE, seed=seed).columns
    told = measure_attention(port, batches, evidence)
    by_eps = {f"{size:g}": at for at, size in enumerate(CURVE)}
    return {
        "accuracy": curve["accuracy"][0],
        "attacked": {size: curve["accuracy"][at] for size, at in by_eps.items()},
        "loss": {size: curve["loss"][at] for size, at in by_eps.items()},
        "random": {size: curve["random_accuracy"][at] for size, at in by_eps.items()},
        **{name: told.mean(name).value for name in told.values},
        "directions": _directions(port, batches, eps, seed),
    }


def _evidence(data: Labelled, tokenizer: Any, batches: list[dict[str, Tensor]]) -> list[Tensor] | None:
    if not isinstance(data, CueSentences):
        return None
    known = tokenizer.get_vocab()
    ids = torch.tensor([known[word] for word in sorted(data.evidence) if word in known])
    return [torch.isin(batch["input_ids"], ids) for batch in batches]


def _directions(port: Reach, batches: list[dict[str, Tensor]], eps: float, seed: int) -> dict[str, float]:
    """Return the shares of texts whose loss `at` and `published` raise, and what a power step does to KL."""
    raised: dict[str, list[Tensor]] = {name: [] for name in ("at", "published")}
    kl: dict[str, list[Tensor]] = {"power": [], "start": []}
    for batch in batches:
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        labels, valid = batch["labels"], port.valid(batch["attention_mask"])
        logits_of = port.reader(**inputs)
        added = tuple(torch.zeros(m.shape, requires_grad=True) for m in valid)
        losses = _losses(logits_of(added), labels)
        gradient = torch.autograd.grad(losses.sum(), added, retain_graph=True)
        for name, found in raised.items():
            r = AttentionAdversary(eps=eps, variant=name).perturbation(gradient, valid)  # type: ignore[arg-type]
            found.append(_losses(logits_of(r), labels) > losses)
        held = logits_of(added).detach()
        _, told = AttentionVirtualAdversary(eps=1.0, generator=_generator(seed))(logits_of, valid, held)
        start = scaled(random_unit(valid, _generator(seed)), 1.0)
        kl["power"].append(told.divergence)
        kl["start"].append(divergence(held, logits_of(start)).detach())
    power, other = torch.cat(kl["power"]), torch.cat(kl["start"])
    return {
        **{name: float(torch.cat(found).float().mean()) for name, found in raised.items()},
        "power_share": float((power > other).float().mean()),
        "power_kl": float(power.mean()),
        "start_kl": float(other.mean()),
    }


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
