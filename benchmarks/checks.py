"""Whether watching is right: no speed is told before these have passed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks import dense
from benchmarks.subject import every_lens, forward, same, watched
from regard.lens import ColumnMass, Entropy, MeanDistance, PreviousToken

SHORT = 256


def eager_statistics(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Return `dense.statistics` of all layers, from the model's own eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        attentions = model(
            input_ids=ids, use_cache=False, logits_to_keep=1, output_attentions=True
        ).attentions
    finally:
        model.set_attn_implementation(before)
    return dense.stacked([dense.statistics(weights) for weights in attentions])


def seen_statistics(seen: Any) -> dict[str, Tensor]:
    """Return the same statistics as lenses have seen them; `mass` by bins where the text is long."""
    mass = seen[ColumnMass]
    return {
        "entropy": torch.tensor(seen[Entropy].grid("entropy")).double(),
        "mass": torch.stack([torch.tensor(mass.mass[alias]) for alias in mass.mass]).double(),
        "previous": torch.tensor(seen[PreviousToken].grid("score")).double(),
        "distance": torch.tensor(seen[MeanDistance].grid("distance")).double(),
    }


def check_lenses(model: Any, ids: Tensor) -> None:
    """Refuse lenses that differ from the dense computation on the first tokens.

    Raises:
        WrongResult: naming the statistic.
    """
    ids = ids[:1, :SHORT]
    seen, _ = watched(model, ids, every_lens())
    compare(seen_statistics(seen), eager_statistics(model, ids), "lenses")


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], who: str) -> None:
    """Refuse statistics that are not the expected ones, to 1e-4 of the largest; `mass` where shapes agree."""
    for name, wanted in expected.items():
        if name != "mass" or found[name].shape == wanted.shape:
            same(found[name], wanted, f"{who}: {name}")


def check_logits(model: Any, ids: Tensor) -> None:
    """Refuse a watched forward whose logits are not those of a plain one.

    Raises:
        WrongResult: with the difference.
    """
    plain = forward(model, ids)
    same(watched(model, ids, every_lens())[1], plain, f"logits at {ids.shape[1]} tokens")
