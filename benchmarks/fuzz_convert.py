"""Files of weights, broken on purpose: each must be read, or refused with one line, at once and in little memory.

    python benchmarks/fuzz_convert.py --count 10000 --output benchmarks/results/fuzz_convert.json

A mutant is a small valid file (safetensors, torch.save, torch.save of before 1.6, a trainer's checkpoint) with its
bytes changed anywhere, or with one lie in it: lengths, offsets, sizes, dtypes, names, or a pickle that wants more than
tensors.
"""

import argparse
import base64
import io
import json
import platform
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import zipfile
from argparse import Namespace
from collections import Counter, defaultdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from minit2v_convert.detect import detect
from minit2v_convert.formats import to_diffusers
from minit2v_convert.stream import open_file

SECONDS = 20  # longer is a hang, also on a busy machine


def bases() -> dict[str, bytes]:
    """Valid files of four kinds."""
    state = {
        "temb.weight": torch.arange(35.0).reshape(5, 7), "conv_in.bias": torch.ones(3, dtype=torch.float16),
        "input_blocks.0.0.weight": torch.zeros(4, 2, 3, 3), "steps": torch.tensor(3), "none": torch.zeros(0, 3),
        "decoder.half": torch.ones(2, 3, dtype=torch.bfloat16),
    }  # fmt: skip
    new, old = io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": state, "epoch": 3}, new)
    torch.save(state, old, _use_new_zipfile_serialization=False)
    return {"safetensors": save(state), "pickle": new.getvalue(), "legacy": old.getvalue(), "trainer": _trainer(state)}


def _trainer(state: dict[str, Any]) -> bytes:
    """With what trainers put beside weights: paths, sets, bytes, numbers of NumPy."""
    beside = {"a": Path("/x"), "b": {1, 2}, "c": b"\xff\0", "d": np.float64(1), "e": np.arange(3), "f": Namespace(x=1),
              "g": defaultdict(dict, a=1), Namespace: torch.device("cpu")}  # fmt: skip
    torch.save({"state_dict": state, "callbacks": beside, "loops": beside}, out := io.BytesIO())
    return out.getvalue()


# ------------------------------------------------------------------------------------------------------------- mutants


def flip(r: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 5, 20))):
        out[r.randrange(len(out))] = r.choice((0, 1, 0x7F, 0x80, 0xFF, r.randrange(256)))
    return bytes(out)


def flip_early(r: random.Random, data: bytes) -> bytes:
    """In the first bytes, where the lengths are."""
    n = min(len(data), 160)
    return flip(r, data[:n]) + data[n:]


def truncate(r: random.Random, data: bytes) -> bytes:
    return data[: r.randrange(len(data))]


def lengthen(r: random.Random, data: bytes) -> bytes:
    return data + r.randbytes(r.choice((1, 8, 1000)))


def splice(r: random.Random, data: bytes) -> bytes:
    """A piece taken out, doubled, or put elsewhere."""
    a, b = sorted(r.randrange(len(data)) for _ in range(2))
    piece, rest = data[a:b], data[:a] + data[b:]
    at = r.randrange(len(rest) + 1)
    return r.choice((rest, data[:b] + piece + data[b:], rest[:at] + piece + rest[at:]))


def number(r: random.Random, data: bytes) -> bytes:
    """Four or eight bytes become a size that is a lie."""
    width = r.choice((4, 8))
    value = r.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)) % 2 ** (8 * width)
    at = r.randrange(max(1, len(data) - width))
    return data[:at] + value.to_bytes(width, "little") + data[at + width :]


def _with_header(data: bytes, text: bytes, length: int | None = None) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data[end:]


def lie(r: random.Random, data: bytes) -> bytes:
    """A safetensors header with one wrong entry."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    name = r.choice(sorted(header))
    entry = header[name]
    huge = r.choice((-1, 2**31, 2**62, 2**64, 10**300, 1e308, 1.5, True, None, "1", []))
    what = r.randrange(10)
    if what == 0:
        entry["data_offsets"] = [n + r.choice((-4, 1, 4, 28)) for n in entry["data_offsets"]]
    elif what == 1:
        entry["data_offsets"][r.randrange(2)] = huge
    elif what == 2:
        entry["shape"] = r.choice((huge, [huge], [huge, 0], [2**40, 2**40, 0], [1] * 100, [0] * 5000))
    elif what == 3:
        entry["dtype"] = r.choice(("F32", "F16", "I64", "F4", "C64", "", None, 7, ["F32"], "F32" * 1000))
    elif what == 4:
        header[name] = r.choice((None, [], 3, "x" * 10**5, {**entry, "more": 1}, {"dtype": "F32"}))
    elif what == 5:
        del header[name]
    elif what == 6:
        header[r.choice(("\0", "x" * 10**5, "../../x", "\ud800", "", "a\nb"))] = header.pop(name)
    elif what == 7:  # the same name again
        text = json.dumps(header).encode()
        return _with_header(data, text[:-1] + b"," + json.dumps({name: entry}).encode()[1:])
    elif what == 8:
        text = r.choice((b"[" * 10**5, b"{" * 10**5, b'{"a":' * 10**4, b"{}", b"[]", b"null", b"{", b"9" * 10**5,
                         b'{"a":NaN}', b"\xff{}", json.dumps(header).encode("utf-16")))  # fmt: skip
        return _with_header(data, text)
    else:
        return _with_header(data, json.dumps(header).encode(), r.choice((0, 7, 2**25 + 1, 2**40, 2**63, 2**64 - 1)))
    return _with_header(data, json.dumps(header).encode())


OPCODES = [b"\x80\x02", b"(", b"}", b"t", b"\x85", b"\x86", b"R", b"b", b"s", b"u", b"a", b"e", b"Q", b"0", b"2",
           b"h\0", b"q\0", b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f", b"J\xff\xff\xff\x7f",
           b"\x8b\xff\xff\xff\x7f", b"N.", b"X\xff\xff\xff\xff", b"\x8e" + b"\xff" * 8,
           b"\x95" + b"\xff" * 8, b"\x94", b"\x93", b"\x81", b"(lp0\n",
           b"cbuiltins\nbytearray\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n", b"csubprocess\nrun\n",
           b"c_codecs\nencode\n", b"cargparse\nNamespace\n", b"c__builtin__\nset\n", b"X\3\0\0\0hex",
           b"ctorch._utils\n_rebuild_tensor_v2\n", b"I9999999999999999999\n", b"(ios\nsystem\n", b"."]  # fmt: skip


def operations(r: random.Random, data: bytes) -> bytes:
    """Operations put into the pickle of a torch.save file, whose archive stays whole."""
    text, rest = _pickle_of(data)
    for _ in range(r.choice((1, 2, 8))):
        at = r.randrange(len(text))
        text = text[:at] + r.choice(OPCODES) + text[at + r.choice((0, 0, 1, 4)) :]
    return _archive(text, rest)


def pickle_bytes(r: random.Random, data: bytes) -> bytes:
    text, rest = _pickle_of(data)
    return _archive(r.choice((flip, number, splice, truncate))(r, text), rest)


def bomb(r: random.Random, data: bytes) -> bytes:
    """What would run, or unfold, if it were only let."""
    text, rest = _pickle_of(data)
    what = r.randrange(7)
    if what == 0:
        text = b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."
    elif what == 1:
        module, name = r.choice((("os", "system"), ("posix", "system"), ("subprocess", "Popen"), ("builtins", "eval"),
                                 ("numpy", "zeros"), ("torch", "zeros"), ("torch.serialization", "load")))  # fmt: skip
        text = f"\x80\x02c{module}\n{name}\n".encode("latin-1") + b"X\x04\0\0\0true\x85R."
    elif what == 2:  # tuples of tuples, as the key of a dictionary: 2^60 steps to hash
        text = b"\x80\x02}" + b"K\1" + b"".join(b"q%c" % n + b"h%c\x86" % n for n in range(100, 160)) + b"Ns."
    elif what == 3:
        text = b"\x80\x02" + b"(" * 10**5 + b"t" * 10**5 + b"."
    elif what == 4:
        return _archive(bytes(10**7), rest, zipfile.ZIP_DEFLATED)
    elif what == 5:  # a tensor of which all numbers are one
        big = io.BytesIO()
        torch.save({"x": torch.zeros(1).expand(r.choice((10**9, 10**15)))}, big)
        return big.getvalue()
    else:  # the size of a storage
        text = text.replace(b"K#", b"J\xff\xff\xff\x7f", 1)
    return _archive(text, rest)


def _pickle_of(data: bytes) -> tuple[bytes, dict[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        rest = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (n for n in rest if n.endswith("/data.pkl"))
    return rest.pop(name), {n.split("/", 1)[1]: x for n, x in rest.items()}


def _archive(text: bytes, rest: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in {"data.pkl": text, **rest}.items():
            archive.writestr(f"archive/{name}", content)
    return out.getvalue()


def entry(r: random.Random, data: bytes) -> bytes:
    """A field of the zip archive's directory."""
    out = bytearray(data)
    places = [n for n in range(len(out) - 46) if out[n : n + 4] in (b"PK\1\2", b"PK\3\4", b"PK\5\6")]
    at = r.choice(places) + r.randrange(4, 46)
    struct.pack_into("<I", out, min(at, len(out) - 4), r.choice((0, 1, 2**31, 2**32 - 1, r.randrange(2**32))))
    return bytes(out)


ANY = (flip, flip_early, truncate, lengthen, splice, number)
MUTATIONS = {
    "safetensors": (*ANY, lie, lie, lie, lie, lie, lie),
    "pickle": (*ANY, operations, operations, operations, pickle_bytes, pickle_bytes, bomb, bomb, entry),
    "legacy": ANY,
    "trainer": (*ANY, operations, operations, operations, pickle_bytes, pickle_bytes),
}


def mutant(seed: int, files: dict[str, bytes]) -> tuple[str, bytes]:
    """(what was done, the file), the same for the same seed; but torch.save of before 1.6 names storages by address."""
    r = random.Random(seed)
    kind = r.choice(("safetensors", "pickle", "pickle", "legacy", "trainer"))
    mutate = r.choice(MUTATIONS[kind])
    return f"{kind}: {mutate.__name__}", mutate(r, files[kind])


# -------------------------------------------------------------------------------------------------------------- trials


def trial(path: Path) -> str:
    """Read a file whole and say what it is: "read", or the line with which it was refused. Other errors pass."""
    try:
        source = open_file(path)
        for x in source.tensors.values():
            x.clone()
    except ValueError as error:
        line = str(error)
        if "\n" in line or len(line) > 600 or str(path) not in line:
            raise AssertionError(f"not one line that names the file: {line[:1000]}") from None
        return line.removeprefix(str(path))
    try:
        kind = detect(source.header)
        kind.describe()
        to_diffusers(kind, source.header)
    except ValueError as error:
        if "\n" in str(error) or len(str(error)) > 2000:
            raise AssertionError(f"not one line: {str(error)[:1000]}") from None
    return "read"


def run(count: int, first: int = 0) -> dict[str, Any]:
    """Counts, the longest trial in seconds, the growth of the process in MiB, and what went wrong, by seed."""
    files, counts, wrong = bases(), Counter[str](), []
    slowest = 0.0

    def hang(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hang)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (path := Path(folder, f"whole.{name}")).write_bytes(data)
            assert trial(path) == "read", name
        start_size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for seed in range(first, first + count):
            what, data = mutant(seed, files)
            path = Path(folder, "mutant" + random.Random(seed).choice((".safetensors", ".bin", ".ckpt")))
            path.write_bytes(data)
            start = time.monotonic()
            signal.alarm(SECONDS)
            try:
                said = trial(path)
                counts[f"{what}: {'read' if said == 'read' else 'refused'}"] += 1
            except BaseException as error:  # also KeyboardInterrupt and the like, from within a reader
                if isinstance(error, KeyboardInterrupt):
                    raise
                wrong.append({"seed": seed, "what": what, "error": f"{type(error).__name__}: {str(error)[:300]}",
                              "file": base64.b64encode(data).decode()})  # fmt: skip
            finally:
                signal.alarm(0)
            slowest = max(slowest, time.monotonic() - start)
            path.unlink()
    signal.signal(signal.SIGALRM, before)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start_size) / 1024
    return {"files": count, "counts": dict(sorted(counts.items())), "slowest_s": round(slowest, 3),
            "grown_mib": round(grown, 1), "wrong": wrong}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    start = time.monotonic()
    result = run(args.count, args.first)
    result |= {"seconds": round(time.monotonic() - start, 1), "date": str(date.today()), "torch": torch.__version__,
               "python": platform.python_version(), "machine": platform.machine(),
               "command": f"python benchmarks/fuzz_convert.py --count {args.count} --first {args.first}"}  # fmt: skip
    text = json.dumps(result, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
