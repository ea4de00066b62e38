"""benchmarks/kernels.py --contender: a kernel of one's own is judged before a time is shown, and faults are found."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

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

shapes = [s for s in contender.of_op("temporal_attention", True, "tiny-unet3d") if s.f == 5 and not s.window]
shapes += [replace(shapes[0], causal=False)]
for name in ("attend", *faulty.FAULTS, "no_masks", "nothing"):
    impl = "faulty:" + name
    verdicts = list(contender.judge_all(shapes, impl, (torch.float32,), torch.device("cpu")))
    print(json.dumps([name, *contender.report("temporal_attention", impl, verdicts)]))
"""


@pytest.fixture(scope="module")
def judged():
    """What is said of each function of faulty.py, and whether it may be timed."""
    return {name: (said, good) for name, said, good in map(json.loads, python("-c", JUDGE)[0].splitlines())}


FAULTS = dict(re.findall(r'^    "(\w+)": "(.*?)",', (HERE / "faulty.py").read_text(), re.M))


@needs_triton
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_kernel_is_found(judged, fault):
    said, good = judged[fault]
    assert not good and "WRONG" in said and re.search(FAULTS[fault].replace("\\\\", "\\"), said), said


@needs_triton
def test_a_right_kernel_is_right(judged):
    assert len(FAULTS) >= 10
    said, good = judged["attend"]
    assert good and re.search(r"(\d+) of \1 cases are right\n  the largest error", said) and "WRONG" not in said


@needs_triton
def test_what_a_kernel_does_not_do_is_no_fault(judged):
    """It is listed. A kernel that does nothing is not right."""
    said, good = judged["no_masks"]
    assert good and "refused: temporal_attention(b=1, f=5, p=3, h=2, d=8, causal), float32: NotImplemented" in said
    said, good = judged["nothing"]
    assert not good and "0 of 0 cases" in said
