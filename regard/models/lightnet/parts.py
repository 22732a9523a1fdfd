"""The layers of a LightNet, around mixers for text or grids, and what its models share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from regard.attention.lightnet import MDLRPE, MDTPE, LightNetGrid, LightNetText
from regard.attention.lightnet.positions import initial_angles
from regard.errors import ShapeMismatch
from regard.models.lightnet.config import LightNetConfig
from regard.models.stateful import state_layer

NAME = "LightNet"


class GatedMLP(nn.Module):
    """W_3 (SiLU(W_1 x) * W_2 x)."""

    def __init__(self, config: LightNetConfig) -> None:
        super().__init__()
        dim, inner = config.hidden_size, int(config.intermediate_size or 0)
        self.gate, self.up = nn.Linear(dim, inner, bias=False), nn.Linear(dim, inner, bias=False)
        self.down = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class LightNetBlock(GradientCheckpointingLayer):
    """Mixing of positions, then of channels, each around a residual stream.

    Args:
        config: of the model.
        layer: from 0.
        axes: of the grid, or 0 for a causal text.
    """

    def __init__(self, config: LightNetConfig, layer: int, axes: int) -> None:
        super().__init__()
        options: dict[str, Any] = {
            "dim": config.hidden_size, "heads": config.num_attention_heads, "lrpe": config.lrpe,
            "gate_rank": config.gate_rank, "preset": config.preset, "eps": config.norm_eps,
        }  # fmt: skip
        self.layer_idx, self.axes = layer, axes
        self.mixer = (LightNetGrid(**options, axes=axes) if axes else LightNetText(**options)).build()
        self.before = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.between = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        valid: Tensor | None = None,
        past_key_values: Cache | None = None,
        grid: tuple[int, ...] | None = None,
        class_tokens: int = 0,
    ) -> Tensor:
        x = self.before(hidden_states)
        if self.axes:
            mixed = self.mixer(x, grid=grid, class_tokens=class_tokens, valid=valid)
        elif past_key_values is None:
            mixed = self.mixer(x, valid)
        else:
            layer = state_layer(past_key_values, self.layer_idx, NAME)
            check_batch(layer.state, x)
            mixed, layer.state = self.mixer.step(x, layer.state, valid)
            layer.length += x.shape[1]
            layer.is_initialized = True
        hidden_states = hidden_states + mixed
        out: Tensor = hidden_states + self.mlp(self.between(hidden_states))
        return out


class LightNetPreTrainedModel(PreTrainedModel):
    """What the models share: loading, saving, initial weights."""

    config: LightNetConfig
    config_class = LightNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LightNetBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": LightNetBlock}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MDLRPE):
            init.copy_(module.theta, initial_angles(*module.theta.shape))
        elif isinstance(module, MDTPE):
            for axis in module.axes:
                for name in ("a", "b", "decay"):
                    init.normal_(getattr(axis, name))
                init.ones_(axis.weight)


def check_batch(state: tuple[Tensor, ...] | None, x: Tensor) -> None:
    """Refuse a cache of another batch."""
    if state is not None and state[0].shape[0] != x.shape[0]:
        raise ShapeMismatch(
            f"this cache holds states of {state[0].shape[0]} sequences, and {x.shape[0]} were given."
        )
