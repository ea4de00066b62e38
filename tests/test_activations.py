"""The memory of a denoising step at full size, counted on `meta` by benchmarks/activations.py."""

from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("benchmarks")
GIB = 2**30
VAE = 83_653_863 * 2  # bytes of its weights in float16


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))


@pytest.mark.parametrize("workload, most", [("modelscope-64", 4.2), ("zeroscope-xl", 7.2)])
def test_a_step_with_kernels_leaves_room_on_a_small_gpu(workload, most):
    """Weights of UNet and VAE and the peak of a step; the goals are the project's own."""
    import activations
    from kernel_shapes import WORKLOADS

    found = activations.count(WORKLOADS[workload], peer=False)
    assert found["weights"] + found["kernels"] + VAE < most * GIB
    assert found["kernels"] < 0.62 * found["torch"]  # GEGLU's two halves are never stored


def test_what_is_counted():
    """Two tensors alive at once are two tensors, a view is none, and a tensor that died is none."""
    import activations

    network = torch.nn.Linear(4, 4, device="meta")
    x = torch.empty(256, 4, device="meta")
    assert activations.peak(network, lambda: network(x)) == 256 * 4 * 4
    assert activations.peak(network, lambda: network(network(x).view(4, -1).view(256, 4))) == 2 * 256 * 4 * 4
    assert activations.peak(network, lambda: [network(x).numel() for _ in range(3)]) == 256 * 4 * 4
    assert activations.peak(network, lambda: network.weight.t() + 1) == 4 * 4 * 4
