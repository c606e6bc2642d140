"""A table of choices as JSON text: what was measured, with what, and the strict reading of it.

    {"format": 1,
     "environment": {"gpu": …, "torch": …, "triton": …, "cudnn": …, "resnet_fast": …, "kernels": …},
     "entries": [{"problem": {…}, "choice": {"implementation": …, "tiles": null or {…}},
                  "measured": [{"implementation": …, "tiles": …, "milliseconds": …}, …]}, …]}

A file may hold anything, so every field is checked: names, types, ranges, and that there is no other.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from resnet_fast.kernels.conv_tiles import ConvTiles

from .arguments import Join
from .implementations import CONV3X3, DEFAULTS, DTYPES, IMPLEMENTATIONS, Choice, Problem, tiles_of

FORMAT = 1
MAX_MILLISECONDS = 1e9
MAX_SIZE = 2**31 - 1  # which all that is measured stays far below
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
    entries_as_json = [
        {
            "problem": problem._asdict(),
            "choice": _choice_as_json(measured.choice),
            "measured": [
                _choice_as_json(choice) | {"milliseconds": round(ms, 6)} for choice, ms in measured.milliseconds.items()
            ],
        }
        for problem, measured in sorted(entries.items())
    ]
    table = {"format": FORMAT, "environment": environment._asdict(), "entries": entries_as_json}
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
        if type(ms) not in (int, float) or not 0 < ms <= MAX_MILLISECONDS:
            raise ValueError(f"milliseconds must be positive and at most {MAX_MILLISECONDS:g}, got {_shown(ms)}")
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
        if type(value[name]) is not int or not 1 <= value[name] <= MAX_SIZE:
            raise ValueError(f"{name} must be an integer from 1 to {MAX_SIZE}, got {_shown(value[name])}")
    if not isinstance(value["fork"], bool):
        raise ValueError(f"fork must be true or false, got {_shown(value['fork'])}")
    return Problem(**value)


def _read_choice(problem: Problem, value: dict[str, Any]) -> Choice:
    implementation, tiles = value["implementation"], value["tiles"]
    _check_name(f"implementation of {problem.operation}", implementation, IMPLEMENTATIONS[problem.operation])
    if implementation != CONV3X3:
        if tiles is not None:
            raise ValueError(f"tiles are those of conv3x3, {implementation} has none")
        return Choice(implementation)
    _check_fields("tiles", tiles, ConvTiles._fields)
    for candidate in tiles_of(problem):
        if tiles == candidate._asdict():
            return Choice(implementation, candidate)
    raise ValueError(
        f"tiles must be among those of kernels/conv_tiles.py for the problem, got {_shown(str(list(tiles.values())))}"
    )


def _check_fields(name: str, value: Any, fields: tuple[str, ...]) -> None:
    if not isinstance(value, dict) or set(value) != set(fields):
        got = f"the fields {_shown(', '.join(value))}" if isinstance(value, dict) else _shown(value)
        raise ValueError(f"{name} must have the fields {', '.join(fields)}, got {got}")


def _check_name(name: str, value: Any, allowed: Any) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {'; '.join(allowed)}, got {_shown(value)}")


def _shown(value: Any) -> str:
    """A value as an error shows it: a part of it, whatever it holds."""
    text = ascii(value) if not isinstance(value, list | dict) else f"a {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}..."
