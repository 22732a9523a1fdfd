"""Pages of image models: what is in the file, and in a real browser what is shown, by mouse and by keys."""

import base64
import re
import zlib

import numpy as np
import pytest
import torch

import regard
from regard import report
from regard.errors import NoSuchSite, ShapeMismatch
from regard.lens import ImageMaps
from regard.report import Report, Section
from regard.runtime.findings import Finding
from regard.runtime.image_panel import ImagePanel
from regard.runtime.panels import MapPanel
from tests.lens.test_image_maps import Gated, images
from tests.lens.test_image_maps import nat as nat
from tests.lens.test_image_maps import vit as vit


@pytest.fixture(scope="module")
def looked(vit):
    with torch.no_grad(), regard.watch(vit, ImageMaps(images=2)) as seen:
        vit(images(3))
    return seen


@pytest.fixture(scope="module")
def page(looked):
    return report.build(looked, title="tiny")


def opened(part, shape, signed=False):
    """The numbers of coded maps, as the page computes them."""
    codes = np.frombuffer(zlib.decompress(base64.b64decode(part["data"])), np.int8 if signed else np.uint8)
    share = codes.astype(np.float64) / (127 if signed else 255)
    scales = np.array(part["scales"]).reshape(-1, *[1] * (len(shape) - 1))
    return (np.sign(share) * share**2).reshape(shape) * scales


def test_the_file_holds_maps_rows_and_images(looked, page, data_of):
    data = data_of(page.html())
    found = looked[ImageMaps]
    assert [site["alias"] for site in data["sites"]] == ["vision.0", "vision.1"]
    assert all(site["labels"] is None for site in data["sites"]) and len(data["images"]["pictures"]) == 2
    for row, layer in enumerate(data["images"]["layers"]):
        assert layer["row"] == row and layer["grid"] == [4, 4] and layer["at"] == list(range(16))
        for image in range(2):
            kept = found.site(row).images[image].numpy()
            most = np.abs(kept).max((1, 2), keepdims=True)
            assert (np.abs(opened(layer["maps"][image], kept.shape) - kept) <= 0.004 * most).all()
            rows = found.site(row).rows[image].numpy()
            assert np.abs(opened(layer["rows"][image], rows.shape) - rows).max() <= 0.004 * rows.max()
            mean = opened(layer["mean"][image], (1, 4, 4))[0]
            assert np.abs(mean - kept.mean(0)).max() <= 0.005 * mean.max()
    picture = data["images"]["pictures"][1]
    codes = np.frombuffer(zlib.decompress(base64.b64decode(picture["data"])), np.uint8)
    pixels = images(3)[1]
    spread = ((pixels - pixels.min()) / (pixels.max() - pixels.min())).permute(1, 2, 0)
    assert np.abs(codes.reshape(24, 24, 3) / 255 - spread.numpy()).max() <= 0.003


def test_of_many_channels_those_named_and_those_that_vary_most_are_kept(data_of):
    torch.manual_seed(0)
    maps = torch.randn(1, 60, 5, 7).mul(torch.linspace(0.1, 2, 60)[:, None, None])
    maps[0, 3] = 0
    values = {"size": np.arange(60.0)[None]}
    section = Section(
        title="one", findings=[Finding("Layer 0 channel 3 is silent.", (("image.0", 3),), "m")],
        panels=[
            ImagePanel(site="image.0", kind="gate", head="channel", maps=maps.numpy()),
            MapPanel(
                title="m", rows=["0"], columns=[str(h) for h in range(60)], sites=["image.0"], values=values
            ),
        ],
    )  # fmt: skip
    data = data_of(Report(title="t", sections=[section]).html())
    (site,) = data["sites"]
    spread = maps[0].std((1, 2))
    expected = sorted({3, *spread.argsort(descending=True)[:23].tolist()})
    assert site["labels"] == [f"channel {n}" for n in expected] and site["heads"] == 24
    assert data["maps"][0]["quantities"][0]["values"] == [expected]
    assert data["sections"][0]["findings"][0]["heads"] == [[0, expected.index(3)]] and data["across"] == 24
    layer = data["images"]["layers"][0]
    kept = maps[0, expected].numpy()
    assert layer["signed"] and layer["of"] == 60
    assert (
        np.abs(opened(layer["maps"][0], kept.shape, signed=True) - kept).max() <= 0.008 * np.abs(kept).max()
    )


def test_positions_are_thinned_until_they_fit(data_of):
    rows = np.random.default_rng(0).random((8, 28 * 28, 28, 28)).astype(np.float32)
    panel = ImagePanel(
        site="image.0", kind="probability", maps=[rows.mean(1)], rows=[rows], queries=(28, 28), at=range(784)
    )
    html = Report(title="t", sections=[Section(title="one", panels=[panel])]).html()
    layer = data_of(html)["images"]["layers"][0]
    assert len(html) < 3_000_000 and 40 < len(layer["at"]) < 784
    down = sorted({at // 28 for at in layer["at"]})
    assert len(set(np.diff(down))) == 1 and len(layer["at"]) == len(down) ** 2
    found = opened(layer["rows"][0], (8, len(down) ** 2, 28, 28))
    assert np.abs(found - rows[:, layer["at"]]).max() < 0.005


def test_a_session_without_the_lens_is_run_again(nat, data_of):
    with torch.no_grad(), regard.watch(nat) as seen:
        nat(images(2))
    page = report.build(seen, heads=[(1, 2)])
    data = data_of(page.html())
    assert "2 images" in page.html() and len(data["images"]["pictures"]) == 2 and data["opens"] == [1, 2, 0]
    with pytest.raises(NoSuchSite):
        report.build(seen, heads=[(1, 9)])


def test_panels_that_do_not_fit_are_refused():
    maps = np.zeros((2, 3, 4))
    for given in (
        {"maps": []}, {"maps": [maps[0]]}, {"maps": [maps, maps[:1]]},
        {"maps": [maps], "rows": [np.zeros((2, 5, 3, 4))], "at": range(4), "queries": (3, 4)},
    ):  # fmt: skip
        with pytest.raises(ShapeMismatch):
            ImagePanel(site="image.0", kind="gate", **given)


def place_of(tab, number, down, across, grid):
    """The middle of a position of a canvas, in pixels of the window."""
    box = tab.locator("canvas.plane").nth(number).evaluate("node => node.getBoundingClientRect().toJSON()")
    return (
        box["x"] + (across + 0.5) * box["width"] / grid[1],
        box["y"] + (down + 0.5) * box["height"] / grid[0],
    )


def point(tab, *where):
    """Point at a position, again where the page was drawn anew meanwhile."""
    for _ in range(50):
        tab.mouse.move(1, 1)
        tab.mouse.move(*place_of(tab, *where))
        if tab.locator(".plane-readout b").count():
            return
        tab.wait_for_timeout(50)


def value(tab):
    return float(tab.locator(".plane-readout b").inner_text().replace(",", ""))


def test_pointing_tells_the_models_numbers(looked, page, show):
    found = looked[ImageMaps]
    tab = show(page)
    tab.locator('.cell[data-row="1"][data-head="1"]').click()
    tab.wait_for_selector('.head h2:text-is("Layer 1 head 1")')
    point(tab, 1, 2, 3, (4, 4))
    assert "row 2, column 3" in tab.locator(".plane-readout").inner_text()
    most = float(found.map(1, 1, 0).max())
    assert value(tab) == pytest.approx(float(found.map(1, 1, 0)[2, 3]), abs=0.006 * most)
    tab.mouse.click(*place_of(tab, 0, 0, 1, (4, 4)))
    tab.wait_for_selector('button[aria-pressed="true"]:text-is("from a position")')
    point(tab, 1, 3, 3, (4, 4))
    row = found.rows(1, 1, (3, 9))
    assert "from position 0, 1" in tab.locator(".plane-readout").inner_text()
    assert value(tab) == pytest.approx(float(row[3, 3]), abs=0.006 * float(row.max()) + 1e-3)
    tab.get_by_role("button", name="from the class token").click()
    point(tab, 1, 1, 1, (4, 4))
    own = found.rows(1, 1)
    assert value(tab) == pytest.approx(float(own[1, 1]), abs=0.006 * float(own.max()) + 1e-3)
    tab.get_by_role("button", name="received by each position").click()
    tab.get_by_role("button", name="image 2").click()
    tab.wait_for_selector('button[aria-pressed="true"]:text-is("image 2")')
    point(tab, 1, 2, 3, (4, 4))
    assert value(tab) == pytest.approx(float(found.map(1, 1, 1)[2, 3]), abs=0.006 * most)


def test_by_keys_alone(looked, page, show):
    found = looked[ImageMaps]
    tab = show(page)
    tab.keyboard.press("/")
    tab.keyboard.type("0.1")
    tab.keyboard.press("Enter")
    tab.wait_for_selector('.head h2:text-is("Layer 0 head 1")')
    tab.locator("canvas.plane").first.focus()
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for key in ("ArrowDown", "ArrowRight"):
        tab.keyboard.press(key)
    assert "row 3, column 3" in tab.locator(".plane-readout").inner_text()
    most = float(found.map(0, 1, 0).max())
    assert value(tab) == pytest.approx(float(found.map(0, 1, 0)[3, 3]), abs=0.006 * most)
    tab.keyboard.press("Enter")
    tab.wait_for_selector('button[aria-pressed="true"]:text-is("from a position")')
    assert "from position 3, 3" in tab.locator(".plane-readout").inner_text()
    assert tab.evaluate("document.activeElement.tagName") == "CANVAS"
    tab.locator(".thumb").first.focus()
    tab.keyboard.press("Enter")
    tab.wait_for_selector('.head h2:text-is("Layer 0 head 0")')
    assert tab.evaluate("document.activeElement.getAttribute('aria-label')") == "Layer 0 head 0"
    tab.keyboard.press("Escape")
    focused = tab.evaluate("document.activeElement.getAttribute('aria-label')")
    assert focused.startswith("Layer 0 head 0")


def test_a_gate_diverges_from_zero_in_both_themes(show):
    torch.manual_seed(0)
    model = Gated().eval()
    with torch.no_grad(), regard.watch(model, ImageMaps()) as seen:
        model(images(1))
    gates = seen[ImageMaps]
    for scheme in ("light", "dark"):
        tab = show(report.build(seen), color_scheme=scheme)
        tab.locator('.cell[data-row="0"][data-head="2"]').click()
        tab.wait_for_selector('.head h2:text-is("Layer 0 channel 2")')
        words = tab.locator(".planes .legend").inner_text()
        low, high = (float(x) for x in re.findall(r"-?\d+\.\d+", words)[:2])
        most = float(gates.map(0, 2, 0).abs().max())
        assert low == -high and high == pytest.approx(most, rel=0.01) and "no probabilities" in words
        at = divmod(int(gates.map(0, 2, 0).argmin()), 6)
        point(tab, 1, *at, (6, 6))
        assert value(tab) == pytest.approx(float(gates.map(0, 2, 0).min()), abs=0.01 * most)
        assert tab.get_by_role("button", name="from a position").count() == 0
        tab.get_by_role("button", name="whole layer").click()
        high = float(re.findall(r"\d+\.\d+", tab.locator(".planes .legend").inner_text())[1])
        assert high == pytest.approx(float(gates.site(0).images[0].abs().max()), rel=0.01)


def test_the_colours_of_a_map_are_those_of_its_scale(looked, page, show):
    tab = show(page)
    tab.locator('.cell[data-row="0"][data-head="0"]').click()
    tab.wait_for_selector('.head h2:text-is("Layer 0 head 0")')
    tab.locator("input[type=range]").fill("0")
    values = looked[ImageMaps].map(0, 0, 0)
    pixels = tab.evaluate(
        """() => { const c = document.querySelectorAll('canvas.plane')[1];
        return [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]; }"""
    )
    drawn = np.array(pixels[2]).reshape(pixels[1], pixels[0], 4)[..., :3].sum(-1)
    light = {
        at: int(drawn[int((at[0] + 0.5) * pixels[1] / 4), int((at[1] + 0.5) * pixels[0] / 4)])
        for at in np.ndindex(4, 4)
    }
    order = sorted(light, key=lambda at: float(values[at]))
    assert light[order[-1]] < light[order[0]] - 100
    steps = [light[order[i]] - light[order[i + 1]] for i in range(15)]
    assert min(steps) > -25


@pytest.mark.parametrize("width", [360, 1000, 1600])
def test_nothing_spills_over_the_side(page, show, width):
    tab = show(page, viewport={"width": width, "height": 800})
    tab.wait_for_selector("canvas.plane")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
