"""`regard inspect`: run a model on a text, or on images, and say what its attention does."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from regard.cli import given
from regard.cli.command import Parser, say
from regard.errors import RegardError
from regard.weights.quiet import busy

LARGEST_IMAGE = 2048
OWN_INPUT = {"circuits": "regard.cli.circuit_looking", "retrieval": "regard.cli.retrieval_looking"}
"""Lenses that look at prompts of their own making, and the module whose `run(options)` does it."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = Parser(prog="regard inspect", description=__doc__)
    parser.add_argument(
        "model", nargs="?", metavar="MODEL",
        help="a folder, a .gguf file or a name on the Hub (default: SmolLM2-135M-Instruct)",
    )  # fmt: skip
    parser.add_argument("--text", metavar="FILE|-|WORDS", help="what to read (default: a packaged passage)")
    parser.add_argument(
        "--image", metavar="FILE", action="append",
        help="an image for a model that reads images; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--image-size",
        metavar="N",
        type=int,
        help="pixels a side that images are brought to (default: the model's)",
    )
    parser.add_argument("--layers", metavar="0-5,7", help="layers to look at (default: all)")
    parser.add_argument(
        "--lens", action="extend", nargs="+", metavar="NAME",
        help="one or more measurements (default: all that have something to say in words)",
    )  # fmt: skip
    parser.add_argument(
        "--heads", metavar="17.5,18.6", help="LAYER.HEAD pairs that --lens patterns keeps (default: all)"
    )
    parser.add_argument("--task", metavar="NAME", help="whose circuit --lens circuits finds, such as ioi")
    parser.add_argument(
        "--prompts", metavar="N", type=int, help="how many prompts a lens with a task of its own makes"
    )
    parser.add_argument("--seed", metavar="N", type=int, help="of those prompts (default: 0)")
    parser.add_argument("--json", metavar="FILE|-", help="write all numbers as JSON")
    parser.add_argument("--csv", metavar="FILE|-", help="write one line a head as CSV")
    parser.add_argument(
        "--report", metavar="FILE", help="where to write the page to look at (default: regard-report.html)"
    )
    parser.add_argument("--no-report", action="store_true", help="write no page")
    parser.add_argument("--device", help="such as cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", help="such as float32 or bfloat16 (default: float32)")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Look at a model; print what was found, and write it where that is asked for."""
    own = [name for name in options.lens or () if name in OWN_INPUT]
    if own:
        return _own_input(options, own[0])
    for name in ("task", "prompts", "seed"):
        if getattr(options, name) is not None:
            raise RegardError(f"--{name} is for --lens {' or '.join(OWN_INPUT)}; give that with it.")
    if options.image:
        return _images(options)
    if options.image_size is not None:
        raise RegardError("--image-size is for images; give --image FILE with it.")
    text, origin = given.read_text(options.text)
    layers, heads = given.parse_layers(options.layers), given.parse_heads(options.heads)
    json_path, csv_path = given.check_outputs(options.json, options.csv)
    report = given.check_report(options.report, options.no_report, (json_path, csv_path))
    with busy("Starting"):
        from regard.cli import looking, paging, shown, written
    if options.model is None and options.lens:
        _check_not_a_model(options.lens[-1])
    lenses = looking.chosen_lenses(options.lens, heads)
    if csv_path is not None and set(lenses) <= set(looking.NOT_PER_HEAD):
        raise RegardError(f"--csv has one line a head, and {' and '.join(lenses)} has no numbers per head.")
    named = options.lens is not None
    look = looking.Look.of(options.model, text, origin, layers, options.dtype, options.device, lenses)
    opened = lenses if report is None else paging.recording(lenses)
    main, probe = look.at_text(opened, layers, named), look.at_probe(opened, layers)
    if report is not None:
        with busy(f"Writing {report}"):
            paging.write(report, look, lenses, main, probe)
    if json_path is not None:
        _write(json_path, written.as_json(look, main, probe))
    if csv_path is not None:
        _write(csv_path, written.as_csv(main, probe))
    if given.STANDARD not in (json_path, csv_path):
        shown.print_look(look, main, probe, all_maps=named, report=report)
    return 0


def _own_input(options: argparse.Namespace, lens: str) -> int:
    """Look at prompts that a lens makes itself."""
    if len(options.lens) > 1:
        raise RegardError(f"--lens {lens} makes prompts of its own; give it alone.")
    for name in ("text", "image", "image_size", "layers", "heads"):
        if getattr(options, name) is not None:
            raise RegardError(
                f"--lens {lens} makes prompts of its own; leave out --{name.replace('_', '-')}."
            )
    with busy("Starting"):
        module = importlib.import_module(OWN_INPUT[lens])
    return int(module.run(options))


def _images(options: argparse.Namespace) -> int:
    """Look at an image model; print what was found, and write it where that is asked for."""
    for name, value in (("--text", options.text), ("--heads", options.heads)):
        if value is not None:
            raise RegardError(f"{name} is for a model that reads text; leave it out, or --image.")
    if options.image_size is not None and not 1 <= options.image_size <= LARGEST_IMAGE:
        raise RegardError(f"--image-size is {options.image_size}; it must be from 1 to {LARGEST_IMAGE}.")
    layers = given.parse_layers(options.layers)
    json_path, csv_path = given.check_outputs(options.json, options.csv)
    report = given.check_report(options.report, options.no_report, (json_path, csv_path))
    with busy("Starting"):
        from regard.cli import image_looking, image_shown, written
    if options.model is None and options.lens:
        _check_not_a_model(options.lens[-1])
    lenses = image_looking.chosen_lenses(options.lens, len(options.image))
    look = image_looking.ImageLook.of(
        options.model, options.image, options.image_size, layers, options.dtype, options.device, lenses
    )
    results = look.run(lenses, layers)
    if report is not None:
        with busy(f"Writing {report}"):
            image_looking.write_report(report, look, lenses, results)
    if json_path is not None:
        _write(json_path, image_looking.as_json(look, results))
    if csv_path is not None:
        _write(csv_path, written.as_csv(results, {}))
    if given.STANDARD not in (json_path, csv_path):
        image_shown.print_look(look, lenses, results, report)
    return 0


def _check_not_a_model(name: str) -> None:
    """Refuse a model that stands after `--lens`, which takes it for one more name."""
    from regard.lens import LENSES

    if name not in {*LENSES, *OWN_INPUT} and ("/" in name or name.endswith(".gguf") or Path(name).is_dir()):
        raise RegardError(f"--lens takes {name!r} for a lens; give MODEL before it.")


def _write(path: Path, text: str) -> None:
    from regard.runtime.table import write_text

    if path == given.STANDARD:
        say(text)
    else:
        write_text(path, text)
