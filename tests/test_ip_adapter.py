"""IP-Adapters: what they take, give and refuse, and that the pipeline is as before without them."""

import contextlib
import copy
import gzip
import json
import logging
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file

from minit2v import (
    AnimateDiffPipeline,
    AnimateDiffVideoToVideoPipeline,
    CLIPVisionModelWithProjection,
    DDIMScheduler,
    DiffusionPipeline,
    IPAdapterMaskProcessor,
    MotionAdapter,
    UNetMotionModel,
    attention_maps,
    fast,
)
from minit2v.adapters import ip_adapter
from minit2v.files.weights import Weightless
from minit2v.models.image_prompt import ImageAttention
from minit2v.models.layers import Attention
from minit2v.pipelines.memory import Offload
from minit2v_convert.sparse import write_sparse_bin, write_sparse_safetensors

MANIFESTS = json.loads(gzip.decompress((Path(__file__).parent / "data/ip_adapter_manifests.json.gz").read_bytes()))
CALL = dict(num_frames=3, num_inference_steps=2, height=16, width=24, output_type="latent")
KINDS = ("base", "plus", "full-face")


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_official_folder, make_adapter_folder):
    folder = tmp_path_factory.mktemp("base")
    base = make_official_folder(folder / "sd15", repo="sd15", small=True)
    adapter = MotionAdapter.from_pretrained(make_adapter_folder(folder, "v1-5-2"))
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1)
    pipe = AnimateDiffPipeline.from_pretrained(base, motion_adapter=adapter, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(made):
    return copy.deepcopy(made)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_ip_adapter):
    folder = tmp_path_factory.mktemp("h94") / "models"
    for seed, kind in enumerate(KINDS):
        make_ip_adapter(folder, kind, seed)
    return folder


def file_of(folder, kind="base"):
    return folder / f"ip-adapter-{kind}_sd15.safetensors"


def picture(seed=0, width=40, height=33):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def video(pipe, seed=0, **call):
    return pipe(**{"prompt": "a cat", **CALL, **call}, generator=torch.Generator().manual_seed(seed)).frames


def assert_close(got, want, bound=2e-4):
    torch.testing.assert_close(got, want, rtol=0, atol=bound * want.abs().max().item())


def differ(a, b):
    return (a - b).abs().max() > 1e-2 * a.abs().max()


def refused(call, *errors, match=None):
    with pytest.raises(errors or ValueError, match=match) as info:
        call()
    assert "\n" not in str(info.value) and len(str(info.value)) < 800
    return str(info.value)


# Without a picture -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fast", "optimized", "written"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_without_a_picture_is_the_call_from_before(pipe, folder, kind, how):
    {"fast": lambda: None, "optimized": pipe.optimize, "written": pipe.restore}[how]()
    before, names = video(pipe), list(pipe.unet.state_dict())
    pipe.load_ip_adapter(file_of(folder, kind))
    assert torch.equal(video(pipe), before)
    shown = video(pipe, ip_adapter_image=picture())
    assert differ(shown, before)
    pipe.set_ip_adapter_scale(0)
    assert torch.equal(video(pipe, ip_adapter_image=picture()), before)
    pipe.set_ip_adapter_scale(1)
    assert torch.equal(video(pipe, ip_adapter_image=picture()), shown)
    pipe.unload_ip_adapter()
    assert torch.equal(video(pipe), before) and list(pipe.unet.state_dict()) == names
    assert pipe.image_encoder is None and {type(a) for a in ip_adapter.attentions(pipe.unet)} == {Attention}


def test_the_names_of_the_base_network_stay(pipe, folder):
    before = set(pipe.unet.state_dict())
    pipe.load_ip_adapter(file_of(folder))
    added = set(pipe.unet.state_dict()) - before
    assert before < set(pipe.unet.state_dict())
    assert {n for n in added if ".to_k_ip." not in n and ".to_v_ip." not in n} == {
        f"image_projections.0.{n}" for n in ("proj.weight", "proj.bias", "norm.weight", "norm.bias")}  # fmt: skip


# What is shown -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_for_each_frame(pipe, folder, kind):
    pipe.load_ip_adapter(file_of(folder, kind))
    one = video(pipe, ip_adapter_image=picture())
    assert_close(video(pipe, ip_adapter_image=[[[picture()] * 3]]), one)
    moving = video(pipe, ip_adapter_image=[[[picture(0), picture(1), picture(2)]]])
    assert differ(moving, one)
    embeds = pipe.prepare_ip_adapter_image_embeds([[[picture(0), picture(1), picture(2)], picture(3)]])
    assert embeds[0].shape == (2, 3, 2, *((17, 40) if kind != "base" else (20,)))
    assert differ(video(pipe, ip_adapter_image_embeds=embeds), moving)
    mixed = video(pipe, ip_adapter_image=[[[picture(0), picture(1), picture(2)], picture(3)]])
    assert torch.equal(video(pipe, ip_adapter_image_embeds=embeds), mixed)
    refused(lambda: video(pipe, ip_adapter_image=[[[picture()] * 2]]), match="pictures for 2 frames, .* has 3")
    refused(lambda: video(pipe, ip_adapter_image=[[[picture()] * 2, [picture()] * 3]]), match="for 2 and for 3 frames")


def test_a_frame_s_picture_reaches_that_frame_alone(pipe, folder):
    """One attention by itself: what frame 1 is shown changes frame 1."""
    pipe.load_ip_adapter(file_of(folder))
    attention = ip_adapter.attentions(pipe.unet)[0]
    g = torch.Generator().manual_seed(0)
    x, text, tokens = (torch.randn(s, generator=g) for s in ((1, 3 * 24, 32), (1, 7, 24), (1, 3, 1, 4, 24)))
    before = attention(x, ip_adapter.Prompt(text, [tokens]).flat(text, 1, 3, 24)).view(3, 24, 32)
    tokens[0, 1] += 1
    after = attention(x, ip_adapter.Prompt(text, [tokens]).flat(text, 1, 3, 24)).view(3, 24, 32)
    assert torch.equal(before[[0, 2]], after[[0, 2]]) and differ(before[1], after[1])


@pytest.mark.parametrize("per_call", [1, 2])
def test_pictures_in_context_windows(pipe, folder, per_call):
    """Each window is shown the pictures of its frames, also where several windows are predicted at once."""
    pipe.load_ip_adapter(file_of(folder))
    call = dict(num_frames=6)
    pipe.enable_context_windows(3, overlap=1, per_call=per_call)
    one = video(pipe, ip_adapter_image=picture(), **call)
    assert_close(video(pipe, ip_adapter_image=[[[picture()] * 6]], **call), one)
    seen = []
    windowed = copy.deepcopy(pipe)
    windowed.unet.register_forward_pre_hook(lambda m, args: seen.append(args[2]))
    pictures = [picture(n) for n in range(6)]
    moving = video(windowed, ip_adapter_image=[[pictures]], prompt={0: "a cat", 5: "a dog"}, **call)
    assert differ(moving, one)
    assert {len(x.images[0]) for x in seen} <= {2, 2 * per_call} and {x.images[0].shape[1] for x in seen} == {3}
    features = pipe.prepare_ip_adapter_image_embeds([[pictures]])[0]
    tokens = ip_adapter.projections(pipe.unet)[0](features[1].flatten(0, 1))  # of the half with pictures
    for context, window in zip(seen, ([0, 1, 2], [2, 3, 4], [3, 4, 5])[:1], strict=False):
        assert_close(context.images[0][1, :, 0], tokens.view(6, *tokens.shape[-2:])[window])


def test_several_pictures_stand_in_any_order(pipe, folder):
    pipe.load_ip_adapter(file_of(folder, "plus"))
    a, b = picture(0), picture(1, 20, 60)
    assert_close(video(pipe, ip_adapter_image=[[a, b]]), video(pipe, ip_adapter_image=[[b, a]]))
    assert_close(video(pipe, ip_adapter_image=[[a, a]]), video(pipe, ip_adapter_image=a))
    assert differ(video(pipe, ip_adapter_image=[[a, b]]), video(pipe, ip_adapter_image=a))


def test_a_batch_sees_the_same_and_each_video_is_by_itself(pipe, folder):
    pipe.load_ip_adapter(file_of(folder, "plus"))
    generators = [torch.Generator().manual_seed(s) for s in range(4)]
    both = pipe(["a cat", "dog"], **CALL, num_videos_per_prompt=2, generator=generators, ip_adapter_image=picture())
    for k, prompt in enumerate(["a cat", "a cat", "dog", "dog"]):
        assert_close(both.frames[k : k + 1], video(pipe, k, prompt=prompt, ip_adapter_image=picture()))


def test_masks(pipe, folder):
    pipe.load_ip_adapter(file_of(folder))
    plain, shown = video(pipe), video(pipe, ip_adapter_image=picture())

    def masked(*masks, pictures=None):
        masks = {"ip_adapter_masks": list(masks)}
        return video(pipe, ip_adapter_image=pictures or picture(), cross_attention_kwargs=masks)

    assert_close(masked(torch.ones(1, 1, 16, 24)), shown)
    assert torch.equal(masked(None), shown)
    assert_close(masked(torch.zeros(1, 1, 8, 8)), plain)
    left = torch.zeros(1, 1, 16, 24)
    left[..., :12] = 1
    assert differ(masked(left), shown) and differ(masked(left), plain)
    two = torch.cat([left, 1 - left], 1)
    assert_close(masked(two, pictures=[[picture()] * 2]), shown, 0.05)  # bicubic edges do not add up to one to the bit
    by_frame = [[[picture(k) for k in range(3)]]]
    assert_close(masked(torch.ones(1, 1, 16, 24), pictures=by_frame), video(pipe, ip_adapter_image=by_frame))
    pipe.set_ip_adapter_scale([[0.5, 0.0]])
    refused(lambda: video(pipe, ip_adapter_image=[[picture()] * 2]), match="for each of 2 pictures, but no masks")
    half = masked(two, pictures=[[picture(), picture(1)]])
    pipe.set_ip_adapter_scale(0.5)
    assert_close(masked(left), half)


@pytest.mark.parametrize("size", [(8, 12), (7, 5), (1, 3), (64, 64), (33, 17)])
def test_masks_are_laid_on_the_grid_of_each_level(made, size):
    x = torch.zeros(2, 4, 1, *size)
    seen = []
    hooks = [a.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
             for a in ip_adapter.attentions(made.unet)]  # fmt: skip
    with torch.no_grad():
        made.unet(x, 3, torch.zeros(2, 5, 24))
    for hook in hooks:
        hook.remove()
    fitted = ip_adapter.fit_mask(torch.rand(1, 3, 40, 40), *size, made.unet)
    assert len(seen) == 4 and set(seen) <= set(fitted) and all(m.shape == (3, p) for p, m in fitted.items())


def test_the_mask_processor():
    halves = np.zeros((33, 50), dtype=np.uint8)
    halves[:, 25:] = 130
    masks = IPAdapterMaskProcessor().preprocess([Image.fromarray(halves), halves])
    assert masks.shape == (2, 1, 32, 48) and set(masks.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(masks[0], masks[1]) and masks[0, 0, :, :20].sum() == 0 == (1 - masks[0, 0, :, 28:]).sum()
    assert IPAdapterMaskProcessor().preprocess(picture(), height=16, width=24).shape == (1, 1, 16, 24)
    for bad in ([], "mask.png", [torch.ones(8, 8)], picture(0, 7, 40)):
        refused(lambda bad=bad: IPAdapterMaskProcessor().preprocess(bad))


# Scales -----------------------------------------------------------------------------------------------------------


def places(*counts):
    """Of a U with so many attentions per block: down.0 and down.1, up.1 and up.2 (up.0 has none), mid."""
    blocks = [("down", 0), ("down", 1), ("up", 1), ("up", 2), ("mid", 0)]
    return [ip_adapter.Place(*block, j, None) for block, n in zip(blocks, counts, strict=True) for j in range(n)]


@pytest.mark.parametrize(
    ("scale", "want"),
    [
        (0.5, [0.5] * 9),
        ({}, [0] * 9),
        ({"mid": 2}, [0] * 8 + [2]),
        ({"mid": [2]}, [0] * 8 + [2]),
        ({"down": 1}, [1, 1, 1] + [0] * 6),
        ({"down": {"block_1": [0.1, 0.2]}, "mid": 3}, [0, 0.1, 0.2] + [0] * 5 + [3]),
        ({"up": {"block_1": [1, 2, 3], "block_2": [4]}}, [0, 0, 0, 1, 2, 3, 4, 4, 0]),
        ({"up": {"block_2": [[0.7, 0.3]]}}, [0] * 6 + [(0.7, 0.3)] * 2 + [0]),
        ([0.7, 0.3], [(0.7, 0.3)] * 9),
        ({"up": {"block_1": -1}, "down": {}}, [0, 0, 0, -1, -1, -1, 0, 0, 0]),
    ],
)
def test_the_scale_of_each_attention(scale, want):
    assert ip_adapter.expand(scale, places(1, 2, 3, 2, 1)) == want


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (None, "finite number, not None"),
        (True, "finite number, not True"),
        ("1", "finite number, not '1'"),
        (math.nan, "finite number, not nan"),
        ([1.0, math.inf], "2 scales for 1"),
        ([[1.0, "x"]], "finite number, not 'x'"),
        ([], "0 scales for 1 IP-Adapters"),
        ([0.5, 0.5], "2 scales for 1 IP-Adapters"),
        ({"dwon": 1}, "down, mid, up, not 'dwon' .nearest: 'down'"),
        ({"down": {"blok_0": 1}}, "'down' has block_0 .* not 'blok_0' .nearest: 'block_0'"),
        ({"down": {"block_1": 1}}, "'down' has block_0 with attention to the text, not 'block_1'"),
        ({"up": {"block_0": 1}}, "'up' has block_1 with"),
        ({"up": {"block_1": [1, 2, 3]}}, "'up', block_1 has 2 attentions, but 3 scales"),
        ({"up": {"block_1": []}}, "has 2 attentions, but 0 scales"),
        ({"mid": {"block_0": 1}}, "'mid' has no blocks"),
        ({"mid": "big"}, "finite number, not 'big'"),
    ],
)
def test_scales_that_fit_nothing_change_nothing(pipe, folder, scale, says):
    refused(lambda: pipe.set_ip_adapter_scale(1.0), match="no IP-Adapter is loaded")
    pipe.load_ip_adapter(file_of(folder))
    pipe.set_ip_adapter_scale({"down": 0.25, "mid": 0.5, "up": 2})
    refused(lambda: pipe.set_ip_adapter_scale(scale), match=says)
    assert [a.scales for a in ip_adapter.attentions(pipe.unet)] == [(0.25,), (2.0,), (2.0,), (0.5,)]


# Files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def want(made, folder):
    pipe = copy.deepcopy(made)
    pipe.load_ip_adapter(str(folder.parent), "models", file_of(folder).name)
    return video(pipe, ip_adapter_image=picture())


def nested(path):
    flat = load_file(path)
    return {part: {n.removeprefix(f"{part}."): x for n, x in flat.items() if n.startswith(f"{part}.")}
            for part in ("image_proj", "ip_adapter")}  # fmt: skip


@pytest.mark.parametrize("form", ["keywords", "slash", "file", "bin", "alone in a folder", "path", "one element"])
def test_every_form_of_a_file(pipe, folder, tmp_path, want, form):
    name, root = file_of(folder).name, folder.parent
    if form in ("bin", "alone in a folder"):
        (tmp_path / "image_encoder").symlink_to(folder / "image_encoder")
        torch.save(nested(file_of(folder)), tmp_path / "ip.bin")
    {
        "keywords": lambda: pipe.load_ip_adapter(root, subfolder="models", weight_name=name),
        "slash": lambda: pipe.load_ip_adapter(root, weight_name=f"models/{name}"),
        "file": lambda: pipe.load_ip_adapter(str(file_of(folder))),
        "path": lambda: pipe.load_ip_adapter(folder, weight_name=name, image_encoder_folder="image_encoder"),
        "bin": lambda: pipe.load_ip_adapter(tmp_path / "ip.bin"),
        "alone in a folder": lambda: pipe.load_ip_adapter(str(tmp_path)),
        "one element": lambda: pipe.load_ip_adapter([root], ["models"], [name]),
    }[form]()
    assert torch.equal(video(pipe, ip_adapter_image=picture()), want)


@pytest.mark.parametrize("flat", [True, False])
def test_a_dictionary_of_tensors(pipe, folder, want, flat):
    state = load_file(file_of(folder)) if flat else nested(file_of(folder))
    before = copy.deepcopy(state)
    pipe.image_encoder = CLIPVisionModelWithProjection.from_pretrained(folder, subfolder="image_encoder")
    pipe.load_ip_adapter(state)
    assert torch.equal(video(pipe, ip_adapter_image=picture()), want)
    pipe.to(torch.float64)
    x, y = ((s if flat else s["ip_adapter"])["ip_adapter." * flat + "1.to_k_ip.weight"] for s in (state, before))
    assert torch.equal(x, y) and x.dtype == torch.float32


def test_several_adapters_and_again(pipe, folder, want):
    names = [file_of(folder, kind).name for kind in KINDS]
    pipe.load_ip_adapter(str(folder.parent), subfolder="models", weight_name=names)
    pipe.set_ip_adapter_scale([1.0, 0.0, 0.0])
    assert torch.equal(video(pipe, ip_adapter_image=[picture()] * 3), want)
    pipe.set_ip_adapter_scale([1.0, 0.7, {"mid": -1}])
    assert differ(video(pipe, ip_adapter_image=[picture()] * 3), want)
    encoder = pipe.image_encoder
    pipe.load_ip_adapter(file_of(folder))
    assert pipe.image_encoder is encoder and torch.equal(video(pipe, ip_adapter_image=picture()), want)
    pipe.load_ip_adapter([file_of(folder), file_of(folder)])
    pipe.set_ip_adapter_scale([0.5, 0.5])
    assert_close(video(pipe, ip_adapter_image=[picture()] * 2), want)


def test_images_alone_reads_no_encoder(pipe, folder, want, caplog):
    pipe.load_ip_adapter(file_of(folder), image_encoder_folder=None)
    assert pipe.image_encoder is None
    refused(lambda: video(pipe, ip_adapter_image=picture()), match="image_encoder, which is None: .*load_ip_adapter")
    other = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder")
    with torch.no_grad():
        embeds = other(other.pixels(picture())[None])[None]
    assert torch.equal(video(pipe, ip_adapter_image_embeds=[torch.cat([torch.zeros_like(embeds), embeds])]), want)


def test_where_the_encoder_is(pipe, folder, tmp_path, want, monkeypatch):
    alone = tmp_path / "alone" / "ip.safetensors"
    alone.parent.mkdir()
    alone.symlink_to(file_of(folder))
    asked = []

    def published(path, **kw):
        asked.append((path, kw["subfolder"]))
        raise OSError("the hub is not here")

    with monkeypatch.context() as m:
        m.setattr(CLIPVisionModelWithProjection, "from_pretrained", staticmethod(published))
        says = refused(lambda: pipe.load_ip_adapter(alone), OSError)
        assert "has no image encoder beside it, and the published one cannot be loaded: the hub is not here" in says
        refused(lambda: pipe.load_ip_adapter(load_file(alone)), OSError, match="given as a dictionary has no image enc")
        state = load_file(alone)
        state["image_proj.proj.weight"] = torch.zeros(96, 1280)
        refused(lambda: pipe.load_ip_adapter(state), OSError)
    assert asked == [("h94/IP-Adapter", "models/image_encoder")] * 2 + [("h94/IP-Adapter", "sdxl_models/image_encoder")]
    assert pipe.unet.image_projections is None and pipe.image_encoder is None
    refused(lambda: pipe.load_ip_adapter(alone, image_encoder_folder="enc"), FileNotFoundError, match="enc does not")
    (alone.parent / "other").mkdir()
    (alone.parent / "other/encoder").symlink_to(folder / "image_encoder")
    pipe.load_ip_adapter(alone, image_encoder_folder="other/encoder")
    assert torch.equal(video(pipe, ip_adapter_image=picture()), want)
    (alone.parent / "image_encoder").mkdir()  # there, and broken: nothing else is taken
    pipe.unload_ip_adapter()
    refused(lambda: pipe.load_ip_adapter(alone), FileNotFoundError, match="image_encoder has no config.json")


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_an_encoder_of_other_widths_is_refused(pipe, folder, kind):
    pipe.image_encoder = encoder = CLIPVisionModelWithProjection(
        hidden_size=16, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1, image_size=8, patch_size=4,
        projection_dim=12,
    )  # fmt: skip
    width, made = (20, 12) if kind == "base" else (40, 16)
    says = refused(lambda: pipe.load_ip_adapter(file_of(folder, kind)))
    assert f"needs image embeddings of width {width}, but the image_encoder makes width {made}" in says
    assert pipe.image_encoder is encoder and pipe.unet.image_projections is None


def test_places_that_lead_nowhere(pipe, folder, tmp_path):
    name = file_of(folder).name
    for call, error, says in (
        (("no-such-folder",), FileNotFoundError, "there is no folder 'no-such-folder'"),
        ((folder.parent, "modells", name), FileNotFoundError, "modells does not exist; the folders there: models"),
        ((folder.parent, "models", "ip-adapter-base_sd15.bin"), FileNotFoundError, f"nearest: '{name}'"),
        ((folder,), FileNotFoundError, "single weights file: choose one of ip-adapter-.* as weight_name"),
        ((tmp_path,), FileNotFoundError, "no single weights file: it has none"),
        ((file_of(folder), None, "other.bin"), ValueError, "is a file: weight_name 'other.bin'"),
        ((3,), TypeError, "a folder, file, hub id or dictionary, not a int"),
        (("https://example.com/ip.bin",), ValueError, "only files on huggingface.co are downloaded"),
        (([folder] * 3, None, [name] * 2), ValueError, "3 paths, 1 subfolders and 2 weight_names do not belong"),
    ):
        refused(lambda call=call: pipe.load_ip_adapter(*call), error, match=says)
    assert pipe.unet.image_projections is None and pipe.image_encoder is None


FULL = [name for name in MANIFESTS if name != "image_encoder"]


@pytest.fixture(scope="module")
def full_unet():
    with torch.device("meta"), Weightless():
        return UNetMotionModel(cross_attention_dim=768).to(torch.float16)


@pytest.mark.parametrize("name", FULL)
def test_every_published_file_at_full_size(full_unet, tmp_path, name):
    path = tmp_path / f"{name}.safetensors"
    write = write_sparse_safetensors
    if name in ("ip-adapter_sd15", "ip-adapter_sd15_light"):
        path, write = path.with_suffix(".bin"), write_sparse_bin
    write(path, {key: (tuple(shape), dtype) for key, (shape, dtype) in MANIFESTS[name].items()})
    adapter = ip_adapter.read(ip_adapter.find(path, None, None), full_unet)
    assert {n: tuple(p.shape) for n, p in adapter.state_dict().items()} == {
        n: tuple(shape) for n, (shape, _) in MANIFESTS[name].items()}  # fmt: skip
    projection = adapter.image_proj
    features, tokens = {"plus": (1280, 16), "full": (1280, 257), "ip-a": (1280 if "vit-G" in name else 1024, 4)}[
        next((k for k in ("plus", "full") if k in name), "ip-a")]  # fmt: skip
    assert projection.features == features
    shape = (2, 257, features) if projection.reads_states else (2, features)
    assert projection(torch.zeros(shape, dtype=torch.float16, device="meta")).shape == (2, tokens, 768)
    unet = copy.copy(full_unet)
    ip_adapter.install(full_unet, [adapter, adapter])
    widths = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280]
    assert [a.to_k_ip[1].out_features for a in ip_adapter.attentions(unet)] == widths
    ip_adapter.remove(full_unet)


@pytest.mark.parametrize("single", [False, True])
def test_the_published_image_encoder_at_full_size(tmp_path, single):
    manifest = {key: (tuple(shape), dtype) for key, (shape, dtype) in MANIFESTS["image_encoder"].items()}
    path = tmp_path / ("encoder.safetensors" if single else "model.safetensors")
    write_sparse_safetensors(path, manifest)
    if single:
        encoder = CLIPVisionModelWithProjection.from_single_file(path)
    else:
        config = {"architectures": ["CLIPVisionModelWithProjection"], "attention_dropout": 0.0, "hidden_act": "gelu",
                  "hidden_size": 1280, "image_size": 224, "intermediate_size": 5120, "layer_norm_eps": 1e-05,
                  "model_type": "clip_vision_model", "num_attention_heads": 16, "num_channels": 3,
                  "num_hidden_layers": 32, "patch_size": 14, "projection_dim": 1024, "torch_dtype": "float16",
                  "_name_or_path": "./image_encoder", "dropout": 0.0, "initializer_factor": 1.0,
                  "initializer_range": 0.02, "transformers_version": "4.28.0.dev0"}  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config))
        encoder = CLIPVisionModelWithProjection.from_pretrained(tmp_path)
    assert encoder.config == CLIPVisionModelWithProjection.Config()
    assert sum(p.numel() for p in encoder.parameters()) == 632_076_800 - 0
    names = set(encoder.diffusers_state_dict())
    assert names == set(manifest) - {"vision_model.embeddings.position_ids"}
    assert encoder.to("meta")(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, 1024)


def test_a_small_encoder_as_a_single_file(folder, tmp_path):
    whole = CLIPVisionModelWithProjection.from_pretrained(folder, subfolder="image_encoder")
    (tmp_path / "e.safetensors").symlink_to(folder / "image_encoder/model.safetensors")
    one = CLIPVisionModelWithProjection.from_single_file(tmp_path / "e.safetensors", config=folder / "image_encoder")
    x = whole.pixels(picture())[None]
    assert one.config == whole.config and torch.equal(one(x), whole(x))
    guessed = CLIPVisionModelWithProjection.from_single_file(tmp_path / "e.safetensors", num_attention_heads=4)
    assert guessed.config == whole.config


# Files that are none -------------------------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        import os

        return os.system, ("touch it-ran",)


def mutations(kind):
    """(what, a function that changes the dictionary of tensors, or gives the file's bytes)."""
    names = list(load_names(kind))
    some = names if kind == "base" else names[:: 1 + len(names) // 8]

    def put(name, value):
        return lambda state: {**state, name: value(state[name])}

    for name in some:
        yield f"without {name}", lambda s, name=name: {n: x for n, x in s.items() if n != name}
        yield f"{name} misspelled", lambda s, name=name: {n + "s" * (n == name): x for n, x in s.items()}
        yield f"{name} with a row more", put(name, lambda x: torch.cat([x, x[:1]]))
        yield f"{name} with an axis more", put(name, lambda x: x[None])
        yield f"{name} of nothing", put(name, lambda x: x[:0])
    for name in some[::3]:
        yield f"{name} whole numbers", put(name, lambda x: x.to(torch.int64))
        yield f"{name} NaN", put(name, lambda x: torch.full_like(x, math.nan))
        yield f"{name} infinite", put(name, lambda x: torch.full_like(x, -math.inf))
    yield "a tensor more", lambda s: {**s, "image_proj.more": torch.zeros(3)}
    yield "another attention", lambda s: {**s, "ip_adapter.9.to_k_ip.weight": torch.zeros(32, 24)}
    yield "even numbers", lambda s: {n.replace("ip_adapter.1.", "ip_adapter.2."): x for n, x in s.items()}
    yield "no attention", lambda s: {n: x for n, x in s.items() if n.startswith("image_proj")}
    yield "no projection", lambda s: {n: x for n, x in s.items() if n.startswith("ip_adapter")}
    yield "nothing", lambda s: {}
    yield "no prefix", lambda s: {n.partition(".")[2]: x for n, x in s.items()}
    yield "wider texts", lambda s: {n: torch.zeros(*x.shape[:-1], 2048) if "_ip." in n else x for n, x in s.items()}
    zeros = torch.zeros
    yield "two kinds", lambda s: {**s, "image_proj.proj.3.weight": zeros(24), "image_proj.latents": zeros(1, 2, 3)}
    yield "FaceID", lambda s: {**s, "image_proj.proj.2.weight": zeros(9, 9), "image_proj.norm.weight": zeros(9)}
    yield "FaceID plus", lambda s: {**s, "image_proj.perceiver_resampler.proj_in.weight": torch.zeros(3, 3)}
    yield "FaceID's LoRA", lambda s: {**s, "ip_adapter.0.to_q_lora.down.weight": torch.zeros(3, 3)}
    for cut in (0, 7, 40, 1000, -1):
        yield f"cut off at {cut}", lambda s, cut=cut: save(s)[:cut]
    yield "longer", lambda s: save(s) + b"0"
    yield "noise", lambda s: b"\x10" + bytes(7) + b"#" * 64
    yield "a wild header", lambda s: struct.pack("<Q", 2**40) + save(s)[8:]
    yield "a page", lambda s: b"<!DOCTYPE html><html></html>"
    yield "a pointer", lambda s: b"version https://git-lfs.github.com/spec/v1\noid sha256:0"


def load_names(kind):
    """As the file has them; the shapes do not matter here."""
    proj = {"base": ["proj.weight", "proj.bias", "norm.weight", "norm.bias"],
            "full-face": [f"proj.{k}.{p}" for k in (0, 2, 3) for p in ("weight", "bias")],
            "plus": ["latents", *(f"{n}.{p}" for n in ("proj_in", "proj_out", "norm_out") for p in ("weight", "bias")),
                     *(f"layers.{i}.{n}" for i in range(4) for n in (
                         "0.norm1.weight", "0.norm1.bias", "0.norm2.weight", "0.norm2.bias", "0.to_q.weight",
                         "0.to_kv.weight", "0.to_out.weight", "1.0.weight", "1.0.bias", "1.1.weight",
                         "1.3.weight"))]}[kind]  # fmt: skip
    return [f"image_proj.{n}" for n in proj] + [f"ip_adapter.{k}.to_{x}_ip.weight" for k in (1, 3, 5, 7) for x in "kv"]


@pytest.mark.parametrize(("kind", "loaded"), [("base", False), ("plus", True), ("full-face", False)])
def test_mutated_files_are_refused_in_one_line_and_change_nothing(pipe, folder, tmp_path, monkeypatch, kind, loaded):
    """200 files, with and without an adapter in the UNet before."""
    monkeypatch.chdir(tmp_path)
    state, shown = load_file(file_of(folder, kind)), {}
    assert sorted(state) == sorted(load_names(kind))
    encoder = pipe.image_encoder
    if loaded:
        pipe.load_ip_adapter(file_of(folder, "plus"))
        pipe.set_ip_adapter_scale({"mid": 0.3, "up": 2})
        encoder, shown = pipe.image_encoder, dict(ip_adapter_image=picture())
    call = dict(num_inference_steps=1, num_frames=2) | shown
    want, modules = video(pipe, **call), list(pipe.unet.modules())
    path, count = tmp_path / "ip.safetensors", 0
    for what, change in mutations(kind):
        content = change(state)
        path.write_bytes(content if isinstance(content, bytes) else save(content))
        with pytest.raises(ValueError) as info:
            pipe.load_ip_adapter(path)
            pytest.fail(f"{what}: loaded")
        says = str(info.value)
        assert "\n" not in says and says.startswith(str(path)) and len(says) < 800, (what, says)
        assert list(pipe.unet.modules()) == modules and pipe.image_encoder is encoder, what
        assert count % 7 or torch.equal(video(pipe, **call), want), what
        count += 1
    assert count >= (90 if kind == "base" else 55), count
    for content in ({**nested(file_of(folder, kind)), "more": Malicious()}, [1, 2], {"image_proj": {"a": 3}}, 3):
        torch.save(content, tmp_path / "ip.bin")
        refused(lambda: pipe.load_ip_adapter(tmp_path / "ip.bin"))
        if isinstance(content, dict) and "more" not in content:
            refused(lambda content=content: pipe.load_ip_adapter(content))
    assert not (tmp_path / "it-ran").exists()
    refused(lambda: pipe.load_ip_adapter([file_of(folder, kind), path]))  # the first is good
    assert list(pipe.unet.modules()) == modules and torch.equal(video(pipe, **call), want)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(image_proj_more=1), "does not fit IPAdapter: 1 unknown ('image_proj_more')"),
        (dict(sdxl=True), "for text embeddings of width 2048 (Stable Diffusion XL's), but the UNet needs width 24"),
        (dict(face=True), "an IP-Adapter FaceID, which reads face vectors of insightface"),
        (dict(lora=True), "not an IP-Adapter, because it lacks image_proj or ip_adapter; it has 1 tensors"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_other_families_are_named(pipe, folder, tmp_path, change, says):
    state = load_file(file_of(folder))
    if "sdxl" in change:
        state = {n: torch.zeros(*x.shape[:-1], 2048) if "_ip." in n else x for n, x in state.items()}
    if "face" in change:
        state = dict.fromkeys(["image_proj.perceiver_resampler.latents", "ip_adapter.1.to_k_ip.weight"], torch.zeros(2))
        state = {name: x.clone() for name, x in state.items()}
    if "lora" in change:
        state = {"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": torch.zeros(2)}
    if "image_proj_more" in change:
        state["image_proj_more"] = torch.zeros(3)
    save_file(state, tmp_path / "x.safetensors")
    assert says in refused(lambda: pipe.load_ip_adapter(tmp_path / "x.safetensors"))


# Calls that cannot work --------------------------------------------------------------------------------------------


class Unusual:
    ndim = 4


def test_what_is_no_picture_is_refused_before_any_work(pipe, folder):
    pipe.load_ip_adapter(file_of(folder))
    for part in (pipe.unet, pipe.vae.decoder, pipe.text_encoder, pipe.image_encoder):
        part.register_forward_pre_hook(lambda m, args: pytest.fail(f"{type(m).__name__} ran"))
    a = picture()
    nan = torch.full((3, 28, 28), math.nan)
    for given, says in (
        ("picture.png", "PIL image or an array .h w 3., not a str"),
        (3, "not a int"),
        ([None], "not a NoneType"),
        ([a, a], "2 entries for 1 IP-Adapters; several pictures of one adapter are a list in that list, .*a, b"),
        ([], "0 entries for 1 IP-Adapters"),
        ([[]], "the list has no pictures"),
        ([[a, []]], "the list has no pictures"),
        ([[a, "b"]], "not a str"),
        ([[[a, [a]]]], "not a list"),
        (np.zeros((4, 5, 2), np.uint8), "must be .h w., .* not .4, 5, 2."),
        (np.zeros(4, np.uint8), "must be .h w., .* not .4,."),
        (np.zeros((0, 5, 3), np.uint8), "not .0, 5, 3."),
        (np.zeros((4, 5, 3), np.int64), "of bytes .uint8. or numbers in .0, 1., not int64"),
        (np.full((4, 5, 3), 7.0), "must be in .0, 1."),
        (np.full((4, 5, 3), math.nan), "must be in .0, 1."),
        (torch.zeros(3, 8, 8), r"prepared for the image encoder, .*\(3, 28, 28\), not \(3, 8, 8\)"),
        (torch.zeros(3, 28, 28, dtype=torch.uint8), "not .3, 28, 28. of torch.uint8"),
        (nan, "the tensor holds NaN or infinity"),
        (Image.new("I;16", (9, 9)), "mode I;16 does not have 8 bits: load_image"),
        (Image.new("F", (9, 9)), "mode F does not have 8 bits"),
        (Image.new("RGB", (1, 3000)), "1x3000 is too narrow"),
        (Unusual(), "."),
    ):
        error = (TypeError, ValueError) if isinstance(given, Unusual) else (ValueError,)
        refused(lambda given=given: video(pipe, ip_adapter_image=given), *error, match=says)


def test_a_picture_whose_file_is_cut_off(pipe, folder, tmp_path):
    pipe.load_ip_adapter(file_of(folder))
    picture(0, 300, 300).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    refused(lambda: video(pipe, ip_adapter_image=Image.open(tmp_path / "a.png")), match="a picture cannot be read")


@pytest.mark.parametrize("guided", [True, False])
def test_embeds_that_do_not_fit(pipe, folder, guided):
    pipe.load_ip_adapter(file_of(folder))
    n = 2 if guided else 1
    good = torch.zeros(n, 1, 20)
    for given, says in (
        (good, "must be a list with a tensor for each of the 1 IP-Adapters, not a Tensor"),
        ([], "not 0 entries"),
        ([good, good], "not 2 entries"),
        ([None], "not a NoneType"),
        ([torch.zeros(3, 1, 20)], rf"tensor \({n}, pictures, 20\) or .* not \(3, 1, 20\)"),
        ([torch.zeros(n, 1, 19)], r"not \(.*19\)"),
        ([torch.zeros(n, 20)], r"not \(.*20\)"),
        ([torch.zeros(n, 0, 20)], "not"),
        ([torch.zeros(n, 1, 1, 17, 20)], "not"),
        ([torch.zeros(n, 4, 1, 20)], "pictures for 4 frames, but the video has 3"),
        ([good.long()], "torch.int64"),
        ([good + math.nan], "hold NaN or infinity"),
        ([good - math.inf], "hold NaN or infinity"),
    ):
        refused(lambda given=given: video(pipe, ip_adapter_image_embeds=given, guidance_scale=1 + guided), match=says)
    assert video(pipe, ip_adapter_image_embeds=[good], guidance_scale=1 + guided).isfinite().all()
    refused(lambda: video(pipe, ip_adapter_image=picture(), ip_adapter_image_embeds=[good]), match="not both")


def test_masks_that_do_not_fit(pipe, folder):
    pipe.load_ip_adapter(file_of(folder))
    mask = torch.ones(1, 1, 16, 24)
    for given, says in (
        ("mask.png", "must be a list of tensors, one for each IP-Adapter, not a str"),
        (torch.ones(16, 24), "must be a list of tensors, one for each IP-Adapter, not a Tensor"),
        ([], "0 ip_adapter_masks for 1 IP-Adapters"),
        ([mask, mask], "2 ip_adapter_masks for 1"),
        ([mask[0]], "each must be a tensor .1, pictures, height, width., not .1, 16, 24."),
        ([mask.expand(2, -1, -1, -1)], "not .2, 1, 16, 24."),
        ([picture()], "not a Image"),
        ([mask.expand(-1, 2, -1, -1)], "2 masks for the 1 pictures of IP-Adapter 0"),
        ([mask[..., :0]], "not .1, 1, 16, 0."),
        ([mask + math.nan], "hold NaN or infinity"),
    ):
        call = dict(cross_attention_kwargs={"ip_adapter_masks": given})
        refused(lambda call=call: video(pipe, ip_adapter_image=picture(), **call), match=says)
    kwargs = {"ip_adapter_masks": [mask]}
    refused(lambda: video(pipe, cross_attention_kwargs=kwargs), match="there are no pictures to mask")
    kwargs["scales"] = 1
    refused(lambda: video(pipe, ip_adapter_image=picture(), cross_attention_kwargs=kwargs), match="scales")
    assert kwargs.keys() == {"ip_adapter_masks", "scales"}
    refused(lambda: AnimateDiffPipeline.from_pipe(pipe, mask_grid="ratio"), match="mask_grid must be 'exact' or")


def test_an_encoder_with_a_nan_is_named(pipe, folder):
    pipe.load_ip_adapter(file_of(folder))
    with torch.no_grad():
        pipe.image_encoder.layers[0].ff.up.weight[0, 0] = math.nan
    says = refused(lambda: video(pipe, ip_adapter_image=picture()), FloatingPointError)
    assert "the image encoder gave NaN or infinity, because its parameter 'vision_model.encoder.layers.0.mlp" in says


def test_a_unet_is_told_what_does_not_fit(pipe, folder):
    unet, x, text = pipe.unet, torch.zeros(1, 4, 3, 8, 12), torch.zeros(1, 5, 24)
    tokens = torch.zeros(1, 1, 4, 24)
    refused(lambda: unet(x, 1, ip_adapter.Prompt(text, [tokens])), match="pictures for 1 IP-Adapters, not for 0")
    pipe.load_ip_adapter(file_of(folder))
    refused(lambda: unet(x, 1, ip_adapter.Prompt(text, [])), match="pictures for 0 IP-Adapters, not for 1")
    refused(lambda: unet(x, 1, ip_adapter.Prompt(text, [tokens[..., :9]])), match="tokens of pictures must be .batch")
    refused(lambda: unet(x, 1, ip_adapter.Prompt(text[:, :, :9], [tokens])), match="context must be")
    with torch.no_grad():
        a = unet(x, 1, ip_adapter.Prompt(text, [tokens + 1]))
        b = unet(x, 1, ip_adapter.Prompt(text[:, None].expand(-1, 3, -1, -1), [tokens + 1]))
    assert_close(a, b)


# With all the rest ---------------------------------------------------------------------------------------------------


SHOWN = [
    dict(ip_adapter_image=[picture(), picture(1)]),
    dict(ip_adapter_image=[[picture(), picture(1)], picture(2)], guidance_scale=1.0),
    dict(ip_adapter_image=[[[picture(), picture(1), picture(2)]], picture(3)]),
    dict(ip_adapter_image=[[picture(), picture(1)], picture(2)],
         cross_attention_kwargs={"ip_adapter_masks": [torch.linspace(0, 1, 768).reshape(1, 2, 16, 24), None]}),
]  # fmt: skip


def load_two(pipe, folder):
    pipe.load_ip_adapter([file_of(folder), file_of(folder, "plus")])
    pipe.set_ip_adapter_scale([0.6, {"down": 0.5, "up": [0.0, -0.8], "mid": 1.0}])


@pytest.mark.parametrize("call", SHOWN)
def test_the_fast_path_computes_what_is_written(pipe, folder, call, monkeypatch):
    load_two(pipe, folder)
    pipe.to(torch.float64)
    fast_frames = video(pipe, **call)
    assert fast.executors[pipe.unet].known >= set(ip_adapter.attentions(pipe.unet))  # and they were not run as written
    monkeypatch.setattr(ImageAttention, "forward", lambda *_: pytest.fail("ran as written"))
    fast.executors.clear()
    pipe.restore()
    with pytest.raises(pytest.fail.Exception):
        video(pipe, **call)
    monkeypatch.undo()
    torch.testing.assert_close(fast_frames, video(pipe, **call), rtol=0, atol=1e-9 * fast_frames.abs().max().item())
    one = ip_adapter.attentions(pipe.unet)[2].register_forward_hook(lambda m, args, y: None)
    pipe.optimize()  # one attention is watched, and runs as written beside the others
    torch.testing.assert_close(fast_frames, video(pipe, **call), rtol=0, atol=1e-9 * fast_frames.abs().max().item())
    one.remove()


class Fork(ImageAttention):
    def forward(self, x, context):
        return super().forward(x, context) * 1.5


def test_a_class_of_the_user_s_own_is_never_bypassed(pipe, folder):
    pipe.load_ip_adapter(file_of(folder))
    want = video(pipe, ip_adapter_image=picture())
    ip_adapter.attentions(pipe.unet)[0].__class__ = Fork
    assert differ(video(pipe, ip_adapter_image=picture()), want)
    for attention in ip_adapter.attentions(pipe.unet):
        attention.__class__ = Fork
    refused(lambda: pipe.load_ip_adapter(file_of(folder)), TypeError, match="not Fork")


@pytest.fixture
def captures(monkeypatch):
    """CUDA graphs on the CPU: a replay computes anew, out of the same tensors."""
    import minit2v.fast.graphs as graphs

    made = []

    def capture(run, device, other):
        made.append(run)
        y = run()

        class Replay:
            replay = staticmethod(lambda: y.copy_(run()))

        return graphs.Capture(Replay, None, y)

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr("minit2v.fast.executor.can_capture", lambda x: True)
    return made


def test_graphs_take_other_pictures_and_masks(pipe, folder, captures):
    load_two(pipe, folder)
    want = [video(pipe, **call) for call in SHOWN]
    plain = video(pipe)
    fast.optimize(pipe.unet, graphs=True)
    for call, frames in zip(SHOWN, want, strict=True):
        assert torch.equal(video(pipe, **call), frames)
    assert len(captures) == 4 and torch.equal(video(pipe), plain)  # a graph for each number of tokens
    captures.clear()
    fast.optimize(pipe.unet, graphs=True)
    call = dict(ip_adapter_image=[picture(5), picture(6)])
    first = video(pipe, **call)
    other = video(pipe, ip_adapter_image=[picture(7), picture(8)])
    assert len(captures) == 1 and differ(first, other) and torch.equal(video(pipe, **call), first)
    pipe.set_ip_adapter_scale([0.6, 0.0])
    assert differ(video(pipe, **call), first) and len(captures) == 2
    pipe.unload_ip_adapter()
    assert torch.equal(video(pipe), plain) and len(captures) == 3


def test_compiled_blocks(pipe, folder, monkeypatch):
    """They get a Prompt in the place of a tensor."""
    load_two(pipe, folder)
    want = video(pipe, **SHOWN[3])
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m, **kw: real(m, backend="eager", fullgraph=True, **kw))
    unet = pipe.unet
    fast.optimize(unet, compile=True)
    for block in unet.blocks():  # tracing takes a second or more for each: one is enough
        if block is not unet.up[1].blocks[0]:
            block.register_forward_hook(lambda m, args, y: None)
    assert_close(video(pipe, **SHOWN[3]), want)
    assert [type(b).__name__ for b in fast.executors[unet].compiled] == ["Block"]


def test_offload_dtypes_and_copies(pipe, folder):
    load_two(pipe, folder)
    call = SHOWN[3] | dict(latents=torch.randn(1, 4, 3, 8, 12, generator=torch.Generator().manual_seed(1)))
    want = video(pipe, **call)
    pipe._offload = Offload(torch.device("cpu"), "model")
    assert torch.equal(video(pipe, **call), want)
    pipe._offload = None

    other = copy.deepcopy(pipe)
    other.set_ip_adapter_scale([0.0, 0.0])
    other.unet.image_projections[0].proj.weight.zero_()
    assert torch.equal(video(pipe, **call), want)
    other.unload_ip_adapter()
    assert torch.equal(video(pipe, **call), want) and pipe.image_encoder is not None

    pipe.to(torch.float64)
    assert {p.dtype for p in (*pipe.unet.parameters(), *pipe.image_encoder.parameters())} == {torch.float64}
    assert_close(video(pipe, **call), want, 1e-2)
    pipe.to(torch.float32)
    pipe.load_ip_adapter(file_of(folder))
    pipe.unet.to(torch.bfloat16)
    pipe.load_ip_adapter(file_of(folder))
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}


def test_offloading_moves_the_encoder_too(pipe, folder, monkeypatch):
    pipe.load_ip_adapter(file_of(folder))
    moved = []
    monkeypatch.setattr(pipe.image_encoder, "to", lambda *a, **k: moved.append(a[0]) or pipe.image_encoder)
    pipe._offload = Offload(torch.device("cpu"), "model")
    video(pipe, ip_adapter_image=picture())
    assert [str(d) for d in moved] == ["cpu", "cpu"] and len(moved) == 2  # there, and back


def test_pipelines_that_share_the_unet(pipe, folder):
    before = AnimateDiffPipeline.from_pipe(pipe)
    pipe.load_ip_adapter(file_of(folder))
    want = video(pipe, ip_adapter_image=picture())
    after = AnimateDiffPipeline.from_pipe(pipe)
    assert torch.equal(video(after, ip_adapter_image=picture()), want)
    refused(lambda: video(before, ip_adapter_image=picture()), match="image_encoder, which is None")
    embeds = pipe.prepare_ip_adapter_image_embeds(picture())
    assert torch.equal(video(before, ip_adapter_image_embeds=embeds), want)
    v2v = AnimateDiffVideoToVideoPipeline.from_pipe(pipe)
    call = dict(video=[picture(k, 24, 16) for k in range(3)], prompt="a cat", num_inference_steps=2, strength=1.0,
                output_type="latent")  # fmt: skip
    frames = [v2v(**call, **shown, generator=torch.Generator().manual_seed(0)).frames
              for shown in ({}, dict(ip_adapter_image=picture()))]  # fmt: skip
    assert differ(*frames)
    latents = dict(video=None, latents=torch.randn(1, 4, 3, 8, 12, generator=torch.Generator().manual_seed(1)))
    assert v2v(**call | latents, ip_adapter_image=picture()).frames.isfinite().all()
    masks = {"ip_adapter_masks": [torch.ones(1, 1, 16, 24)]}
    for given in ({}, latents):
        assert v2v(**call | given, ip_adapter_image=picture(), cross_attention_kwargs=masks).frames.isfinite().all()


def test_the_other_mode_has_the_adapter_and_the_same_tensors(pipe, folder):
    load_two(pipe, folder)
    other = AnimateDiffPipeline.from_pipe(pipe, compat="diffusers")
    assert other.unet is not pipe.unet and other.mask_grid == "published" and pipe.mask_grid == "exact"
    mine, theirs = pipe.unet.state_dict(keep_vars=True), other.unet.state_dict(keep_vars=True)
    assert mine.keys() == theirs.keys() and all(mine[n] is theirs[n] for n in mine)
    assert [a.scales for a in ip_adapter.attentions(other.unet)] == [a.scales for a in ip_adapter.attentions(pipe.unet)]
    want = video(pipe, **SHOWN[0])
    assert differ(video(other, **SHOWN[0]), want)
    other.unload_ip_adapter()
    assert torch.equal(video(pipe, **SHOWN[0]), want)


def test_free_init_and_free_u(pipe, folder):
    pipe.load_ip_adapter(file_of(folder))
    for use in (pipe.enable_free_init, lambda: pipe.enable_freeu(0.9, 0.2, 1.5, 1.6)):
        use()
        plain, shown = video(pipe), video(pipe, ip_adapter_image=picture())
        assert differ(plain, shown)
        pipe.set_ip_adapter_scale(0.0)
        assert torch.equal(video(pipe, ip_adapter_image=picture()), plain)
        pipe.set_ip_adapter_scale(1.0)


def test_saving_neither_loses_nor_mixes_it(pipe, folder, tmp_path):
    want = video(pipe)
    pipe.save_pretrained(tmp_path)
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    pipe.load_ip_adapter(file_of(folder))
    for save_it in (pipe.save_pretrained, pipe.unet.save_pretrained):
        refused(lambda save_it=save_it: save_it(tmp_path), match="has its own file: call unload_ip_adapter")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files
    pipe.unet.save_motion_modules(tmp_path / "motion")
    MotionAdapter.from_pretrained(tmp_path / "motion")
    encoder = pipe.image_encoder
    pipe.unload_ip_adapter()
    pipe.image_encoder = encoder  # this belongs to a pipeline's folder
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert_close(video(again), want, 1e-5)
    again.load_ip_adapter(file_of(folder), image_encoder_folder="not/needed")
    pipe.load_ip_adapter(file_of(folder))
    assert_close(video(again, ip_adapter_image=picture()), video(pipe, ip_adapter_image=picture()), 1e-5)


def test_motion_modules_are_exchanged_beside_it(pipe, folder):
    pipe.load_ip_adapter(file_of(folder))
    want = video(pipe, ip_adapter_image=picture())
    pipe.unet.load_motion_modules(pipe.motion_adapter)
    assert torch.equal(video(pipe, ip_adapter_image=picture()), want)


def test_attention_maps_are_those_of_the_text(pipe, folder):
    def maps(**call):
        with attention_maps(pipe.unet, "text") as found:
            video(pipe, **call)
        return found

    before = maps()
    pipe.load_ip_adapter(file_of(folder))
    assert {n: [m.shape for m in ms] for n, ms in maps(ip_adapter_image=picture()).items()} == {
        n: [m.shape for m in ms] for n, ms in before.items()}  # fmt: skip
    assert all(torch.equal(a, b) for n, ms in maps().items() for a, b in zip(ms, before[n], strict=True))


def test_interrupting_and_changing_the_text_in_between(pipe, folder):
    pipe.load_ip_adapter(file_of(folder))
    other, negative = pipe.encode_prompt("dog")

    def change(pipe, step, t, tensors):
        return {"prompt_embeds": other} if step == 0 else {}

    want = video(pipe, ip_adapter_image=picture())
    names = ("prompt_embeds",)
    got = video(pipe, ip_adapter_image=picture(), callback_on_step_end=change, callback_on_step_end_tensor_inputs=names)
    assert not torch.equal(got, want)
    plain = video(pipe, callback_on_step_end=change, callback_on_step_end_tensor_inputs=names)
    assert differ(got, plain)


def test_gradients_reach_an_adapter(pipe, folder):
    """To train one: nothing of the UNet's is in the way."""
    pipe.load_ip_adapter(file_of(folder))
    attention = ip_adapter.attentions(pipe.unet)[1]
    attention.to_v_ip[0].requires_grad_(True)
    prompt = ip_adapter.Prompt(torch.ones(1, 5, 24), [torch.ones(1, 1, 4, 24)])
    for checkpointing in (False, True):
        with contextlib.suppress(AttributeError):
            attention.to_v_ip[0].weight.grad = None
        pipe.unet.gradient_checkpointing = checkpointing
        pipe.unet(torch.ones(1, 4, 3, 8, 12), 3, prompt).square().mean().backward()
        assert attention.to_v_ip[0].weight.grad.abs().max() > 0


# The page ----------------------------------------------------------------------------------------------------------


def test_the_documentation_s_snippet(tmp_path, make_official_folder, make_adapter_folder, make_ip_adapter, monkeypatch,
                                     caplog):  # fmt: skip
    """IP-Adapter with AnimateDiff, as diffusers' pages have it: `diffusers` replaced by `minit2v`, on small folders."""
    monkeypatch.chdir(tmp_path)
    make_official_folder(tmp_path / "emilianJR/epiCRealism", repo="sd15", small=True)
    make_adapter_folder(tmp_path / "guoyww", "v1-5-2")
    file = make_ip_adapter(tmp_path / "h94/IP-Adapter/models")
    torch.save(nested(file), file.parent / "ip-adapter_sd15.bin")
    picture(0, 64, 48).save("ip_adapter_inpaint.png")
    snippet = """
import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter
from diffusers.utils import export_to_gif
from diffusers.utils import load_image

adapter = MotionAdapter.from_pretrained("guoyww/animatediff-motion-adapter-v1-5-2", torch_dtype=torch.float16)
pipeline = AnimateDiffPipeline.from_pretrained("emilianJR/epiCRealism", motion_adapter=adapter,
                                               torch_dtype=torch.float16)
scheduler = DDIMScheduler.from_pretrained(
    "emilianJR/epiCRealism",
    subfolder="scheduler",
    clip_sample=False,
    timestep_spacing="linspace",
    beta_schedule="linear",
    steps_offset=1,
)
pipeline.scheduler = scheduler
pipeline.enable_vae_slicing()
pipeline.load_ip_adapter("h94/IP-Adapter", subfolder="models", weight_name="ip-adapter_sd15.bin")
pipeline.enable_model_cpu_offload()
ip_adapter_image = load_image("ip_adapter_inpaint.png")
frames = pipeline(
    prompt="A cute gummy bear waving",
    negative_prompt="bad quality, worse quality, low resolution",
    ip_adapter_image=ip_adapter_image,
    num_frames=16,
    guidance_scale=7.5,
    num_inference_steps=50,
    generator=torch.Generator(device="cpu").manual_seed(0),
).frames[0]
export_to_gif(frames, "animation.gif")
"""
    small = snippet.replace("diffusers", "minit2v").replace("num_inference_steps=50", "num_inference_steps=2")
    if not torch.cuda.is_available():
        small = small.replace("torch.float16", "torch.float32")
    with caplog.at_level(logging.ERROR):
        exec(compile(small, "snippet", "exec"), {})
    with Image.open("animation.gif") as gif:
        assert gif.n_frames == 16


def test_the_snippet_with_masks():
    from minit2v.image_processor import IPAdapterMaskProcessor as same
    from minit2v.utils import load_image

    assert same is IPAdapterMaskProcessor and load_image(picture()).size == (40, 33)


def test_load_image(tmp_path):
    from minit2v.utils import load_image

    upright = picture(0, 30, 20)
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    turned.save(tmp_path / "a.png", exif=exif)
    assert load_image(tmp_path / "a.png").size == (30, 20)
    assert np.array_equal(np.asarray(load_image(str(tmp_path / "a.png"))), np.asarray(upright))
    Image.new("I;16", (9, 9), 65535).save(tmp_path / "b.png")
    assert load_image(tmp_path / "b.png").mode == "RGB"
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:100])
    refused(lambda: load_image(tmp_path / "c.png"), match="c.png: not a picture, or damaged")
    refused(lambda: load_image(tmp_path), match="a folder, not a picture")
    refused(lambda: load_image(tmp_path / "d.png"), FileNotFoundError)
    refused(lambda: load_image(3), match="not a int")
    refused(lambda: load_image(tmp_path / "b.png", max_pixels=80), match="81 pixels, and max_pixels is 80")
