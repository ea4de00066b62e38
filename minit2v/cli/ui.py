"""`minit2v ui`: a web page on which videos are made, served on this computer."""

import argparse
import time
from importlib.util import find_spec

from .ends import importing
from .messages import say, tell


def run(args: argparse.Namespace) -> int:
    if find_spec("gradio") is None:
        raise ValueError('minit2v ui needs Gradio: pip install "minit2v[ui]"')
    with importing():
        from ..ui.page import serve
        from ..ui.work import Work
        from .loading import find_device

        find_device(args.device)
    work = Work(args.output, args.model, args.base, args.adapter, args.lora, args.device)
    with serve(work, args.host, args.port) as address:
        tell(address)
        say(f"videos are written to {work.folder}; Ctrl-C stops the server")
        while True:
            time.sleep(3600)
