"""Published weights into a model: every name and shape must fit, or nothing is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from regard.errors import RegardError

Weights = Mapping[str, Tensor]
Rename = Callable[[Weights], Weights]
COUNTER = "num_batches_tracked"


def load_published(
    model: nn.Module, weights: Weights | str | Path, rename: Rename | None = None, fresh: Sequence[str] = ()
) -> None:
    """Load weights that go by the model's own names, in place.

    Args:
        model: of any kind.
        weights: a state dict, or a `.safetensors` file.
        rename: what makes the model's names of the names that are found.
        fresh: how names begin that keep the weights the model has, as `["head."]` for other classes.

    Raises:
        RegardError: where the file cannot be read or is a pickle, or names are missing, unexpected, or of
            another shape; the message names them, and nothing was loaded.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 3)
        >>> load_published(model, {"fc.weight": torch.ones(3, 2)}, fresh=["bias"],
        ...     rename=lambda found: {k.removeprefix("fc."): v for k, v in found.items()})
        >>> model.weight.sum().item()
        6.0
    """
    found: Any = read_weights(weights) if isinstance(weights, str | Path) else weights
    if not isinstance(found, Mapping) or not all(isinstance(x, Tensor) for x in found.values()):
        raise RegardError("weights must be a .safetensors file or a mapping of names to tensors.")
    named = dict(found if rename is None else rename(found))
    own = model.state_dict()
    kept = {k: v for k, v in named.items() if not k.startswith(tuple(fresh))}
    wanted = {k: v for k, v in own.items() if not k.startswith(tuple(fresh))}
    faults = _faults(wanted, kept)
    if faults:
        raise RegardError(f"the weights do not fit {type(model).__name__}: {'; '.join(faults)}.")
    model.load_state_dict({**own, **kept})


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a `.safetensors` file.

    Raises:
        RegardError: where it is none, or cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise RegardError(f"there is no file {path}.")
    if path.suffix != ".safetensors":
        raise RegardError(
            f"{path} is no .safetensors file, and other kinds may run code when read; convert it where you "
            "trust it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'out.safetensors')."
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RegardError(f"{path} cannot be read: {str(error).splitlines()[0]}.") from None


def _faults(wanted: Weights, found: Weights) -> list[str]:
    """What does not fit, in words, each kind once."""
    missing = [name for name in wanted if name not in found and not name.endswith(COUNTER)]
    unexpected = [name for name in found if name not in wanted]
    shapes = [
        f"{name} is {list(found[name].shape)} there and {list(wanted[name].shape)} here"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
    told = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return [f"{len(names)} {kind} ({_listed(names)})" for kind, names in told if names]


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
