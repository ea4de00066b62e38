"""What the figures and tables of docs/architecture.md say, read off the networks themselves.

The networks are made on the meta device: shapes without numbers, so that the full-size ones cost no memory.
`python docs/figures/facts.py` prints the tables of architecture.md; tests/test_docs.py holds the text to them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from minit2v.models.blocks import MotionModule, ResBlock, SpatialTransformer, TemporalConv, TemporalTransformer
from minit2v.models.clip import CLIPTextModel
from minit2v.models.network import Network
from minit2v.models.unet import UNet
from minit2v.models.unet2d import UNet2DConditionModel
from minit2v.models.unet3d import UNet3DConditionModel
from minit2v.models.unet_motion import MotionAdapter, UNetMotionModel, known_resnet_norms
from minit2v.models.vae import AutoencoderKL
from minit2v.training import shapes

KINDS = (ResBlock, TemporalConv, SpatialTransformer, TemporalTransformer, MotionModule)
TIME = (TemporalConv, TemporalTransformer)
STABLE_DIFFUSION_TEXT = {  # CLIP ViT-L/14's text encoder
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
}
VERSIONS = {  # what the published motion adapters' files say: name -> fields
    "v1-5": {"motion_max_seq_length": 24, "use_motion_mid_block": False},
    "v1-5-2": {},
    "v1-5-3": {"use_motion_mid_block": False},
}


@dataclass(frozen=True)
class Model:
    """A published stack on the meta device, and the size of one video for it."""

    name: str
    unet: UNet
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    frames: int

    @property
    def side(self) -> int:
        """Height and width of the latents."""
        size = self.unet.config.sample_size
        return size if isinstance(size, int) else size[0]

    @property
    def tokens(self) -> int:
        return self.text_encoder.config.max_position_embeddings

    @property
    def latents(self) -> tuple[int, ...]:
        """(c f h w) of one video."""
        return (self.unet.config.in_channels, self.frames, self.side, self.side)


def modelscope() -> Model:
    with torch.device("meta"):
        return Model("ModelScope", UNet3DConditionModel(), AutoencoderKL(), CLIPTextModel(), 16)


def embedded() -> Model:
    """The embedded model, `shapes`, as its trainer makes it."""
    vocabulary = shapes.make_tokenizer().vocab_size
    with torch.device("meta"):
        text_encoder = CLIPTextModel(vocab_size=vocabulary, **shapes.TEXT)
        unet, vae = UNet3DConditionModel(**shapes.UNET), AutoencoderKL(**shapes.VAE)
    return Model("shapes", unet, vae, text_encoder, shapes.world.FRAMES)


def animatediff() -> Model:
    """Stable Diffusion 1.5 with the motion adapter v1-5-2, as they are trained: the image model frozen."""
    with torch.device("meta"):
        unet = UNetMotionModel.from_unet2d(UNet2DConditionModel(), MotionAdapter(**VERSIONS["v1-5-2"]))
        unet.freeze_unet2d_params()
        return Model("AnimateDiff", unet, AutoencoderKL(), CLIPTextModel(**STABLE_DIFFUSION_TEXT), 16)


# ----------------------------------------------------------------------------------------------------- one step, traced


@dataclass
class Call:
    """One call of one module: its name in the UNet, what came in, what came out, and what attention saw meanwhile."""

    name: str
    module: nn.Module
    x: tuple[int, ...]
    y: tuple[int, ...]
    queries: list[tuple[int, ...]] = field(default_factory=list)  # (b heads queries head_dim), one per attention
    keys: list[tuple[int, ...]] = field(default_factory=list)
    convs: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)  # (input, kernel)

    @property
    def channels(self) -> tuple[int, int]:
        """Of a block: the channels that come in, those of the skip included, and those that go out."""
        return self.module.res.conv1.in_channels, self.y[1]


class Watch(TorchFunctionMode):
    """Notes the operands of attention and of convolutions in every call that is open."""

    def __init__(self):
        super().__init__()
        self.open: list[Call] = []

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            for call in self.open:
                call.queries.append(tuple(args[0].shape))
                call.keys.append(tuple(args[1].shape))
        elif func in (F.conv2d, F.conv3d):
            for call in self.open:
                call.convs.append((tuple(args[0].shape), tuple(args[1].shape)))
        return func(*args, **(kwargs or {}))


@contextmanager
def watching(network: nn.Module) -> Iterator[list[Call]]:
    """The calls of every module of `network`, in the order in which they end."""
    calls: list[Call] = []
    names = {module: name for name, module in network.named_modules()}
    with Watch() as watch:

        def before(module: nn.Module, args: tuple) -> None:
            watch.open.append(Call(names[module], module, tuple(args[0].shape), ()))

        def after(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
            call = watch.open.pop()
            call.y = tuple(out.shape)
            calls.append(call)

        hooks = [h for m in names for h in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
        try:
            yield calls
        finally:
            for hook in hooks:
                hook.remove()


@cache
@torch.no_grad()
def trace_unet(model: Model, videos: int = 2, text_per_frame: bool = False) -> dict[str, Call]:
    """Name of a module -> its call, over one prediction for so many videos; 2, as under guidance."""
    x = torch.empty(videos, *model.latents, device="meta")
    texts = (videos, model.frames) if text_per_frame else (videos,)
    context = torch.empty(*texts, model.tokens, model.unet.config.cross_attention_dim, device="meta")
    with watching(model.unet) as calls:
        model.unet(x, 500, context)
    return {call.name: call for call in calls}


@torch.no_grad()
def flops_of_unet(model: Model, videos: int = 2) -> tuple[int, dict[type, int]]:
    """Floating-point operations of one prediction (a multiplication and an addition are two): all, and by kind."""
    x = torch.empty(videos, *model.latents, device="meta")
    context = torch.empty(videos, model.tokens, model.unet.config.cross_attention_dim, device="meta")
    with FlopCounterMode(display=False) as counter:
        model.unet(x, 500, context)
    counts = counter.get_flop_counts()
    by_kind = dict.fromkeys(KINDS, 0)
    for name, module in model.unet.named_modules():
        if isinstance(module, KINDS):
            by_kind[type(module)] += sum(counts[f"{type(model.unet).__name__}.{name}"].values())
    return counter.get_total_flops(), by_kind


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def trained(module: nn.Module) -> int:
    """Parameters that are not frozen."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# ----------------------------------------------------------------------------------------------------------- the tables


def heads(block: nn.Module) -> int:
    """The number of its attention heads, 0 where it has none."""
    if not block.attention:
        return 0
    return block.spatial.block.attn1.heads


def row(*cells: object) -> str:
    return "| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells) + " |"


def component_rows(models: list[Model]) -> list[str]:
    """Parameters of each network."""
    parts: dict[str, Callable[[Model], Network | nn.Module]] = {
        "text encoder": lambda m: m.text_encoder,
        "UNet": lambda m: m.unet,
        "VAE, encoder": lambda m: nn.ModuleList([m.vae.encoder, m.vae.quant_conv]),
        "VAE, decoder": lambda m: nn.ModuleList([m.vae.post_quant_conv, m.vae.decoder]),
    }
    counts = {name: [parameters(part(m)) for m in models] for name, part in parts.items()}
    return [row(name, *c) for name, c in counts.items()] + [row("all", *map(sum, zip(*counts.values(), strict=True)))]


def kind_rows(model: Model) -> list[str]:
    """Modules, parameters and operations of each kind of block in one UNet; two videos, as under guidance.

    The second column says space or time, or of AnimateDiff what is frozen and what is trained.
    """
    total, (flops, by_kind) = parameters(model.unet), flops_of_unet(model)
    motion = isinstance(model.unet, UNetMotionModel)

    def line(name: str, where: str, number: object, size: int, work: int) -> str:
        return row(name, where, number, size, f"{size / total:.1%}", f"{work / flops:.1%}")

    rows, sizes = [], {}
    for kind in KINDS:
        modules = [m for m in model.unet.modules() if isinstance(m, kind)]
        if not modules:
            continue
        sizes[kind] = sum(map(parameters, modules))
        where = "time" if kind in TIME else "space"
        if motion:
            where = {0: "frozen", sizes[kind]: "trained"}[sum(map(trained, modules))]
        rows.append(line(f"`{kind.__name__}`", where, len(modules), sizes[kind], by_kind[kind]))
    rest = total - sum(sizes.values()), flops - sum(by_kind.values())
    rows.append(line("the rest", "frozen" if motion else "", "", *rest))
    if motion:
        image = total - trained(model.unet), flops - by_kind[MotionModule]
        rows.append(line("the image model", "frozen", "", *image))
    else:
        rows.append(line("both of time", "", "", sum(sizes[k] for k in TIME), sum(by_kind[k] for k in TIME)))
    rows.append(line("all", "", "", total, flops))
    return rows


def motion_rows(model: Model) -> list[str]:
    """What goes through the first block of AnimateDiff's UNet; under guidance."""
    once, per_frame = (trace_unet(model, text_per_frame=each) for each in (False, True))
    block = "down.0.blocks.0"
    spatial, motion, apart = once[f"{block}.spatial"], once[f"{block}.motion"], per_frame[f"{block}.spatial"]
    assert motion.queries[0] == motion.queries[1] == motion.keys[0] == motion.keys[1] and motion.x == motion.y
    rows = {
        "x and y of every part, `(b f) c h w`": motion.x,
        "`spatial`, `attn2`, a text per video: q, `b heads (f h w) head_dim`": spatial.queries[1],
        "the same: k, v, `b heads l head_dim`": spatial.keys[1],
        "a text per frame: q, `(b f) heads (h w) head_dim`": apart.queries[1],
        "the same: k, v, `(b f) heads l head_dim`": apart.keys[1],
        "`motion`, after `proj_in`: z, `b f (h w) c`": once[f"{block}.motion.proj_in"].y,
        "`motion`, `attn1` and `attn2`: q, k, v, `(b h w) heads f head_dim`": motion.queries[0],
    }
    return [row(name, size) for name, size in rows.items()]


def unet_rows(unets: list[UNet]) -> list[str]:
    """What a block of each UNet is, where that is said, and how large the whole is."""
    rows = []
    for unet in unets:
        block = next(b for b in unet.blocks() if b.attention)
        parts = ", ".join(f"`{type(part).__name__}`" for part in block.children())
        file = type(unet).__module__.replace(".", "/") + ".py"
        link = f"[{Path(file).name}](../{file})"
        rows.append(row(f"`{type(unet).__name__}`", link, parts, parameters(unet)))
    return rows


def version_rows() -> list[str]:
    """The published motion adapters, side by side."""
    with torch.device("meta"):
        adapters = {f"animatediff-motion-adapter-{name}": MotionAdapter(**v) for name, v in VERSIONS.items()}
    rows: dict[str, list[object]] = {}
    for name, adapter in adapters.items():
        config = adapter.config
        for what, value in {
            "most frames, `motion_max_seq_length`": config.motion_max_seq_length,
            "motion modules": sum(isinstance(m, MotionModule) for m in adapter.modules()),
            "of them in the middle, `use_motion_mid_block`": int(config.use_motion_mid_block),
            "parameters": parameters(adapter),
            "norms of the motion modules, `motion_norms`": f"per {config.motion_norms}",
            "norms of `ResBlock` and `norm_out`, `resnet_norms`": f"per {known_resnet_norms(config, name)}",
        }.items():
            rows.setdefault(what, []).append(value)
    return [row(what, *values) for what, values in rows.items()]


def level_rows(model: Model) -> list[str]:
    """The levels of one UNet: pixels, channels, heads, and channels into and out of every block."""
    calls = trace_unet(model)

    def block(name: str) -> str:
        c_in, c_out = calls[name].channels
        return f"{c_in} → {c_out}"

    rows = []
    for i, level in enumerate(model.unet.down):
        up = model.unet.up[len(model.unet.up) - 1 - i]
        _, c, h, w = calls[f"down.{i}.blocks.0"].y
        down_names = [f"down.{i}.blocks.{j}" for j in range(len(level.blocks))]
        up_names = [f"up.{len(model.unet.up) - 1 - i}.blocks.{j}" for j in range(len(up.blocks))]
        attends, way_down, way_up = heads(level.blocks[0]), map(block, down_names), map(block, up_names)
        rows.append(row(f"level {i}", f"{h} x {w}", c, attends or "none", ", ".join(way_down), ", ".join(way_up)))
    _, c, h, w = calls["mid.0"].y
    middle = ", ".join(block(f"mid.{j}") for j in range(len(model.unet.mid)))
    rows.append(row("middle", f"{h} x {w}", c, heads(model.unet.mid[0]), middle, ""))
    return rows


@torch.no_grad()
def path_rows(models: list[Model]) -> list[str]:
    """The shapes of one video on its way, under guidance."""
    rows: dict[str, list[tuple[int, ...]]] = {}
    for m in models:
        one, two = (1, *m.latents), (2, *m.latents)
        calls = trace_unet(m)
        out = calls["conv_out"].y
        z = torch.empty(m.frames, m.latents[0], m.side, m.side, device="meta")
        for name, size in {
            "token ids of a text, `b l`": (1, m.tokens),
            "its context, `b l d`": (1, m.tokens, m.text_encoder.config.hidden_size),
            "noise and latents, `b c f h w`": one,
            "what the UNet gets: latents twice": two,
            "and both contexts": (2, m.tokens, m.unet.config.cross_attention_dim),
            "between its blocks at level 0, `(b f) c h w`": calls["down.0.blocks.0"].y,
            "what it predicts, twice": (2, out[1], m.frames, *out[2:]),
            "after guidance and the scheduler's step": one,
            "decoded pixels, `(b f) 3 h w`": tuple(m.vae.decode(z).shape),
        }.items():
            rows.setdefault(name, []).append(size)
    return [row(name, *map(str, sizes)) for name, sizes in rows.items()]


def block_rows(names: dict[str, Model]) -> list[str]:
    """What goes through the four parts of one block, given by its name in each model; under guidance."""
    rows: dict[str, list[tuple[int, ...]]] = {}
    for block, m in names.items():
        calls = trace_unet(m)
        res, conv, spatial, temporal = (
            calls[f"{block}.{part}"] for part in ("res", "temporal_conv", "spatial", "temporal")
        )
        for name, size in {
            "`res`: x and y, `(b f) c h w`": res.y,
            "`temporal_conv`: what a convolution sees, `b c f h w`": conv.convs[0][0],
            "`spatial`, `attn1`: q, k, v, `(b f) heads (h w) head_dim`": spatial.queries[0],
            "`spatial`, `attn2`: q, `b heads (f h w) head_dim`": spatial.queries[1],
            "`spatial`, `attn2`: k, v of the text, `b heads l head_dim`": spatial.keys[1],
            "`temporal`, `attn1` and `attn2`: q, k, v, `(b h w) heads f head_dim`": temporal.queries[0],
        }.items():
            rows.setdefault(name, []).append(size)
        assert temporal.queries[0] == temporal.queries[1] and res.y == temporal.y
    return [row(name, *map(str, sizes)) for name, sizes in rows.items()]


def tables(full: Model, small: Model, motion: Model) -> list[list[str]]:
    """The rows of every table of architecture.md that holds numbers, but for the worked step."""
    with torch.device("meta"):
        image = UNet2DConditionModel()
    return [
        unet_rows([full.unet, image, motion.unet]),
        path_rows([full, small]),
        block_rows({"down.0.blocks.0": full, "down.1.blocks.0": small}),
        level_rows(full),
        level_rows(small),
        component_rows([full, small]),
        kind_rows(full),
        kind_rows(small),
        version_rows(),
        motion_rows(motion),
        kind_rows(motion),
    ]


if __name__ == "__main__":
    for table in tables(modelscope(), embedded(), animatediff()):
        print("\n".join(table), end="\n\n")
