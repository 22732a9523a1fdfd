"""The tiny language model: causal, decodes as it reads, the same in a folder."""

import pytest
import torch

from regard.attention import QLSTM, LinearAttention, SlidingWindow, Softmax
from regard.errors import RegardError, ShapeMismatch
from regard.models.decoder import Decoder
from regard.models.saved import load_decoder, save_decoder
from regard.tasks.corpus import packaged

MECHANISMS = ("softmax", LinearAttention(), SlidingWindow(3), "normalized", QLSTM(dim=16))


def decoder(mechanism, **options):
    torch.manual_seed(0)
    return Decoder(256, dim=16, layers=2, heads=4, mechanism=mechanism, **options).double()


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=str)
def test_stepping_gives_the_logits_of_the_whole(mechanism):
    model, tokens = decoder(mechanism, gate="silu"), torch.randint(256, (2, 11))
    whole, parts, states = model(tokens), [], None
    for piece in tokens.split((4, 1, 6), 1):
        logits, states = model.step(piece, states)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=str)
def test_generate_takes_the_likeliest_each_time(mechanism):
    model, tokens = decoder(mechanism), torch.randint(256, (2, 5))
    found = model.generate(tokens, 4)
    for _ in range(4):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, tokens)


def test_generate_draws_by_a_seed():
    model, tokens = decoder("linear"), torch.zeros(1, 1, dtype=torch.int64)

    def drawn(seed):
        return model.generate(tokens, 9, temperature=1.0, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))


def test_layers_may_differ():
    mixed = decoder([Softmax(), SlidingWindow(2)])
    kinds = [type(layer.attention.mechanism).__name__ for layer in mixed.layers]
    assert kinds == ["SoftmaxAttention", "SlidingWindowAttention"]


@pytest.mark.parametrize("mechanism", ["linear", SlidingWindow(3), ["qlstm", Softmax()]], ids=str)
def test_a_folder_gives_back_the_model(tmp_path, mechanism):
    model, tokens = decoder(mechanism, gate="sigmoid").float(), torch.randint(256, (1, 9))
    save_decoder(model, tmp_path, packaged(256).tokenizer)
    again, tokenizer = load_decoder(tmp_path)
    assert torch.equal(again(tokens), model(tokens)) and not again.training
    assert tokenizer.decode(tokenizer.encode("a cat").ids) == "a cat"


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(RegardError, match="holds no decoder"):
        load_decoder(tmp_path)
    save_decoder(decoder("linear"), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(RegardError, match="holds no decoder"):
        load_decoder(tmp_path)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Decoder(0), RegardError, "vocabulary is 0"),
        (lambda: Decoder(256, layers=0), RegardError, "layers is 0"),
        (lambda: Decoder(256, mechanism=["softmax"]), RegardError, "names 1, and there are 2 layers"),
        (lambda: Decoder(256, mechanism=Softmax().build()), RegardError, "cannot share"),
        (lambda: Decoder(256, mechanism="flower"), RegardError, "no mechanism 'flower'"),
        (
            lambda: save_decoder(Decoder(256, layers=1, mechanism=Softmax().build()), "."),
            RegardError,
            "built",
        ),
        (lambda: Decoder(256)(torch.zeros(3, dtype=torch.int64)), ShapeMismatch, "tokens must be"),
        (
            lambda: Decoder(256).generate(torch.zeros(1, 0, dtype=torch.int64), 1),
            ShapeMismatch,
            "at least one",
        ),
    ],
)
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
