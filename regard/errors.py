"""The errors that regard raises for a caller's mistake or an unfit model."""


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
