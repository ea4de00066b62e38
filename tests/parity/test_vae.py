"""The VAE against the reference: module by module and whole, every parameter random, shapes odd."""

import pytest
import torch
from diffusers import AutoencoderKL as PeerVAE
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minit2v import fast
from minit2v.models.vae import AutoencoderKL, DiagonalGaussian, Downsample, PixelAttention, ResBlock, Upsample
from minit2v_convert.diffusers_vae import ATTENTION, RES
from minit2v_convert.rename import Rules, rename

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal up to the tolerance of the dtype, relative to the largest value; a constant output would prove nothing."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() <= TOLERANCE[theirs.dtype] * theirs.abs().max()


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def twins(randomize_, peer: nn.Module, ours: nn.Module, rules: Rules, dtype: torch.dtype):
    """Both with the same random parameters; `rules` must cover every one of them."""
    randomize_(peer).to(dtype).eval()
    ours.to(dtype).eval().load_state_dict(rename(peer.state_dict(), rules), strict=True)
    return peer, ours


def pair(randomize_, channels=(8, 16, 24), dtype: torch.dtype = torch.float64, **fields):
    """A small VAE and its reference."""
    config = {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 32,
        **fields,
    }
    peer = randomize_(PeerVAE(**config)).to(dtype).eval()
    ours = AutoencoderKL(**config).to(dtype).eval()
    ours.load_state_dict(ours.layout.to_ours(peer.state_dict()), strict=True)
    return peer, ours


@DTYPES
@pytest.mark.parametrize("c_in, c_out", [(12, 20), (20, 20)])
def test_res_block(randomize_, c_in, c_out, dtype):
    peer = ResnetBlock2D(in_channels=c_in, out_channels=c_out, temb_channels=None, eps=1e-6, groups=4)
    rules = RES if c_in != c_out else RES[:4]
    peer, ours = twins(randomize_, peer, ResBlock(c_in, c_out, 4), rules, dtype)
    x = normal(3, c_in, 7, 5, dtype=dtype)
    with torch.no_grad():
        close(ours(x), peer(x, None))


@DTYPES
def test_pixel_attention(randomize_, dtype):
    peer = Attention(
        20, heads=1, dim_head=20, eps=1e-6, norm_num_groups=4, residual_connection=True, bias=True,
        upcast_softmax=True, _from_deprecated_attn_block=True,
    )  # fmt: skip
    peer, ours = twins(randomize_, peer, PixelAttention(20, 4), ATTENTION, dtype)
    x = normal(3, 20, 7, 5, dtype=dtype)
    with torch.no_grad():
        close(ours(x), peer(x))


@DTYPES
@pytest.mark.parametrize("h, w", [(8, 6), (7, 5), (2, 9)])
def test_resampling(randomize_, h, w, dtype):
    x = normal(2, 12, h, w, dtype=dtype)
    down = Downsample2D(12, use_conv=True, padding=0, name="op")
    for peer, ours in ((down, Downsample(12)), (Upsample2D(12, use_conv=True), Upsample(12))):
        peer, ours = twins(randomize_, peer, ours, [("conv.{*}", "{*}")], dtype)
        with torch.no_grad():
            close(ours(x), peer(x))


@pytest.mark.parametrize("half", ["encode", "decode"])
@pytest.mark.parametrize(
    "channels, fields",
    [
        ((8, 16), {"layers_per_block": 3}),
        ((8, 16, 24), {"layers_per_block": 1, "latent_channels": 5}),
        ((8, 12, 16, 24), {"layers_per_block": 2, "in_channels": 4, "out_channels": 2}),
        ((24, 8), {"norm_num_groups": 8}),
    ],
    ids=str,
)
@DTYPES
def test_whole(randomize_, channels, fields, half, dtype):
    peer, ours = pair(randomize_, channels, dtype, **fields)
    with torch.no_grad():
        if half == "decode":
            z = normal(2, ours.config.latent_channels, 5, 3, dtype=dtype)
            for run in (ours, fast.runner(ours)):
                close(run.decode(z), peer.decode(z).sample)
            return
        for h, w in ((16, 24), (21, 17)):
            x = normal(2, ours.config.in_channels, h, w, dtype=dtype)
            want = peer.encode(x).latent_dist
            for have in (ours.encode(x), fast.runner(ours).encode(x)):
                close(have.mean, want.mean)
                close(have.logvar, want.logvar)
                close(have.std, want.std)


def test_frames_one_at_a_time(randomize_):
    peer, ours = pair(randomize_)
    peer.enable_slicing()
    ours.enable_slicing()
    with torch.no_grad():
        z, x = normal(3, 4, 5, 3), normal(3, 3, 13, 9)
        close(ours.decode(z), peer.decode(z).sample)
        close(ours.encode(x).mean, peer.encode(x).latent_dist.mean)


@pytest.mark.parametrize("sample_size", [16, 32])
@pytest.mark.parametrize("h, w", [(8, 8), (9, 4), (5, 13), (12, 17), (25, 10)])
def test_tiling(randomize_, sample_size, h, w):
    """Tiles of 16 and 32 pixels, 4 and 8 latents: one tile, two along one axis, and grids with narrow last ones."""
    peer, ours = pair(randomize_, sample_size=sample_size)
    peer.enable_tiling()
    ours.enable_tiling()
    with torch.no_grad():
        z, x = normal(2, 4, h, w), normal(2, 3, 4 * h, 4 * w)
        close(ours.decode(z), peer.decode(z).sample)
        close(ours.encode(x).mean, peer.encode(x).latent_dist.mean)
        peer.disable_tiling()
        differs = not torch.allclose(ours.decode(z), peer.decode(z).sample, atol=1e-3)
    assert differs == (max(h, w) > sample_size // 4)


def test_tiling_of_sizes_that_are_no_multiple_of_a_latent(randomize_):
    peer, ours = pair(randomize_)
    peer.enable_tiling()
    ours.enable_tiling()
    x = normal(1, 3, 37, 45)
    with torch.no_grad():
        close(ours.encode(x).mean, peer.encode(x).latent_dist.mean)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_samples_are_bit_equal(dtype):
    moments = normal(3, 8, 5, 3, dtype=dtype)
    moments[0, 5], moments[1, 6] = 1e4, -1e4
    want = DiagonalGaussianDistribution(moments).sample(torch.Generator().manual_seed(3))
    assert torch.equal(DiagonalGaussian(moments).sample(torch.Generator().manual_seed(3)), want)


def test_the_reference_loads_what_we_save(randomize_, tmp_path):
    ours = randomize_(pair(randomize_)[1], 5).float()
    ours.save_pretrained(tmp_path)
    peer, info = PeerVAE.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    z = normal(2, 4, 5, 3, dtype=torch.float32)
    with torch.no_grad():
        close(ours.decode(z), peer.decode(z).sample)
    assert all(peer.config[name] == value for name, value in ours.config.FIXED.items())


@pytest.mark.parametrize("names", ["new", "old"])
def test_we_load_what_the_reference_saves(randomize_, tmp_path, names):
    peer = pair(randomize_, dtype=torch.float32)[0]
    peer.save_pretrained(tmp_path)
    if names == "old":  # as before diffusers 0.17; the reference still reads it
        path = tmp_path / "diffusion_pytorch_model.safetensors"
        state = load_file(path)
        for half in ("encoder", "decoder"):
            for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                for kind in ("weight", "bias"):
                    prefix = f"{half}.mid_block.attentions.0"
                    state[f"{prefix}.{old}.{kind}"] = state.pop(f"{prefix}.{new}.{kind}")
        save_file(state, path, metadata={"format": "pt"})
        peer = PeerVAE.from_pretrained(tmp_path)
    ours = AutoencoderKL.from_pretrained(tmp_path)
    x = normal(2, 3, 13, 17, dtype=torch.float32)
    with torch.no_grad():
        close(ours.encode(x).mean, peer.encode(x).latent_dist.mean)
        close(ours.decode(x[:, [0, 1, 2, 0], :5, :3]), peer.decode(x[:, [0, 1, 2, 0], :5, :3]).sample)
