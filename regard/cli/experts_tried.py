"""The work behind `regard run tunable-experts`: profile, rank, choose, try, and say what came out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regard.cli.given import read_text
from regard.edit.experts.controls import MatchedSets, firing_rates, matched_sets
from regard.edit.experts.difference import Expert, ExpertTable, differential
from regard.edit.experts.drawing import plot_experts
from regard.edit.experts.effects import Effect, Rate, effects_table, measure_effects, profile_prompts, shows
from regard.edit.experts.routers import check_experts, routers_of
from regard.edit.experts.steering import TuneExperts
from regard.errors import RegardError
from regard.report import Report, Section
from regard.runtime.findings import Finding
from regard.runtime.panels import MapPanel, Panel, TablePanel
from regard.runtime.table import Table, finite, write_bytes
from regard.tasks.closed_places import ClosedPlaces, spread
from regard.tasks.greedy import greedy_answers

if TYPE_CHECKING:
    from regard.cli.request import Request

PLAIN = "as it is"
DONE = {"off": "off", "on": "forced on", "gain": "scaled"}
GAIN = 0.5


@dataclass(frozen=True)
class Prompts:
    """What experts are ranked on, and what they are tried on.

    Attributes:
        ranked, tried: prompts that show the behaviour, and others.
        neutral: plain texts.
        sorted: whether they still are to be sorted by what the model answers; all are then among the first.
    """

    ranked: tuple[Sequence[str], Sequence[str]]
    tried: tuple[Sequence[str], Sequence[str]]
    neutral: Sequence[str] = ()
    sorted: bool = True

    @classmethod
    def of(cls, options: argparse.Namespace) -> Prompts:
        """Read what a user gave; of a file every other line is kept for trying."""
        neutral = [] if options.neutral is None else _lines(options.neutral)
        if options.behaviour is None:
            return cls._laboratory(options.prompts, neutral)
        first = _lines(options.behaviour)
        others = [] if options.others is None else _lines(options.others)
        if options.others is None:
            return cls((first, []), ([], []), neutral[: options.prompts], False)
        return cls._halves(first, others, neutral, options.prompts)

    @classmethod
    def _laboratory(cls, most: int, neutral: Sequence[str]) -> Prompts:
        world = ClosedPlaces()
        answered = world.answered()
        sets = world.refused(False), answered[::2], world.refused(True), answered[1::2]
        kept = (None, None, most, most)  # reading prompts costs little, answering them does
        one, two, three, four = (
            [asked.prompt for asked in spread(some, count)] for some, count in zip(sets, kept, strict=True)
        )
        return cls((one, two), (three, four), neutral or spread(world.statements(), most))

    @classmethod
    def _halves(
        cls, first: Sequence[str], others: Sequence[str], neutral: Sequence[str], most: int
    ) -> Prompts:
        for name, some in (("show the behaviour", first), ("do not", others)):
            if len(some) < 2:
                raise RegardError(
                    f"there are {len(some)} prompts that {name}; it takes two of each at least."
                )
        return cls((first[::2], others[::2]), (first[1::2][:most], others[1::2][:most]), neutral[:most])

    def by_answer(self, request: Request, chat: bool) -> Prompts:
        """Sort prompts by what the model answers, where a user gave one file alone."""
        if self.sorted:
            return self
        options, rule, asked = request.options, shows(request.options.shows), self.ranked[0]
        with request.progress("Asking", len(asked)) as advance:
            said = greedy_answers(
                request.model, request.tokenizer, asked, tokens=options.tokens, chat=chat, tick=advance
            )
        shown = [prompt for prompt, answer in zip(asked, said, strict=True) if rule(answer)]
        others = [prompt for prompt, answer in zip(asked, said, strict=True) if not rule(answer)]
        return self._halves(shown, others, self.neutral, options.prompts)


def _lines(path: str) -> list[str]:
    text, _ = read_text(path)
    return [line.strip() for line in text.splitlines() if line.strip()]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tried:
    """What was found.

    Attributes:
        table: experts ranked.
        edit: what was done.
        chosen: to which experts.
        what: that, in words.
        controls: random sets, or None where none could be drawn.
        effects: as it is, the chosen, the least, then the random sets.
        prompts: what they were tried on.
    """

    table: ExpertTable
    edit: TuneExperts
    chosen: Sequence[Expert]
    what: str
    controls: MatchedSets
    effects: Sequence[Effect]
    prompts: Prompts

    @property
    def plain(self) -> Effect:
        """Nothing done."""
        return self.effects[0]

    @property
    def random(self) -> Sequence[Effect]:
        """The effects of random sets."""
        return self.effects[-len(self.controls.sets) :]

    def changed(self, which: str) -> str:
        """Say how the chosen set stands to the random ones."""

        def moved(effect: Effect) -> float:
            return float(getattr(effect, which).share - getattr(self.plain, which).share)

        mine, theirs = moved(self.effects[1]), [moved(effect) for effect in self.random]
        low, high = min(theirs), max(theirs)
        place = "inside" if low <= mine <= high else "outside"
        return (
            f"{100 * mine:+.0f} points on prompts of {NAMED[which]}; {len(theirs)} random sets of as many "
            f"experts: {100 * low:+.0f} to {100 * high:+.0f}. The effect is {place} their range."
        )

    def said(self) -> list[str]:
        """Return what a person would say of it."""
        fire = self.controls.rates
        return [
            f"{self.what[:1].upper()}{self.what[1:]}: {self.changed('behaviour')}",
            f"{self.what[:1].upper()}{self.what[1:]}: {self.changed('others')}",
            f"The random sets fire {min(fire):.0%} to {max(fire):.0%} as much on prompts of the behaviour.",
        ]

    def lines(self, name: str) -> list[str]:
        """Return what the terminal shows."""
        inside, outside = self.table.about["inside"], self.table.about["outside"]
        lines = [
            f"{name}: {len(self.table.table)} experts in {len(self.table.layers)} layers, ranked on "
            f"{inside} prompts of the behaviour and {outside} others ({self.table.about['kind']}).",
            "",
            "  rank  layer  expert    score",
        ]
        for rank, (layer, expert, score) in enumerate(self.table.top(max(5, min(len(self.chosen), 10))), 1):
            lines.append(f"  {rank:>4}  {layer:>5}  {expert:>6}  {score:>7.3f}")
        counts = f"{len(self.prompts.tried[0])} kept prompts of it", f"{len(self.prompts.tried[1])} others"
        lines += ["", f"Answers that show the behaviour, on {counts[0]} and {counts[1]} (95 % interval):", ""]
        lines.append(f"  {'':34}{'behaviour':>18}{'others':>18}{'loss':>8}")
        lines += [_row(e.name, str(e.behaviour), str(e.others), e.loss) for e in self._few()]
        first, second = (_range([_rate(e, which).share for e in self.random]) for which in NAMED)
        losses = [e.loss for e in self.random if e.loss is not None]
        mean = float(np.mean(losses)) if losses else None
        lines.append(_row(f"{len(self.random)} random sets, mean (range)", first, second, mean))
        return [*lines, "", *self.said()]

    def _few(self) -> Sequence[Effect]:
        return self.effects[: len(self.effects) - len(self.random)]

    def page(self, name: str) -> Report:
        """Return the page: the map of experts, all rates, the answers."""
        grid = MapPanel(
            title="Experts", rows=[str(layer) for layer in self.table.layers],
            columns=[str(expert) for expert in range(self.table.scores.shape[1])],
            values={"score": self.table.scores},
            note="Use for prompts of the behaviour less that for the others (Dahlke et al. 2025).",
        )  # fmt: skip
        rows = {"layer": [e[0] for e in self.chosen], "expert": [e[1] for e in self.chosen]}
        panels: list[Panel] = [
            grid,
            TablePanel(title=f"The experts that were {DONE[self._done]}", table=Table(rows)),
            TablePanel(title="Shares of answers that show the behaviour", table=effects_table(self.effects)),
            TablePanel(title="Answers", table=self._answers()),
        ]
        section = Section(
            title=f"On {len(self.prompts.tried[0])} prompts of it and {len(self.prompts.tried[1])} others",
            short="experts", findings=[Finding(text) for text in self.said()], panels=panels,
        )  # fmt: skip
        return Report(title=name, facts=[f"{self.what}"], sections=[section])

    @property
    def _done(self) -> str:
        return "off" if self.edit.off else "on" if self.edit.on else "gain"

    def _answers(self) -> Table:
        asked = [*self.prompts.tried[0], *self.prompts.tried[1]]
        before, after = ([*e.answers[0], *e.answers[1]] for e in self.effects[:2])
        return Table({"prompt": asked, "before": before, "after": after})

    def picture(self, path: Path) -> None:
        """Write the map and the rates."""
        import io

        figure = plot_experts(self.table, self.chosen, self.effects)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=path.suffix.lstrip(".") or "png", dpi=110)
        write_bytes(path, buffer.getvalue())

    def as_json(self, name: str) -> dict[str, Any]:
        """Return every number."""
        return {
            "model": name, "about": self.table.about, "layers": list(self.table.layers),
            "scores": [[finite(x) for x in row] for row in self.table.scores.tolist()],
            "done": self._done, "experts": [list(expert) for expert in self.chosen],
            "random": [[list(expert) for expert in some] for some in self.controls.sets],
            "random_fire": list(self.controls.rates),
            "effects": [
                {
                    "name": e.name, "loss": e.loss,
                    **{
                        which: {"count": r.count, "total": r.total, "low": r.low, "high": r.high}
                        for which in NAMED
                        for r in [_rate(e, which)]
                    },
                }
                for e in self.effects
            ],
        }  # fmt: skip


NAMED = {"behaviour": "the behaviour", "others": "the others"}


def _rate(effect: Effect, which: str) -> Rate:
    found: Rate = getattr(effect, which)
    return found


def _row(name: str, first: str, second: str, loss: float | None) -> str:
    return f"  {name:34}{first:>18}{second:>18}" + (f"{loss:>8.3f}" if loss is not None else f"{'-':>8}")


def _range(shares: Sequence[float]) -> str:
    return f"{np.mean(shares):.0%} ({min(shares):.0%}-{max(shares):.0%})"


def try_experts(request: Request, prompts: Prompts) -> Tried:
    """Profile, rank, choose and try.

    Raises:
        UnsupportedModel: for a model without routers; before its weights are read.
        NoSuchSite: for an expert that it does not have; likewise.
        RegardError: for prompts that cannot be told apart, or no expert chosen.
    """
    options = request.options
    given = _given(request)
    tokenizer = request.tokenizer
    chat = bool(tokenizer.chat_template) if options.chat is None else options.chat
    prompts = prompts.by_answer(request, chat)
    first, others = prompts.ranked
    with request.progress("Profiling", len(first) + len(others)) as advance:
        use, layers = profile_prompts(
            request.model, tokenizer, [*first, *others], value=options.value, last=options.last, chat=chat,
            tick=advance,
        )  # fmt: skip
    labels = ["behaviour"] * len(first) + ["others"] * len(others)
    table = differential(use, layers, labels, "behaviour", kind=options.kind)
    edit = given or _made(table.experts(options.count), options)
    chosen = [*edit.off, *edit.on, *edit.gain]
    what = f"{'the chosen' if given else f'the {len(chosen)} leading'} {DONE[_named(edit)]}"
    controls = matched_sets(
        firing_rates(use[: len(first)], layers), chosen, options.random, seed=options.seed
    )
    least = table.experts(len(chosen), largest=False)
    conditions: dict[str, TuneExperts | None] = {PLAIN: None, what: edit}
    if not given:
        conditions[f"the {len(chosen)} least {DONE[_named(edit)]}"] = _like(edit, least)
    conditions |= {f"random set {i}": _like(edit, some) for i, some in enumerate(controls.sets, 1)}
    total = len(conditions) * (len(prompts.tried[0]) + len(prompts.tried[1]))
    with request.progress("Asking", total) as advance:
        effects = measure_effects(
            request.model, tokenizer, *prompts.tried, conditions, rule=shows(options.shows),
            neutral=prompts.neutral, tokens=options.tokens, chat=chat, tick=advance,
        )  # fmt: skip
    return Tried(
        table=table, edit=edit, chosen=chosen, what=what, controls=controls, effects=effects, prompts=prompts
    )


def _given(request: Request) -> TuneExperts | None:
    """The experts that a user named or saved; checked before weights are read."""
    from regard.edit.files import load_edits

    options = request.options
    skeleton = request.source.skeleton()
    routers = routers_of(skeleton)
    if options.edits is not None:
        found = [e for e in load_edits(options.edits, skeleton) if isinstance(e, TuneExperts)]
        if len(found) != 1:
            raise RegardError(f"{options.edits} holds {len(found)} sets of experts; it takes one.")
        check_experts([*found[0].off, *found[0].on, *found[0].gain], routers)
        return found[0]
    if options.experts is not None:
        named = TuneExperts(off=options.experts).off
        check_experts(named, routers)
        return _made(named, options)
    return None


def _made(experts: Sequence[Expert], options: argparse.Namespace) -> TuneExperts:
    """The edit that a user asks for, of some experts."""
    if options.action == "off":
        return TuneExperts(off=experts, mode=options.mode, scope=options.scope)
    if options.action == "on":
        return TuneExperts(on=experts, scope=options.scope, weight=options.strength)
    strength = GAIN if options.strength is None else options.strength
    return TuneExperts(gain=dict.fromkeys(experts, strength), scope=options.scope)


def _named(edit: TuneExperts) -> str:
    return "off" if edit.off else "on" if edit.on else "gain"


def _like(edit: TuneExperts, experts: Sequence[Expert]) -> TuneExperts:
    """The same done to other experts; gains one by one."""
    if edit.gain:
        factors = list(edit.gain.values())
        return replace(edit, off=(), on=(), gain=dict(zip(experts, factors, strict=True)))
    if edit.off:
        return replace(edit, off=tuple(experts))
    return replace(edit, on=tuple(experts))
