"""`regard inspect --lens circuits`: the numbers of Python, a page with the graph, and refusals."""

import csv
import io
import json
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regard.lens.circuits import circuit_edges, discover_circuit
from regard.lens.circuits.panels import circuit_findings, circuit_panels
from regard.runtime.panels import GraphPanel
from regard.tasks.ioi import ioi
from regard.weights import load
from tests.tasks.test_prompts import tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny decoder that knows the words of all tasks."""
    place, words = tmp_path_factory.mktemp("kept") / "decoder", tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.25)
    model.save_pretrained(place)
    words.save_pretrained(place)
    return place


def test_numbers_are_those_of_python(folder, regard, tmp_path):
    code, out, _ = regard(
        "inspect", folder, "--lens", "circuits", "--task", "ioi", "--prompts", 4, "--seed", 3,
        "--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv",
    )  # fmt: skip
    assert code == 0
    model, words = load(folder)
    prompts = ioi(words, 4, seed=3)
    circuit = discover_circuit(model.eval(), prompts)
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["circuit"] == {s: [list(h) for h in circuit.heads(s)] for s in circuit.stages}
    rows = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text())))
    assert len(rows) == 12 and {"movers", "inhibition", "END>IO", "direct"} <= set(rows[0])
    assert float(rows[7]["movers"]) == pytest.approx(circuit.effects["movers"][7], rel=1e-4)
    assert (
        f"4 prompts of ioi: the right answer's logit above the wrong one's is {found['about']['clean']:.2f}"
        in out
    )
    for finding in circuit_findings(circuit, {}):
        assert finding.text in out


def test_a_task_without_roles_of_its_own(folder, regard):
    code, out, _ = regard("inspect", folder, "--lens", "circuits", "--task", "docstring", "--prompts", 2)
    assert code == 0 and "Writers: " in out and "Feeders: " in out and "2 prompts of docstring" in out


def test_the_page_has_the_graph_and_the_patterns(folder, tmp_path, capsys):
    from regard.cli import main

    page = tmp_path / "page.html"
    words = ["inspect", folder, "--lens", "circuits", "--task", "ioi", "--prompts", 2, "--report", page]
    assert main(list(map(str, words))) == 0
    data = json.loads(re.search(r'id="data"[^>]*>(.*?)</script>', page.read_text(), re.S)[1])
    graph = next(panel for panel in data["panels"] if panel["type"] == "graph")
    assert graph["nodes"][-1]["label"] == "answer" and graph["links"]
    grid = next(panel for panel in data["panels"] if panel["type"] == "map")
    assert [q["name"] for q in grid["quantities"]] == ["residual", "attention", "mlp"]
    assert {"circuits", "places", "patched"} <= {m["title"] for m in data["maps"]} and data["patterns"]


def test_the_graph_draws_every_edge_that_is_large_enough(folder):
    model, words = load(folder)
    prompts = ioi(words, 2)
    circuit = discover_circuit(model.eval(), prompts, share=0.1)
    edges = circuit_edges(model, prompts, circuit)
    graph = next(p for p in circuit_panels(circuit, None, edges, least=0.01) if isinstance(p, GraphPanel))
    large = [edge for edge in edges if abs(edge.effect) >= 0.01]
    assert [link.weight for link in graph.links] == [edge.effect for edge in large]
    columns = {node.name: node.column for node in graph.nodes}
    assert all(columns[link.source] < columns["answer"] for link in graph.links)


REFUSED = [
    (["--lens", "circuits"], "--lens circuits needs a task: --task ioi, greater_than"),
    (["--lens", "circuits", "--task", "chess"], "there is no task 'chess'; there are ioi, "),
    (["--lens", "circuits", "sinks", "--task", "ioi"], "makes prompts of its own; give it alone."),
    (["--lens", "circuits", "--task", "ioi", "--text", "x"], "leave out --text."),
    (["--lens", "circuits", "--task", "ioi", "--prompts", "1"], "--prompts is 1; it must be from 2 to 512."),
    (["--lens", "circuits", "--task", "greater-than"], "so there is nothing to explain."),
    (["--task", "ioi"], "--task is for --lens circuits"),
    (["--lens", "sinks", "--seed", "1"], "--seed is for --lens circuits"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_refusals(folder, refusal, words, said):
    assert said in refusal("inspect", folder, *words)


def test_a_model_that_does_not_predict_is_refused(models, refusal):
    assert "does not predict the next token" in refusal(
        "inspect", models / "bert", "--lens", "circuits", "--task", "ioi"
    )
