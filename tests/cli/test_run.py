"""`regard run` reaches a system's own command, and hands it what the user gave."""

import json
import types

import pytest
import tokenizers
import torch
import transformers

from regard.cli import main
from regard.errors import RegardError
from regard.papers import Paper, papers

WORDS = "The keeper of the old lighthouse wrote one line a day, and the sea took the rest of his time. "
SINKS = "attention-sink-emergence"


def ran(capsys, *words):
    """Exit status, standard output and standard error of `regard run WORDS`."""
    capsys.readouterr()
    code = main(["run", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_systems_with_a_command_are_listed(capsys):
    code, out, _ = ran(capsys)
    listed = [line.split()[0] for line in out.splitlines()[2:]]
    assert code == 0 and listed == [p.slug for p in papers().values() if p.command]
    assert SINKS in listed


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["attention-sink-emergense"], "did you mean attention-sink-emergence"),
        (["nestedmorph"], "nestedmorph (planned) has no command"),
        ([SINKS, "--eps", "x"], "invalid float value"),
        ([SINKS, "--eps", "1.5"], "between 0 and 1"),
        ([SINKS, "--eps", "nan"], "between 0 and 1"),
        ([SINKS, "--length", "1"], "at least 2"),
        ([SINKS, "--length", "-4"], "at least 2"),
        ([SINKS, "--text", "Two words."], "has 3 tokens, and a piece takes 64"),
        ([SINKS, "--text", "/nowhere/x.txt"], "no file"),
        ([SINKS, "--text", " "], "is empty"),
        ([SINKS, "--json", "/nowhere/x.json"], "--json"),
        ([SINKS, "--seed", "-1"], "--seed"),
        ([SINKS, "--model", "./nowhere"], "no model folder"),
        ([SINKS, "--dtype", "int4"], "dtype"),
        ([SINKS, "--nonsense"], "--nonsense"),
    ],
)
def test_bad_input_is_one_sentence(capsys, words, told):
    code, out, err = ran(capsys, *words)
    assert (code, out, len(err.splitlines())) == (2, "", 1) and told in err, err


def test_a_system_has_its_own_help(capsys):
    code, out, _ = ran(capsys, SINKS, "--help")
    assert code == 0 and f"regard run {SINKS}" in out
    for option in ("--eps", "--length", "--model", "--text", "--seed", "--json", "--bos"):
        assert option in out


@pytest.fixture
def toy(monkeypatch):
    """A system whose command is set by the test; returns the function that sets it."""

    def install(command):
        module = types.ModuleType("toy_system")
        module.command = command
        monkeypatch.setitem(__import__("sys").modules, "toy_system", module)
        row = Paper(
            slug="toy", number=0, title="Toy", area="lens", kind="theory", gives="A toy.", state="works",
            command="toy_system:command",
        )  # fmt: skip
        monkeypatch.setattr("regard.cli.run.find", lambda name: row)

    return install


def test_a_command_is_handed_what_was_given(capsys, toy, tmp_path):
    def command(parser):
        """Say what was given."""
        parser.takes("text", "seed")
        parser.add_argument("--times", type=int, default=1)
        parser.set_defaults(run=answer)

    def answer(request):
        with request.progress("Working", 3) as advance:
            advance(3)
        request.say(f"{request.text.words.upper()} from {request.text.origin}")
        draw = torch.rand(1, generator=request.generator).item()
        return {"times": request.options.times, "draw": draw}

    toy(command)
    path = tmp_path / "toy.json"
    code, out, _ = ran(
        capsys, "toy", "--text", "some words", "--times", "4", "--seed", "7", "--json", str(path)
    )
    assert (code, out) == (0, "SOME WORDS from the words given\n")
    drawn = torch.rand(1, generator=torch.Generator().manual_seed(7)).item()
    assert json.loads(path.read_text("utf-8")) == {"system": "toy", "times": 4, "draw": drawn}
    code, out, _ = ran(capsys, "toy", "--text", "some words", "--seed", "7", "--json", "-")
    assert json.loads(out) == {"system": "toy", "times": 1, "draw": drawn}
    code, _, err = ran(capsys, "toy", "--model", "x")
    assert code == 2 and "--model" in err


def test_a_refusal_of_a_command_writes_nothing(capsys, toy, tmp_path):
    def command(parser):
        """Refuse."""
        parser.set_defaults(run=answer)

    def answer(request):
        raise RegardError("this cannot be done.")

    toy(command)
    code, out, err = ran(capsys, "toy", "--json", str(tmp_path / "toy.json"))
    assert (code, out, err) == (2, "", "regard: this cannot be done.\n")
    assert list(tmp_path.iterdir()) == []


def dense_rates(model, ids, eps):
    """The share of heads and rows of `ids` whose mean attention on the first token is above each eps."""
    weights = torch.stack(model(ids, output_attentions=True).attentions)  # [layers, B, H, T, T]
    alpha = weights[..., 0].mean(-1)
    return [(alpha > e).float().mean().item() for e in eps]


@pytest.mark.real
@pytest.mark.parametrize("bos", [False, True])
def test_the_sink_rates_are_those_of_the_dense_computation(capsys, smollm, tmp_path, bos, monkeypatch):
    model, tokenizer = smollm
    if bos:  # the other case reads the weights
        monkeypatch.setattr("regard.weights.Source.read", lambda *given: model)
    path = tmp_path / "sinks.json"
    eps, options = ["0.3", "0.5"], ["--bos"] if bos else []
    code, out, _ = ran(
        capsys, SINKS, "--text", WORDS * 2, "--length", "20", "--eps", *eps, "--json", str(path), *options
    )
    told = json.loads(path.read_text("utf-8"))
    ids = torch.tensor(tokenizer(WORDS * 2)["input_ids"])
    width = 20 - bos
    pieces = ids[: len(ids) // width * width].view(-1, width)
    pieces = torch.nn.functional.pad(pieces, (int(bos), 0), value=tokenizer.bos_token_id)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        dense = dense_rates(model, pieces, map(float, eps))
    model.set_attn_implementation("sdpa")
    assert code == 0 and told["pieces"] == len(pieces) > 1 and told["bos"] is bos
    rates = told["rates"]
    assert list(rates["the text"].values()) == pytest.approx(dense, abs=1e-3)
    assert rates["random tokens"]["0.3"] > 0.3
    if not bos:
        assert rates["one token repeated"]["0.3"] < 0.05
    line = next(line for line in out.splitlines() if "the text  " in line)
    assert [float(x.rstrip("%")) for x in line.split()[2:]] == pytest.approx(
        [100 * d for d in dense], abs=0.2
    )
    above = [row for row in told["heads"]["the text"] if row["rate_0.3"] > 0.5]
    assert f"{len(above)} of 270 heads" in out
    listed = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith("  text.")}
    assert listed == {
        site: [str(row["head"]) for row in above if row["site"] == site] for site in listed
    } and sum(map(len, listed.values())) == len(above)  # fmt: skip


TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def saved(tmp_path):
    """A function that saves a tiny random model and a tokenizer of the words of WORDS, and returns where."""

    def save(kind, config, **options):
        vocabulary = {word: i for i, word in enumerate(["[UNK]", "<s>", *dict.fromkeys(WORDS.split())])}
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
        words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tokens = {"unk_token": "[UNK]", "bos_token": "<s>"}
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, **tokens).save_pretrained(tmp_path)
        given = {"vocab_size": len(vocabulary), "bos_token_id": 1, **options}
        getattr(transformers, kind)(getattr(transformers, config)(**TINY, **given)).save_pretrained(tmp_path)
        return str(tmp_path)

    return save


@pytest.mark.parametrize(
    ("kind", "config", "options", "told"),
    [
        ("BertModel", "BertConfig", {}, "reads both ways"),
        (
            "LlamaForCausalLM",
            "LlamaConfig",
            {"max_position_embeddings": 6},
            "at most 6 tokens at once, not 8",
        ),
        ("LlamaForCausalLM", "LlamaConfig", {"vocab_size": 4}, "; the model knows 4"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(capsys, saved, kind, config, options, told):
    code, out, err = ran(
        capsys, SINKS, "--model", saved(kind, config, **options), "--text", WORDS, "--length", "8"
    )
    assert (code, out, len(err.splitlines())) == (2, "", 1) and told in err, err


def test_windowed_layers_do_not_count(capsys, saved):
    options = {"num_key_value_heads": 2, "sliding_window": 4}
    folder = saved("MistralForCausalLM", "MistralConfig", **options)
    code, out, _ = ran(capsys, SINKS, "--model", folder, "--text", WORDS, "--length", "8", "--bos")
    assert code == 0 and "with BOS" in out
    assert "hides the first token from some rows: text.0, text.1." in out
    assert [line.split()[2] for line in out.splitlines() if "  the text" in line] == ["-"]


def test_a_random_model_spreads_a_repeated_token_evenly(capsys, saved):
    folder = saved("LlamaForCausalLM", "LlamaConfig")
    code, out, _ = ran(capsys, SINKS, "--model", folder, "--text", WORDS, "--length", "8", "--json", "-")
    even = sum(1 / (row + 1) for row in range(8)) / 8
    told = json.loads(out)
    assert code == 0 and told["bos"] is False and told["pieces"] == len(WORDS.split()) // 8
    assert [row["alpha"] for row in told["heads"]["one token repeated"]] == pytest.approx(
        [even] * 4, abs=2e-3
    )
