"""What a file is, from its header: every published file, and each of them with pieces missing."""

import gzip
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from minit2v_convert import animatediff, ldm, shapes
from minit2v_convert.detect import LAYOUTS, SIZES, Header, Kind, detect

FILES = json.loads(gzip.decompress((Path(__file__).parents[1] / "data" / "authors_files.json.gz").read_bytes()))
SD = "Stable Diffusion 1.5, Stable Diffusion's, CLIP ViT-L/14"

AUTHORS_FILES = {  # file: title, layout, version, positions, ignored tensors
    "text2video_pytorch_model": ("ModelScope's UNetSD", "authors", "ModelScope or Zeroscope", None, 0),
    "VQGAN_autoencoder.first_stage_model": (
        "VAE in a checkpoint (ModelScope's VQGAN_autoencoder.pth)", "authors", "Stable Diffusion's", None, 0),
    "open_clip_pytorch_model": ("OpenCLIP", "authors", "OpenCLIP ViT-H/14", 77, 406),
    "open_clip_pytorch_model.text_only": ("OpenCLIP", "authors", "OpenCLIP ViT-H/14", 77, 14),
    "mm_sd_v15": ("AnimateDiff motion module", "authors", "v1", 24, 0),
    "mm_sd_v15_v2": ("AnimateDiff motion module", "authors", "v2", 32, 0),
    "v3_sd15_mm": ("AnimateDiff motion module", "authors", "v3", 32, 0),
    "mm_sdxl_v10_beta": ("AnimateDiff motion module", "authors", "sdxl", 32, 0),
    "AnimateLCM_sd15_t2v": ("AnimateDiff motion module", "authors", "v2 without positions", None, 0),
    "v2_lora": ("AnimateDiff motion LoRA", "authors", "v2", None, 0),
    "animatediff-motion-lora": ("AnimateDiff motion LoRA", "diffusers", "v2", None, 0),
    "v3_sd15_adapter": ("AnimateDiff domain adapter", "authors", "v3", None, 0),
    "animatediff-motion-lora-v1-5-3": ("AnimateDiff domain adapter", "diffusers", "v3", None, 0),
    "v3_sd15_sparsectrl_rgb": ("SparseCtrl", "authors", "rgb", 32, 0),
    "v3_sd15_sparsectrl_scribble": ("SparseCtrl", "authors", "scribble", 32, 0),
    "animatediff-sparsectrl-rgb": ("SparseCtrl", "diffusers", "rgb", 32, 0),
    "animatediff-sparsectrl-scribble": ("SparseCtrl", "diffusers", "scribble", 32, 0),
    "AnimateLCM_sd15_t2v_lora": ("LoRA of Stable Diffusion 1.5", "kohya", "278 layers of rank 64", None, 0),
    "ip-adapter_sd15": ("IP-Adapter", "authors", "sd15", None, 0),
    "ip-adapter-plus_sd15": ("IP-Adapter", "authors", "plus, sd15", None, 0),
    "image_encoder": ("CLIP image encoder", "diffusers", "CLIP ViT-H/14", None, 0),
    "civitai_fp16_pruned": ("Stable Diffusion 1.x", "single-file", SD, 77, 0),
    "v1-5-pruned-emaonly": ("Stable Diffusion 1.x", "single-file", SD, 77, 14),
    "v1-5-pruned": ("Stable Diffusion 1.x", "single-file", SD, 77, 700),
}  # fmt: skip
PUBLISHED = {  # part, repository: title, version, positions
    ("unet", "ms-1.7b"): ("UNet3DConditionModel", "ModelScope or Zeroscope", None),
    ("unet", "zeroscope_v2_576w"): ("UNet3DConditionModel", "ModelScope or Zeroscope", None),
    ("unet", "zeroscope_v2_XL"): ("UNet3DConditionModel", "ModelScope or Zeroscope", None),
    ("unet", "sd15"): ("UNet2DConditionModel", "Stable Diffusion 1.5", None),
    ("unet", "rv51"): ("UNet2DConditionModel", "Stable Diffusion 1.5", None),
    ("motion_adapter", "adapter-v1-5"): ("MotionAdapter", "v1 or v3", 32),
    ("motion_adapter", "adapter-v1-5-2"): ("MotionAdapter", "v2", 32),
    ("motion_adapter", "adapter-v1-5-3"): ("MotionAdapter", "v1 or v3", 32),
    ("motion_adapter", "adapter-sdxl-beta"): ("MotionAdapter", "sdxl", 32),
    ("motion_adapter", "animatelcm"): ("MotionAdapter", "v2", 32),
    ("text_encoder", "sd15"): ("CLIPTextModel", "CLIP ViT-L/14", 77),
    ("text_encoder", "rv51"): ("CLIPTextModel", "CLIP ViT-L/14", 77),
    **{("text_encoder", repo): ("CLIPTextModel", "OpenCLIP ViT-H/14", 77)
       for repo in ("ms-1.7b", "zeroscope_v2_576w", "zeroscope_v2_XL")},
    **{("vae", repo): ("AutoencoderKL", "Stable Diffusion's", None)
       for repo in ("ms-1.7b", "zeroscope_v2_576w", "zeroscope_v2_XL", "sd15", "rv51")},
}  # fmt: skip


def said(kind: Kind) -> tuple:
    return kind.layout.title, kind.layout.layout, kind.version, kind.positions, len(kind.ignored)


@pytest.mark.parametrize("name", FILES)
def test_authors_files(name):
    header = FILES[name]
    kind = detect(header)
    assert said(kind) == AUTHORS_FILES[name]
    assert kind.complete and not kind.faults() and not kind.prefix
    mapped = sum(len(part.mapped) for part in kind.parts)
    assert mapped + len(kind.ignored) == len(header)
    assert sum(kind.dtypes.values()) == len(header)


def test_diffusers_files(manifest, manifest_names):
    for name in manifest_names:
        repo, part = name.removesuffix(".fp16").split("/")
        title, version, positions = PUBLISHED[part, repo]
        kind = detect(manifest(name))
        assert said(kind) == (title, "diffusers", version, positions, 0), name
        assert kind.complete and kind.components == (part,), name
    assert {(n.removesuffix(".fp16").split("/")[1], n.split("/")[0]) for n in manifest_names} == PUBLISHED.keys()


def test_every_layout_has_a_file_that_is_it(manifest):
    """Those of which no published file is known are put together here, out of published ones."""
    unet, motion = manifest("sd15/unet"), FILES["v3_sd15_mm"]
    ldm_vae = {n.removeprefix("first_stage_model."): x for n, x in FILES["VQGAN_autoencoder.first_stage_model"].items()}
    whole = {n: x for n, x in FILES["civitai_fp16_pruned"].items() if n.startswith("model.diffusion_model.")}
    made: dict[str, Header] = {
        "VAE of latent diffusion": ldm_vae,
        "Stable Diffusion 2.x, of which minit2v uses only the VAE (ModelScope's VQGAN_autoencoder.pth)": {
            **FILES["VQGAN_autoencoder.first_stage_model"], "cond_stage_model.model.ln_final.bias": ([1024], "F32")},
        "UNet of latent diffusion": {n.removeprefix("model.diffusion_model."): x for n, x in whole.items()},
        "AnimateDiff trainer's whole UNet": {**unet, **motion},
        "UNetMotionModel": {**unet, **manifest("adapter-v1-5-3/motion_adapter")},
        "motion LoRA": {n: (s, "F32") for n, s in named("unet.", shapes.motion_lora, animatediff.MOTION_LORA)},
        "LoRA of Stable Diffusion 1.5": {
            n: (s, "F32") for n, s in named("unet.", shapes.spatial_lora, animatediff.DOMAIN_ADAPTER)},
    }  # fmt: skip
    for title, header in made.items():
        kind = detect(header)
        assert kind.layout.title == title and kind.complete, (title, kind.faults())
    seen = {said(detect(x))[:2] for x in [*FILES.values(), *made.values()]} | {
        (title, "diffusers") for title, *_ in PUBLISHED.values()}  # fmt: skip
    assert seen == {(layout.title, layout.layout) for layout in LAYOUTS}


def named(prefix: str, shapes_of: Callable, fmt) -> list:
    return [(prefix + n, s) for n, s in shapes_of(next(iter(fmt.known.values()))).items()]


@pytest.mark.parametrize("name, parameters, size", [
    ("text2video_pytorch_model", 1411233860, 5644935440),
    ("mm_sd_v15_v2", 454417600, 1817670400),
    ("civitai_fp16_pruned", 1066235307, 2132471230),
    ("AnimateLCM_sd15_t2v_lora", 67252502, 134505004),
    ("image_encoder", 632076800, 2528309256),
])  # fmt: skip
def test_counts_and_bytes(name, parameters, size):
    kind = detect(FILES[name])
    assert (kind.parameters, kind.bytes) == (parameters, size)


def test_prefixes_and_dtypes_of_the_report():
    kind = detect({f"module.{n}": (s, "BF16") for n, (s, _) in FILES["mm_sd_v15"].items()})
    assert kind.prefix == "module." and kind.complete and kind.dtypes == {"BF16": 560}
    assert kind.describe() == [
        "AnimateDiff motion module: v1",
        "layout: authors, every name after 'module.'",
        "motion_adapter: 560 tensors, v1",
        "417,982,400 parameters, 835,964,800 bytes, 560 BF16",
        "24 positions",
    ]
    lines = detect(FILES["v1-5-pruned"]).describe()
    assert "not converted: 12 tensors, " + ldm.SCHEDULE in lines
    assert any(line.startswith("not converted: 686 tensors, the moving average") for line in lines)


# --------------------------------------------------------------------------------------------------------- what is not


@pytest.mark.parametrize("name", FILES)
def test_pieces_that_are_missing_are_counted_and_named(name):
    """One tensor, a tenth of them, and what an interrupted writer leaves out."""
    rng = random.Random(name)
    names, whole = list(FILES[name]), detect(FILES[name])
    free = whole.ignored.keys() | {n for n in names if n.endswith((".alpha", "position_ids"))}
    cuts = [names[:1], names[-1:], rng.sample(names, 1), rng.sample(names, len(names) // 10)]
    if whole.layout.layout != "kohya":  # of which layers it is an adapter is its own affair
        cuts.append(names[-(len(names) // 4) :])
    for cut in cuts:
        kind = detect({n: x for n, x in FILES[name].items() if n not in set(cut)})
        assert said(kind)[:2] == said(whole)[:2]
        lost = set(cut) - free
        if "text_encoder" in kind.absent:  # nothing of it is left, and this is said once
            lost = {n for n in lost if not n.startswith("cond_stage_model.")}
        if whole.layout.layout == "kohya":
            assert set(kind.missing) <= lost
        else:
            assert set(kind.missing) == lost and kind.complete == (not lost)
        assert not kind.unknown and not kind.misshapen
        if kind.missing:
            assert kind.faults()[0].startswith(f"{len(kind.missing)} missing: {kind.missing[0]!r}")
            assert any(line.startswith("wrong: ") for line in kind.describe())


def test_diffusers_files_with_pieces_missing(manifest, manifest_names):
    for name in manifest_names:
        if name.startswith(("zeroscope", "rv51")) or ".fp16" in name:
            continue
        header = manifest(name)
        lost = set(random.Random(name).sample(list(header), 5)) - {shapes.POSITION_IDS}
        kind = detect({n: x for n, x in header.items() if n not in lost})
        assert set(kind.missing) == lost and said(kind)[:2] == said(detect(header))[:2], name


def test_a_file_that_ends_early_is_not_a_smaller_network(manifest):
    header = dict(list(manifest("sd15/text_encoder").items())[:-66])  # eight layers of twelve, all that is left whole
    kind = detect(header)
    assert kind.version == "CLIP ViT-L/14" and len(kind.missing) == 66
    assert detect({n: x for n, x in manifest("sd15/text_encoder").items() if ".layers.11." not in n}).version != (
        "CLIP ViT-L/14"), "but a smaller one that is whole is one"  # fmt: skip


def test_a_motion_module_without_its_middle_is_another_version():
    header = {n: x for n, x in FILES["mm_sd_v15_v2"].items() if not n.startswith("mid_block")}
    assert detect(header).version == "v3" and detect(header).complete


def test_a_single_file_without_a_part():
    header = {n: x for n, x in FILES["civitai_fp16_pruned"].items() if not n.startswith("first_stage_model.")}
    kind = detect(header)
    assert kind.absent == ("vae",) and not kind.complete and not kind.faults()
    assert "the file has no vae" in kind.describe()


def half_old(name: str) -> str:
    """As scripts of before diffusers 0.17 spell what diffusers of today has."""
    return re.sub(r"(mid\.attn_1\.)(q|k|v|proj_out)\.", lambda m: m[1] + (
        "to_out.0." if m[2] == "proj_out" else f"to_{m[2]}."), name)  # fmt: skip


@pytest.mark.parametrize("file", ["civitai_fp16_pruned", "VQGAN_autoencoder.first_stage_model"])
@pytest.mark.parametrize("linear", [True, False])
def test_a_vae_between_old_names_and_new(file, linear):
    header = {half_old(n): (s[:2] if linear and half_old(n) != n else s, d) for n, (s, d) in FILES[file].items()}
    assert sum("mid.attn_1.to_" in n for n in header) == 16
    kind, usual = detect(header), detect(FILES[file])
    assert kind.complete and kind.version == usual.version and kind.layout is usual.layout
    (vae,) = (p for p in kind.parts if p.format.component == "vae")
    assert vae.mapped == {half_old(n) for p in usual.parts if p.format.component == "vae" for n in p.mapped}


def test_what_trainers_of_single_files_add_is_listed_with_reasons():
    names = ["embedding_manager.string_to_param_dict.*", "embedding_manager.initial_embeddings.*", "logvar",
             "cond_stage_model.logit_scale", "cond_stage_model.text_projection", "lvlb_weights",
             "cond_stage_model.transformer.text_projection.weight", "cond_stage_model.transformer.logit_scale",
             "cond_stage_model.transformer.text_model.text_projection"]  # fmt: skip
    kind = detect({**FILES["civitai_fp16_pruned"], **dict.fromkeys(names, ([3], "F32"))})
    assert kind.complete and kind.ignored.keys() == set(names) and all(kind.ignored.values())
    kind = detect({**FILES["civitai_fp16_pruned"], "embeding_manager.x": ([3], "F32")})
    assert kind.unknown == ("embeding_manager.x",)


def test_a_checkpoint_of_stable_diffusion_2_is_modelscope_s_vae():
    header = {**FILES["VQGAN_autoencoder.first_stage_model"], "betas": ([1000], "F32"),
              "model.diffusion_model.time_embed.0.weight": ([1280, 320], "F32"),
              "cond_stage_model.model.ln_final.weight": ([1024], "F32")}  # fmt: skip
    kind = detect(header)
    assert kind.complete and kind.components == ("vae",) and len(kind.ignored) == 3


def test_unknown_names_and_wrong_shapes():
    header = dict(FILES["mm_sd_v15"])
    name = "down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight"
    header[name.replace("weight", "wieght")] = header.pop(name)
    header[name.replace("in.weight", "out.bias")] = ([7], "F32")
    kind = detect(header)
    assert not kind.complete and len(kind.unknown) == len(kind.misshapen) == len(kind.missing) == 1
    assert kind.faults() == [
        f"1 missing: {name!r}",
        f"1 unknown: {name.replace('weight', 'wieght')!r} (nearest: {name!r})",
        f"1 of another shape: {name.replace('in.weight', 'out.bias')!r} is [7], not [320]",
    ]


def test_a_name_without_end_is_cut():
    kind = detect({**FILES["v2_lora"], "down_blocks." * 50_000: ([1], "F32")})
    assert len(kind.unknown) == 1 and len(kind.faults()[0]) < 200


@pytest.mark.parametrize("header, message", [
    ({}, "the file has no tensors"),
    ({"a": ([1], "F33")}, r"'a' has the unknown dtype 'F33' \(nearest: 'F32'\)"),
    ({"a": ([-1], "F32")}, "'a' has the impossible shape"),
    ({"lm_head.weight": ([1], "F32")}, "no known layout has names like 'lm_head.weight'; the file has 1 tensors"),
])  # fmt: skip
def test_what_is_nothing_known(header, message):
    with pytest.raises(ValueError, match=message):
        detect(header)


def test_broken_headers_end_in_one_line_or_a_verdict():
    """Names and shapes put together at random, of every file."""
    rng = random.Random(0)
    every = [(n, tuple(s), d) for header in FILES.values() for n, (s, d) in header.items()]
    for _ in range(20):
        header = {n: (s, d) for n, s, d in rng.sample(every, rng.choice([1, 5, 60]))}
        for name in rng.sample(list(header), len(header) // 3):
            shape = [rng.choice([0, 1, 2**40, *header[name][0]]) for _ in range(rng.choice([0, 1, 2, 5]))]
            header[name] = (tuple(shape), rng.choice(list(SIZES)))
        try:
            kind = detect(header)
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert kind.describe()
