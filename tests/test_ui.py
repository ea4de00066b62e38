"""`minit2v ui`: a video is made, cancelled and remade; nothing outside the output folder is read or written."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

from minit2v import cli
from minit2v.files.video import export_to_video, load_video, read_metadata
from minit2v.ui.work import Cancelled, Made, Update, Work, describe

DOCS = Path(__file__).parents[1] / "docs" / "explorer"
sys.path.insert(0, str(DOCS))
import browser as chromium  # noqa: E402

sys.path.remove(str(DOCS))
FORM = {"command": "generate", "prompt": "a red circle", "model": "shapes", "steps": 3, "guidance_scale": 1.5,
        "scheduler": "dpm++-2m", "seed": 7, "num_frames": 4, "height": 32, "width": 32, "fps": 8.0}  # fmt: skip
SECRET = b"what nobody else may read"


def made(work: Work, form: dict) -> Path:
    """The video of a form, after all its updates."""
    *_, last = work.make(form)
    assert isinstance(last, Made)
    return last.path


def refused(work: Work, form: dict) -> str:
    with pytest.raises(ValueError) as e:
        list(work.make(form))
    return str(e.value)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Work:
    return Work(tmp_path_factory.mktemp("ui") / "videos", device="cpu")


@pytest.fixture(scope="module")
def first(work) -> tuple[Path, list]:
    """The video of FORM, and the updates on the way."""
    *updates, last = work.make(FORM)
    return last.path, updates


def pixels(path: Path) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in load_video(path)])


def test_a_video_is_that_of_the_command_line(work, first, tmp_path):
    path, updates = first
    assert [(u.done, u.steps) for u in updates] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [u.preview is not None for u in updates] == [False, True, True, False]
    words = [f"--{k.replace('_', '-')}={v}" for k, v in FORM.items() if k not in ("command", "prompt")]
    out = tmp_path / "by-command.mp4"
    assert cli.main(["generate", *words, "--device=cpu", "-o", str(out), "--", FORM["prompt"]]) == 0
    assert read_metadata(path) == read_metadata(out)
    np.testing.assert_array_equal(pixels(path), pixels(out))  # previews change nothing


def test_the_preview_comes_close_to_the_video(work, first):
    """The guess, not the noisy latents: it is near the result while half of the noise is still there."""
    path, updates = first
    frames = pixels(path)[[0, 2, 3]].astype(float)
    for update in updates[1:3]:
        assert update.preview.size == (3 * 128, 128)
        strip = np.asarray(update.preview.resize((3 * 32, 32), 0), float)
        error = np.abs(np.concatenate(list(frames), axis=1) - strip).mean()
        assert error < 3  # of 255; the noisy latents are 10 to 13 away


def test_cancelled_and_remade(work, first):
    before = sorted(p for p in work.folder.rglob("*"))
    updates = work.make(FORM | {"steps": 500, "seed": 8})
    while (update := next(updates)).done < 1:
        pass
    assert isinstance(update, Update)
    assert "another video is being made" in refused(work, FORM)
    assert work.cancel()
    with pytest.raises(Cancelled):
        list(updates)
    assert not work.cancel()
    updates = work.make(FORM | {"steps": 500, "seed": 8})
    next(updates)
    work.end()
    assert not work.cancel() and sorted(p for p in work.folder.rglob("*")) == before
    form, lost = work.settings(first[0].name)
    assert form == FORM and lost == []
    again = made(work, form)
    assert again != first[0] and again.parent == work.folder
    np.testing.assert_array_equal(pixels(again), pixels(first[0]))
    assert again in work.videos() and work.caption(again) == describe(form)


def test_restyle_and_animate(work, first):
    upload = work.cache / "sent" / "clip.mp4"
    upload.parent.mkdir()
    shutil.copy(first[0], upload)
    video = work.keep(str(upload))
    restyle = {"command": "restyle", "prompt": "a blue square", "video": video, "strength": 0.5, "steps": 2, "seed": 1}
    path = made(work, restyle)
    form, lost = work.settings(path.name)
    assert {k: form[k] for k in restyle} == restyle and lost == []
    assert read_metadata(path)["video"] == str(work.folder / video)
    lora = {"motion_lora": {"shapes-orbit": 0.5}}
    animate = {"command": "animate", "prompt": "a blue square", "base": "shapes-image", "steps": 2, "num_frames": 4,
               "height": 32, "width": 32, "seed": 1} | lora  # fmt: skip
    path = made(work, animate)
    form, lost = work.settings(path.name)
    assert {k: form[k] for k in animate} == animate and lost == []


@pytest.mark.parametrize("change, words", [
    ({"prompt": " "}, "write a prompt first"),
    ({"steps": "many"}, "--steps: must be a whole number of at least 1, not 'many'"),
    ({"scheduler": "eular"}, "no scheduler is called 'eular' (nearest: 'euler')"),
    ({"scheduler": "help"}, "no scheduler is called 'help'"),
    ({"height": 33}, "height must be a multiple of 8"),
    ({"model": "/etc"}, "/etc is not offered here"),
    ({"lora": {"/etc/passwd": 1}}, "/etc/passwd is not offered here"),
    ({"lora": {"/etc/passwd": 0}}, "/etc/passwd is not offered here"),
    ({"command": "restyle"}, "choose a video to restyle first"),
    ({"command": "restyle", "video": "/etc/passwd"}, "is not a file in"),
    ({"command": "convert"}, "unknown command 'convert'; the commands are generate, restyle, animate"),
    ({"output": "/tmp"}, "the page has no field 'output'"),
])  # fmt: skip
def test_what_is_wrong_is_said_and_the_next_video_can_be_made(work, change, words):
    before = sorted(work.folder.rglob("*"))
    assert words in refused(work, FORM | change)
    assert sorted(work.folder.rglob("*")) == before and not work.cancel()


def test_a_file_of_others_names_no_model_and_no_path(work, tmp_path):
    frames = np.zeros((2, 32, 32, 3), np.uint8)
    stored = {"minit2v": "restyle", "prompt": "--output=/tmp/x", "model": "/srv/theirs", "video": "/etc/passwd",
              "lora": [{"path": "theirs.safetensors", "weight": 1.0}], "window": 8, "steps": 4}  # fmt: skip
    export_to_video(frames, work.cache / "theirs.mp4", metadata=stored)
    form, lost = work.settings(f"{work.cache}/theirs.mp4")
    assert {k: v for k, v in form.items() if v} == {"command": "restyle", "prompt": "--output=/tmp/x", "steps": 4}
    assert [line.split()[0] for line in lost] == ["model", "video", "lora", "window"]
    export_to_video(frames, work.cache / "wrong.mp4", metadata=stored | {"steps": "--output=/tmp/x"})
    with pytest.raises(ValueError, match="are not valid: argument --steps"):
        work.settings(f"{work.cache}/wrong.mp4")
    export_to_video(frames, work.cache / "none.mp4")
    with pytest.raises(ValueError, match="no settings of minit2v are stored"):
        work.settings(f"{work.cache}/none.mp4")


@pytest.fixture(scope="module")
def outside(work) -> list[str]:
    """Paths that lead out of the folder to files that are there."""
    secret = work.folder.parent / "secret.mp4"
    secret.write_bytes(SECRET)
    (work.folder / "link.mp4").symlink_to(secret)
    (work.folder / "up").symlink_to(work.folder.parent)
    return ["../secret.mp4", str(secret), "link.mp4", "up/secret.mp4", f"{work.folder}/../secret.mp4",
            f"{work.folder}/link.mp4", f"{work.cache}/../../secret.mp4", "/etc/passwd", "../../../../../../etc/passwd",
            "/proc/self/environ", ".", "", "a\0b"]  # fmt: skip


def test_no_path_leads_out_of_the_folder(work, outside):
    for name in outside:
        for call in (work.inside, work.settings, work.keep):
            with pytest.raises(ValueError, match="is not a file in"):
                call(name)
        assert "is not a file in" in refused(work, FORM | {"command": "restyle", "video": name or "."})
    assert "link.mp4" not in [path.name for path in work.videos()]


@pytest.fixture(scope="module")
def address(work):
    if importlib.util.find_spec("gradio") is None:
        if os.environ.get("CI"):
            pytest.fail("Gradio belongs to the test extra")
        pytest.skip("Gradio is not installed")
    from minit2v.ui.page import serve

    asked = []

    def connect(self, where):
        asked.append(where)
        return real(self, where)

    def look_up(host, *rest, **more):
        asked.append((host,))
        return lookup(host, *rest, **more)

    real, socket.socket.connect = socket.socket.connect, connect
    lookup, socket.getaddrinfo = socket.getaddrinfo, look_up
    try:
        with serve(work, "127.0.0.1", 0) as page:
            time.sleep(0.5)  # for threads that would call home
            socket.socket.connect, socket.getaddrinfo = real, lookup
            here = {"127.0.0.1", "localhost", b"127.0.0.1", None}
            assert {where[0] for where in asked if isinstance(where, tuple)} <= here, asked
            yield page
    finally:
        socket.socket.connect, socket.getaddrinfo = real, lookup


def ask(url: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    request = urllib.request.Request(url, data, {k.replace("_", "-"): v for k, v in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as e:
        return e.code, e.read()


def test_the_server_gives_only_files_of_the_folder(work, address, first, outside):
    status, page = ask(address)
    assert status == 200 and b"minit2v" in page
    config = json.loads(ask(f"{address}config")[1])
    assert not config["analytics_enabled"]
    files = f"{address}gradio_api/file="
    status, video = ask(files + quote(str(first[0])))
    assert status == 200 and video == first[0].read_bytes()
    for name in outside:
        for way in (quote(name), quote(name, safe=""), quote(quote(name, safe="")), quote(f"{work.folder}/{name}")):
            for door in ("gradio_api/file=", "gradio_api/file/", "file="):
                status, said = ask(f"{address}{door}{way}")
                assert status >= 400 and SECRET not in said and b"root:" not in said, (door, way)
    assert ask(files + "http://127.0.0.1:9/x")[0] == 403
    assert ask(f"{address}gradio_api/proxy=http://127.0.0.1:9/x")[0] == 403
    assert ask(address, Host="evil.example")[0] == 403
    port = address.rstrip("/").rpartition(":")[2]
    assert ask(address, Host=f"localhost:{port}")[0] == 200
    listening = Path("/proc/net/tcp").read_text()
    assert f"0100007F:{int(port):04X} 00000000:0000 0A" in listening  # 127.0.0.1, and
    assert f" 00000000:{int(port):04X} 00000000:0000 0A" not in listening


def test_uploads_stay_in_the_folder(work, address):
    before = set(work.folder.parent.iterdir())
    for name in ("../../out.mp4", "/tmp/minit2v-out.mp4", "..%2f..%2fout.mp4"):
        body = (f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
                "Content-Type: video/mp4\r\n\r\ncontent\r\n--x--\r\n").encode()  # fmt: skip
        status, said = ask(f"{address}gradio_api/upload", body, Content_Type="multipart/form-data; boundary=x")
        assert status < 500
        for path in json.loads(said) if status == 200 else ():
            assert Path(os.path.realpath(path)).is_relative_to(work.cache)
    assert set(work.folder.parent.iterdir()) == before and not Path("/tmp/minit2v-out.mp4").exists()


def test_calls_name_no_other_file(work, address, outside):
    """Who speaks to the server without the page may send any path in the place of an uploaded file."""
    config = json.loads(ask(f"{address}config")[1])
    upload = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == "upload")
    number = next(d["id"] for d in config["dependencies"] if d["inputs"] == [upload])
    for path in [p for p in outside if p]:
        data = [{"path": path, "meta": {"_type": "gradio.FileData"}}]
        body = json.dumps({"data": data, "fn_index": number, "session_hash": "x1"}).encode()
        status, _ = ask(f"{address}gradio_api/queue/join", body, Content_Type="application/json")
        if status != 200:
            continue
        with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash=x1", timeout=30) as stream:
            said = stream.read()
        assert SECRET not in said and b"root:" not in said
        last = [json.loads(line[6:]) for line in said.split(b"\n\n") if b"process_completed" in line][-1]
        assert not last["success"] or "error" in str(last["output"]), path


def test_without_gradio_one_line_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("minit2v.cli.ui.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["ui"]) == 1
    assert capsys.readouterr().err == 'minit2v: error: minit2v ui needs Gradio: pip install "minit2v[ui]"\n'
    assert cli.main(["ui", "--port", "70000"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_the_command_serves_and_ends(forked, tmp_path, address):
    child = forked(lambda: sys.exit(cli.main(["ui", "--port", "0", "-o", str(tmp_path / "videos"), "--device", "cpu"])))
    there = child.said.readline().decode().strip()
    assert there.startswith("http://127.0.0.1:") and ask(there)[0] == 200
    os.kill(child.pid, signal.SIGINT)
    code, said = child.wait()
    assert code == 130 and f"videos are written to {tmp_path}/videos" in said and "Traceback" not in said


STATE = "(document.querySelector('#state .prose') || document.querySelector('#state')).innerText.trim()"


def put(window: chromium.Browser, field: str, text: str) -> None:
    window.click(f"#{field} textarea, #{field} input")
    window.run("document.activeElement.select()")
    window.call("Input.insertText", text=text)


def test_in_a_browser(work, address):
    if not os.environ.get("MINIT2V_NEEDS_CHROMIUM"):  # a busy machine takes minutes to draw the page
        pytest.skip("with MINIT2V_NEEDS_CHROMIUM=1 alone")
    if (program := chromium.find_chromium()) is None:
        pytest.fail("no Chromium is installed here")
    count = len(work.videos())
    with chromium.Browser(program, 1280, 1100) as window:
        window.call("Page.navigate", url=address)
        window.wait("document.querySelector('#make') !== null")
        time.sleep(1)  # Gradio loses a click while it starts
        for name, text in {"prompt": "a red circle", "steps": "2", "seed": "5", "width": "32", "height": "32",
                           "num_frames": "4"}.items():  # fmt: skip
            put(window, name, text)
        window.click("#make")
        window.wait(f"{STATE}.startsWith('made ')")
        newest = work.videos()[0]
        assert read_metadata(newest)["seed"] == 5 and len(work.videos()) == count + 1
        put(window, "steps", "900")
        window.click("#make")
        window.wait(f"{STATE}.startsWith('step ')")
        window.click("#cancel")
        window.wait(f"{STATE}.startsWith('cancelled')")
        assert len(work.videos()) == count + 1
        window.click("#again")
        window.wait(f"{STATE}.startsWith('these are the settings')")
        assert window.run("document.querySelector('#steps textarea, #steps input').value") == "2"
        window.click("#make")
        window.wait(f"{STATE}.startsWith('made ')")
        np.testing.assert_array_equal(pixels(work.videos()[0]), pixels(newest))
        window.resize(360, 740, 2, True)
        assert window.run("document.documentElement.scrollWidth") <= 360
        assert window.messages == []
        assert [url for url in window.requests if not url.startswith((address, "data:", "blob:"))] == []
