"""The options of `minit2v train`: those of a recipe, under their own names with dashes."""

import argparse
import dataclasses
from typing import Any

from ..training.recipe import HINTS, Recipe, parse, words

SEVERAL = ("data", "targets", "validation_prompts", "prior_prompts")  # these options take several words


def add_options(parser: Any) -> None:
    """Add every option of a recipe. Options that are not given are not in the parsed arguments."""

    parser.add_argument("config", nargs="?", default=None, metavar="CONFIG", help="a .toml file with options, or the "
                        "run.json of a run; options on the command line win")
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
            parser.add_argument(flag, type=one, metavar=None if known else "VALUE", choices=known or None,
                                help=help_text)  # fmt: skip
    parser.add_argument("--check", action="store_true", default=False, help="show the data that would be used, and end")
    parser.add_argument("--resume-anyway", action="store_true", default=False, help="go on with a run although its "
                        "options or data have changed")


class _Timesteps(argparse.Action):
    """One word, or two numbers."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        if len(values) == 1:
            value: Any = values[0]
        elif len(values) == 2 and all(v.isdecimal() for v in values):
            value = (int(values[0]), int(values[1]))
        else:
            parser.error(f"{option} takes one word, or the lowest and the highest timestep, not {' '.join(values)}")
        setattr(namespace, self.dest, value)
