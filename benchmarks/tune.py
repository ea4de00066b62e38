"""Search for faster tiles on a GPU, and write them to a table that minit2v_kernels reads.

    PYTHONPATH=.:kernels:convert python benchmarks/tune.py geglu [--budget SECONDS] [--out FILE]
    MINIT2V_TILES=FILE python ...                                      # runs with them; see minit2v_kernels/_tiles.py

For each shape at which a step calls the kernel, the search begins with the shipped tile and changes one number at a
time, as long as that makes the call at least 2 % faster. A tile with which the result is wrong, or which does not fit
the GPU, is passed over. The table is replaced as a whole after every shape; a second run goes on where the first ended.
Shapes for which nothing is faster get no row. Without --out the table is written beside the package, which reads it.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from kernel_shapes import Shape
from measure import Budget, Timed, begin, digits, one_line, relative, synchronize

import minit2v_kernels
from kernels import Contender as Op
from kernels import in_order, judge, right, wide
from minit2v_kernels import _tiles
from minit2v_kernels._dispatch import PROVEN, family, record

Tile = dict[str, int]
Key = tuple[str, str, tuple[int, ...]]
BETTER = 0.98  # of the time: less is noise
CHOICES = {
    "BLOCK_M": (32, 64, 128, 256), "BLOCK_N": (32, 64, 128, 256), "BLOCK_K": (32, 64, 128), "GROUP": (1, 4, 8, 16),
    "num_warps": (1, 2, 4, 8, 16), "num_stages": (1, 2, 3, 4, 5), "PIXELS": (1, 2, 3, 4, 8), "BLOCK": (16, 32, 64, 128),
    "BLOCK_R": (1, 2, 4, 8, 16), "UNROLL": (1, 2, 4, 8), "BLOCK_T": (8, 16, 32, 64), "APPLY_T": (16, 32, 64, 128),
    "LAUNCHES": (1, 3),
}  # fmt: skip


def search(start: Tile, cost: Callable[[Tile], float]) -> tuple[Tile, float, list[float]]:
    """(the best tile, its cost, the costs of all that were tried: the start's first), changing one number at a time.

    cost: infinite where a tile is not a choice.
    """
    tried: dict[tuple[int, ...], float] = {}

    def of(tile: Tile) -> float:
        key = tuple(tile[name] for name in start)
        if key not in tried:
            tried[key] = cost(tile)
        return tried[key]

    best, least, better = start, of(start), True
    while better:
        better = False
        for name in start:
            for value in CHOICES[name]:
                tile = best | {name: value}
                if (found := of(tile)) < BETTER * least:
                    best, least, better = tile, found, True
    return best, least, list(tried.values())


def lookup(shape: Shape, dtype: torch.dtype, target: str) -> tuple[Key, Tile]:
    """Where the table has the shape, and the tile that the kernel takes by itself."""
    args, kw = shape.make("meta", dtype)
    with record(target) as launches, _tiles.asking() as asked:
        getattr(minit2v_kernels, shape.op)(*args, **kw, impl="triton")
    key = asked[-1]
    taken: Tile = {}
    if len(launches) > 1:
        taken["LAUNCHES"] = 3
    for launch in launches:  # of a norm: the sums, which have UNROLL, and the last pass
        apply = launch.kernel.__name__ == "group_norm_apply"
        known = {**launch.constexprs, "num_warps": launch.num_warps, "num_stages": launch.num_stages}
        known = {"APPLY_T": known["BLOCK_T"]} if apply else known
        if launch.kernel.__name__ == "group_norm_whole":
            return key, {"LAUNCHES": 1}
        if len(launches) == 1 or apply or "UNROLL" in known:
            taken |= known
    return key, {name: taken[name] for name in _tiles.KNOBS[key[0]].tile}


def cost_of(shape: Shape, key: Key, before: _tiles.Table, device: torch.device, dtype: torch.dtype, seconds: float):
    """tile -> milliseconds of the shape's call on this device; inf where it is wrong or does not run."""
    inputs = [shape.make(device, dtype, seed) for seed in range(2)]
    op = getattr(minit2v_kernels, shape.op)
    with torch.no_grad():
        end_args, end_kw = wide(*shape.tail(*inputs[0]))
        exact, plain = op(*end_args, **end_kw, impl="torch"), op(*inputs[0][0], **inputs[0][1], impl="torch")
    exact, plain = (y if isinstance(y, tuple) else (y,) for y in (exact, plain))
    theirs = max(relative(x[-len(want) :], want) for x, want in zip(plain, exact, strict=True))
    contender = Op(partial(op, impl="triton"))

    def cost(tile: Tile) -> float:
        _tiles.use({**before, key: tile})
        try:
            verdict = judge(shape, contender, *inputs[0], exact, plain)
            if not right(verdict, theirs, dtype):
                return math.inf
            with torch.no_grad():
                clock = Timed(lambda i: contender.run(*inputs[i][0], **inputs[i][1]), len(inputs), device)
                clock.sample(seconds)
            return clock.summary()["ms"]
        except Exception as error:  # too much shared memory, a tile that the compiler refuses
            print(f"  {tile}: {one_line(error, 100)}", flush=True)
            synchronize(device)  # raises where the device is lost
            return math.inf

    return cost


def tune(
    wanted: list[Shape], table: _tiles.Table, target: str, dtype: torch.dtype, path: Path, budget: Budget,
    cost_of: Callable[..., Callable[[Tile], float]],
) -> list[str]:  # fmt: skip
    """Search for each shape and write `path` after each. Returns the names of shapes that the budget left out."""
    left_out = []
    done = path.with_suffix(".done")  # what was searched, also where the shipped tile stays
    names = set(done.read_text().splitlines()) if done.exists() else set()
    for shape in wanted:
        _tiles.use({})  # as the kernel chooses by itself
        key, shipped = lookup(shape, dtype, target)
        here = " ".join(map(str, [*key[:2], *key[2]]))
        if here in names:  # also of another shape that the kernel tiles alike: the more important one came first
            continue
        if budget.left < 0:
            left_out.append(shape.name)
            continue
        best, ms, tried = search(shipped, cost_of(shape, key, table))
        if best != shipped:
            table[key] = {name: value for name, value in best.items() if shipped[name] != value}
            _tiles.write(path, table)
        names.add(here)
        with done.open("a") as file:
            file.write(here + "\n")
        said = f"{digits(tried[0] / ms, 3)} times faster with {table[key]}" if best != shipped else "stays"
        print(f"{shape.name}: {digits(tried[0])} ms, {said}; {len(tried)} tiles tried", flush=True)
    _tiles.use(None)
    return left_out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=PROVEN)
    parser.add_argument("--workloads", nargs="+", default=[])
    parser.add_argument("--budget", type=float, default=300, help="seconds; what does not fit is listed")
    parser.add_argument("--seconds", type=float, default=0.05, help="of samples per tile")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--out", type=Path, default=_tiles.FILE, help="the table, which is added to")
    options = parser.parse_args(arguments)
    device, dtype = begin(False, options.dtype)
    table = _tiles.read(options.out) if options.out.exists() else {}
    wanted = [shape for shape in in_order(options.workloads, [options.op]) if shape.calls]
    made = partial(cost_of, device=device, dtype=dtype, seconds=options.seconds)
    left_out = tune(wanted, table, family(device), dtype, options.out, Budget(options.budget), made)
    print(f"left out, over the budget: {len(left_out)} of {len(wanted)}", *left_out, sep="\n  ")
    print(options.out)


if __name__ == "__main__":
    main()
