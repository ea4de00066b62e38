"""Draws the UNet as SVG: the encoder on the left, the decoder on the right, and a line for each skip connection."""

from html import escape

from ..models.blocks import MotionModule, ResBlock, SpatialTransformer, TemporalConv, TemporalTransformer
from .trace import Node, Traced

WIDTH = 440  # of the picture, in SVG units; small enough to be read on a phone
BOX, TALL, STEP, HEAD = 170, 42, 52, 26  # width and height of a block, distance of rows, height of a level's title
INSET = 8  # each level is this much narrower on both sides than the one above
KINDS = {  # class -> (word in the picture, class in page.css)
    ResBlock: ("res", "space"),
    TemporalConv: ("conv", "time"),
    SpatialTransformer: ("space", "space2"),
    TemporalTransformer: ("time", "time2"),
    MotionModule: ("motion", "time2"),
}


class Picture:
    """Collects SVG elements. The user can select those in `boxes`."""

    def __init__(self, traced: Traced):
        self.traced = traced
        self.below: list[str] = []
        self.words: list[str] = []
        self.boxes: list[str] = []

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        self.words.append(f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>')

    def line(self, points: str, kind: str, arrow: bool = True) -> None:
        end = ' marker-end="url(#arrow)"' * arrow
        self.below.append(f'<path d="{points}" class="{kind}"{end}/>')

    def level(self, y: float, height: float) -> None:
        self.below.append(f'<rect class="level" x="4" y="{y:g}" width="{WIDTH - 8}" height="{height:g}" rx="8"/>')

    def box(self, x: float, y: float, w: float, node: Node, words: str) -> None:
        """A module that can be selected. If it is a block, its parts are drawn inside."""
        parts = [c for c in self.traced.children(node.name) if type(c.module) in KINDS and node.name != "unet"]
        kind = "block" if parts else f"one {KINDS.get(type(node.module), ('', 'plain'))[1]}"
        label = f"{node.name}, {type(node.module).__name__}"
        inner = [f'<rect class="frame" x="{x:g}" y="{y:g}" width="{w:g}" height="{TALL}" rx="5"/>',
                 f'<text x="{x + 7:g}" y="{y + 12.5:g}" class="name">{escape(words)}</text>']  # fmt: skip
        if parts:
            step = (w - 8) / len(parts)
            for i, part in enumerate(parts):
                word, colour = KINDS[type(part.module)]
                left = x + 4 + i * step
                inner.append(
                    f'<g class="part {colour}" data-node="{part.name}"><rect x="{left + 1:g}" y="{y + 16.5:g}" '
                    f'width="{step - 2:g}" height="15.5" rx="3"/><text x="{left + step / 2:g}" y="{y + 27.8:g}" '
                    f'text-anchor="middle">{escape(word)}</text></g>'
                )
        elif w > 100:
            shape = " × ".join(map(str, node.output))
            inner.append(f'<text x="{x + 7:g}" y="{y + 27.8:g}" class="shape">{escape(shape)}</text>')
        inner.append(f'<rect class="bar" data-node="{node.name}" x="{x + 4:g}" y="{y + TALL - 6:g}" '
                     f'width="0" data-full="{w - 8:g}" height="3.5" rx="1.5"/>')  # fmt: skip
        self.boxes.append(
            f'<g class="box {kind}" data-node="{node.name}" role="button" tabindex="-1" aria-pressed="false" '
            f'aria-label="{escape(label)}" data-x="{x + w / 2:g}" data-y="{y + TALL / 2:g}">{"".join(inner)}</g>'
        )


def draw(traced: Traced) -> str:
    """The SVG of a model. The attribute `data-node` names a node of the trace."""
    picture, nodes, unet = Picture(traced), traced.nodes, traced.unet
    levels, last = len(unet.down), len(unet.down) - 1
    p = picture
    third = (WIDTH - 40) / 3
    for i, (name, words) in enumerate((("text_encoder", "text encoder"), ("unet", "UNet, whole"),
                                       ("vae", "VAE decoder"))):  # fmt: skip
        if name in nodes:
            p.box(10 + i * (third + 10), 8, third, nodes[name], words)
    if "text_encoder" in nodes:
        p.line(f"M {10 + third:g} {8 + TALL / 2:g} h 8", "flow")
    p.line(f"M {20 + 2 * third:g} {8 + TALL / 2:g} h 8", "flow")
    p.text(10, 64, "once, at the start", "soft")
    p.text(WIDTH / 2, 64, "in every step", "soft", "middle")
    p.text(WIDTH - 10, 64, "once, at the end", "soft", "end")

    left, right = 14.0, WIDTH - 14.0 - BOX
    y = 92.0
    wide, half = 140.0, 82.0  # of conv_in, and of the others in its row
    p.text(left, y - 6, "noisy latents", "soft")
    p.text(right + BOX, y - 6, "prediction", "soft", "end")
    p.box(left, y, wide, nodes["unet.conv_in"], "conv_in")
    p.box(left + wide + 9, y, half, nodes["unet.time_mlp"], "time_mlp")
    p.box(right, y, half, nodes["unet.norm_out"], "norm_out")
    p.box(right + half + 6, y, half, nodes["unet.conv_out"], "conv_out")
    p.text(left + wide + 9, y - 6, "timestep", "soft")
    y += TALL + 12

    tops: list[list[tuple[float, float, float]]] = []  # (x, top, bottom) of the decoder's blocks, level by level
    at = (left + BOX / 2, y - 12)  # the bottom of the encoder's last block so far
    for i in range(levels):
        level, up = unet.down[i], unet.up[last - i]
        c = nodes[f"unet.down.{i}.blocks.0"].output
        inset = i * INSET
        x0, x1 = left + inset, right - inset
        rows = len(up.blocks) + (i < last)
        p.level(y, HEAD + rows * STEP)
        p.text(WIDTH / 2, y + 17, f"level {i}: {c[1]} channels, {c[2]} × {c[3]}", "title", "middle")
        y += HEAD
        first = "unet.temporal_in" if i == 0 else f"unet.down.{i - 1}.resample"
        names = [first, *(f"unet.down.{i}.blocks.{j}" for j in range(len(level.blocks)))]
        for row, name in enumerate(names):
            top = y + row * STEP
            if name in nodes:
                p.line(f"M {at[0]:g} {at[1]:g} L {x0 + BOX / 2:g} {top:g}", "flow")
                words = {"unet.temporal_in": "temporal_in"}.get(name) or (
                    f"down {i - 1}: half the size" if name.endswith("resample") else f"down {i}, block {row - 1}")
                p.box(x0, top, BOX, nodes[name], words)
                at = (x0 + BOX / 2, top + TALL)
                start = x0 + BOX
            else:  # the skip comes from conv_in
                p.line(f"M {at[0]:g} {at[1]:g} V {top + TALL / 2:g}", "flow", False)
                start, at = at[0], (at[0], top + TALL / 2)
            p.line(f"M {start:g} {top + TALL / 2:g} H {x1:g}", "skip")
        ups = []
        for row in range(len(up.blocks)):
            j = len(up.blocks) - 1 - row
            name = f"unet.up.{last - i}.blocks.{j}"
            p.box(x1, y + row * STEP, BOX, nodes[name], f"up {last - i}, block {j}")
            ups.append((x1 + BOX / 2, y + row * STEP, y + row * STEP + TALL))
        if i < last:
            name = f"unet.up.{last - i - 1}.resample"
            top = y + len(up.blocks) * STEP
            p.box(x1, top, BOX, nodes[name], f"up {last - i - 1}: double the size")
            ups.append((x1 + BOX / 2, top, top + TALL))
        tops.append(ups)
        y += rows * STEP + 6
    # The middle blocks go from left to right below all levels.
    c = nodes["unet.mid.0"].output
    p.level(y, HEAD + STEP)
    p.text(WIDTH / 2, y + 17, f"middle: {c[1]} channels, {c[2]} × {c[3]}", "title", "middle")
    y += HEAD
    count = len(unet.mid)
    x0 = left + INSET * last
    gap = WIDTH - 2 * x0 - count * BOX
    places = [x0 + j * (BOX + gap / max(1, count - 1)) for j in range(count)]
    for j, x in enumerate(places):
        p.box(x, y, BOX, nodes[f"unet.mid.{j}"], f"middle, block {j}")
    p.line(f"M {at[0]:g} {at[1]:g} L {places[0] + BOX / 2:g} {y:g}", "flow")
    for a, b in zip(places, places[1:], strict=False):
        p.line(f"M {a + BOX:g} {y + TALL / 2:g} H {b:g}", "flow")
    below = (places[-1] + BOX / 2, y)
    for ups in reversed(tops):
        for x, top, bottom in reversed(ups):
            p.line(f"M {below[0]:g} {below[1]:g} L {x:g} {bottom:g}", "flow")
            below = (x, top)
    p.line(f"M {below[0]:g} {below[1]:g} V {92 + TALL:g}", "flow")
    y += STEP + 4
    label = escape(f"The U of {type(unet).__name__} with its blocks")
    return (f'<svg viewBox="0 0 {WIDTH} {y:g}" role="group" aria-label="{label}" id="u">'
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0 0 L8 4 L0 8 z" class="tip"/></marker></defs>'
            f'{"".join(p.below)}{"".join(p.words)}{"".join(p.boxes)}</svg>')  # fmt: skip

