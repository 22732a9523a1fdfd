"""Path and activation patching by another tool, a full forward a patch; `benchmarks.circuits` drives it.

    python benchmarks/circuits_worker.py TOOL FOLDER JOB.json

The job has `clean` and `corrupt` tokens, `correct` and `wrong` ids, `senders`, heads whose path to the logits
is patched at the last position with the heads of all layers held and MLPs that follow, and `places`, (layer,
position) where the residual stream is taken from the clean run. It needs torch and the tool, and nothing of
regard but its timing. It answers with one line of JSON: seconds, and seconds of the processor, a patch of
either kind, and the changes of the logit difference.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from benchmarks.machine import settle  # noqa: E402


class NNsight:
    """nnsight: a trace a patch."""

    def __init__(self, folder: str) -> None:
        from nnsight import LanguageModel

        self.model = LanguageModel(folder, dtype=torch.float32, dispatch=True)
        self.layers = len(self.model.model.layers)
        self.width = self.model.config.hidden_size // self.model.config.num_attention_heads

    def kept(self, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return what enters every output projection, [N, T, H * D], and every block, [N, T, D]."""
        with self.model.trace(ids, use_cache=False):
            heads, streams = [], []
            for layer in self.model.model.layers:
                streams.append(layer.input)
                heads.append(layer.self_attn.o_proj.input)
            heads.save()
            streams.save()
        return [x.clone() for x in heads], [x.clone() for x in streams]

    def send(self, ids: Tensor, held: list[Tensor]) -> Tensor:
        """Return the last logits where every output projection is given `held` at the end."""
        with self.model.trace(ids, use_cache=False, logits_to_keep=1):
            for layer, z in zip(self.model.model.layers, held, strict=True):
                layer.self_attn.o_proj.input[:, -1] = z
            found = self.model.output.logits[:, -1].save()
        return found

    def place(self, ids: Tensor, layer: int, position: int, value: Tensor) -> Tensor:
        """Return the last logits where one block is entered by `value` at one position."""
        with self.model.trace(ids, use_cache=False, logits_to_keep=1):
            self.model.model.layers[layer].input[:, position] = value
            found = self.model.output.logits[:, -1].save()
        return found


class TransformerLens:
    """TransformerLens: hooks a patch; all logits are computed."""

    def __init__(self, folder: str) -> None:
        from transformer_lens import TransformerBridge

        self.model = TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32)
        self.layers = self.model.cfg.n_layers
        self.width = self.model.cfg.d_head

    def kept(self, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the heads' outputs, [N, T, H * D], and what enters every block, [N, T, D]."""
        names = {
            f"blocks.{n}.{kind}" for n in range(self.layers) for kind in ("attn.hook_z", "hook_resid_pre")
        }
        _, cache = self.model.run_with_cache(ids, names_filter=lambda name: name in names)
        heads = [cache[f"blocks.{n}.attn.hook_z"].flatten(2) for n in range(self.layers)]
        return heads, [cache[f"blocks.{n}.hook_resid_pre"] for n in range(self.layers)]

    def send(self, ids: Tensor, held: list[Tensor]) -> Tensor:
        """Return the last logits where the heads of every layer give `held` at the end."""

        def put(z: Tensor, hook: Any, given: Tensor) -> Tensor:
            z = z.clone()
            z[:, -1] = given.view_as(z[:, -1])
            return z

        hooks = [(f"blocks.{n}.attn.hook_z", partial(put, given=z)) for n, z in enumerate(held)]
        return self.model.run_with_hooks(ids, fwd_hooks=hooks)[:, -1]  # type: ignore[no-any-return]

    def place(self, ids: Tensor, layer: int, position: int, value: Tensor) -> Tensor:
        """Return the last logits where one block is entered by `value` at one position."""

        def put(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            x[:, position] = value
            return x

        hooks = [(f"blocks.{layer}.hook_resid_pre", put)]
        return self.model.run_with_hooks(ids, fwd_hooks=hooks)[:, -1]  # type: ignore[no-any-return]


TOOLS: dict[str, Callable[[str], Any]] = {"nnsight": NNsight, "transformer-lens": TransformerLens}


def main() -> None:
    """Do the job once, and say what it took."""
    tool, folder, job_path = sys.argv[1:]
    settle()
    job = json.loads(Path(job_path).read_text())
    clean, corrupt = torch.tensor(job["clean"]), torch.tensor(job["corrupt"])
    answers = torch.tensor([job["correct"], job["wrong"]]).T
    peer = TOOLS[tool](folder)

    def metric(logits: Tensor) -> Tensor:
        found = logits.gather(1, answers[: len(logits)])
        return found[:, 0] - found[:, 1]

    heads, streams = peer.kept(clean)
    others, _ = peer.kept(corrupt)
    base = metric(peer.send(clean, [z[:, -1] for z in heads]))
    part = corrupt[: job["few"]]
    broken = metric(peer.place(part, 0, 0, peer.kept(part)[1][0][:, 0]))

    def sender(layer: int, head: int) -> Tensor:
        part = slice(head * peer.width, (head + 1) * peer.width)
        held = [z[:, -1].clone() for z in heads]
        held[layer][:, part] = others[layer][:, -1, part]
        return metric(peer.send(clean, held)) - base

    def place(layer: int, position: int) -> Tensor:
        return metric(peer.place(part, layer, position, streams[layer][: len(part), position])) - broken

    told: dict[str, Any] = {}
    for name, work, members in (("paths", sender, job["senders"]), ("places", place, job["places"])):
        start, processor = time.perf_counter(), time.process_time()
        changes = [work(*each).tolist() for each in members]
        told[name] = {
            "seconds": (time.perf_counter() - start) / len(members),
            "processor": (time.process_time() - processor) / len(members),
            "changes": changes,
        }
    versions = {name: importlib.metadata.version(name) for name in (tool, "transformers", "torch")}
    print(json.dumps({**told, "versions": versions}), flush=True)


if __name__ == "__main__":
    main()
