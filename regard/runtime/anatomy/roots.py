"""The model inside its wrappers."""

from __future__ import annotations

from torch import nn

from regard.errors import UnsupportedModel


def root_of(model: nn.Module) -> nn.Module:
    """Return the transformers model inside PEFT, data-parallel or other wrappers.

    A wrapper that holds several transformers models side by side, and a plain `nn.Module` that holds
    none, are returned as they are.

    Raises:
        UnsupportedModel: where `model` is no `nn.Module`.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, nn.Module):
        raise UnsupportedModel(
            f"regard needs a torch.nn.Module, and got {type(model).__name__}; of a pipeline, give its .model."
        )
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    if isinstance(model, PreTrainedModel):
        return model
    outermost: list[nn.Module] = []
    names: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(name.startswith(n + ".") for n in names):
            outermost.append(module)
            names.append(name)
    return outermost[0] if len(outermost) == 1 else model
