"""The table of waves is that of the kernels, and the tiles of matrix products lose little."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


@pytest.fixture(scope="module")
def waves():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import kernel_waves

        yield kernel_waves
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_the_table_is_that_of_the_kernels(waves):
    by_what = {(x.gpu, x.workload, x.shape, x.kernel): x for x in waves.read()}
    now = {(x.gpu, x.workload, x.shape, x.kernel): x for x in waves.lines()}
    assert now == by_what, "run benchmarks/kernel_waves.py"


def test_the_table_of_fusions_is_counted(waves):
    fusion = __import__("fusion")
    assert list(fusion.lines()) == fusion.read(), "run benchmarks/fusion.py"
    best = {name: max((x for x in fusion.read() if x.workload == name and not x.verdict.startswith("no")),
                      key=lambda x: x.gb) for name in fusion.NAMES}  # fmt: skip
    assert {x.verdict for x in best.values()} == {"built"}


def test_no_split_of_a_sum_pays(waves):
    """Where one would, docs/kernels.md must say something else."""
    found = waves.splits(waves.read())
    assert found and all(x.split_us > x.us for x in found)


def test_what_loses_much_has_a_reason(waves):
    lost = {x.kernel for x in waves.read() if x.lost > waves.LOST}
    assert lost <= waves.REASONS.keys()


@pytest.mark.parametrize("op", ["geglu", "temporal_conv", "linear_add"])
def test_no_other_tile_loses_a_tenth_less(waves, op, monkeypatch):
    """Of the shapes that lose more than `LOST` on the GPUs that have tiles of their own."""
    from minit2v_kernels import feed_forward

    tried = []
    best = feed_forward.best_tile

    def look(m, n, choices, target):
        chosen = best(m, n, choices, target)
        count = feed_forward.processors(target)
        times = [-(-feed_forward.programs(m, n, t) // count) * count * t["BLOCK_M"] * t["BLOCK_N"] / (m * n)
                 for t in (chosen, *choices)]  # fmt: skip
        tried.append((times[0], min(times[1:])))
        return chosen

    monkeypatch.setattr(feed_forward, "best_tile", look)
    choose = feed_forward.geglu_tile if op == "geglu" else feed_forward.product_tile
    for work in waves.kernel_shapes.WORKLOADS.values():
        for shape in waves.kernel_shapes.unique(waves.kernel_shapes.unet_calls(work)):
            if shape.op == op:
                n, k = (shape.c, shape.c) if op == "temporal_conv" else (shape.m, shape.d)
                m = shape.make("meta")[0][0].numel() // k
                for target in ("sm_80", "sm_90", "gfx942"):
                    choose(m, n, k, 2, target)
    assert len(tried) > 20
    assert [pair for pair in tried if pair[0] > waves.LOST and pair[1] < 0.9 * pair[0]] == []
