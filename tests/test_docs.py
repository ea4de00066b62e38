"""The documentation says what the code does: links, examples, tables and figures."""

import ast
import doctest
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")], key=lambda path: path.as_posix())
FIGURES = ROOT / "docs" / "figures"


@pytest.fixture(scope="module")
def facts():
    sys.path.insert(0, str(FIGURES))
    try:
        import facts

        yield facts
    finally:
        sys.path.remove(str(FIGURES))


@pytest.fixture(scope="module")
def kernel_facts(facts):
    """draw_kernels.py, which stands on scripts of benchmarks/."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    sys.modules.pop("kernels", None)  # transformers looks for a package of that name, and may have found our folder
    try:
        import draw_kernels

        yield draw_kernels
    finally:
        sys.path.remove(folder)


@pytest.fixture(scope="module")
def full(facts):
    return facts.modelscope()


@pytest.fixture(scope="module")
def motion(facts):
    return facts.animatediff()


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = page.read_text()
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or anchor and anchor not in anchors(target.read_text()):
            broken.append(link)
    assert broken == []


def names_in(path: Path) -> set[str]:
    """The functions, classes and constants of a file, with `Class.method` and `Class.attribute`."""
    names: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{node.name}.")
            elif isinstance(node, ast.FunctionDef) and prefix:  # what a method sets on self
                for part in ast.walk(node):
                    if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                        if isinstance(part.value, ast.Name) and part.value.id == "self":
                            names.add(prefix + part.attr)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    names.update(prefix + n.id for n in ast.walk(target) if isinstance(n, ast.Name))

    visit(ast.parse(path.read_text()).body, "")
    return names


@pytest.mark.parametrize("name, least", [("architecture.md", 15), ("kernels.md", 10)])
def test_places_in_files_are_there(name, least):
    """A link to a file and, behind a comma, names in it."""
    page = ROOT / "docs" / name
    names = r"\]\(((?:\.\./|figures/)[\w/]+\.py)\),\s(?:class )?((?:`[\w.]+`(?:,\s|\sand\s)?)+)"
    places = re.findall(names, page.read_text())
    assert len(places) > least
    missing = [(path, name) for path, found in places for name in re.findall(r"`([\w.]+)`", found)
               if name not in names_in(page.parent / path)]  # fmt: skip
    assert missing == []


def test_there_are_pages():
    assert {"README.md", "docs/architecture.md"} <= {page.relative_to(ROOT).as_posix() for page in PAGES}


@pytest.mark.parametrize("page", [p for p in PAGES if ">>> " in p.read_text()], ids=lambda page: page.name)
def test_examples_run(page):
    runner = doctest.DocTestRunner()
    for number, code in enumerate(re.findall(r"^```python\n(>>> .*?)^```$", page.read_text(), re.M | re.S)):
        result = runner.run(doctest.DocTestParser().get_doctest(code, {}, f"{page.name}, {number}", str(page), 0))
        assert result.failed == 0, "see the captured output"
    assert runner.tries > 0


RUN = ("extending.md", "adapters.md", "training.md")
EXAMPLES = [pytest.param(code, id=f"{page}-{n}") for page in RUN for n, code in enumerate(
    re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.M | re.S), 1)]  # fmt: skip


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_of_pages_run(code, tmp_path, monkeypatch):
    """Each by itself, as somebody would who has copied it into a file."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, "a page", "exec"), {"__name__": "__main__"})


def test_options_of_training_are_those_of_the_code():
    """Every command of the page is one, its recipes are valid, and every option of a recipe is explained."""
    import shlex

    from minit2v.cli.arguments import make_parser
    from minit2v.training.recipe import HINTS, Recipe

    text = (ROOT / "docs" / "training.md").read_text()
    commands = [line for block in re.findall(r"^```\n(.*?)^```$", text, re.M | re.S) for line in block.splitlines()
                if line.startswith("minit2v ")]  # fmt: skip
    commands += [f"minit2v train --data clips --out run {options}"
                 for options in re.findall(r"\| `(--[^`]+)` \|", text)]  # fmt: skip
    assert len(commands) > 9
    for command in commands:
        args = make_parser().parse_args(shlex.split(command)[1:])
        if args.command == "train":
            Recipe(**{name: value for name, value in vars(args).items() if name in HINTS})
    explained = set(re.findall(r"`(?:--)?([\w-]+)[^`]*`", text))
    missing = {name for name in HINTS if not {name, name.replace("_", "-")} & explained}
    assert missing == set()


def test_the_table_of_training_is_the_committed_result(monkeypatch):
    import json

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from training_memory import rows

    stored = json.loads((ROOT / "benchmarks" / "results" / "training_memory.json").read_text())
    lines = set((ROOT / "docs" / "training.md").read_text().splitlines())
    found = rows(stored["counted on meta, in bytes"])
    assert len(found) == 12 and [row for row in found if row not in lines] == []
    for row in stored["embedded models on this CPU"]:
        assert abs(row["planned"] / row["measured"] - 1) < 0.02


def test_tables_are_those_of_the_code(facts, full, motion):
    lines = set((ROOT / "docs" / "architecture.md").read_text().splitlines())
    wrong = [row for table in facts.tables(full, facts.embedded(), motion) for row in table if row not in lines]
    assert wrong == [], "run docs/figures/facts.py"


def test_tables_of_bytes_are_those_that_are_counted(kernel_facts):
    lines = set((ROOT / "docs" / "kernels.md").read_text().splitlines())
    wrong = [row for table in kernel_facts.tables() for row in table if row not in lines]
    assert wrong == [], "run docs/figures/draw_kernels.py"


def test_figures_are_drawn(facts, kernel_facts, full, motion, tmp_path):
    import draw
    import draw_adapters
    import draw_attention
    import draw_training

    drawn = [*draw.draw_all(tmp_path, full, motion), *kernel_facts.draw_all(tmp_path),
             *draw_adapters.draw_all(tmp_path), draw_attention.draw_attention(tmp_path / "attention.png"),
             draw_training.draw_training(tmp_path / "forgetting.png")]  # fmt: skip
    elsewhere = {"solvers.png", "solvers_shapes.png",  # by benchmarks
                 "explorer-light.png", "explorer-dark.png",  # by docs/explorer/draw_explorer.py, with a Chromium
                 "ui.png"}  # by docs/figures/draw_ui.py, with a Chromium and Gradio  # fmt: skip
    assert {path.name for path in drawn} == {path.name for path in FIGURES.glob("*.png")} - elsewhere
    for path in drawn:
        assert path.stat().st_size > 30_000
    assert all(path.stat().st_size < 300_000 for path in FIGURES.glob("*.png"))


def test_sentences_are_short():
    """At most 17 words on average on each page and in each module, and 30 in any sentence.

    docs/sentences.py lists the longest.
    """
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import sentences
    finally:
        sys.path.pop(0)
    page = "# A heading\n\nOne two. `x y` is\nthree [a b](c).\n\n| a | table |\n\n- Last\n"
    assert [sentences.words(s) for s in sentences.sentences(page)] == [2, 5, 1]
    read = [*sentences.PAGES, *sentences.MODULES]
    found = {page.relative_to(ROOT).as_posix(): sentences.sentences_of(page) for page in read}
    assert {name: mean for name, texts in found.items() if (mean := sentences.mean(texts)) > 17} == {}
    assert [(name, s) for name, texts in found.items() for s in texts if sentences.words(s) > 30] == []
