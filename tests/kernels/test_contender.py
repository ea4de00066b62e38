"""benchmarks/kernels.py --contender: a kernel of one's own is judged before a time is shown, and faults are found."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from minit2v_kernels._dispatch import OPS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None and os.environ.get("CI", "").lower() not in ("1", "true"), reason="needs triton"
)


def python(*words: str, folder: Path = HERE, code: int = 0) -> tuple[str, str]:
    paths = [str(folder), *(str(ROOT / name) for name in ("benchmarks", "", "kernels", "convert"))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "MINIT2V_KERNELS": ""}
    env["TRITON_INTERPRET"] = "1"
    done = subprocess.run([sys.executable, "-W", "ignore", *words], env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


JUDGE = """
import json, torch
from dataclasses import replace
import contender, faulty

def shapes_of(op):  # few, and with all that the op can do
    found = contender.of_op(op, True, "tiny-unet3d", "tiny-motion")
    if op == "temporal_attention":
        found = [s for s in found if s.f == 5 and not s.window]
        return [*found, replace(found[0], causal=False)]
    if op == "group_norm_silu":
        few = [s for s in found if (s.c, s.frames) in ((16, 1), (16, 3)) and s.n < 4]
        return [few[0], *(s for s in few if s.emb or s.c2)]
    return [found[0], *(s for s in found if getattr(s, "residual", 0) or getattr(s, "positions", 0))][:2][-1:]

def until_a_fault(verdicts):
    for verdict in verdicts:
        yield verdict
        if verdict.fault:
            return

for op, faults in faulty.FAULTS.items():
    more = ["no_masks", "nothing"] if op == "temporal_attention" else []
    for name in (op, *(op + "_" + fault for fault in faults), *more):
        impl = "faulty:" + name
        verdicts = list(until_a_fault(contender.judge_all(shapes_of(op), impl, (torch.float32,), torch.device("cpu"))))
        print(json.dumps([name, *contender.report(op, impl, verdicts)]))
"""


@pytest.fixture(scope="module")
def judged():
    """What is said of each function of faulty.py, and whether it may be timed."""
    return {name: (said, good) for name, said, good in map(json.loads, python("-c", JUDGE)[0].splitlines())}


def table(name: str) -> dict:
    """A table of faulty.py, which cannot be imported here: Triton decides at its import whether it interprets."""
    tree = ast.parse((HERE / "faulty.py").read_text())
    known: dict = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            target = node.targets[0]
            names = [x.id for x in getattr(target, "elts", [target])]
            if names[0] in ("NEVER", name):
                value = eval(compile(ast.Expression(node.value), "faulty.py", "eval"), {}, known)
                known.update(zip(names, value if len(names) > 1 else [value], strict=True))
    return known[name]


FAULTS = table("FAULTS")


@needs_triton
@pytest.mark.parametrize("op, fault", [(op, fault) for op, faults in FAULTS.items() for fault in faults])
def test_a_faulty_kernel_is_found(judged, op, fault):
    said, good = judged[f"{op}_{fault}"]
    assert not good and "WRONG" in said and re.search(FAULTS[op][fault], said), said


@needs_triton
@pytest.mark.parametrize("op", OPS)
def test_a_right_kernel_is_right(judged, op):
    assert len(FAULTS[op]) >= 4
    said, good = judged[op]
    assert good and re.search(r"(\d+) of \1 cases are right\n  the largest error", said) and "WRONG" not in said


@needs_triton
def test_what_a_kernel_does_not_do_is_no_fault(judged):
    """It is listed. A kernel that does nothing is not right."""
    said, good = judged["no_masks"]
    assert good and "refused: temporal_attention(b=1, f=5, p=3, h=2, d=8, causal), float32: NotImplemented" in said
    said, good = judged["nothing"]
    assert not good and "0 of 0 cases" in said


SCRIPT = str(ROOT / "benchmarks" / "kernels.py")


@needs_triton
def test_the_command(tmp_path):
    """The kernel that the docs show, outside of the repository: judged, on the CPU not timed. A wrong one ends it."""
    text = (ROOT / "docs" / "kernels.md").read_text()
    (code,) = re.findall(r"```py\n(import torch\nimport triton\n.*?)```", text, re.S)
    wrong = code.replace("tl.abs(ago) < WINDOW", "tl.abs(ago) <= WINDOW")
    assert wrong != code and "--contender temporal_attention=my_attention:attend" in text
    (tmp_path / "my_attention.py").write_text(code)
    (tmp_path / "my_wrong_attention.py").write_text(wrong)
    words = [SCRIPT, "--cpu", "--workloads", "tiny-motion", "--contender"]
    out, _ = python(*words, "temporal_attention=my_attention:attend", folder=tmp_path)
    assert "temporal_attention = my_attention:attend: 12 of 12 cases are right" in out and "No times" in out
    words[3] = "tiny-unet3d"  # which has a window
    out, _ = python(*words, "temporal_attention=my_wrong_attention:attend", folder=tmp_path, code=1)
    assert re.search(r"WRONG: temporal_attention\(.*window=2\), float32: relative error", out) and "No times" not in out


@pytest.mark.parametrize("given, said", [
    ("temporal_attentoin=a:b", "unknown op 'temporal_attentoin'; did you mean 'temporal_attention'?"),
    ("temporal_attention=triton", "must be OP=package.module:function, not 'temporal_attention=triton'"),
    ("geglu=nowhere_at_all:f", "geglu: cannot import 'nowhere_at_all'"),
])  # fmt: skip
def test_errors_are_one_line(given, said, capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # main sets it
    kernels = __import__("kernels")
    with pytest.raises(SystemExit) as end:
        kernels.main(["--cpu", "--contender", given])
    text = capsys.readouterr().err + str(end.value)
    assert said in text


def test_what_a_step_takes_in_all(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    kernels = __import__("kernels")
    calls, right = {"modelscope": 3}, {"right": True}
    entries = {
        "a": {"calls_in": calls, "contenders": {"m:f": {"ms": 1, **right}, "torch": {"ms": 2, **right}}},
        "b": {"calls_in": calls, "contenders": {"m:f": {"ms": 2, **right}, "torch": {"ms": 2, "right": False}}},
    }
    rows = [line.split() for line in kernels.over_a_step(entries, ["m:f", "torch"]).splitlines()]
    assert rows == [["ms", "of", "a", "step", "m:f", "torch"], ["modelscope", "9.0", "-"]]


def test_the_memory_of_a_judge(monkeypatch):
    """Fresh memory is NaN, arguments keep their strides, what lies around them is watched."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import torch

    contender = __import__("contender")
    memory, places = contender.Memory(torch.device("cpu")), {}
    whole = torch.randn(2, 3, 5, 4)
    q, k = (memory.place(x, places) for x in whole.unbind(2)[:2])
    assert q.stride() == whole.unbind(2)[0].stride() and torch.equal(k, whole.unbind(2)[1])
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() and len(places) == 1
    with memory.watching():
        made = [torch.empty(3, 4), torch.empty_like(q), q.new_empty(2, dtype=torch.float16)]
        assert all(x.isnan().all() for x in made) and not torch.zeros(2, 3).any() and not memory.fault()
        assert made[1].stride() == torch.randn(2, 3, 5, 4).unbind(2)[0].contiguous().stride()
    assert not torch.empty.__name__.startswith("call")
    q[0, 0, 0] += 1
    assert memory.fault() == "changes its arguments"
    torch.as_strided(made[2], (1,), (1,), made[2].storage_offset() - 1).zero_()
    assert memory.fault() == "writes outside of its tensors"
