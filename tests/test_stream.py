"""Weights that come and go: the same numbers on both paths, nothing of a user's changes lost, everything put back."""

import copy
import io
import itertools
import os

import pytest
import torch

from minit2v import AutoencoderKL, CLIPTextModel, UNet3DConditionModel, fast
from minit2v.memory import stream as streaming
from minit2v.memory.stream import Bring, Narrow, find_units, is_streamed, mapped_spans, room, split, stream, unstream


@pytest.fixture(scope="module")
def small(small_configs):
    return small_configs


@pytest.fixture
def unet(small, randomize_):
    return randomize_(UNet3DConditionModel(**small["UNet3DConditionModel"])).eval()


def inputs(b=2, f=3):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(b, 4, f, 8, 8, generator=g), torch.tensor([500]).expand(b), torch.randn(b, 5, 24, generator=g))


def predict(network, written=False):
    with torch.no_grad():
        return (network if written else fast.runner(network))(*inputs())


def places(network):
    return {name: (p.data_ptr(), p.dtype, p.stride(), p._version, p.requires_grad)
            for name, p in [*network.named_parameters(), *network.named_buffers()]}  # fmt: skip


WAYS = [dict(), dict(per_unit=3), dict(units="leaf")]


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_same_numbers_and_everything_put_back(unet, way, written):
    want, before, hooks = predict(unet, written), places(unet), [len(m._forward_hooks) for m in unet.modules()]
    stream(unet, **way)
    seen = []
    owner = streaming.streams[unet]
    enter = owner.enter
    owner.enter = lambda unit: (seen.append(unit), enter(unit))[1]
    got = predict(unet, written)
    torch.testing.assert_close(got, want, rtol=0, atol=0 if way.get("units") != "leaf" or written else 1e-5)
    assert {id(u) for u in seen} == {id(u) for u in owner.order}, "every unit came in, and by its hook"
    assert all(u.inside == 0 and u.homes is None for u in owner.order)
    assert places(unet) == before, "between calls every weight is at home"
    unstream(unet)
    assert places(unet) == before and not is_streamed(unet)
    assert [len(m._forward_hooks) for m in unet.modules()] == hooks
    assert torch.equal(predict(unet, written), want)


def test_the_fast_path_stays_fast(unet):
    """Blocks that come and go are not run as they are written."""
    stream(unet)
    calls = []
    executor = fast.runner(unet).executor
    predict(unet)
    assert all(m in executor.known for m in [*unet.blocks(), unet.temporal_in])
    unet.up[0].blocks[0].register_forward_hook(lambda *_: calls.append(1))
    want = predict(unet)
    assert unet.up[0].blocks[0] not in executor.known and calls == [1], "a user's hook is heard"
    unstream(unet)
    torch.testing.assert_close(predict(unet), want)
    assert calls == [1, 1]


def test_units_hold_every_parameter_once(unet, small):
    for units, network in [("block", unet), ("leaf", unet), ("leaf", CLIPTextModel(**small["CLIPTextModel"])),
                           ("leaf", AutoencoderKL(**small["AutoencoderKL"]))]:  # fmt: skip
        stay, groups = split(network, units)
        found = [*stay, *itertools.chain.from_iterable(groups)]
        assert len(found) == len({*map(id, found)}) == len([*network.parameters(), *network.buffers()])
    assert sum(room(g) for g in split(unet)[1]) > 0.5 * sum(p.nbytes for p in unet.parameters())
    with pytest.raises(ValueError, match="AutoencoderKL cannot be offloaded block by block"):
        find_units(AutoencoderKL(**small["AutoencoderKL"]))


@pytest.mark.parametrize("make,call", [
    ("CLIPTextModel", lambda m: m(torch.arange(8).view(2, 4))),
    ("AutoencoderKL", lambda m: fast.runner(m).decode(torch.ones(2, 4, 4, 4))),
    ("AutoencoderKL", lambda m: m.encode(torch.ones(2, 3, 8, 8)).mean),
])  # fmt: skip
def test_other_networks_by_layers(small, randomize_, make, call):
    network = randomize_({"CLIPTextModel": CLIPTextModel, "AutoencoderKL": AutoencoderKL}[make](**small[make])).eval()
    with torch.no_grad():
        want = call(network)
        before = places(network)
        stream(network, units="leaf")
        torch.testing.assert_close(call(network), want)
        unstream(network)
        assert places(network) == before and torch.equal(call(network), want)


@pytest.mark.parametrize("store,error", [("int8", 0.05), ("fp8", 0.3)])
@pytest.mark.parametrize("written", [False, True])
def test_eight_bits(unet, store, error, written):
    want, before = predict(unet, written), places(unet)
    stream(unet, store=store)
    got = predict(unet, written)
    assert 1e-5 < (got - want).norm() / want.norm() < error
    for resident in (False, True):
        for way in WAYS:
            stream(unet, store=store, resident=resident, **way)
            torch.testing.assert_close(predict(unet, written).norm(), got.norm(), rtol=0.05, atol=0)
    stream(unet, store=store, resident=True)
    torch.testing.assert_close(predict(unet, written), got, rtol=0, atol=0)
    narrow = [n for unit in streaming.streams[unet].order for _, n in unit.narrow.values()]
    assert narrow and all(n.values.element_size() == 1 for n in narrow)
    assert places(unet) == before, "the parameters themselves are as they were: they are what is saved"
    unstream(unet)
    assert torch.equal(predict(unet, written), want)


def test_narrow_is_near():
    x = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0))
    x[2] = 0
    for store, most in (("int8", 0.5 / 127), ("fp8", 1 / 16)):
        y = torch.empty_like(x)
        Narrow(x, store, torch.device("cpu")).widen_into(y)
        assert torch.isfinite(y).all() and (y[2] == 0).all()
        assert ((y - x).abs().flatten(1).amax(1) <= most * x.abs().flatten(1).amax(1) * 1.001).all(), store
        half = torch.empty_like(x, dtype=torch.half)
        Narrow(x.half(), store, torch.device("cpu")).widen_into(half)
        assert ((half - x).abs().flatten(1).amax(1) <= (most + 2e-3) * x.abs().flatten(1).amax(1)).all(), store


@pytest.mark.parametrize("store", [None, "int8"])
def test_what_a_user_changes_counts_at_once_and_stays(unet, store):
    block = unet.up[0].blocks[0]
    stream(unet, store=store)
    predict(unet)
    with torch.no_grad():
        block.res.conv1.weight.mul_(2)
        block.res.conv2.weight.data = block.res.conv2.weight.data.clone().neg_()
    got = predict(unet)
    other = copy.deepcopy(unet)
    assert not any(h.unit for m in other.modules() for h in m._forward_hooks.values() if isinstance(h, Bring))
    unstream(unet)
    stream(other, store=store)
    torch.testing.assert_close(predict(other), got, rtol=0, atol=0)
    torch.testing.assert_close(predict(unet), got, rtol=0, atol=0 if store is None else 1)
    content = io.BytesIO()
    stream(unet, store=store)
    torch.save(unet.state_dict(), content)
    content.seek(0)
    saved = torch.load(content)
    unstream(unet)
    assert all(torch.equal(v, saved[k]) for k, v in unet.state_dict().items())


def test_after_an_error_everything_is_at_home(unet):
    before, want = places(unet), predict(unet)
    stream(unet)
    with pytest.raises(torch.OutOfMemoryError), torch.no_grad():
        hook = unet.mid[0].res.register_forward_hook(fail)
        fast.runner(unet)(*inputs())
    assert places(unet) == before
    hook.remove()
    assert torch.equal(predict(unet), want)
    unstream(unet)


def fail(*_):
    raise torch.OutOfMemoryError("none left")


def test_gradients(unet):
    """Backward would find other weights in the buffer."""
    x, t, text = inputs()
    unet(x, t, text).square().mean().backward()
    want = unet.up[0].blocks[0].res.conv1.weight.grad.clone()
    unet.zero_grad()
    stream(unet)
    with pytest.raises(RuntimeError, match="gradients"):
        unet(x, t, text)
    unstream(unet)
    unet(x, t, text).square().mean().backward()
    torch.testing.assert_close(unet.up[0].blocks[0].res.conv1.weight.grad, want)


def test_wrong_words(unet):
    for wrong, message in [(dict(units="blok"), "units must be one of block, leaf, not 'blok' .nearest: 'block'"),
                           (dict(store="int4"), "store must be one of"), (dict(per_unit=0), "per_unit"),
                           (dict(resident=True), "give store")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            stream(unet, **wrong)
    assert not is_streamed(unet)


def resident(span):
    """Bytes of the pages from one address to another that are in memory of this process."""
    begin = end = size = 0
    with open("/proc/self/smaps") as lines:
        for line in lines:
            first = line.split()[0]
            if "-" in first and not first.endswith(":"):
                begin, end = (int(x, 16) for x in first.split("-"))
            elif first == "Rss:" and begin < span[1] and end > span[0]:
                size += 1024 * int(line.split()[1])
    return size


@pytest.mark.skipif(not hasattr(__import__("os"), "posix_fadvise"), reason="asks Linux what is resident")
def test_mapped_weights_are_let_go(unet, tmp_path):
    unet.save_pretrained(tmp_path / "unet")
    os.sync()  # the system keeps pages that are not on the disk yet
    mapped = UNet3DConditionModel.from_pretrained(tmp_path / "unet")
    weight = mapped.up[0].blocks[0].res.conv1.weight
    span = next(s for s in mapped_spans() if s[0] <= weight.data_ptr() < s[1])
    want = predict(mapped)
    full = resident(span)
    assert full > 0.9 * weight.nbytes
    stream(mapped)
    torch.testing.assert_close(predict(mapped), want, rtol=0, atol=0)
    assert resident(span) < 0.5 * full
    unstream(mapped)
