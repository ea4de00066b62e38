"""Folders of the official models with zeros as weights: all names, shapes, dtypes and configs are the real ones.

They serve for tests and measurements at full size, without a download. They need a few MB on the disk.
"""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minit2v_convert import configs
from minit2v_convert.convert import FAMILIES
from minit2v_convert.rename import inverse, nearest, rename_one
from minit2v_convert.shapes import POSITION_IDS
from minit2v_convert.sparse import Manifest, write_sparse_safetensors
from minit2v_convert.stream import ended_cleanly

from ..files.hub import DIFFUSERS_VERSION, write_json
from ..files.weights import Weightless
from ..models.clip import CLIPTextModel
from ..models.network import Network
from ..models.tokenizer import EOS, CLIPTokenizer
from ..models.unet2d import UNet2DConditionModel
from ..models.unet3d import UNet3DConditionModel
from ..models.unet_motion import MotionAdapter
from ..models.vae import AutoencoderKL
from .files import INDEX

NETWORKS: dict[str, type[Network]] = {
    c.__name__: c for c in (AutoencoderKL, CLIPTextModel, MotionAdapter, UNet2DConditionModel, UNet3DConditionModel)
}


@dataclass(frozen=True)
class OfficialModel:
    """The content of one repository of the hub.

    parts: {folder: config of the network}; "" is the root. dtypes: {variant: dtype}.
    old_vae: the variants in which the VAE's attention has names from before diffusers 0.17.
    position_ids: whether the text encoder has this buffer.
    """

    ids: tuple[str, ...]
    parts: Mapping[str, Mapping[str, Any]]
    dtypes: Mapping[str, str]
    pad_token: str = EOS
    old_vae: tuple[str, ...] = ("", "fp16")
    position_ids: bool = True


SCOPE = {"text_encoder": configs.CLIP_H, "unet": configs.UNET3D, "vae": configs.VAE}
IMAGES = {"text_encoder": configs.CLIP_L, "unet": configs.UNET2D, "vae": configs.VAE}
BOTH, SINGLE, HALF = {"": "F32", "fp16": "F16"}, {"": "F32"}, {"": "F16"}
NO_MID = {**configs.MOTION, "use_motion_mid_block": False}
ADAPTERS = "guoyww/animatediff-motion-adapter-"
MODELS = {
    "ms-1.7b": OfficialModel(("ali-vilab/text-to-video-ms-1.7b", "damo-vilab/text-to-video-ms-1.7b"), SCOPE, BOTH, "!"),
    "zeroscope-v2-576w": OfficialModel(("cerspense/zeroscope_v2_576w",), SCOPE, HALF, "!"),
    "zeroscope-v2-xl": OfficialModel(("cerspense/zeroscope_v2_XL",), SCOPE, HALF, "!"),
    "sd-1.5": OfficialModel(("stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"), IMAGES,
                            BOTH, old_vae=("",)),
    "realistic-vision-v51": OfficialModel(("stablediffusionapi/realistic-vision-v51",), IMAGES, HALF, old_vae=(),
                                          position_ids=False),
    "motion-v1-5": OfficialModel((ADAPTERS + "v1-5",), {"": NO_MID}, SINGLE),
    "motion-v1-5-2": OfficialModel((ADAPTERS + "v1-5-2",), {"": configs.MOTION}, BOTH),
    "motion-v1-5-3": OfficialModel((ADAPTERS + "v1-5-3",), {"": NO_MID}, BOTH),
    "motion-sdxl-beta": OfficialModel((ADAPTERS + "sdxl-beta",),
                                      {"": {**NO_MID, "block_out_channels": [320, 640, 1280]}}, BOTH),
    "animatelcm": OfficialModel(("wangfuyun/AnimateLCM",), {"": configs.MOTION}, SINGLE),
}  # fmt: skip


def find_official_model(name: str) -> OfficialModel:
    """The model with a name in MODELS or a hub id. Raises ValueError, with the nearest name, if it is unknown."""
    for short, model in MODELS.items():
        if name.lower() in (short, *(i.lower() for i in model.ids)):
            return model
    known = [*MODELS, *(i for model in MODELS.values() for i in model.ids)]
    raise ValueError(f"no model {name!r}{nearest(name, known)}; known are {', '.join(MODELS)}, and their hub ids")


def write_blank(name: str, folder: str | Path) -> Path:
    """Writes the folder of an official model, with zeros as weights, and CLIP's tokenizer. Returns its path.

    The folder appears complete or not at all. Raises ValueError if the name is unknown. Raises FileExistsError if
    `folder` is a file, or a folder that is not empty.
    """
    model, folder = find_official_model(name), Path(folder).expanduser()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists, and is not an empty folder: choose another")
    (parent := folder.absolute().parent).mkdir(parents=True, exist_ok=True)
    with ended_cleanly(), tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=parent) as temporary:
        new = Path(temporary) / "new"  # because other users cannot read the temporary folder
        try:
            _write(model, new)
        except OSError as error:
            raise OSError(str(error).replace(str(new), str(folder))) from error
        if folder.exists():
            folder.rmdir()
        os.replace(new, folder)
    return folder


def _write(model: OfficialModel, folder: Path) -> None:
    index: dict[str, Any] = {}
    for part, config in model.parts.items():
        network = NETWORKS[config.get("_class_name") or config["architectures"][0]]
        write_json(folder / part / "config.json", {**_head(network), **config})
        for variant, dtype in model.dtypes.items():
            file = f"{network.weights_name}{f'.{variant}' if variant else ''}.safetensors"
            names = manifest(network, config, dtype, model.position_ids, variant in model.old_vae)
            write_sparse_safetensors(folder / part / file, names)
        index[part] = ["transformers" if network is CLIPTextModel else "diffusers", network.__name__]
    if "unet" not in model.parts:
        return
    family = FAMILIES[index["unet"][1]]
    write_json(folder / "scheduler" / "scheduler_config.json", family.scheduler)
    tokenizer = CLIPTokenizer.clip(model.pad_token)
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "tokenizer.json").unlink()  # 2 MB with the same content; the official folders have none
    index["scheduler"] = ["diffusers", family.scheduler["_class_name"]]
    index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    head = {"_class_name": family.pipeline, "_diffusers_version": DIFFUSERS_VERSION}
    write_json(folder / INDEX, {**head, **dict(sorted(index.items()))})


def _head(network: type[Network]) -> dict[str, str]:
    return {} if network.head else {"_diffusers_version": DIFFUSERS_VERSION}


def manifest(
    network: type[Network], config: Mapping[str, Any], dtype: str, position_ids: bool, old_vae: bool
) -> Manifest:
    """{diffusers' name: (shape, dtype)} for a network's file."""
    with torch.device("meta"), Weightless():
        model = network.from_config(config)
    names = {name: (tuple(x.shape), dtype) for name, x in model.diffusers_state_dict().items()}
    if position_ids and network is CLIPTextModel:
        return {POSITION_IDS: ((1, model.config.max_position_embeddings), "I64"), **names}
    if old_vae and network is AutoencoderKL:
        before = inverse(network.layout.aliases)
        return {(rename_one(name, before) or (name,))[0]: value for name, value in names.items()}
    return names
