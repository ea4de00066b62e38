"""Pipelines: what a user calls. They turn texts into frames, and load and save the files of a whole pipeline.

A pipeline combines networks and a scheduler. Methods that change the denoising loop are in `techniques`.
"""

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
