"""What LightNet models are made of."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from regard.errors import RegardError


class LightNetConfig(PreTrainedConfig):
    """Sizes and options of a LightNet, for text or for images.

    Args:
        vocab_size: number of tokens, of a text.
        hidden_size: width of the residual stream.
        num_hidden_layers, num_attention_heads: as usual; the heads divide the width.
        intermediate_size: inner width of the gated MLP; None for 8/3 of the width.
        gate_rank: width between the two maps of the output gate.
        causal: of a text, whether a position sees no later one.
        tpe: whether MD-TPE stands after the embedding.
        lrpe: whether queries and keys are turned by MD-LRPE.
        preset: `paper` or `fla`, as in `regard.attention.LightNetText`.
        image_size: height and width of an image, in pixels; one number for both.
        patch_size: of a square patch.
        num_channels: of an image.
        class_token: whether an image is judged at a token in front, or by the mean of its patches.
        norm_eps: of the norms.
        initializer_range: standard deviation of fresh weights.

    Example:
        >>> LightNetConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4).intermediate_size
        85
    """

    model_type = "regard_lightnet"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    intermediate_size: int | None = None
    gate_rank: int = 128
    causal: bool = True
    tpe: bool = True
    lrpe: bool = True
    preset: str = "paper"
    image_size: int | list[int] | tuple[int, ...] = 224
    patch_size: int = 16
    num_channels: int = 3
    class_token: bool = True
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.intermediate_size is None:
            self.intermediate_size = 8 * self.hidden_size // 3
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                     "intermediate_size", "patch_size", "num_channels"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RegardError(f"{name} is {value!r}; it must be a whole number from 1.")
        if self.hidden_size % self.num_attention_heads:
            raise RegardError(
                f"hidden_size is {self.hidden_size}, which {self.num_attention_heads} heads do not divide."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches.

        Raises:
            RegardError: where patches do not divide the image.
        """
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        if height % self.patch_size or width % self.patch_size or min(height, width) < 1:
            raise RegardError(
                f"image_size is {height} x {width}, which patches of {self.patch_size} do not divide."
            )
        return height // self.patch_size, width // self.patch_size
