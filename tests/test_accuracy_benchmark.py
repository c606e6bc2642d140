"""`python -m benchmarks.accuracy` trains what it says, keeps each row as it comes, and tells what the rows hold."""

import csv
from pathlib import Path

import pytest
from PIL import Image
from tiny_run import use_tiny

from benchmarks import accuracy
from resnet_fast.training import TrainConfig

BASE = {"dataset": "digits", "epochs": 2, "batch_size": 8, "device": "cpu", "precision": "fp32"}
VARIANTS = {"fused": {}, "no average": {"ema": 0.5}}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    use_tiny(monkeypatch.setattr)


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))


def test_every_variant_is_trained_once_with_every_seed_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    accuracy.measure(VARIANTS, range(1), BASE, "tiny images", tmp_path)
    trained = []
    monkeypatch.setattr(accuracy, "train", lambda config, train=accuracy.train: trained.append(config) or train(config))
    accuracy.measure(VARIANTS, range(2), BASE, "tiny images", tmp_path)
    assert [config.seed for config in trained] == [1, 1]  # what is measured is not measured again
    rows = rows_of(tmp_path / "accuracy.csv")
    assert [(row["variant"], row["seed"]) for row in rows] == [(name, seed) for seed in "01" for name in VARIANTS]
    assert all(row["data"] == "tiny images" and row["device"] and row["commit"] for row in rows)
    epochs = rows_of(tmp_path / "accuracy_epochs.csv")
    assert len(epochs) == 2 * 2 * 2
    last = {(row["variant"], row["seed"]): row["accuracy"] for row in epochs if row["epoch"] == "2"}
    assert last == {(row["variant"], row["seed"]): row["accuracy"] for row in rows}

    accuracy.write_page(tmp_path)
    text = (tmp_path / "accuracy.md").read_text()
    found = [100 * float(row["accuracy"]) for row in rows if row["variant"] == "fused"]
    mean, difference = sum(found) / 2, abs(found[0] - found[1])
    assert "## digits, 2 epochs, tiny images" in text
    assert f"| fused | 2 | {mean:.2f} ± {difference / 2**0.5:.2f} |" in text
    assert Image.open(tmp_path / "accuracy.png").size[0] > 600


def test_every_variant_is_a_setting_of_a_run():
    for settings in (accuracy.BACKENDS | accuracy.ABLATIONS).values():
        TrainConfig(recipe="fast94", device="cpu", out="x", **settings)


def test_every_ablation_changes_the_recipe():
    base = TrainConfig(recipe="fast94", device="cpu", out="x")
    for name, settings in accuracy.ABLATIONS.items():
        assert TrainConfig(recipe="fast94", device="cpu", out="x", **settings) != base, name
