"""What a user configures of Flow-Attention, and what the folders of the official code set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from regard.attention.checks import check_positive
from regard.attention.flow.heads import AUTO, FlowAttentionHeads
from regard.attention.registry import Spec, mechanism
from regard.errors import RegardError

KERNELS = ("sigmoid", "relu")
PRESETS: dict[str, dict[str, Any]] = {
    "core": {"clamp": 1.0},
    "vision": {"clamp": 1.0},
    "language": {"clamp": 5.0},
    "reinforcement-learning": {"clamp": 10.0},
    "time-series": {"clamp": None},
    "long-range-arena": {"clamp": None, "kernel": "relu"},
}


@mechanism("flowformer")
@dataclass(frozen=True, kw_only=True)
class FlowAttention(Spec):
    """Flow-Attention: linear attention in which sources compete and targets are gated by their flow.

    Attributes:
        clamp: bound on what leaves a source; "auto" is 10 where causal and None elsewhere.
        kernel: "sigmoid" or "relu".
        eps: added to both sides of every product of flows.
        competition: whether sources compete; without, every source has weight 1.
        allocation: whether targets are gated by what arrives.

    Example:
        >>> FlowAttention.preset("language").clamp
        5.0
    """

    module: ClassVar = FlowAttentionHeads
    clamp: float | str | None = AUTO
    kernel: str = "sigmoid"
    eps: float = 1e-6
    competition: bool = True
    allocation: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.clamp, str) and self.clamp != AUTO:
            raise RegardError(f"clamp is {self.clamp!r}; it must be a number above 0, {AUTO!r} or None.")
        if not isinstance(self.clamp, str | None):
            check_positive("clamp", self.clamp)
        if self.kernel not in KERNELS:
            raise RegardError(f"kernel is {self.kernel!r}; it must be one of {', '.join(KERNELS)}.")
        check_positive("eps", self.eps)

    @classmethod
    def preset(cls, name: str) -> FlowAttention:
        """Return the options of a folder of the official code, one of `PRESETS`."""
        if name not in PRESETS:
            raise RegardError(f"no preset {name!r}; they are {', '.join(PRESETS)}.")
        return cls(**PRESETS[name])

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return cls(), cls(clamp=1.0, kernel="relu"), cls(clamp=None, allocation=False), cls(competition=False)
