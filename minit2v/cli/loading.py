"""Loads the pipeline that the options describe, onto the chosen device."""

import inspect
import os
from pathlib import Path
from typing import Any

import torch

from minit2v_convert.convert import FAMILIES, components, schedule_of
from minit2v_convert.folders import is_authors_layout

from .. import pipelines, schedulers
from ..files import embedded, hub
from ..models.tokenizer import CLIPTokenizer
from ..models.unet_motion import MotionAdapter
from ..models.vae import AutoencoderKL
from ..parallel import own_device
from ..pipelines.checks import check_pixels, check_size
from ..pipelines.files import INDEX, read_index
from ..schedulers.names import solver_of
from . import adapters, long_videos, pictures
from .arguments import ADAPTER
from .messages import one_line, process, say

PIPELINES = {  # (command, whether there is an input video)
    ("generate", False): "TextToVideoSDPipeline",
    ("restyle", True): "VideoToVideoSDPipeline",
    ("animate", False): "AnimateDiffPipeline",
    ("animate", True): "AnimateDiffVideoToVideoPipeline",
}
# The published adapters were trained with linear betas (docs/animatediff.md, section 12). Stable Diffusion's own
# schedule, `scaled_linear`, has less noise at every timestep than the motion modules expect. Videos then look washed
# out. The other fields have the values that diffusers' documentation uses for AnimateDiff.
MOTION_SCHEDULE = {"beta_schedule": "linear", "timestep_spacing": "linspace", "steps_offset": 1, "clip_sample": False}


def load(command: str, settings: dict[str, Any], video_frames: int | None) -> tuple[Any, dict[str, Any]]:
    """The pipeline, and the arguments of its call. The values chosen for options not given are put into `settings`.

    video_frames: the number of frames of the input video, or None without one. Raises ValueError if options do not
    fit the model or each other, OSError if a file cannot be found or read.
    """
    from_video = video_frames is not None
    solver, chosen = solver_of(settings["scheduler"]) if settings.get("scheduler") else (None, {})
    device = own_device(find_device(settings.get("device", "auto")))
    dtype = settings.setdefault("dtype", "float16" if device.type == "cuda" else "float32")
    where = {"revision": settings.get("revision")}
    weights = {"variant": settings.get("variant"), "dtype": getattr(torch, dtype), "compat": settings.get("compat")}
    for name in ("model", "base", "adapter", "vae"):
        if name in settings:
            settings[name] = str(hub.local(settings[name]))
    main = settings.get("model") or settings["base"]
    if "config" in settings and not is_authors_layout(main):
        raise ValueError(f"--config: {main} has its own configs; the option is only for a single checkpoint file")
    family, schedule = family_of(main, where)
    for_motion = _schedule_of_motion(family, schedule, settings) if command == "animate" else {}
    if for_motion and solver is None:
        solver = schedulers.DDIMScheduler
    if solver is None and not is_authors_layout(main) and not _has_scheduler(main, read_index(main, None, where)):
        solver = getattr(schedulers, schedule["_class_name"])
    parts: dict[str, Any] = {"config": settings["config"]} if "config" in settings else {}
    if "vae" in settings:
        parts["vae"] = _load_part("vae", AutoencoderKL, settings["vae"], weights)
    if "tokenizer" in settings:
        parts["tokenizer"] = _load_part("tokenizer", CLIPTokenizer, settings["tokenizer"], {})
    _check_size(main, parts.get("vae"), settings, where)
    others = [settings[name] for name in ("adapter", "vae", "tokenizer") if name in settings]
    say(f"loading {main}" + f" with {' and '.join(others)}" * bool(others))
    if solver is not None:
        known = {k: v for k, v in for_motion.items() if k in solver.field_defaults()} | chosen
        parts["scheduler"] = solver.from_config(schedule, **known)
    if "adapter" in settings:
        parts["motion_adapter"] = adapter = _load_part("adapter", MotionAdapter, settings["adapter"], weights)
        _check_frames(video_frames or settings.get("num_frames"), adapter.config.motion_max_seq_length, settings)
    elif family == "UNetMotionModel":
        most = hub.read_json(main, "config.json", subfolder="unet", **where).get("motion_max_seq_length")
        _check_frames(video_frames or settings.get("num_frames"), most, settings)
    cls = getattr(pipelines, PIPELINES[command, from_video])
    pipe = cls.from_pretrained(main, **where, **weights, **parts).to(device)
    adapters.put_into(pipe, settings)
    if settings.get("free_init"):
        pipe.enable_free_init()
    long_videos.put_into(pipe, settings)
    if "optimize" in settings:  # without the option: fused operations, and weights as they are
        pipe.optimize() if settings["optimize"] else pipe.restore()

    same = ("guidance_scale", "negative_prompt", "height", "width", "strength" if from_video else "num_frames")
    names = {"steps": "num_inference_steps", **{name: name for name in same}}
    if "prompt_interpolation" in settings:
        names["prompt_interpolation"] = "prompt_interpolation"
    if not from_video:
        height, width = settings.get("height"), settings.get("width")
        settings["height"], settings["width"] = check_size(height, width, pipe.unet, pipe.vae_scale_factor)
    defaults = inspect.signature(cls.__call__).parameters
    call = {argument: settings.setdefault(name, defaults[argument].default) for name, argument in names.items()}
    call |= pictures.load(pipe, settings)
    for name in settings.keys() & {"model", "base", "adapter", "vae", "tokenizer", "config"}:
        if embedded.find(settings[name]) is None and Path(settings[name]).exists():
            settings[name] = os.path.abspath(settings[name])  # so that --replay finds it from any folder
    if not chosen:  # a solver's name that sets fields says more than the class
        settings["scheduler"] = type(pipe.scheduler).__name__
    # With several processes, the index of the GPU is not a setting of the video.
    settings |= {"device": device.type if process()[1] > 1 else str(device),
                 "kernels": os.environ.get("MINIT2V_KERNELS") or "auto"}
    return pipe, call


def family_of(path: str, where: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The class of a model's UNet, and its scheduler's config. A model without one gets the published model's."""
    if is_authors_layout(path):
        found = components(path)
        if "unet" not in found or found["unet"].cls not in FAMILIES:
            raise ValueError(f"{path} is {next(iter(found.values())).title}: it has no UNet of {' or '.join(FAMILIES)}")
        return found["unet"].cls, dict(schedule_of(path, found["unet"].cls))
    index = read_index(path, None, where)
    entry = index.get("unet")
    unet = entry[-1] if isinstance(entry, list) and entry and isinstance(entry[-1], str) else ""
    if unet in FAMILIES and not _has_scheduler(path, index):
        say(f"{path} has no scheduler: the published model's is used")
        return unet, dict(FAMILIES[unet].scheduler)
    return unet, hub.read_json(path, "scheduler_config.json", subfolder="scheduler", **where)


def _has_scheduler(path: str, index: dict[str, Any]) -> bool:
    here = embedded.find(path) or Path(path).expanduser()
    return "scheduler" in index and (not here.is_dir() or (here / "scheduler").is_dir())


def _schedule_of_motion(unet: str, own: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The fields of the noise schedule that motion modules need and the image model lacks. Also sets the adapter."""
    if unet != "UNet2DConditionModel":  # a complete AnimateDiff model, or one that the pipeline will refuse
        if "adapter" in settings:
            raise ValueError(f"--adapter needs a base model with a UNet2DConditionModel, but {settings['base']} has a "
                             f"{unet}")
        return {}
    settings.setdefault("adapter", ADAPTER)
    is_stable = own.get("beta_schedule") == "scaled_linear" and own.get("prediction_type", "epsilon") == "epsilon"
    return MOTION_SCHEDULE if is_stable else {}


def _load_part(option: str, cls: Any, name: str, weights: dict[str, Any]) -> Any:
    """The component that an option names: a file, or a folder or hub id of this component or of a complete model."""
    try:
        folder = None
        if not is_authors_layout(name):
            _, names = hub.find_folder(name, None, lambda names: [n for n in names if n == INDEX])
            folder = option if names else None
        if weights.get("variant") is not None and not is_authors_layout(name):
            try:
                return cls.from_pretrained(name, subfolder=folder, **weights)
            except FileNotFoundError:
                say(f"{name} has no variant {weights['variant']}: its weights without a variant are read")
        return cls.from_pretrained(name, subfolder=folder, **{k: v for k, v in weights.items() if k != "variant"})
    except (ValueError, OSError) as error:
        what = f"--{option}" if option != "adapter" or name != ADAPTER else (
            "the image model needs a motion adapter, and the default one cannot be loaded; give one with --adapter")
        raise (OSError if isinstance(error, OSError) else ValueError)(f"{what}: {one_line(error)}") from error


def _check_size(main: str, vae: Any, settings: dict[str, Any], where: dict[str, Any]) -> None:
    """Check height and width against the VAE before anything large is loaded. Raises ValueError if they do not fit."""
    if vae is not None:
        factor = vae.config.factor
    else:
        try:
            own = (components(main)["vae"].config if is_authors_layout(main) else
                   hub.read_json(main, "config.json", subfolder="vae", **where))  # fmt: skip
            factor = 2 ** (len(own["block_out_channels"]) - 1)
        except (KeyError, TypeError, OSError, ValueError):  # loading will report this error better
            return
    for name in ("height", "width"):
        if settings.get(name) is not None:
            check_pixels(f"--{name}", settings[name], factor)


def _check_frames(frames: int | None, most: Any, settings: dict[str, Any]) -> None:
    if frames is not None and isinstance(most, int) and frames > most and not long_videos.is_long(settings):
        raise ValueError(f"{frames} frames are too many: the motion adapter has position encodings for {most}; give "
                         f"--window {min(16, most)} for longer videos")


def find_device(name: str) -> Any:
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return there or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; there are auto, cpu{f' and {there.type}' if there else ''}"
                         ) from None
    usable = device.type == "cpu" or (there is not None and device.type == there.type)
    if not usable or (device.index or 0) >= max(1, torch.accelerator.device_count()):
        raise ValueError(f"this computer has no device {name!r}; there are auto, cpu"
                         f"{f' and {there.type}' if there else ''}")
    return device
