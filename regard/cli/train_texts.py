"""`regard train --labelled`: train a classifier of texts, against perturbed attention where asked for."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.cli.command import TRAINED, say
from regard.errors import RegardError

if TYPE_CHECKING:
    from regard.objectives import Log
    from regard.objectives.adversarial.loss import Adversary
    from regard.objectives.texts import TextRecipe
    from regard.tasks.text_files import LabelledTexts, Unlabelled

LABELLED = ("none", "at", "iat", "sign", "published", "random")
VIRTUAL = ("vat", "ivat", "ivat_token")
ROWS, MODEL = 10, "bilstm"
RATES = {"bilstm": 1e-3, "bilstm-dot": 1e-3, "distilbert-tiny": 1e-3}
TUNED = 5e-5


def run(options: argparse.Namespace) -> int:
    """Train, write the model and its log, and print how it went."""
    from regard.cli.attending_shown import judged, parse_lengths
    from regard.cli.given import check_outputs

    path, _ = check_outputs(options.json, None)
    adversary, data, pool, recipe, words = _asked(options)
    from regard.objectives.texts import held_out, train_texts
    from regard.runtime.table import write_text
    from regard.weights.classifier import save_classifier

    model, tokenizer = _made(options, data, recipe)
    out = Path(options.out if options.out is not None else f"{TRAINED}/{_name(options)}")
    log = train_texts(
        model, tokenizer, data, adversary=adversary, unlabelled=() if pool is None else pool.texts,
        layers=options.perturb_layers, recipe=recipe, out=out, resume=options.resume,
        device=options.device or "cpu", evaluate_every=options.every,
        checkpoint_every=options.every, about={"model": options.model},
    )  # fmt: skip
    save_classifier(model, tokenizer, out)
    told = {
        **_told(options, data, pool, recipe, adversary, log),
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": held_out(model, tokenizer, data, recipe.batch, recipe.longest)[1],
        **judged(model, tokenizer, data, eps=parse_lengths(None), words=words, longest=recipe.longest,
                 seed=options.seed),
    }  # fmt: skip
    text = json.dumps(told, indent=1) + "\n"
    write_text(out / "log.json", text)
    if path is not None and options.json != "-":
        write_text(path, text)
    say(text if options.json == "-" else _printed(told, options, out))
    return 0


def _asked(
    options: argparse.Namespace,
) -> tuple[Adversary | None, LabelledTexts, Unlabelled | None, TextRecipe, frozenset[str]]:
    """What is asked for; everything that can be is checked."""
    from regard.cli.given import parse_layers
    from regard.objectives.schedule import check_count
    from regard.objectives.texts import recipe_of
    from regard.tasks.text_files import read_labelled, read_lexicon, read_unlabelled
    from regard.weights.device import check_device

    options.perturb_layers = parse_layers(options.perturb_layers)
    check_device(options.device)
    if options.every is not None:
        check_count("every", options.every, 1)
    adversary = adversary_of(options)
    if options.unlabelled is not None and options.adversary not in VIRTUAL:
        raise RegardError(f"--unlabelled is used by --adversary {', '.join(VIRTUAL)} alone.")
    data = read_labelled(
        options.labelled, text=options.text_column, label=options.label_column, held_out=options.held_out,
        seed=options.seed,
    )  # fmt: skip
    pool = None
    if options.unlabelled is not None:
        pool = read_unlabelled(options.unlabelled, text=options.text_column, label=options.label_column)
    names = ("batch", "longest", "ratio", "ramp", "accumulate", "precision")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    rate = options.rate if options.rate is not None else RATES.get(options.model, TUNED)
    recipe = recipe_of(data, options.epochs, options.steps, seed=options.seed, rate=rate, **given)
    return (
        adversary,
        data,
        pool,
        recipe,
        frozenset() if options.lexicon is None else read_lexicon(options.lexicon),
    )


def adversary_of(options: argparse.Namespace) -> Adversary | None:
    """Return the adversary that options name.

    Raises:
        RegardError: where a length is missing, given for nothing, or out of range.
    """
    from regard.objectives.adversarial import AttentionAdversary, AttentionVirtualAdversary

    lengths = {"eps": options.eps, "lam": options.lam}
    if options.adversary == "none":
        for name, value in {**lengths, "xi": options.xi, "power-steps": options.power_steps}.items():
            if value is not None:
                raise RegardError(f"--{name} is an option of --adversary, such as at or vat.")
        return None
    if options.eps is None:
        raise RegardError(
            f"--adversary {options.adversary} needs --eps, the length of the perturbation in units of "
            "scores; it has no default in the paper; 1 to 5 is a beginning."
        )
    given = {name: value for name, value in lengths.items() if value is not None}
    if options.adversary in VIRTUAL:
        more = {"xi": options.xi, "steps": options.power_steps}
        return AttentionVirtualAdversary(
            variant=options.adversary, **given, **{k: v for k, v in more.items() if v is not None}
        )
    if options.xi is not None or options.power_steps is not None:
        raise RegardError(f"--xi and --power-steps are options of --adversary {', '.join(VIRTUAL)}.")
    return AttentionAdversary(variant=options.adversary, **given)


def _made(options: argparse.Namespace, data: LabelledTexts, recipe: TextRecipe) -> tuple[Any, Any]:
    import torch

    from regard.weights.classifier import new_classifier

    torch.manual_seed(options.seed)
    return new_classifier(options.model, [text for text, _ in data.train], data.names, recipe.longest)


def _name(options: argparse.Namespace) -> str:
    return f"{Path(options.model).name}-{Path(options.labelled).stem}-{options.adversary}"


def _told(
    options: argparse.Namespace, data: LabelledTexts, pool: Unlabelled | None, recipe: TextRecipe,
    adversary: Adversary | None, log: Log,
) -> dict[str, Any]:  # fmt: skip
    from dataclasses import asdict

    from regard.objectives.texts import describe

    accuracy = {step: measures["accuracy"] for step, measures in log.measures}
    return {
        "model": options.model, "data": options.labelled, "classes": list(data.names),
        "train": len(data.train), "held_out_texts": len(data.held_out),
        "unlabelled": 0 if pool is None else len(pool.texts),
        "labels_ignored": pool is not None and pool.labels_ignored,
        "adversary": describe(adversary), "recipe": asdict(recipe), "seconds": round(log.seconds, 2),
        "held_out": [{"step": s, "nats": x, "accuracy": accuracy[s]} for s, x in log.held_out],
        "losses": log.losses,
    }  # fmt: skip


def _printed(told: dict[str, Any], options: argparse.Namespace, out: Path) -> str:
    from regard.cli.attending_shown import lines_of

    held_out = told["held_out"]
    chosen = sorted({round(i * (len(held_out) - 1) / max(1, ROWS - 1)) for i in range(ROWS)})
    rows = [
        f"  step {r['step']:6,}   held out {r['nats']:.3f} nats, {r['accuracy']:6.1%} right"
        for r in (held_out[i] for i in chosen)
    ]
    notes = []
    if options.unlabelled is not None:
        notes.append(f"{told['unlabelled']:,} texts without a label from {options.unlabelled}")
        if not told["unlabelled"]:
            notes.append("there are none, so texts with a label were used alone")
        if told["labels_ignored"]:
            notes.append("labels stand beside them, which were not used")
    words = ", ".join(told["classes"])
    return "\n".join([
        f"{told['train']:,} texts to train on and {told['held_out_texts']:,} held out, of {words}",
        *notes,
        f"{told['model']}: {told['parameters']:,} parameters, adversary {options.adversary}",
        *rows,
        f"{told['seconds']:.1f} s",
        *lines_of(told),
        f"wrote to {out}: model.safetensors, config.json, tokenizer.json, log.json",
        "",
    ])  # fmt: skip
