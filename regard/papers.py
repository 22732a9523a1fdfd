"""The catalogue: the 62 published systems in scope, what each gives, and how much of it works today.

Its rows stand in `papers.toml`. Nothing but the standard library is needed to read them.

    python -m regard.papers --write docs/systems.md     writes the docs' table anew
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any

from regard.errors import RegardError

STATES = {
    "works": "all that the row says it gives can be used; tested, and its study has run",
    "partly": "what the row names works and is tested; the row says what is missing",
    "planned": "nothing of its own yet",
}
AREAS = {
    "attention": "attention mechanisms",
    "lens": "measurement",
    "edit": "edits",
    "objectives": "training objectives",
    "models": "task architectures",
    "tasks": "evaluation and prompting",
}
ENDING = re.compile(
    r"(?<=\w{4})(?:i[sz])?(?:ations?|at(?:ing|ed|es?|ors?)|ions?|ings?|ives?|able|als?|ers?|ed|ies|ity|ency|ence"
    r"|[ae]nt|ly|y|es?|(?<!s)s)$"
)
FILLERS = re.compile(
    "an?|and|are|as|at|by|do|for|from|how|in|into|is|it|of|on|or|that|the|to|what|where|with"
)
WEIGHTS = {"slug": 3.0, "title": 3.0, "keywords": 3.0, "gives": 2.0, "area": 1.0, "kind": 1.0}
STEM, CLOSE = 4, 0.5


@dataclass(frozen=True, kw_only=True)
class Paper:
    """One system: the paper it comes from, and where it stands in the library.

    Attributes:
        slug: its name everywhere.
        number: its place in the catalogue, from 1.
        authors: as cited, or None where not known; `year` and `arxiv` likewise.
        area: the folder of `regard` that owns it, one of `AREAS`.
        kind: mechanism, measurement, edit, objective, architecture, evaluation, prompting or theory.
        gives: what a user gets from it, in one sentence.
        keywords: further words to find it by.
        state: one of `STATES`.
        missing: what a system that works partly lacks.
        code: its public names, as `module:name`.
        command: the function behind `regard run SLUG`, as `module:name`.
        study: its name for `regard study`.
        tests: its test files.
    """

    slug: str
    number: int
    title: str
    area: str
    kind: str
    gives: str
    state: str
    authors: str | None = None
    year: int | None = None
    arxiv: str | None = None
    keywords: Sequence[str] = ()
    missing: str | None = None
    code: Sequence[str] = ()
    command: str | None = None
    study: str | None = None
    tests: Sequence[str] = ()

    @property
    def link(self) -> str | None:
        """The paper's page, where its arXiv id is known."""
        return None if self.arxiv is None else f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def cited(self) -> str:
        """Authors, year and arXiv id."""
        authors, year = self.authors or "authors not known", self.year or "year not known"
        return f"{authors}, {year}, arXiv {self.arxiv or 'not known'}"

    def row(self) -> dict[str, Any]:
        """Return all fields as plain values, for JSON."""
        fields = asdict(self)
        return {name: list(v) if isinstance(v, list | tuple) else v for name, v in fields.items()}


@cache
def papers() -> dict[str, Paper]:
    """Return the catalogue by slug, in the order of the numbers.

    Example:
        >>> papers()["titans"].year
        2024
    """
    text = (resources.files("regard") / "papers.toml").read_text("utf-8")
    return {slug: Paper(slug=slug, **row) for slug, row in tomllib.loads(text).items()}


def find(name: str) -> Paper:
    """Return the system that a user names by slug, number, arXiv id, or a part of its slug or title.

    Raises:
        RegardError: where none or several are meant; the message names the nearest.

    Example:
        >>> find("halo").slug, find("57").slug
        ('halonet', 'titans')
    """
    wanted = " ".join(name.lower().split())
    rows = papers()
    for paper in rows.values():
        if wanted in (paper.slug, str(paper.number), f"{paper.number:02}", paper.arxiv, paper.title.lower()):
            return paper
    slugs = [p for p in rows.values() if wanted and wanted.replace(" ", "-") in p.slug]
    titles = [p for p in rows.values() if wanted and wanted in p.title.lower()]
    if len(slugs or titles) == 1:
        return (slugs or titles)[0]
    parts = slugs + [p for p in titles if p not in slugs]
    if parts:
        raise RegardError(f"{name!r} is part of {len(parts)} systems: {_listed(p.slug for p in parts)}.")
    near = difflib.get_close_matches(wanted, rows, n=3, cutoff=CLOSE)
    hint = f"did you mean {' or '.join(near)}?" if near else "`regard papers` lists them."
    raise RegardError(f"There is no system {name!r}; {hint}")


def about(words: str) -> list[Paper]:
    """Return the systems that are about some words, the best match first.

    Slug, title, sentence, keywords, area and kind are searched, by the stems of words; rare words count
    for more, and a system that has more of the words comes before one that has fewer.

    Raises:
        RegardError: where no system is; the message names words that are near.

    Example:
        >>> about("quantization")[0].slug
        'quantizable-transformers'
    """
    wanted = dict.fromkeys(_stems(words))
    rows = papers().values()
    held = {paper.slug: _weights(paper) for paper in rows}
    scores = {paper.slug: [0.0, 0.0] for paper in rows}
    for stem in wanted:
        found = {slug: w for slug, weights in held.items() if (w := _match(stem, weights))}
        rarity = math.log(1 + len(held) / max(1, len(found)))
        for slug, weight in found.items():
            scores[slug][0] += 1
            scores[slug][1] += weight * rarity
    best = [p for p in rows if scores[p.slug][0]]
    if not best:
        raise RegardError(f"No system is about {words!r}{_nearest_words(words)}.")
    return sorted(best, key=lambda p: (*(-s for s in scores[p.slug]), p.number))


def _weights(paper: Paper) -> dict[str, float]:
    """The stems that a system has, with the weights of the places each is in, added up."""
    fields = paper.row() | {"area": f"{paper.area} {AREAS[paper.area]}", "keywords": " ".join(paper.keywords)}
    weights: dict[str, float] = {}
    for field, weight in WEIGHTS.items():
        for stem in set(_stems(fields[field])):
            weights[stem] = weights.get(stem, 0.0) + weight
    return weights


def _match(stem: str, weights: dict[str, float]) -> float:
    """The weight of a stem, or half that of one that it begins."""
    longer = [w / 2 for other, w in weights.items() if len(stem) >= STEM and other.startswith(stem)]
    return max([weights.get(stem, 0.0), *longer])


def _stems(text: str) -> Iterator[str]:
    for word in re.findall(r"[^\W_]+", text.lower()):
        if not FILLERS.fullmatch(word):
            yield _stem(word)


def _stem(word: str) -> str:
    """Strip endings as long as four letters are left: hallucinations, hallucinate -> hallucin."""
    rest = ENDING.sub("", word)
    return word if rest == word else _stem(rest)


def _nearest_words(words: str) -> str:
    known = {
        w for p in papers().values() for w in re.findall(r"[^\W\d_]{4,}", f"{p.title} {p.keywords}".lower())
    }
    near = [n for w in words.lower().split() for n in difflib.get_close_matches(w, sorted(known), n=2)]
    return f"; near it is {' or '.join(dict.fromkeys(near))}" if near else ""


def _listed(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def counted(rows: Iterable[Paper]) -> str:
    """Return in words how many of some systems are in which state."""
    states = [paper.state for paper in rows]
    words = {
        "works": ("works", "work"),
        "partly": ("works partly", "work partly"),
        "planned": ("planned",) * 2,
    }
    counts = {state: states.count(state) for state in STATES}
    return ", ".join(f"{n} {words[state][n > 1]}" for state, n in counts.items() if n)


def as_page() -> str:
    """Return the docs' page of all systems, as Markdown."""
    lines = [
        "# Systems",
        "",
        "<!-- Written by `python -m regard.papers --write docs/systems.md` from regard/papers.toml. -->",
        "",
        f"{len(papers())} published systems are in scope: {counted(papers().values())}.",
        "`regard papers` prints this list, `regard papers SLUG` one of them; `regard papers --about WORDS`",
        "searches it.",
        "",
        "| state | means |",
        "|---|---|",
        *(f"| {state} | {means} |" for state, means in STATES.items()),
    ]
    for area, heading in AREAS.items():
        lines += ["", f"## {heading.capitalize()}: `regard/{area}/`", ""]
        lines += ["| | system | what it gives | state | paper |", "|---:|---|---|---|---|"]
        lines += [_table_row(paper) for paper in papers().values() if paper.area == area]
    return "\n".join(lines) + "\n"


def _table_row(paper: Paper) -> str:
    name = f"`{paper.slug}`"
    if paper.state != "planned":
        name = f"[{name}](systems/{paper.slug}.md)"
    source = paper.cited if paper.link is None else f"[{paper.cited}]({paper.link})"
    gives = paper.gives if paper.missing is None else f"{paper.gives} *Missing:* {paper.missing}"
    state = paper.state
    if paper.study is not None:
        state = f"{state}; [study](results/README.md#{paper.study})"
    return f"| {paper.number} | {name} | {gives} | {state} | {source} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the docs' page to a file, or print it."""
    from regard.runtime.table import write_text

    parser = argparse.ArgumentParser(prog="python -m regard.papers", description="Write the page of systems.")
    parser.add_argument("--write", metavar="FILE", help="where to (default: print it)")
    options = parser.parse_args(argv)
    if options.write is None:
        sys.stdout.write(as_page())
        return 0
    try:
        write_text(options.write, as_page())
    except RegardError as error:
        print(f"regard.papers: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
