"""ScoreBias against additive masks and scores changed by hand."""

import pytest
import torch
import transformers as tf
from transformers.masking_utils import eager_mask

import regard
from regard.edit import ScoreBias
from regard.errors import NoSuchSite, RegardError, ShapeMismatch
from regard.runtime import Lens
from regard.runtime.spans import Spans
from tests.edit.plain import changed, close, logits
from tests.support.families import FAMILIES, tokens

PADDINGS = ("none", "left", "right")


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build("sdpa")


class Weights(Lens):
    """Keeps the weights of each call of one block."""

    def weights(self, block):
        self.tally.append(block.site, "weights", block.weights.clone())

    def result(self):
        return self.tally.get("weights")


def steered(model, inputs, *edits, spans=None):
    with regard.steer(model, *edits, spans=spans):
        return logits(model, inputs)


def by_key(inputs, bias, positions):
    """A bias [H', n] at absolute positions, as [B, H', 1, S] over array indices."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    found = torch.zeros(*ids.shape[:1], bias.shape[0], 1, ids.shape[1])
    for row, real in enumerate(mask):
        where = real.nonzero()[:, 0]
        for column, position in enumerate(positions):
            if position < len(where):
                found[row, :, 0, where[position]] = bias[:, column]
    return found


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt-oss"])
def test_a_bias_a_head_and_position(name, padding):
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model, padding)
    bias, positions = torch.randn(2, 3), [0, 7, 2]
    added = by_key(inputs, bias, positions)

    def by_hand(layer, scores, module):
        if layer == 1:
            scores = scores.clone()
            scores[:, [3, 0]] = scores[:, [3, 0]] + added
        return scores

    with changed(model, scores=by_hand):
        expected = logits(model, inputs)
    edit = ScoreBias(bias, layers=[1], heads=[3, 0], positions=positions)
    found = steered(model, inputs, edit)
    assert close(found, expected)
    assert not close(found, logits(model, inputs), 1e-3)


def test_equals_adding_to_a_4d_mask(llama):
    """transformers itself, given a mask that holds the bias, on every layer and head."""
    inputs = FAMILIES["llama"].inputs(llama)
    bias = torch.randn(1, 9)
    mask = eager_mask(2, 9, 9, dtype=torch.float32) + bias
    with torch.no_grad():
        expected = llama(**inputs, attention_mask=mask).logits
    assert close(steered(llama, inputs, ScoreBias(bias)), expected)


@pytest.mark.parametrize(
    ("bias", "same"),
    [
        (0.7, torch.full((4, 2), 0.7)),
        (torch.tensor(0.7), torch.full((4, 2), 0.7)),
        (torch.tensor([0.7]), torch.full((4, 2), 0.7)),
        (torch.tensor([[0.7, -1.0]]), torch.tensor([[0.7, -1.0]] * 4)),
        (torch.arange(4.0), torch.arange(4.0)[:, None].expand(4, 2)),
    ],
    ids=["number", "[]", "[1]", "[1, n]", "[H]"],
)
def test_shapes_broadcast(llama, bias, same):
    inputs = FAMILIES["llama"].inputs(llama, "left")
    expected = steered(llama, inputs, ScoreBias(same, positions=[1, 4]))
    assert close(steered(llama, inputs, ScoreBias(bias, positions=[1, 4])), expected)


def test_without_positions_a_bias_is_of_the_first_ones(llama):
    inputs = FAMILIES["llama"].inputs(llama, "left")
    bias = torch.randn(4, 3)
    expected = steered(llama, inputs, ScoreBias(bias, positions=[0, 1, 2]))
    assert close(steered(llama, inputs, ScoreBias(bias)), expected)


def test_a_mapping_gives_every_layer_its_own(llama):
    inputs = FAMILIES["llama"].inputs(llama)
    first, second = torch.randn(4, 9), torch.randn(1, 9)
    each = {0: by_key(inputs, first, range(9)), 1: by_key(inputs, second, range(9))}
    with changed(llama, scores=lambda layer, scores, module: scores + each[layer]):
        expected = logits(llama, inputs)
    assert close(steered(llama, inputs, ScoreBias({0: first, "text.1": second})), expected)


def test_a_large_negative_bias_hides_a_key(llama):
    inputs = FAMILIES["llama"].inputs(llama)
    with regard.steer(llama, ScoreBias(-1e9, positions=[2]), Weights()) as seen:
        hidden = logits(llama, inputs)
    weights = torch.stack([calls[0] for calls in seen[Weights].values()])
    assert torch.equal(weights[..., 2], torch.zeros_like(weights[..., 2]))
    mask = eager_mask(2, 9, 9, dtype=torch.float32).expand(2, 1, 9, 9).clone()
    mask[..., 2] = torch.finfo(torch.float32).min
    with torch.no_grad():
        expected = llama(**inputs, attention_mask=mask).logits
    assert close(hidden, expected)


def test_gradients_reach_the_bias(llama):
    inputs = FAMILIES["llama"].inputs(llama, "left")
    real = inputs["attention_mask"].bool()
    bias = torch.nn.Parameter(0.1 * torch.randn(2, 3))

    def loss():
        with regard.steer(llama, ScoreBias(bias, layers=[0], heads=[1, 2], positions=[0, 2, 4])):
            return llama(**inputs).logits[real].square().mean()

    (grad,) = torch.autograd.grad(loss(), bias)
    assert (grad != 0).all()
    direction = torch.randn(2, 3)
    ends = []
    for step in (1e-2, -2e-2):
        with torch.no_grad():
            bias += step * direction
            ends.append(loss().item())
    slope = (ends[0] - ends[1]) / 2e-2
    assert (grad * direction).sum().item() == pytest.approx(slope, rel=2e-2)


def test_a_bias_can_be_learned(llama):
    """Gradient steps on the bias alone move the loss; the model stays as it is."""
    inputs = FAMILIES["llama"].inputs(llama)
    bias = torch.nn.Parameter(torch.zeros(4, 9))
    before = {name: p.clone() for name, p in llama.named_parameters()}
    optimizer, losses = torch.optim.Adam([bias], lr=0.3), []
    with regard.steer(llama, ScoreBias(bias)):
        for _ in range(4):
            out = llama(**inputs).logits[:, -1]
            losses.append(torch.nn.functional.cross_entropy(out, torch.tensor([5, 6])))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, before[name]) for name, p in llama.named_parameters())
    llama.zero_grad()


@pytest.mark.parametrize("padding", PADDINGS)
def test_a_span_is_biased_as_its_positions(llama, padding):
    inputs = FAMILIES["llama"].inputs(llama, padding)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    spans = Spans.from_ranges({"facts": [(1, 3)], "rest": [(4, 6)]}, mask)
    expected = steered(llama, inputs, ScoreBias(1.5, heads=[1], positions=[1, 2]))
    found = steered(llama, inputs, ScoreBias(1.5, heads=[1], span="facts"), spans=spans)
    assert close(found, expected)
    assert not close(steered(llama, inputs, ScoreBias(1.5, heads=[1], span="rest"), spans=spans), expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_spans_and_positions_hold_while_generating(llama, beams):
    inputs = FAMILIES["llama"].inputs(llama, "left")
    spans = Spans.from_ranges({"facts": [[(1, 3)], [(0, 2), (5, 6)]]}, inputs["attention_mask"])
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    with regard.steer(llama, ScoreBias(4.0, span="facts"), spans=spans):
        both = llama.generate(**inputs, **options)
        uncached = llama.generate(**inputs, **options, use_cache=False)
    assert torch.equal(both, uncached)
    for row, positions in enumerate(([1, 2], [0, 1, 5])):
        alone = {k: v[row : row + 1] for k, v in inputs.items()}
        with regard.steer(llama, ScoreBias(4.0, positions=positions)):
            assert torch.equal(llama.generate(**alone, **options)[0], both[row])


def test_what_was_generated_is_a_span(llama):
    """Hiding generated keys from later steps is hiding all positions after the prompt."""
    inputs = FAMILIES["llama"].inputs(llama)
    spans = Spans({"prompt": torch.ones(2, 9, dtype=torch.bool)})
    with regard.steer(llama, ScoreBias(-1e9, span="generated"), Weights(), spans=spans) as seen:
        llama.generate(**inputs, max_new_tokens=4, do_sample=False)
    for step, weights in enumerate(seen[Weights]["text.0"]):
        assert weights.shape[-1] == 9 + step
        assert torch.equal(weights[..., 9:], torch.zeros_like(weights[..., 9:]))
        assert torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0]))


@pytest.mark.parametrize("how", ["forward", "generate", "beams"])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_spans_of_an_encoder_decoder_are_over_the_encoders_input(name, how):
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model, "left")
    spans = Spans.from_ranges({"facts": [(1, 3)]}, inputs["attention_mask"])
    edit = ScoreBias(-1e9, layers=["encoder.0", "decoder.0", "cross.1"], span="facts")
    with torch.no_grad(), regard.steer(model, edit, Weights(), spans=spans) as seen:
        if how == "forward":
            model(**inputs)
        else:
            inputs.pop("decoder_input_ids")
            beams = 2 if how == "beams" else 1
            model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=beams)
    weights = seen[Weights]
    real = inputs["attention_mask"].bool()
    for call in weights["encoder.0"] + weights["cross.1"]:
        hidden = spans["facts"].repeat_interleave(call.shape[0] // 2, 0)
        mass = (call * hidden[:, None, None]).sum(-1)
        rows = real[:, None].expand(2, 4, 9) if call.shape[2] == 9 else torch.ones_like(mass).bool()
        assert mass[rows].max() == 0 and call.sum() > 0
    assert all(call[..., -1, :].min() > 0 for call in weights["decoder.0"])


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ScoreBias(1.0), RegardError, "softmax undoes"),
        (lambda: ScoreBias(torch.zeros(4)), RegardError, "softmax undoes"),
        (lambda: ScoreBias("1", positions=[0]), RegardError, "number or a tensor"),
        (lambda: ScoreBias(torch.zeros(1, 2, 3)), ShapeMismatch, r"\[H', n\]"),
        (lambda: ScoreBias(float("-inf"), positions=[0]), RegardError, "large negative"),
        (lambda: ScoreBias(torch.tensor(float("nan")), positions=[0]), RegardError, "finite"),
        (lambda: ScoreBias(1.0, positions=[0], span="a"), RegardError, "both given"),
        (lambda: ScoreBias(1.0, positions=[]), RegardError, "different positions"),
        (lambda: ScoreBias(1.0, positions=[-1]), RegardError, "from 0 on"),
        (lambda: ScoreBias(1.0, positions=[1, 1]), RegardError, "different positions"),
        (lambda: ScoreBias(torch.zeros(1, 3), positions=[1, 2]), ShapeMismatch, "for 2 positions"),
        (lambda: ScoreBias(torch.zeros(1, 3), span="a"), ShapeMismatch, "for a span"),
        (lambda: ScoreBias(torch.zeros(3, 2), heads=[0, 1]), ShapeMismatch, "for 2 heads"),
        (lambda: ScoreBias({}), RegardError, "names the layers itself"),
        (lambda: ScoreBias({0: torch.zeros(1, 2)}, layers=[0]), RegardError, "names the layers itself"),
        (lambda: ScoreBias({0: 1.0}), RegardError, "softmax undoes"),
    ],
)
def test_unfit_options_are_refused_on_creation(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (ScoreBias(1.0, positions=[0], layers=[2]), "no layer 2"),
        (ScoreBias({"cross.0": torch.zeros(1, 2)}), "no layer 'cross.0'"),
        (ScoreBias(1.0, positions=[0], heads=[4]), "heads 0 to 3"),
    ],
)
def test_unknown_layers_and_heads_are_refused_before_a_run(llama, edit, match):
    with pytest.raises(NoSuchSite, match=match):
        regard.steer(llama, edit)


@pytest.mark.parametrize(
    ("edit", "spans", "error", "match"),
    [
        (ScoreBias(torch.zeros(3, 2)), None, ShapeMismatch, "text.0 has 4 heads"),
        (ScoreBias(1.0, span="facts"), None, RegardError, "no span 'facts'; it has none"),
        (ScoreBias(1.0, span="fact"), {"facts": torch.ones(2, 9).bool()}, RegardError, "it has facts"),
        (ScoreBias(1.0, span="facts"), {"facts": torch.ones(3, 9).bool()}, ShapeMismatch, r"fed \(2, 9\)"),
        (ScoreBias(1.0, span="facts"), {"facts": torch.ones(2, 8).bool()}, ShapeMismatch, r"fed \(2, 9\)"),
    ],
)
def test_what_does_not_fit_the_run_is_refused(llama, edit, spans, error, match):
    inputs = FAMILIES["llama"].inputs(llama)
    with pytest.raises(error, match=match), regard.steer(llama, edit, spans=spans):
        logits(llama, inputs)
    with pytest.raises(error, match=match), regard.steer(llama, edit, spans=spans):
        llama.generate(**inputs, max_new_tokens=2, use_cache=False)


def test_spans_are_refused_where_keys_are_no_tokens():
    family = FAMILIES["llava"]
    model = family.build()
    edit = ScoreBias(1.0, span="facts", layers=["vision.0"])
    spans = {"facts": torch.ones(2, 14, dtype=torch.bool)}
    with pytest.raises(RegardError, match="the keys of vision.0 are none"):
        steered(model, family.inputs(model), edit, spans=spans)


def test_spans_are_refused_where_a_decoder_alone_attends_to_states():
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = tf.BertLMHeadModel(
        tf.BertConfig(vocab_size=97, is_decoder=True, add_cross_attention=True, **config)
    ).eval()
    inputs = {"input_ids": tokens(), "encoder_hidden_states": torch.randn(2, 9, 16)}
    edit = ScoreBias(1.0, span="facts", layers=["cross.0"])
    with pytest.raises(RegardError, match="the keys of cross.0 are none"):
        steered(model, inputs, edit, spans={"facts": torch.ones(2, 9, dtype=torch.bool)})
