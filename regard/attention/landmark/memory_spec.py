"""What a user configures of landmark attention over a memory of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from regard.attention.costs import Costs
from regard.attention.landmark.memory import LandmarkMemoryHeads
from regard.attention.landmark.read import CHOICES
from regard.attention.landmark.spec import Landmark, check_block
from regard.attention.landmark.store import Sizes
from regard.attention.landmark.turns import Turns, turns_of_module
from regard.attention.registry import Spec, mechanism
from regard.errors import RegardError

POSITIONS = ("remapped", "true")


@mechanism("landmark-memory")
@dataclass(frozen=True, kw_only=True)
class LandmarkMemory(Spec):
    """Landmark attention that keeps a bounded memory of a text, and reads few of its blocks, by landmark.

    Attributes:
        block: tokens in a block, its landmark included, as the model was trained.
        top_k: blocks that each query of each head reads; 0 for none. The code has 5 for Llama, 2 and 4 else.
        memory: blocks that are kept, the latest; None for all.
        local: tokens in a section, a multiple of `block`; None for one block.
        positions: "remapped", blocks that are read stand next to each other, as in a short text; "true",
            where they stood.
        rotary: base of the rotary embedding that queries and keys have, for remapped positions; None to ask
            the model that this is swapped into.
        longest: tokens that the model was trained at; `local` and `top_k` + 1 blocks must fit in. None not
            to ask.
        choose: by "landmark"; or, to compare with, by the "mean" key of a block, the "recent" ones, "random".
        share_heads: whether all heads of a token read the same blocks.
        offload: device of the keys and values of closed blocks, such as "cpu"; landmarks stay. None for where
            the model is.

    Example:
        >>> LandmarkMemory(block=64, top_k=5, memory=40, longest=512).needs
        448
    """

    module: ClassVar = LandmarkMemoryHeads
    costs: ClassVar = Costs(
        time="T (m + k L) D", memory="L^2 + k L D", step_time="(m + k L) D", step_memory="min(T, m L) D"
    )
    use: ClassVar = "inference"
    block: int = 64
    top_k: int = 4
    memory: int | None = None
    local: int | None = None
    positions: str = "remapped"
    rotary: float | None = None
    longest: int | None = None
    choose: str = "landmark"
    share_heads: bool = False
    offload: str | None = None

    def __post_init__(self) -> None:
        check_block(self.block)
        _whole("top_k", self.top_k, 0)
        for name in ("memory", "local", "longest"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1)
        if self.local is not None and self.local % self.block:
            raise RegardError(f"local is {self.local}; it must be a multiple of block, {self.block}.")
        for name, known in (("positions", POSITIONS), ("choose", CHOICES)):
            if getattr(self, name) not in known:
                raise RegardError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}.")
        if self.rotary is not None and not 1 < self.rotary < float("inf"):
            raise RegardError(f"rotary is {self.rotary!r}; it must be a base above 1, such as 10000.")
        if self.longest is not None and self.needs > self.longest:
            raise RegardError(
                f"a section of {self.local or self.block} tokens and {self.top_k} + 1 blocks of {self.block} "
                f"take {self.needs} positions, and the model was trained at {self.longest}; lower local or "
                "top_k."
            )
        self._check_offload()

    @property
    def needs(self) -> int:
        """How many positions a query and what it reads take."""
        return (self.local or self.block) + (self.top_k + 1) * self.block

    def build(self, site: Any = None) -> LandmarkMemoryHeads:
        sizes = Sizes(self.block, self.local or self.block, self.memory)
        return LandmarkMemoryHeads(
            sizes, self.top_k, self.choose, self.share_heads, self._turns(site), self.offload
        )

    def _turns(self, site: Any) -> Turns | None:
        if self.positions == "true":
            return None
        if self.rotary is None and site is None:
            raise RegardError(
                "remapped positions need rotary=, the base of the rotary embedding of q and k, where "
                'there is no model to ask; or positions="true".'
            )
        if self.rotary is None:
            return turns_of_module(site.module)
        return Turns(self.rotary)

    def _check_offload(self) -> None:
        if self.offload is None:
            return
        try:
            torch.device(self.offload)
        except (RuntimeError, TypeError):
            raise RegardError(f"offload is {self.offload!r}; it must be a device, such as 'cpu'.") from None

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return (
            cls(block=3, top_k=2, memory=4, rotary=100.0),
            cls(block=2, top_k=1, local=4, positions="true", share_heads=True),
            cls(block=3, top_k=0, positions="true"),
        )

    @classmethod
    def limit(cls, length: int) -> tuple[Spec, Spec]:
        return cls(block=3, top_k=length, local=6, positions="true"), Landmark(3)


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RegardError(f"{name} is {value!r}; it must be a whole number from {least}.")
