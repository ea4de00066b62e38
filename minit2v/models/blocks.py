"""The blocks of the UNets. Between them x is ((b f) c h w): all frames of all videos as one batch of images.

Each block says who is its batch. In space a frame is by itself; in time, a pixel.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .layers import FrameTransformerBlock, NumberedFrameTransformerBlock, TransformerBlock, group_norm


class ResBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice; the timestep is added in between, and x at the end."""

    def __init__(self, c_in: int, c_out: int, emb_dim: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb_dim, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor, span: int = 1) -> Tensor:
        """x ((b f) c h w), emb ((b f) d) of the timestep -> ((b f) c_out h w); norms over `span` frames together."""
        h = self.conv1(F.silu(group_norm(self.norm1, x, span)))
        h = h + self.emb(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(group_norm(self.norm2, h, span)))
        return self.skip(x) + h


class TemporalConv(nn.Module):
    """GroupNorm, SiLU, convolution along time only, four times; then x is added.

    Statistics of the norms span the video. The last convolution is zero at initialisation, so it starts as identity.
    dropout: the share of the inputs of all convolutions but the first that is dropped in training mode.
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
    """The pixels of one frame look at each other, then at the text."""

    def __init__(self, c: int, heads: int, head_dim: int, context_dim: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.proj_in = nn.Linear(c, heads * head_dim)
        self.block = TransformerBlock(heads * head_dim, heads, head_dim, context_dim)
        self.proj_out = nn.Linear(heads * head_dim, c)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x ((b f) c h w), context (m l d), one text for each b f / m frames -> ((b f) c h w)."""
        h = self.proj_in(rearrange(self.norm(x), "n c h w -> n (h w) c"))
        h = self.proj_out(self.block(h, context))
        return x + rearrange(h, "n (h w) c -> n c h w", h=x.shape[2])


class TemporalTransformer(nn.Module):
    """Each pixel looks at itself in all frames, twice. Statistics of the norm span the video."""

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
    """AnimateDiff's layer (Guo et al. 2023, arXiv:2307.04725): each pixel looks at itself in all frames.

    Unlike in TemporalTransformer the frames are numbered, and the last projection is zero at initialisation: put into
    an image model, it changes nothing until it is trained.
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
        self.norm_over_video = False  # as in diffusers; the authors' norm spans one frame

    def forward(self, x: Tensor, f: int) -> Tensor:
        """x ((b f) c h w) -> ((b f) c h w)."""
        h = group_norm(self.norm, x, f if self.norm_over_video else 1)
        h = self.proj_in(rearrange(h, "(b f) c h w -> b f (h w) c", f=f))
        for block in self.blocks:
            h = block(h)
        return x + rearrange(self.proj_out(h), "b f (h w) c -> (b f) c h w", h=x.shape[2])


class Upsample(nn.Conv2d):
    """Nearest neighbour to a given size, then a 3x3 convolution."""

    def __init__(self, c: int):
        super().__init__(c, c, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """x (n c h w) -> (n c *size)."""
        return super().forward(F.interpolate(x, size=size, mode="nearest"))
