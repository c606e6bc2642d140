"""The network of a run starts as its recipe says, and is the same for every backend."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_run import list_curves
from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet

from resnet_fast.data import ImageDataset, TensorSplit
from resnet_fast.ops import augment as augment_module
from resnet_fast.training import Result, TrainConfig, prepare, run_folder, train
from resnet_fast.training.network import WHITENING_EPS, blocks_of, make_network, whiten_stem

N_CLASSES = 10


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, on_aten: None) -> None:
    monkeypatch.setattr(augment_module, "choose_backend", lambda x: "aten")


def network(model: str = "resnet18", backend: str = "fused", stem: str | None = None, **settings) -> nn.Module:
    torch.manual_seed(0)
    config = TrainConfig(device="cpu", model=model, backend=backend, stem=stem, out=Path("unused"), **settings)
    return make_network(config, N_CLASSES)


def positive_images(n_channels: int) -> Tensor:
    return torch.rand(2, n_channels, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("model", "stem"), [("resnet18", "imagenet"), ("resnet50", "cifar"), ("plain20", "cifar"), ("article", "imagenet")]
)
def test_all_backends_have_the_same_keys_and_shapes(model: str, stem: str):
    with torch.device("meta"):
        shapes = [
            {name: value.shape for name, value in network(model, backend, stem).state_dict().items()}
            for backend in ("fused", "eager", "compile")
        ]
    assert shapes[0] == shapes[1] == shapes[2] and list(shapes[0]) == list(shapes[1])


@pytest.mark.parametrize(
    ("model", "start"),
    [("resnet18", {}), ("resnet20", {"zero_gamma": True, "dirac": True}), ("article", {"dirac": True})],
)
def test_all_backends_start_with_the_same_weights(model: str, start: dict):
    fused, eager = (network(model, backend, **start).state_dict() for backend in ("fused", "eager"))
    assert all(torch.equal(value, eager[name]) for name, value in fused.items())


@pytest.mark.parametrize(("model", "backend"), [("resnet50", "fused"), ("resnet20", "fused"), ("resnet18", "eager")])
def test_with_zero_gamma_each_block_starts_as_its_shortcut(model: str, backend: str):
    blocks = blocks_of(network(model, backend, zero_gamma=True))
    assert len(blocks) == {"resnet18": 8, "resnet50": 16, "resnet20": 9}[model]
    for block in blocks:
        x = positive_images(block.conv1.in_channels)
        shortcut = x if block.downsample is None else block.downsample(x)
        assert torch.equal(block(x), shortcut.relu())


@pytest.mark.parametrize(("model", "backend"), [("resnet50", "fused"), ("article", "fused"), ("resnet20", "eager")])
def test_with_dirac_the_3x3_convolutions_of_blocks_start_as_the_identity(model: str, backend: str):
    found, plain = network(model, backend, dirac=True), network(model, backend)
    convolutions = {
        id(conv)
        for block in blocks_of(found)
        for conv in block.modules()
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3)
    }
    # Two in each of 8 blocks, one in each of 16, or two in each of 9.
    assert len(convolutions) == (18 if model.endswith("20") else 16)
    for (name, conv), usual in zip(found.named_modules(), plain.modules(), strict=True):
        if id(conv) in convolutions:
            x, n_in = positive_images(conv.in_channels), conv.in_channels
            bias = 0 if conv.bias is None else conv.bias[:n_in, None, None]
            assert torch.equal(conv(x)[:, :n_in], x[:, :, :: conv.stride[0], :: conv.stride[1]] + bias), name
            assert torch.equal(conv.weight[n_in:], usual.weight[n_in:]), name
        else:
            for own, other in zip(conv.parameters(recurse=False), usual.parameters(recurse=False), strict=True):
                assert torch.equal(own, other), name


# Whitening.

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def smooth_dataset(n_images: int = 60) -> ImageDataset:
    """Images whose neighbouring pixels and channels are alike, as those of a camera."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n_images, 3, 4, 4, generator=generator) + torch.rand(n_images, 1, 4, 4, generator=generator)
    images = F.interpolate(coarse, size=(16, 16), mode="bilinear") * 110 + 30 * torch.rand(
        n_images, 3, 16, 16, generator=generator
    )
    split = TensorSplit(images.clamp(0, 255).byte(), torch.randint(N_CLASSES, (n_images,), generator=generator))
    return ImageDataset("smooth", tuple("0123456789"), split, split, MEAN, STD, 2, True)


def test_whitened_patches_have_unit_covariance_up_to_eps():
    dataset = smooth_dataset()
    conv = network().conv1
    whiten_stem(conv, dataset, MEAN, STD)
    images = (dataset.train.images.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    patches = F.unfold(images, 3).transpose(1, 2).reshape(-1, 27)
    variances = torch.linalg.eigvalsh(patches.T @ patches / len(patches))
    assert variances.max() > 500 * variances.min()  # there is something to whiten
    outputs = F.conv2d(images, conv.weight[:27].double()).transpose(0, 1).flatten(1)
    covariance = outputs @ outputs.T / outputs.shape[1]
    expected = torch.diag(variances / (variances + WHITENING_EPS))
    # fp32 filters: the largest variance, in a direction that a filter leaves 2^-24 of, and scales by 1/√(λ + eps).
    torch.testing.assert_close(covariance, expected, rtol=0, atol=1e-4)


def test_the_other_filters_are_the_negative_ones_and_then_as_they_were():
    conv, usual = network().conv1, network().conv1
    whiten_stem(conv, smooth_dataset(), MEAN, STD)
    assert torch.equal(conv.weight[27:54], -conv.weight[:27])
    assert torch.equal(conv.weight[54:], usual.weight[54:]) and len(conv.weight) == 64
    assert conv.weight.requires_grad


def test_whitening_looks_at_evenly_spaced_images(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("resnet_fast.training.network.WHITENING_IMAGES", 3)
    dataset = smooth_dataset(5)
    three = replace(dataset, train=dataset.train.subset(torch.tensor([0, 2, 4])))
    convs = [network().conv1, network().conv1]
    for conv, data in zip(convs, (dataset, three), strict=True):
        whiten_stem(conv, data, MEAN, STD)
    assert torch.equal(convs[0].weight, convs[1].weight)


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(3, 53, 3), nn.Conv2d(3, 64, 7), nn.Conv2d(1, 64, 3)], ids=["53 filters", "7x7", "grey"]
)
def test_a_stem_that_cannot_whiten_is_refused(conv: nn.Conv2d):
    with pytest.raises(ValueError, match=r"the stem must have shape \[54 or more, 3, 3, 3\], got \["):
        whiten_stem(conv, smooth_dataset(2), MEAN, STD)


# Training.


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def dataset(*args, **kwargs) -> ImageDataset:
        smooth = smooth_dataset(8)
        small = TensorSplit(smooth.train.images[..., :8, :8], smooth.train.labels)
        return replace(smooth, train=small, test=small)

    monkeypatch.setattr(prepare, "load_dataset", dataset)
    monkeypatch.setattr(run_folder, "draw_curves", list_curves)


def trained(out: Path, **settings) -> Result:
    common = {"dataset": "digits", "recipe": "fast94", "batch_size": 4, "epochs": 1, "device": "cpu", "cutout": 3}
    return train(TrainConfig(**{**common, "precision": "fp32", "lr": 0.01, "out": out, **settings}))


@pytest.mark.slow
@pytest.mark.usefixtures("few_images")
def test_plain_layers_train_the_numbers_of_fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On ATen's operators, which fused then calls in the order in which torchvision's network does. `compile` gives
    that network to torch.compile and trains what comes back.
    """
    compiled, calls = [], []

    def compile_with_nothing(model: nn.Module, dynamic: bool):
        compiled.append(model)
        return lambda x: calls.append(len(x)) or model(x)

    monkeypatch.setattr(torch, "compile", compile_with_nothing)
    start = {"zero_gamma": True, "dirac": True, "whiten": True}
    fused, plain = (trained(tmp_path / backend, backend=backend, **start) for backend in ("fused", "compile"))
    assert compiled == [plain.model] and calls == [4, 4]
    assert type(plain.model) is torchvision_resnet.ResNet is not type(fused.model)
    for name, value in fused.model.state_dict().items():
        assert torch.equal(value, plain.model.state_dict()[name]), name
    assert fused.history[0].train_loss == plain.history[0].train_loss
