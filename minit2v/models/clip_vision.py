"""The image encoder of CLIP (Radford et al. 2021, arXiv:2103.00020): a transformer over the patches of a picture.

It is a ViT (Dosovitskiy et al. 2020, arXiv:2010.11929) with a norm before the layers. IP-Adapter uses it. The
published adapters need OpenCLIP's ViT-H/14 (the defaults here). One of them needs ViT-bigG/14.
b pictures, s height and width in pixels, l tokens, d width of a token, p width of the joint space of texts and images.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor, nn

from minit2v_convert.transformers_clip import VISION

from .clip import ACTIVATIONS, EncoderLayer
from .network import Network


@dataclass(frozen=True)
class CLIPVisionConfig:
    """The fields of an `image_encoder/config.json`. The defaults are those of IP-Adapter's ViT-H/14."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    image_size: int = 224  # height and width in pixels
    patch_size: int = 14
    projection_dim: int = 1024  # the width of CLIP's joint space of texts and images
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5

    FIXED: ClassVar[dict[str, Any]] = {"num_channels": 3}
    IGNORED: ClassVar[dict[str, str]] = {
        "attention_dropout": "in training only, 0 in every published file",
        "dropout": "in training only, 0 in every published file",
        "initializer_range": "the initial weights of a training from scratch",
        "initializer_factor": "the initial weights of a training from scratch",
    }

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be {' or '.join(map(repr, ACTIVATIONS))}, not {self.hidden_act!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size must be a multiple of num_attention_heads={self.num_attention_heads}, "
                             f"not {self.hidden_size}")  # fmt: skip
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size must be at least patch_size={self.patch_size}, not {self.image_size}")
        if self.num_hidden_layers < 1:
            raise ValueError("num_hidden_layers must be at least 1: adapters use the input of the last layer")

    @property
    def tokens(self) -> int:
        """The number of tokens: the class token, then one for each patch."""
        return (self.image_size // self.patch_size) ** 2 + 1


class CLIPVisionModelWithProjection(Network):
    """Turns a picture into one vector (`forward`), or into one vector per token (`penultimate`)."""

    Config = CLIPVisionConfig
    config: CLIPVisionConfig
    layout = VISION
    weights_name = "model"
    head = {"architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model"}

    def __init__(self, config: CLIPVisionConfig | None = None, **fields: Any):
        super().__init__(config, **fields)
        c = self.config
        self.class_token = nn.Parameter(torch.zeros(c.hidden_size))
        self.patches = nn.Conv2d(3, c.hidden_size, c.patch_size, stride=c.patch_size, bias=False)
        self.positions = nn.Embedding(c.tokens, c.hidden_size)
        self.norm_in = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.layers = nn.ModuleList([EncoderLayer(c, causal=False) for _ in range(c.num_hidden_layers)])
        self.norm_out = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.projection = nn.Linear(c.hidden_size, c.projection_dim, bias=False)
        for start in (self.class_token, self.positions.weight):  # CLIP's initialisation; PyTorch's is 50 times as wide
            nn.init.normal_(start, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x (b 3 s s), pictures prepared by `pixels` -> (b p), in CLIP's joint space of texts and images.

        Raises ValueError if x has another size.
        """
        return self.projection(self.norm_out(self.run(x, len(self.layers))[:, 0]))

    def penultimate(self, x: Tensor) -> Tensor:
        """x (b 3 s s) -> (b l d): the class token and the patches before the last layer, without a norm.

        Raises ValueError if x has another size.
        """
        return self.run(x, len(self.layers) - 1)

    def run(self, x: Tensor, layers: int) -> Tensor:
        """x (b 3 s s) -> (b l d), after the first `layers` layers."""
        s = self.config.image_size
        if x.ndim != 4 or tuple(x.shape[1:]) != (3, s, s):
            raise ValueError(f"pictures must be (batch, 3, {s}, {s}), not {tuple(x.shape)}")
        x = rearrange(self.patches(x), "b d h w -> b (h w) d")
        x = torch.cat([repeat(self.class_token, "d -> b 1 d", b=len(x)), x], dim=1) + self.positions.weight
        x = self.norm_in(x)
        for layer in self.layers[:layers]:
            x = layer(x)
        return x

    def pixels(self, picture: Any) -> Tensor:
        """A picture -> (3 s s) in float32, prepared as in CLIP's training.

        The shorter side is resized to s, the middle square is cut out, and the values are normalised.
        picture: a PIL image of any mode, or an array (h w), (h w 1), (h w 3) or (h w 4) of bytes or of numbers in
        [0, 1]. Transparency is dropped. Raises ValueError on anything else.
        """
        return _normalize(_centre(_to_image(picture), self.config.image_size))


# The mean and the standard deviation of CLIP's training pictures, per channel.
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
MOST_OBLONG = 100  # the highest ratio of the sides: the resized picture must fit into memory


def _to_image(picture: Any) -> Image.Image:
    if isinstance(picture, Image.Image):
        if picture.mode.startswith(("I", "F")):  # PIL would clip the values to 8 bits
            raise ValueError(f"a picture of mode {picture.mode} does not have 8 bits: load_image converts it")
        try:
            return picture.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:  # PIL reads the file only now, and it may be cut off
            raise ValueError(f"a picture cannot be read: {error}") from error
    if not isinstance(picture, np.ndarray):
        raise ValueError(f"a picture must be a PIL image or an array (h w 3), not a {type(picture).__name__}")
    x = picture[..., None] if picture.ndim == 2 else picture
    if x.ndim != 3 or x.shape[2] not in (1, 3, 4) or not x.size:
        raise ValueError(f"a picture as an array must be (h w), (h w 1), (h w 3) or (h w 4), not {picture.shape}")
    if np.issubdtype(x.dtype, np.floating):
        if not np.isfinite(x).all() or x.min() < 0 or x.max() > 1:
            raise ValueError("a picture of floating-point numbers must be in [0, 1]")
        x = (x * 255).round().astype(np.uint8)
    if x.dtype != np.uint8:
        raise ValueError(f"a picture as an array must be of bytes (uint8) or numbers in [0, 1], not {x.dtype}")
    return Image.fromarray(np.ascontiguousarray(np.repeat(x, 3, 2) if x.shape[2] == 1 else x[..., :3]))


def _centre(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size`, and cut out the middle square."""
    w, h = image.size
    if max(w, h) > MOST_OBLONG * min(w, h):
        raise ValueError(f"a picture of {w}x{h} is too narrow: one side may be {MOST_OBLONG} times the other at most")
    w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    left, top = (w - size) // 2, (h - size) // 2
    return image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def _normalize(image: Image.Image) -> Tensor:
    x = torch.from_numpy(np.array(image)).float() / 255
    return rearrange((x - torch.tensor(MEAN)) / torch.tensor(DEVIATION), "h w c -> c h w").contiguous()
