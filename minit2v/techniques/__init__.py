"""What changes how a network is used, and not the network: FreeInit around the denoising loop, FreeU inside the U.

Each is off until it is turned on, and an ordinary call does not pass through it.
"""
