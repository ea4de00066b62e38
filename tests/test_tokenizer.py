import gzip
import json
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from pytest import fixture, mark, param, raises, warns

from minit2v.models.tokenizer import BOS, EOS, CLIPTokenizer, byte_symbols

CASES = json.loads(gzip.decompress((Path(__file__).parent / "data/clip_tokenizer_cases.json.gz").read_bytes()))["cases"]
CAPTIONS = [f"a {color} {shape} moves {where}, it's over!" for color in ("red", "green") for shape in ("circle", "star")
            for where in ("left", "right")]  # fmt: skip
PADS = {"sd15": EOS, "modelscope": "!"}


@fixture(scope="module")
def small():
    return CLIPTokenizer.train(CAPTIONS, 530, model_max_length=24)


@fixture(scope="module")
def real():
    """family -> tokenizer with CLIP's own vocabulary."""
    return {family: CLIPTokenizer.clip(pad) for family, pad in PADS.items()}


@mark.parametrize("family", PADS)
@mark.parametrize("case", [param(case, id=case["name"]) for case in CASES])
def test_ids_with_clips_own_vocabulary(real, case, family):
    warnings.simplefilter("ignore")
    assert real[family](case["prompt"])[0].tolist() == case[family]["hf_fast"]


def test_there_are_48_cases_of_77_ids():
    assert len(CASES) == 48 and all(len(case[family]["hf_fast"]) == 77 for case in CASES for family in PADS)


def test_bytes_have_clips_ids(small):
    ids = {"!": 0, '"': 1, "!</w>": 256, ",</w>": 267, ".</w>": 269, "a</w>": 320}
    ids |= {f"{n}</w>": 271 + n for n in range(10)}
    assert {token: small.backend.token_to_id(token) for token in ids} == ids
    assert len(set(byte_symbols())) == 256


def test_the_merges_follow_and_the_two_special_tokens_are_last(small):
    first = json.loads(small.backend.to_str())["model"]["merges"][0]
    assert small.backend.token_to_id("".join(first)) == 512
    assert (small.bos_token_id, small.eos_token_id) == (528, 529) and small.vocab_size == 530
    assert small.backend.token_to_id(BOS) == 528 and small.backend.token_to_id(EOS) == 529


def test_training_is_deterministic_and_does_not_depend_on_order(small):
    again = CLIPTokenizer.train(reversed(CAPTIONS), 530, model_max_length=24)
    assert again.backend.to_str() == small.backend.to_str()


def test_training_merges_the_most_frequent_pair_first():
    tokenizer = CLIPTokenizer.train(["abab abab cab", "b"], 516)
    # a+b</w> three times, a+b only twice
    assert json.loads(tokenizer.backend.to_str())["model"]["merges"] == [["a", "b</w>"], ["a", "b"]]
    assert [tokenizer.backend.id_to_token(n) for n in tokenizer.encode("abab")[1:-1]] == ["ab", "ab</w>"]


def test_training_counts_words_as_often_as_they_occur():
    tokenizer = CLIPTokenizer.train(["cd cd cd", "ab xab"], 515)
    assert json.loads(tokenizer.backend.to_str())["model"]["merges"] == [["c", "d</w>"]]


def test_a_vocabulary_ends_where_the_texts_do():
    assert CLIPTokenizer.train(["cat"], 600).vocab_size == 514 + 2
    with raises(ValueError, match="at least 514, .* not 513"):
        CLIPTokenizer.train(["cat"], 513)


def test_learned_words_are_one_token(small):
    big = CLIPTokenizer.train(CAPTIONS, 2000)
    assert len(big.encode("red circle MOVES  left")) == 4 + 2
    assert len(small.encode("red circle moves left")) > 4 + 2


def test_the_exclamation_mark_is_a_token_of_its_own_where_it_is_the_padding():
    ordinary, modelscope = (CLIPTokenizer.train(["wow!!! wow!!!"], 600, pad_token=pad) for pad in PADS.values())
    wow, run = ordinary.encode("wow!!!")[1:-1]
    assert run >= 512  # "!!!" is merged
    assert modelscope.encode("wow!!!")[1:-1] == [wow, 0, 0, 0]
    assert modelscope.encode("wow ! wow")[1:-1] == [wow, 0, wow]
    assert ordinary.encode("wow ! wow")[1:-1] == [wow, 256, wow]


@mark.parametrize("pad,pad_id", [(EOS, 529), ("!", 0)])
def test_padding(pad, pad_id):
    tokenizer = CLIPTokenizer.train(CAPTIONS, 530, model_max_length=24, pad_token=pad)
    ids = tokenizer(["a red circle", ""])
    assert ids.dtype == torch.int64 and ids.shape == (2, 24)
    inner = tokenizer.encode("a red circle")
    assert ids[0].tolist() == inner + [pad_id] * (24 - len(inner)) and inner[0] == 528 and inner[-1] == 529
    assert ids[1].tolist() == [528, 529] + [pad_id] * 22
    assert tokenizer.pad_token_id == pad_id


def test_one_text_is_a_batch_of_one(small):
    assert torch.equal(small("a red star"), small(["a red star"]))
    assert small("a", max_length=5).tolist() == [[528, 320, 529, 529, 529]]


@mark.parametrize("length,cut", [(6, "e f g"), (8, "g"), (2, "a b c d e f g")])
def test_what_does_not_fit_is_quoted(small, length, cut):
    with warns(UserWarning, match=f"9 tokens, but only {length} are read. Cut off: '{cut}'"):
        ids = small("a b c d e f g", max_length=length)[0].tolist()
    assert ids == small.encode("a b c d e f g")[: length - 1] + [529]


def test_what_fits_to_the_last_token_is_not_cut(small):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert small("a b c d e f g", max_length=9)[0].tolist() == small.encode("a b c d e f g")


@mark.parametrize(
    "texts,error,message",
    [
        (None, TypeError, "not NoneType"),
        (3, TypeError, "not int"),
        (["a", 3], TypeError, "must be a str, not int"),
        ([["a"]], TypeError, "must be a str, not list"),
        ([], ValueError, "empty"),
        ("a \ud800", ValueError, "not valid Unicode.* character 2"),
    ],
)
def test_bad_prompts_are_named(small, texts, error, message):
    with raises(error, match=message) as caught:
        small(texts)
    assert "\n" not in str(caught.value)


def test_a_length_without_room_is_an_error(small):
    with raises(ValueError, match="max_length must be at least 2.*not 1"):
        small("a", max_length=1)
    with raises(ValueError, match="model_max_length must be at least 2.*not 0"):
        CLIPTokenizer.train(["a"], 514, model_max_length=0)


def test_decoding(small):
    ids = small.encode("A RED circle,\n it's 42  über 猫")
    assert small.decode(ids) == f"{BOS}a red circle , it 's 4 2 über 猫 {EOS}"
    assert small.decode(torch.tensor(ids[1:-1])) == "a red circle , it 's 4 2 über 猫"


@mark.parametrize("left_out", [[], ["tokenizer.json"], ["vocab.json", "merges.txt"]])
@mark.parametrize("pad", PADS.values())
def test_what_is_saved_loads_again(tmp_path, pad, left_out):
    tokenizer = CLIPTokenizer.train(CAPTIONS, 530, model_max_length=24, pad_token=pad)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for name in left_out:
        (tmp_path / "tokenizer" / name).unlink()
    again = CLIPTokenizer.from_pretrained(tmp_path, subfolder="tokenizer")
    assert again.backend.to_str() == tokenizer.backend.to_str()
    assert again.model_max_length == 24 and again.pad_token == pad
    assert torch.equal(again(CAPTIONS, max_length=40), tokenizer(CAPTIONS, max_length=40))


def test_a_full_disk_leaves_no_half_vocabulary(small, tmp_path):
    """The limit on a file's size stands for the disk's."""
    small.save_pretrained(tmp_path)
    small.backend.model.save(str(tmp_path), "theirs")  # the library's own spelling of these two files
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / f"theirs-{name}").read_bytes() == (tmp_path / name).read_bytes()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        for folder in (tmp_path, tmp_path / "new"):
            with raises(OSError, match=f"cannot write {folder / 'vocab.json'}"):
                small.save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with raises(OSError, match="cannot write"):
        small.save_pretrained(tmp_path / "file")


@fixture
def published(tmp_path, write_tiny_vocabulary, published_config):
    """published(repo) -> a folder with that repository's tokenizer configs and a tiny vocabulary."""

    def make(repo):
        write_tiny_vocabulary(tmp_path)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            config = published_config(repo, f"tokenizer/{name}")
            if "added_tokens_decoder" in config:  # its ids are those of the real vocabulary
                tokens = config["added_tokens_decoder"]
                config["added_tokens_decoder"] = {"516": tokens["49406"], "517": tokens["49407"]}
            (tmp_path / name).write_text(json.dumps(config))
        return tmp_path

    return make


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@mark.parametrize(
    "repo,pad_id", [("ms-1.7b", 0), ("zeroscope_v2_576w", 0), ("zeroscope_v2_XL", 0), ("sd15", 517), ("rv51", 517)]
)
def test_published_configs(published, repo, pad_id):
    tokenizer = CLIPTokenizer.from_pretrained(published(repo))
    assert tokenizer("cat!", max_length=6).tolist() == [[516, 513, 256 if pad_id else 0, 517, pad_id, pad_id]]
    assert tokenizer.model_max_length == 77 and tokenizer.vocab_size == 518


def test_the_special_tokens_map_counts_only_without_an_added_tokens_decoder(published):
    folder = published("rv51")
    edit(folder / "special_tokens_map.json", pad_token="!")
    assert CLIPTokenizer.from_pretrained(folder).pad_token == EOS
    folder = published("sd15")
    edit(folder / "special_tokens_map.json", pad_token="!")
    assert CLIPTokenizer.from_pretrained(folder).pad_token == "!"


@mark.parametrize("length,expected", [(32, 32), (None, 77), (10**30, 77)])
def test_model_max_length(published, length, expected):
    folder = published("sd15")
    edit(folder / "tokenizer_config.json", model_max_length=length)
    assert CLIPTokenizer.from_pretrained(folder).model_max_length == expected


def test_a_vocabulary_that_is_not_the_configs_is_an_error(published):
    folder = published("rv51")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"49406": config["added_tokens_decoder"]["516"]}
    edit(folder / "tokenizer_config.json", **config)
    with raises(ValueError, match="the id 49406, but 516 by the vocabulary"):
        CLIPTokenizer.from_pretrained(folder)


def test_learned_tokens_of_older_folders(published):
    folder = published("sd15")
    (folder / "added_tokens.json").write_text(json.dumps({"<toy>": 518}))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    assert tokenizer.encode("cat <TOY>") == [516, 513, 518, 517] and tokenizer.vocab_size == 519
    (folder / "added_tokens.json").write_text(json.dumps({"<toy>": 600}))
    with raises(ValueError, match="'<toy>' has the id 600.*518"):
        CLIPTokenizer.from_pretrained(folder)


@mark.parametrize(
    "file,field,value,message",
    [
        ("tokenizer_config.json", "pad_tokn", "!", "unknown field 'pad_tokn'.*pad_token"),
        ("special_tokens_map.json", "mask_token", "<m>", "unknown field 'mask_token'"),
        ("tokenizer_config.json", "do_lower_case", False, "do_lower_case=False is not supported, only True"),
        ("tokenizer_config.json", "tokenizer_class", "T5Tokenizer", "T5Tokenizer"),
        ("tokenizer_config.json", "padding_side", "left", "padding_side='left'"),
    ],
)
def test_a_field_that_is_not_supported_is_an_error(published, file, field, value, message):
    folder = published("sd15")
    edit(folder / file, **{field: value})
    with raises(ValueError, match=message):
        CLIPTokenizer.from_pretrained(folder)


def test_missing_and_broken_files_are_named(published, tmp_path):
    folder = published("sd15")
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca zz\n")
    with raises(ValueError, match="do not fit together.*zz"):
        CLIPTokenizer.from_pretrained(folder)
    (folder / "vocab.json").write_text('{"a": ')
    with raises(ValueError, match="vocab.json or merges.txt is broken"):
        CLIPTokenizer.from_pretrained(folder)
    (folder / "merges.txt").unlink()
    with raises(FileNotFoundError, match="neither tokenizer.json nor vocab.json and merges.txt"):
        CLIPTokenizer.from_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": []}}')
    with raises(ValueError, match="tokenizer.json has no byte-pair vocabulary"):
        CLIPTokenizer.from_pretrained(folder)
    with raises(FileNotFoundError, match="no folder"):
        CLIPTokenizer.from_pretrained(tmp_path / "nowhere")


def test_importing_it_does_not_import_the_library():
    code = ("import sys, minit2v.models.clip, minit2v.models.tokenizer; "
            "print({'tokenizers', 'huggingface_hub'} & {*sys.modules})")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
