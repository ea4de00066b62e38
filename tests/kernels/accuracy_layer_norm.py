"""layer_norm's and add_layer_norm's kernel against their definitions."""

import importlib

import pytest
import torch
from judge import DEVICE, DTYPES, check, pairwise, randn

from minit2v_kernels import add_layer_norm, add_layer_norm_ref, layer_norm, layer_norm_ref
from minit2v_kernels._dispatch import interpreting, launch, record
from minit2v_kernels.layer_norms import layer_norm_kernel, run_add_layer_norm, run_add_layer_norm_into, tile

SHAPES = [  # (b f ... d)
    pytest.param((2, 3, 5, 320), id="d320"),
    pytest.param((1, 2, 3, 640), id="d640"),
    pytest.param((1, 1, 3, 1280), id="d1280-one-frame"),
    pytest.param((3, 5, 7, 37), id="odd"),
    pytest.param((2, 2, 2, 3, 33), id="5d"),
    pytest.param((2, 3, 24), id="no-axis-between"),
    pytest.param((1, 1, 1, 5), id="one-row"),
    pytest.param((2, 3, 4, 1), id="one-number"),
    pytest.param((1, 2, 1, 2500), id="several-warps"),
]


def arguments(shape, mean=0.0, dtype=torch.float32, affine=None):
    """x, residual, weight, bias, positions; the last three may be of another dtype."""
    d, affine = shape[-1], affine or dtype
    return (
        randn(*shape, mean=mean, dtype=dtype),
        randn(*shape, mean=mean / 2, dtype=dtype, seed=1),
        randn(d, mean=1, std=0.5, dtype=affine, seed=2),
        randn(d, dtype=affine, seed=3),
        randn(shape[1], d, dtype=affine, seed=4),
    )


def check_both(x, residual, weight, bias, positions=None, eps=1e-5):
    check(layer_norm, layer_norm_ref, x, weight, bias, eps, positions=positions)
    return check(add_layer_norm, add_layer_norm_ref, x, residual, weight, bias, eps, positions=positions)


@pytest.mark.parametrize("shape, mean, dtype", pairwise(SHAPES, [0.0, 10.0, 100.0], DTYPES))
def test_forward(shape, mean, dtype):
    *others, positions = arguments(shape, mean, dtype)
    check_both(*others)
    check_both(*others, positions)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_is_pytorchs_and_the_norm_is_of_it(dtype):
    """Bit by bit: a block that keeps the sum and normalises it again elsewhere must see the same numbers."""
    x, residual, weight, bias, positions = arguments((2, 3, 5, 40), 10, dtype)
    s, y = add_layer_norm(x, residual, weight, bias, positions=positions, impl="triton")
    exact = dtype != torch.bfloat16 or not interpreting()  # the interpreter cuts bfloat16 off where GPUs round it
    torch.testing.assert_close(s, x + residual, rtol=0 if exact else 2**-7, atol=0)
    assert torch.equal(y, layer_norm(s, weight, bias, positions=positions, impl="triton"))


def test_a_sum_that_overflows():
    x, residual, weight, bias, _ = arguments((1, 2, 3, 8), dtype=torch.float16)
    x[0, 1, 1, 3] = residual[0, 1, 1, 3] = 60_000
    s, y = add_layer_norm(x, residual, weight, bias, impl="triton")
    want_s, want_y = add_layer_norm_ref(x, residual, weight, bias)
    assert torch.equal(s, want_s) and s.isinf().sum() == 1
    assert torch.equal(y.isnan(), want_y.isnan()) and y.isnan().sum() == 8


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "residual", "weight", "bias", "positions"])
def test_nan_and_inf_reach_what_they_reach_in_pytorch(bad, where):
    made = dict(zip(("x", "residual", "weight", "bias", "positions"), arguments((2, 3, 5, 12)), strict=True))
    made[where].view(-1)[7] = bad
    got, want = add_layer_norm(**made, impl="triton"), add_layer_norm_ref(**made)
    for ours, torchs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, torchs, equal_nan=True)  # infinities too must be equal
    assert not want[1].isfinite().all() and want[1].isfinite().any()


def test_a_constant_row_is_the_bias():
    _, _, weight, bias, _ = arguments((1, 1, 48))
    x = torch.full((2, 3, 48), 1000.0, device=DEVICE)
    assert torch.equal(layer_norm(x, weight, bias, impl="triton"), bias.expand_as(x))


def test_eps():
    x, residual, weight, bias, _ = arguments((2, 3, 12))
    check_both(x * 1e-3, residual * 1e-3, weight, bias, eps=1e-2)
    few, many = (layer_norm(x, weight, bias, eps, impl="triton") for eps in (1e-5, 1e-2))
    assert not torch.allclose(few, many, rtol=1e-4)


def test_views_that_are_not_contiguous():
    x, residual, weight, bias, positions = arguments((3, 2, 5, 24))
    check_both(x.transpose(1, 2), residual.transpose(1, 2), weight, bias, randn(5, 24))
    check_both(x.transpose(0, 1), residual[:1].expand(3, -1, -1, -1).transpose(0, 1), weight, bias, randn(3, 24))
    table = randn(7, 48)
    check_both(x, residual, table[0, ::2], table[:, 3][:1].expand(24), table[5:, 1::2])


def test_dtypes_that_differ():
    """As under autocast: the sum is of the wider dtype; float32 weights beside 16-bit tokens."""
    x, residual, weight, bias, positions = arguments((2, 3, 2, 24), dtype=torch.bfloat16, affine=torch.float32)
    got = add_layer_norm(x, residual.float(), weight, bias, positions=positions, impl="triton")
    want = add_layer_norm_ref(x, residual.float(), weight, bias, positions=positions)
    torch.testing.assert_close(got, want)
    assert got[0].dtype == got[1].dtype == torch.float32
    y = layer_norm(x, weight, bias, positions=positions, impl="triton")
    torch.testing.assert_close(y, layer_norm_ref(x, weight, bias, positions=positions), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_sum_in_the_memory_of_x(dtype):
    x, residual, weight, bias, positions = arguments((2, 3, 5, 40), dtype=dtype)
    want = run_add_layer_norm(x, residual, weight, bias, 1e-5, positions)
    before, kept = x.clone(), residual.clone()
    columns = x.mT.contiguous().mT  # not contiguous: it is copied, and stays what it was
    got = run_add_layer_norm_into(columns, residual, weight, bias, 1e-5, positions)
    assert all(map(torch.equal, got, want)) and torch.equal(columns, before) and torch.equal(x, before)
    got = run_add_layer_norm_into(x, residual, weight, bias, 1e-5, positions)
    assert all(map(torch.equal, got, want)) and got[0].data_ptr() == x.data_ptr() and torch.equal(residual, kept)


def test_more_rows_than_a_grid_axis_counts():
    x, _, weight, bias, positions = arguments((1, 3, 66_000 * tile(7, 4)[0] // 3, 7))
    if DEVICE == "cpu":  # interpreting 66,000 programs takes a minute: the last one alone, and where it would stand
        with record() as launches:
            layer_norm(x.to("meta"), *(t.to("meta") for t in (weight, bias)), impl="triton")
        assert launches[0].grid == (66_000,)
    else:
        check(layer_norm, layer_norm_ref, x, weight, bias, positions=positions)


def test_offsets_beyond_31_bits(monkeypatch):
    """The last rows of 4.3 GB, of which the CPU touches only their pages; interpreted, their program alone runs."""
    rows, d = 2**21 + 1, 1024
    x = torch.empty(1, rows, d, device=DEVICE, dtype=torch.float16)
    tail, weight, bias = (randn(*shape, dtype=x.dtype, seed=i) for i, shape in enumerate([(1, 1, d), (d,), (d,)]))
    x[0, -1:] = tail[0]
    if DEVICE == "cpu":
        builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
        block_r, block_d, _ = tile(d, 2)
        grid, last = -(-rows // block_r), (rows - 1) // block_r
        set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
        monkeypatch.setattr(builder, "set_grid_dim", lambda *dim: set_dim(grid, 1, 1))
        monkeypatch.setattr(builder, "set_grid_idx", lambda *idx: set_idx(last, 0, 0))
        sizes = {"D": d, "BLOCK_R": block_r, "BLOCK_D": block_d, "ADD": False, "PLACE": False}
        launch(layer_norm_kernel(), (1,), x, x, weight, bias, x, x, x, rows, 1, 1, 1e-5, **sizes)
    else:
        x = layer_norm(x, weight, bias, impl="triton")
    torch.testing.assert_close(x[:, -1:], layer_norm_ref(tail, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_backward(dtype):
    made = arguments((2, 3, 5, 12), 10, dtype)
    grads = [randn(2, 3, 5, 12, dtype=dtype, seed=seed) for seed in (5, 6)]
    found = []
    for op, kw in ((add_layer_norm, {"impl": "triton"}), (add_layer_norm_ref, {})):
        x, residual, weight, bias, positions = leaves = [t.detach().requires_grad_() for t in made]
        outputs = op(x, residual, weight, bias, positions=positions, **kw)
        found.append(torch.autograd.grad(outputs, leaves, grads))
    torch.testing.assert_close(found[0], found[1])
    found = []
    for op, kw in ((layer_norm, {"impl": "triton"}), (layer_norm_ref, {})):
        x, _, weight, bias, _ = (t.detach().requires_grad_() for t in made)
        found.append(torch.autograd.grad(op(x, weight, bias, **kw), (x, weight, bias), grads[0]))
    torch.testing.assert_close(found[0], found[1])


def test_what_the_kernel_does_not_take():
    x, residual, weight, bias, _ = (t.double() for t in arguments((1, 2, 3, 8)))
    with pytest.raises(TypeError, match="takes float32, float16 and bfloat16, not torch.float64"):
        layer_norm(x, weight, bias, impl="triton")
    x = randn(1, 1, 16385)
    with pytest.raises(ValueError, match="up to 16384 numbers, not"):
        layer_norm(x, x[0, 0], x[0, 0], impl="triton")


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_shapes_that_do_not_belong_together(impl):
    x, residual, weight, bias, positions = arguments((2, 3, 5, 8))
    for bad in (weight[:1], weight[:, None], randn(9)):
        with pytest.raises(ValueError, match=r"must be \(8,\)"):
            layer_norm(x, bad, bias, impl=impl)
    with pytest.raises(ValueError, match=r"residual \(2, 1, 5, 8\) must be of x's shape \(2, 3, 5, 8\)"):
        add_layer_norm(x, residual[:, :1], weight, bias, impl=impl)
    for bad in (positions[:2], positions[None], positions[:, :4], randn(1, 8)):
        with pytest.raises(ValueError, match="must be .f, d. of x"):
            layer_norm(x, weight, bias, positions=bad, impl=impl)
    with pytest.raises(ValueError, match="must be .f, d. of x"):
        layer_norm(x[0, 0], weight, bias, positions=positions, impl=impl)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_no_tokens(impl):
    x = randn(0, 3, 5, 8)
    for y in add_layer_norm(x, x, randn(8), randn(8), positions=randn(3, 8), impl=impl):
        assert y.shape == (0, 3, 5, 8)


def test_the_environment_asks_too(monkeypatch):
    x, residual, weight, bias, positions = arguments((2, 3, 8))
    want = layer_norm(x, weight, bias, positions=positions, impl="triton")
    monkeypatch.setenv("MINIT2V_KERNELS", "torch,add_layer_norm=triton")
    assert torch.equal(layer_norm(x, weight, bias, positions=positions), want)
