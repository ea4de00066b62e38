import json

import pytest
import torch
from transformers import CLIPTextConfig as PeerConfig
from transformers import CLIPTextModel as Peer

from minit2v.models.clip import CLIPTextModel

FIELDS = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "max_position_embeddings": 13,
    "layer_norm_eps": 3e-4,
}


@pytest.fixture(params=["gelu", "quick_gelu"])
def pair(request, randomize_):
    """Ours and transformers', the same random weights in float64."""
    peer = Peer(PeerConfig(**FIELDS, hidden_act=request.param, bos_token_id=0, eos_token_id=2)).double().eval()
    randomize_(peer, seed=3)
    with torch.no_grad():
        for p in peer.parameters():
            p *= 2  # far into the bend of the activations, and no two tokens alike
    ours = CLIPTextModel(**FIELDS, hidden_act=request.param).double().eval()
    ours.load_state_dict(ours.layout.to_ours(peer.state_dict()), strict=True)
    return ours, peer


@pytest.fixture
def ids():
    return torch.randint(37, (3, 11), generator=torch.Generator().manual_seed(5))


def states(peer, ids):
    """transformers' hidden states and the norm that comes after the last one."""
    with torch.no_grad():
        out = peer(ids, output_hidden_states=True)
    return out.last_hidden_state, out.hidden_states, getattr(peer, "text_model", peer).final_layer_norm


@torch.no_grad()
def test_states_in_float64(pair, ids):
    ours, peer = pair
    assert (ours(ids) - states(peer, ids)[0]).abs().max() < 1e-10


@torch.no_grad()
def test_states_in_float32(pair, ids):
    ours, peer = (m.float() for m in pair)
    expected = states(peer, ids)[0]
    assert (ours(ids) - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("skip", [0, 1, 2, 3, 4])
def test_clip_skip_counts_as_diffusers_does(pair, ids, skip):
    ours, peer = pair
    _, hidden, norm = states(peer, ids)
    assert (ours(ids, clip_skip=skip) - norm(hidden[-(skip + 1)])).abs().max() < 1e-10


@torch.no_grad()
def test_what_we_save_loads_in_transformers(pair, ids, tmp_path):
    ours, peer = pair
    ours.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["CLIPTextModel"] and config["model_type"] == Peer.config_class.model_type
    loaded, info = Peer.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (states(loaded.eval(), ids)[0] - states(peer, ids)[0]).abs().max() < 1e-12


@torch.no_grad()
def test_what_transformers_saves_loads_here(pair, ids, tmp_path):
    ours, peer = pair
    peer.save_pretrained(tmp_path)
    loaded = CLIPTextModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert (loaded(ids) - ours(ids)).abs().max() < 1e-12
