"""What a Titans language model is made of."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from regard.attention import NeuralMemory, Titans
from regard.attention.titans.parts import check_counts
from regard.errors import RegardError

VARIANTS = ("mac", "mag", "mal", "lmm")


class TitansConfig(PreTrainedConfig):
    """Sizes and options of a Titans language model.

    Args:
        vocab_size: number of tokens.
        hidden_size: width of the residual stream.
        intermediate_size: inner width of the gated MLPs.
        num_hidden_layers: number of layers.
        num_attention_heads: heads of attention, and memories, of a layer.
        variant: `mac`, memory as context, `mag`, as gate, `mal`, as layer, or `lmm`, the memory alone.
        window: positions that attention sees; in `mac` the length of a segment.
        persistent: learned tokens of a layer.
        memory_depth, memory_expansion, chunk_size, momentum, forget, convolution, max_step, second_order: of
            the memory, as in `regard.attention.NeuralMemory`.
        initializer_range: standard deviation of fresh projections.

    Example:
        >>> TitansConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, variant="mag").spec()
        Titans(dim=32, heads=4, depth=2, expansion=2, chunk_size=16, momentum=True, forget=True, \
convolution=4, activation='silu', max_step=None, second_order=True, variant='mag', window=64, persistent=4)
    """

    model_type = "titans"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    variant: str = "mac"
    window: int = 64
    persistent: int = 4
    memory_depth: int = 2
    memory_expansion: int = 2
    chunk_size: int | None = 16
    momentum: bool = True
    forget: bool = True
    convolution: int = 4
    max_step: float | None = None
    second_order: bool = True
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        counts = {n: getattr(self, n) for n in ("vocab_size", "intermediate_size", "num_hidden_layers")}
        check_counts(counts)
        if self.variant not in VARIANTS:
            raise RegardError(f"variant is {self.variant!r}; it must be one of {', '.join(VARIANTS)}.")
        self.spec()

    def spec(self) -> Titans | NeuralMemory:
        """Return the mechanism of a layer."""
        memory: dict[str, Any] = {
            "dim": self.hidden_size, "heads": self.num_attention_heads, "depth": self.memory_depth,
            "expansion": self.memory_expansion, "chunk_size": self.chunk_size, "momentum": self.momentum,
            "forget": self.forget, "convolution": self.convolution, "max_step": self.max_step,
            "second_order": self.second_order,
        }  # fmt: skip
        if self.variant == "lmm":
            return NeuralMemory(**memory)
        return Titans(**memory, variant=self.variant, window=self.window, persistent=self.persistent)
