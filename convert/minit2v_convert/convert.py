"""A model in one published layout -> the same model in another, in files.

    convert("v1-5-pruned.ckpt", "sd15")                         # a folder in the layout of diffusers
    convert("sd15", "again.safetensors", to="single-file")      # and back

What a file is, its content says (`detect`). Everything is checked before anything is written, tensors are streamed
(`stream`), and what is written has a temporary name until it is whole.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .detect import detect
from .formats import Plan, Step, from_diffusers, to_diffusers
from .rename import nearest
from .shapes import Config
from .stream import (
    PICKLES,
    Source,
    json_text,
    made,
    open_file,
    parse_json,
    replacing,
    retyped,
    size_of,
    write_file,
)

LAYOUTS = ("diffusers", "original", "single-file")
WEIGHTS = (".safetensors", *PICKLES)
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "pytorch_lora_weights")
NO_NETWORKS = {
    "safety_checker": "a classifier of single images",
    "feature_extractor": "prepares images for the safety checker",
    "image_encoder": "turns image prompts into vectors: nothing here can use it yet",
}
Progress = Callable[[str, int, int], Any]
VERSION = "0.30.0"  # of diffusers, whose layout it is, as its own files say
SCHEDULE = {
    "_diffusers_version": VERSION, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "num_train_timesteps": 1000, "prediction_type": "epsilon", "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """The pipeline around a UNet: what no original has. published: where the tokenizer can be taken from."""

    pipeline: str
    scheduler: Config
    published: str


FAMILIES = {
    "UNet3DConditionModel": Family("TextToVideoSDPipeline", {"_class_name": "DDIMScheduler", **SCHEDULE},
                                   "ali-vilab/text-to-video-ms-1.7b"),
    "UNet2DConditionModel": Family("StableDiffusionPipeline", {"_class_name": "PNDMScheduler", **SCHEDULE},
                                   "stable-diffusion-v1-5/stable-diffusion-v1-5"),
}  # fmt: skip


@dataclass(frozen=True)
class Component:
    """One network to be written, or to be loaded: `tensors()` are those of the published names."""

    plan: Plan
    source: Source
    config: Config | None
    title: str  # of the file that it comes from
    guessed: bool = False  # of another size than the published one: what shapes do not say is as there

    @property
    def cls(self) -> str:
        config = self.config or {}
        return str(config.get("_class_name") or (config.get("architectures") or [""])[0])

    def tensors(self) -> dict[str, Tensor]:
        """Mapped where no axis or row has to be moved."""
        return {step.name: made(step, lambda _, name: self.source.read(name)) for step in self.plan.steps}


@dataclass
class Conversion:
    """What will be written. plans and texts: by path below the output. notes: what is not converted or not there."""

    plans: dict[str, Plan] = field(default_factory=dict)
    sources: dict[str, Mapping[str, Source]] = field(default_factory=dict)  # path -> {step.component: source}
    texts: dict[str, str] = field(default_factory=dict)
    copies: dict[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The mapping, tensor by tensor."""
        out = []
        for name, plan in self.plans.items():
            out += [f"{name}: {len(plan.steps)} tensors, {size_of(plan):,} bytes", *(f"  {s}" for s in plan.steps)]
            out += [f"  {source} is left out: {why}" for source, why in plan.ignored.items()]
        return out + [f"{name}: written anew" for name in self.texts] + [f"{name}: copied" for name in self.copies]


def convert(
    src: str | Path,
    dst: str | Path,
    to: str = "diffusers",
    dtype: torch.dtype | None = None,
    dry_run: bool = False,
    *,
    ema: bool = False,
    tokenizer: str | Path | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a file, or a folder in the layout of diffusers or of ModelScope. Returns what was, or would be, written.

    dst: a folder, or a file where one file of weights is all. to: diffusers, original, single-file. dtype: of the
    weights; as they are if None. ema: take a single file's moving average. tokenizer: a folder, for originals, which
    have none. progress: told, after each tensor, the file, the tensor's bytes, and the bytes of all.
    Raises ValueError in one line, before anything is written, on what is not known or not complete; FileExistsError
    where `dst` is there already; OSError where it cannot be written.
    """
    if to not in LAYOUTS:
        raise ValueError(f"there is no layout {to!r}{nearest(to, LAYOUTS)}; there are {', '.join(LAYOUTS)}")
    src, dst = Path(src), Path(dst)
    if dtype is not None and dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ValueError(f"dtype: weights are float32, float16, bfloat16 or float64, not {dtype}")
    work = _to_diffusers(src, ema, tokenizer) if to == "diffusers" else _from_diffusers(src, to)
    work.plans = {name: retyped(plan, dtype) for name, plan in work.plans.items()}
    if dst.suffix in WEIGHTS:
        if len(work.plans) > 1 or work.texts or work.copies:
            raise ValueError(f"{dst}: this becomes {len(work.plans) + len(work.texts) + len(work.copies)} files, "
                             "which need a folder")  # fmt: skip
    if not dry_run:
        _write(work, dst, progress)
    return work


def components(src: str | Path, ema: bool = False) -> dict[str, Component]:
    """{component: network} of a file, or of a folder in any layout; nothing is read but headers."""
    return _components(_opened(Path(src))[0], ema)


def _components(opened: Mapping[str, tuple[Source, Config | None]], ema: bool) -> dict[str, Component]:
    found: dict[str, Component] = {}
    for source, own in opened.values():
        try:
            kind = detect(source.header)
            plans = to_diffusers(kind, source.header, ema=ema)
        except ValueError as error:
            raise ValueError(f"{source.path}: {error}") from None
        for component, plan in plans.items():
            if component in found:
                raise ValueError(f"{source.path} and {found[component].source.path}: both are the {component}")
            config = None if component == "lora" else own or plan.config
            guessed = config is not None and not own and any(
                part.format.component == component and not part.version for part in kind.parts)  # fmt: skip
            found[component] = Component(plan, source, config, kind.layout.title, guessed)
    return found


# ----------------------------------------------------------------------------------------------------------------- in


def _opened(src: Path) -> tuple[dict[str, tuple[Source, Config | None]], list[str]]:
    """{component or file: (weights, config.json)} of a file or folder, and notes."""
    if not src.is_dir():
        return {"": (open_file(src), None)}, []
    if (src / "config.json").is_file():
        return {"": (_weights(src), parse_json(src / "config.json"))}, []
    if (src / "model_index.json").is_file():
        parts = sorted(p for p in src.iterdir() if p.is_dir() and (p / "config.json").is_file())
        notes = [f"{p.name} is left out: {NO_NETWORKS[p.name]}" for p in parts if p.name in NO_NETWORKS]
        return {p.name: (_weights(p), parse_json(p / "config.json")) for p in parts if p.name not in NO_NETWORKS}, notes
    files = sorted(p for p in src.iterdir() if p.suffix in WEIGHTS)
    if not files:
        raise ValueError(f"{src} has no weights; the files there: {', '.join(sorted(os.listdir(src))) or 'none'}")
    return {p.name: (open_file(p), None) for p in files}, []


def _weights(folder: Path) -> Source:
    """The weights of one component: `.safetensors` before `.bin`, one file before shards, no variant."""
    names = sorted(os.listdir(folder))
    for ending in (".safetensors", ".bin"):
        if whole := [n for n in names if n in [stem + ending for stem in STEMS]]:
            return open_file(folder / whole[0])
        shard = re.compile(rf"({'|'.join(STEMS)})-\d{{5}}-of-(\d{{5}}){re.escape(ending)}")
        if shards := [m for n in names if (m := shard.fullmatch(n))]:
            if len(shards) != int(shards[0][2]):
                raise ValueError(f"{folder} has {len(shards)} of the {int(shards[0][2])} shards of its weights")
            return _joined(folder, [open_file(folder / m[0]) for m in shards])
    there = [n for n in names if n.endswith(WEIGHTS)]
    raise ValueError(f"{folder} has no {STEMS[0]}.safetensors or the like; the weights there: {', '.join(there)}")


def _joined(folder: Path, shards: list[Source]) -> Source:
    where: dict[str, Source] = {}
    for shard in shards:
        for name in shard.header:
            if name in where:
                raise ValueError(f"{shard.path} repeats {name!r}, which another shard has")
            where[name] = shard
    header = {name: source.header[name] for name, source in where.items()}
    return Source(folder, header, lambda name: where[name].read(name))


# --------------------------------------------------------------------------------------------------------------- plans


def _to_diffusers(src: Path, ema: bool, tokenizer: str | Path | None) -> Conversion:
    opened, notes = _opened(src)
    found = _components(opened, ema)
    work = Conversion(notes=notes)
    lone = len(found) == 1 and not (src / "model_index.json").is_file()
    for component, part in found.items():
        below = "" if lone else f"{component}/"
        stem = {"text_encoder": "model", "lora": "pytorch_lora_weights"}.get(component, "diffusion_pytorch_model")
        work.plans[f"{below}{stem}.safetensors"] = part.plan
        work.sources[f"{below}{stem}.safetensors"] = {"": part.source}
        if part.config is not None:
            own = part.config if "_diffusers_version" in part.config or "_class_name" not in part.config else {
                **part.config, "_diffusers_version": VERSION}  # fmt: skip
            work.texts[f"{below}config.json"] = json_text(own)
        work.notes += _left_out(part)
    if (src / "model_index.json").is_file():
        index = parse_json(src / "model_index.json")
        index = {name: [None, None] if name in NO_NETWORKS else value for name, value in index.items()}
        work.texts["model_index.json"] = json_text(index)
        others = [p for p in sorted(src.iterdir()) if p.is_dir() and p.name not in {*found, *NO_NETWORKS}]
        for file in (f for p in others for f in sorted(p.iterdir()) if f.is_file()):
            work.copies[f"{file.parent.name}/{file.name}"] = file
    elif "unet" in found and found["unet"].cls in FAMILIES and found.keys() & {"vae", "text_encoder"}:
        _add_pipeline(work, found, FAMILIES[found["unet"].cls], tokenizer)
    elif tokenizer is not None:
        raise ValueError(f"{src}: a tokenizer belongs to a whole pipeline, and this is {' and '.join(found)}")
    return work


def _add_pipeline(
    work: Conversion, found: Mapping[str, Component], family: Family, tokenizer: str | Path | None
) -> None:
    """The index, the scheduler, the tokenizer."""
    index: dict[str, Any] = {"_class_name": family.pipeline, "_diffusers_version": VERSION}
    index |= {"unet": ["diffusers", found["unet"].cls], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"scheduler": ["diffusers", family.scheduler["_class_name"]]}
    if family.pipeline == "StableDiffusionPipeline":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    work.texts["model_index.json"] = json_text(index)
    work.texts["scheduler/scheduler_config.json"] = json_text(family.scheduler)
    work.notes.append("scheduler: that of the published model; weights trained for v-prediction or zero-SNR need "
                      "another")  # fmt: skip
    for component in ("vae", "text_encoder"):
        if component not in found:
            work.notes.append(f"{component} is missing: take the folder {component} of {family.published}")
    if tokenizer is None:
        work.notes.append(f"tokenizer is missing: no original has one; take the folder tokenizer of {family.published}")
        return
    files = [f for f in sorted(Path(tokenizer).iterdir()) if f.suffix in (".json", ".txt")]
    if not {"vocab.json", "merges.txt"} <= {f.name for f in files} and "tokenizer.json" not in {f.name for f in files}:
        raise ValueError(f"{tokenizer} is no tokenizer: neither vocab.json and merges.txt nor tokenizer.json")
    work.copies |= {f"tokenizer/{f.name}": f for f in files}


def _left_out(part: Component) -> list[str]:
    """Each reason once, with the number of tensors."""
    reasons: dict[str, int] = {}
    for why in part.plan.ignored.values():
        reasons[why] = reasons.get(why, 0) + 1
    lines = [f"{part.source.path.name}: {count} tensors left out, {why}" for why, count in reasons.items()]
    if part.guessed:
        lines.append(f"{part.source.path.name}: the {part.cls} is not of the published size; what shapes do not "
                     "say in config.json (heads, groups, sample size) is as there")  # fmt: skip
    return lines + [f"{part.source.path.name}: {name!r} left out, {why}"
                    for name, why in (part.source.ignored or {}).items()]  # fmt: skip


def _from_diffusers(src: Path, layout: str) -> Conversion:
    opened, notes = _opened(src)
    sources = {component: source for component, (source, _) in opened.items()}
    try:
        plans, omitted = from_diffusers({c: s.header for c, s in sources.items()}, layout)
    except ValueError as error:
        raise ValueError(f"{src}: {error}") from None
    notes += [f"{component or 'it'} is left out: {why}" for component, why in omitted.items()]
    return Conversion(plans, dict.fromkeys(plans, sources), notes=notes)


# ----------------------------------------------------------------------------------------------------------------- out


def _write(work: Conversion, dst: Path, progress: Progress | None) -> None:
    if dst.exists() and not (dst.is_dir() and not any(dst.iterdir())):
        raise FileExistsError(f"{dst} is there already: nothing is replaced")
    parent = dst.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    size, free = sum(map(size_of, work.plans.values())), shutil.disk_usage(parent).free
    if size > free:
        raise OSError(f"{dst} takes {size:,} bytes, and there are {free:,}")

    def write(path: Path, name: str) -> None:
        def done(n: int) -> None:
            if progress is not None:
                progress(name, n, size)

        write_file(path, work.plans[name], _reader(work.sources[name]), done)

    if dst.suffix in WEIGHTS:
        with replacing(dst) as temporary:
            write(temporary, next(iter(work.plans)))
        return
    temporary = parent / f".{dst.name}.{os.getpid()}.tmp"
    try:
        for name in [*work.plans, *work.texts, *work.copies]:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            if name in work.plans:
                write(temporary / name, name)
            elif name in work.texts:
                (temporary / name).write_text(work.texts[name], encoding="utf-8")
            else:
                shutil.copyfile(work.copies[name], temporary / name)
        os.replace(temporary, dst)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _reader(sources: Mapping[str, Source]) -> Any:
    def read(step: Step, name: str) -> Tensor:
        return sources[step.component].read(name)

    return read
