"""`resnet-fast convert`."""

import ast
import copy
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resnet_fast.cli.app import command, stop
from resnet_fast.common.checks import did_you_mean

if TYPE_CHECKING:
    from torch import nn

# Raised by foreign code. sys.exit() in a module would end this command without a message.
ANYTHING = (Exception, SystemExit)


@command("Show what `convert` fuses in a model, and check its results.", "convert torchvision.models:resnet50")
def convert(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            help="Function that returns a model: torchvision.models:resnet50, timm:create_model, nets/my.py:ResNet18.",
            show_default=False,
        ),
    ],
    arg: Annotated[
        list[str] | None,
        typer.Option(
            help="Argument of the function, such as resnet26d or num_classes=10; may be given several times.",
            show_default=False,
        ),
    ] = None,
    image_size: Annotated[
        int, typer.Option(min=1, help="Height and width of the images in the check, in pixels.")
    ] = 32,
    batch_size: Annotated[int, typer.Option(min=2, help="Number of images in the check.")] = 4,
) -> None:
    """Show which batch norms of a model resnet_fast.convert fuses, and check that the results stay the same.

    This imports MODULE and calls FUNCTION, so name only code that you trust.
    """
    before = list(sys.path)
    try:
        _show(model, arg or [], (batch_size, 3, image_size, image_size))
    finally:
        sys.path[:] = before  # for tests, which run the command in their own process


def _show(model: str, arguments: list[str], shape: tuple[int, ...]) -> None:
    try:
        made = _make(model, arguments)
    except ValueError as error:
        stop(2, f"error: {error}")

    from resnet_fast.conversion import convert as convert_model
    from resnet_fast.conversion.check import MAX_DIFFERENCE, difference

    try:
        converted, report = convert_model(copy.deepcopy(made), report=True)
    except ANYTHING as error:
        stop(2, f"error: {model} cannot be converted: {_reason(error)}")
    print(report)
    for mode in ("training", "evaluation"):
        try:
            apart = difference(made, converted, shape, mode == "training")
        except ANYTHING as error:
            stop(1, f"error: {model} cannot be tried on images of {list(shape)} (--image-size): {_reason(error)}")
        print(f"{mode}: outputs, gradients, statistics differ by {apart:.1e} of their size, fp64")
        if not apart <= MAX_DIFFERENCE:
            stop(1, f"error: they must differ by at most {MAX_DIFFERENCE:g}; please report this model")


def _make(target: str, arguments: list[str]) -> "nn.Module":
    """Return the model that MODULE:FUNCTION makes.

    Raises:
        ValueError: the module or function does not exist or fails, or does not return an nn.Module.
    """
    module_name, _, name = target.rpartition(":")
    if not module_name or not name:
        raise ValueError(f"the model must be MODULE:FUNCTION, such as torchvision.models:resnet50, got {target!r}")
    module = _import(module_name)
    if not hasattr(module, name):
        raise ValueError(f"{module_name} has no {name!r}{did_you_mean(name, dir(module))}")
    positional, keywords = _parse(arguments)
    try:
        made = getattr(module, name)(*positional, **keywords)
    except ANYTHING as error:
        raise ValueError(f"{target} fails: {_reason(error)}") from error
    from torch import nn

    if not isinstance(made, nn.Module):
        raise ValueError(f"{target} must return an nn.Module, got {type(made).__name__}")
    return made


def _import(name: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())
    path = Path(os.path.expanduser(name))
    if path.suffix == ".py" and not os.path.isfile(path):
        raise ValueError(f"{path} is not a file")
    try:
        return _run(path) if path.suffix == ".py" else importlib.import_module(name)
    except ANYTHING as error:
        raise ValueError(f"{name} cannot be imported: {_reason(error)}") from error


def _run(path: Path) -> ModuleType:
    sys.path.insert(0, str(path.parent))  # the modules next to it
    name = f"_resnet_fast_convert_{path.stem}"  # distinct from any other module: a file may be called torch.py
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _reason(error: BaseException) -> str:
    """Return an error's type and message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")


def _parse(arguments: list[str]) -> tuple[list[Any], dict[str, Any]]:
    positional, keywords = [], {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and name.isidentifier():
            keywords[name] = _value(value)
        else:
            positional.append(_value(argument))
    return positional, keywords


def _value(text: str) -> Any:
    """Return the Python literal in the text (a number, list, None …), or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
