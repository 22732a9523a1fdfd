"""The stages of a call: their order, what each one sees, how edits compose, and what they may return."""

import pytest
import torch

import regard
from regard.engines import rows
from regard.engines.masks import MASKED
from regard.errors import ShapeMismatch
from regard.runtime import Edit, Lens, Point, Wanted, pipeline
from tests.support.families import FAMILIES
from tests.support.stages import Rows, run

B, T, H, D = 2, 9, 4, 8


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build("sdpa")


def made(base, name="Made", **methods):
    """A lens or edit with these methods."""
    return type(name, (base,), methods)()


def noting(base, log, who, **more):
    """A lens or edit that notes every method called, as `who.method`, at layer 1 only."""

    def note(method):
        def call(self, subject, *rest):
            where = getattr(getattr(subject, "site", None), "layer", 1)
            if where == 1:
                log.append(f"{who}.{method}")

        return call

    methods = ["prepare", "inputs", "scores", "weights", "head_outputs", "hidden", "end_call"]
    methods += ["survey"] if base is Edit else []
    stage = made(base, points=lambda self, anatomy: [Point("attention", 1)], **{m: note(m) for m in methods})
    for name, value in more.items():
        object.__setattr__(stage, name, value)
    return stage


def test_stages_come_in_order(llama):
    log = []
    stages = [noting(Edit, log, "one"), noting(Lens, log, "lens"), noting(Edit, log, "two")]
    with regard.steer(llama, *stages):
        run(llama)
    assert log == [
        "one.prepare", "two.prepare", "lens.prepare",
        "one.inputs", "two.inputs", "lens.inputs",
        "one.survey", "one.scores", "one.weights", "two.survey",
        "one.scores", "two.scores", "lens.scores",
        "one.weights", "two.weights", "lens.weights",
        "one.head_outputs", "two.head_outputs", "lens.head_outputs",
        "one.end_call", "two.end_call", "lens.end_call",
        "one.hidden", "two.hidden", "lens.hidden",
    ]  # fmt: skip


def test_a_lens_before_comes_before_all_edits(llama):
    log = []
    early = noting(Lens, log, "early", before=True)
    with regard.steer(llama, noting(Edit, log, "edit"), early):
        run(llama)
    methods = ["inputs", "scores", "weights", "head_outputs", "end_call"]
    assert log[:2] == ["edit.prepare", "early.prepare"]
    assert log[2:7] == [f"early.{m}" for m in methods]
    assert log[-2:] == ["early.hidden", "edit.hidden"]
    assert [entry for entry in log if entry.startswith("early.")].count("early.weights") == 1


class Keep(Lens):
    """Keeps what it is shown at every stage of layer 1."""

    def keep(self, call, name, value):
        if call.site.layer == 1:
            self.tally.append(call.site, name, value.detach().clone())

    def inputs(self, call):
        self.keep(call, "q", call.q)
        self.keep(call, "k", call.k)
        self.keep(call, "v", call.v)

    def scores(self, block):
        self.keep(block.call, "scores", block.scores)

    def weights(self, block):
        self.keep(block.call, "weights", block.weights)

    def head_outputs(self, call):
        self.keep(call, "head_outputs", call.head_outputs)

    def result(self):
        names = ("q", "k", "v", "scores", "weights", "head_outputs")
        return {name: self.tally.get(name)["text.1"][0] for name in names}


def at_layer_1(function):
    """An edit's method that works at layer 1 only."""
    return lambda self, x: function(x) if x.site.layer == 1 else None


EDITS = {
    "inputs": (lambda c: (c.q * 2, c.k + 0.3, c.v - 1), lambda s: (s["q"] * 2, s["k"] + 0.3, s["v"] - 1)),
    "scores": (lambda b: b.scores * 2, lambda s: (s["scores"] * 2).clamp(min=MASKED)),
    "weights": (lambda b: b.weights.roll(1, 1), lambda s: s["weights"].roll(1, 1)),
    "head_outputs": (lambda c: c.head_outputs * 3, lambda s: s["head_outputs"] * 3),
}


@pytest.mark.parametrize("stage", EDITS)
def test_before_shows_what_arrived_and_otherwise_what_edits_left(llama, stage):
    with regard.watch(llama, Keep()) as seen:
        run(llama)
    plain = seen[Keep]
    edit = made(Edit, **{stage: at_layer_1(EDITS[stage][0])})
    with regard.steer(llama, edit, Keep(name="late"), Keep(name="early", before=True)) as seen:
        run(llama)
    late, early = seen["late"], seen["early"]
    for name, value in plain.items():
        assert torch.allclose(early[name], value, atol=1e-6), name
    expected = EDITS[stage][1](plain)
    for name, value in zip(("q", "k", "v") if stage == "inputs" else (stage,), each(expected), strict=True):
        assert torch.allclose(late[name], value, atol=1e-5), name
        assert not torch.allclose(late[name], plain[name], atol=1e-2), name
    if stage != "head_outputs":
        assert torch.allclose(late["head_outputs"], dense(late), atol=1e-5)


def each(value):
    return value if isinstance(value, tuple) else (value,)


def dense(seen):
    """Head outputs by the definition, from the weights and values that were seen."""
    return seen["weights"] @ seen["v"].repeat_interleave(H // seen["v"].shape[1], 1)


def test_edits_compose_in_the_order_given(llama):
    """Adding and then doubling is not doubling and then adding, at every stage."""
    add = {
        "inputs": lambda c: (c.q + 1, c.k, c.v), "scores": lambda b: b.scores + b.key_positions[0],
        "weights": lambda b: b.weights + 0.1, "head_outputs": lambda c: c.head_outputs + 1,
    }  # fmt: skip
    double = {
        "inputs": lambda c: (c.q * 2, c.k, c.v), "scores": lambda b: b.scores * 2,
        "weights": lambda b: b.weights * 2, "head_outputs": lambda c: c.head_outputs * 2,
    }  # fmt: skip
    for stage in add:
        first, second = add[stage], double[stage]
        one = made(Edit, **{stage: lambda self, x, f=first: f(x)})
        two = made(Edit, **{stage: lambda self, x, f=second: f(x)})
        both = made(Edit, **{stage: lambda self, x, f=first, g=second, n=stage: in_turn(x, f, g, n)})
        outputs = {}
        for name, edits in {"both": [both], "order": [one, two], "other": [two, one]}.items():
            with regard.steer(llama, *edits):
                outputs[name] = run(llama)
        assert torch.equal(outputs["order"], outputs["both"]), stage
        assert not torch.allclose(outputs["other"], outputs["both"], atol=1e-3), stage


def in_turn(subject, first, second, stage):
    names = ("q", "k", "v") if stage == "inputs" else (stage,)
    for name, value in zip(names, each(first(subject)), strict=True):
        setattr(subject, name, value)
    return second(subject)


def test_the_edit_given_last_is_outermost_in_attend(llama):
    log = []

    def around(who):
        def attend(self, call, inner):
            log.append(f"{who} in")
            out = inner(call)
            log.append(f"{who} out")
            return out

        return made(Edit, attend=attend, wants=lambda self, call: Wanted() if call.site.layer == 1 else None)

    with regard.steer(llama, around("one"), around("two")):
        run(llama)
    assert log == ["two in", "one in", "one out", "two out"]


def test_attend_may_compute_the_inside_any_number_of_times(llama):
    plain = run(llama)
    twice = made(Edit, attend=lambda self, call, inner: 0.5 * inner(call) + 0.5 * inner(call))
    with regard.steer(llama, twice, Rows()) as seen:
        assert torch.allclose(run(llama), plain, atol=1e-5)
    assert seen[Rows] == {"text.0": 1, "text.1": 1}
    never = made(Edit, attend=lambda self, call, inner: torch.zeros_like(call.q))
    nothing = made(Edit, head_outputs=lambda self, call: torch.zeros_like(call.head_outputs))
    outputs = []
    for edit in (never, nothing):
        with regard.steer(llama, edit):
            outputs.append(run(llama))
    assert torch.equal(*outputs)


def test_a_survey_sees_what_earlier_edits_left_before_anything_changes(llama):
    log = []

    def survey(self, block):
        if block.site.layer == 1:
            log.append(("survey", block.start, block.weights.sum(-1).mean().item()))

    def halve(self, block):
        if block.site.layer == 1:
            log.append(("weights", block.start, block.weights.sum(-1).mean().item()))
        return block.weights * 0.5

    edits = [made(Edit, weights=lambda self, b: b.weights * 3), made(Edit, survey=survey, weights=halve)]
    with regard.steer(llama, in_blocks_of(4), *edits, made(Edit, weights=lambda self, b: b.weights * 7)):
        run(llama)
    starts = [0, 4, 8]
    assert [(name, start) for name, start, _ in log] == [
        *(("survey", start) for start in starts),
        *(("weights", start) for start in starts),
    ]
    assert all(abs(mass - 3) < 1e-5 for _, _, mass in log)


def in_blocks_of(size):
    """An edit that opens so many rows at a time."""

    def inputs(self, call):
        call.extra["block_rows"] = size

    return made(Edit, inputs=inputs)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt-oss", "t5", "bart", "falcon", "vit"])
@pytest.mark.parametrize("size", [1, 3])
def test_the_size_of_a_block_does_not_matter(name, size):
    family = FAMILIES[name]
    model = family.build(family.plain)
    smooth = made(Edit, weights=lambda self, b: b.weights**2 / (b.weights**2).sum(-1, keepdim=True))
    results = []
    for edits in ([], [in_blocks_of(size)]):
        with regard.steer(model, *edits, smooth, Rows()) as seen:
            results.append((run(model, name), seen))
    (whole, once), (parts, often) = results
    assert torch.allclose(parts, whole, atol=1e-4)
    assert sum(often[Rows].values()) > sum(once[Rows].values())


class Opened(Lens):
    """Keeps which heads and rows it is shown, and the weights, of layer 1."""

    def __init__(self, heads=None, rows=None):
        super().__init__()
        object.__setattr__(self, "wanted", Wanted(heads, rows))

    def wants(self, call):
        return self.wanted if call.site.layer == 1 else None

    def weights(self, block):
        heads = None if block.heads is None else block.heads.tolist()
        self.tally.append(block.site, "seen", (heads, (block.start, block.stop), block.weights.clone()))

    def result(self):
        return self.tally.get("seen")["text.1"]


@pytest.mark.parametrize("heads", [None, (0,), (3,), (1, 2), (2, 0), (0, 1, 2, 3)])
@pytest.mark.parametrize("rows", [None, (2, 5), (6, 99), (0, 9)])
def test_only_the_heads_and_rows_asked_for_are_opened(llama, heads, rows):
    with regard.watch(llama, Keep()) as seen:
        plain = run(llama)
    weights = seen[Keep]["weights"]
    with regard.watch(llama, Opened(heads, rows)) as seen:
        assert torch.allclose(run(llama), plain, atol=1e-5)
    ((found, where, shown),) = seen[Opened]
    some = None if heads is None or len(heads) == H else sorted(heads)
    start, stop = rows or (0, T)
    stop = min(stop, T)
    assert (found, where) == (some, (start, stop))
    width = shown.shape[-1]
    assert torch.allclose(shown, weights[:, some or list(range(H)), start:stop, :width], atol=1e-6)
    assert not weights[:, :, start:stop, width:].any()


def test_what_two_stages_want_is_opened_together(llama):
    both = [Opened((0,), (1, 3)), Opened((2,), (4, 6))]
    with regard.watch(llama, *both) as seen:
        run(llama)
    assert [shown[:2] for shown in seen["Opened"]] == [([0, 2], (1, 6))]
    with regard.watch(llama, *both, Opened()) as seen:
        run(llama)
    assert [shown[:2] for shown in seen["Opened"]] == [(None, (0, T))]


def test_a_stage_that_wants_no_heads_opens_nothing(llama):
    with regard.watch(llama, Opened(()), Opened((1,))) as seen:
        run(llama)
    assert seen.lenses["Opened"].tally.get("seen") == {}
    assert [shown[0] for shown in seen["Opened-2"]] == [[1]]


@pytest.mark.parametrize("want", [Wanted((1, 2)), Wanted(rows=(2, 5)), Wanted((3,), (1, 4))])
def test_an_edit_of_some_heads_and_rows_leaves_the_others(llama, want):
    def whole(self, block):
        heads = list(want.heads or range(H))
        start, stop = want.rows or (0, T)
        new = block.weights.clone()
        new[:, heads, start:stop] *= 2
        return new

    part = made(Edit, wants=lambda self, call: want, weights=lambda self, block: block.weights * 2)
    outputs = []
    for edit in (part, made(Edit, weights=whole)):
        with regard.steer(llama, edit):
            outputs.append(run(llama))
    assert torch.allclose(*outputs, atol=1e-5)
    assert not torch.allclose(outputs[0], run(llama), atol=1e-2)


@pytest.mark.parametrize("base", [Lens, Edit])
def test_nothing_is_opened_where_no_stage_needs_rows(llama, base, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("rows were opened")

    monkeypatch.setattr(pipeline, "row_blocks", refuse)
    monkeypatch.setattr(rows, "row_blocks", refuse)
    plain = run(llama)
    stage = made(base, inputs=lambda *a: None, head_outputs=lambda *a: None, end_call=lambda *a: None)
    away = made(base, wants=lambda self, call: None if base is Lens else Wanted(()), weights=refuse)
    with regard.steer(llama, stage, away):
        assert torch.allclose(run(llama), plain, atol=1e-5)
    with regard.watch(llama):
        assert torch.allclose(run(llama), plain, atol=1e-5)
    with pytest.raises(AssertionError, match="rows were opened"), regard.watch(llama, Rows()):
        run(llama)


SHAPES = {
    "inputs q": lambda self, call: (call.q[:, :, 1:], call.k, call.v),
    "inputs k": lambda self, call: (call.q, call.k[:, :1], call.v),
    "inputs v": lambda self, call: (call.q, call.k, call.v[:, :, 1:]),
    "scores": lambda self, block: block.scores[..., 1:],
    "weights": lambda self, block: block.weights[:, :1],
    "head_outputs": lambda self, call: call.head_outputs.transpose(1, 2),
    "attend": lambda self, call, inner: inner(call).transpose(1, 2),
    "hidden": lambda self, point, x, run: x[:, 1:],
}


@pytest.mark.parametrize("what", SHAPES)
def test_what_has_another_shape_is_refused(llama, what):
    points = {"points": lambda self, anatomy: [Point("mlp", 0)]} if what == "hidden" else {}
    edit = made(Edit, "Cutter", **{what.split()[0]: SHAPES[what]}, **points)
    with pytest.raises(ShapeMismatch, match="Cutter returned a tensor of shape"), regard.steer(llama, edit):
        run(llama)


def test_inputs_must_be_three(llama):
    edit = made(Edit, inputs=lambda self, call: call.q)
    with pytest.raises(ShapeMismatch, match=r"Made.*\(q, k, v\)"), regard.steer(llama, edit):
        run(llama)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padded_rows_stay_finite_where_masked_scores_grow(padding):
    model = FAMILIES["llama"].build("eager")
    inputs = FAMILIES["llama"].inputs(model, padding)
    with torch.no_grad(), regard.steer(model, made(Edit, scores=lambda self, b: b.scores * 3)):
        found = model(**inputs).logits
    for layer in model.model.layers:
        layer.self_attn.scaling *= 3
    with torch.no_grad():
        expected = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert found.isfinite().all()
    assert torch.allclose(found[real], expected[real], atol=1e-4)
