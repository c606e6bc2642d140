"""docs/numerics.md shows what docs/numerics.csv holds, and the file holds every case."""

from numerics import CASES, RESULTS
from numerics_page import read, tables
from pages import DOCS, shown_tables


def test_the_page_shows_the_file():
    assert shown_tables(DOCS / "numerics.md") == tables(read(DOCS / "numerics.csv"))


def test_the_file_holds_every_case():
    expected = [(case.name, dtype, result) for case in CASES for dtype in case.dtypes for result in RESULTS]
    assert [(row["case"], row["dtype"], row["result"]) for row in read(DOCS / "numerics.csv")] == expected
