"""`regard train` of a language model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.cli.command import TRAINED, say
from regard.errors import RegardError

if TYPE_CHECKING:
    from regard.models.decoder import Decoder
    from regard.objectives import Log
    from regard.objectives.meap_objective import MEAP
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
    objective = _objective(options)
    model, data = _made(options)
    from regard.models.saved import config_of, save_decoder
    from regard.objectives import train
    from regard.objectives.meap import with_mask_token
    from regard.runtime.table import write_text

    masked = "" if objective is None else "-meap"
    out = Path(options.out if options.out is not None else f"{TRAINED}/{options.mechanism}{masked}")
    inputs, tokenizer = None, data.tokenizer
    if objective is not None:
        mask_id, tokenizer = with_mask_token(data.tokenizer)
        inputs = objective(mask_id)
    log = train(
        model, data, steps=options.steps, out=out, resume=options.resume, batch=options.batch,
        length=options.length, rate=options.rate, seed=options.seed, evaluate_every=options.every,
        checkpoint_every=options.every, about=config_of(model), inputs=inputs,
        accumulate=options.accumulate, precision=options.precision,
    )  # fmt: skip
    save_decoder(model, out, tokenizer)
    told = _told(options, model, data, log) | ({} if inputs is None else {"objective": inputs.told()})
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
        steps=options.steps, batch=options.batch, length=options.length, rate=options.rate, seed=options.seed,
        accumulate=options.accumulate, precision=options.precision,
    )  # fmt: skip
    data = read_corpus(options.text, options.vocabulary) if options.text else packaged(options.vocabulary)
    torch.manual_seed(options.seed)
    more = options.objective == "meap"
    model = Decoder(
        data.vocabulary + more, dim=options.dim, layers=options.layers, heads=options.heads,
        kv_heads=options.kv_heads, mechanism={"mechanism": options.mechanism, **_set(options.set)},
        positions=None if options.positions == "none" else options.positions, gate=options.gate,
        head_norm=options.head_norm,
    )  # fmt: skip
    return model.to(options.device or "cpu"), data


def _objective(options: argparse.Namespace) -> Callable[[int], MEAP] | None:
    """What makes the objective from the id of the mask; None for plain next-token prediction."""
    given = {"--mask-ratio": options.mask_ratio, "--mask-ramp": options.mask_ramp}
    if options.objective != "meap":
        for name, value in given.items():
            if value is not None:
                raise RegardError(f"{name} is an option of --objective meap.")
        return None
    from regard.objectives.meap import RATIO
    from regard.objectives.meap_objective import MEAP, Ramp

    end = RATIO if options.mask_ratio is None else options.mask_ratio
    ratio = end if options.mask_ramp is None else Ramp(end=end, steps=options.mask_ramp)
    MEAP(mask_id=0, ratio=ratio)
    return lambda mask_id: MEAP(mask_id=mask_id, ratio=ratio, seed=options.seed)


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
    hides = ", some inputs hidden" if "objective" in told else ""
    about = f"{model['mechanism']['mechanism']}{hides}: {told['parameters']:,} parameters, {sizes}"
    rows = [
        f"  step {r['step']:6,}   held out {r['nats']:.3f} nats a token, {r['bits_per_byte']:.3f} bits a byte"
        for r in told["held_out"]
    ]
    speed = f"{told['seconds']:.1f} s, {told['tokens_per_second']:,} tokens a second"
    sample = " ".join(told["sample"].split())
    return "\n".join(
        [about, *rows, speed, f"sample: {sample}", f"wrote {out}/model.safetensors and log.json", ""]
    )
