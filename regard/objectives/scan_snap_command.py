"""`regard run scan-and-snap`: watch attention learn on the smallest model that shows it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.errors import RegardError

if TYPE_CHECKING:
    from regard.cli.request import Request, SystemParser
    from regard.objectives.scan_snap import History

LINES = 11


def command(parser: SystemParser) -> None:
    """Train the one-layer model of tables and print how attention leaves the common tokens, keeps the order
    of the distinct ones, and nearly stops.
    """
    parser.takes("seed")
    add = parser.add_argument
    add("--last", type=int, default=2, metavar="N", help="last tokens (default: 2)")
    add("--next", type=int, default=1, metavar="N", help="next tokens of each last one (default: 1)")
    add("--common", type=int, default=10, metavar="N", help="tokens that all have (default: 10)")
    add("--distinct", type=int, default=10, metavar="N", help="tokens of one next token alone (default: 10)")
    add("--steps", type=int, default=100, help="(default: 100)")
    add("--batch", type=int, default=128, help="sequences a step (default: 128)")
    add("--length", type=int, default=128, help="tokens of a sequence (default: 128)")
    add("--rate-z", type=float, default=1.0, metavar="R", help="learning rate of attention (default: 1)")
    add("--rate-y", type=float, default=1.0, metavar="R", help="learning rate of the decoder (default: 1)")
    add("--optimiser", choices=("sgd", "adam"), default="sgd", help="(default: sgd, momentum 0.9)")
    add("--flow", action="store_true", help="follow the exact gradient flow instead of samples")
    add("--size", type=float, default=0.1, help="time of a step of the flow (default: 0.1)")
    add("--csv", metavar="FILE", help="write one row a step")
    parser.set_defaults(run=answer)


def answer(request: Request) -> dict[str, Any]:
    """Train, print some of the steps, and return all."""
    from regard.objectives.scan_snap import flow, train_scan_snap
    from regard.tasks.scan_snap import TokenComposition

    asked = request.options
    data = TokenComposition(
        num_last=asked.last, next_per_last=asked.next, num_common=asked.common, num_distinct=asked.distinct
    )
    if asked.length < 2:
        raise RegardError(f"--length is {asked.length}; a sequence has 2 tokens at least.")
    if asked.csv is not None and not Path(asked.csv).absolute().parent.is_dir():
        raise RegardError(f"--csv: there is no folder {Path(asked.csv).parent} to write to.")
    rates = {"steps": asked.steps, "rate_z": asked.rate_z, "rate_y": asked.rate_y}
    if asked.flow:
        seen = flow(data, size=asked.size, **rates)
    else:
        seen = train_scan_snap(
            data, batch=asked.batch, length=asked.length, optimiser=asked.optimiser, seed=asked.seed, **rates
        )
    if asked.csv is not None:
        seen.to_csv(asked.csv)
    _say(request, seen)
    return {**rates, "seed": asked.seed, "snap": seen.snap, "measures": seen.measures}


def _say(request: Request, seen: History) -> None:
    steps = len(seen.measures["loss"]) - 1
    request.say("  step   loss  entropy  common tokens  heaviest distinct  order (tau)   speed")
    for step in sorted({round(i * steps / (LINES - 1)) for i in range(LINES)}):
        told = {name: values[step] for name, values in seen.measures.items()}
        request.say(
            f"{step:6} {told['loss']:6.3f} {told['entropy']:8.3f} {told['common']:14.3f} {told['top']:18.3f} "
            f"{told['tau']:12.2f} {told['speed']:7.4f}"
        )
    still = "it has not stopped" if seen.snap is None else f"nearly stopped from step {seen.snap} on"
    request.say(f"Attention: {still} (speed under 5 % of its peak).")
