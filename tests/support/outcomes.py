"""Which tests of a session passed, failed or were skipped, file by file; its hooks are those of a plugin."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

DUMP = "REGARD_TEST_OUTCOMES"
LIMIT = 600
collected: set[str] = set()
outcomes: dict[str, Counter] = {}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Tests that judge the outcomes of others come last."""
    items.sort(key=lambda item: "outcomes_of" in getattr(item, "fixturenames", ()))
    collected.update(_file(item.nodeid) for item in items)


def pytest_runtest_logreport(report):
    found = outcomes.setdefault(_file(report.nodeid), Counter())
    if report.failed or report.skipped or report.when == "call":
        found[report.outcome] += 1


def pytest_sessionfinish():
    if DUMP in os.environ:
        with open(os.environ[DUMP], "w", encoding="utf-8") as file:
            json.dump(outcomes, file)


@pytest.fixture(scope="session")
def outcomes_of(pytestconfig, tmp_path_factory):
    """A function from test files to how many tests passed, failed and were skipped in each.

    What this session runs counts as it fell; files that it does not run are run in another process.
    """

    def look(files):
        missing = [file for file in files if file not in collected]
        if missing:
            outcomes.update(run_files(missing, pytestconfig.rootpath, tmp_path_factory.mktemp("outcomes")))
            collected.update(missing)
        return {file: outcomes.get(file, Counter()) for file in files}

    return look


def run_files(files, root, scratch, *options):
    """Run test files in a process of their own and return file -> Counter."""
    dump = scratch / "outcomes.json"
    options = ("-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", *options)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=root,
        env={**os.environ, DUMP: str(dump), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert dump.exists(), done.stdout + done.stderr
    found = json.loads(dump.read_text("utf-8"))
    return {file: Counter(counts) for file, counts in found.items()}


def _file(nodeid):
    return nodeid.split("::")[0]
