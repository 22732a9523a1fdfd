"""Tiny configurations, from transformers' own configuration classes.

Every width becomes 64, every head 16 wide, so that the parts of a model that must agree in size do. Of a
model whose layers differ in kind, one layer of each kind is kept.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

VOCAB = 160
FIRST_SPECIAL = 110
WIDTH, HEADS, HEAD_WIDTH, FEED_FORWARD = 64, 4, 16, 96
MOST_KINDS = 5
RULES: tuple[tuple[str, Any], ...] = (
    (r"type_vocab_size", None),
    (r"vocab_size|group_vocab$", VOCAB),
    (r"(max_position_embeddings|n_positions|max_seq_len|n_ctx)$", 128),
    (r"(max_target_positions|max_sequence_length)$", 128),
    (r"max_source_positions$", 32),
    (r"num_mel_bins|n_mels|num_mel", 16),
    (r"(top_?k|per_tok|moe_k)$", 2),
    (r"^(n_group|topk_group|num_expert_groups|num_expert_group|topk_groups)$", 1),
    (r"(num_(local_|routed_|shared_)?experts|n_routed_experts|moe_num_experts)$", 4),
    (r"shared_experts$", 1),
    (r"(num_key_value_heads|num_kv_heads|num_.*key_value_heads|kv_heads|multi_query_group_num)$", 2),
    (r"(attention_groups|num_attention_groups)$", 2),
    (r"(attention_heads|num_heads|n_heads?|num_.*_heads|attn_heads|.*_nheads|encoder_heads)$", HEADS),
    (r"(head_dim|d_kv|v_head_dim|head_size|.*_head_dim|kv_channels)$", HEAD_WIDTH),
    (r"qk_rope_head_dim", 8),
    (r"(q_lora_rank|kv_lora_rank|.*lora_rank)$", 32),
    (r"(n_layers?|num_layers|depth|(en|de)coder_layers|num_.*layers|.*_num_layers|.*_depth)$", 2),
    (r"(ffn_dim|d_ff|mlp_dim|n_inner|.*intermediate_.*|.*ffn_.*|feed_?forward.*)$", FEED_FORWARD),
    (r"(sliding_window|attention_window|local_attention|attention_chunk_size)$", 4),
    (r"image_size|img_size|pretrain_img_size", 32),
    (r"patch_size", 8),
    (r"^(index_topk)$", 4),
    (r"(num_queries|num_latents|num_query_tokens|n_queries)$", 6),
    (r"(codebook_size|num_embeddings|num_codevectors_per_group)$", 32),
    (r"stride|kernel|groups|rate|ratio|factor|frames|length|merge|seconds|window", None),
    (r"steps?|index|bins|buckets", None),
    (r"(hidden|_dim|dim|_size|width|channels|d_model|embed|embd|units|filters)", WIDTH),
)  # fmt: skip
UNSAID = {
    "head_dim": HEAD_WIDTH, "num_key_value_heads": HEADS, "vocab_size": VOCAB, "hidden_size": WIDTH,
    "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "pad_token_id": 0,
}  # fmt: skip
PER_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "decoder_layers")
BASE_FIELDS = {field.name for field in dataclasses.fields(PreTrainedConfig)}


def tiny_config(cls: type[PreTrainedConfig], overrides: dict[str, Any] | None = None, **options: Any) -> Any:
    """Return a tiny configuration of a class.

    Args:
        overrides: field -> value; of a nested configuration a dictionary of its own, with `_class` for
            another class than the default.
        options: further arguments of the outermost class.
    """
    return _build(cls, {}, overrides or {}, options)


def _build(
    cls: type[PreTrainedConfig], given: dict[str, Any], overrides: dict[str, Any], options: dict[str, Any]
) -> Any:
    overrides, wanted = dict(overrides), set(overrides)
    nested = getattr(cls, "sub_configs_defaults", None) or {}
    usual = _usual(cls, given)
    arguments = {**given}
    for field in dataclasses.fields(cls):
        if field.name in BASE_FIELDS or field.name in nested:
            continue
        value = given.get(field.name, field.default)
        if value is dataclasses.MISSING:
            value = field.default_factory() if callable(field.default_factory) else None
        small = shrunk(field.name, value)
        if small is not value:
            arguments[field.name] = small
    if usual is not None:
        arguments.update(_layers(usual, cls, overrides))
        if "num_key_value_heads" in arguments and _ask(usual, "num_key_value_heads") == _ask(
            usual, "num_attention_heads"
        ):
            arguments["num_key_value_heads"] = HEADS
        arguments.update({n: v for n, v in UNSAID.items() if hasattr(cls, n) and _ask(usual, n) is None})
        rope = _rope(_ask(usual, "rope_parameters"), cls)
        if rope is not None:
            arguments["rope_parameters"] = rope
    for key, spec in nested.items():
        own = overrides.pop(key, {})
        inner = _ask(usual, key)
        kind = own.get("_class") if isinstance(own, dict) else None
        kind = kind or (type(inner) if isinstance(inner, PreTrainedConfig) else spec.config_class)
        if own is None or not isinstance(own, dict):
            arguments[key] = own
        elif inner is not None or key in wanted:
            own = {name: value for name, value in own.items() if name != "_class"}
            arguments[key] = _build(kind, dict(spec.init_kwargs), own, {})
    arguments.update({k: v(arguments) if callable(v) else v for k, v in overrides.items()})
    arguments = {k: v for k, v in arguments.items() if v is not DROP}
    return cls(**arguments, **options)


DROP = object()


def _usual(cls: type[PreTrainedConfig], given: dict[str, Any]) -> Any:
    try:
        return cls(**given)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError):
        return None


def _ask(config: Any, name: str) -> Any:
    """Return a value, or None where a configuration has no single one."""
    try:
        return getattr(config, name, None)
    except (RuntimeError, ValueError):
        return None


def shrunk(name: str, value: Any) -> Any:
    """Return a small value for a field, or the value itself."""
    if isinstance(value, bool):
        return value
    if name.endswith(("_token_id", "_token_index", "_token_idx")):
        return special(name) if isinstance(value, int) else value
    if isinstance(value, int):
        return _small(name, value)
    if isinstance(value, list | tuple) and value and all(type(x) is int for x in value):
        if re.search(r"^depths$|layers$", name) and "index" not in name:
            return type(value)(min(x, 2) for x in value)
        if re.search(r"ind(ex|ices)|_idx", name):
            return type(value)(x for x in value if x < 2) or type(value)([1])
        return type(value)(_small(name, x) for x in value)
    return value


def _small(name: str, value: int) -> int:
    for pattern, small in RULES:
        if re.search(pattern, name):
            return value if small is None or value < small else small
    return value


_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def special(name: str) -> int:
    """Return the token number that a special token has in every tiny model."""
    name = name.replace("_token_index", "_token_id").replace("_token_idx", "_token_id")
    if name not in _SPECIAL:
        _SPECIAL[name] = FIRST_SPECIAL + len(_SPECIAL)
    return _SPECIAL[name]


def _layers(usual: Any, cls: type[PreTrainedConfig], overrides: dict[str, Any]) -> dict[str, Any]:
    """Of layers that differ in kind keep one each, in the lists that say of which kind each layer is."""
    fields = {field.name for field in dataclasses.fields(cls)}
    for counted in PER_LAYER_COUNTS:
        count = _ask(usual, counted)
        if counted not in fields or not isinstance(count, int) or count < 3 or counted in overrides:
            continue
        lists = {
            name: value
            for name in fields - BASE_FIELDS
            if isinstance(value := _ask(usual, name), list | tuple) and len(value) == count
        }
        if not lists:
            return {}
        kept = _one_of_each(list(zip(*map(_hashable, lists.values()), strict=True)))
        found: dict[str, Any] = {
            name: shrunk(name, here) if re.search("heads|dim|size", name) else here
            for name, value in lists.items()
            for here in ([value[i] for i in kept],)
        }
        return {**found, counted: len(kept)}
    return {}


def _hashable(values: Iterable[Any]) -> list[Any]:
    return [str(v) for v in values]


def _one_of_each(kinds: list[Any]) -> list[int]:
    first: dict[Any, int] = {}
    for index, kind in enumerate(kinds):
        first.setdefault(kind, index)
    kept = sorted(list(first.values())[:MOST_KINDS])
    return kept if len(kept) > 1 else [0, 1]


def _rope(rope: Any, cls: type[PreTrainedConfig]) -> Any:
    """Return rotary parameters whose sections fit the small heads, or None where they fit as they are."""
    if not isinstance(rope, dict):
        return None
    if any(isinstance(value, dict) for value in rope.values()):
        return {key: _rope(value, cls) or value for key, value in rope.items()}
    if not rope.get("mrope_section") and not _has_sections(cls):
        return None
    half = HEAD_WIDTH // 2
    return {
        **rope,
        "partial_rotary_factor": 1.0,
        "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
    }


def _has_sections(cls: type[PreTrainedConfig]) -> bool:
    path = sys.modules[cls.__module__].__file__
    code = Path(path.replace("configuration_", "modeling_")) if path else None
    text = "vision" not in cls.__name__.lower() and "audio" not in cls.__name__.lower()
    return text and code is not None and code.exists() and "mrope_section" in code.read_text("utf-8")
