"""What a routing transformer is made of."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from regard.attention.routing import RoutingAttention
from regard.attention.routing.options import check_count
from regard.errors import RegardError


class RoutingConfig(PreTrainedConfig):
    """Sizes and options of a routing transformer.

    Args:
        vocab_size: number of tokens.
        hidden_size: width of the residual stream.
        intermediate_size: inner width of the gated MLPs.
        num_hidden_layers: number of layers.
        num_attention_heads: heads of a layer, cluster heads first.
        local_heads: how many of them, the last, are local.
        cluster_layers: how many layers, the last, have cluster heads; in the others all are local. Default
            all; the published model of PG-19 has 1.
        clusters, cluster_size, window, selection, nearest, share_qk, mask_self, norm, decay, start: as in
            `regard.attention.RoutingAttention`. With selection "topw" there is no cache.
        commitment: factor of the commitment loss in the loss of training.
        positions: of the local heads, "rotary" or None.
        initializer_range: standard deviation of fresh projections.

    Example:
        >>> sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
        >>> config = RoutingConfig(**sizes, cluster_layers=1)
        >>> [config.local_of(layer) for layer in range(3)]
        [4, 4, 2]
    """

    model_type = "routing-transformer"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    local_heads: int | None = None
    cluster_layers: int | None = None
    clusters: int = 16
    cluster_size: int = 64
    window: int = 256
    selection: str = "causal"
    nearest: int = 2
    share_qk: bool = True
    mask_self: bool | None = None
    norm: str = "layernorm"
    decay: float = 0.999
    start: str = "noise"
    commitment: float = 1e-4
    positions: str | None = "rotary"
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("vocab_size", "intermediate_size", "num_hidden_layers"):
            check_count(name, getattr(self, name), 1)
        if self.cluster_layers is not None:
            check_count("cluster_layers", self.cluster_layers, 0)
            if self.cluster_layers > self.num_hidden_layers:
                raise RegardError(
                    f"cluster_layers is {self.cluster_layers}, of {self.num_hidden_layers} layers; it can be "
                    "no more."
                )
        if self.selection == "topw":
            self.use_cache = False
        self.mixer(self.num_hidden_layers - 1, device="meta")

    def local_of(self, layer: int) -> int:
        """Return how many heads of a layer are local."""
        with_clusters = self.num_hidden_layers if self.cluster_layers is None else self.cluster_layers
        if layer < self.num_hidden_layers - with_clusters:
            return self.num_attention_heads
        return self.num_attention_heads // 2 if self.local_heads is None else self.local_heads

    def mixer(self, layer: int, device: str | None = None) -> RoutingAttention:
        """Return the attention of a layer, with fresh weights."""
        return RoutingAttention(
            self.hidden_size, self.num_attention_heads, local_heads=self.local_of(layer),
            clusters=self.clusters, cluster_size=self.cluster_size, window=self.window,
            selection=self.selection, nearest=self.nearest, share_qk=self.share_qk, mask_self=self.mask_self,
            norm=self.norm, decay=self.decay, start=self.start, commitment=self.commitment,
            positions=self.positions, device=device,
        )  # fmt: skip
