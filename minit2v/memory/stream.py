"""A network's weights come to where it computes, block by block, and go again: what is there at a time is two blocks.

    stream(unet, device)                    weights stay on the CPU, or in their mapped files
    stream(unet, device, units="leaf")      layer by layer: least memory, and slow
    stream(unet, store="int8")              kept in 8 bits where it computes, and widened block by block
    unstream(unet)                          as before, to the last bit

A parameter stays what it is, with the same numbers, on the CPU; while its block computes, its data are a copy. So
saving, adapters and changes by hand see and change the parameters as ever, and what they change is copied anew. On CUDA
the next block is copied on a stream of its own while a block computes, from pinned memory. On a CPU, weights that are
mapped from a file are let go after use: only what is read again has to come from the disk again.

The blocks come in by hooks on the modules, which run in the network as it is written, and also in the fast path.
"""

import ctypes
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

from ..models.unet import UNet

logger = logging.getLogger(__name__)

UNITS = ("block", "leaf")
STORES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
ALIGNED = 256  # bytes: what CUDA's kernels like
SMALL = 2**12  # numbers: smaller parameters stay as they are in 8-bit storage

streams: "WeakKeyDictionary[nn.Module, Stream]" = WeakKeyDictionary()


def find_units(network: nn.Module, units: str = "block", per_unit: int = 1) -> list[list[nn.Module]]:
    """What comes and goes together, in the order in which x passes: modules that hold all that they read."""
    if units == "leaf":
        return [[m] for m in network.modules() if not any(m.children()) and any(True for _ in m.parameters())]
    if not isinstance(network, UNet):
        raise ValueError(f"a {type(network).__name__} has no blocks that come and go: units must be 'leaf'")
    blocks: list[nn.Module] = [] if network.temporal_in is None else [network.temporal_in]
    for part in (*network.down, network.mid, *network.up):
        blocks += part if isinstance(part, nn.ModuleList) else [*part.blocks]
        if getattr(part, "resample", None) is not None:
            blocks.append(part.resample)
    return [blocks[i : i + per_unit] for i in range(0, len(blocks), per_unit)]


def staying(network: nn.Module) -> set[int]:
    """The ids of parameters that the fast path reads outside of their blocks: of the timestep, and of the text."""
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
    """(what stays where it computes, what comes with each unit): together all parameters and buffers, each once."""
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
    """Bytes of a buffer for all of them."""
    return sum(-(-p.numel() * p.element_size() // ALIGNED) * ALIGNED for p in group)


def stored_bytes(p: Tensor) -> int:
    """Bytes of a parameter that is kept in 8 bits, with a scale for each row."""
    return p.numel() + 4 * len(p) if is_stored(p) else p.nbytes


def is_stored(p: Tensor) -> bool:
    return p.ndim > 1 and p.numel() >= SMALL and p.is_floating_point()


class Narrow:
    """A parameter in 8 bits: a scale for each row (its largest number is the format's), and the rounded rest."""

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
    """Parameters that come together, into a part of a buffer."""

    def __init__(self, owner: "Stream", modules: list[nn.Module], parameters: list[nn.Parameter]):
        self.owner, self.modules, self.parameters = owner, modules, parameters
        self.homes: list[Tensor] | None = None  # where the data are while the unit is in, to go back to
        self.ready: tuple[list[Any], list[Tensor], Any] | None = None  # what was copied of what, ahead of its time
        self.inside = 0
        self.narrow: dict[nn.Parameter, tuple[Any, Narrow]] = {}

    def state(self) -> list[Any]:
        return [mark(p) for p in self.parameters]

    def copy(self, buffer: Tensor) -> list[Tensor]:
        """The parameters' numbers in the buffer, each in the memory layout that it has."""
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
        """p in 8 bits, made anew where somebody has changed p."""
        known = self.narrow.get(p)
        if known is None or known[0] != mark(p):
            where = self.owner.device if self.owner.resident else torch.device("cpu")
            assert self.owner.store is not None
            known = self.narrow[p] = mark(p), Narrow(p.data, self.owner.store, where)
            let_go([p.data])
        return known[1]


def mark(p: nn.Parameter) -> tuple[Any, ...]:
    """What changes with a parameter's numbers, as far as PyTorch counts that."""
    data = p.data
    return data.data_ptr(), None if p.is_inference() else p._version, p.dtype, p.shape, p.stride()


class Bring:
    """A hook that brings a unit in or takes it away. The fast path knows it, and goes through the same door."""

    def __init__(self, unit: Unit | None, enters: bool):
        self.unit, self.enters = unit, enters

    def __call__(self, *_: Any) -> None:
        if self.unit is not None:
            if self.enters and torch.is_grad_enabled() and any(p.requires_grad for p in self.unit.parameters):
                raise RuntimeError("weights that come and go have no gradients: run under torch.no_grad(), or first "
                                   "disable offloading")  # fmt: skip
            (self.unit.owner.enter if self.enters else self.unit.owner.leave)(self.unit)

    def __deepcopy__(self, memo: Any) -> "Bring":
        return Bring(None, self.enters)  # a copy of a network comes without it

    def __reduce__(self) -> Any:
        return Bring, (None, self.enters)


class BringLayer(Bring):
    """On a single layer, which the fast path then calls as it is."""


@contextmanager
def held(m: nn.Module) -> Iterator[None]:
    """While the fast path runs a module's own function: what its hooks would have brought."""
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
    """One network's weights in motion."""

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
        # The same ones however they come and go; other networks than UNets have none.
        blocks = split(network)[1] if store is not None else []
        self.narrow = {id(p) for group in blocks for p in group if is_stored(p)}
        self.places = {p: (p.device, p.data) for p in network.parameters()}  # where to put it back
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
        """The n-th of two, made at the first use, and anew where the unit has grown (into another dtype)."""
        self.size = max(self.size, room(unit.parameters))
        while len(self.buffers) <= n:
            self.buffers.append(torch.empty(0, dtype=torch.uint8, device=self.device))
        if len(self.buffers[n]) < self.size:
            self.buffers[n] = torch.empty(self.size, dtype=torch.uint8, device=self.device)
        return self.buffers[n]

    @torch.inference_mode(False)
    @torch.no_grad()
    def enter(self, unit: Unit) -> None:
        """Bring the unit in, if it is not, and begin to copy the next."""
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
                torch.cuda.current_stream(self.device).wait_stream(self.side)  # which may still write there
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
        """Copy a unit on the side, into the buffer in which the one before the last is done; on a CPU, read ahead."""
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
        """Take the unit away: every parameter is again what it was. Nothing that a user put there meanwhile is lost."""
        unit.inside = max(0, unit.inside - 1)
        if unit.inside or unit.homes is None:
            return
        homes, unit.homes = unit.homes, None
        for p, home in zip(unit.parameters, homes, strict=True):
            p.data = home
        if self.device.type == "cpu" and self.store is None:
            let_go(homes)

    def close(self) -> None:
        """Everything as it was before, to the last bit, with what was changed meanwhile."""
        for hook in self.hooks:
            hook.remove()
        for unit in self.order:
            unit.inside, unit.ready = min(unit.inside, 1), None
            self.leave(unit)
        with torch.inference_mode(False), torch.no_grad():
            for p, (device, data) in self.places.items():
                before = self.pinned.get(p)
                if before is not None and before[0] == mark(p) and data.device == device and data.device.type == "cpu":
                    p.data = data  # nobody has changed it
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
    """Bring the network's weights to `device`, that of the network by default, only while they are used.

    units: "block", or "leaf" for single layers. per_unit: blocks that come together. side: on CUDA, copy the next
    while one computes; pin: from pinned memory. store: None, "fp8" (e4m3) or "int8": kept in 8 bits and widened.
    resident: the 8-bit weights stay on the device. A second call replaces the first. ValueError on what is unknown.
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
        raise ValueError("resident=True keeps 8-bit weights on the device: give store")
    if store is not None and not isinstance(network, UNet):
        raise ValueError(f"only UNets are kept in 8 bits, not a {type(network).__name__}")
    device = torch.device(device) if device is not None else next(network.parameters()).device
    unstream(network)
    streams[network] = Stream(network, device, units, per_unit, side, pin, store, resident)


def unstream(network: nn.Module) -> None:
    """Every weight where it was before `stream`, with the same numbers, and those that were changed meanwhile."""
    if (found := streams.pop(network, None)) is not None:
        found.close()


def is_streamed(network: Any) -> bool:
    return isinstance(network, nn.Module) and network in streams


# ------------------------------------------------------------------------------------------------------- mapped files

PAGEOUT = 21  # MADV_PAGEOUT of Linux 5.4: nothing is lost by it, also not what was written into a private page


def let_go(tensors: Sequence[Tensor]) -> None:
    """Give the pages of mapped files back to the system, where it has a call for that. They are read again on use."""
    advise(tensors, PAGEOUT if sys.platform.startswith("linux") else None)


def advise(tensors: Sequence[Tensor], what: int | None) -> None:
    """Tell the system what becomes of the pages of those that are mapped from files; None: it has no word for it."""
    if what is None or not sys.platform.startswith("linux"):
        return
    libc, spans = ctypes.CDLL(None), mapped_spans()
    for x in tensors:
        if x.device.type == "cpu" and x.is_contiguous() and x.nbytes >= mmap.PAGESIZE:
            begin, end = x.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, x.data_ptr() + x.nbytes
            if any(a <= begin and end <= b for a, b in spans):
                libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), what)


def mapped_spans() -> list[tuple[int, int]]:
    """The addresses of this process that are mapped from files, without those that run."""
    spans = []
    with open("/proc/self/maps") as lines:
        for line in lines:
            place, rights, _, _, inode, *_ = line.split(maxsplit=5)
            if inode != "0" and "x" not in rights:
                spans.append(tuple(int(end, 16) for end in place.split("-")))
    return spans
