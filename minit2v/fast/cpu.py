"""Float32 on a CPU: convolutions and matrix products in the forms that oneDNN and MKL, PyTorch's libraries, run fast.

It was measured on one Intel and two AMD processors (benchmarks/results/cpu_fast_path.json). MKL uses AVX-512 only on
Intel's processors. On AMD's with AVX-512, oneDNN's products take half of MKL's time. On all others MKL's products are
as fast as oneDNN's. There they also beat oneDNN's convolutions, which rearrange their weights at every call.
"""

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.layers import Attention
from .ops import OWN, Ops


def is_intel() -> bool:
    """Whether the processor is from Intel."""
    cpuinfo = Path("/proc/cpuinfo")
    vendor = cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else platform.processor()
    return "GenuineIntel" in vendor


CAPABILITY = torch.backends.cpu.get_cpu_capability()
# Whether MKL's matrix products are the fastest operation on this processor.
PRODUCTS = CAPABILITY == "AVX2" or (CAPABILITY == "AVX512" and is_intel())
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
KEPT = 0.3  # transformed copies may take this share of the bytes of a network's weights
Form = Callable[[Tensor], Tensor]  # weight (o i 3 3) -> Winograd's form of it
CHUNK = 1_000_000  # Winograd's method works on this many numbers per thread at a time, which fit into the caches


class CPUOps(Ops):
    def __init__(self, x: Tensor, network: nn.Module, impl: str | None = None):
        super().__init__(x, impl)
        self.room = KEPT * sum(p.nbytes for p in network.parameters())
        # (module, form) -> transformed weight, with version and fingerprint of the original weight.
        self.kept: dict[tuple[nn.Conv2d, Form], tuple[Tensor, int, tuple[int, float]]] = {}

    def kept_bytes(self) -> int:
        """The bytes of the transformed weights."""
        return sum(transformed.nbytes for transformed, *_ in self.kept.values())

    def check_kept(self) -> None:
        """Drops transformed weights whose originals were changed through `.data`, which PyTorch does not count."""
        self.kept = {key: kept for key, kept in self.kept.items() if kept[2] == fingerprint(key[0].weight)}

    def image_layout(self, x: Tensor) -> Tensor:
        return self.channels_last(x)

    def linear(self, m: nn.Linear, x: Tensor) -> Tensor:
        return linear(x, m.weight, m.bias)

    def geglu(self, m: nn.Linear, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if not PRODUCTS or rows <= 64:
            # For few rows and many columns, oneDNN is faster on every processor.
            value, gate = linear(x, m.weight, m.bias, onednn=True).chunk(2, dim=-1)
            return F.gelu(gate).mul_(value)
        of_value, of_gate = m.weight.chunk(2)
        bias, bias_gate = (None, None) if m.bias is None else m.bias.chunk(2)
        return F.gelu(F.linear(x, of_gate, bias_gate)).mul_(F.linear(x, of_value, bias))

    def queries_keys_values(self, m: Attention, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.linear(to, x).unflatten(-1, (m.heads, -1)) for to in (m.to_q, m.to_k, m.to_v))

    def frame_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, f, p, h, d = q.shape
        if not PRODUCTS or p < 64:
            return super().frame_attention(q, k, v)
        q, k, v = (y.permute(0, 2, 3, 1, 4).reshape(-1, f, d) for y in (q, k, v))  # (b p h) f d
        y = torch.bmm(torch.bmm(q * d**-0.5, k.transpose(1, 2)).softmax(-1), v)
        return y.view(b, p, h, f, d).permute(0, 3, 1, 2, 4).contiguous()

    def conv(self, m: nn.Conv2d, x: Tensor, bias: Any = OWN) -> Tensor:
        bias = m.bias if bias is OWN else bias
        n, c, h, w = x.shape
        rows = n * h * w
        if PRODUCTS and is_common(m):
            if m.kernel_size == (1, 1) and m.stride == (1, 1) and m.padding == (0, 0):
                pixels = self.channels_last(x).permute(0, 2, 3, 1)
                return F.linear(pixels, m.weight.flatten(1), bias).permute(0, 3, 1, 2)
            if is_3x3(m) and rows >= 256 and c + len(m.weight) > 320 and h % 2 == w % 2 == 0:
                transformed = self.transformed(m, transform)
                if transformed is not None or rows >= 1024:
                    transformed = transform(m.weight) if transformed is None else transformed
                    return winograd(self.channels_last(x), transformed, bias)
            if rows <= 64 * m.stride[0] * m.stride[1]:
                return unfolded(x, m.weight, bias, m.stride, m.padding)
        # oneDNN rearranges the weights for channels-last input at every call. At the coarse levels this takes as long
        # as the convolution itself.
        large = rows >= 2 * c  # 2 was measured with 160 to 1280 channels
        return m._conv_forward(self.channels_last(x) if large else x.contiguous(), m.weight, bias)

    def temporal_conv(self, m: nn.Conv3d, x: Tensor, residual: Tensor | None) -> Tensor:
        rows = x.shape[0] * x.shape[2] * x.shape[3]
        if not PRODUCTS or rows > 256 or rows >= x.shape[1]:
            return super().temporal_conv(m, x, residual)
        y = unfolded(x, m.weight.squeeze(-1), m.bias, (1, 1), (1, 0))
        return y if residual is None else y.add_(residual)

    def double_and_conv(self, m: nn.Conv2d, x: Tensor) -> Tensor:
        if not is_3x3(m) or x.shape[0] * x.shape[2] * x.shape[3] < 256:  # too small to gain time
            return super().double_and_conv(m, x)
        if PRODUCTS:
            transformed = self.transformed(m, transform_for_doubled)
            transformed = transform_for_doubled(m.weight) if transformed is None else transformed
            return winograd_of_doubled(self.channels_last(x), transformed, m.bias)
        # Doubling is a transposed convolution with a 2x2 kernel of ones. Together the two are a transposed convolution.
        # Its 4x4 kernel is the flipped 3x3 kernel, summed over 2x2 windows. So 4 pixels need 16 products, not 36.
        windows = m.weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
        kernel = torch.einsum("ya,xb,oiab->ioyx", windows, windows, m.weight)
        return F.conv_transpose2d(self.channels_last(x), kernel, m.bias, stride=2, padding=1)

    def transformed(self, m: nn.Conv2d, form: Form) -> Tensor | None:
        """The weight in Winograd's form, or None if it exceeds the limit for copies."""
        kept = self.kept.get((m, form))
        if kept is not None and kept[1] == m.weight._version:
            return kept[0]
        if m.weight.is_inference():
            return None
        transformed = form(m.weight)
        if kept is None and self.kept_bytes() + transformed.nbytes > self.room:
            return None
        self.kept[m, form] = transformed, m.weight._version, fingerprint(m.weight)
        return transformed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, onednn: bool | None = None) -> Tensor:
    """A linear layer. onednn: whether to use oneDNN's product; by default if MKL's is not the fastest."""
    onednn = not PRODUCTS if onednn is None else onednn
    if not onednn or not ONEDNN:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def is_common(m: nn.Conv2d) -> bool:
    """Whether it has one group, no dilation, and zero padding."""
    return m.dilation == (1, 1) and m.groups == 1 and m.padding_mode == "zeros" and not isinstance(m.padding, str)


def is_3x3(m: nn.Conv2d) -> bool:
    """Whether it is a common 3x3 convolution that keeps height and width."""
    return is_common(m) and m.kernel_size == (3, 3) and m.stride == (1, 1) and m.padding == (1, 1)


def unfolded(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    """A convolution of few pixels x (n c h w) as one matrix product. The weight (o c kh kw) is not rearranged."""
    windows = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    windows = windows.unfold(2, weight.shape[2], stride[0]).unfold(3, weight.shape[3], stride[1])  # n c h w kh kw
    n, _, h, w = windows.shape[:4]
    rows = windows.permute(0, 2, 3, 1, 4, 5).reshape(n * h * w, -1)
    return F.linear(rows, weight.flatten(1), bias).view(n, h, w, -1).permute(0, 3, 1, 2)


def fingerprint(x: Tensor) -> tuple[int, float]:
    """Two numbers that change with x: the sum of its bits, and a sum that depends on their order."""
    flat = x.detach().flatten()
    return int(flat.view(torch.int32).sum(dtype=torch.int64)), float(flat @ torch.linspace(-1, 1, len(flat)))


# ---------------------------------------------------------------------------------------------------------- Winograd
#
# It computes 2x2 results of a 3x3 convolution with 16 products, not 36: F(2x2, 3x3) of Lavin and Gray 2015,
# arXiv:1509.09308. Y = A' [(G w G') * (B' x B)] A. The products are matrix products over the channels.

G = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])


def transform(weight: Tensor) -> Tensor:
    """weight (o i 3 3) -> G w G', (16 i o)."""
    return torch.einsum("ak,bl,oikl->abio", G, G, weight).reshape(16, weight.shape[1], weight.shape[0]).contiguous()


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (n c h w) in channels-last memory, h and w even, weight (16 c o) of `transform` -> (n o h w), channels-last."""
    return in_pieces(x, weight, bias, tiles, 2, 2)


def winograd_of_doubled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (n c h w) in channels-last memory, weight (9 c o) of `transform_for_doubled` -> (n o 2h 2w), channels-last."""
    return in_pieces(x, weight, bias, tiles_of_doubled, 1, 2)


def in_pieces(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiles: Callable[..., None], read: int, written: int
) -> Tensor:
    """Runs `tiles` over x, as many tiles at a time as fit into the caches.

    read, written: height and width in pixels of a tile's part of the input and of the output.
    """
    n, c, height, width = x.shape
    products, _, o = weight.shape
    h, w = height // read, width // read  # tiles
    pixels = x.permute(0, 2, 3, 1)
    y = x.new_empty((n, written * h, written * w, o))
    row = products * w * max(c, o)  # intermediate numbers of one row of tiles of one frame
    chunk = CHUNK * min(4, torch.get_num_threads())  # with more threads at most 4, so that memory stays small
    frames = max(1, chunk // (row * h))
    rows = max(1, min(h, chunk // row))
    for i in range(0, n, frames):
        for j in range(0, h, rows):
            end = min(h, j + rows)
            piece = pixels[i : i + frames, max(0, read * j - 1) : read * end + 1]
            if j == 0 or end == h:  # a row of zeros above the first, and below the last
                piece = F.pad(piece, (0, 0, 0, 0, int(j == 0), int(end == h)))
            tiles(piece, weight, bias, y[i : i + frames, written * j : written * end])
    return y.permute(0, 3, 1, 2)


def between_zeros(x: Tensor, *shape: int) -> Tensor:
    """New memory like x, (... w + 2 c) for the shape (... w c), with zeros at both ends of the axis w."""
    y = x.new_empty((*shape[:-2], shape[-2] + 2, shape[-1]))
    y[..., 0, :] = 0
    y[..., -1, :] = 0
    return y


def tiles(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """x (m 2r+2 2s c) -> y (m 2r 2s o), r x s tiles. Left and right of x are zeros."""
    m, height, width, c = x.shape
    r, s, o = height // 2 - 1, width // 2, weight.shape[2]
    rows = between_zeros(x, 4, m, r, width, c)  # B' x
    x0, x1, x2, x3 = (x[:, k : k + 2 * r : 2] for k in range(4))
    inside = rows[..., 1:-1, :]
    torch.sub(x0, x2, out=inside[0])
    torch.add(x1, x2, out=inside[1])
    torch.sub(x2, x1, out=inside[2])
    torch.sub(x1, x3, out=inside[3])
    both = x.new_empty((4, 4, m, r, s, c))  # B' x B
    x0, x1, x2, x3 = (rows[..., k : k + 2 * s : 2, :] for k in range(4))
    torch.sub(x0, x2, out=both[:, 0])
    torch.add(x1, x2, out=both[:, 1])
    torch.sub(x2, x1, out=both[:, 2])
    torch.sub(x1, x3, out=both[:, 3])
    products = torch.bmm(both.view(16, -1, c), weight).view(4, 4, m, r, s, o)
    if bias is not None:
        products[1, 1].add_(bias)  # which goes into all four results, with weight 1
    rows = x.new_empty((2, 4, m, r, s, o))  # A' ...
    torch.add(products[0], products[1], out=rows[0]).add_(products[2])
    torch.sub(products[1], products[2], out=rows[1]).sub_(products[3])
    y = y.view(m, r, 2, s, 2, o).permute(2, 4, 0, 1, 3, 5)  # ... A
    torch.add(rows[:, 0], rows[:, 1] + rows[:, 2], out=y[:, 0])
    torch.sub(rows[:, 1] - rows[:, 2], rows[:, 3], out=y[:, 1])


# If every pixel of an image was doubled in height and width, two results read only three different rows. Then one of
# the four differences above is zero, and another is twice the pixel. So 2x2 results need only 9 products.

T = torch.tensor([[1.0, 0, 0], [1, 1, 1], [0, 0, 1]])


def transform_for_doubled(weight: Tensor) -> Tensor:
    """weight (o i 3 3) -> T w T', (9 i o)."""
    return torch.einsum("ak,bl,oikl->abio", T, T, weight).reshape(9, weight.shape[1], weight.shape[0]).contiguous()


def tiles_of_doubled(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """x (m r+2 s c), not doubled -> y (m 2r 2s o). Left and right of x are zeros."""
    m, height, s, c = x.shape
    r, o = height - 2, weight.shape[2]
    rows = between_zeros(x, 3, m, r, s, c)
    before, here, after = x[:, :-2], x[:, 1:-1], x[:, 2:]
    inside = rows[..., 1:-1, :]
    torch.sub(before, here, out=inside[0])
    inside[1].copy_(here)
    torch.sub(here, after, out=inside[2])
    both = x.new_empty((3, 3, m, r, s, c))
    before, here, after = rows[..., :-2, :], rows[..., 1:-1, :], rows[..., 2:, :]
    torch.sub(before, here, out=both[:, 0])
    both[:, 1].copy_(here)
    torch.sub(here, after, out=both[:, 2])
    products = torch.bmm(both.view(9, -1, c), weight).view(3, 3, m, r, s, o)
    if bias is not None:
        products[1, 1].add_(bias)  # which goes into all four results, with weight 1
    rows = x.new_empty((2, 3, m, r, s, o))
    torch.add(products[0], products[1], out=rows[0])
    torch.sub(products[1], products[2], out=rows[1])
    y = y.view(m, r, 2, s, 2, o).permute(2, 4, 0, 1, 3, 5)
    torch.add(rows[:, 0], rows[:, 1], out=y[:, 0])
    torch.sub(rows[:, 1], rows[:, 2], out=y[:, 1])
