"""Techniques that change how a network is used, without training: for example FreeInit, FreeU and context windows.

Each is off by default. An ordinary call does not run this code.
"""
