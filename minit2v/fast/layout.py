"""Weights that are used together, laid together in memory: each stays what it was by name, as a view of one tensor."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


def lay_together(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """Parameters (n_i ...) -> one tensor (sum of n_i, ...), of which they are views from now on.

    None where they do not fit together: other dtypes, devices, sizes; one that is another's, or that is computed. Where
    they lie so already, nothing is moved.
    """
    if (together := laid_together(parameters)) is not None:
        return together
    if len(set(map(id, parameters))) < len(parameters) or any(type(p) is not nn.Parameter for p in parameters):
        return None
    if len({(p.dtype, p.device, p.shape[1:]) for p in parameters}) > 1:
        return None
    joined = torch.cat([p.detach() for p in parameters])
    for p, view in zip(parameters, joined.split([len(p) for p in parameters]), strict=True):
        p.data = view
    return joined


def laid_together(parameters: Sequence[Tensor]) -> Tensor | None:
    """The one tensor of which the parameters are consecutive views; None where they are not."""
    first = parameters[0]
    place, memory = first.storage_offset(), first.untyped_storage().data_ptr()
    for p in parameters:
        fits = p.dtype == first.dtype and p.shape[1:] == first.shape[1:] and p.is_contiguous()
        if not fits or p.untyped_storage().data_ptr() != memory or p.storage_offset() != place:
            return None
        place += p.numel()
    return first.detach().as_strided((sum(map(len, parameters)), *first.shape[1:]), first.stride())


class Places:
    """Where every parameter of a network lay, to put it back."""

    def __init__(self, network: nn.Module):
        self.before = {name: (p.data_ptr(), p.stride()) for name, p in network.named_parameters()}

    @torch.inference_mode(False)
    @torch.no_grad()
    def put_back(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Memory of its own for each that has moved, in the layout of before; the same numbers to the last bit."""
        for name, p in parameters:
            place, stride = self.before.get(name, (0, p.stride()))
            shares = p.untyped_storage().nbytes() != p.nbytes
            if p.data_ptr() != place and (shares or p.stride() != stride):
                p.data = torch.empty_strided(p.shape, stride, dtype=p.dtype, device=p.device).copy_(p)
