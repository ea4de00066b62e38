"""The notebooks of docs/lessons run, with fewer steps than a reader takes, and their saved outputs are small."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

from minit2v import AnimateDiffPipeline, UNet3DConditionModel  # noqa: F401 - once, and not in each lesson

LESSONS = sorted((Path(__file__).parents[1] / "docs" / "lessons").glob("*.ipynb"))
# What a lesson says -> what the test takes instead: each must be there.
QUICKER = {
    "1-noise": {"set_timesteps(25)": "set_timesteps(13)", "(0, 4, 24)": "(0, 4, 12)", ", 100)": ", 8)",
                "(3, 6, 12, 24)": "(3, 6)"},
    "2-space-and-time": {'steps": 25': 'steps": 4', "{0, 12, 24}": "{0, 2, 3}", "{20}": "{2}"},
    "3-text": {'steps": 25': 'steps": 2'},
    "4-training": {"MINUTES = 2.0": "MINUTES = 0.02", "range(256)": "range(64)", "steps=20": "steps=2"},
    "5-animatediff-and-lora": {'steps": 25': 'steps": 3'},
}  # fmt: skip


def test_there_are_five():
    assert [path.stem for path in LESSONS] == list(QUICKER)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_lessons_run(path, tmp_path, forked):
    """Each cell in turn, in a process of its own, as a reader would. It is forked, so that its imports are there."""
    import matplotlib.pyplot as plt

    cells = json.loads(path.read_text())["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for said, instead in QUICKER[path.stem].items():
        assert said in code
        code = code.replace(said, instead)

    def lesson():
        torch.set_num_threads(1)
        os.chdir(tmp_path)
        plt.switch_backend("Agg")
        torch.manual_seed(0)
        exec(compile(code, "lesson.py", "exec"), {"__name__": "__main__"})

    status, said = forked(lesson).wait()
    assert status == 0, said[-2000:]


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_saved_outputs(path):
    """Every cell was run in order, without an error; pictures are there, and the file is small."""
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [out for cell in code for out in cell["outputs"]]
    assert {out["output_type"] for out in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(out.get("name") != "stderr" for out in outputs), "warnings name folders of a machine"
    assert any("image/png" in out.get("data", {}) for out in outputs) and path.stat().st_size < 500_000
    text = path.read_text()
    anchor = re.search(r"answers\.md#(lesson-\d)", text)
    assert anchor and f"## {anchor[1].replace('-', ' ').capitalize()}" in (path.parent / "answers.md").read_text()
