"""Circuits: stages are path patching over all prompts, places are those of eager attention."""

import re

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regard.errors import RegardError
from regard.lens.circuits import (
    PlaceAttention,
    Stage,
    copying_scores,
    discover_circuit,
    label_heads,
    roles_of,
)
from regard.lens.circuits.discover import Circuit
from regard.lens.circuits.edges import circuit_edges
from regard.lens.circuits.roles import PAIRS
from regard.runtime import HeadTable, Session, attribute_logits, path_patch
from regard.runtime.edits import ScaleHeads
from regard.tasks.ioi import TEMPLATES, ioi
from tests.tasks.test_prompts import tokenizer

STAGES = (
    Stage("movers"),
    Stage("inhibition", of="movers"),
    Stage("repetition", place="S2", of="inhibition", component="value"),
)


@pytest.fixture(scope="module")
def words():
    return tokenizer()


@pytest.fixture(scope="module")
def model(words):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
        attn_implementation="eager",
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.25)
    return made


def test_a_stage_is_path_patching_over_all_prompts(model, words):
    prompts = ioi(words, 12)
    circuit = discover_circuit(model, prompts, STAGES, share=0.25)
    assert circuit.stages == ("movers", "inhibition", "repetition") and circuit.task == "ioi"
    total, gap = torch.zeros(12, dtype=torch.float64), 0.0
    for part in prompts.by_length():
        found = path_patch(model, {"input_ids": part.ids()}, {"input_ids": part.ids("corrupt")}, part.score)
        total += found.each.double().sum(1)
        gap += (found.corrupt - found.clean) * len(part)
    expected = (total / gap).numpy()
    np.testing.assert_allclose(circuit.effects["movers"], expected, rtol=1e-4)
    best = np.argsort(-np.abs(expected))[:3]
    assert circuit.heads("movers") == [circuit.effects.names[i] for i in best]
    alone = prompts.by_length()[0]
    found = path_patch(
        model, {"input_ids": alone.ids()}, {"input_ids": alone.ids("corrupt")}, alone.score,
        receivers=discover_circuit(model, alone, STAGES[:1], share=0.25).heads("movers"),
    )  # fmt: skip
    both = discover_circuit(model, alone, STAGES[:2], share=0.25)
    np.testing.assert_allclose(both.effects["inhibition"], found.heads["normalised"], rtol=1e-4)
    assert np.isnan(both.effects["inhibition"][-4:]).all()


def test_circuits_are_kept_and_compared(model, words, tmp_path):
    first, second = (discover_circuit(model, ioi(words, 6, seed=s), STAGES[:1], share=0.5) for s in (0, 1))
    first.save(tmp_path / "circuit.json")
    again = Circuit.load(tmp_path / "circuit.json")
    assert (again.task, again.share, again.heads()) == ("ioi", 0.5, first.heads())
    shared = first.overlap(second)
    assert shared.shared == len(set(first.heads()) & set(second.heads())) and shared.population == 12
    assert first.overlap(first, share=0.25).fraction == 1.0
    assert first.heads(least=1e9) == []
    table = HeadTable.from_columns({"text.0": {"movers": [1.0]}})
    with pytest.raises(RegardError, match="of models with 12 and 1 heads"):
        first.overlap(Circuit("ioi", table))
    table.save(tmp_path / "heads.json")
    with pytest.raises(RegardError, match="a list of heads and no circuit"):
        Circuit.load(tmp_path / "heads.json")


def test_overlap_at_several_sizes_and_stability(model, words, tmp_path):
    first, second = (discover_circuit(model, ioi(words, 8, seed=s), STAGES[:2], exact=False) for s in (0, 1))
    table = first.overlaps(second, (0.1, 0.5))
    assert table["share"] == [0.1, 0.5]
    for row in table.rows():
        plain, sizes = first.overlap(second, share=row["share"]), row["first"] + row["second"]
        assert (row["shared"], row["jaccard"], row["p"]) == (plain.shared, plain.jaccard, plain.p_value)
        assert row["expected"] == pytest.approx(row["first"] * row["second"] / 12)
        assert row["chance"] == pytest.approx(row["expected"] / (sizes - row["expected"]))
    assert set(first.stability) == {"movers", "inhibition"} and -1 <= first.stability["movers"] <= 1
    first.save(tmp_path / "circuit.json")
    assert Circuit.load(tmp_path / "circuit.json").stability == first.stability
    assert first.effects.about["freeze_mlps"]
    one = discover_circuit(model, ioi(words, 1), STAGES[:1])
    assert np.isnan(one.stability["movers"])


def test_a_search_that_was_stopped_goes_on(model, words, tmp_path):
    prompts = ioi(words, 4, templates=TEMPLATES[:1])
    asked = []
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: asked.append(1))

    class Impatient(type(prompts)):
        def score(self, logits):
            if len(asked) > 12:
                raise KeyboardInterrupt
            return super().score(logits)

    whole = discover_circuit(model, prompts, STAGES[:2])
    took, few = len(asked), Impatient(prompts.task, prompts.pairs)
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        discover_circuit(model, few, STAGES[:2], save=tmp_path / "kept.json")
    asked.clear()
    again = discover_circuit(model, prompts, STAGES[:2], save=tmp_path / "kept.json")
    handle.remove()
    assert len(asked) < took
    np.testing.assert_allclose(again.effects["inhibition"], whole.effects["inhibition"], rtol=1e-4, atol=1e-6)


def test_where_heads_look_and_what_they_write(model, words):
    prompts = ioi(words, 8)
    found = label_heads(model, prompts)
    for a, b in PAIRS:
        total = torch.zeros(3, 4)
        for pair in prompts.pairs:
            weights = model(pair.clean_ids[None], output_attentions=True).attentions
            total += torch.stack([w[0, :, pair.places[a], pair.places[b]] for w in weights]).detach()
        np.testing.assert_allclose(found.grid(f"{a}>{b}"), (total / 8).numpy(), rtol=1e-4, atol=1e-6)
    assert found.about["prompts"] == 8 and np.abs(found["direct"]).max() > 0


def test_what_heads_write_with_others_off(model, words):
    prompts, off = ioi(words, 2, templates=TEMPLATES[:1]), [("text.1", 2)]
    found = label_heads(model, prompts, off=off)
    answers = torch.tensor([[*pair.correct, *pair.wrong] for pair in prompts.pairs])
    with Session(model, [ScaleHeads(heads=off, mode="mean")]):
        direct = attribute_logits(model, {"input_ids": prompts.ids()}, answers).net().table("direct")
    np.testing.assert_allclose(found["direct off"], direct["direct"], rtol=1e-5, atol=1e-7)
    assert not np.allclose(found["direct off"][8:], found["direct"][8:])


def test_copying_scores(model, words):
    """By the weights of a Llama: names through the value and output map of each head."""
    prompts = ioi(words, 6)
    found = copying_scores(model, prompts, top=8)
    copied, negative = torch.zeros(3, 4), torch.zeros(3, 4)
    for pair in prompts.pairs:
        with torch.no_grad():
            states = model(pair.clean_ids[None], output_hidden_states=True).hidden_states[1][0]
            for place in ("IO", "S1"):
                at = pair.places[place]
                for i, layer in enumerate(model.model.layers):
                    v = layer.self_attn.v_proj(layer.input_layernorm(states[at])).view(2, 8)
                    for head in range(4):
                        part = layer.self_attn.o_proj.weight[:, head * 8 : head * 8 + 8]
                        for sign, into in ((1, copied), (-1, negative)):
                            logits = model.lm_head(model.model.norm(sign * part @ v[head // 2]))
                            into[i, head] += int(pair.clean_ids[at]) in logits.topk(8).indices.tolist()
    np.testing.assert_allclose(found.grid("copying"), copied / 12, atol=1e-6)
    np.testing.assert_allclose(found.grid("negative"), negative / 12, atol=1e-6)
    assert found["copying"].max() > 0 and found.about["names"] == 12
    some = copying_scores(model, prompts, [("text.2", 1), ("text.0", 3)], top=8)
    assert some.at(2, 1)["copying"] == found.at(2, 1)["copying"] and len(some) == 2
    with pytest.raises(RegardError, match="0 heads"):
        copying_scores(model, prompts, [])


def test_roles():
    def one(direct, off=None, **looks):
        columns = {f"{a}>{b}": [looks.get(f"{a}_{b}".replace("+1", "p"), 0.0)] for a, b in PAIRS}
        columns |= {} if off is None else {"direct off": [off]}
        table = HeadTable.from_columns({"text.0": {**columns, "direct": [direct]}})
        return {role for role, heads in roles_of(table).items() if heads}

    assert one(0.5, END_IO=0.9) == {"mover"}
    assert one(-0.5, END_IO=0.9) == {"negative mover"}
    assert one(0.01, END_IO=0.9) == set()
    assert one(0.5, END_S1=0.9) == {"suppressor"}
    assert one(0.0, END_S2=0.4) == {"inhibition"}
    assert one(0.0, S2_S1=0.4, S2_S1p=0.5) == {"duplicate", "induction"}
    assert one(0.0, S1p_S1=0.4) == {"previous"}
    assert one(0.0, END_IO=0.4, off=0.5) == {"backup mover"} and one(0.0, END_IO=0.4, off=0.05) == set()
    assert one(0.5, END_IO=0.4, off=0.5) == {"mover"} and one(0.0, off=0.5) == set()


def test_bad_stages(model, words):
    prompts = ioi(words, 2)
    for stages, share, said in (
        ([], 0.1, "stages is empty"),
        ([Stage("a", of="b")], 0.1, "stage 'a' is of 'b'"),
        ([Stage("a"), Stage("a")], 0.1, "two stages are called 'a'"),
        (STAGES, 0.0, "share is 0.0"),
        ([Stage("a", place="S9")], 0.1, "has no place 'S9'"),
    ):
        with pytest.raises(RegardError, match=re.escape(said)):
            discover_circuit(model, prompts, stages, share=share)
    lens = PlaceAttention(pairs={"x": (torch.tensor([1]), torch.tensor([0]))})
    with pytest.raises(RegardError, match="x has 1 places for a batch of 2"), Session(model, [lens]):
        model(prompts.pairs[0].clean_ids[None].repeat(2, 1))


def test_an_edge_is_the_path_to_one_receiver_alone(model, words):
    prompts = ioi(words, 8).by_length()[0]
    circuit = discover_circuit(model, prompts, STAGES[:2], share=0.2)
    edges = circuit_edges(model, prompts, circuit, STAGES[:2])
    to_logits = [edge for edge in edges if edge.receiver is None]
    assert [edge.sender for edge in to_logits] == circuit.heads("movers")
    for edge in to_logits:
        assert edge.effect == circuit.effects.at(*edge.sender)["movers"]
    others = [edge for edge in edges if edge.receiver is not None]
    assert others and {edge.component for edge in others} == {"query"}
    for edge in others:
        found = path_patch(
            model, {"input_ids": prompts.ids()}, {"input_ids": prompts.ids("corrupt")}, prompts.score,
            receivers=[edge.receiver],
        )  # fmt: skip
        assert edge.effect == pytest.approx(found.heads.at(*edge.sender)["normalised"], rel=1e-3, abs=1e-6)
    with pytest.raises(RegardError, match="the circuit has the stages movers, inhibition"):
        circuit_edges(model, prompts, circuit, STAGES[:1])
