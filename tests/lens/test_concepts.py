"""Dictionaries of concepts, what they stand for, and features taken where a word comes of."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from regard.errors import NoSuchSite, NothingObserved, RegardError, ShapeMismatch
from regard.lens.concepts import (
    Concepts,
    Features,
    collect_features,
    fit_concepts,
    nearest_samples,
    overlap,
    read_official_features,
    words_of,
)
from regard.tasks.captions import captions, held_out_captions
from regard.tasks.rated import rated
from tests.support.characters import characters
from tests.support.families import FAMILIES


@pytest.fixture(scope="module")
def model():
    return FAMILIES["llama"].build()


@pytest.fixture(scope="module")
def tokenizer():
    """Tokens are characters, of which the tiny model knows the first 97."""
    return characters()


def clusters(count=30, width=6, spread=0.1):
    centres = torch.randn(3, width) * 4
    return (centres[torch.arange(3 * count) % 3] + spread * torch.randn(3 * count, width)), centres


def test_k_means_finds_planted_centres_and_activates_as_the_official_code_does():
    states, centres = clusters()
    found = fit_concepts(states, 3)
    nearest = torch.cdist(found.vectors, centres).min(1).values
    assert float(nearest.max()) < 0.1
    official = KMeans(3, n_init=1, random_state=0).fit(states.numpy())
    official.cluster_centers_ = found.vectors.numpy()
    expected = 1 / (1 + official.transform(states.numpy()))
    np.testing.assert_allclose(found.activate(states).numpy(), expected, rtol=1e-4)
    assert found.assign(states).equal(torch.cdist(states, found.vectors).argmin(1))
    assert fit_concepts(states, 3).vectors.equal(found.vectors), "seeded"


def test_pca_takes_the_mean_off_and_rebuilds_states():
    states, _ = clusters()
    found = fit_concepts(states, 6, "pca")
    torch.testing.assert_close(
        found.activate(states) @ found.vectors + found.mean, states, rtol=1e-3, atol=1e-4
    )


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("method", ["semi-nmf", "nmf"])
def test_factors_are_never_negative_and_rebuild_states(method):
    codes, parts = torch.rand(30, 2), 2 * torch.randn(2, 5)
    states = codes @ (parts.abs() if method == "nmf" else parts)
    found = fit_concepts(states, 2, method, penalty=0.05)
    active = found.activate(states)
    assert bool((active >= 0).all())
    assert float((active @ found.vectors - states).norm() / states.norm()) < 0.2


def test_simple_concepts_are_the_largest_states():
    states, _ = clusters()
    found = fit_concepts(states, 2, "simple")
    assert set(found.vectors.norm(dim=1).tolist()) == set(states.norm(dim=1).topk(2).values.tolist())


def test_concepts_and_features_come_back_from_files(tmp_path):
    states, _ = clusters()
    found = fit_concepts(states, 3, "pca", layer=7)
    found.save(tmp_path / "c.safetensors")
    again = Concepts.load(tmp_path / "c.safetensors")
    assert (again.method, again.layer, again.about) == ("pca", 7, found.about)
    torch.testing.assert_close(again.activate(states), found.activate(states))
    kept = Features(states[:, None], (7,), tuple(range(len(states))), {"token": "dog"})
    kept.save(tmp_path / "f.safetensors")
    assert Features.load(tmp_path / "f.safetensors").at(7).equal(states)
    with pytest.raises(RegardError, match=r"f\.safetensors holds no concepts that regard saved"):
        Concepts.load(tmp_path / "f.safetensors")


@pytest.mark.parametrize(
    ("states", "options", "told"),
    [
        (torch.randn(4, 3), {"count": 5}, "4 states can have 1 to 4"),
        (torch.randn(4, 3), {"count": 2, "method": "ica"}, "must be one of k-means, pca"),
        (torch.randn(4, 3), {"count": 2, "method": "nmf"}, "take semi-nmf"),
        (torch.full((4, 3), torch.nan), {"count": 2}, "not finite"),
        (torch.randn(9, 3), {"count": 4, "method": "pca"}, "width 3"),
        (torch.randn(4), {"count": 2}, r"must be a tensor \[n, D\]"),
    ],
)
def test_what_makes_no_dictionary_is_refused(states, options, told):
    with pytest.raises(RegardError, match=told):
        fit_concepts(states, **options)


def test_states_of_another_width_are_refused():
    with pytest.raises(ShapeMismatch, match=r"take \[n, 3\]"):
        fit_concepts(torch.randn(9, 3), 2).activate(torch.randn(2, 4))


def test_the_state_is_that_which_the_word_comes_of(model, tokenizer):
    prompts, answers = ["ab", "abcd", "b"], ["cXd", "ee", "XX"]
    found = collect_features(
        model, prompts, tokenizer=tokenizer, layers=[0, 1, "final_norm"], token="X", answers=answers
    )
    assert found.samples == (0, 2) and found.values.shape[:2] == (2, 3)
    for row, text, at in ((0, "abcXd", 2), (1, "bXX", 0)):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(found.values[row, 0], states[1][0, at], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.at("final_norm")[row], states[-1][0, at], rtol=1e-4, atol=1e-5)


def test_other_positions_and_generated_answers(model, tokenizer):
    options = {"tokenizer": tokenizer, "layers": [1]}
    ids = torch.tensor([tokenizer("abc")["input_ids"]])
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        made = model.generate(ids, max_new_tokens=2, do_sample=False)[0, 3:].tolist()
        whole = model.model(torch.cat([ids, torch.tensor([made])], 1), output_hidden_states=True)
    last = collect_features(model, ["abc"], position="last", **options)
    torch.testing.assert_close(
        last.at(), collect_features(model, [{"input_ids": ids}], position="last", **options).at()
    )
    mean = collect_features(model, ["abc"], position="mean", generate=2, **options)
    kept = []
    block = model.model.layers[1].register_forward_hook(
        lambda m, a, o: kept.append(o if isinstance(o, torch.Tensor) else o[0])
    )
    with torch.no_grad():
        model(torch.cat([ids, torch.tensor([made])], 1))
    block.remove()
    torch.testing.assert_close(mean.at()[0], kept[0][0, 3:].mean(0), rtol=1e-4, atol=1e-5)
    assert len(states) == len(whole.hidden_states)


def test_bad_prompts_are_refused(model, tokenizer):
    options = {"tokenizer": tokenizer, "layers": [1]}
    with pytest.raises(NothingObserved, match="'Z' is in 0 of 2 answers"):
        collect_features(model, ["ab", "cd"], token="Z", **options)
    with pytest.raises(RegardError, match="1 answers to 2 prompts"):
        collect_features(model, ["ab", "cd"], answers=["X"], **options)
    with pytest.raises(RegardError, match="0 prompts"):
        collect_features(model, [], **options)
    with pytest.raises(NoSuchSite):
        collect_features(model, ["ab"], tokenizer=tokenizer, layers=[9])
    with pytest.raises(RegardError, match="position is 'first'"):
        collect_features(model, ["ab"], position="first", **options)
    with pytest.warns(UserWarning, match="is 4 tokens"):
        collect_features(model, ["ab dog"], token="dog", **options)


def test_words_are_those_that_the_unembedding_makes_likely(model):
    class Words:
        def convert_ids_to_tokens(self, ids):
            known = {0: "Ġred", 1: "blue", 2: "Ġthe", 3: "Ġ7", 4: "Ġa", 5: "ĠGreen"}
            return [known.get(i, "Ġx") for i in ids]

    weight = model.lm_head.weight
    plain = words_of(model, Words(), weight[:1] * 9, layer="final_norm", most=97)
    assert plain[0][0] == "red" and set(plain[0]) <= {"red", "green"}
    assert words_of(model, Words(), weight[:1], layer="final_norm", most=97, vocabulary={"the"}) == [["the"]]
    normed = model.lm_head(model.model.norm(weight[5:6]))
    first = words_of(model, Words(), weight[5:6], layer=1, most=97)[0]
    order = [i for i in normed[0].argsort(descending=True).tolist() if i in (0, 5)]
    assert first == [{0: "red", 5: "green"}[i] for i in order]
    with pytest.raises(ShapeMismatch):
        words_of(model, Words(), torch.zeros(1, 3))


def test_nearest_samples_and_overlap():
    states, _ = clusters()
    found = fit_concepts(states, 3)
    rows = nearest_samples(found, states, 10)
    assert rows.shape == (3, 10)
    assert bool((found.assign(states)[rows] == torch.arange(3)[:, None]).all())
    with pytest.raises(RegardError, match="there are 90 samples"):
        nearest_samples(found, states, 91)
    assert np.isnan(overlap([], ["a"]))


def test_a_file_of_the_official_code_is_read(tmp_path):
    rows = [torch.randn(1, n, 4) for n in (1, 2, 1)]
    told = {
        "hidden_states": [{"model.norm": row} for row in rows],
        "token_of_interest_mask": [torch.tensor([flag]) for flag in (True, True, False)],
        "image": ["a.jpg", "b.jpg", "c.jpg"],
    }
    torch.save(told, tmp_path / "original.pth")
    found = read_official_features(tmp_path / "original.pth")
    assert found.samples == (0, 1) and found.layers == ("model.norm",)
    torch.testing.assert_close(found.at()[1], rows[1][0].mean(0))
    (tmp_path / "other.pth").write_text("x")
    for name, reason in (("other.pth", "holds no hidden states"), ("none.pth", "cannot read")):
        with pytest.raises(RegardError, match=reason):
            read_official_features(tmp_path / name)
    with pytest.raises(RegardError, match="has model.norm"):
        read_official_features(tmp_path / "original.pth", "lm_head")


def test_captions_share_neither_place_nor_thing_with_the_held_out_ones():
    scene, drawn, plain = (captions(64, kind, seed=1) for kind in ("scene", "drawn", "none"))
    assert [one.prompt for one in scene] == [one.prompt for one in drawn] == [one.prompt for one in plain]
    assert all(one.answer == f" {one.colour} {one.thing}." for one in scene)
    assert len({one.answer.split()[0] for one in drawn if one.scene == "snow"}) > 2
    held = held_out_captions()
    assert not {one.prompt for one in held} & {one.prompt for one in scene}
    assert not {one.thing for one in held} & {one.thing for one in scene}
    for bad in (lambda: captions(0), lambda: captions(3, "all"), lambda: held_out_captions(9)):
        with pytest.raises(RegardError):
            bad()


def test_reviews_to_test_on_have_adjectives_of_their_own():
    found = rated(20, seed=3)
    words = lambda texts: {text.split(" was ")[-1].split(".")[0] for text in texts}  # noqa: E731
    assert not words(found.positive) & words(found.asked_positive)
    assert not words(found.negative) & words(found.asked_negative)
    with pytest.raises(RegardError, match="1 to 72"):
        rated(73)
