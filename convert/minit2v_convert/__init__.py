"""Reads and converts every published checkpoint layout, with tables of the names of tensors."""
