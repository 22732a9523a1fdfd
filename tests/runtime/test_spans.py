"""Spans: which positions are what, by ranges, by text, by chat and by image tokens."""

from types import SimpleNamespace

import pytest
import torch

import regard
from regard.errors import NoSuchSite, RegardError, ShapeMismatch
from regard.runtime import Lens
from regard.runtime.spans import Spans, span_at, span_of_keys
from tests.support.families import FAMILIES

SIDES = ("left", "right")


def padded(side):
    """Six tokens, of which the first sequence has four."""
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, slice(0, 2) if side == "left" else slice(4, 6)] = 0
    return mask


@pytest.mark.parametrize("side", SIDES)
def test_ranges_count_real_tokens(side):
    ranges = {"facts": [(0, 1), (2, 4)], "question": [[(1, 2)], [(4, 6)]], "none": [], "empty": [(1, 1)]}
    spans = Spans.from_ranges(ranges, padded(side))
    start = 2 if side == "left" else 0
    assert spans.positions("facts") == [[start, start + 2, start + 3], [0, 2, 3]]
    assert spans.positions("question") == [[start + 1], [4, 5]]
    assert spans.positions("none") == spans.positions("empty") == [[], []]
    assert list(spans) == ["facts", "question", "none", "empty"] and len(spans) == 4
    assert all(mask.dtype == torch.bool and mask.shape == (2, 6) for mask in spans.values())


def test_ranges_are_of_one_sequence_or_each():
    mask = torch.ones(3, 4)
    same = Spans.from_ranges({"a": [(0, 1), (3, 4)]}, mask)
    each = Spans.from_ranges({"a": [[(0, 1), (3, 4)]] * 3}, mask)
    assert torch.equal(same["a"], each["a"])
    some = Spans.from_ranges({"a": [[], [(0, 1)], []]}, mask)
    assert some.positions("a") == [[], [0], []]


@pytest.mark.parametrize(
    ("ranges", "error", "match"),
    [
        ([(0, 5)], RegardError, r"\(0, 5\) in a sequence of 4 tokens"),
        ([(-1, 2)], RegardError, r"\(-1, 2\)"),
        ([(3, 2)], RegardError, r"\(3, 2\)"),
        ([[(0, 1)]], ShapeMismatch, "for 1 sequences, and the batch has 2"),
        ([[(0, 1)], (0, 1)], ShapeMismatch, "a list of"),
        ([[(0, 1)], [0, 1]], RegardError, "the range 0; a range is a tuple"),
        ([[(0, 1)], [(0, 1, 2)]], RegardError, "a range is a tuple"),
        ([0, 1], RegardError, "a range is a tuple"),
    ],
)
def test_unfit_ranges_are_refused(ranges, error, match):
    with pytest.raises(error, match=match):
        Spans.from_ranges({"facts": ranges}, padded("left"))


def test_masks_are_checked():
    assert Spans({"a": torch.tensor([True, False])})["a"].shape == (1, 2)
    for wrong in (torch.ones(1, 2), [True], torch.ones(1, 1, 2).bool(), torch.ones(()).bool()):
        with pytest.raises(ShapeMismatch, match="must be bool"):
            Spans({"a": wrong})
    with pytest.raises(ShapeMismatch, match="one shape"):
        Spans({"a": torch.ones(1, 2).bool(), "b": torch.ones(2, 2).bool()})


def test_a_missing_name_is_reported_with_those_there_are():
    spans = Spans({"facts": torch.ones(1, 2).bool()})
    with pytest.raises(NoSuchSite, match="no span 'fact'; there are facts"):
        spans["fact"]
    assert "fact" not in spans and "facts" in spans and spans.get("fact") is None
    assert repr(spans) == "Spans(facts: [2])"


def test_joining_repeating_and_selecting():
    a, b = torch.tensor([[1, 0, 0], [0, 1, 0]]).bool(), torch.tensor([[0, 0, 1], [0, 1, 1]]).bool()
    joined = Spans({"a": a, "b": b}) | {"b": a, "c": b}
    assert torch.equal(joined["b"], a | b) and torch.equal(joined["a"], a) and torch.equal(joined["c"], b)
    twice = joined.repeat(2)
    assert torch.equal(twice["a"], a[[0, 0, 1, 1]])
    assert torch.equal(twice.select([2, 0])["a"], a[[1, 0]])
    assert torch.equal(joined.select(torch.tensor([1]))["c"], b[1:])


@pytest.mark.parametrize("side", SIDES)
def test_single_sequences_into_a_batch(side):
    mask = padded(side)
    items = [
        Spans.from_ranges({"facts": [(1, 3)]}, torch.ones(1, 4)),
        Spans.from_ranges({"facts": [(0, 1)], "question": [(5, 6)]}, torch.ones(1, 6)),
    ]
    spans = Spans.batch(items, mask)
    expected = Spans.from_ranges({"facts": [[(1, 3)], [(0, 1)]], "question": [[], [(5, 6)]]}, mask)
    assert list(spans) == ["facts", "question"]
    assert all(torch.equal(spans[name], expected[name]) for name in expected)
    with pytest.raises(ShapeMismatch, match="has 4 real tokens there"):
        Spans.batch([items[1], items[0]], mask)
    with pytest.raises(ShapeMismatch, match="1 items were given for a batch of 2"):
        Spans.batch(items[:1], mask)


IMAGE, VIDEO = 90, 91
CONFIG = SimpleNamespace(image_token_id=IMAGE, video_token_id=VIDEO)


def test_images_are_unbroken_rows_of_image_tokens():
    ids = torch.tensor([[1, 90, 90, 2, 90, 3], [90, 90, 90, 4, 5, 6], [1, 2, 3, 4, 5, 6]])
    spans = Spans.from_images(ids, CONFIG)
    assert list(spans) == ["image", "image.0", "image.1", "text"]
    assert spans.positions("image") == [[1, 2, 4], [0, 1, 2], []]
    assert spans.positions("image.0") == [[1, 2], [0, 1, 2], []]
    assert spans.positions("image.1") == [[4], [], []]
    assert torch.equal(spans["text"], ids != IMAGE)


def test_images_by_counts():
    """Tiles apart, and images side by side."""
    ids = torch.tensor([[1, 90, 90, 2, 90, 90], [90, 90, 90, 90, 5, 6]])
    spans = Spans.from_images(ids, CONFIG, per_image=[[4], [1, 3]])
    assert spans.positions("image.0") == [[1, 2, 4, 5], [0]]
    assert spans.positions("image.1") == [[], [1, 2, 3]]
    for wrong in ([[4]], [[4], [1, 2]]):
        with pytest.raises(RegardError, match="per_image is"):
            Spans.from_images(ids, CONFIG, per_image=wrong)


def test_videos_and_other_names_of_the_token():
    ids = torch.tensor([[91, 91, 1, 90, 2]])
    spans = Spans.from_images(ids, CONFIG)
    assert spans.positions("video") == spans.positions("video.0") == [[0, 1]]
    assert spans.positions("image") == [[3]] and spans.positions("text") == [[2, 4]]
    older = Spans.from_images(ids, SimpleNamespace(image_token_index=1))
    assert older.positions("image") == [[2]] and older.positions("text") == [[0, 1, 3, 4]]


def test_images_of_a_model():
    family = FAMILIES["llava"]
    model = family.build()
    spans = Spans.from_images(family.inputs(model)["input_ids"], model.config)
    assert spans.positions("image.0") == [[4, 5, 6, 7]] * 2


def test_no_images_are_refused():
    with pytest.raises(RegardError, match="image_token_id, image_token_index"):
        Spans.from_images(torch.ones(1, 3), SimpleNamespace())
    with pytest.raises(RegardError, match="No token of input_ids"):
        Spans.from_images(torch.ones(1, 3), CONFIG)


@pytest.fixture(scope="module")
def tokenizer(smollm):
    return smollm[1]


def decoded(tokenizer, inputs, spans, name):
    return [tokenizer.decode(ids[mask]) for ids, mask in zip(inputs["input_ids"], spans[name], strict=True)]


@pytest.mark.parametrize("side", SIDES)
def test_pieces_of_text(tokenizer, side):
    samples = [
        [("facts", "Paris is in France."), ("", " Well."), ("question", " Where is Paris?")],
        [
            ("facts", "Rome is old."),
            ("question", "\nIs it?"),
            ("facts", " Rome is large, and lies in Italy."),
        ],
    ]
    inputs, spans = Spans.from_text(tokenizer, samples, padding_side=side)
    assert list(spans) == ["facts", "question"]
    assert decoded(tokenizer, inputs, spans, "facts")[0] == "Paris is in France."
    assert decoded(tokenizer, inputs, spans, "question")[0] == " Where is Paris?"
    assert decoded(tokenizer, inputs, spans, "facts")[1] == "Rome is old. Rome is large, and lies in Italy."
    assert not (spans["facts"] & spans["question"]).any()
    assert not (spans["facts"] | spans["question"])[inputs["attention_mask"] == 0].any()
    plain = tokenizer(["".join(t for _, t in s) for s in samples], padding=True, padding_side=side)
    assert inputs["input_ids"].tolist() == plain["input_ids"]
    assert set(inputs) == {"input_ids", "attention_mask"}


def test_a_token_across_a_boundary_goes_by_its_first_letter(tokenizer):
    """' Paris' and 'France' are single tokens."""
    inputs, spans = Spans.from_text(tokenizer, [[("a", "in "), ("b", "Paris, Fra"), ("c", "nce")]])
    assert decoded(tokenizer, inputs, spans, "a") == ["in"]
    assert decoded(tokenizer, inputs, spans, "b") == [" Paris, France"]
    assert spans.positions("c") == [[]]


def test_letters_of_several_tokens_belong_whole(tokenizer):
    inputs, spans = Spans.from_text(tokenizer, [[("a", "née 🙂🙃"), ("b", "漢字 end")]])
    assert decoded(tokenizer, inputs, spans, "a") == ["née 🙂🙃"]
    assert decoded(tokenizer, inputs, spans, "b") == ["漢字 end"]


@pytest.mark.parametrize("side", SIDES)
def test_messages_of_a_chat(tokenizer, side):
    chats = [
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [("facts", "Rome is old."), ("question", " How old?")]},
            {"role": "assistant", "content": "Very."},
            {"role": "user", "content": "And Paris?"},
        ],
        [{"role": "user", "content": "Hello."}],
    ]
    inputs, spans = Spans.from_chat(tokenizer, chats, padding_side=side)
    expected = {
        "system": ["Be brief.", ""], "system.0": ["Be brief.", ""], "assistant": ["Very.", ""],
        "user": ["Rome is old. How old?And Paris?", "Hello."], "user.0": ["Rome is old. How old?", "Hello."],
        "user.1": ["And Paris?", ""], "facts": ["Rome is old.", ""], "question": [" How old?", ""],
    }  # fmt: skip
    assert set(spans) == {*expected, "assistant.0"}
    assert {name: decoded(tokenizer, inputs, spans, name) for name in expected} == expected
    plain = [[{**m, "content": m["content"]} for m in chat] for chat in chats]
    plain[0][1]["content"] = "Rome is old. How old?"
    rendered = tokenizer.apply_chat_template(
        plain, add_generation_prompt=True, padding=True, return_dict=True,
        tokenizer_kwargs={"padding_side": side},
    )  # fmt: skip
    assert inputs["input_ids"].tolist() == rendered["input_ids"]


@pytest.mark.parametrize("content", ["user", "a", "s", "You", "assistant", " user \n"])
def test_a_content_that_the_template_holds_too_is_told_apart(tokenizer, content):
    """The default system prompt and the role names come before it."""
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    inputs, spans = Spans.from_chat(tokenizer, [chat], add_generation_prompt=False)
    ids = inputs["input_ids"][0].tolist()
    turns = [i for i, token in enumerate(ids) if token == tokenizer.convert_tokens_to_ids("<|im_start|>")]
    for role, turn in (("user", turns[-2]), ("assistant", turns[-1])):
        assert decoded(tokenizer, inputs, spans, role)[0].strip() == content.strip()
        assert spans.positions(role)[0][0] == turn + 2 + len(tokenizer(role)["input_ids"])


def templated(tokenizer, template):
    """A tokenizer that renders chats otherwise."""

    def apply_chat_template(chat, tokenize, add_generation_prompt):
        return template(chat)

    class Templated(type(tokenizer)):
        pass

    twin = object.__new__(Templated)
    twin.__dict__ = {**tokenizer.__dict__, "apply_chat_template": apply_chat_template}
    return twin


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Who? "}]


@pytest.mark.parametrize(
    "template",
    [
        lambda chat: "[ " + chat[1]["content"].strip() + " ] " + chat[0]["content"],
        lambda chat: chat[0]["content"] + "\n\n" + chat[1]["content"],
    ],
    ids=["system last", "joined"],
)
def test_templates_may_move_and_strip_contents(tokenizer, template):
    inputs, spans = Spans.from_chat(templated(tokenizer, template), [CHAT])
    assert decoded(tokenizer, inputs, spans, "system")[0].strip() == "Be brief."
    assert decoded(tokenizer, inputs, spans, "user")[0].strip() == "Who?"


@pytest.mark.parametrize(
    "template",
    [
        lambda chat: chat[0]["content"].upper() + chat[1]["content"],
        lambda chat: chat[1]["content"],
        lambda chat: chat[0]["content"] + chat[1]["content"] + chat[0]["content"],
        lambda chat: f"{len(chat[0]['content'])} " + chat[0]["content"] + chat[1]["content"],
    ],
    ids=["changed", "dropped", "repeated", "measured"],
)
def test_templates_that_change_contents_are_refused(tokenizer, template):
    with pytest.raises(RegardError, match="message 0"):
        Spans.from_chat(templated(tokenizer, template), [CHAT])


def test_what_is_no_text_or_message_is_refused(tokenizer):
    with pytest.raises(RegardError, match="pair"):
        Spans.from_text(tokenizer, [["facts"]])
    with pytest.raises(RegardError, match="pair"):
        Spans.from_chat(tokenizer, [[{"role": "user", "content": [{"type": "text", "text": "x"}]}]])
    with pytest.raises(RegardError, match="a role and a content"):
        Spans.from_chat(tokenizer, [[{"role": "user"}]])
    with pytest.raises(RegardError, match="a role and a content"):
        Spans.from_chat(tokenizer, [["Hello."]])
    with pytest.raises(RegardError, match="fast"):
        Spans.from_text(SimpleNamespace(), [[("a", "b")]])


class Seen(Lens):
    """Keeps which keys of each call are of a span."""

    def weights(self, block):
        seen.append({name: span_of_keys(block, name) for name in ("facts", "generated")})


seen = []


@pytest.fixture(autouse=True)
def emptied():
    seen.clear()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_spans_stay_where_they_are_while_generating(beams, options):
    family = FAMILIES["llama"]
    model = family.build()
    inputs = family.inputs(model, "left")
    spans = Spans.from_ranges({"facts": [[(0, 2)], [(3, 5)]]}, inputs["attention_mask"])
    with regard.watch(model, Seen(), layers=[0], spans=spans):
        model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=beams, **options)
    assert len(seen) == 3
    for step, found in enumerate(seen):
        facts = found["facts"]
        assert facts.shape[0] == 2 * beams
        for row, where in enumerate([[3, 4]] * beams + [[3, 4]] * beams):
            assert facts[row].nonzero()[:, 0].tolist() == where
        generated = found["generated"][0].nonzero()[:, 0].tolist()
        assert generated[:step] == list(range(9, 9 + step))


def test_spans_of_a_run_are_cut_and_grown():
    run = SimpleNamespace(spans={"a": torch.tensor([[1, 0, 1]]).bool()}, first_kwargs={}, grows=True)
    assert span_at(run, "a", 1, 5, 2).int().tolist() == [[0, 1, 0, 0]] * 2
    assert span_at(run, "generated", 1, 5, 1).int().tolist() == [[0, 0, 1, 1]]
    with pytest.raises(RegardError, match="no span 'b'; it has a"):
        span_at(run, "b", 0, 3, 1)
