"""temporal_conv's kernel against its definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from judge import DEVICE, DTYPES, check, fenced, fenced_only, new_plans, pairwise, poisoned, randn

from minit2v_kernels import conv as module
from minit2v_kernels import feed_forward, temporal_conv, temporal_conv_ref
from minit2v_kernels._dispatch import interpreting, launch, record

FAMILIES = ("sm_80", "sm_90", "gfx942", "meta")
SIZES = [  # b, c, f, p, c_out
    pytest.param(1, 64, 16, 4, 64, id="whole-tiles"),
    pytest.param(2, 8, 3, 5, 7, id="c-8"),
    pytest.param(1, 23, 5, 17, 70, id="odd"),
    pytest.param(2, 80, 2, 9, 32, id="two-frames"),
    pytest.param(3, 64, 1, 7, 40, id="one-frame"),
    pytest.param(2, 16, 6, 1, 16, id="one-pixel"),
    pytest.param(1, 1, 1, 1, 1, id="one-number"),
]


def arguments(b, c, f, p, n, *, mean=0.0, dtype=torch.float32, residual=False):
    """x and the residual in channels-last memory; weight and bias as a convolution has them."""
    x = randn(b, f, p, c, mean=mean, dtype=dtype).permute(0, 3, 1, 2)
    weight = randn(n, c, 3, 1, 1, std=(3 * c) ** -0.5, dtype=dtype, seed=1)
    args = x, weight, randn(n, dtype=dtype, seed=2)
    return args, {"residual": randn(b, f, p, n, dtype=dtype, seed=3).permute(0, 3, 1, 2) if residual else None}


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """By default a GPU's convolutions round float32 to 10 bits: nothing to be judged beside."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def small_tiles(monkeypatch):
    """Many programs out of few numbers; tiles within one frame, across frames, and across videos."""
    monkeypatch.setattr(module, "product_tile", lambda *sizes: feed_forward.tile(16, 16, 16, 4, 2))
    with new_plans(module):
        yield


@pytest.mark.parametrize("b, c, f, p, n, dtype, residual", pairwise(SIZES, DTYPES, [False, True]))
def test_forward(b, c, f, p, n, dtype, residual):
    args, kw = arguments(b, c, f, p, n, dtype=dtype, residual=residual)
    y = check(temporal_conv, temporal_conv_ref, *args, **kw)
    assert y.permute(0, 2, 3, 1).is_contiguous(), "not in channels-last memory"


@pytest.mark.parametrize("mean", [10.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_means(mean, dtype):
    args, kw = arguments(2, 96, 4, 6, 40, mean=mean, dtype=dtype, residual=True)
    check(temporal_conv, temporal_conv_ref, *args, **kw)


@pytest.mark.parametrize("b, c, f, p, n", [(2, 32, 3, 50, 20), (3, 23, 4, 7, 40), (5, 16, 2, 2, 16), (1, 33, 1, 70, 9)])
def test_many_tiles(small_tiles, b, c, f, p, n):
    args, kw = arguments(b, c, f, p, n, residual=True)
    check(temporal_conv, temporal_conv_ref, *args, **kw)


def test_it_is_a_convolution_of_a_video():
    (x, weight, bias), _ = arguments(2, 16, 4, 15, 24)
    want = F.conv3d(x.unflatten(-1, (3, 5)), weight, bias, padding=(1, 0, 0)).flatten(-2)
    for impl in ("torch", "triton"):
        torch.testing.assert_close(temporal_conv(x, weight, bias, impl=impl), want)


def test_views():
    (x, weight, bias), kw = arguments(2, 16, 4, 6, 24, residual=True)
    want = check(temporal_conv, temporal_conv_ref, x, weight, bias, **kw)
    moved = {"residual": kw["residual"].contiguous()}
    assert torch.equal(temporal_conv(x.contiguous(), weight, bias, **moved, impl="triton"), want)
    frames = x.transpose(1, 2).contiguous().transpose(1, 2)  # frames outside channels, as a network's first layers are
    assert not frames.is_contiguous() and not frames.is_contiguous(memory_format=torch.channels_last)
    other = weight.contiguous(memory_format=torch.channels_last_3d), bias.repeat_interleave(2)[::2]
    assert torch.equal(temporal_conv(frames, *other, **kw, impl="triton"), want)
    check(temporal_conv, temporal_conv_ref, randn(1, 2, 3, 40).permute(0, 3, 1, 2)[:, 5:21], weight, bias)


def test_what_is_in_channels_last_memory_is_read_where_it_is():
    (x, weight, bias), kw = arguments(1, 16, 4, 6, 24, residual=True)
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    with record() as launches:
        temporal_conv(x, weight, bias, **kw, impl="triton")
    pointers = [a.data_ptr() for a in launches[0].args if isinstance(a, torch.Tensor)]
    assert pointers[:4] == [x.data_ptr(), weight.data_ptr(), bias.data_ptr(), kw["residual"].data_ptr()]


def test_one_rounding():
    """Bias and residual are added before the sum is rounded."""
    args, kw = arguments(1, 32, 4, 16, 32, dtype=torch.float16, residual=True)
    want = temporal_conv_ref(*(t.double() for t in args), kw["residual"].double())
    got = temporal_conv(*args, **kw, impl="triton").double()
    assert ((got - want).abs() <= 2**-11 * want.abs() + 1e-5).all()


@pytest.mark.parametrize("value, c, dtype", pairwise([math.nan, math.inf, -math.inf], [64, 23], DTYPES[:2]))
def test_what_is_not_finite_stays_where_it_is(small_tiles, c, value, dtype):
    """It reaches its pixel in its frame and the two beside it: never the video before or after, nor another pixel."""
    (x, weight, bias), kw = arguments(3, c, 4, 9, 20, dtype=dtype, residual=True)
    weight = torch.where(weight == 0, torch.ones_like(weight), weight)  # inf * 0 would be NaN
    spots = [(0, 3, 8, 1), (1, 0, 0, 0), (1, 2, 5, c - 1), (2, 3, 8, 0)]  # ends of videos, and the middle
    reached = torch.zeros(3, 4, 9, dtype=torch.bool, device=DEVICE)
    for b, f, p, channel in spots:
        x[b, channel, f, p] = value
        reached[b, max(0, f - 1) : f + 2, p] = True
    kw["residual"][2, 7, 0, 3] = value
    with poisoned():
        got = temporal_conv(x, weight, bias, **kw, impl="triton")
    want = temporal_conv_ref(x.double(), weight.double(), bias.double(), kw["residual"].double())
    for of in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(of(got), of(want))
    assert not got[2, 7, 0, 3].isfinite()
    got[2, 7, 0, 3] = 0
    assert torch.equal((~got.isfinite()).all(1), reached) and torch.equal((~got.isfinite()).any(1), reached)


def test_what_is_not_finite_in_the_weight():
    """In the middle tap. What the others do with the zeros beyond an end differs between PyTorch's own backends."""
    (x, weight, bias), kw = arguments(2, 16, 3, 5, 12)
    weight[4, 3, 1], weight[5, 0, 1], bias[6] = float("nan"), float("inf"), float("-inf")
    got, want = (temporal_conv(x, weight, bias, impl=impl) for impl in ("triton", "torch"))
    for of in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(of(got), of(want))
    assert got[:, [0, 1, 2, 3, 7, 8, 9, 10, 11]].isfinite().all()


def test_a_tap_outside_the_video_is_left_out(small_tiles):
    """Where it is outside for a whole tile: its weight is not even looked at."""
    (x, weight, bias), _ = arguments(2, 24, 3, 32, 16)
    for tap, frame in ((0, 0), (2, 2)):
        hurt = weight.clone()
        hurt[:, :, tap] = float("nan")
        got = temporal_conv(x, hurt, bias, impl="triton")
        assert torch.equal(got[:, :, frame], temporal_conv(x, weight, bias, impl="triton")[:, :, frame])
        assert got.isnan().sum() == 2 / 3 * got.numel()


@fenced_only
@pytest.mark.parametrize("b, c, f, p, n", [(2, 23, 3, 5, 7), (1, 64, 2, 16, 70), (1, 80, 1, 3, 33)])
def test_reads_nothing_beyond(b, c, f, p, n):
    args, kw = arguments(b, c, f, p, n, residual=True)
    x, residual = (fenced(t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for t in (args[0], kw["residual"]))
    weight = fenced(args[1].flatten(2).transpose(1, 2)).transpose(1, 2)[..., None, None]
    got = temporal_conv(x, weight, fenced(args[2]), residual=residual, impl="triton")
    assert torch.equal(got, temporal_conv(*args, **kw, impl="triton"))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("frozen", [(), (1, 2), (0,)])
def test_backward(residual, frozen):
    args, kw = arguments(2, 6, 3, 4, 5, residual=residual)
    leaves = [t.requires_grad_(i not in frozen) for i, t in enumerate(args)]
    if residual:
        kw["residual"].requires_grad_()
    wanted = [t for t in (*leaves, kw["residual"]) if t is not None and t.requires_grad]
    dy = randn(2, 5, 3, 4, seed=4)
    got = torch.autograd.grad(temporal_conv(*leaves, **kw, impl="triton"), wanted, dy)
    want = torch.autograd.grad(temporal_conv_ref(*leaves, kw["residual"]), wanted, dy)
    torch.testing.assert_close(got, want)


def test_the_residual_is_not_written_to():
    args, kw = arguments(1, 8, 3, 4, 8, residual=True)
    before = kw["residual"].clone()
    for impl in ("torch", "triton"):
        y = temporal_conv(*args, **kw, impl=impl)
        assert torch.equal(kw["residual"], before) and y.data_ptr() != kw["residual"].data_ptr()


@pytest.mark.parametrize("x, weight, bias", [
    (torch.float64, torch.float64, torch.float64),
    (torch.float16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
])  # fmt: skip
def test_one_dtype_of_16_or_32_bits(x, weight, bias):
    args, _ = arguments(1, 8, 2, 2, 8)
    with pytest.raises(ValueError, match="^temporal_conv: x .*: not one 16- or 32-bit dtype$"):
        temporal_conv(*(t.to(dtype) for t, dtype in zip(args, (x, weight, bias), strict=True)), impl="triton")


@pytest.mark.parametrize("weight, bias, residual", [
    ((5, 9, 3, 1, 1), (5,), None),
    ((5, 8, 3), (5,), None),
    ((5, 8, 1, 1, 1), (5,), None),
    ((5, 8, 3, 1, 1), (8,), None),
    ((5, 8, 3, 1, 1), (5,), (2, 8, 3, 4)),
    ((8, 8, 3, 1, 1), (8,), (1, 8, 3, 4)),
])  # fmt: skip
def test_shapes_that_do_not_fit(weight, bias, residual):
    args = [torch.ones(shape, device=DEVICE) for shape in ((2, 8, 3, 4), weight, bias)]
    kw = {"residual": torch.ones(residual, device=DEVICE) if residual else None}
    with pytest.raises(ValueError, match=r"^temporal_conv: x, weight, bias and residual must .*, not \(2, 8, 3, 4\), "):
        temporal_conv(*args, **kw, impl="triton")


@pytest.mark.parametrize("target", FAMILIES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_cover_the_result(target, itemsize):
    for m in (1, 255, 256, 65_536 * 256 + 1, 2**31):
        for n, c in ((1, 1), (7, 8), (320, 320), (640, 640), (1280, 1280)):
            tile = module.product_tile(m, n, c, itemsize, target)
            count = module.programs(m, n, tile)
            across, down = -(-n // tile["BLOCK_N"]), count // -(-n // tile["BLOCK_N"])
            assert across * down == count and down * tile["BLOCK_M"] >= m > (down - 1) * tile["BLOCK_M"]
            assert across * tile["BLOCK_N"] >= n > (across - 1) * tile["BLOCK_N"]
            assert all(size & size - 1 == 0 and size >= 16 for name, size in tile.items() if "BLOCK" in name)


def test_tiles_of_the_models():
    """Few rows get smaller tiles; and what is in flight has room in shared memory."""
    for target, room in {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}.items():
        tiles = [module.product_tile(m, n, n, 2, target) for m, n in ((138240, 320), (2160, 1280), (512, 1280))]
        areas = [tile["BLOCK_M"] * tile["BLOCK_N"] for tile in tiles]
        assert areas[0] > max(areas[1:])
        for tile in tiles:
            stage = 2 * tile["BLOCK_K"] * (tile["BLOCK_M"] + tile["BLOCK_N"])
            assert stage * (tile["num_stages"] - target.startswith("gfx")) <= room
        assert module.product_tile(138240, 80, 80, 2, target)["BLOCK_K"] == 16


def test_rows_beyond_any_grid_axis_but_the_first():
    x = torch.empty(1, 64, 16, 700_000, device="meta")
    with record() as launches:
        temporal_conv(x, torch.empty(64, 64, 3, 1, 1, device="meta"), torch.empty(64, device="meta"), impl="triton")
    (only,) = launches
    assert len(only.grid) == 1 and only.grid[0] > 65_535


@pytest.mark.parametrize("c, n", [(64, 16), (16, 64)], ids=["x", "y"])
def test_offsets_beyond_2_31(monkeypatch, c, n):
    """The last tile of more elements than an int32 counts. Interpreted, it alone runs: the rest is never touched."""
    p = 2**31 // 64 // 3 + 9
    assert 3 * p * max(c, n) > 2**31
    x = torch.empty(1, 3, p, c, dtype=torch.float16, device=DEVICE)
    x[:, :, -16:] = randn(1, 3, 16, c, dtype=torch.float16)
    (_, weight, bias), _ = arguments(1, c, 1, 1, n, dtype=torch.float16)
    if interpreting():
        import numpy
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle, interpreter_builder

        number = module.programs(3 * p, n, module.product_tile(3 * p, n, c, 2, "cpu")) - 1
        handle = TensorHandle(numpy.array([number], dtype=numpy.int32), tl.int32)
        monkeypatch.setattr(interpreter_builder, "create_get_program_id", lambda axis: handle)
        monkeypatch.setattr(module, "launch", lambda kernel, grid, *args, **kw: launch(kernel, (1,), *args, **kw))
    with torch.no_grad():
        got = temporal_conv(x.permute(0, 3, 1, 2), weight, bias, impl="triton")[:, :, 2, -16:]
    want = temporal_conv_ref(x[:, :, -16:].permute(0, 3, 1, 2), weight, bias)[:, :, 2]
    torch.testing.assert_close(got, want, atol=4e-3, rtol=4e-3)


def test_the_definition_has_gradients():
    args, kw = arguments(1, 3, 3, 2, 2, residual=True)
    leaves = [t.double().requires_grad_() for t in (*args, kw["residual"])]
    assert torch.autograd.gradcheck(temporal_conv_ref, leaves)
