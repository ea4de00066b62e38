"""The fast path gives the numbers of the plain networks, gives way to whatever is changed, and leaves no trace."""

import copy
import gc
import re
import weakref
from types import SimpleNamespace

import pytest
import torch

from minit2v import fast
from minit2v.fast import graphs as fast_graphs
from minit2v.fast.modules import PARTS
from minit2v.models.blocks import ResBlock
from minit2v.models.layers import Attention, FrameAttention
from minit2v.models.unet import UNet
from minit2v.models.unet2d import UNet2DConditionModel
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
    "motion, norms over the video": lambda: UNetMotionModel(
        **SHARED, **MOTION, resnet_norms="video", motion_norms="video"
    ),
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
    limit = {torch.float64: 1e-12, torch.float32: 4e-6}[b.dtype]
    assert ((a.double() - b.double()).norm() / b.double().norm()).item() <= limit


@pytest.fixture
def no_optimize(monkeypatch):
    monkeypatch.setenv("MINIT2V_OPTIMIZE", "0")


# --------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("laid_out", [False, True])
@torch.no_grad()
def test_the_same_numbers(unet, dtype, laid_out):
    unet.to(dtype)
    x, t, context = inputs(dtype)
    per_frame = torch.randn(2, 3, 7, 16, dtype=dtype)
    calls = [(x, t, context), (x, 500, context), (x, t, per_frame), (x[:1], 7.5, context[:1]), (x, t[:1], context)]
    changes = [
        lambda: None,
        lambda: unet.enable_forward_chunking(1),
        lambda: unet.enable_freeu(0.9, 0.2, 1.5, 1.6),
        unet.disable_forward_chunking,
    ]
    run = fast.optimize(unet) if laid_out else fast.runner(unet)
    for change in changes:
        change()
        for call in calls:
            want = unet(*call)
            close(run(*call), want)
            close(run(*call), want)  # with the keys and values of before
    assert whole(unet)


def whole(network: torch.nn.Module) -> bool:
    """Whether everything was run by the fast path's functions: else these tests compare a network with itself."""
    known = fast.executors[network].known
    parts = {m for m in network.modules() if type(m) in PARTS}
    return parts == known and len(known) > 20


@torch.no_grad()
def test_the_image_model(randomize_):
    kinds = {name: tuple(kind.replace("Motion", "2D") for kind in MOTION[name]) for name in list(MOTION)[:2]}
    unet = randomize_(UNet2DConditionModel(**SHARED, attention_head_dim=2, **kinds)).double().eval()
    x, context = torch.randn(2, 4, 6, 4).double(), torch.randn(2, 7, 16).double()
    close(fast.runner(unet)(x, 5, context), unet(x, 5, context))
    assert whole(unet)
    with pytest.raises(ValueError, match="x must be"):
        fast.runner(unet)(x[None], 5, context)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_no_further_from_float64_than_plain(unet, dtype):
    want = unet.double()(*inputs(torch.float64))
    unet.to(dtype)
    call = inputs(dtype)
    exact = copy.deepcopy(unet).double()(*[v.double() if v.is_floating_point() else v for v in call])
    plain, got = unet(*call).double(), fast.runner(unet)(*call).double()
    assert torch.isfinite(want).all()
    assert (got - exact).norm() <= 1.1 * (plain - exact).norm()


@torch.no_grad()
def test_less_is_computed(unet, monkeypatch):
    """The text's keys and values once for all steps, and one product where weights lie together."""
    calls, linear = [], torch.nn.functional.linear

    def count(x, weight, bias=None):
        calls.append(tuple(weight.shape))
        return linear(x, weight, bias)

    x, t, context = inputs(torch.float64)
    unet.double()
    monkeypatch.setattr(torch.nn.functional, "linear", count)
    attentions, blocks = sum(b.attention for b in unet.blocks()), len(list(unet.blocks()))

    def products(run) -> int:
        calls.clear()
        run(x, t, context)
        return len(calls)

    run = fast.runner(unet)
    first, second = products(run), products(run)
    assert first - second == 2 * attentions
    run = fast.optimize(unet)
    assert products(run) - second == 2 * attentions - 2 * attentions - (blocks - 1)
    assert products(run) == second - 2 * attentions - (blocks - 1)
    context.mul_(2)
    assert products(run) == second - (blocks - 1), "a text that was written into is another"


@torch.no_grad()
def test_vae(randomize_):
    vae = randomize_(AutoencoderKL(**VAE)).eval()
    z, x = torch.randn(3, 4, 5, 4), torch.randn(3, 3, 10, 8)
    before = memory(vae)
    for run in (fast.runner(vae), fast.optimize(vae)):
        for chunk in (None, 2):
            close(run.decode(z, chunk), vae.decode(z, chunk))
            close(run.encode(x, chunk).mean, vae.encode(x, chunk).mean)
        vae.enable_tiling(8)
        close(run.decode(z), vae.decode(z))
        vae.disable_tiling()
        assert whole(vae)
    for bad in (lambda run: run.decode(z[:, :3]), lambda run: run.encode(x[..., :1]), lambda run: run.decode(z, 0)):
        with pytest.raises(ValueError) as of_fast:
            bad(run)
        with pytest.raises(ValueError) as of_plain:
            bad(vae)
        assert str(of_fast.value) == str(of_plain.value)
    fast.restore(vae)
    assert_same(memory(vae), before)


@torch.no_grad()
def test_the_same_errors(unet):
    x, t, context = inputs()
    run = fast.runner(unet)
    for bad in ((x[:, :3], t, context), (x, torch.zeros(3), context), (x, t, context[:1]), (x, t, context[..., :3])):
        with pytest.raises(ValueError) as of_plain:
            unet(*bad)
        with pytest.raises(ValueError) as of_fast:
            run(*bad)
        assert str(of_fast.value) == str(of_plain.value)


def test_no_module_writes_into_what_it_was_given(unet):
    """Inputs and text stay as they are, and so does a result after the next call."""
    call = inputs()
    kept = [v.clone() for v in call]
    run = fast.optimize(unet)
    with torch.no_grad():
        y = run(*call)
        first = y.clone()
        run(2 * call[0], *call[1:])
    assert torch.equal(y, first) and all(map(torch.equal, call, kept))


# ------------------------------------------------------------------------------------------------- what it gives way to


def test_gradients_pass_through(unet):
    """Training an optimized network trains its parameters."""
    x, t, context = inputs(torch.float64)
    unet.double()
    want = torch.autograd.grad(unet(x, t, context).square().sum(), list(unet.parameters()))
    run = fast.optimize(unet)
    for enable in (lambda: None, unet.enable_gradient_checkpointing):
        enable()
        got = torch.autograd.grad(run(x, t, context).square().sum(), list(unet.parameters()))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


class Half(torch.nn.Module):
    """What an adapter does: a layer around a layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, *inputs):
        return 0.5 * self.base(*inputs)


def one_of_each(unet: UNet) -> list[tuple[str, torch.nn.Module]]:
    """Of the modules whose names differ only in numbers, the first."""
    found = {}
    for name, module in unet.named_modules():
        if name and not isinstance(module, torch.nn.ModuleList) and type(module).__name__ != "Level":
            found.setdefault(re.sub(r"\d+", "0", name.replace("up.1", "up.last")), (name, module))
    return list(found.values())


@pytest.mark.parametrize("unet", ["3d", "motion"], indirect=True)
@torch.no_grad()
def test_nothing_that_is_wrapped_is_bypassed(unet):
    """Every module in turn is put into another one: the network sees it, and so does the fast path."""
    call = inputs(torch.float64, b=1, f=2)
    unet.double()
    run = fast.optimize(unet) if isinstance(unet, UNet3DConditionModel) else fast.runner(unet)
    plain = run(*call)
    for name, module in one_of_each(unet):
        parent = unet.get_submodule(name.rpartition(".")[0])
        if type(module).__name__ == "Block":
            continue  # it is asked for its parts
        child = name.rpartition(".")[2]
        setattr(parent, child, Half(module)) if not child.isdigit() else parent.__setitem__(int(child), Half(module))
        want = unet(*call)
        close(run(*call), want)
        setattr(parent, child, module) if not child.isdigit() else parent.__setitem__(int(child), module)
    close(run(*call), plain)
    assert whole(unet)


@pytest.mark.parametrize("unet", ["3d", "motion"], indirect=True)
@torch.no_grad()
def test_every_hook_is_called(unet):
    """A hook on any module sees what it sees in the plain network, and what it returns is used."""
    call = inputs(torch.float64, b=1, f=2)
    unet.double()
    run = fast.runner(unet)
    before = run(*call)
    for name, module in [("", unet), *one_of_each(unet)]:
        seen = []

        def hook(module, inputs, output, seen=seen):
            seen.append(output.clone())
            return 1.5 * output

        handle = module.register_forward_hook(hook)
        y = run(*call)
        got = list(seen)
        seen.clear()
        close(y, unet(*call))
        assert len(seen) == len(got) == 1, name
        close(got[0], seen[0])
        handle.remove()
    close(run(*call), before)
    assert whole(unet)
    calls = []
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    run(*call)
    everywhere.remove()
    assert len(calls) > 50


@torch.no_grad()
def test_subclasses_and_changed_methods_run_as_written(unet3d, monkeypatch):
    class Doubled(ResBlock):
        def forward(self, x, emb, span=1):
            return 2 * super().forward(x, emb, span)

    class Causal(FrameAttention):
        def forward(self, x):
            return super().forward(x).cumsum(1)

    call = inputs(torch.float64)
    unet3d.double()
    run = fast.runner(unet3d)
    plain = run(*call)
    block = unet3d.mid[0]
    block.res.__class__, attention = Doubled, block.temporal.block.attn1
    close(run(*call), unet3d(*call))
    assert not torch.allclose(run(*call), plain)
    block.res.__class__, attention.__class__ = ResBlock, Causal
    close(run(*call), unet3d(*call))
    assert not torch.allclose(run(*call), plain)
    attention.__class__ = FrameAttention
    attention.forward = lambda x: 3 * x  # of this one alone
    close(run(*call), unet3d(*call))
    del attention.forward
    unet3d.forward = lambda x, t, context: 7 * x
    assert torch.equal(run(*call), 7 * call[0])
    del unet3d.forward
    close(run(*call), plain)
    with monkeypatch.context() as patch:  # of the class
        patch.setattr(ResBlock, "forward", lambda self, x, emb, span=1: self.skip(x))
        close(run(*call), unet3d(*call))
        assert not torch.allclose(run(*call), plain)
    attention.to_v.bias = torch.nn.Parameter(torch.ones_like(attention.to_v.weight[:, 0]))
    fast.optimize(unet3d)
    close(fast.runner(unet3d)(*call), unet3d(*call))

    class MyUNet(UNet3DConditionModel):
        pass

    mine = MyUNet(unet3d.config)
    assert fast.runner(mine) is mine


@torch.no_grad()
def test_layers_of_other_sizes_run_as_written(unet3d):
    call, block = inputs(), unet3d.mid[0]
    run, conv, c = fast.runner(unet3d), torch.nn.Conv3d, unet3d.config.block_out_channels[-1]
    changes = [
        (block.temporal_conv.convs, "1", conv(c, c, (5, 1, 1), padding=(2, 0, 0))),
        (block.temporal_conv.convs, "2", conv(c, c, (3, 1, 1), padding=(1, 0, 0), bias=False)),
        (block.temporal_conv.convs, "0", conv(c, c, (3, 1, 1), padding=(1, 0, 0), padding_mode="circular")),
        (block.res, "conv1", torch.nn.Conv2d(c, c, 3, padding=1, bias=False)),
        (block.res, "conv2", torch.nn.Conv2d(c, c, 3, padding=2, dilation=2, groups=2)),
        (block.res, "skip", torch.nn.Conv2d(c, c, 3, padding=1)),
        (block.spatial.block.ff, "proj_in", torch.nn.Linear(c, 8 * c, bias=False)),
        (block.res, "norm1", torch.nn.GroupNorm(4, c)),
        (block.res, "norm2", torch.nn.GroupNorm(8, c, affine=False)),
    ]
    for parent, name, other in changes:
        before = parent._modules[name]
        parent._modules[name] = other
        close(run(*call), unet3d(*call))
        parent._modules[name] = before
    close(run(*call), unet3d(*call))
    assert whole(unet3d)


@torch.no_grad()
def test_autocast_and_other_dtypes_run_as_written(unet3d):
    call = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        want = unet3d(*call)
        assert torch.equal(fast.runner(unet3d)(*call), want)
    with pytest.raises(RuntimeError):
        fast.runner(unet3d)(call[0].half(), *call[1:])


def test_the_door(unet3d, monkeypatch, caplog):
    class Other(UNet3DConditionModel):
        pass

    assert fast.runner(unet3d).executor is fast.runner(unet3d).executor
    fast.restore(unet3d)
    assert fast.runner(unet3d) is unet3d, "until it is optimized"
    assert fast.optimize(unet3d).executor is fast.runner(unet3d).executor
    monkeypatch.setenv("MINIT2V_OPTIMIZE", "0")
    assert fast.runner(unet3d) is unet3d
    monkeypatch.setenv("MINIT2V_OPTIMIZE", "yes")
    with pytest.raises(ValueError, match="MINIT2V_OPTIMIZE must be 0 or 1, not 'yes'"):
        fast.runner(unet3d)
    monkeypatch.delenv("MINIT2V_OPTIMIZE")
    other = Other(unet3d.config)
    assert fast.optimize(other) is other and fast.runner(other) is other
    assert "The fast path does not know the class Other" in caplog.text
    assert fast.runner(None) is None


# ----------------------------------------------------------------------------------------------------------- its state


@torch.no_grad()
def test_by_default_nothing_is_moved(unet):
    before = memory(unet)
    places = [p.data_ptr() for p in unet.parameters()]
    fast.runner(unet)(*inputs())
    assert_same(memory(unet), before)
    assert places == [p.data_ptr() for p in unet.parameters()]


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
    fast.restore(unet)  # nothing to do
    assert_same(memory(unet), before)


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


@pytest.mark.parametrize("laid_out", [False, True])
@torch.no_grad()
def test_it_keeps_up_with_its_weights(unet, randomize_, tmp_path, laid_out):
    """In place, through .data, replaced, cast, loaded: the numbers are those of the weights that are there."""
    x, t, context = inputs()
    run = fast.optimize(unet) if laid_out else fast.runner(unet)

    def check(dtype: torch.dtype = torch.float32) -> None:
        plain = copy.deepcopy(unet)
        assert plain not in fast.executors
        close(run(x.to(dtype), t, context.to(dtype)), plain(x.to(dtype), t, context.to(dtype)))
        attention = next(m for m in unet.modules() if isinstance(m, Attention))
        if laid_out:
            together = run.executor.ops.together[attention]
            weights = attention.to_q.weight, attention.to_k.weight, attention.to_v.weight
            assert torch.equal(together, torch.cat(weights))
            assert together.data_ptr() == attention.to_q.weight.data_ptr(), "one memory for both"

    check()
    for p in unet.parameters():
        p.mul_(1.01)
    check()
    for p in unet.parameters():
        p.data += 0.01  # which PyTorch does not count as a change
    run = fast.runner(unet)
    check()
    for p in unet.parameters():
        p.data = p.data * 1.01
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
    runs = fast.optimize(first), fast.optimize(second)
    places = [p.data_ptr() for p in first.parameters()]
    for _ in range(2):
        for run, y in zip(runs, want, strict=True):
            close(run(x, t, context), y)
    assert [p.data_ptr() for p in first.parameters()] == places, "they do not take the weights from each other"
    next(first.parameters()).mul_(1.5)
    fast.restore(second)
    close(runs[0](x, t, context), copy.deepcopy(first)(x, t, context))


def test_a_network_is_freed_at_once(unet3d):
    for prepare in (fast.runner, fast.optimize):
        network = type(unet3d)(unet3d.config)
        with torch.no_grad():
            prepare(network)(*inputs())
        gone = weakref.ref(network)
        gc.disable()
        try:
            del network
            assert gone() is None
        finally:
            gc.enable()


def test_texts_under_inference_mode(unet3d):
    """There nobody counts what is written into a tensor."""
    x, t, context = inputs()
    run = fast.runner(unet3d)
    with torch.inference_mode():
        context = context.clone()
        close(run(x, t, context), unet3d(x, t, context))
        context.mul_(2)
        close(run(x, t, context), unet3d(x, t, context))


# --------------------------------------------------------------------------------------------------------- CUDA graphs


class FakeGraphs:
    """`fast.graphs.capture` on the CPU: a replay computes anew, out of the same tensors and into the same tensor."""

    def __init__(self, monkeypatch):
        self.captures = self.replays = 0
        self.shared = []  # of each capture, whether it shares another one's memory
        monkeypatch.setattr(fast_graphs, "capture", self.capture)
        monkeypatch.setattr("minit2v.fast.executor.can_capture", lambda x: True)

    def capture(self, run, device, other):
        self.captures += 1
        self.shared.append(other is not None)
        y = run()

        def replay():
            self.replays += 1
            y.copy_(run())

        return fast_graphs.Capture(SimpleNamespace(replay=replay), None, y)


@pytest.fixture
def graphs(monkeypatch):
    return FakeGraphs(monkeypatch)


@torch.no_grad()
def test_a_graph_per_shape(unet, graphs):
    want, given = [], []
    for n, size in enumerate([(2, 3, 5, 3), (2, 3, 5, 3), (1, 2, 4, 4), (2, 3, 5, 3)]):
        given.append(inputs(torch.float32, *size, seed=n))
        want.append(unet(*given[-1]))
    run = fast.optimize(unet, graphs=True)
    got = [run(*call) for call in given]
    for a, b in zip(got, want, strict=True):  # compared at the end: no call may write into the results of another
        close(a, b)
    assert (graphs.captures, graphs.replays) == (2, 4)
    unet.enable_freeu(0.9, 0.2, 1.5, 1.6)
    close(run(*given[0]), unet(*given[0]))
    unet.disable_freeu()
    close(run(*given[0]), want[0])
    assert graphs.captures == 3
    for f in range(1, 9):
        run(*inputs(f=f))
    assert len(run.executor.graphs.graphs) == fast_graphs.MOST_GRAPHS
    captures = graphs.captures
    fast.restore(unet)
    assert torch.equal(fast.runner(unet)(*given[0]), want[0]) and graphs.captures == captures
    assert graphs.shared == [False] + [True] * (captures - 1)


@torch.no_grad()
def test_a_graph_and_its_weights(unet3d, graphs):
    call = inputs()
    run = fast.optimize(unet3d, graphs=True)
    run(*call)
    for p in unet3d.parameters():
        p.mul_(1.01)
    close(run(*call), copy.deepcopy(unet3d)(*call))
    assert graphs.captures == 1, "a change in place is seen by the graph"
    unet3d.to(torch.float64).to(torch.float32)
    close(run(*call), copy.deepcopy(unet3d)(*call))
    assert graphs.captures == 2
    unet3d.conv_in.weight = torch.nn.Parameter(torch.randn_like(unet3d.conv_in.weight))
    close(run(*call), copy.deepcopy(unet3d)(*call))
    assert graphs.captures == 3 and graphs.shared == [False] * 3, "none shares memory with one that is gone"


def test_a_graph_in_every_mode(unet3d, graphs, monkeypatch):
    """Captured under inference_mode and replayed without it; none under gradients, autocast or for another choice."""
    call = inputs()
    run = fast.optimize(unet3d, graphs=True)
    with torch.inference_mode():
        first = run(*call)
    with torch.no_grad():
        assert torch.equal(run(*call), first)
        assert (graphs.captures, graphs.replays) == (1, 2)
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(run(*call), first)
        assert graphs.replays == 2
        monkeypatch.setenv("MINIT2V_KERNELS", "torch")
        run(*call)
        assert (graphs.captures, graphs.replays) == (2, 3)
    assert run(*call).requires_grad and graphs.replays == 3


@torch.no_grad()
def test_hooks_are_called_and_not_captured(unet3d, graphs):
    call, calls = inputs(), []
    run = fast.optimize(unet3d, graphs=True)
    run(*call)
    for module in (unet3d, unet3d.mid[0]):
        hook = module.register_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
        run(*call)
        hook.remove()
    run(*call)
    assert calls == ["UNet3DConditionModel", "Block"] and graphs.replays == 2


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
    run = fast.optimize(unet, graphs=True)
    for _ in range(2):
        for call, y in zip(given, want, strict=True):
            assert ((run(*call).double() - y.double()).norm() / y.double().norm()).item() < 2e-3  # TF32 may differ
    assert len(run.executor.graphs.graphs) == 2
    unet.enable_freeu(0.9, 0.2, 1.5, 1.6)
    assert torch.isfinite(run(*given[0])).all()
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

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **kw: compile(module, backend=backend, fullgraph=True, **kw))
    call = inputs()
    want = unet3d(*call)
    run = fast.optimize(unet3d, compile=True)
    close(run(*call), want)
    compiled = len(calls)
    blocks = len(list(unet3d.blocks()))
    assert 2 <= compiled <= blocks, "a block is one piece: no graph breaks"
    close(run(*call), want)
    assert len(calls) == compiled
    seen = []
    unet3d.mid[0].res.register_forward_hook(lambda m, args, y: seen.append(m))
    close(fast.runner(unet3d)(*call), want)
    assert len(seen) == 1, "compiled code calls no hook that came later"
    fast.restore(unet3d)
    assert torch.equal(fast.runner(unet3d)(*call), want)
