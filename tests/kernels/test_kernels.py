"""Every kernel against its definition: interpreted on the CPU, and on a GPU where there is one."""

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("accuracy_*.py"))
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None and os.environ.get("CI", "").lower() not in ("1", "true"), reason="needs triton"
)


def interprets() -> bool:
    """Triton's interpreter of before 3.7 fails with NumPy 2.4, which no longer makes numbers of arrays of one."""
    if find_spec("triton") is None:
        return True
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    return triton >= (3, 7) or numpy < (2, 4)


def run(interpret: bool) -> None:
    """All files in one process: to import PyTorch and Triton takes as long as most of them."""
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": str(int(interpret)), "MINIT2V_KERNELS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, FILES)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@needs_triton
@pytest.mark.skipif(not interprets(), reason="Triton's interpreter does not work with this NumPy")
def test_in_the_interpreter():
    run(interpret=True)


@needs_triton
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu():
    run(interpret=False)
