"""Every setting of a run is an option of `resnet-fast train`, and is passed on unchanged."""

from dataclasses import fields
from pathlib import Path

import pytest
from trained_run import invoke
from typer.testing import Result as CliResult

from resnet_fast.cli.settings import NAMES
from resnet_fast.training import RECIPES, Result, TrainConfig


def run(*args: object) -> CliResult:
    return invoke("train", *args)


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """The settings of runs, none of which begins."""
    seen = []

    def stop(config: TrainConfig, reporter: object) -> Result:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("resnet_fast.cli.run.run_training", stop)
    return seen


OPTIONS = {
    "recipe": "article",
    "model": "resnet50",
    "stem": "cifar",
    "backend": "eager",
    "dataset": "folder",
    "data_dir": Path("d"),
    "image_size": 64,
    "images": "stream",
    "holdout": 10,
    "accumulate": 2,
    "seed": 9,
    "device": "cpu",
    "precision": "fp32",
    "workers": 1,
    "out": Path("o"),
    "epochs": 3,
    "batch_size": 16,
    "optimizer": "muon",
    "lr": 0.25,
    "schedule": "triangular",
    "momentum": 0.5,
    "weight_decay": 0.01,
    "bn_bias_lr": 64.0,
    "body_lr": 0.1,
    "muon_lr": 0.3,
    "muon_momentum": 0.8,
    "bn_momentum": 0.4,
    "sizes": "16,24,32",
    "label_smoothing": 0.2,
    "clip_norm": 1.0,
    "crop": 3,
    "padding": "reflect",
    "flip": "alternating",
    "cutout": 12,
    "random_erasing": 0.25,
    "mixup": 0.2,
    "cutmix": 1.0,
    "normalize": "dataset",
    "ema": 0.99,
}
SWITCHES = dict.fromkeys(
    (
        "nesterov",
        "rescale_filters",
        "trivial_augment",
        "zero_gamma",
        "dirac",
        "whiten",
        "deterministic",
        "tensorboard",
        "wandb",
        "skip_unreadable",
    ),
    True,
)


def test_options_reach_the_config(configs: list[TrainConfig]):
    flags = [f"--{name.replace('_', '-')}" for name in SWITCHES]
    run(*flags, *(part for name, value in OPTIONS.items() for part in (f"--{name.replace('_', '-')}", value)))
    assert configs == [TrainConfig(**OPTIONS, **SWITCHES)]


@pytest.mark.parametrize(
    ("args", "settings"),
    [
        (["--no-nesterov"], {"nesterov": False}),
        (["--no-graph"], {"graph": False}),
        (["--sync-bn"], {"sync_bn": True}),
        (["--lookahead"], {"lookahead": True}),
        (["--ghost-batch-size", 32], {"ghost_batch_size": 32}),
        (["--weights", "runs/one"], {"weights": Path("runs/one")}),
        (
            ["--weights", "w", "--freeze", "stem, layer1", "--new-head"],
            {"weights": "w", "freeze": "stem,layer1", "new_head": True},
        ),
        (["--time-budget", "90"], {"time_budget": 90.0}),
        (["--time-budget", "1.5m"], {"time_budget": 90.0}),
        (["--time-budget", "2h"], {"time_budget": 7200.0}),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_so_do_these(args: list, settings: dict, configs: list[TrainConfig]):
    run("--out", "x", *args)
    assert configs == [TrainConfig(out="x", **settings)]


def test_every_setting_has_an_option():
    known = {
        *OPTIONS,
        *SWITCHES,
        "graph",
        "sync_bn",
        "ghost_batch_size",
        "time_budget",
        "weights",
        "mirror",
        "freeze",
        "new_head",
        "lookahead",
    }
    assert known == {field.name for field in fields(TrainConfig)} == set(NAMES)


def test_the_command_and_the_config_have_the_same_defaults(configs: list[TrainConfig]):
    run("--out", "x")
    assert configs == [TrainConfig(out="x")]


def test_help_shows_the_defaults_of_each_recipe():
    text = " ".join(run("--help").output.split())
    for name in ("epochs", "batch_size", "lr"):
        shown = ", ".join(f"{recipe}: {getattr(settings, name):g}" for recipe, settings in RECIPES.items())
        assert f"[{shown}]" in text


def test_help_fits_80_columns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, run("--help").output.splitlines())) <= 80
