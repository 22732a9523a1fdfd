"""An image model: maps of features, logits from them, and the loss, as transformers has them.

    maps = features(pixel_values)       [B, C_i, H_i, W_i], one a stage
    logits = classify(maps)             [B, num_labels], or pooled features where num_labels is 0
    loss = cross-entropy(logits, labels)

`train_images` writes into the config how images are normalised, and `prepared` does so.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from regard.errors import RegardError, ShapeMismatch
from regard.tasks.images import normalized

Maps = tuple[Tensor, ...]


class ImageConfig(PreTrainedConfig):
    """Sizes and options of an image model; a family adds its own as fields.

    Args:
        num_channels: of an image.
        num_labels: classes; 0 for a model that ends with pooled features.
        image_mean, image_std: of each channel, by which images are normalised; training sets them.
        image_size: height and width of the images that the model is for, one number for both; None for any.
            Training sets it.

    Attributes:
        presets: name -> options that differ from the defaults, of the sizes that the family has.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    num_channels: int = 3
    image_mean: list[float] | tuple[float, ...] | None = None
    image_std: list[float] | tuple[float, ...] | None = None
    image_size: int | list[int] | tuple[int, ...] | None = None

    @classmethod
    def preset(cls, name: str, **options: Any) -> Any:
        """Return the config of one of the family's sizes, with other `options` where given.

        Raises:
            RegardError: where there is none of that name.
        """
        if name not in cls.presets:
            raise RegardError(f"no preset {name!r}; they are {', '.join(cls.presets)}.")
        return cls(**{**cls.presets[name], **options})


class ImageModel(PreTrainedModel):
    """An image classifier and backbone; a subclass has `features` and `classify`, and names its config.

    Its `__init__` ends with `self.post_init()` and takes no numbers out of tensors, so that it can be built
    without memory (`with torch.device("meta")`).
    """

    base_model_prefix = ""
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels

    @property
    def smallest_image(self) -> int:
        """Height and width that an image must have at least."""
        return 1

    def features(self, pixel_values: Tensor) -> Maps:
        """Return the map of each stage, [B, C_i, H_i, W_i], of images [B, C, H, W]."""
        raise NotImplementedError

    def classify(self, maps: Maps) -> Tensor:
        """Return logits [B, num_labels] from the maps; where `num_labels` is 0, pooled features."""
        raise NotImplementedError

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Return logits [B, num_labels], the loss where there are labels, and maps where asked for.

        Args:
            pixel_values: [B, num_channels, height, width].
            labels: int64 [B], classes from 0.
            output_hidden_states: whether to return the map of each stage, [B, C_i, H_i, W_i].
            return_dict: False for a tuple in place of an `ImageClassifierOutput`.

        Raises:
            ShapeMismatch: where images or labels are of another shape, or images too small.
            RegardError: where a label is no class.
        """
        self._check_images(pixel_values)
        if labels is not None:
            self._check_labels(labels, len(pixel_values))
        maps = self.features(pixel_values)
        logits = self.classify(maps)
        out = ImageClassifierOutput(
            loss=None if labels is None else F.cross_entropy(logits.float(), labels),
            logits=logits,
            hidden_states=tuple(maps) if output_hidden_states else None,
        )
        return out.to_tuple() if return_dict is False else out

    def prepared(self, images: Tensor) -> Tensor:
        """Return pixel values of images uint8 [B, C, H, W], normalised as in training, where the model is.

        Raises:
            RegardError: where the config has no `image_mean` and `image_std`.
        """
        mean, std = self.config.image_mean, self.config.image_std
        if mean is None or std is None:
            raise RegardError("the config has no image_mean and image_std; train_images sets them.")
        return normalized(images.to(self.device), mean, std).to(self.dtype)

    def _check_images(self, pixels: Tensor) -> None:
        channels, least = self.config.num_channels, self.smallest_image
        if pixels.ndim != 4 or pixels.shape[1] != channels or not all(pixels.shape[2:]):
            raise ShapeMismatch(
                f"pixel_values must be [batch, {channels}, height, width], and are {list(pixels.shape)}."
            )
        if not pixels.is_floating_point():
            raise ShapeMismatch(f"pixel_values must be floating-point, and are {_dtype(pixels)}.")
        if min(pixels.shape[2:]) < least:
            height, width = pixels.shape[2:]
            raise ShapeMismatch(
                f"images are {height} x {width} pixels; {type(self).__name__} needs {least} x {least} "
                "at least."
            )

    def _check_labels(self, labels: Tensor, batch: int) -> None:
        if not self.num_labels:
            raise RegardError(
                f"labels were given to a {type(self).__name__} of no classes (num_labels is 0)."
            )
        if labels.dtype != torch.int64 or tuple(labels.shape) != (batch,):
            raise ShapeMismatch(
                f"labels must be int64 [{batch}], and are {_dtype(labels)} {list(labels.shape)}."
            )
        if (
            labels.device.type == "cpu"
            and batch
            and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_labels
        ):
            raise RegardError(
                f"labels are {int(labels.min())} to {int(labels.max())}; the model has classes 0 to "
                f"{self.num_labels - 1}."
            )


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
