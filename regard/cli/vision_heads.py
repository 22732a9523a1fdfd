"""Prompts with an image for `regard heads --kind vision`, as the processor of a model makes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regard.errors import RegardError, first_sentence
from regard.weights import Source
from regard.weights.quiet import quiet

QUESTIONS = (
    ("Please describe this image in detail.", "What is in the middle of the picture?"),
    ("What can be seen here?", "Which colours does this image have?"),
)
"""Two sets that share none."""


def prompts_with_images(source: Source, files: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Return the inputs of a forward for every question and image, in two sets that share no question.

    Raises:
        RegardError: where a file is no image, or the model has no processor.
    """
    images = [_image(file) for file in files]
    processor = _processor(source)
    return [
        [_inputs(source, processor, image, question) for question in questions for image in images]
        for questions in QUESTIONS
    ]


def _image(file: str) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise RegardError(
            "images are read by Pillow; install it with `pip install regard[images]`."
        ) from None
    try:
        return Image.open(Path(file)).convert("RGB")
    except FileNotFoundError:
        raise RegardError(f"There is no file {file}.") from None
    except (OSError, UnidentifiedImageError) as error:
        raise RegardError(f"{file} cannot be read as an image: {first_sentence(error)}.") from error


def _processor(source: Source) -> Any:
    from transformers import AutoProcessor

    try:
        with quiet():
            found = AutoProcessor.from_pretrained(source.place, trust_remote_code=False)
    except Exception as error:
        raise RegardError(
            f"{source.name} has no processor that can be read: {first_sentence(error)}."
        ) from error
    if getattr(found, "image_processor", None) is None:
        raise RegardError(f"{source.name} comes without an image processor, and so reads no image here.")
    return found


def _inputs(source: Source, processor: Any, image: Any, question: str) -> dict[str, Any]:
    if getattr(processor, "chat_template", None):
        said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(said, add_generation_prompt=True)
    else:
        text = f"{getattr(processor, 'image_token', '<image>')}\n{question}"
    try:
        return dict(processor(images=image, text=text, return_tensors="pt"))
    except (ValueError, TypeError, RuntimeError) as error:
        raise RegardError(
            f"the processor of {source.name} refuses the image: {first_sentence(error)}."
        ) from error
