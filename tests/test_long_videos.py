"""Context windows, FreeNoise, a text for each frame: the rules of docs/long-videos.md, and whole pipelines."""

import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from minit2v import AnimateDiffPipeline, DiffusionPipeline, MotionAdapter
from minit2v.techniques.context_windows import FUSIONS, SCHEDULES, ContextWindows, Windowed, fitting, halving, weights
from minit2v.techniques.frame_prompts import check_frame_prompts, spread_over_frames
from minit2v.techniques.free_noise import FreeNoise


def seed(n=0):
    return torch.Generator().manual_seed(n)


# Windows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length,overlap,stride", [(4, 0, 1), (4, 3, 3), (5, 1, 2), (16, 4, 2)])
@pytest.mark.parametrize("schedule,loop", [("uniform", False), ("uniform", True), ("static", False), ("static", True),
                                           ("batched", False)])  # fmt: skip
def test_windows_hold_every_frame(length, overlap, stride, schedule, loop):
    settings = ContextWindows(length, stride, overlap, loop, schedule=schedule)
    for frames, call in product(range(1, 70), range(4)):
        windows = settings.windows(frames, call)
        assert {i for w in windows for i in w} == set(range(frames))
        assert all(len(w) == len(set(w)) == min(length, frames) for w in windows)
        gaps = {(b - a) % frames for w in windows for a, b in zip(w, w[1:], strict=False)}
        assert gaps <= {2**k for k in range(stride)}, "neighbours, and frames at doubled distances"
        if not loop:
            assert all(w == sorted(w) for w in windows)


def test_windows_as_the_page_shows_them():
    page = ContextWindows(length=4, overlap=2)
    assert page.windows(10, 0) == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9]]
    assert page.windows(10, 1) == [[0, 1, 2, 3], [1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 8], [6, 7, 8, 9]]
    assert ContextWindows(4, 2, 2).windows(10, 0)[4:] == [[0, 2, 4, 6], [3, 5, 7, 9]]
    loop = ContextWindows(length=4, overlap=1, loop=True)
    assert loop.windows(10, 0) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9], [9, 0, 1, 2]]
    assert loop.windows(10, 1) == [[5, 6, 7, 8], [8, 9, 0, 1], [1, 2, 3, 4], [4, 5, 6, 7]]
    assert loop.windows(4, 1) == [[2, 3, 0, 1]], "a loop of one window is turned, so that its border moves, too"
    assert ContextWindows(4, overlap=1, schedule="batched").windows(10, 3) == [[0, 1, 2, 3], [4, 5, 6, 7], [6, 7, 8, 9]]
    assert [halving(n) for n in range(8)] == [0, 1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8, 3 / 8, 7 / 8]


def test_weights():
    assert weights(5, "flat") == [1, 1, 1, 1, 1]
    assert weights(5, "pyramid") == [1, 2, 3, 2, 1] and weights(4, "pyramid") == [1, 2, 2, 1]
    assert weights(5, "delayed_reverse_sawtooth") == [0.01, 0.01, 3, 2, 1]
    assert weights(4, "delayed_reverse_sawtooth") == [0.01, 2, 2, 1]
    ramp = ContextWindows(6, overlap=2, fuse="overlap_linear")
    third = pytest.approx(1 / 3)
    assert ramp.weights([0, 1, 2, 3, 4, 5], 10) == [1, 1, 1, 1, pytest.approx(2 / 3), third]
    assert ramp.weights([4, 5, 6, 7, 8, 9], 10) == [third, pytest.approx(2 / 3), 1, 1, 1, 1]


@pytest.mark.parametrize("fuse", FUSIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("per_call", [1, 3])
def test_predictions_are_averaged(fuse, schedule, per_call):
    """Against sums frame by frame; the network sees a window, its text, and nothing else."""
    settings = ContextWindows(4, 2, 1, False, fuse, schedule, per_call)
    x, text = torch.randn(2, 3, 11, 2, 2, generator=seed()), torch.randn(2, 11, 5, 3, generator=seed(1))
    seen = []

    def network(x, t, context):
        assert t == 7 and x.shape[2] == 4 and context.shape[1] == 4
        seen.append(len(x) // 2)
        return x.cumsum(2) * context.mean((2, 3))[:, None, :, None, None]  # each frame depends on those before it

    windowed = Windowed(settings, network)
    for call in range(3):
        seen.clear()
        total, mass = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(11, dtype=torch.float64)
        for window in settings.windows(11, call):
            y = network(x[:, :, window], 7, text[:, window])
            for i, weight in enumerate(settings.weights(window, 11)):
                total[:, :, window[i]] += weight * y[:, :, i]
                mass[window[i]] += weight
        want = total / mass[:, None, None]
        windows = len(seen)
        seen.clear()
        torch.testing.assert_close(windowed(x, 7, text).double(), want, rtol=1e-5, atol=1e-5)
        assert seen == [per_call] * (windows // per_call) + [windows % per_call] * (windows % per_call > 0)


def test_a_text_stays_one_object():
    """The fast path keeps the keys and values of a text as long as it is the same tensor."""
    seen = []
    for per_call in (1, 2):
        network = Windowed(ContextWindows(4, overlap=0, per_call=per_call), lambda x, t, c: seen.append(c) or x)
        text = torch.randn(1, 5, 3)
        for _ in range(2):
            network(torch.randn(1, 3, 8, 2, 2), 7, text)
        assert len({id(c) for c in seen}) == 1
        assert len(seen[0]) == per_call
        seen.clear()


def test_as_many_windows_as_fit():
    assert [fitting(10, free) for free in (0, 9, 12, 40, 10_000)] == [1, 1, 1, 3, 8]


@pytest.mark.parametrize("fields,message", [
    (dict(length=0), "length must be a whole number of at least 1, not 0"),
    (dict(length=True), "length must be"),
    (dict(overlap=16), "overlap 16 must be less than length 16"),
    (dict(overlap=-1), "overlap must be a whole number of at least 0"),
    (dict(stride=1.5), "stride must be"),
    (dict(per_call=0), "per_call must be"),
    (dict(loop=1), "loop must be True or False"),
    (dict(fuse="piramid"), "fuse must be one of .*did you mean 'pyramid'|fuse must be one of .*pyramid"),
    (dict(schedule="looped"), "schedule must be one of"),
    (dict(schedule="batched", loop=True), "joins the last frame to the first"),
    (dict(fuse="overlap_linear", overlap=9), "at most half of the length 16, not 9"),
])  # fmt: skip
def test_windows_that_do_not_fit(shapes, fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        shapes.enable_context_windows(**fields)
    assert not shapes.context_windows_enabled


# FreeNoise ------------------------------------------------------------------------------------------------------------


def test_noise_of_one_window():
    noise = torch.randn(2, 1, 20, 1, 1, generator=seed())
    settings = FreeNoise(8, 3)
    long = settings.stretch(noise, 20, seed(5))
    assert torch.equal(long[:, :, :8], noise[:, :, :8]) and long.shape[2] == 20
    for begin in range(8, 20, 3):  # the noise of 8 frames before, in another order
        end = min(begin + 3, 20)
        before = long[:, :, begin - 8 : begin - 5]
        assert all(any(torch.equal(long[:, :, i], before[:, :, j]) for j in range(3)) for i in range(begin, end))
    assert not torch.equal(long[:, :, 8:11], long[:, :, :3])
    assert torch.equal(settings.stretch(noise[:, :, :8], 20, seed(5)), long), "the noise of a window is enough"
    alone = torch.cat([settings.stretch(noise[i : i + 1], 20, seed(i)) for i in range(2)])
    assert torch.equal(settings.stretch(noise, 20, [seed(0), seed(1)]), alone)
    repeated = FreeNoise(8, 3, noise_type="repeat_context").stretch(noise, 20, None)
    assert torch.equal(repeated, noise[:, :, [i % 8 for i in range(20)]])
    with pytest.raises(ValueError, match="latents must have 20 frames, not 8"):
        FreeNoise(8, 3, noise_type="random").stretch(noise[:, :, :8], 20, None)


def test_attention_in_windows():
    """Every frame is the weighted mean of what the windows that hold it say, also at the end."""
    settings = FreeNoise(4, 3, "pyramid")
    x = torch.randn(2, 9, 3, 5, generator=seed(), dtype=torch.float64)
    total, mass = torch.zeros_like(x), torch.zeros(9, dtype=torch.float64)
    for begin in (0, 3, 5):
        y = x[:, begin : begin + 4].cumsum(1)
        for i, weight in enumerate((1, 2, 2, 1)):
            total[:, begin + i] += weight * y[:, i]
            mass[begin + i] += weight
    want = total / mass[:, None, None]
    torch.testing.assert_close(settings.average(lambda v: v.cumsum(1), x), want)
    assert torch.equal(settings.average(lambda v: v.cumsum(1), x[:, :4]), x[:, :4].cumsum(1))


@pytest.mark.parametrize("arguments,message", [
    (dict(context_length=0), "context_length must be a whole number"),
    (dict(context_length=17), "context_length 17 is too long: the motion modules have 16 positions"),
    (dict(context_length=4, context_stride=5), "context_stride must be at most context_length 4, not 5"),
    (dict(weighting_scheme="overlap_linear"), "weighting_scheme must be one of flat, pyramid"),
    (dict(noise_type="shuffle"), "noise_type must be one of"),
    (dict(prompt_interpolation_callback="linear"), "must be a function"),
])  # fmt: skip
def test_free_noise_that_does_not_fit(animate, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        animate.enable_free_noise(**arguments)
    assert not animate.free_noise_enabled


# Texts of single frames -----------------------------------------------------------------------------------------------


def test_states_between_two_texts():
    a, b = torch.randn(2, 1, 4, 6, generator=seed()).unbind(0)
    states = spread_over_frames(torch.cat([a, b]), [2, 6], 9)
    for i, share in enumerate((0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1)):
        torch.testing.assert_close(states[i], ((1 - share) * a + share * b)[0])
    arc = spread_over_frames(torch.cat([a, b]), [0, 8], 9, "spherical")
    torch.testing.assert_close(arc[[0, 8]], torch.cat([a, b]))
    unit = lambda v: v / v.norm(dim=-1, keepdim=True)  # noqa: E731
    even = spread_over_frames(torch.cat([unit(a), unit(b)]), [0, 8], 9, "spherical")
    angles = torch.acos((even[1:] * even[:-1]).sum(-1).clamp(-1, 1))
    torch.testing.assert_close(even.norm(dim=-1), torch.ones(9, 4))
    torch.testing.assert_close(angles, angles.mean(0).expand(8, -1), rtol=1e-3, atol=1e-4)
    same = spread_over_frames(torch.cat([a, 2 * a]), [0, 2], 3, "spherical")
    torch.testing.assert_close(same[1], 1.5 * a[0])


@pytest.mark.parametrize("prompts,message", [
    ({}, "prompt is an empty dictionary"),
    ({-1: "a"}, "a frame must be a whole number from 0, not -1"),
    ({"0": "a"}, "a frame must be a whole number from 0, not '0'"),
    ({8: "a"}, "there is no frame 8, only 0 to 7"),
    ({0: None}, "frame 0 must have a text, not None"),
])  # fmt: skip
def test_texts_that_do_not_fit(prompts, message, shapes):
    with pytest.raises(ValueError, match=message):
        check_frame_prompts("prompt", prompts, 8)
    with pytest.raises(ValueError, match=message):
        shapes(prompts, num_frames=8)


# Pipelines ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded():
    base = DiffusionPipeline.from_pretrained("shapes")
    motion = AnimateDiffPipeline.from_pretrained(
        "shapes-image", motion_adapter=MotionAdapter.from_pretrained("shapes-motion")
    )
    for pipe in (base, motion):
        pipe.set_progress_bar_config(disable=True)
    return base, motion


def off(pipe):
    pipe.disable_context_windows()
    pipe.disable_free_noise()
    pipe.disable_free_init()
    return pipe


@pytest.fixture
def shapes(loaded):
    yield loaded[0]
    off(loaded[0])


@pytest.fixture
def animate(loaded):
    yield loaded[1]
    off(loaded[1])


@pytest.fixture(params=["shapes", "animate"])
def pipe(request, loaded):
    pipe = loaded[request.param == "animate"]
    yield pipe
    off(pipe)


def make(pipe, prompt="a red circle moving right", **call):
    small = dict(num_frames=6, num_inference_steps=2, guidance_scale=2.0, output_type="latent", height=32, width=32)
    return pipe(prompt, generator=seed(3), **small | call).frames


def test_one_window_is_no_window(pipe):
    plain = make(pipe)
    pipe.enable_context_windows(6, stride=3, overlap=2)
    assert pipe.context_windows_enabled and torch.equal(make(pipe), plain)
    pipe.enable_context_windows(4, overlap=2)
    assert not torch.equal(make(pipe), plain)
    pipe.disable_context_windows()
    pipe.enable_free_noise(6)
    assert torch.equal(make(pipe), plain)


def test_the_unet_sees_a_window_at_a_time(pipe):
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape)))
    pipe.enable_context_windows(4, overlap=1)
    try:
        video = make(pipe, num_frames=40)
    finally:
        hook.remove()
    assert video.shape[2] == 40 and video.isfinite().all()
    assert {shape[2] for shape in seen} == {4} and {shape[0] for shape in seen} == {2}


def test_windows_of_several_videos_at_once(pipe):
    """The same numbers whatever the number of windows in a call, and whatever the neighbours in the batch."""
    prompts = ["a red circle moving right", "a blue square growing"]
    pipe.enable_context_windows(4, overlap=2, per_call=1)
    call = dict(num_frames=9, num_inference_steps=2, output_type="latent", height=32, width=32, guidance_scale=2.0)
    one = pipe(prompts, generator=[seed(0), seed(1)], **call).frames
    pipe.enable_context_windows(4, overlap=2, per_call=3)
    torch.testing.assert_close(pipe(prompts, generator=[seed(0), seed(1)], **call).frames, one, rtol=1e-4, atol=1e-4)
    alone = pipe(prompts[1], generator=seed(1), **call).frames
    torch.testing.assert_close(one[1:], alone, rtol=1e-4, atol=1e-4)


def test_a_loop_begins_anywhere(shapes):
    """A loop of the same noise, turned by some frames, is the same video, turned: no frame is the first."""
    latents = torch.randn(1, 4, 12, 4, 4, generator=seed())
    videos = []
    for turn in (0, 3):
        shapes.enable_context_windows(4, overlap=1, loop=True, schedule="static")
        video = make(shapes, num_frames=12, latents=latents.roll(turn, 2))
        videos.append(video.roll(-turn, 2))
    torch.testing.assert_close(videos[0], videos[1], rtol=1e-4, atol=1e-4)


def test_a_text_for_each_frame(pipe):
    pipe.enable_context_windows(4, overlap=2)
    texts = {0: "a red circle moving right", 7: "a blue square growing"}
    long = make(pipe, texts, num_frames=8, negative_prompt={0: "", 5: "green"})
    assert long.isfinite().all()
    for constant in ({0: "a red circle moving right"}, {5: "a red circle moving right"}):
        torch.testing.assert_close(make(pipe, constant, num_frames=8), make(pipe, num_frames=8), rtol=1e-4, atol=1e-4)
    text, negative = pipe.encode_prompt(texts, negative_prompt="green", num_frames=8)
    assert text.shape == negative.shape and text.shape[:2] == (1, 8)
    given = make(pipe, None, prompt_embeds=text, negative_prompt_embeds=negative, num_frames=8)
    assert torch.equal(given, make(pipe, texts, negative_prompt="green", num_frames=8))
    arc = make(pipe, texts, num_frames=8, prompt_interpolation="spherical")
    assert not torch.equal(arc, make(pipe, texts, num_frames=8))
    with pytest.raises(ValueError, match="prompt_embeds has texts for 8 frames, but the video has 6"):
        make(pipe, None, prompt_embeds=text, negative_prompt_embeds=negative, num_frames=6)
    with pytest.raises(ValueError, match="prompt_interpolation must be one of linear, spherical"):
        make(pipe, texts, num_frames=8, prompt_interpolation="sperical")


def test_free_noise_on_both_paths(pipe):
    """The fast path's windows are those of the plain network; from there on everything is as it was."""
    before = make(pipe)
    pipe.enable_free_noise(4, 2)
    fast = make(pipe, num_frames=9)
    pipe.restore()
    torch.testing.assert_close(make(pipe, num_frames=9), fast, rtol=2e-4, atol=2e-4)
    pipe.optimize()
    torch.testing.assert_close(make(pipe, num_frames=9), fast, rtol=2e-4, atol=2e-4)
    pipe.enable_context_windows(4, overlap=1)
    both = make(pipe, num_frames=9)
    assert both.isfinite().all() and not torch.equal(both, fast)
    pipe.disable_free_noise()
    pipe.disable_context_windows()
    torch.testing.assert_close(make(pipe), before, rtol=2e-4, atol=2e-4)


def test_more_frames_than_positions(animate):
    most = animate.unet.config.motion_max_seq_length
    with pytest.raises(ValueError, match=r"40 frames are too many.*enable_context_windows\(\)"):
        make(animate, num_frames=40)
    animate.enable_context_windows(most + 1)
    with pytest.raises(ValueError, match=f"windows of {most + 1} frames are too long"):
        make(animate, num_frames=40)
    off(animate).enable_free_noise(context_length=None, context_stride=8)
    assert make(animate, num_frames=most + 3, num_inference_steps=1).shape[2] == most + 3
    given = torch.randn(1, 4, most, 4, 4, generator=seed())
    assert make(animate, num_frames=most + 3, num_inference_steps=1, latents=given).shape[2] == most + 3
    with pytest.raises(ValueError, match="latents must be"):
        make(animate, num_frames=most + 3, latents=given[:, :, 1:])


def test_with_free_init(shapes):
    shapes.enable_context_windows(4, overlap=1)
    shapes.enable_free_init(num_iters=2)
    assert make(shapes, num_frames=9).isfinite().all()


def test_techniques_stay_on_in_a_pipeline_made_of_another(pipe):
    pipe.enable_context_windows(4, overlap=1)
    pipe.enable_free_init(num_iters=2)
    pipe.enable_free_noise(4, 3)
    want = make(pipe, num_frames=9)
    other = type(pipe).from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert other.context_windows_enabled and other.free_init_enabled and other.free_noise_enabled
    assert torch.equal(make(other, num_frames=9), want)
    other.disable_context_windows()
    other.disable_free_init()
    assert pipe.context_windows_enabled and pipe.free_init_enabled


def test_memory_does_not_grow(shapes, monkeypatch):
    """Live tensor bytes of a step in a window of 16: 128 frames against 32."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    from activations import peak

    for name in set(sys.modules) - before:  # other tests import these in their own way
        if "benchmarks" in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]

    def step(frames):
        x, context = torch.randn(2, 4, frames, 8, 8), torch.randn(2, 77, shapes.unet.config.cross_attention_dim)
        return peak(shapes.unet, lambda: Windowed(ContextWindows(), shapes.unet)(x, 7, context))

    with torch.no_grad():
        peaks = [step(32), step(128)]
    assert 0 < peaks[0] <= peaks[1] <= 1.15 * peaks[0]
