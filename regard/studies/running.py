"""Running a study: its steps, resumed where they were left, then the verdict, the JSON and the picture."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regard.errors import RegardError
from regard.studies.base import Step, Study, by_name
from regard.studies.keep import Keep, check_steps, code_of
from regard.studies.machine import machine, versions
from regard.studies.outcome import Outcome
from regard.studies.picture import save_picture
from regard.studies.registry import find_study
from regard.studies.verdict import judge


def run(
    slug: str,
    *,
    quick: bool = False,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = True,
) -> Outcome:
    """Run a study and return its outcome.

    Args:
        slug: which.
        quick: at the size for a try, in seconds; its outcome is marked and has a name of its own.
        seed: a whole number from 0 on, that all chance is derived from.
        out: folder for `SLUG.json`, `SLUG.png` and the results of finished steps, made where it is missing;
            None writes nothing.
        resume: use the results of steps that an earlier run with the same size, seed, versions, machine and
            code finished in `out`. Of a study whose source is in no file nothing is kept.

    Raises:
        RegardError: for an unknown study, a seed or folder that will not do, or a missing package.

    Example:
        >>> run("attention-sink-emergence", quick=True).verdict         # doctest: +SKIP
        'holds'
    """
    kind = find_study(slug)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise RegardError(f"seed is {seed!r}; it must be a whole number from 0 to {2**31 - 1}.")
    require_scipy()
    folder = None if out is None else _folder(Path(out))
    study = kind(kind.quick if quick else kind.full, seed)
    steps = list(study.steps())
    check_steps(steps)
    key = _key(study)
    name = f"{slug}.quick" if quick else slug
    kept = Keep(folder / f"{name}.steps" if folder is not None and key["code"] is not None else None, key)
    kept.open()
    found = {step.name: kept.find(step) for step in steps} if resume else {}
    rules = [dataclasses.asdict(claim) for claim in study.claims]
    rules_first = kept.rules(json.loads(json.dumps(_tested(rules))), begun=any(found.values()))
    done = _work(study, steps, {name: told for name, told in found.items() if told}, kept)
    outcome = _outcome(study, done, quick, rules_first)
    if folder is not None:
        save_picture(study, outcome, folder)
        outcome.write(folder)
    return outcome


def require_scipy() -> None:
    """Refuse to start without scipy, which the verdicts' intervals need.

    Raises:
        RegardError: naming the command that installs it.
    """
    try:
        import scipy  # noqa: F401
    except ImportError as missing:
        raise RegardError('a study needs scipy; run `pip install "regard[study]"`.') from missing


def step_seed(slug: str, seed: int, step: str) -> int:
    """Return the seed of a step, the same whichever steps ran before it."""
    told = hashlib.sha256(f"{slug}\0{seed}\0{step}".encode()).digest()
    return int.from_bytes(told[:4], "big")


def _tested(claims: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of the claims decides a verdict: not their wording."""
    return [{k: claim[k] for k in ("name", "rules", "needs", "main")} for claim in claims]


def _folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".{time.time_ns()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RegardError(f"{out} cannot be written to: {error.strerror or error}.") from None
    return out


def _key(study: Study) -> dict[str, Any]:
    here, found = machine(), versions()
    return {
        "study": study.slug,
        "size": dataclasses.asdict(study.size),
        "seed": study.seed,
        "code": code_of(type(study)),
        "machine": [here["processor"], here["accelerator"]],
        "versions": [found[name] for name in ("python", "torch", "transformers", "numpy")],
    }


def _work(
    study: Study, steps: Sequence[Step], found: dict[str, dict[str, Any]], kept: Keep
) -> dict[str, dict[str, Any]]:
    """Run the steps that have no result yet, and return the results of all, in order."""
    import torch

    left = [step for step in steps if step.name not in found]
    if left:
        study.prepare()
    total = sum(step.cost for step in steps)
    with _progress(study, total, total - sum(step.cost for step in left)) as bar:
        for step in left:
            bar.begin(step)
            started = time.perf_counter()
            with torch.random.fork_rng():
                torch.manual_seed(step_seed(study.slug, study.seed, step.name))
                result = _plain(step, step.work())
            seconds = time.perf_counter() - started
            kept.put(step, result, seconds)
            found[step.name] = {"result": result, "seconds": seconds}
            bar.end(step)
    return {step.name: found[step.name] for step in steps}


def _plain(step: Step, result: Any) -> Any:
    """Return a result as a file gives it back, so that a resumed run sees just the same."""
    try:
        return json.loads(json.dumps(_finite(result), allow_nan=False))
    except TypeError as error:
        raise RegardError(
            f"step {step.name!r} must return plain numbers, strings, lists and dicts: {error}."
        ) from None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _outcome(study: Study, done: dict[str, dict[str, Any]], quick: bool, rules_first: bool) -> Outcome:
    results = {name: told["result"] for name, told in done.items()}
    verdict, claims, measures = judge(study.claims, by_name(study.quantities), study.measure(results))
    command = ["regard", "study", study.slug, "--seed", str(study.seed), *(["--quick"] if quick else [])]
    return Outcome(
        study=study.slug,
        title=study.title,
        paper=study.paper,
        quick=quick,
        verdict=verdict,
        claims=claims,
        measures=measures,
        details=json.loads(json.dumps(_finite(study.details(results)))),
        rules_first=rules_first,
        size=dataclasses.asdict(study.size),
        seed=study.seed,
        command=shlex.join(command),
        steps=[{"name": name, "seconds": round(told["seconds"], 2)} for name, told in done.items()],
        seconds=round(sum(told["seconds"] for told in done.values()), 1),
        machine=machine(),
        versions=versions(),
        finished=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


class _Bar:
    """A progress bar over steps; without one, nothing is shown."""

    def __init__(self, progress: Any = None, task: Any = None, done: float = 0.0) -> None:
        self.progress, self.task, self.done, self.cost = progress, task, done, 0.0

    def begin(self, step: Step) -> None:
        self.cost = step.cost
        if self.progress is not None:
            self.progress.update(self.task, step=step.name)

    def tick(self, share: float) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=self.done + self.cost * min(max(share, 0.0), 1.0))

    def end(self, step: Step) -> None:
        self.done += step.cost
        self.cost = 0.0
        self.tick(0.0)


@contextmanager
def _progress(study: Study, total: float, done: float) -> Iterator[_Bar]:
    """A bar on standard error, with the step's name and the time left, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Bar()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[step]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(study.slug, total=total, step="")
        progress.update(task, completed=done)
        bar = _Bar(progress, task, done)
        study.tick = bar.tick
        yield bar
