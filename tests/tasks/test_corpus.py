"""Text as token ids: nothing lost, the held-out part unseen, and any text of one's own."""

import math

import pytest

from regard.errors import RegardError
from regard.tasks.corpus import corpus, novels, packaged, read_corpus

TEXT = "The cat sat on the mat, and the dog did not: é, 猫. " * 40


def test_the_packaged_novels_come_back_from_their_ids():
    data = packaged(512)
    assert data.vocabulary == 512 and int(data.train.max()) < 512
    parts = [data.decode(ids.tolist()) for ids in (data.train, data.held_out)]
    size = 0
    for text in novels().values():
        cut = round(len(text) * 0.9)
        assert text[:cut] in parts[0] and text[cut:] in parts[1]
        size += len(text[cut:].encode())
    assert math.isclose(data.bytes_per_token, size / len(data.held_out))


def test_a_larger_vocabulary_needs_fewer_tokens():
    small, large = corpus([TEXT], 256), corpus([TEXT], 300)
    assert small.bytes_per_token == 1.0 < large.bytes_per_token
    assert len(small.train) > len(large.train)
    assert small.digest() != large.digest() == corpus([TEXT], 300).digest()


def test_the_vocabulary_is_learned_from_the_training_part_alone():
    one = corpus([TEXT[:1000] + "zq" * 500], 300, held_out=0.5)
    other = corpus([TEXT[:1000] + "xk" * 500], 300, held_out=0.5)
    assert one.encode(TEXT) == other.encode(TEXT)
    assert one.decode(one.encode("a 猫 and é")) == "a 猫 and é"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: corpus([TEXT], 255), "vocabulary is 255"),
        (lambda: corpus([TEXT], True), "vocabulary is True"),
        (lambda: corpus([" "]), "not empty"),
        (lambda: corpus("text"), "a list of texts"),
        (lambda: corpus([TEXT], held_out=1.0), "held_out is 1.0"),
        (lambda: read_corpus("nowhere.txt"), "No such file"),
    ],
)
def test_what_is_no_text_is_refused(call, words):
    with pytest.raises(RegardError, match=words):
        call()


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(RegardError, match="not UTF-8"):
        read_corpus(tmp_path / "bytes")
    with pytest.raises(RegardError, match="holds no text"):
        read_corpus(tmp_path / "empty")
