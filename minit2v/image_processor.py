"""Names that published examples import from diffusers' module of the same name."""

from minit2v.adapters.ip_adapter import IPAdapterMaskProcessor

__all__ = ["IPAdapterMaskProcessor"]
