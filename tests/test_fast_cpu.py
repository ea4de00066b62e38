"""What the fast path does on a CPU in float32: every form of an operation, against the module in float64."""

import pytest
import torch
from torch import nn

from minit2v import fast
from minit2v.fast import cpu
from minit2v.models.unet3d import UNet3DConditionModel


@pytest.fixture(params=[False, True], ids=["oneDNN", "MKL"])
def ops(request, monkeypatch):
    """As on a processor with AVX-512, and as on one without."""
    monkeypatch.setattr(cpu, "PRODUCTS", request.param)
    return cpu.CPUOps(torch.ones(1), nn.Linear(2000, 2000))


def error(y: torch.Tensor, want: torch.Tensor) -> float:
    return ((y.double() - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize(
    "n, c, h, w, o, options",
    [
        pytest.param(4, 200, 8, 8, 160, {}, id="winograd"),
        pytest.param(3, 170, 4, 30, 176, {}, id="winograd, no square"),
        pytest.param(2, 200, 34, 36, 170, {}, id="winograd, in pieces of frames and rows"),
        pytest.param(2, 200, 9, 20, 160, {}, id="odd height"),
        pytest.param(2, 24, 4, 4, 40, {}, id="few pixels"),
        pytest.param(1, 24, 1, 1, 40, {}, id="one pixel"),
        pytest.param(2, 24, 6, 8, 40, {"stride": 2}, id="few pixels, stride"),
        pytest.param(2, 24, 4, 5, 40, {"padding": (0, 2), "kernel_size": (2, 3)}, id="few pixels, another kernel"),
        pytest.param(2, 24, 4, 5, 40, {"padding": "same"}, id="few pixels, padding by name"),
        pytest.param(2, 24, 4, 5, 40, {"kernel_size": 1, "padding": 1}, id="1x1 with padding"),
        pytest.param(2, 24, 8, 8, 40, {"kernel_size": 1, "padding": 0, "stride": 2}, id="1x1 with stride"),
        pytest.param(4, 40, 8, 9, 24, {}, id="as it is"),
        pytest.param(2, 200, 16, 16, 160, {"stride": 2}, id="stride"),
        pytest.param(2, 200, 16, 16, 160, {"padding_mode": "reflect"}, id="reflected"),
        pytest.param(2, 200, 16, 16, 160, {"groups": 2}, id="groups"),
        pytest.param(2, 200, 16, 16, 160, {"dilation": 2}, id="dilation"),
        pytest.param(2, 200, 16, 16, 160, {"kernel_size": 1, "padding": 0}, id="1x1"),
        pytest.param(2, 200, 16, 16, 160, {"bias": False}, id="no bias"),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@torch.no_grad()
def test_convolutions(ops, monkeypatch, n, c, h, w, o, options, layout):
    monkeypatch.setattr(cpu, "CHUNK", 400_000)
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
    """Else the test above could compare a convolution with itself."""
    taken = []
    for name in ("winograd", "winograd_of_doubled", "unfolded"):
        real = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *args, name=name, real=real: taken.append(name) or real(*args))
    m = nn.Conv2d(200, 160, 3, padding=1)
    with torch.no_grad():
        for n, h in ((4, 8), (1, 4), (1, 32), (2, 9)):
            ops.conv(m, torch.randn(n, 200, h, h))
        ops.double_and_conv(m, torch.randn(1, 200, 16, 16))
        ops.temporal_conv(nn.Conv3d(200, 160, (3, 1, 1), padding=(1, 0, 0)), torch.randn(1, 200, 4, 9), None)
    wanted = ["winograd", "unfolded", "winograd", "winograd_of_doubled", "unfolded"]
    assert taken == (wanted if cpu.PRODUCTS else [])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(1, 24, 5, 3), (4, 24, 8, 8), (1, 24, 20, 31), (3, 24, 9, 11)], ids=str)
@torch.no_grad()
def test_doubling(ops, monkeypatch, size, bias):
    monkeypatch.setattr(cpu, "CHUNK", 40_000)
    torch.manual_seed(0)
    m, x = nn.Conv2d(24, 40, 3, padding=1, bias=bias), torch.randn(size)
    exact = nn.functional.interpolate(x.double(), scale_factor=2.0, mode="nearest")
    exact = m.double()(exact)
    m.float()
    for _ in range(2):  # the second time with what was kept of the first
        assert error(ops.double_and_conv(m, x), exact) <= 1e-6
    assert bool(ops.kept) == (cpu.PRODUCTS and x[:, 0].numel() >= 256)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("size", [(1, 40, 4, 6), (2, 40, 3, 4), (1, 40, 1, 5), (2, 40, 4, 30)], ids=str)
@torch.no_grad()
def test_along_the_frames(ops, size, residual):
    torch.manual_seed(0)
    m = nn.Conv3d(40, 40, (3, 1, 1), padding=(1, 0, 0))
    x = torch.randn(size).contiguous(memory_format=torch.channels_last)
    added = torch.randn(size).contiguous(memory_format=torch.channels_last) if residual else None
    exact = m.double()(x.double()[..., None])[..., 0] + (0 if added is None else added)
    m.float()
    assert error(ops.temporal_conv(m, x, added), exact) <= 1e-6


@pytest.mark.parametrize("rows", [10, 100])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_products(ops, rows, bias):
    torch.manual_seed(0)
    m, x = nn.Linear(24, 80, bias=bias), torch.randn(2, rows, 24).transpose(0, 1)
    exact = m.double()(x.double())
    value, gate = exact.chunk(2, -1)
    m.float()
    assert error(ops.linear(m, x), exact) <= 1e-6
    assert error(ops.geglu(m, x), value * nn.functional.gelu(gate)) <= 1e-6


@pytest.mark.parametrize("size", [(2, 5, 70, 2, 8), (1, 16, 3, 4, 8), (1, 1, 64, 1, 8)], ids=str)
@torch.no_grad()
def test_attention_across_frames(ops, size):
    torch.manual_seed(0)
    q, k, v = (torch.randn(size) for _ in range(3))
    exact = [x.double().permute(0, 2, 3, 1, 4) for x in (q, k, v)]  # b p h f d
    exact = nn.functional.scaled_dot_product_attention(*exact).permute(0, 3, 1, 2, 4)
    y = ops.frame_attention(q, k, v)
    assert y.is_contiguous() and error(y, exact) <= 1e-6


def test_onednn_has_its_op():
    assert cpu.ONEDNN or not torch.backends.mkldnn.is_available(), "torch has dropped the op: find its successor"


@torch.no_grad()
def test_copies_of_weights(monkeypatch):
    """They take at most 0.3 times the weights, and never outlive a change, whoever makes it and how."""
    monkeypatch.setattr(cpu, "PRODUCTS", True)
    torch.manual_seed(0)
    unet = UNet3DConditionModel(block_out_channels=(168,), layers_per_block=1, norm_num_groups=8,
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
    conv = next(m for m in unet.modules() if (m, cpu.transform) in run.executor.ops.kept)
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
