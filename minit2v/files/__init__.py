"""Where files come from and how they are read and written: hub, embedded models, configs, weights, videos.

Nothing here knows a network or a pipeline: those call it.
"""
