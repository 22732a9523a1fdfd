"""The errors that regard raises for a caller's mistake or an unfit model."""

import re


class RegardError(ValueError):
    """Something asked of regard cannot be done; the message says what, and what would do."""


class UnsupportedModel(RegardError):
    """The model computes attention, or lays out its parts, in a way that regard cannot reach."""


class NoSuchSite(RegardError):
    """A layer, head, point or site was named that the model does not have."""


class ShapeMismatch(RegardError):
    """Two tensors, or a tensor and a model, do not fit together."""


class NothingObserved(RegardError):
    """A lens or edit was attached and nothing it wanted ever happened."""


class NotLinear(RegardError):
    """A mixer is no causal system that is linear in its values; the message names the part."""


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error's message, without its full stop."""
    lines = str(error).strip().splitlines()
    sentence = re.split(r"(?<=[^\s.])\.\s+(?=[A-Z])", lines[0].strip())[0] if lines else type(error).__name__
    return sentence.rstrip(" .:")
