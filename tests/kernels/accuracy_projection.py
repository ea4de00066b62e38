"""linear_add's kernel against its definition."""

import pytest
import torch
from judge import DEVICE, DTYPES, check, fenced, fenced_only, new_plans, poisoned, randn

from minit2v_kernels import feed_forward, linear_add, linear_add_ref
from minit2v_kernels import projection as module
from minit2v_kernels._dispatch import interpreting, launch, record

SIZES = [  # rows, d, m
    pytest.param(1, 64, 64, id="one-row"), pytest.param(33, 23, 67, id="odd"),
    pytest.param(70, 80, 96, id="multiples-of-16"), pytest.param(130, 128, 130, id="partial-tiles"),
    pytest.param(3, 1, 1, id="width-1"),
]  # fmt: skip


def arguments(rows, d, m, *, mean=0.0, dtype=torch.float32):
    x, weight = randn(rows, d, mean=mean, dtype=dtype), randn(m, d, std=d**-0.5, dtype=dtype, seed=1)
    return x, weight, randn(m, dtype=dtype, seed=2), randn(rows, m, mean=mean, dtype=dtype, seed=3)


@pytest.fixture
def small_tiles(monkeypatch):
    """Many programs out of few numbers: groups of 8 tiles of rows, and the rest."""
    monkeypatch.setattr(module, "product_tile", lambda *sizes: feed_forward.tile(16, 16, 16, 4, 2))
    with new_plans(module):
        yield


@pytest.mark.parametrize("rows, d, m", SIZES)
@pytest.mark.parametrize("mean, dtype", [(0, DTYPES[0]), (100, DTYPES[0]), (10, DTYPES[1]), (100, DTYPES[2])])
def test_forward(rows, d, m, mean, dtype):
    check(linear_add, linear_add_ref, *arguments(rows, d, m, mean=mean, dtype=dtype))


@pytest.mark.parametrize("rows, d, m", [(16 * 19 + 3, 40, 45), (16 * 8, 16, 16), (5, 33, 200)])
def test_many_tiles(small_tiles, rows, d, m):
    check(linear_add, linear_add_ref, *arguments(rows, d, m))


def test_views_and_axes():
    x, weight, bias, residual = arguments(24, 32, 20)
    x, residual = (t.view(4, 6, -1).transpose(0, 1) for t in (x, residual))
    moved = x, weight.t().contiguous().t(), bias.repeat_interleave(2)[::2], residual
    assert not any(t.is_contiguous() for t in moved)
    assert check(linear_add, linear_add_ref, *moved).shape == (6, 4, 20)


def test_one_rounding():
    """PyTorch's rounds the product, and then the sum."""
    args = arguments(64, 64, 64, dtype=torch.float16)
    want = linear_add_ref(*(t.double() for t in args))
    far = 2**-11 * want.abs() + 1e-5
    assert ((linear_add(*args, impl="triton").double() - want).abs() <= far).all()
    assert ((linear_add_ref(*args).double() - want).abs() > far).any()


@pytest.mark.parametrize("d", [64, 23])
def test_what_is_not_finite_stays_where_it_is(small_tiles, d):
    """In x it reaches its row alone, in the weight or bias its column, in the residual one number."""
    x, weight, bias, residual = arguments(40, d, 37)
    nan, inf = float("nan"), float("inf")
    x[3, 1], x[39, d - 1], x[17, 0], weight[7, 2], weight[36, d - 1], bias[11] = nan, nan, inf, nan, inf, -inf
    residual[5, 5], residual[39, 36] = nan, inf
    want = linear_add_ref(*(t.double() for t in (x, weight, bias, residual)))
    with poisoned():
        got = linear_add(x, weight, bias, residual, impl="triton")
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isposinf(), want.isposinf()) and torch.equal(got.isneginf(), want.isneginf())


@fenced_only
@pytest.mark.parametrize("rows, d, m", [(5, 23, 7), (64, 64, 70)])
def test_reads_nothing_beyond(rows, d, m):
    args = arguments(rows, d, m)
    assert torch.equal(linear_add(*map(fenced, args), impl="triton"), linear_add(*args, impl="triton"))


def test_backward():
    leaves = [t.requires_grad_() for t in arguments(12, 20, 9)]
    dy = randn(12, 9, seed=4)
    got = torch.autograd.grad(linear_add(*leaves, impl="triton"), leaves, dy)
    torch.testing.assert_close(got, torch.autograd.grad(linear_add_ref(*leaves), leaves, dy))


@pytest.mark.parametrize("shapes", [
    [(4, 8), (5, 9), (5,), (4, 5)], [(4, 8), (5, 8), (6,), (4, 5)], [(4, 8), (5, 8), (5,), (4, 6)],
    [(4, 8), (5, 8), (5,), (3, 5)],
])  # fmt: skip
def test_shapes_that_do_not_fit(shapes):
    with pytest.raises(ValueError, match=r"^linear_add: x, weight, bias, residual must .*, not \(4, 8\), \(5, \d\)"):
        linear_add(*(torch.ones(shape, device=DEVICE) for shape in shapes), impl="triton")


def test_one_dtype():
    x, *others = arguments(4, 8, 5)
    with pytest.raises(ValueError, match="^linear_add: x torch.float16, weight .*: not one 16- or 32-bit dtype$"):
        linear_add(x.half(), *others, impl="triton")


@pytest.mark.parametrize("d, m", [(64, 16), (16, 64)], ids=["x", "y"])
def test_offsets_beyond_2_31(monkeypatch, d, m):
    """The last tile of more elements than an int32 counts. Interpreted, it alone runs: the rest is never touched."""
    rows = 2**31 // 64 + 40
    x, residual = (torch.empty(rows, width, dtype=torch.float16, device=DEVICE) for width in (d, m))
    x[-16:], weight, bias, residual[-16:] = args = arguments(16, d, m, dtype=torch.float16)
    if interpreting():
        import numpy
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle, interpreter_builder

        number = feed_forward.programs(rows, m, feed_forward.product_tile(rows, m, d, 2, "cpu")) - 1
        handle = TensorHandle(numpy.array([number], dtype=numpy.int32), tl.int32)
        monkeypatch.setattr(interpreter_builder, "create_get_program_id", lambda axis: handle)
        monkeypatch.setattr(module, "launch", lambda kernel, grid, *args, **kw: launch(kernel, (1,), *args, **kw))
    with torch.no_grad():
        got = linear_add(x, weight, bias, residual, impl="triton")[-16:]
    torch.testing.assert_close(got, linear_add_ref(*args), atol=4e-3, rtol=4e-3)


def test_rows_beyond_any_grid_axis_but_the_first():
    x, weight = torch.empty(70_000 * 128, 64, device="meta"), torch.empty(8, 64, device="meta")
    with record() as launches:
        linear_add(x, weight, torch.empty(8, device="meta"), x[:, :8], impl="triton")
    (only,) = launches
    assert len(only.grid) == 1 and only.grid[0] > 65_535
