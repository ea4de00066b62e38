"""docs/converting.md: its commands, names, lists and figures are those of the code."""

import doctest
import io
import json
import os
import re
import shlex
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from minit2v import cli
from minit2v.cli.arguments import make_parser
from minit2v_convert import adapters, animatediff, ldm, modelscope
from minit2v_convert import modelscope_configuration as configuration
from minit2v_convert.containers import TRAINERS
from minit2v_convert.detect import LAYOUTS
from minit2v_convert.folders import NO_NETWORKS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "converting.md"
TEXT = PAGE.read_text()


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """The cells of a section's tables, without their heads."""
    lines = re.findall(r"^\| (.*) \|$", section(title), re.M)
    return [line.split(" | ") for line in lines]


def test_commands_say_what_they_said(tmp_path, monkeypatch):
    """In order, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (transcript,) = re.findall(r"^```console\n(.*?)^```$", TEXT, re.M | re.S)
    steps = re.findall(r"^\$ minit2v (.*)\n((?:(?!\$ ).*\n)*)", transcript, re.M)
    assert len(steps) > 10
    check = doctest.OutputChecker().check_output
    for command, want in steps:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = cli.main(shlex.split(command))
        got = out.getvalue() + "".join(f"{n}\n" for n in err.getvalue().splitlines() if n.startswith("minit2v: error"))
        assert check(want, got, doctest.ELLIPSIS), (command, got)
        assert (code != 0) == ("error:" in want), command
    assert sorted(os.listdir()) == ["adapter", "authors", "folder", "model.ckpt", "model.safetensors", "motion.ckpt",
                                    "vae"]  # fmt: skip


def test_other_commands_are_understood(monkeypatch):
    (block,) = re.findall(r"^```\n(minit2v .*?)^```$", TEXT, re.M | re.S)
    for command in block.splitlines():
        args = make_parser().parse_args(shlex.split(command)[1:])
        assert args.command in ("inspect", "convert", "generate", "animate")


def test_options_are_all_there():
    convert = next(a for a in make_parser()._actions if a.dest == "command").choices["convert"]
    options = {s for a in convert._actions for s in a.option_strings if s.startswith("--")} - {"--help", "--debug"}
    assert {row[0].strip("`") for row in rows("Commands") if row[0].startswith("`")} == options


def test_every_layout_is_on_the_list():
    listed = [(row[0], row[1]) for row in rows("What is published")][1:]
    assert sorted(listed) == sorted((layout.title, layout.layout) for layout in LAYOUTS)
    refused = {(layout.title, layout.layout) for layout in LAYOUTS if layout.refused}
    assert {(row[0], row[1]) for row in rows("What is published") if row[2].endswith("recognised only")} == refused


def test_every_reason_is_on_the_list():
    reasons = {*TRAINERS.values(), *NO_NETWORKS.values(), "only useful in I64, because other dtypes round it"}
    for layout in LAYOUTS:
        formats = [fmt for _, formats in layout.parts for fmt in formats]
        reasons |= {*layout.ignored.values(), *(why for fmt in formats for why in fmt.ignored.values())}
    assert {row[2] for row in rows("What is left out, and why")[1:]} == reasons


def test_every_field_of_the_configuration_is_on_the_list():
    fields = {*configuration.READ, *configuration.IGNORED, *configuration.FILES, *configuration.ARGUMENTS}
    cells = [row[0] for row in rows("ModelScope's configuration.json")[1:]]
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == fields


def test_names_are_where_they_are_said_to_be():
    places = re.findall(r"\]\((\.\./convert/[\w/]+\.py)\),\s*((?:`\w+`(?:,\s|\sand\s)?)+)", TEXT)
    assert len(places) > 8
    missing = [(path, name) for path, names in places for name in re.findall(r"`(\w+)`", names)
               if not re.search(rf"^(def {name}\(|class {name}\b|{name}\b.*=)", (PAGE.parent / path).read_text(), re.M)]
    assert missing == []
    for path in re.findall(r"\]\((\.\./[^)#]+)\)", TEXT):
        assert (PAGE.parent / path).exists(), path


def test_figures_are_those_that_were_measured():
    results = json.loads((ROOT / "benchmarks/results/convert_memory.json").read_text())["conversions"]
    table = {row[0]: row[1:] for row in rows("How files are read and written")[1:]}
    assert table == {what: [f"{r['above_mib']:g}", f"{r['limit_above_mib']:g}"] for what, r in results.items()}
    assert all(r["above_mib"] < r["limit_above_mib"] for r in results.values())
    fuzz = json.loads((ROOT / "benchmarks/results/fuzz_convert.json").read_text())
    assert fuzz["files"] == 10_000 and fuzz["wrong"] == []


@pytest.mark.parametrize("module", [modelscope, ldm, animatediff, adapters], ids=lambda m: m.__name__)
def test_tables_are_listed(module):
    listed = section("The tables, and how to add one")
    assert f"{module.__name__.split('.')[1]}.py" in listed
