"""benchmarks/kernel_resources.py: what the kernels take of three GPUs, compiled here, where none is."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernel_resources.py"
sys.path.insert(0, str(SCRIPT.parent))
import kernel_resources as resources  # noqa: E402

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None and os.environ.get("CI", "").lower() not in ("1", "true"), reason="needs triton"
)
# Kernels that have little to read: a few numbers per group of channels.
NARROW = {"group_norm_coefficients"}


@pytest.fixture(scope="module")
def table():
    return resources.read()


@needs_triton
def test_what_the_networks_ask_for_compiles_as_the_table_says():
    """Every specialisation of float16 is looked up in the table. A telling part of what changed since the table was
    written, kernel or Triton, is compiled for all targets, and one of each kernel that did not change."""
    command = [sys.executable, "-W", "ignore", SCRIPT, "--check", "float16"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + "\nAfter a change of a kernel: python benchmarks/kernel_resources.py"
    assert "; 0 faults" in done.stderr


def test_nothing_in_the_table_spills_or_asks_for_more_than_there_is(table):
    assert [fault for row in table for fault in resources.faults(row)] == []


def test_the_table_loads_16_bytes_at_a_time(table):
    assert [str(row) for row in table if resources.widest(row) < 16 and row.kernel not in NARROW] == []
    assert NARROW < {row.kernel for row in table}


def test_the_table_knows_every_kernel_on_every_target(table):
    assert len({row.key for row in table}) == len(table)
    for kernel in {row.kernel for row in table}:
        for target in resources.MACHINES:
            for dtype in resources.DTYPES:
                rows = [r for r in table if (r.kernel, r.target, resources.of_dtype(r)) == (kernel, target, dtype)]
                assert rows, f"no {kernel} in {dtype} on {target}"


ROW = resources.Row("k", "fp16; D=8", "sm_90", 4, 2, 40, 0, 1024, 12, "16 4", "16", "16", "", "x", "abc", "3.9.0")


@pytest.mark.parametrize("change, complaint", [
    ({"spills": 8}, "spills 8"),
    ({"shared": 300_000}, "takes 300000 bytes of shared memory: there are 232448"),
    ({"blocks": 0}, "fits on no multiprocessor"),
    ({"loads": "16 2"}, "loads 16 2 and copies 16 bytes at a time; in the table 16 4 and 16"),
    ({"copies": "8 4", "loads": "8"}, "loads 8 and copies 8 4 bytes"),
    ({"source": "abd"}, "k was changed since the table was written"),
    ({"specialisation": "fp16; D=9"}, "k[fp16; D=9] on sm_90 is missing in the table"),
    ({"target": "sm_80"}, "on sm_80 is missing"),
    ({"warps": 8}, "is missing"),
])  # fmt: skip
def test_a_table_that_no_longer_holds(change, complaint):
    now = replace(ROW, **change)
    found = resources.compare([now], [now], [ROW])
    assert len(found) == 1 and complaint in found[0]


def test_what_is_compiled_again():
    """All of what changed, of the rest one for each kernel, on one target after the other."""
    targets = resources.MACHINES
    rows = [replace(ROW, specialisation=f"fp16; D={d}", target=target) for d in (8, 16) for target in targets]
    jobs = [resources.Job(row, None, {}, {}, {}, {}) for row in rows]
    both = jobs + [replace(job, row=replace(job.row, kernel="l")) for job in jobs]
    assert [(job.row.kernel, job.row.target) for job in resources.doubtful(both, [job.row for job in both])] == [
        *zip("kl", sorted(targets), strict=False)
    ]
    for change in ({"source": "abd"}, {"triton": "3.8.0"}, {"warps": 8}):
        assert resources.doubtful(jobs, [replace(row, **change) for row in rows]) == jobs
    found = resources.doubtful(jobs, [replace(rows[0], source="abd"), *rows[1:]])
    assert len(found) == 2 and jobs[0] in found


def test_the_table_of_families():
    """Each family without tiles of its own was compiled, with the tiles that _tiles.py says; the worst is listed."""
    from minit2v_kernels import _tiles

    targets = {row["target"] for row in resources.read_families()}
    assert targets == set(resources.OTHERS) and all(_tiles.like(t) in resources.MACHINES for t in resources.OTHERS)
    without = {name for name, family in _tiles.FAMILIES.items() if family.tiles != name and name != "sm_86"}
    assert {name for name in without if any(t.startswith(name) for t in resources.OTHERS)} == without
    rows = resources.by_kernel([ROW, replace(ROW, specialisation="x", spills=4, shared=2048, blocks=7)])
    assert [(r["compiled"], r["spilling"], r["spills"], r["shared"], r["blocks"]) for r in rows] == [(2, 1, 4, 2048, 7)]


@pytest.mark.parametrize("target, tiles, processors", [
    ("sm_80", "sm_80", 108), ("sm_89", "sm_80", 142), ("sm_90", "sm_90", 132), ("sm_121", "sm_80", 132),
    ("gfx942", "gfx942", 304), ("gfx1100", "gfx942", 96), ("gfx1201", "gfx942", 64), ("gfx90a", "gfx942", 132),
    ("meta", "meta", 132), ("cpu", "cpu", 132),
])  # fmt: skip
def test_whose_tiles_a_gpu_gets(target, tiles, processors):
    from minit2v_kernels import _tiles

    assert (_tiles.like(target), _tiles.processors(target)) == (tiles, processors)


def test_a_table_that_holds():
    assert resources.compare([ROW], [], [ROW]) == resources.compare([ROW], [ROW], [ROW]) == []
    better = replace(ROW, loads="16", registers=39)
    assert resources.compare([better], [better], [ROW]) == []


def test_the_file(tmp_path):
    rows = [ROW, replace(ROW, target="gfx942", copies="")]
    resources.write(rows, tmp_path / "table.csv")
    assert resources.read(tmp_path / "table.csv") == sorted(rows, key=lambda row: row.key)
    assert os.listdir(tmp_path) == ["table.csv"]


PTX = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.L1::evict_last.L2::cache_hint.v2.b64 { %rd3, %rd4 }, [ %rd1 + 0 ], %rd2;
    @%p1 ld.global.b16 { %rs1 }, [ %rd1 + 0 ];
    ld.shared.v2.b32 {%r1, %r2}, [%r3];
    ld.param.b64 %rd1, [kernel_param_0];
    cp.async.cg.shared.global [ %r3 + 0 ], [ %rd5 + 0 ], 0x10, %r4;
    cp.async.ca.shared.global [ %r3 + 0 ], [ %rd5 + 0 ], 4, %r4;
    st.global.v2.b32 [ %rd1 + 0 ], { %r1, %r2 };
    st.shared.b8 [%r1], %rs1;
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %f1 }, { %r1 }, { %r2 }, { %f1 };
    wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%f1}, %rd1, %rd2, p, 1, 1, 0, 1;
"""
GCN = """
    buffer_load_dwordx4 v[2:5], v6, s[4:7], 0 offen
    global_load_dwordx2 v[2:3], v[4:5], off
    global_load_ushort v1, v[2:3], off
    buffer_load_short_d16_hi v1, v2, s[4:7], 0 offen
    global_load_sbyte v1, v[2:3], off
    buffer_load_dword v3, s[4:7], 0 offen lds
    ds_read_b128 v[0:3], v4
    s_load_dwordx8 s[0:7], s[0:1], 0x0
    global_store_dwordx4 v[4:5], v[0:3], off
    buffer_store_short v1, v2, s[4:7], 0 offen
    v_mfma_f32_32x32x8_f16 a[0:15], v[0:1], v[2:3], a[0:15]
    .private_segment_fixed_size: 8
    .sgpr_spill_count: 1
    .vgpr_count:     69
    .vgpr_spill_count: 3
"""


def test_what_assembly_says():
    assert resources.ptx_accesses(PTX) == {"loads": {16, 2}, "stores": {8}, "copies": {16, 4}}
    assert resources.gcn_accesses(GCN) == {"loads": {16, 8, 2, 1}, "stores": {16, 2}, "copies": {4}}
    found = [" ".join(filter(None, words)) for words in resources.PTX_MATRIX.findall(PTX)]
    assert found == ["mma m16n8k16", "wgmma.mma_async m64n64k16"]
    assert resources.GCN_MATRIX.findall(GCN) == ["32x32x8"]
    assert resources.gcn_resources(GCN) == (69, 3 + 1 + 2)
    log = "8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\nptxas info : Used 40 registers, 1 barriers"
    assert resources.ptxas_resources(log) == (40, 12)
    with pytest.raises(ValueError, match="says nothing"):
        resources.ptxas_resources("")


@pytest.mark.parametrize("target, registers, shared, warps, blocks", [
    ("sm_80", 32, 0, 4, 16), ("sm_80", 128, 0, 4, 4), ("sm_80", 129, 0, 4, 3), ("sm_80", 255, 0, 8, 1),
    ("sm_80", 32, 81 << 10, 4, 2), ("sm_80", 32, 82 << 10, 4, 1), ("sm_90", 32, 82 << 10, 4, 2),
    ("sm_90", 16, 0, 1, 32), ("sm_90", 255, 0, 16, 0), ("gfx942", 64, 0, 4, 8), ("gfx942", 65, 0, 4, 7),
    ("gfx942", 64, 33 << 10, 4, 1), ("gfx942", 512, 0, 4, 1),
])  # fmt: skip
def test_how_many_blocks_fit(target, registers, shared, warps, blocks):
    assert resources.MACHINES[target].blocks(registers, shared, warps) == blocks


KERNELS = """
import triton
import triton.language as tl
SIZE = tl.constexpr(8)

@triton.jit
def helper(x):
    return x + 1

@triton.jit
def kernel(X, n):
    tl.store(X, helper(n) + SIZE)
"""
CHANGES = [("", ""), ("x + 1", "x + 2"), ("constexpr(8)", "constexpr(9)"), ("+ SIZE", "- SIZE"), ("import", "\nimport")]
LIVE = """
import importlib
import sys
from dataclasses import replace

sys.path[:0] = sys.argv[1:]
import torch
import kernel_resources as resources
from minit2v_kernels import add_layer_norm
from minit2v_kernels._dispatch import Launch, record

x = torch.empty(2, 16, 64, 320, dtype=torch.float16, device="meta")
w = x[0, 0, 0]
with record("sm_90") as launches:
    add_layer_norm(x, x, w, w, impl="triton")
    add_layer_norm(x[:, 1:2, :1], x[:, 1:2, :1], w, w.new_empty(321)[1:], impl="triton")
    add_layer_norm(x, x, w.float(), w, impl="triton")
jobs = [resources.specialise(launch, target) for launch in launches for target in ("sm_90", "gfx942")]
for job in jobs:
    print(job.row.specialisation)
row = resources.compile_job(jobs[0])
tight = resources.compile_job(replace(jobs[0], options={**jobs[0].options, "maxnreg": 32}))
print(row.loads, row.stores, row.spills, tight.spills > 0, tight.registers)

modules = [importlib.import_module(f"kernels{i}") for i in range(5)]
for n in (1, 2, 16, 2**31):
    print(resources.specialise(Launch(modules[0].kernel, (1,), (x, n), {}, 4, 2), "sm_90").row.specialisation)
big = torch.empty(2**30 + 1, dtype=torch.float16, device="meta")
print(resources.specialise(Launch(modules[0].kernel, (1,), (big, 2), {}, 4, 2), "gfx942").row.specialisation)
print(len({resources.source_hash(module.kernel) for module in modules}))
print(resources.source_hash(modules[0].kernel) == resources.source_hash(modules[4].kernel))
"""


@needs_triton
def test_specialised_compiled_and_hashed(tmp_path):
    """Also a kernel that is told to do with fewer registers than it needs: that it spills is seen."""
    for i, change in enumerate(CHANGES):
        (tmp_path / f"kernels{i}.py").write_text(KERNELS.replace(*change))
    env = {
        **os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_DUMP_PTXAS_LOG": "1"
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-c", LIVE, SCRIPT.parent, tmp_path]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tile = "; D=320 BLOCK_R=4 BLOCK_D=512 ADD"
    assert done.stdout.splitlines() == [
        "fp16, rows%16, frames=1, inner=1" + tile,
        "fp16, rows%16, frames=1, inner=1" + tile,
        "fp16, B unaligned, frames=1, inner=1" + tile,
        "fp16, B unaligned, frames=1, inner=1" + tile,
        "fp16, W fp32, rows%16, frames=1, inner=1" + tile,
        "fp16, W fp32, rows%16, frames=1, inner=1" + tile,
        "16 16 0 True 32",
        "fp16, n=1; ", "fp16; ", "fp16, n%16; ", "fp16, n%16 i64; ",
        "fp16, X over 2 GiB; ",
        "4", "True",
    ]  # fmt: skip
