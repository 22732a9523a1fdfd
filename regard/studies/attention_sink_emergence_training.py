"""The part of the study of attention sinks that trains: small models, with each variant of attention.

A model of one layer learns bigram-backcopy, whose heads have nothing to do at most positions, each sequence
behind the same token. One of two layers learns plain novels. After some steps the lens' formula is computed
from the mechanism's own matrix; where rows do not sum to 1, by the paper's proxy, |A| / (sum |A| + 1e-8).
Embeddings start at a standard deviation of 0.02; at the decoder's own 1 / sqrt(width) the sink is slower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

LENGTH, BATCH, RATE, HEADS, DIM, EPS = 64, 32, 1e-2, 4, 64, 0.3
LOOKED_AT, START = 32, 0.02
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": {"mechanism": "softmax"},
    "sigmoid": {"mechanism": "similarity"},
    "key": {"mechanism": "key-value-bias", "kind": "key"},
    "value": {"mechanism": "key-value-bias", "kind": "value"},
}


@dataclass(frozen=True)
class Trained:
    """How one training went.

    Attributes:
        steps: after how many steps it was looked at.
        sink: the rate of heads with a sink on the first token then.
        taken: share of the rows' weight that a learned key takes, all heads together; 0 without one.
        loss: on held-out text, in nats.
    """

    steps: list[int]
    sink: list[float]
    taken: list[float]
    loss: list[float]


def trained(setting: str, seed: int, steps: int, tick: Callable[[float], None]) -> Trained:
    """Train a small model and return how its sink emerged.

    Args:
        setting: a variant behind a token that is always first, `no_front` for softmax without
            that token, or `novels` for softmax on plain text, which begins anywhere.
    """
    import torch

    from regard.models.decoder import Decoder
    from regard.objectives.language import next_token_loss, train
    from regard.tasks.backcopy import backcopy
    from regard.tasks.corpus import packaged

    made = None if setting == "novels" else backcopy(seed=seed)
    corpus = packaged(256) if made is None else made.corpus

    def opened(tokens: Tensor) -> Tensor:
        return made.opened(tokens) if made is not None and setting != "no_front" else tokens

    torch.manual_seed(seed)
    mechanism = VARIANTS.get(setting, VARIANTS["softmax"])
    layers = 2 if setting == "novels" else 1
    model = Decoder(corpus.vocabulary, dim=DIM, layers=layers, heads=HEADS, mechanism=mechanism)
    torch.nn.init.normal_(model.embed.weight, std=START)
    gap = (len(corpus.held_out) - LENGTH - 1) // LOOKED_AT
    rows = torch.stack([corpus.held_out[i * gap : i * gap + LENGTH + 1] for i in range(LOOKED_AT)])
    log = train(
        model, corpus, steps=steps, batch=BATCH, length=LENGTH, rate=RATE, seed=seed, windows=1,
        evaluate_every=max(1, steps // 10), tick=tick,
        loss=lambda model, tokens: next_token_loss(model, opened(tokens)),
        measure=lambda model: looked_at(model, opened(rows)),
    )  # fmt: skip
    found = [told for _, told in log.measures]
    columns = {name: [told[name] for told in found] for name in ("sink", "taken", "loss")}
    return Trained([step for step, _ in log.measures], **columns)


def looked_at(model: nn.Module, tokens: Tensor) -> dict[str, float]:
    """Return the sink rate of a model on tokens [B, T + 1], what a learned key takes, and the loss."""
    import torch

    from regard.attention import KeyValueBias, Mechanism, Similarity
    from regard.objectives.language import next_token_loss

    alphas, taken = [], []

    def hook(module: Mechanism, given: tuple[Any, ...], out: Tensor) -> None:
        q, k, _, ctx = given
        weights = module.matrix(q, k, ctx).abs()
        sums = weights.sum(-1)
        if isinstance(module, KeyValueBias.module):
            taken.append(1 - sums.mean())
        if isinstance(module, Similarity.module):
            weights = weights / (sums[..., None] + 1e-8)
        alphas.append(weights[..., 0].mean(-1))

    hooks = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, Mechanism)]
    try:
        loss = next_token_loss(model, tokens)
    finally:
        for one in hooks:
            one.remove()
    rate = (torch.stack(alphas) > EPS).float().mean()
    return {
        "sink": float(rate),
        "taken": float(torch.stack(taken).mean()) if taken else 0.0,
        "loss": float(loss),
    }
