"""IP-Adapter (Ye et al. 2023, arXiv:2308.06721): a UNet that was trained with texts takes pictures as well.

    features of a picture, by CLIP  ->  a few tokens, as wide as the text's        one of the three projections below
    every attention to the text     y = attn(q, k, v) + scale * attn(q, k_ip, v_ip)             `ImageAttention`

Keys and values of the tokens have weights of their own, the queries are the text's. Nothing else of the UNet changes.
b batch, f frames, i pictures, t tokens of a picture, l tokens of a text, d their width, h heads, p pixels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ..techniques.context_windows import of_windows
from .layers import Attention

Scale = float | tuple[float, ...]  # of all pictures of an adapter, or of each: those that have masks
Masks = dict[int, Tensor]  # for each number p of pixels that a level of the U has: (i p)


class Prompt:
    """A text and pictures: what a UNet that has IP-Adapters takes as its `context`, in the place of a text alone.

    text (b l d), or (b f l d) with one for each frame; images, for each adapter: tokens (b i t d), or (b f i t d);
    masks, for each adapter: None, or where each picture is to be seen.
    """

    def __init__(self, text: Tensor, images: Sequence[Tensor], masks: Sequence[Masks | None] | None = None):
        self.text, self.images = text, list(images)
        self.masks = list(masks) if masks is not None else [None] * len(self.images)
        self.frames = 0  # b f, in a prompt that `flat` has made

    def __len__(self) -> int:
        """How many texts there are: between blocks, each is for as many frames as the next."""
        return len(self.text)

    def flat(self, text: Tensor, b: int, f: int, d: int) -> "Prompt":
        """With `text` (n l d) of the same, and images (m i t d): of both as many as there are videos, or frames.

        Raises ValueError where the tokens are not those of b videos of f frames, d wide.
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
        """Whether there is a text, or a picture, for each frame."""
        return self.text.ndim == 4 or any(x.ndim == 5 for x in self.images)

    def in_windows(self, windows: list[list[int]]) -> "Prompt":
        """The same for these frames of the video, one window behind the other in the batch."""
        images = [of_windows(x, x.ndim == 5, windows) for x in self.images]
        return Prompt(of_windows(self.text, self.text.ndim == 4, windows), images, self.masks)

    def chunk(self, n: int) -> list["Prompt"]:
        """Of so many equal parts of the batch."""
        parts = zip(self.text.chunk(n), *(x.chunk(n) for x in self.images), strict=True)
        return [Prompt(text, images, self.masks) for text, *images in parts]

    def tensors(self) -> list[Tensor]:
        return [self.text, *self.images, *(m for masks in self.masks if masks is not None for m in masks.values())]

    def of(self, tensors: Sequence[Tensor]) -> "Prompt":
        """The same of other tensors, in the order of `tensors()`."""
        text, *rest = tensors
        images, rest = rest[: len(self.images)], iter(rest[len(self.images) :])
        masks = [None if m is None else {p: next(rest) for p in m} for m in self.masks]
        new = Prompt(text, images, masks)
        new.frames = self.frames
        return new


class ImageAttention(Attention):
    """Attention to a text and, by the same queries, to the pictures of each adapter, times the adapter's scale.

    It takes the place of an Attention and has its layers. A context that is a text alone is looked at as before.
    """

    def __init__(self, attention: Attention, to_k_ip: Sequence[nn.Linear], to_v_ip: Sequence[nn.Linear]):
        nn.Module.__init__(self)
        self.heads = attention.heads
        self.to_q, self.to_k, self.to_v, self.to_out = (
            attention.to_q, attention.to_k, attention.to_v, attention.to_out)  # fmt: skip
        self.to_k_ip, self.to_v_ip = nn.ModuleList(to_k_ip), nn.ModuleList(to_v_ip)  # of each adapter
        self.scales: tuple[Scale, ...] = (1.0,) * len(to_k_ip)
        self.train(attention.training)

    def forward(self, x: Tensor, context: Tensor | Prompt) -> Tensor:  # type: ignore[override]
        """x (n l d) looks at context, n texts (n m c) or a flat Prompt of them -> (n l d)."""
        if isinstance(context, Tensor):
            return super().forward(x, context)
        q, k, v = self.to_q(x), self.to_k(context.text), self.to_v(context.text)
        q, k, v = (rearrange(y, "n l (h d) -> n h l d", h=self.heads) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        pairs = [(to_k(t), to_v(t)) for to_k, to_v, t in zip(self.to_k_ip, self.to_v_ip, context.images, strict=True)]
        return self.to_out(rearrange(self.look(y, q, pairs, context), "n h l d -> n l (h d)"))

    def look(self, y: Tensor, q: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], context: Prompt) -> Tensor:
        """y, q (n h l d), keys and values (m i t c) of each adapter -> y and what q finds in the pictures (n h l d).

        l is a frame's pixels after the other's; of pictures there are as many as of texts, or some for each frame.
        """
        for (k, v), scale, masks in zip(pairs, self.scales, context.masks, strict=True):
            if not any(scale if isinstance(scale, tuple) else [scale]):
                continue
            own = rearrange(q, "n h (g l) d -> (n g) h l d", g=len(k) // len(q))
            k, v = (rearrange(x, "m i t (h d) -> i m h t d", h=self.heads) for x in (k, v))
            if masks is None:  # the tokens of all pictures stand in one row
                k, v = (rearrange(x, "i m h t d -> m h (i t) d") for x in (k, v))
                found = scale * F.scaled_dot_product_attention(own, k, v)
            else:  # every picture is looked at by itself
                mask = masks[own.shape[2] * len(own) // context.frames]
                mask = repeat(mask.to(q.dtype), "i p -> i (f p) 1", f=own.shape[2] // mask.shape[1])
                each = scale if isinstance(scale, tuple) else (scale,) * len(k)
                found = sum(s * F.scaled_dot_product_attention(own, *kv) * m
                            for s, m, *kv in zip(each, mask, k, v, strict=True))  # fmt: skip
            y = y + rearrange(found, "(n g) h l d -> n h (g l) d", n=len(q))
        return y

    def plain(self) -> Attention:
        """The same without adapters."""
        attention = Attention.__new__(Attention)
        nn.Module.__init__(attention)
        attention.heads = self.heads
        attention.to_q, attention.to_k, attention.to_v, attention.to_out = (
            self.to_q, self.to_k, self.to_v, self.to_out)  # fmt: skip
        return attention.train(self.training)


# What makes tokens of a picture's features ---------------------------------------------------------------------------


class ImageProjection(nn.Module):
    """Of the vector of a whole picture: as many tokens as its one layer makes, normalised."""

    reads_states = False  # but CLIP's vector of the whole picture

    def __init__(self, features: int, tokens: int, dim: int):
        super().__init__()
        self.features, self.tokens = features, tokens
        self.proj = nn.Linear(features, tokens * dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (n c) -> (n t d)."""
        return self.norm(rearrange(self.proj(x), "n (t d) -> n t d", t=self.tokens))


class FullProjection(nn.Module):
    """Of each of CLIP's states a token: a layer, GELU, a layer, and a norm. For pictures of faces."""

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
    """What is learned looks at CLIP's states, and at itself."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, 64 * heads, bias=False)
        self.to_kv = nn.Linear(dim, 2 * 64 * heads, bias=False)
        self.to_out = nn.Linear(64 * heads, dim, bias=False)

    def forward(self, latents: Tensor, x: Tensor) -> Tensor:
        """latents (n t d) look at x (n l d) and at latents -> (n t d)."""
        x, latents = self.norm1(x), self.norm2(latents)
        k, v = self.to_kv(torch.cat([x, latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (rearrange(y, "n l (h d) -> n h l d", h=self.heads) for y in (self.to_q(latents), k, v))
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "n h l d -> n l (h d)"))


class Resampler(nn.Module):
    """Of all of CLIP's states a few tokens, which learned ones gather layer by layer (the "plus" adapters).

    As in Flamingo (Alayrac et al. 2022, arXiv:2204.14198, section 2.2).
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
