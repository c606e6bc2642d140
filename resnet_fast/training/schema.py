"""The entries of config.json and of a checkpoint, with one rule for each, whichever of the two files it is in.

    check_entries(checkpoint, IN_CHECKPOINT)
    check_settings(checkpoint["config"])

Anybody who changes a checkpoint can sign it again, so a valid signature says nothing about its values. The message of
each ValueError is a reason that follows the name of the file.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from resnet_fast.common.checks import few, is_integer, is_number, is_text, one_line, shown
from resnet_fast.data.options import MAX_IMAGE_SIZE
from resnet_fast.training.config import SETTINGS, TrainConfig
from resnet_fast.training.metrics import EpochMetrics
from resnet_fast.training.recipes import RECIPES

# Settings added since format 2 began, with the values that keep the earlier behavior.
_NEW = """
    weights skip_unreadable mirror new_head freeze body_lr wandb trivial_augment random_erasing mixup cutmix
    muon_lr muon_momentum rescale_filters lookahead bn_momentum sizes
""".split()
ADDED = {name: getattr(RECIPES["baseline"], name, SETTINGS[name].default) for name in _NEW}
METRICS = {field.name for field in fields(EpochMetrics)}
ADDED_METRICS = {"skipped_steps"}  # EpochMetrics has defaults for these
LARGE = 1e300  # a larger number may overflow when it is added or shown


def _is_number(value: Any, least: float = -LARGE, most: float = LARGE) -> bool:
    return is_number(value) and least <= value <= most


def _is_count(value: Any, least: int = 0, most: int = 2**53) -> bool:
    return is_integer(value) and least <= value <= most


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _is_setting(value: Any) -> bool:
    """Return whether the value can be compared; TrainConfig checks the rest."""
    return _is_switch(value) or is_text(value) or _is_number(value)


def _are_channels(value: Any, least: float) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_number(one, least, 1) for one in value)


def _are_classes(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(is_text, value)) and len(set(value)) == len(value)


def _are_weights(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, Tensor) and isinstance(k, str) for k, v in value.items())


def _is_step(value: Any) -> bool:
    optimizer = value.get("optimizer") if isinstance(value, dict) else None
    return isinstance(optimizer, dict) and "state" in optimizer and _is_count(value.get("n_done"))


def _are_epochs(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, dict)
        and METRICS - ADDED_METRICS <= row.keys() <= METRICS
        and all(map(_is_number, row.values()))
        and row["epoch"] == i
        for i, row in enumerate(value, start=1)
    )


def _are_random_states(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_random_state, value))


def _is_random_state(value: Any) -> bool:
    """Return whether the state is valid. NumPy's is checked here, because NumPy reads wherever `position` points."""
    if not isinstance(value, dict) or not {"python", "numpy", "torch"} <= value.keys():
        return False
    numpy = value["numpy"]
    if not isinstance(numpy, tuple) or len(numpy) != 5 or not isinstance(numpy[1], Tensor):
        return False
    name, keys, position, has_gauss, gauss = numpy
    is_state = keys.shape == (624,) and keys.dtype == torch.int64 and keys.layout == torch.strided and not keys.is_meta
    return (
        is_state
        and isinstance(name, str)
        and name == "MT19937"
        and _is_count(position, 0, 624)
        and _is_count(has_gauss, 0, 1)
        and _is_number(gauss)
    )


Rule = tuple[Callable[[Any], bool], str]
_SWITCH: Rule = (_is_switch, "True or False")
_COUNT: Rule = (lambda value: _is_count(value, 1), "an integer of at least 1")
_IMAGE_SIZE: Rule = (lambda value: _is_count(value, 8, MAX_IMAGE_SIZE), f"an integer in 8 … {MAX_IMAGE_SIZE}")
SETTING_RULES: dict[str, Rule] = {
    **{
        name: _SWITCH if setting.kind is bool else (_is_setting, "a number, text, True or False")
        for name, setting in SETTINGS.items()
    },
    "device": (  # never auto: a run has resolved it
        lambda value: isinstance(value, str) and bool(re.fullmatch(r"cpu|cuda(:\d{1,3})?", value)),
        "cpu or cuda:N",
    ),
    "image_size": _IMAGE_SIZE,
    **dict.fromkeys(("weights", "mirror"), (lambda value: value is None or is_text(value), "None or text")),
}
RULES: dict[str, Rule] = {
    "classes": (_are_classes, "a list of different names"),
    "mean": (lambda value: _are_channels(value, 0), "3 numbers in 0 … 1"),
    "std": (lambda value: _are_channels(value, 1e-3), "3 numbers in 0.001 … 1"),
    "image_size": _IMAGE_SIZE,
    "train_images": _COUNT,
    "test_images": _COUNT,
    "epoch": _COUNT,
    "seconds": (lambda value: _is_number(value, 0), "a number of at least 0"),
    "history": (_are_epochs, "a list with a dict of numbers for each epoch"),
    "config": (lambda value: isinstance(value, dict), "a dict of settings"),
    "model": (_are_weights, "a dict of tensors"),
    "trained_model": (lambda value: value is None or _are_weights(value), "None or a dict of tensors"),
    "step": (_is_step, "the state of a TrainingStep"),
    "random": (_are_random_states, "a list of random states"),
}
IN_CONFIG_JSON = ("classes", "mean", "std", "train_images", "test_images")
TO_PREDICT = ("config", "classes", "mean", "std", "image_size", "epoch", "model")
IN_CHECKPOINT = (*TO_PREDICT, "trained_model", "step", "random", "seconds", "history")


def check_entries(entries: Any, names: Collection[str]) -> None:
    """Raise ValueError unless `entries` holds these names of RULES, each with a value that follows its rule."""
    _check(entries, names, RULES)
    if "config" in names:
        _check(entries["config"], SETTINGS, SETTING_RULES)
    if "history" in names and len(entries["history"]) != entries["epoch"]:
        raise ValueError(f"is of epoch {entries['epoch']} but holds the metrics of {len(entries['history'])} epochs")


def _check(entries: Any, names: Collection[str], rules: Mapping[str, Rule]) -> None:
    if not isinstance(entries, dict):
        raise ValueError(f"is not valid: it must hold a dict, got {shown(entries)}")
    if missing := [name for name in names if name not in entries]:
        raise ValueError(f"holds no {few(missing, 5)}: an earlier version of this program wrote it")
    for name in names:
        follows, rule = rules[name]
        if not follows(entries[name]):
            raise ValueError(f"is not valid: {name} must be {rule}, got {shown(entries[name])}")


def fill_in(settings: Any) -> Any:
    """Return the settings of a run, with values for those that an earlier version did not have."""
    return {**ADDED, **settings} if isinstance(settings, dict) else settings


def check_settings(settings: Any) -> None:
    """Raise ValueError unless these are the settings of a run; its device need not exist here."""
    _check(settings, SETTINGS, SETTING_RULES)
    elsewhere = {"device": "cpu", "graph": False, "sync_bn": False}
    try:
        TrainConfig(**{**{name: settings[name] for name in SETTINGS}, **elsewhere})
    except Exception as error:  # values from a file may raise any error
        raise ValueError(f"is not valid: {one_line(error)}") from error
