"""A small model that labels the pixels of an image, around any mixers of positions.

    h = embed(pixels), or MD-TPE of it                    [B, height, width, dim]
    h = h + mixer(norm(h));  h = h + mlp(norm(h))         each layer
    logits = readout(norm(h))

Everything but the mixers and MD-TPE is the same for all. `DecayLayer` differs from LightNet's layer in the
mixing alone: causal scans with a fixed decay a head, in one direction or summed over two. Status: our choice.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from regard.attention.lightnet.layers import LightNetLayer
from regard.attention.lightnet.positions import MDTPE
from regard.engines.scan import scan


class DecayLayer(LightNetLayer):
    """Scans over the flattened grid with the decays 1 - 2^-(2..5), spread over the heads.

    Args:
        dim: width of x.
        heads: number of heads.
        both: whether a second scan goes from the end to the beginning.
    """

    def __init__(self, dim: int, heads: int, both: bool) -> None:
        super().__init__(dim, heads, 2, lrpe=False, gate_rank=dim, preset="paper", eps=1e-5)
        self.both = both
        self.decay: Tensor
        self.register_buffer("decay", torch.log1p(-(2.0 ** -torch.linspace(2, 5, heads))))

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed x, [B, height, width, dim]."""
        flat = x.flatten(1, -2)
        q, k, v = self.parts(flat)
        mixed, _ = scan(q, k, v, self.decay)
        if self.both:
            back, _ = scan(q.flip(2), k.flip(2), v.flip(2), self.decay)
            mixed = mixed + back.flip(2)
        return self.finish(mixed, flat).view(x.shape)


class SoftmaxLayer(LightNetLayer):
    """Softmax attention in LightNet's layer, for comparison.

    Args:
        dim: width of x.
        heads: number of heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads, 2, lrpe=False, gate_rank=dim, preset="paper", eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed x, [B, height, width, dim]."""
        flat = x.flatten(1, -2)
        q, k, v = self.parts(flat)
        return self.finish(nn.functional.scaled_dot_product_attention(q, k, v), flat).view(x.shape)


class PixelModel(nn.Module):
    """Logits of a label for every pixel.

    Args:
        symbols: number of different pixels.
        labels: number of labels.
        dim: width of the residual stream.
        mixers: one a layer, each from [B, height, width, dim] to the same.
        tpe: heads of an MD-TPE after the embedding; 0 for none.

    Example:
        >>> from regard.attention import LightNetGrid
        >>> mixers = [LightNetGrid(dim=16, heads=2).build() for _ in range(2)]
        >>> PixelModel(16, 8, 16, mixers)(torch.zeros(3, 4, 5, dtype=torch.int64)).shape
        torch.Size([3, 4, 5, 8])
    """

    def __init__(
        self, symbols: int, labels: int, dim: int, mixers: Iterable[nn.Module], tpe: int = 0
    ) -> None:
        super().__init__()
        self.embed, self.mixers = nn.Embedding(symbols, dim), nn.ModuleList(mixers)
        self.smooth = MDTPE(dim, tpe, 2) if tpe else None
        self.before = nn.ModuleList(nn.LayerNorm(dim) for _ in self.mixers)
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            for _ in self.mixers
        )
        self.readout = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, labels))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [B, height, width, labels] of pixels int64 [B, height, width]."""
        h = self.embed(pixels)
        h = h if self.smooth is None else self.smooth(h)
        for norm, mixer, mlp in zip(self.before, self.mixers, self.mlps, strict=True):
            h = h + mixer(norm(h))
            h = h + mlp(h)
        logits: Tensor = self.readout(h)
        return logits
