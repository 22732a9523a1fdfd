"""The picture of `lightning-attention-2`: time and memory a token by length, loss curves, decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.studies.picture import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

TIMES = {"chunk": ("chunks", "blue"), "both": ("chunks, with gradients", "sky"), "sdpa": ("SDPA", "orange")}
MEMORY = {"chunk": ("chunks", "blue"), "tiles": ("tiles", "green"), "naive": ("masked product", "grey")}


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw the outcome."""
    (times, memory), (curves, decoding) = figure.subplots(2, 2)
    _by_length(times, outcome, "microseconds", TIMES, "microseconds a token, the fastest round")
    times.set_title("Two heads of width 64, float32")
    _by_length(memory, outcome, "bytes", MEMORY, "bytes a token")
    memory.set_title("The most memory, with gradients")
    _curves(curves, outcome)
    _decoding(decoding, outcome)


def _by_length(
    axes: Axes, outcome: Outcome, what: str, lines: dict[str, tuple[str, str]], label: str
) -> None:
    told, unit = outcome.details[what], outcome.details["unit"]
    ticks = set()
    for name, (words, colour) in lines.items():
        points = sorted(
            (int(key.split()[1]) * unit, value) for key, value in told.items() if key.split()[0] == name
        )
        ticks |= {length for length, _ in points}
        axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[colour], label=words)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [f"{tick:,}" for tick in sorted(ticks)])
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel(label)
    axes.legend()


def _curves(axes: Axes, outcome: Outcome) -> None:
    curves = outcome.details["curves"]
    styles = {"whole": ("masked product", "grey", 6.0, "-"), "chunks": ("chunks of 16", "blue", 3.0, "-"),
              "tiles": ("tiles of 24, gradients by hand", "orange", 1.2, "--")}  # fmt: skip
    for name, (words, colour, width, style) in styles.items():
        axes.plot(curves[name], style, color=COLOURS[colour], linewidth=width, label=words)
    axes.set_xlabel("steps")
    axes.set_ylabel("loss, nats")
    axes.set_title("TransNormerLLM, one seed, three ways to compute it")
    axes.legend()


def _decoding(axes: Axes, outcome: Outcome) -> None:
    blocks = outcome.details["blocks"]
    each = outcome.details["decoded"] // len(blocks)
    micro = [1e6 * seconds / each for seconds in blocks]
    axes.plot([each * (i + 1) for i in range(len(blocks))], micro, "o-", color=COLOURS["blue"])
    axes.set_ylim(0)
    axes.set_xlabel("tokens decoded")
    axes.set_ylabel("microseconds a token")
    axes.set_title("Decoding, one token after another")
