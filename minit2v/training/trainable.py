"""What is trained: parameters of a network, chosen by name, or low-rank factors beside its layers (LoRA).

Names are those in the files: diffusers' names, and transformers' for the text encoder. Patterns may use our names, too.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minit2v_convert.rename import nearest

from ..adapters.formats import Factors
from ..adapters.lora import layers_of, to_peft
from ..adapters.low_rank import TrainedBranch, can_branch, set_trained_branches, trained_branches_of
from ..models.blocks import MotionModule, TemporalConv, TemporalTransformer
from .recipe import LORAS, Recipe

# Parts of diffusers' names: layers that mix frames, AnimateDiff's motion modules, and the layers of an attention.
TEMPORAL = re.compile(r"(^|\.)(temp_attentions|temp_convs|transformer_in|motion_modules)\.")
MOTION = re.compile(r"(^|\.)motion_modules\.")
ATTENTION = re.compile(r"\.attn[12]\.")
FOUR = re.compile(r"\.attn[12]\.to_(q|k|v|out\.0)$")
FOUR_OF_TEXT = re.compile(r"\.self_attn\.(q|k|v|out)_proj$")
# Without proj_in and proj_out of motion modules: diffusers calls them in a way that peft's layers do not support.
LINEAR = re.compile(r"\.ff\.net\.(0\.proj|2)$|(?<!motion_modules\.\d)(?<!motion_modules\.\d\d)\.proj_(in|out)$")
LINEAR_OF_TEXT = re.compile(r"\.mlp\.fc[12]$")
CONV = re.compile(r"(^|\.)(resnets\.\d+\.conv(1|2|_shortcut)|temp_convs\.\d+\.conv\d\.\d)$")

KINDS = ("full", "temporal", "spatial", "attention", "motion", "patterns")
WORDS = ("spatial", "temporal", "both", "linear", "conv", "motion", "text")  # of LoRA


# --------------------------------------------------------------------------------------------------- by a recipe


class Trained(NamedTuple):
    """What a recipe trains. loras: by their kind, empty where weights themselves are trained. named: the parameters."""

    loras: dict[str, "TrainedLoRA"]
    named: list[tuple[str, nn.Parameter]]


def prepare(
    unet: Any, recipe: Recipe, generator: torch.Generator | None = None, text_encoder: Any = None
) -> Trained:  # fmt: skip
    """Choose what a filled recipe trains, and put the network into training mode.

    generator: draws the first values of LoRAs. text_encoder: gets a LoRA where the recipe says so.
    Errors as of `choose` and `add_lora`.
    """
    loras: dict[str, TrainedLoRA] = {}
    named: list[tuple[str, nn.Parameter]] = []
    how = recipe.rank, recipe.alpha, recipe.dropout, generator
    if recipe.train == "motiondirector":
        spatial, temporal = add_motion_director(unet, *how)
        loras = {"spatial": spatial, "temporal": temporal}
    elif recipe.train in LORAS:
        loras = {"lora": add_lora(unet, "motion" if recipe.train == "motion-lora" else recipe.targets or "both", *how)}
        if recipe.train_text:
            if text_encoder is None:
                raise ValueError("train_text: the pipeline has no text encoder")
            loras["text"] = add_lora(text_encoder, "text", *how)
    else:
        named = choose(unet, "spatial" if recipe.train == "image" else recipe.train, recipe.targets)
    for kind, lora in loras.items():
        named += [(f"{kind}.{path}.{side}", getattr(branch, side)) for path, branch in lora.layers.items()
                  for side in ("down", "up")]  # fmt: skip
    for module in unet.modules():
        if isinstance(module, TemporalConv):
            module.dropout = recipe.temporal_dropout or 0.0
    unet.train()
    return Trained(loras, named)


def check_targets(unet: Any, recipe: Recipe) -> None:
    """ValueError where the network has nothing that the recipe's `targets` name. It changes nothing."""
    if recipe.train == "lora":
        lora_targets(unet, recipe.targets or "both")
    elif recipe.train == "patterns":
        names = {ours: (ours, theirs) for ours, theirs in names_in_files(unet).items()}
        matching(recipe.targets, names, type(unet).__name__)


# ------------------------------------------------------------------------------------------------------ parameters


def names_in_files(network: Any) -> dict[str, str]:
    """{our name of a parameter: its name in the files}."""
    state = {name: p.detach() for name, p in network.named_parameters() if ".branches." not in name}
    own = network.layout.own(state)
    known = {name: x for name, x in state.items() if name not in own}
    theirs = network.layout.to_diffusers(known)
    return dict(zip(known, theirs, strict=True)) | {name: name for name in own}


def choose(
    network: nn.Module, train: str = "full", targets: str | Sequence[str] = ()
) -> list[tuple[str, nn.Parameter]]:
    """Make some parameters trainable, and freeze all others. Returns the trained ones with their names in files.

    train: which parameters. "full": all. "temporal": of layers that mix frames. "spatial": of all other layers.
        "attention": of attentions in space and time. "motion": of AnimateDiff's motion modules. "patterns": those that
        `targets` match (see `matching`).

    ValueError where the network has no such parameters, or a pattern matches nothing.
    """
    if train not in KINDS:
        raise ValueError(f"train must be one of {', '.join(KINDS)}, not {train!r}{nearest(train, KINDS)}")
    names = names_in_files(network)
    if train == "patterns":
        chosen = matching(targets, {ours: (ours, theirs) for ours, theirs in names.items()}, type(network).__name__)
    else:
        tests = {
            "full": lambda name: True,
            "temporal": TEMPORAL.search,
            "spatial": lambda name: not TEMPORAL.search(name),
            "attention": ATTENTION.search,
            "motion": MOTION.search,
        }
        chosen = {ours for ours, theirs in names.items() if tests[train](theirs)}
    if not chosen:
        raise ValueError(f"train {train!r}: {type(network).__name__} has no such parameters")
    parameters = dict(network.named_parameters())
    for ours, parameter in parameters.items():
        parameter.requires_grad_(ours in chosen)
    return [(theirs, parameters[ours]) for ours, theirs in names.items() if ours in chosen]


def matching(
    patterns: str | Sequence[str], names: Mapping[str, Iterable[str]], title: str, words: Sequence[str] = ()
) -> set[str]:
    """The keys of `names` that have a name with one of the patterns in it.

    names: {key: its names}. A pattern is one or more whole parts of a dotted name. `*` stands for any text, also with
    dots: "attn1.to_q" or "down_blocks.*.attn*.to_out". ValueError where a pattern matches nothing. It gives the nearest
    name, or the nearest of `words`.
    """
    patterns = [patterns] if isinstance(patterns, str) else [*patterns]
    if not patterns:
        raise ValueError("targets is empty: give patterns of names such as '*attn2*'")
    found: set[str] = set()
    for pattern in patterns:
        inner = ".*".join(map(re.escape, pattern.strip(".").split("*")))
        whole = re.compile(rf"(?:.*\.)?{inner}(?:\..*)?")
        hits = {key for key, spellings in names.items() if any(whole.fullmatch(name) for name in spellings)}
        if not hits or not pattern.strip(".*"):
            raise ValueError(f"{title} has no layer or parameter {pattern!r}{_near(pattern, names.values(), words)}")
        found |= hits
    return found


def _near(pattern: str, names: Iterable[Iterable[str]], words: Sequence[str]) -> str:
    """The nearest word, or the nearest part of a name that is as long as the pattern."""
    count = pattern.count(".") + 1
    split = [name.split(".") for spellings in names for name in spellings]
    runs = {".".join(parts[i : i + count]) for parts in split for i in range(len(parts) - count + 1)}
    return nearest(pattern, sorted({*runs, *words}))


@contextmanager
def without_time(unet: nn.Module) -> Iterator[None]:
    """In the block, layers that mix frames return their input. So the UNet sees each frame by itself.

    ModelScope's authors train on single pictures in this way. Run backward in the block, too: gradient checkpointing
    runs the layers again.
    """
    layers = [m for m in unet.modules() if isinstance(m, TemporalConv | TemporalTransformer | MotionModule)]
    for layer in layers:
        layer.forward = _unchanged  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _unchanged(x: Tensor, f: int) -> Tensor:
    return x


# ------------------------------------------------------------------------------------------------------------ LoRA


class TrainedLoRA:
    """Trainable low-rank factors beside layers of one network: y = W x + alpha / rank * up(down(x)).

    Hu et al. 2021, arXiv:2106.09685. layers: {our name of a layer: its factors}. The factors are parameters of the
    network. They are float32 or wider, also where the network is not.
    """

    def __init__(self, network: Any, layers: Mapping[str, TrainedBranch], rank: int, alpha: float):
        self.network, self.layers, self.rank, self.alpha = network, dict(layers), rank, alpha

    def parameters(self) -> list[nn.Parameter]:
        return [p for branch in self.layers.values() for p in (branch.down, branch.up)]

    def count(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters())

    def factors(self) -> dict[str, Factors]:
        """{our name of a layer: its factors}, without copying them."""
        return {path: Factors(b.down.detach(), b.up.detach().flatten(1), self.alpha) for path, b in self.layers.items()}

    def state(self) -> dict[str, Tensor]:
        """The factors in peft's names, `<layer in diffusers' name>.lora_A.weight` (down) and `.lora_B.weight` (up).

        They are the trained tensors themselves, not copies.
        """
        return to_peft(self.network, self.factors())[0]

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the values of `state()` of such a LoRA. ValueError on names and shapes that are not the same."""
        for name, x in self.check_state(state).items():
            x.copy_(state[name])

    def check_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state()` of this LoRA. ValueError where the other has not the same names and shapes."""
        mine = self.state()
        if wrong := sorted(mine.keys() ^ state.keys()):
            which = "is missing" if wrong[0] in mine else "has no place here" + nearest(wrong[0], sorted(mine))
            raise ValueError(f"this is the state of another LoRA: {wrong[0]!r} {which}")
        for name, x in mine.items():
            if state[name].shape != x.shape:
                raise ValueError(f"{name!r} is {tuple(state[name].shape)}, not {tuple(x.shape)}")
        return mine

    def use(self, on: bool = True, trained: bool = True) -> None:
        """Switch the LoRA. on: whether it changes the network. trained: whether it gets gradients.

        Do not switch it between a forward and its backward: gradient checkpointing runs the layers again.
        """
        for branch in self.layers.values():
            branch.on = on
            branch.requires_grad_(on and trained)

    def remove(self) -> None:
        """Take the factors out: the layers are plain again."""
        for path, branch in self.layers.items():
            layer = self.network.get_submodule(path)
            set_trained_branches(layer, [b for b in trained_branches_of(layer) if b is not branch])
        self.layers = {}


def add_lora(
    network: Any,
    targets: str | Sequence[str] = "both",
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> TrainedLoRA:
    """Put trainable factors beside layers of a UNet or text encoder, and freeze all but what LoRAs train.

    targets: words, and patterns as in `matching`. "spatial", "temporal" and "both" mean q, k, v and out of these
        attentions. "motion" means those of AnimateDiff's motion modules. "linear" adds feed-forwards and projections,
        and "conv" the convolutions, too. "text" means q, k, v and out of the text encoder.
    alpha: the factors are multiplied by alpha / rank. None: alpha is the rank.
    dropout: the share of the input of `down` that is dropped in training.
    generator: draws the first values of `down`, as those of Linear are drawn. `up` is 0, so at first nothing changes.

    ValueError where the rank is larger than that of a layer, where targets match nothing, or where a layer cannot have
    factors.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a whole number of at least 1, not {rank!r}")
    alpha = float(rank if alpha is None else alpha)
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha must be a number above 0, not {alpha!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a share from 0 to below 1, not {dropout!r}")
    chosen = lora_targets(network, targets)
    for theirs, path in chosen.items():
        layer = network.get_submodule(path)
        if not can_branch(layer):
            raise ValueError(f"a LoRA cannot be put beside {theirs!r}, a {type(layer).__name__}")
        most = min(len(layer.weight), layer.weight[0].numel())
        if rank > most:
            raise ValueError(f"rank {rank} is larger than the layer {theirs!r}, whose rank is at most {most}")
    network.requires_grad_(False)
    for module in network.modules():
        if isinstance(module, TrainedBranch):
            module.requires_grad_(True)
    layers = {}
    for path in chosen.values():
        layer = network.get_submodule(path)
        branch = TrainedBranch(*_first_factors(layer.weight, rank, generator), alpha / rank, dropout)
        set_trained_branches(layer, [*trained_branches_of(layer), branch])
        layers[path] = branch
    return TrainedLoRA(network, layers, rank, alpha)


def lora_targets(network: Any, targets: str | Sequence[str]) -> dict[str, str]:
    """{diffusers' name of a layer: our name} of the layers that `add_lora` would train."""
    title = type(network).__name__
    paths = {theirs: ours for theirs, (ours, _) in layers_of(network).items()}
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        if target in WORDS:
            hits = {name for name in paths if _is_meant(target, name)}
            if not hits:
                raise ValueError(f"{title} has no layers for a LoRA of {target!r}")
            chosen |= hits
        else:
            chosen |= matching(target, {theirs: (theirs, ours) for theirs, ours in paths.items()}, title, WORDS)
    if not chosen:
        raise ValueError("a LoRA needs targets")
    return {theirs: ours for theirs, ours in paths.items() if theirs in chosen}


def _is_meant(word: str, name: str) -> bool:
    four, temporal = bool(FOUR.search(name)), bool(TEMPORAL.search(name))
    linear = four or bool(LINEAR.search(name) or FOUR_OF_TEXT.search(name) or LINEAR_OF_TEXT.search(name))
    return {
        "spatial": four and not temporal,
        "temporal": four and temporal,
        "both": four,
        "linear": linear,
        "conv": linear or bool(CONV.search(name)),
        "motion": four and bool(MOTION.search(name)),
        "text": bool(FOUR_OF_TEXT.search(name)),
    }[word]


def _first_factors(weight: Tensor, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """down (r i *k), drawn on the CPU, and up (o r), which is 0. Both are on the device of the weight."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    shape = (rank, *weight.shape[1:])
    if weight.is_meta:
        return weight.new_empty(shape, dtype=dtype), weight.new_empty((len(weight), rank), dtype=dtype)
    down = torch.empty(shape)
    nn.init.kaiming_uniform_(down, a=5**0.5, generator=generator)
    return down.to(weight.device, dtype), torch.zeros(len(weight), rank, dtype=dtype, device=weight.device)


def add_motion_director(
    unet: Any, rank: int = 32, alpha: float | None = None, dropout: float = 0.1,
    generator: torch.Generator | None = None,
) -> tuple[TrainedLoRA, TrainedLoRA]:  # fmt: skip
    """MotionDirector's two LoRAs (Zhao et al. 2023, arXiv:2310.08465).

    The spatial one learns the look of the clips, the temporal one their motion. They are on all linear layers of the
    transformers in space and in time. ValueError where no layer mixes frames.
    """
    paths = lora_targets(unet, "linear")
    spatial = [name for name in paths if not TEMPORAL.search(name)]
    temporal = [name for name in paths if TEMPORAL.search(name)]
    if not temporal:
        raise ValueError(f"{type(unet).__name__} has no layers that mix frames: there is no motion to be learned")
    return (add_lora(unet, spatial, rank, alpha, dropout, generator),
            add_lora(unet, temporal, rank, alpha, dropout, generator))  # fmt: skip
