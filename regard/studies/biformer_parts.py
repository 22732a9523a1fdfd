"""Parts of the study `biformer`: planted directions, recall by region, image models, and their controls."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.attention.biformer import BRA, RegionRouting, Regions
from regard.attention.biformer.route import route
from regard.tasks.images import normalized

if TYPE_CHECKING:
    from regard.models.images import ImageModel
    from regard.tasks.images import Images

SIDE, REGIONS, WIDTH, TOPK = 28, 7, 64, 4
TAGS, SLOTS, VALUES, CONTENTS = 64, 16, 16, 24
DIRECTIONS, NARROW, BATCH = 12, 32, 32
CHOICES = ("routed", "random", "nearest")


class Chosen(BRA):
    """Bi-level routing attention whose regions are chosen in another way, for comparison.

    Args:
        choice: "routed"; "random", anew in every forward; "nearest" on the map, the own one first.
        options: of `BRA`.
    """

    def __init__(self, choice: str, **options: Any) -> None:
        super().__init__(**options)
        self.choice = choice

    def choose(self, q: Tensor, k: Tensor, regions: Regions, real: Tensor | None) -> RegionRouting:
        found = super().choose(q, k, regions, real)
        if self.choice == "routed":
            return found
        index = others(self.choice, regions, len(q))[..., : self.topk]
        return RegionRouting(index.to(q.device), found.scores, regions)


def others(choice: str, regions: Regions, batch: int) -> Tensor:
    """Return all regions as each region takes them in turn, by chance or by distance, [B, R, R]."""
    if choice == "random":
        return torch.rand(batch, regions.count, regions.count).argsort(-1)
    rows, columns = (torch.arange(regions.count) // regions.counts[1]), torch.arange(regions.count)
    places = torch.stack([rows, columns % regions.counts[1]], -1)
    apart = (places[:, None] - places).square().sum(-1)
    return apart.argsort(dim=-1, stable=True).expand(batch, -1, -1)


def planted(share: float) -> dict[str, float]:
    """Return the mass of dense attention inside four regions, where each region lies around one direction.

    Args:
        share: of a region's tokens that do; the others lie around directions by chance.
    """
    plan = Regions((SIDE, SIDE), (REGIONS, REGIONS))
    directions = nn.functional.normalize(torch.randn(DIRECTIONS, NARROW), dim=-1) * NARROW**0.5
    theme = torch.randint(DIRECTIONS, (plan.count, 1))
    stray = torch.randint(DIRECTIONS, (plan.count, plan.tokens))
    kept = torch.rand(plan.count, plan.tokens) < share
    at = directions[torch.where(kept, theme, stray)]
    q, k = ((at + torch.randn_like(at))[None, :, :, None] for _ in range(2))
    weights = (q.flatten(0, 3) @ k.flatten(0, 3).T * NARROW**-0.5).softmax(-1)
    mass = weights.view(plan.count, plan.tokens, plan.count, plan.tokens).mean(1).sum(-1)
    orders = {
        "routed": route(q, k, plan, TOPK).index[0],
        "best": mass.argsort(-1, descending=True)[:, :TOPK],
        **{name: others(name, plan, 1)[0, :, :TOPK] for name in ("random", "nearest")},
    }
    return {name: float(mass.gather(1, index).sum(1).mean()) for name, index in orders.items()}


def recall_batch(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return tags [B, R], values [B, R, T] of contents, VALUES of queries, and for queries what to look up.

    Half of the regions are contents, each of a tag of its own and a value in each slot; the others are
    queries, which have the tag of a content and say nothing else. `target` [B, R] is the region to find, -1
    for contents, and `answers` [B, R, T] the values in it.
    """
    total = REGIONS**2

    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    order = drawn(count, total).argsort(1)
    contents, queries = order[:, :CONTENTS], order[:, CONTENTS:]
    tags = torch.zeros(count, total, dtype=torch.int64)
    tags.scatter_(1, contents, drawn(count, TAGS).argsort(1)[:, :CONTENTS])
    wanted = torch.randint(CONTENTS, queries.shape, generator=generator)
    target = torch.full((count, total), -1).scatter_(1, queries, contents.gather(1, wanted))
    tags = torch.where(target < 0, tags, tags.gather(1, target.clamp_min(0)))
    stored = torch.randint(VALUES, (count, total, SLOTS), generator=generator)
    answers = stored.gather(1, target.clamp_min(0)[..., None].expand(-1, -1, SLOTS))
    return {
        "tags": tags, "values": torch.where(target[..., None] < 0, stored, VALUES), "target": target,
        "answers": answers,
    }  # fmt: skip


class RecallModel(nn.Module):
    """One layer of attention on a map, x + bra(LN x), then logits of values; it begins as near a copy.

    Args:
        choice: of `Chosen`, or "full" for all regions.
        shared: whether all queries also have one vector in common.
    """

    def __init__(self, choice: str, shared: bool) -> None:
        super().__init__()
        full = choice == "full"
        self.tag, self.slot = nn.Embedding(TAGS, WIDTH), nn.Embedding(SLOTS, WIDTH)
        self.value = nn.Embedding(VALUES + 1, WIDTH)
        self.common = nn.Parameter(torch.randn(WIDTH)) if shared else None
        self.norm, self.readout = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VALUES)
        self.attention = Chosen(
            "routed" if full else choice, dim=WIDTH, heads=1, regions=REGIONS, lepe=0,
            topk=REGIONS**2 if full else TOPK,
        )  # fmt: skip
        with torch.no_grad():
            for table in (self.tag, self.slot, self.value):
                table.weight.normal_(0.0, 0.5)
            self.value.weight[VALUES] = 0.0
            self.attention.qkv.weight.copy_(torch.eye(WIDTH).repeat(3, 1))
            self.attention.qkv.bias.zero_()
            self.attention.proj.weight.copy_(0.5 * torch.eye(WIDTH) + 0.02 * torch.randn(WIDTH, WIDTH))
            self.attention.proj.bias.zero_()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return logits [B, R, T, VALUES]."""
        plan, x = self._map(batch)
        return self.readout(plan.split(x + self.attention(self.norm(x))))

    def routing(self, batch: dict[str, Tensor]) -> RegionRouting:
        """Return which regions look at which."""
        return self.attention.routing(self.norm(self._map(batch)[1]))

    def _map(self, batch: dict[str, Tensor]) -> tuple[Regions, Tensor]:
        """The embedded tokens [B, SIDE, SIDE, WIDTH]."""
        plan = Regions((SIDE, SIDE), (REGIONS, REGIONS))
        x = self.tag(batch["tags"])[:, :, None] + self.slot.weight + self.value(batch["values"])
        if self.common is not None:
            x = x + (batch["target"] >= 0)[..., None, None] * self.common
        return plan, plan.joined(x)


def recalled(model: RecallModel, batch: dict[str, Tensor]) -> dict[str, float]:
    """Return the share of right values, and of queries whose region is among those looked at."""
    with torch.no_grad():
        logits, routing = model(batch), model.routing(batch)
    asked = batch["target"] >= 0
    right = (logits.argmax(-1) == batch["answers"])[asked]
    found = (routing.index == batch["target"][..., None]).any(-1)[asked]
    return {"accuracy": float(right.float().mean()), "recall": float(found.float().mean())}


class Convolved(nn.Module):
    """A convolution in the place of attention, with as many weights but for those of its filters.

    Args:
        dim: width of x.
        width: of the depthwise convolution, odd.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.near = nn.Conv2d(2 * dim, 2 * dim, width, padding=width // 2, groups=2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, H, W, dim] of x of the same shape."""
        out: Tensor = self.out(self.near(self.into(x).movedim(-1, 1)).movedim(1, -1))
        return out


class Beside(BRA):
    """What is left of `BRA` where nothing is attended to: the convolution of the values."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        assert self.lepe is not None
        values = self.qkv(x).chunk(3, -1)[2]
        out: Tensor = self.proj(self.lepe(values.movedim(-1, 1)).movedim(1, -1))
        return out


def classifier(arm: str, classes: int, channels: int, **options: Any) -> ImageModel:
    """Return a small BiFormer, or one whose attention is another.

    Args:
        arm: one of `CHOICES`, "full", "none" (the convolution beside attention alone) or "convolved".
        classes, channels: of the images.
        options: of the config of `biformer-nano`.
    """
    from regard.models.images import image_model

    model = image_model(
        "biformer-nano", num_labels=classes, num_channels=channels, **{"topks": [2, 2], **options}
    )
    stages: Any = model.stages
    for layer in (layer for stage in stages for layer in stage):
        given: Any = layer.attn
        width = int(given.lepe.weight.shape[-1])
        kept: dict[str, Any] = {
            "dim": given.dim, "heads": given.heads, "regions": given.regions, "topk": given.topk,
            "lepe": width,
        }  # fmt: skip
        if arm == "convolved":
            layer.attn = Convolved(given.dim, width)
        elif arm == "none":
            layer.attn = Beside(**kept)
        elif arm == "full":
            layer.attn = Chosen("routed", **{**kept, "topk": given.regions**2})
        else:
            layer.attn = Chosen(arm, **kept)
        layer.attn.apply(model._init_weights)
    return model


def accuracy(
    model: ImageModel, images: Images, epochs: int, most: int, rate: float, seed: int,
    tick: Callable[[float], None],
) -> float:  # fmt: skip
    """Train a classifier on at most so many images; return the share of those held out it names rightly."""
    generator = torch.Generator().manual_seed(seed)
    some = torch.randperm(len(images.train), generator=generator)[:most]
    x, labels = normalized(images.train[some], *images.statistics()), images.train_labels[some]
    steps = epochs * (len(x) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    for epoch in range(epochs):
        for at in torch.randperm(len(x), generator=generator).split(BATCH)[: len(x) // BATCH]:
            loss = model(x[at], labels=labels[at]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            plan.step()
        tick((epoch + 1) / epochs)
    with torch.no_grad():
        found = model.eval()(normalized(images.held_out, *images.statistics())).logits.argmax(-1)
    return float((found == images.held_out_labels).float().mean())


def fewest_scores(side: int) -> tuple[int, int]:
    """Return how many regions a side, of those that divide it, make scores fewest, and the scores counted.

    Scores are those between regions, and those of each token with the tokens of the regions it looks at.
    """
    counts = [n for n in range(2, side + 1) if side % n == 0]
    best = min(counts, key=lambda n: n**4 + TOPK * n**2 * (side // n) ** 4)
    plan = Regions((side, side), (best, best))
    q, k = torch.randn(2, 1, plan.count, plan.tokens, 1, 4)
    routing = route(q, k, plan, TOPK)
    seen = routing.chosen().sum() * plan.tokens**2
    return best, routing.scores.numel() + int(seen)
