"""Does a video fit into memory? Counts the peak of every part of the work, and finds the fastest plan that fits.

    planner = planner_of_model("ms-1.7b", Video(64, 256, 256))       in pipelines/planning.py; needs no weights
    planner.peaks(Techniques())                                      bytes: text encoder, UNet step, VAE
    planner.choose(8 * GIB)                                          the fastest plan that fits

live.py says what is counted. Which plan is the fastest is an estimate: bytes that must be moved, divided by assumed
speeds. It only orders the plans, and does not predict times.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import fast
from ..fast.cpu import CPUOps
from ..fast.executor import UNETS, Executor, UNetExecutor, VAEExecutor
from ..fast.ops import Ops
from ..files.weights import Weightless
from ..models.vae import AutoencoderKL
from ..pipelines.checks import unwrapped
from .live import GIB, peak_beside, size
from .stream import room, split, stored_bytes

OFFLOADS = (None, "model", "group", "sequential")
PIECES = 8  # into which forward chunking cuts the frames
TEXT = 77  # tokens of a prompt, if there is no text encoder
STEPS = 50
# Assumed speeds in bytes per second: from pinned memory to a GPU, from ordinary memory layer by layer, within the GPU.
PINNED, PAGED, DEVICE = 25e9, 4e9, 2e12


class Video(NamedTuple):
    """The video to make, and how. Height and width are in pixels."""

    frames: int
    height: int
    width: int
    videos: int = 1
    guidance: bool = True
    window: int | None = None  # frames that the UNet sees at a time; None: all
    chunk: int | None = None  # frames that the VAE decodes at a time; None: all
    encodes: bool = False  # whether the input is a video

    def __str__(self) -> str:
        many = f"{self.videos} times " if self.videos > 1 else ""
        return f"{many}{self.frames} frames of {self.width}x{self.height}"


@dataclass(frozen=True)
class Techniques:
    """Techniques that reduce a pipeline's memory. Each is off by default. `DiffusionPipeline.plan` turns them on."""

    offload_text: bool = False
    vae_slicing: bool = False
    forward_chunking: bool = False
    sequential_guidance: bool = False
    offload: str | None = None  # "model", "group" (the UNet block by block) or "sequential" (all, layer by layer)
    vae_tiling: bool = False  # changes the picture a little
    store: str | None = None  # "int8" or "fp8": the UNet's weights in 8 bits; changes the numbers

    @property
    def exact(self) -> bool:
        return not self.vae_tiling and self.store is None

    def calls(self, chunk: int = 1) -> list[str]:
        """The calls in Python that turn these techniques on."""
        found = {"model": ["pipe.enable_model_cpu_offload()"], "sequential": ["pipe.enable_sequential_cpu_offload()"],
                 "group": ["pipe.enable_group_offload(use_stream=True)"], None: []}[self.offload]  # fmt: skip
        if self.offload_text:
            found.append("pipe.enable_text_offload()")
        if self.vae_slicing:
            found.append("pipe.enable_vae_slicing()")
        if self.vae_tiling:
            found.append("pipe.enable_vae_tiling()")
        if self.forward_chunking:
            found.append(f"pipe.unet.enable_forward_chunking({chunk})")
        if self.sequential_guidance:
            found.append("pipe.enable_sequential_guidance()")
        if self.store is not None:
            found.append(f"pipe.enable_narrow_weights({self.store!r})")
        return found

    def __str__(self) -> str:
        names = [name.replace("_", " ") for name, value in vars(self).items() if value is True]
        names += [f"{self.offload} offload"] * (self.offload is not None) + [f"{self.store} weights"] * bool(self.store)
        return ", ".join(names) or "nothing"


class Plan(NamedTuple):
    """A set of techniques, and the memory that the work needs with them."""

    techniques: Techniques
    peaks: Mapping[str, int]  # bytes, by part of the work
    chunk: int  # frames at a time in forward chunking

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def calls(self) -> list[str]:
        return self.techniques.calls(self.chunk)

    def __str__(self) -> str:
        calls = "; ".join(self.calls) or "no call is needed"
        return f"{gib(self.peak)} with {self.techniques}: {calls}"


def gib(n: float) -> str:
    return f"{n / GIB:.2f} GiB"


def parse_memory(text: str | float) -> int:
    """The number of bytes of "8GiB", "8 GB", "500MB" or a number. Raises ValueError for anything else."""
    if isinstance(text, int | float) and not isinstance(text, bool) and math.isfinite(text) and text > 0:
        return int(text)
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(i?)b?\s*", str(text).lower())
    if isinstance(text, bool) or not found or (found[3] and not found[2]) or float(found[1]) == 0:
        raise ValueError(f"memory must be a size such as 8GiB or 500MB, not {text!r}")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " "))


class Planner:
    """Counts the memory that a pipeline's networks need for a video. It keeps its counts."""

    def __init__(self, networks: Mapping[str, nn.Module], video: Video, device: str = "cuda", pipeline: Any = None):
        """networks: text_encoder, unet and vae on `meta`, with their dtypes. Some may be missing.

        device: "cuda" or "cpu". pipeline: the class of the pipeline; it is needed if there is a VAE.
        """
        self.networks, self.video, self.device = dict(networks), video, device
        self.pipeline = pipeline
        self.counts: dict[Any, int] = {}
        self.weights = {name: size(network) for name, network in self.networks.items()}
        frames = min(video.frames, video.window or video.frames)
        self.chunk = -(-frames // PIECES)
        encoder = self.networks.get("text_encoder")
        self.tokens = TEXT if encoder is None else encoder.config.max_position_embeddings
        for network in self.networks.values():
            if network not in fast.executors and fast.is_on() and type(network) in (*UNETS, AutoencoderKL):
                kind = CountedVAE if isinstance(network, AutoencoderKL) else CountedUNet
                fast.executors[network] = kind(network, device)

    def peaks(self, how: Techniques = Techniques()) -> dict[str, int]:
        """Bytes at the peak of each part of the work: weights and activations."""
        parts = {}
        for part, name in (("text encoder", "text_encoder"), ("UNet step", "unet"), ("VAE", "vae")):
            if name in self.networks:
                parts[part] = self.resident(how, name) + self.beside(how, name)
        return parts

    def plan(self, how: Techniques = Techniques()) -> Plan:
        return Plan(how, self.peaks(how), self.chunk)

    def beside(self, how: Techniques, name: str) -> int:
        """Bytes of activations at the peak of a network, in addition to weights."""
        if name == "text_encoder":
            return self.once(name, self.run_text)
        if name == "unet":
            sequential = how.sequential_guidance and self.video.guidance
            kept = how.offload not in ("group", "sequential") and how.store is None  # transformed weights on a CPU
            key = name, sequential, how.forward_chunking, kept, how.offload == "sequential"
            return self.once(key, lambda: self.run_unet(sequential, how.forward_chunking, kept, key[-1]))
        key = name, how.vae_slicing, how.vae_tiling, how.offload == "sequential"
        return self.once(key, lambda: self.run_vae(how.vae_slicing, how.vae_tiling, key[-1]))

    def once(self, key: Any, run: Any) -> int:
        if key not in self.counts:
            self.counts[key] = peak_beside(self.networks.values(), run, self.device)
        return self.counts[key]

    def run_text(self) -> Tensor:
        ids = torch.zeros(self.video.videos, self.tokens, dtype=torch.int64, device="meta")
        return self.networks["text_encoder"](ids)

    def run_unet(self, sequential: bool, chunking: bool, kept: bool, written: bool) -> Tensor:
        """One step of the denoising loop, for one window of frames."""
        from ..pipelines.guidance import OneByOne

        unet, v = self.networks["unet"], self.video
        executor, before = fast.executors.get(unet), unet.chunking
        factor = self.networks["vae"].config.factor if "vae" in self.networks else 8
        branches = 2 if v.guidance else 1
        frames = min(v.frames, v.window or v.frames)
        shape = v.videos, unet.config.in_channels, frames, v.height // factor, v.width // factor
        x = torch.empty(shape, dtype=unet.dtype, device="meta")
        width = unet.config.cross_attention_dim
        text = torch.empty(branches * v.videos, self.tokens, width, dtype=unet.dtype, device="meta")
        try:
            if chunking:
                unet.enable_forward_chunking(self.chunk)
            if isinstance(executor, CountedUNet):
                executor.state, executor.keeps = None, kept
            elif written:
                executor = None
            door = (lambda: unet) if written or executor is None else (lambda: fast.runner(unet))
            predict = OneByOne([door() for _ in range(branches)]) if sequential else door()
            eps = predict(x.repeat(branches, 1, 1, 1, 1), torch.empty(1, device="meta"), text)
            if isinstance(executor, CountedUNet) and not written and executor.ops.kept_bytes():
                # The second step begins with the copies of weights that the first has made.
                eps = predict(x.repeat(branches, 1, 1, 1, 1), torch.empty(1, device="meta"), text)
            if v.guidance:
                negative, eps = eps.chunk(2)
                eps = negative + 7.5 * (eps - negative)
            return eps
        finally:
            unet.set_chunking(before)
            if isinstance(executor, Executor):
                executor.state = None  # this also frees transformed weights

    def run_vae(self, slicing: bool, tiling: bool, written: bool) -> Tensor:
        """Decodes a video, as at the end of a call. If the input is a video, encodes it first."""
        from ..pipelines import source

        vae, v = self.networks["vae"], self.video
        before = vae.slicing, vae.tiling
        executor = fast.executors.get(vae)
        pipe = self.pipeline._of_networks(self.networks)
        factor, channels = vae.config.factor, vae.config.latent_channels
        try:
            vae.slicing = slicing or before[0]
            if tiling:
                vae.enable_tiling()
            if written:
                fast.executors[vae] = None
            if v.encodes:
                pixels = torch.empty(v.videos, 3, v.frames, v.height, v.width, device="meta")
                upcast = "motion_adapter" in self.pipeline.COMPONENTS
                source.encode_video(pipe, pixels, v.videos, None, vae.dtype,
                                    v.chunk or source.ENCODED_AT_ONCE, upcast=upcast)
                del pixels
            z = torch.empty(v.videos, channels, v.frames, v.height // factor, v.width // factor, dtype=vae.dtype,
                            device="meta")
            return pipe._output(z, "pt", v.chunk)
        finally:
            vae.slicing, vae.tiling = before
            if written:
                del fast.executors[vae]
                if executor is not None:
                    fast.executors[vae] = executor

    def resident(self, how: Techniques, now: str) -> int:
        """Bytes of all weights that are on the device while the network `now` computes."""
        total = 0
        for name, weight in self.weights.items():
            network = self.networks[name]
            if how.offload == "sequential":
                total += self.of_units(network, "leaf", name == now)
            elif name == "unet" and how.offload == "group":
                total += self.of_units(network, "block", name == now, 2 if self.device == "cuda" else 1, how.store)
            elif name != now and (how.offload in ("model", "group") or how.offload_text and name == "text_encoder"
                                  and now != "text_encoder"):
                continue
            elif name == "unet" and how.store is not None:
                stay, groups = split(network)
                total += sum(v.nbytes for v in stay) + sum(stored_bytes(p) for g in groups for p in g)
                total += max(map(room, groups)) * (name == now)
            else:
                total += weight
        return total

    def of_units(self, network: nn.Module, units: str, now: bool, buffers: int = 1, store: str | None = None) -> int:
        stay, groups = split(network, units)
        staging = max((stored_bytes(p) for g in groups for p in g), default=0) if store else 0
        return sum(v.nbytes for v in stay) + now * (buffers * max(map(room, groups)) + staging)

    # Choosing --------------------------------------------------------------------------------------------------------

    def cost(self, how: Techniques) -> float:
        """An estimate of the seconds that the techniques add to a call of 50 steps."""
        w = {name: float(self.weights.get(name, 0)) for name in ("text_encoder", "unet", "vae")}
        narrow = 0.5 if how.store is not None else 1.0
        cost = {
            None: 0.0,
            "model": 2 * sum(w.values()) / PINNED,
            "group": (STEPS * narrow * w["unet"] + 2 * w["text_encoder"] + 2 * w["vae"]) / PINNED,
            "sequential": (STEPS * w["unet"] + w["text_encoder"] + w["vae"]) / PAGED,
        }[how.offload]
        cost += how.offload_text * w["text_encoder"] / PINNED
        cost += how.vae_slicing * self.video.frames * 1e-3 + how.vae_tiling * self.video.frames * 1e-2
        cost += STEPS * (how.forward_chunking * 2e-3 + how.sequential_guidance * (5e-3 + w["unet"] / DEVICE))
        return cost + (how.store is not None) * STEPS * (2 * w["unet"] / DEVICE + 2e-3) + (how.store == "fp8") * 1e-6

    def possible(self) -> Iterator[Techniques]:
        """Every useful set of techniques, the fastest first. Sets that change the result come at the end."""
        offloads = OFFLOADS if self.device == "cuda" else (None, "group", "sequential")
        stores = (None, "int8", "fp8") if "unet" in self.networks else (None,)
        bits = (False, True)
        found = [
            Techniques(text, slicing, chunking, guidance, offload, tiling, store)
            for text, slicing, chunking, guidance, offload, tiling, store in product(
                bits, bits, bits, bits, offloads, bits, stores)
            if not (text and offload) and not (store and offload == "sequential")
            and not (guidance and not self.video.guidance)
        ]  # fmt: skip
        return iter(sorted(found, key=lambda how: (not how.exact, self.cost(how))))

    def choose(self, memory: str | float) -> Plan | None:
        """The fastest plan that fits into `memory` (see `parse_memory`), or None."""
        most = parse_memory(memory)
        return next((plan for plan in map(self.plan, self.possible()) if plan.peak <= most), None)

    def least(self) -> Plan:
        """The plan that needs the least memory, of those that do not change the result."""
        return min((self.plan(how) for how in self.possible() if how.exact and how.vae_slicing), key=lambda p: p.peak)

    def rows(self) -> list[tuple[str, dict[str, int]]]:
        """(technique, peaks): first without techniques, then with each one alone."""
        alone = [Techniques(), Techniques(offload_text=True), Techniques(vae_slicing=True), Techniques(vae_tiling=True),
                 Techniques(forward_chunking=True), Techniques(sequential_guidance=True),
                 *(Techniques(offload=o) for o in OFFLOADS if o and (o != "model" or self.device == "cuda")),
                 Techniques(store="int8")]  # fmt: skip
        alone = [how for how in alone if self.video.guidance or not how.sequential_guidance]
        return [(str(how) if how != Techniques() else "as it is", self.peaks(how)) for how in alone]


class Counted(Executor):
    """The fast path on `meta`, as it would run on a device."""

    def __init__(self, network: Any, device: str):
        super().__init__(network)
        self.device, self.keeps = device, True

    def choose_ops(self, weight: Tensor) -> Ops:
        # The count is for PyTorch's operations. With Triton's kernels, less memory is needed.
        ops: Ops = Ops(weight, "torch")
        if self.device == "cpu" and weight.dtype == torch.float32:
            ops = CPUOps(weight, self.network, "torch")
            if not self.keeps:
                ops.room = 0
        return ops


class CountedUNet(Counted, UNetExecutor):
    def __init__(self, network: Any, device: str):
        UNetExecutor.__init__(self, network)
        self.device, self.keeps = device, True


class CountedVAE(Counted, VAEExecutor):
    pass


# ------------------------------------------------------------------------------------------------------------ networks


def on_meta(cls: Any, config: Any, dtype: torch.dtype) -> Any:
    with torch.device("meta"), Weightless():
        return cls.from_config(config).to(dtype).eval()


def twin(network: Any) -> Any:
    """A network on `meta` with the same class, config and settings."""
    with torch.device("meta"), Weightless():
        made = type(network).from_config(network.config).to(network.dtype).eval()
    for name in ("slicing", "tiling", "free_u"):
        if hasattr(network, name):
            setattr(made, name, getattr(network, name))
    if getattr(network, "chunking", None) is not None:
        made.set_chunking(network.chunking)
    if getattr(network, "free_noise", None) is not None:
        made.set_free_noise(network.free_noise)
    if fast.executors.get(network, made) is None:
        fast.executors[made] = None  # no fast path, as after `restore`
    return made


def planner_of(pipe: Any, video: Video, device: str | None = None) -> Planner:
    """A planner for a pipeline's networks with their present settings."""
    names = ("text_encoder", "unet", "vae")
    networks = {name: twin(unwrapped(getattr(pipe, name))) for name in names if getattr(pipe, name) is not None}
    return Planner(networks, video, device or ("cpu" if pipe._execution_device.type == "cpu" else "cuda"), type(pipe))
