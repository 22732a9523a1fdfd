"""What a TransNormerLLM is made of, under the names that its checkpoints have."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from regard.attention.lightning import KINDS
from regard.attention.lightning.layer import ACTIVATIONS
from regard.errors import RegardError


class TNLConfig(PreTrainedConfig):
    """Sizes and options of a TransNormerLLM; usual names, such as `hidden_size`, work as well.

    Args:
        vocab_size: number of tokens.
        decoder_embed_dim: width of the residual stream, `hidden_size`.
        decoder_layers: `num_hidden_layers`.
        decoder_attention_heads: `num_attention_heads`.
        hidden_dim: width of all heads together.
        glu_dim: inner width of the gated MLP, `intermediate_size`; -1 for `decoder_embed_dim`.
        linear_use_lrpe_list: 1 for each layer whose q and k are rotated, else 0; empty for none. None for the
            first layer alone.
        linear_act_fun: activation of q and k.
        norm_type: `simplermsnorm`, without weights, or `layernorm`.
        no_scale_embedding: whether embeddings are used as they are, not times the root of their width.
        bias: whether projections have one.
        decay: how fast heads forget, a kind of `regard.attention.decay_rates`; released weights go with
        `alibi`.
        chunk_size: positions in a chunk of the recurrence; it changes speed alone.
        init_std: of fresh weights.

    Example:
        >>> config = TNLConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, hidden_dim=64)
        >>> config.decoder_layers, config.linear_use_lrpe_list
        (2, [1, 0])
    """

    model_type = "transnormer"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    attribute_map: ClassVar = {
        "hidden_size": "decoder_embed_dim",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "decoder_attention_heads",
        "intermediate_size": "glu_dim",
        "initializer_range": "init_std",
    }

    vocab_size: int = 64000
    decoder_embed_dim: int = 1024
    decoder_layers: int = 24
    decoder_attention_heads: int = 8
    hidden_dim: int = 1024
    glu_dim: int = 2816
    linear_use_lrpe_list: list[int] | None = None
    linear_act_fun: str = "silu"
    norm_type: str = "simplermsnorm"
    no_scale_embedding: bool = False
    bias: bool = False
    decay: str = "alibi"
    chunk_size: int = 64
    init_std: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.linear_use_lrpe_list is None:
            self.linear_use_lrpe_list = [1] + [0] * (self.decoder_layers - 1)
        if self.glu_dim == -1:
            self.glu_dim = self.decoder_embed_dim
        self._check()

    def _check(self) -> None:
        for name in (
            "vocab_size",
            "decoder_embed_dim",
            "decoder_layers",
            "decoder_attention_heads",
            "glu_dim",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise RegardError(f"{name} is {value!r}; it must be a whole number from 1.")
        if self.hidden_dim % self.decoder_attention_heads:
            raise RegardError(
                f"hidden_dim is {self.hidden_dim}, which {self.decoder_attention_heads} heads do not divide."
            )
        rotated = self.linear_use_lrpe_list or []
        if rotated and len(rotated) != self.decoder_layers:
            raise RegardError(
                f"linear_use_lrpe_list has {len(rotated)} entries; it must have one for each of "
                f"{self.decoder_layers} layers, or none."
            )
        known = (
            ("decay", KINDS),
            ("linear_act_fun", ACTIVATIONS),
            ("norm_type", ("simplermsnorm", "layernorm")),
        )
        for name, allowed in known:
            value = getattr(self, name)
            if value not in allowed:
                raise RegardError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}.")
