"""Folders, GGUF files and names: what is found, and that it is what was written."""

import os
import shutil

import pytest
import torch
from transformers import LlamaForCausalLM

import regard
from regard.errors import RegardError, UnsupportedModel
from regard.weights import DEFAULT, Source
from regard.weights import source as sources
from tests.support import folders


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return folders.llama(tmp_path_factory.mktemp("weights") / "llama")


@pytest.fixture
def copy(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "copy")


def test_a_folder_gives_what_transformers_gives(llama):
    model, tokenizer = regard.load(llama)
    plain = LlamaForCausalLM.from_pretrained(llama)
    ids = tokenizer(folders.TEXT, return_tensors="pt").input_ids
    assert not model.training and ids.shape == (1, 12)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=0)
    assert isinstance(model, LlamaForCausalLM)


def test_a_gguf_file_gives_the_weights_written(tmp_path):
    from gguf import GGUFReader

    path = folders.gguf(tmp_path / "tiny.gguf")
    model, tokenizer = regard.load(str(path))
    written = {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(path).tensors}
    head = model.get_output_embeddings().weight
    torch.testing.assert_close(head, written["output.weight"].view_as(head), rtol=0, atol=0)
    assert tokenizer.decode(tokenizer("the keeper")["input_ids"], skip_special_tokens=True) == "the keeper"
    assert Source.find(tmp_path) == Source(str(tmp_path), tmp_path, "tiny.gguf")


def test_an_encoder_comes_with_the_head_that_its_config_names(tmp_path):
    model, _ = regard.load(folders.bert(tmp_path / "bert"))
    assert type(model).__name__ == "BertForMaskedLM"


def test_a_model_without_tokenizer_is_loaded_without(copy):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    model, tokenizer = regard.load(copy)
    assert tokenizer is None and model is not None


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "torch.bfloat16"])
def test_dtype(llama, dtype):
    assert regard.load(llama, dtype=dtype).model.dtype == torch.bfloat16


def test_dtype_and_device_by_default(llama):
    model = regard.load(llama).model
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")


@pytest.mark.parametrize("dtype", ["int8", "double precision", torch.int64])
def test_dtypes_that_are_none(llama, dtype):
    with pytest.raises(RegardError, match="There is no dtype .*; use float32, bfloat16"):
        regard.load(llama, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "meta", "", "cpu:x"])
def test_devices_that_are_none(llama, device):
    with pytest.raises(RegardError, match="device"):
        regard.load(llama, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device here")
def test_a_device_that_is_not_here(llama):
    with pytest.raises(RegardError, match="Device 'cuda' cannot be used: "):
        regard.load(llama, device="cuda")


def test_a_skeleton_has_all_shapes_and_no_weights(llama):
    found = Source.find(llama)
    skeleton, model = found.skeleton(), found.read()
    shapes = {name: p.shape for name, p in skeleton.named_parameters()}
    assert shapes == {name: p.shape for name, p in model.named_parameters()}
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_a_skeleton_leaves_the_config_as_it_is(llama):
    found = Source.find(llama)
    before = found.config.to_dict()
    found.skeleton()
    assert found.config.to_dict() == before


def test_reading_is_quiet_and_leaves_logging_as_it_was(llama, capfd):
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), hub.get_verbosity()
    regard.load(llama)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled(), hub.get_verbosity()) == before


def test_the_default_by_its_name(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "default_folder", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    assert Source.find(DEFAULT) == Source.find(None) == Source(DEFAULT, tmp_path)
    folders.llama(tmp_path / DEFAULT)
    assert Source.find(DEFAULT).place == sources.Path(DEFAULT)


@pytest.mark.parametrize("name", ["", " ", "./gone", "/gone/model", "~/gone", "a/b/c"])
def test_names_that_cannot_be_the_hubs(name):
    with pytest.raises(RegardError, match="There is no model folder"):
        Source.find(name)


def test_a_home_folder_is_expanded(llama, monkeypatch):
    monkeypatch.setenv("HOME", str(llama.parent))
    assert Source.find("~/llama").place == llama


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickle_is_refused_and_never_opened(copy, name):
    (copy / "model.safetensors").rename(copy / name)
    with pytest.raises(UnsupportedModel, match=f"only as pickle \\({name}\\)"):
        regard.load(copy)


def test_safetensors_are_taken_where_there_is_pickle_too(copy):
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nabort\n(tR.")
    assert regard.load(copy).model is not None


def test_code_that_a_model_brings_along_is_not_run(copy, tmp_path):
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(
        config.replace('"llama"', '"mine"').replace("{", '{"auto_map": {"AutoConfig": "mine.Config"},', 1)
    )
    (copy / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    with pytest.raises(RegardError, match="cannot be loaded"):
        regard.load(copy)
    assert not (tmp_path / "ran").exists()


def test_a_shard_that_is_missing(llama, tmp_path):
    model = LlamaForCausalLM.from_pretrained(llama)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert regard.load(tmp_path).model is not None
    shards[-1].unlink()
    with pytest.raises(RegardError, match=f"{tmp_path} cannot be loaded: "):
        regard.load(tmp_path)


def test_a_name_that_the_hub_does_not_give_is_refused_quietly(capfd):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(RegardError, match="no folder of that name is here, and the Hub did not give it"):
        regard.load("no-such/model")
    assert capfd.readouterr() == ("", "")


@pytest.mark.real
def test_the_default_model_is_the_real_one(smollm):
    model, tokenizer = smollm
    config = model.config
    sizes = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
    assert sizes == (30, 9, 3)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = model(**ids).logits[0, -1].argmax()
    assert tokenizer.decode(best).strip() == "Paris"
