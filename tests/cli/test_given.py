"""What a user gives: texts, layers, heads and files to write."""

import errno
import io
import sys
import tempfile

import pytest

from regard.cli import given
from regard.errors import RegardError


def test_the_packaged_passage_is_the_default():
    text, origin = given.read_text(None)
    assert len(text.split()) > 200
    assert origin == "the packaged passage"


def test_words_are_read_as_they_stand():
    assert given.read_text("two words") == ("two words", "the words given")
    assert given.read_text("and so on.txt? no") == ("and so on.txt? no", "the words given")


def test_a_file_is_read_without_mark_and_with_newlines(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree \xc3\xa9\n")
    assert given.read_text(str(path)) == ("one\ntwo\nthree é\n", str(path))


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from\r\nafar")))
    assert given.read_text("-") == ("from\nafar", "standard input")


def test_closed_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(RegardError, match="standard input"):
        given.read_text("-")


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "is empty"), (b" \n\t", "is empty"), (b"\xff\xfe", "not text in UTF-8"), (b"a\0b", "zero bytes")],
)
def test_files_that_are_no_text(content, said, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(RegardError, match=said):
        given.read_text(str(path))


@pytest.mark.parametrize(("name", "said"), [("gone.txt", "no file gone.txt"), ("a/gone", "no file a/gone")])
def test_a_name_that_looks_like_a_file_must_be_one(name, said):
    with pytest.raises(RegardError, match=said):
        given.read_text(name)


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(RegardError, match="is a folder, not a text file"):
        given.read_text(str(tmp_path))


@pytest.mark.parametrize(
    ("words", "layers"),
    [(None, None), ("3", [3]), ("0-2,7", [0, 1, 2, 7]), ("7, 1-2 ,2", [1, 2, 7]), ("5-5", [5])],
)
def test_layers(words, layers):
    assert given.parse_layers(words) == layers


@pytest.mark.parametrize(
    "words", ["", "a", "-1", "3-1", "1,,2", "1.5", "0-", "10000", "0-99999999999999999999"]
)
def test_layers_that_are_none(words):
    with pytest.raises(RegardError, match="--layers"):
        given.parse_layers(words)


def test_heads():
    assert given.parse_heads("17.5, 3.0,17.5") == [(17, 5), (3, 0)]
    assert given.parse_heads(None) is None


@pytest.mark.parametrize("words", ["", "5", "a.b", "1.2.3", "1.-2", "1.2,", "99999.0", "0.99999999999"])
def test_heads_that_are_none(words):
    with pytest.raises(RegardError, match="--heads"):
        given.parse_heads(words)


def test_outputs_that_can_be_written(tmp_path):
    old = tmp_path / "old.csv"
    old.write_text("kept until it is replaced")
    assert given.check_outputs(str(tmp_path / "new.json"), str(old)) == (tmp_path / "new.json", old)
    assert given.check_outputs(None, "-") == (None, given.STANDARD)
    assert [path.name for path in tmp_path.iterdir()] == ["old.csv"]
    assert old.read_text() == "kept until it is replaced"


def test_a_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert given.check_outputs(str(tmp_path / "link"), None)[0] == tmp_path / "real"


def test_one_file_for_two_outputs(tmp_path):
    with pytest.raises(RegardError, match="give two files"):
        given.check_outputs(str(tmp_path / "x"), f"{tmp_path}/./x")


@pytest.mark.parametrize(
    ("name", "said"),
    [("", "is a folder"), ("x" * 300, "no name for a file|cannot be written"), ("a/b", "there is no folder")],
)
def test_outputs_that_cannot_be_written(name, said, tmp_path):
    with pytest.raises(RegardError, match=f"--csv: .*({said})"):
        given.check_outputs(None, f"{tmp_path}/{name}")


def test_outputs_that_may_not_be_written(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(errno.EACCES, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(RegardError, match="--json: .*/x cannot be written to: Permission denied."):
        given.check_outputs(str(tmp_path / "x"), None)
