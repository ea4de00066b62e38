"""Names of videos that two make at once, and files of prompts."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from minit2v.cli import main, videos
from minit2v.files.video import load_video, read_metadata

FRAMES = np.zeros((2, 16, 16, 3))
FAST = ["--num-frames", "2", "--steps", "1", "--height", "16", "--width", "16"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("links", [True, False])
def test_all_who_write_at_once_keep_their_video(links, monkeypatch):
    if not links:  # as on disks that know none
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    path, start, names = Path("d/x-0.mp4"), threading.Barrier(6), {}
    path.parent.mkdir()

    def write(n):
        start.wait()
        names[n] = videos._write(FRAMES, path, 8.0, {"n": n}, replace=False)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(p.name for p in Path("d").iterdir()) == ["x-0-2.mp4", "x-0-3.mp4", "x-0-4.mp4", "x-0-5.mp4",
                                                           "x-0-6.mp4", "x-0.mp4"]
    assert {n: read_metadata(name)["n"] for n, name in names.items()} == {n: n for n in range(6)}
    assert all(len(load_video(name)) == 2 for name in names.values())


def test_a_video_that_cannot_be_written_is_named_and_leaves_nothing(monkeypatch):
    Path("x.mp4").symlink_to("nowhere")  # is there, and stays
    assert videos._write(FRAMES, Path("x.mp4"), 8.0, {}, replace=False) == Path("x-2.mp4")
    assert os.readlink("x.mp4") == "nowhere"

    def full(frames, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("minit2v.files.video.export_to_video", full)
    with pytest.raises(OSError, match="^cannot write y.mp4: No space left"):
        videos._write(FRAMES, Path("y.mp4"), 8.0, {}, replace=False)
    assert sorted(os.listdir()) == ["x-2.mp4", "x.mp4"]


def test_a_name_that_somebody_takes_meanwhile_is_left_to_them(monkeypatch):
    write = videos._write

    def late(frames, path, fps, about, *more):
        path.write_text("theirs")
        return write(frames, path, fps, about, *more)

    monkeypatch.setattr(videos, "_write", late)
    assert main(["generate", "a red circle", *FAST, "--seed", "0", "-o", "d/"]) == 0
    assert Path("d/a-red-circle-0.mp4").read_text() == "theirs" and len(load_video("d/a-red-circle-0-2.mp4")) == 2
    monkeypatch.setattr(videos, "_write", write)
    assert main(["generate", "a red circle", "a red circle", *FAST, "--seed", "0", "-o", "d/"]) == 0
    assert main(["generate", "a red circle", "a blue square", *FAST, "--seed", "0", "-o", "d/v.mp4"]) == 0
    circles = [f"a-red-circle-0{n}.mp4" for n in ("-2", "-3", "-4", "")]
    assert sorted(os.listdir("d")) == [*circles, "v-1.mp4", "v-2.mp4"]


@pytest.mark.parametrize(("content", "prompts"), [
    ("\ufeffa cat\na dog\n", ["a cat", "a dog"]),
    ("a cat\r\na dog\r\n\r\n", ["a cat", "a dog"]),
    ("a\u2028cat\na\vdog\na\fbird\na\x85fish\na\x1efox", ["a\u2028cat", "a\vdog", "a\fbird", "a\x85fish", "a\x1efox"]),
    ("a\ufeffcat", ["a\ufeffcat"]),
])
def test_what_ends_a_prompt(content, prompts, monkeypatch):
    import io

    Path("p.txt").write_bytes(content.encode())
    assert videos._read_prompts("p.txt") == prompts
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode()), "utf-8"))
    assert videos._read_prompts("-") == prompts
