"""The official names of VAN's weights, from those of the model that transformers had before version 5.

Status: read from both; compared by running ours alone, since transformers has the model no more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_STAGE = re.compile(r"^(?:van\.)?encoder\.stages\.(\d+)\.(embeddings|layers|normalization)\.(.+)$")
_INSIDE = (
    ("convolution.", "proj."), ("normalization.", "norm."),
    ("pre_normomalization.", "norm1."), ("post_normalization.", "norm2."),
    ("attention.pre_projection.conv.", "attn.proj_1."),
    ("attention.attention_layer.attention.depth_wise.", "attn.spatial_gating_unit.conv0."),
    ("attention.attention_layer.attention.depth_wise_dilated.", "attn.spatial_gating_unit.conv_spatial."),
    ("attention.attention_layer.attention.point_wise.", "attn.spatial_gating_unit.conv1."),
    ("attention.post_projection.", "attn.proj_2."),
    ("attention_scaling.weight", "layer_scale_1"), ("mlp_scaling.weight", "layer_scale_2"),
    ("mlp.in_dense.", "mlp.fc1."), ("mlp.depth_wise.", "mlp.dwconv.dwconv."), ("mlp.out_dense.", "mlp.fc2."),
)  # fmt: skip


def official_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of transformers' `VanForImageClassification` under the official names.

    Official names, and those that are neither, stay as they are; `load_published` then says which do not fit.

    Args:
        state: name -> weight, such as `Visual-Attention-Network/van-base` holds.

    Example:
        >>> import torch
        >>> list(official_names({"van.encoder.stages.0.layers.1.attention_scaling.weight": torch.ones(2)}))
        ['block1.1.layer_scale_1']
    """
    return {_official(name): x for name, x in state.items()}


def _official(name: str) -> str:
    found = _STAGE.match(name)
    if found is None:
        return re.sub(r"^classifier\.", "head.", name)
    stage, part, rest = int(found[1]) + 1, found[2], found[3]
    if part == "normalization":
        return f"norm{stage}.{rest}"
    before = ""
    if part == "layers":
        layer, _, rest = rest.partition(".")
        before = f"{layer}."
    for theirs, own in _INSIDE:
        if rest.startswith(theirs):
            rest = own + rest.removeprefix(theirs)
            break
    return f"patch_embed{stage}.{rest}" if part == "embeddings" else f"block{stage}.{before}{rest}"
