"""What a run says while generating: its phase and tokens, each token chosen, and state that follows beams."""

import copy

import pytest
import torch

import regard
from regard.runtime import Edit, Lens
from tests.support.families import FAMILIES
from tests.support.stages import run

NEW = 5


class Told(Lens):
    """Keeps the tokens that it is told, and what the run says at each forward and step."""

    def prepare(self, run, kwargs):
        self.tally.append(RUN, "forwards", (run.phase, run.step, run.token_ids.clone(), run.grows))

    def step(self, run, tokens):
        self.tally.append(RUN, "steps", (run.phase, run.step, run.batch))
        self.tally.append(RUN, "tokens", tokens.clone())

    def result(self):
        return {name: self.tally.get(name).get("run", []) for name in ("forwards", "steps", "tokens")}


class RUN:
    alias, kind, layer, name = "run", "run", 0, ""


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build("sdpa")


def generate(model, name, *stages, seed=0, **options):
    """Generate without an end token, and return what was added and the session."""
    inputs = {k: v for k, v in FAMILIES[name].inputs(model, "left").items() if k != "decoder_input_ids"}
    length = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    torch.manual_seed(seed)
    with regard.steer(model, *stages) as seen:
        ids = model.generate(**inputs, max_new_tokens=NEW, **{"do_sample": False, **options})
    return ids[:, length:], seen


WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "no-cache": {"use_cache": False},
    "chunked": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("name", ["llama", "mistral", "falcon", "bart", "t5", "llava"])
@pytest.mark.parametrize("way", WAYS)
def test_each_token_is_told_as_it_is_chosen(name, way):
    if (way, name) in (("chunked", "t5"), ("chunked", "bart"), ("chunked", "llava"), ("static", "falcon")):
        name = "llama"
    model = FAMILIES[name].build("sdpa")
    ids, seen = generate(model, name, Told(), **WAYS[way])
    assert torch.equal(torch.stack(seen[Told]["tokens"], 1), ids)


def test_sequences_that_have_ended_are_told_as_padding(llama):
    ids, seen = generate(llama, "llama", Told(), eos_token_id=30, pad_token_id=0)
    assert (ids == 0).any()
    assert torch.equal(torch.stack(seen[Told]["tokens"], 1), ids)


def test_several_tokens_at_once_are_told_one_by_one(llama):
    """An assistant that is the same model proposes what is then taken, several tokens a forward."""
    prompt = FAMILIES["llama"].inputs(llama)["input_ids"][:1]
    options = {"max_new_tokens": 12, "do_sample": False, "assistant_model": copy.deepcopy(llama)}
    with regard.watch(llama, Told()) as seen:
        ids = llama.generate(prompt, **options)
    assert torch.equal(torch.stack(seen[Told]["tokens"], 1), ids[:, 9:])
    forwards = seen[Told]["forwards"]
    assert len(forwards) < 12
    assert [f[0] for f in forwards] == ["prefill"] + ["decode"] * (len(forwards) - 1)
    assert torch.equal(seen.last_run.token_ids[0, :20], ids[0, :20])


def brute_force_beams(model, inputs, beams):
    """Beam search without a cache: at each step the best continuations of all beams."""
    from torch.nn.functional import log_softmax

    tokens = []
    batch = len(inputs["input_ids"])
    ids = inputs["input_ids"].repeat_interleave(beams, 0)
    mask = inputs["attention_mask"].repeat_interleave(beams, 0)
    total = torch.tensor([0.0] + [-1e9] * (beams - 1)).repeat(batch)
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits[:, -1]
        scores = (total[:, None] + log_softmax(logits, -1)).view(batch, -1)
        best = scores.topk(beams)
        total = best.values.flatten()
        parent = (best.indices // logits.shape[1] + beams * torch.arange(batch)[:, None]).flatten()
        chosen = (best.indices % logits.shape[1]).flatten()
        ids = torch.cat([ids[parent], chosen[:, None]], 1)
        mask = torch.cat([mask, torch.ones(len(ids), 1, dtype=mask.dtype)], 1)
        tokens.append(chosen)
    return ids, tokens


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [2, 3])
def test_beams_are_told_the_tokens_that_go_on(llama, beams, use_cache):
    inputs = FAMILIES["llama"].inputs(llama, "left")
    ids, expected = brute_force_beams(llama, inputs, beams)
    found, seen = generate(llama, "llama", Told(), num_beams=beams, use_cache=use_cache)
    assert torch.equal(found, ids[::beams, 9:])
    assert torch.equal(torch.stack(seen[Told]["tokens"]), torch.stack(expected))
    told = seen[Told]["steps"]
    assert {batch for _, _, batch in told} == {2 * beams}
    if use_cache:
        assert [step for _, step, _ in told] == list(range(NEW))
        assert torch.equal(seen.last_run.token_ids, ids[:, :-1])


class History(Edit):
    """Keeps all tokens of each sequence in the state of the run, from what it is told alone."""

    def step(self, run, tokens):
        state = run.state(self)
        old = state.get("history")
        state["history"] = tokens[:, None] if old is None else torch.cat([old, tokens[:, None]], 1)

    def prepare(self, run, kwargs):
        if run.phase == "decode":
            told = run.state(self)["history"]
            assert torch.equal(told, run.token_ids[:, -told.shape[1] :])


class Marks(Edit):
    """Keeps, in the state of each site, for every key how much the queries so far gave it."""

    def weights(self, block):
        state = block.run.state(self, block.site)
        mass = block.weights.sum((1, 2))
        old = state.get("mass")
        if old is None:
            state["mass"] = mass
        else:
            state["mass"] = torch.nn.functional.pad(old, (0, mass.shape[1] - old.shape[1])) + mass


@pytest.mark.parametrize("name", ["llama", "bart", "t5"])
@pytest.mark.parametrize("way", [{"num_beams": 3}, {"num_beams": 4, "do_sample": True}])
def test_state_follows_the_beams(name, way):
    model = FAMILIES[name].build("sdpa")
    edit = History()
    ids, seen = generate(model, name, edit, **way)
    history = seen.last_run.state(edit)["history"]
    found = (history.view(2, -1, NEW) == ids[:, None]).all(-1)
    assert found.any(1).all()
    assert "do_sample" in way or found[:, 0].all()


def test_state_of_a_site_follows_the_beams(llama):
    """What was gathered beam by beam equals gathering it again over the tokens of each beam."""
    edit = Marks()
    _, seen = generate(llama, "llama", edit, num_beams=3)
    last = seen.last_run
    again = Marks()
    with torch.no_grad(), regard.steer(llama, again) as whole:
        llama(input_ids=last.token_ids, attention_mask=last.valid.long())
    for site in seen.sites:
        found, expected = last.state(edit, site)["mass"], whole.last_run.state(again, site)["mass"]
        # Padded queries give what they have to any key.
        keep = last.valid.all(1)
        assert keep.sum() == 3
        assert torch.allclose(found[keep], expected[keep], atol=1e-4)


def test_state_that_is_not_of_the_batch_stays(llama):
    class Other(Edit):
        def prepare(self, run, kwargs):
            run.state(self).setdefault("other", torch.arange(5))
            run.state(self).setdefault("number", 7)

    edit = Other()
    _, seen = generate(llama, "llama", edit, num_beams=3)
    assert torch.equal(seen.last_run.state(edit)["other"], torch.arange(5))
    assert seen.last_run.state(edit)["number"] == 7


def test_state_is_of_one_owner_site_and_run(llama):
    with regard.watch(llama, Told(), Told()) as seen:
        run(llama)
    first = seen.last_run
    with seen:
        run(llama)
    a, b = seen.lenses.values()
    site, other = seen.sites
    first.state(a, site)["x"] = 1
    assert first.state(a, site) == {"x": 1}
    assert first.state(b, site) == first.state(a, other) == first.state(a) == {}
    assert seen.last_run.state(a, site) == {}


PHASES = {
    "cached": {},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
}


@pytest.mark.parametrize("way", PHASES)
def test_phase_step_and_tokens(llama, way):
    ids, seen = generate(llama, "llama", Told(), **PHASES[way])
    forwards = seen[Told]["forwards"]
    assert [f[:2] for f in forwards] == [("prefill", 0), *(("decode", n) for n in range(1, NEW))]
    assert [f[2].shape[1] for f in forwards] == list(range(9, 9 + NEW))
    assert [f[3] for f in forwards] == [False] + [True] * (NEW - 1)
    prompt = FAMILIES["llama"].inputs(llama)["input_ids"]
    if way != "beams":
        assert torch.equal(seen.last_run.token_ids, torch.cat([prompt, ids[:, :-1]], 1))
    for _, _, tokens, _ in forwards:
        assert torch.equal(tokens[:, :9], prompt.repeat_interleave(len(tokens) // 2, 0))


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_chunks_are_all_prefill_even_a_chunk_of_one(llama, size):
    ids, seen = generate(llama, "llama", Told(), prefill_chunk_size=size)
    chunks = -(-9 // size)
    forwards = seen[Told]["forwards"]
    phases = [("prefill", 0)] * chunks + [("decode", n) for n in range(1, NEW)]
    assert [f[:2] for f in forwards] == phases
    lengths = [min(9, size * (n + 1)) for n in range(chunks)] + list(range(10, 9 + NEW))
    assert [f[2].shape[1] for f in forwards] == lengths
    assert [f[3] for f in forwards] == [False] * chunks + [True] * (NEW - 1)
    prompt = FAMILIES["llama"].inputs(llama)["input_ids"]
    assert torch.equal(seen.last_run.token_ids, torch.cat([prompt, ids[:, :-1]], 1))


def test_without_a_cache_every_forward_is_a_run(llama):
    ids, seen = generate(llama, "llama", Told(), use_cache=False)
    forwards = seen[Told]["forwards"]
    assert [f[:2] for f in forwards] == [("prefill", 0)] * NEW
    assert [f[3] for f in forwards] == [False] + [True] * (NEW - 1)
    prompt = FAMILIES["llama"].inputs(llama)["input_ids"]
    assert torch.equal(forwards[-1][2], torch.cat([prompt, ids[:, :-1]], 1))


def test_decoding_by_hand(llama):
    ids = FAMILIES["llama"].inputs(llama)["input_ids"]
    with torch.no_grad(), regard.watch(llama, Told()) as seen:
        cache = llama(ids[:, :4], use_cache=True).past_key_values
        llama(ids[:, 4:7], past_key_values=cache)
        llama(ids[:, 7:8], past_key_values=cache)
        llama(inputs_embeds=llama.model.embed_tokens(ids[:, 8:]), past_key_values=cache)
        llama(ids)
    forwards = seen[Told]["forwards"]
    assert [f[:2] for f in forwards] == [
        ("prefill", 0), ("prefill", 0), ("decode", 1), ("decode", 2), ("prefill", 0),
    ]  # fmt: skip
    assert torch.equal(forwards[2][2], ids[:, :8])
    assert not any(f[3] for f in forwards)


def test_a_user_keeps_their_stopping_criteria(llama):
    class Stop:
        def __init__(self):
            self.widths = []

        def __call__(self, input_ids, scores, **options):
            self.widths.append(input_ids.shape[1])
            return torch.full((len(input_ids),), input_ids.shape[1] >= 11)

    stop = Stop()
    given = [stop]
    ids, seen = generate(llama, "llama", Told(), stopping_criteria=given)
    assert ids.shape[1] == 2
    assert (given, stop.widths) == ([stop], [10, 11])
    assert torch.equal(torch.stack(seen[Told]["tokens"], 1), ids)
