"""What does seeing which heads copy cost? A needle test: rows opened one by one, or all of them returned."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import regard
from benchmarks import machine
from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.subject import load
from benchmarks.timing import interleaved
from regard.lens.retrieval_heads.answering import stop_tokens
from regard.lens.retrieval_heads.detection import spans
from regard.lens.retrieval_heads.lens import SPAN, Copying
from regard.tasks.needles import Asked, needle, packaged_facts

LENGTHS, STEPS = (256, 1024), 10
CASES = ("plain", "copying", "eager")


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row a length of the prompt."""
    model, tokenizer = load()
    lengths = options.lengths or ([96] if options.quick else list(LENGTHS))
    rounds = options.rounds or (1 if options.quick else 5)
    return [_row(model, tokenizer, length, rounds, options.quick) for length in lengths]


def prompt(tokenizer: Any, length: int) -> Asked:
    """Return a prompt of a length, its fact in the middle."""
    return needle(tokenizer, lengths=(length,), depths=(0.5,), facts=packaged_facts()[:1])[0]


def _row(model: Any, tokenizer: Any, length: int, rounds: int, quick: bool) -> dict[str, Any]:
    cases = works(model, tokenizer, prompt(tokenizer, length))
    if not torch.allclose(cases["copying"](), cases["eager"]()):
        raise WrongResult("scores of the lens differ from those of attention returned whole.")
    times = interleaved(cases, rounds, warm=0)
    peaks = {} if quick else {f"{case}_mb": _peak(case, length) for case in CASES}
    return {
        "case": f"{STEPS} tokens after {length}",
        **{f"{case}_s": times.median(case) for case in CASES},
        "ratio": times.ratio("copying", "plain"),
        "eager_over_copying": times.ratio("eager", "copying"),
        **peaks,
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def works(model: Any, tokenizer: Any, asked: Asked) -> dict[str, Callable[[], Tensor]]:
    """Return the three ways, each a function that returns the heads' scores, or of the first the tokens."""
    ids, stops = asked.ids[None], stop_tokens(model, tokenizer)
    options = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": STEPS, "min_new_tokens": STEPS,
        "do_sample": False, "pad_token_id": stops[0],
    }  # fmt: skip
    marked = spans(ids, [asked])

    def plain() -> Tensor:
        return model.generate(ids, **options)

    def copying() -> Tensor:
        with regard.watch(model, Copying(), spans={SPAN: marked}) as seen:
            plain()
        return torch.cat(list(seen.lens(Copying).each()["recall"].values()), 1)[0]

    def eager() -> Tensor:
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            out = model.generate(ids, **options, output_attentions=True, return_dict_in_generate=True)
        finally:
            model.set_attn_implementation(before)
        return _by_definition(out, asked)

    return {"plain": plain, "copying": copying, "eager": eager}


def _by_definition(out: Any, asked: Asked) -> Tensor:
    """Recall of each head, of the attention that `generate()` returned for every step and layer."""
    tokens, length = out.sequences[0], len(asked.ids)
    first, last = asked.span or (0, 0)
    heads = [row for layer in out.attentions[0] for row in range(layer.shape[1])]
    copied = torch.zeros(len(heads), last - first, dtype=torch.bool)
    for step, layers in enumerate(out.attentions):
        peak = torch.cat([weights[0, :, -1].argmax(-1) for weights in layers])
        hit = (peak >= first) & (peak < last) & (tokens[peak] == tokens[length + step])
        rows = hit.nonzero()[:, 0]
        copied[rows, peak[rows] - first] = True
    return copied.double().mean(1)


def _peak(case: str, length: int) -> int:
    """MB that the peak of a fresh process rises above the loaded model."""
    command = [sys.executable, "-m", "benchmarks.heads", "--one", case, "--lengths", str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise WrongResult(f"{case} at {length} tokens failed: {done.stderr.strip().splitlines()[-1]}")
    return round(json.loads(done.stdout.splitlines()[-1])["added"] / 2**20)


def one(case: str, length: int) -> None:
    """Run one way in this process, and print how much its peak is above what the loaded model took."""
    machine.settle()
    model, tokenizer = load()
    work = works(model, tokenizer, prompt(tokenizer, length))[case]
    works(model, tokenizer, prompt(tokenizer, 64))["plain"]()
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the peak begins anew, for reading the weights took more than any of the ways
    before = _memory("VmRSS")
    work()
    print(json.dumps({"added": _memory("VmHWM") - before}))


def _memory(name: str) -> int:
    """Bytes that this process has (VmRSS), or has had at most since the peak began anew (VmHWM)."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(name))
    return int(line.split()[1]) * 1024


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", help="tokens (default: 256 1024)")
    options.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    chosen = options.parse_args(arguments)
    if chosen.one:
        one(chosen.one, chosen.lengths[0])
        return 0
    return answer("heads", chosen, ask)


if __name__ == "__main__":
    sys.exit(main())
