"""`regard run attention-calibration`: hidden sinks of a text, heads that ACT helps, and what it then does."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.errors import RegardError
from regard.runtime.table import finite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from regard.cli.request import Request, SystemParser
    from regard.edit.act import ACT, FilteredHeads
    from regard.runtime import Edit
    from regard.runtime.prompt import Prompt

SHOWN, DRAWS = 10, 3
Told = dict[str, Any]


def command(parser: SystemParser) -> None:
    """Find the heads in which attention calibration helps on labelled prompts, and measure on others what it
    does in them, beside random heads. Or measure edits that were saved; or list the hidden sinks of a text.
    """
    parser.takes("model", "text", "seed")
    add = parser.add_argument
    add("--data", metavar="FILE", help="a prompt a line, JSON (default: made sentences, praise or blame)")
    add("--samples", type=int, default=24, help="prompts to choose heads on, the first (default: 24)")
    add("--test", type=int, default=80, help="prompts after them to measure on, at most (default: 80)")
    add("--metric", choices=("accuracy", "log_loss"), default="accuracy", help="what is to rise")
    add("--chat", action="store_true", help="write prompts by the model's chat template")
    add("--alpha", type=float, default=5.0, help="a sink has so many times the even share (default: 5)")
    add("--threshold", type=float, help="a fixed bound in its place, such as 0.1")
    add("--beta", type=float, default=0.4, help="the part that a sink keeps (default: 0.4)")
    add("--layers", metavar="2-28", help="layers whose heads are tried (default: all but first two and last)")
    add("--save", metavar="FILE", help="keep the heads found as edits, for --edits here and in regard diff")
    add("--resume", metavar="FILE", help="keep what is finished, and go on from there")
    add("--edits", metavar="FILE", help="search nothing, and measure the edits of this file")
    add("--sinks", action="store_true", help="only list which strings of --text are hidden sinks")
    parser.set_defaults(run=_answer)


def _answer(request: Request) -> Told:
    from regard.cli.given import parse_layers
    from regard.edit.act import ACT

    options = request.options
    if options.samples < 2 or options.test < 2:
        raise RegardError(f"--samples is {options.samples} and --test {options.test}; they take 2 or more.")
    if options.edits and (options.save or options.resume):
        raise RegardError("--edits searches nothing; leave out --save and --resume.")
    edit = ACT(
        alpha=options.alpha, threshold=options.threshold, beta=options.beta,
        layers=parse_layers(options.layers),
    )  # fmt: skip
    if options.sinks:
        return _sinks(request, edit)
    calibration, test = _prompts(request)
    if options.edits:
        return _saved(request, calibration, test)
    _check_writable(options.save)
    return _fitted(request, edit, calibration, test)


def _prompts(request: Request) -> tuple[list[Prompt], list[Prompt]]:
    from regard.edit.act.fitting import check_labels, packaged, read_prompts

    options = request.options
    if options.data is None:
        return packaged(options.samples, options.test, options.seed)
    prompts = read_prompts(options.data)
    if len(prompts) < options.samples + 2:
        raise RegardError(
            f"{options.data} has {len(prompts)} prompts; --samples {options.samples} leaves fewer than 2 to "
            "measure on."
        )
    calibration = prompts[: options.samples]
    test = prompts[options.samples : options.samples + options.test]
    check_labels(calibration)
    check_labels(test)
    return calibration, test


def _check_writable(path: str | None) -> None:
    if path is not None and not Path(path).resolve().parent.is_dir():
        raise RegardError(f"--save {path}: there is no such folder.")


def _sinks(request: Request, edit: ACT) -> Told:
    from regard.edit.act import sink_map

    text = request.text
    inputs = request.tokenizer(text.words, return_tensors="pt")
    request.check_length(inputs["input_ids"].shape[1])
    found = sink_map(request.model, inputs, edit.alpha, threshold=edit.threshold)
    table = found.strings(request.tokenizer)
    heads, first = int(found.heads.sum()), int(found.first.sum())
    request.say(f"{request.source.name}, on {text.origin} ({found.ids.shape[1]} tokens)")
    request.say(
        f"{first} of {found.first.numel()} heads have a sink at the first token, and {heads} have one later."
    )
    request.say()
    rows = list(table.rows())
    request.say(f"  {'token':<16}{'places':>8}{'heads':>8}{'share of heads':>18}")
    for row in rows[:SHOWN]:
        request.say(f"  {row['token']!r:<16}{row['places']:>8}{row['heads']:>8}{row['share']:>18.1%}")
    return {
        "model": request.source.name, "text": text.origin, "tokens": found.ids.shape[1], "heads": heads,
        "first": first, "of": found.first.numel(), "strings": rows,
    }  # fmt: skip


def _fitted(request: Request, edit: ACT, calibration: list[Prompt], test: list[Prompt]) -> Told:
    from regard.edit.act import fit_heads
    from regard.edit.files import save_edits

    options = request.options
    model, name = request.model, request.source.name
    found = fit_heads(
        model, request.tokenizer, calibration, edit=edit, metric=options.metric, chat=options.chat,
        save=options.resume,
    )  # fmt: skip
    kept = found.chosen()
    _say_heads(request, found)
    if options.save:
        save_edits(options.save, model, found.act())
    told = {
        "model": name, "metric": options.metric, "samples": len(calibration), "tried": len(found.heads),
        "plain": found.heads.about["plain"], "chance": found.by_chance()[0],
        "halves": found.heads.about["halves"],
        "heads": [[site, head, found.heads.at(site, head)["gain"]] for site, head in kept],
        "all": [{k: finite(v) for k, v in row.items()} for row in found.heads.table.rows()],
    }  # fmt: skip
    if kept:
        edits: dict[str, list[list[Edit]]] = {"ACT in these heads": [[found.act()]]}
        edits["in random heads"] = _random(found, options.seed)
        told["test"] = _measure(request, test, edits)
    if options.save:
        request.say()
        request.say(f"Saved: regard diff --edits {options.save} --text '...' shows what they change.")
    return told


def _say_heads(request: Request, found: FilteredHeads) -> None:
    about, kept = found.heads.about, found.chosen()
    mean, most = found.by_chance()
    request.say(f"{request.source.name}: {len(found.heads)} heads tried on {about['prompts']} prompts")
    before = {
        "accuracy": f"accuracy {about['plain']:.3f} as it is; ACT raises it",
        "log_loss": f"log-loss {-about['plain']:.3f} as it is; ACT lowers it",
    }
    request.say(
        f"{before[request.options.metric]} in {len(kept)} heads, where chance would in {mean:.1f} (in one of "
        f"twenty draws over {most})."
    )
    if not kept:
        request.say("No head is kept.")
        return
    request.say()
    request.say(f"  {'layer':>8}{'head':>6}{'gain':>9}")
    for site, head in kept[:SHOWN]:
        gain = found.heads.at(site, head)["gain"]
        request.say(f"  {site.rpartition('.')[2]:>8}{head:>6}{gain:>+9.3f}")
    if len(kept) > SHOWN:
        request.say(f"  and {len(kept) - SHOWN} more")


def _random(found: FilteredHeads, seed: int) -> list[list[Edit]]:
    """ACT in as many heads, drawn from those that were not kept."""
    from dataclasses import replace

    kept = found.chosen()
    others = [name for name in found.heads.names if name not in kept]
    draws = [
        random.Random(f"{seed}/{draw}").sample(others, min(len(kept), len(others))) for draw in range(DRAWS)
    ]
    return [[replace(found.edit, heads=some)] for some in draws if some]


def _saved(request: Request, calibration: list[Prompt], test: list[Prompt]) -> Told:
    from regard.edit.files import load_edits
    from regard.runtime.anatomy import root_of

    path = request.options.edits
    load_edits(path, root_of(request.source.skeleton()))
    edits = load_edits(path, request.model)
    request.say(f"{request.source.name}, edits of {path}")
    asked = test if request.options.data is None else [*calibration, *test]
    return {
        "model": request.source.name,
        "edits": path,
        "test": _measure(request, asked, {"with them": [edits]}),
    }


def _measure(request: Request, prompts: list[Prompt], edits: dict[str, list[list[Edit]]]) -> Told:
    """Print and return accuracy and log-loss of the model as it is, and under each of some edits."""
    cases: dict[str, Sequence[Sequence[Edit]]] = {"as it is": [[]], **edits}
    told = {}
    request.say()
    request.say(f"On {len(prompts)} other prompts:{'right':>22}{'log-loss':>12}")
    for name, each in cases.items():
        found = [_scores(request, prompts, some) for some in each]
        right, loss = (sum(float(x[n].mean()) for x in found) / len(found) for n in (0, 1))
        told[name] = {"accuracy": right, "log_loss": loss}
        request.say(f"  {name:<26}{right:>18.1%}{loss:>12.3f}")
    return told


def _scores(request: Request, prompts: list[Prompt], edits: Sequence[Edit]) -> tuple[Tensor, Tensor]:
    from regard.runtime.option_scores import score_options

    found = score_options(request.model, request.tokenizer, prompts, chat=request.options.chat, edits=edits)
    return found.correct().float(), found.log_loss()
