"""What memory a training is planned to take, against the live bytes of real steps on the CPU; the command."""

from typing import NamedTuple

import pytest
import torch

from minit2v import AnimateDiffPipeline, DiffusionPipeline, MotionAdapter
from minit2v.cli import main
from minit2v.cli import plan as command
from minit2v.memory.live import GIB, Live
from minit2v.memory.plan import twin
from minit2v.memory.training import Clips, Method, TrainingPlanner
from minit2v.training.planning import trained_of, training_planner_of_model
from minit2v.training.recipe import LORAS, Recipe
from minit2v.training.trainer import Trainer


def load(name):
    if name == "shapes":
        return DiffusionPipeline.from_pretrained("shapes")
    motion = MotionAdapter.from_pretrained("shapes-motion")
    return AnimateDiffPipeline.from_pretrained("shapes-image", motion_adapter=motion)


class Clip(NamedTuple):
    latents: torch.Tensor
    text: torch.Tensor
    sources: list
    captions: list


class Noise:
    """Data of noise: latents (b c f h w) and texts."""

    fingerprint = "noise"

    def __init__(self, *shape, text):
        self.shape, self.text_shape = shape, text

    def __len__(self):
        return 2

    def batch(self, step, count):
        return [*range(count)]

    def load(self, items):
        return Clip(torch.randn(len(items), *self.shape), torch.randn(len(items), *self.text_shape), items, items)


def measured(pipe, train, method, clips, folder):
    """The most live bytes in the trainer's second step: all weights, states and activations."""
    config, factor = pipe.unet.config, pipe.vae_scale_factor
    data = Noise(config.in_channels, clips.frames, clips.height // factor, clips.width // factor,
                 text=(TOKENS, config.cross_attention_dim))  # fmt: skip
    recipe = Recipe(out=str(folder), train=train, precision=method.precision, checkpointing=method.checkpointing,
                    batch=clips.clips, accumulate=method.accumulate, validate_every=0)  # fmt: skip
    trainer = Trainer(pipe, data, recipe, say=lambda line: None)
    known = [*pipe.unet.parameters(), *pipe.unet.buffers(), *trainer.average.values]
    with Live(known) as live:
        trainer.step()
        live.peak = live.now
        trainer.step()
    return live.peak + sum(v.nbytes for v in known)


TOKENS = 16
CASES = [
    ("shapes", "full", Method("float32")),
    ("shapes", "temporal", Method("bf16", checkpointing=True)),
    ("shapes", "lora", Method("bf16")),
    ("animate", "motion", Method("bf16", accumulate=2)),
    ("animate", "motion-lora", Method("float32", checkpointing=True)),
]


@pytest.mark.parametrize("name, train, method", CASES, ids=str)
def test_planned_is_what_a_step_takes(name, train, method, tmp_path):
    clips, pipe = Clips(8, 64, 64, method.accumulate), load(name)
    unet = twin(pipe.unet)
    planner = TrainingPlanner(unet, trained_of(unet, train, (), 8), clips, tokens=TOKENS, factor=pipe.vae_scale_factor,
                              ema=train not in LORAS, device="cpu")  # fmt: skip
    real = measured(pipe, train, method, clips, tmp_path)
    assert planner.plan(method).peak == pytest.approx(real, rel=0.1)
    if train == "lora":  # so that the check can fail
        assert planner.plan(Method("bf16", checkpointing=True)).peak < 0.7 * real


def test_what_sharding_batches_and_averages_add():
    def planner(**more):
        return training_planner_of_model("shapes", "temporal", **{"ema": False, "batch": 4} | more)

    one, several = planner(), planner(processes=4)
    alone, sharded = one.plan().kinds, several.plan(Method(shard=True)).kinds
    trained = alone["trained weights"]
    assert alone["optimizer"] == 2 * trained and one.plan(Method(eight_bits=True)).kinds["optimizer"] == trained // 2
    for kind in ("frozen weights", "trained weights", "optimizer"):
        assert sharded[kind] == alone[kind] // 4
    assert sharded["gradients"] >= trained // 4 and sharded["communication"] > 0
    assert several.clips.clips == 1 and one.clips.clips == 4
    pieces = one.plan(Method(accumulate=2)).kinds
    assert pieces["gradients"] == trained > alone.get("gradients", 0) and "communication" not in alone
    assert alone["activations"] == pytest.approx(2 * pieces["activations"], rel=0.02)
    one.ema = True
    assert one.plan().kinds == alone | {"EMA": trained}


def test_a_lora_of_the_large_model_fits_into_8_gib():
    planner = training_planner_of_model("ms-1.7b", "lora", "both", 16, batch=1, frames=16, height=256, width=256)
    assert sum(p.numel() for p in planner.trained) == 6_645_760
    plan = planner.plan(Method(checkpointing=True))  # what is chosen for 8 GiB: without checkpointing it is 12.3
    assert plan.kinds["frozen weights"] == pytest.approx(2.63 * GIB, rel=0.01)
    assert 4 * GIB < plan.peak < 5 * GIB


def test_kinds_of_training():
    def count(train, *targets, model="shapes", **more):
        return sum(p.numel() for p in training_planner_of_model(model, train, targets, **more).trained)

    motion = {"model": "shapes-image", "adapter": "shapes-motion"}
    assert count("temporal") + count("spatial") == count("full")
    assert count("lora", "spatial") + count("lora", "temporal") == count("lora") < count("motiondirector")
    assert count("motion", **motion) + count("image", **motion) == count("full", **motion)
    assert count("motion-lora", **motion) == count("lora", "motion", **motion)
    assert count("patterns", "attn1.to_q") < count("attention")
    assert training_planner_of_model("shapes-image", "image", adapter="shapes-motion").clips.frames == 1


@pytest.mark.parametrize(
    "words, said",
    [
        (["--train", "motoin"], "not 'motoin' (nearest: 'motion')"),
        (["--train", "motion"], "train 'motion' is for image models"),
        (["--train", "lora", "--targets", "temporla"], "nearest: 'temporal'"),
        (["--train", "full", "--targets", "temporal"], "targets goes with train 'lora'"),
        (["--train", "lora", "--rank", "1000"], "rank 1000 is larger than"),
        (["--train", "lora", "--adapter", "shapes-motion"], "needs a UNet2DConditionModel"),
        (["--train", "image", "--num-frames", "4"], "one frame at a time"),
        (["--train", "lora", "--dtype", "float16"], "--dtype cannot be used with --train"),
        (["--rank", "4"], "--rank needs --train"),
        (["--train", "lora", "--processes", "3"], "batch 4 does not divide among 3 processes"),
        (["--train", "lora", "--accumulate", "3"], "--accumulate 3 must divide the 4 clips"),
    ],
)
def test_what_does_not_go(capsys, words, said):
    assert main(["plan", "--model", "shapes", *words]) in (1, 2)
    assert said in capsys.readouterr().err


def test_the_command_prints_and_chooses(capsys, monkeypatch):
    kept = training_planner_of_model("shapes", "lora", batch=1, frames=4)  # what it has counted it counts no more
    monkeypatch.setattr(command, "training_planner_of_model", lambda *args, **given: kept)
    words = ["plan", "--model", "shapes", "--train", "lora", "--num-frames", "4"]
    assert main([*words, "--memory", "60MB"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["MiB", "at", "the", "peak"] and "0.11 M parameters trained, 4.03 M frozen" in err
    assert [line.split("  ")[0] for line in lines[1:-1]] == [
        "float32", "float32, checkpointing", "bf16", "bf16, checkpointing", "bf16, checkpointing, 8-bit optimizer"]
    assert lines[-1].startswith("the fastest plan that fits into 57.22 MiB: ")
    numbers = [float(x) for x in lines[1].split()[1:]]
    assert sum(numbers[:-1]) == pytest.approx(numbers[-1], abs=0.05)
    assert kept.least().method == Method("bf16", True, 1, eight_bits=True)
    assert main([*words, "--memory", "1MB"]) == 1
    assert "nothing fits into 0.95 MiB; the smallest plan: " in capsys.readouterr().out
