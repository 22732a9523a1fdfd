"""A model computed as if in 8 bits: weights and activations rounded to what eight bits can say.

    weights      w' = s round(w / s), s = max |w| / 127                       symmetric, one s a matrix
    activations  x' = s (clip(round(x / s) + z, 0, 255) - z)                  asymmetric, one s and z a tensor
                 s = (high - low) / 255, z = round(-low / s), from low to high, 0 included

with ranges that are fixed beforehand on calibration texts: a running minimum and maximum, the newest of which
counts a tenth, or of each batch a percentile. Rounded are the input of every linear layer and, as `residual`,
what every block hands on. Everything else stays as it is, and so do the speed and the memory: it shows what
outliers cost, it is no way to deploy.

Source: Bondarenko et al., 2023, arXiv 2306.12929, section 5 and appendix B. Status: partly our choice: the
quantiser agrees with the official code (Qualcomm-AI-research/outlier-free-transformers, `quantization/`),
which also rounds softmax outputs, norms and embeddings, and searches the range of weights by squared error.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regard.errors import NoSuchSite, RegardError, UnsupportedModel
from regard.runtime.anatomy import anatomy_of, root_of

MOMENTUM, LEAST = 0.9, 1e-8
Batch = Tensor | Mapping[str, Any]
Range = tuple[float, float]


@dataclass(frozen=True)
class Int8:
    """What is rounded.

    Attributes:
        bits: of weights and activations.
        ranges: module name -> (low, high) of its input; "NAME (output)" for blocks.
        weights: names of the modules whose weights are rounded.
    """

    bits: int
    ranges: dict[str, Range] = field(default_factory=dict)
    weights: list[str] = field(default_factory=list)


def quantised(x: Tensor, low: float, high: float, bits: int = 8) -> Tensor:
    """Return x rounded to the asymmetric grid between `low` and `high`, in its own dtype.

    Example:
        >>> quantised(torch.tensor([-1.0, 0.0, 0.4, 3.0]), -1.0, 2.0, bits=2)
        tensor([-1.,  0.,  0.,  2.])
    """
    low, high, top = min(low, 0.0), max(high, LEAST), 2**bits - 1
    scale = max((high - low) / top, LEAST)
    zero = min(max(round(-low / scale), 0), top)
    return (((x.float() / scale).round() + zero).clamp(0, top) - zero).mul(scale).to(x.dtype)


def quantised_weight(weight: Tensor, bits: int = 8) -> Tensor:
    """Return a weight rounded to the symmetric grid of its largest number, in its own dtype."""
    top = 2 ** (bits - 1) - 1
    scale = weight.detach().float().abs().max().clamp_min(LEAST) / top
    return (weight.detach().float() / scale).round().mul(scale).to(weight.dtype)


@contextmanager
def simulate_int8(
    model: nn.Module,
    calibration: Iterable[Batch],
    *,
    weights: bool = True,
    activations: bool = True,
    residual: bool = True,
    bits: int = 8,
    percentile: float | None = None,
    only: Sequence[str] = ("*",),
    skip: Sequence[str] = (),
) -> Iterator[Int8]:
    """Compute a model as if its weights and activations had eight bits, inside a `with` block.

    Args:
        model: any module; `residual` needs blocks that regard can find.
        calibration: batches to fix the ranges on, each the token ids or a dict of the model's arguments.
        weights: round the weights of linear layers.
        activations: round their inputs.
        residual: with `activations`, also round what every block hands on.
        bits: 2 to 16.
        percentile: ranges from this to 100 minus this of each batch, such as 99.999; None for its extremes.
        only, skip: patterns of module names, such as "*down_proj" or "lm_head".

    Yields:
        The ranges, and the names of what is rounded.

    Raises:
        RegardError: where there is no batch, a module runs that the calibration never reached, or an option
            is out of range.
        NoSuchSite: where a pattern matches no linear layer.
        UnsupportedModel: where there is no linear layer, or no block.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> with simulate_int8(model, [torch.randn(9, 4)], residual=False) as made:
        ...     out = model(torch.randn(3, 4))
        >>> list(made.ranges)
        ['0', '2']
    """
    _check(bits, percentile, weights or activations)
    layers = _linear_layers(model, only, skip)
    blocks = _blocks(model) if activations and residual else {}
    made = Int8(bits)
    if activations:
        _calibrate(model, calibration, layers, blocks, percentile, made)
    handles: list[Any] = []
    before: list[tuple[nn.Module, nn.Parameter]] = []
    try:
        if activations:
            for name, module in layers.items():
                handles.append(module.register_forward_pre_hook(_rounding(name, made)))
            for name, module in blocks.items():
                handles.append(module.register_forward_hook(_rounding_output(name, made)))
        for name, module in layers.items() if weights else ():
            old = module._parameters["weight"]
            assert old is not None
            before.append((module, old))
            module._parameters["weight"] = nn.Parameter(quantised_weight(old, bits), requires_grad=False)
            made.weights.append(name)
        yield made
    finally:
        for handle in handles:
            handle.remove()
        for module, old in before:
            module._parameters["weight"] = old


def _check(bits: int, percentile: float | None, anything: bool) -> None:
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 16:
        raise RegardError(f"bits is {bits!r}; it must be a whole number from 2 to 16.")
    if percentile is not None and not 50 < percentile < 100:
        raise RegardError(f"percentile is {percentile}; it must lie between 50 and 100.")
    if not anything:
        raise RegardError("neither weights nor activations are to be rounded; set one of them.")


def _linear_layers(model: nn.Module, only: Sequence[str], skip: Sequence[str]) -> dict[str, nn.Module]:
    """The linear layers to round, by name."""
    every = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    if not every:
        raise UnsupportedModel(f"{type(model).__name__} has no linear layer.")
    for pattern in (*only, *skip):
        if not fnmatch.filter(every, pattern):
            raise NoSuchSite(
                f"no linear layer of {type(model).__name__} is named like {pattern!r}; there is "
                f"{', '.join(list(every)[:3])} and so on."
            )
    chosen = {
        name: module
        for name, module in every.items()
        if any(fnmatch.fnmatch(name, p) for p in only) and not any(fnmatch.fnmatch(name, p) for p in skip)
    }
    if not chosen:
        raise NoSuchSite("skip names every linear layer that only does.")
    return chosen


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    found = {f"{name} (output)": module for name, module in anatomy_of(root_of(model)).blocks()}
    if not found:
        raise UnsupportedModel(
            f"{type(model).__name__} has no blocks that regard can find; set residual=False."
        )
    return found


def _calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: Mapping[str, nn.Module],
    blocks: Mapping[str, nn.Module],
    percentile: float | None,
    made: Int8,
) -> None:
    """Run the model as it is over the batches, and note the ranges."""

    def note(name: str, x: Tensor) -> None:
        low, high = _extent(x.detach(), percentile)
        if name in made.ranges:
            old = made.ranges[name]
            low, high = (MOMENTUM * o + (1 - MOMENTUM) * n for o, n in zip(old, (low, high), strict=True))
        made.ranges[name] = (low, high)

    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: note(name, args[0]))
        for name, module in layers.items()
    ]
    handles += [
        module.register_forward_hook(lambda m, args, out, name=name: note(name, _first(out)))
        for name, module in blocks.items()
    ]
    was_training, count = model.training, 0
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch) if isinstance(batch, Mapping) else model(batch)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    if not count:
        raise RegardError("calibration holds no batch; static ranges need at least one.")


def _extent(x: Tensor, percentile: float | None) -> Range:
    if percentile is None:
        return float(x.min()), float(x.max())
    low, high = np.percentile(x.float().cpu().numpy(), (100 - percentile, percentile))
    return float(low), float(high)


def _known(name: str, made: Int8) -> Range:
    if name not in made.ranges:
        raise RegardError(f"{name} was never reached by the calibration, so it has no range.")
    return made.ranges[name]


def _rounding(name: str, made: Int8) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (quantised(args[0], *_known(name, made), made.bits), *args[1:])

    return hook


def _rounding_output(name: str, made: Int8) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        rounded = quantised(_first(out), *_known(name, made), made.bits)
        return (rounded, *out[1:]) if isinstance(out, tuple) else rounded

    return hook


def _first(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found
