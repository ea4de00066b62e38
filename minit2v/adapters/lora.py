"""LoRA (Hu et al. 2021, arXiv:2106.09685): loads, activates, fuses and saves the LoRAs of each network.

The factors of a loaded LoRA stay on the CPU, in the file's dtype. Active LoRAs run as branches beside the layers
(`low_rank`), or are fused into the weights; then the original weights are kept. Everything that can fail is done
before a state changes.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minit2v_convert.rename import nearest
from minit2v_convert.stream import NAMES, open_file, parse_json, replacing

from ..files import hub
from . import formats
from .formats import METADATA, Config, Factors, Refused, Target
from .low_rank import Branch, branches_of, can_branch, set_branches

logger = logging.getLogger(__name__)

COMPONENTS = ("unet", "text_encoder")
WEIGHTS, CONFIG = "pytorch_lora_weights", "adapter_config.json"
SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
Networks = Mapping[str, Any]  # component -> network


@dataclass(eq=False, repr=False)
class LoRAs:
    """The LoRAs of one network.

    loaded: name -> layer -> factors. weights: name -> layer -> weight. active: names, in the order of `set_adapters`.
    merged: names of fused LoRAs. originals: layer -> its weight before fusing. call_scale: a factor for the call that
    is running.
    """

    loaded: dict[str, dict[str, Factors]] = field(default_factory=dict)
    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    enabled: bool = True
    merged: list[str] = field(default_factory=list)
    originals: dict[str, Tensor] = field(default_factory=dict)
    call_scale: float = 1.0

    def copy(self) -> "LoRAs":
        return replace(self, loaded=dict(self.loaded), weights=dict(self.weights), active=[*self.active],
                       merged=[*self.merged], originals=dict(self.originals))

    def beside(self) -> list[str]:
        """The names of the LoRAs that run as branches."""
        return [n for n in self.active if n not in self.merged] if self.enabled else []


def loras_of(network: nn.Module) -> LoRAs:
    return vars(network).get("loras") or LoRAs()


# ------------------------------------------------------------------------------------------------------------- networks


def layers_of(network: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{diffusers' name of a layer: (minit2v's name, shape of its weight in diffusers' files)}."""
    weights = {f"{name}.weight": m.weight.detach() for name, m in network.named_modules()
               if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d) or name == "tokens"}  # fmt: skip
    own = network.layout.own(weights)
    known = [name for name in weights if name not in own]
    theirs = network.layout.to_diffusers({name: weights[name] for name in known})
    pairs = [*zip(known, theirs.items(), strict=True), *((name, (name, weights[name])) for name in own)]
    return {their.removesuffix(".weight"): (ours.removesuffix(".weight"), tuple(x.shape)) for ours, (their, x) in pairs}


def target_of(component: str, network: Any, known: Mapping[str, tuple[str, tuple[int, ...]]] | None = None) -> Target:
    """The target of a network. known: its `layers_of`, if they were computed before."""
    shapes = {name: shape for name, (_, shape) in (known or layers_of(network)).items()}
    layers = getattr(network.config, "layers_per_block", None)
    layers = layers[0] if isinstance(layers, tuple) and len({*layers}) == 1 else layers
    return formats.target(component, type(network).__name__, shapes, getattr(network.config, "attention", ()), layers)


Plan = list[tuple[nn.Module, list[tuple[Branch, Factors, float]]]]


@torch.inference_mode(False)
@torch.no_grad()
def plan(network: nn.Module, state: LoRAs) -> Plan:
    """The branches of each layer in the new state, also for layers that lose theirs. Nothing changes yet."""
    names = state.beside()
    now = {path: m for path, m in network.named_modules() if branches_of(m)}
    wanted = dict.fromkeys([*now, *(path for name in names for path in state.loaded[name])])
    found: Plan = []
    for path in wanted:
        layer = now.get(path) or network.get_submodule(path)
        there = {b.name: b for b in branches_of(layer)}
        branches = []
        for name in names:
            if (factors := state.loaded[name].get(path)) is None:
                continue
            branch = there.get(name)
            if branch is None or branch.source is not factors:
                _check_fits(factors, layer)
            if branch is None or (branch.down.numel(), branch.up.shape) != (factors.down.numel(), factors.up.shape):
                branch = Branch(name, factors, *_shaped(factors, layer))
            branches.append((branch, factors, factors.scale * state.weights[name][path] * state.call_scale))
        found.append((layer, branches))
    return found


def _shaped(factors: Factors, layer: Any) -> tuple[Tensor, Tensor]:
    """Copies of down and up in the layer's shapes, dtype and device."""
    weight = layer.weight
    down, up = (x.to(weight.device, weight.dtype, copy=True) for x in (factors.down, factors.up))
    return down if isinstance(layer, nn.Embedding) else down.reshape(len(down), *weight.shape[1:]), up


def _check_fits(factors: Factors, layer: Any) -> None:
    dtype = layer.weight.dtype
    if dtype == torch.float16 and not all(bool(x.to(dtype).isfinite().all()) for x in (factors.down, factors.up)):
        raise ValueError(f"the LoRA has numbers too large for {dtype}: use bfloat16 or float32")


@torch.inference_mode(False)
@torch.no_grad()
def carry_out(found: Plan) -> None:
    for layer, branches in found:
        for branch, factors, scale in branches:
            if branch.source is not factors:  # new factors of the same shapes: keep the memory that CUDA graphs read
                branch.down.copy_(factors.down.reshape(branch.down.shape))
                branch.up.copy_(factors.up)
                branch.source = factors
            branch.scale.fill_(scale)
        set_branches(layer, [branch for branch, *_ in branches])


def change(networks: Networks, states: Mapping[str, LoRAs]) -> None:
    """Bring every network into its new state. If that fails for one network, no network changes."""
    plans = {component: plan(networks[component], state) for component, state in states.items()}
    for component, state in states.items():
        carry_out(plans[component])
        keep(networks[component], state)


def keep(network: Any, state: LoRAs) -> None:
    """Write the state into the existing object, because networks with the same layers may share it."""
    network.loras = loras_of(network)
    vars(network.loras).update(vars(state))


@contextmanager
def scaled(network: Any, scale: float) -> Iterator[None]:
    """Multiply the weights of all branches by `scale`, inside a `with` block."""
    if scale == 1 or not loras_of(network).loaded:
        yield
        return
    network.loras.call_scale = scale
    try:
        carry_out(plan(network, network.loras))
        yield
    finally:
        network.loras.call_scale = 1.0
        carry_out(plan(network, network.loras))


def carry_over(source: Any, network: Any) -> None:
    """Give a copy of a network, whose layers have the same names, the same LoRAs."""
    state = loras_of(source).copy()
    if state.loaded or state.originals:
        state.originals = {path: x.clone() for path, x in state.originals.items()}  # unfusing makes them weights
        change({"": network}, {"": state})


# ---------------------------------------------------------------------------------------------------------------- files


class File(NamedTuple):
    """A LoRA file, or a dictionary of tensors."""

    label: str
    header: formats.Header
    read: Callable[[str], Tensor]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None  # adapter_config.json beside it

    def configs(self) -> dict[str, Config]:
        if self.config is not None:
            return dict.fromkeys(COMPONENTS, formats.config_of(self.config, CONFIG))
        return formats.configs_of(self.metadata)


def open_dict(tensors: Mapping[Any, Any]) -> File:
    for name, x in tensors.items():
        if not isinstance(name, str) or not isinstance(x, Tensor):
            raise ValueError(f"a LoRA must be a dictionary {{name: tensor}}, but {str(name)[:100]!r} is a "
                             f"{type(x).__name__}")
        if x.dtype not in NAMES or x.layout is not torch.strided or x.is_meta:
            raise ValueError(f"{name[:100]!r} must be a dense tensor of a usual dtype with values, not {x.dtype}, "
                             f"{x.layout}, on {x.device}")
    header = {name: (tuple(x.shape), NAMES[x.dtype]) for name, x in tensors.items()}
    return File("the dictionary", header, lambda name: tensors[name].detach().cpu().clone(), {}, None)


def open_lora(
    path: str | Path, weight_name: str | None = None, subfolder: str | None = None,
    use_safetensors: bool | None = None, **where: Any,
) -> File:  # fmt: skip
    """Open a LoRA file. path: the file, or a folder or hub id.

    There the file is `weight_name`, else the one with the usual name, else the only one. Raises FileNotFoundError, or
    ValueError if the file cannot be read.
    """
    file = file_of(path, weight_name, subfolder, use_safetensors, **where)
    return _opened(file, str(path) if Path(path).name == file.name else f"{path}/{file.name}", file.parent / CONFIG)


def file_of(
    path: str | Path, weight_name: str | None = None, subfolder: str | None = None,
    use_safetensors: bool | None = None, **where: Any,
) -> Path:  # fmt: skip
    """The path of the file that `open_lora` opens. Raises FileNotFoundError."""
    here = Path(hub.local(path, **where)).expanduser()
    if here.is_file():
        if weight_name is not None or subfolder is not None:
            raise ValueError(f"{path} is a file: weight_name and subfolder are only for folders and hub ids")
        return here
    if Path(path).suffix in SUFFIXES and not here.is_dir():
        raise FileNotFoundError(f"there is no file {path}")
    if weight_name is not None and "/" in weight_name:
        folder, weight_name = weight_name.rsplit("/", 1)
        subfolder = f"{subfolder}/{folder}" if subfolder else folder
    root, names = hub.find_folder(str(hub.local(path, **where)), subfolder, _choose(weight_name, use_safetensors),
                                  **where)
    return root / names[0]


def has_file(folder: Path) -> bool:
    """Whether the folder has a file that `open_lora` would open, and it is a LoRA."""
    try:
        names = _choose(None, None)([p.name for p in folder.iterdir() if p.is_file()])
        return formats.is_lora(open_file(folder / names[0]).header)
    except (OSError, ValueError):
        return False


def _choose(weight_name: str | None, use_safetensors: bool | None) -> hub.Choose:
    endings = SUFFIXES if use_safetensors is None else SUFFIXES[:1] if use_safetensors else SUFFIXES[1:]

    def choose(names: Sequence[str]) -> list[str]:
        beside = [CONFIG] if CONFIG in names else []
        if weight_name is not None:
            if weight_name not in names:
                raise FileNotFoundError(f"{weight_name}{nearest(weight_name, names)}; the files there: "
                                        f"{', '.join(names) or 'none'}")  # fmt: skip
            return [weight_name, *beside]
        for ending in endings:
            there = [n for n in names if n.endswith(ending)]
            usual = [n for n in there if n.removesuffix(ending) in (WEIGHTS, "adapter_model")]
            if len(usual or there) == 1:
                return [*(usual or there), *beside]
            if there:
                raise FileNotFoundError(f"{WEIGHTS}{ending}; choose with weight_name= among {', '.join(there)}")
        raise FileNotFoundError(f"LoRA file ({', '.join(endings)}); the files there: {', '.join(names) or 'none'}")

    return choose


def _opened(path: Path, label: str, config: Path) -> File:
    source = open_file(path, mmap=False)  # copies, which do not change if the file changes later
    beside = parse_json(config) if path.stem == "adapter_model" and config.is_file() else None
    return File(label, source.header, source.read, read_metadata(path) if source.metadata else {}, beside)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file. Its header must have been checked before."""
    with path.open("rb") as file:
        said = json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__")
    return {n: v for n, v in said.items() if isinstance(v, str)} if isinstance(said, dict) else {}


# -------------------------------------------------------------------------------------------------------------- loading


def load(networks: Networks, file: File, name: str | None, strict: bool, hotswap: bool) -> str:
    """Load a file's LoRA under a name, and make it the only active one of each network that it changes.

    Returns the name. strict: with False, tensors that fit no layer are left out, and the log names them. hotswap:
    replace the LoRA of this name. ValueError if the LoRA does not fit; then nothing has changed.
    """
    states = {component: loras_of(network) for component, network in networks.items()}
    taken = {n for state in states.values() for n in state.loaded}
    if name is None:
        name = next(f"default_{n}" for n in range(len(taken) + 1) if f"default_{n}" not in taken)
    if not isinstance(name, str) or not name:
        raise ValueError(f"adapter_name must be a text, not {name!r}")
    if name in taken and not hotswap:
        raise ValueError(f"there already is a LoRA {name!r}: give another adapter_name, or hotswap=True to replace it")
    if hotswap and name not in taken:
        raise ValueError(f"hotswap=True: there is no LoRA {name!r} to replace{nearest(name, sorted(taken))}")
    _check_not_merged(states, [name])
    try:
        factors, homeless = read_factors(networks, file, strict)
    except Refused as error:
        raise ValueError(f"{file.label}: {error}") from None
    new = {}
    for component, state in states.items():
        changes = factors.get(component, {})
        if not changes and name not in state.loaded:
            continue
        state = new[component] = state.copy()
        before = state.weights.get(name, {})
        ones = {*before.values()} or {1.0}
        kept = ones.pop() if len(ones) == 1 else 1.0
        state.loaded.pop(name, None)
        if changes:
            state.loaded[name] = changes
            state.weights[name] = {path: before.get(path, kept) for path in changes}
            if not hotswap:
                state.active = [n for n in state.active if n in state.merged] + [name]
            elif name not in state.active and name in active(networks):
                state.active.append(name)
        else:
            state.weights.pop(name, None)
            state.active = [n for n in state.active if n != name]
    change(networks, new)
    if homeless:
        logger.warning("%s: %s. The rest is loaded.", file.label, homeless)
    if not all(state.enabled for state in states.values()):
        logger.warning("LoRA is disabled: %r changes nothing until enable_lora() is called.", name)
    counts = [f"{len(layers)} layers of {type(networks[c]).__name__}" for c, layers in factors.items()]
    logger.info("%s changes %s, as %r.", file.label, " and ".join(counts), name)
    return name


def read_factors(
    networks: Networks, file: File, strict: bool = True
) -> tuple[dict[str, dict[str, Factors]], str]:
    """({component: {layer: factors}}, a message about tensors that fit no layer, or ""). Raises Refused."""
    known = {c: layers_of(network) for c, network in networks.items()}
    reading = formats.read(file.header, [target_of(c, network, known[c]) for c, network in networks.items()])
    if reading.homeless and (strict or not reading.layers):
        hint = "; give strict=False to load the others" if reading.layers else ""
        raise Refused(reading.complaint() + hint)
    configs = file.configs()
    found: dict[str, dict[str, Factors]] = {}
    for component, layers in reading.layers.items():
        for module, layer in layers.items():
            path, shape = known[component][module]
            inner = networks[component].get_submodule(path)
            if not can_branch(inner):
                raise Refused(f"it changes {module!r}, which here is a {type(inner).__name__}; only nn.Linear, and "
                              "convolutions with zero padding and one group, can have a LoRA")  # fmt: skip
            config = configs.get(component, Config())
            found.setdefault(component, {})[path] = formats.factors(layer, shape, file.read, config, module)
    return found, reading.complaint()


# ---------------------------------------------------------------------------------------------------------------- calls


def states_of(networks: Networks) -> dict[str, LoRAs]:
    return {component: loras_of(network) for component, network in networks.items()}


def names_of(given: Any, states: Mapping[str, LoRAs], what: str) -> list[str]:
    """A list of one name or several. ValueError if one is not loaded for any network, or is given twice."""
    names = [given] if isinstance(given, str) else [*given]
    known = list(dict.fromkeys(n for state in states.values() for n in state.loaded))
    for name in names:
        if name not in known:
            there = f"; loaded are {', '.join(map(repr, known))}" if known else "; none is loaded"
            raise ValueError(f"{what}: there is no LoRA {name!r}{nearest(name, known)}{there}")
    if twice := [n for n in names if names.count(n) > 1]:
        raise ValueError(f"{what}: {twice[0]!r} is given twice")
    return names


def _check_not_merged(states: Mapping[str, LoRAs], names: Sequence[str]) -> None:
    for state in states.values():
        if merged := [n for n in names if n in state.merged]:
            raise ValueError(f"the LoRA {merged[0]!r} is fused into the weights: call unfuse_lora() first")


def set_adapters(networks: Networks, given: Any, weights: Any) -> None:
    states = states_of(networks)
    names = names_of(given, states, "set_adapters")
    _check_not_merged(states, names)
    each = [*weights] if isinstance(weights, list | tuple) else [weights] * len(names)
    if len(each) != len(names):
        raise ValueError(f"set_adapters: {len(each)} weights for {len(names)} adapters")
    new = {}
    for component, state in states.items():
        state = new[component] = state.copy()
        state.active = [n for n in names if n in state.loaded] + [n for n in state.active if n in state.merged]
        for name, weight in zip(names, each, strict=True):
            weight = _of_component(component, 1.0 if weight is None else weight)
            if name in state.loaded:
                state.weights[name] = {path: weight_of(weight, path, networks[component])
                                       for path in state.loaded[name]}  # fmt: skip
    change(networks, new)


def _of_component(component: str, weight: Any) -> Any:
    if not isinstance(weight, dict):
        return weight
    for name in weight:
        if name not in COMPONENTS:
            raise ValueError(f"set_adapters: there is no network {name!r}{nearest(name, COMPONENTS)}; give weights as "
                             '{"unet": ..., "text_encoder": ...}')  # fmt: skip
    value = weight.get(component, 1.0)
    if component == "text_encoder" and isinstance(value, dict):
        raise ValueError("set_adapters: the text encoder has no blocks; its weight must be one number")
    return value


def weight_of(weight: Any, path: str, unet: Any) -> float:
    """The weight of one layer. weight: a number, or {"down": ..., "mid": ..., "up": {"block_1": ...}}.

    The weight of a block is a number, or a list with a number for each of its transformers. Layers beside a
    transformer, such as its ResBlock, get the same number. The weight of layers that are not named is 1.
    """
    if not isinstance(weight, dict):
        return _number(weight, "a weight")
    for part in weight:
        if part not in ("down", "mid", "up"):
            near = nearest(part, ("down", "mid", "up"))
            raise ValueError(f"set_adapters: {part!r} is not a part of a UNet{near}; the parts are down, mid and up")
    found = 1.0
    for part, value in weight.items():
        steps = path.split(".")
        if part == "mid":
            value = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
            number = _number(value, "mid")
            found = number if steps[0] == part else found
            continue
        levels = getattr(unet, part)
        blocks = value if isinstance(value, dict) else {f"block_{i}": value for i in range(len(levels))}
        for block, given in blocks.items():
            known = [f"block_{i}" for i in range(len(levels))]
            if block not in known:
                raise ValueError(f"set_adapters: {part} has no {block!r}{nearest(block, known)}; its blocks are "
                                 f"{', '.join(known)}")  # fmt: skip
            count = len(levels[known.index(block)].blocks)
            numbers = [*given] if isinstance(given, list | tuple) else [given]
            numbers = [_number(n, f"{part} {block}") for n in numbers]
            if len(numbers) not in (1, count):
                raise ValueError(f"set_adapters: {part} {block} has {count} transformers, but {len(numbers)} weights "
                                 "are given")
            if steps[0] == part and steps[1] == str(known.index(block)):
                k = int(steps[3]) if steps[2] == "blocks" and len(numbers) > 1 else 0
                found = numbers[k]
    return found


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"set_adapters: {what} must be a finite number, not {str(value)[:80]!r}")
    return float(value)


def active(networks: Networks) -> list[str]:
    return list(dict.fromkeys(n for state in states_of(networks).values() for n in state.active))


def listed(networks: Networks) -> dict[str, list[str]]:
    return {component: [*state.loaded] for component, state in states_of(networks).items() if state.loaded}


def delete(networks: Networks, given: Any) -> None:
    states = states_of(networks)
    names = names_of(given, states, "delete_adapters")
    _check_not_merged(states, names)
    new = {component: state.copy() for component, state in states.items()}
    for state in new.values():
        for name in names:
            state.loaded.pop(name, None)
            state.weights.pop(name, None)
        state.active = [n for n in state.active if n not in names]
    change(networks, new)


def unload(networks: Networks) -> None:
    change(networks, {component: LoRAs() for component in networks})


def enable(networks: Networks, on: bool) -> None:
    states = states_of(networks)
    if not on:
        _check_not_merged(states, [n for state in states.values() for n in state.merged])
    change(networks, {component: replace(state.copy(), enabled=on) for component, state in states.items()})


@torch.inference_mode(False)
@torch.no_grad()
def fuse(networks: Networks, scale: float, given: Any) -> None:
    """Add weight * scale * alpha / r * up @ down to the weights of the layers.

    given: names of LoRAs, or None for all active ones. ValueError on a name that is not loaded, or if none is active.
    FloatingPointError if a weight would become infinite or NaN. After an error nothing has changed.
    """
    states = states_of(networks)
    _number(scale, "lora_scale")
    if given is not None:
        names = names_of(given, states, "fuse_lora")
    else:
        names = [n for n in active(networks) if any(n in s.active and n not in s.merged for s in states.values())]
    _check_not_merged(states, names)
    if not names:
        raise ValueError("fuse_lora: no LoRA is active")
    if not all(state.enabled for state in states.values()):
        raise ValueError("fuse_lora: LoRA is disabled: call enable_lora() first")
    new, done = {}, []
    try:
        for component, state in states.items():
            state = new[component] = state.copy()
            mine = [n for n in names if n in state.loaded]
            state.merged += mine
            for path in dict.fromkeys(path for n in mine for path in state.loaded[n]):
                layer: Any = networks[component].get_submodule(path)
                before = layer.weight.data
                fused = _fused(layer, [(state.loaded[n][path], state.weights[n][path] * scale) for n in mine
                                       if path in state.loaded[n]])  # fmt: skip
                if not bool(torch.isfinite(fused).all()):
                    raise FloatingPointError(f"fuse_lora: in {fused.dtype} the weight of {path!r} would not be finite")
                state.originals.setdefault(path, before.cpu())  # no copy if it is on the CPU already
                layer.weight.data = fused
                done.append((layer.weight, before))
        change(networks, new)
        logger.info("fuse_lora: %s is fused into the weights of %d layers.", ", ".join(map(repr, names)), len(done))
    except BaseException:
        for weight, before in done:
            weight.data = before
        raise


def _fused(layer: Any, parts: Sequence[tuple[Factors, float]]) -> Tensor:
    weight = layer.weight.data
    wide = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    for factors, w in parts:
        delta = factors.delta(wide) * w
        if isinstance(layer, nn.Embedding):  # later rows are words that were added after the LoRA
            delta = F.pad(delta.T, (0, 0, 0, len(wide) - delta.shape[1]))
        wide = wide + delta.reshape(wide.shape)
    out = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device)
    return out.copy_(wide)


@torch.inference_mode(False)
@torch.no_grad()
def unfuse(networks: Networks) -> None:
    """Restore the original weights exactly. The fused LoRAs run as branches again, with the same weights."""
    states = states_of(networks)
    if not any(state.originals for state in states.values()):
        logger.warning("unfuse_lora() changes nothing: no LoRA is fused.")
        return
    new = {component: replace(state.copy(), merged=[], originals={}) for component, state in states.items()}
    plans = {component: plan(networks[component], state) for component, state in new.items()}  # may need memory
    for component, state in states.items():
        for path, original in state.originals.items():
            weight = networks[component].get_submodule(path).weight
            weight.data = original.to(weight.device, weight.dtype)
        carry_out(plans[component])
        keep(networks[component], new[component])


# --------------------------------------------------------------------------------------------------------------- saving


def save(networks: Networks, folder: str | Path, given: Any, weight_name: str | None, safe: bool) -> None:
    """Save LoRAs, each as a file with peft's names, which diffusers can load.

    given: names of LoRAs, or None for all that are loaded. Several LoRAs get files with their own names. safe: write
    .safetensors, not .bin. ValueError on wrong arguments; then nothing is written.
    """
    states = states_of(networks)
    if given is None:
        names = list(dict.fromkeys(n for state in states.values() for n in state.loaded))
    else:
        names = names_of(given, states, "save_lora_weights")
    if not names:
        raise ValueError("save_lora_weights: no LoRA is loaded")
    if len(names) > 1 and weight_name is not None:
        raise ValueError(f"save_lora_weights: one weight_name for {len(names)} LoRAs: choose one with adapter_names=")
    ending = "safetensors" if safe else "bin"
    made = []
    for name in names:
        if len(names) > 1 and (Path(name).name != name or name.startswith(".")):
            raise ValueError(f"save_lora_weights: {name!r} cannot be a file name: save it alone, with a weight_name")
        tensors: dict[str, Tensor] = {}
        said: dict[str, Any] = {}
        for component, state in states.items():
            if name in state.loaded:
                more, config = to_peft(networks[component], state.loaded[name])
                config = {} if all(f.alpha == f.rank for f in state.loaded[name].values()) else config
                tensors |= {f"{component}.{n}": x for n, x in more.items()}
                said |= {f"{component}.{n}": v for n, v in config.items()}
        file = weight_name or (f"{WEIGHTS if len(names) == 1 else name}.{ending}")
        made.append((file, tensors, said))
    for file, tensors, said in made:
        write(Path(folder) / file, tensors, said, safe)


def save_layers(
    folder: str | Path,
    layers: Mapping[str, tuple[Mapping[str, Tensor] | None, Mapping[str, Any] | None]],
    weight_name: str | None,
    safe: bool,
) -> None:
    """Save layers as one file. layers: {component: (tensors with peft's names, peft's LoraConfig)}."""
    tensors: dict[str, Tensor] = {}
    said: dict[str, Any] = {}
    for component, (given, config) in layers.items():
        for name, x in (given or {}).items():
            if not isinstance(x, Tensor) or formats.ending(str(name))[1] == "":
                raise ValueError(f"save_lora_weights: {str(name)[:100]!r}, a {type(x).__name__}, is not a tensor of a "
                             "LoRA")
            tensors[f"{component}.{name}"] = x
        if config and not given:
            raise ValueError(f"save_lora_weights: there are metadata for {component}, but no layers")
        said |= {f"{component}.{n}": sorted(v) if isinstance(v, set) else v for n, v in (config or {}).items()}
    if not tensors:
        raise ValueError("save_lora_weights: the layers have no tensors")
    write(Path(folder) / (weight_name or f"{WEIGHTS}.{'safetensors' if safe else 'bin'}"), tensors, said, safe)


def to_peft(network: Any, layers: Mapping[str, Factors]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """({peft's name: tensor}, peft's LoraConfig). A file without a config has alpha = rank everywhere."""
    names = {path: (module, shape) for module, (path, shape) in layers_of(network).items()}
    tensors, ranks, alphas = {}, {}, {}
    for path, f in layers.items():
        module, shape = names[path]
        if isinstance(network.get_submodule(path), nn.Embedding):
            raise ValueError(f"save_lora_weights: the LoRA changes the token table ({module}), which peft's files "
                             "cannot store: use fuse_lora() and save_pretrained()")  # fmt: skip
        ones = [1] * (len(shape) - 2)
        tensors[f"{module}.lora_A.weight"] = f.down if f.down.ndim == len(shape) else f.down.reshape(
            *f.down.shape, *ones)  # fmt: skip
        tensors[f"{module}.lora_B.weight"] = f.up.reshape(*f.up.shape, *ones)
        # peft matches the end of a name. transformers >= 5.6 has no `text_model.`, so it is left out.
        ranks[module.removeprefix("text_model.")] = f.rank
        alphas[module.removeprefix("text_model.")] = f.alpha
    r, alpha = (max(set(v.values()), key=[*v.values()].count) for v in (ranks, alphas))
    config = {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {m: n for m, n in ranks.items() if n != r},
        "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
        "target_modules": sorted(ranks),
        "bias": "none",
        "peft_type": "LORA",
        "use_dora": False,
        "use_rslora": False,
    }
    return tensors, config


def write(path: Path, tensors: Mapping[str, Tensor], said: Mapping[str, Any], safe: bool) -> None:
    state = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    if said and not safe:
        raise ValueError(f"{path.name}: a .bin file cannot store alphas that differ from the ranks: save as "
                         ".safetensors")
    with replacing(path) as temporary:
        if safe:
            from safetensors.torch import save_file

            metadata = {"format": "pt"} | ({METADATA: json.dumps(said, indent=2, sort_keys=True)} if said else {})
            save_file(state, temporary, metadata=metadata)
        else:
            torch.save(state, temporary)
