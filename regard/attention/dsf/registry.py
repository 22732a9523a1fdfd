"""From a mixer to its system: which function does it for which class.

A mechanism whose output is its matrix times the values needs none: it has the slot form. A mixer with a state
of its own registers its system beside its class, `@system_of(LinearAttentionHeads)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from regard.attention.dsf.ltv import LTV
from regard.attention.dsf.rows import slots
from regard.attention.mechanism import Context, Mechanism
from regard.attention.registry import Spec
from regard.engines.rows import expand_heads
from regard.errors import NotLinear, RegardError, ShapeMismatch

Input = Tensor | tuple[Any, ...]
Made = tuple[LTV, Tensor]
Maker = TypeVar("Maker", bound=Callable[..., Made])
SYSTEMS: dict[type[nn.Module], Callable[..., Made]] = {}


def system_of(kind: type[nn.Module]) -> Callable[[Maker], Maker]:
    """Register a function as the one that writes mixers of a class, and of its subclasses, as systems.

    It takes the mixer and its input, `(mixer, q, k, v, ctx)` or `(mixer, x)`, and returns the LTV and u.

    Raises:
        RegardError: where the class has one.
    """

    def register(maker: Maker) -> Maker:
        if kind in SYSTEMS:
            raise RegardError(f"{kind.__name__} has a system already, {SYSTEMS[kind].__name__}.")
        SYSTEMS[kind] = maker
        return maker

    return register


def to_ltv(mixer: nn.Module | Spec, x: Input) -> Made:
    """Write a mixer as a linear time-varying system, frozen at an input.

    Args:
        mixer: a mechanism, a block, or the spec of one without parameters.
        x: what it takes: `(q, k, v)` or `(q, k, v, ctx)` for a mechanism, one tensor for a block.

    Returns:
        The system, and the u that it takes: for a mechanism the values of every query head,
        [B, H, L, Dv]. `system.simulate(u)` is what the mixer computes before a projection of its output.

    Raises:
        NotLinear: where it is no causal system linear in its values; the message names the part.
        RegardError: for input that it does not take.

    Example:
        >>> import torch
        >>> from regard.attention import LinearAttention
        >>> q, k, v = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64).unbind()
        >>> system, u = to_ltv(LinearAttention(), (q, k, v))
        >>> torch.allclose(system.simulate(u), LinearAttention().build()(q, k, v))
        True
    """
    module = module_of(mixer)
    given = x if isinstance(x, tuple) else (x,)
    if isinstance(module, Mechanism):
        given = _call(module, given)
    elif len(given) != 1 or not isinstance(given[0], Tensor):
        raise RegardError(f"{type(module).__name__} takes one tensor.")
    for kind in type(module).__mro__:
        if kind in SYSTEMS:
            return SYSTEMS[kind](module, *given)
    if isinstance(module, Mechanism) and _is_its_matrix(module):
        return _slots_of(module, *given)
    raise NotLinear(f"{type(module).__name__} cannot be written as a linear system: {_part(module)}")


def module_of(mixer: nn.Module | Spec) -> nn.Module:
    """Return the module of a mixer, building it where a spec without parameters was given."""
    if isinstance(mixer, nn.Module):
        return mixer
    if not isinstance(mixer, Spec):
        raise RegardError(f"a mixer is a mechanism, a block or a spec, and {mixer!r} is none.")
    module: nn.Module = mixer.build()
    if any(True for _ in module.parameters()):
        raise RegardError(f"{mixer!r} has parameters; build it first, so that it is one mixer.")
    return module


def _call(mixer: Mechanism, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """q, k, v and the context of a causal call over all positions."""
    name = type(mixer).__name__
    if len(given) not in (3, 4) or not all(isinstance(t, Tensor) for t in given[:3]):
        raise RegardError(f"{name} takes (q, k, v) or (q, k, v, ctx).")
    q, k, v = given[:3]
    ctx = given[3] if len(given) == 4 and given[3] is not None else Context.of(q, k)
    if not ctx.causal or mixer.orders == frozenset({"full"}):
        raise NotLinear(f"{name} is not causal here: rows see later positions, so no state can hold them.")
    if q.shape[2] != k.shape[2] or v.shape[:3] != k.shape[:3]:
        raise ShapeMismatch(
            f"q, k and v must have as many positions, and are {list(q.shape)}, {list(k.shape)}, "
            f"{list(v.shape)}."
        )
    return q, k, v, ctx


def _is_its_matrix(mixer: Mechanism) -> bool:
    kind = type(mixer)
    return kind.matrix is not Mechanism.matrix and kind.reference is Mechanism.reference


def _slots_of(mixer: Mechanism, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Made:
    weights = mixer.matrix(q, k, ctx)
    return slots(weights, v.shape[-1]), expand_heads(v, q.shape[1]).to(weights.dtype)


def _part(mixer: nn.Module) -> str:
    """Which part stands in the way."""
    if isinstance(mixer, Mechanism):
        return "its output is not a matrix times the values, for it defines `reference` itself."
    for name, inner in list(mixer.named_modules())[1:]:
        kind = type(inner).__name__
        if isinstance(inner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return f"its part {name!r} is a convolution ({kind}), which mixes positions beside the state."
        if "Norm" in kind:
            return f"its part {name!r} is a norm ({kind}), which is not linear."
    return "no function is registered for it with `system_of`."
