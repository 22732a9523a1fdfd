"""Attention by its definition, in float64, one whole matrix at a time."""

import torch


def attention(q, k, v, visible, scale, softcap=None, bias=None, added=None, sinks=None):
    """Return scores, weights and outputs, float64; `visible` is bool, `added` a float mask."""
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (torch.stack([x[:, h // group] for h in range(q.shape[1])], 1) for x in (k, v))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    if added is not None:
        scores = scores + added.double()
    scores = scores.masked_fill(~visible.expand_as(scores), float("-inf"))
    each = torch.exp(scores)
    total = each.sum(-1, keepdim=True)
    if sinks is not None:
        column = sinks if sinks.ndim == 4 else sinks[:, None, None]
        total = total + torch.exp(column.double())
    weights = torch.where(total > 0, each / total, torch.zeros_like(each))
    return scores, weights, torch.einsum("bhij,bhjd->bhid", weights, v)


def causal(queries, keys, shift=0):
    """Row i sees keys up to i + shift, bool [1, 1, T, S]."""
    rows = [[j <= i + shift for j in range(keys)] for i in range(queries)]
    return torch.tensor(rows, dtype=torch.bool)[None, None]


def window(queries, keys, size, shift=0, both=False):
    """Row i sees the `size` keys up to i + shift, and as many after it where `both`."""
    rows = [
        [(i + shift - j < size) and (j - i - shift < size if both else True) for j in range(keys)]
        for i in range(queries)
    ]
    return torch.tensor(rows, dtype=torch.bool)[None, None]
