"""The modules of the networks as functions, written for speed. Results are the same, except for rounding.

Read minit2v/models first. It is the specification: every function here replaces a `forward` there. It is faster for
these reasons. Tokens are views of channels-last memory. q, k and v come from one matrix product. Norms are fused with
SiLU, the timestep embedding or the residual. Keys and values of the text are computed once per run. Sums overwrite
temporary tensors, but never a tensor that other code may see.

Each function is used only if `run.knows(m)`. Other modules are called normally: subclasses, layers with an adapter,
modules with hooks.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..memory.stream import held
from ..models import unet2d, unet3d, vae
from ..models.blocks import MotionModule, ResBlock, SpatialTransformer, TemporalConv, TemporalTransformer, Upsample
from ..models.image_prompt import ImageAttention, Prompt
from ..models.layers import (
    Attention,
    FeedForward,
    FrameAttention,
    FrameTransformerBlock,
    NumberedFrameTransformerBlock,
    TransformerBlock,
    group_norm,
    timestep_embedding,
)
from ..models.unet import UNet
from .ops import Ops

GROUP_NORM, LAYER_NORM, LINEAR, CONV = (nn.GroupNorm,), (nn.LayerNorm,), (nn.Linear,), (nn.Conv2d,)
# The classes that the functions below know: the parts that each function reads, and their exact classes.
PARTS: dict[type, dict[str, tuple[type, ...]]] = {
    nn.Conv2d: {},
    nn.Linear: {},
    nn.GroupNorm: {},
    nn.LayerNorm: {},
    Upsample: {},
    ResBlock: {"norm1": GROUP_NORM, "conv1": CONV, "emb": LINEAR, "norm2": GROUP_NORM, "conv2": CONV,
               "skip": (nn.Conv2d, nn.Identity)},
    TemporalConv: {**{f"norms.{k}": GROUP_NORM for k in range(4)}, **{f"convs.{k}": (nn.Conv3d,) for k in range(4)}},
    Attention: {"to_q": LINEAR, "to_k": LINEAR, "to_v": LINEAR, "to_out": LINEAR},
    FrameAttention: {"to_q": LINEAR, "to_k": LINEAR, "to_v": LINEAR, "to_out": LINEAR},
    ImageAttention: {"to_q": LINEAR, "to_k": LINEAR, "to_v": LINEAR, "to_out": LINEAR, "to_k_ip.*": LINEAR,
                     "to_v_ip.*": LINEAR},
    FeedForward: {"proj_in": LINEAR, "proj_out": LINEAR},
    TransformerBlock: {"norm1": LAYER_NORM, "attn1": (Attention,), "norm2": LAYER_NORM,
                       "attn2": (Attention, ImageAttention), "norm3": LAYER_NORM, "ff": (FeedForward,)},
    FrameTransformerBlock: {"norm1": LAYER_NORM, "attn1": (FrameAttention,), "norm2": LAYER_NORM,
                            "attn2": (FrameAttention,), "norm3": LAYER_NORM, "ff": (FeedForward,)},
    NumberedFrameTransformerBlock: {"norm1": LAYER_NORM, "attn1": (FrameAttention,), "norm2": LAYER_NORM,
                            "attn2": (FrameAttention,), "norm3": LAYER_NORM, "ff": (FeedForward,)},
    SpatialTransformer: {"norm": GROUP_NORM, "proj_in": LINEAR, "block": (TransformerBlock,), "proj_out": LINEAR},
    TemporalTransformer: {"norm": GROUP_NORM, "proj_in": LINEAR, "block": (FrameTransformerBlock,),
                          "proj_out": LINEAR},
    MotionModule: {"norm": GROUP_NORM, "proj_in": LINEAR, "blocks.*": (NumberedFrameTransformerBlock,),
                   "proj_out": LINEAR},
    unet3d.Block: {},
    unet2d.Block: {},
    vae.ResBlock: {"norm1": GROUP_NORM, "conv1": CONV, "norm2": GROUP_NORM, "conv2": CONV,
                   "skip": (nn.Conv2d, nn.Identity)},
    vae.PixelAttention: {"norm": GROUP_NORM, **{f"to_{x}": LINEAR for x in ("q", "k", "v", "out")}},
    vae.Upsample: {},
    vae.Downsample: {},
    vae.Mid: {},
    vae.Encoder: {},
    vae.Decoder: {},
    nn.Identity: {},
    nn.Conv3d: {},
}  # fmt: skip


@dataclass
class Run:
    """The values that all functions share in one prediction."""

    ops: Ops
    known: frozenset[nn.Module]  # the modules that are exactly as written
    f: int = 1
    emb: Tensor | None = None  # timestep embedding ((b f) d)
    context: Tensor | Prompt | None = None  # (b l d) or ((b f) l d)
    times: dict[nn.Module, Tensor] = field(default_factory=dict)  # ResBlock -> what it adds for the timestep (m c)
    # Cross-attention (attn2) -> keys, values of the text (b l h d), then those of each adapter's pictures (m i t c).
    texts: dict[nn.Module, tuple[Tensor, ...]] = field(default_factory=dict)
    compiled: dict[nn.Module, Any] = field(default_factory=dict)  # compiled blocks

    def knows(self, m: nn.Module | None) -> bool:
        return m in self.known


# ------------------------------------------------------------------------------------------------------------- U-nets


def unet(run: Run, m: UNet, x: Tensor) -> Tensor:
    """x (b c f h w) -> the prediction (b c f h w)."""
    f = run.f
    x = conv(run, m.conv_in, run.ops.channels_last(rearrange(x, "b c f h w -> (b f) c h w")))
    if m.temporal_in is not None:
        x = temporal_transformer(run, m.temporal_in, x)
    skips = [x]
    for level in m.down:
        for part in level.blocks:
            x = block(run, part, x, None)
            skips.append(x)
        if level.resample is not None:
            x = conv(run, level.resample, x)
            skips.append(x)
    for part in m.mid:
        x = block(run, part, x, None)
    for i, level in enumerate(m.up):
        for part in level.blocks:
            skip = skips.pop()
            if m.free_u is not None:
                x, skip = m.free_u(x, skip, i)
            x = block(run, part, x, skip)
        if level.resample is not None:
            x = upsample(run, level.resample, x, skips[-1].shape[-2:])
    span = f if m.norm_over_video else 1
    if run.knows(m.norm_out):
        x = run.ops.group_norm(m.norm_out, x, span, silu=True)
    else:
        x = F.silu(group_norm(m.norm_out, x, span))
    return rearrange(conv(run, m.conv_out, x), "(b f) c h w -> b c f h w", f=f).contiguous()


def block(run: Run, m: nn.Module, x: Tensor, skip: Tensor | None) -> Tensor:
    """x ((b f) c h w) and skip ((b f) c2 h w), concatenated along the channels -> ((b f) c_out h w)."""
    if not run.knows(m):
        m = run.compiled.get(m, m)
        x = x if skip is None else torch.cat((x, skip), dim=1)
        return m(run.ops.as_written(x), run.emb, run.context, run.f)
    with held(m):
        return block_as_known(run, m, x, skip)


def block_as_known(run: Run, m: Any, x: Tensor, skip: Tensor | None) -> Tensor:
    """`block` for a block that is not offloaded, or whose weights are on the device now."""
    if type(m) is unet3d.Block:
        x = temporal_conv(run, m.temporal_conv, res_block(run, m.res, x, skip, 1))
        if m.attention:
            x = temporal_transformer(run, m.temporal, spatial_transformer(run, m.spatial, x))
        return x
    x = res_block(run, m.res, x, skip, run.f if m.norm_over_video else 1)
    if m.attention:
        x = spatial_transformer(run, m.spatial, x)
    return x if m.motion is None else motion_module(run, m.motion, x)


def res_block(run: Run, m: ResBlock, x: Tensor, skip: Tensor | None, span: int) -> Tensor:
    """The norm kernel reads x and skip without concatenating them. conv1's bias is added with the timestep."""
    ops = run.ops
    if skip is not None and not (ops.reads_skip and run.knows(m) and type(m.skip) is nn.Conv2d):
        x, skip = torch.cat((x, skip), dim=1), None
    if not run.knows(m):
        return m(ops.as_written(x), run.emb, span)
    time = run.times[m]
    h = ops.group_norm(m.norm1, x, span, silu=True, skip=skip)
    if len(time) == 1 and not ops.reads_emb:
        h, time = ops.conv(m.conv1, h, bias=time[0]), None
    else:
        h = ops.conv(m.conv1, h, bias=None)
    h = ops.conv(m.conv2, ops.group_norm(m.norm2, h, span, silu=True, emb=time))
    if type(m.skip) is nn.Identity:
        return h.add_(x)
    if skip is None:
        return h.add_(ops.conv(m.skip, x))
    of_x, of_skip = m.skip.weight.split((x.shape[1], skip.shape[1]), dim=1)
    return h.add_(F.conv2d(x, of_x, m.skip.bias)).add_(F.conv2d(skip, of_skip))


def temporal_conv(run: Run, m: TemporalConv, x: Tensor) -> Tensor:
    if not run.knows(m):
        return m(run.ops.as_written(x), run.f)
    # The batch axis is split off last. In another order, the stride of a batch of 1 would hide the channels-last
    # layout from PyTorch.
    video = run.ops.channels_last(x).flatten(2).unflatten(0, (-1, run.f)).transpose(1, 2)  # b c f (h w)
    h = video
    for k, (norm, conv3d) in enumerate(zip(m.norms, m.convs, strict=True)):
        h = run.ops.group_norm(norm, h, 1, silu=True)
        h = run.ops.temporal_conv(conv3d, h, video if k == 3 else None)
    return h.transpose(1, 2).reshape(x.shape)


def spatial_transformer(run: Run, m: SpatialTransformer, x: Tensor) -> Tensor:
    if not run.knows(m):
        return m(run.ops.as_written(x), run.context)
    ops, part = run.ops, m.block
    x = ops.channels_last(x)
    h = ops.linear(m.proj_in, to_tokens(ops.group_norm(m.norm, x, 1)))
    y = attention(run, part.attn1, ops.layer_norm(part.norm1, h))
    h, y = ops.add_layer_norm(part.norm2, y, h)
    h, y = ops.add_layer_norm(part.norm3, text_attention(run, part.attn2, y), h)
    h = feed_forward(run, part.ff, y, h)
    return to_image(ops.linear_add(m.proj_out, h, to_tokens(x)), x.shape[2])


def temporal_transformer(run: Run, m: TemporalTransformer, x: Tensor) -> Tensor:
    if not run.knows(m):
        return m(run.ops.as_written(x), run.f)
    with held(m):
        return across_frames(run, m, [m.block], x, run.f)


def motion_module(run: Run, m: MotionModule, x: Tensor) -> Tensor:
    if not run.knows(m):
        return m(run.ops.as_written(x), run.f)
    return across_frames(run, m, m.blocks, x, run.f if m.norm_over_video else 1)


def across_frames(run: Run, m: TemporalTransformer | MotionModule, blocks: Any, x: Tensor, span: int) -> Tensor:
    """x ((b f) c h w) -> ((b f) c h w). The tokens (b f (h w) c) are a view of channels-last memory."""
    ops = run.ops
    x = ops.channels_last(x)
    h = ops.linear(m.proj_in, to_tokens(ops.group_norm(m.norm, x, span)).unflatten(0, (-1, run.f)))
    for part in blocks:
        free_noise = getattr(part, "free_noise", None)
        if free_noise is None:
            positions = positions_of(part, run.f)
            y = frame_attention(run, part.attn1, ops.layer_norm(part.norm1, h, positions))
            h, y = ops.add_layer_norm(part.norm2, y, h, positions)
            h, y = ops.add_layer_norm(part.norm3, frame_attention(run, part.attn2, y), h)
        else:
            h = free_noise.average(partial(attend_frames, run, part), h)
            y = ops.layer_norm(part.norm3, h)
        h = feed_forward(run, part.ff, y, h)
    return to_image(ops.linear_add(m.proj_out, h.flatten(0, 1), to_tokens(x)), x.shape[2])


def attend_frames(run: Run, m: FrameTransformerBlock, h: Tensor) -> Tensor:
    """h (b f p d) -> (b f p d): both attention layers of the block, over all frames of h."""
    positions = positions_of(m, h.shape[1])
    y = frame_attention(run, m.attn1, run.ops.layer_norm(m.norm1, h, positions))
    h, y = run.ops.add_layer_norm(m.norm2, y, h, positions)
    return frame_attention(run, m.attn2, y).add_(h)


def positions_of(m: FrameTransformerBlock, f: int) -> Tensor | None:
    """The position encoding (f d), or None."""
    return m.positions[0, :f] if isinstance(m, NumberedFrameTransformerBlock) else None


def attention(run: Run, m: Attention, x: Tensor) -> Tensor:
    """Self-attention: x (n l d) -> (n l d)."""
    q, k, v = (y.transpose(1, 2) for y in run.ops.queries_keys_values(m, x))  # n h l d
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return run.ops.linear(m.to_out, y.flatten(-2))


def text_attention(run: Run, m: Any, x: Tensor) -> Tensor:
    """Cross-attention of x (n p d) to the text. All frames of a text form one axis, so keys and values exist once."""
    k, v, *of_images = run.texts[m]
    q = run.ops.linear(m.to_q, x).reshape(len(k), -1, *k.shape[-2:])
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v)
    if of_images:
        y = m.look(y, q, list(zip(of_images[::2], of_images[1::2], strict=True)), run.context)
    return run.ops.linear(m.to_out, y.transpose(1, 2).reshape(*x.shape[:-1], -1))


def frame_attention(run: Run, m: FrameAttention, x: Tensor) -> Tensor:
    """x (b f p d) -> (b f p d), without moving pixels in memory."""
    q, k, v = run.ops.queries_keys_values(m, x)
    return run.ops.linear(m.to_out, run.ops.frame_attention(q, k, v).flatten(-2))


def feed_forward(run: Run, m: FeedForward, x: Tensor, residual: Tensor) -> Tensor:
    """x, residual (... d) -> the feed-forward of x, plus the residual (... d)."""
    if m.chunking is None:
        return run.ops.linear_add(m.proj_out, run.ops.geglu(m.proj_in, x), residual)
    pieces = [run.ops.linear(m.proj_out, run.ops.geglu(m.proj_in, piece)) for piece in x.split(*m.chunking)]
    return torch.cat(pieces, m.chunking[1]).add_(residual)


def upsample(run: Run, m: Upsample, x: Tensor, size: torch.Size) -> Tensor:
    if not run.knows(m):
        return m(x, size)
    with held(m):
        if tuple(size) == (2 * x.shape[2], 2 * x.shape[3]):
            return run.ops.double_and_conv(m, x)
        return run.ops.conv(m, F.interpolate(x, size=size, mode="nearest"))


def conv(run: Run, m: nn.Module, x: Tensor) -> Tensor:
    if not run.knows(m):
        return m(x)
    with held(m):
        return run.ops.conv(m, x)


def to_tokens(x: Tensor) -> Tensor:
    """(n c h w) -> (n (h w) c)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_image(x: Tensor, h: int) -> Tensor:
    """(n (h w) c) -> (n c h w) in channels-last memory."""
    return x.view(len(x), h, -1, x.shape[-1]).permute(0, 3, 1, 2)


def times_of(run: Run, m: UNet, t: Tensor, together: tuple[Tensor, Tensor, Tensor] | None) -> None:
    """t (m,) -> `run.times`: what every ResBlock adds for the timestep, with the bias of its first convolution.

    It also sets `run.emb` for modules that are called normally.
    together: weights, biases and convolutions' biases of all ResBlocks, each as one tensor, if they are fused.
    """
    run.emb = m.time_mlp(timestep_embedding(t, m.config.block_out_channels[0]).to(m.dtype))
    emb = F.silu(run.emb)
    parts = [part.res for part in m.blocks() if run.knows(part) and run.knows(part.res)]
    if together is None:
        run.times = {p: F.linear(emb, p.emb.weight, p.emb.bias + p.conv1.bias) for p in parts}
        return
    weight, bias, of_convs = together
    columns = F.linear(emb, weight, bias + of_convs).split([p.conv1.out_channels for p in parts], dim=1)
    run.times = dict(zip(parts, columns, strict=True))


def texts_of(run: Run, m: UNet, context: Tensor | Prompt) -> dict[nn.Module, tuple[Tensor, ...]]:
    """context (n l d) -> keys and values (n l h d) for every cross-attention. They depend neither on x nor on t.

    A Prompt also gives keys and values of its pictures, as in `Run.texts`.
    """
    texts: dict[nn.Module, tuple[Tensor, ...]] = {}
    context, images = (context.text, context.images) if isinstance(context, Prompt) else (context, [])
    for part in m.blocks():
        if run.knows(part) and part.attention and run.knows(part.spatial):
            attn = part.spatial.block.attn2
            k, v = run.ops.linear(attn.to_k, context), run.ops.linear(attn.to_v, context)
            texts[attn] = k.unflatten(-1, (attn.heads, -1)), v.unflatten(-1, (attn.heads, -1))
            for to_k, to_v, x in zip(attn.to_k_ip, attn.to_v_ip, images, strict=True) if images else ():
                texts[attn] += run.ops.linear(to_k, x), run.ops.linear(to_v, x)
    return texts


# ---------------------------------------------------------------------------------------------------------------- VAE


def encode_frames(run: Run, m: vae.AutoencoderKL, x: Tensor) -> Tensor:
    """x (n 3 h w) -> mean and log variance (n 2c h//8 w//8)."""
    half = m.encoder
    if not run.knows(half):
        return m.encode_frames(x)
    x = conv(run, half.conv_in, run.ops.image_layout(x))
    for level in half.levels:
        for part in level.blocks:
            x = vae_res_block(run, part, x)
        if level.resample is not None:
            known = run.knows(level.resample)
            x = run.ops.conv(level.resample, F.pad(x, (0, 1, 0, 1))) if known else level.resample(x)
    x = norm_silu(run, half.norm_out, mid(run, half.mid, x))
    return conv(run, m.quant_conv, conv(run, half.conv_out, x))


def decode_frames(run: Run, m: vae.AutoencoderKL, z: Tensor) -> Tensor:
    """z (n c h w) -> pixels (n 3 8h 8w)."""
    half = m.decoder
    if not run.knows(half):
        return m.decode_frames(z)
    x = conv(run, half.conv_in, run.ops.image_layout(conv(run, m.post_quant_conv, z)))
    x = mid(run, half.mid, x)
    for level in half.levels:
        for part in level.blocks:
            x = vae_res_block(run, part, x)
        if level.resample is not None:
            x = run.ops.double_and_conv(level.resample, x) if run.knows(level.resample) else level.resample(x)
    return conv(run, half.conv_out, norm_silu(run, half.norm_out, x))


def mid(run: Run, m: vae.Mid, x: Tensor) -> Tensor:
    if not run.knows(m):
        return m(x)
    return vae_res_block(run, m.res2, pixel_attention(run, m.attention, vae_res_block(run, m.res1, x)))


def vae_res_block(run: Run, m: vae.ResBlock, x: Tensor) -> Tensor:
    if not run.knows(m):
        return m(x)
    ops = run.ops
    h = ops.conv(m.conv1, ops.group_norm(m.norm1, x, 1, silu=True))
    h = ops.conv(m.conv2, ops.group_norm(m.norm2, h, 1, silu=True))
    return h.add_(x if type(m.skip) is nn.Identity else ops.conv(m.skip, x))


def pixel_attention(run: Run, m: vae.PixelAttention, x: Tensor) -> Tensor:
    if not run.knows(m):
        return m(x)
    ops = run.ops
    h = to_tokens(ops.group_norm(m.norm, x, 1))
    q, k, v = (ops.linear(to, h)[:, None] for to in (m.to_q, m.to_k, m.to_v))
    h = ops.linear(m.to_out, F.scaled_dot_product_attention(q, k, v)[:, 0])
    return to_image(h, x.shape[2]) + x


def norm_silu(run: Run, m: nn.GroupNorm, x: Tensor) -> Tensor:
    return run.ops.group_norm(m, x, 1, silu=True) if run.knows(m) else F.silu(m(x))
