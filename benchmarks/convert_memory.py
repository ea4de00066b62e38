"""The peak of anonymous memory while a file of 5.6 GB is converted: ModelScope's UNet, its 1.4 billion numbers in fp32.

    python benchmarks/convert_memory.py --output benchmarks/results/convert_memory.json

The input has the authors' names, shapes and dtypes around a hole, and takes no disk; each output is really written
(twice 5.6 GB at a time, in --folder) and then removed. Anonymous memory (RssAnon of /proc/self/status) is what the
process needs for itself; pages of mapped files, which the system takes back when it wants to, are counted apart.

A pickle of before torch 1.6 is not a zip archive and cannot be mapped: it is read as a whole, so that its size is added
to the limit. It is really written, all zeros, and its conversion takes 6 GB of memory; --skip-legacy leaves it out.
"""

import argparse
import gzip
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

AUTHORS_FILES = Path(__file__).parents[1] / "tests" / "data" / "authors_files.json.gz"
WAYS = {  # what: source, output, layout, dtype
    "authors' .pth -> diffusers": ("text2video_pytorch_model.pth", "folder", "diffusers", None),
    "diffusers -> authors' .pth": ("folder", "again.pth", "authors", None),
    "authors' .pth -> diffusers, fp16": ("text2video_pytorch_model.pth", "half", "diffusers", "float16"),
    "authors' .pth of before torch 1.6 -> diffusers, fp16": ("legacy.pth", "from_legacy", "diffusers", "float16"),
}
LIMIT = 2**30  # above the interpreter with torch


def memory(what: str) -> int:
    """Bytes, of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"this system does not tell {what}")


def measure(src: str, dst: str, to: str, dtype: str | None) -> dict[str, float]:
    """In this process: seconds and bytes of one conversion."""
    import torch

    from minit2v_convert.convert import convert

    start_size, peaks, stop = memory("RssAnon"), {"RssAnon": 0, "RssFile": 0}, threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            for what in peaks:
                peaks[what] = max(peaks[what], memory(what))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.monotonic()
    convert(src, dst, to, getattr(torch, dtype) if dtype else None)
    seconds = time.monotonic() - start
    stop.set()
    watcher.join()
    return {"interpreter_mib": round(start_size / 2**20, 1), "peak_mib": round(peaks["RssAnon"] / 2**20, 1),
            "above_mib": round((peaks["RssAnon"] - start_size) / 2**20, 1),
            "mapped_peak_mib": round(peaks["RssFile"] / 2**20, 1), "seconds": round(seconds, 1)}  # fmt: skip


def bytes_of(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*.*")) if path.is_dir() else path.stat().st_size


def write_legacy(path: Path, manifest: dict) -> Path:
    """A `torch.save` file of zeros as torch wrote it before 1.6. Zeros that are only read take no memory."""
    import numpy as np
    import torch

    state = {n: torch.from_numpy(np.zeros(shape, np.float32)) for n, (shape, _) in manifest.items()}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where there are 20 GB; the system's temporary folder")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--skip-legacy", action="store_true", help="leave out what cannot be mapped")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        src, dst, to, dtype = args.measure
        print(json.dumps(measure(src, dst, to, dtype or None)))
        return 0

    import torch

    from minit2v_convert.sparse import write_sparse_bin

    results = {}
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        if shutil.disk_usage(folder).free < 20e9:
            raise OSError("this takes 20 GB of disk")
        manifest = json.loads(gzip.decompress(AUTHORS_FILES.read_bytes()))["text2video_pytorch_model"]
        write_sparse_bin(folder / "text2video_pytorch_model.pth", manifest)
        for what, (src, dst, to, dtype) in WAYS.items():
            if src == "legacy.pth":
                if args.skip_legacy:
                    continue
                shutil.rmtree(folder / "half")
                write_legacy(folder / src, manifest)
            size = bytes_of(folder / src)
            out = subprocess.run(
                [sys.executable, __file__, "--measure", str(folder / src), str(folder / dst), to, dtype or ""],
                check=True, stdout=subprocess.PIPE)  # fmt: skip
            limit = LIMIT + (size if src == "legacy.pth" else 0)
            results[what] = {"input_bytes": size, "output_bytes": bytes_of(folder / dst),
                             "limit_above_mib": round(limit / 2**20, 1), **json.loads(out.stdout)}  # fmt: skip
            if src == "folder":
                shutil.rmtree(folder / src)
                (folder / dst).unlink()
    finally:
        shutil.rmtree(folder)
    result = {"conversions": results, "date": str(date.today()),
              "torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(),
              "command": "python benchmarks/convert_memory.py"}  # fmt: skip
    text = json.dumps(result, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")
    return 1 if any(r["above_mib"] > r["limit_above_mib"] for r in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
