"""The parts of the study of circuit reuse: its tasks, its circuits, and heads made to look elsewhere."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from regard.lens.circuits import Circuit, Stage, discover_circuit, label_heads, roles_of
from regard.lens.circuits.discover import patch_stage
from regard.runtime.edits.forced import Forced, force_attention
from regard.runtime.edits.targets import HeadName
from regard.runtime.head_table import Head, HeadTable
from regard.runtime.prefix import prefix_cache
from regard.tasks.colored_objects import colored_objects
from regard.tasks.ioi import TEMPLATES, ioi
from regard.tasks.prompts import Prompts, Written, gather_prompts, single_tokens

if TYPE_CHECKING:
    from regard.studies.circuit_reuse import Size

FEEDERS = Stage("feeders", of="writers")
STAGES = (Stage("writers"), FEEDERS)
SHARES = (0.01, 0.02, 0.05, 0.1)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SAYINGS = ("Today is {day}. Tomorrow is", "If it is {day} now, the next day is", "The day after {day} is")
RANDOM_SETS = 200
Patterns = Mapping[Head, tuple[Tensor, Tensor]]


def weekday(tokenizer: Any, count: int, seed: int) -> Prompts:
    """Return prompts that go on with the next day of the week; the corrupt side names another day."""
    ids, left_out = single_tokens(tokenizer, DAYS, "days", len(DAYS))
    generator = random.Random(seed)
    written = []
    for number in range(count):
        day, other = generator.sample(range(len(DAYS)), 2)
        saying = SAYINGS[number % len(SAYINGS)]
        clean, corrupt = (saying.format(day=DAYS[each]) for each in (day, other))
        right, wrong = (ids[DAYS[(each + 1) % len(DAYS)]] for each in (day, other))
        written.append(Written(clean, corrupt, (right,), (wrong,), {"END": len(clean)}))
    return gather_prompts("weekday", tokenizer, written, "logit", left_out)


def one_seed(
    model: Any, tokenizer: Any, seed: int, size: Size, tick: Callable[[float], None]
) -> dict[str, Any]:
    """Find the circuits of two sets of templates and of weekdays, and force the heads of the first."""
    half = len(TEMPLATES) // 2
    tasks = {
        "first": ioi(tokenizer, size.prompts, seed=2 * seed, templates=TEMPLATES[:half]),
        "second": ioi(tokenizer, size.prompts, seed=2 * seed + 1, templates=TEMPLATES[half:]),
        "weekday": weekday(tokenizer, size.prompts, seed),
    }
    found: dict[str, Circuit] = {}
    for name, prompts in tasks.items():
        found[name] = discover_circuit(model, prompts, STAGES, exact=False)
        tick(0.25 * len(found))
    roles = label_heads(model, tasks["first"])
    feeders = acting_on_movers(model, tasks["first"], roles)
    heads = chosen(feeders, roles)
    generator = random.Random(seed)
    measures = {
        **leading(feeders, roles, heads["leaders"]),
        **forced(model, tasks["first"], feeders, heads["leaders"], seed),
        **reused(found, generator),
        **colours(model, colored_objects(tokenizer, size.questions, seed=seed), roles, heads, generator),
    }
    return {
        "measures": measures,
        "heads": {name: [list(head) for head in members] for name, members in heads.items()},
        "effects": np.sort(np.abs(np.nan_to_num(feeders["normalised"])))[::-1][:12].tolist(),
        "overlaps": {
            name: found["first"].overlaps(found[name], SHARES)["jaccard"] for name in ("second", "weekday")
        },
        "chance": found["first"].overlaps(found["second"], SHARES)["chance"],
        "stability": {name: dict(circuit.stability) for name, circuit in found.items()},
    }


def acting_on_movers(model: Any, prompts: Prompts, roles: HeadTable) -> HeadTable:
    """Return what each head does to the queries of the heads that write and look at either name."""
    named = roles_of(roles)
    receivers = list(dict.fromkeys([*named["mover"], *named["suppressor"]]))
    return patch_stage(model, prompts, FEEDERS, receivers, True, 512, False, exact=False)


def chosen(feeders: HeadTable, roles: HeadTable) -> dict[str, list[Head]]:
    """Return the two leading feeders, the strongest suppressor and the strongest mover.

    The suppressor has the largest direct effect of the heads that look from the end at the subject more than
    at the indirect object, the mover that of the others that look there.
    """
    subject, io = roles["END>S1"] + roles["END>S2"], roles["END>IO"]
    direct = roles["direct"]
    suppressor = int(np.argmax(np.where(subject > io, direct, -np.inf)))
    mover = int(np.argmax(np.where(subject < io, direct, -np.inf)))
    return {
        "leaders": _largest(feeders, 2),
        "suppressor": [roles.names[suppressor]],
        "mover": [roles.names[mover]],
    }


def _largest(feeders: HeadTable, count: int) -> list[Head]:
    order = np.argsort(-np.abs(np.nan_to_num(feeders["normalised"])), kind="stable")
    return [feeders.names[i] for i in order[:count]]


def leading(feeders: HeadTable, roles: HeadTable, leaders: list[Head]) -> dict[str, float]:
    """Return how far the leaders lead, and where they look."""
    sizes = np.sort(np.abs(np.nan_to_num(feeders["normalised"])))[::-1]
    layers = {site for site, _ in leaders}
    others = [roles.at(*h)["END>S2"] for h in roles.names if h[0] in layers and h not in leaders]
    return {
        "second": float(sizes[1]),
        "third": float(sizes[2]),
        "leaders_s2": min(roles.at(*head)["END>S2"] for head in leaders),
        "others_s2": float(np.mean(others)),
    }


def forced(
    model: Any, prompts: Prompts, feeders: HeadTable, leaders: list[Head], seed: int
) -> dict[str, float]:
    """Return the logit difference with heads made to look at the indirect object or the second subject."""
    draws = feeders.matched_random(leaders, 3, seed)
    totals: dict[str, list[float]] = {"ld": [], "ld_io": [], "ld_s2": [], "ld_random": []}
    for part in prompts.by_length():
        end = End(model, part)
        io, s2 = part.places("IO"), part.places("S2")
        totals["ld"] += part.score(end.logits([], io)).tolist()
        totals["ld_io"] += part.score(end.logits(leaders, io)).tolist()
        totals["ld_s2"] += part.score(end.logits(leaders, s2)).tolist()
        for heads in draws:
            totals["ld_random"] += part.score(end.logits(heads, io)).tolist()
    return {name: float(np.mean(values)) for name, values in totals.items()}


class End:
    """The last token of prompts of one length, after a cached prefix, with heads made to look elsewhere."""

    def __init__(self, model: Any, prompts: Prompts) -> None:
        self.model, self.ids = model, prompts.ids()
        self.last = prompts.places("END")[:, None]
        with torch.no_grad():
            output = model(input_ids=self.ids, use_cache=True, logits_to_keep=1)
        self.prefix = prefix_cache(model, output, self.ids.shape[1] - 1)

    def logits(self, heads: Sequence[Head], to: Tensor) -> Tensor:
        """Return the logits [N, V], the last row of the heads shared evenly among positions [N] or [N, n]."""
        rows = self.last, to.reshape(len(self.ids), -1)
        patterns: dict[HeadName, Forced] = {head: rows for head in heads}
        with torch.no_grad():
            if not patterns:
                return self._run()
            with force_attention(self.model, patterns):
                return self._run()

    def _run(self) -> Tensor:
        ids = self.ids[:, -1:]
        found: Tensor = self.model(input_ids=ids, past_key_values=self.prefix.repeated(1)).logits[:, -1]
        return found


def reused(found: Mapping[str, Circuit], generator: random.Random) -> dict[str, float]:
    """Return the overlaps of the circuits, and of random sets of their sizes."""
    names = found["first"].effects.names
    sizes = len(found["first"].heads()), len(found["second"].heads())
    drawn = [
        _jaccard(generator.sample(names, sizes[0]), generator.sample(names, sizes[1]))
        for _ in range(RANDOM_SETS)
    ]
    return {
        "templates": found["first"].overlap(found["second"]).jaccard,
        "weekday": found["first"].overlap(found["weekday"]).jaccard,
        "random": float(np.mean(drawn)),
    }


def _jaccard(first: Sequence[Head], second: Sequence[Head]) -> float:
    return len(set(first) & set(second)) / len(set(first) | set(second))


def colours(
    model: Any, prompts: Prompts, roles: HeadTable, heads: Mapping[str, list[Head]], generator: random.Random
) -> dict[str, float]:
    """Return how often the right colour is above both others, with heads made to look elsewhere."""
    used = [head for members in heads.values() for head in members]
    layers = {site for site, _ in used}
    others = generator.sample([h for h in roles.names if h[0] in layers and h not in used], 4)
    hits: dict[str, list[bool]] = {}
    for part in prompts.by_length():
        end = End(model, part)
        wrong = torch.stack([part.places("wrong 1"), part.places("wrong 2")], 1)
        length = part.ids().shape[1]
        anywhere = torch.tensor([generator.sample(range(length), 2) for _ in part.pairs])
        ways: dict[str, tuple[Sequence[Head], Tensor]] = {
            "co": ([], wrong),
            "co_wrong": (heads["suppressor"], wrong),
            "co_right": (heads["suppressor"], part.places("colour")),
            "co_positions": (heads["suppressor"], anywhere),
            "co_others": (others, wrong),
            "co_leaders": (heads["leaders"], wrong),
            "co_mover": (heads["mover"], wrong),
        }
        for name, (members, to) in ways.items():
            hits.setdefault(name, []).extend(part.accuracy(end.logits(members, to)).tolist())
    return {name: float(np.mean(found)) for name, found in hits.items()}
