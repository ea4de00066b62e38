"""Draws what attention of the embedded model looks at: `python docs/figures/draw_attention.py [folder]`.

Above, a word: how much each pixel of a frame looks at it. Below, the frames: how much one looks at another.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from draw import HERE, INK, PAPER, SOFT, TEXT, TIME, Page
from einops import rearrange
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

from minit2v import TextToVideoSDPipeline, attention_maps

PROMPT, WORD = "a red circle moving right", "red"
STEPS, SEED, SHOWN = 10, 0, (0, 3, 6, 9, 12, 15)  # steps, seed, frames in the figure
TEXT_MAP, TEXT_HEADS = "up.0.blocks.1.spatial.block.attn2", (2, 1)
FRAME_MAP, FRAME_HEADS = "down.1.blocks.0.temporal.block.attn1", (0, 2, 4)


def collect() -> tuple[np.ndarray, Tensor, Tensor]:
    """(the video (f h w 3), how much pixels look at the word (heads f h w), frames at frames (heads q k)).

    Of the last step, for the prompt and not for the negative text; of frames the mean over the pixels.
    """
    pipe = TextToVideoSDPipeline.from_pretrained("shapes")
    pipe.set_progress_bar_config(disable=True)
    last = {STEPS - 1}
    with attention_maps(pipe.unet, names=(TEXT_MAP, FRAME_MAP), calls=last, average_heads=False) as maps:
        video = pipe(PROMPT, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(SEED)).frames[0]
    token = 1 + PROMPT.split().index(WORD)  # a word is one token here, behind the token that says: start
    (of_text,), (of_frames,) = maps[TEXT_MAP], maps[FRAME_MAP]
    side = int((of_text.shape[2] // len(video)) ** 0.5)
    word = rearrange(of_text[1, ..., token], "n (f h w) -> n f h w", f=len(video), h=side)
    return video, word, rearrange(of_frames, "(b p) n q k -> b p n q k", b=2)[1].mean(0)


def draw_attention(path: Path) -> Path:
    video, word, frames = collect()
    page, width, height = Page(1180, 868), 1180, 868
    side, gap, left, top = 132, 12, 300, 84

    def picture(x: float, y: float, size: float, pixels: Any, **style: Any) -> None:
        axes = page.figure.add_axes((x / width, 1 - (y + size) / height, size / width, size / height))
        axes.imshow(pixels, **style)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=SOFT, linewidth=0.6)

    def fade(colour: str) -> LinearSegmentedColormap:
        return LinearSegmentedColormap.from_list("", [PAPER, colour, INK])

    page.text(32, 32, f"Step {STEPS} of {STEPS}: \"{PROMPT}\"", 15, weight="bold")
    page.text(32, top + side / 2, "the video", 12.5, weight="bold")
    heads = [(f"head {n}", word[n]) for n in TEXT_HEADS] + [(f"mean of {len(word)} heads", word.mean(0))]
    for i, (which, at) in enumerate(heads):
        y = top + (i + 1) * (side + gap)
        page.text(32, y + side / 2 - 14, f"\"{WORD}\", {which}", 12.5, weight="bold")
        page.text(32, y + side / 2 + 12, f"white {at.min():.2f}, dark {at.max():.2f}", 11, color=SOFT)
        for j, s in enumerate(SHOWN):
            picture(left + j * (side + gap), y, side, at[s], cmap=fade(TEXT), vmin=at.min(), vmax=at.max())
    for j, s in enumerate(SHOWN):
        x = left + j * (side + gap)
        page.text(x + side / 2, top - 14, f"frame {s}", 11, ha="center", color=SOFT)
        picture(x, top, side, video[s])

    y, size = top + 4 * (side + gap) + 34, 150
    page.text(32, y + size / 2 - 42, "frames look at frames", 12.5, weight="bold")
    page.text(32, y + size / 2 + 2, "row: the frame that looks\ncolumn: the frame it looks at\n"
              f"white 0, dark {frames[list(FRAME_HEADS)].max():.2f}", 11, color=SOFT)
    for j, n in enumerate(FRAME_HEADS):
        x = left + j * 2 * (side + gap)
        dark = frames[list(FRAME_HEADS)].max()
        picture(x, y, size, frames[n], cmap=fade(TIME), vmin=0, vmax=dark)
        page.text(x + size / 2, y - 14, f"head {n}", 11, ha="center", color=SOFT)
        for place, s in ((8, 0), (size - 8, len(video) - 1)):
            page.text(x + size + 8, y + place, str(s), 10, color=SOFT)
    return page.save(path)


if __name__ == "__main__":
    print(draw_attention((Path(sys.argv[1]) if len(sys.argv) > 1 else HERE) / "attention.png"))
