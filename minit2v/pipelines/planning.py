"""Plans for models that are not loaded. Their configs are enough, and weights are on `meta`."""

import inspect
from pathlib import Path
from typing import Any

import torch

from minit2v_convert.convert import components
from minit2v_convert.folders import is_authors_layout
from minit2v_convert.rename import nearest

from ..files import embedded, hub
from ..files.weights import Weightless
from ..memory.plan import Planner, Video, on_meta
from ..models.unet2d import UNet2DConditionModel
from ..models.unet_motion import MotionAdapter, UNetMotionModel
from .animatediff import AnimateDiffPipeline
from .blank import MODELS, NETWORKS
from .files import INDEX, read_index
from .text_to_video import TextToVideoSDPipeline


def planner_of_model(
    name: str, video: Video | None = None, dtype: torch.dtype = torch.float16, device: str = "cuda",
    adapter: str | None = None, **size: Any,
) -> Planner:
    """A planner for a folder, a hub id, an embedded model, or a model with configs in this package (`minit2v blank`).

    adapter: the motion adapter for an image model. None is the model's own, or the usual one.
    size: fields of the Video. Missing fields have the model's own values.
    Raises ValueError if the name is not a whole model, or if an adapter is given for another model than an image model.
    """
    kind, networks = networks_of_model(name, dtype, adapter)
    if video is None:
        chunk = inspect.signature(kind.__call__).parameters["decode_chunk_size"].default
        video = Video(**own_size(networks) | {"chunk": chunk} | {k: v for k, v in size.items() if v is not None})
    check_size(networks, video)
    return Planner(networks, video, device, kind)


def networks_of_model(name: str, dtype: torch.dtype, adapter: str | None = None) -> tuple[Any, dict[str, Any]]:
    """The pipeline's class, and its networks on `meta`. An image model gets AnimateDiff's motion modules.

    adapter: the name of the motion adapter. None is the model's own, or the published one.
    """
    kind, configs = find_configs(name)
    networks = {part: on_meta(c, config, dtype) for part, (c, config) in configs.items()}
    motion = networks.pop("motion_adapter", None)
    if isinstance(networks.get("unet"), UNet2DConditionModel):
        if adapter is not None or motion is None:
            usual = "shapes-motion" if name == "shapes-image" else "motion-v1-5-2"  # as in `minit2v animate`
            motion = on_meta(MotionAdapter, find_adapter(adapter or usual), dtype)
        with torch.device("meta"), Weightless():
            networks["unet"] = UNetMotionModel.from_unet2d(networks["unet"], motion).to(dtype).eval()
    elif adapter is not None:
        raise ValueError(f"an adapter needs a UNet2DConditionModel, but {name} has a "
                         f"{type(networks.get('unet')).__name__}")  # fmt: skip
    return kind, networks


def find_adapter(name: str) -> dict[str, Any]:
    """The content of a motion adapter's config.json. Raises ValueError if the name is not a motion adapter."""
    short = next((m for s, m in MODELS.items() if name.lower() in (s, *(i.lower() for i in m.ids))), None)
    if short is not None and not Path(name).exists():
        config = dict(short.parts.get("", {}))
    else:
        config = hub.read_json(hub.local(name), "config.json")
    if config.get("_class_name") != "MotionAdapter":
        found = config.get("_class_name")
        raise ValueError(f"{name} is a {found}, not a MotionAdapter: give the folder or id of a motion adapter")
    return config


def own_size(networks: dict[str, Any]) -> dict[str, int]:
    """16 frames of the size in the UNet's config."""
    own = networks["unet"].config.sample_size
    own = (own, own) if isinstance(own, int) else own
    rows, columns = (n * networks["vae"].config.factor for n in own)
    return {"frames": 16, "height": rows, "width": columns}


def check_size(networks: dict[str, Any], video: Any) -> None:
    factor = networks["vae"].config.factor
    for side in ("height", "width"):
        if getattr(video, side) % factor:
            raise ValueError(f"{side} must be a multiple of {factor}, not {getattr(video, side)}")

# Finding --------------------------------------------------------------------------------------------------------------


def find_configs(name: str) -> tuple[Any, dict[str, tuple[Any, Any]]]:
    """The pipeline's class, and {part: (class, content of config.json)}. Raises ValueError if there is no model."""
    short = next((m for s, m in MODELS.items() if name.lower() in (s, *(i.lower() for i in m.ids))), None)
    if short is not None and not Path(name).exists():
        if "unet" not in short.parts:
            raise ValueError(f"{name} is a motion adapter: plan an image model, such as sd-1.5")
        parts = {part: (NETWORKS[c.get("_class_name") or c["architectures"][0]], c) for part, c in short.parts.items()}
        video = parts["unet"][0].__name__ == "UNet3DConditionModel"
        return (TextToVideoSDPipeline if video else AnimateDiffPipeline), parts
    if embedded.find(name) is None and not Path(name).expanduser().exists() and "/" not in name:
        known = [*MODELS, *embedded.NAMES]
        raise ValueError(f"no model {name!r}{nearest(name, known)}; known are {', '.join(known)}, folders and hub ids")
    path = hub.local(name)
    found: dict[str, tuple[Any, Any]] = {}
    authors = is_authors_layout(path)
    if authors:
        found = {part: (NETWORKS[c.cls], dict(c.config)) for part, c in components(path).items() if c.cls in NETWORKS}
    for part, entry in ({} if authors else read_index(path, None, {})).items():
        if part.startswith("_") or not isinstance(entry, list | tuple) or len(entry) != 2:
            continue
        cls = NETWORKS.get(entry[1]) or (UNetMotionModel if entry[1] == "UNetMotionModel" else None)
        if cls is not None:
            found[part] = cls, hub.read_json(path, "config.json", subfolder=part)
    if "unet" not in found or "vae" not in found:
        what = "it contains" if authors else f"its {INDEX} names"
        raise ValueError(f"{name}: {what} no UNet and VAE of this package")
    video = found["unet"][0].__name__ == "UNet3DConditionModel"
    return (TextToVideoSDPipeline if video else AnimateDiffPipeline), found
