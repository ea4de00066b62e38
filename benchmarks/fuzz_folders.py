"""Folders of models, broken on purpose: each must load, or be refused with one line that names the file, at once.

    python benchmarks/fuzz_folders.py --count 2000 --output benchmarks/results/fuzz_folders.json

A mutant is the embedded model's folder with its JSON, its tokenizer's files or its index changed: bytes anywhere, or
one value become another; every other one has its tokenizer in vocab.json and merges.txt alone. Each is inspected, and
loaded but for the networks that are as they were, and asked for its tokens; the weights stay as they are
(`fuzz_convert.py` breaks those).
"""

import argparse
import json
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import torch

from minit2v.cli.inspect import report
from minit2v.files.embedded import ASSETS
from minit2v.pipelines.base import DiffusionPipeline

SECONDS = 60  # longer is a hang, also on a busy machine
LONGEST = 2000  # characters of a line
HUGE = (-1, 0, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**300, -0.5, 0.5, 1e308, float("nan"), float("inf"), True, False,
        None, "", "x", "1", "\x1b[2J\n", "\ud800", "../../etc", "x" * 10**5, [], [[]], [0], [-1], [None], ["x"], {},
        {"a": 1}, [1] * 1000, {"__type": "AddedToken"})  # fmt: skip
NETWORKS = ("unet", "vae", "text_encoder")
NAMES = ("_class_name", "_minit2v", "x", "", "\x1b[2J", "../../etc", "a/b", "/etc", "..", "unet", "text_encoder", "id",
         "content", "num_attention_heads", "trained_betas", "_use_default_values", "_minit2v_fields", "pad_token",
         "architectures", "safety_checker", "\ud800", "a\nb")  # fmt: skip


def places(content: Any, path: tuple = ()) -> list[tuple]:
    """The way to each value; of what is long only some."""
    found = [path] if path else []
    some = enumerate(content) if isinstance(content, list) else content.items() if isinstance(content, dict) else ()
    items = list(some)
    for key, value in items if len(items) < 40 else items[:10] + items[-10:]:
        found += places(value, (*path, key))
    return found


def change(r: random.Random, content: Any) -> str:
    """One value of a JSON file become another, in place; what was done."""
    *way, last = r.choice(places(content)) if places(content) else (None,)
    for key in way:
        content = content[key]
    what = r.choice(("value", "value", "value", "value", "value", "name", "gone", "more", "negative"))
    if last is None:
        return "empty"
    if what == "gone" and isinstance(content, dict):
        del content[last]
    elif what == "name" and isinstance(content, dict):
        content[r.choice(NAMES)] = content.pop(last)
    elif what == "more" and isinstance(content, dict):
        content[r.choice(NAMES)] = r.choice(HUGE)
    elif what == "negative" and type(content[last]) in (int, float):
        content[last] = r.choice((-content[last], content[last] * 10**6, content[last] + 1, content[last] / 7))
    else:
        content[last] = r.choice(HUGE)
        return "value"
    return what


def spoil(r: random.Random, data: bytes) -> bytes:
    """Bytes of a file changed anywhere."""
    at, end = sorted(r.randrange(len(data) + 1) for _ in range(2))
    pieces = (data[:at], data[:at] + data[end:], data[:end] + data[at:], data[:at] + r.randbytes(4) + data[at + 4 :])
    whole = (b"\xef\xbb\xbf" + data, data + data, data.replace(b"\n", b"\r"), data[::-1], data.replace(b" ", b"  "))
    other = (b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 10**5, b'{"a":' * 10**4, b'{"a": NaN}', b"\0" * 99,
             b"9" * 10**5)  # fmt: skip
    return r.choice((*pieces, *whole, *other))


def mutate(r: random.Random, folder: Path) -> str:
    """Changes one file of a folder; what was done to which."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".txt"))
    path = r.choice([*files, folder / "model_index.json", *folder.glob("*/config.json")])
    name = str(path.relative_to(folder))
    kind = r.choice(("json",) * 7 + ("bytes",) * 3 + ("gone", "file", "shorter"))
    if kind == "json" and path.suffix == ".json":
        content = json.loads(path.read_text())
        did = [change(r, content) for _ in range(r.choice((1, 1, 1, 2)))]
        path.write_text(json.dumps(content))
        return f"{name}: {did[0]}"
    if kind == "gone":
        path.unlink()
    elif kind == "file":
        path.unlink()
        r.choice((path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path.name),
                  lambda: path.symlink_to("/dev/zero")))()  # fmt: skip
    elif kind == "shorter" and path.suffix == ".txt":
        lines = path.read_text().splitlines()
        path.write_text("\n".join(lines[: r.choice((0, 1, 2, len(lines) // 2))]))
    else:
        path.write_bytes(spoil(r, path.read_bytes()))
        kind = "bytes"
    return f"{name}: {kind}"


def _copy(src: str, dst: str) -> None:
    """The weights as links: nothing here changes them."""
    (os.link if src.endswith(".safetensors") else shutil.copy)(src, dst)


def one_line(error: BaseException, folder: Path) -> str:
    line = str(error)
    if "\n" in line or len(line) > LONGEST:
        raise AssertionError(f"not one line: {line[:500]!r}") from None
    if str(folder) not in line:
        raise AssertionError(f"names no file: {type(error).__name__}: {line[:500]!r}") from None
    return line


def trial(folder: Path, same: dict[str, Any], inspected: bool = True) -> str:
    """What becomes of a folder: "loads", or "refused". Other errors pass. same: networks that need no loading."""
    try:
        lines, good = report(str(folder)) if inspected else ([], True)
        for line in lines:
            if len(line) > LONGEST:
                raise AssertionError(f"a line of {len(line)} characters: {line[:300]}")
    except (ValueError, OSError) as error:
        one_line(error, folder)
        good = False
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **same)
        pipe.encode_prompt("a red circle moving right!", None, 1, True)
    except (ValueError, OSError) as error:
        one_line(error, folder)
        return "refused"
    return "loads" if good else "loads, though inspect says it is wrong"


def run(count: int, first: int = 0, model: Path = ASSETS / "shapes", inspect_every: int = 1) -> dict[str, Any]:
    """Counts, the longest trial in seconds, the growth of the process in MiB, and what went wrong, by seed.

    model: the folder that is broken. inspect_every: 4 inspects one in four, which is faster.
    """
    counts, wrong, slowest = Counter[str](), [], 0.0

    def hang(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hang)
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = Path(temporary, "whole")
        shutil.copytree(model, whole)
        assert trial(whole, {}) == "loads"
        networks = {name: getattr(DiffusionPipeline.from_pretrained(whole), name) for name in NETWORKS}
        start_size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for seed in range(first, first + count):
            folder = Path(temporary, f"mutant{seed}")
            shutil.copytree(whole, folder, copy_function=_copy)
            if seed % 2:
                (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
            what, start = mutate(random.Random(seed), folder), time.monotonic()
            signal.alarm(SECONDS)
            try:
                same = {name: x for name, x in networks.items() if not what.startswith((name, "model_index"))}
                counts[f"{what}: {trial(folder, same, seed % inspect_every == 0)}"] += 1
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # also what comes from within a reader
                wrong.append({"seed": seed, "what": what, "error": f"{type(error).__name__}: {str(error)[:300]}"})
            finally:
                signal.alarm(0)
            slowest = max(slowest, time.monotonic() - start)
            shutil.rmtree(folder)
    signal.signal(signal.SIGALRM, before)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start_size) / 1024
    return {"folders": count, "counts": dict(sorted(counts.items())), "slowest_s": round(slowest, 3),
            "grown_mib": round(grown, 1), "wrong": wrong}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    start = time.monotonic()
    result = run(args.count, args.first)
    result |= {"seconds": round(time.monotonic() - start, 1), "date": str(date.today()), "torch": torch.__version__,
               "python": platform.python_version(), "machine": platform.machine(),
               "command": f"python benchmarks/fuzz_folders.py --count {args.count} --first {args.first}"}  # fmt: skip
    text = json.dumps(result, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
