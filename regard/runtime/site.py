"""Where attention happens in a model, and the points around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

Route = Literal["interface", "sdpa", "block"]

POINT_KINDS = (
    "embedding",  # output of the token (or patch) embedding            [B, T, D]
    "residual_pre",  # residual stream entering block `layer`              [B, T, D]
    "residual",  # residual stream leaving block `layer`               [B, T, D]
    "head",  # one head's output before the output projection      [B, T, Dv]
    "attention",  # output of the attention module, after the projection [B, T, D]
    "mlp",  # output of the MLP (or mixture of experts)           [B, T, D]
    "router",  # router logits of a mixture of experts               [B*T, E] or [B, T, E]
    "final_norm",  # output of the final norm                            [B, T, D]
    "logits",  # output of the unembedding                           [B, T, V]
)


@dataclass(frozen=True, eq=False)
class Site:
    """One attention module of one model.

    Attributes:
        name: qualified module name, as in `model.named_modules()`.
        alias: short stable name, such as `text.12`, `vision.3`, `image.0`, `decoder.0`, `cross.5`.
        kind: the part before the dot of `alias`.
        layer: the number after it, counted from 0 within the kind.
        module: the attention module itself.
        route: `interface` where the module calls transformers' attention interface, `sdpa` where it
            calls `torch.nn.functional.scaled_dot_product_attention` itself, `block` where it is a block on
            a plane, which shows maps or rows of its own.
        cross: whether its keys come from another sequence than its queries.
        heads: number of query heads, or None where the module does not tell.
    """

    name: str
    alias: str
    kind: str
    layer: int
    module: nn.Module
    route: Route = "interface"
    cross: bool = False
    heads: int | None = None

    def named(self, layer: int | str | None, main: str) -> bool:
        """Whether a layer number (of the main stack), an alias or a module name means this site."""
        if isinstance(layer, int):
            return self.kind == main and self.layer == layer
        return layer in (self.alias, self.name)

    def __repr__(self) -> str:
        return f"Site({self.alias}: {self.name})"


@dataclass(frozen=True)
class Point:
    """A place in a model where a tensor can be read, changed or patched; `POINT_KINDS` lists the kinds.

    Attributes:
        kind: one of `POINT_KINDS`.
        layer: the block's number in the model's main stack, or an alias such as `vision.3`; None for
            the kinds that exist once (`embedding`, `final_norm`, `logits`).
        head: for kind `head`, the query head.
        position: one position, or None for all. Array index into the time dimension of the tensor of
            this forward; may be negative.
    """

    kind: str
    layer: int | str | None = None
    head: int | None = None
    position: int | None = None
