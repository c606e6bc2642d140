"""Checks of `weights`, the argument of torchvision's ResNets: its name, and that the other arguments fit it."""

from typing import Any

from torchvision.models._api import WeightsEnum

from ..common.checks import did_you_mean


def verify(weights_enum: type[WeightsEnum], weights: Any) -> WeightsEnum | None:
    """Return the member of `weights_enum` that `weights` is or names, such as "ResNet18_Weights.IMAGENET1K_V1".

    Raises:
        ValueError: `weights_enum` has no weights of that name; the message has the nearest.
        TypeError: `weights` belong to another network, or are neither weights, a name, nor None.
    """
    names = list(weights_enum.__members__)
    if isinstance(weights, str) and (name := weights.removeprefix(f"{weights_enum.__name__}.")) not in names:
        hint = did_you_mean(name.upper(), names)
        raise ValueError(f"weights must be one of {names} or None, got {weights!r}{hint}")
    return weights_enum.verify(weights)


def check_fit(weights: WeightsEnum, n_features: int, kwargs: dict[str, Any]) -> None:
    """Check that a network with these arguments, whose last layer has `n_features` inputs, can load the weights.

    Raises:
        ValueError: `stem` is given and not "imagenet", or `num_classes` is given and differs from the weights'.
    """
    stem, n_classes = kwargs.get("stem", "imagenet"), len(weights.meta["categories"])
    if stem != "imagenet":
        raise ValueError(
            f"weights are for stem='imagenet', got stem={stem!r}: their first filters are 7x7 with stride 2, learned "
            "on images of 224x224, and fit no other stem; leave stem out and resize the images to about 224x224, or "
            "leave weights out and train from scratch"
        )
    if kwargs.get("num_classes", n_classes) != n_classes:
        raise ValueError(
            f"weights are for num_classes={n_classes}, got num_classes={kwargs['num_classes']}: leave num_classes out; "
            f"model.fc = torch.nn.Linear({n_features}, {kwargs['num_classes']}) then gives a new last layer"
        )
