"""Tokens as words: every vocabulary's own spelling, and nothing that hides or turns the text."""

import json
import unicodedata

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from regard.errors import RegardError
from regard.report.data import safe
from regard.report.words import pieces, words

SHOWN = {
    "the": ["the"],
    " the": ["", "·", "the"],
    "a\nb": ["a", "↵", "b"],
    "\t": ["", "⇥"],
    "\x00": ["", "␀"],
    "\x1b[0m": ["", "␛", "[0m"],
    "a\u202eb": ["a", "U+202E", "b"],
    "\u200b": ["", "U+200B"],
    "\ufeffx": ["", "U+FEFF", "x"],
    "\xa0": ["", "U+00A0"],
    "\u2028": ["", "U+2028"],
    "\u3164": ["", "U+3164"],
    "\udce2": ["", "E2"],
    "": ["", "∅"],
    "\u0301": ["◌\u0301"],
    "<script>": ["<script>"],
    "שלום": ["שלום"],
}


@pytest.mark.parametrize("token", SHOWN, ids=ascii)
def test_pieces(token):
    assert pieces(token) == SHOWN[token]


def test_no_piece_of_any_letter_hides_or_turns_text():
    for code in [*range(0x3000), *range(0xD800, 0xE010), *range(0xFE00, 0x10000), *range(0xE0000, 0xE0200)]:
        for part in pieces(chr(code)):
            kinds = {unicodedata.category(letter) for letter in part}
            assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}, hex(code)


def test_text_is_safe_and_keeps_its_spaces():
    assert safe("a b\u202e\n") == "a bU+202E↵"
    assert safe("") == ""


def tokenizer(vocabulary, decoder):
    made = Tokenizer(WordLevel({t: i for i, t in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    if decoder is not None:
        made.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_byte_level_vocabularies():
    found = words(tokenizer(["Ġthe", "Ċ", "âĤ¬", "âĤ", "日"], decoders.ByteLevel()), [0, 1, 2, 3, 4])
    assert found == [" the", "\n", "€", "\udce2\udc82", "日"]


def test_vocabularies_with_spaces_and_single_bytes():
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    assert words(tokenizer(["▁the", "<0x0A>", "<0xE2>", "x"], decoder), [0, 1, 2, 3]) == [
        " the",
        "\n",
        "\udce2",
        "x",
    ]


def test_plain_vocabularies_and_ids():
    assert words(tokenizer(["un", "##do"], decoders.WordPiece()), [0, 1]) == ["un", "##do"]
    assert words(None, [7, 8]) == ["#7", "#8"]
    with pytest.raises(RegardError, match="neither"):
        words(3, [1])


def test_ids_beyond_the_vocabulary_show_as_ids():
    assert words(tokenizer(["a"], None), [0, 5]) == ["a", "#5"]


@pytest.mark.real
def test_the_default_tokenizer_gives_back_its_text(smollm):
    text = "A light\n\tdoes not work — “naïve” 日本語 🙂"
    found = words(smollm[1], smollm[1](text)["input_ids"])
    assert "".join(found).encode("utf-8", "surrogateescape").decode() == text
    assert json.dumps([pieces(word) for word in found])
