"""Float32 on a CPU: convolutions and products in the form that PyTorch's two libraries, oneDNN and MKL, are fast at.

Measured on two kinds of AMD processors (benchmarks/results/cpu_vs_diffusers.json). With AVX-512, oneDNN's products
take half of MKL's time, for MKL uses AVX-512 on Intel's processors only. Without it MKL is a little faster, and its
products are worth more than oneDNN's convolutions, which rearrange their weights at every call.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.layers import Attention
from .ops import OWN, Ops

PRODUCTS = torch.backends.cpu.get_cpu_capability() == "AVX2"  # whether MKL's products are the fastest thing here
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
KEPT = 0.3  # of a network's weights: what copies in another form may take
CHUNK = 1_000_000  # numbers that Winograd's method works on at a time: they fit into the caches


class CPUOps(Ops):
    def __init__(self, x: Tensor, network: nn.Module):
        super().__init__(x)
        self.room = KEPT * sum(p.nbytes for p in network.parameters())
        self.kept: dict[nn.Conv2d, tuple[Tensor, int, tuple[int, float]]] = {}  # transformed weights, of which version

    def kept_bytes(self) -> int:
        """What the copies of weights take."""
        return sum(transformed.nbytes for transformed, *_ in self.kept.values())

    def check_kept(self) -> None:
        """Drop the copies whose weights were changed by way of `.data`, which nobody counts."""
        self.kept = {m: kept for m, kept in self.kept.items() if kept[2] == fingerprint(m.weight)}

    def image_layout(self, x: Tensor) -> Tensor:
        return self.channels_last(x)

    def linear(self, m: nn.Linear, x: Tensor) -> Tensor:
        return linear(x, m.weight, m.bias)

    def geglu(self, m: nn.Linear, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if not PRODUCTS or rows <= 64:
            value, gate = linear(x, m.weight, m.bias).chunk(2, dim=-1)
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
        if PRODUCTS and is_3x3(m):
            if rows >= 256 and c + len(m.weight) > 320 and h % 2 == w % 2 == 0:
                transformed = self.transformed(m)
                if transformed is not None or rows >= 1024:
                    transformed = transform(m.weight) if transformed is None else transformed
                    return winograd(self.channels_last(x), transformed, bias)
            if rows <= 64:
                return unfolded(x, m.weight, bias)
        # Else weights, which are stored with the input channels outside, are rearranged at every call: at the coarse
        # levels that takes as long as the convolution itself.
        large = rows >= 2 * c  # 2: measured, on widths of 160 to 1280
        return m._conv_forward(self.channels_last(x) if large else x.contiguous(), m.weight, bias)

    def double_and_conv(self, m: nn.Conv2d, x: Tensor) -> Tensor:
        # Doubling is a transposed convolution with a 2x2 kernel of ones, so the two in one are a transposed convolution
        # whose 4x4 kernel is the 3x3 one, flipped, summed over 2x2 windows: 16 products for 4 pixels instead of 36.
        if not is_3x3(m) or x.shape[0] * x.shape[2] * x.shape[3] < 256:  # the sums must be worth their while
            return super().double_and_conv(m, x)
        windows = m.weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
        kernel = torch.einsum("ya,xb,oiab->ioyx", windows, windows, m.weight)
        return F.conv_transpose2d(self.channels_last(x), kernel, m.bias, stride=2, padding=1)

    def transformed(self, m: nn.Conv2d) -> Tensor | None:
        """Winograd's form of the weight, kept where there is room."""
        kept = self.kept.get(m)
        if kept is not None and kept[1] == m.weight._version:
            return kept[0]
        if m.weight.is_inference() or (kept is None and self.kept_bytes() + 16 / 9 * m.weight.nbytes > self.room):
            return None
        self.kept[m] = transform(m.weight), m.weight._version, fingerprint(m.weight)
        return self.kept[m][0]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if PRODUCTS or not ONEDNN:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def is_3x3(m: nn.Conv2d) -> bool:
    """Whether it is a convolution over 3x3 pixels, of one group, that keeps the size."""
    return (
        m.kernel_size == (3, 3) and m.stride == (1, 1) and m.padding == (1, 1) and m.dilation == (1, 1)
        and m.groups == 1 and m.padding_mode == "zeros"
    )  # fmt: skip


def unfolded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution of few pixels (n c h w) as one product of (n h w, 9 c) with the weight as it lies in memory."""
    n, c, h, w = x.shape
    windows = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)  # n c h w 3 3
    rows = windows.permute(0, 2, 3, 1, 4, 5).reshape(n * h * w, -1)
    return F.linear(rows, weight.flatten(1), bias).view(n, h, w, -1).permute(0, 3, 1, 2)


def fingerprint(x: Tensor) -> tuple[int, float]:
    """Two numbers that change with x: the sum of its bits, and a sum that minds their order."""
    flat = x.detach().flatten()
    return int(flat.view(torch.int32).sum(dtype=torch.int64)), float(flat @ torch.linspace(-1, 1, len(flat)))


# ---------------------------------------------------------------------------------------------------------- Winograd
#
# Four neighbouring results of a 3x3 convolution from 16 products instead of 36: F(2x2, 3x3) of Lavin and Gray 2015,
# arXiv:1509.09308. Y = A' [(G w G') * (B' x B)] A; the products are matrix products over the channels.

G = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])


def transform(weight: Tensor) -> Tensor:
    """weight (o i 3 3) -> G w G', (16 i o)."""
    return torch.einsum("ak,bl,oikl->abio", G, G, weight).reshape(16, weight.shape[1], weight.shape[0]).contiguous()


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (n c h w) in channels-last memory, h and w even, weight (16 c o) of `transform` -> (n o h w), channels-last."""
    n, c, h, w = x.shape
    o = weight.shape[2]
    padded = x.new_zeros((n, h + 2, w + 2, c))
    padded[:, 1:-1, 1:-1].copy_(x.permute(0, 2, 3, 1))
    y = x.new_empty((n, h, w, o))
    row = 8 * w * max(c, o)  # numbers that a row of tiles of one frame takes on the way
    frames = max(1, CHUNK // (row * (h // 2)))
    rows = max(1, min(h // 2, CHUNK // row))
    for i in range(0, n, frames):
        for j in range(0, h // 2, rows):
            end = min(h // 2, j + rows)
            tiles(padded[i : i + frames, 2 * j : 2 * end + 2], weight, bias, y[i : i + frames, 2 * j : 2 * end])
    return y.permute(0, 3, 1, 2)


def tiles(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """x (m 2r+2 2s+2 c) -> y (m 2r 2s o), r x s tiles."""
    m, height, width, c = x.shape
    r, s, o = height // 2 - 1, width // 2 - 1, weight.shape[2]
    rows = x.new_empty((4, m, r, width, c))  # B' x
    x0, x1, x2, x3 = (x[:, k : k + 2 * r : 2] for k in range(4))
    torch.sub(x0, x2, out=rows[0])
    torch.add(x1, x2, out=rows[1])
    torch.sub(x2, x1, out=rows[2])
    torch.sub(x1, x3, out=rows[3])
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
