"""Adversarial attention: directions and their lengths, what they do to the loss, and where gradients go."""

import pytest
import torch
import transformers as tf
from torch import nn

from regard.errors import RegardError, ShapeMismatch
from regard.models.attending import AttendingClassifier
from regard.objectives.adversarial import (
    AdversarialLoss,
    AttentionAdversary,
    AttentionVirtualAdversary,
    ScorePort,
    reach,
)
from regard.objectives.adversarial.directions import random_unit, unit
from regard.objectives.adversarial.labelled import iat_by_definition
from regard.objectives.adversarial.virtual import divergence


class Reader(nn.Module):
    """Attention over the tokens of a sentence, and a linear answer."""

    def __init__(self, outputs=1):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(40, 8)
        self.score = nn.Linear(8, 1)
        self.answer = nn.Linear(8, outputs)

    def forward(self, ids, mask, added):
        hidden = self.words(ids)
        scores = (self.score(hidden.tanh())[..., 0] + added).masked_fill(~mask, -1e9)
        return self.answer((scores.softmax(-1)[..., None] * hidden).sum(1)).squeeze(-1)


def batch(size=6, length=9):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 40, (size, length), generator=generator)
    mask = torch.arange(length) < torch.tensor([9, 7, 5, 8, 3, 9])[:size, None]
    return ids, mask, torch.tensor([1.0, 0, 1, 0, 1, 0])[:size]


def losses(model, ids, mask, labels):
    return lambda added: nn.functional.binary_cross_entropy_with_logits(model(ids, mask, added[0]), labels)


def norms(r, mask):
    return (r[0] * mask).norm(dim=1)


@pytest.mark.parametrize("variant", ["at", "iat", "published", "random"])
def test_a_sequence_is_moved_by_eps_and_padding_is_not(variant):
    ids, mask, labels = batch()
    loss, told = AttentionAdversary(eps=0.7, variant=variant)(losses(Reader(), ids, mask, labels), [mask])
    torch.testing.assert_close(norms(told.perturbation, mask), torch.full((6,), 0.7))
    assert not told.perturbation[0][~mask].any() and not told.perturbation[0].requires_grad
    torch.testing.assert_close(loss.detach(), told.clean + told.adversarial)
    torch.testing.assert_close(told.perturbation[0].sum(1), torch.zeros(6), atol=1e-5, rtol=0)
    if variant != "random":
        assert (told.adversarial > told.clean) == (variant != "published")


def test_at_is_the_normalised_gradient_and_sign_its_sign():
    ids, mask, labels = batch()
    model = Reader()
    added = torch.zeros(mask.shape, requires_grad=True)
    g = torch.autograd.grad(losses(model, ids, mask, labels)((added,)), added)[0]
    found = {v: AttentionAdversary(eps=2.0, variant=v).perturbation([g], [mask])[0] for v in ("at", "sign")}
    torch.testing.assert_close(found["at"], 2 * g / g.norm(dim=1, keepdim=True))
    assert torch.equal(found["sign"], 2 * g.sign())


def test_iat_by_differences_is_at_but_for_tied_tokens():
    _, mask, _ = batch()
    scores, gradient = torch.randn(6, 9), torch.randn(6, 9) * mask
    by_pairs = iat_by_definition(scores.double(), gradient.double(), mask, 0.7)
    plain = AttentionAdversary(eps=0.7, variant="iat").perturbation([gradient], [mask])[0]
    torch.testing.assert_close(by_pairs.float(), plain, atol=1e-5, rtol=1e-4)
    assert not iat_by_definition(torch.ones(1, 4), torch.randn(1, 4), torch.ones(1, 4).bool(), 1.0).any()


def test_parameters_get_the_gradient_of_both_losses_and_nothing_else():
    ids, mask, labels = batch()
    model = Reader()
    loss_of = losses(model, ids, mask, labels)
    loss, told = AttentionAdversary(eps=0.7, lam=0.5)(loss_of, [mask])
    assert all(p.grad is None for p in model.parameters())
    loss.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (loss_of((torch.zeros(mask.shape),)) + 0.5 * loss_of(told.perturbation)).backward()
    for one, other in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad)


def test_what_is_masked_out_or_flat_is_left_alone():
    ids, mask, labels = batch()
    mask[2] = False
    mask[4] = torch.arange(9) == 0
    _, told = AttentionAdversary(eps=1.0)(losses(Reader(), ids, mask, labels), [mask])
    assert torch.isfinite(told.perturbation[0]).all()
    assert norms(told.perturbation, mask)[[2, 4]].tolist() == [0, 0]
    logits = lambda added: Reader()(ids, mask, added[0])  # noqa: E731
    _, moved = AttentionVirtualAdversary(eps=1.0)(logits, [mask])
    r = moved.perturbation
    assert norms(r, mask)[[2, 4]].tolist() == [0, 0] and norms(r, mask)[0] > 0.99


@pytest.mark.parametrize("outputs", [1, 3])
def test_divergence(outputs):
    held, other = torch.randn(2, 5, outputs).squeeze(-1)
    assert divergence(held, held).abs().max() < 1e-6 and (divergence(held, other) > 0).all()
    full = [torch.stack([x, torch.zeros_like(x)], -1) if outputs == 1 else x for x in (held, other)]
    expected = nn.functional.kl_div(
        full[1].log_softmax(-1), full[0].log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(divergence(held, other), expected)
    held.requires_grad_()
    other.requires_grad_()
    divergence(held, other).sum().backward()
    assert held.grad is None and other.grad.abs().sum() > 0


def test_the_divergence_of_a_small_step_is_quadratic():
    ids, mask, _ = batch()
    model = Reader(3)
    direction = random_unit([mask], torch.Generator().manual_seed(0))[0]
    held = model(ids, mask, torch.zeros(mask.shape)).double()
    sizes = [divergence(held, model(ids, mask, xi * direction)).sum().item() for xi in (0.4, 0.2)]
    assert 3.4 < sizes[0] / sizes[1] < 4.6


def test_a_power_step_moves_the_prediction_more_than_its_start():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 40, (200, 12), generator=generator)
    mask = torch.ones(200, 12, dtype=torch.bool)
    model = Reader(3)

    def moved(variant):
        adversary = AttentionVirtualAdversary(eps=0.3, xi=0.1, variant=variant,
                                              generator=torch.Generator().manual_seed(5))  # fmt: skip
        _, told = adversary(lambda added: model(ids, mask, added[0]), [mask])
        r = told.perturbation
        torch.testing.assert_close(norms(r, mask), torch.full((200,), 0.3))
        held = model(ids, mask, torch.zeros(200, 12))
        return divergence(held, model(ids, mask, r[0]))

    assert (moved("vat") > moved("random")).float().mean() >= 0.95


def test_with_two_classes_the_step_lies_on_the_line_of_the_labelled_gradient():
    ids, mask, labels = batch()
    model = Reader()
    _, moved = AttentionVirtualAdversary(eps=1.0, xi=0.01)(lambda added: model(ids, mask, added[0]), [mask])
    r = moved.perturbation
    _, told = AttentionAdversary(eps=1.0)(losses(model, ids, mask, labels), [mask])
    assert (r[0] * told.perturbation[0]).sum(1).abs().min() > 0.999


def encoder():
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.5,
    )  # fmt: skip
    return tf.BertForSequenceClassification(config)


def test_a_transformers_encoder_is_reached_layer_by_layer():
    ids, mask, labels = batch()
    model, inputs = encoder(), {"input_ids": ids, "attention_mask": mask.long(), "labels": labels.long()}
    port = ScorePort(model)
    valid = port.valid(mask)
    assert [list(v.shape) for v in valid] == [[6, 2, 9, 9]] * 2
    torch.testing.assert_close(
        port(tuple(torch.zeros(v.shape) for v in valid), **inputs).loss, model(**inputs).loss
    )
    for adversary in (AttentionAdversary(eps=1.0), AttentionAdversary(eps=1.0, variant="published")):
        loss, told = adversary(lambda added: port(added, **inputs).loss, valid)
        total = sum(r.flatten(1).square().sum(1) for r in told.perturbation).sqrt()
        torch.testing.assert_close(total, torch.ones(6))
        assert (told.adversarial > told.clean) == (adversary.variant == "at")
        assert not any((r[~v] != 0).any() for r, v in zip(told.perturbation, valid, strict=True))
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "query" in n or "classifier" in n)
    alone = ScorePort(model, layers=[1])
    assert len(alone.valid(mask)) == 1


def test_it_trains_with_a_part_without_labels():
    ids, mask, labels = batch()
    model = encoder()
    port, optimizer = ScorePort(model), torch.optim.Adam(model.parameters(), 1e-2)
    labelled = AttentionAdversary(eps=0.5)
    virtual = AttentionVirtualAdversary(eps=0.5, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    seen = []
    for _ in range(12):
        loss, told = labelled(
            lambda added: port(added, **inputs, labels=labels.long()).loss, port.valid(mask)
        )
        extra, _ = virtual(lambda added: port(added, **inputs).logits, port.valid(mask))
        optimizer.zero_grad()
        (loss + extra).backward()
        optimizer.step()
        seen.append((float(told.clean), float(told.adversarial)))
    assert seen[-1][0] < 0.5 * seen[0][0] and seen[-1][1] < seen[0][1]


def test_unit_of_nothing_is_nothing():
    assert not unit([torch.zeros(2, 3)], [torch.ones(2, 3).bool()])[0].any()


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (AttentionAdversary, {"eps": -1.0}, "eps is -1.0"),
        (AttentionAdversary, {"eps": 1.0, "variant": "other"}, "variant is 'other'"),
        (AttentionVirtualAdversary, {"eps": 1.0, "xi": 0.0}, "xi is 0.0"),
        (AttentionVirtualAdversary, {"eps": 1.0, "steps": 0}, "steps is 0"),
        (AttentionVirtualAdversary, {"eps": float("nan")}, "eps is nan"),
        (AttentionVirtualAdversary, {"eps": 1.0, "variant": "at"}, "variant is 'at'"),
    ],
)
def test_bad_options(kind, options, said):
    with pytest.raises(RegardError, match=said):
        kind(**options)


def test_scores_that_are_not_reached():
    mask = torch.ones(2, 3, dtype=torch.bool)
    leaf = torch.ones((), requires_grad=True)
    with pytest.raises(RegardError, match="before the softmax"):
        AttentionAdversary(eps=1.0)(lambda added: torch.zeros(()), [mask])
    with pytest.raises(RegardError, match="no gradient reaches the attention scores"):
        AttentionAdversary(eps=1.0)(lambda added: leaf * 2, [mask])
    with pytest.raises(RegardError, match="have no gradient"):
        AttentionVirtualAdversary(eps=1.0)(lambda added: torch.zeros(2, 3), [mask])
    with pytest.raises(ShapeMismatch, match="logits are"):
        AttentionVirtualAdversary(eps=1.0)(lambda added: torch.zeros(5, 3), [mask])
    with pytest.raises(RegardError, match="no attention scores"):
        AttentionAdversary(eps=1.0)(lambda added: leaf, [])
    with pytest.raises(ShapeMismatch, match="with the same B"):
        AttentionAdversary(eps=1.0)(lambda added: leaf, [mask, mask[:1]])


def three(kind):
    torch.manual_seed(0)
    size = {"vocab_size": 40, "max_position_embeddings": 24, "pad_token_id": 0}
    if kind == "distilbert":
        return tf.DistilBertForSequenceClassification(
            tf.DistilBertConfig(dim=16, hidden_dim=24, n_layers=2, n_heads=2, **size)
        )
    return tf.RobertaForSequenceClassification(
        tf.RobertaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **size
        )
    )


@pytest.mark.parametrize("kind", ["distilbert", "roberta", "bilstm"])
def test_losses_and_gradients_with_dropout_are_those_of_passes_written_out(kind):
    model = (AttendingClassifier(40) if kind == "bilstm" else three(kind)).train()
    ids, mask, labels = batch()
    inputs = {"input_ids": ids * mask, "attention_mask": mask.long()}
    torch.manual_seed(3)
    loss, told = AdversarialLoss(model, AttentionAdversary(eps=0.8, lam=0.5))(
        {**inputs, "labels": labels.long()}
    )
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.manual_seed(3)
    port = reach(model)
    logits_of, valid = port.reader(**inputs), port.valid(mask)
    zero = tuple(torch.zeros(v.shape) for v in valid)
    torch.testing.assert_close(logits_of(zero), logits_of(zero), msg="passes share their dropout")
    r = AttentionAdversary(eps=0.8)(lambda a: nn.functional.cross_entropy(logits_of(a), labels.long()), valid)
    losses = [nn.functional.cross_entropy(logits_of(a), labels.long()) for a in (zero, r[1].perturbation)]
    (losses[0] + 0.5 * losses[1]).backward()
    assert told["task"] == pytest.approx(losses[0].item(), rel=1e-4)
    assert told["added"] > told["task"] and told["still"] == 0
    for name, p in model.named_parameters():
        if p.grad is not None and p.grad.abs().max() > 1e-5:
            torch.testing.assert_close(found[name], p.grad, rtol=2e-3, atol=2e-5)


def test_without_labels_and_in_evaluation():
    model, (ids, mask, _) = AttendingClassifier(40).train(), batch()
    some = torch.tensor([0, 1, -100, 1, -100, -100])
    inputs = {"input_ids": ids * mask, "attention_mask": mask.long()}
    for adversary in (AttentionAdversary(eps=1.0), AttentionVirtualAdversary(eps=1.0)):
        loss, told = AdversarialLoss(model.train(), adversary)({**inputs, "labels": some})
        plain = nn.functional.cross_entropy(model(**inputs).logits[[0, 1, 3]], some[[0, 1, 3]])
        assert told["task"] == pytest.approx(plain.item(), rel=1e-5) and told["added"] > 0
        assert loss.item() == pytest.approx(told["task"] + told["added"], rel=1e-5)
        clean, told = AdversarialLoss(model.eval(), adversary)({**inputs, "labels": some})
        assert set(told) == {"task"} and clean.item() == pytest.approx(plain.item(), rel=1e-5)
    none = AdversarialLoss(model.train(), AttentionVirtualAdversary(eps=1.0))(
        {**inputs, "labels": torch.full((6,), -100)}
    )[1]
    assert none["task"] == 0 and none["added"] > 0
    with pytest.raises(RegardError, match="adversary is int"):
        AdversarialLoss(model, 3)
    with pytest.raises(RegardError, match="single attention"):
        reach(model, layers=[0])


def test_a_text_without_a_token_and_one_of_a_single_token_are_skipped_and_counted():
    model = AttendingClassifier(40).train()
    ids = torch.tensor([[5, 6, 7], [5, 0, 0], [0, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([0, 1, 1])}
    for adversary in (AttentionAdversary(eps=1.0), AttentionVirtualAdversary(eps=1.0)):
        loss, told = AdversarialLoss(model, adversary)(inputs)
        loss.backward()
        assert told["still"] == 2 and all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_gradient_that_is_not_finite_moves_nothing():
    values = torch.tensor([[1.0, float("inf")], [3.0, 4.0], [1e-15, 0.0]])
    expected = torch.tensor([[0, 0], [0.6, 0.8], [0, 0]])
    torch.testing.assert_close(unit([values], [torch.ones(3, 2).bool()])[0], expected)


def test_the_power_step_is_taken_in_float32_under_autocast():
    model, (ids, mask, _) = AttendingClassifier(40).train(), batch()
    inputs = {"input_ids": ids * mask, "attention_mask": mask.long()}
    found = []
    for mixed in (False, True):
        virtual = AttentionVirtualAdversary(eps=1.0, xi=0.1, generator=torch.Generator().manual_seed(0))
        port = reach(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss, told = virtual(port.reader(**inputs), port.valid(mask))
        loss.backward()
        found.append(told.perturbation[0])
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-3)


def test_ivat_is_vat_and_ivat_token_its_sign():
    model, (ids, mask, _) = Reader(3), batch()
    logits = lambda added: model(ids, mask, added[0])  # noqa: E731
    found = {}
    for variant in ("vat", "ivat", "ivat_token"):
        virtual = AttentionVirtualAdversary(
            eps=1.0, variant=variant, generator=torch.Generator().manual_seed(0)
        )
        found[variant] = virtual(logits, [mask])[1].perturbation[0]
    assert torch.equal(found["vat"], found["ivat"])
    assert torch.equal(found["ivat_token"], found["vat"].sign())


def test_a_fused_kernel_that_hides_scores_is_named():
    q = torch.randn(2, 1, 4, 8, requires_grad=True)

    def loss_of(added):
        hidden = added[0].detach()[:, None, None]
        return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=hidden).sum()

    with pytest.raises(RegardError, match="flash_attention_2.*SDPBackend.MATH"):
        AttentionAdversary(eps=1.0)(loss_of, [torch.ones(2, 4).bool()])


def test_a_model_on_sdpa_is_perturbed_as_one_on_eager():
    ids, mask, labels = batch()
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels.long()}
    found = []
    for implementation in ("eager", "sdpa"):
        model = encoder()
        model.set_attn_implementation(implementation)
        port = ScorePort(model.eval())
        _, told = AttentionAdversary(eps=1.0)(lambda a, p=port: p(a, **inputs).loss, port.valid(mask))
        found.append(told.perturbation[0])
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-3)


def test_padded_texts_have_the_states_of_packed_ones():
    model, (ids, mask, _) = AttendingClassifier(40), batch()
    ids = ids.clamp_min(1)
    alone = [model.token_states(row[None, :n])[0][0] for row, n in zip(ids, mask.sum(1), strict=True)]
    states, _ = model.token_states(ids, mask)
    for row, (one, n) in enumerate(zip(alone, mask.sum(1), strict=True)):
        torch.testing.assert_close(states[row, :n], one)
    assert not states[~mask].any()
