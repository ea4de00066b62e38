"""Writes what was trained to files that others load: LoRAs in three spellings, and whole models.

Every file appears whole or not at all.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minit2v_convert.adapters import kohya_name
from minit2v_convert.animatediff import MOTION_LORA_ROWS
from minit2v_convert.rename import nearest
from minit2v_convert.stream import cast, replacing
from minit2v_convert.table import authors_names

from ..adapters.formats import METADATA, Factors
from ..adapters.lora import WEIGHTS, to_peft
from ..models.clip import CLIPTextModel
from ..models.unet_motion import UNetMotionModel
from .objective import Objective
from .trainable import MOTION, TrainedLoRA

# {spelling: the name of the file in a folder}
FORMATS = {"diffusers": f"{WEIGHTS}.safetensors", "kohya": "lora.safetensors", "guoyww": "motion_lora.safetensors"}
# How kohya's tools name the base models, by the width of their text states.
KOHYAS_BASES = {768: "sd_v1", 1024: "sd_v2"}


def save_lora(
    path: str | Path,
    loras: Sequence[TrainedLoRA],
    format: str = "diffusers",
    metadata: Mapping[str, str] | None = None,
    states: Sequence[Mapping[str, Tensor]] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write LoRAs of a UNet and of a text encoder into one file. Returns its path.

    path: the file, or a folder, where the file gets its usual name.
    format: "diffusers" has peft's names and config, for diffusers and minit2v. "kohya" has alphas, for the tools of
        Stable Diffusion 1.5. "guoyww" is a motion LoRA with the names of AnimateDiff's authors, for ComfyUI and webui.
    metadata: texts for the header of the file.
    states: for each LoRA a `state()` in place of its values, such as that of a moving average.
    dtype: of the file. None: as trained, float32.

    ValueError where the format has no place for a layer, or one layer is in two LoRAs.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}{nearest(format, [*FORMATS])}")
    if not loras or not all(lora.layers for lora in loras):
        raise ValueError("there is no LoRA to be saved")
    path = Path(path)
    endings = (".safetensors", ".ckpt") if format == "guoyww" else (".safetensors",)
    if path.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin") and path.suffix not in endings:
        raise ValueError(f"{path.name}: a LoRA in {format}'s spelling is a file of {' or '.join(endings)}")
    path = path if path.suffix in endings else path / FORMATS[format]
    for name, text in (metadata or {}).items():
        if not isinstance(text, str):
            raise ValueError(f"metadata are texts: {name!r} is {text!r}")
    tensors, said = SPELLINGS[format](_in_peft(loras, states))
    tensors = {name: cast(x.detach().cpu(), dtype or x.dtype).contiguous() for name, x in tensors.items()}
    if format == "kohya":
        said |= _hashes(tensors, said)
    with replacing(path) as temporary:
        if path.suffix == ".ckpt":
            torch.save(tensors, temporary)
        else:
            from safetensors.torch import save_file

            save_file(tensors, temporary, metadata={**(metadata or {}), **said, "format": "pt"})
    return path


def check_format(loras: Sequence[TrainedLoRA], format: str) -> None:
    """ValueError where the format has no place for a layer of these LoRAs."""
    SPELLINGS[format](_in_peft(loras, None))


# {component: (network, tensors in peft's names, peft's config)}
Parts = dict[str, tuple[Any, dict[str, Tensor], dict[str, Any]]]


def _in_peft(loras: Sequence[TrainedLoRA], states: Sequence[Mapping[str, Tensor]] | None) -> Parts:
    layers: dict[str, tuple[Any, dict[str, Factors]]] = {}
    given: dict[str, dict[str, Tensor]] = {}
    for n, lora in enumerate(loras):
        component = "text_encoder" if isinstance(lora.network, CLIPTextModel) else "unet"
        network, found = layers.setdefault(component, (lora.network, {}))
        if network is not lora.network:
            raise ValueError(f"these are LoRAs of two networks that both are the {component}")
        if twice := found.keys() & lora.layers.keys():
            raise ValueError(f"two LoRAs change {min(twice)!r}: save each into its own file")
        found |= lora.factors()
        if states is not None:
            lora.check_state(states[n])
            given.setdefault(component, {}).update(states[n])
    parts: Parts = {}
    for component, (network, found) in layers.items():
        tensors, config = to_peft(network, found)
        parts[component] = network, tensors | given.get(component, {}), config
    return parts


def _diffusers(parts: Parts) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {f"{c}.{name}": x for c, (_, more, _) in parts.items() for name, x in more.items()}
    config = {f"{c}.{name}": value for c, (*_, more) in parts.items() for name, value in more.items()}
    return tensors, {METADATA: json.dumps(config, indent=2, sort_keys=True)}


def _kohya(parts: Parts) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, ranks, alphas = {}, [], []
    for component, (_, more, config) in parts.items():
        begin = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[component]
        for name, x in more.items():
            if MOTION.search(name):
                raise ValueError(f"kohya's files have no place for motion modules ({name!r}): guoyww's have")
            tensors[begin + kohya_name(name)] = x
            if name.endswith(".lora_A.weight"):
                module = name.removesuffix(".lora_A.weight")
                alpha = _alpha(module, config)
                tensors[begin + kohya_name(f"{module}.alpha")] = torch.tensor(alpha)
                ranks.append(len(x))
                alphas.append(alpha)
    width = getattr(parts["unet"][0].config, "cross_attention_dim", None) if "unet" in parts else None
    said = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(set(ranks), key=ranks.count)),
        "ss_network_alpha": str(max(set(alphas), key=alphas.count)),
        **({"ss_base_model_version": KOHYAS_BASES[width]} if width in KOHYAS_BASES else {}),
    }
    return tensors, said


def _guoyww(parts: Parts) -> tuple[dict[str, Tensor], dict[str, str]]:
    """q, k, v and out of motion modules, as matrices. The format has no alpha, so `up` is multiplied by it."""
    tensors = {}
    for _, more, config in parts.values():
        for name, x in more.items():
            authors = authors_names(MOTION_LORA_ROWS, name, {})
            if authors is None:
                raise ValueError(f"guoyww's files have no place for {name!r}: only for q, k, v and out of the "
                                 "attentions of motion modules")  # fmt: skip
            if name.endswith(".lora_B.weight"):
                x = x * (_alpha(name.removesuffix(".lora_B.weight"), config) / x.shape[1])
            tensors[authors[0][0]] = x
    return tensors, {}


SPELLINGS = {"diffusers": _diffusers, "kohya": _kohya, "guoyww": _guoyww}


def _alpha(module: str, config: Mapping[str, Any]) -> float:
    return float(config["alpha_pattern"].get(module.removeprefix("text_model."), config["lora_alpha"]))


def _hashes(tensors: Mapping[str, Tensor], said: Mapping[str, str]) -> dict[str, str]:
    """The hashes by which webui finds files, as sd-scripts computes them: of all after the header, and of a piece."""
    from safetensors.torch import save

    file = io.BytesIO(save(dict(tensors), {n: v for n, v in said.items() if n.startswith("ss_")}))
    header = int.from_bytes(file.read(8), "little")
    file.seek(8 + header)
    whole = hashlib.sha256(file.read()).hexdigest()
    file.seek(0x100000)
    return {"sshs_model_hash": whole, "sshs_legacy_hash": hashlib.sha256(file.read(0x10000)).hexdigest()[:8]}


def save_model(folder: str | Path, pipe: Any, objective: Objective | None = None, motion: bool = False) -> None:
    """Write the whole pipeline, with a scheduler that fits the objective. motion: only its motion modules."""
    if motion:
        if not isinstance(pipe.unet, UNetMotionModel):
            raise ValueError(f"{type(pipe.unet).__name__} has no motion modules to be saved")
        return pipe.unet.save_motion_modules(folder)
    if objective is None:
        return pipe.save_pretrained(folder)
    type(pipe).from_pipe(pipe, scheduler=objective.scheduler_for(pipe.scheduler)).save_pretrained(folder)
