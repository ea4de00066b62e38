"""Calls that meet: of two threads, of a caller who wants to stop, of somebody used to another library."""

import logging
import threading

import pytest
import torch

from minit2v import (
    AnimateDiffPipeline,
    AnimateDiffVideoToVideoPipeline,
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    MotionAdapter,
    PNDMScheduler,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
    VideoToVideoSDPipeline,
)
from minit2v.pipelines.memory import Offload

IMAGE = dict(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
             layers_per_block=1, norm_num_groups=8, cross_attention_dim=8, attention_head_dim=4)
MOTION = dict(block_out_channels=(32,), motion_layers_per_block=1, motion_norm_num_groups=8,
              motion_num_attention_heads=4)
FAST = dict(num_frames=3, num_inference_steps=6, height=16, width=16, output_type="np")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_official_folder):
    return make_official_folder(tmp_path_factory.mktemp("t2v"), small=True)


@pytest.fixture
def pipe(folder):
    pipe = TextToVideoSDPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def video(pipe, seed=0, **kw):
    return pipe("a cat", **FAST | kw, generator=torch.Generator().manual_seed(seed)).frames


def meanwhile(pipe, other):
    """What `other()` raises while the pipeline is in its second step, and the pipeline's video."""
    said = []

    def second(pipe, step, t, tensors):
        if step == 1:
            thread = threading.Thread(target=attempt)
            thread.start()
            thread.join()
        return {}

    def attempt():
        try:
            other()
        except Exception as error:
            said.append(error)

    return said, video(pipe, callback_on_step_end=second)


# Threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler])
def test_a_pipeline_that_runs_refuses_a_second_call(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    alone = video(pipe)
    for other in (pipe, TextToVideoSDPipeline(**pipe.components)):  # which has the same scheduler
        said, frames = meanwhile(pipe, lambda other=other: video(other))
        assert [type(e) for e in said] == [RuntimeError] and "\n" not in str(said[0])
        assert "another call uses this" in str(said[0]) and "TextToVideoSDPipeline.from_pipe(pipe)" in str(said[0])
        assert (frames == alone).all()
    assert (video(pipe) == alone).all()  # and is free again


def test_a_second_pipeline_around_the_same_networks_runs_at_the_same_time(pipe):
    alone = {seed: video(pipe, seed) for seed in range(4)}
    pipes = [pipe, *(TextToVideoSDPipeline.from_pipe(pipe) for _ in range(3))]
    assert all(p.unet is pipe.unet and p.vae is pipe.vae for p in pipes)
    together, start = {}, threading.Barrier(4)

    def run(seed):
        start.wait()
        together[seed] = video(pipes[seed], seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((together[seed] == alone[seed]).all() for seed in alone)


def test_a_callback_that_calls_its_pipeline_again_is_told(pipe):
    with pytest.raises(RuntimeError, match="another call uses this"):
        video(pipe, callback=lambda *_: video(pipe))
    assert video(pipe).std() > 0


def test_networks_that_are_offloaded_serve_one_call(pipe):
    other = TextToVideoSDPipeline.from_pipe(pipe)
    pipe._offload = Offload(torch.device("cpu"), "model")
    said, _ = meanwhile(pipe, lambda: video(other))
    assert "another call uses this TextToVideoSDPipeline" in str(said[0])
    pipe._offload = None
    said, _ = meanwhile(pipe, lambda: video(other))
    assert not said


# A caller who wants to stop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["_interrupt", "interrupt"])
@pytest.mark.parametrize("free_init", [False, True])
def test_a_callback_ends_the_steps(pipe, name, free_init):
    """Those of the other rounds of FreeInit, too; what there is by then is decoded."""
    if free_init:
        pipe.enable_free_init(3)
    seen = []

    def stop(pipe, step, t, tensors):
        seen.append(tensors["latents"].clone())
        setattr(pipe, name, step == 2)
        return tensors

    frames = video(pipe, callback_on_step_end=stop, output_type="latent")
    assert len(seen) == 3 and (frames == seen[-1]).all() and pipe.interrupt
    seen.clear()
    assert video(pipe, callback=lambda step, *_: setattr(pipe, name, True)).shape == (1, 3, 16, 16, 3)
    seen = []
    assert video(pipe, callback=lambda *_: seen.append(0)).std() > 0 and len(seen) == (18 if free_init else 6)


# Somebody used to another library -----------------------------------------------------------------------------------


class Theirs:
    """As a class of another library looks from here."""

    def __init_subclass__(cls, module: str):
        cls.__module__ = module


class UNet3DConditionModel(Theirs, module="diffusers.models.unets.unet_3d_condition"):
    pass


class CLIPTokenizer(Theirs, module="transformers.models.clip.tokenization_clip"):
    pass


class EulerDiscreteScheduler(Theirs, module="diffusers.schedulers.scheduling_euler_discrete"):
    pass


class MotionAdapterOfTheirs(Theirs, module="diffusers.models.unets.unet_motion_model"):
    pass


MotionAdapterOfTheirs.__name__ = "MotionAdapter"

FOREIGN = [
    ("unet", UNet3DConditionModel, r"unet is a UNet3DConditionModel of diffusers.*minit2v.UNet3DConditionModel.from"),
    ("tokenizer", CLIPTokenizer, r"tokenizer is a CLIPTokenizer of transformers.*minit2v.CLIPTokenizer.from_pre"),
    ("scheduler", EulerDiscreteScheduler, r"scheduler is a EulerDiscreteScheduler of diffusers.*minit2v.schedulers.*"
                                          r"EulerDiscreteScheduler.from_config\(scheduler.config\)"),
    ("vae", str, "vae must be a AutoencoderKL, not a str"),
    ("vae", PNDMScheduler, "vae must be a AutoencoderKL, not a PNDMScheduler"),
    ("scheduler", AutoencoderKL, "scheduler must be a scheduler, not a AutoencoderKL"),
]


@pytest.mark.parametrize(("name", "cls", "says"), FOREIGN, ids=[f"{n}-{c.__name__}" for n, c, _ in FOREIGN])
def test_parts_of_another_library_are_refused_by_name(pipe, name, cls, says):
    part = cls()
    for give in (lambda: TextToVideoSDPipeline(**pipe.components | {name: part}),
                 lambda: TextToVideoSDPipeline.from_pipe(pipe, **{name: part}), lambda: setattr(pipe, name, part)):
        with pytest.raises(TypeError, match=says) as caught:
            give()
        assert "\n" not in str(caught.value)


def test_a_motion_adapter_of_another_library():
    with pytest.raises(TypeError, match="motion_adapter is a MotionAdapter of diffusers.*minit2v.MotionAdapter.from"):
        AnimateDiffPipeline(None, None, None, None, MotionAdapterOfTheirs(), None)
    with pytest.raises(TypeError, match="of diffusers.*minit2v.UNet2DConditionModel.from_pretrained"):
        AnimateDiffPipeline(None, None, None, UNet3DConditionModel(), None, None)
    with pytest.raises(TypeError, match="motion_adapter must be a MotionAdapter of minit2v, not a MotionAdapter of di"):
        UNetMotionModel.from_unet2d(UNet2DConditionModel(**IMAGE), MotionAdapterOfTheirs())
    with pytest.raises(TypeError, match="unet must be a UNet2DConditionModel, not a UNet3DCond"):
        UNetMotionModel.from_unet2d(UNet3DConditionModel())
    with pytest.raises(TypeError, match="unet must be a UNet2DConditionModel or UNetMotionModel, not a function"):
        AnimateDiffPipeline(None, None, None, lambda x: x, None, None)


def test_a_compiled_motion_adapter_is_taken_out_of_it():
    unet, adapter = UNet2DConditionModel(**IMAGE), MotionAdapter(**MOTION)
    made = AnimateDiffPipeline(None, None, None, unet, torch.compile(adapter, backend="eager"), None)
    assert made.motion_adapter is adapter and isinstance(made.unet, UNetMotionModel)


@pytest.mark.parametrize("method", ["enable_attention_slicing", "enable_xformers_memory_efficient_attention",
                                    "fuse_qkv_projections", "disable_attention_slicing", "unfuse_qkv_projections",
                                    "disable_xformers_memory_efficient_attention"])
def test_what_is_not_needed_says_so_in_a_line(pipe, caplog, method):
    with caplog.at_level(logging.WARNING):
        getattr(pipe, method)()
        if "slicing" not in method:
            pipe.unet.__getattribute__(method)(), pipe.vae.__getattribute__(method)()
    said = [r.getMessage().startswith(f"{method}() changes nothing") for r in caplog.records]
    assert said == [True] * (1 if "slicing" in method else 3)


def test_what_a_pipeline_lacks_is_named_with_the_nearest(pipe):
    with pytest.raises(AttributeError, match="TextToVideoSDPipeline has no 'enable_vae_slising' .nearest: 'enable_vae"):
        pipe.enable_vae_slising()
    with pytest.raises(AttributeError, match="AutoencoderKL has no 'enable_tilin' .nearest: 'enable_tiling'"):
        pipe.vae.enable_tilin()
    assert not hasattr(pipe.unet, "set_processor") and pipe.unet.conv_in is dict(pipe.unet.named_children())["conv_in"]
    assert not hasattr(pipe, "image_encoder") and getattr(pipe, "nothing", 3) == 3
    with pytest.raises(ValueError, match="has no networks"):
        TextToVideoSDPipeline(None, None, None, None, None).device  # noqa: B018  a property that says what it lacks


@pytest.mark.parametrize(("cls", "points_to"), [(VideoToVideoSDPipeline, "TextToVideoSDPipeline"),
                                                (AnimateDiffVideoToVideoPipeline, "AnimateDiffPipeline")])
def test_num_frames_of_a_video_points_to_the_other_pipeline(cls, points_to):
    with pytest.raises(TypeError, match=rf"no argument 'num_frames'.*; .*{points_to}\.from_pipe\(pipe\)"):
        cls(**dict.fromkeys(cls.COMPONENTS))("a cat", num_frames=8)


def test_long_prompt_embeds_ask_for_negative_ones(pipe):
    most, width = pipe.text_encoder.config.max_position_embeddings, pipe.unet.config.cross_attention_dim
    long = torch.randn(1, 2 * most, width)
    with pytest.raises(ValueError, match=f"give negative_prompt_embeds of {2 * most} tokens.*reads {most} tokens"):
        pipe(prompt_embeds=long, **FAST)
    assert pipe(prompt_embeds=long, negative_prompt_embeds=long * 0, **FAST).frames.std() > 0
    assert pipe(prompt_embeds=long, guidance_scale=1.0, **FAST).frames.std() > 0
    bare = TextToVideoSDPipeline(pipe.vae, None, None, pipe.unet, pipe.scheduler)
    with pytest.raises(ValueError, match="give negative_prompt_embeds.*there is no text encoder"):
        bare(prompt_embeds=long, **FAST)


def test_a_motion_adapter_in_another_place(pipe):
    with pytest.raises(TypeError, match="unet must be a UNet3DConditionModel, not a MotionAdapter"):
        pipe.unet = MotionAdapter(block_out_channels=(32,), motion_norm_num_groups=8, motion_num_attention_heads=4)
