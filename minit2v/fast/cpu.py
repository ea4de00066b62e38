"""Float32 on a CPU: kernels that are compiled for this processor, or the fastest forms of PyTorch's operators.

The kernels are in minit2v_kernels/cpu.cpp. Without a C++ compiler, or with MINIT2V_KERNELS=torch, PyTorch's operators
run. Which of PyTorch's libraries is the fastest was measured on one Intel and two AMD processors. MKL uses AVX-512 only
on Intel's processors. On AMD's with AVX-512, oneDNN's products take half of MKL's time. On all others MKL's products
are as fast as oneDNN's. There they also beat oneDNN's convolutions, which rearrange their weights at every call.
"""

import os
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minit2v_kernels import cpu as kernels

from ..memory.heap import use_huge_pages
from ..memory.stream import is_streamed
from ..models.layers import Attention
from .ops import OWN, Ops


def is_intel() -> bool:
    """Whether the processor is from Intel."""
    cpuinfo = Path("/proc/cpuinfo")
    vendor = cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else platform.processor()
    return "GenuineIntel" in vendor


CAPABILITY = torch.backends.cpu.get_cpu_capability()
# Whether MKL's matrix products are the fastest of PyTorch's on this processor.
PRODUCTS = CAPABILITY == "AVX2" or (CAPABILITY == "AVX512" and is_intel())
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
KEPT = 0.3  # transformed copies may take this share of the bytes of a network's weights
FEW = 128  # rows: for so few, the compiled product beats those of PyTorch, which rearrange the weights at every call


class CPUOps(Ops):
    def __init__(self, x: Tensor, network: nn.Module, impl: str | None = None):
        super().__init__(x, impl)
        self.compiled = os.environ.get("MINIT2V_KERNELS") in (None, "", "auto") and kernels.library() is not None
        if self.compiled and not is_streamed(network):
            use_huge_pages(network.parameters())
        self.reads_fused = self.compiled
        self.matrix_units = self.compiled and kernels.has_matrix_units()
        self.few_pixels = 32 if self.matrix_units else 64  # of so few, a convolution is the fastest as one product
        self.room = KEPT * sum(p.nbytes for p in network.parameters())
        # (convolution, doubled) -> transformed weight, and the version of the original weight.
        self.kept: dict[tuple[nn.Conv2d, bool], tuple[Tensor, int]] = {}

    def kept_bytes(self) -> int:
        """The bytes of the transformed weights."""
        return sum(transformed.nbytes for transformed, _ in self.kept.values())

    def free_copies(self) -> None:
        self.kept.clear()

    def as_written(self, x: Tensor) -> Tensor:
        return x.contiguous()  # PyTorch's GroupNorm loses digits in channels-last memory

    def image_layout(self, x: Tensor) -> Tensor:
        return self.channels_last(x)

    def group_norm(
        self, m: nn.GroupNorm, x: Tensor, span: int, *, silu: bool = False, skip: Tensor | None = None,
        emb: Tensor | None = None,
    ) -> Tensor:
        whole = x.ndim == 4 and x.shape[1] % kernels.LANES == 0 and skip is None and emb is None
        if not self.compiled or not whole or not x.is_contiguous(memory_format=torch.channels_last):
            return super().group_norm(m, x, span, silu=silu, skip=skip, emb=emb)
        return kernels.group_norm_silu(x, m.weight, m.bias, m.num_groups, m.eps, silu, span)

    def layer_norm(self, m: nn.LayerNorm, x: Tensor, positions: Tensor | None = None) -> Tensor:
        if not self.compiled or x.shape[-1] % kernels.LANES or m.bias is None:
            return super().layer_norm(m, x, positions)
        return kernels.layer_norm(x.contiguous(), m.weight, m.bias, m.eps, positions)

    def add_layer_norm(
        self, m: nn.LayerNorm, x: Tensor, residual: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if not self.compiled or x.shape[-1] % kernels.LANES or m.bias is None or not x.is_contiguous():
            return super().add_layer_norm(m, x, residual, positions)
        return x, kernels.layer_norm(x, m.weight, m.bias, m.eps, positions, residual)

    def linear(self, m: nn.Linear, x: Tensor) -> Tensor:
        return self.product(x, m.weight, m.bias)

    def linear_add(self, m: nn.Linear, x: Tensor, residual: Tensor) -> Tensor:
        return self.product(x, m.weight, m.bias, residual)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """x (... k), weight (n k), bias (n), residual (... n) -> x weight' + bias + residual (... n)."""
        rows, k = x.numel() // x.shape[-1], x.shape[-1]
        if self.compiled and (self.matrix_units or rows <= FEW) and k % kernels.LANES == 0 and weight.is_contiguous():
            return kernels.linear(x.contiguous(), weight, bias, residual)
        y = linear(x, weight, bias)
        return y if residual is None else y.add_(residual)

    def geglu(self, m: nn.Linear, x: Tensor) -> Tensor:
        of_value, of_gate = m.weight.chunk(2)
        if self.compiled and len(of_gate) % kernels.LANES == 0:
            return kernels.geglu(self.product(x, of_value), self.product(x, of_gate), m.bias)
        rows = x.numel() // x.shape[-1]
        if not PRODUCTS or rows <= 64:
            # For few rows and many columns, oneDNN is faster on every processor.
            value, gate = linear(x, m.weight, m.bias, onednn=True).chunk(2, dim=-1)
            return F.gelu(gate).mul_(value)
        bias, bias_gate = (None, None) if m.bias is None else m.bias.chunk(2)
        return F.gelu(F.linear(x, of_gate, bias_gate)).mul_(F.linear(x, of_value, bias))

    def queries_keys_values(self, m: Attention, x: Tensor) -> tuple[Tensor, ...]:
        if self.compiled:
            return super().queries_keys_values(m, x)
        return tuple(self.linear(to, x).unflatten(-1, (m.heads, -1)) for to in (m.to_q, m.to_k, m.to_v))

    def frame_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, f, p, h, d = q.shape
        if self.compiled and f <= kernels.MOST_FRAMES and d % kernels.LANES == 0:
            return kernels.temporal_attention(q, k, v)
        if not PRODUCTS or p < 64:
            return super().frame_attention(q, k, v)
        q, k, v = (y.permute(0, 2, 3, 1, 4).reshape(-1, f, d) for y in (q, k, v))  # (b p h) f d
        y = torch.bmm(torch.bmm(q * d**-0.5, k.transpose(1, 2)).softmax(-1), v)
        return y.view(b, p, h, f, d).permute(0, 3, 1, 2, 4).contiguous()

    def conv(self, m: nn.Conv2d, x: Tensor, bias: Any = OWN) -> Tensor:
        bias = m.bias if bias is OWN else bias
        n, c, h, w = x.shape
        rows = n * h * w
        many = 384 if self.matrix_units else 256  # with fewer channels, Winograd's method gains nothing
        if self.is_winograds(m) and rows >= 256 and c + len(m.weight) >= many and h % 2 == w % 2 == 0:
            return kernels.winograd(self.channels_last(x), self.transformed(m, doubled=False), bias)
        if (PRODUCTS or self.compiled) and is_common(m):
            if m.kernel_size == (1, 1) and m.stride == (1, 1) and m.padding == (0, 0):
                pixels = self.channels_last(x).permute(0, 2, 3, 1)
                return self.product(pixels, m.weight.flatten(1), bias).permute(0, 3, 1, 2)
            if rows <= self.few_pixels * m.stride[0] * m.stride[1]:
                return self.unfolded(x, m.weight, bias, m.stride, m.padding)
            if self.is_for_matrix_units(m):
                return kernels.conv(self.channels_last(x), m.weight, bias, m.stride, m.padding)
        # oneDNN rearranges the weights for channels-last input at every call. At the coarse levels this takes as long
        # as the convolution itself.
        large = rows >= 2 * c  # 2 was measured with 160 to 1280 channels
        return m._conv_forward(self.channels_last(x) if large else x.contiguous(), m.weight, bias)

    def temporal_conv(self, m: nn.Conv3d, x: Tensor, residual: Tensor | None) -> Tensor:
        rows = x.shape[0] * x.shape[2] * x.shape[3]
        if rows > self.few_pixels and self.is_for_matrix_units(m):
            residual = None if residual is None else self.channels_last(residual)
            return kernels.conv(self.channels_last(x), m.weight.squeeze(-1), m.bias, (1, 1), (1, 0), residual)
        if not (PRODUCTS or self.compiled) or rows > 256 or rows >= x.shape[1]:
            return super().temporal_conv(m, x, residual)
        y = self.unfolded(x, m.weight.squeeze(-1), m.bias, (1, 1), (1, 0))
        return y if residual is None else y.add_(residual)

    def unfolded(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]
    ) -> Tensor:
        """A convolution of few pixels x (n c h w) as one matrix product. The weight (o c kh kw) is not rearranged."""
        windows = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        windows = windows.unfold(2, weight.shape[2], stride[0]).unfold(3, weight.shape[3], stride[1])  # n c h w kh kw
        n, _, h, w = windows.shape[:4]
        rows = windows.permute(0, 2, 3, 1, 4, 5).reshape(n * h * w, weight[0].numel())
        return self.product(rows, weight.flatten(1), bias).view(n, h, w, len(weight)).permute(0, 3, 1, 2)

    def double_and_conv(self, m: nn.Conv2d, x: Tensor) -> Tensor:
        if not is_3x3(m) or x.shape[0] * x.shape[2] * x.shape[3] < 256:  # too small to gain time
            return super().double_and_conv(m, x)
        if self.is_winograds(m):
            return kernels.winograd(self.channels_last(x), self.transformed(m, doubled=True), m.bias)
        # Doubling is a transposed convolution with a 2x2 kernel of ones. Together the two are a transposed convolution.
        # Its 4x4 kernel is the flipped 3x3 kernel, summed over 2x2 windows. So 4 pixels need 16 products, not 36.
        windows = m.weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
        kernel = torch.einsum("ya,xb,oiab->ioyx", windows, windows, m.weight)
        return F.conv_transpose2d(self.channels_last(x), kernel, m.bias, stride=2, padding=1)

    def is_winograds(self, m: nn.Conv2d) -> bool:
        """Whether the compiled kernel of Winograd's method can run it."""
        return self.compiled and is_3x3(m) and m.out_channels % kernels.LANES == 0 and self.is_whole(m)

    def is_for_matrix_units(self, m: nn.Conv2d | nn.Conv3d) -> bool:
        """Whether the compiled kernel of convolutions can run it."""
        return self.matrix_units and m.weight[0, 0].numel() <= kernels.MOST_TAPS and self.is_whole(m)

    def is_whole(self, m: nn.Conv2d | nn.Conv3d) -> bool:
        """Whether the compiled kernels can read its weight."""
        return m.in_channels % kernels.LANES == 0 and m.weight.is_contiguous()

    def transformed(self, m: nn.Conv2d, doubled: bool) -> Tensor:
        """The weight in Winograd's form. It is kept for the rest of the run, if that is within the limit for copies."""
        kept = self.kept.get((m, doubled))
        countable = not m.weight.is_inference()
        if kept is not None and countable and kept[1] == m.weight._version:
            return kept[0]
        transformed = kernels.transform(m.weight, doubled)
        if countable and (kept is not None or self.kept_bytes() + transformed.nbytes <= self.room):
            self.kept[m, doubled] = transformed, m.weight._version
        return transformed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, onednn: bool | None = None) -> Tensor:
    """A linear layer. onednn: whether to use oneDNN's product; by default if MKL's is not the fastest."""
    onednn = not PRODUCTS if onednn is None else onednn
    if not onednn or not ONEDNN:
        return F.linear(x, weight, bias)
    # oneDNN would read a bias with gaps as if it had none.
    return torch.ops.mkldnn._linear_pointwise(x, weight, kernels.dense(bias), "none", [], "")


def is_common(m: nn.Conv2d) -> bool:
    """Whether it has one group, no dilation, and zero padding."""
    return m.dilation == (1, 1) and m.groups == 1 and m.padding_mode == "zeros" and not isinstance(m.padding, str)


def is_3x3(m: nn.Conv2d) -> bool:
    """Whether it is a common 3x3 convolution that keeps height and width."""
    return is_common(m) and m.kernel_size == (3, 3) and m.stride == (1, 1) and m.padding == (1, 1)
