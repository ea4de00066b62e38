"""Pipelines: what a user calls."""

from .animatediff import AnimateDiffPipeline, AnimateDiffPipelineOutput, AnimateDiffVideoToVideoPipeline
from .base import DiffusionPipeline
from .text_to_video import TextToVideoSDPipeline, TextToVideoSDPipelineOutput
from .video_to_video import VideoToVideoSDPipeline

__all__ = [
    "AnimateDiffPipeline",
    "AnimateDiffPipelineOutput",
    "AnimateDiffVideoToVideoPipeline",
    "DiffusionPipeline",
    "TextToVideoSDPipeline",
    "TextToVideoSDPipelineOutput",
    "VideoToVideoSDPipeline",
]
