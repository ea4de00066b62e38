"""Stable Diffusion's image autoencoder, applied to every frame by itself: 8x smaller in height and width, 4 channels.

Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, arXiv 2112.10752.
Axes: n frames of all videos, c channels, h w height and width.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from minit2v_convert.diffusers_vae import LAYOUT
from torch import Tensor, nn

from .hub import Network


@dataclass(frozen=True)
class AutoencoderKLConfig:
    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # per level, finest first
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.18215  # latents times this have a standard deviation of about 1

    FIXED: ClassVar[dict[str, Any]] = {"act_fn": "silu"}
    IGNORED: ClassVar[dict[str, str]] = {}


class ResBlock(nn.Module):
    """GroupNorm-SiLU-conv twice around a skip."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class PixelAttention(nn.Module):
    """All pixels of one frame attend to each other, with a single head as wide as the channels."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(c, c) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)  # n (h w) c
        h = F.scaled_dot_product_attention(self.to_q(h)[:, None], self.to_k(h)[:, None], self.to_v(h)[:, None])
        return x + self.to_out(h[:, 0]).transpose(1, 2).reshape(x.shape)


class Mid(nn.Module):
    """ResBlock, attention, ResBlock at the coarsest resolution."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.res1, self.attention, self.res2 = ResBlock(c, c, groups), PixelAttention(c, groups), ResBlock(c, c, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.res2(self.attention(self.res1(x)))


class Level(nn.Module):
    """The ResBlocks of one resolution and the convolution that leaves it (None at the last)."""

    def __init__(self, blocks: list[ResBlock], resample: nn.Module | None):
        super().__init__()
        self.blocks, self.resample = nn.ModuleList(blocks), resample


class Encoder(nn.Module):
    def __init__(self, cfg: AutoencoderKLConfig):
        super().__init__()
        c, groups = cfg.block_out_channels[0], cfg.norm_num_groups
        self.conv_in = nn.Conv2d(cfg.in_channels, c, 3, padding=1)
        self.levels = nn.ModuleList()
        for i, c_out in enumerate(cfg.block_out_channels):
            blocks = [ResBlock(c if j == 0 else c_out, c_out, groups) for j in range(cfg.layers_per_block)]
            last = i == len(cfg.block_out_channels) - 1
            self.levels.append(Level(blocks, None if last else nn.Conv2d(c_out, c_out, 3, stride=2)))
            c = c_out
        self.mid = Mid(c, groups)
        self.norm_out = nn.GroupNorm(groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, 2 * cfg.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (n 3 h w) -> mean and log variance (n 2c h/8 w/8)."""
        x = self.conv_in(x)
        for level in self.levels:
            for block in level.blocks:
                x = block(x)
            if level.resample is not None:
                x = level.resample(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as LDM does
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, cfg: AutoencoderKLConfig):
        super().__init__()
        c, groups = cfg.block_out_channels[-1], cfg.norm_num_groups
        self.conv_in = nn.Conv2d(cfg.latent_channels, c, 3, padding=1)
        self.mid = Mid(c, groups)
        self.levels = nn.ModuleList()
        for i, c_out in reversed(list(enumerate(cfg.block_out_channels))):
            blocks = [ResBlock(c if j == 0 else c_out, c_out, groups) for j in range(cfg.layers_per_block + 1)]
            self.levels.append(Level(blocks, None if i == 0 else nn.Conv2d(c_out, c_out, 3, padding=1)))
            c = c_out
        self.norm_out = nn.GroupNorm(groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, cfg.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """z (n c h w) -> pixels (n 3 8h 8w)."""
        x = self.mid(self.conv_in(z))
        for level in self.levels:
            for block in level.blocks:
                x = block(x)
            if level.resample is not None:
                x = level.resample(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))


class DiagonalGaussian:
    """What the encoder says of the latents: a mean and a standard deviation for each number (n c h w)."""

    def __init__(self, moments: Tensor):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        return self.mean


class AutoencoderKL(Network):
    Config = AutoencoderKLConfig
    layout = LAYOUT

    def __init__(self, config: AutoencoderKLConfig | None = None, **fields: Any):
        super().__init__(config, **fields)
        cfg = self.config
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.latent_channels, 2 * cfg.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.latent_channels, cfg.latent_channels, 1)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """x (n 3 h w) in [-1, 1] -> distribution of latents (n c h/8 w/8)."""
        return DiagonalGaussian(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """z (n c h w) -> pixels (n 3 8h 8w), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))
