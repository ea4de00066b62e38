"""The clips of each step, and what of them is kept on disk."""

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minit2v import DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel
from minit2v.parallel import World
from minit2v.training import cache as caches
from minit2v.training import data, sheet
from minit2v.training.cache import Cache, digest_of
from minit2v.training.clips import decode
from minit2v.training.data import Data
from minit2v.training.objective import drop_text
from minit2v.training.recipe import Recipe
from minit2v.training.sampler import turn
from minit2v.training.sheet import draw, look, summary
from minit2v.training.trainer import Trainer

from .counter import counter, make, write


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
    assert "with 2 in a batch, a clip is used once in 4 steps on the average" in summary(found, 2)
    assert "a clip is used in every step" in summary(found, 8)
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
    assert "clips 1; at most 0% of a picture is cut off; fewer than a batch" in summary(found, 4)


# ------------------------------------------------------------------------------------------------------- cache


def files_of(folder):
    return {p: p.stat().st_mtime_ns for p in Path(folder).rglob("*.*") if p.is_file() and not p.name.startswith(".")}


def test_what_is_in_the_cache_is_not_made_again(seven, shapes, tmp_path, monkeypatch):
    found = seven(large={"clips": "head"}, small={"clips": "head"}, cache=tmp_path)
    found.fill(9, 4)
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


def test_the_cache_is_filled_with_what_the_run_needs_and_its_size_is_known_before(seven, tmp_path):
    def latents(name):
        return {p.name for p in files_of(tmp_path / name) if "latents" in p.parts}

    found = seven(small={"clips": "head"}, cache=tmp_path / "some")
    found.fill(9, 4)
    assert len(latents("some")) == 2  # the other five clips begin at random places
    for step in range(50):
        found.load(found.batch(step, 2))
    assert found.cache_bytes(100) == pytest.approx(found.cache.size(), rel=0.25)
    head = seven(large={"clips": "head"}, small={"clips": "head"}, cache=tmp_path / "short")
    head.fill(1, 3)
    assert len(latents("short")) == 3  # a short run does not need all


def test_processes_share_the_reading_and_encoding_of_files(seven, tmp_path, monkeypatch):
    class Second(World):
        """The other process comes later: nobody waits."""

        def barrier(self, name, timeout=0.0):
            examined.append({p.name for p in files_of(tmp_path) if "files" in p.parts})

    examined, made = [], []
    for rank in (1, 0):
        found = seven(large={"clips": "head"}, small={"clips": "head"}, cache=tmp_path, world=Second(rank, 2))
        before = {p for p in files_of(tmp_path) if "latents" in p.parts}
        found.fill(9, 4)
        made.append({p for p in files_of(tmp_path) if "latents" in p.parts} - before)
    assert len(examined[0]) == 3 and [len(paths) for paths in made] == [3, 4]


def test_the_clips_of_the_next_step_are_decoded_while_one_is_computed(seven, shapes, tmp_path, monkeypatch):
    decoded, lock = set(), threading.Condition()

    def noted(media, facts, frames, *more):
        clip = decode(media, facts, frames, *more)
        with lock:
            decoded.add((media.name, frames))
            lock.notify_all()
        return clip

    def run(found, name):
        torch.manual_seed(0)
        unet = UNet3DConditionModel(
            block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock3D",), up_block_types=("CrossAttnUpBlock3D",),
            cross_attention_dim=shapes.unet.config.cross_attention_dim,
        )  # fmt: skip
        pipe = TextToVideoSDPipeline(None, None, None, unet, DDIMScheduler())
        recipe = Recipe(data=("clips",), out=tmp_path / name, steps=3, batch=2, rank=2, warmup=0, validate_every=0)
        return Trainer(pipe, found, recipe, say=lambda _: None)

    found = seven(cache=None)
    trainer = run(found, "ahead")

    def waits(*_):
        following = found.batch(trainer.done + 1, 2) if trainer.done < 2 else []
        wanted = {(found.clips[i.clip].media.name, i.frames) for i in following}
        with lock:
            assert lock.wait_for(lambda: wanted <= decoded, timeout=20)

    monkeypatch.setattr(data, "decode", noted)
    trainer.unet.register_forward_pre_hook(waits)
    losses = [trainer.step()["loss"] for _ in range(3)]
    assert not found._jobs  # the last step has decoded nothing ahead
    monkeypatch.setattr(Data, "prefetch", lambda self, items: None)
    plain = run(seven(cache=None), "plain")
    assert [plain.step()["loss"] for _ in range(3)] == losses


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


# --------------------------------------------------------------------------------------------------- the sheet


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
    for line in ("files: 3, used 2, skipped 1; clips: 2", "frames 16, width 64, height 64: clips 2",
                 "captions: 2 different ones; 1 files have none; 1 are cut at 16 tokens", "broken.mp4: not a video",
                 "fewer than a batch", " tokens: a red square that stands"):  # fmt: skip
        assert line in said


def test_the_sheet_shows_what_the_autoencoder_loses(tmp_path, shapes, monkeypatch):
    """`shapes` has no cyan. Its sheet shows the file, too, and captions that training would drop now and then."""
    drawn, folder = [], tmp_path / "clips"
    folder.mkdir()
    monkeypatch.setattr(sheet, "draw", lambda strips: drawn.extend(strips) or draw(strips))
    for name, colour, rate in (("cyan", (0, 230, 230), 8), ("blue", (0, 0, 255), 24)):
        frames = np.zeros((16, 64, 64, 3), np.uint8)
        frames[:, 16:48, 16:48] = colour
        write(folder / f"{name}.mp4", frames, rate=rate)
        (folder / f"{name}.txt").write_text(f"a {name} square")
    write(folder / "short.mp4", frames[:9])
    (folder / "short.txt").write_text("a short one")
    said = look(make(shapes, folder, text_dropout=1.0), tmp_path / "sheet.png").splitlines()
    assert said[-1].startswith("the model's autoencoder changes 1 of 2 clips in the picture strongly")
    assert any("8 to 24 frames per second" in line and "fps, here at most 8" in line for line in said)
    assert "the option short (loop, hold or stretch) also uses files that are too short" in said
    texts = [lines[0] for lines, _ in drawn]
    assert len(texts) == 3 and {"a cyan square", "a blue square"} < set(texts)  # not the empty caption
    n = texts.index("a cyan square")
    own, seen = (drawn[k][1][0, :, 32, 32] for k in (n, n + 1))
    assert own[1] > 0.6 and seen[1] < 0 and "the model's autoencoder" in texts[n + 1]  # green is in cyan, not in blue
    assert not [line for line in summary(make(shapes, folder, fps=8)).splitlines() if "frames per second, so" in line]
