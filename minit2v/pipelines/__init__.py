"""Pipelines: what a user calls, from a text to frames, and the files of a whole pipeline.

A pipeline puts networks and a scheduler together; what changes the loop from outside goes to `techniques`.
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
