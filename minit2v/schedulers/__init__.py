"""Schedulers: they compute the next sample from a prediction of the network. Each family of solvers has a file.

Shared code (noise, timesteps, config) is in `base` and `grids`. Schedulers do not know about guidance, frames or
pipelines. In all of them a sample x has any shape (b, ...), and a batch axis first.
"""

from .consistency import LCMScheduler as LCMScheduler
from .consistency import TCDScheduler as TCDScheduler
from .ddim import DDIMInverseScheduler as DDIMInverseScheduler
from .ddim import DDIMScheduler as DDIMScheduler
from .ddpm import DDPMScheduler as DDPMScheduler
from .deis import DEISMultistepScheduler as DEISMultistepScheduler
from .dpm_multistep import DPMSolverMultistepScheduler as DPMSolverMultistepScheduler
from .dpm_sde import DPMSolverSDEScheduler as DPMSolverSDEScheduler
from .dpm_singlestep import DPMSolverSinglestepScheduler as DPMSolverSinglestepScheduler
from .edm import EDMDPMSolverMultistepScheduler as EDMDPMSolverMultistepScheduler
from .edm import EDMEulerScheduler as EDMEulerScheduler
from .euler import EulerAncestralDiscreteScheduler as EulerAncestralDiscreteScheduler
from .euler import EulerDiscreteScheduler as EulerDiscreteScheduler
from .lms import LMSDiscreteScheduler as LMSDiscreteScheduler
from .pndm import PNDMScheduler as PNDMScheduler
from .sa_solver import SASolverScheduler as SASolverScheduler
from .two_stage import HeunDiscreteScheduler as HeunDiscreteScheduler
from .two_stage import KDPM2AncestralDiscreteScheduler as KDPM2AncestralDiscreteScheduler
from .two_stage import KDPM2DiscreteScheduler as KDPM2DiscreteScheduler
from .unipc import UniPCMultistepScheduler as UniPCMultistepScheduler

__all__ = [name for name in dir() if name.endswith("Scheduler")]
