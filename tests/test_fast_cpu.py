"""What the fast path does on a CPU in float32: every form of an operation, against the module in float64."""

import copy
import ctypes
import logging
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import nn

from minit2v import fast
from minit2v.fast import cpu
from minit2v.memory.heap import use_huge_pages
from minit2v.models.unet3d import UNet3DConditionModel
from minit2v_kernels import cpu as kernels

library = kernels.library  # tests replace it
LAST = torch.channels_last


@pytest.fixture(params=["oneDNN", "MKL", "compiled", "compiled without matrix units", "compiled for AVX2"])
def ops(request, monkeypatch):
    """PyTorch's libraries, as on a processor with AVX-512 and as on one without. Then the kernels, for each."""
    monkeypatch.setattr(cpu, "PRODUCTS", request.param != "oneDNN")
    monkeypatch.setattr(kernels, "TILES", 12)
    if "compiled" in request.param:
        if kernels.library() is None:
            pytest.skip("no C++ compiler")
        monkeypatch.delenv("MINIT2V_KERNELS", raising=False)
    else:
        monkeypatch.setenv("MINIT2V_KERNELS", "torch")
    if "AVX2" in request.param:
        monkeypatch.setattr(kernels, "library", partial(built_for, "-march=haswell"))
    elif "without" in request.param:
        monkeypatch.setattr(kernels, "library", partial(built_for, "-march=native", "-mno-amx-bf16"))
    return cpu.CPUOps(torch.ones(1), nn.Linear(2000, 2000))


@cache
def built_for(*processor: str):
    flags = [processor if flag == "-march=native" else (flag,) for flag in kernels.FLAGS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "FLAGS", sum(flags, ()))
        return library.__wrapped__()


def error(y: torch.Tensor, want: torch.Tensor) -> float:
    assert y.shape == want.shape
    return ((y.double() - want).abs().max() / want.abs().max()).item() if want.numel() else 0.0


@pytest.mark.parametrize(
    "n, c, h, w, o, options",
    [
        pytest.param(4, 208, 8, 8, 176, {}, id="winograd"),
        pytest.param(3, 80, 4, 30, 304, {}, id="winograd, no square"),
        pytest.param(3, 80, 4, 30, 176, {}, id="not enough channels for winograd"),
        pytest.param(2, 48, 9, 40, 20, {"padding": (0, 2), "kernel_size": (2, 3), "stride": (1, 3)}, id="many pixels"),
        pytest.param(2, 48, 9, 40, 20, {"kernel_size": 5, "padding": 2}, id="a large kernel"),
        pytest.param(2, 208, 34, 36, 176, {}, id="winograd, in pieces"),
        pytest.param(2, 16, 12, 12, 48, {}, id="few channels"),
        pytest.param(3, 170, 8, 30, 176, {}, id="channels that are no multiple"),
        pytest.param(2, 208, 9, 20, 160, {}, id="odd height"),
        pytest.param(3, 160, 8, 5, 300, {}, id="more channels than pixels"),
        pytest.param(2, 32, 30, 20, 40, {}, id="many pixels, few channels"),
        pytest.param(2, 24, 4, 4, 40, {}, id="few pixels"),
        pytest.param(1, 24, 1, 1, 40, {}, id="one pixel"),
        pytest.param(2, 24, 6, 8, 40, {"stride": 2}, id="few pixels, stride"),
        pytest.param(2, 24, 4, 5, 40, {"padding": (0, 2), "kernel_size": (2, 3)}, id="few pixels, another kernel"),
        pytest.param(2, 24, 4, 5, 40, {"padding": "same"}, id="few pixels, padding by name"),
        pytest.param(2, 24, 4, 5, 40, {"kernel_size": 1, "padding": 1}, id="1x1 with padding"),
        pytest.param(2, 24, 8, 8, 40, {"kernel_size": 1, "padding": 0, "stride": 2}, id="1x1 with stride"),
        pytest.param(4, 40, 8, 9, 24, {}, id="as it is"),
        pytest.param(2, 208, 16, 16, 160, {"stride": 2}, id="stride"),
        pytest.param(2, 208, 16, 16, 160, {"padding_mode": "reflect"}, id="reflected"),
        pytest.param(2, 208, 16, 16, 160, {"groups": 2}, id="groups"),
        pytest.param(2, 208, 16, 16, 160, {"dilation": 2}, id="dilation"),
        pytest.param(2, 208, 16, 16, 160, {"kernel_size": 1, "padding": 0}, id="1x1"),
        pytest.param(2, 208, 16, 16, 160, {"bias": False}, id="no bias"),
        pytest.param(0, 32, 4, 4, 48, {}, id="no image"),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@torch.no_grad()
def test_convolutions(ops, n, c, h, w, o, options, layout):
    torch.manual_seed(0)
    m = nn.Conv2d(c, o, **{"kernel_size": 3, "padding": 1, **options})
    x, bias = torch.randn(n, c, h, w).contiguous(memory_format=layout), torch.randn(o)
    exact, before = m.double()(x.double()), x.clone()
    m.float()
    plain = error(m(x), exact)
    for _ in range(2):  # the second time with what was kept of the first
        assert error(ops.conv(m, x), exact) <= max(2 * plain, 3e-6)
    own = 0 if m.bias is None else m.bias.double()[:, None, None]
    assert error(ops.conv(m, x, bias=bias), exact - own + bias.double()[:, None, None]) <= max(2 * plain, 3e-6)
    assert error(ops.conv(m, x, bias=None), exact - own) <= max(2 * plain, 3e-6)
    assert torch.equal(x, before)


def test_which_form_is_taken(ops, monkeypatch):
    """Else the tests above and below could compare an operation with itself."""
    taken = []
    for name in ("linear", "conv", "winograd", "group_norm_silu", "geglu", "layer_norm", "temporal_attention"):
        real = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, name=name, real=real: taken.append(name) or real(*args))
    unfolded = ops.unfolded
    ops.unfolded = lambda *args: taken.append("unfolded") or unfolded(*args)
    m = nn.Conv2d(208, 176, 3, padding=1)
    with torch.no_grad():
        for n, h in ((4, 8), (1, 4), (1, 32), (2, 9)):
            ops.conv(m, torch.randn(n, 208, h, h))
        ops.double_and_conv(m, torch.randn(1, 208, 16, 16))
        ops.temporal_conv(nn.Conv3d(208, 160, (3, 1, 1), padding=(1, 0, 0)), torch.randn(1, 208, 4, 9), None)
        ops.group_norm(nn.GroupNorm(4, 32), ops.channels_last(torch.randn(2, 32, 4, 4)), 2)
        ops.frame_attention(*torch.randn(3, 1, 4, 5, 2, 16))
        ops.geglu(nn.Linear(16, 64), torch.randn(200, 16))
        ops.add_layer_norm(nn.LayerNorm(32), *torch.randn(2, 1, 3, 32))
    wanted = ["winograd", "unfolded", "linear", "winograd", "winograd", "unfolded", "linear", "group_norm_silu",
              "temporal_attention", "geglu", "layer_norm"]  # fmt: skip
    if ops.matrix_units:
        wanted = ["winograd", "unfolded", "linear", "winograd", "conv", "winograd", "conv", "group_norm_silu",
                  "temporal_attention", "linear", "linear", "geglu", "layer_norm"]  # fmt: skip
    assert taken == (wanted if ops.compiled else ["unfolded"] * 2 if cpu.PRODUCTS else [])


def test_matrix_units_are_used():
    """Where the processor has them and the compiler knows them."""
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    if "amx_bf16" not in flags or not hasattr(kernels.library(), "conv"):
        pytest.skip("no matrix units")
    assert kernels.has_matrix_units()


@pytest.mark.parametrize("k", [320, 1280, 5120])
@pytest.mark.parametrize("positive", [True, False])
def test_products_are_as_exact_as_torchs(ops, k, positive):
    if not ops.compiled:
        pytest.skip("PyTorch's operators")
    torch.manual_seed(0)
    x, w = torch.randn(64, k), torch.randn(96, k)
    x, w = (x.abs(), w.abs()) if positive else (x, w)
    exact = x.double() @ w.double().T
    mine, torchs = ((y - exact).square().mean().sqrt() for y in (kernels.linear(x, w, None), x @ w.T))
    assert mine <= (1 if ops.matrix_units else 1.5) * torchs


@torch.no_grad()
def test_a_row_of_a_product_depends_on_no_other(ops):
    """To the last bit: so q, k and v can be one product or three, and a batch can be split."""
    if not ops.matrix_units:
        pytest.skip("no matrix units")
    torch.manual_seed(0)
    x, w = torch.randn(300, 720), torch.randn(400, 720)
    y = kernels.linear(x, w, None)
    for rows, columns in ((300, 100), (40, 400), (8, 400), (300, 8), (1, 1)):
        assert torch.equal(kernels.linear(x[:rows], w[:columns], None), y[:rows, :columns])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "size, o, kernel, stride",
    [((2, 48, 20, 30), 33, 3, 1), ((1, 320, 5, 8), 300, 3, 1), ((3, 32, 17, 31), 48, (2, 3), (1, 2))],
    ids=["many pixels", "many channels", "stride"],
)
@torch.no_grad()
def test_convolutions_by_matrix_units(threads, size, o, kernel, stride):
    """With a residual; split among threads by pixels or by channels; with long sums, in pieces."""
    if not kernels.has_matrix_units():
        pytest.skip("no matrix units")
    before = torch.get_num_threads()
    torch.manual_seed(0)
    m, x = nn.Conv2d(size[1], o, kernel, stride, padding=1), torch.randn(size).contiguous(memory_format=LAST)
    exact = m.double()(x.double())
    residual = torch.randn(exact.shape).contiguous(memory_format=LAST)
    torch.set_num_threads(threads)
    try:
        y = kernels.conv(x, m.float().weight, m.bias, m.stride, m.padding, residual)
    finally:
        torch.set_num_threads(before)
    assert y.is_contiguous(memory_format=LAST) and error(y, exact + residual) <= 1e-6


def test_sizes_that_do_not_fit_are_refused(ops):
    if not ops.compiled:
        pytest.skip("PyTorch's operators")
    m = nn.Linear(64, 48)
    with pytest.raises(ValueError, match="cannot read x of"):
        kernels.linear(torch.randn(2, 32), m.weight, m.bias)
    with pytest.raises(ValueError, match="residual"):
        kernels.linear(torch.randn(2, 64), m.weight, m.bias, torch.randn(48))
    x, image, four, frames = torch.randn(2, 4, 32), torch.randn(2, 32, 4, 4), torch.ones(4), torch.randn(1, 4, 5, 2, 16)
    for call in (
        lambda: kernels.linear(x, torch.randn(48, 32), four),
        lambda: kernels.layer_norm(x, four, torch.ones(32), 1e-5, None),
        lambda: kernels.layer_norm(x, torch.ones(32), torch.ones(32), 1e-5, torch.randn(3, 32)),
        lambda: kernels.layer_norm(x, torch.ones(32), torch.ones(32), 1e-5, None, x[0]),
        lambda: kernels.group_norm_silu(image, four, torch.ones(32), 4, 1e-5, True),
        lambda: kernels.geglu(x, x[0], None),
        lambda: kernels.geglu(x.clone(), x, four),
        lambda: kernels.winograd(image, torch.randn(16, 48, 32), four),
        lambda: kernels.temporal_attention(frames, frames[:, :2], frames),
    ):
        with pytest.raises(ValueError, match="has the shape"):
            call()
    with pytest.raises(ValueError, match="cannot read x of"):
        kernels.winograd(image, torch.randn(16, 48, 16), None)
    if ops.matrix_units:
        for c, height in ((16, 1), (32, 8)):
            with pytest.raises(ValueError, match="cannot read x of"):
                kernels.conv(torch.randn(1, c, height, 90), torch.randn(32, 16, 2, 3), None, (2, 1), (0, 1))
        with pytest.raises(ValueError, match="residual"):
            kernels.conv(torch.randn(1, 16, 9, 9), torch.randn(32, 16, 1, 1), None, (1, 1), (0, 0), torch.ones(32))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(1, 32, 5, 3), (4, 32, 8, 8), (1, 32, 20, 31), (3, 32, 9, 11)], ids=str)
@torch.no_grad()
def test_doubling(ops, monkeypatch, size, bias):
    monkeypatch.setattr(kernels, "TILES", 7)
    torch.manual_seed(0)
    m, x = nn.Conv2d(32, 48, 3, padding=1, bias=bias), torch.randn(size)
    exact = nn.functional.interpolate(x.double(), scale_factor=2.0, mode="nearest")
    exact = m.double()(exact)
    m.float()
    for _ in range(2):  # the second time with what was kept of the first
        assert error(ops.double_and_conv(m, x), exact) <= 1e-6
    assert bool(ops.kept) == (ops.compiled and x[:, 0].numel() >= 256)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("size", [(1, 48, 4, 6), (2, 48, 3, 4), (1, 40, 1, 5), (2, 48, 4, 30), (2, 40, 4, 30)], ids=str)
@torch.no_grad()
def test_along_the_frames(ops, size, residual):
    torch.manual_seed(0)
    m = nn.Conv3d(size[1], size[1], (3, 1, 1), padding=(1, 0, 0))
    x = torch.randn(size).contiguous(memory_format=torch.channels_last)
    added = torch.randn(size) if residual else None  # in another layout
    exact = m.double()(x.double()[..., None])[..., 0] + (0 if added is None else added)
    m.float()
    assert error(ops.temporal_conv(m, x, added), exact) <= 1e-6


@torch.no_grad()
def test_more_threads_than_work(ops):
    """So that no thread writes outside of the memory that it was given."""
    before = torch.get_num_threads()
    torch.manual_seed(0)
    m, x = nn.Conv2d(16, 368, 3, padding=1), torch.randn(16, 16, 4, 4)
    product, row, rows = nn.Linear(16, 3), torch.randn(1, 16), torch.randn(200, 16)
    wants = m(x).double(), product(row).double(), product(rows).double()
    torch.set_num_threads(5)
    try:
        for _ in range(20):
            assert error(ops.conv(m, x), wants[0]) <= 1e-5 and error(ops.linear(product, row), wants[1]) <= 1e-5
            assert error(ops.linear(product, rows), wants[2]) <= 1e-5
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows, k, n", [(5, 24, 80), (1, 32, 96), (7, 2064, 22), (64, 48, 14), (100, 24, 64)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_products(ops, rows, k, n, bias):
    torch.manual_seed(0)
    m, x, residual = nn.Linear(k, n, bias=bias), torch.randn(2, rows, k).transpose(0, 1), torch.randn(rows, 2, n)
    exact = m.double()(x.double())
    value, gate = exact.chunk(2, -1)
    m.float()
    kept = residual.clone()
    assert error(ops.linear(m, x), exact) <= 1e-6
    assert error(ops.linear_add(m, x, residual), exact + residual) <= 1e-6 and torch.equal(residual, kept)
    assert error(ops.geglu(m, x), value * nn.functional.gelu(gate)) <= 1e-6


@torch.no_grad()
def test_gelu_of_every_size():
    if kernels.library() is None:
        pytest.skip("no C++ compiler")
    gate = torch.linspace(-12, 12, 16 * 4001).view(-1, 16)
    y = kernels.geglu(torch.ones_like(gate), gate, None)
    exact = nn.functional.gelu(gate.double())
    mine, torchs = (y - exact).abs().max(), (nn.functional.gelu(gate) - exact).abs().max()
    assert mine <= 1.5 * torchs


@pytest.mark.parametrize("m, k, n", [
    (300, 1040, 20), (20, 1040, 300), (530, 48, 33), (33, 2576, 530), (17, 16, 1), (300, 1312, 300), (600, 48, 300),
])
@torch.no_grad()
def test_products_larger_than_the_caches(ops, m, k, n):
    """And with rows and columns left over."""
    if not ops.compiled:
        pytest.skip("PyTorch's operators")
    torch.manual_seed(0)
    x, w, b, residual = torch.randn(m, k), torch.randn(n, k), torch.randn(n), torch.randn(m, n)
    exact = x.double() @ w.double().T
    assert error(kernels.linear(x, w, b, residual), exact + b + residual) <= 1e-6
    assert error(kernels.linear(x, w, None), exact) <= 1e-6


@torch.no_grad()
def test_products_of_numbers_of_every_size(ops):
    """The matrix units compute with parts of numbers. Together they have all digits, whatever the size of a number."""
    if not ops.compiled:
        pytest.skip("PyTorch's operators")
    torch.manual_seed(0)
    sizes = 10.0 ** torch.linspace(-15, 15, 64)[:, None]
    x, w = torch.randn(64, 96) * sizes, torch.randn(48, 96) / sizes[:48].flip(0)
    exact, sums = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    assert ((kernels.linear(x, w, None) - exact).abs() / sums).max() <= 3e-7  # 2.5 units in the last place


@pytest.mark.parametrize(
    "span, silu, size",
    [(1, True, (2, 64, 5, 9)), (3, True, (6, 48, 3, 4)), (2, False, (2, 32, 9, 9)), (1, True, (2, 24, 3, 4))],
)
@torch.no_grad()
def test_group_norm(ops, span, silu, size):
    """Also far from zero, where PyTorch's loses all digits in channels-last memory, and the kernel does not."""
    torch.manual_seed(0)
    m, x = nn.GroupNorm(8, size[1], eps=1e-6), torch.randn(size)
    nn.init.normal_(m.weight), nn.init.normal_(m.bias)
    if ops.compiled and size[1] % kernels.LANES == 0:
        x[0] = 1000 + x[0] / 10
    video = x.double().unflatten(0, (-1, span)).transpose(1, 2)  # n c span h w
    exact = m.double()(video).transpose(1, 2).flatten(0, 1)
    y = ops.group_norm(m.float(), x.contiguous(memory_format=torch.channels_last), span, silu=silu)
    assert error(y, nn.functional.silu(exact) if silu else exact) <= 1e-3 and y.shape == x.shape
    assert error(y[-1], (nn.functional.silu(exact) if silu else exact)[-1]) <= (1e-6 if span == 1 else 1e-3)


@pytest.mark.parametrize("size", [(2, 5, 3, 48), (1, 4, 320), (7, 32), (2, 3, 5, 20)], ids=str)
@pytest.mark.parametrize("numbered", [True, False])
@torch.no_grad()
def test_layer_norm(ops, size, numbered):
    """Also far from zero. positions: one for each frame, which is the second axis."""
    torch.manual_seed(0)
    numbered = numbered and len(size) == 4
    m, x, residual = nn.LayerNorm(size[-1]), torch.randn(size) + 50, torch.randn(size)
    nn.init.normal_(m.weight), nn.init.normal_(m.bias)
    positions = torch.randn(size[1], size[-1]) if numbered else None
    added, kept = (positions[:, None] if numbered else 0), (x.clone(), residual.clone())
    exact = copy.deepcopy(m).double()
    assert error(ops.layer_norm(m, x, positions), exact(x.double()) + added) <= 3e-6 and torch.equal(x, kept[0])
    together, y = ops.add_layer_norm(m, x, residual, positions)
    assert torch.equal(together, kept[0] + residual) and torch.equal(residual, kept[1])
    assert error(y, exact(together.double()) + added) <= 3e-6


@pytest.mark.parametrize("size", [(2, 5, 70, 2, 16), (1, 16, 3, 4, 32), (1, 1, 64, 1, 8), (1, 33, 2, 2, 48)], ids=str)
@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_attention_across_frames(ops, size, fused):
    torch.manual_seed(0)
    q, k, v = torch.randn((*size[:3], 3, *size[3:])).unbind(3) if fused else torch.randn((3, *size))
    exact = [x.double().permute(0, 2, 3, 1, 4) for x in (q * 3, k, v)]  # b p h f d
    exact = nn.functional.scaled_dot_product_attention(*exact).permute(0, 3, 1, 2, 4)
    y = ops.frame_attention(q * 3, k, v)
    assert y.is_contiguous() and error(y, exact) <= 2e-6


def test_onednn_has_its_op():
    assert cpu.ONEDNN or not torch.backends.mkldnn.is_available(), "torch has dropped the op: find its successor"


@torch.no_grad()
def test_copies_of_weights(monkeypatch):
    """They take at most 0.3 times the weights, and never outlive a change, whoever makes it and how."""
    if kernels.library() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.delenv("MINIT2V_KERNELS", raising=False)
    torch.manual_seed(0)
    unet = UNet3DConditionModel(block_out_channels=(176,), layers_per_block=1, norm_num_groups=8,
                                cross_attention_dim=16, attention_head_dim=8,
                                down_block_types=("CrossAttnDownBlock3D",), up_block_types=("CrossAttnUpBlock3D",))
    call = torch.randn(1, 4, 4, 8, 8), 500, torch.randn(1, 7, 16)

    def check(run) -> None:
        want = unet(*call)
        for _ in range(2):
            assert error(run(*call), want.double()) <= 1e-5

    run = fast.runner(unet)
    check(run)
    kept = run.executor.ops.kept_bytes()
    assert 0 < kept <= 0.3 * sum(p.nbytes for p in unet.parameters())
    for p in unet.parameters():
        p.mul_(1.02)
    check(run)
    for p in unet.parameters():
        p.data *= 1.02  # which PyTorch does not count
    check(fast.runner(unet))
    conv = next(m for m in unet.modules() if (m, False) in run.executor.ops.kept)
    conv.weight.data.copy_(conv.weight.data.flip(0))  # the same numbers in another order
    check(fast.runner(unet))
    unet.load_state_dict({name: v * 1.1 for name, v in unet.state_dict().items()})
    check(run)
    conv.weight = nn.Parameter(torch.randn_like(conv.weight))
    check(run)
    monkeypatch.setattr(cpu, "KEPT", 0.0)
    unet.double().float()
    check(run)
    assert run.executor.ops.kept_bytes() == 0


def test_the_kernels_are_compiled_once(monkeypatch, tmp_path, caplog):
    """Two processes may do it at once. What they leave is one library, which is loaded from then on."""
    if kernels.library() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = "from minit2v_kernels import cpu; assert cpu.library() is not None"
    for process in [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]:
        assert process.wait() == 0
    (made,) = (tmp_path / "minit2v").iterdir()
    assert ctypes.CDLL(str(made)).linear
    monkeypatch.setattr(subprocess, "run", once(subprocess.run))
    with caplog.at_level(logging.INFO):
        assert library.__wrapped__() is not None
    assert not caplog.records


def once(run):
    """subprocess.run that may only ask for the compiler's version."""
    def only(command, **options):
        assert command[1:] == ["--version"]
        return run(command, **options)
    return only


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler", "gives something else"])
def test_without_a_compiler(monkeypatch, tmp_path, caplog, compiler):
    """PyTorch's operators run, and a warning says why."""
    if "else" in compiler:
        script = "#!/bin/sh\n[ $1 = --version ] && exit\nfor last; do :; done\necho broken > $last\n"
        (tmp_path / "c++").write_text(script)
        (tmp_path / "c++").chmod(0o755)
        compiler = str(tmp_path / "c++")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", compiler)
    made = library.__wrapped__()
    assert made is None and compiler in caplog.text and "PyTorch's operators run" in caplog.text
    monkeypatch.setattr(kernels, "library", lambda: made)
    assert not cpu.CPUOps(torch.ones(1), nn.Linear(4, 4)).compiled
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    caplog.clear()
    assert library.__wrapped__() is None and not caplog.text  # nothing is wrong with a machine that has no compiler


def test_a_cache_folder_that_cannot_be_written(monkeypatch, tmp_path):
    if kernels.library() is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(kernels.tempfile, "tempdir", None)
    assert library.__wrapped__() is not None


@torch.no_grad()
def test_not_a_number_stays_one(ops):
    """Also NaN with other bits than the usual ones."""
    if not ops.compiled:
        pytest.skip("PyTorch's operators differ among themselves")
    odd = torch.tensor([0x7FC12345], dtype=torch.int32).view(torch.float32)
    x = torch.randn(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    x[0, 3, 1, 1] = odd
    y = ops.group_norm(nn.GroupNorm(4, 16), x, 1, silu=True)
    assert y[:, :4].isnan().all() and not y[:, 4:].isnan().any()
    q, k, v = torch.randn(3, 1, 4, 5, 2, 16)
    q[0, 1, 2, 1, 3] = odd
    y = ops.frame_attention(q, k, v)
    assert y[0, 1, 2, 1].isnan().all() and y.isnan().sum() == 16
    for bits in (0x7FC12345, 0x7FFFFFFF, 0x7F800001, -1, 0x7F800000):  # the last one is infinity
        x = torch.randn(20, 48)
        x[3, 7] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
        for of_x in (True, False):
            other = torch.randn(40, 48)
            y = kernels.linear(x, other, None) if of_x else kernels.linear(other, x, None).T
            assert not y[3].isfinite().any() and y[:3].isfinite().all() and y[4:].isfinite().all()


@torch.no_grad()
def test_tensors_that_lie_scattered_or_are_of_another_dtype(ops):
    """Parameters that a user has replaced are read where they lie, or refused. They are never misread."""
    torch.manual_seed(0)
    wide = torch.randn(64, 2)
    linear, norm = nn.Linear(32, 64), nn.GroupNorm(4, 64)
    linear.bias.data, norm.weight.data, norm.bias.data = wide[:, 0], wide[:, 1], wide[:, 0]
    x, image = torch.randn(3, 32), torch.randn(2, 64, 4, 4).contiguous(memory_format=torch.channels_last)
    assert error(ops.linear(linear, x), linear.double()(x.double())) <= 1e-6
    assert error(ops.group_norm(norm, image, 1), norm.double()(image.double())) <= 1e-5
    q, k, v = torch.randn(3, 1, 4, 16, 2, 5).transpose(-1, -3)
    exact = [y.double().permute(0, 2, 3, 1, 4) for y in (q, k, v)]
    exact = nn.functional.scaled_dot_product_attention(*exact).permute(0, 3, 1, 2, 4)
    assert error(ops.frame_attention(q, k, v), exact) <= 1e-6
    for call in (lambda: ops.linear(linear, x), lambda: ops.group_norm(norm, image, 1)):  # in float64 now
        with pytest.raises((ValueError, RuntimeError), match="float|Float|double|Double"):
            call()


def test_torchs_operators_are_chosen(monkeypatch):
    monkeypatch.setenv("MINIT2V_KERNELS", "torch")
    assert not cpu.CPUOps(torch.ones(1), nn.Linear(4, 4)).compiled


@torch.no_grad()
def test_huge_pages_change_no_value():
    tensors = [torch.randn(700, 700) for _ in range(5)] + [torch.randn(3), torch.randn(3, 1 << 20)[1]]
    before = [x.clone() for x in tensors]
    places = [x.data_ptr() for x in tensors]
    use_huge_pages(tensors)
    assert all(map(torch.equal, tensors, before)) and places == [x.data_ptr() for x in tensors]
