"""What is measured: the default model, on natural text of any length that every Python brings along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from benchmarks.errors import WrongResult
from regard.lens import LENSES
from regard.runtime import Lens

FORWARD = {"use_cache": False, "logits_to_keep": 1}


def load() -> tuple[Any, Any]:
    """Return the default model in float32 with SDPA attention, and its tokenizer."""
    import regard

    model, tokenizer = regard.load()
    return model.eval(), tokenizer


def text_ids(tokenizer: Any, length: int, batch: int = 1) -> Tensor:
    """Return token ids [batch, length] of Python's own language reference, each row another part of it."""
    from pydoc_data.topics import topics

    need = batch * length
    text = "\n".join(topics[name] for name in sorted(topics))[: 8 * need]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :need]
    if ids.shape[1] < need:
        raise WrongResult(f"Python's own texts have {ids.shape[1]} tokens; {need} were asked for.")
    return ids.view(batch, length)


def every_lens() -> list[Lens]:
    """Return one of each built-in lens but `Outliers`, which reads every activation, by default options."""
    return [kind() for name, kind in LENSES.items() if name != "outliers"]


def forward(model: Any, ids: Tensor, **more: Any) -> Tensor:
    """Run one forward as it is measured, and return the logits of the last position [B, vocabulary]."""
    return model(input_ids=ids, **{**FORWARD, **more}).logits[:, -1]


def watched(model: Any, ids: Tensor, lenses: Sequence[Lens]) -> Any:
    """Run one forward under lenses, and return the session, closed, and the logits."""
    import regard

    with regard.watch(model, *lenses) as seen:
        logits = forward(model, ids)
    return seen, logits


def same(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Refuse `found` where it is not `expected`, to `tolerance` of the largest number there.

    Raises:
        WrongResult: naming `what` differs, and by how much.
    """
    if found.shape != expected.shape:
        raise WrongResult(f"{what}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}.")
    off = float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
    if not off <= tolerance:
        raise WrongResult(f"{what}: off by {off:.1e} of the largest, where {tolerance:.0e} is allowed.")


def seconds_of_matrices(model: Any, length: int, rate: float) -> float:
    """Return the least time of a forward's products of matrices: the blocks' and causal attention's."""
    blocks = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    config = model.config
    pairs = length * (length + 1) / 2 * config.num_attention_heads * config.num_hidden_layers
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (2 * length * blocks + 4 * width * pairs) / rate


def weights_in(model: Any, length: int) -> float:
    """Return how many attention weights a causal forward has, all layers and heads."""
    config = model.config
    return length * (length + 1) / 2 * config.num_attention_heads * config.num_hidden_layers
