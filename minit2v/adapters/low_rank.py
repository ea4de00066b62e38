"""Layers with low-rank branches beside their weights: y = W x + sum of scale * up(down(x)).

To get branches, a layer only changes its class. It stays the same module with the same parameters, so names,
optimizers and other references stay valid. Only branches that are trained are in the state dict.
"""

from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..models.blocks import Upsample


class Branch(nn.Module):
    """A loaded branch: down (r i *k), up (o r), scale (). They are buffers, so they move with the layer."""

    def __init__(self, name: str, source: object, down: Tensor, up: Tensor):
        super().__init__()
        self.name = name
        self.source = source  # the factors from which `down` and `up` were copied
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("scale", down.new_ones(()), persistent=False)  # a tensor, so that CUDA graphs see changes

    def given(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x, down, up) for the products."""
        return x, self.down, self.up


class TrainedBranch(nn.Module):
    """A branch with parameters of float32 or wider. The products are computed in the dtype of x.

    With 16-bit parameters, rounding would lose most of the optimizer's small steps.
    """

    def __init__(self, down: Tensor, up: Tensor, scale: float, dropout: float = 0.0):
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.scale, self.dropout, self.on = scale, dropout, True

    def given(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.dropout(x, self.dropout, self.training), self.down.to(x.dtype), self.up.to(x.dtype)


def running(layer: nn.Module) -> "Iterator[Branch | TrainedBranch]":
    """The branches that are on.

    A branch that is off is left out, and not multiplied by 0. Gradient checkpointing runs the layer again in the
    backward pass, and so detects if a branch was switched in between.
    """
    return (b for b in layer.branches if getattr(b, "on", True))  # type: ignore[union-attr,return-value]


class LowRankLinear(nn.Linear):
    branches: nn.ModuleList

    def forward(self, x: Tensor) -> Tensor:
        """x (... i) -> (... o)."""
        y = super().forward(x)
        for b in running(self):
            given, down, up = b.given(x)
            y = y + F.linear(F.linear(given, down), up) * b.scale
        return y


class LowRankConv2d(nn.Conv2d):
    branches: nn.ModuleList

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (n i h w) -> (n o h w). `down` has the layer's kernel, stride and padding. `up` is a 1x1 convolution."""
        y = super()._conv_forward(x, weight, bias)
        for b in running(self):
            given, down, up = b.given(x)
            h = F.conv2d(given, down, None, self.stride, self.padding, self.dilation)
            y = y + F.conv2d(h, up[:, :, None, None]) * b.scale
        return y


class LowRankUpsample(LowRankConv2d, Upsample):
    """Upsample doubles height and width, and then convolves as LowRankConv2d does."""

    forward = Upsample.forward


class LowRankConv3d(nn.Conv3d):
    branches: nn.ModuleList

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (b i f h w) -> (b o f h w)."""
        y = super()._conv_forward(x, weight, bias)
        for b in running(self):
            given, down, up = b.given(x)
            h = F.conv3d(given, down, None, self.stride, self.padding, self.dilation)
            y = y + F.conv3d(h, up[:, :, None, None, None]) * b.scale
        return y


class LowRankEmbedding(nn.Embedding):
    branches: nn.ModuleList

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> (... o). Rows after those of a branch belong to words added later, which it does not change."""
        y = super().forward(ids)
        for b in self.branches:
            table = F.pad(b.down.T, (0, 0, 0, self.num_embeddings - b.down.shape[1]))
            y = y + F.linear(F.embedding(ids, table), b.up) * b.scale
        return y


PLAIN: dict[type, type] = {
    LowRankLinear: nn.Linear,
    LowRankConv2d: nn.Conv2d,
    LowRankUpsample: Upsample,
    LowRankConv3d: nn.Conv3d,
    LowRankEmbedding: nn.Embedding,
}
WITH_BRANCHES = {plain: branched for branched, plain in PLAIN.items()}


def can_branch(layer: nn.Module) -> bool:
    """Whether the layer has one of the classes above. A convolution must have zero padding and one group."""
    plain = PLAIN.get(type(layer), type(layer))
    if plain not in WITH_BRANCHES:
        return False
    if not isinstance(layer, nn.Conv2d | nn.Conv3d):
        return True
    return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def branches_of(layer: nn.Module) -> list[Branch]:
    """The branches of loaded LoRAs."""
    return [b for b in _all_branches(layer) if isinstance(b, Branch)]


def trained_branches_of(layer: nn.Module) -> list[TrainedBranch]:
    return [b for b in _all_branches(layer) if isinstance(b, TrainedBranch)]


def _all_branches(layer: nn.Module) -> list[nn.Module]:
    return [*layer.branches] if type(layer) in PLAIN else []  # type: ignore[list-item]


def set_branches(layer: nn.Module, branches: Sequence[Branch]) -> None:
    """Replace the layer's branches of loaded LoRAs."""
    _put(layer, [*trained_branches_of(layer), *branches])


def set_trained_branches(layer: nn.Module, branches: Sequence[TrainedBranch]) -> None:
    """Replace the layer's trained branches."""
    _put(layer, [*branches, *branches_of(layer)])


def _put(layer: nn.Module, branches: Sequence[nn.Module]) -> None:
    """Set all branches. With an empty list the layer gets its plain class again."""
    if _all_branches(layer) == [*branches]:
        return
    if not branches:
        del layer._modules["branches"]
        layer.__class__ = PLAIN[type(layer)]
        return
    if type(layer) not in PLAIN:
        layer.__class__ = WITH_BRANCHES[type(layer)]
    layer.add_module("branches", nn.ModuleList(branches).train(layer.training))


def has_branches(network: nn.Module) -> bool:
    return any(type(m) in PLAIN for m in network.modules())
