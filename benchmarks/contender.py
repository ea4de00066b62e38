"""Is a kernel of your own right? It is judged here before `kernels.py --contender` shows a time.

The function takes the place of an op of minit2v_kernels and is called as the networks call it: at every shape of
theirs, with their strides, in each dtype. Its result may be twice as far from float64 as PyTorch's in the same dtype,
plus one rounding. Each shape is judged three times: on ordinary numbers, on hard ones (large means for a norm, large
scores for an attention), and with one NaN, which may reach only what it reaches in PyTorch.

Memory does not forgive: what the function allocates is full of NaN until it writes there, its arguments must stay as
they are, and before and behind every tensor lies memory that is not its own. On a GPU that is watched for changes; on
the CPU, where kernels run in Triton's interpreter, touching it ends a child process, which is how the fault is found.

First come the shapes cut where a kernel repeats itself (pixels, rows, heads, videos, channels of a result), and on the
CPU these alone. On a GPU the whole ones follow.
NotImplementedError means: this kernel does not do that. It is listed, and no fault.
"""

import ctypes
import json
import mmap
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from kernel_shapes import Geglu, GroupNorm, LayerNorm, LinearAdd, Shape, TemporalAttention, TemporalConv, shapes
from measure import one_line, relative
from torch import Tensor

import minit2v_kernels
from minit2v_kernels._dispatch import interpreting, quicken_interpreter

GUARD = 4096  # bytes of memory on either side of a tensor
FRESH = ("empty", "empty_like", "empty_strided", "zeros", "zeros_like")  # torch's functions that give memory
FRESH_METHODS = ("new_empty", "new_zeros", "new_empty_strided")
SHOWN = 5  # faults in a report


@dataclass(frozen=True)
class Verdict:
    """One shape in one dtype: `fault` says what is wrong, `refused` why the function does not take it."""

    case: str
    fault: str = ""
    refused: str = ""
    error: float = 0.0  # relative, from float64
    torch_error: float = 0.0  # PyTorch's own


# ---- memory


class Memory:
    """Tensors whose surroundings are watched."""

    def __init__(self, device: torch.device):
        self.device = device
        self.fenced = device.type == "cpu" and sys.platform == "linux"
        self.guards: list[Tensor] = []  # bytes that must stay 255, which in every float's dtype is NaN
        self.kept: list[tuple[Tensor, Tensor]] = []  # arguments' memory, and what was in it

    def room(self, size: int) -> Tensor:
        """So many bytes of 255, with guards around them."""
        if not self.fenced:
            whole = torch.full((GUARD + size + GUARD,), 255, dtype=torch.uint8, device=self.device)
            self.guards += [whole[:GUARD], whole[GUARD + size :]]
            return whole[GUARD : GUARD + size]
        page = mmap.PAGESIZE
        pages = -(-size // page) * page
        memory = mmap.mmap(-1, page + pages + page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for fence in (start, start + page + pages):
            if ctypes.CDLL(None).mprotect(ctypes.c_void_p(fence), page, 0):
                raise OSError("this system does not let memory be protected")
        whole = torch.frombuffer(memory, dtype=torch.uint8, count=pages, offset=page).fill_(255)
        self.guards.append(whole[: pages - size])
        return whole[pages - size :]

    def place(self, value: Any, places: dict[int, Tensor]) -> Any:
        """An argument, in guarded memory with its strides: views of one memory stay views of one."""
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in places:
            held = torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage)
            places[storage.data_ptr()] = room = self.room(len(held)).copy_(held)
            self.kept.append((room, held))
        room = places[storage.data_ptr()].view(value.dtype)
        return room.as_strided(value.shape, value.stride(), room.storage_offset() + value.storage_offset())

    def fresh(self, function: Callable[..., Tensor], blank: bool) -> Callable[..., Tensor]:
        def call(*args: Any, **kw: Any) -> Tensor:
            x = function(*args, **kw)
            if type(x) is not Tensor or x.device.type != self.device.type or not x.numel():
                return x
            room = self.room(x.untyped_storage().nbytes()).view(x.dtype)
            mine = room.as_strided(x.shape, x.stride(), room.storage_offset())
            return mine if blank else mine.copy_(x)

        return call

    @contextmanager
    def watching(self) -> Iterator[None]:
        """What is allocated in here is guarded."""
        before = [(torch, name, getattr(torch, name)) for name in FRESH]
        before += [(torch.Tensor, name, getattr(torch.Tensor, name)) for name in FRESH_METHODS]
        for owner, name, function in before:
            setattr(owner, name, self.fresh(function, "empty" in name))
        try:
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)

    def fault(self) -> str:
        if any((guard != 255).any().item() for guard in self.guards):
            return "writes outside of its tensors"
        if any(not torch.equal(now, before) for now, before in self.kept):
            return "changes its arguments"
        return ""


# ---- cases


def cut(shape: Shape) -> Shape:
    """As many frames and channels, and no more of the rest than shows that there is more than one."""
    name = shape.workload
    match shape:
        case GroupNorm():
            n = shape.frames if shape.frames > 1 else 2
            return replace(shape, n=n, h=2, w=3, emb=min(shape.emb, n))
        case TemporalAttention():
            return replace(shape, b=1, p=3, h=min(shape.h, 2))
        case Geglu() | LinearAdd():
            return replace(shape, rows=5, m=72)
        case LayerNorm():
            return replace(shape, b=1, p=3)
        case TemporalConv():  # its channels are rows of the weight, too
            return replace(shape, b=1, p=3, c=min(shape.c, 320))
    raise ValueError(f"{name}: no such shape: {shape}")


def hard(op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Numbers at which a sum of squares loses its digits, or an exponential overflows."""
    if "norm" in op:
        args[0].add_(100)
    else:
        args[0].mul_(40 if op == "temporal_attention" else 10)
    return args


def with_nan(op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """One NaN in x, or in v: a weight of zero times NaN is NaN, so a tile of several pixels may spread it."""
    x = args[2 if op == "temporal_attention" else 0]
    x[(0,) * x.ndim] = float("nan")
    return args


VARIANTS: dict[str, Callable[[str, tuple[Any, ...]], tuple[Any, ...]]] = {
    "": lambda op, args: args, "hard numbers": hard, "one NaN": with_nan,
}  # fmt: skip


def of_op(op: str, small: bool, *workloads: str) -> list[Shape]:
    """Each shape at which the networks call the op, once; small: cut to what Triton's interpreter manages."""
    found = (shape for shape in shapes(*workloads) if shape.op == op)
    kept: dict[str, Shape] = {}
    for shape in found:
        shape = cut(shape) if small else shape
        kept.setdefault(shape.name, shape)
    return list(kept.values())


def wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def outputs(y: Any) -> tuple[Any, ...]:
    return y if isinstance(y, tuple) else (y,)


@torch.no_grad()
def judge(shape: Shape, impl: str, dtype: torch.dtype, device: torch.device, variant: str = "") -> Verdict:
    """The function named impl, at one shape. Errors of its own are faults; those of the judge are not caught."""
    case = ", ".join(filter(None, [shape.name, str(dtype).removeprefix("torch."), variant]))
    call = getattr(minit2v_kernels, shape.op)
    if interpreting():
        quicken_interpreter()
    args, kw = shape.make(device, dtype, seed=len(case))
    args = VARIANTS[variant](shape.op, args)
    memory, places = Memory(device), {}
    args = tuple(memory.place(x, places) for x in args)
    kw = {name: memory.place(x, places) for name, x in kw.items()}
    # On the CPU, PyTorch's GroupNorm of channels-last memory takes the mean of the squares less the square of the mean.
    # So it gets contiguous memory, where it computes in a better way.
    theirs = outputs(call(*map(contiguous, args), **{name: contiguous(x) for name, x in kw.items()}, impl="torch"))
    end_args, end_kw = (args, kw) if device.type == "cpu" else shape.tail(args, kw)  # few enough for float64
    exact = outputs(call(*map(wide, end_args), **{name: wide(x) for name, x in end_kw.items()}, impl="torch"))
    try:
        with memory.watching():
            got = outputs(call(*args, **kw, impl=impl))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except NotImplementedError as error:
        return Verdict(case, refused=one_line(error))
    except Exception as error:
        return Verdict(case, fault=f"raises {one_line(error)}{where(error)}")
    if fault := memory.fault():
        return Verdict(case, fault)
    hides = isinstance(shape, TemporalAttention) and (shape.causal or shape.window)
    return compare(case, got, theirs, exact, dtype, bool(hides))


def where(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f" ({os.path.basename(frame.filename)}:{frame.lineno})"


def compare(
    case: str, got: tuple[Any, ...], theirs: tuple[Tensor, ...], exact: tuple[Tensor, ...], dtype: torch.dtype,
    hides: bool,
) -> Verdict:  # fmt: skip
    """Results against PyTorch's of the whole call, and against float64 of its end. hides: a mask may hide a NaN."""
    if len(got) != len(theirs):
        return Verdict(case, f"returns {len(got)} tensors, not {len(theirs)}")
    worst, least = 0.0, 0.0
    for mine, torchs, want in zip(got, theirs, exact, strict=True):
        if not isinstance(mine, Tensor) or (mine.shape, mine.dtype) != (torchs.shape, torchs.dtype):
            found = f"{mine.dtype} {tuple(mine.shape)}" if isinstance(mine, Tensor) else type(mine).__name__
            return Verdict(case, f"returns {found}, not {torchs.dtype} {tuple(torchs.shape)}")
        lost = (~mine.isfinite() & torchs.isfinite()).sum().item()
        if lost:
            return Verdict(case, f"{lost} of {mine.numel()} numbers are NaN, infinite, or never written")
        if not hides and (mine.isfinite() & ~torchs.isfinite()).any():
            return Verdict(case, "numbers where PyTorch has NaN")
        both = mine.isfinite() & torchs.isfinite()
        want = torch.where(both[-len(want) :], want, 0.0)
        mine, torchs = torch.where(both, mine, 0.0), torch.where(both, torchs, 0.0)
        error, apart = relative(mine[-len(want) :], want), relative(mine, torchs)
        own = relative(torchs[-len(want) :], want)
        limit = 2 * own + torch.finfo(dtype).eps / 2
        if error > limit:
            return Verdict(case, f"relative error {error:.1e}; PyTorch's is {own:.1e}", "", error, own)
        if apart > 2 * (limit + own):
            return Verdict(case, f"{apart:.1e} from PyTorch's result where float64 does not look", "", error, own)
        worst, least = max(worst, error), max(least, own)
    return Verdict(case, "", "", worst, least)


# ---- all cases


def judge_all(
    wanted: list[Shape], impl: str, dtypes: Iterable[torch.dtype], device: torch.device, progress: bool = False
) -> Iterator[Verdict]:
    """Each shape, dtype and variant; ends after SHOWN faults, or one that takes the process or the device with it."""
    todo = [(shape, impl, dtype, device, variant) for shape in wanted for dtype in dtypes for variant in VARIANTS]
    found = in_a_child(todo) if device.type == "cpu" else (judge(*case) for case in todo)
    faults = 0
    for n, verdict in enumerate(found, 1):
        if progress and (n == len(todo) or sys.stderr.isatty()):
            print(f"judged {n} of {len(todo)}", end="\n" if n == len(todo) else "\r", file=sys.stderr, flush=True)
        yield verdict
        faults += bool(verdict.fault)
        if faults == SHOWN or device.type == "cuda" and "CUDA error" in verdict.fault:  # after that one nothing runs
            return


def in_a_child(todo: list[tuple[Any, ...]]) -> Iterator[Verdict]:
    """The verdicts of a child process: one that reads or writes where it may not is ended by the system."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            torch.set_num_threads(1)  # threads do not outlive a fork
            warnings.simplefilter("ignore")  # the interpreter's, of numbers that are NaN
            with open(write, "w") as file:
                for case in todo:
                    print(json.dumps(vars(judge(*case))), file=file, flush=True)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    done, ended = 0, None
    try:
        with open(read) as file:
            for line in file:
                done += 1
                yield Verdict(**json.loads(line))
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        if ended is None:  # nobody wants the rest
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if ended < 0:
        shape, _, dtype, _, variant = todo[done]
        case = ", ".join(filter(None, [shape.name, str(dtype).removeprefix("torch."), variant]))
        yield Verdict(case, f"reads or writes outside of its tensors (signal {-ended})")
    elif ended:
        raise RuntimeError("the judge failed; its error stands above")


def report(op: str, impl: str, verdicts: list[Verdict]) -> tuple[str, bool]:
    """(what was found, whether the function may be timed)."""
    faults = [v for v in verdicts if v.fault]
    refused = [v for v in verdicts if v.refused]
    judged = [v for v in verdicts if not v.refused]
    lines = [f"{op} = {impl}: {len(judged) - len(faults)} of {len(judged)} cases are right"]
    lines[0] += "; the others were not tried" * (len(faults) == SHOWN)
    if judged and not faults:
        most = max(judged, key=lambda v: v.error / max(v.torch_error, 1e-12))
        lines.append(f"  the largest error beside PyTorch's: {most.error:.1e} and {most.torch_error:.1e}, {most.case}")
    for kind, some in (("WRONG", faults), ("refused", refused)):
        lines += [f"  {kind}: {v.case}: {v.fault or v.refused}" for v in some[:SHOWN]]
        lines += [f"  ... and {len(some) - SHOWN} more"] * (len(some) > SHOWN)
    return "\n".join(lines), bool(judged) and not faults


def cases(op: str, device: torch.device, *workloads: str) -> list[tuple[list[Shape], tuple[torch.dtype, ...]]]:
    """What is judged: cut shapes in every dtype; on a GPU also the whole ones, in 16 bits."""
    halves = (torch.float16, torch.bfloat16)
    if device.type == "cpu":  # the interpreter multiplies the bits of bfloat16 as if they were integers
        return [(of_op(op, True, *workloads), (torch.float32, torch.float16))]
    return [(of_op(op, True, *workloads), (torch.float32, *halves)), (of_op(op, False, *workloads), halves[:1])]


