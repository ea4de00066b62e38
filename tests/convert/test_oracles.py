"""What the converter writes, run by networks that know the authors' names only: tests/oracles, in float64.

A table of names can be wrong twice in the same way, there and back, and two tensors of one shape change places without
a word. A network that was written for the other layout notices. Its author has seen no implementation of it.
"""

import gzip
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minit2v import MotionAdapter, UNet2DConditionModel, UNet3DConditionModel, UNetMotionModel
from minit2v_convert.convert import convert
from minit2v_convert.detect import detect
from minit2v_convert.formats import Plan, from_diffusers, make, to_diffusers


def load_oracle(name: str) -> ModuleType:
    """The oracle as a module: tests/ is not a package, so by its path."""
    path = Path(__file__).parents[1] / "oracles" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_oracle", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


unetsd, animatediff = load_oracle("unetsd"), load_oracle("animatediff")


class Recorded(dict[str, Tensor]):
    """A state dict that remembers which of its tensors were read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def header(state: Mapping[str, Tensor]) -> dict[str, Any]:
    assert all(x.dtype == torch.float32 for x in state.values())
    return {name: (tuple(x.shape), "F32") for name, x in state.items()}


def run(plan: Plan, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {step.name: make(step, [state[name] for name in step.sources]) for step in plan.steps}


def with_authors_names(component: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a folder's component under the authors' names."""
    files, omitted = from_diffusers({component: header(state)}, "authors")
    assert len(files) == 1 and not omitted
    return run(next(iter(files.values())), state)


def with_diffusers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an authors' file under diffusers' names."""
    (plan,) = to_diffusers(detect(header(state)), header(state)).values()
    return run(plan, state)


def randomise(model: torch.nn.Module) -> None:
    """Every parameter, norm weights around 1; float32 numbers, so that a file holds them exactly."""
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))


def single(model: Any) -> dict[str, Tensor]:
    """What would stand in the model's file, in float32."""
    return {name: x.float() for name, x in model.diffusers_state_dict().items()}


def difference(y: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected value."""
    assert y.shape == expected.shape and y.dtype == expected.dtype == torch.float64
    return float((y - expected).abs().max() / expected.abs().max())


def authors_name(name: str) -> str:
    """What the authors of AnimateDiff call a parameter of a motion module: docs/animatediff.md, end of section 13."""
    for ours, theirs in (
        ("pos_embed.", "attention_blocks.0.pos_encoder."),
        ("attn1.", "attention_blocks.0."),
        ("attn2.", "attention_blocks.1."),
        ("norm1.", "norms.0."),
        ("norm2.", "norms.1."),
        ("norm3.", "ff_norm."),
    ):
        name = name.replace(f"transformer_blocks.0.{ours}", f"transformer_blocks.0.{theirs}")
    parts = name.split(".")  # down_blocks i motion_modules j, but mid_block motion_modules 0
    j = parts.index("motion_modules") + 2
    return ".".join([*parts[:j], "temporal_transformer", *parts[j:]])


def build_unet(channels: tuple[int, ...] = (16, 32), spatial: tuple[bool, ...] = (True, False)) -> UNet3DConditionModel:
    torch.manual_seed(0)
    model = UNet3DConditionModel(
        block_out_channels=channels,
        down_block_types=tuple("CrossAttnDownBlock3D" if yes else "DownBlock3D" for yes in spatial),
        up_block_types=tuple("CrossAttnUpBlock3D" if yes else "UpBlock3D" for yes in reversed(spatial)),
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=8,
    )
    randomise(model)
    return model


def inputs(b: int = 1, f: int = 3, h: int = 5, w: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (b, c, f, h, w) whose frames differ in brightness, timesteps (b), text (b, l, d)."""
    x = torch.randn(b, 4, f, h, w, dtype=torch.float64) + torch.linspace(-1, 1, f)[:, None, None]
    return x, torch.tensor([999, 37])[:b], torch.randn(b, 5, 12, dtype=torch.float64)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"b": 2, "h": 4}, id="two videos at different timesteps"),
        pytest.param({"h": 7, "w": 3}, id="both sizes odd"),
        pytest.param({"f": 1, "h": 4}, id="one frame"),
    ],
)
def test_modelscope(shape: dict[str, int]) -> None:
    model = build_unet()
    state = Recorded(with_authors_names("unet", single(model)))
    x, t, text = inputs(**shape)
    y = unetsd.unet(state, unetsd.Sizes(groups=4, head_dim=8), x, t, text)
    assert difference(model.double()(x, t, text), y) < 1e-10
    assert state.read == set(state)


def test_modelscope_four_levels() -> None:
    # As many blocks as ModelScope's, by the names of its file: transformers on three levels, none on the last.
    model = build_unet((8, 16, 24, 24), (True, True, True, False))
    state = Recorded(with_authors_names("unet", single(model)))
    assert unetsd.count(state, "input_blocks") == unetsd.count(state, "output_blocks") == 12
    x, t, text = inputs(f=2, h=9, w=10)
    y = unetsd.unet(state, unetsd.Sizes(groups=4, head_dim=8), x, t, text)
    assert difference(model.double()(x, t, text), y) < 1e-10
    assert state.read == set(state)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param("temopral_conv.conv2.3.weight", "temopral_conv.conv3.3.weight", id="convolutions in time"),
        pytest.param("0.attn1.to_q.weight", "0.attn1.to_k.weight", id="queries and keys"),
        pytest.param("input_blocks.1.0.out_layers.0.bias", "input_blocks.1.1.norm.bias", id="norms"),
    ],
)
def test_exchanged(first: str, second: str) -> None:
    # That the check can fail: two tensors of one shape in each other's place.
    model = build_unet()
    state = with_authors_names("unet", single(model))
    one, two = (next(name for name in state if name.endswith(end)) for end in (first, second))
    assert state[one].shape == state[two].shape
    state[one], state[two] = state[two], state[one]
    x, t, text = inputs()
    y = unetsd.unet(state, unetsd.Sizes(groups=4, head_dim=8), x, t, text)
    assert difference(model.double()(x, t, text), y) > 1e-3


def small_authors_file(dtype: torch.dtype, ones: str) -> dict[str, Tensor]:
    """Random numbers under the names of the published text2video_pytorch_model.pth, its widths divided by 40.

    ones: of which 1x1 convolutions over time the trailing axis is there: "all", "none" (Zeroscope's, made by a script
    from diffusers' folder, may lack it) or "some".
    """
    data = Path(__file__).parents[1] / "data" / "authors_files.json.gz"
    names = json.loads(gzip.decompress(data.read_bytes()))["text2video_pytorch_model"]
    generator = torch.Generator().manual_seed(0)
    state = {}
    for n, (name, (shape, _)) in enumerate(names.items()):
        # 320, 640, ... are widths; 512 is 8 heads of 64, here of 8, 2048 and 4096 its feed-forward's; 1024 the text's.
        small = [{512: 64, 2048: 256, 4096: 512, 1024: 12}.get(size, size // 40 or size) for size in shape]
        if len(shape) == 3 and (ones == "none" or ones == "some" and n % 2):
            small = small[:2]
        x = torch.randn(small, generator=generator)
        x = x / x[0].numel() ** 0.5 if x.ndim > 1 else 0.2 * x
        is_norm = name.endswith("weight") and x.ndim == 1
        state[name] = (x + is_norm).to(dtype)
    return state


@pytest.mark.parametrize(
    ("dtype", "ones", "container"),
    [
        pytest.param(torch.float32, "all", "pth", id="ModelScope's"),
        pytest.param(torch.float16, "none", "pth", id="Zeroscope's, as linear layers in half precision"),
        pytest.param(torch.bfloat16, "some", "safetensors", id="mixed"),
    ],
)
def test_modelscope_s_file_into_our_network(tmp_path: Path, dtype: torch.dtype, ones: str, container: str) -> None:
    """The other way round: a file that no code here has written, loaded, and converted to a folder and loaded."""
    state = small_authors_file(dtype, ones)
    path = tmp_path / f"text2video_pytorch_model.{container}"
    save_file(state, path) if container == "safetensors" else torch.save(state, path)
    x, t, text = inputs(f=2, h=8, w=9)
    authors = {name: x.shape for name, x in small_authors_file(dtype, "all").items()}  # the axes that the authors' has
    recorded = Recorded({name: x.double().reshape(authors[name]) for name, x in state.items()})
    y = unetsd.unet(recorded, unetsd.Sizes(groups=4, head_dim=8), x, t, text)
    assert recorded.read == set(state)

    model = UNet3DConditionModel.from_single_file(path, dtype="float64", norm_num_groups=4)
    assert difference(model(x, t, text), y) < 1e-10
    config = {**model.config.__dict__, "_class_name": "UNet3DConditionModel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    convert(path, tmp_path / "folder", config=tmp_path / "config.json")
    (file,) = (tmp_path / "folder").glob("*.safetensors")
    assert {v.dtype for v in load_file(file).values()} == {dtype}
    again = UNet3DConditionModel.from_pretrained(tmp_path / "folder", dtype="float64")
    assert again.config == model.config
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_motion_module(version: str) -> None:
    torch.manual_seed(0)
    channels = (8, 16)
    image = UNet2DConditionModel(
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=2,
    )
    adapter = MotionAdapter(
        block_out_channels=channels,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
        motion_max_seq_length=24 if version == "v1" else 32,
        use_motion_mid_block=version == "v2",
        motion_layers_per_block=2,
        resnet_norms="video" if version == "v1" else "frame",
    )
    model = UNetMotionModel.from_unet2d(image, adapter)
    randomise(model)

    motion = single(model.motion_adapter())
    authors = with_authors_names("motion_adapter", motion)
    assert len(authors) == 28 * (11 if version == "v2" else 10)  # docs/animatediff.md, section 13
    assert all(".temporal_transformer." in name for name in authors)
    back = with_diffusers_names(authors)
    assert set(back) == set(motion)
    renamed = {authors_name(name): x for name, x in back.items()}  # by hand: both ways could be wrong
    assert all(torch.equal(x, authors[name]) for name, x in renamed.items())
    assert set(authors) - set(renamed) == {
        name.replace("blocks.0.pos_encoder", "blocks.1.pos_encoder") for name in renamed if name.endswith(".pe")
    }
    state = single(model)
    assert set(back) <= set(state)
    state.update(back)

    x, t, text = inputs(b=2)
    sizes = animatediff.Sizes(version, (True, False), 2, 4, 2, 4, 2)
    assert difference(model.double()(x, t, text), animatediff.unet(state, sizes, x, t, text)) < 1e-10
