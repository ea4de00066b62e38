"""AnimateDiff (Guo et al. 2023, arXiv:2307.04725): a motion module after every block of an image model.

The weights of the image model do not change. Only the motion modules are trained. Together they make videos in the
style of the image model. docs/animatediff.md specifies the authors' networks.
"""

import copy
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from minit2v_convert import diffusers_motion

from ..adapters import lora
from ..adapters.low_rank import can_branch, has_branches
from ..files.weights import Weightless
from ..techniques.free_noise import FreeNoise
from .blocks import MotionModule
from .image_prompt import Prompt
from .network import Network
from .unet import Place, UNet, check_levels, per_level
from .unet2d import Block, UNet2DConditionModel, check_heads

logger = logging.getLogger(__name__)

Span = Literal["frame", "video"]  # what the statistics of a norm span; compat.py has diffusers' choice


@dataclass(frozen=True)
class MotionAdapterConfig:
    """The fields of the official adapters' config.json, and two fields of our own: the norms."""

    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    motion_layers_per_block: int | tuple[int, ...] = 2  # modules per level in the down path; the up path has one more
    motion_transformer_layers_per_block: int | tuple[int, ...] = 1  # transformer blocks per motion module
    motion_transformer_layers_per_mid_block: int | tuple[int] = 1
    motion_num_attention_heads: int | tuple[int, ...] = 8
    motion_norm_num_groups: int = 32
    motion_max_seq_length: int = 32  # the most frames: the length of the position encoding, 24 in v1
    use_motion_mid_block: bool = True  # v2 has one, v1 and v3 have none
    motion_norms: Span = "frame"  # span of the norms of the motion modules
    resnet_norms: Span | None = None  # span of the norms of ResBlocks and output; "video" in v1; None: not known

    FIXED: ClassVar[dict[str, Any]] = {
        "conv_in_channels": None,
        "motion_mid_block_layers_per_block": 1,
        # Fields of the first files.
        "motion_activation_fn": "geglu",
        "motion_attention_bias": False,
        "motion_cross_attention_dim": None,
    }
    IGNORED: ClassVar[dict[str, str]] = {}

    def __post_init__(self):
        channels, groups = self.block_out_channels, self.motion_norm_num_groups
        levels = len(channels)
        for name in ("motion_layers_per_block", "motion_transformer_layers_per_block", "motion_num_attention_heads"):
            if len(values := per_level(getattr(self, name), levels)) != levels or min(values) < 1:
                raise ValueError(f"{name} must be at least 1 for each of the {levels} levels, not {values}")
        for c, heads in zip(channels, per_level(self.motion_num_attention_heads, levels), strict=True):
            check_heads("motion_num_attention_heads", heads, (c,))
        if groups < 1 or any(c % groups for c in channels):
            raise ValueError(f"motion_norm_num_groups {groups} must divide block_out_channels {channels}")
        for name in ("motion_transformer_layers_per_mid_block", "motion_max_seq_length"):
            if min(per_level(getattr(self, name), 1)) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


class MotionAdapter(Network):
    """The motion modules of all levels. `UNetMotionModel.from_unet2d` puts them into an image model.

    Keyword arguments are the fields of MotionAdapterConfig.
    """

    Config = MotionAdapterConfig
    config: MotionAdapterConfig
    layout = diffusers_motion.ADAPTER

    def __init__(self, config: MotionAdapterConfig | None = None, **fields: Any):
        super().__init__(config, **fields)
        c = self.config
        fields = (c.motion_num_attention_heads, c.motion_transformer_layers_per_block, c.motion_layers_per_block)
        levels = [per_level(field, len(c.block_out_channels)) for field in (c.block_out_channels, *fields)]
        levels = list(zip(*levels, strict=True))  # (channels, heads, blocks in a module, modules), finest first
        self.down = nn.ModuleList(self.make_modules(*level) for level in levels)
        self.mid = None
        if c.use_motion_mid_block:
            (layers,) = per_level(c.motion_transformer_layers_per_mid_block, 1)
            self.mid = self.make_modules(*levels[-1][:2], layers, 1)
        self.up = nn.ModuleList(self.make_modules(*level, count + 1) for *level, count in reversed(levels))

    def make_modules(self, c: int, heads: int, layers: int, count: int) -> nn.ModuleList:
        groups, frames = self.config.motion_norm_num_groups, self.config.motion_max_seq_length
        return nn.ModuleList(MotionModule(c, heads, layers, groups, frames) for _ in range(count))

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, *, subfolder: str | None = None, **arguments: Any) -> Self:
        """Loads an adapter. Arguments and errors are those of `Network.from_pretrained`.

        Version 1 has 24 positions, or a name that ends in -v1-5 or -v1-4. Under another name, a file with 32 positions
        and no mid block may be version 1 or 3. Then a warning names the field that tells them apart.
        """
        adapter = super().from_pretrained(path_or_id, subfolder=subfolder, **arguments)
        name = os.path.basename(os.path.abspath(subfolder or path_or_id))
        adapter.config = settle_resnet_norms(adapter.config, name)
        return adapter

    @classmethod
    def config_of(cls, config: dict[str, Any], states: Iterable[Mapping[str, Tensor]]) -> dict[str, Any]:
        """The config with the number of positions of the weights. Some published configs say 32 where it is 24."""
        for state in states:
            for name, value in state.items():
                if name.endswith("pos_embed.pe"):
                    return config | {"motion_max_seq_length": value.shape[1]}
        return config


def known_resnet_norms(config: Any, name: str = "") -> Span | None:
    """What the norms of the image model span, by the version of the adapter. None if it may be version 1 or 3."""
    if config.use_motion_mid_block:  # version 2
        return "frame"
    if config.motion_max_seq_length == 24 or re.search("-v1-[45]$", name):  # version 1
        return "video"
    return "frame" if name.endswith("-v1-5-3") else None


def settle_resnet_norms(config: Any, name: str = "") -> Any:
    """The config of loaded motion modules with its `resnet_norms` filled in."""
    if config.resnet_norms is not None:
        return config
    span = known_resnet_norms(config, name)
    if span is None:
        logger.warning(
            "These motion modules may be AnimateDiff's version 1 or 3, which have different norms. They run as version "
            '3. Pass resnet_norms="video" if they are version 1, resnet_norms="frame" if they are not.'
        )
    return replace(config, resnet_norms=span or "frame")


@dataclass(frozen=True)
class UNetMotionConfig:
    """The fields of diffusers' config.json of a UNet with motion modules, and two fields of our own: the norms."""

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlockMotion",) * 3 + ("DownBlockMotion",)
    up_block_types: tuple[str, ...] = ("UpBlockMotion",) + ("CrossAttnUpBlockMotion",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    norm_num_groups: int = 32  # also of the motion modules
    cross_attention_dim: int = 1280
    transformer_layers_per_mid_block: Literal[1] | None = None  # None: one
    num_attention_heads: int = 8  # of the image model
    temporal_transformer_layers_per_block: int | tuple[int, ...] = 1
    temporal_transformer_layers_per_mid_block: int | tuple[int] = 1
    motion_num_attention_heads: int | tuple[int, ...] = 8
    motion_max_seq_length: int = 32
    use_motion_mid_block: bool = True
    motion_norms: Span = "frame"
    resnet_norms: Span | None = None

    FIXED: ClassVar[dict[str, Any]] = {
        "act_fn": "silu",
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "downsample_padding": 1,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "mid_block_layers": 1,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "projection_class_embeddings_input_dim": None,
        "reverse_motion_num_attention_heads": None,
        "reverse_temporal_transformer_layers_per_block": None,
        "reverse_transformer_layers_per_block": None,
        "time_cond_proj_dim": None,
        "transformer_layers_per_block": 1,
        "use_linear_projection": False,
    }
    IGNORED: ClassVar[dict[str, str]] = {}

    def __post_init__(self):
        check_levels(self, {"DownBlockMotion": "UpBlockMotion", "CrossAttnDownBlockMotion": "CrossAttnUpBlockMotion"})
        check_heads("num_attention_heads", self.num_attention_heads, self.block_out_channels)
        self.adapter()

    @property
    def attention(self) -> tuple[bool, ...]:
        """For each level, finest first: whether its blocks see the text."""
        return tuple(name == "CrossAttnDownBlockMotion" for name in self.down_block_types)

    @property
    def heads(self) -> int:
        return self.num_attention_heads

    def adapter(self) -> MotionAdapterConfig:
        """The fields of the motion modules, under their names in an adapter's config."""
        return MotionAdapterConfig(**{name: getattr(self, here) for name, here in SHARED.items()})


SHARED = {  # names of fields in an adapter's config -> names in the UNet's config
    "block_out_channels": "block_out_channels",
    "motion_layers_per_block": "layers_per_block",
    "motion_transformer_layers_per_block": "temporal_transformer_layers_per_block",
    "motion_transformer_layers_per_mid_block": "temporal_transformer_layers_per_mid_block",
    "motion_num_attention_heads": "motion_num_attention_heads",
    "motion_norm_num_groups": "norm_num_groups",
    "motion_max_seq_length": "motion_max_seq_length",
    "use_motion_mid_block": "use_motion_mid_block",
    "motion_norms": "motion_norms",
    "resnet_norms": "resnet_norms",
}


class UNetMotionModel(UNet):
    """An image model with motion modules. Keyword arguments are the fields of UNetMotionConfig."""

    Config = UNetMotionConfig
    config: UNetMotionConfig
    layout = diffusers_motion.UNET
    free_noise: FreeNoise | None = None

    def __init__(self, config: UNetMotionConfig | None = None, **fields: Any):
        super().__init__(config, **fields)
        self.install(MotionAdapter(self.config.adapter()))

    def make_block(self, c_in: int, c_out: int, attention: bool, place: Place) -> nn.Module:
        return Block(self.config, c_in, c_out, attention)

    def check(self, x: Tensor, t: int | float | Tensor, context: Tensor | Prompt) -> tuple[Tensor, Tensor | Prompt]:
        t, context = super().check(x, t, context)
        at_once = x.shape[2] if self.free_noise is None else min(x.shape[2], self.free_noise.length)
        if at_once > (most := self.config.motion_max_seq_length):
            raise ValueError(f"x has {at_once} frames, but the motion modules have only {most} positions")
        return t, context

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, **arguments: Any) -> Self:
        """As `Network.from_pretrained`. It warns if the motion modules may be version 1 or 3."""
        unet = super().from_pretrained(path_or_id, **arguments)
        unet.config = settle_resnet_norms(unet.config)
        return unet.apply_norms()

    @classmethod
    def from_unet2d(
        cls,
        unet: UNet2DConditionModel,
        motion_adapter: MotionAdapter | None = None,
        load_weights: bool = True,
        *,
        compat: str | None = None,
    ) -> Self:
        """An image model with motion modules. Both are copied; the originals do not change.

        motion_adapter: the motion modules. None gives new ones, which do not change the images until they are trained.
        load_weights: with False, only the shapes are taken, and the weights are random.
        compat: a mode, see `set_compat`.
        Raises ValueError if the two do not fit each other, and TypeError if one is another network.
        """
        _check_ours("unet", unet, UNet2DConditionModel)
        if motion_adapter is not None:
            _check_ours("motion_adapter", motion_adapter, MotionAdapter)
        image = {f.name: getattr(unet.config, f.name) for f in fields(UNet2DConditionModel.Config)}
        image["num_attention_heads"] = image.pop("attention_head_dim")
        for name in ("down_block_types", "up_block_types"):
            image[name] = tuple(kind.replace("2D", "Motion") for kind in image[name])
        if motion_adapter is None:
            motion_adapter = MotionAdapter(UNetMotionConfig(**image).adapter())
        config = UNetMotionConfig(**image | shared_fields(motion_adapter.config, unet.config))
        if not load_weights:
            new = cls(config)
            new.explicit = motion_adapter.explicit
            return new.set_compat(compat)
        # What a subclass adds keeps its initial values.
        new = cls._empty(config, compat, {}, strict=cls is UNetMotionModel)
        for block in new.blocks():
            block.motion = None
        values, image_values = new.state_dict(), unet.state_dict()
        if unknown := [name for name in image_values if name not in values]:
            raise ValueError(f"{type(unet).__name__} has tensors that {cls.__name__} does not have: "
                             f"{', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}")  # fmt: skip
        values |= {name: value.detach().clone() for name, value in image_values.items()}
        new.load_state_dict(values, assign=True)
        new.to(unet.device, unet.dtype)
        new.load_motion_modules(motion_adapter)
        lora.carry_over(unet, new)
        return new.train(unet.training)

    def load_motion_modules(self, motion_adapter: MotionAdapter) -> None:
        """Replaces the motion modules by copies of the adapter's. Blocks without one in the adapter have none then.

        The config's fields about motion modules become the adapter's, unless `set_compat` has set them.
        Raises TypeError if `motion_adapter` is not a MotionAdapter of this package. Raises ValueError if it does not
        fit, if a loaded LoRA changes the present motion modules, or if the adapter has a LoRA that is not fused.
        """
        _check_ours("motion_adapter", motion_adapter, MotionAdapter)
        for name, layers in lora.loras_of(self).loaded.items():
            if path := next((path for path in layers if ".motion." in path), None):
                raise ValueError(f"the LoRA {name!r} changes the motion modules ({path}): unload it first")
        if has_branches(motion_adapter):
            raise ValueError("the motion adapter has a LoRA that is not fused: fuse or unload it first")
        self.config = replace(self.config, **shared_fields(motion_adapter.config, self.config))
        self.explicit = motion_adapter.explicit
        self.install(copy.deepcopy(motion_adapter).to(device=self.device, dtype=self.dtype).requires_grad_(True))
        self.set_compat(self.compat).train(self.training)

    def install(self, adapter: MotionAdapter) -> None:
        """Puts the modules of an adapter into the blocks, without copying them."""
        for levels, lists in ((self.down, adapter.down), (self.up, adapter.up)):
            for level, modules in zip(levels, lists, strict=True):
                for block, module in zip(level.blocks, modules, strict=True):
                    block.motion = module
        self.mid[0].motion = adapter.mid[0] if adapter.mid is not None else None
        self.set_chunking(self.chunking)
        self.set_free_noise(self.free_noise)
        self.apply_norms()

    def motion_adapter(self) -> MotionAdapter:
        """The motion modules as a MotionAdapter, without copying them."""
        with torch.device("meta"), Weightless():
            adapter = MotionAdapter(self.config.adapter())
        for levels, lists in ((self.down, adapter.down), (self.up, adapter.up)):
            for level, modules in zip(levels, lists, strict=True):
                for j, block in enumerate(level.blocks):
                    modules[j] = block.motion
        if adapter.mid is not None:
            adapter.mid[0] = self.mid[0].motion
        return adapter

    def save_motion_modules(
        self, folder: str | Path, *, safe_serialization: bool = True, variant: str | None = None
    ) -> None:
        """Writes the motion modules as a MotionAdapter. The arguments are those of `save_pretrained`."""
        self.motion_adapter().save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)

    def set_free_noise(self, free_noise: FreeNoise | None) -> None:
        """Let the motion modules attend to windows of the video (FreeNoise). None: to the whole video."""
        self.free_noise = free_noise
        for module in self.modules():
            if isinstance(module, MotionModule):
                for block in module.blocks:
                    block.free_noise = free_noise

    def freeze_unet2d_params(self) -> None:
        """Freezes all parameters except those of the motion modules."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad = ".motion." in name

    def set_compat(self, compat: str | None) -> Self:
        super().set_compat(compat)
        return self.apply_norms()

    def with_compat(self, compat: str | None) -> Self:
        """This network in another mode. If its mode differs, the result is a new network that shares its tensors."""
        if compat is None or compat == self.compat:
            return self
        self.loras = lora.loras_of(self)
        layers = (m for m in self.modules() if can_branch(m))  # shared, too: they may have LoRAs
        shared = {id(x): x for x in (*self.parameters(), *self.buffers(), *layers, self.loras)}
        new: Self = copy.deepcopy(self, shared)  # it keeps the loaded adapters
        return new.set_compat(compat)

    def apply_norms(self) -> Self:
        """Set the span of all norms as the config says."""
        self.norm_over_video = (self.config.resnet_norms or known_resnet_norms(self.config)) == "video"
        for module in self.modules():
            if isinstance(module, Block):
                module.norm_over_video = self.norm_over_video
            elif isinstance(module, MotionModule):
                module.norm_over_video = self.config.motion_norms == "video"
        return self


def _check_ours(name: str, given: Any, cls: type) -> None:
    if not isinstance(given, cls):
        library = type(given).__module__.split(".")[0]
        ours, theirs = (" of minit2v", f" of {library}") if type(given).__name__ == cls.__name__ else ("", "")
        raise TypeError(f"{name} must be a {cls.__name__}{ours}, not a {type(given).__name__}{theirs}")


def shared_fields(adapter: MotionAdapterConfig, unet: Any) -> dict[str, Any]:
    """An adapter's fields under their names in a UNet's config. Raises ValueError if it does not fit `unet`."""
    levels = len(unet.block_out_channels)
    for name, theirs, ours in (
        ("block_out_channels", adapter.block_out_channels, unet.block_out_channels),
        ("layers_per_block", *(per_level(n, levels) for n in (adapter.motion_layers_per_block, unet.layers_per_block))),
        ("norm_num_groups", adapter.motion_norm_num_groups, unet.norm_num_groups),
    ):
        if theirs != ours:
            raise ValueError(f"the motion adapter does not fit the UNet: its {name} is {theirs}, the UNet's {ours}")
    return {here: getattr(adapter, name) for name, here in SHARED.items()}
