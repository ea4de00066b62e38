"""UNetMotionModel against the reference, every parameter random, shapes odd.

The reference's norms are those of compat="diffusers". For the others it is given ours from outside: a norm of its own,
wrapped so that it sees each frame alone, or the whole clip.
"""

import json

import pytest
import torch
from diffusers import MotionAdapter as PeerAdapter
from diffusers import UNet2DConditionModel as PeerImage
from diffusers import UNetMotionModel as PeerUNet
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn

from minit2v import fast
from minit2v.models.blocks import MotionModule
from minit2v.models.layers import sinusoids
from minit2v.models.unet2d import UNet2DConditionModel
from minit2v.models.unet_motion import MotionAdapter, UNetMotionModel
from minit2v_convert.diffusers_motion import MODULE
from minit2v_convert.rename import rename

CROSS, PLAIN = "CrossAttnDownBlockMotion", "DownBlockMotion"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
VERSIONS = {
    "v1": {"motion_max_seq_length": 24, "use_motion_mid_block": False},
    "v2": {"motion_max_seq_length": 32, "use_motion_mid_block": True},
    "v3": {"motion_max_seq_length": 32, "use_motion_mid_block": False},
}


class PerFrame(nn.Module):
    """A norm of the reference's motion modules, which is given (b c f h w), over each frame."""

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.norm(frame) for frame in x.unbind(2)], 2)


class PerClip(nn.Module):
    """A norm of the reference's image model, which is given (n c h w), over all frames of each video."""

    def __init__(self, norm: nn.GroupNorm, frames: int):
        super().__init__()
        self.norm, self.frames = norm, frames

    def forward(self, x: Tensor) -> Tensor:
        videos = [self.norm(torch.stack(video.unbind(), 1)[None])[0] for video in x.split(self.frames)]
        return torch.cat([torch.stack(video.unbind(1)) for video in videos])


def wrap_norms(peer: PeerUNet, motion_norms: str, resnet_norms: str, frames: int) -> PeerUNet:
    for name, module in list(peer.named_modules()):
        if motion_norms == "frame" and isinstance(module, AnimateDiffTransformer3D):
            module.norm = PerFrame(module.norm)
        elif resnet_norms == "video" and name.split(".")[-2:-1] == ["resnets"]:
            module.norm1, module.norm2 = PerClip(module.norm1, frames), PerClip(module.norm2, frames)
    if resnet_norms == "video":
        peer.conv_norm_out = PerClip(peer.conv_norm_out, frames)
    return peer


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative to the largest value; a constant output would prove nothing."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert theirs.std() > 0.1
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def normal(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(
    randomize_, version: str = "v2", dtype: torch.dtype = torch.float64, norms: dict | None = None, **fields
) -> tuple[PeerUNet, UNetMotionModel]:
    """A small network and its reference. norms: ours, if they are not to be the reference's."""
    types = fields.pop("types", (CROSS, PLAIN))
    config = {
        "block_out_channels": (32, 64, 96)[: len(types)],
        "down_block_types": types,
        "up_block_types": tuple(t.replace("Down", "Up") for t in reversed(types)),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "num_attention_heads": 4,
        "motion_num_attention_heads": 8,
        "cross_attention_dim": 24,
        **VERSIONS[version],
        **fields,
    }
    peer = randomize_(PeerUNet(**config)).to(dtype).eval()
    norms = {"compat": "diffusers"} if norms is None else norms
    ours = UNetMotionModel.from_config(json.loads(peer.to_json_string()), **norms).to(dtype).eval()
    ours.load_state_dict(ours.layout.to_ours(peer.state_dict()), strict=True)
    return peer, ours


def inputs(dtype: torch.dtype = torch.float64, b: int = 2, f: int = 3, h: int = 7, w: int = 5):
    x = normal(b, 4, f, h, w, dtype=dtype) + torch.linspace(-1, 1, f, dtype=dtype)[:, None, None]  # brightness drifts
    return x, torch.tensor([999, 17][:b]), normal(b, 9, 24, dtype=dtype, seed=2)


def run(peer: PeerUNet, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """The reference wants its text once per frame."""
    per_frame = context.flatten(0, 1) if context.ndim == 4 else context.repeat_interleave(x.shape[2], 0)
    return peer(x, t, per_frame).sample


@DTYPES
@pytest.mark.parametrize("b, f, layers, clip", [(1, 4, 1, True), (3, 2, 2, True), (2, 3, 1, False), (2, 1, 1, False)])
@torch.no_grad()
def test_motion_module(randomize_, dtype, b, f, layers, clip):
    peer = AnimateDiffTransformer3D(
        3, 8, 24, num_layers=layers, norm_num_groups=4, positional_embeddings="sinusoidal", num_positional_embeddings=7
    )
    randomize_(peer).to(dtype)
    ours = MotionModule(24, 3, layers, 4, 7).to(dtype)
    ours.load_state_dict(rename(peer.state_dict(), MODULE), strict=True)
    ours.norm_over_video = clip
    if not clip:
        peer.norm = PerFrame(peer.norm)
    x = normal(b * f, 24, 3, 5, dtype=dtype)
    assert difference(ours(x, f), peer(x, num_frames=f)) <= TOLERANCE[dtype]


def test_positions():
    peer = AnimateDiffTransformer3D(
        2, 160, 320, norm_num_groups=32, positional_embeddings="sinusoidal", num_positional_embeddings=32
    )
    theirs = peer.transformer_blocks[0].pos_embed.pe
    torch.testing.assert_close(sinusoids(32, 320)[None], theirs, rtol=0, atol=4e-6)  # theirs are computed in float32


@DTYPES
@pytest.mark.parametrize(
    "version, fields, shape",
    [
        pytest.param("v1", {}, {}, id="v1"),
        pytest.param("v2", {}, {}, id="v2"),
        pytest.param("v3", {}, {"b": 1, "f": 5}, id="v3"),
        pytest.param("v2", {"layers_per_block": (1, 3, 2), "types": (CROSS, PLAIN, CROSS)}, {"b": 1}, id="v2-deep"),
        pytest.param("v3", {"layers_per_block": 2, "types": (CROSS, CROSS, PLAIN)}, {"b": 1, "h": 8, "w": 4},
                     id="v3-like-published"),
        pytest.param("v2", {"temporal_transformer_layers_per_block": 2, "temporal_transformer_layers_per_mid_block": 2,
                            "motion_num_attention_heads": (2, 8)}, {"f": 1}, id="v2-blocks-of-two"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_whole(randomize_, dtype, version, fields, shape):
    peer, ours = pair(randomize_, version, dtype, **fields)
    x, t, context = inputs(dtype, **shape)
    want = run(peer, x, t, context)
    assert difference(ours(x, t, context), want) <= TOLERANCE[dtype]
    assert difference(fast.runner(ours)(x, t, context), want) <= TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize(
    "version, fields, norms",
    [
        ("v1", {}, ("frame", "video")),
        ("v2", {}, ("frame", "frame")),
        ("v3", {}, ("frame", "frame")),
        ("v3", {"motion_norms": "video", "resnet_norms": "video"}, ("video", "video")),
    ],
    ids=str,
)
@torch.no_grad()
def test_other_norms(randomize_, dtype, version, fields, norms):
    """By default the authors', put into the reference from outside; without them it computes something else."""
    peer, ours = pair(randomize_, version, dtype, fields)
    x, t, context = inputs(dtype)
    got = ours(x, t, context)
    assert difference(got, run(peer, x, t, context)) > 1e-3
    want = run(wrap_norms(peer, *norms, 3), x, t, context)
    assert difference(got, want) <= TOLERANCE[dtype]
    assert difference(fast.runner(ours)(x, t, context), want) <= TOLERANCE[dtype]


@torch.no_grad()
def test_text_per_frame_and_every_kind_of_timestep(randomize_):
    peer, ours = pair(randomize_, "v3")
    x, t, context = inputs()
    per_frame = normal(2, 3, 9, 24, dtype=x.dtype, seed=3)
    assert difference(ours(x, t, per_frame), run(peer, x, t, per_frame)) <= 1e-10
    assert difference(fast.runner(ours)(x, t, per_frame), run(peer, x, t, per_frame)) <= 1e-10
    for t in (7, 613.5, torch.tensor(7), torch.tensor([7, 999])):
        assert difference(ours(x, t, context), run(peer, x, t, context)) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_16_bit_is_as_close_to_float64_as_the_reference(randomize_, dtype):
    peer, ours = pair(randomize_)
    x, t, context = inputs(b=1)
    want = run(peer, x, t, context)
    args = x.to(dtype), t, context.to(dtype)
    plain, theirs = ours.to(dtype)(*args), run(peer.to(dtype), *args)
    for got in (plain, fast.runner(ours)(*args)):
        assert got.dtype == dtype
        assert (got - want).abs().max() <= 2 * (theirs - want).abs().max() <= 0.5 * want.abs().max()


def test_gradients(randomize_):
    peer, ours = pair(randomize_)
    x, t, context = inputs(h=4, w=4)
    weights = normal(*x.shape, dtype=x.dtype, seed=3)
    (ours(x, t, context) * weights).sum().backward()
    (run(peer, x, t, context) * weights).sum().backward()
    theirs = ours.layout.to_ours({name: p.grad for name, p in peer.named_parameters()})
    for name, p in ours.named_parameters():
        assert (p.grad - theirs[name]).abs().max() <= 1e-9 * theirs[name].abs().max(), name


@pytest.mark.parametrize("version, layers", [("v1", 1), ("v2", (1, 2)), ("v3", 1)])
@torch.no_grad()
def test_files_go_both_ways(randomize_, tmp_path, version, layers):
    """An image model and an adapter of the reference's make the same UNet here, and what is saved loads there."""
    image = {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": layers,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": 24,
    }
    motion = {
        "block_out_channels": (32, 64),
        "motion_layers_per_block": layers,
        "motion_norm_num_groups": 8,
        "motion_num_attention_heads": 4,
        **VERSIONS[version],
    }
    randomize_(PeerImage(**image), 1).save_pretrained(tmp_path / "image")
    randomize_(PeerAdapter(**motion), 2).save_pretrained(tmp_path / "adapter")
    peer = PeerUNet.from_unet2d(*_load(PeerImage, PeerAdapter, tmp_path)).eval()
    ours = UNetMotionModel.from_unet2d(*_load(UNet2DConditionModel, MotionAdapter, tmp_path), compat="diffusers")
    x, t, context = inputs(torch.float32, f=5)
    want = run(peer, x, t, context)
    assert difference(ours(x, t, context), want) <= 1e-5

    ours.save_motion_modules(tmp_path / "again")
    back = PeerUNet.from_unet2d(
        PeerImage.from_pretrained(tmp_path / "image"), PeerAdapter.from_pretrained(tmp_path / "again")
    ).eval()
    assert torch.equal(run(back, x, t, context), want)
    ours.save_pretrained(tmp_path / "whole")
    assert torch.equal(run(PeerUNet.from_pretrained(tmp_path / "whole").eval(), x, t, context), want)
    peer.save_pretrained(tmp_path / "theirs")
    again = UNetMotionModel.from_pretrained(tmp_path / "theirs", compat="diffusers")
    assert again.config == ours.config
    assert torch.equal(again(x, t, context), ours(x, t, context))


def _load(image: type, adapter: type, folder) -> tuple:
    return image.from_pretrained(folder / "image"), adapter.from_pretrained(folder / "adapter")
