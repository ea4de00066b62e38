"""The benchmarks run here as they would on a GPU.

Every shape is one that the networks call, a wrong kernel wins nothing, what does not fit into the time is listed, and
no file is ever half written.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tarfile
import tomllib
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import minit2v_kernels
from minit2v import fast
from minit2v.models.unet3d import UNet3DConditionModel, UNet3DConfig
from minit2v.models.unet_motion import UNetMotionModel
from minit2v.models.vae import AutoencoderKL
from minit2v.training.recipe import Recipe
from minit2v_kernels import _dispatch

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    """The scripts of the folder, imported as they import each other."""
    names = ("kernel_shapes", "measure", "kernels", "step", "gpu", "charts", "kernel_resources", "host_cost")
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in names})
    finally:
        sys.path.remove(str(FOLDER))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    monkeypatch.delenv("MINIT2V_KERNELS", raising=False)


def run(script: str, *words: str) -> str:
    path = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "convert"))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / script), *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def key(op: str, args: tuple, kw: dict) -> tuple:
    """What tells one call from another, in whatever shape the op is given the same memory."""
    x = args[0]
    if "group_norm" in op:
        weight, groups, eps = args[-4], args[-2], args[-1]
        frames = kw.get("frames", 1)
        skip, emb = kw.get("skip"), kw.get("emb")
        span = frames * x[0, 0].numel()
        sizes = (len(x) // frames, x.shape[1], span, len(weight), groups, eps, kw.get("silu", True))
        # A clip as one image of many rows is a clip whose statistics span its frames.
        return (op, *sizes, skip is not None, None if emb is None else len(emb))
    if op == "temporal_attention":
        return (op, *x.shape)
    if "layer_norm" in op:
        rows = x[..., 0].numel()
        return (op, rows, x.shape[-1], kw.get("positions") is not None)
    if op == "geglu":
        return (op, x[..., 0].numel(), x.shape[-1], len(args[1]) // 2)
    if op == "linear_add":
        return (op, x[..., 0].numel(), x.shape[-1], len(args[1]))
    if op == "temporal_conv":
        return (op, *x.shape, kw.get("residual") is not None)
    return (op, *x.shape, args[1].shape[-2])


# The ops as the fast path calls them: of the kernel's arguments, how many `key` takes by place, and the others' names.
CALLED = {
    "_group_norm": ("group_norm_silu", 5, ("silu", "frames", "skip", "emb")),
    "_layer_norm": ("layer_norm", 4, ("positions",)),
    "_add_layer_norm": ("add_layer_norm", 5, ("positions",)),
    "_temporal_conv": ("temporal_conv", 3, ("residual",)),
    "_geglu": ("geglu", 3, ()),
    "_linear_add": ("linear_add", 4, ()),
    "_attention": ("temporal_attention", 3, ("causal", "window")),
}


def record(bench, monkeypatch, network, call) -> Counter:
    """How often `call` of the network's fast path runs each op, by what `key` says of it."""
    found: Counter = Counter()

    def watch(name, function):
        op, count, keywords = CALLED[name]

        def watched(*args):
            found[key(op, args[:count], dict(zip(keywords, args[count:], strict=True)))] += 1
            return function(*args)

        return watched

    with bench.step.kernels("triton"), _dispatch.record(), bench.kernel_resources.layouts_of_cuda(), torch.no_grad():
        runner = fast.runner(network)
        executor = fast.executors[network]
        executor.refresh()
        for name in CALLED:
            monkeypatch.setattr(executor.ops, name, watch(name, getattr(executor.ops, name)))
        call(runner)
    return found


@pytest.mark.parametrize("name", ["modelscope", "animatediff", "tiny-unet3d", "tiny-motion"])
def test_shapes_are_what_the_networks_call(monkeypatch, bench, name):
    work = (bench.kernel_shapes.WORKLOADS | bench.kernel_shapes.TINY)[name]
    kind = UNet3DConditionModel if isinstance(work.config, UNet3DConfig) else UNetMotionModel
    with torch.device("meta"):
        unet, decoder = kind(work.config), AutoencoderKL(work.vae)
        x = torch.empty(work.batch, 4, work.frames, *work.latents)
        context = torch.empty(work.batch, 77, work.config.cross_attention_dim)
        t, z = torch.tensor(1.0), torch.empty(work.frames, 4, *work.latents)
    for calls, network, call in (
        (bench.kernel_shapes.unet_calls(work), unet, lambda unet: unet(x, t, context)),
        (bench.kernel_shapes.vae_calls(work), decoder, lambda decoder: decoder.decode(z)),
    ):
        derived: Counter = Counter()
        for shape in bench.kernel_shapes.unique(calls):
            if shape.op != "scaled_dot_product_attention":
                derived[key(shape.op, *shape.make())] += shape.calls
        assert derived == record(bench, monkeypatch, network, call)
        assert sum(derived.values()) > 10


def test_the_host_cost_of_a_step(bench):
    """Every call of a fused op is timed, by its name; where every op returns at once, the step does, too."""
    found = bench.host_cost.measure(bench.kernel_shapes.TINY["tiny-unet3d"], rounds=2)
    counts = {name: of["calls"] for name, of in found["ops"].items()}
    calls = Counter()
    for shape in bench.kernel_shapes.unet_calls(bench.kernel_shapes.TINY["tiny-unet3d"]):
        calls[{"group_norm_silu": "group_norm", "temporal_attention": "frame_attention"}.get(shape.op, shape.op)] += (
            shape.calls
        )
    del calls["scaled_dot_product_attention"]
    assert counts == calls and found["all"]["calls"] == sum(calls.values())
    assert 0 < found["all"]["median_us"] <= found["all"]["p90_us"] and 0 < found["refresh_ms"] < found["outside_ops_ms"]
    assert "goal" in bench.host_cost.report(found)


def test_counted_bytes_are_those_of_hand(bench):
    K = bench.kernel_shapes
    found = {(s.workload, s.op, *s.sizes.values()): s for s in K.shapes("zeroscope-xl", "modelscope")}
    attention = next(
        s for s in found.values() if s.op == "temporal_attention" and s.workload == "zeroscope-xl" and s.h == 5
    )
    assert (attention.bytes(), attention.calls) == (4 * 18432 * 24 * 5 * 64 * 2, 10)
    norm = next(s for s in found.values() if s.op == "group_norm_silu" and s.frames == 24 and s.c == 320 and s.silu)
    assert (norm.bytes(), norm.calls) == (3 * 2 * 320 * 24 * 72 * 128 * 2, 20)  # too large for the cache: read twice
    small = next(s for s in found.values() if s.op == "group_norm_silu" and s.frames == 16 and s.c == 320 and s.silu)
    assert small.bytes() == 2 * 2 * 320 * 16 * 32 * 32 * 2
    # All statistics are taken before anything is written: small frames do not help.
    frames = next(s for s in found.values() if s.op == "group_norm_silu" and s.frames == 1 and s.emb and s.c == 320)
    assert frames.workload == "zeroscope-xl" and frames.bytes() == norm.bytes()
    geglu = K.Geglu("", "", 1, rows=10, d=3, m=12)
    assert geglu.bytes() == 2 * (10 * 3 + 24 * 3 + 10 * 12) and geglu.flops() == 2 * 10 * 3 * 24
    conv = K.TemporalConv("", "", 1, b=1, c=4, f=3, p=5)
    assert conv.flops() == 2 * 16 * 5 * 7  # of 3 x 3 taps, 2 reach over the ends


def test_the_end_of_a_call_is_the_call_of_the_end(bench):
    for shape in bench.kernel_shapes.shapes("tiny-unet3d", "tiny-motion"):
        op = bench.kernels.definition(shape)
        args, kw = shape.make(CPU, torch.float64)
        end_args, end_kw = shape.tail(args, kw)
        for whole, end in zip(*map(bench.kernels.outputs, (op(*args, **kw), op(*end_args, **end_kw))), strict=True):
            torch.testing.assert_close(whole[-len(end) :], end, rtol=1e-12, atol=1e-12)


def options(**given) -> argparse.Namespace:
    return argparse.Namespace(**{"contenders": [], "contender": {}, "seconds": 0.0, "least": 1} | given)


def entry_of(bench, shape, **given) -> dict:
    entry = bench.kernels.measure(shape, CPU, torch.float32, options(**given), compiled=False)
    entry["calls_in"] = {shape.workload: shape.calls}
    bench.kernels.derive(entry, {"copy_gb_s": 100.0, "float32_tflop_s": 0.1}, torch.float32)
    return entry


def test_every_peer_computes_the_same(bench):
    """Each contender, other than our kernels, at every op: right, timed, or said to be unavailable."""
    names = ["torch", "eager", "permuted", *bench.kernels.BACKENDS]
    ops = Counter()
    for shape in bench.kernel_shapes.shapes("tiny-unet3d", "tiny-motion"):
        entry = entry_of(bench, shape, contenders=names)
        for name, found in entry["contenders"].items():
            if "unavailable" not in found:
                assert found["right"] and found["ms"] > 0 and found["gb_s"] > 0, (shape.name, name, found)
                ops[shape.op, name] += 1
            else:
                assert name in bench.kernels.BACKENDS, (shape.name, name, found)
    for op in (*minit2v_kernels.__dict__.keys() & {s.op for s in bench.kernel_shapes.shapes("tiny-unet3d")},):
        assert ops[op, "torch"] and ops[op, "eager"], op
    assert ops["scaled_dot_product_attention", "sdpa math"] and ops["temporal_attention", "permuted"]


def geglu_shape(bench):
    return next(s for s in bench.kernel_shapes.shapes("tiny-unet3d") if s.op == "geglu")


@pytest.mark.parametrize("fault", ["zeros", "unwritten", "rounded", "raises"])
def test_a_wrong_kernel_wins_nothing(monkeypatch, bench, fault):
    right = minit2v_kernels.geglu

    def broken(x, weight, bias, impl=None):
        if impl != "triton":
            return right(x, weight, bias, impl=impl)
        if fault == "raises":
            raise RuntimeError("no such instruction")
        y = right(x, weight, bias, impl="torch")
        if fault == "unwritten":
            out = torch.empty_like(y)
            out[:-1] = y[:-1]
            return out
        return torch.zeros_like(y) if fault == "zeros" else y.bfloat16().float()

    monkeypatch.setattr(minit2v_kernels, "geglu", broken)
    shape = geglu_shape(bench)
    entry = entry_of(bench, shape, contenders=["kernel", "torch"])
    if fault == "raises":
        assert "no such instruction" in entry["contenders"]["kernel"]["unavailable"]
    else:
        assert not entry["contenders"]["kernel"]["right"]
    assert entry["contenders"]["torch"]["right"]
    verdict = bench.kernels.recommend({shape.name: entry}, {shape.name: shape}, "graph")["geglu"]
    assert verdict["verdict"].startswith("no: wrong") and verdict["wrong"] == [shape.name]


def test_a_kernel_that_is_wrong_where_float64_does_not_look(monkeypatch, bench):
    right = minit2v_kernels.temporal_attention

    def broken(q, k, v, impl=None):
        y = right(q, k, v, impl="torch")
        if impl == "triton":
            y[0, 0] = 0  # of the first video; float64 judges the last one
        return y

    monkeypatch.setattr(minit2v_kernels, "temporal_attention", broken)
    shape = next(s for s in bench.kernel_shapes.shapes("tiny-unet3d") if s.op == "temporal_attention")
    found = entry_of(bench, shape, contenders=["kernel", "torch"])["contenders"]
    assert found["kernel"]["error"] == found["torch"]["error"] and found["kernel"]["apart"] > 0.1
    assert not found["kernel"]["right"] and found["torch"]["right"]


def fake(ms: dict[str, float], calls: int = 1) -> dict:
    contenders = {name: {"ms": value, "right": True} for name, value in ms.items()}
    return {"calls_in": {"tiny-unet3d": calls}, "contenders": contenders}


def test_what_is_recommended(bench):
    wanted = {s.name: s for s in bench.kernel_shapes.shapes("tiny-unet3d") if s.op == "geglu"}
    names = list(wanted)
    assert len(names) == 3

    def verdict(entries):
        return bench.kernels.recommend(entries, wanted, "graph")["geglu"]

    faster, slower = fake({"kernel": 1, "torch": 2, "eager": 3}), fake({"kernel": 2, "torch": 3, "eager": 1})
    assert verdict({})["verdict"] == "not measured"
    assert verdict({names[0]: faster})["verdict"] == "so far: 1 of 3 shapes measured"
    assert verdict(dict.fromkeys(names, faster)) == {
        "verdict": "yes", "faster": {"tiny-unet3d": 2.0}, "measured": 3, "of": 3, "wrong": [], "slower_at": [],
    }  # fmt: skip
    found = verdict({names[0]: faster, names[1]: faster, names[2]: slower})  # 4 against 5
    assert found["verdict"] == "yes" and found["slower_at"] == [[names[2], 0.5]]
    assert verdict(dict.fromkeys(names, slower))["verdict"] == "no: slower over a step"
    # In a graph the kernel wins; call by call, where the host's time counts, it loses.
    entry = fake({"kernel": 1, "torch": 2})
    entry["contenders"]["kernel"]["eager_ms"], entry["contenders"]["torch"]["eager_ms"] = 6, 3
    entries = dict.fromkeys(names, entry)
    assert verdict(entries)["verdict"] == "yes"
    eager = bench.kernels.recommend(entries, wanted, "eager")["geglu"]
    assert eager["verdict"] == "no: slower over a step" and eager["faster"] == {"tiny-unet3d": 0.5}
    assert bench.kernels.recommend(dict.fromkeys(names, faster), wanted, "eager")["geglu"]["verdict"] != "yes"
    lost = {names[0]: faster, names[1]: faster, names[2]: {"lost": "the process ended while this was measured"}}
    assert verdict(lost)["verdict"].startswith("no: wrong")


def test_results_are_whole_and_of_one_code(monkeypatch, bench, tmp_path):
    path = tmp_path / "deep" / "kernels.json"
    first = bench.measure.Results(path, CPU)
    first.part("kernels")["a"] = {"ms": 1}
    first.save()
    assert [p.name for p in path.parent.iterdir()] == ["kernels.json"]
    machine = json.loads(path.read_text())["machine"]
    assert {"device", "torch", "triton", "diffusers", "commit", "date", "command", "dry_run"} <= set(machine)
    assert bench.measure.Results(path, CPU).data["kernels"] == {"a": {"ms": 1}}
    assert "kernels" not in bench.measure.Results(path, CPU, fresh=True).data
    monkeypatch.setattr(bench.measure, "sources", lambda: "other")
    assert "kernels" not in bench.measure.Results(path, CPU).data


def test_goals_beside_numbers(bench, tmp_path):
    def step(**ms):
        entry = {"contenders": {name: {"ms": v, "right": True} for name, v in ms.items()}}
        return entry

    found = bench.gpu.goals(tmp_path)
    assert {r["verdict"] for r in found["goals"]} == {"not measured"} and len(found["goals"]) == 16
    faster = {"diffusers": 1.75, "diffusers, compiled": 1.1}
    (tmp_path / "step-modelscope.json").write_text(json.dumps({"unet": {"ours_optimized_is_faster": faster}}))
    (tmp_path / "step-modelscope-64.json").write_text(json.dumps({"resident_gib": 4.0, "left_out": ["vae: x"]}))
    mine = {"ms": 1.0, "of_copy": 0.85, "right": True}
    norm = {"op": "group_norm_silu", "part": "conv", "calls": 20, "bytes": 2.5e8, "sizes": {"frames": 16},
            "contenders": {"kernel": mine, "eager": {"ms": 9.0}}}  # fmt: skip
    wrong = norm | {"contenders": {"kernel": mine | {"right": False}, "eager": {"ms": 9.0}}}
    for entries, verdicts in (
        ({"a": norm}, ["reached", "reached"]),
        ({"a": wrong}, ["missed", "missed"]),
        ({"a": norm | {"bytes": 2e8}}, ["not measured"] * 2),
    ):
        (tmp_path / "kernels.json").write_text(json.dumps({"kernels": entries}))
        found = bench.gpu.goals(tmp_path)
        assert [r["verdict"] for r in found["goals"]][:2] == verdicts
    rows = {(r["goal"], r["unit"]): r["verdict"] for r in found["goals"]}
    assert rows["step, modelscope", "x diffusers"] == "reached"
    assert rows["step, modelscope", "x diffusers compiled"] == "missed"
    assert rows["memory, modelscope-64", "GiB"] == "reached"
    assert "modelscope-64: vae: x" in found["left_out"] and "vae: x" in bench.gpu.summary(found)


@pytest.mark.parametrize("gib, beside, later", [
    (143771 / 1024, ["modelscope", "zeroscope", "animatediff"], {"modelscope-64", "zeroscope-xl"}),  # an H200
    (79, ["modelscope"], {"zeroscope", "animatediff", "modelscope-64", "zeroscope-xl"}),
    (23, [], {"modelscope", "zeroscope", "animatediff", "modelscope-64", "zeroscope-xl"}),
])  # fmt: skip
def test_the_run_on_a_gpu(monkeypatch, bench, tmp_path, gib, beside, later):
    """What is started, in which order, on a GPU that is none: every part once, and every command one that it knows."""
    started, warmed = [], set()

    class Fake:
        def __init__(self, name, words, log):
            started.append(name)
            log.write_text("done\n")
            if words[0] == "charts.py":
                assert words[1:] == [str(tmp_path)]
            else:
                options = getattr(bench, words[0].removesuffix(".py")).parse(words[1:])
                if words[0] == "step.py" and not options.warm:
                    options.ready.touch()
                if words[0] == "step.py" and options.warm:
                    warmed.update(options.workloads)
            self.process = SimpleNamespace(poll=lambda: 0)

        def wait(self, seconds):
            assert seconds >= 0
            return 0

        def stop(self):
            pass

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(total_memory=int(gib * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(bench.gpu, "Part", Fake)
    archive = tmp_path / "all.tgz"
    bench.gpu.main(["--out", str(tmp_path), "--archive", str(archive)])
    kernels, last = started.index("kernels-goals"), started.index("kernels")
    assert started[: len(beside)] == beside and started[-1] == "charts"
    assert kernels < last and set(started[kernels + 1 : last]) == later
    assert json.loads((tmp_path / "goals.json").read_text())["notes"] == []
    assert warmed == (later if gib > 50 else set())
    with tarfile.open(archive) as packed:
        assert {"results/goals.json", "results/summary.md", "logs/kernels.log"} <= set(packed.getnames())


def test_what_failed_is_packed(monkeypatch, bench, tmp_path):
    def fail(self):
        (self.logs / "part.log").write_text("lost\n")
        raise SystemExit(143)

    monkeypatch.setattr(bench.gpu.Run, "everything", fail)
    with pytest.raises(SystemExit):
        bench.gpu.main(["--cpu", "--out", str(tmp_path / "out"), "--archive", str(tmp_path / "all.tgz")])
    with tarfile.open(tmp_path / "all.tgz") as packed:
        assert "logs/part.log" in packed.getnames()


class Event:
    """Of a GPU that is none: every call takes a millisecond."""

    now = 0.0

    def __init__(self, **_):
        self.at = 0.0

    def record(self):
        self.at = Event.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.mark.parametrize("ms, captured", [(1.0, False), (0.01, True)])
def test_the_clock_of_a_gpu(monkeypatch, bench, ms, captured):
    """The logic around events and graphs, on a GPU that is none: the same medians by both, every buffer in its turn."""
    used, starts, slept = [], [], []

    def call(i):
        used.append(i)
        Event.now += ms

    class Graph:
        def capture_begin(self):
            self.before = Event.now

        def capture_end(self):
            Event.now = self.before  # what is captured does not run

        def replay(self):
            Event.now += ms * clock.count

    def record(event):
        event.at = Event.now
        starts.append(len(slept))

    monkeypatch.setattr(Event, "record", record)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    clock = bench.measure.Timed.__new__(bench.measure.Timed)
    clock.__init__(call, 4, torch.device("cuda"))
    bench.measure.in_turns({"one": clock}, 0.0, rounds=2, least=3)
    found = clock.summary()
    assert found["graph"] is captured and found["samples"] == 6
    assert found["ms"] == pytest.approx(ms) and found["low"] == pytest.approx(ms)
    assert set(used) == {0, 1, 2, 3}
    # Before every first record of two the GPU was made busy; not where the host's time counts.
    assert starts == [1 + i // 2 for i in range(len(starts))] and min(slept) == 2_000_000
    slept.clear()
    bench.measure.Timed(call, 1, torch.device("cuda"), graph=False, host=True).sample(0.0)
    assert slept == []


def test_out_of_memory_is_not_wrong(monkeypatch, bench):
    def full(x, weight, bias, impl=None):
        if impl == "triton":
            raise torch.cuda.OutOfMemoryError("full")
        return geglu(x, weight, bias, impl=impl)

    geglu = minit2v_kernels.geglu
    monkeypatch.setattr(minit2v_kernels, "geglu", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        entry_of(bench, geglu_shape(bench), contenders=["kernel", "torch"])


def test_goals_alone_recommend_nothing(monkeypatch, bench, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # main sets it
    shapes = bench.kernels.in_order(["tiny-unet3d"], ["geglu"])
    monkeypatch.setattr(bench.kernels, "is_goal", lambda shape: shape.name == shapes[0].name)
    monkeypatch.setattr(
        bench.kernels, "measure", lambda *_: {**fake({"kernel": 1, "torch": 2}), "bytes": 1, "flops": 0}
    )
    words = ["--cpu", "--goals", "--only", "geglu", "--workloads", "tiny-unet3d", "--backward", "no"]
    bench.kernels.main([*words, "--out", str(tmp_path / "kernels.json")])
    found = json.loads((tmp_path / "kernels.json").read_text())["recommendation"]["graph"]["geglu"]
    assert found["verdict"] == f"so far: 1 of {len(shapes)} shapes measured"


def test_the_kernels_in_a_dry_run(tmp_path):
    """One op with its kernel in the interpreter, forward and backward; a second run measures nothing again."""
    pytest.importorskip("triton")
    path = tmp_path / "kernels.json"
    words = ["--cpu", "--only", "add_layer_norm", "--workloads", "tiny-motion", "--seconds", "0", "--least", "1"]
    words += ["--out", str(path)]
    assert "A dry run proves nothing" in run("kernels.py", *words)
    data = json.loads(path.read_text())
    assert data["left_out"] == [] and "dry_run" in data["machine"] and data["ceilings"]["copy_gb_s"] > 0
    for entry in data["kernels"].values():
        assert all(found["right"] and found["ms"] > 0 for found in entry["contenders"].values())
        assert {"kernel", "torch", "eager"} == set(entry["contenders"])
    assert data["backward"] and all(e["contenders"]["kernel"]["right"] for e in data["backward"].values())
    assert not path.with_suffix(".running").exists()


def test_a_second_run_adds_what_is_missing(monkeypatch, bench, tmp_path, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # main sets it
    monkeypatch.setattr(bench.measure, "sources", lambda: "the same")
    path = tmp_path / "kernels.json"
    words = ["--cpu", "--only", "geglu", "--contenders", "torch", "eager", "--seconds", "0", "--least", "1"]
    words += ["--backward", "no", "--out", str(path)]

    def main(*more: str) -> tuple[dict, str]:
        bench.kernels.main([*words, *more])
        return json.loads(path.read_text()), capsys.readouterr().out

    names = [shape.name for shape in bench.kernels.in_order(["tiny-unet3d", "tiny-motion"], ["geglu"])]
    data, _ = main("--budget", "0")
    assert data["kernels"] == {} and data["left_out"] == [f"kernels: {name}" for name in names]
    path.with_suffix(".running").write_text(f"kernels: {names[1]}")  # as by a process that was lost
    data, out = main()
    assert list(data["kernels"]) == [names[1], *(name for name in names if name != names[1])]
    assert "lost" in data["kernels"][names[1]] and out.count("us:") == len(names) - 1 and data["left_out"] == []
    again, out = main()
    assert again["kernels"] == data["kernels"] and "us:" not in out


def test_goals_come_first(bench):
    order = bench.kernels.in_order([], [])
    ranks = [bench.kernels.rank(shape) for shape in order]
    assert ranks == sorted(ranks) and ranks.count(0) > 20
    assert {shape.op for shape in order[: ranks.count(0)]} == {"group_norm_silu", "temporal_attention"}
    assert len({shape.name for shape in order}) == len(order)


def test_everything_in_one_command(tmp_path):
    """A step and a decode of a tiny network, ours and the peer's where it is installed, the goals, the charts."""
    pytest.importorskip("matplotlib")
    words = ["--cpu", "--only", "steps", "--workloads", "tiny-motion", "--minutes", "2", "--out", str(tmp_path)]
    out = run("gpu.py", *words, "--contenders", "ours", "ours, optimized", "diffusers")
    data = json.loads((tmp_path / "step-tiny-motion.json").read_text())
    assert data["done"] and "dry_run" in data["machine"]
    for part in ("unet", "vae"):
        for name, found in data[part]["contenders"].items():
            if "diffusers is not installed" not in found.get("unavailable", ""):
                assert found["right"] and found["ms"] > 0 and 0 < found["error"] < 1e-5, (part, name, found)
    assert data["machine"]["command"].startswith("python benchmarks/gpu.py --cpu")
    assert (tmp_path / "steps.png").stat().st_size > 10_000
    assert "dry run" in (tmp_path / "summary.md").read_text() and "not measured" in out


@pytest.mark.parametrize("path", sorted((FOLDER / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_are_recipes(path):
    """Each has the options of `minit2v train`, and its name in the table of the page beside it."""
    assert set(tomllib.loads(path.read_text())) <= {field.name for field in dataclasses.fields(Recipe)}
    assert f"| `{path.name}` |" in (path.parent / "README.md").read_text()
