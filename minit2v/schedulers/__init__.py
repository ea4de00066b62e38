"""Schedulers: from a prediction of the network to the next sample, a file for each family of solvers.

What they share (noise, grids, the config) is in `base` and `grids`; none knows of guidance, frames or pipelines.
"""

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
