"""Tables between the authors' layouts (also those of trainers and kohya) and the names of diffusers and transformers.

A row is (authors' name, diffusers' name). Both are templates as in `rename`, with three more signs:

    {n*i+j+1}  {last-i}  {up[i]}   in an authors' name: arithmetic with the placeholders of diffusers' name and
                                   with numbers of the network (here `n`, `last`, `up`, which its `Format` defines)
    {q,k,v}                        in a diffusers' name: the rows of the authors' tensor are these tensors, in order
    {0,1}                          in an authors' name: copies of one tensor have these names

A row may have a third element. Then the authors store a linear layer as a convolution, with so many trailing axes of
size 1. The first row whose diffusers' side matches is used.

The config of a network gives all its names (`shapes`). So a table is expanded once, from diffusers' names to the
authors'. The way back is a look-up in the expanded table, and needs no equation for i and j.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

from .shapes import Config, Get, Shape, Shapes

Row = tuple[str, str] | tuple[str, str, int]
Rows = Sequence[Row]
Numbers = Mapping[str, Any]  # the values are int, or a list of int

CONV1D, CONV2D = 1, 2  # third elements
SAME: Rows = [("{*}", "{*}")]
SIGN = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Entry:
    """One tensor of the authors, and the tensors of diffusers that are the same or its rows."""

    authors: tuple[str, ...]  # all its names; several if the file has copies
    diffusers: tuple[str, ...]  # one name, or several for its rows
    ones: int  # trailing axes of size 1 that only the authors' tensor has
    row: int  # index of the row in the table

    def authors_shape(self, shapes: Shapes) -> Shape:
        shape = shapes[self.diffusers[0]]
        return (*(n * len(self.diffusers) for n in shape[:1]), *shape[1:], *[1] * self.ones)


def below(authors: str, diffusers: str, rows: Rows) -> list[Row]:
    """The same rows with a prefix on both sides."""
    return [(authors + a, diffusers + d, *ones) for a, d, *ones in rows]


@cache
def pattern(template: str) -> re.Pattern[str]:
    def part(sign: str) -> str:
        if sign == "*":
            return "(?P<rest>.+)"
        return f"(?P<choice>{sign.replace(',', '|')})" if "," in sign else f"(?P<{sign}>[^.]+)"

    pieces = SIGN.split(template)
    return re.compile("".join(part(p) if n % 2 else re.escape(p) for n, p in enumerate(pieces)))


@cache
def _pieces(template: str) -> list[str]:
    return SIGN.split(template)


@cache
def _terms(sign: str) -> list[tuple[str, str, str]]:
    return re.findall(r"([+-]?)(?:(\w+)\*)?(\w+)", sign)


def evaluate(sign: str, values: Numbers) -> Any:
    """The value of `{sign}`: the text of a placeholder, or the result of the arithmetic above."""
    if sign in values:
        return values[sign]
    if sign.endswith("]"):
        name, index = sign[:-1].split("[")
        return values[name][int(values[index])]
    total = 0
    for minus, factor, name in _terms(sign):
        term = int(values.get(name, name)) * int(values.get(factor, factor or 1))
        total += -term if minus == "-" else term
    return total


def fill_in(template: str, values: Numbers) -> tuple[str, ...]:
    names = [""]
    for n, piece in enumerate(_pieces(template)):
        if not n % 2:
            choices = [piece]
        elif "," in piece:
            choices = piece.split(",")
        else:
            choices = [str(evaluate("rest" if piece == "*" else piece, values))]
        names = [name + choice for name in names for choice in choices]
    return tuple(names)


def authors_names(rows: Rows, name: str, numbers: Numbers) -> tuple[tuple[str, ...], int, str | None] | None:
    """(authors' names, index of the row, which of {q,k,v}) for one name of diffusers. None if no row matches."""
    for n, row in enumerate(rows):
        if m := pattern(row[1]).fullmatch(name):
            found = m.groupdict()
            return fill_in(row[0], {**numbers, "rest": found.get("rest"), **found}), n, found.get("choice")
    return None


def write_out(rows: Rows, names: Iterable[str], numbers: Numbers) -> list[Entry]:
    """The expanded table. Raises ValueError if the rows do not map these names one to one."""
    found: dict[tuple[str, ...], tuple[int, dict[str | None, str]]] = {}
    for name in names:
        hit = authors_names(rows, name, numbers)
        if hit is None:
            raise ValueError(f"no row of the table matches {name!r}")
        authors, n, choice = hit
        parts = found.setdefault(authors, (n, {}))[1]
        if choice in parts:
            raise ValueError(f"{parts[choice]!r} and {name!r} both become {authors[0]!r}")
        parts[choice] = name
    out = []
    for authors, (n, parts) in found.items():
        signs = [s for s in SIGN.findall(rows[n][1]) if "," in s]
        order: Sequence[str | None] = signs[0].split(",") if signs else [None]
        if missing := [c for c in order if c not in parts]:
            raise ValueError(f"{authors[0]!r}: no tensor for {missing}")
        out.append(Entry(authors, tuple(parts[c] for c in order), rows[n][2] if len(rows[n]) > 2 else 0, n))
    return out


def _no_numbers(_: Any) -> Numbers:
    return {}


@dataclass(frozen=True, eq=False)
class Format:
    """One network in one layout.

    component: its folder in a pipeline.
    shapes: config -> shapes of all tensors. infer: shapes in a file -> config. known: {title: config} of published
        models, the usual one first.
    rows: the table. numbers: config -> its numbers for the table. glance: names in a file -> the numbers that `infer`
        needs.
    ignored: {authors' name that is not converted: reason}.
    optional: {diffusers' tensor that may be missing: the only dtype in which it is converted, or "" for any}.
    computed: {diffusers' tensor that some authors' files lack: the operation that computes it}.
    spell: a function that is applied to the authors' names after the table.
    written: the prefix of diffusers' names in a file.
    """

    component: str
    shapes: Callable[[Config], Shapes]
    infer: Callable[[Config, Get], Config]
    known: Mapping[str, Config]
    rows: Rows = field(default_factory=lambda: SAME)
    numbers: Callable[[Config], Numbers] = _no_numbers
    glance: Callable[[Iterable[str]], Numbers] = _no_numbers
    ignored: Mapping[str, str] = field(default_factory=dict)
    optional: Mapping[str, str] = field(default_factory=dict)
    computed: Mapping[str, str] = field(default_factory=dict)
    spell: Callable[[str], str] = str
    written: str = ""

    def table(self, config: Config) -> "Table":
        """The expanded table for one network."""
        return _table(self, json.dumps(config, sort_keys=True))

    def reader(self, get: Get, names: Iterable[str]) -> Get:
        """A `get` for diffusers' names, from a `get` for authors' names. Axes that only the authors have are removed.
        """
        numbers = self.glance(names)

        def get_diffusers(name: str) -> Shape | None:
            hit = authors_names(self.rows, name, numbers)
            shape = get(self.spell(hit[0][0])) if hit else None
            if shape is None or hit is None:
                return None
            _, row, choice = hit
            ones = self.rows[row][2] if len(self.rows[row]) > 2 else 0
            parts = 3 if choice else 1
            return (shape[0] // parts, *shape[1 : len(shape) - ones]) if shape else shape

        return get_diffusers

    def why_ignored(self, name: str, config: Config) -> str | None:
        return reason(self.ignored, name, self.numbers(config))


@dataclass(frozen=True)
class Table:
    """An expanded table. shapes: {diffusers' name: shape}. optional, computed: as in `Format`, for single names."""

    entries: Sequence[Entry]
    shapes: Shapes
    optional: Mapping[str, str]
    computed: Mapping[str, str]


@lru_cache(maxsize=64)
def _table(fmt: Format, config: str) -> Table:
    c = json.loads(config)
    shapes = fmt.shapes(c)
    entries = write_out(fmt.rows, shapes, fmt.numbers(c))
    if fmt.spell is not str:
        entries = [Entry(tuple(map(fmt.spell, e.authors)), e.diffusers, e.ones, e.row) for e in entries]

    def those(templates: Mapping[str, str]) -> dict[str, str]:
        return {n: s for t, s in templates.items() for n in shapes if pattern(t).fullmatch(n)}

    return Table(entries, shapes, those(fmt.optional), those(fmt.computed))


def reason(ignored: Mapping[str, str], name: str, numbers: Numbers) -> str | None:
    """The reason why `name` is not converted, or None if it is not on the list."""
    for template, why in ignored.items():
        literal = SIGN.sub(lambda m: str(numbers[m[1]]) if m[1] in numbers else m[0], template)
        if pattern(literal).fullmatch(name):
            return why
    return None
