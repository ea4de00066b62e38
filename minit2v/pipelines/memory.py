"""A pipeline with less memory: offloading, plans, and the messages for videos that do not fit.

docs/memory.md says what each technique saves and costs.
"""

import inspect
import logging
import os
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minit2v_convert.rename import nearest

from ..memory.heap import return_freed_memory
from ..memory.stream import STORES, is_streamed, let_go, stream, streams, unstream
from .checks import check_count, check_size, unwrapped

if TYPE_CHECKING:
    from ..memory.plan import Plan, Planner, Techniques, Video

logger = logging.getLogger(__name__)

ROUGH = 32  # a step needs about this many times the largest layer's output, in addition to the weights
SPARE = 0.95  # the usable share of memory; the allocator needs the rest


@dataclass
class Offload:
    """How a pipeline's networks are offloaded."""

    to: torch.device  # the device that computes
    kind: str  # "model", "group", "sequential"
    before: dict[str, torch.device] = field(default_factory=dict)  # where each network was
    units: str = "block"
    per_unit: int = 1
    side: bool = True
    pin: bool = True
    staying: tuple[str, ...] = ()  # the networks that stay on the device


def find_device(gpu_id: int | None, device: Any) -> torch.device | None:
    """The accelerator, or the given device. Raises ValueError if the two arguments contradict each other."""
    if device is None and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    if device is None:
        return None
    device = torch.device(device)
    if gpu_id is not None and device.index not in (None, gpu_id):
        raise ValueError(f"gpu_id={gpu_id} contradicts device={str(device)!r}")
    return torch.device(device.type, gpu_id) if gpu_id is not None else device


def say_nothing_is_offloaded() -> None:
    logger.warning("No accelerator was found, so nothing is offloaded: the pipeline runs on the CPU.")


def begin(pipe: Any, offload: Offload) -> None:
    """Offload the networks in this way, instead of the present one."""
    end(pipe)
    offload.before = {name: network.device for name, network in pipe._networks.items() if name not in pipe.IDLE}
    pipe._offload = offload
    for name in offload.before:
        network = unwrapped(getattr(pipe, name))
        if name in offload.staying:
            network.to(offload.to)
        elif offload.kind == "model" or offload.kind == "group" and name != "unet":
            network.to("cpu")
        elif name != "unet":
            stream(network, offload.to, units="leaf", side=False, pin=False)
    settle(pipe)


def end(pipe: Any) -> None:
    """Stop offloading: every network goes back to where it was."""
    offload, pipe._offload = pipe._offload, None
    if offload is None:
        return
    for name, device in offload.before.items():
        if (network := unwrapped(getattr(pipe, name))) is not None:
            unstream(network)
            network.to(device)
    settle(pipe)


def settle(pipe: Any) -> None:
    """Apply both settings to the UNet's weights: offloading, and 8-bit storage."""
    unet, offload, store = unwrapped(pipe.unet), pipe._offload, pipe._narrow
    if unet is None:
        return
    moves = offload is not None and offload.kind != "model" and "unet" not in offload.staying
    if moves:
        assert offload is not None
        stream(unet, offload.to, units=offload.units, per_unit=offload.per_unit, side=offload.side, pin=offload.pin,
               store=store)
    elif store is not None:
        stream(unet, offload.to if offload is not None else unet.device, side=False, store=store, resident=True)
    else:
        unstream(unet)


def set_narrow(pipe: Any, store: str | None) -> None:
    if store is not None and store not in STORES:
        raise ValueError(f"store must be one of {', '.join(STORES)}, not {store!r}{nearest(str(store), [*STORES])}")
    if pipe.unet is None:
        raise ValueError("this needs the pipeline's unet, which is None")
    pipe._narrow = store
    settle(pipe)


def group_offload(
    onload_device: Any, offload_device: Any, offload_type: str, num_blocks_per_group: int | None, use_stream: bool,
    low_cpu_mem_usage: bool, offload_to_disk_path: Any, exclude_modules: str | Iterable[str] | None,
    known: Iterable[str],
) -> Offload:
    """Checks the arguments of `enable_group_offload`."""
    if torch.device(offload_device).type != "cpu":
        raise ValueError(f"offload_device must be the CPU, not {offload_device}")
    types = {"block_level": "block", "leaf_level": "leaf"}
    if offload_type not in types:
        raise ValueError(f"offload_type must be one of {', '.join(types)}, not {offload_type!r}"
                         f"{nearest(str(offload_type), [*types])}")
    if num_blocks_per_group is not None:
        check_count("num_blocks_per_group", num_blocks_per_group)
    if offload_to_disk_path is not None:
        raise ValueError("offload_to_disk_path must be None: weights are memory-mapped and need no copy on the disk")
    staying = (exclude_modules,) if isinstance(exclude_modules, str) else tuple(exclude_modules or ())
    for name in staying:
        if name not in known:
            raise ValueError(f"exclude_modules: this pipeline has no {name!r}{nearest(name, list(known))}")
    device = find_device(None, onload_device) or torch.device("cpu")
    kind = "group" if offload_type == "block_level" else "sequential"
    return Offload(device, kind, units=types[offload_type], per_unit=int(num_blocks_per_group or 1), side=use_stream,
                   pin=use_stream and not low_cpu_mem_usage, staying=staying)


@contextmanager
def placed(pipe: Any, name: str) -> Iterator[Any]:
    """The component, on the device that computes, while the `with` block runs."""
    component, offload = getattr(pipe, name), pipe._offload
    if component is None:
        raise ValueError(f"this needs the pipeline's {name}, which is None")
    freed = pipe._offload_text and name == "text_encoder"
    stays = offload is None or name in offload.staying
    if is_streamed(unwrapped(component)):
        try:
            yield component
        finally:  # the next network needs the memory of the buffers
            streams[unwrapped(component)].buffers.clear()
        return
    if stays and not freed:
        yield component
        return
    to = pipe._execution_device
    try:
        yield component.to(to)
    finally:
        component.to("cpu")
        let_go([p.data for p in component.parameters()])


def own(pipe: Any) -> set[int]:
    """The ids of offloaded networks, which no other call may use at the same time."""
    networks = {name: unwrapped(n) for name, n in pipe._networks.items()}
    return {id(n) for name, n in networks.items() if pipe._offload is not None or is_streamed(n)
            or pipe._offload_text and name == "text_encoder"}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- plans


def set_up(pipe: Any, plan: "Plan") -> None:
    """Turn the plan's techniques on. Other settings of the user do not change."""
    how = plan.techniques
    device = pipe._execution_device if pipe._execution_device.type != "cpu" else None
    pipe.disable_offload()
    pipe.disable_text_offload()
    on_cpu = pipe.device.type == "cpu" and device is None
    if how.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif how.offload == "group":
        pipe.enable_group_offload("cpu" if on_cpu else device, use_stream=True)
    elif how.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device="cpu" if on_cpu else device)
    if how.offload_text:
        pipe.enable_text_offload()
    if how.vae_slicing:
        pipe.enable_vae_slicing()
    if how.vae_tiling:
        pipe.enable_vae_tiling()
    if how.forward_chunking:
        pipe.unet.enable_forward_chunking(plan.chunk)
    if how.sequential_guidance:
        pipe.enable_sequential_guidance()
    pipe.disable_narrow_weights() if how.store is None else pipe.enable_narrow_weights(how.store)


def plan_for(
    pipe: Any, memory: str | float | None, frames: int, height: int | None, width: int | None,
    videos: int, guidance: bool, chunk: int | None,
) -> "Plan":
    """`DiffusionPipeline.plan`."""
    from ..memory.plan import parse_memory, planner_of

    for name in ("unet", "vae"):
        if getattr(pipe, name) is None:
            raise ValueError(f"to plan a video, the pipeline needs its {name}, which is None")
    check_count("num_frames", frames)
    check_count("num_videos", videos)
    height, width = check_size(height, width, pipe.unet, pipe.vae_scale_factor)
    most = int(SPARE * available(pipe._execution_device)) if memory is None else parse_memory(memory)
    factor = pipe.vae_scale_factor
    video = video_of(pipe, (videos, 0, frames, height // factor, width // factor), guidance,
                     "strength" in inspect.signature(pipe.__call__).parameters, chunk)
    planner = planner_of(pipe, video)
    if (plan := planner.choose(most)) is None:
        raise ValueError(f"{video} does not fit into {gib(most)}: the least memory is {planner.least()}")
    set_up(pipe, plan)
    if memory is not None and pipe._execution_device.type == "cpu":
        return_freed_memory()
    return plan


def current(pipe: Any) -> "Techniques":
    """The techniques that are on."""
    from ..memory.plan import Techniques

    vae, unet = unwrapped(pipe.vae), unwrapped(pipe.unet)
    return Techniques(
        offload_text=pipe._offload_text,
        vae_slicing=vae is not None and vae.slicing,
        vae_tiling=vae is not None and vae.tiling is not None,
        forward_chunking=unet is not None and unet.chunking is not None,
        sequential_guidance=pipe._sequential_guidance,
        offload=None if pipe._offload is None else pipe._offload.kind,
        store=pipe._narrow,
    )


def video_of(
    pipe: Any, shape: Iterable[int], guidance: bool, encodes: bool, chunk: int | None
) -> "Video":
    """The video with latents of this shape (b c f h w)."""
    from ..memory.plan import Video

    b, _, f, h, w = shape
    factor, windows = pipe.vae_scale_factor, pipe._windows
    chunk = chunk or inspect.signature(pipe.__call__).parameters["decode_chunk_size"].default
    return Video(f, h * factor, w * factor, b, guidance, None if windows is None else windows.length, chunk, encodes)


def available(device: torch.device) -> int:
    """Bytes that the pipeline can have on the device, including those that it uses now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**62


def foresee(pipe: Any, x: Tensor, guidance: bool) -> None:
    """On CUDA, before the work: warns if the rest of the call will not fit, and names a plan that fits."""
    if x.device.type != "cuda":
        return
    unet = unwrapped(pipe.unet)
    frames = min(x.shape[2], pipe._windows.length) if pipe._windows is not None else x.shape[2]
    layer = x[0, 0, 0].numel() * frames * len(x) * (1 + guidance) * unet.config.block_out_channels[0]
    weights = sum(p.nbytes for n in pipe._networks.values() for p in n.parameters())
    if weights + ROUGH * layer * unet.dtype.itemsize < 0.7 * available(x.device):
        return  # counting takes seconds
    from ..memory.plan import planner_of

    planner, room = planner_of(pipe, pipe._making), available(x.device)
    needed = planner.plan(current(pipe)).peak
    if needed > SPARE * room:
        logger.warning("%s needs %s, but %s has %s: %s", pipe._making, gib(needed), x.device, gib(room),
                       advice(planner, int(SPARE * room)))  # fmt: skip


def advice(planner: "Planner", most: int) -> str:
    """The plan that fits into `most` bytes, or the one that needs the least."""
    if (best := planner.choose(max(1, most))) is not None:
        return f"it fits in {best}"
    return f"no plan fits. The least memory is {planner.least()}. Fewer frames or a smaller size need less"


def gib(n: int) -> str:
    return f"{n / 2**30:.2f} GiB"


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def explained(pipe: Any, error: BaseException) -> torch.OutOfMemoryError:
    """The error, with a plan that fits. It also frees the memory of the failed call."""
    from ..memory.plan import planner_of

    traceback.clear_frames(error.__traceback__)
    device = pipe._execution_device
    if device.type == "cuda":
        torch.cuda.empty_cache()
    why = " ".join(str(error).split(". ")[0].split())
    if pipe._making is None:
        return torch.OutOfMemoryError("out of memory before the first step: pipe.plan(memory=...) says what fits "
                                      f"({why})")
    planner = planner_of(pipe, pipe._making)
    how = planner.plan(current(pipe))
    most = min(int(SPARE * available(device)), int(SPARE * how.peak))  # it did not fit, even if the count was lower
    return torch.OutOfMemoryError(f"out of memory: {pipe._making} needs {gib(how.peak)} with {how.techniques}; "
                                  f"{advice(planner, most)} ({why})")
