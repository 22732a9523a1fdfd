"""Files of hidden states of the official code: a dict of lists, a sample each, as torch saves it.

Source: mshukor/xl-vlms (`hidden_states`: a list of {module: [1, positions, D]}, `token_of_interest_mask`: a
list of bool [1], and what was asked and answered). Status: agrees with the official code.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from regard.errors import RegardError
from regard.lens.concepts.features import Features


def read_official_features(path: str | Path, module: str | None = None) -> Features:
    """Return the states of a file that xl-vlms saved.

    Samples of the mask alone are kept, and of several positions the mean, as the official code does. It is
    read with `weights_only`, so that no code in it is run.

    Args:
        module: which, where there are several; it is the layer's name in what is returned.

    Raises:
        RegardError: for a file that cannot be read, holds something else, or has no such module.
    """
    try:
        told = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as failure:
        raise RegardError(f"cannot read {path}: {failure.strerror}.") from failure
    except Exception as failure:  # whatever unpickling meets in a file of another kind
        raise RegardError(f"{path} holds no hidden states of xl-vlms.") from failure
    if not isinstance(told, dict) or not told.get("hidden_states"):
        raise RegardError(f"{path} holds no hidden states of xl-vlms.")
    states = told["hidden_states"]
    names = list(states[0])
    chosen = names[0] if module is None and len(names) == 1 else module
    if chosen not in names:
        raise RegardError(f"module is {module!r}; {path} has {', '.join(names)}.")
    mask = told.get("token_of_interest_mask")
    kept = [n for n in range(len(states)) if mask is None or bool(torch.as_tensor(mask[n]).any())]
    if not kept:
        raise RegardError(f"{path} marks the token of interest in 0 of {len(states)} samples.")
    rows = torch.stack([_one(states[n][chosen]) for n in kept])
    about = {"model": None, "prompts": len(states), "source": "xl-vlms"}
    return Features(rows[:, None], (str(chosen),), tuple(kept), about)


def _one(x: Tensor) -> Tensor:
    return x.float().reshape(-1, x.shape[-1]).mean(0)
