"""IP-Adapter (Ye et al. 2023, arXiv:2308.06721): a UNet that was trained with texts also accepts pictures.

    CLIP's features of a picture  ->  a few tokens, as wide as the text's         one of the three projections below
    every cross-attention             y = attn(q, k, v) + scale * attn(q, k_ip, v_ip)           `ImageAttention`

Keys and values of the pictures have their own weights. The queries are shared with the text. The rest of the UNet does
not change.
b batch, f frames, i pictures, t tokens of a picture, l tokens of a text, d their width, h heads, p pixels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ..techniques.context_windows import of_windows
from .layers import Attention

Scale = float | tuple[float, ...]  # one for all pictures of an adapter; or one for each picture, if they have masks
Masks = dict[int, Tensor]  # for each level of the UNet: its number of pixels p -> mask (i p)


class Prompt:
    """The `context` of a UNet that has IP-Adapters: a text together with pictures.

    text: (b l d), or (b f l d) with one text for each frame.
    images: for each adapter the tokens (b i t d), or (b f i t d) with pictures for each frame.
    masks: for each adapter None, or masks that say where in the frame each picture acts.
    """

    def __init__(self, text: Tensor, images: Sequence[Tensor], masks: Sequence[Masks | None] | None = None):
        self.text, self.images = text, list(images)
        self.masks = list(masks) if masks is not None else [None] * len(self.images)
        self.frames = 0  # b f; set by `flat`

    def __len__(self) -> int:
        """The number of texts. In a prompt made by `flat`, every text serves the same number of frames."""
        return len(self.text)

    def flat(self, text: Tensor, b: int, f: int, d: int) -> "Prompt":
        """The prompt with `text` (n l d) and images (m i t d) for the blocks. n and m are b or b f.

        Raises ValueError if the tokens of the pictures do not have the shape for b videos of f frames and width d.
        """
        images = []
        for x in self.images:
            if tuple(x.shape) not in ((b, *x.shape[1:3], d), (b, f, *x.shape[2:4], d)):
                raise ValueError(f"tokens of pictures must be (batch {b}, pictures, tokens, width {d}), or (batch {b}, "
                                 f"frames {f}, pictures, tokens, width {d}), not {tuple(x.shape)}")  # fmt: skip
            x = x.flatten(0, -4)
            images.append(repeat(x, "b ... -> (b f) ...", f=f) if len(x) < len(text) else x)
        new = Prompt(text, images, self.masks)
        new.frames = b * f
        return new

    @property
    def by_frame(self) -> bool:
        """Whether each frame has its own text or its own pictures."""
        return self.text.ndim == 4 or any(x.ndim == 5 for x in self.images)

    def in_windows(self, windows: list[list[int]]) -> "Prompt":
        """The prompt for these windows of frames. The windows become one batch, one after the other."""
        images = [of_windows(x, x.ndim == 5, windows) for x in self.images]
        return Prompt(of_windows(self.text, self.text.ndim == 4, windows), images, self.masks)

    def chunk(self, n: int) -> list["Prompt"]:
        """The prompt split into n equal parts of the batch."""
        parts = zip(self.text.chunk(n), *(x.chunk(n) for x in self.images), strict=True)
        return [Prompt(text, images, self.masks) for text, *images in parts]

    def tensors(self) -> list[Tensor]:
        return [self.text, *self.images, *(m for masks in self.masks if masks is not None for m in masks.values())]

    def of(self, tensors: Sequence[Tensor]) -> "Prompt":
        """A prompt of the same form with other tensors, in the order of `tensors()`."""
        text, *rest = tensors
        images, rest = rest[: len(self.images)], iter(rest[len(self.images) :])
        masks = [None if m is None else {p: next(rest) for p in m} for m in self.masks]
        new = Prompt(text, images, masks)
        new.frames = self.frames
        return new


class ImageAttention(Attention):
    """Cross-attention to a text, and with the same queries to the pictures of each adapter, times its scale.

    It replaces an Attention and takes over its layers. If the context is only a text, the result is that of the
    Attention.
    """

    def __init__(self, attention: Attention, to_k_ip: Sequence[nn.Linear], to_v_ip: Sequence[nn.Linear]):
        nn.Module.__init__(self)
        self.heads = attention.heads
        self.to_q, self.to_k, self.to_v, self.to_out = (
            attention.to_q, attention.to_k, attention.to_v, attention.to_out)  # fmt: skip
        self.to_k_ip, self.to_v_ip = nn.ModuleList(to_k_ip), nn.ModuleList(to_v_ip)  # one for each adapter
        self.scales: tuple[Scale, ...] = (1.0,) * len(to_k_ip)
        self.train(attention.training)

    def forward(self, x: Tensor, context: Tensor | Prompt) -> Tensor:  # type: ignore[override]
        """x (n l d) attends to context, texts (n m c) or a Prompt made by `flat` -> (n l d)."""
        if isinstance(context, Tensor):
            return super().forward(x, context)
        q, k, v = self.to_q(x), self.to_k(context.text), self.to_v(context.text)
        q, k, v = (rearrange(y, "n l (h d) -> n h l d", h=self.heads) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        pairs = [(to_k(t), to_v(t)) for to_k, to_v, t in zip(self.to_k_ip, self.to_v_ip, context.images, strict=True)]
        return self.to_out(rearrange(self.look(y, q, pairs, context), "n h l d -> n l (h d)"))

    def look(self, y: Tensor, q: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], context: Prompt) -> Tensor:
        """y plus, for each adapter, scale * attention of q to its pictures.

        y, q (n h l d), `pairs` with keys and values (m i t c) for each adapter -> (n h l d). The axis l holds the
        pixels of all frames of a text, frame by frame. m is n, or a multiple of n if pictures belong to frames.
        """
        for (k, v), scale, masks in zip(pairs, self.scales, context.masks, strict=True):
            if not any(scale if isinstance(scale, tuple) else [scale]):
                continue
            own = rearrange(q, "n h (g l) d -> (n g) h l d", g=len(k) // len(q))
            k, v = (rearrange(x, "m i t (h d) -> i m h t d", h=self.heads) for x in (k, v))
            if masks is None:  # the queries attend to the tokens of all pictures together
                k, v = (rearrange(x, "i m h t d -> m h (i t) d") for x in (k, v))
                found = scale * F.scaled_dot_product_attention(own, k, v)
            else:  # the queries attend to each picture separately
                mask = masks[own.shape[2] * len(own) // context.frames]
                mask = repeat(mask.to(q.dtype), "i p -> i (f p) 1", f=own.shape[2] // mask.shape[1])
                each = scale if isinstance(scale, tuple) else (scale,) * len(k)
                found = sum(s * F.scaled_dot_product_attention(own, *kv) * m
                            for s, m, *kv in zip(each, mask, k, v, strict=True))  # fmt: skip
            y = y + rearrange(found, "(n g) h l d -> n h (g l) d", n=len(q))
        return y

    def plain(self) -> Attention:
        """The Attention without the adapters."""
        attention = Attention.__new__(Attention)
        nn.Module.__init__(attention)
        attention.heads = self.heads
        attention.to_q, attention.to_k, attention.to_v, attention.to_out = (
            self.to_q, self.to_k, self.to_v, self.to_out)  # fmt: skip
        return attention.train(self.training)


# Projections from CLIP's features of a picture to tokens -------------------------------------------------------------


class ImageProjection(nn.Module):
    """One linear layer and a norm: CLIP's vector of the whole picture becomes a few tokens."""

    reads_states = False  # it reads CLIP's vector of the whole picture

    def __init__(self, features: int, tokens: int, dim: int):
        super().__init__()
        self.features, self.tokens = features, tokens
        self.proj = nn.Linear(features, tokens * dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (n c) -> (n t d)."""
        return self.norm(rearrange(self.proj(x), "n (t d) -> n t d", t=self.tokens))


class FullProjection(nn.Module):
    """Each of CLIP's hidden states becomes a token: linear layer, GELU, linear layer, norm. For pictures of faces."""

    reads_states = True

    def __init__(self, features: int, dim: int):
        super().__init__()
        self.features = features
        self.proj = nn.Sequential(
            nn.Linear(features, features), nn.GELU(), nn.Linear(features, dim), nn.LayerNorm(dim)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """x (n l c) -> (n l d)."""
        return self.proj(x)


class ResamplerAttention(nn.Module):
    """Cross-attention of learned tokens (`latents`) to CLIP's hidden states and to themselves."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, 64 * heads, bias=False)
        self.to_kv = nn.Linear(dim, 2 * 64 * heads, bias=False)
        self.to_out = nn.Linear(64 * heads, dim, bias=False)

    def forward(self, latents: Tensor, x: Tensor) -> Tensor:
        """latents (n t d) attend to x (n l d) and to latents -> (n t d)."""
        x, latents = self.norm1(x), self.norm2(latents)
        k, v = self.to_kv(torch.cat([x, latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (rearrange(y, "n l (h d) -> n h l d", h=self.heads) for y in (self.to_q(latents), k, v))
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "n h l d -> n l (h d)"))


class Resampler(nn.Module):
    """The "plus" adapters: a few learned tokens collect information from CLIP's hidden states, layer by layer.

    It is the Perceiver Resampler of Flamingo (Alayrac et al. 2022, arXiv:2204.14198, section 2.2).
    """

    reads_states = True

    def __init__(self, features: int, tokens: int, width: int, heads: int, layers: int, dim: int):
        super().__init__()
        self.features, self.tokens = features, tokens
        self.latents = nn.Parameter(torch.randn(1, tokens, width) * width**-0.5)
        self.proj_in = nn.Linear(features, width)
        self.layers = nn.ModuleList(
            nn.ModuleList([
                ResamplerAttention(width, heads),
                nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width, bias=False), nn.GELU(),
                              nn.Linear(4 * width, width, bias=False)),
            ])
            for _ in range(layers)
        )  # fmt: skip
        self.proj_out = nn.Linear(width, dim)
        self.norm_out = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (n l c) -> (n t d)."""
        x = self.proj_in(x)
        latents = self.latents.expand(len(x), -1, -1)
        for attention, feed_forward in self.layers:
            latents = latents + attention(latents, x)
            latents = latents + feed_forward(latents)
        return self.norm_out(self.proj_out(latents))
