"""The load-balance loss of a whole model, and which heads its tokens used."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regard.attention.head_router import HeadRouter
from regard.errors import NothingObserved, RegardError
from regard.runtime.head_table import HeadTable


def balance_loss(model: nn.Module) -> Tensor:
    """Return the load-balance loss of the last forward, the mean over the layers of a model.

    A layer whose tokens use its routed heads evenly has K. Times 0.01 it is added to the loss of a task. It
    is handed out once a forward.

    Raises:
        RegardError: where the model has no router with a balance, or none ran in training since.

    Example:
        >>> from regard.attention import MoHAttention
        >>> layer = MoHAttention(32, 4, shared=1, active=2)
        >>> loss = layer(torch.randn(2, 5, 32)).square().mean() + 0.01 * balance_loss(layer)
        >>> loss.backward()
    """
    routers = [m for m in model.modules() if isinstance(m, HeadRouter) and m.routed and m.kind != "random"]
    if not routers:
        raise RegardError(f"{type(model).__name__} has no router of heads whose load could be balanced.")
    found = [router.balance for router in routers if router.balance is not None]
    if not found:
        raise RegardError(
            "no router has run in training mode since the last call; run the model with gradients, after "
            "model.train(), and take its balance_loss once."
        )
    for router in routers:
        router.balance = None
    device = found[0].device
    return torch.stack([loss.to(device) for loss in found]).mean()


@dataclass(eq=False)
class HeadUsage:
    """Which heads the tokens of some forwards used.

    Attributes:
        routers: name -> router.
        on: name -> how many tokens each head was on for, float64 [H].
        gates: name -> sum of its gates, float64 [H].
        tokens: name -> how many tokens there were, padding left out.
    """

    routers: dict[str, HeadRouter]
    on: dict[str, Tensor] = field(default_factory=dict)
    gates: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def note(self, name: str, gates: Tensor, valid: Tensor | None) -> None:
        """Count the gates [B, T, H] of one call."""
        flat = gates.detach()
        flat = (flat.flatten(0, 1) if valid is None else flat[valid]).double().cpu()
        self.on[name] = self.on.get(name, 0) + (flat != 0).double().sum(0)
        self.gates[name] = self.gates.get(name, 0) + flat.sum(0)
        self.tokens[name] = self.tokens.get(name, 0) + len(flat)

    @property
    def heads(self) -> HeadTable:
        """One row a head: `on`, the share of tokens that used it, `gate`, its mean gate, and `shared`.

        Raises:
            NothingObserved: where no router ran.
        """
        if not self.on:
            raise NothingObserved("no router of heads ran, so there is no usage to report.")
        told = {}
        for name, router in self.routers.items():
            if name in self.on:
                tokens = max(1, self.tokens[name])
                shared = [float(head < router.shared) for head in range(router.heads)]
                told[name] = {
                    "on": self.on[name] / tokens, "gate": self.gates[name] / tokens, "shared": shared,
                }  # fmt: skip
        return HeadTable.from_columns(told, about={"tokens": max(self.tokens.values())})

    @property
    def entropy(self) -> dict[str, float]:
        """Entropy of how the routed heads of each layer are used, over its largest; 1 where evenly."""
        found = {}
        for name, router in self.routers.items():
            if name in self.on and router.routed > 1:
                share = self.on[name][router.shared :]
                share = share / share.sum().clamp(min=1)
                found[name] = float(torch.special.entr(share).sum()) / math.log(router.routed)
        return found

    @property
    def always_off(self) -> float:
        """Share of the routed heads of all layers that no token used."""
        routed = [self.on[n][r.shared :] for n, r in self.routers.items() if n in self.on]
        joined = torch.cat(routed) if routed else torch.zeros(0)
        return float((joined == 0).double().mean()) if len(joined) else 0.0


@contextmanager
def head_usage(model: nn.Module) -> Iterator[HeadUsage]:
    """Count which heads are used while the block runs.

    Raises:
        RegardError: where the model has no router of heads.

    Example:
        >>> from regard.attention import MoHAttention
        >>> layer = MoHAttention(32, 4, shared=1, active=2)
        >>> with head_usage(layer) as usage:
        ...     out = layer(torch.randn(2, 5, 32))
        >>> float(usage.heads["on"][0]), round(float(usage.heads["on"][1:].sum()), 6)
        (1.0, 2.0)
    """
    routers = _named(model)
    if not routers:
        raise RegardError(f"{type(model).__name__} has no router of heads.")
    usage = HeadUsage(routers)
    handles = [
        router.register_forward_hook(_counter(usage, name), with_kwargs=True)
        for name, router in routers.items()
    ]
    try:
        yield usage
    finally:
        for handle in handles:
            handle.remove()


def _counter(usage: HeadUsage, name: str) -> Any:
    def count(module: nn.Module, args: Any, kwargs: dict[str, Any], gates: Tensor) -> None:
        usage.note(name, gates, kwargs.get("valid"))

    return count


def _named(model: nn.Module) -> dict[str, HeadRouter]:
    """Routers by the alias of their layer in a pretrained model, or else `layer.` and a number."""
    found = [m for m in model.modules() if isinstance(m, HeadRouter)]
    return {getattr(m, "alias", f"layer.{i}"): m for i, m in enumerate(found)}
