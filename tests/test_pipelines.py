"""The pipelines by themselves: what they take, give, refuse and keep the same."""

import inspect
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from minit2v import fast
from minit2v.fast import modules
from minit2v.pipelines import DiffusionPipeline, TextToVideoSDPipeline, VideoToVideoSDPipeline
from minit2v.schedulers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)

FAST = dict(num_frames=3, num_inference_steps=2, height=16, width=24)


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return generators if len(generators) > 1 else generators[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_official_folder):
    return make_official_folder(tmp_path_factory.mktemp("t2v"), small=True)


@pytest.fixture
def pipe(folder):
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def v2v(pipe):
    return VideoToVideoSDPipeline.from_pipe(pipe)


@pytest.fixture(scope="module")
def clip():
    """3 frames of 16 x 24, as (f h w 3) bytes."""
    return np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)


# Text to video ------------------------------------------------------------------------------------------


def test_output_types(pipe):
    kinds = ("np", "pt", "pil", "latent")
    out = [pipe(["a cat", "a dog"], **FAST, generator=seeded(0), output_type=kind).frames for kind in kinds]
    array, tensor, images, latents = out
    assert array.shape == (2, 3, 16, 24, 3) and array.dtype == np.float32 and 0 <= array.min() < array.max() <= 1
    assert tensor.shape == (2, 3, 3, 16, 24) and tensor.dtype == torch.float32
    assert np.array_equal(tensor.permute(0, 1, 3, 4, 2).numpy(), array)
    assert len(images) == 2 and len(images[0]) == 3 and images[1][2].size == (24, 16) and images[1][2].mode == "RGB"
    assert np.array_equal(np.asarray(images[1][2]), (array[1, 2] * 255).round().astype(np.uint8))
    assert latents.shape == (2, 4, 3, 8, 12)


def test_output_reads_like_the_reference(pipe):
    out = pipe("a cat", **FAST, generator=seeded(0))
    assert out[0] is out.frames is out["frames"] is out.to_tuple()[0]
    (frames,) = out
    assert frames is out.frames
    (again,) = pipe("a cat", **FAST, generator=seeded(0), return_dict=False)
    assert np.array_equal(again, frames)


def test_defaults_of_the_reference():
    t2v = {n: p.default for n, p in inspect.signature(TextToVideoSDPipeline.__call__).parameters.items()}
    assert list(t2v)[:19] == [
        "self", "prompt", "height", "width", "num_frames", "num_inference_steps", "guidance_scale", "negative_prompt",
        "eta", "generator", "latents", "prompt_embeds", "negative_prompt_embeds", "output_type", "return_dict",
        "callback", "callback_steps", "cross_attention_kwargs", "clip_skip",
    ]  # fmt: skip
    assert (t2v["num_frames"], t2v["num_inference_steps"], t2v["guidance_scale"]) == (16, 50, 9.0)
    assert (t2v["output_type"], t2v["return_dict"], t2v["callback_steps"], t2v["eta"]) == ("np", True, 1, 0.0)
    v2v = {n: p.default for n, p in inspect.signature(VideoToVideoSDPipeline.__call__).parameters.items()}
    assert list(v2v)[1:7] == ["prompt", "video", "strength", "num_inference_steps", "guidance_scale", "negative_prompt"]
    assert (v2v["strength"], v2v["num_inference_steps"], v2v["guidance_scale"]) == (0.6, 50, 15.0)


def test_default_size_is_the_unets(pipe):
    assert pipe("a cat", num_frames=1, num_inference_steps=1).frames.shape == (1, 1, 16, 16, 3)


def test_the_seed_decides(pipe):
    one, same, other = (pipe("a cat", **FAST, generator=seeded(s)).frames for s in (1, 1, 2))
    assert np.array_equal(one, same)
    assert np.abs(one - other).max() > 0.05


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler])
def test_a_video_does_not_depend_on_its_batch(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    eta = dict(eta=1.0) if scheduler is DDIMScheduler else {}
    alone = [pipe(p, **FAST, **eta, negative_prompt="ugly", generator=seeded(s), output_type="latent").frames
             for p, s in (("a cat", 7), ("a dog", 8))]
    both = pipe(["a dog", "a cat"], **FAST, **eta, negative_prompt="ugly", generator=seeded(8, 7),
                output_type="latent").frames
    want = torch.cat(alone[::-1])  # rounded otherwise in a batch: memory layouts are chosen by size
    torch.testing.assert_close(both, want, rtol=0, atol=2e-4 * want.abs().max().item())
    assert (both[0] - both[1]).abs().max() > 0.1


def test_guidance(pipe):
    plain, weak = (pipe("a cat", **FAST, guidance_scale=g, generator=seeded(0)).frames for g in (1.0, 0.5))
    assert np.array_equal(plain, weak)  # off up to 1
    calls = []
    pipe.unet.register_forward_hook(lambda m, args, out: calls.append((len(args[0]), len(args[2]))))
    guided = pipe("a cat", **FAST, guidance_scale=5.0, generator=seeded(0)).frames
    assert calls == [(2, 2)] * 2  # text states once per video
    assert np.abs(plain - guided).max() > 0.01
    other = pipe("a cat", **FAST, guidance_scale=5.0, negative_prompt="a dog", generator=seeded(0)).frames
    assert np.abs(other - guided).max() > 1e-3
    # the same text on both sides: guidance has nothing to push along
    same = pipe("a cat", **FAST, guidance_scale=5.0, negative_prompt="a cat", generator=seeded(0)).frames
    np.testing.assert_allclose(same, plain, atol=1e-4)


def test_negative_prompts_for_a_list(pipe):
    one = pipe(["a cat", "a dog"], **FAST, negative_prompt="dog", generator=seeded(1, 2)).frames
    each = pipe(["a cat", "a dog"], **FAST, negative_prompt=["dog", "dog"], generator=seeded(1, 2)).frames
    np.testing.assert_allclose(one, each, atol=1e-5)


def test_embeds_in_place_of_prompts(pipe):
    text, negative = pipe.encode_prompt(["a cat"], "cpu", 1, True, "a dog")
    assert text.shape == negative.shape == (1, 77, 24)
    assert pipe.encode_prompt("a cat", do_classifier_free_guidance=False)[1] is None
    assert pipe.encode_prompt("a cat", num_images_per_prompt=2)[0].shape == (2, 77, 24)
    by_text = pipe("a cat", **FAST, negative_prompt="a dog", generator=seeded(0)).frames
    by_states = pipe(**FAST, prompt_embeds=text, negative_prompt_embeds=negative, generator=seeded(0)).frames
    assert np.array_equal(by_text, by_states)
    mixed = pipe(**FAST, prompt_embeds=text, negative_prompt="a dog", generator=seeded(0)).frames
    assert np.array_equal(by_text, mixed)


def test_clip_skip_reaches_both_prompts_or_one(pipe, folder):
    right = pipe.encode_prompt("a cat", negative_prompt="a dog", clip_skip=1)
    assert torch.equal(right[1], pipe.encode_prompt("a dog", clip_skip=1)[0])
    as_reference = DiffusionPipeline.from_pretrained(folder, compat="diffusers")
    theirs = as_reference.encode_prompt("a cat", negative_prompt="a dog", clip_skip=1)
    assert torch.equal(theirs[0], right[0])
    assert torch.equal(theirs[1], pipe.encode_prompt("a cat", negative_prompt="a dog")[1])
    explicit = DiffusionPipeline.from_pretrained(folder, compat="diffusers", clip_skip_negative=True)
    assert torch.equal(explicit.encode_prompt("a cat", negative_prompt="a dog", clip_skip=1)[1], right[1])


def test_latents_are_the_starting_noise(pipe):
    noise = torch.randn((1, 4, 3, 8, 12), generator=seeded(3))
    drawn = pipe("a cat", **FAST, generator=seeded(3)).frames
    given = pipe("a cat", **FAST, latents=noise).frames
    assert np.array_equal(drawn, given)


def test_latents_are_scaled_for_the_scheduler(pipe):
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    seen = []
    pipe.unet.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    pipe("a cat", **FAST, latents=torch.ones(1, 4, 3, 8, 12), guidance_scale=1.0)
    sigma = pipe.scheduler.init_noise_sigma
    assert sigma > 2
    expected = pipe.scheduler.init_noise_sigma / (sigma**2 + 1) ** 0.5
    assert seen[0].flatten()[0].item() == pytest.approx(float(expected), rel=0.2)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler])
@pytest.mark.parametrize("every", [1, 2])
def test_callback_counts_steps(pipe, scheduler, every):
    """Solvers that call the network more often than once a step (PNDM's start) still make num_inference_steps."""
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    seen, ended = [], []
    pipe("a cat", **FAST | {"num_inference_steps": 5}, callback=lambda i, t, x: seen.append((i, x.shape)),
         callback_steps=every, callback_on_step_end=lambda p, i, t, kw: ended.append(i))
    assert seen == [(i, (1, 4, 3, 8, 12)) for i in range(0, 5, every)]
    assert ended == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("change, shown, times", [
    (lambda tensors: None, "latents", 1),
    (lambda tensors: {"prompt_embeds": torch.ones(1, 77, 24)}, "latents", 3),
    (lambda tensors: {"negative_prompt_embeds": torch.ones(1, 77, 24)}, "latents", 3),
    (lambda tensors: tensors["prompt_embeds"].mul_(2)[:0].sum().item() or None, "prompt_embeds", 3),
], ids=["nothing", "the text", "the negative one", "in place"])  # fmt: skip
def test_keys_and_values_of_the_text_are_made_once(pipe, change, shown, times, monkeypatch):
    """And again where a callback may have changed the text: the steps are those of a UNet that is given the text."""
    steps = FAST | {"num_inference_steps": 3, "output_type": "latent"}
    arguments = {**steps, "callback_on_step_end": lambda pipe, i, t, tensors: change(tensors),
                 "callback_on_step_end_tensor_inputs": [shown]}
    made, texts_of = [], modules.texts_of

    def count(run, unet, context):
        made.append(context.shape)
        return texts_of(run, unet, context)

    monkeypatch.setattr(modules, "texts_of", count)
    got = pipe("a cat", **arguments, generator=seeded(0)).frames
    assert made == [(2, 77, 24)] * times
    monkeypatch.setenv("MINIT2V_OPTIMIZE", "0")
    want = pipe("a cat", **arguments, generator=seeded(0)).frames
    torch.testing.assert_close(got, want, rtol=0, atol=5e-4)  # two ways to round, through three steps of guidance
    plain = pipe("a cat", **steps, generator=seeded(0)).frames
    assert torch.allclose(want, plain, atol=1e-3) == (times == 1), "the text says something"


def test_optimize_and_restore(pipe, v2v):
    want, state = pipe("a cat", **FAST, generator=seeded(0)).frames, pipe.unet.state_dict()
    places = {name: (value.stride(), value.clone()) for name, value in state.items()}
    with pytest.raises(ValueError, match="graphs=True: a CUDA graph needs the UNet on CUDA, but it is on cpu"):
        pipe.optimize(graphs=True)
    assert pipe.unet.state_dict()["conv_in.weight"].data_ptr() == state["conv_in.weight"].data_ptr()
    assert pipe.optimize() is pipe and fast.runner(v2v.unet).executor is fast.runner(pipe.unet).executor
    assert fast.runner(pipe.unet).executor.graphs is None
    assert np.abs(pipe("a cat", **FAST, generator=seeded(0)).frames - want).max() < 1e-4
    assert pipe.restore() is pipe and fast.runner(v2v.unet) is v2v.unet and fast.runner(pipe.vae) is pipe.vae
    for name, value in pipe.unet.state_dict().items():
        assert value.stride() == places[name][0] and torch.equal(value, places[name][1])
    assert np.abs(pipe("a cat", **FAST, generator=seeded(0)).frames - want).max() < 1e-4
    pipe.vae = None
    pipe.optimize().restore()
    pipe.unet = None
    with pytest.raises(ValueError, match="needs the pipeline's unet"):
        pipe.optimize()


def test_callback_replaces_tensors(pipe):
    def stop_guiding(pipe, step, t, tensors):
        assert set(tensors) == {"latents", "prompt_embeds", "negative_prompt_embeds"}
        return {"latents": torch.zeros_like(tensors["latents"]), "negative_prompt_embeds": tensors["prompt_embeds"]}

    seen = []
    pipe.unet.register_forward_pre_hook(lambda m, args: seen.append((args[0].clone(), args[2].clone())))
    pipe("a cat", **FAST, callback_on_step_end=stop_guiding,
         callback_on_step_end_tensor_inputs=["latents", "prompt_embeds", "negative_prompt_embeds"])
    assert not torch.equal(seen[0][1][0], seen[0][1][1]) and torch.equal(seen[1][1][0], seen[1][1][1])
    assert seen[1][0].abs().max() == 0


def test_decode_in_chunks_and_slices(pipe):
    whole = pipe("a cat", **FAST, generator=seeded(0)).frames
    chunked = pipe("a cat", **FAST, generator=seeded(0), decode_chunk_size=2).frames
    np.testing.assert_allclose(whole, chunked, atol=1e-5)
    sizes = []
    pipe.vae.decoder.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    pipe.enable_vae_slicing()
    np.testing.assert_allclose(whole, pipe("a cat", **FAST, generator=seeded(0)).frames, atol=1e-5)
    pipe.disable_vae_slicing()
    pipe("a cat", **FAST, generator=seeded(0))
    assert sizes == [1, 1, 1, 3]
    pipe.enable_vae_tiling()
    assert pipe("a cat", **FAST).frames.shape == whole.shape
    pipe.disable_vae_tiling()


def test_half_precision_parts(folder):
    """The parts may differ in dtype: each gets its input in its own."""
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype={"unet": torch.bfloat16, "default": "float32"})
    assert (pipe.unet.dtype, pipe.vae.dtype, pipe.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    assert pipe("a cat", **FAST).frames.dtype == np.float32
    assert DiffusionPipeline.from_pretrained(folder, dtype="bfloat16").vae.dtype == torch.bfloat16


# Video to video ------------------------------------------------------------------------------------------


def forms(clip):
    floats = (clip / 255).astype(np.float32)
    tensor = torch.from_numpy(clip).permute(0, 3, 1, 2)
    return {
        "PIL": [Image.fromarray(f) for f in clip],
        "PIL of videos": [[Image.fromarray(f) for f in clip]],
        "PIL with alpha": [Image.fromarray(f).convert("RGBA") for f in clip],
        "bytes": clip,
        "floats": floats,
        "batch of floats": floats[None],
        "list of arrays": list(floats),
        "list of videos": [floats],
        "torch bytes": tensor,
        "torch floats": tensor / 255,
        "torch batch": tensor[None] / 255,
        "torch list": list(tensor / 255),
        "in -1 .. 1": tensor / 127.5 - 1,
    }


def test_every_form_of_a_video(v2v, clip):
    want = None
    for name, video in forms(clip).items():
        got = v2v("a cat", video, num_inference_steps=2, generator=seeded(0)).frames
        want = got if want is None else want
        np.testing.assert_allclose(got, want, atol=2e-4, err_msg=name)
    assert want.shape == (1, 3, 16, 24, 3)


def test_resized_where_asked(v2v, clip):
    for video in (forms(clip)["PIL"], clip):
        assert v2v("a cat", video, height=20, width=32, num_inference_steps=2).frames.shape == (1, 3, 20, 32, 3)
        assert v2v("a cat", video, width=32, num_inference_steps=2).frames.shape == (1, 3, 16, 32, 3)


def test_strength(v2v, clip):
    seen = []
    v2v.unet.register_forward_pre_hook(lambda m, args: seen.append(float(args[1])))

    def run(strength, **kw):
        seen.clear()
        out = v2v("a cat", clip, strength, 10, generator=seeded(0), **kw).frames
        return out, len(seen)

    assert [run(s)[1] for s in (1.0, 0.55, 0.1)] == [10, 5, 1]
    zero, tiny = run(0.0), run(0.09)
    assert zero[1] == tiny[1] == 0 and np.array_equal(zero[0], tiny[0])
    z = v2v.vae.encode(torch.from_numpy(clip).permute(0, 3, 1, 2) / 127.5 - 1).sample(seeded(0))
    decoded = (v2v.vae.decode(z) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).detach().numpy()
    np.testing.assert_allclose(zero[0][0], decoded, atol=1e-5)


def test_videos_and_prompts_in_batches(v2v, clip):
    other = clip[::-1].copy()
    alone = [v2v(p, v, num_inference_steps=4, generator=seeded(s)).frames
             for p, v, s in (("a cat", clip, 1), ("a dog", other, 2))]
    both = v2v(["a cat", "a dog"], np.stack([clip, other]), num_inference_steps=4, generator=seeded(1, 2)).frames
    np.testing.assert_allclose(both, np.concatenate(alone), atol=1e-4)
    one_video = v2v(["a cat", "a dog"], clip, num_inference_steps=4, generator=seeded(1, 2)).frames
    np.testing.assert_allclose(one_video[0], alone[0][0], atol=1e-4)
    one_prompt = v2v("a cat", [list(clip), list(other)], num_inference_steps=4, generator=seeded(1, 2)).frames
    np.testing.assert_allclose(one_prompt[0], alone[0][0], atol=1e-4)
    with pytest.raises(ValueError, match="2 videos for 3 prompts"):
        v2v(["a", "b", "c"], [clip, other])


def test_latents_in_place_of_a_video(v2v, pipe, clip):
    made = pipe("a cat", **FAST, generator=seeded(0), output_type="latent").frames  # b c f h w
    clean = made.transpose(1, 2)
    decoded = v2v("a cat", clean, strength=0).frames
    np.testing.assert_allclose(decoded, pipe("a cat", **FAST, generator=seeded(0)).frames, atol=1e-6)
    assert np.array_equal(decoded, v2v("a cat", clean[0], strength=0).frames)
    seen = []
    v2v.unet.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    noisy = torch.randn_like(made)
    v2v("a cat", latents=noisy, num_inference_steps=2, guidance_scale=1)
    assert torch.equal(seen[0], noisy)  # no noise on top
    with pytest.raises(ValueError, match="change the order of the axes"):
        v2v("a cat", torch.zeros(1, 4, 5, 8, 12))  # b c f h w
    with pytest.raises(ValueError, match="not both"):
        v2v("a cat", clip, latents=noisy)


def test_long_videos_are_encoded_in_chunks(v2v):
    video = torch.rand(11, 3, 16, 16)
    sizes = []
    v2v.vae.encoder.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    v2v("a cat", video, strength=0)
    assert max(sizes) <= 8 and sum(sizes) == 11


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (dict(num_frame=8), TypeError, "'num_frame'.*'num_frames'"),
        (dict(video=[1]), TypeError, r"VideoToVideoSDPipeline.from_pipe\(pipe\)"),
        (dict(num_inference_steps=0), ValueError, "num_inference_steps .*positive integer, not 0"),
        (dict(num_inference_steps=2.5), ValueError, "num_inference_steps"),
        (dict(num_frames=0), ValueError, "num_frames"),
        (dict(num_frames=-3), ValueError, "num_frames"),
        (dict(height=17), ValueError, "height must be a multiple of 2, not 17"),
        (dict(height=0), ValueError, "height"),
        (dict(width=-8), ValueError, "width"),
        (dict(output_type="gif"), ValueError, "output_type.*'gif'"),
        (dict(prompt=[]), ValueError, "prompt is an empty list"),
        (dict(prompt=None), ValueError, "give a prompt"),
        (dict(prompt=3), ValueError, "prompt must be a text"),
        (dict(prompt_embeds=torch.zeros(1, 77, 24)), ValueError, "not both"),
        (dict(prompt=None, prompt_embeds=torch.zeros(1, 77, 23)), ValueError, r"\(batch, tokens, 24\)"),
        (dict(prompt=None, prompt_embeds=torch.full((1, 77, 24), torch.nan)), ValueError, "NaN"),
        (dict(negative_prompt=["a", "b"]), ValueError, "2 negative prompts for 1 prompts"),
        (dict(negative_prompt_embeds=torch.zeros(1, 5, 24)), ValueError, "do not match"),
        (dict(latents=torch.zeros(1, 4, 3, 8, 8)), ValueError, r"latents must be .*\(1, 4, 3, 8, 12\)"),
        (dict(latents=torch.full((1, 4, 3, 8, 12), torch.inf)), ValueError, "latents"),
        (dict(latents=[1]), ValueError, r"latents must be .*\(1, 4, 3, 8, 12\).* not a list"),
        (dict(eta=-0.5), ValueError, r"eta must be in \[0, 1\], not -0.5"),
        (dict(eta=float("nan")), ValueError, "eta"),
        (dict(eta="0.5"), ValueError, "eta must be a finite number, not '0.5'"),
        (dict(callback=3), TypeError, "callback must be a function"),
        (dict(callback_on_step_end=3), TypeError, "callback_on_step_end must be a function"),
        (dict(generator=[torch.Generator(), torch.Generator()]), ValueError, "2 generators for 1 videos"),
        (dict(generator=42), TypeError, "torch.Generator"),
        (dict(callback_steps=0), ValueError, "callback_steps"),
        (dict(callback_on_step_end_tensor_inputs=["eps"]), ValueError, "eps"),
        (dict(cross_attention_kwargs={"scale": 0.5}), ValueError, "cross_attention_kwargs"),
        (dict(decode_chunk_size=0), ValueError, "decode_chunk_size"),
        (dict(clip_skip=9), ValueError, "clip_skip"),
        (dict(guidance_scale=float("nan")), ValueError, "guidance_scale"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_one_clear_line_before_any_work(pipe, call, error, says):
    pipe.unet.register_forward_pre_hook(lambda m, args: pytest.fail("the UNet ran"))
    with pytest.raises(error, match=says) as info:
        pipe(**{"prompt": "a cat", **FAST, **call})
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("video", "says"),
    [
        (None, "give a video"),
        ([], "empty list"),
        ("clip.mp4", "clip.mp4"),
        (np.zeros((3, 16, 24, 4)), r"\(f h w 3\)"),
        (np.zeros((3, 16, 24)), "3 axes"),
        (torch.zeros(3, 16, 24, 3), r"\(f 3 h w\)"),
        (torch.zeros(3, 3, 16, 24, dtype=torch.int64), "int64"),
        (np.full((3, 16, 24, 3), 255.0), r"\[0, 1\], not from 255 to 255"),
        (np.full((3, 16, 24, 3), np.nan), "nan"),
        (np.zeros((3, 15, 24, 3)), "height must be a multiple of 2, not 15"),
        ([Image.new("RGB", (24, 16)), Image.new("RGB", (16, 16))], "frame 1"),
        ([np.zeros((3, 16, 24, 3)), np.zeros((2, 16, 24, 3))], "same shape"),
        ([Image.new("RGB", (24, 16)), np.zeros((16, 24, 3))], "frames of"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_refused_videos(v2v, video, says):
    with pytest.raises(ValueError, match=says):
        v2v("a cat", video)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (dict(strength=1.5), ValueError, "strength"),
        (dict(strength=-0.1), ValueError, "strength"),
        (dict(strength=float("nan")), ValueError, "strength"),
        (dict(strength="0.5"), ValueError, "strength must be a finite number, not '0.5'"),
        (dict(strength=None), ValueError, "strength"),
        (dict(eta=2), ValueError, r"eta must be in \[0, 1\]"),
        (dict(video=None, latents=np.zeros((1, 4, 3, 8, 12))), ValueError, r"\(b, 4, f, h, w\).* not a ndarray"),
        (dict(video=None, latents=torch.zeros(1, 4, 0, 8, 12)), ValueError, r"\(b, 4, f, h, w\)"),
        (dict(video=torch.full((3, 4, 8, 12), torch.nan)), ValueError, "video contains NaN"),
        (dict(num_frames=8), TypeError, "the video has its number"),
        (dict(height=17), ValueError, "height must be a multiple"),
        (dict(generator=[torch.Generator()] * 2), ValueError, "2 generators for 1 videos"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_refused_v2v_calls(v2v, clip, call, error, says):
    with pytest.raises(error, match=says):
        v2v("a cat", **{"video": clip, **call})


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (3, TypeError, "returned a int, not a dictionary"),
        ({"latent": torch.zeros(1)}, ValueError, r"returned \['latent'\]"),
        ({"latents": torch.zeros(3)}, ValueError, r"latents must be .*\(1, 4, 3, 8, 12\).* not \(3,\)"),
        ({"latents": torch.full((1, 4, 3, 8, 12), torch.nan)}, ValueError, "latents contains NaN"),
    ],
    ids=["no dictionary", "unknown", "shape", "nan"],
)
def test_refused_answers_of_a_callback(pipe, answer, error, says):
    with pytest.raises(error, match=says):
        pipe("a cat", **FAST, callback_on_step_end=lambda *_: answer)


def test_numbers_of_numpy_are_numbers(pipe):
    call = {name: np.int64(n) for name, n in FAST.items()}
    want = pipe("a cat", **FAST, guidance_scale=3.0, generator=seeded(0)).frames
    got = pipe("a cat", **call, guidance_scale=np.float32(3), generator=seeded(0)).frames
    assert np.array_equal(got, want)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_bad_weights_are_named(pipe, part):
    parameters = getattr(pipe, part).diffusers_state_dict()  # of the same memory as the weights
    name = [n for n in parameters if n.startswith("decoder") or part != "vae"][-1]
    parameters[name].view(-1)[0] = torch.nan
    with pytest.raises(FloatingPointError, match=name.replace(".", r"\.")):
        pipe("a cat", **FAST)


def test_overflow_is_told_from_bad_weights(pipe):
    pipe.unet.register_forward_hook(lambda m, args, out: out * torch.inf)
    with pytest.raises(FloatingPointError, match="parameters are finite"):
        pipe("a cat", **FAST)


def test_eta_without_a_meaning_is_said(pipe, caplog):
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with caplog.at_level(logging.WARNING):
        pipe("a cat", **FAST, eta=0.5)
    assert "EulerDiscreteScheduler has no eta" in caplog.text


def test_a_step_with_any_keywords_gets_eta_and_the_generator(pipe, caplog):
    class Louder(DDIMScheduler):
        def step(self, model_output, timestep, sample, **arguments):
            return super().step(1.1 * model_output, timestep, sample, **arguments)

    pipe.scheduler = Louder.from_config(pipe.scheduler.config)
    latents = torch.zeros(1, 4, 3, 8, 12)
    with caplog.at_level(logging.WARNING):
        first, again, other = (
            pipe("a cat", **FAST, eta=0.5, generator=torch.Generator().manual_seed(seed), latents=latents).frames
            for seed in (0, 0, 1)
        )
    assert "no eta" not in caplog.text
    np.testing.assert_array_equal(first, again)  # the noise of the steps comes from the generator
    assert np.abs(first - other).max() > 0


def test_clipping_that_nobody_asked_for_is_said(pipe, caplog):
    config = {k: v for k, v in pipe.scheduler.config.items() if k != "clip_sample" and not k.startswith("_")}
    with caplog.at_level(logging.WARNING):
        for fields in ({"clip_sample": False}, {"clip_sample": True}, {}):
            caplog.clear()
            pipe.scheduler = DDIMScheduler.from_config(config, **fields)
            pipe("a cat", **FAST)
            said = [r.getMessage() for r in caplog.records if "clip" in r.getMessage()]
            assert len(said) == (not fields)
    assert said[0].startswith("DDIMScheduler clips latents") and "clip_sample=False" in said[0] and "\n" not in said[0]


# Components, loading, saving ------------------------------------------------------------------------------------------


def test_save_and_load(pipe, tmp_path):
    want = pipe("a cat", **FAST, generator=seeded(0)).frames
    pipe.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert index["_class_name"] == "TextToVideoSDPipeline"
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert index["unet"] == ["diffusers", "UNet3DConditionModel"]
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert type(again) is TextToVideoSDPipeline
    assert np.array_equal(again("a cat", **FAST, generator=seeded(0)).frames, want)


def test_save_in_the_other_format(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, safe_serialization=False, variant="fp16")
    assert (tmp_path / "unet/diffusion_pytorch_model.fp16.bin").is_file()
    assert (tmp_path / "text_encoder/pytorch_model.fp16.bin").is_file()
    again = DiffusionPipeline.from_pretrained(tmp_path, variant="fp16")
    assert all(torch.equal(a, b) for a, b in zip(again.unet.parameters(), pipe.unet.parameters(), strict=True))


def test_compat_is_saved_and_holds_later(folder, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(folder, compat="diffusers")
    assert not pipe.clip_skip_negative and pipe.scheduler.config.previous_timestep == "ratio"
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert not again.clip_skip_negative and again.scheduler.config.previous_timestep == "ratio"

    for p in (again, VideoToVideoSDPipeline.from_pipe(again)):
        p.scheduler = DDIMScheduler()
        assert p.scheduler.config.previous_timestep == "ratio"
        p.scheduler = DDIMScheduler(previous_timestep="grid")
        assert p.scheduler.config.previous_timestep == "grid"
        assert not p.clip_skip_negative

    right = DiffusionPipeline.from_pretrained(folder)
    right.save_pretrained(tmp_path / "right")
    turned = DiffusionPipeline.from_pretrained(tmp_path / "right", compat="diffusers")
    assert not turned.clip_skip_negative and turned.scheduler.config.previous_timestep == "ratio"
    right.scheduler = DDIMScheduler()
    assert right.clip_skip_negative and right.scheduler.config.previous_timestep == "grid"
    with pytest.raises(ValueError, match="compat"):
        DiffusionPipeline.from_pretrained(folder, compat="difusers")


def test_from_pipe_shares(pipe):
    other = VideoToVideoSDPipeline.from_pipe(pipe)
    assert type(other) is VideoToVideoSDPipeline
    assert all(other.components[name] is part for name, part in pipe.components.items() if name != "scheduler")
    assert other.scheduler is not pipe.scheduler and other.scheduler.config == pipe.scheduler.config
    scheduler = EulerDiscreteScheduler()
    assert VideoToVideoSDPipeline.from_pipe(pipe, scheduler=scheduler).scheduler is scheduler
    assert TextToVideoSDPipeline(**other.components).unet is pipe.unet
    with pytest.raises(TypeError, match="'schedular'.*'scheduler'"):
        VideoToVideoSDPipeline.from_pipe(pipe, schedular=scheduler)
    back = TextToVideoSDPipeline.from_pipe(other)
    assert type(back) is TextToVideoSDPipeline and back.unet is pipe.unet
    with pytest.raises(TypeError, match="needs a pipeline of minit2v, not a dict"):
        VideoToVideoSDPipeline.from_pipe(pipe.components)


def test_class_and_overrides(folder):
    scheduler = DPMSolverMultistepScheduler()
    v2v = VideoToVideoSDPipeline.from_pretrained(folder, scheduler=scheduler, safety_checker=None)
    assert type(v2v) is VideoToVideoSDPipeline and v2v.scheduler is scheduler
    text_only = TextToVideoSDPipeline.from_pretrained(str(folder), unet=None, vae=None)
    assert text_only.encode_prompt("a cat")[0].shape == (1, 77, 24)
    with pytest.raises(ValueError, match="needs its unet"):
        text_only("a cat")
    no_text = TextToVideoSDPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None, vae=None)
    states = torch.zeros(1, 77, 24)
    call = FAST | dict(height=64, width=64)  # without the VAE, its factor is taken to be 8
    latents = no_text(**call, prompt_embeds=states, negative_prompt_embeds=states, output_type="latent").frames
    assert latents.shape == (1, 4, 3, 8, 8)
    with pytest.raises(ValueError, match="needs its vae"):
        no_text(**call, prompt_embeds=states, negative_prompt_embeds=states)
    with pytest.raises(ValueError, match="tokenizer"):
        no_text("a cat", **call, output_type="latent")
    with pytest.raises(TypeError, match="'schedular'.*'scheduler'"):
        DiffusionPipeline.from_pretrained(folder, schedular=scheduler)
    with pytest.raises(ValueError, match="'unets'.*'unet'"):
        DiffusionPipeline.from_pretrained(folder, dtype={"unets": "float16"})
    with pytest.raises(ValueError, match="float17"):
        DiffusionPipeline.from_pretrained(folder, dtype="float17")
    with pytest.raises(ValueError, match="give one"):
        DiffusionPipeline.from_pretrained(folder, dtype="float16", torch_dtype="float32")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"_class_name": "TextToVideoPipeline"}, "'TextToVideoPipeline'.*nearest: 'TextToVideoSDPipeline'"),
        ({"unett": ["diffusers", "UNet3DConditionModel"]}, "'unett'.*nearest: 'unet'"),
        ({"unet": ["diffusers", "UNet2DConditionModel"]}, "UNet2DConditionModel.*needs UNet3DConditionModel"),
        ({"scheduler": ["diffusers", "DDIMSchedule"]}, "'DDIMSchedule'.*nearest: 'DDIMScheduler'"),
        ({"vae": [None, None]}, "'vae' was None when this was saved: give it as vae=..."),
        ({"unet": ["null", None]}, "'unet' was None"),
        ({"unet": ["diffusers"]}, r"'unet' must be \[library, class\]"),
        ({"_class_name": "StableDiffusionPipeline"}, "unknown pipeline 'StableDiffusionPipeline'.*call from_pre"),
        ({"vae": ...}, "no 'vae'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_index_files_that_do_not_fit(folder, tmp_path, change, says):
    index = json.loads((folder / "model_index.json").read_text()) | change
    (tmp_path / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if v is not ...}))
    with pytest.raises(ValueError, match=says):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_unused_components_are_passed_over(folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True,
              "feature_extractor": ["transformers", "CLIPImageProcessor"], "image_encoder": [None, None]}
    for part in folder.iterdir():
        if part.is_dir():
            (tmp_path / part.name).symlink_to(part)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert DiffusionPipeline.from_pretrained(tmp_path).unet is not None


def test_subfolder(folder, tmp_path):
    (tmp_path / "inside").symlink_to(folder)
    assert DiffusionPipeline.from_pretrained(tmp_path, subfolder="inside").device.type == "cpu"


# Devices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [("cpu", torch.bfloat16), (torch.bfloat16, torch.device("cpu"))])
def test_to(pipe, args):
    assert pipe.to(*args) is pipe
    assert {c.dtype for c in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.bfloat16} == {pipe.dtype}
    assert pipe.to(dtype=torch.float32, device="cpu").dtype == torch.float32
    assert pipe.to("cpu") is pipe and pipe.to() is pipe
    with pytest.raises(TypeError, match="one device and one dtype"):
        pipe.to("cpu", "cpu")


def test_offload_without_an_accelerator(pipe, caplog):
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    want = pipe("a cat", **FAST, generator=seeded(0)).frames
    with caplog.at_level(logging.WARNING):
        pipe.enable_model_cpu_offload()
    assert len(caplog.records) == 1 and "CPU" in caplog.text
    assert np.array_equal(pipe("a cat", **FAST, generator=seeded(0)).frames, want)


def test_offload_moves_one_component_at_a_time(pipe, monkeypatch):
    """`meta` stands in for an accelerator: what would be moved there, and back, is written down instead."""
    pipe.enable_model_cpu_offload(device="meta")
    assert pipe._execution_device.type == "meta"
    moves = []
    for name in ("text_encoder", "unet", "vae"):
        part = getattr(pipe, name)
        monkeypatch.setattr(part, "to", lambda d=None, name=name, part=part, **kw: moves.append((name, str(d))) or part)
    for name in ("text_encoder", "unet", "vae"):
        with pipe._placed(name):
            assert moves[-1] == (name, "meta")
        assert moves[-1] == (name, "cpu")
    assert VideoToVideoSDPipeline.from_pipe(pipe)._execution_device.type == "meta"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offload_on_a_gpu(folder):
    pipe = DiffusionPipeline.from_pretrained(folder)
    want = pipe("a cat", **FAST, generator=seeded(0)).frames
    pipe.enable_model_cpu_offload()
    got = pipe("a cat", **FAST, generator=seeded(0)).frames  # a CPU generator: the same noise
    np.testing.assert_allclose(got, want, atol=2e-2)
    assert pipe.device.type == "cpu"
    on_gpu = pipe.to("cuda")("a cat", **FAST, generator=seeded(0)).frames
    np.testing.assert_allclose(on_gpu, got, atol=1e-5)
    assert pipe.device.type == "cuda" == pipe.vae.device.type
