"""The shapes world, what reads it back, and a trainer that a kill does not change."""

import random
from collections import Counter

import pytest
import torch

from minit2v.training import shapes, world


def clips(per_combination: int, seed: int = 0) -> list[world.Clip]:
    rng = random.Random(seed)
    return [world.draw_clip(rng, *c) for c in world.COMBINATIONS for _ in range(per_combination)]


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_analyser_reads_every_drawn_clip(noise):
    drawn = clips(2)
    videos = world.render(drawn)
    videos = (videos + noise * torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    wrong = [c for c, v in zip(drawn, videos, strict=True) if world.analyse(v) != (c.colour, c.shape, c.motion)]
    assert not wrong


def test_the_analyser_sees_nothing_where_nothing_is():
    assert world.analyse(torch.zeros(3, 16, 64, 64)) == (None, None, None)
    still = world.render([world.Clip("red", "circle", "left", (30, 30, 10), (30, 30, 10))])[0]
    assert world.analyse(still) == ("red", "circle", None)
    backwards = world.render([world.Clip("red", "square", "left", (20, 30, 10), (44, 30, 10))])[0]
    assert world.analyse(backwards) == ("red", "square", "right")  # off the pixels, whatever the clip calls itself
    dissolving = world.render([world.Clip("red", "square", "left", (44, 30, 10), (20, 30, 10))])[0]
    dissolving[:, 5:] = 0
    assert world.analyse(dissolving)[2] is None


def test_shapes_stay_in_the_picture():
    videos = world.render(clips(2, seed=1))
    rim = torch.cat([videos[..., 0, :], videos[..., -1, :], videos[..., :, 0], videos[..., :, -1]])
    assert rim.amax() < 0.5  # an antialiased tip, no more


def test_what_is_held_out():
    assert len(world.COMBINATIONS) == 108 and len(set(world.UNSEEN)) == 16
    assert not set(world.UNSEEN) & set(world.TRAINED) and len(world.TRAINED) == 92
    for axis, names in enumerate((world.COLOURS, world.SHAPES, world.MOTIONS)):
        assert {c[axis] for c in world.UNSEEN} == set(names)  # each is among the unseen
    pairs = Counter((c, s) for c, s, _ in world.UNSEEN)
    assert max(pairs.values()) == 1  # so that five motions of each coloured shape are trained


def test_captions_say_the_combination_and_fit_the_tokenizer():
    tokenizer = shapes.make_tokenizer()
    said = {}
    for combination in world.COMBINATIONS:
        for text in world.captions(*combination):
            assert said.setdefault(text, combination) == combination  # no text means two things
            assert combination[0] in text and combination[1] in text
            assert len(tokenizer.encode(text)) <= tokenizer.model_max_length


def test_batches_hold_trained_combinations_only(monkeypatch):
    seen = []
    monkeypatch.setattr(world, "captions", lambda *c: seen.append(c) or ["x"])
    latents = torch.zeros(len(world.TRAINED), 1, 4, 16, 8, 8)
    for step in range(50):
        x, texts = shapes.draw_batch(random.Random(step), latents, 4, 16)
        assert x.shape == (16, 4, 4, 8, 8) and len(texts) == 16
    assert seen and not set(seen) & set(world.UNSEEN)


def test_whitened_latents_have_mean_0_and_deviation_1_and_decode_the_same():
    torch.manual_seed(0)
    vae = shapes.AutoencoderKL(**shapes.VAE).eval()
    x = shapes.stills(random.Random(3), 2)
    with torch.no_grad():
        before = vae.decode(vae.encode(x).mode())
        spread = vae.encode(x).std
        shapes.whiten(vae, seed=0)
        rng, _ = shapes.generators(0, "whiten", 0)
        z = torch.cat([vae.encode(shapes.stills(rng, 64)).mean for _ in range(16)])
        torch.testing.assert_close(vae.decode(vae.encode(x).mode()), before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), rtol=0, atol=1e-4)
    with torch.no_grad():
        ratio = vae.encode(x).std / spread  # the noise is scaled with the mean: one factor for each channel
    torch.testing.assert_close(ratio, ratio[:1, :, :1, :1].expand_as(ratio), rtol=1e-4, atol=0)


class Killed(BaseException):
    pass


def test_a_killed_training_goes_on_exactly(tmp_path, monkeypatch):
    tiny = {**shapes.UNET, "block_out_channels": (8, 16), "attention_head_dim": 8}
    monkeypatch.setattr(shapes, "UNET", tiny)
    monkeypatch.setattr(shapes, "report_panel", lambda *a, **k: None)
    torch.manual_seed(0)
    latents = torch.randn(len(world.TRAINED), 1, 4, 16, 8, 8)

    def train(folder, kill_at=None):
        folder.mkdir(exist_ok=True)
        torch.save(latents, folder / "latents.pt")
        batch = shapes.draw_batch
        steps = iter(range(100))

        def draw(*args):
            if next(steps) == kill_at:
                raise Killed
            return batch(*args)

        monkeypatch.setattr(shapes, "draw_batch", draw)
        monkeypatch.setattr(shapes.Run.__init__, "__defaults__", (0.0,))  # a checkpoint after every step
        try:
            torch.manual_seed(1)
            text_encoder = shapes.CLIPTextModel(vocab_size=shapes.make_tokenizer().vocab_size, **shapes.TEXT)
            return shapes.train_unet(folder, 0, None, text_encoder, course=((1, 4, 2), (4, 2, 3))).state_dict()
        except Killed:
            return None
        finally:
            monkeypatch.setattr(shapes, "draw_batch", batch)

    whole = train(tmp_path / "whole")
    assert train(tmp_path / "killed", kill_at=3) is None
    resumed = train(tmp_path / "killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    other = train(tmp_path / "other", kill_at=1)
    assert other is None and not list((tmp_path / "other").glob("*.part"))


def test_one_command_goes_from_nothing_to_a_folder_that_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "UNET", {**shapes.UNET, "block_out_channels": (8, 16), "attention_head_dim": 8})
    monkeypatch.setattr(shapes, "vae_accuracy", lambda *a: {})
    monkeypatch.setattr(shapes.train_vae, "__defaults__", (1, 2, 2e-3))
    monkeypatch.setattr(shapes.train_text, "__defaults__", (1, 2, 2e-3))
    torch.save(torch.randn(len(world.TRAINED), 1, 4, 16, 8, 8), tmp_path / "latents.pt")
    monkeypatch.setattr(shapes.train_unet, "__defaults__", (((1, 1, 49), (16, 1, 1)), 1e-3, 500))
    monkeypatch.setattr(shapes.report_panel, "__defaults__", (1,))
    shapes.main(["--out", str(tmp_path)])
    for name in ("curves.png", "panel-00050.png", "panel.csv", "vae.csv", "text.csv", "unet.csv"):
        assert (tmp_path / name).stat().st_size
    pipe = shapes.TextToVideoSDPipeline.from_pretrained(tmp_path / "shapes")
    assert pipe.unet.config.block_out_channels == (8, 16)
    step = torch.load(tmp_path / "unet.ckpt", weights_only=True)["step"]
    assert step == 50
    shapes.main(["--out", str(tmp_path)])  # everything is done: nothing is trained again
    assert len((tmp_path / "panel.csv").read_text().split()) == 1
