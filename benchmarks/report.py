"""`python -m benchmarks.report` makes every device's report.md and pictures, and docs/results.md's tables, from CSV.

Exit codes: 0 done, 1 a results file or the page is invalid, or with --check stale, 2 a wrong argument.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from PIL import Image

from benchmarks.measured import Folder, read_folders
from benchmarks.pictures import SOURCES, digest, pictures
from benchmarks.results import RESULTS, ROOT
from benchmarks.tables import page_tables, report
from resnet_fast.common.files import whole_file

MARKER = re.compile(r"^<!-- (/?)benchmarks(?:: (\S+))? -->$", re.MULTILINE)

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def new_page(text: str, page: Path, folders: Sequence[Folder]) -> str:
    """Return the page with new tables between `<!-- benchmarks: <folder> -->` and `<!-- /benchmarks -->`.

    Raises:
        ValueError: a marker has no counterpart, or names no folder of results.
    """
    by_name = {folder.path.name: folder for folder in folders}
    pieces, end, opened = [], 0, None
    for marker in MARKER.finditer(text):
        line = text.count("\n", 0, marker.start()) + 1
        closes, name = bool(marker[1]), marker[2]
        if closes != (opened is not None) or closes == bool(name):
            raise ValueError(
                f"{page.name}, line {line}: {marker[0]!r}, but every '<!-- benchmarks: <device> -->' needs one "
                "'<!-- /benchmarks -->' after it, before the next"
            )
        if opened is not None:
            pieces += [f"\n\n{page_tables(by_name[opened], page)}\n\n", marker[0]]
        elif name not in by_name:
            raise ValueError(f"{page.name}, line {line}: no results of {name!r}; there are {', '.join(by_name)}")
        else:
            pieces.append(text[end : marker.end()])
        opened, end = None if closes else name, marker.end()
    if opened is not None:
        raise ValueError(f"{page.name}: '<!-- benchmarks: {opened} -->' has no '<!-- /benchmarks -->' after it")
    return "".join([*pieces, text[end:]])


def texts(folders: Sequence[Folder], page: Path) -> dict[Path, str]:
    """Return the current text of each report and of the page."""
    pages = {folder.path / "report.md": report(folder, list(pictures(folder))) for folder in folders}
    return pages | {page: new_page(page.read_text(encoding="utf-8"), page, folders)}


def stale(results: Path, page: Path) -> list[Path]:
    """Return the files that do not match the CSV files: other texts, and pictures of other rows or without rows.

    Raises:
        ValueError: as in `read_folders` and `new_page`.
    """
    folders = read_folders(results)
    stale_files = [path for path, text in texts(folders, page).items() if _read(path) != text]
    for folder in folders:
        made = pictures(folder)
        for name in SOURCES:
            expected = digest(folder, name) if name in made else None
            if _digest_in(folder.path / f"{name}.png") != expected:
                stale_files.append(folder.path / f"{name}.png")
    return stale_files


def write(results: Path, page: Path) -> list[Path]:
    """Write reports, pictures and the page, and remove pictures without data. Return the written paths.

    If one of them cannot be made, nothing is written.
    """
    folders = read_folders(results)
    contents = {path: text.encode() for path, text in texts(folders, page).items()}
    gone = []
    for folder in folders:
        made = pictures(folder)
        for name in SOURCES:
            path = folder.path / f"{name}.png"
            if name not in made:
                gone.append(path)
                continue
            picture = io.BytesIO()
            made[name](picture)
            contents[path] = picture.getvalue()
    for path, content in contents.items():
        with whole_file(path) as file:
            file.write(content)
    for path in gone:
        path.unlink(missing_ok=True)
    return list(contents)


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _digest_in(path: Path) -> str | None:
    """Return the digest written by `style.save`; None if there is no picture, "" if it is not one of ours."""
    if not path.exists():
        return None
    try:
        with Image.open(path) as image:
            return str(image.info.get("Data", ""))
    except OSError:
        return ""


@app.command()
def main(
    results: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Folder with a folder for each device.")
    ] = RESULTS,
    page: Annotated[
        Path,
        typer.Option(exists=True, dir_okay=False, help="Page with tables between <!-- benchmarks: … --> markers."),
    ] = ROOT / "docs/results.md",
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit with 1 and list stale files.")] = False,
) -> None:
    """Turn the CSV files of results into report.md and pictures, and refresh the page's tables."""
    try:
        if check:
            if stale_files := stale(results, page):
                _stop(f"stale, run python -m benchmarks.report: {', '.join(map(str, stale_files))}")
        else:
            for path in write(results, page):
                typer.echo(path)
    except (ValueError, OSError) as error:
        _stop(str(error))


def _stop(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.report")
