"""Hooks of mkdocs: the README is the first page; files outside of docs/ that a page links become part of the site."""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# [text](target) and ![text](target), and images within links
LINK = re.compile(r"(\[[^\]\n]*\])\(([^)#\s]+)(#[^)\s]*)?\)")
SHOWN = {".md", ".png", ".svg", ".csv", ".json"}
README = ROOT / "README.md"  # index.md in the site


def source(uri: str) -> Path:
    """Return the file of the repository that a page shows."""
    if uri.startswith("repository/"):
        return ROOT / uri.removeprefix("repository/")
    return README if uri == "index.md" else ROOT / "docs" / uri


def name(path: Path) -> str:
    """Return what the site calls a file of the repository."""
    if path == README:
        return "index.md"
    inside = path.relative_to(ROOT).as_posix()
    return inside.removeprefix("docs/") if inside.startswith("docs/") else f"repository/{inside}"


def resolve(page: Path, target: str) -> Path | None:
    """Return the file that a link of the page leads to; None for an address, or a file that is not there."""
    if "://" in target:
        return None
    path = Path(os.path.normpath(page.parent / target))
    return path if path.exists() and path.is_relative_to(ROOT) else None


def on_files(files: Files, config) -> Files:
    """Add the README, and what pages link outside of docs/."""
    todo = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    todo += [source(file.src_uri) for file in files.documentation_pages()]
    seen = set()
    while todo:
        path = todo.pop()
        if path in seen or path.suffix not in SHOWN:
            continue
        seen.add(path)
        if files.get_file_from_path(name(path)) is None:
            files.append(File.generated(config, name(path), abs_src_path=str(path)))
        if path.suffix == ".md":
            targets = (match[2] for match in LINK.finditer(path.read_text(encoding="utf-8")))
            todo += [linked for target in targets if (linked := resolve(path, target)) and linked.is_file()]
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Point the links of a page to their places in the site; one to a folder or to code becomes its text."""
    here = source(page.file.src_uri)

    def replaced(match: re.Match) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = resolve(here, target)
        if path is None:
            return match[0]
        if path.is_file() and path.suffix in SHOWN:
            return f"{text}({os.path.relpath(name(path), os.path.dirname(page.file.src_uri) or '.')}{anchor})"
        return text[1:-1]

    return LINK.sub(replaced, markdown)
