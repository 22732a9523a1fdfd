"""`regard train` of a language model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.cli.command import TRAINED, say
from regard.errors import RegardError

if TYPE_CHECKING:
    from regard.models.decoder import Decoder
    from regard.objectives import Log
    from regard.tasks.corpus import Corpus

PROMPT, SAMPLE = '"My dear ', 60
STEPS, BATCH, RATE, EVERY = 300, 16, 3e-3, 50


def run(options: argparse.Namespace) -> int:
    """Train, write the model and its log, and print how it went."""
    from regard.cli.given import check_outputs

    path, _ = check_outputs(options.json, None)
    for name, default in (("steps", STEPS), ("batch", BATCH), ("rate", RATE), ("every", EVERY)):
        if getattr(options, name) is None:
            setattr(options, name, default)
    model, data = _made(options)
    from regard.models.saved import config_of, save_decoder
    from regard.objectives import train
    from regard.runtime.table import write_text

    out = Path(options.out if options.out is not None else f"{TRAINED}/{options.mechanism}")
    log = train(
        model, data, steps=options.steps, out=out, resume=options.resume, batch=options.batch,
        length=options.length, rate=options.rate, seed=options.seed, evaluate_every=options.every,
        checkpoint_every=options.every, about=config_of(model),
    )  # fmt: skip
    save_decoder(model, out, data.tokenizer)
    told = _told(options, model, data, log)
    text = json.dumps(told, indent=1) + "\n"
    write_text(out / "log.json", text)
    if path is not None and options.json != "-":
        write_text(path, text)
    say(text if options.json == "-" else _printed(told, out))
    return 0


def _made(options: argparse.Namespace) -> tuple[Decoder, Corpus]:
    """The model with fresh weights, and the text."""
    import torch

    from regard.models.decoder import Decoder
    from regard.objectives import Recipe
    from regard.tasks.corpus import packaged, read_corpus
    from regard.weights.device import check_device

    check_device(options.device)
    Recipe(
        steps=options.steps, batch=options.batch, length=options.length, rate=options.rate, seed=options.seed
    )
    data = read_corpus(options.text, options.vocabulary) if options.text else packaged(options.vocabulary)
    torch.manual_seed(options.seed)
    model = Decoder(
        data.vocabulary, dim=options.dim, layers=options.layers, heads=options.heads,
        kv_heads=options.kv_heads, mechanism={"mechanism": options.mechanism, **_set(options.set)},
        positions=None if options.positions == "none" else options.positions, gate=options.gate,
        head_norm=options.head_norm,
    )  # fmt: skip
    return model.to(options.device or "cpu"), data


def _set(given: list[str]) -> dict[str, Any]:
    """Options such as `window=64`; a value is JSON, or else a word."""
    found: dict[str, Any] = {}
    for one in given:
        name, separator, value = one.partition("=")
        if not separator or not name.strip():
            raise RegardError(f"--set takes OPTION=VALUE, such as window=64, and got {one!r}.")
        try:
            found[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            found[name.strip()] = value
    return found


def _told(options: argparse.Namespace, model: Decoder, data: Corpus, log: Log) -> dict[str, Any]:
    """All numbers, and a sample."""
    import math

    import torch

    from regard.models.saved import config_of

    begun = torch.tensor([data.encode(PROMPT)], device=model.embed.weight.device)
    generator = torch.Generator().manual_seed(options.seed)
    drawn = model.eval().generate(begun, SAMPLE, temperature=0.8, generator=generator)
    bits = 1 / (math.log(2) * data.bytes_per_token)
    tokens = len(log.losses) * options.batch * options.length
    return {
        "model": config_of(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": len(log.losses), "batch": options.batch, "length": options.length, "rate": options.rate,
        "seed": options.seed, "seconds": round(log.seconds, 2),
        "tokens_per_second": round(tokens / max(log.seconds, 1e-9)),
        "held_out": [{"step": s, "nats": x, "bits_per_byte": x * bits} for s, x in log.held_out],
        "losses": log.losses,
        "sample": data.decode(drawn[0].tolist()),
    }  # fmt: skip


def _printed(told: dict[str, Any], out: Path) -> str:
    model = told["model"]
    sizes = f"width {model['dim']}, depth {model['layers']}"
    about = f"{model['mechanism']['mechanism']}: {told['parameters']:,} parameters, {sizes}"
    rows = [
        f"  step {r['step']:6,}   held out {r['nats']:.3f} nats a token, {r['bits_per_byte']:.3f} bits a byte"
        for r in told["held_out"]
    ]
    speed = f"{told['seconds']:.1f} s, {told['tokens_per_second']:,} tokens a second"
    sample = " ".join(told["sample"].split())
    return "\n".join(
        [about, *rows, speed, f"sample: {sample}", f"wrote {out}/model.safetensors and log.json", ""]
    )
