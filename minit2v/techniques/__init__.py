"""What changes how a network is used, and not the network: FreeInit around the denoising loop, FreeU inside the U."""
