"""Layouts: the same samples whatever the layout is, and every fault is named."""

import csv
import io
import json
import os
import random
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from minit2v.files.video import find_ffmpeg
from minit2v.training import cache as caches
from minit2v.training.clips import decode, sha256
from minit2v.training.sheet import summary

from .counter import counter, make, media, numbers, write

CAPTIONS = ["a counter, first", "the second: a 'counter'", "ein dritter Zähler"]


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
    ({"metadata.csv": "name;text\na.mp4;x"}, "row 2 names no file: it has 'name;text', and needs one of file_name"),
    ({"metadata.json": '{"data": [{"video_path": 3}]}'}, "entry 1 has no video_path"),
    ({"x.doc": ""}, "no videos and no pictures"),
])  # fmt: skip
def test_broken_lists_are_one_line(files, said, tmp_path, shapes):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        make(shapes, tmp_path)


def test_captions_without_a_clip_are_named(tmp_path, shapes, three, caplog):
    (tmp_path / "a.mp4").write_bytes(three[0].read_bytes())
    for name in ("a.txt", "ghost.txt", "b.caption"):
        (tmp_path / name).write_text("x")
    with caplog.at_level("WARNING"):
        found = make(shapes, tmp_path, height=32, width=64)
    assert [c.captions for c in found.clips] == [("x",)]
    files = f"{tmp_path / 'b.caption'}, {tmp_path / 'ghost.txt'}"
    assert [r.getMessage() for r in caplog.records] == [f"no clip has the name of {files}: not used as a caption"]


# ------------------------------------------------------------------------------------------------------- damage

DAMAGED = int(os.environ.get("MINIT2V_DAMAGED_FILES", "36"))


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
    said = summary(found)
    assert f"files: {len(bad) + 2}, used 2, skipped {len(bad)}; clips: 2" in said
    assert all(str(path) in said for path in bad)


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
