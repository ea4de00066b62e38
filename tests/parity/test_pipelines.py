"""Whole pipelines against diffusers', from one folder, every parameter random: the frames agree to 1e-4."""

import json

import diffusers
import numpy as np
import pytest
import torch
import transformers

import minit2v.schedulers
from minit2v.pipelines import DiffusionPipeline, TextToVideoSDPipeline, VideoToVideoSDPipeline

TOLERANCE = 1e-4
CALL = dict(num_frames=3, num_inference_steps=2, height=16, width=24)
SCHEDULERS = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "PNDMScheduler",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_official_folder):
    return make_official_folder(tmp_path_factory.mktemp("t2v"), small=True)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipes(folder):
    """Ours and theirs. Without a dtype, theirs would run the text encoder in the float16 that its config speaks of."""
    theirs = quiet(diffusers.TextToVideoSDPipeline.from_pretrained(folder, torch_dtype=torch.float32))
    return quiet(DiffusionPipeline.from_pretrained(folder, compat="diffusers")), theirs


@pytest.fixture(scope="module")
def v2v(pipes):
    ours, theirs = pipes
    return quiet(VideoToVideoSDPipeline.from_pipe(ours)), quiet(diffusers.VideoToVideoSDPipeline(**theirs.components))


def use(pipes, name, **config):
    ours, theirs = pipes
    base = dict(theirs.scheduler.config)
    ours.scheduler = getattr(minit2v.schedulers, name).from_config(ours.scheduler.config, **config)
    theirs.scheduler = getattr(diffusers, name).from_config(base, **config)


def both(pipes, seed=0, **call):
    ours, theirs = (p(**call, generator=torch.Generator().manual_seed(seed)).frames for p in pipes)
    return ours, theirs


def assert_same(pipes, seed=0, **call):
    ours, theirs = both(pipes, seed, **call)
    assert ours.shape == theirs.shape and ours.std() > 0.05  # frames with something in them
    assert 0.02 < ((ours > 0.001) & (ours < 0.999)).mean()  # and not all clipped
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    return ours


@pytest.mark.parametrize("name, guidance_scale", [*((name, 4.0) for name in SCHEDULERS), (SCHEDULERS[0], 1.0)])
def test_text_to_video(pipes, name, guidance_scale):
    use(pipes, name)
    assert_same(pipes, **CALL | {"num_inference_steps": 4}, prompt="a cat", guidance_scale=guidance_scale)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_video_to_video(v2v, name):
    use(v2v, name)
    video = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    for strength in (1.0, 0.5):
        assert_same(v2v, prompt="a cat", video=video, num_inference_steps=4, strength=strength, guidance_scale=4.0)


def test_start_on_a_timestep_that_the_grid_has_twice(v2v):
    """Of 50 Karras sigmas two round to one timestep; the last three steps begin on the first of them."""
    use(v2v, "DPMSolverMultistepScheduler", use_karras_sigmas=True)
    video = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert_same(v2v, prompt="a cat", video=video, num_inference_steps=50, strength=0.06, guidance_scale=4.0)
    timesteps = v2v[0].scheduler.timesteps
    assert timesteps[47] == timesteps[48]


def test_forms_of_a_video(v2v):
    from PIL import Image

    use(v2v, "DDIMScheduler")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)
    floats = (pixels / 255).astype(np.float32)
    call = dict(prompt="a cat", num_inference_steps=2, strength=0.5, guidance_scale=4.0)
    for video in ([Image.fromarray(f) for f in pixels], [[Image.fromarray(f) for f in pixels]], floats, floats[None],
                  list(floats), torch.from_numpy(floats).permute(0, 3, 1, 2), torch.randn(3, 4, 8, 12)):
        assert_same(v2v, video=video, **call)


def test_prompts(pipes):
    use(pipes, "DDIMScheduler")
    call = CALL | dict(guidance_scale=4.0)
    one = assert_same(pipes, **call, prompt="a cat", negative_prompt="dog!")
    assert_same(pipes, **call, prompt=["a cat", "two dogs"], negative_prompt=["", "cat"])
    assert_same(pipes, **call, prompt=["a cat", "two dogs"])
    assert_same(pipes, **call, prompt="cat " * 100)
    text, negative = (p.encode_prompt("a cat", "cpu", 1, True, "dog!") for p in pipes)
    for a, b in zip(text, negative, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    by_states = assert_same(pipes, **call, prompt_embeds=text[0], negative_prompt_embeds=text[1])
    np.testing.assert_allclose(by_states, one, atol=1e-6)


def test_latents_eta_and_other_outputs(pipes):
    use(pipes, "DDIMScheduler")
    noise = torch.randn(1, 4, 3, 8, 12, generator=torch.Generator().manual_seed(5))
    assert_same(pipes, **CALL, prompt="a cat", guidance_scale=4.0, eta=0.7)
    assert_same(pipes, **CALL, prompt="a cat", guidance_scale=4.0, latents=noise)
    ours, theirs = both(pipes, **CALL, prompt="a cat", guidance_scale=4.0, output_type="latent")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    ours, theirs = both(pipes, **CALL, prompt="a cat", guidance_scale=4.0, output_type="pil")
    difference = [np.abs(np.asarray(a, int) - np.asarray(b, int)) for a, b in zip(ours[0], theirs[0], strict=True)]
    assert np.max(difference) <= 1
    use(pipes, "EulerDiscreteScheduler")
    assert_same(pipes, **CALL, prompt="a cat", guidance_scale=4.0, latents=noise)


def test_clip_skip(pipes):
    """Where the peer's text encoder is of transformers >= 5.6 its clip_skip fails, so its layers are asked directly."""
    ours, theirs = pipes
    encoder = theirs.text_encoder
    ids = ours.tokenizer(["a cat", ""])
    with torch.no_grad():
        states = encoder(ids, output_hidden_states=True).hidden_states
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    want_text, want_negative = norm(states[-2])[:1], norm(states[-1])[1:]
    text, negative = ours.encode_prompt("a cat", clip_skip=1)
    torch.testing.assert_close(text, want_text, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(negative, want_negative, rtol=1e-5, atol=1e-5)  # the reference skips for the prompt only


def test_linspace_ddim_steps_as_the_reference(pipes):
    """previous_timestep, the deviation that a whole pipeline shows: on, the frames agree; off, they do not."""
    use(pipes, "DDIMScheduler", timestep_spacing="linspace")
    theirs = assert_same(pipes, **CALL, prompt="a cat", guidance_scale=4.0)
    right = quiet(TextToVideoSDPipeline.from_pipe(pipes[0], compat=None))
    right.scheduler = minit2v.schedulers.DDIMScheduler.from_config(
        pipes[1].scheduler.config, timestep_spacing="linspace", previous_timestep="grid"
    )
    ours = right(**CALL, prompt="a cat", guidance_scale=4.0, generator=torch.Generator().manual_seed(0)).frames
    assert np.abs(ours - theirs).max() > 10 * TOLERANCE


def test_what_we_save_they_load(pipes, tmp_path):
    ours, theirs = pipes
    ours.save_pretrained(tmp_path)
    again = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path))
    assert type(again) is diffusers.TextToVideoSDPipeline
    assert dict(again.scheduler.config)["beta_schedule"] == ours.scheduler.config.beta_schedule
    assert_same((ours, again), **CALL, prompt="a dog", guidance_scale=4.0)
    use((ours, again), "DDIMScheduler")
    VideoToVideoSDPipeline.from_pipe(ours).save_pretrained(tmp_path / "v2v")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "v2v")
    assert type(again) is diffusers.VideoToVideoSDPipeline


@pytest.mark.parametrize("safe", [True, False])
def test_what_they_save_we_load(folder, tmp_path, randomize_, safe):
    """Classes of their own making, saved by their own code."""
    parts = ("unet", "vae", "text_encoder")
    configs = {part: json.loads((folder / part / "config.json").read_text()) for part in parts}
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**configs["text_encoder"]))
    theirs = diffusers.TextToVideoSDPipeline(
        unet=randomize_(diffusers.UNet3DConditionModel.from_config(configs["unet"]), 1),
        vae=randomize_(diffusers.AutoencoderKL.from_config(configs["vae"]), 2),
        text_encoder=randomize_(encoder, 3),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
    )
    quiet(theirs).save_pretrained(tmp_path, safe_serialization=safe, variant="fp16")
    ours = quiet(DiffusionPipeline.from_pretrained(tmp_path, variant="fp16", compat="diffusers"))
    theirs.unet.eval(), theirs.vae.eval(), theirs.text_encoder.eval()
    assert_same((ours, theirs), **CALL, prompt="a cat", guidance_scale=4.0)
