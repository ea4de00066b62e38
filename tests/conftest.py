"""What many tests need: the published files' names and shapes, folders laid out like the official ones, random weights.

The fixtures return functions, because a folder of tests without `__init__.py` cannot be imported from.
"""

import gc
import gzip
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from tqdm import tqdm

from minit2v_convert.sparse import Manifest, write_sparse_safetensors

if "PYTEST_XDIST_WORKER" in os.environ:  # one core for each: threads of two would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# tqdm's own lock is shared with forked processes: a child that is killed while it draws a bar holds it for ever.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0  # and its thread could hold this one at the moment of a fork

# Modules and tests make millions of objects that stay to the end: to look at all of them again and again for garbage
# takes a quarter of the collection, and a twentieth of the tests. See `pytest_collection_finish`.
gc.disable()

DATA = Path(__file__).parent / "data"

# The published architectures, small: every kind of block is there, and no two widths are equal by chance.
SMALL = {
    "UNet3DConditionModel": {
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D"],
        "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D"],
        "attention_head_dim": 8,
        "cross_attention_dim": 24,
        "norm_num_groups": 8,
        "sample_size": 8,
    },
    "UNet2DConditionModel": {
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 4,
        "cross_attention_dim": 24,
        "norm_num_groups": 8,
        "sample_size": 8,
    },
    "MotionAdapter": {
        "block_out_channels": [32, 64],
        "motion_layers_per_block": 1,
        "motion_num_attention_heads": 2,
        "motion_norm_num_groups": 8,
    },
    "AutoencoderKL": {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 16,
    },
    "CLIPTextModel": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "vocab_size": 514 + 4,
    },
}


@cache
def _manifests() -> dict[str, Manifest]:
    return json.loads(gzip.decompress((DATA / "manifests.json.gz").read_bytes()))


@cache
def _configs() -> dict[str, dict[str, dict]]:
    return json.loads((DATA / "configs.json").read_text())


def _randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if p.ndim > 1:  # scaled by the number of inputs: what is of size 1 stays so
                noise = noise * p[0].numel() ** -0.5
            p.copy_(noise if p.ndim > 1 else 0.2 * noise)
        for m in module.modules():
            if "Norm" in type(m).__name__ and getattr(m, "weight", None) is not None:
                m.weight += 1
    return module


def _class_of(config: dict) -> str:
    return config.get("_class_name") or config["architectures"][0]


def _write_small(folder: Path, variant: str | None, seed: int) -> None:
    """Random weights beside a config.json, which keeps its published wording."""
    import minit2v

    config = (folder / "config.json").read_text()
    cls = getattr(minit2v, _class_of(json.loads(config)))
    model = _randomize(cls.from_config(json.loads(config)), seed)
    model.to(torch.float16 if variant == "fp16" else torch.float32)
    model.save_pretrained(folder, variant=variant)
    (folder / "config.json").write_text(config)


def _bytes_to_unicode() -> list[str]:
    """The printable stand-ins of the 256 bytes in byte-level BPE, in the order of CLIP's vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return [chr(b) for b in shown] + [chr(256 + n) for n in range(len(hidden))]


def _write_tiny_vocabulary(folder: Path) -> None:
    """vocab.json and merges.txt like CLIP's: 256 bytes, 256 word ends, four merges, two special tokens."""
    letters = _bytes_to_unicode()
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
    tokens = [*letters, *(c + "</w>" for c in letters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))


def pytest_configure(config: pytest.Config) -> None:
    """A worker that ends is replaced once: xdist runs the test that ended it again in every new one."""
    if getattr(config.option, "maxworkerrestart", "") is None:
        config.option.maxworkerrestart = "1"
    if hasattr(config.option, "loadscopereorder"):  # xdist would start the files with the fewest tests last
        config.option.loadscopereorder = False


# The files that take the longest, some with a single test: at the end, one worker would wait for the other.
LONGEST = ("test_kernels", "test_memory", "test_trainer", "test_parallel", "test_resources", "test_lessons")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(5000, 10, 20)  # a network is thousands of objects: by default each looks for garbage many times
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _kept_memory() -> Iterator[None]:
    """What a plan sets for the whole process would make all later tests slower."""
    from minit2v.pipelines import memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "return_freed_memory", lambda: False)
        yield


def _default_signals() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


@pytest.fixture(scope="session")
def default_signals() -> Callable[[], None]:
    """For `preexec_fn` of a child that gets signals: whoever runs the tests in the background has them ignored."""
    return _default_signals


class _Forked:
    """A child of this process that runs `function`: no start of an interpreter, no import. Its streams are one pipe."""

    def __init__(self, function: Callable[[], object]):
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(read)
            os.dup2(write, 1)
            os.dup2(write, 2)
            sys.stdout = sys.stderr = open(write, "w", buffering=1, encoding="utf-8")
            _default_signals()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = 0
            try:
                function()
            except SystemExit as end:
                code = end.code
            except BaseException:
                traceback.print_exc()
                code = 1
            finally:
                sys.stdout.flush()
                os._exit(code)  # none of what pytest would do at its own end
        os.close(write)
        self.said = open(read, "rb")  # noqa: SIM115

    def wait(self) -> tuple[int, str]:
        """(exit code, or minus the signal that ended it; what it has said since the last line that was read)."""
        with self.said:
            rest = self.said.read().decode()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), rest


@pytest.fixture(scope="session")
def forked() -> type[_Forked]:
    """forked(function) -> a child that runs it, with default signals: `pid`, `said` (its output), `wait()`."""
    return _Forked


@pytest.fixture(scope="session")
def manifest() -> Callable[[str], Manifest]:
    """manifest("ms-1.7b/unet") -> {diffusers' name: (shape, dtype)}: what is inside the published files.

    Repositories ms-1.7b, zeroscope_v2_576w, zeroscope_v2_XL, sd15, rv51 with parts unet, vae, text_encoder, and
    adapter-v1-5, adapter-v1-5-2, adapter-v1-5-3, adapter-sdxl-beta, animatelcm with part motion_adapter; `.fp16` behind
    the part for the variant, where there is one.
    """
    return lambda name: {key: (tuple(shape), dtype) for key, (shape, dtype) in _manifests()[name].items()}


@pytest.fixture(scope="session")
def manifest_names() -> list[str]:
    return sorted(_manifests())


@pytest.fixture(scope="session")
def small_configs() -> dict[str, dict]:
    """The fields of small networks by the name of their class; not to be changed."""
    return SMALL


@pytest.fixture(scope="session")
def published_config() -> Callable[[str, str], dict]:
    """published_config("ms-1.7b", "unet") -> the published JSON; or by path: "tokenizer/special_tokens_map.json"."""

    def config(repo: str, part: str) -> dict:
        files = _configs()[repo]
        for path in (part, f"{part}/config.json", f"{part}/scheduler_config.json", f"{part}/tokenizer_config.json"):
            if path in files:
                return json.loads(json.dumps(files[path]))
        raise KeyError(f"{repo} has {sorted(files)}, not {part!r}")

    return config


@pytest.fixture(scope="session")
def published_class() -> Callable[[str], str]:
    """published_class("sd15/unet.fp16") -> "UNet2DConditionModel": of what network a manifest is."""

    def name_of(name: str) -> str:
        repo, part = name.removesuffix(".fp16").split("/")
        return _class_of(_configs()[repo][f"{part}/config.json"])

    return name_of


@pytest.fixture(scope="session")
def randomize_() -> Callable[..., nn.Module]:
    """randomize_(module, seed=0): every parameter random, norms around 1, activations of size 1 stay of size 1."""
    return _randomize


@pytest.fixture(scope="session")
def write_tiny_vocabulary() -> Callable[[Path], None]:
    """write_tiny_vocabulary(folder): a CLIP vocabulary of 518 tokens; "cat" and "dog" are one token each."""
    return _write_tiny_vocabulary


@pytest.fixture(scope="session")
def make_official_folder() -> Callable[..., Path]:
    """make_official_folder(folder, repo="ms-1.7b", variant=None, small=False, **parts) -> folder, as on the hub.

    Full size: sparse files, zero weights, no disk used; parts of which there is no manifest are left out.
    small=True: the same configs with small widths, and random weights written by our own networks; unet=dict(...)
    changes fields of that part's config.
    """

    def make(
        folder: Path, repo: str = "ms-1.7b", variant: str | None = None, small: bool = False, **parts: dict
    ) -> Path:
        for path, content in _configs()[repo].items():
            part = path.split("/")[0]
            if small and path == f"{part}/config.json":
                content = {**content, **SMALL[_class_of(content)], **parts.get(part, {})}
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(json.dumps(content, indent=2))
        _write_tiny_vocabulary(folder / "tokenizer")
        infix = f".{variant}" if variant else ""
        if small:
            for seed, part in enumerate(("unet", "vae", "text_encoder")):
                _write_small(folder / part, variant, seed)
            return folder
        for part, stem in (("unet", None), ("vae", None), ("text_encoder", "model")):
            name = f"{repo}/{part}{infix}"
            if name in _manifests():
                file = f"{stem or 'diffusion_pytorch_model'}{infix}.safetensors"
                write_sparse_safetensors(folder / part / file, _manifests()[name])
        return folder

    return make


# The published IP-Adapters, small: names as theirs, for the small UNet, whose attentions to the text are 32, 32, 32, 64
# wide. Pictures of 28 x 28, of which CLIP makes 17 states of width 40, or one vector of width 20.
SMALL_ENCODER = dict(hidden_size=40, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=28,
                     patch_size=7, projection_dim=20)  # fmt: skip
IMAGE_PROJ = {
    "base": {"proj.weight": (96, 20), "proj.bias": (96,), "norm.weight": (24,), "norm.bias": (24,)},
    "full-face": {"proj.0.weight": (40, 40), "proj.0.bias": (40,), "proj.2.weight": (24, 40), "proj.2.bias": (24,),
                  "proj.3.weight": (24,), "proj.3.bias": (24,)},
    "plus": {
        "latents": (1, 5, 48), "proj_in.weight": (48, 40), "proj_in.bias": (48,), "proj_out.weight": (24, 48),
        "proj_out.bias": (24,), "norm_out.weight": (24,), "norm_out.bias": (24,),
        **{f"layers.{i}.{name}": shape for i in range(4) for name, shape in {
            "0.norm1.weight": (48,), "0.norm1.bias": (48,), "0.norm2.weight": (48,), "0.norm2.bias": (48,),
            "0.to_q.weight": (128, 48), "0.to_kv.weight": (256, 48), "0.to_out.weight": (48, 128),
            "1.0.weight": (48,), "1.0.bias": (48,), "1.1.weight": (192, 48), "1.3.weight": (48, 192)}.items()},
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def make_ip_adapter() -> Callable[..., Path]:
    """make_ip_adapter(folder, kind="base", seed=0, encoder=True) -> the file in it, beside a small image_encoder.

    kind: "base", "plus" or "full-face"; every number random, also those of norms. With encoder=False the file alone.
    """

    def make(folder: Path, kind: str = "base", seed: int = 0, encoder: bool = True) -> Path:
        from safetensors.torch import save_file

        from minit2v.models.clip_vision import CLIPVisionModelWithProjection

        folder.mkdir(parents=True, exist_ok=True)
        if encoder and not (folder / "image_encoder").exists():
            _randomize(CLIPVisionModelWithProjection(**SMALL_ENCODER), 7).save_pretrained(folder / "image_encoder")
        shapes = {f"image_proj.{name}": shape for name, shape in IMAGE_PROJ[kind].items()}
        for k, width in enumerate((32, 32, 32, 64)):
            shapes |= {f"ip_adapter.{2 * k + 1}.to_{x}_ip.weight": (width, 24) for x in "kv"}
        generator = torch.Generator().manual_seed(seed)
        state = {name: torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.5)
                 for name, shape in shapes.items()}  # fmt: skip
        save_file(state, folder / f"ip-adapter-{kind}_sd15.safetensors")
        return folder / f"ip-adapter-{kind}_sd15.safetensors"

    return make


@pytest.fixture(scope="session")
def make_adapter_folder() -> Callable[..., Path]:
    """make_adapter_folder(folder, version, **fields) -> folder / the published name, with a small motion adapter.

    version: "v1-5" (24 positions), "v1-5-2" (32 and a mid block) or "v1-5-3" (32).
    """

    def make(folder: Path, version: str, **fields: object) -> Path:
        folder = folder / f"animatediff-motion-adapter-{version}"
        folder.mkdir(parents=True)
        config = {
            "_class_name": "MotionAdapter",
            "_diffusers_version": "0.22.0.dev0",
            "motion_activation_fn": "geglu",
            "motion_attention_bias": False,
            "motion_cross_attention_dim": None,
            "motion_max_seq_length": 24 if version == "v1-5" else 32,
            "motion_mid_block_layers_per_block": 1,
            "use_motion_mid_block": version == "v1-5-2",
            **SMALL["MotionAdapter"],
            **fields,
        }
        (folder / "config.json").write_text(json.dumps(config))
        _write_small(folder, None, seed=3)
        return folder

    return make


@pytest.fixture(scope="module")
def trained_folders(tmp_path_factory, make_official_folder, make_adapter_folder) -> dict[str, Path]:
    """Small models of both families for tests of what is trained: t2v, and sd15 with the motion adapter v2."""
    folder = tmp_path_factory.mktemp("trained")
    return {
        "t2v": make_official_folder(folder / "ms", small=True),
        "sd15": make_official_folder(folder / "sd15", repo="sd15", small=True),
        "v2": make_adapter_folder(folder, "v1-5-2"),
    }
