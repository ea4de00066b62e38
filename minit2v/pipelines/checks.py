"""Checks of the arguments before any work, and checks of the results of networks. Each error is one line."""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..files.weights import first_nonfinite
from ..models.network import Network
from ..models.tokenizer import CLIPTokenizer
from ..schedulers.base import Scheduler

Generators = torch.Generator | Sequence[torch.Generator] | None
Prompts = str | list[str] | Mapping[int, str] | None  # a mapping is {frame: text}
OTHERS = ("diffusers", "transformers")  # libraries with classes of the same names
PLAIN = (str, bytes, Path, int, float, dict, list, tuple, FunctionType)  # what no component is


def check_component(name: str, component: Any, fitting: Sequence[str]) -> None:
    """Raises TypeError if a pipeline cannot run it: a class, an object of another library, or one of another role.

    fitting: the names of the classes for this role, none for a scheduler. A user's own classes pass, and so does None.
    """
    if isinstance(component, type):
        raise TypeError(f"{name} must be an object, not the class {component.__name__}: only from_pretrained and "
                        "from_single_file accept a class")  # fmt: skip
    inner = unwrapped(component)
    classes = type(inner).__mro__
    wanted = " or ".join(n for n in fitting if not n.endswith("Fast")) or "scheduler"
    ours = isinstance(inner, Network | CLIPTokenizer | Scheduler)
    for library in OTHERS:
        theirs = next((c.__name__ for c in classes if c.__module__.split(".")[0] == library), None)
        if theirs is not None and not ours:
            load = f"load it with minit2v.{wanted.split(' or ')[0]}.from_pretrained(...)" if fitting else (
                f"make one of minit2v.schedulers, with {theirs}.from_config({name}.config)")  # fmt: skip
            raise TypeError(f"{name} is a {theirs} of {library}, which does not run here: {load}")
    fits = isinstance(inner, Scheduler) if not fitting else any(c.__name__ in fitting for c in classes)
    if isinstance(inner, PLAIN) or ours and not fits:
        raise TypeError(f"{name} must be a {wanted}, not a {type(inner).__name__}")


def check_count(name: str, value: Any) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, not {value!r}")


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], not {value!r}")


def check_finite(name: str, x: Tensor) -> None:
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} contains NaN or infinity")


def check_latents(latents: Any, shape: tuple[int | str, ...]) -> None:
    """Raises ValueError unless latents are a finite tensor (b c f h w) of this shape. A letter is any size but 0."""
    sizes = tuple(latents.shape) if isinstance(latents, Tensor) else ()
    fits = len(sizes) == len(shape) and all(
        n > 0 if isinstance(want, str) else n == want for n, want in zip(sizes, shape, strict=True)
    )
    if not fits:
        what = sizes if isinstance(latents, Tensor) else f"a {type(latents).__name__}"
        raise ValueError(f"latents must be a tensor (b c f h w) = ({', '.join(map(str, shape))}), not {what}")
    check_finite("latents", latents)


def check_text(name: str, texts: Any, embeds: Tensor | None, unet: nn.Module, required: bool) -> int:
    """The number of texts. The call gives either texts or their states (embeds)."""
    if texts is not None and embeds is not None:
        raise ValueError(f"give {name} or {name}_embeds, not both")
    if embeds is not None:
        width = unet.config.cross_attention_dim
        if not isinstance(embeds, Tensor) or embeds.ndim not in (3, 4) or embeds.shape[-1] != width or not len(embeds):
            what = tuple(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
            raise ValueError(f"{name}_embeds must be a tensor (batch, tokens, {width}), or (batch, frames, tokens, "
                             f"{width}), not {what}")
        check_finite(f"{name}_embeds", embeds)
        return len(embeds)
    if texts is None and required:
        raise ValueError(f"give a {name} or {name}_embeds")
    if texts is None or isinstance(texts, str | Mapping):  # a mapping is checked by `check_frame_prompts`
        return 1
    if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"{name} must be a text, a list of texts or a dictionary {{frame: text}}, not "
                         f"{texts!r:.80}")
    if not texts:
        raise ValueError(f"{name} is an empty list: give at least one text")
    return len(texts)


def check_pixels(name: str, value: Any, factor: int) -> None:
    """Raises ValueError unless a height or width is a multiple of `factor`, the VAE's pixels per latent."""
    check_count(name, value)
    if value % factor:
        near = max(1, round(value / factor)) * factor
        raise ValueError(f"{name} must be a multiple of {factor}, not {value} (nearest: {near})")


def check_size(height: Any, width: Any, unet: nn.Module, factor: int) -> tuple[int, int]:
    """Height and width in pixels. The default is the UNet's own size."""
    own = unet.config.sample_size
    if own is None and None in (height, width):
        raise ValueError("give height and width, because the UNet's config has no sample_size")
    rows, columns = (own, own) if isinstance(own, int | None) else own
    height = rows * factor if height is None else height
    width = columns * factor if width is None else width
    check_pixels("height", height, factor)
    check_pixels("width", width, factor)
    return int(height), int(width)


def check_generator(generator: Generators, batch: int, device: torch.device) -> None:
    several = isinstance(generator, list | tuple)
    if several and len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for {batch} videos: give one, or one for each")
    for g in generator if several else [generator]:
        if not isinstance(g, torch.Generator | None) or (several and g is None):
            raise TypeError(f"generator must be a torch.Generator or a list of them, not {g!r}")
        if g is not None and g.device.type not in ("cpu", device.type):
            raise ValueError(f"a generator on {g.device} cannot draw for a pipeline on {device}")


def is_parallel(component: Any) -> bool:
    """Whether it is DataParallel or DistributedDataParallel, which only training needs."""
    return isinstance(component, nn.parallel.DistributedDataParallel | nn.parallel.DataParallel)


def unwrapped(component: Any) -> Any:
    """The network inside torch.compile, DataParallel or DistributedDataParallel. Others are returned unchanged."""
    if is_parallel(component):
        return unwrapped(component.module)
    return unwrapped(component._orig_mod) if hasattr(component, "_orig_mod") else component


def check_result(x: Tensor, network: nn.Module, what: str) -> None:
    """Raises FloatingPointError if a network's output is not finite. It names a parameter that is not finite."""
    if torch.isfinite(x).all():
        return
    network = unwrapped(network)
    if (name := first_nonfinite(network)) is not None:
        raise FloatingPointError(f"{what} gave NaN or infinity, because its parameter {name!r} contains some")
    raise FloatingPointError(f"{what} gave NaN or infinity in {network.dtype} though its parameters are finite"
                             + (": use bfloat16 or float32" if network.dtype == torch.float16 else ""))
