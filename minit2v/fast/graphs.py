"""CUDA graphs: the thousand kernels of a prediction are recorded once, and then launched together.

https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_GRAPHS = 4  # per network; each shape of the input needs one, and the oldest is removed


class Capture(NamedTuple):
    graph: Any  # torch.cuda.CUDAGraph
    stream: Any  # torch.cuda.Stream on which it was captured
    y: Tensor  # the result after graph.replay()


class Graph:
    """The captured kernels of a prediction for one shape. A call copies the inputs into the graph's own tensors."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, run: Callable[..., Tensor], inputs: Sequence[Tensor], other: Capture | None):
        # The graph needs its own tensors with fixed addresses. Inference tensors cannot always be written to.
        self.inputs = [torch.empty_like(v).copy_(v) for v in inputs]
        self.captured = capture(lambda: run(*self.inputs), inputs[0].device, other)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, value in zip(self.inputs, inputs, strict=True):
            own.copy_(value)
        self.captured.graph.replay()
        return self.captured.y.clone()  # because the next call overwrites y


class Graphs:
    """The graphs of one network, by the shapes of their inputs. They share memory, so only one runs at a time."""

    def __init__(self) -> None:
        self.graphs: dict[Any, Graph] = {}
        self.lock, self.done = threading.Lock(), None

    def run(self, key: Any, run: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """run(*inputs), captured at the first call with this key and these shapes."""
        key = (*((v.shape, v.dtype, v.device) for v in inputs), key)
        with self.lock:
            if self.done is not None:
                self.done.wait()  # wait for the call before, which may be on another stream
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


capturing = threading.Lock()  # PyTorch allows one capture at a time in a process


def capture(run: Callable[[], Tensor], device: torch.device, other: Capture | None) -> Capture:
    """Captures the CUDA work of `run`. It shares the memory of `other`, so they must not run at the same time."""
    with capturing, torch.cuda.device(device):
        # The first run is without a graph, on another stream. It compiles kernels and allocates workspaces, which is
        # not allowed during capture.
        now, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(now)
        with torch.cuda.stream(aside):
            for _ in range(3):
                run()
        now.wait_stream(aside)
        # The capture needs a new stream. Workspaces of `aside` are outside of the graph's memory, and PyTorch's default
        # stream for captures may be on another device. "thread_local": other threads may use CUDA meanwhile.
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream() if other is None else other.stream
        pool = None if other is None else other.graph.pool()
        try:
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                y = run()
        except BaseException:
            torch.cuda.set_stream(now)  # a failed capture does not restore it
            raise
    return Capture(graph, stream, y)
