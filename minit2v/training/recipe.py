"""The options of a training run: one flat list for TOML files, the command line and `run.json`.

    recipe = Recipe(data=("clips",), out="runs/mine", train="lora", steps=500)

`filled` replaces None by a value for the kind of training and the model. This module does not import torch.
"""

import dataclasses
import json
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from minit2v_convert.rename import nearest

from ..files.fields import fits

Kind = Literal["lora", "motion-lora", "motiondirector", "full", "temporal", "spatial", "attention", "motion", "image",
               "patterns"]  # fmt: skip
LORAS = ("lora", "motion-lora", "motiondirector")
# Options of a run that do not change its weights. They may change when a run is resumed.
WATCHING = ("out", "save_every", "save_minutes", "keep", "validate_every", "validation_prompts", "validation_clips",
            "sample_steps", "guidance", "log_every", "device", "cache", "parallel", "kohya")  # fmt: skip


def option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """The options of a training run. Raises ValueError, one line, where one is wrong by itself or with another."""

    data: tuple[str | dict[str, Any], ...] = option((), "folders, lists or single clips to train on; a TOML file "
                                                    "can have tables with path, weight, repeats, ...")  # fmt: skip
    out: str = option("", "the folder of the run: checkpoints, curves, samples and the result")
    model: str = option("shapes", "the model that is trained: a folder or a hub id")
    adapter: str | None = option(None, "motion adapter for an image model; `new` makes untrained motion modules")
    train: Kind = option("lora", "what is trained: a LoRA, or weights of the model")

    targets: tuple[str, ...] = option((), "layers that get a LoRA: spatial, temporal, both, linear, conv, or patterns "
                                      "of names; with train patterns: of parameter names (default: both)")  # fmt: skip
    rank: int = option(8, "rank of a LoRA")
    alpha: float | None = option(None, "a LoRA is multiplied by alpha / rank (default: the rank)")
    dropout: float = option(0.0, "share of a LoRA's inputs that is dropped in training")

    train_text: bool = option(False, "with train lora: also train a LoRA of the text encoder")
    kohya: bool = option(False, "with train lora: also write kohya's spelling, for tools of Stable Diffusion 1.5")

    objective: Literal["epsilon", "v", "x0"] | None = option(
        None, "what the network predicts (default: what the model predicts)"
    )
    betas: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = option(
        None, "noise schedule (default: the model's, and linear for motion modules)"
    )
    zero_snr: bool | None = option(None, "make the last timestep pure noise (default: as in the model)")
    noise_offset: float = option(0.0, "strength of noise that all pixels of a channel share; 0.1 is usual")
    offset_per: Literal["frame", "clip"] = option("frame", "whether each frame or each clip draws its noise offset")
    min_snr: float | None = option(None, "gamma of min-SNR weights; 5 is usual (default: no weights)")
    timesteps: Literal["uniform", "high", "logit-normal"] | tuple[int, int] | None = option(
        None, "uniform, high, logit-normal, or two numbers: lowest, highest (default: high for motion, else uniform)"
    )
    high_share: float = option(0.5, "with timesteps high: share of samples with timesteps of the noisy end")
    high_from: float = option(0.7, "with timesteps high: where the noisy end begins, as a share of all")
    text_dropout: float | None = option(
        None, "share of captions that become empty, for guidance (default: 0.1, with one clip 0)"
    )

    frames: int | None = option(None, "frames of a clip (default: 16, with train image 1)")
    height: int | None = option(None, "height in pixels (default: that of the model)")
    width: int | None = option(None, "width in pixels (default: that of the model)")
    fps: float | None = option(None, "frames per second of the clips (default: those of each video)")
    stride: int | None = option(None, "take every n-th frame, instead of fps")
    clips: Literal["random", "head", "chunk", "uniform", "all"] = option("random", "where in a video a clip begins")
    short: Literal["skip", "loop", "hold", "stretch"] = option(
        "skip", "what is done with videos that have too few frames"
    )
    prompt: str | None = option(None, "caption of files that have none (default: they are skipped)")
    prefix: str = option("", "text before every caption")
    flip: bool = option(False, "mirror half of the clips, left to right")
    stills: Literal["spatial", "whole"] = option(
        "spatial", "whether stills run through the spatial layers or the whole network"
    )
    cache: str | None = option(None, "folder of latents and text states (default: `cache` in the run's folder)")

    steps: int = option(500, "steps of the optimizer")
    batch: int = option(4, "clips in a step, over all processes")
    accumulate: int = option(1, "pieces in which a process computes its clips; more pieces need less memory")
    learning_rate: float | None = option(None, "learning rate; the default depends on the kind of training")
    spatial_learning_rate: float | None = option(None, "learning rate of MotionDirector's spatial LoRA (default: 1e-4)")
    schedule: Literal["constant", "cosine", "linear"] = option(
        "constant", "learning rate after the warm-up"
    )
    warmup: int | None = option(None, "first steps, with a rising learning rate (default: a tenth of all, at most 100)")
    optimizer: Literal["adamw", "adamw8bit"] = option("adamw", "optimizer; adamw8bit needs bitsandbytes and CUDA")
    weight_decay: float | None = option(None, "weight decay of AdamW (default: 0 for a LoRA, else 0.01)")
    beta2: float = option(0.999, "beta2 of AdamW")
    max_grad_norm: float = option(1.0, "a gradient with a larger norm is scaled down to it")
    ema: float | None = option(
        None, "decay of the moving average of the weights, 0 for none (default: 0.999, LoRA 0)"
    )
    precision: Literal["float32", "bf16", "fp16"] | None = option(
        None, "precision of matrix products (default: bf16 on CUDA, else float32)"
    )
    checkpointing: bool = option(False, "gradient checkpointing: much less memory, but one more forward pass")
    temporal_dropout: float | None = option(
        None, "dropout of temporal convolutions (default: 0.1 where they are trained, else 0)"
    )

    prior: str | None = option(
        None, "clips of what the model must not forget: a data set, or `self`: the model makes them"
    )
    prior_share: float = option(0.5, "share of each batch that comes from the prior set")
    prior_target: Literal["clips", "model"] | None = option(
        None, "what the prior set teaches: its clips, or the predictions of the model before training (default: model)"
    )
    prior_prompts: tuple[str, ...] = option(
        (), "prompts of clips that the model makes, or a .txt file with one on each line"
    )
    prior_clips: int = option(64, "how many clips the model makes for prior self")

    save_every: int | None = option(None, "steps between checkpoints (default: only save_minutes counts)")
    save_minutes: float = option(5.0, "minutes between checkpoints")
    keep: int = option(2, "how many checkpoints are kept")
    validate_every: int | None = option(None, "steps between validations, 0 for none (default: a fifth of the run)")
    validation_prompts: tuple[str, ...] = option((), "prompts of sample videos (default: the first two captions)")
    validation_clips: int = option(4, "how many clips the validation loss is measured on")
    sample_steps: int = option(25, "denoising steps of samples")
    guidance: float | None = option(None, "guidance scale of samples (default: that of the model)")
    log_every: int = option(10, "steps between lines of log.csv")
    seed: int = option(0, "random seed")
    device: str = option("auto", "where to train: auto, cpu, cuda, cuda:1, ...")
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp", "with several processes: each has all weights (ddp) or a part (fsdp)"
    )

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value = _tuples(getattr(self, f.name))
            if f.name in ("data", "targets", "validation_prompts", "prior_prompts") and isinstance(value, str | dict):
                value = (value,)
            object.__setattr__(self, f.name, str(value) if isinstance(value, Path) else value)
            self._check_kind(f.name)
        self._check_ranges()

    def _check_kind(self, name: str) -> None:
        value, hint = getattr(self, name), HINTS[name]
        if not fits(value, hint):
            known = [repr(w) for w in words(hint)]
            wanted = f"one of {', '.join(known)}" if known else str(getattr(hint, "__name__", hint))
            near = nearest(value, words(hint))
            raise ValueError(f"{name} must be {wanted}, not {value!r}{near}")

    def _check_ranges(self) -> None:
        def need(good: bool, name: str, wanted: str) -> None:
            if not good:
                raise ValueError(f"{name} must be {wanted}, not {getattr(self, name)!r}")

        for name in ("rank", "frames", "height", "width", "stride", "steps", "batch", "accumulate",
                     "save_every", "log_every", "sample_steps", "prior_clips", "validation_clips"):  # fmt: skip
            need(getattr(self, name) is None or getattr(self, name) >= 1, name, "at least 1")
        for name in ("learning_rate", "spatial_learning_rate", "weight_decay", "warmup", "noise_offset",
                     "validate_every", "save_minutes"):  # fmt: skip
            need(getattr(self, name) is None or 0 <= getattr(self, name) < float("inf"), name, "at least 0")
        for name in ("dropout", "text_dropout", "ema", "temporal_dropout", "beta2"):
            need(getattr(self, name) is None or 0 <= getattr(self, name) < 1, name, "at least 0 and below 1")
        for name in ("fps", "alpha", "min_snr", "max_grad_norm", "guidance"):
            need(getattr(self, name) is None or 0 < getattr(self, name) < float("inf"), name, "above 0")
        need(0 <= self.high_share <= 1, "high_share", "from 0 to 1")
        need(0 <= self.high_from <= 0.99, "high_from", "from 0 to 0.99")
        need(0 <= self.prior_share < 1, "prior_share", "at least 0 and below 1: the rest of the batch is the data")
        need(self.keep >= 2, "keep", "at least 2: the newest may be broken")
        need(0 <= self.seed < 2**63, "seed", "from 0 to 2**63 - 1")
        need(not (self.fps and self.stride), "stride", "None beside fps: both say which frames are taken")
        need(self.train != "patterns" or bool(self.targets), "targets", "patterns of names with train 'patterns'")
        if self.train not in ("lora", "patterns") and self.targets:
            raise ValueError(f"targets goes with train 'lora' or 'patterns'; {self.train!r} has its own")
        for name in ("train_text", "kohya"):
            need(self.train == "lora" or not getattr(self, name), name, f"false with train {self.train!r}")
        if self.prior == "self" and not self.prior_prompts:
            raise ValueError("prior 'self' needs prior_prompts: what the model is to make clips of")
        if self.train == "motiondirector" and self.prior_target == "model":
            raise ValueError("prior_target must be 'clips' with train 'motiondirector': its two paths have two losses")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate must divide batch {self.batch}, not {self.accumulate!r}")

    @property
    def prior_rows(self) -> int:
        """How many rows of each batch come from the prior set. At least one row comes from the data."""
        if self.prior is None or not self.prior_share:
            return 0
        return min(self.batch - 1, max(1, round(self.batch * self.prior_share)))

    def filled(self, family: str, *, clips: int | None = None, cuda: bool = False, guidance: float = 9.0) -> "Recipe":
        """The recipe with usual values in place of None. ValueError where it does not fit the model.

        family: the class of the UNet, such as `UNet3DConditionModel`. clips: how many clips the data has, if known.
        cuda: whether it runs on CUDA. guidance: the usual guidance scale of the model.
        """
        kind, three_d = self.train, family == "UNet3DConditionModel"
        if three_d and kind in ("motion", "motion-lora", "image"):
            raise ValueError(f"train {kind!r} is for image models with a motion adapter: the model has a {family}; "
                             f"{'temporal' if kind != 'image' else 'spatial'!r} trains that part of it")  # fmt: skip
        if kind == "lora" and self.temporal_lora or kind in ("motion-lora", "motiondirector"):
            rate, timesteps = 5e-4, "high"
        else:
            rate = {"lora": 1e-4, "motion": 1e-4 if self.batch >= 32 else 1e-5, "image": 1e-5}.get(kind, 5e-6)
            timesteps = "uniform"
        lora = kind in LORAS
        values: dict[str, Any] = {
            "alpha": float(self.rank),
            "timesteps": timesteps,
            "text_dropout": None if clips is None else 0.1 if clips > 1 else 0.0,
            "frames": 1 if kind == "image" else 16,
            "learning_rate": rate,
            "spatial_learning_rate": 1e-4,
            "prior_target": "clips" if kind == "motiondirector" else "model",
            "warmup": min(100, self.steps // 10),
            "weight_decay": 0.0 if lora else 1e-2,
            "ema": 0.0 if lora else 0.999,
            "precision": "bf16" if cuda else "float32",
            "temporal_dropout": 0.1 if three_d and kind in ("full", "temporal", "patterns") else 0.0,
            "cache": str(Path(self.out) / "cache"),
            "validate_every": max(10, self.steps // 5),
            "guidance": guidance,
        }
        return dataclasses.replace(self, **{k: v for k, v in values.items() if getattr(self, k) is None})

    @property
    def temporal_lora(self) -> bool:
        return bool(self.targets) and all("temp" in target or "motion" in target for target in self.targets)

    def rate_at(self, step: int) -> float:
        """The factor of the learning rate: a linear warm-up, then the schedule. It depends only on the step."""
        import math

        up = min(1.0, (step + 1) / (self.warmup + 1)) if self.warmup else 1.0
        left = max(0.0, (self.steps - step) / max(1, self.steps - (self.warmup or 0)))
        if self.schedule == "cosine":
            return up * 0.5 * (1 - math.cos(math.pi * min(1.0, left)))
        return up * (min(1.0, left) if self.schedule == "linear" else 1.0)

    def changes(self, before: Mapping[str, Any]) -> list[str]:
        """The options that differ from a saved recipe and would change the weights of a resumed run.

        A run with a constant rate may have more steps now: its first steps are the same.
        """
        now, lines = self.values(), []
        for name, value in now.items():
            longer = name == "steps" and self.schedule == "constant" and before.get(name, 0) <= self.steps
            if name not in WATCHING and not longer and before.get(name, value) != value:
                lines.append(f"{name} was {before[name]!r} and is {value!r}")
        return lines

    def values(self) -> dict[str, Any]:
        """Every option with its value, as JSON has it."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def lines(self) -> list[str]:
        """Every option with its value, for people. Where there is none, the default from the help stands beside it."""
        lines = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value is None or value == ():
                value = " ".join(["none", *re.findall(r"\(default: .*\)$", f.metadata["help"])])
            lines.append(f"{f.name} = {value}")
        return lines


HINTS = typing.get_type_hints(Recipe)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def words(hint: Any) -> list[str]:
    """The words that an option can have. An empty list where other values are possible."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [w for part in typing.get_args(hint) for w in words(part)]
    return [*typing.get_args(hint)] if typing.get_origin(hint) is Literal else []


def parse(name: str, text: str) -> Any:
    """The value of an option from its text on the command line. ValueError where the text is no such value."""
    hint = HINTS[name]
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if text == "none" and type(None) in kinds:
        return None
    for kind, read in ((int, int), (float, float)):
        if kind in kinds:
            try:
                return read(text)
            except ValueError:
                raise ValueError(f"{name} must be a {'whole ' * (kind is int)}number, not {text!r}") from None
    return text


def read_recipe(path: str | Path | None, options: Mapping[str, Any]) -> Recipe:
    """The recipe of a TOML file or of a run.json. Options of the command line replace those of the file.

    Paths in a TOML file are relative to its folder. ValueError on an unknown option, with the nearest one.
    """
    values: dict[str, Any] = {}
    if path is not None:
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: {error}") from None
        if path.name == "run.json":
            values = values.get("recipe", values)
        for name in values:
            if name not in HINTS:
                raise ValueError(f"{path}: there is no option {name!r}{nearest(name, [*HINTS])}")
        for name in ("data", "out", "prior", "prior_prompts", "cache", "model", "adapter"):
            if name in values and path.suffix != ".json":
                values[name] = _beside(path.parent, values[name], name in ("out", "cache"))
    try:
        recipe = Recipe(**{**values, **options})
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path is not None and not options else str(error)) from None
    if not recipe.data:
        raise ValueError("give data: a folder of clips with captions, a list, or one clip")
    if not recipe.out:
        raise ValueError("give out: the folder of the run")
    for name, there in (("data", recipe.data), ("prior", (recipe.prior,) if recipe.prior != "self" else ())):
        for path in (p.get("path") if isinstance(p, dict) else p for p in there):
            if path is not None and not Path(path).expanduser().exists():
                parent = Path(path).expanduser().parent
                near = nearest(Path(path).name, [p.name for p in parent.iterdir()] if parent.is_dir() else [])
                raise ValueError(f"{name}: there is no file or folder {str(path)!r} in {Path.cwd()}{near}")
    return recipe


def _beside(folder: Path, value: Any, new: bool) -> Any:
    """A path in a TOML file, seen from the current folder. A text that is no file there is a hub id, and stays.

    new: the path need not exist yet.
    """
    if isinstance(value, list):
        return [_beside(folder, v, new) for v in value]
    if isinstance(value, dict) and "path" in value:
        return {**value, "path": _beside(folder, value["path"], new)}
    if not isinstance(value, str) or Path(value).expanduser().is_absolute():
        return value
    there = folder / value
    return str(there) if new or there.exists() else value
