"""Puts weights that are used together into one tensor. Each keeps its name, and becomes a view of that tensor."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


def lay_together(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """Parameters (n_i ...) -> one tensor (sum of n_i, ...). From now on the parameters are views of it.

    The result is None if they do not fit together: different dtypes, devices or sizes, a shared parameter, or a
    subclass of Parameter. If they are views of one tensor already, nothing is moved.
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
    """The tensor of which the parameters are consecutive views, or None."""
    first = parameters[0]
    place, memory = first.storage_offset(), first.untyped_storage().data_ptr()
    for p in parameters:
        fits = p.dtype == first.dtype and p.shape[1:] == first.shape[1:] and p.is_contiguous()
        if not fits or p.untyped_storage().data_ptr() != memory or p.storage_offset() != place:
            return None
        place += p.numel()
    return first.detach().as_strided((sum(map(len, parameters)), *first.shape[1:]), first.stride())


class Places:
    """Remembers the address and layout of every parameter of a network, to restore them."""

    def __init__(self, network: nn.Module):
        self.before = {name: (p.data_ptr(), p.stride()) for name, p in network.named_parameters()}

    @torch.inference_mode(False)
    @torch.no_grad()
    def put_back(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Each parameter that was moved gets its own memory again, in the original layout, with the same numbers."""
        for name, p in parameters:
            place, stride = self.before.get(name, (0, p.stride()))
            shares = p.untyped_storage().nbytes() != p.nbytes
            if p.data_ptr() != place and (shares or p.stride() != stride):
                p.data = torch.empty_strided(p.shape, stride, dtype=p.dtype, device=p.device).copy_(p)
