"""Clips and captions for training: which files there are, and their latents and text states.

    data = Data(["clips"], vae=vae, encode_text=encode, cache="run/cache", frames=16, height=64, width=64, unit=16)
    batch = data.load(data.batch(step, 4))         # latents (b c f h w), text (b l d)

What is random about sample n is a function of the seed and n: its frames, caption, flip and the noise of the VAE.
"""

import logging
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from tqdm import tqdm

from minit2v_convert.rename import nearest, shown

from ..parallel import WEEK, World
from .cache import Cache, digest, digest_of
from .clips import Facts, Media, decode
from .layouts import Entry, read_layout
from .objective import generators
from .sampler import Item, Sampler
from .sources import Bucket, Clip, Source, as_sources, buckets, cut_off, last_start, starts

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Batch(NamedTuple):
    """latents (b c f h w) times the VAE's factor, and text (b l d): float32 on the CPU. numbers: of the samples."""

    latents: Tensor
    text: Tensor
    captions: list[str]
    sources: list[str]
    numbers: list[int]


class Data:
    """The clips of some sets of files, as latents and text states.

    sources: paths, `Source`s, or mappings with the fields of `Source`.
    defaults: fields of `Source` for the sets that do not give them.
    vae: a frozen AutoencoderKL, on the device where it runs.
    encode_text: captions -> text states (b l d).
    text_name: tells the text encoder from another one (`cache.digest_of`). Without it text states are not kept.
    cache: the folder for latents and text states. None: each clip is decoded and encoded at each visit.
    unit: height and width are multiples of it, in pixels.
    text_dropout: the share of captions that become empty. None: 0.1, or 0 where there is one clip.
    posterior: "sample" draws latents from what the VAE says, "mean" takes the mean.
    dtype: of the latents in the cache.
    workers: how many files are decoded at once. None: one for each processor, at most 8. It changes no sample.
    count_tokens: caption -> how many tokens it has, and how many are read. For the summary.
    world: processes that share the work of reading and encoding the files. All must make the same `Data`.

    All files are read once at the beginning. `skipped` lists those that cannot be used, with the reason. Each of them
    is named once in the log. ValueError where no clip is left.
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
        text_dropout: float | None = 0.0,
        posterior: str = "sample",
        dtype: str = "float32",
        workers: int | None = None,
        count_tokens: Callable[[str], tuple[int, int]] | None = None,
        progress: bool = False,
        world: World | None = None,
        **defaults: Any,
    ):
        self.sources = as_sources(sources, defaults)
        self.vae, self.encode_text, self.text_name = vae, encode_text, text_name
        self.cache, self.seed, self.unit = Cache(cache), seed, unit
        self.posterior, self.dtype, self.count_tokens = posterior, dtype, count_tokens
        self.world = world or World()
        self.progress = progress and self.world.is_first
        for name, value, known in (("posterior", posterior, ("sample", "mean")), ("dtype", dtype, [*DTYPES])):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}{nearest(value, known)}")
        if text_dropout is not None and not 0 <= text_dropout <= 1:
            raise ValueError(f"text_dropout is a share from 0 to 1, not {text_dropout!r}")
        self.vae_name = digest(digest_of(vae), str(vae.dtype), vae.tiling)
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1) if workers is None else workers)
        self._jobs: dict[str, Future[Tensor]] = {}  # name in the cache -> frames that are being decoded
        self._texts: OrderedDict[str, Tensor] = OrderedDict()
        self.skipped: list[tuple[str, str]] = []
        self.clips: list[Clip] = []
        try:
            self._read()
        except BaseException:
            self._pool.shutdown(wait=False, cancel_futures=True)
            raise
        self.text_dropout = (0.1 if len(self) > 1 else 0.0) if text_dropout is None else text_dropout
        self.sampler = Sampler(self.clips, self.sources, seed, self.text_dropout)

    @classmethod
    def of(cls, pipe: Any, sources: Sequence[Any], **options: Any) -> Self:
        """Data for a pipeline: with its VAE, its text encoder and its usual size. options: as of `Data`."""
        vae, tokenizer, encoder = pipe.vae, pipe.tokenizer, pipe.text_encoder
        factor, unet = vae.config.factor, pipe.unet.config
        usual = {"height": unet.sample_size * factor, "width": unet.sample_size * factor}

        def encode(captions: list[str]) -> Tensor:
            with warnings.catch_warnings():  # the summary counts captions that are cut
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
        """Tells this data from other data. It is the same on every machine and in every folder."""
        clips = [[c.facts.sha256, c.captions, c.source, c.bucket, c.start, c.last] for c in self.clips]
        ways = [[getattr(s, f.name) for f in fields(s) if f.name not in ("path", "folder")] for s in self.sources]
        return digest(clips, ways, self.seed, self.unit, self.text_dropout, self.posterior)

    def batch(self, step: int, batch: int) -> list[Item]:
        """What step `step` (from 0) uses, in batches of `batch` rows. All rows are of one bucket."""
        return self.sampler.batch(step, batch)

    # Reading the files -----------------------------------------------------------------------------------------------

    def _read(self) -> None:
        sizes = [buckets(source.height, source.width, self.unit) for source in self.sources]
        found: list[tuple[int, Entry]] = []
        for n, source in enumerate(self.sources):
            found += [(n, entry) for entry in read_layout(source.path, source.folder)]
        self.files = len({entry.media.name for _, entry in found})
        self.without_caption = sum(not entry.captions and entry.fault is None for _, entry in found)
        facts = self._examine(list(dict.fromkeys(entry.media for _, entry in found if entry.fault is None)))
        faults: dict[str, str] = {}  # a list may name a file several times
        for n, entry in found:
            said = entry.fault or facts[entry.media]
            try:
                if isinstance(said, str):
                    raise ValueError(said)
                self.clips += self._clips(n, entry, said, sizes[n])
            except ValueError as error:
                faults.setdefault(entry.media.name, str(error))
        self.skipped = [*faults.items()]
        for name, reason in self.skipped if self.world.is_first else ():
            logger.warning("%s is skipped: %s", shown(name), shown(reason))
        if not self.clips:
            every = "the only file is" if self.files == 1 else f"all of the {self.files} files are"
            raise ValueError(f"nothing is left to train on: {every} skipped, {shown(self.skipped[0][0])} because: "
                             f"{self.skipped[0][1]}")  # fmt: skip

    def _examine(self, files: Sequence[Media]) -> dict[Media, Facts | str]:
        """The facts of each file, or what is wrong with it.

        Of several processes each examines its share first. The others then find these facts in the cache.
        """

        def facts_of(media: Media) -> Facts | str:
            try:
                return self.cache.facts(media)
            except ValueError as error:
                return str(error)
            except OSError as error:
                return f"cannot be read ({error.strerror or error})"

        if self.world.size > 1 and self.cache.folder is not None:
            own = files[self.world.rank :: self.world.size]
            list(tqdm(self._pool.map(facts_of, own), "reading files", len(own), disable=not self.progress))
            self.world.barrier("reading files", WEEK)
        results = tqdm(self._pool.map(facts_of, files), "reading files", len(files), disable=not self.progress)
        return dict(zip(files, results, strict=True))

    def _clips(self, n: int, entry: Entry, facts: Facts, sizes: Sequence[tuple[int, int]]) -> list[Clip]:
        source = self.sources[n]
        captions = entry.captions or (() if source.prompt is None else (source.prompt,))
        if not captions:
            raise ValueError("has no caption; the option prompt gives one to all that have none")
        captions = tuple(f"{source.prefix}{caption}" for caption in captions)
        whole = facts.shown_width, facts.height
        size = min(sizes, key=lambda s: (cut_off(*whole, s), abs(s[0] * s[1] - source.height * source.width)))
        bucket = Bucket(1 if facts.still else source.frames, *size)
        last = max(0, last_start(facts, source))
        return [Clip(entry.media, facts, captions, n, bucket, start, last) for start in starts(facts, source, entry.at)]

    # Latents and text states -----------------------------------------------------------------------------------------

    def prefetch(self, items: Sequence[Item]) -> None:
        """Begin to decode what is not in the cache, and return at once. `load` of these samples waits for it.

        The VAE runs in `load`. Beside a training step on the same device it would save no time, and take memory.
        """
        for item in items:
            if (name := self._name(item)) not in self._jobs and not self.cache.has("latents", name):
                self._jobs[name] = self._pool.submit(self._decode, item)

    def load(self, items: Sequence[Item]) -> Batch:
        """The latents and text states of these samples. Their bucket must be the same."""
        self.prefetch(items)
        names = [self._name(item) for item in items]
        moments = {name: self._moments(name, item) for name, item in dict(zip(names, items, strict=True)).items()}
        latents = [self._drawn(moments[name], item.number) for name, item in zip(names, items, strict=True)]
        return Batch(torch.stack(latents), torch.stack([self.text(item.caption) for item in items]),
                     [item.caption for item in items], [self.clips[item.clip].media.name for item in items],
                     [item.number for item in items])  # fmt: skip

    def fill(self, steps: int, batch: int) -> None:
        """Put into the cache what steps 0 to `steps` - 1 will need, as far as their clips are the same at each visit.

        Several processes share the work. Clips that begin at random places are decoded while the steps run.
        """
        if self.cache.folder is None:
            return
        for caption in {"", *(x for c in self.clips for x in c.captions)}:
            self.text(caption)
        fixed = {n for n, clip in enumerate(self.clips) if clip.start is not None or clip.last == 0}
        most = sum(2 if self.sources[self.clips[n].source].flip else 1 for n in fixed)
        found: dict[str, Item] = {}
        for step in range(steps):
            if len(found) == most:
                break
            found |= {self._name(item): item for item in self.batch(step, batch) if item.clip in fixed}
        mine = [*found.items()][self.world.rank :: self.world.size]
        left = [(name, item) for name, item in mine if not self.cache.has("latents", name)]
        for n, (name, item) in enumerate(tqdm(left, "encoding clips", disable=not (left and self.progress))):
            self.prefetch([item for _, item in left[n : n + 8]])
            self._moments(name, item)
        self.world.barrier("encoding clips", WEEK)

    def cache_bytes(self, samples: int) -> int:
        """About how large the cache of a run of so many samples is. A clip that begins anywhere is there many times."""
        config, total = self.vae.config, 4.0 * self.text("").numel() * len({x for c in self.clips for x in c.captions})
        of_round = self.sampler.samples_of_a_round()
        for bucket, sets in self.sampler.streams.items():
            latent = (bucket.height // config.factor) * (bucket.width // config.factor) * config.latent_channels
            size = 2 * latent * bucket.frames * DTYPES[self.dtype].itemsize  # mean and log-variance
            for source, numbers in sets.items():
                visits = samples * float(self.sampler.shares[bucket][source] / of_round) / len(numbers)
                for clip in (self.clips[n] for n in numbers):
                    ways = (clip.last + 1 if clip.start is None else 1) * (2 if self.sources[source].flip else 1)
                    total += size * ways * (1 - (1 - 1 / ways) ** visits if ways > 1 else min(1.0, visits))
        return round(total)

    def _name(self, item: Item) -> str:
        """The name in the cache: a hash of everything that the content depends on."""
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
        return self.cache.write("latents", name, {k: m.to(DTYPES[self.dtype]) for k, m in moments.items()})

    def _drawn(self, moments: dict[str, Tensor], number: int) -> Tensor:
        """Latents (c f h w) of one sample, drawn from the distribution that the VAE gives."""
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
