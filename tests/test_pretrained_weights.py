"""`resnet18(weights=…)` accepts torchvision's weights by member or name, and explains incompatible arguments."""

import pytest
import torch
from torchvision import models as torchvision_models
from torchvision.models import ResNet18_Weights, ResNet50_Weights

import resnet_fast

NAMES = ("resnet34", "resnet50", "resnet101")


@pytest.fixture
def downloaded(monkeypatch):
    """Everything but the download: what torchvision would give for any weights is made by the test."""
    states = {}
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda url, **kwargs: states[url.rsplit("/")[-1]]
    )
    return states


@pytest.mark.parametrize(
    "weights",
    [ResNet18_Weights.IMAGENET1K_V1, "DEFAULT", "ResNet18_Weights.IMAGENET1K_V1"],
    ids=str,
)
def test_member_or_name(weights, downloaded):
    downloaded["resnet18-f37072fd.pth"] = state = torchvision_models.resnet18().state_dict()
    model = resnet_fast.resnet18(weights=weights)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("name", NAMES)
def test_every_depth_has_all_of_its_weights(name, monkeypatch):
    """And no others; on the meta device, where nothing is computed."""
    known = getattr(torchvision_models, f"ResNet{name[6:]}_Weights")
    with torch.device("meta"):
        state = getattr(torchvision_models, name)().state_dict()
        asked = []
        monkeypatch.setattr(known, "get_state_dict", lambda self, **kwargs: asked.append((self.name, kwargs)) or state)
        monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda self, given: asked.append(set(given)))
        for member in known.__members__:
            model = getattr(resnet_fast, name)(weights=member, progress=False)
            (asked_name, kwargs), keys = asked[-2:]
            assert asked_name == known[member].name and kwargs == {"progress": False, "check_hash": True}
            assert keys == set(model.state_dict())


def test_the_old_argument_still_works(downloaded):
    downloaded["resnet18-f37072fd.pth"] = torchvision_models.resnet18().state_dict()
    with pytest.warns(UserWarning, match="pretrained"):
        model = resnet_fast.resnet18(pretrained=True)
    assert torch.equal(model.fc.weight, downloaded["resnet18-f37072fd.pth"]["fc.weight"])


REFUSED = {
    "nearest": ({"weights": "imagenet1k_v1"}, "got 'imagenet1k_v1'; did you mean IMAGENET1K_V1?"),
    "other classes": (
        {"weights": "DEFAULT", "num_classes": 10},
        "weights are for num_classes=1000, got num_classes=10: leave num_classes out; "
        "model.fc = torch.nn.Linear(512, 10) then gives a new last layer",
    ),
    "another stem": (
        {"weights": "DEFAULT", "stem": "cifar"},
        "weights are for stem='imagenet', got stem='cifar': their first filters are 7x7 with stride 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused_before_a_download(case, downloaded):
    kwargs, message = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        resnet_fast.resnet18(**kwargs)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_weights_of_another_depth_are_refused():
    with pytest.raises(TypeError, match="expected ResNet18_Weights but received ResNet50_Weights"):
        resnet_fast.resnet18(weights=ResNet50_Weights.DEFAULT)


def test_the_new_last_layer_that_is_advised_fits():
    with pytest.raises(ValueError, match=r"torch.nn.Linear\(2048, 10\)"):
        resnet_fast.resnet50(weights="DEFAULT", num_classes=10)
    assert ResNet50_Weights.DEFAULT is ResNet50_Weights.IMAGENET1K_V2
