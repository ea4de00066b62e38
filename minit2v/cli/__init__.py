"""The `minit2v` command: a file for each of its commands, what they share in arguments, loading and messages.

Nothing outside this folder imports it. What needs torch is imported when its command runs, so that `minit2v --help`
and a wrong option answer at once.
"""

from collections.abc import Sequence

from .arguments import make_parser
from .messages import one_line, said_in_one_line, say

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 after an error, 2 on wrong usage, 130 when interrupted."""
    parser = make_parser()
    debug = False
    try:
        with said_in_one_line():
            args = parser.parse_args(argv)
            debug = args.debug
            if args.command == "inspect":
                from . import inspect

                return inspect.run(args)
            if args.command == "convert":
                from . import convert

                return convert.run(args)
            if args.command == "blank":
                from . import blank

                return blank.run(args)
            if args.command == "bisect":
                from . import bisect

                return bisect.run(args)
            from . import videos

            return videos.run(args, parser)
    except SystemExit as e:  # of argparse, which has said why
        return e.code if isinstance(e.code, int) else 1
    except KeyboardInterrupt:
        if debug:
            raise
        say("interrupted; nothing half-written is left")
        return 130
    except Exception as e:
        if debug:
            raise
        say(f"error: {one_line(e)}")
        return 1
