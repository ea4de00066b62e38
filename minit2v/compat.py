"""Where our numbers differ from those of diffusers, in one table: every deviation is a field of what it belongs to.

The default is what the authors of the weights ran, or what the mathematics says. `compat="diffusers"`, an argument of
pipelines, schedulers and networks, sets all fields to what diffusers computes; each can also be passed by itself.
Fields are saved: a scheduler's in its scheduler_config.json, a network's in its config.json, a pipeline's in
model_index.json.
"""

from dataclasses import dataclass
from typing import Any

from minit2v_convert.rename import nearest

MODES = ("diffusers",)


@dataclass(frozen=True)
class Deviation:
    owner: str  # the class that has the field
    field: str
    default: Any
    diffusers: Any
    why: str
    see: str  # the place in diffusers, or the issue there


DEVIATIONS: tuple[Deviation, ...] = (
    Deviation(
        "DDIMScheduler", "previous_timestep", "grid", "ratio",
        "a step ends where the next one begins; t - T // N misses the grid with linspace and often with trailing",
        "huggingface/diffusers#11347, scheduling_ddim.py: prev_timestep",
    ),
    Deviation(
        "PNDMScheduler", "previous_timestep", "grid", "ratio",
        "the same as in DDIM; also where a run begins in the middle of the grid, as video to video does",
        "huggingface/diffusers#11347, scheduling_pndm.py: step_plms",
    ),
    Deviation(
        "PNDMScheduler", "average", "epsilon", "prediction",
        "the method averages predictions of the noise; averaging v, each at its own timestep, loses its order",
        "scheduling_pndm.py: _get_prev_sample converts v after the average",
    ),
    Deviation(
        "DPMSolverMultistepScheduler", "sde_third_order", "corrected", "published",
        "one constant of the third-order rule of sde-dpmsolver++ has the wrong sign: the error falls only linearly",
        "scheduling_dpmsolver_multistep.py: multistep_dpm_solver_third_order_update",
    ),
    *(
        Deviation(
            network, "motion_norms", "frame", "video",
            "the authors normalise each frame by itself; pooled over the video, the residual is off by 4 to 48 %",
            "huggingface/diffusers#5881, unet_motion_model.py: AnimateDiffTransformer3D",
        )
        for network in ("MotionAdapter", "UNetMotionModel")
    ),
    *(
        Deviation(
            network, "resnet_norms", None, "frame",
            "version 1 was trained with norms of the image model that span the video; None: known by its positions",
            "huggingface/diffusers#5881; guoyww's inference-v1.yaml: use_inflated_groupnorm false",
        )
        for network in ("MotionAdapter", "UNetMotionModel")
    ),
    *(
        Deviation(
            pipeline, "clip_skip_negative", True, False,
            "clip_skip picks the layer that the UNet is conditioned on, and guidance compares two such conditions",
            "huggingface/diffusers, encode_prompt: the negative prompt is read from the last layer",
        )
        for pipeline in (
            "TextToVideoSDPipeline", "VideoToVideoSDPipeline", "AnimateDiffPipeline", "AnimateDiffVideoToVideoPipeline",
        )
    ),
    Deviation(
        "AnimateDiffVideoToVideoPipeline", "array_resize", "bicubic", "nearest",
        "where pixels are picked and not averaged, edges flicker from frame to frame; images are resized by Lanczos",
        "image_processor.py: VaeImageProcessor.resize of arrays and tensors",
    ),
    Deviation(
        "FreeInit", "noise", "scaled", "published",
        "the latents of Euler's method are of size sigma, and a video keeps the noise and the steps of its strength",
        "free_init_utils.py: _apply_free_init; pipeline_animatediff_video2video.py: get_timesteps in its loop",
    ),
    Deviation(
        "FreeInit", "frequencies", "centred", "published",
        "along axes of odd length the published filter is half a frequency off its centre",
        "free_init_utils.py: _get_free_init_freq_filter",
    ),
)  # fmt: skip


def compat_fields(owner: str, compat: str | None) -> dict[str, Any]:
    """The fields of class `owner` in this mode, None being the default one. Raises ValueError on an unknown mode."""
    if compat is not None and compat not in MODES:
        raise ValueError(f"compat must be None or {' or '.join(map(repr, MODES))}, not {compat!r}"
                         f"{nearest(str(compat), MODES)}")
    return {d.field: d.default if compat is None else d.diffusers for d in DEVIATIONS if d.owner == owner}
