"""Fused operations: each one a definition in PyTorch, a Triton kernel, and a choice between them."""

from .norm import group_norm_silu as group_norm_silu
from .norm import group_norm_silu_ref as group_norm_silu_ref
