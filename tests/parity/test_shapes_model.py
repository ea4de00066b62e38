"""The embedded models' folders load in diffusers, which makes the same videos of them."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

import minit2v

ASSETS = Path(minit2v.__file__).parent / "assets"


def test_the_embedded_model_gives_the_same_video_in_diffusers():
    folder = ASSETS / "shapes"
    check_same(
        minit2v.DiffusionPipeline.from_pretrained(folder),
        diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32),
    )


def test_the_image_model_and_its_adapter_give_the_same_video_in_diffusers():
    """`compat`: diffusers normalises over the clip, which is not what the adapter was trained with."""
    check_same(*animated())


def test_the_motion_lora_gives_the_same_video_in_diffusers():
    pytest.importorskip("peft")
    pipes = animated()
    for pipe in pipes:
        pipe.load_lora_weights(str(ASSETS / "shapes-orbit"))
    check_same(*pipes)


def animated():
    pipes = []
    for library, extra in ((minit2v, {"compat": "diffusers"}), (diffusers, {})):
        adapter = library.MotionAdapter.from_pretrained(ASSETS / "shapes-motion", torch_dtype=torch.float32)
        load = library.AnimateDiffPipeline.from_pretrained
        pipes.append(load(ASSETS / "shapes-image", motion_adapter=adapter, torch_dtype=torch.float32, **extra))
    return pipes


def check_same(ours, theirs):
    frames = []
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(7)
        frames.append(
            pipe(
                "a blue square growing",
                num_frames=16,
                num_inference_steps=5,
                guidance_scale=1.5,
                generator=generator,
                output_type="np",
            ).frames
        )
    assert frames[0].shape == (1, 16, 64, 64, 3) and frames[0].max() > 0.5
    np.testing.assert_allclose(*frames, rtol=0, atol=1e-3)
