"""AnimateDiff's pipelines by themselves: what they take, give, refuse, load and leave alone."""

import inspect
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from minit2v import (
    AnimateDiffPipeline,
    AnimateDiffVideoToVideoPipeline,
    AutoencoderKL,
    CLIPVisionModelWithProjection,
    DiffusionPipeline,
    MotionAdapter,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetMotionModel,
    VideoToVideoSDPipeline,
)
from minit2v.pipelines import AnimateDiffPipelineOutput
from minit2v.schedulers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)

FAST = dict(num_frames=3, num_inference_steps=2, height=16, width=24, output_type="np")
AGAIN = dict(num_inference_steps=4, height=16, width=24, output_type="np")  # of a video
DDIM = dict(beta_schedule="linear", clip_sample=False, steps_offset=1)


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return generators if len(generators) > 1 else generators[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory, make_official_folder):
    return make_official_folder(tmp_path_factory.mktemp("base") / "sd15", repo="sd15", small=True)


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory, make_adapter_folder):
    """Version 1: 24 positions."""
    return make_adapter_folder(tmp_path_factory.mktemp("adapter"), "v1-5")


@pytest.fixture
def adapter(adapter_folder):
    return MotionAdapter.from_pretrained(adapter_folder)


@pytest.fixture
def pipe(base, adapter):
    pipe = AnimateDiffPipeline.from_pretrained(base, motion_adapter=adapter, scheduler=DDIMScheduler(**DDIM))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def v2v(pipe):
    return AnimateDiffVideoToVideoPipeline.from_pipe(pipe)


@pytest.fixture(scope="module")
def clip():
    """3 frames of 16 x 24, as (f h w 3) bytes."""
    return np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)


def assert_close(got, want):
    """Latents of random networks: rounding grows on the way, in a batch otherwise than alone."""
    torch.testing.assert_close(got, want, rtol=0, atol=2e-4 * want.abs().max().item())


def at_work(pipe):
    """Whatever computes fails the test."""
    for part in (pipe.unet, pipe.vae.encoder, pipe.vae.decoder, pipe.text_encoder):
        part.register_forward_pre_hook(lambda m, args: pytest.fail(f"{type(m).__name__} ran"))


def calls_of(network):
    """The positional arguments of every call that will be made of it."""
    calls = []
    network.register_forward_pre_hook(lambda m, args: calls.append(args))
    return calls


# What comes out ---------------------------------------------------------------------------------------------------


def test_defaults_of_the_reference():
    t2v = {n: p.default for n, p in inspect.signature(AnimateDiffPipeline.__call__).parameters.items()}
    assert list(t2v)[1:23] == [
        "prompt", "num_frames", "height", "width", "num_inference_steps", "guidance_scale", "negative_prompt",
        "num_videos_per_prompt", "eta", "generator", "latents", "prompt_embeds", "negative_prompt_embeds",
        "ip_adapter_image", "ip_adapter_image_embeds", "output_type", "return_dict", "cross_attention_kwargs",
        "clip_skip", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "decode_chunk_size",
    ]  # fmt: skip
    v2v = {n: p.default for n, p in inspect.signature(AnimateDiffVideoToVideoPipeline.__call__).parameters.items()}
    assert list(v2v)[1:13] == [
        "video", "prompt", "height", "width", "num_inference_steps", "enforce_inference_steps", "timesteps", "sigmas",
        "guidance_scale", "strength", "negative_prompt", "num_videos_per_prompt",
    ]  # fmt: skip
    ours = ("timesteps", "sigmas")  # by keyword alone, where the reference has none
    assert list(v2v)[13:] == [name for name in list(t2v)[9:] if name not in ours]
    assert t2v["num_frames"] == 16 and v2v["strength"] == 0.8 and v2v["enforce_inference_steps"] is False
    for call in (t2v, v2v):
        assert (call["num_inference_steps"], call["guidance_scale"], call["decode_chunk_size"]) == (50, 7.5, 16)
        assert (call["output_type"], call["num_videos_per_prompt"], call["eta"]) == ("pil", 1, 0.0)


def test_output_types(pipe):
    out = {kind: pipe("a cat", **FAST | {"output_type": kind}, generator=seeded(0)).frames
           for kind in ("np", "pt", "pil", "latent")}
    assert out["np"].shape == (1, 3, 16, 24, 3) and out["np"].dtype == np.float32
    assert np.array_equal(out["pt"].permute(0, 1, 3, 4, 2).numpy(), out["np"])
    assert np.array_equal(np.asarray(out["pil"][0][2]), (out["np"][0, 2] * 255).round().astype(np.uint8))
    assert out["latent"].shape == (1, 4, 3, 8, 12)
    result = pipe("a cat", num_frames=1, num_inference_steps=1, generator=seeded(0))
    assert type(result) is AnimateDiffPipelineOutput
    assert result.frames[0][0].size == (16, 16)  # the UNet's own size, as images
    (frames,) = pipe("a cat", **FAST, generator=seeded(0), return_dict=False)
    assert np.array_equal(frames, out["np"])


def test_several_videos_per_prompt(pipe):
    """Those of one prompt one after the other, each as if it were alone."""
    call = FAST | dict(output_type="latent", eta=1.0)
    got = pipe(["a cat", "a dog"], **call, num_videos_per_prompt=2, generator=seeded(1, 2, 3, 4)).frames
    for row, (prompt, seed) in enumerate((("a cat", 1), ("a cat", 2), ("a dog", 3), ("a dog", 4))):
        if row in (1, 2):
            alone = pipe(prompt, **call, generator=seeded(seed)).frames[0]
            assert_close(got[row], alone)
    assert len({x.sum().item() for x in got}) == 4
    latents = torch.randn(2, 4, 3, 8, 12, generator=seeded(0))
    assert pipe("a cat", **FAST, num_videos_per_prompt=2, latents=latents).frames.shape == (2, 3, 16, 24, 3)


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler])
def test_a_video_does_not_depend_on_its_batch(pipe, v2v, clip, scheduler):
    """Also where the solver draws noise in its steps, and where the VAE draws latents of a video."""
    sde = dict(algorithm_type="sde-dpmsolver++") if scheduler is DPMSolverMultistepScheduler else {}
    pipe.scheduler = v2v.scheduler = scheduler(beta_schedule="linear", **sde)
    call = FAST | dict(output_type="latent", negative_prompt="ugly")
    alone = pipe("a cat", **call, generator=seeded(7)).frames
    both = pipe(["a dog", "a cat"], **call, generator=seeded(8, 7)).frames
    assert_close(both[1:], alone)

    call = AGAIN | dict(output_type="latent", negative_prompt="ugly", strength=0.5)
    other = clip[::-1].copy()
    alone = [v2v(v, p, **call, generator=seeded(s)).frames for v, p, s in ((clip, "a cat", 7), (other, "a dog", 8))]
    both = v2v(np.stack([other, clip]), ["a dog", "a cat"], **call, generator=seeded(8, 7)).frames
    assert_close(both, torch.cat(alone[::-1]))


def test_one_serves_many(v2v, clip):
    call = AGAIN | dict(output_type="latent", num_inference_steps=2)
    videos = [clip, clip[::-1].copy()]
    want = torch.cat([v2v(clip, p, **call, generator=seeded(s)).frames for p, s in (("a cat", 1), ("a dog", 2))])
    got = v2v(clip, ["a cat", "a dog"], **call, generator=seeded(1, 2)).frames
    assert_close(got, want)
    got = v2v(videos, "a cat", **call, num_videos_per_prompt=2, generator=seeded(1, 2, 3, 4)).frames
    assert_close(got[:1], want[:1])
    want = v2v(videos[1], "a cat", **call, generator=seeded(3)).frames
    assert_close(got[2:3], want)
    noisy = torch.randn(2, 4, 3, 8, 12, generator=seeded(0))  # one for each result
    assert len(v2v(prompt="a cat", latents=noisy, **AGAIN, num_videos_per_prompt=2).frames) == 2
    with pytest.raises(ValueError, match="2 videos for 3 prompts"):
        v2v(videos, ["a", "b", "c"], **call)


def test_decode_in_chunks(pipe, v2v, clip):
    sizes = [calls_of(half) for half in (pipe.vae.encoder, pipe.vae.decoder)]
    whole = v2v(clip, "a cat", **AGAIN, generator=seeded(0)).frames
    parts = v2v(clip, "a cat", **AGAIN, generator=seeded(0), decode_chunk_size=2).frames
    assert [[len(args[0]) for args in calls] for calls in sizes] == [[3, 2, 1]] * 2
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    pipe("a cat", **FAST | dict(num_frames=17, num_inference_steps=1))
    assert [len(args[0]) for args in sizes[1]][3:] == [16, 1]


# Callbacks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler])
def test_callbacks(pipe, v2v, clip, scheduler):
    """Both forms, once for every step and with its number, whatever they return."""
    pipe.scheduler = v2v.scheduler = scheduler(**DDIM if scheduler is DDIMScheduler else {"skip_prk_steps": True})
    old, new = [], []
    heard = dict(callback=lambda i, t, x: old.append((i, x.shape)),
                 callback_on_step_end=lambda p, i, t, tensors: new.append((i, sorted(tensors))))
    pipe("a cat", **FAST | {"num_inference_steps": 3}, **heard)
    assert old == [(i, (1, 4, 3, 8, 12)) for i in range(3)]
    assert new == [(i, ["latents"]) for i in range(3)]
    old.clear()
    v2v(clip, "a cat", **AGAIN, strength=0.75, **heard, callback_steps=2)
    assert [i for i, _ in old] == [0, 2]


def test_callback_replaces_tensors(pipe):
    def turn(pipe, step, t, tensors):
        return {"latents": torch.zeros_like(tensors["latents"]), "negative_prompt_embeds": tensors["prompt_embeds"]}

    seen = calls_of(pipe.unet)
    pipe("a cat", **FAST, callback_on_step_end=turn,
         callback_on_step_end_tensor_inputs=["latents", "prompt_embeds", "negative_prompt_embeds"])
    (_, _, before), (x, _, after) = seen
    assert not torch.equal(before[0], before[1]) and torch.equal(after[0], after[1])
    assert x.abs().max() == 0


# Strength and grids ------------------------------------------------------------------------------------------------


def test_strength(v2v, clip):
    seen = calls_of(v2v.unet)

    def run(strength, **kw):
        seen.clear()
        out = v2v(clip, "a cat", **AGAIN | {"num_inference_steps": 10}, strength=strength, generator=seeded(0), **kw)
        return out.frames, len(seen)

    assert [run(s)[1] for s in (1.0, 0.55, 0.1)] == [10, 5, 1]
    decoded = [run(0.0), run(0.09), run(0.0, enforce_inference_steps=True)]
    assert [steps for _, steps in decoded] == [0, 0, 0]
    z = v2v.vae.encode(torch.from_numpy(clip).permute(0, 3, 1, 2) / 127.5 - 1).sample(seeded(0))
    want = (v2v.vae.decode(z) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).detach().numpy()
    for frames, _ in decoded:
        np.testing.assert_allclose(frames[0], want, atol=1e-5)


class TwoCalls(DDIMScheduler):
    """A solver of second order, as Heun's: it asks at both ends of every step but the last. Its step goes nowhere."""

    order = 2

    def set_timesteps(self, *args, **kw):
        super().set_timesteps(*args, **kw)
        self.timesteps = torch.cat([self.timesteps[:1], self.timesteps[1:].repeat_interleave(2)])

    def step(self, model_output, timestep, sample, **kw):
        return super().step(model_output, timestep, sample, **kw) if self.timesteps is None else _Same(sample)


class _Same:
    def __init__(self, x):
        self.prev_sample = x


@pytest.mark.parametrize(
    ("scheduler", "config"),
    [(DDIMScheduler, DDIM), (TwoCalls, DDIM), (EulerDiscreteScheduler, {}), (PNDMScheduler, dict(skip_prk_steps=True))],
)
def test_enforced_steps(v2v, clip, scheduler, config):
    """Half of a grid of eight steps: the last four, and all of them, with the noise of the first of these."""
    v2v.scheduler = scheduler(**config)
    seen = calls_of(v2v.unet)
    x0 = torch.zeros(1, 4, 3, 8, 12)
    v2v(prompt="a cat", latents=x0, **AGAIN, strength=0.5, enforce_inference_steps=True, guidance_scale=1.0,
        generator=seeded(0))
    fresh = scheduler(**config)
    fresh.set_timesteps(8)
    grid = list(dict.fromkeys(fresh.timesteps.tolist()))  # without repetitions
    times = [float(args[1]) for args in seen]
    assert list(dict.fromkeys(times)) == grid[4:]
    assert len(times) == (7 if scheduler is TwoCalls else 4)
    sigma = 1 - fresh.alphas_cumprod[int(times[0])].item()
    assert seen[0][0].var().item() == pytest.approx(sigma, rel=0.15)
    if scheduler is PNDMScheduler:  # all of a grid begins at its start, with what PNDM does there
        seen.clear()
        v2v(prompt="a cat", latents=x0, **AGAIN, strength=1.0, enforce_inference_steps=True)
        assert len(seen) == 5


def test_enforced_steps_that_no_grid_has(v2v, clip):
    at_work(v2v)
    for strength in (1e-3, 5e-324):
        with pytest.raises(ValueError, match=r"4 steps cannot be the last .* of at most 1000: raise strength"):
            v2v(clip, "a cat", **AGAIN, strength=strength, enforce_inference_steps=True)


def test_a_grid_of_the_callers_own(v2v, clip):
    seen = calls_of(v2v.unet)
    v2v.scheduler = EulerDiscreteScheduler()
    v2v(clip, "a cat", **AGAIN, timesteps=[900, 600, 300, 100, 7], strength=0.6)
    assert [int(args[1]) for args in seen] == [300, 100, 7]
    seen.clear()
    v2v(clip, "a cat", **AGAIN, timesteps=[900, 600, 300, 100, 7], strength=0.6, enforce_inference_steps=True)
    assert [int(args[1]) for args in seen] == [600, 300, 100, 7]
    v2v(clip, "a cat", **AGAIN, sigmas=[10.0, 3.0, 1.0, 0.0], strength=1.0)
    assert v2v.scheduler.sigmas.tolist() == [10, 3, 1, 0]
    at_work(v2v)
    with pytest.raises(ValueError, match="timesteps and sigmas exclude each other"):
        v2v(clip, "a cat", **AGAIN, timesteps=[9, 8], sigmas=[2.0, 0.0])
    v2v.scheduler = DDIMScheduler(**DDIM)
    with pytest.raises(ValueError, match="DDIMScheduler does not support sigmas"):
        v2v(clip, "a cat", **AGAIN, sigmas=[2.0, 0.0])


def test_latents_in_place_of_a_video(v2v):
    seen = calls_of(v2v.unet)
    noisy = torch.randn(1, 4, 3, 8, 12, generator=seeded(0))
    call = AGAIN | dict(prompt="a cat", guidance_scale=1.0, strength=0.5)
    v2v(latents=noisy, **call)
    assert torch.equal(seen[0][0], noisy)  # as they are
    v2v(latents=noisy, **call, enforce_inference_steps=True, generator=seeded(1))
    assert (seen[2][0] - noisy).abs().mean() > 0.1  # with noise on top
    size = dict(num_inference_steps=1, output_type="latent", strength=0)
    assert v2v(noisy[0].transpose(0, 1), "a cat", **size).frames.shape == noisy.shape  # clean ones, as a video
    with pytest.raises(ValueError, match=r"latents must be .*\(b, 4, f, 8, 16\)"):
        v2v(latents=noisy, **call | dict(width=32))
    with pytest.raises(ValueError, match="not both"):
        v2v(torch.zeros(3, 3, 16, 24), latents=noisy, **call)


def test_half_precision_encodes_in_float32(v2v, clip):
    """force_upcast, which the config of every published VAE says or leaves at its default."""
    v2v.to(torch.bfloat16)
    seen, unet = calls_of(v2v.vae.encoder), calls_of(v2v.unet)
    v2v(clip, "a cat", **AGAIN, strength=0.25)
    assert seen[0][0].dtype == torch.float32 and unet[0][0].dtype == v2v.vae.dtype == torch.bfloat16
    v2v.vae = AutoencoderKL(v2v.vae.config, force_upcast=False).to(torch.bfloat16)
    seen = calls_of(v2v.vae.encoder)
    v2v(clip, "a cat", **AGAIN, strength=0)
    assert seen[0][0].dtype == torch.bfloat16


# Sizes -------------------------------------------------------------------------------------------------------------


def test_a_video_is_brought_to_size(v2v, base, adapter, clip):
    """The UNet's own where none is given; arrays bicubic, or as the reference by the nearest pixel."""
    call = dict(prompt="a cat", strength=0, output_type="np", generator=seeded(0))
    assert v2v(clip, **call).frames.shape == (1, 3, 16, 16, 3)
    assert v2v([Image.fromarray(f) for f in clip], **call, height=24).frames.shape == (1, 3, 24, 16, 3)
    seen = calls_of(v2v.vae.encoder)
    v2v(clip, **call, height=8, width=12)
    assert v2v.array_resize == "bicubic" and not set(seen[-1][0].unique().tolist()) <= pixels(clip)
    picked = AnimateDiffVideoToVideoPipeline.from_pipe(v2v, compat="diffusers")
    picked(clip, **call, height=8, width=12)
    assert picked.array_resize == "nearest" and set(seen[-1][0].unique().tolist()) <= pixels(clip)
    with pytest.raises(ValueError, match="array_resize must be one of .'bicubic', 'nearest'., not 'cubic'"):
        AnimateDiffVideoToVideoPipeline.from_pipe(v2v, array_resize="cubic")


def pixels(clip):
    return set((torch.from_numpy(clip).float() / 255 * 2 - 1).unique().tolist())


def test_a_unet_without_a_size(pipe, base, adapter):
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", sample_size=None)
    pipe = AnimateDiffPipeline(**pipe.components | {"unet": unet})
    with pytest.raises(ValueError, match="give height and width"):
        pipe("a cat", height=16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a cat", **FAST).frames.shape == (1, 3, 16, 24, 3)


# Refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (dict(num_frame=8), TypeError, "'num_frame'.*'num_frames'"),
        (dict(motion_scale=1), TypeError, "AnimateDiffPipeline has no argument 'motion_scale'"),
        (dict(video=[1]), TypeError, r"AnimateDiffVideoToVideoPipeline.from_pipe\(pipe\)"),
        (dict(num_frames=25), ValueError, "25 frames are too many: the motion adapter has positions for 24"),
        (dict(num_frames=0), ValueError, "num_frames"),
        (dict(num_videos_per_prompt=0), ValueError, "num_videos_per_prompt must be a positive integer"),
        (dict(num_videos_per_prompt=2, generator=[torch.Generator()] * 3), ValueError, "3 generators for 2 videos"),
        (dict(num_videos_per_prompt=2, latents=torch.zeros(1, 4, 3, 8, 12)), ValueError, r"latents must .*\(2, 4, 3"),
        (dict(prompt={0: "a cat", 8: "a dog"}), ValueError, "prompt: there is no frame 8, only 0 to 2"),
        (dict(ip_adapter_image=Image.new("RGB", (8, 8))), ValueError, "there is no IP-Adapter"),
        (dict(ip_adapter_image_embeds=[torch.zeros(1)]), ValueError, "there is no IP-Adapter"),
        (dict(cross_attention_kwargs={"scale": 0.5}), ValueError, "cross_attention_kwargs"),
        (dict(height=17), ValueError, "height must be a multiple of 2, not 17"),
        (dict(eta=2), ValueError, "eta must be in"),
        (dict(decode_chunk_size=0), ValueError, "decode_chunk_size"),
        (dict(callback_steps=0), ValueError, "callback_steps"),
        (dict(output_type="gif"), ValueError, "output_type"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_one_clear_line_before_any_work(pipe, call, error, says):
    at_work(pipe)
    with pytest.raises(error, match=says) as info:
        pipe(**{"prompt": "a cat", **FAST, **call})
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (dict(video=np.zeros((25, 16, 24, 3))), ValueError, "25 frames are too many"),
        (dict(video=None, latents=torch.zeros(1, 4, 25, 8, 12)), ValueError, "25 frames are too many"),
        (dict(num_frames=8), TypeError, "the video has its number of frames"),
        (dict(strenght=0.5), TypeError, "'strenght'.*'strength'"),
        (dict(strength=1.1), ValueError, "strength must be in"),
        (dict(strength=float("nan")), ValueError, "strength"),
        (dict(video=None), ValueError, "give a video, or noisy latents"),
        (dict(prompt={0: "a cat", 99: "a dog"}), ValueError, "prompt: there is no frame 99, only"),
        (dict(width=25), ValueError, "width must be a multiple of 2"),
        (dict(num_videos_per_prompt=2, generator=[torch.Generator()] * 3), ValueError, "3 generators for 2 videos"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_refused_v2v_calls(v2v, clip, call, error, says):
    at_work(v2v)
    with pytest.raises(error, match=says):
        v2v(**{"video": clip, "prompt": "a cat", **AGAIN, **call})


# Components ------------------------------------------------------------------------------------------------------


def test_what_is_given_stays_as_it_was(pipe, base, adapter):
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet").requires_grad_(False)
    before = [{k: v.clone() for k, v in network.state_dict().items()} for network in (unet, adapter)]
    configs = unet.config, adapter.config
    made = AnimateDiffPipeline(**pipe.components | dict(unet=unet, motion_adapter=adapter), compat="diffusers")
    assert type(made.unet) is UNetMotionModel and made.motion_adapter is adapter
    with torch.no_grad():
        for p in made.unet.parameters():
            p.add_(1)
    for network, state in zip((unet, adapter), before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert (unet.config, adapter.config) == configs and type(unet) is UNet2DConditionModel
    assert unet(torch.zeros(1, 4, 8, 8), 5, torch.zeros(1, 7, 24)).shape == (1, 4, 8, 8)


def test_a_motion_unet_is_used_as_it_is(pipe):
    parts = pipe.components
    assert type(parts["unet"]) is UNetMotionModel
    assert AnimateDiffPipeline(**parts | {"motion_adapter": None}).unet is parts["unet"]
    v2v = AnimateDiffVideoToVideoPipeline.from_pipe(pipe)
    assert {**v2v.components, "scheduler": parts["scheduler"]} == parts
    assert AnimateDiffPipeline.from_pipe(v2v).unet is pipe.unet


def test_an_adapter_without_a_mid_block_goes_into_any_unet(pipe, adapter):
    assert not adapter.config.use_motion_mid_block
    assert pipe("a cat", **FAST).frames.std() > 0
    with pytest.raises(ValueError, match="does not fit the UNet"):
        other = MotionAdapter(block_out_channels=(32, 32), motion_norm_num_groups=8)
        AnimateDiffPipeline(**pipe.components | {
            "unet": UNet2DConditionModel(block_out_channels=(32, 64), attention_head_dim=4, norm_num_groups=8,
                                         cross_attention_dim=24, layers_per_block=1,
                                         down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                         up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
            "motion_adapter": other,
        })


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (dict(motion_adapter="guoyww/x"), TypeError, "motion_adapter must be a MotionAdapter, not a str"),
        (dict(motion_adapter=MotionAdapter), TypeError, "motion_adapter must be an object, not the class"),
        (dict(unet=UNet3DConditionModel), TypeError, "unet must be an object, not the class UNet3DCond"),
        (dict(feature_extractor=object()), ValueError, "feature_extractor must be None: the image_encoder"),
        (dict(image_encoder="h94/IP-Adapter"), TypeError, "image_encoder must be a CLIPVisionModelWithProjection, not"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_components_that_do_not_fit(pipe, change, error, says):
    with pytest.raises(error, match=says):
        AnimateDiffPipeline(**pipe.components | change)


def test_an_image_model_alone(pipe, base):
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    with pytest.raises(ValueError, match="give motion_adapter="):
        AnimateDiffPipeline(**pipe.components | dict(unet=unet, motion_adapter=None))
    with pytest.raises(ValueError, match="the unet is an image model, .*give motion_adapter=MotionAdapter.from_pretr"):
        AnimateDiffPipeline.from_pretrained(base)
    with pytest.raises(ValueError, match="names the unknown pipeline 'StableDiffusionPipeline'.*AnimateDiffPipeline"):
        DiffusionPipeline.from_pretrained(base)
    with pytest.raises(ValueError, match="UNet2DConditionModel, but TextToVideoSDPipeline needs UNet3DCondition"):
        TextToVideoSDPipeline.from_pretrained(base)


def test_the_adapter_is_cast_and_does_not_move(pipe):
    """Its modules were copied into the UNet. `meta` stands in for an accelerator."""
    pipe.to("meta", torch.bfloat16)
    assert {(str(p.device), p.dtype) for p in pipe.unet.parameters()} == {("meta", torch.bfloat16)}
    assert (pipe.motion_adapter.device.type, pipe.motion_adapter.dtype) == ("cpu", torch.bfloat16)


def test_not_out_of_another_family(tmp_path, make_official_folder):
    other = DiffusionPipeline.from_pretrained(make_official_folder(tmp_path, small=True))
    with pytest.raises(TypeError, match="UNet3DConditionModel"):
        AnimateDiffPipeline.from_pipe(other, motion_adapter=None)
    assert issubclass(VideoToVideoSDPipeline, TextToVideoSDPipeline)


# Folders ---------------------------------------------------------------------------------------------------------


def test_save_and_load(pipe, tmp_path):
    want = pipe("a cat", **FAST, generator=seeded(0)).frames
    pipe.save_pretrained(tmp_path / "a")
    index = json.loads((tmp_path / "a/model_index.json").read_text())
    assert index["_class_name"] == "AnimateDiffPipeline"
    assert index["unet"] == ["diffusers", "UNetMotionModel"]
    assert index["motion_adapter"] == ["diffusers", "MotionAdapter"]
    assert index["image_encoder"] == index["feature_extractor"] == [None, None]
    again = DiffusionPipeline.from_pretrained(tmp_path / "a")
    again.set_progress_bar_config(disable=True)
    assert type(again) is AnimateDiffPipeline and type(again.motion_adapter) is MotionAdapter
    # Not to the bit: products round by where the weights lie in memory.
    assert np.abs(again("a cat", **FAST, generator=seeded(0)).frames - want).max() < 1e-5

    bare = AnimateDiffVideoToVideoPipeline.from_pipe(pipe, motion_adapter=None)
    bare.save_pretrained(tmp_path / "b", variant="fp16")
    assert json.loads((tmp_path / "b/model_index.json").read_text())["motion_adapter"] == [None, None]
    assert not (tmp_path / "b/motion_adapter").exists()
    again = DiffusionPipeline.from_pretrained(tmp_path / "b", variant="fp16")
    assert type(again) is AnimateDiffVideoToVideoPipeline and again.motion_adapter is None
    with pytest.raises(ValueError, match="without vae cannot be saved"):
        AnimateDiffPipeline.from_pipe(pipe, vae=None).save_pretrained(tmp_path / "c")


def test_another_adapter_for_a_whole_folder(pipe, adapter, tmp_path, caplog):
    pipe.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        AnimateDiffPipeline.from_pretrained(tmp_path)
        assert not caplog.records
        AnimateDiffPipeline.from_pretrained(tmp_path, motion_adapter=adapter)
    assert "The given motion_adapter is not used" in caplog.text and "load_motion_modules" in caplog.text


def test_parts_of_a_folder_that_nothing_here_uses(base, adapter, tmp_path):
    """Safety checker and feature extractor: named in indexes, and passed over. An image encoder is loaded."""
    index = json.loads((base / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and {"safety_checker", "feature_extractor"} < index.keys()
    index |= {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"], "requires_safety_checker": True}
    for part in base.iterdir():
        if part.is_dir():
            (tmp_path / part.name).symlink_to(part)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="image_encoder does not exist; .* may be given as image_encoder="):
        AnimateDiffPipeline.from_pretrained(tmp_path, motion_adapter=adapter, safety_checker=None)
    CLIPVisionModelWithProjection(hidden_size=8, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1,
                                  image_size=4, patch_size=2).save_pretrained(tmp_path / "image_encoder")  # fmt: skip
    pipe = AnimateDiffPipeline.from_pretrained(tmp_path, motion_adapter=adapter, image_encoder=None)
    assert pipe.components["image_encoder"] is None is pipe.feature_extractor
    pipe = AnimateDiffPipeline.from_pretrained(tmp_path, motion_adapter=adapter, safety_checker=None)
    assert pipe.image_encoder.config.image_size == 4 and pipe.feature_extractor is None
    pipe.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert again.image_encoder.config == pipe.image_encoder.config
    index = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert index["image_encoder"] == ["transformers", "CLIPVisionModelWithProjection"]
    assert type(pipe.scheduler) is PNDMScheduler


# The mode ----------------------------------------------------------------------------------------------------------


def norms(pipe):
    return pipe.unet.config.motion_norms, pipe.unet.config.resnet_norms


def test_compat_reaches_the_networks(pipe, base, adapter, tmp_path):
    assert norms(pipe) == ("frame", "video")  # version 1
    theirs = AnimateDiffPipeline.from_pretrained(base, motion_adapter=adapter, compat="diffusers")
    assert norms(theirs) == ("video", "frame") and not theirs.clip_skip_negative
    assert adapter.config.motion_norms == "frame"  # as it was given
    assert theirs.scheduler.config.previous_timestep == "ratio"

    for p, want in ((pipe, ("frame", "video")), (theirs, ("video", "frame"))):
        p.save_pretrained(tmp_path / want[0])
        again = DiffusionPipeline.from_pretrained(tmp_path / want[0])
        assert norms(again) == want and again.compat == p.compat
    turned = DiffusionPipeline.from_pretrained(tmp_path / "frame", compat="diffusers")
    assert norms(turned) == ("video", "frame")
    unet = UNetMotionModel.from_pretrained(tmp_path / "frame/unet", motion_norms="frame")  # said in code
    assert norms(AnimateDiffPipeline(**pipe.components | {"unet": unet}, compat="diffusers")) == ("frame", "frame")


def test_the_mode_shows_in_the_frames(base, adapter):
    frames = []
    for compat in (None, "diffusers"):
        pipe = AnimateDiffPipeline.from_pretrained(base, motion_adapter=adapter, compat=compat)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = DDIMScheduler(**DDIM)
        frames.append(pipe("a cat", **FAST, generator=seeded(0)).frames)
    assert np.abs(frames[0] - frames[1]).max() > 1e-3


def test_clip_skip(pipe):
    right = pipe.encode_prompt("a cat", negative_prompt="a dog", clip_skip=1)
    assert torch.equal(right[1], pipe.encode_prompt("a dog", clip_skip=1)[0])
    theirs = AnimateDiffVideoToVideoPipeline(**pipe.components, clip_skip_negative=False)
    negative = theirs.encode_prompt("a cat", negative_prompt="a dog", clip_skip=1)[1]
    assert torch.equal(negative, pipe.encode_prompt("a dog")[0])


def test_another_mode_leaves_the_pipeline_it_was_made_from_as_it_was():
    """Two modes from one set of components: the tensors are shared, the norms are not."""
    torch.manual_seed(0)
    size = dict(block_out_channels=(8, 16), norm_num_groups=4)
    kinds = dict(down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
                 up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"))
    unet = UNetMotionModel(**size, **kinds, cross_attention_dim=8, num_attention_heads=2, motion_num_attention_heads=2)
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ours = AnimateDiffPipeline(None, None, None, unet, None, DDIMScheduler(**DDIM))
    theirs = AnimateDiffPipeline.from_pipe(ours, compat="diffusers")
    x, context = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 5, 8)
    with torch.no_grad():
        before = unet(x, 500, context)
        assert (theirs.unet(x, 500, context) - before).abs().max() > 1e-3
    assert ours.unet is unet and unet.compat is None and unet.config.motion_norms == "frame"
    assert theirs.unet.config.motion_norms == "video"
    shared = {p.data_ptr() for p in unet.parameters()}
    assert all(p.data_ptr() in shared for p in theirs.unet.parameters())
