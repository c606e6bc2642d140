"""Every network is found by its name, with its stems, and so is the plain network to compare it with."""

import inspect
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models import resnet as torchvision_resnet

import resnet_fast
from resnet_fast import FusedBatchNorm2d, models
from resnet_fast.models import get_model, list_models
from resnet_fast.models.registry import MODELS

MAKES = {  # what a family's functions make, and what of it they set
    "torchvision": (models.ResNet, {"block", "layers"}),
    "He et al.": (models.CifarResNet, {"depth"}),
    "He et al., plain": (models.CifarResNet, {"depth", "shortcut"}),
    "article": (models.article, set()),
}
ONE_EACH = ("resnet18", "resnet20", "plain20", "article")  # of every family


def batch_norms(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules() if isinstance(module, nn.BatchNorm2d)}


def test_every_name_is_a_function_of_resnet_fast_models(monkeypatch: pytest.MonkeyPatch):
    assert list_models() == list(MODELS)
    for name, model in MODELS.items():
        monkeypatch.setattr(models, name, lambda name=name: name)
        assert model.build() == name


def test_a_name_gives_what_its_function_gives():
    torch.manual_seed(0)
    by_name = get_model("resnet18", num_classes=10, zero_init_residual=True).state_dict()
    torch.manual_seed(0)
    by_function = resnet_fast.resnet18(num_classes=10, zero_init_residual=True).state_dict()
    assert by_name["conv1.weight"].shape[2:] == (7, 7)  # that of the function, not of training
    assert all(torch.equal(value, by_function[name]) for name, value in by_name.items())


@pytest.mark.parametrize("name", ONE_EACH)
def test_fused_and_plain_differ_in_their_batch_norms_alone(name: str):
    stem = MODELS[name].stems[-1]
    with torch.device("meta"):
        fused, plain = MODELS[name].make(3, stem), MODELS[name].make_plain(3, stem)
    assert fused.conv1.weight.shape[0] == MODELS[name].stem_width
    assert fused.conv1.weight.shape[2:] == {"cifar": (3, 3), "imagenet": (7, 7)}[stem]
    assert batch_norms(fused) == {FusedBatchNorm2d} and batch_norms(plain) == {nn.BatchNorm2d}
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (fused, plain)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ONE_EACH)
def test_the_batch_norms_may_be_chosen(name: str):
    with torch.device("meta"):
        model = MODELS[name].make(3, MODELS[name].stems[0], partial(FusedBatchNorm2d, ghost_batch_size=4))
    assert {m.ghost_batch_size for m in model.modules() if isinstance(m, FusedBatchNorm2d)} == {4}


def test_the_plain_resnet18_is_torchvisions():
    with torch.device("meta"):
        assert type(MODELS["resnet18"].make_plain(3, "cifar")) is torchvision_resnet.ResNet


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnt18", {}, r"model must be one of resnet18, .*, got 'resnt18'; did you mean resnet18\b"),
        ("artcle", {}, r", got 'artcle'; did you mean article\?$"),
        ("vgg", {}, r", article\b.*, got 'vgg'$"),
        (18, {}, "model must be one of .*, got 18"),
        ("resnet18", {"stem": "wide"}, "stem must be one of cifar, imagenet, got 'wide'"),
        ("article", {"stem": "cifar"}, "stem must be imagenet for article, which has no other, got 'cifar'"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(name, kwargs: dict, message: str):
    with pytest.raises(ValueError, match=message):
        get_model(name, **kwargs)


@pytest.mark.parametrize(
    ("name", "keyword", "message"),
    [
        ("resnet18", "num_clases", r"keywords of resnet18 must be among weights, .*; did you mean num_classes\?$"),
        ("resnet20", "num_clases", r"resnet20 must be .*, stem, got 'num_clases'; did you mean num_classes\?$"),
        ("resnet20", "depth", "num_classes, shortcut, width, norm_layer, stem, got 'depth'"),
        ("resnet20", "filters", ", got 'filters'$"),
        ("plain20", "shortcut", "of plain20 must be among num_classes, width, norm_layer, stem, got 'shortcut'$"),
        ("article", "nb_classes", r"among num_classes, norm_layer, stem, got 'nb_classes'; did you mean num_classes"),
    ],
)
def test_an_unknown_keyword_is_named_with_the_nearest(name: str, keyword: str, message: str):
    with pytest.raises(TypeError, match=message):
        get_model(name, num_classes=3, **{keyword: 1})


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained' is deprecated", "ignore:Arguments other than a weight")
@pytest.mark.parametrize("name", ONE_EACH)
def test_every_keyword_that_is_known_is_taken(name: str):
    values = {"num_classes": 3, "width": 4, "norm_layer": nn.BatchNorm2d, "shortcut": "B", "stem": "cifar"}
    values |= {"weights": None, "pretrained": False, "progress": False, "zero_init_residual": True, "groups": 1}
    values |= {"width_per_group": 64, "replace_stride_with_dilation": None}
    keywords = MODELS[name].keywords
    makes, sets = MAKES[MODELS[name].family]
    taken = [*inspect.signature(getattr(models, name)).parameters, *inspect.signature(makes).parameters]
    assert set(keywords) - {"pretrained"} == set(taken) - {"kwargs"} - sets
    for keyword in keywords:
        with torch.device("meta"):
            assert isinstance(get_model(name, **{keyword: values[keyword]}), nn.Module)
