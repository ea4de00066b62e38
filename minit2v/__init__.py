"""Text-to-video UNets by hand: ModelScope, Zeroscope and what they need, in plain PyTorch."""

from .clip import CLIPTextModel as CLIPTextModel
from .pipelines import AnimateDiffPipeline as AnimateDiffPipeline
from .pipelines import AnimateDiffPipelineOutput as AnimateDiffPipelineOutput
from .pipelines import AnimateDiffVideoToVideoPipeline as AnimateDiffVideoToVideoPipeline
from .pipelines import DiffusionPipeline as DiffusionPipeline
from .pipelines import TextToVideoSDPipeline as TextToVideoSDPipeline
from .pipelines import VideoToVideoSDPipeline as VideoToVideoSDPipeline
from .schedulers import DDIMScheduler as DDIMScheduler
from .schedulers import DPMSolverMultistepScheduler as DPMSolverMultistepScheduler
from .schedulers import EulerAncestralDiscreteScheduler as EulerAncestralDiscreteScheduler
from .schedulers import EulerDiscreteScheduler as EulerDiscreteScheduler
from .schedulers import PNDMScheduler as PNDMScheduler
from .tokenizer import CLIPTokenizer as CLIPTokenizer
from .unet2d import UNet2DConditionModel as UNet2DConditionModel
from .unet3d import UNet3DConditionModel as UNet3DConditionModel
from .unet_motion import MotionAdapter as MotionAdapter
from .unet_motion import UNetMotionModel as UNetMotionModel
from .vae import AutoencoderKL as AutoencoderKL

__version__ = "0.1.0"
