"""`regard run active-dormant-heads`: the three extremes of two kinds of text, and heads that differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.errors import RegardError
from regard.runtime.table import finite

if TYPE_CHECKING:
    from regard.cli.request import Request, SystemParser
    from regard.lens.extremes import ContrastTable, Extremes

SINKS = ("first", "bos", "argmax")


def command(parser: SystemParser) -> None:
    """Print sinks, drained values and residual peaks of two kinds of text, and the heads that are sinks on
    one of them alone.
    """
    parser.takes("model")
    add = parser.add_argument
    add("--texts", nargs="+", metavar="FILE", help="texts of the one kind (default: packaged prose)")
    add("--against", nargs="+", metavar="FILE", help="texts of the other (default: packaged Python)")
    add("--sink", default="first", metavar="first|bos|argmax|N", help="which token (default: first)")
    add("--length", type=int, default=64, help="tokens in a piece (default: 64)")
    add("--most", type=int, default=24, metavar="N", help="pieces of each kind at most (default: 24)")
    add("--top", type=int, default=5, metavar="N", help="heads to print of each kind (default: 5)")
    add("--force", action="store_true", help="also send these to the sink, one by one: what it costs where")
    add("--origin", action="store_true", help="also find the block that makes the residual peak")
    parser.set_defaults(run=answer)


def answer(request: Request) -> dict[str, Any]:
    """Read both kinds of text, print what was found, and return it."""
    from regard.lens import compare_sinks, measure_sinks
    from regard.tasks.passages import code_passages, passages

    asked = request.options
    sink = int(asked.sink) if asked.sink.isdigit() else asked.sink
    if min(asked.most, asked.top) < 1 or (isinstance(sink, str) and sink not in SINKS):
        raise RegardError(
            f"--most is {asked.most}, --top {asked.top} and --sink {asked.sink}; they take 1 or more, and "
            "first, bos, argmax or a position."
        )
    request.check_length(asked.length)
    kinds = {
        "prose" if asked.texts is None else ", ".join(asked.texts): _texts(asked.texts, passages),
        "Python" if asked.against is None else ", ".join(asked.against): _texts(asked.against, code_passages),
    }
    if len(kinds) < 2:
        raise RegardError("--texts and --against name the same files; give two kinds of text.")
    names, texts = list(kinds), list(kinds.values())
    options = {"sink": sink, "length": asked.length, "most": asked.most}
    model, tokenizer = request.model, request.tokenizer
    extremes = [measure_sinks(model, tokenizer, some, **options) for some in texts]
    table = compare_sinks(model, tokenizer, *texts, **options)
    request.say(f"{request.source.name}, {len(table)} heads")
    for name, found in zip(names, extremes, strict=True):
        _say_extremes(request, name, found)
    chosen = _say_contrast(request, names, table)
    told = {
        "model": request.source.name, "texts": names, "pieces": table.about["pieces"], "length": asked.length,
        "stability": table.about["stability"],
        "heads": [{k: finite(v) for k, v in row.items()} for row in table.table.rows()],
        "extremes": [{"sink_rate": finite(f.sink_rate()), "findings": [x.text for x in f.findings],
                      "absent": list(f.absent), "windowed": list(f.windowed)} for f in extremes],
    }  # fmt: skip
    if asked.force and chosen:
        told["forced"] = _force(request, names, texts, chosen)
    if asked.origin:
        told["origin"] = _origin(request, texts[0])
    return told


def _texts(files: list[str] | None, packaged: Any) -> list[str]:
    if files is None:
        return [passage.text for passage in packaged()]
    found = []
    for file in files:
        try:
            found.append(Path(file).read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise RegardError(f"{file} cannot be read as a text: {reason}.") from None
    return found


def _say_extremes(request: Request, name: str, found: Extremes) -> None:
    pieces = f"{found.pieces} piece{'s' * (found.pieces != 1)}"
    request.say()
    request.say(f"{name}: {pieces}")
    for line in str(found).splitlines():
        request.say(f"  {line}")


def _say_contrast(request: Request, names: list[str], table: ContrastTable) -> list[tuple[str, int]]:
    """Print the heads of the largest contrast either way, and return them."""
    top = request.options.top
    request.say()
    request.say(f"Attention on the sink:            {names[0][:14]:>14}{names[1][:14]:>16}")
    chosen = []
    for here, largest in ((names[0], True), (names[1], False)):
        rows = [row for row in table.top("contrast", top, largest=largest) if (row[2] > 0) == largest]
        request.say(f"  dormant on {here} alone")
        for site, head, _ in rows:
            told = table.at(site, head)
            request.say(f"    {site:>10} head {head:<13}{told['a']:>17.2f}{told['b']:>16.2f}")
            chosen.append((site, head))
    if "noise_a" in table.columns:
        chance = max(abs(table["noise_a"]).max(), abs(table["noise_b"]).max())
        request.say(
            f"Control: between halves of one kind of text at most {chance:.2f}; the two halves rank the "
            f"contrasts with a correlation of {table.stability:.2f}."
        )
    return chosen


def _force(request: Request, names: list[str], texts: list[list[str]], heads: list[tuple[str, int]]) -> Any:
    from regard.edit.dormant.losses import forced_losses

    asked = request.options
    table = forced_losses(
        request.model, request.tokenizer, texts[0], texts[1], heads, length=asked.length, most=asked.most
    )
    request.say()
    request.say("Sent to the first token, one by one; the loss rises by, in nats:")
    for site, head in table.names:
        told = table.at(site, head)
        request.say(f"    {site:>10} head {head:<13}{told['a']:>17.4f}{told['b']:>16.4f}")
    return [{k: finite(v) for k, v in row.items()} for row in table.table.rows()]


def _origin(request: Request, texts: list[str]) -> Any:
    from regard.edit.dormant.origin import sink_origin

    table = sink_origin(
        request.model, request.tokenizer, texts, length=request.options.length, together=1, most=1
    )
    request.say()
    request.say("The norm of the first token in a deep layer, with parts of early blocks left out:")
    for line in str(table).splitlines():
        request.say(f"  {line}")
    return [{k: finite(v) for k, v in row.items()} for row in table.rows()]
