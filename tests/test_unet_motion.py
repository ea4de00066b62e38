"""MotionAdapter and UNetMotionModel alone: what goes into what, which norms hold, errors, and what changes nothing."""

import json
import logging

import pytest
import torch

from minit2v.models.blocks import MotionModule
from minit2v.models.layers import FeedForward
from minit2v.models.unet2d import UNet2DConditionModel
from minit2v.models.unet_motion import MotionAdapter, MotionAdapterConfig, UNetMotionModel

IMAGE = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
}
MOTION = {
    "block_out_channels": (16, 32),
    "motion_layers_per_block": 1,
    "motion_num_attention_heads": 4,
    "motion_norm_num_groups": 8,
}
VERSIONS = {
    "v1": {"motion_max_seq_length": 24, "use_motion_mid_block": False},
    "v2": {"motion_max_seq_length": 32, "use_motion_mid_block": True},
    "v3": {"motion_max_seq_length": 32, "use_motion_mid_block": False},
}


@pytest.fixture
def image(randomize_):
    return randomize_(UNet2DConditionModel(**IMAGE)).eval()


@pytest.fixture
def make_adapter(randomize_):
    def make(version="v2", seed=1, **fields):
        return randomize_(MotionAdapter(**{**MOTION, **VERSIONS[version], **fields}), seed)

    return make


@pytest.fixture
def unet(image, make_adapter):
    return UNetMotionModel.from_unet2d(image, make_adapter()).double()


def inputs(b: int = 2, f: int = 3, h: int = 5, w: int = 3):
    torch.manual_seed(0)
    return torch.randn(b, 4, f, h, w).double(), torch.tensor([3, 999])[:b], torch.randn(b, 7, 12).double()


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ------------------------------------------------------------------------------------------------ what goes into what


def test_from_unet2d_leaves_both_as_they_were(image, make_adapter):
    adapter = make_adapter().double()
    image.half().requires_grad_(False)
    adapter.mid.requires_grad_(False)
    before = {
        m: ({n: v.clone() for n, v in m.state_dict().items()}, [p.requires_grad for p in m.parameters()], m.training)
        for m in (image, adapter)
    }
    new = UNetMotionModel.from_unet2d(image, adapter)
    assert new.dtype == torch.float16 and all(v.dtype == torch.float16 for v in new.state_dict().values())
    assert not new.training and not any(m.training for m in new.modules()), "the mode is the image model's"
    assert all(p.requires_grad for p in new.parameters())
    with torch.no_grad():
        for value in new.state_dict().values():
            value += 1
    new.float().train().freeze_unet2d_params()
    for module, (state, wanted, training) in before.items():
        assert all(torch.equal(v, state[n]) and v.dtype == state[n].dtype for n, v in module.state_dict().items())
        assert [p.requires_grad for p in module.parameters()] == wanted and module.training is training
    assert not any(isinstance(m, MotionModule) for m in image.modules())


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing(image):
    unet = UNetMotionModel.from_unet2d(image.double())
    assert unet.config.use_motion_mid_block and len(unet.mid[0].motion.blocks) == 1
    x, t, context = inputs()
    frames = [image(x[:, :, i], t, context) for i in range(3)]
    close(unet(x, t, context), torch.stack(frames, 2))


def test_shapes_alone(image, make_adapter):
    unet = UNetMotionModel.from_unet2d(image, make_adapter("v3"), load_weights=False, compat="diffusers")
    full = UNetMotionModel.from_unet2d(image, make_adapter("v3"), compat="diffusers")
    assert unet.config == full.config and unet.config.motion_norms == "video"
    assert unet.state_dict().keys() == full.state_dict().keys() and not same(unet, full)
    explicit = make_adapter("v3", motion_norms="frame")
    unet = UNetMotionModel.from_unet2d(image, explicit, load_weights=False, compat="diffusers")
    assert (unet.config.motion_norms, unet.config.resnet_norms) == ("frame", "frame")


@pytest.mark.parametrize("first, then", [("v2", "v3"), ("v3", "v2"), ("v1", "v2"), ("v2", "v1")])
@torch.no_grad()
def test_adapters_take_each_others_place(image, make_adapter, first, then):
    """With a mid block or without, and with other numbers of positions, heads and blocks."""
    adapter = make_adapter(then, 5, motion_num_attention_heads=(2, 8), motion_transformer_layers_per_block=(1, 2))
    unet = UNetMotionModel.from_unet2d(image, make_adapter(first)).double()
    unet.enable_forward_chunking(1)
    unet.load_motion_modules(adapter)
    want = UNetMotionModel.from_unet2d(image, adapter).double()
    assert same(unet, want) and unet.config == want.config and adapter.dtype == torch.float32
    x, t, context = inputs()
    close(unet(x, t, context), want(x, t, context))
    assert all(m.chunking == (1, -3) for m in unet.modules() if isinstance(m, FeedForward)), "new modules, too"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"motion_norms": "video", "resnet_norms": "video"},
        {"motion_transformer_layers_per_block": (2, 1), "motion_transformer_layers_per_mid_block": 2},
        {"motion_num_attention_heads": (2, 8), "motion_max_seq_length": 7, "motion_layers_per_block": (1, 1)},
        {"use_motion_mid_block": False, "motion_transformer_layers_per_mid_block": (1,)},
    ],
    ids=str,
)
def test_saved_motion_modules_are_the_adapter(image, make_adapter, tmp_path, fields):
    adapter = make_adapter(**{"resnet_norms": "frame", **fields})
    UNetMotionModel.from_unet2d(image, adapter).save_motion_modules(tmp_path)
    back = MotionAdapter.from_pretrained(tmp_path)
    assert back.config == adapter.config and same(back, adapter)


def test_saved_whole_and_loaded(image, make_adapter, tmp_path):
    unet = UNetMotionModel.from_unet2d(image, make_adapter("v1", motion_norms="video"))
    unet.save_pretrained(tmp_path)
    back = UNetMotionModel.from_pretrained(tmp_path)
    assert same(back, unet) and back.config.motion_norms == "video" and back.norm_over_video
    assert all(m.norm_over_video for m in back.modules() if isinstance(m, MotionModule))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"block_out_channels": (16, 64)}, r"its block_out_channels is \(16, 64\), the UNet's \(16, 32\)"),
        ({"block_out_channels": (16, 32, 32)}, "its block_out_channels"),
        ({"motion_layers_per_block": 2}, r"its layers_per_block is \(2, 2\), the UNet's \(1, 1\)"),
        ({"motion_norm_num_groups": 4}, "its norm_num_groups is 4, the UNet's 8"),
    ],
)
def test_adapters_that_do_not_fit(image, unet, fields, message):
    adapter = MotionAdapter(**{**MOTION, **fields})
    config = unet.config
    for put_in in (lambda: UNetMotionModel.from_unet2d(image, adapter), lambda: unet.load_motion_modules(adapter)):
        with pytest.raises(ValueError, match="the motion adapter does not fit the UNet: " + message):
            put_in()
    assert unet.config is config


def test_a_unet_that_has_motion_is_no_image_model(unet, make_adapter):
    with pytest.raises(TypeError, match="unet must be a UNet2DConditionModel, not a UNetMotionModel"):
        UNetMotionModel.from_unet2d(unet, make_adapter())


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_full_size(manifest, published_config, version):
    """SD 1.5 with the published adapters in it: the names and shapes of both, no more and no fewer."""
    name = {"v1": "adapter-v1-5", "v2": "adapter-v1-5-2", "v3": "adapter-v1-5-3"}[version]
    with torch.device("meta"):
        adapter = MotionAdapter.from_config(published_config(name, "motion_adapter"))
        image = UNet2DConditionModel.from_config(published_config("sd15", "unet"))
    unet = UNetMotionModel.from_unet2d(image, adapter)
    published = manifest("sd15/unet") | manifest(f"{name}/motion_adapter")
    shapes = {n: tuple(v.shape) for n, v in unet.diffusers_state_dict().items()}
    assert shapes == {n: shape for n, (shape, _) in published.items()}
    assert len(shapes) == (1253 if version == "v2" else 1226)


# ---------------------------------------------------------------------------------------------------- norms and modes


def other_frames_move(unet: UNetMotionModel) -> bool:
    """Whether one frame's brightness reaches the others where motion modules do nothing: only through the norms."""
    for module in unet.modules():
        if isinstance(module, MotionModule):
            torch.nn.init.zeros_(module.proj_out.weight)
            torch.nn.init.zeros_(module.proj_out.bias)
    x, t, context = inputs()
    y = unet(x, t, context)
    x[:, :, 0] += 1
    moved = (unet(x, t, context) - y).abs().amax((0, 1, 3, 4))
    assert moved[0] > 0.01 and (moved[1:] > 1e-3).all() == (moved[1:] > 1e-12).any()
    return bool(moved[1] > 1e-3)


@pytest.mark.parametrize(
    "version, fields, pooled",
    [
        ("v1", {}, True),
        ("v2", {}, False),
        ("v3", {}, False),
        ("v1", {"resnet_norms": "frame"}, False),
        ("v3", {"resnet_norms": "video"}, True),
        ("v1", {"compat": "diffusers"}, False),
        ("v3", {"compat": "diffusers", "resnet_norms": "video"}, True),
    ],
)
@torch.no_grad()
def test_norms_of_the_image_model(image, make_adapter, version, fields, pooled):
    unet = UNetMotionModel.from_unet2d(image, make_adapter(version, **fields)).double()
    assert other_frames_move(unet) is pooled


@torch.no_grad()
def test_norms_of_the_motion_modules(randomize_):
    """Per frame, a frame's brightness is gone before the attention; over the clip, it is not."""
    module = randomize_(MotionModule(16, 4, 1, 8, 32)).double()
    x = torch.randn(2 * 3, 16, 4, 5).double()
    brighter = x + torch.tensor([0.0, 1.0, 2.0]).double().repeat(2)[:, None, None, None]
    motion = module(x, 3) - x
    close(module(brighter, 3) - brighter, motion)
    module.norm_over_video = True
    assert (module(brighter, 3) - brighter - motion).abs().max() > 0.1


NAMES = [  # (version, name of the folder, resnet_norms, whether a warning says that it is not known)
    ("v1", "anything", "video", False),
    ("v2", "anything", "frame", False),
    ("v3", "anything", "frame", True),
    ("v3", "animatediff-motion-adapter-v1-5", "video", False),
    ("v3", "animatediff-motion-adapter-v1-4", "video", False),
    ("v3", "animatediff-motion-adapter-v1-5-3", "frame", False),
    ("v2", "animatediff-motion-adapter-v1-5", "frame", False),
    ("v3", "animatediff-motion-adapter-v1-56", "frame", True),
]


@pytest.mark.parametrize("version, name, want, warns", NAMES)
def test_version_1_is_known(make_adapter, tmp_path, caplog, monkeypatch, version, name, want, warns):
    folder = tmp_path / name
    make_adapter(version).save_pretrained(folder)
    monkeypatch.chdir(folder)
    for path in (folder, f"{folder}/", "."):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            adapter = MotionAdapter.from_pretrained(path)
        assert adapter.config.resnet_norms == want
        assert [('resnet_norms="video"' in r.message, "\n" in r.message) for r in caplog.records] == warns * [(True, 0)]
    caplog.clear()
    assert MotionAdapter.from_pretrained(folder, resnet_norms="video").config.resnet_norms == "video"
    config = MotionAdapter.from_pretrained(folder, compat="diffusers").config
    assert (config.motion_norms, config.resnet_norms) == ("video", "frame") and not caplog.records


def test_the_name_of_a_pipeline_says_nothing_about_its_adapter(make_adapter, image, tmp_path, caplog):
    whole = tmp_path / "stable-diffusion-v1-5"
    make_adapter("v3").save_pretrained(whole / "motion_adapter")
    assert MotionAdapter.from_pretrained(whole, subfolder="motion_adapter").config.resnet_norms == "frame"
    unet = UNetMotionModel.from_unet2d(image, make_adapter("v3"))
    unet.save_pretrained(whole)
    assert UNetMotionModel.from_pretrained(whole).config.resnet_norms == "frame"
    assert len(caplog.records) == 2


def test_positions_are_counted_in_the_file(make_adapter, tmp_path):
    """A published config may say 32 where the file has 24."""
    make_adapter("v1").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"motion_max_seq_length": 32}))
    adapter = MotionAdapter.from_pretrained(tmp_path)
    assert adapter.config.motion_max_seq_length == 24 and adapter.config.resnet_norms == "video"


def test_explicit_fields_and_modes(image, make_adapter):
    """compat sets what was not passed in code; adapters take along what was passed to them."""
    norms = lambda unet: (unet.config.motion_norms, unet.config.resnet_norms)  # noqa: E731
    adapter = make_adapter("v1", motion_norms="frame")
    unet = UNetMotionModel.from_unet2d(image, adapter)
    assert norms(unet) == ("frame", None) and unet.norm_over_video
    assert norms(unet.set_compat(None)) == ("frame", None) and unet.norm_over_video, "None changes nothing"
    assert norms(unet.set_compat("diffusers")) == ("frame", "frame") and not unet.norm_over_video
    unet.load_motion_modules(make_adapter("v1"))
    assert norms(unet) == ("video", "frame"), "the mode holds for modules that come later"
    assert all(m.norm_over_video for m in unet.modules() if isinstance(m, MotionModule))
    unet = UNetMotionModel.from_unet2d(image, make_adapter("v1"), compat="diffusers")
    assert norms(unet) == ("video", "frame")
    unet = UNetMotionModel.from_unet2d(image, make_adapter("v1", compat="diffusers"))
    assert norms(unet) == ("video", "frame")
    with pytest.raises(ValueError, match="compat must be None or 'diffusers', not 'diffuser'"):
        unet.set_compat("diffuser")


# -------------------------------------------------------------------------------------------------- fields and shapes


@pytest.mark.parametrize(
    "cls, fields, message",
    [
        (MotionAdapter, {"motion_max_length": 16}, "motion_max_length.*nearest: 'motion_max_seq_length'"),
        (MotionAdapter, {"conv_in_channels": 9}, "only conv_in_channels=None"),  # PIA
        (MotionAdapter, {"motion_activation_fn": "gelu"}, "only motion_activation_fn='geglu'"),
        (MotionAdapter, {"motion_norms": "clip"}, "motion_norms must be .*'frame', 'video'.*, not 'clip'"),
        (MotionAdapter, {"motion_num_attention_heads": 5}, "motion_num_attention_heads is the number of heads"),
        (MotionAdapter, {"motion_layers_per_block": (1, 1, 1)}, "motion_layers_per_block must be .* 2 levels"),
        (MotionAdapter, {"motion_transformer_layers_per_block": 0}, "motion_transformer_layers_per_block must be at"),
        (MotionAdapter, {"motion_transformer_layers_per_mid_block": 0}, "layers_per_mid_block must be at least 1"),
        (MotionAdapter, {"motion_norm_num_groups": 0}, "motion_norm_num_groups must be at least 1"),
        (MotionAdapter, {"motion_max_seq_length": 0}, "motion_max_seq_length must be at least 1"),
        (UNetMotionModel, {"attention_head_dim": 8}, "no field 'attention_head_dim'"),
        (UNetMotionModel, {"transformer_layers_per_mid_block": 2}, "transformer_layers_per_mid_block must be"),
        (UNetMotionModel, {"encoder_hid_dim_type": "ip_image_proj"}, "only encoder_hid_dim_type=None"),
        (UNetMotionModel, {"down_block_types": ("DownBlock2D",) * 4}, "must be DownBlockMotion or"),
    ],
)
def test_wrong_fields(cls, fields, message):
    with pytest.raises(ValueError, match=message) as error:
        cls(**{**(MOTION if cls is MotionAdapter else {}), **fields})
    assert "\n" not in str(error.value)


def test_published_fields_with_one_value_are_accepted():
    assert MotionAdapter(**MOTION, **MotionAdapterConfig.FIXED).config == MotionAdapterConfig(**MOTION)


@pytest.mark.parametrize(
    "x, t, context, message",
    [
        ((2, 4, 5, 3), 1, (2, 7, 12), r"x must be \(batch, 4 channels, frames, height, width\), not \(2, 4, 5, 3\)"),
        ((2, 4, 33, 5, 3), 1, (2, 7, 12), "x has 33 frames, but the motion modules have only 32 positions"),
        ((2, 4, 3, 5, 3), 1, (2, 2, 7, 12), r"\(batch 2, frames 3, tokens, width 12\) .*not \(2, 2, 7, 12\)"),
        ((2, 4, 3, 5, 3), 1, (6, 7, 12), r"context must be .* not \(6, 7, 12\)"),
    ],
)
def test_wrong_shapes(unet, x, t, context, message):
    with pytest.raises(ValueError, match=message) as error:
        unet(torch.zeros(x).double(), t, torch.zeros(context).double())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("version", ["v1", "v2"])
@torch.no_grad()
def test_what_must_not_change_the_output(image, make_adapter, version):
    """The other video of a batch, text given per frame, feed-forwards in pieces, the input's memory layout."""
    unet = UNetMotionModel.from_unet2d(image, make_adapter(version)).double()
    x, t, context = inputs()
    want = unet(x, t, context)
    for i in range(2):
        close(unet(x[i : i + 1], t[i : i + 1], context[i : i + 1]), want[i : i + 1])
    close(unet(x, t, context[:, None].expand(-1, 3, -1, -1)), want)
    close(unet(x.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3), t, context), want)
    for size, dim in ((2, 0), (4, 1)):
        unet.enable_forward_chunking(size, dim)
        close(unet(x, t, context), want)
    unet.disable_forward_chunking()
    assert torch.equal(unet(x, t, context), want)


@torch.no_grad()
def test_one_frame_and_as_many_as_there_are_positions(unet):
    for f in (1, 32):
        x, t, context = inputs(b=1, f=f, h=2, w=1)
        assert unet(x, t, context).isfinite().all()


@torch.no_grad()
def test_text_of_one_frame(image):
    """With motion that does nothing, the text of a frame moves that frame alone."""
    unet = UNetMotionModel.from_unet2d(image.double())
    x, t, context = inputs()
    context = context[:, None].repeat(1, 3, 1, 1)
    want = unet(x, t, context)
    context[1, 2] += 1
    moved = (unet(x, t, context) - want).abs().amax((1, 3, 4)) > 1e-6
    assert moved.tolist() == [[False] * 3, [False, False, True]]


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_training_behind_a_frozen_image_model(image, make_adapter, version):
    """Gradients reach the motion modules alone, and are the same under checkpointing, as are those without freezing."""
    unet = UNetMotionModel.from_unet2d(image, make_adapter(version)).double().train()
    x, t, context = inputs()

    def gradients():
        unet.zero_grad()
        unet(x, t, context).square().sum().backward()
        return {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}

    every = gradients()
    assert len(every) == len(list(unet.parameters()))
    unet.freeze_unet2d_params()
    motion = gradients()
    adapter = unet.motion_adapter()
    assert len(motion) == len(list(adapter.parameters())) and all(".motion." in name for name in motion)
    unet.enable_gradient_checkpointing()
    again = gradients()
    assert motion.keys() == again.keys()
    for name, value in motion.items():
        torch.testing.assert_close(value, every[name], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(value, again[name], rtol=1e-9, atol=1e-11)
    unet.requires_grad_(False)
    assert not unet(x, t, context).requires_grad
