"""How much memory a video takes, and how it takes less: counting without a device, plans, weights that come and go.

    live.py     counts the bytes of all tensors that are alive, on `meta` or in a real run
    stream.py   brings a network's weights to where it computes, block by block, and takes them away again
    plan.py     the peak of every part of the work, with and without each technique, and the fastest plan that fits

An ordinary call passes through none of this. docs/memory.md has the numbers.
"""
