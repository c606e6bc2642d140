"""The error for a file that does not fit a model, with the known causes."""

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

Shape = tuple[int, ...]
N_SHOWN = 10
NEAR = 0.8  # of difflib: a name with another digit or word is near, one with another layer and kind is not


class CheckpointMismatch(ValueError):
    """A file does not fit a model; nothing was loaded.

    Args:
        path: path of the file.
        missing: names of the model that the file does not have.
        unexpected: names of the file that the model does not have.
        unlike: (name in the model, what the file has, what the model has) for each shape or type that differs.
        hints: known causes, each with a remedy.
    """

    def __init__(
        self,
        path: Path,
        missing: Sequence[str],
        unexpected: Sequence[str],
        unlike: Sequence[tuple[str, str, str]],
        hints: Sequence[str],
    ) -> None:
        self.path, self.hints = path, tuple(hints)
        self.missing, self.unexpected, self.unlike = tuple(missing), tuple(unexpected), tuple(unlike)
        lines = [f"{path} does not fit the model, and nothing was loaded"]
        lines += [f"  {hint}" for hint in hints]
        with_nearest = [_with_nearest(name, unexpected) for name in missing[:N_SHOWN]]
        lines += _listed("missing in the file", with_nearest, missing)
        # Without their nearest names: those pairs are listed above.
        lines += _listed("not in the model", unexpected[:N_SHOWN], unexpected)
        shown = [f"{name}: {file} in the file, {model} in the model" for name, file, model in unlike[:N_SHOWN]]
        lines += _listed("of another shape or type", shown, unlike)
        # Names may hold line breaks and codes for the terminal, which are shown as escapes.
        super().__init__("\n".join(line if line.isprintable() else repr(line)[1:-1] for line in lines))

    def __reduce__(self):
        """Rebuild from the arguments instead of the message, because a worker process pickles its exceptions."""
        return type(self), (self.path, self.missing, self.unexpected, self.unlike, self.hints)


def _listed(title: str, shown: Sequence[str], names: Sequence) -> list[str]:
    if not names:
        return []
    more = [f"    … and {len(names) - len(shown)} more"] if len(names) > len(shown) else []
    return [f"  {title} ({len(names)}):", *(f"    {line}" for line in shown), *more]


def _with_nearest(name: str, others: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, others, n=1, cutoff=NEAR)
    return f"{name} (in the file: {nearest[0]}?)" if nearest else name


def known_causes(file: Mapping[str, Shape], model: Mapping[str, Shape]) -> list[str]:
    """Return the known causes, in words, of the differences between two ResNets.

    Args:
        file, model: shapes by name, with torchvision's parts.
    """
    kinds = (_prefix_hints, _block_hints, _shortcut_hints, _stem_hints)
    hints = [hint for kind in kinds for hint in kind(file, model)]
    missing = set(model) - set(file)
    if missing and all(name.startswith("fc.") for name in missing):
        hints.append(
            "the file has no last layer: set model.fc = torch.nn.Identity(), load, and set model.fc to a new nn.Linear"
        )
    ours, theirs = model.get("fc.weight", ()), file.get("fc.weight", ())
    if len(ours) == len(theirs) == 2 and ours[0] != theirs[0]:
        hints.append(
            f"the file has {theirs[0]} classes, the model {ours[0]}: build the model with num_classes={theirs[0]}; to "
            f"train {ours[0]} classes, replace its last layer with nn.Linear({theirs[1]}, {ours[0]}) after loading"
        )
    return hints


def _prefix_hints(file: Mapping[str, Shape], model: Mapping[str, Shape]) -> list[str]:
    """Recognize a network that was saved as a part of another one."""
    first = next(iter(model), "")
    prefix = next((name.removesuffix(first) for name in file if name.endswith(f".{first}")), "")
    if not prefix or sum(prefix + name in file for name in model) <= len(model) / 2:
        return []
    others = sum(not name.startswith(prefix) for name in file)
    alone = f" ({others} others do not)" if others else ""
    return [
        f"names in the file begin with {prefix!r}{alone}, which is not a known wrapper of a whole network: save these "
        "weights again under the model's names"
    ]


def _block_hints(file: Mapping[str, Shape], model: Mapping[str, Shape]) -> list[str]:
    theirs, ours = _network(file), _network(model)
    if not theirs or not ours:
        return []
    if theirs != ours:
        return [f"the file holds a {theirs}, the model is a {ours}"]
    theirs, ours = (shapes.get("layer1.0.conv2.weight", ()) for shapes in (file, model))
    if "Bottleneck" not in _network(file) or theirs == ours or len(theirs) != 4 or theirs[1] == 0:
        return []
    # In the first stage, of 64 channels, the 3x3 convolution has groups · width_per_group filters, each of one group.
    return [
        "the file holds a ResNeXt or wide ResNet: build the model with "
        f"groups={theirs[0] // theirs[1]}, width_per_group={theirs[1]}"
    ]


def _network(shapes: Mapping[str, Shape]) -> str:
    """Return a ResNet's name; its depth counts the convolutions outside the shortcuts, and the last layer."""
    blocks = {match.groups() for name in shapes if (match := re.match(r"layer(\d+)\.(\d+)\.conv1\.weight$", name))}
    if not blocks:
        return ""
    per_stage = [count for _, count in sorted(Counter(stage for stage, _ in blocks).items())]
    bottleneck = any(re.match(r"layer\d+\.\d+\.conv3\.weight$", name) for name in shapes)
    depth = (3 if bottleneck else 2) * sum(per_stage) + 2
    return f"ResNet-{depth} ({'Bottleneck' if bottleneck else 'BasicBlock'}, {' + '.join(map(str, per_stage))} blocks)"


def _shortcut_hints(file: Mapping[str, Shape], model: Mapping[str, Shape]) -> list[str]:
    """Compare the shortcuts of two 6n+2 networks of He et al.: with weights (option B) or without (option A)."""
    if not _has_three_stages(file) or not _has_three_stages(model):
        return []
    theirs, ours = (any(re.match(r"layer\d\.0\.downsample\.", name) for name in shapes) for shapes in (file, model))
    if theirs and not ours:
        return [
            "the file's shortcuts have weights (option B), the model's have none: build the model with shortcut=\"B\""
        ]
    if ours and not theirs:
        return [
            "the file's shortcuts have no weights, the model's have (option B): build the model with shortcut=\"A\", "
            "or with shortcut=None if the file's network has no skip connections, which names do not show"
        ]
    return []


def _has_three_stages(shapes: Mapping[str, Shape]) -> bool:
    blocks = (re.match(r"layer(\d)\.\d+\.conv2\.weight$", name) for name in shapes)
    return {block[1] for block in blocks if block} == {*"123"}


def _stem_hints(file: Mapping[str, Shape], model: Mapping[str, Shape]) -> list[str]:
    theirs, ours = _rare_parts(file), _rare_parts(model)
    if theirs != ours:
        side, parts = ("file holds", theirs) if theirs else ("model is", ours)
        return [
            f"the {side} a ResNet with {' and '.join(parts)}, as timm's resnet18d or resnet50d: a network that "
            "torchvision and resnet_fast do not have"
        ]
    theirs, ours = file.get("conv1.weight", ()), model.get("conv1.weight", ())
    if len(theirs) != 4 or len(ours) != 4:
        return []
    hints = []
    for stem, size in (("cifar", 3), ("imagenet", 7)):
        if theirs[2:] == (size, size) != ours[2:]:
            # The 6n+2 networks have one stem.
            remedy = "" if _has_three_stages(model) else f': build the model with stem="{stem}"'
            hints.append(f"the file's first convolution is {size}x{size}, the model's {ours[2]}x{ours[3]}{remedy}")
    if theirs[1] != ours[1]:
        hints.append(f"the file is for images with {theirs[1]} channels, the model takes {ours[1]}")
    if theirs[0] != ours[0]:
        both = _has_three_stages(file) and _has_three_stages(model)
        wide = f"build the model with width={theirs[0]}" if both else "another width"
        hints.append(f"the file's first convolution has {theirs[0]} filters, the model's {ours[0]}: {wide}")
    return hints


def _rare_parts(shapes: Mapping[str, Shape]) -> list[str]:
    """Return the parts that only timm's variants have: a deep stem, or shortcuts that begin by pooling."""
    stem = [shapes.get(f"conv1.{i}.weight", ()) for i in (0, 3, 6)]
    is_deep = all(len(shape) == 4 for shape in stem) and all(a[0] == b[1] for a, b in itertools.pairwise(stem))
    is_pooled = len(shapes.get("layer2.0.downsample.1.weight", ())) == 4
    return ["a deep stem (conv1.0, conv1.3, conv1.6)"] * is_deep + ["pooled shortcuts"] * is_pooled
