"""Rows of measurements are written completely or not at all, and name the machine and versions but no path."""

import os
import subprocess

import pytest

from benchmarks import results
from resnet_fast.common.machine import slug


def test_a_file_with_other_columns_is_left_alone(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="rows.csv must have the columns a, c"):
        results.replace_rows(path, [{"a": "1", "c": "3"}], ["a"])
    assert path.read_text() == "a,b\n1,2\n"


def test_unfinished_rows_leave_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    results.replace_rows(path, [{"a": "1", "b": "2"}], ["a"])

    def full_disk(fd):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        results.replace_rows(path, [{"a": "1", "b": "3"}], ["a"])
    assert path.read_text() == "a,b\n1,2\n" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("AMD EPYC", "amd-epyc"),
        ("Intel(R) Xeon(R) Platinum 8480+ @ 2.00GHz", "intel-xeon-platinum-8480"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("../../etc/passwd", "etc-passwd"),
        ("\\\\ ..", "unknown"),
    ],
)
def test_slug_is_no_path(name, expected):
    assert slug(name) == expected


def test_commit_of_a_copy_is_unknown_and_of_a_changed_tree_dirty(tmp_path):
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    assert results.commit(tmp_path) == "unknown"
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-m", "m")
    head = results.commit(tmp_path)
    assert len(head) >= 12 and not head.endswith("-dirty")
    written = tmp_path / "benchmarks" / "results" / "rows.csv"
    written.parent.mkdir(parents=True)
    written.write_text("1")
    assert results.commit(tmp_path) == head, "results that were just written make the code dirty"
    (tmp_path / "file").write_text("2")
    assert results.commit(tmp_path) == f"{head}-dirty"
    assert results.commit(written.parent) == "unknown", "a copy inside another repository has not its commit"
