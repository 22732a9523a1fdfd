"""NiNformer as a stack and as an image model, and its gating unit in other models' encoders.

Compared once with the official model for CIFAR-10 under the same weights.
"""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from regard.attention import NiNMixer
from regard.errors import RegardError, ShapeMismatch
from regard.models.images import cost, image_model, load_published
from regard.models.ninformer import NiNformer, NiNformerConfig, replace_attention


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def digits(**options):
    torch.manual_seed(0)
    return image_model("ninformer-digits", **{"num_channels": 1, "num_labels": 10, **options}).eval()


def test_the_cifar_sizes_are_those_published():
    with torch.device("meta"):
        model = image_model("ninformer-cifar", num_labels=10)
    assert sum(p.numel() for p in model.model.parameters()) == 2_637_056
    names = list(model.state_dict())
    assert {name.split(".")[0] for name in names} == {"model", "patcher", "classifier"}
    assert "model.3.mgu.Mixer.token_mix.2.net.3.bias" in names and "model.0.ffn.net.0.weight" in names
    d, h, n = 256, 512, 64
    blocks = 4 * (n * d * d + 6 * n * d * h)
    assert cost(model).multiply_adds == blocks + n * 48 * d + d * 10
    assert blocks / 4 == 54_525_952 and all(block.ffn.net[2].p == 0.5 for block in model.model)


def test_the_model_is_patches_blocks_and_the_mean():
    model, x = digits(image_size=[8, 12]), drawn(3, 1, 8, 12)
    tokens = torch.stack(
        [
            model.patcher(x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]).flatten(1)
            for i in range(4)
            for j in range(6)
        ],
        1,
    )
    for block in model.model:
        tokens = block.reference(tokens)
    out = model(x, output_hidden_states=True)
    torch.testing.assert_close(model.forward_features(x), tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.logits, model.classifier(tokens.mean(1)), rtol=0, atol=1e-5)
    assert [tuple(h.shape) for h in out.hidden_states] == [(3, 64, 4, 6)] * 3


def test_a_stack_has_the_official_names_and_runs_with_padding():
    torch.manual_seed(0)
    stack, x = NiNformer(2, 8, tokens=6, hidden=12, grid=(2, 3)).eval(), drawn(2, 6, 8)
    assert next(iter(stack.state_dict())) == "model.0.norm.weight"
    valid = torch.tensor([[True] * 4 + [False] * 2] * 2)
    junk = torch.where(valid[..., None], x, drawn(2, 6, 8, seed=1))
    torch.testing.assert_close(stack(x, valid)[valid], stack(junk, valid)[valid])
    assert stack.resize_tokens((3, 3))(drawn(2, 9, 8)).shape == (2, 9, 8)


def test_fresh_weights_are_as_torch_draws_them():
    model = image_model("ninformer-cifar")
    for module, reach in ((model.model[0].mgu.proj, 256**-0.5), (model.patcher, 48**-0.5)):
        assert 0.95 * reach < module.weight.abs().max() <= reach
        assert module.weight.std().item() == pytest.approx(reach / 3**0.5, rel=0.05)


def test_a_model_for_larger_images(tmp_path):
    model = digits()
    larger = model.resize_tokens((8, 8), mode="nearest")
    plane = drawn(2, 64, 4, 4)
    found = larger.model[0](plane.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2).mT)
    expected = model.model[0](plane.flatten(2).mT).mT.unflatten(2, (4, 4))
    torch.testing.assert_close(
        found.mT.unflatten(2, (8, 8)), expected.repeat_interleave(2, 2).repeat_interleave(2, 3)
    )
    larger.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    x = drawn(1, 1, 16, 16)
    torch.testing.assert_close(again(x).logits, larger(x).logits)
    assert model.config.image_size == 8 and model(drawn(1, 1, 8, 8)).logits.shape == (1, 10)


def test_published_weights_of_another_size_are_named():
    with pytest.raises(
        RegardError, match=r"token_mix.2.net.0.weight is \[128, 16\] there and \[128, 24\] here"
    ):
        load_published(digits(image_size=[8, 12]), digits().state_dict())


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (lambda: digits()(drawn(1, 1, 8, 12)), ShapeMismatch, "8 x 12 pixels; .* built for 8 x 8"),
        (lambda: NiNformerConfig(image_size=30), RegardError, "30 x 30, which patches of 4 do not divide"),
        (lambda: digits(gate="tanh"), RegardError, "gate is 'tanh'"),
        (lambda: NiNformer(0, 8, 6, 12), RegardError, "depth is 0"),
        (lambda: digits().resize_tokens((0, 8)), RegardError, "grid is"),
    ],
)
def test_wrong_input_is_refused(call, kind, said):
    with pytest.raises(kind, match=said):
        call()


SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 3,
}  # fmt: skip


class TimmAttention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


class TimmLike(nn.Module):
    """Named as timm's ViT, with two registers and a class token, and no config."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj, self.patch_embed.img_size = nn.Conv2d(3, 16, 4, stride=4), (8, 12)
        self.tokens = nn.Parameter(torch.randn(1, 3, 16))
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": TimmAttention(16)}) for _ in range(2))
        self.mask = {}

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).mT
        x = torch.cat([self.tokens.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = x + block["attn"](x, **self.mask)
        return x


HOSTS = {
    "transformers": (lambda: ViTForImageClassification(ViTConfig(**SIZES)), (1, 8, 8), 17, 1, (4, 4)),
    "timm": (TimmLike, (3, 8, 12), 9, 3, (2, 3)),
    "plain": (lambda: image_model("vit-digits", num_channels=1), (1, 8, 8), 16, 0, (4, 4)),
}


@pytest.mark.parametrize("name", HOSTS)
def test_a_host_runs_and_learns_with_the_unit_and_gets_its_attention_back(name):
    torch.manual_seed(0)
    make, shape, tokens, prefix, grid = HOSTS[name]
    model, x = make().train(), drawn(2, *shape)

    def run():
        out = model(x)
        return out if isinstance(out, torch.Tensor) else out.logits

    before = run()
    replaced = replace_attention(model, NiNMixer, hidden=12)
    units = [m for m in model.modules() if isinstance(m, NiNMixer)]
    assert len(units) == len(replaced.names) >= 2 and model.training and units[0].training
    assert all((u.tokens, u.prefix, u.grid) == (tokens, prefix, grid) for u in units)
    assert (run() - before).abs().max() > 1e-4
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(8):
        loss = run().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for unit in units for p in unit.parameters())
    replaced.remove()
    assert not any(isinstance(m, NiNMixer) for m in model.modules())
    assert run().shape == before.shape


def test_the_unit_computes_in_the_place_of_attention():
    torch.manual_seed(0)
    model, x = ViTForImageClassification(ViTConfig(**SIZES)).eval(), drawn(2, 1, 8, 8)
    with replace_attention(model, NiNMixer, layers=[1], hidden=12) as replaced:
        unit, layer = model.get_submodule(replaced.names[0]).mixer, model.vit.layers[1]
        h = drawn(2, 17, 16)
        mixed = h + unit(layer.layernorm_before(h))
        expected = mixed + layer.mlp(layer.layernorm_after(mixed))
        torch.testing.assert_close(layer(h, None), expected)
        assert model(x).logits.shape == (2, 3) and len(replaced.names) == 1


def test_hosts_that_cannot_take_it_are_refused():
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(RegardError, match="is causal; a mixer of tokens"):
        replace_attention(llama, NiNMixer, hidden=8)
    with pytest.raises(RegardError, match="no attention of known parts"):
        replace_attention(nn.Linear(2, 2), NiNMixer, hidden=8)
    model = TimmLike()
    with pytest.raises(RegardError, match="layer 2 was asked for; there are 2"):
        replace_attention(model, NiNMixer, layers=[2], hidden=8)
    with pytest.raises(ShapeMismatch, match="image_size is"):
        replace_attention(model, NiNMixer, image_size=(8, 8, 3), hidden=8)
    del model.patch_embed.img_size
    with pytest.raises(RegardError, match="give image_size="):
        replace_attention(model, NiNMixer, hidden=8)
    replace_attention(model, NiNMixer, image_size=(8, 12), hidden=8)
    for mask in ({"attn_mask": torch.ones(9, 9)}, {"is_causal": True}):
        model.mask = mask
        with pytest.raises(RegardError, match="with a mask or in causal order"):
            model(drawn(1, 3, 8, 12))
