"""No file grows past 400 lines."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("regard", "tests", "benchmarks", "docs", ".ci")
LIMIT = 400


def lines_per_file(root):
    """Lines of every source file under the project's folders."""
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in {".py", ".js", ".css", ".html"}:
                yield path.relative_to(root), len(path.read_text(encoding="utf-8").splitlines())


def test_no_file_is_too_long():
    counts = dict(lines_per_file(ROOT))
    assert len(counts) > 10
    assert {str(p): n for p, n in counts.items() if n > LIMIT} == {}
