import gzip
import json
import random
import warnings
from pathlib import Path

import pytest
from transformers import CLIPTokenizer as Peer

from minit2v.models.tokenizer import BOS, EOS, CLIPTokenizer

DATA = Path(__file__).parents[1] / "data"
CASES = json.loads(gzip.decompress((DATA / "clip_tokenizer_cases.json.gz").read_bytes()))["cases"]
PROMPTS = [case["prompt"] for case in CASES]
NASTY = [
    "x" * 10_000,
    "wow! " * 2_000,
    "\0", "a\0b\x07\x1b[31m", "\ufeffbom", "\u202eright to left\u202c",
    "!", "!!", "! !", " !", "! ", "a!b!!c", "!!!!!!!!!!", "!?!?", "'!s", "!'s",
    "it's IT'S it'S 'S's ' s 'll'd've're'm't''s", "don’t", "'", "''",
    "ΟΔΥΣΣΕΥΣ ΣΑΣ Σ", "İI ıi ẞß ﬃ Ǆ", "é e\u0301 ﬁ", "猫が好き 고양이 漢字", "ｆｕｌｌ　ｗｉｄｔｈ",
    "👨‍👩‍👧‍👦👍🏽🏳️‍🌈", "½²Ⅳ٣๓ 12345", "a_b-c/d\\e", "\u00a0\u2003\u200b\u2028x", "\r\n\t \v\f",
    f"{BOS} a {EOS} b", f"{BOS}{EOS}", "<|STARTOFTEXT|> x <|EndOfText|>", "<|endoftext", f" {EOS} !{EOS}! ",
    "</w> a</w>b", "Ġa Ċ Ā", "&amp; <b> &#39;",
]  # fmt: skip
REPOS = ["ms-1.7b", "zeroscope_v2_576w", "sd15", "rv51"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A folder with a vocabulary learned from the prompts themselves, so that most of them are merged."""
    folder = tmp_path_factory.mktemp("vocabulary")
    CLIPTokenizer.train([*PROMPTS, *NASTY[2:], "wow!!! " * 9], 900).save_pretrained(folder)
    return folder


@pytest.fixture(params=["tokenizer.json", "vocab.json"])
def make_folder(request, vocabulary, tmp_path, published_config):
    """make_folder(repo) -> the vocabulary under that repository's published configs, in one form or the other."""

    def make(repo):
        for name in [request.param, "merges.txt"] if request.param == "vocab.json" else [request.param]:
            (tmp_path / name).write_bytes((vocabulary / name).read_bytes())
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            config = published_config(repo, f"tokenizer/{name}")
            if "added_tokens_decoder" in config:  # these ids are those of the real vocabulary
                tokens = config["added_tokens_decoder"]
                config["added_tokens_decoder"] = {"898": tokens["49406"], "899": tokens["49407"]}
            (tmp_path / name).write_text(json.dumps(config))
        return tmp_path

    return make


def assert_same(peer, ours):
    assert (ours.pad_token_id, ours.bos_token_id, ours.eos_token_id) == (
        peer.pad_token_id, peer.bos_token_id, peer.eos_token_id)  # fmt: skip
    assert ours.vocab_size == len(peer) and ours.model_max_length == peer.model_max_length
    texts = [*PROMPTS, *NASTY]
    expected = peer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = ours(texts)
    for text, row, want in zip(texts, rows.tolist(), expected.tolist(), strict=True):
        assert row == want, text[:80]
        ids = peer(text).input_ids
        assert ours.encode(text) == ids, text[:80]
        assert ours.decode(ids) == peer.decode(ids, clean_up_tokenization_spaces=False), text[:80]


@pytest.mark.parametrize("repo", REPOS)
def test_ids_of_published_folders(make_folder, repo):
    folder = make_folder(repo)
    ours = CLIPTokenizer.from_pretrained(folder)
    assert ours.pad_token == ("!" if repo in REPOS[:2] else EOS) and ours.vocab_size == 900
    assert_same(Peer.from_pretrained(folder), ours)


def test_ids_of_random_text(make_folder):
    draw = random.Random(0)
    letters = "aab!' .,\0\né猫Σs<|>👍½9" + "".join(chr(draw.randrange(32, 0x2FFF)) for _ in range(60))
    texts = ["".join(draw.choices(letters, k=draw.randrange(1, 40))) for _ in range(300)]
    folder = make_folder("ms-1.7b")
    peer, ours = Peer.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    for text in texts:
        assert ours.encode(text) == peer(text).input_ids, repr(text)


@pytest.mark.parametrize("repo", REPOS)
def test_what_we_save_loads_in_transformers(make_folder, repo, tmp_path_factory):
    ours = CLIPTokenizer.from_pretrained(make_folder(repo))
    ours.model_max_length = 19
    saved = tmp_path_factory.mktemp("saved")
    ours.save_pretrained(saved)
    assert_same(Peer.from_pretrained(saved), ours)
    assert_same(Peer.from_pretrained(saved), CLIPTokenizer.from_pretrained(saved))


@pytest.mark.parametrize("repo", REPOS)
def test_what_transformers_saves_loads_here(make_folder, repo, tmp_path_factory):
    peer = Peer.from_pretrained(make_folder(repo))
    peer.add_tokens(["<toy>"])
    saved = tmp_path_factory.mktemp("saved")
    peer.save_pretrained(saved)
    assert_same(peer, CLIPTokenizer.from_pretrained(saved))


@pytest.mark.parametrize("pad", [EOS, "!"])
def test_a_trained_tokenizer_is_transformers_own(pad, tmp_path):
    ours = CLIPTokenizer.train(PROMPTS, 700, model_max_length=24, pad_token=pad)
    ours.save_pretrained(tmp_path)
    assert_same(Peer.from_pretrained(tmp_path), ours)


def test_learned_tokens(make_folder):
    folder = make_folder("sd15")
    (folder / "added_tokens.json").write_text(json.dumps({"<toy>": 900, EOS: 899, "Big": 901, "two words": 902}))
    peer, ours = Peer.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    for text in ["a <toy>", "a<TOY>b", "big Big bigger", f"{EOS} <|ENDOFTEXT|>", "Two \n words two  words"]:
        assert ours.encode(text) == peer(text).input_ids
    assert_same(peer, ours)
    flags = {n: (t.content, t.special, t.normalized) for n, t in ours.backend.get_added_tokens_decoder().items()}
    assert flags == {n: (t.content, t.special, t.normalized) for n, t in peer.added_tokens_decoder.items()}
