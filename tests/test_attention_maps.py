"""The maps that attention_maps collects are the softmax that attention computes; it leaves nothing behind."""

import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from minit2v import DiffusionPipeline, UNet3DConditionModel, UNetMotionModel, attention_maps, fast
from minit2v.fast import modules as fast_modules
from minit2v.models.layers import Attention, FrameAttention

SHARED = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 12}
B, F_, H, W, L = 2, 3, 6, 4, 5
TEXT, SPATIAL = "down.0.blocks.0.spatial.block.attn2", "down.0.blocks.0.spatial.block.attn1"
FRAMES = "down.0.blocks.0.temporal.block.attn2"


@pytest.fixture
def unet(randomize_):
    unet = UNet3DConditionModel(
        **SHARED, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), attention_head_dim=4,
    )  # fmt: skip
    return randomize_(unet).eval()


@pytest.fixture
def args():
    torch.manual_seed(0)
    return torch.randn(B, 4, F_, H, W), 500, torch.randn(B, L, 12)


def attend(m: Attention, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt d), head by head (n h l m), for x (n l d) and context (n m d)."""
    q, k = x @ m.to_q.weight.T, context @ m.to_k.weight.T
    d = q.shape[-1] // m.heads
    heads = range(m.heads)
    each = [q[..., i * d : (i + 1) * d] @ k[..., i * d : (i + 1) * d].mT / math.sqrt(d) for i in heads]
    return torch.stack([torch.exp(s) / torch.exp(s).sum(-1, keepdim=True) for s in each], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("per_frame", [False, True])
def test_by_hand(unet, args, per_frame):
    x, t, text = args
    if per_frame:
        text = torch.randn(B, F_, L, 12)
    block, seen = unet.down[0].blocks[0], {}
    for name, norm in (("spatial", block.spatial.block.norm1), ("text", block.spatial.block.norm2),
                       ("frames", block.temporal.block.norm2)):  # fmt: skip
        norm.register_forward_hook(lambda m, args, y, name=name: seen.update({name: y}))
    with attention_maps(unet, average_heads=False) as maps:
        unet(x, t, text)
    assert all(len(each) == 1 for each in maps.values())

    y = seen["spatial"]  # ((b f) p d)
    assert torch.allclose(maps[SPATIAL][0], attend(block.spatial.block.attn1, y, y), atol=1e-6)
    assert maps[SPATIAL][0].shape == (B * F_, 2, H * W, H * W)

    y = seen["text"]
    attn = block.spatial.block.attn2
    if per_frame:
        by_hand = attend(attn, y, text.flatten(0, 1))
        assert maps[TEXT][0].shape == (B * F_, 2, H * W, L)
    else:
        by_hand = attend(attn, rearrange(y, "(b f) p d -> b (f p) d", b=B), text)
        assert maps[TEXT][0].shape == (B, 2, F_ * H * W, L)
    assert torch.allclose(maps[TEXT][0], by_hand, atol=1e-6)

    y = rearrange(seen["frames"], "b f p d -> (b p) f d")
    assert torch.allclose(maps[FRAMES][0], attend(block.temporal.block.attn2, y, y), atol=1e-6)
    assert maps[FRAMES][0].shape == (B * H * W, 2, F_, F_)


def test_what_is_chosen(unet, args):
    all_names = [name for name, m in unet.named_modules() if isinstance(m, Attention)]
    with torch.no_grad(), attention_maps(unet) as maps:
        unet(*args)
    assert sorted(maps) == sorted(all_names)
    with torch.no_grad(), attention_maps(unet, "frames", "up.*", calls={1}) as maps:
        each = []
        for _ in range(3):
            each.append(unet(*args))
    frames = {name for name, m in unet.named_modules() if isinstance(m, FrameAttention) and name.startswith("up.")}
    assert set(maps) == frames and all(len(calls) == 1 for calls in maps.values())
    with torch.no_grad(), attention_maps(unet, ["text", "spatial"], [TEXT, SPATIAL], average_heads=False) as heads:
        unet(*args)
    with torch.no_grad(), attention_maps(unet, "text", TEXT) as mean:
        unet(*args)
    assert set(heads) == {TEXT, SPATIAL} and set(mean) == {TEXT}
    assert torch.allclose(mean[TEXT][0], heads[TEXT][0].mean(1)) and mean[TEXT][0].shape == (B, F_ * H * W, L)
    assert torch.allclose(mean[TEXT][0].sum(-1), torch.ones(()), atol=1e-5)


def test_half_precision_and_gradients(unet, args):
    x, t, text = args
    unet.bfloat16()
    with attention_maps(unet, "text", TEXT) as maps:
        unet(x.bfloat16(), t, text.bfloat16()).sum().backward()
    assert maps[TEXT][0].dtype == torch.float32 and not maps[TEXT][0].requires_grad
    with torch.no_grad(), attention_maps(unet.double(), "text", TEXT) as maps:
        unet(x.double(), t, text.double())
    assert maps[TEXT][0].dtype == torch.float64


def test_masks_are_kept(unet, args):
    class Causal(FrameAttention):
        def forward(self, x):
            q, k, v = (rearrange(to(x), "b f p (h d) -> (b p) h f d", h=self.heads)
                       for to in (self.to_q, self.to_k, self.to_v))  # fmt: skip
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.mask is None)
            return self.to_out(rearrange(y, "(b p) h f d -> b f p (h d)", b=len(x)))

    block = unet.down[0].blocks[0].temporal.block
    block.attn2.__class__ = Causal
    for mask in (None, torch.ones(F_, F_, dtype=torch.bool).tril(), torch.full((F_, F_), -torch.inf).triu(1)):
        block.attn2.mask = mask
        with torch.no_grad(), attention_maps(unet, "frames", FRAMES) as maps:
            unet(*args)
        assert maps[FRAMES][0].triu(1).abs().max() == 0
        assert torch.allclose(maps[FRAMES][0].sum(-1), torch.ones(()), atol=1e-5)


def untouched(network) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_nothing_stays(unet, args):
    with torch.no_grad(), attention_maps(unet):
        unet(*args)
    assert untouched(unet)
    with pytest.raises(ZeroDivisionError), attention_maps(unet):
        1 / 0  # noqa: B018
    assert untouched(unet)
    with torch.no_grad(), attention_maps(unet, "text", TEXT) as maps:
        with pytest.raises(ValueError, match="context must be"):
            unet(*args[:2], args[2][:1])
        attn = unet.down[0].blocks[0].spatial.block.attn2
        with pytest.raises(RuntimeError):
            attn(torch.zeros(1, 1, 3), torch.zeros(1, 1, 3))
        q = torch.randn(1, 1, 2, 2)
        F.scaled_dot_product_attention(q, q, q)  # somebody else's
        assert maps == {}
        unet(*args)
    assert len(maps[TEXT]) == 1 and untouched(unet)


@torch.no_grad()
def test_in_a_pipeline(monkeypatch):
    """Under guidance, and fast: only the blocks that are looked at run as they are written."""
    pipe = DiffusionPipeline.from_pretrained("shapes")
    pipe.set_progress_bar_config(disable=True)
    blocks = []
    monkeypatch.setattr(fast_modules, "res_block",
                        lambda *a, real=fast_modules.res_block: blocks.append(a[1]) or real(*a))  # fmt: skip
    call = dict(num_inference_steps=2, num_frames=4, height=32, width=32, output_type="latent")
    name = "up.0.blocks.0.spatial.block.attn2"
    plain = pipe("a red circle moving right", **call, generator=torch.Generator().manual_seed(0)).frames
    without = len(blocks)
    blocks.clear()
    with attention_maps(pipe.unet, "text", name) as maps:
        looked_at = pipe("a red circle moving right", **call, generator=torch.Generator().manual_seed(0)).frames
    assert torch.allclose(plain, looked_at, atol=1e-4) and len(blocks) == without > 0
    assert fast.runner(pipe.unet) is not pipe.unet
    by_steps = maps[name]
    assert len(by_steps) == 2 and by_steps[0].shape == (2, 4 * 2 * 2, 16)
    assert not torch.equal(by_steps[0], by_steps[1])


def test_motion_modules(randomize_):
    unet = randomize_(UNetMotionModel(
        **SHARED, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), num_attention_heads=2,
        motion_num_attention_heads=2,
    ))  # fmt: skip
    with torch.no_grad(), attention_maps(unet, "frames", "*.motion.blocks.0.attn1") as maps:
        unet(torch.randn(1, 4, F_, H, W), 5, torch.randn(1, L, 12))
    assert maps["down.1.blocks.0.motion.blocks.0.attn1"][0].shape == (H * W // 4, F_, F_)


def test_refusals(unet, args):
    for arguments, error, message in [
        (("temporal",), ValueError, "no kind 'temporal'"),
        (("text", "nowhere.*"), ValueError,
         "of kind text has a name that matches 'nowhere.*'; for example, there is 'down.0"),
    ]:
        with pytest.raises(error, match=message.replace("*", ".")), attention_maps(unet, *arguments):
            pass
    with pytest.raises(TypeError, match="needs a plain network, not a dict"), attention_maps({}):
        pass
    compiled = torch.nn.Module()
    compiled._orig_mod = unet
    with pytest.raises(TypeError, match="give the network that was compiled"), attention_maps(compiled):
        pass
    with torch.no_grad(), pytest.raises(MemoryError, match="more than the limit"), attention_maps(unet, limit=3000):
        unet(*args)
    assert untouched(unet)
    unet.down[0].blocks[0].temporal.block.attn2.forward = lambda x: x
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"{FRAMES}, a FrameAttention, does not call"):
        with attention_maps(unet, "frames"):
            unet(*args)
