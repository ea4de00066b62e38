"""Finds, reads and writes files: hub, embedded models, configs, weights, videos.

Networks and pipelines use these modules. The modules do not depend on any network or pipeline.
"""
