"""Models, inputs and comparisons of the replay tests."""

import torch
import transformers as tf

from tests.support.families import FAMILIES

PADDINGS = {
    "llama": "left",
    "gpt2": "left",
    "gemma2": "left",
    "opt": "left",
    "bert": "right",
    "gpt-oss": "left",
}


def made(name):
    model = FAMILIES[name].build("sdpa" if name == "falcon" else None)
    return model, FAMILIES[name].inputs(model, PADDINGS.get(name, "none"))


def three_layers():
    """A Llama of three layers, and left-padded inputs."""
    torch.manual_seed(0)
    config = FAMILIES["llama"].make("sdpa").config
    config.num_hidden_layers = 3
    model = tf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.25)
    return model, FAMILIES["llama"].inputs(model, "left")


def forward(model, inputs):
    with torch.no_grad():
        output = model(**inputs)
    return output.logits if "logits" in output else output.last_hidden_state


def close(a, b):
    return torch.allclose(a, b, atol=1e-5, rtol=1e-5)


def score(logits):
    assert logits.shape[0] == 2
    return logits[:, -1, 7].sum() - logits[:, -1, 11].sum()
