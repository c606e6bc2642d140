"""Pages of docs/: their code blocks, and tables made from a CSV file, which stand between two markers."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n+)*? {4}.*(?=\n\n(?! {4})|\n*\Z)")
FENCED = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


class Block(NamedTuple):
    language: str  # "" if it is indented
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """The page's code blocks: fenced ones, then indented ones."""
    text = page.read_text(encoding="utf-8")
    for match in FENCED.finditer(text):
        yield Block(match[1], match[2])
    for match in INDENTED.finditer(FENCED.sub("", text)):
        yield Block("", re.sub(r"^ {4}", "", match[0], flags=re.MULTILINE))


def python_blocks(page: Path) -> list[str]:
    return [text for language, text in blocks(page) if language == "python"]


def run_example(page: Path, *numbers: int, **given: Any) -> dict[str, Any]:
    """Run the page's Python blocks, or those of the numbers, one after the other; return their names."""
    examples = python_blocks(page)
    names = dict(given)
    for number in numbers or range(len(examples)):
        exec(compile(examples[number], str(page), "exec"), names)
    return names


def write_tables(page: Path, tables: str) -> None:
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def shown_tables(page: Path) -> str:
    return page.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()
