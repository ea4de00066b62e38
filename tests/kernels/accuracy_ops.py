"""The ops as PyTorch sees them: schema, shapes without numbers, derivative, and what a tracer makes of them."""

import pytest
import torch
from judge import DEVICE, randn, relative
from torch import Tensor

import minit2v_kernels
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
    "linear_add": [(TOKENS, randn(6, 8), randn(6), randn(1, 2, 3, 6))],
}  # fmt: skip


EVERY = pytest.mark.parametrize("name, args", [(name, args) for name, calls in CALLS.items() for args in calls])


@EVERY
@pytest.mark.parametrize("gradients", [False, True], ids=["", "gradients"])
def test_opcheck(name, args, gradients):
    """Triton's interpreter cannot be traced: that takes a GPU."""
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if DEVICE == "cuda":
        checks.append("test_aot_dispatch_dynamic")
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


AUTOCAST = {  # the public calls, x in 16 bits among weights in 32, as layers under autocast pass them on
    "group_norm_silu": ((X.bfloat16(), *norm(12), 2), {"skip": image(2, 4, 3, 2), "emb": randn(2, 8).bfloat16()}),
    "add_group_norm_silu": ((X.bfloat16(), image(2, 8, 3, 2), *norm(8), 2), {"frames": 2}),
    "temporal_attention": ((QKV[0].bfloat16(), QKV[1], QKV[2].bfloat16()), {}),
    "geglu": ((TOKENS.bfloat16(), randn(12, 8), randn(12)), {}),
    "layer_norm": ((TOKENS.bfloat16(), *norm(8)), {"positions": randn(2, 8)}),
    "add_layer_norm": ((TOKENS.bfloat16(), randn(1, 2, 3, 8, seed=1), *norm(8)), {}),
    "temporal_conv": ((image(1, 8, 3, 2).bfloat16(), randn(4, 8, 3, 1, 1), randn(4)), {"residual": image(1, 4, 3, 2)}),
    "linear_add": ((TOKENS.bfloat16(), randn(6, 8), randn(6), randn(1, 2, 3, 6)), {}),
}


PRODUCTS = ("temporal_attention", "geglu", "temporal_conv", "linear_add")


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast(name):
    """Mixed dtypes are as one. Products come in autocast's dtype, norms in the widest of their inputs."""
    args, kw = AUTOCAST[name]
    op = getattr(minit2v_kernels, name)
    leaf = args[1].clone().requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = op(args[0], leaf, *args[2:], **kw, impl="triton")
    got, product = got if isinstance(got, tuple) else (got,), name in PRODUCTS
    wide = op(*(x.double() if isinstance(x, Tensor) else x for x in args), impl="torch",
              **{n: x.double() if isinstance(x, Tensor) else x for n, x in kw.items()})  # fmt: skip
    for mine, want in zip(got, wide if isinstance(wide, tuple) else (wide,), strict=True):
        assert mine.dtype == (torch.bfloat16 if product or name == "layer_norm" else torch.float32)
        assert relative(mine, want) < 0.02
    got[-1].sum().backward()
    assert leaf.grad.dtype == torch.float32 and leaf.grad.isfinite().all()
    assert "geglu" != name or raises_outside(op, args)


def raises_outside(op, args) -> bool:
    with pytest.raises(ValueError, match="not one 16- or 32-bit dtype"):
        op(*args, impl="triton")
    return True


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels are traced")
def test_a_tracer_of_interpreted_kernels_loses_none():
    """It keeps the op whole, or is refused: a graph without the kernel would leave memory as it was."""
    from torch.fx.experimental.proxy_tensor import make_fx

    op, args = torch.ops.minit2v.geglu, CALLS["geglu"][0]
    assert torch.equal(make_fx(op, tracing_mode="fake")(*args)(*args), op(*args))
    compiled = torch.compile(lambda *args: minit2v_kernels.geglu(*args, impl="triton"), backend="aot_eager")
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="geglu"):
        compiled(*args)


def test_a_second_derivative_is_refused():
    """`triton_op` gives a derivative of the reference, and no derivative of that."""
    x, w = torch.ones(3, 4, device=DEVICE, requires_grad=True), torch.ones(6, 4, device=DEVICE)
    y = minit2v_kernels.geglu(x, w, w[:, 0], impl="triton")
    assert torch.autograd.grad(y.sum(), x, retain_graph=True)[0].shape == x.shape
    with pytest.raises(RuntimeError, match="geglu: its kernel has no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
