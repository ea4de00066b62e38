"""The page of `minit2v ui`: `work.py` does what its buttons ask for, and `page.py` lays them out with Gradio.

The page runs the commands of `minit2v/cli`, so a video of the page and one of the command line are the same.
"""
