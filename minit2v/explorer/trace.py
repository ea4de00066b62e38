"""Counts shapes, parameters, FLOPs, bytes and time of every module of a model in one call, on `meta`.

    traced = trace_model("ms-1.7b")
    traced.nodes["unet.down.0.blocks.0.temporal"].flops

No weights are needed, and nothing is computed. The numbers are for the plain networks in float16, where each
operation of PyTorch runs by itself. Fused kernels (`minit2v/fast`) move fewer bytes.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..files import embedded
from ..memory.live import OnMeta
from ..memory.plan import Video
from ..models.blocks import MotionModule, ResBlock, SpatialTransformer, TemporalConv, TemporalTransformer
from ..pipelines.blank import MODELS
from ..pipelines.files import INDEX
from ..pipelines.planning import find_adapter, planner_of_model

aten = torch.ops.aten
KINDS = (ResBlock, TemporalConv, SpatialTransformer, TemporalTransformer, MotionModule)
# Operations that allocate without writing, or that return a view (their schemas do not say so).
FREE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten._unsafe_view, aten._reshape_alias}


class Device(NamedTuple):
    """A GPU's peak rates: FLOP/s of its matrix units in float16 with float32 sums, and bytes/s of its memory."""

    name: str
    flops: float
    bytes: float
    source: str


DEVICES = (
    Device("H200", 989e12, 4.8e12, "data sheet"),
    Device("RTX 4090", 165e12, 1.008e12, "data sheet"),
    Device("T4", 65e12, 0.32e12, "data sheet"),
)


@dataclass
class Node:
    """One module: inputs and output of its first call, and sums over all its calls, including the modules in it.

    inputs: (argument, shape or value). bytes: read and written, each operand of each operation once. seconds: the
    least time on each of DEVICES, if the operations run one after the other.
    """

    name: str
    module: nn.Module
    parent: str | None
    inputs: list[tuple[str, Any]] = field(default_factory=list)
    output: tuple[int, ...] = ()
    calls: int = 0
    parameters: int = 0
    flops: int = 0
    bytes: int = 0
    seconds: list[float] = field(default_factory=lambda: [0.0] * len(DEVICES))

    def add(self, flops: int, moved: int, seconds: list[float]) -> None:
        self.flops += flops
        self.bytes += moved
        for i, more in enumerate(seconds):
            self.seconds[i] += more


@dataclass
class Traced:
    """A model's networks, and a node for each of their modules. The text encoder and the VAE run once per video."""

    title: str
    video: Video
    tokens: int
    networks: dict[str, Any]
    nodes: dict[str, Node]
    unet_video: bool  # True: a UNet for videos; False: an image model with motion modules

    @property
    def unet(self) -> Any:
        return self.networks["unet"]

    def children(self, name: str) -> list[Node]:
        return [node for node in self.nodes.values() if node.parent == name]

    def kinds(self) -> list[tuple[type, Node]]:
        """(class, sum over all its blocks in the UNet) for each kind of block."""
        sums = {}
        for node in self.nodes.values():
            if (kind := type(node.module)) in KINDS and node.name.startswith("unet."):
                total = sums.setdefault(kind, Node(kind.__name__, node.module, None))
                total.calls += 1
                total.parameters += node.parameters
                total.add(node.flops, node.bytes, node.seconds)
        return sorted(sums.items(), key=lambda item: KINDS.index(item[0]))


def trace_model(name: str, adapter: str | None = None, **size: Any) -> Traced:
    """Count one UNet step with guidance, the text encoder on both texts, and the VAE's decoder on all frames.

    name: a folder, a hub id, an embedded model, or a name that `minit2v blank` knows. It may be a motion adapter, which
    is put into its image model. adapter: another motion adapter for an image model. size: frames, height and width of
    the video in pixels; None takes the model's. ValueError if the model is not complete, or if the video does not fit.
    """
    name, adapter = base_and_adapter(name, adapter)
    planner = planner_of_model(name, dtype=torch.float16, adapter=adapter, **size)
    networks, video, tokens = planner.networks, planner.video, planner.tokens
    most = getattr(networks["unet"].config, "motion_max_seq_length", None)
    if most is not None and video.frames > most:
        raise ValueError(f"{video.frames} frames are too many: the motion adapter has position encodings for {most}")
    nodes: dict[str, Node] = {}
    for part in ("text_encoder", "unet", "vae"):
        if part in networks:
            nodes |= tree(part, networks[part])
    factor, channels = networks["vae"].config.factor, networks["unet"].config.in_channels
    rows, columns = video.height // factor, video.width // factor
    x = torch.empty(2, channels, video.frames, rows, columns, device="meta", dtype=torch.float16)
    context = torch.empty(2, tokens, networks["unet"].config.cross_attention_dim, device="meta", dtype=torch.float16)
    shape = video.frames, networks["vae"].config.latent_channels, rows, columns
    z = torch.empty(shape, device="meta", dtype=torch.float16)
    with torch.no_grad():
        if "text_encoder" in networks:
            ids = torch.zeros(2, tokens, dtype=torch.int64, device="meta")
            count(nodes, "text_encoder", networks["text_encoder"], ids)
        count(nodes, "unet", networks["unet"], x, 500, context)
        vae = networks["vae"]
        count(nodes, "vae", vae, z, call=vae.decode)
    add_up(nodes)
    video_unet = type(networks["unet"]).__name__ == "UNet3DConditionModel"
    shown = {n: node for n, node in nodes.items() if node.calls or node.flops or n in networks}
    title = Path(name).name if Path(name).exists() else name
    title += f" with {Path(adapter).name}" if adapter else ""
    return Traced(title, video, tokens, networks, shown, video_unet)


def base_and_adapter(name: str, adapter: str | None) -> tuple[str, str | None]:
    """The image model and its motion adapter. If `name` is an adapter, the image model is the one that it is for.

    The embedded image model has its own adapter. ValueError if both names are adapters.
    """
    if name == "shapes-image":
        return name, adapter or "shapes-motion"
    folder = embedded.find(name) or Path(name).expanduser()
    lone = folder.is_dir() and (folder / "config.json").is_file() and not (folder / INDEX).is_file()
    short = next((m for s, m in MODELS.items() if name.lower() in (s, *(i.lower() for i in m.ids))), None)
    if not lone and (folder.is_dir() or short is None or "unet" in short.parts):
        return name, adapter
    if adapter is not None:
        raise ValueError(f"{name} and {adapter} are both motion adapters: give an image model and one adapter")
    find_adapter(name)
    return ("shapes-image" if name == "shapes-motion" else "sd-1.5"), name


# ------------------------------------------------------------------------------------------------------------- counting


def tree(part: str, network: nn.Module) -> dict[str, Node]:
    """A node for each module except lists and identities, which a reader would not draw."""
    nodes: dict[str, Node] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList | nn.Identity):
            continue
        full = f"{part}.{name}" if name else part
        parent = full.rpartition(".")[0]
        while parent and parent not in nodes:
            parent = parent.rpartition(".")[0]
        nodes[full] = Node(full, module, parent or None, parameters=sum(p.numel() for p in module.parameters()))
    return nodes


def add_up(nodes: dict[str, Node]) -> None:
    """Modules that are never called themselves, such as the levels of the UNet, get the sums of their children."""
    for node in reversed(list(nodes.values())):
        if node.parent and type(node.module).forward is nn.Module.forward and not node.calls:
            for child in nodes.values():
                if child.parent == node.name:
                    node.add(child.flops, child.bytes, child.seconds)


class Operations(TorchDispatchMode):
    """Adds the costs of every operation to all modules that are running."""

    def __init__(self):
        super().__init__()
        self.open: list[Node] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        packet = function._overloadpacket
        if packet not in FREE and not is_view(function):
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            if packet is aten.native_group_norm:  # reads x twice: for its statistics, and to normalise it
                given.append(args[0])
            formula = flop_registry.get(packet)
            operations = formula(*args, **(kwargs or {}), out_val=result) if formula else 0
            self.add(operations, sum(x.nbytes for x in (*given, *made)))
        return result

    def add(self, operations: int, moved: int) -> None:
        seconds = [max(operations / d.flops, moved / d.bytes) for d in DEVICES]
        for node in self.open:
            node.add(operations, moved, seconds)


def is_view(function: Any) -> bool:
    returned = function._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returned)


class Device16(OnMeta):
    """`meta` with attention as on a GPU, where the scores are never written to memory."""

    def __init__(self, operations: Operations):
        super().__init__()
        self.operations = operations

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.conv2d, F.conv2d):  # `Operations` counts it
            return function(*args, **(kwargs or {}))
        result = super().__torch_function__(function, types, args, kwargs)
        if function is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            rows = q.shape[0] * q.shape[1] * q.shape[2]
            operations = 2 * rows * k.shape[2] * (q.shape[3] + v.shape[3])
            self.operations.add(operations, q.nbytes + k.nbytes + v.nbytes + result.nbytes)
        return result


def count(
    nodes: dict[str, Node], part: str, network: nn.Module, *inputs: Any, call: Callable[..., Any] | None = None
) -> None:
    """Run a network on `meta` and fill its nodes. call: the method to call, if it is not `forward`."""
    operations = Operations()
    with operations, Device16(operations), calls_noted(nodes, part, network, operations.open):
        if call is None:
            network(*inputs)
            return
        node = nodes[part]
        operations.open.append(node)
        node.inputs, node.calls = named_inputs(call, inputs, {}), 1
        node.output = tuple(call(*inputs).shape)
        operations.open.pop()


@contextmanager
def calls_noted(nodes: dict[str, Node], part: str, network: nn.Module, opened: list[Node]) -> Iterator[None]:
    of = {id(node.module): node for name, node in nodes.items() if name == part or name.startswith(f"{part}.")}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        node = of[id(module)]
        opened.append(node)
        node.calls += 1
        if node.calls == 1:
            node.inputs = named_inputs(module.forward, args, kwargs)

    def after(module: nn.Module, args: Any, out: Any) -> None:
        node = opened.pop()
        if isinstance(out, Tensor) and not node.output:
            node.output = tuple(out.shape)

    hooks: list[Any] = []
    try:
        for node in of.values():
            hooks.append(node.module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.append(node.module.register_forward_hook(after))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def named_inputs(function: Callable[..., Any], args: Any, kwargs: Any) -> list[tuple[str, Any]]:
    """(argument, shape of a tensor or value) for each argument, in order."""
    bound = inspect.signature(function).bind(*args, **kwargs).arguments
    return [(name, tuple(x.shape) if isinstance(x, Tensor) else x) for name, x in bound.items()]


# -------------------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class Source:
    """The docstring and source of a class. lines: (line number, text) of `forward`; empty for PyTorch's classes."""

    name: str
    file: str
    says: str
    lines: tuple[tuple[int, str], ...]


@cache
def source_of(cls: type) -> Source:
    """The source of the `forward` method of a class."""
    says = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
    if not cls.__module__.startswith("minit2v"):
        return Source(f"nn.{cls.__name__}", "", FORMULAS.get(cls.__name__, ""), ())
    owner = next((c for c in cls.__mro__ if "forward" in vars(c)), cls)
    wanted: Any = vars(owner).get("forward", owner)
    if owner.__module__.startswith("torch."):  # a level of the UNet has no forward: show its whole class
        wanted = owner = cls
    if cls.__name__ == "AutoencoderKL":
        wanted, owner = cls.decode_frames, cls
    text, first = inspect.getsourcelines(wanted)
    indent = min((len(line) - len(line.lstrip()) for line in text if line.strip()), default=0)
    package = Path(sys.modules["minit2v"].__file__ or "").parents[1]
    path = Path(inspect.getsourcefile(owner) or "").relative_to(package).as_posix()
    return Source(cls.__name__, path, says,
                  tuple((first + i, line[indent:].rstrip()) for i, line in enumerate(text)))


FORMULAS = {
    "Linear": "y = W x + b, for each vector x.",
    "Conv2d": "Convolution over height and width, each frame by itself.",
    "Conv3d": "Convolution over frames, height and width.",
    "GroupNorm": "y = (x − mean) / standard deviation · weight + bias; statistics of each group of channels.",
    "LayerNorm": "y = (x − mean) / standard deviation · weight + bias; statistics of each vector.",
    "Embedding": "A table: a row for each token or position.",
    "SiLU": "y = x · sigmoid(x).",
    "Sequential": "One after the other.",
}
