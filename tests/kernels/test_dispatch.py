"""The choice between implementations, and what all ops have in common."""

import importlib
import os
import pkgutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

import minit2v_kernels
from minit2v_kernels import _dispatch, group_norm_silu, norm

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None and os.environ.get("CI", "").lower() not in ("1", "true"), reason="needs triton"
)


def python(*args: str, **env: str) -> str:
    """The output of `python args`; fails with it where the process fails."""
    done = subprocess.run([sys.executable, *args], env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_importing_imports_no_triton():
    modules = "print([m for m in ('triton', 'torch._dynamo') if m in sys.modules])"
    call = "minit2v_kernels.group_norm_silu(torch.ones(1, 2, 3), torch.ones(2), torch.ones(2), 1)"
    assert python("-c", f"import sys, torch, minit2v_kernels; {call}; {modules}").strip() == "[]"


def test_modules_are_found_by_their_names():
    """An op of the package that bears a module's name would stand in its place after `import package.module`."""
    for module in pkgutil.iter_modules(minit2v_kernels.__path__):
        found = importlib.import_module(f"minit2v_kernels.{module.name}")
        assert getattr(minit2v_kernels, module.name) is found


@pytest.fixture
def args():
    return torch.randn(2, 8, 3, 5), torch.randn(8), torch.randn(8), 4


@pytest.mark.parametrize("impl", [None, "auto", "torch"])
def test_the_cpu_runs_the_definition(args, impl, monkeypatch):
    monkeypatch.delenv("MINIT2V_KERNELS", raising=False)
    monkeypatch.setattr(norm, "group_norm_silu_triton", lambda *args: pytest.fail("asked for Triton"))
    x, w, b, groups = args
    assert torch.equal(group_norm_silu(*args, eps=1e-3, impl=impl), F.silu(F.group_norm(x, groups, w, b, 1e-3)))


def test_asking_for_triton_never_falls_back(args, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_dispatch, "has_triton", lambda: True)
    with pytest.raises(RuntimeError, match="impl='triton' needs a GPU tensor, not one on cpu"):
        group_norm_silu(*args, impl="triton")
    monkeypatch.setenv("MINIT2V_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="MINIT2V_KERNELS='triton' needs a GPU"):
        group_norm_silu(*args)
    monkeypatch.setattr(_dispatch, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        group_norm_silu(*args)
    group_norm_silu(*args, impl="torch")  # the argument wins over the environment


def test_unknown_implementations(args, monkeypatch):
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'torch', 'triton', not 'cuda'"):
        group_norm_silu(*args, impl="cuda")
    monkeypatch.setenv("MINIT2V_KERNELS", "tirton")
    with pytest.raises(ValueError, match="MINIT2V_KERNELS must be one of .* not 'tirton'"):
        group_norm_silu(*args)


class OnGPU:
    is_cuda, device = True, torch.device("cuda")

    def __init__(self, dtype: torch.dtype = torch.float16, requires_grad: bool = False):
        self.dtype, self.requires_grad = dtype, requires_grad

    def element_size(self) -> int:
        return self.dtype.itemsize


def test_auto_is_triton_only_where_it_is_proven(monkeypatch):
    monkeypatch.delenv("MINIT2V_KERNELS", raising=False)
    monkeypatch.setattr(_dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(_dispatch, "family", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for proven, impl in ((set(), "torch"), ({"sm_80"}, "torch"), ({"sm_80", "sm_90"}, "triton")):
        of_op = {"eager": frozenset(proven), "graph": frozenset()}
        monkeypatch.setitem(_dispatch.PROVEN, "group_norm_silu", of_op)
        for op in ("group_norm_silu", "add_group_norm_silu"):
            assert _dispatch.pick(op, None, OnGPU()) == _dispatch.pick(op, None, OnGPU(), launched="eager") == impl
            assert _dispatch.pick(op, None, OnGPU(), launched="graph") == "torch"
    with monkeypatch.context() as capturing:  # in a graph that somebody captures
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert _dispatch.pick("group_norm_silu", None, OnGPU()) == "torch"
        capturing.setitem(of_op, "graph", frozenset({"sm_90"}))
        assert _dispatch.pick("group_norm_silu", None, OnGPU()) == "triton"
    # What a result proves: one 16-bit dtype, no gradients, no autocast.
    single, wanting = OnGPU(torch.float32), OnGPU(requires_grad=True)
    for tensors in ((single,), (OnGPU(), single), (wanting,), (OnGPU(), None, wanting)):
        assert _dispatch.pick("group_norm_silu", None, *tensors) == "torch"
    with torch.no_grad():
        assert _dispatch.pick("group_norm_silu", None, OnGPU(), wanting) == "triton"
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    assert _dispatch.pick("group_norm_silu", None, OnGPU()) == "torch"


@pytest.mark.parametrize("setting, impls", [
    ("auto", ("auto", "auto")),
    ("torch", ("torch", "torch")),
    ("geglu=triton", ("auto", "triton")),
    ("geglu=triton, torch", ("torch", "triton")),
    ("torch,group_norm_silu=triton,geglu=auto", ("triton", "auto")),
])  # fmt: skip
def test_the_environment_may_choose_for_each_op(setting, impls):
    chosen = _dispatch.choices(setting)
    assert (chosen["group_norm_silu"], chosen["geglu"]) == impls
    assert set(chosen) == set(_dispatch.OPS) and chosen["add_group_norm_silu"] == impls[0]


def test_an_unknown_op_in_the_environment():
    with pytest.raises(ValueError, match="unknown op 'geglo'; did you mean 'geglu'?"):
        _dispatch.choices("geglo=triton")


@needs_triton
def test_recorded_launches_run_nothing():
    with _dispatch.record() as launches:
        x, w = torch.empty(2, 64, 8, 8, device="meta"), torch.empty(64, device="meta")
        y = group_norm_silu(x, w, w, 32, impl="triton")
    assert y.is_meta and launches and all(0 < size for launch in launches for size in launch.grid)
    assert not _dispatch.recordings


def test_a_grid_that_no_gpu_takes():
    with pytest.raises(ValueError, match=r"Kernel: a grid of \(4, 65536\) is larger"):
        _dispatch.launch(type("Kernel", (), {"__name__": "norm"}), (4, 65536))


TRACE = """
import torch
from minit2v_kernels import _dispatch, geglu, group_norm_silu

def backend(module, inputs):
    print(*(node.target for node in module.graph.nodes if node.op == "call_function"))
    (result,) = next(iter(reversed(module.graph.nodes))).args[0]
    return lambda *args: [torch.empty(result.meta["example_value"].shape)]

def call(x, w):
    y = group_norm_silu(x, w[0, :8], w[1, :8], 2, impl="triton")
    return geglu(y.flatten(2).mT, w, w[:, 0], impl="triton")

_dispatch.register_all()
_dispatch.interpreting = lambda: True  # nothing is run
with torch.no_grad():
    torch.compile(call, backend=backend, fullgraph=True, dynamic=False)(torch.ones(2, 8, 4, 4), torch.ones(6, 8))
"""


@needs_triton
def test_torch_compile_sees_ops_and_not_what_is_in_them():
    assert "minit2v.group_norm_silu.default" in (out := python("-W", "ignore", "-c", TRACE, TRITON_INTERPRET="0"))
    assert len(out.splitlines()) == 1 and "minit2v.geglu.default" in out


# ---- functions of one's own

Q = torch.randn(1, 4, 3, 2, 8)


@pytest.fixture
def forgets(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.delenv("MINIT2V_KERNELS", raising=False)
    monkeypatch.setattr(_dispatch, "contenders", {})
    monkeypatch.setattr(_dispatch, "parsed", {})
    return monkeypatch


def test_a_registered_function_takes_an_ops_place(forgets):
    seen = []

    def mine(q, k, v, causal, window):
        seen.append((causal, window))
        return -q

    minit2v_kernels.register("temporal_attention", "mine", mine)
    y = minit2v_kernels.temporal_attention(Q, Q, Q, causal=True, impl="mine")
    assert torch.equal(y, -Q) and seen == [(True, 4)]
    forgets.setenv("MINIT2V_KERNELS", "torch,temporal_attention=mine")
    assert torch.equal(minit2v_kernels.temporal_attention(Q, Q, Q), -Q)
    assert not torch.equal(minit2v_kernels.temporal_attention(Q, Q, Q, impl="torch"), -Q)
    before = _dispatch.setting()
    minit2v_kernels.register("temporal_attention", "mine", lambda q, k, v, causal, window: q * 2)
    assert torch.equal(minit2v_kernels.temporal_attention(Q, Q, Q), Q * 2) and _dispatch.setting() != before


ARGUMENTS = {
    "group_norm_silu": ((torch.randn(2, 4, 3), torch.ones(4), torch.zeros(4), 2), {}),
    "add_group_norm_silu": ((torch.randn(2, 4, 3), torch.randn(2, 4, 3), torch.ones(4), torch.zeros(4), 2), {}),
    "temporal_attention": ((Q, Q, Q), {"window": 2}),
    "geglu": ((torch.randn(3, 4), torch.randn(6, 4), torch.randn(6)), {}),
    "layer_norm": ((torch.randn(1, 2, 3, 4), torch.ones(4), torch.zeros(4)), {"positions": torch.randn(2, 4)}),
    "add_layer_norm": ((torch.randn(1, 2, 4), torch.randn(1, 2, 4), torch.ones(4), torch.zeros(4)), {}),
    "temporal_conv": ((torch.randn(1, 4, 3, 2), torch.randn(5, 4, 3, 1, 1), torch.randn(5)), {}),
    "linear_add": ((torch.randn(3, 4), torch.randn(6, 4), torch.randn(6), torch.randn(3, 6)), {}),
}


@pytest.mark.parametrize("op", _dispatch.OPS)
def test_every_op_hands_over_what_its_definition_takes(op, forgets):
    """So the definition itself is a contender, and equal to the last bit."""
    args, kw = ARGUMENTS[op]
    minit2v_kernels.register(op, "definition", getattr(minit2v_kernels, f"{op}_ref"))
    forgets.setenv("MINIT2V_KERNELS", f"{op}=definition")
    call = getattr(minit2v_kernels, op)
    for got, want in zip(*(y if isinstance(y, tuple) else (y,) for y in (call(*args, **kw), call(
        *args, **kw, impl="torch"))), strict=True):  # fmt: skip
        assert torch.equal(got, want)
    assert [impl for other, impl in _dispatch.choices("geglu=torch,layer_norm=triton").items() if other == op]


def test_a_function_named_by_its_module(forgets, tmp_path):
    (tmp_path / "own_kernels.py").write_text("def attend(q, k, v, causal, window):\n    return v + 1\n")
    forgets.syspath_prepend(tmp_path)
    assert torch.equal(minit2v_kernels.temporal_attention(Q, Q, Q, impl="own_kernels:attend"), Q + 1)
    forgets.setenv("MINIT2V_KERNELS", "temporal_attention=own_kernels:attend")
    assert torch.equal(minit2v_kernels.temporal_attention(Q, Q, Q), Q + 1)


@pytest.mark.parametrize("setting, said", [
    ("temporal_attention=mine", "temporal_attention has no implementation 'mine': there are auto, torch, triton, and"),
    ("own:attend", "must be one of .* not 'own:attend'; of your own function name the op, too: OP=own:attend"),
    ("temporal_attentoin=own:attend", "unknown op 'temporal_attentoin'; did you mean 'temporal_attention'?"),
    ("temporal_attention=nowhere_at_all:attend", "cannot import 'nowhere_at_all': .* PYTHONPATH?"),
    ("temporal_attention=math:sqr", "module 'math' has no function 'sqr'; did you mean 'sqrt'?"),
    ("temporal_attention=math:pi", "module 'math' has no function 'pi'"),
    ("temporal_attention=a:b:c", "no implementation 'a:b:c'"),
])  # fmt: skip
def test_functions_that_there_are_not(setting, said, forgets):
    forgets.setenv("MINIT2V_KERNELS", setting)
    with pytest.raises(ValueError, match=said):
        minit2v_kernels.temporal_attention(Q, Q, Q)


@pytest.mark.parametrize("given, said", [
    (("geglo", "mine", min), "no op 'geglo'; did you mean 'geglu'"),
    (("geglu", "triton", min), "none of auto, torch, triton; not 'triton'"),
    (("geglu", "a,b", min), "not 'a,b'"),
    (("geglu", "mine", 3), "'mine' must be a function, not int"),
])  # fmt: skip
def test_what_cannot_be_registered(given, said, forgets):
    with pytest.raises(ValueError, match=said):
        minit2v_kernels.register(*given)
    assert not _dispatch.contenders


def test_a_function_without_a_derivative_says_so(forgets):
    minit2v_kernels.register("temporal_attention", "mine", lambda q, k, v, causal, window: v.detach().clone())
    q = Q.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="temporal_attention: 'mine' has no derivative"):
        minit2v_kernels.temporal_attention(q, q, q, impl="mine")
    with torch.no_grad():
        minit2v_kernels.temporal_attention(q, q, q, impl="mine")
    minit2v_kernels.register("temporal_attention", "mine", minit2v_kernels.temporal_attention_ref)
    minit2v_kernels.temporal_attention(q, q, q, impl="mine").sum().backward()
    assert q.grad is not None


def test_recording_is_of_its_thread():
    """What another thread computes meanwhile is computed."""
    from concurrent.futures import ThreadPoolExecutor

    kernel = {}

    class Kernel:
        __name__ = "kernel"

        def __getitem__(self, grid):
            return lambda *args, **options: kernel.update(options)

    with _dispatch.record("sm_90") as launches, ThreadPoolExecutor(1) as other:
        other.submit(_dispatch.launch, Kernel(), (1,), torch.ones(1)).result()
        assert not launches and kernel["num_warps"] == 4
        assert other.submit(_dispatch.family, torch.device("cpu")).result() == "cpu"
        _dispatch.launch(Kernel(), (1,), torch.ones(1))
        assert len(launches) == 1 and _dispatch.family(torch.device("cpu")) == "sm_90"
        with _dispatch.record() as inner:
            _dispatch.launch(Kernel(), (1,), torch.ones(1))
        assert len(inner) == len(launches) == 1
    assert not _dispatch.recordings
