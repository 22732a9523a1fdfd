"""Bad input: one sentence, exit code 2, nothing written; no weights read where it shows without them."""

import json
import shutil

import pytest
import torch

from regard.weights import Source
from tests.support import folders
from tests.support.folders import TEXT


@pytest.fixture
def no_weights(monkeypatch):
    """Weights are not read."""

    def read(self, *_):
        raise AssertionError(f"the weights of {self.name} were read")

    monkeypatch.setattr(Source, "read", read)


@pytest.fixture
def copy(models, tmp_path):
    """A copy of the tiny decoder, to be damaged."""
    return shutil.copytree(models / "llama", tmp_path / "copy")


def set_config(folder, **values):
    """Change a config on disk."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


BEFORE = [
    (["{}/nothing"], "There is no model folder '{}/nothing'."),
    (["{}/nothing.gguf"], "There is no file {}/nothing.gguf."),
    (["{}/llama/config.json"], "{}/llama/config.json is a file; give the folder"),
    (["{}"], "{} holds no model: it has no config.json"),
    (["{}/t5"], "is an encoder-decoder, and inspect reads one text"),
    (["{}/vit"], "(ViTForImageClassification) takes pixel_values, not tokens"),
    (["{}/clip"], "(CLIPModel) takes an image beside its text"),
    (["{}/mamba"], "MambaForCausalLM has no attention module"),
    (["{}/llama", "--text", "day " * 65], "The text has 65 tokens, and {}/llama takes at most 64."),
    (["{}/roberta", "--text", "day " * 19], "The text has 21 tokens, and {}/roberta takes at most 20."),
    (["{}/llama", "--text", "day"], "The text has 1 token; give at least two."),
    (["{}/llama", "--text", " \n"], "The text (the words given) is empty"),
    (["{}/llama", "--layers", "2"], "the model has no layer 2; its layers are 0 to 1."),
    (["{}/llama", "--layers", "0-5"], "the model has no layer 2; its layers are 0 to 1."),
    (["{}/llama", "--lens", "patterns", "--heads", "1.4"], "text.1 has no head 4; it has heads 0 to 3."),
    (["{}/llama", "--lens", "patterns", "--heads", "2.0"], "LlamaForCausalLM has no layer 2"),
    (["{}/llama", "--heads", "0.0"], "give --lens patterns with it"),
    (["{}/llama", "--lens", "sink"], "no lens 'sink'; did you mean sinks?"),
    (["{}/llama", "--lens", "zzz"], "the lenses are column-mass, "),
    (["--lens", "sinks", "{}/llama"], "--lens takes '{}/llama' for a lens; give MODEL before it."),
    (["{}/llama", "--dtype", "int8"], "There is no dtype 'int8'"),
    (["{}/llama", "--device", "tpu9"], "There is no device 'tpu9'"),
    (["{}/llama", "--device", "meta"], "Nothing can be computed on device 'meta'"),
    (["{}/llama", "--csv", "x.csv", "--lens", "residual-norm"], "has no numbers per head"),
    (["{}/llama", "--json", "{}"], "--json: {} is a folder"),
    (["{}/llama", "--json", "{}/no/x.json"], "--json: there is no folder {}/no to write x.json to."),
    (["{}/llama", "--csv", "/proc/x.csv"], "--csv: /proc/x.csv cannot be written to"),
    (["{}/llama", "--csv", "/dev/null"], "--csv: /dev/null is no ordinary file"),
    (["{}/llama", "--json", "-", "--csv", "-"], "--json and --csv both name standard output"),
]


@pytest.mark.parametrize(("words", "said"), BEFORE, ids=[" ".join(w) for w, _ in BEFORE])
def test_refused_before_weights_are_read(words, said, models, refusal, no_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("{}", str(models)) for word in words]
    if "--text" not in words:
        words += ["--text", TEXT]
    assert said.replace("{}", str(models)) in refusal("inspect", *words)
    assert list(tmp_path.iterdir()) == []


def test_the_control_is_not_refused(models, regard, tmp_path):
    paths = tmp_path / "x.json", tmp_path / "x.csv"
    words = [
        "--layers",
        "0-1",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--json",
        paths[0],
        "--csv",
        paths[1],
    ]
    code, _, err = regard("inspect", models / "llama", "--text", TEXT, *words)
    assert (code, err) == (0, "")
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_a_name_that_the_hub_does_not_give(refusal, no_weights):
    said = refusal("inspect", "no-such-organisation/no-such-model", "--text", TEXT)
    assert said.startswith("There is no model 'no-such-organisation/no-such-model': no folder of that name")


def test_a_folder_without_weights(copy, refusal, no_weights):
    (copy / "model.safetensors").unlink()
    assert "holds a config.json but no weights" in refusal("inspect", copy, "--text", TEXT)


def test_pickled_weights_are_not_read(copy, refusal, no_weights):
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nabort\n(tR.")
    assert "has its weights only as pickle (pytorch_model.bin)" in refusal("inspect", copy, "--text", TEXT)


def test_several_gguf_files(models, tmp_path, refusal, no_weights):
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(models / "gguf" / "tiny.gguf", tmp_path / name)
    assert f"holds 2 .gguf files; give one, such as {tmp_path}/a.gguf" in refusal("inspect", tmp_path)


def test_an_unknown_architecture(copy, refusal, no_weights):
    set_config(copy, model_type="perceptron-9000", architectures=["Perceptron9000"])
    assert "perceptron-9000" in refusal("inspect", copy, "--text", TEXT)


def test_a_config_that_is_no_json(copy, refusal, no_weights):
    (copy / "config.json").write_text("{")
    assert f"{copy} cannot be loaded: " in refusal("inspect", copy, "--text", TEXT)


def test_a_model_without_tokenizer(copy, refusal, no_weights):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    assert "(LlamaForCausalLM) comes without a tokenizer" in refusal("inspect", copy, "--text", TEXT)


def test_a_damaged_tokenizer(copy, refusal, no_weights):
    (copy / "tokenizer.json").write_text("{")
    assert "cannot be loaded: its tokenizer: " in refusal("inspect", copy, "--text", TEXT)


def test_the_tokenizer_of_another_model(copy, refusal, no_weights):
    folders.add_tokenizer(copy, size=90)
    said = refusal("inspect", copy, "--text", "the keeper w78")
    assert "gives token 89, and the model knows 60: the two do not belong together." in said


def test_a_layer_without_attention_in_a_hybrid(tmp_path, refusal, no_weights):
    from transformers import JambaConfig, JambaForCausalLM

    config = JambaConfig(
        vocab_size=60, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=1,
        use_mamba_kernels=False, mamba_d_state=4, **folders.SIZES,
    )  # fmt: skip
    folders.save(JambaForCausalLM(config), tmp_path / "jamba")
    said = refusal("inspect", tmp_path / "jamba", "--text", TEXT, "--layers", "0")
    assert said == "--layers: the model has no attention in layer 0; it has it in 1."


@pytest.mark.parametrize("damage", ["cut short", "not safetensors", "a git-lfs pointer"])
def test_damaged_weights(copy, damage, refusal, tmp_path):
    weights = copy / "model.safetensors"
    content = {
        "cut short": weights.read_bytes()[:-1000],
        "not safetensors": b"\xff" * 4000,
        "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    }[damage]
    weights.write_bytes(content)
    said = refusal("inspect", copy, "--text", TEXT, "--json", tmp_path / "x.json")
    assert said.startswith(f"{copy} cannot be loaded: ")
    assert not (tmp_path / "x.json").exists()


def test_weights_of_another_shape(copy, refusal):
    set_config(copy, intermediate_size=64)
    assert "has shape [32, 48], and the config asks for [32, 64]" in refusal("inspect", copy, "--text", TEXT)


def test_weights_that_are_missing(copy, refusal):
    set_config(copy, num_hidden_layers=3)
    assert "its files lack the weights model.layers.2." in refusal("inspect", copy, "--text", TEXT)


def test_a_damaged_gguf_file(models, tmp_path, refusal):
    (tmp_path / "bad.gguf").write_bytes((models / "gguf" / "tiny.gguf").read_bytes()[:3000])
    assert f"{tmp_path}/bad.gguf cannot be loaded: " in refusal(
        "inspect", tmp_path / "bad.gguf", "--text", TEXT
    )


def test_weights_that_are_not_finite(copy, refusal):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"].fill_(torch.nan)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert "computes numbers that are not finite in float32" in refusal("inspect", copy, "--text", TEXT)


def test_a_lens_that_has_nothing_to_say(models, refusal, monkeypatch, tmp_path):
    from dataclasses import dataclass

    from regard.errors import NothingObserved
    from regard.lens import LENSES
    from regard.runtime.protocol import Lens

    @dataclass(frozen=True, kw_only=True, eq=False)
    class Router(Lens):
        definition = source = ""

        def result(self):
            raise NothingObserved("Router has seen nothing: it takes a mixture of experts.")

    monkeypatch.setitem(LENSES, "router", Router)
    words = ["inspect", models / "llama", "--text", TEXT, "--json", tmp_path / "x.json", "--lens"]
    assert f"--lens router has nothing to say of {models}/llama: Router has seen nothing" in refusal(
        *words, "sinks", "router"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_ours_is_not_called_the_models(models, regard, monkeypatch):
    from regard.lens import LENSES, Sinks

    class Broken(Sinks):
        def weights(self, block):
            raise TypeError("a fault")

    # this file stands for one of regard's
    monkeypatch.setitem(LENSES, "sinks", Broken)
    monkeypatch.setitem(Broken.weights.__globals__, "__name__", "regard.lens.broken")
    with pytest.raises(TypeError, match="a fault"):
        regard("inspect", models / "llama", "--text", TEXT, "--lens", "sinks")
