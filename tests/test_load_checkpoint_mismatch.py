"""A file that does not fit is not loaded, not even partly; the error lists differences and names known causes."""

import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
from foreign_nets import KuangliuNet, trained
from thin_resnet import thin_resnet
from torch import nn
from torchvision.models import resnet as torchvision_resnet

import resnet_fast
from resnet_fast import CheckpointMismatch
from resnet_fast.checkpoints.mismatch import known_causes
from resnet_fast.models import resnet
from resnet_fast.models.cifar import CifarResNet


def mismatch(model: nn.Module, state: dict, tmp_path: Path) -> CheckpointMismatch:
    """The error, after a look that no bit of the model has changed."""
    torch.save(state, tmp_path / "x.pth")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointMismatch) as caught:
        resnet_fast.load_checkpoint(model, tmp_path / "x.pth")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert str(caught.value).startswith(f"{tmp_path / 'x.pth'} does not fit the model, and nothing was loaded\n")
    return caught.value


def state_of_thin() -> dict[str, torch.Tensor]:
    return dict(trained(thin_resnet(torchvision_resnet)).state_dict())


CHANGES = {
    "missing": lambda state: state.pop("layer2.0.bn2.running_var"),
    "unexpected": lambda state: state.update({"layer2.0.bn3.weight": torch.ones(16)}),
    "shape": lambda state: state.update({"fc.weight": torch.ones(4, 16)}),
    "quantized": lambda state: state.update({"fc.bias": torch.ones(3, dtype=torch.int8)}),
    "sparse": lambda state: state.update({"fc.weight": torch.ones(3, 16).to_sparse()}),
    "without values": lambda state: state.update({"fc.weight": torch.ones(3, 16, device="meta")}),
    "all": lambda state: [state.update({name: value[None]}) for name, value in list(state.items())],
}


@pytest.mark.parametrize("case", CHANGES)
def test_nothing_is_loaded(case: str, tmp_path: Path):
    state = state_of_thin()
    CHANGES[case](state)
    error = mismatch(thin_resnet(resnet), state, tmp_path)
    assert isinstance(error, ValueError)
    assert bool(error.missing) == (case == "missing") and bool(error.unexpected) == (case == "unexpected")


def test_the_lists(tmp_path: Path):
    state = state_of_thin()
    state["layer2.0.bn2.running_varr"] = state.pop("layer2.0.bn2.running_var")
    state["fc.bias"] = torch.ones(3, dtype=torch.int8)
    state["bn1.weight"] = torch.ones(8, 1)
    error = mismatch(thin_resnet(resnet), state, tmp_path)
    assert str(error).splitlines()[1:] == [
        "  missing in the file (1):",
        "    layer2.0.bn2.running_var (in the file: layer2.0.bn2.running_varr?)",
        "  not in the model (1):",
        "    layer2.0.bn2.running_varr",
        "  of another shape or type (2):",
        "    bn1.weight: [8, 1] in the file, [8] in the model",
        "    fc.bias: torch.int8 in the file, torch.float32 in the model",
    ]


def test_long_lists_are_cut_off(tmp_path: Path):
    with torch.device("meta"):
        state = torchvision_resnet.resnet50().state_dict()
    error = mismatch(thin_resnet(resnet), {name: torch.ones(1) for name in state}, tmp_path)
    assert len(error.unexpected) > 100 and f"not in the model ({len(error.unexpected)})" in str(error)
    assert f"    … and {len(error.unexpected) - 10} more" in str(error)
    assert len(str(error).splitlines()) < 45


def test_names_are_those_of_the_two_sides_and_not_of_the_comparison(tmp_path: Path):
    """Both after prefixes and words have been matched as far as they can be."""
    state = {f"module.{name}": value for name, value in trained(KuangliuNet()).state_dict().items()}
    del state["module.linear.bias"]
    error = mismatch(nn.DataParallel(thin_resnet(resnet)), state, tmp_path)
    assert (error.missing, error.unexpected) == (("module.fc.bias",), ())


def filled(model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict of a model on the meta device with values that take no memory."""
    return {name: torch.zeros((), dtype=value.dtype).expand(value.shape) for name, value in model.state_dict().items()}


NETWORKS = {
    "classes": (
        lambda: torchvision_resnet.resnet18(num_classes=10),
        {},
        "the file has 10 classes, the model 1000: build the model with num_classes=10; to train 1000 classes, replace "
        "its last layer with nn.Linear(512, 1000) after loading",
    ),
    "stem of the file": (
        lambda: resnet_fast.resnet18(stem="cifar"),
        {},
        "the file's first convolution is 3x3, the model's 7x7: build the model with stem=\"cifar\"",
    ),
    "stem of the model": (
        torchvision_resnet.resnet18,
        {"stem": "cifar"},
        "the file's first convolution is 7x7, the model's 3x3: build the model with stem=\"imagenet\"",
    ),
    "block": (
        torchvision_resnet.resnet50,
        {},
        "the file holds a ResNet-50 (Bottleneck, 3 + 4 + 6 + 3 blocks), "
        "the model is a ResNet-18 (BasicBlock, 2 + 2 + 2 + 2 blocks)",
    ),
    "wide": (torchvision_resnet.wide_resnet50_2, {"depth": 50}, "with groups=1, width_per_group=128"),
    "deep stem": (
        lambda: timm.create_model("resnet18d"),
        {},
        "the file holds a ResNet with a deep stem (conv1.0, conv1.3, conv1.6) and pooled shortcuts, as timm's",
    ),
    "gray images": (lambda: timm.create_model("resnet18", in_chans=1), {}, "images with 1 channels, the model takes 3"),
    "no last layer": (
        lambda: timm.create_model("resnet18", num_classes=0),
        {},
        "the file has no last layer: set model.fc = torch.nn.Identity(), load, and set model.fc to a new nn.Linear",
    ),
    "a part": (
        lambda: nn.ModuleDict({"backbone": torchvision_resnet.resnet18(), "head": nn.Linear(2, 2)}),
        {},
        "names in the file begin with 'backbone.' (2 others do not), which is not",
    ),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_known_causes_are_named(case: str, tmp_path: Path):
    build, kwargs, hint = NETWORKS[case]
    with torch.device("meta"):
        network = build()
    state = filled(network)
    options = dict(kwargs)
    ours = getattr(resnet_fast, f"resnet{options.pop('depth', 18)}")(**options)
    error = mismatch(ours, state, tmp_path)
    assert any(hint in line for line in error.hints), str(error)
    assert all(line in str(error) for line in error.hints) and len(error.hints) == 1, error.hints


B, A = (
    "the file's shortcuts have weights (option B), the model's have none: build the model with shortcut=\"B\"",
    "no weights, ",
)
SIX_N_PLUS_TWO = {
    "option B": ({"shortcut": "B"}, {}, [B]),
    "option A": ({}, {"shortcut": "B"}, [A]),
    "none into option B": ({"shortcut": None}, {"shortcut": "B"}, [A]),
    "option B, classes": ({"shortcut": "B", "num_classes": 4}, {}, [B, "the file has 4 classes, the model 10"]),
    "width": (
        {"width": 8},
        {},
        ["the file's first convolution has 8 filters, the model's 16: build the model with width=8"],
    ),
}


@pytest.mark.parametrize("case", SIX_N_PLUS_TWO)
def test_shortcuts_and_widths_of_the_6n_plus_2_networks(case: str, tmp_path: Path):
    theirs, ours, hints = SIX_N_PLUS_TWO[case]
    file, model = (CifarResNet(**{"depth": 8, **options}) for options in (theirs, ours))
    error = mismatch(model, file.state_dict(), tmp_path)
    assert len(error.hints) == len(hints), error.hints
    assert all(hint in found for hint, found in zip(hints, error.hints, strict=True)), error.hints


def test_a_model_with_a_deep_stem_is_named():
    with torch.device("meta"):
        ours, file = timm.create_model("resnet18d").state_dict(), resnet_fast.resnet18().state_dict()
    (hint,) = known_causes(*({key: tuple(value.shape) for key, value in s.items()} for s in (file, ours)))
    assert hint.startswith("the model is a ResNet with a deep stem (conv1.0, conv1.3, conv1.6) and pooled shortcuts")


@pytest.mark.parametrize("name", ["resnext50_32x4d"])
def test_the_widths_that_are_advised_fit(name: str):
    with torch.device("meta"):
        theirs, plain = getattr(torchvision_resnet, name)().state_dict(), resnet_fast.resnet50().state_dict()
        (hint,) = known_causes(*({key: tuple(value.shape) for key, value in s.items()} for s in (theirs, plain)))
        groups, width = map(int, re.findall(r"=(\d+)", hint))
        ours = resnet_fast.resnet50(groups=groups, width_per_group=width).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_a_shallow_network_of_three_stages_is_named_by_its_layers(tmp_path: Path):
    names = [f"module.layer{stage}.{block}.conv1.weight" for stage in (1, 2, 3) for block in range(9)]
    error = mismatch(thin_resnet(resnet), {name: torch.ones(1) for name in names}, tmp_path)
    assert "the file holds a ResNet-56 (BasicBlock, 9 + 9 + 9 blocks)" in error.hints[0]


def test_the_error_of_a_worker_process_can_be_sent(tmp_path: Path):
    error = mismatch(nn.Linear(2, 2), {"weight": torch.ones(3, 2)}, tmp_path)
    sent = pickle.loads(pickle.dumps(error))
    assert str(sent) == str(error) and sent.unlike == error.unlike


def test_a_model_without_values_is_refused(tmp_path: Path):
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    torch.save({"weight": torch.ones(2, 2)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="got weight there: call model.to_empty"):
        resnet_fast.load_checkpoint(model, tmp_path / "x.pth")
