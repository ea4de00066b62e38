"""What is converted loads, and so do the authors' files themselves: of every family, strictly, at full size.

The files have the names, shapes and dtypes of the authors' or diffusers' files around a hole that reads as zeros: they
take no disk, and what is not cast takes no memory.
"""

import gzip
import json
import logging
from pathlib import Path

import pytest
import torch

from minit2v import AutoencoderKL, CLIPTextModel, MotionAdapter, UNet2DConditionModel, UNet3DConditionModel
from minit2v.models.unet_motion import UNetMotionModel
from minit2v_convert import animatediff, configs, detect, shapes
from minit2v_convert.convert import components, convert
from minit2v_convert.sparse import Manifest, write_sparse_safetensors

FILES = json.loads(gzip.decompress((Path(__file__).parents[1] / "data" / "authors_files.json.gz").read_bytes()))
SINGLE = [("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)]
LDM = {n.removeprefix("first_stage_model."): x for n, x in FILES["VQGAN_autoencoder.first_stage_model"].items()}
AUTHORS_FILES = [  # file: {class: what its config must say}
    ("text2video_pytorch_model", UNet3DConditionModel, {"attention_head_dim": 64, "cross_attention_dim": 1024}),
    ("VQGAN_autoencoder.first_stage_model", AutoencoderKL, {"scaling_factor": 0.18215}),
    ("open_clip_pytorch_model", CLIPTextModel, {"num_hidden_layers": 23, "hidden_act": "gelu"}),
    ("mm_sd_v15", MotionAdapter, {"motion_max_seq_length": 24, "resnet_norms": "video"}),
    ("mm_sd_v15_v2", MotionAdapter, {"use_motion_mid_block": True, "resnet_norms": "frame"}),
    ("v3_sd15_mm", MotionAdapter, {"motion_max_seq_length": 32, "resnet_norms": "frame"}),
    ("mm_sdxl_v10_beta", MotionAdapter, {"block_out_channels": (320, 640, 1280)}),
    ("AnimateLCM_sd15_t2v", MotionAdapter, {"motion_max_seq_length": 32, "use_motion_mid_block": True}),
    *[(name, cls, {}) for name in ("v1-5-pruned-emaonly", "civitai_fp16_pruned") for _, cls in SINGLE],
]  # fmt: skip


def sparse(folder: Path, manifest: Manifest, dtype: str | None = None) -> Path:
    manifest = {n: (s, dtype if dtype and d[0] != "I" else d) for n, (s, d) in manifest.items()}
    return write_sparse_safetensors(folder / "file.safetensors", manifest)


def private(path: str = "/proc/self/status") -> int:
    """MiB of memory that is not a page of a file."""
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) >> 10


@pytest.mark.parametrize(("name", "cls", "says"), AUTHORS_FILES, ids=lambda x: getattr(x, "__name__", str(x)[:20]))
def test_authors_files_at_full_size(tmp_path, caplog, name, cls, says):
    """As they are, from their holes into a network with every tensor in its place."""
    path = sparse(tmp_path, FILES[name])
    dtype = {"F32": torch.float32, "F16": torch.float16}[next(d for _, d in FILES[name].values() if d[0] == "F")]
    before = private()
    with caplog.at_level(logging.WARNING):
        model = cls.from_pretrained(path, dtype=dtype)
    assert model.dtype == dtype and not model.training
    assert {n: getattr(model.config, n) for n in says} == says
    assert not any(p.is_meta for p in model.parameters())
    assert private() - before < 128
    assert not caplog.records, "nothing has to be guessed of an authors' file"


@pytest.fixture
def light(monkeypatch):
    """Folders whose weights are holes: what would be written, without being written."""

    def folder(src: Path, out: Path, **how) -> Path:
        work = convert(src, out, dry_run=True, **how)
        for name, plan in work.plans.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            write_sparse_safetensors(out / name, {s.name: (s.shape, s.dtype) for s in plan.steps})
        for name, text in work.texts.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(text)
        return out

    return folder


@pytest.mark.parametrize(("name", "cls", "says"), AUTHORS_FILES[:8], ids=lambda x: getattr(x, "__name__", str(x)[:20]))
def test_converted_folders_at_full_size(tmp_path, caplog, light, name, cls, says):
    """And the file that the folder is converted back to loads, too."""
    folder = light(sparse(tmp_path, FILES[name], "F32"), tmp_path / "out")
    with caplog.at_level(logging.WARNING):
        model = cls.from_pretrained(folder)
    assert {n: getattr(model.config, n) for n in says} == says
    assert not caplog.records


def test_a_converted_single_file_at_full_size(tmp_path, light):
    folder = light(sparse(tmp_path, FILES["v1-5-pruned"]), tmp_path / "out")
    for part, cls in SINGLE:
        model = cls.from_pretrained(folder / part)
        assert sum(p.numel() for p in model.parameters()) > 8e7
    ema = light(sparse(tmp_path, FILES["v1-5-pruned"]), tmp_path / "ema", ema=True)
    UNet2DConditionModel.from_pretrained(ema / "unet")


def test_bare_networks_at_full_size(tmp_path, manifest):
    """Weights of diffusers without a config.json, a VAE alone, a UNet alone, a trainer's checkpoint."""
    unet = {n.removeprefix("model.diffusion_model."): x for n, x in FILES["v1-5-pruned-emaonly"].items()
            if n.startswith("model.diffusion_model.")}  # fmt: skip
    motion = shapes.unet_motion(next(iter(detect.MOTION_UNET.known.values())))
    trainer = {f"module.{n}": x for n, x in {**manifest("sd15/unet"), **FILES["mm_sd_v15"]}.items()}
    for names, cls in (
        (manifest("ms-1.7b/unet"), UNet3DConditionModel),
        (manifest("sd15/unet"), UNet2DConditionModel),
        (manifest("sd15/vae"), AutoencoderKL),
        (manifest("sd15/text_encoder"), CLIPTextModel),
        (manifest("adapter-v1-5-2/motion_adapter"), MotionAdapter),
        ({n: (s, "F32") for n, s in motion.items()}, UNetMotionModel),
        (LDM, AutoencoderKL),
        (unet, UNet2DConditionModel),
        (trainer, UNet2DConditionModel),
        (trainer, MotionAdapter),
    ):
        cls.from_single_file(sparse(tmp_path, names))


@pytest.mark.parametrize("name", ["v2_lora", "animatediff-motion-lora", "v3_sd15_adapter", "AnimateLCM_sd15_t2v_lora"])
def test_converted_loras_are_in_the_names_of_the_networks(tmp_path, light, name):
    """Each pair fits a layer that a network has."""
    folder = light(sparse(tmp_path, FILES[name]), tmp_path / "out")
    state = components(folder / "pytorch_lora_weights.safetensors")["lora"].plan.steps
    layers = {**shapes.unet2d(configs.UNET2D), **shapes.motion_adapter(animatediff.MOTION_CONFIGS["v2"])}
    assert len(state) == len(FILES[name])
    for step in state:
        assert step.name.startswith("unet.")
        module, _, half = step.name.removeprefix("unet.").partition(".lora_")
        if half:
            outputs, inputs, *_ = layers[f"{module}.weight"]
            assert step.shape[0 if half.startswith("B") else 1] == (outputs if half.startswith("B") else inputs)


def test_warnings_are_left_to_what_is_not_known(tmp_path, caplog, manifest):
    """Of v3 the authors' file tells, diffusers' does not."""
    MotionAdapter.from_pretrained(sparse(tmp_path, FILES["v3_sd15_mm"]))
    assert not caplog.records
    MotionAdapter.from_pretrained(sparse(tmp_path, manifest("adapter-v1-5-3/motion_adapter")))
    assert "version 1 or 3" in caplog.text
    config = {**animatediff.MOTION_CONFIGS["v1"], "motion_max_seq_length": 16}
    table = animatediff.MODULES.table(config)
    names = {n: (e.authors_shape(table.shapes), "F32") for e in table.entries for n in e.authors}
    caplog.clear()
    MotionAdapter.from_pretrained(sparse(tmp_path, names))
    assert "version 1 or 3" in caplog.text, "16 positions are no published version's"
