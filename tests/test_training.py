"""The shapes world, what reads it back, and a trainer that a kill does not change."""

import io
import json
import random
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from minit2v.files.video import load_video
from minit2v.training import animate, colours, draw, shapes, world


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


def new_clips(per_combination: int, seed: int = 0) -> list[world.Clip]:
    """Of what fine-tuning teaches: the motion, the colours, the word."""
    rng = random.Random(seed)
    motions = [(c, s, world.NEW_MOTION) for c in world.COLOURS for s in world.SHAPES]
    colours = [(c, s, m) for c in (*world.NEW_COLOURS, *world.SYNONYMS) for s in world.SHAPES for m in world.MOTIONS]
    return [world.draw_clip(rng, *c) for c in motions + colours for _ in range(per_combination)]


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_what_fine_tuning_teaches_is_read_back_and_old_clips_are_not_taken_for_it(noise):
    generator = torch.Generator().manual_seed(0)
    for drawn in (new_clips(1), clips(1)):
        for clip, video in zip(drawn, world.render(drawn), strict=True):
            video = (video + noise * torch.randn(video.shape, generator=generator)).clamp(0, 1)
            assert world.reads_diagonally(video) == (clip.motion == "diagonally"), clip
            assert world.read_new_colour(video) == world.SYNONYMS.get(clip.colour, clip.colour), clip


def test_the_other_three_diagonals_and_stills_are_not_diagonally():
    for start, end in (((20, 44), (44, 20)), ((44, 44), (20, 20)), ((44, 20), (20, 44)), ((30, 30), (30, 30))):
        video = world.render([world.Clip("red", "circle", "diagonally", (*start, 10), (*end, 10))])[0]
        assert not world.reads_diagonally(video)
    assert not world.reads_diagonally(torch.zeros(3, 16, 64, 64))
    growing = world.render([world.Clip("red", "circle", "diagonally", (20, 20, 6), (44, 44, 14))])[0]
    assert not world.reads_diagonally(growing)


def test_drawn_files_are_exact_and_the_same_again(tmp_path):
    draw.main(["crimson", "--out", str(tmp_path / "a"), "--clips", "1"])
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert len(names) == 36 and names[:2] == ["crimson-circle-down-0.gif", "crimson-circle-down-0.txt"]
    for path in sorted((tmp_path / "a").glob("*.gif"))[::6]:
        name = path.stem
        clip = world.draw_clip(random.Random(f"0 {name}"), *name.split("-")[:3])
        drawn = (world.render([clip])[0].permute(1, 2, 3, 0) * 255).round().byte()
        assert all(torch.equal(torch.tensor(np.asarray(f)), d) for f, d in zip(load_video(path), drawn, strict=True))
        assert path.with_suffix(".txt").read_text().strip() in world.captions(*name.split("-")[:3])
    draw.main(["crimson", "--out", str(tmp_path / "b"), "--clips", "1"])
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    draw.main(["old", "--out", str(tmp_path / "c"), "--clips", "1"])
    assert len(list((tmp_path / "c").glob("*.gif"))) == len(world.TRAINED)


def test_shapes_stay_in_the_picture():
    videos = world.render(clips(2, seed=1) + new_clips(1, seed=1))
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


def small_stills(rng: random.Random, count: int) -> torch.Tensor:
    """In the place of `shapes.stills`, a sixteenth of their size: noise on a background of any colour."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    background, noise = (torch.rand(count, 3, n, n, generator=generator) for n in (1, 16))
    return 0.7 * background + 0.3 * noise


def test_whitened_latents_have_mean_0_and_deviation_1_and_decode_the_same(monkeypatch):
    monkeypatch.setattr(shapes, "stills", small_stills)
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
    monkeypatch.setattr(shapes, "stills", small_stills)
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
    monkeypatch.setattr(shapes, "draw_curves", lambda *a: None)
    shapes.main(["--out", str(tmp_path)])  # everything is done: nothing is trained again
    assert len((tmp_path / "panel.csv").read_text().split()) == 1
    with pytest.raises(ValueError, match="training.json: a training with seed 0, not 1: give another folder"):
        shapes.main(["--out", str(tmp_path), "--seed", "1"])
    with pytest.raises(ValueError, match="a training with trainer 'shapes', not 'animate'"):
        animate.main(["--out", str(tmp_path)])


def test_animate_trains_the_motion_modules_alone(tmp_path, monkeypatch):
    """The image model begins as the video model's spatial half; behind it, only motion modules move; both are saved."""
    tiny = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    unet = {**shapes.UNET, **tiny, "attention_head_dim": 8}
    monkeypatch.setattr(animate, "IMAGE", {**animate.IMAGE, **tiny, "attention_head_dim": 2})
    motion = {"block_out_channels": (8, 16), "motion_norm_num_groups": 4, "motion_num_attention_heads": 2}
    monkeypatch.setattr(animate, "MOTION", {**animate.MOTION, **motion})
    monkeypatch.setattr(animate.train_image, "__defaults__", (50, 1))
    monkeypatch.setattr(animate.train_motion, "__defaults__", (((4, 2, 49), (16, 1, 1)), 500))
    monkeypatch.setattr(shapes.report_panel, "__defaults__", (1,))
    torch.save(torch.randn(len(world.TRAINED), 1, 4, 16, 8, 8), tmp_path / "latents.pt")
    torch.manual_seed(0)
    tokenizer = shapes.make_tokenizer()
    text_encoder = shapes.CLIPTextModel(vocab_size=tokenizer.vocab_size, **shapes.TEXT)
    painter = shapes.Painter(shapes.UNet3DConditionModel(**unet), text_encoder)
    vae = shapes.AutoencoderKL(**shapes.VAE)
    shapes.make_pipeline(vae, painter, tokenizer).save_pretrained(tmp_path / "shapes")

    animate.main(["--out", str(tmp_path), "--video", str(tmp_path / "shapes")])
    with pytest.raises(ValueError, match="a training with video '.*', not '.*': give another folder"):
        animate.main(["--out", str(tmp_path)])
    image = torch.load(tmp_path / "image.ckpt", weights_only=True)
    motion = torch.load(tmp_path / "motion.ckpt", weights_only=True)
    assert image["step"] == 50 and motion["step"] == 50
    frozen = image["average"]
    for name, value in motion["painter"].items():
        if ".motion." not in name:
            assert torch.equal(value, frozen[name]), name
    moved = [name for name, value in motion["painter"].items() if name.endswith("motion.proj_out.weight")]
    assert moved and all(motion["painter"][name].abs().max() > 0 for name in moved)

    adapter = animate.MotionAdapter.from_pretrained(tmp_path / "shapes-motion")
    pipe = animate.AnimateDiffPipeline.from_pretrained(tmp_path / "shapes-image", motion_adapter=adapter)
    for name, value in pipe.unet.state_dict().items():
        torch.testing.assert_close(value, motion["average"][f"unet.{name}"], rtol=1e-3, atol=1e-4, msg=name)
    for name in ("curves.png", "panel-00050.png", "image.csv", "motion.csv"):
        assert (tmp_path / name).stat().st_size


def test_a_finetuned_autoencoder_is_saved_and_a_kill_does_not_change_it(tmp_path, monkeypatch):
    monkeypatch.setattr(colours.train, "__defaults__", (2, 2, 1e-3))
    # Under its decorator the function's own defaults do not count.
    monkeypatch.setattr(colours, "round_trip", partial(colours.round_trip, count=2))
    colours.main(["--out", str(tmp_path / "whole")])
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    old, new = (result["before"][f"{age} colours"]["psnr"] for age in ("old", "new"))
    assert result["minutes"] > 0 and old > 30 > new
    draw, drawn = colours.stills, []

    def killed(*args):
        drawn.append(args)
        if len(drawn) == 3:  # two in each step: in the second
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(colours, "stills", killed)
    monkeypatch.setattr(shapes.Run.__init__, "__defaults__", (0.0,))  # a checkpoint after each step
    with pytest.raises(KeyboardInterrupt):
        colours.main(["--out", str(tmp_path / "killed")])
    colours.main(["--out", str(tmp_path / "killed")])
    load = colours.TextToVideoSDPipeline.from_pretrained
    whole, killed = (load(tmp_path / n / "shapes").vae.state_dict() for n in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    embedded = colours.TextToVideoSDPipeline.from_pretrained("shapes").vae.state_dict()
    assert all(not torch.equal(whole[name], embedded[name]) for name in whole if name.endswith("conv1.weight"))


def test_fewer_frames_keep_their_numbers():
    """On 4 of 16 frames the motion modules see the positions 0, 5, 10, 15, and afterwards all of them again."""
    unet = animate.UNetMotionModel.from_unet2d(
        animate.UNet2DConditionModel(**animate.IMAGE), animate.MotionAdapter(**animate.MOTION)
    )
    torch.manual_seed(0)
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.1)
    tokenizer = shapes.make_tokenizer()
    painter = animate.MotionPainter(unet, shapes.CLIPTextModel(vocab_size=tokenizer.vocab_size, **shapes.TEXT)).eval()
    tables = [m for m in unet.modules() if getattr(m, "positions", None) is not None]
    x, t, ids = torch.randn(1, 4, 4, 8, 8), torch.tensor([500]), tokenizer(["a red circle"])
    before = [m.positions for m in tables]
    with torch.no_grad():
        spread = painter(x, t, ids)
        assert tables and all(m.positions is table for m, table in zip(tables, before, strict=True))
        first_four = unet(x, t, painter.text_encoder(ids))
        for m in tables:
            m.positions = m.positions[:, [0, 5, 10, 15]]
        torch.testing.assert_close(spread, unet(x, t, painter.text_encoder(ids)), rtol=0, atol=0)
    assert (spread - first_four).abs().max() > 1e-3


def test_rows_that_a_kill_has_undone_are_not_there_twice(tmp_path):
    def run(until, save_at):
        torch.manual_seed(0)
        layer = nn.Linear(2, 2)
        run = shapes.Run(tmp_path, "x", {"layer": layer}, torch.optim.AdamW(layer.parameters()), 1e9)
        for step in run.steps(9):
            run.write(loss=step)
            if step == save_at:
                run.step += 1
                run.save()
                run.step -= 1
            if step == until:
                return

    run(5, 3)  # killed in step 5; the checkpoint is that after step 3
    with (tmp_path / "x.csv").open("a") as file:
        file.write("6,0.0")  # in the middle of a row
    run(9, None)
    rows = (tmp_path / "x.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", *map(str, range(9))]
    (tmp_path / "panel.csv").write_text("500,1,1\n1000,2,1\n1500,3,1\n")
    shapes.forget_later(tmp_path / "panel.csv", 1000)
    assert (tmp_path / "panel.csv").read_text() == "500,1,1\n1000,2,1\n"


def test_a_broken_checkpoint_is_one_line_that_names_it(tmp_path):
    layer = nn.Linear(2, 2)
    run = shapes.Run(tmp_path, "x", {"layer": layer}, torch.optim.AdamW(layer.parameters()))
    run.save()
    whole = (tmp_path / "x.ckpt").read_bytes()
    other = io.BytesIO()
    torch.save({"layer": nn.Linear(3, 3).state_dict()}, other)
    for content in (b"", whole[:100], whole[:-300], b"x" * 500, other.getvalue()):
        (tmp_path / "x.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match=r"^\S*x.ckpt is .*: remove it to begin anew$") as error:
            shapes.Run(tmp_path, "x", {"layer": layer}, torch.optim.AdamW(layer.parameters()))
        assert "\n" not in str(error.value)
    (tmp_path / "latents.pt").write_bytes(whole[:100])
    with pytest.raises(ValueError, match="latents.pt is broken"):
        shapes.latents_of_world(None, tmp_path, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latents.pt", "x.ckpt"]
