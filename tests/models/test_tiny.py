"""The small model around mixers: causal, and different in nothing but the mixer."""

import torch
from torch import nn

from regard.attention import LinearAttention, NormalizedAttention, SlidingWindow, Softmax
from regard.models.tiny import Heads, TinyModel


def model(mechanism):
    torch.manual_seed(0)
    return TinyModel(20, 16, [Heads(16, 4, 6, mechanism.build()) for _ in range(2)]).double()


def test_no_later_token_moves_an_earlier_logit():
    torch.manual_seed(0)
    layers = [NormalizedAttention(dim=16, heads=4).build() for _ in range(2)]
    tokens = torch.randint(20, (2, 12))
    changed = torch.cat([tokens[:, :7], (tokens[:, 7:] + 1) % 20], 1)
    for made in (model(Softmax()), model(LinearAttention()), TinyModel(20, 16, layers).double()):
        off = (made(tokens) - made(changed)).abs().amax((0, 2))
        assert off[:7].max() < 1e-12 and off[7:].min() > 1e-6


def test_only_the_mixer_differs():
    tokens = torch.randint(20, (2, 12))
    wide, narrow, soft = model(SlidingWindow(12)), model(SlidingWindow(2)), model(Softmax())
    torch.testing.assert_close(wide(tokens), soft(tokens))
    assert (narrow(tokens) - soft(tokens)).abs().max() > 1e-3
    assert [p.shape for p in wide.parameters()] == [p.shape for p in model(LinearAttention()).parameters()]


def test_heads_project_what_the_mechanism_mixes():
    torch.manual_seed(0)
    heads, x = Heads(8, 2, 3, Softmax().build()).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    q, k, v = (p(x).view(2, 5, 2, -1).transpose(1, 2) for p in (heads.queries, heads.keys, heads.values))
    mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(heads(x), heads.output(mixed.transpose(1, 2).reshape(2, 5, 8)))
