"""GroupNorm, SiLU and what stands before them: the kernels against the definition, that against the formula."""

import random

import pytest
import torch
from judge import DEVICE, DTYPES, check, fenced, fenced_only, new_plans, pairwise, poisoned, randn, relative
from torch import Tensor

from minit2v_kernels import add_group_norm_silu, add_group_norm_silu_ref, group_norm_silu, group_norm_silu_ref, norm
from minit2v_kernels._dispatch import family, interpreting, record
from minit2v_kernels._tiles import processors

NAN, INF = float("nan"), float("inf")
SHAPES = [  # (n c *spatial), groups
    pytest.param((1, 6, 4, 8), 6, id="channel-per-group"),
    pytest.param((1, 64, 3, 5, 7), 2, id="5d-odd"),
    pytest.param((2, 30, 17), 3, id="3d-not-a-power-of-two"),
    pytest.param((1, 20, 33, 31), 2, id="many-splits"),
    pytest.param((2, 12, 1, 1), 2, id="one-pixel"),
    pytest.param((1, 200, 9, 1), 1, id="one-group-of-many-tiles"),
]
MEANS = [pytest.param(mean, dtype, id=f"{mean}-{dtype}")
         for mean, dtype in ((0, DTYPES[0]), (100, DTYPES[0]), (10, DTYPES[1]), (100, DTYPES[2]))]  # fmt: skip
ENTRIES = {  # of 4: frames, rows of emb
    "image": (1, None), "clip": (2, None), "emb-per-entry": (1, 4), "emb-of-all": (1, 1), "emb-per-clip": (2, 2),
    "emb-per-frame-of-a-clip": (2, 4), "emb-of-two-clips": (2, 1), "one-clip": (4, 2),
}  # fmt: skip


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def either(x: Tensor, last: bool) -> Tensor:
    return channels_last(x) if last else x


def weights(c: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return randn(c, mean=1, std=0.5, dtype=dtype, seed=8), randn(c, dtype=dtype, seed=9)


def is_in(y: Tensor, last: bool) -> bool:
    return (y.movedim(1, -1) if last else y).is_contiguous()


def inputs(last: bool, c2: int = 0, emb: int | None = None, dtype: torch.dtype = torch.float32, mean: float = 1):
    """Four entries of 5 x 3 positions and 12 + c2 channels: (x, weight, bias), and keywords."""
    x = either(randn(4, 12, 5, 3, mean=mean, dtype=dtype), last)
    skip = either(randn(4, c2, 5, 3, mean=mean, std=2, dtype=dtype, seed=2), last) if c2 else None
    rows = randn(emb, 12, std=2, dtype=dtype, seed=3) if emb else None
    return (x, *weights(12 + c2, dtype)), {"skip": skip, "emb": rows}


# --- the definition itself ---


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("frames, emb", ENTRIES.values(), ids=ENTRIES)
def test_the_definition_is_the_formula(frames, emb, last):
    (x, w, b), kw = inputs(last, 4, emb, torch.float64)
    got = group_norm_silu_ref(x, w, b, 2, 0.1, frames=frames, **kw)
    if emb:
        x = torch.stack([x[i] + kw["emb"][i * emb // 4][:, None, None] for i in range(4)])
    x = torch.cat((x, kw["skip"]), 1)
    for i in range(4):
        video = x[i // frames * frames :][:frames]
        for c in range(16):
            group = video[:, c // 8 * 8 :][:, :8]
            y = (x[i, c] - group.mean()) / (group.var(correction=0) + 0.1).sqrt() * w[c] + b[c]
            torch.testing.assert_close(got[i, c], y * y.sigmoid(), rtol=1e-10, atol=1e-10)
    assert is_in(got, last)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("frames", [1, 2])
def test_only_the_weights_want_a_gradient(frames, impl):
    """In channels-last memory on the CPU PyTorch's own GroupNorm crashes here."""
    (x, w, b), _ = inputs(True)
    grads = []
    for image, choice in ((x, impl), (x.contiguous(), "torch")):
        leaves = w.clone().requires_grad_(), b.clone().requires_grad_()
        y = group_norm_silu(image, *leaves, 2, frames=frames, impl=choice)
        grads.append(torch.autograd.grad(y.square().sum(), leaves))
    torch.testing.assert_close(*grads)


# --- the kernels ---


@pytest.mark.parametrize("shape, groups, mean, dtype, last", pairwise(SHAPES, MEANS, [False, True]))
def test_forward(shape, groups, mean, dtype, last):
    x = either(randn(*shape, mean=mean, dtype=dtype), last)
    y = check(group_norm_silu, group_norm_silu_ref, x, *weights(shape[1], dtype), groups)
    assert is_in(y, last)


@pytest.mark.parametrize("entries, silu, last", pairwise(ENTRIES, [True, False], [False, True]))
def test_options(entries, silu, last):
    (frames, emb), c2 = ENTRIES[entries], 4 * (not silu)
    dtype = DTYPES[(frames + silu + last) % 3]
    args, kw = inputs(last, c2, emb, dtype, mean=30 * silu)
    assert is_in(check(group_norm_silu, group_norm_silu_ref, *args, 2, frames=frames, silu=silu, **kw), last)


@pytest.mark.parametrize("last", [False, True])
def test_rows_of_emb_across_videos(last):
    x, emb = either(randn(6, 4, 3, 1), last), randn(2, 4, std=3, seed=1)
    check(group_norm_silu, group_norm_silu_ref, x, *weights(4), 1, frames=2, emb=emb)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("frames, dtype", [(1, DTYPES[0]), (2, DTYPES[1]), (4, DTYPES[2])])
def test_residual(frames, dtype, last):
    (x, w, b), _ = inputs(last, dtype=dtype)
    residual = either(randn(4, 12, 5, 3, mean=30, dtype=dtype, seed=5), last)
    total, y = check(add_group_norm_silu, add_group_norm_silu_ref, x, residual, w, b, 2, frames=frames, silu=frames > 1)
    assert is_in(total, last) and is_in(y, last)
    if not (interpreting() and dtype == torch.bfloat16):  # there the interpreter truncates where all others round
        assert torch.equal(total, x + residual)


def test_the_norm_is_of_the_sum_as_it_is_returned():
    """Rounded: with 16 bits that may be most of its variance."""
    x = channels_last(torch.full((2, 8, 9, 7), 1000.0, dtype=torch.float16, device=DEVICE))
    w, b = weights(8)
    total, y = add_group_norm_silu(x, randn(2, 8, 9, 7, std=0.2, dtype=x.dtype), w, b, 2, impl="triton")
    assert relative(y, group_norm_silu_ref(total.double(), w.double(), b.double(), 2)) < 1e-3


@pytest.mark.parametrize("c1, c2, groups", [(64, 64, 4), (70, 58, 1), (1, 127, 2), (127, 1, 2)])
@pytest.mark.parametrize("last", [False, True])
def test_skip_at_and_across_the_tiles(c1, c2, groups, last, three_launches):
    x, skip = (either(randn(1, c, 3, 3, mean=c, seed=c), last) for c in (c1, c2))
    emb = randn(1, c1, std=3, seed=7)
    check(group_norm_silu, group_norm_silu_ref, x, *weights(128), groups, skip=skip, emb=emb)


def test_more_parts_than_the_merging_tile():
    x = channels_last(randn(2, 64, 19, 64, mean=5))
    unroll, block_t = norm.moments_tile(x.dtype, False, family(x.device))
    parts = norm.split(1, 2 * 19 * 64, 64, unroll * block_t, family(x.device))[0]
    assert parts > norm.merge_tile(64, parts)[0]
    check(group_norm_silu, group_norm_silu_ref, x, *weights(64), 1, frames=2)


@pytest.fixture
def three_launches(monkeypatch):
    """Also where one would do."""
    monkeypatch.setattr(norm, "LARGEST", 0)
    with new_plans(norm):
        yield


@pytest.fixture
def small_gpu(three_launches, monkeypatch):
    """Which needs no more than two programs: splits are long."""
    monkeypatch.setattr(norm, "processors", lambda target: 1)
    monkeypatch.setattr(norm, "RESIDENT", 1)
    norm.split.cache_clear()
    with new_plans(norm):
        yield
    norm.split.cache_clear()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mean, dtype", [(100, DTYPES[0]), (10, DTYPES[1])])
def test_splits_of_many_tiles(mean, dtype, last, small_gpu):
    x = either(randn(1, 12, 33, 31, mean=mean, dtype=dtype), last)
    check(group_norm_silu, group_norm_silu_ref, x, *weights(12, dtype), 2)
    check(add_group_norm_silu, add_group_norm_silu_ref, x, x.flip(2), *weights(12, dtype), 2)
    assert norm.split(1, 33 * 31, 12, 32, family(x.device))[1] > 4 * 64


@pytest.mark.parametrize("last, ratio, first", pairwise([False, True], [50, 10_000], [0, 1]))
def test_the_mean_costs_no_digits(first, ratio, last, small_gpu):
    """mean / std: PyTorch's error grows with it, ours must not. Nor by one position, the first, that is far away."""
    x = randn(2, 8, 14, 23, mean=ratio)
    x[:, :, 0, 0] *= first
    args = either(x, last), *weights(8), 1
    emb = None if first else torch.full((1, 8), 3.0 * ratio, device=DEVICE)
    exact = None if emb is None else emb.double()
    want = group_norm_silu_ref(*(t.double() for t in args[:3]), 1, silu=False, frames=2, emb=exact)
    got = group_norm_silu(*args, silu=False, frames=2, emb=emb, impl="triton")
    assert relative(got, want) < 3e-7
    assert relative(group_norm_silu_ref(*args, silu=False, frames=2, emb=emb), want) > 3e-7 or not interpreting()


# --- in one launch: small frames, or videos, in channels-last memory ---


def launched(x: Tensor, w: Tensor, b: Tensor, groups: int, frames: int = 1, **kw) -> list[str]:
    with record() as launches:
        group_norm_silu(x.to("meta"), w.to("meta"), b.to("meta"), groups, frames=frames, impl="triton")
    return [launch.kernel.__name__ for launch in launches]


WHOLE = [  # (n c h w), channels of skip, groups: of 4, 4, 8, 12, 20 and 40 channels
    pytest.param((4, 8, 3, 5), 8, 4, id="2-groups-in-a-vector"), pytest.param((4, 16, 2, 1), 0, 4, id="two-pixels"),
    pytest.param((4, 24, 2, 3), 8, 4, id="group-per-program"), pytest.param((4, 48, 3, 3), 0, 4, id="12-channels"),
    pytest.param((4, 24, 7, 2), 16, 2, id="20-channels"), pytest.param((4, 40, 9, 5), 0, 1, id="40-channels"),
]  # fmt: skip


@pytest.mark.parametrize("shape, c2, groups", WHOLE)
@pytest.mark.parametrize("frames, emb, dtype, mean", [
    (1, None, DTYPES[0], 100), (1, 1, DTYPES[1], 10), (2, 4, DTYPES[0], 0), (4, 2, DTYPES[2], 100),
])  # fmt: skip
def test_one_launch(shape, c2, groups, frames, emb, dtype, mean):
    n, c, *size = shape
    x, args = channels_last(randn(*shape, mean=mean, dtype=dtype)), weights(c + c2, dtype)
    kw = {"skip": channels_last(randn(n, c2, *size, mean=mean, dtype=dtype, seed=2)) if c2 else None}
    kw["emb"] = randn(emb, c, std=2, dtype=dtype, seed=3) if emb else None
    whole = channels_last(torch.empty(n, c + c2, *size))
    assert launched(whole, *args, groups, frames) == ["group_norm_whole"]
    y = check(group_norm_silu, group_norm_silu_ref, x, *args, groups, frames=frames, silu=mean > 0, **kw)
    assert is_in(y, True)
    if not c2 and not emb:
        residual = channels_last(randn(*shape, mean=30, dtype=dtype, seed=5))
        total, _ = check(add_group_norm_silu, add_group_norm_silu_ref, x, residual, *args, groups, frames=frames)
        assert is_in(total, True) and torch.equal(total, x + residual)


@pytest.mark.parametrize("ratio", [50, 10_000])
@pytest.mark.parametrize("first", [0, 1])
def test_the_mean_costs_no_digits_in_one_launch(first, ratio):
    x = randn(2, 16, 14, 23, mean=ratio)
    x[:, :, 0, 0] *= first
    emb = None if first else torch.full((1, 16), 3.0 * ratio, device=DEVICE)
    exact = None if emb is None else emb.double()
    x, (w, b) = channels_last(x), weights(16)
    assert launched(x, w, b, 2, 2) == ["group_norm_whole"]
    want = group_norm_silu_ref(x.double(), w.double(), b.double(), 2, silu=False, frames=2, emb=exact)
    assert relative(group_norm_silu(x, w, b, 2, silu=False, frames=2, emb=emb, impl="triton"), want) < 3e-7


@pytest.mark.parametrize("where, value", [("x", NAN), ("x", INF), ("skip", NAN), ("emb", -INF), ("weight", NAN)])
def test_nan_and_inf_stay_in_their_group_in_one_launch(where, value):
    (x, skip), (w, b) = (channels_last(randn(4, 16, 5, 3, seed=s)) for s in (0, 2)), weights(32)
    kw = {"skip": skip, "emb": randn(2, 16, seed=3)}
    {"x": x[3, :, 4, 1], "skip": skip[0, :, 1, 0], "emb": kw["emb"][1], "weight": w}[where][3] = value
    want = group_norm_silu_ref(x, w, b, 8, frames=2, **kw)
    assert launched(channels_last(torch.empty(4, 32, 5, 3)), w, b, 8, 2) == ["group_norm_whole"]
    got = group_norm_silu(x, w, b, 8, frames=2, impl="triton", **kw)
    torch.testing.assert_close(got, want, equal_nan=True)
    assert want.isfinite().any() and not want.isfinite().all()


@fenced_only
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_nothing_is_read_beyond_the_tensors_in_one_launch(dtype):
    def fence(x: Tensor) -> Tensor:
        return fenced(x.movedim(1, -1).contiguous()).movedim(-1, 1) if x.ndim > 2 else fenced(x)

    x, skip = (fence(randn(2, c, 3, 3, dtype=dtype, seed=c)) for c in (24, 8))
    emb, w, b = map(fence, (randn(2, 24, dtype=dtype), *weights(32, dtype)))
    assert launched(channels_last(torch.empty(2, 32, 3, 3)), w, b, 4) == ["group_norm_whole"]
    check(group_norm_silu, group_norm_silu_ref, x, w, b, 4, skip=skip, emb=emb)
    check(add_group_norm_silu, add_group_norm_silu_ref, x, fence(x.flip(2)), fence(w[:24]), fence(b[:24]), 3)


@pytest.mark.parametrize("shape, frames, count", [  # with 32 groups on 132 multiprocessors, in 16 bits
    ((48, 1280, 10, 18), 1, 1),  # 7,200 numbers; 32 programs for each of 48 frames
    ((32, 640, 16, 16), 1, 1),  # 10,240 numbers of two groups
    ((48, 640, 20, 36), 1, 3),  # 28,800 do not fit
    ((32, 1280, 4, 4), 16, 1),  # a video; 64 programs
    ((32, 1280, 8, 8), 16, 3), ((48, 644, 20, 36), 1, 3),  # 644 = 4 x 161 channels
])  # fmt: skip
def test_one_launch_or_three(shape, frames, count):
    assert norm.launches(shape, shape[1], 32 if shape[1] % 32 == 0 else 4, frames, True, 2, "sm_90") == count
    assert norm.launches(shape, shape[1], 4, frames, False, 2, "sm_90") == 3  # contiguous


def test_a_multiprocessor_with_more_than_its_share():
    """Full programs of 32 KB: 305 of them take 304 multiprocessors twice as long as 304 do."""
    for n, count in ((304, 1), (305, 3)):
        assert norm.launches((n, 8, 64, 32), 8, 1, 1, True, 2, "gfx942") == count


def test_a_table_may_ask_for_what_does_not_fit():
    with pytest.raises(ValueError, match=r"LAUNCHES=1 does not fit x \(2, 12, 3, 3\) with 2 groups of 12 channels"):
        norm.whole((2, 12, 3, 3), 12, 2, 1, None, True, DTYPES[0], "sm_90", True, False, False)


@pytest.mark.parametrize("where, value, last", [
    ("x", NAN, False), ("x", INF, True), ("x", -INF, True), ("skip", NAN, True), ("skip", INF, False),
    ("emb", NAN, True), ("emb", -INF, False), ("weight", NAN, True), ("bias", NAN, True), ("bias", INF, True),
])  # fmt: skip
def test_nan_and_inf_poison_what_they_poison_in_pytorch(where, value, last):
    (x, w, b), kw = inputs(last, 4, 2)
    {"x": x[3, 7, 4], "skip": kw["skip"][0, 1, 0], "emb": kw["emb"][1], "weight": w, "bias": b}[where][2] = value
    want = group_norm_silu_ref(x, w, b, 4, frames=2, **kw)
    got = group_norm_silu(x, w, b, 4, frames=2, impl="triton", **kw)
    torch.testing.assert_close(got, want, equal_nan=True)
    assert want.isfinite().any() and not want.isfinite().all()


@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_and_inf_in_a_residual(value):
    (x, w, b), _ = inputs(True)
    residual = x.flip(0).clone()
    residual[3, 5, 4, 2] = value
    want = add_group_norm_silu_ref(x, residual, w, b, 4, frames=2)
    got = add_group_norm_silu(x, residual, w, b, 4, frames=2, impl="triton")
    torch.testing.assert_close(got, want, equal_nan=True)
    assert want[1].isnan().sum() == 2 * 3 * 15


def test_large_numbers_overflow_nowhere_before_the_end():
    x = randn(2, 8, 5, 7, std=1e4).half()
    assert check(group_norm_silu, group_norm_silu_ref, x, *weights(8, torch.float16), 2).isfinite().all()


def test_constant_input():
    x = torch.full((2, 8, 5, 3), 77.7, device=DEVICE)
    want = torch.nn.functional.silu(weights(8)[1])[None, :, None, None].expand_as(x)
    torch.testing.assert_close(group_norm_silu(x, *weights(8), 2, impl="triton"), want)


def test_views_that_are_neither_layout():
    x = randn(4, 6, 5, 24, mean=1).permute(2, 3, 0, 1)
    skip, emb = randn(5, 24, 4, 12)[:, ::2, :, ::2], randn(24, 5).T
    w, b = (t[::2] for t in weights(72))
    y = check(group_norm_silu, group_norm_silu_ref, x, w, b, 3, skip=skip, emb=emb)
    assert y.is_contiguous()
    y = check(group_norm_silu, group_norm_silu_ref, channels_last(x), w, b, 3, skip=skip, emb=emb)
    assert is_in(y, True)
    residual = randn(5, 24, 4, 12)[..., ::2]
    check(add_group_norm_silu, add_group_norm_silu_ref, channels_last(x), residual, *weights(24), 3)


def test_no_entries():
    for shape in ((0, 8, 3, 3), (2, 8, 0, 3)):
        assert group_norm_silu(torch.empty(shape, device=DEVICE), *weights(8), 2, impl="triton").shape == shape


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("frames", [1, 2])
def test_backward(frames, last):
    args, kw = inputs(last, 4, 2)
    leaves = [t.requires_grad_() for t in (*args, kw["skip"], kw["emb"])]
    y = group_norm_silu(*args, 2, frames=frames, impl="triton", **kw)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, leaves, dy)
    want = torch.autograd.grad(group_norm_silu_ref(*args, 2, frames=frames, **kw), leaves, dy)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
def test_backward_of_both_results(used):
    (x, w, b), _ = inputs(True)
    leaves = [t.requires_grad_() for t in (x, randn(4, 12, 5, 3, seed=5), w, b)]
    grads = []
    for op, kw in ((add_group_norm_silu, {"impl": "triton"}), (add_group_norm_silu_ref, {})):
        made = [y for y, wanted in zip(op(*leaves, 2, frames=2, silu=False, **kw), used, strict=True) if wanted]
        grads.append(torch.autograd.grad(sum(y.sin().sum() for y in made), leaves, allow_unused=True))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(torch.zeros(()) if got is None else got, got * 0 if want is None else want)


def test_the_environment_asks_too(monkeypatch):
    (x, w, b), _ = inputs(False)
    want = group_norm_silu(x, w, b, 2, impl="triton"), *add_group_norm_silu(x, x, w, b, 2, impl="triton")
    monkeypatch.setenv("MINIT2V_KERNELS", "torch,group_norm_silu=triton")
    got = group_norm_silu(x, w, b, 2), *add_group_norm_silu(x, x, w, b, 2)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("seed", range(8))
def test_random_shapes(seed):
    rng = random.Random(seed)
    frames, groups, last, silu = rng.randint(1, 3), rng.randint(1, 4), rng.random() < 0.6, rng.random() < 0.6
    n, c = frames * rng.randint(1, 3), groups * rng.choice((1, 2, 5, 24))
    c1 = rng.randint(1, c) if rng.random() < 0.5 else c
    spatial = rng.choice(((rng.randint(1, 150),), (rng.randint(1, 20), rng.randint(1, 20)), (2, 3, rng.randint(1, 9))))
    m = rng.choice([None, *(m for m in range(1, n + 1) if n % m == 0)])
    dtype, mean = rng.choice(DTYPES), rng.choice((0, 10, 100))
    x = either(randn(n, c1, *spatial, mean=mean, dtype=dtype, seed=seed), last)
    kw = {"silu": silu, "frames": frames}
    if c == c1 and m is None and rng.random() < 0.5:
        residual = either(randn(n, c, *spatial, dtype=dtype, seed=seed + 1), last)
        check(add_group_norm_silu, add_group_norm_silu_ref, x, residual, *weights(c, dtype), groups, **kw)
        return
    kw["skip"] = either(randn(n, c - c1, *spatial, mean=mean, dtype=dtype, seed=seed + 2), last) if c1 < c else None
    kw["emb"] = randn(m, c1, dtype=dtype, seed=seed + 3) if m else None
    if n * c * x[0, 0].numel() > groups:  # PyTorch takes no groups of one number
        check(group_norm_silu, group_norm_silu_ref, x, *weights(c, dtype), groups, **kw)


@fenced_only
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_nothing_is_read_beyond_the_tensors(dtype, last):
    def fence(x: Tensor) -> Tensor:
        return fenced(x.movedim(1, -1).contiguous()).movedim(-1, 1) if last and x.ndim > 2 else fenced(x)

    (x, w, b), kw = inputs(last, 3, 2, dtype)
    kw = {k: fence(v) for k, v in kw.items()}
    check(group_norm_silu, group_norm_silu_ref, fence(x), fence(w), fence(b), 3, frames=2, **kw)
    w, b = (fence(t) for t in weights(12, dtype))
    check(add_group_norm_silu, add_group_norm_silu_ref, fence(x), fence(x), w, b, 3)


# --- what does not fit, and what no machine here has the memory or the time for ---


@pytest.mark.parametrize("change, message", [
    ({"groups": 5}, "12 channels do not divide into 5 groups"),
    ({"groups": 0}, "12 channels do not divide into 0 groups"),
    ({"frames": 3}, "4 frames do not divide into videos of 3 frames"),
    ({"frames": 0}, "4 frames do not divide into videos of 0 frames"),
    ({"emb": torch.zeros(3, 12)}, r"emb is \(3, 12\), which does not fit x \(4, 12, 5, 3\)"),
    ({"emb": torch.zeros(2, 11)}, "emb is"),
    ({"emb": torch.zeros(0, 12)}, "emb is"),
    ({"skip": torch.zeros(4, 4, 3, 5)}, r"skip is \(4, 4, 3, 5\), and x \(4, 12, 5, 3\)"),
    ({"skip": torch.zeros(4, 4, 5, 3)}, r"16 channels, weight \(12,\)"),
    ({"x": torch.zeros(6, 12)}, r"x must be \(n c \*spatial\)"),
    ({"impl": "triton", "x": torch.zeros(6, 12, 5, 3).double()}, "takes float32, float16 and bfloat16, not .*float64"),
    ({"impl": "triton", "skip": torch.zeros(4, 4, 5, 3).half(), "weight": torch.ones(16), "bias": torch.ones(16)},
     "one dtype, not torch.float32 and torch.float16"),
    ({"impl": "triton", "emb": torch.zeros(4, 12).half()}, "one dtype"),
])  # fmt: skip
def test_what_does_not_fit(change, message):
    (x, w, b), _ = inputs(False)
    change = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=f"group_norm_silu: .*{message}"):
        group_norm_silu(**{"x": x, "weight": w, "bias": b, "groups": 4} | change)


def test_residuals_that_do_not_fit():
    (x, w, b), _ = inputs(False)
    with pytest.raises(ValueError, match=r"residual is \(3, 12, 5, 3\), and x \(4, 12, 5, 3\)"):
        add_group_norm_silu(x, x[:3], w, b, 4)
    with pytest.raises(ValueError, match="add_group_norm_silu: the kernel takes one dtype"):
        add_group_norm_silu(x, x.half(), w, b, 4, impl="triton")


@pytest.mark.parametrize("segments, positions, channels", [
    (1, 1, 1), (2, 221184, 320), (48, 9216, 960), (32, 16, 1280), (70000, 3, 8), (24, 589824, 128), (3, 1081, 72),
])  # fmt: skip
@pytest.mark.parametrize("tile, target", [(32, "sm_90"), (64, "sm_80"), (64, "gfx942"), (64, "meta")])
def test_splits(segments, positions, channels, tile, target):
    splits, rows = norm.split(segments, positions, channels, tile, target)
    assert rows % tile == 0 and (splits - 1) * rows < positions <= splits * rows
    programs = segments * splits * -(-channels // norm.channel_tile(channels))
    assert programs >= min(processors(target), segments * -(-positions // tile))


@pytest.mark.parametrize("shape", [(70_000, 8, 1, 1), (4, 320, 24, 576, 1024)])
def test_grids_fit_a_gpu(shape):
    x, w = torch.empty(shape, device="meta"), torch.empty(shape[1], device="meta")
    with record() as launches:
        group_norm_silu(channels_last(x), w, w, 4, impl="triton")
        add_group_norm_silu(x, x, w, w, 4, frames=2, impl="triton")
    assert len(launches) == 6 and all(len(launch.grid) == 1 and launch.grid[0] < 2**31 for launch in launches)


@pytest.mark.parametrize("last", [False, True])
def test_offsets_beyond_two_to_the_31(last):
    """Of elements that no memory here holds: the kernels' own arithmetic, beside Python's."""
    global tl, pointers  # where a kernel looks its names up
    import triton
    import triton.language as tl

    norm.kernels()
    pointers = norm.pointers

    @triton.jit
    def probe(P, OUT, segment, row, T, C, LAST: tl.constexpr):
        i = tl.arange(0, 4)
        at = pointers(P, segment, row, i[:, None], C - 4 + i[None, :], T, C, LAST)
        tl.store(OUT + i[:, None] * 4 + i[None, :], (at.to(tl.int64) - P.to(tl.int64)) // 2)

    x, out = torch.empty(1, dtype=torch.float16, device=DEVICE), torch.empty(16, dtype=torch.int64, device=DEVICE)
    for segment, row, t, c in ((70_000, 5, 9216, 960), (1, 30_000_000, 2**25, 320), (3, 7, 64, 2**20)):
        probe[(1,)](x, out, segment, row, t, c, LAST=last)
        want = [
            segment * t * c + (r * c + k if last else k * t + r) for r in range(row, row + 4) for k in range(c - 4, c)
        ]
        assert out.tolist() == want


@pytest.mark.skipif(interpreting(), reason="needs a GPU's speed")
@pytest.mark.parametrize("last", [False, True])
def test_entries_beyond_a_grid_axis(last):
    x = either(randn(70_000, 8, 1, 2), last)
    check(group_norm_silu, group_norm_silu_ref, x, *weights(8), 2)
    check(group_norm_silu, group_norm_silu_ref, x, *weights(8), 2, frames=7, emb=randn(10, 8, seed=4))


@pytest.mark.skipif(interpreting(), reason="needs a GPU's memory")
@pytest.mark.parametrize("last", [False, True])
def test_elements_beyond_two_to_the_31(last):
    x = torch.empty(34, 256, 256, 1000, dtype=torch.float16, device=DEVICE).normal_()
    x = x.permute(0, 3, 1, 2) if last else x.view(34, 1000, 256, 256)
    with poisoned():
        y = group_norm_silu(x, *weights(1000, x.dtype), 10, impl="triton")
    torch.testing.assert_close(y[-1:], group_norm_silu_ref(x[-1:], *weights(1000, x.dtype), 10))
