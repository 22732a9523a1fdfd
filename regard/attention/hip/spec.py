"""The options of HiP attention, and its presets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from regard.attention.costs import Costs
from regard.attention.hip.heads import HiPAttention, module_of
from regard.attention.registry import Spec, get, mechanism
from regard.errors import RegardError

REPRESENTATIVES = ("center", "first")
VARIANTS = ("v1.1", "v1")
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "serving": {"window": 1024, "sink": 256},
    "v1": {"variant": "v1", "query_block": 32, "query_stride": 1, "window": 128, "sink": 32},
}


@mechanism("hip")
@dataclass(frozen=True, kw_only=True)
class HiP(Spec):
    """Softmax attention to a window, the first tokens, and some `k` keys found by a binary search in a tree.

    Attributes:
        k: how many tokens are found for each block of queries and head.
        query_block: consecutive queries that share what is found, in a prefill.
        query_stride: of these, every how many takes part in the search.
        key_block: consecutive keys that are found together.
        key_stride: of these, every how many takes part in the search.
        window: last keys that a row sees in any case, itself included; a multiple of `key_block`.
        sink: first keys that a row sees in any case; a multiple of `key_block`.
        representative: which block of a stretch of keys speaks for it in the search: "center" or "first".
        variant: "v1.1", halving stretches; or "v1", doubling the resolution.
        dense_layers: how many of a model's first layers keep softmax attention.
        refresh: in decoding, after how many tokens it searches anew; at most `window`.

    Example:
        >>> HiP.of("serving", k=1024).window
        1024
    """

    module: ClassVar = HiPAttention
    costs: ClassVar = Costs(
        time="T k D log(T / k)", memory="T k / R", step_time="k D log(T / k)", step_memory="T D"
    )
    k: int = 512
    query_block: int = 64
    query_stride: int = 2
    key_block: int = 2
    key_stride: int = 1
    window: int = 256
    sink: int = 16
    representative: str = "center"
    variant: str = "v1.1"
    dense_layers: int = 3
    refresh: int = 8

    def __post_init__(self) -> None:
        least = {"window": 0, "sink": 0, "dense_layers": 0}
        for name in (
            "k", "query_block", "query_stride", "key_block", "key_stride", "window", "sink", "dense_layers",
            "refresh",
        ):  # fmt: skip
            value, low = getattr(self, name), least.get(name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise RegardError(f"{name} is {value!r}; it must be a whole number from {low}.")
        for name in ("window", "sink"):
            value = getattr(self, name)
            if value % self.key_block:
                raise RegardError(
                    f"{name} is {value}; it must be a multiple of key_block, which is {self.key_block}."
                )
        for name, of in (("key_block", "k"), ("query_stride", "query_block"), ("key_stride", "key_block")):
            value, most = getattr(self, name), getattr(self, of)
            if value > most:
                raise RegardError(f"{name} is {value}; it can be at most {of}, which is {most}.")
        if self.window and self.refresh > self.window:
            raise RegardError(
                f"refresh is {self.refresh}; it can be at most window, which is {self.window}, or tokens "
                "would be lost between two searches."
            )
        if self.sink and not self.window:
            raise RegardError(
                f"sink is {self.sink} and window 0; without a window there can be no first tokens either."
            )
        for name, known in (("representative", REPRESENTATIVES), ("variant", VARIANTS)):
            if getattr(self, name) not in known:
                raise RegardError(f"{name} is {getattr(self, name)!r}; it must be {' or '.join(known)}.")

    @property
    def exempt(self) -> dict[str, str]:
        return dict(module_of(self).exempt)

    def build(self, site: Any = None) -> Any:
        """Return the module of one layer: that of `Softmax` in the first `dense_layers` layers.

        Raises:
            RegardError: where the model has no more layers than these.
        """
        if site is None or not self.dense_layers:
            return module_of(self)
        layers = getattr(getattr(site.module, "config", None), "num_hidden_layers", None)
        if isinstance(layers, int) and layers <= self.dense_layers:
            raise RegardError(
                f"dense_layers is {self.dense_layers} and the model has {layers} layers, so that none would "
                "be left for HiP; give dense_layers=0."
            )
        return get("softmax").build(site) if site.layer < self.dense_layers else module_of(self)

    @classmethod
    def of(cls, preset: str, **options: Any) -> HiP:
        """Return the options of a preset, with some changed.

        Args:
            preset: "paper", the defaults; "serving", the larger window and sink of the official wrapper of
                Llama; "v1", the first version.

        Raises:
            RegardError: where there is no such preset.
        """
        if preset not in PRESETS:
            raise RegardError(f"preset is {preset!r}; it must be one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[preset], **options})

    def lengths(self) -> tuple[int, ...]:
        return (0, 1, 7, 45)

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        small = cls(
            k=6, query_block=5, key_block=2, window=4, sink=2, dense_layers=0, query_stride=2, refresh=1
        )
        return (
            small,
            replace(small, k=4, representative="first", query_block=1, query_stride=1),
            replace(small, k=9, key_block=3, key_stride=2, window=3, sink=0, query_block=4),
            replace(small, variant="v1", query_stride=1),
        )

    @classmethod
    def limit(cls, length: int) -> tuple[Spec, Spec]:
        return cls(k=max(2, length), query_block=4, window=4, sink=2, dense_layers=0, refresh=1), get(
            "softmax"
        )
