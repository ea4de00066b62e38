"""UNet2D against the reference: whole, every parameter random, shapes odd, and its files in both directions."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel as PeerUNet
from torch import Tensor

from minit2v import fast
from minit2v.models.unet2d import UNet2DConditionModel, UNet2DConfig

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal up to the tolerance of the dtype, relative to the largest value; a constant output would prove nothing."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() <= TOLERANCE[theirs.dtype] * theirs.abs().max()


def normal(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(randomize_, dtype: torch.dtype = torch.float64, **fields) -> tuple[PeerUNet, UNet2DConditionModel]:
    """A small network and its reference."""
    types = fields.pop("types", (CROSS, PLAIN, CROSS))
    config = {
        "block_out_channels": (32, 64, 96),
        "down_block_types": types,
        "up_block_types": tuple(t.replace("Down", "Up") for t in reversed(types)),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": 24,
        **fields,
    }
    peer = randomize_(PeerUNet(**config)).to(dtype).eval()
    ours = UNet2DConditionModel(**config).to(dtype).eval()
    ours.load_state_dict(ours.layout.to_ours(peer.state_dict()), strict=True)
    return peer, ours


def inputs(dtype: torch.dtype = torch.float64, b: int = 2, h: int = 7, w: int = 5, c: int = 4):
    return normal(b, c, h, w, dtype=dtype), torch.tensor([999, 17][:b]), normal(b, 9, 24, dtype=dtype, seed=2)


@DTYPES
@pytest.mark.parametrize(
    "fields, shape",
    [
        pytest.param({}, {}, id="odd-latents"),
        pytest.param({"layers_per_block": (1, 3, 2)}, {"b": 1}, id="layers-per-level"),
        pytest.param({"types": (CROSS,), "block_out_channels": (32,)}, {"h": 4, "w": 4}, id="one-level"),
        pytest.param({"in_channels": 9, "out_channels": 5}, {"c": 9, "h": 8, "w": 1}, id="other-in-and-out"),
        pytest.param({"layers_per_block": 2, "types": (CROSS, CROSS, PLAIN)}, {"h": 8, "w": 12}, id="like-published"),
    ],
)
@torch.no_grad()
def test_whole(randomize_, dtype, fields, shape):
    peer, ours = pair(randomize_, dtype, **fields)
    x, t, context = inputs(dtype, **shape)
    want = peer(x, t, context).sample
    close(ours(x, t, context), want)
    close(fast.runner(ours)(x, t, context), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_16_bit_is_as_close_to_float64_as_the_reference(randomize_, dtype):
    peer, ours = pair(randomize_)
    x, t, context = inputs(b=1)
    want = peer(x, t, context).sample
    args = x.to(dtype), t, context.to(dtype)
    plain, theirs = ours.to(dtype)(*args), peer.to(dtype)(*args).sample
    for got in (plain, fast.runner(ours)(*args)):
        assert got.dtype == dtype
        assert (got - want).abs().max() <= 2 * (theirs - want).abs().max() <= 0.5 * want.abs().max()


@pytest.mark.parametrize("layers", [1, (1, 2, 1)], ids=str)
@torch.no_grad()
def test_files_go_both_ways(randomize_, tmp_path, layers):
    """What the reference writes loads here, and what is written here loads there, as the same network."""
    peer, _ = pair(randomize_, torch.float32, layers_per_block=layers)
    peer.save_pretrained(tmp_path / "theirs")
    ours = UNet2DConditionModel.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    back = PeerUNet.from_pretrained(tmp_path / "ours")
    x, t, context = inputs(torch.float32)
    want = peer(x, t, context).sample
    close(ours(x, t, context), want)
    assert torch.equal(back(x, t, context).sample, want)
    theirs = json.loads((tmp_path / "theirs/config.json").read_text())
    written = json.loads((tmp_path / "ours/config.json").read_text())
    assert {n: v for n, v in theirs.items() if written.get(n, v) != v and n != "_diffusers_version"} == {}
    assert theirs.keys() - written.keys() == set(UNet2DConfig.IGNORED)
