"""How far heads move when the image is taken away, against hooks on the output projection."""

import pytest
import torch

from regard.errors import RegardError, UnsupportedModel
from regard.lens.image_divergence import head_divergence, image_divergence, without_image
from tests.support.families import FAMILIES


@pytest.fixture(scope="module")
def llava():
    return FAMILIES["llava"].build()


def one(model, row=0):
    both = FAMILIES["llava"].inputs(model)
    return {
        "input_ids": both["input_ids"][row : row + 1],
        "attention_mask": torch.ones_like(both["input_ids"][row : row + 1]),
        "pixel_values": both["pixel_values"][row : row + 1],
    }


def hooked(model, inputs):
    """What the output projections of the language model are fed at the last position, [L, H, Dv]."""
    found, handles = [], []
    layers = model.get_decoder().layers
    for layer in layers:
        keep = lambda module, args: found.append(args[0][0, -1])  # noqa: E731
        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return torch.stack(found).unflatten(-1, (model.config.text_config.num_attention_heads, -1))


def test_it_is_the_distance_of_what_the_projection_is_fed(llava):
    prompts = [one(llava, 0), one(llava, 1)]
    expected = []
    for inputs in prompts:
        keep = inputs["input_ids"][0] != llava.config.image_token_id
        words = {"input_ids": inputs["input_ids"][:, keep]}
        expected.append((hooked(llava, inputs) - hooked(llava, words)).norm(dim=-1))
    found = image_divergence(llava, prompts, outliers=False, progress=False)
    torch.testing.assert_close(torch.tensor(found.grid("divergence")).float(), torch.stack(expected).mean(0))
    assert set(found.kinds) == {"text"} and found["divergence"].min() > 0


def test_another_image_moves_heads_and_the_same_words_do_not(llava):
    inputs = one(llava)
    other = {**inputs, "pixel_values": -2 * inputs["pixel_values"]}
    tables = [image_divergence(llava, [x], outliers=False, progress=False) for x in (inputs, other)]
    assert abs(tables[0]["divergence"] - tables[1]["divergence"]).max() > 1e-4
    assert tables[0]["text"].tolist() == tables[1]["text"].tolist()


def test_a_head_that_surges_without_the_image_is_set_to_zero():
    seen = torch.zeros(1, 6, 4)
    seen[0, 1] = 9.0
    blind = torch.full((1, 6, 4), 0.1)
    blind[0, 0] = 9.0
    plain, kept = (head_divergence(seen, blind, outliers) for outliers in (False, True))
    assert plain["divergence"][0] > 15 and plain["divergence"][1] > 15
    assert kept["divergence"][0] == 0, "large without the image, and moved far"
    assert kept["divergence"][1:].equal(plain["divergence"][1:]), "moved far, and small without the image"


def test_the_words_stay_and_all_of_the_image_goes(llava):
    inputs = {
        **one(llava),
        "image_sizes": torch.tensor([[8, 8]]),
        "mm_token_type_ids": one(llava)["input_ids"] * 0,
    }
    left = without_image(llava, inputs)
    assert set(left) == {"input_ids", "attention_mask"}
    assert llava.config.image_token_id not in left["input_ids"]
    assert left["attention_mask"].shape == left["input_ids"].shape
    kept = [i for i in inputs["input_ids"][0].tolist() if i != llava.config.image_token_id]
    assert left["input_ids"][0].tolist() == kept


def test_what_has_no_image_is_refused(llava):
    inputs = one(llava)
    image = llava.config.image_token_id
    words = inputs["input_ids"][:, inputs["input_ids"][0] != image]
    for given, said in (
        ({"input_ids": words}, "no image in the inputs"),
        ({"input_ids": torch.tensor([[image, image]])}, "empty without the image"),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.long)}, "one at a time"),
    ):
        with pytest.raises(RegardError, match=said):
            image_divergence(llava, [given])
    with pytest.raises(RegardError, match="no prompts with an image"):
        image_divergence(llava, [])
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM reads text alone"):
        image_divergence(FAMILIES["llama"].build(), [inputs])
