"""Settings are checked when a config is made, before anything is written, and are resolved."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resnet_fast.common.checks import shown
from resnet_fast.training import MODELS, RECIPES, TrainConfig
from resnet_fast.training.config import choose_precision
from resnet_fast.training.recipes import DEFAULT_RECIPES, RECIPE_FIELDS

NAN = float("nan")
SCHEDULE_NAMES = "one-cycle, triangular, cosine, linear, steps, constant"


WRONG_SETTINGS = [
    ({"model": "resnet19"}, "model must be one of resnet18, .*'resnet19'"),
    ({"model": "resnt18"}, "model must be one of .*, got 'resnt18'; did you mean resnet18"),
    ({"stem": "wide"}, "stem must be one of cifar, imagenet, got 'wide'"),
    ({"backend": "triton"}, "backend must be one of fused, eager, compile, got 'triton'"),
    ({"dataset": "mnist"}, "dataset must be one of cifar10, cifar100, svhn, digits, folder, got 'mnist'"),
    ({"sync_bn": True, "backend": "eager", "device": "cpu"}, "sync_bn with backend eager needs GPUs"),
    (
        {"recipe": "fast"},
        "recipe must be one of baseline, fast94, fast95, faster94, faster95, article, folder, digits, got 'fast'",
    ),
    ({"optimizer": "lion"}, "optimizer must be one of sgd, adam, muon, got 'lion'"),
    ({"schedule": "cyclic"}, f"schedule must be one of {SCHEDULE_NAMES}, got 'cyclic'"),
    ({"padding": "edge"}, "padding must be one of zero, reflect, got 'edge'"),
    ({"flip": "up"}, "flip must be one of none, random, alternating, got 'up'"),
    ({"normalize": "batch"}, "normalize must be one of dataset, half, got 'batch'"),
    ({"images": "disk"}, "images must be one of auto, memory, stream, got 'disk'"),
    ({"precision": "fp8"}, "precision must be one of auto, fp32, bf16, fp16, got 'fp8'"),
    ({"device": "gpu"}, "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
    ({"device": "cpu:0"}, "device must be .*'cpu:0'"),
    ({"device": "cuda:99"}, "device must be a GPU that is there, got 'cuda:99'"),
    ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
    ({"epochs": True}, "epochs must be an integer.*True"),
    ({"batch_size": 1}, "batch_size must be .* at least 2, got 1"),
    ({"crop": -1}, "crop must be an integer of at least 0, got -1"),
    ({"ghost_batch_size": 1}, "ghost_batch_size must be 0 or at least 2, got 1"),
    ({"image_size": 7}, "image_size must be an integer of at least 8, got 7"),
    ({"holdout": -1}, "holdout must be an integer of at least 0, got -1"),
    ({"accumulate": 0}, "accumulate must be an integer of at least 1, got 0"),
    ({"workers": -1}, "workers must be"),
    ({"seed": 2**32}, "seed must be below"),
    ({"lr": NAN}, "lr must be .*nan"),
    ({"lr": "fast"}, "lr must be .*'fast'"),
    ({"bn_bias_lr": 0}, "bn_bias_lr must be a positive finite number, got 0"),
    ({"weight_decay": -1e-4}, "weight_decay must be .*-0.0001"),
    ({"clip_norm": -1}, "clip_norm must be a finite number, 0 or more, got -1"),
    ({"time_budget": -1}, "time_budget must be a finite number, 0 or more, got -1"),
    ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
    ({"muon_lr": 0}, "muon_lr must be a positive finite number, got 0"),
    ({"muon_momentum": 1}, r"muon_momentum must be in \[0, 1\), got 1"),
    ({"rescale_filters": 1}, "rescale_filters must be True or False, got 1"),
    ({"lookahead": 1}, "lookahead must be True or False, got 1"),
    ({"lookahead": True, "ema": 0.99}, "lookahead and ema exclude each other: .*, got ema 0.99"),
    ({"bn_momentum": 0}, r"bn_momentum must be in \(0, 1\], got 0"),
    *(
        (
            {"sizes": value},
            f"sizes must be text: two or more ascending integers of at least 8 .*, got {re.escape(shown(value))}",
        )
        for value in (
            "32",
            "24,16,32",
            "16,16,32",
            "4,32",
            "16;32",
            "16,,32",
            "a,b",
            [16, 32],
            (16, 32),
            32,
            b"16,32",
            "1_6,32",
            "+16,32",
            "١٦,٣٢",
        )
    ),
    ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
    ({"label_smoothing": 1}, r"label_smoothing must be in \[0, 1\), got 1"),
    ({"cutout": -1}, "cutout must be an integer of at least 0, got -1"),
    ({"trivial_augment": "wide"}, "trivial_augment must be True or False, got 'wide'"),
    ({"random_erasing": 1.1}, r"random_erasing must be in \[0, 1\], got 1.1"),
    ({"mixup": -0.2}, r"mixup must be 0 or in \[0.01, 100\], got -0.2"),
    ({"cutmix": 0.001}, r"cutmix must be 0 or in \[0.01, 100\], got 0.001"),
    ({"zero_gamma": "yes"}, "zero_gamma must be True or False, got 'yes'"),
    ({"body_lr": 0}, "body_lr must be a positive finite number, got 0"),
    ({"freeze": ["stem"]}, r"freeze must be stage names with commas between them, got \['stem'\]"),
    ({"new_head": 1}, "new_head must be True or False, got 1"),
    ({"dirac": 0}, "dirac must be True or False, got 0"),
    ({"whiten": 1}, "whiten must be True or False, got 1"),
    ({"nesterov": 1}, "nesterov must be True or False, got 1"),
    ({"graph": 1}, "graph must be True or False, got 1"),
    ({"sync_bn": None}, "sync_bn must be True or False, got None"),
    ({"deterministic": 1}, "deterministic must be True or False, got 1"),
    *(
        (
            {"mirror": value},
            f"mirror must be an http:// or https:// URL without a user name, got {re.escape(shown(value))}",
        )
        for value in (
            *("", "mirror.example", "ftp://a/b", "file:///etc/passwd", "http://", "http://:80/x", "http://[::1"),
            *("http://me:secret@a/b", "http://a:99999/", "http://a:b/", "http://a/b c", "http://a/ü", "http://a/\n"),
            *(1, True, b"http://a/b", Path("http://a/b")),
        )
    ),
    ({"wandb": 1}, "wandb must be True or False, got 1"),
    ({"tensorboard": 1}, "tensorboard must be True or False, got 1"),
]


@pytest.mark.parametrize(
    ("setting", "message"),
    WRONG_SETTINGS,
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_wrong_setting_is_named_with_its_rule(setting: dict, message: str):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**setting)


@pytest.mark.parametrize(
    "settings",
    [
        {"recipe": "faster94", "optimizer": "sgd"},
        {"recipe": "fast94", "optimizer": "adam", "nesterov": False},
        {"recipe": "article", "nesterov": False, "momentum": 0.0},
        {"optimizer": "muon", "nesterov": True, "momentum": 0.8, "muon_lr": 0.1},
        {"dataset": "digits", "image_size": 64},
    ],
    ids=str,
)
def test_a_recipes_idle_settings_and_saved_ones_are_accepted(settings: dict):
    config = TrainConfig(device="cpu", out="x", **settings)
    assert replace(config, image_size=48, muon_lr=0.25).muon_lr == 0.25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"accumulate": 5, "batch_size": 8},
            "accumulate must leave 2 images in each micro-batch of a batch of 8, got 5",
        ),
        ({"ghost_batch_size": 8, "backend": "eager"}, "ghost_batch_size needs backend fused, got eager"),
        ({"ghost_batch_size": 8, "sync_bn": True}, "ghost_batch_size and sync_bn exclude each other"),
        (
            {"weights": "w.pt", "zero_gamma": True},
            "zero_gamma must be False with weights, got True: it would overwrite",
        ),
        ({"optimizer": "sgd", "muon_lr": 0.1}, "muon_lr 0.1 needs optimizer muon, got sgd"),
        ({"muon_momentum": 0.5}, "muon_momentum 0.5 needs optimizer muon, got sgd"),
        ({"rescale_filters": True}, "rescale_filters True needs optimizer muon, got sgd"),
        ({"recipe": "article", "momentum": 0.5}, "momentum 0.5 needs optimizer sgd or muon, got adam"),
        ({"optimizer": "adam", "nesterov": True}, "nesterov True needs optimizer sgd or muon, got adam"),
        ({"image_size": 64, "sizes": "32,64"}, "image_size 64 needs dataset digits or folder, got cifar10"),
        (
            {"weights": "w", "freeze": "stem,layer3,layer2,layer1", "model": "resnet20", "body_lr": 0.1},
            "body_lr 0.1 needs a stage to train, got freeze stem,layer3,layer2,layer1",
        ),
        (
            {"weights": "w", "freeze": "layer1,layer2,layer3", "model": "resnet20", "optimizer": "muon"},
            "optimizer muon needs a stage to train after the stem, got freeze layer1,layer2,layer3",
        ),
        ({"freeze": "stem"}, "freeze needs weights to start from, got weights None and freeze stem"),
        ({"new_head": True}, "new_head needs weights to start from, got weights None and new_head True"),
        (
            {"freeze": "stem,layr1", "weights": "w.pt"},
            r"freeze must name stages of resnet18, stem, layer1, .*, layer4, got 'layr1'; did you mean layer1\?",
        ),
        ({"freeze": "fc", "weights": "w.pt", "model": "article"}, r"residual_blocks.7, got 'fc'$"),
        ({"whiten": True, "stem": "imagenet"}, "with at least 54 filters, got stem imagenet with 64"),
        ({"stem": "cifar", "model": "article"}, "stem must be imagenet for article, which has no other, got 'cifar'"),
        ({"zero_gamma": True, "model": "article"}, "zero_gamma must be False for article, got True: a block's one"),
        ({"zero_gamma": True, "model": "plain20"}, "zero_gamma must be False for plain20, got True: a block without"),
        ({"graph": True, "device": "cpu"}, "graph needs a CUDA device, got cpu"),
        (
            {"mirror": "https://mirror.example/data", "dataset": "digits"},
            "mirror needs a dataset of cifar10, cifar100, svhn, got digits",
        ),
        ({"skip_unreadable": True, "dataset": "digits"}, "skip_unreadable needs dataset folder, got digits"),
        ({"images": "stream", "dataset": "digits"}, "images stream needs dataset folder, got digits"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_go_together_are_named(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_the_stem_is_the_models():
    assert TrainConfig().stem == "cifar" and TrainConfig(model="article").stem == "imagenet"
    assert TrainConfig(model="resnet50", stem="imagenet").stem == "imagenet"


def test_whitening_needs_filters_for_every_direction(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(MODELS, "narrow", replace(MODELS["resnet18"], stem_width=53))
    with pytest.raises(ValueError, match=r"with at least 54 filters, got stem cifar with 53 \(narrow\)$"):
        TrainConfig(model="narrow", whiten=True)


def test_cuda_where_there_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device must be a GPU that is there, got 'cuda'"):
        TrainConfig(device="cuda")
    assert TrainConfig(device="auto").device == "cpu"


@pytest.mark.parametrize("dataset", DEFAULT_RECIPES)
def test_defaults_are_those_of_the_data_sets_recipe(dataset: str):
    config, recipe = TrainConfig(dataset=dataset), RECIPES[DEFAULT_RECIPES[dataset]]
    assert config.recipe == DEFAULT_RECIPES[dataset]
    for name in RECIPE_FIELDS:
        if name != "flip" or dataset not in ("digits", "svhn"):
            assert getattr(config, name) == getattr(recipe, name), name
    assert TrainConfig(dataset=dataset, epochs=3).epochs == 3


@pytest.mark.parametrize("recipe", RECIPES)
def test_digits_are_never_mirrored_unless_asked_for(recipe: str):
    assert TrainConfig(dataset="digits", recipe=recipe).flip == "none"
    assert TrainConfig(dataset="digits", recipe=recipe, flip="random").flip == "random"


def test_everything_is_resolved():
    config = TrainConfig(out="~/run", workers=0)
    assert config.out == Path.home() / "run" and config.workers == 0
    values = TrainConfig(device="cpu", images="memory", dataset="folder").as_dict()
    assert "auto" not in values.values()
    # The data set says how far to crop; without `weights` they are new; several mirrors are known.
    assert [name for name, value in values.items() if value is None] == ["crop", "mirror", "weights"]
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


@pytest.mark.parametrize(
    ("capability", "precision"),
    [
        pytest.param((6, 1), "fp32", id="GTX 1080"),
        pytest.param((7, 0), "fp16", id="V100"),
        pytest.param((7, 5), "fp16", id="T4"),
        pytest.param((8, 0), "bf16", id="A100"),
        pytest.param((9, 0), "bf16", id="H100"),
        pytest.param((12, 0), "bf16", id="RTX 5090"),
    ],
)
def test_precision_of_a_gpu(capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)  # as where it is emulated
    capabilities = {"cuda": (8, 0), "cuda:1": capability}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[str(device)])
    assert choose_precision("cuda:1") == TrainConfig(device="cuda:1").precision == precision
    assert TrainConfig(device="cuda").precision == "bf16"
