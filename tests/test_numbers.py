"""NumPy's numbers are numbers, wherever one is taken; grids that are none are refused."""

import inspect
import json
import warnings

import numpy as np
import pytest
import torch

import minit2v
from minit2v import schedulers
from minit2v.files.video import export_to_video

SOLVERS = [getattr(schedulers, n) for n in dir(schedulers) if n.endswith("Scheduler")]
CALL = dict(prompt="a red circle", num_frames=3, num_inference_steps=2, height=32, width=32, output_type="np")


@pytest.fixture(scope="module")
def pipe():
    pipe = minit2v.TextToVideoSDPipeline.from_pretrained("shapes")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def frames(pipe, **changed):
    return pipe(**CALL | changed, generator=torch.Generator().manual_seed(0)).frames


@pytest.mark.parametrize("name,value", [
    ("num_frames", np.int64(3)), ("num_inference_steps", np.uint8(2)), ("height", np.uint8(32)),
    ("width", np.uint16(32)), ("decode_chunk_size", np.int64(1)), ("guidance_scale", np.float32(9)),
    ("eta", np.float64(0)), ("callback_steps", np.int8(1)), ("clip_skip", np.int64(0))])  # fmt: skip
def test_a_call(pipe, name, value):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NumPy warns where a number overflows
        assert np.abs(frames(pipe, **{name: value}) - frames(pipe)).max() < 1e-5


def test_small_numbers_do_not_overflow(pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = minit2v.VideoToVideoSDPipeline.from_pipe(pipe)
        done = []
        pipe(prompt="a", video=np.zeros((1, 32, 32, 3), np.float32), strength=np.float32(0.02), output_type="latent",
             num_inference_steps=np.uint8(200), callback=lambda *_: done.append(1))  # fmt: skip
        assert len(done) in (3, 4)


def test_switches(pipe):
    plain = frames(pipe)
    pipe.unet.enable_forward_chunking(np.int64(1), np.int64(1))
    assert np.abs(frames(pipe) - plain).max() < 1e-4
    pipe.unet.disable_forward_chunking()
    pipe.enable_free_init(np.int64(2), order=np.int64(4), spatial_stop_frequency=np.float32(0.25))
    frames(pipe)
    pipe.disable_free_init()
    pipe.enable_freeu(np.float32(1), np.float32(1), np.float64(1), np.int64(1))
    frames(pipe)
    pipe.disable_freeu()
    for half, x in ((pipe.vae.decode, torch.zeros(2, 4, 4, 4)), (pipe.vae.encode, torch.zeros(2, 3, 32, 32))):
        half(x, np.int64(1))


def test_configs_take_them_and_save_plain_numbers(tmp_path):
    config = dict(block_out_channels=(np.int64(8),), down_block_types=["DownEncoderBlock2D"],
                  up_block_types=["UpDecoderBlock2D"], norm_num_groups=np.int32(4), scaling_factor=np.float32(0.5))
    minit2v.AutoencoderKL(**config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["block_out_channels"] == [8] and written["scaling_factor"] == 0.5
    with pytest.raises(ValueError, match="norm_num_groups must be int"):
        minit2v.AutoencoderKL(**config | {"norm_num_groups": np.float64(4)})
    minit2v.DDIMScheduler(num_train_timesteps=np.int64(100), beta_start=np.float32(0.5)).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert written["num_train_timesteps"] == 100 and written["beta_start"] == 0.5
    said = {"metadata": {"a": np.int64(1), "b": np.float32(2), "c": np.bool_(True)}, "fps": np.float32(8)}
    export_to_video(np.zeros((2, 8, 8, 3), np.uint8), tmp_path / "a.mp4", quality=np.float32(5),
                    macro_block_size=np.int64(2), **said)  # fmt: skip


@pytest.mark.parametrize("cls", SOLVERS)
def test_solvers(cls):
    solver = cls()
    solver.set_timesteps(np.uint8(5))
    assert solver.num_inference_steps == 5 and type(solver.num_inference_steps) is int
    known = inspect.signature(solver.set_timesteps).parameters
    if "timesteps" in known:
        solver.set_timesteps(timesteps=[np.int64(900), np.uint8(100)])
    if "sigmas" in known:
        solver.set_timesteps(sigmas=np.array([10, 5, 0], np.float32))
        for wrong in ([-1, -2], [5, -1], [0, 0], [5, 5, 0], [5], [5, float("nan")], [1, 2]):
            with pytest.raises(ValueError, match="^sigmas must be"):
                solver.set_timesteps(sigmas=wrong)
