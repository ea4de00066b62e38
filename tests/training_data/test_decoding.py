"""Decoding: the right frames come out of every kind of file, at the right size."""

import random
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from minit2v.files.video import find_ffmpeg
from minit2v.training import clips
from minit2v.training.clips import covered, decode, examine, nearest_frames
from minit2v.training.sources import Source, buckets, last_start

from .counter import FILES, HIGH, WIDE, counter, make, media, numbers, write


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
        assert last_start(facts, source) == (fits[-1] if fits else -1)
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
