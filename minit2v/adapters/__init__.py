"""What is put into networks that are loaded: LoRA, textual inversion, IP-Adapter.

The tables of names are convert/'s, the calls are the pipelines'; here is what reads the files and what is computed.
"""
