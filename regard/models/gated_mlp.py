"""The gated MLP of language models here."""

from __future__ import annotations

from torch import Tensor, nn


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x), without bias.

    Args:
        dim: width of what comes in and goes out.
        inner: width between.
    """

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(dim, inner, bias=False), nn.Linear(dim, inner, bias=False)
        self.down_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map the last dimension of x, [..., dim]."""
        out: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out
