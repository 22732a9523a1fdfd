"""Another tool at the same job, in a process and an environment of its own; `benchmarks.peers` drives it.

    python benchmarks/peer_worker.py TOOL FOLDER IDS.json STATISTICS.pt

The job: one forward, and `dense.statistics` of every head of every layer. It needs torch and the tool, and
nothing of regard. On each line of its input it runs once and answers with one line of JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from benchmarks import dense  # noqa: E402
from benchmarks.machine import settle  # noqa: E402

FORWARD = {"use_cache": False, "logits_to_keep": 1}
Job = Callable[[torch.Tensor], list[dict[str, torch.Tensor]]]


def eager(folder: str) -> Job:
    """transformers alone: `output_attentions=True`, which keeps all matrices until the forward has ended."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    def job(ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        attentions = model.eval()(input_ids=ids, output_attentions=True, **FORWARD).attentions
        return [dense.statistics(weights) for weights in attentions]

    return job


def nnsight(folder: str) -> Job:
    """nnsight: a trace that reads what each attention module returns, one layer after the other."""
    from nnsight import LanguageModel

    model = LanguageModel(folder, attn_implementation="eager", dtype=torch.float32, dispatch=True)

    def job(ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        with model.trace(ids, **FORWARD):
            found = []
            for layer in model.model.layers:
                found.append(dense.statistics(layer.self_attn.output[1]))
            found.save()
        return found

    return job


def transformer_lens(folder: str) -> Job:
    """TransformerLens: hooks on every `hook_pattern`; all logits are computed."""
    from transformer_lens import TransformerBridge

    model = TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32)

    def job(ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        found: list[dict[str, torch.Tensor]] = []

        def read(pattern: torch.Tensor, hook: Any) -> None:
            found.append(dense.statistics(pattern))

        model.run_with_hooks(ids, fwd_hooks=[(lambda name: name.endswith("hook_pattern"), read)])
        return found

    return job


TOOLS = {"eager": eager, "nnsight": nnsight, "transformer-lens": transformer_lens}


def main() -> None:
    """Load, say so, then run once a line."""
    tool, folder, ids_path, statistics_path = sys.argv[1:]
    settle()
    ids = torch.tensor(json.loads(Path(ids_path).read_text()))
    job = TOOLS[tool](folder)
    job(ids[:, :8])
    before = _resident()
    package = "transformers" if tool == "eager" else tool
    versions = {name: importlib.metadata.version(name) for name in {package, "transformers", "torch"}}
    print(json.dumps({"versions": versions}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        found = job(ids)
        seconds = time.perf_counter() - start
        torch.save(dense.stacked(found), statistics_path)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "added": peak - before}), flush=True)


def _resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
