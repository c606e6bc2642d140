"""Every network by its name: what builds it, and what else there is to know of it.

list_models()                                     # ["resnet18", …]
get_model("resnet18", num_classes=10, stem="cifar")

A network is added by an entry of MODELS; the commands, training, profiles and checkpoints find it there.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torchvision import models as torchvision_models

from ..common.checks import check_choice, check_integer, did_you_mean, shown
from . import cifar, resnet
from .article import STEM_CHANNELS, article

STEMS = ("cifar", "imagenet")


@dataclass(frozen=True)
class Model:
    """What is known of a network.

    Args:
        build: makes it: `build(num_classes=…, norm_layer=…)`, with `stem=…` too where there are several.
        family: those that it is built like, in a word or two.
        stems: those that it has, of STEMS; the first is what training takes unless told otherwise.
        stem_width: filters of the stem.
        build_plain: makes the network of plain PyTorch with the same keys: `build_plain(num_classes=…, stem=…)`; None:
            `build` with nn.BatchNorm2d.
        refused: switches of training that would do harm here, each with the reason.
        keywords: names of what `build` takes; None: get_model leaves it to `build` to refuse others.
    """

    build: Callable[..., nn.Module]
    family: str
    stems: tuple[str, ...]
    stem_width: int
    build_plain: Callable[..., nn.Module] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    keywords: tuple[str, ...] | None = None

    def make(self, num_classes: int, stem: str, norm_layer: Callable[..., nn.Module] | None = None) -> nn.Module:
        """Return the network on fused batch norms, or on those that `norm_layer` makes."""
        kwargs: dict[str, Any] = {"stem": stem} if len(self.stems) > 1 else {}
        if norm_layer is not None:
            kwargs["norm_layer"] = norm_layer
        return self.build(num_classes=num_classes, **kwargs)

    def make_plain(self, num_classes: int, stem: str) -> nn.Module:
        """Return the network of plain PyTorch that has the same keys and, by the same seed, the same weights."""
        if self.build_plain is None:
            return self.make(num_classes, stem, nn.BatchNorm2d)
        return self.build_plain(num_classes=num_classes, stem=stem)


def _keywords(
    build: Callable[..., nn.Module], makes: type[nn.Module] | None = None, sets: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Return what `build` takes by its signature and, as **kwargs, that of the class it makes but for what it sets."""
    parameters = inspect.signature(build).parameters.values()
    own = [parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    passed_on = inspect.signature(makes).parameters if makes else ()
    return tuple(name for name in dict.fromkeys([*own, *passed_on]) if name not in sets)


def _of_torchvision(build: Callable[..., nn.Module]) -> Model:
    def build_plain(num_classes: int, stem: str) -> nn.Module:
        """torchvision's network, with the stem changed as its users change it."""
        model = getattr(torchvision_models, build.__name__)(num_classes=num_classes)
        if stem == "cifar":
            resnet.give_cifar_stem(model)
        return model

    # torchvision's decorator takes the old name of `weights`, which no signature shows.
    keywords = (*_keywords(build, resnet.ResNet, ("block", "layers")), "pretrained")
    return Model(build, "torchvision", STEMS, 64, build_plain, keywords=keywords)


def _of_cifar(build: Callable[..., nn.Module]) -> Model:
    return Model(build, "He et al.", ("cifar",), 16, keywords=_keywords(build, cifar.CifarResNet, ("depth",)))


def _without_skips(build: Callable[..., nn.Module]) -> Model:
    reason = "a block without a skip connection would let nothing pass"
    keywords = _keywords(build, cifar.CifarResNet, ("depth", "shortcut"))
    return Model(build, "He et al., plain", ("cifar",), 16, refused={"zero_gamma": reason}, keywords=keywords)


MODELS: dict[str, Model] = {
    "resnet18": _of_torchvision(resnet.resnet18),
    "resnet34": _of_torchvision(resnet.resnet34),
    "resnet50": _of_torchvision(resnet.resnet50),
    "resnet101": _of_torchvision(resnet.resnet101),
    "resnet152": _of_torchvision(resnet.resnet152),
    "resnet20": _of_cifar(cifar.resnet20),
    "resnet32": _of_cifar(cifar.resnet32),
    "resnet44": _of_cifar(cifar.resnet44),
    "resnet56": _of_cifar(cifar.resnet56),
    "resnet110": _of_cifar(cifar.resnet110),
    "plain20": _without_skips(cifar.plain20),
    "plain32": _without_skips(cifar.plain32),
    "plain44": _without_skips(cifar.plain44),
    "plain56": _without_skips(cifar.plain56),
    "plain110": _without_skips(cifar.plain110),
    "article": Model(
        article,
        "article",
        ("imagenet",),
        STEM_CHANNELS,
        refused={
            "zero_gamma": "a block's one batch norm stands before its ReLU, too, and would let nothing pass there"
        },
        keywords=_keywords(article),
    ),
}


def list_models() -> list[str]:
    """Return the name of every network."""
    return list(MODELS)


def get_model(name: str, **kwargs: Any) -> nn.Module:
    """Return the network called `name`, as the function of that name makes it.

    Args:
        name: one of `list_models()`.
        kwargs: those of the function, such as `num_classes` and `norm_layer`; `stem` may be given to each, if it is one
            that the network has.

    Raises:
        ValueError: there is no such network, or it has no such stem; the message names those that there are. Also if
            `num_classes` is no integer, or negative.
        TypeError: it takes no such keyword; the message names those that it takes, and the nearest. Also if
            `norm_layer` is not callable.
    """
    check_name(name)
    _check_keywords(name, kwargs)
    if "num_classes" in kwargs:
        check_integer("num_classes", kwargs["num_classes"], 0)
    if not callable(kwargs.get("norm_layer") or nn.BatchNorm2d):
        raise TypeError(f"norm_layer must be callable or None, got {type(kwargs['norm_layer']).__name__}")
    if "stem" in kwargs:
        check_stem(name, kwargs["stem"])
        if len(MODELS[name].stems) == 1:
            del kwargs["stem"]
    return MODELS[name].build(**kwargs)


def check_name(name: object) -> None:
    """Raise ValueError unless a network is called `name`; the message has the nearest names and all."""
    if not isinstance(name, str) or name not in MODELS:
        hint = did_you_mean(name, MODELS) if isinstance(name, str) else ""
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {shown(name)}{hint}")


def _check_keywords(name: str, kwargs: Mapping[str, Any]) -> None:
    keywords = MODELS[name].keywords
    if keywords is None:
        return
    known = tuple(dict.fromkeys([*keywords, "stem"]))
    for keyword in kwargs:
        if keyword not in known:
            hint = did_you_mean(keyword, known, at_most=1)
            raise TypeError(f"keywords of {name} must be among {', '.join(known)}, got {keyword!r}{hint}")


def check_stem(name: str, stem: object) -> None:
    """Raise ValueError unless the network called `name` has this stem."""
    stems = MODELS[name].stems
    check_choice("stem", stem, STEMS)
    if stem not in stems:
        raise ValueError(f"stem must be {' or '.join(stems)} for {name}, which has no other, got {stem!r}")
