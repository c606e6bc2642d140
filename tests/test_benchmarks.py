"""A benchmark times nothing that is wrong or interpreted, and its rows are whole, single, and free of paths."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import results
from benchmarks.timing import alternate, percentiles
from benchmarks.training_step import Setting, WrongProviderError, checked_steps, eager

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
COLUMNS = (
    "provider,precision,batch_size,rounds,p20_ms,p50_ms,p80_ms,images_per_s,ratio_p20,ratio_p50,ratio_p80,"
    "device,driver,cpu_threads,torch,triton,resnet_fast,commit,date_utc"
)

# Runs in a process of its own, without the interpreter in which tests without a GPU run the kernels.
COMPARE = """
import sys
import torch
from benchmarks import compare_steps
torch.set_num_threads(1)
{patch}
compare_steps.app(["--device", "cpu", "--batch-size", "2", "--rounds", "2", *sys.argv[1:]])
"""


def compare(folder: Path, *options: str, patch: str = "", **environment: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-c", COMPARE.format(patch=patch), "--results", str(folder), *options]
    return subprocess.run(command, cwd=ROOT, env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def without_residual_gradient() -> nn.Module:
    model = eager()
    block = model.layer2[1]
    conv1, bn1, conv2, bn2 = block.conv1, block.bn1, block.conv2, block.bn2
    block.forward = lambda x: (bn2(conv2(bn1(conv1(x)).relu())) + x.detach()).relu()
    return model


def without_running_statistics() -> nn.Module:
    model = eager()
    model.bn1.momentum = 0.0
    return model


def frozen() -> nn.Module:
    model = eager()
    model.fc.bias.requires_grad_(False)
    return model


def not_a_number() -> nn.Module:
    model = eager()
    model.fc.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    return model


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
@pytest.mark.parametrize("wrong", (without_residual_gradient, without_running_statistics, frozen, not_a_number))
def test_wrong_provider_is_refused(wrong, precision):
    setting = Setting(CPU, precision, batch_size=4, image_size=16)
    with pytest.raises(WrongProviderError, match="wrong is wrong and is not timed"):
        checked_steps(setting, {"eager": eager, "wrong": wrong})


def test_providers_start_from_the_same_weights_and_batches():
    steps = checked_steps(Setting(CPU, "fp32", batch_size=4, image_size=16), {"a": eager, "b": eager})
    assert steps["a"]().item() == steps["b"]().item()


def test_nothing_is_timed_or_written_for_a_wrong_provider(tmp_path):
    patch = (
        "from benchmarks.training_step import eager\n"
        "def wrong():\n    model = eager()\n    model.bn1.eps = 0.1\n    return model\n"
        "compare_steps.PROVIDERS = {'eager': eager, 'fused': wrong}\n"
        "compare_steps.alternate = lambda *a: print('TIMED')"
    )
    done = compare(tmp_path, "--precision", "fp32", patch=patch)
    assert done.returncode == 1, done.stderr
    assert "fused is wrong and is not timed (cpu, fp32, batch 2)" in done.stderr
    assert "TIMED" not in done.stdout and not list(tmp_path.iterdir())


def test_interpreted_kernels_are_refused(tmp_path):
    pytest.importorskip("triton")
    done = compare(tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 1 and "interpreted kernels are not timed" in done.stderr
    assert not list(tmp_path.iterdir())


def test_rows_are_whole_and_replaced(tmp_path):
    for precision in ("fp32", "bf16", "fp32"):
        done = compare(tmp_path, "--precision", precision)
        assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*/*")
    assert path.name == "training_step.csv" and path.parent.name.endswith("-1-threads")
    text = path.read_text()
    assert text.splitlines()[0] == COLUMNS
    assert str(ROOT) not in text and str(tmp_path) not in text and "/" not in text
    rows = list(csv.DictReader(text.splitlines()))
    assert [(row["provider"], row["precision"]) for row in rows] == [
        ("eager", "fp32"),
        ("fused", "fp32"),
        ("eager", "bf16"),
        ("fused", "bf16"),
    ]
    assert rows[0]["date_utc"] > rows[2]["date_utc"], "the first rows are not those of the last run"
    for row in rows:
        empty = {name for name, value in row.items() if not value}
        assert empty <= {"driver", "triton"}
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["images_per_s"]) == pytest.approx(2000 / float(row["p50_ms"]), rel=0.01)
    assert rows[0]["ratio_p50"] == "1.0000"


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
    assert results.slug(name) == expected


def test_order_turns_round_every_round():
    calls = []
    times = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, rounds=3, warm_up=1)
    assert "".join(calls) == "abbaabba"
    assert [len(values) for values in times.values()] == [3, 3]


def test_percentiles():
    assert percentiles(range(101)) == pytest.approx((20, 50, 80))


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
