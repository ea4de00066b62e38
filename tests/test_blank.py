"""`minit2v blank`: what it writes is what the published files hold, but for the weights."""

import gzip
import json
from pathlib import Path

import pytest

from minit2v import DDIMScheduler, DiffusionPipeline, MotionAdapter, UNet2DConditionModel, cli
from minit2v.models.tokenizer import CLIPTokenizer
from minit2v.pipelines import blank

HERE = {"ms-1.7b": "ms-1.7b", "zeroscope_v2_576w": "zeroscope-v2-576w", "zeroscope_v2_XL": "zeroscope-v2-xl",
        "sd15": "sd-1.5", "rv51": "realistic-vision-v51", "animatelcm": "animatelcm"}  # fmt: skip
CASES = Path(__file__).parent / "data/clip_tokenizer_cases.json.gz"


def header(path: Path) -> dict:
    """name -> (shape, dtype) of a .safetensors file."""
    with path.open("rb") as file:
        entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: (tuple(e["shape"]), e["dtype"]) for name, e in entries.items() if name != "__metadata__"}


@pytest.fixture
def run(capsys):
    def call(*args):
        code = cli.main(["blank", *map(str, args)])
        return code, *capsys.readouterr()

    return call


def test_names_shapes_and_dtypes_are_the_published_ones(manifest, manifest_names, tmp_path):
    folders = {}
    for name in manifest_names:
        repo, part = name.removesuffix(".fp16").split("/")
        model = HERE.get(repo) or repo.replace("adapter", "motion")
        folder = folders.get(repo) or blank.write_blank(model, tmp_path / repo)
        folders[repo] = folder
        part = "" if part == "motion_adapter" else part
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        file = folder / part / f"{stem}{'.fp16' * name.endswith('.fp16')}.safetensors"
        assert header(file) == manifest(name), name
    assert len(folders) == len(blank.MODELS)
    names = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.safetensors")]
    assert len(names) == len(manifest_names)  # and there are no others


def test_the_configs_say_what_the_published_ones_say(published_config, published_class):
    from minit2v.files.config import make_config

    for repo, model in HERE.items():
        for part, config in blank.MODELS[model].parts.items():
            network = blank.NETWORKS[published_class(f"{repo}/{part or 'motion_adapter'}")]
            theirs = make_config(network.Config, published_config(repo, part or "motion_adapter"))
            assert make_config(network.Config, config) == theirs or repo == "rv51" and part == "vae"


def test_a_whole_pipeline_loads_without_a_network(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "ms"
    folder.mkdir()  # empty: that is not an obstacle
    code, out, err = run("damo-vilab/text-to-video-ms-1.7b", folder)
    assert code == 0 and out.split() == [str(folder)] and "has zeros as weights: 11.0 GB" in err
    assert sum(512 * p.stat().st_blocks for p in folder.rglob("*")) < 4e6
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe).__name__ == "TextToVideoSDPipeline" and not pipe.unet.conv_in.weight.any()
    assert sum(p.numel() for p in pipe.unet.parameters()) == 1_411_233_860
    cases = json.loads(gzip.decompress(CASES.read_bytes()))["cases"]
    for case in cases[:10]:
        assert pipe.tokenizer(case["prompt"])[0].tolist() == case["modelscope"]["hf_fast"]
    assert pipe.scheduler.config.beta_schedule == "scaled_linear"
    assert list(tmp_path.iterdir()) == [folder]


def test_an_image_model_and_an_adapter(tmp_path):
    image = blank.write_blank("SD-1.5", tmp_path / "new" / "sd")
    adapter = blank.write_blank("motion-v1-5-2", tmp_path / "adapter")
    unet = UNet2DConditionModel.from_pretrained(image, subfolder="unet", variant="fp16", dtype="fp16")
    assert unet.config.sample_size == 64 and DDIMScheduler.from_pretrained(image, subfolder="scheduler")
    assert CLIPTokenizer.from_pretrained(image, subfolder="tokenizer").pad_token == "<|endoftext|>"
    assert MotionAdapter.from_pretrained(adapter).config.use_motion_mid_block


def test_what_is_refused(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    for name, dst, said in (("ms-1.7", "x", "nearest: 'ms-1.7b'"), ("ms-1.7b", "full", "not an empty folder"),
                            ("ms-1.7b", "full/a", "not an empty folder")):  # fmt: skip
        code, out, err = run(name, tmp_path / dst)
        assert code == 1 and not out and said in err and err.count("\n") == 1
    assert [p.name for p in tmp_path.rglob("*")] == ["full", "a"]


def test_nothing_is_left_where_writing_fails(run, tmp_path, monkeypatch):
    def full(self, folder):
        raise OSError(28, "no space", str(folder))

    monkeypatch.setattr(CLIPTokenizer, "save_pretrained", full)
    assert run("zeroscope-v2-xl", tmp_path / "x")[0] == 1 and not list(tmp_path.iterdir())


def test_the_help_names_models_that_exist():
    from minit2v.cli.arguments import make_parser

    action = next(a for a in make_parser()._actions if a.dest == "command").choices["blank"]._actions[1]
    assert {*action.help.split(", ")[:-2]} <= blank.MODELS.keys()
