"""Which tokens hold a part of a text, on the real tokenizer."""

import pytest

from regard.errors import NoSuchSite, RegardError, UnsupportedModel
from regard.runtime.tokens import resolve, token_id

pytestmark = pytest.mark.real
TEXT = "John gave Mary what John had; unbelievably, Mary left."


@pytest.fixture(scope="module")
def tokenizer(smollm):
    return smollm[1]


def words(tokenizer, positions, text=TEXT):
    ids = tokenizer(text)["input_ids"]
    return tokenizer.decode([ids[i] for i in positions])


@pytest.mark.parametrize("what", ["gave", " gave", "Mary what", "unbelievably", "had; "])
def test_the_tokens_hold_the_part_and_no_more_than_its_neighbours(tokenizer, what):
    found = resolve(tokenizer, TEXT, what, 0)
    assert found == list(range(found[0], found[-1] + 1))
    assert what.strip() in words(tokenizer, found)
    for fewer in (found[1:], found[:-1]):
        assert what.strip() not in words(tokenizer, fewer)


def test_occurrences_are_told_apart(tokenizer):
    first, last = resolve(tokenizer, TEXT, "John", 0), resolve(tokenizer, TEXT, "John", -1)
    assert first == [0] and last == resolve(tokenizer, TEXT, " John", 0) and last > first
    with pytest.raises(RegardError, match="occurs 2 times; give occurrence=0"):
        resolve(tokenizer, TEXT, "John")
    with pytest.raises(NoSuchSite, match="no occurrence 2"):
        resolve(tokenizer, TEXT, "John", 2)


def test_a_token_by_its_number(tokenizer):
    count = len(tokenizer(TEXT)["input_ids"])
    assert resolve(tokenizer, TEXT, -1) == [count - 1] and resolve(tokenizer, TEXT, 2) == [2]
    with pytest.raises(NoSuchSite, match=f"the text has {count}"):
        resolve(tokenizer, TEXT, count)


@pytest.mark.parametrize("what", ["Peter", "", "  "])
def test_a_part_that_is_not_there(tokenizer, what):
    with pytest.raises(NoSuchSite, match="The text has no"):
        resolve(tokenizer, TEXT, what)


def test_words_of_one_token(tokenizer):
    assert tokenizer.decode([token_id(tokenizer, " Mary")]) == " Mary"
    assert token_id(tokenizer, 7) == 7 and token_id(tokenizer, None) is None
    with pytest.raises(RegardError, match="' unbelievably' is [2-9] tokens"):
        token_id(tokenizer, " unbelievably")


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(UnsupportedModel, match="object does not tell"):
        resolve(object(), TEXT, "John")
