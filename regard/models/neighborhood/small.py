"""A small transformer of neighbourhood attention on grids of one, two or three axes.

    x = x W + b;  x = x + na(LN x);  x = x + MLP(LN x)  each layer;  out = LN(x) W + b      at every position

Layers take their dilations in turn, as in DiNAT. Status: partly our choice.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from regard.attention.neighborhood import NeighborhoodAttention
from regard.attention.neighborhood.rules import Flags, Numbers
from regard.errors import RegardError, ShapeMismatch


class NeighborhoodTransformer(nn.Module):
    """A transformer from [B, X1.., inputs] to [B, X1.., outputs].

    Args:
        inputs, outputs: numbers at each position.
        dim: width of the residual stream.
        heads: of each layer.
        layers: how many.
        kernel_size: along each axis; one for all or one for each.
        axes: of the grid, 1 to 3.
        dilations: of the layers, in turn.
        is_causal: whether axes have an order; one for all or one for each.
        position_bias: whether layers have a table of biases by relative position, without which the inside of
            a grid has no directions; not with `is_causal`.
        mlp_ratio: inner width of the MLPs over `dim`.

    Example:
        >>> import torch
        >>> model = NeighborhoodTransformer(3, 10, dim=16, heads=2, layers=2, kernel_size=3, dilations=(1, 2))
        >>> model(torch.randn(2, 12, 9, 3)).shape
        torch.Size([2, 12, 9, 10])
    """

    def __init__(
        self, inputs: int, outputs: int, *, dim: int, heads: int, layers: int, kernel_size: Numbers,
        axes: int = 2, dilations: Sequence[int] = (1,), is_causal: Flags = False,
        position_bias: bool = False, mlp_ratio: float = 2.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if layers < 1 or not dilations:
            raise RegardError(f"layers is {layers} and dilations {dilations!r}; there must be one at least.")
        self.inputs, self.axes = inputs, axes
        self.embed = nn.Linear(inputs, dim)
        self.layers = nn.ModuleList(
            _Layer(
                NeighborhoodAttention(
                    dim,
                    heads,
                    kernel_size,
                    axes,
                    dilation=dilations[i % len(dilations)],
                    is_causal=is_causal,
                    position_bias=position_bias,
                ),
                int(mlp_ratio * dim),
            )
            for i in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, X1.., outputs] of x [B, X1.., inputs]."""
        if x.ndim != self.axes + 2 or x.shape[-1] != self.inputs:
            raise ShapeMismatch(
                f"x must be [batch, {self.axes} axes, {self.inputs}], and is {list(x.shape)}."
            )
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(self.norm(x))
        return out


class _Layer(nn.Module):
    def __init__(self, attention: NeighborhoodAttention, inner: int) -> None:
        super().__init__()
        dim = attention.dim
        self.attention = attention
        self.before, self.between = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        out: Tensor = x + self.mlp(self.between(x))
        return out
