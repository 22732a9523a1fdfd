"""The page in a real browser: it shows the model's numbers, by mouse and by keys, whatever the text holds."""

import re
from itertools import pairwise

import pytest

from regard.report import Report, Section
from regard.runtime.findings import Finding
from regard.runtime.panels import GraphPanel, LinePanel, Link, MapPanel, Node, PatternPanel, TablePanel
from regard.runtime.table import Table

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u202e\u2066\u200b\n\x00"


def cell(page, layer, head):
    return page.locator(f'.cell[data-row="{layer}"][data-head="{head}"]')


def opened(page, name):
    page.wait_for_selector(f'.head h2:text-is("{name}")')
    page.wait_for_selector(".text .token")


def told(page, line=0):
    """The pairs of the readout: position -> weight."""
    found = page.locator(".readout .pairs").nth(line).locator("li:has(b)").all()
    return {int(li.locator("sub").inner_text()): float(li.locator("b").inner_text()) for li in found}


def test_a_clicked_head_shows_the_models_weights(watched, page, show):
    seen, ids = watched
    tab = show(page)
    cell(tab, 1, 2).click()
    opened(tab, "Layer 1 head 2")
    weights = seen.weights(1, 2)
    tokens = tab.locator(".text .token")
    assert tokens.count() == len(ids)
    for query in (3, 17, 39):
        tokens.nth(query).hover()
        best = weights[query].topk(5)
        assert told(tab) == pytest.approx(
            {int(j): float(w) for w, j in zip(*best, strict=True) if w > 0.001}, abs=0.005
        )
    coloured = tab.evaluate("[...document.querySelectorAll('.text .token')].map(t => t.title)")
    for key, shown in enumerate(coloured):
        assert float(shown or 0) == pytest.approx(float(weights[39, key]), abs=0.0055)


def test_both_ways(watched, page, show):
    seen, _ = watched
    tab = show(page)
    cell(tab, 0, 1).click()
    opened(tab, "Layer 0 head 1")
    tab.get_by_role("button", name="who attends to it").click()
    tab.locator(".text .token").nth(5).hover()
    column = seen.weights(0, 1)[:, 5]
    best = column.topk(5)
    assert told(tab, 1) == pytest.approx({int(i): float(w) for w, i in zip(*best, strict=True)}, abs=0.005)
    assert tab.locator(".text .token").nth(4).get_attribute("title") == ""


def test_the_heat_map_says_each_weight(watched, page, show):
    seen, _ = watched
    tab = show(page)
    cell(tab, 1, 0).click()
    opened(tab, "Layer 1 head 0")
    canvas = tab.locator(".detail")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    unit = box["width"] / 492
    step = 400 / 40
    x, y = (92 + 12.5 * step) * unit, (92 + 30.5 * step) * unit
    tab.mouse.move(box["x"] + x, box["y"] + y)
    words = tab.locator(".readout .pair").inner_text()
    assert "30" in words and "12" in words
    assert float(words.split(":")[1]) == pytest.approx(float(seen.weights(1, 0)[30, 12]), abs=0.005)


def test_the_map_tells_its_values_and_ranks(watched, page, show):
    seen, _ = watched
    tab = show(page)
    first = seen["Sinks"].grid("first")
    tab.get_by_role("combobox").select_option(label="Sinks: first")
    cell(tab, 1, 3).hover()
    words = tab.locator(".status").inner_text()
    assert "Layer 1 head 3" in words
    assert float(re.search(r"first ([\d.]+)", words)[1]) == pytest.approx(first[1, 3], rel=0.01)
    rank = int(re.search(r"(\d+) of", words)[1])
    assert rank == 1 + int((first > first[1, 3]).sum())
    tab.locator("summary").click()
    ranked = tab.locator(".ranking .who").all_inner_texts()
    assert ranked == [f"{s.removeprefix('text.')}.{h}" for s, h, _ in seen["Sinks"].top("first", first.size)]
    tab.get_by_role("button", name="largest first").click()
    assert tab.locator(".ranking .who").all_inner_texts() == ranked[::-1]


def test_findings_lead_to_their_heads(show):
    found = [Finding("Layer 0 head 1 and layer 1 head 11 stand out.", (("text.0", 1), ("text.1", 11)), "m")]
    maps = MapPanel(
        title="m", rows=["a", "b"], columns=[str(h) for h in range(12)], sites=["text.0", "text.1"],
        values={"x": [[0.1 * h for h in range(12)]] * 2},
    )  # fmt: skip
    tab = show(Report(title="t", sections=[Section(title="s", findings=found, panels=[maps])]))
    tab.get_by_role("button", name="layer 1 head 11").click()
    tab.wait_for_selector('.head h2:text-is("Layer 1 head 11")')
    tab.get_by_role("button", name="Show 2 heads").click()
    assert tab.locator(".cell.marked").count() == 2
    tab.keyboard.press("Escape")
    assert tab.locator(".cell.marked").count() == 0


def test_by_keys_alone(watched, page, show):
    seen, _ = watched
    tab = show(page)
    tab.keyboard.press("/")
    tab.keyboard.type("1.1")
    tab.keyboard.press("Enter")
    opened(tab, "Layer 1 head 1")
    tab.keyboard.press("Escape")
    assert tab.evaluate("document.activeElement.getAttribute('aria-label')").startswith("Layer 1 head 1")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowUp")
    focused = tab.evaluate("document.activeElement.getAttribute('aria-label')")
    assert focused.startswith("Layer 0 head 2")
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.keyboard.press("Enter")
    opened(tab, "Layer 0 head 2")
    tab.locator(".text").focus()
    tab.keyboard.press("ArrowRight")
    at = int(tab.locator(".text .here").get_attribute("data-at"))
    best = int(seen.weights(0, 2)[at].argmax())
    assert max(told(tab), key=told(tab).get) == best
    tab.keyboard.press("/")
    tab.keyboard.type("7.77")
    tab.keyboard.press("Enter")
    assert "no head 7.77" in tab.locator(".status").inner_text()


def test_light_and_dark(page, show):
    def paper(tab):
        return sum(
            map(int, re.findall(r"\d+", tab.evaluate("getComputedStyle(document.body).backgroundColor"))[:3])
        )

    light, dark = show(page, color_scheme="light"), show(page, color_scheme="dark")
    assert paper(light) > 600 and paper(dark) < 150
    dark.locator("#theme").click()
    assert paper(dark) > 600
    light.emulate_media(color_scheme="dark")
    light.wait_for_function("document.documentElement.dataset.theme === 'dark'")
    assert paper(light) < 150


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_even_and_in_order(page, show, scheme):
    """Relative luminance of the scale's steps: always onward, no step much larger than the mean."""
    tab = show(page, color_scheme=scheme)
    ramp = re.findall(r"rgb\([^)]*\)", tab.evaluate("document.querySelector('.maps .ramp').style.background"))
    assert len(ramp) == 17
    light = [_lightness([int(x) for x in re.findall(r"\d+", colour)[:3]]) for colour in ramp]
    steps = [(b - a) * (1 if scheme == "dark" else -1) for a, b in pairwise(light)]
    assert min(steps) > 0
    assert max(steps) < 1.6 * sum(steps) / len(steps)


def _lightness(rgb):
    """CIE L* of a colour."""
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (v / 255 for v in rgb)]
    y = sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


def test_hostile_text_stays_text(show):
    words = [HOSTILE, "a", HOSTILE, " b"]
    weights = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.25, 0.5, 0], [0.1, 0.2, 0.3, 0.4]]
    section = Section(
        title=HOSTILE, short=HOSTILE, findings=[Finding(HOSTILE, (("text.0", 0),), HOSTILE)],
        panels=[
            PatternPanel(site="text.0", head=0, weights=weights, queries=words, keys=words),
            MapPanel(title=HOSTILE, rows=[HOSTILE], columns=[HOSTILE, "b"], values={HOSTILE: [[1.0, -2.0]]}),
            TablePanel(title=HOSTILE, table=Table({HOSTILE: [HOSTILE]}), note=HOSTILE),
            LinePanel(title=HOSTILE, x=[HOSTILE, "2"], lines={HOSTILE: [1.0, 2.0]}, x_label=HOSTILE),
            GraphPanel(title=HOSTILE, nodes=[Node(HOSTILE, 0), Node("b", 1)], links=[Link(HOSTILE, "b")]),
        ],
    )  # fmt: skip
    tab = show(Report(title=HOSTILE, facts=[HOSTILE], sections=[section]))
    opened(tab, "Layer 0 head 0")
    tab.locator(".text .token").nth(2).hover()
    assert tab.locator("img").count() == 0 and tab.locator("script").count() == 2
    body = tab.evaluate("document.body.innerText + document.body.innerHTML")
    assert not set("\u202e\u2066\u200b\x00") & set(body)
    text = tab.locator(".text .token").nth(2).inner_text()
    assert "<script>alert(1)</script>" in text and "U+202E" in text and "↵" in text
    assert told(tab) == pytest.approx({2: 0.5, 0: 0.25, 1: 0.25}, abs=0.005)


def test_in_a_notebook_cell(page, show, browser):
    cell = f"<main id='head'><p id='data'>a cell</p>{page._repr_html_()}</main>"
    tab = show(f"<!doctype html><meta charset=utf-8>{cell}")
    frame = tab.frame_locator("iframe")
    frame.locator('.cell[data-row="1"][data-head="1"]').click()
    frame.locator('.head h2:text-is("Layer 1 head 1")').wait_for()
    assert frame.locator(".text .token").count() == 40
    assert tab.locator("#data").inner_text() == "a cell"


def test_graphs_tables_lines_and_maps_answer(show):
    effect = [[0.5, -1.0], [0, 0.25]]
    maps = MapPanel(title="effect", rows=["l0", "l1"], columns=["The", "cat"], values={"effect": effect})
    heads = MapPanel(title="m", rows=["0"], columns=["0", "1"], sites=["text.0"], values={"x": [[1.0, 2.0]]})
    graph = GraphPanel(
        title="circuit", nodes=[Node("in", 0), Node("L0H1", 1, "0.1", ("text.0", 1)), Node("out", 2)],
        links=[Link("in", "L0H1", 0.8), Link("L0H1", "out", -0.3)],
    )  # fmt: skip
    table = TablePanel(
        title="rows", table=Table({"head": ["0.0", "0.1", "x"], "n": [2.0, 10.0, float("nan")]}),
        heads=[("text.0", 0), ("text.0", 1), None],
    )  # fmt: skip
    norms = {"first": [1.0, 100.0], "rest": [2.0, float("nan")]}
    lines = LinePanel(title="norms", x=["a", "b"], lines=norms, log=True)
    tab = show(Report(title="t", sections=[Section(title="s", panels=[maps, heads, graph, table, lines])]))
    tab.locator(".node.opens").click()
    tab.wait_for_selector('.head h2:text-is("Layer 0 head 1")')
    assert "-0.300" in tab.locator(".panel", has_text="circuit").locator("[role=status]").inner_text()
    tab.get_by_role("button", name="n", exact=True).click()
    assert tab.locator("td:first-child").all_inner_texts() == ["0.1", "0.0", "x"]
    tab.get_by_role("button", name="n", exact=True).click()
    assert tab.locator("td:first-child").all_inner_texts() == ["0.0", "0.1", "x"]
    tab.get_by_role("button", name="0.0", exact=True).click()
    tab.wait_for_selector('.head h2:text-is("Layer 0 head 0")')
    grid = tab.locator("canvas.grid")
    grid.focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    assert "cat" in tab.locator(".panel", has_text="effect").locator("[role=status]").inner_text()
    tab.locator("svg.lines").focus()
    tab.keyboard.press("ArrowRight")
    assert "first 100" in tab.locator(".panel", has_text="norms").locator("[role=status]").inner_text()


@pytest.mark.parametrize("width", [360, 1000, 1600])
def test_nothing_spills_over_the_side(page, show, width):
    tab = show(page, viewport={"width": width, "height": 800})
    opened(tab, tab.locator(".head h2").inner_text())
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
