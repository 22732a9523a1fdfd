"""How fast each head forgets: rates s >= 0, of which a head keeps exp(-s) of its state at every position.

    alibi     a_h (1 - l / (L - 1) + 1e-5)           a_h = 2^(-8 (h + 1) / H) where H is a power of two,
                                                     else the slopes of the power below and of every other
                                                     one of the next
    minimax   a_h (1 - l / (L - 1 + 1e-5) + 1e-5)    a_h = 2^(-8 (h + 1) / H) for every H
    paper     8 h / H (1 - l / L)
    none      0

for head h of H in layer l of L, both counted from 0. They are far apart: of eight heads in the first layer,
`alibi` gives 0.5 to 0.004, `paper` 0 to 7. Released TransNormerLLM weights go with `alibi`.

Sources: `alibi`, the model code of TransNormerLLM's checkpoints and OpenNLPLab/lightning-attention;
`minimax`, transformers' MiniMax; `paper`, Qin et al., 2024, arXiv 2405.17381, equation 10, and
fla-org/flash-linear-attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from regard.errors import RegardError, ShapeMismatch

KINDS = ("alibi", "minimax", "paper", "none")


def decay_rates(heads: int, layer: int = 0, layers: int = 1, kind: str = "alibi") -> Tensor:
    """Return the rate of each head in a layer, float64 [heads], on the CPU.

    Args:
        heads: H, from 1.
        layer: l, from 0.
        layers: L, more than `layer`.
        kind: `alibi`, `minimax`, `paper` or `none`.

    Raises:
        RegardError: for an unknown kind, or a layer that is not there.

    Example:
        >>> [round(rate, 4) for rate in decay_rates(4, layer=0, layers=3).tolist()]
        [0.25, 0.0625, 0.0156, 0.0039]
        >>> decay_rates(4, layer=1, layers=2, kind="paper").tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    check_kind(kind)
    for name, value, least in (("heads", heads, 1), ("layers", layers, 1), ("layer", layer, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise RegardError(f"{name} is {value!r}; it must be a whole number from {least}.")
    if layer >= layers:
        raise RegardError(f"layer is {layer}, and there are {layers} layers, counted from 0.")
    if kind == "none":
        return torch.zeros(heads, dtype=torch.float64, device="cpu")
    if kind == "paper":
        return torch.arange(heads, dtype=torch.float64, device="cpu") * (8 / heads) * (1 - layer / layers)
    if kind == "minimax":
        return _slopes(heads) * (1 - layer / (layers - 1 + 1e-5) + 1e-5)
    return _alibi(heads) * (1 - layer / max(1, layers - 1) + 1e-5)


def given_rates(rates: Tensor | Sequence[float] | None, heads: int, device: torch.device) -> Tensor:
    """Return rates that a caller gave, float64 [heads]; None is no decay.

    Raises:
        RegardError: where one is negative or not a number.
        ShapeMismatch: where there are not as many as heads.
    """
    if rates is None:
        return torch.zeros(heads, dtype=torch.float64, device=device)
    if isinstance(rates, str):
        raise RegardError(
            f"rates is {rates!r}; give numbers, such as decay_rates({heads}, layer=0, layers=12, "
            f"kind={rates!r})."
        )
    found = torch.as_tensor(rates, dtype=torch.float64, device=device)
    if found.shape != (heads,):
        raise ShapeMismatch(f"rates must be one for each of {heads} heads, and is {list(found.shape)}.")
    least = float(found.detach().min()) if heads else 0.0
    if not least >= 0:
        raise RegardError(
            f"rates has {least:g}; a rate is 0 or more, and a head keeps exp(-rate) a position."
        )
    return found


def check_kind(kind: str) -> None:
    """Refuse a kind of rates that is not known."""
    if kind not in KINDS:
        raise RegardError(f"rates is {kind!r}; it must be one of {', '.join(KINDS)}.")


def _slopes(heads: int) -> Tensor:
    return 2.0 ** (-8 / heads * torch.arange(1, heads + 1, dtype=torch.float64, device="cpu"))


def _alibi(heads: int) -> Tensor:
    below = 2 ** int(math.log2(heads))
    return torch.cat([_slopes(below), _slopes(2 * below)[::2][: heads - below]])
