"""Data for training: the right frames, the same samples whatever the layout, and nothing silently wrong."""

import csv
import io
import json
import os
import random
import signal
import subprocess
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minit2v import DiffusionPipeline
from minit2v.files.video import find_ffmpeg
from minit2v.training import cache as caches
from minit2v.training import clips, data
from minit2v.training.cache import Cache, digest_of
from minit2v.training.clips import Media, covered, decode, examine, nearest_frames, sha256
from minit2v.training.data import Data, Source, buckets, turn
from minit2v.training.objective import drop_text
from minit2v.training.sheet import look

WIDE, HIGH = 64, 32  # of a counter


def counter(count, width=WIDE, height=HIGH):
    """Frames that say their numbers in 8 fields, black or white, uint8 (f h w c)."""
    bits = (np.arange(count)[:, None] >> np.arange(8)) & 1
    fields = bits.reshape(count, 2, 4) * 255
    frames = fields.repeat(height // 2, 1).repeat(width // 4, 2)
    return np.repeat(frames[..., None], 3, -1).astype(np.uint8)


def numbers(video):
    """Of frames (f 3 h w), uint8."""
    f, _, h, w = video.shape
    fields = video.float().mean(1).reshape(f, 2, h // 2, 4, w // 4).mean((2, 4)).reshape(f, 8) > 127
    return (fields * 2 ** torch.arange(8)).sum(1).tolist()


def write(path, frames, *options, rate=30):
    """A video of frames (f h w c)."""
    f, h, w, _ = frames.shape
    command = [find_ffmpeg(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{w}x{h}",
               "-r", str(rate), "-i", "pipe:0", *(options or ("-crf", "12")), "-pix_fmt", "yuv420p", str(path)]
    subprocess.run(command, input=frames.tobytes(), check=True)
    return path


def media(path):
    return Media(Path(path), str(path))


B_FRAMES = ("-c:v", "libx264", "-g", "250", "-bf", "3", "-crf", "15")
UNEVEN = "settb=1/90000,setpts=(N+floor(N/5)*2+mod(N\\,3)*0.4)/30/TB"
FILES = {
    "24.mp4": (24, B_FRAMES),
    "30.mov": (30, B_FRAMES),
    "60.mkv": (60, B_FRAMES),
    "29.97.mp4": ("30000/1001", B_FRAMES),
    "uneven.mkv": (30, ("-vf", UNEVEN, "-fps_mode", "passthrough", "-enc_time_base", "1/1000", *B_FRAMES)),
    "uneven.mp4": (30, ("-vf", UNEVEN, "-fps_mode", "passthrough", "-enc_time_base", "1/90000", *B_FRAMES)),
    "open.mp4": (30, ("-c:v", "libx264", "-g", "12", "-bf", "3", "-x264-params", "open-gop=1")),
    "late.ts": (30, ("-c:v", "libx264", "-g", "50", "-bf", "2", "-output_ts_offset", "5")),
    "old.mpg": (25, ("-c:v", "mpeg2video", "-g", "15", "-bf", "2", "-b:v", "2M")),
    "phone.mp4": (30, ("-c:v", "libx265", "-x265-params", "log-level=error:open-gop=1:keyint=30")),
    "old.avi": (25, ("-c:v", "mpeg4", "-q:v", "2", "-g", "40", "-bf", "2")),
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Videos of 200 counted frames."""
    folder = tmp_path_factory.mktemp("counted")
    return {name: write(folder / name, counter(200), *options, rate=rate) for name, (rate, options) in FILES.items()}


@pytest.fixture(scope="module")
def shapes():
    return DiffusionPipeline.from_pretrained("shapes")


def make(shapes, sources, **options):
    return Data.of(shapes, [sources] if isinstance(sources, str | Path | dict) else sources, **options)


# ------------------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("name", FILES)
def test_the_frames_that_were_asked_for_come_out(name, counted):
    facts = examine(media(counted[name]))
    assert (facts.frames, facts.width, facts.height) == (200, WIDE, HIGH)
    rng = random.Random(name)
    some = sorted(rng.sample(range(200), 8))
    for chosen in (range(16), range(57, 200), some, range(180, 200, 3), [199], [150, 7, 7, 150]):
        assert numbers(decode(media(counted[name]), facts, list(chosen), (HIGH, WIDE), decoder="ffmpeg")) == [*chosen]


@pytest.mark.parametrize("name", FILES)
def test_pyav_gives_the_frames_of_ffmpeg(name, counted):
    pytest.importorskip("av", reason="an extra that only saves time")
    facts = examine(media(counted[name]))
    for chosen in ([0, 1, 2], [60, 61, 170], [199]):
        ours = clips._by_pyav(counted[name], facts, chosen, lambda image: torch.from_numpy(np.array(image)))
        assert ours or name == "phone.mp4"  # where it does not come out whole, ffmpeg has to do it
        theirs = decode(media(counted[name]), facts, chosen, (HIGH, WIDE), decoder="ffmpeg")
        assert torch.equal(decode(media(counted[name]), facts, chosen, (HIGH, WIDE)), theirs)


@pytest.mark.parametrize("name", FILES)
def test_frames_are_chosen_by_time(name, counted):
    """Against the times of the frames as they were written, not as they are read."""
    rate, facts = FILES[name][0], examine(media(counted[name]))
    n, rate = np.arange(200), 30000 / 1001 if rate == "30000/1001" else rate
    true = (n + n // 5 * 2 + n % 3 * 0.4) / 30 if "uneven" in name else n / rate
    for fps in (8, 12.5, 24):
        for start in (0, 5, 61):
            chosen = nearest_frames(facts, start, 16, fps)
            gap = np.abs(true[:, None] - true[start] - np.arange(16) / fps)
            assert np.all(gap[chosen, range(16)] <= gap.min(0) + 1.1e-3)  # times in Matroska are whole milliseconds
            assert numbers(decode(media(counted[name]), facts, chosen, (HIGH, WIDE))) == chosen
    assert nearest_frames(facts, 0, 500, 24)[-1] == 200  # which stands for none


@pytest.mark.parametrize(("fps", "frames"), [(8, 16), (30, 16), (24, 40), (7.3, 11), (30, 200), (15, 100), (29.5, 3)])
def test_the_last_start_is_the_last_one_from_which_all_frames_exist(fps, frames, counted):
    for name in ("30.mov", "uneven.mp4", "uneven.mkv"):
        facts, source = examine(media(counted[name])), Source("x", frames=frames, fps=fps)
        fits = [s for s in range(200) if max(nearest_frames(facts, s, frames, fps)) < 200]
        assert data.last_start(facts, source) == (fits[-1] if fits else -1)
        assert fits == list(range(len(fits)))


def test_clips_begin_where_they_are_told_to(counted, shapes):
    path = {"path": counted["30.mov"], "prompt": "a counter", "frames": 16, "stride": 2, "height": 32, "width": 64}

    def begins(**options):
        found = make(shapes, path | options)
        return [found.batch(step, 1)[0].frames for step in range(len(found))]

    def in_order(**options):
        return sorted(begins(**options))

    assert begins(clips="head") == [tuple(range(0, 32, 2))]
    assert [f[0] for f in in_order(clips="chunk")] == [0, 32, 64, 96, 128, 160]
    assert [f[0] for f in in_order(clips="chunk", stride=None, fps=15)] == [0, 32, 64, 96, 128, 160]
    assert [f[0] for f in in_order(clips="uniform", places=3)] == [0, 84, 169]  # of 0 to 169
    (whole,) = begins(clips="all", stride=None)
    assert (whole[0], whole[-1], len(whole)) == (0, 199, 16)
    assert {b - a for a, b in zip(whole, whole[1:], strict=False)} == {13, 14}
    found = make(shapes, path | {"clips": "random"})
    first = [found.batch(step, 1)[0].frames[0] for step in range(2000)]
    assert (min(first), max(first)) == (0, 169)
    assert all(found.batch(s, 1)[0].frames == tuple(range(f, f + 32, 2)) for s, f in list(enumerate(first))[:50])


def test_files_that_are_too_short_are_skipped_or_completed_as_told(tmp_path, shapes):
    path = write(tmp_path / "short.mp4", counter(10))
    (tmp_path / "short.txt").write_text("a counter")
    usual = {"path": path, "height": 32, "width": 64}
    with pytest.raises(ValueError, match=r"nothing is left.*too short: 10 frames in 0.33 s, and a clip has 16"):
        make(shapes, usual)
    with pytest.raises(ValueError, match=r"too short: 10 frames in 0.33 s, and a clip has 16 at 15 fps"):
        make(shapes, usual, fps=15)
    with pytest.raises(ValueError, match=r"has 30 frames per second, fewer than fps = 60"):
        make(shapes, usual, frames=4, fps=60)

    def frames(**options):
        found = make(shapes, usual | options)
        item = found.batch(0, 1)[0]
        assert found.load([item]).latents.shape == (1, 4, 16, 4, 8)
        assert numbers(decode(media(path), found.clips[0].facts, item.frames, (32, 64))) == list(item.frames)
        return item.frames

    assert frames(short="loop") == (*range(10), *range(6))
    assert frames(short="hold") == (*range(10), *[9] * 6)
    assert frames(short="stretch") == (0, 1, 1, 2, 2, 3, 4, 4, 5, 5, 6, 7, 7, 8, 8, 9)
    assert frames(short="hold", fps=15) == (0, 2, 4, 6, 8, *[9] * 11)


def test_one_frame_of_a_video_and_pictures_are_stills(tmp_path, shapes):
    write(tmp_path / "a.mp4", counter(20))
    (tmp_path / "a.txt").write_text("a counter")
    Image.fromarray(counter(6)[5]).save(tmp_path / "b.png")
    (tmp_path / "b.caption").write_text("a still")
    stills = make(shapes, tmp_path, frames=1, height=32, width=64)
    assert {c.bucket for c in stills.clips} == {(1, 32, 64)}
    batch = stills.load(stills.batch(0, 2))
    assert batch.latents.shape == (2, 4, 1, 4, 8)
    assert sorted(batch.captions) == ["a counter", "a still"]
    seen = {i.frames for s in range(200) for i in stills.batch(s, 2) if stills.clips[i.clip].media.suffix == ".mp4"}
    assert seen == {(n,) for n in range(20)}
    mixed = make(shapes, tmp_path, frames=16, height=32, width=64)
    assert {c.bucket.frames for c in mixed.clips} == {1, 16}
    assert all(len({len(i.frames) for i in mixed.batch(s, 3)}) == 1 for s in range(20))  # one bucket in a batch


# ------------------------------------------------------------------------------------------------------- sizes


def test_buckets_have_nearly_one_area_and_the_steps_of_the_model():
    sizes = buckets(256, 256, 64)
    assert (256, 256) in sizes and (192, 320) in sizes and (320, 192) in sizes
    assert all(h % 64 == 0 and w % 64 == 0 and abs(h * w / 256**2 - 1) <= 0.15 for h, w in sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)
    assert (320, 576) in buckets(320, 576, 64)
    with pytest.raises(ValueError, match=r"height must be a multiple of 64 pixels .*, not 250 \(nearest: 256\)"):
        buckets(250, 256, 64)


@pytest.mark.parametrize("size", [(64, 64), (123, 77), (77, 123), (641, 361), (30, 90), (16, 16), (200, 64)])
def test_pictures_are_scaled_alike_in_both_directions_and_cut_in_the_middle(size, tmp_path):
    w, h = size
    y, x = np.mgrid[:h, :w] + 0.5
    picture = np.stack([x * 255 / w, y * 255 / h, np.full_like(x, 99)], -1)  # a ramp: every place can be read off
    Image.fromarray(picture.round().astype(np.uint8)).save(tmp_path / "a.png")
    facts = examine(media(tmp_path / "a.png"))
    assert (facts.width, facts.height, facts.still) == (w, h, True)
    video = decode(media(tmp_path / "a.png"), facts, [0], (48, 80))[0].double()
    across, along = video[0].mean(0) * w / 255, video[1].mean(1) * h / 255  # places in the picture
    scale_x = float(across[-5] - across[4]) / (80 - 9)
    scale_y = float(along[-5] - along[4]) / (48 - 9)
    assert scale_x == pytest.approx(scale_y, rel=0.03)
    assert scale_x == pytest.approx(min(w / 80, h / 48), rel=0.03)  # it covers: nothing is added
    assert float(across[4:-4].mean()) == pytest.approx(w / 2, abs=0.02 * w)
    assert float(along[4:-4].mean()) == pytest.approx(h / 2, abs=0.02 * h)
    left, top, right, bottom = covered(w, h, (48, 80))
    assert (right - left) / (bottom - top) == pytest.approx(80 / 48)


def test_sizes_are_as_shown_not_as_stored(tmp_path):
    """Phones note how they were held, and old cameras that pixels are not square."""
    plain = write(tmp_path / "a.mp4", counter(4, 64, 32))
    command = [find_ffmpeg(), "-v", "error", "-display_rotation", "90", "-i", str(plain), "-c", "copy"]
    subprocess.run([*command, str(tmp_path / "turned.mp4")], check=True)
    write(tmp_path / "wide.mp4", counter(4, 64, 32), "-vf", "setsar=2")
    turned, wide = examine(media(tmp_path / "turned.mp4")), examine(media(tmp_path / "wide.mp4"))
    assert (turned.width, turned.height) == (32, 64)
    assert (wide.shown_width, wide.height) == (128, 32)
    video = decode(media(tmp_path / "turned.mp4"), turned, [2], (64, 32))
    assert numbers(torch.rot90(video, -1, (2, 3))) == [2] or numbers(torch.rot90(video, 1, (2, 3))) == [2]
    assert numbers(decode(media(tmp_path / "wide.mp4"), wide, [0, 3], (32, 128))) == [0, 3]
    half = decode(media(tmp_path / "wide.mp4"), wide, [3], (32, 32))  # of 4 columns the middle 1
    assert half[0, 0, 4:12].float().mean(0).tolist() == pytest.approx([255] * 0 + half[0, 0, 4].tolist(), abs=20)


def test_portrait_and_landscape_get_buckets_of_their_own(tmp_path, shapes):
    for name, w, h in (("a b", 64, 64), ("wide ä", 128, 72), ("высоко", 72, 128), ("odd 漢字", 91, 53)):
        write(tmp_path / f"{name}.mkv", counter(16, w // 4 * 4, h // 2 * 2))
        (tmp_path / f"{name}.txt").write_text(f"{name}\n", encoding="utf-8")
    found = make(shapes, tmp_path)
    assert {c.captions[0]: c.bucket[1:] for c in found.clips} == {
        "a b": (64, 64), "wide ä": (48, 80), "высоко": (80, 48), "odd 漢字": (48, 80)}
    for step in range(4):
        items = found.batch(step, 2)
        assert len({found.clips[i.clip].bucket for i in items}) == 1
        h, w = found.clips[items[0].clip].bucket[1:]
        assert found.load(items).latents.shape == (2, 4, 16, h // 8, w // 8)


def test_clips_are_mirrored_only_when_asked(tmp_path, shapes):
    write(tmp_path / "a.mp4", counter(200, 64, 64))
    (tmp_path / "a.txt").write_text("a counter")
    plain = make(shapes, tmp_path, cache=tmp_path / "c", clips="head", posterior="mean")
    assert not any(i.flip for s in range(50) for i in plain.batch(s, 4))
    mirrored = make(shapes, tmp_path, cache=tmp_path / "c", clips="head", posterior="mean", flip=True)
    items = [i for s in range(50) for i in mirrored.batch(s, 4)]
    assert 60 < sum(i.flip for i in items) < 140
    one, other = (next(i for i in items if i.flip == flip) for flip in (False, True))
    first = mirrored.load([one, other]).latents
    assert torch.equal(first[0], plain.load(plain.batch(0, 1)).latents[0])
    assert not torch.equal(first[0], first[1])
    a, b = (decode(plain.clips[0].media, plain.clips[0].facts, [7], (64, 64), flip) for flip in (False, True))
    assert torch.equal(a.flip(3), b)


# ------------------------------------------------------------------------------------------------------- layouts

CAPTIONS = ["a counter, first", "the second: a 'counter'", "ein dritter Zähler"]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three different videos, and no captions."""
    folder = tmp_path_factory.mktemp("three")
    return [write(folder / f"clip {n}.mp4", counter(20 + n)) for n in range(3)]


def lay_out(kind, folder, three):
    """The three videos in `folder` with their captions; what is to be named as the data."""
    names = [f"v{n}.mp4" for n in range(3)]
    if kind == "tar":
        with tarfile.open(folder / "shard-000.tar", "w") as tar:
            for n, (path, caption) in enumerate(zip(three, CAPTIONS, strict=True)):
                tar.add(path, f"data/key{n}.mp4")
                ending, text = (".json", json.dumps({"caption": caption})) if n == 1 else (".txt", caption)
                info = tarfile.TarInfo(f"data/key{n}{ending}")
                info.size = len(text.encode())
                tar.addfile(info, io.BytesIO(text.encode()))
        return folder / "shard-000.tar"
    if kind == "webvid":
        names = [f"100{n}.mp4" for n in range(3)]
    for name, path in zip(names, three, strict=True):
        target = folder / ("videos" if kind in ("webvid", "csv elsewhere") else "") / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    pairs = list(zip(names, CAPTIONS, strict=True))

    def table(path, header, rows):
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
        return path

    if kind in ("folder", "sub-folders", "single"):
        for n, (name, caption) in enumerate(pairs):
            place = folder / ("part" if kind == "sub-folders" and n == 2 else "")
            place.mkdir(exist_ok=True)
            (folder / name).rename(place / name)
            (place / name).with_suffix(".caption" if n == 1 else ".txt").write_text(caption + "\n", encoding="utf-8")
        return folder
    if kind == "lines":
        (folder / "videos.txt").write_text("\n".join(names) + "\n")
        (folder / "prompt.txt").write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")
    elif kind == "jsonl":
        rows = [{"file_name": a, "text": b, "fps": 30} for a, b in pairs]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        table(folder / "metadata.csv", ["video_path", "caption"], pairs)
    elif kind == "csv elsewhere":
        return {"path": table(folder / "some list.csv", ["file_name", "caption"], pairs), "folder": folder / "videos"}
    elif kind == "json rows":
        (folder / "metadata.json").write_text(json.dumps([{"video_path": a, "caption": b} for a, b in pairs]))
    elif kind == "json names":
        (folder / "metadata.json").write_text(json.dumps({a: {"caption": b} for a, b in pairs}))
    elif kind == "webvid":
        rows = [(name[:-4], f"https://example.org/{name}", "PT1S", "pages", text) for name, text in pairs]
        header = ["videoid", "contentUrl", "duration", "page_dir", "name"]
        return {"path": table(folder / "results_2M_val.csv", header, rows), "folder": folder / "videos"}
    elif kind == "blip":
        rows = [{"video_path": a, "num_frames": 20, "data": [{"frame_index": 0, "prompt": b}]} for a, b in pairs]
        (folder / "my clips.json").write_text(json.dumps({"name": "x", "data": rows}))
        return folder / "my clips.json"
    elif kind == "vgen":
        (folder / "list.txt").write_text("".join(f"{a}|||{b}\n" for a, b in pairs), encoding="utf-8")
        return folder / "list.txt"
    elif kind == "toml":
        sets = (f"[[set]]\npath = {json.dumps(a)}\nprompt = {json.dumps(b)}\n" for a, b in pairs)
        (folder / "sets.toml").write_text("frames = 16\n" + "".join(sets), encoding="utf-8")
        return folder / "sets.toml"
    return folder


KINDS = ["folder", "sub-folders", "lines", "jsonl", "csv", "csv elsewhere", "json rows", "json names", "webvid", "blip",
         "vgen", "tar", "toml"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_is_read_into_the_same_samples(kind, tmp_path, three, shapes):
    found = make(shapes, lay_out(kind, tmp_path, three), height=32, width=64, clips="head")
    found.clips.sort(key=lambda c: c.facts.frames)  # files of folders inside come first
    assert [(c.captions, c.facts.frames, c.bucket, c.start) for c in found.clips] == [
        ((caption,), 20 + n, (16, 32, 64), 0) for n, caption in enumerate(CAPTIONS)]
    assert not found.skipped
    assert [c.facts.sha256 for c in found.clips] == [sha256(media(path)) for path in three]
    # Cache files are named by the content, not by the place.
    assert found._name(found.batch(0, 1)[0]) in {
        caches.digest(sha256(media(p)), found.vae_name, (32, 64), tuple(range(16)), False, "float32") for p in three}
    if kind in ("folder", "tar"):
        clip = found.clips[1]
        assert numbers(decode(clip.media, clip.facts, range(16), (32, 64))) == list(range(16))


def test_runs_and_hidden_folders_inside_are_no_data(three, shapes, tmp_path, caplog):
    for place in (".", "run/samples", ".hidden", "more"):
        (tmp_path / place).mkdir(exist_ok=True, parents=True)
        (tmp_path / place / "a.mp4").write_bytes(three[0].read_bytes())
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "more" / "back").symlink_to(tmp_path)
    found = make(shapes, tmp_path, prompt="a counter", height=32, width=64)
    assert [Path(c.media.name).relative_to(tmp_path).as_posix() for c in found.clips] == ["a.mp4", "more/a.mp4"]
    assert "run is left out: it is the folder of a training run" in caplog.text


def test_one_file_and_one_prompt(three, shapes):
    found = make(shapes, three[1], prompt="a counter", height=32, width=64)
    assert [(c.captions, c.facts.frames) for c in found.clips] == [(("a counter",), 21)]


def test_captions_for_places_in_a_video(counted, shapes, tmp_path):
    places = [{"frame_index": 0, "prompt": "begin"}, {"frame_index": 150, "prompt": "later"},
              {"frame_index": 190, "prompt": "too late"}, {"frame_index": 195, "prompt": "later still"}]
    (tmp_path / "x.json").write_text(json.dumps({"data": [{"video_path": str(counted["30.mov"]), "data": places}]}))
    found = make(shapes, tmp_path / "x.json", height=32, width=64)
    assert [(c.captions[0], c.start) for c in found.clips] == [("begin", 0), ("later", 150)]
    assert found.skipped == [(str(counted["30.mov"]),
                              "too short: 10 frames in 0.33 s from frame 190 on, and a clip has 16")]


def test_several_captions_of_a_file_take_turns(three, shapes, tmp_path):
    row = {"path": str(three[0]), "caption": ["one", "two", "three"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    found = make(shapes, tmp_path / "a.jsonl", height=32, width=64, prefix="style of x, ")
    seen = Counter(found.batch(s, 1)[0].caption for s in range(600))
    assert set(seen) == {f"style of x, {w}" for w in row["caption"]}
    assert min(seen.values()) > 150


def test_pictures_in_a_folder_are_a_video(shapes, tmp_path):
    (tmp_path / "frames").mkdir()
    for n, frame in enumerate(counter(24)):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{n}.png")
    (tmp_path / "list.jsonl").write_text('{"video_path": "frames", "caption": "a counter"}')
    found = make(shapes, tmp_path / "list.jsonl", height=32, width=64, clips="head", fps=8)
    item = found.batch(0, 1)[0]
    assert item.frames == tuple(range(16))  # they have no times: each is one frame
    assert numbers(decode(found.clips[0].media, found.clips[0].facts, item.frames, (32, 64))) == list(range(16))


def test_other_trainers_toml(three, shapes, tmp_path):
    for n, path in enumerate(three):
        (tmp_path / f"d{n}").mkdir()
        (tmp_path / f"d{n}" / "a.mp4").write_bytes(path.read_bytes())
        (tmp_path / f"d{n}" / "a.txt").write_text(CAPTIONS[n], encoding="utf-8")
    (tmp_path / "musubi.toml").write_text("""
        [general]
        resolution = [64, 32]
        caption_extension = ".txt"
        enable_bucket = true
        [[datasets]]
        video_directory = "d0"
        target_frames = [16]
        frame_extraction = "head"
        num_repeats = 2
        [[datasets]]
        video_directory = "d1"
    """)
    found = make(shapes, tmp_path / "musubi.toml")
    assert [(s.clips, s.repeats, s.height, s.width) for s in found.sources] == [
        ("head", 2, 32, 64), ("random", 1, 32, 64)]
    seen = Counter(i.clip for s in range(30) for i in found.batch(s, 1))
    assert seen == {0: 20, 1: 10}
    (tmp_path / "kohya.toml").write_text("""
        [[datasets]]
        resolution = 64
        [[datasets.subsets]]
        image_dir = "d1"
        [[datasets.subsets]]
        image_dir = "d2"
        num_repeats = 3
    """)
    assert [(s.path, s.repeats) for s in make(shapes, tmp_path / "kohya.toml").sources] == [
        (tmp_path / "d1", 1), (tmp_path / "d2", 3)]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), [
    ("[[set]]\npath = 'a'\nweigth = 2", r"'weigth' is not a setting of a set of files \(nearest: 'weight'\)"),
    ("[[set]]\nprompt = 'a'", "a set has no path"),
    ("x = 1", "has no sets"),
    ("[[set]", "is not TOML"),
    ("[[set]]\npath = 'a'\nfps = 8\nstride = 2", "give fps or stride, not both"),
    ("[[set]]\npath = 'a'\nclips = 'haed'", r"clips must be random, .* \(nearest: 'head'\)"),
    ("[[set]]\npath = 'a'\nrepeats = 0", "repeats must be a whole number of at least 1, not 0"),
    ("[[set]]\npath = 'a'\nclips = 'all'\nfps = 8", "leaves no room for fps"),
    ("[[datasets]]\nvideo_directory = 'a'\nframe_extraction = 'slide'", "clips must be"),
    ("[[set]]\npath = 'a'\nflip = 'no'", "flip must be true or false, not 'no'"),
    ("[[set]]\npath = 'a'\nheight = 60", r"height must be a multiple of 16 pixels .*, not 60 \(nearest: 64\)"),
    ("[[set]]\npath = 'nowhere'", "nowhere: no such file or folder"),
])  # fmt: skip
def test_wrong_settings_are_named(text, said, tmp_path, shapes):
    (tmp_path / "a").mkdir()
    (tmp_path / "sets.toml").write_text(text)
    with pytest.raises(ValueError, match=said):
        make(shapes, tmp_path / "sets.toml")


@pytest.mark.parametrize(("files", "said"), [
    ({"metadata.jsonl": "{}"}, r"metadata.jsonl: row 1 names no file"),
    ({"metadata.jsonl": "{"}, r"metadata.jsonl: is broken"),
    ({"metadata.jsonl": "", "metadata.csv": ""}, "has metadata.jsonl and metadata.csv"),
    ({"videos.txt": "a.mp4\nb.mp4", "prompt.txt": "x"}, r"videos.txt: has 2 lines, and prompt.txt 1"),
    ({"metadata.json": '{"data": [{"video_path": 3}]}'}, "entry 1 has no video_path"),
    ({"x.doc": ""}, "no videos and no pictures"),
])  # fmt: skip
def test_broken_lists_are_one_line(files, said, tmp_path, shapes):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        make(shapes, tmp_path)


# ------------------------------------------------------------------------------------------------------- damage

DAMAGED = int(os.environ.get("MINIT2V_DAMAGED_FILES", "60"))


def damage(n, folder, whole, sound):
    """One file that cannot be trained on; of nine kinds."""
    rng, kind = random.Random(n), n % 9
    path = folder / f"bad {n}.{'mkv' if n % 2 else 'mp4'}"
    if kind in (0, 1):  # cut off, also in its last bytes
        path.write_bytes(whole[: len(whole) - 1 - n if kind else rng.randrange(1, len(whole) - 50)])
    elif kind == 2:
        path.write_bytes(b"")
    elif kind == 3:
        path.write_bytes((b"<html>not found</html>", b"GIF89a", b"\x89PNG\r\n\x1a\n", rng.randbytes(3000))[n // 9 % 4])
    elif kind == 4:
        path = path.with_suffix((".png", ".jpg", ".webp", ".gif")[n // 9 % 4])
        path.write_bytes(whole)
    elif kind == 5:
        path.write_bytes(sound)  # no frames
    elif kind == 6:
        path.write_bytes(whole[:200] + bytes(len(whole) - 200))
    elif kind == 7:
        path.symlink_to(folder / "nowhere") if n // 9 % 2 else os.mkfifo(path)
    else:
        path = path.with_suffix(".jpg")
        Image.fromarray(counter(1)[0]).save(path)
        path.write_bytes(path.read_bytes()[:-60])
    path.with_suffix(".txt").write_text("damaged")
    return path


def test_damaged_files_are_named_once_and_never_trained_on(tmp_path, shapes, caplog):
    folder = tmp_path / "clips"
    folder.mkdir()
    whole = write(tmp_path / "a.mp4", counter(20), "-movflags", "+faststart").read_bytes()
    command = [find_ffmpeg(), "-v", "error", "-f", "lavfi", "-i", "sine=d=1", str(tmp_path / "sound.mp4")]
    subprocess.run(command, check=True)
    bad = [damage(n, folder, whole, (tmp_path / "sound.mp4").read_bytes()) for n in range(DAMAGED)]
    write(folder / "one frame.mp4", counter(1))
    (folder / "one frame.txt").write_text("too short")
    write(folder / "no caption.mp4", counter(20))
    write(folder / "not text.mp4", counter(20))
    (folder / "not text.txt").write_bytes(b"\xff\xfe\xfd")
    bad += [folder / f"{name}.mp4" for name in ("one frame", "no caption", "not text")]
    for n in range(2):
        (folder / f"good {n}.mp4").write_bytes(whole)
        (folder / f"good {n}.txt").write_text(f"good {n}")
    with caplog.at_level("WARNING"):
        found = make(shapes, folder, height=32, width=64, cache=tmp_path / "cache", workers=2)
    named = [r.getMessage() for r in caplog.records if r.name == "minit2v.training.data"]
    assert sorted(name for name, _ in found.skipped) == sorted(map(str, bad))
    assert len(named) == len(bad) == len(set(named)) and all("\n" not in line for line in named)
    assert [c.captions for c in found.clips] == [("good 0",), ("good 1",)]
    for step in range(6):
        assert {Path(s).stem for s in found.load(found.batch(step, 2)).sources} <= {"good 0", "good 1"}
    summary = found.summary()
    assert f"{len(bad) + 2} files, 2 clips of 2 of them; {len(bad)} files are skipped" in summary
    assert all(str(path) in summary for path in bad)


def test_a_damaged_archive_gives_what_is_whole(three, shapes, tmp_path):
    whole = lay_out("tar", tmp_path, three).read_bytes()
    with tarfile.open(tmp_path / "shard-000.tar") as tar:
        last = tar.getmember("data/key2.mp4")
    (tmp_path / "shard-000.tar").write_bytes(whole[: last.offset_data + 100])
    found = make(shapes, tmp_path, height=32, width=64)
    assert [c.captions[0] for c in found.clips] == CAPTIONS[:2]
    assert found.skipped and all("shard-000.tar" in name for name, _ in found.skipped)


def test_a_file_that_changes_while_training_is_named(tmp_path, shapes):
    path = write(tmp_path / "a.mp4", counter(20))
    (tmp_path / "a.txt").write_text("a counter")
    found = make(shapes, tmp_path, height=32, width=64)
    write(path, counter(10))
    with pytest.raises(ValueError, match=r"a\.mp4"):
        found.load([found.batch(0, 1)[0]._replace(frames=tuple(range(4, 20)))])


# ------------------------------------------------------------------------------------------------------- order


@pytest.fixture(scope="module")
def seven(tmp_path_factory, shapes):
    """Two sets, of five and of two clips, with latents in a cache."""
    folder = tmp_path_factory.mktemp("seven")
    for n in range(7):
        place = folder / ("large" if n < 5 else "small")
        place.mkdir(exist_ok=True)
        write(place / f"{n}.mp4", counter(18 + n))
        (place / f"{n}.txt").write_text(f"clip {n}")
    usual = {"height": 32, "width": 64, "cache": folder / "cache"}

    def found(large=None, small=None, **options):
        return make(shapes, [{"path": folder / "large", **(large or {})}, {"path": folder / "small", **(small or {})}],
                    **usual | options)

    return found


def test_a_batch_is_a_function_of_the_seed_and_the_step(seven):
    first, again = seven(text_dropout=0.3), seven(text_dropout=0.3)
    steps = [first.batch(step, 3) for step in range(30)]
    assert [again.batch(step, 3) for step in (29, 3, 17, 0)] == [steps[n] for n in (29, 3, 17, 0)]
    assert [i.number for items in steps for i in items] == list(range(90))
    assert first.fingerprint == again.fingerprint
    other = seven(seed=1, text_dropout=0.3)
    assert other.fingerprint != first.fingerprint
    assert [[i.clip for i in other.batch(s, 3)] for s in range(30)] != [[i.clip for i in items] for items in steps]
    assert first.batch(10**9, 3) == again.batch(10**9, 3)  # far away: nothing is counted up to there


def test_all_clips_are_used_equally_often_at_any_time(seven):
    found = seven()
    assert "with 2 in a batch, a clip is used once in 4 steps on the average" in found.summary(2)
    clips = [i.clip for s in range(280) for i in found.batch(s, 2)]
    for end in range(40, len(clips)):
        counts = Counter(clips[:end])
        assert set(counts) == set(range(7)) and max(counts.values()) - min(counts.values()) <= 2
    assert len({tuple(n for n in clips[k : k + 14] if n < 5) for k in range(0, 560, 14)}) > 30  # in another order
    repeated = seven(small={"repeats": 3})
    counts = Counter(i.clip for s in range(11) for i in repeated.batch(s, 1))
    assert counts == {**dict.fromkeys(range(5), 1), 5: 3, 6: 3}


def test_weights_are_shares_of_every_batch(seven):
    found = seven(large={"weight": 1}, small={"weight": 1})
    for step in range(40):  # two of each set
        assert sorted(found.clips[i.clip].source for i in found.batch(step, 4)) == [0, 0, 1, 1]
    found = seven(large={"weight": 0.9}, small={"weight": 0.1})
    counts = Counter(found.clips[i.clip].source for s in range(500) for i in found.batch(s, 4))
    assert counts[1] / 2000 == pytest.approx(0.1, abs=0.02)
    with pytest.raises(ValueError, match="give a weight to every set, or to none"):
        seven(small={"weight": 2})


def test_one_in_ten_captions_is_empty(seven):
    found = seven(text_dropout=0.1)
    dropped = [n for n in range(10_000) if drop_text(0, n, 0.1)]
    assert len(dropped) / 10_000 == pytest.approx(0.1, abs=0.01)
    items = [i for s in range(250) for i in found.batch(s, 4)]
    assert [i.number for i in items if not i.caption] == [n for n in dropped if n < 1000]
    batch = found.load([items[dropped[0]], items[dropped[0] + 1]])
    assert batch.captions[0] == "" and torch.equal(batch.text[0], found.text(""))
    assert not any(not i.caption for s in range(100) for i in seven().batch(s, 8))


def test_samples_are_the_same_for_any_number_of_workers_and_ranks(seven, tmp_path):
    step, whole = 3, seven(cache=None)
    want = whole.load(whole.batch(step, 4))
    for count in (1, 2, 4):
        found = seven(cache=tmp_path / str(count), workers=count)
        items = found.batch(step, 4)
        found.prefetch(items[:3])
        shares = [found.load(items[rank::count]) for rank in range(count)]
        for row in range(4):
            share, k = shares[row % count], row // count
            assert share.numbers[k] == want.numbers[row] == step * 4 + row
            assert share.captions[k] == want.captions[row] and share.sources[k] == want.sources[row]
            assert torch.equal(share.latents[k], want.latents[row]) and torch.equal(share.text[k], want.text[row])


@pytest.mark.parametrize("shares", [{0: 1}, {0: 1, 1: 1}, {0: 5, 1: 2, 2: 1}, {n: 1 + n * n for n in range(9)}])
def test_turns_are_in_proportion_and_need_no_counting(shares):
    whole, had = sum(shares.values()), Counter()
    for number in range(2 * whole):
        who, before = turn(shares, number)
        assert had[who] == before  # as if it were counted
        had[who] += 1
        assert all(abs(had[n] - share * (number + 1) / whole) < 2 for n, share in shares.items())
    assert had == {n: 2 * share for n, share in shares.items()}


def test_small_buckets_are_not_used_more_often_than_large_ones(tmp_path, shapes):
    for n in range(6):
        write(tmp_path / f"{n}.mp4", counter(16, *((64, 128) if n == 5 else (64, 64))))
    found = make(shapes, tmp_path, prompt="a counter")
    counts = Counter(i.clip for s in range(60) for i in found.batch(s, 4))
    assert counts == dict.fromkeys(range(6), 40)
    assert "clips 1; at most 0% of a picture is cut off; fewer than a batch" in found.summary(4)


# ------------------------------------------------------------------------------------------------------- cache


def files_of(folder):
    return {p: p.stat().st_mtime_ns for p in Path(folder).rglob("*.*") if p.is_file() and not p.name.startswith(".")}


def test_what_is_in_the_cache_is_not_made_again(seven, shapes, tmp_path, monkeypatch):
    found = seven(large={"clips": "head"}, small={"clips": "head"}, cache=tmp_path)
    assert found.fill() == 0
    before, want = files_of(tmp_path), [found.load(found.batch(s, 4)) for s in range(3)]
    assert len([p for p in before if "latents" in p.parts]) == 7
    assert len([p for p in before if "text" in p.parts]) == 8  # with the empty caption

    def never(*_, **__):
        raise AssertionError("made again")

    again = seven(large={"clips": "head"}, small={"clips": "head"}, cache=tmp_path)
    monkeypatch.setattr(again, "encode_text", never)
    monkeypatch.setattr(data, "decode", never)
    monkeypatch.setattr(caches, "examine", never)
    for s, one in enumerate(want):
        batch = again.load(again.batch(s, 4))
        assert torch.equal(batch.latents, one.latents) and torch.equal(batch.text, one.text)
    assert files_of(tmp_path) == before
    assert seven(large={"clips": "random"}, small={"clips": "head"}, cache=tmp_path).fill() == 5


def test_latents_are_drawn_anew_at_each_visit_from_what_the_vae_says(seven, shapes, tmp_path):
    found = seven(large={"clips": "head"}, cache=tmp_path)
    item = next(i for i in found.batch(0, 4) if found.clips[i.clip].source == 0)
    many = found.load([item._replace(number=n) for n in range(200)]).latents
    clip = found.clips[item.clip]
    x = decode(clip.media, clip.facts, item.frames, (32, 64)).float() / 127.5 - 1
    with torch.no_grad():
        said = shapes.vae.encode(x)
    factor = shapes.vae.config.scaling_factor
    mean, std = (v.transpose(0, 1) * factor for v in (said.mean, said.std))
    assert torch.allclose(((many.mean(0) - mean) / std * 200**0.5).std(), torch.tensor(1.0), atol=0.1)
    assert torch.allclose((many.std(0) / std).mean(), torch.tensor(1.0), atol=0.02)
    exact = seven(large={"clips": "head"}, cache=tmp_path, posterior="mean").load([item]).latents[0]
    assert torch.allclose(exact, mean, atol=1e-5)
    half = seven(large={"clips": "head"}, cache=tmp_path, posterior="mean", dtype="float16").load([item]).latents[0]
    assert torch.allclose(half, mean, atol=2e-3) and not torch.equal(half, exact)


def test_a_cache_of_another_vae_is_not_used(seven, shapes, tmp_path):
    found = seven(large={"clips": "head"}, small={"clips": "head"}, cache=tmp_path)
    items = found.batch(0, 2)
    found.load(items)
    weight = shapes.vae.encoder.conv_in.weight
    with torch.no_grad():
        weight[0, 0, 0, 0] += 0.5
    try:
        other = seven(large={"clips": "head"}, small={"clips": "head"}, cache=tmp_path)
        fresh = seven(large={"clips": "head"}, small={"clips": "head"}, cache=None)
        assert not torch.equal(other.load(items).latents, found.load(items).latents)
        assert torch.equal(other.load(items).latents, fresh.load(items).latents)
    finally:
        with torch.no_grad():
            weight[0, 0, 0, 0] -= 0.5
    assert len([p for p in files_of(tmp_path) if "latents" in p.parts]) == 2 * len({i.clip for i in items})
    assert digest_of(shapes.vae) == digest_of(shapes.vae) != digest_of(shapes.text_encoder)


def test_a_broken_file_in_the_cache_is_made_again(seven, tmp_path, caplog):
    found = seven(cache=tmp_path, large={"clips": "head"}, small={"clips": "head"})
    want = found.load(found.batch(0, 2)).latents
    for path in files_of(tmp_path):
        path.write_bytes(path.read_bytes()[:-7])
    again = seven(cache=tmp_path, large={"clips": "head"}, small={"clips": "head"})
    assert torch.equal(again.load(again.batch(0, 2)).latents, want)
    assert "is broken" in caplog.text


def test_kills_while_writing_and_two_writers_leave_whole_files(tmp_path):
    """SIGKILL at random moments, and two processes that write the same files at once."""
    x = {"mean": torch.arange(300_000.0), "logvar": torch.ones(7)}

    def write_for_ever():
        n = 0
        while True:
            Cache(tmp_path).write("latents", f"{n % 5:064}", x)
            n += 1

    for round_ in range(6):
        children = []
        for _ in range(2):
            if (child := os.fork()) == 0:
                try:
                    write_for_ever()
                finally:
                    os._exit(1)
            children.append(child)
        time.sleep(0.1 + 0.013 * round_)
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        found = [p for p in (tmp_path / "latents").rglob("*") if p.is_file() and not p.name.startswith(".")]
        for path in found:
            said = Cache(tmp_path).read("latents", path.stem)
            assert torch.equal(said["mean"], x["mean"]) and torch.equal(said["logvar"], x["logvar"])
    assert len(found) == 5


# ------------------------------------------------------------------------------------------------------- the sheet


def test_the_sheet_shows_what_the_network_can_see(tmp_path, shapes):
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, colour in (("red", (255, 0, 0)), ("white", (255, 255, 255))):
        frames = np.zeros((16, 64, 64, 3), np.uint8)
        frames[:, 16:48, 16:48] = colour
        write(folder / f"{name}.mp4", frames, rate=8)
        (folder / f"{name}.txt").write_text(f"a {name} square" + " that stands" * 20 * (name == "red"))
    (folder / "broken.mp4").write_bytes(b"nothing")
    said = look(make(shapes, folder, text_dropout=1.0), tmp_path / "sheet.png", batch=4)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    red = (np.abs(sheet - [255, 0, 0]).max(-1) < 60).sum()
    assert red == pytest.approx(8 * 32 * 32, rel=0.15)  # eight frames of the sixteen
    assert (sheet.max(-1) < 40).sum() > 2 * 8 * 3 * 32 * 32 * 0.9  # and the black around
    for line in ("3 files, 2 clips of 2 of them; 1 files are skipped", "frames 16, width 64, height 64: clips 2",
                 "captions: 2 different ones; 1 files have none; 1 are cut at 16 tokens", "broken.mp4: not a video",
                 "fewer than a batch"):  # fmt: skip
        assert line in said
