"""Steering by a vector: where it is added, in forwards and generate(), and vectors that know their model."""

import pytest
import torch

import regard
from regard.edit.shift import AddVector, Direction, between_concepts, mean_difference, of_shift
from regard.errors import NoSuchSite, RegardError, ShapeMismatch
from regard.lens.concepts import Concepts, Features, analyse_shift
from regard.runtime import Point
from tests.edit.plain import logits
from tests.support.families import FAMILIES

LAYER = 0


@pytest.fixture(scope="module")
def model():
    return FAMILIES["llama"].build()


@pytest.fixture(scope="module")
def vector(model):
    return 0.3 * torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(3))


def hooked(model, inputs, vector, where):
    """The same by a plain hook, after the block; `where` is bool [B, T]."""

    def hook(module, args, output):
        x = output if isinstance(output, torch.Tensor) else output[0]
        x = x + where[..., None] * vector
        return x if isinstance(output, torch.Tensor) else (x, *output[1:])

    handle = model.model.layers[LAYER].register_forward_hook(hook)
    try:
        return logits(model, inputs)
    finally:
        handle.remove()


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(
    ("scope", "start"), [("all", None), ("last", None), ("from", 2), ("generated", None)]
)
def test_it_is_added_where_the_scope_says(model, vector, padding, scope, start):
    inputs = FAMILIES["llama"].inputs(model, padding)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    place = mask.cumsum(1) - 1
    where = {
        "all": mask, "last": place == place.amax(1, keepdim=True), "from": place >= 2,
        "generated": torch.zeros_like(mask),
    }[scope] & mask  # fmt: skip
    with regard.steer(model, AddVector(vector=vector, layer=LAYER, alpha=2.0, scope=scope, start=start)):
        found = logits(model, inputs)
    torch.testing.assert_close(found, hooked(model, inputs, 2.0 * vector, where), rtol=1e-5, atol=1e-5)


def test_alpha_0_changes_nothing_and_other_sites_stay(model, vector):
    inputs = FAMILIES["llama"].inputs(model)
    plain = logits(model, inputs)
    with regard.steer(model, AddVector(vector=0 * vector, layer=1)):
        same = logits(model, inputs)
    with regard.steer(model, AddVector(vector=vector, layer=LAYER, alpha=0.0)):
        assert torch.equal(logits(model, inputs), same)
    assert torch.equal(logits(model, inputs), plain)


def written_out(model, ids, vector, begins, steps):
    """Greedy tokens and the logits of each step, recomputed from the whole text every time."""
    for _ in range(steps):
        where = torch.arange(ids.shape[1])[None] >= begins
        found = hooked(model, {"input_ids": ids}, vector, where)
        ids = torch.cat([ids, found[:, -1].argmax(1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("cache", [None, "static", "none"])
@pytest.mark.parametrize(("scope", "begins"), [("all", 0), ("last", -1), ("generated", 0), ("from", 3)])
def test_generate_equals_recomputation(model, vector, cache, scope, begins):
    ids = FAMILIES["llama"].inputs(model)["input_ids"]
    count = ids.shape[1]
    first = {"all": 0, "last": count - 1, "generated": count, "from": 3}[scope]
    options = {"use_cache": False} if cache == "none" else {"cache_implementation": cache} if cache else {}
    edit = AddVector(vector=3 * vector, layer=LAYER, scope=scope, start=3 if scope == "from" else None)
    with regard.steer(model, edit):
        found = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, **options)
    assert found.equal(written_out(model, ids, 3 * vector, first, 5))


def test_beams_and_left_padding(model, vector):
    inputs = FAMILIES["llama"].inputs(model, "left")
    edit = AddVector(vector=3 * vector, layer=LAYER, scope="last")
    with regard.steer(model, edit):
        both = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, num_beams=3, do_sample=False)
    mask = inputs["attention_mask"].bool()
    for row in range(len(both)):
        alone = inputs["input_ids"][row][mask[row]][None]
        with regard.steer(model, edit):
            one = model.generate(alone, max_new_tokens=4, min_new_tokens=4, num_beams=3, do_sample=False)
        assert both[row, mask.shape[1] :].equal(one[0, alone.shape[1] :])


def test_lenses_see_it_and_edits_compose(model, vector):
    ids = FAMILIES["llama"].inputs(model)["input_ids"]
    from regard.runtime.row_patch import collect

    point = Point("residual", LAYER)
    plain = collect(model, {"input_ids": ids}, [point])[point]
    edit = AddVector(vector=vector, layer=LAYER)
    with regard.steer(model, edit, edit):
        torch.testing.assert_close(collect(model, {"input_ids": ids}, [point])[point], plain + 2 * vector)


def test_it_comes_back_from_a_file_of_edits(model, vector, tmp_path):
    edit = AddVector(vector=vector, layer=1, alpha=0.5, scope="last")
    regard.save_edits(tmp_path / "a.json", model, edit)
    (again,) = regard.load_edits(tmp_path / "a.json", model)
    assert again.vector.equal(vector) and (again.layer, again.alpha, again.scope) == (1, 0.5, "last")
    with pytest.raises(RegardError, match="was made for"):
        regard.load_edits(tmp_path / "a.json", FAMILIES["gpt2"].build())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"alpha": float("nan")}, "must be finite"),
        ({"vector": torch.tensor([torch.inf, 0.0])}, "must be finite"),
        ({"vector": torch.zeros(2, 2)}, r"it must be numbers \[D\]"),
        ({"scope": "prompt"}, "must be one of all, generated"),
        ({"scope": "from"}, "takes a start from 0"),
        ({"start": 3}, "takes a start from 0"),
    ],
)
def test_bad_options_are_refused(options, told):
    with pytest.raises(RegardError, match=told):
        AddVector(**{"vector": torch.zeros(2), "layer": 0, **options})


def test_another_width_or_layer_is_refused(model):
    with pytest.raises(NoSuchSite):
        regard.steer(model, AddVector(vector=torch.zeros(2), layer=9))
    inputs = FAMILIES["llama"].inputs(model)
    with (
        pytest.raises(ShapeMismatch, match="vector has 2 numbers"),
        regard.steer(model, AddVector(vector=torch.zeros(2), layer=0)),
    ):
        model(**inputs)


def features(values, layer=1, model=None):
    return Features(values[:, None], (layer,), tuple(range(len(values))), {"model": model})


def test_directions_are_differences_and_add_up():
    a, b = torch.randn(6, 4) + 2, torch.randn(5, 4)
    coarse = mean_difference(features(a), features(b))
    torch.testing.assert_close(coarse.vector, a.mean(0) - b.mean(0))
    torch.testing.assert_close((2 * coarse - coarse).vector, coarse.vector)
    assert float(coarse.random(1).vector.norm()) == pytest.approx(float(coarse.vector.norm()), rel=1e-5)
    assert float(coarse.scaled(3.0).vector.norm()) == pytest.approx(3.0, rel=1e-5)
    concepts = Concepts(torch.randn(3, 4), "k-means", layer=1)
    fine = between_concepts(concepts, 0, 2)
    torch.testing.assert_close(fine.vector, concepts.vectors[2] - concepts.vectors[0])
    moved = analyse_shift(features(a), features(a + 1), count=2)
    torch.testing.assert_close(of_shift(moved).vector, torch.ones(4), rtol=1e-4, atol=1e-4)
    assert of_shift(moved, 0).edit(scope="last").layer == 1
    with pytest.raises(ShapeMismatch, match="of layer 1"):
        _ = fine + Direction(torch.zeros(4), 0)


def test_directions_that_mean_nothing_are_refused():
    pca = Concepts(torch.eye(3), "pca", torch.zeros(3), layer=1)
    with pytest.raises(RegardError, match="have no sign"):
        between_concepts(pca, 0, 1)
    with pytest.raises(RegardError, match="no concept 3"):
        between_concepts(Concepts(torch.eye(3), "k-means", layer=1), 0, 3)
    with pytest.raises(RegardError, match="after the final norm"):
        Direction(torch.zeros(3), "final_norm")
    one, other = ({"name": name} for name in "ab")
    with pytest.raises(RegardError, match="of two models"):
        mean_difference(features(torch.randn(2, 3), model=one), features(torch.randn(2, 3), model=other))


def test_a_saved_direction_knows_its_model(model, tmp_path):
    from regard.runtime.model_identity import identify

    made = Direction(torch.randn(4), 1, {"model": identify(model)})
    made.save(tmp_path / "d.safetensors")
    assert Direction.load(tmp_path / "d.safetensors", model).vector.equal(made.vector)
    with pytest.raises(RegardError, match="this direction was made for"):
        Direction.load(tmp_path / "d.safetensors", FAMILIES["gpt2"].build())
