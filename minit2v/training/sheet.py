"""A look at the data before training: `minit2v train --check`."""

from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minit2v_convert.rename import shown
from minit2v_convert.stream import replacing

from ..files.video import NANO
from .data import Data

COLUMNS, HIGHEST, MARGIN, LINE = 8, 160, 8, 18  # frames in a row; pixels of a frame, around it, and of a line of text


def look(data: Data, path: str | Path, batch: int = 1, rows: int = 12) -> str:
    """Writes a contact sheet, a PNG, and returns `data.summary`.

    A row is a clip of the first steps, decoded back from its latents: what the network can see of it. Beside it are its
    caption, its file, and which frames of it these are.
    """
    items, seen = [], set()
    for step in range(4 * rows):
        item = data.batch(step, 1)[0]
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
        about = f"{clip.media.name}: {len(item.frames)} frames of {clip.bucket.width}x{clip.bucket.height}"
        if not clip.facts.still:
            about += f"; frames {', '.join(str(item.frames[k]) for k in shown_frames)}"
            begin, end = (clip.facts.times[item.frames[k]] - clip.facts.times[0] for k in (0, -1))
            about += "" if clip.facts.even else f"; {begin / NANO:.2f} to {end / NANO:.2f} s"
        caption = item.caption or "(the empty caption)"
        strips.append(([shown(caption), shown(about) + ("; mirrored" if item.flip else "")], video))
    with replacing(path) as temporary:
        draw(strips).save(temporary, format="PNG")
    return data.summary(batch)


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` numbers, evenly, with the first and the last."""
    if count <= most:
        return list(range(count))
    return [round(k * (count - 1) / (most - 1)) for k in range(most)]


def draw(strips: list[tuple[list[str], Tensor]]) -> Any:
    """Lines of text, each with its frames (f 3 h w) in [-1, 1] below it, as one picture."""
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
    """One with letters of many languages where there is one on the machine, else Pillow's own."""
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
    """The line, with characters that the font does not have written as their numbers."""
    def glyph(c: str) -> bytes:
        try:
            return bytes(font.getmask(c))
        except UnicodeEncodeError:  # a font of one alphabet
            return missing

    missing = b""
    missing = glyph("\uffff")
    return "".join(c if c == " " or glyph(c) != missing else ascii(c)[1:-1] for c in line)
