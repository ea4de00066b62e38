"""Draws the figures of docs/architecture.md: `python docs/figures/draw.py [folder]`, by default beside this file.

Every shape, count and name in them is read off the code (facts.py), so a figure cannot say what the code does not do.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import facts
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from minit2v.files.video import export_to_video
from minit2v.models.blocks import MotionModule, ResBlock, SpatialTransformer, TemporalConv, TemporalTransformer
from minit2v.models.clip import CLIPTextModel
from minit2v.models.tokenizer import CLIPTokenizer
from minit2v.models.unet import UNet
from minit2v.models.vae import AutoencoderKL
from minit2v.pipelines import DiffusionPipeline, TextToVideoSDPipeline
from minit2v.schedulers.base import randn
from minit2v.schedulers.ddim import DDIMScheduler
from minit2v.training import world

HERE = Path(__file__).resolve().parent
INK, SOFT, LINE = "#1f2933", "#5a6672", "#8793a0"
PAPER, MIST = "#ffffff", "#f3f5f7"
SPACE, SPACE2, TIME, TIME2, TEXT, PLAIN = "#3b78b5", "#9cc3e6", "#e07b27", "#f6c08d", "#3c8f5c", "#c9d0d8"
KIND_STYLE = {  # letter, colour, colour of the letter
    ResBlock: ("R", SPACE, PAPER),
    TemporalConv: ("C", TIME, PAPER),
    SpatialTransformer: ("S", SPACE2, INK),
    TemporalTransformer: ("T", TIME2, INK),
    MotionModule: ("M", TIME, PAPER),
}


class Page:
    """A white page measured in pixels, y downwards."""

    def __init__(self, width: int, height: int):
        self.figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor=PAPER)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")

    def text(self, x: float, y: float, words: str, size: float = 12.5, **style: Any) -> None:
        """Around y; one line by the middle of its capitals, so that neighbours stand on one line."""
        if "\n" not in words:
            y, style = y + 0.5 * size, {"va": "baseline"} | style
        style = {"color": INK, "ha": "left", "va": "center", "linespacing": 1.45} | style
        self.axes.text(x, y, words, fontsize=size, **style)

    def box(self, x: float, y: float, w: float, h: float, colour: str, edge: str = "none", round_: float = 0,
            width: float = 1.4, z: float = 2) -> None:
        if round_:
            style = f"round,pad=0,rounding_size={round_}"
            patch = FancyBboxPatch((x, y), w, h, boxstyle=style, facecolor=colour, edgecolor=edge, lw=width, zorder=z)
        else:
            patch = Rectangle((x, y), w, h, facecolor=colour, edgecolor=edge, lw=width, zorder=z)
        self.axes.add_patch(patch)

    def line(self, *points: tuple[float, float], colour: str = LINE, width: float = 1.8, arrow: bool = True,
             style: str = "-", z: float = 1) -> None:
        """Through the points, with a head at the last."""
        xs, ys = zip(*points, strict=True)
        self.axes.plot(xs, ys, color=colour, lw=width, ls=style, solid_joinstyle="round", zorder=z)
        if arrow:
            self.axes.annotate("", points[-1], points[-2], zorder=z, arrowprops=dict(
                arrowstyle="-|>,head_width=0.32,head_length=0.6", color=colour, lw=width, shrinkA=0, shrinkB=0))

    def dot(self, x: float, y: float, colour: str = LINE) -> None:
        self.axes.plot([x], [y], "o", color=colour, ms=5.5, zorder=3)

    def save(self, path: Path) -> Path:
        self.figure.savefig(path, facecolor=PAPER, metadata={"Software": None})
        return path


def shape(numbers: Sequence[int]) -> str:
    return "(" + ", ".join(map(str, numbers)) + ")"


# ------------------------------------------------------------------------------------------------------------- the UNet


def draw_unet(path: Path, model: facts.Model) -> Path:
    """The levels of ModelScope's UNet: its blocks with their channels, the skips, and where time enters."""
    unet, calls = model.unet, facts.trace_unet(model)
    page = Page(1600, 1200)
    stripe, tall, gap, narrow = 26, 62, 34, 38
    page.text(40, 40, "ModelScope's UNet, one prediction", 19, weight="bold")
    b, f = calls["conv_in"].x[0] // model.frames, model.frames
    page.text(40, 72, f"b = {b} videos of {f} frames, as under guidance. Between blocks x is (b f) c h w, "
              f"{b * f} images; only the orange parts see which images are frames of one video.", 13, color=SOFT)

    def draw_block(x: float, y: float, name: str) -> float:
        """Its four (or two) parts as stripes and its channels below. Returns its right edge."""
        parts = [calls[f"{name}.{part}"] for part in ("res", "temporal_conv", "spatial", "temporal")
                 if f"{name}.{part}" in calls]
        for n, part in enumerate(parts):
            letter, colour, ink = KIND_STYLE[type(part.module)]
            page.box(x + n * stripe, y, stripe, tall, colour)
            page.text(x + (n + 0.5) * stripe, y + tall / 2, letter, 13, ha="center", color=ink, weight="bold")
        right = x + len(parts) * stripe
        page.box(x, y, right - x, tall, "none", INK, width=1.2, z=3)
        channels = calls[name].channels
        label = str(channels[1]) if channels[0] == channels[1] else f"{channels[0]} → {channels[1]}"
        page.text((x + right) / 2, y + tall + 15, label, 12, ha="center", color=SOFT)
        return right

    def draw_conv(x: float, y: float, words: str) -> float:
        page.box(x, y, narrow, tall, PLAIN, INK, width=1.2)
        page.text(x + narrow / 2, y + tall / 2, words, 13.5, ha="center")
        return x + narrow

    last, pitch, step, top, first = len(unet.down) - 1, 192, 70, 212, 40 + narrow + stripe + gap
    rows = [top + pitch * i for i in range(last + 1)]
    mids = [y + tall / 2 for y in rows]
    ends: list[list[tuple[float, int]]] = []  # per level: where each skip leaves, and with how many channels

    # The way down.
    x = draw_conv(40, rows[0], "in")
    letter, colour, ink = KIND_STYLE[TemporalTransformer]
    page.box(x, rows[0], stripe, tall, colour, INK, width=1.2)
    page.text(x + stripe / 2, mids[0], letter, 13, ha="center", color=ink, weight="bold")
    page.text(40, 112, f"x {shape((b, *model.latents))}", 12.5)
    page.line((40 + narrow / 2, 124), (40 + narrow / 2, rows[0]))
    page.line((x + stripe, mids[0]), (first, mids[0]))
    entry = x + stripe
    for i, level in enumerate(unet.down):
        x, y = first + step * i, rows[i]
        skips = [(x - gap / 2, calls[f"down.{i}.blocks.0"].x[1])]
        for j in range(len(level.blocks)):
            right = draw_block(x, y, f"down.{i}.blocks.{j}")
            skips.append((right + gap / 2, calls[f"down.{i}.blocks.{j}"].y[1]))
            x = right + gap
            page.line((right, mids[i]), (x if j + 1 < len(level.blocks) or i < last else x - gap / 2, mids[i]),
                      arrow=j + 1 < len(level.blocks) or i < last)
        if i < last:
            draw_conv(x, y, "½")
            entry, bend = first + step * (i + 1) - gap - 14, y + tall + 38
            page.line((x + narrow / 2, y + tall), (x + narrow / 2, bend), (entry, bend), (entry, mids[i + 1]),
                      (entry + gap + 14, mids[i + 1]))
        ends.append(skips)
    leave = ends[last][-1][0]

    # The middle.
    middle_y = rows[last] + 140
    width = stripe * 6 + gap
    x = 700 - width / 2
    page.line((leave, mids[last]), (leave, middle_y + tall / 2), (x, middle_y + tall / 2))
    for j in range(len(unet.mid)):
        right = draw_block(x, middle_y, f"mid.{j}")
        if j + 1 < len(unet.mid):
            page.line((right, middle_y + tall / 2), (right + gap, middle_y + tall / 2))
        x = right + gap
    page.text(700, middle_y + tall + 42, "the middle", 12.5, ha="center", weight="bold")

    # The way up; a skip is concatenated before every block.
    source = (right, middle_y + tall / 2)
    for i in range(last, -1, -1):
        k, y = last - i, rows[i]
        level = unet.up[k]
        widths = [stripe * (4 if block.attention else 2) for block in level.blocks]
        apart = gap if i < last else 74  # of narrow blocks, for what stands below them
        x = 1560 - step * i - sum(widths) - apart * len(widths) - narrow - (52 if i == last else 0)
        enter = x - gap / 2 - 18
        if i == last:
            page.line(source, (enter, source[1]), (enter, mids[i]), (x, mids[i]))
        else:
            bend = y + tall + 38
            page.line(source, (source[0], bend), (enter, bend), (enter, mids[i]), (x, mids[i]))
        for j in range(len(level.blocks)):
            start, channels = ends[i][len(level.blocks) - 1 - j]
            lift = y - 22 - 21 * j
            page.dot(start, mids[i])
            page.dot(x - gap / 2, mids[i])
            page.line((start, mids[i]), (start, lift), (x - gap / 2, lift), (x - gap / 2, mids[i]), arrow=False)
            page.text(800, lift, f"{channels}", 11.5, ha="center", color=SOFT, backgroundcolor=PAPER,
                      bbox=dict(facecolor=PAPER, edgecolor="none", pad=1.5))
            right = draw_block(x, y, f"up.{k}.blocks.{j}")
            page.line((right, mids[i]), (right + apart, mids[i]))
            x = right + apart
        right = draw_conv(x, y, "×2" if i else "out")
        source = (x + narrow / 2, y)
        n, c, h, w = calls[f"down.{i}.blocks.0"].y
        heads, dim = facts.heads(unet.down[i].blocks[0]), unet.config.attention_head_dim
        attention = f"{heads} heads of {dim}" if heads else "no attention"
        centre = (ends[i][-1][0] + gap + (narrow if i < last else 0) + enter) / 2
        page.text(centre, y + 14, f"level {i}:  {h} x {w}", 15, ha="center", weight="bold")
        page.text(centre, y + 44, f"{c} channels, {attention}", 13, ha="center")
        page.text(centre, y + 69, shape((n, c, h, w)), 12.5, ha="center", color=SOFT)
    out = calls["conv_out"].y
    page.text(1560, 112, f"prediction {shape((b, out[1], f, *out[2:]))}", 12.5, ha="right")
    page.line((1560 - narrow / 2, rows[0]), (1560 - narrow / 2, 124))

    # What the letters mean.
    says = {
        ResBlock: "3 x 3 convolutions within each\nframe; adds the timestep",
        TemporalConv: "each pixel with its\nneighbours in time",
        SpatialTransformer: "the pixels of a frame attend to\neach other, then to the text",
        TemporalTransformer: f"each pixel attends to itself\nin all {f} frames",
    }
    x, y = 40, middle_y + tall + 88
    page.line((40, y - 24), (1560, y - 24), colour=PLAIN, width=1.2, arrow=False)
    for kind, words in says.items():
        letter, colour, ink = KIND_STYLE[kind]
        modules = [m for m in unet.modules() if isinstance(m, kind)]
        page.box(x, y, 30, 30, colour)
        page.text(x + 15, y + 15, letter, 13, ha="center", color=ink, weight="bold")
        page.text(x + 42, y + 8, kind.__name__, 13.5, weight="bold")
        count = f"{len(modules)} of them, {sum(map(facts.parameters, modules)) / 1e6:.0f} M parameters"
        page.text(x + 42, y + 32, count, 12)
        page.text(x + 42, y + 68, words, 12, color=SOFT)
        x += 388
    text = (b, model.tokens, unet.config.cross_attention_dim)
    notes = [
        f"every R gets the timestep embedding {shape(calls['time_mlp'].y)}",
        f"every S gets the text {shape(text)}",
        "½ convolution of stride 2",
        "×2 nearest neighbour, convolution",
        "on the grey lines: channels of a skip",
    ]
    for n, words in enumerate(notes):
        page.text(1140, middle_y - 22 + 25 * n, words, 12, color=SOFT)
    return page.save(path)


# ----------------------------------------------------------------------------------- who is the batch in space and time


def draw_batch(path: Path, model: facts.Model) -> Path:
    """Which cells of the grid of frames and pixels one query sees, and what is batch meanwhile."""
    videos = 2
    calls = facts.trace_unet(model, videos)
    spatial, temporal, conv = (calls[f"down.0.blocks.0.{n}"] for n in ("spatial", "temporal", "temporal_conv"))
    page = Page(1600, 1130)
    page.text(40, 40, "Who is the batch?", 19, weight="bold")
    page.text(40, 74, "One video, drawn as 4 frames of 3 x 3 pixels. The marked cell asks, the framed ones answer. One "
              "colour is one sequence;", 13, color=SOFT)
    page.text(40, 99, "other colours are batch, and never meet it. The numbers are those of level 0 of ModelScope "
              f"under guidance, where b = {videos}.", 13, color=SOFT)
    frames, side, cell, apart = 4, 3, 44, 36
    frame_colours = ["#3b78b5", "#6aa3d8", "#2f9e9e", "#8079c4"]
    pixel_colours = ["#e07b27", "#f2b25c", "#b5651d", "#d9534f", "#eb9a86", "#a83e56", "#c9a227", "#8f7a2d", "#e8cf6b"]

    def panel(x: float, y: float, title: str, where: str, colour: Callable[[int, int], str], asks: tuple[int, int],
              answers: Callable[[int, int], bool], norm_spans_frames: bool, lines: list[tuple[str, str]],
              tokens: int = 0) -> None:
        page.box(x, y, 745, 480, MIST, round_=12, z=0)
        page.text(x + 26, y + 34, title, 16.5, weight="bold")
        page.text(x + 26, y + 62, where, 12, color=SOFT, family="monospace")
        left, top = x + 52, y + 112
        for f in range(frames):
            fx = left + f * (side * cell + apart)
            page.text(fx + side * cell / 2, top - 15, f"frame {f}", 11.5, ha="center", color=SOFT)
            for p in range(side * side):
                cx, cy = fx + p % side * cell, top + p // side * cell
                seen = answers(f, p)
                page.box(cx, cy, cell, cell, colour(f, p), PAPER, width=1.6)
                if seen:
                    page.box(cx + 2.5, cy + 2.5, cell - 5, cell - 5, "none", INK, width=2.4, z=4)
                if (f, p) == asks:
                    page.axes.plot([cx + cell / 2], [cy + cell / 2], "o", color=PAPER, ms=19, zorder=4)
                    page.text(cx + cell / 2, cy + cell / 2, "?", 14, ha="center", weight="bold", zorder=5)
        bottom = top + side * cell
        right = left + frames * side * cell + (frames - 1) * apart
        if tokens:
            tx, ty, w = left + 150, bottom + 46, 46
            page.text(tx - 14, ty + 14, "text tokens", 12, ha="right", color=TEXT, weight="bold")
            for n in range(tokens):
                page.box(tx + n * (w + 6), ty, w, 28, TEXT)
                page.box(tx + n * (w + 6) + 2.5, ty + 2.5, w - 5, 23, "none", INK, width=2.2, z=4)
            ax = left + asks[0] * (side * cell + apart) + (asks[1] % side + 0.5) * cell
            ay = top + (asks[1] // side + 1) * cell
            for n in range(tokens):
                page.line((ax, ay), (tx + n * (w + 6) + w / 2, ty), colour=TEXT, width=1.3, arrow=False, z=3)
        else:
            starts = [left + f * (side * cell + apart) for f in range(frames)]
            spans = [(left, right)] if norm_spans_frames else [(start, start + side * cell) for start in starts]
            for a, z in spans:
                page.line((a, bottom + 14), (a, bottom + 24), (z, bottom + 24), (z, bottom + 14), colour=SOFT,
                          width=1.6, arrow=False)
                words = "GroupNorm" + ": one mean and variance per group over all frames" * norm_spans_frames
                page.text((a + z) / 2, bottom + 42, words, 12, ha="center", color=SOFT)
        row = y + 356
        for name, words in lines:
            page.text(x + 120, row, name, 12.5, ha="right", color=SOFT)
            page.text(x + 136, row, words, 12.5)
            row += 31

    n, heads, pixels, dim = spatial.queries[0]
    q, k = spatial.queries[1], spatial.keys[1]
    b, rows_, seq, _ = temporal.queries[0]
    image, kernel = conv.convs[0]
    f = model.frames
    panel(
        40, 130, "Spatial self-attention", "blocks.py  SpatialTransformer: block.attn1",
        lambda f, p: frame_colours[f], (1, 4), lambda f, p: f == 1, False,
        [("batch", f"b f = {n}: every frame by itself"),
         ("sequence", f"h w = {pixels} pixels of a frame"),
         ("q, k, v", f"{shape(spatial.queries[0])}   (b f) heads (h w) head_dim"),
         ("scores", f"{n} x {heads} x {pixels} x {pixels} = {n * heads * pixels * pixels / 1e6:.0f} M")],
    )
    panel(
        815, 130, "Cross-attention to the text", "blocks.py  SpatialTransformer: block.attn2",
        lambda f, p: "#7fb894", (1, 4), lambda f, p: False, False,
        [("batch", f"b = {q[0]}: the pixels of all frames ask the same text"),
         ("sequence", f"f h w = {q[2]} queries, {k[2]} keys: one set per video, not per frame"),
         ("q", f"{shape(q)}   b heads (f h w) head_dim"),
         ("k, v", f"{shape(k)}   b heads l head_dim")],
        tokens=7,
    )
    panel(
        40, 630, "Temporal self-attention", "blocks.py  TemporalTransformer: block.attn1, block.attn2",
        lambda f, p: pixel_colours[p], (1, 4), lambda f, p: p == 4, True,
        [("batch", f"b h w = {b}: every pixel by itself"),
         ("sequence", f"f = {seq} frames"),
         ("q, k, v", f"{shape(temporal.queries[0])}   (b h w) heads f head_dim"),
         ("scores", f"{b} x {rows_} x {seq} x {seq} = {b * rows_ * seq * seq / 1e6:.1f} M")],
    )
    panel(
        815, 630, "Temporal convolution", "blocks.py  TemporalConv: convs[i]",
        lambda f, p: pixel_colours[p], (1, 4), lambda f, p: p == 4 and abs(f - 1) <= 1, True,
        [("batch", f"b h w = {image[0] * image[3] * image[4]}: every pixel by itself"),
         ("window", f"{kernel[2]} frames; four of them in a row reach 4 frames each way"),
         ("x", f"{shape(image)}   b c f h w"),
         ("weight", f"{shape(kernel)}   c c {' '.join(map(str, kernel[2:]))}, zeros beyond the first and last frame")],
    )
    assert f == seq == image[2] and b == image[0] * image[3] * image[4]
    return page.save(path)


# --------------------------------------------------------------------------------------------------- one denoising step


def place(item: Any) -> tuple[str, str]:
    """(file, name) of a function or class, as the repository has them."""
    root = HERE.parents[1]
    return Path(inspect.getsourcefile(item)).resolve().relative_to(root).as_posix(), item.__qualname__


def draw_step(path: Path, model: facts.Model) -> Path:
    """From the prompt to the file, and what one turn of the loop does, with the functions that do it."""
    c, f, h, w = model.latents
    factor, dim = model.vae.config.factor, model.unet.config.cross_attention_dim
    one, two = (1, c, f, h, w), (2, c, f, h, w)
    turns = inspect.signature(TextToVideoSDPipeline.__call__).parameters["num_inference_steps"].default
    page = Page(1600, 890)
    page.text(40, 40, "From the text to the video", 19, weight="bold")
    page.text(40, 72, f"The shapes are ModelScope's: {h * factor} x {w * factor} pixels, {f} frames, one video.", 13,
              color=SOFT)

    def box(x: float, y: float, width: float, title: str, item: Any, words: str, colour: str) -> None:
        tall = 122
        file, name = place(item)
        page.box(x, y, width, tall, PAPER, colour, round_=9, width=2.4)
        page.text(x + width / 2, y + 24, title, 14.5, ha="center", weight="bold", zorder=4)
        page.text(x + width / 2, y + 53, words, 12, ha="center", color=INK, zorder=4)
        page.text(x + width / 2, y + tall - 33, file.removeprefix("minit2v/"), 10.8, ha="center", family="monospace",
                  color=SOFT, zorder=4)
        page.text(x + width / 2, y + tall - 14, name.split(".")[-1] if len(name) > 28 else name, 10.8, ha="center",
                  family="monospace", color=SOFT, zorder=4)

    def on(x: float, y: float, words: str, **style: Any) -> None:
        page.text(x, y, words, 12, **({"ha": "center", "color": INK} | style))

    # Once: the text.
    prompt = world.captions(*world.TRAINED[0])[0]
    page.text(40, 122, "once", 13, weight="bold", color=TEXT)
    page.box(40, 146, 236, 92, MIST, round_=9)
    page.text(158, 178, f"“{prompt}”", 11.4, ha="center")
    page.text(158, 208, "and the negative “”", 12, ha="center", color=SOFT)
    page.line((276, 192), (316, 192))
    box(316, 131, 236, "tokenizer", CLIPTokenizer.__call__, "words to numbers", TEXT)
    page.line((552, 192), (670, 192))
    on(607, 172, "ids, each")
    on(607, 212, shape((1, model.tokens)), color=SOFT)
    box(670, 131, 230, "text encoder", CLIPTextModel.forward, "a vector for each token", TEXT)
    page.line((785, 253), (785, 412), colour=TEXT, width=2.2)
    on(798, 286, f"context, negative and positive: {shape((2, model.tokens, dim))}", ha="left", color=TEXT)

    page.text(1010, 168, "x at noise level t:", 13, color=SOFT)
    page.text(1010, 200, r"$x_t = \alpha_t\, x_0 + \sigma_t\, \epsilon, \qquad \alpha_t^2 + \sigma_t^2 = 1$", 16)
    page.text(1010, 234, r"$x_0$ clean latents, $\epsilon$ noise", 13, color=SOFT)

    # The loop.
    page.box(262, 316, 1308, 330, MIST, round_=14, z=0)
    page.text(286, 342, "every step", 13, weight="bold", color=SPACE)
    file, name = place(DiffusionPipeline._denoise_once)
    page.text(1546, 342, f"{file.removeprefix('minit2v/')}  {name}", 10.8, ha="right", family="monospace", color=SOFT)
    box(40, 412, 190, "noise", randn, "a seed's numbers", LINE)
    page.line((230, 473), (292, 473))
    page.box(292, 432, 150, 82, PAPER, INK, round_=9, width=2)
    page.text(367, 456, "x at t", 14.5, ha="center", weight="bold", zorder=4)
    page.text(367, 486, shape(one), 11.8, ha="center", color=SOFT, zorder=4)
    page.line((442, 473), (620, 473))
    on(529, 456, "twice: [x, x]")
    on(529, 493, shape(two), color=SOFT)
    box(620, 412, 270, "UNet", UNet.forward, "what is noise in x?", SPACE)
    on(700, 372, "t", ha="center")
    page.line((700, 384), (700, 412))
    page.line((890, 473), (1050, 473))
    on(968, 456, r"$\epsilon$, twice")
    on(968, 493, shape(two), color=SOFT)
    page.box(1050, 412, 216, 122, PAPER, TIME, round_=9, width=2.4)
    page.text(1158, 436, "guidance", 14.5, ha="center", weight="bold", zorder=4)
    formula = "$\\epsilon = \\epsilon_{neg}$\n$+\\, g\\,(\\epsilon_{text} - \\epsilon_{neg})$"
    page.text(1158, 479, formula, 14, ha="center", zorder=4)
    page.text(1158, 518, "(in _denoise_once itself)", 10.8, ha="center", color=SOFT, zorder=4)
    page.line((1266, 473), (1334, 473))
    on(1297, 456, r"$\epsilon$")
    box(1334, 412, 216, "scheduler", DDIMScheduler.step, "x at t → x at s < t", TIME)
    page.line((1442, 534), (1442, 606), (367, 606), (367, 514), colour=SPACE, width=2.4)
    on(900, 588, f"t becomes s: {turns} steps by default, from pure noise to clean latents", color=SPACE)

    page.dot(367, 606, SPACE)

    # Once: the pixels.
    page.line((367, 606), (367, 761), (430, 761))
    page.text(40, 761, "once", 13, weight="bold", color=TEXT)
    on(384, 674, f"after the last step: latents {shape(one)}", ha="left", color=SOFT)
    box(430, 700, 230, "VAE", AutoencoderKL.decode, f"each frame, {factor} x larger", TEXT)
    page.line((660, 761), (840, 761))
    on(750, 744, "pixels")
    on(750, 780, shape((f, 3, h * factor, w * factor)), color=SOFT)
    box(840, 700, 230, "file", export_to_video, "frames to mp4", TEXT)
    page.line((1070, 761), (1130, 761))
    page.text(1144, 761, "video.mp4", 14, weight="bold")
    page.text(40, 862, "Sizes in brackets: (b, c, f, h, w) for latents, (b, l) for ids, (b, l, d) for the text, "
              "(b f, c, h, w) for pixels; b = 2 is the negative and the positive text.", 12, color=SOFT)
    return page.save(path)


# ------------------------------------------------------------------------------- AnimateDiff: what is frozen, what not


def millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def draw_motion(path: Path, model: facts.Model) -> Path:
    """The image model with a motion module in every block: frozen parts blue, trained ones orange."""
    unet, calls = model.unet, facts.trace_unet(model)
    last, tall, stripe, gap, narrow, out = len(unet.down) - 1, 54, 30, 30, 38, 9
    page = Page(1600, 1160)
    page.text(40, 40, "AnimateDiff: what is frozen and what is trained", 19, weight="bold")
    page.text(40, 72, "Stable Diffusion 1.5's UNet, and the motion adapter whose modules are put into its blocks. "
              "Numbers in M are millions of parameters.", 13, color=SOFT)

    # The two parts.
    count, moving = facts.parameters(unet), facts.trained(unet)
    names = {name.split(".motion.")[0] for name, p in unet.named_parameters() if p.requires_grad}
    assert names == {f"{n}" for n, m in unet.named_modules() if getattr(m, "motion", None) is not None}
    for x, width, colour, title, words in (
        (40, 890, SPACE, f"frozen: {millions(count - moving)}", "the image model; any fine-tune of it fits here"),
        (950, 610, TIME, f"trained: {millions(moving)}", f"the adapter: {len(names)} motion modules"),
    ):
        page.box(x, 100, width, 58, colour, round_=9)
        page.text(x + 24, 129, title, 18, weight="bold", color=PAPER, zorder=4)
        page.text(x + width - 24, 129, words, 13.5, ha="right", color=PAPER, zorder=4)

    def draw_block(x: float, y: float, name: str) -> float:
        """Its parts as stripes, the trained one reaching out, and its channels below. Returns its right edge."""
        right = x
        for part in ("res", "spatial", "motion"):
            if (call := calls.get(f"{name}.{part}")) is None:
                continue
            letter, colour, ink = KIND_STYLE[type(call.module)]
            free = facts.trained(call.module) > 0
            assert free == (part == "motion")
            page.box(right, y - out * free, stripe, tall + 2 * out * free, colour, INK, width=1.1, z=3 if free else 2)
            page.text(right + stripe / 2, y + tall / 2, letter, 13, ha="center", color=ink, weight="bold", zorder=4)
            right += stripe
        channels = calls[name].channels
        label = str(channels[1]) if channels[0] == channels[1] else f"{channels[0]} → {channels[1]}"
        page.text((x + right) / 2, y + tall + out + 13, label, 11.5, ha="center", color=SOFT)
        return right

    def draw_conv(x: float, y: float, words: str) -> float:
        page.box(x, y, narrow, tall, SPACE2, INK, width=1.1)
        page.text(x + narrow / 2, y + tall / 2, words, 13.5, ha="center", zorder=4)
        return x + narrow

    def counts(x: float, y: float, *parts: Any) -> None:
        size, free = sum(map(facts.parameters, parts)), sum(map(facts.trained, parts))
        page.text(x - 12, y, f"frozen {millions(size - free)}", 12.5, ha="right", color=SPACE, weight="bold")
        page.text(x + 12, y, f"trained {millions(free)}", 12.5, color=TIME, weight="bold")

    pitch, step, top, first, centre = 128, 70, 236, 40 + narrow + 2 * gap, 776
    rows = [top + pitch * i for i in range(last + 1)]
    mids = [y + tall / 2 for y in rows]
    b, f = 2, model.frames
    page.text(40, 198, f"x {shape((b, *model.latents))}", 12.5)
    page.line((40 + narrow / 2, 210), (40 + narrow / 2, rows[0]))

    # The way down.
    x = draw_conv(40, rows[0], "in")
    page.line((x, mids[0]), (first, mids[0]))
    ends = []
    for i, level in enumerate(unet.down):
        x = first + step * i
        for j in range(len(level.blocks)):
            right = draw_block(x, rows[i], f"down.{i}.blocks.{j}")
            x = right + gap
            if j + 1 < len(level.blocks) or level.resample is not None:
                page.line((right, mids[i]), (x, mids[i]))
        ends.append(right + gap / 2)
        if level.resample is not None:
            draw_conv(x, rows[i], "½")
            bend, entry, after = rows[i] + tall + 40, first + step * (i + 1) - gap, first + step * (i + 1)
            page.line((x + narrow / 2, rows[i] + tall), (x + narrow / 2, bend), (entry, bend), (entry, mids[i + 1]),
                      (after, mids[i + 1]))

    # The middle.
    middle = rows[last] + pitch
    x = centre - (4 * stripe + gap) / 2
    page.line((right, mids[last]), (ends[last], mids[last]), (ends[last], middle + tall / 2), (x, middle + tall / 2))
    for j in range(len(unet.mid)):
        right = draw_block(x, middle, f"mid.{j}")
        if j + 1 < len(unet.mid):
            page.line((right, middle + tall / 2), (right + gap, middle + tall / 2))
        x = right + gap
    counts(centre, middle + tall + 48, unet.mid)
    page.text(centre, middle - 28, "the middle", 13.5, ha="center", weight="bold")
    source = (right, middle + tall / 2)

    # The way up.
    for i in range(last, -1, -1):
        k = last - i
        level = unet.up[k]
        wide = [stripe * sum(f"up.{k}.blocks.{j}.{p}" in calls for p in ("res", "spatial", "motion"))
                for j in range(len(level.blocks))]
        apart = gap if i < last else 52  # of narrow blocks, for what stands below them
        x = 1560 - step * i - sum(wide) - apart * len(wide) - narrow
        enter = x - gap
        if i == last:
            page.line(source, (enter, source[1]), (enter, mids[i]), (x, mids[i]))
        else:
            bend = rows[i] + tall + 40
            page.line(source, (source[0], bend), (enter, bend), (enter, mids[i]), (x, mids[i]))
        page.line((ends[i], mids[i]), (enter, mids[i]), colour=PLAIN, width=5, arrow=False, z=0)
        page.text((ends[i] + enter) / 2, mids[i], "skips", 11, ha="center", color=SOFT,
                  bbox=dict(facecolor=PAPER, edgecolor="none", pad=2))
        for j in range(len(level.blocks)):
            right = draw_block(x, rows[i], f"up.{k}.blocks.{j}")
            page.line((right, mids[i]), (right + apart, mids[i]))
            x = right + apart
        draw_conv(x, rows[i], "×2" if level.resample is not None else "out")
        source = (x + narrow / 2, rows[i])
        _, c, h, w = calls[f"down.{i}.blocks.0"].y
        page.text((ends[i] + enter) / 2, mids[i] - 32, f"level {i}:  {h} x {w}, {c} channels", 13.5, ha="center",
                  weight="bold")
        counts((ends[i] + enter) / 2, mids[i] + 30, unet.down[i], level)
    prediction = calls["conv_out"].y
    page.text(1560, 198, f"prediction {shape((b, prediction[1], f, *prediction[2:]))}", 12.5, ha="right")
    page.line((1560 - narrow / 2, rows[0]), (1560 - narrow / 2, 210))
    levels = sum(facts.parameters(part) - facts.trained(part) for part in (unet.down, unet.mid, unet.up))
    notes = [("R  ResBlock, gets the timestep", SPACE), ("S  SpatialTransformer, gets the text", SPACE),
             ("M  MotionModule, sees all frames", TIME),
             (f"in, out, time_mlp: frozen {millions(count - moving - levels)}", SPACE)]
    for n, (words, colour) in enumerate(notes):
        page.text(1216, middle - 6 + 27 * n, words, 12.5, color=colour, weight="bold")

    # One block.
    name, y = "down.0.blocks.0", middle + 170
    motion, module = calls[f"{name}.motion"], calls[f"{name}.motion"].module
    page.line((40, y - 34), (1560, y - 34), colour=PLAIN, width=1.2, arrow=False)
    page.text(40, y, "The first block", 15, weight="bold")
    page.text(226, y, f"x and y {shape(motion.x)}, (b f) c h w: {b} videos of {f} frames. Inside M: z "
              f"{shape(calls[f'{name}.motion.proj_in'].y)}, b f (h w) c;  q, k, v {shape(motion.queries[0])}, "
              "(b h w) heads f head_dim", 12.5, color=SOFT)
    y += 112
    page.box(432, y - 76, 1058, 152, "#fbe9d9", round_=12, z=0)
    page.text(450, y - 56, "MotionModule", 12.5, weight="bold", color=TIME)
    page.text(1472, y + 60, f"{millions(facts.parameters(module))}, the adapter's", 12, ha="right", color=TIME)
    parts = [
        (40, 40, None, "x", ""),
        (92, 100, SPACE, "ResBlock", millions(facts.parameters(calls[f"{name}.res"].module))),
        (210, 188, SPACE, "SpatialTransformer", millions(facts.parameters(calls[f"{name}.spatial"].module))),
        (448, 128, TIME, "GroupNorm", "per frame"),
        (592, 84, TIME, "proj_in", millions(facts.parameters(module.proj_in))),
        (692, 204, TIME, "z + attn1(LN(z) + P)", "P: which frame it is"),
        (920, 204, TIME, "z + attn2(LN(z) + P)", "over the frames again"),
        (1148, 148, TIME, "z + ff(LN(z))", "each by itself"),
        (1320, 150, TIME, "proj_out", "0 before training"),
    ]
    for (x, width, colour, title, words), following in zip(parts, parts[1:] + [(1510, 0, None, "", "")], strict=True):
        if colour is None:
            page.text(x, y, title, 15, weight="bold")
            page.line((x + 20, y), (following[0], y))
            continue
        page.box(x, y - 34, width, 68, PAPER, colour, round_=8, width=2.2)
        page.text(x + width / 2, y - 10, title, 11.8, ha="center", weight="bold", zorder=4)
        page.text(x + width / 2, y + 20, words, 11, ha="center", color=SOFT, zorder=4)
        page.line((x + width, y), (following[0], y))
    page.dot(413, y)
    page.line((413, y), (413, y + 96), (1524, y + 96), (1524, y + 14))
    page.axes.plot([1524], [y], "o", mfc=PAPER, mec=INK, ms=18, mew=1.6, zorder=4)
    page.text(1524, y, "+", 15, ha="center", weight="bold", zorder=5)
    page.line((1538, y), (1566, y))
    page.text(1582, y, "y", 15, ha="center", weight="bold")
    return page.save(path)


FIGURES = {"unet.png": draw_unet, "batch.png": draw_batch, "step.png": draw_step}


def draw_all(folder: Path, model: facts.Model, motion: facts.Model) -> list[Path]:
    return [*(draw(folder / name, model) for name, draw in FIGURES.items()), draw_motion(folder / "motion.png", motion)]


if __name__ == "__main__":
    here = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    for drawn in draw_all(here, facts.modelscope(), facts.animatediff()):
        print(drawn)
