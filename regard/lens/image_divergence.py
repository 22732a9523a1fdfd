"""How far each head's output moves when the image is taken away: which heads of a language model look at it.

    VHD_h = || A_h(y | x_image, x_text) - A_h(y | x_text) ||_2

A_h: the output of query head h before the output projection, at the last position, from which the first word
of the answer is chosen. The second run has the image's tokens taken out of the sequence, so that positions
count anew. With `outliers=True` a head is set to 0 whose divergence and whose squared output without the
image are both more than a standard deviation above the mean of its layer: it surges for want of something.

Source: "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence" (He et al., 2024,
arXiv 2412.13949). Status: paper only (the standard deviation is that of n - 1, as torch takes it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import RegardError, UnsupportedModel
from regard.lens.base import Measure, head_table
from regard.runtime.anatomy import anatomy_of, require_attention, root_of
from regard.runtime.call import Call
from regard.runtime.head_table import HeadTable
from regard.runtime.progress import bar
from regard.runtime.spans import IMAGE_IDS
from regard.runtime.verbs import watch

OF_IMAGES = ("pixel", "image", "mm_token_type_ids", "token_type_ids", "aspect_ratio", "cross_attention_mask")
AROUND = ("<|vision_start|>", "<|vision_end|>", "<fake_token_around_image>", "<global-img>", "<image>")


@dataclass(frozen=True, kw_only=True, eq=False)
class LastOutputs(Measure):
    """Keep what every head of the language model gives at the last position, float32 [B, H, Dv] a call."""

    definition = "output of each head at the last position"
    source = "He et al. 2024, arXiv 2412.13949"

    def head_outputs(self, call: Call) -> None:
        if call.site.kind == call.main and not call.site.cross:
            assert call.head_outputs is not None
            self.tally.append(call.site, "last", call.head_outputs[:, :, -1].float().cpu().clone())

    def result(self) -> dict[str, Tensor]:
        """Return alias -> [B, H, Dv] of the last call."""
        return {alias: calls[-1] for alias, calls in self.tally.get("last").items()}


def check_reads_images(model: nn.Module) -> int:
    """Return the id of the tokens that stand for an image.

    Raises:
        UnsupportedModel: where the model reads text alone.
    """
    config = getattr(root_of(model), "config", None)
    found = next((value for name in IMAGE_IDS if isinstance(value := getattr(config, name, None), int)), None)
    if found is None:
        raise UnsupportedModel(
            f"{type(root_of(model)).__name__} reads text alone, so no head of it looks at an image; take a "
            "vision-language model."
        )
    return found


def without_image(model: nn.Module, inputs: Mapping[str, Any], tokenizer: Any = None) -> dict[str, Any]:
    """Return the inputs of one sequence without its image: the same words, and nothing else.

    Args:
        inputs: of a forward, `input_ids` [1, S].
        tokenizer: with it, tokens that stand around an image are taken out too.

    Raises:
        RegardError: where there is no image, or no text beside it.
    """
    ids, image = inputs["input_ids"], check_reads_images(model)
    if len(ids) != 1:
        raise RegardError(f"inputs hold {len(ids)} sequences; give one at a time.")
    if not bool((ids == image).any()):
        raise RegardError("there is no image in the inputs.")
    gone = [image]
    if tokenizer is not None:
        known = tokenizer.get_vocab()
        gone += [known[token] for token in AROUND if token in known]
    keep = ~torch.isin(ids, torch.tensor(gone, device=ids.device))
    if not bool(keep.any()):
        raise RegardError("the prompt is empty without the image; ask something beside it.")
    left = ids[keep][None]
    rest = {k: v for k, v in inputs.items() if k != "input_ids" and not any(part in k for part in OF_IMAGES)}
    same = {
        k: v[keep][None] if isinstance(v, Tensor) and v.shape == ids.shape else v for k, v in rest.items()
    }
    return {"input_ids": left, **same}


def image_divergence(
    model: nn.Module,
    inputs: Sequence[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    outliers: bool = True,
    progress: bool = True,
) -> HeadTable:
    """Return how far each head's output moves when the image is taken away, mean over prompts.

    Args:
        model: a vision-language model of transformers, in evaluation mode.
        inputs: of one prompt with its image each, as a processor makes them: `input_ids` [1, S], pixels.
        tokenizer: see `without_image`.
        outliers: set heads to 0 that surge without the image.
        progress: whether a bar is shown, where stderr is a terminal.

    Returns:
        Columns `divergence`, and `text`, the squared norm of the output without the image.

    Raises:
        UnsupportedModel: for a model that reads text alone.
        RegardError: for no prompts, or one without an image or without words.

    Example:
        >>> image_divergence(model, [processor(images=cat, text="<image> What is it?")])    # doctest: +SKIP
    """
    root = root_of(model)
    require_attention(anatomy_of(root))
    pairs = [(dict(one), without_image(root, one, tokenizer)) for one in inputs]
    if not pairs:
        raise RegardError("there are no prompts with an image.")
    each: list[dict[str, dict[str, Tensor]]] = []
    with bar("Taking the image away", 2 * len(pairs), progress) as tick:
        for seen, blind in pairs:
            first, second = (_last(root, side, tick) for side in (seen, blind))
            each.append({alias: head_divergence(first[alias], second[alias], outliers) for alias in first})
    values = {
        alias: {
            name: torch.stack([one[alias][name] for one in each]).mean(0) for name in ("divergence", "text")
        }
        for alias in each[0]
    }
    about = {"lens": "vision", "prompts": len(pairs), "outliers": outliers}
    lens = LastOutputs()
    table = head_table(HeadTable, lens, values, about)
    said = {
        "definition": "distance between a head's outputs with the image and without it",
        "main": anatomy_of(root).main,
    }
    return HeadTable(table.sites, table.heads, table.columns, {**table.about, **said})


def _last(root: nn.Module, inputs: Mapping[str, Any], tick: Any) -> dict[str, Tensor]:
    device = next(root.parameters()).device
    fed = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with torch.no_grad(), watch(root, LastOutputs()) as seen:
        root(**fed, use_cache=False)
    tick(1)
    found: dict[str, Tensor] = seen[LastOutputs]
    return found


def head_divergence(seen: Tensor, blind: Tensor, outliers: bool) -> dict[str, Tensor]:
    """Return `divergence` and `text`, [H], of outputs with and without the image, [1, H, Dv]."""
    moved, alone = (seen - blind)[0].norm(dim=-1), blind[0].square().sum(-1)
    if outliers and len(moved) > 1:
        surges = (moved > moved.mean() + moved.std()) & (alone > alone.mean() + alone.std())
        moved = moved.masked_fill(surges, 0.0)
    return {"divergence": moved, "text": alone}
