"""The argument `weights` of torchvision's ResNets: which there are, and what they go together with."""

import difflib
from typing import Any

from torchvision.models._api import WeightsEnum


def verify(known: type[WeightsEnum], weights: Any) -> WeightsEnum | None:
    """Return the member of `known` that `weights` is or names, "IMAGENET1K_V1" or "ResNet18_Weights.IMAGENET1K_V1"."""
    names = list(known.__members__)
    if isinstance(weights, str) and (name := weights.removeprefix(f"{known.__name__}.")) not in names:
        nearest = difflib.get_close_matches(name.upper(), names, n=1)
        meant = f", nearest {nearest[0]!r}" if nearest else ""
        raise ValueError(f"weights must be one of {names} or None, got {weights!r}{meant}")
    return known.verify(weights)


def check_fit(weights: WeightsEnum, n_features: int, kwargs: dict[str, Any]) -> None:
    """Raise where a network with these arguments could not take the weights; its last layer has `n_features` inputs."""
    stem, n_classes = kwargs.get("stem", "imagenet"), len(weights.meta["categories"])
    if stem != "imagenet":
        raise ValueError(
            f"weights are for stem='imagenet', got stem={stem!r}: their first filters are 7x7 with stride 2, learned "
            "on images of 224x224, and fit no other stem; leave stem out and resize the images to about 224x224, or "
            "leave weights out and train from the beginning"
        )
    if kwargs.get("num_classes", n_classes) != n_classes:
        raise ValueError(
            f"weights are for num_classes={n_classes}, got num_classes={kwargs['num_classes']}: leave num_classes out; "
            f"model.fc = torch.nn.Linear({n_features}, {kwargs['num_classes']}) then gives a new last layer"
        )
