"""Describe a setting of a run once, at its field:

    lr: Annotated[float, POSITIVE, "Peak learning rate."] = FROM_RECIPE

Between the type and the help stand the rule and, for some, MAY_MOVE; switches and paths get their rule from the type.
The checks of TrainConfig and config.json, the options of `resnet-fast train`, and docs/options.md are built from this.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

from resnet_fast.common.checks import (
    URL_RULE,
    check_choice,
    check_integer,
    check_path,
    check_url,
    is_number,
    is_text,
    shown,
)
from resnet_fast.data.options import is_alpha, is_probability

MAY_MOVE = "says where a run computes or writes, not what it computes: a resumed run may change it"


class Rule(NamedTuple):
    """A rule for a value: its text, and a function of name and value that checks it.

    The function returns a plain value, because a checkpoint with NumPy strings or numbers could not be loaded again. It
    raises ValueError with the name, the rule and the value. `names` are the possible values, if they are a list.
    """

    text: str
    check: Callable[[str, Any], Any]
    names: Collection[str] = ()


def integer(at_least: int, below: int = 2**32) -> Rule:
    text = f"an integer, {at_least} … {below - 1:,}"
    return Rule(text, lambda name, value: check_integer(name, value, at_least, below))


def number(text: str, follows: Callable[[float], bool]) -> Rule:
    def check(name: str, value: Any) -> float:
        if not (is_number(value) and follows(value)):
            raise ValueError(f"{name} must be {text}, got {shown(value)}")
        return float(value)

    return Rule(text, check)


def one_of(names: Collection[str], check: Callable[[str, Any, Collection[str]], None] = check_choice) -> Rule:
    return Rule(", ".join(names), lambda name, value: check(name, value, names) or str.__str__(value), names)


def _check_switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")
    return value


def _check_stages(name: str, value: Any) -> str:
    if not is_text(value):
        raise ValueError(f"{name} must be stage names with commas between them, got {shown(value)}")
    return ",".join(dict.fromkeys(filter(None, (stage.strip() for stage in value.split(",")))))


def sizes_in(text: str) -> list[int]:
    """Return the sizes in "16,24,32"."""
    return [int(size) for size in text.split(",")]


def _check_sizes(name: str, value: Any) -> str:
    rule = "text: two or more ascending integers of at least 8 with commas between them, or empty"
    text = value.replace(" ", "") if isinstance(value, str) else "-"
    if text == "":
        return ""
    sizes = sizes_in(text) if re.fullmatch("[1-9][0-9]{0,3}(,[1-9][0-9]{0,3})*", text) else []
    if len(sizes) < 2 or sizes[0] < 8 or any(a >= b for a, b in zip(sizes, sizes[1:], strict=False)):
        raise ValueError(f"{name} must be {rule}, got {shown(value)}")
    return ",".join(map(str, sizes))


def _check_device(name: str, value: Any) -> str:
    text = value if isinstance(value, str) else str(value) if type(value).__module__ == "torch" else ""
    if not re.fullmatch("auto|cpu|cuda(:(0|[1-9][0-9]{0,2}))?", text):
        raise ValueError(f"{name} must be auto, cpu, cuda or cuda:N, got {shown(value)}")
    return str.__str__(text)


POSITIVE = number("a positive finite number", lambda value: value > 0)
NOT_NEGATIVE = number("a finite number, 0 or more", lambda value: value >= 0)
FRACTION = number("in [0, 1)", lambda value: 0 <= value < 1)
SHARE = number("in (0, 1]", lambda value: 0 < value <= 1)
SIZES = Rule("ascending integers, 8 or more", _check_sizes)
URL = Rule(URL_RULE, check_url)
PROBABILITY = number("in [0, 1]", is_probability)
ALPHA = number("0 or in [0.01, 100]", is_alpha)
STAGES = Rule("names with commas between them", _check_stages)
DEVICE = Rule("auto, cpu, cuda, cuda:N", _check_device)
BY_TYPE = {bool: Rule("on or off", _check_switch), Path: Rule("a path", check_path)}


@dataclass(frozen=True)
class Setting:
    """A field and its description; `kind` is its type without None, `may_be_none` says whether None is allowed."""

    name: str
    kind: type
    rule: Rule
    help: str
    default: Any
    may_be_none: bool
    may_move: bool

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    def check(self, value: Any) -> Any:
        """Return a plain value that follows the rule; raise ValueError for any other."""
        return None if value is None and self.may_be_none else self.rule.check(self.name, value)


@cache
def settings_of(cls: type) -> dict[str, Setting]:
    """Return the settings of a dataclass, by name; its fields are annotated as above."""
    settings, hints = {}, get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        annotated, *notes, text = get_args(hints[field.name])
        kinds = get_args(annotated) or (annotated,)
        (kind,) = (kind for kind in kinds if kind is not NoneType)
        rule = next((note for note in notes if isinstance(note, Rule)), None) or BY_TYPE[kind]
        settings[field.name] = Setting(
            field.name, kind, rule, text, field.default, NoneType in kinds, may_move=MAY_MOVE in notes
        )
    return settings
