"""Attention maps: the softmax of chosen attention layers, collected while a network runs."""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minit2v_convert.rename import nearest

from .image_prompt import ImageAttention
from .layers import FrameTransformerBlock, TransformerBlock

Kind = Literal["spatial", "text", "frames"]
Maps = dict[str, list[Tensor]]  # name of an attention layer -> its maps, one for each call


@contextmanager
def attention_maps(
    network: nn.Module,
    kinds: Kind | Sequence[Kind] = ("spatial", "text", "frames"),
    names: str | Sequence[str] = "*",
    *,
    calls: Container[int] | None = None,
    average_heads: bool = True,
    limit: int = 2**30,
) -> Iterator[Maps]:
    """Collects softmax(q k^T / sqrt(d)) of a UNet's attention layers while the `with` block runs.

        with attention_maps(pipe.unet, "text", "up.*", calls={0, 24}) as maps:
            pipe(prompt)
        maps["up.1.blocks.0.spatial.block.attn2"][0]    # call 0: the first step of the pipeline

    kinds: which layers. "spatial": the pixels of a frame attend to each other. "text": the pixels attend to the text.
    "frames": each pixel attends to itself in all frames.
    names: patterns (`*`, `?`, `[...]`) for the names in `network.named_modules()`. One of them must match.
    calls: which calls of a layer are kept, counted from 0. None keeps all. In a pipeline, one step is one call.
    average_heads: keep the mean over the heads.
    limit: the bytes that all maps together may take.

    The last axis of a map sums to 1. The axis h is missing if `average_heads` is true. The shapes are:

        spatial    ((b f) h p p)     b f images, h heads, p pixels, row by row
        text       (b h (f p) l)     the pixels of all frames as one axis, frame by frame; l tokens
                   ((b f) h p l)     if there is a text for each frame
        frames     ((b p) h f f)

    With guidance, the first half of b belongs to the negative prompt. Maps are float32 (float64 for a float64 network),
    on the CPU, without gradients. They are computed from the arguments that the layer itself gives to
    `F.scaled_dot_product_attention`, mask included. Blocks with a watched layer run without the fast path. The other
    blocks keep it. After the `with` block all is as before, also after an error.

    Raises ValueError if no layer matches, and TypeError if `network` is not a plain network. Raises RuntimeError if a
    layer does not call `F.scaled_dot_product_attention`, and MemoryError before the maps exceed `limit`.
    """
    if not isinstance(network, nn.Module) or hasattr(network, "_orig_mod"):
        hint = ": give the network that was compiled" if hasattr(network, "_orig_mod") else ""
        raise TypeError(f"attention_maps needs a plain network, not a {type(network).__name__}{hint}")
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    for kind in kinds:
        if kind not in get_args(Kind):
            raise ValueError(f"there is no kind {kind!r} of attention{nearest(str(kind), list(get_args(Kind)))}")
    patterns = (names,) if isinstance(names, str) else tuple(names)
    there = dict(attentions(network, kinds))
    chosen = {name: m for name, m in there.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    if not chosen:
        example = f"; for example, there is {next(iter(there))!r}" if there else ""
        raise ValueError(f"no attention layer of kind {', '.join(kinds)} has a name that matches "
                         f"{', '.join(map(repr, patterns))}{example}")  # fmt: skip

    watch, hooks = Watch(calls, average_heads, limit), []
    try:
        for name, m in chosen.items():
            before, after = watch.hooks_of(name)
            hooks += [m.register_forward_pre_hook(before), m.register_forward_hook(after, always_call=True)]
        with watch:
            yield watch.maps
    finally:
        for hook in hooks:
            hook.remove()


def attentions(network: nn.Module, kinds: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every attention layer of these kinds. Its place in a block tells the kind, not its class."""
    for name, m in network.named_modules():
        of: dict[str, str] = {}
        if isinstance(m, TransformerBlock):
            of = {"attn1": "spatial", "attn2": "text"}
        elif isinstance(m, FrameTransformerBlock):
            of = {"attn1": "frames", "attn2": "frames"}
        yield from ((f"{name}.{part}", getattr(m, part)) for part, kind in of.items() if kind in kinds)


class Watch(TorchFunctionMode):
    """Sees the arguments that a watched layer gives to PyTorch's attention, and keeps the softmax."""

    def __init__(self, calls: Container[int] | None, average_heads: bool, limit: int):
        super().__init__()
        self.calls, self.average_heads, self.limit = calls, average_heads, limit
        self.maps: Maps = {}
        self.count: dict[str, int] = {}  # finished calls of each layer
        self.open: str | None = None  # the layer that is running now
        self.seen = False  # whether it has called PyTorch's attention
        self.once = False  # whether only its first call counts
        self.bytes = 0

    def hooks_of(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(m: nn.Module, args: Any) -> None:
            self.open, self.seen = name, False
            self.once = isinstance(m, ImageAttention)  # it attends to the text first, and then to pictures

        def after(m: nn.Module, args: Any, y: Any) -> None:
            seen, self.open = self.seen, None
            self.count[name] = self.count.get(name, 0) + 1
            if y is not None and not seen:  # y is None after an error
                raise RuntimeError(f"{name}, a {type(m).__name__}, does not call F.scaled_dot_product_attention. "
                                   "attention_maps cannot see its weights: leave it out of names=")  # fmt: skip

        return before, after

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.open is not None and not (self.once and self.seen):
            self.seen = True
            if self.calls is None or self.count.get(self.open, 0) in self.calls:
                self.keep(self.open, *args, **kwargs)
        return func(*args, **kwargs)

    @torch.no_grad()
    def keep(
        self,
        name: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        """Append the softmax for query (n h q d) and key (n h k d): (n h q k) or (n q k). One n at a time."""
        if query.ndim != 4:
            raise RuntimeError(f"{name}: attention_maps needs queries (n heads length d), not {tuple(query.shape)}")
        n, h, rows, d = query.shape
        if enable_gqa:
            key = key.repeat_interleave(h // key.shape[1], dim=1)
        columns, dtype = key.shape[2], torch.promote_types(query.dtype, torch.float32)
        shape = (n, rows, columns) if self.average_heads else (n, h, rows, columns)
        kept = torch.empty(shape, dtype=dtype, device="meta")
        self.bytes += kept.nbytes
        if self.bytes > self.limit:
            raise MemoryError(f"attention_maps: with {name} the maps need {self.bytes / 2**30:.3g} GiB, more than the "
                              f"limit of {self.limit / 2**30:.3g} GiB: choose fewer kinds, names or calls, or a higher "
                              "limit")  # fmt: skip
        kept = torch.empty(shape, dtype=dtype, device="cpu")
        mask = torch.zeros((), dtype=dtype, device=query.device)
        if attn_mask is not None:
            wanted = attn_mask if attn_mask.dtype != torch.bool else torch.where(attn_mask, 0.0, -torch.inf)
            mask = wanted.to(dtype)
        if is_causal:
            ahead = torch.ones(rows, columns, dtype=torch.bool, device=query.device).triu(1)
            mask = mask.masked_fill(ahead, -torch.inf) if mask.ndim else torch.where(ahead, -torch.inf, mask)
        mask = mask.expand(n, h, rows, columns)
        scale = d**-0.5 if scale is None else scale
        with torch.autocast(query.device.type, enabled=False):
            for i in range(n):
                weights = (query[i].to(dtype) @ key[i].to(dtype).mT * scale + mask[i]).softmax(-1)
                kept[i] = weights.mean(0) if self.average_heads else weights
        self.maps.setdefault(name, []).append(kept)
