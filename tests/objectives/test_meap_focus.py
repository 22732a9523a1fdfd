"""The diagnostics against all attention returned, and what they refuse."""

import pytest
import torch

from regard.errors import RegardError, ShapeMismatch
from regard.objectives.meap_focus import attention_focus
from tests.objectives.test_meap import HIDDEN, tiny


def models():
    plain, other = tiny(), tiny()
    torch.manual_seed(5)
    for weight in other.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    return plain.eval(), other.eval()


def dense(model, ids, valid):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = torch.stack(model(ids, attention_mask=valid.long(), output_attentions=True).attentions)
    model.set_attn_implementation("sdpa")
    return weights  # [L, B, H, T, T]


def test_it_is_the_definition():
    torch.manual_seed(1)
    ids = torch.randint(2, 60, (5, 20))
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :4] = valid[3, 15:] = False
    mask, answer = torch.zeros_like(valid), torch.zeros_like(valid)
    mask[:, 5:9], answer[:, 6:8] = True, True
    both = models()
    found = attention_focus(*both, ids, mask, mask_id=HIDDEN, valid=valid, answer=answer, batch_size=2)
    told = []
    for model in both:
        weights = dense(model, ids.masked_fill(mask, HIDDEN), valid)
        seen = torch.ones(20, 20).tril() * valid[:, None] * valid[..., None]
        alpha = (weights * valid[:, None, :, None]).sum(3) / seen.sum(1).clamp(min=1)[:, None]
        on, off, spread = [], [], []
        for row in range(5):
            on.append(alpha[:, row][..., mask[row]].mean())
            others = alpha[:, row][..., valid[row] & ~mask[row]]
            off.append(others.mean())
            spread.append(others.var(-1, correction=0).mean())
        clean = dense(model, ids, valid)
        last = valid.int().cumsum(1).argmax(1)
        mass = torch.stack([clean[:, n, :, last[n]][..., answer[n]].sum(-1).mean() for n in range(5)]).mean()
        told.append([float(torch.stack(x).mean()) for x in (on, off, spread)] + [float(mass)])
    (on, off, spread, mass), (on_b, off_b, spread_b, mass_b) = told
    for name, value in (
        ("masked_a", on), ("masked_b", on_b), ("others_a", off), ("others_b", off_b), ("variance_a", spread),
        ("answer_a", mass), ("answer_b", mass_b), ("elsewhere_b", 1 - mass_b), ("decay", (on - on_b) / on),
        ("variance", (spread_b - spread) / spread),
        ("even", sum(2 / n for n in (20, 16, 20, 15, 20)) / 5),
    ):  # fmt: skip
        assert getattr(found, name) == pytest.approx(value, rel=1e-3), name
    same = attention_focus(both[0], both[0], ids, mask, mask_id=HIDDEN)
    assert same.decay == same.variance == 0 and same.answer_a is None and same.told()["even"] is None


def test_the_rows_that_count_can_be_chosen():
    both = models()
    ids = torch.randint(2, 60, (1, 12))
    mask, answer, rows = (torch.zeros(1, 12, dtype=torch.bool) for _ in range(3))
    mask[0, 3], answer[0, 2:4], rows[0, [7, 9]] = True, True, True
    found = attention_focus(*both, ids, mask, mask_id=HIDDEN, answer=answer, rows=rows)
    weights = dense(both[0], ids, torch.ones_like(mask))
    assert found.answer_a == pytest.approx(float(weights[..., [7, 9], 2:4].sum(-1).mean()), rel=1e-4)
    assert found.even == pytest.approx((2 / 8 + 2 / 10) / 2)


def test_bad_input():
    both, ids = models(), torch.randint(2, 60, (1, 12))
    none = torch.zeros(1, 12, dtype=torch.bool)
    some = none.clone()
    some[0, 3] = True
    for mask in (none, ~none):
        with pytest.raises(RegardError, match="hides nothing or everything"):
            attention_focus(*both, ids, mask, mask_id=HIDDEN)
    with pytest.raises(RegardError, match="mask_id is 64, and the embedding of LlamaForCausalLM has 64 rows"):
        attention_focus(*both, ids, some, mask_id=64)
    with pytest.raises(ShapeMismatch, match=r"answer is torch.int64 \[1, 12\]; it must be bool"):
        attention_focus(*both, ids, some, mask_id=HIDDEN, answer=some.long())
