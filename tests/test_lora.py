"""LoRA: files of every form, the calls, and how they fit the rest. With diffusers beside: parity/test_lora.py."""

import copy
import gzip
import json
import logging
import os
import pickle
import random
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minit2v import (
    AnimateDiffPipeline,
    AnimateDiffVideoToVideoPipeline,
    CLIPTextModel,
    DiffusionPipeline,
    MotionAdapter,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetMotionModel,
    cli,
    fast,
)
from minit2v.adapters import formats, lora
from minit2v.adapters.low_rank import has_branches
from minit2v.fast import graphs
from minit2v.files.weights import Weightless
from minit2v.pipelines.memory import Offload
from minit2v_convert.configs import CLIP_H, CLIP_L, UNET3D, UNET_MOTION
from minit2v_convert.sparse import write_sparse_safetensors

MANIFESTS = json.loads(gzip.decompress((Path(__file__).parent / "data" / "lora_manifests.json.gz").read_bytes()))
CALL = dict(num_frames=2, num_inference_steps=1, height=8, width=16, guidance_scale=4.0, output_type="np")
ATTENTION = r"attn\d\.to_(q|k|v|out\.0)$|self_attn\.(q|k|v|out)_proj$"
MOTION = f"motion_modules.*({ATTENTION})"


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_official_folder, make_adapter_folder):
    folder = tmp_path_factory.mktemp("lora")
    return {
        "t2v": make_official_folder(folder / "ms", small=True),
        "base": make_official_folder(folder / "sd15", repo="sd15", small=True),
        "v2": make_adapter_folder(folder, "v1-5-2"),
        "v3": make_adapter_folder(folder, "v1-5-3"),
    }


@pytest.fixture(scope="module")
def of_module(folders):
    t2v = TextToVideoSDPipeline.from_pretrained(folders["t2v"])
    motion = {v: AnimateDiffPipeline.from_pretrained(
        folders["base"], motion_adapter=MotionAdapter.from_pretrained(folders[v])) for v in ("v2", "v3")}  # fmt: skip
    return {"t2v": quiet(t2v), "v2": quiet(motion["v2"]), "v3": quiet(motion["v3"])}


@pytest.fixture
def pipe(of_module):
    """ModelScope's, small; its networks are as they were afterwards."""
    yield of_module["t2v"]
    put_back(of_module["t2v"])


@pytest.fixture
def motion(of_module):
    """AnimateDiff's version 2, small."""
    yield of_module["v2"]
    put_back(of_module["v2"])


def put_back(pipe):
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    fast.restore(pipe.unet)
    fast.executors.pop(pipe.unet, None)


def frames(pipe, **arguments):
    return pipe("a red circle", generator=torch.Generator().manual_seed(0), **CALL | arguments).frames


def close(a, b, tolerance=1e-4):
    return np.abs(a - b).max() < tolerance


def layers(pipe):
    """(component, layer in the files' names) -> (the layer here, the shape of its weight in files)."""
    found = {}
    for component in ("unet", "text_encoder"):
        network = getattr(pipe, component)
        for name, (path, shape) in lora.layers_of(network).items():
            found[component, name] = network.get_submodule(path), shape
    return found


def draw(pipe, only=ATTENTION, rank=3, seed=0):
    """peft's names."""
    g, state = torch.Generator().manual_seed(seed), {}
    for (component, name), (layer, (o, i, *k)) in layers(pipe).items():
        if re.search(only, name) and not isinstance(layer, nn.Embedding):
            state[f"{component}.{name}.lora_A.weight"] = torch.randn(rank, i, *k, generator=g) * i**-0.5
            state[f"{component}.{name}.lora_B.weight"] = torch.randn(o, rank, *[1] * len(k), generator=g) * 0.3
    assert state
    return state


class InTheWeights:
    """with InTheWeights(pipe, {(component, layer): delta}): the change by hand."""

    def __init__(self, pipe, deltas):
        there = layers(pipe)
        self.changes = [(there[key][0].weight, delta) for key, delta in deltas.items()]

    def __enter__(self):
        self.was = [w.data for w, _ in self.changes]
        for w, delta in self.changes:
            w.data = w.data + delta.reshape(w.shape)

    def __exit__(self, *_):
        for (w, _), data in zip(self.changes, self.was, strict=True):
            w.data = data


def deltas_of(state, scale=1.0):
    """Of peft's names."""
    found = {}
    for name, down in state.items():
        if name.endswith(".lora_A.weight"):
            component, _, layer = name.removesuffix(".lora_A.weight").partition(".")
            up = state[name.replace("lora_A", "lora_B")]
            found[component, layer] = (up.flatten(1) @ down.flatten(1) * scale).unflatten(1, down.shape[1:])
    return found


# ---------------------------------------------------------------------------------------------------------------- forms


@pytest.mark.parametrize("which", ["t2v", "v2"])
def test_every_kind_of_layer(of_module, which):
    """Linear, 1x1, 3x3 with and without a stride, behind doubling, and across the frames."""
    pipe, before = of_module[which], frames(of_module[which])
    state = draw(pipe, only=".")
    pipe.load_lora_weights(state)
    made = frames(pipe)
    put_back(pipe)
    with InTheWeights(pipe, deltas_of(state)):
        wanted = frames(pipe)
    assert close(made, wanted) and not close(made, before, 1e-2)
    assert np.array_equal(frames(pipe), before)


def loralib(pipe, original=False):
    """Text-To-Video-Finetuning's tensors and their change, by its own formulas; original: in ModelScope's names."""
    g, state, deltas, r = torch.Generator().manual_seed(3), {}, {}, 2
    names = {n: f"{n}.weight" for (c, n) in layers(pipe) if c == "unet"}
    for (component, name), (layer, (o, i, *k)) in layers(pipe).items():
        if original and component != "unet":
            continue
        size = max(k, default=1)
        if isinstance(layer, nn.Embedding):
            a, b = torch.randn(r, o, generator=g) * 0.1, torch.randn(i, r, generator=g)
            deltas[component, name] = (b @ a).T
        else:
            a = torch.randn(r * size, i * size, generator=g) * i**-0.5
            b = torch.randn(o * size, r * size, generator=g) * 0.2
            if k[1:] == [1, 1] and size == 3:
                deltas[component, name] = (b @ a).view(o, i, 3, 3, 1).mean(-2, keepdim=True)
            else:
                deltas[component, name] = (b @ a).view(o, i, *k)
        if original:
            name = authors_name(pipe.unet, names[name])
        state |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
    return state, deltas


def authors_name(unet, name):
    from minit2v_convert import modelscope
    from minit2v_convert.table import authors_names

    config = {"layers_per_block": 1, "up_block_types": ["", "CrossAttn"]}
    return authors_names(modelscope.UNETSD_ROWS, name, modelscope.unetsd_numbers(config))[0][0].removesuffix(".weight")


@pytest.mark.parametrize("original", [False, True])
def test_loras_of_text_to_video_finetuning(pipe, original):
    state, deltas = loralib(pipe, original)
    if original:
        assert any(n.startswith("input_blocks.1.0.temopral_conv.conv1.2.lora_A") for n in state)
    pipe.load_lora_weights(state)
    made = frames(pipe)
    put_back(pipe)
    with InTheWeights(pipe, deltas):
        assert close(made, frames(pipe), 2e-4)


def test_tucker_s_form(motion):
    g, state, deltas = torch.Generator().manual_seed(4), {}, {}
    for (component, name), (_, (o, i, *k)) in layers(motion).items():
        if re.search(r"conv\d$", name):
            stem = f"lora_unet_{name.replace('.', '_')}"
            down, mid = torch.randn(3, i, 1, 1, generator=g) * i**-0.5, torch.randn(2, 3, *k, generator=g)
            up = torch.randn(o, 2, 1, 1, generator=g) * 0.2
            state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_mid.weight": mid, f"{stem}.lora_up.weight": up,
                      f"{stem}.alpha": torch.tensor(1.5)}
            deltas[component, name] = torch.einsum("orxy,rskl,sixy->oikl", up, mid, down) * 1.5 / 3
    motion.load_lora_weights(state)
    made = frames(motion)
    motion.unload_lora_weights()
    with InTheWeights(motion, deltas):
        assert close(made, frames(motion))


def guoyww(pipe, rank=4):
    """A motion LoRA in the authors' names, of version 2's modules."""
    state = {}
    for name, x in draw(pipe, only=MOTION, rank=rank).items():
        name = re.sub(r"(motion_modules\.\d)\.", r"\1.temporal_transformer.", name.removeprefix("unet."))
        name = re.sub(r"attn(\d)", lambda m: f"attention_blocks.{int(m[1]) - 1}", name)
        name = re.sub(r"\.(to_[qkv]|to_out)(\.0)?\.lora_([AB])", r".processor.\1_lora.\3", name)
        state[name.replace("_lora.A", "_lora.down").replace("_lora.B", "_lora.up")] = x
    return state


@pytest.mark.parametrize("nested", [False, True])
def test_a_motion_lora_as_it_is_published(motion, tmp_path, nested):
    """Pickles, flat or as a trainer leaves them; in the reference they load nothing and say nothing."""
    state = guoyww(motion)
    content = {"state_dict": state, "animatediff_config": {"a": 1}, "epoch": 2, "global_step": 9} if nested else state
    torch.save(content, tmp_path / "v2_lora_ZoomIn.ckpt")
    motion.load_lora_weights(tmp_path, adapter_name="zoom-in")
    made = frames(motion)
    motion.unload_lora_weights()
    with InTheWeights(motion, deltas_of(draw(motion, only=MOTION, rank=4))):
        assert close(made, frames(motion))


def test_a_motion_lora_of_another_version(of_module, caplog):
    """Version 2's tensors of the middle have no place in version 3: an error, or a line in the log."""
    v2, v3 = of_module["v2"], of_module["v3"]
    state, before = guoyww(v2), frames(v3)
    with pytest.raises(ValueError, match="16 tensors of the LoRA fit no layer: 'mid_block.*strict=False"):
        v3.load_lora_weights(state)
    assert np.array_equal(frames(v3), before) and v3.get_list_adapters() == {}
    with caplog.at_level(logging.INFO, "minit2v"):
        v3.load_lora_weights(state, strict=False)
    said = [record.getMessage() for record in caplog.records]
    assert "16 tensors" in said[0] and "The rest is loaded" in said[0]
    count = len([n for n in state if n.endswith(".up.weight") and not n.startswith("mid")])
    assert said[1] == f"the dictionary changes {count} layers of UNetMotionModel, as 'default_0'."
    assert not close(frames(v3), before, 1e-3)
    v3.unload_lora_weights()


def targets(which):
    """The networks of the published models, without weights."""
    with torch.device("meta"), Weightless():
        if which == "t2v":
            return {"unet": UNet3DConditionModel.from_config(UNET3D), "text_encoder": CLIPTextModel.from_config(CLIP_H)}
        return {"unet": UNetMotionModel.from_config(UNET_MOTION), "text_encoder": CLIPTextModel.from_config(CLIP_L)}


@pytest.fixture(scope="module")
def full_size():
    return targets("motion")


@pytest.mark.parametrize("name", MANIFESTS)
def test_published_files_load_strictly(full_size, tmp_path, name):
    """Every tensor, at full size; and the same by the command line."""
    write_sparse_safetensors(tmp_path / "x.safetensors", MANIFESTS[name])
    lora.load(full_size, lora.open_lora(tmp_path), "x", strict=True, hotswap=False)
    count = {c: len(lora.loras_of(network).loaded.get("x", ())) for c, network in full_size.items()}
    pairs = sum(n.endswith(("down.weight", "lora_A.weight")) for n in MANIFESTS[name])
    assert sum(count.values()) == pairs and has_branches(full_size["unet"])
    lora.unload(full_size)
    assert not has_branches(full_size["unet"]) and not has_branches(full_size["text_encoder"])
    assert cli.main(["inspect", str(tmp_path)]) == 0


def test_factors_of_a_file_on_meta_take_little(full_size):
    assert all(p.is_meta for p in full_size["unet"].parameters())


# -------------------------------------------------------------------------------------------------------------- refused

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
REFUSED = {
    "a LoHa": {f"{STEM}.hada_w1_a": (32, 4), f"{STEM}.hada_w1_b": (4, 32)},
    "a LoKr": {f"{STEM}.lokr_w1": (4, 4), f"{STEM}.lokr_w2": (8, 8)},
    "a DoRA": {f"{STEM}.lora_down.weight": (4, 32), f"{STEM}.lora_up.weight": (32, 4), f"{STEM}.dora_scale": (1, 32)},
    "an OFT or BOFT": {f"{STEM}.oft_blocks": (4, 8, 8)},
    "a GLoRA": {f"{STEM}.a1.weight": (4, 32), f"{STEM}.b2.weight": (4, 32)},
    "whole differences": {f"{STEM}.diff": (32, 32)},
    "a VeRA": {f"{STEM}.vera_lambda_b": (32,)},
    "with biases": {f"{STEM}.lora_B.bias": (32,)},
    "Stable Diffusion XL": {"lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.lora_down.weight": (4, 640)},
    "a LoRA of Stable Diffusion XL": {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 1280)},
    "diffusion transformer": {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 1536)},
    "Wan": {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": (4, 1536)},
    "Stable Diffusion 2.x": {f"{STEM[:-10]}_attn2_to_k.lora_down.weight": (4, 1024)},
    "not a LoRA: it is VAE": {"decoder.conv_in.weight": (512, 4, 3, 3)},
    "not a LoRA: it has no tensors": {},
    "several adapters: a, b": {f"unet.conv_in.lora_A.{x}.weight": (4, 4, 3, 3) for x in "ab"},
    "two forms": {"unet.conv_in.lora_A.weight": (4, 4, 3, 3), "unet.conv_in.lora_B.weight": (32, 4, 1, 1),
                     "lora_unet_conv_out.lora_down.weight": (4, 32, 3, 3),
                     "lora_unet_conv_out.lora_up.weight": (4, 4, 1, 1)},
    "in two forms": {"unet.conv_in.lora_A.weight": (4, 4, 3, 3), "lora_unet_conv_in.lora_up.weight": (32, 4, 1, 1)},
    "are both for": {"unet.conv_in.lora_A.weight": (4, 4, 3, 3), "conv_in.lora_A.weight": (4, 4, 3, 3)},
    "no up factor": {"unet.conv_in.lora_A.weight": (4, 4, 3, 3)},
    "not \\[4, 4, 3, 3\\]": {"unet.conv_in.lora_A.weight": (4, 5, 3, 3), "unet.conv_in.lora_B.weight": (32, 4, 1, 1)},
    "rank 0": {"unet.conv_in.lora_A.weight": (0, 4, 3, 3), "unet.conv_in.lora_B.weight": (32, 0, 1, 1)},
    "not a layer.*nearest: '(conv_in|conv\\.in)'": {"unet.conv_inn.lora_A.weight": (4, 4, 3, 3)},
    "nothing of text_encoder_3": {"text_encoder_3.x.lora_A.weight": (4, 4)},
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_refused_by_name(motion, why):
    state = {name: torch.ones(shape) for name, shape in REFUSED[why].items()}
    with pytest.raises(ValueError, match=why if "nothing of" not in why else "Stable Diffusion 3") as error:
        motion.load_lora_weights(state)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1500
    assert motion.get_list_adapters() == {} and not has_branches(motion.unet)


def test_of_a_pipeline_that_is_one_half(of_module):
    pipe = of_module["v2"]
    with pytest.raises(ValueError, match="is for a text_encoder, which the pipeline does not have; .*strict=False"):
        lora.load({"unet": pipe.unet}, lora.open_dict(draw(pipe)), None, True, False)
    with pytest.raises(ValueError, match="is for a network, which the pipeline does not have"):
        lora.load({}, lora.open_dict({"conv_in.lora_A.weight": torch.ones(4, 4, 3, 3)}), None, True, False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("role", ["lora_down.weight", "alpha"])
def test_numbers_that_are_none(motion, value, role):
    state = {f"{STEM}.lora_down.weight": torch.ones(4, 32), f"{STEM}.lora_up.weight": torch.ones(32, 4),
             f"{STEM}.alpha": torch.tensor(1.0)}  # fmt: skip
    state[f"{STEM}.{role}"] = state[f"{STEM}.{role}"] * value
    with pytest.raises(ValueError, match=f"{role}' holds NaN or infinity"):
        motion.load_lora_weights(state)


CONFIGS = {
    "use_dora": {"use_dora": True},
    "can read only LORA": {"peft_type": "LOHA"},
    "lora_alpha must be a number": {"lora_alpha": "x"},
    "not the name of a layer": {"lora_alpha": 1, "alpha_pattern": {"(a+)+$": 3}},
    "an object {name: number}": {"alpha_pattern": [1]},
}


@pytest.mark.parametrize("why", CONFIGS)
def test_configs_of_peft_that_say_something_else(motion, tmp_path, why):
    state = {n.replace("unet.", "base_model.model."): x for n, x in draw(motion).items() if n.startswith("unet.")}
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIGS[why]))
    with pytest.raises(ValueError, match=why):
        motion.load_lora_weights(tmp_path)


@pytest.mark.parametrize("config, scale", [
    ({"r": 3, "lora_alpha": 6, "peft_type": "LORA"}, 2.0),
    ({"r": 3, "lora_alpha": 6, "use_rslora": True}, 6 / 3**0.5),
])  # fmt: skip
def test_alpha_of_peft_s_own_folder(motion, tmp_path, config, scale):
    state = draw(motion)
    own = {n.removeprefix("unet.").removeprefix("text_encoder."): x for n, x in state.items()}
    save_file({f"base_model.model.{n}": x for n, x in own.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    motion.load_lora_weights(tmp_path)
    made = frames(motion)
    motion.unload_lora_weights()
    with InTheWeights(motion, deltas_of(state, scale)):
        assert close(made, frames(motion))


class Code:
    def __reduce__(self):
        return os.system, ("touch /tmp/minit2v-was-here",)


def mutated(state, folder, n):
    """A file, broken in one of many ways, and its ending."""
    rng, names = random.Random(n), sorted(state)
    state, name = dict(state), random.Random(n).choice(names)
    x = state[name]
    file = folder / "x.safetensors"
    kind = n % 12
    if kind == 0:  # a half is missing
        del state[name]
    elif kind == 1:
        state[name] = torch.randn([*x.shape[:-1], x.shape[-1] + 1])
    elif kind == 2:
        state[name] = x.to(rng.choice([torch.int32, torch.uint8, torch.int64, torch.bool]))
    elif kind == 3:
        state[name] = x.clone().fill_(rng.choice([float("nan"), float("inf"), -float("inf")]))
    elif kind == 4:  # a letter of a name
        at = rng.randrange(len(name))
        state[name[:at] + rng.choice("q._0Z\n") + name[at + 1 :]] = state.pop(name)
        if name in state or state.keys() == set(names):
            del state[names[0]]
    elif kind == 5:  # of another family as well
        state |= {n_: torch.ones(4, 8) for n_ in rng.choice([
            ["lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"], [f"{STEM}.hada_w1_a"], ["x.dora_scale"],
            ["transformer.blocks.0.lora_A.weight"], ["clip_g"], ["unet.bundle_emb.x"]])}  # fmt: skip
    elif kind == 6:
        state[name] = x.reshape(-1)
    elif kind == 7:
        state[name] = x.transpose(0, 1).contiguous() if x.shape[0] != x.shape[1] else x[:1]
    elif kind == 8:
        state[name] = x[..., :0]
    elif kind == 9:  # a pickle that runs something, or holds something else
        what = rng.choice([Code(), [1, 2], {"a": 1}, {"state_dict": [1]}, "text", {name: Code()}, {5: x}])
        if rng.random() < 0.5:
            torch.save(what, folder / "x.ckpt")
        else:
            (folder / "x.ckpt").write_bytes(pickle.dumps(what))
        return folder / "x.ckpt"
    save_file(state, file)
    data = bytearray(file.read_bytes())
    if kind == 10:  # cut off
        data = data[: rng.randrange(len(data))]
    elif kind == 11:  # a byte of the header's JSON, or of its length
        data[rng.choice([rng.randrange(8), 8])] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return file


def test_300_broken_files(motion, tmp_path):
    """Each is one line; nothing is left half loaded: the frames afterwards are the same to the bit."""
    before, state = frames(motion), draw(motion)
    motion.load_lora_weights(draw(motion, seed=1), adapter_name="there")
    with_lora = frames(motion)
    weights = {n: x.clone() for n, x in motion.unet.state_dict().items()}
    for n in range(300):
        file = mutated(state, tmp_path, n)
        with pytest.raises(ValueError) as error:
            motion.load_lora_weights(file, adapter_name="new")
        line = str(error.value)
        assert "\n" not in line and len(line) < 1600 and "x." in line, (n, line)
        assert motion.get_list_adapters() == {"unet": ["there"], "text_encoder": ["there"]}, n
        assert motion.get_active_adapters() == ["there"]
    assert np.array_equal(frames(motion), with_lora) and not os.path.exists("/tmp/minit2v-was-here")
    assert all(torch.equal(x, weights[n]) for n, x in motion.unet.state_dict().items())
    motion.unload_lora_weights()
    assert np.array_equal(frames(motion), before)


@pytest.mark.parametrize("given, match", [
    ({"x": 5}, "'x' is a int"),
    ({5: torch.ones(2)}, "'5' is a Tensor"),
    ({"x": torch.ones(2, dtype=torch.complex64)}, "complex64"),
    ({"x": torch.ones(2, device="meta")}, "on meta"),
])  # fmt: skip
def test_dictionaries_that_are_none(motion, given, match):
    with pytest.raises(ValueError, match=match):
        motion.load_lora_weights(given)


def test_files_of_a_folder(motion, tmp_path):
    a, b = draw(motion, seed=1), draw(motion, seed=2)
    with pytest.raises(FileNotFoundError, match="LoRA file .*the files there: none"):
        motion.load_lora_weights(tmp_path)
    save_file(a, tmp_path / "a.safetensors")
    motion.load_lora_weights(tmp_path, adapter_name="only")
    save_file(b, tmp_path / "b.safetensors")
    with pytest.raises(FileNotFoundError, match="weight_name= among a.safetensors, b.safetensors"):
        motion.load_lora_weights(tmp_path)
    motion.load_lora_weights(tmp_path, weight_name="b.safetensors", adapter_name="named")
    save_file(b, tmp_path / "pytorch_lora_weights.safetensors")
    motion.load_lora_weights(tmp_path, adapter_name="usual")
    with pytest.raises(FileNotFoundError, match="c.safetensors.*nearest"):
        motion.load_lora_weights(tmp_path, weight_name="c.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        motion.load_lora_weights(tmp_path / "d.safetensors")
    motion.load_lora_weights(tmp_path.parent, subfolder=tmp_path.name, weight_name="a.safetensors", adapter_name="sub")
    torch.save(b, tmp_path / "pytorch_lora_weights.bin")
    motion.load_lora_weights(tmp_path, use_safetensors=False, adapter_name="bin")
    loaded = lora.loras_of(motion.unet).loaded
    same = [[n for n in loaded if all(torch.equal(f.up, loaded[m][path].up) for path, f in loaded[n].items())]
            for m in ("only", "named")]  # fmt: skip
    assert same == [["only", "sub"], ["named", "usual", "bin"]]


# ---------------------------------------------------------------------------------------------------------------- calls


@pytest.fixture
def two(motion):
    for seed, name in enumerate("ab"):
        motion.load_lora_weights(draw(motion, seed=seed), adapter_name=name)
    return motion


def test_names(motion):
    text = {n: x for n, x in draw(motion).items() if n.startswith("text_encoder.")}
    motion.load_lora_weights(draw(motion))
    motion.load_lora_weights(text)
    assert motion.get_list_adapters() == {"unet": ["default_0"], "text_encoder": ["default_0", "default_1"]}
    assert motion.get_active_adapters() == ["default_0", "default_1"]
    with pytest.raises(ValueError, match="already is a LoRA 'default_1'"):
        motion.load_lora_weights(text, "default_1")
    motion.delete_adapters("default_0")
    assert motion.get_list_adapters() == {"text_encoder": ["default_1"]}
    motion.delete_adapters(["default_1"])
    assert motion.get_list_adapters() == {} and motion.get_active_adapters() == []


@pytest.mark.parametrize("call, match", [
    (lambda p: p.set_adapters("c"), "no LoRA 'c'.*loaded are 'a', 'b'"),
    (lambda p: p.set_adapters(["a", "a"]), "'a' is given twice"),
    (lambda p: p.set_adapters(["a", "b"], [1.0]), "1 weights for 2 adapters"),
    (lambda p: p.set_adapters("a", float("nan")), "finite number, not 'nan'"),
    (lambda p: p.set_adapters("a", "1"), "finite number"),
    (lambda p: p.set_adapters("a", True), "finite number"),
    (lambda p: p.set_adapters("a", {"unett": 1}), "no network 'unett' \\(nearest: 'unet'\\)"),
    (lambda p: p.set_adapters("a", {"text_encoder": {"down": 1}}), "has no blocks"),
    (lambda p: p.set_adapters("a", {"unet": {"dwon": 1}}), "'dwon' is not a part.*nearest: 'down'"),
    (lambda p: p.set_adapters("a", {"unet": {"down": {"block_7": 1}}}), "no 'block_7'.*its blocks are block_0"),
    (lambda p: p.set_adapters("a", {"unet": {"up": {"block_1": [1, 2, 3]}}}), "has 2 transformers, but 3 weights"),
    (lambda p: p.delete_adapters("c"), "no LoRA 'c'"),
    (lambda p: p.fuse_lora(adapter_names=["c"]), "no LoRA 'c'"),
    (lambda p: p.fuse_lora("vae"), "'vae' is not among"),
    (lambda p: p.fuse_lora(lora_scale=float("inf")), "finite number"),
    (lambda p: p.load_lora_weights({}, "c", hotswap=True), "no LoRA 'c' to replace"),
    (lambda p: p.save_lora_weights("x", adapter_names="c"), "no LoRA 'c'"),
    (lambda p: p.save_lora_weights("x", weight_name="x.safetensors"), "one weight_name for 2 LoRAs"),
    (lambda p: frames(p, cross_attention_kwargs={"scal": 1}), "no adapter reads 'scal' \\(nearest: 'scale'\\)"),
    (lambda p: frames(p, cross_attention_kwargs={"scale": "x"}), "finite number"),
])  # fmt: skip
def test_calls_that_are_refused_change_nothing(two, call, match):
    two.set_adapters(["a", "b"], [0.5, 0.25])
    before = frames(two)
    with pytest.raises(ValueError, match=match) as error:
        call(two)
    assert "\n" not in str(error.value)
    assert two.get_active_adapters() == ["a", "b"] and np.array_equal(frames(two), before)


@pytest.mark.parametrize("weight, scale", [(0.5, 0.5), (-0.6, -0.6), (0.0, 0.0)])
def test_weights_add_up(two, weight, scale):
    two.set_adapters(["b", "a"], [weight, 1.0])
    made = frames(two)
    a, b = deltas_of(draw(two, seed=0)), deltas_of(draw(two, seed=1), scale)
    two.unload_lora_weights()
    with InTheWeights(two, {key: a[key] + b[key] for key in a}):
        assert close(made, frames(two))


def test_the_weight_of_a_block_is_of_all_that_is_in_it(motion):
    """Not only of its transformers, as in the reference, where LoRAs on other layers are an IndexError."""
    state = draw(motion, only=".")
    motion.load_lora_weights(state, "a")
    motion.set_adapters("a", {"text_encoder": 0.5, "unet": {
        "down": 0.7, "mid": -0.3, "up": {"block_0": 0.2, "block_1": [0.4, 0.8]}}})  # fmt: skip
    made = frames(motion)
    motion.unload_lora_weights()

    def weight(component, layer):
        if component == "text_encoder":
            return 0.5
        for begin, w in (("down_blocks", 0.7), ("mid_block", -0.3), ("up_blocks.0", 0.2)):
            if layer.startswith(begin):
                return w
        if layer.startswith("up_blocks.1"):
            return 0.8 if layer.split(".")[3] == "1" else 0.4
        return 1.0

    with InTheWeights(motion, {key: weight(*key) * delta for key, delta in deltas_of(state).items()}):
        assert close(made, frames(motion))


def test_off_and_on(two):
    both, plain = frames(two), None
    two.disable_lora()
    assert two.get_active_adapters() == ["b"] and not has_branches(two.unet)
    two.set_adapters(["a", "b"])
    plain = frames(two)
    two.enable_lora()
    changed = frames(two)
    two.set_adapters("b")
    assert np.array_equal(frames(two), both) and not close(changed, plain, 1e-3) and not close(changed, both, 1e-3)
    two.unload_lora_weights()
    assert np.array_equal(frames(two), plain)


def test_loading_while_disabled_says_so(motion, caplog):
    motion.load_lora_weights(draw(motion), "a")
    motion.disable_lora()
    motion.load_lora_weights(draw(motion, seed=1), "b")
    assert "'b' changes nothing until enable_lora()" in caplog.text


def test_deleting_one_of_several(two):
    two.set_adapters(["a", "b"], [0.5, 0.25])
    two.delete_adapters("b")
    made = frames(two)
    two.set_adapters("a", 0.5)
    assert two.get_active_adapters() == ["a"] and np.array_equal(frames(two), made)


def test_fused_and_taken_out_to_the_last_bit(two, caplog):
    two.set_adapters(["a", "b"], [0.5, -0.25])
    weights = {n: x.clone() for n, x in two.unet.state_dict().items()}
    beside = frames(two)
    two.fuse_lora()
    assert close(frames(two), beside, 2e-5) and not has_branches(two.unet)
    two.unfuse_lora()
    assert np.array_equal(frames(two), beside)
    two.fuse_lora(lora_scale=0.5, adapter_names="b")  # a stays beside
    made = frames(two)
    two.unfuse_lora()
    assert np.array_equal(frames(two), beside), "the scale of fusing is not the adapter's weight"
    two.set_adapters(["a", "b"], [0.5, -0.125])
    assert close(frames(two), made, 2e-5)
    assert all(torch.equal(x, weights[n]) for n, x in two.unet.state_dict().items())
    two.unfuse_lora()
    assert "no LoRA is fused" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fused_in_half_precision(of_module, dtype):
    pipe = copy.deepcopy(of_module["v2"]).to(dtype)
    weights = {n: x.clone() for n, x in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(draw(pipe, only="."))
    pipe.fuse_lora()
    changed = [n for n, x in pipe.unet.state_dict().items() if not torch.equal(x, weights[n])]
    assert len(changed) == sum(len(layers_) for layers_ in lora.loras_of(pipe.unet).loaded.values())
    pipe.unfuse_lora()
    assert all(torch.equal(x, weights[n]) and x.dtype == dtype or "positions" in n
               for n, x in pipe.unet.state_dict().items())  # fmt: skip


@pytest.mark.parametrize("call", [
    lambda p: p.set_adapters("a", 0.3),
    lambda p: p.disable_lora(),
    lambda p: p.delete_adapters("a"),
    lambda p: p.fuse_lora(adapter_names="a"),
    lambda p: p.load_lora_weights(draw(p), "a", hotswap=True),
    lambda p: frames(p, cross_attention_kwargs={"scale": 0.5}),
    lambda p: p.encode_prompt("x", lora_scale=0.5),
])  # fmt: skip
def test_what_is_fused_is_not_changed_behind_its_back(two, call):
    """In the reference it looks as if nothing happened, and unfusing then damages the weights for good."""
    two.set_adapters(["a", "b"], [0.5, 0.25])
    beside = frames(two)
    two.fuse_lora(adapter_names=["a"])
    with pytest.raises(ValueError, match="'a' is (fused|in )"):
        call(two)
    two.unfuse_lora()
    assert np.array_equal(frames(two), beside)


def test_fused_weights_stay_when_loras_are_unloaded(of_module):
    pipe = copy.deepcopy(of_module["v2"])
    pipe.load_lora_weights(draw(pipe), "a")
    pipe.fuse_lora()
    made = frames(pipe)
    pipe.unload_lora_weights()
    assert np.array_equal(frames(pipe), made) and not lora.loras_of(pipe.unet).originals
    pipe.load_lora_weights(draw(pipe, seed=1), "b")
    assert not close(frames(pipe), made, 1e-3)
    with pytest.raises(ValueError, match="no LoRA is loaded"):
        pipe.unload_lora_weights()
        pipe.save_lora_weights("x")


def test_fusing_what_overflows_changes_nothing(of_module):
    pipe = copy.deepcopy(of_module["v2"]).to(torch.float16)
    state = {n: x * 200 for n, x in draw(pipe).items()}
    weights = {n: x.clone() for n, x in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(state, "a")
    with pytest.raises(FloatingPointError, match="float16 the weight of"):
        pipe.fuse_lora(lora_scale=1000.0)
    assert all(torch.equal(x, weights[n]) for n, x in pipe.unet.state_dict().items())
    with pytest.raises(ValueError, match="too large for torch.float16"):
        pipe.load_lora_weights({n: x * 1e6 for n, x in state.items()}, "b")
    with pytest.raises(ValueError, match="too large for torch.float16"):
        pipe.load_lora_weights({n: x * 1e6 for n, x in state.items()}, "a", hotswap=True)
    assert pipe.get_list_adapters() == {"unet": ["a"], "text_encoder": ["a"]}


def test_the_scale_of_a_call_is_of_that_call(two):
    two.set_adapters(["a", "b"], [0.5, 0.25])
    before = frames(two)
    scaled = frames(two, cross_attention_kwargs={"scale": 0.5})
    nothing = frames(two, cross_attention_kwargs={"scale": 0})
    assert np.array_equal(frames(two), before)
    two.set_adapters(["a", "b"], [0.25, 0.125])
    assert np.array_equal(frames(two), scaled)
    two.disable_lora()
    assert close(frames(two), nothing, 1e-6)
    two.unload_lora_weights()
    with pytest.raises(ValueError, match="no LoRA is loaded"):
        frames(two, cross_attention_kwargs={"scale": 0.5})
    assert np.array_equal(frames(two, cross_attention_kwargs={"scale": 1.0}), frames(two))


def test_weights_that_a_callback_changes(two):
    two.set_adapters("a", 1.0)

    def change(pipe, step, t, tensors):
        pipe.set_adapters("b", 0.5)
        return {}

    first, made = (frames(two, num_inference_steps=2, **more) for more in ({}, dict(callback_on_step_end=change)))
    assert not close(first, made, 1e-4) and two.get_active_adapters() == ["b"]


def test_one_scale_at_a_time(two):
    """Another call on the same networks would run with the scale of this one."""
    other, errors = quiet(AnimateDiffPipeline.from_pipe(two)), []

    def meanwhile(pipe, step, t, tensors):
        try:
            frames(other)
        except RuntimeError as error:
            errors.append(str(error))
        return {}

    thread = threading.Thread(target=lambda: frames(two, num_inference_steps=2,
                                                    cross_attention_kwargs={"scale": 0.5},
                                                    callback_on_step_end=meanwhile))  # fmt: skip
    thread.start()
    thread.join()
    assert len(errors) == 2 and "another call uses this" in errors[0]
    frames(other)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(repository, file, tensors): it is in the cache, and the hub is not asked."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(repo, file, tensors):
        folder = tmp_path / ("models--" + repo.replace("/", "--"))
        (folder / "snapshots" / "abc").mkdir(parents=True, exist_ok=True)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text("abc")
        save_file(tensors, folder / "snapshots" / "abc" / file)

    return put


def test_the_snippets_of_the_reference_s_pages(motion, hub):
    """Motion LoRAs, alone and with peft, and AnimateLCM's, on the names of the hub."""
    old = {n.replace(".lora_A", "_lora.down").replace(".lora_B", "_lora.up"): x
           for n, x in draw(motion, only=MOTION).items()}  # fmt: skip
    old = {re.sub(r"(attn\d)\.(to_[qkv]|to_out)(\.0)?_lora", r"\1.processor.\2_lora", n): x for n, x in old.items()}
    for repo in ("guoyww/animatediff-motion-lora-zoom-out", "diffusers/animatediff-motion-lora-zoom-out",
                 "diffusers/animatediff-motion-lora-pan-left"):  # fmt: skip
        hub(repo, "diffusion_pytorch_model.safetensors", old)
    lcm = {}
    for name, x in draw(motion).items():
        component, stem, half = re.fullmatch(r"(\w+)\.(.*)\.lora_([AB]).weight", name).groups()
        if component == "unet":
            lcm[f"lora_unet_{stem.replace('.', '_')}.lora_{'down' if half == 'A' else 'up'}.weight"] = x
    hub("wangfuyun/AnimateLCM", "AnimateLCM_sd15_t2v_lora.safetensors", lcm)
    hub("wangfuyun/AnimateLCM", "diffusion_pytorch_model.safetensors", {"x": torch.ones(1)})
    pipe, before = motion, frames(motion)

    pipe.load_lora_weights("guoyww/animatediff-motion-lora-zoom-out", adapter_name="zoom-out")
    assert not close(frames(pipe), before, 1e-3)
    pipe.unload_lora_weights()
    pipe.load_lora_weights("diffusers/animatediff-motion-lora-zoom-out", adapter_name="zoom-out")
    pipe.load_lora_weights("diffusers/animatediff-motion-lora-pan-left", adapter_name="pan-left")
    pipe.set_adapters(["zoom-out", "pan-left"], adapter_weights=[1.0, 1.0])
    assert pipe.get_active_adapters() == ["zoom-out", "pan-left"]
    pipe.load_lora_weights("wangfuyun/AnimateLCM", weight_name="AnimateLCM_sd15_t2v_lora.safetensors",
                           adapter_name="lcm-lora")  # fmt: skip
    pipe.set_adapters(["lcm-lora"], [0.8])
    assert not close(frames(pipe), before, 1e-3)
    with pytest.raises(FileNotFoundError, match="wangfuyun/AnimateLCM-2 is not in the cache"):
        pipe.load_lora_weights("wangfuyun/AnimateLCM-2")
    with pytest.raises(FileNotFoundError, match="copy of wangfuyun/AnimateLCM has no .*choose with weight_name="):
        pipe.load_lora_weights("wangfuyun/AnimateLCM")


# --------------------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_saved_and_loaded_to_the_bit(motion, tmp_path, dtype):
    state = {}
    for n, (name, x) in enumerate(draw(motion, only=".", rank=5).items()):
        state[name] = x.to(dtype)
        state[re.sub(r"lora_[AB].weight", "alpha", name)] = torch.tensor(1.0 + n // 2 % 3)
    motion.load_lora_weights(state, "a")
    motion.set_adapters("a", 0.3)  # is not saved
    motion.save_lora_weights(tmp_path)
    again = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert again.keys() == {n for n in state if "alpha" not in n}
    assert all(torch.equal(x, state[n]) and x.dtype == dtype for n, x in again.items())
    motion.set_adapters("a")
    made = frames(motion)
    motion.unload_lora_weights()
    motion.load_lora_weights(tmp_path)
    assert np.array_equal(frames(motion), made)


def test_several_are_saved_by_their_names(two, tmp_path):
    two.save_lora_weights(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"]
    two.save_lora_weights(tmp_path, weight_name="x.safetensors", adapter_names=["b"])
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with pytest.raises(ValueError, match="on a pipeline that has a LoRA"):
        AnimateDiffPipeline.save_lora_weights(tmp_path)
    two.load_lora_weights(draw(two), "../c")
    with pytest.raises(ValueError, match="'../c' cannot be a file name"):
        two.save_lora_weights(tmp_path)


def test_a_pipeline_is_saved_with_what_is_fused_alone(two, tmp_path):
    with pytest.raises(ValueError, match="has a LoRA that is not fused.*fuse_lora"):
        two.save_pretrained(tmp_path / "x")
    with pytest.raises(ValueError, match="has a LoRA that is not fused"):
        two.text_encoder.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    two.fuse_lora()
    made = frames(two)
    two.save_pretrained(tmp_path / "x")
    assert np.array_equal(frames(quiet(DiffusionPipeline.from_pretrained(tmp_path / "x"))), made)
    two.unfuse_lora()
    two.disable_lora()
    two.save_pretrained(tmp_path / "y")  # nothing runs beside


# ------------------------------------------------------------------------------------------------ with all that is else


def test_copies_and_dtypes(two):
    two.set_adapters(["a", "b"], [0.5, 0.25])
    made, names = frames(two), [*two.unet.state_dict()]
    other = copy.deepcopy(two)
    two.unload_lora_weights()
    assert names == [*two.unet.state_dict()], "nothing that is saved has another name"
    assert np.array_equal(frames(other), made)
    assert other.get_active_adapters() == ["a", "b"]
    other.to(torch.float64)
    assert all(b.dtype == torch.float64 for m in other.unet.modules() for b in m.buffers(recurse=False))
    other.to(torch.float32)
    assert np.array_equal(frames(other), made)
    other.unload_lora_weights()
    assert np.array_equal(frames(other), frames(two))


def test_offloaded(two, monkeypatch):
    made = frames(two)
    moved = []
    monkeypatch.setattr(two, "_offload", Offload(torch.device("cpu"), "model"))
    to = UNetMotionModel.to
    monkeypatch.setattr(UNetMotionModel, "to", lambda self, *a, **k: moved.append(a) or to(self, *a, **k))
    assert np.array_equal(frames(two), made) and len(moved) == 2


def test_other_pipelines_of_the_same_networks(two):
    """In another mode the network is another object, of the same layers."""
    two.set_adapters(["a", "b"], [0.5, 0.25])
    beside = frames(two)
    other = quiet(AnimateDiffPipeline.from_pipe(two, compat="diffusers"))
    assert other.unet is not two.unet and other.get_active_adapters() == ["a", "b"] and has_branches(other.unet)
    theirs = frames(other)
    other.fuse_lora()
    assert close(frames(two), beside, 2e-5) and not has_branches(two.unet)
    two.unfuse_lora()
    assert np.array_equal(frames(two), beside) and np.array_equal(frames(other), theirs)
    other.unload_lora_weights()
    assert two.get_list_adapters() == {} and not has_branches(two.unet)
    assert isinstance(AnimateDiffVideoToVideoPipeline.from_pipe(two).get_active_adapters(), list)


def test_of_an_image_model(folders, randomize_):
    """A LoRA is loaded into the image model, and the video model that is made of it has it."""
    unet = UNet2DConditionModel.from_pretrained(folders["base"], subfolder="unet")
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
    state = {}
    for name, (_, (o, i, *k)) in lora.layers_of(unet).items():
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = torch.randn(2, i, *k), torch.randn(
            o, 2, *[1] * len(k))  # fmt: skip
    before = unet(x, 5, context)
    lora.load({"unet": unet}, lora.open_dict(state), "a", True, False)
    lora.set_adapters({"unet": unet}, "a", 0.05)
    image = unet(x, 5, context)
    assert not torch.allclose(image, before, atol=1e-2)
    adapter = MotionAdapter.from_pretrained(folders["v2"])
    lora.fuse({"unet": unet}, 1.0, None)
    fused = UNetMotionModel.from_unet2d(unet, adapter)
    for network in (unet, fused):
        lora.unfuse({"unet": network})
    assert torch.equal(unet.conv_in.weight, fused.conv_in.weight) and has_branches(fused)
    assert unet.conv_in.weight.data_ptr() != fused.conv_in.weight.data_ptr()
    video = UNetMotionModel.from_unet2d(unet, adapter)
    given = x[:, :, None].repeat(1, 1, 2, 1, 1), 5, context
    made = video(*given)
    lora.unload({"unet": unet})
    assert has_branches(video) and lora.active({"unet": video}) == ["a"]
    lora.fuse({"unet": video}, 1.0, None)
    assert torch.allclose(video(*given), made, atol=1e-3)
    lora.unfuse({"unet": video})
    lora.unload({"unet": video})
    assert torch.allclose(video(*given), UNetMotionModel.from_unet2d(unet, adapter)(*given))


def test_motion_modules_that_have_a_lora_stay(motion, tmp_path):
    state = {n: x for n, x in draw(motion).items() if "motion_modules" in n}
    adapter = copy.deepcopy(motion.unet.motion_adapter())
    motion.load_lora_weights(state, "a")
    with pytest.raises(ValueError, match="'a' changes the motion modules"):
        motion.unet.load_motion_modules(adapter)
    with pytest.raises(ValueError, match="has a LoRA that is not fused"):
        motion.unet.save_motion_modules(tmp_path / "x")
    with pytest.raises(ValueError, match="has a LoRA that is not fused"):
        UNetMotionModel.from_unet2d(UNet2DConditionModel(**small_image(motion.unet)), motion.unet.motion_adapter())


def small_image(unet):
    c = unet.config
    return dict(block_out_channels=c.block_out_channels, layers_per_block=c.layers_per_block,
                norm_num_groups=c.norm_num_groups, cross_attention_dim=c.cross_attention_dim, attention_head_dim=4,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))  # fmt: skip


@pytest.mark.parametrize("which", ["t2v", "v2"])
def test_the_fast_path(of_module, which):
    """Layers with branches run as written, the rest fast; what is fused, all fast. No plan for what is of one shape."""
    pipe = of_module[which]
    pipe.load_lora_weights(draw(pipe, only="."), "a")
    with_hands = frames_as_written(pipe)
    pipe.optimize()
    assert close(frames(pipe), with_hands, 1e-5)
    executor = fast.executors[pipe.unet]
    known, plans = len(executor.known), executor.plans
    memory = [b.data_ptr() for b in pipe.unet.buffers()]
    pipe.load_lora_weights(draw(pipe, only=".", seed=1), "a", hotswap=True)
    pipe.set_adapters("a", 0.5)
    made = frames(pipe, cross_attention_kwargs={"scale": 0.5})
    assert executor.plans == plans and memory == [b.data_ptr() for b in pipe.unet.buffers()]
    assert close(made, frames_as_written(pipe, cross_attention_kwargs={"scale": 0.5}), 1e-5)
    pipe.set_adapters("a", 0.25)
    pipe.fuse_lora()
    assert close(frames(pipe), made, 1e-4)
    assert executor.plans > plans and len(executor.known) > known
    pipe.unfuse_lora()
    assert close(frames(pipe), made, 1e-5)
    pipe.load_lora_weights(draw(pipe, seed=1, rank=2), "a", hotswap=True)  # other ranks and layers
    assert close(frames(pipe), frames_as_written(pipe), 1e-5) and pipe.get_active_adapters() == ["a"]
    put_back(pipe)


def test_no_graph_is_captured_again(pipe, monkeypatch):
    """Another LoRA of the same ranks, another weight, a call's scale: the same kernels read the same memory."""
    captures = []

    def capture(run, device, other):
        captures.append(y := run())
        return graphs.Capture(SimpleNamespace(replay=lambda: y.copy_(run())), None, y)

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr("minit2v.fast.executor.can_capture", lambda x: True)
    pipe.load_lora_weights(draw(pipe, only="."), "a")
    fast.optimize(pipe.unet, graphs=True)
    first = frames(pipe)
    pipe.load_lora_weights(draw(pipe, only=".", seed=1), "a", hotswap=True)
    other = frames(pipe)
    pipe.set_adapters("a", 0.5)
    half = frames(pipe, cross_attention_kwargs={"scale": 0.5})
    assert len(captures) == 1 and not close(first, other, 1e-2) and not close(other, half, 1e-2)
    assert close(half, frames_as_written(pipe, cross_attention_kwargs={"scale": 0.5}), 1e-5)
    pipe.set_adapters("a", 0.25)
    pipe.fuse_lora()
    assert close(frames(pipe), half, 1e-4) and len(captures) == 2


@torch.no_grad()
def test_nothing_is_compiled_again(pipe):
    compiled = []

    def backend(graph, example):
        compiled.append(graph)
        return graph.forward

    pipe.load_lora_weights(draw(pipe), "a")
    layer = pipe.unet.mid[0].spatial.block.attn1.to_q
    run, x = torch.compile(layer, backend=backend, fullgraph=True), torch.randn(2, layer.in_features)
    first = run(x)
    pipe.load_lora_weights(draw(pipe, seed=1), "a", hotswap=True)
    pipe.set_adapters("a", 0.5)
    other = run(x)
    assert len(compiled) == 1 and torch.equal(other, layer(x)) and not torch.allclose(first, other, atol=1e-2)


def frames_as_written(pipe, **arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIT2V_OPTIMIZE", "0")
        return frames(pipe, **arguments)


def test_techniques(two):
    """FreeInit and FreeU pass by the LoRAs as by any network."""
    two.enable_freeu(0.9, 0.2, 1.5, 1.6)
    two.enable_free_init(num_iters=2)
    made = frames(two, cross_attention_kwargs={"scale": 0.5})
    two.set_adapters("b", 0.5)
    assert np.array_equal(frames(two), made)
    two.disable_freeu()
    two.disable_free_init()


def test_a_layer_that_something_wraps_is_refused(of_module):
    pipe = copy.deepcopy(of_module["v2"])

    class Own(nn.Linear):
        pass

    pipe.unet.down[0].blocks[0].spatial.block.attn1.to_q.__class__ = Own
    with pytest.raises(ValueError, match="attn1.to_q', which here is a Own"):
        pipe.load_lora_weights(draw(pipe))


# -------------------------------------------------------------------------------------------------------------- inspect


def test_inspect(tmp_path, capsys):
    for name in ("kohya_sd15_locon_te", "v2_lora"):
        write_sparse_safetensors(tmp_path / f"{name}.safetensors", MANIFESTS[name])
    assert cli.main(["inspect", str(tmp_path / "kohya_sd15_locon_te.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "LoRA for Stable Diffusion 1.5 and AnimateDiff, in the form of kohya" in out
    assert "unet: 278 layers of rank 8, 32" in out
    assert "text_encoder: 72 layers of rank 32" in out and out.strip().endswith("complete")
    assert cli.main(["inspect", str(tmp_path / "v2_lora.safetensors")]) == 0
    assert "168 layers of rank 64, scale (alpha / rank) 1, all in motion modules" in capsys.readouterr().out
    broken = dict(MANIFESTS["v2_lora"])
    broken["x.lora_A.weight"] = broken.popitem()[1]
    write_sparse_safetensors(tmp_path / "broken.safetensors", broken)
    assert cli.main(["inspect", str(tmp_path / "broken.safetensors")]) == 1
    out = capsys.readouterr().out
    assert "wrong: 2 tensors of the LoRA fit no layer" in out and "not complete" in out
    embedded = quiet(DiffusionPipeline.from_pretrained("shapes"))
    save_file(draw(embedded), tmp_path / "shapes.safetensors")
    assert cli.main(["inspect", str(tmp_path / "shapes.safetensors")]) == 0
    assert "LoRA for shapes, in the form of peft" in capsys.readouterr().out
    write_sparse_safetensors(tmp_path / "loha.safetensors", {f"{STEM}.hada_w1_a": ((32, 4), "F16")})
    assert cli.main(["inspect", str(tmp_path / "loha.safetensors")]) != 0
    assert "LoHa" in capsys.readouterr().err


def test_kohya_s_names_are_looked_up():
    """`to_q` and `ff_net_0_proj` have underscores of their own; no two layers have one name."""
    for found in formats.published().values():
        for t in found:
            names = [layer.replace(".", "_") for layer in t.shapes]
            assert len({*names}) == len(names) and all(t.spellings[n] == layer for n, layer in
                                                       zip(names, t.shapes, strict=True))  # fmt: skip
