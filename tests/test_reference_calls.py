"""The calls of the reference's text-to-video and AnimateDiff pages, on small folders of the same layout."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from minit2v import (
    AnimateDiffPipeline,
    AnimateDiffVideoToVideoPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    MotionAdapter,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
    VideoToVideoSDPipeline,
)
from minit2v.utils import export_to_gif, export_to_video, load_video

PROMPT = "Spiderman is surfing"
STEPS = dict(num_inference_steps=2)  # in place of 25 and 40


@pytest.fixture(scope="module")
def modelscope(tmp_path_factory, make_official_folder):
    """damo-vilab/text-to-video-ms-1.7b: fp16 variant files beside the configs."""
    folder = make_official_folder(tmp_path_factory.mktemp("ms"), repo="ms-1.7b", variant="fp16", small=True)
    assert (folder / "unet/diffusion_pytorch_model.fp16.safetensors").is_file()
    return folder


@pytest.fixture(scope="module", params=["zeroscope_v2_576w", "zeroscope_v2_XL"])
def zeroscope(request, tmp_path_factory, make_official_folder):
    """cerspense's repositories: no safetensors, `.bin` files of half precision without a variant in their names."""
    folder = make_official_folder(tmp_path_factory.mktemp("zs"), repo=request.param, small=True)
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (folder / part).glob("*.safetensors")
        name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
        torch.save({k: v.half() for k, v in load_file(file).items()}, folder / part / name)
        file.unlink()
    return folder


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def half(folder, cls=DiffusionPipeline, **kw):
    """As on the page, in float16; what follows is in float32 where a CPU computes, which is slow in float16."""
    pipe = cls.from_pretrained(folder, torch_dtype=torch.float16, **kw)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float16}
    pipe.set_progress_bar_config(disable=True)
    return pipe if DEVICE == "cuda" else pipe.to(torch.float32)


def test_float16(modelscope):
    pipe = DiffusionPipeline.from_pretrained(modelscope, torch_dtype=torch.float16, variant="fp16").to(DEVICE)
    assert pipe(PROMPT, num_frames=2, num_inference_steps=1).frames.shape == (1, 2, 16, 16, 3)


@pytest.mark.parametrize("cls", [DiffusionPipeline, TextToVideoSDPipeline])
def test_modelscope_page(modelscope, cls, tmp_path):
    pipe = half(modelscope, cls, variant="fp16")
    assert type(pipe) is TextToVideoSDPipeline
    pipe = pipe.to(DEVICE)
    video_frames = pipe(PROMPT, **STEPS, num_frames=4).frames
    assert export_to_video(video_frames).endswith(".mp4")  # the page of 0.26: a batch of one
    video_frames = pipe(PROMPT, **STEPS, num_frames=4).frames[0]
    path = export_to_video(video_frames, output_video_path="./x.mp4")
    assert (tmp_path / path).samefile(tmp_path / "x.mp4")


def test_optimised_for_memory(modelscope):
    pipe = half(modelscope, variant="fp16")
    pipe.enable_model_cpu_offload()
    pipe.enable_vae_slicing()
    pipe.vae.enable_slicing()
    assert pipe(PROMPT, num_frames=64, num_inference_steps=1).frames[0].shape == (64, 16, 16, 3)


def test_another_scheduler(modelscope):
    pipe = half(modelscope, variant="fp16")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert pipe.scheduler.config.beta_start == 0.00085  # the published values, not the class's defaults
    pipe.enable_model_cpu_offload()
    assert pipe(PROMPT, num_inference_steps=25, num_frames=2).frames.shape[1] == 2


def test_zeroscope_page(zeroscope):
    pipe = half(zeroscope)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.enable_model_cpu_offload()
    pipe.unet.enable_forward_chunking(chunk_size=1, dim=1)
    pipe.enable_vae_slicing()
    video_frames = pipe(PROMPT, **STEPS, height=32, width=56, num_frames=6).frames[0]
    assert video_frames.shape == (6, 32, 56, 3)
    assert export_to_video(video_frames)


def test_zeroscope_xl(zeroscope):
    """The index names the text pipeline; the page calls what it got with a video."""
    pipe = half(zeroscope)
    frames = pipe(PROMPT, **STEPS, height=32, width=56, num_frames=3).frames[0]
    pipe.to("cpu")
    pipe = half(zeroscope, revision="refs/pr/15")  # means nothing to a local folder
    video = [Image.fromarray((frame * 255).astype("uint8")).resize((64, 40)) for frame in frames]
    with pytest.raises(TypeError, match=r"VideoToVideoSDPipeline\.from_pipe\(pipe\)"):
        pipe(PROMPT, video=video, strength=0.6)
    for v2v in (VideoToVideoSDPipeline.from_pipe(pipe), half(zeroscope, VideoToVideoSDPipeline)):
        pipe = v2v
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        pipe.enable_model_cpu_offload()
        pipe.vae.enable_slicing()
        video_frames = pipe(PROMPT, video=video, strength=0.6, num_inference_steps=4).frames[0]
        assert video_frames.shape == (3, 40, 64, 3)


def test_encode_prompt_and_tiling(modelscope):
    pipe = DiffusionPipeline.from_pretrained(modelscope, variant="fp16")
    text, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True, "blurry")
    assert text.shape == negative.shape and text.dtype == torch.float32
    pipe.enable_vae_tiling()
    pipe.disable_vae_tiling()
    pipe.disable_vae_slicing()


# AnimateDiff -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_id(tmp_path_factory, make_official_folder):
    """An image model of Stable Diffusion 1.5: a folder of another pipeline, with the scheduler file of PNDM."""
    return make_official_folder(tmp_path_factory.mktemp("sd15"), repo="sd15", small=True)


@pytest.fixture(scope="module", params=["v1-5", "v1-5-2", "v1-5-3"])
def adapter_id(request, tmp_path_factory, make_adapter_folder):
    """guoyww/animatediff-motion-adapter-...: version 1, 2 and 3."""
    return make_adapter_folder(tmp_path_factory.mktemp("adapters"), request.param)


@pytest.fixture(scope="module")
def adapter_v2(tmp_path_factory, make_adapter_folder):
    return make_adapter_folder(tmp_path_factory.mktemp("adapters"), "v1-5-2")


ASKED = dict(prompt="masterpiece, bestquality, sunset, orange sky", negative_prompt="bad quality, worse quality",
             guidance_scale=7.5)


def test_animatediff_page(model_id, adapter_id, tmp_path):
    adapter = MotionAdapter.from_pretrained(adapter_id, torch_dtype=torch.float16)
    assert adapter.dtype == torch.float16
    pipe = half(model_id, AnimateDiffPipeline, motion_adapter=adapter)
    scheduler = DDIMScheduler.from_pretrained(
        model_id, subfolder="scheduler", clip_sample=False, timestep_spacing="linspace", beta_schedule="linear",
        steps_offset=1,
    )  # fmt: skip
    assert scheduler.config.beta_start == 0.00085 and scheduler.config.beta_schedule == "linear"
    pipe.scheduler = scheduler
    pipe.enable_vae_slicing()
    pipe.enable_model_cpu_offload()
    output = pipe(**ASKED, num_frames=16, **STEPS, generator=torch.Generator("cpu").manual_seed(42))
    frames = output.frames[0]
    assert len(frames) == 16 and all(isinstance(f, Image.Image) for f in frames)
    path = export_to_gif(frames, "animation.gif")
    assert len(load_video(str(tmp_path / path))) > 1


def test_animatediff_with_25_steps(model_id, adapter_v2):
    """The adapter without a dtype, the scheduler made by hand, the pipeline moved."""
    adapter = MotionAdapter.from_pretrained(adapter_v2)
    pipe = half(model_id, AnimateDiffPipeline, motion_adapter=adapter).to(DEVICE)
    pipe.scheduler = DDIMScheduler(beta_schedule="linear", steps_offset=1, clip_sample=False)
    pipe.enable_vae_slicing()
    pipe.enable_vae_tiling()
    output = pipe(**ASKED, num_frames=16, num_inference_steps=25, generator=torch.Generator("cpu").manual_seed(42))
    assert len(output.frames[0]) == 16


def test_animatediff_video_to_video_page(model_id, adapter_v2):
    made = [Image.new("RGB", (48, 32), (40 * n, 90, 200 - 30 * n)) for n in range(4)]
    video = load_video(export_to_gif(made, "input.gif"))
    assert len(video) == 4 and isinstance(video[0], Image.Image)
    adapter = MotionAdapter.from_pretrained(adapter_v2, torch_dtype=torch.float16)
    pipe = half(model_id, AnimateDiffVideoToVideoPipeline, motion_adapter=adapter).to(DEVICE)
    pipe.scheduler = DDIMScheduler.from_pretrained(
        model_id, subfolder="scheduler", clip_sample=False, timestep_spacing="linspace", beta_schedule="linear",
        steps_offset=1,
    )  # fmt: skip
    pipe.enable_vae_slicing()
    pipe.enable_model_cpu_offload()
    output = pipe(video=video, **ASKED, num_inference_steps=25, strength=0.5,
                  generator=torch.Generator("cpu").manual_seed(42))
    frames = output.frames[0]
    assert len(frames) == 4 and frames[0].size == (16, 16)
    export_to_gif(frames, "animation.gif")


def test_animatediff_with_free_init_and_free_u(model_id, adapter_v2):
    adapter = MotionAdapter.from_pretrained(adapter_v2)
    pipe = AnimateDiffPipeline.from_pretrained(model_id, motion_adapter=adapter, torch_dtype=torch.float16)
    pipe.set_progress_bar_config(disable=True)
    pipe = pipe.to(torch.float32) if DEVICE == "cpu" else pipe.to(DEVICE)
    pipe.scheduler = DDIMScheduler.from_pretrained(
        model_id, subfolder="scheduler", beta_schedule="linear", clip_sample=False, timestep_spacing="linspace",
        steps_offset=1,
    )  # fmt: skip
    pipe.enable_vae_slicing()
    pipe.enable_vae_tiling()
    calls = []
    pipe.unet.register_forward_hook(lambda m, args, out: calls.append(1))

    def frames():
        calls.clear()
        output = pipe(**ASKED, num_frames=4, num_inference_steps=6, generator=torch.Generator("cpu").manual_seed(666))
        return [f.tobytes() for f in output.frames[0]]

    plain = frames()
    pipe.enable_free_init(method="butterworth", use_fast_sampling=True)
    assert frames() != plain and len(calls) == 2 + 4 + 6
    pipe.disable_free_init()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert frames() != plain and len(calls) == 6
    pipe.disable_freeu()
    assert frames() == plain
    text, negative = pipe.encode_prompt(ASKED["prompt"], DEVICE, 1, True, ASKED["negative_prompt"])
    assert text.shape == negative.shape == (1, 77, 24)


def test_free_u_of_the_text_to_video_page(modelscope):
    pipe = half(modelscope, variant="fp16").to(DEVICE)
    generator = torch.Generator("cpu")
    plain, turned, again = (
        switch() or pipe(PROMPT, **STEPS, num_frames=2, generator=generator.manual_seed(0)).frames
        for switch in (lambda: None, lambda: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4), pipe.disable_freeu)
    )
    assert (plain != turned).any() and (plain == again).all()


# Adapters ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def motion_loras(model_id, adapter_v2):
    """guoyww/animatediff-motion-lora-...: as the hub names their tensors, in folders of their ids."""
    unet = UNetMotionModel.from_unet2d(UNet2DConditionModel.from_pretrained(model_id, subfolder="unet"),
                                       MotionAdapter.from_pretrained(adapter_v2))  # fmt: skip
    attentions = [n.removesuffix(".weight") for n in unet.diffusers_state_dict()
                  if ".motion_modules." in n and re.search(r"attn\d\.to_(q|k|v|out\.0)\.weight$", n)]  # fmt: skip
    state = unet.diffusers_state_dict()
    for seed, motion in enumerate(("zoom-out", "pan-left")):
        g, tensors = torch.Generator().manual_seed(seed), {}
        for name in attentions:
            block, leaf = name.removesuffix(".0").rsplit(".", 1)
            o, i = state[f"{name}.weight"].shape
            for role, shape in (("down", (4, i)), ("up", (o, 4))):
                key = f"unet.{block}.processor.{leaf}_lora.{role}.weight"
                tensors[key] = torch.randn(shape, generator=g) / 4
        folder = Path(f"guoyww/animatediff-motion-lora-{motion}")
        folder.mkdir(parents=True)
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors")


def animatediff(model_id, adapter_v2):
    adapter = MotionAdapter.from_pretrained(adapter_v2, torch_dtype=torch.float16)
    pipe = half(model_id, AnimateDiffPipeline, motion_adapter=adapter)
    pipe.scheduler = DDIMScheduler.from_pretrained(
        model_id, subfolder="scheduler", clip_sample=False, beta_schedule="linear", timestep_spacing="linspace",
        steps_offset=1,
    )  # fmt: skip
    return pipe


def animated(pipe):
    output = pipe(**ASKED, num_frames=4, **STEPS, generator=torch.Generator("cpu").manual_seed(42))
    return [f.tobytes() for f in output.frames[0]]


def test_motion_lora_of_the_animatediff_page(model_id, adapter_v2, motion_loras):
    plain = animated(animatediff(model_id, adapter_v2))
    pipe = animatediff(model_id, adapter_v2)
    pipe.load_lora_weights("guoyww/animatediff-motion-lora-zoom-out", adapter_name="zoom-out")
    pipe.enable_vae_slicing()
    pipe.enable_model_cpu_offload()
    assert animated(pipe) != plain and pipe.get_active_adapters() == ["zoom-out"]


def test_motion_loras_with_peft_of_the_animatediff_page(model_id, adapter_v2, motion_loras):
    pipe = animatediff(model_id, adapter_v2)
    pipe.load_lora_weights("guoyww/animatediff-motion-lora-zoom-out", adapter_name="zoom-out")
    one = animated(pipe)
    pipe.load_lora_weights("guoyww/animatediff-motion-lora-pan-left", adapter_name="pan-left")
    pipe.set_adapters(["zoom-out", "pan-left"], adapter_weights=[1.0, 1.0])
    pipe.enable_vae_slicing()
    pipe.enable_model_cpu_offload()
    both = animated(pipe)
    assert both != one and pipe.get_list_adapters() == {"unet": ["zoom-out", "pan-left"]}
    pipe.set_adapters(["zoom-out", "pan-left"], adapter_weights=[1.0, 0.0])
    assert animated(pipe) == one
    pipe.disable_lora()
    plain = animated(pipe)
    pipe.enable_lora()
    assert animated(pipe) == one != plain
    pipe.delete_adapters("pan-left")
    pipe.unload_lora_weights()
    assert animated(pipe) == plain


def test_animatelcm_of_the_animatediff_page(model_id, adapter_v2):
    adapter = MotionAdapter.from_pretrained(adapter_v2)
    pipe = AnimateDiffPipeline.from_pretrained(model_id, motion_adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, beta_schedule="linear")
    plain, weight = animated(pipe), pipe.unet.diffusers_state_dict()["conv_in.weight"]
    Path("wangfuyun/AnimateLCM").mkdir(parents=True)
    save_file({"lora_unet_conv_in.lora_down.weight": torch.randn(2, *weight.shape[1:]),
               "lora_unet_conv_in.lora_up.weight": torch.randn(len(weight), 2, 1, 1),
               "lora_unet_conv_in.alpha": torch.tensor(1.0)},
              "wangfuyun/AnimateLCM/AnimateLCM_sd15_t2v_lora.safetensors")  # fmt: skip
    pipe.load_lora_weights("wangfuyun/AnimateLCM", weight_name="AnimateLCM_sd15_t2v_lora.safetensors",
                           adapter_name="lcm-lora")  # fmt: skip
    pipe.set_adapters(["lcm-lora"], [0.8])
    pipe.enable_vae_slicing()
    assert animated(pipe) != plain


def test_textual_inversion_of_both_pages(modelscope):
    pipe = half(modelscope, variant="fp16")
    torch.save({"<cat-toy>": torch.randn(24)}, "learned_embeds.bin")
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.randn(2, 24)}, "name": "charturner",
                "step": 1, "sd_checkpoint": None, "sd_checkpoint_name": None}, "charturnerv2.pt")  # fmt: skip
    pipe.load_textual_inversion(".", weight_name="learned_embeds.bin")
    pipe.load_textual_inversion("./charturnerv2.pt", token="charturnerv2")
    pipe("A <cat-toy> backpack, charturnerv2", num_frames=2, **STEPS)
    pipe.unload_textual_inversion("<cat-toy>")
    pipe.unload_textual_inversion()
