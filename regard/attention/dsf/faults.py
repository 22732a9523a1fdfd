"""Faults that the oracle must see: each is one row with one thing wrong, of the kinds that happen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from regard.attention.dsf.formulas import WIDTH, Drawn, draw, titans_memory
from regard.attention.dsf.ltv import LTV


def _decay_a_step_late(drawn: Drawn) -> Drawn:
    system = drawn.system
    return replace(drawn, system=LTV(system.lam.roll(1, 0), system.B, system.C, system.D))


def _without_eta(drawn: Drawn) -> Drawn:
    system = drawn.system
    return replace(drawn, system=LTV(torch.ones_like(system.lam), system.B, system.C))


def _without_step_size(drawn: Drawn) -> Drawn:
    system, delta = drawn.system, drawn.parts["delta"]
    return replace(drawn, system=LTV(system.lam, system.B / delta[:, None, :], system.C, system.D))


def _in_chunks_of_four(drawn: Drawn) -> Drawn:
    return replace(drawn, expected=titans_memory(u=drawn.u, **drawn.parts, chunk=4))


def _entries_before_channels(drawn: Drawn) -> Drawn:
    system = drawn.system
    order = torch.arange(system.states).view(WIDTH, -1).T.flatten()
    return replace(drawn, system=LTV(system.lam, system.B[:, order], system.C, system.D))


def _sign_of_the_gate(drawn: Drawn) -> Drawn:
    system = drawn.system
    return replace(drawn, system=LTV(1 - system.lam, system.B, system.C))


Fault = tuple[str, Callable[[Drawn], Drawn]]
FAULTS: dict[str, Fault] = {
    "decay a step late": ("SSD", _decay_a_step_late),
    "normaliser left out of the decay": ("normalised attention", _without_eta),
    "S6 without its step size in B": ("S6", _without_step_size),
    "memory in chunks of 4": ("Titans, one matrix", _in_chunks_of_four),
    "state in another order than C": ("linear attention", _entries_before_channels),
    "forget gate of the wrong sign": ("qLSTM", _sign_of_the_gate),
}


def error_of(drawn: Drawn) -> float:
    """Return the largest difference between the simulated system and the mixer's formula."""
    return float((drawn.system.simulate(drawn.u) - drawn.expected).abs().max())


def with_fault(fault: str, length: int, generator: torch.Generator) -> Drawn:
    """Return the row that a fault is about, at random inputs, with the fault.

    Args:
        fault: one of `FAULTS`.
    """
    name, spoil = FAULTS[fault]
    return spoil(draw(name, length, generator))
