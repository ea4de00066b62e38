"""Files from folders and from a hub on the loopback, configs, strict loading, errors in one line, saving."""

import http.server
import json
import math
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import threading
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from minit2v.files.config import config_fields, make_config, one_dtype
from minit2v.files.hub import find_folder, read_json
from minit2v.files.weights import first_nonfinite
from minit2v.models.clip import CLIPTextModel
from minit2v.models.network import Network
from minit2v.models.unet2d import UNet2DConditionModel
from minit2v.models.unet3d import UNet3DConditionModel
from minit2v.models.unet_motion import MotionAdapter
from minit2v.models.vae import AutoencoderKL
from minit2v_convert.rename import Layout
from minit2v_convert.sparse import write_sparse_bin, write_sparse_safetensors

NETWORKS = {"unet": UNet3DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
CLASSES = {cls.__name__: cls for cls in (*NETWORKS.values(), UNet2DConditionModel, MotionAdapter)}
PIPELINES = ("ms-1.7b", "zeroscope_v2_576w", "zeroscope_v2_XL", "sd15", "rv51")
ADAPTERS = ("adapter-v1-5", "adapter-v1-5-2", "adapter-v1-5-3", "adapter-sdxl-beta", "animatelcm")


@dataclass(frozen=True)
class TinyConfig:
    dim: int = 3
    widths: tuple[int, ...] = (1, 2)
    scale: float = 1.0
    size: int | tuple[int, int] = 8

    FIXED: ClassVar[dict[str, Any]] = {"act_fn": "silu", "kernel": (3, 3)}
    IGNORED: ClassVar[dict[str, str]] = {"note": "a remark"}


class Tiny(Network):
    Config = TinyConfig
    layout = Layout(rules=[("conv_in.{p}", "first.{p}"), ("conv_out.{p}", "last.{p}")], squeezed=["last.weight"])

    def __init__(self, config=None, **given):
        super().__init__(config, **given)
        self.first = nn.Linear(self.config.dim, 4)
        self.last = nn.Linear(4, self.config.dim)


@pytest.fixture
def tiny(tmp_path):
    """A saved Tiny: (network, folder)."""
    torch.manual_seed(0)
    net = Tiny(dim=5)
    net.save_pretrained(tmp_path / "tiny")
    return net, tmp_path / "tiny"


def add_bin(net: nn.Module, folder: Path) -> None:
    """The weights as a pickle, beside those that are there: one `save_pretrained` takes the place of another."""
    net.save_pretrained(folder / "aside", safe_serialization=False)
    (folder / "aside" / "diffusion_pytorch_model.bin").rename(folder / "diffusion_pytorch_model.bin")
    shutil.rmtree(folder / "aside")


def same(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def line(error) -> str:
    """The message of a pytest.raises, which must be one line."""
    text = str(error.value)
    assert "\n" not in text, text
    return text


# ------------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("repo", "part"),
    [*((r, p) for r in PIPELINES for p in NETWORKS), *((r, "motion_adapter") for r in ADAPTERS)],
)
def test_published_configs_are_understood(published_config, published_class, repo, part):
    published = published_config(repo, part)
    cls = CLASSES[published_class(f"{repo}/{part}")]
    config = make_config(cls.Config, published)
    if repo in ("ms-1.7b", "adapter-v1-5-2") or (repo, part) == ("sd15", "unet"):
        assert config == cls.Config(), "the defaults are the published model's"
    for name, value in json.loads(json.dumps(config_fields(config))).items():
        assert published.get(name, value) == value, name
    assert make_config(cls.Config, json.loads(json.dumps(config_fields(config)))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dims": 3}, "TinyConfig has no field 'dims' (nearest: 'dim')"),
        ({"dim": "3"}, "TinyConfig: dim must be int, not '3'"),
        ({"dim": True}, "TinyConfig: dim must be int, not True"),
        ({"dim": 3.5}, "TinyConfig: dim must be int, not 3.5"),
        ({"scale": None}, "TinyConfig: scale must be float, not None"),
        ({"widths": [1, "2"]}, "TinyConfig: widths must be tuple[int, ...], not (1, '2')"),
        ({"size": [1, 2, 3]}, "TinyConfig: size must be int | tuple[int, int], not (1, 2, 3)"),
        ({"act_fn": "gelu"}, "TinyConfig: only act_fn='silu' is supported, not 'gelu'"),
    ],
)
def test_a_config_that_is_wrong_is_named(values, message):
    with pytest.raises(ValueError) as error:
        make_config(TinyConfig, values)
    assert line(error) == message
    with pytest.raises(ValueError, match=re.escape(message)):
        Tiny(**values)


def test_a_config_that_is_right_passes():
    given = {"dim": 4, "widths": [3], "scale": 2, "size": [4, 5], "act_fn": "silu", "kernel": [3, 3], "note": 1,
             "_class_name": "Tiny", "_diffusers_version": "0", "torch_dtype": "float16"}  # fmt: skip
    assert make_config(TinyConfig, given) == TinyConfig(4, (3,), 2, (4, 5))


def test_config_and_fields_together():
    net = Tiny(TinyConfig(dim=4, scale=3.0), dim=2)
    assert net.config == TinyConfig(dim=2, scale=3.0)
    assert Tiny.from_config(net.config, scale=5.0).config == TinyConfig(dim=2, scale=5.0)
    assert Tiny.from_config({"_class_name": "Tiny", "dim": 2}, scale=5.0).config == TinyConfig(dim=2, scale=5.0)
    with pytest.raises(ValueError, match="from_config takes a dict"):
        Tiny({"dim": 3})
    with pytest.raises(ValueError, match="dict or a TinyConfig, not a str"):
        Tiny.from_config("tiny")


def test_the_folder_of_another_network(tmp_path, published_config):
    for part, other, name in (("vae", "unet", "AutoencoderKL"), ("text_encoder", "vae", "CLIPTextModel")):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(published_config("ms-1.7b", part)))
        stem = "model" if other == "text_encoder" else "diffusion_pytorch_model"
        save_file({"a": torch.zeros(1)}, tmp_path / part / f"{stem}.safetensors")
        with pytest.raises(ValueError) as error:
            NETWORKS[other].from_pretrained(tmp_path, subfolder=part)
        assert f"belongs to a {name}, not to a {NETWORKS[other].__name__}" in line(error)
        assert str(tmp_path / part / "config.json") in line(error)


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ((None, None), torch.float32),
        ((torch.float16, None), torch.float16),
        ((None, "bf16"), torch.bfloat16),
        (("torch.float64", "float64"), torch.float64),
        (("fp16", torch.float16), torch.float16),
    ],
)
def test_dtype_in_both_spellings(given, dtype):
    assert one_dtype(*given) == dtype


def test_dtypes_that_are_none():
    with pytest.raises(ValueError, match="torch_dtype=float16 and dtype=float32 differ"):
        one_dtype("float16", "float32")
    for wrong in ("flaot16", torch.int8, torch.float8_e4m3fn, 16):
        with pytest.raises(ValueError, match="dtype must be one of float32, .*, not "):
            one_dtype(wrong)
    with pytest.raises(ValueError, match="nearest: 'float16'"):
        one_dtype("flaot16")


# --------------------------------------------------------------------------------------------------- published weights


def test_every_published_name_finds_its_place(manifest, manifest_names, published_config, published_class):
    """All files, full size: our parameters, no more and no fewer, in the published shapes."""
    expected = {}
    for name in manifest_names:
        repo, part = name.removesuffix(".fp16").split("/")
        cls = CLASSES[published_class(name)]
        config = make_config(cls.Config, published_config(repo, part))
        if (part, config) not in expected:
            with torch.device("meta"):
                expected[part, config] = {n: tuple(p.shape) for n, p in cls(config).state_dict().items()}
        state = {key: torch.empty(shape, device="meta") for key, (shape, _) in manifest(name).items()}
        ours = cls.layout.to_ours(state)
        assert {n: tuple(x.shape) for n, x in ours.items()} == expected[part, config], name


# (repository, part, kind of file, options, MiB of memory that loading may take)
FULL_SIZE = [
    ("ms-1.7b", "unet", "safetensors", {}, 100),
    ("ms-1.7b", "unet", "safetensors", {"variant": "fp16", "torch_dtype": "float16"}, 100),
    ("ms-1.7b", "vae", "safetensors", {}, 100),
    ("ms-1.7b", "vae", "safetensors", {"variant": "fp16", "dtype": "float16"}, 100),
    ("ms-1.7b", "text_encoder", "safetensors", {}, 100),
    ("ms-1.7b", "text_encoder", "safetensors", {"variant": "fp16", "dtype": "float16"}, 100),
    ("zeroscope_v2_576w", "unet", "bin", {"dtype": "float16"}, 100),
    ("zeroscope_v2_576w", "vae", "bin", {"dtype": "float16"}, 100),
    ("zeroscope_v2_576w", "text_encoder", "bin", {"dtype": "float16"}, 100),
    ("zeroscope_v2_XL", "unet", "safetensors", {"dtype": "float16"}, 100),
    ("zeroscope_v2_XL", "vae", "safetensors", {"dtype": "float16"}, 100),  # if it has the old names
    ("rv51", "vae", "safetensors", {"dtype": "float16"}, 100),  # and if it has the new ones
    ("zeroscope_v2_XL", "text_encoder", "safetensors", {"dtype": "float16"}, 100),
    ("sd15", "unet", "safetensors", {}, 100),
    ("sd15", "unet", "safetensors", {"variant": "fp16", "dtype": "float16"}, 100),
    ("sd15", "vae", "safetensors", {}, 100),  # old names in one file
    ("sd15", "vae", "safetensors", {"variant": "fp16", "dtype": "float16"}, 100),  # and new ones in the other
    ("sd15", "text_encoder", "safetensors", {}, 100),
    ("sd15", "text_encoder", "safetensors", {"variant": "fp16", "dtype": "float16"}, 100),
    ("rv51", "text_encoder", "safetensors", {"dtype": "float16"}, 100),
    ("adapter-v1-5", "motion_adapter", "safetensors", {}, 100),
    ("adapter-v1-5-2", "motion_adapter", "bin", {}, 100),
    ("adapter-v1-5-2", "motion_adapter", "safetensors", {"variant": "fp16", "dtype": "float16"}, 100),
    ("adapter-v1-5-3", "motion_adapter", "safetensors", {"variant": "fp16", "dtype": "float16"}, 100),
    ("adapter-sdxl-beta", "motion_adapter", "safetensors", {"variant": "fp16", "dtype": "float16"}, 100),
    # 1299 MiB become 649: those, up to 256 of the file that are not let go yet, one tensor of 193 and its cast of 97
    ("ms-1.7b", "text_encoder", "safetensors", {"dtype": "float16"}, 649 + 256 + 193 + 97 + 100),
]

LOADER = """
import json, sys, time, torch
from minit2v.models.clip import CLIPTextModel
from minit2v.models.unet2d import UNet2DConditionModel
from minit2v.models.unet3d import UNet3DConditionModel
from minit2v.models.unet_motion import MotionAdapter
from minit2v.models.vae import AutoencoderKL

def peak():  # in MiB; getrusage would count what the parent had when it forked
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) / 1024

before = peak()
for cls, folder, options in json.loads(sys.argv[1]):
    clock = time.process_time()
    net = vars()[cls].from_pretrained(folder, **options)
    seconds = time.process_time() - clock
    assert not any(p.is_meta for p in net.parameters()) and not net.training
    assert all(p.requires_grad for p in net.parameters())
    parameters = sum(p.numel() for p in net.parameters())
    del net
    heavy = [m for m in ("torch._dynamo", "triton", "diffusers", "transformers", "huggingface_hub") if m in sys.modules]
    print(json.dumps([peak() - before, seconds, parameters, heavy]), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_full_size(tmp_path, manifest, published_config, published_class):
    """The published shapes around zeros: strict, in seconds, and mapped where no cast is asked for.

    One process loads all, the one that needs memory last: its peak is the peak of all before.
    """
    jobs, sizes = [], []
    for n, (repo, part, kind, options, _) in enumerate(FULL_SIZE):
        variant = f".{options['variant']}" if "variant" in options else ""
        clip = "model" if kind == "safetensors" else "pytorch_model"
        stem = clip if part == "text_encoder" else "diffusion_pytorch_model"
        folder = tmp_path / str(n) / part
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(published_config(repo, part)))
        write = write_sparse_bin if kind == "bin" else write_sparse_safetensors
        tensors = manifest(f"{repo}/{part}{variant}")
        write(folder / f"{stem}{variant}.{kind}", tensors)
        jobs.append((published_class(f"{repo}/{part}"), str(folder.parent), {"subfolder": part, **options}))
        buffers = ("position_ids", "pos_embed.pe")
        sizes.append(sum(math.prod(shape) for name, (shape, _) in tensors.items() if not name.endswith(buffers)))
    done = subprocess.run([sys.executable, "-c", LOADER, json.dumps(jobs)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = [json.loads(row) for row in done.stdout.splitlines()]
    print(*zip(seen, FULL_SIZE, strict=True), sep="\n")
    for (mib, seconds, parameters, heavy), size, (*_, limit) in zip(seen, sizes, FULL_SIZE, strict=True):
        assert parameters == size and not heavy
        assert mib < limit and seconds < 20


# ----------------------------------------------------------------------------------------------------- files and dtypes


def test_roundtrip_in_every_form(tiny):
    net, folder = tiny
    add_bin(net, folder)
    net.half().save_pretrained(folder, variant="fp16")
    net = Tiny.from_pretrained(folder)
    assert same(Tiny.from_pretrained(folder, use_safetensors=False), net)
    assert Tiny.from_pretrained(folder, variant="fp16").dtype == torch.float32, "no dtype given means float32"
    half = Tiny.from_pretrained(folder, variant="fp16", dtype="float16")
    assert half.dtype == torch.float16 and same(half, Tiny.from_pretrained(folder, torch_dtype=torch.float16))
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    written = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert sorted(written) == ["conv_in.bias", "conv_in.weight", "conv_out.bias", "conv_out.weight"]
    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}, "without it transformers refuses the file"
    config = json.loads((folder / "config.json").read_text())
    assert config["_class_name"] == "Tiny" and config["dim"] == 5 and config["kernel"] == [3, 3]


def test_safetensors_come_first_and_bin_without_them(tiny):
    net, folder = tiny
    other = Tiny(dim=5)
    add_bin(other, folder)
    assert same(Tiny.from_pretrained(folder), net)
    assert same(Tiny.from_pretrained(folder, use_safetensors=False), other)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    assert same(Tiny.from_pretrained(folder), other)
    with pytest.raises(FileNotFoundError) as error:
        Tiny.from_pretrained(folder, use_safetensors=True)
    assert "has no diffusion_pytorch_model.safetensors; the weights there: diffusion_pytorch_model.bin" in line(error)


def test_a_variant_that_is_not_there(tiny):
    _, folder = tiny
    with pytest.raises(FileNotFoundError) as error:
        Tiny.from_pretrained(folder.parent, subfolder="tiny", variant="fp16")
    assert line(error) == (
        f"{folder} has no diffusion_pytorch_model.fp16.safetensors or diffusion_pytorch_model.fp16.bin; "
        "the weights there: diffusion_pytorch_model.safetensors"
    )


def test_transformers_file_names(tmp_path, randomize_):
    net = randomize_(CLIPTextModel(hidden_size=8, num_attention_heads=2, intermediate_size=12, num_hidden_layers=1,
                                   vocab_size=11, max_position_embeddings=5))  # fmt: skip
    net.save_pretrained(tmp_path)
    net.save_pretrained(tmp_path, safe_serialization=False, variant="fp16")
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "pytorch_model.fp16.bin"]
    assert same(CLIPTextModel.from_pretrained(tmp_path), net)
    assert same(CLIPTextModel.from_pretrained(tmp_path, variant="fp16"), net)


@pytest.mark.parametrize("names", ["{s}.fp16-{n}.safetensors", "{s}-{n}.fp16.safetensors"])
def test_shards(tiny, names):
    net, folder = tiny
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    paths = []
    for n, keys in enumerate((["conv_in.weight"], ["conv_in.bias", "conv_out.bias"], ["conv_out.weight"]), 1):
        paths.append(folder / names.format(s="diffusion_pytorch_model", n=f"{n:05}-of-00003"))
        save_file({k: state[k] for k in keys}, paths[-1])
    assert same(Tiny.from_pretrained(folder, variant="fp16"), net)
    save_file({"conv_in.weight": state["conv_in.weight"]}, paths[1])
    with pytest.raises(ValueError, match="repeats 'conv_in.weight'"):
        Tiny.from_pretrained(folder, variant="fp16")
    paths[1].unlink()
    with pytest.raises(FileNotFoundError, match="no more than 2 of the 3 shards"):
        Tiny.from_pretrained(folder, variant="fp16")


def test_overrides_reach_the_config_and_unknown_ones_are_named(tiny):
    _, folder = tiny
    assert Tiny.from_pretrained(folder, scale=3.0).config.scale == 3.0
    for wrong, right in (("scael", "scale"), ("varient", "variant")):
        with pytest.raises(TypeError) as error:
            Tiny.from_pretrained(folder, **{wrong: 3.0})
        assert line(error) == f"Tiny.from_pretrained() has no argument {wrong!r} (nearest: {right!r})"
    with pytest.raises(ValueError, match="config.json: TinyConfig: scale must be float, not 'big'"):
        Tiny.from_pretrained(folder, scale="big")


def test_old_headers_leave_tensors_unaligned(tiny):
    """safetensors of early 2023 padded wrongly, so that float32 may begin at any byte; the official files are of it."""
    net, folder = tiny
    path = folder / "diffusion_pytorch_model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8 : 8 + size])).encode()
    for pad in range(8):
        text = header + b" " * pad
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
        again = Tiny.from_pretrained(folder)
        assert same(again, net)
        x = torch.randn(7, 5)
        torch.testing.assert_close(again.last(again.first(x)), net.last(net.first(x)), rtol=1e-6, atol=1e-6)


def test_extra_axes_of_size_one_are_taken_off(tiny):
    net, folder = tiny
    path = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file({**state, "conv_out.weight": state["conv_out.weight"][..., None, None].contiguous()}, path)
    assert same(Tiny.from_pretrained(folder), net)
    save_file({**state, "conv_in.weight": state["conv_in.weight"][..., None].contiguous()}, path)
    with pytest.raises(ValueError, match=r"1 of another shape \('conv_in.weight' is \(4, 5, 1\), not \(4, 5\)\)"):
        Tiny.from_pretrained(folder)


def test_a_network_that_is_saved_over_its_own_mapped_file(tiny):
    net, folder = tiny
    again = Tiny.from_pretrained(folder)
    again.save_pretrained(folder)
    assert same(again, net) and same(Tiny.from_pretrained(folder), net)


def test_saved_files_are_as_readable_as_any_other(tiny, tmp_path):
    net, _ = tiny
    net.save_pretrained(tmp_path / "saved")
    (tmp_path / "other").touch()
    assert {p.stat().st_mode for p in (tmp_path / "saved").iterdir()} == {(tmp_path / "other").stat().st_mode}


def test_training_a_mapped_network_leaves_the_file_alone(tiny):
    net, folder = tiny
    again = Tiny.from_pretrained(folder)
    with torch.no_grad():
        for p in again.parameters():
            p += 1
    assert same(Tiny.from_pretrained(folder), net)


# -------------------------------------------------------------------------------------------------------- what is wrong


def test_all_that_does_not_fit_in_one_error(tiny):
    _, folder = tiny
    path = folder / "diffusion_pytorch_model.safetensors"
    shapes = {"conv_in.weigth": (4, 5), "conv_in.bias": (3,), "conv_out.weight": (5, 4), "conv_out.bias": (5,),
              "conv_out.scale": (1,), "ema": (1,)}  # fmt: skip
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    with pytest.raises(ValueError) as error:
        Tiny.from_pretrained(folder)
    assert line(error) == (
        f"{path} does not fit Tiny: 1 missing ('conv_in.weight'); "
        "3 unknown ('conv_in.weigth' (nearest: 'conv_in.weight'), "
        "'conv_out.scale' (nearest: 'conv_in.weight'), 'ema'); "
        "1 of another shape ('conv_in.bias' is (3,), not (4,))"
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"conv_in.bias": None}, "1 missing ('conv_in.bias')"),
        ({"conv_in.bias_ema": (4,)}, "1 unknown ('conv_in.bias_ema')"),
        ({"conv_in.bias": (1,)}, "1 of another shape ('conv_in.bias' is (1,), not (4,))"),
        ({f"{n}": (1,) for n in range(5)}, "5 unknown ('0', '1', '2', ...)"),
    ],
)
def test_one_thing_that_does_not_fit(tiny, change, says):
    _, folder = tiny
    path = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(path) | {name: None if shape is None else torch.zeros(shape) for name, shape in change.items()}
    save_file({name: x for name, x in state.items() if x is not None}, path)
    with pytest.raises(ValueError) as error:
        Tiny.from_pretrained(folder)
    assert line(error) == f"{path} does not fit Tiny: {says}"


def test_two_names_for_one_parameter(tmp_path, randomize_):
    net = randomize_(AutoencoderKL(block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
                                   up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=2))
    net.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    name = "encoder.mid_block.attentions.0.to_q.weight"
    save_file({**state, name.replace("to_q", "query"): state[name].clone()}, path)
    with pytest.raises(ValueError) as error:
        AutoencoderKL.from_pretrained(tmp_path)
    assert str(path) in line(error) and "query.weight" in line(error) and "to_q.weight" in line(error)


class Malicious:
    """Pickles as a call that makes a file in the working directory."""

    def __reduce__(self):
        return os.system, ("touch it-ran",)


def broken_files(whole: bytes, state: dict) -> dict[str, tuple[str, bytes | Any, str]]:
    """name -> (suffix, content, what the error says)."""
    return {
        "empty": ("safetensors", b"", "is empty"),
        "truncated": ("safetensors", whole[:-7], "is broken (.* bytes): .*"),
        "too long": ("safetensors", whole + b"0", "is broken (.* bytes): .*"),
        "half a header": ("safetensors", whole[:40], "is broken (40 bytes): .*"),
        "header of noise": ("safetensors", b"\x10" + bytes(7) + b"#" * 64, "is broken (72 bytes): .*"),
        "web page": ("safetensors", b"\n<!DOCTYPE html><html></html>", "is a web page, not weights: .*"),
        "pointer": ("safetensors", b"version https://git-lfs.github.com/spec/v1\noid", "is a git-lfs pointer, .*"),
        "empty pickle": ("bin", b"", "is empty"),
        "noise pickle": ("bin", b"weights" * 9, "is broken (63 bytes): .*"),
        "pointer pickle": ("bin", b"version https://git-lfs.github.com/spec/v1", "is a git-lfs pointer, .*"),
        "code": ("bin", {**state, "x": Malicious()}, "is refused: its pickle imports .*system, .*"),
        "a list": ("bin", [1], "holds a list, not tensors by name"),
        "something more": ("bin", {**state, "steps": 3}, "holds more than weights: 'steps' is .*global_step.*"),
    }


@pytest.mark.parametrize("which", broken_files(b"", {}))
def test_files_that_are_no_weights(tiny, which, monkeypatch):
    _, folder = tiny
    monkeypatch.chdir(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    whole, state = path.read_bytes(), load_file(path)
    path.unlink()
    suffix, content, says = broken_files(whole, {name: x.clone() for name, x in state.items()})[which]
    path = path.with_suffix(f".{suffix}")
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError) as error:
        Tiny.from_pretrained(folder)
    says = says.replace("(", r"\(").replace(")", r"\)")
    assert re.fullmatch(f"{re.escape(str(path))} {says}", line(error)), line(error)
    assert not (folder / "it-ran").exists()


def test_a_truncated_pickle(tiny):
    net, folder = tiny
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    net.save_pretrained(folder, safe_serialization=False)
    path = folder / "diffusion_pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError) as error:
        Tiny.from_pretrained(folder)
    assert f"{path} is broken" in line(error)


def test_what_torch_wrote_before_it_wrote_zip_files(tiny, monkeypatch):
    net, folder = tiny
    monkeypatch.chdir(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    path = folder / "diffusion_pytorch_model.bin"
    torch.save(net.diffusers_state_dict(), path, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    assert same(Tiny.from_pretrained(folder), net)
    path.write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(ValueError) as error:
        Tiny.from_pretrained(folder)
    assert "is refused" in line(error) or "is broken" in line(error)
    assert not (folder / "it-ran").exists()


@pytest.mark.parametrize(
    ("value", "dtype", "says"),
    [
        (float("nan"), "float16", "'conv_in.bias' holds NaN or infinity"),
        (float("-inf"), "bfloat16", "'conv_in.bias' holds NaN or infinity"),
        (1e6, "float16", "'conv_in.bias' does not fit torch.float16: its largest value is 1e\\+06"),
    ],
)
def test_what_is_not_finite_is_found_in_the_cast(tiny, value, dtype, says):
    net, folder = tiny
    with torch.no_grad():
        net.first.bias[2] = value
    net.save_pretrained(folder)
    with pytest.raises(ValueError, match=says) as error:
        Tiny.from_pretrained(folder, dtype=dtype)
    assert "diffusion_pytorch_model.safetensors: " in line(error)
    mapped = Tiny.from_pretrained(folder)
    assert first_nonfinite(mapped) == (None if value == 1e6 else "conv_in.bias")


def test_first_nonfinite_of_any_module():
    module = nn.Linear(2, 2)
    assert first_nonfinite(module) is None
    with torch.no_grad():
        module.bias[0] = float("inf")
    assert first_nonfinite(module) == "bias"


def test_a_hidden_buffer_is_found(tiny):
    class Hidden(Tiny):
        def __init__(self, config=None, **given):
            super().__init__(config, **given)
            self.register_buffer("table", torch.zeros(3), persistent=False)

    Hidden.__name__ = "Tiny"
    with pytest.raises(RuntimeError, match="table has no values after loading"):
        Hidden.from_pretrained(tiny[1])


def test_config_files_that_are_none(tiny):
    _, folder = tiny
    for text, says in (("{", "is not JSON"), ("[]", "holds a list, not an obj"), ('{"dim": "5"}', "dim must be int")):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=says) as error:
            Tiny.from_pretrained(folder)
        assert str(folder / "config.json") in line(error)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError) as error:
        Tiny.from_pretrained(folder)
    assert line(error) == f"{folder} has no config.json; the files there: diffusion_pytorch_model.safetensors"


def test_paths_that_lead_nowhere(tiny):
    _, folder = tiny
    for path in ("no-such-folder", "/no/such/folder", "./x/y", "a/b/c", "~/no-such-folder-here", ""):
        with pytest.raises((FileNotFoundError, ValueError)) as error:
            Tiny.from_pretrained(path) if path else Tiny.from_pretrained(Path("no-such"))
        assert line(error).startswith("there is no folder")
    with pytest.raises(FileNotFoundError) as error:
        Tiny.from_pretrained(folder.parent, subfolder="unet")
    assert line(error) == f"{folder.parent}/unet does not exist; the folders there: tiny"
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors"):
        Tiny.from_pretrained(folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="is a file: from_pretrained reads a folder"):
        Tiny.from_pretrained(folder / "diffusion_pytorch_model.safetensors", subfolder="unet")
    (folder.parent / "model_index.json").write_text("{}")
    with pytest.raises(FileNotFoundError) as error:
        Tiny.from_pretrained(folder.parent)
    assert line(error) == f"{folder.parent} is a complete pipeline: pass subfolder= for one of its parts"


# --------------------------------------------------------------------------------------------------------------- saving


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    """The limit on a file's size stands for the disk's: both make `write` fail in the middle."""
    net = Tiny(dim=20_000)
    net.save_pretrained(tmp_path)
    before = (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for safe, name in ((True, "diffusion_pytorch_model.safetensors"), (False, "diffusion_pytorch_model.bin")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(OSError) as error:
                Tiny(dim=20_000).save_pretrained(tmp_path, safe_serialization=safe)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert line(error).startswith(f"cannot write {tmp_path / name}: ")
    assert sorted(os.listdir(tmp_path)) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_a_folder_that_cannot_be_made(tiny, tmp_path):
    net, folder = tiny
    with pytest.raises(OSError) as error:
        net.save_pretrained(folder / "config.json" / "x")
    assert line(error).startswith(f"cannot write {folder / 'config.json' / 'x'}")
    with pytest.raises(OSError, match="cannot write"):
        Tiny.from_config(net.config).to("meta").save_pretrained(tmp_path / "meta")
    assert not any((tmp_path / "meta").glob("*"))


def test_nothing_of_a_config_is_lost_on_the_way(tmp_path):
    net = Tiny(TinyConfig(dim=2, widths=(4, 5, 6), scale=0.1, size=(3, 4)))
    net.save_pretrained(tmp_path)
    again = Tiny.from_pretrained(tmp_path).config
    assert again == net.config
    assert all(type(getattr(again, f.name)) is type(getattr(net.config, f.name)) for f in fields(again))


# --------------------------------------------------------------------------------------------------- a hub of our own


class Hub(http.server.ThreadingHTTPServer):
    """The part of the hub's interface that downloads use, over a dict of folders; it notes which files were sent."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repos: dict[str, Path] = {}
        self.errors: dict[str, tuple[int, str]] = {}
        self.secret: str | None = None
        self.sent: list[str] = []
        self.asked: list[str] = []
        self.stall: set[str] = set()
        self.gated: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def reply(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        repo = r"([^/]+/[^/]+)"
        m = re.fullmatch(rf"/api/models/{repo}(?:/(revision|tree)/(.+))?|/{repo}/resolve/([0-9a-f]+)/(.+)", path)
        if not m:
            return self.reply(404)
        repo, what, revision = m[1] or m[4], m[2] or ("revision" if m[1] else "file"), m[3] or m[5] or "main"
        self.server.asked.append(f"{what} {repo} {revision}")
        if repo in self.server.errors:
            code, name = self.server.errors[repo]
            return self.reply(code, X_Error_Code=name)
        if repo not in self.server.repos or (
            self.server.secret and self.headers.get("Authorization") != f"Bearer {self.server.secret}"
        ):
            return self.reply(404, X_Error_Code="RepoNotFound")
        commits = {"main": "a" * 40, "refs/pr/15": "b" * 40, "a" * 40: "a" * 40, "b" * 40: "b" * 40}
        if revision not in commits:
            return self.reply(404, X_Error_Code="RevisionNotFound")
        folder, commit = self.server.repos[repo], commits[revision]
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        names = [p.relative_to(folder).as_posix() for p in files]
        if what == "revision":
            info = {"id": repo, "modelId": repo, "sha": commit, "siblings": [{"rfilename": n} for n in names]}
            return self.reply(200, json.dumps(info).encode(), Content_Type="application/json")
        if what == "tree":
            tree = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": f"{len(n):040}"}
                    for n, p in zip(names, files, strict=True)]  # fmt: skip
            return self.reply(200, json.dumps(tree).encode(), Content_Type="application/json")
        if m[6] not in names:
            return self.reply(404, X_Error_Code="EntryNotFound")
        if m[6] in self.server.gated:
            return self.reply(403, X_Error_Code="GatedRepo")
        if self.command == "GET":
            if m[6] in self.server.stall:
                return self.reply(500)
            self.server.sent.append(m[6])
        body = (folder / m[6]).read_bytes()
        return self.reply(200, body, ETag=f'"{repo.replace("/", "-")}-{m[6].replace("/", "-")}"', X_Repo_Commit=commit)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on the loopback that huggingface_hub believes to be the hub, with its cache in tmp_path."""
    import huggingface_hub.file_download  # noqa: F401  (brings all modules that hold a copy of these constants)
    import huggingface_hub.hf_api  # noqa: F401

    for name in ("no_proxy", "NO_PROXY"):  # a proxy does not reach the loopback
        monkeypatch.setenv(name, "127.0.0.1")
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    constants = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
    }
    for module in [m for name, m in sys.modules.items() if name.startswith("huggingface_hub.")]:
        for name in constants.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, constants[name])
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def repository(hub, tmp_path):
    """owner/name on the hub: an official folder with a Tiny as its UNet, in every form, and much that nobody needs."""
    torch.manual_seed(1)
    folder = tmp_path / "served"
    net = Tiny(dim=2)
    net.save_pretrained(folder / "unet")
    add_bin(net, folder / "unet")
    net.half().save_pretrained(folder / "unet", variant="fp16")
    net.save_pretrained(folder / "safety_checker")
    (folder / "model_index.json").write_text('{"_class_name": "TextToVideoSDPipeline"}')
    (folder / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "logo.png"):
        (folder / "tokenizer" / name).write_text("{}")
    hub.repos["owner/name"] = folder
    return folder


def test_of_a_repository_only_what_is_needed_is_fetched(hub, repository):
    net = Tiny.from_pretrained("owner/name", subfolder="unet", variant="fp16", dtype="fp16")
    assert same(net, Tiny.from_pretrained(repository, subfolder="unet", variant="fp16", dtype="fp16"))
    assert sorted(hub.sent) == ["unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors"]
    Tiny.from_pretrained("owner/name", subfolder="unet", variant="fp16", dtype="fp16")
    assert len(hub.sent) == 2, "the second time everything is in the cache"
    assert read_json("owner/name", "model_index.json") == {"_class_name": "TextToVideoSDPipeline"}
    folder, names = find_folder("owner/name", "tokenizer")
    assert sorted(names) == ["merges.txt", "tokenizer_config.json", "vocab.json"]
    assert all((folder / name).is_file() for name in names) and not (folder / "logo.png").exists()
    Tiny.from_pretrained("owner/name", subfolder="unet", force_download=True)
    assert hub.sent.count("unet/config.json") == 2


def test_a_whole_pipeline_of_a_repository(hub, tmp_path, make_official_folder):
    """The index first, then of each part what is needed: no other variant, no pickle beside safetensors."""
    from minit2v import DiffusionPipeline

    folder = make_official_folder(tmp_path / "served", "ms-1.7b", small=True)
    wanted = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    make_official_folder(folder, "ms-1.7b", variant="fp16", small=True)
    for name in ("unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "safety_checker/config.json",
                 "safety_checker/model.safetensors", "README.md", "text-to-video.ckpt"):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not needed")
    hub.repos["owner/video"] = folder
    pipe = DiffusionPipeline.from_pretrained("owner/video")
    assert hub.sent[0] == "model_index.json"
    assert set(hub.sent) == wanted and len(hub.sent) == len(wanted)
    local = DiffusionPipeline.from_pretrained(folder)
    assert all(same(getattr(pipe, part), getattr(local, part)) for part in NETWORKS)
    asked = len(hub.asked)
    again = DiffusionPipeline.from_pretrained("owner/video", local_files_only=True)
    assert same(again.unet, pipe.unet) and len(hub.asked) == asked


def test_animatediff_of_two_repositories(hub, tmp_path, make_official_folder, make_adapter_folder):
    """An image model and a motion adapter, each by its id, which tells that an adapter of 32 positions is version 1."""
    from minit2v import AnimateDiffPipeline, MotionAdapter

    base = hub.repos["owner/image-model"] = make_official_folder(tmp_path / "base", "sd15", small=True)
    wanted = {p.relative_to(base).as_posix() for p in base.rglob("*") if p.is_file()}
    (base / "safety_checker").mkdir()
    (base / "safety_checker/model.safetensors").write_bytes(b"not needed")
    (base / "v1-5-pruned.ckpt").write_bytes(b"not needed")
    name = "guoyww/animatediff-motion-adapter-v1-5"
    hub.repos[name] = make_adapter_folder(tmp_path, "v1-5", motion_max_seq_length=32)
    adapter = MotionAdapter.from_pretrained(name)
    assert sorted(hub.sent) == ["config.json", "diffusion_pytorch_model.safetensors"]
    hub.sent.clear()
    pipe = AnimateDiffPipeline.from_pretrained("owner/image-model", motion_adapter=adapter)
    assert set(hub.sent) == wanted and len(hub.sent) == len(wanted)
    assert adapter.config.resnet_norms == pipe.unet.config.resnet_norms == "video"
    local = AnimateDiffPipeline.from_pretrained(base, motion_adapter=MotionAdapter.from_pretrained(hub.repos[name]))
    assert all(same(getattr(pipe, part), getattr(local, part)) for part in NETWORKS)


@pytest.mark.parametrize("how", ["keywords", "owner/name/file", "address", "a file alone"])
def test_an_ip_adapter_and_its_image_encoder(hub, tmp_path, make_official_folder, make_adapter_folder, make_ip_adapter,
                                             how):  # fmt: skip
    """Of h94's repository the file and the encoder beside it; the encoder also for a file that lies here alone."""
    from minit2v import AnimateDiffPipeline, MotionAdapter

    base = make_official_folder(tmp_path / "base", "sd15", small=True)
    adapter = MotionAdapter.from_pretrained(make_adapter_folder(tmp_path, "v1-5-2"))
    file = make_ip_adapter(tmp_path / "h94" / "models")
    hub.repos["h94/IP-Adapter"] = tmp_path / "h94"
    (file.parent / "ip-adapter-plus_sd15.bin").write_bytes(b"not needed")
    alone = make_ip_adapter(tmp_path / "alone", encoder=False)
    pipe = AnimateDiffPipeline.from_pretrained(base, motion_adapter=adapter)
    encoder = ["models/image_encoder/config.json", "models/image_encoder/model.safetensors"]
    wanted = [f"models/{file.name}", *encoder]
    if how == "keywords":
        pipe.load_ip_adapter("h94/IP-Adapter", subfolder="models", weight_name=file.name)
    elif how == "owner/name/file":
        pipe.load_ip_adapter(f"h94/IP-Adapter/models/{file.name}")
    elif how == "address":
        pipe.load_ip_adapter(f"https://huggingface.co/h94/IP-Adapter/blob/{'a' * 40}/models/{file.name}")
    else:
        pipe.load_ip_adapter(alone)
        wanted = encoder
    assert sorted(hub.sent) == sorted(wanted)
    local = AnimateDiffPipeline.from_pretrained(base, motion_adapter=adapter)
    local.load_ip_adapter(file)
    assert same(pipe.unet, local.unet) and same(pipe.image_encoder, local.image_encoder)

    del hub.repos["h94/IP-Adapter"]
    shutil.rmtree(tmp_path / "cache")
    pipe.unload_ip_adapter()
    with pytest.raises(OSError) as error:
        pipe.load_ip_adapter(alone)
    assert "no image encoder beside it, and the published one cannot be loaded: there is no folder" in line(error)
    pipe.load_ip_adapter(alone, image_encoder_folder=None)


def test_bin_only_repositories_and_revisions(hub, repository):
    for path in (repository / "unet").glob("*.safetensors"):
        path.unlink()
    Tiny.from_pretrained("owner/name", subfolder="unet", revision="refs/pr/15")
    assert sorted(hub.sent) == ["unet/config.json", "unet/diffusion_pytorch_model.bin"]
    assert "revision owner/name refs/pr/15" in hub.asked
    with pytest.raises(FileNotFoundError, match="owner/name has no revision 'v9'"):
        Tiny.from_pretrained("owner/name", subfolder="unet", revision="v9")
    with pytest.raises(FileNotFoundError) as error:
        Tiny.from_pretrained("owner/name", subfolder="unet", variant="fp16")
    assert line(error).startswith("owner/name/unet has no diffusion_pytorch_model.fp16.safetensors or ")
    assert line(error).endswith("; the weights there: diffusion_pytorch_model.bin")


def test_the_cache_without_the_hub(hub, repository, tmp_path):
    with pytest.raises(FileNotFoundError, match="owner/name/unet is not in the cache, and cannot be downloaded"):
        Tiny.from_pretrained("owner/name", subfolder="unet", local_files_only=True)
    assert not hub.asked
    net = Tiny.from_pretrained("owner/name", subfolder="unet", cache_dir=tmp_path / "mine")
    hub.asked.clear()
    again = Tiny.from_pretrained("owner/name", subfolder="unet", local_files_only=True, cache_dir=tmp_path / "mine")
    assert same(net, again) and not hub.asked
    with pytest.raises(FileNotFoundError) as error:
        Tiny.from_pretrained("owner/name", subfolder="unet", variant="fp16", local_files_only=True,
                             cache_dir=tmp_path / "mine")  # fmt: skip
    assert line(error).startswith("the cached copy of owner/name/unet has no diffusion_pytorch_model.fp16.safetensors")


def test_a_hub_that_cannot_be_reached(hub, repository, monkeypatch):
    import huggingface_hub.constants as constants

    net = Tiny.from_pretrained("owner/name", subfolder="unet")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.warns(UserWarning, match="the hub cannot be reached .*owner/name is read from the cache"):
        assert same(Tiny.from_pretrained("owner/name", subfolder="unet"), net)
    with pytest.warns(UserWarning), pytest.raises(FileNotFoundError, match="other/name/unet is not in the cache"):
        Tiny.from_pretrained("other/name", subfolder="unet")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(Tiny.from_pretrained("owner/name", subfolder="unet"), net)


def test_what_the_hub_refuses(hub, repository):
    with pytest.raises(FileNotFoundError) as error:
        Tiny.from_pretrained("owner/nmae", subfolder="unet")
    assert line(error).startswith("there is no folder 'owner/nmae', and no repository of that name on the hub")
    hub.errors["owner/closed"] = (403, "GatedRepo")
    with pytest.raises(OSError) as error:
        Tiny.from_pretrained("owner/closed", subfolder="unet")
    assert line(error).startswith("owner/closed is gated: ")
    hub.gated.add("unet/config.json")  # what the hub does: it lists the files and keeps them
    with pytest.raises(OSError) as error:
        Tiny.from_pretrained("owner/name", subfolder="unet")
    assert line(error).startswith("owner/name is gated: ")
    hub.gated.clear()
    with pytest.raises(ValueError) as error:
        Tiny.from_pretrained("owner/na..me", subfolder="unet")
    assert line(error).startswith("'owner/na..me' is neither a folder nor a hub id: ")
    with pytest.raises(FileNotFoundError) as error:
        Tiny.from_pretrained("owner/name", subfolder="unte")
    assert line(error) == "owner/name/unte does not exist; the folders there: safety_checker, tokenizer, unet"
    with pytest.raises(FileNotFoundError, match="owner/name is a complete pipeline: pass subfolder="):
        Tiny.from_pretrained("owner/name")
    hub.secret = "hf_secret"
    with pytest.raises(FileNotFoundError, match="a private one needs token="):
        Tiny.from_pretrained("owner/name", subfolder="unet")
    Tiny.from_pretrained("owner/name", subfolder="unet", token="hf_secret")
    assert "hf_secret" not in line(error)


def test_a_download_that_fails(hub, repository, tmp_path, monkeypatch):
    hub.stall.add("unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(OSError) as error:
        Tiny.from_pretrained("owner/name", subfolder="unet")
    assert line(error).startswith("downloading owner/name/unet failed: ")
    hub.stall.clear()
    Tiny.from_pretrained("owner/name", subfolder="unet")
    # huggingface_hub before 1.0 answers a line that breaks down with what it has, whole or not
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(OSError, match="downloading owner/name/unet failed: config.json, diffusion_.* did not arrive"):
        Tiny.from_pretrained("owner/name", subfolder="unet")


def test_a_local_folder_wins_over_the_hub(hub, repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").symlink_to(repository)
    Tiny.from_pretrained("owner/name", subfolder="unet")
    assert not hub.asked


@pytest.mark.parametrize("layers", [10**30, [1, 10**9]])
def test_a_wild_number_of_layers_is_refused_before_they_are_made(layers):
    from minit2v.models.unet_motion import MotionAdapter

    with pytest.raises(ValueError, match="motion_transformer_layers_per_block must be at most 64"):
        MotionAdapter.from_config({"motion_transformer_layers_per_block": layers})
