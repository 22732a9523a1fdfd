"""The parts around attention, found by name where names are settled, else by structure."""

from __future__ import annotations

import re

from torch import Tensor, nn

from regard.errors import UnsupportedModel
from regard.runtime.site import Site

PROJECTIONS = (
    "o_proj", "out_proj", "c_proj", "dense", "wo", "Wo", "o", "proj", "projection", "out_lin",
    "output_proj", "to_out", "out",
)  # fmt: skip
MLPS = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "mlp_block", "DenseReluDense", "fc2")
NORMS = re.compile(r"^(norm|final_layer_?norm|ln_f|final_norm|norm_f|layer_?norm|post_layernorm)$")


def block_of(root: nn.Module, site: Site) -> tuple[str, nn.Module] | None:
    """Return (name, module) of the block a site is part of: the nearest list item that holds an MLP."""
    parts = site.name.split(".")
    nearest = None
    for end in range(len(parts) - 1, 0, -1):
        if not parts[end - 1].isdigit():
            continue
        name = ".".join(parts[:end])
        module = root.get_submodule(name)
        nearest = nearest or (name, module)
        if mlp_of(module) is not None:
            return name, module
    return nearest


def mlp_of(block: nn.Module) -> nn.Module | None:
    """Return the module whose output is what a block's MLP adds to the residual stream."""
    for name in MLPS:
        if isinstance(found := getattr(block, name, None), nn.Module):
            return found
    dense = getattr(getattr(block, "output", None), "dense", None)
    if isinstance(dense, nn.Module) and hasattr(block, "intermediate"):
        return dense
    layers = getattr(block, "layer", None)
    if isinstance(layers, nn.ModuleList) and len(layers):
        return next((m for n in MLPS if isinstance(m := getattr(layers[-1], n, None), nn.Module)), None)
    return None


def projection_of(root: nn.Module, site: Site) -> nn.Module:
    """Return the output projection of a site: the linear map applied to the joined head outputs.

    Raises:
        UnsupportedModel: where none is found.
    """
    for name in PROJECTIONS:
        found = getattr(site.module, name, None)
        if isinstance(found, nn.Sequential) and len(found):
            found = found[0]
        if isinstance(found, nn.Module) and hasattr(found, "weight"):
            return found
    parent = root.get_submodule(site.name.rpartition(".")[0])
    dense = getattr(getattr(parent, "output", None), "dense", None)
    if isinstance(dense, nn.Module):
        return dense
    raise UnsupportedModel(
        f"No output projection was found in {type(site.module).__name__} ({site.name}); its parts are "
        f"{', '.join(name for name, _ in site.module.named_children()) or 'none'}."
    )


def projection_weight(module: nn.Module, heads: int) -> Tensor:
    """Return the weight of an output projection by query head, [D_model, H, Dv].

    A LoRA adapter on it counted in; a GPT-2 `Conv1D`, which stores it transposed, allowed for.

    Raises:
        UnsupportedModel: for a quantised or offloaded weight, or a width that the heads do not divide.
    """
    base = getattr(module, "base_layer", module)
    weight = base.weight
    if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point or weight.ndim != 2:
        raise UnsupportedModel(
            f"The output projection is a {type(base).__name__} whose weight is no float matrix (quantised?); "
            "load the model unquantised for this measurement."
        )
    if weight.is_meta:
        raise UnsupportedModel(
            "The output projection's weight is offloaded, and so not in memory when it is needed; keep the "
            "attention layers in memory for this measurement."
        )
    if base is not module and not getattr(module, "merged", False):
        for adapter in getattr(module, "active_adapters", ()):
            if adapter in getattr(module, "lora_A", {}):
                weight = weight + module.get_delta_weight(adapter).to(weight)  # type: ignore[operator]
    if type(base).__name__ == "Conv1D":
        weight = weight.T
    if weight.shape[1] % heads:
        raise UnsupportedModel(
            f"The output projection takes {weight.shape[1]} numbers, which {heads} heads do not divide."
        )
    return weight.unflatten(1, (heads, -1))


def final_norm_of(root: nn.Module, block_name: str) -> nn.Module | None:
    """Return the norm beside the list of blocks that follows it, or None."""
    holder = root.get_submodule(block_name.rpartition(".")[0].rpartition(".")[0])
    for name, module in reversed(list(holder.named_children())):
        if NORMS.match(name) and any(True for _ in module.parameters()):
            return module
    return None


def router_of(mlp: nn.Module) -> nn.Module | None:
    """Return the module that scores the experts, or None for a dense MLP."""
    if experts_of(mlp) is None:
        return None
    return next((m for n in ("gate", "router") if isinstance(m := getattr(mlp, n, None), nn.Module)), None)


def experts_of(mlp: nn.Module) -> nn.Module | None:
    """Return the experts of a mixture, or None for a dense MLP."""
    experts = getattr(mlp, "experts", None)
    return experts if isinstance(experts, nn.Module) else None


def embedding_of(root: nn.Module) -> nn.Module | None:
    """Return the token (or patch) embedding, or None."""
    try:
        found = root.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        found = None
    if isinstance(found, nn.Module):
        return found
    return next((m for m in root.modules() if isinstance(m, nn.Embedding)), None)


def unembedding_of(root: nn.Module) -> nn.Module | None:
    """Return the map from the residual stream to logits, or None."""
    try:
        found = root.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None
