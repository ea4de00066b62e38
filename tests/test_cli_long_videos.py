"""The command line's options for long videos, texts of single frames and weighted prompts; small random models."""

import io

import numpy as np
import pytest

from minit2v import cli
from minit2v.cli.long_videos import prompt_of
from minit2v.files.video import load_video, read_metadata

FAST = ["--steps", "2", "--height", "32", "--width", "32", "--seed", "1"]
TEXT = "a red circle moving right"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys):
    def call(*args):
        code = cli.main([str(a) for a in args])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, [line for line in err.splitlines() if line.startswith("minit2v")]

    return call


def pixels(path):
    return np.stack([np.asarray(f) for f in load_video(path)])


@pytest.mark.parametrize("command", ["generate", "animate"])
def test_a_long_video_is_made_and_made_again(run, command):
    long = ["--num-frames", 20, "--window", 8, "--window-overlap", 2, "--loop", "--free-noise"]
    texts = ["--prompt-at", 12, "a blue square growing", "--prompt-at", 15, "a dog"]
    code, said = run(command, TEXT, *FAST, *long, *texts, "--prompt-interpolation", "spherical", "-o", "a.mp4")
    assert code == 0 and "window 8, loop, FreeNoise" in said[1]
    stored = read_metadata("a.mp4")
    assert stored["prompt"] == TEXT and stored["prompt_at"] == {"12": "a blue square growing", "15": "a dog"}
    assert (stored["window"], stored["window_overlap"], stored["loop"], stored["free_noise"]) == (8, 2, True, True)
    assert run(command, "--replay", "a.mp4", "-o", "b.mp4")[0] == 0
    again, first = pixels("b.mp4"), pixels("a.mp4")
    assert again.shape == (20, 32, 32, 3) and (again == first).all() and read_metadata("b.mp4") == stored
    assert run(command, "--replay", "a.mp4", "another text", "-o", "c.mp4")[0] == 0
    assert "prompt_at" not in read_metadata("c.mp4"), "texts of frames belong to their prompt"
    run(command, "--replay", "a.mp4", "--no-loop", "-o", "d.mp4")
    assert (pixels("d.mp4") != first).any()


def test_prompts_of_a_file_may_be_texts_of_frames(run, monkeypatch):
    lines = f'{TEXT}\n{{"0": "a green square growing", "5": "a blue square growing"}}\n{{not json}}\n'
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert run("generate", "--prompts", "-", *FAST, "--num-frames", 6, "-o", "d/")[0] == 0
    stored = read_metadata("d/a-green-square-growing-1.mp4")
    assert stored["prompt"] == "a green square growing" and stored["prompt_at"] == {"5": "a blue square growing"}
    assert "prompt_at" not in read_metadata("d/not-json-1.mp4")


def test_lines_of_a_file():
    assert prompt_of("a {cat}") == ("a {cat}", {})
    assert prompt_of('{"0": "a", "7": "b"}') == ("a", {7: "b"})
    assert prompt_of('{"3": "a", "7": "b"}') == ("a", {3: "a", 7: "b"})
    for line in ('{"0": 3}', '{"a": "b"}', '{"0": "a"', '{"": ""}', '{"-1": "a"}'):
        with pytest.raises(ValueError, match='a line that begins with {" must be JSON such as'):
            prompt_of(line)


def test_weighted_words(run):
    weighted = "a (red:1.5) circle moving right"
    assert run("generate", weighted, *FAST, "--num-frames", 4, "--prompt-weights", "-o", "a.mp4")[0] == 0
    assert read_metadata("a.mp4")["prompt_weights"] is True
    code, said = run("generate", weighted, *FAST, "--num-frames", 4, "-o", "b.mp4")
    assert code == 0 and (pixels("a.mp4") != pixels("b.mp4")).any()


@pytest.mark.parametrize("args,said", [
    (["--window", 4, "--window-overlap", 4], "--window-overlap 4 must be less than --window 4"),
    (["--prompt-at", 9, "b", "--num-frames", 8], "there is no frame 9, only 0 to 7"),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(run, args, said):
    code, lines = run("generate", TEXT, *FAST, *args, "-o", "a.mp4")
    errors = [line for line in lines if "error:" in line]
    assert code == 1 and len(errors) == 1 and said in errors[0]


@pytest.mark.parametrize("args,said", [
    (["--prompt-at", "x", "b"], "the frame must be a whole number from 0, not 'x'"),
    (["--prompt-at", "0", "b"], "frame 0 already has the prompt itself"),
    (["--prompt-at", "3", "b", "--prompt-at", "03", "c"], "frame 3 already has the text 'b'"),
    (["--prompt-at", "3"], "expected 2 arguments"),
    (["--window", "0"], "must be a whole number of at least 1"),
])  # fmt: skip
def test_wrong_usage(args, said, capsys):
    assert cli.main(["generate", TEXT, *args]) == 2
    assert said in capsys.readouterr().err


def test_more_frames_than_positions(run):
    code, said = run("animate", TEXT, *FAST, "--num-frames", 20, "-o", "a.mp4")
    assert code == 1 and "the motion adapter has position encodings for 16; give --window 16" in said[-1]
    code, said = run("animate", TEXT, *FAST, "--num-frames", 20, "--window", 17, "-o", "a.mp4")
    assert code == 1 and "--window 17: the motion adapter has position encodings for 16 frames" in said[-1]
