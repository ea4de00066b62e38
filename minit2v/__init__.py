"""Text-to-video UNets by hand: ModelScope, Zeroscope and what they need, in plain PyTorch."""

from .models.clip import CLIPTextModel as CLIPTextModel
from .models.tokenizer import CLIPTokenizer as CLIPTokenizer
from .models.unet2d import UNet2DConditionModel as UNet2DConditionModel
from .models.unet3d import UNet3DConditionModel as UNet3DConditionModel
from .models.unet_motion import MotionAdapter as MotionAdapter
from .models.unet_motion import UNetMotionModel as UNetMotionModel
from .models.vae import AutoencoderKL as AutoencoderKL
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

__version__ = "0.1.0"
