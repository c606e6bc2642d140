"""load_checkpoint: read a file, match its names and shapes with the model's, and only then copy."""

import os
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common.checks import few
from .entries import N_SHOWN, find_weights
from .mismatch import CheckpointMismatch, known_causes
from .names import forms, is_counter, match
from .reading import read_file


@dataclass(frozen=True)
class Loaded:
    """The result of `load_checkpoint`; str() gives a readable summary.

    Args:
        path: path of the file.
        n_tensors: number of parameters and buffers that were loaded.
        entry: name in the file that held the weights, such as "state_dict"; "" if the file is the state dict.
        stripped: prefixes that only the names in the file have, such as "module.".
        added: prefixes that only the model's names have.
        translated: pairs (part in the file, part in the model), such as ("shortcut", "downsample").
        cast: pairs (type in the file, type in the model) that differ.
        kept: names of the model that the file lacks and whose values are kept: counters such as `num_batches_tracked`,
            which evaluation does not use, and further names of tensors that were loaded.
        ignored: names of everything else in the file.
        not_finite: names of the model whose values hold an infinity or NaN, in the file or after the cast.
    """

    path: Path
    n_tensors: int
    entry: str = ""
    stripped: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    translated: tuple[tuple[str, str], ...] = ()
    cast: tuple[tuple[torch.dtype, torch.dtype], ...] = ()
    kept: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.path}: {self.n_tensors} tensor{'s' if self.n_tensors != 1 else ''} loaded"]
        parts += [f"from its entry {self.entry!r}"] if self.entry else []
        parts += [f"without the prefixes {', '.join(self.stripped)}"] if self.stripped else []
        parts += [f"with the prefixes {', '.join(self.added)}"] if self.added else []
        parts += [few([f"{old} read as {new}" for old, new in self.translated], N_SHOWN)] if self.translated else []
        parts += [f"{str(old)[6:]} cast to {str(new)[6:]}" for old, new in self.cast]
        parts += [f"not in the file and kept: {_shortened(self.kept)}"] if self.kept else []
        parts += [f"ignored in the file: {_shortened(self.ignored)}"] if self.ignored else []
        parts += [f"NOT FINITE: {_shortened(self.not_finite)}"] if self.not_finite else []
        return "; ".join(parts)


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, entry: str | None = None) -> Loaded:
    """Load weights that were trained elsewhere into a model, in place.

    Files of torch.save and safetensors are read without running code. Supported are state dicts of torchvision, timm's
    plain ResNets, kuangliu/pytorch-cifar, akamaster/pytorch_resnet_cifar10 and Lightning, and checkpoints of
    `resnet-fast train`. Names in the file are matched with the model's: either side may have the prefixes of
    DataParallel, torch.compile and Lightning, or say shortcut and linear for downsample and fc. All names and shapes
    are compared before anything is copied. Values are cast to the model's types, to integers only if that is exact. The
    model keeps its device and memory format.

    Args:
        model: any ResNet, ours or not, also wrapped or compiled.
        path: path of the file.
        entry: name in the file that holds the weights. None: the file is the state dict, or holds it as "state_dict",
            "model_state_dict", "model" or "net". As in timm, the moving average ("state_dict_ema" or "model_ema") takes
            precedence.

    Returns:
        A `Loaded`, whose str() says what was done.

    Raises:
        CheckpointMismatch (a ValueError): names or shapes differ, or types that no cast can reconcile. Nothing was
            loaded.
        ValueError: the file is a folder, empty, damaged, would run code, or holds no weights; or the model has
            parameters on the meta device.
        FileNotFoundError, OSError: the file does not exist, or cannot be read.
        ModuleNotFoundError: the file needs safetensors, which is not installed.
        TypeError: `model` is not a module, `path` is not a path, or `entry` is not a string.

    Values that are not finite are loaded, with a warning.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes):
        raise TypeError(f"path must be a str or os.PathLike[str], got {type(path).__name__}")
    if not isinstance(entry, str | None):
        raise TypeError(f"entry must be a str or None, got {type(entry).__name__}")
    path = Path(os.path.expanduser(path))
    state = model.state_dict()
    own = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    on_meta = next((name for name, value in own.items() if value.is_meta), None)
    if on_meta is not None:
        raise ValueError(f"model must not be on the meta device, got {on_meta} there: call model.to_empty(device=…)")

    weights = find_weights(path, read_file(path), entry)
    matching = match(own, weights.tensors)
    sources = {name: weights.tensors[in_file] for name, in_file in matching.pairs.items()}
    aliases = _aliases(own)
    missing = [name for name in matching.missing if not any(other in sources for other in aliases[name])]
    unlike = [row for name, value in sources.items() if (row := _unlike(name, value, own[name]))]
    if missing or matching.unexpected or unlike:
        hints = known_causes(_shapes(weights.tensors), _shapes(own))
        raise CheckpointMismatch(path, missing, matching.unexpected, unlike, hints)
    values = {name: value.reshape(own[name].shape).to(own[name].dtype) for name, value in sources.items()}
    _check_aliases(path, values, aliases)
    # Update the model's own state dict, whose metadata give the current version of each module.
    state.update(values)
    model.load_state_dict(state)

    stripped, added, translated = matching.differences()
    used = set(matching.pairs.values())
    casts = [(sources[name].dtype, own[name].dtype) for name in sources]
    loaded = Loaded(
        path=path,
        n_tensors=len(sources),
        entry=weights.entry,
        stripped=tuple(f"{part}." for part in stripped),
        added=tuple(f"{part}." for part in added),
        translated=translated,
        cast=tuple(dict.fromkeys((old, new) for old, new in casts if old != new)),
        kept=tuple(name for name in own if name not in sources),
        ignored=(*weights.ignored, *(name for name in weights.tensors if name not in used)),
        not_finite=tuple(name for name, value in values.items() if not bool(value.isfinite().all())),
    )
    if loaded.not_finite:
        warnings.warn(f"{path} holds values that are not finite: {_shortened(loaded.not_finite)}", stacklevel=2)
    return loaded


def _unlike(name: str, value: Tensor, own: Tensor) -> tuple[str, str, str] | None:
    """Return the name, what the file has, and what the model has, if no cast can reconcile them; else None."""
    if value.layout != own.layout or value.is_meta:
        return name, "no values" if value.is_meta else str(value.layout), str(own.layout)
    if value.is_complex() != own.is_complex() or (own.is_floating_point() and not value.is_floating_point()):
        return name, str(value.dtype), str(own.dtype)  # such as quantized weights, meaningless without their scale
    # PyTorch before 0.4 had vectors of one element in place of scalars; load_state_dict accepts them, too.
    if value.shape != own.shape and not (own.ndim == 0 and value.shape == (1,)):
        return name, str(list(value.shape)), str(list(own.shape))
    # Floating-point values may lose digits, but rounded or wrapped integers would go unnoticed.
    if not own.is_floating_point() and not own.is_complex() and not _casts_exactly(value, own.dtype):
        return name, f"{value.dtype} with values that {own.dtype} does not have", str(own.dtype)
    return None


def _casts_exactly(value: Tensor, dtype: torch.dtype) -> bool:
    return value.dtype == dtype or torch.equal(value.to(dtype).to(value.dtype), value)


def _aliases(own: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return, for each name of the model, all names of the same tensor."""
    groups: dict[object, list[str]] = {}
    for name, value in own.items():
        key = (value.data_ptr(), value.shape, value.stride(), value.device) if value.numel() else name
        groups.setdefault(key, []).append(name)
    return {name: names for names in groups.values() for name in names}


def _check_aliases(path: Path, values: Mapping[str, Tensor], aliases: Mapping[str, list[str]]) -> None:
    for name, value in values.items():
        for other in aliases[name]:
            if other == name or other not in values:
                continue
            if not torch.allclose(values[other], value, rtol=0, atol=0, equal_nan=True):
                raise ValueError(f"{path} has different values for {other} and {name}, one tensor in the model")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes by names with torchvision's parts, without counters."""
    return {form: tuple(tensors[name].shape) for form, name in forms(tensors).items() if not is_counter(name)}


def _shortened(names: tuple[str, ...]) -> str:
    """Return the first names; the counters of batch norms, of which a ResNet-152 has 155, become one."""
    kinds = Counter(name.rpartition(".")[2] if "num_batches_tracked" in name else name for name in names)
    shown = [name if count == 1 else f"{count} {name}" for name, count in kinds.items()]
    return few(shown, N_SHOWN)
