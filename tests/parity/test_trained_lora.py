"""Training against diffusers and peft, every number random: the objective, a step, and the files of both.

Layers agree to 1e-5, frames to 1e-4.
"""

import json

import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers.training_utils import compute_snr
from safetensors import safe_open

from minit2v import AnimateDiffPipeline, DDIMScheduler, MotionAdapter, TextToVideoSDPipeline
from minit2v.training.export import save_lora
from minit2v.training.objective import Objective
from minit2v.training.trainable import add_lora

CALL = dict(num_frames=2, num_inference_steps=2, height=16, width=24, guidance_scale=4.0, output_type="np")
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.fixture(scope="module")
def folders(trained_folders):
    return trained_folders


def open_both(folders, family):
    """Ours and theirs, from the same folders."""
    if family == "t2v":
        pipes = (TextToVideoSDPipeline.from_pretrained(folders["t2v"], compat="diffusers"),
                 diffusers.TextToVideoSDPipeline.from_pretrained(folders["t2v"], torch_dtype=torch.float32))
    else:
        ours = AnimateDiffPipeline.from_pretrained(
            folders["sd15"], motion_adapter=MotionAdapter.from_pretrained(folders["v2"]), compat="diffusers")
        theirs = diffusers.AnimateDiffPipeline.from_pretrained(
            folders["sd15"], motion_adapter=diffusers.MotionAdapter.from_pretrained(folders["v2"]),
            feature_extractor=None)  # fmt: skip
        pipes = ours, theirs
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


def frames(pipe):
    return np.asarray(pipe("a cat", negative_prompt="a dog", generator=torch.Generator().manual_seed(0), **CALL).frames)


def inputs(width, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 3, 8, 8, generator=g), torch.randn(2, 5, width, generator=g)
    return x.to(dtype), torch.tensor([10, 700]), context.to(dtype)


def train(pipe, handles, steps=3):
    """Some steps, large ones: up is no longer 0."""
    objective, (x, _, context) = Objective(pipe.scheduler), inputs(pipe.unet.config.cross_attention_dim)
    optimizer = torch.optim.AdamW([p for handle in handles for p in handle.parameters()], 0.02)
    ids = pipe.tokenizer(["a cat", "a dog"])
    for step in range(steps):
        noisy, t, target, _ = objective.noised(x, 0, [2 * step, 2 * step + 1])
        text = pipe.text_encoder(ids) if len(handles) > 1 else context
        objective.loss(pipe.unet(noisy, t, text), target, t).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def check_layers(handle, theirs):
    """Each layer with its factors, on the same input: 1e-5 of what it gives."""
    g, network = torch.Generator().manual_seed(0), handle.network
    layers = dict(theirs.named_modules())
    names = [n.removesuffix(".lora_A.weight") for n in handle.state() if n.endswith(".lora_A.weight")]
    assert len(names) == len(handle.layers)
    for name, path in zip(names, handle.layers, strict=True):
        layer = layers.get(name) or layers[name.removeprefix("text_model.")]
        ours = network.get_submodule(path)
        shape = layer.base_layer.weight.shape
        x = torch.randn(2, shape[1], *[6] * (len(shape) - 2), generator=g)
        with torch.no_grad():
            want = layer(x)
            got = ours(x.reshape(2, -1, *x.shape[2:]) if ours.weight.ndim == x.ndim else x.flatten(2).mT)
            got = got if ours.weight.ndim == x.ndim else got.mT.reshape(want.shape)
            bare = layer.base_layer(x)
        assert (got - want).abs().max() < 1e-5 * want.abs().max(), name
        assert (want - bare).abs().max() > 1e-3 * want.abs().max(), name  # the LoRA does something here


# ------------------------------------------------------------------------------------------------------- objective


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_velocity_and_weights(betas, zero_snr):
    theirs = diffusers.DDPMScheduler(**BETAS | {"beta_schedule": betas}, rescale_betas_zero_snr=zero_snr)
    x, *_ = inputs(8)
    # Their tables are float32, and where almost nothing is left of the signal that shows.
    close = dict(atol=1e-5 if zero_snr and betas == "squaredcos_cap_v2" else 1e-6)
    for name in ("epsilon", "v", "x0"):
        if name == "epsilon" and zero_snr:
            continue
        objective = Objective(DDIMScheduler(**BETAS), objective=name, betas=betas, zero_snr=zero_snr, min_snr=5)
        noisy, t, found, eps = objective.noised(x, 0, [0, 1])
        assert torch.allclose(noisy, theirs.add_noise(x, eps, t), **close)
        target = {"epsilon": eps, "v": theirs.get_velocity(x, eps, t), "x0": x}[name]
        assert torch.allclose(found, target, **close)
        every = torch.arange(999)
        snr = compute_snr(theirs, every)
        weights = torch.stack([snr, 5 * torch.ones_like(snr)], 1).min(1)[0]
        weights = {"epsilon": weights / snr, "v": weights / (snr + 1), "x0": weights}[name]  # as in their scripts
        assert torch.allclose(objective.weights[every].float(), weights, rtol=2e-5, **close)


def test_a_step_is_theirs(folders):
    """Loss and gradients of the same LoRA by peft, in float64."""
    ours, theirs = open_both(folders, "t2v")
    unet, peer = ours.unet.double(), theirs.unet.double().eval()
    handle = add_lora(unet, "conv", 3, alpha=6, generator=torch.Generator().manual_seed(0))
    for branch in handle.layers.values():
        branch.up.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    names = [n.removesuffix(".lora_A.weight") for n in handle.state() if n.endswith("lora_A.weight")]
    peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=6, target_modules=names), peer)
    peft.set_peft_model_state_dict(peer, {n: x.clone() for n, x in handle.state().items()})
    x, t, context = inputs(24, torch.float64)
    losses = []
    for out in (unet(x, t, context), peer(x, t, context).sample):
        losses.append((out - x).square().mean())
        losses[-1].backward()
    assert torch.allclose(*losses, rtol=1e-10, atol=0)
    gradients = {n.replace(".default", ""): p.grad for n, p in peer.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for branch in handle.layers.values():
            branch.down.copy_(branch.down.grad)
            branch.up.copy_(branch.up.grad)
    found = handle.state()
    assert found.keys() == gradients.keys()
    for name, x in found.items():
        assert torch.allclose(x, gradients[name], rtol=1e-10, atol=1e-10 * gradients[name].abs().max().item()), name


# -------------------------------------------------------------------------------------------- ours, loaded by theirs


def test_unet3d_by_peft(folders, tmp_path):
    """diffusers' UNet3DConditionModel has no loader: these are the lines of docs/training.md."""
    ours, theirs = open_both(folders, "t2v")
    handle = add_lora(ours.unet, "conv", 4, alpha=2)
    before = frames(ours)
    train(ours, [handle])
    file = save_lora(tmp_path, [handle])
    with safe_open(file, "pt") as f:
        said = json.loads(f.metadata()["lora_adapter_metadata"])
        state = {n.removeprefix("unet."): f.get_tensor(n) for n in f.keys()}
    config = peft.LoraConfig(**{n.removeprefix("unet."): value for n, value in said.items()})
    peft.inject_adapter_in_model(config, theirs.unet)
    result = peft.set_peft_model_state_dict(theirs.unet, state)
    assert not result.unexpected_keys
    theirs.unet.eval()

    check_layers(handle, theirs.unet)
    got, want = frames(theirs), frames(ours)
    assert np.abs(got - want).max() < 1e-4 and np.abs(want - before).max() > 1e-2


@pytest.mark.parametrize("targets", ["motion", "linear"])
def test_motion_unet_by_diffusers(folders, tmp_path, targets):
    ours, theirs = open_both(folders, "motion")
    handle = add_lora(ours.unet, targets, 4, alpha=2)
    before = frames(ours)
    train(ours, [handle])
    file = save_lora(tmp_path, [handle])
    theirs.unet.load_lora_adapter(tmp_path, weight_name=file.name, prefix="unet")  # with the name it reads the header
    check_layers(handle, theirs.unet)
    got, want = frames(theirs), frames(ours)
    assert np.abs(got - want).max() < 1e-4 and np.abs(want - before).max() > 1e-2


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_unet_and_text_encoder_by_diffusers(folders, tmp_path, format):
    ours, theirs = open_both(folders, "motion")
    handles = [add_lora(ours.unet, "spatial", 4, alpha=2), add_lora(ours.text_encoder, "linear", 2, alpha=1)]
    before = frames(ours)
    train(ours, handles)
    theirs.load_lora_weights(str(save_lora(tmp_path, handles, format)))
    check_layers(handles[0], theirs.unet)
    check_layers(handles[1], theirs.text_encoder)
    got, want = frames(theirs), frames(ours)
    assert np.abs(got - want).max() < 1e-4 and np.abs(want - before).max() > 1e-2


# -------------------------------------------------------------------------------------------- theirs, loaded by ours


@pytest.mark.parametrize("family", ["t2v", "motion"])
def test_trained_by_peft(folders, tmp_path, family):
    ours, theirs = open_both(folders, family)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_v", "to_out.0"])
    theirs.unet.requires_grad_(False)
    peft.inject_adapter_in_model(config, theirs.unet)
    x, t, context = inputs(24)
    context = context.repeat_interleave(3, 0) if family == "motion" else context  # theirs wants one for each frame
    trained = [p for p in theirs.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 0.02)
    before = frames(ours)
    for _ in range(3):
        (theirs.unet(x, t, context).sample - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.unet.eval()
    diffusers.AnimateDiffPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=peft.get_peft_model_state_dict(theirs.unet),
        unet_lora_adapter_metadata=config.to_dict() | {"target_modules": [*config.target_modules]},
    )  # fmt: skip
    ours.load_lora_weights(tmp_path)
    got, want = frames(ours), frames(theirs)
    assert np.abs(got - want).max() < 1e-4 and np.abs(want - before).max() > 1e-2
