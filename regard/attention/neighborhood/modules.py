"""Layers of neighbourhood attention with the names and arguments of natten's modules."""

from __future__ import annotations

from typing import Any, ClassVar

from regard.attention.neighborhood.layer import NeighborhoodAttention
from regard.attention.neighborhood.rules import Flags, Numbers


class _Natten(NeighborhoodAttention):
    count: ClassVar[int]

    def __init__(
        self, embed_dim: int, num_heads: int, kernel_size: Numbers, stride: Numbers = 1,
        dilation: Numbers = 1, is_causal: Flags = False, rel_pos_bias: bool = False, qkv_bias: bool = True,
        qk_scale: float | None = None, proj_drop: float = 0.0, *, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(
            embed_dim, num_heads, kernel_size, self.count, stride, dilation, is_causal, rel_pos_bias,
            qkv_bias, qk_scale, proj_drop, device=device, dtype=dtype,
        )  # fmt: skip


class NeighborhoodAttention1D(_Natten):
    """Neighbourhood attention of x [B, X, embed_dim]; see `NeighborhoodAttention`.

    Example:
        >>> import torch
        >>> layer = NeighborhoodAttention1D(32, 4, kernel_size=3, is_causal=True)
        >>> x = torch.randn(2, 9, 32)
        >>> first, state = layer.step(x[:, :8])
        >>> torch.allclose(layer.step(x[:, 8:], state)[0], layer(x)[:, 8:], atol=1e-6)
        True
    """

    count = 1


class NeighborhoodAttention2D(_Natten):
    """Neighbourhood attention of x [B, X, Y, embed_dim]; see `NeighborhoodAttention`."""

    count = 2


class NeighborhoodAttention3D(_Natten):
    """Neighbourhood attention of x [B, X, Y, Z, embed_dim]; see `NeighborhoodAttention`."""

    count = 3
