"""IP-Adapter and its image encoder against diffusers and transformers: every parameter random, 1e-5 on layers, 1e-4 on
frames, for each kind of adapter, several of them, several pictures, masks, scales of blocks."""

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.image_processor import IPAdapterMaskProcessor as TheirMasks
from PIL import Image

from minit2v import (
    AnimateDiffPipeline,
    AnimateDiffVideoToVideoPipeline,
    CLIPVisionModelWithProjection,
    DDIMScheduler,
    IPAdapterMaskProcessor,
    MotionAdapter,
)
from minit2v.adapters import ip_adapter

CALL = dict(prompt="a cat", negative_prompt="dog!", num_inference_steps=1, num_frames=3, height=16, width=24,
            guidance_scale=4.0, output_type="np")  # fmt: skip
KINDS = ("base", "plus", "full-face")
# One step from pure noise gives the network's prediction itself, decoded.
SCHEDULE = dict(beta_schedule="linear", clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction")


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_ip_adapter):
    folder = tmp_path_factory.mktemp("ip")
    for seed, kind in enumerate(KINDS):
        make_ip_adapter(folder / "models", kind, seed)
    return folder


@pytest.fixture(scope="module")
def pipes(tmp_path_factory, make_official_folder, make_adapter_folder):
    folder = tmp_path_factory.mktemp("base")
    base = make_official_folder(folder / "sd15", repo="sd15", small=True, unet=dict(layers_per_block=1))
    adapter = make_adapter_folder(folder, "v1-5-2", motion_layers_per_block=1)
    ours = AnimateDiffPipeline.from_pretrained(
        base, motion_adapter=MotionAdapter.from_pretrained(adapter), compat="diffusers"
    )
    theirs = diffusers.AnimateDiffPipeline.from_pretrained(
        base, motion_adapter=diffusers.MotionAdapter.from_pretrained(adapter), feature_extractor=None
    )
    ours.scheduler = DDIMScheduler(**SCHEDULE)
    theirs.scheduler = diffusers.DDIMScheduler(**SCHEDULE)
    return quiet(ours), quiet(theirs)


def load(pipes, folder, *kinds):
    for pipe in pipes:
        pipe.unload_ip_adapter() if getattr(pipe, "image_encoder", None) is not None else None
        names = [f"ip-adapter-{kind}_sd15.safetensors" for kind in kinds]
        pipe.load_ip_adapter(str(folder), subfolder="models", weight_name=names if len(names) > 1 else names[0])
        pipe.set_ip_adapter_scale([0.7] * len(names))
    return pipes


def picture(seed=0, width=40, height=33):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def assert_same(pipes, other=None, **call):
    ours, theirs = (p(**CALL | call, generator=torch.Generator().manual_seed(0)).frames for p in pipes)
    assert 0.02 < ((ours > 0.001) & (ours < 0.999)).mean()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    if other is not None:
        assert np.abs(ours - other).max() > 1e-2  # and it made a difference
    return ours


@pytest.fixture(scope="module")
def plain(pipes):
    """The frames without pictures."""
    for pipe in pipes:
        pipe.unload_ip_adapter()
    return assert_same(pipes)


# Layers -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["gelu", "quick_gelu"])
def encoders(request, tmp_path_factory, randomize_):
    folder = tmp_path_factory.mktemp("encoder")
    config = transformers.CLIPVisionConfig(
        hidden_size=24, intermediate_size=44, num_hidden_layers=4, num_attention_heads=3, image_size=30, patch_size=7,
        projection_dim=14, layer_norm_eps=3e-4, hidden_act=request.param,
    )  # fmt: skip
    peer = randomize_(transformers.CLIPVisionModelWithProjection(config).double().eval(), 3)
    with torch.no_grad():
        for p in peer.parameters():
            p *= 2
    peer.save_pretrained(folder)
    return CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.float64), peer


@torch.no_grad()
def test_the_image_encoder(encoders):
    ours, peer = encoders
    x = torch.randn(3, 3, 30, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        out = peer.to(dtype)(x.to(dtype), output_hidden_states=True)
        for a, b in ((ours.to(dtype)(x.to(dtype)), out.image_embeds),
                     (ours.penultimate(x.to(dtype)), out.hidden_states[-2])):  # fmt: skip
            assert (a - b).abs().max() < bound * b.abs().max()
    ours.double(), peer.double()


@torch.no_grad()
def test_what_we_save_of_an_encoder_loads_there(encoders, tmp_path):
    ours, peer = encoders
    ours.save_pretrained(tmp_path)
    again = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), peer.state_dict().values(), strict=True))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK"])
@pytest.mark.parametrize("size", [(37, 51), (51, 37), (30, 30), (9, 13), (224, 300), (29, 31)])
def test_pictures_are_prepared_to_the_bit(encoders, size, mode):
    ours, _ = encoders
    image = picture(1, *size).convert(mode)
    theirs = transformers.CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
    want = theirs(image, return_tensors="pt").pixel_values[0]
    assert torch.equal(ours.pixels(image), want)
    if mode in ("RGB", "L"):
        assert torch.equal(ours.pixels(np.asarray(image)), want)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_projections(pipes, folder, kind):
    ours, theirs = load(pipes, folder, kind)
    (mine,), (peer,) = ours.unet.image_projections, theirs.unet.encoder_hid_proj.image_projection_layers
    x = torch.randn(3, *([] if kind == "base" else [17]), mine.features, generator=torch.Generator().manual_seed(2))
    a, b = mine(x), peer(x)
    assert a.shape == b.shape == (3, {"base": 4, "plus": 5, "full-face": 17}[kind], 24)
    assert (a - b).abs().max() < 1e-5 * b.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_attention(pipes, folder, masked):
    """One layer: texts of two videos of three frames, two adapters, the first with two pictures."""
    ours, theirs = load(pipes, folder, "base", "plus")
    for pipe in pipes:
        pipe.set_ip_adapter_scale([0.6, -0.3])
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    mine, peer = ours.unet.down[0].blocks[0].spatial.block.attn2, theirs.unet.get_submodule(name)
    g = torch.Generator().manual_seed(3)
    x, text = torch.randn(6, 24, 32, generator=g), torch.randn(2, 7, 24, generator=g)
    tokens = [torch.randn(2, 2, 4, 24, generator=g), torch.randn(2, 1, 5, 24, generator=g)]
    masks = [torch.rand(1, 2, 4, 6, generator=g), torch.rand(1, 1, 4, 6, generator=g)] if masked else None
    prompt = ip_adapter.Prompt(text, tokens, masks and [{24: m[0].flatten(1)} for m in masks]).flat(text, 2, 3, 24)
    a = mine(x.reshape(2, 72, 32), prompt).reshape(6, 24, 32)
    extra = {"ip_adapter_masks": masks} if masked else {}
    repeated = [t.repeat_interleave(3, 0) for t in tokens]
    b = peer(x, (text.repeat_interleave(3, 0), repeated), **extra)
    assert (a - b).abs().max() < 1e-5 * b.abs().max()


# Frames -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind(pipes, folder, plain, kind, guidance_scale):
    load(pipes, folder, kind)
    assert_same(pipes, plain, ip_adapter_image=picture(), guidance_scale=guidance_scale)


@pytest.mark.parametrize("kind", KINDS)
def test_several_pictures(pipes, folder, plain, kind):
    load(pipes, folder, kind)
    one = assert_same(pipes, plain, ip_adapter_image=[picture()])
    assert_same(pipes, one, ip_adapter_image=[[picture(), picture(1, 30, 60)]])


def test_several_adapters(pipes, folder, plain):
    load(pipes, folder, *KINDS)
    for pipe in pipes:
        pipe.set_ip_adapter_scale([0.5, 0.0, -0.4])
    assert_same(pipes, plain, ip_adapter_image=[picture(), [picture(1), picture(2)], picture(3)])


@pytest.mark.parametrize("scale", [
    {"up": {"block_1": [0.0, 1.0]}},
    {"down": 0.3, "mid": 0.9},
    {"down": {"block_0": [0.5]}, "mid": 1.5, "up": 0.2},
    {"mid": 0.0},
])  # fmt: skip
def test_scales_of_blocks(pipes, folder, plain, scale):
    load(pipes, folder, "base")
    for pipe in pipes:
        pipe.set_ip_adapter_scale(scale)
    assert_same(pipes, None if scale == {"mid": 0.0} else plain, ip_adapter_image=picture())


@pytest.mark.parametrize("scale", [[[0.7, 0.4]], [0.5], [{"up": [[0.7, 0.2]]}]])
def test_masks(pipes, folder, plain, scale):
    load(pipes, folder, "plus")
    halves = np.zeros((2, 32, 48), dtype=np.uint8)
    halves[0, :, :20], halves[1, 9:, 20:] = 255, 200
    halves = [Image.fromarray(x) for x in halves]
    masks = [p().preprocess(halves, height=16, width=24) for p in (IPAdapterMaskProcessor, TheirMasks)]
    assert torch.equal(*masks)
    masks = [masks[0].reshape(1, 2, 16, 24)]
    for pipe in pipes:
        pipe.set_ip_adapter_scale(scale)
    pictures = [[picture(), picture(1)]]
    without = pipes[0](**CALL, generator=torch.Generator().manual_seed(0)).frames if scale == [0.5] else None
    if without is not None:
        assert np.array_equal(without, plain)
    assert_same(pipes, plain, ip_adapter_image=pictures, cross_attention_kwargs={"ip_adapter_masks": masks})


def test_masks_of_two_adapters_in_the_old_form(pipes, folder, plain):
    load(pipes, folder, "base", "full-face")
    masks = torch.zeros(2, 1, 16, 24)
    masks[0, :, :8], masks[1, :, 8:] = 1, 0.5
    for form in (masks, list(masks[:, None])):
        assert_same(pipes, plain, ip_adapter_image=[picture(), picture(1)],
                    cross_attention_kwargs={"ip_adapter_masks": form})  # fmt: skip


@pytest.mark.filterwarnings("ignore:The aspect ratio of the mask")
@pytest.mark.parametrize("size", [(16, 16), (8, 40)])
def test_masks_of_other_ratios_as_diffusers_scatters_them(pipes, folder, plain, size):
    load(pipes, folder, "base")
    mask = torch.linspace(0, 1, size[0] * size[1]).reshape(1, 1, *size)
    frames = assert_same(pipes, plain, ip_adapter_image=picture(), cross_attention_kwargs={"ip_adapter_masks": [mask]})
    ours = quiet(AnimateDiffPipeline.from_pipe(pipes[0], compat=None, mask_grid="exact"))
    exact = ours(**CALL, ip_adapter_image=picture(), cross_attention_kwargs={"ip_adapter_masks": [mask]},
                 generator=torch.Generator().manual_seed(0)).frames  # fmt: skip
    assert np.abs(exact - frames).max() > 1e-3


@pytest.mark.parametrize("kind", ["base", "plus"])
@pytest.mark.parametrize("guided", [True, False])
def test_embeds(pipes, folder, kind, guided):
    ours, theirs = load(pipes, folder, kind)
    call = dict(guidance_scale=4.0 if guided else 1.0)
    want = assert_same(pipes, ip_adapter_image=[[picture(), picture(1)]], **call)
    made = [p.prepare_ip_adapter_image_embeds([[picture(), picture(1)]], None, "cpu", 1, guided) for p in pipes]
    for a, b in zip(*made, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() < 1e-5 * b.abs().max()
    assert_same(pipes, ip_adapter_image_embeds=made[1], **call)
    again = ours(**CALL | call, ip_adapter_image_embeds=made[0], generator=torch.Generator().manual_seed(0)).frames
    assert np.array_equal(again, want)


def test_a_batch_of_prompts(pipes, folder, plain):
    load(pipes, folder, "plus")
    call = dict(prompt=["a cat", "dog"], negative_prompt=["dog", "cat!"])
    assert_same(pipes, plain, ip_adapter_image=picture(), **call)


def test_prepared_pixels(pipes, folder, plain):
    load(pipes, folder, "base")
    pixels = torch.stack([pipes[0].image_encoder.pixels(picture(seed)) for seed in (0, 1)])
    want = assert_same(pipes, plain, ip_adapter_image=[[picture(0), picture(1)]])
    assert np.array_equal(assert_same(pipes, plain, ip_adapter_image=pixels), want)


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_video_to_video(pipes, folder, kind):
    load(pipes, folder, kind)
    v2v = (quiet(AnimateDiffVideoToVideoPipeline.from_pipe(pipes[0])),
           quiet(diffusers.AnimateDiffVideoToVideoPipeline(**pipes[1].components)))  # fmt: skip
    video = [picture(seed, 24, 16) for seed in range(3)]
    call = {name: value for name, value in CALL.items() if name != "num_frames"} | dict(video=video, strength=1.0)
    ours, theirs = (p(**call, ip_adapter_image=picture(), generator=torch.Generator().manual_seed(0)).frames
                    for p in v2v)  # fmt: skip
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    without = v2v[0](**call, generator=torch.Generator().manual_seed(0)).frames
    assert np.abs(ours - without).max() > 1e-2


def test_free_init_and_free_u(pipes, folder, plain):
    load(pipes, folder, "base")
    for pipe in pipes:
        pipe.enable_free_init(num_iters=2)
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    try:
        assert_same(pipes, plain, ip_adapter_image=picture())
    finally:
        for pipe in pipes:
            pipe.disable_free_init()
            pipe.disable_freeu()


def test_what_the_reference_saved_with_an_adapter_in_it_is_refused(pipes, folder, tmp_path):
    _, theirs = load(pipes, folder, "base")
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit UNetMotionModel: 12 unknown .*to_k_ip") as error:
        AnimateDiffPipeline.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    for pipe in pipes:
        pipe.unload_ip_adapter()
    theirs.save_pretrained(tmp_path / "without")
    AnimateDiffPipeline.from_pretrained(tmp_path / "without")


def test_after_unloading(pipes, folder, plain):
    load(pipes, folder, "base")
    for pipe in pipes:
        pipe.unload_ip_adapter()
    assert np.array_equal(assert_same(pipes), plain)
