import torch
from pytest import fixture, mark, raises

from minit2v.models.clip import CLIPTextConfig, CLIPTextModel

TINY = {
    "vocab_size": 29,
    "hidden_size": 20,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "max_position_embeddings": 11,
    "hidden_act": "quick_gelu",
}


@fixture
def model(randomize_):
    return randomize_(CLIPTextModel(**TINY)).eval()


def tokens(b, n):
    return torch.randint(TINY["vocab_size"], (b, n), generator=torch.Generator().manual_seed(1))


@mark.parametrize(
    "repo,count",
    [("ms-1.7b", 373), ("zeroscope_v2_576w", None), ("zeroscope_v2_XL", None), ("sd15", 197), ("rv51", 196)],
)
def test_every_name_and_shape_of_the_published_files(manifest, published_config, repo, count):
    published = manifest(f"{repo}/text_encoder")
    with torch.device("meta"):
        model = CLIPTextModel(**published_config(repo, "text_encoder"))
    ours = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert {name: shape for name, (shape, _) in CLIPTextModel.layout.to_ours(published).items()} == ours
    assert set(model.diffusers_state_dict()) == {name for name in published if "position_ids" not in name}
    assert count is None or len(published) == count


def test_the_defaults_are_modelscopes(published_config):
    assert CLIPTextModel(**TINY).config != CLIPTextConfig()
    with torch.device("meta"):
        assert CLIPTextModel(**published_config("ms-1.7b", "text_encoder")).config == CLIPTextConfig()


def test_names_without_the_text_model_level_are_the_same_names(model):
    published = model.diffusers_state_dict()
    assert all(name.startswith("text_model.") for name in published)
    bare = {name.removeprefix("text_model."): p for name, p in published.items()}
    bare["embeddings.position_ids"] = torch.arange(11)[None]
    assert CLIPTextModel.layout.to_ours(bare).keys() == model.state_dict().keys()


def test_an_unknown_name_is_an_error(model):
    with raises(KeyError, match="layer_norm3"):
        CLIPTextModel.layout.to_ours({"text_model.encoder.layers.0.layer_norm3.weight": 0})


def test_a_token_sees_only_what_is_before_it(model):
    ids = tokens(2, 9)
    other = ids.clone()
    other[:, 6] = (other[:, 6] + 1) % TINY["vocab_size"]
    a, b = model(ids), model(other)
    assert a.shape == (2, 9, 20)
    assert torch.allclose(a[:, :6], b[:, :6], rtol=0, atol=1e-6)
    assert (a[:, 6:] - b[:, 6:]).abs().amax(-1).min() > 1e-3


def test_position_matters(model):
    x = model(torch.full((1, 4), 7))[0]
    assert (x[1:] - x[:-1]).abs().amax(-1).min() > 1e-3


@mark.parametrize("skip", [0, 1, 2, 3])
def test_clip_skip_is_the_model_without_its_last_layers(model, skip):
    shorter = CLIPTextModel(**(TINY | {"num_hidden_layers": 3 - skip})).eval()
    state = {n: p for n, p in model.state_dict().items() if not n.startswith("layers.") or int(n[7]) < 3 - skip}
    shorter.load_state_dict(state)
    ids = tokens(2, 11)
    assert torch.allclose(model(ids, clip_skip=skip), shorter(ids), rtol=0, atol=1e-6)
    assert skip == 0 or not torch.allclose(model(ids, clip_skip=skip), model(ids), atol=1e-2)


@mark.parametrize("skip", [-1, 4, 1.0, True, "1"])
def test_a_clip_skip_out_of_range_is_an_error(model, skip):
    with raises(ValueError, match=r"clip_skip must be None or from 0 to 3"):
        model(tokens(1, 4), clip_skip=skip)


@mark.parametrize(
    "ids,message",
    [
        (torch.zeros(1, 12, dtype=torch.int64), "12 tokens, but the text encoder has 11 positions"),
        (torch.tensor([[3, 29]]), r"token ids 3 \.\.\. 29 .* vocabulary of 29"),
        (torch.tensor([[-1, 3]]), r"token ids -1 \.\.\. 3"),
        (torch.zeros(4, dtype=torch.int64), r"not \(4,\) of torch.int64"),
        (torch.zeros(1, 4), "not .* of torch.float32"),
        ([[1, 2]], "not list"),
    ],
)
def test_bad_ids_are_named(model, ids, message):
    with raises(ValueError, match=message) as error:
        model(ids)
    assert "\n" not in str(error.value)


@mark.parametrize(
    "fields,message",
    [
        ({"hidden_act": "gelu_new"}, "'gelu' or 'quick_gelu', not 'gelu_new'"),
        ({"num_attention_heads": 3}, "a multiple of num_attention_heads=3, not 20"),
        ({"use_attention_mask": True}, "only use_attention_mask=False is supported"),
        ({"hiden_size": 3}, "hiden_size.*hidden_size"),
    ],
)
def test_a_config_that_is_not_supported_is_an_error(fields, message):
    with raises(ValueError, match=message):
        CLIPTextModel(**TINY | fields)


def test_fields_that_mean_nothing_are_accepted():
    assert CLIPTextModel(**TINY, **dict.fromkeys(CLIPTextConfig.IGNORED, 7)).config == CLIPTextConfig(**TINY)


@mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_of_the_weights_is_the_dtype_of_the_states(model, dtype):
    assert model.to(dtype)(tokens(1, 5)).dtype == dtype
