"""ModelScope's configuration.json, and whole folders of ModelScope's files."""

import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minit2v import DDIMScheduler, DiffusionPipeline, TextToVideoSDPipeline, UNet3DConditionModel
from minit2v.cli.inspect import report
from minit2v_convert import configs, modelscope
from minit2v_convert import convert as module
from minit2v_convert import modelscope_configuration as configuration
from minit2v_convert.convert import components, convert

PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "modelscope_configuration.json").read_text())
# Sizes of which ModelScope's files say everything: 32 groups, heads of one width.
WHOLE = {
    "unet": {"norm_num_groups": 32, "cross_attention_dim": 64},
    "vae": {"norm_num_groups": 32, "block_out_channels": [32, 32]},
    "text_encoder": {"hidden_size": 64, "num_attention_heads": 1},
}


def open_clip(text: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file that this text encoder could come from: one block more, and an image tower."""
    dim = text["text_model.final_layer_norm.bias"].shape[0]
    layers = len({n.split(".")[3] for n in text if ".layers." in n})
    config = {**configs.CLIP_H, "hidden_size": dim, "num_hidden_layers": layers, "intermediate_size": 40,
              "vocab_size": text["text_model.embeddings.token_embedding.weight"].shape[0]}  # fmt: skip
    entries = modelscope.OPEN_CLIP.table(config).entries
    state = {e.authors[0]: torch.cat([text[n] for n in e.diffusers]) for e in entries}
    last, before = f"resblocks.{layers}.", f"resblocks.{layers - 1}."
    state |= {n.replace(before, last): x + 1 for n, x in state.items() if before in n}
    return {**state, "visual.proj": torch.rand(3), "text_projection": torch.rand(dim, dim),
            "logit_scale": torch.tensor(4.6)}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_official_folder) -> Path:
    return make_official_folder(tmp_path_factory.mktemp("diffusers"), small=True, **WHOLE)


@pytest.fixture(scope="module")
def authors(tmp_path_factory, folder) -> Path:
    """All four files."""
    path = tmp_path_factory.mktemp("modelscope") / "authors"
    convert(folder, path, to="authors")
    torch.save(open_clip(load_file(folder / "text_encoder/model.safetensors")), path / "open_clip_pytorch_model.bin")
    return path


def changed(path: Path, **fields: object) -> None:
    """With other fields, wherever they stand."""
    content = json.loads(path.read_text())
    for part in content["model"]["model_args"], content["model"]["model_cfg"]:
        part.update({n: v for n, v in fields.items() if n in part})
    path.write_text(json.dumps(content))


# ------------------------------------------------------------------------------------------------------------ the file


def test_the_published_one_there_and_back():
    said = configuration.read(PUBLISHED)
    assert said.unet == {n: configs.UNET3D[n] for n in said.unet}
    assert said.scheduler == {"num_train_timesteps": 1000, "prediction_type": "epsilon"}
    assert said.files == {"unet": "text2video_pytorch_model.pth", "vae": "VQGAN_autoencoder.pth",
                          "text_encoder": "open_clip_pytorch_model.bin"}  # fmt: skip
    schedule = module.FAMILIES["UNet3DConditionModel"].scheduler
    assert configuration.write(configs.UNET3D, schedule) == (PUBLISHED, [])


def test_other_sizes_there_and_back():
    kinds = ["DownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"]
    unet = {"block_out_channels": [24, 36, 96], "layers_per_block": 1, "in_channels": 5, "out_channels": 3,
            "cross_attention_dim": 7, "attention_head_dim": 12, "down_block_types": kinds,
            "up_block_types": [k.replace("Down", "Up") for k in reversed(kinds)]}  # fmt: skip
    scheduler = {"num_train_timesteps": 500, "prediction_type": "v_prediction"}
    content, notes = configuration.write(unet, scheduler)
    assert not notes and content["model"]["model_cfg"]["unet_dim_mult"] == [1, 1.5, 4]
    said = configuration.read(json.loads(json.dumps(content)))
    assert (said.unet, said.scheduler) == (unet, scheduler)


def test_what_it_cannot_say_is_noted():
    _, notes = configuration.write(
        {**configs.UNET3D, "norm_num_groups": 8},
        {"beta_schedule": "linear", "rescale_betas_zero_snr": True, "prediction_type": "flow"})  # fmt: skip
    assert [n.removeprefix("configuration.json cannot store ") for n in notes] == [
        "norm_num_groups 8; in the authors' code it is 32", "prediction_type 'flow'",
        "beta_schedule 'linear'; in the authors' code it is 'scaled_linear'", "rescale_betas_zero_snr"]  # fmt: skip


@pytest.mark.parametrize(("where", "name", "value", "says"), [
    ("model_cfg", "unet_dims", 3, r"the unknown field 'unet_dims' \(nearest: 'unet_dim'\)"),
    ("model_args", "ckpt_vae", "x", r"the unknown field 'ckpt_vae'"),
    ("model_args", "ckpt_unet", "../x.pth", "ckpt_unet must be the name of a file in the same folder, not '../x.pth'"),
    ("model_cfg", "unet_dim", None, "model_cfg has no 'unet_dim'"),
    ("model_cfg", "unet_dim", "320", "unet_dim must be a whole number of at least 1, not '320'"),
    ("model_cfg", "unet_dim_mult", 4, "unet_dim_mult must be a list of numbers, not 4"),
    ("model_cfg", "unet_attn_scales", [1, 0.3], "unet_attn_scales has 0.3, but the 4 levels have the scales"),
    ("model_cfg", "unet_num_heads", 4, "unet_num_heads must be 8, not 4"),
    ("model_cfg", "temporal_attention", "False", "temporal_attention must be 'True', not 'False'"),
    ("model_cfg", "mean_type", "x_{t-1}", "mean_type must be one of eps, x0, v, not 'x_{t-1}'"),
    (None, "type", "image-to-video", "model.type must be 'latent-text-to-video-synthesis', not 'image-to-video'"),
    (None, "model_cfg", [], "the object 'model_cfg' is missing"),
])  # fmt: skip
def test_a_configuration_that_is_not_quite_right(where, name, value, says):
    content = deepcopy(PUBLISHED)
    part = content["model"][where] if where else content["model"]
    part[name] = value
    if value is None:
        del part[name]
    with pytest.raises(ValueError, match=says) as error:
        configuration.read(content)
    assert "\n" not in str(error.value)


def test_values_of_other_kinds_end_in_one_line():
    refused = 0
    for value in (None, True, -1, 0, 10**30, float("nan"), float("inf"), "", "x", [], ["x"], [[]], {}, {"a": []}):
        for part, fields in (("model_cfg", configuration.READ), ("model_args", configuration.FILES)):
            for name in fields:
                content = deepcopy(PUBLISHED)
                content["model"][part][name] = value
                try:
                    configuration.read(content)
                except ValueError as error:
                    refused += 1
                    assert "\n" not in str(error) and name in str(error), (name, value)
    assert refused == 14 * 15 - 12  # seven may be of any size, files have any name, no level attention, True is "True"


# ---------------------------------------------------------------------------------------------------------- the folder


def test_a_whole_folder_there_and_back(folder, authors, tmp_path):
    work = convert(authors, tmp_path / "out", tokenizer=folder / "tokenizer")
    for part in ("unet", "vae", "text_encoder"):
        (have,), (want,) = ([*(p / part).glob("*.safetensors")] for p in (tmp_path / "out", folder))
        have, want = load_file(have), load_file(want)
        assert have.keys() == want.keys() and all(torch.equal(have[n], x) for n, x in want.items())
    had, wanted = (json.loads((p / "unet/config.json").read_text()) for p in (tmp_path / "out", folder))
    differ = {n for n in had.keys() & wanted.keys() if had[n] != wanted[n]}
    assert differ == {"_diffusers_version", "sample_size"}  # which is nowhere
    assert not [note for note in work.notes if "missing" in note or "scheduler" in note]
    convert(tmp_path / "out", tmp_path / "again", to="authors")
    assert json.loads((tmp_path / "again/configuration.json").read_text()) == json.loads(
        (authors / "configuration.json").read_text())
    for name in ("text2video_pytorch_model.pth", "VQGAN_autoencoder.pth"):
        have, want = (torch.load(p / name, weights_only=True) for p in (tmp_path / "again", authors))
        have, want = (x.get("state_dict", x) for x in (have, want))
        assert list(have) == list(want) and all(torch.equal(have[n], x) for n, x in want.items())


def test_what_the_noise_was_is_taken_over(authors, folder, tmp_path):
    shutil.copytree(authors, tmp_path / "v")
    changed(tmp_path / "v/configuration.json", mean_type="v", num_timesteps=500)
    convert(tmp_path / "v", tmp_path / "out", tokenizer=folder / "tokenizer")
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.num_train_timesteps == 500
    assert TextToVideoSDPipeline.from_pretrained(tmp_path / "out").scheduler.config == scheduler.config
    tokenizer = TextToVideoSDPipeline.from_pretrained(folder).tokenizer
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "v", tokenizer=tokenizer)
    assert isinstance(pipe, TextToVideoSDPipeline) and pipe.scheduler.config.prediction_type == "v_prediction"
    convert(tmp_path / "out", tmp_path / "again", to="authors")
    content = json.loads((tmp_path / "again/configuration.json").read_text())["model"]["model_cfg"]
    assert (content["mean_type"], content["num_timesteps"]) == ("v", 500)


def test_it_is_checked_against_the_weights(authors, tmp_path):
    shutil.copytree(authors, folder := tmp_path / "o")
    path = folder / "configuration.json"
    changed(path, unet_dim=48)
    with pytest.raises(ValueError, match=r"configuration.json has block_out_channels \[48, 96\], but the weights in .*"
                                         r"text2video_pytorch_model.pth have \[32, 64\]"):  # fmt: skip
        convert(folder, tmp_path / "x")
    changed(path, unet_dim=32, unet_attn_scales=[1, 0.5])
    with pytest.raises(ValueError, match="has attention in down_block_types"):
        components(folder)
    changed(path, unet_attn_scales=[1], ckpt_autoencoder="open_clip_pytorch_model.bin")
    changed(path, ckpt_clip="VQGAN_autoencoder.pth")
    with pytest.raises(ValueError, match="VQGAN_autoencoder.pth is the vae, but for it configuration.json names"):
        components(folder)
    changed(path, ckpt_autoencoder="VQGAN_autoencoder.pth", ckpt_clip="open_clip_pytorch_model.bin", unet_num_heads=4)
    with pytest.raises(ValueError, match=r"o/configuration.json: unet_num_heads must be 8") as error:
        components(folder)
    assert str(error.value).count("configuration.json") == 1
    path.write_text("{")
    with pytest.raises(ValueError, match="configuration.json is not JSON"):
        components(folder)
    assert not (tmp_path / "x").exists()


def test_other_files_beside_them_are_left_out(authors, tmp_path):
    shutil.copytree(authors, folder := tmp_path / "o")
    shutil.copy(folder / "text2video_pytorch_model.pth", folder / "old.pth")
    (folder / "open_clip_pytorch_model.bin").unlink()
    work = convert(folder, tmp_path / "x", dry_run=True)
    assert "old.pth is left out: configuration.json does not name it" in work.notes
    assert [note for note in work.notes if note.startswith("text_encoder is missing")]
    (folder / "configuration.json").unlink()
    with pytest.raises(ValueError, match="text2video_pytorch_model.pth and .*old.pth are both the unet"):
        convert(folder, tmp_path / "x")


def test_it_is_inspected(authors, tmp_path):
    lines, good = report(str(authors))
    assert good and lines[-1] == "configuration.json: num_train_timesteps 1000, prediction_type epsilon"
    assert [line for line in lines if line.startswith("ModelScope's UNetSD")] and lines.count("complete") == 3
    shutil.copytree(authors, folder := tmp_path / "o")
    changed(folder / "configuration.json", unet_out_dim=3)
    lines, good = report(str(folder))
    assert not good and any(line.startswith("wrong: configuration.json has out_channels 3") for line in lines)
    changed(folder / "configuration.json", unet_out_dim=4)
    (folder / "VQGAN_autoencoder.pth").unlink()
    lines, good = report(str(folder))
    assert not good and "configuration.json: the file VQGAN_autoencoder.pth is missing" in lines


def test_it_is_run(folder, authors, tmp_path):
    """The same frames as from the folder, in Python and by the command; only the tokenizer is another's."""
    from minit2v import cli
    from minit2v.files.video import load_video

    want = TextToVideoSDPipeline.from_pretrained(folder)
    have = DiffusionPipeline.from_pretrained(authors, tokenizer=want.tokenizer)
    assert type(have) is TextToVideoSDPipeline
    made = []
    for pipe in (want, have):
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = DDIMScheduler.from_config(want.scheduler.config)
        made.append(pipe("a cat", num_frames=2, height=16, width=16, num_inference_steps=2, output_type="latent",
                         generator=torch.Generator().manual_seed(0)).frames)  # fmt: skip
    assert torch.equal(*made) and made[0].std() > 0
    unet = UNet3DConditionModel.from_pretrained(authors)
    assert all(torch.equal(x, want.unet.state_dict()[n]) for n, x in unet.state_dict().items())

    frames = []
    for model, options in ((folder, []), (authors, [f"--tokenizer={folder / 'tokenizer'}"])):
        out = tmp_path / f"{model.name}.mp4"
        assert cli.main(["generate", "a cat", f"--model={model}", "--num-frames=2", "--steps=2", "--height=16",
                         "--width=16", "--seed=0", "--scheduler=ddim", "-o", str(out), *options]) == 0  # fmt: skip
        frames.append([f.tobytes() for f in load_video(out)])
    assert frames[0] == frames[1]
