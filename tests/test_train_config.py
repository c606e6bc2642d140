"""Settings are checked when a config is made, before anything is written, and come out resolved."""

import json
from pathlib import Path

import pytest
import torch

from resnet_fast.training import RECIPES, TrainConfig
from resnet_fast.training.config import choose_precision


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"model": "resnet19"}, "model must be one of resnet18, .*'resnet19'"),
        ({"stem": "wide"}, "stem must be one of cifar, imagenet, got 'wide'"),
        ({"dataset": "mnist"}, "dataset must be one of cifar10, digits, folder, got 'mnist'"),
        ({"schedule": "cosine"}, "schedule must be one of one-cycle, triangular, got 'cosine'"),
        ({"precision": "fp16"}, "precision must be one of auto, fp32, bf16, got 'fp16'"),
        ({"device": "gpu"}, "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        ({"device": "meta"}, "device must be .*'meta'"),
        ({"device": "cpu:1"}, "device must be .*'cpu:1'"),
        ({"device": "cpu:0"}, "device must be .*'cpu:0'"),
        ({"device": "cuda:99"}, "'cuda:99' asks for a GPU that is not there"),
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"epochs": 2.5}, "epochs must be an integer.*2.5"),
        ({"epochs": True}, "epochs must be an integer.*True"),
        ({"batch_size": -4}, "batch_size must be an integer of at least 2, got -4"),
        ({"batch_size": 1}, "batch_size must be .* at least 2, got 1"),
        ({"image_size": 0}, "image_size must be"),
        ({"workers": -1}, "workers must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**32}, "seed must be below"),
        ({"lr": 0}, "lr must be a positive finite number, got 0"),
        ({"lr": -0.1}, "lr must be .*-0.1"),
        ({"lr": float("nan")}, "lr must be .*nan"),
        ({"lr": float("inf")}, "lr must be .*inf"),
        ({"lr": "fast"}, "lr must be .*'fast'"),
        ({"weight_decay": -1e-4}, "weight_decay must be .*-0.0001"),
        ({"weight_decay": float("inf")}, "weight_decay must be"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, "momentum must be"),
        ({"momentum": float("nan")}, "momentum must be"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_wrong_setting_is_named_with_its_rule(setting: dict, message: str):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**setting)


def test_cuda_where_there_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda' asks for a GPU that is not there"):
        TrainConfig(device="cuda")
    assert TrainConfig(device="auto").device == "cpu"


@pytest.mark.parametrize("dataset", RECIPES)
def test_defaults_are_those_of_the_data_set(dataset: str):
    config = TrainConfig(dataset=dataset)
    assert (config.epochs, config.batch_size, config.lr) == RECIPES[dataset]
    assert TrainConfig(dataset=dataset, epochs=3).epochs == 3


def test_everything_is_resolved():
    config = TrainConfig(out="~/run", workers=0)
    assert config.out == Path.home() / "run" and config.workers == 0
    values = TrainConfig(device="cpu").as_dict()
    assert "auto" not in values.values()
    assert [name for name, value in values.items() if value is None] == ["flip"]  # the data set says
    json.dumps(values)


def test_the_default_run_folder_names_dataset_and_model():
    assert TrainConfig(dataset="digits", model="resnet34").out.as_posix().startswith("runs/digits-resnet34-2")


@pytest.mark.parametrize(
    ("probes", "precision"),
    [
        pytest.param((True, False), "bf16", id="AVX512-BF16"),
        pytest.param((False, True), "bf16", id="AMX"),
        pytest.param((False, False), "fp32", id="neither"),
        pytest.param(None, "fp32", id="a torch without the probes"),
    ],
)
def test_precision_of_a_cpu(probes: tuple[bool, bool] | None, precision: str, monkeypatch: pytest.MonkeyPatch):
    for i, name in enumerate(("_is_avx512_bf16_supported", "_is_amx_tile_supported")):
        if probes is None:
            monkeypatch.delattr(torch.cpu, name)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda i=i: probes[i])
    assert choose_precision(torch.device("cpu")) == precision
    assert TrainConfig(device="cpu").precision == precision
    assert TrainConfig(device="cpu", precision="fp32").precision == "fp32"
