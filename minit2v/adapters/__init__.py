"""Adapters for a loaded model: LoRA, textual inversion and IP-Adapter. Unloading restores the model exactly.

Each module reads the usual file formats and recognises them by their content. If a file does not fit the model, it
raises an error of one line.
"""
