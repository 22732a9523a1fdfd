"""The number formats and devices that a model can be loaded in."""

from __future__ import annotations

from typing import Any

from regard.errors import RegardError, first_sentence

DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_dtype(dtype: Any) -> Any:
    """Return a torch dtype given as such or by name; float32 for None.

    Raises:
        RegardError: where it is none that a model can be computed in.
    """
    import torch

    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise RegardError(f"There is no dtype {name!r} to load a model in; use {', '.join(DTYPES)}.")
    return getattr(torch, name)


def check_device(device: str | None) -> None:
    """Refuse a device that this machine or this PyTorch does not have.

    Raises:
        RegardError: saying why.
    """
    import torch

    if device is None:
        return
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        raise RegardError(f"There is no device {device!r}; use cpu, or cuda, cuda:1, mps or xpu.") from None
    if kind == "meta":
        raise RegardError("Nothing can be computed on device 'meta'; use cpu or an accelerator.")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise RegardError(f"Device {device!r} cannot be used: {first_sentence(error)}.") from error


def placed(model: Any, device: str | None) -> Any:
    """Return the model on a device.

    Raises:
        RegardError: where it does not fit.
    """
    if device is None:
        return model
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise RegardError(f"The model does not fit on {device!r}: {first_sentence(error)}.") from error
