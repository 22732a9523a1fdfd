"""Random weights under which attention is neither uniform nor one-hot, and nothing overflows."""

from __future__ import annotations

import math

import torch
from torch import nn

GAIN = 1.3


def draw(model: nn.Module, seed: int = 1) -> nn.Module:
    """Redraw every parameter of a model in place, by a fixed seed; returns the model in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in done or not parameter.is_floating_point():
                    continue
                done.add(id(parameter))
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                start = torch.nan_to_num(parameter).clamp(-20, 20)
                parameter.copy_(_drawn(module, name, start, noise))
    return model.eval()


def _drawn(module: nn.Module, name: str, start: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    if start.ndim < 2:
        return start + 0.1 * noise
    if isinstance(module, nn.Embedding):
        return 0.5 * noise
    fan_in = start[0].numel() if type(module).__name__.startswith("Conv") else max(start.shape[-2:])
    if isinstance(module, nn.Linear):
        fan_in = start.shape[1]
    return GAIN / math.sqrt(fan_in) * noise
