"""The plain networks behave as any PyTorch module does: under hooks, compilers, transforms, wrappers and copies.

A network is small here, and every parameter random: a branch that starts as zero would hide what it is given.
"""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import einops
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

from minit2v import (
    AnimateDiffPipeline,
    AutoencoderKL,
    CLIPTextModel,
    DiffusionPipeline,
    MotionAdapter,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetMotionModel,
)
from minit2v.models.layers import FrameTransformerBlock, TransformerBlock

SHARED = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 8}


def blocks(kind: str) -> dict:
    return {
        "down_block_types": (f"CrossAttnDownBlock{kind}", f"DownBlock{kind}"),
        "up_block_types": (f"UpBlock{kind}", f"CrossAttnUpBlock{kind}"),
    }


def one_level(kind: str) -> dict:
    types = {"down_block_types": (f"CrossAttnDownBlock{kind}",), "up_block_types": (f"CrossAttnUpBlock{kind}",)}
    return {**SHARED, **types, "block_out_channels": (8,)}


VAE = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
}
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 7,
}
MAKE = {
    "unet3d": lambda: UNet3DConditionModel(**SHARED, **blocks("3D"), attention_head_dim=4),
    "unet2d": lambda: UNet2DConditionModel(**SHARED, **blocks("2D"), attention_head_dim=2),
    "motion": lambda: UNetMotionModel(
        **SHARED, **blocks("Motion"), num_attention_heads=2, motion_num_attention_heads=2
    ),
    "motion, norms over the video": lambda: UNetMotionModel(
        **SHARED, **blocks("Motion"), num_attention_heads=2, motion_num_attention_heads=2,
        motion_norms="video", resnet_norms="video",
    ),
    "vae": lambda: WholeVAE(**VAE),
    "clip": lambda: CLIPTextModel(**CLIP),
}  # fmt: skip
ONE_LEVEL = {  # for what takes a compiler's time
    "unet3d": lambda: UNet3DConditionModel(**one_level("3D"), attention_head_dim=4),
    "unet2d": lambda: UNet2DConditionModel(**one_level("2D"), attention_head_dim=2),
    "motion, norms over the video": lambda: UNetMotionModel(
        **one_level("Motion"), num_attention_heads=2, motion_num_attention_heads=2,
        motion_norms="video", resnet_norms="video",
    ),
}  # fmt: skip
TINY = {**ONE_LEVEL, "vae": MAKE["vae"], "clip": MAKE["clip"]}
UNETS = [name for name in MAKE if name not in ("vae", "clip")]


class WholeVAE(AutoencoderKL):
    """The VAE as one call, for what looks at a module's `forward`: there and back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x).mode())


@pytest.fixture(params=MAKE)
def case(request, randomize_):
    """(the network, its arguments of batch 2)"""
    return randomize_(MAKE[request.param]()).eval(), inputs(request.param)


@pytest.fixture(params=UNETS)
def unet_case(request, randomize_):
    return randomize_(MAKE[request.param]()).eval(), inputs(request.param)


@pytest.fixture
def einops_in_graph():
    """A compiler that looks into einops takes 0.3 s for each reshape: here it takes them as they are."""
    torch.compiler.reset()
    torch.compiler.allow_in_graph(einops.rearrange)
    torch.compiler.allow_in_graph(einops.repeat)


def inputs(name: str, b: int = 2) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    if name == "clip":
        return (torch.randint(0, 50, (b, 7)),)
    if name == "vae":
        return (torch.randn(b, 3, 8, 6),)
    x = torch.randn(b, 4, 6, 4) if name == "unet2d" else torch.randn(b, 4, 3, 6, 4)
    return x, torch.tensor([981, 3])[:b], torch.randn(b, 5, 8)


def everything(network: nn.Module, args: tuple) -> list[torch.Tensor]:
    """The output and the gradient of every parameter."""
    network.zero_grad()
    y = network(*args)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in network.parameters())]


def close(a: list[torch.Tensor], b: list[torch.Tensor], tolerance: float = 1e-4) -> None:
    """Each to `tolerance` of its size, or of a hundredth of the largest's: some gradients are nothing but noise."""
    largest = max(y.norm() for y in b)
    for x, y in zip(a, b, strict=True):
        assert (x - y).norm() <= tolerance * max(y.norm(), 1e-2 * largest)


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_no_output_changes_after_it_was_returned(case, gradients):
    network, args = case
    seen, called = [], set()

    def keep(module, args, y):
        called.add(module)
        seen.append((module, y, y.clone()))

    for module in network.modules():
        module.register_forward_hook(keep)
    with torch.set_grad_enabled(gradients):
        y = network(*args)
    if gradients:
        y.square().sum().backward()
    # What only holds others, and CLIP's table of positions, of which the first rows are taken as they are.
    never = {type(m).__name__ for m in network.modules() if m not in called}
    assert never <= {"ModuleList", "Level", "Embedding"}
    assert [type(m).__name__ for m, y, before in seen if not torch.equal(y, before)] == []


def test_inputs_stay_as_they_were(case):
    network, args = case
    before = [x.clone() for x in args]
    with torch.no_grad():
        network(*args)
    assert all(map(torch.equal, args, before))


def test_autocast(case):
    network, args = case
    with torch.no_grad():
        exact = network(*args)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = network(*args)
    assert 0 < (rough - exact).norm() < 0.1 * exact.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        everything(network, args)
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("name", TINY)
def test_compiled_without_a_break(name, randomize_, einops_in_graph):
    """One graph, for inference and for training."""
    network, args = randomize_(TINY[name]()).eval(), inputs(name)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    with torch.no_grad():
        close([compiled(*args)], [network(*args)])
    close(everything(compiled, args), everything(network, args))


def test_traced_through_einops():
    """Also where the compiler looks into einops itself, which takes it some seconds."""
    block = TransformerBlock(8, heads=2, head_dim=4, context_dim=6)
    args = torch.randn(4, 3, 8), torch.randn(2, 5, 6)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    close(everything(compiled, args), everything(block, args))


def test_compiled_by_aot(einops_in_graph):
    """What comes after the tracing finds the shapes and layouts that it expects, also backwards."""
    block = FrameTransformerBlock(8, heads=2, head_dim=4)
    args = (torch.randn(1, 3, 4, 8),)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close([compiled(*args)], [block(*args)])
    close(everything(compiled, args), everything(block, args))


@pytest.mark.parametrize("name", TINY)
def test_exported(name, randomize_):
    network, args = randomize_(TINY[name]()).eval(), inputs(name)
    program = torch.export.export(network, args)
    with torch.no_grad():
        assert torch.equal(program.module()(*args), network(*args))


def test_functional_call(case):
    network, args = case
    other = {name: p * 0.5 for name, p in network.named_parameters()}
    with torch.no_grad():
        y = functional_call(network, other, args)
        half = copy.deepcopy(network)
        half.load_state_dict(other, strict=False)
        assert torch.equal(y, half(*args))


def test_gradients_of_a_function(case):
    """torch.func.grad, and the product with a direction by jvp, agree with backward."""
    network, args = case
    parameters = dict(network.named_parameters())

    def loss(parameters):
        return functional_call(network, parameters, args).square().sum()

    gradients = grad(loss)(parameters)
    close(list(gradients.values()), everything(network, args)[1:])
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the fused one has no forward mode
        _, forward = jvp(loss, ({n: p.detach() for n, p in parameters.items()},), (direction,))
    by_hand = sum((direction[name] * gradients[name]).sum() for name in gradients)
    assert torch.allclose(forward, by_hand, rtol=1e-3)


def test_vmap_over_an_ensemble(case, randomize_):
    network, args = case
    other = randomize_(copy.deepcopy(network), seed=1)
    parameters, buffers = stack_module_state([network, other])
    with torch.no_grad():
        both = vmap(lambda p, b: functional_call(network, (p, b), args))(parameters, buffers)
        close([*both], [network(*args), other(*args)])


def test_vmap_over_videos(unet_case):
    network, (x, t, context) = unet_case
    with torch.no_grad():
        each = vmap(lambda x, t, c: network(x[None], t, c[None])[0])(x, t, context)
        close([each], [network(x, t, context)])


def test_gradient_checkpointing(unet_case):
    network, args = unet_case
    exact = everything(network, args)
    network.enable_gradient_checkpointing()
    assert all(map(torch.equal, everything(network, args), exact))


@pytest.mark.parametrize("copied", [
    copy.deepcopy,
    lambda m: pickle.loads(pickle.dumps(m)),
    lambda m: m,
], ids=["deepcopy", "pickle", "save"])  # fmt: skip
def test_copies(case, copied, tmp_path, request):
    network, args = case
    if "save" in request.node.callspec.id:
        torch.save(network, tmp_path / "network.pt")
        new = torch.load(tmp_path / "network.pt", weights_only=False)
    else:
        new = copied(network)
    assert type(new) is type(network) and new.config == network.config
    with torch.no_grad():
        assert torch.equal(new(*args), network(*args))
        next(new.parameters()).add_(1)
        assert not torch.equal(new(*args), network(*args))  # nothing is shared


WRAPPED = """
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
mesh = dist.init_device_mesh("cpu", (1,))
for name in names:
    network, args = randomize_(TINY[name]()).eval(), inputs(name)
    exact = everything(network, args)
    ddp = DistributedDataParallel(copy.deepcopy(network))
    close(everything(ddp, args), exact)
    shards = copy.deepcopy(network)
    for m in shards.modules():
        if type(m).__name__ in ("Block", "EncoderLayer", "Mid"):
            fully_shard(m, mesh=mesh)
    fully_shard(shards, mesh=mesh)
    y = shards(*args)
    y.square().sum().backward()
    close([y.detach(), *(p.grad.full_tensor() for p in shards.parameters())], exact)
    print(name, "is as it was")
dist.destroy_process_group()
"""


def test_distributed(tmp_path):
    """DDP and FSDP2 around a network, and FSDP2 around its blocks, in one process of gloo."""
    names = [*TINY]
    start = f"""
import importlib.util, sys
def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
globals().update(vars(load("modules", {__file__!r})))
randomize_ = load("conftest", {str(Path(__file__).with_name("conftest.py"))!r})._randomize
folder, names = {str(tmp_path)!r}, {names!r}
"""
    ran = subprocess.run([sys.executable, "-c", start + WRAPPED], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("is as it was") == len(names)


# ---------------------------------------------------------------------------------------------------- inside a pipeline


CALL = dict(num_inference_steps=2, num_frames=3, height=16, width=16, guidance_scale=3.0, output_type="latent")


@pytest.fixture
def pipe(tmp_path, make_official_folder):
    small = {**one_level("3D"), "cross_attention_dim": 24, "attention_head_dim": 4}
    pipe = DiffusionPipeline.from_pretrained(make_official_folder(tmp_path, small=True, unet=small))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, **call) -> torch.Tensor:
    return pipe("a cat", **{**CALL, **call}, generator=torch.Generator().manual_seed(0)).frames


def test_a_compiled_unet_in_a_pipeline(pipe, tmp_path, einops_in_graph):
    exact, state = sample(pipe), {name: x.clone() for name, x in pipe.unet.state_dict().items()}
    unet = pipe.unet
    pipe.unet = torch.compile(unet, backend="eager")
    pipe.vae = torch.compile(pipe.vae, backend="eager")
    pipe.text_encoder = torch.compile(pipe.text_encoder, backend="eager")
    assert torch.allclose(sample(pipe), exact, atol=1e-4)
    assert pipe.dtype == torch.float32 and pipe.to(torch.float32) is pipe
    assert sample(pipe, output_type="pt").shape == (1, 3, 3, 16, 16)
    assert torch.allclose(sample(TextToVideoSDPipeline.from_pipe(pipe)), exact, atol=1e-4)

    pipe.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(again.unet) is type(unet)
    assert all(torch.equal(x, state[name]) for name, x in again.unet.state_dict().items())
    with torch.no_grad():
        unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="its parameter 'conv_out.bias' contains some"):
        sample(pipe)


def test_compiled_motion_modules_in_a_pipeline(tmp_path, make_official_folder, make_adapter_folder):
    adapter = MotionAdapter.from_pretrained(make_adapter_folder(tmp_path, "v1-5-2"))
    folder = make_official_folder(tmp_path / "images", "sd15", small=True)
    pipe = AnimateDiffPipeline.from_pretrained(folder, motion_adapter=adapter)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    new = AnimateDiffPipeline.from_pipe(pipe)
    assert new.unet is pipe.unet
    assert type(AnimateDiffPipeline.from_pipe(pipe, compat="diffusers").unet) is UNetMotionModel


def test_ddp_in_a_pipeline(pipe, monkeypatch, tmp_path):
    """What a training script holds: the pipeline takes the network out of it, and can be saved."""

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Wrapper)  # the real one needs a process group
    exact, unet = sample(pipe), pipe.unet
    pipe.unet = nn.parallel.DistributedDataParallel(unet)
    assert pipe.unet is unet and torch.equal(sample(pipe), exact)
    assert TextToVideoSDPipeline(**{**pipe.components, "unet": Wrapper(unet)}).unet is unet
