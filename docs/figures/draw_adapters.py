"""Draws the figures of docs/adapters.md: `python docs/figures/draw_adapters.py [folder]`.

What is in them is read off the embedded models: the factors of the motion LoRA, the ids of the tokenizer.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from draw import HERE, INK, LINE, PAPER, PLAIN, SOFT, SPACE2, TEXT, TIME, TIME2, Page
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

from minit2v import AnimateDiffPipeline, DiffusionPipeline, MotionAdapter
from minit2v.models.clip_vision import CLIPVisionConfig
from minit2v.models.image_prompt import ImageProjection

LAYER = "down.1.blocks.0.motion.blocks.0.attn1.to_v"
PROMPT, WORD, COUNT = "a red toy moving right", "toy", 3
DIVERGING = LinearSegmentedColormap.from_list("", [SPACE2, PAPER, TIME])


def factors() -> tuple[Tensor, Tensor, Tensor]:
    """(weight (o i), up (o r), down (r i)) of a layer that `shapes-orbit` changes."""
    adapter = MotionAdapter.from_pretrained("shapes-motion")
    pipe = AnimateDiffPipeline.from_pretrained("shapes-image", motion_adapter=adapter)
    pipe.load_lora_weights("shapes-orbit")
    layer: Any = pipe.unet.get_submodule(LAYER)
    (branch,) = layer.branches
    return layer.weight.detach(), branch.up * branch.scale, branch.down


def draw_lora(path: Path) -> Path:
    weight, up, down = factors()
    width, height = 1180, 560
    page = Page(width, height)
    page.text(32, 34, "A layer with a low-rank branch", 15, weight="bold")

    # Left: what is computed.
    x, top, low, mid = 96, 170, 320, 245
    page.text(44, mid, "x", 15, ha="center", weight="bold")
    page.line((58, mid), (x, mid), arrow=False)
    page.line((x, mid), (x, top), (x + 60, top))
    page.line((x, mid), (x, low), (x + 28, low))
    page.box(x + 60, top - 45, 150, 90, PLAIN, INK, round_=6)
    page.text(x + 135, top - 12, "W", 17, ha="center", weight="bold")
    page.text(x + 135, top + 18, "frozen", 11.5, ha="center", color=SOFT)
    page.box(x + 28, low - 24, 86, 48, TIME2, INK, round_=6)
    page.text(x + 71, low, "D", 15, ha="center", weight="bold")
    page.box(x + 156, low - 24, 86, 48, TIME2, INK, round_=6)
    page.text(x + 199, low, "U", 15, ha="center", weight="bold")
    page.line((x + 114, low), (x + 156, low))
    page.text(x + 135, low - 36, f"r = {len(down)}", 11.5, ha="center", color=SOFT)
    end = x + 290
    page.line((x + 210, top), (end, top), (end, mid - 14))
    page.line((x + 242, low), (end, low), (end, mid + 14))
    page.text(x + 135, low + 46, "times w alpha / r", 12, ha="center", color=SOFT)
    page.box(end - 14, mid - 14, 28, 28, PAPER, INK, round_=14)
    page.text(end, mid, "+", 15, ha="center", weight="bold")
    page.line((end + 14, mid), (end + 64, mid))
    page.text(end + 76, mid, "y", 15, weight="bold")
    page.text(32, 440, "y = W x + w (alpha / r) U (D x)", 13.5)
    page.text(32, 472, "fused: W' = W + w (alpha / r) U D, no branch", 13.5)

    # Right: one layer of the embedded adapter.
    def picture(x: float, y: float, w: float, h: float, values: Tensor) -> None:
        axes = page.figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))
        most = float(values.abs().max())
        axes.imshow(values.float().numpy(), cmap=DIVERGING, vmin=-most, vmax=most, aspect="auto",
                    interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=SOFT, linewidth=0.6)

    o, i, r = len(up), down.shape[1], len(down)
    left, y, size, thin = 580, 110, 230, 36
    page.text(left, 34, "One layer of shapes-orbit", 15, weight="bold")
    page.text(left, 62, f"{LAYER}; blue below 0, orange above", 11.5, color=SOFT)
    picture(left, y, size, size, weight)
    page.text(left + size / 2, y - 14, f"W ({o}, {i})", 12, ha="center")
    page.text(left + size + 20, y + size / 2, "+", 16, ha="center", weight="bold")
    product = left + size + 40
    picture(product, y, size, size, up @ down)
    page.text(product + size / 2, y - 14, f"U D, of rank {r}", 12, ha="center")
    page.text(product - 40, y + size + 74, "=", 16, ha="center", weight="bold")
    picture(product, y + size + 24, thin, 100, up)
    page.text(product + thin / 2, y + size + 140, f"U ({o}, {r})", 12, ha="center")
    picture(product + thin + 60, y + size + 24, size - thin - 60, thin, down)
    page.text(product + thin + 60 + (size - thin - 60) / 2, y + size + 78, f"D ({r}, {i})", 12, ha="center")
    largest = [float(torch.linalg.matrix_norm(m.float(), 2)) for m in (weight, up @ down)]
    page.text(left, y + size + 74, f"{o * i:,} numbers changed,\n{(o + i) * r:,} in the file\n"
              f"largest singular values:\nW {largest[0]:.2f}, U D {largest[1]:.2f}", 11.5, color=SOFT)
    return page.save(path)


def draw_inversion(path: Path) -> Path:
    pipe = DiffusionPipeline.from_pretrained("shapes")
    rows, dim = pipe.text_encoder.tokens.weight.shape
    pipe.load_textual_inversion(torch.zeros(COUNT, dim), token=f"<{WORD}>")
    prompt = PROMPT.replace(WORD, f"<{WORD}>")
    ids = pipe.tokenizer.encode(prompt)
    names = ["start", *(pipe.tokenizer.decode([n]) for n in ids[1:-1]), "end"]

    page = Page(1180, 600)
    page.text(32, 34, f"\"{prompt}\", in which <{WORD}> has {COUNT} vectors", 15, weight="bold")
    step, size, top = 1116 / len(ids), 1116 / len(ids) - 14, 110
    table, depth = 400, 150
    page.text(32, top - 26, "tokens", 12, color=SOFT)
    page.text(32, top + 74, "ids", 12, color=SOFT)
    for k, (n, name) in enumerate(zip(ids, names, strict=True)):
        x, new = 32 + k * step, n >= rows
        page.box(x, top, size, 44, TIME2 if new else PLAIN, INK, round_=6)
        page.text(x + size / 2, top + 22, name, 13, ha="center")
        page.box(x, top + 88, size, 40, PAPER, TIME if new else LINE, round_=6)
        page.text(x + size / 2, top + 108, str(n), 13, ha="center")
        page.line((x + size / 2, top + 44), (x + size / 2, top + 88))
    first = 32 + ids.index(rows) * step
    page.text(first, top - 26, f"one word, {COUNT} of the {pipe.tokenizer.model_max_length} places", 12, color=TIME)
    page.text(32, table - 62, "the table of the text encoder", 13, weight="bold")
    wide, grown = 800, 800 * COUNT / 24  # the new rows are drawn wider than they are
    page.box(32, table, wide, depth, PLAIN, INK)
    page.box(32 + wide, table, grown + 60, depth, TIME2, INK)
    page.text(32 + wide / 2, table + depth / 2 - 14, f"{rows} rows of {dim} numbers", 14, ha="center")
    page.text(32 + wide / 2, table + depth / 2 + 16, "frozen, as all of the model", 12, ha="center", color=SOFT)
    page.text(32 + wide + (grown + 60) / 2, table + depth / 2 - 14, f"+ {COUNT}", 14, ha="center", weight="bold")
    page.text(32 + wide + (grown + 60) / 2, table + depth / 2 + 16, "learned", 12, ha="center", color=SOFT)
    page.text(32 + wide, table + depth + 22, f"ids {rows} to {rows + COUNT - 1}", 12, color=TIME)
    for k, n in enumerate(ids):
        x = 32 + k * step + size / 2
        at = 32 + wide * n / rows if n < rows else 32 + wide + (grown + 60) * (n - rows + 0.5) / COUNT
        page.line((x, top + 128), (at, table), colour=TIME if n >= rows else TEXT, width=1.4)
    return page.save(path)


def draw_ip_adapter(path: Path) -> Path:
    """The base adapter of Stable Diffusion 1.5: its numbers are those of the networks, made on `meta`."""
    with torch.device("meta"):
        projection = ImageProjection(1024, 4, 768)
        encoder = CLIPVisionConfig()
    tokens, wide = projection.tokens, projection.norm.normalized_shape[0]
    patches = (encoder.image_size // encoder.patch_size) ** 2

    page = Page(1180, 520)
    page.text(32, 34, "One attention to the text, with an IP-Adapter beside it", 15, weight="bold")

    def part(x: float, y: float, w: float, name: str, note: str, fill: str = PLAIN) -> None:
        page.box(x, y, w, 62, fill, INK, round_=6)
        page.text(x + w / 2, y + 24, name, 12.5, ha="center")
        page.text(x + w / 2, y + 46, note, 9, ha="center", color=SOFT)

    text, image, out = 110, 330, 220
    part(32, text, 130, "text", "the prompt")
    part(212, text, 170, "text encoder", f"CLIP: 77 tokens, {wide} wide")
    part(452, text, 150, "W_k, W_v", "frozen")
    part(32, image, 130, "picture", f"{encoder.image_size} x {encoder.image_size} pixels")
    part(212, image, 170, "image encoder", f"CLIP: {patches} patches to {encoder.projection_dim}")
    part(452, image, 150, "projection", f"{tokens} tokens, {wide} wide", TIME2)
    part(652, image, 130, "W_k', W_v'", "learned", TIME2)
    part(652, out, 130, "W_q", "frozen")
    page.text(545, out + 31, "x, the latents", 12, ha="center", color=SOFT)
    page.line((612, out + 31), (652, out + 31))
    for y, stops in ((text, (162, 212, 382, 452)), (image, (162, 212, 382, 452, 602, 652))):
        for begin, end in zip(stops[::2], stops[1::2], strict=True):
            page.line((begin, y + 31), (end, y + 31))
    part(842, text, 150, "attention", "q to the text")
    part(842, image, 150, "attention", "q to the picture", TIME2)
    page.line((602, text + 31), (842, text + 31))
    page.line((782, image + 31), (842, image + 31))
    page.line((782, out + 31), (917, out + 31), arrow=False)
    page.line((917, out + 31), (917, text + 62))
    page.line((917, out + 31), (917, image))
    end = 1060
    page.line((992, text + 31), (end, text + 31), (end, out + 17))
    page.line((992, image + 31), (end, image + 31), (end, out + 45))
    page.text(end + 10, image + 4, "times scale", 12, color=SOFT)
    page.box(end - 14, out + 17, 28, 28, PAPER, INK, round_=14)
    page.text(end, out + 31, "+", 15, ha="center", weight="bold")
    page.line((end + 14, out + 31), (end + 50, out + 31))
    page.text(end + 58, out + 31, "W_o", 13)
    page.text(32, 460, "orange: the adapter's file; all else is the model's, and stays as it is", 12, color=SOFT)
    return page.save(path)


def draw_all(folder: Path) -> list[Path]:
    return [draw_lora(folder / "lora.png"), draw_inversion(folder / "inversion.png"),
            draw_ip_adapter(folder / "ip_adapter.png")]


if __name__ == "__main__":
    for drawn in draw_all(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE):
        print(drawn)
