"""`python -m benchmarks.accuracy` trains what it says, writes each row when it is finished, and summarizes the rows."""

import csv
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_run import use_tiny

from benchmarks import accuracy
from benchmarks.results import RESULTS, ROOT
from resnet_fast.data import load_dataset
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
    assert not (tmp_path / "accuracy.png").exists()  # one backend
    assert not (tmp_path / "switches.png").exists()  # "no average" is no switch of the benchmark


def test_the_page_shows_backends_and_the_gain_of_each_switch(tmp_path: Path):
    variants = {"fused": {}, "eager, tuned": {"backend": "eager", "graph": False}, "zero gamma": {"zero_gamma": True}}
    accuracy.measure(variants, range(1), BASE | {"epochs": 1}, "tiny images", tmp_path)
    rows = rows_of(tmp_path / "accuracy.csv")
    found = dict(zip(variants, ("0.5", "0.5", "0.625"), strict=True))
    accuracy.replace_rows(
        tmp_path / "accuracy.csv",
        [row | {"accuracy": found[row["variant"]], "seed": seed} for row in rows for seed in "01"],
        accuracy.KEY,
    )
    accuracy.write_page(tmp_path)
    text = (tmp_path / "accuracy.md").read_text()
    assert "| zero gamma | 2 | 62.50 ± 0.00 | +12.50 ± 0.00 |" in text
    for name in ("accuracy.png", "switches.png"):
        assert f"]({name})" in text
        assert Image.open(tmp_path / name).size[0] > 600


def test_every_variant_is_a_setting_of_a_run():
    for settings in (accuracy.BACKENDS | accuracy.ABLATIONS).values():
        TrainConfig(recipe="fast94", device="cpu", out="x", **settings)


def test_no_run_begins_that_would_end_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first takes 10 s; at the second 15 s are left, at the third 5."""
    now = [0.0]

    def train(config: TrainConfig, train=accuracy.train):
        now[0] += 10.0
        return train(config)

    monkeypatch.setattr(accuracy.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(accuracy, "train", train)
    accuracy.measure(VARIANTS, range(2), BASE, "tiny images", tmp_path, deadline=25.0)
    assert [(row["variant"], row["seed"]) for row in rows_of(tmp_path / "accuracy.csv")] == [
        ("fused", "0"),
        ("no average", "0"),
    ]


def test_other_networks_and_sizes_have_the_ablations_that_they_can_have():
    narrow = accuracy.ablations("resnet20", 24)
    assert narrow.keys() == accuracy.ABLATIONS.keys() - {"whitened stem"}
    assert narrow["smaller images first"] == {"sizes": "12,18,24"}
    for settings in narrow.values():
        TrainConfig(
            recipe="fast94", dataset="folder", model="resnet20", image_size=24, device="cpu", out="x", **settings
        )
    assert accuracy.ablations("resnet18", 32) == accuracy.ABLATIONS


def test_fewer_images_are_links_to_the_first_of_each_class(tmp_path: Path):
    for part in ("train", "test"):
        for name in ("a", "b", "c"):
            folder = tmp_path / "all" / part / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    (tmp_path / "few").mkdir()
    accuracy.link_images(tmp_path / "all", {"train": 7, "test": None}, tmp_path / "few")
    dataset = load_dataset("folder", tmp_path / "few", image_size=8)
    labels = torch.cat([labels for _, labels in dataset.train.batches(4)]).tolist()
    assert [labels.count(label) for label in range(3)] == [3, 2, 2]
    assert len(dataset.test) == 12


def test_every_ablation_changes_the_recipe():
    base = TrainConfig(recipe="fast94", device="cpu", out="x")
    for name, settings in accuracy.ABLATIONS.items():
        assert TrainConfig(recipe="fast94", device="cpu", out="x", **settings) != base, name


def test_the_table_of_the_results_page_is_that_of_the_rows():
    rows = rows_of(RESULTS / "amd-epyc-2-threads/accuracy.csv")
    measured = {cells[1].strip(): cells[2:5] for cells in (line.split("|") for line in accuracy.table(rows)[2:])}
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8").replace("| no change |", "| fused |")
    shown = {
        line.split("|")[1].strip(): line.split("|")[2:5] for line in re.findall(r"^\| .* \| \d \| .* \|$", page, re.M)
    }
    assert shown == measured
