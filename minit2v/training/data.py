"""Clips and captions for training: which files there are, what of them each step uses, and their latents.

    data = Data(["clips"], vae=vae, encode_text=encode, cache="run/cache", frames=16, height=64, width=64, unit=16)
    batch = data.load(data.batch(step, 4))         # latents (b c f h w), text (b l d)

Nothing is drawn from a generator that has a state. Which files a step uses is a function of the seed and the step.
What is random about sample n (frames, caption, flip, noise of the VAE) is a function of the seed and n. So a run that
is resumed, or shared by more processes, goes on with exactly the same data.
"""

import bisect
import logging
import math
import os
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from tqdm import tqdm

from minit2v_convert.rename import nearest, shown

from ..files.video import NANO
from .cache import Cache, digest, digest_of
from .clips import Facts, Media, decode, nearest_frames
from .layouts import Entry, read_layout, read_sets
from .objective import drop_text, generators

logger = logging.getLogger(__name__)

CLIPS = ("random", "head", "chunk", "uniform", "all")
SHORT = ("skip", "loop", "hold", "stretch")
LARGEST_ASPECT = 3  # a bucket is at most so many times as wide as high, or as high as wide
AREA = 0.15  # by so much a bucket's area may differ from the one asked for


@dataclass(frozen=True)
class Source:
    """One set of files, and how clips are cut from them.

    path: a folder, a list, an archive, a video or a picture (`layouts` has all ways that are read).
    folder: where the files of a list are, if not beside it.
    prompt: the caption of files that have none; without it they are skipped. prefix: put before every caption.
    weight: its share of the samples among all sets; not given, all files are seen equally often, `repeats` times each.
    frames, height, width: of a clip; height and width are those of a square picture or of the usual one, and other
        shapes get another height and width of nearly the same area.
    fps: frames per second of the clips, chosen by time; or stride: every n-th frame of the file. Neither: every frame.
    clips: where a clip begins. "random": anywhere, anew at each visit; "head": at the beginning; "chunk": the file is
        cut into clips; "uniform": at `places` places, evenly; "all": the frames are spread over the whole file.
    short: what becomes of files with too few frames. "skip"; "loop": it begins again; "hold": the last frame stays;
        "stretch": the frames are spread over the file, and some are there twice.
    flip: half of the clips are mirrored, anew at each visit. Then captions must not speak of left and right.
    """

    path: str | Path
    folder: str | Path | None = None
    prompt: str | None = None
    prefix: str = ""
    weight: float | None = None
    repeats: int = 1
    frames: int = 16
    height: int = 256
    width: int = 256
    fps: float | None = None
    stride: int | None = None
    clips: str = "random"
    places: int = 4
    short: str = "skip"
    flip: bool = False

    def __post_init__(self) -> None:
        def wrong(name: str, what: str) -> ValueError:
            return ValueError(f"{shown(self.path)}: {name} must be {what}, not {getattr(self, name)!r}")

        for name in ("repeats", "frames", "height", "width", "places", "stride"):
            value = getattr(self, name)
            if (value is not None or name != "stride") and (type(value) is not int or value < 1):
                raise wrong(name, "a whole number of at least 1")
        for name, kind in (("prompt", str), ("prefix", str), ("flip", bool)):
            value = getattr(self, name)
            if not (isinstance(value, kind) or value is None and name == "prompt"):
                raise wrong(name, "a text" if kind is str else "true or false")
        for name in ("weight", "fps"):
            value = getattr(self, name)
            if value is not None and (type(value) not in (int, float) or not 0 < value < math.inf):
                raise wrong(name, "a number above 0")
        for name, known in (("clips", CLIPS), ("short", SHORT)):
            if (value := getattr(self, name)) not in known:
                raise wrong(name, ", ".join(known[:-1]) + f" or {known[-1]}{nearest(value, known)}")
        if self.fps is not None and self.stride is not None:
            raise ValueError(f"{shown(self.path)}: give fps or stride, not both")
        if self.clips == "all" and (self.fps is not None or self.stride is not None):
            raise ValueError(f'{shown(self.path)}: clips = "all" spreads the frames over the file, and leaves no room '
                             "for fps or stride")  # fmt: skip


class Bucket(NamedTuple):
    """What the clips of a batch have in common: frames, and height and width in pixels."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Clip:
    """What is trained on: a file, or a place in it. start: the first frame; last: the last one that may be the first.

    start None: one between 0 and `last`, at each visit another.
    """

    media: Media
    facts: Facts
    captions: tuple[str, ...]
    source: int
    bucket: Bucket
    start: int | None
    last: int


class Item(NamedTuple):
    """One row of a batch: the global number of the sample, and what is used of which clip."""

    number: int
    clip: int
    frames: tuple[int, ...]
    caption: str
    flip: bool


class Sample(NamedTuple):
    """latents (c f h w) times the VAE's factor, as the UNet sees them, and text (l d); both float32 on the CPU."""

    latents: Tensor
    text: Tensor
    caption: str
    source: str


class Batch(NamedTuple):
    """latents (b c f h w), text (b l d), float32 on the CPU; numbers: the global numbers of the samples."""

    latents: Tensor
    text: Tensor
    captions: list[str]
    sources: list[str]
    numbers: list[int]


def buckets(height: int, width: int, unit: int) -> list[tuple[int, int]]:
    """All (height, width) in steps of `unit` pixels whose area is nearly height x width."""
    for name, value in (("height", height), ("width", width)):
        if value % unit or value < unit:
            raise ValueError(f"{name} must be a multiple of {unit} pixels for this model, not {value}"
                             f" (nearest: {max(unit, round(value / unit) * unit)})")  # fmt: skip
    area, found = height * width, {(height, width), (width, height)}
    for w in range(unit, area // unit + 1, unit):
        h = max(unit, round(area / w / unit) * unit)
        if abs(h * w / area - 1) <= AREA and max(h / w, w / h) <= LARGEST_ASPECT:
            found |= {(h, w), (w, h)}
    return sorted(found)


def cut_off(width: float, height: float, size: tuple[int, int]) -> float:
    """The share of a picture that is cut off so that it has the shape of `size` (height, width)."""
    a, b = width / height, size[1] / size[0]
    return 1 - min(a, b) / max(a, b)


# --------------------------------------------------------------------------------------------------- which frames


def last_start(facts: Facts, source: Source) -> int:
    """The last frame that a clip can begin with, below 0 where the file is too short. Of a picture 0."""
    if facts.still or source.frames == 1:
        return facts.frames - 1
    if source.clips == "all":
        return 0 if facts.frames >= source.frames else -1
    if source.fps is None or facts.even:  # pictures in a folder have no times: each is one frame
        return facts.frames - 1 - (source.frames - 1) * (source.stride or 1)
    span, times = round((source.frames - 1) * NANO / source.fps), facts.times
    middle = facts.end - (facts.end - times[-1]) // 2
    return max(bisect.bisect_left(times, middle - span), bisect.bisect_right(times, times[-1] - span)) - 1


def chosen_frames(facts: Facts, source: Source, start: int) -> tuple[int, ...]:
    """The numbers of the frames of a clip that begins at frame `start`; `source.short` says what to do at the end."""
    n, count = facts.frames, source.frames
    if facts.still or count == 1:
        return (start,)
    timed, stride = source.fps is not None and not facts.even, source.stride or 1
    if source.clips != "all" and start <= last_start(facts, source):
        return tuple(nearest_frames(facts, start, count, source.fps) if timed else
                     range(start, start + count * stride, stride))  # fmt: skip
    if source.short == "stretch" or source.clips == "all" and n >= count:
        return tuple(start + math.floor(k * (n - 1 - start) / (count - 1) + 0.5) for k in range(count))
    step = facts.rate / source.fps if timed else stride  # beyond the end there are no times
    wanted = (start + round(k * step) for k in range(count))
    return tuple(k % n if source.short == "loop" else min(k, n - 1) for k in wanted)


def starts(facts: Facts, source: Source, at: int | None) -> list[int | None]:
    """Where the clips of a file begin, one for each. ValueError: why there is none."""
    last = last_start(facts, source)
    if facts.still or source.frames == 1 and source.clips == "all":
        return [0]
    if source.short == "skip":
        if source.fps is not None and source.frames > 1 and not facts.even and source.fps > 1.1 * facts.rate:
            raise ValueError(f"has {facts.rate:.3g} frames per second, fewer than fps = {source.fps:g}")
        if last < (at or 0):
            left, seconds = facts.frames - (at or 0), (facts.end - facts.times[min(at or 0, facts.frames - 1)]) / NANO
            rate = f" at {source.fps:g} fps" if source.fps else f", every {source.stride}th" if source.stride else ""
            where = f" from frame {at} on" if at else ""
            raise ValueError(f"too short: {max(0, left)} frames in {seconds:.2f} s{where}, and a clip has "
                             f"{source.frames}{rate}")  # fmt: skip
    if at is not None:
        if at >= facts.frames:
            raise ValueError(f"has {facts.frames} frames, and a clip should begin at frame {at}")
        return [at]
    last = max(0, last)
    if source.clips == "random":
        return [None]
    if source.clips == "uniform" and source.places > 1:
        return sorted({round(k * last / (source.places - 1)) for k in range(source.places)})
    if source.clips != "chunk":
        return [0]
    found, start = [], 0
    while start <= last:
        found.append(start)
        if source.fps is None or facts.even:
            start += source.frames * (source.stride or 1)
        else:
            behind = facts.times[start] + round(source.frames * NANO / source.fps)
            start = max(start + 1, bisect.bisect_left(facts.times, behind - 1000))
    return found


# --------------------------------------------------------------------------------------------------- the data


class Data:
    """The clips of some sets of files, as latents and text states.

    sources: paths, mappings with the fields of `Source`, or `Source`s; `defaults` are fields for those that do not say.
    vae: an AutoencoderKL, frozen, where it is to run. encode_text: captions to states (b l d).
    text_name: what tells the text encoder from another (`cache.digest_of`); without it text states are not kept.
    cache: the folder for latents and text states; None: each clip is decoded and encoded at each visit.
    unit: height and width are multiples of it, in pixels.
    text_dropout: the share of captions that are replaced by the empty one. posterior: "sample" or "mean".
    dtype: of what is in the cache. workers: files that are decoded at once; all
        processors, and at most 8. The samples do not depend on it.
    count_tokens: how many tokens a caption has, and how many are read; for the summary.

    All files are gone through at once: what cannot be trained on is in `skipped`, with the reason, and each such file
    is named once in the log. ValueError where nothing is left.
    """

    def __init__(
        self,
        sources: Sequence[str | Path | Source | Mapping[str, Any]],
        *,
        vae: Any,
        encode_text: Callable[[list[str]], Tensor],
        text_name: str | None = None,
        cache: str | Path | None = None,
        seed: int = 0,
        unit: int = 64,
        text_dropout: float = 0.0,
        posterior: str = "sample",
        dtype: str = "float32",
        workers: int | None = None,
        count_tokens: Callable[[str], tuple[int, int]] | None = None,
        progress: bool = False,
        **defaults: Any,
    ):
        self.sources = as_sources(sources, defaults)
        self.vae, self.encode_text, self.text_name = vae, encode_text, text_name
        self.cache, self.seed, self.unit, self.text_dropout = Cache(cache), seed, unit, text_dropout
        self.posterior, self.dtype = posterior, dtype
        self.count_tokens = count_tokens
        for name, value, known in (("posterior", posterior, ("sample", "mean")),
                                   ("dtype", dtype, ("float32", "float16", "bfloat16"))):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}{nearest(value, known)}")
        if not 0 <= text_dropout <= 1:
            raise ValueError(f"text_dropout is a share from 0 to 1, not {text_dropout!r}")
        self.vae_name = digest(digest_of(vae), str(vae.dtype), vae.tiling)
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1) if workers is None else workers)
        self._jobs: dict[str, Future[Tensor]] = {}
        self.skipped: list[tuple[str, str]] = []
        self._named: set[str] = set()
        self.clips: list[Clip] = []
        self._texts: OrderedDict[str, Tensor] = OrderedDict()
        self._orders: dict[tuple[Bucket, int], tuple[int, list[int]]] = {}
        try:
            self._read(progress)
        except BaseException:
            self._pool.shutdown(wait=False, cancel_futures=True)
            raise
        self._streams: dict[Bucket, dict[int, list[int]]] = {}
        for n, clip in enumerate(self.clips):
            self._streams.setdefault(clip.bucket, {}).setdefault(clip.source, []).append(n)
        self._shares = self._rows()

    @classmethod
    def of(cls, pipe: Any, sources: Sequence[Any], **options: Any) -> Self:
        """With the VAE, the text encoder and the usual size of a pipeline's model."""
        vae, tokenizer, encoder = pipe.vae, pipe.tokenizer, pipe.text_encoder
        factor, unet = vae.config.factor, pipe.unet.config
        usual = {"height": unet.sample_size * factor, "width": unet.sample_size * factor}

        def encode(captions: list[str]) -> Tensor:
            with warnings.catch_warnings():  # `summary` counts what is cut off
                warnings.simplefilter("ignore")
                return encoder(tokenizer(captions).to(encoder.device))

        options = {
            "unit": factor * 2 ** (len(unet.block_out_channels) - 1),
            "text_name": digest(digest_of(encoder), str(encoder.dtype), tokenizer.backend.to_str(),
                                tokenizer.pad_token_id, tokenizer.model_max_length),
            "count_tokens": lambda caption: (len(tokenizer.encode(caption)), tokenizer.model_max_length),
        } | usual | options
        return cls(sources, vae=vae, encode_text=encode, **options)

    def __len__(self) -> int:
        """How many clips there are, each counted once."""
        return len(self.clips)

    @property
    def fingerprint(self) -> str:
        """What tells this data from other data. It is the same on every machine and in every folder."""
        clips = [[c.facts.sha256, c.captions, c.source, c.bucket, c.start, c.last] for c in self.clips]
        ways = [[getattr(s, f.name) for f in fields(s) if f.name not in ("path", "folder")] for s in self.sources]
        return digest(clips, ways, self.seed, self.unit, self.text_dropout, self.posterior)

    # Going through the files.

    def _read(self, progress: bool) -> None:
        sizes = [buckets(source.height, source.width, self.unit) for source in self.sources]
        found: list[tuple[int, Entry]] = []
        for n, source in enumerate(self.sources):
            entries = read_layout(source.path, source.folder)
            if not entries:
                raise ValueError(f"{shown(source.path)}: no videos and no pictures")
            found += [(n, entry) for entry in entries]
        self.files = len({entry.media.name for _, entry in found})
        self.without_caption = sum(not entry.captions and entry.fault is None for _, entry in found)

        def facts_of(media: Media) -> Facts | str:
            try:
                return self.cache.facts(media)
            except ValueError as error:
                return str(error)
            except OSError as error:
                return f"cannot be read ({error.strerror or error})"

        files = list(dict.fromkeys(entry.media for _, entry in found if entry.fault is None))
        results = tqdm(self._pool.map(facts_of, files), "reading files", len(files), disable=not progress)
        facts = dict(zip(files, results, strict=True))
        for n, entry in found:
            said = entry.fault or facts[entry.media]
            try:
                if isinstance(said, str):
                    raise ValueError(said)
                self.clips += self._clips(n, entry, said, sizes[n])
            except ValueError as error:
                self._skip(entry.media.name, str(error))
        if not self.clips:
            raise ValueError(f"nothing is left to train on: all of the {self.files} files are skipped, the first one "
                             f"because: {self.skipped[0][1]}")  # fmt: skip

    def _skip(self, name: str, reason: str) -> None:
        if name not in self._named:  # a list may name a file several times
            logger.warning("%s is skipped: %s", shown(name), shown(reason))
            self.skipped.append((name, reason))
            self._named.add(name)

    def _clips(self, n: int, entry: Entry, facts: Facts, sizes: Sequence[tuple[int, int]]) -> list[Clip]:
        source = self.sources[n]
        captions = entry.captions or (() if source.prompt is None else (source.prompt,))
        if not captions:
            raise ValueError("has no caption; prompt = gives one to all that have none")
        captions = tuple(f"{source.prefix}{caption}" for caption in captions)
        whole = facts.shown_width, facts.height
        size = min(sizes, key=lambda s: (cut_off(*whole, s), abs(s[0] * s[1] - source.height * source.width)))
        bucket = Bucket(1 if facts.still else source.frames, *size)
        last = max(0, last_start(facts, source))
        return [Clip(entry.media, facts, captions, n, bucket, start, last) for start in starts(facts, source, entry.at)]

    def summary(self, batch: int = 1) -> str:
        """Lines for people: how many of what there are, what is done to them, and what is skipped and why."""
        lines = [f"{self.files} files, {len(self.clips)} clips of {len({c.media.name for c in self.clips})} of them; "
                 f"{len(self.skipped)} files are skipped"]  # fmt: skip
        whole = sum(sum(sets.values()) for sets in self._shares.values())
        for n, source in enumerate(self.sources):
            mine = [c for c in self.clips if c.source == n]
            stills = sum(c.facts.still for c in mine)
            share = sum(sets.get(n, 0) for sets in self._shares.values()) / whole
            lines.append(f"  {shown(source.path)}: clips of videos {len(mine) - stills}, pictures {stills}, share of "
                         f"the samples {float(share):.0%}")  # fmt: skip
        turns = math.ceil(whole / batch)
        lines.append(f"with {batch} in a batch, a clip is used once in {turns} steps on the average. "
                     "Each batch is of one bucket:")  # fmt: skip
        for bucket, sets in sorted(self._streams.items()):
            clips = [self.clips[n] for mine in sets.values() for n in mine]
            cut = max(cut_off(c.facts.shown_width, c.facts.height, bucket[1:]) for c in clips)
            small = sum(c.facts.shown_width < bucket.width or c.facts.height < bucket.height for c in clips)
            lines.append(f"  frames {bucket.frames}, width {bucket.width}, height {bucket.height}: clips {len(clips)}; "
                         f"at most {cut:.0%} of a picture is cut off"
                         + f"; {small} are smaller than that, and enlarged" * bool(small)
                         + "; fewer than a batch: some are in it several times" * (len(clips) < batch))  # fmt: skip
        spans = [span for c in self.clips if (span := self._seconds(c)) is not None]
        if spans:
            lines.append(f"the clips of videos last {min(spans):.2f} to {max(spans):.2f} seconds")
        lines.append(f"captions: {len({x for c in self.clips for x in c.captions})} different ones; "
                     f"{self.without_caption} files have none; {self._cut_captions()}")  # fmt: skip
        if self.skipped:
            lines += ["skipped:", *(f"  {shown(name)}: {shown(reason)}" for name, reason in self.skipped)]
        return "\n".join(lines)

    def _seconds(self, clip: Clip) -> float | None:
        """From the first frame of the first such clip of a file to its last one; None without times."""
        if clip.facts.still or clip.facts.even or clip.bucket.frames == 1:
            return None
        chosen = chosen_frames(clip.facts, self.sources[clip.source], clip.start or 0)
        return abs(clip.facts.times[chosen[-1]] - clip.facts.times[chosen[0]]) / NANO

    def _cut_captions(self) -> str:
        if self.count_tokens is None:
            return "their tokens are not counted"
        counts = [self.count_tokens(x) for x in {x for c in self.clips for x in c.captions}]
        return f"{sum(n > most for n, most in counts)} are cut at {counts[0][1]} tokens"

    # Which clips a step uses. Buckets take turns in exact proportion to their samples, in a bucket so do the sets, and
    # in a set its clips, in an order that is another one each time all have been used. Nothing is counted up to a step.

    def _rows(self) -> dict[Bucket, dict[int, Fraction]]:
        """How many samples of each bucket and set are used until each clip was at least once."""
        count = [0] * len(self.sources)
        for clip in self.clips:
            count[clip.source] += self.sources[clip.source].repeats
        weights = [s.weight for s in self.sources]
        if any(w is not None for w in weights) and any(w is None for w in weights):
            raise ValueError("give a weight to every set, or to none")
        shares = {n: Fraction(c if (w := weights[n]) is None else w) for n, c in enumerate(count) if c}
        longest = max(count[n] / share for n, share in shares.items())
        return {bucket: {n: shares[n] * longest * len(clips) * self.sources[n].repeats / count[n]
                         for n, clips in sets.items()} for bucket, sets in self._streams.items()}  # fmt: skip

    def batch(self, step: int, batch: int) -> list[Item]:
        """What step `step` (from 0) of batches of `batch` uses: all of one bucket. A function of the seed and these."""
        if batch < 1 or step < 0:
            raise ValueError(f"batch is at least 1 and step at least 0, not {batch} and {step}")
        bucket, earlier = turn(in_whole_numbers({b: sum(sets.values()) for b, sets in self._shares.items()}), step)
        shares, items = in_whole_numbers(self._shares[bucket]), []
        for row in range(batch):
            n, used = turn(shares, earlier * batch + row)
            clips = self._streams[bucket][n]
            cycle, place = divmod(used, len(clips))
            items.append(self._item(step * batch + row, self._order(bucket, n, cycle)[place]))
        return items

    def _order(self, bucket: Bucket, n: int, cycle: int) -> list[int]:
        """The clips of a set in one bucket, shuffled for the `cycle`-th time."""
        known, order = self._orders.get((bucket, n), (-1, []))
        if known != cycle:
            order = list(self._streams[bucket][n])
            random.Random(f"{self.seed} order {tuple(bucket)} {n} {cycle}").shuffle(order)
            self._orders[bucket, n] = cycle, order
        return order

    def _item(self, number: int, n: int) -> Item:
        clip, rng = self.clips[n], random.Random(f"{self.seed} clip {number}")
        source = self.sources[clip.source]
        start = rng.randrange(clip.last + 1) if clip.start is None else clip.start
        caption = clip.captions[rng.randrange(len(clip.captions))]
        flip = rng.random() < 0.5 and source.flip
        if drop_text(self.seed, number, self.text_dropout):
            caption = ""
        return Item(number, n, chosen_frames(clip.facts, source, start), caption, flip)

    # Latents and text states.

    def prefetch(self, items: Sequence[Item]) -> None:
        """Begins to decode what is not in the cache, and returns at once. `load` of the same samples waits for it."""
        for item in items:
            if (name := self._name(item)) not in self._jobs and not self.cache.has("latents", name):
                self._jobs[name] = self._pool.submit(self._decode, item)

    def load(self, items: Sequence[Item]) -> Batch:
        """The latents and text states of these samples. Their bucket must be the same."""
        self.prefetch(items)
        moments = {name: self._moments(name, item) for name, item in {self._name(i): i for i in items}.items()}
        rows = [Sample(self._drawn(moments[self._name(item)], item.number), self.text(item.caption), item.caption,
                       self.clips[item.clip].media.name) for item in items]  # fmt: skip
        return Batch(torch.stack([r.latents for r in rows]), torch.stack([r.text for r in rows]),
                     [r.caption for r in rows], [r.source for r in rows], [i.number for i in items])  # fmt: skip

    def fill(self, progress: bool = False) -> int:
        """Puts into the cache what can be known before training, and returns how many clips cannot.

        These begin anywhere, anew at each visit. If there are none, neither the VAE nor the text encoder is needed any
        more, unless a caption comes that is not in the data.
        """
        if self.cache.folder is None:
            return len(self.clips)
        for caption in {"", *(x for c in self.clips for x in c.captions)}:
            self.text(caption)
        later, items = 0, []
        for n, clip in enumerate(self.clips):
            if clip.start is None and clip.last > 0:
                later += 1
                continue
            source = self.sources[clip.source]
            frames = chosen_frames(clip.facts, source, clip.start or 0)
            items += [Item(0, n, frames, "", flip) for flip in ((False, True) if source.flip else (False,))]
        for item in tqdm(items, "encoding clips", disable=not progress):
            self.load([item])
        return later

    def _name(self, item: Item) -> str:
        """Of a cache file: all that its content depends on."""
        clip = self.clips[item.clip]
        return digest(clip.facts.sha256, self.vae_name, clip.bucket[1:], item.frames, item.flip, self.dtype)

    def _decode(self, item: Item) -> Tensor:
        clip = self.clips[item.clip]
        return decode(clip.media, clip.facts, item.frames, clip.bucket[1:], item.flip)

    def _moments(self, name: str, item: Item) -> dict[str, Tensor]:
        job = self._jobs.pop(name, None)
        if (known := self.cache.read("latents", name)) is not None:
            return known
        pixels = self._decode(item) if job is None else job.result()
        x = pixels.to(self.vae.device, self.vae.dtype) / 127.5 - 1
        with torch.no_grad():
            posterior = self.vae.encode(x, chunk_size=8)
        moments = {"mean": posterior.mean, "logvar": posterior.logvar}
        if not all(torch.isfinite(m).all() for m in moments.values()):
            raise ValueError(f"{shown(self.clips[item.clip].media.name)}: the VAE makes NaN or infinity of it in "
                             f"{self.vae.dtype}")  # fmt: skip
        return self.cache.write("latents", name, {k: m.to(DTYPES_BY_NAME[self.dtype]) for k, m in moments.items()})

    def _drawn(self, moments: dict[str, Tensor], number: int) -> Tensor:
        """Latents (c f h w), drawn anew for every sample from what the VAE says of them."""
        z = moments["mean"].float()
        if self.posterior == "sample":
            noise = torch.randn(z.shape, generator=generators(self.seed, "vae", number)[1])
            z = z + torch.exp(0.5 * moments["logvar"].float()) * noise
        return z.transpose(0, 1).contiguous() * self.vae.config.scaling_factor

    def text(self, caption: str) -> Tensor:
        """The states (l d) of a caption, float32."""
        if caption in self._texts:
            self._texts.move_to_end(caption)
            return self._texts[caption]
        name = digest(self.text_name, caption)
        known = self.cache.read("text", name) if self.text_name else None
        if known is None:
            with torch.no_grad():
                states = self.encode_text([caption])[0].float()
            known = {"states": states.cpu()}
            if self.text_name:
                self.cache.write("text", name, known)
        self._texts[caption] = known["states"]
        while len(self._texts) > 64:  # of 77 tokens of width 1024: 20 MB
            self._texts.popitem(last=False)
        return known["states"]


DTYPES_BY_NAME = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def as_sources(given: Sequence[str | Path | Source | Mapping[str, Any]], defaults: Mapping[str, Any]) -> list[Source]:
    """A path of a TOML file stands for its sets. ValueError on settings that `Source` does not have."""
    known = [f.name for f in fields(Source)]
    found: list[Source] = []
    for one in given:
        if isinstance(one, Source):
            found.append(one)
            continue
        own = dict(one) if isinstance(one, Mapping) else {"path": one}
        if not isinstance(own.get("path"), str | os.PathLike):
            raise ValueError(f"a set of files has a path, a text; its settings are {shown(own)}")
        path = Path(own["path"])
        if path.suffix.lower() == ".toml":
            del own["path"]
            found += as_sources(read_sets(path), {**defaults, **own})
            continue
        for name in (values := {**defaults, **own}):
            if name not in known:
                raise ValueError(f"{shown(path)}: {name!r} is not a setting of a set of files{nearest(name, known)}")
        found.append(Source(**values))
    if not found:
        raise ValueError("no data: name a folder, a list or a file")
    return found


def in_whole_numbers(shares: Mapping[Any, Fraction]) -> dict[Any, int]:
    """The same proportions."""
    unit = math.lcm(*(share.denominator for share in shares.values()))
    return {key: int(share * unit) for key, share in shares.items()}


def turn(shares: Mapping[Any, int], number: int) -> tuple[Any, int]:
    """Whose turn number `number` (from 0) is when all take turns in proportion to `shares`, and how many it had before.

    The j-th turn of one with share p is due at (j + 1/2) / p: at any time each has had its share, to within a turn or
    two (Webster 1832, Sainte-Lague 1910: seats in a parliament).
    """
    if len(shares) == 1:
        return next(iter(shares)), number
    whole, n = sum(shares.values()), len(shares)
    # At least so many turns lie before the one asked for, floor((number - n / 2) p - 1 / 2): only the last ones are
    # gone through.
    had = {key: max(0, ((2 * number - n) * share - whole) // (2 * whole)) for key, share in shares.items()}
    for _ in range(number + 1 - sum(had.values())):
        now = min(shares, key=lambda key: Fraction(2 * had[key] + 1, shares[key]))
        had[now] += 1
    return now, had[now] - 1
