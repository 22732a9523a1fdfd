"""Concepts of an instruction: what is found, merged, dropped, and how rare it is."""

import math
import random

import pytest

from regard.errors import RegardError
from regard.tasks.concepts import by_rarity, drop_covered, find_concepts, is_common, merge_entities, rarity
from regard.tasks.invented import cross, nonce_names
from regard.tasks.word_ranks import common_words, word_ranks
from tests.tasks.test_needles import tokenizer  # noqa: F401


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Who signed the Treaty of Westphalia, and how did it end the war?", ["Treaty of Westphalia"]),
        ("How does photosynthesis work?", ["photosynthesis"]),
        ("Explain plate tectonics simply.", ["plate tectonics"]),
        ("What is the 999th Amendment?", ["999th Amendment"]),
        ("Tell me about Paris and the Louvre in France.", ["Paris", "Louvre", "France"]),
        ("Was Mozart's Magic Flute performed in Vienna?", ["Mozart", "Magic Flute", "Vienna"]),
        ('What does "reverse osmosis" mean?', ["reverse osmosis"]),
        ("How do COVID-19 vaccines work?", ["COVID-19 vaccines"]),
        ("Quantum entanglement: explain it.", ["Quantum entanglement"]),
        ("why is the sky blue", ["sky blue"]),
        ("Compare machine learning and statistics", ["machine learning", "statistics"]),
        ("What is the capital of France?", ["France"]),
        ("Paris or paris?", ["Paris"]),
        ("", []),
        ("Who are you and what can I do?", []),
        ("?!", []),
    ],
)
def test_concepts_are_found_in_their_order(text, found):
    assert find_concepts(text) == found


def test_a_recogniser_of_names_stands_in_for_the_rules():
    named = lambda text: ["Amendment", "Second", "Second", "law"]  # noqa: E731
    assert find_concepts("Is the law against the Second Amendment?", named) == ["Second Amendment"]
    with pytest.raises(RegardError, match="not a list"):
        find_concepts(["Paris"])


@pytest.mark.parametrize(
    ("entities", "text", "merged"),
    [
        (["Second", "Amendment"], "What does the Second Amendment say?", ["Second Amendment"]),
        (["super", "man"], "who is Superman", ["Superman"]),
        (["New", "York", "City"], "Where is New York City?", ["New York City"]),
        (["Paris", "Rome"], "Paris or Rome?", ["Paris", "Rome"]),
        (["Paris"], "Paris?", ["Paris"]),
        ([], "nothing", []),
    ],
)
def test_neighbours_are_merged(entities, text, merged):
    assert merge_entities(entities, text) == merged


def test_what_is_covered_is_dropped():
    assert drop_covered(["Amendment", "Second Amendment", "law"]) == ["Second Amendment", "law"]
    assert drop_covered(["a", "a"]) == ["a"] and drop_covered([]) == []


def test_common_concepts_are_dropped_unless_nothing_is_left():
    assert is_common("house") and is_common("sky blue") and not is_common("photosynthesis")
    both = lambda text: ["house", "photosynthesis"]  # noqa: E731
    assert find_concepts("a house and photosynthesis", both) == ["photosynthesis"]
    assert find_concepts("a house", lambda text: ["house"]) == ["house"]


def test_rarity_is_the_logarithm_of_the_papers_product():
    ranks = {"the": 1, "war": 20, "Rome": 30, "treaty": 40}
    for concept in ("the war", "war treaty", "Rome", "the Treaty of Zorb"):
        product = 1.0
        for word in concept.split(" "):
            unknown = word not in ranks or word[0].isupper()
            product *= math.exp(-(len(ranks) if unknown else ranks[word]) / 100)
        assert math.exp(-rarity(concept, ranks)) == pytest.approx(product)
    names = ["war", "Magna Carta", "photosynthesis", "the war"]
    assert by_rarity(names) == ["Magna Carta", "photosynthesis", "the war", "war"]


def test_ranks_are_of_words_in_small_letters():
    ranks = word_ranks()
    assert ranks["the"] == 1 and len(ranks) > 10_000 and "Darcy" not in ranks
    assert {"computer", "website", "house"} <= common_words() and "zorblat" not in ranks
    assert sorted(set(ranks.values()))[0] == 1


def test_invented_names_have_the_tokens_and_capitals_of_the_real_ones(tokenizer):  # noqa: F811
    names = ["Copernicus", "photosynthesis", "Wolfgang Mozart"]
    made = nonce_names(tokenizer, names, seed=3)
    count = lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    assert [count(x) for x in made] == [count(x) for x in names]
    assert [[w[0].isupper() for w in x.split()] for x in made] == [[True], [False], [True, True]]
    assert made == nonce_names(tokenizer, names, seed=3) != nonce_names(tokenizer, names, seed=4)
    assert not {w.lower() for x in made for w in x.split()} & set(word_ranks())
    with pytest.raises(RegardError, match="no invented name"):
        nonce_names(lambda text, **_: {"input_ids": [1] if text == "Paris" else [1, 2]}, ["Paris"])


def test_crossed_names_keep_every_word():
    one, two = cross("Ludwig van Beethoven", "Frederic Chopin")
    assert (one, two) == ("Ludwig van Chopin", "Frederic Beethoven")
    with pytest.raises(RegardError, match="two words each"):
        cross("Mozart", "Frederic Chopin")
    words = random.Random(0).sample(["a b", "c d"], 2)
    assert sorted(" ".join(cross(*words)).split()) == ["a", "b", "c", "d"]
