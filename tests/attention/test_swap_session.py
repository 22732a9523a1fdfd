"""What a swap may be combined with: layers, lenses, edits, other sessions, gradients; and bad input."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

import regard
from regard.attention import (
    MECHANISMS,
    LinearAttention,
    Mechanism,
    SlidingWindow,
    Softmax,
    Spec,
    get,
    mechanism,
)  # fmt: skip
from regard.attention.softmax import SoftmaxAttention
from regard.edit import EditWeights, ScaleHeads
from regard.errors import NoSuchSite, NothingObserved, RegardError, UnsupportedModel
from regard.runtime import Lens
from tests.attention.models import assert_same, differ, generated, outputs, prompt
from tests.support.families import FAMILIES, bloom
from tests.support.stages import Failing, Sharper, failing, state


@pytest.fixture
def llama():
    return FAMILIES["llama"].build()


@pytest.fixture
def inputs(llama):
    return FAMILIES["llama"].inputs(llama, "left")


@pytest.fixture
def tempered():
    """A registered mechanism with a parameter."""
    kept = dict(MECHANISMS)

    class TemperedAttention(SoftmaxAttention):
        """Softmax at a learned temperature, one a layer."""

        def __init__(self, start):
            super().__init__()
            self.log = nn.Parameter(torch.tensor(float(start)))

        def context(self, q, k, ctx):
            ctx = super().context(q, k, ctx)
            return replace(ctx, scale=q.shape[-1] ** -0.5)

        def matrix(self, q, k, ctx=None):
            return super().matrix(q * self.log.exp(), k, ctx)

        def forward(self, q, k, v, ctx=None):
            return super().forward(q * self.log.exp(), k, v, ctx)

    @mechanism("tempered")
    @dataclass(frozen=True)
    class Tempered(Spec):
        """Softmax at a learned temperature."""

        module: ClassVar = TemperedAttention
        start: float = 0.0

    yield Tempered
    MECHANISMS.clear()
    MECHANISMS.update(kept)


class Seen(Lens):
    """Keeps every block of weights, with its heads."""

    def weights(self, block):
        self.tally.append(block.site, "weights", block.weights.clone())

    def result(self):
        return self.tally.get("weights")


def test_only_the_layers_named_are_swapped(llama, inputs):
    plain = outputs(llama, inputs)
    found = {}
    for name, layers in {"all": None, "range": range(0, 2), "first": [0], "alias": ["text.0"],
                         "module": ["model.layers.0.self_attn"], "second": [1]}.items():  # fmt: skip
        with regard.swap(llama, SlidingWindow(2), layers) as swapped:
            found[name] = outputs(llama, inputs)
        assert len(swapped.mechanisms) == (2 if name in ("all", "range") else 1)
    assert torch.equal(found["all"], found["range"])
    assert torch.equal(found["first"], found["alias"]) and torch.equal(found["first"], found["module"])
    assert differ(found["first"], found["second"]) and differ(found["first"], found["all"])
    assert differ(found["second"], plain)


def test_layers_by_default_are_those_of_the_main_stack():
    t5 = FAMILIES["bart"].build()
    assert list(regard.swap(t5, Softmax()).mechanisms) == ["decoder.0", "decoder.1"]
    llava = FAMILIES["llava"].build()
    assert list(regard.swap(llava, Softmax()).mechanisms) == ["text.0", "text.1"]
    assert list(regard.swap(llava, Softmax(), ["vision.1"]).mechanisms) == ["vision.1"]


@pytest.mark.parametrize("spec", [Softmax(), SlidingWindow(3), LinearAttention()])
def test_lenses_see_the_weights_of_the_mechanism(llama, inputs, spec):
    with torch.no_grad(), regard.swap(llama, spec) as swapped, regard.watch(llama, Seen()) as seen:
        out = llama(**inputs, use_cache=False, output_attentions=True)
        q, k, ctx = calls(llama, inputs)
        again = seen.weights(layer=1, head=3)
    for layer in range(2):
        whole = seen[Seen][f"text.{layer}"][0]
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(whole, out.attentions[layer])
        sums = whole.sum(-1).transpose(1, 2)[real]
        torch.testing.assert_close(sums, torch.ones_like(sums))
        assert (whole.triu(1).transpose(1, 2)[real] == 0).all()
    assert again.shape == (9, 9) and torch.allclose(again, seen[Seen]["text.1"][0][0, 3], atol=1e-6)
    expected = swapped.mechanisms["text.0"].matrix(q, k, ctx)
    torch.testing.assert_close(seen[Seen]["text.0"][0], expected.float())


def calls(llama, inputs):
    """q, k and the context of the first layer."""
    from regard.attention.swap import context_of

    class Caught(Lens):
        def inputs(self, call):
            self.tally.append(call.site, "call", (call.q, call.k, context_of(call, SoftmaxAttention())))

        def result(self):
            return self.tally.get("call")

    with torch.no_grad(), regard.watch(llama, Caught()) as seen:
        llama(**inputs, use_cache=False)
    return seen[Caught]["text.0"][0]


def test_a_lens_before_edits_sees_softmax(llama, inputs):
    with torch.no_grad(), regard.watch(llama, Seen()) as plain:
        llama(**inputs)
    early = Seen(before=True)
    with torch.no_grad(), regard.swap(llama, SlidingWindow(1)), regard.watch(llama, early) as before:
        llama(**inputs)
    torch.testing.assert_close(before[Seen]["text.0"][0], plain[Seen]["text.0"][0])


def test_lenses_of_decoding(llama):
    """One that reads the cache shows every step; of one that carries a state, only the prompt has weights."""
    rows = {}
    for spec in (SlidingWindow(3), LinearAttention()):
        with regard.swap(llama, spec), regard.watch(llama, Seen()) as seen:
            generated(llama, prompt("llama", llama), max_new_tokens=4)
        rows[spec] = [tuple(x.shape[2:]) for x in seen[Seen]["text.0"]]
    assert rows[SlidingWindow(3)] == [(9, 9), (1, 10), (1, 11), (1, 12)]
    assert rows[LinearAttention()] == [(9, 9)]


def test_a_lens_before_a_state_is_refused_while_decoding(llama):
    with (
        pytest.raises(RegardError, match="use_cache=False"),
        regard.swap(llama, LinearAttention()),
        regard.watch(llama, Seen(before=True)),
    ):
        generated(llama, prompt("llama", llama))


@pytest.mark.parametrize("spec", [Softmax(), SlidingWindow(3), LinearAttention()])
def test_edits_of_weights_and_heads(llama, inputs, spec):
    once = {**inputs, "use_cache": False}
    with regard.swap(llama, spec):
        plain = outputs(llama, once)
        with regard.steer(llama, EditWeights(lambda weights, block: weights, layers=[0])):
            same = outputs(llama, once)
        with regard.steer(llama, EditWeights(lambda weights, block: 0 * weights, layers=[0], heads=[1])):
            one = outputs(llama, once)
        with regard.steer(llama, ScaleHeads({(0, 1): 0.0})):
            other = outputs(llama, once)
    assert_same(same, plain, inputs)
    assert_same(one, other, inputs)
    assert differ(one, plain)


def test_edits_in_the_session_order(llama, inputs):
    edit = EditWeights(lambda weights, block: weights.flip(1), layers=[0])
    with regard.swap(llama, SlidingWindow(3)), regard.steer(llama, edit):
        after = outputs(llama, inputs)
    with regard.steer(llama, edit), regard.swap(llama, SlidingWindow(3)):
        before = outputs(llama, inputs)
    assert_same(after, before, inputs)


def test_edits_of_scores_are_refused_where_there_are_none(llama, inputs):
    with (
        pytest.raises(RegardError, match="Sharper changes scores, and text.0"),
        regard.swap(llama, LinearAttention()),
        regard.steer(llama, Sharper()),
    ):
        outputs(llama, inputs)


def test_edits_of_weights_are_refused_where_a_state_has_none(llama):
    edit = EditWeights(lambda weights, block: weights, layers=[0])
    with (
        pytest.raises(RegardError, match="decodes from a state"),
        regard.swap(llama, LinearAttention()),
        regard.steer(llama, edit),
    ):
        generated(llama, prompt("llama", llama))


def test_the_swap_opened_last_counts_and_the_first_comes_back(llama, inputs):
    once = {**inputs, "use_cache": False}
    alone = {}
    for spec in (SlidingWindow(3), LinearAttention(), SlidingWindow(1)):
        with regard.swap(llama, spec):
            alone[spec] = outputs(llama, once)
    with regard.swap(llama, SlidingWindow(3)):
        with regard.swap(llama, LinearAttention()):
            assert torch.equal(outputs(llama, once), alone[LinearAttention()])
            with regard.swap(llama, SlidingWindow(1)):
                assert torch.equal(outputs(llama, once), alone[SlidingWindow(1)])
            assert torch.equal(outputs(llama, once), alone[LinearAttention()])
        assert torch.equal(outputs(llama, once), alone[SlidingWindow(3)])


def test_nested_swaps_generate_with_the_cache_of_the_last(llama):
    text = prompt("llama", llama)
    alone = {}
    for spec in (SlidingWindow(3), LinearAttention()):
        with regard.swap(llama, spec):
            alone[spec] = generated(llama, text)[0]
    with regard.swap(llama, LinearAttention()):
        with regard.swap(llama, SlidingWindow(3)):
            assert torch.equal(generated(llama, text)[0], alone[SlidingWindow(3)])
        assert torch.equal(generated(llama, text)[0], alone[LinearAttention()])
    with regard.swap(llama, SlidingWindow(3)), regard.swap(llama, LinearAttention()):
        assert torch.equal(generated(llama, text)[0], alone[LinearAttention()])


@pytest.mark.parametrize("spec", [SlidingWindow(3), LinearAttention()])
def test_everything_is_restored(llama, inputs, spec):
    plain, before = outputs(llama, inputs), state(llama)
    with regard.swap(llama, spec):
        assert differ(outputs(llama, inputs), plain)
    assert state(llama) == before
    with pytest.raises(Failing), regard.swap(llama, spec), regard.watch(llama, failing(Lens, "inputs")):
        llama(**inputs)
    assert state(llama) == before
    assert torch.equal(outputs(llama, inputs), plain)


def test_a_session_that_cannot_open_leaves_nothing(llama, inputs):
    before = outputs(llama, inputs), state(llama)
    module = llama.model.layers[1].self_attn
    number, module.layer_idx = module.layer_idx, None
    with pytest.raises(UnsupportedModel, match="no layer_idx"), regard.swap(llama, LinearAttention()):
        pass
    module.layer_idx = number
    assert state(llama) == before[1] and torch.equal(outputs(llama, inputs), before[0])


def test_a_mechanism_with_parameters_can_be_trained(llama, inputs, tempered):
    target = FAMILIES["llama"].inputs(llama)["input_ids"]
    with regard.swap(llama, tempered(start=0.7)) as swapped:
        learned = [p for m in swapped.mechanisms.values() for p in m.parameters()]
        assert len(learned) == 2 and learned[0] is not learned[1]
        optimiser = torch.optim.SGD(learned, lr=0.05)
        losses = []
        for _ in range(4):
            loss = llama(**inputs, labels=target).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert all(p.grad.abs() > 0 for p in learned)


@pytest.mark.parametrize("spec", [Softmax(), SlidingWindow(3), LinearAttention()])
def test_gradients_reach_the_model_as_without_fast_paths(llama, inputs, spec):
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.v_proj.weight"]
    parameters = [dict(llama.named_parameters())[name] for name in names]
    found = []
    with regard.swap(llama, spec) as swapped:
        for slow in (False, True):
            if slow:
                for m in swapped.mechanisms.values():
                    m.forward = m.reference
            out = llama(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]
            found.append(torch.autograd.grad(out.sin().sum(), parameters))
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max() and other.abs().max() > 0


def test_gradient_checkpointing(llama, inputs):
    grads = []
    for checkpointing in (False, True):
        model = FAMILIES["llama"].build().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with regard.swap(model, LinearAttention()):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    assert torch.allclose(*grads, atol=1e-6) and grads[0].abs().max() > 0


def test_a_mechanism_is_in_training_when_its_layer_is(llama, inputs):
    with regard.swap(llama, Softmax()) as swapped:
        outputs(llama, inputs)
        assert not swapped.mechanisms["text.0"].training
        llama.train()
        outputs(llama, inputs)
        assert swapped.mechanisms["text.0"].training


BAD = [
    (lambda m: regard.swap(m, SlidingWindow), "got the class SlidingWindow"),
    (lambda m: regard.swap(m, "linear"), r"regard.attention.get\('linear'\) makes one"),
    (lambda m: regard.swap(m, None), "got None"),
    (lambda m: regard.swap(m, Softmax(), layers=[]), "no layers"),
    (lambda m: regard.swap(m, Softmax(), layers="text.0"), "must be several"),
    (lambda m: regard.swap(m, Softmax(), layers=1), "must be several"),
    (lambda m: SlidingWindow(0), "window is 0"),
    (lambda m: SlidingWindow(True), "window is True"),
    (lambda m: SlidingWindow(2.5), "window is 2.5"),
    (lambda m: get("sliding"), "did you mean sliding-window"),
    (lambda m: get("zzz"), "the mechanisms are"),
    (lambda m: get("sliding-window", windw=3), "takes no 'windw'"),
    (lambda m: get("sliding-window"), "needs 'window'"),
]


@pytest.mark.parametrize(("make", "words"), BAD, ids=[words[:20] for _, words in BAD])
def test_bad_input_is_refused_in_a_sentence(llama, make, words):
    with pytest.raises(RegardError, match=words) as refusal:
        make(llama)
    assert str(refusal.value).endswith((".", "?")) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("layer", [2, -1, "text.9", "vision.0", True])
def test_layers_that_are_not_there(llama, layer):
    with pytest.raises(NoSuchSite, match="text.0 to text.1"):
        regard.swap(llama, Softmax(), layers=[layer])


def test_a_model_out_of_reach_is_refused():
    with pytest.raises(UnsupportedModel, match="BloomAttention"):
        regard.swap(bloom(), Softmax(), layers=[0])


def test_a_layer_that_is_not_run_is_reported(llama):
    with pytest.raises(NothingObserved), regard.swap(llama, Softmax()):
        pass


class OneWay(SoftmaxAttention):
    orders = frozenset({"causal"})


def test_an_order_that_a_mechanism_does_not_have_is_refused(tempered):
    bert = FAMILIES["bert"].build()
    spec = tempered()
    object.__setattr__(spec, "build", lambda site: OneWay())
    with pytest.raises(UnsupportedModel, match="text.0 has no causal order"), regard.swap(bert, spec):
        outputs(bert, FAMILIES["bert"].inputs(bert))
    assert issubclass(OneWay, Mechanism)
