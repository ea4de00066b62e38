"""The world of the embedded model, drawn by code: one shape of one colour in one motion, on black.

There are 6 colours x 3 shapes x 6 motions = 108 combinations. The 16 of `UNSEEN` are never trained on. They have every
colour, shape and motion. `render` draws clips, and `captions` gives their captions. `analyse` reads colour, shape and
motion from the pixels of a video.

Fine-tuning teaches the model more: the motion "diagonally", the colours in `NEW_COLOURS`, and the word "crimson" for
red. The 108 combinations are not changed by these.
"""

import random
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

SIZE, FRAMES = 64, 16

COLOURS = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "magenta": (1.0, 0.0, 1.0),
    "white": (1.0, 1.0, 1.0),
}
NEW_COLOURS = {  # with the six: twelve whose brightest channel is 1, so that `analyse` sees each as bright as the old
    "orange": (1.0, 0.5, 0.0),
    "lime": (0.5, 1.0, 0.0),
    "cyan": (0.0, 1.0, 1.0),
    "azure": (0.0, 0.5, 1.0),
    "purple": (0.5, 0.0, 1.0),
    "rose": (1.0, 0.0, 0.5),
}
SYNONYMS = {"crimson": "red"}  # new words for known colours
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("left", "right", "up", "down", "growing", "shrinking")
NEW_MOTION = "diagonally"  # from the upper left to the lower right

COMBINATIONS = list(product(COLOURS, SHAPES, MOTIONS))


# 16 of 108 (14.8 %): at most one motion of each (colour, shape), at most one colour of each (shape, motion)
UNSEEN = [(c, s, MOTIONS[(i + 2 * j) % 6]) for (i, c), (j, s) in product(enumerate(COLOURS), enumerate(SHAPES))][:16]
TRAINED = [c for c in COMBINATIONS if c not in UNSEEN]

MOVING = (
    "a {colour} {shape} moving {way}",
    "a {colour} {shape} moves {way}",
    "{colour} {shape} moving {way}",
    "the {colour} {shape} is moving {way}",
    "a {shape} in {colour} moving {way}",
    "a {colour} {shape} goes {way}",
)
SIZING = (
    "a {colour} {shape} {way}",
    "a {way} {colour} {shape}",
    "{colour} {shape} {way}",
    "the {colour} {shape} is {way}",
    "a {shape} in {colour} {way}",
    "a {colour} {shape} that is {way}",
)
WAYS = {
    "left": ("left", "to the left"),
    "right": ("right", "to the right"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
    "growing": ("growing", "getting bigger"),
    "shrinking": ("shrinking", "getting smaller"),
}


def captions(colour: str, shape: str, motion: str) -> list[str]:
    """All captions of one combination. The first is the plainest."""
    templates = MOVING if motion in (*MOTIONS[:4], NEW_MOTION) else SIZING
    return [
        t.format(colour=colour, shape=shape, way=way)
        for way in WAYS.get(motion, (motion,))
        for t in templates
        if not (way.startswith("getting") and t.startswith("a {way}"))
    ]


@dataclass
class Clip:
    """What `render` draws: centre x, y and half-width in pixels, at the first and the last frame."""

    colour: str
    shape: str
    motion: str
    start: tuple[float, float, float]
    end: tuple[float, float, float]


def draw_clip(rng: random.Random, colour: str, shape: str, motion: str) -> Clip:
    """A clip with random place, size and speed. The shape never leaves the picture."""
    if motion == NEW_MOTION:
        r = rng.uniform(8.0, 12.0)
        dx, dy = rng.uniform(17.0, 24.0), rng.uniform(17.0, 24.0)  # 35 to 55 degrees
        x, y = rng.uniform(r + 1, SIZE - r - 1 - dx), rng.uniform(r + 1, SIZE - r - 1 - dy)
        return Clip(colour, shape, motion, (x, y, r), (x + dx, y + dy, r))
    if motion in MOTIONS[:4]:
        r = rng.uniform(8.0, 12.0)
        way = rng.uniform(20.0, 28.0)
        a = rng.uniform(r + 1, SIZE - r - 1 - way)  # along the motion
        b = rng.uniform(r + 1, SIZE - r - 1)  # across it
        first, last = (a, a + way) if motion in ("right", "down") else (a + way, a)
        if motion in ("left", "right"):
            return Clip(colour, shape, motion, (first, b, r), (last, b, r))
        return Clip(colour, shape, motion, (b, first, r), (b, last, r))
    small, big = rng.uniform(5.0, 7.5), rng.uniform(14.0, 19.0)
    x, y = rng.uniform(big + 1, SIZE - big - 1), rng.uniform(big + 1, SIZE - big - 1)
    first, last = (small, big) if motion == "growing" else (big, small)
    return Clip(colour, shape, motion, (x, y, first), (x, y, last))


def render(clips: list[Clip], frames: int = FRAMES) -> Tensor:
    """Clips -> video (b c f h w) in [0, 1]."""
    start = torch.tensor([c.start for c in clips], dtype=torch.float32)
    end = torch.tensor([c.end for c in clips], dtype=torch.float32)
    s = torch.linspace(0, 1, frames)[None, :, None] if frames > 1 else torch.zeros(1, 1, 1)
    return paint([(c.colour, c.shape) for c in clips], start[:, None] + s * (end - start)[:, None])


def paint(what: list[tuple[str, str]], places: Tensor) -> Tensor:
    """Colours and shapes, and where they are (b f 3), centre x, y and half-width in pixels -> video (b c f h w).

    Edges are antialiased by the distance to the outline, in pixels.
    """
    cx, cy, r = places.unbind(-1)  # each (b f)
    grid = torch.arange(SIZE, dtype=torch.float32) + 0.5
    x = grid[None, None, None, :] - cx[:, :, None, None]
    y = grid[None, None, :, None] - cy[:, :, None, None]
    r = r[:, :, None, None]
    distance = torch.empty(*places.shape[:2], SIZE, SIZE)
    for shape in SHAPES:
        rows = [i for i, (_, s) in enumerate(what) if s == shape]
        if not rows:
            continue
        u, v, q = x[rows], y[rows], r[rows]
        if shape == "circle":
            d = (u * u + v * v).sqrt() - q
        elif shape == "square":
            d = torch.maximum(u.abs(), v.abs()) - q
        else:  # apex up: two slanted edges through (0, -r) and (+-r, r), and the base at r
            d = torch.maximum((2 * u.abs() - v - q) / 5**0.5, v - q)
        distance[rows] = d
    palette = COLOURS | NEW_COLOURS
    colour = torch.tensor([palette[SYNONYMS.get(c, c)] for c, _ in what])
    return colour[:, :, None, None, None] * (0.5 - distance).clamp(0, 1)[:, None]


def centres(video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """video (c f h w) in [0, 1] -> of each frame the mean x and y of the bright pixels, and their number."""
    mask = video.float().amax(0) > 0.5
    area = mask.sum((1, 2)).float()
    grid = torch.arange(mask.shape[-1]).float()
    return (mask.sum(1) * grid).sum(1) / area.clamp(min=1), (mask.sum(2) * grid).sum(1) / area.clamp(min=1), area


def read_colour(video: Tensor, mask: Tensor, palette: dict[str, tuple[float, float, float]] = COLOURS) -> str | None:
    """The palette colour nearest to the mean colour of the foreground."""
    if mask.sum() < FRAMES:
        return None
    mean = (video * mask).sum((1, 2, 3)) / mask.sum()
    mean = mean / mean.max().clamp(min=1e-6)  # brightness is not colour
    colours = torch.tensor(list(palette.values()))
    return list(palette)[int((colours - mean).abs().sum(1).argmin())]


def read_new_colour(video: Tensor) -> str | None:
    """video (c f h w) in [0, 1] -> the nearest of all twelve colours, None where too little is bright."""
    video = video.float()
    mask = video.amax(0) > 0.5
    seen = mask.sum((1, 2)) >= 30
    return read_colour(video, (mask & seen[:, None, None]).float(), COLOURS | NEW_COLOURS)


def travel(video: Tensor) -> tuple[float, float, float] | None:
    """video (c f h w) in [0, 1] -> how far the middle goes over the whole clip, right and down, and how much it grows.

    In pixels, by straight-line fits over time; the third is of the half-width. None: fewer than half of the frames show
    something.
    """
    x, y, area = centres(video.float())
    seen = area >= 30
    if seen.sum() < FRAMES // 2:
        return None
    t = torch.arange(len(area)).float()[seen]
    t = t - t.mean()
    # sqrt(area) / 2 is about the half-width: exact for a square
    dx, dy, dr = (float((t * v[seen]).sum() / (t * t).sum()) * (len(area) - 1) for v in (x, y, area.sqrt() / 2))
    return dx, dy, dr


def reads_diagonally(video: Tensor) -> bool:
    """video (c f h w) in [0, 1] -> does the middle go from the upper left to the lower right, as `NEW_MOTION` says?

    It must go at least 10 pixels to the right and 10 down over the whole clip. Neither may be more than twice the other
    (27 to 63 degrees). The size may change by less than half of the change in a clip that grows.
    """
    if (way := travel(video)) is None:
        return False
    dx, dy, dr = way
    return dx >= 10 and dy >= 10 and 0.5 <= dx / dy <= 2 and abs(dr) < 3.5


def analyse(video: Tensor) -> tuple[str | None, str | None, str | None]:
    """video (c f h w) in [0, 1] -> what is seen: (colour, shape, motion), None where nothing clear is.

    Pixels above a brightness are the foreground. Its mean colour gives the colour. The share of its bounding box that
    it fills gives the shape (circle pi/4, square 1, triangle 1/2). Lines fitted to centre and size over time give the
    motion.
    """
    video = video.float()
    light = video.amax(0)  # (f h w)
    mask = light > 0.5
    area = mask.sum((1, 2)).float()
    seen = area >= 30  # a shape of half-width 4 has 32 pixels as a triangle
    colour = read_colour(video, (mask & seen[:, None, None]).float())
    if seen.sum() < FRAMES // 2:
        return colour, None, None

    cx, cy, _ = centres(video)

    # The box ends at the outermost rows and columns with at least 2 bright pixels. So one stray pixel does not move it.
    width = (mask.sum(1) >= 2).sum(1).float()
    height = (mask.sum(2) >= 2).sum(1).float()
    big = seen & (area >= 0.5 * area.max())  # small frames of a growing shape say little about corners
    fill = (area / (width * height).clamp(min=1))[big].median()
    shape = "triangle" if fill < 0.67 else "circle" if fill < 0.89 else "square"

    t = torch.arange(len(area)).float()[seen]
    t = t - t.mean()

    def change(v: Tensor) -> float:
        """How far the fitted line goes over the whole clip, pixels."""
        v = v[seen]
        return float((t * (v - v.mean())).sum() / (t * t).sum()) * (len(area) - 1)

    dx, dy, dr = change(cx), change(cy), change((width + height) / 4)
    # A moving shape goes 20 to 28 pixels; a growing one gains 6.5 to 14 of half-width. Both are put on one scale.
    dx, dy, dr = dx / 20, dy / 20, dr / 7
    scores = {"left": -dx, "right": dx, "up": -dy, "down": dy, "growing": dr, "shrinking": -dr}
    motion = max(scores, key=scores.__getitem__)
    return colour, shape, motion if scores[motion] >= 0.5 else None
