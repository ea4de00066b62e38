"""The embedded models: they are small, they are whole, and they show what they are told."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import minit2v
from minit2v import AnimateDiffPipeline, DiffusionPipeline, MotionAdapter, schedulers
from minit2v.cli import main
from minit2v.cli.videos import PRESETS
from minit2v.training import animate, shapes, world
from minit2v.utils import load_video

ASSETS = Path(minit2v.__file__).parent / "assets"
FOLDER = ASSETS / "shapes"
SIX = [  # they change every colour, shape and motion
    ("red", "circle", "right"),
    ("blue", "square", "growing"),
    ("green", "triangle", "up"),
    ("yellow", "circle", "shrinking"),
    ("white", "square", "left"),
    ("magenta", "triangle", "down"),
]


@pytest.fixture(scope="module")
def pipe():
    pipe = DiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def animated():
    adapter = MotionAdapter.from_pretrained(ASSETS / "shapes-motion")
    pipe = AnimateDiffPipeline.from_pretrained(ASSETS / "shapes-image", motion_adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, combinations, preset="shapes"):
    settings = PRESETS[preset]
    videos = pipe(
        [world.captions(*c)[0] for c in combinations],
        num_frames=settings["num_frames"],
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance_scale"],
        generator=[torch.Generator().manual_seed(n) for n in range(len(combinations))],
        output_type="pt",
    ).frames
    return videos.transpose(1, 2)  # (b c f h w)


def test_it_takes_at_most_12_mib():
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) <= 12 * 2**20


def test_it_is_what_the_trainer_trains(pipe):
    tokenizer = shapes.make_tokenizer()
    texts = [c for combination in world.COMBINATIONS[::7] for c in world.captions(*combination)]
    assert torch.equal(pipe.tokenizer(texts), tokenizer(texts))
    for network, config in ((pipe.unet, shapes.UNET), (pipe.vae, shapes.VAE), (pipe.text_encoder, shapes.TEXT)):
        for name, value in config.items():
            assert getattr(network.config, name) == value, name
    made = shapes.make_scheduler().config
    assert all(pipe.scheduler.config[name] == made[name] for name in made if not name.startswith("_"))


def test_it_shows_what_it_is_told(pipe):
    """benchmarks/shapes_accuracy.py measures all 108; here are six, that change every colour, shape and motion."""
    check_six([world.analyse(v) for v in generate(pipe, SIX)])


def check_six(seen):
    for axis in range(3):
        right = sum(s[axis] == c[axis] for s, c in zip(seen, SIX, strict=True))
        assert right >= 5, (seen, SIX)  # all six, where this was written


# Down from noise, for models that know timesteps.
SOLVERS = [name for name in schedulers.__all__ if "EDM" not in name and name != "DDIMInverseScheduler"]


@pytest.mark.parametrize("model", ["pipe", "animated"])
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_makes_a_right_video(name, model, request, monkeypatch):
    """In 5 calls of the network (PNDM: 14). benchmarks/solvers.py --shapes counts more videos, at 3 to 20 calls."""
    pipe, solver, asked = request.getfixturevalue(model), getattr(schedulers, name), ("white", "square", "left")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is missing from the models' configs
        monkeypatch.setattr(pipe, "scheduler", solver.from_config(pipe.scheduler.config))
        video = pipe(
            world.captions(*asked)[0],
            num_frames=world.FRAMES,
            num_inference_steps=3 if solver.order == 2 else 5,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(4),
            output_type="pt",
        ).frames[0]
    assert world.analyse(video.transpose(0, 1)) == asked


def test_its_videos_follow_the_seed_and_the_words(pipe):
    """Nothing is drawn: other noise is another video, and other words with the same noise, too."""
    red = ("red", "circle", "right")
    a, b = generate(pipe, [red, red])  # seeds 0 and 1
    again = generate(pipe, [red])[0]
    other = generate(pipe, [("red", "circle", "down")])[0]
    torch.testing.assert_close(a, again, rtol=0, atol=1e-4)
    assert (a - b).abs().mean() > 1e-3 and (a - other).abs().mean() > 1e-3


def test_the_image_model_and_its_adapter_take_at_most_12_mib():
    folders = ASSETS / "shapes-image", ASSETS / "shapes-motion"
    assert sum(p.stat().st_size for f in folders for p in f.rglob("*") if p.is_file()) <= 12 * 2**20


def test_they_are_what_the_trainer_trains(animated):
    for network, config in ((animated.motion_adapter, animate.MOTION), (animated.vae, shapes.VAE)):
        for name, value in config.items():
            assert getattr(network.config, name) == value, name
    image = minit2v.UNet2DConditionModel.from_pretrained(ASSETS / "shapes-image", subfolder="unet")
    for name, value in animate.IMAGE.items():
        assert getattr(image.config, name) == value, name


def test_the_animated_image_model_shows_what_it_is_told(animated):
    check_six([world.analyse(v) for v in generate(animated, SIX, "shapes-image")])


def test_without_its_adapter_the_image_model_does_not_move_anything(animated):
    """Frame by frame it draws the right thing, each time at another place: motion is what the adapter brings."""
    still = minit2v.UNet2DConditionModel.from_pretrained(ASSETS / "shapes-image", subfolder="unet")
    fresh = MotionAdapter(**animate.MOTION)
    pipe = AnimateDiffPipeline.from_pretrained(ASSETS / "shapes-image", unet=still, motion_adapter=fresh)
    pipe.set_progress_bar_config(disable=True)
    videos = generate(pipe, [("red", "circle", "right"), ("white", "square", "left")], "shapes-image")
    seen = [world.analyse(v) for v in videos]
    assert [s[0] for s in seen] == ["red", "white"]
    light = videos.amax(1)  # b f h w
    jumps = (light[:, 1:] - light[:, :-1]).abs().mean((1, 2, 3))
    moving = generate(animated, [("red", "circle", "right"), ("white", "square", "left")], "shapes-image").amax(1)
    assert (jumps > 2 * (moving[:, 1:] - moving[:, :-1]).abs().mean((1, 2, 3))).all()


def test_the_command_line_animates_without_a_download(tmp_path):
    path = tmp_path / "square.gif"
    assert main(["animate", "a blue square growing", "--seed", "0", "-o", str(path)]) == 0
    frames = [torch.from_numpy(np.array(image)) for image in load_video(str(path))]
    video = torch.stack(frames).permute(3, 0, 1, 2) / 255  # c f h w
    assert world.analyse(video) == ("blue", "square", "growing")
