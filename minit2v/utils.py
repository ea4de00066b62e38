"""The helpers under the path that snippets for diffusers import them from."""

from minit2v.files.video import export_to_gif, export_to_video, load_image, load_video

__all__ = ["export_to_gif", "export_to_video", "load_image", "load_video"]
