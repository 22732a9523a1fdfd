"""What systems are for: checking a mixer, comparing two, effective attention and decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regard.attention.dsf.ltv import LTV
from regard.attention.dsf.registry import Input, module_of, to_ltv
from regard.attention.mechanism import Mechanism
from regard.attention.registry import Spec
from regard.errors import RegardError

Mixer = nn.Module | Spec | LTV


@dataclass(frozen=True, eq=False)
class EffectiveAttention:
    """How much each position's value counts in each output.

    Attributes:
        weights: [*batch, L, L], zero above the diagonal.
        exact: True where every block of the map is w_ij times the identity, and `weights` are the w_ij, which
            may be negative; False where they are the largest singular values of the blocks.
    """

    weights: Tensor
    exact: bool


@dataclass(frozen=True, eq=False)
class DecayProfile:
    """How fast a mixer forgets.

    Attributes:
        by_lag: [*batch, L], mean size of the blocks of the map so many positions apart; the same however the
            states are chosen.
        kept: [*batch, L], geometric mean of the moduli of Lambda's eigenvalues at each position: the share of
            the state that is kept. It depends on the choice of states: linear attention has 1 or
            eta_{i-1}/eta_i. At position 0 it means nothing.
        half_life: [*batch], positions until half of the state is left, by the mean of log `kept`; inf where
            nothing is forgotten, 0 where all is.
    """

    by_lag: Tensor
    kept: Tensor
    half_life: Tensor


def effective_attention(mixer: Mixer, x: Input | None = None) -> EffectiveAttention:
    """Return the token-to-token map of a mixer as one number a pair of positions, [*batch, L, L].

    Args:
        mixer: as for `to_ltv`, or a system.
        x: as for `to_ltv`; None for a system.

    Example:
        >>> from regard.attention import Softmax
        >>> q, k, v = torch.randn(3, 1, 2, 9, 4).unbind()
        >>> found = effective_attention(Softmax(), (q, k, v))
        >>> found.exact, torch.allclose(found.weights, Softmax().build().matrix(q, k))
        (True, True)
    """
    phi = _system(mixer, x)[0].phi()
    rows, columns = phi.shape[-2:]
    if rows == columns:
        weights = phi.diagonal(dim1=-2, dim2=-1).mean(-1)
        identity = torch.eye(rows, dtype=phi.dtype, device=phi.device)
        bound = 100 * torch.finfo(phi.dtype).eps * max(1.0, _largest(phi))
        if _largest(phi - weights[..., None, None] * identity) <= bound:
            return EffectiveAttention(weights, exact=True)
    return EffectiveAttention(torch.linalg.matrix_norm(phi, ord=2), exact=False)


def assert_equivalent(a: Mixer, b: Mixer, x: Input | None = None, *, tolerance: float = 1e-10) -> None:
    """Raise AssertionError where two mixers do not have the same map at an input.

    Args:
        a, b: as for `to_ltv`, or systems.
        x: as for `to_ltv`, for both; None for two systems.
        tolerance: largest difference allowed, relative to the largest entry where that is above 1. The
            default is for float64.

    Raises:
        AssertionError: with the pair of positions where they differ most, or where they read other values.
        RegardError: where the two maps have other shapes.
    """
    (first, u), (second, w) = _system(a, x), _system(b, x)
    one, two = first.phi(), second.phi()
    if one.shape != two.shape:
        raise RegardError(f"the maps are {list(one.shape)} and {list(two.shape)}; they cannot be compared.")
    if u is not None and w is not None and not torch.equal(u, w):
        raise AssertionError("the mixers read other values u from the same input.")
    off = (one - two).abs().flatten(-2).amax(-1)
    bound = tolerance * max(1.0, _largest(two))
    if not off.numel() or bool((off <= bound).all()):
        return
    *where, i, j = (int(n) for n in torch.unravel_index(off.argmax(), off.shape))
    place = f" of {tuple(where)}" if where else ""
    raise AssertionError(
        f"the maps differ by {float(off.max()):.3g}, most in the weight of position {j} for "
        f"position {i}{place}; "
        f"the largest entry is {_largest(two):.3g}."
    )


def decay_profile(mixer: Mixer, x: Input | None = None) -> DecayProfile:
    """Return how fast a mixer forgets, by lag and by position.

    Args:
        mixer: as for `to_ltv`, or a system.
        x: as for `to_ltv`; None for a system.

    Example:
        >>> from regard.attention.dsf.rows import lightning_attention
        >>> q = k = torch.ones(5, 2)
        >>> decay_profile(lightning_attention(q, k, 0.5, width=3)).by_lag.tolist()
        [2.0, 1.0, 0.5, 0.25, 0.125]
    """
    system = _system(mixer, x)[0]
    if system.length == 0:
        raise RegardError("a system of no positions has no decay.")
    weights = effective_attention(system).weights.abs()
    by_lag = [weights.diagonal(-lag, -2, -1).mean(-1) for lag in range(system.length)]
    moduli = system.lam.abs() if system.is_diagonal else torch.linalg.eigvals(system.lam).abs()
    kept = moduli.log().mean(-1).exp()
    half_life = torch.full(kept.shape[:-1], torch.inf, dtype=kept.dtype, device=kept.device)
    if system.length > 1:
        rate = kept[..., 1:].log().mean(-1)
        half_life = torch.where(rate.abs() < 1e-12, half_life, -math.log(2) / rate)
    return DecayProfile(torch.stack(by_lag, -1), kept, half_life)


def oracle_error(mixer: nn.Module | Spec, x: Input) -> float:
    """Return the largest difference between a mixer's own output and that of its system, simulated.

    Args:
        mixer: as for `to_ltv`. Of a block that has it, `mix(x)` is what it computes before its output
            projection.
        x: as for `to_ltv`. Rows of padding count, so leave padding out.

    Example:
        >>> from regard.attention import LinearAttention
        >>> x = torch.randn(3, 1, 2, 33, 4, dtype=torch.float64).unbind()
        >>> oracle_error(LinearAttention(), x) < 1e-12
        True
    """
    module = module_of(mixer)
    system, u = to_ltv(module, x)
    given = x if isinstance(x, tuple) else (x,)
    own = module if isinstance(module, Mechanism) else getattr(module, "mix", module)
    return _largest(own(*given) - system.simulate(u))


def _system(mixer: Mixer, x: Input | None) -> tuple[LTV, Tensor | None]:
    if isinstance(mixer, LTV):
        return mixer, None
    if x is None:
        raise RegardError("a mixer becomes a system at an input; give x, what it takes.")
    return to_ltv(mixer, x)


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0
