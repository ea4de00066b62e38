"""The one vocabulary of the UNets.

Between blocks x is `(b f) c h w`. Transformers hold it in channels-last memory, where tokens `(b f) (h w) c` and
`b f (h w) c` are views of it. Convolutions hold it as `conv_layout` says. Every reshape below is right in both layouts,
and a view wherever the layout allows one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minit2v_kernels import group_norm_silu

from .layers import Linear, TransformerBlock


def conv_layout(x: Tensor) -> Tensor:
    """(n c h w) -> the same, in the memory layout in which convolutions are fast.

    Channels-last, but on the CPU only where x is large beside the weights: those are stored with the input channels
    outside, and are rearranged at every call. At the coarse levels that takes as long as the convolution itself. Nor
    under gradients there: PyTorch's GroupNorm crashes in channels-last memory where only its weights want one.
    """
    n, c, h, w = x.shape
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


def norm_silu(norm: nn.GroupNorm, x: Tensor, f: int = 1) -> Tensor:
    """SiLU(GroupNorm(x)), (n c h w) -> (n c h w); the statistics span `f` frames."""
    if f > 1:
        y = group_norm_silu(conv_layout(to_clip(x, f)), norm.weight, norm.bias, norm.num_groups, norm.eps)
        return y.transpose(1, 2).reshape(x.shape)
    return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


class ResBlock(nn.Module):
    """GroupNorm-SiLU-conv twice, with the timestep added in between."""

    def __init__(self, c_in: int, c_out: int, emb_dim: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = Linear(emb_dim, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor, f: int = 1) -> Tensor:
        """x ((b f) c h w), emb (b d) after its SiLU -> ((b f) c h w); statistics of the norms span `f` frames."""
        x = conv_layout(x)
        h = self.conv1(norm_silu(self.norm1, x, f))
        h = (h.unflatten(0, (len(emb), -1)) + self.emb(emb)[:, None, :, None, None]).flatten(0, 1)
        return self.skip(x) + self.conv2(norm_silu(self.norm2, h, f))


class TemporalConv(nn.Module):
    """Four GroupNorm-SiLU-conv layers along time only; the last is zero at initialisation, so it starts as identity.

    Statistics of the norms span all frames. (The reference drops 10 % of the activations here while it trains.)
    """

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(groups, c) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv3d(c, c, (3, 1, 1), padding=(1, 0, 0)) for _ in range(4))
        nn.init.zeros_(self.convs[-1].weight)
        nn.init.zeros_(self.convs[-1].bias)

    def forward(self, x: Tensor, f: int) -> Tensor:
        """x ((b f) c h w) -> ((b f) c h w)."""
        h = conv_layout(to_clip(x, f))
        for norm, conv in zip(self.norms, self.convs, strict=True):
            # A convolution over (f, h, w) with a kernel of (3, 1, 1) is one over an image of f rows and (h w) columns
            # with a kernel of (3, 1). In two dimensions every backend has a fast path; in three the CPU has none.
            h = F.conv2d(norm_silu(norm, h), conv.weight.squeeze(-1), conv.bias, padding=(1, 0))
        return x + h.transpose(1, 2).reshape(x.shape)


class SpatialTransformer(nn.Module):
    """The pixels of one frame attend to each other, then to the text."""

    def __init__(self, c: int, heads: int, head_dim: int, context_dim: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.proj_in = Linear(c, heads * head_dim)
        self.block = TransformerBlock(heads * head_dim, heads, head_dim, context_dim)
        self.proj_out = Linear(heads * head_dim, c)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x ((b f) c h w), context (b l d) -> ((b f) c h w)."""
        x = x.contiguous(memory_format=torch.channels_last)
        h = self.proj_in(to_tokens(self.norm(x)))
        return x + to_image(self.proj_out(self.block(h, context)), x.shape[2])


class TemporalTransformer(nn.Module):
    """Each pixel attends to itself across the frames, twice. Statistics of the norm span all frames."""

    def __init__(self, c: int, heads: int, head_dim: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.proj_in = Linear(c, heads * head_dim)
        self.block = TransformerBlock(heads * head_dim, heads, head_dim)
        self.proj_out = Linear(heads * head_dim, c)

    def forward(self, x: Tensor, f: int) -> Tensor:
        """x ((b f) c h w) -> ((b f) c h w)."""
        x = x.contiguous(memory_format=torch.channels_last)
        h = self.norm(to_clip(x, f)).permute(0, 2, 3, 1)  # b f (h w) c
        h = self.proj_out(self.block(self.proj_in(h)))
        return x + to_image(h.flatten(0, 1), x.shape[2])


class MotionModule(nn.Module):
    """AnimateDiff's layer (Guo et al. 2023, arXiv:2307.04725): each pixel attends to itself across the frames.

    Unlike in TemporalTransformer the frames are numbered, and the last projection is zero at initialisation: put into
    an image model, it changes nothing until it is trained.
    """

    def __init__(self, c: int, heads: int, layers: int, groups: int, max_frames: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.proj_in = Linear(c, c)
        self.blocks = nn.ModuleList(TransformerBlock(c, heads, c // heads, positions=max_frames) for _ in range(layers))
        self.proj_out = Linear(c, c)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        self.clip_norm = False  # whether statistics of the norm span all frames, as in diffusers; the authors' do not

    def forward(self, x: Tensor, f: int) -> Tensor:
        """x ((b f) c h w) -> ((b f) c h w)."""
        x = x.contiguous(memory_format=torch.channels_last)
        if torch.is_grad_enabled() and self.norm.weight.requires_grad and not x.requires_grad:
            # Behind a frozen image model. PyTorch's GroupNorm crashes on the CPU, in channels-last memory, where only
            # its weights want a gradient.
            x = x.detach().requires_grad_()
        if self.clip_norm:
            h = self.norm(to_clip(x, f)).permute(0, 2, 3, 1)
        else:
            h = to_tokens(self.norm(x)).unflatten(0, (-1, f))
        h = self.proj_in(h)  # b f (h w) c
        for block in self.blocks:
            h = block(h)
        return x + to_image(self.proj_out(h).flatten(0, 1), x.shape[2])


class Upsample(nn.Conv2d):
    """Nearest neighbour to a given size, then a 3x3 convolution."""

    def __init__(self, c: int):
        super().__init__(c, c, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """x (n c h w) -> (n c *size)."""
        return super().forward(F.interpolate(conv_layout(x), size=size, mode="nearest"))
