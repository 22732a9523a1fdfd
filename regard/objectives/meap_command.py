"""`regard run meap`: what hiding inputs has done to a model, and rows to fine-tune one on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.errors import RegardError

if TYPE_CHECKING:
    from regard.cli.request import Request, SystemParser
    from regard.objectives.meap_focus import Focus
    from regard.tasks.needles import Needles

LENGTH, DEPTHS, FACTS = 256, (0.1, 0.5, 0.9), 8


def command(parser: SystemParser) -> None:
    """Print which needles a model finds, by depth; beside a model trained otherwise (--against), also where
    the attention of both goes where inputs are hidden. Or turn questions with answers into rows to fine-tune
    on (--examples).
    """
    parser.takes("model", "seed")
    add = parser.add_argument
    add("--against", metavar="MODEL", help="what it is compared with, such as the same trained plainly")
    add("--length", type=int, default=LENGTH, help=f"tokens of a text (default: {LENGTH})")
    add(
        "--depth",
        type=float,
        nargs="+",
        default=DEPTHS,
        help="where facts lie, 0 to 1 (default: 0.1 0.5 0.9)",
    )
    add("--facts", type=int, default=FACTS, metavar="N", help=f"facts, up to 24 (default: {FACTS})")
    add("--ratio", type=float, help="share that is hidden (default: 0.15; of answers 0.1)")
    add(
        "--mask-token", metavar="TOKEN", help="one that the tokenizer has (default: [MASK], added if need be)"
    )
    add("--examples", metavar="FILE", help="only make rows, of JSON objects with `instruction` and `output`, "
        "or `conversations`, a line each")  # fmt: skip
    add("--rows", metavar="FILE", help="where the rows go (default: beside the examples, .rows.jsonl)")
    add(
        "--layout",
        choices=("rows", "concat"),
        default="rows",
        help="where masked copies stand (default: rows)",
    )
    add("--max-length", type=int, metavar="N", help="tokens of a row, or of each half (default: any)")
    parser.set_defaults(run=answer)


def answer(request: Request) -> dict[str, Any]:
    """Do the one or the other."""
    options = request.options
    if options.examples is not None:
        return _rows(request)
    for name in ("rows", "max_length"):
        if getattr(options, name) is not None:
            raise RegardError(f"--{name.replace('_', '-')} goes with --examples.")
    return _compared(request)


def _rows(request: Request) -> dict[str, Any]:
    from regard.objectives.meap import find_mask_token
    from regard.objectives.meap_data import ANSWER_RATIO, meap_sft, read_examples

    options = request.options
    if options.against is not None:
        raise RegardError("--against compares models, and --examples makes rows; give one.")
    path = Path(options.rows or Path(options.examples).with_suffix(".rows.jsonl"))
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise RegardError(f"{path} cannot be written to: it is a folder, or there is none to put it in.")
    examples = read_examples(options.examples)
    mask_id = find_mask_token(request.tokenizer, options.mask_token)
    made = meap_sft(
        examples, request.tokenizer, mask_id, layout=options.layout, max_length=options.max_length,
        ratio=ANSWER_RATIO if options.ratio is None else options.ratio, seed=options.seed,
    )  # fmt: skip
    made.save(path)
    request.say(
        f"{len(made.rows)} rows of {made.answers} answers are in {path}; {made.short} were too short for a "
        f"masked copy, {made.cut} were cut. Hidden tokens are {mask_id}, and labels of -100 do not count."
    )
    told = {"answers": made.answers, "short": made.short, "cut": made.cut, "mask_id": mask_id}
    return {"rows": len(made.rows), **told, "layout": options.layout, "path": str(path)}


def _compared(request: Request) -> dict[str, Any]:
    from regard.objectives.meap import RATIO, check_ratio
    from regard.runtime.needle_accuracy import needle_accuracy
    from regard.tasks.needles import needle, packaged_facts

    options = request.options
    ratio = RATIO if options.ratio is None else options.ratio
    check_ratio(ratio, "--ratio")
    facts = packaged_facts()
    if not 1 <= options.facts <= len(facts):
        raise RegardError(f"--facts is {options.facts}; it goes from 1 to {len(facts)}.")
    request.check_length(options.length)
    other = None if options.against is None else _other(request)
    prompts = needle(
        request.tokenizer, lengths=(options.length,), depths=options.depth, facts=facts[: options.facts],
        seed=options.seed,
    )  # fmt: skip
    models = {request.source.name: request.model}
    if other is not None:
        models[_named(other[0].name, models)] = other[0].read(options.dtype, options.device)
    found = {
        name: needle_accuracy(model, request.tokenizer, prompts).by_depth() for name, model in models.items()
    }
    _say_needles(request, found)
    told: dict[str, Any] = {"needles": {name: list(by.items()) for name, by in found.items()}}
    if other is not None:
        focus = _focus(request, list(models.values()), other[1], prompts, ratio)
        _say_focus(request, list(models), focus)
        told["focus"] = focus.told()
    return {"length": options.length, "facts": options.facts, "ratio": ratio, **told}


def _other(request: Request) -> tuple[Any, Any]:
    """The model to compare with, and its tokenizer, which must read alike."""
    from regard.objectives.meap import MASK_TOKEN

    source = type(request.source).find(request.options.against)
    if source.tokenizer is None:
        raise RegardError(f"{source.name} comes without a tokenizer.")
    vocabularies = [tokenizer.get_vocab() for tokenizer in (request.tokenizer, source.tokenizer)]
    for vocabulary in vocabularies:
        vocabulary.pop(MASK_TOKEN, None)
    if vocabularies[0] != vocabularies[1]:
        raise RegardError(
            f"{request.source.name} and {source.name} have different vocabularies; compare models that read "
            "alike."
        )
    return source, source.tokenizer


def _named(name: str, others: dict[str, Any]) -> str:
    return f"{name} (against)" if name in others else name


def _focus(request: Request, models: list[Any], tokenizer: Any, prompts: Needles, ratio: float) -> Focus:
    """Compare the attention of both on the prompts: A is the model compared with, B the model."""
    import torch

    from regard.objectives.meap import add_mask_token, mask_inputs
    from regard.objectives.meap_focus import attention_focus
    from regard.runtime.pairs import padded

    token = request.options.mask_token
    mask_ids = [
        add_mask_token(model, each, token)
        for model, each in zip(models, (request.tokenizer, tokenizer), strict=True)
    ]
    if mask_ids[0] != mask_ids[1]:
        raise RegardError(f"[MASK] is token {mask_ids[0]} of the one model and {mask_ids[1]} of the other.")
    batch = padded([{"input_ids": asked.ids[None]} for asked in prompts], "left", 0)
    ids, valid = batch["input_ids"], batch["attention_mask"].bool()
    answers = torch.zeros_like(valid)
    for row, asked in enumerate(prompts):
        assert asked.span is not None
        begin = ids.shape[1] - len(asked.ids)
        answers[row, begin + asked.span[0] : begin + asked.span[1]] = True
    _, mask = mask_inputs(ids, mask_ids[0], ratio, generator=request.generator, valid=valid, allow=True)
    return attention_focus(models[1], models[0], ids, mask, mask_id=mask_ids[0], valid=valid, answer=answers)


def _say_needles(request: Request, found: dict[str, dict[float, float]]) -> None:
    wide = max(len(name) for name in found)
    options = request.options
    request.say(f"Facts found in texts of {options.length} tokens, {options.facts} at each depth:")
    request.say("  depth" + " " * (wide - 2) + "".join(f"{depth:8g}" for depth in next(iter(found.values()))))
    for name, by in found.items():
        request.say(f"  {name:{wide}}   " + "".join(f"{share:8.0%}" for share in by.values()))


def _say_focus(request: Request, names: list[str], focus: Focus) -> None:
    b, a = names
    request.say(f"Where attention goes, {a} -> {b}:")
    lines = [
        ("a masked key receives", focus.masked_a, focus.masked_b, f"{-focus.decay:+.1%}"),
        ("another key", focus.others_a, focus.others_b, ""),
        ("variance over other keys", focus.variance_a, focus.variance_b, f"{focus.variance:+.1%}"),
    ]
    for label, one, two, change in lines:
        request.say(f"  {label:28} {one:10.4g} {two:10.4g}  {change}".rstrip())
    if focus.answer_a is not None and focus.answer_b is not None and focus.even is not None:
        request.say(
            f"  {'the last token on the answer':28} {focus.answer_a:10.2%} {focus.answer_b:10.2%}  "
            f"even: {focus.even:.2%}"
        )
