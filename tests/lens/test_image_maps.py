"""Maps over images: of blocks with maps, of blocks with queries, of a vision transformer, against loops."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

import regard
from regard.attention.block import Block, Maps
from regard.errors import NoSuchSite, NothingObserved, RegardError, ShapeMismatch, UnsupportedModel
from regard.lens import Entropy, ImageMaps, SeenMaps
from regard.models.neighborhood import NATConfig, NATForImageClassification
from regard.runtime import load_seen
from regard.runtime.edits import ScaleHeads
from tests.support.families import FAMILIES


class Gate(Block):
    """A signed gate of its own for every channel, behind a batch norm."""

    shows = "maps"

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(5)
        self.mix = nn.Conv2d(5, 5, 3, padding=1)

    def forward(self, x):
        return x * self.mix(self.norm(x))

    def maps(self, x):
        return Maps(self.mix(self.norm(x)), "gate", "channel")


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 4, stride=4)
        self.first, self.second = Gate(), Gate()

    def forward(self, pixel_values):
        return self.second(self.first(self.stem(pixel_values)))


@pytest.fixture
def gated():
    torch.manual_seed(0)
    return Gated().eval()


@pytest.fixture(scope="module")
def nat():
    torch.manual_seed(0)
    config = NATConfig(embed_dim=8, depths=[1, 2], num_heads=[2, 4], kernel_size=3, num_labels=3)
    model = NATForImageClassification(config).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=24,
        patch_size=6, initializer_range=0.6,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def images(count, height=24, width=24, seed=1):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def watched(model, *batches, **options):
    with torch.no_grad(), regard.watch(model, ImageMaps(**options)) as seen:
        for batch in batches:
            model(batch)
    return seen[ImageMaps]


def rows_of(model, name, batch):
    """All rows that a block shows in a forward, [B, heads, N, N], and its planes."""
    found = []

    def look(block, args):
        grids = block.grids(args[0])
        found.append((block.rows(args[0], range(math.prod(grids[0]))), grids))

    handle = model.get_submodule(name).register_forward_pre_hook(look)
    with torch.no_grad():
        model(batch)
    handle.remove()
    return found[0]


def by_loop(rows, grids, pixels):
    """The numbers of one head by their formulas, one query at a time; rows [B, N, M]."""
    (qh, qw), (kh, kw) = grids
    sums = dict.fromkeys(("entropy", "sharpness", "distance", "border", "even", "off_image"), 0.0)
    for row in rows.flatten(0, 1):
        query = int(sums.setdefault("at", 0)) % (qh * qw)
        sums["at"] += 1
        share = row / row.sum()
        seen = [j for j in range(len(row)) if row[j] > 0]
        sums["entropy"] -= sum(float(share[j] * share[j].log()) for j in seen) / math.log(len(seen))
        sums["sharpness"] += float(share.max()) * len(seen)
        sums["off_image"] += 1 - float(row.sum())
        y, x = ((query // qw + 0.5) * pixels[0] / qh, (query % qw + 0.5) * pixels[1] / qw)
        for j in range(len(row)):
            there = ((j // kw + 0.5) * pixels[0] / kh, (j % kw + 0.5) * pixels[1] / kw)
            sums["distance"] += float(share[j]) * math.hypot(y - there[0], x - there[1])
            edge = j // kw in (0, kh - 1) or j % kw in (0, kw - 1)
            sums["border"] += float(share[j]) * edge
            sums["even"] += (row[j] > 0) * edge / len(seen)
    count = sums.pop("at")
    border = sums.pop("border") / sums.pop("even")
    return {name: float(value) / count for name, value in sums.items()} | {"border": float(border)}


def test_a_block_with_queries(nat):
    batch = images(2, 24, 32)
    found = watched(nat, batch)
    assert list(found.sites) == ["image.0", "image.1", "image.2"]
    for alias, name in (("image.0", "levels.0.blocks.0.attn"), ("image.2", "levels.1.blocks.1.attn")):
        rows, grids = rows_of(nat, name, batch)
        mean = rows.mean((0, 2)).unflatten(-1, grids[1])
        torch.testing.assert_close(found.site(alias).mean, mean, rtol=0, atol=1e-6)
        told = by_loop(rows[:, 1], grids, (24, 32))
        known = found.heads.at(alias, 1)
        for column, value in told.items():
            if column in known:
                assert known[column] == pytest.approx(value, rel=1e-4), (alias, column)
    assert "off_image" not in found.heads.columns
    assert found.site(0).kind == "probability" and found.site(0).head == "head"


def test_rows_of_positions_by_pixel(nat):
    batch = images(1, 24, 32)
    rows, grids = rows_of(nat, "levels.0.blocks.0.attn", batch)
    found = watched(nat, batch)
    for at in ((0, 0), (13.4, 30.9), (23, 31)):
        query = int(at[0] // 4) * grids[0][1] + int(at[1] // 4)
        expected = rows[0, 1, query].unflatten(-1, grids[1])
        torch.testing.assert_close(found.rows(0, 1, at), expected, rtol=0, atol=1e-3)
    fewer = watched(nat, batch, positions=6).site(0)
    assert 0 < len(fewer.at) <= 6 and fewer.rows[0].shape == (2, len(fewer.at), 6, 8)
    torch.testing.assert_close(
        fewer.rows[0].flatten(2), rows[0][:, list(fewer.at)].half().float(), rtol=0, atol=1e-3
    )
    assert watched(nat, batch, positions=0).site(0).rows == ()


def test_a_vision_transformer(vit):
    batch = images(2)
    found = watched(vit, batch)
    with torch.no_grad():
        vit.set_attn_implementation("eager")
        dense = vit(batch, output_attentions=True).attentions
        vit.set_attn_implementation("sdpa")
    for layer, weights in enumerate(dense):
        rows = weights[:, :, 1:, 1:]
        mean = rows.mean((0, 2)).unflatten(-1, (4, 4))
        torch.testing.assert_close(found.site(layer).mean, mean, rtol=0, atol=1e-6)
        told = by_loop(rows[:, 0], ((4, 4), (4, 4)), (24, 24))
        known = found.heads.at(f"vision.{layer}", 0)
        assert told.keys() <= known.keys()
        for column, value in told.items():
            assert known[column] == pytest.approx(value, rel=1e-4), column
        class_token = weights[0, 1, 0, 1:].unflatten(-1, (4, 4))
        torch.testing.assert_close(found.rows(layer, 1), class_token, rtol=0, atol=1e-3)
        torch.testing.assert_close(
            found.rows(layer, 1, (7, 20)), weights[0, 1, 1 + 7, 1:].unflatten(-1, (4, 4)), rtol=0, atol=1e-3
        )


def test_a_gate_is_signed(gated):
    batch = images(3, 20, 28)
    found = watched(gated, batch, images=2)
    with torch.no_grad():
        gates = gated.first.maps(gated.stem(batch)).values
    assert found.site(0).kind == "gate" and found.site(0).head == "channel" and found.site(0).rows == ()
    torch.testing.assert_close(found.site(0).mean, gates.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.map(0, 3, 1), gates[1, 3], rtol=0, atol=1e-6)
    share = gates.abs() / gates.abs().sum((2, 3), keepdim=True)
    edge = torch.ones(5, 7).bool()
    edge[1:-1, 1:-1] = False
    told = {
        "negative": (share * (gates < 0)).sum((2, 3)).mean(0), "size": gates.abs().mean((0, 2, 3)),
        "entropy": -(share * share.log()).sum((2, 3)).mean(0) / math.log(35),
        "sharpness": 35 * share.amax((2, 3)).mean(0),
        "border": share[:, :, edge].sum(-1).mean(0) / edge.float().mean(),
        "varies": 1 - gates.mean(0).square().sum((1, 2)) / gates.square().mean(0).sum((1, 2)),
    }  # fmt: skip
    assert set(found.heads.columns) == set(told)
    for column, values in told.items():
        for channel in range(5):
            assert found.heads.at("image.0", channel)[column] == pytest.approx(
                float(values[channel]), rel=1e-4
            )
    with pytest.raises(NothingObserved, match=r"one map a channel and no rows; use map\(\)"):
        found.rows(0, 0, (1, 1))


@pytest.mark.parametrize("model", ["nat", "vit", "gated"])
def test_a_batch_is_its_images_and_sessions_merge(model, request, tmp_path):
    model = request.getfixturevalue(model)
    batch = images(3)
    together, apart = watched(model, batch, images=3), watched(model, *batch.split(1), images=3)
    with torch.no_grad(), regard.watch(model, ImageMaps(images=3)) as seen:
        model(batch[:2])
    seen.save(str(tmp_path / "seen.safetensors"))
    merged = load_seen(tmp_path / "seen.safetensors")["ImageMaps"]
    with torch.no_grad(), regard.watch(model, ImageMaps()) as more:
        model(batch[2:])
    merged.merge(more.lens(ImageMaps))
    for other in (apart, merged.result()):
        assert list(other.sites) == list(together.sites)
        for alias, maps in together.sites.items():
            torch.testing.assert_close(other.sites[alias].mean, maps.mean, rtol=1e-5, atol=1e-7)
            assert len(maps.images) == len(other.sites[alias].images) == 3 == maps.seen
            for one, two in zip(maps.images, other.sites[alias].images, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
            for one, two in zip(maps.rows, other.sites[alias].rows, strict=True):
                torch.testing.assert_close(one, two, rtol=0, atol=1e-3)
        for column, values in together.heads.columns.items():
            assert other.heads.columns[column] == pytest.approx(values, rel=1e-4, abs=1e-6)
        for one, two in zip(together.pixels, other.pixels, strict=True):
            assert torch.equal(one, two)


def test_the_same_image_twice_does_not_vary(nat):
    image = images(1)
    assert "varies" not in watched(nat, image).heads.columns
    again = watched(nat, image, image).heads["varies"]
    assert abs(again).max() < 1e-6
    assert watched(nat, image, images(1, seed=9)).heads["varies"].min() > 1e-4


def test_padding_around_a_small_map_is_not_shown():
    torch.manual_seed(0)
    config = NATConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 4], kernel_size=5, num_labels=3)
    model = NATForImageClassification(config).eval()
    found = watched(model, images(1, 24, 40))
    assert found.site(1).mean.shape == (4, 3, 5) and found.site(1).queries == (3, 5)
    rows, grids = rows_of(model, "levels.1.blocks.0.attn", images(1, 24, 40))
    assert grids[1] == (5, 5)
    inside = rows.unflatten(2, (5, 5)).unflatten(-1, (5, 5))[:, :, :3, :, :3, :]
    torch.testing.assert_close(found.site(1).mean, inside.mean((0, 2, 3)), rtol=0, atol=1e-6)
    assert found.heads.at("image.1", 0)["off_image"] == pytest.approx(
        1 - float(inside[:, 0].sum((-1, -2)).mean()), rel=1e-4
    )


def test_looking_changes_nothing_in_training(gated):
    gated.train()
    twin = Gated()
    twin.load_state_dict(gated.state_dict())
    torch.manual_seed(3)
    with regard.watch(gated, ImageMaps()) as seen:
        out = gated(images(2))
    out.sum().backward()
    expected = twin(images(2))
    expected.sum().backward()
    assert torch.equal(out, expected) and gated.first.training
    for (name, one), two in zip(gated.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    for one, two in zip(gated.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)
    assert seen.called == {"image.0": 1, "image.1": 1}
    assert not gated.first._forward_pre_hooks


@pytest.mark.parametrize("model", ["nat", "vit", "gated"])
def test_bfloat16_stays_near_float32(model, request):
    model = request.getfixturevalue(model)
    batch = images(2).bfloat16()
    expected = watched(model, batch.float())
    found = watched(copy.deepcopy(model).bfloat16(), batch)
    for column, values in expected.heads.columns.items():
        if column != "varies":
            assert found.heads[column] == pytest.approx(values, rel=0.1, abs=0.02), column
    for alias, maps in expected.sites.items():
        assert found.sites[alias].mean.dtype == torch.float32
        most = float(maps.mean.abs().max())
        torch.testing.assert_close(found.sites[alias].mean, maps.mean, rtol=0.1, atol=0.05 * most)


def test_layers_can_be_chosen_and_a_run_repeated(nat):
    with torch.no_grad(), regard.watch(nat, ImageMaps(), layers=[1]) as seen:
        nat(images(2))
    assert list(seen[ImageMaps].sites) == ["image.1"]
    again = seen.again(ImageMaps(images=2, positions=4)).result()
    assert len(again.sites) == 3 and len(again.pixels) == 2
    torch.testing.assert_close(again.site(1).mean, seen[ImageMaps].site(1).mean)


def test_findings_name_what_has_a_map(gated, nat):
    said = [f.text for f in ImageMaps.findings(watched(gated, images(2)))]
    assert any("channel" in text for text in said) and not any("head" in text for text in said)
    found = watched(nat, images(2))
    furthest = found.heads.top("distance", 1)[0]
    text = next(f for f in ImageMaps.findings(found) if "pixels away" in f.text)
    assert text.heads[0] == furthest[:2]
    assert f"ayer {furthest[0][-1]} head {furthest[1]} looks furthest, {furthest[2]:.3g} pixels" in text.text


def test_other_lenses_and_edits_are_refused_on_blocks(nat):
    with pytest.raises(UnsupportedModel, match="Entropy needs .* look at it with regard.lens.ImageMaps"):
        regard.watch(nat, ImageMaps(), Entropy())
    with pytest.raises(UnsupportedModel, match="ScaleHeads needs attention between tokens"):
        regard.steer(nat, ScaleHeads(heads=[(0, 0)]))
    with torch.no_grad(), regard.watch(nat, ImageMaps()) as seen:
        nat(images(1))
    with pytest.raises(RegardError, match="keep its maps with regard.lens.ImageMaps"):
        seen.weights(0, 0)


def test_what_has_no_map_says_what_is_needed():
    config = SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1], num_heads=[2], window_size=4)
    swin = SwinForImageClassification(config)
    llama = FAMILIES["llama"].build()
    for model, given in ((swin, images(1, 32, 32)), (llama, torch.arange(5, 12)[None])):
        with torch.no_grad(), regard.watch(model, ImageMaps()) as seen:
            model(given)
        with pytest.raises(
            NothingObserved, match="ImageMaps has seen nothing: it takes a model whose blocks"
        ):
            seen[ImageMaps]


def test_refusals(nat):
    found = watched(nat, images(1))
    assert isinstance(found, SeenMaps)
    for call, error, said in (
        (lambda: found.map(7, 0), NoSuchSite, "no map of image.7 was seen"),
        (lambda: found.map("vision.0", 0), NoSuchSite, "there are those of image.0"),
        (lambda: found.map(0, 2), NoSuchSite, "has no head 2; it has 0 to 1"),
        (lambda: found.map(0, 0, 1), NothingObserved, "1 were kept"),
        (lambda: found.rows(0, 0, (24, 0)), RegardError, "within 24 x 24 pixels"),
        (lambda: found.rows(0, 0), NoSuchSite, "0 tokens that are no position"),
        (lambda: watched(nat, images(1), images(1, 32, 32)), ShapeMismatch, "different width"),
        (lambda: ImageMaps(images=-1), RegardError, "images is -1"),
        (lambda: ImageMaps(positions=2.5), RegardError, "positions is 2.5"),
    ):
        with pytest.raises(error, match=said):
            call()


def test_a_picture(nat, gated, tmp_path):
    found = watched(nat, images(1))
    found.draw(0, 1, path=tmp_path / "map.png")
    found.draw(0, 1, at=(3, 4), path=tmp_path / "row.png")
    assert (tmp_path / "map.png").stat().st_size > 5000
    assert (tmp_path / "map.png").read_bytes() != (tmp_path / "row.png").read_bytes()
    figure = watched(gated, images(1)).draw(0, 1)
    low, high = figure.axes[1].images[-1].get_clim()
    assert low == -high < 0


def test_sessions_nest_and_leave_nothing_behind(nat):
    with torch.no_grad(), regard.watch(nat, ImageMaps()) as outer:
        nat(images(1))
        with regard.watch(nat, ImageMaps()) as inner:
            nat(images(1))
            copy.deepcopy(nat)(images(1))
        nat(images(1))
    assert (outer[ImageMaps].site(0).seen, inner[ImageMaps].site(0).seen) == (3, 1)
    with pytest.raises(ShapeMismatch), regard.watch(nat, ImageMaps()):
        nat(images(1)[0])
    assert not any(module._forward_pre_hooks for module in nat.modules()) and "forward" not in vars(nat)
