"""A real browser, and small models to make pages of."""

import os
import shutil

import pytest
import torch

import regard
from regard import report
from regard.lens import Induction, Sinks
from tests.support.families import FAMILIES

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = (
    "the report is tested in Chromium, which is not installed: `apt-get install -y chromium`, or name an "
    "executable in REGARD_CHROMIUM"
)


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium. Without it these tests are skipped, or fail where REGARD_BROWSER is `required`."""
    found = os.environ.get("REGARD_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        (pytest.fail if os.environ.get("REGARD_BROWSER") == "required" else pytest.skip)(MISSING)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def show(browser, tmp_path):
    """Return `show(report or html, **options) -> page`; errors and requests of every page fail the test."""
    problems, contexts = [], []

    def open_page(page, **options):
        context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        file = tmp_path / f"page{len(contexts)}.html"
        file.write_text(page if isinstance(page, str) else page.html(), encoding="utf-8")
        tab.on("request", lambda r: r.url == file.as_uri() or problems.append(r.url))
        tab.goto(file.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture(scope="session")
def watched():
    """A session on a tiny model that has read 40 tokens, and their ids."""
    torch.manual_seed(0)
    model = FAMILIES["llama"].build("eager")
    ids = torch.randint(5, 60, (1, 20)).repeat(1, 2)
    with torch.no_grad(), regard.watch(model, Sinks(), Induction()) as seen:
        model(ids)
    return seen, ids[0].tolist()


@pytest.fixture(scope="session")
def page(watched):
    seen, ids = watched
    return report.build(seen, tokens=[f" w{i}" for i in ids], title="tiny")


@pytest.fixture(scope="session")
def data_of():
    """Return what a page's script reads."""
    import json
    import re

    def data(html):
        return json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])

    return data
