"""Heads put out where they idle, what that costs, and where the residual peak is made."""

import pytest
import torch

import regard
from regard.edit import check_row_local
from regard.edit.dormant import EntropyGate, forced_losses, silence, sink_origin
from regard.errors import NoSuchSite, RegardError
from tests.support.families import FAMILIES

HEADS = [(0, 1), (1, 3)]


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build("sdpa")


def entropies(a):
    """Mean normalised row entropy and largest column entropy of dense weights [t, t], as the paper's code."""
    length = len(a)
    counts = torch.arange(1, length + 1, dtype=a.dtype)
    rows = torch.special.entr(a).sum(1)[1:] / counts[1:].log()
    shares = a / a.sum(0)
    columns = torch.special.entr(shares).sum(0)[:-1] / counts.flip(0)[:-1].log()
    return float(rows.sum() / length), float(columns.max())


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("then", ["sink", "zero"])
def test_the_gate_closes_where_the_formula_says(llama, padding, then):
    inputs = FAMILIES["llama"].inputs(llama, padding)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    with torch.no_grad(), regard.watch(llama) as seen:
        llama(**inputs)
    found = []
    for sequence, keep in enumerate(real):
        a = seen.weights(0, 1, sequence).double()[keep][:, keep]
        found.append(entropies(a))
    (row, column), (row_2, column_2) = found
    between = {"row_below": (row + row_2) / 2, "column_above": min(column, column_2) - 1e-4}
    gate = EntropyGate([(0, 1)], then=then, **between)
    with torch.no_grad(), regard.steer(llama, gate) as steered:
        llama(**inputs)
    for sequence, keep in enumerate(real):
        before, after = (s.weights(0, 1, sequence)[keep][:, keep] for s in (seen, steered))
        if found[sequence][0] > between["row_below"]:
            torch.testing.assert_close(after, before)
        else:
            expected = torch.zeros_like(after)
            expected[:, 0] = then == "sink"
            torch.testing.assert_close(after, expected)
        for head in (0, 2):
            pair = [s.weights(0, head, sequence)[keep] for s in (seen, steered)]
            torch.testing.assert_close(*pair)


def test_a_gate_that_never_closes_changes_nothing_and_blocks_do_not_matter(llama):
    inputs = FAMILIES["llama"].inputs(llama, "left")
    with torch.no_grad():
        plain = llama(**inputs).logits
        with regard.steer(llama, EntropyGate(HEADS, row_below=0, column_above=1)):
            again = llama(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(again[real], plain[real])
    check_row_local(llama, EntropyGate(HEADS, row_below=1, column_above=0), inputs)


@pytest.mark.parametrize("mode", ["zero", "sink", "entropy"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_it_goes_on_while_text_is_generated(llama, mode, options):
    inputs = FAMILIES["llama"].inputs(llama, "left")
    thresholds = {"row_below": 1.0, "column_above": 0.0} if mode == "entropy" else {}
    plain = llama(**inputs).logits
    with torch.no_grad(), regard.steer(llama, silence(HEADS, mode, **thresholds)):
        whole = llama.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0, **options)
        if not options:
            for _ in range(4):
                mask = torch.ones_like(inputs["input_ids"]) if "attention_mask" not in inputs else None
                mask = inputs.get("attention_mask", mask)
                new = llama(**inputs).logits[:, -1].argmax(-1, keepdim=True)
                inputs = {
                    "input_ids": torch.cat([inputs["input_ids"], new], 1),
                    "attention_mask": torch.cat([mask, torch.ones_like(new)], 1),
                }
            assert torch.equal(whole, inputs["input_ids"])
    assert whole.shape[1] == 13
    torch.testing.assert_close(llama(**FAMILIES["llama"].inputs(llama, "left")).logits, plain)


def test_losses_are_those_of_one_head_at_a_time(llama):
    texts = [torch.arange(5, 17), torch.arange(30, 39)]
    table = forced_losses(llama, None, texts, texts[:1], HEADS)

    def total(*edits):
        with torch.no_grad(), regard.steer(llama, *edits) if edits else torch.no_grad():
            each = [llama(input_ids=ids[None], labels=ids[None]).loss * (len(ids) - 1) for ids in texts]
        return float(sum(each)) / sum(len(ids) - 1 for ids in texts)

    plain = total()
    assert table.about["loss"][0] == pytest.approx(plain, rel=1e-5)
    for head in HEADS:
        rise = total(silence([head], "sink")) - plain
        assert table.at(*head)["a"] == pytest.approx(rise, abs=1e-5)


def test_leaving_a_block_out_is_seen_in_the_peak(llama):
    texts = [torch.arange(5, 17)]
    found = sink_origin(llama, None, texts, blocks=[0], read_at=1)
    assert found["part"] == ["none", "attention", "mlp", "both"] and found["left"][0] == 1
    with torch.no_grad():
        h = llama(input_ids=texts[0][None], output_hidden_states=True).hidden_states
    assert len(set(found["first"])) == 4
    embedded = llama.model.layers[1](
        h[0], position_embeddings=llama.model.rotary_emb(h[0], torch.arange(12)[None])
    )
    embedded = embedded[0] if isinstance(embedded, tuple) else embedded
    assert found["first"][3] == pytest.approx(float(embedded[0, 0].detach().norm()), rel=1e-4)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: silence([(0, 1)], "entropy"), "give row_below and column_above"),
        (lambda: silence([(0, 1)], "zero", row_below=0.5), "are of mode 'entropy'"),
        (lambda: silence([(0, 1)], "off"), "must be zero, sink or entropy"),
        (lambda: silence([], "zero"), "at least one"),
        (lambda: EntropyGate([(0, 1)], row_below=2, column_above=0), "between 0 and 1"),
    ],
)
def test_refusals(make, said):
    with pytest.raises(RegardError, match=said):
        make()


def test_refuses_heads_that_are_not_there(llama):
    with pytest.raises(NoSuchSite, match="head 9"), regard.steer(llama, silence([(0, 9)], "sink")):
        pass
    with pytest.raises(NoSuchSite):
        forced_losses(llama, None, [torch.arange(5, 17)], [torch.arange(5, 17)], [(7, 0)])
