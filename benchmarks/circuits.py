"""What does it take to find a circuit? Path patching from every head, and activation patching at every place.

    python -m benchmarks.circuits --peers /folder/with/nnsight/and/transformer_lens

The job: prompts of indirect objects, of one length; the path from each of all heads to the logits at the
last position, MLPs following, and to the queries of five heads; and the residual stream at every layer and
position, taken from the clean into the corrupt run. Beside it stands the plain loop, one full forward a patch
(two with receivers), which is timed on a sample of the patches and multiplied, as is each peer, in a process
of its own whose PYTHONPATH begins with `--peers`. All must agree on the sample to 1e-4. Where other work
takes the processor, `processor`, seconds of it, says more than `seconds`. The stream is patched for a quarter
of the prompts, there being more patches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.subject import load
from regard.runtime import activation_patch, path_patch
from regard.tasks.ioi import TEMPLATES, ioi
from regard.tasks.prompts import Prompts
from regard.weights import default_folder

WORKER = Path(__file__).with_name("circuits_worker.py")
TOOLS = ("transformer-lens", "nnsight")
TEMPLATE = 3
RECEIVERS = [(23, head) for head in (0, 1, 2, 3, 7)]
SENDERS = ((2, 4), (20, 0), (23, 3))
PLACES = ((2, 6), (9, 10), (24, -1))
FEW = 8
CLOSE = 1e-4
KINDS = ("seconds", "processor")
Timed = tuple[Any, float, float]


class Loop:
    """One full forward a patch, with hooks on the modules of a Llama."""

    def __init__(self, model: Any, prompts: Prompts) -> None:
        self.model, self.score = model, prompts.score
        self.clean, self.corrupt = prompts.ids(), prompts.ids("corrupt")
        self.blocks = list(model.model.layers)
        self.width = model.config.hidden_size // model.config.num_attention_heads
        self.z, self.streams = self._kept(self.clean)
        self.other_z, _ = self._kept(self.corrupt)
        self.base, self.broken = self.run(self.clean), self.run(self.corrupt)

    def run(self, ids: Tensor) -> Tensor:
        return self.score(self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1])

    def sender(self, layer: int, head: int) -> Tensor:
        """Return the change where one head is the corrupt one, and all others the clean ones."""
        with Hooks() as hooks:
            self._hold(hooks, layer, head)
            return self.run(self.clean) - self.base

    def through(self, layer: int, head: int) -> Tensor:
        """Return the change through the receivers' queries."""
        kept: dict[int, Tensor] = {}
        queries = {number for number, _ in RECEIVERS}
        with Hooks() as hooks:
            self._hold(hooks, layer, head)
            for number in queries:
                hooks.after(self.blocks[number].self_attn.q_proj, lambda x, n=number: kept.setdefault(n, x))
            self.run(self.clean)
        with Hooks() as hooks:
            for number in queries:
                own = [h for n, h in RECEIVERS if n == number]
                hooks.after(self.blocks[number].self_attn.q_proj, self._given(kept[number], own))
            return self.run(self.clean) - self.base

    def place(self, layer: int, position: int) -> Tensor:
        """Return the change where one block of the corrupt run is entered as in the clean one."""

        def put(x: Tensor) -> Tensor:
            x = x.clone()
            x[:, position] = self.streams[layer][:, position]
            return x

        with Hooks() as hooks:
            hooks.before(self.blocks[layer], put)
            return self.run(self.corrupt) - self.broken

    def _given(self, kept: Tensor, heads: Sequence[int]) -> Callable[[Tensor], Tensor]:
        def give(x: Tensor) -> Tensor:
            x = x.clone()
            for head in heads:
                part = slice(head * self.width, (head + 1) * self.width)
                x[:, -1, part] = kept[:, -1, part]
            return x

        return give

    def _hold(self, hooks: Hooks, layer: int, head: int) -> None:
        for number, block in enumerate(self.blocks):

            def put(x: Tensor, number: int = number) -> Tensor:
                x = x.clone()
                x[:, -1] = self.z[number][:, -1]
                if number == layer:
                    part = slice(head * self.width, (head + 1) * self.width)
                    x[:, -1, part] = self.other_z[number][:, -1, part]
                return x

            hooks.before(block.self_attn.o_proj, put)

    def _kept(self, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        heads: list[Tensor] = []
        streams: list[Tensor] = []
        with Hooks() as hooks:
            for block in self.blocks:
                hooks.before(block, lambda x: streams.append(x.clone()))
                hooks.before(block.self_attn.o_proj, lambda x: heads.append(x.clone()))
            self.run(ids)
        return heads, streams


class Hooks:
    """Forward hooks that are gone at the end of the block; a function returns the new tensor or None."""

    def __enter__(self) -> Hooks:
        self.handles: list[Any] = []
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def before(self, module: Any, change: Callable[[Tensor], Any]) -> None:
        def hook(_: Any, args: tuple[Any, ...]) -> Any:
            new = change(args[0])
            return None if new is None else (new, *args[1:])

        self.handles.append(module.register_forward_pre_hook(hook))

    def after(self, module: Any, change: Callable[[Tensor], Any]) -> None:
        self.handles.append(module.register_forward_hook(lambda _, args, out: change(out)))


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return a row for each way to do each job."""
    model, tokenizer = load()
    made = ioi(tokenizer, options.prompts, templates=TEMPLATES[TEMPLATE : TEMPLATE + 1], order="ABBA")
    prompts = made.by_length()[0]
    loop = Loop(model, prompts)
    heads = model.config.num_hidden_layers * model.config.num_attention_heads
    sides = {"input_ids": loop.clean}, {"input_ids": loop.corrupt}
    few = SENDERS[:2] if options.quick else SENDERS
    length = loop.clean.shape[1]
    spots = [(layer, place % length) for layer, place in (PLACES[:2] if options.quick else PLACES)]
    sending = few if options.quick else None
    asked = sorted({place for _, place in spots}) if options.quick else None
    count = len(few) if options.quick else heads
    peers = _peers(options, prompts, few, spots) if options.peers else {}
    rows: list[dict[str, Any]] = []

    def table(job: str, patches: int, mine: Timed, loops: Any, samples: Any, part: str) -> None:
        found, seconds, processor = mine
        ways = {"plain loop": loops, **{tool: told[part] for tool, told in peers.items() if part}}
        rows.append(_row(f"{job}: regard", len(loop.clean), length, patches, seconds, processor))
        for name, told in ways.items():
            for changes, each in zip(told["changes"], samples, strict=True):
                _agree(torch.tensor(changes), found(*each), f"{job}, {each}: {name}")
            row = _row(
                f"{job}: {name}", len(loop.clean), length, patches, *(patches * told[x] for x in KINDS)
            )
            row |= {
                "times": row["seconds"] / seconds, "times_processor": row["processor"] / processor,
                "timed": len(samples), "versions": _versions(peers, name),
            }  # fmt: skip
            rows.append(row)

    def paths(**more: Any) -> Timed:
        result, seconds, processor = _timed(
            lambda: path_patch(model, *sides, prompts.score, senders=sending, progress=False, **more)
        )
        index = {name: row for row, name in enumerate(result.heads.names)}
        return (lambda layer, head: result.each[index[f"text.{layer}", head]]), seconds, processor

    table("paths to the logits", count, paths(), _sample(loop.sender, few), few, "paths")
    below = [each for each in few if each[0] < RECEIVERS[0][0]]
    through = paths(receivers=RECEIVERS)
    table("paths to the queries of 5 heads", count, through, _sample(loop.through, below), below, "")
    _, *took = paths(exact=False, tokens=prompts.answers())
    rows.append(_row("direct effects on the logits: regard", len(prompts), length, count, *took))
    part = replace(prompts, pairs=prompts.pairs[:FEW])
    loop = Loop(model, part)
    sides = {"input_ids": loop.clean}, {"input_ids": loop.corrupt}
    effects, seconds, processor = _timed(
        lambda: activation_patch(
            model, *sides, part.score, kinds=["residual"], positions=asked, progress=False
        )
    )
    gap = float((loop.base - loop.broken).mean())

    def spot(layer: int, place: int) -> Tensor:
        return torch.tensor(gap * effects.layers["residual"][layer, effects.positions.index(place)])

    places = "residual stream, every layer and position"
    patches = effects.layers["residual"].size
    table(places, patches, (spot, seconds, processor), _sample(loop.place, spots), spots, "places")
    return rows


def _row(
    case: str, prompts: int, length: int, patches: int, seconds: float, processor: float
) -> dict[str, Any]:
    return {
        "case": f"{case}, {prompts} prompts of {length} tokens", "patches": patches,
        "seconds": round(seconds, 2), "processor": round(processor, 2),
    }  # fmt: skip


def _timed(work: Callable[[], Any]) -> Timed:
    start, processor = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - start, time.process_time() - processor


def _sample(work: Callable[..., Tensor], members: Sequence[tuple[int, int]]) -> dict[str, Any]:
    found, seconds, processor = _timed(lambda: [work(*each) for each in members])
    return {
        "changes": [x.tolist() for x in found], "seconds": seconds / len(members),
        "processor": processor / len(members),
    }  # fmt: skip


def _agree(found: Tensor, mine: Tensor, what: str) -> None:
    """Compare changes of every prompt, or their mean where that is what there is."""
    found = found.mean() if mine.ndim == 0 else found
    off = float((found.double() - mine.double()).abs().max())
    if not off <= CLOSE * max(1.0, float(found.abs().max())):
        raise WrongResult(f"{what} is off by {off:.1e}, where {CLOSE:.0e} is allowed.")


def _peers(
    options: argparse.Namespace, prompts: Prompts, senders: Sequence[Any], places: Sequence[Any]
) -> dict[str, Any]:
    job = {
        "clean": prompts.ids().tolist(), "corrupt": prompts.ids("corrupt").tolist(),
        "correct": [pair.correct[0] for pair in prompts.pairs],
        "wrong": [pair.wrong[0] for pair in prompts.pairs], "senders": senders, "places": places, "few": FEW,
    }  # fmt: skip
    found = {}
    path = os.pathsep.join(filter(None, [str(options.peers), os.environ.get("PYTHONPATH", "")]))
    with tempfile.TemporaryDirectory() as folder:
        job_path = Path(folder) / "job.json"
        job_path.write_text(json.dumps(job))
        for tool in TOOLS:
            told = subprocess.run(
                [sys.executable, str(WORKER), tool, str(default_folder()), str(job_path)],
                capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False,
            )  # fmt: skip
            lines = [line for line in told.stdout.splitlines() if line.startswith("{")]
            if not lines:
                complaint = told.stderr.strip().splitlines()[-1:]
                print(f"{tool} does not do it here: {' '.join(complaint)}", file=sys.stderr)
                continue
            found[tool] = json.loads(lines[-1])
    return found


def _versions(peers: dict[str, Any], name: str) -> str | None:
    if name not in peers:
        return None
    return ", ".join(f"{package} {version}" for package, version in sorted(peers[name]["versions"].items()))


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--prompts", type=int, default=32, help="how many (default: 32)")
    options.add_argument(
        "--peers", type=Path, metavar="FOLDER", help="where nnsight and transformer_lens are"
    )
    return answer("circuits", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
