"""Folders of strangers: whatever their JSON and their tokenizers say, they load or are refused in a line that names the
file. `benchmarks/fuzz_folders.py` breaks 2,000 of them; here are 200, and those that were found by hand."""

import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from minit2v import CLIPTokenizer, DiffusionPipeline, cli
from minit2v_convert.convert import convert

HUGE = 10**12
PARTS = {
    "unet/config.json": [
        {"in_channels": -1}, {"in_channels": 0}, {"out_channels": -4}, {"norm_num_groups": 0}, {"norm_num_groups": -8},
        {"attention_head_dim": 0}, {"attention_head_dim": -8}, {"cross_attention_dim": 0},
        {"cross_attention_dim": HUGE},
        {"sample_size": 0}, {"sample_size": [8, -8]}, {"sample_size": []}, {"block_out_channels": []},
        {"block_out_channels": [0]}, {"block_out_channels": [-32]}, {"block_out_channels": [HUGE]},
        {"block_out_channels": [1] * 5000}, {"layers_per_block": 0}, {"layers_per_block": HUGE},
        {"down_block_types": []}, {"down_block_types": [["x"]]}, {"_class_name": []}, {"_class_name": ["x"]},
        {"_class_name": 5}, {"_class_name": "x" * 10**6}, {"config": {}}, {"self": 1},
        {"compat": "diffusers"}, {"": 1}, {"x" * 10**6: 1}, {"in_channels": 10**400}, {"in_channels": True},
        {"norm_eps": []}, {"\u001b[2J": 1}],
    "text_encoder/config.json": [
        {"num_attention_heads": 0}, {"num_attention_heads": -3}, {"hidden_size": 0}, {"vocab_size": -1},
        {"max_position_embeddings": 0}, {"layer_norm_eps": float("nan")}, {"layer_norm_eps": -1.0},
        {"num_hidden_layers": -1}, {"hidden_act": ["gelu"]}, {"architectures": {}, "_class_name": None},
        {"architectures": {"a": 1}}, {"architectures": 5}, {"architectures": "CLIP"}, {"architectures": [None]},
        {"max_position_embeddings": 8}],
    "vae/config.json": [
        {"scaling_factor": 0.0}, {"scaling_factor": float("inf")}, {"scaling_factor": -1.0}, {"latent_channels": -4},
        {"sample_size": 0}, {"norm_num_groups": 0}],
    "scheduler/scheduler_config.json": [
        {"num_train_timesteps": -1}, {"num_train_timesteps": HUGE}, {"num_train_timesteps": None}, {"beta_start": "x"},
        {"beta_start": float("nan")}, {"beta_end": 2.0}, {"trained_betas": "x"}, {"trained_betas": [None]},
        {"trained_betas": {}}, {"_use_default_values": 5}, {"prediction_type": []}, {"timestep_spacing": {}},
        {"beta_schedule": [["x"]]}, {"steps_offset": 10**30}, {"_own_fields": 5}],
    "model_index.json": [
        {"_minit2v": []}, {"_minit2v": "x"}, {"_minit2v": {"compat": []}}, {"_minit2v": {"compat": "x"}},
        {"_minit2v": {"clip_skip_negative": [1]}}, {"../../etc": ["diffusers", "AutoencoderKL"]},
        {"/etc": ["diffusers", "AutoencoderKL"]}, {"..": [None, None]}, {"a/b": ["x", "y"]}, {"": ["x", "y"]},
        {"unet": []}, {"unet": None}, {"unet": ["diffusers", []]}, {"unet": "x"}, {"unet": {}},
        {"vae": ["a", "b", "c"]},
        {"scheduler": ["diffusers", "x" * 10**6]}, {"_class_name": []}, {"_class_name": {}}, {"_class_name": None},
        {"unet": ["diffusers", "CLIPTokenizer"]}],
    "tokenizer/tokenizer_config.json": [
        {"model_max_length": -1}, {"model_max_length": "x"}, {"model_max_length": []}, {"bos_token": 5},
        {"bos_token": {}}, {"bos_token": {"content": 5}}, {"pad_token": {"content": "x", "flag": 1}},
        {"added_tokens_decoder": []}, {"added_tokens_decoder": {"x": {}}}, {"added_tokens_decoder": {"0": 5}},
        {"eos_token": []}, {"unk_token": True}, {"model_max_length": 10**6}],
}  # fmt: skip
CASES = [(file, change) for file, changes in PARTS.items() for change in changes]


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_official_folder):
    """Its UNet has one level: each case inspects it."""
    shallow = dict(block_out_channels=[32], down_block_types=["CrossAttnDownBlock3D"],
                   up_block_types=["CrossAttnUpBlock3D"])
    return make_official_folder(tmp_path_factory.mktemp("model"), small=True, unet=shallow)


def _link(src, dst):
    (os.link if Path(src).suffix == ".safetensors" else shutil.copy)(src, dst)


@pytest.fixture
def copy(model, tmp_path):
    return Path(shutil.copytree(model, tmp_path / "copy", copy_function=_link))


@pytest.fixture(scope="module")
def whole(model):
    return DiffusionPipeline.from_pretrained(model).components


def refused(capsys, folder, whole, part, kinds=ValueError):
    """Loading is one line that names the folder, and so is inspecting."""
    given = {} if part == "model_index.json" else {name: c for name, c in whole.items() if name != part}
    with pytest.raises(kinds) as error:
        DiffusionPipeline.from_pretrained(folder, local_files_only=True, **given)
    line = str(error.value)
    assert "\n" not in line and len(line) < 1500 and str(folder) in line, line[:2000]
    code = cli.main(["inspect", str(folder)])
    out, err = capsys.readouterr()
    said = [line for line in out.splitlines() if line.startswith("wrong: ")] + err.splitlines()
    assert "Traceback" not in err and all(len(line) < 2100 for line in said)
    return line, code, said


@pytest.mark.parametrize("n", range(len(CASES)), ids=[f"{file}-{str(change)[:30]!a}" for file, change in CASES])
def test_a_folder_whose_json_is_hostile(capsys, copy, whole, n):
    file, change = CASES[n]
    content = json.loads((copy / file).read_text()) if (copy / file).exists() else {}
    (copy / file).write_text(json.dumps(content | change))
    if file.startswith("tokenizer"):  # which would win
        (copy / "tokenizer" / "special_tokens_map.json").unlink(missing_ok=True)
    line, code, said = refused(capsys, copy, whole, file.split("/")[0])
    assert code == 1 and said, (line, said)


@pytest.mark.parametrize("kind", ["pipe", "zero", "loop", "folder", "huge", "deep"])
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "tokenizer/vocab.json",
                                  "scheduler/scheduler_config.json"])  # fmt: skip
def test_what_is_no_file_does_not_hang(capsys, copy, whole, file, kind):
    path = copy / file
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        path.touch()
        os.truncate(path, 2**33)
    elif kind == "deep":
        path.write_text("[" * 10**5)
    else:
        path.symlink_to("/dev/zero" if kind == "zero" else path.name)
    line, code, said = refused(capsys, copy, whole, file.split("/")[0], (ValueError, OSError))
    assert code == 1 and said, line


def test_weights_that_are_a_pipe_do_not_hang(copy, tmp_path):
    for path in (copy / "vae").glob("*.safetensors"):
        path.unlink()
        os.mkfifo(path)
    for to in ("diffusers", "single-file"):
        with pytest.raises(ValueError, match="is a pipe or a device"):
            convert(copy, tmp_path / "out", to)


def test_the_merges_of_a_tokenizer_cannot_be_lost(capsys, copy, whole):
    """Without them prompts become other ids, and nobody would see it."""
    merges = copy / "tokenizer" / "merges.txt"
    text = merges.read_text()
    for lost in ("", "#version: 0.2\n", "\n".join(text.splitlines()[:-1]), "\n".join(text.splitlines()[:2])):
        merges.write_text(lost)
        line, code, said = refused(capsys, copy, whole, "tokenizer")
        assert "merges are missing" in line and code == 1 and "merges" in said[0], (line, said)
    merges.write_text(text)
    CLIPTokenizer.from_pretrained(copy / "tokenizer")
    CLIPTokenizer.clip().save_pretrained(copy / "clip")
    (copy / "clip" / "tokenizer.json").unlink()
    assert CLIPTokenizer.from_pretrained(copy / "clip").vocab_size == 49408


def test_inspect_reads_what_another_file_wins_over(capsys, copy):
    """tokenizer.json wins over the two that other libraries read; the fields of this package; lengths of two parts."""
    CLIPTokenizer.from_pretrained(copy / "tokenizer").save_pretrained(copy / "tokenizer")
    assert cli.main(["inspect", str(copy)]) == 0
    files = {p: p.read_text() for p in (copy / "tokenizer" / "merges.txt", copy / "tokenizer" / "vocab.json",
                                        copy / "model_index.json", copy / "tokenizer" / "tokenizer_config.json")}
    merges, vocab, index, config = files
    words = json.loads(files[vocab])
    for path, text, says in (
        (merges, "", "merges are missing, .* .minit2v reads tokenizer.json instead."),
        (vocab, "{}", "broken|merges are missing|do not fit"),
        (vocab, json.dumps(words | {"a": words["b"], "b": words["a"]}), "another vocabulary than tokenizer.json"),
        (index, json.dumps(json.loads(files[index]) | {"_minit2v": []}), "_minit2v must be an object, not "),
        (index, json.dumps(json.loads(files[index]) | {"_minit2v": {"compat": "x"}}), "compat must be None or"),
        (config, json.dumps(json.loads(files[config]) | {"model_max_length": 500}), "model_max_length is 500, but the"),
    ):
        path.write_text(text)
        capsys.readouterr()
        assert cli.main(["inspect", str(copy)]) == 1
        out, err = capsys.readouterr()
        assert re.search(says, out + err), (path.name, out + err)
        path.write_text(files[path])


def test_names_of_parts_become_no_paths(copy, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.json").write_text("{}")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"../secret": ["diffusers", "AutoencoderKL"]}))
    for to in ("diffusers", "single-file"):
        with pytest.raises(ValueError, match="copy: model_index.json names the part '../secret', which cannot"):
            convert(copy, tmp_path / "out", to)


def test_two_hundred_broken_folders(model):
    path = Path(__file__).parents[1] / "benchmarks" / "fuzz_folders.py"
    spec = importlib.util.spec_from_file_location("fuzz_folders", path)
    fuzz = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    result = fuzz.run(200, 10**6, model, inspect_every=5)
    assert result["wrong"] == []
    assert result["slowest_s"] < fuzz.SECONDS and result["grown_mib"] < 256
    refused = sum(n for what, n in result["counts"].items() if what.endswith("refused"))
    assert 100 < refused < 200  # most, and not all: some changes change nothing
