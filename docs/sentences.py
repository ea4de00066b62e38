"""How long are the sentences of README and docs? Prints the mean of each page, and the longest ten.

    python docs/sentences.py                 # README.md and docs/*.md
    python docs/sentences.py docs/memory.md  # one page, with its longest ten

Code, tables, headings, formulas and figures are no sentences. A link counts as its text, `code` as one word.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


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


def words(sentence: str) -> int:
    return len(re.findall(r"[\w’'./×%-]*\w[\w’'./×%-]*", sentence))


def mean(page: str) -> float:
    counts = [words(s) for s in sentences(page)]
    return sum(counts) / max(1, len(counts))


def main() -> None:
    pages = [Path(p).resolve() for p in sys.argv[1:]] or PAGES
    longest = []
    for page in pages:
        text = page.read_text()
        print(f"{mean(text):5.1f} words a sentence  {page.relative_to(ROOT)}")
        longest += [(words(s), page.name, s) for s in sentences(text)]
    print(f"{sum(n for n, *_ in longest) / max(1, len(longest)):5.1f} words a sentence in all. The longest:")
    for n, name, sentence in sorted(longest, reverse=True)[:10]:
        print(f"{n:4d}  {name}: {sentence}")


if __name__ == "__main__":
    main()
