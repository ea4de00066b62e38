"""Several processes: lists of prompts that they share, and training that gives the weights of one process."""

import faulthandler
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from minit2v import DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel, UNetMotionModel, cli, parallel
from minit2v.cli import batches
from minit2v.files.video import read_metadata
from minit2v.training.recipe import Recipe
from minit2v.training.trainable import add_lora, choose
from minit2v.training.trainer import Piece, Trainer

LONGEST = 480  # seconds: no process of these tests lives longer


class Processes:
    """Forked children with torchrun's environment, each with one thread. None outlives its alarm, or the block."""

    def __init__(self, function, size, folder, seconds=LONGEST, **environment):
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"process-{rank}" for rank in range(size)]
        self.pids, self.codes, self.end = [], {}, time.monotonic() + seconds
        for rank, log in enumerate(self.logs):
            log.write_text("")
            pid = os.fork()
            if pid:
                self.pids.append(pid)
                continue
            code = 1
            try:
                signal.alarm(seconds)  # whatever becomes of the parent
                for name in ("SIGINT", "SIGTERM", "SIGALRM"):
                    signal.signal(getattr(signal, name), signal.SIG_DFL)
                sys.stdout = sys.stderr = log.open("w", buffering=1)
                # Says where it hangs. Not by dump_traceback_later: a child would wait for the thread of pytest's own.
                faulthandler.register(signal.SIGALRM, file=sys.stderr, chain=True)
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), **environment)
                torch.set_num_threads(1)
                tqdm.set_lock(threading.RLock())  # its own is shared with the parent: a killed child may hold it
                code = function() or 0
            except SystemExit as error:
                code = error.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)

    def wait(self):
        """The exit codes; minus the signal that ended a process."""
        while len(self.codes) < len(self.pids):
            for pid in self.pids:
                if pid not in self.codes and (got := os.waitpid(pid, os.WNOHANG))[0]:
                    self.codes[pid] = os.waitstatus_to_exitcode(got[1])
            if time.monotonic() > self.end:
                self.__exit__()
                pytest.fail("did not end in time:\n" + "\n".join(log.read_text() for log in self.logs))
            time.sleep(0.02)
        return [self.codes[pid] for pid in self.pids]

    def wait_for(self, rank, line):
        """Until the process has said this."""
        while not re.search(line, self.logs[rank].read_text(), re.M):
            assert time.monotonic() < self.end, f"{line!r} was not said: {self.logs[rank].read_text()}"
            time.sleep(0.005)

    def said(self):
        return [log.read_text() for log in self.logs]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in self.pids:
            if pid not in self.codes:
                os.kill(pid, signal.SIGKILL)
                self.codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def torchrun(size, *words, cwd, **environment):
    """What `torchrun` has said. None of its processes outlives it."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with (cwd / "out").open("w") as out, (cwd / "errors").open("w") as errors:  # pipes may be held by who is left
        process = subprocess.Popen(words, cwd=cwd, env=environment, stdout=out, stderr=errors)
        try:
            process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends its workers
            process.wait(40)
        finally:
            process.kill()
            process.wait()
    said = (cwd / "out").read_text(), (cwd / "errors").read_text()
    assert process.returncode in (0, 1), said
    return subprocess.CompletedProcess(words, process.returncode, *said)


@contextmanager
def store():
    """The environment of processes that find each other, as torchrun's agent sets it."""
    server = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    yield {"MASTER_ADDR": "localhost", "MASTER_PORT": str(server.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
           "TORCHELASTIC_RESTART_COUNT": "0", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    del server


@contextmanager
def connected():
    world = parallel.world("cpu", patience=LONGEST / 2)
    yield world
    world.close()


# ----------------------------------------------------------------------------------------------------- lists of prompts

LIST = ["a red circle moving up", "a blue square moving left", "a red circle moving up", "a red circle, moving up",
        '{"0": "a red bar", "1": "a blue bar"}', "a green ring moving right", '{"0": "a \\ud800"}']
FAST = ["--seed", "3", "--num-frames", "2", "--steps", "1"]
BROKEN = "the prompt is not valid Unicode: surrogates not allowed at character 2"


@pytest.fixture
def generate(tmp_path):
    """generate(folder, *options) -> a function that makes the list's videos there, and returns the exit code."""
    (tmp_path / "list").write_text("\n".join(LIST))

    def of(folder, *options):
        words = ["generate", "--prompts", str(tmp_path / "list"), *FAST, "-o", str(folder), *map(str, options)]
        return lambda: cli.main(words)

    return of


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The files of one process: {name: bytes}."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "list").write_text("\n".join(LIST))
    words = ["generate", "--prompts", str(folder / "list"), *FAST, "-o", str(folder / "made")]
    with Processes(lambda: cli.main(words), 1, folder / "logs") as processes:
        assert processes.wait() == [1], processes.said()  # one prompt fails
    return files_of(folder / "made")


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.mp4")}


def report_of(folder):
    report = json.loads((folder / "report.json").read_text())
    for video in report["videos"]:
        video.pop("seconds", None)
    return report


def test_processes_share_a_list_and_make_the_files_of_one(generate, alone, tmp_path):
    assert len(alone) == 5 and "a-red-circle-moving-up-3-2.mp4" in alone
    with Processes(generate(tmp_path / "two"), 2, tmp_path / "logs") as processes:
        assert processes.wait() == [0, 1]  # who has met the broken prompt
        first, second = processes.said()
    assert files_of(tmp_path / "two") == alone
    report = report_of(tmp_path / "two")
    assert (report["prompts"], report["made"], report["failed"]) == (6, 5, 1)
    assert [v["prompt"] for v in report["videos"]] == [*dict.fromkeys(LIST[:4]), "a red bar", LIST[5], "a \ud800"]
    assert report["videos"][-1] == {"prompt": "a \ud800", "error": BROKEN}
    assert report["videos"][3] == {"prompt": "a red bar", "prompt_at": {"1": "a blue bar"}, "file": "a-red-bar-3.mp4"}
    assert report["settings"]["seed"] == 3 and report["settings"]["steps"] == 1
    # Whole lines that say whose they are; what each has made is on stdout.
    for n, said in enumerate((first, second)):
        lines = [line for line in said.splitlines() if not line.endswith(".mp4")]
        assert lines and all(line.startswith(f"minit2v {n + 1}/2: ") for line in lines), said
    assert re.search(r"up-3.mp4: 2 frames of 64x64 in .* s; \d of 6 done, about \d+ seconds left here", first)
    assert second.splitlines()[-1] == f"minit2v 2/2: 1 of 3 prompts failed: see {tmp_path / 'two' / 'report.json'}"


def test_after_a_kill_what_is_whole_is_not_made_again(generate, alone, tmp_path):
    """A video that was cut off, and one with other settings, stay under their names."""
    folder = tmp_path / "made"
    with Processes(generate(folder), 1, tmp_path / "logs") as processes:
        processes.wait_for(0, r"\.mp4$")
        os.kill(processes.pids[0], signal.SIGKILL)
        assert processes.wait() == [-signal.SIGKILL]
    before = files_of(folder)
    assert 1 <= len(before) < 5 and before.items() <= alone.items()
    times = {name: (folder / name).stat().st_mtime_ns for name in before}
    (folder / ".minit2v-killed").mkdir()  # an unfinished video of a killed process
    os.utime(folder / ".minit2v-killed", (0, 0))
    cut, other = "a-green-ring-moving-right-3.mp4", "a-red-bar-3.mp4"
    assert not {cut, other} & before.keys()
    (folder / cut).write_bytes(alone[cut][:-100])
    assert read_metadata(folder / cut)["prompt"] == "a green ring moving right"  # which says nothing of its frames
    with Processes(lambda: cli.main(["generate", "a red bar", *FAST, "--steps", "2", "-o", str(folder)]), 1,
                   tmp_path / "logs") as processes:  # fmt: skip
        assert processes.wait() == [0]
    settings = (folder / other).read_bytes()
    with Processes(generate(folder), 3, tmp_path / "logs") as processes:
        assert sorted(processes.wait()) == [0, 0, 1]
        said = "".join(processes.said())
    assert f"warning: {folder / cut} is not complete" in said and said.count("are there already")
    made, again = files_of(folder), {cut: "a-green-ring-moving-right-3-2.mp4", other: "a-red-bar-3-2.mp4"}
    assert made.pop(cut) == alone[cut][:-100] and made.pop(other) == settings
    assert made == {again.get(name, name): data for name, data in alone.items()}
    assert times == {name: (folder / name).stat().st_mtime_ns for name in before}
    assert not list(folder.glob(".minit2v-killed")) and report_of(folder)["made"] == 5
    assert sorted(re.findall(r"^.*\.mp4$", said, re.M)) == sorted(f"{folder}/{name}" for name in made)


def test_a_prompt_that_fails_ends_no_other_process_of_torchrun(tmp_path):
    """The process that ends last returns the 1 of the first: torchrun would end the others."""
    (tmp_path / "list").write_text('{"0": "a \\ud800"}\na red bar\n')
    done = torchrun(2, "-m", "minit2v", "generate", "--prompts", "list", "--num-frames", "4",
                    "--steps", "12", "-o", "made", cwd=tmp_path)
    assert done.returncode == 1 and f'minit2v 1/2: error: "a \\ud800": {BROKEN}' in done.stderr, done.stderr
    assert list(files_of(tmp_path / "made")) == ["a-red-bar-0.mp4"] and done.stdout == "made/a-red-bar-0.mp4\n"
    assert report_of(tmp_path / "made")["made"] == 1


@pytest.fixture
def second_of_two(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("words", [["a cat"], ["--prompts", "-", "-o", "made/"], ["--prompts", "list"],
                                   ["--prompts", "list", "-o", "a.mp4"]])
def test_what_several_processes_cannot_share(second_of_two, capsys, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    Path("list").write_text("a cat\n")
    assert cli.main(["generate", *words]) == 2
    said = capsys.readouterr().err
    assert "which share a list of prompts: give --prompts FILE and -o FOLDER" in said
    assert os.listdir() == ["list"]


def test_each_process_takes_the_device_of_its_local_rank(second_of_two, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    assert parallel.own_device(torch.device("cuda")) == torch.device("cuda:1")
    assert parallel.own_device(torch.device("cuda:0")) == torch.device("cuda:0") and chosen == [1, 0]
    assert parallel.own_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="process 2 of this machine finds 1 device: start one process for each"):
        parallel.own_device(torch.device("cuda"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert parallel.own_device(torch.device("cuda")) == torch.device("cuda")


def test_whole_files(alone, tmp_path):
    data = next(iter(alone.values()))
    for content in (data, data[:-1], data[:40], b"", data + b"\0" * 9):
        (tmp_path / "a.mp4").write_bytes(content)
        assert batches.is_whole(tmp_path / "a.mp4") is (content == data)


# ------------------------------------------------------------------------------------------------------------- training

STEPS, ROWS = 3, 4
SMALL = {"block_out_channels": [8], "layers_per_block": 1, "cross_attention_dim": 8, "norm_num_groups": 4}
# The middle block has every kind of layer. Sharding and saving take their time for each parameter, however small.
SMALL_3D = {"down_block_types": ["DownBlock3D"], "up_block_types": ["UpBlock3D"], "attention_head_dim": 4}
SMALL_MOTION = {"down_block_types": ["DownBlockMotion"], "up_block_types": ["UpBlockMotion"],
                "num_attention_heads": 2, "motion_num_attention_heads": 2, "use_motion_mid_block": False}  # fmt: skip


def make_network(kind):
    """A small network in float64, and what of it is trained."""
    torch.manual_seed(0)
    if kind == "motion":
        network = UNetMotionModel(**SMALL, **SMALL_MOTION).double().eval()
        return network, choose(network, "motion")
    network = UNet3DConditionModel(**SMALL, **SMALL_3D).double().eval()
    if kind == "full":
        return network, choose(network)
    lora = add_lora(network, "both", 2, generator=torch.Generator().manual_seed(1))
    return network, [(f"{path}.{side}", getattr(b, side)) for path, b in lora.layers.items() for side in ("down", "up")]


class Loop:
    """A training loop of one's own: network, optimizer, moving average, checkpoints."""

    def __init__(self, world, kind, engine):
        self.world, self.done = world, 0
        self.network, trained = make_network(kind)
        ours = {id(p): name for name, p in self.network.named_parameters()}
        names = [(name, ours[id(p)]) for name, p in trained]
        if engine == "ddp":
            self.called = world.replicate(self.network)
        else:
            self.called = world.shard(self.network) if engine == "fsdp" else self.network
        parameters = dict(self.network.named_parameters())  # sharding makes others
        self.trained = {name: parameters[own] for name, own in names}
        self.optimizer = torch.optim.AdamW(self.trained.values(), 1e-2, fused=True)
        self.average = {name: p.detach().clone() for name, p in self.trained.items()}

    def step(self, accumulate=1):
        random = torch.Generator().manual_seed(self.done)
        x, target = (torch.randn(ROWS, 4, 2, 4, 4, generator=random, dtype=torch.float64) for _ in range(2))
        text = torch.randn(ROWS, 3, 8, generator=random, dtype=torch.float64)
        mine = self.world.share(range(ROWS))
        self.optimizer.zero_grad(set_to_none=True)
        for k in range(accumulate):
            rows = mine[k::accumulate]
            with self.world.accumulating(self.called, last=k == accumulate - 1):
                loss = (self.called(x[rows], 7, text[rows]) - target[rows]).square().mean((1, 2, 3, 4)).sum() / ROWS
                self.world.backward(loss, self.called)
        self.world.sum_gradients(self.called)
        norm = self.world.clip(self.trained.values(), 0.1)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(*(list(map(parallel.local, x.values())) for x in (self.average, self.trained)), 0.3)
        self.done += 1
        return norm

    def tensors(self):
        state = {f"{name}/{k}": x for name, p in self.trained.items() for k, x in self.optimizer.state[p].items()}
        return state | {f"{name}/weight": p.detach() for name, p in self.trained.items()} | {
            f"{name}/average": x for name, x in self.average.items()} | {"done": torch.tensor(self.done)}

    def save(self, folder):
        self.world.save_sharded(folder / f"step-{self.done}", self.tensors())

    @torch.no_grad()
    def load(self, path):
        found = self.world.load_sharded(path, lambda name: self.trained.get(name.rpartition("/")[0]))
        self.done = int(found.pop("done"))
        for name, x in found.items():
            of, _, what = name.rpartition("/")
            if what in ("weight", "average"):
                (self.trained if what == "weight" else self.average)[of].copy_(x)
            else:
                self.optimizer.state[self.trained[of]][what] = x

    def result(self):
        return self.world.gather({name: p for name, p in self.trained.items()} | {
            f"{name}/average": self.average[name] for name in list(self.average)[::9]})  # fmt: skip


RUNS = {  # processes: what is trained, how, and in how many pieces each makes its rows
    1: [("full", "plain", 1), ("motion", "plain", 1), ("lora", "plain", 1)],
    2: [("full", "fsdp", 2), ("motion", "fsdp", 1), ("lora", "plain", 2)],
    4: [("full", "ddp", 1), ("full", "fsdp", 1), ("lora", "plain", 1)],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(processes) -> {(what, how): (gradient norms, weights)}; (what, "continued"): two steps were others'."""
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # noqa: F401 - once, and not in each child

    kept, folders = tmp_path_factory.mktemp("checkpoints"), {}

    @cache
    def of(size):
        folders[size] = folder = tmp_path_factory.mktemp(f"trained-{size}")

        def run(world, loop, name, accumulate=1):
            norms = []
            while loop.done < STEPS:
                norms.append(loop.step(accumulate))
                if loop.done == 2 == size:
                    loop.save(kept / name.replace(" ", "-"))
            if weights := loop.result():
                torch.save((norms, weights), folder / name)
            if name == "full fsdp":
                world.make_whole(loop.network)
                if world.is_first:  # as if it had never been in parts
                    assert type(loop.network) is UNet3DConditionModel
                    assert not any(hasattr(x, "to_local") for x in loop.network.state_dict().values())
                    loop.network.save_pretrained(folder / f"{name} saved")

        def work():
            with connected() as world:
                for kind, engine, accumulate in RUNS[size]:
                    run(world, Loop(world, kind, engine), f"{kind} {engine}", accumulate)
                if size < 4:  # in the same processes: starting them and their first FSDP2 take most of the time
                    run_trainers(world, folder / "trainer")
                if size != 2:
                    loop = Loop(world, "full", "fsdp")
                    loop.load(kept / "full-fsdp" / "step-2")
                    run(world, loop, "full continued")

        if size != 2:
            of(2)
        with store() as environment, Processes(work, size, folder / "logs", **environment) as processes:
            assert not any(processes.wait()), processes.said()
        return {tuple(path.name.split()): torch.load(path) for path in folder.iterdir() if path.is_file()}

    of.folders = folders
    return of


def check_equal(weights, expected):
    """Within rounding of float64. A name with a slash is that of a moving average."""
    assert weights.keys() == expected.keys() and len(weights) > 10
    worst = max((weights[name] - expected[name]).abs().max().item() for name in weights)
    assert worst < 1e-10, worst
    assert any((x - expected[name.partition("/")[0]]).abs().max() > 1e-5 for name, x in expected.items() if "/" in name)


@pytest.mark.parametrize("size,kind,engine", [(size, *run[:2]) for size in (2, 4) for run in RUNS[size]])
def test_several_processes_train_the_weights_of_one(size, kind, engine, trained):
    (norms, weights), (expected_norms, expected) = trained(size)[kind, engine], trained(1)[kind, "plain"]
    assert torch.allclose(torch.tensor(norms), torch.tensor(expected_norms), rtol=1e-10, atol=0)
    check_equal(weights, expected)


@pytest.mark.parametrize("size", [1, 4])
def test_a_checkpoint_of_two_sharded_processes_goes_on_with_others(size, trained):
    norms, weights = trained(size)["full", "continued"]
    assert len(norms) == STEPS - 2
    check_equal(weights, trained(1)["full", "plain"][1])


def test_a_sharded_network_is_saved_as_any_other(trained):
    _, weights = trained(2)["full", "fsdp"]
    saved = UNet3DConditionModel.from_pretrained(trained.folders[2] / "full fsdp saved", dtype=torch.float64)
    state = {name: x for name, x in saved.diffusers_state_dict().items()}
    assert all(torch.equal(state[name], x) for name, x in weights.items() if "/" not in name) and len(state) > 100


# ---------------------------------------------------------------------------------------------------------- the trainer


class Clips:
    """Random latents in the place of a data set. killer: called with the items of each piece."""

    fingerprint, killer = "some", staticmethod(lambda items: None)

    def __len__(self):
        return 7

    def batch(self, step, batch):
        return [(step * batch + row) % len(self) for row in range(batch)]

    def load(self, items):
        self.killer(items)
        noise = torch.Generator().manual_seed(5)
        latents = torch.randn(len(self), 4, 3, 4, 4, generator=noise, dtype=torch.float64)
        text = torch.randn(len(self), 5, 8, generator=noise, dtype=torch.float64)
        return Piece(latents[items], text[items], [f"clip{n}.mp4" for n in items], items)


def run_trainer(world, folder, train, engine, killer=None):
    """A run of the trainer in float64, from its newest checkpoint; returns its weights, on the first process."""
    torch.manual_seed(0)
    unet = UNet3DConditionModel(**SMALL, **SMALL_3D).double()
    pipe = TextToVideoSDPipeline(None, None, None, unet, DDIMScheduler())
    recipe = Recipe(data=("clips",), out=folder, train=train, parallel=engine, steps=4, batch=4, save_every=2, warmup=0,
                    learning_rate=1e-3, rank=2, ema=0.9, validate_every=0, temporal_dropout=0.0,
                    accumulate=2 if train == "temporal" else 1)  # fmt: skip
    data = Clips()
    trainer = Trainer(pipe, data, recipe, world, say=print)
    data.killer = lambda items: killer and killer(trainer)
    trainer.run()
    names = [name for name, _ in trainer.trained]
    return world.gather(dict(trainer.trained) | {
        f"{name}/average": x for name, x in list(zip(names, trainer.average.values, strict=True))[::9]})  # fmt: skip


TRAINED = [("temporal", "fsdp"), ("temporal", "ddp"), ("lora", "ddp"), ("motiondirector", "ddp")]
GOES_ON = [("ddp", "fsdp"), ("fsdp", "ddp")]  # who has made the first two steps, and who makes the others


def second_half(world, made, folder, engine):
    """The end of a run of which the last checkpoint is lost."""
    if world.is_first:
        shutil.copytree(made, folder)
        for path in folder.glob("step-000004*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    world.barrier("half a run")
    return run_trainer(world, folder, "temporal", engine)


def run_trainers(world, folder):
    """All runs, of one process or of two; the first writes their weights."""
    for train, engine in TRAINED if world.size > 1 else TRAINED[1:]:
        if weights := run_trainer(world, folder / f"{train}-{engine}", train, engine):
            torch.save(weights, folder / f"{train} {engine}")
    for before, engine in GOES_ON if world.size > 1 else ():
        if weights := second_half(world, folder / f"temporal-{before}", folder / f"{before}-{engine}", engine):
            torch.save(weights, folder / f"{before} {engine}")


@pytest.fixture(scope="module")
def by_trainer(trained):
    """by_trainer(processes) -> the folder of the runs, and {(what, how): weights}."""

    @cache
    def of(size):
        trained(size)
        folder = trained.folders[size] / "trainer"
        return folder, {tuple(path.name.split()): torch.load(path) for path in folder.iterdir() if path.is_file()}

    return of


@pytest.mark.parametrize("train,engine", TRAINED)
def test_the_trainer_of_two_processes_makes_the_weights_of_one(train, engine, by_trainer):
    (folder, several), (_, alone) = by_trainer(2), by_trainer(1)
    check_equal(several[train, engine], alone[train, "ddp"])
    kept = {path.name for path in (folder / f"{train}-{engine}").glob("step-*")}
    assert kept == ({"step-000002", "step-000004"} if engine == "fsdp" else {"step-000002.ckpt", "step-000004.ckpt"})


@pytest.mark.parametrize("before,engine", GOES_ON)
def test_a_checkpoint_goes_on_with_the_other_engine(before, engine, by_trainer):
    (folder, several), (_, alone) = by_trainer(2), by_trainer(1)
    said = (folder.parent / "logs" / "process-0").read_text()
    assert f"going on at step 2 from {folder / f'{before}-{engine}'}" in said
    check_equal(several[before, engine], alone["temporal", "ddp"])


def test_the_trainer_goes_on_from_the_parts_of_others(by_trainer, tmp_path):
    """A checkpoint of two processes, which one takes up."""
    weights = second_half(parallel.World(), by_trainer(2)[0] / "temporal-fsdp", tmp_path / "run", "fsdp")
    check_equal(weights, by_trainer(1)[1]["temporal", "ddp"])


def test_killed_workers_are_started_again_and_the_end_is_the_same_to_the_bit(by_trainer, tmp_path):
    """torchrun's own agent, whose workers are forked. The first start is killed in one run, the second in the next."""
    pairs = {"temporal": "fsdp", "lora": "ddp"}

    def work():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # of the agent, who forked us; those of torchrun are new programs
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]

        def killer(trainer):
            train = trainer.recipe.train
            print("attempt", attempt, train, "step", trainer.done)
            if (attempt, train, trainer.done, trainer.world.rank) in (("0", "temporal", 3, 1), ("1", "lora", 3, 1)):
                os.kill(os.getpid(), signal.SIGKILL)

        with connected() as world:
            for train, engine in pairs.items():
                if weights := run_trainer(world, tmp_path / train, train, engine, killer):
                    torch.save(weights, tmp_path / f"{train} end")

    def agent():
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        elastic_launch(LaunchConfig(
            1, 1, nproc_per_node=2, run_id="killed", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=2,
            monitor_interval=0.1, start_method="fork"), work)()  # fmt: skip

    with Processes(agent, 1, tmp_path / "logs") as processes:
        assert processes.wait() == [0], processes.said()
        said = processes.said()[0]
    steps = {(a, train, int(n)) for a, train, n in re.findall(r"attempt (.) (\w+) step (.)", said)}
    assert steps == {*(("0", "temporal", n) for n in range(4)), *(("1", "temporal", n) for n in (2, 3)),
                     *(("1", "lora", n) for n in range(4)), *(("2", "lora", n) for n in (2, 3))}  # fmt: skip
    for pair in pairs.items():
        weights, expected = torch.load(tmp_path / f"{pair[0]} end"), by_trainer(2)[1][pair]
        assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)


# ----------------------------------------------------------------------------------------------- what the parts promise


def test_what_the_processes_tell_each_other(tmp_path):
    def work():
        with connected() as world:
            assert world.share(range(6)) == [[0, 1, 2], [3, 4, 5]][world.rank]
            with pytest.raises(ValueError, match="the batch must be a multiple of the 2 processes, not 5"):
                world.share(range(5))
            assert world.sum([1.5, world.rank]) == [3.0, 1.0]
            assert world.from_first(lambda: f"of {world.rank}") == "of 0"
            with pytest.raises(ValueError, match="the first says no"):
                world.from_first(lambda: int("x") if world.rank else fail())
            # Parameters that no process uses have no gradient; what one alone uses is summed all the same.
            parameters = [torch.nn.Parameter(torch.ones(n + 1)) for n in range(3)]
            parameters[world.rank].grad = torch.full((world.rank + 1,), 2.0)
            world.sum_gradients(parameters)
            assert [p.grad if p.grad is None else p.grad.tolist() for p in parameters] == [[2.0], [2.0, 2.0], None]
            world.barrier("both are here")
            if world.is_first:
                with pytest.raises(RuntimeError, match="process 1 of 2 waited in vain .*'step-7'.*Ranks 1 failed"):
                    world.barrier("step-7", timeout=0.5)
            else:
                time.sleep(1)

    def fail():
        raise ValueError("the first says no")

    with store() as environment, Processes(work, 2, tmp_path / "logs", **environment) as processes:
        assert not any(processes.wait()), processes.said()


def test_alone_nothing_is_asked():
    world = parallel.World()
    assert world.is_first and world.share([1, 2]) == [1, 2] and world.sum([3]) == [3] and world.from_first(int) == 0
    layer = torch.nn.Linear(2, 2)
    assert world.replicate(layer) is layer and world.shard(layer) is layer
    with world.accumulating(layer, last=False):
        world.backward(layer(torch.ones(1, 2)).sum(), layer)
    world.sum_gradients(layer)
    world.barrier("nobody")
    assert world.clip(layer.parameters(), 10.0) == pytest.approx(6**0.5) and layer.weight.grad.tolist() == [[1, 1]] * 2


def test_checkpoints_that_are_not_whole(tmp_path):
    world = parallel.World()
    world.save_sharded(tmp_path / "step-1", {"a": torch.arange(3), "b/c": torch.tensor(2.5)})
    assert os.listdir(tmp_path) == ["step-1"]
    found = world.load_sharded(tmp_path / "step-1", lambda name: None)
    assert found["a"].tolist() == [0, 1, 2] and found["b/c"].item() == 2.5
    (tmp_path / "step-1" / ".metadata").unlink()
    with pytest.raises(ValueError, match="step-1 is not a whole checkpoint"):
        world.load_sharded(tmp_path / "step-1", lambda name: None)
