"""The command of `quantizable-transformers`: outliers of a model on a text, and what eight bits cost it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from regard.edit.simulated_int8 import simulate_int8
from regard.errors import RegardError
from regard.lens.outliers import OutlierReport, Outliers
from regard.runtime.table import finite
from regard.runtime.verbs import watch

if TYPE_CHECKING:
    from torch import Tensor

    from regard.cli.request import Request, SystemParser

SHOWN = 5
WAYS: dict[str, dict[str, Any]] = {
    "8 bits": {},
    "8 bits, residual stream left alone": {"residual": False},
    "16 bits (control)": {"bits": 16},
}


def command(parser: SystemParser) -> None:
    """Print where the outliers of a model's activations are, with and without the first token, and what 8
    bits a tensor cost it.
    """
    parser.takes("model", "text")
    parser.add_argument("--length", type=int, default=64, help="tokens in a piece (default: 64)")
    parser.add_argument(
        "--int8", action="store_true",
        help="also the perplexity in 8 bits: ranges from the first half of the pieces, measured on the rest",
    )  # fmt: skip
    parser.set_defaults(run=_answer)


def _answer(request: Request) -> dict[str, Any]:
    length = request.options.length
    if length < 2:
        raise RegardError(f"--length is {length}; a piece takes at least 2 tokens.")
    request.check_length(length)
    pieces = _pieces(request, length)
    if request.options.int8 and len(pieces) < 2:
        raise RegardError(
            "--int8 fixes ranges on one half of the pieces, and there is one; give a longer text."
        )
    with watch(request.model, Outliers()) as seen:
        request.read(pieces, "Reading the text")
    report: OutlierReport = seen[Outliers]
    _print_outliers(request, report, pieces)
    told = {
        "model": request.source.name, "text": request.text.origin, "pieces": len(pieces), "length": length,
        "outliers": [{k: finite(v) if isinstance(v, float) else v for k, v in row.items()}
                     for row in report.table.rows()],
    }  # fmt: skip
    return {**told, "perplexity": _perplexities(request, pieces)} if request.options.int8 else told


def _pieces(request: Request, length: int) -> Tensor:
    words, origin = request.text
    ids = request.tokenizer(words, return_tensors="pt", verbose=False)["input_ids"][0]
    count = len(ids) // length
    if not count:
        raise RegardError(
            f"The text ({origin}) has {len(ids)} tokens, and a piece takes {length}; give a longer one, or a "
            "smaller --length."
        )
    pieces: Tensor = ids[: count * length].view(count, length).long()
    return pieces


def _print_outliers(request: Request, report: OutlierReport, pieces: Tensor) -> None:
    columns = ("infinity", "infinity_rest", "kurtosis", "kurtosis_rest")
    count = f"{len(pieces)} piece{'s' * (len(pieces) != 1)} of {pieces.shape[1]} tokens"
    request.say(f"{request.source.name}, {request.text.origin}: {count}")
    request.say()
    request.say(f"The {SHOWN} tensors with the highest kurtosis (3 in a normal distribution):")
    request.say(f"  {'':20}{'largest':>10}{'without':>11}{'kurtosis':>11}{'without':>11}")
    request.say(f"  {'':20}{'':>10}{'1st token':>11}{'':>11}{'1st token':>11}")
    rows = sorted(report.table.rows(), key=lambda row: -row["kurtosis"])
    for row in rows[:SHOWN]:
        name = f"{row['block']} {row['tensor']}"
        request.say(f"  {name:20}" + "".join(f"{row[c]:>11,.0f}" for c in columns).removeprefix(" "))
    request.say()
    request.say(Outliers.findings(report)[0].text)


def _perplexities(request: Request, pieces: Tensor) -> dict[str, float | None]:
    half = len(pieces) // 2
    calibration, rest = [piece[None] for piece in pieces[:half]], pieces[half:]
    found = {"as it is": _perplexity(request, rest)}
    for name, options in WAYS.items():
        with simulate_int8(request.model, calibration, **options):
            found[name] = _perplexity(request, rest)
    request.say()
    request.say(f"Perplexity of the last {len(rest)} pieces:")
    for name, value in found.items():
        request.say(f"  {name:36}{value:>12,.2f}")
    return {name: finite(value) for name, value in found.items()}


def _perplexity(request: Request, pieces: Tensor) -> float:
    import torch

    losses = []
    with request.progress("Measuring the loss", len(pieces)) as advance, torch.no_grad():
        for piece in pieces.to(request.model.device):
            losses.append(float(request.model(input_ids=piece[None], labels=piece[None]).loss))
            advance(1)
    mean = sum(losses) / len(losses)
    return math.exp(mean) if mean < 700 else math.inf
