"""SmolLM2 and long texts in its tokens, as studies of language read them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from regard.tasks.corpus import Corpus

VOCABULARY, TRAINED_ON, HELD_OUT = 512, 200_000, 30_000


def subject(tiny: bool) -> tuple[nn.Module, Any, Corpus]:
    """Return SmolLM2, or a tiny random model in its place, its tokenizer, and the novels in its tokens."""
    import torch

    from regard.models.tiny_llama import tiny_llama
    from regard.tasks.corpus import Corpus, novels, packaged

    if tiny:
        data = packaged(VOCABULARY)
        return *tiny_llama(data), data
    load: Any = import_module("regard").load
    model, tokenizer = load()
    parts = [text[:TRAINED_ON] for text in novels().values()], [t[-HELD_OUT:] for t in novels().values()]
    ids, rest = (torch.tensor([i for text in texts for i in tokenizer(text).input_ids]) for texts in parts)
    return model, tokenizer, Corpus(ids, rest, len(tokenizer))


def windows(tokens: Tensor, length: int, count: int) -> Tensor:
    """Return `count` evenly spread windows of length + 1 tokens."""
    import torch

    step = (len(tokens) - length - 1) // max(1, count)
    return torch.stack([tokens[i * step : i * step + length + 1] for i in range(count)])


def late_loss(model: nn.Module, rows: Tensor, first: int = 0) -> float:
    """Return the mean next-token loss of what stands after the first tokens of each row."""
    import torch
    import torch.nn.functional as F

    from regard.objectives.language import logits_of

    model.eval()
    found = []
    with torch.no_grad():
        for row in rows:
            logits = logits_of(model, row[None, :-1])[0, first:]
            found.append(F.cross_entropy(logits.float(), row[1 + first :]))
    return float(torch.stack(found).mean())
