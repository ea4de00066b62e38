"""ContextWindows and Windowed against tests/oracles/context_windows.py, written from docs/long-videos.md alone.

The oracle's author had seen no implementation, so that what both say, the document says. All in float64.
"""

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from minit2v.techniques.context_windows import ContextWindows, Windowed


def load_oracle() -> ModuleType:
    """The oracle as a module: tests/ is not a package, so by its path."""
    path = Path(__file__).parent / "oracles" / "context_windows.py"
    spec = importlib.util.spec_from_file_location("context_windows_oracle", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


oracle = load_oracle()

FUSES = ("flat", "pyramid", "overlap_linear", "delayed_reverse_sawtooth")
SCHEDULES = (("uniform", False), ("uniform", True), ("static", False), ("static", True), ("batched", False))


def test_the_oracle_gives_the_example_of_the_page() -> None:
    settings: dict[str, Any] = {"length": 4, "overlap": 2, "stride": 1, "loop": False, "schedule": "uniform"}
    text = (Path(__file__).parents[1] / "docs" / "long-videos.md").read_text(encoding="utf-8")
    for call in (0, 1):
        windows = oracle.windows(10, call, **settings)
        assert f"n = {call}   " + "   ".join(" ".join(map(str, window)) for window in windows) in text


@pytest.mark.parametrize(("schedule", "loop"), SCHEDULES)
def test_windows(schedule: str, loop: bool) -> None:
    """Lengths and strides in full; the overlap runs through its values as the frames grow."""
    for length, stride, number in itertools.product(range(1, 17), (1, 2, 3), range(1, 61, 3)):
        frames = min(60, number + (length + stride) % 3)
        overlap = (7 * frames + stride) % length
        ours = ContextWindows(length, stride, overlap, loop, schedule=schedule)
        for call in range(8) if schedule == "uniform" else (0, 3):
            expected = oracle.windows(
                frames, call, length=length, overlap=overlap, stride=stride, loop=loop, schedule=schedule
            )
            assert ours.windows(frames, call) == expected, (ours, frames, call)


@pytest.mark.parametrize("loop", [False, True])
def test_windows_of_late_predictions(loop: bool) -> None:
    """In prediction 15, 31, 63 h is so near 1 that the offset rounds to all frames of a short video."""
    for call, frames, length in itertools.product((14, 15, 31, 49, 63), range(1, 40), (1, 4, 7)):
        ours = ContextWindows(length, 2, length // 2, loop)
        expected = oracle.windows(
            frames, call, length=length, overlap=length // 2, stride=2, loop=loop, schedule="uniform"
        )
        assert ours.windows(frames, call) == expected, (ours, frames, call)


@pytest.mark.parametrize("fuse", FUSES)
@pytest.mark.parametrize("loop", [False, True])
def test_weights(fuse: str, loop: bool) -> None:
    for length in range(1, 17):
        highest = length // 2 if fuse == "overlap_linear" else length - 1
        for overlap in sorted({0, min(1, highest), highest // 2, highest}):
            ours = ContextWindows(length, 2, overlap, loop, fuse)
            for frames in (length - length // 2, length, 3 * length + 2):
                for window in oracle.windows(
                    frames, 1, length=length, overlap=overlap, stride=2, loop=loop, schedule="uniform"
                ):
                    expected = oracle.weights(window, frames, overlap=overlap, loop=loop, fuse=fuse)
                    assert ours.weights(window, frames) == pytest.approx(expected, rel=1e-12), (ours, frames, window)


@pytest.mark.parametrize(("length", "overlap", "frames"), [(16, 8, 5), (10, 3, 2), (4, 2, 1)])
def test_a_loop_shorter_than_the_overlap(length: int, overlap: int, frames: int) -> None:
    """Rule 4: the one window of F frames has F weights. Of a single prediction the mean is that prediction."""
    ours = ContextWindows(length, 1, overlap, True, "overlap_linear")
    x = torch.arange(1.0, frames + 1, dtype=torch.float64).reshape(1, 1, frames, 1, 1)
    windowed = Windowed(ours, lambda x, t, context: 2 * x)
    for call in range(4):
        window = oracle.windows(frames, call, length=length, overlap=overlap, stride=1, loop=True, schedule="uniform")[
            0
        ]
        expected = oracle.weights(window, frames, overlap=overlap, loop=True, fuse="overlap_linear")
        assert ours.weights(window, frames) == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(windowed(x, 1, torch.zeros(1, 1, 1)), 2 * x)


def network(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """A prediction that depends on the order of a window's frames, on t (b,) and on the texts (b, f, l, d)."""
    place = torch.arange(1, x.shape[2] + 1, dtype=torch.float64)[:, None, None]
    text = context.square().mean(dim=(2, 3))[:, None, :, None, None]
    return torch.sin(3 * x + x.cumsum(dim=2) / place) + 0.1 * place * text + t[:, None, None, None, None] * x


@pytest.mark.parametrize("fuse", FUSES)
@pytest.mark.parametrize(("schedule", "loop"), SCHEDULES)
def test_predictions(schedule: str, loop: bool, fuse: str) -> None:
    """The first predictions of a run: two videos with their own t, a text for each frame, 1 or 3 windows at once."""
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor([0.3, 0.7], dtype=torch.float64)
    sizes = ((16, 8, 45), (16, 4, 33), (7, 3, 20), (6, 1, 12), (5, 2, 23), (4, 2, 10), (3, 0, 8), (1, 0, 6), (8, 4, 5))
    for number, (length, overlap, frames) in enumerate(sizes):
        stride, per_call = number % 3 + 1, (None, 1, 3)[number % 2 + number // 3 % 2]
        windowed = Windowed(ContextWindows(length, stride, overlap, loop, fuse, schedule, per_call), network)
        context = torch.randn(2, frames, 3, 2, dtype=torch.float64, generator=generator)
        for call in range(8 if schedule == "uniform" else 2):
            x = torch.randn(2, 1, frames, 1, 2, dtype=torch.float64, generator=generator)
            expected = oracle.fuse(
                lambda seen, window: network(seen, t, context[:, window]),  # noqa: B023
                x,
                call,
                length=length,
                overlap=overlap,
                stride=stride,
                loop=loop,
                fuse=fuse,
                schedule=schedule,
            )
            torch.testing.assert_close(windowed(x, t, context), expected, rtol=1e-11, atol=1e-11)


def test_one_text_for_all_frames() -> None:
    """A context (b, l, d) goes to every window as it is."""

    def predict(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return network(x, t, context[:, None].expand(-1, x.shape[2], -1, -1))

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 20, 2, 2, dtype=torch.float64, generator=generator)
    context = torch.randn(2, 3, 2, dtype=torch.float64, generator=generator)
    t = torch.tensor([0.3, 0.7], dtype=torch.float64)
    windowed = Windowed(ContextWindows(6, 2, 2, per_call=4), predict)
    for call in range(3):
        expected = oracle.fuse(
            lambda seen, window: predict(seen, t, context),
            x,
            call,
            length=6,
            overlap=2,
            stride=2,
            loop=False,
            fuse="pyramid",
            schedule="uniform",
        )
        torch.testing.assert_close(windowed(x, t, context), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "settings",
    [
        {"length": 4, "overlap": 4},
        {"length": 8, "overlap": 5, "fuse": "overlap_linear"},
        {"schedule": "batched", "loop": True},
    ],
)
def test_what_the_page_rules_out_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="overlap|loop"):
        ContextWindows(**settings)
