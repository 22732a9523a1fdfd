"""EditWeights and ForceAttention against attention written out."""

import pytest
import torch

import regard
from regard.edit import EditWeights, ForceAttention, ScaleHeads
from regard.errors import NoSuchSite, RegardError, ShapeMismatch
from regard.runtime import Lens
from tests.edit.plain import changed, close, logits, visible
from tests.support.families import FAMILIES

PADDINGS = ("none", "left", "right")


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build("sdpa")


class Weights(Lens):
    """Keeps the whole weights of each call."""

    def weights(self, block):
        whole = block.weights.new_zeros(*block.weights.shape[:3], block.call.key_length)
        whole[..., block.key_start : block.key_stop] = block.weights
        self.tally.append(block.site, "weights", whole)

    def result(self):
        return self.tally.get("weights")


def steered(model, inputs, *edits):
    with regard.steer(model, *edits):
        return logits(model, inputs)


def sharpened(weights, *_):
    power = weights.square()
    return power / power.sum(-1, keepdim=True).clamp_min(1e-9)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt-oss"])
def test_any_function_of_rows(name, padding):
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model, padding)

    def by_hand(layer, weights, module):
        if layer == 1:
            weights[:, [0, 3]] = sharpened(weights[:, [0, 3]])
        return weights

    with changed(model, weights=by_hand):
        expected = logits(model, inputs)
    assert close(steered(model, inputs, EditWeights(sharpened, layers=[1], heads=[0, 3])), expected)
    with changed(model, weights=lambda layer, weights, module: sharpened(weights)):
        everywhere = logits(model, inputs)
    assert close(steered(model, inputs, EditWeights(sharpened)), everywhere)
    assert not close(expected, everywhere, 1e-3)


def test_the_function_sees_chosen_heads_in_the_order_given(llama):
    inputs = FAMILIES["llama"].inputs(llama)
    with regard.watch(llama, Weights()) as seen:
        logits(llama, inputs)
    plain, given = seen[Weights]["text.0"][0], []

    def swapped(weights, block):
        assert block.site.alias == "text.0" and weights.dtype == torch.float32
        given.append(weights.clone())
        return weights.flip(1)

    with regard.steer(llama, EditWeights(swapped, layers=["text.0"], heads=[3, 1]), Weights()) as seen:
        logits(llama, inputs)
    assert torch.allclose(given[0], plain[:, [3, 1]], atol=1e-6)
    assert torch.allclose(seen[Weights]["text.0"][0], plain[:, [0, 3, 2, 1]], atol=1e-6)


def test_edits_apply_in_the_order_given(llama):
    inputs = FAMILIES["llama"].inputs(llama)
    double = EditWeights(lambda w, block: 2 * w, layers=[0], heads=[2])
    shift = EditWeights(lambda w, block: w + 1, layers=[0], heads=[1, 2])
    found = {}
    for name, edits in {"shift last": (double, shift), "double last": (shift, double)}.items():
        with regard.steer(llama, *edits, Weights()) as seen:
            logits(llama, inputs)
        found[name] = seen[Weights]["text.0"][0]
    assert torch.allclose(found["double last"][:, 2], found["shift last"][:, 2] + 1, atol=1e-6)
    assert torch.allclose(found["double last"][:, 1], found["shift last"][:, 1], atol=1e-6)


def test_gradients_flow_through_a_function(llama):
    inputs = FAMILIES["llama"].inputs(llama)
    sharpness = torch.tensor(1.0, requires_grad=True)

    def powered(weights, block):
        power = weights.clamp_min(1e-9) ** sharpness
        return power / power.sum(-1, keepdim=True)

    def loss():
        with regard.steer(llama, EditWeights(powered, layers=[0], heads=[1])):
            return llama(**inputs).logits.square().mean()

    (grad,) = torch.autograd.grad(loss(), sharpness)
    ends = []
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            sharpness.fill_(1.0 + step)
            ends.append(loss().item())
    assert grad.item() == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=2e-2)


def test_padding_and_positions_are_told(llama):
    inputs = FAMILIES["llama"].inputs(llama, "left")

    def first_only(weights, block):
        first = (block.key_positions == 0)[:, None, None, :] & block.valid_keys[:, None, None, :]
        seen = block.valid_rows[:, None, :, None]
        return torch.where(seen, first.to(weights.dtype), weights)

    forced = ForceAttention([(1, head) for head in range(4)], to="first")
    edited = steered(llama, inputs, EditWeights(first_only, layers=[1]))
    assert close(edited, steered(llama, inputs, forced))


def target(rows, keys, to, pad):
    """The key that each row is forced to, by array index, as 0 or 1 [rows, keys]."""
    found = torch.zeros(rows, keys)
    for row in range(rows):
        key = {"first": pad, "self": row, "previous": row - 1}.get(to)
        key = pad + to if key is None else key
        if pad <= key <= row:
            found[row, key] = 1
    return found


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("to", ["first", "self", "previous", 4])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_forcing_equals_the_definition(llama, padding, to, strength):
    inputs = FAMILIES["llama"].inputs(llama, padding)
    pads = [3 if padding == "left" else 0, 0]
    wanted = torch.stack([target(9, 9, to, pad) for pad in pads])
    wanted = wanted * visible(inputs)[:, 0]

    def by_hand(layer, weights, module):
        if layer == 0:
            reached = wanted.sum(-1, keepdim=True) > 0
            mixed = (1 - strength) * weights[:, 2] + strength * wanted
            weights[:, 2] = torch.where(reached, mixed, weights[:, 2])
        return weights

    with changed(llama, weights=by_hand):
        expected = logits(llama, inputs)
    edit = ForceAttention([(0, 2)], to=to, strength=strength)
    assert close(steered(llama, inputs, edit), expected)


def test_forcing_by_a_function_of_positions_or_keys(llama):
    inputs = FAMILIES["llama"].inputs(llama, "left")
    heads = [(1, 0), (1, 3)]
    expected = steered(llama, inputs, ForceAttention(heads, to="previous"))
    by_position = ForceAttention(heads, to=lambda block: block.query_positions - 1)

    def keys(block):
        return block.key_positions[:, None, :] == block.query_positions[:, :, None] - 1

    assert close(steered(llama, inputs, by_position), expected)
    assert close(steered(llama, inputs, ForceAttention(heads, to=keys)), expected)


def test_several_keys_share_what_is_forced(llama):
    inputs = FAMILIES["llama"].inputs(llama)

    def even(block):
        return (block.key_positions % 2 == 0)[:, None, :].expand(-1, block.stop - block.start, -1)

    with regard.steer(llama, ForceAttention([(0, 1)], to=even), Weights()) as seen:
        logits(llama, inputs)
    rows = torch.arange(9)[:, None]
    share = (torch.arange(9) % 2 == 0) * (torch.arange(9) <= rows) / (rows // 2 + 1)
    assert torch.allclose(seen[Weights]["text.0"][0][:, 1], share.expand(2, 9, 9))


def test_forcing_stays_in_the_window():
    """Mistral sees four keys here: a row that cannot see the first token is left as it was."""
    family = FAMILIES["mistral"]
    model = family.build()
    inputs = family.inputs(model)
    kept = []
    for edits in ([], [ForceAttention([(0, 1)], to="first")]):
        with regard.steer(model, *edits, Weights()) as seen:
            logits(model, inputs)
        kept.append(seen[Weights]["text.0"][0][0, 1])
    assert torch.equal(kept[1][:4, 0], torch.ones(4))
    assert torch.allclose(kept[0][4:], kept[1][4:], atol=1e-7)


def test_strength_takes_gradients_and_a_number_a_sequence(llama):
    inputs = FAMILIES["llama"].inputs(llama)
    strength = torch.tensor([0.2, 0.7], requires_grad=True)
    with regard.steer(llama, ForceAttention([(0, 1), (1, 2)], to="first", strength=strength)):
        out = llama(**inputs).logits
    for row, one in enumerate([0.2, 0.7]):
        alone = {"input_ids": inputs["input_ids"][row : row + 1]}
        edit = ForceAttention([(0, 1), (1, 2)], to="first", strength=one)
        assert close(out[row : row + 1].detach(), steered(llama, alone, edit))
    (grad,) = torch.autograd.grad(out[0].square().mean(), strength)
    assert grad[0] != 0 and grad[1] == 0


@pytest.mark.parametrize("to", ["first", "self", "previous", 2])
def test_forcing_holds_while_generating(llama, to):
    """Every step over a cache attends as a forward over the whole text does."""
    inputs = FAMILIES["llama"].inputs(llama, "left")
    edit = ForceAttention([(0, 0), (0, 1), (1, 3)], to=to)
    with regard.steer(llama, edit):
        found = llama.generate(**inputs, max_new_tokens=4, do_sample=False)
        without = llama.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(found, without)


def test_forcing_cross_attention():
    family = FAMILIES["bart"]
    model = family.build()
    inputs = family.inputs(model, "left")
    with regard.steer(model, ForceAttention([("cross.1", 2)], to=1), Weights()) as seen:
        logits(model, inputs)
    weights = seen[Weights]["cross.1"][0][:, 2]
    assert torch.equal(weights.argmax(-1)[1], torch.full((5,), 1))
    assert torch.equal(weights.amax(-1)[1], torch.ones(5))


def test_no_strength_opens_no_rows(llama, monkeypatch):
    monkeypatch.setattr("regard.runtime.pipeline.row_blocks", None)
    steered(llama, FAMILIES["llama"].inputs(llama), ForceAttention([(0, 1)], to="first", strength=0.0))


def test_edits_on_different_heads_of_a_layer_meet_their_own(llama):
    inputs = FAMILIES["llama"].inputs(llama, "left")
    edits = [
        ForceAttention([(0, 3)], to="first"),
        EditWeights(sharpened, layers=[0], heads=[1]),
        ScaleHeads(heads=[(0, 2)], mode="uniform"),
    ]
    seen_by_all = visible(inputs)[:, 0]

    def by_hand(layer, weights, module):
        if layer == 0:
            first = torch.stack([target(9, 9, "first", pad) for pad in (3, 0)]) * seen_by_all
            reached = first.sum(-1, keepdim=True) > 0
            weights[:, 3] = torch.where(reached, first, weights[:, 3])
            weights[:, 1] = sharpened(weights[:, 1])
            weights[:, 2] = seen_by_all / seen_by_all.sum(-1, keepdim=True).clamp_min(1)
        return weights

    with changed(llama, weights=by_hand):
        expected = logits(llama, inputs)
    assert close(steered(llama, inputs, *edits), expected)
    assert close(steered(llama, inputs, *reversed(edits)), expected)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: EditWeights(0.5), "function of"),
        (lambda: ForceAttention([], to=0), "at least one"),
        (lambda: ForceAttention([(0, 1)], to=-1), "position from 0 on"),
        (lambda: ForceAttention([(0, 1)], to=True), "position from 0 on"),
        (lambda: ForceAttention([(0, 1)], to="next"), "first, self, previous"),
        (lambda: ForceAttention([(0, 1)], to=0, strength=1.5), "between 0.0 and 1.0"),
        (lambda: ForceAttention([(0, 1)], to=0, strength=float("nan")), "must be a number"),
    ],
)
def test_unfit_options_are_refused_on_creation(make, match):
    with pytest.raises(RegardError, match=match):
        make()


@pytest.mark.parametrize(
    ("edit", "error", "match"),
    [
        (EditWeights(sharpened, layers=[5]), NoSuchSite, "no layer 5"),
        (EditWeights(sharpened, heads=[4]), NoSuchSite, "heads 0 to 3"),
        (EditWeights(sharpened, heads=[1, 1]), RegardError, "twice"),
        (EditWeights(sharpened, layers=[]), RegardError, "leave layers= out"),
        (EditWeights(sharpened, heads=[(0, 1)]), RegardError, "numbers"),
        (ForceAttention([(0, 4)], to=0), NoSuchSite, "heads 0 to 3"),
        (ForceAttention([5], to=0), RegardError, r"\(layer, head\)"),
        (ForceAttention([(0, 1), ("text.0", 1)], to=0), RegardError, "twice"),
    ],
)
def test_unknown_heads_are_refused_before_a_run(llama, edit, error, match):
    with pytest.raises(error, match=match):
        regard.steer(llama, edit)


@pytest.mark.parametrize("to", ["self", "previous"])
def test_relative_targets_are_refused_in_cross_attention(to):
    model = FAMILIES["t5"].build()
    with pytest.raises(RegardError, match="another sequence"):
        regard.steer(model, ForceAttention([("cross.0", 1)], to=to))


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (EditWeights(lambda w, block: w[:, :1]), "same shape"),
        (EditWeights(lambda w, block: None), "same shape"),
        (ForceAttention([(0, 1)], to=lambda block: block.query_positions[0]), "int64 positions"),
        (ForceAttention([(0, 1)], to=lambda block: 3), "int64 positions"),
        (ForceAttention([(0, 1)], to=lambda block: torch.zeros(2, 9, 4).bool()), "int64 positions"),
        (ForceAttention([(0, 1)], to=lambda block: torch.zeros(2, 4).long()), "int64 positions"),
    ],
)
def test_functions_that_return_something_else_are_refused(llama, edit, match):
    with pytest.raises(ShapeMismatch, match=match), regard.steer(llama, edit):
        logits(llama, FAMILIES["llama"].inputs(llama))
