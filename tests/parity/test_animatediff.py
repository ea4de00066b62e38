"""AnimateDiff's pipelines against diffusers', from the same folders, every parameter random: frames agree to 1e-4."""

import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import minit2v.schedulers
from minit2v import AnimateDiffPipeline, AnimateDiffVideoToVideoPipeline, MotionAdapter, UNetMotionModel

TOLERANCE = 1e-4
CALL = dict(num_inference_steps=2, height=16, width=24, guidance_scale=4.0, output_type="np")
SCHEDULERS = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "PNDMScheduler",
)
# Every solver with one version, and one or two with the others: what the versions differ in does not touch the solvers.
ALL = [("v1-5-2", name) for name in SCHEDULERS] + [("v1-5", "DDIMScheduler"), ("v1-5-3", "EulerDiscreteScheduler")]
# The versions of the published adapters, with different numbers of layers: motion modules per level, and what the image
# model has to have for them.
LAYOUTS = {
    "v1-5": (dict(motion_layers_per_block=2, motion_num_attention_heads=8), 2),
    "v1-5-2": (dict(motion_layers_per_block=1, motion_transformer_layers_per_block=2), 1),
    "v1-5-3": (dict(motion_layers_per_block=[2, 1]), [2, 1]),
}


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def make_pipes(tmp_path_factory, make_official_folder, make_adapter_folder):
    """make_pipes(version) -> ours and theirs, each from the same two folders by its own code."""
    made = {}

    def make(version):
        if version in made:
            return made[version]
        fields, layers = LAYOUTS[version]
        folder = tmp_path_factory.mktemp(version)
        base = make_official_folder(folder / "sd15", repo="sd15", small=True, unet=dict(layers_per_block=layers))
        adapter = make_adapter_folder(folder, version, **fields)
        ours = AnimateDiffPipeline.from_pretrained(
            base, motion_adapter=MotionAdapter.from_pretrained(adapter), compat="diffusers"
        )
        theirs = diffusers.AnimateDiffPipeline.from_pretrained(
            base, motion_adapter=diffusers.MotionAdapter.from_pretrained(adapter), feature_extractor=None
        )
        made[version] = quiet(ours), quiet(theirs)
        return made[version]

    return make


@pytest.fixture(params=list(LAYOUTS))
def version(request):
    return request.param


@pytest.fixture
def pipes(make_pipes):
    """Of one version, for what has nothing to do with the networks."""
    return make_pipes("v1-5-2")


def to_v2v(pipes):
    ours, theirs = pipes
    return (quiet(AnimateDiffVideoToVideoPipeline.from_pipe(ours)),
            quiet(diffusers.AnimateDiffVideoToVideoPipeline(**theirs.components)))


@pytest.fixture
def v2v(pipes):
    return to_v2v(pipes)


def use(pipes, name, **config):
    ours, theirs = pipes
    base = {"beta_schedule": "linear", "clip_sample": False, "steps_offset": 1, "skip_prk_steps": True}
    ours.scheduler = getattr(minit2v.schedulers, name).from_config(base, **config)
    theirs.scheduler = getattr(diffusers, name).from_config(base, **config)


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return generators if len(generators) > 1 else generators[0]


def assert_same(pipes, *seeds, **call):
    call = CALL | dict(prompt="a cat", negative_prompt="dog!") | call
    ours, theirs = (p(**call, generator=seeded(*(seeds or (0,)))).frames for p in pipes)
    assert ours.shape == theirs.shape and ours.std() > 0.05  # frames with something in them
    assert 0.02 < ((ours > 0.001) & (ours < 0.999)).mean()  # and not all clipped
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    return ours


def some_video(frames=3, height=16, width=24, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def images(video):
    return [Image.fromarray(f) for f in video]


# Text to video ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "name"), ALL)
def test_text_to_video(make_pipes, version, name):
    pipes = make_pipes(version)
    use(pipes, name)
    assert_same(pipes, num_frames=3, num_inference_steps=3)


def test_as_many_frames_as_there_are_positions(make_pipes, version):
    pipes = make_pipes(version)
    use(pipes, "DDIMScheduler", timestep_spacing="linspace")
    most = pipes[0].unet.config.motion_max_seq_length
    assert most == (24 if version == "v1-5" else 32)
    assert_same(pipes, num_frames=most, num_inference_steps=2)
    assert_same(pipes, num_frames=1, num_inference_steps=2, guidance_scale=1.0)


def test_without_the_mode_other_frames(make_pipes, version):
    """What the mode changes in the networks shows in the frames."""
    ours, theirs = make_pipes(version)
    norms = dict(motion_norms="frame", resnet_norms="video" if version == "v1-5" else "frame")
    right = UNetMotionModel(ours.unet.config, **norms)
    right.load_state_dict(ours.unet.state_dict())
    right = quiet(AnimateDiffPipeline(**ours.components | {"unet": right.eval()}))
    use((right, theirs), "DDIMScheduler")
    a, b = (p("a cat", num_frames=3, **CALL, generator=seeded(0)).frames for p in (right, theirs))
    assert np.abs(a - b).max() > 10 * TOLERANCE


def test_prompts(pipes):
    use(pipes, "DDIMScheduler")
    call = dict(num_frames=3)
    one = assert_same(pipes, **call)
    assert_same(pipes, **call, negative_prompt=None)
    assert_same(pipes, **call, prompt=["a cat", "two dogs"], negative_prompt=["", "cat"])
    assert_same(pipes, 1, 2, **call, prompt=["a cat", "two dogs"], negative_prompt=["", "cat"], eta=0.7)
    text, negative = (p.encode_prompt("a cat", "cpu", 1, True, "dog!") for p in pipes)
    for a, b in zip(text, negative, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    by_states = assert_same(pipes, **call, prompt=None, negative_prompt=None, prompt_embeds=text[0],
                            negative_prompt_embeds=text[1])
    np.testing.assert_allclose(by_states, one, atol=1e-6)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_latents_and_outputs(pipes, name):
    use(pipes, name)
    noise = torch.randn(1, 4, 3, 8, 12, generator=seeded(5))
    assert_same(pipes, num_frames=3, latents=noise)
    assert_same(pipes, num_frames=3, decode_chunk_size=2)
    call = CALL | dict(prompt="a cat", num_frames=3)
    ours, theirs = (p(**call | dict(output_type="latent"), generator=seeded(0)).frames for p in pipes)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * theirs.abs().max().item())
    ours, theirs = (p(**call | dict(output_type="pil"), generator=seeded(0)).frames for p in pipes)
    difference = [np.abs(np.asarray(a, int) - np.asarray(b, int)) for a, b in zip(ours[0], theirs[0], strict=True)]
    assert np.max(difference) <= 1


# Video to video -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "name"), ALL)
def test_video_to_video(make_pipes, version, name):
    pipes = to_v2v(make_pipes(version))
    use(pipes, name)
    video = images(some_video())
    for strength in (1.0, 0.7):
        assert_same(pipes, video=video, strength=strength, num_inference_steps=3)
    assert_same(pipes, video=video, strength=0.5, enforce_inference_steps=True, num_inference_steps=3)


def test_forms_of_a_video(v2v):
    """All are brought to the size asked for: images by Lanczos, arrays and tensors in the mode by nearest neighbour."""
    use(v2v, "DDIMScheduler")
    pixels = some_video()
    floats = (pixels / 255).astype(np.float32)
    tensor = torch.from_numpy(floats).permute(0, 3, 1, 2)
    for video in (images(pixels), [images(pixels)], floats, floats[None], list(floats), tensor, tensor[None]):
        assert_same(v2v, video=video, strength=0.5)
    for video in (images(pixels), floats, tensor):
        assert_same(v2v, video=video, strength=0.5, height=24, width=16)


def test_default_size(v2v):
    use(v2v, "DDIMScheduler")
    frames = assert_same(v2v, video=images(some_video()), strength=0.5, height=None, width=None)
    assert frames.shape == (1, 3, 16, 16, 3)  # the UNet's, not the video's


def test_videos_and_prompts_in_batches(v2v):
    use(v2v, "DDIMScheduler")
    video = [images(some_video(seed=s)) for s in (1, 2)]
    call = dict(video=video, prompt=["a cat", "two dogs"], negative_prompt=["", "cat"], strength=0.5)
    assert_same(v2v, 1, **call)
    assert_same(v2v, 1, 2, **call, eta=0.7)
    assert_same(v2v, 1, 2, **call, decode_chunk_size=2)


def test_latents_in_place_of_a_video(v2v):
    use(v2v, "DDIMScheduler")
    latents = torch.randn(1, 4, 3, 8, 12, generator=seeded(5))
    assert_same(v2v, latents=latents, strength=0.5)
    assert_same(v2v, latents=latents, strength=0.5, enforce_inference_steps=True)


@pytest.mark.parametrize("enforce", [False, True])
def test_a_grid_of_the_callers_own(v2v, enforce):
    video = images(some_video())
    call = dict(video=video, strength=0.6, enforce_inference_steps=enforce)
    for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
        use(v2v, name)
        assert_same(v2v, **call, timesteps=[900, 700, 400, 150, 20])
    use(v2v, "EulerDiscreteScheduler")
    assert_same(v2v, **call, sigmas=[12.0, 5.0, 2.0, 0.9, 0.3, 0.0])


# Folders --------------------------------------------------------------------------------------------------------------


def test_what_we_save_they_load(pipes, tmp_path):
    ours, _ = pipes
    for cls in (AnimateDiffPipeline, AnimateDiffVideoToVideoPipeline):
        cls.from_pipe(ours).save_pretrained(tmp_path / cls.__name__)
        index = json.loads((tmp_path / cls.__name__ / "model_index.json").read_text())
        assert index["image_encoder"] == index["feature_extractor"] == [None, None]
        theirs = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path / cls.__name__))
        assert type(theirs) is getattr(diffusers, cls.__name__)
    theirs = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "AnimateDiffPipeline"))
    use((ours, theirs), "DDIMScheduler")
    assert_same((ours, theirs), num_frames=3)


def test_what_they_save_we_load(make_pipes, version, tmp_path):
    """A whole AnimateDiff folder; the class is in its index."""
    _, theirs = make_pipes(version)
    theirs.save_pretrained(tmp_path, safe_serialization=version != "v1-5")
    ours = quiet(minit2v.DiffusionPipeline.from_pretrained(tmp_path, compat="diffusers"))
    assert type(ours) is AnimateDiffPipeline
    use((ours, theirs), "DDIMScheduler")
    assert_same((ours, theirs), num_frames=3)
