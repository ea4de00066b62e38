"""The text encoder of CLIP (Radford et al. 2021, arXiv:2103.00020): a causal transformer over the prompt's tokens.

b prompts, l tokens, d width of a vector, n heads. One class serves both encoders that video models are published with:

| | act | layers | width | heads | published with |
|---|---|---|---|---|---|
| OpenCLIP ViT-H/14 | gelu | 23 (of 24) | 1024 | 16 | ModelScope, Zeroscope (the defaults here) |
| CLIP ViT-L/14 | quick_gelu | 12 | 768 | 12 | Stable Diffusion 1.5, AnimateDiff |

ModelScope uses the output of OpenCLIP's second-to-last layer, followed by the final norm. Its published files do not
contain the last layer.
"""

from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from minit2v_convert.transformers_clip import LAYOUT

from .network import Network


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x): an approximation of GELU. OpenAI's weights were trained with it."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


@dataclass(frozen=True)
class CLIPTextConfig:
    """The fields of a `text_encoder/config.json`. The defaults are ModelScope's."""

    vocab_size: int = 49408
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 23
    num_attention_heads: int = 16
    max_position_embeddings: int = 77
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5

    # The encoder and the UNet see the padding tokens, because no published text-to-video model masks them.
    FIXED: ClassVar[dict[str, Any]] = {"use_attention_mask": False}
    IGNORED: ClassVar[dict[str, str]] = {
        "projection_dim": "the width of CLIP's joint space of texts and images, which this encoder does not use",
        "attention_dropout": "in training only, 0 in every published file",
        "dropout": "in training only, 0 in every published file",
        "initializer_range": "the initial weights of a training from scratch",
        "initializer_factor": "the initial weights of a training from scratch",
        "bos_token_id": "0 in the published files, which is wrong: the tokenizer has the right one",
        "eos_token_id": "2 in the published files, which is wrong: the tokenizer has the right one",
        "pad_token_id": "1 in the published files, which is wrong: the tokenizer has the right one",
    }

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be {' or '.join(map(repr, ACTIVATIONS))}, not {self.hidden_act!r}")
        dim, heads = self.hidden_size, self.num_attention_heads
        if dim % heads:
            raise ValueError(f"hidden_size must be a multiple of num_attention_heads={heads}, not {dim}")


class SelfAttention(nn.Module):
    """Every token attends to all tokens. With `causal` it attends only to itself and to earlier ones."""

    def __init__(self, dim: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (b l d) -> (b l d)."""
        q, k, v = (rearrange(p(x), "b l (n d) -> b n l d", n=self.heads) for p in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(rearrange(x, "b n l d -> b l (n d)"))


class FeedForward(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, dim: int, inner: int, act: str):
        super().__init__()
        self.up = nn.Linear(dim, inner)
        self.down = nn.Linear(inner, dim)
        self.act = ACTIVATIONS[act]

    def forward(self, x: Tensor) -> Tensor:
        """x (b l d) -> (b l d)."""
        return self.down(self.act(self.up(x)))


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: Any, causal: bool = True):
        super().__init__()
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = SelfAttention(dim, config.num_attention_heads, causal)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.ff = FeedForward(dim, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        """x (b l d) -> (b l d)."""
        x = x + self.attn(self.norm1(x))
        return x + self.ff(self.norm2(x))


class CLIPTextModel(Network):
    """Turns token ids into one vector per token. They are the `context` of the UNet's cross-attention."""

    Config = CLIPTextConfig
    config: CLIPTextConfig
    layout = LAYOUT
    weights_name = "model"
    head = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}

    def __init__(self, config: CLIPTextConfig | None = None, **fields: Any):
        super().__init__(config, **fields)
        c = self.config
        self.tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.positions = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.layers = nn.ModuleList([EncoderLayer(c) for _ in range(c.num_hidden_layers)])
        self.norm_out = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        for embedding in (self.tokens, self.positions):  # CLIP's initialisation; PyTorch's is 50 times as wide
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor, clip_skip: int | None = None) -> Tensor:
        """ids (b l) -> (b l d), after the final norm.

        clip_skip: how many of the last layers are left out. None leaves out none.
        Raises ValueError if there are more tokens than positions, or if an id is outside the vocabulary. Also raises it
        if `clip_skip` is below 0 or above the number of layers.
        """
        self._check(ids, clip_skip)
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers[: len(self.layers) - (clip_skip or 0)]:
            x = layer(x)
        return self.norm_out(x)

    def _check(self, ids: Tensor, clip_skip: int | None) -> None:
        c = self.config
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
            what = f"{tuple(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"ids must be an integer tensor (batch, tokens), not {what}")
        if ids.shape[1] > c.max_position_embeddings:
            raise ValueError(f"{ids.shape[1]} tokens, but the text encoder has {c.max_position_embeddings} positions")
        traced = torch.compiler.is_compiling()  # then values are not known
        if not traced and ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < c.vocab_size):
            raise ValueError(
                f"token ids {int(ids.min())} ... {int(ids.max())} are not all in the text encoder's vocabulary of "
                f"{c.vocab_size}: use the tokenizer that belongs to this text encoder"
            )
        whole = isinstance(clip_skip, Integral) and not isinstance(clip_skip, bool)
        if clip_skip is not None and not (whole and 0 <= clip_skip <= len(self.layers)):
            raise ValueError(f"clip_skip must be None or from 0 to {len(self.layers)}, not {clip_skip!r}")
