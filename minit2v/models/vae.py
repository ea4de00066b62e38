"""Stable Diffusion's image autoencoder (VAE), applied to each frame separately.

Latents are 8 times smaller than the frame in height and width, and have 4 channels. Rombach et al. 2022,
"High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752.
Axes: n frames of all videos, c channels, h w height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minit2v_convert.diffusers_vae import LAYOUT

from .network import Network


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """The official model's config.json, field by field."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # per level, finest first
    layers_per_block: int = 2  # ResBlocks per level of the encoder; the decoder has one more
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 512  # height and width of the training pictures in pixels; also the default size of a tile
    scaling_factor: float = 0.18215  # latents times this have a standard deviation of about 1; pipelines apply it
    force_upcast: bool = True  # tells pipelines to run a float16 VAE in float32; the network does not read it

    FIXED: ClassVar[dict[str, Any]] = {
        "act_fn": "silu",
        "latents_mean": None,
        "latents_std": None,
        "mid_block_add_attention": True,
        "shift_factor": None,
        "use_post_quant_conv": True,
        "use_quant_conv": True,
    }
    IGNORED: ClassVar[dict[str, str]] = {}

    def __post_init__(self):
        channels, groups = self.block_out_channels, self.norm_num_groups
        for name in ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not channels or any(c < 1 or c % groups for c in channels):
            raise ValueError(f"norm_num_groups {groups} must divide block_out_channels {channels}")
        for name, known in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            types, levels = getattr(self, name), len(channels)
            if types != (known,) * levels:
                raise ValueError(f"{name} must be {known!r} for each of the {levels} block_out_channels, not {types}")
        if self.sample_size < self.factor:
            raise ValueError(f"sample_size must be at least {self.factor} pixels, not {self.sample_size}")

    @property
    def factor(self) -> int:
        """How many pixels one latent covers in height and in width."""
        return 2 ** (len(self.block_out_channels) - 1)


class ResBlock(nn.Module):
    """Twice GroupNorm, SiLU, convolution. At the end x is added."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x (n c h w) -> (n c_out h w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class PixelAttention(nn.Module):
    """All pixels of one frame attend to each other, with a single head over all channels."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(c, c) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """x (n c h w) -> same."""
        h = rearrange(self.norm(x), "n c h w -> n 1 (h w) c")  # memory-efficient attention needs a head axis
        h = self.to_out(F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h)))
        return x + rearrange(h, "n 1 (h w) c -> n c h w", h=x.shape[2])


class Downsample(nn.Conv2d):
    """3x3 convolution of stride 2. It is padded only at the right and the bottom, as in the training of the weights."""

    def __init__(self, c: int):
        super().__init__(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x (n c h w) -> (n c h//2 w//2)."""
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Nearest-neighbour interpolation to twice the height and width, then a 3x3 convolution."""

    def __init__(self, c: int):
        super().__init__(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (n c h w) -> (n c 2h 2w)."""
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Mid(nn.Module):
    """ResBlock, attention, ResBlock at the coarsest resolution."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.res1, self.attention, self.res2 = ResBlock(c, c, groups), PixelAttention(c, groups), ResBlock(c, c, groups)

    def forward(self, x: Tensor) -> Tensor:
        """x (n c h w) -> same."""
        return self.res2(self.attention(self.res1(x)))


class Level(nn.Module):
    """The ResBlocks of one resolution, and the convolution that changes it (None at the last level)."""

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
            self.levels.append(Level(blocks, None if last else Downsample(c_out)))
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
                x = level.resample(x)
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
            self.levels.append(Level(blocks, None if i == 0 else Upsample(c_out)))
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
                x = level.resample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class DiagonalGaussian:
    """The encoder's distribution of the latents (n c h w): a mean and a standard deviation for each number."""

    def __init__(self, moments: Tensor):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * noise (n c h w). A CPU generator gives the same noise for every device."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        return self.mean


def blend(before: Tensor, x: Tensor, extent: int, axis: int) -> Tensor:
    """x with its first `extent` rows (axis 2) or columns (axis 3) blended with the last ones of the tile before it."""
    extent = min(before.shape[axis], x.shape[axis], extent)
    shape = (-1, 1) if axis == 2 else (-1,)
    ramp = torch.arange(extent, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)).view(shape) / extent
    old = before.narrow(axis, before.shape[axis] - extent, extent)
    new, rest = x.split((extent, x.shape[axis] - extent), axis)
    return torch.cat([(old * (1 - ramp) + new * ramp).to(x.dtype), rest], axis)


class AutoencoderKL(Network):
    """The VAE. Keyword arguments are the fields of AutoencoderKLConfig.

    Slicing (one frame at a time) saves memory and does not change the result. Tiling saves more memory and changes the
    picture a little: the norms and the attention of a tile do not see the other tiles.
    """

    Config = AutoencoderKLConfig
    config: AutoencoderKLConfig
    layout = LAYOUT

    def __init__(self, config: AutoencoderKLConfig | None = None, **fields: Any):
        super().__init__(config, **fields)
        cfg = self.config
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.latent_channels, 2 * cfg.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.latent_channels, cfg.latent_channels, 1)
        self.slicing = False
        self.tiling: tuple[int, int] | None = None  # (size of a tile, distance between tiles) in latents

    def encode(self, x: Tensor, chunk_size: int | None = None) -> DiagonalGaussian:
        """x (n 3 h w) in [-1, 1] -> distribution of the latents (n c h//8 w//8), not yet times `scaling_factor`.

        chunk_size: how many frames are encoded at a time, all by default.
        Raises ValueError if the shape of x or chunk_size is wrong.
        """
        self.check("x", x, self.config.in_channels, self.config.factor)
        return DiagonalGaussian(self.in_pieces(self.encode_frames, x, chunk_size, self.config.factor, 1))

    def decode(self, z: Tensor, chunk_size: int | None = None) -> Tensor:
        """z (n c h w), latents divided by `scaling_factor` -> pixels (n 3 8h 8w), roughly in [-1, 1].

        chunk_size: how many frames are decoded at a time, all by default.
        Raises ValueError if the shape of z or chunk_size is wrong.
        """
        self.check("z", z, self.config.latent_channels)
        return self.in_pieces(self.decode_frames, z, chunk_size, 1, self.config.factor)

    def encode_frames(self, x: Tensor) -> Tensor:
        """x (n 3 h w) -> mean and log variance (n 2c h//8 w//8)."""
        return self.quant_conv(self.encoder(x))

    def decode_frames(self, z: Tensor) -> Tensor:
        """z (n c h w) -> pixels (n 3 8h 8w)."""
        return self.decoder(self.post_quant_conv(z))

    def check(self, name: str, x: Tensor, channels: int, least: int = 1) -> None:
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"{name} must be (frames, {channels} channels, height, width), not {tuple(x.shape)}")
        if min(x.shape[2:]) < least:
            raise ValueError(f"{name} must be at least {least} x {least} pixels, not {x.shape[2]} x {x.shape[3]}")

    def in_pieces(
        self, half: Callable[[Tensor], Tensor], x: Tensor, chunk_size: int | None, unit: int, unit_out: int
    ) -> Tensor:
        """half(x), encoder or decoder, in chunks of frames, and in tiles if x is larger than a tile.

        unit, unit_out: 1 for latents, pixels per latent for pixels; of the input and of the output.
        """
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, not {chunk_size!r}")
        chunks = x.split(1 if self.slicing else int(chunk_size or max(1, len(x))))
        tiled = self.tiling is not None and max(x.shape[2:]) > self.tiling[0] * unit
        pieces = [self.run_tiles(half, c, unit, unit_out) if tiled else half(c) for c in chunks]
        return torch.cat(pieces)

    def run_tiles(self, half: Callable[[Tensor], Tensor], x: Tensor, unit: int, unit_out: int) -> Tensor:
        """half(x) tile by tile, from the top left. Each tile is blended with those above and to the left."""
        size, step = self.tiling
        keep, extent = step * unit_out, (size - step) * unit_out
        # The last tile has at least one latent.
        tops, lefts = (range(0, n - unit + 1, step * unit) for n in x.shape[2:])
        rows, above = [], []
        for top in tops:
            row: list[Tensor] = []
            for j, left in enumerate(lefts):
                tile = half(x[:, :, top : top + size * unit, left : left + size * unit])
                if above:
                    tile = blend(above[j], tile, extent, axis=2)
                if row:
                    tile = blend(row[-1], tile, extent, axis=3)
                row.append(tile)
            rows.append(torch.cat([tile[:, :, :keep, :keep] for tile in row], dim=3))
            above = row
        return torch.cat(rows, dim=2)

    def enable_slicing(self) -> None:
        """Encode and decode one frame at a time. `chunk_size` is ignored then."""
        self.slicing = True

    def disable_slicing(self) -> None:
        self.slicing = False

    def enable_tiling(self, tile_size: int | None = None, overlap: float = 0.25) -> None:
        """Encode and decode large pictures in square tiles of `tile_size` pixels (default: the config's sample_size).

        Neighbouring tiles overlap by the fraction `overlap` of a tile, rounded up to whole latents. They are blended
        there. Raises ValueError if `tile_size` is less than one latent, or if `overlap` is not from 0 to below 1.
        """
        tile_size = self.config.sample_size if tile_size is None else tile_size
        size = tile_size // self.config.factor
        if size < 1:
            raise ValueError(f"tile_size must be at least {self.config.factor} pixels, not {tile_size!r}")
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap must be a fraction of a tile, from 0 to less than 1, not {overlap!r}")
        self.tiling = size, max(1, int(size * (1 - overlap)))

    def disable_tiling(self) -> None:
        self.tiling = None
