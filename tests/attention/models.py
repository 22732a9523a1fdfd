"""Runs of the tiny models, for the tests of `swap`."""

import torch

from tests.support.families import FAMILIES, valid

RELATIVE = 1e-5


def outputs(model, inputs):
    """What a forward returns, as one tensor [B, ...]."""
    with torch.no_grad():
        out = model(**inputs)
    return next(out[name] for name in ("logits", "logits_per_image", "last_hidden_state") if name in out)


def assert_same(found, expected, inputs, relative=RELATIVE):
    keep = valid(inputs, expected.shape) if expected.ndim > 2 else slice(None)
    found, expected = found[keep].float(), expected[keep].float()
    assert torch.isfinite(expected).all()
    assert (found - expected).abs().max() <= relative * expected.abs().max()


def differ(found, expected):
    return bool((found - expected).abs().max() > 1e-3 * expected.abs().max())


def prompt(name, model, padding="left"):
    """What `generate()` is given."""
    inputs = FAMILIES[name].inputs(model, padding)
    return {k: v for k, v in inputs.items() if k != "decoder_input_ids"}


def generated(model, inputs, **options):
    """The tokens of `generate()`, and the scores of each as one tensor [B, new, V]."""
    torch.manual_seed(1)
    chosen = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    out = model.generate(**inputs, **chosen, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits, 1)
