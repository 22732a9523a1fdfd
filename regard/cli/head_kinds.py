"""The work behind `regard heads`: each kind of head scored on two sets of prompts that share none."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regard.cli import fit
from regard.cli.given import read_text
from regard.errors import RegardError
from regard.lens import Induction, Sinks
from regard.lens.extremes import compare_sinks
from regard.lens.extremes.pieces import cut
from regard.lens.retrieval_heads.answering import rouge_recall
from regard.lens.retrieval_heads.detection import detect
from regard.lens.retrieval_heads.scores import RetrievalScores
from regard.report import Report, Section
from regard.runtime.anatomy import anatomy_of, require_attention, root_of
from regard.runtime.findings import Finding
from regard.runtime.head_list import TOP, HeadList, list_panel
from regard.runtime.head_table import HeadTable
from regard.runtime.model_identity import identify
from regard.runtime.panels import head_map
from regard.runtime.progress import bar
from regard.runtime.verbs import watch
from regard.tasks.needles import DEPTHS, LENGTHS, needle, read_facts
from regard.tasks.passages import passages
from regard.weights import Source
from regard.weights.device import check_device, check_dtype
from regard.weights.quiet import busy

PIECE, MOST, PROBE, SETS, ROWS = 64, 32, 50, 2, 8
CODE = ("runtime/session.py", "runtime/head_table.py", "cli/command.py", "engines/rows.py")


@dataclass(frozen=True)
class Ranking:
    """What was found of one kind of head.

    Attributes:
        kind: of head.
        title: the model, in words.
        origin: what it was fed, in words.
        heads: the list.
        sets: what the two sets of prompts are.
        chance: the score of a head that does nothing in particular.
        by: what head that is; empty where the findings say it.
        shown: columns to print beside the score.
        findings: sentences of the kind itself.
        panels: what else the page shows.
    """

    kind: str
    title: str
    origin: str
    heads: HeadList
    sets: str
    chance: float
    by: str
    shown: tuple[str, ...] = ("first", "second")
    findings: tuple[Finding, ...] = ()
    panels: tuple[Any, ...] = ()

    def said(self) -> list[str]:
        """Return what is to be said of the list: how stable it is, and what chance would give."""
        said = [finding.text for finding in self.findings[:1]]
        if self.heads.shared is None or np.isnan(self.heads.correlation):
            said.append("There were not two sets of prompts, so the ranking is held against nothing.")
        else:
            shared = self.heads.shared
            said.append(
                f"On {self.sets} the ranks of all heads correlate at {self.heads.correlation:.2f} "
                f"(Spearman), and the {len(self.heads)} leading ones share {shared.shared} "
                f"(chance {shared.expected:.1f})."
            )
        if self.by:
            said.append(f"{self.by} would have {self.chance:.4f}.")
        return said


@dataclass(frozen=True)
class Prepared:
    """A model that is not loaded yet, checked as far as can be without its weights."""

    source: Source
    dtype: str | None
    device: str | None
    longest: int | None

    @classmethod
    def of(cls, options: argparse.Namespace) -> Prepared:
        check_dtype(options.dtype)
        check_device(options.device)
        found = Source.find(options.model)
        with busy(f"Preparing {found.name}"):
            fit.check_reads_text(found)
            skeleton = root_of(found.skeleton())
            anatomy = anatomy_of(skeleton)
            require_attention(anatomy)
            if options.kind == "vision":
                from regard.lens.image_divergence import check_reads_images

                check_reads_images(skeleton)
            else:
                fit.check_takes_tokens(skeleton, anatomy, found.name)
            total = sum(site.heads or 0 for site in anatomy.sites if site.kind == anatomy.main)
            if (options.top or 0) > total:
                raise RegardError(f"--top is {options.top}, and {found.name} has {total} heads.")
            options.top = options.top or min(TOP, total)
            return cls(found, options.dtype, options.device, fit.longest(skeleton))

    def load(self) -> Any:
        with busy(f"Loading {self.source.name}"):
            return root_of(self.source.read(self.dtype, self.device))


def rank(options: argparse.Namespace) -> Ranking:
    """Return the heads of one kind, ranked.

    Raises:
        RegardError: for what cannot be done, where possible before weights are read.
    """
    ranking: Callable[[Prepared, argparse.Namespace], Ranking] = RANKINGS[options.kind]
    return ranking(Prepared.of(options), options)


def rank_retrieval(made: Prepared, options: argparse.Namespace) -> Ranking:
    """Score the heads by needle tests."""
    rouge_recall()
    facts = None if options.needles is None else read_facts(options.needles)
    text, origin = (None, "packaged passages") if options.text is None else read_text(options.text)
    lengths, depths = options.length or LENGTHS, options.depth or DEPTHS
    prompts = needle(
        made.source.tokenizer, lengths=lengths, depths=depths, facts=facts, haystack=text, seed=options.seed,
        stem=not options.no_stem, chat=options.chat,
    )  # fmt: skip
    if made.longest is not None and max(map(len, (p.ids for p in prompts))) > made.longest:
        raise RegardError(f"--length: {made.source.name} takes at most {made.longest} tokens.")
    found = detect(
        made.load(),
        made.source.tokenizer,
        prompts,
        steps=options.steps,
        resume=options.resume,
        name=made.source.name,
    )
    where = f"{origin} of {_listed(lengths)} tokens at depths {_listed(depths)}"
    words = f"{len(prompts.facts)} facts, each hidden in {where}"
    return of_scores(found, options.top, made.source.name, words)


def of_scores(found: RetrievalScores, top: int, name: str, origin: str) -> Ranking:
    """Return the ranking that a search for retrieval heads found."""
    heads = found.list(top)
    return Ranking(
        kind="retrieval", title=_title(name, heads), origin=origin, heads=heads,
        sets="two halves of the facts", chance=found.chance, by="",
        shown=("active", "first", "second"),
        findings=found.findings(), panels=(found.depths(),),
    )  # fmt: skip


def rank_induction(made: Prepared, options: argparse.Namespace) -> Ranking:
    """Score the heads on random tokens that repeat once."""
    model, length = made.load(), PROBE if made.longest is None else min(PROBE, made.longest // 2)
    size = min(len(made.source.tokenizer), model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(options.seed)
    batches = []
    for _ in range(SETS):
        half = torch.randint(0, size, (ROWS // SETS, length), generator=generator)
        batches.append(torch.cat([half, half], 1))
    tables = [_watched(model, Induction(), batch, "Reading random tokens") for batch in batches]
    chance = float(np.mean([table["chance"].mean() for table in tables]))
    origin = f"{ROWS} sequences of {length} random tokens, twice in a row"
    return _ranking(
        "induction", made, model, options, tables, "score", origin, chance, "Attention spread evenly"
    )  # fmt: skip


def rank_sink(made: Prepared, options: argparse.Namespace) -> Ranking:
    """Score the heads by their mean attention on the first token of pieces of text."""
    pieces, origin = _pieces(made, options.text)
    model = made.load()
    tables = [_watched(model, Sinks(), torch.stack(pieces[i::2]), f"Reading {origin}") for i in range(SETS)]
    length = len(pieces[0])
    chance = float(np.mean([1 / (row + 1) for row in range(1, length)]))
    words = f"{len(pieces)} pieces of {length} tokens of {origin}"
    return _ranking("sink", made, model, options, tables, "first", words, chance, "Attention spread evenly")


def rank_dormant(made: Prepared, options: argparse.Namespace) -> Ranking:
    """Score the heads by the difference of their sinks between two domains of text."""
    (first, origin), (second, other) = _domain(options.text), _code(options.against)
    tokenizer = made.source.tokenizer
    for text, where in ((first, origin), (second, other)):
        if len(cut(text, tokenizer, PIECE)) < SETS:
            raise RegardError(f"{where} is too short; two pieces of {PIECE} tokens are needed.")
    model = made.load()
    found = compare_sinks(model, tokenizer, first, second, length=PIECE, most=MOST)
    noise = [np.abs(found[f"noise_{domain}"]) for domain in "ab"]
    columns = {
        "score": np.abs(found["contrast"]), "first": np.abs(found["contrast_1"]),
        "second": np.abs(found["contrast_2"]), "contrast": found["contrast"], "a": found["a"],
        "b": found["b"],
    }  # fmt: skip
    about = {**found.about, "kind": "dormant", "model": identify(model, made.source.name)}
    heads = HeadList(HeadTable(found.sites, found.heads, columns, about), options.top)
    words = f"{origin} (a) and {other} (b): mean attention on the first token of pieces of {PIECE} tokens"
    return Ranking(
        kind="dormant", title=_title(made.source.name, heads), origin=words, heads=heads,
        sets="two halves of the pieces", chance=float(np.mean(noise)),
        by="Two halves of one domain, on average over heads,", shown=("a", "b", "contrast"),
    )  # fmt: skip


def rank_vision(made: Prepared, options: argparse.Namespace) -> Ranking:
    """Score the heads by how far they move when the image is taken away."""
    from regard.cli.vision_heads import prompts_with_images
    from regard.lens.image_divergence import image_divergence

    sets = prompts_with_images(made.source, options.image)
    model, tokenizer = made.load(), made.source.tokenizer
    tables = [image_divergence(model, prompts, tokenizer=tokenizer) for prompts in sets]
    score = np.mean([table["divergence"] for table in tables], 0)
    images = "1 image" if len(options.image) == 1 else f"{len(options.image)} images"
    origin = f"{sum(map(len, sets))} prompts with {images}, and without"
    return _ranking(
        "vision", made, model, options, tables, "divergence", origin, float(score.mean()),
        "A head drawn at random", sets="two sets of questions",
    )  # fmt: skip


RANKINGS: Mapping[str, Callable[[Prepared, argparse.Namespace], Ranking]] = {
    "retrieval": rank_retrieval,
    "induction": rank_induction,
    "sink": rank_sink,
    "dormant": rank_dormant,
    "vision": rank_vision,
}


def _ranking(
    kind: str, made: Prepared, model: Any, options: argparse.Namespace, tables: Sequence[HeadTable],
    column: str, origin: str, chance: float, by: str, sets: str = "two halves of them",
) -> Ranking:  # fmt: skip
    """Return the ranking by the mean of a column over two tables."""
    first = tables[0]
    one, two = (np.asarray(table[column]) for table in tables)
    about = {
        "lens": kind, "definition": first.about.get("definition"), "source": first.about.get("source"),
        "main": first.about.get("main"), "kind": kind, "model": identify(model, made.source.name),
        "chance": chance,
    }  # fmt: skip
    rows = [row for row, site in enumerate(first.sites) if site.startswith(f"{about['main']}.")]
    columns = {"score": (one + two)[rows] / 2, "first": one[rows], "second": two[rows]}
    sites = tuple(first.sites[row] for row in rows)
    heads = HeadList(HeadTable(sites, first.heads[rows], columns, about), options.top)
    return Ranking(kind, _title(made.source.name, heads), origin, heads, sets, chance, by)


def _watched(model: Any, lens: Any, ids: torch.Tensor, title: str) -> HeadTable:
    with bar(title, len(ids)) as advance, torch.no_grad(), watch(model, lens) as seen:
        for rows in ids.to(model.device).split(ROWS):
            model(input_ids=rows, use_cache=False)
            advance(len(rows))
    found: HeadTable = seen[type(lens)]
    return found


def _pieces(made: Prepared, text: str | None) -> tuple[list[torch.Tensor], str]:
    """Return at least two pieces of one length, and where they came from."""
    texts, origin = _domain(text)
    pieces = cut(texts, made.source.tokenizer, PIECE)
    same = [piece for piece in pieces if len(piece) == PIECE]
    if len(same) < SETS:
        raise RegardError(f"{origin} is too short; two pieces of {PIECE} tokens are needed.")
    return same, origin


def _domain(text: str | None) -> tuple[list[str], str]:
    if text is None:
        return [passage.text for passage in passages()], "packaged passages"
    words, origin = read_text(text)
    return [words], origin


def _code(text: str | None) -> tuple[list[str], str]:
    if text is not None:
        words, origin = read_text(text)
        return [words], origin
    folder = resources.files("regard")
    return [(folder / name).read_text("utf-8") for name in CODE], "code of regard itself"


def _title(name: str, heads: HeadList) -> str:
    model = heads.about["model"]
    return f"{name}, {model['layers']} layers, {model['heads']} heads in all ({model['class']})"


def _listed(values: Sequence[float]) -> str:
    words = [f"{value:g}" for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def write_report(found: Ranking, path: Path) -> None:
    """Write the page of a ranking."""
    heads = found.heads
    table = heads.table
    said = tuple(
        Finding(text, tuple(heads) if not place else (), found.kind)
        for place, text in enumerate(found.said())
    )
    panels = (head_map(table), list_panel(heads, found.shown), *found.panels)
    section = Section(title=f"On {found.origin}", short=found.kind, findings=said, panels=panels)
    title = f"{found.kind} heads of {heads.about['model']['name']}"
    Report(
        title=title, facts=[found.title], sections=[section], colours=(str(table.about["lens"]), "score")
    ).save(path)
