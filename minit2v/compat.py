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
        "DDIMInverseScheduler", "previous_timestep", "grid", "ratio",
        "the same as in DDIM",
        "scheduling_ddim_inverse.py: step",
    ),
    *(
        Deviation(
            solver, "third_order", "corrected", "published",
            "the last term of the third-order rule is halved, so that it is of second order; in the stochastic one a "
            "sign is turned, too, and its error falls only linearly",
            "scheduling_dpmsolver_multistep.py: multistep_dpm_solver_third_order_update",
        )
        for solver in ("DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler")
    ),
    Deviation(
        "DPMSolverSinglestepScheduler", "third_order", "corrected", "published",
        "one constant of the third-order rule of sde-dpmsolver++ has the wrong sign: the result is noise",
        "scheduling_dpmsolver_singlestep.py: singlestep_dpm_solver_third_order_update",
    ),
    Deviation(
        "LMSDiscreteScheduler", "history", "known", "counted",
        "where a run begins in the middle, as video to video does, its first steps are too long or too short",
        "scheduling_lms_discrete.py: step, order = min(step_index + 1, order)",
    ),
    Deviation(
        "DDPMScheduler", "last_noise", "none", "published",
        "with variance_type fixed_large the finished sample gets noise once more, unless the grid ends at timestep 0",
        "scheduling_ddpm.py: step",
    ),
    Deviation(
        "TCDScheduler", "final_level", "config", "published",
        "set_alpha_to_one is not heeded: the noise of timestep 0 stays in the result",
        "scheduling_tcd.py: step",
    ),
    *(
        Deviation(
            solver, "final_sigmas_type", "zero", "sigma_min",
            "the last step stops at the noise of timestep 0, and with Karras sigmas it does nothing at all",
            f"{file}: set_timesteps",
        )
        for solver, file in (
            ("DEISMultistepScheduler", "scheduling_deis_multistep.py"),
            ("SASolverScheduler", "scheduling_sasolver.py"),
        )
    ),
    Deviation(
        "DPMSolverSDEScheduler", "noise_path", "exact", "published",
        "the generator is not heeded, and another number of steps takes other noise, so that videos do not compare",
        "scheduling_dpmsolver_sde.py: BrownianTreeNoiseSampler (needs torchsde)",
    ),
    *(
        Deviation(
            solver, "zero_snr", "honoured", "ignored",
            "a model that was trained to begin with pure noise is run on another noise schedule, without a word",
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
            "the network is told a rounded timestep, and with some spacings one cut off, beside the exact noise level",
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
            "after a run of video to video, add_noise forgets the timesteps that it is given and adds no noise at all",
            "add_noise, where begin_index is set",
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
    *(
        Deviation(
            pipeline, "mask_grid", "exact", "published",
            "masks of IP-Adapters are scattered over other rows where a mask's sides are not in the ratio of a level's",
            "image_processor.py: IPAdapterMaskProcessor.downsample",
        )
        for pipeline in ("AnimateDiffPipeline", "AnimateDiffVideoToVideoPipeline")
    ),
    Deviation(
        "AnimateDiffVideoToVideoPipeline", "array_resize", "bicubic", "nearest",
        "where pixels are picked and not averaged, edges flicker from frame to frame; images are resized by Lanczos",
        "image_processor.py: VaeImageProcessor.resize of arrays and tensors",
    ),
    Deviation(
        "FreeNoise", "tail", "whole", "published",
        "where the windows do not end with the video, its last frames all get the weight of the first of them",
        "models/attention.py: FreeNoiseTransformerBlock, weights[:, -last_frame_batch_length]",
    ),
    Deviation(
        "FreeNoise", "repeat", "context", "published",
        "repeat_context does not repeat: a length is compared with that word, so that the noise is random",
        "free_noise_utils.py: _prepare_latents_free_noise",
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
