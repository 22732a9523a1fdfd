"""What a forward is fed, from the names of its arguments and the sizes in the configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tests.support.architectures.shrink import special

BATCH, LENGTH, TARGETS, PADDED = 2, 13, 5, 3
IMAGE_TOKENS = ("image_token_id", "image_token_index", "media_placeholder_token_id")
BINS = ("num_mel_bins", "n_mels", "input_dim", "feature_size")
AUDIO_TOKENS = ("audio_token_id", "audio_token_index")


def configs(config: Any) -> Iterator[Any]:
    """Yield a configuration and all those nested in it, outermost first."""
    yield config
    for key in getattr(config, "sub_configs_defaults", None) or {}:
        inner = getattr(config, key, None)
        if inner is not None:
            yield from configs(inner)


def find(config: Any, *names: str, default: Any = None) -> Any:
    """Return the first attribute of any nested configuration that has one of the names."""
    for name in names:
        for part in configs(config):
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default


def noise(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def token_ids(length: int = LENGTH, seed: int = 3, high: int = 60) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, high, (BATCH, length), generator=generator)


def fresh(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs that a forward may change."""
    return {
        key: value.clone() if isinstance(value, Tensor) else value() if callable(value) else value
        for key, value in inputs.items()
    }


def accepted(model: Any) -> set[str]:
    """Return the names of the arguments of a model's forward."""
    return set(inspect.signature(type(model).forward).parameters)


def inputs_of(
    model: Any,
    padding: bool = False,
    placeholders: int = 4,
    given: Mapping[str, Any] = MappingProxyType({}),
    drop: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return keyword arguments of a forward; batch 2.

    Args:
        padding: whether the first sequence has padding in front.
        placeholders: how many image (or audio) tokens each sequence has.
        given: inputs that are known already.
        drop: arguments that are not fed.
    """
    names, config = accepted(model) - set(drop), model.config
    fed: dict[str, Any] = dict(given)
    if "pixel_values" in names and "pixel_values" not in fed:
        fed.update(_images(config, names))
    if "image_grid_thw" in names and "pixel_values" in fed:
        fed.setdefault("image_grid_thw", torch.tensor([[1, 4, 4]] * BATCH))
    if "pixel_values_videos" in names and "pixel_values" not in names and not fed:
        fed["pixel_values_videos"] = noise(
            BATCH, find(config, "num_frames", "frames_per_clip", default=2), 3, 32, 32
        )
    if (
        "input_features" in names
        and "input_features" not in fed
        and find(config, "num_mel_bins", "n_mels", "input_dim", "feature_size")
    ):
        fed.update(_features(config, names))
    for name in ("input_features_mask", "feature_attention_mask"):
        if name in names and "input_features" in fed and name not in fed:
            frames = fed["input_features"].shape[1 if "input_features" in given else -1]
            fed[name] = torch.ones(BATCH, frames, dtype=torch.long)
    if "input_values" in names and "input_values" not in fed:
        fed.update(_sound(config))
    if "input_ids" in names and (main_is_text(model) or not fed):
        fed = {**_text(config, names, fed, padding, placeholders), **fed}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        fed.setdefault("decoder_input_ids", token_ids(TARGETS, 7))
    if "bbox" in names and "input_ids" in fed:
        fed["bbox"] = _boxes(fed["input_ids"].shape[1])
    return fed


def main_is_text(model: Any) -> bool:
    """Whether a forward reads tokens: always, but for encoders of sound with an own decoder."""
    names = accepted(model)
    return not ("input_features" in names and "decoder_input_ids" in names) or "pixel_values" in names


def _text(
    config: Any, names: set[str], fed: dict[str, Any], padding: bool, placeholders: int
) -> dict[str, Tensor]:
    ids = token_ids(LENGTH if not fed else LENGTH + placeholders)
    at = PADDED + 2
    kinds = torch.zeros_like(ids)
    for number, (kind, candidates) in enumerate((("pixel", IMAGE_TOKENS), ("input", AUDIO_TOKENS)), 1):
        token = find(config, *candidates)
        if token is None or not any(key.startswith(kind) for key in fed):
            continue
        start = find(config, "vision_start_token_id") if number == 1 else None
        if start is not None:
            ids[:, at - 1] = start
        ids[:, at : at + placeholders] = token
        kinds[:, at : at + placeholders] = number
        end = find(config, "vision_end_token_id") if number == 1 else None
        if end is not None:
            ids[:, at + placeholders] = end
        break
    text = {"input_ids": ids}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in names and fed and kinds.any():
            text[name] = kinds
    if padding and "attention_mask" in names:
        mask = torch.ones_like(ids)
        mask[0, :PADDED] = 0
        text["attention_mask"] = mask
    return text


def _images(config: Any, names: set[str]) -> dict[str, Tensor]:
    vision = find(config, "vision_config", "vision_tower_config", "encoder_config", default=config)
    size = find(vision, "image_size", default=32)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = find(vision, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    if "image_grid_thw" in names:
        patch = find(vision, "patch_size", default=8)
        time = find(vision, "temporal_patch_size", default=1)
        pixels = noise(BATCH * 16, channels * time * patch * patch)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]] * BATCH)}
    fed = {"pixel_values": noise(BATCH, channels, height, width)}
    if "image_sizes" in names:
        fed["image_sizes"] = torch.tensor([[height, width]] * BATCH)
    return fed


def _features(config: Any, names: set[str]) -> dict[str, Tensor]:
    bins = find(config, *BINS)
    frames = 2 * find(config, "max_source_positions", default=32)
    return {"input_features": noise(BATCH, bins, frames)}


def _sound(config: Any) -> dict[str, Tensor]:
    return {"input_values": noise(BATCH, 1600)}


def _boxes(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    corner = torch.randint(0, 40, (BATCH, length, 2), generator=generator)
    return torch.cat([corner, corner + torch.randint(1, 9, (BATCH, length, 2), generator=generator)], -1)


__all__ = ["accepted", "configs", "find", "fresh", "inputs_of", "noise", "special", "token_ids"]
