"""Counts the bytes of tensors while networks run: on `meta`, where nothing is computed, or in a real run.

Every tensor that PyTorch creates counts until it is freed. What the allocator adds does not count (rounding, fragments,
cuDNN's workspaces, 0.5 GB of CUDA itself). Attention counts as its inputs and its result, as in all of PyTorch's fused
backends.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30


class Live(TorchDispatchMode):
    """Counts the bytes of all storages created in this context: `now` and at the `peak`.

    known: tensors that existed before and do not count.
    limit: more bytes than this raise torch.OutOfMemoryError. With a limit, tensors on `meta` do not count.
    """

    def __init__(self, known: Iterable[Tensor] = (), limit: int | None = None):
        super().__init__()
        self.now = self.peak = 0
        self.limit = limit
        self.known = {value.untyped_storage()._cdata for value in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and not (value.is_meta and self.limit is not None):
                self.born(value.untyped_storage())
        return result

    def born(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:  # a view, or a change in place
            return
        if self.limit is not None and self.now + size > self.limit:
            raise torch.OutOfMemoryError(f"{size} bytes do not fit: {self.now} of {self.limit} are in use")
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.died, key, size)

    def died(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class OnMeta(TorchFunctionMode):
    """Makes `meta` behave like a real device: in attention, in the memory layout of convolutions, for values.

    On `meta`, PyTorch would store the attention of all pairs of pixels, and convolutions would return contiguous
    memory.
    device: "cuda" or "cpu". Only on a CPU, GroupNorm reads channels-last memory without a copy.
    """

    def __init__(self, device: str = "cuda"):
        super().__init__()
        self.device = device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, _, v = args[:3]
            b, h, length, _ = q.shape
            return torch.empty(b, length, h, v.shape[-1], dtype=q.dtype, device=q.device).transpose(1, 2)
        if function is torch.conv2d or function is F.conv2d:
            if (y := convolved(*args, **kwargs)) is not None:
                return y
        if function in (F.group_norm, torch.group_norm) and self.device == "cpu" and args[0].is_meta:
            return torch.empty_like(args[0])
        if function in VALUES and args[0].is_meta:
            return VALUES[function]
        if function is torch.linspace and "device" not in kwargs:
            kwargs["device"] = "meta"
        if function is torch.einsum:
            args = [x.to("meta") if isinstance(x, Tensor) else x for x in args]
        return function(*args, **kwargs)


VALUES: dict[Any, Any] = {Tensor.__bool__: True, Tensor.__int__: 0, Tensor.__float__: 0.0, Tensor.item: 0}


def convolved(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, *others: Any
) -> Tensor | None:
    """The result on `meta` of a convolution with a channels-last input or weight: channels-last. Otherwise None."""
    if all(t.is_contiguous() or not t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight)):
        return None
    steps, edges = (v if isinstance(v, tuple) else (v, v) for v in (stride, padding))
    sizes = zip(x.shape[2:], weight.shape[2:], steps, edges, strict=True)
    shape = len(x), len(weight), *((size + 2 * edge - taps) // step + 1 for size, taps, step, edge in sizes)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def peak(network: nn.Module, call: Callable[[], Any]) -> int:
    """Bytes at the peak of a call on `meta`, without the network's weights."""
    return peak_beside([network], call)


def peak_beside(networks: Iterable[nn.Module], call: Callable[[], Any], device: str = "cuda") -> int:
    """Bytes at the peak of a call on `meta`, as if on `device`, without the networks' weights."""
    known = [value for network in networks for value in (*network.parameters(), *network.buffers())]
    with torch.no_grad(), OnMeta(device), Live(known) as live:
        call()
    return live.peak


def size(network: nn.Module) -> int:
    """Bytes of a network's parameters and buffers."""
    return sum(value.nbytes for value in (*network.parameters(), *network.buffers()))
