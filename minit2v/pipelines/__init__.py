"""Pipelines: what a user calls."""

from .base import DiffusionPipeline
from .text_to_video import TextToVideoSDPipeline, TextToVideoSDPipelineOutput
from .video_to_video import VideoToVideoSDPipeline

__all__ = ["DiffusionPipeline", "TextToVideoSDPipeline", "TextToVideoSDPipelineOutput", "VideoToVideoSDPipeline"]
