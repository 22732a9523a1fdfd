"""What do other tools take for the same job? Statistics of every head of every layer, beside `regard.watch`.

The job is that of `benchmarks.dense`: entropy, mass by key, previous token and mean distance. regard does it
with the four lenses of these; each tool runs in a process of its own, which may be another environment:

    python -m benchmarks.peers --python nnsight=/path/to/python transformer-lens=/path/to/python
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.checks import compare, eager_statistics, seen_statistics
from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.subject import forward, load, text_ids, watched
from benchmarks.timing import interleaved
from regard.lens import ColumnMass, Entropy, MeanDistance, PreviousToken
from regard.weights import default_folder

WORKER = Path(__file__).with_name("peer_worker.py")
TOOLS = ("eager", "nnsight", "transformer-lens")


class Peer:
    """Another tool, loaded and waiting in its own process."""

    def __init__(self, tool: str, python: str, ids: Tensor, folder: Path) -> None:
        self.tool = tool
        ids_path, self.statistics = folder / "ids.json", folder / f"{tool}.pt"
        ids_path.write_text(json.dumps(ids.tolist()))
        self.process = subprocess.Popen(
            [python, str(WORKER), tool, str(default_folder()), str(ids_path), str(self.statistics)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.added = 0
        self.versions = self._line()["versions"]

    def run(self) -> float:
        """Run the job once, and return its seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        told = self._line()
        self.added = told["added"]
        return float(told["seconds"])

    def found(self) -> dict[str, Tensor]:
        """Return the statistics of the last run."""
        return torch.load(self.statistics)  # type: ignore[no-any-return]

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None and self.process.stderr is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)  # type: ignore[no-any-return]
        complaint = self.process.stderr.read().strip().splitlines()
        raise WrongResult(f"{self.tool} cannot do it: {complaint[-1] if complaint else 'it ended'}")

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return a row for plain attention, regard, and every tool that has a Python to run in."""
    model, tokenizer = load()
    length = options.length or (48 if options.quick else 2048)
    ids = text_ids(tokenizer, length)
    lenses = (Entropy(), ColumnMass(bins=length), PreviousToken(), MeanDistance())
    few = ids[:, :512]
    compare(seen_statistics(watched(model, few, lenses)[0]), eager_statistics(model, few), "regard")
    pythons = {"eager": sys.executable, **dict(pair.split("=", 1) for pair in options.python)}
    rounds = options.rounds or (1 if options.quick else 5)
    peers: list[Peer] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for tool in (t for t in TOOLS if t in pythons):
                peers.append(Peer(tool, pythons[tool], ids, Path(folder)))
            return _rows(model, ids, lenses, peers, rounds)
        finally:
            for peer in peers:
                peer.stop()


def _rows(model: Any, ids: Tensor, lenses: Any, peers: list[Peer], rounds: int) -> Rows:
    mine = seen_statistics(watched(model, ids, lenses)[0])
    for peer in peers:
        peer.run()
        compare(mine, peer.found(), f"regard against {peer.tool}")
    cases: dict[str, Any] = {
        "plain SDPA, no statistics": lambda: forward(model, ids),
        "regard": lambda: seen_statistics(watched(model, ids, lenses)[0]),
        **{peer.tool: peer.run for peer in peers},
    }
    times = interleaved(cases, rounds, warm=0)
    about = {peer.tool: peer for peer in peers}
    rows = []
    for name in cases:
        peer = about.get(name)
        rows.append(
            {
                "case": f"{name}, {ids.shape[1]} tokens",
                "seconds": times.median(name),
                "times_plain": times.ratio(name, "plain SDPA, no statistics"),
                "added_mb": round(peer.added / 2**20) if peer else None,
                "versions": _said(peer.versions) if peer else None,
                "rounds": rounds,
                "dropped": times.dropped,
            }
        )
    rows[0]["times"] = times.as_json()
    return rows


def _said(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--length", type=int, help="tokens (default: 2048)")
    options.add_argument("--python", nargs="*", default=[], metavar="TOOL=PYTHON", help="where a tool is")
    return answer("peers", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
