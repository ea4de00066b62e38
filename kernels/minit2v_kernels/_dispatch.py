"""Which implementation of an op runs, and the one way in which kernels are launched.

The choice: `impl=` of the call, else $MINIT2V_KERNELS, else "auto". The variable is "auto", "torch" or "triton" for
all ops, and may name some with a choice of their own: "torch,geglu=triton". A function of one's own is a choice, too:
`register` gives it a name, and "package.module:function" needs none.
"""

import importlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

IMPLS = ("auto", "torch", "triton")
LAUNCHES = ("eager", "graph")  # each kernel by itself, at its host cost; or many together as a CUDA graph

# The public ops, and the name in PROVEN of the kernels that each of them launches.
OPS = {
    "group_norm_silu": "group_norm_silu",
    "add_group_norm_silu": "group_norm_silu",
    "temporal_attention": "temporal_attention",
    "geglu": "geglu",
    "layer_norm": "add_layer_norm",
    "add_layer_norm": "add_layer_norm",
    "temporal_conv": "temporal_conv",
    "linear_add": "linear_add",
}

# Device families on which a result committed under benchmarks/results/ shows that the op's kernel beats PyTorch, for
# each way to launch it. Example: {"geglu": {"eager": {"sm_90"}, "graph": {"sm_90"}}}. A kernel may win in a graph and
# lose eagerly, where the host's time counts. Until such a result exists a family is not in here: "auto" means PyTorch.
PROVEN: dict[str, dict[str, frozenset[str]]] = {
    op: {launched: frozenset() for launched in LAUNCHES} for op in dict.fromkeys(OPS.values())
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
    mine = recording()
    return mine.target if mine is not None and mine.target else _family(device)


@cache
def _family(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


contenders: dict[tuple[str, str], Callable[..., Any]] = {}  # (op, name) -> a function of the user's
registered = 0  # how often `register` was called: who keeps a choice asks whether it still holds


def register(op: str, name: str, function: Callable[..., Any]) -> None:
    """From now on impl=name, or "op=name" in $MINIT2V_KERNELS, runs `function` in place of `op`.

    It is called with the arguments of the op's definition (`temporal_attention_ref`, ...), all of them by place, and
    returns what the definition returns: shape, dtype, a tuple where that has one. It must not change its arguments. A
    name that is registered again is replaced. ValueError: an op that there is not, or a name that cannot be chosen.
    """
    global registered
    if op not in OPS:
        raise ValueError(f"register: there is no op {op!r}{nearest(op, OPS)}")
    if name in IMPLS or not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"register: a name is letters, digits and -, and none of {', '.join(IMPLS)}; not {name!r}")
    if not callable(function):
        raise ValueError(f"register: {name!r} must be a function, not {type(function).__name__}")
    contenders[op, name] = guarded(op, name, function)
    registered += 1


def nearest(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, known := list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else f": there are {', '.join(known)}"


def contender(op: str, name: str) -> Callable[..., Any]:
    """What `register` was given for the op by this name, or what the name says: "package.module:function".

    ValueError where there is none.
    """
    if (op, name) in contenders:
        return contenders[op, name]
    check_name(op, name)
    module, _, function = name.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{op}: cannot import {module!r}: {error}. Is its folder in PYTHONPATH?") from error
    if not callable(getattr(found, function, None)):
        raise ValueError(f"{op}: module {module!r} has no function {function!r}{nearest(function, vars(found))}")
    contenders[op, name] = guarded(op, name, getattr(found, function))
    return contenders[op, name]


def own(setting: str) -> dict[str, str]:
    """$MINIT2V_KERNELS -> {op: name} of the contenders in it, each imported. ValueError where one is not found."""
    found = {op: impl for op, impl in choices(setting).items() if impl not in IMPLS}
    for op, name in found.items():
        contender(op, name)
    return found


def check_name(op: str, name: str) -> None:
    """ValueError where the name is not a registered one and not of the form package.module:function."""
    if (op, name) in contenders or re.fullmatch(r"[\w.]+:\w+", name):
        return
    known = [*IMPLS, *(mine for of, mine in contenders if of == op and ":" not in mine)]
    raise ValueError(f"{op} has no implementation {name!r}: there are {', '.join(known)}, and package.module:function")


def guarded(op: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which may not lose a gradient in silence."""

    @wraps(function)
    def call(*args: Any) -> Any:
        result = function(*args)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            if not all(y.requires_grad for y in (result if isinstance(result, tuple) else (result,))):
                raise RuntimeError(f"{op}: {name!r} has no derivative: call it under torch.no_grad(), or impl='torch'")
        return result

    return call


def choices(setting: str) -> dict[str, str]:
    """$MINIT2V_KERNELS -> {op: impl}: one of IMPLS, or a contender's name. Nothing is imported for it.

    A choice for the kernels' name in PROVEN holds for all ops that launch them; a contender takes one op's place alone.
    Raises ValueError on an op or an implementation that nobody knows.
    """
    everywhere, named = "auto", {}
    for part in filter(None, setting.replace(" ", "").split(",")):
        op, equals, impl = part.rpartition("=")
        if not equals and impl not in IMPLS:
            own = f"; of your own function name the op, too: OP={impl}" if ":" in impl else "; for one op: geglu=triton"
            raise ValueError(f"MINIT2V_KERNELS must be one of {', '.join(map(repr, IMPLS))}, not {impl!r}{own}")
        if not equals:
            everywhere = impl
            continue
        if op not in OPS:
            raise ValueError(f"MINIT2V_KERNELS names an unknown op {op!r}{nearest(op, OPS)}")
        if impl not in IMPLS:
            check_name(op, impl)
        named[op] = impl
    shared = {op: impl for op, impl in named.items() if impl in IMPLS}
    return {op: named.get(op) or shared.get(kernels) or everywhere for op, kernels in OPS.items()}


parsed: dict[str, dict[str, str]] = {}  # not functools.cache, of which torch.compile warns


def setting() -> tuple[str | None, int]:
    """What a choice depends on that was made without `impl`: kept ones hold while this is the same."""
    return os.environ.get("MINIT2V_KERNELS"), registered


def chosen_by_environment(op: str) -> str:
    setting = os.environ.get("MINIT2V_KERNELS") or "auto"
    if setting not in parsed:
        parsed[setting] = choices(setting)
    return parsed[setting][op]


def pick(
    op: str, impl: str | None, x: Tensor, *others: Tensor | None, launched: str | None = None
) -> str | Callable[..., Any]:
    """ "torch", "triton" or a contender's function, for `op` on the input `x` and other tensors.

    launched: "eager" or "graph", where that is known; else as the current stream says. "triton" never falls back:
    RuntimeError where it cannot run. ValueError on an unknown `impl`.
    """
    source = "impl" if impl else "MINIT2V_KERNELS"
    impl = impl or chosen_by_environment(op)
    if impl not in IMPLS:
        if ":" not in impl and (op, impl) not in contenders:
            known = [*map(repr, IMPLS), *(repr(name) for of, name in contenders if of == op and ":" not in name)]
            raise ValueError(f"impl must be one of {', '.join(known)}, not {impl!r}; see `minit2v_kernels.register`")
        return contender(op, impl)
    if impl == "auto":
        if not (x.is_cuda and has_triton() and is_proven(op, family(x.device), launched)):
            return "torch"
        # What is proven is forward in one 16-bit dtype. Float32 has no tensor cores here, and backward runs forward
        # again. Autocast has its own rules for dtypes.
        tensors = [x, *(other for other in others if other is not None)]
        plain = x.element_size() == 2 and all(other.dtype == x.dtype for other in tensors)
        wanted = torch.is_grad_enabled() and any(other.requires_grad for other in tensors)
        return "triton" if plain and not wanted and not torch.is_autocast_enabled("cuda") else "torch"
    if impl == "triton" and not has_triton():
        raise RuntimeError(f"{op}: {source}='triton', but Triton is not installed (pip install triton)")
    if impl == "triton" and not (x.is_cuda or interpreting() or recording() is not None):
        raise RuntimeError(f"{op}: {source}='triton' needs a GPU tensor, not one on {x.device}")
    return impl


def is_proven(op: str, name: str, launched: str | None) -> bool:
    """Whether the op's kernel wins on the device family `name`, launched so."""
    proven = PROVEN[OPS[op]]
    if launched is None and (name in proven["eager"]) != (name in proven["graph"]):
        launched = "graph" if torch.cuda.is_current_stream_capturing() else "eager"
    return name in proven[launched or "eager"]


def autocast(x: Tensor, *others: Tensor | None, product: bool) -> Iterator[Any]:
    """The tensors of a call as a kernel can take them: of one dtype where torch.autocast is on, else as they are.

    product: in autocast's dtype, as PyTorch's matrix products and attention are; else, for norms, in the widest of
    theirs. Not for contenders, which are given what the call was given.
    """
    tensors = [x, *others]
    if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
        return iter(tensors)
    dtype = torch.get_autocast_dtype(x.device.type)
    if not product:
        dtype = x.dtype
        for other in others:
            dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)
    return (None if tensor is None else tensor.to(dtype) for tensor in tensors)


class Launch(NamedTuple):
    """One kernel launch: what a compiler must know to specialise it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]  # tensors and numbers, in the kernel's order
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


class Recording(NamedTuple):
    """What an open `record` has collected, and for which device family."""

    launches: list[Launch]
    target: str | None


recordings: dict[int, Recording] = {}  # by thread: what another one computes goes on


def recording() -> Recording | None:
    """The one that is open in this thread. (While none is, torch.compile need not look at threads.)"""
    return recordings.get(threading.get_ident()) if recordings else None


@contextmanager
def record(target: str | None = None, launches: list[Launch] | None = None) -> Iterator[list[Launch]]:
    """Ops that this thread calls in here with impl="triton" list their launches and run none: also on `meta` tensors.

    This is how the kernels are compiled ahead of time for exactly what the models ask of them. target: the device
    family for which they choose their tiles ("sm_90"); without one `meta` gets tiles that fit any. launches: the list.
    """
    thread = threading.get_ident()
    before, recordings[thread] = recordings.get(thread), Recording([] if launches is None else launches, target)
    try:
        yield recordings[thread].launches
    finally:
        if before is None:
            del recordings[thread]
        else:
            recordings[thread] = before


def is_traced(x: Tensor) -> bool:
    """Whether x stands for a tensor while torch.compile or torch.export looks at what is done with it."""
    return type(x) is not Tensor or torch.compiler.is_compiling()


def is_shape_alone(x: Tensor) -> bool:
    """Whether x is a tensor without numbers that nobody traces: there is nothing to compute."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return isinstance(x, FakeTensor) and get_proxy_mode() is None and not torch.compiler.is_compiling()


def sizes(x: Tensor) -> tuple[int, ...]:
    """x's shape as what plans are kept by: numbers, also where they are symbols."""
    return x.shape if type(x) is Tensor else tuple(map(int, x.shape))


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **constexprs: Any
) -> None:
    """Run kernel[grid](*args, **constexprs), on the device of the first of args."""
    if grid[0] >= 2**31 or len(grid) > 1 and max(grid[1:]) > 65535:
        raise ValueError(f"{kernel.__name__}: a grid of {grid} is larger than a GPU's")
    if (mine := recording()) is not None:
        mine.launches.append(Launch(kernel, grid, args, constexprs, num_warps, num_stages))
        return
    start(kernel, grid, args, {**constexprs, "num_warps": num_warps, "num_stages": num_stages})


def start(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    x = args[0]
    if is_traced(x):
        if interpreting() and is_shape_alone(x):
            return
        torch.library.wrap_triton(kernel)[grid](*args, **options)
    elif x.is_cuda and x.device.index != torch.cuda.current_device():  # Triton launches on the current one
        with torch.cuda.device(x.device):
            kernel[grid](*args, **options)
    else:
        if interpreting():
            quicken_interpreter()
        kernel[grid](*args, **options)


@cache
def quicken_interpreter() -> None:
    """Switch off the interpreter's check for integer overflow.

    It computes everything twice, and reports only in a debug mode, which is off.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not getattr(builder.options, "debug", True) and hasattr(builder.options, "sanitize_overflow"):
        builder.options = replace(builder.options, sanitize_overflow=False)


registrations: list[Callable[[], None]] = []


def register_all() -> None:
    """Register every op now: before torch.compile, which would stop at an op that registers itself."""
    for register in registrations if has_triton() else ():
        register()


def triton_op(run: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, which allocates and launches, as the torch op "minit2v::<its name, less run_>": traced, differentiated.

    Its signature must be annotated with what torch.library knows. Triton is imported and the op registered at its
    first use, because registering costs two seconds and 70 MiB. Backward differentiates `reference`, called with
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
        if recording() is not None:
            return run(*args)
        register()
        return op(*args)

    registrations.append(register)
    return call
