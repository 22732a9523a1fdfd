"""Loading a model of transformers that was converted to mixture of heads and saved with `save_pretrained`.

The config says how its heads were split; the weights of the routers stand among the model's, under
`head_router`. `from_pretrained` alone knows neither, and such a model then refuses to run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from regard.attention.placed_routers import MOH, ROUTER, apply_moh
from regard.errors import RegardError
from regard.runtime.permanent import KEY

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def load_moh(folder: str | Path, **options: Any) -> nn.Module:
    """Return a causal language model with its routers, in evaluation mode.

    Args:
        folder: where `save_pretrained` wrote it, or its name on the Hub.
        options: of `from_pretrained`, such as `dtype`.

    Raises:
        RegardError: where it was not converted, or the weights of a router are missing.

    Example:
        >>> apply_moh(model, shared=4, active=3, kind="learned")    # doctest: +SKIP
        >>> model.save_pretrained("converted")    # doctest: +SKIP
        >>> model = load_moh("converted")    # doctest: +SKIP
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    folder = str(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise RegardError(f"{folder} holds no model: {str(error).splitlines()[0]}") from None
    written: dict[str, Any] = getattr(config, KEY, None) or {}
    if MOH not in written:
        raise RegardError(f"{folder} holds a model whose heads were not converted; load it as any other.")
    options.setdefault("attn_implementation", written.get("before") or "sdpa")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would call the routers' weights unexpected
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    finally:
        logging.set_verbosity(verbosity)
    delattr(model.config, KEY)
    told = written[MOH]
    apply_moh(model, **told)
    _fill(model, folder)
    return model.eval()


def _fill(model: nn.Module, folder: str) -> None:
    """Read the parameters of the routers."""
    wanted = {name: p for name, p in model.named_parameters() if f".{ROUTER}." in name}
    if not wanted:
        return
    found = _tensors(folder, set(wanted))
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise RegardError(f"{folder} lacks the weights of {len(missing)} routers, {missing[0]} the first.")
    for name, parameter in wanted.items():
        parameter.data.copy_(found[name])


def _tensors(folder: str, names: set[str]) -> dict[str, Tensor]:
    from safetensors import safe_open
    from transformers.utils import cached_file

    index = cached_file(folder, INDEX, _raise_exceptions_for_missing_entries=False)
    files = {WEIGHTS}
    if index is not None:
        held = json.loads(Path(index).read_text("utf-8"))["weight_map"]
        files = {held[name] for name in names if name in held}
    found: dict[str, Tensor] = {}
    for file in sorted(files):
        path = cached_file(folder, file)
        with safe_open(path, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys() if name in names}  # noqa: SIM118
    return found
