"""What the methods of a class do, read from their compiled code: it is there where the source is not."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

MASK_TYPES = ("Tensor", "BlockMask")
_INSPECT: dict[type[nn.Module], bool] = {}


def codes_of(cls: type[nn.Module]) -> Iterator[CodeType]:
    """Yield the code of the methods that a class does not have from `nn.Module`, and of functions in them."""
    for attribute in dir(cls):
        if not hasattr(nn.Module, attribute) or attribute == "forward":
            function = inspect.unwrap(inspect.getattr_static(cls, attribute, None))
            yield from _codes(getattr(function, "__code__", None))


def _codes(code: Any) -> Iterator[CodeType]:
    if isinstance(code, CodeType):
        yield code
        for constant in code.co_consts:
            yield from _codes(constant)


def inspects_masks(cls: type[nn.Module]) -> bool:
    """Whether a method asks if a mask is a tensor, and would go another way with a lazy one."""
    if cls not in _INSPECT:
        own = not cls.__module__.startswith("torch.")
        _INSPECT[cls] = own and any(_asks(c) for c in codes_of(cls) if "isinstance" in c.co_names)
    return _INSPECT[cls]


def _asks(code: CodeType) -> bool:
    steps = list(dis.get_instructions(code))
    return any(
        step.argval == "isinstance"
        and "mask" in str(after.argval)
        and any(s.argval in MASK_TYPES for s in rest)
        for step, after, *rest in zip(steps, steps[1:], steps[2:], steps[3:], strict=False)
    )
