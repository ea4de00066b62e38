"""UNet3D against the reference: module by module and whole, every parameter random, shapes odd."""

import pytest
import torch
from diffusers import UNet3DConditionModel as PeerUNet
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, TemporalConvLayer, Upsample2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from torch import Tensor, nn

from minit2v import fast
from minit2v.models.blocks import ResBlock, SpatialTransformer, TemporalConv, TemporalTransformer, Upsample
from minit2v.models.layers import FrameTransformerBlock, TransformerBlock, timestep_embedding
from minit2v.models.unet3d import UNet3DConditionModel
from minit2v_convert.diffusers_unet3d import RES, SKIP, TRANSFORMER
from minit2v_convert.rename import Rules, rename

CROSS, PLAIN = "CrossAttnDownBlock3D", "DownBlock3D"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal up to the tolerance of the dtype, relative to the largest value; a constant output would prove nothing."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() <= TOLERANCE[theirs.dtype] * theirs.abs().max()


def twins(randomize_, peer: nn.Module, ours: nn.Module, rules: Rules, dtype: torch.dtype):
    """Both with the same random parameters; `rules` must cover every one of them."""
    randomize_(peer).to(dtype).eval()
    state = peer.state_dict()
    assert all(v.std() > 0 for v in state.values())
    ours.to(dtype).eval().load_state_dict(rename(state, rules), strict=True)
    return peer, ours


def stripped(rules: Rules, source: str, target: str) -> Rules:
    """The rules of one module alone, from those of the whole network."""
    return [(s.removeprefix(source), t.removeprefix(target)) for s, t in rules if s.startswith(source)]


def normal(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(randomize_, dtype: torch.dtype = torch.float64, **fields) -> tuple[PeerUNet, UNet3DConditionModel]:
    """A small network and its reference."""
    types = fields.pop("types", (CROSS, PLAIN, CROSS))
    config = {
        "block_out_channels": (32, 64, 96),
        "down_block_types": types,
        "up_block_types": tuple(t.replace("Down", "Up") for t in reversed(types)),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 20,
        "cross_attention_dim": 24,
        **fields,
    }
    peer = randomize_(PeerUNet(**config)).to(dtype).eval()
    ours = UNet3DConditionModel(**config).to(dtype).eval()
    ours.load_state_dict(ours.layout.to_ours(peer.state_dict()), strict=True)
    return peer, ours


def inputs(dtype: torch.dtype = torch.float64, b: int = 2, f: int = 3, h: int = 7, w: int = 5, d: int = 24, c: int = 4):
    return normal(b, c, f, h, w, dtype=dtype), torch.tensor([999, 17][:b]), normal(b, 9, d, dtype=dtype, seed=2)


@pytest.mark.parametrize("t", [[0, 1, 17, 500, 999], [0.25, 613.5, 999.0]], ids=["int", "float"])
def test_timestep_embedding(t):
    t = torch.tensor(t)
    want = get_timestep_embedding(t, 320, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(timestep_embedding(t, 320), want)


@DTYPES
@pytest.mark.parametrize("c_in, c_out", [(24, 40), (40, 40)])
@torch.no_grad()
def test_res_block(randomize_, dtype, c_in, c_out):
    rules = stripped([*RES, *SKIP], "resnets.{j}.", "blocks.{j}.res.")
    peer = ResnetBlock2D(in_channels=c_in, out_channels=c_out, temb_channels=28, groups=4, eps=1e-5)
    peer, ours = twins(randomize_, peer, ResBlock(c_in, c_out, 28, 4), rules, dtype)
    x, emb = normal(6, c_in, 5, 3, dtype=dtype), normal(2, 28, dtype=dtype)
    emb = emb.repeat_interleave(3, 0)
    close(ours(x, emb), peer(x, emb))


@DTYPES
@pytest.mark.parametrize("b, f", [(1, 4), (3, 2), (2, 1)])
@torch.no_grad()
def test_temporal_conv(randomize_, dtype, b, f):
    rules = stripped(RES, "temp_convs.{j}.", "blocks.{j}.temporal_conv.")
    peer, ours = twins(randomize_, TemporalConvLayer(24, 24, norm_num_groups=4), TemporalConv(24, 4), rules, dtype)
    x = normal(b * f, 24, 3, 5, dtype=dtype)
    close(ours(x, f), peer(x, num_frames=f))


@DTYPES
@pytest.mark.parametrize("context_dim", [None, 28])
@torch.no_grad()
def test_transformer_block(randomize_, dtype, context_dim):
    """In space with a text; across the frames without, where the reference has pixels for its batch."""
    fields = {"cross_attention_dim": context_dim, "double_self_attention": not context_dim, "activation_fn": "geglu"}
    rules = [(s.removeprefix("transformer_blocks.0."), t.removeprefix("block.")) for s, t in TRANSFORMER[3:]]
    ours = FrameTransformerBlock(24, 3, 8) if context_dim is None else TransformerBlock(24, 3, 8, context_dim)
    peer, ours = twins(randomize_, BasicTransformerBlock(24, 3, 8, **fields), ours, rules, dtype)
    if context_dim is None:
        x = normal(2, 5, 11, 24, dtype=dtype)  # b f p d
        want = peer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 11)).transpose(1, 2)
        close(ours(x), want)
    else:
        x, context = normal(6, 11, 24, dtype=dtype), normal(2, 9, 28, dtype=dtype)
        close(ours(x, context), peer(x, encoder_hidden_states=context.repeat_interleave(3, 0)))


@DTYPES
@pytest.mark.parametrize("c, heads, head_dim", [(24, 3, 8), (40, 2, 12)], ids=["even", "inner-differs"])
@torch.no_grad()
def test_spatial_transformer(randomize_, dtype, c, heads, head_dim):
    fields = {"norm_num_groups": 4, "cross_attention_dim": 28, "use_linear_projection": True}
    peer = Transformer2DModel(heads, head_dim, c, **fields)
    peer, ours = twins(randomize_, peer, SpatialTransformer(c, heads, head_dim, 28, 4), TRANSFORMER, dtype)
    x, context = normal(6, c, 5, 3, dtype=dtype), normal(2, 9, 28, dtype=dtype)
    close(ours(x, context), peer(x, encoder_hidden_states=context.repeat_interleave(3, 0)).sample)


@DTYPES
@pytest.mark.parametrize("b, f", [(1, 4), (3, 2), (2, 1)])
@torch.no_grad()
def test_temporal_transformer(randomize_, dtype, b, f):
    peer = TransformerTemporalModel(3, 12, 40, norm_num_groups=4)
    peer, ours = twins(randomize_, peer, TemporalTransformer(40, 3, 12, 4), TRANSFORMER, dtype)
    x = normal(b * f, 40, 3, 5, dtype=dtype)
    close(ours(x, f), peer(x, num_frames=f).sample)


@DTYPES
@torch.no_grad()
def test_resampling(randomize_, dtype):
    rules = [("conv.{*}", "{*}"), ("op.{*}", "{*}")]
    x = normal(2, 24, 7, 5, dtype=dtype)
    down = nn.Conv2d(24, 24, 3, stride=2, padding=1)
    peer, ours = twins(randomize_, Downsample2D(24, use_conv=True, padding=1, name="op"), down, rules, dtype)
    close(ours(x), peer(x))
    peer, ours = twins(randomize_, Upsample2D(24, use_conv=True), Upsample(24), rules, dtype)
    close(ours(x, (14, 10)), peer(x))
    close(ours(x, (13, 9)), peer(x, (13, 9)))


@DTYPES
@pytest.mark.parametrize(
    "fields, shape",
    [
        pytest.param({}, {}, id="odd-latents"),
        pytest.param({"layers_per_block": 3, "types": (PLAIN, CROSS, PLAIN)}, {"b": 1, "f": 5}, id="deep"),
        pytest.param({"types": (CROSS,), "block_out_channels": (32,)}, {"f": 1, "h": 4, "w": 4}, id="one-level"),
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


@torch.no_grad()
def test_every_kind_of_timestep(randomize_):
    peer, ours = pair(randomize_)
    x, _, context = inputs()
    for t in (7, 613.5, torch.tensor(7), torch.tensor(613.5), torch.tensor([7]), torch.tensor([7, 999])):
        close(ours(x, t, context), peer(x, t, context).sample)
        close(fast.runner(ours)(x, t, context), peer(x, t, context).sample)


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


def test_gradients(randomize_):
    peer, ours = pair(randomize_, layers_per_block=1, types=(CROSS, PLAIN), block_out_channels=(32, 64))
    x, t, context = inputs(h=4, w=4)
    weights = normal(*x.shape, dtype=x.dtype, seed=3)
    (ours(x, t, context) * weights).sum().backward()
    (peer(x, t, context).sample * weights).sum().backward()
    theirs = ours.layout.to_ours({name: p.grad for name, p in peer.named_parameters()})
    for name, p in ours.named_parameters():
        assert (p.grad - theirs[name]).abs().max() <= 1e-10 * theirs[name].abs().max(), name


@torch.no_grad()
def test_saved_weights_load_in_the_reference(randomize_, tmp_path):
    peer, ours = pair(randomize_, torch.float32)
    ours.save_pretrained(tmp_path)
    back = PeerUNet.from_pretrained(tmp_path)
    x, t, context = inputs(torch.float32)
    assert torch.equal(back(x, t, context).sample, peer(x, t, context).sample)
