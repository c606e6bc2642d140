"""A run that would leave a ghost batch of one image with 1x1 maps is refused before it starts; no other run is."""

from pathlib import Path

import pytest
import torch
from tiny_run import config_for, list_curves, make_dataset

from resnet_fast.data import Augmentation, Loader, TensorSplit
from resnet_fast.models.registry import MODELS
from resnet_fast.ops import augment
from resnet_fast.training import prepare, run_folder, train
from resnet_fast.training.network import freeze, make_network

pytestmark = pytest.mark.usefixtures("one_thread")

N_IMAGES = 34


def check(tmp_path: Path, stem: str = "imagenet", side: int = 32, world_size: int = 1, frozen: str = "", **settings):
    config = config_for(tmp_path, stem=stem, **{"batch_size": 12, "ghost_batch_size": 3, "epochs": 3, **settings})
    images = torch.zeros(N_IMAGES, 3, side, side, dtype=torch.uint8)
    split = TensorSplit(images, torch.zeros(N_IMAGES, dtype=torch.int64))
    augmentation = Augmentation((0.5,) * 3, (0.2,) * 3)
    with torch.device("meta"):
        model = make_network(config, 10)
    freeze(model, frozen, MODELS[config.model].stages)
    prepare.check_ghost_batches(model, config, Loader(split, augmentation, config.batch_size, world_size=world_size))


@pytest.mark.parametrize(
    ("setting", "got"),
    [
        ({}, "got 3 for 10 images of a batch of 10"),  # the last batch
        ({"batch_size": 16}, "got 3 for 16 images of a batch of 16"),  # every batch
        ({"batch_size": 17, "accumulate": 2, "ghost_batch_size": 4}, "got 4 for 9 images of a batch of 17"),
        ({"batch_size": 14, "world_size": 2}, "got 3 for 7 images of a batch of 14"),
        ({"batch_size": 15, "world_size": 2}, "got 3 for 7 images of a batch of 15"),
        ({"stem": "cifar", "side": 8}, "got 3 for 10 images of a batch of 10"),
        ({"sizes": "32,64", "side": 64}, "got 3 for 10 images of a batch of 10"),
        ({"model": "article"}, "got 3 for 10 images of a batch of 10"),
    ],
    ids=str,
)
def test_refused(setting: dict, got: str, tmp_path: Path):
    with pytest.raises(ValueError, match=rf"ghost batch of 1 image where the last maps are 1x1 .*{got}$"):
        check(tmp_path, **setting)


@pytest.mark.parametrize(
    "setting",
    [
        {"ghost_batch_size": 4},  # two images are left
        {"ghost_batch_size": 16},  # more than there are
        {"batch_size": 11, "ghost_batch_size": 5, "stem": "cifar"},  # one image is left, but with maps of 4x4
        {"stem": "cifar"},
        {"side": 64},
        {"frozen": "layer4"},
        {"batch_size": 33, "ghost_batch_size": 3},  # the last image is left out
        {"accumulate": 6},  # 2 images in each micro-batch, then 10 in 5
        {"sizes": "32,64", "side": 64, "batch_size": 24, "epochs": 1},  # the last batch has the last size
    ],
    ids=str,
)
def test_allowed(setting: dict, tmp_path: Path):
    check(tmp_path, **setting)


def test_a_run_is_refused_before_its_folder_is_written_or_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Images of 8x8: the last maps are 1x1 in resnet18 and 2x2 in resnet20."""
    monkeypatch.setattr(augment, "choose_backend", lambda x: "aten")
    monkeypatch.setattr(prepare, "load_dataset", lambda *args, **kwargs: make_dataset(N_IMAGES))
    monkeypatch.setattr(run_folder, "draw_curves", list_curves)
    monkeypatch.setattr(run_folder, "write_pictures", lambda *args: None)
    settings = {"batch_size": 12, "ghost_batch_size": 3, "epochs": 1}
    with pytest.raises(ValueError, match="^ghost_batch_size must not leave"):
        train(config_for(tmp_path / "run", model="resnet18", **settings))
    assert not (tmp_path / "run").exists()
    assert len(train(config_for(tmp_path / "run", model="resnet20", **settings)).history) == 1
