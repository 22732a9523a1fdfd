"""`regard models`: the image models that can be trained, with their parameters and operations."""

from __future__ import annotations

import argparse
import json
from typing import Any

from regard.cli.command import Parser, say
from regard.errors import RegardError

CLASSES = 1000
KEY = """\
Operations are multiply-adds of convolutions, matrix products and attention, for one image; parameters
are those with {classes} classes and {channels} channels. A model with - takes no image of this size.
`regard train --images digits --model NAME` trains one.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = Parser(prog="regard models", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a model, or a family such as van (all)")
    parser.add_argument("--image-size", type=int, default=224, metavar="N", help="height and width (224)")
    parser.add_argument("--classes", type=int, default=CLASSES, metavar="N", help=f"({CLASSES})")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="1 for grey (3)")
    parser.add_argument("--json", metavar="FILE|-", help="write the table as JSON; - is standard output")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    from regard.cli.given import check_outputs

    path, _ = check_outputs(options.json, None)
    from regard.models.images import image_models
    from regard.tasks.images import check_size
    from regard.weights.quiet import busy

    check_size(options.image_size)
    if options.classes < 1:
        raise RegardError(f"--classes is {options.classes}; it must be at least 1.")
    names = _chosen(options.names, image_models())
    rows = []
    with busy("counting operations", len(names)) as done:
        for name in names:
            rows.append(_row(name, options))
            done()
    text = json.dumps(rows, indent=1) + "\n"
    if options.json == "-":
        say(text)
        return 0
    say(_table(rows, options))
    if path is not None:
        from regard.runtime.table import write_text

        write_text(path, text)
    return 0


def _chosen(given: list[str], known: list[str]) -> list[str]:
    """The models that names or beginnings of names stand for, each once; all where none is given."""
    from regard.models.images import image_model

    found: dict[str, None] = {}
    for name in given:
        names = [name] if name in known else [one for one in known if one.startswith(f"{name}-")]
        if not names:
            image_model(name)
        found.update(dict.fromkeys(names))
    return list(found) if given else known


def _row(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Name, parameters, and operations, which are None where the model takes no such image."""
    import torch

    from regard.models.images import cost, image_model

    def made(**size: Any) -> Any:
        with torch.device("meta"):
            return image_model(name, num_labels=options.classes, num_channels=options.channels, **size)

    operations = None
    try:
        model = made(image_size=options.image_size)
        operations = cost(model, options.image_size).multiply_adds
    except RegardError:
        model = made()
    return {
        "model": name,
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "multiply_adds": operations,
        "image_size": options.image_size,
        "smallest_image": model.smallest_image,
    }


def _table(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    from regard.models.images.cost import short
    from regard.runtime.table import Table

    size = options.image_size
    columns = {
        "model": [row["model"] for row in rows],
        "parameters": [short(row["parameters"]) for row in rows],
        f"operations at {size} x {size}": [
            "-" if row["multiply_adds"] is None else short(row["multiply_adds"]) for row in rows
        ],
        "class": [row["class"] for row in rows],
    }
    return f"{Table(columns)}\n\n{KEY.format(classes=options.classes, channels=options.channels)}"
