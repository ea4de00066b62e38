"""What each kernel takes of each GPU, without one: registers, spills, shared memory, width of loads, blocks per SM.

    PYTHONPATH=.:kernels:convert python benchmarks/kernel_resources.py                     # brings the table up to date
    PYTHONPATH=.:kernels:convert python benchmarks/kernel_resources.py --fresh             # compiles all of it again
    PYTHONPATH=.:kernels:convert python benchmarks/kernel_resources.py --check float16     # compares some of it

The networks' calls are recorded on `meta` tensors (kernel_shapes.py, and a step of each network), specialised as
Triton's JIT would specialise them, and compiled for an A100 (sm_80), an H100 or H200 (sm_90) and an MI300 (gfx942).
The table, results/kernel_resources.csv, has a line per kernel, specialisation and target. Its columns:

specialisation  types of the pointers ("fp16, MOMENTS fp32": all fp16 but one), what Triton knows of the other arguments
                ("T%16": a multiple of 16; "SPLITS=1"), constants
registers       per thread; of a 64 KB file (NVIDIA) or of 512 (AMD's VGPRs)
spills          bytes (NVIDIA) or registers (AMD) of a thread that do not fit and go through memory
shared          bytes per block
blocks          that a multiprocessor holds at once, by all of the above
loads, stores   widths in bytes of the accesses to global memory, widest first
copies          the same of the asynchronous copies to shared memory
matrix          the matrix instructions
used_by         who calls it so; "extra": a point of kernel_shapes.py beyond the networks
source          a hash of the kernel's text
"""

import argparse
import csv
import hashlib
import inspect
import io
import multiprocessing
import os
import re
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kernel_shapes import TEXT, WORKLOADS, shapes
from torch import Tensor

import minit2v_kernels
from minit2v import fast
from minit2v.memory.live import convolved
from minit2v.models.unet3d import UNet3DConditionModel, UNet3DConfig
from minit2v.models.unet_motion import UNetMotionModel
from minit2v.models.vae import AutoencoderKL, AutoencoderKLConfig
from minit2v_kernels._dispatch import record

TABLE = Path(__file__).parent / "results" / "kernel_resources.csv"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Machine:
    """What a multiprocessor (AMD: compute unit) of a target has. NVIDIA's CUDA guide, table of compute capabilities."""

    backend: str
    arch: Any
    lanes: int  # of a warp
    shared: int  # bytes, of one block at most
    shared_in_all: int
    reserved: int  # bytes of shared memory that each block takes besides
    warps: int = 64  # that are resident at once (NVIDIA)

    def blocks(self, registers: int, shared: int, warps: int) -> int:
        """How many blocks are resident at once."""
        if self.backend == "cuda":  # registers come in 256 per warp, warps by four
            resident = min(self.warps, 65536 // (-(-registers * 32 // 256) * 256) // 4 * 4)
        elif self.lanes == 32:  # RDNA: four SIMDs of 1,536 registers per lane, in 24s, and of 16 warps
            resident = 4 * min(16, 1536 // max(24, -(-registers // 24) * 24))
        else:  # four SIMDs, each of 512 registers per lane, in eights, and of 8 warps
            resident = 4 * min(8, 512 // max(8, -(-registers // 8) * 8))
        return min(resident // warps, 32, self.shared_in_all // (shared + self.reserved) if shared else 32)


# What is compiled whenever a kernel changes, and stands in the table.
MACHINES = {
    "sm_80": Machine("cuda", 80, 32, 163 << 10, 164 << 10, 1 << 10),
    "sm_90": Machine("cuda", 90, 32, 227 << 10, 228 << 10, 1 << 10),
    "gfx942": Machine("hip", "gfx942", 64, 64 << 10, 64 << 10, 0),
}
# Families without tiles of their own, by a GPU of each (minit2v_kernels/_tiles.py, FAMILIES): compiled by --families.
OTHERS = {
    "sm_89": Machine("cuda", 89, 32, 99 << 10, 100 << 10, 1 << 10, 48),
    "sm_100": Machine("cuda", 100, 32, 227 << 10, 228 << 10, 1 << 10),
    "sm_120": Machine("cuda", 120, 32, 99 << 10, 100 << 10, 1 << 10, 48),
    "gfx1100": Machine("hip", "gfx1100", 32, 64 << 10, 128 << 10, 0),
    "gfx1201": Machine("hip", "gfx1201", 32, 64 << 10, 128 << 10, 0),
}
ALL = MACHINES | OTHERS
FAMILIES_TABLE = TABLE.with_name("kernel_families.csv")


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    kernel: str
    specialisation: str
    target: str
    warps: int
    stages: int
    registers: int = 0
    spills: int = 0
    shared: int = 0
    blocks: int = 0
    loads: str = ""
    stores: str = ""
    copies: str = ""
    matrix: str = ""
    used_by: str = ""
    source: str = ""
    triton: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        return self.kernel, self.specialisation, self.target, self.warps, self.stages

    def __str__(self) -> str:
        return f"{self.kernel}[{self.specialisation}] on {self.target}"


@dataclass(frozen=True)
class Job:
    """A row to be, and what the compiler needs for it."""

    row: Row
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, Any]


# What is launched


def recordings(dtype: str, target: str) -> Iterator[tuple[str, list[Any]]]:
    """(who, launches): everything that the networks launch, on `meta` tensors."""
    for shape in shapes():
        op = getattr(minit2v_kernels, shape.op, None)
        if op is not None:  # spatial attention is PyTorch's
            args, kw = shape.make("meta", DTYPES[dtype])
            with record(target) as launches:
                op(*args, **kw, impl="triton")
            yield shape.workload if shape.calls else "extra", launches
    for work in WORKLOADS.values():
        for call in (step, optimized_step, decode):
            with record(target) as launches, layouts_of_cuda(), torch.no_grad():
                call(work, DTYPES[dtype])
            yield work.name, launches


@contextmanager
def layouts_of_cuda() -> Iterator[None]:
    """Convolutions on `meta` return contiguous memory whatever they are given; on CUDA, channels-last if that was."""
    conv2d = F.conv2d

    def call(*args: Any, **kw: Any) -> Tensor:
        y = convolved(*args, **kw)
        return conv2d(*args, **kw) if y is None else y

    F.conv2d = call
    try:
        yield
    finally:
        F.conv2d = conv2d


def step(work: Any, dtype: torch.dtype, laid_out: bool = False) -> None:
    """One call of the UNet's fast path, as a pipeline makes it, with one timestep for all; laid out: with one each."""
    x = torch.empty(work.batch, work.config.in_channels, work.frames, *work.latents, device="meta", dtype=dtype)
    text = torch.empty(work.batch, TEXT, work.config.cross_attention_dim, device="meta", dtype=dtype)
    t = torch.ones(work.batch if laid_out else 1, device="meta")
    predictor(work.config, dtype, laid_out)[1](x, t, text)


def optimized_step(work: Any, dtype: torch.dtype) -> None:
    """The same after `pipe.optimize()`, which lays q, k and v together."""
    step(work, dtype, laid_out=True)


def decode(work: Any, dtype: torch.dtype) -> None:
    """The VAE's decoding of one frame and of all at once."""
    for frames in (1, work.frames):
        z = torch.empty(frames, work.vae.latent_channels, *work.latents, device="meta", dtype=dtype)
        decoder(work.vae, dtype)[1].decode(z)


@cache
def predictor(config: Any, dtype: torch.dtype, laid_out: bool) -> tuple[Any, Any]:
    """(the UNet, its executor)."""
    kind = UNet3DConditionModel if isinstance(config, UNet3DConfig) else UNetMotionModel
    with torch.device("meta"):
        unet = kind(config).to(dtype)
    return unet, fast.optimize(unet) if laid_out else fast.runner(unet)


@cache
def decoder(config: AutoencoderKLConfig, dtype: torch.dtype) -> tuple[Any, Any]:
    """(the VAE, its executor)."""
    with torch.device("meta"):
        vae = AutoencoderKL(config).to(dtype)
    return vae, fast.runner(vae)


@cache
def jit(kernel: Any, target: str) -> tuple[Any, Any]:
    """(Triton's backend, the function that looks at a kernel's arguments)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    machine = ALL[target]
    backend = make_backend(GPUTarget(machine.backend, machine.arch, machine.lanes))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def specialise(launch: Any, target: str) -> Job:
    """As Triton's JIT does it, by its own functions, which here and in `jit` are not public ones. Triton 3.6 to 3.9."""
    from triton import __version__

    kernel, given = launch.kernel, {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    backend, look = jit(kernel, target)
    bound, specialised, _ = look(*launch.args, **launch.constexprs)
    options, signature, constexprs, attrs = kernel._pack_args(backend, given, bound, specialised, given)
    declared = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    row = Row(
        kernel.__name__, describe(signature, constexprs, attrs, declared, ALL[target]), target,
        launch.num_warps, launch.num_stages, source=source_hash(kernel), triton=__version__,
    )  # fmt: skip
    return Job(row, kernel, signature, constexprs, attrs, options.__dict__)


def describe(
    signature: dict[str, str],
    constexprs: dict[tuple[int, ...], Any],
    attrs: dict[tuple[int, ...], Any],
    declared: set[str],
    machine: Machine,
) -> str:
    """All that distinguishes a specialisation, in few words. `declared`: the arguments that always are constants."""
    pointers = {name: kind[1:] for name, kind in signature.items() if kind.startswith("*")}
    usual = Counter(pointers.values()).most_common(1)[0][0]
    words = [usual, *(f"{name} {kind}" for name, kind in pointers.items() if kind != usual)]
    constants = []
    for i, (name, kind) in enumerate(signature.items()):
        known = {key for key, _ in attrs.get((i,), ())}
        if kind == "constexpr":
            value = constexprs[i,]
            if name not in declared:
                words.append(f"{name}={value}")
            elif value is not False:
                constants.append(name if value is True else f"{name}={value}")
        elif kind.startswith("*"):
            if "tt.divisibility" not in known:
                words.append(f"{name} unaligned")
            if machine.backend == "hip" and "tt.pointer_range" not in known:
                words.append(f"{name} over 2 GiB")
        elif kind[0] in "iu":
            word = name + "%16" * ("tt.divisibility" in known) + f" {kind}" * (kind != "i32")
            words += [word] * (word != name)
    return ", ".join(words) + "; " + " ".join(constants)


@cache
def source_hash(kernel: Any) -> str:
    """Of the kernel's text, that of the kernels it calls, and the numbers of its module that it names."""
    seen: dict[str, str] = {}

    def visit(name: str, value: Any) -> None:
        if hasattr(value, "fn") and hasattr(value, "params"):  # a JITFunction
            if name not in seen:
                seen[name] = textwrap.dedent(inspect.getsource(value.fn))
                names = inspect.getclosurevars(value.fn)
                for inner in sorted({**names.globals, **names.nonlocals}.items()):
                    visit(*inner)
        elif not hasattr(value, "__name__"):  # neither module nor function
            seen[name] = repr(getattr(value, "value", value))

    visit(kernel.__name__, kernel)
    return hashlib.sha256("\0".join(f"{k}\0{v}" for k, v in sorted(seen.items())).encode()).hexdigest()[:12]


def jobs(dtypes: Iterable[str] = tuple(DTYPES), targets: Iterable[str] = tuple(MACHINES)) -> list[Job]:
    """Each specialisation that the networks use once, with all who use it."""
    os.environ["MINIT2V_KERNELS"] = "triton"
    found: dict[tuple[Any, ...], Job] = {}
    users: dict[tuple[Any, ...], set[str]] = {}
    for target in targets:
        known: dict[tuple[Any, ...], tuple[Any, ...]] = {}  # most launches of a step are alike
        for who, launches in (recording for dtype in dtypes for recording in recordings(dtype, target)):
            for launch in launches:
                alike = what_counts(launch)
                if alike not in known:
                    job = specialise(launch, target)
                    known[alike] = job.row.key
                    same = found.setdefault(job.row.key, job)
                    if (same.signature, same.constexprs, same.attrs) != (job.signature, job.constexprs, job.attrs):
                        raise AssertionError(f"two specialisations that read the same: {job.row}")
                users.setdefault(known[alike], set()).add(who)
    return [
        replace(job, row=replace(job.row, used_by=" ".join(sorted(users[key]))))
        for key, job in sorted(found.items(), key=lambda item: item[0])
    ]


def what_counts(launch: Any) -> tuple[Any, ...]:
    """Launches of which this is the same are specialised alike."""
    args = (
        (x.dtype, x.data_ptr() % 16, x.untyped_storage().size() >> 31 > 0) if isinstance(x, Tensor) else x
        for x in launch.args
    )
    return launch.kernel, *args, *launch.constexprs.items(), launch.num_warps, launch.num_stages


# What the compiler made of it

PTX_ACCESS = re.compile(r"\b(ld|st)\.(?:\w+\.)*?global((?:\.[\w:]+)*)")
PTX_COPY = re.compile(
    r"\bcp\.async\.c[ag]\.shared\.global[\w.:]*\s*\[[^\]]*\]\s*,\s*\[[^\]]*\]\s*,\s*(0x[0-9a-f]+|\d+)"
)
PTX_MATRIX = re.compile(r"\b(wgmma\.mma_async|mma)\.sync\.aligned\.(?:[a-z]+\.)*?(m\d+n\d+k\d+)|(\btcgen05\.mma)")
GCN_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(load|store)_(?:lds_)?[us]??(byte|short|dword)(?:x(\d))?(.*)")
GCN_BYTES = {"dword": 4, "short": 2, "byte": 1}
GCN_MATRIX = re.compile(r"\bv_mfma_f32_(\d+x\d+x\d+)\w*")


def ptx_accesses(ptx: str) -> dict[str, set[int]]:
    """NVIDIA's assembly -> widths in bytes of its loads, stores and copies."""
    found: dict[str, set[int]] = {"ld": set(), "st": set(), "copy": {int(n, 0) for n in PTX_COPY.findall(ptx)}}
    for kind, words in PTX_ACCESS.findall(ptx):
        vector = re.search(r"\.v(\d)\b", words)
        bits = re.search(r"\.[busf](\d+)\b", words)
        if bits:
            found[kind].add(int(bits[1]) // 8 * (int(vector[1]) if vector else 1))
    return {"loads": found["ld"], "stores": found["st"], "copies": found["copy"]}


def gcn_accesses(asm: str) -> dict[str, set[int]]:
    """AMD's, likewise. A load that ends in `lds` goes to shared memory by itself."""
    found: dict[str, set[int]] = {"loads": set(), "stores": set(), "copies": set()}
    for kind, unit, count, rest in GCN_ACCESS.findall(asm):
        to = "stores" if kind == "store" else "copies" if re.search(r"\blds\b", rest) else "loads"
        found[to].add(GCN_BYTES[unit] * int(count or 1))
    return found


def ptxas_resources(log: str) -> tuple[int, int]:
    """What NVIDIA's assembler says -> (registers, bytes that are spilled)."""
    registers, spilled = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
    if not (registers and spilled):
        raise ValueError(f"ptxas says nothing of registers and spills: {log!r}")
    return int(registers[1]), int(spilled[1])


def gcn_resources(asm: str) -> tuple[int, int]:
    """AMD's assembly -> (vector registers, registers that are spilled)."""
    count = {name: int(n) for name, n in re.findall(r"^\s*\.(\w+):\s+(\d+)$", asm, re.M)}
    spilled = count["vgpr_spill_count"] + count["sgpr_spill_count"] + count["private_segment_fixed_size"] // 4
    return count["vgpr_count"], spilled


def compile_job(job: Job) -> Row:
    """The row, filled in."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    machine = ALL[job.row.target]
    target = GPUTarget(machine.backend, machine.arch, machine.lanes)
    source = ASTSource(job.kernel, job.signature, job.constexprs, job.attrs)
    with redirect_stdout(io.StringIO()) as log:  # $TRITON_DUMP_PTXAS_LOG
        made = triton.compile(source, target=target, options=job.options)
    if machine.backend == "cuda":
        asm = made.asm["ptx"]
        (registers, spills), accesses = ptxas_resources(log.getvalue()), ptx_accesses(asm)
        matrix = {" ".join(filter(None, words)).replace(".mma_async", "") for words in PTX_MATRIX.findall(asm)}
    else:
        asm = made.asm["amdgcn"]
        (registers, spills), accesses = gcn_resources(asm), gcn_accesses(asm)
        matrix = {f"mfma {size}" for size in GCN_MATRIX.findall(asm)}
    shared = made.metadata.shared
    return replace(
        job.row, registers=registers, spills=spills, shared=shared, matrix=", ".join(sorted(matrix)),
        blocks=machine.blocks(registers, shared, job.row.warps),
        **{name: " ".join(map(str, sorted(widths, reverse=True))) for name, widths in accesses.items()},
    )  # fmt: skip


queue: list[Job] = []  # what the processes of compile_all are forked with: kernels cannot be sent


def compile_number(i: int) -> tuple[int, Row | str]:
    try:
        return i, compile_job(queue[i])
    except Exception as error:
        return i, f"{queue[i].row}: does not compile: {type(error).__name__}: {str(error).strip()[-500:]}"


def compile_all(todo: list[Job], processes: int = 2) -> tuple[list[Row], list[str]]:
    """(rows, errors), in as many processes; progress on stderr."""
    global queue
    queue = todo
    results: dict[int, Row | str] = {}
    start = time.monotonic()
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for i, result in pool.imap_unordered(compile_number, range(len(todo))):
            results[i] = result
            if sys.stderr.isatty() or len(results) % 50 == 0 or len(results) == len(todo):
                spent = time.monotonic() - start
                end = "\r" if sys.stderr.isatty() and len(results) < len(todo) else "\n"
                print(f"compiled {len(results)} of {len(todo)}, {spent:.0f} s", end=end, file=sys.stderr, flush=True)
    found = [results[i] for i in range(len(todo))]
    return [r for r in found if isinstance(r, Row)], [r for r in found if isinstance(r, str)]


# The table


def write(rows: list[Row], path: Path = TABLE) -> None:
    temporary = path.with_suffix(".part")
    with temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(row) for row in sorted(rows, key=lambda row: row.key))
    os.replace(temporary, path)


def read(path: Path = TABLE) -> list[Row]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = [f.name for f in fields(Row) if f.type is int]
    return [Row(**{k: int(v) if k in numbers else v for k, v in row.items()}) for row in rows]


def narrowest(row: Row) -> int:
    """Of its loads and copies."""
    return min(map(int, f"{row.loads} {row.copies}".split()), default=16)


def widest(row: Row) -> int:
    return max(map(int, f"{row.loads} {row.copies}".split()), default=16)


def telling(jobs: Iterable[Job]) -> list[Job]:
    """Of each kernel with the same constants the specialisation of which the compiler knows the least."""
    hardest: dict[tuple[Any, ...], Job] = {}
    for job in sorted(jobs, key=lambda job: (len(job.row.specialisation), job.row.key)):
        row = job.row
        constants = row.specialisation.partition("; ")[2]
        hardest.setdefault((row.kernel, constants, row.target, row.warps, row.stages, of_dtype(row)), job)
    return sorted(hardest.values(), key=lambda job: job.row.key)


def doubtful(jobs: list[Job], table: Iterable[Row]) -> list[Job]:
    """Those that may come out otherwise than in the table: another text of the kernel, or another Triton.

    Of what is as it was when the table was written, one for each kernel, on one target after the other: the same
    compiler makes the same code of the same text.
    """
    known = {row.key: (row.source, row.triton) for row in table}
    of_kernels: dict[str, dict[str, Any]] = {}  # kernel -> target -> one of its keys
    for job in jobs:
        of_kernels.setdefault(job.row.kernel, {})[job.row.target] = job.row.key
    each = (sorted(keys.items()) for _, keys in sorted(of_kernels.items()))
    samples = {keys[n % len(keys)][1] for n, keys in enumerate(each)}
    return [
        job for job in jobs
        if job.row.key in samples or known.get(job.row.key) != (job.row.source, job.row.triton)
    ]  # fmt: skip


def faults(row: Row) -> list[str]:
    """What no kernel may do on any target."""
    found = []
    if row.spills:
        found.append(f"{row} spills {row.spills}")
    if row.shared > ALL[row.target].shared:
        found.append(f"{row} takes {row.shared} bytes of shared memory: there are {ALL[row.target].shared}")
    if row.blocks < 1:
        found.append(f"{row} fits on no multiprocessor")
    return found


def compare(wanted: Iterable[Row], compiled: Iterable[Row], table: Iterable[Row]) -> list[str]:
    """What is wrong with the table, or with the kernels since it was written.

    wanted: all that the networks ask for, compiled or not; compiled: what was compiled now.
    """
    known = {row.key: row for row in table}
    found, changed = [], set()
    for row in wanted:
        if row.key not in known:
            found.append(f"{row} is missing in the table")
        elif row.source != known[row.key].source:
            changed.add(row.kernel)
    found += [f"{kernel} was changed since the table was written" for kernel in sorted(changed)]
    for row in compiled:
        found += faults(row)
        old = known.get(row.key)
        if old and (narrowest(row) < narrowest(old) or widest(row) < widest(old)):
            found.append(f"{row} loads {row.loads or '-'} and copies {row.copies or '-'} bytes at a time; "
                         f"in the table {old.loads or '-'} and {old.copies or '-'}")  # fmt: skip
    return found


def by_kernel(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Of each kernel on each target: how many specialisations were compiled, and the worst of them."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.target, row.kernel), []).append(row)
    return [
        {
            "target": target, "kernel": kernel, "compiled": len(group),
            "spilling": sum(row.spills > 0 for row in group),
            "registers": max(row.registers for row in group), "spills": max(row.spills for row in group),
            "shared": max(row.shared for row in group), "of": ALL[target].shared,
            "blocks": min(row.blocks for row in group), "triton": group[0].triton,
        }
        for (target, kernel), group in sorted(groups.items())
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="What each kernel takes of each GPU, found without one.")
    parser.add_argument("--fresh", action="store_true", help="compile also what did not change since the last time")
    parser.add_argument("--check", choices=DTYPES, nargs="+", metavar="DTYPE",
                        help="compare these with the table (float16, bfloat16, float32), and compile a telling part "
                        "of what changed since, and a sample of what did not")  # fmt: skip
    parser.add_argument("--only", metavar="REGEX", help="compile these kernels, print their rows, and write nothing")
    parser.add_argument("--families", nargs="*", choices=OTHERS, metavar="TARGET",
                        help="compile for GPUs without tiles of their own: results/kernel_families.csv")  # fmt: skip
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 is set: nothing would be compiled")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what it is by default up to 3.9
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"

    if args.families is not None:
        sys.exit(families(args.families or list(OTHERS)))
    wanted = jobs(args.check or DTYPES)
    todo, kept = wanted, []
    if args.check:
        todo = doubtful(telling(job for job in wanted if of_dtype(job.row) in args.check), read())
    elif args.only:
        todo = [job for job in wanted if re.search(args.only, job.row.kernel)]
    elif TABLE.exists() and not args.fresh:
        old = {(row.key, row.source, row.triton): row for row in read()}
        same = {job.row: old.get((job.row.key, job.row.source, job.row.triton)) for job in wanted}
        kept = [replace(row, used_by=now.used_by) for now, row in same.items() if row]
        todo = [job for job in wanted if not same[job.row]]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # compiled here and now, not found in a cache
        rows, errors = compile_all(todo)

    if args.check:
        errors += compare([job.row for job in wanted], rows, read())
    elif args.only:
        table = csv.DictWriter(sys.stdout, [f.name for f in fields(Row)], lineterminator="\n")
        table.writeheader()
        table.writerows(map(asdict, rows))
    elif not errors:  # also where some spill: the table says so, and a test fails on it
        write(rows + kept)
    if not args.check:
        errors += [fault for row in rows + kept for fault in faults(row)]
    print(f"{len(rows)} of {len(wanted)} specialisations compiled; {len(errors)} faults", file=sys.stderr)
    sys.exit("\n".join(errors) if errors else 0)


def read_families() -> list[dict[str, Any]]:
    if not FAMILIES_TABLE.exists():
        return []
    with FAMILIES_TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def families(targets: list[str], processes: int = 2) -> int:
    """Compile for these, one after the other, and replace their lines in the table. The exit code: 1 after an error."""
    errors = []
    for target in targets:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TRITON_CACHE_DIR"] = folder
            rows, failed = compile_all(telling(jobs(["float16"], [target])), processes)
        errors += failed
        lines = by_kernel(rows) + [line for line in read_families() if line["target"] != target]
        temporary = FAMILIES_TABLE.with_suffix(".part")
        with temporary.open("w", newline="") as file:
            table = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(sorted(lines, key=lambda line: (line["target"], line["kernel"])))
        os.replace(temporary, FAMILIES_TABLE)
        for fault in (fault for row in rows for fault in faults(row)):
            print(fault, file=sys.stderr)
    print(*errors, sep="\n", file=sys.stderr)
    return int(bool(errors))


def of_dtype(row: Row) -> str:
    """The dtype of the activations: of most pointers, or of those that are not float32."""
    types = set(re.findall(r"\b(?:fp16|bf16)\b", row.specialisation))
    return {"fp16": "float16", "bf16": "bfloat16"}[types.pop()] if types else "float32"


if __name__ == "__main__":
    main()
