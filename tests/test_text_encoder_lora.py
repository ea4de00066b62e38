"""A LoRA of the text encoder, trained with one of the UNet."""

import pytest
import torch

from minit2v import DDIMScheduler, DiffusionPipeline, TextToVideoSDPipeline, UNet3DConditionModel
from minit2v.training import result
from minit2v.training.recipe import Recipe
from minit2v.training.trainer import Piece, Trainer
from minit2v.training.validation import Validation

CAPTIONS = ["a red circle moving left", "a blue square moving up", "a green ring growing", ""]


class Clips:
    """Random latents with captions, and the states that the text encoder had for them before training."""

    def __init__(self, pipe, seed: int):
        self.latents = torch.randn(4, 4, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.text = pipe.text_encoder(pipe.tokenizer(CAPTIONS))
        self.fingerprint = str(seed)

    def __len__(self) -> int:
        return 4

    def batch(self, step: int, batch: int) -> list[int]:
        return [(step + row) % 4 for row in range(batch)]

    def load(self, items: list[int]) -> Piece:
        return Piece(self.latents[items], self.text[items], ["a.mp4"] * len(items), items, [CAPTIONS[n] for n in items])


@pytest.fixture
def make(tmp_path, randomize_):
    def trainer(out: str = "run", prior: bool = False, **options) -> Trainer:
        shapes = DiffusionPipeline.from_pretrained("shapes")
        unet = randomize_(UNet3DConditionModel(
            block_out_channels=(16,), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock3D",), up_block_types=("CrossAttnUpBlock3D",),
            cross_attention_dim=shapes.unet.config.cross_attention_dim)).double()  # fmt: skip
        pipe = TextToVideoSDPipeline(None, shapes.text_encoder.double(), shapes.tokenizer, unet, DDIMScheduler())
        options = {"batch": 4, "learning_rate": 0.01, "warmup": 0, "rank": 2, "validate_every": 0, "train_text": True,
                   **({"prior": "old"} if prior else {})} | options  # fmt: skip
        recipe = Recipe(data=("clips",), out=tmp_path / out, **options)
        return Trainer(pipe, Clips(pipe, 0), recipe, prior=Clips(pipe, 1) if prior else None, say=lambda _: None)

    return trainer


def test_both_learn_however_a_batch_is_cut_and_the_file_has_both(make, tmp_path):
    plain = make("plain", train_text=False)
    losses = [plain.step()["loss"] for _ in range(2)]
    found = []
    for accumulate in (1, 2):
        trainer = make(f"run{accumulate}", accumulate=accumulate, kohya=True)
        found.append([trainer.step()["loss"] for _ in range(2)])
        assert found[-1][0] == pytest.approx(losses[0], rel=1e-12)  # up is 0: at first nothing changes
        assert trainer.step()["loss"] != pytest.approx(plain.step()["loss"], rel=1e-9)
        moved = {name.split(".")[0] for name, p in trainer.trained if name.endswith(".up") and p.abs().min() > 0}
        assert moved == {"lora", "text"}
    assert found[0] == pytest.approx(found[1], rel=1e-11)
    fixed = Validation(trainer)
    with trainer.sampling():
        trained, ids = fixed.losses(), trainer.pipe.tokenizer(CAPTIONS)
        states = trainer.pipe.text_encoder(ids)
        trainer.loras["text"].use(False)
        assert fixed.losses() != trained  # the validation loss is that of the trained text encoder
        trainer.loras["text"].use(True)
    path = result.export(trainer)
    for name in (path, tmp_path / "run2" / "lora-kohya.safetensors"):
        fresh = make(f"fresh {name.name}").pipe
        fresh.load_lora_weights(name)
        with torch.no_grad():
            torch.testing.assert_close(fresh.text_encoder(ids), states, rtol=0, atol=1e-6)
            x, text = torch.randn(1, 4, 2, 4, 4).double(), states[:1]
            torch.testing.assert_close(fresh.unet.eval()(x, 7, text), trainer.unet.eval()(x, 7, text),
                                       rtol=0, atol=1e-5)  # fmt: skip


def test_prior_rows_keep_what_the_model_said_with_the_first_text_encoder(make):
    trainer = make(prior=True)
    (piece,) = trainer.batch(0)
    assert (trainer.backward(piece)[2:] < 1e-20).all()
    latents, text = trainer.placed(piece)
    noisy, t, target, _ = trainer.objective.noised(latents, 0, piece.numbers)
    first = trainer.kept(noisy, t, text, target, piece.numbers)
    trainer.step()
    assert (trainer.backward(piece)[2:] > 1e-12).all()
    torch.testing.assert_close(trainer.kept(noisy, t, text, target, piece.numbers), first, rtol=0, atol=1e-12)


def test_what_does_not_go_with_it():
    for name in ("train_text", "kohya"):
        with pytest.raises(ValueError, match=f"{name} must be false with train 'full'"):
            Recipe(train="full", **{name: True})
