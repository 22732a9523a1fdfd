"""Every mask against its dense definition; bounds never lose a key that a row sees."""

import pytest
import torch

from regard.engines.masks import (
    CausalMask,
    Mask,
    PaddedMask,
    TensorMask,
    WindowMask,
    order_and_padding,
    visible_range,
)

QUERIES, KEYS, BATCH = 7, 11, 3


def visible_of(mask, like):
    """What a mask as the engines give it shows, as bool in the shape of `like`; None shows everything."""
    if mask is None:
        return torch.ones_like(like)
    seen = mask if mask.dtype == torch.bool else mask > -1e30
    return seen.expand_as(like)


def causal(shift):
    i, j = torch.arange(QUERIES)[:, None], torch.arange(KEYS)[None]
    return (j <= i + shift)[None, None]


def window(base, size, offset, both):
    apart = torch.arange(QUERIES)[:, None] + offset - torch.arange(KEYS)[None]
    near = (apart < size) & (apart > -size) if both else apart < size
    return base & near


def bases():
    """(name, mask, its definition as bool [B|1, 1, T, S])."""
    generator = torch.Generator().manual_seed(0)
    some = torch.rand(BATCH, 1, QUERIES, KEYS, generator=generator) > 0.6
    additive = torch.where(some, torch.randn(some.shape, generator=generator), torch.finfo(torch.float32).min)
    everything = torch.ones(1, 1, QUERIES, KEYS, dtype=torch.bool)
    return [
        ("all", Mask(QUERIES, KEYS), everything),
        ("causal-0", CausalMask(QUERIES, KEYS), causal(0)),
        ("causal-4", CausalMask(QUERIES, KEYS, KEYS - QUERIES), causal(4)),
        ("causal-before", CausalMask(QUERIES, KEYS, -2), causal(-2)),
        ("bool", TensorMask(some, QUERIES, KEYS), some),
        ("additive", TensorMask(additive, QUERIES, KEYS), some),
        ("one-row", TensorMask(some[:, :, :1], QUERIES, KEYS), some[:, :, :1].expand(-1, -1, QUERIES, -1)),
    ]


def narrowed():
    generator = torch.Generator().manual_seed(1)
    valid = torch.rand(BATCH, KEYS, generator=generator) > 0.3
    for name, mask, dense in bases():
        yield name, mask, dense
        yield f"{name}-padded", PaddedMask(mask, valid), dense & valid[:, None, None]
        for size in (1, 3, KEYS):
            for offset in (0, KEYS - QUERIES):
                for both in (False, True):
                    small = window(dense, size, offset, both)
                    made = WindowMask(mask, size, offset, both)
                    yield f"{name}-window-{size}-{offset}-{both}", made, small
                    padded = PaddedMask(made, valid), small & valid[:, None, None]
                    yield f"{name}-window-{size}-{offset}-{both}-padded", *padded
                    inside = window(dense & valid[:, None, None], size, offset, both)
                    yield (
                        f"{name}-padded-window-{size}-{offset}-{both}",
                        WindowMask(PaddedMask(mask, valid), size, offset, both),
                        inside,
                    )


CASES = list(narrowed())


@pytest.mark.parametrize(("mask", "dense"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_mask_is_its_dense_definition(mask, dense):
    """Every range of rows: what `rows` shows, and that nothing visible lies outside of `bounds`."""
    for start in range(QUERIES):
        for stop in range(start + 1, QUERIES + 1):
            first, last = mask.bounds(start, stop)
            assert 0 <= first < last <= KEYS
            part = dense[..., start:stop, :]
            assert not part[..., :first].any() and not part[..., last:].any()
            for a, b in ((first, last), (0, KEYS), (2, 3)):
                assert torch.equal(visible_of(mask.rows(start, stop, a, b), part[..., a:b]), part[..., a:b])
            scores = torch.zeros(BATCH, 2, stop - start, last - first)
            seen = mask.apply(scores, start, stop, first, last) > -1e30
            assert torch.equal(seen, part[..., first:last].expand_as(seen))


@pytest.mark.parametrize(("mask", "dense"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_sdpa_is_given_the_same_mask(mask, dense):
    given, is_causal = mask.for_sdpa()
    if is_causal:
        assert given is None
        given = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril()[None, None]
    assert torch.equal(visible_of(given, dense), dense)


def test_sdpa_is_told_of_causal_order_only_where_it_means_the_same():
    assert CausalMask(5, 5).for_sdpa() == (None, True)
    assert CausalMask(5, 8, 3).for_sdpa()[1] is False and CausalMask(1, 1).for_sdpa()[1] is False


def test_a_narrowed_additive_mask_keeps_its_numbers():
    additive = torch.randn(1, 1, QUERIES, KEYS)
    rows = WindowMask(TensorMask(additive, QUERIES, KEYS), 3, 4).rows(0, QUERIES, 0, KEYS)
    seen = window(torch.ones_like(additive, dtype=torch.bool), 3, 4, False)
    assert torch.equal(rows[seen], additive[seen])
    assert (rows[~seen] == torch.finfo(torch.float32).min).all()


def test_a_narrow_window_has_narrow_bounds():
    mask = WindowMask(CausalMask(1000, 1000), 10)
    assert mask.bounds(500, 600) == (491, 600) and mask.bounds(0, 5) == (0, 5)
    both = WindowMask(Mask(1000, 1000), 10, both=True)
    assert both.bounds(500, 600) == (491, 609)
    assert mask.rows(500, 510, 500, 510).shape == (1, 1, 10, 10)
    assert WindowMask(Mask(9, 9), 20).rows(0, 9, 0, 9) is None


def test_the_visible_range_of_nothing_is_one_key():
    assert visible_range(torch.zeros(2, 1, 3, 5, dtype=torch.bool)) == (0, 1)
    assert visible_range(torch.eye(5, dtype=torch.bool)[None, None, 1:3]) == (1, 3)


def test_order_and_padding_of_a_mask_are_read():
    valid = torch.tensor([[False, True, True, True, True], [True, True, True, True, False]])
    tril = torch.ones(3, 5, dtype=torch.bool).tril(2)[None, None]
    for dense, causal in (
        (tril & valid[:, None, None], True),
        (valid[:, None, None].expand(-1, 1, 3, 5), False),
    ):
        floor = torch.finfo(torch.float32).min
        for mask in (dense, torch.zeros(dense.shape).masked_fill(~dense, floor)):
            found = order_and_padding(mask)
            assert found is not None and found[0] is causal and torch.equal(found[1], valid)
    assert order_and_padding(torch.ones(1, 1, 1, 4, dtype=torch.bool))[0] is False


@pytest.mark.parametrize("what", ["window", "bias", "heads", "hole", "empty"])
def test_masks_that_are_more_than_order_and_padding(what):
    tril = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    masks = {
        "window": tril & ~torch.ones_like(tril).tril(-3),
        "bias": torch.where(tril, torch.randn(1, 1, 6, 6), torch.finfo(torch.float32).min),
        "heads": torch.cat([tril, torch.ones_like(tril)], 1),
        "hole": tril & ~torch.eye(6, dtype=torch.bool).roll(-1, 1)[None, None].flip(-1),
        "empty": torch.ones(1, 1, 0, 6, dtype=torch.bool),
    }
    assert order_and_padding(masks[what]) is None
