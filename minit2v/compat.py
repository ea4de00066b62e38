"""All differences between our numbers and those of diffusers, in one table. Each is a field of a class.

The default is what the authors of the weights ran, or what the mathematics says. `compat="diffusers"` is an argument of
pipelines, schedulers and networks. It sets all fields to what diffusers computes. Each field can also be passed alone.
Fields are saved: in scheduler_config.json for a scheduler, in config.json for a network, in model_index.json for a
pipeline.
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
        "a step must end where the next one begins; with linspace, and often with trailing, t - T // N does not",
        "huggingface/diffusers#11347, scheduling_ddim.py: prev_timestep",
    ),
    Deviation(
        "PNDMScheduler", "previous_timestep", "grid", "ratio",
        "the same as in DDIM; also if a run begins in the middle of the grid, as in video to video",
        "huggingface/diffusers#11347, scheduling_pndm.py: step_plms",
    ),
    Deviation(
        "PNDMScheduler", "average", "epsilon", "prediction",
        "the method averages predictions of the noise; with averages of v at different timesteps it loses its order",
        "scheduling_pndm.py: _get_prev_sample converts v after the average",
    ),
    Deviation(
        "DDIMInverseScheduler", "previous_timestep", "grid", "ratio",
        "the same as in DDIM",
        "scheduling_ddim_inverse.py: step",
    ),
    *(
        Deviation(
            solver, "third_order", "corrected", "published",
            "the published third-order rule halves its last term and has only second order; the stochastic one also "
            "has a wrong sign and only first order",
            "scheduling_dpmsolver_multistep.py: multistep_dpm_solver_third_order_update",
        )
        for solver in ("DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler")
    ),
    Deviation(
        "DPMSolverSinglestepScheduler", "third_order", "corrected", "published",
        "a constant in the third-order rule of sde-dpmsolver++ has the wrong sign, and the result is noise",
        "scheduling_dpmsolver_singlestep.py: singlestep_dpm_solver_third_order_update",
    ),
    Deviation(
        "LMSDiscreteScheduler", "history", "known", "counted",
        "if a run begins in the middle, as in video to video, its first steps are too long or too short",
        "scheduling_lms_discrete.py: step, order = min(step_index + 1, order)",
    ),
    Deviation(
        "DDPMScheduler", "last_noise", "none", "published",
        "with variance_type fixed_large noise is added to the finished sample, unless the grid ends at timestep 0",
        "scheduling_ddpm.py: step",
    ),
    Deviation(
        "TCDScheduler", "final_level", "config", "published",
        "set_alpha_to_one is ignored: the noise of timestep 0 stays in the result",
        "scheduling_tcd.py: step",
    ),
    *(
        Deviation(
            solver, "final_sigmas_type", "zero", "sigma_min",
            "the last step stops at the noise level of timestep 0; with Karras sigmas it has no effect",
            f"{file}: set_timesteps",
        )
        for solver, file in (
            ("DEISMultistepScheduler", "scheduling_deis_multistep.py"),
            ("SASolverScheduler", "scheduling_sasolver.py"),
        )
    ),
    Deviation(
        "DPMSolverSDEScheduler", "noise_path", "exact", "published",
        "the generator is ignored, and the noise depends on the number of steps, so videos cannot be compared",
        "scheduling_dpmsolver_sde.py: BrownianTreeNoiseSampler (needs torchsde)",
    ),
    *(
        Deviation(
            solver, "zero_snr", "honoured", "ignored",
            "a model that was trained to begin with pure noise silently runs with another noise schedule",
            "the class has no rescale_betas_zero_snr",
        )
        for solver in (
            "DEISMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler", "HeunDiscreteScheduler",
            "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler",
            "SASolverScheduler",
        )
    ),
    *(
        Deviation(
            solver, "spaced_timesteps", "exact", "whole",
            "the network gets a rounded timestep, with some spacings a truncated one, together with the exact sigma",
            "set_timesteps",
        )
        for solver in (
            "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
            "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "SASolverScheduler",
            "UniPCMultistepScheduler",
        )
    ),
    *(
        Deviation(
            solver, "noised_at", "timestep", "counter",
            "after a run of video to video, add_noise ignores the given timesteps and adds no noise",
            "add_noise, if begin_index is set",
        )
        for solver in (
            "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler",
            "DPMSolverSinglestepScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler",
            "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
            "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler",
            "UniPCMultistepScheduler",
        )
    ),
    *(
        Deviation(
            network, "motion_norms", "frame", "video",
            "the authors normalise each frame by itself; norms over the video change the residual by 4 to 48 %",
            "huggingface/diffusers#5881, unet_motion_model.py: AnimateDiffTransformer3D",
        )
        for network in ("MotionAdapter", "UNetMotionModel")
    ),
    *(
        Deviation(
            network, "resnet_norms", None, "frame",
            "version 1 was trained with norms over the video in the image model; None: decided by its positions",
            "huggingface/diffusers#5881; guoyww's inference-v1.yaml: use_inflated_groupnorm false",
        )
        for network in ("MotionAdapter", "UNetMotionModel")
    ),
    *(
        Deviation(
            pipeline, "clip_skip_negative", True, False,
            "guidance compares two conditions, which should both come from the layer that clip_skip chooses",
            "huggingface/diffusers, encode_prompt: the negative prompt is read from the last layer",
        )
        for pipeline in (
            "TextToVideoSDPipeline", "VideoToVideoSDPipeline", "AnimateDiffPipeline", "AnimateDiffVideoToVideoPipeline",
        )
    ),
    *(
        Deviation(
            pipeline, "mask_grid", "exact", "published",
            "if a mask and the latents have different aspect ratios, the mask's rows are shifted",
            "image_processor.py: IPAdapterMaskProcessor.downsample",
        )
        for pipeline in ("AnimateDiffPipeline", "AnimateDiffVideoToVideoPipeline")
    ),
    Deviation(
        "AnimateDiffVideoToVideoPipeline", "array_resize", "bicubic", "nearest",
        "with nearest-neighbour resizing, edges flicker from frame to frame; images are resized by Lanczos",
        "image_processor.py: VaeImageProcessor.resize of arrays and tensors",
    ),
    Deviation(
        "FreeNoise", "tail", "whole", "published",
        "if the windows do not end with the video, its last frames all get the weight of the first of them",
        "models/attention.py: FreeNoiseTransformerBlock, weights[:, -last_frame_batch_length]",
    ),
    Deviation(
        "FreeNoise", "repeat", "context", "published",
        "repeat_context does not repeat: the noise is random, because a length is compared with that word",
        "free_noise_utils.py: _prepare_latents_free_noise",
    ),
    Deviation(
        "FreeInit", "noise", "scaled", "published",
        "Euler's latents have the scale sigma, and every round should keep the noise and the steps of `strength`",
        "free_init_utils.py: _apply_free_init; pipeline_animatediff_video2video.py: get_timesteps in its loop",
    ),
    Deviation(
        "FreeInit", "frequencies", "centred", "published",
        "along axes of odd length the published filter is half a frequency away from the centre",
        "free_init_utils.py: _get_free_init_freq_filter",
    ),
)  # fmt: skip


def compat_fields(owner: str, compat: str | None) -> dict[str, Any]:
    """The fields of class `owner` in a mode. None is the default mode. Raises ValueError if the mode is unknown."""
    if compat is not None and compat not in MODES:
        raise ValueError(f"compat must be None or {' or '.join(map(repr, MODES))}, not {compat!r}"
                         f"{nearest(str(compat), MODES)}")
    return {d.field: d.default if compat is None else d.diffusers for d in DEVIATIONS if d.owner == owner}
