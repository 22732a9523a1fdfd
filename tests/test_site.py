"""The documentation builds into a site, without a warning, whose pages load nothing from elsewhere."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*.md"))
LOADED = re.compile(r"""<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^"'\s>]+""")
NAVIGATES = re.compile(r"""rel=["']?(?:canonical|next|prev)""")


def build(folder):
    """Build the site of a folder that holds `docs` and `mkdocs.yml`."""
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    return folder


@pytest.fixture(scope="module")
def site(folder):
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def from_elsewhere(html):
    return [tag for tag in LOADED.findall(html) if not NAVIGATES.search(tag)]


def test_every_page_is_built_and_loads_nothing_from_elsewhere(site):
    for page in PAGES:
        name = "index.html" if page.name in ("README.md", "index.md") else f"{page.stem}.html"
        html = (site / page.parent / name).read_text(encoding="utf-8")
        assert from_elsewhere(html) == [], page


def test_what_is_loaded_from_elsewhere_is_seen():
    assert from_elsewhere('<script async src="https://example.org/x.js">')
    assert from_elsewhere("<link rel=stylesheet href=//example.org/x.css>")
    assert not from_elsewhere('<link rel="canonical" href="https://example.org/page.html">')
    assert not from_elsewhere('<a href="https://arxiv.org/abs/1706.03762">')


def test_every_page_can_be_reached_from_the_first(site):
    seen, left = set(), [site / "index.html"]
    while left:
        page = left.pop()
        if page in seen or not page.is_file():
            continue
        seen.add(page)
        html = page.read_text(encoding="utf-8")
        left += [(page.parent / t).resolve() for t in re.findall(r'href="([^":#]+\.html)', html)]
        left += [(page.parent / t / "index.html").resolve() for t in re.findall(r'href="([^":#]+/)"', html)]
    built = {p.resolve() for p in site.rglob("*.html") if p.name != "404.html"}
    assert built <= {p.resolve() for p in seen}


def test_a_link_that_leads_nowhere_fails_the_build(folder, tmp_path):
    shutil.copytree(folder / "docs", tmp_path / "docs")
    shutil.copy(folder / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / "look.md").open("a", encoding="utf-8") as page:
        page.write("\n[nowhere](nowhere.md)\n")
    assert build(tmp_path).returncode != 0
