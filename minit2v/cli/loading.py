"""The pipeline that the options ask for, on the device that they ask for."""

import inspect
import os
from pathlib import Path
from typing import Any

import torch

from minit2v_convert.convert import FAMILIES, components, schedule_of
from minit2v_convert.folders import is_authors_layout

from .. import pipelines, schedulers
from ..files import embedded
from ..files.hub import read_json
from ..models.unet_motion import MotionAdapter
from ..pipelines.checks import check_size
from ..pipelines.files import read_index
from ..schedulers.names import solver_of
from .arguments import ADAPTER
from .messages import say

PIPELINES = {  # (command, whether there is a video to begin with)
    ("generate", False): "TextToVideoSDPipeline",
    ("restyle", True): "VideoToVideoSDPipeline",
    ("animate", False): "AnimateDiffPipeline",
    ("animate", True): "AnimateDiffVideoToVideoPipeline",
}
# The published adapters were trained with linear betas (docs/animatediff.md, section 12). In Stable Diffusion's own
# schedule, `scaled_linear`, every timestep has less noise than the motion modules learned to find there, and videos
# wash out. The other fields are those that diffusers' documentation runs AnimateDiff with.
MOTION_SCHEDULE = {"beta_schedule": "linear", "timestep_spacing": "linspace", "steps_offset": 1, "clip_sample": False}


def load(command: str, settings: dict[str, Any], from_video: bool) -> tuple[Any, dict[str, Any]]:
    """The pipeline, and the arguments of its call; `settings` gets what was chosen for options that were not given."""
    solver, chosen = solver_of(settings["scheduler"]) if settings.get("scheduler") else (None, {})
    device = find_device(settings.get("device", "auto"))
    dtype = settings.setdefault("dtype", "float16" if device.type == "cuda" else "float32")
    where = {"revision": settings.get("revision")}
    weights = {"variant": settings.get("variant"), "dtype": getattr(torch, dtype), "compat": settings.get("compat")}
    main = settings.get("model") or settings["base"]
    schedule = _schedule_of_motion(main, settings, where) if command == "animate" else {}
    if schedule and solver is None:
        solver = schedulers.DDIMScheduler
    say(f"loading {main}" + (f" with {settings['adapter']}" if "adapter" in settings else ""))
    parts: dict[str, Any] = {}
    if solver is not None:
        known = {k: v for k, v in schedule.items() if k in solver.field_defaults()} | chosen
        if is_authors_layout(main):
            parts["scheduler"] = solver.from_config(_family_of_file(main)[1], **known)
        else:
            parts["scheduler"] = solver.from_pretrained(main, subfolder="scheduler", **where, **known)
    if "adapter" in settings:
        parts["motion_adapter"] = _load_adapter(settings["adapter"], weights)
    cls = getattr(pipelines, PIPELINES[command, from_video])
    pipe = cls.from_pretrained(main, **where, **weights, **parts).to(device)
    if settings.get("free_init"):
        pipe.enable_free_init()
    if "optimize" in settings:  # neither: the fast path, with the weights where they are
        pipe.optimize() if settings["optimize"] else pipe.restore()

    same = ("guidance_scale", "negative_prompt", "height", "width", "strength" if from_video else "num_frames")
    names = {"steps": "num_inference_steps", **{name: name for name in same}}
    if not from_video:
        height, width = settings.get("height"), settings.get("width")
        settings["height"], settings["width"] = check_size(height, width, pipe.unet, pipe.vae_scale_factor)
    defaults = inspect.signature(cls.__call__).parameters
    call = {argument: settings.setdefault(name, defaults[argument].default) for name, argument in names.items()}
    for name in settings.keys() & {"model", "base", "adapter"}:
        if embedded.find(settings[name]) is None and Path(settings[name]).exists():
            settings[name] = os.path.abspath(settings[name])  # to be found from other folders, too
    if not chosen:  # a name with fields says more than its class
        settings["scheduler"] = type(pipe.scheduler).__name__
    settings |= {"device": str(device),
                 "kernels": os.environ.get("MINIT2V_KERNELS") or "auto"}
    return pipe, call


def _schedule_of_motion(path: str, settings: dict[str, Any], where: dict[str, Any]) -> dict[str, Any]:
    """The fields of the noise schedule in which motion modules differ from the image model, which gets an adapter."""
    if is_file := is_authors_layout(path):
        unet, own = _family_of_file(path)
    else:
        unet = (read_index(path, None, where).get("unet") or [None])[-1]
    if unet != "UNet2DConditionModel":  # a whole AnimateDiff model, or what the pipeline will refuse
        if "adapter" in settings:
            raise ValueError(f"--adapter: it goes into a UNet2DConditionModel, and {settings['base']} has a {unet}")
        return {}
    settings.setdefault("adapter", ADAPTER)
    if not is_file:
        own = read_json(path, "scheduler_config.json", subfolder="scheduler", **where)
    is_stable = own.get("beta_schedule") == "scaled_linear" and own.get("prediction_type", "epsilon") == "epsilon"
    return MOTION_SCHEDULE if is_stable else {}


def _family_of_file(path: str) -> tuple[str, dict[str, Any]]:
    """The class of the UNet in authors' files, and its scheduler's config: the published one, where none is said."""
    unet = components(path).get("unet")
    if unet is None or unet.cls not in FAMILIES:
        raise ValueError(f"{path} has no UNet of {' or '.join(FAMILIES)}: it is no model")
    return unet.cls, dict(schedule_of(path, unet.cls))


def _load_adapter(name: str, weights: dict[str, Any]) -> Any:
    try:
        return MotionAdapter.from_pretrained(name, **weights)
    except FileNotFoundError:
        if weights["variant"] is None:
            raise
        say(f"{name} has no variant {weights['variant']}: its other weights are read")
        return MotionAdapter.from_pretrained(name, **{**weights, "variant": None})


def find_device(name: str) -> Any:
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return there or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"no device {name!r}; there are auto, cpu{f' and {there.type}' if there else ''}") from None
    usable = device.type == "cpu" or (there is not None and device.type == there.type)
    if not usable or (device.index or 0) >= max(1, torch.accelerator.device_count()):
        raise ValueError(f"the device {name!r} is not here; there are auto, cpu{f' and {there.type}' if there else ''}")
    return device
