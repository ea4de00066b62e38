"""Files there and back: folders of diffusers, single files, ModelScope's files, AnimateDiff's; whole or not at all."""

import json
import math
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minit2v import AutoencoderKL, CLIPTextModel, MotionAdapter, UNet2DConditionModel, UNet3DConditionModel, cli
from minit2v.cli import inspect
from minit2v_convert import animatediff, configs, shapes, stream
from minit2v_convert import convert as module
from minit2v_convert.convert import components, convert
from minit2v_convert.folders import variants
from minit2v_convert.sparse import write_sparse_safetensors
from minit2v_convert.stream import open_file

CLASSES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
GROUPS = {"unet": {"norm_num_groups": 8, "attention_head_dim": 4}, "vae": {"norm_num_groups": 4}, "text_encoder": {}}


@pytest.fixture(scope="module")
def image_model(tmp_path_factory, make_official_folder) -> Path:
    return make_official_folder(tmp_path_factory.mktemp("image"), repo="sd15", small=True)


@pytest.fixture(scope="module")
def video_model(tmp_path_factory, make_official_folder) -> Path:
    return make_official_folder(tmp_path_factory.mktemp("video"), small=True)


@pytest.fixture(scope="module")
def single(tmp_path_factory, image_model) -> Path:
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    convert(image_model, path, to="single-file")
    return path


def weights(folder: Path) -> dict[str, Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def same(have: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert have.keys() == want.keys()
    for name, x in want.items():
        assert have[name].dtype == x.dtype and torch.equal(have[name], x), name


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_folder_to_a_single_file_and_back(image_model, tmp_path, name):
    told = []
    convert(image_model, tmp_path / name, to="single-file", progress=lambda *a: told.append(a))
    assert {(n, total) for n, _, total in told} == {("model.safetensors", sum(m for _, m, _ in told))}
    names = open_file(tmp_path / name).header
    assert "model.diffusion_model.input_blocks.0.0.weight" in names and "first_stage_model.quant_conv.bias" in names
    out = tmp_path / "again"
    work = convert(tmp_path / name, out, tokenizer=image_model / "tokenizer", config=image_model)
    for part in CLASSES:
        same(weights(out / part), weights(image_model / part))
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["scheduler"] == ["diffusers", "PNDMScheduler"]
    assert (out / "tokenizer/vocab.json").read_bytes() == (image_model / "tokenizer/vocab.json").read_bytes()
    for part in CLASSES:
        config = json.loads((image_model / part / "config.json").read_text())
        assert config.items() <= json.loads((out / part / "config.json").read_text()).items()
    assert not any("does not have the published size" in note for note in work.notes)
    assert not list(tmp_path.glob(".*"))


def test_modelscope_s_files_and_back(video_model, tmp_path):
    work = convert(video_model, tmp_path / "authors", to="authors")
    assert sorted(p.name for p in (tmp_path / "authors").iterdir()) == [
        "VQGAN_autoencoder.pth", "configuration.json", "text2video_pytorch_model.pth"]  # fmt: skip
    assert any("keep the authors' file" in note for note in work.notes)
    assert "configuration.json cannot store norm_num_groups 8; in the authors' code it is 32" in work.notes
    work = convert(tmp_path / "authors", tmp_path / "again", config=video_model)
    for part in ("unet", "vae"):
        same(weights(tmp_path / "again" / part), weights(video_model / part))
    assert {"text_encoder"} == {note.split()[0] for note in work.notes if " is missing: take" in note}
    unet = tmp_path / "authors" / "text2video_pytorch_model.pth"
    convert(unet, tmp_path / "unet", dtype=torch.float16)  # one network needs no subfolder
    half = weights(tmp_path / "unet")
    same(half, {name: x.half() for name, x in weights(video_model / "unet").items()})
    config = json.loads((tmp_path / "unet/config.json").read_text())
    assert config["_class_name"] == "UNet3DConditionModel" and config["block_out_channels"] == [32, 64]


# ------------------------------------------------------------------------------------------------- in the same layout


@pytest.mark.parametrize("to", ["authors", "single-file"])
def test_a_single_file_in_another_dtype_and_container(single, tmp_path, to):
    """And back: nothing is renamed."""
    convert(single, tmp_path / "half.ckpt", to, torch.float16)
    whole, half = open_file(single), open_file(tmp_path / "half.ckpt")
    assert half.nest == ("state_dict",) and list(half.header) == list(whole.header)
    same(half.tensors, {n: x.half() if x.is_floating_point() else x for n, x in whole.tensors.items()})
    convert(tmp_path / "half.ckpt", tmp_path / "again.safetensors", to)
    same(open_file(tmp_path / "again.safetensors").tensors, half.tensors)


def test_what_is_not_converted_stays_too(single, tmp_path):
    """The noise schedule in its own precision, the moving average like the weights; a trainer's counters are told."""
    tensors = open_file(single).tensors
    name = "model.diffusion_model.out.2.bias"
    tensors |= {"betas": torch.linspace(0, 1e-9, 3, dtype=torch.float64), "model_ema.decay": torch.tensor(0.9999),
                "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
                "model_ema." + name.removeprefix("model.").replace(".", ""): tensors[name] + 1}  # fmt: skip
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "model.ckpt")
    work = convert(tmp_path / "model.ckpt", tmp_path / "out", "authors", torch.float16)
    assert work.notes == ["model.ckpt: 'epoch' left out, the progress of the training"]
    state = open_file(tmp_path / "out" / "model.ckpt").tensors
    exact = {"betas", "model_ema.decay", "model_ema.num_updates"}
    same(state, {n: x.half() if x.is_floating_point() and n not in exact else x for n, x in tensors.items()})


def test_modelscope_s_folder_in_another_dtype(video_model, tmp_path):
    convert(video_model, tmp_path / "o", "authors")
    convert(tmp_path / "o", tmp_path / "half", "authors", torch.bfloat16)
    assert sorted(p.name for p in (tmp_path / "half").iterdir()) == sorted(p.name for p in (tmp_path / "o").iterdir())
    for name in ("text2video_pytorch_model.pth", "VQGAN_autoencoder.pth"):
        have, want = (open_file(tmp_path / f / name) for f in ("half", "o"))
        assert have.nest == want.nest
        same(have.tensors, {n: x.bfloat16() for n, x in want.tensors.items()})
    here, there = (tmp_path / f / "configuration.json" for f in ("half", "o"))
    assert here.read_bytes() == there.read_bytes()


def test_what_has_no_authors_file_says_so(single, video_model, tmp_path):
    convert(video_model, tmp_path / "o", "authors")
    with pytest.raises(ValueError, match="ModelScope's UNetSD cannot be a single file: give the layout"):
        convert(tmp_path / "o" / "text2video_pytorch_model.pth", tmp_path / "x.safetensors", "single-file")
    generator = torch.Generator().manual_seed(0)
    motion = {n: torch.randn(s, generator=generator) for n, s in shapes.motion_adapter(SMALL_MOTION).items()}
    save_file(motion, tmp_path / "adapter.safetensors")
    convert(tmp_path / "adapter.safetensors", tmp_path / "mm.ckpt", "authors")
    image = {n: torch.randn(s, generator=generator) for n, s in shapes.unet2d(SMALL_IMAGE).items()}
    torch.save({"state_dict": {**open_file(tmp_path / "mm.ckpt").tensors, **image}}, tmp_path / "trainer.ckpt")
    with pytest.raises(ValueError, match=r"AnimateDiff trainer's whole UNet \(trainer\), not in the layout of diff"):
        convert(tmp_path / "trainer.ckpt", tmp_path / "x", "authors")
    for what in ("ema", "tokenizer", "config"):
        with pytest.raises(ValueError, match=f'{what} can only be used with to="diffusers", not with .authors'):
            convert(single, tmp_path / "x", "authors", **{what: True})
    broken = open_file(single).tensors
    del broken["model.diffusion_model.out.2.bias"]
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="broken.safetensors.* 1 missing: 'model.diffusion_model.out.2.bias'"):
        convert(tmp_path / "broken.safetensors", tmp_path / "x", "authors")


def test_bin_in_and_out(video_model, tmp_path):
    """What a folder had before there were safetensors."""
    from minit2v import TextToVideoSDPipeline

    convert(video_model, tmp_path / "bin", safe_serialization=False)
    files = sorted(str(p.relative_to(tmp_path / "bin")) for p in (tmp_path / "bin").rglob("*.bin"))
    assert files == ["text_encoder/pytorch_model.bin", "unet/diffusion_pytorch_model.bin",
                     "vae/diffusion_pytorch_model.bin"]  # fmt: skip
    TextToVideoSDPipeline.from_pretrained(tmp_path / "bin")
    convert(tmp_path / "bin", tmp_path / "again")
    for part in ("unet", "vae", "text_encoder"):
        same(weights(tmp_path / "again" / part), weights(video_model / part))


# ------------------------------------------------------------------------------------------------- files of a variant


def test_weights_of_which_there_is_only_a_variant(tmp_path, make_official_folder):
    folder = make_official_folder(tmp_path / "folder", variant="fp16", small=True)
    work = convert(folder, tmp_path / "out")
    assert "unet: its weights have only the variant fp16, which is used" in work.notes
    for part in ("unet", "vae", "text_encoder"):
        same(weights(tmp_path / "out" / part), weights(folder / part))
    with pytest.raises(ValueError, match="has no weights of the variant 'fp8'; the weights there: .*fp16.safet"):
        convert(folder, tmp_path / "x", variant="fp8")
    with pytest.raises(ValueError, match="is a file: it has no variant 'fp16'"):
        convert(folder / "unet/diffusion_pytorch_model.fp16.safetensors", tmp_path / "x", variant="fp16")


def test_one_of_several_variants(video_model, tmp_path):
    """Without a word those that have no variant; a whole file before shards, .safetensors before .bin."""
    folder = tmp_path / "unet"
    folder.mkdir()
    shutil.copy(video_model / "unet/config.json", folder)
    state = weights(video_model / "unet")
    for n, suffix in enumerate((".fp16.safetensors", ".non_ema.safetensors")):
        save_file({name: x * 2 ** (n + 1) for name, x in state.items()}, folder / f"diffusion_pytorch_model{suffix}")
    with pytest.raises(ValueError, match="unet has the variants fp16 and non_ema of its weights: give one as variant"):
        convert(folder, tmp_path / "x")
    convert(folder, tmp_path / "b", variant="non_ema")
    same(weights(tmp_path / "b"), {n: x * 4 for n, x in state.items()})
    names = list(state)
    for n, part in enumerate((names[:5], names[5:])):
        save_file({name: state[name] for name in part},
                  folder / f"diffusion_pytorch_model-0000{n + 1}-of-00002.safetensors")  # fmt: skip
    torch.save({}, folder / "diffusion_pytorch_model.bin")
    convert(folder, tmp_path / "a")
    same(weights(tmp_path / "a"), state)
    (folder / "diffusion_pytorch_model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="unet has 1 of the 2 shards of its weights"):
        convert(folder, tmp_path / "x")


def test_names_of_variants():
    names = ["model.fp16-00001-of-00002.safetensors", "model-00002-of-00002.fp16.safetensors", "config.json",
             "model.safetensors", "model.safetensors.index.json", "pytorch_model.non_ema.bin", "mm.ckpt"]  # fmt: skip
    assert variants(names) == {"": ["model.safetensors"], "fp16": [names[1], names[0]], "non_ema": [names[5]]}
    assert variants(names, ("model",)).keys() == {"", "fp16"}


def test_a_variant_is_inspected(tmp_path, make_official_folder, capsys):
    from minit2v import cli

    folder = make_official_folder(tmp_path / "folder", variant="fp16", small=True)
    for given in ([], ["--variant=fp16"]):
        assert cli.main(["inspect", str(folder), *given]) == 0
        out = capsys.readouterr().out
        assert ("diffusion_pytorch_model.fp16.safetensors" in out and "all " in out and "match" in out)
        assert ("(load it with variant fp16)" in out) == (not given)
    assert cli.main(["convert", str(folder / "unet"), str(tmp_path / "x"), "--variant=fp16", "--dry-run"]) == 0


# ------------------------------------------------------------------------------------------- what shapes do not say


def test_networks_of_another_size(image_model, single, tmp_path, capsys):
    """Heads and groups are no shapes: a line that says so, and three ways to give them."""
    from minit2v import cli

    vae, says = AutoencoderKL, "norm_num_groups.*shapes do not tell the numbers of heads and groups.*give a config"
    with pytest.raises(ValueError, match=says) as error:
        vae.from_single_file(single)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=says):
        convert(single, tmp_path / "x")
    want = vae.from_pretrained(image_model / "vae")
    content = json.loads((image_model / "vae/config.json").read_text())
    for given in (dict(config=image_model), dict(config=image_model / "vae"), dict(norm_num_groups=4),
                  dict(config=image_model / "vae/config.json"), dict(config=content)):  # fmt: skip
        have = vae.from_single_file(single, **given)
        assert have.config.norm_num_groups == 4
        same(have.state_dict(), want.state_dict())
    assert vae.from_single_file(single, config=content).config == want.config
    for config, says in (
        ({**content, "latent_channels": 3}, r"config has latent_channels 3, but the weights in .*single.* have 4"),
        ({**content, "_class_name": "VQModel"}, "config is for a VQModel, but the weights are for a Auto"),
        ({**content, "norm_groups": 3}, "has no field 'norm_groups'"),
    ):
        with pytest.raises(ValueError, match=says):
            vae.from_single_file(single, config=config)
    with pytest.raises(FileNotFoundError, match="tokenizer has no config.json for the vae"):
        vae.from_single_file(single, config=image_model / "tokenizer")
    assert cli.main(["inspect", str(single)]) == 0
    said = capsys.readouterr().out
    assert "unet, vae, text_encoder: the shapes do not tell the numbers of heads and groups; a config.json is " in said


def test_a_pipeline_of_another_size(image_model, single, tmp_path):
    """The folder that has the config.jsons; and what was converted with it loads."""
    from minit2v import AnimateDiffPipeline

    adapter = MotionAdapter(**{**{k: v for k, v in SMALL_MOTION.items() if not k.startswith("_")},
                               "motion_norm_num_groups": 8})  # fmt: skip
    pipe = AnimateDiffPipeline.from_single_file(single, config=image_model, motion_adapter=adapter)
    assert (pipe.vae.config.norm_num_groups, pipe.unet.config.norm_num_groups) == (4, 8)
    convert(single, tmp_path / "out", config=image_model)
    for part in CLASSES:
        CLASSES[part].from_pretrained(tmp_path / "out" / part)


@pytest.mark.parametrize("change, says", [
    ({"norm_num_groups": 0}, "norm_num_groups must be at least 1, not 0"),
    ({"norm_num_groups": 7}, "norm_num_groups 7 does not divide 8"),
    ({"norm_num_groups": "4"}, "norm_num_groups must be int, not '4'"),
    ({"act_fn": "relu"}, "only act_fn='silu' is supported, not 'relu'"),
    ({"norm_groups": 4}, "has no field 'norm_groups'"),
])  # fmt: skip
def test_a_config_with_which_nothing_loads(image_model, tmp_path, capsys, change, says):
    from minit2v import cli

    content = json.loads((image_model / "vae/config.json").read_text())
    content["block_out_channels"][0] == 8 or pytest.fail("the test's VAE has other widths")
    (tmp_path / "vae.json").write_text(json.dumps({**content, **change}))
    file = image_model / "vae/diffusion_pytorch_model.safetensors"
    assert cli.main(["convert", str(file), str(tmp_path / "x"), f"--config={tmp_path / 'vae.json'}"]) == 1
    assert says in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["vae.json"]


def test_what_a_short_config_does_not_say_the_weights_do(image_model, tmp_path):
    (tmp_path / "vae.json").write_text('{"_class_name": "AutoencoderKL", "norm_num_groups": 4}')
    convert(image_model / "vae/diffusion_pytorch_model.safetensors", tmp_path / "x", config=tmp_path / "vae.json")
    same(AutoencoderKL.from_pretrained(tmp_path / "x").state_dict(),
         AutoencoderKL.from_pretrained(image_model / "vae").state_dict())  # fmt: skip


def test_a_config_on_the_hub(image_model, single, tmp_path, monkeypatch):
    """Read from the hub's cache, since there is no hub here."""
    from huggingface_hub import constants

    from minit2v import cli

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name, folder in (("pipe", image_model), ("lone", image_model / "vae")):
        (snapshots := tmp_path / f"cache/models--owner--{name}/snapshots").mkdir(parents=True)
        (snapshots / "main").symlink_to(folder)
        assert AutoencoderKL.from_single_file(single, config=f"owner/{name}").config.norm_num_groups == 4
    assert cli.main(["convert", str(single), str(tmp_path / "out"), "--config=owner/pipe"]) == 0
    for part in CLASSES:
        same(weights(tmp_path / "out" / part), weights(image_model / part))
    for file in ("scheduler/scheduler_config.json", "tokenizer/vocab.json"):
        have, want = ((folder / file).read_text() for folder in (tmp_path / "out", image_model))
        assert have == want or json.loads(have) == json.loads(want)


def test_the_config_of_one_network_of_several(image_model, single, tmp_path):
    """It is for that network alone; one that is for none is an error."""
    parts = components(single, config=image_model / "vae" / "config.json")
    assert parts["vae"].config["norm_num_groups"] == 4 and not parts["vae"].guessed and parts["unet"].guessed
    (tmp_path / "config.json").write_text('{"_class_name": "UNet3DConditionModel"}')
    with pytest.raises(ValueError, match="config: .* has no config.json for a UNet2DConditionModel or AutoencoderKL"):
        components(single, config=tmp_path)


def test_positions_that_a_config_has_wrong_are_put_right(tmp_path):
    """The published folder of v1 is known to say 32."""
    adapter = MotionAdapter(**{k: v for k, v in SMALL_MOTION.items() if not k.startswith("_")})
    adapter.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "motion_max_seq_length": 32}))
    work = convert(tmp_path / "a", tmp_path / "b")
    assert work.notes == [f"{path}: motion_max_seq_length 32 is corrected to 24, as in the weights"]
    assert json.loads((tmp_path / "b/config.json").read_text())["motion_max_seq_length"] == 24


def test_a_folder_that_says_something_else_than_its_weights(image_model, tmp_path):
    shutil.copytree(image_model, tmp_path / "f")
    path = tmp_path / "f" / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "block_out_channels": [8, 32]}))
    with pytest.raises(ValueError, match=r"vae.config.json has block_out_channels \[8, 32\], but the weights in"):
        convert(tmp_path / "f", tmp_path / "x", dtype=torch.float16)
    with pytest.raises(ValueError, match="config: .* has its own config.json"):
        convert(image_model, tmp_path / "x", config=image_model)


def test_a_pipeline_that_lacks_a_network(image_model, tmp_path):
    shutil.copytree(image_model, tmp_path / "f")
    (tmp_path / "f/unet/config.json").unlink()
    with pytest.raises(ValueError, match="f/unet has no config.json, but model_index.json names it"):
        convert(tmp_path / "f", tmp_path / "x")
    shutil.rmtree(tmp_path / "f/unet")
    for to in ("diffusers", "single-file"):
        with pytest.raises(ValueError, match="there is no .*f/unet, but model_index.json names it"):
            convert(tmp_path / "f", tmp_path / "x", to)
    shutil.copytree(image_model / "unet", tmp_path / "f/unet")
    (tmp_path / "f/other").mkdir()
    shutil.copy(tmp_path / "f/unet/diffusion_pytorch_model.safetensors", tmp_path / "f/other")
    with pytest.raises(ValueError, match="f/other has the weights diffusion_pytorch_model.safetensors, but no confi"):
        convert(tmp_path / "f", tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_modelscope_s_files_of_which_one_is_not_there(video_model, tmp_path):
    convert(video_model, tmp_path / "o", to="authors")
    (tmp_path / "o/VQGAN_autoencoder.pth").unlink()
    work = convert(tmp_path / "o", tmp_path / "x", "authors", dry_run=True)
    assert "configuration.json names VQGAN_autoencoder.pth as the vae, but the file is missing" in work.notes
    shutil.copy(next(video_model.glob("vae/*.safetensors")), tmp_path / "o/VQGAN_autoencoder.pth")
    (tmp_path / "o/text2video_pytorch_model.pth").unlink()
    with pytest.raises(ValueError, match="has no text2video_pytorch_model.pth, which configuration.json names as the"):
        convert(tmp_path / "o", tmp_path / "x", config=video_model)


def test_a_pipeline_in_another_dtype(video_model, tmp_path):
    convert(video_model, tmp_path / "half", dtype=torch.float16)
    for part in ("unet", "vae", "text_encoder"):
        assert {x.dtype for x in weights(tmp_path / "half" / part).values() if x.is_floating_point()} == {torch.float16}
        here, there = ((f / part / "config.json").read_text() for f in (video_model, tmp_path / "half"))
        assert json.loads(here) == json.loads(there)
    from minit2v import TextToVideoSDPipeline

    TextToVideoSDPipeline.from_pretrained(tmp_path / "half")


SMALL_MOTION = {**configs.MOTION, "block_out_channels": [32, 64], "motion_layers_per_block": 1,
                "motion_max_seq_length": 24, "use_motion_mid_block": False}  # fmt: skip
SMALL_IMAGE = {**configs.UNET2D, "block_out_channels": [32, 64], "layers_per_block": 1, "cross_attention_dim": 24,
               "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
               "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}  # fmt: skip


def test_a_motion_module_there_and_back_and_loaded(tmp_path):
    adapter = MotionAdapter(**{k: v for k, v in SMALL_MOTION.items() if not k.startswith("_")})
    adapter.save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "mm.ckpt", to="authors")
    names = open_file(tmp_path / "mm.ckpt").header
    assert "down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight" in names
    convert(tmp_path / "mm.ckpt", tmp_path / "again")
    same(weights(tmp_path / "again"), weights(tmp_path / "adapter"))
    for path in (tmp_path / "again", tmp_path / "mm.ckpt"):
        loaded = MotionAdapter.from_pretrained(path)
        assert loaded.config.motion_max_seq_length == 24
        same(loaded.state_dict(), adapter.state_dict())


def test_a_lora_is_a_file(tmp_path):
    config = {**SMALL_MOTION, "rank": 3}
    generator = torch.Generator().manual_seed(0)
    state = {f"unet.{n}": torch.randn(s, generator=generator) for n, s in shapes.motion_lora(config).items()}
    save_file(state, tmp_path / "lora.safetensors")
    convert(tmp_path / "lora.safetensors", tmp_path / "lora.ckpt", to="authors")
    assert any("processor.to_q_lora.down" in name for name in open_file(tmp_path / "lora.ckpt").header)
    convert(tmp_path / "lora.ckpt", tmp_path / "again.safetensors")
    same(load_file(tmp_path / "again.safetensors"), state)


def test_a_lora_of_two_networks_has_no_authors_file(tmp_path):
    unet = shapes.spatial_lora({**configs.UNET2D, "rank": 2})
    text = shapes.lora({"text_model.encoder.layers.0.self_attn.q_proj.weight": (768, 768)}, 2)
    state = {f"unet.{n}": torch.zeros(s) for n, s in unet.items()}
    state |= {f"text_encoder.{n}": torch.zeros(s) for n, s in text.items()}
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="this LoRA changes 2 networks, but a file in the authors' layout can"):
        convert(tmp_path / "lora.safetensors", tmp_path / "out", to="authors")
    assert [p.name for p in tmp_path.iterdir()] == ["lora.safetensors"]


def test_no_tensor_is_passed_over(image_model, tmp_path, monkeypatch):
    """Whatever a plan forgets stops it before anything is written."""
    plan = module.to_diffusers
    monkeypatch.setattr(module, "to_diffusers", lambda *a, **k: {
        name: replace(p, steps=p.steps[2:]) for name, p in plan(*a, **k).items()})  # fmt: skip
    for args in ((image_model, tmp_path / "out"), (image_model, tmp_path / "out", "diffusers", None, True)):
        with pytest.raises(ValueError, match="2 tensors cannot be stored in .*: '"):
            convert(*args)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", CLASSES)
def test_networks_out_of_a_single_file(image_model, single, part):
    want = CLASSES[part].from_pretrained(image_model / part)
    have = CLASSES[part].from_single_file(single, **GROUPS[part])
    assert not have.training
    same(have.state_dict(), want.state_dict())
    half = CLASSES[part].from_pretrained(single, dtype="float16", **GROUPS[part])
    assert half.dtype == torch.float16
    same(half.state_dict(), {n: x.half() if x.is_floating_point() else x for n, x in want.state_dict().items()})


def test_what_is_not_in_the_file_is_said(single, tmp_path):
    with pytest.raises(ValueError, match="1.x. It contains UNet2DConditionModel.*no UNet3DConditionModel"):
        UNet3DConditionModel.from_single_file(single)
    with pytest.raises(TypeError, match="no argument 'norm_groups'.*norm_num_groups"):
        UNet2DConditionModel.from_single_file(single, norm_groups=8)
    with pytest.raises(ValueError, match="no complete moving average"):
        UNet2DConditionModel.from_single_file(single, ema=True)
    with pytest.raises(FileNotFoundError):
        UNet2DConditionModel.from_single_file(tmp_path / "no.ckpt")
    assert {name: part.cls for name, part in components(single).items()} == {
        name: cls.__name__ for name, cls in CLASSES.items()}  # fmt: skip


def test_a_dry_run_writes_nothing_and_prints_each_tensor(tmp_path):
    """At full size: the header is all that there is of this file."""
    table = animatediff.MODULES.table(animatediff.MOTION_CONFIGS["v1"])
    manifest = {n: (e.authors_shape(table.shapes), "F16") for e in table.entries for n in e.authors}
    path = write_sparse_safetensors(tmp_path / "mm.safetensors", manifest)
    work = convert(path, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    lines = work.lines()
    size = 2 * sum(map(math.prod, table.shapes.values()))
    assert lines[0] == f"diffusion_pytorch_model.safetensors: {len(table.shapes)} tensors, {size:,} bytes"
    text = "\n".join(lines)
    assert all(name in text for name in manifest) and all(name in text for name in table.shapes)


def test_what_a_file_cannot_hold_is_said(image_model, video_model, tmp_path):
    work = convert(image_model, tmp_path / "x.safetensors", "single-file", dry_run=True)
    for name in ("tokenizer", "scheduler"):
        assert f"{name} is left out: the authors' layout has only weights" in work.notes
    notes = convert(video_model, tmp_path / "o", "authors", dry_run=True).notes
    assert any(n.startswith("tokenizer is left out: ") for n in notes)
    assert not any(n.startswith("scheduler is left out") for n in notes)  # which configuration.json has


def test_metadata_that_is_left_out_is_said(image_model, tmp_path):
    metadata = {"format": "pt", **{f"ss_{n}": "1" for n in range(9)}}
    save_file(weights(image_model / "unet"), tmp_path / "unet.safetensors", metadata)
    work = convert(tmp_path / "unet.safetensors", tmp_path / "x", config=image_model / "unet", dry_run=True)
    (note,) = [note for note in work.notes if "metadata" in note]
    assert note.startswith("unet.safetensors: left out of its metadata: ss_") and note.endswith(" and 1 more")
    assert not any("metadata" in note for note in convert(image_model, tmp_path / "x", dry_run=True).notes)


def test_what_nothing_would_read_is_not_written(image_model, tmp_path):
    with pytest.raises(ValueError, match="a single file needs a UNet or a VAE, and here is only text"):
        convert(image_model / "text_encoder", tmp_path / "x.safetensors", "single-file")
    with pytest.raises(ValueError, match="tokenizer: .* is a pipeline, which has its own"):
        convert(image_model, tmp_path / "x", tokenizer=image_model / "tokenizer")
    with pytest.raises(ValueError, match="x.safetensors ends in .safetensors, but .bin was chosen"):
        convert(image_model / "unet", tmp_path / "x.safetensors", safe_serialization=False)
    assert not list(tmp_path.iterdir())


def test_wrong_calls(single, image_model, tmp_path):
    for says, args in (
        ("no layout 'author' .nearest: 'authors'.", (single, tmp_path / "x", "author")),
        ("no layout 'original'.*authors", (single, tmp_path / "x", "original")),
        ("give a folder", (single, tmp_path / "x.safetensors")),
        ("has no weights; the files there: merges.txt", (image_model / "tokenizer", tmp_path / "x")),
        ("not torch.int8", (single, tmp_path / "x", "diffusers", torch.int8)),
    ):
        with pytest.raises(ValueError, match=says):
            convert(*args, config=image_model if args[0] == single else None)
    with pytest.raises(FileExistsError, match="exists already"):
        convert(image_model, single, "single-file")
    assert not list(tmp_path.iterdir())


def test_a_number_that_does_not_fit_leaves_nothing_behind(single, image_model, tmp_path):
    state = load_file(single)
    state["first_stage_model.quant_conv.bias"][0] = 1e9
    save_file(state, tmp_path / "big.safetensors")
    with pytest.raises(ValueError, match="'first_stage_model.quant_conv.bias' does not fit torch.float16"):
        convert(tmp_path / "big.safetensors", tmp_path / "out", dtype=torch.float16, config=image_model)
    with pytest.raises(ValueError, match="'first_stage_model.quant_conv.bias' does not fit torch.float16"):
        convert(tmp_path / "big.safetensors", tmp_path / "out.ckpt", "single-file", torch.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["big.safetensors"]


def test_too_little_room(single, image_model, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(20, 10, 10))
    with pytest.raises(OSError, match="bytes, but the disk has only 10 free"):
        convert(single, tmp_path / "out", config=image_model)


def slowly(made):
    """Says that it writes, and takes its time."""

    def slow(*args):
        print("writing", flush=True)
        time.sleep(0.2)
        return made(*args)

    return slow


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_interrupted_means_nothing_left_behind(single, image_model, tmp_path, name, forked):
    """A real signal, in the middle of a file."""
    src, to, config = (single, "diffusers", image_model) if name == "out" else (image_model, "single-file", None)

    def child():
        stream.made = slowly(stream.made)
        convert(src, tmp_path / name, to, config=config)

    process = forked(child)
    for _ in range(3):
        assert process.said.readline() == b"writing\n"
    assert len(list(tmp_path.glob(".out*"))) == 1
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    code, said = process.wait()
    assert code == 1 and "KeyboardInterrupt" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_at_the_command_line_leaves_nothing(image_model, tmp_path, number, forked):
    def child():
        stream.made = slowly(stream.made)
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  the bar
        raise SystemExit(cli.main(["convert", str(image_model), str(tmp_path / "a" / "b" / "out")]))

    process = forked(child)
    assert process.said.readline() == process.said.readline() == b"writing\n"
    assert len(list((tmp_path / "a" / "b").iterdir())) == 1
    os.kill(process.pid, number)
    assert process.wait()[0] == -number  # as without us: a shell says 143 or 129
    assert not list(tmp_path.iterdir())


def test_what_a_new_folder_cannot_replace_is_refused_before_anything_is_read(image_model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "open_path", None)
    monkeypatch.chdir(tmp_path)
    for dst in (".", "", tmp_path):
        with pytest.raises(FileExistsError, match="is the current folder, which a new folder cannot replace"):
            convert(image_model, dst)
    (tmp_path / "full").mkdir(), (tmp_path / "full" / "x").touch(), (tmp_path / "empty").mkdir()
    (tmp_path / "to_full").symlink_to("full"), (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FileExistsError, match="to_full exists already"):
        convert(image_model, "to_full")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "empty")
    with pytest.raises(FileExistsError, match="empty is a mount point"):
        convert(image_model, "empty")
    with pytest.raises((FileExistsError, TypeError)):
        convert(image_model, "loop")


@pytest.mark.parametrize("name", ["m.PT", "m.CKPT", "m.SafeTensors", "a/.safetensors", ".bin", "-"])
def test_a_name_that_looks_like_a_file_makes_no_folder(image_model, tmp_path, monkeypatch, name):
    monkeypatch.setattr(module, "open_path", None)
    with pytest.raises(ValueError, match="give a file such as"):
        convert(image_model, tmp_path / name, "single-file")
    assert not list(tmp_path.iterdir())


def test_a_link_to_an_empty_folder_is_followed(image_model, tmp_path, monkeypatch):
    """And the room is looked for where the folder is."""
    disk = tmp_path / "disk"
    (disk / "empty").mkdir(parents=True)
    (tmp_path / "link").symlink_to(disk / "empty")
    asked, usage = [], shutil.disk_usage
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: (asked.append(path), usage(path))[1])
    convert(image_model / "unet", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and len(list((disk / "empty").iterdir())) == 2 and asked == [disk]
    (tmp_path / "nowhere").symlink_to(disk / "new")
    convert(image_model / "unet", tmp_path / "nowhere")
    assert sorted(p.name for p in disk.iterdir()) == ["empty", "new"]


def test_a_path_that_is_not_utf_8(image_model, tmp_path):
    for name, to in ((b"caf\xe9", "diffusers"), (b"caf\xe9.safetensors", "single-file")):
        dst = tmp_path / os.fsdecode(name)
        convert(image_model, dst, to)
        assert dst.exists() and components(dst)
        with pytest.raises(FileExistsError) as caught:
            convert(image_model, dst, to)
        str(caught.value).encode()  # it can be printed


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool])
def test_whole_numbers_are_no_weights(image_model, tmp_path, dtype):
    """Neither for convert nor for loading."""
    shutil.copytree(image_model / "unet", tmp_path / "unet")
    (path,) = (tmp_path / "unet").glob("*.safetensors")
    save_file({n: x.to(dtype) if n == "conv_in.weight" else x for n, x in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="'conv_in.weight' is (I8|I64|U8|BOOL), but (only )?weights"):
        convert(tmp_path / "unet", tmp_path / "out")
    for load in (lambda: UNet2DConditionModel.from_pretrained(tmp_path / "unet"),
                 lambda: UNet2DConditionModel.from_single_file(path, config=tmp_path / "unet" / "config.json")):
        with pytest.raises(ValueError, match="'conv_in.weight' is (I8|I64|U8|BOOL), but (only )?weights"):
            load()
    for what in (tmp_path / "unet", path):
        lines, good = inspect.report(str(what))
        assert not good and any("of integers: 'conv_in.weight'" in line for line in lines), lines


def test_a_single_file_whose_vae_is_between_old_names_and_new(image_model, single, tmp_path):
    def renamed(name: str) -> str:
        return re.sub(r"(mid\.attn_1\.)(q|k|v|proj_out)\.", lambda m: m[1] + (
            "to_out.0." if m[2] == "proj_out" else f"to_{m[2]}."), name)  # fmt: skip

    state = {renamed(n): x[:, :, 0, 0] if renamed(n) != n and x.ndim == 4 else x for n, x in load_file(single).items()}
    state["embedding_manager.string_to_param_dict.*"] = torch.ones(1, 24)
    save_file({n: x.contiguous() for n, x in state.items()}, tmp_path / "x.safetensors")
    work = convert(tmp_path / "x.safetensors", tmp_path / "out", config=image_model)
    same(weights(tmp_path / "out" / "vae"), weights(image_model / "vae"))
    assert any("1 tensors left out, words of textual inversion" in note for note in work.notes)


def test_what_another_run_has_left_is_not_taken(image_model, tmp_path):
    stale = tmp_path / f".out.{os.getpid()}.tmp"
    (stale / "unet").mkdir(parents=True)
    (stale / "unet" / "stale.json").touch()
    convert(image_model / "unet", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors"]  # fmt: skip
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([stale.name, "out", "plain"])


# A network of the published size in its heads and groups, so that a file says all of it.
WHOLE = {"norm_num_groups": 32, "attention_head_dim": 8}


def test_a_pipeline_out_of_a_single_file(tmp_path, make_official_folder):
    """The same frames as from the folder, with an adapter, and nothing written."""
    from minit2v import AnimateDiffPipeline, DiffusionPipeline

    folder = make_official_folder(tmp_path / "folder", repo="sd15", small=True, unet=WHOLE,
                                  text_encoder={"num_attention_heads": 1},
                                  vae={"block_out_channels": [32, 32], "norm_num_groups": 32})  # fmt: skip
    path = tmp_path / "model.ckpt"
    convert(folder, path, to="single-file")
    adapter = MotionAdapter(**{k: v for k, v in SMALL_MOTION.items() if not k.startswith("_")})
    parts = {"motion_adapter": adapter, "tokenizer": AnimateDiffPipeline.from_pretrained(
        folder, motion_adapter=adapter).tokenizer}  # fmt: skip
    before = sorted(tmp_path.iterdir())
    made = []
    for pipe in (AnimateDiffPipeline.from_pretrained(folder, **parts),
                 AnimateDiffPipeline.from_single_file(path, **parts),
                 DiffusionPipeline.from_pretrained(path, **parts),
                 AnimateDiffPipeline.from_single_file(path, config=folder, motion_adapter=adapter)):
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        made.append(pipe("a cat", num_frames=2, height=16, width=16, num_inference_steps=2, output_type="latent",
                         generator=torch.Generator().manual_seed(0)).frames)  # fmt: skip
    assert sorted(tmp_path.iterdir()) == before
    assert all(torch.equal(made[0], x) for x in made[1:]) and made[0].std() > 0

    with pytest.raises(ValueError, match="is an image model, and AnimateDiffPipeline needs motion modules"):
        AnimateDiffPipeline.from_single_file(path)
    with pytest.raises(TypeError, match="no argument 'tokeniser'.*tokenizer"):
        AnimateDiffPipeline.from_single_file(path, tokeniser=None)
    with pytest.raises(ValueError, match="without a UNet for TextToVideoSDPipeline"):
        DiffusionPipeline.CLASSES["TextToVideoSDPipeline"].from_single_file(path)


def test_a_pipeline_around_modelscope_s_unet(video_model, tmp_path):
    """The rest comes from a folder."""
    from minit2v import DiffusionPipeline, TextToVideoSDPipeline

    convert(video_model, tmp_path / "o", to="authors")
    file = tmp_path / "o" / "text2video_pytorch_model.pth"
    with pytest.raises(ValueError, match="has no vae: give it as vae=... .--vae., or a folder or hub id"):
        DiffusionPipeline.from_single_file(file)
    unet = UNet3DConditionModel.from_single_file(file, norm_num_groups=8, attention_head_dim=8)
    same(unet.state_dict(), UNet3DConditionModel.from_pretrained(video_model / "unet").state_dict())
    assert isinstance(DiffusionPipeline.from_single_file(file, config=video_model), TextToVideoSDPipeline)


def test_the_command_line_takes_files_too(tmp_path, make_official_folder, monkeypatch):
    """An image model and a motion module as they are published; only the tokenizer is another's."""
    from minit2v import cli
    from minit2v.files.video import read_metadata

    folder = make_official_folder(tmp_path / "folder", repo="sd15", small=True, unet=WHOLE,
                                  vae={"block_out_channels": [32, 32], "norm_num_groups": 32})  # fmt: skip
    adapter = MotionAdapter(**{k: v for k, v in SMALL_MOTION.items() if not k.startswith("_")})
    adapter.save_pretrained(tmp_path / "adapter")
    convert(folder, base := tmp_path / "model.ckpt", to="single-file")
    convert(tmp_path / "adapter", motion := tmp_path / "mm.ckpt", to="authors")
    made = []
    for b, a in ((folder, tmp_path / "adapter"), (base, motion)):
        out = tmp_path / f"{b.name}.mp4"
        assert cli.main(["animate", "a cat", f"--base={b}", f"--adapter={a}", "--num-frames=2", "--steps=2",
                         "--height=16", "--width=16", "--seed=0", f"--tokenizer={folder}", "-o", str(out)]) == 0
        made.append(read_metadata(out))
    assert made[0]["scheduler"] == made[1]["scheduler"] == "DDIMScheduler"
    assert cli.main(["animate", "a cat", f"--base={motion}", f"--adapter={motion}"]) == 1
