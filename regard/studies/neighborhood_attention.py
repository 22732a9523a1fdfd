"""Faster Neighborhood Attention: Reducing the O(n^2) Cost ... at the Threadblock Level (arXiv 2403.04690).

Five parts. Random grids of one to three axes, outputs and gradients, are held to the rule written key by key,
beside four planted faults. A shift of the plane must shift the interior, and does not with blocks. Cost: time
and memory of planes of 32 x 32 to 96 x 96, window 7 x 7, beside SDPA under the same mask. Tiles, which is the
paper's idea of products of matrices, beside gathering the keys of each query, which is what its naive kernels
do. And training: every pixel of 12 x 12 random colours is labelled with the colour of one above it, the next
or the fifth; two layers of width 32 with position biases, that differ in the attention alone.
Status: the rules and sizes are our choice; the paper's own figures are of its kernels on a GPU.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from regard.studies.base import Results, Step, Study
from regard.studies.claims import Claim, Quantity, Rule
from regard.studies.registry import study
from regard.studies.threads import one_thread

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from regard.studies.outcome import Outcome

DIM, HEADS, BATCH, SIDE, RATE, GUESS = 32, 4, 16, 12, 3e-3, 1 / 8
NEXT, FIFTH = ("window", "blocks", "unplaced", "whole"), ("plain", "dilated")
MIXERS: dict[str, list[dict[str, Any]]] = {
    "window": [{"kernel_size": 3}] * 2,
    "blocks": [{"kernel_size": 4, "stride": 4}] * 2,
    "unplaced": [{"kernel_size": 3, "position_bias": False}] * 2,
    "whole": [{"kernel_size": SIDE}] * 2,
    "plain": [{"kernel_size": 3}] * 2,
    "dilated": [{"kernel_size": 3}, {"kernel_size": 3, "dilation": 4}],
}
LINES = ((1024, 15), (2048, 31), (4096, 31), (4096, 127))
PLANES = ((28, 5), (28, 7), (40, 9), (56, 7))


@dataclass(frozen=True)
class Size:
    """How many draws, grids a draw, rounds, seeds, steps and shapes; which sides of planes."""

    draws: int = 5
    grids: int = 4
    rounds: int = 7
    sides: tuple[int, ...] = (32, 48, 64, 96)
    shapes: int = 4
    seeds: int = 3
    steps: int = 300


def difference(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=about, over="draws", low=0)


def accuracy(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=f"pixels labelled rightly, {about}", low=0, high=1, unit="%")


def above(measure: str, control: str, threshold: float = 0.0, **options: Any) -> Rule:
    options = {"paired": True, **options}
    return Rule(measure=measure, comparison="above", threshold=threshold, control=control, **options)


@study("neighborhood-attention")
class NeighborhoodAttentionStudy(Study):
    """Are borders exact, does the interior move with the plane, what does it cost, and what does it learn?"""

    title = (
        "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level"
    )
    paper = "Hassani et al. 2024, arXiv 2403.04690"
    quantities = (
        difference("error", "largest error of outputs and gradients against the rule, float64"),
        difference("fault", "the same against the rule with a planted fault, the smallest of four"),
        difference("moved", "interior after a shift by one pixel, float32"),
        difference("moved_blocks", "the same in blocks, stride = kernel"),
        Quantity(name="growth", about="exponent of time in tokens, window 7 x 7", over="rounds"),
        Quantity(name="growth_dense", about="the same, SDPA under the mask", over="rounds"),
        Quantity(name="memory", about="bytes a token at the largest side over those at the least",
                 over="measurements", low=0),
        Quantity(name="memory_dense", about="the same, SDPA under the mask", over="measurements", low=0),
        Quantity(name="gain_1d", about="time of gathered keys over that of tiles, lines",
                 over="shapes", low=0),
        Quantity(name="gain_2d", about="the same, planes", over="shapes", low=0),
        *(accuracy(f"next_{name}", f"the next above, {name}") for name in NEXT),
        *(accuracy(f"fifth_{name}", f"the fifth above, {name}") for name in FIFTH),
    )  # fmt: skip
    claims = (
        Claim(
            name="borders",
            text="Every query sees the keys that the rule says, at borders too, and a planted fault is seen.",
            rules=(
                Rule(measure="error", comparison="below", threshold=1e-11),
                above("fault", "error", 1e-3),
            ),
            main=True,
            paper="section 2",
        ),
        Claim(
            name="shifts",
            text="A shift of the plane shifts the interior of windows, and not that of blocks.",
            rules=(
                Rule(measure="moved", comparison="below", threshold=1e-6),
                above("moved_blocks", "moved", 0.1),
            ),
            main=True,
        ),
        Claim(
            name="linear cost",
            text="Time grows with the tokens to a power below 1.2, and that of dense attention far faster.",
            rules=(
                Rule(measure="growth", comparison="below", threshold=1.2),
                above("growth_dense", "growth", 0.5),
            ),
            main=True,
            paper="linear in tokens",
        ),
        Claim(
            name="linear memory",
            text="Memory a token grows by less than a tenth, and that of dense attention with the tokens.",
            rules=(
                Rule(measure="memory", comparison="below", threshold=1.1, least=1),
                above("memory_dense", "memory", 2.0, least=1),
            ),
            main=True,
        ),
        Claim(
            name="tiles",
            text="Tiles are more than twice as fast as gathered keys, and gain more on lines than on planes.",
            rules=(
                Rule(measure="gain_1d", comparison="above", threshold=2.0),
                Rule(measure="gain_2d", comparison="above", threshold=2.0),
                above("gain_1d", "gain_2d", paired=False),
            ),
            paper="+895 % on lines, +272 % on planes, float32, on a GPU, over naive kernels",
        ),
        Claim(
            name="across blocks",
            text="Windows label by what is across the borders of blocks; blocks do not.",
            rules=(above("next_window", "next_blocks", 0.05),),
            needs=(above("next_window", "next_unplaced", 0.3),),
        ),
        Claim(
            name="few keys",
            text="In as many steps, windows of 9 keys learn it better than attention to all 144.",
            rules=(above("next_window", "next_whole", 0.05),),
            needs=(above("next_window", "next_unplaced", 0.3),),
        ),
        Claim(
            name="dilation",
            text="With dilation, as many keys reach what is farther away.",
            rules=(above("fifth_dilated", "fifth_plain", 0.3),),
            paper="arXiv 2209.15001: dilation widens what layers see at no further cost",
        ),
    )  # fmt: skip
    full, quick = (
        Size(),
        Size(draws=3, grids=1, rounds=1, sides=(8, 12, 16), shapes=1, seeds=1, steps=3),
    )

    def steps(self) -> Iterable[Step]:
        for draw in range(self.size.draws):
            yield Step(f"rule, draw {draw}", partial(self.rule, draw), cost=0.3)
        yield Step("memory", self.memory, cost=0.3)
        yield Step("growth", self.growth)
        yield Step("tiles", self.tiles)
        for seed in range(self.size.seeds):
            for name in NEXT:
                yield Step(f"next, {name}, seed {seed}", partial(self.train, name, 1, seed))
            for name in FIFTH:
                yield Step(f"fifth, {name}, seed {seed}", partial(self.train, name, 5, seed))

    def rule(self, draw: int) -> dict[str, float]:
        """Measure errors on random grids, those of the faults, and shifts."""
        from regard.studies.neighborhood_attention_rule import FAULTS, drawn, error_of

        chance = random.Random(f"{self.seed}/{draw}")
        grids = [drawn(chance, axes) for axes in (1, 2, 3) for _ in range(self.size.grids)]
        errors = [error_of(grid) for grid in (*grids, *FAULTS.values())]
        faults = {f"fault {name}": error_of(grid, name) for name, grid in FAULTS.items()}
        return {"error": max(errors), **faults, "moved": moved(1), "moved_blocks": moved(4)}

    def memory(self) -> dict[str, list[float]]:
        """Measure the most memory a token at each side, beyond what is kept from call to call."""
        from regard.studies.rounds import peak_bytes

        found: dict[str, list[float]] = {"near": [], "dense": []}
        for side in self.size.sides:
            for name, work in ways(side).items():
                work()
                found[name].append(peak_bytes(work) / side**2)
        return found

    def growth(self) -> dict[str, list[float]]:
        """Time windows of 7 x 7 and SDPA under their mask on planes of all sides, one thread."""
        from regard.studies.rounds import in_rounds

        cases = {f"{name} {side}": work for side in self.size.sides for name, work in ways(side).items()}
        with one_thread():
            return in_rounds(cases, self.size.rounds)

    def tiles(self) -> dict[str, dict[str, list[float]]]:
        """Time tiles and gathered keys on lines and planes, one thread."""
        import torch

        from regard.attention.neighborhood import na1d, na2d, neighborhood_index
        from regard.studies.rounds import in_rounds

        shapes: list[tuple[tuple[int, ...], int, Any]] = [
            *(((length,), kernel, na1d) for length, kernel in LINES[: self.size.shapes]),
            *(((side, side), kernel, na2d) for side, kernel in PLANES[: self.size.shapes]),
        ]
        cases: dict[str, Callable[[], Any]] = {}
        for grid, kernel, attend in shapes:
            q, k, v = torch.randn(3, 1, *grid, HEADS, 32)
            name, index = f"{len(grid)}d {grid[0]} {kernel}", neighborhood_index(grid, kernel)
            cases[f"{name} tiles"] = partial(attend, q, k, v, kernel)
            flat_q, flat_k, flat_v = (x[0].flatten(0, -3) for x in (q, k, v))
            cases[f"{name} gathered"] = partial(gathered, flat_q, flat_k, flat_v, index)
        with one_thread(), torch.no_grad():
            return {"times": in_rounds(cases, self.size.rounds)}

    def train(self, name: str, distance: int, seed: int) -> float:
        """Train on the colour `distance` rows above; return the accuracy on other images."""
        import torch
        from torch.nn.functional import cross_entropy

        from regard.models.pixels import PixelModel
        from regard.tasks.pixels import Pixels

        task = Pixels(kind="above", height=SIDE, width=SIDE, distance=distance)
        torch.manual_seed(1000 * self.seed + seed)
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        model = PixelModel(task.symbols, task.colours, DIM, mixers(name))
        optimizer = torch.optim.AdamW(model.parameters(), RATE)
        plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, self.size.steps, pct_start=0.1)
        with one_thread():
            for step in range(self.size.steps):
                images, labels, _ = task.batch(BATCH, generator)
                loss = cross_entropy(model(images).flatten(0, 2), labels.flatten())
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                plan.step()
                self.tick((step + 1) / self.size.steps)
            with torch.no_grad():
                images, labels, _ = task.batch(128, generator)
                right = (model(images).argmax(-1) == labels).double()
        return float(right[labels >= 0].mean())

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        rules, growth = named(results, "rule"), results["growth"]
        memory = {name: [found[-1] / found[0]] for name, found in results["memory"].items()}
        gains = gained(results["tiles"]["times"])
        return {
            **{name: [told[name] for told in rules] for name in ("error", "moved", "moved_blocks")},
            "fault": [min(x for name, x in told.items() if name.startswith("fault ")) for told in rules],
            "growth": exponents(growth, "near"),
            "growth_dense": exponents(growth, "dense"),
            "memory": memory["near"],
            "memory_dense": memory["dense"],
            "gain_1d": [gain for name, gain in gains.items() if name.startswith("1d")],
            "gain_2d": [gain for name, gain in gains.items() if name.startswith("2d")],
            **{f"next_{name}": named(results, f"next, {name},") for name in NEXT},
            **{f"fifth_{name}": named(results, f"fifth, {name},") for name in FIFTH},
        }

    def details(self, results: Results) -> dict[str, Any]:
        faults = {
            name.removeprefix("fault "): min(told[name] for told in named(results, "rule"))
            for name in results["rule, draw 0"]
            if name.startswith("fault ")
        }
        return {
            "faults": faults, "gains": gained(results["tiles"]["times"]), "guess": GUESS,
            "milliseconds": {name: 1e3 * middle(took) for name, took in results["growth"].items()},
            "kilobytes": {name: [b / 1e3 for b in told] for name, told in results["memory"].items()},
            "remarks": [f"A guess is right in {GUESS:.1%}."],
        }  # fmt: skip

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.neighborhood_attention_picture import draw

        draw(outcome, figure)


def moved(stride: int) -> float:
    """Return how far the interior is from moving with the plane, windows of 4 x 4."""
    import torch

    from regard.attention.neighborhood import na2d

    q, k, v = given = torch.randn(3, 1, 20, 20, 2, 8)
    with torch.no_grad():
        out = na2d(q, k, v, 4, stride)
        q, k, v = given.roll((1, 1), (2, 3))
        back = na2d(q, k, v, 4, stride).roll((-1, -1), (1, 2))
    return float((back - out)[:, 5:15, 5:15].abs().max())


def ways(side: int) -> dict[str, Callable[[], Any]]:
    """Return attention of a plane, four heads of 32, in windows of 7 x 7 and as SDPA under their mask."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from regard.attention.neighborhood import na2d, neighborhood_mask

    q, k, v = torch.randn(3, 1, side, side, HEADS, 32)
    flat_q, flat_k, flat_v = (x.flatten(1, 2).transpose(1, 2).contiguous() for x in (q, k, v))
    mask = neighborhood_mask((side, side), 7)
    return {
        "near": partial(na2d, q, k, v, 7),
        "dense": partial(scaled_dot_product_attention, flat_q, flat_k, flat_v, attn_mask=mask),
    }


def gathered(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
    """Return attention [N, H, D] of queries to listed keys [N, n], those of each query copied together."""
    import torch

    q, k, v = (x.transpose(0, 1).contiguous() for x in (q, k, v))
    parts = []
    rows = max(1, 2**20 // (index.shape[1] * q.shape[2]))
    for start in range(0, len(index), rows):
        near = index[start : start + rows]
        scores = k[:, near] @ q[:, start : start + rows, :, None] * q.shape[2] ** -0.5  # [H, rows, n, 1]
        parts.append((scores.softmax(2).mT @ v[:, near])[:, :, 0])
    return torch.cat(parts, 1).transpose(0, 1)


def mixers(name: str) -> list[nn.Module]:
    """Return the attention of both layers, with fresh weights."""
    from regard.attention.neighborhood import NeighborhoodAttention

    return [
        NeighborhoodAttention(DIM, HEADS, **{"position_bias": True, **options}) for options in MIXERS[name]
    ]


def named(results: Results, start: str) -> list[Any]:
    """Return the results of the steps whose name begins so."""
    return [told for name, told in results.items() if name.startswith(start)]


def middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def exponents(times: Mapping[str, Sequence[float]], way: str) -> list[float]:
    """Return the slope of log time over log tokens, by least squares, of every round."""
    import math

    took = {int(name.split()[1]): seconds for name, seconds in times.items() if name.startswith(f"{way} ")}
    x = [2 * math.log(side) for side in took]
    mean = sum(x) / len(x)
    rounds = zip(*took.values(), strict=True)
    return [
        sum((a - mean) * math.log(seconds) for a, seconds in zip(x, one, strict=True))
        / sum((a - mean) ** 2 for a in x)
        for one in rounds
    ]


def gained(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the time with gathered keys over that of tiles, by shape: the median over rounds."""
    shapes = [name.removesuffix(" tiles") for name in times if name.endswith(" tiles")]
    pairs = {shape: zip(times[f"{shape} gathered"], times[f"{shape} tiles"], strict=True) for shape in shapes}
    return {shape: middle([slow / fast for slow, fast in both]) for shape, both in pairs.items()}
