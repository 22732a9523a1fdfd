"""How a forward's arguments reach the model, whatever its signature."""

import pytest
import torch
from torch import nn

import regard
from regard.lens import Entropy
from regard.runtime.driving import _by_name
from tests.support.families import FAMILIES


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = 4
        self.qkv, self.out_proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = SelfAttention()


class Any_(Around):
    def forward(self, *inputs):
        return self.attention(inputs[0]) + len(inputs)


class PositionalOnly(Around):
    def forward(self, x, /, shift=0.0):
        return self.attention(x) + shift


class Rest(Around):
    def forward(self, x, *rest, scale=1.0):
        return self.attention(x) * scale + sum(rest)


X = torch.linspace(-1, 1, 2 * 9 * 32).view(2, 9, 32)


@pytest.mark.parametrize(
    ("kind", "args", "kwargs"),
    [
        (Any_, (X, X), {}),
        (PositionalOnly, (X,), {"shift": 0.5}),
        (PositionalOnly, (X, 0.5), {}),
        (Rest, (X, 1.0, 2.0), {"scale": 3.0}),
        (SelfAttention, (X,), {}),
        (SelfAttention, (), {"x": X}),
    ],
)
def test_arguments_arrive_as_they_were_given(kind, args, kwargs):
    model = kind()
    with torch.no_grad():
        expected = model(*args, **kwargs)
        with regard.watch(model, Entropy()) as seen:
            torch.testing.assert_close(model(*args, **kwargs), expected)
    assert seen[Entropy].grid("entropy").shape == (1, 4)
    weights = seen.weights(0, 3, sequence=1)
    torch.testing.assert_close(weights.sum(-1), torch.ones(9))
    assert not weights.triu(1).any()


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((X, X), {}), ((X,), {"x": X}), ((), {"x": X, "mask": None})],
    ids=["many", "twice", "new"],
)
def test_what_python_would_refuse_is_refused(args, kwargs):
    model = SelfAttention()
    with pytest.raises(TypeError), regard.watch(model, Entropy()):
        model(*args, **kwargs)


def test_positional_arguments_of_a_language_model_get_their_names():
    model, ids = FAMILIES["llama"].build(), torch.arange(5, 14)[None]
    args, kwargs = _by_name(model.forward, (ids, torch.ones_like(ids)), {"use_cache": False})
    assert args == () and list(kwargs) == ["input_ids", "attention_mask", "use_cache"]
