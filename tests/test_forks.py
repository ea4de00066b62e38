"""Classes of a user's own, made from ours: they load official files, keep what is theirs, and come back."""

import json
import logging
import re
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minit2v import (
    AnimateDiffPipeline,
    AutoencoderKL,
    CLIPTextModel,
    CLIPTokenizer,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    MotionAdapter,
    TextToVideoSDPipeline,
    UNet3DConditionModel,
    UNetMotionModel,
)
from minit2v.models.unet3d import UNet3DConfig
from minit2v.models.vae import AutoencoderKLConfig


@dataclass(frozen=True)
class MyConfig(UNet3DConfig):
    window: int = 8


class MyUNet(UNet3DConditionModel):
    Config = MyConfig

    def __init__(self, config=None, **fields):
        super().__init__(config, **fields)
        self.extra = nn.Linear(3, self.config.window)
        self.gate = nn.Parameter(torch.full((2,), 0.5))
        self.register_buffer("count", torch.tensor([3]))
        for block in self.blocks():
            block.res.scale = nn.Parameter(torch.ones(1))
            if block.attention:
                block.spatial.block.sink = nn.Parameter(torch.zeros(4))


@dataclass(frozen=True)
class MyVAEConfig(AutoencoderKLConfig):
    depth: int = 2


class MyVAE(AutoencoderKL):
    Config = MyVAEConfig

    def __init__(self, config=None, **fields):
        super().__init__(config, **fields)
        self.extra = nn.Linear(2, self.config.depth)


class MyText(CLIPTextModel):
    def __init__(self, config=None, **fields):
        super().__init__(config, **fields)
        self.extra = nn.Embedding(2, 3)


class MyAdapter(MotionAdapter):
    def __init__(self, config=None, **fields):
        super().__init__(config, **fields)
        self.extra = nn.Linear(2, 2)


class MyMotion(UNetMotionModel):
    def __init__(self, config=None, **fields):
        super().__init__(config, **fields)
        self.extra = nn.Linear(2, 2)


class MyScheduler(DDIMScheduler):
    @dataclass(frozen=True)
    class Fields(DDIMScheduler.Fields):
        strength: float = 1.0
        mode: str = "plain"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_official_folder):
    return make_official_folder(tmp_path_factory.mktemp("official"), small=True)


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory, make_adapter_folder):
    return make_adapter_folder(tmp_path_factory.mktemp("adapter"), "v1-5-3")


@pytest.fixture(scope="module")
def motion_folder(tmp_path_factory, make_official_folder, adapter_folder):
    images = make_official_folder(tmp_path_factory.mktemp("images"), "sd15", small=True)
    pipe = AnimateDiffPipeline.from_pretrained(images, motion_adapter=MotionAdapter.from_pretrained(adapter_folder))
    pipe.unet.save_pretrained(images / "whole")
    return images / "whole"


def one_line(error, *said) -> str:
    text = str(error.value)
    assert "\n" not in text
    for word in said:
        assert re.search(word, text), (word, text)
    return text


def state(network: nn.Module) -> dict:
    return {name: x.clone() for name, x in network.state_dict().items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ------------------------------------------------------------------------------------------------------------ networks


def test_own_parameters_are_an_error_that_says_how_to_keep_them(folder):
    with pytest.raises(ValueError) as error:
        MyUNet.from_pretrained(folder, subfolder="unet")
    one_line(error, "does not fit MyUNet: 16 missing ", "with strict=False they keep their init")


def test_own_parameters_are_named_in_the_order_of_the_network(folder):
    mine = MyUNet(UNet3DConditionModel.from_pretrained(folder, subfolder="unet").config)
    own = [name for name in mine.state_dict() if name.endswith((".scale", "gate", "count"))]
    assert len(own) > 5 and [name for name in mine.diffusers_state_dict() if name in own] == own


def test_not_strict_keeps_their_initialisation_and_says_so(folder, caplog):
    official = UNet3DConditionModel.from_pretrained(folder, subfolder="unet")
    torch.manual_seed(0)
    fresh = MyUNet(official.config)
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, "minit2v"):
        mine = MyUNet.from_pretrained(folder, subfolder="unet", strict=False)
    assert mine.config.window == 8 and type(mine.config) is MyConfig and not mine.training
    ours, theirs, initial = mine.state_dict(), official.state_dict(), fresh.state_dict()
    own = ours.keys() - theirs.keys()
    assert {"extra.weight", "extra.bias", "gate", "count"} < own and len(own) > 10
    assert all(torch.equal(ours[n], initial[n]) for n in own) and all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert ours["extra.weight"].abs().sum() > 0 and ours["gate"].tolist() == [0.5, 0.5] and ours["count"].item() == 3
    (record,) = caplog.records
    said = record.getMessage()
    assert f"lacks {len(own)} tensors of MyUNet" in said and "extra.weight" in said and "gate" in said
    assert "\n" not in said and ("more" in said) == (len(own) > 20)


def test_own_things_come_back_strictly(folder, tmp_path):
    mine = MyUNet.from_pretrained(folder, subfolder="unet", strict=False, window=5)
    with torch.no_grad():
        for name, p in mine.named_parameters():
            if name.startswith(("extra", "gate")) or "sink" in name or "scale" in name:
                p.copy_(torch.randn(p.shape))
    mine.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["_class_name"] == "MyUNet" and saved["window"] == 5
    names = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert {"extra.weight", "gate", "count", "conv_in.weight"} <= names.keys()
    again = MyUNet.from_pretrained(tmp_path)
    assert equal(state(again), state(mine)) and again.config == mine.config
    half = MyUNet.from_pretrained(tmp_path, dtype="fp16")
    assert half.gate.dtype == torch.float16 and half.count.dtype == torch.int64


def test_a_parent_does_not_read_a_fork_s_files(folder, tmp_path):
    MyUNet.from_pretrained(folder, subfolder="unet", strict=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        UNet3DConditionModel.from_pretrained(tmp_path)
    one_line(error, "belongs to a MyUNet, not to a UNet3DConditionModel", "load it with the class MyUNet")
    with pytest.raises(ValueError) as error:
        AutoencoderKL.from_pretrained(folder, subfolder="unet")
    one_line(error, "UNet3DConditionModel")


@pytest.mark.parametrize("strict", [True, False])
def test_what_no_network_knows_is_an_error_in_both_modes(folder, tmp_path, strict):
    MyUNet.from_pretrained(folder, subfolder="unet", strict=False).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["extra.wieght"] = tensors.pop("extra.weight")
    save_file(tensors, path)
    with pytest.raises(ValueError) as error:
        MyUNet.from_pretrained(tmp_path, strict=strict)
    one_line(error, "unknown .'extra.wieght' .nearest: 'extra.weight'")


def test_our_own_names_are_no_spelling_of_the_files_names(folder, tmp_path):
    """A name that a rule knows is read under diffusers' name alone."""
    mine = MyUNet.from_pretrained(folder, subfolder="unet", strict=False)
    mine.save_pretrained(tmp_path)
    save_file(mine.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError) as error:
        MyUNet.from_pretrained(tmp_path, strict=False)
    one_line(error, "unknown")


def test_a_name_that_means_something_else_in_the_files_is_refused_when_saved(folder, tmp_path):
    class Clash(UNet3DConditionModel):
        def __init__(self, config=None, **fields):
            super().__init__(config, **fields)
            self.conv_norm_out = nn.Linear(2, 2)  # diffusers' name of our norm_out

    mine = Clash(UNet3DConditionModel.from_pretrained(folder, subfolder="unet").config)
    with pytest.raises((ValueError, OSError), match="conv_norm_out.* rename your layer"):
        mine.save_pretrained(tmp_path / "x")
    assert not list((tmp_path / "x").glob("*.safetensors"))


@pytest.mark.parametrize("cls,part", [(MyVAE, "vae"), (MyText, "text_encoder"), (MyAdapter, None), (MyMotion, None)])
def test_every_network_can_be_extended(folder, adapter_folder, motion_folder, tmp_path, cls, part, caplog):
    source = {MyAdapter: adapter_folder, MyMotion: motion_folder}.get(cls, folder)
    with pytest.raises(ValueError) as error:
        cls.from_pretrained(source, subfolder=part)
    one_line(error, f"does not fit {cls.__name__}", "extra", "strict=False")
    mine = cls.from_pretrained(source, subfolder=part, strict=False)
    assert "extra.weight" in caplog.text
    mine.save_pretrained(tmp_path / "mine-v1-5-3")
    again = cls.from_pretrained(tmp_path / "mine-v1-5-3")
    assert equal(state(again), state(mine)) and again.config == mine.config
    with pytest.raises(ValueError) as error:
        cls.__bases__[0].from_pretrained(tmp_path / "mine-v1-5-3")
    one_line(error, f"load it with the class {cls.__name__}")


def test_an_image_model_becomes_a_fork(motion_folder):
    from minit2v import UNet2DConditionModel

    @dataclass(frozen=True)
    class ImageConfig(UNet2DConditionModel.Config):
        tint: int = 1

    class Image(UNet2DConditionModel):
        Config = ImageConfig

    image = Image.from_pretrained(motion_folder.parent, subfolder="unet", dtype="bf16")
    mine = MyMotion.from_unet2d(image)
    assert mine.extra.weight.abs().sum() > 0 and {p.dtype for p in mine.parameters()} == {torch.bfloat16}
    assert torch.equal(mine.conv_in.weight, image.conv_in.weight)
    image.extra = nn.Linear(3, 3)
    with pytest.raises(ValueError) as error:
        UNetMotionModel.from_unet2d(image)
    one_line(error, "Image has tensors that UNetMotionModel does not have: extra.weight, extra.bias")


def test_a_single_file(folder, caplog):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError) as error:
        MyVAE.from_single_file(file, config=folder)
    one_line(error, "missing .*extra.*strict=False")
    mine = MyVAE.from_single_file(file, config=folder, strict=False)
    theirs = AutoencoderKL.from_pretrained(folder, subfolder="vae").state_dict()
    assert all(torch.equal(mine.state_dict()[n], x) for n, x in theirs.items()) and "extra.weight" in caplog.text


def test_fields_need_the_decorator():
    class Bare(UNet3DConfig):
        window: int = 8

    class Net(UNet3DConditionModel):
        Config = Bare

    with pytest.raises(ValueError) as error:
        Net(window=4)
    one_line(error, "Bare", "@dataclass.frozen=True.")


def test_a_fork_deviates_as_its_parent_does():
    config = MyAdapter(compat="diffusers", block_out_channels=(32, 64), motion_norm_num_groups=8).config
    assert config == MotionAdapter(compat="diffusers", block_out_channels=(32, 64), motion_norm_num_groups=8).config
    assert MyScheduler(compat="diffusers").config.previous_timestep == "ratio"


# ----------------------------------------------------------------------------------------------------------- pipelines


def test_a_class_given_loads_the_component(folder, tmp_path):
    mine = MyUNet.from_pretrained(folder, subfolder="unet", strict=False)
    pipe = DiffusionPipeline.from_pretrained(folder, unet=mine, scheduler=MyScheduler)
    assert type(pipe.scheduler) is MyScheduler and pipe.scheduler.config.skip_prk_steps is True
    pipe.scheduler = MyScheduler.from_config(pipe.scheduler.config, strength=0.25)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == [__name__, "MyUNet"] and index["scheduler"][1] == "MyScheduler"
    assert index["vae"] == ["diffusers", "AutoencoderKL"]

    for given, said in (({}, "unet=MyUNet"), ({"unet": MyUNet}, "scheduler=MyScheduler"),
                        ({"scheduler": MyScheduler}, "unet=MyUNet")):  # fmt: skip
        with pytest.raises(ValueError) as error:
            DiffusionPipeline.from_pretrained(tmp_path, **given)
        one_line(error, said, "your own")
    again = DiffusionPipeline.from_pretrained(tmp_path, unet=MyUNet, scheduler=MyScheduler, dtype={"unet": "bf16"})
    assert type(again) is TextToVideoSDPipeline and type(again.unet) is MyUNet and again.unet.dtype == torch.bfloat16
    assert again.vae.dtype == torch.float32 and again.scheduler.config.strength == 0.25
    assert again.unet.compat is None
    with pytest.raises(ValueError) as error:  # its weights are not in the official folder
        DiffusionPipeline.from_pretrained(folder, unet=MyUNet)
    one_line(error, "does not fit MyUNet")
    fresh = DiffusionPipeline.from_pretrained(folder, unet=MyUNet, strict=False).unet
    official = UNet3DConditionModel.from_pretrained(folder, subfolder="unet").state_dict()
    assert all(torch.equal(fresh.state_dict()[n], x) for n, x in official.items())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"unet": AutoencoderKL}, "unet=AutoencoderKL: TextToVideoSDPipeline needs UNet3DConditionModel"),
        ({"unet": UNetMotionModel}, "unet=UNetMotionModel: .* needs UNet3DConditionModel"),
        ({"scheduler": CLIPTokenizer}, "scheduler=CLIPTokenizer: .* needs a scheduler"),
        ({"vae": int}, "vae=int: .*no from_pretrained"),
        ({"vea": MyVAE}, "TextToVideoSDPipeline.from_pretrained.. has no argument 'vea' .nearest: 'vae'."),
    ],
)
def test_wrong_classes(folder, given, said):
    with pytest.raises(TypeError) as error:
        DiffusionPipeline.from_pretrained(folder, **given)
    one_line(error, said)


def test_a_class_where_an_object_belongs(folder):
    pipe = DiffusionPipeline.from_pretrained(folder)
    with pytest.raises(TypeError) as error:
        TextToVideoSDPipeline.from_pipe(pipe, unet=MyUNet)
    one_line(error, "unet must be an object, not the class MyUNet")


def test_nothing_is_imported_because_a_file_names_it(folder, tmp_path, monkeypatch):
    import shutil
    import sys

    copy = shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "unet": ["trap", "Trap"]}))
    with pytest.raises(ValueError, match="pass unet=Trap"):
        DiffusionPipeline.from_pretrained(copy)
    assert "trap" not in sys.modules


class Foreign(nn.Module):
    """A text encoder that is none of minit2v's."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(600, 24)
        self.dtype = torch.float32

    def forward(self, ids, clip_skip=None):
        return self.table(ids)

    def save_pretrained(self, folder):
        folder.mkdir(parents=True)
        torch.save(self.state_dict(), folder / "mine.pt")

    @classmethod
    def from_pretrained(cls, folder):
        new = cls()
        new.load_state_dict(torch.load(folder / "mine.pt"))
        return new


def test_a_part_that_is_no_class_of_ours(folder, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(folder, text_encoder=Foreign())
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path, text_encoder=Foreign)
    assert equal(state(again.text_encoder), state(pipe.text_encoder))
    pipe.text_encoder = nn.Linear(2, 2)
    with pytest.raises(TypeError) as error:
        pipe.save_pretrained(tmp_path / "new")
    one_line(error, "text_encoder: a Linear has no save_pretrained")
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------------- schedulers


def test_fields_of_own_schedulers_survive_the_shipped_ones(tmp_path):
    mine = MyScheduler(strength=0.5, beta_schedule="scaled_linear")
    for shipped in (DDIMScheduler, EulerDiscreteScheduler):
        there = shipped.from_config(mine.config)
        back = MyScheduler.from_config(there.config)
        assert back.config.strength == 0.5 and back.config.mode == "plain"
        there.save_pretrained(tmp_path / shipped.__name__)
        again = shipped.from_pretrained(tmp_path / shipped.__name__)
        assert MyScheduler.from_config(again.config).config.strength == 0.5
    mine.save_pretrained(tmp_path / "mine")
    assert MyScheduler.from_pretrained(tmp_path / "mine").config.strength == 0.5
    with pytest.raises(ValueError, match="unknown field 'strenght'"):
        DDIMScheduler.from_config({"strenght": 0.5})
    with pytest.raises(TypeError, match="'strenght' .*'strength'"):
        MyScheduler(strenght=0.5)


def test_fields_of_two_own_schedulers():
    class Other(DDIMScheduler):
        @dataclass(frozen=True)
        class Fields(DDIMScheduler.Fields):
            tilt: float = 0.0

    other = Other.from_config(MyScheduler(strength=0.5).config, tilt=2.0)
    back = MyScheduler.from_config(DDIMScheduler.from_config(other.config).config)
    assert back.config.strength == 0.5 and Other.from_config(back.config).config.tilt == 2.0
