"""The UNet of docs/animatediff.md (AnimateDiff v1, v2, v3), written from that text alone, plainly and in float64.

This is an oracle to test with, not an implementation to use: one function per building block, in the order of the
document, out of sums, products, exp, sqrt and erf. The axes have the document's letters: b videos, f frames,
c channels, h height, w width, p = h w pixels, l text tokens, d width of a vector, n = b f images (frame s of video b
is image n = b f + s). `state` holds the tensors under the published names (section 13); `name` is the prefix of a
layer or block in it. The numbers of sections are those of the document.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

State = Mapping[str, Tensor]


class Sizes(NamedTuple):
    """What no shape in the state dict tells (section 2)."""

    version: str  # "v1", "v2" or "v3"
    spatial: tuple[bool, ...]  # A_i: has level i spatial transformers?
    layers: int  # L
    groups: int  # G
    heads: int  # H
    motion_groups: int  # G_m
    motion_heads: int  # H_m
    motion_per_clip: bool = False  # section 11, point 1: the motion modules' norm as diffusers has it


def tensor(state: State, name: str) -> Tensor:
    """The named tensor in float64."""
    return state[name].detach().to(torch.float64)


# Section 3: the elementary operations.


def linear(state: State, name: str, x: Tensor, bias: bool = True) -> Tensor:
    """W x + beta along the last axis: (..., in) -> (..., out)."""
    y = torch.einsum("oi,...i->...o", tensor(state, f"{name}.weight"), x)
    return y + tensor(state, f"{name}.bias") if bias else y


def convolution(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """A k x k correlation with zeros around the image: (n, c, h, w) -> (n, c, h, w), one product per window offset."""
    weight, bias = tensor(state, f"{name}.weight"), tensor(state, f"{name}.bias")
    n, c, h, w = x.shape
    k = weight.shape[2]
    a = (k - 1) // 2
    padded = torch.zeros(n, c, h + 2 * a, w + 2 * a, dtype=torch.float64)
    padded[:, :, a : a + h, a : a + w] = x
    rows, columns = (h + 2 * a - k) // stride + 1, (w + 2 * a - k) // stride + 1
    y = bias[None, :, None, None].repeat(n, 1, rows, columns)
    for u in range(k):
        for v in range(k):
            seen = padded[:, :, u : u + stride * (rows - 1) + 1 : stride, v : v + stride * (columns - 1) + 1 : stride]
            y = y + torch.einsum("oc,nchw->nohw", weight[:, :, u, v], seen)
    return y


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)), element by element."""
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    """x / 2 (1 + erf(x / sqrt 2)), element by element."""
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def standardise(x: Tensor, epsilon: float) -> Tensor:
    """All values of x (any shape) less their mean, over the root of their variance plus epsilon."""
    mean = x.sum() / x.numel()
    variance = ((x - mean) ** 2).sum() / x.numel()
    return (x - mean) / torch.sqrt(variance + epsilon)


def layer_norm(state: State, name: str, x: Tensor) -> Tensor:
    """(..., c) -> (..., c), each vector alone."""
    c = x.shape[-1]
    mean = x.sum(-1, keepdim=True) / c
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / c
    return tensor(state, f"{name}.weight") * (x - mean) / torch.sqrt(variance + 1e-5) + tensor(state, f"{name}.bias")


def group_norm(state: State, name: str, x: Tensor, groups: int, epsilon: float, pooled: int = 1) -> Tensor:
    """(n, c, h, w) -> (n, c, h, w); `pooled` neighbouring images share mean and variance: 1 per frame, f per clip."""
    n, c = x.shape[:2]
    width = c // groups
    y = torch.zeros_like(x)
    for first in range(0, n, pooled):
        for group in range(groups):
            images, channels = slice(first, first + pooled), slice(group * width, (group + 1) * width)
            y[images, channels] = standardise(x[images, channels], epsilon)
    weight, bias = tensor(state, f"{name}.weight"), tensor(state, f"{name}.bias")
    return weight[None, :, None, None] * y + bias[None, :, None, None]


def attention(state: State, name: str, x: Tensor, z: Tensor, heads: int) -> Tensor:
    """Attn(x, z): rows i of x (batch, i, c) look at rows j of z (batch, j, c_z) -> (batch, i, c)."""
    q = linear(state, f"{name}.to_q", x, bias=False)
    k = linear(state, f"{name}.to_k", z, bias=False)
    v = linear(state, f"{name}.to_v", z, bias=False)
    width = x.shape[-1] // heads
    results = []
    for head in range(heads):
        channels = slice(head * width, (head + 1) * width)
        exponential = torch.exp(torch.einsum("nid,njd->nij", q[..., channels], k[..., channels]) / math.sqrt(width))
        alpha = exponential / exponential.sum(-1, keepdim=True)
        results.append(torch.einsum("nij,njd->nid", alpha, v[..., channels]))
    return linear(state, f"{name}.to_out.0", torch.cat(results, -1))


def feed_forward(state: State, name: str, x: Tensor) -> Tensor:
    """FF with GEGLU, the gate in the second half: (..., c) -> (..., c)."""
    both = linear(state, f"{name}.net.0.proj", x)
    half = both.shape[-1] // 2
    return linear(state, f"{name}.net.2", both[..., :half] * gelu(both[..., half:]))


# Section 4: the timestep.


def sinusoids(t: Tensor, width: int) -> Tensor:
    """phi: t (b) -> (b, width), cosines then sines; float32 up to here, as the document demands, then float64."""
    m = width // 2
    exponent = torch.tensor(-math.log(10000), dtype=torch.float32) * torch.arange(m, dtype=torch.float32) / m
    angle = t.to(torch.float32)[:, None] * torch.exp(exponent)[None, :]
    return torch.cat([torch.cos(angle), torch.sin(angle)], -1).to(torch.float64)


def time_vector(state: State, t: Tensor) -> Tensor:
    """tau: t (b) -> (b, D)."""
    phi = sinusoids(t, tensor(state, "time_embedding.linear_1.weight").shape[1])
    return linear(state, "time_embedding.linear_2", silu(linear(state, "time_embedding.linear_1", phi)))


# Sections 5 to 8: the blocks.


def residual_block(state: State, name: str, x: Tensor, tau: Tensor, groups: int, pooled: int) -> Tensor:
    """Res: x (n, c1, h, w), tau (n, D) -> (n, c2, h, w)."""
    y = convolution(state, f"{name}.conv1", silu(group_norm(state, f"{name}.norm1", x, groups, 1e-5, pooled)))
    y = y + linear(state, f"{name}.time_emb_proj", silu(tau))[:, :, None, None]
    y = convolution(state, f"{name}.conv2", silu(group_norm(state, f"{name}.norm2", y, groups, 1e-5, pooled)))
    if x.shape[1] == y.shape[1]:
        return y + x
    return y + convolution(state, f"{name}.conv_shortcut", x)


def spatial_transformer(state: State, name: str, x: Tensor, text: Tensor, groups: int, heads: int) -> Tensor:
    """Spatial: x (n, c, h, w), text (n, l, d) -> (n, c, h, w)."""
    n, c, h, w = x.shape
    block = f"{name}.transformer_blocks.0"
    z = convolution(state, f"{name}.proj_in", group_norm(state, f"{name}.norm", x, groups, 1e-6))
    z = z.reshape(n, c, h * w).permute(0, 2, 1)  # n p c
    y = layer_norm(state, f"{block}.norm1", z)
    z = z + attention(state, f"{block}.attn1", y, y, heads)
    z = z + attention(state, f"{block}.attn2", layer_norm(state, f"{block}.norm2", z), text, heads)
    z = z + feed_forward(state, f"{block}.ff", layer_norm(state, f"{block}.norm3", z))
    return x + convolution(state, f"{name}.proj_out", z.permute(0, 2, 1).reshape(n, c, h, w))


def positions(rows: int, c: int) -> Tensor:
    """The formula of the table P: (rows, c), sines at even channels, cosines at odd ones."""
    table = torch.zeros(rows, c, dtype=torch.float64)
    for s in range(rows):
        for i in range(c // 2):
            theta = math.exp(-2 * i * math.log(10000) / c)
            table[s, 2 * i] = math.sin(s * theta)
            table[s, 2 * i + 1] = math.cos(s * theta)
    return table


def motion_module(state: State, name: str, x: Tensor, frames: int, groups: int, heads: int, pooled: int = 1) -> Tensor:
    """Motion: (n, c, h, w) -> (n, c, h, w), the frames of one pixel look at each other; `pooled` is 1 (section 7)."""
    n, c, h, w = x.shape
    b = n // frames
    block = f"{name}.transformer_blocks.0"
    table = tensor(state, f"{block}.pos_embed.pe")[0]  # F c
    if frames > table.shape[0]:
        raise ValueError(f"{frames} frames, but {name} knows {table.shape[0]} positions")
    position = table[:frames]
    z = group_norm(state, f"{name}.norm", x, groups, 1e-6, pooled)
    z = linear(state, f"{name}.proj_in", z.permute(0, 2, 3, 1))  # n h w c
    z = z.reshape(b, frames, h * w, c).permute(0, 2, 1, 3).reshape(b * h * w, frames, c)  # (b p) f c
    y = layer_norm(state, f"{block}.norm1", z) + position
    z = z + attention(state, f"{block}.attn1", y, y, heads)
    y = layer_norm(state, f"{block}.norm2", z) + position
    z = z + attention(state, f"{block}.attn2", y, y, heads)
    z = z + feed_forward(state, f"{block}.ff", layer_norm(state, f"{block}.norm3", z))
    z = linear(state, f"{name}.proj_out", z)
    z = z.reshape(b, h * w, frames, c).permute(0, 2, 3, 1).reshape(n, c, h, w)
    return x + z


def down(state: State, name: str, x: Tensor) -> Tensor:
    """Down: (n, c, h, w) -> (n, c, ceil(h / 2), ceil(w / 2))."""
    return convolution(state, name, x, stride=2)


def up(state: State, name: str, x: Tensor, rows: int, columns: int) -> Tensor:
    """Up: (n, c, h, w) -> (n, c, rows, columns)."""
    enlarged = torch.zeros(*x.shape[:2], rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            enlarged[:, :, i, j] = x[:, :, i // 2, j // 2]
    return convolution(state, name, enlarged)


# Section 9: the whole network.


def unet(state: State, sizes: Sizes, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """The predicted noise: x (b, c, f, h, w), t (b), text (b, l, d), or (b, f, l, d) per frame -> (b, c, f, h, w)."""
    if sizes.version not in ("v1", "v2", "v3"):
        raise ValueError(f"no version {sizes.version}")
    b, c, frames, h, w = x.shape
    levels = len(sizes.spatial)
    pooled = frames if sizes.version == "v1" else 1
    motion_pooled = frames if sizes.motion_per_clip else 1
    tau = time_vector(state, t).repeat_interleave(frames, 0)  # n D
    text = text.to(torch.float64)
    text = text.repeat_interleave(frames, 0) if text.ndim == 3 else text.reshape(b * frames, *text.shape[2:])  # n l d

    def residual(name: str, x: Tensor) -> Tensor:
        return residual_block(state, name, x, tau, sizes.groups, pooled)

    def spatial(name: str, x: Tensor) -> Tensor:
        return spatial_transformer(state, name, x, text, sizes.groups, sizes.heads)

    def motion(name: str, x: Tensor) -> Tensor:
        return motion_module(state, name, x, frames, sizes.motion_groups, sizes.motion_heads, motion_pooled)

    def layer(block: str, j: int, level: int, x: Tensor) -> Tensor:
        x = residual(f"{block}.resnets.{j}", x)
        if sizes.spatial[level]:
            x = spatial(f"{block}.attentions.{j}", x)
        return motion(f"{block}.motion_modules.{j}", x)

    x = x.to(torch.float64).permute(0, 2, 1, 3, 4).reshape(b * frames, c, h, w)
    x = convolution(state, "conv_in", x)
    skips = [x]

    for i in range(levels):
        for j in range(sizes.layers):
            x = layer(f"down_blocks.{i}", j, i, x)
            skips.append(x)
        if i < levels - 1:
            x = down(state, f"down_blocks.{i}.downsamplers.0.conv", x)
            skips.append(x)

    x = residual("mid_block.resnets.0", x)
    x = spatial("mid_block.attentions.0", x)
    if sizes.version == "v2":
        x = motion("mid_block.motion_modules.0", x)
    x = residual("mid_block.resnets.1", x)

    for i in range(levels - 1, -1, -1):
        block = f"up_blocks.{levels - 1 - i}"
        for j in range(sizes.layers + 1):
            x = layer(block, j, i, torch.cat([x, skips.pop()], 1))
        if i > 0:
            x = up(state, f"{block}.upsamplers.0.conv", x, *skips[-1].shape[2:])
    assert not skips

    x = silu(group_norm(state, "conv_norm_out", x, sizes.groups, 1e-5, pooled))
    x = convolution(state, "conv_out", x)
    return x.reshape(b, frames, *x.shape[1:]).permute(0, 2, 1, 3, 4)
