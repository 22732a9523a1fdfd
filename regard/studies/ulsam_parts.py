"""What the study of subspace attention trains: marks on a body, a small MobileNet-V2, and its arms.

An image [1, 16, 16] is noise of 0.1, a disc of radius 5 at 0.5 somewhere, and on the disc, somewhere, a mark
of 4 x 4 pixels of +0.5 and -0.5; a class is a mark, of which there are ten. All else is the same for all.

Arms: the small MobileNet-V2 with layers 5 and 8, which keep channels and size, as they are (`full`) or in
their place subspace attention in four groups (`ulsam`) or one (`one_map`), nothing (`identity`), or a weight
for each channel from the mean over positions (`squeeze`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.attention import ULSAM
from regard.models.images import cost, image_model
from regard.studies.classifying_parts import right, trained

SIDE, RADIUS, MARK, CLASSES, BATCH, PLACES = 16, 5, 4, 10, 32, (5, 8)
ARMS = ("full", "ulsam", "one_map", "identity", "squeeze")


class Squeeze(nn.Module):
    """A weight for each channel, sigmoid(W relu(V mean(x))), as squeeze-and-excitation has it."""

    def __init__(self, channels: int, inner: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(channels, inner), nn.ReLU(), nn.Linear(inner, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.layers(x.mean((2, 3)))[:, :, None, None]


def network(arm: str) -> Any:
    """Return the small MobileNet-V2 of an arm, with fresh weights."""
    model: Any = image_model("mobilenet-v2-small", num_labels=CLASSES, num_channels=1)
    for place in PLACES if arm != "full" else ():
        width = model.widths[place]
        made: dict[str, nn.Module] = {"identity": nn.Identity(), "squeeze": Squeeze(width)}
        made |= {name: ULSAM(width, groups) for name, groups in (("ulsam", 4), ("one_map", 1))}
        model.layers[place] = made[arm]
    return model


def marks() -> Tensor:
    """Return the ten marks, [10, 4, 4] of 1 and -1, all with as many of both."""
    generator = torch.Generator().manual_seed(0)
    half = torch.ones(MARK * MARK)
    half[: MARK * MARK // 2] = -1
    found: list[Tensor] = []
    while len(found) < CLASSES:
        mark = half[torch.randperm(MARK * MARK, generator=generator)].view(MARK, MARK)
        if all((mark != other).sum() > 4 for other in found):
            found.append(mark)
    return torch.stack(found)


def marked(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images [count, 1, 16, 16] and the number of the mark of each."""
    labels = torch.randint(CLASSES, (count,), generator=generator)
    centre = torch.randint(RADIUS, SIDE - RADIUS, (count, 2), generator=generator)
    at = centre - MARK // 2 + torch.randint(-3, 4, (count, 2), generator=generator)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    away = (y - centre[:, 0, None, None]) ** 2 + (x - centre[:, 1, None, None]) ** 2
    images = 0.1 * torch.randn(count, SIDE, SIDE, generator=generator) + 0.5 * (away <= RADIUS**2)
    known, steps = marks(), torch.arange(MARK)
    rows, columns = at[:, 0, None, None] + steps[:, None], at[:, 1, None, None] + steps
    images[torch.arange(count)[:, None, None], rows, columns] += 0.5 * known[labels]
    return images[:, None], labels


def learned(arm: str, seed: int, steps: int, images: int, tick: Any) -> dict[str, Any]:
    """Train an arm on so many images; return its accuracy on others, its parameters and maps."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    given, labels = marked(images, generator)

    def batch() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(images, (BATCH,), generator=generator)
        return given[chosen], labels[chosen]

    model = network(arm)
    parameters = cost(model, SIDE).parameters
    trained(model, batch, steps, 3e-3, tick)
    others, wanted = marked(1000, generator)
    found = {"right": right(model, others, wanted), "parameters": parameters}
    return {**found, "maps": maps_of(model, others[:100])} if arm == "ulsam" else found


def maps_of(model: Any, images: Tensor) -> list[dict[str, float]]:
    """Return of each subspace attention the mean largest weight, 1 / HW, and the share of even maps."""
    kept: list[tuple[ULSAM, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, given: kept.append((module, given[0])))
        for module in model.modules()
        if isinstance(module, ULSAM)
    ]
    with torch.no_grad():
        model(images)
        found = []
        for module, x in kept:
            weights = module.attention(x).flatten(2)
            even = 1 / weights.shape[2]
            most = weights.amax(2)
            flat = float((most < 1.001 * even).float().mean())
            found.append({"most": float(most.mean()), "even": even, "flat": flat})
    for hook in hooks:
        hook.remove()
    return found


def fused() -> dict[str, float]:
    """Return how far the groups at once are from the loop, and from one with groups off by a channel."""
    layer = ULSAM(24, 4).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        x = torch.randn(4, 24, 9, 9, dtype=torch.float64)
        out = layer(x)
        shifted = layer.reference(x.roll(1, 1)).roll(-1, 1)
        return {
            "error": float((out - layer.reference(x)).abs().max()),
            "fault": float((out - shifted).abs().max()),
        }


def counted() -> dict[str, float]:
    """Return what share of MobileNet-V2's operations and parameters goes, layers replaced or added to."""
    options: dict[str, dict[str, Any]] = {
        "two": {"ulsam_replace": [13, 16]}, "four": {"ulsam_replace": [12, 13, 15, 16]},
        "added": {"ulsam_after": [13, 16]},
    }  # fmt: skip
    with torch.device("meta"):
        plain = cost(image_model("mobilenet-v2", num_labels=1000))
        found = {name: cost(image_model("mobilenet-v2", num_labels=1000, **o)) for name, o in options.items()}
    shares = {f"operations_{n}": 1 - c.multiply_adds / plain.multiply_adds for n, c in found.items()}
    return {**shares, **{f"parameters_{n}": 1 - c.parameters / plain.parameters for n, c in found.items()}}
