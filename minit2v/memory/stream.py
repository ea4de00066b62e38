"""Offloading: the weights of a network are on the device only while they are used, two blocks at a time.

    stream(unet, device)                    weights stay on the CPU, or in their memory-mapped files
    stream(unet, device, units="leaf")      layer by layer: the least memory, but slow
    stream(unet, store="int8")              weights stay on the CPU in 8 bits, and are widened block by block
    unstream(unet)                          as before, to the last bit

The parameters stay on the CPU with the same numbers. While a block computes, their `data` are copies on the device. So
saving, adapters and changes by hand work as usual, and a changed parameter is copied again. On CUDA the next block is
copied from pinned memory, on another CUDA stream, while a block computes. On a CPU, the pages of memory-mapped weights
are freed after use. The system reads them from the disk again if it has to.

Hooks on the modules bring the blocks to the device. They run in the plain network and in the fast path.
"""

import logging
import mmap
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from minit2v_convert.rename import nearest
from minit2v_kernels import cpu as kernels

from ..models.unet import UNet

logger = logging.getLogger(__name__)

UNITS = ("block", "leaf")
STORES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
ALIGNED = 256  # bytes; CUDA's kernels are faster with aligned tensors
SMALL = 2**12  # parameters with fewer numbers are not stored in 8 bits

streams: "WeakKeyDictionary[nn.Module, Stream]" = WeakKeyDictionary()


def find_units(network: nn.Module, units: str = "block", per_unit: int = 1) -> list[list[nn.Module]]:
    """Groups of modules that are offloaded together, in the order in which x passes them.

    Raises ValueError if units are blocks and the network is not a UNet.
    """
    if units == "leaf":
        return [[m] for m in network.modules() if not any(m.children()) and any(True for _ in m.parameters())]
    if not isinstance(network, UNet):
        raise ValueError(f"a {type(network).__name__} cannot be offloaded block by block: units must be 'leaf'")
    blocks: list[nn.Module] = [] if network.temporal_in is None else [network.temporal_in]
    for part in (*network.down, network.mid, *network.up):
        blocks += part if isinstance(part, nn.ModuleList) else [*part.blocks]
        if getattr(part, "resample", None) is not None:
            blocks.append(part.resample)
    return [blocks[i : i + per_unit] for i in range(0, len(blocks), per_unit)]


def staying(network: nn.Module) -> set[int]:
    """The ids of parameters that the fast path reads outside of their blocks: those for timestep and text."""
    if not isinstance(network, UNet):
        return set()
    found = []
    for block in network.blocks():
        for m in block.modules():
            name = type(m).__name__
            if name == "ResBlock":
                found += [*m.emb.parameters(), m.conv1.bias]
            if name == "TransformerBlock":
                found += [m.attn2.to_k.weight, m.attn2.to_v.weight]
    return set(map(id, found))


def split(network: nn.Module, units: str = "block", per_unit: int = 1) -> tuple[list[Tensor], list[list[nn.Parameter]]]:
    """(what stays on the device, what comes with each unit): together all parameters and buffers, each once."""
    seen = staying(network) if units == "block" else set()
    groups: list[list[nn.Parameter]] = []
    for unit in find_units(network, units, per_unit):
        group: list[nn.Parameter] = []
        for p in (p for m in unit for p in m.parameters()):
            if id(p) not in seen:
                seen.add(id(p))
                group.append(p)
        groups.append(group)
    moving = {id(p) for group in groups for p in group}
    return [v for v in (*network.parameters(), *network.buffers()) if id(v) not in moving], groups


def room(group: Sequence[Tensor]) -> int:
    """Bytes of a buffer for all these tensors."""
    return sum(-(-p.numel() * p.element_size() // ALIGNED) * ALIGNED for p in group)


def stored_bytes(p: Tensor) -> int:
    """Bytes of a parameter in 8-bit storage, with one scale for each row."""
    return p.numel() + 4 * len(p) if is_stored(p) else p.nbytes


def is_stored(p: Tensor) -> bool:
    return p.ndim > 1 and p.numel() >= SMALL and p.is_floating_point()


class Narrow:
    """A parameter in 8 bits: p = scale * values, rounded. Each row has its own scale, from its largest number."""

    def __init__(self, p: Tensor, store: str, device: torch.device):
        wide = p.detach().to(device, torch.float32)
        most = 127.0 if store == "int8" else torch.finfo(STORES[store]).max
        scale = wide.flatten(1).abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / most
        self.scale = scale.view(-1, *[1] * (p.ndim - 1))
        wide = wide / self.scale
        self.values = (wide.round() if store == "int8" else wide).clamp(-most, most).to(STORES[store])

    def widen_into(self, y: Tensor) -> None:
        values, scale = self.values.to(y.device, non_blocking=True), self.scale.to(y.device, non_blocking=True)
        y.copy_(values).mul_(scale.to(y.dtype) if y.dtype.itemsize > 2 else scale)


class Unit:
    """Parameters that are copied to the device together, into one buffer."""

    def __init__(self, owner: "Stream", modules: list[nn.Module], parameters: list[nn.Parameter]):
        self.owner, self.modules, self.parameters = owner, modules, parameters
        self.homes: list[Tensor] | None = None  # the original data, while the unit is on the device
        self.ready: tuple[list[Any], list[Tensor], Any] | None = None  # (state, copies, event) of a copy made early
        self.inside = 0
        self.narrow: dict[nn.Parameter, tuple[Any, Narrow]] = {}

    def state(self) -> list[Any]:
        return [mark(p) for p in self.parameters]

    def copy(self, buffer: Tensor) -> list[Tensor]:
        """Copies the parameters into the buffer. Each keeps its memory layout."""
        views, at = [], 0
        for p in self.parameters:
            n = p.numel() * p.element_size()
            flat = buffer[at : at + n].view(p.dtype)
            dense = p.is_contiguous() or p.numel() == sum(
                (size - 1) * step for size, step in zip(p.shape, p.stride(), strict=True)) + 1  # fmt: skip
            view = flat.as_strided(p.shape, p.stride()) if dense else flat.view(p.shape)
            if id(p) in self.owner.narrow:
                self.stored(p).widen_into(view)
            else:
                view.copy_(p.data, non_blocking=self.owner.side is not None)
            views.append(view)
            at += -(-n // ALIGNED) * ALIGNED
        return views

    def stored(self, p: nn.Parameter) -> Narrow:
        """p in 8 bits. It is computed again if p has changed."""
        known = self.narrow.get(p)
        if known is None or known[0] != mark(p):
            where = self.owner.device if self.owner.resident else torch.device("cpu")
            assert self.owner.store is not None
            known = self.narrow[p] = mark(p), Narrow(p.data, self.owner.store, where)
            let_go([p.data])
        return known[1]


def mark(p: nn.Parameter) -> tuple[Any, ...]:
    """A value that changes when the parameter changes, as far as PyTorch counts changes."""
    data = p.data
    return data.data_ptr(), None if p.is_inference() else p._version, p.dtype, p.shape, p.stride()


class Bring:
    """A hook that brings a unit to the device or takes it away. The fast path knows and calls it, too."""

    def __init__(self, unit: Unit | None, enters: bool):
        self.unit, self.enters = unit, enters

    def __call__(self, *_: Any) -> None:
        if self.unit is not None:
            if self.enters and torch.is_grad_enabled() and any(p.requires_grad for p in self.unit.parameters):
                raise RuntimeError("offloaded weights cannot have gradients: run under torch.no_grad(), or disable "
                                   "offloading first")  # fmt: skip
            (self.unit.owner.enter if self.enters else self.unit.owner.leave)(self.unit)

    def __deepcopy__(self, memo: Any) -> "Bring":
        return Bring(None, self.enters)  # a copy of a network is not offloaded

    def __reduce__(self) -> Any:
        return Bring, (None, self.enters)


class BringLayer(Bring):
    """The hook of a single layer. The fast path calls such a layer as a module."""


@contextmanager
def held(m: nn.Module) -> Iterator[None]:
    """Runs the hooks of a module around a function of the fast path that replaces it."""
    if not m._forward_pre_hooks:
        yield
        return
    for hook in [*m._forward_pre_hooks.values()]:
        hook(m, ())
    try:
        yield
    finally:
        for hook in [*m._forward_hooks.values()]:
            hook(m, (), None)


class Stream:
    """The offloading of one network."""

    @torch.no_grad()
    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        units: str,
        per_unit: int,
        side: bool,
        pin: bool,
        store: str | None,
        resident: bool,
    ):
        self.network, self.device, self.units, self.store, self.resident = network, device, units, store, resident
        self.settings = dict(
            device=device, units=units, per_unit=per_unit, side=side, pin=pin, store=store, resident=resident
        )
        cuda = device.type == "cuda"
        self.side = torch.cuda.Stream(device) if cuda and side else None
        stay, groups = split(network, units, per_unit)
        # The stored parameters do not depend on `units`. Only UNets have some.
        blocks = split(network)[1] if store is not None else []
        self.narrow = {id(p) for group in blocks for p in group if is_stored(p)}
        self.places = {p: (p.device, p.data) for p in network.parameters()}  # (device, data) to restore
        self.buffers_at = {b: b.device for b in network.buffers()}
        self.pinned: dict[nn.Parameter, tuple[Any, Tensor]] = {}
        modules = find_units(network, units, per_unit)
        self.order = [Unit(self, m, g) for m, g in zip(modules, groups, strict=True) if g]
        for value in stay:
            value.data = value.data.to(device)
        for p in (p for unit in self.order for p in unit.parameters):
            original = p.data
            if cuda:
                p.data = p.data.cpu()
            if cuda and pin and not resident:
                p.data = p.data.pin_memory()
            self.pinned[p] = mark(p), original if original.device.type == "cpu" else p.data
        if store is not None:
            for unit in self.order:
                for p in unit.parameters:
                    if id(p) in self.narrow:
                        unit.stored(p)
        self.size = max(room(unit.parameters) for unit in self.order)
        self.buffers: list[Tensor] = []
        self.hooks = []
        kind = BringLayer if units == "leaf" else Bring
        for unit in self.order:
            for m in unit.modules:
                self.hooks += [
                    m.register_forward_pre_hook(kind(unit, True), prepend=True),
                    m.register_forward_hook(kind(unit, False), always_call=True),
                ]

    def buffer(self, n: int, unit: Unit) -> Tensor:
        """The n-th of two buffers. It grows if the unit has grown (with another dtype)."""
        self.size = max(self.size, room(unit.parameters))
        while len(self.buffers) <= n:
            self.buffers.append(torch.empty(0, dtype=torch.uint8, device=self.device))
        if len(self.buffers[n]) < self.size:
            self.buffers[n] = torch.empty(self.size, dtype=torch.uint8, device=self.device)
        return self.buffers[n]

    @torch.inference_mode(False)
    @torch.no_grad()
    def enter(self, unit: Unit) -> None:
        """Brings the unit to the device, and begins to copy the next one."""
        unit.inside += 1
        if unit.inside > 1:
            return
        try:
            n = self.order.index(unit)
            ready, unit.ready = unit.ready, None
            if ready is not None and ready[0] == unit.state():
                views = ready[1]
                torch.cuda.current_stream(self.device).wait_event(ready[2])
            elif self.side is not None:
                torch.cuda.current_stream(self.device).wait_stream(self.side)  # it may still write to the buffer
                views = unit.copy(self.buffer(n % 2, unit))
            else:
                views = unit.copy(self.buffer(0, unit))
            unit.homes = [p.data for p in unit.parameters]
            for p, view in zip(unit.parameters, views, strict=True):
                p.data = view
            if n + 1 < len(self.order):
                self.begin(self.order[n + 1], n + 1)
        except BaseException:
            unit.inside = 0
            raise

    def begin(self, unit: Unit, n: int) -> None:
        """Copies a unit early: on CUDA on the other stream, into the free buffer; on a CPU, reads files ahead."""
        if self.side is None:
            if self.device.type == "cpu" and self.store is None:
                advise(unit.parameters, mmap.MADV_WILLNEED if hasattr(mmap, "MADV_WILLNEED") else None)
            return
        if unit.ready is not None or unit.inside:
            return
        buffer = self.buffer(n % 2, unit)
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            state, views = unit.state(), unit.copy(buffer)
            done = torch.cuda.Event()
            done.record(self.side)
        unit.ready = state, views, done

    def leave(self, unit: Unit) -> None:
        """Takes the unit away from the device: every parameter gets its original data again."""
        unit.inside = max(0, unit.inside - 1)
        if unit.inside or unit.homes is None:
            return
        homes, unit.homes = unit.homes, None
        for p, home in zip(unit.parameters, homes, strict=True):
            p.data = home
        if self.device.type == "cpu" and self.store is None:
            let_go(homes)

    def close(self) -> None:
        """Restores the network to the last bit. Changes that were made meanwhile are kept."""
        for hook in self.hooks:
            hook.remove()
        for unit in self.order:
            unit.inside, unit.ready = min(unit.inside, 1), None
            self.leave(unit)
        with torch.inference_mode(False), torch.no_grad():
            for p, (device, data) in self.places.items():
                before = self.pinned.get(p)
                if before is not None and before[0] == mark(p) and data.device == device and data.device.type == "cpu":
                    p.data = data  # it has not changed
                elif before is not None and p.data.is_pinned() and device.type == "cpu":
                    p.data = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype).copy_(p.data)
                elif p.device != device:
                    p.data = p.data.to(device)
            for b, device in self.buffers_at.items():
                b.data = b.data.to(device)
        self.buffers.clear()


def stream(
    network: nn.Module,
    device: torch.device | str | None = None,
    *,
    units: str = "block",
    per_unit: int = 1,
    side: bool = True,
    pin: bool = True,
    store: str | None = None,
    resident: bool = False,
) -> None:
    """Keeps the network's weights on `device` only while they are used. A second call replaces the first.

    device: the device that computes, by default the network's.
    units: "block", or "leaf" for single layers. per_unit: number of blocks that are copied together.
    side: on CUDA, copy the next blocks while one computes. pin: on CUDA, keep the weights in pinned memory.
    store: "fp8" (e4m3) or "int8" keeps the weights in 8 bits; None in their dtype.
    resident: keep the 8-bit weights on the device.
    Raises ValueError if an argument has an unknown value, or if arguments contradict each other.
    """
    for name, value, known in (("units", units, UNITS), ("store", store, (None, *STORES))):
        if value not in known:
            raise ValueError(
                f"{name} must be one of {', '.join(map(str, known))}, not {value!r}"
                f"{nearest(str(value), list(map(str, known)))}"
            )
    if not isinstance(per_unit, int) or per_unit < 1:
        raise ValueError(f"per_unit must be a positive integer, not {per_unit!r}")
    if resident and store is None:
        raise ValueError('resident=True is for 8-bit weights: give store="int8" or "fp8"')
    if store is not None and not isinstance(network, UNet):
        raise ValueError(f"only UNets can be stored in 8 bits, not a {type(network).__name__}")
    device = torch.device(device) if device is not None else next(network.parameters()).device
    unstream(network)
    streams[network] = Stream(network, device, units, per_unit, side, pin, store, resident)


def unstream(network: nn.Module) -> None:
    """Ends the offloading of a network. All weights are where they were before `stream`, with later changes."""
    if (found := streams.pop(network, None)) is not None:
        found.close()


def is_streamed(network: Any) -> bool:
    return isinstance(network, nn.Module) and network in streams


# ------------------------------------------------------------------------------------------------------- mapped files

PAGEOUT = 21  # MADV_PAGEOUT of Linux 5.4; it loses no data, not even changed private pages


def let_go(tensors: Sequence[Tensor]) -> None:
    """Frees the pages of memory-mapped files, if the system has a call for that. They are read again when used."""
    advise(tensors, PAGEOUT if sys.platform.startswith("linux") else None)


def advise(tensors: Sequence[Tensor], what: int | None) -> None:
    """Calls madvise(what) for tensors that are memory-mapped from files. None: the system has no such call."""
    if what is None or not sys.platform.startswith("linux"):
        return
    large = [x for x in tensors if x.device.type == "cpu" and x.is_contiguous() and x.nbytes >= mmap.PAGESIZE]
    if not large:
        return  # to read the list of mapped files takes a millisecond
    spans = mapped_spans()
    for x in large:
        begin, end = x.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, x.data_ptr() + x.nbytes
        if any(a <= begin and end <= b for a, b in spans):
            kernels.madvise()(begin, end - begin, what)


def mapped_spans() -> list[tuple[int, int]]:
    """The address ranges of this process that are mapped from files, without program code."""
    spans = []
    with open("/proc/self/maps") as lines:
        for line in lines:
            place, rights, _, _, inode, *_ = line.split(maxsplit=5)
            if inode != "0" and "x" not in rights:
                spans.append(tuple(int(end, 16) for end in place.split("-")))
    return spans
