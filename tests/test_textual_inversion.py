"""Textual inversion: every layout of the files, what the words do in prompts, and what is refused."""

import copy
import io
import os
import pickle
import random
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

from minit2v import (
    CLIPTextModel,
    CLIPTokenizer,
    DiffusionPipeline,
    TextToVideoSDPipeline,
    VideoToVideoSDPipeline,
)
from minit2v.adapters import textual_inversion

DIM = 24  # of the small text encoder
CALL = dict(num_frames=2, num_inference_steps=2, height=16, width=16, output_type="pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_official_folder):
    return make_official_folder(tmp_path_factory.mktemp("t2v"), small=True)


@pytest.fixture(scope="module")
def whole(folder):
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(whole):
    yield whole
    whole.unload_textual_inversion()


def vectors(count: int | None = None, dim: int = DIM, seed: int = 0) -> torch.Tensor:
    shape = (dim,) if count is None else (count, dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def video(pipe, prompt="a <toy> moves", **call):
    return pipe(prompt, **CALL | {"generator": torch.Generator().manual_seed(0)} | call).frames


def state(pipe):
    return pipe.tokenizer.backend.to_str(), dict(pipe.tokenizer.words), pipe.text_encoder.tokens.weight.detach().clone()


def assert_same_state(pipe, before):
    now = state(pipe)
    assert now[:2] == before[:2] and torch.equal(now[2], before[2])
    assert pipe.text_encoder.config.vocab_size == len(now[2]) == pipe.text_encoder.tokens.num_embeddings


def rows(pipe, word):
    return pipe.text_encoder.tokens.weight[pipe.tokenizer.words[word]]


# ------------------------------------------------------------------------------------------------------------- layouts


def a1111(x, **changes):
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": x}, "name": "EasyNegative", "step": 500,
            "sd_checkpoint": None, "sd_checkpoint_name": "model"} | changes  # fmt: skip


@pytest.mark.parametrize("name,content,word,count", [
    ("learned_embeds.bin", {"<toy>": vectors()}, "<toy>", 1),
    ("learned_embeds.safetensors", {"<toy>": vectors()}, "<toy>", 1),
    ("other.safetensors", {"<toy>": vectors(3)}, "<toy>", 3),
    ("other.pt", {"<toy>": vectors(3).half()}, "<toy>", 3),
    ("badhand.safetensors", {"emb_params": vectors(2)}, "badhand", 2),
    ("renamed.pt", a1111(vectors(2)), "EasyNegative", 2),
    ("grad.pt", a1111(vectors(2).requires_grad_()), "EasyNegative", 2),
    ("param.pt", a1111(nn.Parameter(vectors(2))), "EasyNegative", 2),
    ("nameless.pt", a1111(vectors(2), name=None), "nameless", 2),
    ("oldest.pt", {"string_to_token": {"*": torch.tensor(265)},
                   "string_to_param": nn.ParameterDict({"*": nn.Parameter(vectors(2))})}, "oldest", 2),
])  # fmt: skip
def test_every_layout(pipe, tmp_path, name, content, word, count):
    file = tmp_path / name
    save_file(content, file) if name.endswith(".safetensors") else torch.save(content, file)
    want = vectors(count).half().float() if name == "other.pt" else vectors(count)
    before = state(pipe)
    assert pipe.load_textual_inversion(file) == {word: count}
    assert torch.equal(rows(pipe, word), want)
    pipe.unload_textual_inversion(word)
    assert_same_state(pipe, before)
    assert pipe.load_textual_inversion(str(file), token="<mine>") == {"<mine>": count}
    assert torch.equal(rows(pipe, "<mine>"), want)


def test_the_parameter_dict_that_torch_before_1_12_wrote(pipe, tmp_path):
    """Its attributes were those of any module; torch writes it otherwise today."""

    old = object.__new__(nn.ParameterDict)
    vars(old).update(training=True, _parameters=OrderedDict({"*": nn.Parameter(vectors(2))}), _buffers=OrderedDict(),
                     _backward_hooks=OrderedDict(), _modules=OrderedDict(), _non_persistent_buffers_set=set())
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": old}, tmp_path / "old.pt")
    assert pipe.load_textual_inversion(tmp_path / "old.pt") == {"old": 2}
    assert torch.equal(rows(pipe, "old"), vectors(2))


def test_a_folder_and_its_files(pipe, tmp_path):
    save_file({"<toy>": vectors()}, tmp_path / "learned_embeds.safetensors")
    torch.save({"<toy>": vectors(2)}, tmp_path / "learned_embeds.bin")
    assert pipe.load_textual_inversion(tmp_path) == {"<toy>": 1}
    pipe.unload_textual_inversion()
    assert pipe.load_textual_inversion(tmp_path, use_safetensors=False) == {"<toy>": 2}
    pipe.unload_textual_inversion()
    assert pipe.load_textual_inversion(tmp_path, weight_name="learned_embeds.bin") == {"<toy>": 2}
    pipe.unload_textual_inversion()
    assert pipe.load_textual_inversion(tmp_path.parent, subfolder=tmp_path.name) == {"<toy>": 1}
    with pytest.raises(ValueError, match="is a file: weight_name and subfolder are only for"):
        pipe.load_textual_inversion(tmp_path / "learned_embeds.bin", weight_name="learned_embeds.bin")
    with pytest.raises(FileNotFoundError, match="has no nothing.bin; the files there: learned_embeds.bin"):
        pipe.load_textual_inversion(tmp_path, weight_name="nothing.bin")
    (tmp_path / "two").mkdir()
    for n in "ab":
        save_file({f"<{n}>": vectors()}, tmp_path / f"two/{n}.safetensors")
    with pytest.raises(FileNotFoundError, match="as weight_name=: a.safetensors, b.safetensors"):
        pipe.load_textual_inversion(tmp_path / "two")
    assert pipe.load_textual_inversion(tmp_path / "two", weight_name="b.safetensors") == {"<b>": 1}


def test_state_dicts_tensors_lists_and_several_words(pipe, tmp_path):
    assert pipe.load_textual_inversion({"<a>": vectors(), "<b>": vectors(2)}) == {"<a>": 1, "<b>": 2}
    assert pipe.load_textual_inversion(vectors(2), token="<c>") == {"<c>": 2}
    assert pipe.load_textual_inversion([vectors(), {"x": vectors(2)}], ["<d>", "<e>"]) == {"<d>": 1, "<e>": 2}
    assert pipe.load_textual_inversion([{"<f>": vectors()}, a1111(vectors())]) == {"<f>": 1, "EasyNegative": 1}
    assert pipe.load_textual_inversion([{"x": vectors()}, {"<g>": vectors()}], ["<h>", None]) == {"<h>": 1, "<g>": 1}
    save_file({"x": vectors(), "y": vectors(2)}, tmp_path / "both.safetensors")
    assert pipe.load_textual_inversion(tmp_path / "both.safetensors", ["<i>", "<j>"]) == {"<i>": 1, "<j>": 2}
    two = {"string_to_token": {"*": 265, "&": 5}, "string_to_param": {"<k>": vectors(), "<l>": vectors(2)}}
    assert pipe.load_textual_inversion(two) == {"<k>": 1, "<l>": 2}
    ids = [n for word in pipe.tokenizer.words.values() for n in word]
    assert ids == list(range(518, 518 + len(ids))) and len(pipe.text_encoder.tokens.weight) == 518 + len(ids)


def test_the_rows_are_copies(pipe, tmp_path):
    """Of a tensor given, and of a mapped file."""
    x = vectors(2)
    pipe.load_textual_inversion(x, token="<toy>")
    x.zero_()
    assert torch.equal(rows(pipe, "<toy>"), vectors(2))


# ------------------------------------------------------------------------------------------------------------- prompts


def test_what_a_word_becomes(pipe):
    pipe.load_textual_inversion([vectors(1), vectors(3), vectors(2), vectors(1)], ["<toy>", "EasyNeg", "cat2", "cat22"])
    ids = pipe.tokenizer.words
    toy, easy, cat2, cat22 = (ids[w] for w in ("<toy>", "EasyNeg", "cat2", "cat22"))

    def found(text):
        return [n for n in pipe.tokenizer.encode(text) if n >= 518]

    for text in ("EasyNeg", "easyneg", "EASYNEG", "a easyneg, b", "(EasyNeg:1.2)"):
        assert found(text) == easy, text
    assert found("a<toy>b") == found("<TOY>") == toy and found("<toy><toy>") == toy + toy
    assert found("cat2") == cat2 and found("cat22") == cat22 and found("cat22 cat2") == cat22 + cat2
    assert found("cat2_1") == cat2[1:]  # the one vector
    for text in ("xeasynegx", "cat222", "easynegs", "easyneg_x"):
        assert found(text) == [], text  # within another word
    assert pipe.tokenizer.encode("a <toy> b") == [pipe.tokenizer.bos_token_id, *pipe.tokenizer.encode("a")[1:-1],
                                                  *toy, *pipe.tokenizer.encode("b")[1:]]  # fmt: skip


def test_a_word_counts_as_many_tokens_and_is_cut_with_a_warning(pipe):
    pipe.load_textual_inversion(vectors(40), token="<toy>")
    ids = pipe.tokenizer("<toy> a")
    assert (ids >= 518).sum() == 40
    with pytest.warns(UserWarning, match="the prompt has 82 tokens, but only 77 are read. Cut off: '<toy>_35"):
        ids = pipe.tokenizer("<toy><toy>")
    assert ids.shape == (1, 77) and ids[0, -1] == pipe.tokenizer.eos_token_id


def test_prompts_negative_prompts_and_lists(pipe):
    plain = video(pipe), video(pipe, "red", negative_prompt="a <toy> moves")
    pipe.load_textual_inversion(vectors(3) * 3, token="<toy>")
    word = video(pipe), video(pipe, "red", negative_prompt="a <toy> moves")
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(plain, word, strict=True))
    both = video(pipe, ["a <toy> moves", "red"], negative_prompt=["", "a <toy> moves"],
                 generator=[torch.Generator().manual_seed(0) for _ in "ab"])  # fmt: skip
    assert torch.allclose(both[:1], word[0], atol=1e-5) and torch.allclose(both[1:], word[1], atol=1e-5)
    text, _ = pipe.encode_prompt("<toy>", do_classifier_free_guidance=False)
    with torch.no_grad():
        assert torch.equal(text, pipe.text_encoder(pipe.tokenizer("<toy>")))
    pipe.unload_textual_inversion("<toy>")
    assert torch.equal(video(pipe), plain[0])


# ----------------------------------------------------------------------------------------------------------- unloading


def test_unloading_takes_all_vectors_and_leaves_the_others_right(pipe):
    before = state(pipe)
    pipe.load_textual_inversion([vectors(2, seed=n) for n in range(3)], ["<a>", "<b>", "<c>"])
    alone = {w: video(pipe, w) for w in ("<a>", "<c>")}
    pipe.unload_textual_inversion("<B>")  # as in a prompt
    assert list(pipe.tokenizer.words) == ["<a>", "<c>"] and len(pipe.text_encoder.tokens.weight) == 518 + 4
    assert torch.equal(rows(pipe, "<c>"), vectors(2, seed=2))
    assert all(torch.equal(video(pipe, w), alone[w]) for w in alone)
    with pytest.raises(ValueError, match="the word '<b>' was not added .nearest: '<"):
        pipe.unload_textual_inversion(["<a>", "<b>"])
    assert list(pipe.tokenizer.words) == ["<a>", "<c>"]
    pipe.unload_textual_inversion(["<c>", "<a>"])
    assert_same_state(pipe, before)
    pipe.unload_textual_inversion()
    assert_same_state(pipe, before)


# ------------------------------------------------------------------------------------------------------ they go along


def test_saved_and_loaded(pipe, tmp_path):
    pipe.load_textual_inversion([vectors(2), vectors(1)], ["EasyNeg", "<toy>"])
    want = video(pipe, "EASYNEG <toy>")
    pipe.save_pretrained(tmp_path / "x")
    again = DiffusionPipeline.from_pretrained(tmp_path / "x")
    again.set_progress_bar_config(disable=True)
    assert again.tokenizer.words == pipe.tokenizer.words and again.text_encoder.config.vocab_size == 521
    assert torch.equal(video(again, "EASYNEG <toy>"), want)
    again.unload_textual_inversion("EasyNeg")  # also what came with the folder
    again.load_textual_inversion(vectors(2), token="EasyNeg")
    assert torch.equal(video(again, "EASYNEG <toy>"), want)
    again.unload_textual_inversion()
    again.save_pretrained(tmp_path / "x")  # over it
    assert CLIPTokenizer.from_pretrained(tmp_path / "x", subfolder="tokenizer").words == {}


def test_from_pipe_to_and_deepcopy(folder):
    pipe = TextToVideoSDPipeline.from_pretrained(folder)
    pipe.load_textual_inversion(vectors(2), token="<toy>")
    other = VideoToVideoSDPipeline.from_pipe(pipe)
    assert other.tokenizer.words == {"<toy>": [518, 519]}
    other.load_textual_inversion(vectors(1), token="<b>")  # the networks are shared: so are the words
    assert pipe.tokenizer.words == {"<toy>": [518, 519], "<b>": [520]}
    twin = copy.deepcopy(pipe.tokenizer)
    pipe.unload_textual_inversion()
    assert twin.words and not pipe.tokenizer.words and not other.tokenizer.words
    half = TextToVideoSDPipeline.from_pretrained(folder).to(torch.bfloat16)
    half.load_textual_inversion(vectors(2), token="<toy>")
    assert half.text_encoder.tokens.weight.dtype == torch.bfloat16
    assert torch.equal(rows(half.to(torch.float32), "<toy>"), vectors(2).bfloat16().float())


def test_a_word_is_logged(pipe, caplog):
    caplog.set_level("INFO")
    pipe.load_textual_inversion([vectors(3), vectors(1)], ["<a>", "<b>"])
    assert [r.getMessage() for r in caplog.records] == [
        "The word '<a>' now stands for 3 vectors.", "The word '<b>' now stands for 1 vector."]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("content,token,why", [
    ({"<a>": vectors(2, 768)}, None, "have width 768, but this text encoder needs 24: .* Stable Diffusion 1.x"),
    ({"<a>": vectors(2, 1024)}, None, "have width 1024, but this text encoder needs 24: .* ModelScope"),
    ({"<a>": vectors(2, 7)}, None, "have width 7, but this text encoder needs 24$"),
    ({"clip_l": vectors(2, 768), "clip_g": vectors(2, 1280)}, None, "an embedding of SDXL"),
    (vectors(2), None, "no word: give one as token="),
    ({"emb_params": vectors(2)}, None, "no word: give one as token="),
    (vectors(2), "a", "'a' is a piece of the vocabulary"),
    (a1111(vectors(2)), "!", "'!' is a piece of the vocabulary"),
    ({"<a>": vectors(), "<A>": vectors()}, None, "the word '<a>' was added before"),
    ({"<a>": vectors(2), "<a>_2": vectors()}, None, "could not tell the word '<a>_2' from '<a>', which was added"),
    ({"<a>_1": vectors(), "<a>": vectors()}, None, "could not tell the word '<a>' from '<a>_1', which was added"),
    ({"<a>_1": vectors(), "<a>": vectors(2)}, None, "could not tell the word '<a>' from '<a>_1', which was added"),
    ({"<a>": vectors(), "": vectors()}, None, "'' is not a word"),
    ({" a ": vectors()}, None, "no space at its ends"),
    ({"\ud800": vectors()}, None, "is not a word"),
    ({"x" * 201: vectors()}, None, "is not a word"),
    ({"wow!": vectors()}, None, "would not be found in a prompt"),
    ({"<a>": vectors(76)}, None, "has 76 vectors, but a prompt has room for 75"),
    ({"<a>": vectors(0)}, None, r"not \(0, 24\)"),
    ({"<a>": torch.zeros(1, 2, DIM)}, None, r"not \(1, 2, 24\)"),
    ({"<a>": torch.tensor(1.0)}, None, r"not \(\)"),
    ({"<a>": torch.zeros(2, DIM).long()}, None, "not torch.int64"),
    ({"<a>": vectors(2) / 0}, None, "holds NaN or infinity"),
    ({"<a>": vectors(2).double() * 1e300}, None, "does not fit torch.float32"),
    ({"<a>": 5}, None, "is a int, not vectors"),
    ({}, None, "it has 0 entries"),
    ({5: vectors()}, None, "5 is not a word"),
    ({"lora_te_x.lora_down.weight": vectors(4)}, None, "load LoRAs with load_lora_weights"),
    ({"string_to_param": {}}, None, "its string_to_param is {}"),
    ({"string_to_param": 5}, None, "its string_to_param is 5"),
    (a1111(vectors(2), extra=vectors(2)), None, "beside string_to_param it has an unknown tensor 'extra'"),
    ({"<a>": vectors(), "<b>": vectors()}, "<c>", "there are 2 words .*, but token= names 1"),
    ({"<a>": vectors(), "<b>": vectors()}, ["<c>", "<c>"], "names a word twice"),
    ([vectors(), vectors()], ["<c>"], "there are 2 embeddings, but token= has 1"),
    ([vectors(), vectors()], "<c>", "there are 2 embeddings, but token= has 1"),
    ([vectors(), vectors(2, 7)], ["<c>", "<d>"], "'<d>' have width 7"),
    ([vectors(), vectors()], ["<c>", "<c>"], "the word '<c>' was added before"),
])  # fmt: skip
def test_refused_and_nothing_has_changed(pipe, content, token, why):
    pipe.load_textual_inversion(vectors(1), token="<old>")
    before = state(pipe)
    with pytest.raises(ValueError, match=why) as e:
        pipe.load_textual_inversion(content, token)
    assert "\n" not in str(e.value)
    assert_same_state(pipe, before)


@pytest.mark.parametrize("argument", [5, None, [5], [None]])
def test_what_is_no_source(pipe, argument):
    with pytest.raises(TypeError, match="a path, a hub id, a state dict or a tensor"):
        pipe.load_textual_inversion(argument)


def test_tokens_that_are_none(pipe):
    for token in (5, ["<a>", 5], [5]):
        with pytest.raises(TypeError, match="token= must be a word or a list of words"):
            pipe.load_textual_inversion([vectors(), vectors()], [token, None])


def test_a_vocabulary_of_clips_own_size():
    """`cat` and `ct` are pieces; `astronaut` ends a word."""
    tokenizer = CLIPTokenizer.clip()
    for word in ("cat", "ct", "Cat", "astronaut", "<|endoftext|>"):
        with pytest.raises(ValueError, match="a piece of the vocabulary"):
            tokenizer.add_word(word)
    assert tokenizer.add_word("<cat-toy>", 2) == [49408, 49409] and tokenizer.vocab_size == 49410
    assert tokenizer.encode("a <Cat-Toy>, red")[1:-1] == [320, 49408, 49409, 267, 736]
    tokenizer.remove_words(["<cat-toy>"])
    assert tokenizer.backend.to_str() == CLIPTokenizer.clip().backend.to_str()


def test_parts_that_are_missing_or_do_not_belong_together(folder):
    pipe = TextToVideoSDPipeline.from_pretrained(folder)
    pipe.tokenizer = CLIPTokenizer.clip()
    with pytest.raises(ValueError, match="the tokenizer has 49,408 ids, but the text encoder 518 rows"):
        pipe.load_textual_inversion(vectors(), token="<a>")
    for name in ("tokenizer", "text_encoder"):
        pipe = TextToVideoSDPipeline.from_pretrained(folder)
        setattr(pipe, name, None)
        with pytest.raises(ValueError, match=f"needs the pipeline's {name}, which is None"):
            pipe.load_textual_inversion(vectors(), token="<a>")


def test_fused_into_the_table_nothing_is_added(pipe):
    """unfuse_lora would give back a table without the words."""
    g = torch.Generator().manual_seed(0)
    name = "text_model.embeddings.token_embedding"
    pipe.load_lora_weights({f"text_encoder.{name}.lora_A": torch.randn(2, 518, generator=g),
                            f"text_encoder.{name}.lora_B": torch.randn(DIM, 2, generator=g)})  # fmt: skip
    pipe.load_textual_inversion(vectors(2), token="<toy>")
    branch = video(pipe)
    pipe.unload_textual_inversion()
    pipe.fuse_lora()
    before = state(pipe)
    with pytest.raises(ValueError, match="a LoRA is fused into the text encoder's token table"):
        pipe.load_textual_inversion(vectors(2), token="<toy>")
    assert_same_state(pipe, before)
    pipe.unfuse_lora()
    pipe.load_textual_inversion(vectors(2), token="<toy>")
    assert torch.equal(video(pipe), branch)
    pipe.unload_lora_weights()


def test_pictures_and_missing_files(pipe, tmp_path):
    (tmp_path / "toy.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(ValueError, match="toy.png is a PNG picture"):
        pipe.load_textual_inversion(tmp_path / "toy.png")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        pipe.load_textual_inversion(tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match="there is no folder 'nothing'"):
        pipe.load_textual_inversion("nothing")


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/minit2v-evil",)


def mutants():
    """A hundred files that were embeddings: (name, bytes)."""
    rng = random.Random(0)
    good: dict[str, bytes] = {}
    for name, content in {"a.pt": a1111(vectors(2)), "b.bin": {"<b>": vectors()}, "c.pt": {
            "string_to_token": {"*": torch.tensor(5)},
            "string_to_param": nn.ParameterDict({"*": nn.Parameter(vectors(2))})}}.items():  # fmt: skip
        torch.save(content, buffer := io.BytesIO())
        good[name] = buffer.getvalue()
    torch.save(a1111(vectors(2)), buffer := io.BytesIO(), _use_new_zipfile_serialization=False)
    good["old.pt"] = buffer.getvalue()
    good["d.safetensors"] = save({"<d>": vectors(2)})
    good["emb.safetensors"] = save({"emb_params": vectors(2)})
    for name, whole in good.items():
        for _ in range(6):  # cut off
            yield name, whole[: rng.randrange(len(whole))]
        for _ in range(8):  # bytes of the head changed
            broken = bytearray(whole)
            for _ in range(rng.choice([1, 3, 20])):
                broken[rng.randrange(min(400, len(whole)))] = rng.randrange(256)
            yield name, bytes(broken)
    x = vectors(2)
    others = [vectors(2, 5), x.to(torch.int8), x.to(torch.complex64), x.to_sparse(), "x", None, [x], {"*": x},
              {"x": {"y": x}}, {"*": Evil()}, x.to("meta")]  # fmt: skip
    for n, x in enumerate(others):
        torch.save(a1111(x), buffer := io.BytesIO())
        yield f"other{n}.pt", buffer.getvalue()
        torch.save({"<x>": x, "<y>": vectors()}, buffer := io.BytesIO())
        yield f"word{n}.bin", buffer.getvalue()
    for content in (Evil(), {"string_to_param": Evil(), "name": "x"}):
        yield "evil.pt", pickle.dumps(content)
        torch.save(content, buffer := io.BytesIO())
        yield "evil.bin", buffer.getvalue()
    yield "empty.pt", b""
    yield "lfs.safetensors", b"version https://git-lfs.github.com/spec/v1\n"
    yield "page.pt", b"<!DOCTYPE html>"
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("x", "y")
    yield "archive.pt", buffer.getvalue()


def test_mutated_files_load_or_are_refused_in_a_line_and_nothing_changes(pipe, tmp_path):
    want, before, refused = video(pipe), state(pipe), 0
    cases = list(mutants())
    assert len(cases) > 100
    for name, content in cases:
        (tmp_path / name).write_bytes(content)
        try:
            pipe.load_textual_inversion(tmp_path / name)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and name in str(error) and len(str(error)) < 1500, error
            assert_same_state(pipe, before)
            refused += 1
        else:  # a byte that says nothing of the vectors, or other numbers
            pipe.unload_textual_inversion()
            assert_same_state(pipe, before)
    assert refused > 80
    assert torch.equal(video(pipe), want)
    assert not os.path.exists("/tmp/minit2v-evil")


def test_modelscopes_text_encoder_takes_words_at_full_width(tmp_path):
    """With CLIP's own vocabulary; saved and loaded."""
    encoder = CLIPTextModel(hidden_size=1024, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    tokenizer = CLIPTokenizer.clip("!")
    save_file({"emb_params": vectors(8, 1024)}, tmp_path / "easynegative.safetensors")
    textual_inversion.load(tokenizer, encoder, [(tmp_path / "easynegative.safetensors", None)])
    encoder.save_pretrained(tmp_path / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    table = load_file(tmp_path / "text_encoder/model.safetensors")["text_model.embeddings.token_embedding.weight"]
    assert table.shape == (49416, 1024) and torch.equal(table[49408:], vectors(8, 1024))
    assert CLIPTokenizer.from_pretrained(tmp_path / "tokenizer").words == {"easynegative": [*range(49408, 49416)]}
