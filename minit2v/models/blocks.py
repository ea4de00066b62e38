"""The blocks of the UNets. Between them x is ((b f) c h w): all frames of all videos are one batch of images.

A spatial layer treats each frame by itself. A temporal layer treats each pixel by itself.
b videos, f frames, c channels, h w height and width, n = b f images, l text tokens, d width of a vector.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .layers import FrameTransformerBlock, NumberedFrameTransformerBlock, TransformerBlock, group_norm


class ResBlock(nn.Module):
    """Twice GroupNorm, SiLU, convolution. The timestep embedding is added in between, and x at the end."""

    def __init__(self, c_in: int, c_out: int, emb_dim: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb_dim, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor, span: int = 1) -> Tensor:
        """x ((b f) c h w), timestep embedding emb ((b f) d) -> ((b f) c_out h w). The norms span `span` frames."""
        h = self.conv1(F.silu(group_norm(self.norm1, x, span)))
        h = h + self.emb(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(group_norm(self.norm2, h, span)))
        return self.skip(x) + h


class TemporalConv(nn.Module):
    """Four times GroupNorm, SiLU, convolution along time only. At the end x is added.

    The statistics of the norms span the video. The last convolution is initialised to zero, so the block starts as
    the identity.
    dropout: the probability of dropout before the last three convolutions, in training mode.
    """

    def __init__(self, c: int, groups: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.norms = nn.ModuleList(nn.GroupNorm(groups, c) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv3d(c, c, (3, 1, 1), padding=(1, 0, 0)) for _ in range(4))
        nn.init.zeros_(self.convs[-1].weight)
        nn.init.zeros_(self.convs[-1].bias)

    def forward(self, x: Tensor, f: int) -> Tensor:
        """x ((b f) c h w) -> ((b f) c h w)."""
        x = h = rearrange(x, "(b f) c h w -> b c f h w", f=f)
        for norm, conv, p in zip(self.norms, self.convs, (0.0, *3 * (self.dropout,)), strict=True):
            h = conv(F.dropout(F.silu(norm(h)), p, self.training))
        return rearrange(x + h, "b c f h w -> (b f) c h w")


class SpatialTransformer(nn.Module):
    """The pixels of one frame attend to each other, then to the text."""

    def __init__(self, c: int, heads: int, head_dim: int, context_dim: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.proj_in = nn.Linear(c, heads * head_dim)
        self.block = TransformerBlock(heads * head_dim, heads, head_dim, context_dim)
        self.proj_out = nn.Linear(heads * head_dim, c)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x ((b f) c h w), context (m l d) -> ((b f) c h w). Each of the m texts serves b f / m frames in a row."""
        h = self.proj_in(rearrange(self.norm(x), "n c h w -> n (h w) c"))
        h = self.proj_out(self.block(h, context))
        return x + rearrange(h, "n (h w) c -> n c h w", h=x.shape[2])


class TemporalTransformer(nn.Module):
    """Each pixel attends to itself in all frames, twice. The statistics of the norm span the video."""

    def __init__(self, c: int, heads: int, head_dim: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.proj_in = nn.Linear(c, heads * head_dim)
        self.block = FrameTransformerBlock(heads * head_dim, heads, head_dim)
        self.proj_out = nn.Linear(heads * head_dim, c)

    def forward(self, x: Tensor, f: int) -> Tensor:
        """x ((b f) c h w) -> ((b f) c h w)."""
        h = self.proj_in(rearrange(group_norm(self.norm, x, f), "(b f) c h w -> b f (h w) c", f=f))
        h = self.proj_out(self.block(h))
        return x + rearrange(h, "b f (h w) c -> (b f) c h w", h=x.shape[2])


class MotionModule(nn.Module):
    """AnimateDiff's temporal layer (Guo et al. 2023, arXiv:2307.04725): each pixel attends to itself in all frames.

    It differs from TemporalTransformer in two points. The frames have a position encoding. The last projection is
    initialised to zero, so that an untrained module does not change the image model.
    """

    def __init__(self, c: int, heads: int, layers: int, groups: int, max_frames: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.proj_in = nn.Linear(c, c)
        self.blocks = nn.ModuleList(
            NumberedFrameTransformerBlock(c, heads, c // heads, max_frames) for _ in range(layers)
        )
        self.proj_out = nn.Linear(c, c)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        self.norm_over_video = False  # the authors normalise each frame; diffusers, the whole video

    def forward(self, x: Tensor, f: int) -> Tensor:
        """x ((b f) c h w) -> ((b f) c h w)."""
        h = group_norm(self.norm, x, f if self.norm_over_video else 1)
        h = self.proj_in(rearrange(h, "(b f) c h w -> b f (h w) c", f=f))
        for block in self.blocks:
            h = block(h)
        return x + rearrange(self.proj_out(h), "b f (h w) c -> (b f) c h w", h=x.shape[2])


class Upsample(nn.Conv2d):
    """Nearest-neighbour interpolation to a given size, then a 3x3 convolution."""

    def __init__(self, c: int):
        super().__init__(c, c, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """x (n c h w) -> (n c *size)."""
        return super().forward(F.interpolate(x, size=size, mode="nearest"))
