"""What is kept of one forward or one `generate()`: state, beams, and how it is repeated."""

import pytest
import torch

from regard.errors import RegardError
from regard.runtime.run import Run
from regard.runtime.site import Site

SITE = Site("a", "text.0", "text", 0, torch.nn.Identity())
IDS = torch.arange(8).view(2, 4)


def fed(**options):
    run = Run()
    run.batch, run.fed, run.token_ids = 2, 1, IDS
    run.first_kwargs = {"input_ids": IDS}
    for name, value in options.items():
        setattr(run, name, value)
    return run


def test_state_is_of_an_owner_and_a_site():
    run, owner = Run(), object()
    run.state(owner, SITE)["seen"] = 1
    assert run.state(owner, SITE) == {"seen": 1}
    assert run.state(owner) == {} and run.state(object(), SITE) == {}


def test_an_owner_lives_as_long_as_its_state():
    """Otherwise another object could be made at its address, and get its state."""
    run = Run()
    run.state(object())["seen"] = 1
    assert all(run.state(object()) == {} for _ in range(100))


def test_beams_take_what_is_of_the_batch_along():
    run = fed(
        valid=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool(), spans={"one": IDS > 4, "of one": IDS[:1] > 2}
    )
    state = run.state(run)
    state["each"], state["other"], state["word"] = torch.tensor([1, 2]), torch.tensor([1, 2, 3]), "kept"
    run.reorder(torch.tensor([1, 1]))
    assert (
        state["each"].tolist() == [2, 2] and state["other"].tolist() == [1, 2, 3] and state["word"] == "kept"
    )
    assert run.token_ids.tolist() == [[4, 5, 6, 7]] * 2 and run.valid.all()
    assert run.spans["one"].tolist() == [[False, True, True, True]] * 2 and run.spans["of one"].shape == (
        1,
        4,
    )


def test_rows_are_the_last_that_were_fed():
    valid = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    assert torch.equal(fed(valid=valid).valid_rows(3), valid[:, 1:])
    assert fed(valid=valid).valid_rows(5) is None and fed().valid_rows(2) is None


def test_one_forward_is_repeated_as_it_was_fed():
    run = fed(
        first_kwargs={"input_ids": IDS, "labels": IDS, "past_key_values": "cache", "token_type_ids": None}
    )
    assert run.repeatable({"input_ids": 0, "use_cache": 0}) == {"input_ids": IDS, "use_cache": False}
    assert run.repeatable({"input_ids": 0}) == {"input_ids": IDS}


def test_several_are_repeated_by_their_tokens():
    valid = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool()
    short = {"input_ids": IDS[:, :2], "attention_mask": valid[:, :2].long(), "position_ids": IDS[:, :2]}
    found = fed(fed=3, first_kwargs=short, valid=valid).repeatable({})
    assert found["input_ids"] is IDS and torch.equal(found["attention_mask"], valid.long())
    assert "position_ids" not in found


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"fed": 2, "first_kwargs": {"inputs_embeds": torch.zeros(2, 2, 3)}}, "began with embeddings"),
        ({"first_seen": 5}, "after 5 positions in a cache"),
    ],
)
def test_what_cannot_be_repeated_says_so(options, match):
    with pytest.raises(RegardError, match=match):
        fed(**options).repeatable({})
