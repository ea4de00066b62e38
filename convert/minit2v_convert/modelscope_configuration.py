"""Reads and writes ModelScope's `configuration.json`: names of files, sizes of the UNet, and the noise schedule.

    said = read(parse_json(folder / "configuration.json"))       # with diffusers' names of fields
    content, notes = write(unet_config, scheduler_config)        # and back

The file is beside `text2video_pytorch_model.pth`, `VQGAN_autoencoder.pth` and `open_clip_pytorch_model.bin`. Most of
its fields could also be inferred from shapes. It lacks the number of groups in a norm: 32 in the authors' code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .rename import nearest
from .shapes import Config

NAME = "configuration.json"
TYPE = "latent-text-to-video-synthesis"
FILES = {  # field of model_args: component, the authors' file
    "ckpt_clip": ("text_encoder", "open_clip_pytorch_model.bin"),
    "ckpt_unet": ("unet", "text2video_pytorch_model.pth"),
    "ckpt_autoencoder": ("vae", "VQGAN_autoencoder.pth"),
}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
HEADS, GROUPS = 8, 32  # heads of the temporal transformer after the first convolution; groups of every norm
# Fields that are not used: (value in the published file, reason).
IGNORED: Mapping[str, tuple[Any, str]] = {
    "unet_y_dim": (768, "the network has no layer of that width"),
    "unet_dropout": (0.1, "only training uses dropout"),
    "var_type": ("fixed_small", "the variance of a DDPM sampler is set in the scheduler"),
    "loss_type": ("mse", "only training has a loss"),
}
ARGUMENTS = {"max_frames": 16, "tiny_gpu": 1}  # arguments of the authors' pipeline: number of frames, device
READ = ("unet_in_dim", "unet_dim", "unet_context_dim", "unet_out_dim", "unet_dim_mult", "unet_num_heads",
        "unet_head_dim", "unet_res_blocks", "unet_attn_scales", "temporal_attention", "num_timesteps",
        "mean_type")  # fmt: skip
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # in the authors' code


@dataclass(frozen=True)
class Configuration:
    """files: {component: file name}. unet, scheduler: the fields of their configs that the file gives."""

    files: Mapping[str, str]
    unet: Config
    scheduler: Config


def read(content: Mapping[str, Any]) -> Configuration:
    """The content with diffusers' names of fields. Raises ValueError on missing, unknown or unsupported fields."""
    model = _object(content, "model")
    if model.get("type") != TYPE:
        raise ValueError(f"model.type must be {TYPE!r}, not {model.get('type')!r}")
    arguments, c = _object(model, "model_args"), _object(model, "model_cfg")
    for name in c:
        if name not in READ and name not in IGNORED:
            raise ValueError(f"model_cfg has the unknown field {name!r}{nearest(name, [*READ, *IGNORED])}")
    for name in arguments:
        if name not in FILES and name not in ARGUMENTS:
            raise ValueError(f"model_args has the unknown field {name!r}{nearest(name, [*FILES, *ARGUMENTS])}")
    if missing := [name for name in READ if name not in c]:
        raise ValueError(f"model_cfg has no {missing[0]!r}")
    files = {component: arguments[field] for field, (component, _) in FILES.items() if field in arguments}
    for field, (component, _) in FILES.items():
        name = files.get(component, field)
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(f"{field} must be the name of a file in the same folder, not {files[component]!r}")
    for name in ("unet_in_dim", "unet_dim", "unet_context_dim", "unet_out_dim", "unet_head_dim", "unet_res_blocks",
                 "num_timesteps"):  # fmt: skip
        if type(c[name]) is not int or c[name] < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {c[name]!r}")
    if not c["unet_dim_mult"]:
        raise ValueError("unet_dim_mult is empty; it must be a list of numbers such as [1, 2, 4, 4]")
    for name in ("unet_dim_mult", "unet_attn_scales"):
        if not isinstance(c[name], list) or any(type(n) not in (int, float) or not 0 < n < 1000 for n in c[name]):
            raise ValueError(f"{name} must be a list of numbers, not {c[name]!r}")
    if c["unet_num_heads"] != HEADS:
        raise ValueError(f"unet_num_heads must be {HEADS}, not {c['unet_num_heads']!r}")
    if str(c["temporal_attention"]) != "True":  # a string in the published file
        raise ValueError(f"temporal_attention must be 'True', not {c['temporal_attention']!r}")
    if str(c["mean_type"]) not in PREDICTIONS:
        raise ValueError(f"mean_type must be one of {', '.join(PREDICTIONS)}, not {c['mean_type']!r}")
    levels = len(c["unet_dim_mult"])
    scales = [0.5**n for n in range(levels)]
    if strange := [s for s in c["unet_attn_scales"] if s not in scales]:
        raise ValueError(f"unet_attn_scales has {strange[0]}, but the {levels} levels have the scales {scales}")
    attend = [scale in c["unet_attn_scales"] for scale in scales]
    unet = {
        "block_out_channels": [round(c["unet_dim"] * m) for m in c["unet_dim_mult"]],
        "layers_per_block": c["unet_res_blocks"],
        "in_channels": c["unet_in_dim"],
        "out_channels": c["unet_out_dim"],
        "cross_attention_dim": c["unet_context_dim"],
        "attention_head_dim": c["unet_head_dim"],
        "down_block_types": [f"{'CrossAttn' * a}DownBlock3D" for a in attend],
        "up_block_types": [f"{'CrossAttn' * a}UpBlock3D" for a in reversed(attend)],
    }
    scheduler = {"num_train_timesteps": c["num_timesteps"], "prediction_type": PREDICTIONS[c["mean_type"]]}
    return Configuration(files, unet, scheduler)


def _object(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if not isinstance(content.get(name), Mapping):
        raise ValueError(f"the object {name!r} is missing")
    return content[name]


def write(unet: Config, scheduler: Config) -> tuple[dict[str, Any], list[str]]:
    """(content, messages about fields that it cannot store) from the configs of a UNet3DConditionModel and a scheduler.
    """
    first, *_ = widths = unet["block_out_channels"]
    multiples = [w // first if w % first == 0 else w / first for w in widths]
    attend = [kind.startswith("CrossAttn") for kind in unet["down_block_types"]]
    kinds = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    prediction = scheduler.get("prediction_type", "epsilon")
    notes = []
    if (groups := unet.get("norm_num_groups", GROUPS)) != GROUPS:
        notes.append(f"{NAME} cannot store norm_num_groups {groups}; in the authors' code it is {GROUPS}")
    if prediction not in kinds:
        notes.append(f"{NAME} cannot store prediction_type {prediction!r}")
    for name, value in BETAS.items():
        if scheduler.get(name, value) != value:
            notes.append(f"{NAME} cannot store {name} {scheduler[name]!r}; in the authors' code it is {value!r}")
    for name in ("rescale_betas_zero_snr", "trained_betas"):
        if scheduler.get(name):
            notes.append(f"{NAME} cannot store {name}")
    model_cfg = {
        "unet_in_dim": unet["in_channels"],
        "unet_dim": first,
        "unet_y_dim": IGNORED["unet_y_dim"][0],
        "unet_context_dim": unet["cross_attention_dim"],
        "unet_out_dim": unet["out_channels"],
        "unet_dim_mult": multiples,
        "unet_num_heads": HEADS,
        "unet_head_dim": unet["attention_head_dim"],
        "unet_res_blocks": unet["layers_per_block"],
        "unet_attn_scales": [0.5**n if n else 1 for n, there in enumerate(attend) if there],
        "unet_dropout": IGNORED["unet_dropout"][0],
        "temporal_attention": "True",
        "num_timesteps": scheduler.get("num_train_timesteps", 1000),
        "mean_type": kinds.get(prediction, "eps"),
        "var_type": IGNORED["var_type"][0],
        "loss_type": IGNORED["loss_type"][0],
    }
    model_args = {field: file for field, (_, file) in FILES.items()} | ARGUMENTS
    content = {
        "framework": "pytorch",
        "task": "text-to-video-synthesis",
        "model": {"type": TYPE, "model_args": model_args, "model_cfg": model_cfg},
        "pipeline": {"type": TYPE},
    }
    return content, notes
