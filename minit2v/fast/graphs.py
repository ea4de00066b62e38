"""CUDA graphs: the thousand kernels of a prediction, recorded once and launched together.

https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_GRAPHS = 4  # of one network: a new shape of its input takes one, and the oldest gives way


class Capture(NamedTuple):
    graph: Any  # torch.cuda.CUDAGraph
    stream: Any  # torch.cuda.Stream, on which it was captured
    y: Tensor  # where the result is after graph.replay()


class Graph:
    """A prediction of one shape, its kernels captured: called again, it copies its inputs to where they read them."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, run: Callable[..., Tensor], inputs: Sequence[Tensor], other: Capture | None):
        # Tensors of its own, where they will stay: an inference tensor could not be written to outside of its mode.
        self.inputs = [torch.empty_like(v).copy_(v) for v in inputs]
        self.captured = capture(lambda: run(*self.inputs), inputs[0].device, other)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, value in zip(self.inputs, inputs, strict=True):
            own.copy_(value)
        self.captured.graph.replay()
        return self.captured.y.clone()  # the next call writes to y


class Graphs:
    """The graphs of one network, by the shapes of their inputs. They share memory: one runs at a time."""

    def __init__(self) -> None:
        self.graphs: dict[Any, Graph] = {}
        self.lock, self.done = threading.Lock(), None

    def run(self, key: Any, run: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """run(*inputs), captured at the first call with this key and these shapes."""
        key = (*((v.shape, v.dtype, v.device) for v in inputs), key)
        with self.lock:
            if self.done is not None:
                self.done.wait()  # this stream for that of the call before
            if key not in self.graphs:
                if len(self.graphs) == MOST_GRAPHS:
                    del self.graphs[next(iter(self.graphs))]
                other = next((graph.captured for graph in self.graphs.values()), None)
                self.graphs[key] = Graph(run, inputs, other)
            y = self.graphs[key](*inputs)
            if y.is_cuda:
                self.done = torch.cuda.Event()
                self.done.record()
        return y

    def clear(self) -> None:
        with self.lock:
            self.graphs.clear()


def can_capture(x: Tensor) -> bool:
    return x.is_cuda and not torch.cuda.is_current_stream_capturing()


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
