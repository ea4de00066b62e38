"""group_norm_silu's kernel against its definition."""

import pytest
import torch

from minit2v_kernels import group_norm_silu, group_norm_silu_ref
from minit2v_kernels._dispatch import interpreting

DEVICE = "cpu" if interpreting() else "cuda"
SHAPES = [  # (n c *spatial), groups
    pytest.param((2, 16, 8, 8), 16, id="channel-per-group"),
    pytest.param((1, 64, 3, 5, 7), 8, id="5d-odd"),
    pytest.param((2, 30, 17), 3, id="3d-not-a-power-of-two"),
    pytest.param((1, 20, 33, 31), 2, id="many-tiles"),
    pytest.param((2, 12, 1, 1), 2, id="one-pixel"),
]


def tensors(shape: tuple[int, ...], mean: float, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    made = torch.randn(shape) + mean, 1 + 0.5 * torch.randn(shape[1]), torch.randn(shape[1])
    return [t.to(DEVICE, dtype) for t in made]


def check(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, groups: int) -> torch.Tensor:
    want = group_norm_silu_ref(x.double(), w.double(), b.double(), groups)
    got = group_norm_silu(x, w, b, groups, impl="triton")
    assert got.dtype == x.dtype and got.shape == x.shape
    error, torchs = ((y.double() - want).abs().max() for y in (got, group_norm_silu_ref(x, w, b, groups)))
    assert error <= 2 * torchs + torch.finfo(x.dtype).eps * want.abs().max()
    return got


@pytest.mark.parametrize("shape, groups", SHAPES)
@pytest.mark.parametrize("mean", [0.0, 10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_forward(shape, groups, mean, dtype):
    check(*tensors(shape, mean, dtype), groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_channels_last(dtype):
    x, w, b = tensors((2, 40, 9, 7), 10.0, dtype)
    y = check(x.contiguous(memory_format=torch.channels_last), w, b, 4)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_view_that_is_neither_layout():
    x, w, b = tensors((4, 6, 5, 24), 1.0, torch.float32)
    check(x.permute(2, 3, 0, 1), w.new_ones(24), w.new_zeros(24), 3)


def test_backward():
    leaves = [t.requires_grad_() for t in tensors((2, 8, 5, 3), 1.0, torch.float32)]
    dy = torch.randn(2, 8, 5, 3, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    got = torch.autograd.grad(group_norm_silu(*leaves, 4, impl="triton"), leaves, dy)
    want = torch.autograd.grad(group_norm_silu_ref(*leaves, 4), leaves, dy)
    torch.testing.assert_close(got, want)


def test_the_environment_asks_too(monkeypatch):
    x, w, b = tensors((1, 4, 3, 3), 0.0, torch.float32)
    want = group_norm_silu(x, w, b, 2, impl="triton")
    monkeypatch.setenv("MINIT2V_KERNELS", "triton")
    assert torch.equal(group_norm_silu(x, w, b, 2), want)
