"""Single files without a network, what they lack, and the options that give it; addresses on the hub."""

import gzip
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minit2v import (
    AnimateDiffPipeline,
    AutoencoderKL,
    CLIPTokenizer,
    DiffusionPipeline,
    MotionAdapter,
    TextToVideoSDPipeline,
)
from minit2v.cli import main
from minit2v.files import hub
from minit2v.files.video import read_metadata
from minit2v.pipelines.files import load_single_file
from minit2v_convert.convert import convert
from minit2v_convert.sparse import write_sparse_safetensors

DATA = Path(__file__).parent / "data" / "authors_files.json.gz"
GROUPS = {"block_out_channels": [32, 64], "norm_num_groups": 32}


clip = cache(CLIPTokenizer.clip)  # of 49,408 symbols, and always the same: 0.1 s


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(CLIPTokenizer, "clip", staticmethod(clip))
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_official_folder, make_adapter_folder):
    """A folder with `sd`, a small image model of CLIP's vocabulary, the same as a file, and a motion adapter."""
    root = tmp_path_factory.mktemp("single")
    make_official_folder(root / "sd", "sd15", small=True, unet=GROUPS,
                         vae={"block_out_channels": [32, 32], "norm_num_groups": 32},
                         text_encoder={"vocab_size": 49408})  # fmt: skip
    convert(root / "sd", root / "sd.safetensors", to="single-file")
    adapter = make_adapter_folder(root, "v1-5-2", block_out_channels=[32, 64], motion_norm_num_groups=32)
    adapter.rename(root / "adapter")
    convert(root / "adapter", root / "mm.safetensors", to="authors")
    whole = load_file(root / "sd.safetensors")
    for name, prefix in (("novae", "first_stage_model."), ("notext", "cond_stage_model.")):
        save_file({k: v for k, v in whole.items() if not k.startswith(prefix)}, root / f"{name}.safetensors")
    return root


OPTIONS = ["--num-frames", "2", "--steps", "1", "--height", "16", "--width", "16", "--seed", "1"]


@pytest.fixture
def animate(made, capsys):
    """animate(base, *options) -> (exit code, the lines of stderr that are no progress)."""

    def run(base, *options):
        given = [made / o if (made / str(o)).exists() else o for o in options]
        code = main(["animate", "a cat", "--base", str(made / base), *OPTIONS, *map(str, given)])
        return code, [line for line in capsys.readouterr().err.splitlines() if line.startswith("minit2v")]

    return run


def test_a_file_of_full_size_and_a_motion_module_need_no_network(tmp_path):
    """Of the size of the published ones, and with their names; zeros that take no disk."""
    files = json.loads(gzip.decompress(DATA.read_bytes()))
    for name in ("civitai_fp16_pruned", "mm_sd_v15_v2"):
        half = {n: (shape, "F16" if dtype[0] == "F" else dtype) for n, (shape, dtype) in files[name].items()}
        write_sparse_safetensors(tmp_path / f"{name}.safetensors", half)
    adapter = MotionAdapter.from_single_file(tmp_path / "mm_sd_v15_v2.safetensors", dtype=torch.float16)
    names = AnimateDiffPipeline.COMPONENTS  # without the pipeline, which copies the UNet
    parts = load_single_file(tmp_path / "civitai_fp16_pruned.safetensors", AnimateDiffPipeline, None,
                             {"motion_adapter": adapter}, dict.fromkeys(names, torch.float16), {}, None)  # fmt: skip
    assert [type(parts[n]).__name__ for n in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")] == [
        "UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel", "CLIPTokenizer", "PNDMScheduler"]
    assert parts["tokenizer"].encode("a photo of a cat!") == [49406, 320, 1125, 539, 320, 2368, 256, 49407]
    assert parts["tokenizer"].pad_token == "<|endoftext|>"
    assert parts["scheduler"].config.beta_schedule == "scaled_linear"


def test_a_file_and_a_motion_module_s_file_make_a_video(animate, made):
    code, said = animate("sd.safetensors", "--adapter", "mm.safetensors", "-o", "a.mp4")
    assert code == 0, said
    pipe = AnimateDiffPipeline.from_single_file(made / "sd.safetensors",
                                                motion_adapter=MotionAdapter.from_single_file(made / "mm.safetensors"))
    assert pipe.tokenizer.backend.to_str() == CLIPTokenizer.clip().backend.to_str()
    assert pipe("a cat", num_frames=2, num_inference_steps=1, height=16, width=16, output_type="np").frames.std() > 0


def test_what_a_file_lacks_is_said_and_may_be_given(animate, made):
    code, said = animate("novae.safetensors", "--adapter", "adapter")
    assert code == 1 and "has no vae: give it as vae=... (--vae), or" in said[-1] and "(--config)" in said[-1]
    for n, options in enumerate((["--vae", "sd"], ["--vae", "sd/vae"], ["--vae", "sd.safetensors"], ["--config", "sd"],
                                 ["--config", "sd", "--tokenizer", "sd/tokenizer", "--vae", "sd"])):  # fmt: skip
        code, said = animate("novae.safetensors", "--adapter", "adapter", *options, "-o", f"{n}.mp4")
        assert code == 0, said
        stored = read_metadata(f"{n}.mp4")
        assert [stored.get(o[2:]) for o in options[::2]] == [str(made / o) for o in options[1::2]]
    code, said = animate("notext.safetensors", "--adapter", "adapter")
    assert code == 1 and "has no text_encoder: give it as text_encoder=..., or" in said[-1]
    assert animate("notext.safetensors", "--adapter", "adapter", "--config", "sd", "-o", "x.mp4")[0] == 0
    for option in ("vae", "tokenizer"):
        code, said = animate("novae.safetensors", "--adapter", "adapter", f"--{option}", "nobody/here")
        assert code == 1 and f"error: --{option}: nobody/here is not in the cache" in said[-1]
    code, said = animate("sd", "--adapter", "adapter", "--config", "sd")
    assert code == 1 and "has its own configs" in said[-1]


def test_a_replayed_video_is_asked_about_what_it_names(animate, made, capsys):
    assert animate("novae.safetensors", "--adapter", "adapter", "--vae", "sd/vae", "-o", "a.mp4")[0] == 0
    assert main(["animate", "--replay", "a.mp4", "-o", "b.mp4"]) == 1
    assert f"vae '{made / 'sd/vae'}'" in capsys.readouterr().err
    assert main(["animate", "--replay", "a.mp4", "--trust", "-o", "b.mp4"]) == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()


def test_the_adapter_that_cannot_be_had_is_named(animate):
    code, said = animate("sd.safetensors")
    assert code == 1 and "the image model needs a motion adapter, and the default one cannot be loaded; give one" in (
        said[-1]) and "guoyww/animatediff-motion-adapter-v1-5-2 is not in the cache" in said[-1]  # fmt: skip


def test_folders_without_scheduler_or_tokenizer(made, tmp_path, capsys, make_official_folder):
    folder = make_official_folder(tmp_path / "ms", small=True)
    call = ["generate", "a cat", "--model", str(folder), *OPTIONS]
    assert main([*call, "-o", "a.mp4"]) == 0
    (folder / "scheduler").rename(folder / "aside")
    capsys.readouterr()
    assert main([*call, "-o", "b.mp4"]) == 0
    assert f"{folder} has no scheduler: the published model's is used" in capsys.readouterr().err
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()  # which this is
    assert main([*call, "--scheduler", "euler", "-o", "c.mp4"]) == 0
    (folder / "tokenizer").rename(tmp_path / "tokenizer")
    capsys.readouterr()
    assert main([*call, "-o", "d.mp4"]) == 1
    assert "tokenizer does not exist" in (err := capsys.readouterr().err) and "tokenizer=... (--tokenizer)" in err
    assert main([*call, "--tokenizer", str(tmp_path / "tokenizer"), "-o", "d.mp4"]) == 0
    assert Path("a.mp4").stat().st_size


def test_a_text_encoder_of_fewer_words_needs_its_own_tokenizer(tmp_path, make_official_folder):
    folder = make_official_folder(tmp_path / "sd", "sd15", small=True, unet=GROUPS)
    convert(folder, tmp_path / "sd.safetensors", to="single-file")
    adapter = MotionAdapter(block_out_channels=(32, 64), motion_norm_num_groups=32)
    with pytest.raises(ValueError, match=r"no tokenizer, and its text encoder has [\d,]+ ids, fewer than"):
        AnimateDiffPipeline.from_single_file(tmp_path / "sd.safetensors", motion_adapter=adapter, vae=None)


def test_a_vae_of_other_latents_is_refused_before_the_steps(tmp_path, make_official_folder):
    pipe = TextToVideoSDPipeline.from_pretrained(make_official_folder(tmp_path / "ms", small=True))
    pipe.vae = AutoencoderKL(latent_channels=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                             down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    with pytest.raises(ValueError, match="the VAE's latents have 8 channels, the UNet's 4"):
        pipe("a cat", num_frames=2, num_inference_steps=1, height=16, width=16)


# What cannot work is refused before a model is loaded ---------------------------------------------------------------


def test_sizes_and_frames_are_checked_before_anything_large_is_loaded(animate, made, monkeypatch, capsys, tmp_path,
                                                                      make_official_folder):  # fmt: skip
    from PIL import Image

    from minit2v.models.network import Network

    folder, loaded, load = make_official_folder(tmp_path / "ms", small=True), [], Network.from_pretrained.__func__

    def seen(cls, *args, **kw):
        loaded.append(cls.__name__)
        return load(cls, *args, **kw)

    monkeypatch.setattr(Network, "from_pretrained", classmethod(seen))
    for n in range(2):
        Path("frames").mkdir(exist_ok=True)
        Image.new("RGB", (853, 480)).save(f"frames/{n}.png")
    for argv, says in (
        (["generate", "a cat", "--model", folder, "--width", "853"], "--width must be a multiple of 2, not 853"),
        (["generate", "a cat", "--height", "481"], "--height must be a multiple of 8, not 481 (nearest: 480)"),
        (["restyle", "frames", "a cat"], "--width must be a multiple of 8, not 853"),
        (["animate", "a cat", "--base", made / "sd.safetensors", "--width", "853"], "--width must be a multiple of 2"),
        (["animate", "a cat", "--base", made / "sd", "--width", "853"], "--width must be a multiple of 2"),
    ):
        capsys.readouterr()
        assert main([*map(str, argv), "--steps", "1"]) == 1
        assert says in capsys.readouterr().err and not loaded
    code, said = animate("sd", "--adapter", "adapter", "--num-frames", "33")
    assert code == 1 and "33 frames are too many: the motion adapter has position encodings for 32" in said[-1]
    assert loaded == ["MotionAdapter"]
    AnimateDiffPipeline.from_pretrained(made / "sd", motion_adapter=MotionAdapter.from_pretrained(made / "adapter")
                                        ).save_pretrained("whole")  # fmt: skip
    loaded.clear()
    assert main(["animate", "a cat", "--base", "whole", *OPTIONS, "--num-frames", "33"]) == 1
    assert "33 frames are too many: the motion adapter has position encodings for 32" in capsys.readouterr().err
    assert not loaded


# Addresses ----------------------------------------------------------------------------------------------------------


def test_an_address_on_the_hub_is_fetched(made, monkeypatch):
    asked = []

    def download(repo, name, **where):
        asked.append((repo, name, where["revision"]))
        return str(made / "sd.safetensors")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    url = "https://huggingface.co/owner/name/blob/main/deep/sd.safetensors"
    of_request = url.replace("main", "refs%2Fpr%2F1")
    for address in (url, url.replace("blob", "resolve") + "?download=true", Path(url), of_request,
                    "HTTPS://HF.co/owner/name/resolve/main/deep/sd.safetensors"):  # fmt: skip
        assert hub.local(address) == made / "sd.safetensors"
    assert [a[2] for a in asked] == ["main", "main", "main", "refs/pr/1", "main"]
    assert {a[:2] for a in asked} == {("owner/name", "deep/sd.safetensors")}
    adapter = MotionAdapter.from_pretrained(made / "adapter")
    for load in (AnimateDiffPipeline.from_single_file, AnimateDiffPipeline.from_pretrained):
        assert load(url, motion_adapter=adapter).vae_scale_factor == 2
    assert AutoencoderKL.from_single_file(url).config.latent_channels == 4
    assert AutoencoderKL.from_pretrained(url).config.latent_channels == 4
    for name in ("https://huggingface.co/owner/name", "https://huggingface.co/owner/name/", "owner/name",
                 "https://huggingface.co/owner/name/tree/main"):  # fmt: skip
        assert hub.local(name) == "owner/name"
        if name != "owner/name":
            for load in (DiffusionPipeline.from_single_file, AutoencoderKL.from_single_file):
                with pytest.raises(ValueError, match=f"{name} is a repository, not a file: use from_pretrained"):
                    load(name)


@pytest.mark.parametrize("address", [
    "https://example.org/f.ckpt", "http://127.0.0.1:1/f.ckpt", "https://civitai.com/api/download/models/1",
    "https://huggingface.co.example.org/o/r/blob/main/f.ckpt", "https://huggingface.co/o/r/commits/main",
    "https://huggingface.co/o/r/blob/main", "https://huggingface.co/o/r/blob/main/../../x", "https://huggingface.co/o",
    "https://huggingface.co/o/r/blob/main/%2e%2e/x", "https://user@huggingface.co/o/r/blob/main/f.ckpt",
    "ftp://huggingface.co/o/r/blob/main/f.ckpt", "file:///etc/passwd", "s3://bucket/f.ckpt"])  # fmt: skip
def test_other_addresses_are_refused_by_name(address, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("it was fetched"))
    for load in (DiffusionPipeline.from_single_file, AutoencoderKL.from_single_file, DiffusionPipeline.from_pretrained):
        with pytest.raises(ValueError, match="only files on huggingface.co are downloaded") as error:
            load(address)
        assert str(error.value).startswith(address)
    for argv in (["generate", "x", "--model", address], ["convert", address, "out"], ["inspect", address]):
        assert main(argv) == 1
        assert f"{address}: only files on huggingface.co" in capsys.readouterr().err


def test_what_the_hub_has_not(monkeypatch):
    from huggingface_hub import errors

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    url = "https://huggingface.co/o/r/blob/main/f.ckpt"
    error = errors.LocalEntryNotFoundError("not in the cache")
    with pytest.raises(OSError, match="f.ckpt of o/r failed: "):
        hub.local(url)
    error = RuntimeError("a line that broke")
    with pytest.raises(OSError, match="f.ckpt of o/r failed: a line that broke"):
        hub.local(url)
