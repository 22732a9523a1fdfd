"""The page as a file: what it holds, what it cannot do, and what is refused."""

import base64
import hashlib
import html
import re
import zlib

import numpy as np
import pytest
import torch

import regard
from regard import report
from regard.errors import NoSuchSite, NothingObserved, RegardError
from regard.lens import ColumnMass, Entropy, Patterns, ResidualNorm, Sinks
from regard.report import Report, Section
from regard.report.pack import opened
from regard.report.page import SCRIPTS, STYLES
from regard.runtime.findings import Finding
from regard.runtime.panels import GraphPanel, Link, MapPanel, Node, TablePanel
from regard.runtime.table import Table
from tests.support.families import FAMILIES

HOSTILE = "<script>alert(1)</script></script>\"'&\u202e\u2066\u200b\n\x00\x1b<!--"


def matrix(packed):
    raw = zlib.decompress(base64.b64decode(packed["data"]))
    codes = np.frombuffer(raw, np.int8 if packed.get("signed") else np.uint8).reshape(packed["shape"])
    return opened(codes, packed.get("scale", 1.0), packed.get("signed", False))


def test_every_pattern_is_the_models(watched, page, data_of):
    seen, ids = watched
    data = data_of(page.html())
    exact = [p for p in data["patterns"] if p["kind"] == "exact"]
    assert len(exact) == len({(p["row"], p["head"]) for p in exact}) >= 6
    for packed in exact:
        expected = seen.weights(data["sites"][packed["row"]]["alias"], packed["head"]).numpy()
        assert np.abs(matrix(packed) - expected).max() < 0.0045
    assert data["texts"] == [[["", "·", f"w{i}"] for i in ids]]


def test_findings_and_maps_are_those_of_the_lenses(watched, page, data_of):
    seen, _ = watched
    data = data_of(page.html())
    said = [f["text"] for f in data["sections"][0]["findings"]]
    assert said == [f.text for name in ("Sinks", "Induction") for f in seen.lens(name).findings(seen[name])]
    values = {(m["title"], q["name"]): q["values"] for m in data["maps"] for q in m["quantities"]}
    np.testing.assert_allclose(values["Sinks", "first"], seen["Sinks"].grid("first"), rtol=1e-3)


def test_nothing_given_can_leave_the_data(watched, data_of):
    seen, ids = watched
    built = report.build(seen, tokens=[HOSTILE] * len(ids), title=HOSTILE)
    section = Section(
        title=HOSTILE, findings=[Finding(HOSTILE, (("text.0", 0),), HOSTILE)],
        panels=[
            MapPanel(title=HOSTILE, rows=[HOSTILE], columns=[HOSTILE], values={HOSTILE: [[1.0]]}),
            TablePanel(title=HOSTILE, table=Table({HOSTILE: [HOSTILE]})),
            GraphPanel(title=HOSTILE, nodes=[Node(HOSTILE, 0), Node("b", 1)], links=[Link(HOSTILE, "b")]),
        ],
    )  # fmt: skip
    for made in (built, Report(title=HOSTILE, facts=[HOSTILE], sections=[section])):
        text = made.html()
        assert len(re.findall("<script", text)) == 2 == len(re.findall("</script", text))
        assert "alert(1)</script" not in text and "<!--" not in text
        assert not set("\u202e\u2066\u200b\x00\x1b") & set(text)
        everything = str(data_of(text))
        assert "\u202e" not in everything and "\x00" not in everything
        assert "&lt;script&gt;" in text


def test_the_page_may_run_its_own_script_only_and_fetch_nothing(page):
    policy = html.unescape(re.search(r'Security-Policy" content="([^"]*)"', page.html())[1])
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for block, directive in (("script", "script-src"), ("style", "style-src")):
        source = re.search(f"<{block}>(.*?)</{block}>", page.html(), re.DOTALL)[1]
        hashed = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{directive} 'sha256-{hashed}'" in policy
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", page.html())


def test_every_source_file_of_the_page_is_used():
    from importlib import resources

    files = {f.name for f in (resources.files("regard.report") / "page").iterdir() if f.is_file()}
    assert files == {f"{n}.js" for n in SCRIPTS} | {f"{n}.css" for n in STYLES} | {"page.html"}


def test_saving_is_whole_or_not_at_all(page, tmp_path):
    assert page.save(tmp_path / "page.html").read_text(encoding="utf-8") == page.html()
    with pytest.raises(RegardError, match="cannot write"):
        page.save(tmp_path / "none" / "page.html")


def test_a_notebook_gets_a_frame_that_holds_the_page(page):
    frame = page._repr_html_()
    assert 'sandbox="allow-scripts"' in frame and "allow-same-origin" not in frame
    assert html.unescape(re.search(r'srcdoc="([^"]*)"', frame)[1]) == page.html()
    assert "MB" in repr(page)


def test_lines_tables_and_kept_patterns_join_the_page(data_of):
    model = FAMILIES["llama"].build("eager")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad(), regard.watch(model, ResidualNorm(), ColumnMass(), Patterns(heads=[(1, 2)])) as seen:
        model(ids)
    data = data_of(report.build(seen, heads=[(1, 2)]).html())
    assert [p["title"] for p in data["panels"]] == ["Residual stream", "Attention received, by position"]
    assert data["opens"][1:] == [2, 0] and data["sites"][data["opens"][0]]["alias"] == "text.1"
    assert data["texts"] == [[f"#{i}" for i in range(5, 25)]]


def test_every_sequence_kept_is_a_text_of_its_own(data_of):
    model = FAMILIES["llama"].build("eager")
    ids = torch.randint(5, 60, (2, 12))
    with torch.no_grad(), regard.watch(model, Patterns(heads=[(1, 2)])) as seen:
        model(ids)
    data = data_of(report.build(seen).html())
    assert [s["short"] for s in data["sections"]] == ["the text", "sequence 1"]
    weights = [seen[Patterns].weights("text.1", 2, i).numpy() for i in (0, 1)]
    for number, expected in enumerate(weights):
        (packed,) = (
            p
            for p in data["patterns"]
            if p["section"] == number and data["sites"][p["row"]]["alias"] == "text.1" and p["head"] == 2
        )
        assert packed["kind"] == "exact"
        assert np.abs(matrix(packed) - expected).max() < 0.0045
        assert data["texts"][packed["keys"]] == [f"#{i}" for i in ids[number].tolist()]


def test_build_after_generate_and_with_padding(data_of):
    model = FAMILIES["llama"].build("sdpa")
    inputs = FAMILIES["llama"].inputs(model, "left")
    with torch.no_grad(), regard.watch(model, Entropy()) as seen:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    data = data_of(report.build(seen, exact=3).html())
    real = int(inputs["attention_mask"][0].sum())
    exact = [p for p in data["patterns"] if p["kind"] == "exact"]
    assert len(exact) == 3
    for packed in exact:
        whole = seen.weights(data["sites"][packed["row"]]["alias"], packed["head"]).numpy()
        pad = whole.shape[0] - packed["rows"]
        assert packed["rows"] >= real + 3
        assert np.abs(matrix(packed) - whole[pad:, pad:]).max() < 0.0045


def test_what_cannot_be_shown_is_refused(watched):
    seen, _ = watched
    with pytest.raises(NoSuchSite):
        report.build(seen, heads=[(0, 99)])
    with regard.watch(FAMILIES["llama"].build("eager"), Sinks()) as early:
        with pytest.raises(NothingObserved):
            report.build(early)
        early.root(torch.arange(5, 9)[None])
