"""Tables and readers of every published checkpoint layout: state dict in, state dict out."""
