"""Videos that are never held as a whole: frames written as they are decoded, parts of a video, and its sound."""

import itertools
import re
import subprocess
import weakref

import numpy as np
import PIL.Image
import pytest
import torch

from minit2v import DiffusionPipeline, VideoToVideoSDPipeline, cli
from minit2v.files.video import (
    VideoFrames,
    export_to_gif,
    export_to_video,
    find_ffmpeg,
    has_sound,
    load_video,
    read_metadata,
)
from minit2v.memory.live import Live
from minit2v.pipelines import source

RATE, COUNT = 10, 24


def grey(n):
    """Frame n, which can be told from the others."""
    return np.full((48, 64, 3), 10 * n, np.uint8)


def numbers(frames):
    return [round(np.asarray(f).mean() / 10) for f in frames]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """24 frames at 10 fps, and a tone of 3 seconds that is silent in its first."""
    folder = tmp_path_factory.mktemp("clip")
    export_to_video(map(grey, range(COUNT)), folder / "silent.mp4", fps=RATE, quality=10)
    tone = "sine=frequency=440:duration=3,volume='if(lt(t,1),0,1)':eval=frame"
    subprocess.run([find_ffmpeg(), "-v", "error", "-i", folder / "silent.mp4", "-f", "lavfi", "-i", tone, "-map", "0:v",
                    "-map", "1:a", "-c:v", "copy", "-c:a", "aac", folder / "clip.mp4"], check=True)  # fmt: skip
    return folder / "clip.mp4"


def loudness(path, second):
    """Mean square of a tenth of a second of sound, about."""
    raw = subprocess.run([find_ffmpeg(), "-v", "error", "-i", path, "-map", "0:a", "-f", "s16le", "-ac", "1", "-ar",
                          "8000", "pipe:1"], check=True, capture_output=True).stdout  # fmt: skip
    samples = np.frombuffer(raw, np.int16).astype(np.float64) / 2**15
    return (samples[int(8000 * second) : int(8000 * (second + 0.1))] ** 2).mean(), len(samples) / 8000


@pytest.mark.parametrize("export,suffix", [(export_to_video, ".mp4"), (export_to_gif, ".gif")])
def test_frames_are_written_as_they_come(export, suffix, tmp_path):
    path = export(map(grey, range(COUNT)), tmp_path / f"a{suffix}", fps=RATE)
    assert numbers(load_video(path)) == list(range(COUNT))
    assert load_video(path, return_fps=True)[1] == RATE
    whole = export([grey(n) for n in range(COUNT)], tmp_path / f"b{suffix}", fps=RATE)
    assert (tmp_path / f"a{suffix}").read_bytes() == open(whole, "rb").read()


@pytest.mark.parametrize("export,suffix", [(export_to_video, ".mp4"), (export_to_gif, ".gif")])
def test_a_stream_that_breaks_leaves_nothing(export, suffix, tmp_path):
    def frames(last):
        yield grey(0)
        yield grey(1)
        yield last()

    def fail():
        raise RuntimeError("the VAE")

    with pytest.raises(RuntimeError, match="the VAE"):
        export(frames(fail), tmp_path / f"a{suffix}")
    with pytest.raises(ValueError, match="frames differ in size"):
        export(frames(lambda: np.zeros((8, 8, 3), np.uint8)), tmp_path / f"a{suffix}")
    with pytest.raises(ValueError, match="no frames to write"):
        export(iter(()), tmp_path / f"a{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_a_video(clip, tmp_path):
    assert numbers(load_video(clip, start=0.5, end=1.2)) == [5, 6, 7, 8, 9, 10, 11]
    assert numbers(load_video(clip, start=2.0)) == [20, 21, 22, 23]
    frames, fps = load_video(clip, start=0.3, end=1.5, every=4, return_fps=True)
    assert numbers(frames) == [3, 7, 11] and fps == RATE / 4
    gif = export_to_gif(map(grey, range(COUNT)), tmp_path / "a.gif", fps=RATE)
    assert numbers(load_video(gif, start=0.5, end=1.2)) == [5, 6, 7, 8, 9, 10, 11]
    one_frame = 48 * 64
    assert len(load_video(clip, start=1.0, end=1.2, max_pixels=2 * one_frame)) == 2, "what is left out does not count"
    for wrong, said in ((dict(start=-1), "0 <= start < end"), (dict(start=2, end=1), "0 <= start < end"),
                        (dict(every=0), "every must be"), (dict(start=9), "no frame begins between 9 and inf"),
                        (dict(start=1.0, max_pixels=one_frame), "max_pixels")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            load_video(clip, **wrong)


def test_frames_are_read_anew_and_none_is_kept(clip, tmp_path):
    gif = export_to_gif(map(grey, range(COUNT)), tmp_path / "a.gif", fps=RATE)
    for n in range(3):
        PIL.Image.fromarray(grey(n)).save(tmp_path / f"{n}.png")
    for path, more in ((clip, {}), (clip, dict(start=0.3, end=1.5, every=4)), (gif, dict(start=0.5)), (tmp_path, {})):
        read, (whole, fps) = VideoFrames(path, **more), load_video(path, return_fps=True, **more)
        assert (len(read), read.fps, read.size) == (len(whole), fps, (64, 48))
        for _ in range(2):
            alive, most = [], 0
            for frame, same in zip(read, whole, strict=True):
                assert (np.asarray(frame) == np.asarray(same)).all()
                alive = [ref for ref in (*alive, weakref.ref(frame)) if ref() is not None]
                most = max(most, len(alive))
            assert most <= 3
    with pytest.raises(ValueError, match="no frame begins between 9 and inf"):
        VideoFrames(clip, start=9)
    with pytest.raises(ValueError, match="max_pixels"):
        VideoFrames(clip, max_pixels=48 * 64 - 1)
    assert len(VideoFrames(clip, max_pixels=48 * 64)) == COUNT, "the limit is for a frame"


def test_a_pipeline_encodes_a_file_piece_by_piece(clip):
    pipe = VideoToVideoSDPipeline.from_pretrained("shapes")
    pipe.set_progress_bar_config(disable=True)

    def made(video, **more):
        g = torch.Generator().manual_seed(0)
        return pipe("a red circle", video, 0.5, 2, generator=g, output_type="latent", **more).frames

    for more in ({}, dict(height=32, width=32)):
        assert torch.equal(made(VideoFrames(clip), **more), made(load_video(clip), **more))
    with pytest.raises(ValueError, match="height must be a multiple of"):
        made(VideoFrames(clip), height=33)

    def peak(frames):
        x = source.read(pipe, frames, None, None, None)
        with torch.no_grad(), Live((*pipe.vae.parameters(), *pipe.vae.buffers())) as live:
            source.encode_video(pipe, x, 1, torch.Generator(), torch.float32)
        return live.peak

    peak(VideoFrames(clip))  # forms of weights are made once
    few = peak(VideoFrames(clip, end=0.8))
    assert peak(VideoFrames(clip)) < 1.05 * few
    read = source.read(pipe, VideoFrames(clip), None, None, None)
    assert [x.shape[2] for x in read.pieces(10)] == [10, 10, 4]


def test_sound_goes_with_the_frames(clip, tmp_path):
    assert has_sound(clip) and not has_sound(clip.with_name("silent.mp4")) and not has_sound(tmp_path)
    path = export_to_video(map(grey, range(COUNT)), tmp_path / "a.mp4", fps=RATE, sound=clip)
    quiet, length = loudness(path, 0.5)
    assert quiet < 1e-6 < 1e-3 < loudness(path, 1.5)[0] and length == pytest.approx(COUNT / RATE, abs=0.15)
    path = export_to_video(map(grey, range(COUNT)), tmp_path / "b.mp4", fps=RATE, sound=clip, sound_from=1.0)
    assert loudness(path, 0.2)[0] > 1e-3 > 1e-6 > loudness(path, 2.2)[0], "after two seconds there is silence"
    assert numbers(load_video(path)) == list(range(COUNT)), "no frame is cut off where the sound is shorter"
    path = export_to_video(map(grey, range(3)), tmp_path / "c.mp4", sound=clip.with_name("silent.mp4"))
    assert not has_sound(path) and len(load_video(path)) == 3


def test_a_pipeline_decodes_piece_by_piece():
    pipe = DiffusionPipeline.from_pretrained("shapes")
    latents = torch.randn(1, 4, 7, 4, 4, generator=torch.Generator().manual_seed(0))
    sizes = []
    decode = pipe.decode_latents
    pipe.decode_latents = lambda z, chunk: sizes.append(z.shape[2]) or decode(z, chunk)
    frames = pipe.stream_frames(latents, 3)
    first = next(frames)
    assert sizes == [3] and first.shape == (32, 32, 3), "the rest is decoded when it is asked for"
    rest = list(itertools.chain([first], frames))
    assert sizes == [3, 3, 1] and len(rest) == 7
    whole = (decode(latents, 7)[0] * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 3, 0).numpy()
    np.testing.assert_allclose(np.stack(rest), whole, atol=1e-5)
    with pytest.raises(ValueError, match="latents must be"):
        next(pipe.stream_frames(latents.repeat(2, 1, 1, 1, 1)))


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*args):
        code = cli.main([str(a) for a in args])
        _, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, [line for line in err.splitlines() if line.startswith("minit2v")]

    return call


def test_restyle_takes_a_part_and_its_sound(run, clip):
    few = ["--steps", 2, "--strength", 0.5, "--height", 32, "--width", 32, "--seed", 1]
    code, said = run("restyle", clip, "a red circle", *few, "--from", 0.5, "--to", 1.1, "--every", 2, "-o", "a.mp4")
    assert code == 0, said
    frames, fps = load_video("a.mp4", return_fps=True)
    assert len(frames) == 3 and fps == 5 and has_sound("a.mp4")
    stored = read_metadata("a.mp4")
    assert (stored["from"], stored["to"], stored["every"]) == (0.5, 1.1, 2)
    assert run("generate", "--replay", "a.mp4", "--trust", "-o", "b.mp4")[0] == 0
    assert (np.stack(load_video("b.mp4")) == np.stack(frames)).all()
    code, said = run("restyle", clip, "a red circle", *few, "--to", 0.2, "--fps", 3, "-o", "c.mp4")
    assert code == 0 and not has_sound("c.mp4") and any("sound of the video is left out" in line for line in said)
    code, said = run("animate", "a red circle", "--from", 1, "-o", "d.mp4")
    assert code == 2 and re.search("--from needs an input video", said[-1])
