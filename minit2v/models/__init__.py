"""The networks, each with its config, in plain PyTorch. Code that only speed or files need is elsewhere.

`network` loads, saves and configures them. Read the others in this order: layers, blocks, unet, unet3d, unet2d,
unet_motion, vae, clip.
"""
