"""Outputs of two runs beside each other, and what the model's own eager attention computed."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regard.runtime import Lens

EAGER = re.compile(r"eager\w*attention|attention\w*eager|eager_attention_forward")
UNCOMPARED = re.compile(r"attentions$|past_key_values|cache")


class Rows(Lens):
    """Opens every row of every call, and keeps the weights and which rows are real."""

    def weights(self, block: Any) -> None:
        call = block.call
        store = call.extra.get("all")
        if store is None:
            shape = (call.q.shape[0], call.heads, call.query_length, call.key_length)
            store = call.extra["all"] = block.weights.new_zeros(shape)
        store[:, :, block.start : block.stop, block.key_start : block.key_stop] = block.weights

    def end_call(self, call: Any) -> None:
        self.tally.append(call.site, "all", (call.extra["all"], call.valid_queries))

    def result(self) -> Any:
        return self.tally.get("all")


@contextmanager
def eager_weights(model: nn.Module) -> Iterator[dict[str, list[Tensor | None]]]:
    """Collect what the eager attention functions of transformers return, by name of the calling module."""
    names = {id(module): name for name, module in model.named_modules()}
    seen: dict[str, list[Tensor | None]] = {}
    undo = []

    def note(function: Any) -> Any:
        @functools.wraps(function)
        def noted(module: Any, *args: Any, **kwargs: Any) -> Any:
            out = function(module, *args, **kwargs)
            if id(module) in names:
                weights = out[1] if isinstance(out, tuple) and len(out) > 1 else None
                seen.setdefault(names[id(module)], []).append(weights)
            return out

        return noted

    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.models.") and ".modeling_" in name:
            for key, value in list(vars(module).items()):
                if EAGER.search(key) and callable(value) and not isinstance(value, type):
                    undo.append((module, key, value))
                    setattr(module, key, note(value))
    try:
        yield seen
    finally:
        for module, key, value in undo:
            setattr(module, key, value)


def tensors(output: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (path, tensor) of every number that a model returned, but for caches and attentions."""
    if isinstance(output, Tensor):
        if output.is_floating_point() or output.dtype in (torch.int64, torch.int32, torch.bool):
            yield path, output
    elif isinstance(output, dict):
        for key, value in output.items():
            if not UNCOMPARED.search(str(key)):
                yield from tensors(value, f"{path}.{key}" if path else str(key))
    elif isinstance(output, list | tuple):
        for index, value in enumerate(output):
            yield from tensors(value, f"{path}.{index}")


def attentions(output: Any) -> dict[str, Tensor]:
    """Return the attention weights among what a model returned, by path."""
    found: dict[str, Tensor] = {}
    for key, value in output.items() if isinstance(output, dict) else ():
        if key.endswith("attentions") and value is not None:
            found.update(tensors(value, key.replace("attentions", "attention")))
    return found


def distance(found: Any, expected: Any, mask: Tensor | None = None) -> tuple[float, str]:
    """Return the largest difference relative to the scale of each tensor, and where it is.

    Args:
        mask: [B, T], which positions of tensors that begin with these sizes are compared.
    """
    mine, theirs = dict(tensors(found)), dict(tensors(expected))
    if mine.keys() != theirs.keys():
        return float("inf"), f"returned {sorted(mine.keys() ^ theirs.keys())[:3]}"
    worst = (0.0, "")
    for path, value in theirs.items():
        off = _off(mine[path], value, mask)
        if off > worst[0] or off != off:
            worst = (off if off == off else float("inf"), path)
    return worst


def _off(found: Tensor, expected: Tensor, mask: Tensor | None) -> float:
    if found.shape != expected.shape:
        return float("inf")
    if mask is not None:
        if expected.shape[:2] != mask.shape:
            return 0.0
        found, expected = found[mask.bool()], expected[mask.bool()]
    if not expected.numel() or torch.equal(found, expected):
        return 0.0
    found, expected = found.double(), expected.double()
    same = (found == expected) | (found.isnan() & expected.isnan())
    found, expected = found[~same], expected[~same]
    scale = expected.abs().max() if expected.isfinite().all() else torch.tensor(float("nan"))
    return float((found - expected).abs().max() / scale)


def finite(output: Any, mask: Tensor | None = None) -> bool:
    """Whether some tensor with real numbers in it came out, and none of them is nan."""
    floats = [t for _, t in tensors(output) if t.is_floating_point() and t.numel()]
    if mask is not None:
        floats = [t[mask.bool()] for t in floats if t.shape[:2] == mask.shape] or floats
    return bool(floats) and not any(t.isnan().any() for t in floats)
