"""Every shape at which the networks call the fused ops, derived from their configs, with calls per denoising step.

    PYTHONPATH=.:kernels:convert python benchmarks/kernel_shapes.py [workload ...]      # prints the table

A `Shape` makes the op's arguments (`make`), also on `meta`, and counts what the op must at least move and compute
(`bytes`, `flops`). Used by benchmarks/kernels.py, which measures, and by whatever compiles the kernels ahead of time.

Batch 2 (classifier-free guidance), 77 text tokens. `calls` are per denoising step; of the VAE's shapes per decoded
video; 0: a point beyond what the networks ask for today.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from minit2v.models.unet3d import UNet3DConfig
from minit2v.models.unet_motion import UNetMotionConfig
from minit2v.models.vae import AutoencoderKLConfig
from minit2v_kernels import norm

TEXT = 77
CACHE = 40_000_000  # bytes that a second reading may find in the L2 cache: an A100's is 40 MB, an H100's 50 MB


def vae(*channels: int, **fields: Any) -> AutoencoderKLConfig:
    """The published one, at these widths."""
    return AutoencoderKLConfig(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        **{"layers_per_block": 2, "sample_size": 512} | fields,
    )


@dataclass(frozen=True)
class Workload:
    """A published model at the size of video that its authors trained it for."""

    name: str
    config: Any  # of the UNet
    width: int
    height: int
    frames: int
    batch: int = 2
    vae: AutoencoderKLConfig = vae(128, 256, 512, 512)

    @property
    def title(self) -> str:
        return f"{self.name} {self.width}x{self.height}x{self.frames}"

    @property
    def latents(self) -> tuple[int, int]:
        factor = self.vae.factor
        return self.height // factor, self.width // factor

    def level(self, i: int) -> tuple[int, int]:
        """Height and width of the UNet's i-th level: a convolution of stride 2 rounds up."""
        h, w = self.latents
        for _ in range(i):
            h, w = (h + 1) // 2, (w + 1) // 2
        return h, w


MODELSCOPE = UNet3DConfig()
ANIMATEDIFF = UNetMotionConfig(cross_attention_dim=768)
WORKLOADS = {
    work.name: work
    for work in (
        Workload("modelscope", MODELSCOPE, 256, 256, 16),
        Workload("zeroscope", MODELSCOPE, 576, 320, 24),
        Workload("zeroscope-xl", MODELSCOPE, 1024, 576, 24),
        Workload("animatediff", ANIMATEDIFF, 512, 512, 16),
        Workload("modelscope-64", MODELSCOPE, 256, 256, 64),
    )
}


# The same two networks with a handful of channels: for a dry run of the benchmarks on a CPU, and for their tests.
SMALL = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 24}
UNET3D = {name: (f"CrossAttn{name}Block3D", f"{name}Block3D") for name in ("Down", "Up")}
MOTION = {name: (f"CrossAttn{name}BlockMotion", f"{name}BlockMotion") for name in ("Down", "Up")}
SMALL_VAE = vae(8, 16, layers_per_block=1, norm_num_groups=4)
TINY = {
    work.name: work
    for work in (
        Workload(
            "tiny-unet3d",
            UNet3DConfig(
                down_block_types=UNET3D["Down"], up_block_types=UNET3D["Up"][::-1], attention_head_dim=8, **SMALL
            ),
            12, 8, 3, vae=SMALL_VAE,
        ),
        Workload(
            "tiny-motion",
            UNetMotionConfig(
                down_block_types=MOTION["Down"], up_block_types=MOTION["Up"][::-1], num_attention_heads=2,
                motion_num_attention_heads=2, **SMALL,
            ),
            8, 8, 4, vae=SMALL_VAE,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One call. A subclass has the sizes as fields, and `op`, the name in minit2v_kernels, and `family`, in PROVEN."""

    op: ClassVar[str]
    family: ClassVar[str]
    matrix: ClassVar[bool] = False  # whether arithmetic can be what bounds it

    workload: str
    part: str  # where in the network
    calls: int

    @property
    def name(self) -> str:
        """op and sizes, less those that are as usual: equal calls of several workloads have one name."""
        return f"{self.op}({', '.join(n if v is True else f'{n}={v}' for n, v in self.sizes.items())})"

    @property
    def sizes(self) -> dict[str, Any]:
        """Those that are not as usual."""
        return {f.name: getattr(self, f.name) for f in fields(self)[3:] if getattr(self, f.name) != f.default}

    def make(
        self, device: Any = "meta", dtype: torch.dtype = torch.float16, seed: int = 0
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The op's arguments and keywords: random numbers of a size that networks have, in the networks' layouts."""
        raise NotImplementedError

    def tail(self, args: tuple[Any, ...], kw: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for the end of the first axis alone: few enough numbers to be judged in float64."""
        raise NotImplementedError

    def bytes(self, size: int = 2) -> int:
        """What must move at least: each input read once, each output written once, `size` bytes a number."""
        raise NotImplementedError

    def flops(self) -> int:
        """Multiplications and additions of the matrix products in it; 0 where there are none."""
        return 0


class Numbers:
    """Random tensors on any device, the same for the same seed; on `meta` only their shapes."""

    def __init__(self, device: Any, dtype: torch.dtype, seed: int):
        self.device, self.dtype = torch.device(device), dtype
        self.generator = None
        if self.device.type != "meta":
            self.generator = torch.Generator(self.device).manual_seed(seed)

    def __call__(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        if self.generator is None:
            return torch.empty(shape, device=self.device, dtype=self.dtype)
        x = torch.randn(shape, device=self.device, dtype=self.dtype, generator=self.generator)
        return x.mul_(std).add_(mean)


@dataclass(frozen=True)
class GroupNorm(Shape):
    """x ((n frames) c h w) in channels-last memory; `skip` of c2 channels behind it; `emb` rows (c) added before."""

    op = "group_norm_silu"
    family = "group_norm_silu"

    n: int  # all frames of all videos
    c: int
    h: int
    w: int
    frames: int = 1  # consecutive entries of n that share statistics
    c2: int = 0
    emb: int = 0  # rows of emb
    silu: bool = True
    groups: int = 32
    eps: float = 1e-5

    def make(self, device: Any = "meta", dtype: torch.dtype = torch.float16, seed: int = 0) -> Any:
        new = Numbers(device, dtype, seed)
        last = torch.channels_last
        x = new(self.n, self.h, self.w, self.c, mean=0.5).permute(0, 3, 1, 2)
        assert x.is_contiguous(memory_format=last)
        c = self.c + self.c2
        kw: dict[str, Any] = {"silu": self.silu, "frames": self.frames}
        if self.c2:
            kw["skip"] = new(self.n, self.h, self.w, self.c2, mean=-0.5).permute(0, 3, 1, 2)
        if self.emb:
            kw["emb"] = new(self.emb, self.c)
        return (x, new(c, mean=1.0, std=0.1), new(c, std=0.1), self.groups, self.eps), kw

    def tail(self, args: Any, kw: Any) -> Any:
        """The last frames that share statistics."""
        cut = {"skip": -self.frames, "emb": -1}
        args = tuple(x[-self.frames :] if isinstance(x, Tensor) and x.ndim == 4 else x for x in args)
        return args, {name: value[cut[name] :] if name in cut else value for name, value in kw.items()}

    def bytes(self, size: int = 2) -> int:
        """In one launch x is read once. In three it is read for the statistics and again for the result.

        All of it is read before any of it is read again, so the whole must fit into the cache.
        """
        x = self.n * (self.c + self.c2) * self.h * self.w * size
        return (3 if x > CACHE and self.launches(size) == 3 else 2) * x

    def launches(self, size: int = 2, target: str = "sm_90") -> int:
        """Of the kernel in channels-last memory: 1 or 3."""
        shape = self.n, self.c, self.h, self.w
        return norm.launches(shape, self.c + self.c2, self.groups, self.frames, True, size, target)


@dataclass(frozen=True)
class AddGroupNorm(GroupNorm):
    """The same of x + residual, and the sum."""

    op = "add_group_norm_silu"

    def make(self, device: Any = "meta", dtype: torch.dtype = torch.float16, seed: int = 0) -> Any:
        (x, *others), kw = super().make(device, dtype, seed)
        residual = Numbers(device, dtype, seed + 1)(self.n, self.h, self.w, self.c).permute(0, 3, 1, 2)
        return (x, residual, *others), kw

    def bytes(self, size: int = 2) -> int:
        """Two are read and two written; the sum is read again where it no longer is in the cache."""
        return super().bytes(size) + 2 * self.n * self.c * self.h * self.w * size


@dataclass(frozen=True)
class TemporalAttention(Shape):
    """q, k, v (b f p h d): views of one fused projection (b f p 3 h d)."""

    op = "temporal_attention"
    family = "temporal_attention"

    b: int
    f: int
    p: int
    h: int
    d: int
    causal: bool = False
    window: int | None = None

    def make(self, device: Any = "meta", dtype: torch.dtype = torch.float16, seed: int = 0) -> Any:
        qkv = Numbers(device, dtype, seed)(self.b, self.f, self.p, 3, self.h, self.d)
        kw = {"causal": self.causal} if self.causal else {}
        return qkv.unbind(3), kw | ({"window": self.window} if self.window else {})

    def tail(self, args: Any, kw: Any) -> Any:
        return tuple(x[-1:] for x in args), kw

    def bytes(self, size: int = 2) -> int:
        return 4 * self.b * self.f * self.p * self.h * self.d * size

    def flops(self) -> int:
        return 4 * self.b * self.p * self.h * self.d * self.f**2


@dataclass(frozen=True)
class SpatialAttention(Shape):
    """F.scaled_dot_product_attention, (n h l d) and (n h m d): no kernel of ours; which of PyTorch's is the fastest?"""

    op = "scaled_dot_product_attention"
    family = "scaled_dot_product_attention"
    matrix = True

    n: int
    h: int
    l: int  # noqa: E741  queries
    m: int  # keys
    d: int

    def make(self, device: Any = "meta", dtype: torch.dtype = torch.float16, seed: int = 0) -> Any:
        new = Numbers(device, dtype, seed)
        return tuple(new(self.n, rows, self.h, self.d).transpose(1, 2) for rows in (self.l, self.m, self.m)), {}

    def tail(self, args: Any, kw: Any) -> Any:
        return tuple(x[-1:] for x in args), kw

    def bytes(self, size: int = 2) -> int:
        return 2 * self.n * self.h * (self.l + self.m) * self.d * size

    def flops(self) -> int:
        return 4 * self.n * self.h * self.l * self.m * self.d


@dataclass(frozen=True)
class Geglu(Shape):
    """x (rows d), weight (2m d) -> (rows m)."""

    op = "geglu"
    family = "geglu"
    matrix = True

    rows: int
    d: int
    m: int

    def make(self, device: Any = "meta", dtype: torch.dtype = torch.float16, seed: int = 0) -> Any:
        new = Numbers(device, dtype, seed)
        return (new(self.rows, self.d), new(2 * self.m, self.d, std=self.d**-0.5), new(2 * self.m, std=0.1)), {}

    def tail(self, args: Any, kw: Any) -> Any:
        x, *others = args
        return (x[-4096:], *others), kw

    def bytes(self, size: int = 2) -> int:
        return (self.rows * (self.d + self.m) + 2 * self.m * self.d) * size

    def flops(self) -> int:
        return 4 * self.rows * self.d * self.m


@dataclass(frozen=True)
class LayerNorm(Shape):
    """x (b f p d), positions (f d) added after the norm."""

    op = "layer_norm"
    family = "add_layer_norm"

    b: int
    f: int
    p: int
    d: int
    positions: bool = False

    def make(self, device: Any = "meta", dtype: torch.dtype = torch.float16, seed: int = 0) -> Any:
        new = Numbers(device, dtype, seed)
        x = new(self.b, self.f, self.p, self.d, mean=0.5)
        kw = {"positions": new(self.f, self.d)} if self.positions else {}
        return (x, new(self.d, mean=1.0, std=0.1), new(self.d, std=0.1)), kw

    def tail(self, args: Any, kw: Any) -> Any:
        return tuple(x[-1:] if x.ndim == 4 else x for x in args), kw

    def bytes(self, size: int = 2) -> int:
        return 2 * self.b * self.f * self.p * self.d * size


@dataclass(frozen=True)
class AddLayerNorm(LayerNorm):
    """The same of x + residual, and the sum."""

    op = "add_layer_norm"

    def make(self, device: Any = "meta", dtype: torch.dtype = torch.float16, seed: int = 0) -> Any:
        (x, *others), kw = super().make(device, dtype, seed)
        return (x, Numbers(device, dtype, seed + 1)(self.b, self.f, self.p, self.d), *others), kw

    def bytes(self, size: int = 2) -> int:
        return 2 * super().bytes(size)


@dataclass(frozen=True)
class TemporalConv(Shape):
    """x (b c f p) in channels-last memory, weight (c c 3 1 1): the convolution along f."""

    op = "temporal_conv"
    family = "temporal_conv"
    matrix = True

    b: int
    c: int
    f: int
    p: int
    residual: bool = False

    def make(self, device: Any = "meta", dtype: torch.dtype = torch.float16, seed: int = 0) -> Any:
        new = Numbers(device, dtype, seed)
        x = new(self.b, self.f, self.p, self.c).permute(0, 3, 1, 2)
        # In channels-last memory, as `pipe.optimize()` lays it.
        weight = new(self.c, 3, 1, 1, self.c, std=(3 * self.c) ** -0.5).permute(0, 4, 1, 2, 3)
        bias = new(self.c, std=0.1)
        kw = {"residual": new(self.b, self.f, self.p, self.c).permute(0, 3, 1, 2)} if self.residual else {}
        return (x, weight, bias), kw

    def tail(self, args: Any, kw: Any) -> Any:
        x, *others = args
        return (x[-1:], *others), {name: value[-1:] for name, value in kw.items()}

    def bytes(self, size: int = 2) -> int:
        return ((3 if self.residual else 2) * self.b * self.c * self.f * self.p + 3 * self.c**2) * size

    def flops(self) -> int:
        """The two taps that reach over an end of the video are not counted."""
        return 2 * self.b * self.c**2 * self.p * (3 * self.f - 2)


@dataclass(frozen=True)
class LinearAdd(Shape):
    """x (rows d), weight (m d), residual (rows m) -> (rows m)."""

    op = "linear_add"
    family = "linear_add"
    matrix = True

    rows: int
    d: int
    m: int

    def make(self, device: Any = "meta", dtype: torch.dtype = torch.float16, seed: int = 0) -> Any:
        new = Numbers(device, dtype, seed)
        weight, bias = new(self.m, self.d, std=self.d**-0.5), new(self.m, std=0.1)
        return (new(self.rows, self.d), weight, bias, new(self.rows, self.m)), {}

    def tail(self, args: Any, kw: Any) -> Any:
        x, weight, bias, residual = args
        return (x[-4096:], weight, bias, residual[-4096:]), kw

    def bytes(self, size: int = 2) -> int:
        return (self.rows * (self.d + 2 * self.m) + self.m * self.d) * size

    def flops(self) -> int:
        return 2 * self.rows * self.d * self.m


def walk(config: Any) -> Iterator[tuple[int, int, int, int, bool, str]]:
    """The blocks of a UNet in their order: level, channels in, of the skip beside it, out, attention, part."""
    channels, count = config.block_out_channels, config.layers_per_block
    last, skips, c = len(channels) - 1, [channels[0]], channels[0]
    for i, c_out in enumerate(channels):
        for _ in range(count):
            yield i, c, 0, c_out, config.attention[i], "down"
            skips.append(c := c_out)
        if i < last:
            skips.append(c)
    yield last, c, 0, c, True, "mid"
    yield last, c, 0, c, False, "mid"
    for i in range(last, -1, -1):
        for _ in range(count + 1):
            yield i, c, skips.pop(), channels[i], config.attention[i], "up"
            c = channels[i]


def transformer(work: Workload, part: str, level: int, heads: int, d: int, kind: str, c: int) -> Iterator[Shape]:
    """A TransformerBlock on (b f p) tokens of heads x d, and the projection to the c channels around it.

    kind: "space", "time" or "motion".
    """
    b, f, name, dim = work.batch, work.frames, work.name, heads * d
    h, w = work.level(level)
    p, motion = h * w, kind == "motion"
    yield LayerNorm(name, part, 1, b, f, p, dim, positions=motion)
    if kind == "space":
        yield SpatialAttention(name, part, 1, b * f, heads, p, p, d)
        yield SpatialAttention(name, part, 1, b * f, heads, p, TEXT, d)
    else:
        yield TemporalAttention(name, part, 2, b, f, p, heads, d)
    yield AddLayerNorm(name, part, 1, b, f, p, dim, positions=motion)
    yield AddLayerNorm(name, part, 1, b, f, p, dim)
    yield Geglu(name, part, 1, b * f * p, dim, 4 * dim)
    yield LinearAdd(name, part, 1, b * f * p, 4 * dim, dim)
    yield LinearAdd(name, part, 1, b * f * p, dim, c)


def unet_calls(work: Workload) -> Iterator[Shape]:
    """What one step calls, call by call."""
    b, f, name, config = work.batch, work.frames, work.name, work.config
    n, base, groups = b * f, config.block_out_channels[0], config.norm_num_groups
    motion = isinstance(config, UNetMotionConfig)
    if not motion:
        yield GroupNorm(name, "stem", 1, n, base, *work.level(0), frames=f, silu=False, groups=groups, eps=1e-6)
        yield from transformer(work, "stem", 0, 8, config.attention_head_dim, "time", base)
    for level, c_in, c_skip, c, attention, part in walk(config):
        size = work.level(level)
        yield GroupNorm(name, f"{part} res", 1, n, c_in, *size, c2=c_skip, groups=groups)
        yield GroupNorm(name, f"{part} res", 1, n, c, *size, emb=1, groups=groups)  # one timestep for all
        if not motion:
            yield GroupNorm(name, f"{part} conv", 4, n, c, *size, frames=f, groups=groups)
            yield TemporalConv(name, f"{part} conv", 3, b, c, f, size[0] * size[1])
            yield TemporalConv(name, f"{part} conv", 1, b, c, f, size[0] * size[1], residual=True)
        heads = config.heads if motion else c // config.attention_head_dim
        if attention:
            yield GroupNorm(name, f"{part} space", 1, n, c, *size, silu=False, groups=groups, eps=1e-6)
            yield from transformer(work, f"{part} space", level, heads, c // heads, "space", c)
        if attention or motion and part != "mid":  # motion modules follow every block but the middle's second
            span = 1 if motion and config.motion_norms == "frame" else f
            yield GroupNorm(name, f"{part} time", 1, n, c, *size, frames=span, silu=False, groups=groups, eps=1e-6)
            heads = config.motion_num_attention_heads if motion else heads
            yield from transformer(work, f"{part} time", level, heads, c // heads, "motion" if motion else "time", c)
    yield GroupNorm(name, "out", 1, n, base, *work.level(0), groups=groups)


def vae_calls(work: Workload) -> Iterator[Shape]:
    """The norms of one decode of all frames."""
    config, n, name = work.vae, work.frames, work.name
    (h, w), c = work.latents, config.block_out_channels[-1]
    norm = GroupNorm(name, "vae", 1, n, c, h, w, groups=config.norm_num_groups, eps=1e-6)
    yield replace(norm, calls=4)  # two ResBlocks in the middle, and between them
    yield replace(norm, silu=False)  # the attention's
    for i, c_out in enumerate(reversed(config.block_out_channels)):
        for j in range(config.layers_per_block + 1):
            yield replace(norm, c=c if j == 0 else c_out, h=h << i, w=w << i)
            yield replace(norm, c=c_out, h=h << i, w=w << i)
        c = c_out
    yield replace(norm, c=c, h=h << i, w=w << i)


def residual_norms(work: Workload) -> Iterator[Shape]:
    """Norms that could take a residual along; AnimateDiff's over the clip: the reference's, and those of version 1."""
    n, f = work.batch * work.frames, work.frames
    fields = {"groups": work.config.norm_num_groups}
    for level, c in enumerate(work.config.block_out_channels[:3]):
        size = work.level(level)
        if isinstance(work.config, UNetMotionConfig):
            yield GroupNorm(work.name, "clip", 0, n, c, *size, frames=f, silu=False, eps=1e-6, **fields)
            yield GroupNorm(work.name, "clip", 0, n, c, *size, frames=f, **fields)
            yield AddGroupNorm(work.name, "residual", 0, n, c, *size, silu=False, eps=1e-6, **fields)
        else:
            yield AddGroupNorm(work.name, "residual", 0, n, c, *size, frames=f, **fields)


def extra_points() -> Iterator[Shape]:
    """Beyond the workloads: other lengths, larger frames, masks."""
    modelscope, animatediff = "modelscope", "animatediff"
    for f in (1, 24, 32, 64, 128):
        yield TemporalAttention(modelscope, f"frames: {f}", 0, 2, f, 1024, 5, 64)
    yield TemporalAttention(modelscope, "causal", 0, 2, 16, 1024, 5, 64, causal=True)
    yield TemporalAttention("modelscope-64", "window", 0, 2, 64, 1024, 5, 64, window=16)
    for d, p in ((40, 4096), (80, 1024), (160, 256)):
        yield TemporalAttention(animatediff, "frames: 32", 0, 2, 32, p, 8, d)
    yield TemporalAttention(animatediff, "1024x1024", 0, 2, 16, 16384, 8, 40)
    yield TemporalAttention(modelscope, "1536x1536: 73,728 sequences", 0, 2, 16, 36864, 5, 64)
    yield TemporalAttention("tiny-unet3d", "causal", 0, 1, 5, 3, 2, 8, causal=True)
    yield TemporalAttention("tiny-unet3d", "window", 0, 1, 5, 3, 2, 8, window=2)


def unique(calls: Iterator[Shape]) -> list[Shape]:
    """Equal calls of one workload as one, in their order, with their number."""
    counts: Counter[Shape] = Counter()
    for call in calls:
        counts[replace(call, calls=0)] += call.calls
    merged: dict[str, Shape] = {}
    for shape, calls in counts.items():
        first = merged.get(shape.name)
        if first is None:
            merged[shape.name] = replace(shape, calls=calls)
        else:
            merged[shape.name] = replace(first, calls=first.calls + calls)
    return list(merged.values())


def shapes(*names: str, vae: bool = True, extra: bool = True) -> list[Shape]:
    """Of these workloads (default: all the published ones), each distinct call of a workload once."""
    found = []
    for work in ((WORKLOADS | TINY)[name] for name in names or WORKLOADS):
        found += unique(unet_calls(work))
        if vae:
            found += unique(vae_calls(work))
        if extra:
            found += unique(residual_norms(work))
            found += unique(shape for shape in extra_points() if shape.workload == work.name)
    return found


def main() -> None:
    print(f"{'workload':14}{'calls':>6}{'MB':>8}{'GFLOP':>9}  call")
    for shape in shapes(*sys.argv[1:]):
        flops = f"{shape.flops() / 1e9:9.1f}" if shape.flops() else " " * 9
        print(f"{shape.workload:14}{shape.calls:6}{shape.bytes() / 1e6:8.1f}{flops}  {shape.name}  [{shape.part}]")


if __name__ == "__main__":
    main()
