"""What attention looks at: the softmax of chosen attentions, collected while a network runs."""

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
Maps = dict[str, list[Tensor]]  # name of an attention -> its map, call by call


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
    """Collects softmax(q k^T / sqrt(d)) of a UNet's attentions while the `with` block runs, also inside a pipeline.

        with attention_maps(pipe.unet, "text", "up.*", calls={0, 24}) as maps:
            pipe(prompt)
        maps["up.1.blocks.0.spatial.block.attn2"][0]    # of the first of these calls, a step of the pipeline each

    kinds: "spatial", the pixels of a frame look at each other; "text", they look at the text; "frames", each pixel
    looks at itself in all frames. names: patterns (`*`, `?`, `[...]`) of `network.named_modules()`, of which one must
    fit. calls: which calls of an attention are kept, counted from 0, all where None. limit: bytes that all maps may
    take. Shapes, with a last axis that sums to 1:

        spatial    ((b f) h p p)     b f images, h heads, p pixels, row by row
        text       (b h (f p) l)     the queries of a text stand in one row, frame by frame; l tokens
                   ((b f) h p l)     where there is a text for each frame
        frames     ((b p) h f f)

    Without h where `average_heads`. Under guidance the first half of b is for the negative text. A map is float32 (of
    float64, float64), on the CPU, without gradients. The numbers are those that the attention itself uses: what it
    gives to `F.scaled_dot_product_attention`, with its mask. Blocks that are looked at run as they are written, the
    others as fast as always; after the `with` block, also after an error, all is as before.

    Raises ValueError where no attention fits, TypeError on what is not a plain network, RuntimeError where an attention
    does not call `F.scaled_dot_product_attention`, MemoryError before the maps grow over `limit`.
    """
    if not isinstance(network, nn.Module) or hasattr(network, "_orig_mod"):
        hint = ": give the network that was compiled" if hasattr(network, "_orig_mod") else ""
        raise TypeError(f"attention_maps looks into a plain network, not into a {type(network).__name__}{hint}")
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    for kind in kinds:
        if kind not in get_args(Kind):
            raise ValueError(f"there is no kind {kind!r} of attention{nearest(str(kind), list(get_args(Kind)))}")
    patterns = (names,) if isinstance(names, str) else tuple(names)
    there = dict(attentions(network, kinds))
    chosen = {name: m for name, m in there.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    if not chosen:
        example = f"; there is {next(iter(there))!r}" if there else ""
        raise ValueError(f"no attention of {', '.join(kinds)} is named like {', '.join(map(repr, patterns))}{example}")

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
    """(name, module) of every attention of these kinds, which its place says: it may be of any class."""
    for name, m in network.named_modules():
        of: dict[str, str] = {}
        if isinstance(m, TransformerBlock):
            of = {"attn1": "spatial", "attn2": "text"}
        elif isinstance(m, FrameTransformerBlock):
            of = {"attn1": "frames", "attn2": "frames"}
        yield from ((f"{name}.{part}", getattr(m, part)) for part, kind in of.items() if kind in kinds)


class Watch(TorchFunctionMode):
    """Sees what an attention that is open gives to PyTorch, and keeps its softmax."""

    def __init__(self, calls: Container[int] | None, average_heads: bool, limit: int):
        super().__init__()
        self.calls, self.average_heads, self.limit = calls, average_heads, limit
        self.maps: Maps = {}
        self.count: dict[str, int] = {}  # calls of an attention that have begun
        self.open: str | None = None  # the attention that is being computed
        self.seen = False  # whether it has called PyTorch's
        self.once = False  # whether only its first call counts
        self.bytes = 0

    def hooks_of(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(m: nn.Module, args: Any) -> None:
            self.open, self.seen = name, False
            self.once = isinstance(m, ImageAttention)  # which looks at the text first, and then at pictures

        def after(m: nn.Module, args: Any, y: Any) -> None:
            seen, self.open = self.seen, None
            self.count[name] = self.count.get(name, 0) + 1
            if y is not None and not seen:  # None: it raised
                raise RuntimeError(f"{name}, a {type(m).__name__}, does not call F.scaled_dot_product_attention: its "
                                   "weights cannot be seen")  # fmt: skip

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
        """Append the softmax of query (n h q d) and key (n h k d), one n after the other: (n h q k) or (n q k)."""
        if query.ndim != 4:
            raise RuntimeError(f"{name}: attention_maps knows queries (n heads length d), not {tuple(query.shape)}")
        n, h, rows, d = query.shape
        if enable_gqa:
            key = key.repeat_interleave(h // key.shape[1], dim=1)
        columns, dtype = key.shape[2], torch.promote_types(query.dtype, torch.float32)
        shape = (n, rows, columns) if self.average_heads else (n, h, rows, columns)
        kept = torch.empty(shape, dtype=dtype, device="meta")
        self.bytes += kept.nbytes
        if self.bytes > self.limit:
            raise MemoryError(f"attention_maps: {name} would bring the maps to {self.bytes / 2**30:.3g} GiB, over the "
                              f"limit of {self.limit / 2**30:.3g}: choose fewer kinds, names or calls, or another "
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
