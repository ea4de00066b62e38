"""The VAE alone: its names, its configuration, its errors, and what must not change its output."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from minit2v.models.vae import AutoencoderKL, AutoencoderKLConfig, DiagonalGaussian, Upsample
from minit2v_convert.diffusers_vae import LAYOUT
from minit2v_convert.rename import rename_one

SMALL = {  # 4 pixels per latent
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 32,
}
MANIFESTS = [
    *("ms-1.7b/vae", "ms-1.7b/vae.fp16", "sd15/vae", "sd15/vae.fp16", "rv51/vae"),
    *("zeroscope_v2_576w/vae", "zeroscope_v2_XL/vae"),
]
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture
def vae(randomize_) -> AutoencoderKL:
    return randomize_(AutoencoderKL(**SMALL)).double().eval()


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The attention's names of before diffusers 0.17."""
    out = {}
    for name, value in state.items():
        for new, old in OLD.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        out[name] = value
    return out


# ------------------------------------------------------------------------------------------------ names and shapes


@pytest.mark.parametrize("name", MANIFESTS)
def test_diffusers_names_and_shapes(manifest, published_config, name):
    published = {key: shape for key, (shape, _) in manifest(name).items()}
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(published_config(name.split("/")[0], "vae"))
    assert vae.config == AutoencoderKLConfig()
    ours = {key: tuple(v.shape) for key, v in vae.state_dict().items()}
    assert LAYOUT.to_ours(published) == ours
    saved = {key: tuple(v.shape) for key, v in vae.diffusers_state_dict().items()}
    assert published in (saved, old_names(saved))


def test_no_rule_and_no_alias_is_idle(manifest):
    names = {name for part in MANIFESTS for name in manifest(part)}
    aliased = [rename_one(name, LAYOUT.aliases) for name in names]
    assert {hit[1] for hit in aliased if hit} == set(range(len(LAYOUT.aliases)))
    spelled = {hit[0] if hit else name for name, hit in zip(names, aliased, strict=True)}
    assert {rename_one(name, LAYOUT.rules)[1] for name in spelled} == set(range(len(LAYOUT.rules)))


@pytest.mark.parametrize("names", ["new", "old", "mixed"])
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "1x1 conv"])
def test_every_published_spelling_loads_from_a_file(vae, tmp_path, names, conv):
    vae.float().save_pretrained(tmp_path)
    state = vae.diffusers_state_dict()
    if names == "old":
        state = old_names(state)
    if names == "mixed":
        state = {n if n.startswith("encoder.") else old: v for (n, v), old in zip(state.items(), old_names(state))}  # noqa: B905
    if conv:
        state = {n: v[..., None, None] if "attentions.0" in n and v.ndim == 2 else v for n, v in state.items()}
        assert sum(v.shape == (16, 16, 1, 1) for v in state.values()) == 8
    assert ("decoder.mid_block.attentions.0.proj_attn.weight" in state) == (names != "new")
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    z = normal(1, 4, 3, 5, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded.decode(z), vae.decode(z))


def test_what_is_saved_loads_again(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKL" and config["act_fn"] == "silu" and config["sample_size"] == 32
    loaded = AutoencoderKL.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config == vae.config and not loaded.training
    x = normal(1, 3, 13, 9)
    with torch.no_grad():
        assert torch.equal(loaded.encode(x).mean, vae.encode(x).mean)


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"latent_chanels": 4}, "latent_chanels.*nearest: 'latent_channels'"),
        ({"act_fn": "gelu"}, "act_fn='silu'"),
        ({"shift_factor": 0.1159}, "shift_factor=None"),
        ({"latents_mean": [0.1] * 4}, "latents_mean=None"),
        ({"use_quant_conv": False}, "use_quant_conv=True"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention=True"),
        ({"down_block_types": ("DownEncoderBlock2D",)}, "down_block_types must be .* each of the 3 block_out_channels"),
        ({"up_block_types": ("UpDecoderBlock2D",) * 2 + ("AttnUpDecoderBlock2D",)}, "up_block_types must be"),
        ({"norm_num_groups": 3}, r"norm_num_groups 3 must divide block_out_channels \(8, 16, 16\)"),
        ({"norm_num_groups": 0}, "norm_num_groups must be at least 1"),
        ({"block_out_channels": (), "down_block_types": (), "up_block_types": ()}, "block_out_channels"),
        ({"layers_per_block": 0}, "layers_per_block must be at least 1"),
        ({"sample_size": 3}, "sample_size must be at least 4 pixels"),
        ({"sample_size": [32, 32]}, "sample_size must be int"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_configs_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        AutoencoderKL(**{**SMALL, **fields})
    assert "\n" not in str(error.value)


def test_null_fields_of_newer_configs_are_accepted():
    newer = {"latents_mean": None, "latents_std": None, "shift_factor": None, "use_quant_conv": True}
    assert AutoencoderKL(**SMALL, **newer, force_upcast=False).config.force_upcast is False


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda vae: vae.decode(normal(1, 3, 4, 4)), r"z must be \(frames, 4 channels, height, width\), not \(1, 3"),
        (lambda vae: vae.decode(normal(1, 4, 2, 4, 4)), "z must be .* not"),
        (lambda vae: vae.encode(normal(1, 4, 16, 16)), r"x must be \(frames, 3 channels"),
        (lambda vae: vae.encode(normal(3, 16, 16)), r"not \(3, 16, 16\)"),
        (lambda vae: vae.encode(normal(1, 3, 16, 3)), "x must be at least 4 x 4 pixels, not 16 x 3"),
        (lambda vae: vae.decode(normal(1, 4, 4, 4), chunk_size=0), "chunk_size must be at least 1, not 0"),
        (lambda vae: vae.encode(normal(1, 3, 8, 8), chunk_size=-1), "chunk_size must be at least 1, not -1"),
        (lambda vae: vae.enable_tiling(3), "tile_size must be at least 4 pixels, not 3"),
        (lambda vae: vae.enable_tiling(overlap=1.0), "overlap must be a fraction .* not 1.0"),
        (lambda vae: vae.enable_tiling(overlap=-0.1), "overlap must be a fraction .* not -0.1"),
    ],
)
def test_bad_input_gets_one_clear_line(vae, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(vae)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------- pieces that add up


def test_sizes(vae):
    """Latents are floored, as the stride-2 convolutions floor them; pixels are exact multiples."""
    with torch.no_grad():
        for h, w in ((4, 4), (7, 5), (13, 9), (16, 18)):
            assert vae.encode(normal(2, 3, h, w)).mean.shape == (2, 4, h // 4, w // 4)
        out = vae.decode(normal(2, 4, 3, 1))
    assert out.shape == (2, 3, 12, 4) and out.is_contiguous()


@pytest.mark.parametrize("half", ["encode", "decode"])
def test_chunks_and_slices_equal_the_whole(vae, half):
    x = normal(5, 3, 12, 20) if half == "encode" else normal(5, 4, 3, 5)
    sizes = []
    inner = vae.encoder if half == "encode" else vae.decoder
    inner.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))

    def run(chunk_size: int | None = None) -> tuple[Tensor, list[int]]:
        sizes.clear()
        with torch.no_grad():
            y = getattr(vae, half)(x, chunk_size=chunk_size)
        return (y.mean if half == "encode" else y), list(sizes)

    whole, calls = run()
    assert calls == [5] and whole.std() > 0.1
    vae.disable_slicing()
    for chunk_size, expected in ((2, [2, 2, 1]), (1, [1] * 5), (5, [5]), (99, [5])):
        y, calls = run(chunk_size)
        assert calls == expected
        torch.testing.assert_close(y, whole, rtol=0, atol=1e-12)
    vae.enable_slicing()
    for chunk_size in (None, 3):
        y, calls = run(chunk_size)
        assert calls == [1] * 5
        torch.testing.assert_close(y, whole, rtol=0, atol=1e-12)
    vae.disable_slicing()
    assert run()[1] == [5]


@pytest.mark.parametrize("tile_size, overlap", [(16, 0.25), (20, 0.25), (4, 0.25), (12, 0.5), (32, 0.0), (28, 0.9)])
def test_tiles_of_something_local_add_up_to_the_whole(vae, tile_size, overlap):
    """Where no pixel sees its neighbours all tiles agree, so no size, place or weight of the blending may show."""
    vae.enable_tiling(tile_size, overlap)
    for h, w in ((10, 7), (4, 21), (9, 1)):
        z = normal(2, 4, h, w)
        up = vae.run_tiles(lambda z: F.interpolate(z, scale_factor=4.0, mode="nearest"), z, 1, 4)
        torch.testing.assert_close(up, z.repeat_interleave(4, 2).repeat_interleave(4, 3), rtol=0, atol=1e-12)
        x = F.pad(up, (0, 1, 0, 3), value=9.0)  # less than a latent is left over
        torch.testing.assert_close(vae.run_tiles(lambda x: F.avg_pool2d(x, 4), x, 4, 1), z, rtol=0, atol=1e-12)


def test_tiles_fade_into_each_other(vae):
    """Tiles of different brightness: within the overlap it changes by the same small step from pixel to pixel."""
    vae.enable_tiling(32)  # 8 latents, of which 2 are shared
    brightness = iter([0.0, 1.0])
    tile = lambda z: torch.full((1, 3, 24, 4 * z.shape[3]), next(brightness))  # noqa: E731
    row = vae.run_tiles(tile, torch.zeros(1, 4, 6, 12), 1, 4)[0, 0, 0]
    assert row.tolist() == [0.0] * 24 + [n / 8 for n in range(8)] + [1.0] * 16


def test_tiling_is_for_what_is_larger_than_a_tile(vae):
    small, large = normal(1, 4, 8, 8), normal(1, 4, 8, 9)
    with torch.no_grad():
        plain = vae.decode(small), vae.decode(large)
        vae.enable_tiling()  # the config's sample_size: 32 pixels, 8 latents
        assert torch.equal(vae.decode(small), plain[0])
        assert (vae.decode(large) - plain[1]).abs().max() > 0.01
        assert vae.decode(large).shape == plain[1].shape
        vae.disable_tiling()
        assert torch.equal(vae.decode(large), plain[1])


# ---------------------------------------------------------------------------------------- distribution, gradients


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_sample_is_mean_plus_std_times_the_generators_noise(dtype):
    moments = normal(2, 8, 3, 5, dtype=dtype)
    gaussian = DiagonalGaussian(moments)
    noise = torch.randn((2, 4, 3, 5), generator=torch.Generator().manual_seed(7), dtype=dtype)
    sample = gaussian.sample(torch.Generator().manual_seed(7))
    assert sample.dtype == dtype
    assert torch.equal(sample, moments[:, :4] + torch.exp(0.5 * moments[:, 4:]) * noise)
    assert torch.equal(gaussian.mode(), moments[:, :4])
    torch.manual_seed(7)
    assert torch.equal(gaussian.sample(), sample)


def test_extreme_variances_stay_finite():
    moments = torch.cat([torch.zeros(1, 4, 1, 1), torch.full((1, 4, 1, 1), 1e4)], dim=1)
    for sign in (1, -1):
        assert DiagonalGaussian(sign * moments).std.isfinite().all()
    assert DiagonalGaussian(-moments).std.min() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_upsample_is_doubling_then_the_convolution(randomize_, dtype):
    """One transposed convolution on the CPU, in half precision the two steps themselves; gradients too."""
    up = randomize_(Upsample(6)).to(dtype)
    x = normal(2, 6, 3, 5, dtype=dtype).requires_grad_()

    def gradients(y: Tensor) -> list[Tensor]:
        return [y, *torch.autograd.grad((y * normal(*y.shape, dtype=dtype, seed=3)).sum(), [x, *up.parameters()])]

    want = gradients(nn.Conv2d.forward(up, F.interpolate(x, scale_factor=2.0, mode="nearest")))
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.0}[dtype]
    for a, b in zip(gradients(up(x)), want, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_gradients_reach_every_parameter_and_match_finite_differences(randomize_):
    """Nothing that is done in place may disturb training."""
    fields = {"block_out_channels": (2, 4), "norm_num_groups": 2}
    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = randomize_(AutoencoderKL(**{**SMALL, **fields, **types})).double()
    x = normal(2, 3, 5, 4)

    def loss() -> Tensor:
        gaussian = vae.encode(x)
        y = vae.decode(gaussian.sample(torch.Generator().manual_seed(0)), chunk_size=1)
        return (y**2).mean() + (gaussian.std * gaussian.mean).mean()

    parameters = dict(vae.named_parameters())
    step = {name: normal(*p.shape, seed=n) for n, (name, p) in enumerate(parameters.items())}
    gradients = dict(zip(parameters, torch.autograd.grad(loss(), list(parameters.values())), strict=True))

    def slope(names: list[str], h: float = 1e-5) -> float:
        values = []
        for sign in (1, -2):
            with torch.no_grad():
                for name in names:
                    parameters[name] += sign * h * step[name]
                values.append(loss().item())
        with torch.no_grad():
            for name in names:
                parameters[name] += h * step[name]
        return (values[0] - values[1]) / (2 * h)

    scale = sum((g * step[name]).sum().abs() for name, g in gradients.items()).item()
    for name, g in gradients.items():
        if "to_k.bias" not in name:  # a key's bias shifts all scores alike: softmax takes it out
            assert g.abs().max() > 0, name
        assert abs(slope([name]) - (g * step[name]).sum().item()) < 1e-6 * scale, name
