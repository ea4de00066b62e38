"""UNet2D alone: its configuration, its errors, and what must not change its output."""

import pytest
import torch

from minit2v.models.unet2d import UNet2DConditionModel, UNet2DConfig

SMALL = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
}


@pytest.fixture
def unet(randomize_):
    return randomize_(UNet2DConditionModel(**SMALL)).double().eval()


def inputs(b: int = 2, h: int = 5, w: int = 3):
    torch.manual_seed(0)
    return torch.randn(b, 4, h, w).double(), torch.tensor([3, 999])[:b], torch.randn(b, 7, 12).double()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"cross_atention_dim": 12}, "cross_atention_dim.*nearest: 'cross_attention_dim'"),
        ({"use_linear_projection": True}, "only use_linear_projection=False"),  # Stable Diffusion 2
        ({"attention_head_dim": (2, 4)}, "attention_head_dim must be int"),
        ({"attention_head_dim": 3}, "attention_head_dim is the number of heads: it must divide .* not 3"),
        ({"addition_embed_type": "text_time"}, "only addition_embed_type=None"),  # Stable Diffusion XL
        ({"transformer_layers_per_block": 2}, "only transformer_layers_per_block=1"),
        ({"down_block_types": ("CrossAttnDownBlock3D", "DownBlock2D")}, "down_block_types must be DownBlock2D"),
        ({"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}, "up_block_types must mirror"),
        ({"layers_per_block": (1, 2, 1)}, r"layers_per_block must be .* each of the 2 levels, not \(1, 2, 1\)"),
        ({"layers_per_block": (1, 0)}, "layers_per_block must be at least 1"),
        ({"norm_num_groups": 12}, "norm_num_groups 12 must divide"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        UNet2DConditionModel(**{**SMALL, **fields})
    assert "\n" not in str(error.value)


def test_published_fields_with_one_value_are_accepted():
    config = UNet2DConditionModel(**SMALL, **UNet2DConfig.FIXED, upcast_attention=True, dropout=0.1).config
    assert config.attention == (True, False) and config == UNet2DConfig(**SMALL)


@pytest.mark.parametrize(
    "x, t, context, message",
    [
        ((2, 4, 1, 5, 3), 1, (2, 7, 12), r"x must be \(batch, 4 channels, height, width\), not \(2, 4, 1, 5, 3\)"),
        ((2, 5, 5, 3), 1, (2, 7, 12), r"x must be \(batch, 4 channels, height, width\), not \(2, 5, 5, 3\)"),
        ((2, 4, 5, 3), 1, (2, 7, 13), r"context must be \(batch 2, tokens, width 12\), .* not \(2, 7, 13\)"),
        ((2, 4, 5, 3), 1, (3, 7, 12), r"context must be .* not \(3, 7, 12\)"),
        ((2, 4, 5, 3), torch.tensor([1, 2, 3]), (2, 7, 12), r"t must be a number or \(batch 2,\), not \(3,\)"),
    ],
)
def test_wrong_shapes(unet, x, t, context, message):
    with pytest.raises(ValueError, match=message) as error:
        unet(torch.zeros(x).double(), t, torch.zeros(context).double())
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_images_of_a_batch_are_independent(unet):
    x, t, context = inputs()
    both = unet(x, t, context)
    assert both.shape == x.shape and both.is_contiguous()
    for i in range(2):
        alone = unet(x[i : i + 1], t[i : i + 1], context[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_layers_of_each_level():
    unet = UNet2DConditionModel(**{**SMALL, "layers_per_block": (2, 1)})
    assert [len(level.blocks) for level in (*unet.down, *unet.up)] == [2, 1, 2, 3]
    x, t, context = (v.float() if v.is_floating_point() else v for v in inputs())
    assert unet(x, t, context).shape == x.shape
    per_level = UNet2DConditionModel(**{**SMALL, "layers_per_block": (1, 1)})
    assert per_level.state_dict().keys() == UNet2DConditionModel(**SMALL).state_dict().keys()
