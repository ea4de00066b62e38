"""The options of `minit2v train`: one for each field of a recipe. Its name has dashes in place of underscores."""

import argparse
import dataclasses
import typing
from typing import Any

from ..training.recipe import HINTS, Recipe, parse, words

SEVERAL = ("data", "targets", "validation_prompts", "prior_prompts")  # these options take several words


def add_options(parser: Any) -> None:
    """Add an option for every field of a recipe. An option that was not given has no attribute in the namespace."""

    parser.add_argument("config", nargs="?", default=None, metavar="CONFIG", help="a .toml file with options, or the "
                        "run.json of an earlier run; options on the command line replace those in the file")
    for f in dataclasses.fields(Recipe):
        flag, help_text = f"--{f.name.replace('_', '-')}", f.metadata["help"].replace("%", "%%")
        default = f.default if f.default not in (None, "", (), False) else ""
        if default != "":
            help_text += f" (default: {default})"

        def one(text: str, name: str = f.name) -> Any:
            try:
                return parse(name, text)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None

        hint = HINTS[f.name]
        if hint is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=help_text)
        elif f.name == "timesteps":
            parser.add_argument(flag, nargs="+", action=_Timesteps, metavar="WORD", help=help_text)
        elif f.name in SEVERAL:
            parser.add_argument(flag, nargs="+", metavar="TEXT", help=help_text)
        else:
            known = words(hint)
            kinds = typing.get_args(hint) or (hint,)
            metavar = None if known else "N" if int in kinds else "X" if float in kinds else "TEXT"
            parser.add_argument(flag, type=one, metavar=metavar, choices=known or None, help=help_text)
    parser.add_argument("--check", action="store_true", default=False, help="show the training clips with "
                        "their captions, and do not train")
    parser.add_argument("--resume-anyway", action="store_true", default=False, help="resume a run although its "
                        "options have changed")


class _Timesteps(argparse.Action):
    """One word, or two numbers."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        if len(values) == 1:
            value: Any = values[0]
        elif len(values) == 2 and all(v.isdecimal() for v in values):
            value = (int(values[0]), int(values[1]))
        else:
            parser.error(f"{option} must be one word, or the lowest and the highest timestep, not {' '.join(values)}")
        setattr(namespace, self.dest, value)
