"""The one vocabulary of the UNets.

Between blocks x is `(b f) c h w`. Transformers hold it in channels-last memory, where tokens `(b f) (h w) c` and
`b f (h w) c` are views of it. Convolutions hold it as `conv_layout` says. Every reshape below is right in both layouts,
and a view wherever the layout allows one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minit2v_kernels import linear, temporal_conv
from minit2v_kernels._dispatch import pick

from .layers import Context, GroupNorm, Linear, TransformerBlock


def conv_layout(x: Tensor, c: int | None = None) -> Tensor:
    """(n c h w) -> the same, in the memory layout in which convolutions of `c` channels (None: x's) are fast.

    Channels-last, but on the CPU only where x is large beside the weights: those are stored with the input channels
    outside, and are rearranged at every call. At the coarse levels that takes as long as the convolution itself. Nor
    under gradients there: PyTorch's GroupNorm crashes in channels-last memory where only its weights want one.
    """
    n, c, h, w = x.shape[0], c or x.shape[1], *x.shape[2:]
    if x.is_cpu and (n * h * w < 2 * c or torch.is_grad_enabled()):  # 2: measured, on widths of 160 to 1280
        return x.contiguous()
    return x.contiguous(memory_format=torch.channels_last)


def to_tokens(x: Tensor) -> Tensor:
    """(n c h w) -> (n (h w) c)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_image(x: Tensor, h: int) -> Tensor:
    """(n (h w) c) -> (n c h w) in channels-last memory."""
    return x.unflatten(1, (h, -1)).permute(0, 3, 1, 2)


def to_clip(x: Tensor, f: int) -> Tensor:
    """((b f) c h w) -> (b c f (h w)): the image that a convolution along time or a norm over all frames sees."""
    # The batch is split off last: a view of a batch of 1 made in another order has a stride for it by which PyTorch no
    # longer knows the layout.
    return x.flatten(2).unflatten(0, (-1, f)).transpose(1, 2)


class ResBlock(nn.Module):
    """GroupNorm-SiLU-conv twice, with the timestep added in between."""

    def __init__(self, c_in: int, c_out: int, emb_dim: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = Linear(emb_dim, c_out)
        self.norm2 = GroupNorm(groups, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = Shortcut(c_in, c_out, 1) if c_in != c_out else None

    def project(self, emb: Tensor) -> Tensor:
        """emb (m d) after its SiLU -> (m c_out), to be added after the first convolution: its bias is in it."""
        return linear(emb, self.emb.weight, self.emb.bias + self.conv1.bias)

    def forward(self, x: Tensor, emb: Tensor, f: int = 1, skip: Tensor | None = None) -> Tensor:
        """x ((b f) c h w), emb (m c_out) of `project`, m dividing b f; skip ((b f) c2 h w), c + c2 = c_in
        -> ((b f) c_out h w); statistics of the norms span `f` frames."""
        if skip is not None and (self.skip is None or pick("group_norm_silu", None, x) == "torch"):
            x, skip = torch.cat((x, skip), dim=1), None  # PyTorch's norm puts the two together anyway
        x = conv_layout(x, self.conv1.in_channels)
        skip = skip if skip is None else conv_layout(skip, self.conv1.in_channels)
        h = F.conv2d(self.norm1(x, f, silu=True, skip=skip), self.conv1.weight, padding=1)
        h = self.conv2(self.norm2(h, f, silu=True, emb=emb))
        return h.add_(x if self.skip is None else self.skip(x, skip))  # in place: fresh memory costs, too


class Shortcut(nn.Conv2d):
    """A 1x1 convolution of x and what lies behind it in the channels, without putting the two together."""

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """x (n c h w), skip (n c2 h w) -> (n c_out h w)."""
        if skip is None:
            return super().forward(x)
        of_x, of_skip = self.weight.split((x.shape[1], skip.shape[1]), dim=1)
        return F.conv2d(x, of_x, self.bias).add_(F.conv2d(skip, of_skip))


class TemporalConv(nn.Module):
    """Four GroupNorm-SiLU-conv layers along time only; the last is zero at initialisation, so it starts as identity.

    Statistics of the norms span all frames. (The reference drops 10 % of the activations here while it trains.)
    """

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.norms = nn.ModuleList(GroupNorm(groups, c) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv3d(c, c, (3, 1, 1), padding=(1, 0, 0)) for _ in range(4))
        nn.init.zeros_(self.convs[-1].weight)
        nn.init.zeros_(self.convs[-1].bias)

    def forward(self, x: Tensor, f: int) -> Tensor:
        """x ((b f) c h w) -> ((b f) c h w)."""
        clip = conv_layout(to_clip(x, f))
        h, residual = clip, (None, None, None, clip)
        for norm, conv, added in zip(self.norms, self.convs, residual, strict=True):
            h = temporal_conv(norm(h, silu=True), conv.weight, conv.bias, residual=added)
        return h.transpose(1, 2).reshape(x.shape)


class SpatialTransformer(nn.Module):
    """The pixels of one frame attend to each other, then to the text."""

    def __init__(self, c: int, heads: int, head_dim: int, context_dim: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, c, eps=1e-6)
        self.proj_in = Linear(c, heads * head_dim)
        self.block = TransformerBlock(heads * head_dim, heads, head_dim, context_dim)
        self.proj_out = Linear(heads * head_dim, c)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x ((b f) c h w), context (b l d) or its keys and values -> ((b f) c h w)."""
        x = x.contiguous(memory_format=torch.channels_last)
        h = self.proj_in(to_tokens(self.norm(x)))
        return to_image(self.proj_out(self.block(h, context)), x.shape[2]).add_(x)


class TemporalTransformer(nn.Module):
    """Each pixel attends to itself across the frames, twice. Statistics of the norm span all frames."""

    def __init__(self, c: int, heads: int, head_dim: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, c, eps=1e-6)
        self.proj_in = Linear(c, heads * head_dim)
        self.block = TransformerBlock(heads * head_dim, heads, head_dim)
        self.proj_out = Linear(heads * head_dim, c)

    def forward(self, x: Tensor, f: int) -> Tensor:
        """x ((b f) c h w) -> ((b f) c h w)."""
        x = x.contiguous(memory_format=torch.channels_last)
        h = to_tokens(self.norm(x, f)).unflatten(0, (-1, f))  # b f (h w) c
        h = self.proj_out(self.block(self.proj_in(h)))
        return to_image(h.flatten(0, 1), x.shape[2]).add_(x)


class MotionModule(nn.Module):
    """AnimateDiff's layer (Guo et al. 2023, arXiv:2307.04725): each pixel attends to itself across the frames.

    Unlike in TemporalTransformer the frames are numbered, and the last projection is zero at initialisation: put into
    an image model, it changes nothing until it is trained.
    """

    def __init__(self, c: int, heads: int, layers: int, groups: int, max_frames: int):
        super().__init__()
        self.norm = GroupNorm(groups, c, eps=1e-6)
        self.proj_in = Linear(c, c)
        self.blocks = nn.ModuleList(TransformerBlock(c, heads, c // heads, positions=max_frames) for _ in range(layers))
        self.proj_out = Linear(c, c)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        self.clip_norm = False  # whether statistics of the norm span all frames, as in diffusers; the authors' do not

    def forward(self, x: Tensor, f: int) -> Tensor:
        """x ((b f) c h w) -> ((b f) c h w)."""
        x = x.contiguous(memory_format=torch.channels_last)
        h = to_tokens(self.norm(x, f if self.clip_norm else 1)).unflatten(0, (-1, f))
        h = self.proj_in(h)  # b f (h w) c
        for block in self.blocks:
            h = block(h)
        return to_image(self.proj_out(h).flatten(0, 1), x.shape[2]).add_(x)


class Upsample(nn.Conv2d):
    """Nearest neighbour to a given size, then a 3x3 convolution."""

    def __init__(self, c: int):
        super().__init__(c, c, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """x (n c h w) -> (n c *size)."""
        return super().forward(F.interpolate(conv_layout(x), size=size, mode="nearest"))
