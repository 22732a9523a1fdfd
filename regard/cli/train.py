"""`regard train`: train a tiny language model with any mechanism by name."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.cli.command import Parser, say
from regard.errors import RegardError

if TYPE_CHECKING:
    from regard.models.decoder import Decoder
    from regard.objectives import Log
    from regard.tasks.corpus import Corpus

OUT = "regard-train"
PROMPT, SAMPLE = '"My dear ', 60


def parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = Parser(
        prog="regard train",
        description=__doc__,
        epilog="The same command goes on where a run was stopped. `regard mechanisms` lists the names.",
    )
    add = parser.add_argument
    add("--mechanism", default="softmax", metavar="NAME", help="a registered mechanism (softmax)")
    add("--set", action="append", default=[], metavar="OPTION=VALUE", help="an option of it; may be repeated")
    add("--steps", type=int, default=300, help="optimiser steps (300)")
    add("--out", metavar="DIR", help=f"folder to write to (default: {OUT}/NAME)")
    add("--text", metavar="FILE", help="what to train on (default: two packaged novels)")
    add("--vocabulary", type=int, default=512, metavar="N", help="tokens, from 256, the bytes (512)")
    add("--dim", type=int, default=128, help="width (128)")
    add("--layers", type=int, default=2, help="layers (2)")
    add("--heads", type=int, default=4, help="heads (4)")
    add("--kv-heads", type=int, help="key heads (as many as heads)")
    add("--positions", choices=("rotary", "alibi", "none"), default="rotary", help="(rotary)")
    add("--gate", choices=("sigmoid", "silu"), help="output gate of attention")
    add("--head-norm", action="store_true", help="normalise each head's output")
    add("--batch", type=int, default=16, help="sequences a step (16)")
    add("--length", type=int, default=128, help="tokens a sequence (128)")
    add("--rate", type=float, default=3e-3, help="highest learning rate (0.003)")
    add("--seed", type=int, default=0, help="of weights, batches and the sample (0)")
    add("--device", help="such as cpu or cuda (cpu)")
    add("--every", type=int, default=50, metavar="N", help="steps between held-out losses and files (50)")
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on with DIR (default)")
    add("--json", metavar="FILE|-", help="write all numbers as JSON; - is standard output")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Train, write the model and its log, and print how it went."""
    from regard.cli.given import check_outputs

    path, _ = check_outputs(options.json, None)
    model, data = _made(options)
    from regard.models.saved import config_of, save_decoder
    from regard.objectives import train
    from regard.runtime.table import write_text

    out = Path(options.out if options.out is not None else f"{OUT}/{options.mechanism}")
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
