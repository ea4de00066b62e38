"""Other families of models, as file and folder: named at once, by every command, and never converted."""

import gzip
import json
from pathlib import Path

import pytest

from minit2v import AnimateDiffPipeline, AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from minit2v.cli import main
from minit2v_convert import families
from minit2v_convert.convert import convert
from minit2v_convert.detect import detect
from minit2v_convert.sparse import write_sparse_safetensors

DATA = Path(__file__).parents[1] / "data"
FILES = json.loads(gzip.decompress((DATA / "authors_files.json.gz").read_bytes()))
WHOLE = FILES["civitai_fp16_pruned"]
LDM = "model.diffusion_model."
UNET = {name: x for name, x in WHOLE.items() if name.startswith(LDM)}


def of_sd2(header):
    """Texts of 1,024 numbers and linear projections."""
    out = {}
    for name, (shape, dtype) in header.items():
        if "attn2.to_k" in name or "attn2.to_v" in name:
            shape = [shape[0], 1024]
        if ".proj_in." in name or ".proj_out." in name:
            shape = shape[:2]
        out[name] = (shape, dtype)
    return out


FILES_OF = {  # title -> (family, header)
    "SDXL": (families.SDXL, {**WHOLE, f"{LDM}label_emb.0.0.weight": ([1280, 2816], "F16"),
                             "conditioner.embedders.1.model.text_projection": ([1280, 1280], "F16")}),
    "SDXL, the UNet alone": (families.SDXL, {
        **UNET, f"{LDM}input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": ([640, 2048], "F16")}),
    "inpainting": (families.INPAINTING, {**WHOLE, f"{LDM}input_blocks.0.0.weight": ([320, 9, 3, 3], "F16")}),
    "InstructPix2Pix": (families.CHANNELS[8], {**WHOLE, f"{LDM}input_blocks.0.0.weight": ([320, 8, 3, 3], "F16")}),
    "LCM": (families.LCM, {**WHOLE, f"{LDM}time_embed.cond_proj.weight": ([320, 256], "F16")}),
    "SVD": (families.SVD, {**UNET, "conditioner.embedders.0.open_clip.model.visual.proj": ([1, 1], "F16"),
                           f"{LDM}input_blocks.1.0.time_stack.in_layers.0.weight": ([320], "F16")}),
    "SD 2, the UNet alone": (families.SD2, of_sd2(UNET)),
    "Hotshot's layers": (families.HOTSHOT, {"down_blocks.0.temporal_attentions.0.norm.weight": ([320], "F16")}),
    "a LoRA of SDXL": (f"a LoRA of {families.SDXL}", {
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": ([4, 1280], "F16"),
        "lora_unet_input_blocks_4_1_proj_in.lora_down.weight": ([4, 640], "F16")}),
}  # fmt: skip


def fails(capsys, family, *argv):
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 1
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if "error:" in line]
    assert len(errors) == 1 and f"is {family}, which minit2v cannot run" in errors[0] and not out, (out, err)


@pytest.mark.parametrize("title", FILES_OF)
def test_a_file_is_named_by_every_command(title, tmp_path, monkeypatch, capsys):
    family, header = FILES_OF[title]
    monkeypatch.chdir(tmp_path)
    write_sparse_safetensors(Path("a.safetensors"), header)
    fails(capsys, family, "inspect", "a.safetensors")
    fails(capsys, family, "convert", "a.safetensors", "out")
    fails(capsys, family, "animate", "a cat", "--base", "a.safetensors", "--adapter", "shapes-motion")
    for load in (DiffusionPipeline.from_pretrained, DiffusionPipeline.from_single_file,
                 UNet2DConditionModel.from_single_file):  # fmt: skip
        with pytest.raises(ValueError, match="a.safetensors: this is .*, which minit2v cannot run"):
            load("a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


INDEX = {"scheduler": ["diffusers", "DDIMScheduler"], "vae": ["diffusers", "AutoencoderKL"],
         "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}  # fmt: skip
XL = {"addition_embed_type": "text_time", "cross_attention_dim": 2048, "transformer_layers_per_block": [1, 2, 10]}
FOLDERS = {  # title: (family, pipeline, fields of the UNet's config, of what the unet's class is)
    "SDXL": (families.SDXL, "StableDiffusionXLPipeline", XL, "UNet2DConditionModel"),
    "SDXL, under another name": (families.SDXL, "StableDiffusionPipeline", XL, "UNet2DConditionModel"),
    "SD 2": (families.SD2, "StableDiffusionPipeline", {"use_linear_projection": True, "cross_attention_dim": 1024,
                                                       "attention_head_dim": [5, 10, 20, 20]}, "UNet2DConditionModel"),
    "LCM": (families.LCM, "LatentConsistencyModelPipeline", {"time_cond_proj_dim": 256}, "UNet2DConditionModel"),
    "LCM, under another name": (families.LCM, "StableDiffusionPipeline", {"time_cond_proj_dim": 256},
                                "UNet2DConditionModel"),
    "inpainting": (families.INPAINTING, "StableDiffusionInpaintPipeline", {"in_channels": 9}, "UNet2DConditionModel"),
    "inpainting, under another name": (families.INPAINTING, "StableDiffusionPipeline", {"in_channels": 9},
                                       "UNet2DConditionModel"),
    "SVD": (families.SVD, "StableVideoDiffusionPipeline", {"in_channels": 8}, "UNetSpatioTemporalConditionModel"),
    "Hotshot": (families.HOTSHOT, "HotshotXLPipeline", XL, "UNet3DConditionModel"),
}  # fmt: skip


@pytest.mark.parametrize("title", FOLDERS)
def test_a_folder_is_named_by_every_command(title, tmp_path, monkeypatch, capsys, published_config):
    """Before any weights are looked for: there are none."""
    family, pipeline, fields, cls = FOLDERS[title]
    monkeypatch.chdir(tmp_path)
    unet = {**published_config("sd15", "unet/config.json"), **fields, "_class_name": cls}
    files = {"model_index.json": {"_class_name": pipeline, **INDEX, "unet": ["diffusers", cls]},
             "unet/config.json": unet, "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler"}}
    for name, content in files.items():
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).write_text(json.dumps(content))
    header = {"conv_in.weight": ([320, fields.get("in_channels", 4), 3, 3], "F16")}
    header |= {name: ([1], "F16") for name in (
        "time_embedding.linear_1.weight", "down_blocks.0.resnets.0.norm1.weight",
        *["add_embedding.linear_1.weight"] * ("addition_embed_type" in fields),
        *["time_embedding.cond_proj.weight"] * ("time_cond_proj_dim" in fields),
        *["down_blocks.0.resnets.0.temporal_res_block.norm1.weight"] * ("SVD" in title),
        *["down_blocks.0.temporal_attentions.0.norm.weight"] * ("Hotshot" in title))}  # fmt: skip
    if "SD 2" in title:
        header |= {"down_blocks.0.attentions.0.proj_in.weight": ([320, 320], "F16"),
                   "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": ([320, 1024], "F16")}
    write_sparse_safetensors(tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors", header)
    fails(capsys, family, "inspect", "m")
    fails(capsys, family, "animate", "a cat", "--base", "m", "--adapter", "shapes-motion")
    fails(capsys, family, "generate", "a cat", "--model", "m")
    for name in ("vae", "text_encoder"):
        (tmp_path / "m" / name).mkdir()
    index = json.loads((tmp_path / "m" / "model_index.json").read_text())
    (tmp_path / "m" / "model_index.json").write_text(json.dumps({**index, "vae": [None, None],
                                                                 "text_encoder": [None, None]}))
    fails(capsys, family, "convert", "m", "out")
    fails(capsys, family, "convert", "m/unet", "out")
    if cls == "UNet2DConditionModel" and "inpainting" not in title:  # a network of nine channels is one, for forks
        with pytest.raises(ValueError, match="unet/config.json: this is .*, which minit2v cannot run"):
            UNet2DConditionModel.from_pretrained("m", subfolder="unet")
    with pytest.raises(ValueError, match=f"is {family.split(' (')[0]}.*, which minit2v cannot run"):
        AnimateDiffPipeline.from_pretrained("m", motion_adapter=None, vae=None, text_encoder=None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_of_a_whole_file_of_stable_diffusion_2_the_vae_is_run(tmp_path, monkeypatch, capsys):
    """ModelScope published it as its VAE."""
    monkeypatch.chdir(tmp_path)
    header = {**{n: x for n, x in WHOLE.items() if n.startswith("first_stage_model.")}, **of_sd2(UNET),
              "cond_stage_model.model.ln_final.weight": ([1024], "F16")}  # fmt: skip
    write_sparse_safetensors(Path("sd2.safetensors"), header)
    assert detect(header).layout.title.startswith("Stable Diffusion 2.x, of which minit2v uses only the VAE")
    with pytest.raises(ValueError, match="sd2.safetensors is Stable Diffusion 2.x, of which minit2v uses only the VAE"):
        DiffusionPipeline.from_pretrained("sd2.safetensors")
    assert main(["animate", "a cat", "--base", "sd2.safetensors"]) == 1
    assert "is Stable Diffusion 2.x, of which minit2v uses only the VAE" in capsys.readouterr().err
    assert AutoencoderKL.from_single_file("sd2.safetensors").config.scaling_factor == 0.18215
    notes = convert("sd2.safetensors", "vae", dry_run=True).notes
    assert any("the UNet of Stable Diffusion 2" in note for note in notes)


def test_what_is_run_is_of_no_other_family(published_config, manifest):
    for name, header in FILES.items():
        assert families.of_header(header) == "", name
    for repo in ("ms-1.7b", "zeroscope_v2_576w", "zeroscope_v2_XL", "sd15", "rv51"):
        assert families.of_unet(published_config(repo, "unet/config.json")) == ""
        assert families.of_index(published_config(repo, "model_index.json")) == ""
    for index in (None, 3, "AnimateDiffPipeline", "TextToVideoSDPipeline", "StableDiffusionPipeline"):
        assert families.of_index({"_class_name": index}) == ""
    assert families.of_unet({"_class_name": ["x"], "in_channels": [9]}) == ""
