"""Recognises LoRA files by the names and shapes in them. A tensor that belongs to no layer is an error.

A LoRA (Hu et al. 2021, arXiv:2106.09685) changes the weight W (o i *k) of a layer, where k is the kernel's size:

    W + w * alpha / r * up @ down        down (r i *k), up (o r), of rank r; w the user's weight

Trainers write different names. `read` recognises them, and looks up every name among the layers of the loaded
networks. So it never has to guess which underscores of a name were dots.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minit2v_convert import animatediff, families, ldm, modelscope, shapes
from minit2v_convert.configs import CLIP_H, CLIP_L, UNET3D, UNET_MOTION
from minit2v_convert.detect import detect
from minit2v_convert.rename import nearest
from minit2v_convert.table import Numbers, Rows, authors_names

Header = Mapping[str, tuple[Sequence[int], str]]  # name -> (shape, dtype as safetensors names it)
Shapes = Mapping[str, tuple[int, ...]]  # layer, in diffusers' or transformers' name -> shape of its weight there

KOHYA, PEFT, LORALIB = "kohya", "peft", "Text-To-Video-Finetuning (loralib)"
OLD, PROCESSORS = "diffusers 0.18 to 0.2x", "diffusers before 0.18 (processors)"
ROLES = {"down": "down", "up": "up", "mid": "mid", "A": "down", "B": "up"}
# The end of a name tells the role of the tensor and the form of the file. The first pattern that fits counts.
ENDINGS = (
    (r"\.lora_(?P<role>down|up|mid)\.weight$", KOHYA),
    (r"\.lora_(?P<role>A|B)(\.(?P<segment>[^.]+))?\.weight$", PEFT),
    (r"\.lora_(?P<role>A|B)$", LORALIB),
    (r"\.lora(_linear_layer)?\.(?P<role>down|up)\.weight$", OLD),
    (r"_lora\.(?P<role>down|up)\.weight$", PROCESSORS),
    (r"\.alpha$", ""),
)
SEGMENT = ENDINGS[1][0]  # the name of an adapter in peft's networks
# Names of tensors in files of other methods.
OTHERS = (
    (r"\.hada_", "a LoHa (LyCORIS): products of two low-rank products"),
    (r"\.lokr_", "a LoKr (LyCORIS): Kronecker products"),
    (r"\.dora_scale|\.lora_magnitude_vector", "a DoRA, which also rescales the columns of the weights"),
    (r"\.boft_|\.oft_|\boft_blocks\b", "an OFT or BOFT: rotations of the weights"),
    (r"\.[ab][12]\.weight$", "a GLoRA"),
    (r"\.diff(_b)?$", "a LyCORIS of whole differences (full), or with biases"),
    (r"\.[wb]_norm$", "a LyCORIS with norms"),
    (r"\.on_input$|\.ia3_", "an (IA)3"),
    (r"\.vera_", "a VeRA"),
    (r"\.lora_B(\.[^.]+)?\.bias$", "a LoRA with biases (lora_bias)"),
)  # fmt: skip
# Names in LoRAs of networks that minit2v does not have.
STRANGERS = (
    (r"^lora_te[12]_|^text_encoder_2\.", families.SDXL),
    (r"^lora_te3_|^text_encoder_3\.", families.SD3),
    (r"(?<!motion_modules)[._]\d+[._]transformer_blocks[._][1-9]", families.SDXL),
    (r"^transformer\.|^lora_transformer_|single_transformer_blocks|double_blocks|single_blocks|joint_blocks",
     "a diffusion transformer (Stable Diffusion 3, Flux, ...)"),
    (r"^(diffusion_model\.|lora_unet_)?blocks[._]\d+[._](self_attn|cross_attn|ffn)", "Wan"),
)  # fmt: skip
WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x or ModelScope", 2048: families.SDXL}  # of texts
PREFIXES = {"lora_unet_": "unet", "unet.": "unet", "lora_te_": "text_encoder", "text_encoder.": "text_encoder"}
PEFT_PREFIX = "base_model.model."
EMBEDDING = "token_embedding"
TO_TEXT = "attn2.to_k"  # in spatial transformers its input is the text, in temporal ones the frames
SHOWN = 4  # the most tensors that a message lists


class Refused(ValueError):
    """The file is not a LoRA for these networks. It cannot be loaded with strict=False either."""


# ------------------------------------------------------------------------------------------------------------- networks


class Target(NamedTuple):
    """A network that a file may change: its layers, and all names that files use for them."""

    component: str
    title: str
    shapes: Shapes
    spellings: Mapping[str, str]  # a name in files, after what it begins with -> layer


def target(component: str, title: str, sizes: Shapes, attention: Sequence[bool] = (), layers: Any = None) -> Target:
    """The target with all spellings of its layers: diffusers' names with dots or underscores, and the authors' names.

    attention, layers: only for a UNet. For each level, whether its blocks have transformers; and the number of blocks
    per level of the encoder.
    """
    return Target(component, title, sizes, _spellings(tuple(sizes), tuple(attention), layers))


@lru_cache(maxsize=8)
def _spellings(names: tuple[str, ...], attention: tuple[bool, ...], layers: Any) -> Mapping[str, str]:
    found: dict[str, str] = {}
    tables = _tables(names, attention, layers)
    for layer in names:
        for name in (layer, *_authors(layer, tables)):
            found.setdefault(name, layer)
            found.setdefault(name.replace(".", "_"), layer)
        if not attention:
            found.setdefault(layer.removeprefix("text_model."), layer)
    return found


def _tables(names: Sequence[str], attention: Sequence[bool], layers: Any) -> list[tuple[Rows, Numbers]]:
    """The tables with the authors' names for this UNet. The authors number the blocks of all levels together."""
    if not attention:
        return []
    tables: list[tuple[Rows, Numbers]] = [(animatediff.MOTION_ROWS, {})]
    if isinstance(layers, int):
        config = {"layers_per_block": layers, "up_block_types": ["CrossAttn" * a for a in reversed(attention)]}
        if any(".temp_convs." in name for name in names):
            tables.append((modelscope.UNETSD_ROWS, modelscope.unetsd_numbers(config)))
        else:
            tables.append((ldm.UNET_ROWS, ldm.unet_numbers(config)))
    return tables


def _authors(layer: str, tables: list[tuple[Rows, Numbers]]) -> Iterable[str]:
    for rows, numbers in tables:
        if hit := authors_names(rows, f"{layer}.weight", numbers):
            yield from (name.removesuffix(".weight") for name in hit[0])


# ---------------------------------------------------------------------------------------------------------------- files


@dataclass(eq=False, repr=False)
class Layer:
    """The tensors of one layer, by role: `down`, `up`, `mid`, `alpha` -> name in the file."""

    form: str
    names: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False, repr=False)
class Reading:
    """The content of a file. layers: component -> diffusers' name of a layer -> its tensors.

    homeless: tensor -> (why it belongs to no layer, a function that gives similar names). Every tensor is either in
    `layers` or here.
    """

    layers: dict[str, dict[str, Layer]]
    homeless: dict[str, tuple[str, Callable[[], str]]]

    @property
    def forms(self) -> list[str]:
        return list(dict.fromkeys(layer.form for layers in self.layers.values() for layer in layers.values()))

    def complaint(self) -> str:
        """One line about the tensors that belong to no layer, or "" if there are none."""
        if not self.homeless:
            return ""
        count, by_layer = len(self.homeless), {ending(name)[0]: name for name in reversed(self.homeless)}
        names = [*reversed(by_layer.values())]  # one tensor for each layer
        shown = []
        for name in names[:SHOWN]:
            why, near = self.homeless[name]
            shown.append(f"{name[:160]!r} {why}{near()}")
        more = f"; and those of {len(names) - SHOWN} more layers" if len(names) > SHOWN else ""
        fit = "tensors of the LoRA fit" if count > 1 else "tensor of the LoRA fits"
        return f"{count} {fit} no layer: {'; '.join(shown)}{more}"


def is_lora(names: Iterable[str]) -> bool:
    """Whether there are names of a LoRA, or of a similar method."""
    return any(ending(name)[1] in ("down", "up") or _other(name) for name in names)


def ending(name: str) -> tuple[str, str, str]:
    """(the beginning of a tensor's name, its role, the form of the file). The role is "" if it is not of a LoRA."""
    for pattern, form in ENDINGS:
        if m := re.search(pattern, name):
            role = m.groupdict().get("role")
            return name[: m.start()], ROLES[role] if role else "alpha", form
    return name, "", ""


def _other(name: str) -> str:
    return next((what for sign, what in OTHERS if re.search(sign, name)), "")


def read(header: Header, targets: Sequence[Target]) -> Reading:
    """Find the layer of each tensor in a file. Raises Refused if it is not a LoRA for these networks."""
    for name in header:
        if what := _other(name):
            raise Refused(f"it is {what}, which minit2v cannot read ({name[:200]!r})")
    roles = {name: ending(name) for name in header}
    if not any(role in ("down", "up") for _, role, _ in roles.values()):
        raise Refused(f"it is not a LoRA: {_what(header)}")
    _refuse_strangers(header, roles, targets)

    layers: dict[str, dict[str, Layer]] = {t.component: {} for t in targets}
    homeless: dict[str, tuple[str, Callable[[], str]]] = {}
    segments = {m["segment"] for n in header if (m := re.search(SEGMENT, n)) and m["segment"]}
    if len(segments) > 1:
        raise Refused(f"it holds several adapters: {', '.join(sorted(segments))[:200]}")
    for name, (stem, role, form) in roles.items():
        where = _place(stem, form, targets) if role else None
        if where is None:
            homeless[name] = _stray(stem if role else name, form, targets)
            continue
        component, module = where
        layer = layers[component].setdefault(module, Layer(form))
        if form and layer.form and form != layer.form:
            raise Refused(f"the file has {module!r} in two forms, {layer.form} and {form}")
        layer.form = layer.form or form
        if role in layer.names:
            raise Refused(f"{layer.names[role]!r} and {name!r} are both for {module!r}")
        layer.names[role] = name
    for t in targets:
        forms = {layer.form for layer in layers[t.component].values() if layer.form}
        if len(forms) > 1:
            raise Refused(f"its names have two forms, {' and '.join(sorted(forms))}")
        for module, layer in list(layers[t.component].items()):
            why = _unfit(layer, header, t.shapes[module], module.endswith(EMBEDDING))
            if why:
                homeless |= dict.fromkeys(layer.names.values(), (why, str))
                del layers[t.component][module]
    return Reading({c: found for c, found in layers.items() if found}, homeless)


def _what(header: Header) -> str:
    if not header:
        return "it has no tensors"
    try:
        return f"it is {detect(header).layout.title}"
    except ValueError as error:
        return str(error)


def _refuse_strangers(
    header: Header, roles: Mapping[str, tuple[str, str, str]], targets: Sequence[Target]
) -> None:
    """Raises Refused if the file is for a network that minit2v does not have, or for others than these."""
    for name in header:
        for sign, family in STRANGERS:
            if re.search(sign, name):
                raise Refused(f"it is a LoRA of {family}, which minit2v cannot run ({name[:200]!r})")
    unet = next((t for t in targets if t.component == "unet"), None)
    if any("motion_modules" in n for n in header) and not any("motion_modules" in n for t in targets for n in t.shapes):
        where = f"{unet.title} has no motion modules" if unet else "the pipeline has no UNet"
        raise Refused(f"it is a motion LoRA for AnimateDiff, but {where}")
    widths = {shape[1] for name, shape in (unet.shapes.items() if unet else ()) if name.endswith(TO_TEXT)}
    for name, (shape, _) in header.items():
        stem, role, _ = roles[name]
        if unet is None or role != "down" or not re.search(r"attn2[._](processor\.)?to_[kv]$", stem):
            continue
        if len(shape) > 1 and shape[1] in WIDTHS.keys() - widths:
            raise Refused(f"it is a LoRA for {WIDTHS[shape[1]]}, with text embeddings of width {shape[1]}, which does "
                          f"not fit this {unet.title} ({name[:200]!r})")  # fmt: skip


def _split(stem: str, targets: Sequence[Target]) -> tuple[list[Target], str]:
    """The networks that the prefix of a name allows, and the name without its prefix."""
    stem = stem.removeprefix(PEFT_PREFIX)
    for prefix, component in PREFIXES.items():
        if stem.startswith(prefix):
            return [t for t in targets if t.component == component], stem[len(prefix):]
    return [*targets], stem


def _spelled(rest: str, form: str, component: str) -> str:
    """A layer's name without the old attention processors, which were part of it: `attn1.processor.to_q_lora`."""
    if form != PROCESSORS:
        return rest
    rest = rest.replace(".processor.", ".")
    if component == "text_encoder":
        return re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", rest)
    return rest + ".0" if rest.endswith(".to_out") else rest


def _place(stem: str, form: str, targets: Sequence[Target]) -> tuple[str, str] | None:
    found, rest = _split(stem, targets)
    for t in found:
        module = t.spellings.get(_spelled(rest, form, t.component))
        if module is not None:
            return t.component, module
    return None


def _stray(stem: str, form: str, targets: Sequence[Target]) -> tuple[str, Callable[[], str]]:
    found, rest = _split(stem, targets)
    if not found:  # the pipeline may lack a network
        begins = (c for p, c in PREFIXES.items() if stem.removeprefix(PEFT_PREFIX).startswith(p))
        component = next(begins, "network")
        return f"is for a {component}, which the pipeline does not have", str

    def near() -> str:  # slow, so it is called only for tensors in a message
        names = [(_spelled(rest, form, t.component), n) for t in found for n in t.spellings]
        words = {*re.split(r"[._]", rest)}
        alike = sorted(((len(words & {*re.split(r"[._]", n)}), n) for _, n in names
                        if ("." in n) == ("." in rest)), reverse=True)  # fmt: skip
        return nearest(names[0][0], [n for _, n in alike[:30]]) if names else ""

    return f"is not a layer of {' or '.join(t.title for t in found)}", near


def _unfit(layer: Layer, header: Header, weight: Sequence[int], embedding: bool) -> str:
    """The error of a layer's tensors, or "" if they fit its weight of this shape."""
    if embedding and layer.form != LORALIB:
        return f"is for the token table, which only files of {LORALIB} can change"
    for role in ("down", "up"):
        if role not in layer.names:
            return f"has no {role} factor beside it"
    shape = {role: list(header[name][0]) for role, name in layer.names.items()}
    for role, name in layer.names.items():
        if not re.fullmatch(r"B?F\d+(_\w+)?", header[name][1]):
            return f"is an integer ({header[name][1]})" if role == "alpha" else f"has a {role} factor of integers"
    if "alpha" in shape and math.prod(shape["alpha"]) != 1:
        return f"has an alpha of shape {shape['alpha']}, not one number"
    (o, i), kernel = weight[:2], [*weight[2:]]
    kernel = kernel if math.prod(kernel) > 1 else []
    if layer.form == LORALIB:
        k = max(kernel, default=1)
        o, i = (i, o) if embedding else (o, i)
        r = shape["down"][0] // k if shape["down"] else 0
        want = {"down": [r * k, i * k], "up": [o * k, r * k]}
        wrong = [role for role in want if shape[role] != want[role]]
    else:
        r = shape["down"][0] if shape["down"] else 0
        ones = [1] * len(kernel)
        want = {"down": [r, i, *(ones if "mid" in shape else kernel)], "up": [o, r, *ones]}
        if "mid" in shape:
            s = shape["up"][1] if len(shape["up"]) > 1 else 0
            want |= {"mid": [s, r, *kernel], "up": [o, s, *ones]}
            if not kernel:
                return "has a mid factor, which only convolutions can have"
        wrong = [role for role in want if _plain(shape[role]) != _plain(want[role])]
    if not r:
        return "has rank 0"
    if wrong:
        role = wrong[0]
        return f"has a {role} factor of shape {shape[role]}, not {want[role]}, as its layer {list(weight)} needs"
    return ""


def _plain(shape: Sequence[int]) -> list[int]:
    """The shape without trailing axes of size 1. A 1x1 convolution has them, but some files leave them out."""
    found = [*shape]
    while len(found) > 2 and found[-1] == 1:
        found.pop()
    return found


# ------------------------------------------------------------------------------------------------------------- inspect


def published() -> dict[str, list[Target]]:
    """{title: networks} of the published models for which there are LoRAs."""

    def layers(shapes_: shapes.Shapes) -> Shapes:
        known = {n.removesuffix(".weight"): tuple(s) for n, s in shapes_.items() if n.endswith(".weight")}
        return {n: s for n, s in known.items() if len(s) > 1 and not n.endswith("position_embedding")}

    found = {}
    for title, cls, unet, text in (
        ("Stable Diffusion 1.5 and AnimateDiff", "UNetMotionModel", UNET_MOTION, CLIP_L),
        ("ModelScope or Zeroscope", "UNet3DConditionModel", UNET3D, CLIP_H),
    ):
        attention = [kind.startswith("CrossAttn") for kind in unet["down_block_types"]]
        of_unet = layers(shapes.unet3d(unet) if cls == "UNet3DConditionModel" else shapes.unet_motion(unet))
        found[title] = [target("unet", cls, of_unet, attention, unet["layers_per_block"]),
                        target("text_encoder", "CLIPTextModel", layers(shapes.clip_text(text)))]
    return found


def describe(
    header: Header, tensor: Callable[[str], Tensor], configs: Mapping[str, "Config"], models: Mapping[str, list[Target]]
) -> tuple[list[str], bool]:
    """Lines that describe a LoRA file, and whether all of it fits one of the models. Raises Refused."""
    readings, refusals = {}, []
    for title, targets in models.items():
        try:
            readings[title] = read(header, targets)
        except Refused as error:
            refusals.append(error)
    if not readings:
        raise refusals[0]
    title = min(readings, key=lambda t: len(readings[t].homeless))
    reading = readings[title]
    forms = " and ".join(reading.forms) or "known names"
    whose = title if reading.layers else "networks of another size, or for unknown networks"
    lines = [f"LoRA for {whose}, in the form of {forms}"]
    for component, layers in reading.layers.items():
        ranks: Counter[int] = Counter()
        scales: Counter[float] = Counter()
        for module, layer in layers.items():
            rank = header[layer.names["down"]][0][0]
            alpha = float(tensor(layer.names["alpha"])) if "alpha" in layer.names else (
                configs.get(component, Config()).alpha_of(module, rank))  # fmt: skip
            ranks[rank] += 1
            scales[round(alpha / rank, 6)] += 1
        lines.append(f"{component}: {len(layers)} layers of rank {', '.join(map(str, sorted(ranks)))}, scale (alpha / "
                     f"rank) {', '.join(f'{x:g}' for x in sorted(scales))}{_where(layers)}")  # fmt: skip
    dtypes = Counter(dtype for _, dtype in header.values())
    count = sum(math.prod(shape) for shape, _ in header.values())
    lines.append(f"{len(header)} tensors, {count:,} numbers, "
                 + ", ".join(f"{n} {dtype}" for dtype, n in dtypes.most_common()))  # fmt: skip
    if complaint := reading.complaint():
        lines.append(f"wrong: {complaint}")
    return lines, not reading.homeless


def _where(layers: Mapping[str, Layer]) -> str:
    motion = sum(".motion_modules." in name for name in layers)
    return "" if not motion else ", all in motion modules" if motion == len(layers) else f", {motion} in motion modules"


# ---------------------------------------------------------------------------------------------------------------- scale


class Config(NamedTuple):
    """The fields about alpha in peft's LoraConfig, from adapter_config.json or from the metadata of diffusers."""

    alpha: float | None = None
    patterns: Mapping[str, float] = {}
    rank_stabilised: bool = False

    def alpha_of(self, module: str, r: int) -> float:
        """The alpha of a layer, so that alpha / r is its scale. The default is r, which is a scale of 1."""
        alpha = self.alpha
        for pattern, value in self.patterns.items():
            if module == pattern or module.endswith(f".{pattern}"):
                alpha = value
                break
        if alpha is None:
            return float(r)
        return alpha * math.sqrt(r) if self.rank_stabilised else alpha


def config_of(said: Mapping[str, Any], where: str) -> Config:
    """The fields about alpha. Raises Refused if the config is not for a plain LoRA, or if a value is not a number."""
    for flag, what in (("use_dora", "a DoRA"), ("lora_bias", "a LoRA with biases"), ("fan_in_fan_out", "transposed")):
        if said.get(flag):
            raise Refused(f"{where}: {flag} is set: it is {what}, which minit2v cannot read")
    kind = said.get("peft_type")
    if kind not in (None, "LORA"):
        raise Refused(f"{where}: peft_type is {str(kind)[:50]!r}, and minit2v can read only LORA")
    alpha = said.get("lora_alpha")
    patterns = said.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise Refused(f"{where}: alpha_pattern must be an object {{name: number}}")
    numbers = {}
    for name, value in patterns.items():
        plain = str(name).removeprefix("^").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", plain):
            raise Refused(f"{where}: alpha_pattern has {str(name)[:100]!r}, which is not the name of a layer")
        numbers[plain] = _number(value, f"{where}: alpha of {plain[:100]}")
    return Config(None if alpha is None else _number(alpha, f"{where}: lora_alpha"), numbers,
                  bool(said.get("use_rslora")))  # fmt: skip


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Refused(f"{what} must be a number, not {str(value)[:50]!r}")
    return float(value)


METADATA = "lora_adapter_metadata"  # the key in a safetensors file's metadata, since diffusers 0.35


def configs_of(metadata: Mapping[str, str]) -> dict[str, Config]:
    """{component: config} from a file's metadata, which is JSON such as {"unet.lora_alpha": 6, ...}."""
    if METADATA not in metadata:
        return {}
    try:
        said = json.loads(metadata[METADATA])
    except (ValueError, RecursionError, TypeError):
        said = None
    if not isinstance(said, dict):
        raise Refused(f"its {METADATA} is not a JSON object")
    parts: dict[str, dict[str, Any]] = {}
    for name, value in said.items():
        component, _, rest = name.partition(".")
        if component in ("unet", "text_encoder"):
            parts.setdefault(component, {})[rest] = value
    return {component: config_of(part, METADATA) for component, part in parts.items()}


# -------------------------------------------------------------------------------------------------------------- numbers


@dataclass(eq=False, repr=False)
class Factors:
    """One layer's change: alpha / r * up @ down. down (r i *k), up (o r), on the CPU, in the file's dtype."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self, like: Tensor) -> Tensor:
        """alpha / r * up @ down in the dtype and on the device of `like`, (o i *k)."""
        up, down = (x.to(like.device, like.dtype) for x in (self.up, self.down))
        return ((up @ down.flatten(1)) * self.scale).unflatten(1, down.shape[1:])


def factors(
    layer: Layer, weight: Sequence[int], tensor: Callable[[str], Tensor], config: Config, module: str
) -> Factors:
    """The factors of a layer in their usual form. weight: its shape. Raises Refused on NaN or infinity."""
    given = {role: tensor(name).detach() for role, name in layer.names.items()}
    for role, x in given.items():
        if not bool(x.float().isfinite().all()):
            raise Refused(f"{layer.names[role]!r} holds NaN or infinity")
    down, up, kernel = given["down"], given["up"], [*weight[2:]]
    if math.prod(kernel) == 1:
        down, up = (x.flatten(1) if layer.form != LORALIB else x for x in (down, up))
        r = down.shape[0]
    elif layer.form == LORALIB:
        r = down.shape[0] // max(kernel)
        down, up = _of_loralib(down, up, kernel)
    else:
        r, up = down.shape[0], up.flatten(1)
        if "mid" in given:  # Tucker decomposition: the kernel is in the middle factor
            down, up, mid = (_wide(x) for x in (down.flatten(1), up, given["mid"]))
            down = (mid.movedim(1, -1) @ down).movedim(-1, 1).contiguous()
    if "alpha" in given:
        alpha = float(given["alpha"])
    else:
        alpha = config.alpha_of(module, r)
    return Factors(down, up, alpha * down.shape[0] / r if down.shape[0] != r else alpha)


def _of_loralib(down: Tensor, up: Tensor, kernel: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Convert loralib's factors of a convolution, (B @ A).view(o, i, k, k), into down (r i *k) and up (o r).

    A is (rk ik) and B is (ok rk). The product has k rows for each output. Row n of them holds the n-th part of the
    output's i * k * k numbers. So each of the k parts gets factors of its own, and the rank becomes k times as large.
    For a kernel (k 1 1), the mean over the second k is taken.
    """
    k = max(kernel)
    rank, width = down.shape
    parts = down.new_zeros(k, rank, k, width)
    for n in range(k):
        parts[n, :, n] = down
    i = width // k
    whole = parts.reshape(k * rank, i, k, k)
    up = up.unflatten(0, (-1, k)).flatten(1)  # (o k) rk -> o (k rk)
    if len(kernel) == 3:
        whole, up = _wide(whole).unsqueeze(-1).mean(-2, keepdim=True), _wide(up)
    return whole.contiguous(), up.contiguous()


def _wide(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it has that dtype already."""
    return x if x.dtype == torch.float64 else x.float()
