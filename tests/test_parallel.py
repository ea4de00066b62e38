"""Several processes: lists of prompts that they share, and training that gives the weights of one process."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from minit2v import cli, parallel
from minit2v.cli import batches
from minit2v.files.video import read_metadata

LONGEST = 60  # seconds: no process of these tests lives longer


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


@pytest.fixture
def together(tmp_path):
    """together(function, size) -> what each process has said, once all have ended well."""

    def call(function, size, **environment):
        with Processes(function, size, tmp_path / "logs", **environment) as processes:
            codes = processes.wait()
            assert not any(codes), (codes, processes.said())
            return processes.said()

    return call


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
    assert re.search(r"up-3.mp4: 2 frames of 64x64 in .* s; \d of 6 done, about . seconds left here", first)
    assert second.splitlines()[-1] == f"minit2v 2/2: 1 of 3 prompts failed: see {tmp_path / 'two' / 'report.json'}"


def test_after_a_kill_what_is_whole_is_not_made_again(generate, alone, tmp_path):
    folder = tmp_path / "made"
    with Processes(generate(folder), 1, tmp_path / "logs") as processes:
        processes.wait_for(0, r"\.mp4$")
        os.kill(processes.pids[0], signal.SIGKILL)
        assert processes.wait() == [-signal.SIGKILL]
    before = files_of(folder)
    assert 1 <= len(before) < 5 and before.items() <= alone.items()
    times = {name: (folder / name).stat().st_mtime_ns for name in before}
    (folder / ".minit2v-killed").mkdir()  # what it had in hand then
    os.utime(folder / ".minit2v-killed", (0, 0))
    with Processes(generate(folder), 3, tmp_path / "logs") as processes:
        assert sorted(processes.wait()) == [0, 0, 1]
        said = "".join(processes.said())
    assert files_of(folder) == alone and not list(folder.glob(".minit2v-killed"))
    assert times == {name: (folder / name).stat().st_mtime_ns for name in before}
    assert sorted(re.findall(r"^.*\.mp4$", said, re.M)) == sorted(f"{folder}/{name}" for name in alone)
    assert said.count("are there already") and report_of(folder)["made"] == 5


def test_other_settings_and_files_that_are_not_whole_get_other_names(generate, alone, tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    name, other = "a-red-bar-3.mp4", "a-green-ring-moving-right-3.mp4"
    for known, data in alone.items():
        (folder / known).write_bytes(data[:-100] if known == name else data)
    assert read_metadata(folder / name)["prompt"] == "a red bar"  # which says nothing of its frames
    with Processes(generate(folder), 1, tmp_path / "logs") as processes:
        assert processes.wait() == [1]
        assert f"warning: {folder / name} is not whole" in processes.said()[0]
    assert files_of(folder).keys() == {*alone, "a-red-bar-3-2.mp4"}
    with Processes(generate(folder, "--steps", 2), 2, tmp_path / "logs") as processes:
        assert sorted(processes.wait()) == [0, 1]
    made = files_of(folder)
    assert len(made) == 11 and made[other] == alone[other] != made["a-green-ring-moving-right-3-2.mp4"]
    assert report_of(folder)["settings"]["steps"] == 2 and report_of(folder)["made"] == 5


def test_a_prompt_that_fails_ends_no_other_process_of_torchrun(tmp_path):
    """The process that ends last returns the 1 of the first: torchrun would end the others."""
    (tmp_path / "list").write_text('{"0": "a \\ud800"}\na red bar\n')
    done = torchrun(2, "-m", "minit2v", "generate", "--prompts", "list", "--steps", "30", "-o", "made", cwd=tmp_path)
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
    assert "several processes share a list of prompts: give --prompts FILE and -o FOLDER" in said
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
