"""Every recipe in the documentation runs, and prints what the page says it prints."""

import contextlib
import doctest
import importlib
import io
import math
import pkgutil
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

import regard
from regard.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONG = "<!-- takes minutes: not run with the tests -->\n"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
TOLERANCE = 0.02
EXTRAS = {"regard.cli.harness": "lm_eval"}  # what is no part of `dev`
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@dataclass(frozen=True)
class Recipe:
    """A block to run, the line it starts on, and the `text` block right after it, if there is one."""

    code: str
    line: int
    printed: str | None
    shell: bool = False

    def run(self, page, names):
        """Run it; a block of commands is given to `regard` line by line."""
        if not self.shell:
            exec(compile("\n" * self.line + self.code, str(page), "exec"), names)
            return
        for command in self.code.strip().splitlines():
            assert main(shlex.split(command)[1:]) == 0, command


def recipes(page):
    """The python blocks of a page and those of `regard inspect`, in order, but for those of minutes."""
    text = page.read_text(encoding="utf-8")
    blocks = list(FENCE.finditer(text))
    for block, after in zip(blocks, [*blocks[1:], None], strict=False):
        shell = block[1] == "bash" and block[2].startswith("regard inspect ")
        if (block[1] != "python" and not shell) or text[: block.start()].endswith(LONG):
            continue
        follows = after is not None and after[1] == "text"
        follows = follows and not text[block.end() : after.start()].strip()
        line = text[: block.start()].count("\n") + 1
        yield Recipe(block[2], line, after[2] if follows else None, shell)


def differences(shown, printed):
    """Sentences about lines of a page that are not what was printed; numbers may differ by 2 %."""
    wanted, found = ([" ".join(x.split()) for x in t.strip().splitlines()] for t in (shown, printed))
    if len(wanted) != len(found):
        yield f"{len(wanted)} lines shown, {len(found)} printed:\n{printed}"
        return
    for want, got in zip(wanted, found, strict=True):
        numbers = [[float(n) for n in NUMBER.findall(line)] for line in (want, got)]
        near = len(numbers[0]) == len(numbers[1]) and all(
            math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE / 10)
            for a, b in zip(*numbers, strict=True)
        )
        if not near or NUMBER.sub("#", want) != NUMBER.sub("#", got):
            yield f"shown:   {want}\nprinted: {got}"


@pytest.mark.real
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_run(page, tmp_path, monkeypatch, registries):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": f"docs.{page.stem}"}
    wrong = []
    for recipe in recipes(page):
        out = io.StringIO()
        place = f"{page.name}, line {recipe.line}"
        with contextlib.redirect_stdout(out):
            recipe.run(page, names)
        if recipe.printed is not None:
            wrong += [f"{place}:\n{d}" for d in differences(recipe.printed, out.getvalue())]
    assert not wrong, "\n\n".join(wrong)


@pytest.fixture
def registries():
    """What a recipe registers is forgotten afterwards; what it made regard load stays."""
    yield
    homes = [importlib.import_module(n) for n in modules() if n.endswith((".registry", ".mechanism"))]
    for registry in (d for m in homes for n, d in vars(m).items() if n.isupper() and isinstance(d, dict)):
        for name, made in list(registry.items()):
            if str(getattr(made, "__module__", "")).startswith("docs."):
                del registry[name]


def modules():
    """Names of all modules of the package."""
    return ["regard", *(m.name for m in pkgutil.walk_packages(regard.__path__, "regard."))]


@pytest.mark.parametrize("name", [n for n in modules() if not n.endswith("__main__")])
def test_docstring_examples_run(name):
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name])
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert missing == []


def test_every_error_has_a_page_that_raises_it():
    classes = [n for n, c in vars(regard.errors).items() if isinstance(c, type)]
    folder = ROOT / "docs" / "errors"
    assert sorted(p.stem for p in folder.glob("*.md")) == sorted([*classes, "README"])
    index = (folder / "README.md").read_text(encoding="utf-8")
    for name in classes:
        assert f"[{name}]({name}.md)" in index
        assert any(
            f"except {way}{name}" in r.code
            for r in recipes(folder / f"{name}.md")
            for way in ("", "regard.errors.")
        )


def test_differences_are_seen():
    assert not list(differences("a 0.501 b\n", "a  0.500 b"))
    assert list(differences("a 0.60 b", "a 0.50 b"))
    assert list(differences("a 0.50 b", "c 0.50 b"))
    assert list(differences("a", "a\nb"))
    assert list(differences("1 2", "1"))
