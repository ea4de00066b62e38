"""`--lora`, `--motion-lora` and `--embedding`: how they are written, what they change, what a video says of them."""

import argparse
import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minit2v import DiffusionPipeline, MotionAdapter, UNet2DConditionModel, UNetMotionModel, cli
from minit2v.adapters.lora import layers_of
from minit2v.cli import adapters
from minit2v.files.video import export_to_video, load_video, read_metadata

FAST = ["--num-frames", "2", "--steps", "2", "--seed", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_official_folder):
    return make_official_folder(tmp_path_factory.mktemp("model"), small=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory, make_official_folder):
    return make_official_folder(tmp_path_factory.mktemp("images"), repo="sd15", small=True)


@pytest.fixture(scope="module")
def motion(tmp_path_factory, make_adapter_folder):
    return make_adapter_folder(tmp_path_factory.mktemp("motion"), "v1-5-2")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
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
    got, out, err = result
    errors = [line for line in err if "error:" in line]
    assert got == code and len(errors) == 1 and not out, result
    for word in said:
        assert re.search(word, errors[0]), (word, errors[0])


def write_lora(path, unet, which="attn", rank=2, seed=0, size=1.0):
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (_, shape) in layers_of(unet).items():
        if which in name and len(shape) == 2:
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(rank, shape[1], generator=g) * shape[1] ** -0.5 * size
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(shape[0], rank, generator=g)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory, model, images, motion):
    """LoRAs of the video model and of AnimateDiff, and an embedding."""
    folder = tmp_path_factory.mktemp("files")
    pipe = DiffusionPipeline.from_pretrained(model)
    unet = UNetMotionModel.from_unet2d(UNet2DConditionModel.from_pretrained(images, subfolder="unet"),
                                       MotionAdapter.from_pretrained(motion))  # fmt: skip
    write_lora(folder / "style.safetensors", pipe.unet)
    write_lora(folder / "other.safetensors", pipe.unet, seed=1)
    write_lora(folder / "zoom.safetensors", unet, "motion_modules")
    write_lora(folder / "still.safetensors", unet, ".attentions.")
    save_file({"emb_params": torch.randn(3, 24, generator=torch.Generator().manual_seed(0))},
              folder / "xyzzy.safetensors")  # fmt: skip
    return folder


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# -------------------------------------------------------------------------------------------------- how it is written


@pytest.mark.parametrize("text,given", [
    ("a.safetensors", ("a.safetensors", 1.0)),
    ("a.safetensors:0.8", ("a.safetensors", 0.8)),
    ("a.safetensors:-.5", ("a.safetensors", -0.5)),
    ("owner/name:2", ("owner/name", 2.0)),
    (r"C:\loras\a.safetensors", (r"C:\loras\a.safetensors", 1.0)),
    (r"C:\loras\a.safetensors:0.8", (r"C:\loras\a.safetensors", 0.8)),
    ("C:a.safetensors:0.8", ("C:a.safetensors", 0.8)),
    ("C:/a.safetensors", ("C:/a.safetensors", 1.0)),
    ("https://huggingface.co/o/n/blob/main/a.safetensors", ("https://huggingface.co/o/n/blob/main/a.safetensors", 1.0)),
    ("https://huggingface.co/o/n/blob/main/a.safetensors:0.5",
     ("https://huggingface.co/o/n/blob/main/a.safetensors", 0.5)),
    ("a:b:0.5", ("a:b", 0.5)),
    ("12:30", ("12", 30.0)),
])  # fmt: skip
def test_a_path_and_a_weight(text, given):
    assert adapters.lora(text) == given


@pytest.mark.parametrize("text,given", [
    ("a.pt", ("a.pt", None)),
    ("a.pt:<toy>", ("a.pt", "<toy>")),
    (r"C:\a.pt", (r"C:\a.pt", None)),
    (r"C:\a.pt:word", (r"C:\a.pt", "word")),
    ("C:a.pt", ("C:a.pt", None)),
    ("C:a.pt:word", ("C:a.pt", "word")),
    ("owner/name:<toy>", ("owner/name", "<toy>")),
    ("https://huggingface.co/o/n/blob/main/a.pt", ("https://huggingface.co/o/n/blob/main/a.pt", None)),
    ("https://huggingface.co/o/n/blob/main/a.pt:w", ("https://huggingface.co/o/n/blob/main/a.pt", "w")),
])  # fmt: skip
def test_a_path_and_a_word(text, given):
    assert adapters.embedding(text) == given


@pytest.mark.parametrize("parse", [adapters.lora, adapters.embedding])
@pytest.mark.parametrize("text", ["", ":", ":0.5", "a.safetensors:"])
def test_half_of_it(parse, text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"must be FILE or FILE:w"):
        parse(text)


@pytest.mark.parametrize("text", ["a:nan", "a:inf", "a:-inf", "a:1000", "a:0,8", "a:1.2.3"])
def test_weights_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="the weight must be a number from -100 to 100"):
        adapters.lora(text)


def test_paths_that_end_like_a_weight():
    Path("a:0.5").touch()
    assert adapters.lora("a:0.5") == ("a:0.5", 1.0) and adapters.lora("a:0.5:0.7") == ("a:0.5", 0.7)
    assert adapters.embedding("a:0.5") == ("a:0.5", None)
    Path("a").touch()
    for parse in (adapters.lora, adapters.embedding):
        with pytest.raises(argparse.ArgumentTypeError, match="the files 'a' and 'a:0.5' both exist"):
            parse("a:0.5")


# -------------------------------------------------------------------------------------------------------- generate


def test_loras_change_the_video_and_are_stored_and_replayed(run, model, files, monkeypatch):
    made = ["generate", "a cat", "--model", model, *FAST]
    assert run(*made, "-o", "plain.mp4")[0] == 0
    shutil.copy(files / "style.safetensors", "style.safetensors")
    code, _, err = run(*made, "--lora", "style.safetensors:0.5", "--lora", f"{files / 'other.safetensors'}:-0.25",
                       "-o", "a.mp4")  # fmt: skip
    said = "\n".join(err)
    assert code == 0 and "LoRA style changes 72 layers of the unet" in said, said
    assert "LoRA style.safetensors at 0.5, LoRA other.safetensors at -0.25" in said
    assert not np.array_equal(pixels("plain.mp4"), pixels("a.mp4"))
    assert read_metadata("a.mp4")["lora"] == [
        {"path": str(Path("style.safetensors").absolute()), "weight": 0.5, "sha256": sha256("style.safetensors")},
        {"path": str(files / "other.safetensors"), "weight": -0.25, "sha256": sha256(files / "other.safetensors")},
    ]
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.load_lora_weights("style.safetensors", "x")
    pipe.load_lora_weights(files / "other.safetensors", "y")
    pipe.set_adapters(["x", "y"], [0.5, -0.25])
    frames = pipe("a cat", num_frames=2, num_inference_steps=2, generator=torch.Generator().manual_seed(1)).frames[0]
    export_to_video(frames, "python.mp4", fps=8)
    assert np.array_equal(pixels("python.mp4"), pixels("a.mp4"))
    assert run(*made, "--lora", "style.safetensors:0", "-o", "zero.mp4")[0] == 0
    assert np.array_equal(pixels("plain.mp4"), pixels("zero.mp4"))

    here = Path.cwd()
    Path("else").mkdir()
    monkeypatch.chdir("else")
    fails(run("generate", "--replay", here / "a.mp4"), "names model .*, lora '.*style.safetensors and .*other.saf.*"
          ": give --trust to use them, or your own --model and --lora")  # fmt: skip
    code, _, err = run("generate", "--replay", here / "a.mp4", "--trust", "-o", "b.mp4")
    assert code == 0 and not any("warning" in line for line in err)
    assert (here / "a.mp4").read_bytes() == Path("b.mp4").read_bytes()
    code, _, err = run("generate", "--replay", here / "a.mp4", "--trust", "--lora", files / "other.safetensors", "-o",
                       "c.mp4")  # fmt: skip
    assert code == 0 and [e["weight"] for e in read_metadata("c.mp4")["lora"]] == [1.0]

    state = load_file(here / "style.safetensors")
    save_file({k: v * 2 for k, v in state.items()}, here / "style.safetensors")
    code, _, err = run("generate", "--replay", here / "a.mp4", "--trust", "-o", "d.mp4")
    (warned,) = [line for line in err if "warning" in line]
    assert code == 0 and f"{here / 'style.safetensors'} has changed since the video was made" in warned
    (here / "style.safetensors").unlink()
    fails(run("generate", "--replay", here / "a.mp4", "--trust"), "--lora .*style.safetensors: there is no")


def test_optimized_it_is_in_the_weights(run, model, files):
    made = ["generate", "a cat", "--model", model, *FAST, "--lora", files / "style.safetensors"]
    assert run(*made, "-o", "a.mp4")[0] == 0 and run(*made, "--optimize", "-o", "b.mp4")[0] == 0
    assert np.abs(pixels("a.mp4").astype(int) - pixels("b.mp4")).max() <= 2


def test_what_is_no_lora(run, model, files):
    made = ["generate", "a cat", "--model", model, *FAST]
    fails(run(*made, "--lora", "gone.safetensors:0.5"), "--lora gone.safetensors: there is no file gone.safetensors")
    fails(run(*made, "--lora", files / "zoom.safetensors"), "--lora .*zoom.safetensors: ")
    fails(run(*made, "--lora", "a:0,8"), "the weight must be a number", code=2)
    fails(run(*made, "--motion-lora", "zoom-in"), "unknown argument '--motion-lora'", code=2)
    Path("text.safetensors").write_text("hello")
    fails(run(*made, "--lora", "text.safetensors"), "--lora .*text.safetensors is broken")


@pytest.mark.parametrize("where", ["prompt", "list", "negative"])
def test_a_lora_in_a_prompt_is_no_text(run, model, where):
    tag = "a cat <lora:add_detail:0.8>, red"
    args = {"prompt": [tag], "list": ["--prompts", "list"], "negative": ["a cat", "--negative-prompt", tag]}[where]
    Path("list").write_text(f"a dog\n{tag}\n")
    fails(run("generate", *args, "--model", model, *FAST),
          "<lora:add_detail:0.8> is not read in a prompt: remove it, and give --lora add_detail.safetensors:0.8",
          code=2)
    assert adapters.check_prompt("a <toy>, x:y, <3") is None
    assert adapters.check_prompt("<LoRA:x>").endswith("--lora x.safetensors")


def test_an_embedding(run, model, files):
    made = ["generate", "a xyzzy cat", "--model", model, *FAST]
    assert run(*made, "-o", "plain.mp4")[0] == 0
    code, _, err = run(*made, "--embedding", files / "xyzzy.safetensors", "-o", "a.mp4")
    assert code == 0 and any("the word 'xyzzy' stands for 3 vectors" in line for line in err)
    assert not any("warning" in line for line in err)
    assert not np.array_equal(pixels("plain.mp4"), pixels("a.mp4"))
    stored = {"path": str(files / "xyzzy.safetensors"), "word": None, "sha256": sha256(files / "xyzzy.safetensors")}
    assert read_metadata("a.mp4")["embedding"] == [stored]
    assert run("generate", "--replay", "a.mp4", "--trust", "-o", "b.mp4")[0] == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()
    made[1] = "a <it> cat"
    assert run(*made, "--embedding", f"{files / 'xyzzy.safetensors'}:<it>", "-o", "c.mp4")[0] == 0
    assert np.array_equal(pixels("a.mp4"), pixels("c.mp4"))
    assert read_metadata("c.mp4")["embedding"] == [stored | {"word": "<it>"}]
    assert run("generate", "--replay", "c.mp4", "--trust", "-o", "d.mp4")[0] == 0
    assert Path("c.mp4").read_bytes() == Path("d.mp4").read_bytes()
    code, _, err = run(*made, "--embedding", files / "xyzzy.safetensors", "-o", "e.mp4")
    assert code == 0 and any("warning: no prompt contains the word 'xyzzy'" in line for line in err)
    fails(run(*made, "--embedding", f"{files / 'xyzzy.safetensors'}:a"), "--embedding .*: the word 'a' is a piece")
    fails(run(*made, "--embedding", "gone.pt"), "--embedding gone.pt: there is no file 'gone.pt'")


@pytest.mark.parametrize("stored", [
    {"lora": "x"}, {"lora": ["x"]}, {"lora": [{}]}, {"lora": [{"path": 5}]}, {"lora": {"path": "x"}},
    {"lora": [{"path": "x", "weight": []}]}, {"lora": [{"path": "x", "weight": True}]},
    {"lora": [{"path": "x", "weight": "many"}]}, {"lora": [{"path": "x", "weight": 1e9}]}, {"lora": [{"path": ""}]},
    {"embedding": [{"path": "x", "word": ["y"]}]}, {"embedding": 5}, {"motion_lora": [{"path": "zoom-in"}]},
])  # fmt: skip
def test_metadata_that_is_none(run, stored, model):
    about = {"minit2v": "generate", "prompt": "a cat", "model": str(model), **stored}
    export_to_video(np.zeros((2, 8, 8, 3), np.uint8), "bad.mp4", metadata=about)
    fails(run("generate", "--replay", "bad.mp4", "--trust"), "bad.mp4: the settings stored in this file are not valid|"
          "--lora x:many: there is no")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the others


def test_a_motion_lora_and_its_replay(run, images, motion, files, monkeypatch):
    made = ["animate", "a cat", "--base", images, "--adapter", motion, *FAST]
    assert run(*made, "-o", "plain.mp4")[0] == 0
    code, _, err = run(*made, "--motion-lora", f"{files / 'zoom.safetensors'}:0.5", "--lora", files /
                       "still.safetensors", "-o", "a.mp4")  # fmt: skip
    assert code == 0 and any("LoRA zoom.safetensors at 0.5" in line for line in err)
    stored = read_metadata("a.mp4")
    assert [e["weight"] for e in stored["motion_lora"] + stored["lora"]] == [0.5, 1.0]
    assert not np.array_equal(pixels("plain.mp4"), pixels("a.mp4"))
    assert run("animate", "--replay", "a.mp4", "--trust", "-o", "b.mp4")[0] == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()
    fails(run(*made, "--motion-lora", files / "still.safetensors"), "it changes no motion module: give it as --lora")
    fails(run(*made, "--motion-lora", "zoom-on"), "--motion-lora zoom-on: there is no such file, and no motion of that "
          "name.*nearest: 'zoom-in'.*rolling-anticlockwise")  # fmt: skip


def test_a_published_motion_by_its_name(run, images, motion, files, monkeypatch):
    asked = []

    def find_folder(path, subfolder, choose, **where):
        asked.append(path)
        folder = Path.cwd() / "hub"
        folder.mkdir(exist_ok=True)
        shutil.copy(files / "zoom.safetensors", folder / "diffusion_pytorch_model.safetensors")
        return folder, list(choose(["diffusion_pytorch_model.safetensors"]))

    from minit2v.files import hub

    real = hub.find_folder
    monkeypatch.setattr(hub, "find_folder", lambda path, *a, **k: (find_folder if str(path).startswith("guoyww") else
                                                                   real)(path, *a, **k))  # fmt: skip
    made = ["animate", "a cat", "--base", images, "--adapter", motion, *FAST]
    code, _, err = run(*made, "--motion-lora", "zoom-in:0.7", "-o", "a.mp4")
    assert code == 0 and asked == ["guoyww/animatediff-motion-lora-zoom-in"], err
    (stored,) = read_metadata("a.mp4")["motion_lora"]
    assert stored == {"path": asked[0], "weight": 0.7, "sha256": sha256(files / "zoom.safetensors")}
    assert run("animate", "--replay", "a.mp4", "--trust", "-o", "b.mp4")[0] == 0 and asked[1:] == asked[:1]
    assert len(adapters.MOTIONS) == 8


def test_restyle(run, model, files):
    source = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), np.uint8)
    export_to_video(source, "source.mp4", fps=5)
    made = ["restyle", "source.mp4", "a xyzzy", "--model", model, "--steps", 4, "--strength", 0.5, "--seed", 1]
    assert run(*made, "-o", "plain.mp4")[0] == 0
    assert run(*made, "--lora", files / "style.safetensors", "--embedding", files / "xyzzy.safetensors",
               "-o", "a.mp4")[0] == 0  # fmt: skip
    assert not np.array_equal(pixels("plain.mp4"), pixels("a.mp4"))
    assert run("generate", "--replay", "a.mp4", "--trust", "-o", "b.mp4")[0] == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()


def test_inspect(run, files):
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(8, 768)}, "name": "EasyNegative"},
               "renamed.pt")  # fmt: skip
    code, out, _ = run("inspect", "renamed.pt")
    assert code == 0 and out[1:] == [
        "textual inversion",
        "'EasyNegative': 8 vectors of 768 numbers: the embedding was trained for Stable Diffusion 1.x",
        "complete"]  # fmt: skip
    code, out, _ = run("inspect", files / "xyzzy.safetensors")
    assert code == 0 and out[1:3] == ["textual inversion", "'xyzzy': 3 vectors of 24 numbers"]
    save_file({"x.weight": torch.zeros(2, 2)}, "other.safetensors")
    fails(run("inspect", "other.safetensors"), "other.safetensors: ")
