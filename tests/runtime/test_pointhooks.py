"""Hooks at points: where they stand, in which order they serve, and that none is left."""

import pytest
import torch

import regard
from regard.errors import UnsupportedModel
from regard.runtime import Edit, Lens, Point
from regard.runtime.attachment import close_attachment, open_attachment
from tests.support.families import FAMILIES

IDS = torch.arange(5, 14)[None]
ALL = ("embedding", "residual_pre", "residual", "attention", "mlp", "final_norm", "logits")


class Norms(Lens):
    """Notes the size of what is at every point."""

    def points(self, anatomy):
        once = ("embedding", "final_norm", "logits")
        return [Point(kind, None if kind in once else 1) for kind in ALL]

    def hidden(self, point, x, run):
        self.tally.append(run_site, point.kind, x.norm().item())

    def result(self):
        return {kind: self.tally.get(kind)["text.0"] for kind in ALL}


class Double(Edit):
    def __init__(self, kind, layer=None):
        object.__setattr__(self, "point", Point(kind, layer))

    def points(self, anatomy):
        return [self.point]

    def hidden(self, point, x, run):
        return x * 2


class _Place:
    alias, kind, layer, name = "text.0", "text", 0, ""


run_site = _Place()


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build()


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_each_point_is_the_tensor_it_says(llama):
    with torch.no_grad(), regard.watch(llama, Norms()) as seen:
        out = llama(IDS, output_hidden_states=True)
    found = seen[Norms]
    assert all(len(values) == 1 for values in found.values())
    embedded, middle, last = out.hidden_states
    expected = {"embedding": embedded, "residual_pre": middle, "final_norm": last, "logits": out.logits}
    for kind, x in expected.items():
        assert found[kind][0] == pytest.approx(x.norm().item(), rel=1e-5), kind


@pytest.mark.parametrize("kind", ["residual_pre", "attention", "mlp", "residual", "logits"])
def test_lenses_see_what_edits_left_and_before_what_arrived(llama, kind):
    edit = Double(kind, None if kind == "logits" else 1)
    with torch.no_grad(), regard.watch(llama, Norms()) as plain:
        llama(IDS)
    with (
        torch.no_grad(),
        regard.steer(llama, edit, Norms(name="after"), Norms(name="before", before=True)) as seen,
    ):
        llama(IDS)
    arrived = plain[Norms][kind][0]
    assert seen["before"][kind][0] == pytest.approx(arrived, rel=1e-5)
    assert seen["after"][kind][0] == pytest.approx(2 * arrived, rel=1e-5)


def test_edits_of_one_point_compose(llama):
    with torch.no_grad():
        plain = llama(IDS).logits
        with regard.steer(llama, Double("logits"), Double("logits")):
            torch.testing.assert_close(llama(IDS).logits, 4 * plain)
        assert torch.equal(llama(IDS).logits, plain)


def test_only_the_points_asked_for_have_hooks_and_none_stays(llama):
    before = hooks(llama)
    with regard.watch(llama, Norms()):
        assert hooks(llama) == before + len(ALL)
        with regard.steer(llama, Double("mlp", 0), Double("mlp", 0)):
            assert hooks(llama) == before + len(ALL) + 1
            llama(IDS)
        assert hooks(llama) == before + len(ALL)
        llama(IDS)
    assert hooks(llama) == before


def test_layers_narrow_the_points_of_a_lens(llama):
    with torch.no_grad(), regard.watch(llama, Norms(), layers=[0]) as seen:
        llama(IDS)
    kept = seen.lens(Norms).tally
    assert kept.get("embedding") and not kept.get("mlp")


def test_logits_of_a_router_that_has_chosen_already_are_refused():
    model = FAMILIES["mixtral"].build()
    with pytest.raises(UnsupportedModel, match="experts it chose"), regard.steer(model, Double("router", 0)):
        model(IDS)


def test_an_attachment_lives_as_long_as_its_sessions(llama):
    one, two = open_attachment(llama), open_attachment(llama)
    assert one is two and one.sessions == 2 and llama.config._attn_implementation == "regard"
    close_attachment(one)
    assert llama.config._attn_implementation == "regard"
    close_attachment(two)
    assert llama.config._attn_implementation == "eager" and "forward" not in vars(llama)
    third = open_attachment(llama)
    assert third is not one
    close_attachment(third)
