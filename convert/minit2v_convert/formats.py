"""Plans a conversion between layouts: which tensors to write, in which order, and from which sources.

    kind = detect(header)                                  # header: {name: (shape, dtype)}, no data
    for component, plan in to_diffusers(kind, header).items():
        for step in plan.steps:                            # one tensor of the output after the other
            tensor = make(step, [read(name) for name in step.sources])

    files, omitted = from_diffusers({"unet": header, "vae": header, ...}, "authors")    # {file name: plan} back again

A plan is made from headers alone, without reading data. All names, shapes and dtypes are checked when it is made. So
the header of the output can be written before its first tensor. Only `make` reads data, and a step needs only its own
sources. Tensors that a plan does not take are in `ignored`, with the reason.

A folder of diffusers has no place for some tensors, which are on these lists. They are the noise schedules and moving
averages of single files, the counters of trainers, and OpenCLIP's image encoder and last block. Therefore OpenCLIP's
file cannot be made again (`omitted`). Motion modules get the copies of their position encodings back.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import animatediff, ldm, modelscope
from .detect import FLOATS, Header, Kind, Part, detect, fit_config
from .rename import nearest
from .shapes import Config, Shape
from .sparse import DTYPES
from .table import Format

INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Step:
    """One tensor of the output.

    sources: the names to read, from the file of `component` ("" if there is only one file).
    op: how the tensor is made. "copy" and "reshape" (for axes of size 1) take one source. "rows" takes part `part` of
        the `parts` parts of its rows. "join" concatenates the sources along the rows. "same" takes one of several
        sources, which are copies. "sinusoids" is computed without a source.
    """

    name: str
    shape: Shape
    dtype: str  # as safetensors names it
    sources: tuple[str, ...]
    op: str = "copy"
    part: int = 0
    parts: int = 1
    component: str = ""

    def __str__(self) -> str:
        """The line that a dry run prints."""
        op = {"copy": "", "rows": f" (rows, part {self.part + 1} of {self.parts})"}.get(self.op, f" ({self.op})")
        return f"{' + '.join(self.sources) or 'nothing'} -> {self.name} {list(self.shape)}{op}"


@dataclass(frozen=True)
class Plan:
    """One file of the output.

    config: the content of its config.json, or None. nest: the dictionaries around the tensors in a pickle.
    exact: tensors that always keep their dtype.
    ignored: {name of a source that is not taken: reason}. From `from_diffusers` a name is "component/name".
    """

    steps: tuple[Step, ...]
    config: Config | None = None
    nest: tuple[str, ...] = ()
    exact: frozenset[str] = frozenset()
    ignored: Mapping[str, str] = field(default_factory=dict)


def make(step: Step, tensors: Sequence[Tensor]) -> Tensor:
    """The tensor of a step. tensors: its sources, in the order of the step. The result may be a view of them."""
    if step.op == "sinusoids":
        return sinusoids(*step.shape[1:]).to(DTYPES[step.dtype])[None]
    if step.op == "join":
        return torch.cat(list(tensors)).reshape(step.shape)
    x = tensors[0]
    if step.op == "same":
        for name, other in zip(step.sources[1:], tensors[1:], strict=True):
            if x.dtype != other.dtype or not torch.equal(_bits(x), _bits(other)):
                raise ValueError(f"{step.sources[0]!r} and {name!r} must be equal, because only one can be kept, but "
                                 "they differ")
    if step.op == "rows":
        n = x.shape[0] // step.parts
        x = x[n * step.part : n * (step.part + 1)]
    return x.reshape(step.shape)


def _bits(x: Tensor) -> Tensor:
    return x.view(INTS[x.element_size()])


def sinusoids(rows: int, dim: int) -> Tensor:
    """Position encodings (rows dim) as AnimateDiff computes them.

    Even columns are sines, odd columns cosines, with wavelengths from 2 pi to 20000 pi.
    """
    position = torch.arange(rows).unsqueeze(1)
    rate = torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
    table = torch.zeros(rows, dim)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate)
    return table


# ------------------------------------------------------------------------------------------------------------------ in


def to_diffusers(kind: Kind, header: Header, *, ema: bool = False) -> dict[str, Plan]:
    """{component: plan of its file in a folder of diffusers}.

    ema: take the moving average of the UNet's weights, if a single file has one. Raises ValueError if a tensor is
    missing or unknown, or has a wrong shape or dtype. A single file may lack whole components (`kind.absent`).
    """
    title = kind.layout.title
    if kind.layout.refused:
        raise ValueError(f"{title}: {kind.layout.refused}")
    if kind.missing or kind.unknown or kind.misshapen:
        raise ValueError(f"{title}: {'; '.join(kind.faults())}")
    parts, ignored = list(kind.parts), dict(kind.ignored)
    if ema:
        parts, ignored = _averaged(kind, header)
    steps: dict[str, list[Step]] = {}
    for part in parts:
        steps.setdefault(part.format.component, []).extend(_read(part, header))
    configs = {part.format.component: _config(part) for part in parts}
    return {component: Plan(tuple(s), configs[component], ignored=ignored) for component, s in steps.items()}


def _averaged(kind: Kind, header: Header) -> tuple[list[Part], dict[str, str]]:
    """(parts, ignored) with the moving average in place of the UNet's weights."""
    unet = next((p for p in kind.parts if p.format is ldm.UNET), None)
    plain = {name[len(kind.prefix) :]: x for name, x in header.items()}
    average = unet and fit_config(ldm.EMA, kind.prefix, plain, unet.config)
    if unet is None or average is None or average.missing or average.misshapen:
        there = len(average.mapped) if average else 0
        raise ValueError(f"{kind.layout.title}: the file has no complete moving average; {there} tensors of one are in "
                         "it")
    ignored = {name: why for name, why in kind.ignored.items() if name not in average.mapped}
    ignored |= dict.fromkeys(sorted(unet.mapped), "the moving average is taken instead")
    return [average if p is unet else p for p in kind.parts], ignored


def _config(part: Part) -> Config | None:
    if part.format is animatediff.MODULES:
        return {**part.config, **animatediff.resnet_norms(part.config)}
    return part.config if "_class_name" in part.config or "architectures" in part.config else None


def _read(part: Part, header: Header) -> list[Step]:
    """A step for each of diffusers' tensors in this part, in the order of the network."""
    table = part.format.table(part.config)
    by_name = {}
    some = next((header[name][1] for name in part.mapped), "F32")
    for entry in table.entries:
        sources = tuple(part.prefix + name for name in entry.authors)
        there = all(name in part.mapped for name in sources)
        for n, name in enumerate(entry.diffusers):
            shape, written = table.shapes[name], part.format.written + name
            if not there:  # the tensor is optional, or will be computed
                if name in table.computed:
                    by_name[name] = Step(written, shape, some, (), table.computed[name])
                continue
            dtype = _float(sources[0], header, name in table.optional)
            op = "copy"
            if len(entry.diffusers) > 1:
                op = "rows"
            elif len(sources) > 1:
                op = "same"
            elif tuple(header[sources[0]][0]) != shape:
                op = "reshape"
            by_name[name] = Step(written, shape, dtype, sources, op, n, len(entry.diffusers))
    return [by_name[name] for name in table.shapes if name in by_name]


def _float(name: str, header: Header, optional: bool) -> str:
    dtype = header[name][1]
    if dtype not in FLOATS and not optional:
        raise ValueError(f"{name!r} is {dtype}, but only weights in {', '.join(FLOATS)} can be converted")
    return dtype


# ----------------------------------------------------------------------------------------------------------------- out

AUTHORS_FILES: dict[str, tuple[Format, str, str, tuple[str, ...]]] = {
    # the layout's title: format, prefix, file name, dictionaries around it
    "UNet3DConditionModel": (modelscope.UNETSD, "", "text2video_pytorch_model.pth", ()),
    "AutoencoderKL": (ldm.AUTOENCODER, "", "vae.ckpt", ("state_dict",)),
    "MotionAdapter": (animatediff.MODULES, "", "motion_module.ckpt", ()),
    "AnimateDiff motion LoRA": (animatediff.MOTION_LORA, "", "motion_lora.ckpt", ()),
    "motion LoRA": (animatediff.MOTION_LORA, "", "motion_lora.ckpt", ()),
    "AnimateDiff domain adapter": (animatediff.DOMAIN_ADAPTER, "", "domain_adapter.ckpt", ()),
}
MODELSCOPE_VAE = (ldm.AUTOENCODER, "first_stage_model.", "VQGAN_autoencoder.pth", ("state_dict",))
NESTED = ("Stable Diffusion 1.x", "VAE in a checkpoint (ModelScope's VQGAN_autoencoder.pth)",
          "VAE of latent diffusion")  # titles of layouts whose pickles have a `state_dict` around the tensors
SINGLE_FILE = {  # component: format, prefix, the class in diffusers or transformers
    "unet": (ldm.UNET, "model.diffusion_model.", "UNet2DConditionModel"),
    "vae": (ldm.AUTOENCODER, "first_stage_model.", "AutoencoderKL"),
    "text_encoder": (ldm.TEXT, "cond_stage_model.transformer.", "CLIPTextModel"),
}


def from_diffusers(
    headers: Mapping[str, Header], layout: str, *, positions: bool = True
) -> tuple[dict[str, Plan], dict[str, str]]:
    """({file name: plan}, {component: reason why it is not written}) from the headers of a folder's weights.

    headers: {component: header}; the component of a single file may be "". layout: "authors" or "single-file". For
    Stable Diffusion both are a single file. positions: whether motion modules get their position encodings (those of
    AnimateLCM have none). Raises ValueError if a header is not a complete network in the layout of diffusers, or if
    nothing can be written.
    """
    if layout not in ("authors", "single-file"):
        raise ValueError(f"there is no layout {layout!r}{nearest(layout, ['authors', 'single-file'])}")
    kinds = {component: detect(header) for component, header in headers.items()}
    for component, kind in kinds.items():
        if kind.layout.layout not in ("diffusers", "peft"):
            raise ValueError(f"{component or 'it'} is {kind.layout.title} ({kind.layout.layout}), not in the layout of "
                             "diffusers: convert it to that layout first")
    plans = {c: to_diffusers(kind, headers[c]) for c, kind in kinds.items()}
    titles = {kind.layout.title for kind in kinds.values()}
    if layout == "single-file" or "UNet2DConditionModel" in titles:
        return {"model.safetensors": _single_file(kinds, plans)}, {}
    files, omitted = {}, {}
    for component, kind in kinds.items():
        (name, plan), *_ = plans[component].items()
        modelscope_s = "UNet3DConditionModel" in titles
        target = AUTHORS_FILES.get(kind.layout.title)
        if name == "lora" and len(kind.parts) > 1:
            raise ValueError(f"{component or 'it'}: this LoRA changes {len(kind.parts)} networks, but a file in the "
                             "authors' layout can change only one")  # fmt: skip
        if name == "lora":  # peft's names do not tell which network it changes, but the shapes do
            target = next((t for t in AUTHORS_FILES.values() if t[0].shapes is kind.parts[0].format.shapes), None)
        if name == "vae" and modelscope_s:
            target = MODELSCOPE_VAE
        if name == "text_encoder" and (modelscope_s or _is_open_clip(kind)):
            omitted[component] = modelscope.OPEN_CLIP_LOST
        elif target is None:
            omitted[component] = f"{kind.layout.title} has no file of its own in the authors' layout"
        else:
            fmt, prefix, file, nest = target
            steps = _write(fmt, prefix, kind.parts[0], plan, component, positions)
            files[file] = Plan(tuple(steps), None, nest, ignored=_ignored(component, plan))
    if not files:
        raise ValueError("; ".join(f"{c or 'it'}: {why}" for c, why in omitted.items()))
    return files, omitted


def _is_open_clip(kind: Kind) -> bool:
    return kind.parts[0].config.get("hidden_act") == "gelu"


def _ignored(component: str, plan: Plan) -> dict[str, str]:
    return {f"{component}/{name}": why for name, why in plan.ignored.items()}


def _single_file(kinds: Mapping[str, Kind], plans: Mapping[str, dict[str, Plan]]) -> Plan:
    steps: list[Step] = []
    ignored: dict[str, str] = {}
    there = [name for found in plans.values() for name in found]
    if "unet" not in there and "vae" not in there:
        raise ValueError(f"a single file needs a UNet or a VAE, and here is only {' and '.join(there)}")
    for component, kind in kinds.items():
        (name, plan), *_ = plans[component].items()
        if name not in SINGLE_FILE or kind.layout.title != SINGLE_FILE[name][2] or _is_open_clip(kind):
            raise ValueError(f"{component or 'it'}: {kind.layout.title} ({kind.version}) cannot be part of a single "
                             "file of Stable Diffusion 1.x")  # fmt: skip
        fmt, prefix, _ = SINGLE_FILE[name]
        steps += _write(fmt, prefix, kind.parts[0], plan, component, True)
        ignored |= _ignored(component, plan)
    return Plan(tuple(steps), None, ("state_dict",), ignored=ignored)


def _write(fmt: Format, prefix: str, part: Part, plan: Plan, component: str, positions: bool) -> list[Step]:
    """A step for each of the authors' tensors, from diffusers' tensors in `plan`."""
    table = fmt.table(part.config)
    found = {step.name.removeprefix(part.format.written): step for step in plan.steps}
    out = []
    for entry in table.entries:
        have = [found[name] for name in entry.diffusers if name in found]
        if len(have) < len(entry.diffusers) or not positions and entry.diffusers[0] in table.computed:
            continue  # optional or unwanted tensors; `to_diffusers` has checked the others
        shape = entry.authors_shape(table.shapes)
        op = "join" if len(have) > 1 else "reshape" if entry.ones else "copy"
        sources = tuple(source for step in have for source in step.sources)
        out += [Step(prefix + name, shape, have[0].dtype, sources, op, component=component) for name in entry.authors]
    return out


def rewritten(kind: Kind, header: Header, nest: tuple[str, ...]) -> Plan:
    """The plan for a file that stays in the authors' layout, for another dtype or container. No name changes.

    nest: the dictionaries around the tensors in the source. Raises ValueError if the file is not complete.
    """
    to_diffusers(kind, header)  # only for its checks
    steps = tuple(Step(name, tuple(shape), dtype, (name,)) for name, (shape, dtype) in header.items())
    if not nest and kind.layout.title in NESTED:
        nest = ("state_dict",)
    exact = frozenset(n for n, why in kind.ignored.items() if why in (ldm.SCHEDULE, *ldm.COUNTERS.values()))
    return Plan(steps, None, nest, exact)
