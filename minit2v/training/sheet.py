"""A look at the data before training: `minit2v train --check`."""

import math
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minit2v_convert.rename import shown
from minit2v_convert.stream import replacing

from ..files.video import NANO
from .clips import decode
from .data import Data
from .sampler import Sampler
from .sources import Clip, chosen_frames, cut_off

EMPTY = "(the empty caption)"
CHANGED = 20.0  # dB of an autoencoder's picture, below which people see another colour or shape
COLUMNS, HIGHEST, MARGIN, LINE = 8, 160, 8, 18  # frames in a row; pixels of a frame, around it, and of a line of text


def look(data: Data, path: str | Path, batch: int = 1, rows: int = 12) -> str:
    """Write a contact sheet, a PNG, and return the `summary` of the data.

    Each row is a clip of the first steps. It is decoded from its latents, so it shows what the network can see. Above
    it stand its caption, its file, and the numbers of its frames. Where the autoencoder changes a clip strongly, a row
    with the frames of the file stands above.
    """
    items, seen, changed = [], set(), 0
    sampler = Sampler(data.clips, data.sources, data.seed)  # the same clips, and no caption is dropped
    for step in range(4 * rows):
        item = sampler.batch(step, 1)[0]
        if item.clip not in seen and len(items) < rows:
            items.append(item)
            seen.add(item.clip)
    strips = []
    for item in items:
        loaded, clip = data.load([item]), data.clips[item.clip]
        z = loaded.latents[0].transpose(0, 1)
        shown_frames = spread(len(z), COLUMNS)
        with torch.no_grad():
            z = z[shown_frames].to(data.vae.device, data.vae.dtype) / data.vae.config.scaling_factor
            video = data.vae.decode(z, chunk_size=4).float().cpu()
        frames = [item.frames[k] for k in shown_frames]
        own = decode(clip.media, clip.facts, frames, clip.bucket[1:], item.flip).float() / 127.5 - 1
        alike = 10 * math.log10(4 / max(float((video.clamp(-1, 1) - own).square().mean()), 1e-10))
        about = f"{clip.media.name}: {len(item.frames)} frames of {clip.bucket.width}x{clip.bucket.height}"
        if not clip.facts.still:
            about += f"; frames {', '.join(map(str, frames))}"
            begin, end = (clip.facts.times[item.frames[k]] - clip.facts.times[0] for k in (0, -1))
            about += "" if clip.facts.even else f"; {begin / NANO:.2f} to {end / NANO:.2f} s"
        lines = [shown(item.caption) or EMPTY, shown(about) + ("; mirrored" if item.flip else "")]
        if alike < CHANGED:
            changed += 1
            strips.append((lines, own))
            lines = [f"the same frames, as the model's autoencoder makes them ({alike:.0f} dB): only this is learned"]
        strips.append((lines, video))
    with replacing(path) as temporary:
        draw(strips).save(temporary, format="PNG")
    said = summary(data, batch)
    if changed:
        said += (f"\nthe model's autoencoder changes {changed} of {len(items)} clips in the picture strongly. It is "
                 "not trained, so videos cannot show what it loses")  # fmt: skip
    return said


def summary(data: Data, batch: int = 1) -> str:
    """Lines for people: how many clips there are, what is done to them, and which files are skipped and why.

    batch: how many samples a step uses.
    """
    clips, sampler = data.clips, data.sampler
    used = len({c.media.name for c in clips})
    lines = [f"files: {data.files}, used {used}, skipped {len(data.skipped)}; clips: {len(clips)}"]
    of_round = sampler.samples_of_a_round()
    for n, source in enumerate(data.sources):
        mine = [c for c in clips if c.source == n]
        stills = sum(c.facts.still for c in mine)
        share = sum(sets.get(n, 0) for sets in sampler.shares.values()) / of_round
        lines.append(f"  {shown(source.path)}: clips of videos {len(mine) - stills}, pictures {stills}, share of "
                     f"the samples {float(share):.0%}")  # fmt: skip
    steps = math.ceil(of_round / batch)
    often = f"once in {steps} steps on the average" if steps > 1 else "in every step"
    lines.append(f"with {batch} in a batch, a clip is used {often}. Each batch is of one bucket:")
    for bucket, sets in sorted(sampler.streams.items()):
        mine = [clips[n] for numbers in sets.values() for n in numbers]
        cut = max(cut_off(c.facts.shown_width, c.facts.height, bucket[1:]) for c in mine)
        small = sum(c.facts.shown_width < bucket.width or c.facts.height < bucket.height for c in mine)
        lines.append(f"  frames {bucket.frames}, width {bucket.width}, height {bucket.height}: clips {len(mine)}; "
                     f"at most {cut:.0%} of a picture is cut off"
                     + f"; {small} are smaller than that, and enlarged" * bool(small)
                     + "; fewer than a batch: some are in it several times" * (len(mine) < batch))  # fmt: skip
    spans = [span for clip in clips if (span := seconds_of(data, clip)) is not None]
    if spans:
        lines.append(f"the clips of videos last {min(spans):.2f} to {max(spans):.2f} seconds")
    free = [c.facts.rate for c in clips if seconds_of(data, c) is not None
            and data.sources[c.source].fps is None and data.sources[c.source].stride is None]  # fmt: skip
    if free and max(free) > 1.2 * min(free):
        lines.append(f"their files have {min(free):.3g} to {max(free):.3g} frames per second, so the same motion has "
                     f"different speeds. The option fps, here at most {min(free):.3g}, makes them equal")  # fmt: skip
    captions = {caption for clip in clips for caption in clip.captions}
    counted, counts, long = "their tokens are not counted", {}, []
    if data.count_tokens is not None:
        counts = {caption: data.count_tokens(caption) for caption in captions}
        long = sorted(caption for caption, (n, most) in counts.items() if n > most)
        counted = f"{len(long)} are cut at {max(most for _, most in counts.values())} tokens"
    lines.append(f"captions: {len(captions)} different ones; {data.without_caption} files have none; {counted}")
    lines += [f"  cut, with {counts[c][0]} tokens: {shown(c)}" for c in long[:3]]
    lines += [f"  and {len(long) - 3} more"] * (len(long) > 3)
    if any(reason.startswith("too short") for _, reason in data.skipped):
        lines.append("the option short (loop, hold or stretch) also uses files that are too short")
    if data.skipped:
        lines += ["skipped:", *(f"  {shown(name)}: {shown(reason)}" for name, reason in data.skipped)]
    return "\n".join(lines)


def seconds_of(data: Data, clip: Clip) -> float | None:
    """From the first frame of a clip to its last one. None for stills and for pictures without times."""
    if clip.facts.still or clip.facts.even or clip.bucket.frames == 1:
        return None
    chosen = chosen_frames(clip.facts, data.sources[clip.source], clip.start or 0)
    return abs(clip.facts.times[chosen[-1]] - clip.facts.times[chosen[0]]) / NANO


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 to `count` - 1, at equal distances, with the first and the last."""
    if count <= most:
        return list(range(count))
    return [round(k * (count - 1) / (most - 1)) for k in range(most)]


def draw(strips: list[tuple[list[str], Tensor]]) -> Any:
    """One picture of strips. Each strip has lines of text, and frames (f 3 h w) in [-1, 1] below them."""
    from PIL import Image, ImageDraw

    rows = []
    for lines, video in strips:
        frames = [Image.fromarray(((f.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
                  for f in video]  # fmt: skip
        scale = min(1.0, HIGHEST / frames[0].height)
        size = max(1, round(frames[0].width * scale)), max(1, round(frames[0].height * scale))
        rows.append((lines, [f if scale == 1 else f.resize(size, Image.Resampling.LANCZOS) for f in frames], size))
    wide = max(900, *(len(frames) * (size[0] + MARGIN) + MARGIN for _, frames, size in rows))
    font = find_font()
    high = MARGIN + sum(len(lines) * LINE + size[1] + 2 * MARGIN for lines, _, size in rows)
    sheet = Image.new("RGB", (wide, high), "white")
    pen, y = ImageDraw.Draw(sheet), MARGIN
    for lines, frames, size in rows:
        for k, line in enumerate(lines):
            line = drawable(line, font)
            while pen.textlength(line, font=font) > wide - 2 * MARGIN:
                line = line[: -max(4, len(line) // 20)].rstrip(" .") + "..."
            pen.text((MARGIN, y), line, fill="black" if k == 0 else "#666666", font=font)
            y += LINE
        for k, frame in enumerate(frames):
            sheet.paste(frame, (MARGIN + k * (size[0] + MARGIN), y))
        y += size[1] + 2 * MARGIN
    return sheet


def find_font() -> Any:
    """A font with letters of many languages, if the machine has one. Else Pillow's own font."""
    from PIL import ImageFont

    places = ["NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf", "Arial.ttf"]
    if (found := find_spec("matplotlib")) is not None and found.submodule_search_locations:
        places.append(f"{found.submodule_search_locations[0]}/mpl-data/fonts/ttf/DejaVuSans.ttf")
    for place in places:
        with suppress(OSError):
            return ImageFont.truetype(place, LINE - 5)
    try:
        return ImageFont.load_default(LINE - 5)
    except TypeError:  # Pillow without FreeType
        return ImageFont.load_default()


def drawable(line: str, font: Any) -> str:
    """The line. Characters that the font does not have are written as their numbers."""
    def glyph(c: str) -> bytes:
        try:
            return bytes(font.getmask(c))
        except UnicodeEncodeError:  # a font of one alphabet
            return missing

    missing = b""
    missing = glyph("\uffff")
    return "".join(c if c == " " or glyph(c) != missing else ascii(c)[1:-1] for c in line)
