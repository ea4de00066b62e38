"""The models of the package by their names, from Python."""

import logging
import re
import shutil
from pathlib import Path

import pytest
import torch

import minit2v
from minit2v import AnimateDiffPipeline, AutoencoderKL, DiffusionPipeline, MotionAdapter, UNet3DConditionModel
from minit2v.files import embedded
from minit2v.files.hub import find_folder
from minit2v.utils import load_video

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    embedded._tell.cache_clear()


def test_the_first_example_of_the_readme(tmp_path):
    code = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    assert "num_inference_steps=25" in code and 'from_pretrained("shapes")' in code
    exec(code.replace("num_inference_steps=25", "num_inference_steps=1"), {})
    assert len(load_video(str(tmp_path / "circle.mp4"))) == 16


def test_a_pipeline_by_name():
    pipe = DiffusionPipeline.from_pretrained("shapes")
    assert type(pipe).__name__ == "TextToVideoSDPipeline"
    frames = pipe("a red circle", num_inference_steps=1, num_frames=2, output_type="np",
                  generator=torch.Generator().manual_seed(0)).frames  # fmt: skip
    assert frames.shape[1] == 2
    assert minit2v.DDIMScheduler.from_pretrained("shapes", subfolder="scheduler")


def test_parts_by_name():
    vae = AutoencoderKL.from_pretrained("shapes", subfolder="vae")
    assert vae.config.latent_channels == DiffusionPipeline.from_pretrained("shapes", vae=vae).unet.config.in_channels
    adapter = MotionAdapter.from_pretrained("shapes-motion")
    pipe = AnimateDiffPipeline.from_pretrained("shapes-image", motion_adapter=adapter)
    assert pipe.unet.config.motion_max_seq_length == adapter.config.motion_max_seq_length


@pytest.mark.parametrize("name,near", [("shaps", "nearest: 'shapes'"), ("shapes-motoin", "nearest: 'shapes-motion'"),
                                       ("circus", "models of this package: shapes, shapes-image, shapes-motion")])
def test_a_misspelled_name(name, near):
    for cls in (DiffusionPipeline, MotionAdapter, minit2v.DDIMScheduler):
        with pytest.raises(FileNotFoundError) as e:
            cls.from_pretrained(name)
        assert name in str(e.value) and near in str(e.value) and "\n" not in str(e.value)


def test_a_folder_of_that_name_wins_and_the_log_says_so(tmp_path, caplog):
    (tmp_path / "shapes").mkdir()
    assert find_folder("shapes")[0] == embedded.ASSETS / "shapes"  # there are only videos in it, say
    shutil.copytree(embedded.ASSETS / "shapes" / "unet", tmp_path / "shapes" / "unet")
    shutil.copy(embedded.ASSETS / "shapes" / "model_index.json", tmp_path / "shapes")
    with caplog.at_level(logging.WARNING, "minit2v"):
        for _ in range(2):
            UNet3DConditionModel.from_pretrained("shapes", subfolder="unet")
    assert [r.getMessage() for r in caplog.records] == [
        f"The folder {tmp_path / 'shapes'} is used, not the embedded model 'shapes'."
    ]
    with pytest.raises(FileNotFoundError, match="shapes/vae does not exist"):
        AutoencoderKL.from_pretrained("shapes", subfolder="vae")


def test_an_installation_without_the_models(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "ASSETS", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="this installation lacks the embedded models"):
        DiffusionPipeline.from_pretrained("shapes")
