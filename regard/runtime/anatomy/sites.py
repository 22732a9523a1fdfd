"""Which modules compute attention, by which road it can be reached, and what each is called."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from regard.runtime.anatomy.code import codes_of
from regard.runtime.planes import shows_plane
from regard.runtime.site import Route, Site

CROSS = re.compile(r"cross_?att|encoder_attn|encdecattention|crossattention", re.IGNORECASE)
KINDS = (
    ("qformer", re.compile(r"q_?former", re.IGNORECASE)),
    ("vision", re.compile(r"vision|visual|image|vit\b", re.IGNORECASE)),
    ("audio", re.compile(r"audio|speech", re.IGNORECASE)),
    ("text", re.compile(r"text_model|language_model|text_encoder|llm\b", re.IGNORECASE)),
)
MAIN_ORDER = ("text", "decoder", "encoder", "image", "vision", "audio")
IMAGE = "image"
_ROUTES: dict[type[nn.Module], Route | None] = {}
HEAD_NAMES = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads", "heads")


def find_sites(root: nn.Module) -> tuple[list[Site], list[tuple[str, str]]]:
    """Return the sites of a model in module order, and (name, class) of attention out of reach."""
    reached: list[tuple[str, nn.Module, Route]] = []
    for name, module in root.named_modules():
        route = "block" if shows_plane(module) else _route(type(module))
        if route is not None and not _has_site_above(name, reached):
            reached.append((name, module, route))
    kinds = [IMAGE if r == "block" else _kind(root, name, module) for name, module, r in reached]
    layers = _layers([name for name, _, _ in reached], kinds)
    sites = [
        Site(name, f"{kind}.{layer}", kind, layer, module, route, kind == "cross", _heads(module))
        for (name, module, route), kind, layer in zip(reached, kinds, layers, strict=True)
    ]
    return sites, _unreachable(root, {name for name, _, _ in reached})


def lone_site(module: nn.Module) -> Site:
    """Return the site of an attention module of which the model is not known."""
    number = getattr(module, "layer_idx", None)
    layer = number if isinstance(number, int) else 0
    cross = bool(getattr(module, "is_cross_attention", False))
    return Site("", f"layer.{layer}", "layer", layer, module, cross=cross, heads=_heads(module))


def main_kind(sites: list[Site]) -> str:
    """Return the kind that a bare layer number means."""
    present = [site.kind for site in sites]
    return next((kind for kind in MAIN_ORDER if kind in present), present[0] if present else "text")


def _route(cls: type[nn.Module]) -> Route | None:
    if cls not in _ROUTES:
        _ROUTES[cls] = _read_route(cls)
    return _ROUTES[cls]


def _read_route(cls: type[nn.Module]) -> Route | None:
    """Which of the two roads the methods of a class name; their code is looked at, not their source."""
    from transformers import PreTrainedModel

    if issubclass(cls, PreTrainedModel) or cls.__module__.startswith("torch."):
        return None
    names = {name for code in codes_of(cls) for name in code.co_names}
    if "ALL_ATTENTION_FUNCTIONS" in names:
        return "interface"
    return "sdpa" if "scaled_dot_product_attention" in names else None


def _has_site_above(name: str, reached: list[tuple[str, nn.Module, Route]]) -> bool:
    return any(name.startswith(above + ".") for above, _, _ in reached)


def _kind(root: nn.Module, name: str, module: nn.Module) -> str:
    config = getattr(root, "config", None)
    if getattr(module, "is_cross_attention", False) or CROSS.search(f"{name} {type(module).__name__}"):
        return "cross"
    for kind, pattern in KINDS:
        if pattern.search(name):
            return kind
    if getattr(config, "is_encoder_decoder", False):
        return "decoder" if "decoder" in name.split(".") else "encoder"
    return _modality(config, getattr(root, "main_input_name", None))


def _modality(config: Any, reads: Any) -> str:
    if reads == "pixel_values" and not hasattr(config, "vocab_size"):
        return "vision"
    has = [hasattr(config, n) for n in ("vocab_size", "image_size", "patch_size", "num_mel_bins")]
    if has[0] or not any(has):
        return "text"
    return "audio" if has[3] else "vision"


def _layers(names: list[str], kinds: list[str]) -> list[int]:
    """Number the sites of each kind: by block where that tells them apart, else in order.

    Blocks on planes always go in order: their numbers begin anew in every stage.
    """
    numbers = [int(found[0]) if (found := re.findall(r"\.(\d+)(?=\.|$)", n)) else 0 for n in names]
    layers = list(numbers)
    for kind in set(kinds):
        members = [i for i, k in enumerate(kinds) if k == kind]
        if kind == IMAGE or len({numbers[i] for i in members}) < len(members):
            for order, i in enumerate(members):
                layers[i] = order
    return layers


def _heads(module: nn.Module) -> int | None:
    for holder in (module, getattr(module, "config", None)):
        for name in HEAD_NAMES:
            value = getattr(holder, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _unreachable(root: nn.Module, sites: set[str]) -> list[tuple[str, str]]:
    """Modules named attention that neither are, nor hold, nor are held by a site; outermost only."""
    found: list[tuple[str, str]] = []
    for name, module in root.named_modules():
        kind = type(module).__name__
        if "attention" not in kind.lower() or isinstance(module, nn.ModuleList):
            continue
        if name in sites or any(s.startswith(name + ".") or name.startswith(s + ".") for s in sites):
            continue
        if not any(True for _ in module.parameters()) or any(
            name.startswith(above + ".") for above, _ in found
        ):
            continue
        found.append((name, kind))
    return found
