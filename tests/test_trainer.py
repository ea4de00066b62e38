"""The trainer: one step, a run that a kill does not change, what is refused, and what comes out."""

import csv
import dataclasses
import json
import math
import os
import random
import signal
import sys
import time
import types

import pytest
import torch
from torch import Tensor

from minit2v import AnimateDiffPipeline, DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel, UNetMotionModel
from minit2v.cli import main as minit2v
from minit2v.training import checkpoints, result, sheet, start, validation
from minit2v.training.draw import draw
from minit2v.training.optimizer import Average
from minit2v.training.recipe import Recipe, read_recipe
from minit2v.training.trainer import Piece, Trainer

SMALL = {"block_out_channels": (16,), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 12}
UNET3D = {**SMALL, "down_block_types": ("CrossAttnDownBlock3D",), "up_block_types": ("CrossAttnUpBlock3D",),
          "attention_head_dim": 8}  # fmt: skip
MOTION = {**SMALL, "down_block_types": ("CrossAttnDownBlockMotion",), "up_block_types": ("CrossAttnUpBlockMotion",),
          "num_attention_heads": 2, "motion_num_attention_heads": 2, "use_motion_mid_block": False,
          "resnet_norms": "frame"}  # fmt: skip


class Clips:
    """Random latents in the place of a data set; `broken`: clips that hold NaN."""

    def __init__(self, count: int = 3, frames: int = 3, broken: tuple[int, ...] = (), seed: int = 0):
        noise = torch.Generator().manual_seed(seed)
        self.latents = torch.randn(count, 4, frames, 4, 4, generator=noise)
        self.text = torch.randn(count, 5, 12, generator=noise)
        for n in broken:
            self.latents[n] = float("nan")
        self.fingerprint = f"{count} {frames} {seed}"

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, step: int, batch: int) -> list[int]:
        return [(step * batch + row) % len(self.latents) for row in range(batch)]

    def load(self, items: list[int]) -> Piece:
        return Piece(self.latents[items], self.text[items], [f"clip{n}.mp4" for n in items], items)


def make_pipe(randomize_, cls=UNet3DConditionModel, dtype=torch.float32):
    unet = randomize_(cls(**(UNET3D if cls is UNet3DConditionModel else MOTION))).to(dtype)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    if cls is UNet3DConditionModel:
        return TextToVideoSDPipeline(None, None, None, unet, scheduler)
    return AnimateDiffPipeline(None, None, None, unet, None, scheduler)


@pytest.fixture
def make(tmp_path, randomize_):
    """A trainer of a small network, with float32 weights."""

    def trainer(data=None, out="run", cls=UNet3DConditionModel, dtype=torch.float32, old=None, say=None, **options):
        options = {"steps": 4, "batch": 2, "learning_rate": 1e-3, "warmup": 0, "rank": 2, "validate_every": 0} | options
        recipe = Recipe(data=("clips",), out=tmp_path / out, **options)
        return Trainer(make_pipe(randomize_, cls, dtype), data or Clips(), recipe, prior=old, say=say or (lambda _: 0))

    return trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.trained}


# The recipe -------------------------------------------------------------------------------------------------------


def test_what_a_recipe_refuses(tmp_path):
    file = tmp_path / "a.toml"
    (tmp_path / "clips").mkdir()
    for text, said in {
        "learning_rat = 1": "no option 'learning_rat' (nearest: 'learning_rate'",
        "rate = 1": "no option 'rate' (nearest: 'learning_rate'",
        'train = "loar"': "not 'loar' (nearest: 'lora')",
        "steps = 0": "steps must be at least 1",
        "learning_rate = 'x'": "learning_rate must be",
        "learning_rate = -1.0": "learning_rate must be at least 0",
        "fps = 8.0\nstride = 2": "stride must be None beside fps",
        "batch = 4\naccumulate = 3": "accumulate must divide batch 4",
        'train = "patterns"': "targets must be patterns",
        'train = "full"\ntargets = ["both"]': "targets goes with train",
        'prior = "self"': "prior 'self' needs prior_prompts",
        "rank = [": "a.toml",
        "out = 'x'\ndata = 'gone'": "no file or folder",
        "data = 'clips'": "give out",
    }.items():
        file.write_text(text)
        with pytest.raises(ValueError) as error:
            read_recipe(file, {})
        assert said in str(error.value) and "\n" not in str(error.value), (text, error.value)
    with pytest.raises(ValueError, match="train 'motion' is for image models"):
        Recipe(train="motion").filled("UNet3DConditionModel")


def test_options_of_a_file_and_of_the_command_line(tmp_path):
    (tmp_path / "clips").mkdir()
    file = tmp_path / "a.toml"
    file.write_text('data = "clips"\nout = "run"\nlearning_rate = 1e-3\ntimesteps = [100, 200]\ntargets = "both"')
    recipe = read_recipe(file, {"learning_rate": 2e-3, "out": str(tmp_path / "other")})
    assert recipe.data == (str(tmp_path / "clips"),)  # from the file, wherever one stands
    assert (recipe.learning_rate, recipe.out, recipe.timesteps) == (2e-3, str(tmp_path / "other"), (100, 200))
    assert recipe.targets == ("both",)
    file.write_text('out = "run"\nprior = "clips"\n[[data]]\npath = "clips"\nweight = 2.0')
    recipe = read_recipe(file, {})
    assert recipe.data == ({"path": str(tmp_path / "clips"), "weight": 2.0},)
    assert recipe.prior == str(tmp_path / "clips") and recipe.prior_rows == 2


def test_usual_values():
    lora = Recipe().filled("UNet3DConditionModel", clips=9)
    assert (lora.alpha, lora.weight_decay, lora.ema, lora.text_dropout, lora.temporal_dropout) == (8, 0, 0, 0.1, 0)
    assert Recipe().filled("UNet3DConditionModel", clips=1).text_dropout == 0
    full = Recipe(train="full", learning_rate=1.0).filled("UNet3DConditionModel")
    assert (full.temporal_dropout, full.ema, full.learning_rate, full.weight_decay) == (0.1, 0.999, 1.0, 0.01)
    motion = Recipe(train="motion-lora").filled("UNetMotionModel")
    assert (motion.learning_rate, motion.timesteps, motion.temporal_dropout) == (5e-4, "high", 0)
    assert all(value is not None for name, value in full.values().items()
               if name in ("learning_rate", "warmup", "frames", "precision", "guidance", "validate_every"))


def test_rates_are_functions_of_the_step():
    flat = Recipe(steps=100, warmup=9)
    assert [flat.rate_at(n) for n in (0, 4, 9, 99)] == [0.1, 0.5, 1, 1]
    line = dataclasses.replace(flat, schedule="linear", warmup=0)
    assert [line.rate_at(n) for n in (0, 50, 75)] == [1, 0.5, 0.25]
    curve = dataclasses.replace(flat, schedule="cosine", warmup=0)
    assert [curve.rate_at(n) for n in (0, 25, 100)] == pytest.approx([1, 0.5 * (1 + math.cos(math.pi / 4)), 0])


# One step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["lora", "full", "motiondirector"])
@pytest.mark.parametrize("cls", [UNet3DConditionModel, UNetMotionModel])
def test_however_a_batch_is_cut_a_step_is_the_same(make, train, cls):
    found = []
    for n in (1, 4) if train == "motiondirector" else (1, 2):
        trainer = make(out=f"run{n}", cls=cls, dtype=torch.float64, train=train, batch=4, accumulate=n, steps=2,
                       dropout=0.0, temporal_dropout=0.0)  # fmt: skip
        numbers = [step[name] for step in (trainer.step(), trainer.step()) for name in ("loss", "norm")]
        found.append((numbers, weights(trainer)))
    for numbers, state in found[1:]:
        assert numbers == pytest.approx(found[0][0], rel=1e-11)
        for name, value in state.items():
            torch.testing.assert_close(value, found[0][1][name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("train", ["lora", "full", "motiondirector"])
def test_gradient_checkpointing_changes_no_gradient(make, train):
    found = []
    for on in (False, True):
        trainer = make(out=f"run{on}", dtype=torch.float64, train=train, checkpointing=on, dropout=0.0,
                       temporal_dropout=0.0)  # fmt: skip
        for _ in range(2):  # a LoRA's `down` has no gradient before `up` has moved
            trainer.step()
        found.append({name: p.grad for name, p in trainer.trained})
        frozen = {id(p) for p in trainer.parameters}
        assert all(p.grad is None for p in trainer.unet.parameters() if id(p) not in frozen)
    for name, grad in found[0].items():
        assert grad is not None and grad.abs().max() > 0, name
        torch.testing.assert_close(found[1][name], grad, rtol=0, atol=1e-12)


def test_dropout_is_the_same_with_checkpointing_and_after_a_resume(make):
    first = make(train="full", temporal_dropout=0.5, ema=0.0)
    losses = [first.step()["loss"] for _ in range(3)]
    other = make(out="other", train="full", temporal_dropout=0.5, ema=0.0, checkpointing=True)
    assert [other.step()["loss"] for _ in range(3)] == losses
    without = make(out="without", train="full", temporal_dropout=0.0, ema=0.0)
    assert without.step()["loss"] != losses[0]


@torch.no_grad()
@pytest.mark.parametrize("train", ["lora", "motiondirector"])
@pytest.mark.parametrize("cls", [UNet3DConditionModel, UNetMotionModel])
def test_a_new_lora_changes_no_bit(make, randomize_, cls, train):
    x, text = torch.randn(1, 4, 3, 4, 4), torch.randn(1, 5, 12)
    base = make_pipe(randomize_, cls).unet.eval().requires_grad_(False)(x, 7, text)
    trainer = make(cls=cls, train=train)
    with trainer.sampling():
        assert torch.equal(trainer.unet(x, 7, text), base)
    with torch.enable_grad():
        trainer.step()
    with trainer.sampling():
        assert not torch.equal(trainer.unet(x, 7, text), base)


def test_stills_run_through_the_spatial_layers_alone(make):
    trainer = make(Clips(frames=1), train="full")
    trainer.step()
    still = {name for name, p in trainer.trained if p.grad is None or p.grad.abs().max() == 0}
    assert still and all("temp" in name or "transformer_in" in name for name in still)
    whole = make(Clips(frames=1), out="whole", train="full", stills="whole")
    whole.step()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for name, p in whole.trained if "temp_attentions" in name)


def test_a_part_of_each_batch_is_the_prior_sets(make):
    prior = Clips(seed=5)
    trainer = make(old=prior, prior="old", prior_share=0.5, batch=4, accumulate=2)
    pieces = trainer.batch(3)
    assert sorted(n for piece in pieces for n in piece.numbers) == [12, 13, 14, 15]
    assert [p.latents.shape[0] for p in pieces] == [2, 2]  # of both sets together
    old = torch.cat([p.latents for p in pieces])
    assert sum(any(torch.equal(x, y) for y in prior.latents) for x in old) == 2
    longer = make(out="b", old=Clips(frames=2, seed=5), prior="old", prior_share=0.5, batch=4)
    assert [p.latents.shape[2] for p in longer.batch(0)] == [3, 2]  # what does not fit runs by itself
    assert math.isfinite(longer.step()["loss"])


def test_sixteen_bits_have_float32_masters(make):
    trainer = make(train="lora", precision="bf16", learning_rate=1e-4)
    before = weights(trainer)
    assert {p.dtype for p in trainer.parameters} == {torch.float32}
    assert trainer.unet.conv_in.weight.dtype == torch.bfloat16 and trainer.unet.norm_out.weight.dtype == torch.float32
    plain = make(out="plain", train="lora", learning_rate=1e-4)
    for step in range(3):
        loss = trainer.step()["loss"]
        assert loss == pytest.approx(plain.step()["loss"], rel=0.05) and loss != 0, step
    assert any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())
    with pytest.raises(ValueError, match="load the model in float32"):
        make(out="half", train="full", dtype=torch.bfloat16)


def test_fp16_halves_its_scale_where_a_gradient_does_not_fit(make):
    trainer = make(train="lora", precision="fp16")
    trainer.scale = 2.0**120
    before = weights(trainer)
    trainer.step()
    assert trainer.scale == 2.0**119 and trainer.skipped == 0
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    trainer.scale = 1024.0
    trainer.step()
    assert any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_the_average_begins_fast_and_ends_slow():
    p = torch.nn.Parameter(torch.zeros(3))
    average, value = Average([p], 0.9), 0.0
    for n in range(30):
        p.data.fill_(n)
        average.update()
        decay = min(0.9, (1 + n) / (10 + n))
        value = decay * value + (1 - decay) * n
    assert average.values[0][0].item() == pytest.approx(value, rel=1e-6)
    with average.in_place():
        assert p[0].item() == pytest.approx(value, rel=1e-6)
    assert p[0].item() == 29


# Learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train, rate, most", [("full", 1e-2, 0.7), ("lora", 5e-2, 0.9), ("full", 0.0, 1.0)])
def test_the_loss_of_one_clip_falls_and_at_rate_0_it_stays(make, train, rate, most):
    trainer = make(Clips(1), train=train, learning_rate=rate, steps=25, batch=2, ema=0.0, temporal_dropout=0.0,
                   validation_clips=1)  # fmt: skip
    fixed = validation.Validation(trainer)
    found = []
    for steps in (0, 25 if rate else 3):
        for _ in range(steps):
            trainer.step()
        with trainer.sampling():
            found.append(sum(fixed.losses()))
    assert found[1] <= most * found[0]
    if rate == 0:
        assert found[1] == found[0]


def test_a_lora_learns_one_clip_by_heart(tmp_path):
    """As benchmarks/training_overfit.py does at length: at most half of the validation loss is left."""
    draw(tmp_path / "clips", "diagonally", 1)
    options = "--train lora --targets conv --rank 8 --batch 2 --steps 60 --learning-rate 5e-3 --schedule linear " \
              "--warmup 10 --text-dropout 0 --validate-every 60 --sample-steps 1 --validation-prompts circle --frames 8"
    clip = tmp_path / "clips" / "red-circle-diagonally-0.gif"
    assert minit2v(["train", "--data", str(clip), "--out", str(tmp_path / "run"), *options.split()]) == 0
    with (tmp_path / "run" / "validation.csv").open(newline="") as file:
        before, after = (float(row["loss"]) for row in csv.DictReader(file))
    assert after <= 0.5 * before


# Faults -----------------------------------------------------------------------------------------------------------


def test_one_broken_clip_is_skipped_and_five_steps_in_a_row_stop(make):
    said: list[str] = []
    trainer = make(Clips(4, broken=(1,)), say=said.append, batch=1, steps=8)
    before = weights(trainer)
    trainer.step()
    good = weights(trainer)
    assert any(not torch.equal(value, before[name]) for name, value in good.items())
    values = trainer.step()
    assert values["skipped"] == 1 and "step 1: its loss is not finite; files: clip1.mp4;" in said[0]
    assert all(torch.equal(value, good[name]) for name, value in weights(trainer).items())
    trainer.run()
    assert trainer.skipped == 2 and trainer.done == 8  # the run went on

    trainer = make(Clips(1, broken=(0,)), out="all", batch=1, steps=9)
    trainer.save()
    with pytest.raises(RuntimeError, match="step 4: its loss .* clip0.mp4; first tensor: lora.* 5 steps in a row .*"
                                           "step-000000.ckpt"):  # fmt: skip
        for _ in range(9):
            trainer.step()


def test_a_gradient_that_is_not_finite_is_named(make):
    said: list[str] = []
    trainer = make(say=said.append, train="full")
    name, p = trainer.trained[3]
    p.register_hook(lambda grad: grad * float("inf"))
    before = weights(trainer)
    trainer.step()
    assert f"a gradient is not finite; files: clip0.mp4, clip1.mp4; first tensor: {name}" in said[0]
    assert all(torch.equal(value, before[n]) for n, value in weights(trainer).items())


def test_another_recipe_is_refused_in_the_folder_of_a_run(make, tmp_path):
    make().run()
    said = json.loads((tmp_path / "run" / "run.json").read_text())
    assert said["recipe"]["learning_rate"] == 1e-3 and said["recipe"]["weight_decay"] == 0.0  # also what was not given
    with pytest.raises(ValueError, match=r"another run: batch was 2 .*; learning_rate was .* is 0.002\. .*--resume"):
        make(learning_rate=2e-3, batch=4)
    with pytest.raises(ValueError, match="the data is another"):
        make(Clips(2))
    assert make(keep=5, log_every=1).done == 4  # what changes no weight may change
    longer = make(steps=6)
    longer.run()
    assert longer.done == 6
    with pytest.raises(ValueError, match="steps was 6 and is 8"):
        make(steps=8, schedule="cosine")


def test_a_broken_checkpoint_gives_way_to_the_one_before(make, tmp_path):
    trainer = make(save_every=1, keep=2)
    trainer.run()
    assert sorted(checkpoints.all_of(tmp_path / "run")) == [3, 4]
    newest = tmp_path / "run" / "step-000004.ckpt"
    newest.write_bytes(newest.read_bytes()[:-200])
    again = make(save_every=1, keep=2)
    assert again.done == 3
    again.run()
    assert all(torch.equal(value, weights(trainer)[name]) for name, value in weights(again).items())
    for path in (tmp_path / "run").glob("*.ckpt"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="is broken"):
        make(save_every=1, keep=2)


@pytest.mark.parametrize("old", [{"trained": {}, "step": 3}, {"weights": torch.ones(2)}, [1, 2],
                                 {"number/done": torch.tensor(3.0), "number/format": torch.tensor(7.0)}])  # fmt: skip
def test_a_checkpoint_of_another_format_is_named(make, tmp_path, old):
    (tmp_path / "run").mkdir()
    torch.save(old, tmp_path / "run" / "step-000003.ckpt")
    said = "step-000003.ckpt has (the format 7|an older format), and this version"
    with pytest.raises(ValueError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


def test_curves_go_to_tensorboard_where_it_is_installed(make, tmp_path, monkeypatch):
    shown = []

    class Writer:
        def __init__(self, folder, purge_step=None):
            shown.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            shown.append((name, step))

        def flush(self): ...

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    make(log_every=2).run()
    assert shown[0] == (str(tmp_path / "run" / "tensorboard"), None)
    assert {("train/loss", 2), ("train/loss", 4), ("train/memory_gib", 4)} <= set(shown)
    rows = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert rows[0] == "step,minutes,loss,norm,rate,skipped,step_seconds,memory_gib" and len(rows) == 3


def test_what_the_networks_have_no_place_for_is_refused_before_a_step(make):
    with pytest.raises(ValueError, match="kohya's files have no place for motion modules"):
        make(cls=UNetMotionModel, targets=("motion",), kohya=True)
    with pytest.raises(ValueError, match="the pipeline has no text encoder"):
        make(out="text", train_text=True)


def test_what_8_bits_need(make):
    with pytest.raises(ValueError, match="needs bitsandbytes|runs on CUDA"):
        make(optimizer="adamw8bit")


# Kills ------------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_bits(tmp_path, randomize_, forked):
    whole, killed, asked = (tmp_path / name for name in ("whole", "killed", "asked"))

    def start(out):
        def run():
            torch.set_num_threads(1)
            recipe = Recipe(data=("clips",), out=out, train="full", steps=10, batch=2, learning_rate=1e-3, warmup=0,
                            save_every=1, temporal_dropout=0.2, ema=0.9, validate_every=0)  # fmt: skip
            Trainer(make_pipe(randomize_), Clips(), recipe, say=lambda _: 0).run()

        return forked(run)

    def step(out):
        return max(checkpoints.all_of(out), default=0)

    def wait_beyond(out, before):
        deadline = time.monotonic() + 60
        while step(out) <= before:
            assert time.monotonic() < deadline
            time.sleep(0.002)

    began = time.monotonic()
    assert start(whole).wait()[0] == 0
    seconds, rng, kills = time.monotonic() - began, random.Random(0), []
    for _ in range(4):
        if (before := step(killed)) < 10:
            child = start(killed)
            wait_beyond(killed, before)
            time.sleep(rng.uniform(0, 0.06) * seconds)
            os.kill(child.pid, signal.SIGKILL)
            kills.append(child.wait()[0])
    assert kills.count(-signal.SIGKILL) >= 2  # it was killed, and went on
    code, said = start(killed).wait()
    assert code == 0, said
    a, b = (checkpoints.load_state(checkpoints.newest(folder)) for folder in (whole, killed))
    assert a.keys() == b.keys() and a["number/done"] == a["number/averaged"] == 10
    assert {name.split("/")[0] for name in a} == {"trained", "average", "optimizer", "number"}
    assert not [name for name, x in a.items() if not torch.equal(x, b[name]) and name != "number/seconds"]
    assert not list(killed.glob(".*.ckpt"))  # nothing half-written is left

    child = start(asked)
    wait_beyond(asked, 0)
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait()[0] == -signal.SIGTERM  # which saves after the step that runs
    assert 0 < checkpoints.load_state(checkpoints.newest(asked))["number/done"] < 10


def test_a_run_that_is_asked_to_end_says_where_it_goes_on(tmp_path, randomize_):
    class Asking(Clips):
        def load(self, items):
            if 4 in items:
                signal.raise_signal(signal.SIGINT)
            return super().load(items)

    said = []
    recipe = Recipe(data=("clips",), out=str(tmp_path / "run"), steps=9, batch=2, validate_every=0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            Trainer(make_pipe(randomize_), Asking(8), recipe, say=said.append).run()
    finally:
        signal.signal(signal.SIGINT, before)
    done = checkpoints.load_state(checkpoints.newest(tmp_path / "run"))["number/done"]
    assert 0 < done < 9
    assert said[-1] == f"step {done:.0f} is saved in {tmp_path / 'run'}; the same command goes on from it"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such lock")
def test_two_processes_do_not_train_in_one_folder(tmp_path):
    recipe = Recipe(data=(str(tmp_path / "none"),), out=str(tmp_path / "run"))
    with start.alone(tmp_path / "run"), pytest.raises(ValueError, match="another process is training in .*run: wait"):
        start.train(recipe, None)
    assert not (tmp_path / "run").exists()  # nothing was written
    with start.alone(tmp_path / "run"):  # the lock has ended
        (tmp_path / "run" / "log.csv").touch()
    assert (tmp_path / "run" / "log.csv").exists()


# What people read --------------------------------------------------------------------------------------------------


def test_an_option_without_a_value_is_printed_with_its_default(tmp_path):
    lines = Recipe(data=("a",), out="b", prompt="x").filled("UNet3DConditionModel").lines()
    assert len(lines) == len(dataclasses.fields(Recipe)) and "prompt = x" in lines and "stride = none" in lines
    assert "text_dropout = none (default: 0.1, with one clip 0)" in lines and "targets = none (default: both)" in lines


def test_samples_stand_below_their_prompts(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(validation, "draw", lambda strips: drawn.append(strips) or sheet.draw(strips))
    validation.save_grid(torch.rand(2, 16, 3, 8, 8), ["a \u041a\u043e\u0442", ""], tmp_path / "a.png")
    (text, frames), (none, _) = drawn[0]
    assert text == ["a \u041a\u043e\u0442"] and none == ["(the empty caption)"]
    assert frames.shape == (8, 3, 8, 8) and frames.min() < 0 < frames.max() and (tmp_path / "a.png").exists()


def test_wrong_data_is_named_before_a_model_is_loaded(tmp_path, capsys):
    (tmp_path / "clips").mkdir()
    words = ["train", "--out", str(tmp_path / "run"), "--model", str(tmp_path / "no model"), "--data"]
    assert minit2v([*words, str(tmp_path / "clips")]) == 1
    assert "clips: no videos and no pictures" in capsys.readouterr().err
    assert minit2v([*words, str(tmp_path / "clip")]) == 1
    assert "(nearest: 'clips')" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["lora", "patterns"])
def test_the_check_names_wrong_targets_before_it_reads_clips(tmp_path, capsys, kind):
    (tmp_path / "a.mp4").write_bytes(b"broken")
    words = ["train", "--check", "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--train", kind]
    assert minit2v([*words, "--targets", "to_k", "spatail"]) == 1
    said = capsys.readouterr().err
    assert "has no layer or parameter 'spatail' (nearest: 'spatial')" in said and "a.mp4" not in said


# The whole --------------------------------------------------------------------------------------------------------


def test_clips_in_a_folder_become_a_lora_that_loads(tmp_path, capsys):
    """`minit2v train` with the embedded model: samples, curves, the file, and the same frames from the file."""
    from minit2v import cli
    from minit2v.files.video import export_to_video
    from minit2v.training import world

    rng, folder = random.Random(0), tmp_path / "clips"
    folder.mkdir()
    for n, what in enumerate(world.TRAINED[:2]):
        video = world.render([world.draw_clip(rng, *what)])[0]
        export_to_video(video.permute(1, 2, 3, 0).numpy(), folder / f"{n}.mp4", fps=8, quality=9)
        (folder / f"{n}.txt").write_text(world.captions(*what)[0])
    (folder / "broken.mp4").write_bytes(b"x" * 100)
    (folder / "broken.txt").write_text("a broken file")
    words = ["train", "--data", str(folder), "--out", str(tmp_path / "run"), "--steps=2", "--batch=2",
             "--learning-rate=1e-2", "--sample-steps=2", "--validate-every=2", "--kohya", "--validation-clips=1",
             "--log-every=1", "--validation-prompts", "a red circle moving left"]  # fmt: skip
    assert cli.main(words) == 0
    said = capsys.readouterr()
    path = tmp_path / "run" / "lora.safetensors"
    assert said.out.splitlines()[-1] == str(path) and "rank = 8" in said.out
    assert "broken.mp4 is skipped" in said.err and "skipped files: 1;" in said.err
    assert "loaded from the file it makes the same videos" in said.err
    samples = sorted(p.name for p in (tmp_path / "run" / "samples").iterdir())
    assert samples == ["step-000000.mp4", "step-000000.png", "step-000002.mp4", "step-000002.png"]
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 3
    assert len((tmp_path / "run" / "validation.csv").read_text().splitlines()) == 3
    assert f"cache {tmp_path / 'run' / 'cache'}: " in said.err and "the clips of this run take about" in said.err
    assert (tmp_path / "run" / "lora-kohya.safetensors").exists()
    recipe = read_recipe(tmp_path / "run" / "run.json", {})
    trainer = start.prepare(recipe, TextToVideoSDPipeline.from_pretrained("shapes"), say=lambda _: None)
    with pytest.raises(ValueError, match="lora.safetensors makes other videos than the trained model"):
        result.finish(trainer, lambda path: TextToVideoSDPipeline.from_pretrained("shapes"))  # it forgets the file
    assert cli.main(words) == 0  # the same command again has nothing to do
    assert "going on at step 2" in capsys.readouterr().err
    assert cli.main([*words, "--rank", "4"]) == 1
    assert "rank was 8 and is 4" in capsys.readouterr().err
