"""What the study of representation shift measures: planted shifts, a direction of sentiment, fine-tunes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import regard
from regard.edit.shift import AddVector
from regard.lens.concepts import Shift, analyse_shift, shift_words
from regard.lens.concepts.moved import halves
from regard.objectives.lora import add_lora, tune_answers
from regard.runtime.patch import Patch
from regard.runtime.prefix import prefix_cache
from regard.runtime.replay import Replay
from regard.runtime.row_patch import Collected
from regard.runtime.site import Point
from regard.tasks.captions import COLOURS, SCENES, Caption, captions, held_out_captions
from regard.tasks.rated import PREFIX, rated

Tick = Callable[[float], None]
SAMPLES, WIDTH, CLUSTERS, NOISE, SHUFFLES = 400, 64, 5, 0.5, 5


def loaded(tiny: bool) -> tuple[Any, Any]:
    """Return SmolLM2 and its tokenizer; or a narrow random model of as many layers, for a try."""
    model, tokenizer = regard.load()
    if not tiny:
        return model, tokenizer
    from regard.models.tiny_llama import random_llama

    torch.manual_seed(0)
    return random_llama(len(tokenizer), width=32, layers=30, heads=2, key_heads=1, mlp=32).eval(), tokenizer


def planted(seed: int) -> dict[str, Any]:
    """Return recovery where each of five clusters moves, all alike, or none; and on the same samples."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    centres, shifts = 1.8 * draw(CLUSTERS, WIDTH), 2.1 * draw(CLUSTERS, WIDTH)
    mine = torch.arange(SAMPLES) % CLUSTERS
    before = centres[mine] + NOISE * draw(SAMPLES, WIDTH)
    moves = {"own": shifts[mine], "alike": shifts[:1].expand(SAMPLES, -1), "none": torch.zeros_like(before)}
    found: dict[str, Any] = {}
    for name, move in moves.items():
        after = before + move + NOISE * draw(SAMPLES, WIDTH)
        shift = analyse_shift(before, after, count=CLUSTERS, match="scored", seed=seed)
        found[name] = {
            **shift.recovery(), "explained": shift.explained, "consistency": float(shift.consistency.mean()),
            "chance": float(shift.chance.mean()), "distance": shift.recovery("distance")["shifted"],
        }  # fmt: skip
        same = analyse_shift(before, after, count=CLUSTERS, split=False, match="scored", seed=seed)
        found[name]["same_distance"] = same.recovery("distance")["shifted"]
    return found


class Reviews:
    """Prompts of one length behind the same four reviews, of which the last token alone has to be run."""

    def __init__(self, model: nn.Module, tokenizer: Any, count: int, seed: int) -> None:
        self.model = model
        told = rated(72, seed=seed)
        read = {
            name: [tokenizer(text)["input_ids"] for text in getattr(told, name)]
            for name in ("positive", "negative", "asked_positive", "asked_negative")
        }
        lengths = [len(ids) for rows in read.values() for ids in rows]
        length = max(set(lengths), key=lengths.count)
        self.ids = {
            name: torch.tensor([ids for ids in rows if len(ids) == length][:count])
            for name, rows in read.items()
        }
        self.shared = len(tokenizer(PREFIX)["input_ids"]) - 1
        words = [
            tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in ("positive", "negative")
        ]
        self.good, self.bad = (ids[0] for ids in words)
        self.caches: dict[str, Any] = {}

    def score(self, name: str, *edits: AddVector) -> Tensor:
        """logit(positive) - logit(negative) of each prompt, [N], edits at the last position alone."""
        return self._read(self.ids[name][:, -1:], self._kept(name), *edits)

    def score_whole(self, name: str, *edits: AddVector) -> Tensor:
        """The same, with edits at all positions."""
        ids = self.ids[name]
        return self._read(ids[:, -1:], self._cache(ids, *edits), *edits)

    def states(self, name: str, layers: Sequence[int]) -> dict[int, Tensor]:
        """What leaves some blocks at the last position, layer -> [N, D]."""
        points = [Point("residual", layer) for layer in layers]
        cache = self._kept(name)
        with torch.no_grad(), regard.watch(self.model, Collected(tuple(points))) as seen:
            self.model(self.ids[name][:, -1:], past_key_values=cache)
        return {layer: seen[Collected][point][:, -1] for layer, point in zip(layers, points, strict=True)}

    def _kept(self, name: str) -> Any:
        if name not in self.caches:
            self.caches[name] = self._cache(self.ids[name])
        return self.caches[name]

    def _cache(self, ids: Tensor, *edits: AddVector) -> Any:
        """Keys and values of all tokens but the last; the shared ones are run once."""
        told = {"use_cache": True, "logits_to_keep": 1}
        first = self._run(edits, ids[:1, : self.shared], **told).past_key_values
        first.batch_repeat_interleave(len(ids))
        rest = self._run(edits, ids[:, self.shared : -1], past_key_values=first, **told)
        return prefix_cache(self.model, rest, ids.shape[1] - 1)

    def _read(self, last: Tensor, cache: Any, *edits: AddVector) -> Tensor:
        logits = self._run(edits, last, past_key_values=cache).logits[:, -1].float()
        return logits[:, self.good] - logits[:, self.bad]

    def _run(self, edits: Sequence[AddVector], ids: Tensor, **told: Any) -> Any:
        with torch.no_grad(), regard.steer(self.model, *edits) if edits else nullcontext():
            return self.model(ids, **told)


def sentiment(model: nn.Module, tokenizer: Any, size: Any, seed: int, tick: Tick) -> dict[str, Any]:
    """Return how much of the gap between negative and positive prompts a direction closes, and controls."""
    reviews = Reviews(model, tokenizer, size.reviews, seed)
    start, goal = (reviews.score(name).mean() for name in ("asked_negative", "asked_positive"))
    gap = float(goal - start)
    states = {name: reviews.states(name, size.layers) for name in ("positive", "negative")}

    def closed(vector: Tensor, layer: int, alpha: float = 1.0, whole: bool = False) -> float:
        edit = AddVector(vector=vector, layer=layer, alpha=alpha)
        read = reviews.score_whole if whole else reviews.score
        return float(read("asked_negative", edit).mean() - start) / gap

    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = {"gap": gap, "start": float(start), "layers": {}}
    for done, layer in enumerate(size.layers):
        a, b = (states[name][layer] for name in ("positive", "negative"))
        vector = a.mean(0) - b.mean(0)
        drawn = torch.randn(size.draws, len(vector), generator=generator)
        both, norm = torch.cat([a, b]), vector.norm()
        shuffled = [_parted(both, len(a), generator) for _ in range(min(SHUFFLES, size.draws))]
        found["layers"][str(layer)] = {
            "closed": closed(vector, layer), "negated": closed(vector, layer, -1.0),
            "random": [closed(norm * one / one.norm(), layer) for one in drawn],
            "shuffled": [closed(norm * one / one.norm(), layer) for one in shuffled],
            "whole": closed(vector, layer, whole=True),
            "alphas": [closed(vector, layer, alpha) for alpha in size.alphas],
            "norm": float(norm / both.norm(dim=1).mean()),
        }  # fmt: skip
        tick((done + 1) / len(size.layers))
    return found


def _parted(states: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The difference of means of `count` states drawn at random and the others."""
    mixed = states[torch.randperm(len(states), generator=generator)]
    return mixed[:count].mean(0) - mixed[count:].mean(0)


class Scenes:
    """Captions that no fine-tune sees, read once by the model as it is; later blocks are run again."""

    def __init__(self, model: nn.Module, tokenizer: Any, size: Any) -> None:
        self.model, self.tokenizer, self.size = model, tokenizer, size
        self.captions = held_out_captions(size.frames, size.places)
        rows = [tokenizer(one.prompt)["input_ids"] for one in self.captions]
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(rows):
            ids[row, width - len(one) :], mask[row, width - len(one) :] = torch.tensor(one), 1
        self.replay = Replay(model, {"input_ids": ids, "attention_mask": mask, "logits_to_keep": 1})
        word = lambda text: tokenizer(f" {text}", add_special_tokens=False)["input_ids"][0]  # noqa: E731
        self.colours = [word(colour) for colour in COLOURS]
        self.own = torch.tensor([COLOURS.index(one.colour) for one in self.captions])
        self.before = self.states()

    def states(self) -> dict[int, Tensor]:
        """What leaves the layers read at the last position, where the word comes of, layer -> [N, D]."""
        points = [Point("residual", layer) for layer in self.size.read]
        self.replay.run(self.size.tuned, [Collected(tuple(points))])
        assert self.replay.session is not None
        seen = self.replay.session[Collected]
        return {layer: seen[point][:, -1] for layer, point in zip(self.size.read, points, strict=True)}

    def logits(self, layer: int, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the colours, and of all, where a vector or one a prompt is added, [N, 8] and [N]."""
        point = Point("residual", layer, position=-1)
        edits = [] if added is None else [Patch({point: lambda x: x + added})]
        logits = self.replay.run(max(layer, self.size.tuned), edits)[:, -1].float()
        return logits[:, self.colours], logits.logsumexp(1)


def told_of(scenes: Scenes, rows: Tensor, layer: int, added: Tensor | None = None) -> dict[str, Any]:
    """Return how likely any colour is, and how far the scene's own is above the others, over some prompts.

    `items` is the latter prompt by prompt.
    """
    colours, total = scenes.logits(layer, added)
    own = colours.gather(1, scenes.own[:, None])[:, 0]
    others = (colours.sum(1) - own) / (colours.shape[1] - 1)
    return {
        "colour": float((colours.logsumexp(1) - total).exp()[rows].mean()),
        "right": float((own - others)[rows].mean()),
        "items": (own - others)[rows].tolist(),
        "accuracy": float((colours.argmax(1) == scenes.own)[rows].float().mean()),
    }


def tuned(scenes: Scenes, size: Any, seed: int, tick: Tick) -> dict[str, Any]:
    """Return the shifts of three fine-tunes, and what adding them to the model as it was does."""
    shifts: dict[str, Shift] = {}
    found: dict[str, Any] = {}
    _, second = halves(len(scenes.captions), seed)
    layer = size.read[-2]
    for done, kind in enumerate(size.kinds):
        after, found[kind] = _fine_tune(scenes, size, kind, seed, second, partial(_quarter, tick, done))
        found[kind]["layers"] = {}
        for read in size.read:
            one = analyse_shift(
                scenes.before[read], after[read], count=len(SCENES), layer=read, match="scored", seed=seed
            )
            found[kind]["layers"][str(read)] = {
                **one.recovery(), "explained": one.explained, "consistency": float(one.consistency.nanmean()),
                "chance": float(one.chance[one.counts > 0].mean()), "each": one.consistency.tolist(),
                "norm": float(one.vectors.norm(dim=1).nanmean() / scenes.before[read].norm(dim=1).mean()),
            }  # fmt: skip
            if read == layer:
                shifts[kind] = one
    found["words"] = [words[:5] for words in shift_words(scenes.model, scenes.tokenizer, shifts["scene"])]
    found["plain"] = told_of(scenes, second, layer)
    found["added"] = _added(scenes, shifts, second, layer, seed)
    tick(1.0)
    return found


def _quarter(tick: Tick, done: int, share: float) -> None:
    tick((done + share) / 4)


def _fine_tune(
    scenes: Scenes, size: Any, kind: str, seed: int, rows: Tensor, tick: Tick
) -> tuple[dict[int, Tensor], dict[str, Any]]:
    pairs = lambda some: [(one.prompt, one.answer) for one in some]  # noqa: E731
    made: list[Caption] = captions(size.captions, kind, seed=seed)  # type: ignore[arg-type]
    blocks = len(scenes.replay.anatomy.blocks())
    model = add_lora(scenes.model, layers=range(size.tuned, blocks), seed=seed)
    try:
        log = tune_answers(
            model, scenes.tokenizer, pairs(made), pairs(made[: size.batch]), steps=size.steps,
            batch=size.batch, rate=size.rate, seed=seed, replay=True, tick=tick,
        )  # fmt: skip
        after = scenes.states()
        told = {"losses": [round(x, 4) for x in log.losses], **told_of(scenes, rows, size.tuned)}
    finally:
        model.unload()
    return after, told


def _added(scenes: Scenes, shifts: dict[str, Shift], rows: Tensor, layer: int, seed: int) -> dict[str, Any]:
    """Add shifts, and vectors of the same norms, at the last position of the model as it was."""
    one = shifts["scene"]
    own = torch.where(one.vectors.isnan(), one.common, one.vectors)
    mine = one.concepts.assign(scenes.before[layer])
    norm = one.common.norm()
    generator, placebo = torch.Generator().manual_seed(seed), shifts["none"].common
    drawn = torch.randn(3, own.shape[1], generator=generator)
    added = {
        "concept": [own[mine]], "common": [one.common], "placebo": [norm * placebo / placebo.norm()],
        "random": [norm * x / x.norm() for x in drawn],
        "other": [own.roll(roll, 0)[mine] for roll in range(1, len(own), 3)],
    }  # fmt: skip
    found = {}
    for name, vectors in added.items():
        told = [told_of(scenes, rows, layer, vector) for vector in vectors]
        found[name] = {key: np.mean([x[key] for x in told], axis=0).tolist() for key in told[0]}
    return found
