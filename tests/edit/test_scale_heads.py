"""ScaleHeads against hooks on the output projection and attention written out."""

from contextlib import contextmanager

import pytest
import torch

import regard
from regard.edit import ScaleHeads
from regard.errors import NoSuchSite, RegardError, ShapeMismatch
from regard.lens import HeadOutputNorm
from regard.runtime import Lens, pipeline
from tests.edit.plain import changed, close, logits, visible
from tests.support.families import FAMILIES

PADDINGS = ("none", "left", "right")
WIDTH = 8


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build("sdpa")


@contextmanager
def hooked(projection, change):
    """Change what an output projection is fed, [B, T, H * Dv]."""
    handle = projection.register_forward_pre_hook(lambda module, args: (change(args[0].clone()),))
    try:
        yield
    finally:
        handle.remove()


def o_proj(model, layer=1):
    return model.model.layers[layer].self_attn.o_proj


def scaled(factor, head=1, mean=None):
    """A change of one head's columns: towards `mean(columns)`, or 0."""
    columns = slice(head * WIDTH, (head + 1) * WIDTH)

    def change(x):
        rest = 0.0 if mean is None else mean(x[..., columns])
        x[..., columns] = rest + factor * (x[..., columns] - rest)
        return x

    return change


def steered(model, inputs, *edits):
    with regard.steer(model, *edits):
        return logits(model, inputs)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("factor", [0.0, 0.5, -2.0])
def test_zero_mode_scales_columns_of_the_projection(llama, padding, factor):
    inputs = FAMILIES["llama"].inputs(llama, padding)
    with hooked(o_proj(llama), scaled(factor)):
        expected = logits(llama, inputs)
    found = steered(llama, inputs, ScaleHeads({(1, 1): factor}))
    assert close(found, expected)
    assert not close(found, logits(llama, inputs), 1e-3)


@pytest.mark.parametrize("padding", PADDINGS)
def test_mean_mode_takes_the_mean_of_real_positions(llama, padding):
    inputs = FAMILIES["llama"].inputs(llama, padding)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[:, :, None]

    def mean(x):
        return (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)

    with hooked(o_proj(llama), scaled(0.25, mean=mean)):
        expected = logits(llama, inputs)
    assert close(steered(llama, inputs, ScaleHeads({(1, 1): 0.25}, mode="mean")), expected)


def test_given_means_stand_for_the_heads_own(llama):
    inputs = FAMILIES["llama"].inputs(llama, "left")
    given = torch.randn(WIDTH)
    edit = ScaleHeads(heads=[(1, 1)], mode="mean", means={("text.1", 1): given})
    with hooked(o_proj(llama), scaled(0.0, mean=lambda x: given)):
        expected = logits(llama, inputs)
    assert close(steered(llama, inputs, edit), expected)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("factor", [0.0, 0.3])
def test_uniform_mode_spreads_over_what_a_row_may_see(llama, padding, factor):
    inputs = FAMILIES["llama"].inputs(llama, padding)
    seen = visible(inputs)

    def uniform(layer, weights, module):
        if layer == 1:
            flat = (seen / seen.sum(-1, keepdim=True).clamp_min(1))[:, 0]
            weights[:, 1] = flat + factor * (weights[:, 1] - flat)
        return weights

    with changed(llama, weights=uniform):
        expected = logits(llama, inputs)
    assert close(steered(llama, inputs, ScaleHeads({(1, 1): factor}, mode="uniform")), expected)


class Weights(Lens):
    """Keeps the weights of each call of one block."""

    def weights(self, block):
        self.tally.append(block.site, "weights", block.weights.clone())

    def result(self):
        return self.tally.get("weights")


def test_uniform_rows_stay_in_the_window_and_sum_to_one_beside_sinks():
    family = FAMILIES["gpt-oss"]
    model = family.build()
    inputs = family.inputs(model)
    with regard.steer(model, ScaleHeads(heads=[(0, 2)], mode="uniform"), Weights()) as seen:
        logits(model, inputs)
    weights = seen[Weights]["text.0"][0]
    order = torch.ones(9, 9).tril()
    window = order.triu(-3)
    assert torch.allclose(weights[0, 2], window / window.sum(-1, keepdim=True))
    assert (weights[:, 1].sum(-1) < 0.999).any()


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
@pytest.mark.parametrize("mode", ["zero", "uniform"])
def test_cross_attention_by_its_alias(name, mode):
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model, "left" if family.pads else "none")
    edit = ScaleHeads(heads=[("cross.0", 3)], mode=mode)
    with regard.steer(model, edit, Weights(), HeadOutputNorm()) as seen:
        logits(model, inputs)
    norms, weights = seen[HeadOutputNorm], seen[Weights]["cross.0"][0][:, 3]
    assert norms.at("cross.1", 3)["norm"] > 0 and norms.at("decoder.0", 3)["norm"] > 0
    if mode == "zero":
        assert norms.at("cross.0", 3)["norm"] == 0
    else:
        mask = inputs.get("attention_mask", torch.ones(2, weights.shape[-1]))[:, None, :].float()
        assert torch.allclose(weights, (mask / mask.sum(-1, keepdim=True)).expand_as(weights))


@pytest.mark.parametrize("mode", ["zero", "mean", "uniform"])
def test_factors_a_sequence_scale_each_its_own_and_get_gradients(llama, mode):
    inputs = FAMILIES["llama"].inputs(llama)
    factor = torch.tensor([0.0, 0.5], requires_grad=True)
    with regard.steer(llama, ScaleHeads({(0, 1): factor, (0, 2): 0.5}, mode=mode)):
        out = llama(**inputs).logits
    for row, one in enumerate([0.0, 0.5]):
        alone = {"input_ids": inputs["input_ids"][row : row + 1]}
        expected = steered(llama, alone, ScaleHeads({(0, 1): one, (0, 2): 0.5}, mode=mode))
        assert close(out[row : row + 1].detach(), expected)
    (grad,) = torch.autograd.grad(out.square().mean(), factor)
    step = torch.tensor([1e-2, 0.0])
    ends = [
        steered(llama, inputs, ScaleHeads({(0, 1): factor.detach() + s, (0, 2): 0.5}, mode=mode))
        for s in (step, -step)
    ]
    slope = (ends[0].square().mean() - ends[1].square().mean()) / 2e-2
    assert grad[0].item() == pytest.approx(slope.item(), rel=2e-2, abs=1e-5)
    assert grad[1] != 0


@pytest.mark.parametrize("mode", ["zero", "mean", "uniform"])
def test_factors_are_repeated_for_beams(llama, mode):
    inputs = FAMILIES["llama"].inputs(llama, "left")
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    with regard.steer(llama, ScaleHeads({(0, 1): torch.tensor([-3.0, 1.0])}, mode=mode)):
        both = llama.generate(**inputs, **options)
    for row, one in enumerate([-3.0, 1.0]):
        alone = {k: v[row : row + 1] for k, v in inputs.items()}
        with regard.steer(llama, ScaleHeads({(0, 1): one}, mode=mode)):
            assert torch.equal(llama.generate(**alone, **options)[0], both[row])


def test_the_mean_follows_a_growing_cache(llama):
    """Each step's mean is over all positions so far, whatever the padding."""
    inputs = FAMILIES["llama"].inputs(llama, "left")
    outputs, edit = [], ScaleHeads(heads=[(1, 1)], mode="mean")
    raw = []

    class Before(Lens):
        def head_outputs(self, call):
            if call.site.alias == "text.1":
                raw.append(call.head_outputs[:, 1].clone())

    class After(Lens):
        def head_outputs(self, call):
            if call.site.alias == "text.1":
                outputs.append(call.head_outputs[:, 1].clone())

    with regard.steer(llama, edit, Before(before=True), After()):
        llama.generate(**inputs, max_new_tokens=4, do_sample=False)
    mask = inputs["attention_mask"].bool()
    for step in range(4):
        whole = torch.cat(raw[: step + 1], 1)
        for row in range(2):
            real = whole[row][torch.cat([mask[row], torch.ones(step, dtype=torch.bool)])]
            assert torch.allclose(outputs[step][row, -1], real.mean(0), atol=1e-6)


def test_the_mean_follows_the_beams(llama):
    """A beam's mean is of its own past: recomputing the chosen sequence whole gives the same token scores."""
    inputs = {"input_ids": FAMILIES["llama"].inputs(llama)["input_ids"][:1]}
    raw, seen = [], []

    class Raw(Lens):
        def head_outputs(self, call):
            if call.site.alias == "text.0":
                raw.append((call.run.token_ids.clone(), call.head_outputs[:, 1].clone()))

    class After(Lens):
        def head_outputs(self, call):
            if call.site.alias == "text.0":
                seen.append(call.head_outputs[:, 1, -1].clone())

    with regard.steer(llama, ScaleHeads(heads=[(0, 1)], mode="mean"), Raw(before=True), After()):
        llama.generate(**inputs, num_beams=3, max_new_tokens=5, do_sample=False)
    known = {}
    for (ids, out), after in zip(raw, seen, strict=True):
        for row, tokens in enumerate(ids.tolist()):
            for back in range(out.shape[1]):
                known[tuple(tokens[: len(tokens) - back])] = out[row, -1 - back]
            past = torch.stack([known[tuple(tokens[: i + 1])] for i in range(len(tokens))])
            assert torch.allclose(after[row], past.mean(0), atol=1e-6)


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_scaling_outputs_opens_no_rows(llama, mode, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("rows were opened")

    monkeypatch.setattr(pipeline, "row_blocks", refuse)
    inputs = FAMILIES["llama"].inputs(llama, "left")
    steered(llama, inputs, ScaleHeads({(0, 1): 0.0, (1, 2): 0.5}, mode=mode))
    with pytest.raises(AssertionError, match="rows were opened"):
        steered(llama, inputs, ScaleHeads({(0, 1): 0.0}, mode="uniform"))


@pytest.mark.parametrize("mode", ["zero", "mean", "uniform"])
def test_factor_one_changes_nothing(llama, mode):
    inputs = FAMILIES["llama"].inputs(llama, "left")
    heads = {(layer, head): 1.0 for layer in range(2) for head in range(4)}
    with regard.watch(llama):
        expected = logits(llama, inputs)
    assert torch.equal(steered(llama, inputs, ScaleHeads(heads, mode=mode)), expected)
    tensors = {name: torch.ones(2) for name in heads}
    assert close(steered(llama, inputs, ScaleHeads(tensors, mode=mode)), expected)


@pytest.mark.parametrize("name", ["gpt2", "falcon", "gemma2", "vit", "bert"])
def test_reaches_every_kind_of_model(name):
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model)
    layer = "vision.0" if name == "vit" else 0
    edit = ScaleHeads(heads=[(layer, 1)])
    with torch.no_grad(), regard.steer(model, edit, HeadOutputNorm()) as seen:
        model(**inputs)
    norms = seen[HeadOutputNorm]
    alias = "vision.0" if name == "vit" else "text.0"
    assert [norms.at(alias, head)["norm"] == 0 for head in range(4)] == [False, True, False, False]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ScaleHeads([(0, 1)]), RegardError, "mapping"),
        (lambda: ScaleHeads({(0, 1): float("nan")}), RegardError, "must be a number, finite"),
        (lambda: ScaleHeads({(0, 1): float("inf")}), RegardError, "must be a number, finite"),
        (lambda: ScaleHeads({(0, 1): "0"}), RegardError, "must be a number, finite"),
        (lambda: ScaleHeads({(0, 1): torch.ones(2, 2)}), RegardError, r"\[\] or \[B\]"),
        (lambda: ScaleHeads(heads=[(0, 1)], factor=True), RegardError, "must be a number, finite"),
        (lambda: ScaleHeads({(0, 1): 0.0}, mode="median"), RegardError, "zero, mean, uniform"),
        (lambda: ScaleHeads({(0, 1): 0.0}, means={(0, 1): torch.ones(8)}), RegardError, "mode='mean'"),
        (lambda: ScaleHeads(mode="mean", means={(0, 1): torch.ones(1, 8)}), ShapeMismatch, "tensor"),
    ],
)
def test_unfit_options_are_refused_on_creation(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("edit", "error", "match"),
    [
        (ScaleHeads({(2, 0): 0.0}), NoSuchSite, "no layer 2"),
        (ScaleHeads({("cross.0", 0): 0.0}), NoSuchSite, "no layer 'cross.0'"),
        (ScaleHeads({(0, 4): 0.0}), NoSuchSite, "heads 0 to 3"),
        (ScaleHeads({(0, -1): 0.0}), NoSuchSite, "heads 0 to 3"),
        (ScaleHeads(heads=[3]), RegardError, r"\(layer, head\)"),
        (ScaleHeads({(0, 1): 0.0}, heads=[("text.0", 1)]), RegardError, "twice"),
        (ScaleHeads({(0, 1): 0}, mode="mean", means={(0, 2): torch.ones(8)}), NoSuchSite, "not among"),
    ],
)
def test_unknown_heads_are_refused_before_a_run(llama, edit, error, match):
    with pytest.raises(error, match=match):
        regard.steer(llama, edit)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (ScaleHeads({(0, 1): torch.ones(3)}), "3 sequences, and the batch is 2"),
        (ScaleHeads({(0, 1): 0}, mode="mean", means={(0, 1): torch.ones(7)}), r"shape \(7,\)"),
    ],
)
def test_what_does_not_fit_the_batch_is_refused_when_run(llama, edit, match):
    with pytest.raises(RegardError, match=match), regard.steer(llama, edit):
        logits(llama, FAMILIES["llama"].inputs(llama))


@pytest.mark.parametrize("mode", ["zero", "mean", "uniform"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_the_scope_of_decoding_is_the_rows_that_choose(llama, mode, padding):
    """In the prompt the last row alone is changed; generated rows all are, with a cache or without."""
    inputs = FAMILIES["llama"].inputs(llama, padding)
    edit = {name: ScaleHeads(heads=[(0, 1), (1, 2)], mode=mode, scope=name) for name in ("all", "decode")}
    plain, everywhere, last = (
        logits(llama, inputs), *(steered(llama, inputs, edit[name]) for name in ("all", "decode"))
    )  # fmt: skip
    assert close(last[:, :-1], plain[:, :-1])
    assert not close(last[:, -1], plain[:, -1], 1e-3) and not close(last[:, -1], everywhere[:, -1], 1e-3)
    with regard.steer(llama, ScaleHeads(heads=[(1, 2)], mode=mode, scope="decode")):
        only_last = logits(llama, inputs)
    assert close(only_last[:, -1], steered(llama, inputs, ScaleHeads(heads=[(1, 2)], mode=mode))[:, -1])


@pytest.mark.parametrize("mode", ["zero", "uniform"])
def test_the_scope_of_decoding_in_generate_equals_steps_by_hand(llama, mode):
    inputs = FAMILIES["llama"].inputs(llama, "left")
    edit = ScaleHeads(heads=[(0, 1), (1, 2)], mode=mode, scope="decode")
    for cache in (None, "static"):
        with regard.steer(llama, edit):
            found = llama.generate(**inputs, max_new_tokens=4, do_sample=False, cache_implementation=cache)
        ids, mask, past = inputs["input_ids"], inputs["attention_mask"], None
        fed = ids
        with torch.no_grad(), regard.steer(llama, edit):
            for _ in range(4):
                positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -fed.shape[1] :]
                out = llama(input_ids=fed, attention_mask=mask, position_ids=positions, past_key_values=past)
                past, fed = out.past_key_values, out.logits[:, -1:].argmax(-1)
                ids, mask = torch.cat([ids, fed], 1), torch.cat([mask, torch.ones_like(fed)], 1)
        assert torch.equal(found, ids)


def test_the_scope_is_one_of_two():
    with pytest.raises(RegardError, match="scope is 'prefill'; it must be one of all, decode"):
        ScaleHeads(heads=[(0, 1)], scope="prefill")
