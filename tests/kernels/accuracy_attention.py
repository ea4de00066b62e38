"""temporal_attention: its definition against a plainer one, and its kernel against its definition."""

import math
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from judge import DEVICE, DTYPES, check, fenced, fenced_only, new_plans, pairwise, poisoned, randn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minit2v_kernels import attention, temporal_attention, temporal_attention_ref
from minit2v_kernels._dispatch import interpreting, launch, record

MASKS = {  # name: causal, window
    "all": (False, None), "causal": (True, None), "window": (False, 3), "both": (True, 3), "wide": (False, 40),
}  # fmt: skip
INF, NAN = float("inf"), float("nan")


def fused(b: int, f: int, p: int, h: int, d: int, **kw) -> tuple[torch.Tensor, ...]:
    """q, k and v as views of what one projection wrote."""
    return randn(b, f, p, 3, h, d, **kw).unbind(3)


def judge(q, k, v, mask="all"):
    causal, window = MASKS[mask]
    y = check(temporal_attention, partial(temporal_attention, impl="torch"), q, k, v, causal=causal, window=window)
    assert y.is_contiguous()
    return y


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("frames", [1, 2, 5, 8])
def test_the_definition(frames, mask):
    causal, window = MASKS[mask]
    q, k, v = fused(2, frames, 3, 2, 8, dtype=torch.float64)
    want = torch.empty_like(q)
    for b, i, p, h in product(range(2), range(frames), range(3), range(2)):
        seen = [j for j in range(frames) if (j <= i or not causal) and (window is None or abs(i - j) < window)]
        scores = [math.exp(q[b, i, p, h] @ k[b, j, p, h] / 8**0.5) for j in seen]
        want[b, i, p, h] = sum(s * v[b, j, p, h] for s, j in zip(scores, seen, strict=True)) / sum(scores)
    got = temporal_attention(q, k, v, causal=causal, window=window, impl="torch")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert got.is_contiguous()


@pytest.mark.parametrize("mask", ["all", "both"])
@pytest.mark.parametrize("limit", [2, 7, 65535])
def test_the_definition_of_separate_tensors_and_of_views(limit, mask, monkeypatch):
    """By heads and by batch, in more calls where a GPU would need them: the same numbers."""
    causal, window = MASKS[mask]
    views = fused(2, 4, 5, 3, 8)
    want = temporal_attention_ref(*(x.contiguous() for x in views), causal, window)
    monkeypatch.setattr(attention, "MAX_HEADS", limit)
    for q, k, v in (views, [x.contiguous() for x in views], (views[0], views[1].contiguous(), views[2])):
        torch.testing.assert_close(temporal_attention_ref(q, k, v, causal, window), want)


def test_the_definition_moves_nothing_where_tensors_are_separate(monkeypatch):
    q, k, v = (x.contiguous() for x in fused(2, 4, 5, 3, 8))
    given = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kw: given.append(args) or real(*args, **kw))
    y = temporal_attention(q, k, v, impl="torch")
    assert [x.data_ptr() for x in given[0]] == [x.data_ptr() for x in (q, k, v)] and len(given) == 1
    want = real(*(x.flatten(2, 3).transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert torch.equal(y, want.unflatten(2, (5, 3))) and y.is_contiguous()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("frames", [1, 2, 3, 7, 16, 24, 32, 33, 64, 65, 100])
def test_frames(frames, mask):
    judge(*fused(1, frames, 1 if frames > 8 else 9, 1, 16, dtype=torch.float16), mask)


@pytest.mark.parametrize("frames", [65, 100])
@pytest.mark.parametrize("mask", ["all", "both"])
def test_frames_beyond_a_tile_in_float32(frames, mask):
    judge(*fused(2, frames, 2, 1, 8), mask)


@pytest.mark.parametrize("head_dim, dtype, frames", pairwise([1, 8, 17, 40, 64, 80, 96, 160], DTYPES, [3, 35]))
def test_head_dims(head_dim, frames, dtype):
    judge(*fused(1, frames, 2, 2, head_dim, dtype=dtype))


@pytest.mark.parametrize("mean, frames, dtype", pairwise([0, 10, 100], [6, 16, 40], DTYPES))
def test_means(mean, frames, dtype):
    judge(*fused(2, frames, 3, 2, 24, mean=mean, dtype=dtype))


def layouts() -> dict[str, tuple[torch.Tensor, ...]]:
    """q, k, v (2 6 3 2 8) as views of all kinds."""
    q, k, v = (x.contiguous() for x in fused(2, 6, 3, 2, 8))
    wide = torch.cat([randn(2, 6, 3, 2, 4, seed=1), q], -1)[..., 4:]
    odd = torch.cat([q.new_zeros(1), *(x.flatten() for x in (q, k, v))])[1:]
    return {
        "fused": fused(2, 6, 3, 2, 8),
        "separate": (q, k, v),
        "a part of a wider projection": randn(2, 6, 3, 5, 2, 8, seed=2).unbind(3)[1:4],
        "pixels as batch": tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)),
        "every other frame and pixel": tuple(randn(3, 2, 12, 6, 2, 8, seed=3)[:, :, ::2, 1::2]),
        "one frame for all, as an expanded view": tuple(x[:, :1].expand(-1, 6, -1, -1, -1) for x in (q, k, v)),
        "strides that differ": (q, *randn(2, 6, 3, 2, 2, 8, seed=4).unbind(3)),
        "heads apart": (wide, wide, wide),
        "heads before pixels": tuple(x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)),
        "channels not last": tuple(x.transpose(3, 4).contiguous().transpose(3, 4) for x in (q, k, v)),
        "of odd address": odd.view(3, *q.shape).unbind(),
    }


@pytest.mark.parametrize("name", layouts())
def test_layouts(name):
    q, k, v = layouts()[name]
    assert q.shape == (2, 6, 3, 2, 8)
    got = judge(q, k, v, "causal")
    assert torch.equal(got, temporal_attention(*(x.contiguous() for x in (q, k, v)), causal=True, impl="triton"))


@pytest.mark.parametrize(
    "shape", [(1, 6, 5, 1, 8), (3, 6, 1, 2, 8), (1, 1, 1, 1, 1), (2, 1, 40, 1, 4), (4, 2, 3, 5, 7)]
)
def test_axes_of_one(shape):
    judge(*fused(*shape))


@pytest.mark.parametrize("shape", [(0, 4, 3, 2, 8), (2, 4, 0, 2, 8), (2, 0, 3, 2, 8)])
def test_nothing(shape):
    x = torch.empty(shape, device=DEVICE)
    assert temporal_attention(x, x, x, impl="triton").shape == shape


@pytest.mark.parametrize("seed", range(6))
def test_random_shapes(seed):
    draw = torch.Generator().manual_seed(seed)
    b, f, p, h, d = (int(torch.randint(1, top, (), generator=draw)) for top in (4, 40, 12, 4, 50))
    judge(*fused(b, f, p, h, d, dtype=DTYPES[seed % 3], seed=seed), list(MASKS)[seed % 5])


def expected(q, k, v, causal=False, window=None):
    """By PyTorch's plain kernel: the fused one of its CPU returns 0 where all scores of a row are NaN."""
    with sdpa_kernel(SDPBackend.MATH):
        return temporal_attention_ref(q, k, v, causal, window)


@pytest.mark.parametrize("frames, what, value", pairwise([1, 5, 16, 70], range(3), [NAN, INF, -INF]))
def test_nan_and_inf_poison_what_they_do_in_pytorch(frames, what, value):
    """And not the other pixels of their tile, which are summed with a weight of zero; nor other heads."""
    qkv = [x.clone() for x in fused(1, frames, 3, 2, 8)]
    qkv[what][0, frames // 2, 1, 1, 3] = value
    want = expected(*qkv)
    with poisoned():
        got = temporal_attention(*qkv, impl="triton")
    torch.testing.assert_close(got, want, equal_nan=True)
    assert what == 0 or not got.isfinite().all() or value == -INF or frames == 1
    assert got[:, :, [0, 2]].isfinite().all() and got[..., 0, :].isfinite().all()


def test_many_poisoned_pixels():
    q, k, v = (x.clone() for x in fused(2, 3, 11, 1, 40, dtype=torch.float16))
    # of tiles of 5 pixels and heads of 32 + 8 channels: two in one tile, one among the 8, one in a tile of its own
    v[0, 1, 2], v[0, 2, 4, 0, 39], v[1, 0, 8, 0, 33], k[1, 2, 10] = NAN, INF, -INF, NAN
    got = temporal_attention(q, k, v, impl="triton")
    torch.testing.assert_close(got, expected(q, k, v), equal_nan=True, atol=2e-3, rtol=2e-3)
    assert got.isnan().any() and got.isinf().any()


@pytest.mark.parametrize("frames", [4, 16])
def test_scores_that_are_all_minus_inf(frames):
    q, k, v = (x.clone() for x in fused(1, frames, 3, 1, 8))
    q[:, :, 1], k[:, :, 1] = 1, -INF
    got = temporal_attention(q, k, v, impl="triton")
    torch.testing.assert_close(got, expected(q, k, v))
    assert not got[:, :, 1].any() and got[:, :, 0].all()


@pytest.mark.parametrize("mask", ["causal", "window", "both"])
@pytest.mark.parametrize("what", [1, 2], ids=["k", "v"])
@pytest.mark.parametrize("frames", [6, 70])
def test_nan_under_a_mask(frames, what, mask):
    """Reaches all that see it; of those that do not, at most those that it reaches in PyTorch."""
    causal, window = MASKS[mask]
    qkv = [x.clone() for x in fused(1, frames, 2, 1, 8)]
    at = frames // 2
    qkv[what][0, at, 0, 0] = NAN
    got = temporal_attention(*qkv, causal=causal, window=window, impl="triton").isnan()[0, :, :, 0].all(-1)
    sees = [(i >= at or not causal) and (window is None or abs(i - at) < window) for i in range(frames)]
    assert got[sees, 0].all() and not got[:, 1].any()
    assert not (got & ~expected(*qkv, causal, window).isnan()[0, :, :, 0].all(-1)).any()


def test_more_sequences_than_a_grid_axis_counts(monkeypatch):
    if interpreting():  # fewer, larger programs, for the sake of time
        monkeypatch.setattr(attention, "tile", lambda *args: (1024, 1024, 4))
    q, k, v = fused(1, 1, 9001, 8, 4)
    assert q[0, 0, ..., 0].numel() > 65535 * 1.09
    with new_plans(attention):
        assert torch.equal(temporal_attention(q, k, v, impl="triton"), v)


@pytest.mark.parametrize("axis", range(3), ids="bfp")
def test_strides_beyond_2_31(axis):
    """In memory that is never touched, and so never there, but for a few pages."""
    far = torch.empty(2**31 + 2**12, dtype=torch.float16, device=DEVICE)
    shape, stride = [1, 1, 1, 2, 8], [64, 64, 64, 8, 1]
    shape[axis], stride[axis] = 3, 2**30
    q, k, v = (far.as_strided(shape, stride, 16 * i) for i in range(3))
    for i, x in enumerate((q, k, v)):
        x.copy_(randn(*shape, dtype=x.dtype, seed=i))
    got = temporal_attention(q, k, v, impl="triton")
    assert torch.equal(got, temporal_attention(*(x.contiguous() for x in (q, k, v)), impl="triton"))


@pytest.mark.parametrize("videos, pixels", [(1, 2**24 + 5), (64, 2**18 + 2**13)])
def test_results_beyond_2_31(videos, pixels, monkeypatch):
    """The last pixel of more numbers than an int32 counts. Interpreted, its program alone runs."""
    x = randn(1, 16, 1, 1, 8, dtype=torch.float16)
    if interpreting():
        import numpy
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle, interpreter_builder

        handle = TensorHandle(numpy.array([videos * pixels - 1], dtype=numpy.int32), tl.int32)
        monkeypatch.setattr(interpreter_builder, "create_get_program_id", lambda axis: handle)
        monkeypatch.setattr(attention, "launch", lambda kernel, grid, *args, **kw: launch(kernel, (1,), *args, **kw))
    many = x.expand(videos, -1, pixels, -1, -1)
    got = temporal_attention(many, many, many, impl="triton")
    assert got.numel() > 2**31 and (videos == 1 or got[:-1].numel() > 2**31)
    torch.testing.assert_close(got[-1:, :, -1:], temporal_attention_ref(x, x, x), atol=2e-3, rtol=2e-3)


@fenced_only
@pytest.mark.parametrize("shape", [(1, 3, 7, 1, 8), (1, 16, 3, 2, 40), (1, 70, 1, 1, 17), (2, 20, 1, 1, 80)])
def test_nothing_is_read_beyond_the_tensors(shape):
    b, f, p, h, d = shape
    judge(*fenced(randn(b, f, p, 3, h, d, dtype=torch.float16)).unbind(3), "both")
    judge(*(fenced(x) for x in fused(*shape)))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("head_dim", [1, 8, 15, 16, 17, 40, 64, 80, 96, 100, 128, 160, 256])
def test_tiles(head_dim, size):
    d1, d2 = attention.split(head_dim)
    assert d1 & (d1 - 1) == d2 & (d2 - 1) == 0 and d1 >= 16 and (d2 == 0 or d2 >= 16), "what tl.dot takes"
    assert head_dim <= d1 + d2 <= max(16, 1 << (head_dim - 1).bit_length())
    assert d2 == 0 or d1 < head_dim, "a piece that holds nothing"
    for frames in (1, 2, 5, 8, 9, 16, 17, 24, 31, 32, 33, 48, 64, 65, 100, 1000):
        pixels, block, warps = attention.tile(frames, d1 + d2, size)
        assert block & (block - 1) == warps & (warps - 1) == 0 and block >= 16
        assert pixels * frames <= block or pixels == 1
        assert frames > block or (pixels + 1) * frames > block, "room for another pixel"
        assert 5 * block * (d1 + d2) * size <= 160 * 2**10, "shared memory: q, and k and v twice"


@pytest.mark.parametrize(
    "shape", [(2, 16, 1024, 5, 64), (2, 24, 9216, 5, 64), (2, 64, 2**20, 8, 40), (2, 200, 9216, 8, 160)]
)
def test_the_grid(shape):
    """On `meta`, for videos of all sizes: its one axis covers every pixel, and no other grows."""
    b, f, p, h, d = shape
    with record() as launches:
        y = temporal_attention(
            *torch.empty(b, f, p, 3, h, d, device="meta", dtype=torch.float16).unbind(3), impl="triton"
        )
    (launch,) = launches
    tile = launch.constexprs
    rows = tile["PIXELS"] * f
    programs = b * math.ceil(p / tile["PIXELS"]) * math.ceil(rows / tile["BLOCK"]) * h
    assert launch.grid == (programs,) and programs < 2**31
    assert y.shape == shape and launch.args[3].shape == shape
    assert launch.args[4:9] == (p, h, f * p * 3 * h * d, p * 3 * h * d, 3 * h * d)
    q, k, v = launch.args[:3]
    assert q.stride() == k.stride() == v.stride() and not q.is_contiguous(), "copied"


@pytest.mark.parametrize("mask", ["all", "both"])
def test_backward(mask):
    causal, window = MASKS[mask]
    leaves = [randn(2, 5, 3, 2, 8, seed=i).requires_grad_() for i in range(3)]
    dy = randn(2, 5, 3, 2, 8, seed=3)
    got, want = (
        torch.autograd.grad(temporal_attention(*leaves, causal=causal, window=window, impl=impl), leaves, dy)
        for impl in ("triton", "torch")
    )
    torch.testing.assert_close(got, want)


def test_backward_into_one_projection():
    qkv = randn(1, 4, 3, 3, 2, 8).requires_grad_()
    got, want = (
        torch.autograd.grad(temporal_attention(*qkv.unbind(3), impl=impl).square().sum(), qkv)
        for impl in ("triton", "torch")
    )
    torch.testing.assert_close(got, want)


def test_the_environment_asks_too(monkeypatch):
    q, k, v = fused(1, 4, 3, 2, 8)
    want = temporal_attention(q, k, v, impl="triton")
    monkeypatch.setenv("MINIT2V_KERNELS", "torch,temporal_attention=triton")
    assert torch.equal(temporal_attention(q, k, v), want)


def test_what_cannot_be(monkeypatch):
    q, k, v = fused(1, 4, 3, 2, 8)
    with pytest.raises(
        ValueError, match=r"one shape \(b f p h d\), not \(1, 4, 3, 2, 8\), \(1, 4, 3, 2, 8\), \(1, 4, 3, 2"
    ):
        temporal_attention(q, k, v[..., :4])
    with pytest.raises(ValueError, match="one shape"):
        temporal_attention(q[0], k[0], v[0])
    for window in (0, -1):
        with pytest.raises(ValueError, match=f"window must be at least 1, the frame itself, not {window}"):
            temporal_attention(q, k, v, window=window)
    with pytest.raises(ValueError, match="q torch.float64, .* not one 16- or 32-bit dtype"):
        temporal_attention(q.double(), k.double(), v.double(), impl="triton")
    with pytest.raises(ValueError, match="heads of at most 256 numbers, not 257"):
        temporal_attention(*[randn(1, 2, 1, 1, 257)] * 3, impl="triton")
    with pytest.raises(ValueError, match="k torch.float16"):
        temporal_attention(q, k.half(), v, impl="triton")
    assert torch.equal(temporal_attention(q, k, v, window=1), v.contiguous())
