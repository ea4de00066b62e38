"""Files that several tests of training data read. No test changes them."""

import pytest

from minit2v import DiffusionPipeline

from .counter import FILES, counter, write


@pytest.fixture(scope="session")
def counted(tmp_path_factory):
    """Videos of 200 counted frames."""
    folder = tmp_path_factory.mktemp("counted")
    return {name: write(folder / name, counter(200), *options, rate=rate) for name, (rate, options) in FILES.items()}


@pytest.fixture(scope="session")
def shapes():
    return DiffusionPipeline.from_pretrained("shapes")


@pytest.fixture(scope="session")
def three(tmp_path_factory):
    """Three different videos, and no captions."""
    folder = tmp_path_factory.mktemp("three")
    return [write(folder / f"clip {n}.mp4", counter(20 + n)) for n in range(3)]
