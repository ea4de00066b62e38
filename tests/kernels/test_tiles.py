"""Tiles from outside: the table that the package reads, and the search that writes it, here with a clock of its own."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from minit2v_kernels import _tiles
from minit2v_kernels._dispatch import PROVEN, record

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
kernel_shapes = pytest.importorskip("kernel_shapes")
triton = pytest.importorskip("triton")
tune = __import__("tune")

HALF = torch.float16


@pytest.fixture(autouse=True)
def own_table(monkeypatch):
    monkeypatch.delenv("MINIT2V_TILES", raising=False)
    _tiles.use(None)
    yield
    _tiles.use(None)


def shapes(op: str) -> list:
    return [s for s in kernel_shapes.shapes("modelscope") if s.family == op and s.calls]


def launches(shape) -> list:
    import minit2v_kernels

    args, kw = shape.make("meta", HALF)
    with record("sm_90") as found:
        getattr(minit2v_kernels, shape.op)(*args, **kw, impl="triton")
    return found


def test_every_kernel_has_knobs():
    assert set(_tiles.KNOBS) == set(PROVEN)
    assert {name for knobs in _tiles.KNOBS.values() for name in knobs.tile} == set(tune.CHOICES)


@pytest.mark.parametrize("op", PROVEN)
def test_a_table_is_read(op, tmp_path, monkeypatch):
    """Each number of a row arrives where the kernel is launched, for these sizes alone and this device family."""
    shape, other = shapes(op)[0], [s for s in kernel_shapes.shapes("animatediff") if s.family == op and s.calls][1:]
    key, shipped = tune.lookup(shape, HALF, "sm_90")
    assert key[:2] == (op, "sm_90") and tuple(shipped) == _tiles.KNOBS[op].tile
    for name, value in shipped.items():
        if name == "LAUNCHES":  # see below
            continue
        if name in ("BLOCK", "PIXELS"):  # each of them limits the other
            row = {"BLOCK": 4 * shipped["BLOCK"], "PIXELS": 2}
        else:
            row = {name: 2 * value}
        _tiles.write(tmp_path / "tiles.json", {key: row})
        monkeypatch.setenv("MINIT2V_TILES", str(tmp_path / "tiles.json"))
        _tiles.use(None)
        assert tune._tiles.read(tmp_path / "tiles.json") == {key: row}
        found = {}
        for launch in launches(shape):
            place = launch.kernel.__name__.endswith("apply")
            found |= {("APPLY_T" if place and knob == "BLOCK_T" else knob): value for knob, value in {
                **launch.constexprs, "num_warps": launch.num_warps, "num_stages": launch.num_stages}.items()
                if not (place and knob != "BLOCK_T") and "coefficients" not in launch.kernel.__name__}  # fmt: skip
        assert {knob: found[knob] for knob in row} == row
    monkeypatch.delenv("MINIT2V_TILES")
    _tiles.use(None)
    assert tune.lookup(shape, HALF, "sm_90") == (key, shipped)
    assert not other or tune.lookup(other[0], HALF, "sm_90")[0] != key


def test_a_table_says_in_how_many_launches():
    small = next(s for s in shapes("group_norm_silu") if s.launches() == 1)
    key, shipped = tune.lookup(small, HALF, "sm_90")
    assert shipped == {"LAUNCHES": 1} and len(launches(small)) == 1
    _tiles.use({key: {"LAUNCHES": 3}})
    assert len(launches(small)) == 3
    large = next(s for s in shapes("group_norm_silu") if s.launches() == 3)
    _tiles.use({tune.lookup(large, HALF, "sm_90")[0]: {"LAUNCHES": 1}})
    with pytest.raises(ValueError, match="LAUNCHES=1 does not fit x"):
        launches(large)


ROW = {"sizes": {"m": 512, "n": 64, "k": 64, "itemsize": 2}, "tile": {"BLOCK_M": 128}}

NORM = {"sizes": {"segments": 1, "t": 64, "c": 64, "itemsize": 2}, "tile": {"LAUNCHES": 2}}


@pytest.mark.parametrize("text, said", [
    ("[", "not a table of tiles: JSONDecodeError"),
    ("[]", "not a table of tiles"),
    (json.dumps({"geglo": {"sm_90": [ROW]}}), "no kernel 'geglo'; did you mean 'geglu'"),
    (json.dumps({"geglu": {"sm_90": [{"sizes": {}}]}}), "KeyError: 'tile'"),
    (json.dumps({"geglu": {"sm_90": [{**ROW, "sizes": {"m": 1}}]}}), "the sizes must be m, n, k, itemsize"),
    (json.dumps({"geglu": {"sm_90": [{**ROW, "tile": {"BLOCK_MM": 1}}]}}), "'BLOCK_MM' cannot be set; did you mean"),
    (json.dumps({"geglu": {"sm_90": [{**ROW, "tile": {"BLOCK_M": 96}}]}}), "a power of two of at least 16, not 96"),
    (json.dumps({"geglu": {"sm_90": [{**ROW, "tile": {"BLOCK_M": 8}}]}}), "of at least 16, not 8"),
    (json.dumps({"geglu": {"sm_90": [{**ROW, "tile": {"num_stages": "3"}}]}}), "num_stages must be a number"),
    (json.dumps({"group_norm_silu": {"sm_90": [NORM]}}), "LAUNCHES must be 1 or 3, not 2"),
])  # fmt: skip
def test_a_table_that_no_kernel_could_run_with(text, said, tmp_path):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        _tiles.read(tmp_path / "t.json")


def test_a_table_that_is_not_there(monkeypatch):
    monkeypatch.setenv("MINIT2V_TILES", "nowhere.json")
    with pytest.raises(ValueError, match="MINIT2V_TILES: no file nowhere.json"):
        launches(shapes("geglu")[0])


def test_pixels_that_no_tile_holds():
    shape = shapes("temporal_attention")[0]
    key, _ = tune.lookup(shape, HALF, "sm_90")
    _tiles.use({key: {"PIXELS": 2, "BLOCK": 16}})
    with pytest.raises(ValueError, match="2 pixels of 16 frames are more than a tile's 16 rows"):
        launches(shape)


def clock(best: dict[str, int], wrong: dict[str, int] | None = None):
    """Milliseconds that grow with the distance from `best`; a tile with `wrong` in it is no choice, and the fastest."""

    def cost(tile: dict[str, int]) -> float:
        if wrong and wrong.items() <= tile.items():
            return math.inf
        return 1 + sum(abs(math.log2(tile[name] / value)) for name, value in best.items())

    return cost


def test_the_search_finds_the_best_and_not_the_wrong():
    start = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8}
    best = {"BLOCK_M": 32, "BLOCK_N": 256, "num_warps": 4}
    found, ms, tried = tune.search(start, clock(best))
    assert found == best and ms == 1 and len(tried) < 4 * 4 * 5 and tried[0] == clock(best)(start)
    found, ms, _ = tune.search(start, clock(best, wrong={"num_warps": 4}))
    assert found == best | {"num_warps": found["num_warps"]} and found["num_warps"] in (2, 8) and ms == 2
    assert tune.search(start, lambda tile: 1 if tile == start else 0.99)[0] == start  # within the noise
    assert tune.search(start, lambda tile: math.inf)[0] == start


def test_a_search_writes_what_is_faster_and_goes_on_where_it_ended(tmp_path, monkeypatch, capsys):
    wanted = shapes("geglu")[:3]
    path, asked = tmp_path / "tiles.json", []

    def cost_of(shape, key, table):
        asked.append(shape.name)
        return clock({"num_stages": 5}) if shape is wanted[0] else lambda tile: 1.0

    class Budget:
        left = 1.0

    budget = Budget()

    def stops(*args):
        budget.left = 1.0 if not asked else -1.0
        return cost_of(*args)

    table = {}
    assert tune.tune(wanted, table, "sm_90", HALF, path, budget, stops) == [wanted[2].name]  # the time was over
    ((_, tile),) = table.items()
    assert tile == {"num_stages": 5} and _tiles.read(path) == table and len(asked) == 2
    assert "times faster with {'num_stages': 5}" in capsys.readouterr().out
    budget.left = 1.0
    assert tune.tune([*wanted, wanted[2]], table, "sm_90", HALF, path, budget, cost_of) == [] and len(asked) == 3
    budget.left = -1.0
    assert tune.tune(wanted, {}, "sm_80", HALF, path, budget, cost_of) == [s.name for s in wanted] and len(asked) == 3
    monkeypatch.setenv("MINIT2V_TILES", str(path))
    _tiles.use(None)
    assert launches(wanted[0])[0].num_stages == 5 and launches(wanted[1])[0].num_stages != 5


def test_a_search_without_a_gpu():
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no GPU is visible"):
            tune.main(["geglu"])
