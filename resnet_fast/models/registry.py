"""Every network by its name: what builds it, and what else there is to know of it.

list_models()                                     # ["resnet18", …]
get_model("resnet18", num_classes=10, stem="cifar")

A network is added by an entry of MODELS; the commands, training, profiles and checkpoints find it there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torchvision import models as torchvision_models

from ..checks import did_you_mean
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
    """

    build: Callable[..., nn.Module]
    family: str
    stems: tuple[str, ...]
    stem_width: int
    build_plain: Callable[..., nn.Module] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

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


def _of_torchvision(build: Callable[..., nn.Module]) -> Model:
    def build_plain(num_classes: int, stem: str) -> nn.Module:
        """torchvision's network, with the stem changed as its users change it."""
        model = getattr(torchvision_models, build.__name__)(num_classes=num_classes)
        if stem == "cifar":
            resnet.give_cifar_stem(model)
        return model

    return Model(build, "torchvision", STEMS, 64, build_plain)


def _of_cifar(build: Callable[..., nn.Module]) -> Model:
    return Model(build, "He et al.", ("cifar",), 16)


def _without_skips(build: Callable[..., nn.Module]) -> Model:
    reason = "a block without a skip connection would let nothing pass"
    return Model(build, "He et al., plain", ("cifar",), 16, refused={"zero_gamma": reason})


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
        ValueError: there is no such network, or it has no such stem; the message names those that there are.
    """
    check_name(name)
    if "stem" in kwargs:
        check_stem(name, kwargs["stem"])
        if len(MODELS[name].stems) == 1:
            del kwargs["stem"]
    return MODELS[name].build(**kwargs)


def check_name(name: object) -> None:
    """Raise ValueError unless a network is called `name`; the message has the nearest names and all."""
    if not isinstance(name, str) or name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}{did_you_mean(str(name), MODELS)}")


def check_stem(name: str, stem: object) -> None:
    """Raise ValueError unless the network called `name` has this stem."""
    stems = MODELS[name].stems
    if stem not in STEMS:
        raise ValueError(f"stem must be one of {', '.join(STEMS)}, got {stem!r}")
    if stem not in stems:
        raise ValueError(f"stem must be {' or '.join(stems)} for {name}, which has no other, got {stem!r}")
