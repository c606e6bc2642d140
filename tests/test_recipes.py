"""Every recipe sets every field, and every field of a recipe is checked."""

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from test_train_config import WRONG_SETTINGS

from resnet_fast.data import DATASETS
from resnet_fast.training import RECIPES, Recipe, TrainConfig
from resnet_fast.training.recipes import DEFAULT_RECIPES, RECIPE_FIELDS


def test_recipes_are_complete():
    """But for the crop, which the data set may say."""
    for recipe in RECIPES.values():
        assert [field for field, value in asdict(recipe).items() if value is None] in ([], ["crop"])


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_recipe_trains_any_data_set(dataset: str, tmp_path: Path):
    for name in RECIPES:
        check(name, dataset, tmp_path)


def check(name: str, dataset: str, tmp_path: Path) -> None:
    config = TrainConfig(recipe=name, dataset=dataset, device="cpu", out=tmp_path)
    expected = replace(RECIPES[name], flip="none") if dataset in ("digits", "svhn") else RECIPES[name]
    assert Recipe(**{field: getattr(config, field) for field in RECIPE_FIELDS}) == expected
    assert config.recipe == name


OTHER = {
    "epochs": 2,
    "batch_size": 64,
    "optimizer": "adam",
    "lr": 0.05,
    "schedule": "constant",
    "momentum": 0.5,
    "nesterov": True,
    "weight_decay": 0.0,
    "bn_bias_lr": 64.0,
    "body_lr": 0.1,
    "muon_lr": 0.24,
    "muon_momentum": 0.9,
    "rescale_filters": True,
    "lookahead": True,
    "bn_momentum": 0.4,
    "sizes": "16,24,32",
    "label_smoothing": 0.2,
    "clip_norm": 1.0,
    "crop": 2,
    "padding": "reflect",
    "flip": "alternating",
    "cutout": 12,
    "trivial_augment": True,
    "random_erasing": 0.25,
    "mixup": 0.2,
    "cutmix": 1.0,
    "normalize": "half",
    "ema": 0.99,
    "zero_gamma": True,
    "dirac": True,
    "whiten": True,
    "ghost_batch_size": 32,
}


def test_a_setting_beside_the_recipe_takes_its_place(tmp_path: Path):
    plain = TrainConfig(recipe="baseline", device="cpu", out=tmp_path)
    for field in RECIPE_FIELDS:
        other = {"optimizer": "muon"} if field in ("muon_lr", "muon_momentum", "rescale_filters") else {}
        other[field] = OTHER[field]
        config = TrainConfig(recipe="baseline", device="cpu", out=tmp_path, **other)
        assert config != plain and config == replace(plain, **other), field


def test_a_setting_of_a_recipe_has_a_rule():
    """That is, a case of test_train_config that breaks it."""
    assert set(RECIPE_FIELDS) <= {name for setting, _ in WRONG_SETTINGS for name in setting}


def test_every_data_set_has_a_recipe():
    assert set(DEFAULT_RECIPES) == set(DATASETS) and set(DEFAULT_RECIPES.values()) <= set(RECIPES)


def test_the_faster_recipes_put_the_levers_together():
    """KellerJordan/cifar10-airbench, airbench94_muon.py: also the momentum of Muon, and its rate at batch 2000."""
    for name in ("faster94", "faster95"):
        recipe = RECIPES[name]
        assert recipe.whiten and recipe.dirac and recipe.lookahead and recipe.rescale_filters
        assert (recipe.optimizer, recipe.muon_momentum, recipe.label_smoothing) == ("muon", 0.6, 0.2)
        assert (recipe.bn_bias_lr, recipe.bn_momentum) == (64, 0.4)
        assert recipe.muon_lr == pytest.approx(0.24 * (recipe.batch_size / 2000) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("name", "epochs", "batch_size", "lr"),
    [
        # kuangliu/pytorch-cifar, main.py; KellerJordan/cifar10-zoo, airbench/baselines.
        ("baseline", 200, 128, 0.1),
        ("fast94", 26, 512, 0.2),
        ("fast95", 80, 512, 0.2),
    ],
)
def test_the_sources_numbers(name: str, epochs: int, batch_size: int, lr: float):
    recipe = RECIPES[name]
    assert (recipe.epochs, recipe.batch_size) == (epochs, batch_size) and math.isclose(recipe.lr, lr)
    assert (recipe.optimizer, recipe.momentum, recipe.weight_decay) == ("sgd", 0.9, 5e-4)
