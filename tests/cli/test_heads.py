"""`regard heads`: the ranked list, what is said of it, what is written, and what is refused."""

import json

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import regard as library
from regard.edit import ScaleHeads
from regard.lens import Induction
from regard.runtime.head_list import HeadList
from regard.weights import load
from tests.lens.test_retrieval_heads import copier, word_tokenizer
from tests.support import folders
from tests.support.families import FAMILIES


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A decoder that takes 512 tokens."""
    return folders.llama(tmp_path_factory.mktemp("tiny"), max_position_embeddings=512)


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """A model whose head 0 copies by construction, its tokenizer, and facts that it can answer."""
    folder = tmp_path_factory.mktemp("copier")
    model = copier(positions=256)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    told = [
        {"needle": "three four five", "question": "nine", "real_needle": "three four five", "stem": "two"},
        {"needle": "seven eight nine", "question": "ten", "real_needle": "seven eight nine", "stem": "six"},
    ]
    (folder / "needles.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in told))
    (folder / "text.txt").write_text("Some words that it does not know at all. " * 30)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A vision-language model of random weights, with a processor, and an image."""
    folder = tmp_path_factory.mktemp("llava")
    model = FAMILIES["llava"].build()
    model.save_pretrained(folder)
    image_token = model.config.image_token_id
    known = {f"w{i}": i for i in range(image_token)} | {"<image>": image_token}
    made = Tokenizer(models.WordLevel(known, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w3", pad_token="w0")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    shape = {"height": 8, "width": 8}
    images = tf.CLIPImageProcessorPil(size=shape, crop_size=shape)
    processor = tf.LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=4, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    processor.save_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    return folder


def test_retrieval_finds_the_head_made_to_copy_and_saves_it(regard, counting, tmp_path):
    path, report, kept = tmp_path / "heads.json", tmp_path / "page.html", tmp_path / "kept.jsonl"
    words = ("heads", counting, "--needles", counting / "needles.jsonl", "--text", counting / "text.txt",
             "--length", 60, "--top", 1, "--steps", 3)  # fmt: skip
    code, out, err = regard(*words, "--save", path, "--report", report, "--resume", kept)
    assert code == 0, err
    assert "2 facts, each hidden in" in out and "60 tokens at depths 0.2 and 0.8" in out
    assert [line.split() for line in out.splitlines() if line.strip().startswith("1 ")] == [
        ["1", "0", "0", "1.000", "1.000", "1.000", "1.000"]
    ]
    assert "4 of 4 prompts were answered" in out and "a head that looks anywhere would have 0.0" in out
    assert "and the 1 leading ones share 1 (chance 0.5)" in out
    heads = HeadList.load(path)
    assert list(heads) == [("text.0", 0)] and heads.about["model"]["class"] == "GPT2LMHeadModel"
    assert "Leading heads" in report.read_text()
    model, _ = load(counting)
    library.steer(model, ScaleHeads(heads=heads))
    code, again, _ = regard(*words, "--resume", kept)
    assert again.splitlines()[:6] == out.splitlines()[:6]


def test_without_an_answer_it_says_so(refusal, tiny):
    said = refusal("heads", tiny, "--length", 200, "--depth", 0.5, "--steps", 2)
    assert said.startswith("0 of 24 prompts were answered, so no head has a score")


def test_induction_is_the_lens_on_two_sets(regard, tiny):
    code, out, err = regard("heads", tiny, "--kind", "induction", "--json", "-", "--top", 3)
    assert code == 0, err
    told = json.loads(out)
    model, _ = load(tiny)
    generator = torch.Generator().manual_seed(0)
    scores = []
    for _ in range(2):
        half = torch.randint(0, 60, (4, 50), generator=generator)
        with torch.no_grad(), library.watch(model, Induction()) as seen:
            model(torch.cat([half, half], 1))
        scores.append(seen[Induction]["score"])
    rows = {(row["site"], row["head"]): row for row in told["heads"]}
    assert len(rows) == 8 and told["top"] == len(told["leading"]) == 3
    for place, name in enumerate(seen[Induction].names):
        assert rows[name]["score"] == pytest.approx((scores[0][place] + scores[1][place]) / 2, abs=1e-6)
        assert rows[name]["first"] == pytest.approx(scores[0][place], abs=1e-6)
    assert -1 <= told["rank_correlation"] <= 1 and 0 < told["chance"] < 0.1


def test_sinks_and_what_even_attention_gives(regard, tiny):
    code, out, err = regard("heads", tiny, "--kind", "sink", "--top", 2)
    assert code == 0, err
    assert "pieces of 64 tokens of packaged passages" in out
    even = sum(1 / (i + 1) for i in range(1, 64)) / 63
    assert f"Attention spread evenly would have {even:.4f}." in out


def test_dormant_heads_are_those_of_the_contrast(regard, tiny, tmp_path):
    from regard.lens.extremes import compare_sinks

    one, two = "the keeper wrote one line a day " * 40, "w1 w2 w3 w4 w5 w6 w7 " * 40
    code, out, err = regard(
        "heads", tiny, "--kind", "dormant", "--text", one, "--against", two, "--top", 2, "--json", "-"
    )
    assert code == 0, err
    table = compare_sinks(*load(tiny), [one], [two], progress=False)
    told = json.loads(out)
    assert told["leading"][0] == [*table.ranked()[0][:2], pytest.approx(abs(table.ranked()[0][2]))]


def test_vision_heads_move_when_the_image_goes(regard, llava):
    code, out, err = regard(
        "heads", llava, "--kind", "vision", "--image", llava / "image.png", "--top", 2, "--json", "-"
    )
    assert code == 0, err
    told = json.loads(out)
    assert {row["site"].split(".")[0] for row in told["heads"]} == {"text"}
    assert told["leading"][0][2] > 0 and told["origin"] == "4 prompts with 1 image, and without"


@pytest.mark.parametrize(
    "words, said",
    [
        (("--top", 0), "--top is 0"),
        (("--top", 99), "--top is 99, and"),
        (
            ("--kind", "sink", "--needles", "x.jsonl"),
            "--needles is for --kind retrieval; this is --kind sink",
        ),
        (("--kind", "induction", "--text", "x"), "reads no text of yours"),
        (("--kind", "vision"), "--kind vision needs an image"),
        (("--length", 600), "takes at most 512 tokens"),
        (("--length", 5), "the needle and the question alone take"),
        (("--length", 200, "--text", "Too short."), "give a longer text, or a smaller length"),
        (("--kind", "sink", "--text", "too short"), "is too short; two pieces of 64 tokens"),
        (("--save", "nowhere/at/all.json"), "--save: there is no folder"),
        (("--chat",), "no chat template"),
    ],
)
def test_what_cannot_be_done_is_refused(refusal, tiny, words, said):
    needed = () if "--top" in words else ("--top", 2)
    assert said in refusal("heads", tiny, *words, *needed)


def test_a_text_model_has_no_vision_heads(refusal, tiny, llava):
    said = refusal("heads", tiny, "--kind", "vision", "--image", llava / "image.png", "--top", 2)
    assert said.startswith("LlamaForCausalLM reads text alone")


def test_files_that_are_no_images_are_refused(refusal, llava):
    for name, said in (("none.png", "There is no file"), ("config.json", "cannot be read as an image")):
        assert said in refusal("heads", llava, "--kind", "vision", "--image", llava / name, "--top", 2)


def test_a_saved_list_of_another_model_is_refused(regard, refusal, counting, tiny, tmp_path):
    path = tmp_path / "heads.json"
    assert regard("heads", tiny, "--kind", "sink", "--top", 2, "--save", path)[0] == 0
    code, _, err = regard(
        "diff", tiny, "--edit", f"scale-heads heads={path}", "--no-report", "--lens", "sinks"
    )
    assert code == 0, err
    edit = (
        "--edit",
        f"scale-heads heads={path}",
        "--no-report",
        "--lens",
        "sinks",
        "--text",
        "one two three",
    )
    said = refusal("diff", counting, *edit)
    assert "this list of sink heads was made for" in said
