"""The ops as PyTorch sees them: schema, shapes without numbers, derivative, and what a tracer makes of them."""

import pytest
import torch
from judge import DEVICE, randn
from torch import Tensor

from minit2v_kernels import _dispatch

_dispatch.register_all()


def image(*shape: int) -> Tensor:
    return randn(*shape).contiguous(memory_format=torch.channels_last)


def norm(c: int) -> tuple[Tensor, Tensor]:
    return randn(c, mean=1, std=0.1), randn(c, seed=1)


X, TOKENS = image(2, 8, 3, 2), randn(1, 2, 3, 8)
QKV = randn(1, 3, 2, 3, 2, 8).unbind(3)
CALLS = {
    "group_norm_silu": [(X, *norm(8), 2, 1e-5, True, 2, None, None),
                        (X, *norm(12), 2, 1e-5, False, 1, image(2, 4, 3, 2), randn(2, 8))],
    "add_group_norm_silu": [(X, image(2, 8, 3, 2), *norm(8), 2, 1e-5, True, 1)],
    "temporal_attention": [(*QKV, False, 3), (*(x.contiguous() for x in QKV), True, 2)],
    "geglu": [(TOKENS, randn(12, 8), randn(12))],
    "layer_norm": [(TOKENS, *norm(8), 1e-5, randn(2, 8))],
    "add_layer_norm": [(TOKENS, randn(1, 2, 3, 8, seed=1), *norm(8), 1e-5, None)],
    "temporal_conv": [(image(1, 8, 3, 2), randn(4, 8, 3, 1, 1), randn(4), None),
                      (image(1, 8, 3, 2), randn(4, 8, 3, 1, 1), randn(4), image(1, 4, 3, 2))],
}  # fmt: skip


EVERY = pytest.mark.parametrize("name, args", [(name, args) for name, calls in CALLS.items() for args in calls])


@EVERY
@pytest.mark.parametrize("gradients", [False, True], ids=["", "gradients"])
def test_opcheck(name, args, gradients):
    """Triton's interpreter runs no kernel on tensors without numbers: that takes a GPU."""
    checks = ["test_schema", "test_autograd_registration"]
    if DEVICE == "cuda":
        checks += ["test_faketensor", "test_aot_dispatch_dynamic"]
    args = [x.clone().requires_grad_(gradients) if isinstance(x, Tensor) else x for x in args]
    torch.library.opcheck(getattr(torch.ops.minit2v, name).default, tuple(args), test_utils=checks)


@EVERY
def test_results_without_numbers(name, args):
    """On `meta`, where launches are recorded: of the shape, dtype and memory layout of those with numbers."""

    def about(results):
        return [(y.shape, y.dtype, y.stride()) for y in (results if isinstance(results, tuple) else (results,))]

    op = getattr(torch.ops.minit2v, name)
    with _dispatch.record():
        made = op(*(x.to("meta") if isinstance(x, Tensor) else x for x in args))
    assert about(made) == about(op(*args))


def test_every_op_is_here():
    assert len(CALLS) == len(_dispatch.registrations)
