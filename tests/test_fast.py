"""The fast path gives the numbers of the plain one, keeps up with its weights, and leaves no trace behind."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch

from minit2v import fast
from minit2v.models.layers import Attention
from minit2v.models.unet import UNet
from minit2v.models.unet3d import UNet3DConditionModel
from minit2v.models.unet_motion import MotionAdapter, UNetMotionModel
from minit2v.models.vae import AutoencoderKL

SHARED = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,  # as wide as x at level 0
}
UNET3D = {
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "attention_head_dim": 8,
}
MOTION = {
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
    "num_attention_heads": 2,
    "motion_num_attention_heads": 2,
}
VAE = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
}
MODELS = {
    "3d": lambda: UNet3DConditionModel(**SHARED, **UNET3D),
    "motion": lambda: UNetMotionModel(**SHARED, **MOTION),
    "motion, clip norms": lambda: UNetMotionModel(**SHARED, **MOTION, resnet_norms="video", motion_norms="video"),
}


@pytest.fixture(params=MODELS)
def unet(request, randomize_) -> UNet:
    return randomize_(MODELS[request.param]()).eval()


@pytest.fixture
def unet3d(randomize_) -> UNet:
    return randomize_(MODELS["3d"]()).eval()


def inputs(dtype: torch.dtype = torch.float32, b: int = 2, f: int = 3, h: int = 5, w: int = 3, seed: int = 0):
    torch.manual_seed(seed)
    return torch.randn(b, 4, f, h, w).to(dtype), torch.tensor([3, 999])[:b], torch.randn(b, 7, 16).to(dtype)


def memory(network: torch.nn.Module) -> dict[str, tuple]:
    """Of every tensor its numbers, its strides, and whether it has its memory to itself."""
    return {
        name: (v.clone(), v.stride(), v.untyped_storage().nbytes() == v.nbytes)
        for name, v in network.state_dict().items()
    }


def assert_same(a: dict[str, tuple], b: dict[str, tuple]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name][0], b[name][0]) and a[name][1:] == b[name][1:], name


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    limit = {torch.float64: 1e-12, torch.float32: 1e-6}[b.dtype]
    assert ((a.double() - b.double()).norm() / b.double().norm()).item() <= limit


# --------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@torch.no_grad()
def test_the_same_numbers(unet, dtype):
    unet.to(dtype)
    x, t, context = inputs(dtype)
    per_frame = torch.randn(2, 3, 7, 16, dtype=dtype)
    changes = [
        lambda: None,
        lambda: unet.enable_forward_chunking(1),
        lambda: unet.enable_freeu(0.9, 0.2, 1.5, 1.6),
        unet.disable_forward_chunking,
    ]
    calls = [(x, t, context), (x, 500, context), (x, t, per_frame), (x[:1], 7.5, context[:1])]
    for change in changes:
        change()
        want = [unet(*call) for call in calls]
        fast.optimize(unet)
        for call, y in zip(calls, want, strict=True):
            close(unet(*call), y)
            close(unet(*call[:2], unet.keys_values(call[2])), y)
        fast.restore(unet)
        for call, y in zip(calls, want, strict=True):
            assert torch.equal(unet(*call), y)
            close(unet(*call[:2], unet.keys_values(call[2])), y)


@torch.no_grad()
def test_less_is_launched(unet, monkeypatch):
    """Else the rest of this file could compare the plain path with itself."""
    from minit2v.models import layers
    from minit2v.models import unet as unets

    products = []

    def count(x, weight, bias=None):
        products.append(weight.shape)
        return torch.nn.functional.linear(x, weight, bias)

    for module in (layers, unets, __import__("minit2v.models.blocks", fromlist=["linear"])):
        monkeypatch.setattr(module, "linear", count)
    unet(*inputs())
    plain = len(products)
    attentions = sum(block.attention for block in unet.blocks())  # in space: across frames it takes the kernel
    fast.optimize(unet)
    products.clear()
    unet(*inputs())
    assert plain - len(products) == 2 * attentions + len(list(unet.blocks())) - 1


@torch.no_grad()
def test_vae(randomize_):
    vae = randomize_(AutoencoderKL(**VAE)).eval()
    z = torch.randn(3, 4, 5, 4)
    want, before = vae.decode(z), memory(vae)
    fast.optimize(vae)
    assert torch.equal(vae.decode(z), want) and vae.fast is not None and copy.deepcopy(vae).fast is None
    fast.restore(vae)
    assert_same(memory(vae), before)


def test_keys_values_are_those_of_the_text(unet):
    x, t, context = inputs()
    made = unet.keys_values(context)
    assert [pair is not None for pair in made.of_blocks] == [block.attention for block in unet.blocks()]
    with pytest.raises(ValueError, match="keys and values are of 2 texts, not of 1 or 1 x 3 frames"):
        unet(x[:1], t[:1], made)
    with pytest.raises(ValueError, match=r"context must be \(batch, \[frames,\] tokens, width 16\), not \(2, 7, 15\)"):
        unet.keys_values(context[..., :15])


def test_gradients_pass_through(unet):
    """Training an optimized network trains its parameters."""
    x, t, context = inputs(torch.float64)
    unet.double()
    want = torch.autograd.grad(unet(x, t, context).square().sum(), list(unet.parameters()))
    fast.optimize(unet)
    for enable in (lambda: None, unet.enable_gradient_checkpointing):
        enable()
        got = torch.autograd.grad(unet(x, t, context).square().sum(), list(unet.parameters()))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


# ----------------------------------------------------------------------------------------------------------- its state


@torch.no_grad()
def test_restored_to_the_last_bit(unet):
    convs = [m for m in unet.modules() if isinstance(m, torch.nn.Conv2d)]
    convs[0].weight.data = convs[0].weight.contiguous(memory_format=torch.channels_last)  # not as the others
    before, names = memory(unet), [name for name, _ in unet.named_parameters()]
    fast.optimize(unet)
    during = memory(unet)
    assert list(during) == list(before) and [name for name, _ in unet.named_parameters()] == names
    assert all(torch.equal(during[name][0], before[name][0]) for name in before)
    assert not all(alone for _, _, alone in during.values()), "nothing was laid together"
    fast.optimize(unet)  # again
    fast.restore(unet)
    assert_same(memory(unet), before)
    assert unet.fast is None and unet.time is None
    assert all(m.qkv is None for m in unet.modules() if isinstance(m, Attention))
    fast.restore(unet)  # nothing to do


@torch.no_grad()
def test_what_is_not_moved_stays_mapped(unet3d, tmp_path):
    """Weights of a file are mapped, not read: those that are not laid together stay so."""
    unet3d.save_pretrained(tmp_path)
    unet = UNet3DConditionModel.from_pretrained(tmp_path)
    places = {name: p.data_ptr() for name, p in unet.named_parameters()}
    fast.optimize(unet)
    moved = {name for name, p in unet.named_parameters() if p.data_ptr() != places[name]}
    assert moved and all(re.search(r"\.(to_[qkv]|emb|conv1)\.", name) for name in moved)
    fast.restore(unet)
    assert {name for name, p in unet.named_parameters() if p.data_ptr() != places[name]} <= moved
    assert same(unet, unet3d)


@torch.no_grad()
def test_it_keeps_up_with_its_weights(unet, randomize_, tmp_path):
    """In place, replaced, cast, loaded: the numbers are those of the weights that are there, and it stays fast."""
    x, t, context = inputs()
    fast.optimize(unet)

    def check(dtype: torch.dtype = torch.float32) -> None:
        plain = copy.deepcopy(unet)
        assert plain.fast is None and plain.time is None and unet.time is not None
        assert all(m.qkv is None for m in plain.modules() if isinstance(m, Attention))
        close(unet(x.to(dtype), t, context.to(dtype)), plain(x.to(dtype), t, context.to(dtype)))
        attention = next(m for m in unet.modules() if isinstance(m, Attention))
        weights = attention.to_q.weight, attention.to_k.weight, attention.to_v.weight
        assert torch.equal(attention.qkv, torch.cat(weights))
        assert attention.qkv.data_ptr() == attention.to_q.weight.data_ptr(), "one memory for both"

    check()
    for p in unet.parameters():
        p.mul_(1.01)
    check()
    state = {name: v * 1.01 for name, v in unet.state_dict().items()}
    unet.load_state_dict(state)
    check()
    unet.load_state_dict({name: v * 1.01 for name, v in state.items()}, assign=True)
    check()
    unet.double()
    check(torch.float64)
    unet.float()
    check()
    unet.down[0].to(torch.float64).to(torch.float32)  # a part alone, of which the UNet is not told
    check()
    block = next(unet.blocks())
    block.spatial.block.attn1.to_k.weight = torch.nn.Parameter(torch.randn(16, 16))
    check()
    if isinstance(unet, UNetMotionModel):
        adapter = MotionAdapter(block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=8)
        unet.load_motion_modules(randomize_(adapter, 7))
        check()
    unet.save_pretrained(tmp_path)
    again = type(unet).from_pretrained(tmp_path)
    assert torch.equal(again(x, t, context), copy.deepcopy(unet)(x, t, context))
    unet.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert type(unet).from_pretrained(tmp_path / "bin", use_safetensors=False).state_dict().keys() == state.keys()
    fast.restore(unet)
    assert all(alone for _, _, alone in memory(unet).values())


@torch.no_grad()
def test_two_networks_of_the_same_tensors(randomize_):
    """Another compat mode shares the parameters: whichever is laid out, both stay right."""
    first = randomize_(MODELS["motion"]()).eval()
    second = first.with_compat("diffusers")
    x, t, context = inputs()
    want = [first(x, t, context), second(x, t, context)]
    fast.optimize(first)
    fast.optimize(second)
    places = [p.data_ptr() for p in first.parameters()]
    for _ in range(2):
        close(first(x, t, context), want[0])
        close(second(x, t, context), want[1])
    assert [p.data_ptr() for p in first.parameters()] == places, "they do not take the weights from each other"
    next(first.parameters()).mul_(1.5)
    fast.restore(second)
    close(first(x, t, context), copy.deepcopy(first)(x, t, context))


# --------------------------------------------------------------------------------------------------------- CUDA graphs


class FakeGraphs:
    """`fast.capture` on the CPU: a replay computes anew, out of the same tensors and into the same tensor."""

    def __init__(self, monkeypatch):
        self.captures = self.replays = 0
        self.shared = []  # of each capture, whether it shares another one's memory
        monkeypatch.setattr(fast, "capture", self.capture)
        monkeypatch.setattr(fast, "can_capture", lambda x: not torch.is_autocast_enabled("cpu"))

    def capture(self, run, device, other):
        self.captures += 1
        self.shared.append(other is not None)
        y = run()

        def replay():
            self.replays += 1
            y.copy_(run())

        return fast.Capture(SimpleNamespace(replay=replay), None, y)


@pytest.fixture
def graphs(monkeypatch):
    return FakeGraphs(monkeypatch)


@torch.no_grad()
def test_a_graph_per_shape(unet, graphs):
    want, given = [], []
    for n, size in enumerate([(2, 3, 5, 3), (2, 3, 5, 3), (1, 2, 4, 4), (2, 3, 5, 3)]):
        given.append(inputs(torch.float32, *size, seed=n))
        want.append(unet(*given[-1]))
    fast.optimize(unet, graphs=True)
    got = [unet(*call) for call in given]
    for a, b in zip(got, want, strict=True):  # compared at the end: no call may write into the results of another
        close(a, b)
    assert (graphs.captures, graphs.replays) == (2, 4)
    x, t, context = given[0]
    made = unet.keys_values(context)
    close(unet(x, t, made), want[0])
    close(unet(given[1][0], given[1][1], made), unet.predict(given[1][0], given[1][1], context))
    close(unet(x, t, unet.keys_values(given[1][2])), unet.predict(x, t, given[1][2]))
    assert graphs.captures == 3, "other keys and values of the same shape are copied"
    unet.enable_freeu(0.9, 0.2, 1.5, 1.6)
    close(unet(*given[0]), unet.predict(*given[0]))
    unet.disable_freeu()
    close(unet(*given[0]), want[0])
    assert graphs.captures == 4
    for f in range(1, 9):
        unet(*inputs(f=f))
    assert len(unet.fast.graphs) == fast.MOST_GRAPHS
    fast.restore(unet)
    captures = graphs.captures
    assert torch.equal(unet(*given[0]), want[0]) and graphs.captures == captures
    assert graphs.shared == [False] + [True] * (captures - 1)


@torch.no_grad()
def test_a_graph_and_its_weights(unet3d, graphs):
    call = inputs()
    fast.optimize(unet3d, graphs=True)
    unet3d(*call)
    for p in unet3d.parameters():
        p.mul_(1.01)
    close(unet3d(*call), copy.deepcopy(unet3d)(*call))
    assert graphs.captures == 1, "a change in place is seen by the graph"
    unet3d.to(torch.float64).to(torch.float32)
    assert not unet3d.fast.graphs, "its memory is given back at once"
    close(unet3d(*call), copy.deepcopy(unet3d)(*call))
    assert graphs.captures == 2
    unet3d.conv_in.weight = torch.nn.Parameter(torch.randn_like(unet3d.conv_in.weight))
    close(unet3d(*call), copy.deepcopy(unet3d)(*call))
    assert graphs.captures == 3 and graphs.shared == [False] * 3, "none shares memory with one that is gone"


def test_a_graph_in_every_mode(unet3d, graphs, monkeypatch):
    """Captured under inference_mode and replayed without it; none under gradients, autocast or for another choice."""
    call = inputs()
    fast.optimize(unet3d, graphs=True)
    with torch.inference_mode():
        first = unet3d(*call)
    with torch.no_grad():
        assert torch.equal(unet3d(*call), first)
        assert (graphs.captures, graphs.replays) == (1, 2)
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(unet3d(*call), first)
        assert graphs.replays == 2
        monkeypatch.setenv("MINIT2V_KERNELS", "torch")
        unet3d(*call)
        assert (graphs.captures, graphs.replays) == (2, 3)
    assert unet3d(*call).requires_grad and graphs.replays == 3


@torch.no_grad()
def test_hooks_are_called(unet3d, graphs):
    call, calls = inputs(), []
    fast.optimize(unet3d, graphs=True)
    whole = unet3d.register_forward_hook(lambda *_: calls.append("whole"))
    unet3d(*call)
    part = unet3d.mid[0].register_forward_pre_hook(lambda *_: calls.append("part"))
    unet3d(*call)
    part.remove()
    unet3d(*call)
    whole.remove()
    assert calls == ["whole", "part", "whole", "whole"] and (graphs.captures, graphs.replays) == (1, 2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@torch.no_grad()
def test_on_a_gpu(unet, kernels, monkeypatch):
    monkeypatch.setenv("MINIT2V_KERNELS", kernels)
    unet.to("cuda")
    before = memory(unet)
    given = [inputs(torch.float32, *size, seed=n) for n, size in enumerate([(2, 3, 8, 8), (2, 3, 8, 8), (1, 2, 8, 4)])]
    given = [[v.cuda() for v in call] for call in given]
    want = [unet(*call) for call in given]
    fast.optimize(unet, graphs=True)
    for _ in range(2):
        for (x, t, context), y in zip(given, want, strict=True):
            for text in (context, unet.keys_values(context)):
                got = unet(x, t, text)
                assert ((got.double() - y.double()).norm() / y.double().norm()).item() < 2e-3  # TF32 may differ
    assert len(unet.fast.graphs) == 4
    unet.enable_freeu(0.9, 0.2, 1.5, 1.6)
    assert torch.isfinite(unet(*given[0])).all()
    unet.to("cpu").to("cuda")
    fast.restore(unet)
    assert_same(memory(unet), before)


# ---------------------------------------------------------------------------------------------------------- compilation


@torch.no_grad()
def test_compiled_blocks(randomize_, monkeypatch):
    level = {"block_out_channels": (16,), "down_block_types": UNET3D["down_block_types"][:1],
             "up_block_types": UNET3D["up_block_types"][1:]}  # fmt: skip
    unet3d = randomize_(UNet3DConditionModel(**{**SHARED, **UNET3D, **level})).eval()
    calls = []

    def backend(graph, example):
        calls.append(graph)
        return graph.forward

    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compile(self, backend=backend, **kw))
    call = inputs()
    want = unet3d(*call)
    fast.optimize(unet3d, compile=True)
    close(unet3d(*call), want)
    compiled = len(calls)
    blocks = len(list(unet3d.blocks()))
    assert 2 <= compiled <= blocks, "a block is one piece: no graph breaks"
    close(unet3d(*call), want)
    assert len(calls) == compiled
    close(copy.deepcopy(unet3d)(*call), want)
    fast.restore(unet3d)
    assert torch.equal(unet3d(*call), want) and all(b._compiled_call_impl is None for b in unet3d.blocks())


@torch.no_grad()
def test_what_stands_around_a_projection_is_kept(unet3d):
    """An adapter around to_q, a bias, a hook: then it is not its weight alone, and is called as ever."""

    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        @property
        def weight(self):
            return self.base.weight

        def forward(self, x):
            return 1.5 * self.base(x)

    def doubled(module, inputs, output):
        return 2 * output

    call, attention = inputs(), unet3d.mid[0].spatial.block.attn1
    fast.optimize(unet3d)
    before = unet3d(*call)

    base, attention.to_q = attention.to_q, Adapter(attention.to_q)
    with_adapter = unet3d(*call)
    attention.to_q = base
    hook = attention.to_k.register_forward_hook(doubled)
    with_hook = unet3d(*call)
    hook.remove()
    attention.to_v.bias = torch.nn.Parameter(torch.ones_like(attention.to_v.weight[:, 0]))
    with_bias = unet3d(*call)
    attention.to_v.bias = None
    close(unet3d(*call), before)

    fast.restore(unet3d)
    attention.to_q = Adapter(base)
    close(with_adapter, unet3d(*call))
    attention.to_q = base
    hook = attention.to_k.register_forward_hook(doubled)
    close(with_hook, unet3d(*call))
    hook.remove()
    attention.to_v.bias = torch.nn.Parameter(torch.ones_like(attention.to_v.weight[:, 0]))
    close(with_bias, unet3d(*call))
    assert not torch.allclose(with_adapter, before) and not torch.allclose(with_hook, before)


def test_an_optimized_network_is_freed_at_once(unet3d):
    import gc
    import weakref

    network = type(unet3d)(unet3d.config)
    fast.optimize(network)
    gone = weakref.ref(network)
    gc.disable()
    try:
        del network
        assert gone() is None
    finally:
        gc.enable()
