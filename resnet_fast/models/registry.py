"""The networks by name, each with its builder and its properties.

list_models()                                     # ["resnet18", …]
get_model("resnet18", num_classes=10, stem="cifar")

To add a network, add an entry to MODELS; commands, training, profiles and checkpoints find it there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..common.checks import check_choice, check_integer, did_you_mean, shown

if TYPE_CHECKING:
    from torch import nn

STEMS = ("cifar", "imagenet")


@dataclass(frozen=True)
class Model:
    """A network's builder and properties.

    Args:
        build: builds the network: `build(num_classes=…, norm_layer=…)`, with `stem=…` if it has several stems.
        family: name of its family, such as "torchvision" or "He et al.".
        stems: its stems, among STEMS; the first is the default in training.
        stem_width: number of filters in the stem.
        stages: names of the modules between stem and last layer, in order. Training can freeze these and the stem.
        build_plain: builds the plain PyTorch network with the same keys: `build_plain(num_classes=…, stem=…)`. None:
            `build` with nn.BatchNorm2d.
        refused: training options that would harm this network, each with the reason.
        keywords: names of the arguments of `build`. None: `build` itself refuses others.
    """

    build: "Callable[..., nn.Module]"
    family: str
    stems: tuple[str, ...]
    stem_width: int
    stages: tuple[str, ...]
    build_plain: "Callable[..., nn.Module] | None" = None
    refused: Mapping[str, str] = field(default_factory=dict)
    keywords: tuple[str, ...] | None = None

    def make(self, num_classes: int, stem: str, norm_layer: "Callable[..., nn.Module] | None" = None) -> "nn.Module":
        """Return the network with fused batch norms, or with the norms that `norm_layer` makes."""
        kwargs: dict[str, Any] = {"stem": stem} if len(self.stems) > 1 else {}
        if norm_layer is not None:
            kwargs["norm_layer"] = norm_layer
        return self.build(num_classes=num_classes, **kwargs)

    def make_plain(self, num_classes: int, stem: str) -> "nn.Module":
        """Return the plain PyTorch network with the same keys and, from the same seed, the same weights."""
        if self.build_plain is None:
            from torch import nn

            return self.make(num_classes, stem, nn.BatchNorm2d)
        return self.build_plain(num_classes=num_classes, stem=stem)


def _function(name: str) -> "Callable[..., nn.Module]":
    """Return a stand-in for a function of resnet_fast.models that imports it, and torch, only when called."""

    def build(**kwargs: Any) -> "nn.Module":
        return getattr(import_module("resnet_fast.models"), name)(**kwargs)

    return build


def _layers(count: int) -> tuple[str, ...]:
    return tuple(f"layer{i}" for i in range(1, count + 1))


def _torchvision_model(name: str) -> Model:
    def build_plain(num_classes: int, stem: str) -> "nn.Module":
        """Return torchvision's network, with its stem replaced if `stem` is "cifar"."""
        from torchvision import models as torchvision_models

        from .resnet import give_cifar_stem

        model = getattr(torchvision_models, name)(num_classes=num_classes)
        if stem == "cifar":
            give_cifar_stem(model)
        return model

    own = ("weights", "progress", "num_classes", "zero_init_residual", "groups", "width_per_group")
    # torchvision also accepts `pretrained`, the old name of `weights`.
    keywords = (*own, "replace_stride_with_dilation", "norm_layer", "stem", "pretrained")
    return Model(_function(name), "torchvision", STEMS, 64, _layers(4), build_plain, keywords=keywords)


def _cifar_model(name: str) -> Model:
    keywords = ("num_classes", "shortcut", "width", "norm_layer")
    return Model(_function(name), "He et al.", ("cifar",), 16, _layers(3), keywords=keywords)


def _without_skips(name: str) -> Model:
    refused = {"zero_gamma": "a block without a skip connection would output only zeros"}
    keywords = ("num_classes", "width", "norm_layer")
    return Model(_function(name), "He et al., plain", ("cifar",), 16, _layers(3), refused=refused, keywords=keywords)


MODELS: dict[str, Model] = {
    **{name: _torchvision_model(name) for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")},
    **{name: _cifar_model(name) for name in ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")},
    **{name: _without_skips(name) for name in ("plain20", "plain32", "plain44", "plain56", "plain110")},
    "article": Model(
        _function("article"),
        "article",
        ("imagenet",),
        64,
        tuple(f"residual_blocks.{i}" for i in range(8)),
        refused={"zero_gamma": "a block's one batch norm also precedes its first ReLU, which would output only zeros"},
        keywords=("num_classes", "norm_layer"),
    ),
}


def list_models() -> list[str]:
    """Return the name of every network."""
    return list(MODELS)


def get_model(name: str, **kwargs: Any) -> "nn.Module":
    """Return the network called `name`, built by the function of that name.

    Args:
        name: one of `list_models()`.
        kwargs: arguments of that function, such as `num_classes` and `norm_layer`. Every network accepts a `stem` that
            it has.

    Raises:
        ValueError: the network is unknown or does not have the stem (the message lists the valid ones), or
            `num_classes` is not an integer of at least 0.
        TypeError: the network does not accept a keyword (the message lists the accepted ones and the nearest), or
            `norm_layer` is not callable.
    """
    check_name(name)
    _check_keywords(name, kwargs)
    if "num_classes" in kwargs:
        check_integer("num_classes", kwargs["num_classes"], 0)
    if not callable(kwargs.get("norm_layer") or object):
        raise TypeError(f"norm_layer must be callable or None, got {type(kwargs['norm_layer']).__name__}")
    if "stem" in kwargs:
        check_stem(name, kwargs["stem"])
        if len(MODELS[name].stems) == 1:
            del kwargs["stem"]
    return MODELS[name].build(**kwargs)


def check_name(name: object) -> None:
    """Raise ValueError unless a network is called `name`; the message lists all names and the nearest."""
    if not isinstance(name, str) or name not in MODELS:
        hint = did_you_mean(name, MODELS) if isinstance(name, str) else ""
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {shown(name)}{hint}")


def _check_keywords(name: str, kwargs: Mapping[str, Any]) -> None:
    keywords = MODELS[name].keywords
    if keywords is None:
        return
    accepted = tuple(dict.fromkeys([*keywords, "stem"]))
    for keyword in kwargs:
        if keyword not in accepted:
            hint = did_you_mean(keyword, accepted, at_most=1)
            raise TypeError(f"keywords of {name} must be among {', '.join(accepted)}, got {keyword!r}{hint}")


def check_stem(name: str, stem: object) -> None:
    """Raise ValueError unless the network called `name` has this stem."""
    stems = MODELS[name].stems
    check_choice("stem", stem, STEMS)
    if stem not in stems:
        raise ValueError(f"stem must be {' or '.join(stems)} for {name}, which has no other, got {stem!r}")
