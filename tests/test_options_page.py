"""docs/options.md is generated from the fields of TrainConfig: `python tests/test_options_page.py` rewrites it."""

import re

from pages import DOCS, shown_tables, write_tables

from resnet_fast.cli.settings import NAMES, help_text
from resnet_fast.training.config import SETTINGS

PAGE = DOCS / "options.md"


def table() -> str:
    rows = ["| option | value | meaning |", "| --- | --- | --- |"]
    for name in NAMES:
        setting = SETTINGS[name]
        text, default = re.fullmatch(r"(.*?)(?: \[(.*)\])?", help_text(setting)).groups()
        moves = "; also with `--resume`" if setting.may_move and name != "out" else ""
        rows.append(f"| `{setting.flag}` | {setting.rule.text}{moves} | {text}{f' *{default}*' if default else ''} |")
    return "\n".join(rows).replace("<", "&lt;")


def test_the_page_shows_the_options():
    assert shown_tables(PAGE) == table()


if __name__ == "__main__":
    write_tables(PAGE, table())
