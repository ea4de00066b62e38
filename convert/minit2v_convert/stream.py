"""Opens, reads and writes checkpoint files of any size, one tensor at a time.

    source = open_file("model.ckpt")                       # reads only names, shapes and dtypes
    x = source.read("conv_in.weight")                      # memory-mapped
    write_file("model.safetensors", plan, read)            # holds one tensor in memory

Headers are not trusted: sizes, offsets and dtypes are checked before torch uses them. A pickle is checked operation by
operation, and is opened only if it does nothing but list tensors. Bad content raises ValueError, in one line.
"""

import errno
import json
import math
import mmap
import os
import secrets
import signal
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from .containers import unwrap
from .detect import SIZES
from .formats import Plan, Step, make
from .rename import shown
from .sparse import DTYPES as COMMON

DTYPES = {
    **COMMON, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 2**25  # bytes; the largest published header has 500,000, and JSON takes ten times as much memory
LARGEST = 2**48  # numbers in a tensor
LARGEST_JSON = 2**26  # bytes; the file of a tokenizer has 3 MB
PICKLES = (".bin", ".pth", ".pt", ".ckpt")


@dataclass(frozen=True)
class Source:
    """An open file. header: {name: (shape, dtype)}. read: gives the tensor of a name.

    nest, ignored: the dictionaries around the tensors of a pickle, and its other content (`containers`). metadata: the
    names in a safetensors file's `__metadata__`, except `format`.
    """

    path: Path
    header: dict[str, tuple[tuple[int, ...], str]]
    read: Callable[[str], Tensor]
    nest: tuple[str, ...] = ()
    ignored: Mapping[str, str] | None = None
    metadata: tuple[str, ...] = ()

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: self.read(name) for name in self.header}


def open_file(path: str | Path, mmap: bool = True) -> Source:
    """Open a `.safetensors` or `torch.save` file, which is recognised by its content.

    mmap: with True the tensors are memory-mapped, and are read from the file when they are used. If the file is
    changed, they change too; if it is shortened, using them ends the process (SIGBUS). With False, `read` copies the
    tensors into memory; ValueError if a safetensors file has changed since it was opened.

    Raises ValueError on bad content, OSError if the file cannot be read.
    """
    path = Path(path)
    return _open_safetensors(path, mmap) if is_safetensors(path) else _open_pickle(path, mmap)


def is_safetensors(path: Path) -> bool:
    """Whether the content is that of a safetensors file, or else of torch.save. ValueError if it can be neither."""
    _check_regular(path)
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"{path} is empty")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` in its repository")
    if head.lstrip()[:1] == b"<":
        raise ValueError(f"{path} is a web page, not weights: download the file itself")
    return head[8:9] == b"{" or path.suffix == ".safetensors"


def first_line(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 300 else line[:297] + "..."


def _broken(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is broken ({path.stat().st_size} bytes): {why}")


def _quote(text: object) -> str:
    quoted = repr(text)
    return quoted if len(quoted) <= 100 else f"{quoted[:97]}..."


# --------------------------------------------------------------------------------------------------------- safetensors


def read_header(path: Path) -> tuple[dict[str, tuple[tuple[int, ...], str]], dict[str, int], tuple[str, ...]]:
    """({name: (shape, dtype)}, {name: first byte in the file}, names in the metadata) of a `.safetensors` file.

    Every byte is checked. ValueError if the file is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _broken(path, "it is truncated, or not a safetensors file; download it again")
        if length > LONGEST_HEADER:
            raise _broken(path, f"its header has {length} bytes, and the limit is {LONGEST_HEADER}")
        text = file.read(length)
    try:
        entries = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"the header is broken ({first_line(error)})") from None
    if not isinstance(entries, dict):
        raise _broken(path, f"the header is broken (a {type(entries).__name__})")
    header, begins, ranges = {}, {}, []
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        try:
            shape, dtype, begin, end = _checked(entry)
        except ValueError as error:
            raise _broken(path, f"the header is broken: {_quote(name)} {error}") from None
        header[name], begins[name] = (shape, dtype), 8 + length + begin
        ranges.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(ranges):
        if begin != at:
            raise _broken(path, f"the header is broken: {_quote(name)} begins at byte {begin} of the data, not at {at}")
        at = end
    if at != size - 8 - length:
        raise _broken(path, f"it is truncated, or not a safetensors file: its tensors take {at} bytes, but there are "
                            f"{size - 8 - length}")  # fmt: skip
    metadata = entries.get("__metadata__")
    return header, begins, tuple(n for n in metadata if n != "format") if isinstance(metadata, dict) else ()


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {_quote(next(n for n in names if names.count(n) > 1))} twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _checked(entry: Any) -> tuple[tuple[int, ...], str, int, int]:
    """Shape, dtype, begin and end."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError("must have a dtype, a shape and data_offsets")
    shape, dtype, offsets = entry["shape"], entry["dtype"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"has {_quote(numbers)}, which are not whole numbers")
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise ValueError(f"has the unknown dtype {_quote(dtype)}")
    if len(offsets) != 2 or len(shape) > 16 or math.prod(n or 1 for n in shape) > LARGEST:
        raise ValueError(f"has the impossible shape {_quote(shape)} or offsets {_quote(offsets)}")
    begin, end = offsets
    if math.prod(shape) * SIZES[dtype] != end - begin:
        raise ValueError(f"takes {_quote(end - begin)} bytes, which does not fit {dtype} {_quote(shape)}")
    return tuple(shape), dtype, begin, end


def _open_safetensors(path: Path, mapped: bool) -> Source:
    opened = _stamp(path.stat())
    header, begins, metadata = read_header(path)
    with path.open("rb") as file:
        # A private map, because torch needs write access. It takes memory only for pages that are written.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if mapped else None

    def read(name: str) -> Tensor:
        shape, dtype = header[name]
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=DTYPES[dtype])
        if data is not None:
            return torch.frombuffer(data, dtype=DTYPES[dtype], count=count, offset=begins[name]).reshape(shape)
        copy = torch.empty(shape, dtype=DTYPES[dtype])
        with path.open("rb") as file:
            file.seek(begins[name])
            if file.readinto(_bytes(copy)) < copy.nbytes or _stamp(os.fstat(file.fileno())) != opened:
                raise _broken(path, "the file has changed since it was opened")
        return copy

    return Source(path, header, read, metadata=metadata)


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


# ------------------------------------------------------------------------------------------------------------- pickles

# The names that torch.save writes for tensors. torch's own list also allows `bytearray`, which can fill the memory.
STORAGES = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool", "Untyped")
ALLOWED = {
    "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
    "torch.storage UntypedStorage", "torch Size", *(f"torch {kind}Storage" for kind in STORAGES),
    *(str(dtype).replace(".", " ") for dtype in DTYPES.values()),
}  # fmt: skip
# Objects of trainers beside the weights. They become placeholders that do nothing. None of them is imported or called,
# except the few that torch itself allows (bytes, devices, counters).
TRAINERS = ("pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "torchmetrics", "omegaconf",
            "ldm", "diffusers", "transformers", "torch.optim")  # fmt: skip
BESIDE = {
    "argparse Namespace", "pathlib PosixPath", "pathlib WindowsPath", "pathlib._local PosixPath", "typing Any",
    "collections defaultdict", "collections Counter", "datetime datetime", "datetime timedelta", "torch device",
    "copy_reg _reconstructor", "_codecs encode", "numpy ndarray", "numpy dtype",
    *(f"numpy.{core}.multiarray {name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"__builtin__ {name}" for name in ("set", "frozenset", "dict", "list", "tuple", "int", "long", "float", "str",
                                         "unicode", "bool", "complex", "slice", "object")),
}  # fmt: skip
OPERATIONS = {
    "PROTO", "STOP", "MARK", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NONE",
    "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "BINSTRING",
    "SHORT_BINSTRING", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "REDUCE", "BUILD", "BINPERSID",
    "SETITEM", "SETITEMS", "APPEND", "APPENDS", "NEWOBJ",
}  # fmt: skip
LARGEST_TUPLE = 10**5  # items, with nested ones, because hashing nested tuples can take forever
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first bytes of a file from torch before 1.6
LONGEST_PICKLE = 2**27


def load_pickle(path: Path, mapped: bool = True, stand_ins: Mapping[str, type] | None = None) -> Any:
    """The content of a torch.save file, with placeholders for objects of trainers. ValueError if it is not safe.

    mapped: memory-map the tensors. stand_ins: further names that the pickle may import, such as
    "torch.nn.modules.container ParameterDict", and the classes that replace them.
    """
    stand_ins = stand_ins or {}
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    try:
        beside = (_check_zip if zipped else _check_legacy)(path, stand_ins)
        known: list[tuple[Callable[..., Any], str]] = [(c, n.replace(" ", ".")) for n, c in stand_ins.items()]
        with torch.serialization.safe_globals(_placeholders(beside - stand_ins.keys()) + known):
            # Files from torch before 1.6 cannot be memory-mapped.
            return torch.load(path, map_location="cpu", mmap=zipped and mapped, weights_only=True)
    except _Refused as error:
        raise ValueError(f"{path} is refused: its pickle imports {error}, which may run code and is not needed for "
                         "weights") from None
    except Exception as error:  # a damaged file can raise any exception
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: the file has a bad offset
            raise
        torch_says = str(error).split("WeightsUnpickler error: ")[-1].strip()  # after a page of advice
        raise _broken(path, shown(first_line(ValueError(torch_says)) if torch_says else first_line(error))) from None


def _open_pickle(path: Path, mapped: bool) -> Source:
    content = load_pickle(path, mapped)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name")
    try:
        contents = unwrap(content)
        header = {name: _header_of(name, x) for name, x in contents.tensors.items()}
    except ValueError as error:
        raise ValueError(f"{path} holds more than weights: {first_line(error)}") from None
    return Source(path, header, lambda name: contents.tensors[name].detach(), contents.path, contents.ignored)


class _Refused(Exception):
    """The pickle would import something that is not on the list."""


class _Inert:
    """A placeholder for an object of a trainer. Operations of the pickle on it have no effect."""

    def __new__(cls, *_: Any) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def _empty(*_: Any) -> dict[Any, Any]:
    return {}


def _placeholders(names: set[str]) -> list[tuple[Callable[..., Any], str]]:
    """Placeholders under the names of Python 3, because torch translates the names of Python 2."""
    from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING

    found = []
    for old in sorted(names):
        module, name = old.split(" ", 1)
        new = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        # A defaultdict is filled like a dictionary, so its placeholder must be one.
        found.append((_empty if name == "defaultdict" else type(name, (_Inert,), {}), ".".join(new)))
    return found


def _is_trainers(name: str) -> bool:
    """Whether "module name" is an object that trainers put beside weights."""
    module = name.split(" ")[0]
    return name in BESIDE or any(module == root or module.startswith(f"{root}.") for root in TRAINERS)


def _check_zip(path: Path, stand_ins: Mapping[str, type]) -> set[str]:
    """Check that a zip archive is like those of torch.save, and is not compressed (no zip bomb).

    Returns the names of objects that trainers put beside the weights.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size for e in entries):
            raise ValueError("it is compressed, but torch.save does not compress")
        if any(e.header_offset + e.file_size > size for e in entries):
            raise ValueError("the sizes in it are larger than the file")
        pickles = [e for e in entries if e.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > LONGEST_PICKLE:
            raise ValueError("it is a zip archive, but not from torch.save")
        with archive.open(pickles[0]) as file:
            return _check_operations(file, stand_ins)


def _check_legacy(path: Path, stand_ins: Mapping[str, type]) -> set[str]:
    with path.open("rb") as file:
        if file.read(len(LEGACY)) != LEGACY:
            raise ValueError("it is neither a safetensors file nor a torch.save file")
        # four pickles: a version, the system, the content, the names of the storages
        return set().union(*(_check_operations(file, stand_ins) for _ in range(4)))


class _Thing(NamedTuple):
    """An object in a pickle, as far as it is known without making it.

    size: the number of objects in it. text: its value if it is a text. imported: its name if it is imported. items:
    its items if it is a pair.
    """

    size: int = 1
    text: str | None = None
    imported: str | None = None
    items: tuple["_Thing", ...] = ()


def _check_operations(file: Any, stand_ins: Mapping[str, type]) -> set[str]:
    """Read a pickle without executing it. Returns the names of trainers' objects. Raises _Refused or ValueError."""
    import pickletools
    from pickletools import markobject

    beside: set[str] = set()
    stack: list[Any] = []  # things, or marks
    memo: dict[int, Any] = {}
    last = None
    for operation, argument, _ in pickletools.genops(file):
        name = operation.name
        if name in ("INST", "STACK_GLOBAL", "GLOBAL", "EXT1", "EXT2", "EXT4", "OBJ", "NEWOBJ", "NEWOBJ_EX"):
            wanted = argument if name in ("GLOBAL", "INST") else _quote(last if name == "STACK_GLOBAL" else name)
            if name not in ("GLOBAL", "NEWOBJ") or name == "GLOBAL" and argument not in ALLOWED and (
                    argument not in stand_ins and not _is_trainers(argument)):
                raise _Refused(str(wanted).replace(" ", ".") if len(str(wanted)) < 200 else _quote(wanted))
            if name == "GLOBAL" and argument not in ALLOWED:
                beside.add(argument)
        if name not in OPERATIONS:
            raise ValueError(f"its pickle has the operation {name}, which torch.save does not write")
        if name == "PROTO" and argument != 2:
            raise ValueError(f"its pickle has protocol {argument}, but torch.save writes 2")
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
            continue
        if name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
            continue
        before = operation.stack_before
        taken = []
        if markobject in before:
            while (x := stack.pop()) is not markobject:
                taken.append(x)
            before = before[: before.index(markobject)]
        taken += [stack.pop() for _ in before]
        things = [x for x in taken if x is not markobject][::-1]
        size = 1 + sum(x.size for x in things) if name.startswith("TUPLE") else 1
        if size > LARGEST_TUPLE:
            raise ValueError("its pickle has too many nested tuples")
        if name in ("REDUCE", "NEWOBJ", "BUILD"):
            _check_call(name, *things)
        made = _Thing(size, argument if isinstance(argument, str) and name != "GLOBAL" else None,
                      argument if name == "GLOBAL" else None, tuple(things) if name == "TUPLE2" else ())  # fmt: skip
        stack += [markobject if name == "MARK" else made] * len(operation.stack_after)
        last = argument if argument is not None else last
    return beside


def _check_call(operation: str, called: _Thing, given: _Thing) -> None:
    """Check that only imported names are called, and only made objects are built. `encode` may only use Latin-1."""
    if (operation == "BUILD") == (called.imported is not None):
        raise ValueError(f"its pickle has the operation {operation} at a place where torch.save writes none")
    if called.imported == "_codecs encode" and (
            len(given.items) != 2 or given.items[1].text not in ("latin1", "latin-1")):
        raise _Refused("_codecs.encode with another encoding than Latin-1")
    if operation == "NEWOBJ" and called.imported in ALLOWED:
        raise ValueError(f"its pickle makes a {_quote(called.imported)} in a way that torch.save does not")


def _header_of(name: str, x: Tensor) -> tuple[tuple[int, ...], str]:
    if x.layout is not torch.strided or x.device.type != "cpu" or x.dtype not in NAMES:
        raise ValueError(f"{_quote(name)} must be a dense tensor of a usual dtype, not {x.dtype}, {x.layout}, on "
                         f"{x.device}")
    if x.numel() * x.element_size() > x.untyped_storage().nbytes():
        raise ValueError(f"{_quote(name)} has the shape {_quote(list(x.shape))}, but its data are shorter")
    return tuple(x.shape), NAMES[x.dtype]


# ------------------------------------------------------------------------------------------------------------- writing


def _check_regular(path: Path) -> None:
    """ValueError on pipes and devices, which may never end. Reading reports missing files and folders."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is a pipe or a device, not a file")


def parse_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError if it has none, OSError if it cannot be read."""
    _check_regular(path)
    if path.is_file() and path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, which is too large for a config")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def json_text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


class _Ended(BaseException):
    """Raised by a signal that ends the process."""


@contextmanager
def ended_cleanly() -> Iterator[None]:
    """Inside the block SIGTERM and SIGHUP raise an exception, so that the block cleans up. Then they end the process.

    This has no effect outside the main thread, or if the program has its own handler or ignores the signal (nohup).
    """
    came: list[int] = []

    def end(number: int, frame: Any) -> None:
        if not came:  # a second signal must not interrupt the clean-up
            came.append(number)
            raise _Ended

    before: list[int] = []
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, end)
                before.append(number)
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, signal.SIG_DFL)
        if came:
            os.kill(os.getpid(), came[0])


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield an empty file beside `path`. It replaces `path` if the block succeeds, and is removed otherwise.

    Its name is random. So nobody can put a link there before, and threads or machines that share a folder use different
    files. It has the ending of `path`, because some libraries choose the file format by it. OSErrors are not changed.
    """
    ending = path.suffix if len(path.suffix) < 20 else ""
    temporary = path.with_name(f".{path.stem[:30]}-{secrets.token_hex(16)}{ending}")
    with ended_cleanly():
        try:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
            descriptor = os.open(temporary, flags, 0o666)
            mode = os.fstat(descriptor).st_mode  # the umask's, because safetensors writes files only for the owner
            os.close(descriptor)
            yield temporary
            temporary.chmod(mode)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """`beside`, which also makes a missing folder. Every error becomes an OSError that names `path`.

    Except ValueError, which is about the content and is not changed.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside(path) as temporary:
            yield temporary
    except ValueError:
        raise
    except Exception as error:  # libraries raise their own exceptions
        raise OSError(f"cannot write {shown(path)}: {first_line(error)}") from error


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor. ValueError on NaN, infinity, numbers too large for the dtype, or integers to be cast to floats."""
    if dtype.is_floating_point and not x.dtype.is_floating_point:
        raise ValueError(f"is {NAMES.get(x.dtype, x.dtype)}, but weights must be floating-point numbers")
    y = x.to(dtype)
    if y.numel() and not all(map(torch.isfinite, torch.aminmax(y))):
        if not torch.isfinite(x).all():
            raise ValueError("holds NaN or infinity")
        raise ValueError(f"does not fit {dtype}: its largest value is {x.abs().max().item():.3g}")
    return y


def retyped(plan: Plan, dtype: torch.dtype | None) -> Plan:
    """The plan with every weight in `dtype`. Integers, and tensors in `plan.exact`, keep their dtype."""
    if dtype is None:
        return plan
    steps = (replace(s, dtype=NAMES[dtype]) if DTYPES[s.dtype].is_floating_point and s.name not in plan.exact else s
             for s in plan.steps)  # fmt: skip
    return replace(plan, steps=tuple(steps))


def size_of(plan: Plan) -> int:
    """The size of all tensors in bytes."""
    return sum(math.prod(s.shape) * SIZES[s.dtype] for s in plan.steps)


def made(step: Step, read: Callable[[Step, str], Tensor]) -> Tensor:
    """The tensor of a step in the step's dtype. ValueError, with its name, if it cannot be cast."""
    x = make(step, [read(step, name) for name in step.sources])
    if x.dtype == DTYPES[step.dtype]:
        return x
    try:
        return cast(x, DTYPES[step.dtype])
    except ValueError as error:
        raise ValueError(f"{_quote(step.sources[0])} {error}") from None


def write_file(
    path: Path, plan: Plan, read: Callable[[Step, str], Tensor], done: Callable[[int], Any] = lambda n: None
) -> None:
    """Write a plan's tensors, with one in memory at a time. The ending of `path` chooses a pickle or safetensors.

    read: (step, source name) -> tensor. done: called with the bytes of each tensor. This writes to `path` directly, so
    callers give the temporary file of `replacing`.
    """
    (_write_pickle if path.suffix in PICKLES else _write_safetensors)(path, plan, lambda step: made(step, read), done)


def _bytes(x: Tensor) -> memoryview:
    return memoryview(x.contiguous().reshape(-1).view(torch.uint8).numpy())


def _write_safetensors(
    path: Path, plan: Plan, tensor: Callable[[Step], Tensor], done: Callable[[int], Any]
) -> None:
    steps = sorted(plan.steps, key=lambda s: -SIZES[s.dtype])  # so each tensor begins at a multiple of its item size
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for s in steps:
        begin, end = end, end + math.prod(s.shape) * SIZES[s.dtype]
        header[s.name] = {"dtype": s.dtype, "shape": list(s.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for step in steps:
            done(file.write(_bytes(tensor(step))))


STORAGE_OF = {"F32": "Float", "F16": "Half", "BF16": "BFloat16", "F64": "Double", "I64": "Long", "I32": "Int"}
ALIGNMENT = 64  # bytes, for each tensor in the archive, as in torch.save


@dataclass(frozen=True)
class _Slot:
    """A placeholder for a tensor's storage while the pickle is written."""

    key: str
    step: Step


@dataclass(frozen=True)
class _Stub:
    """A placeholder for a tensor while the pickle is written. Reading the pickle gives a tensor."""

    slot: _Slot

    def __reduce__(self) -> tuple[Any, ...]:
        shape = self.slot.step.shape
        stride = tuple(math.prod(shape[n + 1 :]) for n in range(len(shape)))
        return torch._utils._rebuild_tensor_v2, (self.slot, 0, shape, stride, False, OrderedDict())


def _write_pickle(path: Path, plan: Plan, tensor: Callable[[Step], Tensor], done: Callable[[int], Any]) -> None:
    """Write the format of torch.save, with one tensor in memory at a time."""
    import io
    import pickle

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if isinstance(obj, _Slot):
                kind = getattr(torch, f"{STORAGE_OF[obj.step.dtype]}Storage")
                return ("storage", kind, obj.key, "cpu", math.prod(obj.step.shape))
            return None

    content: Any = {s.name: _Stub(_Slot(str(n), s)) for n, s in enumerate(plan.steps)}
    for name in reversed(plan.nest):
        content = {name: content}
    text = io.BytesIO()
    Pickler(text, protocol=2).dump(content)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", text.getvalue())
        archive.writestr("archive/byteorder", "little")
        for n, step in enumerate(plan.steps):
            with _aligned(archive, f"archive/data/{n}") as file:
                done(file.write(_bytes(tensor(step))))
        archive.writestr("archive/version", "3\n")


@contextmanager
def _aligned(archive: zipfile.ZipFile, name: str) -> Iterator[BinaryIO]:
    """An entry whose content begins at a multiple of ALIGNMENT. The padding is in a field that readers skip."""
    info = zipfile.ZipInfo(name)
    begin = archive.fp.tell() + 30 + len(name) + 20 + 4  # the entry's header, its 64-bit sizes, the field's own header
    padding = -begin % ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w", force_zip64=True) as file:
        yield file
