"""`regard run representation-shift`: fine-tune, collect states, find concepts, see them move, steer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.cli import given
from regard.errors import RegardError
from regard.runtime.table import finite

if TYPE_CHECKING:
    from regard.cli.request import Request, SystemParser
    from regard.edit.shift import Direction

ACTIONS = ("tune", "collect", "concepts", "shift", "steer")
LONGEST_ANSWER = 24


def command(parser: SystemParser) -> None:
    """Fine-tune a model with LoRA, collect the states that a word comes of, find their concepts, compare them
    before and after, and steer by what was found; each is an action, and files lead from one to the next.
    """
    parser.takes("model", "seed")
    add = parser.add_argument
    add("action", choices=ACTIONS, help="what to do")
    add("files", nargs="*", metavar="FILE", help="states: one for concepts, before and after for shift, "
        "target and source for steer")  # fmt: skip
    add("--out", metavar="PATH", help="tune: a folder; collect, concepts: a file; steer: a file of edits")
    add(
        "--pairs", metavar="FILE", help="tune, collect: prompt TAB answer a line (default: packaged captions)"
    )
    add("--colouring", choices=("scene", "drawn", "none"), default="scene",
        help="tune: colours of the packaged captions (default: scene)")  # fmt: skip
    add("--captions", type=int, default=48, metavar="N", help="tune: how many of them (default: 48)")
    add("--steps", type=int, default=16, help="tune (default: 16)")
    add("--batch", type=int, default=8, help="tune (default: 8)")
    add("--rate", type=float, default=2e-3, help="tune (default: 0.002)")
    add("--rank", type=int, default=8, help="tune (default: 8)")
    add("--layers", metavar="0-5,7", help="tune: blocks to adapt (default: the last eight); collect: to read "
        "(default: the last but two)")  # fmt: skip
    add("--no-resume", action="store_true", help="tune: begin anew")
    add("--adapter", metavar="FOLDER", help="collect: what tune wrote")
    add("--token", help="collect: the word of interest (default: dog, or none with --pairs)")
    add("--count", type=int, default=8, metavar="K", help="concepts, shift (default: 8)")
    add("--method", default="k-means", help="concepts, shift: k-means, pca, semi-nmf, nmf, simple")
    add("--layer", type=int, help="concepts, shift, steer: of the states (default: last)")
    add("--words", type=int, default=6, help="concepts, shift: words of each (default: 6)")
    add("--concept", type=int, metavar="K", help="steer: by the shift of this concept, files being states "
        "before and after")  # fmt: skip
    add("--alpha", type=float, default=1.0, help="steer (default: 1)")
    add("--scope", choices=("all", "generated", "last"), default="all", help="steer (default: all)")
    add("--prompt", default="I saw a dog on the beach.\nPhoto: a", help="steer: what to continue")
    parser.set_defaults(run=answer)


def answer(request: Request) -> dict[str, Any]:
    """Do what was asked for, and return its numbers."""
    asked = request.options
    needed = {"concepts": 1, "shift": 2, "steer": 2}.get(asked.action, 0)
    if len(asked.files) != needed:
        raise RegardError(f"{asked.action} takes {needed} files of states, and got {len(asked.files)}.")
    if asked.action in ("tune", "collect", "concepts") and asked.out is None:
        raise RegardError(f"{asked.action} writes what it finds; name where with --out.")
    if asked.out and not Path(asked.out).absolute().parent.is_dir():
        raise RegardError(f"--out is {asked.out}, and there is no folder {Path(asked.out).parent}.")
    if asked.words < 1:
        raise RegardError(f"--words is {asked.words}; it must be at least 1.")
    return {
        "tune": _tune, "collect": _collect, "concepts": _concepts, "shift": _shift, "steer": _steer
    }[asked.action](request)  # fmt: skip


def _pairs(path: str) -> list[tuple[str, str]]:
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RegardError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    found = []
    for number, line in enumerate(lines, 1):
        prompt, tab, reply = line.partition("\t")
        if line and not (tab and prompt and reply):
            raise RegardError(f"line {number} of {path} is no prompt, a tab and an answer.")
        if line:
            found.append((prompt.replace("\\n", "\n"), reply))
    if len(found) < 2:
        raise RegardError(f"{path} has {len(found)} pairs; give two at least.")
    return found


def _tune(request: Request) -> dict[str, Any]:
    """Fine-tune, and write the adapter; killed, the same command goes on."""
    from regard.objectives.lora import LoraRecipe, add_lora, tune_answers
    from regard.tasks.captions import captions

    asked = request.options
    recipe = LoraRecipe(steps=asked.steps, batch=asked.batch, rate=asked.rate, seed=asked.seed)
    if asked.pairs:
        pairs = _pairs(asked.pairs)
    else:
        made = captions(asked.captions, asked.colouring, seed=asked.seed)
        pairs = [(one.prompt, one.answer) for one in made]
    parts = given.parse_layers(asked.layers)
    depth = request.source.config.get_text_config().num_hidden_layers
    layers = list(range(max(0, depth - 8), depth)) if parts is None else parts
    model = add_lora(request.model, rank=asked.rank, layers=layers, seed=asked.seed)
    about = {"pairs": asked.pairs or asked.colouring, "layers": layers, "rank": asked.rank}
    with request.progress("Fine-tuning", asked.steps) as advance:
        done = [0]

        def tick(share: float) -> None:
            advance(round(share * asked.steps) - done[0])
            done[0] = round(share * asked.steps)

        log = tune_answers(
            model, request.tokenizer, pairs, pairs[: asked.batch], recipe=recipe, out=asked.out,
            resume=not asked.no_resume, checkpoint_every=4, replay=True, about=about, tick=tick,
        )  # fmt: skip
    model.save_pretrained(asked.out)
    first, last = log.held_out[0][1], log.held_out[-1][1]
    request.say(
        f"{request.source.name}: {len(pairs)} pairs, blocks {layers[0]} to {layers[-1]}, {asked.steps} steps"
    )
    request.say(
        f"loss on the first {asked.batch} pairs {first:.3f} -> {last:.3f} nats; adapter in {asked.out}"
    )
    return {"losses": log.losses, "before": first, "after": last, "seconds": log.seconds}


def _collect(request: Request) -> dict[str, Any]:
    from regard.lens.concepts import collect_features
    from regard.tasks.captions import HELD_OUT_THING, held_out_captions

    asked = request.options
    pairs = _pairs(asked.pairs) if asked.pairs else [(o.prompt, o.answer) for o in held_out_captions(4)]
    token = asked.token if asked.token or asked.pairs else HELD_OUT_THING
    depth = request.source.config.get_text_config().num_hidden_layers
    layers = given.parse_layers(asked.layers) or [max(0, depth - 3)]
    model = request.model if asked.adapter is None else _adapted(request.model, asked.adapter)
    prompts, replies = zip(*pairs, strict=True)
    found = collect_features(
        model, prompts, tokenizer=request.tokenizer, layers=layers, token=token, answers=replies
    )
    found.save(asked.out)
    request.say(f"{len(found)} of {len(pairs)} prompts, layers {', '.join(map(str, layers))}: {asked.out}")
    return {"kept": len(found), "prompts": len(pairs), "layers": layers}


def _adapted(model: Any, folder: str) -> Any:
    if not (Path(folder) / "adapter_config.json").is_file():
        raise RegardError(f"{folder} has no adapter_config.json; `tune --out {folder}` writes one.")
    try:
        from peft import PeftModel
    except ImportError as missing:
        raise RegardError('LoRA needs PEFT; run `pip install "regard[peft]"`.') from missing
    return PeftModel.from_pretrained(model, folder).eval()


def _layer(states: Any, layer: int | None) -> Any:
    return states.layers[-1] if layer is None else layer


def _concepts(request: Request) -> dict[str, Any]:
    from regard.lens.concepts import Features, fit_concepts, words_of

    asked = request.options
    states = Features.load(asked.files[0])
    layer = _layer(states, asked.layer)
    found = fit_concepts(states, asked.count, asked.method, layer=layer, seed=asked.seed)
    found.save(asked.out)
    words = words_of(request.model, request.tokenizer, found.vectors, layer=layer, count=asked.words)
    counts = found.assign(states.at(layer)).bincount(minlength=len(found)).tolist()
    request.say(f"{len(found)} concepts of {len(states)} states, layer {layer}, {asked.method}: {asked.out}")
    for number, (some, count) in enumerate(zip(words, counts, strict=True)):
        request.say(f"  {number:3} {count:5}  {' '.join(some)}")
    return {"counts": counts, "words": words, "layer": layer}


def _shift(request: Request) -> dict[str, Any]:
    from regard.lens.concepts import Features, analyse_shift, shift_words

    asked = request.options
    before, after = (Features.load(path) for path in asked.files)
    layer = _layer(before, asked.layer)
    found = analyse_shift(
        before, after, count=asked.count, method=asked.method, layer=layer, match="scored", seed=asked.seed
    )
    words = shift_words(request.model, request.tokenizer, found, count=asked.words)
    request.say(str(found))
    request.say()
    request.say("Words that each shift makes likelier:")
    for number, some in enumerate(words):
        request.say(f"  {number:3}  {' '.join(some)}")
    rows = [{name: finite(value) for name, value in row.items()} for row in found.table.rows()]
    return {
        "layer": layer, "concepts": rows, "recovery": found.recovery(), "explained": found.explained,
        "gain": found.gain, "words": words,
    }  # fmt: skip


def _direction(request: Request) -> Direction:
    from regard.edit.shift import mean_difference, of_shift
    from regard.lens.concepts import Features, analyse_shift

    asked = request.options
    first, second = (Features.load(path) for path in asked.files)
    layer = _layer(first, asked.layer)
    if asked.concept is None:
        return mean_difference(first, second, layer)
    shift = analyse_shift(first, second, count=asked.count, method=asked.method, layer=layer, seed=asked.seed)
    return of_shift(shift, asked.concept)


def _steer(request: Request) -> dict[str, Any]:
    import regard

    asked = request.options
    direction = _direction(request)
    model, tokenizer = request.model, request.tokenizer
    direction.check(model)
    edit = direction.edit(asked.alpha, asked.scope)
    control = direction.random(asked.seed).edit(asked.alpha, asked.scope)
    inputs = tokenizer(asked.prompt, return_tensors="pt").to(model.device)
    told = {}
    for name, some in (("as it is", ()), ("steered", (edit,)), ("random, as long", (control,))):
        if some:
            with regard.steer(model, *some):
                ids = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        else:
            ids = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        told[name] = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        request.say(f"{name:16} {told[name]!r}")
    if asked.out:
        regard.save_edits(asked.out, model, edit)
        request.say(f"The edit is in {asked.out}: regard diff --edits {asked.out}")
    return {"layer": direction.layer, "norm": float(direction.vector.norm()), "answers": told}
