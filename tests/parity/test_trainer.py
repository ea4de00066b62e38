"""A step of the trainer against diffusers' networks and scheduler and torch's optimizer, every parameter random."""

import json

import diffusers
import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from minit2v import AnimateDiffPipeline, DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel, UNetMotionModel
from minit2v.training.optimizer import Average
from minit2v.training.recipe import Recipe
from minit2v.training.trainer import Piece, Trainer

SMALL = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 12,
         "sample_size": 4}  # fmt: skip
BETAS = {"beta_start": 0.00085, "beta_end": 0.012}


class Clips:
    """Random latents in the place of a data set."""

    fingerprint = "random"

    def __init__(self):
        noise = torch.Generator().manual_seed(1)
        self.latents = torch.randn(4, 4, 3, 4, 4, generator=noise)
        self.text = torch.randn(4, 5, 12, generator=noise)

    def __len__(self):
        return 4

    def batch(self, step, batch):
        return [*range(batch)]

    def load(self, items):
        return Piece(self.latents[items], self.text[items], ["clip"] * len(items), items)


def pair(randomize_, family):
    if family == "3D":
        fields = {"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "attention_head_dim": 8,
                  "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")}  # fmt: skip
        peer, cls, pipe = diffusers.UNet3DConditionModel, UNet3DConditionModel, TextToVideoSDPipeline
    else:
        fields = {"down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "num_attention_heads": 2,
                  "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"), "motion_num_attention_heads": 2}
        peer, cls, pipe = diffusers.UNetMotionModel, UNetMotionModel, AnimateDiffPipeline
    peer = randomize_(peer(**SMALL, **fields)).double().eval()  # eval: without the dropout of the temporal convolutions
    more = {} if family == "3D" else {"compat": "diffusers"}
    ours = cls.from_config(json.loads(peer.to_json_string()), **more).double()
    ours.load_state_dict(ours.layout.to_ours(peer.state_dict()), strict=True)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", **BETAS)
    parts = (None, None, None, ours, *((None,) if family == "motion" else ()), scheduler)
    return peer, pipe(*parts)


@pytest.mark.parametrize("family", ["3D", "motion"])
def test_a_step_is_that_of_diffusers_and_torch(randomize_, tmp_path, family):
    peer, pipe = pair(randomize_, family)
    recipe = Recipe(data=("clips",), out=tmp_path, train="full", steps=9, batch=4, accumulate=2, learning_rate=1e-3,
                    warmup=0, weight_decay=0.1, max_grad_norm=0.5, ema=0.0, temporal_dropout=0.0,
                    validate_every=0)  # fmt: skip
    trainer, data = Trainer(pipe, Clips(), recipe, say=lambda _: None), Clips()
    optimizer = torch.optim.AdamW(peer.parameters(), 1e-3, weight_decay=0.1)
    # Motion modules are trained with linear betas behind an image model of Stable Diffusion.
    betas = "scaled_linear" if family == "3D" else "linear"
    scheduler = diffusers.DDPMScheduler(beta_schedule=betas, **BETAS)
    for step in range(2):
        values = trainer.step()
        numbers = [4 * step + row for row in range(4)]
        noisy, t, _, eps = trainer.objective.noised(data.latents.double(), 0, numbers)
        theirs = scheduler.add_noise(data.latents.double(), eps, t)  # their noise levels are float32
        assert (noisy - theirs).abs().max() <= 1e-5
        text = data.text.double()
        text = text if family == "3D" else text.repeat_interleave(3, 0)  # once for each frame
        loss = (peer(noisy, t, text).sample - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(peer.parameters(), 0.5)
        assert values["loss"] == pytest.approx(loss.item(), rel=1e-10)
        assert values["norm"] == pytest.approx(norm.item(), rel=1e-10) and norm > 0.5
        optimizer.step()
    theirs = pipe.unet.layout.to_ours(peer.state_dict())
    for name, p in pipe.unet.named_parameters():
        assert (p - theirs[name]).abs().max() <= 1e-10, name


def test_the_average_is_that_of_diffusers():
    p = nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(0)))
    ours, theirs = Average([p], 0.95), EMAModel([p], decay=0.95, use_ema_warmup=False)
    for n in range(40):
        with torch.no_grad():
            p += 0.1 * (-1) ** n * torch.randn(5, generator=torch.Generator().manual_seed(n))
        ours.update()
        theirs.step([p])
    torch.testing.assert_close(ours.values[0], theirs.shadow_params[0], rtol=0, atol=1e-6)
