"""Renames tensors between diffusers' names and minit2v's, by a table of templates that works in both directions."""

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
    """The new name and the index of the rule that made it, or None if no rule matches."""
    for n, (source, target) in enumerate(rules):
        if m := _compile(source).fullmatch(name):
            return re.sub(r"\{(\*|\w+)\}", lambda g, m=m: m["rest" if g[1] == "*" else g[1]], target), n
    return None


def rename(state: Mapping[str, V], rules: Rules) -> dict[str, V]:
    """Apply a table to the names of `state`. The values do not change.

    `{x}` matches one part of a name without dots, and `{*}` matches the rest. The first rule that matches is used.
    Raises KeyError on a name that no rule matches, ValueError on two names that get the same new name.

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
    """The same rules with a prefix on both sides."""
    return [(source + s, target + t) for s, t in rules]


def shown(text: object) -> str:
    """A text for messages. Line breaks, control characters and invalid characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def nearest(name: object, known: Sequence[str]) -> str:
    """" (nearest: ...)" with the most similar known name, or "" if none is similar. name: any value from a file.

    A known name of several words, of which one is `name`, counts as more similar than other spellings.
    """
    if not isinstance(name, str) or len(name) > 200:
        return ""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if not close and (word := name.strip("-")):
        close = sorted((k for k in known if word in re.split(r"[_.-]", k)), key=len)
    close = close or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (nearest: {close[0]!r})" if close else ""


@dataclass(frozen=True)
class Layout:
    """The layout of one network in diffusers, or of CLIP in transformers. "Our" names are those of minit2v's modules.

    rules: (diffusers' name, our name). They can be inverted, and give the names that are written to files.
    aliases: (other name in such files, the name that `rules` knows). They are applied first.
    ignored: {name that is not needed: reason}.
    squeezed: our names of linear layers that a file may store as 1x1 convolutions, with trailing axes of size 1.
    conv1x1: the same, but these are always written as convolutions.
    """

    rules: Rules
    aliases: Rules = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    squeezed: Sequence[str] = ()
    conv1x1: Sequence[str] = ()

    def own(self, names: Iterable[str]) -> set[str]:
        """Our names that no rule matches. They belong to layers that diffusers' network does not have."""
        rules = inverse(self.rules)
        return {name for name in names if rename_one(name, rules) is None}

    def match(self, names: Iterable[str], own: Collection[str] = ()) -> tuple[dict[str, str], list[str]]:
        """({our name: name in the file}, names in the file that no rule matches). Ignored names are in neither.

        own: names that stay the same if no rule matches. Raises ValueError on two names that get the same new name.
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
        """Rename from diffusers' names to ours. Raises KeyError or ValueError as `rename` does."""
        found, unknown = self.match(state)
        if unknown:
            raise KeyError(_no_rule(unknown))
        return {ours: self.squeeze(ours, state[name]) for ours, name in found.items()}

    def to_diffusers(self, state: Mapping[str, V], own: Collection[str] = ()) -> dict[str, V]:
        """Rename from our names to diffusers'. Names in `own` stay the same.

        Raises KeyError on a name that no rule matches, ValueError if a name in `own` is the name of another tensor
        there.
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
                raise ValueError(f"{name!r} is already a name in the files of this network: rename your layer")
        return renamed | {name: value for name, value in shaped.items() if name in own}

    def squeeze(self, name: str, value: Any) -> Any:
        """`value` without trailing axes of size 1, if our layer does not have them."""
        if any(_compile(s).fullmatch(name) for s in (*self.squeezed, *self.conv1x1)) and getattr(value, "ndim", 0) > 2:
            while value.ndim > 2 and value.shape[-1] == 1:
                value = value.squeeze(-1)
        return value
