"""Find the weights in a file's values: the file is the state dict, or holds it under a name among other entries."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..common.checks import shown

# As in timm, whose training writes both, the moving average comes first; `entry` of load_checkpoint selects the other.
ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net")
N_SHOWN = 8


@dataclass(frozen=True)
class Weights:
    """The contents of a file.

    Args:
        tensors: the weights by their names in the file.
        entry: the name that holds them, such as "state_dict" or "model.state_dict"; "" if the file is the state dict.
        ignored: the names of everything else in the file.
    """

    tensors: dict[str, Tensor]
    entry: str
    ignored: tuple[str, ...]


def find_weights(path: Path, content: Any, entry: str | None) -> Weights:
    """Return the weights in the values of a file.

    Raises:
        ValueError: there are no weights, or none under the name `entry`.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold weights by name, got a {type(content).__name__}")
    names: list[str] = []
    ignored: list[str] = []
    if entry is not None:
        if not _holds_weights(content.get(entry)):
            raise ValueError(f"{path} holds no weights under entry={entry!r}; {_offer(content)}")
        names, ignored, content = [entry], [str(name) for name in content if name != entry], content[entry]
    while name := next((name for name in ENTRIES if _holds_weights(content.get(name))), None):
        names.append(name)
        ignored += [str(other) for other in content if other != name]
        content = content[name]
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no weights; {_offer(content)}")
    return Weights(tensors, ".".join(names), (*ignored, *(str(name) for name in content if name not in tensors)))


def _holds_weights(value: Any, depth: int = 4) -> bool:
    """Return whether there are tensors within `depth` dicts; the limit is for dicts that contain themselves."""
    if not isinstance(value, Mapping) or depth == 0:
        return False
    has_tensors = any(isinstance(name, str) and isinstance(inner, Tensor) for name, inner in value.items())
    return has_tensors or any(_holds_weights(value.get(name), depth - 1) for name in ENTRIES)


def _offer(content: Mapping) -> str:
    """Return a phrase that names the entries of a file without weights."""
    offered = [shown(name) for name, value in content.items() if _holds_weights(value)]
    if offered:
        return f"there are some under entry={' or '.join(offered[:N_SHOWN])}"
    names = ", ".join(shown(name) for name in list(content)[:N_SHOWN])
    return f"its entries are {names}{', …' if len(content) > N_SHOWN else ''}" if content else "it is an empty dict"
