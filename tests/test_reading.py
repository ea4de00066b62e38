"""How much code a reader of one denoising step has to follow: the figures of README.md and docs/architecture.md."""

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from minit2v import AnimateDiffPipeline, DDIMScheduler, DiffusionPipeline, MotionAdapter

ROOT = Path(__file__).parents[1]
MOST = {"ModelScope": (150, 9, 30, 9), "AnimateDiff": (180, 10, 36, 10)}  # statements, files, branches, calls


def measure(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, packages: str = "minit2v|minit2v_kernels|minit2v_convert"
) -> tuple[int, int, int, int]:
    """(statements, files, branches, calls) from the first callback to the second, on the plain path.

    calls: those from the pipeline's `__call__` down to the first attention, both counted.
    """
    lines: dict[str, set[int]] = {}
    depths: list[int] = []
    on = False
    attend = torch.nn.functional.scaled_dot_product_attention

    def is_ours(frame: FrameType) -> bool:
        return re.search(rf"/({packages})/", frame.f_code.co_filename) is not None

    def trace(frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        if on and is_ours(frame):
            lines.setdefault(frame.f_code.co_filename, set()).add(frame.f_lineno)
        return trace

    def count_calls(*args: Any, **kw: Any) -> torch.Tensor:
        frame: FrameType | None = sys._getframe(1)
        depth = 0
        while frame is not None:
            depth += is_ours(frame)
            frame = frame.f_back
        if on:
            depths.append(depth)
        return attend(*args, **kw)

    def callback(step: int, t: torch.Tensor, latents: torch.Tensor) -> None:
        nonlocal on
        on = step == 0

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count_calls)
    pipe.set_progress_bar_config(disable=True)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        pipe("a cat", num_inference_steps=3, num_frames=4, output_type="latent", callback=callback)
    finally:
        sys.settrace(before)
    statements = branches = 0
    for path, numbers in lines.items():
        for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))):
            if getattr(node, "lineno", None) in numbers:
                statements += isinstance(node, ast.stmt) and not isinstance(node, ast.FunctionDef)
                branches += isinstance(node, ast.If | ast.IfExp | ast.Match | ast.While)
    return statements, len(lines), branches, depths[0]


def test_one_step_is_short_and_the_pages_say_how_short(
    make_official_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIT2V_OPTIMIZE", "0")
    modelscope = DiffusionPipeline.from_pretrained(make_official_folder(tmp_path / "ms", small=True))
    adapter = MotionAdapter.from_pretrained("shapes-motion")
    animate = AnimateDiffPipeline.from_pretrained("shapes-image", motion_adapter=adapter)
    animate.scheduler = DDIMScheduler.from_config(animate.scheduler.config)
    found = {"ModelScope": measure(modelscope, monkeypatch), "AnimateDiff": measure(animate, monkeypatch)}
    for family, figures in found.items():
        assert all(n <= most for n, most in zip(figures, MOST[family], strict=True)), (family, figures)

    for page in ("README.md", "docs/architecture.md"):
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        for family, (a, b, c, d) in found.items():
            said = f"{family} executes {a} statements in {b} files with {c} branches, and attention lies {d} calls"
            assert said in text, page


def test_one_step_of_the_reference(
    make_official_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diffusers = pytest.importorskip("diffusers")
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    if f"diffusers {diffusers.__version__} one step" not in readme:
        pytest.skip(f"README.md counts another version of diffusers than {diffusers.__version__}")
    folder = make_official_folder(tmp_path / "ms", small=True)
    pipe = diffusers.TextToVideoSDPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    a, b, c, d = measure(pipe, monkeypatch, "site-packages/diffusers")
    assert f"executes {a} statements in {b} files with {c} branches, and attention lies {d} calls below ([" in readme
