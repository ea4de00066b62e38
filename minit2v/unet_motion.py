"""AnimateDiff (Guo et al. 2023, arXiv:2307.04725): a motion module after every block of an image model.

The image model stays as it was, the motion modules are trained: together they make videos in the image model's style.
docs/animatediff.md specifies the authors' networks.
"""

import copy
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn

from minit2v_convert import diffusers_motion

from .blocks import MotionModule
from .compat import compat_fields
from .hub import Network
from .unet import UNet, check_levels, per_level
from .unet2d import Block, UNet2DConditionModel, check_heads
from .weights import Weightless, open_weights

logger = logging.getLogger(__name__)

Span = Literal["frame", "clip"]  # what the statistics of a norm are taken over
NORMS = ("motion_norms", "resnet_norms")  # the fields of both configs in which we deviate from diffusers (compat.py)


@dataclass(frozen=True)
class MotionAdapterConfig:
    """The published adapters' config.json, field by field, and two fields of our own."""

    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    motion_layers_per_block: int | tuple[int, ...] = 2  # modules per level on the way down; one more on the way up
    motion_transformer_layers_per_block: int | tuple[int, ...] = 1  # blocks in a motion module, per level
    motion_transformer_layers_per_mid_block: int = 1
    motion_num_attention_heads: int | tuple[int, ...] = 8
    motion_norm_num_groups: int = 32
    motion_max_seq_length: int = 32  # frames; v1 was trained with 24
    use_motion_mid_block: bool = True  # v2 has one, v1 and v3 have none
    motion_norms: Span = "frame"  # of the motion modules
    resnet_norms: Span | None = None  # of the image model's ResBlocks and last norm; "clip" for v1; None: not known

    FIXED: ClassVar[dict[str, Any]] = {"conv_in_channels": None, "motion_mid_block_layers_per_block": 1}
    IGNORED: ClassVar[dict[str, str]] = {
        "motion_activation_fn": "GEGLU in every adapter",
        "motion_attention_bias": "no adapter has one",
        "motion_cross_attention_dim": "no adapter looks at the text",
    }

    def __post_init__(self):
        channels = self.block_out_channels
        for name in ("motion_layers_per_block", "motion_transformer_layers_per_block", "motion_num_attention_heads"):
            if len(values := per_level(getattr(self, name), len(channels))) != len(channels) or min(values) < 1:
                raise ValueError(f"{name} must be at least 1 for each of the {len(channels)} levels, not {values}")
        for c, heads in zip(channels, per_level(self.motion_num_attention_heads, len(channels)), strict=True):
            check_heads("motion_num_attention_heads", heads, (c,))
        if any(c % self.motion_norm_num_groups for c in channels):
            raise ValueError(f"motion_norm_num_groups {self.motion_norm_num_groups} must divide {channels}")
        if self.motion_max_seq_length < 1:
            raise ValueError(f"motion_max_seq_length must be at least 1, not {self.motion_max_seq_length}")


class MotionAdapter(Network):
    """The motion modules of every level, to be put into an image model by `UNetMotionModel.from_unet2d`."""

    Config = MotionAdapterConfig
    layout = diffusers_motion.ADAPTER

    def __init__(self, config: MotionAdapterConfig | None = None, **fields: Any):
        super().__init__(config, **fields)
        config = self.config
        levels = len(config.block_out_channels)
        per = [
            per_level(value, levels)
            for value in (
                config.block_out_channels,
                config.motion_num_attention_heads,
                config.motion_transformer_layers_per_block,
                config.motion_layers_per_block,
            )
        ]
        rows = list(zip(*per, strict=True))
        make = self.make_modules
        self.down = nn.ModuleList(make(c, heads, layers, count) for c, heads, layers, count in rows)
        self.mid = None
        if config.use_motion_mid_block:
            c, heads, *_ = rows[-1]
            self.mid = make(c, heads, config.motion_transformer_layers_per_mid_block, 1)
        self.up = nn.ModuleList(make(c, heads, layers, count + 1) for c, heads, layers, count in reversed(rows))

    def make_modules(self, c: int, heads: int, layers: int, count: int) -> nn.ModuleList:
        groups, frames = self.config.motion_norm_num_groups, self.config.motion_max_seq_length
        return nn.ModuleList(MotionModule(c, heads, layers, groups, frames) for _ in range(count))

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, *, compat: str | None = None, **arguments: Any) -> Self:
        """As every network's; `compat="diffusers"` sets `motion_norms` and `resnet_norms` as diffusers computes.

        v1 is known by its 24 positions or by a name that ends in -v1-5 or -v1-4. A file with 32 positions and no mid
        block under another name may be v1 or v3: then a warning names the field that says so.
        """
        forced = compat_fields(cls.__name__, compat) if compat else {}
        adapter = super().from_pretrained(path_or_id, **forced | arguments)
        if adapter.config.resnet_norms is None:
            adapter.config = replace(adapter.config, resnet_norms=resnet_norms_of(adapter.config, str(path_or_id)))
        return adapter

    @classmethod
    def config_of(cls, config: dict[str, Any], files: Sequence[Path]) -> dict[str, Any]:
        """The config with the number of positions that the file has: published ones are known to say 32 for 24."""
        for path in files:
            for name, value in open_weights(path).items():
                if name.endswith("pos_embed.pe"):
                    return config | {"motion_max_seq_length": value.shape[1]}
        return config


def resnet_norms_of(config: Any, name: str) -> Span:
    """What the norms of the image model span, from the version of an adapter: the positions and the name tell it."""
    if config.motion_max_seq_length == 24 or re.search(r"-v1-[45]/?$", name):
        return "clip"
    if not config.use_motion_mid_block and not re.search(r"-v1-5-\d/?$", name):
        logger.warning(
            "%s may be an adapter of version 1 or 3, which normalise differently: it is run as version 3. "
            'resnet_norms="clip" says that it is version 1, resnet_norms="frame" that it is not.', name
        )
    return "frame"


@dataclass(frozen=True)
class UNetMotionConfig:
    """The config.json of a UNet with motion modules, as diffusers writes it, and two fields of our own."""

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlockMotion",) * 3 + ("DownBlockMotion",)
    up_block_types: tuple[str, ...] = ("UpBlockMotion",) + ("CrossAttnUpBlockMotion",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    norm_num_groups: int = 32  # of the motion modules, too
    cross_attention_dim: int = 1280
    num_attention_heads: int = 8  # of the image model
    temporal_transformer_layers_per_block: int | tuple[int, ...] = 1
    temporal_transformer_layers_per_mid_block: int = 1
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
    IGNORED: ClassVar[dict[str, str]] = {
        "transformer_layers_per_mid_block": "one, as everywhere: diffusers writes null or 1",
    }

    def __post_init__(self):
        check_levels(self, {"DownBlockMotion": "UpBlockMotion", "CrossAttnDownBlockMotion": "CrossAttnUpBlockMotion"})
        check_heads("num_attention_heads", self.num_attention_heads, self.block_out_channels)
        self.adapter()

    @property
    def attention(self) -> tuple[bool, ...]:
        """Per level, finest first: whether its blocks see the text."""
        return tuple(name == "CrossAttnDownBlockMotion" for name in self.down_block_types)

    @property
    def heads(self) -> int:
        return self.num_attention_heads

    def adapter(self) -> MotionAdapterConfig:
        """The fields of the motion modules."""
        return MotionAdapterConfig(**{ours: getattr(self, here) for ours, here in SHARED.items()})


SHARED = {  # the adapter's fields -> the same ones of the whole UNet
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
    """The image model with its motion modules. Keyword arguments are the fields of UNetMotionConfig."""

    Config = UNetMotionConfig
    layout = diffusers_motion.UNET

    def __init__(self, config: UNetMotionConfig | None = None, *, compat: str | None = None, **fields: Any):
        """compat: None, or "diffusers" for the reference's norms, except those that are given."""
        self.explicit = frozenset(name for name in NORMS if fields.get(name) is not None)
        super().__init__(config, **fields)
        self.install(MotionAdapter(self.config.adapter()))
        self.set_compat(compat)

    def make_block(self, c_in: int, c_out: int, attention: bool) -> Block:
        return Block(self.config, c_in, c_out, attention)

    def motion_modules(self) -> Iterator[MotionModule]:
        return (block.motion for block in self.blocks() if block.motion is not None)

    @classmethod
    def from_config(cls, config: Any, *, compat: str | None = None, **overrides: Any) -> Self:
        unet = super().from_config(config, **overrides)
        unet.explicit = frozenset(name for name in NORMS if overrides.get(name) is not None)
        return unet.set_compat(compat)

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, *, compat: str | None = None, **arguments: Any) -> Self:
        """As every network's, with `compat` as in the constructor."""
        unet = super().from_pretrained(path_or_id, **arguments)
        unet.explicit = frozenset(name for name in NORMS if arguments.get(name) is not None)
        unet.set_compat(compat)
        if unet.config.resnet_norms is None:
            unet.set_norms(resnet_norms=resnet_norms_of(unet.config, str(path_or_id)))
        return unet

    @classmethod
    def from_unet2d(
        cls,
        unet: UNet2DConditionModel,
        motion_adapter: MotionAdapter | None = None,
        load_weights: bool = True,
        *,
        compat: str | None = None,
    ) -> Self:
        """`unet` with the modules of `motion_adapter` (None: fresh ones, that change nothing yet) in it.

        Both are copied, and stay as they were. Raises ValueError where they do not fit each other.
        """
        old = asdict(unet.config)
        old["num_attention_heads"] = old.pop("attention_head_dim")
        for name in ("down_block_types", "up_block_types"):
            old[name] = tuple(kind.replace("2D", "Motion") for kind in old[name])
        if motion_adapter is None:
            motion_adapter = MotionAdapter(
                block_out_channels=unet.config.block_out_channels,
                motion_layers_per_block=unet.config.layers_per_block,
                motion_norm_num_groups=unet.config.norm_num_groups,
            )
        check_fit(motion_adapter.config, unet.config)
        theirs = {SHARED[name]: value for name, value in asdict(motion_adapter.config).items()}
        if not load_weights:
            return cls(**old | theirs, compat=compat)
        with torch.device("meta"), Weightless():
            new = cls(**old | theirs)
        new.explicit = frozenset()
        for block in new.blocks():
            block.motion = None
        new.load_state_dict({name: value.detach().clone() for name, value in unet.state_dict().items()}, assign=True)
        new.load_motion_modules(motion_adapter)
        return new.set_compat(compat).train(unet.training)

    def load_motion_modules(self, motion_adapter: MotionAdapter) -> None:
        """Copies of the adapter's modules take the place of those that are here: where it has none, none are left."""
        check_fit(motion_adapter.config, self.config)
        theirs = {SHARED[name]: value for name, value in asdict(motion_adapter.config).items()}
        for name in self.explicit:
            theirs[name] = getattr(self.config, name)
        self.config = replace(self.config, **theirs)
        adapter = copy.deepcopy(motion_adapter).to(device=self.device, dtype=self.dtype)
        self.install(adapter.requires_grad_(True).train(self.training))

    def install(self, adapter: MotionAdapter) -> None:
        """Put the modules of an adapter into the blocks: no copy."""
        for levels, lists in ((self.down, adapter.down), (self.up, adapter.up)):
            for level, modules in zip(levels, lists, strict=True):
                for block, module in zip(level.blocks, modules, strict=True):
                    block.motion = module
        self.mid[0].motion = adapter.mid[0] if adapter.mid is not None else None
        self.set_norms()

    def motion_adapter(self) -> MotionAdapter:
        """The motion modules by themselves: no copy."""
        with torch.device("meta"), Weightless():
            adapter = MotionAdapter(self.config.adapter())
        for levels, lists in ((self.down, adapter.down), (self.up, adapter.up)):
            for level, modules in zip(levels, lists, strict=True):
                modules[:] = [block.motion for block in level.blocks]
        if adapter.mid is not None:
            adapter.mid[0] = self.mid[0].motion
        return adapter

    def save_motion_modules(
        self, folder: str | Path, *, safe_serialization: bool = True, variant: str | None = None
    ) -> None:
        """Write the motion modules as a MotionAdapter."""
        self.motion_adapter().save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)

    def freeze_unet2d_params(self) -> None:
        """Only the motion modules remain trainable."""
        self.requires_grad_(False)
        for module in self.motion_modules():
            module.requires_grad_(True)

    def set_compat(self, compat: str | None) -> Self:
        """Take the norms of a compatibility mode, except those passed in code. None changes nothing."""
        if compat is not None:
            forced = compat_fields(type(self).__name__, compat)
            self.set_norms(**{name: value for name, value in forced.items() if name not in self.explicit})
        return self

    def set_norms(self, **spans: Span | None) -> None:
        """motion_norms, resnet_norms: "frame" or "clip"; what is not given stays."""
        self.config = replace(self.config, **spans)
        resnet_norms = self.config.resnet_norms
        self.clip_norms = resnet_norms == "clip" or (resnet_norms is None and self.config.motion_max_seq_length == 24)
        for block in self.blocks():
            block.clip_norms = self.clip_norms
        for module in self.motion_modules():
            module.clip_norm = self.config.motion_norms == "clip"


def check_fit(adapter: MotionAdapterConfig, unet: Any) -> None:
    """Raises ValueError where an adapter does not fit an image model."""
    levels = len(unet.block_out_channels)
    pairs = {
        "block_out_channels": (adapter.block_out_channels, unet.block_out_channels),
        "layers per block": (
            per_level(adapter.motion_layers_per_block, len(adapter.block_out_channels)),
            per_level(unet.layers_per_block, levels),
        ),
        "norm_num_groups": (adapter.motion_norm_num_groups, unet.norm_num_groups),
    }
    for name, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise ValueError(f"the motion adapter does not fit the UNet: {name} {theirs}, not {ours}")
