"""What holds of every lens, over the registry."""

import gc
import inspect

import numpy as np
import pytest
import torch

import regard
from regard.errors import NothingObserved
from regard.lens import LENSES, Patterns
from regard.runtime.store import load_seen, save_seen
from tests.lens.dense import assert_same, numbers
from tests.support.families import FAMILIES

READS_IMAGES = "image-maps"
NAMES = sorted(set(LENSES) - {READS_IMAGES})
TOKENS = {"duplicate-token", "induction"}


def fed(model, inputs, name, **options):
    """Run a model under one lens and return the lens."""
    with torch.no_grad(), regard.watch(model, LENSES[name](**options)) as seen:
        model(**inputs)
    return next(iter(seen.lenses.values()))


def one_by_one(inputs):
    """Return each sequence as inputs of its own, without padding."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    return [{"input_ids": ids[real][None]} for ids, real in zip(inputs["input_ids"], mask, strict=True)]


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build("sdpa")


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt-oss"])
@pytest.mark.parametrize("name", NAMES)
def test_a_padded_batch_equals_its_sequences_merged(name, family, padding):
    model = FAMILIES[family].build("eager")
    inputs = FAMILIES[family].inputs(model, padding)
    whole = fed(model, inputs, name)
    parts = [fed(model, one, name) for one in one_by_one(inputs)]
    parts[0].merge(parts[1])
    assert_same(whole.result(), parts[0].result())


@pytest.mark.parametrize("name", NAMES)
def test_two_forwards_of_one_session_merge(llama, name):
    inputs = FAMILIES["llama"].inputs(llama)
    halves = [{"input_ids": inputs["input_ids"][i : i + 1]} for i in range(2)]
    with torch.no_grad(), regard.watch(llama, LENSES[name]()) as seen:
        kept = [llama(**half) for half in halves]
    assert len(kept) == 2
    assert_same(seen[LENSES[name]], fed(llama, inputs, name).result())


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("name", NAMES)
def test_generate_equals_one_forward_over_its_tokens(name, family, padding):
    model = FAMILIES[family].build("sdpa")
    inputs = FAMILIES[family].inputs(model, padding)
    with torch.no_grad(), regard.watch(model, LENSES[name]()) as seen:
        ids = model.generate(**inputs, max_new_tokens=7, do_sample=False)[:, :-1]
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    more = torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=mask.dtype)
    forward = fed(model, {"input_ids": ids, "attention_mask": torch.cat([mask, more], 1)}, name)
    assert_same(seen[LENSES[name]], forward.result(), 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_static_cache_changes_nothing(llama, name):
    inputs = FAMILIES["llama"].inputs(llama, "left")
    results = []
    for cache in (None, "static"):
        with torch.no_grad(), regard.watch(llama, LENSES[name]()) as seen:
            llama.generate(**inputs, max_new_tokens=4, do_sample=False, cache_implementation=cache)
        results.append(seen[LENSES[name]])
    assert_same(*results, 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_results_survive_a_file(llama, name, tmp_path):
    lens = fed(llama, FAMILIES["llama"].inputs(llama, "left"), name)
    save_seen(tmp_path / "seen.safetensors", {name: lens}, {})
    read = load_seen(tmp_path / "seen.safetensors")[name]
    assert_same(lens.result(), read.result(), 0)
    read.merge(lens)
    numbers(read.result())


@pytest.mark.parametrize("name", NAMES)
def test_reading_a_result_does_not_end_a_run(llama, name):
    inputs = FAMILIES["llama"].inputs(llama)
    with torch.no_grad(), regard.watch(llama, LENSES[name]()) as seen:
        first = llama(input_ids=inputs["input_ids"][:, :6])
        numbers(seen[LENSES[name]])
        llama(input_ids=inputs["input_ids"][:, 6:], past_key_values=first.past_key_values)
    assert_same(seen[LENSES[name]], fed(llama, inputs, name).result(), 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_measured_in_float32(name):
    model = FAMILIES["llama"].build("sdpa")
    inputs = FAMILIES["llama"].inputs(model)
    exact = numbers(fed(model, inputs, name).result())
    rough = numbers(fed(model.bfloat16(), inputs, name).result())
    for column, values in exact.items():
        if not column.startswith(("heaviest", "largest", "rate")):
            np.testing.assert_allclose(rough[column], values, rtol=0.1, atol=0.1, err_msg=column)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_grows_with_the_length_not_its_square(llama, name):
    kept = []
    for length in (60, 120):
        ids = torch.randint(5, 97, (1, length), generator=torch.Generator().manual_seed(1))
        options = {"max_tokens": 30, "heads": [(0, 1)]} if name == "patterns" else {}
        lens = fed(llama, {"input_ids": ids}, name, **options)
        gc.collect()
        tensors = [x for x in _tensors(vars(lens.tally), set()) if x.dtype.is_floating_point]
        kept.append(sum(x.numel() for x in tensors))
        assert max((x.numel() for x in tensors), default=0) <= max(4 * 513, 4 * length)
    assert kept[1] <= 2.1 * kept[0] + 64


def _tensors(value, seen):
    if id(value) in seen or inspect.ismethod(value):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from _tensors(v, seen)
    elif isinstance(value, list | tuple):
        for v in value:
            yield from _tensors(v, seen)
    elif type(value).__module__.startswith("regard.lens"):
        yield from _tensors(vars(value), seen)


@pytest.mark.parametrize("family", ["bert", "modernbert", "vit", "t5", "bart", "whisper", "llava", "falcon"])
@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_measured_or_refused_in_words(name, family):
    model = FAMILIES[family].build()
    lens = fed(model, FAMILIES[family].inputs(model, "left" if FAMILIES[family].pads else "none"), name)
    if name in TOKENS and family == "whisper":
        assert set(lens.result().sites) == {"decoder.0", "decoder.1"}
        return
    if name in TOKENS and family == "vit":
        with pytest.raises(NothingObserved, match="token ids"):
            lens.result()
        return
    result = lens.result()
    assert result._repr_html_() and str(result)
    for column, values in numbers(result).items():
        assert np.isfinite(values).any(), column
    if hasattr(result, "sites") and name in {"mean-distance", "previous-token", "value-norm", *TOKENS}:
        assert not any(site.startswith("cross") for site in result.sites)


@pytest.mark.parametrize("name", NAMES)
def test_beams_are_followed(llama, name):
    inputs = {"input_ids": FAMILIES["llama"].inputs(llama)["input_ids"][:1]}
    options = {"sequences": 8} if issubclass(LENSES[name], Patterns) else {}
    with torch.no_grad(), regard.watch(llama, LENSES[name](**options)) as seen:
        llama.generate(**inputs, max_new_tokens=5, num_beams=3, do_sample=False)
    assert all(np.isfinite(v).any() for v in numbers(seen[LENSES[name]]).values())


def test_beams_count_with_the_rows_they_were_continued_from(llama):
    inputs = {"input_ids": FAMILIES["llama"].inputs(llama)["input_ids"][:1]}
    with torch.no_grad(), regard.watch(llama, LENSES["patterns"](sequences=8), LENSES["sinks"]()) as seen:
        llama.generate(**inputs, max_new_tokens=6, num_beams=3, do_sample=False)
    found = seen[LENSES["patterns"]]
    beams = torch.stack([found.tokens("text.0", i) for i in range(3)])
    for name in ("patterns", "sinks"):
        assert_same(seen[LENSES[name]], fed(llama, {"input_ids": beams}, name).result(), 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_lens_that_saw_nothing_says_so(name):
    with pytest.raises(NothingObserved, match=LENSES[name].__name__):
        LENSES[name]().result()
