"""A plain ViT: patches, learned positions, attention to all patches, the mean at the end.

    x = conv(pixels) + positions                           [B, H, W, d]
    x = x + attention(LN x);  x = x + MLP(LN x)            each layer; scaled_dot_product_attention
    logits = mean(LN x) W + b

Positions are interpolated for images of another size. Parameters have timm's names. "vit-tiny", "vit-small"
and "vit-base" have the sizes of DeiT, "vit-nano" and "vit-digits" are ours, for images of 32 x 32 and 8 x 8.

Source: Dosovitskiy et al., 2021, arXiv 2010.11929; sizes of Touvron et al., 2021, arXiv 2012.12877. Status:
agrees with timm's of the same options by running both: the mean, and no class token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from regard.attention.block import Block, Grid, chosen_queries
from regard.errors import RegardError, ShapeMismatch
from regard.models.images.base import Maps
from regard.models.images.patches import PatchConfig, PatchModel
from regard.models.images.paths import DropPath, drop_rates
from regard.models.images.registry import image_family

EPS = 1e-6


class PlainViTConfig(PatchConfig):
    """Sizes and options of a plain ViT.

    Args:
        image_size, patch_size, hidden_size, num_hidden_layers: see `PatchConfig`.
        num_attention_heads: of each layer; they divide hidden_size.
        intermediate_size: width inside the MLPs.
        dropout: of outputs of attention and MLPs, in training.
        drop_path_rate: share of samples that skip a branch in training, in the last layer; it rises to that.
        initializer_range: standard deviation of fresh weights.
    """

    model_type = "regard_vit"
    counts: ClassVar = (*PatchConfig.counts, "num_attention_heads", "intermediate_size")
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "vit-digits": {
            "image_size": 8, "patch_size": 2, "hidden_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 4, "intermediate_size": 128,
        },
        "vit-nano": {
            "image_size": 32, "patch_size": 4, "hidden_size": 128, "num_hidden_layers": 4,
            "num_attention_heads": 4, "intermediate_size": 256,
        },
        "vit-tiny": {},
        "vit-small": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
        "vit-base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    }  # fmt: skip

    num_attention_heads: int = 3
    intermediate_size: int = 768
    dropout: float = 0.0
    drop_path_rate: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            raise RegardError(
                f"hidden_size is {self.hidden_size}, which {self.num_attention_heads} heads do not divide."
            )


class GridAttention(Block):
    """Attention of all positions of a plane to all, with projections, from [B, H, W, dim] to the same.

    Args:
        dim: width of a position.
        heads: number of heads; it divides dim.

    Example:
        >>> layer = GridAttention(16, 2)
        >>> layer.rows(torch.randn(1, 4, 5, 16), [7]).shape
        torch.Size([1, 2, 1, 20])
    """

    shows = "rows"

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise RegardError(f"dim is {dim}, which {heads} heads do not divide.")
        self.dim, self.heads = dim, heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed positions.

        Raises:
            ShapeMismatch: where x is not [batch, height, width, dim].
        """
        q, k, v = self._parts(x)
        return self._closed(F.scaled_dot_product_attention(q, k, v), x)

    def reference(self, x: Tensor) -> Tensor:
        q, k, v = self._parts(x)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return self._closed(weights @ v, x)

    def grids(self, x: Tensor) -> tuple[Grid, Grid]:
        plane = (x.shape[1], x.shape[2])
        return plane, plane

    def rows(self, x: Tensor, queries: Tensor | Sequence[int]) -> Tensor:
        q, k, _ = self._parts(x)
        chosen = chosen_queries(queries, (x.shape[1], x.shape[2])).to(x.device)
        return (q[:, :, chosen] @ k.mT * q.shape[-1] ** -0.5).softmax(-1)

    def example(self, generator: torch.Generator) -> Tensor:
        return torch.randn(2, 3, 4, self.dim, generator=generator, dtype=torch.float64)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.ndim != 4 or x.shape[3] != self.dim:
            raise ShapeMismatch(f"x must be [batch, height, width, {self.dim}], and is {list(x.shape)}.")
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _closed(self, out: Tensor, x: Tensor) -> Tensor:
        mixed: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return mixed.view(x.shape)


class MLP(nn.Module):
    """Two linear maps with GELU between."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class ViTLayer(nn.Module):
    """Attention and an MLP around a residual stream [B, H, W, dim]."""

    def __init__(self, config: PlainViTConfig, drop_path: float) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=EPS) for _ in range(2))
        self.attn = GridAttention(dim, config.num_attention_heads)
        self.mlp = MLP(dim, config.intermediate_size)
        self.drop, self.drop_path = nn.Dropout(config.dropout), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.drop(self.attn(self.norm1(x))))
        out: Tensor = x + self.drop_path(self.drop(self.mlp(self.norm2(x))))
        return out


class PatchEmbedding(nn.Module):
    """A convolution whose kernel is its stride, [B, C, H p, W p] to [B, H, W, dim]."""

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, patch, stride=patch)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.proj(pixels).permute(0, 2, 3, 1)
        return out


@image_family(*PlainViTConfig.presets)
class PlainViTForImageClassification(PatchModel):
    """A plain ViT as an image classifier; its maps are those after each layer, the last one normed.

    Example:
        >>> model = PlainViTForImageClassification(PlainViTConfig.preset("vit-digits", num_channels=1))
        >>> model(torch.randn(2, 1, 8, 8)).logits.shape
        torch.Size([2, 2])
    """

    config: PlainViTConfig
    config_class = PlainViTConfig
    fixed: ClassVar = False

    def __init__(self, config: PlainViTConfig) -> None:
        super().__init__(config)
        rows, columns = config.grid
        self.patch_embed = PatchEmbedding(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, rows * columns, config.hidden_size))
        (rates,) = drop_rates(config.drop_path_rate, [config.num_hidden_layers])
        self.blocks = nn.ModuleList(ViTLayer(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.hidden_size, eps=EPS)
        self.head = nn.Linear(config.hidden_size, self.num_labels) if self.num_labels else nn.Identity()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PlainViTForImageClassification):
            init.trunc_normal_(module.pos_embed, std=self.config.initializer_range)

    def features(self, pixel_values: Tensor) -> Maps:
        x = self.patch_embed(pixel_values)
        x = x + self._positions((x.shape[1], x.shape[2]))
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        maps[-1] = self.norm(x)
        return tuple(x.permute(0, 3, 1, 2) for x in maps)

    def classify(self, maps: Maps) -> Tensor:
        logits: Tensor = self.head(maps[-1].mean((2, 3)))
        return logits

    def _positions(self, grid: Grid) -> Tensor:
        """[1, H, W, dim] on a grid, interpolated where it is not the config's."""
        positions = self.pos_embed.unflatten(1, self.config.grid)
        if grid == self.config.grid:
            return positions
        plane = positions.permute(0, 3, 1, 2).float()
        grown = F.interpolate(plane, size=grid, mode="bicubic", antialias=True)
        return grown.permute(0, 2, 3, 1).to(positions.dtype)
