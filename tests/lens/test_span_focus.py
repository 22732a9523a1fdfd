"""Attention on a span, from rows and by key, against all attention returned; padding and decoding."""

import pytest
import torch

import regard
from regard.errors import RegardError
from regard.lens.span_focus import SpanFocus, SpanMass
from tests.lens.plant import HEAD, SITE, found_and_control


def dense(model, ids, valid):
    with torch.no_grad():
        return model(ids, attention_mask=valid.long(), output_attentions=True).attentions


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_both_equal_the_dense_computation(llama, side):
    torch.manual_seed(0)
    ids = torch.randint(3, 50, (3, 12))
    valid = torch.ones_like(ids, dtype=torch.bool)
    if side != "none":
        edge = torch.arange(12) < torch.tensor([0, 3, 5])[:, None]
        valid = ~(edge if side == "left" else edge.flip(1))
    span = (torch.rand(3, 12) < 0.4) & valid
    asking = (torch.rand(3, 12) < 0.5) & valid
    llama.config._attn_implementation, before = "eager", llama.config._attn_implementation
    layers = dense(llama, ids, valid)
    llama.config._attn_implementation = before
    lenses = (
        SpanMass(name="all", span="span"),
        SpanMass(name="asked", span="span", rows="asking"),
        SpanFocus(span="span"),
    )
    with torch.no_grad(), regard.watch(llama, *lenses, spans={"span": span, "asking": asking}) as seen:
        llama(ids, attention_mask=valid.long())
    causal = torch.ones(12, 12, dtype=torch.bool).tril() & valid[:, None] & valid[..., None]
    hit = (causal & span[:, None]).sum(-1)
    for name, rows in (("all", hit > 0), ("asked", (hit > 0) & asking)):
        even = (hit / causal.sum(-1).clamp_min(1))[rows].mean()
        for layer, weights in enumerate(layers):
            mass = (weights * span[:, None, None]).sum(-1)  # [B, H, T]
            expected = mass.transpose(1, 2)[rows].mean(0)
            found = torch.tensor(seen[name].grid("mass")[layer]).float()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
            assert seen[name].grid("even")[layer] == pytest.approx(float(even))
    for layer, weights in enumerate(layers):
        alpha = (weights * valid[:, None, :, None]).sum(2) / causal.sum(1).clamp_min(1)[:, None]
        columns = {"on": [], "off": [], "spread": []}
        for row in range(3):
            on, off = alpha[row][:, span[row]], alpha[row][:, valid[row] & ~span[row]]
            columns["on"].append(on.mean(1))
            columns["off"].append(off.mean(1))
            columns["spread"].append(off.var(1, correction=0))
        for name, each in columns.items():
            found = torch.tensor(seen[SpanFocus].grid(name)[layer]).float()
            torch.testing.assert_close(found, torch.stack(each).mean(0), rtol=1e-4, atol=1e-6)


def test_a_head_that_looks_at_the_span_is_found(llama):
    ids = torch.arange(5, 15)[None]
    span = torch.zeros_like(ids, dtype=torch.bool)
    span[:, 2] = True
    found, control = found_and_control(
        llama, ids, SpanMass(span="span"), lambda i: min(i, 2), spans={"span": span}
    )
    assert found.at(SITE, HEAD)["mass"] == pytest.approx(1.0) and control.at(SITE, HEAD)["mass"] < 0.6
    assert found.at(SITE, HEAD)["even"] == pytest.approx(sum(1 / (i + 1) for i in range(2, 10)) / 8)


def test_decoding_sees_what_a_full_forward_sees(llama):
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    span = torch.zeros_like(ids, dtype=torch.bool)
    span[:, 1:4] = True
    lenses = lambda: (SpanMass(span="span"), SpanFocus(span="span"))  # noqa: E731
    with torch.no_grad(), regard.watch(llama, *lenses(), spans={"span": span}) as step:
        out = llama.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    whole = torch.nn.functional.pad(span, (0, out.shape[1] - 1 - 7))
    with torch.no_grad(), regard.watch(llama, *lenses(), spans={"span": whole}) as full:
        llama(out[:, :-1])
    for kind, names in ((SpanMass, ("mass", "even")), (SpanFocus, ("on", "off", "spread"))):
        for name in names:
            assert step[kind].grid(name) == pytest.approx(full[kind].grid(name), rel=1e-4)


def test_an_unknown_span_is_refused(llama):
    with pytest.raises(RegardError, match="no span 'answer'"), regard.watch(llama, SpanMass(span="answer")):
        llama(torch.arange(5, 9)[None])
