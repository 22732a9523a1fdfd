"""A mixer of tokens in the place of the attention of another encoder, of images of one size.

Attention is found by its parts: `q_proj`, `k_proj`, `v_proj` and an output, as transformers' ViT has them, or
`qkv` and `proj`, as timm's. One forward of an empty image tells how many tokens it gets. Class tokens and
registers, whatever is more than patches, are told to the mixer as its prefix. Status: our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import RegardError, ShapeMismatch

PARTS = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("qkv", "proj"),
)
Make = Callable[..., nn.Module]


class Hosted(nn.Module):
    """A mixer that is called as the attention it replaces, and answers as that did.

    Args:
        mixer: from [B, N, dim] to the same.
        answers_tuple: whether attention gave a tuple, of which the second was its weights; here None.
    """

    def __init__(self, mixer: nn.Module, answers_tuple: bool) -> None:
        super().__init__()
        self.mixer, self.answers_tuple = mixer, answers_tuple

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the mixed tokens.

        Raises:
            RegardError: where a mask or causal order is asked for.
        """
        if kwargs.get("is_causal") or any(isinstance(x, Tensor) for x in (*args, *kwargs.values())):
            raise RegardError(
                "attention was called with a mask or in causal order; a mixer with weights for every token's "
                "place has neither."
            )
        plane = hidden_states.shape[1:-1]
        out = self.mixer(hidden_states.flatten(1, -2)).unflatten(1, plane)
        return (out, None) if self.answers_tuple else out


class Replaced:
    """What was replaced in a model; `remove()`, or leaving a `with` block, puts it back.

    Attributes:
        names: of the replaced modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._before: dict[str, nn.Module] = {}

    @property
    def names(self) -> list[str]:
        """Of the replaced modules, from first to last."""
        return list(self._before)

    def set(self, name: str, module: nn.Module) -> None:
        """Put a module in the place of the one of that name."""
        self._before[name] = self.model.get_submodule(name)
        self.model.set_submodule(name, module)

    def remove(self) -> None:
        """Put everything back."""
        for name, module in self._before.items():
            self.model.set_submodule(name, module)
        self._before.clear()

    def __enter__(self) -> Replaced:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def replace_attention(
    model: nn.Module, make: Make, *, layers: Iterable[int] | None = None,
    image_size: int | tuple[int, int] | None = None, **options: Any,
) -> Replaced:  # fmt: skip
    """Put mixers of tokens, with fresh weights, in the place of attention in a model of images.

    Args:
        model: an encoder of images of one size, such as transformers' ViT, timm's, or one of like parts; it
            is changed until `remove()`.
        make: builds a mixer from dim, `tokens`, `prefix`, `grid` (rows and columns) and `options`, such as
            `NiNMixer`.
        layers: which of the attention modules, from 0; default all.
        image_size: height and width in pixels; by default what the model's config or patch embedding says.
        options: for `make`, such as `hidden=512`.

    Returns:
        What was replaced, to undo it.

    Raises:
        RegardError: where there is no attention of known parts, a layer is not there, attention is causal, or
            the image's size is not known.

    Example:
        >>> from regard.attention import NiNMixer
        >>> from regard.models.images import image_model
        >>> model = image_model("vit-digits", num_channels=1)
        >>> with replace_attention(model, NiNMixer, hidden=32) as replaced:
        ...     model(torch.randn(2, 1, 8, 8)).logits.shape, len(replaced.names)
        (torch.Size([2, 2]), 3)
    """
    found = _attention(model)
    chosen = list(range(len(found))) if layers is None else list(layers)
    names = list(found)
    for layer in chosen:
        if not isinstance(layer, int) or not 0 <= layer < len(found):
            raise RegardError(f"layer {layer!r} was asked for; there are {len(found)}, from 0.")
    seen = _seen(model, {names[layer]: found[names[layer]] for layer in chosen}, image_size)
    replaced = Replaced(model)
    made = {}
    for name, (tokens, grid, answers_tuple) in seen.items():
        old = found[name]
        prefix = tokens - grid[0] * grid[1]
        told = {"prefix": prefix, "grid": grid} if prefix >= 0 else {}
        mixer = make(_width(old), tokens=tokens, **told, **options)
        like = next(old.parameters())
        made[name] = Hosted(mixer.to(like.device, like.dtype), answers_tuple).train(old.training)
    for name, module in made.items():
        replaced.set(name, module)
    return replaced


def _attention(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of known parts, by name."""
    found = {
        name: module
        for name, module in model.named_modules()
        if name and any(all(hasattr(module, part) for part in parts) for parts in PARTS)
    }
    if not found:
        raise RegardError(
            f"{type(model).__name__} has no attention of known parts: {', '.join(PARTS[0])}, or "
            f"{' and '.join(PARTS[-1])}."
        )
    for name, module in found.items():
        if getattr(module, "is_causal", False) is True:
            raise RegardError(
                f"{name} is causal; a mixer of tokens has one weight for each pair of places, reads later "
                "tokens, and has no causal form."
            )
    return found


def _width(attention: nn.Module) -> int:
    first = getattr(attention, "qkv", None) or getattr(attention, "q_proj", None)
    return int(first.in_features)  # type: ignore[union-attr]


Seen = tuple[int, tuple[int, int], bool]


def _seen(model: nn.Module, parts: dict[str, nn.Module], image_size: Any) -> dict[str, Seen]:
    """Tokens, grid of patches, and whether it answers with a tuple, of each attention, by one forward."""
    height, width = _size(model, image_size)
    patch = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if patch is None:
        raise RegardError(f"{type(model).__name__} has no convolution that makes patches.")
    stride = patch.stride if isinstance(patch.stride, tuple) else (patch.stride, patch.stride)
    grid = (height // int(stride[0]), width // int(stride[1]))
    seen: dict[str, Seen] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            seen[name] = (x[0, ..., 0].numel(), grid, isinstance(out, tuple))

        return hook

    handles = [m.register_forward_hook(look(name), with_kwargs=True) for name, m in parts.items()]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(patch.weight.new_zeros(1, patch.in_channels, height, width))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    missing = [name for name in parts if name not in seen]
    if missing:
        raise RegardError(
            f"{missing[0]} is not called in a forward of an image of {height} x {width} pixels."
        )
    return seen


def _size(model: nn.Module, given: Any) -> tuple[int, int]:
    if given is None:
        given = getattr(getattr(model, "config", None), "image_size", None)
    if given is None:
        given = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if given is None:
        raise RegardError("the size of images is not known; give image_size=, height and width in pixels.")
    pair = (given, given) if isinstance(given, int) else tuple(given)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ShapeMismatch(f"image_size is {given!r}; it must be one or two whole numbers from 1.")
    return pair[0], pair[1]
