"""The networks with all ops as kernels: no further from float64 than they are in PyTorch, and every op is launched."""

import copy
from collections import Counter

import pytest
import torch
from judge import DEVICE, relative

from minit2v import fast
from minit2v.models.unet3d import UNet3DConditionModel
from minit2v.models.unet_motion import UNetMotionModel
from minit2v.models.vae import AutoencoderKL
from minit2v_kernels import _dispatch, norm

SHARED = {"block_out_channels": (16,), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 16}
UNET3D = {
    **SHARED,
    "down_block_types": ("CrossAttnDownBlock3D",),
    "up_block_types": ("CrossAttnUpBlock3D",),
    "attention_head_dim": 8,
}
MOTION = {
    **SHARED,
    "down_block_types": ("CrossAttnDownBlockMotion",),
    "up_block_types": ("CrossAttnUpBlockMotion",),
    "num_attention_heads": 2,
    "motion_num_attention_heads": 2,
}
VAE = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
ALL = set(_dispatch.PROVEN)
MODELS = {  # what makes it, and the ops that it has
    "unet3d": (lambda: UNet3DConditionModel(**UNET3D), ALL),
    "motion": (lambda: UNetMotionModel(**MOTION), ALL - {"temporal_conv"}),
    "motion, clip norms": (
        lambda: UNetMotionModel(**MOTION, resnet_norms="video", motion_norms="video"), ALL - {"temporal_conv"}
    ),
    "vae": (lambda: AutoencoderKL(**VAE), {"group_norm_silu"}),
}  # fmt: skip
DTYPES = (torch.float32, torch.float16)


def randomized(network: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random; what is of size 1 stays so."""
    torch.manual_seed(0)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.2)
    for module in network.modules():
        if "Norm" in type(module).__name__:
            module.weight.data += 1
    return network.eval().to(DEVICE)


def run(network: torch.nn.Module, plain: bool = False) -> torch.Tensor:
    """A decoded picture, or a prediction, of the fast path or as it is written: the same input for every dtype."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, network.dtype)

    call = network if plain else fast.runner(network)
    if isinstance(network, AutoencoderKL):
        return call.decode(randn(2, 4, 3, 3))
    return call(randn(1, 4, 2, 3, 3), torch.tensor([500]), randn(1, 3, 16))


@pytest.fixture
def launched(monkeypatch) -> Counter:
    """How often each kernel really ran."""
    counted, start = Counter(), _dispatch.start

    def count(kernel, *args):
        counted[kernel.__name__] += 1
        start(kernel, *args)

    monkeypatch.setattr(_dispatch, "start", count)
    return counted


@pytest.mark.parametrize("name, dtype", [(name, DTYPES[n % 2]) for n, name in enumerate(MODELS)], ids=str)
@torch.no_grad()
def test_a_network_of_kernels(name, dtype, launched, monkeypatch):
    make, ops = MODELS[name]
    norm.plan.cache_clear()
    if dtype == torch.float32:  # a norm in three launches, as for large inputs
        monkeypatch.setattr(norm, "LARGEST", 0)
    network = randomized(make()).to(dtype)
    monkeypatch.setenv("MINIT2V_KERNELS", "torch")
    want = run(copy.deepcopy(network).double(), plain=True)
    eager = relative(run(network, plain=True), want)
    assert 0 < eager < 1e-2 and not launched

    asked = Counter()
    for op in _dispatch.PROVEN:
        monkeypatch.setenv("MINIT2V_KERNELS", f"torch,{op}=triton")
        with _dispatch.record() as launches:
            run(network)
        assert bool(launches) == (op in ops), op
        asked.update(launch.kernel.__name__ for launch in launches)
    monkeypatch.setenv("MINIT2V_KERNELS", "triton")
    got = run(network)
    assert launched == asked and (launched["group_norm_whole"] > 0) == (dtype != torch.float32)
    assert got.dtype == dtype and relative(got, want) <= 1.5 * eager


@pytest.mark.parametrize("name", ["unet3d", "motion"])
@torch.no_grad()
def test_the_fast_path_of_kernels(name, launched, monkeypatch):
    """The kernels read q, k and v out of one projection; on a GPU they are captured in a graph."""
    norm.plan.cache_clear()
    network = randomized(MODELS[name][0]()).half()
    monkeypatch.setenv("MINIT2V_KERNELS", "torch")
    want = run(copy.deepcopy(network).double(), plain=True)
    eager = relative(run(network, plain=True), want)
    monkeypatch.setenv("MINIT2V_KERNELS", "triton")
    fast.optimize(network, graphs=DEVICE == "cuda")
    for _ in range(2 if DEVICE == "cuda" else 1):
        assert relative(run(network), want) <= 1.5 * eager
    assert launched
    monkeypatch.setenv("MINIT2V_KERNELS", "torch")
    assert relative(run(network), want) <= 1.5 * eager, "another choice is another graph"
