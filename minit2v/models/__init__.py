"""The networks, each with its config, in plain PyTorch: equations, and nothing that only speed or files need.

What loads, saves and configures them is `network`. Read the others in this order: layers, blocks, unet, unet3d, unet2d,
unet_motion, vae, clip.
"""
