"""A benchmark times nothing that is wrong or interpreted, and its rows are whole, single, and free of paths."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from benchmarks import compare_steps, results, training_step
from benchmarks.timing import alternate, percentiles
from benchmarks.training_step import Setting, WrongProviderError, checked_steps, eager

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
COLUMNS = (
    "provider,precision,batch_size,rounds,p20_ms,p50_ms,p80_ms,images_per_s,ratio_p20,ratio_p50,ratio_p80,"
    "device,driver,cpu_threads,torch,triton,resnet_fast,commit,date_utc"
)

# A process of its own, without the interpreter in which tests without a GPU run the kernels; small, for it to be fast.
COMPARE = """
import functools, sys
import torch
from benchmarks import compare_steps
torch.set_num_threads(1)
compare_steps.WARM_UP = {"cpu": 1}
compare_steps.Setting = functools.partial(compare_steps.Setting, image_size=16)
for precision, rounds in (("fp32", "2"), ("bf16", "2"), ("fp32", "3")):
    options = ["--device", "cpu", "--batch-size", "4", "--results", sys.argv[1]]
    compare_steps.app([*options, "--precision", precision, "--rounds", rounds], standalone_mode=False)
"""


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


@pytest.mark.parametrize(
    ("wrong", "precision"),
    [
        (without_residual_gradient, "fp32"),
        (without_residual_gradient, "bf16"),
        (without_running_statistics, "bf16"),
        (frozen, "bf16"),
        (not_a_number, "fp32"),
    ],
)
def test_wrong_provider_is_refused(wrong, precision):
    setting = Setting(CPU, precision, batch_size=4, image_size=16)
    with pytest.raises(WrongProviderError, match="wrong is wrong and is not timed"):
        checked_steps(setting, {"eager": eager, "wrong": wrong})


def test_providers_start_from_the_same_weights_and_batches():
    steps = checked_steps(Setting(CPU, "fp32", batch_size=4, image_size=16), {"a": eager, "b": eager})
    assert steps["a"]().item() == steps["b"]().item()


def test_nothing_is_timed_or_written_for_a_wrong_provider(tmp_path, monkeypatch):
    timed = []
    monkeypatch.setattr(compare_steps, "PROVIDERS", {"eager": eager, "fused": without_running_statistics})
    monkeypatch.setattr(compare_steps, "alternate", lambda *arguments: timed.append(arguments))
    monkeypatch.setattr(compare_steps, "refuse_interpreter", lambda: None)  # neither of the two runs a kernel
    done = CliRunner().invoke(compare_steps.app, ["--device", "cpu", "--batch-size", "2", "--results", str(tmp_path)])
    assert done.exit_code == 1
    assert "fused is wrong and is not timed (cpu, fp32, batch 2)" in done.stderr
    assert not timed and not list(tmp_path.iterdir())


def test_interpreted_kernels_are_refused(tmp_path, monkeypatch):
    if torch.cuda.is_available():  # elsewhere the tests do interpret them
        monkeypatch.setattr(training_step, "why_not_triton", lambda device: None)
    monkeypatch.setattr(compare_steps, "checked_steps", lambda *arguments: pytest.fail("went on"))
    done = CliRunner().invoke(compare_steps.app, ["--device", "cpu", "--results", str(tmp_path)])
    assert done.exit_code == 1 and "interpreted kernels are not timed" in done.stderr
    assert not list(tmp_path.iterdir())


def test_rows_are_whole_and_replaced(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMPARE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*/*")
    assert path.name == "training_step.csv" and path.parent.name.endswith("-1-threads")
    text = path.read_text()
    assert text.splitlines()[0] == COLUMNS
    assert str(ROOT) not in text and str(tmp_path) not in text and "/" not in text
    rows = list(csv.DictReader(text.splitlines()))
    assert [(row["provider"], row["precision"], row["rounds"]) for row in rows] == [
        ("eager", "fp32", "3"),
        ("fused", "fp32", "3"),
        ("eager", "bf16", "2"),
        ("fused", "bf16", "2"),
    ]
    for row in rows:
        empty = {name for name, value in row.items() if not value}
        assert empty <= {"driver", "triton"}
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["images_per_s"]) == pytest.approx(4000 / float(row["p50_ms"]), rel=0.01)
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
