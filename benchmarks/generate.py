"""What does watching `generate()` cost? 64 greedy tokens under all built-in lenses, against plain."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

import regard
from benchmarks.checks import check_lenses
from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.subject import every_lens, load, text_ids
from benchmarks.timing import interleaved

PROMPTS, TOKENS = (32, 512), 64


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row a length of the prompt."""
    model, tokenizer = load()
    check_lenses(model, text_ids(tokenizer, 64))
    tokens = 4 if options.quick else TOKENS
    prompts = [16] if options.quick else PROMPTS
    rounds = options.rounds or (2 if options.quick else 5)
    return [_row(model, text_ids(tokenizer, n), tokens, rounds) for n in prompts]


def _row(model: Any, ids: Tensor, tokens: int, rounds: int) -> dict[str, Any]:
    def plain() -> Tensor:
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip

    def watched() -> Tensor:
        with regard.watch(model, *every_lens()):
            return plain()

    def no_rows() -> Tensor:
        with regard.watch(model):
            return plain()

    cases = {"plain": plain, "watched": watched, "no_lens": no_rows}
    if any(not torch.equal(plain(), work()) for work in (watched, no_rows)):
        raise WrongResult("generate() chose other tokens while it was watched.")
    times = interleaved(cases, rounds, warm=0)
    return {
        "case": f"{tokens} tokens after {ids.shape[1]}",
        **{f"{name}_s": times.median(name) for name in cases},
        "ratio": times.ratio("watched", "plain"),
        "ratio_no_lens": times.ratio("no_lens", "plain"),
        "ms_a_token_added": 1e3 * (times.median("watched") - times.median("plain")) / tokens,
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    return answer("generate", parser(__doc__).parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
