"""The options of `resnet-fast train`: one for each field of TrainConfig, built from its annotation."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from resnet_fast.cli.app import choice_metavar
from resnet_fast.training.config import SETTINGS
from resnet_fast.training.options import Setting
from resnet_fast.training.recipes import RECIPE_FIELDS, RECIPES

GROUPS = {
    "Network": ("model", "stem", "backend", "weights", "new_head", "freeze"),
    "Data": (
        "dataset data_dir mirror image_size images skip_unreadable holdout workers crop padding flip cutout "
        "trivial_augment random_erasing mixup cutmix normalize"
    ).split(),
    "Recipe": ("recipe", *RECIPE_FIELDS),
}
GROUP_OF = {name: group for group, names in reversed(GROUPS.items()) for name in names}  # a name's first group
METAVARS = {
    "model": "NAME",  # its choices are too many for the left column
    "weights": "RUN|FILE",
    "mirror": "URL",
    "freeze": "STAGES",
    "sizes": "SIZES",
    "time_budget": "TIME",
}
NAMES = (*(name for name in SETTINGS if name not in RECIPE_FIELDS), *RECIPE_FIELDS)  # recipe before its fields


def parse_seconds(text: str) -> float:
    """Return the seconds in a time such as "90", "90s", "15m" or "2h".

    Raises:
        ValueError: the text is not a time, or not above 0.
    """
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"time_budget must be a time such as 90, 15m or 2h, got {text!r}")
    return seconds


def _by_recipe(name: str) -> str:
    """Return the value in each recipe, "[fast94: 26, fast95: 80, …]", or the default if all recipes agree."""
    values = {recipe: getattr(settings, name) for recipe, settings in RECIPES.items()}
    if len(set(values.values())) == 1:
        return f"[default: {_shown(next(iter(values.values())))}]"
    return f"[{', '.join(f'{recipe}: {_shown(value)}' for recipe, value in values.items())}]"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def help_text(setting: Setting) -> str:
    """Return the help of a setting, followed by its default."""
    if "[default" in setting.help:
        return setting.help
    if setting.name in RECIPE_FIELDS:
        return f"{setting.help} {_by_recipe(setting.name)}"
    if setting.default in (None, ""):
        return setting.help
    return f"{setting.help} [default: {_shown(setting.default)}]"


def option(name: str, text: str | None = None) -> Any:
    """Return the typer option for a setting; `text` replaces its help."""
    setting = SETTINGS[name]
    metavar = METAVARS.get(name) or choice_metavar(setting.rule.names) or None
    flag = f"{setting.flag}/--no-{setting.flag[2:]}" if setting.kind is bool else setting.flag
    return typer.Option(flag, help=help_text(setting) if text is None else text, metavar=metavar, show_default=False)


def in_group(name: str) -> Any:
    """Return the option in its group of the help of `resnet-fast train`."""
    grouped = option(name)
    grouped.rich_help_panel = GROUP_OF.get(name, "Run")
    return grouped


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every setting, passed to its `**settings`; None if it was not given."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    for name in NAMES:
        kind: Any = str if name == "time_budget" else SETTINGS[name].kind
        hint = Annotated[kind | None, in_group(name)]
        own.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint))
    command.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in own}
    return command
