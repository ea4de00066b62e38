"""Schedulers: from a prediction of the network to the next sample."""

from .ddim import DDIMScheduler
from .dpm_multistep import DPMSolverMultistepScheduler
from .euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from .pndm import PNDMScheduler

__all__ = [
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "PNDMScheduler",
]
