"""Which tests of a session passed, failed or were skipped, file by file; its hooks are those of a plugin.

Where the session is spread over workers (pytest-xdist), each takes a file at a time and notes what it ran,
and one that judges waits for those files that it judges: files that judge are the last of all, so nothing
waits behind them. Files that take long come first, so that no worker is left with one at the end.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

DUMP = "REGARD_TEST_OUTCOMES"
LIMIT = 600
SLOW = ("tests/test_docs.py", "tests/studies/", "tests/objectives/")
collected: Counter = Counter()
outcomes: dict[str, Counter] = {}
workers: Path | None = None
worker = ""


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Give the workers of a session one folder, which goes when the session ends."""
    if not hasattr(node.config, "outcomes_of_workers"):
        node.config.outcomes_of_workers = tempfile.TemporaryDirectory()
    node.workerinput["outcomes"] = node.config.outcomes_of_workers.name


def pytest_configure(config):
    global workers, worker
    given = getattr(config, "workerinput", None)
    if given is not None:
        workers, worker = Path(given["outcomes"]), given["workerid"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Workers take whole files, so that what a file sets up is set up once, in the order of the files."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Files that take long come first, those with tests that judge the outcomes of others last."""
    judge = {_file(item.nodeid) for item in items if _judges(item)}
    items.sort(key=lambda item: (_file(item.nodeid) in judge, _judges(item), not _slow(_file(item.nodeid))))
    collected.update(_file(item.nodeid) for item in items)


def _judges(item):
    return "outcomes_of" in getattr(item, "fixturenames", ())


def _slow(file):
    return file.startswith(SLOW) or file.endswith("_triton.py")


def pytest_runtest_logreport(report):
    found = outcomes.setdefault(_file(report.nodeid), Counter())
    if report.failed or report.skipped or report.when == "call":
        found[report.outcome] += 1
    if report.when == "teardown":
        found["finished"] += 1
        if workers is not None:
            _replace(workers / f"{worker}.json", json.dumps(outcomes))


def _replace(path, text):
    """Write a file that others read, whole at every moment."""
    path.with_suffix(".new").write_text(text, "utf-8")
    path.with_suffix(".new").replace(path)


def _of_all_workers(files):
    """Wait until all tests of the files have finished, in whichever worker; return their outcomes."""
    started = time.monotonic()
    while True:
        found = {file: Counter() for file in files}
        for path in workers.glob("*.json"):
            for file, counts in json.loads(path.read_text("utf-8")).items():
                if file in found:
                    found[file].update(counts)
        late = [file for file in files if found[file]["finished"] < collected[file]]
        if not late:
            return found
        assert time.monotonic() - started < LIMIT, f"{late[0]} has not finished in {LIMIT} s"
        time.sleep(0.2)


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
        missing = [file for file in files if file not in {*collected, *outcomes}]
        if missing:
            outcomes.update(run_files(missing, pytestconfig.rootpath, tmp_path_factory.mktemp("outcomes")))
        if workers is not None:
            here = [file for file in files if file in collected]
            return {**{file: outcomes.get(file, Counter()) for file in files}, **_of_all_workers(here)}
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
