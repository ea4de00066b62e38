"""UNet3D alone: its names, its configuration, its errors, and what must not change its output."""

import pytest
import torch

from minit2v.models.layers import FeedForward
from minit2v.models.unet3d import UNet3DConditionModel, UNet3DConfig
from minit2v_convert.diffusers_unet3d import LAYOUT
from minit2v_convert.rename import rename_one

SMALL = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "cross_attention_dim": 12,
}
MANIFESTS = ["ms-1.7b/unet", "ms-1.7b/unet.fp16", "zeroscope_v2_576w/unet", "zeroscope_v2_XL/unet"]


@pytest.fixture
def unet(randomize_):
    return randomize_(UNet3DConditionModel(**SMALL)).double().eval()


def inputs(b: int = 2, f: int = 3, h: int = 5, w: int = 3):
    torch.manual_seed(0)
    return torch.randn(b, 4, f, h, w).double(), torch.tensor([3, 999])[:b], torch.randn(b, 7, 12).double()


@pytest.mark.parametrize("name", MANIFESTS)
def test_diffusers_names_and_shapes(manifest, published_config, name):
    published = manifest(name)
    assert len(published) == 1480
    with torch.device("meta"):
        unet = UNet3DConditionModel.from_config(published_config(name.split("/")[0], "unet"))
    assert unet.config == UNet3DConfig()
    shapes = {key: tuple(v.shape) for key, v in unet.state_dict().items()}
    assert LAYOUT.to_ours({key: shape for key, (shape, _) in published.items()}) == shapes
    assert LAYOUT.to_diffusers(LAYOUT.to_ours(published)) == published
    assert unet.diffusers_state_dict().keys() == published.keys()


def test_no_rule_is_idle(manifest):
    used = {rename_one(name, LAYOUT.rules)[1] for name in manifest("ms-1.7b/unet")}
    assert [rule for n, rule in enumerate(LAYOUT.rules) if n not in used] == []


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"cross_atention_dim": 12}, "cross_atention_dim.*nearest: 'cross_attention_dim'"),
        ({"num_attention_heads": 8}, "num_attention_heads=None"),
        ({"act_fn": "gelu"}, "act_fn='silu'"),
        ({"norm_eps": 1e-6}, "norm_eps=1e-05"),
        ({"down_block_types": ("CrossAttnDownBlock2D", "DownBlock3D")}, "down_block_types must be DownBlock3D"),
        ({"down_block_types": ("DownBlock3D",)}, "down_block_types must be .* each of the 2"),
        ({"up_block_types": ("CrossAttnUpBlock3D", "UpBlock3D")}, "up_block_types must mirror"),
        ({"block_out_channels": (16, 30)}, "norm_num_groups 8 must divide"),
        ({"block_out_channels": (15, 30), "norm_num_groups": 15}, "even"),
        ({"attention_head_dim": 17}, "attention_head_dim is the width of a head"),
        ({"attention_head_dim": (8, 8)}, "attention_head_dim must be int"),
        ({"layers_per_block": 0}, "layers_per_block"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        UNet3DConditionModel(**{**SMALL, **fields})
    assert "\n" not in str(error.value)


def test_published_fields_with_one_value_are_accepted():
    config = UNet3DConditionModel(**SMALL, **UNet3DConfig.FIXED).config
    assert config.attention == (True, False)


@pytest.mark.parametrize(
    "x, t, context, message",
    [
        ((4, 3, 5, 3), 1, (2, 7, 12), r"x must be \(batch, 4 channels, frames, height, width\), not \(4, 3, 5, 3\)"),
        ((2, 5, 3, 5, 3), 1, (2, 7, 12), r"x must be .* not \(2, 5, 3, 5, 3\)"),
        ((2, 4, 3, 5, 3), 1, (2, 7, 13), r"context must be \(batch 2, tokens, width 12\), .* not \(2, 7, 13\)"),
        ((2, 4, 3, 5, 3), 1, (6, 7, 12), r"context must be .* not \(6, 7, 12\)"),
        ((2, 4, 3, 5, 3), 1, (7, 12), r"context must be .* not \(7, 12\)"),
        ((2, 4, 3, 5, 3), torch.tensor([1, 2, 3]), (2, 7, 12), r"t must be a number or \(batch 2,\), not \(3,\)"),
        ((2, 4, 3, 5, 3), torch.tensor([[1]]), (2, 7, 12), r"t must be .* not \(1, 1\)"),
    ],
)
def test_wrong_shapes(unet, x, t, context, message):
    with pytest.raises(ValueError, match=message) as error:
        unet(torch.zeros(x).double(), t, torch.zeros(context).double())
    assert "\n" not in str(error.value)


def test_starts_as_an_identity_in_time():
    """A fresh TemporalConv adds nothing, so a pretrained image model is not disturbed."""
    unet = UNet3DConditionModel(**SMALL)
    conv = unet.down[0].blocks[0].temporal_conv
    x = torch.randn(6, 16, 3, 5)
    assert torch.equal(conv(x, 3), x)
    assert all(c.weight.abs().sum() > 0 for c in conv.convs[:-1])


@torch.no_grad()
def test_videos_of_a_batch_are_independent(unet):
    x, t, context = inputs()
    both = unet(x, t, context)
    for i in range(2):
        alone = unet(x[i : i + 1], t[i : i + 1], context[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_memory_layout_of_the_input_does_not_matter(unet):
    x, t, context = inputs()
    y = unet(x, t, context)
    other = unet(x.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3), t, context)
    torch.testing.assert_close(other, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size, dim", [(None, 0), (2, 0), (None, 1), (4, 1), (1000, 1)])
@torch.no_grad()
def test_forward_chunking(unet, size, dim):
    x, t, context = inputs()
    want = unet(x, t, context)
    unet.enable_forward_chunking(size, dim)
    largest = 0

    def record(_, args):
        nonlocal largest
        largest = max(largest, args[0].shape[dim - 3])  # of (... frames pixels d)

    hooks = [m.proj_out.register_forward_pre_hook(record) for m in unet.modules() if isinstance(m, FeedForward)]
    torch.testing.assert_close(unet(x, t, context), want, rtol=1e-12, atol=1e-12)
    assert 0 < largest <= (size or 1)
    for hook in hooks:
        hook.remove()
    unet.disable_forward_chunking()
    assert torch.equal(unet(x, t, context), want)


def test_forward_chunking_errors(unet):
    with pytest.raises(ValueError, match="dim must be 0"):
        unet.enable_forward_chunking(1, dim=2)
    with pytest.raises(ValueError, match="chunk_size"):
        unet.enable_forward_chunking(-1)


def test_gradient_checkpointing(unet):
    x, t, context = inputs()
    x.requires_grad_()
    parameters = [x, *unet.parameters()]

    def gradients() -> tuple[list[torch.Tensor], int]:
        kept = []  # activations that autograd keeps for the way back

        def keep(tensor):
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = unet(x, t, context)
        return torch.autograd.grad(y.square().sum(), parameters), sum(kept)

    want, all_kept = gradients()
    unet.enable_gradient_checkpointing()
    got, few_kept = gradients()
    unet.disable_gradient_checkpointing()
    _, again_all_kept = gradients()
    assert few_kept < 0.5 * all_kept == 0.5 * again_all_kept
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
