"""How much memory a video needs, and how it needs less: counting without a GPU, plans, offloading of weights.

    live.py      counts the bytes of all tensors that are alive, on `meta` or in a real run
    stream.py    offloading: moves a network's weights to the device block by block, and away again
    plan.py      the peak memory of every part of the work, with each technique, and the fastest plan that fits
    training.py  the same for a training step
    heap.py      on a CPU: gives freed memory back to the operating system at once

An ordinary call does not run this code. docs/memory.md has the numbers.
"""
