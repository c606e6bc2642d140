"""A table of choices as JSON text: what was measured, with what, and the strict reading of it.

    {"format": 1,
     "environment": {"gpu": …, "torch": …, "triton": …, "cudnn": …, "resnet_fast": …, "kernels": …},
     "entries": [{"problem": {…}, "choice": {"implementation": …, "tiles": null or {…}},
                  "measured": [{"implementation": …, "tiles": …, "milliseconds": …}, …]}, …]}

A file may hold anything, so every field is checked: names, types, ranges, and that there is no other.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from resnet_fast.kernels.conv_tiles import ConvTiles

from .arguments import Join
from .choices import CONVOLUTIONS, DEFAULTS, DTYPES, IMPLEMENTATIONS, Choice, Problem

FORMAT = 1
# Bounds that whatever is measured stays far within.
MAX_SIZE = 2**31 - 1
MAX_BLOCK, MAX_WARPS, MAX_STAGES = 256, 32, 8
MIN_BLOCK = 16  # of tl.dot
SHAPE = ("n_images", "in_channels", "out_channels", "width")


class Environment(NamedTuple):
    """With what was measured. `kernels` is a hash of the kernels' sources."""

    gpu: str
    torch: str
    triton: str
    cudnn: int | None
    resnet_fast: str
    kernels: str


class Measured(NamedTuple):
    """What was chosen for a problem, and the time of every candidate that is right, the default among them."""

    choice: Choice
    milliseconds: Mapping[Choice, float]


Entries = dict[Problem, Measured]


def write(environment: Environment, entries: Mapping[Problem, Measured]) -> str:
    """The text of a table, its entries in an order that does not depend on when they were measured."""
    found = [
        {
            "problem": problem._asdict(),
            "choice": _choice_as_json(measured.choice),
            "measured": [
                _choice_as_json(choice) | {"milliseconds": round(ms, 6)} for choice, ms in measured.milliseconds.items()
            ],
        }
        for problem, measured in sorted(entries.items())
    ]
    table = {"format": FORMAT, "environment": environment._asdict(), "entries": found}
    return json.dumps(table, indent=1) + "\n"


def read(text: str) -> tuple[Environment, Entries]:
    """The environment and the entries of a table.

    Raises:
        ValueError: it is not such a table; the message says what is wrong.
    """
    try:
        table = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from None
    _check_fields("the table", table, ("format", "environment", "entries"))
    if type(table["format"]) is not int or table["format"] != FORMAT:
        raise ValueError(f"format must be {FORMAT}, got {_shown(table['format'])}")
    environment = _read_environment(table["environment"])
    if not isinstance(table["entries"], list):
        raise ValueError(f"entries must be a list, got {_shown(table['entries'])}")
    entries: Entries = {}
    for number, entry in enumerate(table["entries"], 1):
        try:
            problem, measured = _read_entry(entry)
            if problem in entries:
                raise ValueError("its problem is that of an entry before it")
        except ValueError as error:
            raise ValueError(f"entry {number}: {error}") from None
        entries[problem] = measured
    return environment, entries


def _choice_as_json(choice: Choice) -> dict[str, Any]:
    return {"implementation": choice.implementation, "tiles": choice.tiles and choice.tiles._asdict()}


def _read_environment(value: Any) -> Environment:
    _check_fields("environment", value, Environment._fields)
    for name in Environment._fields:
        is_right = isinstance(value[name], str)
        if name == "cudnn":
            is_right = value[name] is None or type(value[name]) is int
        if not is_right:
            raise ValueError(f"environment.{name} must be {'an integer' if name == 'cudnn' else 'text'}")
    return Environment(**value)


def _read_entry(entry: Any) -> tuple[Problem, Measured]:
    _check_fields("an entry", entry, ("problem", "choice", "measured"))
    problem = _read_problem(entry["problem"])
    _check_fields("choice", entry["choice"], Choice._fields)
    choice = _read_choice(problem, entry["choice"])
    if not isinstance(entry["measured"], list):
        raise ValueError(f"measured must be a list, got {_shown(entry['measured'])}")
    milliseconds: dict[Choice, float] = {}
    for value in entry["measured"]:
        _check_fields("measured", value, (*Choice._fields, "milliseconds"))
        ms = value["milliseconds"]
        if type(ms) not in (int, float) or not 0 < ms < math.inf:
            raise ValueError(f"milliseconds must be a positive number, got {_shown(ms)}")
        milliseconds[_read_choice(problem, value)] = float(ms)
    for needed in (DEFAULTS[problem.operation], choice):
        if needed not in milliseconds:
            raise ValueError(f"the choice and the default must have been measured, {needed.implementation} was not")
    return problem, Measured(choice, milliseconds)


def _read_problem(value: Any) -> Problem:
    _check_fields("problem", value, Problem._fields)
    _check_name("operation", value["operation"], IMPLEMENTATIONS)
    _check_name("dtype", value["dtype"], DTYPES.values())
    _check_name("join", value["join"], get_args(Join))
    for name in SHAPE:
        _check_integer(name, value[name], 1, MAX_SIZE)
    _check_flag("fork", value["fork"])
    return Problem(**value)


def _read_choice(problem: Problem, value: dict[str, Any]) -> Choice:
    implementation, tiles = value["implementation"], value["tiles"]
    _check_name(f"implementation of {problem.operation}", implementation, IMPLEMENTATIONS[problem.operation])
    if implementation != CONVOLUTIONS[1]:
        if tiles is not None:
            raise ValueError(f"tiles are those of the fused convolution, {implementation} has none")
        return Choice(implementation)
    _check_fields("tiles", tiles, ConvTiles._fields)
    for name in ("block_m", "block_n", "block_k"):
        _check_power_of_two(name, tiles[name], MIN_BLOCK, MAX_BLOCK)
    _check_integer("per_program", tiles["per_program"], 1, MAX_SIZE)
    _check_flag("channels_as_rows", tiles["channels_as_rows"])
    _check_power_of_two("num_warps", tiles["num_warps"], 1, MAX_WARPS)
    _check_integer("num_stages", tiles["num_stages"], 1, MAX_STAGES)
    return Choice(implementation, ConvTiles(**tiles))


def _check_fields(name: str, value: Any, fields: tuple[str, ...]) -> None:
    if not isinstance(value, dict) or set(value) != set(fields):
        got = f"the fields {_shown(', '.join(value))}" if isinstance(value, dict) else _shown(value)
        raise ValueError(f"{name} must have the fields {', '.join(fields)}, got {got}")


def _check_name(name: str, value: Any, known: Any) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {'; '.join(known)}, got {_shown(value)}")


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {_shown(value)}")


def _check_integer(name: str, value: Any, at_least: int, at_most: int) -> None:
    if type(value) is not int or not at_least <= value <= at_most:
        raise ValueError(f"{name} must be an integer from {at_least} to {at_most}, got {_shown(value)}")


def _check_power_of_two(name: str, value: Any, at_least: int, at_most: int) -> None:
    _check_integer(name, value, at_least, at_most)
    if value & (value - 1):
        raise ValueError(f"{name} must be a power of two, got {value}")


def _shown(value: Any) -> str:
    """A value as an error shows it: a part of it, whatever it holds."""
    text = ascii(value) if not isinstance(value, list | dict) else f"a {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}..."
