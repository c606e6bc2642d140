"""docs/depth.md shows what docs/skip.csv holds, and the page's example runs."""

import depth_page
from pages import DOCS, run_example, shown_tables

from resnet_fast.ops import backend

PAGE = DOCS / "depth.md"


def test_the_page_shows_the_counts_and_the_csv():
    shown = shown_tables(PAGE)
    assert depth_page.counts() in shown and depth_page.result() in shown


def test_the_example_runs(capsys, monkeypatch):
    monkeypatch.setattr(backend, "_INTERPRETED", False)  # of 56 layers it would take minutes
    run_example(PAGE)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[1] == "56 layers, 853,018 parameters, output [4, 10]"
    assert lines[2].startswith("26 layers, ") and lines[2].endswith("output [4, 100]")
