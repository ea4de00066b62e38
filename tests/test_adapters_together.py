"""LoRA, textual inversion and IP-Adapter in one pipeline: each comes and goes without the others."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from minit2v import AnimateDiffPipeline, DDIMScheduler, MotionAdapter, fast
from minit2v.adapters import ip_adapter

CALL = dict(num_frames=3, num_inference_steps=2, height=16, width=24, output_type="latent")


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_official_folder, make_adapter_folder):
    folder = tmp_path_factory.mktemp("base")
    base = make_official_folder(folder / "sd15", repo="sd15", small=True)
    adapter = MotionAdapter.from_pretrained(make_adapter_folder(folder, "v1-5-2"))
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1)
    pipe = AnimateDiffPipeline.from_pretrained(base, motion_adapter=adapter, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(made):
    return copy.deepcopy(made)


@pytest.fixture(scope="module")
def file(tmp_path_factory, make_ip_adapter):
    return make_ip_adapter(tmp_path_factory.mktemp("ip"))


@pytest.fixture(scope="module")
def lora():
    """Of what attentions to the text have, and of a motion module."""
    g = torch.Generator().manual_seed(3)
    state = {}
    for name, (out, inputs) in {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q": (32, 32),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (32, 24),
        "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_out.0": (32, 32),
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_v": (64, 24),
        "up_blocks.1.motion_modules.0.transformer_blocks.0.attn1.to_q": (32, 32),
    }.items():
        state[f"unet.{name}.lora_A.weight"] = torch.randn(4, inputs, generator=g) * inputs**-0.5
        state[f"unet.{name}.lora_B.weight"] = torch.randn(out, 4, generator=g)
    return state


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 40, 3), dtype=np.uint8))


def video(pipe, shown=True, **call):
    call = {"prompt": "a cat", **CALL, **({"ip_adapter_image": PICTURE} if shown else {}), **call}
    return pipe(**call, generator=torch.Generator().manual_seed(0)).frames


@pytest.mark.parametrize("fused", [False, True])
def test_in_any_order(pipe, file, lora, fused):
    bare = video(pipe, False)
    pipe.load_ip_adapter(file)
    shown = video(pipe)
    pipe.load_lora_weights(dict(lora), adapter_name="a")
    both = video(pipe)
    assert not torch.equal(both, shown) and not torch.equal(shown, bare)
    if fused:
        pipe.fuse_lora()
        torch.testing.assert_close(video(pipe), both, rtol=0, atol=2e-4 * both.abs().max().item())
    pipe.unload_ip_adapter()
    with_lora = video(pipe, False)
    assert not torch.equal(with_lora, bare)
    if fused:
        pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(video(pipe, False), bare)

    pipe.load_lora_weights(dict(lora), adapter_name="a")  # the other way round
    if fused:
        pipe.fuse_lora()
    assert torch.equal(video(pipe, False), with_lora)
    pipe.load_ip_adapter(file)
    torch.testing.assert_close(video(pipe), both, rtol=0, atol=2e-4 * both.abs().max().item())
    if fused:
        pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(video(pipe), shown)
    pipe.unload_ip_adapter()
    assert torch.equal(video(pipe, False), bare)


def test_the_fast_path_runs_both_as_they_are_written(pipe, file, lora):
    pipe.load_ip_adapter(file)
    pipe.load_lora_weights(dict(lora), adapter_name="a")
    pipe.to(torch.float64)
    want = video(pipe)
    pipe.restore()
    torch.testing.assert_close(video(pipe), want, rtol=0, atol=1e-9 * want.abs().max().item())
    known = fast.executors
    pipe.optimize()
    assert known[pipe.unet] is not None
    torch.testing.assert_close(video(pipe), want, rtol=0, atol=1e-9 * want.abs().max().item())


def test_copies_and_the_other_mode(pipe, file, lora):
    pipe.load_ip_adapter(file)
    pipe.load_lora_weights(dict(lora), adapter_name="a")
    want = video(pipe)
    twin = copy.deepcopy(pipe)
    assert torch.equal(video(twin), want)
    twin.unload_lora_weights()
    twin.unload_ip_adapter()
    assert torch.equal(video(pipe), want)
    other = AnimateDiffPipeline.from_pipe(pipe, compat="diffusers")
    assert other.unet is not pipe.unet and not torch.equal(video(other), want)
    assert other.get_active_adapters() == ["a"] and len(ip_adapter.projections(other.unet)) == 1
    mine, theirs = pipe.unet.state_dict(keep_vars=True), other.unet.state_dict(keep_vars=True)
    assert mine.keys() == theirs.keys() and all(mine[n] is theirs[n] for n in mine)
    other.unload_ip_adapter()
    assert torch.equal(video(pipe), want)


def test_both_arguments_of_cross_attention(pipe, file, lora):
    pipe.load_ip_adapter(file)
    shown = video(pipe)
    pipe.load_lora_weights(dict(lora), adapter_name="a")
    masks = [torch.ones(1, 1, 16, 24)]
    off = video(pipe, cross_attention_kwargs={"scale": 0.0, "ip_adapter_masks": masks})
    torch.testing.assert_close(off, shown, rtol=0, atol=2e-4 * shown.abs().max().item())


def test_words_beside_pictures(pipe, file):
    pipe.load_ip_adapter(file)
    want = video(pipe)
    pipe.load_textual_inversion({"<toy>": torch.randn(2, 24, generator=torch.Generator().manual_seed(0))})
    assert torch.equal(video(pipe), want) and not torch.equal(video(pipe, prompt="a <toy>"), want)
    pipe.unload_ip_adapter()
    pipe.unload_textual_inversion()
    pipe.load_ip_adapter(file)
    assert torch.equal(video(pipe), want)


def test_saving_says_what_is_in_the_way(pipe, file, lora, tmp_path):
    pipe.load_ip_adapter(file)
    pipe.load_lora_weights(dict(lora), adapter_name="a")
    for undo in (pipe.unload_ip_adapter, pipe.unload_lora_weights):
        with pytest.raises(ValueError) as info:
            pipe.save_pretrained(tmp_path / "x")
        assert "\n" not in str(info.value) and not (tmp_path / "x").exists()
        undo()
    pipe.save_pretrained(tmp_path / "x")
