"""Text-to-video UNets in plain PyTorch: ModelScope, Zeroscope, AnimateDiff, and all that they need.

Each name is imported when it is first used, so that `import minit2v` is fast.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # this list is for type checkers, the one below is for Python; a test compares them
    from .adapters.ip_adapter import IPAdapterMaskProcessor as IPAdapterMaskProcessor
    from .models.attention_maps import attention_maps as attention_maps
    from .models.clip import CLIPTextModel as CLIPTextModel
    from .models.clip_vision import CLIPVisionModelWithProjection as CLIPVisionModelWithProjection
    from .models.tokenizer import CLIPTokenizer as CLIPTokenizer
    from .models.unet2d import UNet2DConditionModel as UNet2DConditionModel
    from .models.unet3d import UNet3DConditionModel as UNet3DConditionModel
    from .models.unet_motion import MotionAdapter as MotionAdapter
    from .models.unet_motion import UNetMotionModel as UNetMotionModel
    from .models.vae import AutoencoderKL as AutoencoderKL
    from .pipelines.animatediff import AnimateDiffPipeline as AnimateDiffPipeline
    from .pipelines.animatediff import AnimateDiffPipelineOutput as AnimateDiffPipelineOutput
    from .pipelines.animatediff import AnimateDiffVideoToVideoPipeline as AnimateDiffVideoToVideoPipeline
    from .pipelines.base import DiffusionPipeline as DiffusionPipeline
    from .pipelines.text_to_video import TextToVideoSDPipeline as TextToVideoSDPipeline
    from .pipelines.text_to_video import TextToVideoSDPipelineOutput as TextToVideoSDPipelineOutput
    from .pipelines.video_to_video import VideoToVideoSDPipeline as VideoToVideoSDPipeline
    from .schedulers.consistency import LCMScheduler as LCMScheduler
    from .schedulers.ddim import DDIMScheduler as DDIMScheduler
    from .schedulers.dpm_multistep import DPMSolverMultistepScheduler as DPMSolverMultistepScheduler
    from .schedulers.euler import EulerAncestralDiscreteScheduler as EulerAncestralDiscreteScheduler
    from .schedulers.euler import EulerDiscreteScheduler as EulerDiscreteScheduler
    from .schedulers.pndm import PNDMScheduler as PNDMScheduler
else:
    from .lazy import lazily

    _MODULE_OF = {
        "AnimateDiffPipeline": "pipelines",
        "AnimateDiffPipelineOutput": "pipelines",
        "AnimateDiffVideoToVideoPipeline": "pipelines",
        "AutoencoderKL": "models.vae",
        "CLIPTextModel": "models.clip",
        "CLIPTokenizer": "models.tokenizer",
        "CLIPVisionModelWithProjection": "models.clip_vision",
        "DDIMScheduler": "schedulers",
        "DPMSolverMultistepScheduler": "schedulers",
        "DiffusionPipeline": "pipelines",
        "EulerAncestralDiscreteScheduler": "schedulers",
        "EulerDiscreteScheduler": "schedulers",
        "IPAdapterMaskProcessor": "adapters.ip_adapter",
        "LCMScheduler": "schedulers",
        "MotionAdapter": "models.unet_motion",
        "PNDMScheduler": "schedulers",
        "TextToVideoSDPipeline": "pipelines",
        "TextToVideoSDPipelineOutput": "pipelines",
        "UNet2DConditionModel": "models.unet2d",
        "UNet3DConditionModel": "models.unet3d",
        "UNetMotionModel": "models.unet_motion",
        "VideoToVideoSDPipeline": "pipelines",
        "attention_maps": "models.attention_maps",
    }
    __all__ = [*_MODULE_OF]
    __getattr__, __dir__ = lazily(__name__, _MODULE_OF)
