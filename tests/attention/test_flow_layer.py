"""The layer in the manner of torch's: self, cross and causal, in torch's own encoder and decoder layers."""

import pytest
import torch
from torch import nn

from regard.attention import FlowAttention
from regard.attention.flow import FlowMultiheadAttention, flow_attention
from regard.errors import RegardError, ShapeMismatch


def layer(**options):
    torch.manual_seed(0)
    return FlowMultiheadAttention(16, 4, batch_first=True, **options).double().eval()


def drawn(length, batch=2):
    return torch.randn(
        batch, length, 16, generator=torch.Generator().manual_seed(length), dtype=torch.float64
    )


def hidden(length):
    return nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)


def by_hand(made, query, memory, **options):
    q, k, v = (
        projection(x).view(len(x), -1, 4, 4).transpose(1, 2)
        for projection, x in (
            (made.query_projection, query), (made.key_projection, memory), (made.value_projection, memory)
        )
    )  # fmt: skip
    return made.out_projection(flow_attention(q, k, v, **options).transpose(1, 2).flatten(2))


def test_self_cross_and_causal_are_the_function_between_projections():
    made, x, memory = layer(), drawn(9), drawn(5)
    torch.testing.assert_close(made(x, x, x)[0], by_hand(made, x, x))
    torch.testing.assert_close(made(x, memory, memory)[0], by_hand(made, x, memory))
    expected = by_hand(made, x, x, causal=True)
    for said in ({"is_causal": True}, {"attn_mask": hidden(9)}, {"attn_mask": hidden(9).isinf()}):
        torch.testing.assert_close(made(x, x, x, **said)[0], expected)
    torch.testing.assert_close(layer(causal=True)(x, x, x)[0], expected)


def test_padding_hides_keys_and_in_self_attention_queries():
    made, x, memory = layer(), drawn(9), drawn(5)
    padding = torch.zeros(2, 9).bool()
    padding[0, 6:] = True
    torch.testing.assert_close(made(x, x, x, padding)[0][:1, :6], made(*[x[:1, :6]] * 3)[0])
    short = torch.zeros(2, 5).bool()
    short[0, 3:] = True
    found = made(x, memory, memory, short)[0]
    torch.testing.assert_close(found[:1], made(x[:1], memory[:1, :3], memory[:1, :3])[0])


def test_weights_are_those_of_the_heads():
    made, x = layer(), drawn(9)
    out, weights = made(x, x, x, need_weights=True, average_attn_weights=False)
    values = made.value_projection(x).view(2, 9, 4, 4).transpose(1, 2)
    torch.testing.assert_close(made.out_projection((weights @ values).transpose(1, 2).flatten(2)), out)
    assert made(x, x, x, need_weights=True)[1].shape == (2, 9, 9) and made(x, x, x)[1] is None


@pytest.mark.parametrize("batch_first", [True, False])
def test_steps_are_the_whole(batch_first):
    made, x = layer(causal=True), drawn(12)
    made.batch_first = batch_first
    x = x if batch_first else x.transpose(0, 1)
    whole, state, parts = made(x, x, x)[0], None, []
    for piece in x.split([5, 1, 6], int(batch_first)):
        out, state = made.step(piece, state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, int(batch_first)), whole)


@pytest.mark.parametrize("training", [True, False])
def test_it_stands_in_torchs_encoder_and_decoder_layers_and_trains(training):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True)
    decoder = nn.TransformerDecoderLayer(16, 4, 32, 0.0, batch_first=True)
    encoder.self_attn = FlowMultiheadAttention(16, 4, 0.0, batch_first=True)
    decoder.self_attn, decoder.multihead_attn = (
        FlowMultiheadAttention(16, 4, 0.0, batch_first=True) for _ in range(2)
    )
    both = nn.ModuleList([encoder, decoder]).train(training)
    x, y = drawn(9).float(), drawn(6).float()
    padding = torch.zeros(2, 9).bool()
    padding[1, 5:] = True

    def run(y):
        memory = encoder(x, src_key_padding_mask=padding)
        return decoder(y, memory, tgt_mask=hidden(6).float(), memory_key_padding_mask=padding)

    changed = torch.cat([y[:, :4], y[:, 4:] + 1], 1)
    alone = decoder.self_attn(*[y] * 3, attn_mask=hidden(6).float())[0][:, :4]
    torch.testing.assert_close(decoder.self_attn(*[changed] * 3, is_causal=True)[0][:, :4], alone)
    # Across, what leaves a source counts all targets, so that later ones move earlier outputs.
    assert (run(changed) - run(y))[:, :4].abs().max() > 1e-5
    optimizer = torch.optim.Adam(both.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = (run(y) - x[:, :6].roll(1, -1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("call", "kind", "told"),
    [
        (lambda: FlowMultiheadAttention(10, 4), RegardError, "embed_dim is 10, which 4 heads"),
        (lambda: FlowMultiheadAttention(8, 4, 1.5), RegardError, "dropout is 1.5"),
        (lambda: layer()(*[drawn(9)[..., :5]] * 3), ShapeMismatch, "query must be"),
        (lambda: layer()(drawn(9), drawn(5), drawn(6)), ShapeMismatch, "key and value in length"),
        (lambda: layer()(*[drawn(9)] * 3, torch.zeros(9, 2)), ShapeMismatch, "key_padding_mask must be bool"),
        (lambda: layer()(*[drawn(9)] * 3, torch.rand(2, 9)), RegardError, "other numbers"),
        (lambda: layer()(*[drawn(9)] * 3, attn_mask=torch.rand(9, 9)), RegardError, "no score matrix"),
        (lambda: layer()(*[drawn(9)] * 3, attn_mask=hidden(9).roll(2, 1)), RegardError, "no score matrix"),
        (lambda: layer()(drawn(9), drawn(5), drawn(5), is_causal=True), ShapeMismatch, "9 queries"),
        (lambda: layer().step(drawn(3)), RegardError, "give causal=True"),
    ],
)
def test_wrong_input_is_refused(call, kind, told):
    with pytest.raises(kind, match=told):
        call()


def test_options_of_the_mechanism_are_taken():
    x = drawn(9)
    plain, clamped = layer(), layer(spec=FlowAttention.preset("core"))
    assert (plain(x, x, x)[0] - clamped(x, x, x)[0]).abs().max() > 1e-6
