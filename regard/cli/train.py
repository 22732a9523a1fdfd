"""`regard train`: train a tiny language model with any mechanism, or a classifier of images or of texts."""

from __future__ import annotations

import argparse
from typing import Any

from regard.cli.command import TRAINED, Parser
from regard.errors import RegardError

LANGUAGE: dict[str, Any] = {
    "mechanism": "softmax", "set": [], "text": None, "vocabulary": 512, "dim": 128, "layers": 2, "heads": 4,
    "kv_heads": None, "positions": "rotary", "gate": None, "head_norm": False, "length": 128,
    "objective": "next-token", "mask_ratio": None, "mask_ramp": None, "accumulate": 1, "precision": "no",
}  # fmt: skip
IMAGES: dict[str, Any] = {
    "model": None, "image_size": None, "channels": None, "held_out": 0.2, "epochs": None, "smoothing": None,
    "shift": None, "flip": None, "accumulate": None, "precision": None,
}  # fmt: skip
TEXTS: dict[str, Any] = {
    "labelled": None, "model": "bilstm", "adversary": "none", "eps": None, "lam": None, "xi": None,
    "power_steps": None, "unlabelled": None, "ratio": None, "ramp": None, "perturb_layers": None,
    "longest": None, "text_column": "text", "label_column": "label", "lexicon": None, "held_out": 0.2,
    "epochs": None, "accumulate": None, "precision": None,
}  # fmt: skip
OTHERS = (
    (LANGUAGE, "a language model, and {asked} was given"),
    (IMAGES, "an image classifier, which --images asks for"),
    (TEXTS, "a classifier of texts, which --labelled asks for"),
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = Parser(
        prog="regard train",
        description=__doc__,
        epilog="The same command goes on where a run was stopped. `regard mechanisms` and `regard models` "
        "list the names.",
    )
    _both(parser)
    _language(parser.add_argument_group("a language model"))
    _images(parser.add_argument_group("an image classifier"))
    _classifiers(parser.add_argument_group("a classifier of images or of texts"))
    _texts(parser.add_argument_group("a classifier of texts"))
    parser.set_defaults(run=run)
    return parser


def _both(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--steps", type=int, help="optimiser steps (300; of images 20 epochs, of texts 8)")
    add("--batch", type=int, help="sequences, images or texts a step (16; 64; 32)")
    add("--rate", type=float, help="highest learning rate (0.003; 0.002; 0.001, pretrained 0.00005)")
    add("--seed", type=int, default=0, help="of weights, batches and all other chance (0)")
    add("--every", type=int, metavar="N", help="steps between held-out losses and files (50; an epoch)")
    add("--accumulate", type=int, metavar="N", help="pieces to compute a batch in, to save memory (1)")
    add("--precision", choices=("no", "bf16"), help="mixed precision (no)")
    add("--device", help="such as cpu or cuda (cpu; of images a GPU where there is one)")
    add("--out", metavar="DIR", help=f"folder to write to (default: {TRAINED}/NAME)")
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on with DIR (default)")
    add("--json", metavar="FILE|-", help="write all numbers as JSON; - is standard output")


def _language(group: Any) -> None:
    add = group.add_argument
    add("--mechanism", metavar="NAME", help="a registered mechanism (softmax)")
    add("--set", action="append", metavar="OPTION=VALUE", help="an option of it; may be repeated")
    add("--text", metavar="FILE", help="what to train on (default: two packaged novels)")
    add("--vocabulary", type=int, metavar="N", help="tokens, from 256, the bytes (512)")
    add("--dim", type=int, help="width (128)")
    add("--layers", type=int, help="layers (2)")
    add("--heads", type=int, help="heads (4)")
    add("--kv-heads", type=int, help="key heads (as many as heads)")
    add("--positions", choices=("rotary", "alibi", "none"), help="(rotary)")
    add("--gate", choices=("sigmoid", "silu"), help="output gate of attention")
    add("--head-norm", action="store_true", default=None, help="normalise each head's output")
    add("--length", type=int, help="tokens a sequence (128)")
    add(
        "--objective",
        choices=("next-token", "meap"),
        help="meap hides some of the inputs behind a [MASK] token (next-token)",
    )
    add("--mask-ratio", type=float, metavar="SHARE", help="of the inputs that meap hides (0.15)")
    add("--mask-ramp", type=int, metavar="N", help="steps in which that share grows from 0 (none)")


def _images(group: Any) -> None:
    add = group.add_argument
    add(
        "--images",
        metavar="digits|textures|FOLDER",
        help="what to train on; a folder has one of images a class",
    )
    add(
        "--image-size",
        type=int,
        metavar="N",
        help="height and width to bring images to (what the model is for; a folder's own)",
    )
    add("--channels", type=int, choices=(1, 3), help="1 for grey, 3 for colour (what the images are)")
    add("--smoothing", type=float, metavar="SHARE", help="of labels (0.1)")
    add("--shift", type=int, metavar="N", help="pixels to move an image by at most (1)")
    add("--flip", action="store_true", default=None, help="mirror half of the images")


def _classifiers(group: Any) -> None:
    add = group.add_argument
    add(
        "--model",
        metavar="NAME",
        help="of images: as `regard models` lists them; of texts: bilstm (default), bilstm-dot, "
        "distilbert-tiny, or the folder or Hub name of an encoder",
    )
    add(
        "--held-out",
        type=float,
        metavar="SHARE",
        help="of each class (0.2); a folder's `test` where it has one",
    )
    add("--epochs", type=int, metavar="N", help="times that each is seen, in place of --steps (20; 8)")


def _texts(group: Any) -> None:
    add = group.add_argument
    add("--labelled", metavar="FILE|FOLDER", help=".csv, .tsv or .jsonl, or a folder of .txt files a class")
    add("--text-column", metavar="NAME", help="(text)")
    add("--label-column", metavar="NAME", help="(label)")
    add(
        "--adversary",
        choices=("none", "at", "iat", "sign", "published", "random", "vat", "ivat", "ivat_token"),
        help="of its attention scores (none)",
    )
    add("--eps", type=float, metavar="X", help="length of the perturbation, in units of scores")
    add("--lam", type=float, metavar="X", help="weight of what the adversary adds (1)")
    add("--xi", type=float, metavar="X", help="length of the probe of vat (1)")
    add("--power-steps", type=int, metavar="N", help="of vat (1)")
    add("--unlabelled", metavar="FILE", help="texts for vat: .txt, a line each, or .csv, .tsv, .jsonl")
    add("--ratio", type=float, metavar="X", help="texts without a label for each with one (1)")
    add("--ramp", type=float, metavar="EPOCHS", help="in which lam grows (0; vat 1)")
    add(
        "--perturb-layers",
        metavar="LIST",
        help="of an encoder, such as 0-3, whose scores are perturbed (all)",
    )
    add("--longest", type=int, metavar="N", help="tokens of a text (256)")
    add("--lexicon", metavar="FILE", help="words that matter, one a line, to hold attention against")


def run(options: argparse.Namespace) -> int:
    """Train the one or the other."""
    if options.images is not None and options.labelled is not None:
        raise RegardError("--images and --labelled were given; give one.")
    if options.labelled is not None:
        from regard.cli.train_texts import run as run_texts

        return run_texts(_filled(options, TEXTS, "--labelled"))
    if options.images is not None:
        from regard.cli.train_images import run as run_images

        return run_images(_filled(options, IMAGES, "--images"))
    from regard.cli.train_language import run as run_language

    return run_language(_filled(options, LANGUAGE, None))


def _filled(options: argparse.Namespace, own: dict[str, Any], asked: str | None) -> argparse.Namespace:
    """Defaults where nothing was given; what belongs to another kind alone is refused."""
    for others, whose in OTHERS:
        for name in others:
            if name not in own and getattr(options, name) is not None and others is not own:
                raise RegardError(f"--{name.replace('_', '-')} is an option of {whose.format(asked=asked)}.")
    given = vars(options)
    return argparse.Namespace(
        **{**given, **{name: value for name, value in own.items() if given[name] is None}}
    )
