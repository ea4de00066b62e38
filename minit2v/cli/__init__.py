"""The `minit2v` command. Most commands have a file of their own; `videos.py` has generate, restyle and animate.

The other files hold what the commands share: arguments, loading, messages, and how a command begins and ends.
Outside this folder only `minit2v/ui` imports it, because its page runs the same commands. A command imports torch
only when it runs. So `minit2v --help` and a wrong option answer at once.
"""

from collections.abc import Sequence

from .ends import importing, open_closed_streams, settings_of_a_call

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 after an error, 2 on wrong usage, 130 when interrupted.

    SIGTERM and SIGHUP end the process as usual, and no unfinished file stays. The environment is not changed.
    """
    open_closed_streams()
    with importing():
        from .arguments import make_parser
        from .messages import one_line, said_in_one_line, say
    debug = False
    try:
        with settings_of_a_call(), said_in_one_line():
            parser = make_parser()
            args = parser.parse_args(argv)
            debug = args.debug
            with importing():
                if args.command == "inspect":
                    from .inspect import run
                elif args.command == "convert":
                    from .convert import run
                elif args.command == "blank":
                    from .blank import run
                elif args.command == "plan":
                    from .plan import run
                elif args.command == "trace":
                    from .trace import run
                elif args.command == "ui":
                    from .ui import run
                elif args.command == "bisect":
                    from .bisect import run
                elif args.command == "train":
                    from .train import run
                else:
                    from .videos import run
            return run(args)
    except SystemExit as e:  # argparse has printed the reason
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
