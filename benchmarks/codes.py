"""How long does it take to find the heads of a task by sparse codes, and by path patching?

    python -m benchmarks.codes

Indirect objects: one dictionary, its training and the vectors of all prompts included, beside the search by
path patching of the same model on as many prompts as that asks for. `auc` holds the codes' scores against the
circuit found in the same run, on other prompts.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.subject import load
from regard.lens.circuits import discover_circuit, evaluate, sae_scores
from regard.lens.circuits.discover import STAGES
from regard.tasks.ioi import ioi

PROMPTS, PATCHED = 48, 16
LEAST = 0.02


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return a row for the codes and one for path patching."""
    model, tokenizer = load()
    count, epochs, patched = (6, 20, 2) if options.quick else (PROMPTS, 500, PATCHED)
    made = ioi(tokenizer, count, seed=1, corrupt="absent")
    positives = [pair.clean for pair in made.pairs]
    negatives = [pair.corrupt for pair in made.pairs]
    start = time.perf_counter()
    found = sae_scores(
        model, positives, negatives, tokenizer=tokenizer, trials=1, epochs=epochs, progress=False
    )
    coded = time.perf_counter() - start
    if not found.table["sae"].any() and not options.quick:
        raise WrongResult("no head has a code that only the task shows.")
    stages = STAGES["ioi"][: 1 if options.quick else None]
    start = time.perf_counter()
    circuit = discover_circuit(model, ioi(tokenizer, patched), stages, progress=False)
    searched = time.perf_counter() - start
    heads = circuit.heads(least=LEAST)
    held: dict[str, Any] = {
        name: evaluate(found.table, heads, column=name).auc for name in ("sae", "mean_diff")
    }
    return [
        {"case": f"codes, {count} + {count} prompts, {epochs} epochs", "seconds": coded, "auc": held["sae"],
         "auc_of_means": held["mean_diff"]},
        {"case": f"path patching, {patched} prompts, {len(stages)} stages", "seconds": searched,
         "heads": len(heads), "times": searched / coded},
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    return answer("codes", parser(__doc__).parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
