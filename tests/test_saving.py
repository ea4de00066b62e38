"""Folders of a model change as a whole: a kill or an error leaves the old one or the new one."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from minit2v import AutoencoderKL, CLIPTokenizer, TextToVideoSDPipeline
from minit2v.files import saving
from minit2v.files.saving import filling


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_official_folder):
    """Its UNet has one level: it is loaded many times."""
    shallow = dict(block_out_channels=[32], down_block_types=["CrossAttnDownBlock3D"],
                   up_block_types=["CrossAttnUpBlock3D"])
    return make_official_folder(tmp_path_factory.mktemp("model"), small=True, unet=shallow)


@pytest.fixture
def folder(model, tmp_path):
    return shutil.copytree(model, tmp_path / "model")


NETWORKS = ("text_encoder", "unet", "vae")


def marks(folder) -> list[float]:
    """A number of each network: 0 in the old model, 1 in the new one."""
    pipe = TextToVideoSDPipeline.from_pretrained(folder)
    return [float(next(iter(getattr(pipe, name).state_dict().values())).flatten()[0]) for name in NETWORKS]


def mark(folder, value: float):
    pipe = TextToVideoSDPipeline.from_pretrained(folder)
    with torch.no_grad():
        for name in NETWORKS:
            next(getattr(pipe, name).parameters()).fill_(value)
    return pipe


def save_and_die(folder: Path, moment: int) -> None:
    """In a process of its own: saves, and is killed where files change for the `moment`th time."""
    left = moment

    def dying(function):
        def counted(*args, **kw):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*args, **kw)

        return counted

    os.replace, os.unlink, os.rename, Path.unlink = map(dying, (os.replace, os.unlink, os.rename, Path.unlink))
    with filling(folder) as new:
        for part in ("unet", "vae"):
            (new / part).mkdir()
            for name in ("diffusion_pytorch_model.safetensors", "config.json"):
                (new / part / name).write_text("new")
        (new / "model_index.json").write_text("new")


def test_a_kill_at_any_moment_leaves_the_old_the_new_or_what_does_not_load(tmp_path):
    files = [f"{part}/{name}" for part in ("unet", "vae") for name in
             ("diffusion_pytorch_model.safetensors", "config.json")]  # fmt: skip
    found = set()
    for moment in range(20):
        folder = tmp_path / str(moment)
        for name in (*files, "model_index.json", "README.md", "unet/diffusion_pytorch_model.bin"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("old")
        if (child := os.fork()) == 0:
            try:
                save_and_die(folder, moment)
            finally:
                os._exit(0)
        status = os.waitpid(child, 0)[1]
        has = {name: (folder / name).read_text() for name in (*files, "model_index.json") if (folder / name).is_file()}
        if status == 0:
            assert set(has.values()) == {"new"} and len(has) == 5 and moment > 5
            assert not (folder / "unet/diffusion_pytorch_model.bin").exists()  # to be asked for
            assert (folder / "README.md").read_text() == "old"
            assert not [p for p in folder.rglob(".*")]
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        whole = len(has) == 5 and len(set(has.values())) == 1
        for part in ("unet", "vae"):  # each by itself, too
            pair = [has.get(f"{part}/{name}") for name in ("diffusion_pytorch_model.safetensors", "config.json")]
            assert pair[0] == pair[1] or None in pair
        assert whole or "model_index.json" not in has
        found.add("whole" if whole else "incomplete")
    else:
        raise AssertionError("it never ended")
    assert found == {"whole", "incomplete"}


def test_an_error_in_the_middle_leaves_the_old_model(folder, monkeypatch):
    old, before = marks(folder), sorted(folder.rglob("*"))
    pipe = mark(folder, 1.0)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AutoencoderKL, "save_pretrained", full)  # the last of all parts
    with pytest.raises(OSError, match="No space left"):
        pipe.save_pretrained(folder)
    assert marks(folder) == old and sorted(folder.rglob("*")) == before
    with pytest.raises(OSError, match="No space left"):
        pipe.save_pretrained(folder.parent / "new")
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model"]


def test_a_model_is_saved_over_the_one_that_it_was_loaded_from(folder):
    (folder / "notes.txt").write_text("mine")
    mark(folder, 1.0).save_pretrained(folder)  # whose weights are mapped from there
    assert marks(folder) == [1.0, 1.0, 1.0]
    assert (folder / "notes.txt").read_text() == "mine" and not list(folder.rglob(".*"))
    link = folder.with_name("link")
    link.symlink_to(folder)
    mark(folder, 2.0).save_pretrained(link)
    assert link.is_symlink() and marks(folder) == [2.0, 2.0, 2.0]


def test_no_weights_of_before_are_read_in_the_place_of_new_ones(folder, caplog):
    """Another kind of file, shards, and the list of shards that diffusers reads first."""
    unet = folder / "unet"
    for name in ("diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model.safetensors.index.json",
                 "diffusion_pytorch_model.fp16.safetensors"):
        (unet / name).write_text("of before")
    mark(folder, 1.0).save_pretrained(folder, safe_serialization=False)
    assert marks(folder) == [1.0, 1.0, 1.0]
    assert sorted(p.name for p in unet.iterdir()) == [
        "config.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"]
    removed = [r.args[0] for r in caplog.records if "is removed" in r.msg]
    assert str(unet / "diffusion_pytorch_model.safetensors") in removed and len(removed) == 5
    tokens = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    (folder / "tokenizer" / "added_tokens.json").write_text('{"<cat>": 999}')
    tokens.save_pretrained(folder / "tokenizer")
    again = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    assert again.backend.to_str() == tokens.backend.to_str()


def test_what_stands_in_the_way_is_found_before_anything_changes(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    (folder / "unet" / "config.json").mkdir(parents=True)
    (folder / "model_index.json").write_text("old")

    def save():
        with filling(folder) as new:
            (new / "unet").mkdir()
            (new / "unet" / "config.json").write_text("new")
            (new / "model_index.json").write_text("new")

    with pytest.raises(OSError, match=f"cannot write {folder}/unet/config.json: there is a folder of that name"):
        save()
    (folder / "unet" / "config.json").rmdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "unet")
    with pytest.raises(OSError, match=f"cannot write {folder}/unet: "):
        save()
    assert (folder / "model_index.json").read_text() == "old" and not list(folder.rglob(".*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/file/model: {tmp_path}/file is not a folder"):
        with filling(tmp_path / "file" / "model"):
            pass


def test_two_who_save_into_one_folder_wait_for_each_other(tmp_path, monkeypatch):
    import threading

    replace, names = os.replace, ["a", "b", "config.json", "model_index.json"]
    (tmp_path / "model").mkdir()
    meet = threading.Barrier(2)

    def slow(source, target):
        import time

        time.sleep(0.02)
        replace(source, target)

    monkeypatch.setattr(saving.os, "replace", slow)

    def save(value):
        with filling(tmp_path / "model") as new:
            for name in names:
                (new / name).write_text(value)
            meet.wait()

    threads = [threading.Thread(target=save, args=(v,)) for v in "xy"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({(tmp_path / "model" / name).read_text() for name in names}) == 1


# What others put around networks ------------------------------------------------------------------------------------


class Layer(nn.Module):
    """As adapters wrap a layer."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base_layer, self.lora_A = base, nn.Linear(base.in_features, 2, bias=False)

    def forward(self, x):
        return self.base_layer(x) + 0 * self.lora_A(x).sum()


def test_layers_that_are_wrapped_run_and_are_not_saved(folder):
    pipe = TextToVideoSDPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    call = dict(num_frames=2, num_inference_steps=1, height=16, width=16, output_type="latent")
    exact = pipe("a cat", **call, generator=torch.Generator().manual_seed(0)).frames
    linear = pipe.unet.time_embedding.linear_1 if hasattr(pipe.unet, "time_embedding") else None
    owner, name = next((m, n) for m in pipe.unet.modules() for n, c in m.named_children() if type(c) is nn.Linear
                       and c is not linear and n == "to_out")  # fmt: skip
    setattr(owner, name, Layer(getattr(owner, name)))
    wrapped = pipe("a cat", **call, generator=torch.Generator().manual_seed(0)).frames
    assert torch.allclose(wrapped, exact, atol=1e-4)
    before = marks(folder)
    for save in (pipe.save_pretrained, pipe.unet.save_pretrained):
        with pytest.raises(ValueError, match="has 3 tensors that its config does not describe.*base_"):
            save(folder)
    assert marks(folder) == before


def test_compiled_networks_in_parallel_wrappers_are_saved(folder, monkeypatch, caplog):
    class Parallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Parallel)  # the real one needs a process group
    pipe = TextToVideoSDPipeline.from_pretrained(folder)
    unet = pipe.unet
    pipe.unet = torch.compile(Parallel(unet), backend="eager")
    assert pipe.unet is unet and "use torch.compile(network)" in caplog.text
    pipe.unet = nn.DataParallel(unet)
    assert pipe.unet is unet
    pipe.unet = torch.compile(unet, backend="eager")
    pipe.save_pretrained(folder.parent / "saved")
    assert marks(folder.parent / "saved") == marks(folder)
    pipe.unet.save_pretrained(folder.parent / "unet")  # the wrapper passes it on
    assert sorted(p.name for p in (folder.parent / "unet").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors"]


def test_a_wrapper_of_the_user_s_own_is_saved_as_what_it_stands_around(folder):
    class Timed(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("module"), name)

    pipe = TextToVideoSDPipeline.from_pretrained(folder)
    pipe.unet = Timed(pipe.unet)
    pipe.save_pretrained(folder.parent / "saved", variant="fp16")
    assert (folder.parent / "saved" / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    again = TextToVideoSDPipeline.from_pretrained(folder.parent / "saved", variant="fp16")
    assert torch.equal(again.unet.conv_in.weight, pipe.unet.module.conv_in.weight)


def test_a_model_of_peft_says_how_it_is_saved(folder):
    class PeftModel(nn.Module):
        def __init__(self, unet):
            super().__init__()
            self.base, self.config = unet, unet.config

        def save_pretrained(self, folder):
            raise AssertionError("it would save the adapter alone")

    PeftModel.__module__ = "peft.peft_model"
    pipe = TextToVideoSDPipeline.from_pretrained(folder)
    pipe.unet = PeftModel(pipe.unet)
    with pytest.raises(TypeError, match=r"unet: peft's PeftModel wraps it.*merge_and_unload\(\)"):
        pipe.save_pretrained(folder)
