"""Files read by their headers and written tensor by tensor, from and for torch and safetensors."""

import codecs
import importlib.util
import json
import os
import pickle
import re
import signal
import sys
import types
import zipfile
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import numpy as np
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
        (("state_dict", "module"), {"epoch": "the progress of the training"}) if kind == "nested" else ((), {}))


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
    "truncated": ({"a": entry(shape=[2, 4], end=32)}, "truncated.* take 32 bytes, but there are 24"),
    "huge": ({"a": entry(shape=[2**62, 4])}, "impossible shape"),
    "a lie": ({"a": entry(shape=[2, 4])}, r"'a' takes 24 bytes, which does not fit F32 \[2, 4\]"),
    "negative": ({"a": entry(shape=[-2, -3])}, "not whole numbers"),
    "true": ({"a": entry(shape=[True, 6])}, "not whole numbers"),
    "dtype": ({"a": entry(dtype="C64")}, "'a' has the unknown dtype 'C64'"),
    "twice": (b'{"a": 1, "b": 2, "a": 3}', "it has 'a' twice"),
    "more": ({"a": {**entry(), "stride": [1]}}, "must have a dtype, a shape and data_offsets"),
    "a list": ([1], "truncated, or not a safetensors file|broken .a list"),
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
    with pytest.raises(ValueError, match="its header has 8589934592 bytes, and the limit is"):
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
            with pytest.raises(ValueError, match=rf"x.ckpt is refused: its pickle imports \S*{wanted}, which may run"):
                open_file(path)


@pytest.fixture
def lightning(monkeypatch):
    """What a run of Lightning saves, written by stand-ins that are gone when it is read."""
    names = {"pytorch_lightning.callbacks.model_checkpoint": "ModelCheckpoint", "omegaconf.dictconfig": "DictConfig"}
    made = {}
    for module, name in names.items():
        made[name] = type(name, (), {"__module__": module})
        for n in range(module.count(".") + 1):
            package = ".".join(module.split(".")[: n + 1])
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        setattr(sys.modules[module], name, made[name])
    config = made["DictConfig"]()
    config._content = {"lr": 1e-4, "path": Path("/x"), "what": {1, 2}, "raw": b"\xff"}
    return {
        "epoch": 840, "global_step": np.int64(7), "pytorch-lightning_version": "1.4.2", "state_dict": dict(STATE),
        "callbacks": {made["ModelCheckpoint"]: {"monitor": "val/loss", "best_model_score": torch.tensor(0.1),
                                                "current_score": np.float64(0.2), "history": np.arange(3)}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}}], "lr_schedulers": [defaultdict(dict, a={})],
        "hyper_parameters": config, "loops": {"fit": Namespace(x=1), "seen": frozenset([1]), "on": torch.device("cpu")},
        "MixedPrecision": {"scale": 2.0},
    }  # fmt: skip


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("new", [True, False])
def test_what_trainers_put_beside_weights_is_left_out_and_not_imported(tmp_path, monkeypatch, lightning, new, mmap):
    torch.save(lightning, path := tmp_path / "v1-5-pruned.ckpt", _use_new_zipfile_serialization=new)
    monkeypatch.undo()
    assert not any(name.startswith(("pytorch_lightning", "omegaconf")) for name in sys.modules)
    source = open_file(path, mmap)
    same(source.tensors, STATE)
    assert source.nest == ("state_dict",) and source.ignored.keys() == lightning.keys() - {"state_dict"}
    assert not any(name.startswith(("pytorch_lightning", "omegaconf")) for name in sys.modules)
    with pytest.raises(pickle.UnpicklingError, match="Unsupported global"):  # torch itself trusts nothing more
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("new", [True, False])
def test_what_a_trainer_has_no_reason_to_put_there_is_refused(tmp_path, monkeypatch, lightning, new):
    """Beside the names of trainers; and a trainer's object is not a weight."""
    module = types.ModuleType("pytorch_lightning_")
    monkeypatch.setitem(sys.modules, "pytorch_lightning_", module)
    module.Evil = type("Evil", (), {"__module__": "pytorch_lightning_"})
    path = tmp_path / "x.ckpt"
    for value, wanted in ((Calls(os.system, "touch /tmp/x"), "system"), (Calls(eval, "1"), "eval"),
                          (Calls(bytearray, 10**12), "bytearray"), (module.Evil, "pytorch_lightning_.Evil"),
                          (Calls(codecs.encode, "41" * 9, "hex"), "_codecs.encode with another encoding than Latin-1"),
                          (Calls(getattr, "a", "b"), "getattr")):  # fmt: skip
        torch.save({**lightning, "callbacks": {"x": value}}, path, _use_new_zipfile_serialization=new)
        with pytest.raises(ValueError, match=f"x.ckpt is refused: its pickle imports .*{wanted}, which may run"):
            open_file(path)
    for content in ({"state_dict": {"x": lightning["hyper_parameters"]}}, {"x": lightning["hyper_parameters"]},
                    lightning["hyper_parameters"], {"state_dict": lightning["hyper_parameters"]}):  # fmt: skip
        torch.save(content, path, _use_new_zipfile_serialization=new)
        with pytest.raises(ValueError, match="x.ckpt (holds a|holds more than weights:) .*DictConfig"):
            open_file(path)


def test_copies_do_not_change_with_the_file(tmp_path):
    path = write(tmp_path / "x.safetensors", "safetensors")
    mapped, copied = open_file(path).tensors, open_file(path, mmap=False)
    tensors = copied.tensors
    same(tensors, STATE)
    with path.open("r+b") as file:  # in place, as no careful program does
        file.seek(-4 * STATE["double"].nbytes, 2)
        file.write(bytes(4 * STATE["double"].nbytes))
    same(tensors, STATE)
    assert not all(torch.equal(mapped[n], x) for n, x in STATE.items())
    with pytest.raises(ValueError, match="x.safetensors is broken .*: the file has changed since it was opened"):
        copied.read("a")
    os.truncate(path, path.stat().st_size - 8)
    same(tensors, STATE)
    with pytest.raises(ValueError, match="has changed since it was opened"):
        copied.read("a")
    for kind in ("pickle", "legacy"):
        same(open_file(write(tmp_path / "x.ckpt", kind), mmap=False).tensors, STATE)


def test_tensors_that_are_less_than_they_say(tmp_path):
    torch.save({"x": torch.zeros(1).expand(10**12)}, path := tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"'x' has the shape \[1000000000000\], but its data are shorter"):
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


def test_temporary_names_meet_nobody_else_s(tmp_path, monkeypatch):
    """Neither another thread's or container's with the same number, nor a link that waits there."""
    path, names = tmp_path / "weights.safetensors", []
    with replacing(path) as one, replacing(path) as two:
        names += [one.name, two.name]
        one.write_text("one"), two.write_text("two")
        assert one.stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert path.read_text() == "one" and os.listdir(tmp_path) == [path.name]
    assert names[0] != names[1] and all(re.fullmatch(r"\.weights-[0-9a-f]{32}\.safetensors", n) for n in names)
    monkeypatch.setattr("secrets.token_hex", lambda n: "0")
    (tmp_path / "victim").write_text("kept")
    (tmp_path / ".weights-0.safetensors").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match=r"cannot write .*weights.safetensors: \[Errno 17\]"), replacing(path) as third:
        third.write_text("lost")
    assert (tmp_path / "victim").read_text() == "kept" and path.read_text() == "one"


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_nothing_behind(tmp_path, number, forked):
    """In a program that does not handle them; one that does keeps its handler, and one that ignores them goes on."""

    def child():
        if how == "handled":
            signal.signal(number, lambda *_: print("handled"))
        elif how == "ignored":
            signal.signal(number, signal.SIG_IGN)
        with replacing(tmp_path / how / "x") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), number)
            temporary.write_text("whole")
        assert signal.getsignal(number) != signal.SIG_DFL

    for how, out, left in (("plain", "", []), ("handled", "handled\n", ["x"]), ("ignored", "", ["x"])):
        assert forked(child).wait() == (-number if how == "plain" else 0, out)
        assert os.listdir(tmp_path / how) == left and (not left or (tmp_path / how / "x").read_text() == "whole")


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
