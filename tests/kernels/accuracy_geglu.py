"""geglu's kernel against its definition, and linear against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from judge import DEVICE, DTYPES, check, fenced, fenced_only, new_plans, poisoned, randn

from minit2v_kernels import feed_forward as module
from minit2v_kernels import geglu, geglu_ref, linear
from minit2v_kernels._dispatch import interpreting, launch, record

FAMILIES = ("sm_80", "sm_90", "gfx942", "meta")
SIZES = [  # rows, d, m
    pytest.param(1, 64, 64, id="one-row"),
    pytest.param(70, 8, 5, id="d-8"),
    pytest.param(33, 23, 67, id="odd"),
    pytest.param(70, 80, 96, id="multiples-of-16"),
    pytest.param(130, 128, 130, id="partial-tiles"),
    pytest.param(256, 64, 128, id="whole-tiles"),
    pytest.param(3, 1, 1, id="width-1"),
]


def arguments(rows, d, m, *, mean=0.0, dtype=torch.float32):
    return (
        randn(rows, d, mean=mean, dtype=dtype),
        randn(2 * m, d, std=d**-0.5, dtype=dtype, seed=1),
        randn(2 * m, dtype=dtype, seed=2),
    )


@pytest.fixture
def small_tiles(monkeypatch):
    """Many programs out of few numbers: groups of 8 tiles of rows, and the rest."""
    monkeypatch.setattr(module, "geglu_tile", lambda *sizes: module.tile(16, 16, 16, 4, 2))
    with new_plans(module):
        yield


@pytest.mark.parametrize("rows, d, m", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(rows, d, m, dtype):
    check(geglu, geglu_ref, *arguments(rows, d, m, dtype=dtype))


@pytest.mark.parametrize("mean", [10.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_means(mean, dtype):
    check(geglu, geglu_ref, *arguments(70, 96, 40, mean=mean, dtype=dtype))


@pytest.mark.parametrize("rows, d, m", [(16 * 19 + 3, 40, 45), (16 * 8, 16, 16), (5, 33, 200)])
def test_many_tiles(small_tiles, rows, d, m):
    check(geglu, geglu_ref, *arguments(rows, d, m))


def test_every_axis_before_the_last_is_a_row():
    x, weight, bias = arguments(2 * 3 * 5, 16, 24)
    want = geglu(x, weight, bias, impl="triton")
    assert torch.equal(geglu(x.view(2, 3, 5, 16), weight, bias, impl="triton"), want.view(2, 3, 5, 24))
    assert torch.equal(geglu(x[0], weight, bias, impl="triton"), want[0])


def test_views():
    x, weight, bias = arguments(24, 32, 20)
    moved = x.view(4, 6, 32).transpose(0, 1), weight.t().contiguous().t(), bias.repeat_interleave(2)[::2]
    assert not any(t.is_contiguous() for t in moved)
    check(geglu, geglu_ref, *moved)
    check(geglu, geglu_ref, randn(24, 40)[:, 3:35], randn(42, 32, seed=1)[1:41], randn(43, seed=2)[1:41])


def test_gelu_is_by_erf():
    """Its approximation by tanh is off by up to 5e-4."""
    gate = torch.linspace(-5, 5, 128, dtype=torch.float64)
    x, none = torch.zeros(1, 16, device=DEVICE), torch.zeros(256, 16, device=DEVICE)
    bias = torch.cat([torch.ones(128, dtype=torch.float64), gate])
    got = geglu(x, none, bias.to(DEVICE, torch.float32), impl="triton")[0].double().cpu()
    want = F.gelu(bias.float().double()[128:])
    # 1 + erf(-5 / sqrt(2)) is 6e-7, the difference of two numbers near 1: a few roundings of 1, times gate
    assert ((got - want).abs() <= 1e-6 * want.abs() + 2**-22 * gate.abs()).all()


def test_one_rounding():
    """PyTorch's rounds both halves, the GELU, and the product to 16 bits."""
    x, weight, bias = arguments(64, 64, 64, dtype=torch.float16)
    want = geglu_ref(x.double(), weight.double(), bias.double())
    error = (geglu(x, weight, bias, impl="triton").double() - want).abs()
    assert (error <= 2**-11 * want.abs() + 1e-5).all()
    assert ((geglu_ref(x, weight, bias).double() - want).abs() > 2**-11 * want.abs() + 1e-5).any()


@pytest.mark.parametrize("d", [64, 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_is_not_finite_stays_where_it_is(small_tiles, d, dtype):
    """A NaN or inf in x reaches its row alone, one in the weight or bias its column; each as in PyTorch."""
    x, weight, bias = arguments(40, d, 37, dtype=dtype)
    nan, inf = float("nan"), float("inf")
    x[3, 1], x[39, d - 1], x[17, 0], x[21, 5] = nan, nan, inf, -inf
    weight[7, 2], weight[37 + 9, 3], weight[36, d - 1], weight[73, 0] = nan, nan, inf, -inf
    bias[11], bias[37 + 12], bias[37 + 13], bias[37 + 14] = nan, inf, -inf, nan
    want = geglu_ref(x.double(), weight.double(), bias.double())
    with poisoned():
        got = geglu(x, weight, bias, impl="triton")
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isposinf(), want.isposinf()) and torch.equal(got.isneginf(), want.isneginf())
    assert 100 < want.isfinite().sum() < want.numel() - 300


@fenced_only
@pytest.mark.parametrize("rows, d, m", [(5, 23, 7), (64, 64, 70), (70, 80, 64)])
def test_reads_nothing_beyond(rows, d, m):
    args = arguments(rows, d, m)
    assert torch.equal(geglu(*map(fenced, args), impl="triton"), geglu(*args, impl="triton"))


@pytest.mark.parametrize("frozen", [(), (1, 2), (0,)])
def test_backward(frozen):
    leaves = [t.requires_grad_(i not in frozen) for i, t in enumerate(arguments(12, 20, 9))]
    wanted = [t for t in leaves if t.requires_grad]
    dy = randn(12, 9, seed=3)
    got = torch.autograd.grad(geglu(*leaves, impl="triton"), wanted, dy)
    want = torch.autograd.grad(geglu_ref(*leaves), wanted, dy)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("x, weight, bias", [
    (torch.float64, torch.float64, torch.float64),
    (torch.float16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
])  # fmt: skip
def test_one_dtype_of_16_or_32_bits(x, weight, bias):
    args = arguments(4, 16, 8)
    with pytest.raises(ValueError, match="^geglu: x .*: not one 16- or 32-bit dtype$"):
        geglu(*(t.to(dtype) for t, dtype in zip(args, (x, weight, bias), strict=True)), impl="triton")


@pytest.mark.parametrize("shapes", [[(4, 8), (10, 9), (10,)], [(4, 8), (9, 8), (9,)], [(4, 8), (10, 8), (5,)]])
def test_shapes_that_do_not_fit(shapes):
    with pytest.raises(ValueError, match=r"^geglu: x, weight and bias must .*, not \(4, 8\), \(\d+, \d\), \(\d+,\)$"):
        geglu(*(torch.ones(shape, device=DEVICE) for shape in shapes), impl="triton")


@pytest.mark.parametrize("target", FAMILIES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_cover_the_result(target, itemsize):
    for m in (1, 127, 128, 65_536 * 128 + 1, 2**31):
        for n, k in ((1, 1), (5, 8), (1280, 320), (5120, 1280), (2048, 512)):
            tile = module.geglu_tile(m, n, k, itemsize, target)
            count = module.programs(m, n, tile)
            across, down = -(-n // tile["BLOCK_N"]), count // -(-n // tile["BLOCK_N"])
            assert across * down == count and down * tile["BLOCK_M"] >= m > (down - 1) * tile["BLOCK_M"]
            assert across * tile["BLOCK_N"] >= n > (across - 1) * tile["BLOCK_N"]
            assert all(size & size - 1 == 0 and size >= 16 for name, size in tile.items() if "BLOCK" in name)


def test_tiles_of_the_models():
    """Large where there is work for all multiprocessors; one program at a time where a family has room for it."""
    sizes = {"sm_80": (128, 64), "sm_90": (128, 128), "gfx942": (128, 64)}
    for target, (block_m, block_n) in sizes.items():
        tile = module.geglu_tile(32768, 2560, 640, 2, target)
        assert (tile["BLOCK_M"], tile["BLOCK_N"]) == (block_m, block_n)
        # A stage holds a tile of x and two of the weight. AMD keeps one stage less in shared memory.
        stage = 2 * tile["BLOCK_K"] * (tile["BLOCK_M"] + 2 * tile["BLOCK_N"])
        room = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}[target]
        assert stage * (tile["num_stages"] - target.startswith("gfx")) <= room
        assert module.geglu_tile(32768, 2560, 80, 2, target)["BLOCK_K"] == 16
    assert module.geglu_tile(32768, 1280, 320, 2, "sm_90") != module.geglu_tile(32768, 2048, 512, 2, "sm_90")
    assert module.programs(256, 5120, module.geglu_tile(256, 5120, 1280, 2, "sm_90")) >= 132


def test_a_smaller_tile_must_gain_a_tenth():
    """By the multiprocessor with the most programs, of 132."""
    large, small = module.tile(128, 128, 64, 8, 3), module.tile(64, 64, 64, 4, 3)
    best = {(m, n): module.best_tile(m, n, (large, small), "sm_90")["BLOCK_M"] for m, n in
            ((128 * 132, 128), (128 * 133, 128), (128 * 66, 128), (128 * 1320, 128), (128 * 660, 192))}  # fmt: skip
    # one each; one has two, and four small ones in five; half are idle; ten each; a third of a tile is outside
    assert best == {(16896, 128): 128, (17024, 128): 64, (8448, 128): 64, (168960, 128): 128, (84480, 192): 64}


def test_rows_beyond_any_grid_axis_but_the_first():
    x, weight = torch.empty(70_000 * 128, 64, device="meta"), torch.empty(8, 64, device="meta")
    with record() as launches:
        geglu(x, weight, torch.empty(8, device="meta"), impl="triton")
    (only,) = launches
    assert len(only.grid) == 1 and only.grid[0] > 65_535


@pytest.mark.parametrize("d, m", [(64, 16), (16, 64)], ids=["x", "y"])
def test_offsets_beyond_2_31(monkeypatch, d, m):
    """The last tile of more elements than an int32 counts. Interpreted, it alone runs: the rest is never touched."""
    rows = 2**31 // 64 + 40
    assert rows * max(d, m) > 2**31
    x = torch.empty(rows, d, dtype=torch.float16, device=DEVICE)
    last, weight, bias = arguments(16, d, m, dtype=torch.float16)
    x[-16:] = last
    if interpreting():
        import numpy
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle, interpreter_builder

        number = module.programs(rows, m, module.geglu_tile(rows, m, d, 2, "cpu")) - 1
        handle = TensorHandle(numpy.array([number], dtype=numpy.int32), tl.int32)
        monkeypatch.setattr(interpreter_builder, "create_get_program_id", lambda axis: handle)
        monkeypatch.setattr(module, "launch", lambda kernel, grid, *args, **kw: launch(kernel, (1,), *args, **kw))
    with torch.no_grad():
        got = geglu(x, weight, bias, impl="triton")[-16:]
    torch.testing.assert_close(got, geglu_ref(last, weight, bias), atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_linear(grad, dtype):
    x, weight, bias = arguments(30, 24, 10, dtype=dtype)
    weight.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        for b in (bias, None):
            y = linear(x.view(5, 6, 24), weight, b)
            torch.testing.assert_close(y, F.linear(x, weight, b).view(5, 6, 20))
            assert y.requires_grad == grad


def test_the_definition_is_in_place_and_has_gradients():
    x, weight, bias = (t.double().requires_grad_() for t in arguments(6, 8, 5))
    value, gate = F.linear(x, weight, bias).chunk(2, -1)
    assert torch.equal(geglu_ref(x, weight, bias), value * F.gelu(gate))
    assert torch.autograd.gradcheck(geglu_ref, (x, weight, bias))
