"""FreeInit and FreeU against diffusers': the formulas, both UNets, and whole pipelines, every parameter random."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.free_init_utils import FreeInitMixin
from diffusers.utils.torch_utils import apply_freeu, fourier_filter

import minit2v.schedulers
from minit2v import AnimateDiffPipeline, AnimateDiffVideoToVideoPipeline, MotionAdapter, UNet3DConditionModel
from minit2v.techniques.free_init import FreeInit, low_pass
from minit2v.techniques.free_u import FreeU, scale_low_frequencies

FREE_U = dict(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_near(ours, theirs, tolerance=1e-5):
    """Relative to the largest value; a constant would prove nothing."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and theirs.float().std() > 0.1
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


# Formulas -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["butterworth", "gaussian", "ideal"])
@pytest.mark.parametrize("shape", [(4, 6, 8), (3, 5, 7), (1, 4, 2)])
def test_filter_and_mix(method, shape):
    for order, d_s, d_t in ((4, 0.25, 0.25), (2, 0.5, 0.3), (4, 0, 0.25)):
        peer = FreeInitMixin()
        theirs = peer._get_free_init_freq_filter((1, 1, *shape), "cpu", method, order, d_s, d_t)
        ours = torch.fft.fftshift(low_pass(shape, method, order, d_s, d_t, "published"))
        torch.testing.assert_close(ours.float(), theirs[0, 0], rtol=1e-5, atol=1e-6)
        x, z = randn(2, 2, 4, *shape)
        settings = FreeInit(method=method, order=order, spatial_stop_frequency=d_s, temporal_stop_frequency=d_t,
                            frequencies="published")
        torch.testing.assert_close(settings.mix(x, z), peer._apply_freq_filter(x, z, theirs), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_free_u(dtype):
    for h, w in ((8, 8), (5, 7), (1, 4), (2, 3)):
        x, skip = randn(2, 2, 6, h, w).to(dtype)
        step = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]  # of the last digit
        torch.testing.assert_close(scale_low_frequencies(skip, 0.3), fourier_filter(skip, 1, 0.3), rtol=step, atol=step)
        for level in range(3):
            ours = FreeU(**FREE_U)(x, skip, level)
            theirs = apply_freeu(level, x.clone(), skip.clone(), **FREE_U)
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=step, atol=step)


# Networks -------------------------------------------------------------------------------------------------------------


def test_free_u_in_unet3d(randomize_):
    """Three levels: two that it changes, one that it leaves; sizes that are no powers of 2."""
    kinds = ("CrossAttnDownBlock3D", "DownBlock3D", "CrossAttnDownBlock3D")
    config = dict(block_out_channels=(32, 64, 96), down_block_types=kinds, layers_per_block=1, norm_num_groups=8,
                  up_block_types=tuple(k.replace("Down", "Up") for k in reversed(kinds)), attention_head_dim=16,
                  cross_attention_dim=24)
    peer = randomize_(diffusers.UNet3DConditionModel(**config)).eval()
    ours = UNet3DConditionModel(**config).eval()
    ours.load_state_dict(ours.layout.to_ours(peer.state_dict()), strict=True)
    check_free_u(ours, peer, randn(1, 4, 2, 12, 10), randn(1, 5, 24, seed=1))


@torch.no_grad()
def check_free_u(ours, peer, x, context, per_frame=False):
    frames = context.repeat_interleave(x.shape[2], 0) if per_frame else context
    plain = ours(x, 17, context)
    assert_near(plain, peer(x, 17, frames).sample)
    for unet in (ours, peer):
        unet.enable_freeu(**FREE_U)
    changed = ours(x, 17, context)
    assert_near(changed, peer(x, 17, frames).sample)
    assert (changed - plain).abs().max() > 1e-2 * plain.abs().max()
    for unet in (ours, peer):
        unet.disable_freeu()
    assert torch.equal(ours(x, 17, context), plain)


# Pipelines ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipes(tmp_path_factory, make_official_folder, make_adapter_folder):
    """Ours and theirs, from the same two folders."""
    folder = tmp_path_factory.mktemp("animatediff")
    base = make_official_folder(folder / "sd15", repo="sd15", small=True)
    adapter = make_adapter_folder(folder, "v1-5-2")
    ours = AnimateDiffPipeline.from_pretrained(
        base, motion_adapter=MotionAdapter.from_pretrained(adapter), compat="diffusers"
    )
    theirs = diffusers.AnimateDiffPipeline.from_pretrained(
        base, motion_adapter=diffusers.MotionAdapter.from_pretrained(adapter), feature_extractor=None
    )
    return quiet(ours), quiet(theirs)


@pytest.fixture(scope="module")
def v2v(pipes):
    ours, theirs = pipes
    return (quiet(AnimateDiffVideoToVideoPipeline.from_pipe(ours)),
            quiet(diffusers.AnimateDiffVideoToVideoPipeline(**theirs.components)))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def use(pipes, name, **config):
    base = {"beta_schedule": "linear", "clip_sample": False, "skip_prk_steps": True, "steps_offset": 1} | config
    for pipe, library in zip(pipes, (minit2v.schedulers, diffusers), strict=True):
        pipe.scheduler = getattr(library, name).from_config(base)


def run(pipe, **call):
    call = dict(prompt="a cat", num_inference_steps=4, height=16, width=24, guidance_scale=4.0) | call
    return pipe(**call, generator=torch.Generator().manual_seed(0)).frames


def assert_same(pipes, tolerance=1e-4, **call):
    ours, theirs = (run(p, **call, output_type="latent") for p in pipes)
    assert_near(ours, theirs, tolerance)
    return ours


def test_free_u_in_unet_motion(pipes):
    ours, theirs = pipes
    check_free_u(ours.unet, theirs.unet, randn(1, 4, 3, 12, 10), randn(1, 5, 24, seed=1), per_frame=True)


@pytest.mark.parametrize(
    "name, config, settings",
    [
        ("DDIMScheduler", {}, dict(num_iters=3)),
        ("DDIMScheduler", {"timestep_spacing": "linspace"}, dict(num_iters=2, use_fast_sampling=True)),
        ("DPMSolverMultistepScheduler", {}, dict(num_iters=2, method="gaussian", spatial_stop_frequency=0.6)),
        ("PNDMScheduler", {}, dict(num_iters=2, method="ideal", temporal_stop_frequency=0.5)),
        ("EulerDiscreteScheduler", {}, dict(num_iters=2, order=2)),  # not right, but the same
        ("EulerAncestralDiscreteScheduler", {}, dict(num_iters=2, use_fast_sampling=True)),
    ],
)
def test_free_init(pipes, name, config, settings):
    use(pipes, name, **config)
    plain = run(pipes[0], num_frames=3, output_type="latent")
    for pipe in pipes:
        pipe.enable_free_init(**settings)
        assert pipe.free_init_enabled
    try:
        for frames in (3, 4):  # the filter's centre is the same for even numbers alone
            result = assert_same(pipes, num_frames=frames, eta=0.5 if name == "DDIMScheduler" else 0.0)
            assert frames != 3 or (result - plain).abs().max() > 0.01 * plain.abs().max()
    finally:
        for pipe in pipes:
            pipe.disable_free_init()
            assert not pipe.free_init_enabled


def test_frames_with_both_techniques(pipes):
    use(pipes, "DDIMScheduler")
    for pipe in pipes:
        pipe.enable_free_init(method="butterworth", use_fast_sampling=True)
        pipe.enable_freeu(**FREE_U)
    try:
        ours, theirs = (run(p, num_frames=4, output_type="np", prompt=["a cat", "a dog"]) for p in pipes)
    finally:
        for pipe in pipes:
            pipe.disable_free_init()
            pipe.disable_freeu()
    assert ours.shape == theirs.shape and ours.std() > 0.05
    assert 0.02 < ((ours > 0.001) & (ours < 0.999)).mean()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"])
def test_free_init_of_a_video(v2v, name):
    """The reference takes the strength of what the last round has left: 8 steps are 6, 4 and 3 (PNDM's are more)."""
    use(v2v, name)
    video = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)
    video = list((video / 255).astype(np.float32))
    calls = []
    hook = v2v[0].unet.register_forward_hook(lambda module, args, out: calls.append(1))
    for pipe in v2v:
        pipe.enable_free_init(num_iters=3)
    try:
        assert_same(v2v, video=video, strength=0.8, num_inference_steps=10)
    finally:
        hook.remove()
        for pipe in v2v:
            pipe.disable_free_init()
    assert name == "PNDMScheduler" or len(calls) == 6 + 4 + 3


@pytest.mark.parametrize("weighting", ["flat", "pyramid", "delayed_reverse_sawtooth"])
@pytest.mark.parametrize("noise", ["shuffle_context", "repeat_context", "random"])
@pytest.mark.parametrize("frames", [8, 9])  # 9: the windows do not end with the video
def test_free_noise(pipes, weighting, noise, frames):
    use(pipes, "DDIMScheduler")
    for pipe in pipes:
        pipe.enable_free_noise(4, 2, weighting, noise)
        assert pipe.free_noise_enabled
    try:
        assert_same(pipes, num_frames=frames, num_inference_steps=2)
    finally:
        for pipe in pipes:
            pipe.disable_free_noise()
            assert not pipe.free_noise_enabled


def square(first, last, a, b):
    """An interpolation of one's own."""
    share = torch.linspace(0, 1, last - first + 1)[:, None, None] ** 2
    return (1 - share) * a + share * b


@pytest.mark.parametrize("own", [None, square])
@pytest.mark.parametrize("negative", [None, "blurred", {0: "blurred", 3: "torn", 7: "dark"}])
def test_prompts_of_single_frames(pipes, negative, own):
    use(pipes, "DDIMScheduler")
    for pipe in pipes:
        pipe.enable_free_noise(4, 2, prompt_interpolation_callback=own)
    try:
        for guidance_scale in (4.0, 1.0):
            assert_same(pipes, prompt={0: "a cat", 5: "a dog", 6: "two dogs"}, negative_prompt=negative, num_frames=8,
                        num_inference_steps=2, guidance_scale=guidance_scale)
    finally:
        for pipe in pipes:
            pipe.disable_free_noise()


def test_free_noise_of_a_video(v2v):
    use(v2v, "DDIMScheduler")
    video = list(np.random.default_rng(0).random((6, 16, 24, 3), dtype=np.float32))
    for pipe in v2v:
        pipe.enable_free_noise(4, 2)
    try:
        assert_same(v2v, video=video, strength=0.5)
    finally:
        for pipe in v2v:
            pipe.disable_free_noise()
