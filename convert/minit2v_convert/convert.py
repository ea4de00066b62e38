"""Converts the files of a model from one layout to another.

    convert("v1-5-pruned.ckpt", "sd15")                         # a folder in the layout of diffusers
    convert("sd15", "again.safetensors", to="single-file")      # and back

The layout of a file is recognised by its content (`detect`). Everything is checked before anything is written. Tensors
are streamed one by one (`stream`). The output has a temporary name until it is complete.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import configs
from . import modelscope_configuration as configuration
from .detect import detect
from .folders import CONFIG, INDEX, NO_NETWORKS, STEMS, WEIGHTS, Opened, open_path, read_configuration
from .formats import Plan, Step, from_diffusers, rewritten, to_diffusers
from .rename import nearest, shown
from .shapes import Config
from .stream import (
    Source,
    ended_cleanly,
    first_line,
    json_text,
    made,
    parse_json,
    replacing,
    retyped,
    size_of,
    write_file,
)  # fmt: skip

LAYOUTS = ("diffusers", "authors", "single-file")
Check = Callable[[str, Config], Any]
Progress = Callable[[str, int, int], Any]
UNSAID = ("the shapes do not tell the numbers of heads and groups, and the published ones do not fit: give a config "
          "(config=, --config)")  # fmt: skip
VERSION = "0.30.0"  # the version of diffusers whose layout is written
SCHEDULE = {
    "_diffusers_version": VERSION, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "num_train_timesteps": 1000, "prediction_type": "epsilon", "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """The pipeline of a UNet, which the authors' files do not describe.

    repository: a repository on the hub with its tokenizer. pad_token: the token with which the CLIP tokenizer pads
    prompts.
    """

    pipeline: str
    scheduler: Config
    repository: str
    pad_token: str


FAMILIES = {
    "UNet3DConditionModel": Family("TextToVideoSDPipeline", {"_class_name": "DDIMScheduler", **SCHEDULE},
                                   "ali-vilab/text-to-video-ms-1.7b", "!"),
    "UNet2DConditionModel": Family("StableDiffusionPipeline", {"_class_name": "PNDMScheduler", **SCHEDULE},
                                   "stable-diffusion-v1-5/stable-diffusion-v1-5", "<|endoftext|>"),
}  # fmt: skip


@dataclass(frozen=True)
class Component:
    """One network to write or to load.

    title: the layout of its file. guessed: its size is not a published one, so the fields that shapes do not tell
    (heads, groups) have the published model's values. notes: messages about corrected fields of the config.
    """

    plan: Plan
    source: Source
    config: Config | None
    title: str
    guessed: bool = False
    notes: tuple[str, ...] = ()

    @property
    def cls(self) -> str:
        return _class_of(self.config or {})

    def tensors(self) -> dict[str, Tensor]:
        """{diffusers' name: tensor}. A tensor stays memory-mapped if it is not rearranged."""
        return {step.name: made(step, lambda _, name: self.source.read(name)) for step in self.plan.steps}

    def configured(self, config: Config, where: str) -> "Component":
        """The component with this config.json. ValueError if the config does not fit the weights. where: its path."""
        assert self.config is not None
        if _class_of(config) not in ("", self.cls):
            raise ValueError(f"{where} is for a {_class_of(config)}, but the weights are for a {self.cls}")
        said, found = configs.said(config), configs.said(self.config)
        for name in said:
            if name in found and said[name] != found[name]:
                raise ValueError(f"{where} has {name} {said[name]}, but the weights in {self.source.path} have "
                                 f"{found[name]}")  # fmt: skip
        notes, name = self.notes, "motion_max_seq_length"  # wrong in some published folders
        if name in self.config and config.get(name, self.config[name]) != self.config[name]:
            notes += (f"{where}: {name} {config[name]} is corrected to {self.config[name]}, as in the weights",)
            config = {**config, name: self.config[name]}
        return replace(self, config=config, guessed=False, notes=notes)


def _class_of(config: Config) -> str:
    named = config.get("architectures")  # transformers' field
    return str(config.get("_class_name") or (named[0] if isinstance(named, list) and named else ""))


@dataclass
class Conversion:
    """The files to write. plans, texts, copies: by path in the output. notes: messages about omitted or missing parts.
    """

    plans: dict[str, Plan] = field(default_factory=dict)
    sources: dict[str, Mapping[str, Source]] = field(default_factory=dict)  # path -> {step.component: source}
    texts: dict[str, str] = field(default_factory=dict)
    copies: dict[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    omitted: frozenset[str] = frozenset()  # components that are not converted; a note gives the reason

    def lines(self) -> list[str]:
        """Lines with the old and new name of every tensor."""
        out = []
        for name, plan in self.plans.items():
            out += [f"{name}: {len(plan.steps)} tensors, {size_of(plan):,} bytes", *(f"  {s}" for s in plan.steps)]
            out += [f"  {source} is left out: {why}" for source, why in plan.ignored.items()]
        return out + [f"{name}: new" for name in self.texts] + [f"{name}: copied" for name in self.copies]


def convert(
    src: str | Path,
    dst: str | Path,
    to: str = "diffusers",
    dtype: torch.dtype | None = None,
    dry_run: bool = False,
    *,
    ema: bool = False,
    tokenizer: str | Path | None = None,
    config: str | Path | None = None,
    variant: str | None = None,
    safe_serialization: bool = True,
    progress: Progress | None = None,
    check: Check | None = None,
) -> Conversion:
    """Convert a checkpoint file, or a folder in the layout of diffusers or of ModelScope.

    Returns the files that were written, or with `dry_run` would be.

    dst: a new folder, or a new file if the output is a single file of weights.
    to: "diffusers", "authors" or "single-file". It may be the layout of `src`, to change the dtype or the file format.
    dtype: the dtype of the weights. None keeps it.
    ema: take the moving average of a single file.
    tokenizer: a folder with a tokenizer, because the authors' files have none.
    config: a folder in the layout of diffusers, or a config.json, for fields that the authors' files do not tell.
    variant: the variant of a folder's weights, such as "fp16".
    safe_serialization: write `.safetensors` in folders of diffusers, else `.bin`.
    progress: called after each tensor with the file, the bytes of the tensor, and the bytes of all tensors.
    check: called with the class and config of each network if `config` is given. It raises ValueError if the network
        cannot be made.

    Raises ValueError, before anything is written, if the source is unknown or not complete; FileExistsError if `dst`
    exists; OSError if it cannot be written.
    """
    if to not in LAYOUTS:
        raise ValueError(f"there is no layout {to!r}{nearest(to, LAYOUTS)}; the layouts are {', '.join(LAYOUTS)}")
    src, dst = Path(src), Path(dst)
    if dtype is not None and dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ValueError(f"dtype must be float32, float16, bfloat16 or float64, not {dtype}")
    only = {"ema": ema, "tokenizer": tokenizer, "config": config, "safe_serialization": not safe_serialization}
    if to != "diffusers" and (what := [name for name, given in only.items() if given]):
        raise ValueError(f"{what[0]} can only be used with to=\"diffusers\", not with {to!r}")
    if not safe_serialization and dst.suffix == ".safetensors":
        raise ValueError(f"{dst} ends in .safetensors, but .bin was chosen: change the name or the option")
    if dst.name == "-" or dst.name.lower() in WEIGHTS or dst.suffix.lower() in WEIGHTS and dst.suffix not in WEIGHTS:
        raise ValueError(f"{shown(dst)} is not a valid name: give a file such as name{dst.suffix.lower() or WEIGHTS[0]}"
                         " (ending in lower case), or a folder")  # fmt: skip
    target = _target(dst)
    if not dry_run:
        _check_free(target, dst)
    opened = open_path(src, variant)
    work = _to_authors(src, opened, to) if to != "diffusers" else _to_diffusers(
        src, opened, ema, tokenizer, config, safe_serialization, check)  # fmt: skip
    _check_all_taken(work)
    work.notes += [_metadata_left_out(source) for source, _ in opened.weights.values() if source.metadata]
    work.plans = {name: retyped(plan, dtype) for name, plan in work.plans.items()}
    if dst.suffix in WEIGHTS:
        if len(work.plans) > 1 or work.texts or work.copies:
            raise ValueError(f"{dst} is the name of a file, but the output has "
                             f"{len(work.plans) + len(work.texts) + len(work.copies)} files: give a folder")
    if not dry_run:
        _write(work, target, progress)
    return work


def components(
    src: str | Path, ema: bool = False, config: str | Path | None = None, *, mmap: bool = True
) -> dict[str, Component]:
    """{component: network} of a file, or of a folder in any layout. Only headers are read.

    ema, config: as in `convert`. mmap: as in `stream.open_file`. ValueError if something is unknown or not complete.
    """
    return _components(open_path(Path(src), mmap=mmap), ema, config)


def schedule_of(src: str | Path, unet: str) -> Config:
    """The scheduler config for authors' files with this UNet: the published one, changed by a configuration.json."""
    said = read_configuration(Path(src)) if Path(src).is_dir() else None
    return {**FAMILIES[unet].scheduler, **(said.scheduler if said else {})}


# ----------------------------------------------------------------------------------------------------------------- in


def _components(opened: Opened, ema: bool, config: str | Path | None) -> dict[str, Component]:
    found: dict[str, Component] = {}
    said, unused = opened.configuration, config is not None
    for source, own in opened.weights.values():
        try:
            kind = detect(source.header)
            plans = to_diffusers(kind, source.header, ema=ema)
        except ValueError as error:
            raise ValueError(f"{source.path}: {error}") from None
        for component, plan in plans.items():
            if component in found:
                raise ValueError(f"{source.path} and {found[component].source.path} are both the {component}")
            if said and said.files.get(component) != source.path.name:
                raise ValueError(f"{source.path} is the {component}, but for it {configuration.NAME} names "
                                 f"{said.files.get(component) or 'no file'}")  # fmt: skip
            lora = component == "lora"
            guessed = not lora and any(p.format.component == component and not p.version for p in kind.parts)
            part = Component(plan, source, None if lora else plan.config, kind.layout.title, guessed)
            if said and component == "unet":  # the config keeps 32 groups, as in the authors' code
                part = replace(part.configured(said.unet, configuration.NAME), config=plan.config)
            if own is not None and not lora:
                part = part.configured(own, str(source.path / CONFIG if source.path.is_dir()
                                                else source.path.parent / CONFIG))  # fmt: skip
            elif config is not None and not lora and (given := config_in(config, component)):
                alone = not (Path(config) / component / CONFIG).is_file()  # the config of one network
                if not alone or _class_of(given[0]) in ("", part.cls):
                    given = {**configs.told(part.config or {}), **given[0]}, given[1]
                    part, unused = part.configured(*given), False
            found[component] = part
    if unused:
        raise ValueError(f"config: {config} has no {CONFIG} for a {' or '.join(p.cls or n for n, p in found.items())}")
    return found


def config_in(config: str | Path, component: str) -> tuple[Config, str] | None:
    """The config.json of a component and its path, or None. config: the folder of a pipeline or component, or the file.
    """
    path = Path(config)
    for file in (path / component / CONFIG, path / CONFIG, path):
        if file.is_file() and not (file == path / CONFIG and (path / INDEX).is_file()):
            return parse_json(file), str(file)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {config}")
    return None


# --------------------------------------------------------------------------------------------------------------- plans


def _to_diffusers(
    src: Path,
    opened: Opened,
    ema: bool,
    tokenizer: str | Path | None,
    config: str | Path | None,
    safe: bool,
    check: Check | None = None,
) -> Conversion:
    if tokenizer is not None and (src / INDEX).is_file():
        raise ValueError(f"tokenizer: {src} is a pipeline, which has its own tokenizer; leave this option out")
    if config is not None and all(own is not None for _, own in opened.weights.values()):
        raise ValueError(f"config: {src} has its own {CONFIG}; leave this option out")
    found = _components(opened, ema, config)
    work = Conversion(notes=list(opened.notes))
    lone = len(found) == 1 and not (src / INDEX).is_file()
    for component, part in found.items():
        below = "" if lone else f"{component}/"
        of_transformers = "model" if safe else "pytorch_model"
        stems = {"text_encoder": of_transformers, "image_encoder": of_transformers, "lora": "pytorch_lora_weights"}
        name = f"{below}{stems.get(component, STEMS[0])}{'.safetensors' if safe else '.bin'}"
        work.plans[name], work.sources[name] = part.plan, {"": part.source}
        if part.config is not None:
            if why := configs.unfit(part.config):
                guess = f"; {UNSAID}" if part.config is part.plan.config else "; correct its config.json"
                raise ValueError(f"{part.source.path}: {why}{guess}")
            if config is not None and check is not None:
                try:
                    check(part.cls, part.config)
                except ValueError as error:
                    raise ValueError(f"config: {config}: {error}") from None
            own = part.config if "_diffusers_version" in part.config or "_class_name" not in part.config else {
                **part.config, "_diffusers_version": VERSION}  # fmt: skip
            work.texts[f"{below}{CONFIG}"] = json_text(own)
        work.notes += [*part.notes, *_left_out(part)]
    if (src / INDEX).is_file():
        index = parse_json(src / INDEX)
        index = {name: [None, None] if name in NO_NETWORKS else value for name, value in index.items()}
        work.texts[INDEX] = json_text(index)
        others = [p for p in sorted(src.iterdir()) if p.is_dir() and p.name not in {*found, *NO_NETWORKS}]
        for file in (f for p in others for f in sorted(p.iterdir()) if f.is_file()):
            if file.name.endswith(WEIGHTS):
                raise ValueError(f"{file.parent} has the weights {file.name}, but no {CONFIG}")
            work.copies[f"{file.parent.name}/{file.name}"] = file
    elif "unet" in found and found["unet"].cls in FAMILIES and found.keys() & {"vae", "text_encoder"}:
        _add_pipeline(work, src, opened, found, tokenizer, config)
    elif tokenizer is not None:
        raise ValueError(f"tokenizer: only a complete pipeline has one, and {src} is only {' and '.join(found)}")
    return work


def _add_pipeline(
    work: Conversion,
    src: Path,
    opened: Opened,
    found: Mapping[str, Component],
    tokenizer: str | Path | None,
    config: str | Path | None,
) -> None:
    """Add the index, the scheduler and the tokenizer of a pipeline."""
    family = FAMILIES[found["unet"].cls]
    scheduler = schedule_of(src, found["unet"].cls)
    given = Path(config) / "scheduler" / "scheduler_config.json" if config is not None else None
    if given is not None and given.is_file():
        scheduler = parse_json(given)
    elif opened.configuration is None:
        work.notes.append("scheduler: the published model's is used; weights trained with v-prediction or zero "
                          "terminal SNR need another")  # fmt: skip
    index: dict[str, Any] = {"_class_name": family.pipeline, "_diffusers_version": VERSION}
    index |= {"unet": ["diffusers", found["unet"].cls], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"scheduler": ["diffusers", scheduler["_class_name"]]}
    if family.pipeline == "StableDiffusionPipeline":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    work.texts[INDEX] = json_text(index)
    work.texts["scheduler/scheduler_config.json"] = json_text(scheduler)
    for component in ("vae", "text_encoder"):
        if component not in found:
            where = config if config is not None and (Path(config) / component).is_dir() else family.repository
            work.notes.append(f"{component} is missing: take the folder {component} of {where}")
    if tokenizer is None and config is not None and (Path(config) / "tokenizer").is_dir():
        tokenizer = Path(config) / "tokenizer"
    if tokenizer is None:
        work.notes.append(f"tokenizer is missing, because the authors' files have none: take the folder tokenizer of "
                          f"{family.repository}")  # fmt: skip
        return
    files = [f for f in sorted(Path(tokenizer).iterdir()) if f.suffix in (".json", ".txt")]
    if not {"vocab.json", "merges.txt"} <= {f.name for f in files} and "tokenizer.json" not in {f.name for f in files}:
        raise ValueError(f"{tokenizer} is not a tokenizer: it needs vocab.json and merges.txt, or tokenizer.json")
    work.copies |= {f"tokenizer/{f.name}": f for f in files}


def _left_out(part: Component) -> list[str]:
    """Messages about what is left out: each reason once, with the number of tensors."""
    reasons: dict[str, int] = {}
    for why in part.plan.ignored.values():
        reasons[why] = reasons.get(why, 0) + 1
    lines = [f"{part.source.path.name}: {count} tensors left out, {why}" for why, count in reasons.items()]
    if part.guessed:
        lines.append(f"{part.source.path.name}: the {part.cls} does not have the published size; fields of config.json "
                     "that shapes do not tell (heads, groups, sample size) have the published values")  # fmt: skip
    return lines + [f"{part.source.path.name}: {name!r} left out, {why}"
                    for name, why in (part.source.ignored or {}).items()]  # fmt: skip


def _metadata_left_out(source: Source) -> str:
    names = ", ".join(name if name.isidentifier() and len(name) < 100 else repr(name[:100])
                      for name in source.metadata[:8])  # fmt: skip
    more = f" and {len(source.metadata) - 8} more" if len(source.metadata) > 8 else ""
    return f"{source.path.name}: left out of its metadata: {names}{more}"


def _to_authors(src: Path, opened: Opened, layout: str) -> Conversion:
    """From the layout of diffusers, or from the same layout; then no name changes."""
    sources = {component: source for component, (source, _) in opened.weights.items()}
    notes = list(opened.notes)
    try:
        kinds = {component: detect(source.header) for component, source in sources.items()}
        if all(kind.layout.layout in ("authors", "single-file") for kind in kinds.values()):
            work = Conversion(notes=notes)
            for name, source in sources.items():
                kind, file = kinds[name], source.path.name
                if layout == "single-file" != kind.layout.layout:
                    raise ValueError(f"{kind.layout.title} cannot be a single file: give the layout \"authors\"")
                work.plans[file] = rewritten(kind, source.header, source.nest)
                work.sources[file] = {"": source}
                work.notes += [f"{file}: {n!r} left out, {why}" for n, why in (source.ignored or {}).items()]
            if opened.configuration is not None:
                work.copies[configuration.NAME] = src / configuration.NAME
            return work
        plans, omitted = from_diffusers({c: s.header for c, s in sources.items()}, layout)
    except ValueError as error:
        raise ValueError(f"{src}: {error}") from None
    notes += [f"{component or 'it'} is left out: {why}" for component, why in omitted.items()]
    work = Conversion(plans, dict.fromkeys(plans, sources), notes=notes, omitted=frozenset(omitted))
    unet = opened.weights.get("unet", (None, None))[1]
    if (src / INDEX).is_file() and unet and _class_of(unet) == "UNet3DConditionModel":
        path = src / "scheduler" / "scheduler_config.json"
        content, unsaid = configuration.write({**configs.UNET3D, **unet}, parse_json(path) if path.is_file() else {})
        work.texts[configuration.NAME] = json.dumps(content, indent=2) + "\n"
        work.notes += unsaid
    if (src / INDEX).is_file():
        taken = {*sources, *NO_NETWORKS, *(["scheduler"] if configuration.NAME in work.texts else [])}
        work.notes += [f"{name} is left out: the authors' layout has only weights" for name, value in
                       parse_json(src / INDEX).items() if isinstance(value, list) and any(value) and name not in taken]
    return work


# ----------------------------------------------------------------------------------------------------------------- out


def _check_all_taken(work: Conversion) -> None:
    """Check that each tensor of the sources is either written, or left out for a reason. Else ValueError."""
    taken: dict[int, set[str]] = {}
    for path, plan in work.plans.items():
        for component, source in work.sources[path].items():
            names = taken.setdefault(id(source), set())
            names |= {name for step in plan.steps if step.component == component for name in step.sources}
            names |= {name for name in plan.ignored if name in source.header}
            names |= {name for name in source.header if f"{component}/{name}" in plan.ignored}
    for sources in work.sources.values():
        for component, source in sources.items():
            left = [n for n in source.header if n not in taken[id(source)]] if component not in work.omitted else []
            if left:
                raise ValueError(f"{source.path}: {len(left)} tensors cannot be stored in {', '.join(work.plans)}: "
                                 f"{', '.join(map(repr, left[:3]))}{', ...' * (len(left) > 3)}")  # fmt: skip


def _target(dst: Path) -> Path:
    """`dst` with its links followed. This path is checked and written."""
    try:
        return dst.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise FileExistsError(f"{shown(dst)} is a link that cannot be followed: {first_line(error)}") from None


def _check_free(target: Path, dst: Path) -> None:
    """FileExistsError if `target` exists and is not an empty folder, or cannot be replaced. dst: its name for messages.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{shown(dst)} exists already, and is not replaced: give another name")
    if target.is_dir() and (os.path.ismount(target) or target == Path.cwd()):
        what = "the current folder" if target == Path.cwd() else "a mount point"
        raise FileExistsError(f"{shown(dst)} is {what}, which a new folder cannot replace: give a new folder in it")


def _write(work: Conversion, dst: Path, progress: Progress | None) -> None:
    _check_free(dst, dst)  # check again, now that the work begins
    parent = dst.parent
    missing = [p for p in (parent, *parent.parents) if not p.exists()]
    with ended_cleanly():
        try:
            parent.mkdir(parents=True, exist_ok=True)
            size, free = sum(map(size_of, work.plans.values())), shutil.disk_usage(parent).free
            if size > free:
                raise OSError(f"{shown(dst)} needs {size:,} bytes, but the disk has only {free:,} free")
            if dst.suffix in WEIGHTS:
                with replacing(dst) as temporary:
                    _write_plan(work, next(iter(work.plans)), temporary, size, progress)
            else:
                _write_folder(work, dst, size, progress)
        except BaseException:
            for folder in missing:  # the innermost first
                with suppress(OSError):
                    folder.rmdir()
            raise


def _write_folder(work: Conversion, dst: Path, size: int, progress: Progress | None) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{dst.name[:30]}.", dir=dst.parent) as temporary:
        new = Path(temporary) / dst.name  # a subfolder, because only the owner may read a temporary folder
        for name in [*work.plans, *work.texts, *work.copies]:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            if name in work.plans:
                _write_plan(work, name, new / name, size, progress)
            elif name in work.texts:
                (new / name).write_text(work.texts[name], encoding="utf-8")
            else:
                shutil.copyfile(work.copies[name], new / name)
        os.replace(new, dst)


def _write_plan(work: Conversion, name: str, path: Path, size: int, progress: Progress | None) -> None:
    def done(n: int) -> None:
        if progress is not None:
            progress(name, n, size)

    write_file(path, work.plans[name], _reader(work.sources[name]), done)


def _reader(sources: Mapping[str, Source]) -> Any:
    def read(step: Step, name: str) -> Tensor:
        return sources[step.component].read(name)

    return read
