"""`minit2v blank`: the folder of an official model, with zeros for its weights."""

import argparse

from ..pipelines.blank import write_blank
from .messages import say, tell_path


def run(args: argparse.Namespace) -> int:
    """The exit code; an error is raised."""
    folder = write_blank(args.model, args.dst)
    files = [p for p in folder.rglob("*") if p.is_file()]
    size, disk = (sum(sizes) for sizes in zip(*((s.st_size, 512 * getattr(s, "st_blocks", 0)) for s in
                                                 (p.stat() for p in files)), strict=True))  # fmt: skip
    say(f"{folder} has zeros as weights: {size / 1e9:.1f} GB, which take {disk / 1e6:.1f} MB on the disk")
    tell_path(folder)
    return 0
