"""Parts of the study `titans`: memories that are written and asked, and models whose memory is silenced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from regard.attention import Titans


def spec(variant: str, dim: int, heads: int, window: int) -> Titans:
    """Return the mechanism that is trained: memories of one matrix, in chunks as long as the window."""
    from regard.attention import Titans

    return Titans(
        dim=dim, heads=heads, variant=variant, window=window, chunk_size=window, depth=1, persistent=2
    )


@contextmanager
def silenced(model: nn.Module, quiet: bool) -> Iterator[None]:
    """Let the memories of a model answer nothing while this is open, where `quiet`."""
    import torch

    from regard.attention.titans.core import MemoryCore

    cores = [m for m in model.modules() if isinstance(m, MemoryCore)] if quiet else []

    def silent_mix(core: MemoryCore) -> Any:
        def mix(x: Tensor, state: Any, filled: Tensor | None = None) -> tuple[Tensor, Any]:
            counted = state or MemoryCore.mix(core, x[:, :0], None)[1]
            return torch.zeros_like(x), (counted[0], counted[1] + x.shape[1], *counted[2:])

        return mix

    for core in cores:
        core.mix = silent_mix(core)  # type: ignore[method-assign]
        core.recall = lambda x, weights, tail=None: torch.zeros_like(x)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for core in cores:
            del core.mix, core.recall


def written(k: Tensor, v: Tensor, step: float, chunk: int = 1) -> Tensor:
    """Return the matrix after pairs [T, n] and [T, d] were written, one after the other."""
    import torch

    from regard.engines.memory import neural_memory

    theta = torch.full((1, 1, len(k)), step, dtype=k.dtype)
    _, memory = neural_memory(k[None, None], k[None, None], v[None, None], theta, chunk=chunk)
    return memory.weights[0][0, 0]


def answers(k: Tensor, v: Tensor, step: float, chunk: int = 1) -> dict[str, Tensor]:
    """Return what the gradient memory and the sum of linear attention answer to all keys."""
    return {"": k @ written(k, v, step, chunk), "_sum": k @ (k.T @ v)}


def latest(k: Tensor, old: Tensor, new: Tensor, step: float) -> dict[str, float]:
    """Return the share of keys that answer with the later of two values that they were written with."""
    import torch

    keys, values = torch.cat([k, k]), torch.cat([old, new])
    found = {}
    for rule, told in answers(keys, values, step).items():
        told = told[: len(k)]
        told = told * ((told * new).sum() / (told * told).sum()) if rule else told
        later = (told - new).norm(dim=-1) < (told - old).norm(dim=-1)
        found[f"latest{rule}"] = float(later.double().mean())
    return found


def exactness() -> dict[str, float]:
    """Return the largest difference of the fast paths from the sequential definition, and of other chunks."""
    import torch

    from regard.attention import NeuralMemory

    worst, others = 0.0, []
    for depth in (1, 2):
        for chunk in (1, 4, 16):
            options = {"dim": 16, "heads": 2, "depth": depth}
            layer = NeuralMemory(**options, chunk_size=chunk).build().double()  # type: ignore[arg-type]
            x = torch.randn(2, 40, 16, dtype=torch.float64)
            expected = layer.memory.naive(2).answer(x)
            first, state = layer.memory.mix(x[:, :13], None)
            pieces = torch.cat([first, layer.memory.mix(x[:, 13:], state)[0]], 1)
            other = NeuralMemory(**options, chunk_size=5, max_step=1 / chunk).build().double()  # type: ignore[arg-type]
            other.load_state_dict(layer.state_dict())
            for found in (layer.memory.mix(x, None)[0], pieces):
                worst = max(worst, _off(found, expected))
            others.append(_off(other.memory.mix(x, None)[0], expected))
    return {"exact": worst, "other": min(others)}


def _off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def random_keys(count: int, width: int) -> Tensor:
    """Return keys of norm 1, [count, width]."""
    import torch
    from torch.nn.functional import normalize

    return normalize(torch.randn(count, width, dtype=torch.float64), dim=-1)
