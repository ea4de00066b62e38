"""Prior preservation by what the model said before it was trained."""

import pytest
import torch

from minit2v import DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel
from minit2v.training.recipe import Recipe
from minit2v.training.trainer import Piece, Trainer

UNET = {"block_out_channels": (16,), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 12,
        "down_block_types": ("CrossAttnDownBlock3D",), "up_block_types": ("CrossAttnUpBlock3D",),
        "attention_head_dim": 8}  # fmt: skip


class Clips:
    """Random latents in the place of a data set."""

    def __init__(self, seed: int):
        noise = torch.Generator().manual_seed(seed)
        self.latents, self.text = torch.randn(2, 4, 3, 4, 4, generator=noise), torch.randn(2, 5, 12, generator=noise)
        self.fingerprint = str(seed)

    def __len__(self) -> int:
        return 2

    def batch(self, step: int, batch: int) -> list[int]:
        return [(step + row) % 2 for row in range(batch)]

    def load(self, items: list[int]) -> Piece:
        return Piece(self.latents[items], self.text[items], ["a.mp4"] * len(items), items)


@pytest.fixture
def make(tmp_path, randomize_):
    def trainer(**options) -> Trainer:
        options = {"steps": 4, "batch": 4, "learning_rate": 0.05, "warmup": 0, "rank": 2, "validate_every": 0,
                   "prior": "old", "prior_share": 0.5, "train": "lora"} | options  # fmt: skip
        recipe = Recipe(data=("clips",), out=tmp_path / "run", **options)
        scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        unet = randomize_(UNet3DConditionModel(**UNET))
        pipe = TextToVideoSDPipeline(None, None, None, unet, scheduler)
        return Trainer(pipe, Clips(0), recipe, prior=Clips(1), say=lambda _: None)

    return trainer


def losses(trainer: Trainer) -> torch.Tensor:
    """Of each row of the batch of step 0, the last two from the prior set."""
    (piece,) = trainer.batch(0)
    return trainer.backward(piece)


@pytest.mark.parametrize("options", [{}, {"train": "temporal", "temporal_dropout": 0.5}, {"dropout": 0.5}])
def test_what_the_model_said_is_the_target_of_prior_rows(make, options):
    trainer = make(**options)
    before = losses(trainer)
    dropped = "temporal_dropout" in options
    assert (before[:2] > 0.1).all() and (dropped or (before[2:] < 1e-10).all())  # nothing pulls on what is right
    (piece,) = trainer.batch(0)
    latents, text = trainer.placed(piece)
    noisy, t, target, _ = trainer.objective.noised(latents, 0, piece.numbers)
    first = trainer.kept(noisy, t, text, target, piece.numbers)
    assert torch.equal(first[:2], target[:2]) and not torch.equal(first[2:], target[2:])
    trainer.step()
    assert (losses(trainer)[2:] > 1e-6).all()
    torch.testing.assert_close(trainer.kept(noisy, t, text, target, piece.numbers), first, rtol=0, atol=0)
    trainer.save()
    again = make(**options)
    assert again.done == 1
    torch.testing.assert_close(again.kept(noisy, t, text, target, piece.numbers), first, rtol=0, atol=0)


def test_clips_can_be_the_target_and_motiondirector_has_no_other(make, tmp_path):
    assert (losses(make(prior_target="clips"))[2:] > 0.1).all()
    with pytest.raises(ValueError, match="prior_target must be 'clips' with train 'motiondirector'"):
        Recipe(data=("clips",), out=tmp_path, train="motiondirector", prior_target="model")
    assert Recipe(train="motiondirector").filled("UNet3DConditionModel").prior_target == "clips"
