"""Weighted prompts: docs/prompts.md, against sums by hand."""

import logging

import pytest
import torch

from minit2v import DiffusionPipeline
from minit2v.models.tokenizer import CLIPTokenizer
from minit2v.techniques.prompt_weights import LOOKS_WEIGHTED, chunks, encode, parse


@pytest.fixture(scope="module")
def pipe():
    pipe = DiffusionPipeline.from_pretrained("shapes")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def weighted(pipe):
    pipe.prompt_weights = "a1111"
    yield pipe
    pipe.prompt_weights = None


@pytest.fixture(scope="module")
def tokenizer():
    """CLIP's, which reads 77 tokens."""
    return CLIPTokenizer.clip()


@pytest.mark.parametrize("text,pieces", [
    ("normal text", [("normal text", 1)]),
    ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
    ("(unbalanced", [("unbalanced", 1.1)]),
    ("[unbalanced", [("unbalanced", 1 / 1.1)]),
    (r"\(literal\]", [("(literal]", 1)]),
    (r"a\\b \x", [(r"a\b \x", 1)]),
    ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    ("closed) too] far", [("closed) too] far", 1)]),
    ("[no:1.3] weight", [("no:1.3", 1 / 1.1), (" weight", 1)]),
    ("(half:.5) (less:-1) (none:0)", [("half", 0.5), (" ", 1), ("less", -1), (" ", 1), ("none", 0)]),
    ("(a : 1.2) at 10:30", [("a ", 1.2), (" at 10:30", 1)]),
    ("(a:1.2.3)", [("a:1.2.3)", 1.1)]),
    ("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
     [("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
      ("sky", 1.4641), (".", 1.1)]),
    ("one BREAK two", [("one", 1), None, ("two", 1)]),
    ("(one BREAK two:1.5) breakfast BREAKING", [("one", 1.5), None, ("two", 1.5), (" breakfast BREAKING", 1)]),
    ("", []),
])  # fmt: skip
def test_pieces(text, pieces):
    found = parse(text)
    assert [p and p[0] for p in found] == [p and p[0] for p in pieces]
    assert [p[1] for p in found if p] == pytest.approx([p[1] for p in pieces if p])


def test_chunks(tokenizer):
    word = tokenizer.encode("cat")[1]
    lengths = lambda text: [len(c.ids) for c in chunks(tokenizer, text)]  # noqa: E731
    assert lengths("") == [0] and lengths("cat") == [1] and lengths("cat " * 75) == [75]
    assert lengths("cat " * 76) == [75, 1] and lengths("cat " * 160) == [75, 75, 10]
    assert lengths("cat BREAK " + "cat " * 3) == [1, 3] and lengths("BREAK cat") == [0, 1]
    assert lengths("cat " * 59 + ", " + "cat " * 20) == [60, 20], "behind a comma 16 tokens ago"
    assert lengths("cat " * 50 + ", " + "cat " * 30) == [75, 6], "a comma too far away"
    assert lengths("cat " * 75 + ", cat") == [75, 2]
    found = chunks(tokenizer, "cat (cat:1.5) " + "cat " * 80)
    assert found[0].weights[:3] == [1, 1.5, 1] and set(found[1].weights) == {1} and found[0].ids[0] == word


def test_states(tokenizer):
    """Every step of the page, for prompts of one and of two chunks."""
    table = torch.randn(49408, 4, generator=torch.Generator().manual_seed(0))
    position = torch.randn(77, 4, generator=torch.Generator().manual_seed(1))
    seen = []

    def text_encoder(ids):
        seen.append(ids)
        return table[ids] + position

    states = encode(tokenizer, text_encoder, ["a (red:1.3) [cat] BREAK a dog", "a cat"], 2)
    assert states.shape == (2, 154, 4)
    (ids,) = seen
    assert ids.shape == (4, 77) and set(ids[:, 0].tolist()) == {tokenizer.bos_token_id}
    assert ids[0, :5].tolist() == tokenizer.encode("a red cat") and ids[1, :4].tolist() == tokenizer.encode("a dog")
    assert ids[3].tolist() == tokenizer("")[0].tolist()
    plain = table[ids] + position
    weight = torch.ones(77)
    weight[2], weight[3] = 1.3, 1 / 1.1
    first = plain[0] * weight[:, None]
    torch.testing.assert_close(states[0, :77], first * (plain[0].mean() / first.mean()))
    assert torch.equal(states[0, 77:], plain[1]) and torch.equal(states[1, :77], plain[2])


def test_the_padding_token_is_the_tokenizers(pipe):
    ids = []
    encode(pipe.tokenizer, lambda x: ids.append(x) or torch.zeros(*x.shape, 3), ["a red circle"], 1)
    assert torch.equal(ids[0], pipe.tokenizer(["a red circle"]))


def test_pipelines(weighted):
    text, negative = weighted.encode_prompt("a (red:1.4) circle", negative_prompt="blue BREAK green")
    length = weighted.tokenizer.model_max_length
    assert text.shape == negative.shape == (1, 2 * length, weighted.unet.config.cross_attention_dim)
    flat, _ = weighted.encode_prompt("a red circle")
    weighted.prompt_weights = None
    assert torch.equal(flat, weighted.encode_prompt("a red circle")[0]), "without weights nothing changes"
    assert torch.equal(weighted.encode_prompt("a (red:1.4) circle", negative_prompt="blue BREAK green",
                                              weights="a1111")[0], text)  # fmt: skip
    call = dict(num_frames=4, num_inference_steps=2, output_type="latent", height=32, width=32)
    videos = []
    by_frame = {0: "a (red:1.4) circle", 3: "a [blue] square BREAK moving up"}
    for prompt in ("a (red:1.4) circle", "a red circle", by_frame):
        weighted.prompt_weights = "a1111"
        videos.append(weighted(prompt, generator=torch.Generator().manual_seed(0), **call).frames)
    assert all(v.isfinite().all() for v in videos) and not torch.equal(videos[0], videos[1])


@pytest.mark.parametrize("text,looks", [
    ("a (red:1.3) cat", True), ("((cat))", True), ("[[cat]]", True), ("a cat BREAK a dog", True),
    ("a cat (asleep)", False), ("breakfast [for two]", False), ("at 10:30", False), ("(10:30 pm)", False),
])  # fmt: skip
def test_what_looks_weighted_gets_a_line(pipe, text, looks, caplog):
    assert bool(LOOKS_WEIGHTED.search(text)) == looks
    with caplog.at_level(logging.WARNING):
        pipe.encode_prompt(text)
    assert ("looks weighted" in caplog.text) == looks


def test_other_weights_are_refused(pipe):
    with pytest.raises(ValueError, match="weights must be one of a1111, not 'compel'"):
        pipe.encode_prompt("a cat", weights="compel")
