"""Where pieces of text end up in a rendered chat, and among tokens."""

import pytest

from regard.errors import RegardError
from regard.runtime.segments import Mark, first_characters, marks_of, rendered, tokenize


class Template:
    """Renders a chat as a function of its messages says."""

    def __init__(self, render):
        self.render = render

    def apply_chat_template(self, chat, tokenize, add_generation_prompt):
        return "".join(map(self.render, chat)) + ("<bot>" if add_generation_prompt else "")


def tagged(message):
    return f"<{message['role']}>{message['content'].strip()}</{message['role']}>"


def found(chat, render=tagged, prompt=False):
    text, marks = rendered(Template(render), chat, prompt)
    return text, {mark.name: text[mark.start : mark.stop] for mark in marks}


def test_pieces_stand_one_after_the_other():
    assert marks_of([("a", "xy"), ("b", ""), ("c", "z")], 3) == [
        Mark("a", 3, 5),
        Mark("b", 5, 5),
        Mark("c", 5, 6),
    ]


@pytest.mark.parametrize("piece", [("a",), ("a", 1), ["a", "b"], "ab"])
def test_what_is_no_piece_is_refused(piece):
    with pytest.raises(RegardError, match="a piece of text is a pair"):
        marks_of([piece])


def test_contents_are_told_from_what_the_template_adds():
    chat = [{"role": "system", "content": "user"}, {"role": "user", "content": "user"}]
    text, marks = found(chat, prompt=True)
    assert text == "<system>user</system><user>user</user><bot>"
    assert marks == {"system": "user", "system.0": "user", "user": "user", "user.0": "user"}
    assert [m.start for m in rendered(Template(tagged), chat, True)[1]] == [8, 8, 27, 27]


def test_pieces_of_a_content_and_turns_are_told():
    chat = [
        {"role": "user", "content": [("fact", "  Ada keeps it. "), ("question", "Who? ")]},
        {"role": "bot", "content": "Ada."},
        {"role": "user", "content": "Ada."},
    ]
    _, marks = found(chat)
    assert marks["fact"] == "Ada keeps it. " and marks["question"] == "Who?"
    assert marks["user.0"] == "Ada keeps it. Who?" and marks["user.1"] == marks["bot"] == "Ada."


@pytest.mark.parametrize(
    "render",
    [
        lambda m: tagged({**m, "content": m["content"].upper()}),
        lambda m: tagged(m) * 2,
        lambda m: "<nothing>",
    ],
    ids=["changed", "repeated", "left out"],
)
def test_a_template_that_does_more_than_frame_is_refused(render):
    with pytest.raises(RegardError, match="message 0"):
        found([{"role": "user", "content": "Ada"}], render)


@pytest.mark.parametrize("message", ["hello", {"role": "user"}, {"content": "x"}])
def test_what_is_no_message_is_refused(message):
    with pytest.raises(RegardError, match="has a role and a content"):
        found([message])


@pytest.mark.real
@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_and_their_first_characters(smollm, side):
    tokenizer = smollm[1]
    texts = ["The keeper  wrote\n one line.", "Ships."]
    inputs, offsets = tokenize(tokenizer, texts, side, True)
    assert sorted(inputs) == ["attention_mask", "input_ids"]
    for text, ids, mask, spans in zip(
        texts, inputs["input_ids"], inputs["attention_mask"], offsets, strict=True
    ):
        first = first_characters(text, spans)
        assert ((first == -1) == (mask == 0)).all()
        for token, at in zip(ids[mask.bool()], first[mask.bool()].tolist(), strict=True):
            word = tokenizer.decode([token])
            assert not word.strip() or text[at] == word.strip()[0]


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(RegardError, match="load a fast tokenizer"):
        tokenize(object(), ["a"], None, True)
