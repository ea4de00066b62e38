"""LoRA against diffusers with peft, every number random: layers agree to 1e-5, frames to 1e-4.

Where the reference does not read a form, or gets it wrong, its own networks with the change put into their weights by
the formula are what is compared with.
"""

import json
import re

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from minit2v import AnimateDiffPipeline, DDIMScheduler, MotionAdapter

# One step from pure noise gives the network's prediction itself, decoded.
SCHEDULE = dict(timestep_spacing="trailing", prediction_type="v_prediction", clip_sample=False)
CALL = dict(num_frames=2, num_inference_steps=1, height=16, width=24, guidance_scale=4.0, output_type="np")
IMAGE = r"^(?!.*motion_modules).*"
ATTENTION = r"attn\d\.to_(q|k|v|out\.0)$|self_attn\.(q|k|v|out)_proj$"
LINEAR = ATTENTION + r"|ff\.net\.(0\.proj|2)$|attentions\.\d\.proj_(in|out)$|mlp\.fc[12]$"
LOCON = LINEAR + r"|\.conv\d?$|time_emb_proj$|conv_shortcut$"
MOTION = r"motion_modules\..*" + ATTENTION


@pytest.fixture(scope="module")
def pipes(tmp_path_factory, make_official_folder, make_adapter_folder):
    """Ours and theirs, from the same folders."""
    folder = tmp_path_factory.mktemp("pipes")
    base = make_official_folder(folder / "sd15", repo="sd15", small=True)
    adapter = make_adapter_folder(folder, "v1-5-2")
    ours = AnimateDiffPipeline.from_pretrained(
        base, motion_adapter=MotionAdapter.from_pretrained(adapter), compat="diffusers"
    )
    theirs = diffusers.AnimateDiffPipeline.from_pretrained(
        base, motion_adapter=diffusers.MotionAdapter.from_pretrained(adapter), feature_extractor=None
    )
    ours.scheduler, theirs.scheduler = DDIMScheduler(**SCHEDULE), diffusers.DDIMScheduler(**SCHEDULE)
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    return ours, theirs


@pytest.fixture(scope="module")
def plain(pipes):
    """The frames without a LoRA."""
    return frames(pipes[0])


@pytest.fixture(autouse=True)
def clean(pipes):
    yield
    for pipe in pipes:
        pipe.unload_lora_weights()
    pipes[1]._lora_scale = 1.0  # theirs gives a call's scale to what is loaded later


@pytest.fixture(scope="module")
def weights(pipes):
    """component -> layer -> shape of its weight, in their names; the encoder's with `text_model.`, as in files."""
    theirs = pipes[1]
    found = {c: {n.removesuffix(".weight"): tuple(x.shape) for n, x in getattr(theirs, c).state_dict().items()
                 if n.endswith(".weight") and x.ndim > 1 and "embedding" not in n} for c in ("unet", "text_encoder")}
    found["text_encoder"] = {f"text_model.{n.removeprefix('text_model.')}": s for n, s in found["text_encoder"].items()}
    return found


@pytest.fixture(scope="module")
def draw(weights):
    """draw(which layers, rank, alpha) -> {(component, layer): (down, up, alpha)}; rank, alpha: numbers or functions."""

    def make(only=ATTENTION, rank=3, alpha=None, seed=0, components=("unet", "text_encoder")):
        g = torch.Generator().manual_seed(seed)
        found = {}
        for c in components:
            for n, (layer, (o, i, *k)) in enumerate(weights[c].items()):
                if re.search(only, layer):
                    r = rank(n, k) if callable(rank) else rank
                    a = alpha(n, k) if callable(alpha) else alpha
                    down = torch.randn(r, i, *k, generator=g) * i**-0.5
                    up = torch.randn(o, r, *[1] * len(k), generator=g) * 0.3
                    found[c, layer] = down, up, r if a is None else a
        return found

    return make


def frames(pipe, **arguments):
    generator = torch.Generator().manual_seed(0)
    return pipe("a red circle", negative_prompt="blue", generator=generator, **CALL, **arguments).frames


def close(a, b, tolerance=1e-4):
    return np.abs(np.asarray(a) - np.asarray(b)).max() < tolerance


# ---------------------------------------------------------------------------------------------------------------- forms


def kohya(lora, alpha=True):
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    state = {}
    for (c, layer), (down, up, a) in lora.items():
        stem = prefix[c] + layer.replace(".", "_")
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        if alpha:
            state[f"{stem}.alpha"] = torch.tensor(float(a))
    return state


def peft(lora):
    return {f"{c}.{layer}.lora_{x}.weight": t for (c, layer), (down, up, _) in lora.items()
            for x, t in (("A", down), ("B", up))}


def old(lora):
    middle = {"unet": "lora", "text_encoder": "lora_linear_layer"}
    return {f"{c}.{layer}.{middle[c]}.{x}.weight": t for (c, layer), (down, up, _) in lora.items()
            for x, t in (("down", down), ("up", up))}


def processors(lora):
    state = {}
    for (c, layer), (down, up, _) in lora.items():
        block, leaf = re.fullmatch(r"(.*)\.(to_[qkv]|to_out\.0|[qkv]_proj|out_proj)", layer).groups()
        leaf = {"to_out.0": "to_out", "out_proj": "to_out"}.get(leaf, f"to_{leaf[0]}" if "proj" in leaf else leaf)
        stem = f"{c}.{block}.{'processor.' * (c == 'unet')}{leaf}_lora"
        state |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    return state


def ranks(n, k):
    return 2 + n % 3


def conv_ranks(n, k):
    return 2 if k[-1:] == [3] else 4


FORMS = {
    "kohya": (kohya, dict(only=f"{IMAGE}({LINEAR})", alpha=2)),
    "kohya, ranks": (kohya, dict(only=f"{IMAGE}({LINEAR})", rank=ranks, alpha=2)),
    "kohya, LoCon": (kohya, dict(only=f"{IMAGE}({LOCON})", rank=conv_ranks, alpha=4)),
    "kohya without alpha": (lambda lora: kohya(lora, alpha=False), dict(only=f"{IMAGE}({LINEAR})")),
    "peft": (peft, dict(only=LOCON)),
    "peft, ranks": (peft, dict(rank=ranks)),
    "0.2x": (old, {}),
    "processors": (processors, {}),
    "motion LoRA of the hub": (processors, dict(only=MOTION, components=("unet",), rank=4)),
}


def their_layer(pipe, component, layer):
    layer = layer if component == "unet" else layer.removeprefix("text_model.")
    network = getattr(pipe, component)
    try:
        return network.get_submodule(layer)
    except AttributeError:
        return network.get_submodule(f"text_model.{layer}")


def our_layer(pipe, component, layer):
    from minit2v.adapters.lora import layers_of

    network = getattr(pipe, component)
    return network.get_submodule(layers_of(network)[layer][0])


@pytest.mark.parametrize("form", FORMS)
def test_forms(pipes, draw, plain, form, tmp_path):
    ours, theirs = pipes
    spell, arguments = FORMS[form]
    lora = draw(**arguments)
    save_file(spell(lora), tmp_path / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
    ours.load_lora_weights(tmp_path, adapter_name="x")
    theirs.load_lora_weights(tmp_path, adapter_name="x")
    g = torch.Generator().manual_seed(1)
    for (component, layer), _ in lora.items():
        a, b = our_layer(ours, component, layer), their_layer(theirs, component, layer)
        x = torch.randn(2, b.base_layer.weight.shape[1], *[6] * (b.base_layer.weight.ndim - 2), generator=g)
        if "motion_modules" in layer and "proj_" in layer:
            continue  # theirs cannot be called
        want = b(x)
        if "upsamplers" in layer:
            have = a(x, x.shape[2:])
        elif want.ndim == 4 and isinstance(a, torch.nn.Linear):  # theirs is a 1x1 convolution
            have = a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            have = a(x)
        assert (have - want).abs().max() < 1e-5 * want.abs().max(), layer
        change = want - b.base_layer(x)
        assert (have - want).abs().max() < 1e-5 * change.abs().max() + 2e-6 * want.abs().max(), layer
    made, wanted = frames(ours), frames(theirs)
    assert close(made, wanted)
    assert not close(made, plain, 1e-2)


def put_in(theirs, lora):
    """The change of a LoRA in the weights of their networks, by the formula; returns how it was."""
    was = {}
    for (component, layer), (down, up, alpha) in lora.items():
        weight = their_layer(theirs, component, layer).weight
        was[weight] = weight.data.clone()
        delta = up.flatten(1).double() @ down.flatten(1).double() * (alpha / len(down))
        weight.data += delta.reshape(weight.shape).float()
    return was


@pytest.fixture
def by_formula(pipes):
    """by_formula(lora) -> their frames, with its change in the weights."""

    def run(lora):
        was = put_in(pipes[1], lora)
        try:
            return frames(pipes[1])
        finally:
            for weight, data in was.items():
                weight.data = data

    return run


def alphas(n, k):
    return 1.5 + n % 4


def plain_processors(lora):
    return {n.removeprefix("unet."): x for n, x in processors(lora).items()}


def guoyww(lora):
    state = plain_processors(lora)
    names = {n: re.sub(r"motion_modules\.(\d)\.(.*?)attn(\d)", lambda m: f"motion_modules.{m[1]}.temporal_transformer."
                       f"{m[2]}attention_blocks.{int(m[3]) - 1}", n) for n in state}  # fmt: skip
    return {names[n]: x for n, x in state.items()}


def director(lora):
    """MotionDirector's, temporal: the last segment becomes the _lora."""
    state = {}
    for (_, layer), (down, up, _) in lora.items():
        name = re.sub(r"(motion_modules\.\d)", r"\1.temporal_transformer", layer)
        name = name.replace("attn1", "attention_blocks.0").replace("attn2", "attention_blocks.1")
        block, leaf = name.rsplit(".", 1)
        state |= {f"{block}.processor.{leaf}_lora.{x}.weight": t for x, t in (("down", down), ("up", up))}
    return state


def spatial_director(lora):
    state = {}
    for (_, layer), (down, up, _) in lora.items():
        stem = re.sub(r"(attn\d)\.(to_[qkv]|to_out)(\.0)?$", r"\1.processor.\2", layer)
        state |= {f"{stem}_lora.{x}.weight": t for x, t in (("down", down), ("up", up))}
    return state


def ldm(lora):
    """Kohya's names after latent diffusion's blocks; the small UNet has one block a level, so two entries of each."""
    leaves = {"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1",
              "conv_shortcut": "skip_connection"}

    def name(layer):
        for n, part in enumerate(("resnets.0", "attentions.0", "resnets.1")):
            layer = layer.replace(f"mid_block.{part}", f"middle_block.{n}")
        layer = re.sub(r"down_blocks\.(\d)\.(resnets|attentions)\.0",
                       lambda m: f"input_blocks.{2 * int(m[1]) + 1}.{int(m[2] == 'attentions')}", layer)
        layer = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{2 * int(m[1]) + 2}.0.op",
                       layer)
        layer = re.sub(r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)",
                       lambda m: f"output_blocks.{2 * int(m[1]) + int(m[3])}.{int(m[2] == 'attentions')}", layer)
        layer = layer.replace("up_blocks.0.upsamplers.0.conv", "output_blocks.1.1.conv")
        head, _, leaf = layer.rpartition(".")
        return f"{head}.{leaves.get(leaf, leaf)}".replace(".", "_")

    state = kohya({k: v for k, v in lora.items() if k[0] == "text_encoder"})
    for (c, layer), (down, up, a) in lora.items():
        if c == "unet":
            stem = "lora_unet_" + name(layer)
            state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up,
                      f"{stem}.alpha": torch.tensor(float(a))}
    return state


def flat(lora):
    """1x1 convolutions as products."""
    return {n: x.flatten(1) if x.ndim == 4 and x.shape[2:] == (1, 1) else x for n, x in kohya(lora).items()}


UNET = dict(components=("unet",))
OTHERS = {
    "kohya, an alpha for each layer": (kohya, dict(only=LOCON, rank=conv_ranks, alpha=alphas)),
    "kohya, LDM's blocks": (ldm, dict(only=f"{IMAGE}({LOCON})", rank=ranks, alpha=alphas)),
    "kohya, conv_in and the like": (kohya, dict(only=r"conv_in$|conv_out$|time_embedding\.linear", alpha=2, **UNET)),
    "kohya, 1x1 as products": (flat, dict(only=LOCON, alpha=2)),
    "peft without a component": (lambda lora: {n.removeprefix("unet."): x for n, x in peft(lora).items()}, UNET),
    "peft with a segment": (lambda lora: {n.replace(".weight", ".x.weight"): x for n, x in peft(lora).items()}, {}),
    "peft's own": (lambda lora: {n.replace("unet.", "base_model.model."): x for n, x in peft(lora).items()}, UNET),
    "peft with alphas": (lambda lora: peft(lora) | {f"{c}.{n}.alpha": torch.tensor(float(a)) for (c, n), (_, _, a)
                                              in lora.items()}, dict(alpha=alphas)),
    "processors without unet.": (plain_processors, UNET),
    "guoyww's motion LoRA": (guoyww, dict(only=MOTION, **UNET)),
    "MotionDirector, in time": (director, dict(only=r"motion_modules\..*(to_|ff\.net|proj_in$|proj_out$)", **UNET)),
    "MotionDirector, in space": (spatial_director, dict(only=f"{IMAGE}({LINEAR})", **UNET)),
    "text encoder alone": (processors, dict(only=r"q_proj$", components=("text_encoder",))),
}  # fmt: skip


@pytest.mark.parametrize("form", OTHERS)
def test_forms_that_the_reference_does_not_read(pipes, draw, by_formula, plain, form):
    ours, _ = pipes
    spell, arguments = OTHERS[form]
    lora = draw(**arguments)
    ours.load_lora_weights(spell(lora))
    made = frames(ours)
    assert close(made, by_formula(lora))
    assert not close(made, plain, 1e-3)


def test_the_alphas_of_metadata(pipes, draw, tmp_path, by_formula):
    ours, theirs = pipes
    lora = draw(alpha=6)
    config = dict(r=3, lora_alpha=6, alpha_pattern={}, rank_pattern={}, target_modules=[f"to_{x}" for x in "qkv"])
    config["target_modules"].append("to_out.0")
    said = {f"{c}.{n}": v for c in ("unet", "text_encoder") for n, v in config.items()}
    said["text_encoder.target_modules"] = ["q_proj", "k_proj", "v_proj", "out_proj"]
    file = tmp_path / "x.safetensors"
    save_file(peft(lora), file, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(said)})
    ours.load_lora_weights(file)
    theirs.load_lora_weights(tmp_path, weight_name="x.safetensors")
    made = frames(ours)
    assert close(made, frames(theirs))
    theirs.unload_lora_weights()
    assert close(made, by_formula(lora))


# ---------------------------------------------------------------------------------------------------------------- calls


@pytest.fixture
def two(pipes, draw):
    for pipe in pipes:
        for seed, name in enumerate("ab"):
            pipe.load_lora_weights(kohya(draw(f"{IMAGE}({LINEAR})", alpha=2, seed=seed)), adapter_name=name)
    return pipes


SET = [
    ("b",),
    (["a", "b"],),
    (["a", "b"], 0.5),
    (["a", "b"], [0.7, -0.6]),
    (["b", "a"], [0.0, 1.3]),
    ("a", {"unet": 0.3, "text_encoder": 2.0}),
    ("a", {"unet": {"down": 0.9, "mid": 0.2, "up": {"block_1": [0.4, 0.8]}}}),
    (["a", "b"], [{"unet": {"up": 0.1}}, 0.5]),
]


def test_set_adapters(two):
    ours, theirs = two
    for call in SET:
        for pipe in two:
            pipe.set_adapters(*call)
        assert ours.get_active_adapters() == theirs.get_active_adapters(), call
        assert ours.get_list_adapters() == theirs.get_list_adapters(), call
        assert close(frames(ours), frames(theirs)), call


def test_the_last_that_was_loaded_is_active(two):
    ours, theirs = two
    assert ours.get_active_adapters() == theirs.get_active_adapters() == ["b"]
    assert close(frames(ours), frames(theirs))


def test_fuse(put_back, two):
    ours, theirs = two
    for pipe in two:
        pipe.set_adapters(["a", "b"], [0.7, 0.4])
        pipe.fuse_lora(lora_scale=0.8, adapter_names=["a", "b"])
    assert close(frames(ours), frames(theirs))
    for pipe in two:
        pipe.unload_lora_weights()
    assert close(frames(ours), frames(theirs))


@pytest.fixture
def put_back(pipes):
    """What is fused and unloaded stays in the weights: this takes it out after the test."""
    networks = [n for pipe in pipes for n in (pipe.unet, pipe.text_encoder)]
    states = [{name: x.clone() for name, x in n.state_dict().items()} for n in networks]
    yield
    for pipe in pipes:
        pipe.unload_lora_weights()
    for network, state in zip(networks, states, strict=True):
        network.load_state_dict(state)


@pytest.mark.parametrize("scale", [0.6, -1.5])
def test_the_scale_of_a_call(two, scale):
    ours, theirs = two
    for pipe in two:
        pipe.set_adapters(["a", "b"], [0.7, 0.4])
    before = frames(ours)
    made = frames(ours, cross_attention_kwargs={"scale": scale})
    assert close(made, frames(theirs, cross_attention_kwargs={"scale": scale}))
    assert not close(made, before, 1e-2)
    assert np.array_equal(frames(ours), before)


@pytest.mark.parametrize("scale", [None, 0.5])
def test_the_scale_of_encode_prompt(two, scale):
    ours, theirs = two
    call = ("a red circle", "cpu", 1, True, "blue")
    for a, b in zip(ours.encode_prompt(*call, lora_scale=scale), theirs.encode_prompt(*call, lora_scale=scale),
                    strict=True):  # fmt: skip
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize("given", [dict(alpha=None), dict(alpha=2), dict(only=LOCON, rank=conv_ranks, alpha=alphas)])
@pytest.mark.parametrize("safe", [True, False])
def test_what_is_saved_loads_there(pipes, draw, tmp_path, by_formula, given, safe):
    ours, theirs = pipes
    lora = draw(**given)
    ours.load_lora_weights(kohya(lora))
    made = frames(ours)
    if not safe and given["alpha"] is not None:
        with pytest.raises(ValueError, match="safetensors"):
            ours.save_lora_weights(tmp_path, safe_serialization=safe)
        return
    ours.save_lora_weights(tmp_path, safe_serialization=safe)
    theirs.load_lora_weights(tmp_path)
    assert close(frames(theirs), made)
    theirs.unload_lora_weights()
    assert close(by_formula(lora), made)


def test_layers_that_are_given_are_saved_as_there(pipes, draw, tmp_path):
    lora = peft(draw())
    layers = {f"{c}_lora_layers": {n.removeprefix(f"{c}."): x for n, x in lora.items() if n.startswith(c)}
              for c in ("unet", "text_encoder")}  # fmt: skip
    files = []
    for pipeline in (AnimateDiffPipeline, diffusers.AnimateDiffPipeline):
        folder = tmp_path / pipeline.__module__
        pipeline.save_lora_weights(folder, **layers)
        files.append((folder / "pytorch_lora_weights.safetensors").read_bytes())
    assert files[0] == files[1]
