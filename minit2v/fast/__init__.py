"""The fast path: the same networks, their weights laid out and their work launched for speed. Nothing else changes.

    optimize(unet, graphs=True)         q, k, v of a self-attention in one matrix product; all blocks' timesteps in one;
                                        on CUDA: weights of convolutions in channels-last memory, and the thousand
                                        kernels of a prediction launched as one CUDA graph
    restore(unet)                       everything where it was, to the last bit

Weights that are used together become views of one tensor, so they stay what they were by name, and a change in place
(training, an adapter) is seen by both. All of it is for inference: where gradients are wanted, a network runs as ever.
"""

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minit2v_kernels._dispatch import pick, register_all

from ..models.layers import Attention, Linear
from ..models.unet import KeysValues, UNet
from ..models.vae import AutoencoderKL

Network = UNet | AutoencoderKL
MOST_GRAPHS = 4  # of one network: a new shape of its input takes one, and the oldest gives way


def optimize(network: Network, *, graphs: bool = False, compile: bool = False) -> None:
    """Lay the network's weights out for speed, once or anew.

    graphs: launch a UNet's predictions on CUDA as CUDA graphs; their memory stays taken until `restore` or `.to()`.
    compile: torch.compile each block of a UNet, at its first call.
    A copy of the network (copy.deepcopy) comes without all this. After `.to()`, `load_state_dict` and whatever else
    changes its weights, it is laid out again by itself.
    """
    restore(network)
    network.fast = Fast(network, graphs, compile)


def restore(network: Network) -> None:
    """Undo `optimize`: the same numbers, in the memory layouts of before. Does nothing where there is nothing to do."""
    if network.fast is not None:
        network.fast.undo()
        network.fast = None


class Fast:
    """What `optimize` has done to a network, and how the network then runs."""

    def __init__(self, network: Network, graphs: bool, compile: bool):
        self._network, self.use_graphs = weakref.ref(network), graphs  # weak: what is dropped is freed at once
        self.before = {name: (p.data_ptr(), p.stride()) for name, p in network.named_parameters()}
        self.graphs: dict[Any, Graph] = {}
        self.lock, self.done = threading.Lock(), None  # the graphs of a network share memory: one runs at a time
        self.compiled = list(network.blocks()) if compile and isinstance(network, UNet) else []
        self.compiled_before = [block._compiled_call_impl for block in self.compiled]
        if self.compiled:
            register_all()  # an op that is new to PyTorch would cut a block in two
            for block in self.compiled:
                block.compile(dynamic=False)
        self.renew()

    @property
    def network(self) -> Network:
        return self._network()

    def run(self, x: Tensor, t: Tensor, context: Tensor | KeysValues) -> Tensor:
        predict = self.network.predict
        if self.compiled:  # blocks are one piece of code, of which PyTorch compiles 8 variants and then gives up
            predict = torch._dynamo.config.patch(cache_size_limit=2 * len(self.compiled))(predict)
        return predict(x, t, context)

    @torch.inference_mode(False)
    @torch.no_grad()
    def renew(self) -> None:
        """Lay out the weights that are there now."""
        self.graphs.clear()
        for module in self.network.modules():
            if isinstance(module, Attention):  # one that is given a text, and that as wide as x, does not look at it
                layers = module.to_q, module.to_k, module.to_v
                module.qkv = lay_together([to.weight for to in layers]) if all(map(is_plain, layers)) else None
            if isinstance(module, nn.Conv2d | nn.Conv3d) and self.is_channels_last(module.weight):
                layout = torch.channels_last if isinstance(module, nn.Conv2d) else torch.channels_last_3d
                module.weight.data = module.weight.contiguous(memory_format=layout)
        if isinstance(self.network, UNet):
            parts = [block.res for block in self.network.blocks()]
            of_parts = [[p.emb.weight for p in parts], [p.emb.bias for p in parts], [p.conv1.bias for p in parts]]
            joined = [lay_together(parameters) for parameters in of_parts]
            self.network.time = None if None in joined else tuple(joined)
        self.parts = list(self.network.modules())[1:]
        attentions = [part for part in self.parts if isinstance(part, Attention)]
        self.projections = [to for part in attentions for to in (part.to_q, part.to_k, part.to_v)]
        self.signature = self.sign()

    def is_channels_last(self, weight: Tensor) -> bool:
        """Whether the convolution of this weight gets its input in channels-last memory, wherever it is on CUDA."""
        return weight.is_cuda and (isinstance(self.network, UNet) or pick("group_norm_silu", None, weight) == "triton")

    def sign(self) -> list[Any]:
        """Where in memory every weight is and how it lies, which modules there are, and whether hooks want q, k, v."""
        modules = (self.network, *self.parts)
        tensors = [x for m in modules for x in (*m._parameters.values(), *m._buffers.values()) if x is not None]
        signature: list[Any] = [(x.data_ptr(), x.stride(), x.dtype) for x in tensors]
        signature += [id(part) for m in modules for part in m._modules.values()]
        return signature + [is_watched(layer) for layer in self.projections]

    def undo(self) -> None:
        self.graphs.clear()
        for block, before in zip(self.compiled, self.compiled_before, strict=True):
            block._compiled_call_impl = before
        for module in self.network.modules():
            if isinstance(module, Attention):
                module.qkv = None
        if isinstance(self.network, UNet):
            self.network.time = None
        with torch.inference_mode(False), torch.no_grad():
            for name, p in self.network.named_parameters():
                place, stride = self.before.get(name, (0, p.stride()))
                shares = p.untyped_storage().nbytes() != p.nbytes
                if p.data_ptr() != place and (shares or p.stride() != stride):
                    p.data = torch.empty_strided(p.shape, stride, dtype=p.dtype, device=p.device).copy_(p)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # in a copy of the network there is None

    def predict(self, x: Tensor, t: Tensor, context: Tensor | KeysValues) -> Tensor:
        """`UNet.predict`, as a graph where there may be one."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.run(x, t, context)
        with self.lock:
            if self.sign() != self.signature:
                self.renew()
        # A graph would not call the hooks of the parts; those of the whole are not its business.
        if not self.use_graphs or any(map(is_watched, self.parts)) or not can_capture(x):
            return self.run(x, t, context)
        texts, unet = flatten(context), self.network
        key = (
            *((v.shape, v.dtype, v.device) for v in (x, t, *texts)), isinstance(context, KeysValues),
            repr(unet.config), unet.chunking, unet.free_u, os.environ.get("MINIT2V_KERNELS"),
        )  # fmt: skip
        with self.lock:
            if self.done is not None:
                self.done.wait()  # this stream for that of the call before
            if key not in self.graphs:
                if len(self.graphs) == MOST_GRAPHS:
                    del self.graphs[next(iter(self.graphs))]
                other = next((graph.captured for graph in self.graphs.values()), None)
                self.graphs[key] = Graph(self.run, x, t, context, other)
            y = self.graphs[key](x, t, context)
            if x.is_cuda:
                self.done = torch.cuda.Event()
                self.done.record()
        return y


def is_watched(module: nn.Module) -> bool:
    """Whether somebody wants to see, or change, what goes in and out of the module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer is its weight and no more: no adapter around it, no bias, nothing that computes the weight."""
    plain = type(layer) is Linear and layer.bias is None and type(layer.weight) is nn.Parameter
    return plain and not is_watched(layer)


class Graph:
    """A prediction of one shape, its kernels captured: called again, it copies its input to where they read it.

    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        predict: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        context: Tensor | KeysValues,
        other: "Capture | None",
    ):
        # Tensors of its own, where they will stay: an inference tensor could not be written to outside of its mode.
        self.x, self.t, *self.texts = (torch.empty_like(v).copy_(v) for v in (x, t, *flatten(context)))
        own = self.texts[0] if isinstance(context, Tensor) else unflatten(self.texts, context)
        self.captured = capture(lambda: predict(self.x, self.t, own), x.device, other)

    def __call__(self, x: Tensor, t: Tensor, context: Tensor | KeysValues) -> Tensor:
        self.x.copy_(x)
        self.t.copy_(t)
        torch._foreach_copy_(self.texts, flatten(context))
        self.captured.graph.replay()
        return self.captured.y.clone()  # the next call writes to y


def can_capture(x: Tensor) -> bool:
    """Not under autocast: it keeps casts of the weights, in memory that a graph would not know to be gone."""
    return x.is_cuda and not torch.is_autocast_enabled("cuda") and not torch.cuda.is_current_stream_capturing()


class Capture(NamedTuple):
    graph: Any  # torch.cuda.CUDAGraph
    stream: Any  # torch.cuda.Stream, on which it was captured
    y: Tensor  # where the result is after graph.replay()


capturing = threading.Lock()  # PyTorch: one capture at a time in a process


def capture(run: Callable[[], Tensor], device: torch.device, other: Capture | None) -> Capture:
    """The CUDA work of `run`, to be replayed. It shares the memory of `other`, which never runs at the same time."""
    with capturing, torch.cuda.device(device):
        # First without a graph, on a stream of its own: kernels are compiled, plans and workspaces made, and none of
        # that may happen while capturing.
        now, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(now)
        with torch.cuda.stream(aside):
            for _ in range(3):
                run()
        now.wait_stream(aside)
        # Not on `aside`, whose workspaces lie outside of the graph's memory, nor on the stream that PyTorch has for all
        # captures, which is of the device of the first. What other threads do meanwhile is theirs.
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream() if other is None else other.stream
        pool = None if other is None else other.graph.pool()
        try:
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                y = run()
        except BaseException:
            torch.cuda.set_stream(now)  # which a failed capture leaves undone
            raise
    return Capture(graph, stream, y)


def flatten(context: Tensor | KeysValues) -> list[Tensor]:
    if isinstance(context, Tensor):
        return [context]
    return [x for pair in context.of_blocks if pair is not None for x in pair]


def unflatten(tensors: Sequence[Tensor], like: KeysValues) -> KeysValues:
    left = iter(tensors)
    return KeysValues([None if pair is None else (next(left), next(left)) for pair in like.of_blocks])


def lay_together(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """Parameters (n_i ...) -> one tensor (sum of n_i, ...), of which they are views from now on.

    None where they do not fit together: other dtypes, devices, sizes; one that is another's, or that is computed. Where
    they lie so already, nothing is moved.
    """
    first = parameters[0]
    if len(set(map(id, parameters))) < len(parameters) or any(type(p) is not nn.Parameter for p in parameters):
        return None
    if len({(p.dtype, p.device, p.shape[1:]) for p in parameters}) > 1:
        return None
    place, memory, together = first.storage_offset(), first.untyped_storage().data_ptr(), True
    for p in parameters:
        together &= p.is_contiguous() and p.untyped_storage().data_ptr() == memory and p.storage_offset() == place
        place += p.numel()
    if together:
        return first.detach().as_strided((sum(map(len, parameters)), *first.shape[1:]), first.stride())
    joined = torch.cat([p.detach() for p in parameters])
    for p, view in zip(parameters, joined.split([len(p) for p in parameters]), strict=True):
        p.data = view
    return joined
