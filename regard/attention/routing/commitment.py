"""The commitment loss of a whole model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.attention.routing.heads import RoutingHeads
from regard.errors import RegardError


def commitment_loss(model: nn.Module) -> Tensor:
    """Return the commitment loss of the last forward, the sum over the layers of a model.

    Of a layer it is the mean squared distance of the numbers of normalised queries from their nearest
    centroid, plus that of keys. Times 1e-4 it is added to the loss of a task. It is handed out once a
    forward.

    Raises:
        RegardError: where the model has no routed layer, or none ran in training since.

    Example:
        >>> from regard.attention import MultiHeadAttention
        >>> layer = MultiHeadAttention(32, 4, mechanism="routing")
        >>> loss = layer(torch.randn(2, 50, 32)).square().mean() + 1e-4 * commitment_loss(layer)
        >>> loss.backward()
    """
    layers = [m for m in model.modules() if isinstance(m, RoutingHeads) and m.clusters is not None]
    if not layers:
        raise RegardError(f"{type(model).__name__} has no layer that routes tokens to clusters.")
    found = [layer.commitment for layer in layers if layer.commitment is not None]
    if not found:
        raise RegardError(
            "no routed layer has run in training mode since the last call; run the model after "
            "model.train(), and take its commitment_loss once."
        )
    for layer in layers:
        layer.commitment = None
    device = found[0].device
    return torch.stack([loss.to(device) for loss in found]).sum()
