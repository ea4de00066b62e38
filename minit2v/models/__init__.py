"""The networks, in plain PyTorch.

Read them in this order: layers, blocks, unet, unet3d, unet2d, unet_motion, vae, clip.
"""
