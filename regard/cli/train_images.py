"""`regard train --images`: train an image classifier, and say how it does on held-out images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.cli.command import TRAINED, say
from regard.errors import RegardError

if TYPE_CHECKING:
    from regard.models.images import Cost, ImageModel
    from regard.objectives import Confusion, ImageRecipe, Log
    from regard.tasks.images import Images

SIZE, ROWS, EACH = 32, 10, 200
PICTURE = "confusion.png"


def run(options: argparse.Namespace) -> int:
    """Train, write the model, its log and the confusion, and print how it went."""
    from regard.cli.given import check_outputs

    path, _ = check_outputs(options.json, None)
    model, data, recipe, cost = _made(options)
    from regard.models.images import save_image_model
    from regard.objectives import confusion, train_images
    from regard.runtime.table import write_text

    out = Path(options.out if options.out is not None else f"{TRAINED}/{options.model}-{data.name}")
    log = train_images(
        model, data, recipe=recipe, out=out, resume=options.resume, device=options.device,
        evaluate_every=options.every, checkpoint_every=options.every, about=_about(options, model),
    )  # fmt: skip
    found = confusion(model, data, batch=recipe.batch)
    save_image_model(model, out)
    told = _told(options, data, recipe, cost, log, found)
    text = json.dumps(told, indent=1) + "\n"
    write_text(out / "log.json", text)
    drawn = _drawn(found, out, f"{options.model} on {data.name}")
    if path is not None and options.json != "-":
        write_text(path, text)
    say(text if options.json == "-" else _printed(told, data, cost, out, drawn))
    return 0


def _made(options: argparse.Namespace) -> tuple[ImageModel, Images, ImageRecipe, Cost]:
    """The model with fresh weights, the images, and what is to be done; everything that can be is checked."""
    import torch

    from regard.models.images import cost, image_model
    from regard.models.images.registry import config_of
    from regard.objectives.images import check_fit, recipe_of
    from regard.objectives.schedule import check_count
    from regard.weights.device import check_device

    if options.model is None:
        raise RegardError("--images needs --model NAME, such as nat-nano; `regard models` lists them.")
    size = config_of(options.model).image_size or SIZE
    check_device(options.device)
    if options.every is not None:
        check_count("every", options.every, 1)
    data = _images(options, size if isinstance(size, int) else size[0])
    names = ("batch", "rate", "smoothing", "shift", "flip", "accumulate", "precision")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    recipe = recipe_of(data, options.epochs, options.steps, seed=options.seed, **given)
    torch.manual_seed(options.seed)
    model = image_model(
        options.model, num_labels=len(data.classes), num_channels=data.channels, image_size=list(data.size)
    )
    check_fit(model, data)
    return model, data, recipe, cost(model, data.size)


def _images(options: argparse.Namespace, usual: int) -> Images:
    """What `--images` names; what has no size of its own is as large as is usual for the model."""
    from regard.tasks.image_folder import image_folder
    from regard.tasks.images import digits

    size, share = options.image_size, options.held_out
    if options.images == "digits":
        if options.channels == 3:
            raise RegardError("the digits are grey; leave --channels out.")
        return digits(usual if size is None else size, share, options.seed)
    if options.images == "textures":
        return _textures(usual if size is None else size, options)
    return image_folder(options.images, size, channels=options.channels, held_out=share, seed=options.seed)


def _textures(size: int, options: argparse.Namespace) -> Images:
    """Textures, of which a share is held out."""
    from regard.tasks.textures import textures

    if not 0 < options.held_out < 1:
        raise RegardError(f"held_out is {options.held_out}; it must be above 0 and below 1.")
    held_out = min(max(1, round(options.held_out * EACH)), EACH - 1)
    return textures(size, options.channels or 3, train=EACH - held_out, held_out=held_out, seed=options.seed)


def _about(options: argparse.Namespace, model: ImageModel) -> dict[str, Any]:
    """What must be the same in a run that goes on."""
    shape = {"channels": model.config.num_channels, "classes": model.num_labels}
    return {"model": options.model, **shape}


def _told(
    options: argparse.Namespace, data: Images, recipe: ImageRecipe, cost: Cost, log: Log, found: Confusion
) -> dict[str, Any]:
    """All numbers."""
    from dataclasses import asdict

    accuracy = {step: measures["accuracy"] for step, measures in log.measures}
    images = len(log.losses) * min(recipe.batch, len(data.train))
    return {
        "model": options.model, "parameters": cost.parameters, "multiply_adds": cost.multiply_adds,
        "data": data.name, "image_size": list(data.size), "channels": data.channels,
        "classes": list(data.classes), "train": len(data.train), "held_out_images": len(data.held_out),
        "recipe": asdict(recipe), "seconds": round(log.seconds, 2),
        "images_per_second": round(images / max(log.seconds, 1e-9)),
        "accuracy": found.accuracy, "loss": found.loss, "confusion": found.matrix.tolist(),
        "worst": [list(one) for one in found.worst()],
        "held_out": [{"step": s, "nats": x, "accuracy": accuracy[s]} for s, x in log.held_out],
        "losses": log.losses,
    }  # fmt: skip


def _drawn(found: Confusion, out: Path, title: str) -> bool:
    """Draw the confusion where matplotlib is there; an older picture does not stay."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        (out / PICTURE).unlink(missing_ok=True)
        return False
    found.save(out / PICTURE, title)
    return True


def _printed(told: dict[str, Any], data: Images, cost: Cost, out: Path, drawn: bool) -> str:
    held_out = told["held_out"]
    chosen = sorted({round(i * (len(held_out) - 1) / max(1, ROWS - 1)) for i in range(ROWS)})
    rows = [
        f"  step {r['step']:6,}   held out {r['nats']:.3f} nats, {r['accuracy']:6.1%} right"
        for r in (held_out[i] for i in chosen)
    ]
    mistakes = ", ".join(f"{one} for {other} ({count})" for one, other, count in told["worst"])
    files = "model.safetensors, config.json, log.json" + (f" and {PICTURE}" if drawn else "")
    lines = [
        str(data),
        f"{told['model']}: {cost}",
        *rows,
        f"{told['seconds']:.1f} s, {told['images_per_second']:,} images a second",
        f"taken for another class most often: {mistakes}" if mistakes else "no mistake",
        f"wrote to {out}: {files}",
    ]
    if not drawn:
        lines.append(f'no {PICTURE}: matplotlib is missing; pip install "regard[images]"')
    return "\n".join([*lines, ""])
