"""The tables of the authors' layouts: exact, in both directions, bit by bit, and no row that never applies."""

import gzip
import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minit2v_convert import adapters, animatediff, configs, ldm, modelscope, shapes
from minit2v_convert.containers import unwrap
from minit2v_convert.detect import SIZES, detect
from minit2v_convert.formats import Step, from_diffusers, make, sinusoids, to_diffusers
from minit2v_convert.sparse import DTYPES
from minit2v_convert.table import Entry, authors_names, below, evaluate, fill_in, reason, write_out

DATA = Path(__file__).parents[1] / "data"
FILES = json.loads(gzip.decompress((DATA / "authors_files.json.gz").read_bytes()))
TABLES = json.loads(gzip.decompress((DATA / "tables.json.gz").read_bytes()))
NAMES = {dtype: name for name, dtype in DTYPES.items()}

State = dict[str, Tensor]

# ---------------------------------------------------------------------------------------------------------- the engine


def test_arithmetic_in_names():
    assert evaluate("n*i+j+1", {"n": 3, "i": "2", "j": "1"}) == 8
    assert evaluate("last-i", {"last": 3, "i": "1"}) == 2
    assert evaluate("n*i+n-1", {"n": 2, "i": "3"}) == 7
    assert evaluate("up[i]", {"up": (1, 3), "i": "1"}) == 3
    assert fill_in("a.{i}.{x,y}.{*}", {"i": "0", "rest": "b.c"}) == ("a.0.x.b.c", "a.0.y.b.c")


def test_rows_that_are_not_one_to_one_are_refused():
    with pytest.raises(ValueError, match="'b.1' and 'c.1' both become 'a.1'"):
        write_out([("a.{i}", "b.{i}"), ("a.{i}", "c.{i}")], ["b.1", "c.1"], {})
    with pytest.raises(ValueError, match="no row of the table matches 'z'"):
        write_out([("a", "b")], ["z"], {})
    with pytest.raises(ValueError, match=r"'a.in': no tensor for \['v'\]"):
        write_out([("a.in", "b.{q,k,v}")], ["b.q", "b.k"], {})


def test_below_and_reasons():
    assert below("a.", "b.", [("x", "y", 1), ("z", "z")]) == [("a.x", "b.y", 1), ("a.z", "b.z")]
    ignored = {"blocks.{last}.{*}": "the last one", "loss.{*}": "training"}
    assert reason(ignored, "blocks.3.a.b", {"last": 3}) == "the last one"
    assert reason(ignored, "blocks.2.a.b", {"last": 3}) is None
    assert authors_names([("a", "b")], "c", {}) is None


# ------------------------------------------------------------------------------- the sixteen tables, name for name

FORMATS = {
    "modelscope_unet_to_diffusers": (modelscope.UNETSD, None),
    "ldm_sd15_unet_to_diffusers": (ldm.UNET, None),
    "ldm_vae_to_diffusers_newnames": (ldm.AUTOENCODER, None),
    "openclip_vith_text_to_hf_modelscope": (modelscope.OPEN_CLIP, None),
    "animatediff_mm_v1_to_diffusers": (animatediff.MODULES, "v1"),
    "animatediff_mm_v2_to_diffusers": (animatediff.MODULES, "v2"),
    "animatediff_mm_v3_to_diffusers": (animatediff.MODULES, "v3"),
    "animatediff_mm_sdxl_to_diffusers": (animatediff.MODULES, "sdxl"),
    "animatediff_v2lora_to_peft": (animatediff.MOTION_LORA, "v2"),
    "animatediff_v3adapter_to_peft": (animatediff.DOMAIN_ADAPTER, None),
    "sparsectrl_rgb_to_diffusers": (animatediff.SPARSE_CONTROL, "rgb"),
    "sparsectrl_scribble_to_diffusers": (animatediff.SPARSE_CONTROL, "scribble"),
    "ipadapter_sd15_to_processors": (adapters.IP, "sd15"),
}


def entries_of(name: str) -> list[Entry]:
    fmt, version = FORMATS[name]
    return list(fmt.table(fmt.known[version or next(iter(fmt.known))]).entries)


@pytest.mark.parametrize("name", FORMATS)
def test_a_table_has_exactly_these_rows(name):
    fmt, version = FORMATS[name]
    config = fmt.known[version or next(iter(fmt.known))]
    rows = [row for row in TABLES[name] if row[1]]
    dropped = {row[0] for row in TABLES[name] if not row[1]}
    entries = entries_of(name)
    if fmt is adapters.IP:  # the facts' table is that of the numbers alone
        entries = [e for e in entries if not e.authors[0].startswith("image_proj.")]
    assert {e.authors[0]: list(e.diffusers) for e in entries} == {row[0]: row[1] for row in rows}
    ops = {"squeeze last dim": lambda e: e.ones == 1, "squeeze two": lambda e: e.ones == 2,
           "split dim 0 into 3": lambda e: len(e.diffusers) == 3}  # fmt: skip
    said = {row[0]: row[2] for row in rows}
    for e in entries:
        for start, holds in ops.items():
            assert holds(e) == said[e.authors[0]].startswith(start), e
    twins = {n for e in entries for n in e.authors[1:]}
    assert dropped == twins | {n for n in dropped if fmt.why_ignored(n, config)} and twins <= dropped


def test_the_old_names_of_the_vae():
    """authors' -> new names and old names -> new names, one after the other, are authors' -> old names."""
    old = {e.diffusers[0]: e.authors[0] for e in ldm.OLD_AUTOENCODER.table(configs.VAE).entries}
    got = {e.authors[0]: [old[e.diffusers[0]]] for e in ldm.AUTOENCODER.table(configs.VAE).entries}
    assert got == {row[0]: row[1] for row in TABLES["ldm_vae_to_diffusers_oldnames"]}


@pytest.mark.parametrize("name, prefix, layers", [
    ("kohya_unet_module_names_sd15", "lora_unet_", adapters.LORA_TARGETS["unet"]),
    ("kohya_te_module_names_sd15", "lora_te_", adapters.LORA_TARGETS["text_encoder"]),
])  # fmt: skip
def test_kohya_s_names(name, prefix, layers):
    rows = TABLES[name]
    assert adapters.kohya_stems(prefix, layers()) == {row[0]: row[1][0] for row in rows}
    kinds = {row[1][0]: row[2] for row in rows}
    assert {n: "Conv2d" if len(s) == 4 else "Linear" for n, s in layers().items()} == kinds
    for stem, module in adapters.kohya_stems(prefix, layers()).items():
        assert prefix + adapters.kohya_name(f"{module}.lora_A.weight") == f"{stem}.lora_down.weight"
        assert prefix + adapters.kohya_name(f"{module}.alpha") == f"{stem}.alpha"


def test_all_sixteen_tables_are_compared():
    others = {"ldm_vae_to_diffusers_oldnames", "kohya_unet_module_names_sd15", "kohya_te_module_names_sd15"}
    assert FORMATS.keys() | others == TABLES.keys() and len(TABLES) == 16


def test_no_row_is_idle():
    used: dict[int, tuple[list, set[int]]] = {}
    for name, (fmt, _) in FORMATS.items():
        used.setdefault(id(fmt), (list(fmt.rows), set()))[1].update(e.row for e in entries_of(name))
    for rows, seen in used.values():
        assert seen == set(range(len(rows))), [row for n, row in enumerate(rows) if n not in seen]
    for fmt in (ldm.OLD_AUTOENCODER, ldm.BARE_TEXT, animatediff.HUB_MOTION_LORA):
        config = next(iter(fmt.known.values()))
        assert {e.row for e in fmt.table(config).entries} == set(range(len(fmt.rows)))


def test_nothing_on_a_list_of_ignored_names_is_idle():
    """Of the templates for which there is an official file."""
    config = modelscope.OPEN_CLIP.known["OpenCLIP ViT-H/14"]
    whys = [modelscope.OPEN_CLIP.why_ignored(n, config) for n in FILES["open_clip_pytorch_model"]]
    assert set(whys) - {None} == set(modelscope.OPEN_CLIP.ignored.values())
    single = FILES["v1-5-pruned"]
    for template in {**ldm.BUFFERS, **ldm.COUNTERS, **ldm.AVERAGE}:
        assert any(reason({template: "x"}, n, {}) for n in single), template


def test_the_shapes_are_those_of_the_published_files(manifest):
    """Of all tensors of the official networks, computed from their configs."""
    for shape_of, config, name in [
        (shapes.unet3d, configs.UNET3D, "ms-1.7b/unet"),
        (shapes.unet2d, configs.UNET2D, "sd15/unet"),
        (shapes.vae, configs.VAE, "sd15/vae.fp16"),
        (shapes.clip_text, configs.CLIP_L, "sd15/text_encoder"),
        (shapes.clip_text, configs.CLIP_H, "ms-1.7b/text_encoder"),
        (shapes.motion_adapter, configs.MOTION, "adapter-v1-5-2/motion_adapter"),
        (shapes.motion_adapter, animatediff.MOTION_CONFIGS["v3"], "adapter-v1-5-3/motion_adapter"),
        (shapes.motion_adapter, animatediff.SDXL, "adapter-sdxl-beta/motion_adapter"),
    ]:
        assert shape_of(config) == {n: shape for n, (shape, _) in manifest(name).items()}, name
    for shape_of, config, name in [
        (shapes.sparse_control, animatediff.SPARSE_KNOWN["rgb"], "animatediff-sparsectrl-rgb"),
        (shapes.sparse_control, animatediff.SPARSE_KNOWN["scribble"], "animatediff-sparsectrl-scribble"),
        (shapes.clip_image, configs.CLIP_IMAGE, "image_encoder"),
    ]:
        assert shape_of(config) == {n: tuple(shape) for n, (shape, _) in FILES[name].items()}, name


def test_configs_are_the_published_ones(published_config):
    for config, repo, part in [
        (configs.UNET2D, "sd15", "unet"), (configs.UNET3D, "ms-1.7b", "unet"), (configs.VAE, "ms-1.7b", "vae"),
        (configs.CLIP_L, "sd15", "text_encoder"), (configs.CLIP_H, "ms-1.7b", "text_encoder"),
        (configs.MOTION, "adapter-v1-5-2", "motion_adapter"),
    ]:  # fmt: skip
        published = published_config(repo, part)
        differs = {n for n in config if n in published and config[n] != published[n]}
        assert not differs, (repo, part, differs)
        assert config.keys() - published.keys() <= {"downsample_padding", "mid_block_scale_factor"}


# --------------------------------------------------------------------------------- there and back, on official headers


def header_of(state: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tuple(x.shape), NAMES[x.dtype]) for name, x in state.items()}


def views(header: Mapping[str, tuple]) -> State:
    """Tensors of full size without memory, each with bits of its own."""
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {name: torch.tensor(n, dtype=ints[SIZES[dtype]]).view(DTYPES[dtype]).expand(tuple(shape))
            for n, (name, (shape, dtype)) in enumerate(header.items())}  # fmt: skip


def bits(x: Tensor) -> Tensor:
    return x.reshape(-1).view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if x.numel() > 100_000 and not any(x.stride()) and not any(y.stride()):  # one value over and over
        x, y = x.as_strided((1,), (0,)), y.as_strided((1,), (0,))
    return torch.equal(bits(x), bits(y))


def run(steps: tuple[Step, ...], states: Mapping[str, State]) -> State:
    out = {}
    for step in steps:
        out[step.name] = make(step, [states[step.component][n] for n in step.sources])
        assert tuple(out[step.name].shape) == step.shape and NAMES[out[step.name].dtype] == step.dtype, step
    assert len(out) == len(steps)
    return out


def there(state: State, **options) -> tuple[dict[str, State], dict[str, str]]:
    kind = detect(header_of(state))
    assert not kind.faults()
    plans = to_diffusers(kind, header_of(state), **options)
    ignored = {n: why for plan in plans.values() for n, why in plan.ignored.items()}
    sources = {n for plan in plans.values() for step in plan.steps for n in step.sources}
    assert sources | ignored.keys() == state.keys() and not sources & ignored.keys(), "every tensor is accounted for"
    return {component: run(plan.steps, {"": state}) for component, plan in plans.items()}, ignored


def back(parts: Mapping[str, State], layout: str = "authors", **options) -> dict[str, State]:
    files, _ = from_diffusers({c: header_of(state) for c, state in parts.items()}, layout, **options)
    return {file: run(plan.steps, parts) for file, plan in files.items()}


def assert_same(got: State, want: State):
    assert got.keys() == want.keys()
    assert not [n for n in want if not same(got[n], want[n])]


ROUND = {  # file: what it comes back as, and with which options
    "text2video_pytorch_model": ("text2video_pytorch_model.pth", {}),
    "mm_sd_v15": ("motion_module.ckpt", {}),
    "mm_sd_v15_v2": ("motion_module.ckpt", {}),
    "v3_sd15_mm": ("motion_module.ckpt", {}),
    "mm_sdxl_v10_beta": ("motion_module.ckpt", {}),
    "AnimateLCM_sd15_t2v": ("motion_module.ckpt", {"positions": False}),
    "v2_lora": ("motion_lora.ckpt", {}),
    "v3_sd15_adapter": ("domain_adapter.ckpt", {}),
}


@pytest.mark.parametrize("name", ROUND)
def test_authors_files_come_back(name):
    file, options = ROUND[name]
    state = views(FILES[name])
    for entry_twins in (n for n in state if n.endswith("attention_blocks.1.pos_encoder.pe")):
        state[entry_twins] = state[entry_twins.replace("blocks.1.pos", "blocks.0.pos")]
    parts, ignored = there(state)
    assert not ignored
    assert_same(back(parts, **options)[file], state)


@pytest.mark.parametrize("name, published", [
    ("text2video_pytorch_model", "ms-1.7b/unet"), ("mm_sd_v15_v2", "adapter-v1-5-2/motion_adapter"),
    ("v3_sd15_mm", "adapter-v1-5-3/motion_adapter"), ("mm_sdxl_v10_beta", "adapter-sdxl-beta/motion_adapter"),
    ("AnimateLCM_sd15_t2v", "animatelcm/motion_adapter"),
])  # fmt: skip
def test_what_is_written_is_the_published_file(name, published, manifest):
    (plan,) = to_diffusers(detect(FILES[name]), FILES[name]).values()
    assert {s.name: (s.shape, s.dtype) for s in plan.steps} == manifest(published)


def test_modelscope_s_three_files_and_a_folder(manifest):
    """The VAE comes back into a checkpoint's dictionary; OpenCLIP's file is not made up."""
    vae = views(FILES["VQGAN_autoencoder.first_stage_model"])
    unet = views(FILES["text2video_pytorch_model"])
    clip = views(FILES["open_clip_pytorch_model"])
    (unet_part,), (vae_part,), (text_part,) = ([*there(x)[0].values()] for x in (unet, vae, clip))
    folder = {"unet": unet_part, "vae": vae_part, "text_encoder": text_part}
    want = manifest("ms-1.7b/text_encoder")
    want.pop(shapes.POSITION_IDS)  # OpenCLIP has none
    assert header_of(text_part) == want
    files = back(folder)
    assert files.keys() == {"text2video_pytorch_model.pth", "VQGAN_autoencoder.pth"}
    assert_same(files["text2video_pytorch_model.pth"], unet)
    assert_same(files["VQGAN_autoencoder.pth"], vae)
    plans, omitted = from_diffusers({c: header_of(x) for c, x in folder.items()}, "authors")
    assert plans["VQGAN_autoencoder.pth"].nest == ("state_dict",)
    assert "keep the authors' file" in omitted["text_encoder"]
    with pytest.raises(ValueError, match="^it: open_clip_pytorch_model.bin cannot be made from"):
        from_diffusers({"": header_of(text_part)}, "authors")
    with pytest.raises(ValueError, match="cannot be part of a single file"):
        from_diffusers({"unet": header_of(unet_part)}, "single-file")


def test_all_of_open_clip_is_mapped_or_ignored_and_its_rows_are_right():
    state = views(FILES["open_clip_pytorch_model"])
    parts, ignored = there(state)
    assert len(ignored) == 392 + 12 + 2
    for name in state.keys() - ignored.keys():
        if "in_proj" in name:
            _, i, leaf = name.split("resblocks.")[0], name.split(".")[2], name.rsplit("_", 1)[1]
            for x in "qkv":
                diffusers = parts["text_encoder"][f"text_model.encoder.layers.{i}.self_attn.{x}_proj.{leaf}"]
                assert same(diffusers, state[name][:1024]), name


@pytest.mark.parametrize("name", ["civitai_fp16_pruned", "v1-5-pruned-emaonly", "v1-5-pruned"])
def test_single_files_come_back(name, manifest):
    state = views(FILES[name])
    parts, ignored = there(state)
    assert len(ignored) == {"civitai_fp16_pruned": 0, "v1-5-pruned-emaonly": 14, "v1-5-pruned": 700}[name]
    fp16 = ".fp16" if name.startswith("civitai") else ""
    assert header_of(parts["unet"]) == manifest(f"sd15/unet{fp16}")
    assert header_of(parts["text_encoder"]) == manifest(f"sd15/text_encoder{fp16}")
    if fp16:
        assert header_of(parts["vae"]) == manifest("sd15/vae.fp16")
    want = {n: x for n, x in state.items() if n not in ignored}
    assert_same(back(parts, "single-file")["model.safetensors"], want)
    assert_same(back(parts, "authors")["model.safetensors"], want)


def test_the_moving_average():
    state = views(FILES["v1-5-pruned"])
    parts, ignored = there(state, ema=True)
    for name, x in parts["unet"].items():
        assert same(x, state["model_ema.diffusion_model" + to_ldm(name).replace(".", "")]), name
    assert ignored["model.diffusion_model.out.2.bias"].startswith("the moving average") and len(ignored) == 14 + 686
    with pytest.raises(ValueError, match="no complete moving average; 0 tensors of one are in it"):
        there(views(FILES["v1-5-pruned-emaonly"]), ema=True)
    with pytest.raises(ValueError, match="no complete moving average"):
        there(views(FILES["mm_sd_v15"]), ema=True)


def to_ldm(name: str) -> str:
    (row,) = (row[0] for row in TABLES["ldm_sd15_unet_to_diffusers"] if row[1] == [name])
    return row


@pytest.mark.parametrize("name", ["sd15/vae", "sd15/vae.fp16"])
def test_a_lone_vae_of_either_naming(name, manifest):
    state = views(manifest(name))
    authors = back({"vae": state})["vae.ckpt"]
    want = FILES["VQGAN_autoencoder.first_stage_model"]
    assert {n: s for n, (s, _) in header_of(authors).items()} == {
        n.removeprefix("first_stage_model."): tuple(s) for n, (s, _) in want.items()}  # fmt: skip
    parts, ignored = there({**authors, "loss.discriminator.main.0.weight": torch.zeros(3)})
    assert list(ignored) == ["loss.discriminator.main.0.weight"]
    assert header_of(parts["vae"]) == {
        **manifest("sd15/vae.fp16"), **{n: (s, NAMES[x.dtype]) for n, x in parts["vae"].items() for s in [x.shape]}}
    assert_same(back(parts)["vae.ckpt"], authors)


def test_linear_layers_that_some_authors_already_have():
    """Both forms of a linear layer are read; the convolution is written."""
    state = views(FILES["text2video_pytorch_model"])
    mixed = {n: x[..., 0] if n == "input_blocks.1.2.proj_in.weight" else x for n, x in state.items()}
    assert_same(back(there(mixed)[0])["text2video_pytorch_model.pth"], state)


def test_the_trainer_s_checkpoint(manifest):
    """Both networks come out of it. Behind `module.`, in two dictionaries, with counters beside."""
    motion, image = views(FILES["v3_sd15_mm"]), views(manifest("sd15/unet"))
    for n in motion:
        if n.endswith("attention_blocks.1.pos_encoder.pe"):
            motion[n] = motion[n.replace("blocks.1.pos", "blocks.0.pos")]
    content = {"epoch": 3, "global_step": 7, "state_dict": {f"module.{n}": x for n, x in {**motion, **image}.items()}}
    contents = unwrap(content)
    assert contents.path == ("state_dict",) and contents.ignored.keys() == {"epoch", "global_step"}
    parts, ignored = there(contents.tensors)
    assert parts.keys() == {"motion_adapter", "unet"} and not ignored
    assert_same(parts["unet"], image)
    assert_same(back({"motion_adapter": parts["motion_adapter"]})["motion_module.ckpt"], motion)


@pytest.mark.parametrize("name", ["animatediff-motion-lora", "animatediff-motion-lora-v1-5-3"])
def test_loras_of_the_hub_and_of_peft(name):
    """unet....processor.to_q_lora.down -> unet....to_q.lora_A -> the authors' names -> the same again."""
    state = views(FILES[name])
    parts, _ = there(state)
    assert all(n.startswith("unet.") and ".lora_" in n for n in parts["lora"]) and len(parts["lora"]) == len(state)
    again, _ = there(parts["lora"])
    assert_same(again["lora"], parts["lora"])
    file = "motion_lora.ckpt" if "v1-5-3" not in name else "domain_adapter.ckpt"
    authors = back(parts)[file]
    assert authors.keys() == FILES["v2_lora" if file == "motion_lora.ckpt" else "v3_sd15_adapter"].keys()
    assert_same(back({"": state})[file], authors)
    assert_same(there(authors)[0]["lora"], parts["lora"])


def test_kohya_s_lora_in_peft_s_names():
    parts, _ = there(views(FILES["AnimateLCM_sd15_t2v_lora"]))
    assert len(parts["lora"]) == 834
    assert parts["lora"]["unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"].shape == (64, 320, 1, 1)
    assert parts["lora"]["unet.mid_block.resnets.1.conv2.alpha"].shape == ()
    assert_same(there(parts["lora"])[0]["lora"], parts["lora"])
    with pytest.raises(ValueError, match="has no file of its own in the authors' layout"):
        back(parts)


@pytest.mark.parametrize("name", ["ip-adapter_sd15", "v3_sd15_sparsectrl_rgb"])
def test_what_is_only_recognised_is_refused(name):
    with pytest.raises(ValueError, match="recognised, but not converted"):
        to_diffusers(detect(FILES[name]), FILES[name])


# ------------------------------------------------------------------------------------------ there and back, small, real

UNET = {"block_out_channels": [8, 16, 24], "cross_attention_dim": 12, "in_channels": 5, "out_channels": 3}
SMALL = {
    "unet3d": (shapes.unet3d, {
        **configs.UNET3D, **UNET, "layers_per_block": 1, "attention_head_dim": 2,
        "down_block_types": ["DownBlock3D", "CrossAttnDownBlock3D", "CrossAttnDownBlock3D"],
        "up_block_types": ["CrossAttnUpBlock3D", "CrossAttnUpBlock3D", "UpBlock3D"]}),
    "unet2d": (shapes.unet2d, {
        **configs.UNET2D, **UNET, "layers_per_block": 3,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"]}),
    "vae": (shapes.vae, {
        **configs.VAE, "block_out_channels": [4, 8, 12], "layers_per_block": 1, "latent_channels": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}),
    "motion": (shapes.motion_adapter, {
        **configs.MOTION, "block_out_channels": [8, 12], "motion_layers_per_block": 1, "motion_max_seq_length": 5}),
    "lora": (shapes.motion_lora, {
        **configs.MOTION, "block_out_channels": [8, 12], "motion_layers_per_block": 1, "rank": 3}),
}  # fmt: skip


def random_state(shapes_: shapes.Shapes, dtype: torch.dtype, seed: int = 0) -> State:
    """Any bits at all, NaN and infinity among them."""
    generator = torch.Generator().manual_seed(seed)
    size = dtype.itemsize

    def one(shape: shapes.Shape) -> Tensor:
        return torch.randint(256, (math.prod(shape) * size,), generator=generator, dtype=torch.uint8)

    return {n: one(s).view(dtype).reshape(s) for n, s in shapes_.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SMALL)
def test_small_networks_of_random_bits(name, dtype):
    """diffusers -> authors -> diffusers, of networks with other depths and widths than the official ones."""
    shapes_of, config = SMALL[name]
    state = random_state(shapes_of(config), dtype)
    if name == "lora":
        state = {f"unet.{n}": x for n, x in state.items()}
    (authors,) = back({"": state}).values()
    assert name == "unet2d" or authors.keys() != state.keys()
    kind = detect(header_of(authors))
    (plan,) = to_diffusers(kind, header_of(authors)).values()
    assert plan.config is None or {k: v for k, v in plan.config.items() if config.get(k, v) != v} == {}
    parts, ignored = there(authors)
    (diffusers,) = parts.values()
    assert_same(diffusers, state)
    assert not ignored
    (again,) = back({"": diffusers}).values()
    assert_same(again, authors)


def test_rows_of_a_small_open_clip():
    """Against the definition of nn.MultiheadAttention: its one matrix is q above k above v."""
    dim, layers = 64, 3
    state = {"positional_embedding": torch.rand(7, dim), "token_embedding.weight": torch.rand(11, dim),
             "ln_final.weight": torch.rand(dim), "ln_final.bias": torch.rand(dim), "logit_scale": torch.tensor(1.0),
             "text_projection": torch.rand(dim, dim), "visual.proj": torch.rand(3)}  # fmt: skip
    for i in range(layers):
        attention = torch.nn.MultiheadAttention(dim, 1)
        torch.nn.init.normal_(attention.in_proj_bias)
        for n, x in attention.state_dict().items():
            state[f"transformer.resblocks.{i}.attn.{n}"] = x
        for n, s in {"ln_1": (dim,), "ln_2": (dim,), "mlp.c_fc": (96, dim), "mlp.c_proj": (dim, 96)}.items():
            state[f"transformer.resblocks.{i}.{n}.weight"] = torch.rand(s)
            state[f"transformer.resblocks.{i}.{n}.bias"] = torch.rand(s[0])
    parts, ignored = there(state)
    text = parts["text_encoder"]
    assert len({n.split(".")[3] for n in text if ".layers." in n}) == layers - 1
    assert sum("resblocks.2." in n for n in ignored) == 12
    for p in ("weight", "bias"):
        want = state[f"transformer.resblocks.1.attn.in_proj_{p}"]
        got = [text[f"text_model.encoder.layers.1.self_attn.{x}_proj.{p}"] for x in "qkv"]
        assert torch.equal(torch.cat(got), want)
    config = to_diffusers(detect(header_of(state)), header_of(state))["text_encoder"].config
    assert (config["num_hidden_layers"], config["hidden_act"], config["vocab_size"]) == (2, "gelu", 11)


def test_the_copies_of_the_positions_must_be_copies():
    state = random_state(shapes.motion_adapter(SMALL["motion"][1]), torch.float32)
    authors = back({"": state})["motion_module.ckpt"]
    twin = next(n for n in authors if n.endswith("attention_blocks.1.pos_encoder.pe"))
    authors[twin] = authors[twin] + 1
    with pytest.raises(ValueError, match="must be equal, because only one can be kept"):
        there(authors)


def test_positions_that_an_authors_file_lacks_are_computed():
    """pe[p, 2i] = sin(p / 10000^(2i/C)), pe[p, 2i+1] = cos(the same)."""
    parts, _ = there(views(FILES["AnimateLCM_sd15_t2v"]))
    pe = parts["motion_adapter"]["down_blocks.0.motion_modules.0.transformer_blocks.0.pos_embed.pe"]
    p, i = torch.arange(32.0).double()[:, None], torch.arange(160.0).double()
    angle = p / 10000 ** (2 * i / 320)
    want = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[None]
    assert pe.shape == (1, 32, 320) and torch.allclose(pe.double(), want, atol=1e-5)
    assert sinusoids(5, 8).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------- strictness


@pytest.mark.parametrize("change, message", [
    (lambda h: h.pop("out.2.bias"), "1 missing: 'out.2.bias'"),
    (lambda h: h.update({"out.2.bais": h.pop("out.2.bias")}), r"1 unknown: 'out.2.bais' \(nearest: 'out.2.bias'\)"),
    (lambda h: h.update({"out.2.bias": ([5], "F32")}), r"1 of another shape: 'out.2.bias' is \[5\], not \[4\]"),
    (lambda h: h.update({"out.2.bias": ([4], "I8")}), "'out.2.bias' is I8, but only weights in F64, F32, F16, BF16"),
    (lambda h: [h.pop(n) for n in list(h) if "input_blocks.5." in n], "missing: 'input_blocks.5.0.in_layers.0.weight'"),
    (lambda h: h.update({"input_blocks.3.op.weight": ([640, 320, 3, 3], "F32")}), r"is \[640, 320, 3, 3\], not \[320"),
    (lambda h: h.update({"input_blocks.1.2.proj_in.weight": ([320, 320, 3], "F32")}), r"\[320, 320, 3\], not \[320, 3"),
])  # fmt: skip
def test_a_file_that_is_not_quite_right_is_refused_in_one_line(change, message):
    header = dict(FILES["text2video_pytorch_model"])
    change(header)
    with pytest.raises(ValueError, match=message) as error:
        to_diffusers(detect(header), header)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_position_ids_in_another_dtype_are_left_behind():
    header = dict(FILES["civitai_fp16_pruned"])
    name = "cond_stage_model.transformer." + shapes.POSITION_IDS
    header[name] = ([1, 77], "F16")
    plans = to_diffusers(detect(header), header)
    assert plans["text_encoder"].ignored == {name: "only useful in I64, because other dtypes round it"}
    assert shapes.POSITION_IDS not in {s.name for s in plans["text_encoder"].steps}


def test_a_merge_without_the_first_level_of_the_text_encoder():
    level = "cond_stage_model.transformer."
    header = {n.replace(level + "text_model.", level): x for n, x in FILES["civitai_fp16_pruned"].items()}
    plans = to_diffusers(detect(header), header)
    assert {s.name for s in plans["text_encoder"].steps} == shapes.clip_text(configs.CLIP_L).keys()


def test_from_diffusers_wants_what_diffusers_writes(manifest):
    with pytest.raises(ValueError, match=r"no layout 'author' \(nearest: 'authors'\)"):
        from_diffusers({}, "author")
    with pytest.raises(ValueError, match="unet is ModelScope's UNetSD .authors., not in the layout of diffusers"):
        from_diffusers({"unet": FILES["text2video_pytorch_model"]}, "authors")
    broken = manifest("sd15/unet")
    broken.pop("conv_in.bias")
    with pytest.raises(ValueError, match="1 missing: 'conv_in.bias'"):
        from_diffusers({"unet": broken}, "single-file")


def test_a_dry_run_can_be_read():
    plan = to_diffusers(detect(FILES["open_clip_pytorch_model"]), FILES["open_clip_pytorch_model"])["text_encoder"]
    lines = [str(step) for step in plan.steps]
    assert ("transformer.resblocks.0.attn.in_proj_bias -> text_model.encoder.layers.0.self_attn.k_proj.bias [1024] "
            "(rows, part 2 of 3)") in lines  # fmt: skip
    assert "ln_final.bias -> text_model.final_layer_norm.bias [1024]" in lines


# ---------------------------------------------------------------------------------------------------------- containers


def test_dictionaries_around_tensors():
    x = torch.zeros(1)
    assert unwrap({"state_dict": {"module": {"a": x}}}).path == ("state_dict", "module")
    contents = unwrap({"state_dict": {"a": x}, "optimizer_states": [1], "animatediff_config": {}})
    assert contents.tensors == {"a": x} and contents.ignored.keys() == {"optimizer_states", "animatediff_config"}
    contents = unwrap({"image_proj": {"norm.weight": x}, "ip_adapter": {"1.to_k_ip.weight": x}})
    assert contents.tensors.keys() == {"image_proj.norm.weight", "ip_adapter.1.to_k_ip.weight"} and not contents.path
    assert unwrap({"controlnet": {"a": x}}).path == ("controlnet",)


@pytest.mark.parametrize("content, message", [
    ([1], "it is a list, not tensors by name"),
    ({"state_dict": {"a": 3}}, "'state_dict.a' is an unknown int"),
    ({"epochs": 3}, r"'epochs' is an unknown int \(nearest: 'epoch'\)"),
    ({"ip_adapter": {"a": 3}}, "'ip_adapter.a' is a int, not a tensor"),
    ({3: torch.zeros(1)}, "a tensor has the name 3, which is not text"),
])  # fmt: skip
def test_other_contents_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        unwrap(content)


def test_dictionaries_without_end():
    loop: dict = {}
    loop["state_dict"] = loop
    with pytest.raises(ValueError, match="too many nested"):
        unwrap(loop)
