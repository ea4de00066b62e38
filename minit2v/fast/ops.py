"""The operations for one device and one dtype: PyTorch's, or kernels of minit2v_kernels.

The choice is made once, when `Ops` is created for a network, and not at every call.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minit2v_kernels import _dispatch
from minit2v_kernels.attention import run_temporal_attention, temporal_attention_ref
from minit2v_kernels.conv import run_temporal_conv, temporal_conv_ref
from minit2v_kernels.feed_forward import geglu_ref, run_geglu
from minit2v_kernels.layer_norms import layer_norm_ref, run_add_layer_norm_into, run_layer_norm
from minit2v_kernels.norm import group_norm_silu_ref, run_group_norm_silu
from minit2v_kernels.projection import run_linear_add

from ..models.layers import Attention

OWN = object()  # stands for the convolution's own bias


class Ops:
    """The default operations, for GPUs and others: channels-last memory, one operation after the other."""

    def __init__(self, x: Tensor, impl: str | None = None, launched: str = "eager"):
        """x: any weight of the network. impl: chooses the kernels, as $MINIT2V_KERNELS does; see `_dispatch.pick`.

        launched: "eager", or "graph" if predictions are launched as CUDA graphs.
        """
        self.together: dict[Attention, Tensor] = {}  # fused weights of q, k and v (3 h d, c)
        self.room = 0.0  # the most bytes for transformed copies of weights
        chosen = {op: _dispatch.pick(op, impl, x, launched=launched) for op in _dispatch.OPS}
        self.kernels = [op for op, picked in chosen.items() if picked != "torch"]

        def either(op: str, kernel: Callable[..., Any], definition: Any) -> Any:
            picked = chosen[op]
            return picked if callable(picked) else kernel if picked == "triton" else definition

        self._group_norm = either("group_norm_silu", run_group_norm_silu, group_norm_silu_ref)
        self._layer_norm = either("layer_norm", run_layer_norm, layer_norm_ref)
        self._add_layer_norm = either("add_layer_norm", run_add_layer_norm_into, add_layer_norm)
        self._temporal_conv = either("temporal_conv", run_temporal_conv, temporal_conv_ref)
        self._geglu = either("geglu", run_geglu, geglu_ref)
        self._linear_add = either("linear_add", run_linear_add, None)
        self._attention = either("temporal_attention", run_temporal_attention, attend_frames)
        # Whether the norm is fused with the skip connection and the timestep embedding.
        self.reads_skip = self.reads_emb = chosen["group_norm_silu"] != "torch"
        # PyTorch's attention across frames needs no copy if q, k and v are three tensors. The kernel can read one.
        self.reads_fused = chosen["temporal_attention"] != "torch"

    def kept_bytes(self) -> int:
        """The bytes of transformed copies of weights."""
        return 0

    def free_copies(self) -> None:
        """Frees transformed copies of weights."""

    def channels_last(self, x: Tensor) -> Tensor:
        """x (n c h w) in channels-last memory, so that tokens (n (h w) c) are views."""
        return x.contiguous(memory_format=torch.channels_last)

    def as_written(self, x: Tensor) -> Tensor:
        """x (n c h w) in a memory layout that suits modules which run as they are written."""
        return x

    def image_layout(self, x: Tensor) -> Tensor:
        """x (n c h w) in the memory layout that is fast for the VAE. PyTorch's GroupNorm on CUDA needs contiguous x."""
        return self.channels_last(x) if self.reads_skip else x

    def group_norm(
        self, m: nn.GroupNorm, x: Tensor, span: int, *, silu: bool = False, skip: Tensor | None = None,
        emb: Tensor | None = None,
    ) -> Tensor:
        """x ((n span) c *spatial), concatenated with skip, plus emb (m c) -> GroupNorm, and SiLU if `silu`."""
        return self._group_norm(x, m.weight, m.bias, m.num_groups, m.eps, silu, span, skip, emb)

    def layer_norm(self, m: nn.LayerNorm, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """x (b f ... d), positions (f d) -> LayerNorm(x) + positions."""
        return self._layer_norm(x, m.weight, m.bias, m.eps, positions)

    def add_layer_norm(
        self, m: nn.LayerNorm, x: Tensor, residual: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """y = x + residual (b f ... d) -> (y, LayerNorm(y) + positions). x is overwritten."""
        return self._add_layer_norm(x, residual, m.weight, m.bias, m.eps, positions)

    def linear(self, m: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, m.weight, m.bias)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (... k), weight (n k) -> x weight' (... n)."""
        return F.linear(x, weight)

    def linear_add(self, m: nn.Linear, x: Tensor, residual: Tensor) -> Tensor:
        """x (... d), residual (... d_out) -> m of x, plus the residual (... d_out)."""
        if self._linear_add is None or m.bias is None:
            return self.linear(m, x).add_(residual)
        return self._linear_add(x, m.weight, m.bias, residual)

    def geglu(self, m: nn.Linear, x: Tensor) -> Tensor:
        """x (... d) -> value * gelu(gate) (... d_out / 2). value and gate are the halves of m(x)."""
        return self._geglu(x, m.weight, m.bias)

    def queries_keys_values(self, m: Attention, x: Tensor) -> tuple[Tensor, ...]:
        """x (... c) -> q, k, v (... h d)."""
        weight = self.together.get(m)
        if weight is None or (x.ndim == 4 and not self.reads_fused):
            return tuple(self.linear(to, x).unflatten(-1, (m.heads, -1)) for to in (m.to_q, m.to_k, m.to_v))
        return self.product(x, weight).view(*x.shape[:-1], 3, m.heads, -1).unbind(-3)

    def frame_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (b f p h d) -> attention across frames (b f p h d), contiguous."""
        return self._attention(q, k, v, False, q.shape[1])

    def conv(self, m: nn.Conv2d, x: Tensor, bias: Any = OWN) -> Tensor:
        """x (n c h w) -> m(x) (n c_out ...). bias: another bias (c_out) instead of m's, or None."""
        return m._conv_forward(x, m.weight, m.bias if bias is OWN else bias)

    def double_and_conv(self, m: nn.Conv2d, x: Tensor) -> Tensor:
        """x (n c h w) -> nearest-neighbour interpolation to 2h, 2w, then the 3x3 convolution (n c_out 2h 2w)."""
        return self.conv(m, F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def temporal_conv(self, m: nn.Conv3d, x: Tensor, residual: Tensor | None) -> Tensor:
        """x, residual (b c f p) in channels-last memory -> convolution along f, plus the residual."""
        return self._temporal_conv(x, m.weight, m.bias, residual)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same as the kernel. The sum overwrites x, because new memory would cost as much time as the sum."""
    x = x.add_(residual)
    return x, layer_norm_ref(x, weight, bias, eps, positions)


def attend_frames(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int) -> Tensor:
    return temporal_attention_ref(q, k, v)
