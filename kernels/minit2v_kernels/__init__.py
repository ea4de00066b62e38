"""Fused operations. Each has a definition in PyTorch and a Triton kernel, and a rule chooses between them.

`register` adds a function of your own to the choice.
"""

from ._dispatch import register as register
from .attention import temporal_attention as temporal_attention
from .attention import temporal_attention_ref as temporal_attention_ref
from .conv import temporal_conv as temporal_conv
from .conv import temporal_conv_ref as temporal_conv_ref
from .feed_forward import geglu as geglu
from .feed_forward import geglu_ref as geglu_ref
from .feed_forward import linear as linear
from .layer_norms import add_layer_norm as add_layer_norm
from .layer_norms import add_layer_norm_ref as add_layer_norm_ref
from .layer_norms import layer_norm as layer_norm
from .layer_norms import layer_norm_ref as layer_norm_ref
from .norm import add_group_norm_silu as add_group_norm_silu
from .norm import add_group_norm_silu_ref as add_group_norm_silu_ref
from .norm import group_norm_silu as group_norm_silu
from .norm import group_norm_silu_ref as group_norm_silu_ref
from .projection import linear_add as linear_add
from .projection import linear_add_ref as linear_add_ref
