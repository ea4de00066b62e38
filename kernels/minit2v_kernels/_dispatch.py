"""Which implementation of an op runs, and the one way in which kernels are launched.

The choice: `impl=` of the call, else $MINIT2V_KERNELS, else "auto". The variable is "auto", "torch" or "triton" for
all ops, and may name some with a choice of their own: "torch,geglu=triton".
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

IMPLS = ("auto", "torch", "triton")

# Device families on which a result committed under benchmarks/results/ shows that the op's kernel beats PyTorch,
# e.g. {"group_norm_silu": {"sm_90"}}. Until such a result exists a family is not in here, and "auto" means PyTorch.
PROVEN: dict[str, frozenset[str]] = {
    "group_norm_silu": frozenset(),
    "temporal_attention": frozenset(),
    "geglu": frozenset(),
    "add_layer_norm": frozenset(),
    "temporal_conv": frozenset(),
}


INSTALLED = find_spec("triton") is not None  # found without importing it, which would cost seconds


def has_triton() -> bool:
    return INSTALLED


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors: slow, and exact enough for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def family(device: torch.device) -> str:
    """The name PROVEN uses for a device: "sm_90" (NVIDIA), "gfx942" (AMD), else its type.

    While launches are recorded for a target: the target. A kernel whose tiles differ by family asks here.
    """
    return recorded_for or _family(device)


@cache
def _family(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def choices(setting: str) -> dict[str, str]:
    """$MINIT2V_KERNELS -> {op: impl}. Raises ValueError on an op or an implementation that nobody knows."""
    chosen, named = dict.fromkeys(PROVEN, "auto"), {}
    for part in filter(None, setting.replace(" ", "").split(",")):
        op, equals, impl = part.rpartition("=")
        if impl not in IMPLS:
            raise ValueError(f"MINIT2V_KERNELS must be one of {', '.join(map(repr, IMPLS))}, not {impl!r}")
        if not equals:
            chosen = dict.fromkeys(PROVEN, impl)
        elif op in PROVEN:
            named[op] = impl
        else:
            near = get_close_matches(op, PROVEN, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f": there are {', '.join(PROVEN)}"
            raise ValueError(f"MINIT2V_KERNELS names an unknown op {op!r}{hint}")
    return chosen | named


parsed: dict[str, dict[str, str]] = {}  # not functools.cache, of which torch.compile warns


def chosen_by_environment(op: str) -> str:
    setting = os.environ.get("MINIT2V_KERNELS") or "auto"
    if setting not in parsed:
        parsed[setting] = choices(setting)
    return parsed[setting][op]


def pick(op: str, impl: str | None, x: Tensor, *others: Tensor | None) -> str:
    """ "torch" or "triton" for `op` on the input `x` and other tensors.

    "triton" never falls back: RuntimeError where it cannot run. ValueError on an unknown `impl`.
    """
    source = "impl" if impl else "MINIT2V_KERNELS"
    impl = impl or chosen_by_environment(op)
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, not {impl!r}")
    if impl == "auto":
        if not (x.is_cuda and family(x.device) in PROVEN[op] and has_triton()):
            return "torch"
        # What is proven is forward in one 16-bit dtype: float32 has no tensor cores here, backward runs forward again,
        # and autocast has its own rules for dtypes.
        tensors = [x, *(other for other in others if other is not None)]
        plain = x.element_size() == 2 and all(other.dtype == x.dtype for other in tensors)
        wanted = torch.is_grad_enabled() and any(other.requires_grad for other in tensors)
        return "triton" if plain and not wanted and not torch.is_autocast_enabled("cuda") else "torch"
    if impl == "triton" and not has_triton():
        raise RuntimeError(f"{op}: {source}='triton', but Triton is not installed (pip install 'minit2v[triton]')")
    if impl == "triton" and not (x.is_cuda or interpreting() or recorded is not None):
        raise RuntimeError(f"{op}: {source}='triton' needs a GPU tensor, not one on {x.device}")
    return impl


class Launch(NamedTuple):
    """One kernel launch: what a compiler must know to specialise it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]  # tensors and numbers, in the kernel's order
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


recorded: list[Launch] | None = None  # while `record` is open: launches are listed, and nothing runs
recorded_for: str | None = None


PROCESSORS = {"sm_80": 108, "sm_90": 132, "gfx942": 304}  # of an A100, H200, MI300X; see `family`


@contextmanager
def record(target: str | None = None) -> Iterator[list[Launch]]:
    """Ops that are called in here with impl="triton" list their launches and run none: also on `meta` tensors.

    This is how the kernels are compiled ahead of time for exactly what the models ask of them. target: the device
    family for which they choose their tiles ("sm_90"); without one `meta` gets tiles that fit any.
    """
    global recorded, recorded_for
    before, recorded, recorded_for = (recorded, recorded_for), [], target
    try:
        yield recorded
    finally:
        recorded, recorded_for = before


def is_traced(x: Tensor) -> bool:
    """Whether x stands for a tensor while torch.compile or torch.export looks at what is done with it."""
    return type(x) is not Tensor or torch.compiler.is_compiling()


def sizes(x: Tensor) -> tuple[int, ...]:
    """x's shape as what plans are kept by: numbers, also where they are symbols."""
    return x.shape if type(x) is Tensor else tuple(map(int, x.shape))


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **constexprs: Any
) -> None:
    """Run kernel[grid](*args, **constexprs), on the device of the first of args."""
    if grid[0] >= 2**31 or len(grid) > 1 and max(grid[1:]) > 65535:
        raise ValueError(f"{kernel.__name__}: a grid of {grid} is larger than a GPU's")
    if recorded is not None:
        recorded.append(Launch(kernel, grid, args, constexprs, num_warps, num_stages))
        return
    start(kernel, grid, args, {**constexprs, "num_warps": num_warps, "num_stages": num_stages})


def start(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    x = args[0]
    if is_traced(x):
        torch.library.wrap_triton(kernel)[grid](*args, **options)
    elif x.is_cuda and x.device.index != torch.cuda.current_device():  # Triton launches on the current one
        with torch.cuda.device(x.device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


registrations: list[Callable[[], None]] = []


def register_all() -> None:
    """Register every op now: before torch.compile, which would stop at an op that registers itself."""
    for register in registrations if has_triton() else ():
        register()


def triton_op(run: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, which allocates and launches, as the torch op "minit2v::<its name, less run_>": traced, differentiated.

    Its signature must be annotated with what torch.library knows; Triton is imported and the op registered here, at
    its first use, because registering costs two seconds and 70 MiB. Backward differentiates `reference`, called with
    the same arguments, so it cannot drift from it. There is no second derivative: RuntimeError.
    """

    name, op = run.__name__.removeprefix("run_"), None

    def register() -> None:
        nonlocal op
        if op is None:
            op = torch.library.triton_op(f"minit2v::{name}", run, mutates_args=())
            op.register_autograd(backward, setup_context=setup)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs))
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # under create_graph
            raise RuntimeError(f"{name}: its kernel has no second derivative; impl='torch' has")
        inputs: list[Any] = []
        for tensor, other, needed in zip(ctx.saved_tensors, ctx.others, ctx.needs_input_grad, strict=True):
            inputs.append(other if tensor is None else tensor.detach().requires_grad_(needed))
        with torch.enable_grad():
            outputs = reference(*inputs)
        leaves = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
        found = iter(torch.autograd.grad(outputs, leaves, grads, allow_unused=True))
        return tuple(next(found) if isinstance(v, Tensor) and v.requires_grad else None for v in inputs)

    def call(*args: Any) -> Any:
        if recorded is not None:
            return run(*args)
        register()
        return op(*args)

    registrations.append(register)
    return call
