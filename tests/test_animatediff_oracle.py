"""UNetMotionModel against tests/oracles/animatediff.py, which was written from docs/animatediff.md alone.

The oracle's author had seen no implementation, so that what both say, the document says. All in float64.
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from minit2v import MotionAdapter, UNet2DConditionModel, UNetMotionModel


def load_oracle() -> ModuleType:
    """The oracle as a module: tests/ is not a package, so by its path."""
    path = Path(__file__).parent / "oracles" / "animatediff.py"
    spec = importlib.util.spec_from_file_location("animatediff_oracle", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


oracle = load_oracle()


class Recorded(dict[str, Tensor]):
    """A state dict that remembers which of its tensors were read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)


def build(
    version: str,
    layers: int = 1,
    channels: tuple[int, ...] = (8, 16),
    spatial: tuple[bool, ...] = (True, False),
    groups: int = 4,
    heads: int = 2,
    motion_heads: int = 2,
    rows: int | None = None,
    adapter_options: dict[str, Any] | None = None,
    compat: str | None = None,
) -> tuple[UNetMotionModel, Any]:
    """A small model, every parameter random (norm weights around 1), and the oracle's sizes of it."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in spatial),
        up_block_types=tuple("CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(spatial)),
        norm_num_groups=groups,
        cross_attention_dim=12,
        attention_head_dim=heads,
        layers_per_block=layers,
    )
    adapter = MotionAdapter(
        block_out_channels=channels,
        motion_norm_num_groups=groups,
        motion_num_attention_heads=motion_heads,
        motion_max_seq_length=rows or (24 if version == "v1" else 32),
        use_motion_mid_block=version == "v2",
        motion_layers_per_block=layers,
        **({"resnet_norms": "video" if version == "v1" else "frame"} if adapter_options is None else adapter_options),
    )
    model = UNetMotionModel.from_unet2d(unet, adapter, **({} if compat is None else {"compat": compat})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, oracle.Sizes(version, spatial, layers, groups, heads, groups, motion_heads)


def inputs(b: int = 1, f: int = 3, h: int = 5, w: int = 6, per_frame: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (b, c, f, h, w) whose frames differ in brightness, timesteps (b), text (b, l, d) or (b, f, l, d)."""
    x = torch.randn(b, 4, f, h, w, dtype=torch.float64) + torch.linspace(-1, 1, f)[:, None, None]
    t = torch.tensor([999, 37])[:b]
    return x, t, torch.randn(*((b, f) if per_frame else (b,)), 5, 12, dtype=torch.float64)


def difference(y: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected value."""
    assert y.shape == expected.shape and y.dtype == torch.float64
    return float((y - expected).abs().max() / expected.abs().max())


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_network(version: str, layers: int) -> None:
    model, sizes = build(version, layers)
    x, t, text = inputs()
    state = Recorded(model.diffusers_state_dict())
    assert difference(model(x, t, text), oracle.unet(state, sizes, x, t, text)) < 1e-10
    assert state.read == set(state)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"h": 7, "w": 3}, id="both sizes odd"),
        pytest.param({"f": 1}, id="one frame"),
        pytest.param({"b": 2}, id="two videos at different timesteps"),
        pytest.param({"b": 2, "f": 2, "per_frame": True}, id="text per frame"),
    ],
)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_shapes(version: str, shape: dict[str, Any]) -> None:
    model, sizes = build(version)
    x, t, text = inputs(**shape)
    assert difference(model(x, t, text), oracle.unet(model.diffusers_state_dict(), sizes, x, t, text)) < 1e-10


def test_other_sizes() -> None:
    # Four levels, two neighbours of equal width, transformers where SD 1.5 has none, no two of G, H and H_m equal.
    model, sizes = build("v2", 1, (8, 16, 16, 24), (False, True, False, True), 8, 4, 1)
    x, t, text = inputs(f=2, h=9, w=10)
    assert difference(model(x, t, text), oracle.unet(model.diffusers_state_dict(), sizes, x, t, text)) < 1e-10


def test_table_of_positions() -> None:
    model, _ = build("v1")
    tables = [table for name, table in model.diffusers_state_dict().items() if name.endswith("pos_embed.pe")]
    assert len(tables) == 6
    for table in tables:
        assert difference(table, oracle.positions(24, table.shape[-1])[None]) < 1e-5


def test_more_frames_than_positions() -> None:
    model, sizes = build("v3", rows=2)
    x, t, text = inputs()
    with pytest.raises(ValueError):
        oracle.unet(model.diffusers_state_dict(), sizes, x, t, text)
    with pytest.raises(ValueError):
        model(x, t, text)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_diffusers(version: str) -> None:
    # That the check can fail: section 11's two points are seen. With them in the oracle too, it passes. The adapter
    # says nothing of the residual blocks' norms, as the published ones do.
    model, sizes = build(version, adapter_options={}, compat="diffusers")
    x, t, text = inputs()
    y, state = model(x, t, text), model.diffusers_state_dict()
    assert difference(y, oracle.unet(state, sizes, x, t, text)) > 1e-3
    sizes = sizes._replace(version="v3" if version == "v1" else version)  # point 2
    assert difference(y, oracle.unet(state, sizes, x, t, text)) > 1e-3
    assert difference(y, oracle.unet(state, sizes._replace(motion_per_clip=True), x, t, text)) < 1e-10


def test_versions() -> None:
    # That the check can fail: the same tensors run as v1 and as v3 differ (section 10).
    model, sizes = build("v1")
    x, t, text = inputs()
    expected = oracle.unet(model.diffusers_state_dict(), sizes._replace(version="v3"), x, t, text)
    assert difference(model(x, t, text), expected) > 1e-3
