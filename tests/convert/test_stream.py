"""Files read by their headers and written tensor by tensor, from and for torch and safetensors."""

import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minit2v_convert.formats import Plan, Step
from minit2v_convert.stream import open_file, replacing, retyped, size_of, write_file

STATE = {
    "a": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "half": torch.arange(7.0).half(),
    "wide": torch.arange(6.0).bfloat16().reshape(2, 3, 1, 1),
    "ids": torch.arange(3)[None],
    "number": torch.tensor(3.0),
    "double": torch.tensor([1 / 3], dtype=torch.float64),
    "none": torch.empty(0, 3),
}


def write(path: Path, kind: str) -> Path:
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save({"state_dict": {"module": STATE}, "epoch": 3} if kind == "nested" else STATE, path,
                   _use_new_zipfile_serialization=kind != "legacy")  # fmt: skip
    return path


def same(have: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert set(have) == set(want)
    for name, x in want.items():
        assert have[name].dtype == x.dtype and torch.equal(have[name], x), name


@pytest.mark.parametrize("kind", ["safetensors", "pickle", "nested", "legacy"])
def test_what_is_there_is_read(tmp_path, kind):
    source = open_file(write(tmp_path / "weights", kind))  # a name that says nothing
    same(source.tensors, STATE)
    assert source.header["wide"] == ((2, 3, 1, 1), "BF16") and source.header["ids"] == ((1, 3), "I64")
    assert (source.nest, source.ignored or {}) == (
        (("state_dict", "module"), {"epoch": "how far the training was"}) if kind == "nested" else ((), {}))


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", ".x.bin"])
@pytest.mark.parametrize("kind", ["safetensors", "legacy"])
def test_what_is_written_is_read_by_torch_and_by_safetensors(tmp_path, kind, name):
    source = open_file(write(tmp_path / "weights", kind))
    plan = Plan(tuple(Step(n, shape, dtype, (n,)) for n, (shape, dtype) in source.header.items()), nest=("state_dict",))
    told = []
    write_file(path := tmp_path / name, plan, lambda step, n: source.read(n), told.append)
    assert sum(told) == size_of(plan) == sum(x.nbytes for x in STATE.values())
    same(open_file(path).tensors, STATE)
    if name == "x.safetensors":
        same(load_file(path), STATE)
        return
    for mapped in (True, False):
        same(torch.load(path, weights_only=True, mmap=mapped)["state_dict"], STATE)
    reader = torch._C.PyTorchFileReader(str(path))
    assert all(reader.get_record_offset(f"data/{n}") % 64 == 0 for n in range(len(STATE)))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # the checksums are right


def test_a_cast_while_writing(tmp_path):
    source = open_file(write(tmp_path / "weights", "safetensors"))
    plan = Plan(tuple(Step(n, shape, dtype, (n,)) for n, (shape, dtype) in source.header.items()))
    write_file(tmp_path / "x.safetensors", retyped(plan, torch.float16), lambda step, n: source.read(n))
    same(load_file(tmp_path / "x.safetensors"),
         {n: x.half() if x.is_floating_point() else x for n, x in STATE.items()})  # fmt: skip
    step = Step("big", (2,), "F16", ("large",))
    for value, says in ((7e4, "does not fit torch.float16: its largest value is 7e"), (float("nan"), "holds NaN")):
        with pytest.raises(ValueError, match=f"'large' {says}"):
            write_file(tmp_path / "y.ckpt", Plan((step,)), lambda *_, v=value: torch.tensor([1.0, v]))


def header_file(path: Path, header: object, data: int = 24, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data))
    return path


def entry(shape: object = (2, 3), dtype: object = "F32", begin: object = 0, end: object = 24) -> dict[str, object]:
    return {"shape": shape, "dtype": dtype, "data_offsets": [begin, end]}


HEADERS = {
    "overlapping": ({"a": entry(), "b": entry(begin=20, end=44)}, "'b' begins at byte 20 of the data, not at 24"),
    "a gap": ({"a": entry(), "b": entry(begin=28, end=52)}, "'b' begins at byte 28"),
    "truncated": ({"a": entry(shape=[2, 4], end=32)}, "truncated.* take 32 bytes, there are 24"),
    "huge": ({"a": entry(shape=[2**62, 4])}, "impossible shape"),
    "a lie": ({"a": entry(shape=[2, 4])}, r"'a' takes 24 bytes, which F32 \[2, 4\] does not"),
    "negative": ({"a": entry(shape=[-2, -3])}, "not whole numbers"),
    "true": ({"a": entry(shape=[True, 6])}, "not whole numbers"),
    "dtype": ({"a": entry(dtype="C64")}, "'a' is of the unknown type 'C64'"),
    "twice": (b'{"a": 1, "b": 2, "a": 3}', "'a' is there twice"),
    "more": ({"a": {**entry(), "stride": [1]}}, "should have a dtype, a shape and data_offsets"),
    "a list": ([1], "truncated, or no safetensors file|broken .a list"),
    "deep": (b"{" + b'"a":[' * 10**5, "recursion|Expecting|depth"),
    "noise": (b"{\xff", "can't decode"),
}


@pytest.mark.parametrize("which", HEADERS)
def test_headers_that_lie(tmp_path, which):
    header, says = HEADERS[which]
    path = header_file(tmp_path / "x.safetensors", header)
    with pytest.raises(ValueError, match=says) as error:
        open_file(path)
    assert str(error.value).startswith(f"{path} is broken (") and "\n" not in str(error.value)


@pytest.mark.parametrize(("length", "says"), [(2**63, "truncated"), (2**26, "truncated"), (1, "header is broken")])
def test_the_length_of_the_header_lies(tmp_path, length, says):
    with pytest.raises(ValueError, match=says):
        open_file(header_file(tmp_path / "x.safetensors", {"a": entry()}, length=length))


def test_a_header_of_gigabytes_is_not_read(tmp_path):
    path = header_file(tmp_path / "x.safetensors", b"{", length=2**33)
    with path.open("r+b") as file:
        file.truncate(2**34)
    with pytest.raises(ValueError, match="a header of 8589934592 bytes is none"):
        open_file(path)


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_pickles_that_want_more_are_refused_with_what_they_want(tmp_path):
    path = tmp_path / "x.ckpt"
    for call, wanted in ((Calls(bytearray, 10**12), "bytearray"), (Calls(exec, "1/0"), "exec"),
                         (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear")):  # fmt: skip
        for new in (True, False):
            torch.save({"x": call}, path, _use_new_zipfile_serialization=new)
            with pytest.raises(ValueError, match=rf"x.ckpt is refused: its pickle wants \S*{wanted}, which weights"):
                open_file(path)


def test_tensors_that_are_less_than_they_say(tmp_path):
    torch.save({"x": torch.zeros(1).expand(10**12)}, path := tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"'x' is \[1000000000000\], and there are fewer numbers behind it"):
        open_file(path)
    torch.save({"x": torch.zeros(3).to_sparse()}, path)
    with pytest.raises(ValueError, match="x.ckpt is (refused|broken)"):
        open_file(path)


def test_interrupted_means_nothing_left_behind(tmp_path):
    (path := tmp_path / "x.bin").write_text("before")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"] and path.read_text() == "before"


def test_five_hundred_broken_files():
    path = Path(__file__).parents[2] / "benchmarks" / "fuzz_convert.py"
    spec = importlib.util.spec_from_file_location("fuzz_convert", path)
    fuzz = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    result = fuzz.run(500)
    assert result["wrong"] == []
    assert result["slowest_s"] < fuzz.SECONDS and result["grown_mib"] < 256
    refused = sum(n for what, n in result["counts"].items() if what.endswith("refused"))
    assert 300 < refused < 500  # most, and not all: some changes only change numbers
