"""Detects the layout of a checkpoint from the names, shapes and dtypes in its header.

`detect(header)` tries every layout whose signs are in the names. For each layout it infers a config from the shapes.
Then it takes the layout that explains the most tensors.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import adapters, animatediff, configs, families, ldm, modelscope, shapes
from .configs import CLIP_H, CLIP_L, UNET2D, UNET3D, UNET_MOTION
from .rename import nearest
from .shapes import Config
from .table import Format, reason

Header = Mapping[str, tuple[Sequence[int], str]]  # name -> (shape, dtype as safetensors names it)

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
         "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, eq=False)
class Layout:
    """A layout in which checkpoints are published.

    layout: authors, single-file, trainer, diffusers, kohya or peft.
    parts: (prefix of the names, formats that are possible after it).
    signs: parts of names; each must be in some name. without: parts that must be in no name.
    ignored: {template of names outside the parts: reason why they are not converted}.
    refused: the reason why such a file is recognised but not converted, or "".
    """

    title: str
    layout: str
    parts: tuple[tuple[str, tuple[Format, ...]], ...]
    signs: tuple[str, ...]
    without: tuple[str, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    refused: str = ""


@dataclass(frozen=True, eq=False)
class Part:
    """One network in a file.

    version: the known network with the same shapes, or "" for another size. mapped: names that fit the format.
    missing: names that the file lacks. misshapen: {name: error}. These three use the file's own names.
    declined: {optional tensor, without the prefix: reason why it is not converted}.
    computed: whether tensors that diffusers needs, but the file lacks, will be computed.
    """

    format: Format
    prefix: str
    config: Config
    version: str
    mapped: frozenset[str]
    missing: tuple[str, ...]
    misshapen: Mapping[str, str]
    declined: Mapping[str, str]
    computed: bool

    @property
    def described(self) -> str:
        if ranks := self.config.get("ranks"):
            return f"{len(ranks)} layers of rank {', '.join(map(str, sorted(set(ranks.values()))))}"
        return (self.version or "another size") + (" without positions" if self.computed else "")


@dataclass(frozen=True, eq=False)
class Kind:
    """The result of `detect`. Names are the file's own.

    absent: components of this layout that the file lacks. ignored: {name: reason}. unknown: names that are in no
    table. parameters: the number of floating-point values. positions: the rows of the position encodings.
    """

    layout: Layout
    prefix: str
    parts: tuple[Part, ...]
    absent: tuple[str, ...]
    ignored: Mapping[str, str]
    unknown: tuple[str, ...]
    dtypes: Mapping[str, int]
    parameters: int
    bytes: int
    positions: int | None

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.format.component for part in self.parts))

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.missing)

    @property
    def misshapen(self) -> dict[str, str]:
        return {name: why for part in self.parts for name, why in part.misshapen.items()}

    @property
    def complete(self) -> bool:
        """Whether all names and shapes are right, and none is missing or unknown."""
        return not (self.missing or self.misshapen or self.unknown or self.absent)

    @property
    def version(self) -> str:
        return ", ".join(dict.fromkeys(part.described for part in self.parts))

    def faults(self) -> list[str]:
        """Lines about wrong tensors: the first three names of each kind; for unknown names also the nearest known one.
        """
        lines = []
        expected = list(self.missing) or [name for part in self.parts for name in part.mapped]
        unknown = [repr(n) + nearest(n, expected) if len(n) < 200 else f"{n[:100]!r}..." for n in self.unknown[:3]]
        shaped = [f"{name!r} is {why}" for name, why in list(self.misshapen.items())[:3]]
        for count, what, items in (
            (len(self.missing), "missing", [repr(n) for n in self.missing[:3]]),
            (len(self.unknown), "unknown", unknown),
            (len(self.misshapen), "of another shape", shaped),
        ):
            if count:
                lines.append(f"{count} {what}: {', '.join(items)}{', ...' if count > 3 else ''}")
        return lines

    def describe(self) -> list[str]:
        """The lines for `inspect`."""
        lines = [f"{self.layout.title}: {self.version}" if self.version else self.layout.title]
        lines.append(f"layout: {self.layout.layout}{f', every name after {self.prefix!r}' if self.prefix else ''}")
        for part in self.parts:
            lines.append(f"{part.format.component}: {len(part.mapped)} tensors, {part.described}")
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
        lines.append(f"{self.parameters:,} parameters, {self.bytes:,} bytes, {dtypes}")
        if unsaid := [p.format.component for p in self.parts if not p.version and p.format.component != "lora"]:
            lines.append(f"{', '.join(unsaid)}: the shapes do not tell the numbers of heads and groups; a config.json "
                         "is needed")
        if self.positions:
            lines.append(f"{self.positions} positions")
        for why, count in Counter(self.ignored.values()).items():
            lines.append(f"not converted: {count} tensors, {why}")
        lines += [f"the file has no {component}" for component in self.absent]
        return lines + [f"wrong: {fault}" for fault in self.faults()]


# ------------------------------------------------------------------------------------------------------------- layouts

PLAIN_UNET3D = Format("unet", shapes.unet3d, configs.infer_unet, {"ModelScope or Zeroscope": UNET3D})
PLAIN_UNET2D = Format("unet", shapes.unet2d, configs.infer_unet, {"Stable Diffusion 1.5": UNET2D})
MOTION_UNET = Format(
    "unet", shapes.unet_motion, configs.infer_unet_motion,
    {f"Stable Diffusion 1.5 and {v}": {**UNET_MOTION, **{n: c[n] for n in UNET_MOTION if n in c and n[0] != "_"}}
     for v, c in animatediff.ADAPTER.known.items() if v != "sdxl"},
)  # fmt: skip
PLAIN_VAE = Format("vae", shapes.vae, configs.infer_vae, ldm.AUTOENCODER.known)
PLAIN_TEXT = Format("text_encoder", shapes.clip_text, configs.infer_clip,
                    {"CLIP ViT-L/14": CLIP_L, "OpenCLIP ViT-H/14": CLIP_H}, optional=ldm.IDS)  # fmt: skip
BARE_TEXT = Format("text_encoder", shapes.clip_text, configs.infer_clip, PLAIN_TEXT.known, ldm.BARE_TEXT.rows,
                   optional=ldm.IDS)  # fmt: skip
VAES = (ldm.AUTOENCODER, ldm.HALF_OLD_AUTOENCODER)
LATER = "recognised, but not converted: minit2v cannot use it yet"

LAYOUTS = (
    Layout("ModelScope's UNetSD", "authors", (("", (modelscope.UNETSD,)),), ("temopral_conv",)),
    Layout("OpenCLIP", "authors", (("", (modelscope.OPEN_CLIP,)),), ("transformer.resblocks.",),
           without=("cond_stage_model.",)),
    Layout("Stable Diffusion 1.x", "single-file", (
        ("model.diffusion_model.", (ldm.UNET,)),
        ("first_stage_model.", VAES),
        ("cond_stage_model.transformer.", (ldm.TEXT, ldm.BARE_TEXT)),
    ), ("model.diffusion_model.",), without=("cond_stage_model.model.",),
           ignored={**ldm.BUFFERS, **ldm.COUNTERS, **ldm.AVERAGE, **ldm.DREAMBOOTH}),
    Layout("Stable Diffusion 2.x, of which minit2v uses only the VAE (ModelScope's VQGAN_autoencoder.pth)", "authors",
           (("first_stage_model.", VAES),), ("first_stage_model.", "cond_stage_model.model."), ignored=ldm.UNUSED),
    Layout("VAE in a checkpoint (ModelScope's VQGAN_autoencoder.pth)", "authors",
           (("first_stage_model.", VAES),), ("first_stage_model.",), ignored=ldm.UNUSED),
    Layout("VAE of latent diffusion", "authors", (("", VAES),), ("decoder.",),
           without=("first_stage_model.",), ignored={**ldm.LOSS, "model_ema.{*}": "a moving average of the VAE"}),
    Layout("UNet of latent diffusion", "authors", (("", (ldm.UNET,)),), ("input_blocks.",),
           without=("model.", "temopral_conv")),
    Layout("AnimateDiff motion module", "authors", (("", (animatediff.MODULES,)),),
           ("temporal_transformer.",), without=("_lora.", "controlnet_")),
    Layout("AnimateDiff trainer's whole UNet", "trainer",
           (("", (animatediff.MODULES,)), ("", (PLAIN_UNET2D,))), ("temporal_transformer.", "resnets."),
           without=("controlnet_",)),
    Layout("AnimateDiff motion LoRA", "authors", (("", (animatediff.MOTION_LORA,)),),
           ("temporal_transformer.", "_lora.")),
    Layout("AnimateDiff motion LoRA", "diffusers", (("unet.", (animatediff.HUB_MOTION_LORA,)),),
           ("unet.", "motion_modules.", "_lora.")),
    Layout("AnimateDiff domain adapter", "authors", (("", (animatediff.DOMAIN_ADAPTER,)),),
           (".processor.to_q_lora.",), without=("motion_modules.",)),
    Layout("AnimateDiff domain adapter", "diffusers", (("unet.", (animatediff.DOMAIN_ADAPTER,)),),
           ("unet.", ".processor.to_q_lora."), without=("motion_modules.",)),
    Layout("motion LoRA", "peft", (("unet.", (animatediff.PEFT_MOTION_LORA,)),), ("lora_A.", "motion_modules.")),
    Layout("LoRA of Stable Diffusion 1.5", "peft",
           (("unet.", (animatediff.PEFT_DOMAIN_ADAPTER, adapters.PEFT_UNET)), ("text_encoder.", (adapters.PEFT_TEXT,))),
           ("lora_A.",), without=("motion_modules.",)),
    Layout("LoRA of Stable Diffusion 1.5", "kohya",
           (("lora_unet_", (adapters.KOHYA_UNET,)), ("lora_te_", (adapters.KOHYA_TEXT,))), ("lora_down.",)),
    Layout("SparseCtrl", "authors", (("", (animatediff.SPARSE_CONTROL,)),),
           ("controlnet_",), refused=LATER),
    Layout("SparseCtrl", "diffusers", (("", (animatediff.HUB_SPARSE_CONTROL,)),),
           ("controlnet_", "motion_modules."), without=("temporal_transformer.",), refused=LATER),
    Layout("IP-Adapter", "authors", (("", (adapters.IP,)),), ("ip_adapter.",),
           refused="recognised, but not converted: it has only one layout, which load_ip_adapter reads"),
    Layout("CLIP image encoder", "diffusers", (("", (adapters.IMAGE_ENCODER,)),), ("vision_model.",)),
    Layout("UNet3DConditionModel", "diffusers", (("", (PLAIN_UNET3D,)),), ("temp_convs.",)),
    Layout("UNet2DConditionModel", "diffusers", (("", (PLAIN_UNET2D,)),), ("resnets.", "time_emb_proj."),
           without=("motion_modules.",)),
    Layout("UNetMotionModel", "diffusers", (("", (MOTION_UNET,)),), ("resnets.", "motion_modules."),
           without=("temporal_transformer.", "controlnet_")),
    Layout("MotionAdapter", "diffusers", (("", (animatediff.ADAPTER,)),), ("motion_modules.",),
           without=("temporal_transformer.", "controlnet_", "lora")),
    Layout("AutoencoderKL", "diffusers", (("", (PLAIN_VAE, ldm.OLD_AUTOENCODER)),), ("decoder.",)),
    Layout("CLIPTextModel", "diffusers", (("", (PLAIN_TEXT, BARE_TEXT)),), ("encoder.layers.", "self_attn."),
           without=("vision_model.",)),
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------ matching


def detect(header: Header) -> Kind:
    """Detect the layout of the file with this header: {name: (shape, dtype)}.

    Raises ValueError if no layout fits. The message names the family if minit2v knows it but cannot run it.
    """
    if not header:
        raise ValueError("the file has no tensors")
    for name, (shape, dtype) in header.items():
        if dtype not in SIZES:
            raise ValueError(f"{name[:200]!r} has the unknown dtype {dtype!r}{nearest(str(dtype), list(SIZES))}")
        if any(not isinstance(n, int) or n < 0 for n in shape):
            raise ValueError(f"{name[:200]!r} has the impossible shape {list(shape)}")
    prefix = "module." if all(name.startswith("module.") for name in header) else ""
    plain = {name[len(prefix):]: (tuple(shape), dtype) for name, (shape, dtype) in header.items()}
    families.refuse(families.of_header(plain))
    text = "\n".join(plain)
    found = [_compare(layout, prefix, plain) for layout in LAYOUTS
             if not any(sign in text for sign in layout.without) and all(sign in text for sign in layout.signs)]
    found = [kind for kind in found if any(part.mapped for part in kind.parts)]
    if not found:
        first = next(iter(header))[:200]
        raise ValueError(f"no known layout has names like {first!r}; the file has {len(header)} tensors")
    return min(found, key=_rank)


def _rank(kind: Kind) -> tuple[int, ...]:
    mapped = sum(len(part.mapped) for part in kind.parts)
    return -mapped, len(kind.unknown) + len(kind.misshapen), len(kind.missing), len(kind.absent)


def _compare(layout: Layout, prefix: str, header: Header) -> Kind:
    parts, absent, ignored = [], [], {}
    left = dict.fromkeys(header)
    for begin, formats in layout.parts:
        names = {name[len(begin):]: header[name] for name in left if name.startswith(begin)}
        part = min((fit(fmt, prefix + begin, names) for fmt in formats), key=_misfit)
        if not part.mapped:
            absent.append(part.format.component)
            continue
        parts.append(part)
        for name in part.mapped | part.misshapen.keys():
            del left[name.removeprefix(prefix)]
        for name in list(names):
            why = part.declined.get(name) or part.format.why_ignored(name, part.config)
            if begin + name in left and why:
                ignored[prefix + begin + name] = why
                del left[begin + name]
    ignored |= {prefix + name: why for name in left if (why := reason(layout.ignored, name, {}))}
    unknown = tuple(prefix + name for name in left if prefix + name not in ignored)
    if layout.layout in ("kohya", "peft"):
        absent = []  # an adapter may be for a single network
    parameters = sum(math.prod(shape) for shape, dtype in header.values() if dtype[0] in "FB" and dtype != "BOOL")
    size = sum(math.prod(shape) * SIZES[dtype] for shape, dtype in header.values())
    dtypes = Counter(dtype for _, dtype in header.values())
    return Kind(layout, prefix, tuple(parts), tuple(absent), ignored, unknown, dict(dtypes.most_common()), parameters,
                size, _positions(parts))  # fmt: skip


def _misfit(part: Part) -> tuple[int, ...]:
    return -len(part.mapped), len(part.misshapen), len(part.missing)


def fit(fmt: Format, prefix: str, names: Header) -> Part:
    """The part with the config that explains most of these names.

    If no config explains all of them, a published network that explains as many is preferred, with tensors missing.
    """
    get = fmt.reader(lambda name: tuple(names[name][0]) if name in names else None, names)
    base = next(iter(fmt.known.values()))
    try:
        best = fit_config(fmt, prefix, names, fmt.infer(base, get))
    except (IndexError, ValueError):  # too few tensors, or impossible shapes
        best = None
    if best is None or best.missing or best.misshapen or len(best.mapped) < len(names):
        known = [fit_config(fmt, prefix, names, config) for config in fmt.known.values()]
        best = min([*known, *([best] if best else [])],
                   key=lambda part: (-len(part.mapped), len(part.misshapen), part is best, len(part.missing)))
    return best


def fit_config(fmt: Format, prefix: str, names: Header, config: Config) -> Part:
    table = fmt.table(config)
    version = next((v for v, known in fmt.known.items() if known is config or fmt.shapes(known) == table.shapes), "")
    if version:
        config = fmt.known[version]
    computed = bool(table.computed) and not any(
        name in names for e in table.entries if e.diffusers[0] in table.computed for name in e.authors)  # fmt: skip
    may_lack = table.optional.keys() | (table.computed if computed else ())
    mapped, missing, misshapen, declined = set(), [], {}, {}
    for entry in table.entries:
        want = entry.authors_shape(table.shapes)
        only = table.optional.get(entry.diffusers[0])
        for name in entry.authors:
            if name not in names:
                if entry.diffusers[0] not in may_lack:
                    missing.append(prefix + name)
                continue
            shape, dtype = names[name]
            if only and dtype != only:
                declined[name] = f"only useful in {only}, because other dtypes round it"
            elif tuple(shape) == want or entry.ones and tuple(shape) == want[: -entry.ones]:
                mapped.add(prefix + name)
            else:
                misshapen[prefix + name] = f"{list(shape)}, not {list(want)}"
    return Part(fmt, prefix, config, version, frozenset(mapped), tuple(missing), misshapen, declined, computed)


def _positions(parts: Sequence[Part]) -> int | None:
    for part in parts:
        c: Any = part.config
        rows = c.get("motion_max_seq_length", c.get("max_position_embeddings"))
        if rows and "rank" not in c and not part.computed:
            return rows
    return None
