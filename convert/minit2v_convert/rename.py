"""The diffusers layout is a table of (diffusers' name, our name) templates, applied once, in either direction."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

V = TypeVar("V")
Rules = Sequence[tuple[str, str]]


@cache
def _compile(template: str) -> re.Pattern[str]:
    parts = re.split(r"(\{(?:\*|\w+)\})", template)
    return re.compile(
        "".join(
            "(?P<rest>.+)" if p == "{*}" else f"(?P<{p[1:-1]}>[^.]+)" if p.startswith("{") else re.escape(p)
            for p in parts
        )
    )


def rename_one(name: str, rules: Rules) -> tuple[str, int] | None:
    """The new name and the index of the rule that made it; None where no rule knows the name."""
    for n, (source, target) in enumerate(rules):
        if m := _compile(source).fullmatch(name):
            return re.sub(r"\{(\*|\w+)\}", lambda g, m=m: m["rest" if g[1] == "*" else g[1]], target), n
    return None


def rename(state: Mapping[str, V], rules: Rules) -> dict[str, V]:
    """Apply a table to the names of `state`; the values pass through untouched.

    `{x}` stands for one dot-free part of a name, `{*}` for the rest of it. The first rule that matches wins.
    Raises KeyError on a name that no rule knows, ValueError on two names for one target.

    >>> rename({"a.2.resnets.0.bias": 1}, [("a.{i}.resnets.{j}.{*}", "down.{i}.blocks.{j}.res.{*}")])
    {'down.2.blocks.0.res.bias': 1}
    """
    out: dict[str, V] = {}
    origin: dict[str, str] = {}
    unknown = []
    for name, value in state.items():
        hit = rename_one(name, rules)
        if hit is None:
            unknown.append(name)
            continue
        new = hit[0]
        if new in out:
            raise ValueError(f"{origin[new]!r} and {name!r} are both names of {new!r}")
        out[new], origin[new] = value, name
    if unknown:
        raise KeyError(_no_rule(unknown))
    return out


def _no_rule(unknown: Sequence[str]) -> str:
    return f"{len(unknown)} names match no rule, e.g. {', '.join(map(repr, unknown[:5]))}"


def inverse(rules: Rules) -> list[tuple[str, str]]:
    return [(target, source) for source, target in rules]


def under(source: str, target: str, rules: Rules) -> list[tuple[str, str]]:
    """The same rules one level deeper on both sides."""
    return [(source + s, target + t) for s, t in rules]


def shown(text: object) -> str:
    """For messages: line breaks, control characters and what is not a character at all, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def nearest(name: object, known: Sequence[str]) -> str:
    """` (nearest: ...)`, or nothing where nothing is near. name: what a file says, of any kind and length."""
    if not isinstance(name, str) or len(name) > 200:
        return ""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (nearest: {close[0]!r})" if close else ""


@dataclass(frozen=True)
class Layout:
    """The diffusers layout of one network (transformers' of CLIP).

    rules: exact and invertible; the spelling that is written on the way out.
    aliases: other spellings in such files, rewritten to the spelling of `rules` before they apply.
    ignored: source names that mean nothing to us, each with its reason.
    squeezed: our names whose tensor in a file may carry trailing axes of size 1 (1x1 convolutions for linear layers).
    conv1x1: such names again, whose tensor in a file is always written as a convolution's.
    """

    rules: Rules
    aliases: Rules = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    squeezed: Sequence[str] = ()
    conv1x1: Sequence[str] = ()

    def own(self, names: Iterable[str]) -> set[str]:
        """Those of our names that no rule knows: of what a network has beyond diffusers'."""
        rules = inverse(self.rules)
        return {name for name in names if rename_one(name, rules) is None}

    def match(self, names: Iterable[str], own: Collection[str] = ()) -> tuple[dict[str, str], list[str]]:
        """({our name: diffusers' name}, names of the file that no rule knows); names without meaning are in neither.

        own: names that stand for themselves where no rule knows them. Raises ValueError on two names for one target.
        """
        spelled = {}
        for name in names:
            if not any(_compile(i).fullmatch(name) for i in self.ignored):
                hit = rename_one(name, self.aliases)
                spelled[name] = hit[0] if hit else name
        found: dict[str, str] = {}
        unknown = []
        for name, spelling in spelled.items():
            hit = rename_one(spelling, self.rules)
            if hit is None and name in own:
                hit = name, -1
            if hit is None:
                unknown.append(name)
            elif found.setdefault(hit[0], name) != name:
                raise ValueError(f"{found[hit[0]]!r} and {name!r} are both names of {hit[0]!r}")
        return found, unknown

    def to_ours(self, state: Mapping[str, V]) -> dict[str, V]:
        """Diffusers' names -> our names. Raises KeyError or ValueError as `rename`."""
        found, unknown = self.match(state)
        if unknown:
            raise KeyError(_no_rule(unknown))
        return {ours: self.squeeze(ours, state[name]) for ours, name in found.items()}

    def to_diffusers(self, state: Mapping[str, V], own: Collection[str] = ()) -> dict[str, V]:
        """Our names -> diffusers' names; those of `own` stay as they are.

        Raises KeyError on another name that no rule knows, ValueError where one of `own` means something else there.
        """
        convs = [_compile(c) for c in self.conv1x1]
        shaped = {
            name: value[:, :, None, None] if getattr(value, "ndim", 0) == 2 and any(c.fullmatch(name) for c in convs)
            else value
            for name, value in state.items()
        }
        renamed = rename({name: x for name, x in shaped.items() if name not in own}, inverse(self.rules))
        for name in sorted(own):
            if name in renamed or rename_one(name, [*self.aliases, *self.rules]) is not None:
                raise ValueError(f"{name!r} is the name of another tensor in the files of this network: choose another")
        return renamed | {name: value for name, value in shaped.items() if name in own}

    def squeeze(self, name: str, value: Any) -> Any:
        """`value` without the trailing axes of size 1 that our name does not have."""
        if any(_compile(s).fullmatch(name) for s in (*self.squeezed, *self.conv1x1)) and getattr(value, "ndim", 0) > 2:
            while value.ndim > 2 and value.shape[-1] == 1:
                value = value.squeeze(-1)
        return value
