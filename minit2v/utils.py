"""Helpers that published examples import from diffusers' module of the same name."""

from minit2v.files.video import export_to_gif, export_to_video, load_image, load_video

__all__ = ["export_to_gif", "export_to_video", "load_image", "load_video"]
