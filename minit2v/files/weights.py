"""Opens checkpoint files without reading them, and loads weights strictly into a model that was made on `meta`.

Bad content raises ValueError, with a message of one line that names the file.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minit2v_convert.rename import Layout, nearest
from minit2v_convert.stream import cast, open_file

logger = logging.getLogger(__name__)


def open_weights(path: Path, mmap: bool = True) -> dict[str, Tensor]:
    """{name: tensor} of a `.safetensors` or `torch.save` file, memory-mapped. With mmap=False they are copies.

    A pickle may hold tensors and the usual containers of trainers. Anything else in it raises ValueError.
    """
    return open_file(path, mmap).tensors


def fill(
    model: nn.Module, layout: Layout, files: Sequence[Path], dtype: torch.dtype, strict: bool = True, mmap: bool = True
) -> None:
    """Load the weights of `files` into a model on `meta`. ValueError if names or shapes do not fit the model.

    layout: maps the names in the files to the model's own. strict: with False, parameters that are missing in the
    files keep their initial values, and the log names them; unknown tensors stay an error. mmap: with False the
    weights are copied, and a file that changes during the copy raises ValueError.
    """
    label = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    fill_from(model, layout, label, lambda: _open_all(files, mmap), dtype, strict)


def fill_from(
    model: nn.Module,
    layout: Layout,
    label: str,
    open_all: Callable[[], dict[str, Tensor]],
    dtype: torch.dtype,
    strict: bool = True,
) -> None:
    """`fill` with the tensors from `open_all`, which maps them again at each call. label: their file, for messages.

    Tensors that have `dtype` already stay memory-mapped. The others are cast one by one. After every 256 MiB the files
    are mapped again, which frees the pages that were read.
    """
    tensors = open_all()
    expected = model.state_dict()
    own = layout.own(expected)
    try:
        found, unknown = layout.match(tensors, own)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None
    lacking = [name for name in expected if name not in found]
    missing = list(layout.to_diffusers({name: None for name in lacking}, own))
    unknown = sorted(unknown + [key for name, key in found.items() if name not in expected])
    shapes = []
    for name, key in found.items():
        have = layout.squeeze(name, tensors[key])
        if name in expected and have.shape != expected[name].shape:
            shapes.append(f"{key!r} is {tuple(have.shape)}, not {tuple(expected[name].shape)}")
    if (missing and strict) or unknown or shapes:
        faults = [
            _list_some(len(missing), "missing", map(repr, missing)),
            _list_some(len(unknown), "unknown", (repr(n) + nearest(n, missing) for n in unknown)),
            _list_some(len(shapes), "of another shape", shapes),
        ]
        a_fork = bool(own.intersection(lacking)) or "layout" not in vars(type(model))
        hint = "; with strict=False they keep their initial values" * (a_fork and not unknown and not shapes)
        raise ValueError(f"{label} does not fit {type(model).__name__}: {'; '.join(f for f in faults if f)}{hint}")

    ready = {name: x.to(dtype) if x.is_floating_point() else x for name, x in expected.items() if name in lacking}
    unreleased = 0
    for name, key in found.items():
        x = layout.squeeze(name, tensors[key])
        if x.dtype == dtype or (name in own and not expected[name].is_floating_point()):
            ready[name] = x
            continue
        try:
            ready[name] = cast(x, dtype)
        except ValueError as error:
            raise ValueError(f"{label}: {key!r} {error}") from None
        unreleased += x.nbytes
        if unreleased > 2**28:
            del x, tensors
            tensors, unreleased = open_all(), 0
    model.load_state_dict(ready, assign=True)
    for name, value in chain(model.named_parameters(), model.named_buffers()):
        if value.is_meta:
            raise RuntimeError(f"{type(model).__name__}: {name} has no values after loading; if it is a buffer with "
                               "persistent=False, make it persistent")
    if missing:
        more = f" and {len(missing) - 20} more" if len(missing) > 20 else ""
        logger.warning("%s lacks %d tensors of %s, which keep their initial values: %s%s", label, len(missing),
                       type(model).__name__, ", ".join(missing[:20]), more)  # fmt: skip


class Weightless(TorchFunctionMode):
    """Skips random initialisation while networks are built on `meta`.

    There it would only make PyTorch import its compiler, which takes 3 s.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.normal_, Tensor.uniform_) or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _open_all(files: Sequence[Path], mmap: bool) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in files:
        for name, value in open_weights(path, mmap).items():
            if name in tensors:
                raise ValueError(f"{path} repeats {name!r}, which another shard also has")
            tensors[name] = value
    return tensors


def _list_some(count: int, what: str, items: Iterable[str]) -> str:
    """For example "2 missing ('a', 'b')". At most three are shown."""
    shown = ", ".join(item for item, _ in zip(items, range(3), strict=False))
    return f"{count} {what} ({shown}{', ...' if count > 3 else ''})" if count else ""


def first_nonfinite(model: nn.Module) -> str | None:
    """The diffusers name of the first parameter that holds NaN or infinity, or None.

    It is called when an output is not finite, because memory-mapped tensors are not checked when they are loaded.
    """
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            layout = getattr(model, "layout", None)
            return next(iter(layout.to_diffusers({name: None}, layout.own([name])))) if layout else name
    return None
