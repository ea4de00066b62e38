"""What every pipeline is made of: components, a text encoded once, the denoising loop, frames out of the VAE.

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
    """What a pipeline returns: `frames` by name, `output[0]` or `output["frames"]`. `frames[i]` is the i-th video.

    With return_dict=False a call returns `to_tuple()` of it, for which it stands in annotations.
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
    """What a caller wants to hear of, and to change, after each step."""

    legacy: Callable[[int, Tensor, Tensor], None] | None = None  # (step, t, latents), its result is not used
    legacy_every: int = 1
    on_end: Callable[..., dict[str, Tensor] | None] | None = None  # (pipe, step, t, tensors) -> tensors to replace
    names: Sequence[str] = ("latents",)  # the tensors that `on_end` is shown
    NAMES: ClassVar[tuple[str, ...]] = ("latents", "prompt_embeds", "negative_prompt_embeds")

    @property
    def show_text(self) -> bool:
        """Whether `on_end` gets the text in hand, which it may then also change in place."""
        return self.on_end is not None and not {*self.names}.isdisjoint(self.NAMES[1:])

    def check(self) -> None:
        check_count("callback_steps", self.legacy_every)
        for name, function in (("callback", self.legacy), ("callback_on_step_end", self.on_end)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function, not {function!r}")
        if unknown := [n for n in self.names if n not in self.NAMES]:
            raise ValueError(f"callback_on_step_end_tensor_inputs: {unknown} is not among {list(self.NAMES)}")

    def __call__(self, pipe: "DiffusionPipeline", step: int, t: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
        """The tensors (in the order of NAMES) after the callbacks have seen them and perhaps replaced some."""
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
    """A pipeline's `__call__`: without gradients, and RuntimeError where it, or its scheduler, is in a call already."""

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
    """A method that is called on a class or on an object, which is its first argument."""

    def __init__(self, function: Callable[..., None]):
        self.function, self.__doc__ = function, function.__doc__

    def __get__(self, owner: Any, cls: type) -> Callable[..., None]:
        return partial(self.function, cls if owner is None else owner)


_running: list[tuple[set[int], set[int]]] = []  # of each call the ids of what it has for itself, and of all it uses
_running_lock = threading.Lock()


class DiffusionPipeline:
    """Components under the names of model_index.json, and what can be done with all of them together."""

    COMPONENTS: ClassVar[dict[str, tuple[str, ...]]] = {}  # name -> classes that fit; none given: any scheduler
    OPTIONAL: ClassVar[tuple[str, ...]] = ()  # the components without which a pipeline is whole, too
    IDLE: ClassVar[tuple[str, ...]] = ()  # those that compute nothing, and need no room on an accelerator
    FIELDS: ClassVar[tuple[str, ...]] = ()  # the deviations (compat.py) that are saved with the pipeline
    STEP_AXES: ClassVar[str] = "(b f) c h w"  # how the scheduler sees the latents: it draws its noise in this shape
    HINTS: ClassVar[dict[str, str]] = {}  # arguments of other pipelines -> what to do instead
    CLASSES: ClassVar[dict[str, type["DiffusionPipeline"]]] = {}

    # Each may be None, in a pipeline for one half of the work: what needs it then says so in one line.
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet
    if TYPE_CHECKING:  # what each class defines, with arguments of its own
        __call__: Callable[..., Any]

    def __init_subclass__(cls, **kw: Any):
        super().__init_subclass__(**kw)
        DiffusionPipeline.CLASSES[cls.__name__] = cls

    def __init__(self, components: dict[str, Any], compat: str | None, fields: dict[str, Any]):
        """Fields that are None or absent take their value from `compat` (None, or "diffusers", the reference's)."""
        defaults: dict[str, Any] = {}
        for cls in reversed(type(self).__mro__):  # a class of the user's own deviates as the one it is made from
            defaults |= compat_fields(cls.__name__, compat)
        self.compat = compat
        for name in self.FIELDS:
            setattr(self, name, defaults[name] if fields.get(name) is None else fields[name])
        for name in self.COMPONENTS:
            setattr(self, name, components[name])
        self._interrupt = False
        self._lora_scale = 1.0  # of the call that runs
        self._offload: memory.Offload | None = None
        self._offload_text = self._sequential_guidance = False
        self._narrow: str | None = None  # the format of the UNet's weights, if it is not that of its parameters
        self._making: Video | None = None  # what the call that runs is at
        self._free_init: FreeInit | None = None
        self._context_windows: ContextWindows | None = None
        self._free_noise_of_loop: FreeNoise | None = None  # of a UNet that is shown windows; another has its own
        self._progress: dict[str, Any] = {}
        self.prompt_weights: str | None = None  # how brackets in prompts are read: "a1111", or None: as text

    @classmethod
    def _of_networks(cls, networks: dict[str, Any]) -> Self:
        """A pipeline of these alone, whose class has not looked at them: what it needs is counted on it."""
        pipe = object.__new__(cls)
        DiffusionPipeline.__init__(pipe, {**dict.fromkeys(cls.COMPONENTS), **networks}, None, {})
        return pipe

    # Components ------------------------------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        """A network in DistributedDataParallel comes out of it: without gradients that has nothing to do but wait.

        TypeError where a component is none that this package runs.
        """
        if is_parallel(getattr(value, "_orig_mod", None)):
            logger.warning("%s was compiled together with its %s, of which it is taken out: torch.compile the network.",
                           name, type(value._orig_mod).__name__)  # fmt: skip
            value = unwrapped(value)
        if is_parallel(value):
            value = unwrapped(value)
        if name in self.COMPONENTS:
            check_component(name, value, self.COMPONENTS[name])
        super().__setattr__(name, value)

    if not TYPE_CHECKING:  # a type checker would believe that there is every name

        def __getattr__(self, name: str) -> Any:
            if hasattr(type(self), name):  # a property whose own error says more
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
        """`compat` holds for a scheduler assigned later, too; what it was given explicitly stays."""
        self._scheduler = scheduler.with_compat(self.compat) if self.compat and scheduler is not None else scheduler

    @property
    def _networks(self) -> dict[str, nn.Module]:
        return {name: c for name, c in self.components.items() if isinstance(c, nn.Module)}

    @property
    def dtype(self) -> torch.dtype:
        return self._main_network.dtype

    @property
    def device(self) -> torch.device:
        """Where the components are: the CPU, between calls, when they are offloaded to it."""
        return self._main_network.device

    @property
    def _main_network(self) -> nn.Module:
        if not self._networks:
            raise ValueError(f"this {type(self).__name__} has no networks")
        return self._networks["unet"] if "unet" in self._networks else next(iter(self._networks.values()))

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, along height and width."""
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
        """The pipeline of a local folder or a hub id.

        Called on `DiffusionPipeline`, model_index.json names the class. `torch_dtype` and `dtype` are one argument
        under its old and new name; None is float32, and a dictionary {component: dtype, "default": dtype} gives each
        its own. Components given by name (`vae=...`, `scheduler=...`) are used in place of the folder's, also None; a
        class (`unet=MyUNet`, `scheduler=MyScheduler`) loads the folder's with that class. No file makes anything be
        imported: a pipeline that was saved with a class of your own has to be told it.
        strict: False lets parameters that the files lack keep their initialisation, as for a single network.
        mmap: False copies the weights, so that nobody who writes to the files later changes them (docs/safety.md).
        A file in place of the folder is read as by `from_single_file`, and so is a folder of ModelScope's files.
        """
        path_or_id = hub.local(path_or_id, revision=revision, local_files_only=local_files_only, token=token,
                               cache_dir=cache_dir, force_download=force_download)
        if subfolder is None and is_authors_layout(path_or_id):
            if variant is not None:
                raise ValueError(f"{path_or_id} is in the authors' layout: it has no variant {variant!r}")
            return cls.from_single_file(path_or_id, torch_dtype=torch_dtype, dtype=dtype, compat=compat, strict=strict,
                                        mmap=mmap, revision=revision, local_files_only=local_files_only, token=token,
                                        cache_dir=cache_dir, force_download=force_download, **overrides)
        where = dict(revision=revision, local_files_only=local_files_only, token=token, cache_dir=cache_dir,
                     force_download=force_download)
        index = files.read_index(path_or_id, subfolder, where)
        if cls is DiffusionPipeline:
            with read_from(path_or_id):
                cls = files.pipeline_class(index, DiffusionPipeline.CLASSES)
        saved = index.get(files.FIELDS_KEY, {}) if compat is None else {"compat": compat}  # a mode given wins
        fields = {name: overrides.pop(name, saved.get(name)) for name in cls.FIELDS}
        dtypes = files.component_dtypes(torch_dtype, dtype, cls.COMPONENTS)
        weights = dict(variant=variant, use_safetensors=use_safetensors, compat=saved.get("compat"),
                       strict=strict, mmap=mmap)
        with read_from(path_or_id, (ValueError,)):  # a TypeError is about the arguments
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
        """The pipeline of one file of weights, `.safetensors`, `.ckpt` or `.pth`, in any layout that is known.

        `path` may be a folder of ModelScope's files, too, or the address of a file on huggingface.co, which is fetched.
        config: a folder or a hub id for what the file lacks. Without it, the scheduler is that of the official model,
        and the tokenizer is CLIP's, which is in this package. `revision` is of `config`; the rest, also
        `strict` and `mmap`, as for `from_pretrained`. Nothing is written.
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
        """Write the diffusers layout, which diffusers loads, too. The whole folder changes at once, or not at all.

        Files of `folder` that are none of the pipeline's stay. Errors as of `Network.save_pretrained`.
        """
        fields = {name: getattr(self, name) for name in self.FIELDS}
        files.save_components(Path(folder), type(self), self.components,
                              {"compat": self.compat, **fields}, safe_serialization, variant)

    @classmethod
    def from_pipe(cls, pipe: "DiffusionPipeline", *, torch_dtype: torch.dtype | None = None,
                  dtype: torch.dtype | None = None, **overrides: Any) -> Self:
        """A pipeline of this class around the same components: no copy, and no cast where no dtype is given.

        The scheduler alone is a copy, so that the two pipelines may run at the same time. Techniques that are on, such
        as FreeInit, context windows and offloading, are on in the new pipeline, too.
        """
        if not isinstance(pipe, DiffusionPipeline):
            raise TypeError(f"from_pipe() takes a pipeline of minit2v, not a {type(pipe).__name__}")
        known = {**pipe.components, "compat": pipe.compat, **{f: getattr(pipe, f) for f in pipe.FIELDS}}
        known = {name: value for name, value in known.items() if name in (*cls.COMPONENTS, "compat", *cls.FIELDS)}
        if "compat" in overrides:  # another mode: its fields, not those of `pipe`
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
        """A call steps its scheduler, and moves networks that are offloaded: others must not use them meanwhile."""
        used = {id(unwrapped(c)) for c in (self, *self.components.values()) if c is not None}
        mine = {id(self), id(self.scheduler)} & used | memory.own(self)
        call = mine, used
        with _running_lock:
            if any(mine & theirs or used & own for own, theirs in _running):
                raise RuntimeError(f"this {type(self).__name__}, or one with the same scheduler, or networks that are "
                                   "offloaded or whose LoRAs have its scale, is in the middle of a call: make another "
                                   "around the same networks, with "
                                   f"{type(self).__name__}.from_pipe(pipe), for each thread")  # fmt: skip
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
        """Whether the call that runs is to make no more steps; what it has by then is decoded.

        To be set in a callback or from another thread, also as `_interrupt`. Every call begins with False.
        """
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    # Devices ---------------------------------------------------------------------------------------------------------

    def to(self, *args: Any, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move and cast every network: `to("cuda")`, `to(torch.float16)`, both in any order. Returns the pipeline."""
        for arg in args:
            if isinstance(arg, torch.dtype) and dtype is None:
                dtype = arg
            elif isinstance(arg, torch.device | str | int) and device is None:
                device = arg
            elif arg is not None:
                raise TypeError(f"to() takes one device and one dtype, not {arg!r}" + " as well" * (len(args) > 1))
        if device is not None and self._offload is not None:
            if torch.device(device).type != "cpu" or self._offload.kind != "model":
                logger.warning("The pipeline moves to %s as a whole: offloading is off from here.", device)
                self.disable_offload()
        for name, network in self._networks.items():
            network.to(device=None if name in self.IDLE else device, dtype=dtype)
        return self

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keep the networks on the CPU and bring each to the accelerator only while it computes."""
        to = memory.find_device(gpu_id, device)
        if to is None or to.type == "cpu":
            memory.say_nothing_is_offloaded()
        else:
            memory.begin(self, memory.Offload(to, "model"))

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Bring every layer to the accelerator by itself, while it computes: the least memory, and slow.

        device="cpu": for weights that are mapped from files, which then do not stay in memory.
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
        """Bring the UNet to the device block by block ("leaf_level": layer by layer), and the others while they run.

        use_stream: on CUDA, copy the next block from pinned memory while one computes; low_cpu_mem_usage: from memory
        that is not pinned. num_blocks_per_group: blocks that come together, 1. exclude_modules: components that stay on
        the device. onload_device: the accelerator where not given, else "cpu", for weights that are mapped from files.
        non_blocking, record_stream: change nothing. ValueError on an offload_device other than the CPU, and with a path
        on disk: weights stay mapped from their files as it is.
        """
        memory.begin(self, memory.group_offload(onload_device, offload_device, offload_type, num_blocks_per_group,
                                                use_stream, low_cpu_mem_usage, offload_to_disk_path, exclude_modules,
                                                self._networks))

    def disable_offload(self) -> None:
        """Every network as a whole, where it was before it came and went. Also `remove_all_hooks`, diffusers' name."""
        memory.end(self)

    remove_all_hooks = disable_offload

    def enable_text_offload(self) -> None:
        """Keep the text encoder on the CPU, or in its file, except while it reads the texts of a call."""
        if self.text_encoder is not None:
            self._text_encoder_was_on = self.text_encoder.device
            self._offload_text = True
            self.text_encoder.to("cpu")

    def disable_text_offload(self) -> None:
        if self._offload_text and self.text_encoder is not None and self._offload is None:
            self.text_encoder.to(self._text_encoder_was_on)
        self._offload_text = False

    def enable_sequential_guidance(self) -> None:
        """Predict with the negative and with the positive text one after the other: half of a step's activations."""
        self._sequential_guidance = True

    def disable_sequential_guidance(self) -> None:
        self._sequential_guidance = False

    def enable_narrow_weights(self, store: str = "int8") -> None:
        """Keep the UNet's weights in 8 bits ("int8", "fp8") and widen them block by block: other numbers, less room.

        The parameters themselves stay as they are, on the CPU: they are what is saved, and what comes back.
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
        """The fastest way to make such a video within so much memory ("8GiB"; None: what there is). It is turned on.

        ValueError where there is none, with what the least would need; then nothing has changed.
        """
        return plan_for(self, memory, num_frames, height, width, num_videos, guidance, decode_chunk_size)

    @property
    def _execution_device(self) -> torch.device:
        return self.device if self._offload is None else self._offload.to

    @contextmanager
    def _placed(self, name: str) -> Iterator[Any]:
        """The component, where it computes, also where it comes and goes."""
        with memory.placed(self, name) as component:
            yield component

    def enable_vae_slicing(self) -> None:
        """Decode frame by frame: less memory, the same numbers."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Encode and decode large frames in overlapping tiles: less memory, other numbers where tiles meet."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        self.vae.disable_tiling()

    def set_progress_bar_config(self, **tqdm_arguments: Any) -> None:
        self._progress = tqdm_arguments

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        from tqdm.auto import tqdm

        return tqdm(iterable, total=total, **self._progress)

    # What others need for less memory, and is here at all times -------------------------------------------------------

    def enable_attention_slicing(self, slice_size: Any = "auto") -> None:
        say_unneeded("enable_attention_slicing", "attention takes little memory as it is")

    def disable_attention_slicing(self) -> None:
        say_unneeded("disable_attention_slicing", "attention is never sliced")

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        say_unneeded("enable_xformers_memory_efficient_attention", "PyTorch's own attention takes as little memory")

    def disable_xformers_memory_efficient_attention(self) -> None:
        say_unneeded("disable_xformers_memory_efficient_attention", "xformers is never used")

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        say_unneeded("fuse_qkv_projections", "pipe.optimize() lays q, k and v together")

    def unfuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        say_unneeded("unfuse_qkv_projections", "pipe.restore() takes the weights back to where they were")

    # Speed -----------------------------------------------------------------------------------------------------------

    def optimize(self, *, graphs: bool | None = None, compile: bool = False) -> Self:
        """Lay the weights out for speed, and launch the UNet as a CUDA graph (minit2v/fast). Returns the pipeline.

        graphs: None is yes where the UNet is on CUDA. The first step of every new shape then takes a few times as long,
        and the graph's memory stays taken. compile: torch.compile the UNet's blocks, which takes minutes at the first
        step. Call it after `.to(...)`. It holds for every pipeline that shares the networks, until `restore()`.
        ValueError where a graph is asked for and the UNet is not on CUDA.
        """
        if self.unet is None:
            raise ValueError("optimize() needs the pipeline's unet, which is None")
        on_cuda = self.unet.device.type == "cuda"
        if graphs and not on_cuda:
            raise ValueError(f"graphs=True: a CUDA graph needs the UNet on CUDA, and it is on {self.unet.device}")
        fast.optimize(self.unet, graphs=on_cuda if graphs is None else graphs, compile=compile)
        if self.vae is not None:
            fast.optimize(self.vae)
        return self

    def restore(self) -> Self:
        """Run the networks as they are written, their weights where they were before `optimize()`.

        It holds for every pipeline that shares the networks, until `optimize()`. Returns the pipeline.
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
        """Make every video `num_iters` times, each time from noise with the low frequencies of the last (FreeInit).

        use_fast_sampling: the rounds before the last make fewer steps. method: the filter, one of "butterworth" (the
        higher its `order`, the steeper), "gaussian", "ideal", "box"; the stop frequencies are shares of the highest,
        0 to 1. generator: for the new noise, otherwise that of the call. noise, frequencies: see `FreeInit`, `compat`.
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
        """Make every video once."""
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
        """Make videos of any length: the UNet sees `length` frames at a time, in windows that overlap.

        overlap: frames that a window shares with the next. stride: how many spacings the frames of a window have: 1 is
        neighbours only, 2 also every second frame, 3 also every fourth. loop: the first frame follows the last.
        fuse: how much a frame counts in each window that holds it: "flat", "pyramid" (most in the middle),
        "overlap_linear" (less where the window overlaps another), "delayed_reverse_sawtooth". schedule: "uniform" (the
        borders move at every prediction), "static" (they stay), "batched" (windows do not overlap). per_call: windows
        that the UNet sees at once; None: one on a CPU, and on CUDA as many as fit into memory.

        ValueError where these do not fit each other. A video of `length` frames or less is made as without windows.
        See docs/long-videos.md and `minit2v.techniques.context_windows`.
        """
        self._context_windows = ContextWindows(length, stride, overlap, loop, fuse, schedule, per_call)

    def disable_context_windows(self) -> None:
        """Show the UNet all frames at once."""
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
        """Make long videos of the noise of `context_length` frames, with attention in windows of so many (FreeNoise).

        context_length: None is as many frames as the motion modules have positions. context_stride: frames from the
        beginning of one window to that of the next. weighting_scheme: "flat", "pyramid", "delayed_reverse_sawtooth".
        noise_type: "shuffle_context" (the noise of a window ago, in another order), "repeat_context" (in the same
        order), "random" (fresh). prompt_interpolation_callback(first, last, states, states) returns the text states
        from one frame to another; the default is linear. tail, repeat: see `FreeNoise`, `compat`.

        A UNetMotionModel gets windows in its motion modules, and keeps them for every pipeline that shares it. Other
        UNets are shown the windows one by one, as by `enable_context_windows` with the schedule "static". Where context
        windows are enabled, too, those are the windows, and FreeNoise gives the noise.
        """
        if self.unet is None:
            raise ValueError("FreeNoise needs the pipeline's unet, which is None")
        positions = getattr(self.unet.config, "motion_max_seq_length", None)
        if context_length is None:
            if positions is None:
                raise ValueError(f"give context_length: a {type(self.unet).__name__} has no positions to take it from")
            context_length = positions
        if positions is not None and context_length > positions:
            raise ValueError(f"context_length {context_length} is too long: the motion modules know {positions} "
                             "positions")
        fields = compat_fields("FreeNoise", self.compat)
        fields |= {name: value for name, value in (("tail", tail), ("repeat", repeat)) if value is not None}
        settings = FreeNoise(context_length, context_stride, weighting_scheme, noise_type,
                             prompt_interpolation_callback, **fields)
        self._set_free_noise(settings)

    def disable_free_noise(self) -> None:
        """Draw the noise of every frame, and attend to all frames at once."""
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
        """The windows that the UNet is shown, if it is not shown all frames at once."""
        free = self._free_noise
        if free is None or self._context_windows is not None or isinstance(self.unet, UNetMotionModel):
            return self._context_windows
        return ContextWindows(free.length, 1, free.length - free.stride, False, free.weighting_scheme, "static")

    def _check_frame_texts(
        self, frames: int, how: Any, texts: dict[str, Any], states: dict[str, Tensor | None]
    ) -> None:
        """What a call says of single frames: dictionaries {frame: text}, states (b f l d), and the way between."""
        check_interpolation(how)
        for name, prompts in texts.items():
            check_frame_prompts(name, prompts, frames)
        for name, value in states.items():
            if value is not None and value.ndim == 4 and value.shape[1] != frames:
                raise ValueError(f"{name} has texts for {value.shape[1]} frames, and the video has {frames}")

    def _check_noise(self, latents: Tensor | None, shape: tuple[int, ...]) -> None:
        """The caller's noise: of this shape (b c f h w), or with FreeNoise of as many frames as a window has."""
        free = self._free_noise
        if free is not None and isinstance(latents, Tensor) and latents.shape[2:3] == (free.length,):
            shape = (*shape[:2], free.length, *shape[3:])
        if latents is not None:
            check_latents(latents, shape)

    def _draw_noise(
        self, shape: tuple[int, ...], generator: Generators, device: torch.device, dtype: torch.dtype,
        latents: Tensor | None,
    ) -> Tensor:
        """Noise (b c f h w) of this shape, or what the caller has given; with FreeNoise, made of that of one window."""
        noise = randn(shape, generator, device, dtype) if latents is None else latents.to(device)
        if self._free_noise is None or latents is not None and latents.shape[2] == shape[2]:
            return noise
        return self._free_noise.stretch(noise, shape[2], generator)

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Turn the UNet's backbone up by b and the low frequencies of its skip connections down to s (FreeU).

        1 and 2: the coarsest level and the next. diffusers' pages use s1=0.9, s2=0.2, b1=1.5, b2=1.6 with Stable
        Diffusion 1.5. It holds for every pipeline that shares the UNet.
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
        """Load a LoRA, a motion LoRA too, in any form that is known (minit2v/adapters/formats.py).

        It is the active one from now on, with weight 1, in each network that it changes; `set_adapters` chooses others,
        or several. A folder or hub id: its pytorch_lora_weights.safetensors, or only file; `weight_name` chooses.
        adapter_name: default_0, default_1, ... where none is given. strict: False loads what fits, and logs the rest.
        hotswap: take the place, weight and state of the LoRA of that name; of the same layers and ranks it goes into
        the same memory, so that no CUDA graph is captured again.
        ValueError in one line where not every tensor has its place, or it is none of these networks'; FileNotFoundError
        where it is not there. Then nothing has changed.
        """
        if isinstance(path_or_dict, Mapping):
            file = lora.open_dict(path_or_dict)
        else:
            file = lora.open_lora(path_or_dict, weight_name, subfolder, use_safetensors, revision=revision,
                                  local_files_only=local_files_only, token=token, cache_dir=cache_dir,
                                  force_download=force_download)
        lora.load(self._adapted, file, adapter_name, strict, hotswap)

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """Make these LoRAs the active ones, and no others, with these weights: a number for all, or a list.

        A weight is a number, negative ones too, or a dictionary: {"unet": ..., "text_encoder": 0.5}, in which that of
        the UNet may be of blocks, {"down": 0.9, "mid": 1, "up": {"block_1": 0.6, "block_2": [0.4, 0.8, 1]}}; a list has
        one for each transformer of a block. What is left out is 1. A block's weight holds for all that is in it.
        """
        lora.set_adapters(self._adapted, adapter_names, adapter_weights)

    def get_active_adapters(self) -> list[str]:
        """The names of those that `set_adapters` or loading has chosen, disabled or not."""
        return lora.active(self._adapted)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Component -> the names of all that are loaded for it."""
        return lora.listed(self._adapted)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        lora.delete(self._adapted, adapter_names)

    def unload_lora_weights(self) -> None:
        """Take all LoRAs out. What `fuse_lora` has put into the weights stays in them, for good."""
        lora.unload(self._adapted)

    def enable_lora(self) -> None:
        lora.enable(self._adapted, True)

    def disable_lora(self) -> None:
        """Run without LoRAs, until `enable_lora`."""
        lora.enable(self._adapted, False)

    def fuse_lora(
        self,
        components: str | Sequence[str] = ("unet", "text_encoder"),
        lora_scale: float = 1.0,
        safe_fusing: bool = True,
        adapter_names: str | Sequence[str] | None = None,
    ) -> None:
        """Put the active LoRAs, or those named, into the weights, times `lora_scale`: full speed, and it can be saved.

        The weights of before are kept on the CPU, for `unfuse_lora`, until `unload_lora_weights`. safe_fusing: no other
        way is known; FloatingPointError where a weight would not be finite, and nothing has changed.
        """
        lora.fuse(self._adapted_among(components), lora_scale, adapter_names)

    def unfuse_lora(self, components: str | Sequence[str] = ("unet", "text_encoder")) -> None:
        """Take out what `fuse_lora` has put in, to the last bit: it runs beside the weights again."""
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
        """Write the LoRAs that are loaded, or those named, in peft's names, which diffusers loads, too.

        One: pytorch_lora_weights.safetensors, or `weight_name`; several: a file for each, of its name. They are saved
        as they were loaded, without the weights of `set_adapters`. Or, also called on the class, dictionaries of layers
        {"down_blocks.0....to_q.lora_A.weight": tensor}, with peft's LoraConfig as metadata.
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
        """The networks that LoRAs change."""
        networks = {name: unwrapped(self._networks.get(name)) for name in lora.COMPONENTS}
        return {name: network for name, network in networks.items() if isinstance(network, Network)}

    def _adapted_among(self, components: str | Sequence[str]) -> dict[str, Network]:
        components = [components] if isinstance(components, str) else [*components]
        for name in components:
            if name not in lora.COMPONENTS:
                raise ValueError(f"components: {name!r} is not among {lora.COMPONENTS}{nearest(name, lora.COMPONENTS)}")
        return {name: network for name, network in self._adapted.items() if name in components}

    def _check_scale(self, what: str, scale: Any) -> float:
        """The number that a call gives for its LoRAs; while it runs, the networks' LoRAs are its own."""
        check_number(what, scale)
        networks = self._adapted
        if scale == 1 or not networks:
            return float(scale)
        if not any(lora.loras_of(n).loaded for n in networks.values()):
            raise ValueError(f"{what} is {scale}, and no LoRA is loaded")
        if merged := [m for n in networks.values() for m in lora.loras_of(n).merged]:
            raise ValueError(f"{what} is {scale}, and {merged[0]!r} is in the weights: give it as "
                             "fuse_lora(lora_scale=...), or call unfuse_lora() first")
        with _running_lock:
            own = [call for call in _running if id(self) in call[0]]
            mine = {id(n) for n in networks.values()}
            if any(mine & used for held, used in _running if id(self) not in held):
                raise RuntimeError(f"{what} is for one call at a time, and another runs on these networks")
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
        """Words that stand for learned vectors (textual inversion); {word: number of vectors}. All of them, or none.

        source: a file, a folder, a hub id, a state dict, or a tensor (n d) or (d); or a list of them. token: the word
        to write in prompts, in the place of the file's own; a list of words where there are several sources, or where
        the source holds several words. The words hold for every pipeline that shares the text encoder and tokenizer.
        Raises ValueError on vectors of another width, and on words that mean something already (docs/adapters.md).
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
            raise ValueError(f"there are {len(sources)} embeddings, and token= is of {len(tokens)}")
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
        """Take words that were loaded, and all of their vectors, out again; None: all words.

        Raises ValueError on a word that was not loaded.
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
        """Text states (b l d) of the prompts and of the negative ones; the latter None without guidance.

        With a dictionary {frame: text} for either, both are (b f l d), with a text for each of `num_frames` frames, and
        between the frames that are named prompt_interpolation, "linear" or "spherical", leads from one to the next.

        weights: "a1111" reads (word:1.3), [word] and BREAK as A1111's web UI does, and prompts of any length
        (docs/prompts.md); the pipeline's `prompt_weights` where not given, by which brackets are text.
        One negative prompt serves a whole batch; none at all is the empty text. States that are given are not encoded
        again. lora_scale: what the weights of the text encoder's LoRAs are multiplied with.
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
        if text.ndim != negative.ndim:  # one of them has a text for each frame
            text, negative = (v if v.ndim == 4 else v[:, None].expand(-1, num_frames, -1, -1) for v in (text, negative))
        if negative.shape[0] == 1:
            negative = negative.expand(len(text), *negative.shape[1:])
        if negative.shape != text.shape:
            raise ValueError(f"prompts and negative prompts do not match: {tuple(text.shape)} and "
                             f"{tuple(negative.shape)} (batch, tokens, width)")
        return (text.repeat_interleave(num_images_per_prompt, dim=0),
                negative.repeat_interleave(num_images_per_prompt, dim=0))

    def _check_weights(self, weights: Any, *prompts: Any) -> None:
        """ValueError on weights of another kind; a line where prompts look weighted, and their brackets are text."""
        if weights is not None:
            check_choice("weights", weights, WEIGHTS)
        elif found := [m[0] for text in chain(*map(texts_of, prompts)) if (m := LOOKS_WEIGHTED.search(text))]:
            logger.warning("the prompt looks weighted, and %r is read as plain text: prompt_weights=\"a1111\" of the "
                           "pipeline, or --prompt-weights, reads it as weights.", found[0])

    def _length_of(self, prompt: Any, negative_prompt: Any, prompt_embeds: Tensor | None) -> int:
        """Tokens of the longest prompt in whole chunks; those of `prompt_embeds` where these are given."""
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
            raise ValueError("a prompt for single frames needs num_frames, the number of frames of the video")
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
        """x (b c f h w) at the noise of timesteps[0] -> clean latents (b c f h w); with FreeInit, several times over.

        video: what x was made of, where it is not noise alone. pictures: those that IP-Adapters are shown. Every round
        of FreeInit begins with the texts of the call, and the callbacks count its steps from 0.
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
        """x (b c f h w) at the noise of timesteps[0] -> clean latents (b c f h w).

        Guidance (Ho and Salimans, arXiv:2207.12598): the UNet sees every video twice, with the negative and with the
        positive text, and the prediction goes `guidance_scale` times the way from the one to the other.
        """
        warm_up = len(timesteps) - steps * self.scheduler.order  # solver calls that make no step of their own (PNDM)
        done = 0
        with self._placed("unet") as unet, lora.scaled(unwrapped(unet), self._lora_scale):
            predict = self._predictor(unet)
            if self._sequential_guidance and negative is not None:
                predict = OneByOne([predict, self._predictor(unet)])
            show = pictures.beside(unwrapped(unet)) if pictures is not None else None  # the UNet this beside a text
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

                if i == 0:  # bad weights show at once, overflow at the end
                    check_result(x, unet, "the UNet")
                if i + 1 == len(timesteps) or (i + 1 > warm_up and (i + 1) % self.scheduler.order == 0):
                    before = text, negative
                    x, text, negative = callbacks(self, done, t, x, text, negative)
                    if callbacks.show_text or text is not before[0] or negative is not before[1]:
                        context = _join(negative, text, unet.dtype, show)
                    done += 1
                    bar.update()
            check_result(x, unet, "the UNet")
        return x

    def _predictor(self, unet: Any) -> Callable[..., Tensor]:
        """The UNet, for one run: the same numbers, computed faster where nothing of it was changed."""
        runner = fast.runner(unet)
        return runner if self._windows is None else Windowed(self._windows, runner)

    def _step_arguments(self, eta: float, generator: Generators) -> dict[str, Any]:
        """Those of eta and generator that the scheduler's step takes: all where it has `**arguments`."""
        accepted = inspect.signature(self.scheduler.step).parameters
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
        config = self.scheduler.config
        if config.get("clip_sample") and "clip_sample" in config.get("_use_default_values", ()):
            logger.warning("%s clips latents, which suits models of pixels, because nobody has set clip_sample=False.",
                           type(self.scheduler).__name__)
        if eta and "eta" not in accepted and not takes_all:
            logger.warning("%s has no eta: eta=%s means nothing to it.", type(self.scheduler).__name__, eta)
        return {k: v for k, v in {"eta": eta, "generator": generator}.items() if k in accepted or takes_all}

    # Pixels ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, decode_chunk_size: int | None = None) -> Tensor:
        """latents (b c f h w) -> pixels (b 3 f H W), float32, about [-1, 1]; `decode_chunk_size` frames at a time."""
        with self._placed("vae") as vae:
            z = rearrange(latents.to(vae.device, vae.dtype), "b c f h w -> (b f) c h w") / vae.config.scaling_factor
            pixels = fast.runner(vae).decode(z, decode_chunk_size).float()
            check_result(pixels, vae, "the VAE")
        return rearrange(pixels, "(b f) c h w -> b c f h w", b=latents.shape[0])

    def stream_frames(self, latents: Tensor, decode_chunk_size: int = 8) -> Iterator[np.ndarray]:
        """The frames of one video, latents (1 c f h w), one after the other: (h w 3), float32 in [0, 1].

        The VAE decodes `decode_chunk_size` at a time, and no more than these are held. `export_to_video` and
        `export_to_gif` write what comes as it comes.
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
        """Refuse, before any work, what cannot work, each with one line. Returns the number of prompts."""
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
                raise ValueError(f"the VAE's latents have {read} channels, and the UNet's {made}: they do not fit")
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
    """All texts of a prompt in any of its forms; None is the empty text."""
    if isinstance(prompts, str | None):
        return [prompts or ""]
    return list(prompts.values()) if isinstance(prompts, Mapping) else list(prompts)


def _join(
    negative: Tensor | None, text: Tensor, dtype: torch.dtype, show: Callable[[Tensor], Prompt] | None
) -> Tensor | Prompt:
    """The texts (b l d) of one prediction, with guidance the negative ones (b l d) first, and pictures beside them."""
    texts = (text if negative is None else torch.cat([negative, text])).to(dtype)
    return texts if show is None else show(texts)
