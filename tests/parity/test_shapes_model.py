"""The embedded model's folder loads in diffusers, which makes the same video of it."""

from pathlib import Path

import diffusers
import numpy as np
import torch

import minit2v


def test_the_embedded_model_gives_the_same_video_in_diffusers():
    folder = Path(minit2v.__file__).parent / "assets" / "shapes"
    ours = minit2v.DiffusionPipeline.from_pretrained(folder)
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
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
