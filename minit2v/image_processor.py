"""What the published snippets import from diffusers' module of this name."""

from minit2v.adapters.ip_adapter import IPAdapterMaskProcessor

__all__ = ["IPAdapterMaskProcessor"]
