"""What is trained, and the files of LoRAs. Against diffusers with peft: parity/test_trained_lora.py."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from minit2v import (
    AnimateDiffPipeline,
    CLIPTextModel,
    DDIMScheduler,
    DiffusionPipeline,
    MotionAdapter,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetMotionModel,
)
from minit2v.adapters import lora
from minit2v.adapters.low_rank import TrainedBranch, has_branches, set_trained_branches, trained_branches_of
from minit2v.files.weights import Weightless
from minit2v.training import export
from minit2v.training.export import save_lora, save_model
from minit2v.training.objective import Objective, choose_frames, debiased
from minit2v.training.trainable import (
    WORDS,
    add_lora,
    add_motion_director,
    choose,
    lora_targets,
    names_in_files,
    without_time,
)
from minit2v_convert.configs import UNET_MOTION


def make(cls, small_configs, randomize_):
    if cls is UNetMotionModel:
        image = UNet2DConditionModel(**small_configs["UNet2DConditionModel"])
        return randomize_(cls.from_unet2d(image, MotionAdapter(**small_configs["MotionAdapter"]))).eval()
    return randomize_(cls(**small_configs[cls.__name__])).eval()


@pytest.fixture(scope="module")
def unet3d(small_configs, randomize_):
    return make(UNet3DConditionModel, small_configs, randomize_).double()


@pytest.fixture(scope="module")
def motion(small_configs, randomize_):
    return make(UNetMotionModel, small_configs, randomize_).double()


@pytest.fixture(scope="module")
def text(small_configs, randomize_):
    return make(CLIPTextModel, small_configs, randomize_)


@pytest.fixture(autouse=True)
def plain_afterwards(request):
    yield
    for name in ("unet3d", "motion", "text"):
        if name in request.fixturenames:
            network = request.getfixturevalue(name)
            for layer in list(network.modules()):
                set_trained_branches(layer, []) if trained_branches_of(layer) else None
            network.eval().requires_grad_(True)
            if name != "text":
                network.disable_gradient_checkpointing()


def inputs(unet, b=2, f=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(b, 4, f, 4, 6, generator=g, dtype=torch.float64)
    context = torch.randn(b, 5, unet.config.cross_attention_dim, generator=g, dtype=torch.float64)
    return x.to(dtype), torch.tensor([10, 700][:b]), context.to(dtype)


def draw_up(*handles, seed=0):
    """At first up is 0, and nothing but up has gradients: as after some steps."""
    g = torch.Generator().manual_seed(seed)
    for handle in handles:
        for branch in handle.layers.values():
            branch.up.data.copy_(torch.randn(branch.up.shape, generator=g) * 0.3)


# --------------------------------------------------------------------------------------------------- what is trained


def test_published_counts():
    """training.md 3.1: parameters at rank 16, in millions."""
    with torch.device("meta"), Weightless():
        unet, motion = UNet3DConditionModel(), UNetMotionModel(**UNET_MOTION)
    for network, word, count in ((unet, "spatial", 3.32), (unet, "temporal", 3.33), (unet, "both", 6.65),
                                 (unet, "linear", 13.98), (motion, "motion", 4.83), (motion, "spatial", 3.19)):
        handle = add_lora(network, word, 16)
        assert handle.count() / 1e6 == pytest.approx(count, abs=0.006), word
        handle.remove()
    for network, train, count in ((unet, "full", 1411.2), (unet, "temporal", 545.3), (motion, "motion", 453.2)):
        assert sum(p.numel() for _, p in choose(network, train)) / 1e6 == pytest.approx(count, abs=0.06)
    assert len(lora_targets(motion, "spatial")) == 128 and len(lora_targets(motion, "motion")) == 168


def test_words(unet3d, motion, text):
    def kinds(network, word):
        names = (re.sub(r"^((down|up)_blocks\.\d+|mid_block)\.", "", name) for name in lora_targets(network, word))
        return {re.sub(r"\.\d+(?=\.|$)", "", name) for name in names}

    assert kinds(unet3d, "spatial") == {f"attentions.transformer_blocks.attn{n}.to_{x}" for n in (1, 2)
                                        for x in ("q", "k", "v", "out")}  # fmt: skip
    assert all("temp_attentions" in n or "transformer_in" in n for n in lora_targets(unet3d, "temporal"))
    both = {*lora_targets(unet3d, "both")}
    assert both == {*lora_targets(unet3d, "spatial"), *lora_targets(unet3d, ["temporal"])}
    assert {*lora_targets(unet3d, ["spatial", "temporal"])} == both
    assert kinds(unet3d, "conv") - kinds(unet3d, "linear") == {
        "resnets.conv1", "resnets.conv2", "resnets.conv_shortcut", "temp_convs.conv1", "temp_convs.conv2",
        "temp_convs.conv3", "temp_convs.conv4"}  # fmt: skip
    assert lora_targets(motion, "temporal") == lora_targets(motion, "motion")
    # With a LoRA on these two diffusers' motion modules do not run.
    assert not any(re.search(r"motion_modules\.\d\.proj_", n) for n in lora_targets(motion, "linear"))
    assert any(re.search(r"\battentions\.\d\.proj_in", n) for n in lora_targets(motion, "linear"))
    assert any(re.search(r"motion_modules\.\d\.transformer_blocks\.0\.ff", n) for n in lora_targets(motion, "linear"))
    assert len(lora_targets(text, "text")) == 4 * 3 and len(lora_targets(text, "linear")) == 6 * 3
    assert {*lora_targets(unet3d, "temp_convs")} == {n for n in lora_targets(unet3d, "conv") if "temp_convs" in n}


def test_patterns_in_both_spellings(unet3d):
    ours = lora_targets(unet3d, "temporal.block.attn1")
    assert ours == lora_targets(unet3d, ["temp_attentions.*.attn1"])
    assert [*lora_targets(unet3d, "attentions")] == [n for n in lora_targets(unet3d, "linear") if ".attentions." in n]
    chosen = choose(unet3d, "patterns", ["attn*.to_q", "time_embedding.linear_1.bias"])
    assert {name.split(".")[-2] for name, _ in chosen} == {"to_q", "linear_1"}
    assert [p for _, p in chosen] == [p for p in unet3d.parameters() if p.requires_grad]
    assert {*names_in_files(unet3d).values()} == {*unet3d.diffusers_state_dict()}


@pytest.mark.parametrize("targets, message", [
    ("attn1.to_qq", "no layer or parameter 'attn1.to_qq' .nearest: 'attn1.to_q'."),
    ("tempral", "nearest: 'temporal'"),
    ("temp_attention", "nearest: 'temp_attentions'"),
    (["spatial", "atention"], "nearest: 'attentions'"),
    ("motion", "UNet3DConditionModel has no layers for a LoRA of 'motion'"),
    ("text", "no layers for a LoRA of 'text'"),
    ("*", "no layer or parameter '.'"),
    ("", "no layer or parameter ''"),
    ("norm1", "no layer or parameter 'norm1'"),
    ([], "a LoRA needs targets"),
])  # fmt: skip
def test_targets_that_match_nothing(unet3d, targets, message):
    with pytest.raises(ValueError, match=message):
        add_lora(unet3d, targets)
    assert not has_branches(unet3d) and all(p.requires_grad for p in unet3d.parameters())


@pytest.mark.parametrize("options, message", [
    ({"rank": 33}, "rank 33 is larger than the layer '.*temp_attentions.*', whose rank is at most 32"),
    ({"rank": 0}, "rank must be a whole number"),
    ({"rank": 2.0}, "rank must be a whole number"),
    ({"alpha": 0}, "alpha must be a number above 0"),
    ({"dropout": 1}, "dropout must be a share"),
])  # fmt: skip
def test_ranks_that_are_none(unet3d, options, message):
    with pytest.raises(ValueError, match=message):
        add_lora(unet3d, "temporal", **options)
    assert not has_branches(unet3d)


def test_choosing_what_is_not_there(unet3d):
    for train, targets, message in (
        ("motoin", (), "train must be one of .*nearest: 'motion'"),
        ("motion", (), "UNet3DConditionModel has no such parameters"),
        ("patterns", "conv_inn", "nearest: 'conv_in'"),
        ("patterns", (), "give patterns of names"),
    ):
        with pytest.raises(ValueError, match=message):
            choose(unet3d, train, targets)


# --------------------------------------------------------------------------------------------------------- gradients


def gradients(unet, checkpointing):
    unet.zero_grad(set_to_none=True)
    x, t, context = inputs(unet)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    else:
        unet.disable_gradient_checkpointing()
    loss = unet(x, t, context).square().mean()
    loss.backward()
    unet.disable_gradient_checkpointing()
    found = {name: None if p.grad is None else p.grad.clone() for name, p in unet.named_parameters()}
    unet.zero_grad(set_to_none=True)
    return found


def check_gradients(unet, trained):
    """None missing, none on what is frozen, the same with gradient checkpointing."""
    plain, again = (gradients(unet, checkpointing) for checkpointing in (False, True))
    trained = {id(p) for p in trained}
    for name, p in unet.named_parameters():
        if id(p) in trained:
            assert plain[name] is not None and plain[name].abs().max() > 0, name
            assert torch.allclose(plain[name], again[name], rtol=1e-12, atol=1e-12 * plain[name].abs().max()), name
        else:
            assert plain[name] is None and again[name] is None, name


@pytest.mark.parametrize("train", ["full", "temporal", "spatial", "attention", "motion", "patterns"])
def test_gradients_of_chosen_parameters(train, unet3d, motion):
    unet = motion if train in ("motion", "spatial") else unet3d
    chosen = choose(unet, train, "conv_in" if train == "patterns" else ())
    check_gradients(unet, [p for _, p in chosen])
    assert dict(chosen).keys() <= unet.diffusers_state_dict().keys()


@pytest.mark.parametrize("word", [w for w in WORDS if w != "text"])
def test_gradients_of_a_lora(word, unet3d, motion):
    unet = motion if word in ("motion", "spatial") else unet3d
    before = unet.requires_grad_(False)(*inputs(unet))  # frozen as it will be: PyTorch's matmul looks at that, too
    handle = add_lora(unet.train(), word, 2, alpha=3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unet(*inputs(unet)), before)  # at step 0 nothing has changed
    draw_up(handle)
    assert not torch.allclose(unet(*inputs(unet)), before)
    check_gradients(unet, handle.parameters())
    handle.remove()
    assert torch.equal(unet.eval()(*inputs(unet)), before) and not has_branches(unet)


def test_a_lora_of_the_text_encoder(text):
    ids = torch.randint(0, 500, (2, 7), generator=torch.Generator().manual_seed(0))
    before = text.requires_grad_(False)(ids)
    handle = add_lora(text, "linear", 2)
    assert torch.equal(text(ids), before)
    draw_up(handle)
    text(ids).square().mean().backward()
    assert all(p.grad is not None for p in handle.parameters())
    assert [n for n, p in text.named_parameters() if p.requires_grad and ".branches." not in n] == []
    handle.remove()


def test_what_a_lora_adds(unet3d):
    """W x + alpha / rank * up(down(x)), of a linear layer and of both convolutions."""
    handle = add_lora(unet3d, "conv", 3, alpha=6)
    draw_up(handle)
    g = torch.Generator().manual_seed(1)
    seen = set()
    for path, branch in handle.layers.items():
        layer = unet3d.get_submodule(path)
        kind = next(k for k in (nn.Linear, nn.Conv2d, nn.Conv3d) if isinstance(layer, k))
        seen.add(kind)
        x = torch.randn(2, layer.weight.shape[1], *[4] * (layer.weight.ndim - 2), generator=g, dtype=torch.float64)
        weight = layer.weight + 2 * (branch.up @ branch.down.flatten(1)).reshape(layer.weight.shape)
        if kind is nn.Linear:
            want = nn.functional.linear(x, weight, layer.bias)
        else:
            convolve = nn.functional.conv2d if kind is nn.Conv2d else nn.functional.conv3d
            want = convolve(x, weight, layer.bias, layer.stride, layer.padding)
        assert torch.allclose(layer(x), want, atol=1e-12), path
    assert seen == {nn.Linear, nn.Conv2d, nn.Conv3d}
    handle.remove()


def test_initial_values():
    layer = nn.Linear(400, 300)
    network = nn.Module()
    network.add_module("layer", layer)
    from minit2v.training.trainable import _first_factors

    down, up = _first_factors(layer.weight, 100, torch.Generator().manual_seed(0))
    assert not up.any() and down.abs().max() <= 400**-0.5 and abs(down.std() - 400**-0.5 / 3**0.5) < 1e-3
    again, _ = _first_factors(layer.weight, 100, torch.Generator().manual_seed(0))
    assert torch.equal(down, again)


def test_dropout_is_on_in_training_alone(unet3d):
    handle = add_lora(unet3d, "spatial", 2, dropout=0.5)
    draw_up(handle)
    a, b = (unet3d(*inputs(unet3d)) for _ in range(2))
    assert torch.equal(a, b)
    unet3d.train()
    a, b = (unet3d(*inputs(unet3d)) for _ in range(2))
    assert not torch.equal(a, b)
    unet3d.eval()
    handle.remove()


def test_factors_stay_wide_beside_narrow_weights(small_configs, randomize_):
    """In bfloat16 a step of 1e-4 of a weight of 1 would be lost."""
    unet = make(UNet3DConditionModel, small_configs, randomize_).bfloat16()
    handle = add_lora(unet, "conv", 2, generator=torch.Generator().manual_seed(0))
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    draw_up(handle)
    x, t, context = inputs(unet, dtype=torch.bfloat16)
    before = [p.detach().clone() for p in handle.parameters()]
    y = unet(x, t, context)
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16 and {p.grad.dtype for p in handle.parameters()} == {torch.float32}
    torch.optim.SGD(handle.parameters(), 1e-6).step()
    moved = [(p - b).abs().max() for p, b in zip(handle.parameters(), before, strict=True)]
    assert 0 < max(moved) < 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(unet(x, t, context).float(), y.float(), atol=0.2)
    handle.remove()


# ---------------------------------------------------------------------------------------------------- MotionDirector


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["unet3d", "motion"])
def test_motion_directors_paths(request, family, checkpointing):
    """L_t trains T alone, L_s trains S alone; in the spatial path nothing mixes frames."""
    unet = request.getfixturevalue(family)
    (unet.enable_gradient_checkpointing if checkpointing else unet.disable_gradient_checkpointing)()
    spatial, temporal = add_motion_director(unet, 2, dropout=0)
    draw_up(spatial, temporal)
    objective, (x, _, context) = Objective(DDIMScheduler()), inputs(unet)
    noisy, t, target, _ = objective.noised(x, 0, [0, 1])
    chosen, rows = choose_frames(0, "frame", [0, 1], 3), torch.arange(2)

    spatial.use(True, trained=True)
    temporal.use(on=False)
    with without_time(unet):
        prediction = unet(noisy[rows, :, chosen][:, :, None], t, context)
        objective.loss(prediction, target[rows, :, chosen][:, :, None], t).mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in spatial.parameters())
    assert all(p.grad is None for p in temporal.parameters())
    unet.zero_grad(set_to_none=True)

    spatial.use(True, trained=False)
    temporal.use(True, trained=True)
    anchor = choose_frames(0, "anchor", [0, 1], 3)
    objective.motion_loss(unet(noisy, t, context), target, t, anchor).mean().backward()
    assert all(p.grad is None for p in spatial.parameters())
    assert all(p.grad is not None and p.grad.any() for p in temporal.parameters())
    assert all(p.grad is None for n, p in unet.named_parameters() if ".branches." not in n)

    temporal.use(on=False)  # off is as if it were not there
    alone = unet(noisy, t, context).detach()
    temporal.remove()
    assert torch.equal(unet(noisy, t, context), alone)
    spatial.remove()
    unet.disable_gradient_checkpointing()


def test_switching_between_forward_and_backward_is_noticed(unet3d):
    """Gradient checkpointing runs the layers again, and would give the gradient of another network."""
    handle = add_lora(unet3d, "both", 2)
    draw_up(handle)
    unet3d.enable_gradient_checkpointing()
    loss = unet3d(*inputs(unet3d)).square().mean()
    handle.use(on=False)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()
    unet3d.disable_gradient_checkpointing()
    handle.remove()


def test_without_time_each_frame_is_by_itself(unet3d, motion):
    for unet in (unet3d, motion):
        x, t, context = inputs(unet)
        with_time = unet(x, t, context).detach()
        with without_time(unet):
            whole = unet(x, t, context).detach()
            frames = [unet(x[:, :, [k]], t, context).detach() for k in range(3)]
        assert torch.allclose(whole, torch.cat(frames, 2), atol=1e-12)
        assert torch.equal(unet(x, t, context), with_time) and not torch.allclose(whole, with_time, atol=1e-3)


def test_the_debiased_loss_in_the_optimizer(unet3d):
    """With one frame, or frames that are alike, L_ad is a small part of L_org."""
    x = inputs(unet3d)[0][:, :, :1].expand(-1, -1, 3, -1, -1)
    anchor = torch.tensor([0, 2])
    assert torch.allclose(debiased(x, anchor).square().mean() / x.square().mean(),
                          torch.tensor((2**0.5 - 1) ** 2, dtype=torch.float64))  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- files


CALL = dict(num_frames=3, num_inference_steps=1, height=16, width=16, guidance_scale=4.0, output_type="pt")


def frames(pipe):
    return torch.as_tensor(pipe("a cat", generator=torch.Generator().manual_seed(0), **CALL).frames)


@pytest.fixture(scope="module")
def folders(trained_folders):
    return trained_folders


def open_pipe(folders, family):
    if family == "t2v":
        pipe = TextToVideoSDPipeline.from_pretrained(folders["t2v"])
    else:
        adapter = MotionAdapter.from_pretrained(folders["v2"])
        pipe = AnimateDiffPipeline.from_pretrained(folders["sd15"], motion_adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    return pipe


SAVED = {
    "diffusers": ("t2v", "conv", True),
    "diffusers, AnimateDiff": ("motion", "linear", True),
    "kohya": ("motion", "spatial", True),
    "kohya, ModelScope": ("t2v", "conv", False),
    "guoyww": ("motion", "motion", False),
}


@pytest.mark.parametrize("case", SAVED)
def test_a_saved_lora_makes_the_frames_of_its_training(case, folders, tmp_path):
    family, targets, with_text = SAVED[case]
    pipe = open_pipe(folders, family)
    before = frames(pipe)
    handles = [add_lora(pipe.unet, targets, 3, alpha=4.5)]
    handles += [add_lora(pipe.text_encoder, "linear", 2, alpha=1)] if with_text else []
    draw_up(*handles)
    want = frames(pipe)
    assert not torch.allclose(want, before, atol=1e-3)
    path = save_lora(tmp_path, handles, case.split(",")[0], {"trained_words": "a cat"})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing but the file
    for handle in handles:
        handle.remove()
    assert torch.equal(frames(pipe), before)
    pipe.load_lora_weights(tmp_path)
    assert torch.allclose(frames(pipe), want, atol=1e-5)
    with safe_open(path, "pt") as file:
        assert file.metadata()["trained_words"] == "a cat" and file.metadata()["format"] == "pt"


def test_headers(folders, tmp_path):
    pipe = open_pipe(folders, "motion")
    unet, text = add_lora(pipe.unet, "spatial", 3, alpha=6), add_lora(pipe.text_encoder, "text", 2)
    with safe_open(save_lora(tmp_path, [unet, text]), "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
        assert (said["unet.r"], said["unet.lora_alpha"]) == (3, 6)
        assert (said["text_encoder.r"], said["text_encoder.lora_alpha"]) == (2, 2)
        assert len(said["unet.target_modules"]) == len(unet.layers)
        assert all(name.startswith(("unet.", "text_encoder.text_model.encoder.layers.")) for name in file.keys())
    with safe_open(save_lora(tmp_path / "k.safetensors", [unet], "kohya"), "pt") as file:
        said = file.metadata()
        assert (said["ss_network_dim"], said["ss_network_alpha"], said["ss_network_module"]) == (
            "3", "6.0", "networks.lora")  # fmt: skip
        assert len(said["sshs_model_hash"]) == 64 and "ss_base_model_version" not in said  # its texts are 24 wide
        name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.alpha"
        assert file.get_tensor(name).shape == () and float(file.get_tensor(name)) == 6
        body = (tmp_path / "k.safetensors").read_bytes()
    start = 8 + int.from_bytes(body[:8], "little")
    import hashlib

    assert hashlib.sha256(body[start:]).hexdigest() == said["sshs_model_hash"]


def test_guoywws_arithmetic(folders, tmp_path):
    """As ComfyUI-AnimateDiff-Evolved reads it: names with "temporal", matrices, up @ down, no alpha."""
    pipe = open_pipe(folders, "motion")
    handle = add_lora(pipe.unet, "motion", 3, alpha=1.5)
    draw_up(handle)
    x, t, context = inputs(pipe.unet, dtype=torch.float32)
    with torch.no_grad():
        want = pipe.unet(x, t, context)
    state = torch.load(save_lora(tmp_path / "m.ckpt", [handle], "guoyww"), weights_only=True)
    assert load_file(save_lora(tmp_path, [handle], "guoyww")).keys() == state.keys()
    handle.remove()
    weights = pipe.unet.diffusers_state_dict()
    assert len(state) == 2 * len(lora_targets(pipe.unet, "motion"))
    with torch.no_grad():
        for name, up in state.items():
            assert "temporal" in name and up.ndim == 2 and "alpha" not in name
            if ".up." not in name:
                continue
            layer = re.sub(r"attention_blocks\.(\d)\.processor\.to_(\w+)_lora\.up",
                           lambda m: f"attn{int(m[1]) + 1}.to_{m[2] + '.0' * (m[2] == 'out')}", name)
            layer = layer.replace("temporal_transformer.", "")
            weights[layer] += torch.mm(up, state[name.replace(".up.", ".down.")])  # of the network itself
        assert torch.allclose(pipe.unet(x, t, context), want, atol=1e-5)


def test_what_has_no_place(folders, tmp_path):
    pipe = open_pipe(folders, "motion")
    motion, both = add_lora(pipe.unet, "motion", 2), add_lora(pipe.unet, "both", 2)
    for loras, format, message in (
        ([motion], "kohya", "kohya's files have no place for motion modules"),
        ([both], "guoyww", "guoyww's files have no place for 'down_blocks"),
        ([motion, both], "diffusers", "two LoRAs change"),
        ([], "diffusers", "there is no LoRA"),
        ([motion], "kohja", "nearest: 'kohya'"),
    ):
        with pytest.raises(ValueError, match=message):
            save_lora(tmp_path, loras, format)
    with pytest.raises(ValueError, match="a file of .safetensors"):
        save_lora(tmp_path / "a.bin", [motion])
    with pytest.raises(ValueError, match="metadata are texts"):
        save_lora(tmp_path, [motion], metadata={"steps": 100})
    motion.layers[next(iter(motion.layers))].up.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        save_lora(tmp_path, [motion])
    assert not [*tmp_path.iterdir()]


def test_a_file_appears_whole_or_not_at_all(folders, tmp_path, monkeypatch):
    pipe = open_pipe(folders, "t2v")
    handle = add_lora(pipe.unet, "spatial", 2)
    path = save_lora(tmp_path, [handle])
    before = path.read_bytes()
    draw_up(handle)

    def half(state, file, metadata):
        file.write_bytes(before[:100])
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(OSError, match="no space left"):
        save_lora(tmp_path, [handle])
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before
    monkeypatch.undo()
    save_lora(tmp_path, [handle])
    assert path.read_bytes() != before


def test_states(folders, tmp_path):
    """Checkpoints, and moving averages in the place of what is trained."""
    pipe = open_pipe(folders, "t2v")
    handle = add_lora(pipe.unet, "conv", 2, generator=torch.Generator().manual_seed(0))
    draw_up(handle)
    average = {name: x * 0.5 for name, x in handle.state().items()}
    assert load_file(save_lora(tmp_path, [handle], states=[average])).keys() == {f"unet.{n}" for n in average}
    assert all(torch.equal(x, average[n.removeprefix("unet.")]) for n, x in load_file(
        tmp_path / "pytorch_lora_weights.safetensors").items())  # fmt: skip
    assert {x.dtype for x in load_file(save_lora(tmp_path, [handle], dtype=torch.float16)).values()} == {torch.float16}
    before = handle.parameters()
    handle.load(average)
    assert all(torch.equal(x, average[n]) for n, x in handle.state().items())
    assert all(a is b for a, b in zip(before, handle.parameters(), strict=True))  # the optimizer's are the same
    shapes = {n: x.shape for n, x in handle.state().items()}
    assert shapes["down_blocks.0.temp_convs.0.conv1.2.lora_B.weight"] == (32, 2, 1, 1, 1)
    for change, message in (
        (lambda s: s.pop(next(iter(s))), "is missing"),
        (lambda s: s.update({"mid_block.x": torch.zeros(1)}), "'mid_block.x' has no place here"),
        (lambda s: s.update({next(iter(s)): torch.zeros(1)}), r"is \(1,\), not \(2, "),
    ):
        wrong = dict(average)
        change(wrong)
        with pytest.raises(ValueError, match=message):
            handle.load(wrong)


def test_beside_loras_that_are_loaded(folders, tmp_path):
    """One trained LoRA may stand beside a loaded one: the calls about the loaded one leave it alone."""
    pipe = open_pipe(folders, "motion")
    domain = add_lora(pipe.unet, "spatial", 2)
    draw_up(domain)
    save_lora(tmp_path, [domain])
    domain.remove()
    before = frames(pipe)
    handle = add_lora(pipe.unet, "both", 2)
    draw_up(handle, seed=1)
    trained = frames(pipe)
    pipe.load_lora_weights(tmp_path, adapter_name="domain")
    both = frames(pipe)
    assert not torch.allclose(both, trained, atol=1e-3)
    pipe.set_adapters("domain", 0.0)
    assert torch.allclose(frames(pipe), trained, atol=1e-5)
    with lora.scaled(pipe.unet, 0.5):
        assert len(handle.layers) == sum(isinstance(m, TrainedBranch) for m in pipe.unet.modules())
    pipe.unload_lora_weights()
    assert torch.allclose(frames(pipe), trained, atol=1e-5) and not torch.allclose(trained, before, atol=1e-3)
    handle.remove()
    assert torch.equal(frames(pipe), before) and not has_branches(pipe.unet)


@pytest.mark.parametrize("family", ["t2v", "motion"])
def test_whole_models(folders, tmp_path, family):
    pipe = open_pipe(folders, family)
    (_, parameter), *_ = choose(pipe.unet, "temporal")
    parameter.data += 1
    with torch.no_grad():
        want = pipe.unet(*inputs(pipe.unet, dtype=torch.float32))
    objective = Objective(pipe.scheduler, objective="v", zero_snr=True)
    save_model(tmp_path / "whole", pipe, objective)
    again = DiffusionPipeline.from_pretrained(tmp_path / "whole")
    assert again.scheduler.config.prediction_type == "v_prediction" and again.scheduler.config.rescale_betas_zero_snr
    assert pipe.scheduler.config.prediction_type == "epsilon"  # it stays as it was
    with torch.no_grad():
        assert torch.allclose(again.unet(*inputs(again.unet, dtype=torch.float32)), want, atol=1e-6)
    if family == "t2v":
        with pytest.raises(ValueError, match="has no motion modules"):
            export.save_model(tmp_path / "motion", pipe, motion=True)
        return
    save_model(tmp_path / "motion", pipe, motion=True)
    adapter = MotionAdapter.from_pretrained(tmp_path / "motion")
    fresh = AnimateDiffPipeline.from_pretrained(folders["sd15"], motion_adapter=adapter)
    with torch.no_grad():
        assert torch.allclose(fresh.unet(*inputs(fresh.unet, dtype=torch.float32)), want, atol=1e-6)
