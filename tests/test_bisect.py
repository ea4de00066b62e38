"""`minit2v bisect`: each op in turn as a kernel, in a process of its own: Triton decides at import to interpret."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from minit2v import cli
from minit2v.fast import bisect
from minit2v_kernels import _dispatch

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None and os.environ.get("CI", "").lower() not in ("1", "true"), reason="needs triton"
)


OWN = """
import triton
import triton.language as tl
from minit2v_kernels import geglu_ref

@triton.jit
def twice(X, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(X + i, tl.load(X + i) * 2)

def double(x, weight, bias):
    y = geglu_ref(x, weight, bias)
    twice[(y.numel() // 16,)](y, SIZE=16)
    return y
"""


@needs_triton
def test_a_folder_without_a_gpu(tmp_path, make_official_folder):
    narrow = {"block_out_channels": [8], "norm_num_groups": 4, "attention_head_dim": 4,
              "down_block_types": ["CrossAttnDownBlock3D"], "up_block_types": ["CrossAttnUpBlock3D"]}  # fmt: skip
    folder = make_official_folder(tmp_path / "model", small=True, unet=narrow)
    command = ["bisect", str(folder), "--device", "cpu", "--frames", "2", "--height", "16", "--width", "16",
               "--kernels", "geglu=own_geglu:double"]  # fmt: skip
    (tmp_path / "own_geglu.py").write_text(OWN)
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "MINIT2V_KERNELS")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), str(tmp_path)]))
    done = subprocess.run([sys.executable, "-m", "minit2v", *command], env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "interpreter, which is slow" in done.stderr and done.stderr.count("\n") == 1
    head, plain, *rows = [line.split() for line in done.stdout.splitlines()]
    assert head == ["as", "kernels", "launches", "error"] and plain[:2] == ["none:", "PyTorch"]
    own = rows.pop()
    assert [row[0] for row in rows] == [*_dispatch.PROVEN, "all"]
    launches = [int(row[1]) for row in rows]
    assert all(n > 0 for n in launches) and sum(launches[:-1]) == launches[-1]
    geglus = launches[[*_dispatch.PROVEN].index("geglu")]
    assert own[0] == "geglu=own_geglu:double" and int(own[1]) == geglus and own[3] == "WRONG"
    assert all(float(row[2]) <= 1.5 * float(plain[3]) + 1e-3 and row[3] == "ok" for row in rows)


class Broken:
    """In the place of a network: geglu gives wrong numbers as a kernel, layer norm none, temporal_conv is not in it."""

    dtype = torch.float16

    def double(self):
        return self

    def to(self, dtype):
        return self

    def __call__(self, x, t, context):
        choices = _dispatch.choices(os.environ.get("MINIT2V_KERNELS", "torch"))
        chosen = [op for op, impl in choices.items() if impl == "triton"]
        chosen = [op for op in chosen if op not in ("temporal_conv", "layer_norm", "add_group_norm_silu")]
        if (recording := _dispatch.recording()) is not None:
            recording.launches.extend(chosen)
        y = x * (1 if x.dtype == torch.float64 else 1.001)
        if choices["temporal_attention"] not in _dispatch.IMPLS:
            _dispatch.contender("temporal_attention", choices["temporal_attention"])()
            y = y + 0.1
        return y + (0.1 if "geglu" in chosen else 0) + (float("nan") if "add_layer_norm" in chosen else 0)


def test_what_is_wrong_is_named(monkeypatch):
    monkeypatch.delenv("MINIT2V_KERNELS", raising=False)
    network = Broken()
    monkeypatch.setattr(bisect, "runner", lambda _: network.__call__)
    x = torch.randn(2, 4, 3, 4, 4).half()
    rows = list(bisect.lines(bisect.bisect(network, x, 500, x)))
    verdicts = {row.split()[0]: (row.split()[-1], good) for row, good in rows[2:]}
    assert verdicts == {
        "group_norm_silu": ("ok", True),
        "temporal_attention": ("ok", True),
        "geglu": ("WRONG", False),
        "add_layer_norm": ("WRONG", False),
        "temporal_conv": ("network", True),
        "linear_add": ("ok", True),
        "all": ("WRONG", False),
    }
    assert "MINIT2V_KERNELS" not in os.environ and rows[1][1]

    monkeypatch.setattr(_dispatch, "contenders", {})
    _dispatch.register("temporal_attention", "mine", lambda: torch.zeros(1))
    _dispatch.register("geglu", "mine", lambda: None)
    rows = list(bisect.lines(bisect.bisect(network, x, 500, x, "temporal_attention=mine,geglu=mine")))[-2:]
    assert [row.split() for row, _ in rows] == [
        ["temporal_attention=mine", "1", rows[0][0].split()[2], "WRONG"],
        ["geglu=mine", "0", "-", "not", "in", "this", "network"],
    ]
    assert [good for _, good in rows] == [False, True]


def test_only_the_fast_path_has_kernels(make_official_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIT2V_OPTIMIZE", "0")
    unet = bisect.load(str(make_official_folder(tmp_path / "m", small=True)), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="fast path, which is off: set MINIT2V_OPTIMIZE=1"):
        next(bisect.bisect(unet, *bisect.inputs(unet, frames=2, height=16, width=16)))


def test_images_have_no_frames(make_official_folder, tmp_path):
    folder = make_official_folder(tmp_path / "image", "sd15", small=True)
    unet = bisect.load(str(folder), torch.float32, torch.device("cpu"))
    x, t, context = bisect.inputs(unet, frames=3, height=16, width=24)
    assert x.shape == (2, 4, 2, 3) and unet(x, t, context).shape == x.shape


@pytest.mark.parametrize("args, said", [
    (["--height", "20"], "--height must be a multiple of 8, not 20"),
    (["nowhere/at/all"], "no folder .nowhere"),
    (["--device", "gpu"], "unknown device 'gpu'"),
])  # fmt: skip
def test_errors_are_one_line(args, said, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert cli.main(["bisect", *args]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(said, err)


def test_another_kind_of_folder(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "X", "unet": ["diffusers", "UNetSpatioTemporal"]}')
    with pytest.raises(ValueError, match="no UNet of this package: its model_index.json names UNetSpatioTemporal"):
        bisect.load(str(tmp_path), torch.float32, torch.device("cpu"))
