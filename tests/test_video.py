"""Frames to files and back: colours, sizes, rates, metadata, and what is left behind when something goes wrong."""

import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minit2v.files import video
from minit2v.files.video import find_ffmpeg, read_metadata
from minit2v.utils import export_to_gif, export_to_video, load_video

COLOURS = np.array([(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255), (10, 100, 200), (250, 120, 30)],
                   np.uint8)


def solid(height=64, width=64):
    """One frame for each colour, uint8 (f h w c)."""
    return np.broadcast_to(COLOURS[:, None, None], (len(COLOURS), height, width, 3)).copy()


def pixels(frames):
    return np.stack([np.asarray(f) for f in frames]).astype(int)


def probe(path):
    """What ffmpeg says about the stream."""
    said = subprocess.run([find_ffmpeg(), "-hide_banner", "-i", str(path)], capture_output=True, text=True).stderr
    return next(line for line in said.splitlines() if "Video:" in line)


def as_form(form):
    u8 = solid()
    f01 = u8.astype(np.float64) / 255
    return {
        "array uint8": u8,
        "array float": f01,
        "array float16": f01.astype(np.float16),
        "array list": list(f01.astype(np.float32)),
        "pil": [Image.fromarray(x) for x in u8],
        "pil tuple": tuple(Image.fromarray(x) for x in u8),
        "pil rgba": [Image.fromarray(x).convert("RGBA") for x in u8],
        "torch": torch.tensor(f01).permute(0, 3, 1, 2),
        "torch uint8": torch.tensor(u8).permute(0, 3, 1, 2),
        "torch bfloat16 list": list(torch.tensor(f01).permute(0, 3, 1, 2).bfloat16()),
        "torch with grad": torch.tensor(f01).permute(0, 3, 1, 2).requires_grad_(),
        "batch array": f01[None],
        "batch torch": torch.tensor(f01).permute(0, 3, 1, 2)[None],
        "batch list of pil": [[Image.fromarray(x) for x in u8]],
        "batch list of array": [f01],
        "batch of batch": [f01[None]],
    }[form]


FORMS = ["array uint8", "array float", "array float16", "array list", "pil", "pil tuple", "pil rgba", "torch",
         "torch uint8", "torch bfloat16 list", "torch with grad", "batch array", "batch torch", "batch list of pil",
         "batch list of array", "batch of batch"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_frames_keeps_its_colours(form, tmp_path):
    path = export_to_video(as_form(form), tmp_path / "a.mp4")
    assert path == str(tmp_path / "a.mp4")
    frames = load_video(path)
    assert [f.mode for f in frames] == ["RGB"] * len(COLOURS)
    assert np.abs(pixels(frames) - solid()).max() <= 3  # 8-bit YUV costs up to 2, bfloat16 one more
    gif = load_video(export_to_gif(as_form(form), tmp_path / "a.gif"))
    assert np.abs(pixels(gif) - solid()).max() <= ("bfloat16" in form)


def test_floats_are_rounded_not_truncated(tmp_path):
    x = np.full((2, 4, 4, 3), 99.6 / 255)
    assert (pixels(load_video(export_to_gif(x, tmp_path / "a.gif"))) == 100).all()
    x[:] = 1.004  # an overshoot of rounding is clipped, it does not wrap
    assert (pixels(load_video(export_to_gif(x, tmp_path / "a.gif"))) == 255).all()


def test_grey_frames_become_rgb(tmp_path):
    x = np.linspace(0, 255, 64).astype(np.uint8).reshape(1, 8, 8, 1)
    assert (pixels(load_video(export_to_gif(x, tmp_path / "a.gif"))) == x).all()


def test_stream_is_what_browsers_play(tmp_path):
    path = export_to_video(solid(), tmp_path / "a.mp4", fps=8)
    said = probe(path)
    assert re.search(r"h264 \((High|Main|Constrained Baseline)\)", said) and "yuv420p(tv, bt709, progressive)" in said
    assert "64x64" in said and " 8 fps" in said
    data = open(path, "rb").read()
    assert data.index(b"moov") < data.index(b"mdat")  # the index first: plays while it loads
    assert "High 4:4:4" not in probe(export_to_video(solid(), tmp_path / "b.mp4", quality=10))


@pytest.mark.parametrize("suffix", [".mp4", ".MP4", ".m4v", ".mov", ".mkv"])
def test_containers_rates_and_metadata(suffix, tmp_path):
    said = {"prompt": 'a "red" ball = 50%; # \\ \n🎬 é', "seed": 2**63, "scale": 7.5, "nested": {"x": None}}
    path = export_to_video(solid(16, 16), tmp_path / f"a{suffix}", fps=23.976, metadata=said)
    assert read_metadata(path) == said
    frames, fps = load_video(path, return_fps=True)
    assert len(frames) == len(COLOURS) and fps == pytest.approx(23.976, abs=0.01)


def test_metadata_longer_than_an_argument_may_be(tmp_path):
    said = {"prompt": "🎬" * 100_000}
    for name in ("a.mp4", "a.mov", "a.mkv"):  # QuickTime's own comments end at 64 KiB
        assert read_metadata(export_to_video(solid(8, 8), tmp_path / name, metadata=said)) == said
    assert read_metadata(export_to_gif(solid(8, 8), tmp_path / "a.gif", metadata=said)) == said


def test_no_metadata_reads_as_empty(tmp_path):
    assert read_metadata(export_to_video(solid(8, 8), tmp_path / "a.mp4")) == {}
    assert read_metadata(export_to_gif(solid(8, 8), tmp_path / "a.gif")) == {}
    with pytest.raises(FileNotFoundError):
        read_metadata(tmp_path / "b.mp4")
    (tmp_path / "c.mp4").write_text("no video")
    with pytest.raises(ValueError, match="not a video"):
        read_metadata(tmp_path / "c.mp4")


@pytest.mark.parametrize("height,width", [(2, 2), (8, 8), (64, 64), (18, 30)])
def test_even_sizes_are_exact(height, width, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frames = load_video(export_to_video(solid(height, width), tmp_path / "a.mp4"))
    assert {f.size for f in frames} == {(width, height)}


def test_odd_sizes_repeat_their_last_row_and_column(tmp_path):
    x = np.zeros((4, 33, 17, 3), np.uint8)
    x[:, -1] = 255
    x[:, :, -1] = 200
    with pytest.warns(UserWarning, match="17x33 is padded to 18x34") as caught:
        frames = pixels(load_video(export_to_video(x, tmp_path / "a.mp4", quality=10)))
    assert len(caught) == 1 and caught[0].filename == __file__
    assert frames.shape == (4, 34, 18, 3)
    assert (frames[:, :32, 16:] > 180).all() and (frames[:, 32:, :14] > 230).all() and (frames[:, :31, :14] < 20).all()


def test_macro_block_size_completes_to_its_multiple(tmp_path):
    with pytest.warns(UserWarning, match="padded to 32x32"):
        path = export_to_video(solid(18, 30), tmp_path / "a.mp4", macro_block_size=16)
    assert load_video(path)[0].size == (32, 32)


def test_quality_and_bitrate_matter_and_the_default_is_clean(tmp_path):
    ramp = np.linspace(0, 1, 64)
    x = np.stack([np.broadcast_to((ramp[:, None] * 0.5 + np.roll(ramp, n) * 0.5)[..., None], (64, 64, 3))
                  for n in range(8)])
    size, error = {}, {}
    for quality in (0, 5, 10):
        path = export_to_video(x, tmp_path / f"{quality}.mp4", quality=quality)
        size[quality] = os.path.getsize(path)
        error[quality] = np.abs(pixels(load_video(path)) - x * 255).mean()
    assert size[0] < size[5] < size[10] and error[0] > error[5] > error[10]
    assert error[5] < 1.0
    low = os.path.getsize(export_to_video(x, tmp_path / "b.mp4", bitrate=10_000))
    assert low < os.path.getsize(export_to_video(x, tmp_path / "c.mp4", bitrate=1_000_000))


def test_temporary_file_and_repeated_writes(tmp_path):
    for export in (export_to_video, export_to_gif):
        one, two = export(solid(8, 8)), export(solid(8, 8))
        assert one != two and len(load_video(one)) == len(load_video(two)) == len(COLOURS)
        os.unlink(one), os.unlink(two)
    path = tmp_path / "a.mp4"
    path.write_text("old")
    export_to_video(solid(8, 8), path)
    assert len(load_video(path)) == len(COLOURS) and os.listdir(tmp_path) == ["a.mp4"]
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)  # not 0600


def test_gif_keeps_equal_frames_and_the_total_time(tmp_path):
    x = np.repeat(solid(8, 8)[:4], 6, axis=0)
    path = export_to_gif(x, tmp_path / "a.gif", fps=24)
    with Image.open(path) as gif:
        assert gif.n_frames == 24 and gif.info["loop"] == 0
        times = []
        for n in range(gif.n_frames):
            gif.seek(n)
            times.append(gif.info["duration"])
    assert sum(times) == 1000 and set(times) == {40, 50}
    frames, fps = load_video(path, return_fps=True)
    assert (pixels(frames) == x).all() and fps == 24


def test_gif_of_many_colours_is_close_and_ffmpeg_reads_it(tmp_path):
    y, x = np.mgrid[:64, :64] / 63
    frames = np.stack([np.stack([x, y, np.full_like(x, n / 7)], -1) for n in range(8)])
    path = export_to_gif(frames, tmp_path / "a.gif", fps=10)
    assert np.abs(pixels(load_video(path)) - frames * 255).mean() < 5
    out = subprocess.run([find_ffmpeg(), "-v", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"],
                         capture_output=True)
    assert out.stderr == b"" and len(out.stdout) == 8 * 64 * 64 * 3
    assert (np.frombuffer(out.stdout, np.uint8).reshape(8, 64, 64, 3) == pixels(load_video(path))).all()


def test_gif_rates():
    with pytest.raises(ValueError, match="at most 100"), pytest.warns(UserWarning, match="slow"):
        export_to_gif(solid(8, 8), fps=200)


NAN = solid() / 255
NAN[3, 5, 5, 1] = np.nan
BAD_FRAMES = [
    ([], ValueError, "no frames"),
    (np.zeros((0, 8, 8, 3)), ValueError, "no frames"),
    ([[]], ValueError, "no frames"),
    (None, TypeError, "NoneType"),
    ("a.mp4", TypeError, "str"),
    ([1, 2], TypeError, "frame 0 is a int"),
    (np.zeros((8, 8, 3)), ValueError, "4 axes"),
    (np.array(3.0), ValueError, "no frames"),
    (np.zeros((2, 4, 8, 8, 3)), ValueError, "batch of 2"),
    ([[Image.new("RGB", (8, 8))]] * 2, ValueError, "batch of 2"),
    (NAN, ValueError, "frame 3 holds NaN"),
    (solid() / 255 * 2 - 1, ValueError, r"frame 0 spans \[-1, -1\]"),
    (solid().astype(float), ValueError, r"frame 1 spans \[255, 255\]"),
    (solid().astype(np.int64), ValueError, "int64"),
    (np.zeros((2, 8, 8, 4), np.uint8), ValueError, "1 or 3 channels"),
    (torch.zeros(2, 8, 8, 3), ValueError, r"\(c h w\)"),
    (np.zeros((2, 0, 8, 3), np.uint8), ValueError, "no pixels"),
    ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 10))], ValueError, "first is 8x8, frame 1 8x10"),
]


@pytest.mark.parametrize("export,name", [(export_to_video, "a.mp4"), (export_to_gif, "a.gif")])
@pytest.mark.parametrize("frames,error,said", BAD_FRAMES)
def test_bad_frames_are_refused_in_one_line(export, name, frames, error, said, tmp_path):
    with pytest.raises(error, match=said) as caught:
        export(frames, tmp_path / name)
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == []


@pytest.mark.parametrize("change,error,said", [
    ({"fps": 0}, ValueError, "fps"), ({"fps": 0.0004}, ValueError, "fps"),
    ({"fps": -3}, ValueError, "fps"), ({"fps": float("nan")}, ValueError, "fps"),
    ({"fps": "8"}, TypeError, "fps"), ({"fps": None}, TypeError, "fps"), ({"quality": 11}, ValueError, "quality"),
    ({"bitrate": 0}, ValueError, "bitrate"), ({"macro_block_size": 0}, ValueError, "macro_block_size"),
])
def test_bad_arguments_are_refused(change, error, said, tmp_path):
    with pytest.raises(error, match=said):
        export_to_video(solid(8, 8), tmp_path / "a.mp4", **change)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name,said", [("a.gif", "export_to_gif"), ("a.txt", "must end in"), ("a", "must end in"),
                                       ("a.mp3", r"must end in .*\(nearest: '.mp4'\)")])
def test_a_name_that_is_no_video_is_refused(name, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        export_to_video(solid(8, 8), tmp_path / name)
    with pytest.raises(ValueError, match="must end in .gif"):
        export_to_gif(solid(8, 8), tmp_path / "a.mp4")


@pytest.mark.parametrize("export,suffix", [(export_to_video, ".mp4"), (export_to_gif, ".gif")])
def test_unwritable_outputs(export, suffix, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / f"folder{suffix}").mkdir()
    for path, error in [(tmp_path / "file" / f"a{suffix}", NotADirectoryError),
                        (tmp_path / "nowhere" / f"a{suffix}", FileNotFoundError),
                        (tmp_path / f"folder{suffix}", IsADirectoryError)]:
        with pytest.raises(error) as caught:
            export(solid(8, 8), path)
        assert caught.value.filename == str(path)
    assert sorted(os.listdir(tmp_path)) == ["file", f"folder{suffix}"]


def test_encoder_failure_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_text("old")
    noise = np.random.default_rng(0).random((16, 128, 128, 3))
    fake = tmp_path / "ffmpeg"
    for script, said in [("echo 'broken codec' >&2; exit 3", "broken codec"), ("kill -9 $$", "SIGKILL"),
                         ("head -c 1000 >/dev/null; exit 5", "exit code 5")]:
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
        monkeypatch.setattr("minit2v.files.video.find_ffmpeg", lambda: str(fake))
        with pytest.raises(RuntimeError, match=said):
            export_to_video(noise, path)
        assert path.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["a.mp4", "ffmpeg"]
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with pytest.raises(RuntimeError, match=said):
            export_to_video(noise)
        assert sorted(os.listdir(tmp_path)) == ["a.mp4", "ffmpeg"]


def test_interrupt_kills_the_encoder_and_leaves_nothing(tmp_path, monkeypatch):
    class Interrupting(np.ndarray):
        pass

    started = []
    popen = subprocess.Popen

    def spy(*args, **kw):
        started.append(popen(*args, **kw))
        return started[-1]

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("minit2v.files.video.subprocess.Popen", spy)
    monkeypatch.setattr("minit2v.files.video.np.ascontiguousarray", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_to_video(solid(8, 8), tmp_path / "a.mp4")
    assert os.listdir(tmp_path) == [] and started[-1].poll() == -9  # the first may ask for the version


@pytest.mark.parametrize("export,suffix", [(export_to_video, ".mp4"), (export_to_gif, ".gif")])
def test_files_that_may_not_grow(export, suffix, tmp_path, forked):
    def child():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            export(np.random.default_rng(0).random((16, 128, 128, 3)), tmp_path / f"a{suffix}")
        except (OSError, RuntimeError) as e:
            print(type(e).__name__, e)

    code, said = forked(child).wait()
    assert code == 0 and "Error" in said and ("File too large" in said or "SIGXFSZ" in said), said
    assert os.listdir(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 KiB, where this machine lets us make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk(small_disk):
    noise = np.random.default_rng(0).random((16, 128, 128, 3))
    kept = export_to_video(solid(8, 8), small_disk / "a.mp4")
    for export, name in [(export_to_video, "a.mp4"), (export_to_gif, "a.gif")]:
        with pytest.raises(OSError) as caught:
            export(noise, small_disk / name)
        assert caught.value.errno == 28
    assert os.listdir(small_disk) == ["a.mp4"] and len(load_video(kept)) == len(COLOURS)  # the old file survives


def test_truncated_and_corrupt_files(tmp_path):
    noise = np.random.default_rng(0).random((8, 64, 64, 3))
    for name, export in [("a.mp4", export_to_video), ("a.gif", export_to_gif)]:
        data = open(export(noise, tmp_path / name), "rb").read()
        bad = tmp_path / f"bad-{name}"
        for cut in (4, 40, len(data) // 3, len(data) // 2, len(data) - 300):
            bad.write_bytes(data[:cut])
            with pytest.raises(ValueError, match="damaged|no frames") as caught:
                load_video(bad)
            assert "\n" not in str(caught.value) and str(bad) in str(caught.value)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("hello")
    for name in ("empty.mp4", "text.mp4"):
        with pytest.raises(ValueError, match="not a video"):
            load_video(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_video(tmp_path / "none.mp4")


def test_load_video_from_a_folder_and_an_address(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    with pytest.raises(ValueError, match="no images"):
        load_video(folder)
    for n in range(12):
        Image.new("L", (8, 8), n).save(folder / f"{n}.png")
    frames, fps = load_video(folder, return_fps=True)
    assert [f.getpixel((0, 0)) for f in frames] == [(n, n, n) for n in range(12)] and fps is None
    (folder / "²1.png").write_bytes((folder / "0.png").read_bytes())  # a digit, and no number
    assert len(load_video(folder)) == 13
    for content in (b"hello", (folder / "0.png").read_bytes()[:41]):
        (folder / "²1.png").write_bytes(content)
        with pytest.raises(ValueError, match="²1.png: a damaged image"):
            load_video(folder)
    path = export_to_video(solid(8, 8), tmp_path / "a.mp4")
    opened = []

    def serve(url, timeout):
        opened.append(url)
        return open(path, "rb")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(urllib.request, "urlopen", serve)
        assert len(load_video("https://example.org/x/a.mp4?download=true")) == len(COLOURS)
        with pytest.raises(OSError, match="^http://example.org/: cannot be downloaded"):
            patch.setattr(urllib.request, "urlopen", lambda url, timeout: open(tmp_path / "gone"))
            load_video("http://example.org/")
    assert opened == ["https://example.org/x/a.mp4?download=true"]


def test_videos_that_others_made(tmp_path):
    """Ten bits a sample, and more frames a second than ffmpeg writes out."""
    path = str(tmp_path / "a.mp4")
    subprocess.run([find_ffmpeg(), "-v", "error", "-f", "lavfi", "-i", "color=0x0A64C8:s=16x8:r=1000", "-frames:v", "3",
                    "-pix_fmt", "yuv420p10le", "-c:v", "libx264", path], check=True)
    frames, fps = load_video(path, return_fps=True)
    assert len(frames) == 3 and frames[0].size == (16, 8) and fps == 1000
    subprocess.run([find_ffmpeg(), "-y", "-v", "error", "-f", "lavfi", "-i", "color=0x0A64C8:s=16x8", "-frames:v", "3",
                    "-metadata", b"comment=caf\xe9", str(tmp_path / "b.mp4")], check=True)
    assert read_metadata(tmp_path / "b.mp4") == {}
    assert np.abs(pixels(frames) - [10, 100, 200]).max() <= 4


HOSTILE = ["[error] x", "[fatal] y", "Video: a red circle at 60 fps",
           "a\n[error] b\n  Stream #0:0: Video: h264, 77 fps",
           "\x1b[31mred", "x\ncomment={\"prompt\": 1}", "a\\\n[STREAM]", ";=#", "frame:0 pts:9"]


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_what_a_file_says_is_no_message_of_the_decoder(suffix, tmp_path):
    said = {f"{n} {text}": text for n, text in enumerate(HOSTILE)}
    path = export_to_video(solid(8, 8), tmp_path / f"a{suffix}", fps=7, metadata=said)
    frames, fps = load_video(path, return_fps=True)
    assert len(frames) == len(COLOURS) and fps == 7 and read_metadata(path) == said


@pytest.mark.parametrize("text", HOSTILE)
def test_what_strangers_write_into_tags(text, tmp_path):
    """In every tag of the file and of its stream: it changes nothing, and is not taken for our settings."""
    path = str(tmp_path / "a.mkv")
    tags = [f"-metadata{where}" for where in ("", ":s:v:0") for _ in range(2)]
    values = [f"title={text}", f"artist={text}\ncomment={{}}", f"title={text}", 'comment={"prompt": "of the stream"}']
    subprocess.run([find_ffmpeg(), "-v", "error", "-f", "lavfi", "-i", "color=red:s=16x16:r=12", "-frames:v", "3",
                    *(x for pair in zip(tags, values, strict=True) for x in pair), path], check=True)
    frames, fps = load_video(path, return_fps=True)
    assert len(frames) == 3 and fps == 12 and read_metadata(path) == {}


def test_names_that_look_like_options_or_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-y.mp4", "a b'c\"%d.mp4", "a%03d.mp4", "é🎬.mp4", "x" * 200 + ".mp4", "🎬" * 60 + ".mp4",
                 "file:a.mp4", "concat:-y.mp4|b.mp4", "[error] a.mp4", "a\n[error] Video: 60 fps.mp4", "\x1b[31m.mp4",
                 os.fsdecode(b"caf\xe9.mp4")):  # the last is not UTF-8
        path = export_to_video(solid(8, 8), name, fps=6, metadata={"n": name})
        frames, fps = load_video(path, return_fps=True)
        assert len(frames) == len(COLOURS) and fps == 6 and read_metadata(name) == {"n": name}
    gif = export_to_gif(solid(8, 8), os.fsdecode(b"caf\xe9.gif"), metadata={"n": os.fsdecode(b"\xe9")})
    assert read_metadata(gif) == {"n": "\udce9"}
    for name in ("a\nb.mp4", "\x1b[31m.gif", os.fsdecode(b"\xe9.png")):
        with open(name, "wb") as f:
            f.write(b"GIF89a" if name.endswith("gif") else b"hello")
        with pytest.raises(ValueError) as caught:
            load_video(name)
        assert str(caught.value).isprintable()  # one line, no control characters, no halves of characters


def test_a_playlist_opens_nothing(tmp_path):
    """Neither the files nor the addresses that it names."""
    export_to_video(solid(8, 8), tmp_path / "secret.mp4")
    for text in (f"ffconcat version 1.0\nfile {tmp_path}/secret.mp4\n", f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/secret.mp4\n",
                 "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:secret.mp4\n#EXT-X-ENDLIST\n"):
        (tmp_path / "a.mp4").write_text(text)
        with pytest.raises(ValueError, match="a.mp4: not a video"):
            load_video(tmp_path / "a.mp4")


def test_an_ffmpeg_that_is_too_old_is_named(tmp_path, monkeypatch):
    fake = tmp_path / "ffmpeg"
    fake.write_text("#!/bin/sh\necho ffmpeg version 4.2.2-static Copyright\n")
    fake.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(fake))
    with pytest.raises(RuntimeError, match=r"ffmpeg version 4.2.2-static .*version 7.0 or newer is needed: .*imageio"):
        export_to_video(solid(8, 8), tmp_path / "a.mp4")
    assert os.listdir(tmp_path) == ["ffmpeg"]


def test_what_is_no_ffmpeg_is_named(tmp_path, monkeypatch):
    for name, said in (("true", "is not ffmpeg: unset IMAGEIO_FFMPEG"), ("gone", "gone cannot be started .No such")):
        (tmp_path / "true").write_text("#!/bin/sh\n"), (tmp_path / "true").chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / name))
        with pytest.raises(RuntimeError, match=said):
            export_to_video(solid(8, 8), tmp_path / "a.mp4")


def test_a_pipe_among_images_does_not_wait(tmp_path, request):
    folder = tmp_path / "folder"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "1.png")
    os.mkfifo(tmp_path / "pipe")

    def waits(*_):
        raise TimeoutError("it waits for somebody to write")

    before = signal.signal(signal.SIGALRM, waits)
    request.addfinalizer(lambda: (signal.alarm(0), signal.signal(signal.SIGALRM, before)))
    signal.alarm(30)
    for make in (lambda p: os.mkfifo(p), lambda p: p.symlink_to(tmp_path / "pipe"), Path.mkdir):
        make(folder / "2.png")
        with pytest.raises(ValueError, match="2.png: .*a folder, a pipe or a device, not a file"):
            load_video(folder)
        (folder / "2.png").rmdir() if (folder / "2.png").is_dir() else (folder / "2.png").unlink()


def test_the_limit_of_pillow_is_no_damage(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="a.png: Image size .4096 pixels.* raise PIL.Image.MAX_IMAGE_PIXELS") as error:
        load_video(tmp_path / "a.png")
    assert "damaged" not in str(error.value)


def test_other_addresses_are_no_files(tmp_path):
    for address in ("ftp://x/y.mp4", "file:///etc/passwd", "S3://b/c.gif"):
        with pytest.raises(ValueError, match=f"{address}: only http and https URLs can be downloaded"):
            load_video(address)
    with pytest.raises(OSError, match="HTTP://127.0.0.1:1/x.mp4: cannot be downloaded"):
        load_video("HTTP://127.0.0.1:1/x.mp4")


def test_an_exact_grid_wins_over_a_slower_one_that_is_near(tmp_path):
    """40, 80, 40 ms are 25 frames a second; to 24 no time is off by more than a GIF's tick."""
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=[40, 80, 40])
    found, fps = load_video(tmp_path / "a.gif", return_fps=True)
    assert fps == 25 and [f.getpixel((0, 0)) for f in found] == [(255, 0, 0), (0, 255, 0), (0, 255, 0), (0, 0, 255)]


def test_numpy_numbers_are_numbers(tmp_path):
    path = export_to_video(solid(16, 16), tmp_path / "a.mp4", fps=np.uint8(8), bitrate=np.int64(100_000),
                           macro_block_size=np.int16(16), metadata={"seed": np.int64(3), "scale": np.float32(0.5)})
    assert read_metadata(path) == {"seed": 3, "scale": 0.5} and load_video(path, return_fps=True)[1] == 8
    assert len(load_video(path, max_pixels=np.int32(7 * 256))) == 7
    export_to_video(solid(16, 16), path, quality=np.float16(7.5))


# ------------------------------------------------------------------------------------------------------------- timing

RED, BLUE = (255, 0, 0), (0, 0, 255)


def reds(frames):
    """For each frame whether it is red."""
    return [bool(np.asarray(f)[0, 0, 0] > 128) for f in frames]


def animated(path, *durations):
    """Red and blue in turns, for so many milliseconds."""
    frames = [Image.new("RGB", (8, 8), (BLUE, RED)[n % 2 == 0]) for n in range(len(durations))]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=list(durations), loop=0)
    return path


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp"])
@pytest.mark.parametrize("durations,shown,rate", [
    ((750, 250), [1, 1, 1, 0], 4),  # equal frames that an encoder has merged
    ((100, 100, 100), [1, 0, 1], 10),
    ((40, 40, 50, 40, 40, 40), [1, 0, 1, 0, 1, 0], 24),  # rounded
    ((100, 100, 1000), [1, 0, *[1] * 10], 10),
    ((500, 200), [1] * 5 + [0] * 2, 10),
    ((4000,), [1], 0.25),
])
def test_frames_of_unequal_length_are_put_on_an_even_grid(suffix, durations, shown, rate, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frames, fps = load_video(animated(tmp_path / f"a{suffix}", *durations), return_fps=True)
    assert reds(frames) == shown and len({id(f) for f in frames}) == len(frames)
    if suffix == ".gif" or len(durations) > 1:
        assert fps == pytest.approx(rate, rel=0.02)
    else:
        assert fps is None  # a still image


@pytest.mark.parametrize("fps", [1, 2, 5, 8, 10, 12, 12.5, 15, 16, 20, 23.976, 24, 25, 29.97, 30, 48, 50])
def test_every_rate_comes_back(fps, tmp_path):
    """Also from a GIF, where times are rounded."""
    x = np.repeat(solid(8, 8), 5, axis=0)
    for export, name, near in ((export_to_gif, "a.gif", 0.01), (export_to_video, "a.mp4", 1e-4)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            frames, rate = load_video(export(x, tmp_path / name, fps=fps), return_fps=True)
        assert len(frames) == 35 and rate == pytest.approx(fps, rel=near)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_videos_whose_frames_last_unequally(suffix, tmp_path):
    def make(source, filters):
        path = str(tmp_path / f"a{suffix}")
        subprocess.run([find_ffmpeg(), "-y", "-v", "error", "-f", "lavfi", "-i", source, "-vf", filters,
                        "-fps_mode", "vfr",
                        "-enc_time_base", "1/1000", "-c:v", "libx264", path], check=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            return *load_video(path, return_fps=True), [w for w in caught if "unequal" in str(w.message)]

    colours = "color=red:s=16x16:r=4:d=0.75[r],color=blue:s=16x16:r=4:d=0.25[b];[r][b]concat"
    frames, fps, warned = make(colours.replace("[r],", "[r];"), "select=not(between(n\\,1\\,2))")
    assert reds(frames) == [1, 1, 1, 0] and fps == 4 and not warned
    frames, fps, warned = make("testsrc=s=16x16:r=30:d=1", "select=mod(n\\,3)")  # each third is missing
    assert len(frames) in (29, 30) and fps == pytest.approx(30) and not warned
    frames, fps, warned = make("testsrc=s=16x16:r=10:d=2", "settb=1/1000,setpts=PTS+70*mod(N*N\\,7)/6")
    assert len(frames) / fps == pytest.approx(2, rel=0.1) and 9 < fps < 31
    assert len(warned) == 1 and warned[0].filename == __file__ and "\n" not in str(warned[0].message)


# ---------------------------------------------------------------------------------------------- images, and their size


def test_images_are_upright_and_keep_their_greys(tmp_path):
    x = np.zeros((4, 8, 3), np.uint8)
    x[:, :4] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right: white is above
    for folder, name in (("jpg", "0.jpg"), ("png", "0.png"), ("webp", "0.webp")):
        (tmp_path / folder).mkdir()
        Image.fromarray(x).save(tmp_path / folder / name, exif=exif, quality=100)
        for path in (tmp_path / folder, tmp_path / folder / name):
            (frame,) = load_video(path)
            assert frame.size == (4, 8) and np.asarray(frame)[:3].min() > 200 and np.asarray(frame)[5:].max() < 50
    grey = np.array([[0, 257, 32768, 65535]], np.uint16)
    (tmp_path / "grey").mkdir()
    Image.fromarray(grey).save(tmp_path / "grey" / "0.png")
    for path in (tmp_path / "grey", tmp_path / "grey" / "0.png"):
        assert np.asarray(load_video(path)[0])[0].tolist() == [[v] * 3 for v in (0, 1, 128, 255)]


def test_a_limit_of_pixels(tmp_path, monkeypatch):
    """It is looked at before anything is decoded, and an argument raises it."""
    (tmp_path / "folder").mkdir()
    for n in range(7):
        Image.new("RGB", (64, 64)).save(tmp_path / "folder" / f"{n}.png")
    animated(tmp_path / "a.png", *[100] * 7), animated(tmp_path / "a.webp", *[100] * 7)
    paths = [export_to_video(solid(), tmp_path / "a.mp4"), export_to_video(solid(), tmp_path / "a.mkv"),
             export_to_gif(solid(), tmp_path / "a.gif"), tmp_path / "folder"]
    monkeypatch.setattr(Image.Image, "convert", None), monkeypatch.setattr(Image, "frombytes", None)
    for path in paths:
        with pytest.raises(ValueError, match="7 (frames of 64x64 are|images have) 28,672 .* max_pixels is 28,67"):
            load_video(path, max_pixels=7 * 64 * 64 - 1)
    for name in ("a.png", "a.webp"):
        with pytest.raises(ValueError, match="7 frames of 8x8 are 448 pixels"):
            load_video(tmp_path / name, max_pixels=447)
    with pytest.raises(ValueError, match="max_pixels must be a number above 0"):
        load_video(paths[0], max_pixels=0)
    monkeypatch.undo()
    for path in paths:
        assert len(load_video(path, max_pixels=7 * 64 * 64)) == len(load_video(path, max_pixels=float("inf"))) == 7
    with pytest.raises(ValueError, match="1,461 frames of 8x8 .*max_pixels"):  # as many as its times ask for
        load_video(animated(tmp_path / "b.png", 60_000, 50_000, 36_100), max_pixels=1460 * 64)


def test_a_video_that_unfolds_is_refused_at_once(tmp_path):
    """Kilobytes that would be gigabytes. In a new process: ffmpeg's peak counts that of the process that starts it."""
    path = str(tmp_path / "a.mp4")
    subprocess.run([find_ffmpeg(), "-v", "error", "-f", "lavfi", "-i", "color=black:s=1920x1080:r=30", "-frames:v",
                    "150", "-c:v", "libx264", "-preset", "ultrafast", "-g", "999", path], check=True)
    assert os.path.getsize(path) < 500_000
    said = subprocess.run([sys.executable, "-c", textwrap.dedent("""
        import resource, sys
        from minit2v.files.video import load_video
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            load_video(sys.argv[1])
        except ValueError as e:
            print(e)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    """), path], capture_output=True, text=True, check=True).stdout
    message, grown, of_ffmpeg = said.splitlines()
    assert "150 frames of 1920x1080 are 311,040,000 pixels, and max_pixels is 268,435,456" in message
    assert int(grown) < 100_000 and int(of_ffmpeg) < 900_000  # KiB: its frames would take 1,215,000


def test_memory_while_loading_is_what_is_returned(tmp_path):
    """At most 1.2 times the images, which PIL holds at four bytes a pixel. Each in a process without used memory."""
    x = np.zeros((64, 512, 512, 3), np.uint8)
    paths = [export_to_video(x, tmp_path / "a.mp4"), export_to_gif(x, tmp_path / "a.gif")]
    said = subprocess.run([sys.executable, "-c", textwrap.dedent("""
        import os, resource, sys
        from PIL import Image, GifImagePlugin
        from minit2v.files.video import load_video
        def used():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        load_video(sys.argv[1])
        for path in sys.argv[2:]:
            if (child := os.fork()) == 0:
                before = used()
                frames = load_video(path)
                print((used() - before) * 1024 / (4 * 64 * 512 * 512), len(frames), flush=True)
                os._exit(0)
            os.waitpid(child, 0)
    """), export_to_gif(solid(8, 8), tmp_path / "b.gif"), *paths], capture_output=True, text=True, check=True).stdout
    grown = [line.split() for line in said.splitlines()]
    assert [n for _, n in grown] == ["64", "64"] and all(0.8 < float(share) < 1.2 for share, _ in grown), said


# ---------------------------------------------------------------------------------------------- ends that are not clean

@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("what", ["video", "gif", "load"])
def test_signals_leave_nothing_behind(what, name, tmp_path, forked):
    source = export_to_video(solid(8, 8), tmp_path / "source.mp4")
    out, temporary = tmp_path / "out", tmp_path / "tmp"
    out.mkdir(), temporary.mkdir()

    def wait(*_):
        print("now", flush=True)
        time.sleep(60)

    def child():
        tempfile.tempdir = str(temporary)
        if what == "video":
            video.np.ascontiguousarray = wait
            export_to_video(solid(64, 64), out / "a.mp4")
        elif what == "gif":
            video.os.replace = wait
            export_to_gif(solid(64, 64), out / "a.gif")
        else:
            video._packets = wait
            load_video(source)

    process, number = forked(child), getattr(signal, name)
    assert process.said.readline() == b"now\n"
    assert what == "load" or len(os.listdir(out)) == 1
    os.kill(process.pid, number)
    assert process.wait()[0] == -number  # it ends by the signal, as without us
    assert os.listdir(out) == [] and os.listdir(temporary) == []


def test_temporary_names_cannot_be_guessed_and_follow_no_link(tmp_path, monkeypatch):
    names = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (names.append(os.path.basename(a)), replace(a, b)))
    for _ in range(2):
        export_to_video(solid(8, 8), tmp_path / "a.mp4")
        export_to_gif(solid(8, 8), tmp_path / "a.gif")
    assert len(set(names)) == 4 and all(re.fullmatch(r"\.a-[0-9a-f]{32}\.(mp4|gif)", name) for name in names)
    (tmp_path / "victim").write_text("kept")
    monkeypatch.setattr("secrets.token_hex", lambda n: "0")
    for name, export in (("a.mp4", export_to_video), ("a.gif", export_to_gif)):
        (tmp_path / f".a-0{name[1:]}").symlink_to(tmp_path / "victim")
        with pytest.raises(FileExistsError, match="cannot write here"):
            export(solid(8, 8), tmp_path / name)
    assert (tmp_path / "victim").read_text() == "kept"

