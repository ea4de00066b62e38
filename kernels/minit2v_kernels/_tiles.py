"""Tiles from outside: block sizes, warps and stages from a table, in place of those that a kernel would choose.

$MINIT2V_TILES names the file; without it `tiles.json` beside this module is read, if there is one. It is read once, at
the first kernel. benchmarks/tune.py searches on a GPU and writes it:

    {"geglu": {"sm_90": [{"sizes": {"m": 512, "n": 1280, "k": 320, "itemsize": 2}, "tile": {"BLOCK_M": 128}}]}}

A row is for exactly these sizes. What it does not name stays as the kernel chooses it.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ._dispatch import nearest

FILE = Path(__file__).with_name("tiles.json")
PRODUCT = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP", "num_warps", "num_stages")


class Knobs(NamedTuple):
    """Of one kernel: the sizes by which its table is read, and what a row may set."""

    sizes: tuple[str, ...]
    tile: tuple[str, ...]


KNOBS = {
    "group_norm_silu": Knobs(("segments", "t", "c", "itemsize"), ("UNROLL", "BLOCK_T", "APPLY_T", "LAUNCHES")),
    "temporal_attention": Knobs(("frames", "width", "itemsize"), ("PIXELS", "BLOCK", "num_warps", "num_stages")),
    "geglu": Knobs(("m", "n", "k", "itemsize"), PRODUCT),
    "add_layer_norm": Knobs(("d", "itemsize"), ("BLOCK_R", "num_warps")),
    "temporal_conv": Knobs(("m", "n", "c", "itemsize"), PRODUCT),
    "linear_add": Knobs(("m", "n", "k", "itemsize"), PRODUCT),
}
AT_LEAST_16 = ("BLOCK", "BLOCK_M", "BLOCK_N", "BLOCK_K")  # for tl.dot
ANY_NUMBER = ("PIXELS", "GROUP", "num_stages", "LAUNCHES")  # all others are powers of two



class Family(NamedTuple):
    """Of devices: whose tiles they get, how many multiprocessors their largest has, and why these tiles."""

    tiles: str
    processors: int
    why: str


# Tiles are chosen for three families. The others get those of the one that is most like them, and
# benchmarks/kernel_resources.py --families compiles them there: benchmarks/results/kernel_families.csv.
FAMILIES = {
    "sm_80": Family("sm_80", 108, "A100"),
    "sm_86": Family("sm_80", 84, "A40, RTX 30: the same matrix units; of 99 KiB of shared memory the tiles take 64"),
    "sm_89": Family("sm_80", 142, "L4, L40S, RTX 40: as sm_86"),
    "sm_90": Family("sm_90", 132, "H100, H200: larger tiles, for 227 KiB of shared memory"),
    "sm_100": Family("sm_80", 148, "B200: what is right for any NVIDIA GPU; nobody has counted larger tiles there"),
    "sm_120": Family("sm_80", 188, "RTX 50, RTX PRO 6000: matrix units and shared memory as sm_86"),
    "gfx942": Family("gfx942", 304, "MI300"),
    "gfx11": Family("gfx942", 96, "RX 7900: the same 64 KiB of shared memory; warps of 32, so half the threads"),
    "gfx12": Family("gfx942", 64, "RX 9070: as gfx11"),
}


def like(target: str) -> str:
    """The family whose tiles a device gets: also for a newer one than the table has. "cpu" and "meta" stay."""
    if target in FAMILIES or target[:5] in FAMILIES:  # gfx1100 is a gfx11
        return FAMILIES.get(target, FAMILIES.get(target[:5], FAMILIES["sm_80"])).tiles
    return "gfx942" if target.startswith("gfx") else "sm_80" if target.startswith("sm_") else target


def processors(target: str) -> int:
    """Multiprocessors of such a device; 132 where that is not known."""
    known = FAMILIES.get(target) or FAMILIES.get(target[:5])
    return known.processors if known else 132


Table = dict[tuple[str, str, tuple[int, ...]], dict[str, int]]  # (kernel, device family, sizes) -> tile
Plan = TypeVar("Plan", bound=Callable[..., Any])

table: Table | None = None
asked: list[tuple[str, str, tuple[int, ...]]] | None = None
plans: list[Any] = []


def planned(plan: Plan) -> Plan:
    """functools.cache, of plans that hold as long as the table does."""
    plans.append(cache(plan))
    return plans[-1]


def given(kernel: str, target: str, *sizes: int) -> dict[str, int]:
    """What the table sets for these sizes on this device family; {} where it has no row."""
    global table
    if table is None:
        table = from_environment()
    if asked is not None:
        asked.append((kernel, target, sizes))
    return table.get((kernel, target, sizes), {})


def from_environment() -> Table:
    setting = os.environ.get("MINIT2V_TILES")
    if setting and not Path(setting).is_file():
        raise ValueError(f"MINIT2V_TILES: no file {setting}")
    return read(Path(setting)) if setting else read(FILE) if FILE.exists() else {}


def use(new: Table | None) -> None:
    """Take these tiles from now on; None: those of the environment, read anew. Other threads must not run kernels."""
    global table
    table = new
    for plan in plans:
        plan.cache_clear()


@contextmanager
def asking() -> Iterator[list[tuple[str, str, tuple[int, ...]]]]:
    """What kernels look up in the table while they make new plans."""
    global asked
    use(table)
    before, asked = asked, []
    try:
        yield asked
    finally:
        asked = before


def read(path: Path) -> Table:
    """The file's rows. ValueError that names the row where a kernel could not run with it."""
    try:
        found = json.loads(path.read_text())
        rows = [
            (kernel, target, row["sizes"], row["tile"])
            for kernel, of_kernel in found.items() for target, of_target in of_kernel.items() for row in of_target
        ]  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a table of tiles: {type(error).__name__}: {error}") from None
    return dict(checked(path, *row) for row in rows)


def checked(path: Path, kernel: str, target: str, sizes: Any, tile: Any) -> Any:
    if kernel not in KNOBS:
        raise ValueError(f"{path}: there is no kernel {kernel!r}{nearest(kernel, KNOBS)}")
    knobs, row = KNOBS[kernel], f"{path}: {kernel} on {target}, {sizes}"
    if not isinstance(sizes, dict) or sorted(sizes) != sorted(knobs.sizes):
        raise ValueError(f"{row}: the sizes must be {', '.join(knobs.sizes)}")
    for name, value in tile.items():
        if name not in knobs.tile:
            raise ValueError(f"{row}: {name!r} cannot be set{nearest(name, knobs.tile)}")
        least = 16 if name in AT_LEAST_16 else 1
        if type(value) is not int or value < least or name not in ANY_NUMBER and value & (value - 1):
            kind = "a number" if name in ANY_NUMBER else "a power of two"
            raise ValueError(f"{row}: {name} must be {kind} of at least {least}, not {value!r}")
        if name == "LAUNCHES" and value not in (1, 3):
            raise ValueError(f"{row}: LAUNCHES must be 1 or 3, not {value!r}")
    return (kernel, target, tuple(sizes[name] for name in knobs.sizes)), tile


def write(path: Path, rows: Table) -> None:
    """As a file that `read` takes, whole or not at all."""
    found: dict[str, dict[str, list[Any]]] = {}
    for (kernel, target, sizes), tile in sorted(rows.items(), key=lambda row: row[0]):
        named = dict(zip(KNOBS[kernel].sizes, sizes, strict=True))
        found.setdefault(kernel, {}).setdefault(target, []).append({"sizes": named, "tile": tile})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(temporary, path)
