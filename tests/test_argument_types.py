"""An argument of a wrong type is named in one line, whatever its type, and no other exception is raised."""

import decimal
import enum
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from resnet_fast import load_checkpoint
from resnet_fast.data import Augmentation, Loader, TensorSplit, epoch_plan, load_dataset
from resnet_fast.inference import Trained, classify
from resnet_fast.models import get_model
from resnet_fast.training import RECIPES, TrainConfig, TrainingStep, evaluate, resume, train
from resnet_fast.training.repeat import repeated


class Hostile:
    """Fails at whatever it is asked."""

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        raise RuntimeError("not shown")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not compared")


class Name(enum.StrEnum):
    SGD = "sgd"


VALUES = {
    "None": None,
    "list": [],
    "negative": -1,
    "fraction": 0.5,
    "bool": True,
    "400 digits": 10**400,
    "5000 digits": 10**5000,
    "NaN": float("nan"),
    "text": "nothing of the kind",
    "bytes": b"x",
    "NUL": "a\0b",
    "surrogate": "\udcff",
    "home of nobody": "~nobody-of-that-name/x",
    "Path": Path("a\0b"),
    "long": "a" * 10_000,
    "numpy integer": np.int64(5),
    "numpy number": np.float32(0.5),
    "numpy array": np.arange(3),
    "numpy text": np.str_("sgd"),
    "enumeration": Name.SGD,
    "tensor": torch.zeros(3),
    "Decimal": decimal.Decimal("0.1"),
    "type": object,
    "device": torch.device("cpu"),
    "Hostile": Hostile(),
}


def test_settings_are_plain_values_or_refused_by_name():
    for field in (field.name for field in fields(TrainConfig)):
        n_refused = 0
        for value in VALUES.values():
            try:
                config = TrainConfig(**{"dataset": "digits", field: value})
            except ValueError as error:
                n_refused += 1
                assert field in str(error) and "\n" not in str(error) and len(str(error)) < 600
            else:
                assert {type(value) for value in config.as_dict().values()} <= {str, int, float, bool, type(None)}
        assert n_refused >= len(VALUES) / 2, field


def test_too_many_epochs_are_refused_before_the_schedule_meets_them():
    with pytest.raises(ValueError, match="epochs must be below 4,294,967,296, got an integer of 1329 bits"):
        TrainConfig(epochs=10**400)


def test_seeds_end_where_seeds_end():
    config = TrainConfig(dataset="digits", seed=2**32 - 2)
    assert [one.seed for one in repeated(config, 2)] == [2**32 - 2, 2**32 - 1]
    with pytest.raises(ValueError, match=r"seed \+ repeat - 1 must be below 4,294,967,296, got 4294967296"):
        repeated(config, 3)


def test_the_settings_of_four_billion_runs_are_made_one_by_one():
    configs = repeated(TrainConfig(dataset="digits"), 2**32)
    assert next(configs).seed == 0 and next(configs).out.name == "seed-1"


SPLIT = TensorSplit(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
AUGMENTATION = Augmentation((0.5,) * 3, (0.2,) * 3)
MODEL = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
RECIPE = RECIPES["digits"]
STEP = {"model": MODEL, "recipe": RECIPE, "augmentation": AUGMENTATION, "n_steps": 8}
PLAN = {"n_images": 8, "size": (8, 8), "augmentation": AUGMENTATION, "seed": 0, "epoch": 1}
TRAINED = Trained(MODEL, ("a", "b"), (0.5,) * 3, (0.2,) * 3, 8, {}, 1, Path("checkpoint.pt"))
DATA = {"split": SPLIT, "augmentation": AUGMENTATION, "batch_size": 4}


CALLS: list[tuple[Callable, dict[str, Any], dict[str, list]]] = [
    (
        Loader,
        DATA,
        {
            "split": [None, [1], MODEL],
            "augmentation": [None, "none"],
            "batch_size": [None, 4.0, "4", True, float("inf")],
            "seed": [None, -1, 0.5],
            "rank": [None, -1, 1, "0"],
            "world_size": [None, 0, 1.0],
        },
    ),
    (
        TrainingStep,
        STEP,
        {
            "model": [None, "resnet18", nn.Identity],
            "recipe": [None, "digits", {}],
            "augmentation": [None, {}],
            "n_steps": [None, 0, 1.5, 10**400],
            "precision": [None, ["fp32"], "fp8", np.arange(2)],
            "graph": [None, 1, "no"],
            "accumulate": [None, 0, 2.0],
            "forward": ["model", 3],
            "world_size": [None, 0, "2"],
            "make_graph": [None, True],
        },
    ),
    (
        Augmentation,
        {"mean": (0.5,) * 3, "std": (0.2,) * 3},
        {
            "mean": [None, 0.5, "123", (1, 2), (0.5, 0.5, float("nan")), ("a", "b", "c")],
            "std": [None, 0.5, (1, 1, 0), (1, 1, None), (1, 1, float("nan"))],
            "crop": [None, -1, 0.5, "4"],
            "padding": [None, [], "edge"],
            "flip": [None, [], True],
            "cutout": [None, -1, float("nan")],
            "trivial_augment": [None, 1],
            "random_erasing": [None, -0.1, float("nan"), "often"],
            "mixup": [None, 0.001, 101, float("inf")],
            "cutmix": [None, True, -1.0],
        },
    ),
    (
        epoch_plan,
        PLAN,
        {
            "n_images": [None, -1, "8"],
            "size": [None, 8, (8,)],
            "augmentation": [None, ()],
            "seed": [None, -1, 0.5],
            "epoch": [None, -1, "1"],
        },
    ),
    (
        evaluate,
        {"model": MODEL, **DATA},
        {
            "model": [None, "resnet18"],
            "split": [None, [], SPLIT.images, SPLIT.subset(torch.arange(0))],
            "augmentation": [None],
            "batch_size": [None, 0, 1.5],
            "precision": [None, [], "fp8"],
            "processes": [1, "one"],
        },
    ),
    (
        load_dataset,
        {"name": "digits"},
        {
            "name": [None, [], "mnist", np.arange(2)],
            "data_dir": [None, 3, "a\0b", b"data"],
            "image_size": [None, 0, 32.0],
            "workers": [None, -1, "2"],
        },
    ),
    (
        classify,
        {"trained": TRAINED, "image": SPLIT.images[0]},
        {"trained": [None, MODEL], "image": [None, "photo.jpg", torch.zeros(3, 8, 8), SPLIT.images]},
    ),
    (
        get_model,
        {"name": "resnet18", "stem": "cifar", "num_classes": 2},
        {
            "name": [None, 18, [], 10**5000, Hostile()],
            "stem": [None, [], np.arange(2)],
            "num_classes": [None, -1, "10", 2.0],
            "norm_layer": ["batch", 3],
        },
    ),
    (
        train,
        {"config": TrainConfig(dataset="digits"), "reporter": None},
        {"config": [None, "digits", {}], "reporter": [print, "plain"]},
    ),
    (resume, {"run": "nowhere"}, {"run": [None, 3, b"runs"]}),
    (load_checkpoint, {"model": MODEL, "path": "nowhere"}, {"path": [None, 3, b"x.pt"], "entry": [3]}),
]


@pytest.mark.parametrize(("call", "right", "wrong"), CALLS)
def test_an_argument_of_a_wrong_type_is_named(call: Callable, right: dict[str, Any], wrong: dict[str, list]):
    if call not in (train, resume, load_checkpoint):
        call(**right)
    for name, values in wrong.items():
        for value in values:
            assert_is_named(call, {**right, name: value}, name)


def assert_is_named(call: Callable, arguments: dict[str, Any], name: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        call(**arguments)
    # `name` of a data set or network is what the options call it.
    said = {"name": "dataset|model", "mean": "mean and std", "std": "mean and std|std"}.get(name, name)
    assert re.match(rf"({said}) must ", str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["lr", "optimizer", "nesterov"])
def test_a_recipe_of_ones_own_is_checked_where_it_is_used(field: str):
    with pytest.raises(ValueError, match=f"{field} must be"):
        TrainingStep(**{**STEP, "recipe": replace(RECIPE, **{field: None})})


def test_numbers_of_numpy_are_numbers():
    config = TrainConfig(dataset="digits", epochs=np.int8(100), lr=np.float32(0.5))
    assert type(config.epochs) is int and config.epochs * 10 == 1000 and config.lr == 0.5
    batches = list(Loader(SPLIT, AUGMENTATION, batch_size=np.int64(4)).epoch(1))  # type: ignore[arg-type]
    assert [len(batch.plan) for batch in batches] == [4, 4]


def test_a_model_without_parameters_is_named():
    with pytest.raises(ValueError, match="model must have parameters to train, Identity has none"):
        TrainingStep(**{**STEP, "model": nn.Identity()})
