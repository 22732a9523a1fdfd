"""The study of NiNformer: a quick run, its parts, and what would make its claims fail."""

import pytest
import torch

from regard.studies import find_study, run
from regard.studies import ninformer as parts
from regard.studies.picture import save_picture
from regard.studies.threads import one_thread
from regard.studies.verdict import judge
from regard.tasks.images import digits, normalized

SLUG = "ninformer"


@pytest.fixture(scope="module")
def outcome():
    """A quick run, once for all tests here."""
    return run(SLUG, quick=True)


def test_a_quick_run_measures_every_arm(outcome):
    assert outcome.quick
    for name in parts.ARMS:
        assert all(0 <= outcome.value(name + end) <= 1 for end in ("", "_few", "_moved"))
    assert all(outcome.value(f"{kind}_{n}") > 0 for kind in ("gating", "attention") for n in parts.TOKENS)
    assert [len(sizes) for sizes in outcome.details["residual"].values()] == [3, 3, 3]


def test_arms_have_equal_parameters_and_differ_as_named():
    models = {name: parts.built(name) for name in parts.ARMS}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert all(abs(n - counts["nin"]) < 0.03 * counts["nin"] for n in counts.values())
    assert models["one"].model[0].mgu.Mixer is None and models["add"].model[0].mgu.gate == "add"
    assert models["apart"].model[0].norm2 is not None and models["nin"].model[0].norm2 is None
    for name, first in (("mixer", "blocks.0.mlp_channels.fc1"), ("nin", "model.0.ffn.net.0")):
        weight = models[name].get_submodule(first).weight.detach()
        assert weight.abs().max() <= 32**-0.5 and float(weight.std()) == pytest.approx(96**-0.5, rel=0.1)


def test_without_a_gate_tokens_are_a_bag():
    x = torch.randn(2, 1, 8, 8)
    turned = x.roll(2, dims=3)
    for name, same in (("one", True), ("nin", False), ("vit", False), ("mixer", False)):
        model = parts.built(name).eval()
        with torch.no_grad():
            off = (model(turned).logits - model(x).logits).abs().max()
        assert bool(off < 1e-5) == same, name


def test_a_tenth_is_of_each_class_and_drawn():
    labels = torch.arange(10).repeat_interleave(30)
    first, second = (parts.tenth(labels, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert labels[first].bincount().tolist() == [3] * 10 and not torch.equal(first, second)


def test_shifts_move_by_two_pixels():
    x = torch.arange(64.0).view(1, 1, 8, 8)
    up, down, left, right = parts.shifted(x)
    assert torch.equal(up[..., :6, :], x[..., 2:, :]) and torch.equal(down[..., 2:, :], x[..., :6, :])
    assert torch.equal(left[..., :6], x[..., 2:]) and torch.equal(right[..., 2:], x[..., :6])
    assert torch.equal(down[..., 0, :], x[..., 0, :])


def test_where_the_costs_cross():
    assert parts.crossing((16, 64, 256), (1.5, 2.0, 0.5)) == pytest.approx(128)
    assert parts.crossing((16, 64), (1.5, 1.2)) is None and parts.crossing((16, 64), (0.9, 0.8)) is None


def test_training_learns_digits():
    study = find_study(SLUG)
    data = digits(seed=0)
    mean, std = data.statistics()
    images, labels = normalized(data.train, mean, std), data.train_labels
    with torch.random.fork_rng(), one_thread():
        model = study(study.quick, 0)._fitted("nin", 0, images, labels, 60)
        with torch.no_grad():
            held = normalized(data.held_out, mean, std)
            assert parts.right(model, held, data.held_out_labels) > 0.4


@pytest.mark.parametrize(
    ("claim", "values"),
    [
        ("tokens talk", {"one": [0.95, 0.96, 0.95]}),
        ("not below Mixer", {"nin": [0.9, 0.91, 0.9]}),
        ("not below Mixer, few labels", {"nin_few": [0.7, 0.71, 0.7]}),
        ("order", {"vit": [0.99, 0.995, 0.99]}),
        ("order", {"mixer": [0.99, 0.995, 0.99]}),
        ("product", {"add": [0.99, 0.995, 0.99]}),
        ("product", {"add_few": [0.99, 0.995, 0.99]}),
        ("one norm", {"apart": [0.8, 0.81, 0.8]}),
        ("moved", {"mixer_moved": [0.99, 0.995, 0.99]}),
        ("cost", {"gating_64": [0.5, 0.51, 0.5]}),
        ("cost", {"attention_1024": [5.0, 5.1, 5.0]}),
    ],
)
def test_every_claim_can_fail(claim, values):
    study = find_study(SLUG)
    arms = {"nin": 0.97, "mixer": 0.96, "vit": 0.95, "one": 0.6, "add": 0.94, "apart": 0.97}
    good = {
        name + end: [x - less, x - less + 0.002, x - less]
        for name, x in arms.items()
        for end, less in (("", 0.0), ("_few", 0.1), ("_moved", 0.3))
    }
    times = {"gating": (2, 4, 9, 20), "attention": (1, 2, 8, 40)}
    for kind, took in times.items():
        good |= {f"{kind}_{n}": [t, 1.01 * t, t] for n, t in zip(parts.TOKENS, took, strict=True)}
    quantities = {q.name: q for q in study.quantities}
    before = {c["name"]: c["verdict"] for c in judge(study.claims, quantities, good)[1]}
    after = {c["name"]: c["verdict"] for c in judge(study.claims, quantities, {**good, **values})[1]}
    assert before[claim] == "holds" and after[claim] == "does not hold here"


def test_the_picture_is_drawn_from_the_outcome(outcome, tmp_path):
    study = find_study(SLUG)
    path = save_picture(study(study.quick, 0), outcome, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 30_000
