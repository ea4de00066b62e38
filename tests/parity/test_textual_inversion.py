"""Textual inversion beside diffusers, where diffusers is right: ids, tables, frames, and files either way."""

import io

import diffusers
import pytest
import torch
import transformers

import minit2v
from minit2v import AnimateDiffPipeline, DiffusionPipeline, MotionAdapter

TOLERANCE = 1e-4
CALL = dict(num_frames=2, num_inference_steps=2, height=16, width=16)
PROMPTS = ["a <toy> moves", "<toy>, easyneg", "a<toy>b <TOY>", "(easyneg:1.2) red", "red"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_official_folder):
    return make_official_folder(tmp_path_factory.mktemp("t2v"), small=True)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def vectors(count, seed=0, dim=24):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pipes(folder):
    theirs = quiet(diffusers.TextToVideoSDPipeline.from_pretrained(folder, torch_dtype=torch.float32))
    return quiet(DiffusionPipeline.from_pretrained(folder, compat="diffusers")), theirs


def ids(pipe, prompt):
    if not isinstance(pipe, diffusers.DiffusionPipeline):
        return pipe.tokenizer(prompt)[0].tolist()
    text = pipe.maybe_convert_prompt(prompt, pipe.tokenizer)
    return pipe.tokenizer(text, padding="max_length", max_length=77, truncation=True).input_ids


def frames(pipe, prompt, **call):
    return torch.as_tensor(pipe(prompt, generator=torch.Generator().manual_seed(0), **CALL, **call).frames)


def a1111(x):
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": x}, "name": "easyneg", "step": 5,
                "sd_checkpoint": None, "sd_checkpoint_name": None}, file := io.BytesIO())  # fmt: skip
    file.seek(0)
    return file.getvalue()


def test_ids_tables_and_frames(pipes, tmp_path):
    (tmp_path / "renamed.pt").write_bytes(a1111(vectors(3)))
    torch.save({"<toy>": vectors(2, 1)}, tmp_path / "learned_embeds.bin")
    ours, theirs = pipes
    for pipe in pipes:
        pipe.load_textual_inversion(str(tmp_path / "renamed.pt"))
        pipe.load_textual_inversion(str(tmp_path), weight_name="learned_embeds.bin")
        pipe.load_textual_inversion([vectors(1, 2), vectors(1, 3)], ["<one>", "my cat"])
    table = theirs.text_encoder.get_input_embeddings().weight
    assert torch.equal(ours.text_encoder.tokens.weight, table) and len(table) == theirs.text_encoder.config.vocab_size
    for prompt in [*PROMPTS, "<one> and my cat"]:
        # Of capitals, theirs gives a word of several vectors its first alone: ours gives all.
        if "TOY" not in prompt:
            assert ids(ours, prompt) == ids(theirs, prompt), prompt
    assert ids(ours, "<TOY>") == ids(theirs, "<toy>")
    for prompt in PROMPTS[:2]:
        a, b = (frames(p, prompt, negative_prompt="easyneg, red") for p in pipes)
        assert (a - b).abs().max() < TOLERANCE
    plain = frames(ours, PROMPTS[0])
    ours.unload_textual_inversion("easyneg")  # theirs leaves two of its three vectors
    assert torch.allclose(frames(ours, PROMPTS[0]), plain, atol=1e-6)


def test_what_we_saved_is_theirs(pipes, tmp_path):
    ours, _ = pipes
    ours.load_textual_inversion([vectors(3), vectors(1, 1)], ["EasyNeg", "<toy>"])
    ours.save_pretrained(tmp_path)
    theirs = quiet(diffusers.TextToVideoSDPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32))
    assert ids(theirs, "EasyNeg_1 <toy>") == ids(ours, "EasyNeg_1 <toy>")
    prompt = "a <toy> moves"
    assert ids(theirs, prompt) == ids(ours, prompt)
    assert (frames(theirs, prompt) - frames(ours, prompt)).abs().max() < TOLERANCE
    encoder = transformers.CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    assert torch.equal(encoder.get_input_embeddings().weight, ours.text_encoder.tokens.weight)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert tokenizer(prompt).input_ids == ours.tokenizer.encode(prompt)
    assert "EasyNeg_2" in tokenizer.get_vocab()


def test_what_they_saved_is_ours(pipes, tmp_path):
    _, theirs = pipes
    theirs.load_textual_inversion([vectors(3), vectors(1, 1)], ["easyneg", "<toy>"])
    theirs.save_pretrained(tmp_path)
    ours = quiet(DiffusionPipeline.from_pretrained(tmp_path, compat="diffusers"))
    assert ours.tokenizer.words == {"easyneg": [518, 519, 520], "<toy>": [521]}
    for prompt in ("a <toy> moves", "easyneg, red"):
        assert ids(theirs, prompt) == ids(ours, prompt)
        assert (frames(theirs, prompt) - frames(ours, prompt)).abs().max() < TOLERANCE


def test_animatediff(tmp_path, make_official_folder, make_adapter_folder):
    base = make_official_folder(tmp_path / "sd15", repo="sd15", small=True)
    adapter = make_adapter_folder(tmp_path, "v1-5-2")
    ours = quiet(AnimateDiffPipeline.from_pretrained(
        base, motion_adapter=MotionAdapter.from_pretrained(adapter), compat="diffusers"))
    theirs = quiet(diffusers.AnimateDiffPipeline.from_pretrained(
        base, motion_adapter=diffusers.MotionAdapter.from_pretrained(adapter), feature_extractor=None))
    ours.scheduler = minit2v.DDIMScheduler.from_config(ours.scheduler.config)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    for pipe in (ours, theirs):
        pipe.load_textual_inversion({"<toy>": vectors(2)})
    a, b = (pipe("a <toy>", negative_prompt="<toy>", generator=torch.Generator().manual_seed(0), output_type="pt",
                 **CALL).frames for pipe in (ours, theirs))  # fmt: skip
    assert (a - b).abs().max() < TOLERANCE
