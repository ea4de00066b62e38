"""The `minit2v` command, mostly called in this process, on small random models."""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from minit2v import cli, pipelines
from minit2v.cli import loading, messages, videos
from minit2v.files import embedded
from minit2v.files.video import export_to_video, load_video, read_metadata

FAST = ["--num-frames", "3", "--steps", "2"]
RESTYLED = ["--steps", "4", "--strength", "0.5"]


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_official_folder):
    """A whole pipeline: 16x16 pixels, and a UNet of one level, which is loaded in half the time."""
    shallow = dict(block_out_channels=[32], down_block_types=["CrossAttnDownBlock3D"],
                   up_block_types=["CrossAttnUpBlock3D"])
    return make_official_folder(tmp_path_factory.mktemp("model"), small=True, unet=shallow)


@pytest.fixture
def copy(tmp_path, make_official_folder):
    return make_official_folder(tmp_path / "copy", small=True)


KEPT = {}


@pytest.fixture(autouse=True)
def loaded_once(model, images, monkeypatch):
    """The parts of `model` and `images`, which no test changes, are loaded once: half of a short run."""
    load = pipelines.files._load

    def once(cls, path, *arguments):
        if Path(path).absolute() not in (model, images):
            return load(cls, path, *arguments)
        key = repr((cls, path, arguments))
        if key not in KEPT:
            KEPT[key] = load(cls, path, *arguments)
        return KEPT[key]

    monkeypatch.setattr(pipelines.files, "_load", once)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test in a folder of its own, with no setting left over."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MINIT2V_KERNELS", "")


@pytest.fixture
def run(capsys):
    """run(*args) -> (exit code, lines of stdout, lines of stderr without progress bars)."""

    def call(*args):
        code = cli.main([str(a) for a in args])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out.splitlines(), [line for line in err.splitlines() if line.startswith("minit2v")]

    return call


def pixels(path):
    return np.stack([np.asarray(f) for f in load_video(path)])


def fails(result, *said, code=1):
    """Whether the command ended with this code and one line that says all of this."""
    got, out, err = result
    errors = [line for line in err if "error:" in line]
    assert got == code and len(errors) == 1 and not out, result
    for word in said:
        assert re.search(word, errors[0]), (word, errors[0])


# ------------------------------------------------------------------------------------------------------------ generate


def test_generate_writes_a_video_and_says_what_it_did(run, model):
    code, out, err = run("generate", "a cat runs", "--model", model, *FAST, "--seed", 7)
    assert code == 0 and out == ["a-cat-runs-7.mp4"] and os.listdir() == ["a-cat-runs-7.mp4"]
    assert pixels(out[0]).shape == (3, 16, 16, 3)
    said = "\n".join(err)
    for word in ("3 frames of 16x16 at 8 fps", "2 steps of DDIMScheduler", "guidance 9", "seed 7", "float32 on cpu"):
        assert word in said
    stored = read_metadata(out[0])
    assert stored["prompt"] == "a cat runs" and stored["seed"] == 7 and stored["model"] == str(model)
    assert stored["versions"]["torch"] == torch.__version__ and stored["steps"] == 2 and stored["fps"] == 8


def test_every_option_reaches_the_pipeline(run, model):
    code, out, err = run(
        "generate", "a cat", "--model", model, "--num-frames", 2, "--steps", 3, "--guidance-scale", 2.5, "--seed", 1,
        "--negative-prompt", "a dog", "--scheduler", "euler-a", "--height", 24, "--width", 32, "--fps", 12.5,
        "--dtype", "bfloat16", "--device", "cpu", "--compat", "diffusers", "--kernels", "torch", "-o", "x.mp4")
    assert code == 0 and out == ["x.mp4"]
    frames, fps = load_video("x.mp4", return_fps=True)
    assert len(frames) == 2 and frames[0].size == (32, 24) and fps == 12.5
    stored = read_metadata("x.mp4")
    expected = {"guidance_scale": 2.5, "negative_prompt": "a dog", "scheduler": "EulerAncestralDiscreteScheduler",
                "height": 24, "width": 32, "dtype": "bfloat16", "compat": "diffusers", "kernels": "torch", "steps": 3}
    assert {k: stored[k] for k in expected} == expected
    assert os.environ["MINIT2V_KERNELS"] == ""  # as before the call
    assert any("compat diffusers" in line and 'negative prompt "a dog"' in line for line in err)


def test_kernels_for_single_operations_and_the_fast_path(run, copy, monkeypatch):
    from minit2v import fast

    made, optimize = [], fast.optimize
    monkeypatch.setattr(fast, "optimize", lambda network, **kw: (made.append(type(network).__name__),
                                                                 optimize(network, **kw)))
    base = ["generate", "a cat", "--model", copy, *FAST, "--seed", 1]
    code, out, err = run(*base, "--kernels", "torch,geglu=auto", "--optimize", "-o", "a.mp4")
    assert code == 0 and os.environ["MINIT2V_KERNELS"] == "" and read_metadata("a.mp4")["kernels"] == "torch,geglu=auto"
    assert made == ["UNet3DConditionModel", "AutoencoderKL"] and any("optimized" in line for line in err)
    stored = read_metadata("a.mp4")
    assert stored["kernels"] == "torch,geglu=auto" and stored["optimize"] is True
    assert run("generate", "--replay", "a.mp4", "--trust", "-o", "b.mp4")[0] == 0 and len(made) == 4
    with monkeypatch.context() as patch:
        patch.setattr("minit2v.fast.executor.UNetExecutor.predict", lambda *_: pytest.fail("not as it is written"))
        assert run("generate", "--replay", "a.mp4", "--trust", "--no-optimize", "-o", "c.mp4")[0] == 0
    assert len(made) == 4
    assert run(*base, "-o", "d.mp4")[0] == 0 and len(made) == 4
    assert np.abs(pixels("a.mp4").astype(int) - pixels("d.mp4").astype(int)).max() <= 2


def test_functions_of_ones_own(run, model, monkeypatch, tmp_path):
    """They run; one that is not there is said at once; no file of somebody else's has them imported."""
    (tmp_path / "own_attention.py").write_text(
        "from minit2v_kernels import temporal_attention_ref\ncalls = []\n"
        "def attend(*args):\n    calls.append(args[0].shape)\n    return temporal_attention_ref(*args)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    base = ["generate", "a cat", "--model", model, *FAST, "--seed", 1]
    code, *_ = run(*base, "--kernels", "torch,temporal_attention=own_attention:attend", "-o", "a.mp4")
    assert code == 0 and __import__("own_attention").calls
    fails(run(*base, "--kernels", "temporal_attention=nowhere_at_all:attend"), "cannot import 'nowhere_at_all'")
    fails(run("generate", "--replay", "a.mp4", "--trust"), "own_attention:attend", "--kernels")
    assert run("generate", "--replay", "a.mp4", "--trust", "--kernels", "auto", "-o", "b.mp4")[0] == 0


def test_options_change_the_video(run, model):
    base = ["generate", "a cat", "--model", model, *FAST, "--seed", 1]
    changes = [[], ["--seed", 2], ["--negative-prompt", "a dog"], ["--scheduler", "euler"], ["--guidance-scale", 1],
               ["--steps", 3], ["--dtype", "bfloat16"]]
    videos = []
    for n, change in enumerate(changes):
        assert run(*base, *change, "-o", f"{n}.gif")[0] == 0
        videos.append(pixels(f"{n}.gif"))
    for n, video in enumerate(videos[1:], 1):
        assert not np.array_equal(video, videos[0]), changes[n]


def test_the_seed_is_drawn_said_and_stored(run, model):
    seeds = set()
    for n in range(2):
        code, out, err = run("generate", "a cat", "--model", model, *FAST, "-o", f"{n}.mp4")
        stored = read_metadata(out[0])
        seeds.add(stored["seed"])
        assert code == 0 and any(f"seed {stored['seed']}," in line for line in err)
    assert len(seeds) == 2


def test_without_a_model_the_embedded_one_and_its_settings(run, model, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "ASSETS", tmp_path / "assets")
    fails(run("generate", "a cat"), "assets/shapes: this installation lacks the embedded models")
    shutil.copytree(model, tmp_path / "assets" / "shapes")
    code, out, err = run("generate", "a cat", "--steps", 1, "-o", "a.gif")
    guidance = f"guidance {videos.PRESETS['shapes']['guidance_scale']:g}"
    assert code == 0 and any("16 frames" in line and guidance in line for line in err)
    assert read_metadata("a.gif")["model"] == "shapes"
    assert run("generate", "--replay", "a.gif", "--trust", "-o", "b.gif")[0] == 0
    assert Path("a.gif").read_bytes() == Path("b.gif").read_bytes()
    assert run("restyle", "a.gif", "a dog", "--steps", 2)[0] == 0
    assert run("inspect", "shapes")[0] == 0


def test_scheduler_help_prints_the_table(capsys):
    assert cli.main(["generate", "a cat", "--scheduler", "help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("dpm++-2m", "DPM++ 2M", "dpmpp_2m", "-karras", "LCMScheduler"))


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_replay_makes_the_same_video(run, model, suffix, monkeypatch):
    made = ["generate", "a 🐱 = \"50%\"; runs\\", "--model", os.path.relpath(model), *FAST, "--negative-prompt=-x = y",
            "--scheduler", "dpm++", "--fps", 12, "-o", f"a{suffix}"]
    assert run(*made)[0] == 0
    Path("else").mkdir()
    monkeypatch.chdir("else")  # the model is found from here, too
    code, out, err = run("generate", "--replay", f"../a{suffix}", "--trust", "-o", f"b{suffix}")
    assert code == 0 and not any("warning" in line for line in err), err
    assert np.array_equal(pixels(f"../a{suffix}"), pixels(f"b{suffix}"))
    assert Path(f"../a{suffix}").read_bytes() == Path(f"b{suffix}").read_bytes()


def test_replay_with_changes(run, model):
    assert run("generate", "a cat", "--model", model, *FAST, "--seed", 3, "-o", "a.mp4")[0] == 0
    assert run("generate", "--replay", "a.mp4", "--trust", "--steps", 3, "-o", "b.mp4")[0] == 0
    one, two = read_metadata("a.mp4"), read_metadata("b.mp4")
    assert two["steps"] == 3 and {**one, "steps": 3} == two
    assert run("generate", "a dog", "--replay", "a.mp4", "--trust", "-o", "c.mp4")[0] == 0
    assert read_metadata("c.mp4") == {**one, "prompt": "a dog"}
    Path("list").write_text("a dog\na cat\n")
    code, out, _ = run("generate", "--prompts", "list", "--replay", "a.mp4", "--trust")
    assert code == 0 and [read_metadata(f)["prompt"] for f in out] == ["a dog", "a cat"]
    assert np.array_equal(pixels(out[1]), pixels("a.mp4"))


def test_replay_of_a_prompt_that_looks_like_an_option(run, model):
    assert run("generate", "--model", model, *FAST, "-o", "a.mp4", "--", "--cat")[0] == 0
    assert run("generate", "--replay", "a.mp4", "--trust", "-o", "b.mp4")[0] == 0
    assert read_metadata("b.mp4")["prompt"] == "--cat"


def test_replay_of_other_versions_and_devices_warns(run, model):
    assert run("generate", "a cat", "--model", model, *FAST, "-o", "a.mp4")[0] == 0
    stored = read_metadata("a.mp4")
    stored["versions"]["torch"] = "1.0"
    export_to_video(load_video("a.mp4"), "old.mp4", metadata={**stored, "device": "xpu:7"})
    code, out, err = run("generate", "--replay", "old.mp4", "--trust", "-o", "b.mp4")
    warned = [line for line in err if "warning" in line]
    assert code == 0 and len(warned) == 2 and f"torch 1.0 -> {torch.__version__}" in warned[0] and "xpu:7" in warned[1]
    assert np.array_equal(pixels("a.mp4"), pixels("b.mp4"))


def test_replay_refuses_what_holds_no_settings(run, model):
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    export_to_video(frames, "none.mp4")
    export_to_video(frames, "other.mp4", metadata={"prompt": "a cat"})
    export_to_video(frames, "bad.mp4", metadata={"minit2v": "generate", "prompt": "a cat", "steps": "many"})
    Path("text.mp4").write_text("hello")
    fails(run("generate", "--replay", "none.mp4"), "no settings")
    fails(run("generate", "--replay", "other.mp4"), "no settings")
    fails(run("generate", "--replay", "text.mp4", "--trust"), "not a video")
    fails(run("generate", "--replay", "gone.mp4"), "gone.mp4: no such file")
    fails(run("generate", "--replay", "bad.mp4"), "bad.mp4: the settings stored in this file are not valid: .*'many'")


# ------------------------------------------------------------------------------------------------- prompts and outputs


def test_several_prompts_and_one_that_fails(run, model):
    code, out, err = run("generate", "a cat", "broken \ud800", "a dog", "--model", model, *FAST, "--seed", 5)
    assert code == 1 and out == ["a-cat-5.mp4", "a-dog-5.mp4"] and len(os.listdir()) == 2
    assert [line for line in err if "error:" in line] and "1 of 3 prompts failed" in err[-1]
    assert run("generate", "a dog", "--model", model, *FAST, "--seed", 5, "-o", "alone.mp4")[0] == 0
    assert np.array_equal(pixels("alone.mp4"), pixels("a-dog-5.mp4"))  # its company changes nothing


def test_prompts_from_a_file_and_standard_input(run, model, monkeypatch):
    Path("list.txt").write_text("a cat\n\n  ein Hund läuft  \n", encoding="utf-8")
    code, out, _ = run("generate", "first", "--prompts", "list.txt", "--model", model, *FAST, "--seed", 1, "-o", "o/x")
    assert code == 0 and out == [f"o/x/{name}-1.mp4" for name in ("first", "a-cat", "ein-hund-läuft")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("a bird\n"))
    assert run("generate", "--prompts", "-", "--model", model, *FAST, "--seed", 1)[1] == ["a-bird-1.mp4"]
    Path("empty.txt").write_text("\n \n")
    Path("latin.txt").write_bytes(b"a caf\xe9\n")
    fails(run("generate", "--prompts", "empty.txt", "--model", model), "empty.txt: .*no prompts")
    fails(run("generate", "--prompts", "latin.txt", "--model", model), "latin.txt: not UTF-8")
    fails(run("generate", "--prompts", "gone.txt", "--model", model), "gone.txt: No such file")


def test_made_names_replace_nothing_and_given_ones_do(run, model):
    args = ["--model", model, *FAST, "--seed", 1]
    assert run("generate", "a cat", "a cat", *args)[1] == ["a-cat-1.mp4", "a-cat-1-2.mp4"]
    assert run("generate", "A cat!", *args)[1] == ["a-cat-1-3.mp4"]
    assert run("generate", "a cat", "a dog", *args, "-o", "v.gif")[1] == ["v-1.gif", "v-2.gif"]
    assert run("generate", "a cat", "a dog", *args, "-o", "v.gif")[1] == ["v-1-2.gif", "v-2-2.gif"]
    Path("v.mp4").write_text("old")
    code, out, err = run("generate", "a cat", *args, "-o", "v.mp4")
    assert out == ["v.mp4"] and any("v.mp4 will be replaced" in line for line in err) and len(pixels("v.mp4")) == 3
    Path("folder.mp4").mkdir()
    assert run("generate", "a cat", *args, "-o", "folder.mp4")[1] == ["folder.mp4/a-cat-1.mp4"]


@pytest.mark.parametrize("prompt,name", [("", "video-1.mp4"), ("🎬🐱", "video-1.mp4"), ("a 🐱", "a-1.mp4"),
                                         ("../../etc/x", "etc-x-1.mp4"), ("cat " * 2500, "cat-" * 10 + "1.mp4"),
                                         ("猫が走る", "猫が走る-1.mp4")])
def test_unusual_prompts(run, model, prompt, name):
    code, out, err = run("generate", "--model", model, *FAST, "--seed", 1, "--", prompt)
    assert code == 0 and out == [name] and read_metadata(name)["prompt"] == prompt
    warned = [line for line in err if "warning" in line]
    assert len(warned) == (len(prompt) > 1000) and all(len(line) < 400 for line in warned)


def test_unwritable_outputs_fail_before_the_work(run, model, monkeypatch):
    Path("file").write_text("")
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("loaded the model"))
    fails(run("generate", "a cat", "--model", model, "-o", "file/a.mp4"), "file", "Not a directory|File exists")
    if Path("/proc").is_dir():  # where not even root may write
        fails(run("generate", "a cat", "--model", model, "-o", "/proc/a.mp4"), "/proc: cannot write here")
        fails(run("generate", "a cat", "--model", model, "-o", "/proc/nowhere/a.mp4"), "/proc/nowhere")
    fails(run("generate", "a cat", "--model", model, "-o", "a.txt"), "must end in .mp4", code=2)
    assert os.listdir() == ["file"]


def test_a_disk_that_fills_up(run, model, monkeypatch):
    import minit2v.files.video

    def full(command, frames, path, log):
        Path(command[-1]).write_bytes(b"half")
        raise OSError(28, "no space left on the disk", str(path))

    monkeypatch.setattr(minit2v.files.video, "_encode", full)
    fails(run("generate", "a cat", "--model", model, *FAST, "-o", "a.mp4"), "a.mp4: no space left on the disk")
    assert os.listdir() == []


# -------------------------------------------------------------------------------------------------------------- errors


USAGE = [
    (["generate"], "give a prompt"),
    (["generate", "x", "--steps", "0"], "--steps: must be a whole number of at least 1"),
    (["generate", "x", "--steps", "-3"], "--steps"),
    (["generate", "x", "--steps", "2.5"], "--steps"),
    (["generate", "x", "--num-frames", "0"], "--num-frames"),
    (["generate", "x", "--seed", "-1"], "--seed"),
    (["generate", "x", "--seed", str(2**64)], "--seed"),
    (["generate", "x", "--fps", "0"], "--fps"),
    (["generate", "x", "--fps", "nan"], "--fps"),
    (["generate", "x", "--guidance-scale", "high"], "--guidance-scale"),
    (["generate", "x", "--dtype", "int8"], "--dtype"),
    (["generate", "x", "--kernels", "cuda"], "--kernels: must be one of 'auto', 'torch', 'triton', not 'cuda'"),
    (["generate", "x", "--kernels", "torch,geglo=triton"], "--kernels: .*unknown op 'geglo'; did you mean 'geglu'"),
    (["bisect", "--dtype", "float64"], "--dtype"),
    (["bisect", "--frames", "0"], "--frames"),
    (["generate", "x", "--compat", "comfy"], "--compat"),
    (["generate", "x", "--step", "3"], "unknown argument '--step'.*--steps"),
    (["generate", "x", "--strength", "1"], "unknown argument '--strength'"),
    (["restyle", "x.mp4", "y", "--strength", "1.5"], "--strength: must be a number from 0 to 1"),
    (["restyle", "x.mp4", "y", "--num-frames", "4"], "--num-frames"),
    (["restyle"], "video"),
    (["restyle", "x.mp4"], "give a prompt"),
    (["animate"], "give a prompt"),
    (["animate", "x", "--adapter", "y"], "--adapter needs an image model: give --base MODEL"),
    (["animate", "x", "--strength", "0.5"], "--strength .* give --video"),
    (["animate", "x", "--video", "y.mp4", "--num-frames", "4"], "--num-frames: the input video sets the number"),
    (["animate", "x", "--model", "y"], "unknown argument '--model'"),
    (["inspect"], "model"),
    (["generat"], "generat"),
    ([], "command"),
]


@pytest.mark.parametrize("args,said", USAGE)
def test_wrong_usage_is_one_line_and_code_2(args, said, capsys):
    assert cli.main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(said, err)


def test_version_and_help(capsys):
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"minit2v \d+\.\d+\S*\n", capsys.readouterr().out)
    assert cli.main(["generate", "--help"]) == cli.main(["animate", "--help"]) == 0
    said = capsys.readouterr().out
    for name in (*videos.SETTINGS, "replay", "prompts", "output", "debug"):
        assert f"--{name.replace('_', '-')}" in said


def test_bad_settings_are_one_line(run, model):
    base = ["generate", "a cat", "--model", model, *FAST]
    fails(run(*base, "--scheduler", "eulr"), "no scheduler is called 'eulr'", "nearest: 'euler'")
    fails(run(*base, "--device", "gpu"), "unknown device 'gpu'", "cpu")
    fails(run(*base, "--device", "xpu:9"), "no device 'xpu:9'")
    fails(run(*base, "--width", 17), "width must be a multiple of 2", "nearest")
    fails(run(*base, "--variant", "fp15"), "fp15")
    fails(run(*base, "--revision", "nowhere", "--model", "shape"), "no folder .shape.", "nearest: 'shapes'")
    fails(run(*base, "--model", "gone/folder/of/mine"), "gone/folder/of/mine")
    fails(run(*base, "--kernels", "triton"), "triton")
    assert os.listdir() == []


def test_debug_shows_where(model):
    with pytest.raises(ValueError, match="no scheduler"):
        cli.main(["generate", "a cat", "--model", str(model), "--scheduler", "eulr", "--debug"])


def test_the_message_of_an_error():
    assert messages.one_line(OSError(28, "no space", "a.mp4")) == "a.mp4: no space"
    assert messages.one_line(KeyError("two\n  lines")) == "two lines"
    assert messages.one_line(RuntimeError()) == "RuntimeError"
    assert "--dtype float16" in messages.one_line(torch.OutOfMemoryError("CUDA out of memory. Tried"))


def spoil(folder, part, change):
    file = next((folder / part).glob("*.safetensors"))
    state = load_file(file)
    change(state)
    save_file({k: v.clone() for k, v in state.items()}, file)


def test_broken_models_are_one_line(run, copy):
    weights = copy / "unet/diffusion_pytorch_model.safetensors"
    data, base = weights.read_bytes(), ["generate", "a cat", "--model", copy, *FAST]
    for content, said in [(data[: len(data) // 2], "diffusion_pytorch_model.safetensors"), (data[:5], "safetensors"),
                          (b"", "empty"), (b"\xff" * 1000, "safetensors"), (data[:4000] + data[5000:], "safetensors")]:
        weights.write_bytes(content)
        fails(run(*base), said)
    weights.write_bytes(data)

    spoil(copy, "unet", lambda s: s["conv_out.weight"].fill_(float("nan")))
    fails(run(*base), "NaN", "conv_out.weight")
    weights.write_bytes(data)

    weights.unlink()
    fails(run(*base), "unet", "diffusion_pytorch_model.safetensors")

    class Attack:
        def __reduce__(self):
            return os.system, ("touch attacked",)

    (copy / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"x": Attack()}))
    fails(run(*base), "diffusion_pytorch_model.bin", "refused|broken")
    assert not Path("attacked").exists()
    (copy / "unet/diffusion_pytorch_model.bin").unlink()

    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "unet": ["diffusers", "UNet2DConditionModel"]}))
    fails(run(*base), "UNet2DConditionModel")
    (copy / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "vae"}))
    fails(run(*base), "'vae'")
    (copy / "model_index.json").write_text("{")
    fails(run(*base), "model_index.json")
    assert os.listdir() == []


# -------------------------------------------------------------------------------------------------------------- restyle


@pytest.fixture
def source():
    ramp = np.linspace(0, 1, 24)
    frames = np.stack([np.broadcast_to(np.roll(ramp, n)[:, None, None], (24, 24, 3)) for n in range(4)])
    return export_to_video(frames, "source.mp4", fps=6)


def test_restyle_takes_size_and_rate_of_the_video(run, model, source):
    code, out, err = run("restyle", source, "a cat", "--model", model, *RESTYLED, "--seed", 1)
    assert code == 0 and out == ["a-cat-1.mp4"]
    frames, fps = load_video(out[0], return_fps=True)
    assert len(frames) == 4 and frames[0].size == (24, 24) and fps == 6
    stored = read_metadata(out[0])
    assert stored["strength"] == 0.5 and stored["guidance_scale"] == 15 and stored["fps"] == 6
    assert any("strength 0.5" in line for line in err)
    assert run("restyle", source, "a cat", "--model", model, *RESTYLED, "--height", 16, "--width", 32, "--fps", 3,
               "-o", "b.mp4")[0] == 0
    frames, fps = load_video("b.mp4", return_fps=True)
    assert frames[0].size == (32, 16) and fps == 3


def test_strength_is_how_far_it_goes(run, model, source):
    base = ["restyle", source, "a cat", "--model", model, "--steps", 4, "--seed", 1]
    videos = {}
    for s in (0, 0.5, 1):
        assert run(*base, "--strength", s, "-o", f"{s}.gif")[0] == 0
        videos[s] = pixels(f"{s}.gif").astype(int)
    assert np.abs(videos[0] - videos[0.5]).max() > 0 and np.abs(videos[0.5] - videos[1]).max() > 0


def test_restyle_is_replayed_from_the_same_source_only(run, model, source):
    assert run("restyle", source, "a cat", "--model", model, *RESTYLED, "-o", "a.mp4")[0] == 0
    Path("else").mkdir()
    os.chdir("else")
    assert run("generate", "--replay", "../a.mp4", "--trust", "-o", "b.mp4")[0] == 0
    os.chdir("..")
    assert Path("a.mp4").read_bytes() == Path("else/b.mp4").read_bytes()
    fails(run("generate", "--replay", "a.mp4", "--trust", "--num-frames", 3), "--num-frames", code=2)
    export_to_video(np.zeros((4, 24, 24, 3), np.uint8), source)
    fails(run("generate", "--replay", "a.mp4", "--trust"), "source.mp4", "changed")
    os.unlink(source)
    fails(run("generate", "--replay", "a.mp4", "--trust"), "source.mp4", "no such file")


def test_restyle_of_what_is_no_video(run, model):
    Path("text.mp4").write_text("hello")
    fails(run("restyle", "text.mp4", "a cat", "--model", model), "text.mp4: not a video")
    fails(run("restyle", "gone.mp4", "a cat", "--model", model), "gone.mp4: no such file")
    export_to_video(np.zeros((2, 24, 18, 3), np.uint8), "a.mp4")
    code = run("restyle", "a.mp4", "a cat", "--model", model, *RESTYLED, "-o", "b.gif")[0]
    assert code == 0 and pixels("b.gif").shape == (2, 24, 18, 3)


# -------------------------------------------------------------------------------------------------------------- animate


@pytest.fixture(scope="module")
def images(tmp_path_factory, make_official_folder):
    """Stable Diffusion 1.5's folder, small."""
    return make_official_folder(tmp_path_factory.mktemp("images"), "sd15", small=True)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, make_adapter_folder):
    return make_adapter_folder(tmp_path_factory.mktemp("adapter"), "v1-5-2")


def test_animate_and_again(run, images, adapter, monkeypatch):
    base, motion = os.path.relpath(images), os.path.relpath(adapter)
    code, out, err = run("animate", "a cat", "--base", base, "--adapter", motion, *FAST, "--seed", 7)
    assert code == 0 and out == ["a-cat-7.mp4"] and pixels(out[0]).shape == (3, 16, 16, 3)
    assert err[0] == f"minit2v: loading {base} with {motion}"
    assert "3 frames of 16x16 at 8 fps, 2 steps of DDIMScheduler, guidance 7.5, seed 7" in err[1]
    stored = read_metadata(out[0])
    assert stored["base"] == str(images) and stored["adapter"] == str(adapter) and "model" not in stored
    Path("else").mkdir()
    monkeypatch.chdir("else")
    code, out, err = run("animate", "--replay", "../a-cat-7.mp4", "--trust", "-o", "b.mp4")
    assert code == 0 and not any("warning" in line for line in err), err
    assert Path("../a-cat-7.mp4").read_bytes() == Path("b.mp4").read_bytes()
    fails(run("generate", "--replay", "b.mp4"), "b.mp4 was made by animate: .*minit2v animate --replay")


def test_animate_on_the_schedule_of_the_adapters(images, adapter, tmp_path):
    copy = shutil.copytree(images, tmp_path / "copy")

    def scheduler(**settings):
        settings = {"base": str(copy), "adapter": str(adapter), "device": "cpu", **settings}
        return loading.load("animate", settings, False)[0].scheduler

    for name, cls in (({}, "DDIMScheduler"), ({"scheduler": "euler"}, "EulerDiscreteScheduler")):
        made = scheduler(**name)
        assert type(made).__name__ == cls
        assert made.config.beta_schedule == "linear" and made.config.timestep_spacing == "linspace"
        assert made.config.beta_start == 0.00085 and not made.config.get("clip_sample")

    file = copy / "scheduler/scheduler_config.json"
    published = json.loads(file.read_text())
    file.write_text(json.dumps({**published, "_class_name": "DEISMultistepScheduler"}))  # not here, and not needed
    assert scheduler().config.beta_schedule == "linear"
    file.write_text(json.dumps({**published, "prediction_type": "v_prediction"}))  # another schedule than SD 1.5's
    made = scheduler()
    assert type(made).__name__ == "PNDMScheduler" and made.config.beta_schedule == "scaled_linear"


def test_animate_without_an_adapter_takes_the_published_one(run, images, adapter, monkeypatch):
    assert loading.ADAPTER == "guoyww/animatediff-motion-adapter-v1-5-2"
    monkeypatch.setattr(loading, "ADAPTER", str(adapter))
    code, out, err = run("animate", "a cat", "--base", images, *FAST, "-o", "a.gif")
    assert code == 0 and err[0].endswith(f"with {adapter}") and read_metadata("a.gif")["adapter"] == str(adapter)


def test_animate_without_a_base_takes_the_embedded_models(run, images, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "ASSETS", tmp_path / "assets")
    fails(run("animate", "a cat"), "assets/shapes-image: this installation lacks the embedded models")
    shutil.copytree(images, tmp_path / "assets/shapes-image")
    fails(run("animate", "a cat"), "assets/shapes-motion: this installation lacks the embedded models")
    shutil.copytree(adapter, tmp_path / "assets/shapes-motion")
    code, out, err = run("animate", "a cat", "--steps", 1, "-o", "a.gif")
    guidance = f"guidance {videos.PRESETS['shapes-image']['guidance_scale']:g}"
    assert code == 0 and any("16 frames" in line and guidance in line for line in err)
    stored = read_metadata("a.gif")
    assert (stored["base"], stored["adapter"]) == ("shapes-image", "shapes-motion")
    assert run("inspect", "shapes-image")[0] == run("inspect", "shapes-motion")[0] == 0


def test_animate_a_whole_model(run, images, adapter, tmp_path):
    from minit2v import AnimateDiffPipeline, DDIMScheduler, MotionAdapter

    pipe = AnimateDiffPipeline.from_pretrained(images, motion_adapter=MotionAdapter.from_pretrained(adapter))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **loading.MOTION_SCHEDULE)
    pipe.save_pretrained(tmp_path / "whole")
    code, out, err = run("animate", "a cat", "--base", tmp_path / "whole", *FAST, "--seed", 7, "-o", "whole.gif")
    assert code == 0 and "adapter" not in read_metadata("whole.gif")
    assert run("animate", "a cat", "--base", images, "--adapter", adapter, *FAST, "--seed", 7, "-o", "two.gif")[0] == 0
    assert np.array_equal(pixels("whole.gif"), pixels("two.gif"))
    fails(run("animate", "a cat", "--base", tmp_path / "whole", "--adapter", adapter), "--adapter .* UNetMotionModel")

    code, out, _ = run("inspect", tmp_path / "whole")
    rows = {line.split()[0]: line for line in out if line.strip()}
    assert code == 0 and out[0].endswith("whole: AnimateDiffPipeline"), out
    for part, cls in (("unet", "UNetMotionModel"), ("motion_adapter", "MotionAdapter")):
        assert re.search(rf"{cls} \(v2: 32 positions, a mid block\) .* all \d+ match", rows[part])


def test_animate_what_does_not_fit(run, model, images, adapter, make_adapter_folder, tmp_path):
    base = ["animate", "a cat", "--steps", 1, "--base"]
    fails(run(*base, model), "UNet3DConditionModel")
    fails(run(*base, images, "--adapter", "gone"), "no folder .gone.")
    fails(run(*base, images, "--adapter", adapter, "--num-frames", 33), "33 frames are too many.* 32")
    wide = make_adapter_folder(tmp_path, "v1-5-3", block_out_channels=[32, 96])
    fails(run(*base, images, "--adapter", wide), "does not fit the UNet")
    fails(run("generate", "a cat", "--model", images), "UNet2DConditionModel")
    assert os.listdir() == []


def test_animate_with_pictures_and_again(run, images, adapter, make_ip_adapter, monkeypatch):
    """Their paths, scales and digests are in the file, which is made again from another folder."""
    here = Path.cwd()
    for seed, kind in enumerate(("base", "plus")):
        make_ip_adapter(here / "ip", kind, seed)
    base, plus = "ip/ip-adapter-base_sd15.safetensors", "ip/ip-adapter-plus_sd15.safetensors"
    for k in range(2):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(f"{k}.png")
    call = ("animate", "a cat", "--base", images, "--adapter", adapter, *FAST, "--seed", 7)
    assert run(*call, "-o", "without.mp4")[0] == 0
    code, out, err = run(*call, "--ip-adapter", base, "--image", "0.png:0.6", "-o", "a.mp4")
    assert code == 0 and err[1] == f"minit2v: loading {base}" and ", 1 picture" in err[2]
    assert not np.array_equal(pixels("a.mp4"), pixels("without.mp4"))
    stored = read_metadata("a.mp4")
    assert stored["ip_adapter"] == [str(here / base)] and stored["image"] == [f"{here}/0.png:0.6"]
    assert stored["ip_adapter_sha256"] == [hashlib.sha256(Path(base).read_bytes()).hexdigest()]
    assert run(*call, "--ip-adapter", base, "--image", "0.png:0", "-o", "b.mp4")[0] == 0
    assert np.array_equal(pixels("b.mp4"), pixels("without.mp4"))
    two = ("--ip-adapter", base, "--ip-adapter", plus, "--image", "0.png:0.6", "--image", "1.png:-0.5")
    assert run(*call, *two, "-o", "c.mp4")[0] == 0
    assert not np.array_equal(pixels("c.mp4"), pixels("a.mp4"))
    assert run(*call, "--ip-adapter", base, "--image", "0.png", "--image", "1.png", "-o", "d.mp4")[0] == 0

    (here / "else").mkdir()
    monkeypatch.chdir(here / "else")
    fails(run("animate", "--replay", "../c.mp4"), "names .*ip_adapter .*base_sd15.*plus_sd15.*image .*0.png:0.6, ")
    for name in ("a", "c", "d"):
        code, _, err = run("animate", "--replay", f"../{name}.mp4", "--trust", "-o", f"{name}.mp4")
        assert code == 0 and not any("warning" in line for line in err), err
        assert Path(f"{name}.mp4").read_bytes() == Path(f"../{name}.mp4").read_bytes()
    shutil.copy("../1.png", "../0.png")
    code, _, err = run("animate", "--replay", "../a.mp4", "--trust", "-o", "e.mp4")
    assert code == 0 and any("0.png:0.6 has changed since the video was made" in line for line in err)
    assert not np.array_equal(pixels("e.mp4"), pixels("a.mp4"))
    code, _, err = run("animate", "--replay", "../a.mp4", "--trust", "--image", "../1.png:0.6", "-o", "f.mp4")
    assert code == 0 and not any("warning" in line for line in err), err
    assert np.array_equal(pixels("f.mp4"), pixels("e.mp4"))


@pytest.mark.parametrize(
    ("given", "said", "code"),
    [
        (("--ip-adapter", "a.bin"), "--ip-adapter needs a picture", 2),
        (("--image", "a.png"), "--image needs an IP-Adapter", 2),
        (("--image", ":0.5"), "':0.5' is not a PICTURE", 2),
        (("--ip-adapter", "a", "--ip-adapter", "b", "--image", "c"), "1 --image for 2 --ip-adapter", 2),
        (("--ip-adapter", "a", "--image", "c:1", "--image", "d:0.5"), "have different scales; give all of them the", 2),
        (("--ip-adapter", "a.bin", "--image", "gone.png"), "gone.png: no such file", 1),
        (("--ip-adapter", "a.bin", "--image", "0.png"), "--ip-adapter: there is no folder 'a.bin'", 1),
        (("--ip-adapter", "a.bin", "--image", "0.png:1"), "is the whole name of a picture: add a scale, 0.png:1:1", 2),
    ],
)
def test_pictures_that_do_not_fit(run, images, adapter, given, said, code):
    for name in ("0.png", *["0.png:1"] * ("0.png:1" in given)):
        Image.new("RGB", (9, 9)).save(name, "png")
    fails(run("animate", "a cat", "--base", images, "--adapter", adapter, *FAST, *given), said, code=code)


def test_animate_a_video(run, images, adapter, source):
    base = ["animate", "a cat", "--base", images, "--adapter", adapter]
    code, out, err = run(*base, "--steps", 4, "--video", source, "--seed", 1)
    assert code == 0 and any("strength 0.6" in line for line in err), err
    frames, fps = load_video(out[0], return_fps=True)
    assert len(frames) == 4 and frames[0].size == (24, 24) and fps == 6
    stored = read_metadata(out[0])
    assert stored["strength"] == 0.6 and stored["video"] == os.path.abspath(source) and "num_frames" not in stored
    assert run("animate", "--replay", out[0], "--trust", "-o", "b.mp4")[0] == 0
    assert Path(out[0]).read_bytes() == Path("b.mp4").read_bytes()

    export_to_video(np.zeros((3, 24, 24, 3), np.uint8), "black.mp4")
    assert run("animate", "--replay", out[0], "--trust", "--video", "black.mp4", "-o", "c.mp4")[0] == 0
    assert len(pixels("c.mp4")) == 3 and read_metadata("c.mp4")["video"].endswith("black.mp4")
    shutil.copy("black.mp4", source)
    fails(run("animate", "--replay", out[0], "--trust"), "source.mp4", "changed")
    assert run(*base, *FAST, "--seed", 1, "-o", "text.mp4")[0] == 0
    assert run("animate", "--replay", "text.mp4", "--trust", "--video", "black.mp4", "-o", "d.mp4")[0] == 0


def test_a_variant_is_that_of_the_base_and_of_the_adapter_where_it_has_it(run, adapter, tmp_path, make_official_folder):
    images = make_official_folder(tmp_path / "half", "sd15", "fp16", small=True)
    base = ["animate", "a cat", "--base", images, "--adapter", adapter, *FAST]
    code, out, err = run(*base, "--variant", "fp16")
    assert code == 0 and any("has no variant fp16: its weights without a variant are read" in line for line in err), err
    assert read_metadata(out[0])["variant"] == "fp16"
    fails(run(*base), "no diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("command", ["generate", "restyle", "animate"])
def test_free_init(run, model, images, adapter, source, command):
    base = {"generate": ["generate", "a cat", "--model", model, *FAST],
            "restyle": ["restyle", source, "a cat", "--model", model, *RESTYLED],
            "animate": ["animate", "a cat", "--base", images, "--adapter", adapter, *FAST]}[command]
    assert run(*base, "--seed", 1, "-o", "plain.gif")[0] == 0
    code, out, err = run(*base, "--seed", 1, "--free-init", "-o", "free.gif")
    assert code == 0 and any("FreeInit" in line for line in err) and read_metadata("free.gif")["free_init"] is True
    assert not np.array_equal(pixels("plain.gif"), pixels("free.gif"))
    replay = "animate" if command == "animate" else "generate"
    assert run(replay, "--replay", "free.gif", "--trust", "-o", "again.gif")[0] == 0
    assert Path("free.gif").read_bytes() == Path("again.gif").read_bytes()
    assert run(replay, "--replay", "free.gif", "--trust", "--no-free-init", "-o", "back.gif")[0] == 0
    assert np.array_equal(pixels("plain.gif"), pixels("back.gif"))


# -------------------------------------------------------------------------------------------------------------- Ctrl-C


def test_interrupt_leaves_no_broken_file(model, forked):
    """In the middle of the second video, when the first is whole."""
    process = forked(lambda: sys.exit(cli.main(["generate", "a cat", "a dog", "--model", str(model), "--num-frames",
                                                "2", "--steps", "40", "--seed", "1", "-o", "out/"])))
    said = b""
    while b"2/2" not in said:
        assert (some := os.read(process.said.fileno(), 4096)), said
        said += some
    os.kill(process.pid, signal.SIGINT)
    code, rest = process.wait()
    assert code == 130 and b"Traceback" not in said and "Traceback" not in rest and "interrupted" in rest, (said, rest)
    assert b"out/a-cat-1.mp4\n" in said and "out/" not in rest
    assert os.listdir("out") == ["a-cat-1.mp4"] and len(load_video("out/a-cat-1.mp4")) == 2


# ------------------------------------------------------------------------------------------------------------- inspect


def test_inspect_a_folder_that_fits(run, model):
    code, out, err = run("inspect", model)
    assert code == 0 and "TextToVideoSDPipeline" in out[0]
    rows = {line.split()[0]: line for line in out if line.strip()}
    for part in ("unet", "vae", "text_encoder"):
        assert re.search(r"float32\s+all \d+ match\s+\S+\.safetensors \d", rows[part])
    assert "DDIMScheduler" in rows["scheduler"] and "CLIPTokenizer" in rows["tokenizer"]
    assert run("inspect", model / "vae")[0] == 0


def test_inspect_an_image_model(run, images, tmp_path):
    code, out, _ = run("inspect", images)
    assert code == 0 and out[0].endswith("StableDiffusionPipeline, an image model that animate takes as --base"), out
    assert any(re.search(r"^unet +UNet2DConditionModel .* all \d+ match", line) for line in out)
    assert not any("safety_checker" in line for line in out)
    copy = shutil.copytree(images, tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "unet"}))
    code, out, _ = run("inspect", copy)
    assert code == 1 and out[-1] == "wrong: unet: missing in the index; StableDiffusionPipeline needs it"


@pytest.mark.parametrize("version,said", [("v1-5", "v1: 24 positions, no mid block"),
                                          ("v1-5-2", "v2: 32 positions, a mid block"),
                                          ("v1-5-3", "v3: 32 positions, no mid block")])
def test_inspect_a_motion_adapter(run, make_adapter_folder, tmp_path, version, said):
    folder = make_adapter_folder(tmp_path, version)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "motion_max_seq_length": 32}))  # the weights know better
    code, out, _ = run("inspect", folder)
    assert code == 0 and any(f"MotionAdapter ({said})" in line for line in out), out
    folder = folder.rename(tmp_path / "mine")
    said = said.replace("v3", "v1 or 3")
    assert any(f"MotionAdapter ({said})" in line for line in run("inspect", folder)[1])


def test_inspect_a_model_of_full_size_without_its_weights(make_official_folder, tmp_path):
    make_official_folder(tmp_path / "ms", "ms-1.7b", variant="fp16")
    look = "import sys; from minit2v.cli import main; print(main(sys.argv[1:]), 'torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", look, "inspect", str(tmp_path / "ms"), "--variant", "fp16"],
                          capture_output=True, text=True)
    out = done.stdout.splitlines()
    assert out[-1] == "0 False", done  # random numbers on `meta` would bring the compiler: seconds
    rows = {line.split()[0]: line for line in out if line.strip()}
    assert re.search(r"1,411,\d+,\d+\s+float16\s+all \d+ match .*fp16\.safetensors 2\.8 GB", rows["unet"])


def test_inspect_says_what_does_not_fit(run, copy):
    def change(state):
        state["unknown.weight"] = torch.zeros(1)
        del state["conv_in.bias"]
        state["conv_out.bias"] = torch.zeros(7)

    spoil(copy, "unet", change)
    (copy / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{broken  header}")
    shutil.rmtree(copy / "tokenizer")
    index = json.loads((copy / "model_index.json").read_text())
    index |= {"scheduler": ["diffusers", "DDIMSchedular"], "_class_name": "TextToVideoPipeline"}
    (copy / "model_index.json").write_text(json.dumps(index))
    code, out, _ = run("inspect", copy)
    wrong = [line.removeprefix("wrong: ") for line in out if line.startswith("wrong")]
    assert code == 1 and len(wrong) == 7
    for said in ("unet: 1 keys missing: 'conv_in.bias'", "unet: 1 keys unknown: 'unknown.weight'",
                 "unet: 1 keys of another shape: 'conv_out.bias' is (7,), not (4,)", "vae: .*header is broken",
                 "tokenizer: its folder has no files", "minit2v has no pipeline 'TextToVideoPipeline'",
                 "minit2v has no class 'DDIMSchedular' (nearest: 'DDIMScheduler')"):
        assert any(re.search(re.escape(said).replace(r"\.\*", ".*"), line) for line in wrong), (said, wrong)
    assert any("464 of 466 match" in line for line in out)


def test_inspect_other_layouts_of_files(run, copy):
    folder = copy / "unet"
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    names = sorted(state)
    shards = [{n: state[n].half() for n in names[:100]}, {n: state[n] for n in names[100:]}]
    for n, shard in enumerate(shards):
        save_file(shard, folder / f"diffusion_pytorch_model-0000{n + 1}-of-00002.safetensors")
    file.unlink()
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    code, out, _ = run("inspect", copy)
    row = next(line for line in out if line.startswith("unet"))
    assert code == 0 and "366 float32, 100 float16" in row and "-*-of-00002.safetensors" in row
    assert "(not read: diffusion_pytorch_model.bin" in row
    for shard in folder.glob("*-of-*"):
        shard.unlink()
    code, out, _ = run("inspect", folder)
    assert code == 0 and any("all 466 match" in line and ".bin" in line for line in out)
    data = (folder / "diffusion_pytorch_model.bin").read_bytes()
    (folder / "diffusion_pytorch_model.bin").write_bytes(data[:-2000])
    assert run("inspect", folder)[0] == 1
    (folder / "diffusion_pytorch_model.bin").unlink()
    code, out, _ = run("inspect", folder)
    assert code == 1 and "no diffusion_pytorch_model.safetensors" in out[-1]


def test_inspect_truncated_weights(run, copy):
    file = copy / "vae/diffusion_pytorch_model.safetensors"
    data = file.read_bytes()
    for cut in (0, 4, 500, len(data) - 1):
        file.write_bytes(data[:cut])
        code, out, _ = run("inspect", copy / "vae")
        assert code == 1 and "truncated" in out[-1]


def test_convert_and_inspect_what_came(run, tmp_path):
    shapes, out = embedded.ASSETS / "shapes", tmp_path / "authors"
    assert run("convert", shapes, out, "--to", "authors", "--dry-run")[0] == 0 and not out.exists()
    code, lines, _ = run("convert", shapes, out, "--to=authors")
    assert code == 0 and "text_encoder is left out: open_clip_pytorch_model.bin cannot be made" in lines[0]
    file = out / "text2video_pytorch_model.pth"
    code, lines, _ = run("inspect", file)
    assert code == 0 and lines[1] == "ModelScope's UNetSD: another size" and lines[-1] == "complete"
    code, lines, _ = run("convert", file, tmp_path / "unet", "--dry-run", "--dtype=fp32", "--config", shapes)
    name = "input_blocks.0.0.weight -> conv_in.weight"
    assert code == 0 and any(name in line for line in lines) and "would be written" in lines[-1]
    code, lines, _ = run("convert", out, tmp_path / "folder", "--dtype=fp32", "--config", shapes)
    before = load_file(shapes / "unet/diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "folder/unet/diffusion_pytorch_model.safetensors")
    assert code == 0 and all(torch.equal(after[n], x.float()) for n, x in before.items()) and len(after) == len(before)
    assert (tmp_path / "folder/tokenizer/vocab.json").is_file()

    fails(run("convert", file, out), "authors exists already")
    fails(run("convert", tmp_path / "gone", "x"), "gone: No such file")
    fails(run("convert", file, "x", "--to=civitai"), "must be one of diffusers, authors, single-file, not 'c", code=2)
    fails(run("convert", file, "x", "--to=original"), "authors", code=2)  # its name before
    save_file({**before, "spare": torch.zeros(1)}, tmp_path / "more.safetensors")
    fails(run("convert", tmp_path / "more.safetensors", "x"), "more.safetensors: .*1 unknown: 'spare'")
    code, lines, _ = run("inspect", tmp_path / "more.safetensors")
    assert code == 1 and lines[-1] == "not complete" and "'spare'" in lines[-2]
    assert not Path("x").exists()


def test_inspect_what_is_no_model(run, copy):
    Path("empty").mkdir()
    fails(run("inspect", "empty"), "neither model_index.json nor config.json")
    fails(run("inspect", copy / "model_index.json"), "neither a safetensors file nor a torch.save file")
    fails(run("inspect", "gone"), "no folder .gone.")
    (copy / "unet/config.json").write_text('{"_class_name": "UNet2DModel"}')
    code, out, _ = run("inspect", copy / "unet")
    assert code == 1 and "'UNet2DModel', a class that minit2v does not have" in out[-1]


def test_inspect_a_hub_id_reads_headers_only(run, model, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    from minit2v.cli import inspect as inspection
    from minit2v.files import hub

    read = []

    class Api:
        def model_info(self, repo, revision=None, files_metadata=False):
            if repo != "owner/name" or revision != "v1":
                raise RuntimeError("404\nnot found")
            files = [p for p in model.rglob("*") if p.is_file()]
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=str(p.relative_to(model)), size=p.stat().st_size)
                                             for p in files])

        def parse_safetensors_file_metadata(self, repo, path, revision=None):
            read.append(path)
            header = json.loads((model / path).read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
            header.pop("__metadata__", None)
            return SimpleNamespace(tensors={k: SimpleNamespace(dtype=v["dtype"], shape=v["shape"])
                                            for k, v in header.items()})

    def read_json(repo, name, subfolder=None, revision=None):
        return hub.parse_json(model / (subfolder or "") / name)

    class Tokenizer(inspection.CLIPTokenizer):
        @classmethod
        def from_pretrained(cls, repo, *, subfolder=None, revision=None):
            return super().from_pretrained(model / subfolder if subfolder else repo)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(inspection, "CLIPTokenizer", Tokenizer)
    monkeypatch.setattr(inspection, "hub", SimpleNamespace(**{**vars(hub), "read_json": read_json}))
    code, out, _ = run("inspect", "owner/name", "--revision", "v1")
    assert code == 0, "\n".join(out)
    local = run("inspect", model)[1]
    assert out[1:] == local[1:] and len(read) == 3
    fails(run("inspect", "owner/name"), "owner/name", "404")

    cache = tmp_path / "cache"
    shutil.copytree(model, cache / "models--owner--name" / "snapshots" / "main")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    code, out, err = run("inspect", "owner/name")
    assert code == 0 and out[1:] == local[1:] and "404" in err[0] and "cache" in err[0]
