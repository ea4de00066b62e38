"""The operations of cpu.cpp: float32 on a CPU. A C++ compiler makes them for this processor at their first use.

That takes a few seconds. The result is kept in the user's cache folder, so it happens once per machine.
"""

import ctypes
import hashlib
import logging
import mmap
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("minit2v.kernels")  # below minit2v, whose warnings the command line prints in its way

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ("-O3", "-std=c++17", "-march=native", "-fopenmp", "-fPIC", "-shared")
LANES = 16  # channels must be a multiple of it
MOST_FRAMES = 64  # of `frame_attention`
TILES = 64  # of Winograd's method, at a time in each thread: their numbers fit into its caches
MOST_TAPS = 9  # numbers of a kernel of `conv`
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # of Linux's madvise(2)
LARGE = 4 * 2**20  # bytes: in this size there is at least one whole page of 2 MiB
SIZE, POINTER, INT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
ARGUMENTS = {
    "ask_for_matrix_units": (),
    "linear": (POINTER, SIZE, POINTER, SIZE, SIZE, POINTER, POINTER, POINTER, INT),
    "conv": (POINTER, SIZE, SIZE * 2, SIZE, POINTER, SIZE, *[SIZE * 2] * 4, POINTER, POINTER, POINTER, INT),
    "winograd": (POINTER, *[SIZE] * 4, POINTER, SIZE, POINTER, POINTER, INT, SIZE, POINTER, INT),
    "transform_weight": (POINTER, SIZE, SIZE, POINTER, INT, INT),
    "group_norm": (POINTER, *[SIZE] * 5, POINTER, POINTER, ctypes.c_float, INT, POINTER, INT),
    "geglu": (POINTER, POINTER, SIZE, SIZE, POINTER, INT),
    "layer_norm": (POINTER, POINTER, SIZE, SIZE, POINTER, POINTER, ctypes.c_float, POINTER, SIZE, SIZE, POINTER, INT),
    "frame_attention": (*[POINTER, SIZE * 5] * 3, *[SIZE] * 5, POINTER, INT),
}  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """The compiled operations. None if there is no C++ compiler, or if it fails, which is logged."""
    found = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
    compiler = shlex.split(os.environ.get("CXX", "")) or found[:1]
    if not compiler or sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    command = [*compiler, *FLAGS, str(SOURCE)]
    try:
        loaded = ctypes.CDLL(str(compiled(command)))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or "").strip() or str(error)
        logger.warning("The kernels for the CPU could not be compiled, so PyTorch's operators run. %s: %s",
                       shlex.join(command), said.splitlines()[0])  # fmt: skip
        return None
    for name, types in ARGUMENTS.items():
        if function := getattr(loaded, name, None):  # those for matrix units are only there if the processor has them
            function.argtypes = types
            function.restype = INT if name == "ask_for_matrix_units" else None
    loaded.has_matrix_units = bool(loaded.ask_for_matrix_units())
    return loaded


def compiled(command: list[str]) -> Path:
    """Where the library is. It is compiled if it does not exist for this source, compiler and processor."""
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, timeout=60).stdout
    of = [SOURCE.read_text(), *command, version]
    cpuinfo = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    of += [line for line in cpuinfo if line.startswith(("model name", "flags"))][:2]
    name = f"cpu-{hashlib.sha256(chr(0).join(of).encode()).hexdigest()[:16]}.so"
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minit2v"
        if (cache / name).is_file():
            return cache / name
        cache.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=".compiling-", dir=cache)
    except (OSError, RuntimeError):  # nothing can be kept there, or the user has no home
        cache = Path(tempfile.mkdtemp(prefix="minit2v-"))
        folder = tempfile.mkdtemp(dir=cache)
    logger.info("Compiling kernels for this CPU: a few seconds, once.")
    try:
        made = Path(folder) / name
        subprocess.run([*command, "-o", str(made)], check=True, capture_output=True, text=True, timeout=300)
        os.replace(made, cache / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return cache / name


@cache
def madvise() -> Callable[[int, int, int], int]:
    """madvise(2) of Linux: address, bytes, advice."""
    function = ctypes.CDLL(None).madvise
    function.argtypes = POINTER, ctypes.c_size_t, INT
    return function


def use_huge_pages(first: int, end: int, now: bool = False) -> None:
    """From now on, the memory between two addresses gets pages of 2 MiB where Linux allows it, if it is large.

    A processor looks up each page in a table, which takes time: most in a virtual machine. now: moves what is in
    pages of 4 KiB. Values and addresses stay. Nothing happens before Linux 6.1 (now), or where
    /sys/kernel/mm/transparent_hugepage/enabled says "never".
    """
    page = mmap.PAGESIZE
    first, end = -(-first // page) * page, end // page * page
    if sys.platform == "linux" and end - first >= LARGE:
        madvise()(first, end - first, MADV_HUGEPAGE)
        if now:
            madvise()(first, end - first, MADV_COLLAPSE)


def has_matrix_units() -> bool:
    """Whether `linear`, `conv` and `winograd` compute with this processor's matrix units (AMX)."""
    loaded = library()
    return loaded is not None and loaded.has_matrix_units


def empty(x: Tensor, size: tuple[int, ...] | torch.Size, channels_last: bool = False) -> Tensor:
    """New memory on the device of x, in huge pages if it is large."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
    if x.is_cpu and y.nbytes >= LARGE:
        use_huge_pages(y.data_ptr(), y.data_ptr() + y.nbytes)
    return y


def run(name: str, x: Tensor, *arguments: Any) -> None:
    """Calls the operation. Not on `meta`, where only memory is counted.

    Raises ValueError if a tensor is not of float32 on the CPU.
    """
    if x.is_meta:
        return
    places = []
    for value in (x, *arguments):
        if isinstance(value, Tensor):
            if value.dtype is not torch.float32 or not value.is_cpu:
                raise ValueError(f"these kernels read float32 on the CPU, not {value.dtype} on {value.device}")
            value = value.data_ptr()
        places.append(value)
    getattr(library(), name)(*places, torch.get_num_threads())


def fit(wanted: tuple[int, ...], **tensors: Tensor | None) -> None:
    """Raises ValueError for a tensor of another shape: the kernels would read memory that is not its own."""
    for name, x in tensors.items():
        if x is not None and x.shape != wanted:
            raise ValueError(f"the {name} has the shape {tuple(x.shape)}, not {tuple(wanted)}")


def dense(x: Tensor | None) -> Tensor | None:
    """x without gaps between its numbers."""
    return None if x is None else x.contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """x (... k), weight (n k), both contiguous, bias (n), residual (... n) -> x weight' + bias + residual (... n)."""
    n, k = weight.shape
    y = empty(x, (*x.shape[:-1], n))
    if x.shape[-1] != k:
        raise ValueError(f"a product with weights of {(n, k)} cannot read x of {tuple(x.shape)}")
    fit((n,), bias=bias)
    fit(y.shape, residual=residual)
    run("linear", x, x.numel() // k, weight, n, k, dense(bias), dense(residual), y)
    return y


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...],
    residual: Tensor | None = None,
) -> Tensor:
    """A convolution plus the residual, with matrix units: x (n c h w) -> (n o h' w'). Images are channels-last.

    weight (o c kh kw), contiguous; at most 9 numbers for each pair of channels.
    Raises ValueError for sizes that do not fit each other.
    """
    (o, c, *kernel), (n, channels, *size) = weight.shape, x.shape
    result = [(p + 2 * q - k) // s + 1 for p, q, k, s in zip(size, padding, kernel, stride, strict=True)]
    if c != channels or min(result) < 1:
        raise ValueError(f"a convolution with weights of {(o, c, *kernel)} cannot read x of {(n, channels, *size)}")
    y = empty(x, (n, o, *result), channels_last=True)
    fit((o,), bias=bias)
    fit(y.shape, residual=residual)
    size, kernel, stride, padding, result = ((SIZE * 2)(*pair) for pair in (size, kernel, stride, padding, result))
    run("conv", x, n, size, c, weight, o, kernel, stride, padding, result, dense(bias), residual, y)
    return y


def transform(weight: Tensor, doubled: bool) -> Tensor:
    """weight (o c 3 3), contiguous -> Winograd's form of it for `winograd`: (16 o c), or (9 o c) if `doubled`."""
    o, c = weight.shape[:2]
    y = empty(weight, (9 if doubled else 16, o, c))
    run("transform_weight", weight, o, c, y, doubled)
    return y


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution by Winograd's method: x (n c h w) -> (n o h w), both channels-last.

    weight: of `transform`. If it is for doubled pixels, every pixel of x counts as 2x2 pixels, and the results are
    (n o 2h 2w). Else h and w must be even.
    """
    (products, o, channels), (n, c, h, w) = weight.shape, x.shape
    if c != channels:
        raise ValueError(f"a convolution of {channels} channels cannot read x of {tuple(x.shape)}")
    fit((o,), bias=bias)
    doubled, threads = products == 9, torch.get_num_threads()
    size = (n, o, 2 * h, 2 * w) if doubled else (n, o, h, w)
    y = empty(x, size, channels_last=True)
    tiles = n * h * w // (1 if doubled else 4)
    some = min(TILES * (2 if has_matrix_units() else 1), -(-tiles // threads))
    scratch = empty(x, (min(threads, -(-tiles // some)) * products * some * (c + o),))
    run("winograd", x, n, h, w, c, weight, o, dense(bias), y, doubled, some, scratch)
    return y


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, frames: int = 1
) -> Tensor:
    """x ((n frames) c h w) in channels-last memory -> GroupNorm over each `frames` frames, and SiLU if `silu`."""
    n, c, h, w = x.shape
    y = empty(x, x.shape, channels_last=True)
    fit((c,), weight=weight, bias=bias)
    run("group_norm", x, n, h * w, c, groups, frames, dense(weight), dense(bias), eps, silu, y)
    return y


def geglu(value: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:
    """value, gate (... d), contiguous, bias (2d) of both -> value * gelu(gate) (... d), in the memory of value."""
    d = value.shape[-1]
    fit(value.shape, gate=gate)
    fit((2 * d,), bias=bias)
    run("geglu", value, gate, value.numel() // d, d, dense(bias))
    return value


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, positions: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    """x (b f ... d), contiguous -> LayerNorm(x) + positions (f d). With a residual, x becomes x + residual first."""
    y, d = empty(x, x.shape), x.shape[-1]
    frames = 1 if positions is None else x.shape[1]
    pixels = x.numel() // (x.shape[0] * frames * d)
    fit((d,), weight=weight, bias=bias)
    fit((frames, d), positions=positions)
    fit(x.shape, residual=residual)
    run("layer_norm", x, dense(residual), x.numel() // d, d, dense(weight), dense(bias), eps, dense(positions), frames,
        pixels, y)  # fmt: skip
    return y


def temporal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v (b f p h d) -> attention across frames (b f p h d), contiguous."""
    y = empty(q, q.shape)
    fit(q.shape, keys=k, values=v)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    of_q, of_k, of_v = ((SIZE * 5)(*x.stride()) for x in (q, k, v))
    run("frame_attention", q, of_q, k, of_k, v, of_v, *q.shape, y)
    return y
