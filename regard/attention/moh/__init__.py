"""Mixture of heads: tokens choose which attention heads they use, in new layers and in pretrained models.

`apply_moh` and `remove_moh` are for models of transformers, which is imported where they are.
"""

from typing import TYPE_CHECKING, Any

from regard.attention.head_router import HeadRouter
from regard.attention.moh.balance import HeadUsage, balance_loss, head_usage
from regard.attention.moh.function import moh_attention
from regard.attention.moh.layer import MoHAttention
from regard.attention.moh.spec import PUBLISHED, MixtureOfHeads

if TYPE_CHECKING:
    from regard.attention.placed_routers import apply_moh, remove_moh

__all__ = [
    "PUBLISHED", "HeadRouter", "HeadUsage", "MixtureOfHeads", "MoHAttention", "apply_moh", "balance_loss",
    "head_usage", "moh_attention", "remove_moh",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("apply_moh", "remove_moh"):
        from regard.attention import placed_routers

        return getattr(placed_routers, name)
    raise AttributeError(f"module 'regard.attention.moh' has no attribute {name!r}")
