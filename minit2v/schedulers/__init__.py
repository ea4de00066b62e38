"""Schedulers: from a prediction of the network to the next sample."""

from .ddim import DDIMScheduler
from .dpm_multistep import DPMSolverMultistepScheduler

__all__ = ["DDIMScheduler", "DPMSolverMultistepScheduler"]
