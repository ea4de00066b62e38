"""What type checkers see: every Python snippet of the pages passes the strict ones, and misspellings do not.

pyright's own package downloads a Node when it first runs; basedpyright is the same checker with a Node in a package.
"""

import doctest
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PATHS = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "convert")]

# Of torch's types nothing is needed: its stubs would take mypy half a minute.
MYPY = """
[mypy]
strict = True
follow_imports = silent
[mypy-torch.*,numpy.*,PIL.*,safetensors.*,einops.*,tqdm.*,huggingface_hub.*,tokenizers.*]
follow_imports = skip
"""
# Types that torch leaves unknown are no fault of a snippet.
PYRIGHT = {"typeCheckingMode": "strict", "include": ["."], "extraPaths": PATHS, "reportUnknownMemberType": False,
           "reportUnknownVariableType": False, "reportUnknownArgumentType": False, "reportUnusedExpression": False}

GOOD = """
import torch
from minit2v import (AnimateDiffPipeline, AutoencoderKL, CLIPTextModel, DDIMScheduler, DiffusionPipeline, MotionAdapter,
                     TextToVideoSDPipeline, UNet3DConditionModel)


class MyUNet(UNet3DConditionModel):
    pass


pipe = TextToVideoSDPipeline.from_pretrained("shapes", unet=MyUNet, dtype=torch.float16).to("cuda")
channels: int = pipe.unet.config.in_channels
factor: int = pipe.vae.config.factor + pipe.text_encoder.config.hidden_size
ids = pipe.tokenizer(["a"], max_length=4)
mine: MyUNet = MyUNet.from_pretrained("shapes", subfolder="unet", strict=False)
scheduler: DDIMScheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
vae: AutoencoderKL = AutoencoderKL.from_pretrained("shapes", subfolder="vae").eval()
text: CLIPTextModel = CLIPTextModel.from_config(pipe.text_encoder.config)
adapter = MotionAdapter.from_pretrained("shapes-motion")
motion = AnimateDiffPipeline.from_pretrained("shapes-image", motion_adapter=adapter)
video = motion("a red circle").frames[0]
(latents,) = pipe("a red circle", output_type="latent", return_dict=False)
sample = scheduler.step(latents, 1, latents).prev_sample
positions: int = motion.unet.config.motion_max_seq_length
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
pipe.scheduler.set_timesteps(4)
sigma: float = pipe.scheduler.init_noise_sigma
less_noisy = pipe.scheduler.step(latents, pipe.scheduler.timesteps[0], latents).prev_sample
again = TextToVideoSDPipeline(pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, pipe.scheduler)
latents_alone = TextToVideoSDPipeline(None, None, None, mine, scheduler)
some = DiffusionPipeline.from_pretrained("shapes")
frames = some("a red circle", num_frames=8).frames
"""
# Each line by itself is an error.
BAD = {
    "config field": "unet.config.block_out_chanels",
    "field of a pipeline's part": "pipe.vae.config.latent_chanels",
    "field of a pipeline's UNet": "pipe.unet.config.in_chanels",
    "keyword of a config": "UNet3DConfig(block_out_chanels=(1, 2))",
    "method of a pipeline": "pipe.enable_vae_slicng()",
    "keyword of a call": "pipe('a red circle', num_inference_step=4)",
    "method of a scheduler": "pipe.scheduler.set_timestep(4)",
    "class": "minit2v.UNet3DConditonModel",
}
# And these where the types of torch are known: mypy is not shown them here.
BAD_COMPONENTS = {
    "another's place": "TextToVideoSDPipeline(pipe.unet, None, None, None, None)",
    "another class": "pipe.unet = pipe.vae",
    "no scheduler": "TextToVideoSDPipeline(None, None, None, None, pipe.vae)",
}
HEAD = """import minit2v
from minit2v import TextToVideoSDPipeline, UNet3DConditionModel
from minit2v.models.unet3d import UNet3DConfig

unet = UNet3DConditionModel(UNet3DConfig())
pipe = TextToVideoSDPipeline.from_pretrained("shapes")
"""


def snippets(page: Path) -> dict[str, str]:
    """{page and line: source} of the Python blocks; of sessions, what is typed in."""
    text, found = page.read_text(encoding="utf-8"), {}
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S):
        source = match[1]
        if source.startswith(">>>"):
            source = "".join(example.source for example in doctest.DocTestParser().get_examples(source))
        found[f"{page.stem}_{text[: match.start()].count(chr(10)) + 2}"] = source
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every snippet as a module, GOOD, and BAD with a line for each error."""
    folder = tmp_path_factory.mktemp("snippets")
    for page in PAGES:
        for name, source in snippets(page).items():
            (folder / f"{name}.py").write_text(source, encoding="utf-8")
    (folder / "good.py").write_text(GOOD)
    (folder / "bad.py").write_text(HEAD + "".join(line + "\n" for line in [*BAD.values(), *BAD_COMPONENTS.values()]))
    (folder / "mypy.ini").write_text(MYPY)
    (folder / "pyrightconfig.json").write_text(json.dumps(PYRIGHT))
    return folder


def mypy(folder: Path) -> list[tuple[str, int, str]]:
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--no-error-summary",
               *sorted(p.name for p in folder.glob("*.py"))]  # fmt: skip
    env = {**os.environ, "MYPYPATH": os.pathsep.join(PATHS)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = re.findall(r"^(\S+?\.py):(\d+): error: (.*)$", done.stdout, re.M)
    return [(file, int(line), message) for file, line, message in found]


def pyright(folder: Path) -> list[tuple[str, int, str]]:
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "-p", ".", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = json.loads(done.stdout)["generalDiagnostics"]
    return [(Path(d["file"]).name, d["range"]["start"]["line"] + 1, d["message"]) for d in found
            if d["severity"] == "error"]  # fmt: skip


@pytest.mark.parametrize("checker,module", [(mypy, "mypy"), (pyright, "basedpyright")], ids=["mypy", "pyright"])
def test_snippets_pass_and_misspellings_do_not(folder, checker, module):
    if not os.environ.get("CI"):  # where a missing checker is a failure
        pytest.importorskip(module)
    found = checker(folder)
    assert [error for error in found if error[0] != "bad.py"] == []
    first = HEAD.count("\n") + 1
    wrong = {line - first for file, line, _ in found if file == "bad.py"}
    expected = [*BAD] if checker is mypy else [*BAD, *BAD_COMPONENTS]
    missed = [what for n, what in enumerate(expected) if n not in wrong]
    assert not missed and min(wrong) >= 0, (missed, found)


def test_there_are_snippets():
    assert sum(len(snippets(page)) for page in PAGES) >= 10
