"""Explanations of tokens: measures by known vectors, Captum's own numbers, attention by whole matrices."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from regard.errors import RegardError, ShapeMismatch, UnsupportedModel
from regard.lens.explanations import (
    METHODS,
    WARNING,
    agreement,
    compare_methods,
    explain,
    faithfulness,
    flow,
    paths_of,
    rank_agreement,
    rollout,
    subject_of,
    top_k,
)
from regard.models.attending import AttendingClassifier, BagClassifier
from regard.models.tiny_distilbert import tiny_distilbert
from regard.tasks.labelled import word_tokenizer
from tests.support.families import FAMILIES

IDS = [7, 9, 11, 5, 20, 13, 8]


@pytest.fixture(scope="module")
def bilstm():
    torch.manual_seed(1)
    return AttendingClassifier(30, 3, dim=8, hidden=12).eval()


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(1)
    model = tiny_distilbert(30, 3, dim=16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.mark.parametrize(
    ("x", "p", "expected"),
    [
        ([1, 2, 3, 1, 1, 2, 2], 0.5, {7: 1 - 26 / 21, 3: 1 - 26 / 21, 2: 1 - 20 / 13, 1: -1}),
        ([1, 2, 3, 1, 2, 2, 2], 1.0, {7: 1 - 38 / 21, 3: 1 - 38 / 21, 2: 1 - 32 / 17, 1: -1}),
    ],
)
def test_top_k_counts_buckets(x, p, expected):
    y = [3, 2, 1, 2, 1, 2, 1]
    for k, value in expected.items():
        assert top_k(x, y, k, p) == pytest.approx(value, abs=1e-12)


def test_top_k_at_its_ends_and_by_share():
    x = np.array([0.1, 0.9, 0.4, 0.0])
    assert top_k(x, x, 2) == 1 and top_k(x, -x, 4) == -1
    assert top_k(x, x[::-1], 0.5) == top_k(x, x[::-1], 2)
    assert top_k(x, x[::-1], "nonzero") == top_k(x, x[::-1], 3)


def test_measures_are_scipys():
    x, y = np.random.default_rng(0).integers(0, 9, (2, 12)).astype(float)
    assert rank_agreement(x, y, "kendall") == pytest.approx(stats.kendalltau(x, y).statistic)
    assert rank_agreement(x, y, "weighted") == pytest.approx(stats.weightedtau(x, y).statistic)
    assert rank_agreement(x, y, "spearman") == pytest.approx(stats.spearmanr(x, y).statistic)
    assert rank_agreement(x, y, "pearson") == pytest.approx(stats.pearsonr(x, y).statistic)


def test_ap_without_ties_is_its_formula_on_both_sides():
    x, y = np.random.default_rng(1).random((2, 9))

    def one(x, y):
        order = np.argsort(-y)
        shares = [np.mean([x[order[j]] > x[order[i]] for j in range(i)]) for i in range(1, 9)]
        return 2 * np.mean(shares) - 1

    assert rank_agreement(x, y, "ap") == pytest.approx((one(x, y) + one(y, x)) / 2)
    assert rank_agreement(x, x, "ap") == 1 and rank_agreement(x, -x, "ap") == -1


def test_constant_scores_are_counted_and_never_zero():
    found = agreement({"a": [[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]], "b": [[1.0, 2.0, 3.0]] * 2})
    assert math.isnan(found.of("a", "b")[1]) and found.undefined[0, 1] == 1 and found.count[0, 1] == 1
    assert found.mean[0, 1] == 1
    assert "not defined" in " ".join(found.said())


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: rank_agreement([1, 2], [1, 2, 3]), ShapeMismatch, "same"),
        (lambda: rank_agreement([1], [1]), ShapeMismatch, "two tokens"),
        (lambda: rank_agreement([1, math.nan], [1, 2]), RegardError, "finite"),
        (lambda: top_k([1, 2], [1, 2], 0), RegardError, "from 1"),
        (lambda: top_k([1, 2], [1, 2], 1.5), RegardError, "share"),
        (lambda: rank_agreement([1, 2], [1, 2], "tau"), RegardError, "kendall"),
        (lambda: agreement({"a": [1.0, 2.0]}), RegardError, "two or more"),
        (lambda: agreement({"a": [[1.0, 2.0]], "b": [[1.0, 2.0, 3.0]]}), ShapeMismatch, "text 0"),
        (lambda: agreement({"a": [[1.0, 2.0]], "b": [[1.0, 2.0]] * 2}), ShapeMismatch, "same texts"),
        (lambda: agreement({"random": [1.0, 2.0], "b": [1.0, 2.0]}), RegardError, "something else"),
        (lambda: flow(torch.ones(1, 65, 65), 0), RegardError, "64"),
    ],
)
def test_bad_scores_are_refused(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


def test_chance_is_that_of_random_scores():
    texts = np.random.default_rng(2).random((2, 40, 15))
    found = agreement({"a": list(texts[0]), "b": list(texts[1])})
    assert found.chance[0, 1] == pytest.approx(1.96 * 0.19 / math.sqrt(40), rel=0.15)
    same = agreement({"a": list(texts[0]), "b": list(texts[0] + 0.05 * texts[1])})
    assert same.told[0, 1] and not same.told[0, 2]
    low, high = same.interval
    assert low[0, 1] < same.mean[0, 1] < high[0, 1]
    dropped = agreement({"a": list(texts[0]), "b": list(texts[1])}, drop_first=True)
    expected = stats.kendalltau(texts[0, 0, 1:], texts[1, 0, 1:]).statistic
    assert dropped.of("a", "b")[0] == pytest.approx(expected)


def test_a_result_is_written_with_its_warning(tmp_path):
    found = agreement({"a": [[1.0, 2.0, 3.0]], "b": [[1.0, 3.0, 2.0]]})
    assert WARNING in found.to_markdown(tmp_path / "a.md") and WARNING in str(found)
    assert found.to_csv(tmp_path / "a.csv").splitlines()[0].startswith("first,second,mean,low,high,std,texts")
    found.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000 and (tmp_path / "a.md").is_file()


def uniform(length):
    rows = torch.tril(torch.ones(length, length, dtype=torch.float64))
    return rows / rows.sum(1, keepdim=True)


def test_rollout_of_uniform_causal_attention_has_its_closed_form():
    found = rollout(uniform(4)[None])
    expected = (uniform(4) + torch.eye(4)) / 2
    torch.testing.assert_close(found, expected)
    twice = rollout(uniform(4).expand(2, 4, 4))
    torch.testing.assert_close(twice, expected @ expected)
    torch.testing.assert_close(twice.sum(1), torch.ones(4, dtype=torch.float64))


def test_flow_of_a_graph_worked_by_hand():
    """From token 2: the top gives 0.2 to node 0, 0.3 to 1, 0.5 to 2; below, capacities bound what goes on."""
    top = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]])
    low = torch.tensor([[1.0, 0, 0], [0.4, 0.6, 0], [0.1, 0.3, 0.6]])
    raw = torch.tensor([0.2 + 0.3 + 0.1, 0.3 + 0.3, 0.5], dtype=torch.float64)
    torch.testing.assert_close(flow(torch.stack([low, top]), 2), raw / raw.sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_paths_are_those_of_whole_matrices(family):
    model = FAMILIES[family].build("eager")
    ids = torch.tensor([IDS])
    with torch.no_grad():
        out = model(ids, output_attentions=True)
    dense = torch.stack(out.attentions).mean(2)[:, 0]
    found = paths_of(model, {"input_ids": ids}, keep=True)
    torch.testing.assert_close(found.rollout["weights"][0], rollout(dense), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mean["weights"][0], dense.mean(0), rtol=1e-5, atol=1e-6)
    row = -1 if found.causal else 0
    assert found.causal == (family != "bert")
    torch.testing.assert_close(found.scores("rollout")[0], rollout(dense)[row].double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.scores("flow").sum(1), torch.ones(1, dtype=torch.float64))


def test_norms_are_kobayashis_with_grouped_keys():
    model = FAMILIES["llama"].build("eager")
    config, ids = model.config, torch.tensor([IDS])
    layer = model.model.layers[0]
    with torch.no_grad():
        out = model(ids, output_attentions=True, output_hidden_states=True)
        x = layer.input_layernorm(out.hidden_states[0])[0]
        values = layer.self_attn.v_proj(x).view(len(IDS), config.num_key_value_heads, -1)
        group = config.num_attention_heads // config.num_key_value_heads
        each = values.repeat_interleave(group, 1)
        weight = layer.self_attn.o_proj.weight.view(config.hidden_size, config.num_attention_heads, -1)
        norms = torch.einsum("thd,mhd->thm", each, weight).norm(dim=-1)
        expected = (out.attentions[0][0] * norms.T[:, None]).mean(0)
    found = paths_of(model, {"input_ids": ids}, keep=True).layers["norm"][0, 0]
    rows = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(found, (rows + torch.eye(len(IDS))) / 2, rtol=1e-4, atol=1e-5)


def test_padding_does_not_count():
    model = FAMILIES["llama"].build("eager")
    alone = paths_of(model, {"input_ids": torch.tensor([IDS])})
    padded = {"input_ids": torch.tensor([[0, 0, *IDS]]), "attention_mask": torch.tensor([[0, 0] + [1] * 7])}
    found = paths_of(model, padded)
    torch.testing.assert_close(found.rollout["norm"][:, 2:, 2:], alone.rollout["norm"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.mean["weights"][:, 2:, 2:], alone.mean["weights"], rtol=1e-4, atol=1e-5)
    assert not found.mean["weights"][:, :2].any()


def test_paths_go_on_from_no_cache_and_need_attention():
    model = FAMILIES["llama"].build("eager")
    with torch.no_grad():
        cache = model(torch.tensor([IDS]), use_cache=True).past_key_values
    with pytest.raises(RegardError, match="cache"):
        paths_of(model, {"input_ids": torch.tensor([[5]]), "past_key_values": cache})
    with pytest.raises(UnsupportedModel, match="attention"):
        explain(BagClassifier(30).eval(), None, IDS, "rollout", baseline="zero")


def test_deterministic_methods_are_captums(encoder):
    from captum.attr import FeatureAblation, InputXGradient, IntegratedGradients, Saliency

    ids, e0 = torch.tensor([IDS]), encoder.get_input_embeddings().weight[0].detach()
    e = encoder.get_input_embeddings()(ids).detach()

    def forward(x):
        return encoder(inputs_embeds=x).logits.softmax(-1)

    def of(method):
        return torch.tensor(explain(encoder, None, IDS, method, target=1, baseline=0, steps=20).values)

    def near(found, expected):
        torch.testing.assert_close(found, expected[0].double(), rtol=1e-5, atol=1e-6)

    leaf = e.clone().requires_grad_()
    near(of("gradxinput"), InputXGradient(forward).attribute(leaf, target=1).sum(-1).detach())
    near(of("gradnorm"), Saliency(forward).attribute(leaf, target=1, abs=False).norm(dim=-1))
    base = e0.expand_as(e)
    mask = torch.arange(len(IDS))[None, :, None]
    near(
        of("occlusion"),
        FeatureAblation(forward).attribute(e, base, target=1, feature_mask=mask).mean(-1),
    )
    steps = explain(encoder, None, IDS, "ig", target=1, baseline=0, steps=20).settings["steps"]
    whole = IntegratedGradients(forward).attribute(leaf, base, target=1, n_steps=steps).sum(-1)
    near(of("ig"), whole.detach())


def test_integrated_gradients_tell_their_error(encoder):
    rough = explain(encoder, None, IDS, "ig", baseline=0, of="logit", steps=1, most_steps=1)
    fine = explain(encoder, None, IDS, "ig", baseline=0, of="logit", steps=256, most_steps=256)
    for found in (rough, fine):
        total = found.values.sum() - (found.value - found.value_baseline)
        assert found.error == pytest.approx(total, abs=1e-5)
    assert abs(fine.error) < abs(rough.error) and fine.converged
    assert "completeness error" in str(rough)


def test_a_linear_classifier_has_one_explanation_and_deeplift_is_refused_elsewhere(bilstm):
    torch.manual_seed(3)
    model = BagClassifier(30).double().eval()
    told = compare_methods(
        model, None, [IDS, IDS[::-1]], ["gradxinput", "ig", "deeplift", "occlusion", "deepshap"],
        baseline="zero", of="logit", faithful=False,
    )  # fmt: skip
    found = told.agreement()
    assert np.allclose(found.mean[:4, :4], 1)
    with pytest.raises(UnsupportedModel, match="DeepLIFT"):
        explain(bilstm, None, IDS, "deeplift", baseline="zero")


def test_a_bilstm_shows_its_own_weights(bilstm):
    with torch.no_grad():
        out = bilstm(torch.tensor([IDS]))
    found = explain(bilstm, None, IDS, "average", baseline="zero")
    assert np.allclose(found.values, out.token_attention[0]) and found.values.sum() == pytest.approx(1)
    norm = explain(bilstm, None, IDS, "norm", baseline="zero")
    assert np.allclose(norm.values, out.token_attention[0] * out.states[0].norm(dim=-1))
    with pytest.raises(UnsupportedModel, match="no rollout"):
        explain(bilstm, None, IDS, "rollout", baseline="zero")


def test_what_is_drawn_is_drawn_again_and_disturbs_nobody(bilstm):
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    first, same, other = (
        explain(bilstm, None, IDS, "lime", baseline="zero", samples=30, seed=seed).values
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first, same) and not np.array_equal(first, other)
    assert torch.rand(1) == expected[0] and np.random.rand() == expected[1]
    assert not np.array_equal(
        *(explain(bilstm, None, IDS, "gradshap", baseline="zero", seed=seed).values for seed in (1, 2))
    )


def test_targets_name_classes_tokens_and_differences(encoder):
    model = FAMILIES["llama"].build("eager")
    one, other, both = (
        explain(model, None, IDS, "occlusion", target, baseline=0) for target in (3, 4, (3, 4))
    )
    assert np.allclose(both.values, one.values - other.values, atol=1e-5)
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0, -1]
    assert both.value == pytest.approx(float(logits[3] - logits[4]), abs=1e-5)
    named = explain(encoder, None, IDS, "gradnorm", "LABEL_2", baseline=0)
    assert "LABEL_2" in named.target and named.target.startswith("probability")


def test_padding_is_taken_out_of_a_text(encoder):
    tokenizer = word_tokenizer(["a b c d"], 30)
    plain = explain(encoder, tokenizer, "a b c", "gradxinput")
    tokenizer._tokenizer.enable_padding(length=12)
    padded = explain(encoder, tokenizer, "a b c", "gradxinput")
    assert padded.tokens == plain.tokens == ("[CLS]", "a", "b", "c", "[SEP]")
    assert np.array_equal(padded.values, plain.values) and padded.special == (True, False, False, False, True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": "  "}, "empty"),
        ({"text": [5]}, "at least two"),
        ({"text": [5] * 65}, "takes 64"),
        ({"tokenizer": None, "text": "a b"}, "tokenizer"),
        ({"method": "rolout"}, "rollout"),
        ({"target": "good"}, "LABEL_0"),
        ({"target": 7}, "0 to 2"),
        ({"target": (1, 2, 0)}, "two"),
        ({"of": "loss"}, "logit"),
        ({"samples": 0}, "samples"),
        ({"baseline": 99}, "knows tokens"),
        ({"baseline": torch.zeros(3)}, "embeddings are"),
    ],
)
def test_bad_requests_are_refused(encoder, change, words):
    asked = {"model": encoder, "tokenizer": word_tokenizer(["a b"], 30), "text": "a b", "method": "gradnorm"}
    with pytest.raises(RegardError, match=words):
        explain(**{**asked, **change})


def test_models_that_cannot_be_explained_are_refused(encoder):
    with pytest.raises(UnsupportedModel, match="inputs_embeds"):
        explain(torch.nn.Linear(2, 2), None, IDS)
    with pytest.raises(RegardError, match="no \\[PAD\\]"):
        model = FAMILIES["llama"].build("eager")
        model.config.pad_token_id = None
        explain(model, None, IDS)
    with pytest.raises(RegardError, match="training"):
        explain(BagClassifier(30).train(), None, IDS)
    with pytest.raises(RegardError, match="half precision"):
        explain(BagClassifier(30).half().eval(), None, IDS)


def test_deletion_and_insertion_by_hand():
    torch.manual_seed(0)
    model = BagClassifier(30).double().eval()
    subject = subject_of(model, None, IDS, 1, baseline="zero", of="logit")
    each = torch.tensor(explain(model, None, IDS, "occlusion", 1, baseline="zero", of="logit").values)
    order = each.argsort(descending=True)
    gone = torch.stack([each[order[:i]].sum() for i in range(1, len(IDS))]).mean()
    found = faithfulness(subject, {"best": each.numpy(), "worst": -each.numpy()})
    assert found["best"].deletion == pytest.approx(float(gone), abs=1e-9)
    assert found["best"].insertion == pytest.approx(float(gone), abs=1e-9)
    assert found["best"].deletion > found["random"].deletion > found["worst"].deletion


def test_a_comparison_holds_everything(encoder):
    seen = []
    told = compare_methods(
        encoder, None, [IDS, IDS[:5]], baseline=0, samples=20, steps=8, tick=lambda: seen.append(1)
    )
    assert len(seen) == len(told) == 2 and set(told.left_out) == {"deeplift"}
    assert set(told.again) == {"lime", "gradshap"} and set(told.methods) <= set(METHODS)
    found = told.agreement(measure="topk", k=2)
    assert "lime again" in found.methods and found.methods[-1] == "random"
    assert any("DeepLIFT" in f.text for f in told.findings()) and any(
        f.text == WARNING for f in told.findings()
    )
    assert len(told.faithfulness) == len(told.methods) and "ig" in told.errors["method"]
    titles = [panel.title for panel in told.panels()]
    assert titles[0].startswith("Tokens of text 1") and "Agreement of methods" in titles
    from regard.report import Report, Section

    page = Report(title="tiny", sections=[Section(title="a", findings=told.findings(), panels=told.panels())])
    assert "should not be used to judge" in page.html()
    with pytest.raises(RegardError, match="one for each"):
        compare_methods(encoder, None, [IDS], target=[1, 2], baseline=0)
    with pytest.raises(RegardError, match="at least one text"):
        compare_methods(encoder, None, [], baseline=0)
    with pytest.raises(UnsupportedModel, match="DeepLIFT"):
        compare_methods(encoder, None, [IDS], ["deeplift", "ig"], baseline=0)


def test_unconverged_gradients_are_not_ranked_unless_asked(encoder):
    told = compare_methods(
        encoder, None, [IDS], ["ig", "gradnorm"], baseline=0, steps=1, most_steps=1, faithful=False
    )
    assert not told.explanations["ig"][0].converged
    assert math.isnan(told.agreement().of("ig", "gradnorm")[0])
    assert "not ranked" in " ".join(told.agreement().said())
    assert np.isfinite(told.agreement(unconverged=True).of("ig", "gradnorm")[0])
