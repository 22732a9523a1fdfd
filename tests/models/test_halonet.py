"""HaloNet: the counts and names of timm's models, a bottleneck by hand, small images, refusals."""

import pytest
import torch
import torch.nn.functional as F

from regard.attention.halo import HaloAttention, halo_attention
from regard.errors import RegardError
from regard.models.halonet import HaloNetConfig, HaloNetForImageClassification
from regard.models.images import cost, image_model, load_published

TIMM = {
    "halonet_h1": (8100056, 2988232704),
    "halonet26t": (12480288, 3172810752),
    "sehalonet33ts": (13691712, 3530416128),
    "halonet50ts": (22733280, 5269504000),
    "eca_halonext26ts": (10756885, 2420099968),
}
"""Parameters and multiply-adds at 256 x 256 of timm 1.0.31, by running it."""

NAMES = {
    "sehalonet33ts": {
        "stem.conv3.bn.running_var": (64,), "stages.1.0.shortcut.conv.weight": (512, 256, 1, 1),
        "stages.0.1.conv2_kxk.conv.weight": (64, 64, 3, 3), "stages.0.1.attn.fc1.weight": (8, 64, 1, 1),
        "stages.1.2.self_attn.pos_embed.height_rel": (27, 16), "stages.1.2.post_attn.weight": (128,),
        "stages.3.0.self_attn.kv.weight": (1024, 512, 1, 1), "final_conv.conv.weight": (1280, 1536, 1, 1),
        "head.fc.weight": (1000, 1280),
    },
    "eca_halonext26ts": {
        "stages.0.0.conv2_kxk.conv.weight": (64, 16, 3, 3), "stages.1.0.attn.conv.weight": (1, 1, 5),
        "stages.3.0.self_attn.q.weight": (128, 512, 1, 1), "stages.3.0.conv3_1x1.bn.num_batches_tracked": (),
    },
    "halonet_h1": {"stages.2.9.self_attn.pos_embed.width_rel": (27, 32)},
}  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_parameters_operations_and_names_are_those_of_timm(name):
    with torch.device("meta"):
        model = image_model(name, num_labels=1000)
    found = cost(model, 256)
    assert (found.parameters, found.multiply_adds) == TIMM[name]
    state = model.state_dict()
    for key, shape in NAMES.get(name, {}).items():
        assert tuple(state[key].shape) == shape


def test_the_papers_family_is_marked_and_grows():
    assert HaloNetConfig.unconfirmed == {f"halonet-h{i}" for i in range(8)}
    counts = []
    for name in sorted(HaloNetConfig.unconfirmed):
        with torch.device("meta"):
            counts.append(sum(p.numel() for p in image_model(name, num_labels=1000).parameters()) / 1e6)
    assert [round(n, 1) for n in counts] == [5.5, 8.1, 9.4, 11.8, 19.1, 30.7, 43.5, 67.4]


def made(**options):
    torch.manual_seed(0)
    sizes = {"widths": [16, 24], "depths": [1, 2], "inner": [8, 16], "attends": [[], [0, 1]], "heads": 2,
             "strides": [1, 2], "block": 4, "halo": 1, "stem_width": 8, "num_labels": 5}  # fmt: skip
    model = HaloNetForImageClassification(HaloNetConfig(**{**sizes, **options})).eval()
    with torch.no_grad():
        for name, x in (*model.named_parameters(), *model.named_buffers()):
            if not name.endswith("num_batches_tracked"):
                x.normal_(0.0, 0.3) if x.ndim > 1 else x.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("rel_stride", [None, 1])
def test_a_bottleneck_by_hand(stride, rel_stride):
    model = made(strides=[1, stride], value_ratio=1.5, rel_stride=rel_stride).double()
    block = model.stages[1][0]
    x = torch.randn(2, 16, 8, 12, dtype=torch.float64)

    def normed(x, layer):
        return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)

    y = F.relu(normed(F.conv2d(x, block.conv1_1x1.conv.weight), block.conv1_1x1.bn))
    layer = block.self_attn
    q, kv = (conv(y).unflatten(1, (2, -1)).permute(0, 3, 4, 1, 2) for conv in (layer.q, layer.kv))
    rel = layer.pos_embed.height_rel, layer.pos_embed.width_rel
    out = halo_attention(
        q, kv[..., :8], kv[..., 8:], 4, 1, rel, stride=stride, rel_stride=rel_stride or stride, impl="dense"
    )
    y = F.relu(normed(out.permute(0, 3, 4, 1, 2).flatten(1, 2), block.post_attn))
    y = normed(F.conv2d(y, block.conv3_1x1.conv.weight), block.conv3_1x1.bn)
    shortcut = normed(F.conv2d(x, block.shortcut.conv.weight, stride=stride), block.shortcut.bn)
    torch.testing.assert_close(block(x), F.relu(y + shortcut), rtol=0, atol=1e-12)
    assert layer.kv.out_channels == 16 + 24 and block.conv3_1x1.conv.in_channels == 24


@pytest.mark.parametrize(
    "options",
    [{"stem": "3x3", "stem_pool": False}, {"stem": "tiered", "channel_attention": "se", "act": "silu"},
     {"channel_attention": "eca", "group_width": 4, "num_features": 20}, {"block": 3, "num_labels": 0}],
)  # fmt: skip
def test_it_is_an_image_model_of_any_size(options, tmp_path):
    model = made(**options)
    for size in ((32, 32), (45, 38), (44, 50)):
        out = model(torch.randn(2, 3, *size), output_hidden_states=True)
        first, second = out.hidden_states
        assert first.shape[1] == 16 and second.shape[1] == 24
        assert second.shape[2:] == tuple(-(-n // 2) for n in first.shape[2:])
        assert out.logits.shape == (
            2,
            options.get("num_features", 24) if options.get("num_labels") == 0 else 5,
        )
    model.save_pretrained(tmp_path)
    again = HaloNetForImageClassification.from_pretrained(tmp_path)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(again(x).logits, model(x).logits)


def test_fresh_weights():
    torch.manual_seed(0)
    model = image_model("halonet-small", num_labels=10)
    halos = [module for module in model.modules() if isinstance(module, HaloAttention)]
    assert len(halos) == 4
    for layer in halos:
        assert abs(layer.q.weight.std() * layer.dim**0.5 - 1) < 0.2
        assert abs(layer.pos_embed.height_rel.std() / layer.scale - 1) < 0.2
    block = model.stages[0][0]
    assert block.conv3_1x1.bn.weight.abs().max() == 0, "a fresh block is its shortcut"
    assert abs(block.conv1_1x1.conv.weight.std() * 16**0.5 - 1) < 0.2, "by the channels that go out"


@pytest.mark.parametrize("size", [8, 32])
def test_the_small_one_learns_small_images(size):
    torch.manual_seed(0)
    model = image_model("halonet-small", num_labels=4, num_channels=1)
    stripes = torch.tensor([1.0, -1.0]).repeat_interleave(2).repeat(size // 4)
    across, down = stripes.expand(size, size), stripes[:, None].expand(size, size)
    labels = torch.arange(8) % 4
    images = torch.stack([across, down, across * down, torch.zeros(size, size)])[labels, None]
    images = images + 0.3 * torch.randn(images.shape)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(10):
        loss = model(images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_weights_that_do_not_fit_are_named():
    model = made()
    state = made(halo=2).state_dict()
    with pytest.raises(
        RegardError, match=r"4 of another shape \(stages.1.0.self_attn.pos_embed.height_rel is"
    ):
        load_published(model, state)
    state = {k: v for k, v in made().state_dict().items() if "kv" not in k}
    with pytest.raises(RegardError, match=r"2 missing \(stages.1.0.self_attn.kv.weight"):
        load_published(model, state)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depths": [1]}, "must name the same stages"),
        ({"attends": [[], [2]]}, r"attends of stage 1 is \[2\]; the stage has blocks 0 to 1"),
        ({"heads": 3}, "inner of stage 1 is 16 and its values have 16 channels, which 3 heads do not divide"),
        ({"heads": [2]}, "heads is .* one number or 2"),
        ({"stem": "deep"}, "stem is 'deep'; it must be one of"),
        ({"border": "cut"}, "border is 'cut'; it must be one of"),
        ({"strides": [1, 3]}, "strides of stage 1 is 3"),
        ({"group_width": 5}, "inner of stage 0 is 8, which groups of 5 do not divide"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, words):
    with pytest.raises(RegardError, match=words):
        made(**options)
