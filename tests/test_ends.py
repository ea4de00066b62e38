"""How the command ends: signals, streams, names that no terminal should see, files of strangers."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from minit2v import cli
from minit2v.cli import videos
from minit2v.files.video import export_to_video, read_metadata

COMMAND = [sys.executable, "-m", "minit2v"]
FAST = ["--num-frames", "1", "--steps", "1", "--seed", "1"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys):
    """run(*args) -> (exit code, stdout, stderr)."""

    def call(*args):
        code = cli.main([str(a) for a in args])
        return code, *capsys.readouterr()

    return call


def shell(line, **kw):
    return subprocess.run(["bash", "-c", line], capture_output=True, timeout=300, **kw)


# ------------------------------------------------------------------------------------------------------------- streams


def test_streams_that_are_closed_or_know_ascii_alone(forked):
    """And a path that is not UTF-8, which is written and said byte for byte."""
    def child():  # as Python begins where stderr is closed, and PYTHONIOENCODING is ascii
        os.close(2)
        sys.stdout, sys.stderr = open(1, "w", encoding="ascii", closefd=False), None  # noqa: SIM115
        sys.exit(cli.main(["generate", "ein größeres Bild", *FAST, "-o", os.fsdecode(b"a\xff/gr\xf6\xdfer.mp4")]))

    process = forked(child)
    assert process.said.readline() == b"a\xff/gr\xf6\xdfer.mp4\n" and process.wait() == (0, "")
    assert os.listdir(b"a\xff") == [b"gr\xf6\xdfer.mp4"]
    base = f"{' '.join(COMMAND)} generate 'ein größeres Bild' {' '.join(FAST)}"
    made = shell(f"{base} -o b.mp4 >&- 2>&- <&-")
    assert made.returncode == 0 and read_metadata("b.mp4")["prompt"] == "ein größeres Bild"
    table = shell(f"{' '.join(COMMAND)} generate --scheduler help | head -1; exit ${{PIPESTATUS[0]}}")
    assert table.returncode == 0 and table.stdout.startswith(b"name ") and table.stderr == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_behind_the_streams(monkeypatch, capsys):
    full = io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=True)  # noqa: SIM115
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", full)
        for args in (["--help"], ["generate", "--help"], ["--version"], ["generate", "--scheduler", "help", "a"]):
            assert cli.main(args) == 1
            assert capsys.readouterr().err == "minit2v: error: No space left on device\n"
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", full)  # messages are lost, the work is not
        assert cli.main(["generate", "a cat", *FAST, "-o", "a.gif"]) == 0
    assert capsys.readouterr().out == "a.gif\n" and read_metadata("a.gif")["prompt"] == "a cat"


def test_prompts_are_utf8_whatever_the_terminal_speaks(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("größer\n".encode()), encoding="ascii"))
    assert videos._read_prompts("-") == ["größer"]
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")
    assert videos._output_paths(None, ["größer", "é"], 1) == [Path("grer-1.mp4"), Path("video-1.mp4")]


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("seconds", [0.12, 0.5, 1.1])
def test_ctrl_c_while_modules_are_imported_is_one_line(seconds, default_signals):
    code = "import minit2v.cli, sys; print('now', flush=True); sys.exit(minit2v.cli.main())"
    with subprocess.Popen([sys.executable, "-c", code, "generate", "a cat", "--steps", "900"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, preexec_fn=default_signals) as process:
        process.stdout.readline()
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and b"Traceback" not in err, err
    assert [line for line in err.splitlines() if b"interrupted" in line] == err.splitlines()[-1:]
    assert os.listdir() == []


def test_a_call_leaves_the_environment_as_it_was(run, monkeypatch):
    for before in (None, "auto"):
        monkeypatch.delenv("MINIT2V_KERNELS", raising=False)
        if before:
            monkeypatch.setenv("MINIT2V_KERNELS", before)
        assert run("generate", "a cat", *FAST, "--kernels", "torch", "-o", "a.mp4")[0] == 0
        assert os.environ.get("MINIT2V_KERNELS") == before and read_metadata("a.mp4")["kernels"] == "torch"


# --------------------------------------------------------------------------------------------------------------- usage


def test_what_cannot_be_written_is_refused_before_the_work(run, monkeypatch):
    monkeypatch.setattr("minit2v.cli.videos._latents", None)
    for name in ("-", ".mp4", "", "d/.gif"):
        code, out, err = run("generate", "a cat", "-o", name)
        assert code == 2 and "is not a name" in err and err.count("\n") == 1, err
    for args in (["--fps", "0.0004"], ["--fps", "nan"], ["--fps", "1001"]):
        assert "must be a number from 0.01 to 1000" in run("generate", "a cat", *args)[2]
    code, out, err = run("generate", "a cat", "--fps", "101", "-o", "a.gif")
    assert code == 1 and "a.gif can have 0.01 to 100 frames per second, not 101: change --fps" in err
    assert os.listdir() == []


def test_what_encodes_is_looked_for_before_the_work(run, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/bin/true")
    monkeypatch.setattr("minit2v.cli.loading.load", None)
    code, out, err = run("generate", "a cat", "-o", "a.mp4")
    assert code == 1 and "/bin/true is not ffmpeg" in err and err.count("\n") == 1, err
    monkeypatch.setattr("minit2v.cli.loading.load", lambda *_: (_ for _ in ()).throw(ValueError("loaded")))
    assert "error: loaded" in run("generate", "a cat", "-o", "a.gif")[2]  # which needs none


def test_errors_after_parsing_point_to_the_help_of_the_command(run):
    for command, args in (("generate", []), ("animate", ["a", "--strength", "1"]),
                          ("animate", ["a", "--adapter", "x"])):  # fmt: skip
        code, out, err = run(command, *args)
        assert code == 2 and err.endswith(f"; see minit2v {command} --help\n") and err.count("\n") == 1, err


# ------------------------------------------------------------------------------------------------ files of strangers


def video(name, **settings):
    stored = {"minit2v": "generate", "prompt": "a cat", "seed": 1, "num_frames": 1, "steps": 1, **settings}
    return export_to_video(np.zeros((2, 8, 8, 3), np.uint8), name, metadata=stored)


def test_replay_uses_what_a_file_names_only_where_it_is_trusted(run, monkeypatch):
    monkeypatch.setattr("minit2v.files.hub.find_folder", lambda *_, **__: pytest.fail("looked up"))
    monkeypatch.setattr("minit2v.files.video.load_video", lambda *_, **__: pytest.fail("fetched"))
    hostile = [({"model": "owner/name"}, "model 'owner/name'"), ({"model": "/etc"}, "model '/etc'"),
               ({"minit2v": "restyle", "video": "http://x/y.mp4"}, "video 'http://x/y.mp4'"),
               ({"minit2v": "restyle", "video": "http://x/y", "model": "a/b"}, "model 'a/b', video 'http://x/y'"),
               ({"minit2v": "animate", "base": "shapes-image", "adapter": "a/b"}, "adapter 'a/b'"),
               ({"minit2v": "animate", "base": "a/b", "video": "/dev/zero"}, "base 'a/b', video '/dev/zero'"),
               ({"model": "a\x1b[2Jb"}, r"model 'a\x1b[2Jb'")]  # fmt: skip
    for settings, said in hostile:
        command = "animate" if settings.get("minit2v") == "animate" else "generate"
        code, out, err = run(command, "--replay", video("a.mp4", **settings))
        assert code == 1 and f"a.mp4 names {said}: give --trust to use them" in err and err.count("\n") == 1, err
    monkeypatch.undo()


def test_replay_needs_no_trust_for_the_models_of_this_package_and_those_given(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("generate", "--replay", video("a.mp4", model="shapes"), "-o", "b.mp4")[0] == 0
    assert run("generate", "--replay", video("a.mp4", model="a/b"), "--model", "shapes", "-o", "b.mp4")[0] == 0
    copy = shutil.copytree(Path(cli.__file__).parents[1] / "assets" / "shapes", tmp_path / "copy")
    code, out, err = run("generate", "--replay", video("a.mp4", model=str(copy)), "--trust", "-o", "c.mp4")
    assert code == 0 and f"a.mp4 names: model '{copy}'" in err


def test_settings_of_a_file_that_are_none_are_one_line(run):
    hostile = [{"steps": "many"}, {"scheduler": "help"}, {"seed": -1}, {"num_frames": [1]}, {"fps": {"a": "\x1b[3m\n"}},
               {"compat": "x"}, {"free_init": "yes"}, {"dtype": "\ud800"}, {"seed": 2**70}, {"kernels": "x=y"}]
    for settings in hostile:
        code, out, err = run("generate", "--replay", video("a.mp4", **settings))
        assert code == 1 and not out and "a.mp4: the settings stored in this file are not valid" in err, (settings, err)
        assert err.count("\n") == 1 and "\x1b" not in err
    for settings in ({"versions": [1]}, {"versions": "x"}, {"device": "gpu"}):
        assert run("generate", "--replay", video("a.mp4", **settings), "-o", "b.mp4")[0] == 0


def test_whatever_a_file_says_reaches_no_terminal_as_it_is(run, tmp_path):
    """The sequences of a terminal and line breaks: in class names, fields, parts, file names, keys of weights."""
    from safetensors.numpy import save_file

    evil = "x\x1b[2J\n\x07\u202e"
    shapes = Path(cli.__file__).parents[1] / "assets" / "shapes"
    for n, change in enumerate(({"_class_name": evil}, {evil: ["diffusers", "X"]}, {"unet": ["diffusers", evil]},
                                {"vae": evil}, {"scheduler": ["diffusers", evil]})):  # fmt: skip
        copy = shutil.copytree(shapes, tmp_path / f"{n}{evil}", dirs_exist_ok=True)
        index = json.loads((copy / "model_index.json").read_text())
        (copy / "model_index.json").write_text(json.dumps(index | change))
        for args in (["inspect", copy], ["generate", "a cat", "--model", copy, *FAST], ["convert", copy, "out"]):
            code, out, err = run(*args)
            said = (out + err).replace("\r", "")
            assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", said), said
            assert code == 1 or args[0] != "inspect", said
    save_file({evil: np.zeros((3, 3, 3), np.float32)}, "x.safetensors")
    for args in (["inspect", "x.safetensors"], ["convert", "x.safetensors", "out2"]):
        code, out, err = run(*args)
        assert code == 1 and "\x1b" not in out + err and "\u202e" not in out + err
