"""The language part of the study of landmark attention: small models from nothing, and SmolLM2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from regard.attention import Landmark, SlidingWindow, add_landmark_token
from regard.attention.landmark import Landmarks
from regard.models.decoder import Decoder
from regard.objectives.language import evaluate, train
from regard.studies.landmark_attention_parts import attending, memory
from regard.studies.texts import VOCABULARY, late_loss, windows
from regard.tasks.corpus import Corpus, packaged

if TYPE_CHECKING:
    from regard.studies.landmark_attention import Size

DIM, LAYERS, HEADS, BATCH = 128, 2, 4, 8
BLOCK, TOP, TUNED_BLOCK = 32, 4, 64
Tick = Callable[[float], None]


def language(size: Size, seed: int, tick: Tick) -> dict[str, float]:
    """Train with landmarks and without, and return the losses of every way to read."""
    data = packaged(VOCABULARY)
    marks = Landmarks(data.vocabulary, BLOCK)
    length = size.language_blocks * (BLOCK - 1)
    models: dict[str, nn.Module] = {}
    for number, name in enumerate(("landmark", "softmax")):
        torch.manual_seed(seed)
        mechanism: Any = Landmark(BLOCK) if name == "landmark" else "softmax"
        model = Decoder(data.vocabulary + 1, dim=DIM, layers=LAYERS, heads=HEADS, mechanism=mechanism)
        models[name] = marks.reader(model) if name == "landmark" else model
        train(
            models[name], data, steps=size.language_steps, batch=BATCH, length=length, windows=1, seed=seed,
            evaluate_every=size.language_steps, tick=partial(_half, tick, number),
        )  # fmt: skip
    found = {
        "trained": evaluate(models["landmark"], data, length, 8 * size.windows),
        "plain": evaluate(models["softmax"], data, length, 8 * size.windows),
    }
    rows = windows(data.held_out, size.long_blocks * (BLOCK - 1), size.windows)
    ways = {
        **{way: memory(BLOCK, TOP, way, rotary=True) for way in ("landmark", "recent", "random")},
        "none": memory(BLOCK, 0, rotary=True),
    }
    for way, spec in ways.items():
        with attending(models["landmark"], spec):
            found[f"long_{way}"] = late_loss(models["landmark"], rows, length)
    # as many tokens as a query reads: half a block of its own, on average, and the blocks chosen
    with attending(models["softmax"], SlidingWindow(TOP * (BLOCK - 1) + BLOCK // 2)):
        found["long_window"] = late_loss(models["softmax"], rows, length)
    found["long_plain"] = late_loss(models["softmax"], rows, length)
    return found


def _half(tick: Tick, number: int, done: float) -> None:
    tick(0.45 * (number + done))


def tune(
    model: nn.Module, tokenizer: Any, data: Corpus, steps: int, count: int, seed: int, tick: Tick
) -> dict[str, list[float]]:
    """Give a model landmarks and train it; return the losses of texts of 252 tokens."""
    length = 4 * (TUNED_BLOCK - 1)
    rows = windows(data.held_out, length, count)
    plain = [late_loss(model, row[None], 0) for row in rows]
    marks = add_landmark_token(model, tokenizer, block=TUNED_BLOCK)
    reader = marks.reader(model)
    torch.manual_seed(seed)
    with marks.training(model):
        before = [late_loss(reader, row[None], 0) for row in rows]
        train(
            reader, data, steps=steps, batch=1, length=length, rate=1e-4, windows=1, seed=seed,
            evaluate_every=steps, tick=tick,
        )  # fmt: skip
        after = [late_loss(reader, row[None], 0) for row in rows]
    return {"smollm": plain, "untuned": before, "tuned": after}
