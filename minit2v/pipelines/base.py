"""The base of all pipelines: components, the encoding of texts, the denoising loop, the decoding of frames.

    text, negative = encode_prompt(...)         tokenizer, CLIP
    x = noise, or an encoded video with noise   (b c f h w)
    x = denoise(x, timesteps, ...)              UNet and scheduler, step by step
    frames = decode_latents(x)                  VAE
"""

import copy
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from itertools import chain, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec, Self, TypeVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from minit2v_convert.folders import is_authors_layout
from minit2v_convert.rename import nearest

from .. import fast
from ..adapters import lora, textual_inversion
from ..adapters.ip_adapter import Pictures
from ..compat import compat_fields
from ..files import hub
from ..files.config import read_from
from ..models.clip import CLIPTextModel
from ..models.image_prompt import Prompt
from ..models.network import Network, say_unneeded
from ..models.tokenizer import CLIPTokenizer
from ..models.unet import UNet
from ..models.unet_motion import UNetMotionModel
from ..models.vae import AutoencoderKL
from ..schedulers.base import Scheduler, randn
from ..techniques import prompt_weights
from ..techniques.context_windows import ContextWindows, Windowed, check_choice
from ..techniques.frame_prompts import Interpolate, check_frame_prompts, check_interpolation, spread_over_frames
from ..techniques.free_init import FREQUENCIES, METHODS, NOISES, FreeInit, FreeInitRounds, NoisedVideo
from ..techniques.free_noise import FreeNoise
from ..techniques.prompt_weights import LOOKS_WEIGHTED, WEIGHTS, chunks
from . import files, frames, memory
from .checks import (
    Generators,
    check_component,
    check_count,
    check_generator,
    check_latents,
    check_number,
    check_result,
    check_text,
    is_parallel,
    unwrapped,
)
from .guidance import OneByOne

if TYPE_CHECKING:
    from ..memory.plan import Plan, Video

logger = logging.getLogger(__name__)


@dataclass
class PipelineOutput:
    """The result of a pipeline: `output.frames`, `output[0]` or `output["frames"]`. `frames[i]` is the i-th video.

    With return_dict=False a call returns `to_tuple()` of it instead.
    """

    frames: Any

    def to_tuple(self) -> tuple[Any]:
        return (self.frames,)

    def __getitem__(self, key: str | int | slice) -> Any:
        return self.__dict__[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return 1


@dataclass(frozen=True)
class StepCallbacks:
    """The caller's functions that are called after each step, and that may change tensors."""

    legacy: Callable[[int, Tensor, Tensor], None] | None = None  # (step, t, latents); its result is ignored
    legacy_every: int = 1
    on_end: Callable[..., dict[str, Tensor] | None] | None = None  # (pipe, step, t, tensors) -> tensors to replace
    names: Sequence[str] = ("latents",)  # the tensors that `on_end` gets
    NAMES: ClassVar[tuple[str, ...]] = ("latents", "prompt_embeds", "negative_prompt_embeds")

    @property
    def show_text(self) -> bool:
        """Whether `on_end` gets text states. It may then also change them in place."""
        return self.on_end is not None and not {*self.names}.isdisjoint(self.NAMES[1:])

    def check(self) -> None:
        check_count("callback_steps", self.legacy_every)
        for name, function in (("callback", self.legacy), ("callback_on_step_end", self.on_end)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function, not {function!r}")
        if unknown := [n for n in self.names if n not in self.NAMES]:
            raise ValueError(f"callback_on_step_end_tensor_inputs: {unknown} is not among {list(self.NAMES)}")

    def __call__(self, pipe: "DiffusionPipeline", step: int, t: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
        """Calls the functions. Returns the tensors, in the order of NAMES, with the replaced ones."""
        state = dict(zip(self.NAMES, tensors, strict=True))
        if self.legacy is not None and step % self.legacy_every == 0:
            self.legacy(step, t, state["latents"])
        if self.on_end is not None:
            new = self.on_end(pipe, step, t, {n: state[n] for n in self.names}) or {}
            if not isinstance(new, dict):
                raise TypeError(f"callback_on_step_end returned a {type(new).__name__}, not a dictionary of tensors")
            if unknown := [n for n in new if n not in self.NAMES]:
                raise ValueError(f"callback_on_step_end returned {unknown}, which is not among {list(self.NAMES)}")
            if "latents" in new:
                check_latents(new["latents"], tuple(state["latents"].shape))
            state |= new
        return list(state.values())


Pipeline = TypeVar("Pipeline", bound="DiffusionPipeline")
Args = ParamSpec("Args")
Result = TypeVar("Result")


def exclusive(call: Callable[Concatenate[Pipeline, Args], Result]) -> Callable[Concatenate[Pipeline, Args], Result]:
    """Decorates a pipeline's `__call__`: no gradients, and RuntimeError if another call uses the same parts."""

    @wraps(call)
    @torch.no_grad()
    def run(self: Pipeline, *args: Args.args, **kw: Args.kwargs) -> Result:
        self._making = None
        try:
            with self._exclusive():
                return call(self, *args, **kw)
        except RuntimeError as e:
            if not memory.is_out_of_memory(e):
                raise
            error = e
        raise memory.explained(self, error) from None

    return run


class _of_class_or_object:  # noqa: N801
    """A method for both a class and its objects: the class or the object is the first argument."""

    def __init__(self, function: Callable[..., None]):
        self.function, self.__doc__ = function, function.__doc__

    def __get__(self, owner: Any, cls: type) -> Callable[..., None]:
        return partial(self.function, cls if owner is None else owner)


_running: list[tuple[set[int], set[int]]] = []  # for each call: ids of what only it may use, and of all that it uses
_running_lock = threading.Lock()


class DiffusionPipeline:
    """Base class of the pipelines. Components have the names of model_index.json.

    `DiffusionPipeline.from_pretrained` loads the pipeline that a folder's model_index.json names.
    """

    COMPONENTS: ClassVar[dict[str, tuple[str, ...]]] = {}  # name -> classes that fit; no classes: any scheduler
    OPTIONAL: ClassVar[tuple[str, ...]] = ()  # components that may be missing
    IDLE: ClassVar[tuple[str, ...]] = ()  # components that do not compute, and stay off the accelerator
    FIELDS: ClassVar[tuple[str, ...]] = ()  # the deviations (compat.py) that are saved with the pipeline
    STEP_AXES: ClassVar[str] = "(b f) c h w"  # the shape of latents for the scheduler, in which it draws noise
    HINTS: ClassVar[dict[str, str]] = {}  # arguments of other pipelines -> what to do instead
    CLASSES: ClassVar[dict[str, type["DiffusionPipeline"]]] = {}

    # Each may be None if the pipeline is for a part of the work. Methods that need it then raise an error.
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet
    if TYPE_CHECKING:  # each class defines it, with its own arguments
        __call__: Callable[..., Any]

    def __init_subclass__(cls, **kw: Any):
        super().__init_subclass__(**kw)
        DiffusionPipeline.CLASSES[cls.__name__] = cls

    def __init__(self, components: dict[str, Any], compat: str | None, fields: dict[str, Any]):
        """Fields that are None or missing get their values from `compat` (None or "diffusers")."""
        defaults: dict[str, Any] = {}
        for cls in reversed(type(self).__mro__):  # a user's subclass deviates like its base class
            defaults |= compat_fields(cls.__name__, compat)
        self.compat = compat
        for name in self.FIELDS:
            setattr(self, name, defaults[name] if fields.get(name) is None else fields[name])
        for name in self.COMPONENTS:
            setattr(self, name, components[name])
        self._interrupt = False
        self._lora_scale = 1.0  # of the running call
        self._offload: memory.Offload | None = None
        self._offload_text = self._sequential_guidance = False
        self._narrow: str | None = None  # the 8-bit format of the UNet's weights
        self._making: Video | None = None  # the video of the running call
        self._free_init: FreeInit | None = None
        self._context_windows: ContextWindows | None = None
        self._free_noise_of_loop: FreeNoise | None = None  # for a UNet that gets windows; a UNetMotionModel has its own
        self._progress: dict[str, Any] = {}
        self.prompt_weights: str | None = None  # "a1111": brackets in prompts are weights; None: they are text

    @classmethod
    def _of_networks(cls, networks: dict[str, Any]) -> Self:
        """A pipeline with only these networks, without checks. Planners use it to count memory."""
        pipe = object.__new__(cls)
        DiffusionPipeline.__init__(pipe, {**dict.fromkeys(cls.COMPONENTS), **networks}, None, {})
        return pipe

    # Components ------------------------------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        """Checks components. A network is taken out of DistributedDataParallel, which is useless without gradients.

        Raises TypeError if this package cannot run the component.
        """
        if is_parallel(getattr(value, "_orig_mod", None)):
            logger.warning("%s was compiled together with its %s, and is taken out of it: use torch.compile(network).",
                           name, type(value._orig_mod).__name__)  # fmt: skip
            value = unwrapped(value)
        if is_parallel(value):
            value = unwrapped(value)
        if name in self.COMPONENTS:
            check_component(name, value, self.COMPONENTS[name])
        super().__setattr__(name, value)

    if not TYPE_CHECKING:  # otherwise a type checker would accept every name

        def __getattr__(self, name: str) -> Any:
            if hasattr(type(self), name):  # the error of a property says more
                return object.__getattribute__(self, name)
            near = "" if name.startswith("_") else nearest(name, [n for n in dir(self) if not n.startswith("_")])
            raise AttributeError(f"{type(self).__name__} has no {name!r}{near}", name=name)

    @property
    def components(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.COMPONENTS}

    @property
    def scheduler(self) -> Scheduler:
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        """A scheduler that is assigned later also gets the mode `compat`. Fields passed in code do not change."""
        self._scheduler = scheduler.with_compat(self.compat) if self.compat and scheduler is not None else scheduler

    @property
    def _networks(self) -> dict[str, nn.Module]:
        return {name: c for name, c in self.components.items() if isinstance(c, nn.Module)}

    @property
    def dtype(self) -> torch.dtype:
        return self._main_network.dtype

    @property
    def device(self) -> torch.device:
        """The device of the components. With offloading it is the CPU between calls."""
        return self._main_network.device

    @property
    def _main_network(self) -> nn.Module:
        if not self._networks:
            raise ValueError(f"this {type(self).__name__} has no networks")
        return self._networks["unet"] if "unet" in self._networks else next(iter(self._networks.values()))

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent in height and width, 8 for the published models."""
        return self.vae.config.factor if self.vae is not None else 8

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        variant: str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | str | dict[str, torch.dtype | str] | None = None,
        dtype: torch.dtype | str | dict[str, torch.dtype | str] | None = None,
        use_safetensors: bool | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        compat: str | None = None,
        strict: bool = True,
        mmap: bool = True,
        **overrides: Any,
    ) -> Self:
        """Loads a pipeline from a local folder or a hub id. On `DiffusionPipeline`, model_index.json chooses the class.

        path_or_id: a single file and a folder of ModelScope's original files work, too, as with `from_single_file`.
        torch_dtype: float32 by default, or a dictionary {component: dtype, "default": dtype}. `dtype` is its new name.
        variant: "fp16" reads the files with that infix.
        Components by name (`vae=...`, `scheduler=...`) replace those of the folder, also None. A class (`unet=MyUNet`)
        loads the folder's component with this class. Files never cause an import. So if a pipeline was saved with
        your own class, you have to pass the class.
        strict: with False, parameters that the files lack keep their initial values, as for a single network.
        mmap: with False, the weights are copied, so that later changes of the files have no effect (docs/safety.md).
        Raises FileNotFoundError if something is missing, ValueError if files do not fit, and TypeError if an argument
        is unknown or wrong.
        """
        path_or_id = hub.local(path_or_id, revision=revision, local_files_only=local_files_only, token=token,
                               cache_dir=cache_dir, force_download=force_download)
        if subfolder is None and is_authors_layout(path_or_id):
            if variant is not None:
                raise ValueError(f"{path_or_id} is a checkpoint in the authors' layout, which has no variants: "
                                 f"leave variant={variant!r} out")
            return cls.from_single_file(path_or_id, torch_dtype=torch_dtype, dtype=dtype, compat=compat, strict=strict,
                                        mmap=mmap, revision=revision, local_files_only=local_files_only, token=token,
                                        cache_dir=cache_dir, force_download=force_download, **overrides)
        where = dict(revision=revision, local_files_only=local_files_only, token=token, cache_dir=cache_dir,
                     force_download=force_download)
        index = files.read_index(path_or_id, subfolder, where)
        if cls is DiffusionPipeline:
            with read_from(path_or_id):
                cls = files.pipeline_class(index, DiffusionPipeline.CLASSES)
        saved = index.get(files.FIELDS_KEY, {}) if compat is None else {"compat": compat}  # a given mode wins
        fields = {name: overrides.pop(name, saved.get(name)) for name in cls.FIELDS}
        dtypes = files.component_dtypes(torch_dtype, dtype, cls.COMPONENTS)
        weights = dict(variant=variant, use_safetensors=use_safetensors, compat=saved.get("compat"),
                       strict=strict, mmap=mmap)
        with read_from(path_or_id, (ValueError,)):  # a TypeError is about the arguments, not the files
            components = files.load_components(path_or_id, subfolder, index, cls, overrides, dtypes, where, weights)
        return cls(**components, compat=saved.get("compat"), **fields)

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        config: str | Path | None = None,
        torch_dtype: torch.dtype | str | dict[str, torch.dtype | str] | None = None,
        dtype: torch.dtype | str | dict[str, torch.dtype | str] | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        compat: str | None = None,
        strict: bool = True,
        mmap: bool = True,
        **overrides: Any,
    ) -> Self:
        """Loads a pipeline from one file of weights (`.safetensors`, `.ckpt` or `.pth`) in any known layout.

        path: the file, its address on huggingface.co, or a folder of ModelScope's original files.
        config: a folder or hub id with what the file lacks. Without it, the scheduler is that of the official model,
        and the tokenizer is CLIP's, which is in this package. revision: of `config`.
        The other arguments and the errors are those of `from_pretrained`. No converted file is written.
        """
        where: dict[str, Any] = dict(revision=revision, local_files_only=local_files_only, token=token,
                                     cache_dir=cache_dir, force_download=force_download)
        path = hub.local_file(path, **where)
        if cls is DiffusionPipeline:
            cls = files.pipeline_class_of_file(path, DiffusionPipeline.CLASSES)
        fields = {name: overrides.pop(name, None) for name in cls.FIELDS}
        dtypes = files.component_dtypes(torch_dtype, dtype, cls.COMPONENTS)
        parts = files.load_single_file(path, cls, config, overrides, dtypes, where, compat, strict, mmap)
        return cls(**parts, compat=compat, **fields)

    def save_pretrained(
        self, folder: str | Path, *, safe_serialization: bool = True, variant: str | None = None
    ) -> None:
        """Writes a folder in the diffusers layout, for this package and diffusers. It changes at once or not at all.

        Other files in `folder` stay. The arguments and errors are those of `Network.save_pretrained`.
        """
        fields = {name: getattr(self, name) for name in self.FIELDS}
        files.save_components(Path(folder), type(self), self.components,
                              {"compat": self.compat, **fields}, safe_serialization, variant)

    @classmethod
    def from_pipe(cls, pipe: "DiffusionPipeline", *, torch_dtype: torch.dtype | None = None,
                  dtype: torch.dtype | None = None, **overrides: Any) -> Self:
        """A pipeline of this class with the same components. They are not copied, and not cast unless a dtype is given.

        Only the scheduler is a copy, so that the two pipelines can run at the same time. Components by name replace
        those of `pipe`. Techniques that are on, such as FreeInit, context windows and offloading, are on in the new
        pipeline, too. Raises TypeError if `pipe` is not a pipeline of minit2v, or if an argument is unknown.
        """
        if not isinstance(pipe, DiffusionPipeline):
            raise TypeError(f"from_pipe() needs a pipeline of minit2v, not a {type(pipe).__name__}")
        known = {**pipe.components, "compat": pipe.compat, **{f: getattr(pipe, f) for f in pipe.FIELDS}}
        known = {name: value for name, value in known.items() if name in (*cls.COMPONENTS, "compat", *cls.FIELDS)}
        if "compat" in overrides:  # the fields of the other mode replace those of `pipe`
            known = {name: value for name, value in known.items() if name not in pipe.FIELDS}
        accepted = (*cls.COMPONENTS, "compat", *cls.FIELDS)
        for name in overrides:
            if name not in accepted:
                raise TypeError(f"{cls.__name__}.from_pipe() has no argument {name!r}{nearest(name, accepted)}")
        if "scheduler" not in overrides:
            known["scheduler"] = copy.deepcopy(pipe.scheduler)
        new = cls(**known | overrides)
        for name in ("_offload", "_offload_text", "_sequential_guidance", "_narrow", "_free_init", "_context_windows",
                     "_free_noise_of_loop"):  # fmt: skip
            setattr(new, name, getattr(pipe, name))
        new._progress = dict(pipe._progress)
        return new.to(dtype=dtype or torch_dtype)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Raises RuntimeError if another call uses the same scheduler, or networks that are offloaded or scaled."""
        used = {id(unwrapped(c)) for c in (self, *self.components.values()) if c is not None}
        mine = {id(self), id(self.scheduler)} & used | memory.own(self)
        call = mine, used
        with _running_lock:
            if any(mine & theirs or used & own for own, theirs in _running):
                raise RuntimeError(f"another call uses this {type(self).__name__}, its scheduler, or its networks "
                                   "(offloaded, or with a LoRA scale): make one for each thread, with "
                                   f"{type(self).__name__}.from_pipe(pipe)")  # fmt: skip
            _running.append(call)
        self._interrupt, self._lora_scale = False, 1.0
        try:
            yield
        finally:
            self._lora_scale = 1.0
            with _running_lock:
                _running[:] = [c for c in _running if c is not call]

    @property
    def interrupt(self) -> bool:
        """Set it to True to stop the running call after the current step. The latents so far are decoded.

        Set it in a callback or in another thread. `_interrupt` is the same. Every call begins with False.
        """
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    # Devices ---------------------------------------------------------------------------------------------------------

    def to(self, *args: Any, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None) -> Self:
        """Moves and casts every network: `to("cuda")`, `to(torch.float16)`, or both. Returns the pipeline."""
        for arg in args:
            if isinstance(arg, torch.dtype) and dtype is None:
                dtype = arg
            elif isinstance(arg, torch.device | str | int) and device is None:
                device = arg
            elif arg is not None:
                raise TypeError(f"to() takes one device and one dtype, not {arg!r}" + " in addition" * (len(args) > 1))
        if device is not None and self._offload is not None:
            if torch.device(device).type != "cpu" or self._offload.kind != "model":
                logger.warning("The whole pipeline moves to %s, so offloading is off now.", device)
                self.disable_offload()
        for name, network in self._networks.items():
            network.to(device=None if name in self.IDLE else device, dtype=dtype)
        return self

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keeps the networks on the CPU. Each is on the accelerator only while it computes."""
        to = memory.find_device(gpu_id, device)
        if to is None or to.type == "cpu":
            memory.say_nothing_is_offloaded()
        else:
            memory.begin(self, memory.Offload(to, "model"))

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keeps the networks on the CPU. Each layer is on the accelerator only while it computes.

        This needs the least memory, and is slow. device="cpu" is for memory-mapped weights: they are read from the file
        for each use, and do not stay in memory.
        """
        to = memory.find_device(gpu_id, device)
        if to is None:
            memory.say_nothing_is_offloaded()
        else:
            memory.begin(self, memory.Offload(to, "sequential", units="leaf", side=False, pin=False))

    def enable_group_offload(
        self,
        onload_device: torch.device | str | None = None,
        offload_device: torch.device | str = "cpu",
        offload_type: str = "block_level",
        num_blocks_per_group: int | None = None,
        non_blocking: bool = False,
        use_stream: bool = False,
        record_stream: bool = False,
        low_cpu_mem_usage: bool = False,
        offload_to_disk_path: str | Path | None = None,
        exclude_modules: str | Sequence[str] | None = None,
    ) -> None:
        """Keeps the networks on the CPU. The UNet comes to the device block by block, other networks as a whole.

        onload_device: the device that computes, by default the accelerator. "cpu" is for memory-mapped weights.
        offload_type: "block_level", or "leaf_level" for single layers.
        num_blocks_per_group: how many blocks are copied together, 1 by default.
        use_stream: on CUDA, copy the next block from pinned memory while one computes.
        low_cpu_mem_usage: copy from ordinary memory, not from pinned memory.
        exclude_modules: components that stay on the device.
        non_blocking, record_stream: have no effect.
        Raises ValueError if offload_device is not the CPU, or if offload_to_disk_path is given, because memory-mapped
        weights need no copy on the disk.
        """
        memory.begin(self, memory.group_offload(onload_device, offload_device, offload_type, num_blocks_per_group,
                                                use_stream, low_cpu_mem_usage, offload_to_disk_path, exclude_modules,
                                                self._networks))

    def disable_offload(self) -> None:
        """Turns offloading off. Every network goes back to where it was. diffusers' name is `remove_all_hooks`."""
        memory.end(self)

    remove_all_hooks = disable_offload

    def enable_text_offload(self) -> None:
        """Keeps the text encoder on the CPU, or in its file. It is on the device only while it reads texts."""
        if self.text_encoder is not None:
            self._text_encoder_was_on = self.text_encoder.device
            self._offload_text = True
            self.text_encoder.to("cpu")

    def disable_text_offload(self) -> None:
        if self._offload_text and self.text_encoder is not None and self._offload is None:
            self.text_encoder.to(self._text_encoder_was_on)
        self._offload_text = False

    def enable_sequential_guidance(self) -> None:
        """Saves memory: the predictions with the negative and the positive prompt run one after the other."""
        self._sequential_guidance = True

    def disable_sequential_guidance(self) -> None:
        self._sequential_guidance = False

    def enable_narrow_weights(self, store: str = "int8") -> None:
        """Saves memory: keeps the UNet's weights in 8 bits ("int8" or "fp8"), and widens them block by block.

        The videos change a little. The original parameters stay on the CPU. They are used for saving and when this is
        disabled. Raises ValueError if `store` is unknown.
        """
        memory.set_narrow(self, store)

    def disable_narrow_weights(self) -> None:
        if self._narrow is not None:
            memory.set_narrow(self, None)

    def plan(
        self,
        memory: str | float | None = None,
        *,
        num_frames: int = 16,
        height: int | None = None,
        width: int | None = None,
        num_videos: int = 1,
        guidance: bool = True,
        decode_chunk_size: int | None = None,
    ) -> "Plan":
        """Finds the fastest techniques with which a video fits into memory, and turns them on. Returns the plan.

        memory: "8GiB" or a number of bytes. None means all available memory. With a size on a CPU, the process from
        then on gives freed memory back at once (minit2v/memory/heap.py).
        Raises ValueError if no plan fits, and says what is the least memory. Then nothing has changed.
        """
        return plan_for(self, memory, num_frames, height, width, num_videos, guidance, decode_chunk_size)

    @property
    def _execution_device(self) -> torch.device:
        return self.device if self._offload is None else self._offload.to

    @contextmanager
    def _placed(self, name: str) -> Iterator[Any]:
        """The component, on the device that computes, also if it is offloaded."""
        with memory.placed(self, name) as component:
            yield component

    def enable_vae_slicing(self) -> None:
        """Saves memory: the VAE decodes one frame at a time. The result is the same."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Saves memory: the VAE handles large frames in overlapping tiles. The result changes a little."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        self.vae.disable_tiling()

    def set_progress_bar_config(self, **tqdm_arguments: Any) -> None:
        self._progress = tqdm_arguments

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        from tqdm.auto import tqdm

        return tqdm(iterable, total=total, **self._progress)

    # Methods of diffusers that are not needed here --------------------------------------------------------------------

    def enable_attention_slicing(self, slice_size: Any = "auto") -> None:
        say_unneeded("enable_attention_slicing", "attention always needs little memory")

    def disable_attention_slicing(self) -> None:
        say_unneeded("disable_attention_slicing", "attention is never sliced")

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        say_unneeded("enable_xformers_memory_efficient_attention", "PyTorch's own attention needs as little memory")

    def disable_xformers_memory_efficient_attention(self) -> None:
        say_unneeded("disable_xformers_memory_efficient_attention", "xformers is never used")

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        say_unneeded("fuse_qkv_projections", "pipe.optimize() fuses q, k and v")

    def unfuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        say_unneeded("unfuse_qkv_projections", "pipe.restore() undoes what optimize() did")

    # Speed -----------------------------------------------------------------------------------------------------------

    def optimize(self, *, graphs: bool | None = None, compile: bool = False) -> Self:
        """Makes the pipeline faster: rearranges weights in memory, and uses CUDA graphs (minit2v/fast). Returns it.

        Call it after `.to(...)`. It affects every pipeline that shares the networks, until `restore()`.
        graphs: launch the UNet as a CUDA graph. None means yes if the UNet is on CUDA. The first step with a new shape
        takes a few times longer, and the memory of the graph stays in use.
        compile: use torch.compile for the UNet's blocks. The first step then takes minutes.
        Raises ValueError if there is no UNet, or if graphs=True and the UNet is not on CUDA.
        """
        if self.unet is None:
            raise ValueError("optimize() needs the pipeline's unet, which is None")
        on_cuda = self.unet.device.type == "cuda"
        if graphs and not on_cuda:
            raise ValueError(f"graphs=True: a CUDA graph needs the UNet on CUDA, but it is on {self.unet.device}")
        fast.optimize(self.unet, graphs=on_cuda if graphs is None else graphs, compile=compile)
        if self.vae is not None:
            fast.optimize(self.vae)
        return self

    def restore(self) -> Self:
        """Turns the fast path off, and undoes `optimize()`. Returns the pipeline.

        It affects every pipeline that shares the networks, until `optimize()`.
        """
        for network in (self.unet, self.vae):
            if network is not None:
                fast.restore(network)
        return self

    # Techniques ------------------------------------------------------------------------------------------------------

    def enable_free_init(
        self,
        num_iters: int = 3,
        use_fast_sampling: bool = False,
        method: str = "butterworth",
        order: float = 4,
        spatial_stop_frequency: float = 0.25,
        temporal_stop_frequency: float = 0.25,
        *,
        generator: Generators = None,
        noise: str | None = None,
        frequencies: str | None = None,
    ) -> None:
        """FreeInit (arXiv:2312.07537): makes a video `num_iters` times, each time from improved initial noise.

        The noise of a round keeps the low frequencies of the last result.
        use_fast_sampling: only the last round has all steps. The rounds before have fewer.
        method: the filter, "butterworth", "gaussian", "ideal" or "box". order: of "butterworth"; higher is steeper.
        spatial_stop_frequency, temporal_stop_frequency: shares of the highest frequency, 0 to 1.
        generator: for the new noise. None: that of the call. noise, frequencies: see `FreeInit` and `compat`.
        Raises ValueError or TypeError if an argument is wrong.
        """
        check_count("num_iters", num_iters)
        if not isinstance(use_fast_sampling, bool):
            raise TypeError(f"use_fast_sampling must be True or False, not {use_fast_sampling!r}")
        check_number("order", order)
        if order <= 0:
            raise ValueError(f"order must be above 0, not {order!r}")
        for name, value in (("spatial_stop_frequency", spatial_stop_frequency),
                            ("temporal_stop_frequency", temporal_stop_frequency)):
            check_number(name, value, 0, 1)
        chosen = {name: value for name, value in (("noise", noise), ("frequencies", frequencies)) if value is not None}
        fields = compat_fields("FreeInit", self.compat) | chosen
        for name, value, known in (("method", method, METHODS), ("noise", fields["noise"], NOISES),
                                   ("frequencies", fields["frequencies"], FREQUENCIES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}{nearest(str(value), known)}")
        for g in generator if isinstance(generator, list | tuple) else [generator]:
            if not isinstance(g, torch.Generator | None):
                raise TypeError(f"generator must be a torch.Generator or a list of them, not {g!r}")
        self._free_init = FreeInit(num_iters, use_fast_sampling, method, order, spatial_stop_frequency,
                                   temporal_stop_frequency, generator, **fields)

    def disable_free_init(self) -> None:
        """Turns FreeInit off: every video is made once."""
        self._free_init = None

    @property
    def free_init_enabled(self) -> bool:
        return self._free_init is not None

    def enable_context_windows(
        self,
        length: int = 16,
        stride: int = 1,
        overlap: int = 4,
        loop: bool = False,
        fuse: str = "pyramid",
        *,
        schedule: str = "uniform",
        per_call: int | None = None,
    ) -> None:
        """Makes videos of any length: the UNet sees `length` frames at a time, in overlapping windows.

        A video of `length` frames or less is made without windows. See docs/long-videos.md.
        stride: number of spacings. 1: windows of neighbouring frames. 2: also windows of every second frame. 3: also of
        every fourth frame.
        overlap: how many frames a window shares with the next.
        loop: whether the first frame follows the last.
        fuse: the weights of a window's frames. "flat": equal. "pyramid": highest in the middle. "overlap_linear": lower
        where windows overlap. "delayed_reverse_sawtooth": highest just after the middle.
        schedule: "uniform": the borders of windows move at every prediction. "static": they do not move. "batched":
        windows do not overlap.
        per_call: how many windows the UNet sees in one call. None: one on a CPU, on CUDA as many as fit into memory.
        Raises ValueError or TypeError if arguments are wrong or contradict each other.
        """
        self._context_windows = ContextWindows(length, stride, overlap, loop, fuse, schedule, per_call)

    def disable_context_windows(self) -> None:
        """Turns context windows off: the UNet sees all frames at once."""
        self._context_windows = None

    @property
    def context_windows_enabled(self) -> bool:
        return self._context_windows is not None

    def enable_free_noise(
        self,
        context_length: int | None = 16,
        context_stride: int = 4,
        weighting_scheme: str = "pyramid",
        noise_type: str = "shuffle_context",
        prompt_interpolation_callback: Interpolate | None = None,
        *,
        tail: str | None = None,
        repeat: str | None = None,
    ) -> None:
        """FreeNoise (arXiv:2310.15169): makes long videos with the noise of one window, and with windowed attention.

        context_length: frames of a window. None is the number of positions of the motion modules.
        context_stride: frames from the start of one window to the start of the next.
        weighting_scheme: the weights of a window's frames, "flat", "pyramid" or "delayed_reverse_sawtooth".
        noise_type: "shuffle_context" reuses the noise of one window earlier in another order. "repeat_context" reuses
        it in the same order. "random" draws new noise.
        prompt_interpolation_callback(first, last, states, states): returns the text states (n l d) from one frame to
        another. The default is linear interpolation. tail, repeat: see `FreeNoise` and `compat`.
        In a UNetMotionModel, the motion modules get windows, also for every other pipeline that shares it. Other UNets
        get one window at a time, as with `enable_context_windows(schedule="static")`. If context windows are on, they
        are used instead, and FreeNoise only makes the noise.
        Raises ValueError or TypeError if an argument is wrong.
        """
        if self.unet is None:
            raise ValueError("FreeNoise needs the pipeline's unet, which is None")
        positions = getattr(self.unet.config, "motion_max_seq_length", None)
        if context_length is None:
            if positions is None:
                raise ValueError(f"give context_length, because a {type(self.unet).__name__} has no positions")
            context_length = positions
        if positions is not None and context_length > positions:
            raise ValueError(f"context_length {context_length} is too long: the motion modules have {positions} "
                             "positions")
        fields = compat_fields("FreeNoise", self.compat)
        fields |= {name: value for name, value in (("tail", tail), ("repeat", repeat)) if value is not None}
        settings = FreeNoise(context_length, context_stride, weighting_scheme, noise_type,
                             prompt_interpolation_callback, **fields)
        self._set_free_noise(settings)

    def disable_free_noise(self) -> None:
        """Turns FreeNoise off: every frame has new noise, and attention sees all frames at once."""
        self._set_free_noise(None)

    @property
    def free_noise_enabled(self) -> bool:
        return self._free_noise is not None

    @property
    def _free_noise(self) -> FreeNoise | None:
        return self.unet.free_noise if isinstance(self.unet, UNetMotionModel) else self._free_noise_of_loop

    def _set_free_noise(self, settings: FreeNoise | None) -> None:
        if isinstance(self.unet, UNetMotionModel):
            self.unet.set_free_noise(settings)
        else:
            self._free_noise_of_loop = settings

    @property
    def _windows(self) -> ContextWindows | None:
        """The windows that the UNet gets, or None if it gets all frames at once."""
        free = self._free_noise
        if free is None or self._context_windows is not None or isinstance(self.unet, UNetMotionModel):
            return self._context_windows
        return ContextWindows(free.length, 1, free.length - free.stride, False, free.weighting_scheme, "static")

    def _check_frame_texts(
        self, frames: int, how: Any, texts: dict[str, Any], states: dict[str, Tensor | None]
    ) -> None:
        """Checks a call's texts for frames: dictionaries {frame: text}, states (b f l d), and the interpolation."""
        check_interpolation(how)
        for name, prompts in texts.items():
            check_frame_prompts(name, prompts, frames)
        for name, value in states.items():
            if value is not None and value.ndim == 4 and value.shape[1] != frames:
                raise ValueError(f"{name} has texts for {value.shape[1]} frames, but the video has {frames}")

    def _check_noise(self, latents: Tensor | None, shape: tuple[int, ...]) -> None:
        """Checks the caller's noise: of this shape (b c f h w), or with FreeNoise of the frames of one window."""
        free = self._free_noise
        if free is not None and isinstance(latents, Tensor) and latents.shape[2:3] == (free.length,):
            shape = (*shape[:2], free.length, *shape[3:])
        if latents is not None:
            check_latents(latents, shape)

    def _draw_noise(
        self, shape: tuple[int, ...], generator: Generators, device: torch.device, dtype: torch.dtype,
        latents: Tensor | None,
    ) -> Tensor:
        """Noise of this shape (b c f h w), or the caller's. FreeNoise makes it from the noise of one window."""
        noise = randn(shape, generator, device, dtype) if latents is None else latents.to(device)
        if self._free_noise is None or latents is not None and latents.shape[2] == shape[2]:
            return noise
        return self._free_noise.stretch(noise, shape[2], generator)

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """FreeU (arXiv:2309.11497): multiplies the backbone by b, and low frequencies of skip connections by s.

        1 is the coarsest level of the up path, and 2 the next. diffusers' pages use s1=0.9, s2=0.2, b1=1.5, b2=1.6 for
        Stable Diffusion 1.5. It affects every pipeline that shares the UNet.
        Raises ValueError if a factor is not above 0.
        """
        if self.unet is None:
            raise ValueError("FreeU needs the pipeline's unet, which is None")
        self.unet.enable_freeu(s1, s2, b1, b2)

    def disable_freeu(self) -> None:
        if self.unet is None:
            raise ValueError("FreeU needs the pipeline's unet, which is None")
        self.unet.disable_freeu()

    # LoRA ------------------------------------------------------------------------------------------------------------

    def load_lora_weights(
        self,
        path_or_dict: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        strict: bool = True,
        hotswap: bool = False,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        use_safetensors: bool | None = None,
    ) -> None:
        """Loads a LoRA or a motion LoRA, in any known format (minit2v/adapters/formats.py).

        It becomes the active LoRA, with weight 1, in each network that it changes. `set_adapters` chooses others.
        path_or_dict: a file, a dictionary of tensors, a folder or a hub id. In a folder it is
        pytorch_lora_weights.safetensors, the only file, or `weight_name`.
        adapter_name: default_0, default_1, ... by default.
        strict: with False, all tensors that fit are loaded, and the others are logged.
        hotswap: replace the LoRA with that name, and keep its weight and state. If layers and ranks are the same, its
        memory is reused, so that CUDA graphs need not be captured again.
        Raises ValueError if a tensor does not fit, and FileNotFoundError if the file is missing. After an error nothing
        has changed.
        """
        if isinstance(path_or_dict, Mapping):
            file = lora.open_dict(path_or_dict)
        else:
            file = lora.open_lora(path_or_dict, weight_name, subfolder, use_safetensors, revision=revision,
                                  local_files_only=local_files_only, token=token, cache_dir=cache_dir,
                                  force_download=force_download)
        lora.load(self._adapted, file, adapter_name, strict, hotswap)

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """Makes only these LoRAs active. adapter_weights: one weight for all, or a list with one for each.

        A weight is a number (it may be negative), or a dictionary such as {"unet": ..., "text_encoder": 0.5}. The
        UNet's weight may be given for blocks: {"down": 0.9, "mid": 1, "up": {"block_1": 0.6, "block_2": [0.4, 1]}}.
        A list has one number for each transformer of a block. A number for a block is for all its layers. Missing
        weights are 1. Raises ValueError if a name or a weight is wrong.
        """
        lora.set_adapters(self._adapted, adapter_names, adapter_weights)

    def get_active_adapters(self) -> list[str]:
        """The names of the active LoRAs, also if they are disabled by `disable_lora`."""
        return lora.active(self._adapted)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Component -> the names of all LoRAs that are loaded for it."""
        return lora.listed(self._adapted)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        lora.delete(self._adapted, adapter_names)

    def unload_lora_weights(self) -> None:
        """Removes all LoRAs. Fused LoRAs stay in the weights, and cannot be unfused any more."""
        lora.unload(self._adapted)

    def enable_lora(self) -> None:
        lora.enable(self._adapted, True)

    def disable_lora(self) -> None:
        """Turns all LoRAs off, until `enable_lora`."""
        lora.enable(self._adapted, False)

    def fuse_lora(
        self,
        components: str | Sequence[str] = ("unet", "text_encoder"),
        lora_scale: float = 1.0,
        safe_fusing: bool = True,
        adapter_names: str | Sequence[str] | None = None,
    ) -> None:
        """Adds the active LoRAs, or the named ones, to the weights, times `lora_scale`. Then the model has full speed.

        A fused model can be saved. The original weights are kept on the CPU for `unfuse_lora`, until
        `unload_lora_weights`. safe_fusing: has no effect, because fusing is always safe.
        Raises FloatingPointError if a weight would not be finite. Then nothing has changed.
        """
        lora.fuse(self._adapted_among(components), lora_scale, adapter_names)

    def unfuse_lora(self, components: str | Sequence[str] = ("unet", "text_encoder")) -> None:
        """Undoes `fuse_lora` to the last bit. The LoRAs stay active, but are not fused any more."""
        lora.unfuse(self._adapted_among(components))

    @_of_class_or_object
    def save_lora_weights(
        owner: Any,  # noqa: N805
        save_directory: str | Path,
        unet_lora_layers: Mapping[str, Tensor] | None = None,
        text_encoder_lora_layers: Mapping[str, Tensor] | None = None,
        weight_name: str | None = None,
        safe_serialization: bool = True,
        unet_lora_adapter_metadata: Mapping[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: Mapping[str, Any] | None = None,
        *,
        adapter_names: str | Sequence[str] | None = None,
    ) -> None:
        """Writes the loaded LoRAs, or the named ones, under peft's names. diffusers can load them, too.

        One LoRA becomes pytorch_lora_weights.safetensors, or `weight_name`. Several become one file each, with their
        names. They are saved as they were loaded, without the weights of `set_adapters`.
        Instead, one can pass dictionaries of layers {"down_blocks.0....to_q.lora_A.weight": tensor}, with peft's
        LoraConfig as metadata. This also works on the class, without a pipeline.
        Raises ValueError if there is nothing to save.
        """
        if unet_lora_layers is None and text_encoder_lora_layers is None:
            if isinstance(owner, type):
                raise ValueError("save_lora_weights: give unet_lora_layers or text_encoder_lora_layers, or call it on "
                                 "a pipeline that has a LoRA")
            lora.save(owner._adapted, save_directory, adapter_names, weight_name, safe_serialization)
            return
        layers = {"unet": (unet_lora_layers, unet_lora_adapter_metadata),
                  "text_encoder": (text_encoder_lora_layers, text_encoder_lora_adapter_metadata)}
        lora.save_layers(save_directory, layers, weight_name, safe_serialization)

    @property
    def _adapted(self) -> dict[str, Network]:
        """The networks that LoRAs can change."""
        networks = {name: unwrapped(self._networks.get(name)) for name in lora.COMPONENTS}
        return {name: network for name, network in networks.items() if isinstance(network, Network)}

    def _adapted_among(self, components: str | Sequence[str]) -> dict[str, Network]:
        components = [components] if isinstance(components, str) else [*components]
        for name in components:
            if name not in lora.COMPONENTS:
                raise ValueError(f"components: {name!r} is not among {lora.COMPONENTS}{nearest(name, lora.COMPONENTS)}")
        return {name: network for name, network in self._adapted.items() if name in components}

    def _check_scale(self, what: str, scale: Any) -> float:
        """Checks a call's scale for LoRAs. While the call runs, no other call may use the networks' LoRAs."""
        check_number(what, scale)
        networks = self._adapted
        if scale == 1 or not networks:
            return float(scale)
        if not any(lora.loras_of(n).loaded for n in networks.values()):
            raise ValueError(f"{what} is {scale}, but no LoRA is loaded")
        if merged := [m for n in networks.values() for m in lora.loras_of(n).merged]:
            raise ValueError(f"{what} is {scale}, but the LoRA {merged[0]!r} is fused: use "
                             "fuse_lora(lora_scale=...), or call unfuse_lora() first")
        with _running_lock:
            own = [call for call in _running if id(self) in call[0]]
            mine = {id(n) for n in networks.values()}
            if any(mine & used for held, used in _running if id(self) not in held):
                raise RuntimeError(f"{what} is for one call at a time, but another call uses these networks: "
                                   "wait for it, or load a second pipeline")
            for held, _ in own:
                held |= mine
        return float(scale)

    # Textual inversion -----------------------------------------------------------------------------------------------

    def load_textual_inversion(
        self,
        source: textual_inversion.Source | Sequence[textual_inversion.Source],
        token: str | Sequence[str | Sequence[str] | None] | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        use_safetensors: bool | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        hf_token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
    ) -> dict[str, int]:
        """Loads words with learned vectors (textual inversion, arXiv:2208.01618). Returns {word: number of vectors}.

        source: a file, a folder, a hub id, a state dict, a tensor (n d) or (d), or a list of these.
        token: the word for prompts, instead of the word in the file. It is a list if there are several sources, or
        several words in the source. Every pipeline that shares the text encoder and tokenizer knows the words.
        Raises ValueError if vectors have another width, or if a word already has a meaning (docs/adapters.md). After an
        error no word is loaded.
        """
        several = isinstance(source, list | tuple)
        sources = list(source) if several else [source]
        for one in sources:
            if not isinstance(one, str | Path | Tensor | Mapping):
                raise TypeError(f"an embedding is a path, a hub id, a state dict or a tensor, not a "
                                f"{type(one).__name__}")  # fmt: skip
        tokens = [token] if not several else [None] * len(sources) if token is None else (
            list(token) if not isinstance(token, str) else [token])  # fmt: skip
        if len(tokens) != len(sources):
            raise ValueError(f"there are {len(sources)} embeddings, but token= has {len(tokens)}")
        for word in tokens:
            if not (word is None or isinstance(word, str) or isinstance(word, list | tuple) and all(
                    isinstance(w, str) for w in word)):  # fmt: skip
                raise TypeError(f"token= must be a word or a list of words, not {word!r}")
        return textual_inversion.load(
            *self._text_parts(), list(zip(sources, tokens, strict=True)), weight_name=weight_name, subfolder=subfolder,
            use_safetensors=use_safetensors, revision=revision, local_files_only=local_files_only, token=hf_token,
            cache_dir=cache_dir, force_download=force_download,
        )  # fmt: skip

    def unload_textual_inversion(self, tokens: str | Sequence[str] | None = None) -> None:
        """Removes loaded words with all their vectors. None removes all words.

        Raises ValueError if a word was not loaded.
        """
        textual_inversion.unload(*self._text_parts(), [tokens] if isinstance(tokens, str) else tokens)

    def _text_parts(self) -> tuple[CLIPTokenizer, CLIPTextModel]:
        for name in ("tokenizer", "text_encoder"):
            if getattr(self, name) is None:
                raise ValueError(f"textual inversion needs the pipeline's {name}, which is None")
        return self.tokenizer, self.text_encoder

    # Text ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        *,
        num_frames: int | None = None,
        prompt_interpolation: str | Interpolate = "linear",
        weights: str | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Encodes prompts. Returns the text states (b l d) of the prompts and of the negative prompts.

        Without guidance the second is None. One negative prompt is used for the whole batch. The default is the empty
        text. Given states (prompt_embeds, negative_prompt_embeds) are not encoded again.
        If a prompt is a dictionary {frame: text}, both results are (b f l d), with states for `num_frames` frames.
        prompt_interpolation, "linear" or "spherical", gives the states between two named frames.
        weights: "a1111" reads (word:1.3), [word] and BREAK like A1111's web UI, and prompts of any length
        (docs/prompts.md). The default is the pipeline's `prompt_weights`.
        lora_scale: a factor of the text encoder's LoRAs.
        Raises ValueError or TypeError if arguments are wrong or do not fit together.
        """
        scale = self._lora_scale if lora_scale is None else self._check_scale("lora_scale", lora_scale)
        device = device or self._execution_device
        encoder = self.text_encoder if self.text_encoder is not None else self.unet
        weights = self.prompt_weights if weights is None else weights
        self._check_weights(weights, prompt, negative_prompt)
        length = None if weights is None else self._length_of(prompt, negative_prompt, prompt_embeds)
        encode = partial(self._encode_frames, num_frames=num_frames, how=prompt_interpolation, weights=weights,
                         lora_scale=scale)
        if prompt_embeds is None:
            prompt_embeds = encode(prompt, length, clip_skip)
        text = prompt_embeds.to(device=device, dtype=encoder.dtype)
        if not do_classifier_free_guidance:
            return text.repeat_interleave(num_images_per_prompt, dim=0), None

        if negative_prompt_embeds is None:
            skip = clip_skip if self.clip_skip_negative else None
            negative_prompt_embeds = encode(negative_prompt or "", text.shape[-2], skip)
        negative = negative_prompt_embeds.to(device=device, dtype=encoder.dtype)
        if text.ndim != negative.ndim:  # only one has a text for each frame
            text, negative = (v if v.ndim == 4 else v[:, None].expand(-1, num_frames, -1, -1) for v in (text, negative))
        if negative.shape[0] == 1:
            negative = negative.expand(len(text), *negative.shape[1:])
        if negative.shape != text.shape:
            raise ValueError(f"prompts and negative prompts do not match: {tuple(text.shape)} and "
                             f"{tuple(negative.shape)} (batch, tokens, width)")
        return (text.repeat_interleave(num_images_per_prompt, dim=0),
                negative.repeat_interleave(num_images_per_prompt, dim=0))

    def _check_weights(self, weights: Any, *prompts: Any) -> None:
        """Raises ValueError if `weights` is unknown. Warns if a prompt looks weighted, but brackets are text."""
        if weights is not None:
            check_choice("weights", weights, WEIGHTS)
        elif found := [m[0] for text in chain(*map(texts_of, prompts)) if (m := LOOKS_WEIGHTED.search(text))]:
            logger.warning("the prompt looks weighted, but %r is read as plain text. To read it as weights, set the "
                           "pipeline's prompt_weights=\"a1111\", or --prompt-weights.", found[0])

    def _length_of(self, prompt: Any, negative_prompt: Any, prompt_embeds: Tensor | None) -> int:
        """The number of tokens of the longest prompt, in whole chunks, or of `prompt_embeds` if given."""
        if prompt_embeds is not None:
            return prompt_embeds.shape[-2]
        if self.tokenizer is None:
            raise ValueError("to encode a prompt, the pipeline needs its tokenizer, which is None")
        texts = [*texts_of(prompt), *texts_of(negative_prompt)]
        return max(len(chunks(self.tokenizer, text)) for text in texts) * self.tokenizer.model_max_length

    def _encode_frames(
        self, prompt: Any, length: int | None, clip_skip: int | None, num_frames: int | None, how: str | Interpolate,
        weights: str | None, lora_scale: float,
    ) -> Tensor:
        """A text or b texts -> states (b l d); a dictionary {frame: text} -> states (1 f l d)."""
        if not isinstance(prompt, Mapping):
            return self._encode(texts_of(prompt), length, clip_skip, weights, lora_scale)
        if num_frames is None:
            raise ValueError("a prompt {frame: text} needs num_frames, the number of frames of the video")
        check_frame_prompts("prompt", prompt, num_frames)
        check_interpolation(how)
        if how == "linear" and self._free_noise is not None:
            how = self._free_noise.interpolate or how
        at = sorted(prompt)
        states = self._encode([prompt[i] for i in at], length, clip_skip, weights, lora_scale)
        return spread_over_frames(states, at, num_frames, how)[None]

    def _encode(
        self, texts: list[str], length: int | None, clip_skip: int | None, weights: str | None = None,
        lora_scale: float = 1.0,
    ) -> Tensor:
        """b texts -> states (b l d)."""
        if self.tokenizer is None:
            raise ValueError("to encode a prompt, the pipeline needs its tokenizer, which is None")
        with self._placed("text_encoder") as text_encoder, lora.scaled(unwrapped(text_encoder), lora_scale):
            if weights is None:
                ids = self.tokenizer(texts, max_length=length).to(self._execution_device)
                states = text_encoder(ids, clip_skip)
            else:
                count = -(-(length or 0) // self.tokenizer.model_max_length)
                states = prompt_weights.encode(
                    self.tokenizer, lambda ids: text_encoder(ids.to(self._execution_device), clip_skip), texts, count
                )
            check_result(states, text_encoder, "the text encoder")
        return states

    # Denoising -------------------------------------------------------------------------------------------------------

    def denoise(
        self,
        x: Tensor,
        timesteps: Tensor,
        steps: int,
        text: Tensor,
        negative: Tensor | None,
        guidance_scale: float,
        eta: float,
        generator: Generators,
        callbacks: StepCallbacks,
        video: NoisedVideo | None = None,
        pictures: Pictures | None = None,
    ) -> Tensor:
        """x (b c f h w) with the noise of timesteps[0] -> clean latents (b c f h w). FreeInit repeats this.

        video: how x was made from a video, if it is not pure noise. pictures: for IP-Adapters. Every round of FreeInit
        begins with the texts of the call, and the callbacks count its steps from 0.
        """
        self._making = memory.video_of(self, x.shape, negative is not None, video is not None, None)
        memory.foresee(self, x, negative is not None)
        once = partial(self._denoise_once, text=text, negative=negative, guidance_scale=guidance_scale,
                       step_arguments=self._step_arguments(eta, generator), callbacks=callbacks, pictures=pictures)
        if self._free_init is None:
            with self.progress_bar(total=steps) as bar:
                return once(x, timesteps, steps, bar)
        check_generator(self._free_init.generator, len(x), x.device)
        rounds = FreeInitRounds(self._free_init, self.scheduler, x, timesteps, steps, video, generator)
        with self.progress_bar(total=sum(r.steps for r in rounds.plan)) as bar:
            for i, r in enumerate(rounds.plan):
                if self._interrupt:
                    break
                x, timesteps = rounds.begin(i, x)
                x = once(x, timesteps, r.steps, bar)
        return x

    def _denoise_once(
        self,
        x: Tensor,
        timesteps: Tensor,
        steps: int,
        bar: Any,
        *,
        text: Tensor,
        negative: Tensor | None,
        guidance_scale: float,
        step_arguments: dict[str, Any],
        callbacks: StepCallbacks,
        pictures: Pictures | None,
    ) -> Tensor:
        """x (b c f h w) with the noise of timesteps[0] -> clean latents (b c f h w).

        Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598): the UNet predicts twice, with the negative
        and with the positive prompt. The result is negative + guidance_scale * (positive - negative).
        """
        warm_up = len(timesteps) - steps * self.scheduler.order  # additional calls of PNDM, which are not steps
        done = 0
        with self._placed("unet") as unet, lora.scaled(unwrapped(unet), self._lora_scale):
            predict = self._predictor(unet)
            if self._sequential_guidance and negative is not None:
                predict = OneByOne([predict, self._predictor(unet)])
            show = pictures.beside(unwrapped(unet)) if pictures is not None else None  # text -> Prompt
            context = _join(negative, text, unet.dtype, show)
            for i, t in enumerate(takewhile(lambda _: not self._interrupt, timesteps)):
                batch = self.scheduler.scale_model_input(x.repeat(len(context) // len(x), 1, 1, 1, 1), t)
                eps = predict(batch.to(unet.dtype), t, context)
                if negative is not None:
                    eps_negative, eps_text = eps.chunk(2)
                    eps = eps_negative + guidance_scale * (eps_text - eps_negative)

                flat_eps, flat_x = (rearrange(v, f"b c f h w -> {self.STEP_AXES}") for v in (eps, x))
                flat_x = self.scheduler.step(flat_eps, t, flat_x, **step_arguments).prev_sample
                x = rearrange(flat_x, f"{self.STEP_AXES} -> b c f h w", b=len(x))

                if i == 0:  # wrong weights give NaN in the first step, overflow in the last
                    check_result(x, unet, "the UNet")
                if i + 1 == len(timesteps) or (i + 1 > warm_up and (i + 1) % self.scheduler.order == 0):
                    before = text, negative
                    x, text, negative = callbacks(self, done, t, x, text, negative)
                    if callbacks.show_text or text is not before[0] or negative is not before[1]:
                        context = _join(negative, text, unet.dtype, show)
                    done += 1
                    bar.update()
            check_result(x, unet, "the UNet")
            fast.free_copies(unet)  # the VAE needs the memory
        return x

    def _predictor(self, unet: Any) -> Callable[..., Tensor]:
        """The UNet for one run, on the fast path, and in windows if they are on."""
        runner = fast.runner(unet)
        return runner if self._windows is None else Windowed(self._windows, runner)

    def _step_arguments(self, eta: float, generator: Generators) -> dict[str, Any]:
        """eta and generator, if the scheduler's step accepts them (both if it has `**arguments`)."""
        accepted = inspect.signature(self.scheduler.step).parameters
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
        config = self.scheduler.config
        if config.get("clip_sample") and "clip_sample" in config.get("_use_default_values", ()):
            logger.warning("%s clips latents, but clipping is only for pixels: set clip_sample=False.",
                           type(self.scheduler).__name__)
        if eta and "eta" not in accepted and not takes_all:
            logger.warning("%s has no eta: eta=%s has no effect.", type(self.scheduler).__name__, eta)
        return {k: v for k, v in {"eta": eta, "generator": generator}.items() if k in accepted or takes_all}

    # Pixels ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, decode_chunk_size: int | None = None) -> Tensor:
        """latents (b c f h w) -> pixels (b 3 f H W), float32, roughly in [-1, 1].

        decode_chunk_size: how many frames the VAE decodes at a time, all by default.
        """
        with self._placed("vae") as vae:
            z = rearrange(latents.to(vae.device, vae.dtype), "b c f h w -> (b f) c h w") / vae.config.scaling_factor
            pixels = fast.runner(vae).decode(z, decode_chunk_size).float()
            check_result(pixels, vae, "the VAE")
        return rearrange(pixels, "(b f) c h w -> b c f h w", b=latents.shape[0])

    def stream_frames(self, latents: Tensor, decode_chunk_size: int = 8) -> Iterator[np.ndarray]:
        """Decodes latents (1 c f h w) of one video. Yields one frame after the other: (h w 3), float32 in [0, 1].

        The VAE decodes `decode_chunk_size` frames at a time, and only these are in memory. `export_to_video` and
        `export_to_gif` write the frames as they come.
        """
        check_count("decode_chunk_size", decode_chunk_size)
        check_latents(latents, (1, self.vae.config.latent_channels, "f", "h", "w"))
        for piece in latents.split(int(decode_chunk_size), dim=2):
            yield from frames.from_tensor(self.decode_latents(piece, decode_chunk_size), "np")[0]

    def _output(self, x: Tensor, output_type: str, decode_chunk_size: int | None) -> Any:
        if output_type == "latent":
            return x
        return frames.from_tensor(self.decode_latents(x, decode_chunk_size), output_type)

    # Checks ----------------------------------------------------------------------------------------------------------

    def _check_call(
        self,
        prompt: Any,
        negative_prompt: Any,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        num_inference_steps: int,
        guidance_scale: float,
        output_type: str,
        cross_attention_kwargs: dict[str, Any] | None,
        decode_chunk_size: int | None,
        callbacks: StepCallbacks,
        unknown: dict[str, Any],
    ) -> int:
        """Checks the arguments before any work. Returns the number of prompts."""
        for name in unknown:
            accepted = [p for p in inspect.signature(self.__call__).parameters if p != "unknown"]
            raise TypeError(f"{type(self).__name__} has no argument {name!r}{nearest(name, accepted)}"
                            f"{self.HINTS.get(name, '')}")
        for name in ("unet", "scheduler", "vae")[: 2 if output_type == "latent" else 3]:
            if getattr(self, name) is None:
                raise ValueError(f"to make a video, the pipeline needs its {name}, which is None")
        if output_type != "latent":
            made, read = self.unet.config.out_channels, self.vae.config.latent_channels
            if made != read:
                raise ValueError(f"VAE and UNet do not fit: the VAE's latents have {read} channels, the UNet's {made}")
        check_count("num_inference_steps", num_inference_steps)
        if decode_chunk_size is not None:
            check_count("decode_chunk_size", decode_chunk_size)
        callbacks.check()
        check_number("guidance_scale", guidance_scale)
        if output_type not in frames.OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {frames.OUTPUT_TYPES}, not {output_type!r}")
        for name in cross_attention_kwargs or {}:
            if name != "scale":
                raise ValueError(f"cross_attention_kwargs: no adapter reads {name!r}{nearest(name, ['scale'])}")
        scale = (cross_attention_kwargs or {}).get("scale", 1.0)
        self._lora_scale = self._check_scale("cross_attention_kwargs: scale", scale)

        batch = check_text("prompt", prompt, prompt_embeds, self.unet, required=True)
        negatives = check_text("negative_prompt", negative_prompt, negative_prompt_embeds, self.unet, required=False)
        if negatives not in (1, batch):
            raise ValueError(f"{negatives} negative prompts for {batch} prompts: give one, or one for each")
        if prompt_embeds is not None and negative_prompt_embeds is None and guidance_scale > 1:
            length, encoder = prompt_embeds.shape[-2], self.text_encoder
            if encoder is None or length > encoder.config.max_position_embeddings:
                why = "there is no text encoder" if encoder is None else (
                    f"the text encoder reads {encoder.config.max_position_embeddings} tokens")  # fmt: skip
                raise ValueError(f"give negative_prompt_embeds of {length} tokens, as prompt_embeds has: {why}")
        return batch


plan_for = memory.plan_for  # `plan` has an argument of the module's name


def texts_of(prompts: Any) -> list[str]:
    """All texts of a prompt, which may be a text, a list or a dictionary. None is the empty text."""
    if isinstance(prompts, str | None):
        return [prompts or ""]
    return list(prompts.values()) if isinstance(prompts, Mapping) else list(prompts)


def _join(
    negative: Tensor | None, text: Tensor, dtype: torch.dtype, show: Callable[[Tensor], Prompt] | None
) -> Tensor | Prompt:
    """The context of one prediction: texts (b l d), with guidance after the negative ones, and pictures if any."""
    texts = (text if negative is None else torch.cat([negative, text])).to(dtype)
    return texts if show is None else show(texts)
