"""ModelScope's UNetSD under its authors' names, written from prose and lists of names alone, plainly and in float64.

This is an oracle to test with, not an implementation to use. What a video network shares with an image network (linear
layers, convolutions, norms, attention, the timestep's waves, down and up) is that of animatediff.py beside it, which
was written from docs/animatediff.md; what has an axis of time is here, from docs/architecture.md. The axes have the
same letters: b videos, f frames, c channels, h height, w width, p = h w pixels, l text tokens, d width of a vector,
n = b f images (frame s of video b is image n = b f + s). `state` holds the tensors as text2video_pytorch_model.pth
names them, its `temopral_conv` included; `name` is the prefix of a layer or block in it. What stands at a place is
read off the names that are there.
"""

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

State = Mapping[str, Tensor]


class Sizes(NamedTuple):
    """What neither a name nor a shape in the state dict tells."""

    groups: int  # of every GroupNorm: 32
    head_dim: int  # width of a head: 64; as many heads as fit into the channels
    heads_in: int = 8  # heads of the temporal transformer behind the first convolution


def load(name: str) -> ModuleType:
    """The oracle of that name beside this one: tests/ is not a package, so by its path."""
    spec = importlib.util.spec_from_file_location(f"{name}_oracle", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


image = load("animatediff")


def has(state: State, name: str) -> bool:
    """Is there a layer of that name?"""
    return f"{name}.weight" in state


def conv_norm(state: State, norm: str, conv: str, x: Tensor, groups: int) -> Tensor:
    """Norm per frame, SiLU, 3 x 3 convolution: (n, c1, h, w) -> (n, c2, h, w)."""
    y: Tensor = image.convolution(state, conv, image.silu(image.group_norm(state, norm, x, groups, 1e-5)))
    return y


def time_vector(state: State, t: Tensor) -> Tensor:
    """t (b) -> (b, D)."""
    phi = image.sinusoids(t, state["time_embed.0.weight"].shape[1])
    tau: Tensor = image.linear(state, "time_embed.2", image.silu(image.linear(state, "time_embed.0", phi)))
    return tau


def frames_convolution(state: State, name: str, x: Tensor, frames: int) -> Tensor:
    """A (3, 1, 1) correlation, zeros before the first and after the last frame: (n, c, h, w) -> (n, c, h, w)."""
    weight, bias = image.tensor(state, f"{name}.weight"), image.tensor(state, f"{name}.bias")
    y = torch.zeros(x.shape[0], weight.shape[0], *x.shape[2:], dtype=torch.float64)
    for n in range(x.shape[0]):
        y[n] = bias[:, None, None]
        for u in range(3):
            seen = n % frames + u - 1
            if 0 <= seen < frames:
                y[n] += torch.einsum("oc,chw->ohw", weight[:, :, u, 0, 0], x[n + u - 1])
    return y


def temporal_convolution(state: State, name: str, x: Tensor, frames: int, groups: int) -> Tensor:
    """Four times norm per clip, SiLU and three frames; residual: (n, c, h, w) -> (n, c, h, w)."""
    y = x
    for part, conv in (("conv1", 2), ("conv2", 3), ("conv3", 3), ("conv4", 3)):
        y = image.silu(image.group_norm(state, f"{name}.{part}.0", y, groups, 1e-5, frames))
        y = frames_convolution(state, f"{name}.{part}.{conv}", y, frames)
    return x + y


def residual_block(state: State, name: str, x: Tensor, tau: Tensor, frames: int, groups: int) -> Tensor:
    """Norms per frame, and the convolution in time at its end: x (n, c1, h, w), tau (n, D) -> (n, c2, h, w)."""
    y = conv_norm(state, f"{name}.in_layers.0", f"{name}.in_layers.2", x, groups)
    y = y + image.linear(state, f"{name}.emb_layers.1", image.silu(tau))[:, :, None, None]
    y = conv_norm(state, f"{name}.out_layers.0", f"{name}.out_layers.3", y, groups)
    shortcut = f"{name}.skip_connection"
    y = y + (image.convolution(state, shortcut, x) if has(state, shortcut) else x)
    return temporal_convolution(state, f"{name}.temopral_conv", y, frames, groups)


def transformer_block(state: State, name: str, z: Tensor, text: Tensor | None, heads: int) -> Tensor:
    """z (batch, rows, c); the second attention is to the text (batch, l, d), or without one again to the rows."""
    y = image.layer_norm(state, f"{name}.norm1", z)
    z = z + image.attention(state, f"{name}.attn1", y, y, heads)
    y = image.layer_norm(state, f"{name}.norm2", z)
    z = z + image.attention(state, f"{name}.attn2", y, y if text is None else text, heads)
    z = z + image.feed_forward(state, f"{name}.ff", image.layer_norm(state, f"{name}.norm3", z))
    return z


def spatial_transformer(state: State, name: str, x: Tensor, text: Tensor, sizes: Sizes) -> Tensor:
    """Norm per frame, the pixels of a frame and the text: x (n, c, h, w), text (n, l, d) -> (n, c, h, w)."""
    n, c, h, w = x.shape
    z = image.group_norm(state, f"{name}.norm", x, sizes.groups, 1e-6)
    z = image.linear(state, f"{name}.proj_in", z.reshape(n, c, h * w).permute(0, 2, 1))  # n p c
    z = transformer_block(state, f"{name}.transformer_blocks.0", z, text, z.shape[-1] // sizes.head_dim)
    z = image.linear(state, f"{name}.proj_out", z)
    return x + z.permute(0, 2, 1).reshape(n, c, h, w)


def pointwise(state: State, name: str, x: Tensor) -> Tensor:
    """A convolution with a window of one, weight (out, in, 1), along the last axis: (..., in) -> (..., out)."""
    weight = image.tensor(state, f"{name}.weight")[:, :, 0]
    return torch.einsum("oi,...i->...o", weight, x) + image.tensor(state, f"{name}.bias")


def temporal_transformer(state: State, name: str, x: Tensor, frames: int, groups: int, heads: int) -> Tensor:
    """Norm per clip, the frames of one pixel twice, no positions: (n, c, h, w) -> (n, c, h, w)."""
    n, c, h, w = x.shape
    b = n // frames
    z = image.group_norm(state, f"{name}.norm", x, groups, 1e-6, frames)
    z = z.reshape(b, frames, c, h * w).permute(0, 3, 1, 2).reshape(b * h * w, frames, c)  # (b p) f c
    z = pointwise(state, f"{name}.proj_in", z)
    z = transformer_block(state, f"{name}.transformer_blocks.0", z, None, heads)
    z = pointwise(state, f"{name}.proj_out", z)
    return x + z.reshape(b, h * w, frames, c).permute(0, 2, 3, 1).reshape(n, c, h, w)


def count(state: State, name: str) -> int:
    """How many numbered parts there are of that name."""
    return 1 + max(int(key.split(".")[1]) for key in state if key.startswith(f"{name}."))


def unet(state: State, sizes: Sizes, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """The predicted noise: x (b, c, f, h, w), t (b), text (b, l, d) -> (b, c, f, h, w)."""
    b, c, frames, h, w = x.shape
    tau = time_vector(state, t).repeat_interleave(frames, 0)  # n D
    text = text.to(torch.float64).repeat_interleave(frames, 0)  # n l d

    def residual(name: str, x: Tensor) -> Tensor:
        return residual_block(state, name, x, tau, frames, sizes.groups)

    def spatial(name: str, x: Tensor) -> Tensor:
        return spatial_transformer(state, name, x, text, sizes)

    def temporal(name: str, x: Tensor) -> Tensor:
        return temporal_transformer(state, name, x, frames, sizes.groups, x.shape[1] // sizes.head_dim)

    def layer(name: str, x: Tensor) -> Tensor:
        x = residual(f"{name}.0", x)
        if has(state, f"{name}.1.proj_in"):
            x = spatial(f"{name}.1", x)
            x = temporal(f"{name}.2", x)
        return x

    x = x.to(torch.float64).permute(0, 2, 1, 3, 4).reshape(b * frames, c, h, w)
    x = image.convolution(state, "input_blocks.0.0", x)
    x = temporal_transformer(state, "input_blocks.0.1", x, frames, sizes.groups, sizes.heads_in)
    skips = [x]

    for i in range(1, count(state, "input_blocks")):
        name = f"input_blocks.{i}"
        x = image.down(state, f"{name}.op", x) if has(state, f"{name}.op") else layer(name, x)
        skips.append(x)

    x = residual("middle_block.0", x)
    x = spatial("middle_block.1", x)
    x = temporal("middle_block.2", x)
    x = residual("middle_block.3", x)

    for i in range(count(state, "output_blocks")):
        name = f"output_blocks.{i}"
        x = layer(name, torch.cat([x, skips.pop()], 1))
        for enlarge in (f"{name}.1.conv", f"{name}.3.conv"):  # behind the residual block, or behind both transformers
            if has(state, enlarge):
                x = image.up(state, enlarge, x, *skips[-1].shape[2:])
    assert not skips

    x = conv_norm(state, "out.0", "out.2", x, sizes.groups)
    return x.reshape(b, frames, *x.shape[1:]).permute(0, 2, 1, 3, 4)
