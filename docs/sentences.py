"""How long are the sentences that people read? Prints the mean of each page or module, and the longest ten.

    python docs/sentences.py                 # README.md and docs/*.md
    python docs/sentences.py docs/memory.md  # one page, with its longest ten
    python docs/sentences.py --code          # docstrings, comments and error messages of the three packages
    python docs/sentences.py minit2v/hub.py  # those of one module

Code, tables, headings, formulas and figures do not count. A link counts as its text, `code` as one word.
"""

import ast
import inspect
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = [path for name in ("minit2v", "kernels", "convert") for path in sorted((ROOT / name).rglob("*.py"))]


def paragraphs(page: str) -> list[str]:
    """The running text of a Markdown page. Each item of a list is a paragraph of its own."""
    page = re.sub(r"^(```|~~~).*?^\1\s*$", "\n", page, flags=re.M | re.S)
    page = re.sub(r"\$\$.*?\$\$", "\n", page, flags=re.S)
    page = re.sub(r"<!--.*?-->", "", page, flags=re.S)
    found, lines = [], []
    for line in [*page.splitlines(), ""]:
        text = line.strip()
        item = re.match(r"([-*+]|\d+\.)\s+", text)
        if not text or item or re.match(r"[#|]|!\[|<|    ", line):
            found.append(" ".join(lines))
            lines = []
        if text and not re.match(r"[#|]|!\[|<|    ", line):
            lines.append(text[item.end() :] if item else text)
    return [p for p in found if p]


def sentences(page: str) -> list[str]:
    """Every sentence of a Markdown page."""
    found = []
    for text in paragraphs(page):
        text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
        text = re.sub(r"`[^`]*`", "code", text)
        text = re.sub(r"\$[^$]*\$", "formula", text)
        text = re.sub(r"\b(e\.g|i\.e|et al|vs|cf|[A-Z])\.(?=\s)", r"\1", text)
        found += [s for s in re.split(r"(?<=[.!?])[\"')*_]*\s+", text) if words(s)]
    return found


def texts(module: Path) -> Iterator[str]:
    """The docstrings, comments and error messages of a Python file, each as a Markdown page."""
    tree = ast.parse(module.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield _page(ast.get_docstring(node) or "")
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            yield " ".join(_said(node.exc.args[0]).split())
    last, lines = 0, []
    with module.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            comment = token.string.lstrip("# ")
            order = re.match(r"(fmt|type|noqa|ruff|pyright|!)", comment)  # to a tool, not to a reader
            if token.type != tokenize.COMMENT or order or "---" in comment:
                continue
            own = token.line.lstrip().startswith("#")
            if lines and not (own and token.start[0] == last + 1):
                yield " ".join(lines)
                lines = []
            lines, last = [*lines, comment], token.start[0] if own else -1
    yield " ".join(lines)


def _page(docstring: str) -> str:
    """A docstring as Markdown: each `argument: what it is` is a paragraph; indented text after a blank line is code."""
    lines, blank, code = [], True, False
    for line in inspect.cleandoc(docstring).splitlines():
        code = line.startswith("  ") and (blank or code)
        blank = not line.strip()
        begins = re.match(r"[`*\w\[\], ]{1,40}(\([^)]*\))?: ", line)
        lines += ["", line] if begins else [f"    {line}" if code else line.strip()]
    return "\n".join(lines)


def _said(node: ast.expr) -> str:
    """The text of a message; a value that is filled in counts as one word."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_said(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _said(node.left) + _said(node.right)
    return " value " if isinstance(node, ast.FormattedValue) else ""


def sentences_of(path: Path) -> list[str]:
    if path.suffix == ".py":
        return [s for text in texts(path) for s in sentences(text)]
    return sentences(path.read_text())


def words(sentence: str) -> int:
    return len(re.findall(r"[\w’'./×%-]*\w[\w’'./×%-]*", sentence))


def mean(found: list[str]) -> float:
    return sum(words(s) for s in found) / max(1, len(found))


def main() -> None:
    named = [Path(p).resolve() for p in sys.argv[1:] if p != "--code"]
    pages = named or (MODULES if "--code" in sys.argv else PAGES)
    longest = []
    for page in pages:
        found = sentences_of(page)
        print(f"{mean(found):5.1f} words a sentence  {page.relative_to(ROOT)}")
        longest += [(words(s), page.name, s) for s in found]
    print(f"{mean([s for *_, s in longest]):5.1f} words a sentence in all. The longest:")
    for n, name, sentence in sorted(longest, reverse=True)[: 10 if len(pages) > 1 else 25]:
        print(f"{n:4d}  {name}: {sentence}")


if __name__ == "__main__":
    main()
