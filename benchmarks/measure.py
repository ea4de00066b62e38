"""How the benchmarks of this folder measure: clocks, rotated buffers, ceilings, and a file that is always whole.

On a GPU time is taken by CUDA events, around calls that each get other buffers than the one before, so that the cache
does not flatter; calls too short for that are counted many at a time inside a CUDA graph. On a CPU, where everything
here runs too, by the wall clock: a dry run, which proves that the benchmark works and nothing about a GPU.
"""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"
SHORT = 0.2  # ms: below this a call is timed inside a CUDA graph
DRY = "dry run on a CPU: proves that the benchmark runs; its numbers say nothing about a GPU"


class Budget:
    """Seconds that a part may take."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def begin(cpu: bool, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """What a benchmark runs on, and in: a GPU, float16 and no TF32, or for a dry run the CPU and Triton's interpreter.

    Before Triton is imported, which then decides whether it interprets. SystemExit where no GPU is visible.
    """
    if cpu and find_spec("triton"):
        os.environ["TRITON_INTERPRET"] = "1"
    if not cpu and not torch.cuda.is_available():
        raise SystemExit("no GPU is visible: --cpu makes a dry run without one")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device("cpu" if cpu else "cuda"), getattr(torch, dtype or ("float32" if cpu else "float16"))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cache_bytes(device: torch.device) -> int:
    """Of the last cache before memory; 64 MB where the driver does not say."""
    if device.type != "cuda":
        return 0
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64_000_000


def number_of_sets(moved: int, device: torch.device) -> int:
    """Among how many buffer sets of `moved` bytes to rotate, so that each has left the cache when its turn comes."""
    return max(2, min(128, -(-3 * cache_bytes(device) // max(moved, 1))))


class Timed:
    """run(i), i = 0, 1, ... sets - 1 and again, warmed up and ready to be sampled."""

    def __init__(
        self, run: Callable[[int], Any], sets: int, device: torch.device, graph: bool = True, host: bool = False
    ):
        self.run, self.sets, self.device = run, sets, device
        self.host = host  # whether what the host does counts, too
        self.graph: Any = None
        self.count, self.next, self.ms = 1, 0, []
        self.without_graph: str | None = None  # why a short call is not timed in a graph
        self.step()
        if device.type != "cuda":
            return
        self.step()  # in the first modules are loaded and kernels compiled
        synchronize(device)
        once = self.elapsed(1)
        if once < SHORT:
            once = self.elapsed(10) / 10
            self.count = max(sets, min(256, round(1.0 / max(once, 0.002))))
            self.count = -(-self.count // sets) * sets
            if graph:
                self.capture()
            if self.graph is None:  # fewer, so that the host has queued them while the GPU is kept busy
                self.count = sets

    def step(self) -> Any:
        self.next = (self.next + 1) % self.sets
        return self.run(self.next)

    def capture(self) -> None:
        """By hand: torch.cuda.graph() would collect garbage and give all cached memory back, every time."""
        torch.cuda.synchronize(self.device)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin()
                try:
                    # Kept until all are captured: results in one and the same place would stay in the cache.
                    kept = [self.run(i % self.sets) for i in range(self.count)]
                finally:
                    graph.capture_end()
            del kept
            graph.replay()
            torch.cuda.synchronize(self.device)
            self.graph = graph
        except Exception as error:  # what cannot be captured is timed call by call, and says so
            self.without_graph = one_line(error)
            torch.cuda.synchronize(self.device)

    def busy(self, calls: int) -> None:
        """Work for the GPU while the host queues so many calls: about half a millisecond for each, and one more."""
        if not self.host:
            torch.cuda._sleep(1_000_000 * (1 + calls))

    def elapsed(self, calls: int) -> float:
        """Milliseconds of so many calls."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(calls):
                self.step()
            return 1e3 * (time.perf_counter() - start)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.busy(calls)
        start.record()
        kept = [self.step() for _ in range(calls)]  # as in `capture`: each result in a place of its own
        end.record()
        end.synchronize()
        del kept
        return start.elapsed_time(end)

    def sample(self, seconds: float, least: int = 5) -> None:
        """Add samples for so long, and `least` at least."""
        end, n = time.perf_counter() + seconds, 0
        while n < least or time.perf_counter() < end:
            if self.graph is not None:
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                self.busy(1)
                start.record()
                self.graph.replay()
                stop.record()
                stop.synchronize()
                self.ms.append(start.elapsed_time(stop) / self.count)
            else:
                self.ms.append(self.elapsed(self.count) / self.count)
            n += 1

    def summary(self) -> dict[str, Any]:
        out = {**spread(self.ms), "graph": self.graph is not None}
        if self.without_graph:
            out["without_graph"] = self.without_graph
        return out


def spread(ms: list[float]) -> dict[str, Any]:
    """Median, and between what the middle eight tenths lie: two medians closer than that are equal."""
    ordered = sorted(ms)
    low, high = ordered[len(ms) // 10], ordered[-1 - len(ms) // 10]
    return {"ms": digits(statistics.median(ms)), "low": digits(low), "high": digits(high), "samples": len(ms)}


def digits(x: float, n: int = 4) -> float:
    """x to n significant digits."""
    return float(f"{x:.{n}g}")


def in_turns(timed: dict[str, Timed], seconds: float, rounds: int = 2, least: int = 3) -> None:
    """Sample each for `seconds` in all, in turns, back and forth: what drifts, drifts for all."""
    for n in range(rounds):
        for name in list(timed) if n % 2 == 0 else list(timed)[::-1]:
            timed[name].sample(seconds / rounds, least)


def relative(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| (Frobenius norms); infinite where got is not finite."""
    wide = torch.promote_types(torch.float32, want.dtype)
    norm, total, error = want.to(wide).norm().double(), 0.0, 0.0
    for a, b in zip(got.flatten(0, -2).split(1 << 20), want.flatten(0, -2).split(1 << 20), strict=True):
        total = (a.to(wide) - b.to(wide)).norm().double().item()
        error += total**2
    error = (error**0.5) / max(norm.item(), 1e-300)
    return error if error == error else float("inf")


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is full of NaN: what an op does not write shows, also where the right result was there before."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(x: Tensor) -> Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() and x.device.type != "meta" else x

    torch.empty = lambda *args, **kw: poison(empty(*args, **kw))
    torch.empty_like = lambda *args, **kw: poison(empty_like(*args, **kw))
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, empty_like


def ceilings(device: torch.device, seconds: float = 0.5) -> dict[str, Any]:
    """What this device reaches at best: a large copy, bytes read and written, and large matrix products."""
    gpu = device.type == "cuda"
    n = 1 << (30 if gpu else 22)
    pairs = [[torch.randint(-128, 127, (n,), dtype=torch.int8, device=device) for _ in range(2)] for _ in range(2)]
    copy = Timed(lambda i: pairs[i][0].copy_(pairs[i][1]), 2, device)
    copy.sample(seconds)
    out: dict[str, Any] = {"copy_gb_s": digits(2 * n / statistics.median(copy.ms) / 1e6), "copy": copy.summary()}
    del pairs, copy
    size = 8192 if gpu else 256
    for dtype in (torch.float16, torch.bfloat16) if gpu else (torch.float32,):
        pairs = [[torch.randn(size, size, device=device, dtype=dtype) for _ in range(2)] for _ in range(2)]
        product = Timed(lambda i, pairs=pairs: pairs[i][0] @ pairs[i][1], 2, device)
        product.sample(seconds)
        name = str(dtype).removeprefix("torch.")
        out[f"{name}_tflop_s"] = digits(2 * size**3 / statistics.median(product.ms) / 1e9)
        out[name] = product.summary()
    out["what"] = f"copy of {n >> 20} MiB; products of {size} x {size}, random numbers"
    return out


def matrix_ceiling(found: dict[str, Any], dtype: torch.dtype) -> float | None:
    """TFLOP/s of `ceilings` in this dtype, where it was measured."""
    return found.get(f"{str(dtype).removeprefix('torch.')}_tflop_s")


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def sources() -> str:
    """A digest of the code that is measured and of what measures it: results of other code are not added to."""
    files = sorted(path for folder in ("minit2v", "kernels", "benchmarks") for path in (REPO / folder).rglob("*.py"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(REPO).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def machine(device: torch.device) -> dict[str, Any]:
    """Everything that a reader of the numbers must know."""
    out: dict[str, Any] = {"device": "cpu", "dry_run": DRY}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        out = {
            "device": about.name,
            "memory_gib": round(about.total_memory / 2**30, 1),
            "multiprocessors": about.multi_processor_count,
            "l2_mb": round(cache_bytes(device) / 1e6, 1),
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver(),
        }
    out |= {name: version(name) for name in ("torch", "triton", "diffusers")}
    out |= {
        "python": platform.python_version(),
        "sources": sources(),
        "commit": git("rev-parse", "--short", "HEAD") or os.environ.get("COMMIT"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": os.environ.get("BENCHMARK_COMMAND") or command(),
    }
    return out


def command() -> str:
    return " ".join(["python", *map(os.path.relpath, sys.argv[:1]), *sys.argv[1:]])


def git(*words: str) -> str | None:
    try:
        return subprocess.run(["git", *words], cwd=REPO, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # a checkout without its history
        return None


def driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def one_line(error: BaseException, most: int = 200) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= most else text[: most - 3] + "..."


class Results:
    """A JSON file that is replaced as a whole after every addition, so that whatever happens leaves what was measured.

    What is in it already is kept, and need not be measured again, if it is of the same device, versions and sources.
    """

    SAME = ("device", "torch", "triton", "diffusers", "sources")

    def __init__(self, path: Path, device: torch.device, fresh: bool = False):
        self.path, self.saved = path, 0.0
        self.data: dict[str, Any] = {"machine": machine(device)}
        if not fresh and path.exists():
            before = json.loads(path.read_text())
            if all(before["machine"].get(key) == self.data["machine"].get(key) for key in self.SAME):
                self.data = before

    def save(self, at_most_every: float = 0.0) -> None:
        if time.monotonic() < self.saved + at_most_every:
            return
        self.saved = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(temporary, self.path)

    def part(self, name: str) -> dict[str, Any]:
        return self.data.setdefault(name, {})


def default_folder(device: torch.device) -> Path:
    """Results of a GPU under its name; a dry run's go where the system keeps what is thrown away."""
    if device.type != "cuda":
        return Path(tempfile.gettempdir()) / "minit2v-dry-run"
    name = torch.cuda.get_device_name(device).lower()
    return RESULTS / "gpu" / "".join(c if c.isalnum() else "-" for c in name).strip("-")


def table(rows: Iterable[Iterable[Any]]) -> str:
    """Rows of cells as columns, the first one to the left."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    )
