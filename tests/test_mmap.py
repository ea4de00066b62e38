"""mmap=False: weights are copies, and a file that is written to, or cut off, later changes nothing."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from minit2v import AutoencoderKL, TextToVideoSDPipeline


@pytest.fixture
def model(tmp_path, make_official_folder):
    return make_official_folder(tmp_path / "model", small=True)


def spoil(folder):
    for path in Path(folder).rglob("*.safetensors"):
        with path.open("r+b") as file:
            file.seek(-64, 2)
            file.write(b"\xff" * 64)
        os.truncate(path, path.stat().st_size // 2)


def state(network):
    return {name: x.clone() for name, x in network.state_dict().items()}


def test_a_network_does_not_change_with_its_file(model):
    vae = AutoencoderKL.from_pretrained(model / "vae", mmap=False)
    before = state(vae)
    spoil(model / "vae")
    assert all(torch.equal(x, before[name]) for name, x in vae.state_dict().items())


def test_mapped_weights_are_the_files_own(model):
    """What the docs warn of; without it `mmap` would be tested for nothing."""
    vae = AutoencoderKL.from_pretrained(model / "vae")
    before = state(vae)
    (path,) = (model / "vae").glob("*.safetensors")
    with path.open("r+b") as file:
        file.seek(-64, 2)
        file.write(b"\xff" * 64)
    assert not all(torch.equal(x, before[name]) for name, x in vae.state_dict().items())


def test_a_pipeline_and_one_of_a_single_file(model, tmp_path):
    pipe = TextToVideoSDPipeline.from_pretrained(model, mmap=False)
    before = state(pipe.unet)
    shutil.copytree(model / "unet", tmp_path / "alone")
    spoil(model)
    assert all(torch.equal(x, before[name]) for name, x in pipe.unet.state_dict().items())
    file = next((tmp_path / "alone").glob("*.safetensors"))
    unet = type(pipe.unet).from_single_file(file, config=tmp_path / "alone", mmap=False)
    spoil(tmp_path / "alone")
    assert all(torch.equal(x, before[name]) for name, x in unet.state_dict().items())
