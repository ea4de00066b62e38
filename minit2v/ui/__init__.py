"""The page of `minit2v ui`: `page.py` arranges it with Gradio, and `work.py` has the functions of its buttons.

The page runs the commands of `minit2v/cli`. So the page and the command line make the same videos.
"""
