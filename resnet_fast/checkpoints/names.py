"""Match the names in a file with the model's names by removing wrappers and translating synonyms.

Both sides are brought to one form, so that every rule works in both directions: a wrapped model accepts a plain file,
and a plain model a wrapped one. A rule is applied only if the names of each side stay distinct. The result uses the
fewest rules under which the two sides agree.
"""

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

WRAPPERS = ("module", "_orig_mod")  # DataParallel, DistributedDataParallel and AveragedModel; torch.compile
ROOTS = ("model", "net")  # a LightningModule's attribute
BLOCK = r"(?:(?<=\.\d\.)|(?<=\.\d\d\.)|(?<=\.\d\d\d\.))"  # after a block's number in its stage
# If conv1 is a Sequential of convolution, batch norm and ReLU.
STEM = ((r"^conv1\.0(?=\.)", "conv1"), (r"^conv1\.1(?=\.)", "bn1"))
# Other spellings (patterns) and torchvision's. Each of these networks computes the same as torchvision's network of the
# same shapes, which names and shapes alone would not prove.
SPELLINGS = (
    # kuangliu/pytorch-cifar, akamaster/pytorch_resnet_cifar10
    (rf"{BLOCK}shortcut(?=\.\d)", "downsample"),
    (r"^linear(?=\.)", "fc"),
    # weiaicunzai/pytorch-cifar100; `left` in the ResNet-18 of many tutorials
    *((rf"^conv{stage + 1}_x(?=\.)", f"layer{stage}") for stage in (1, 2, 3, 4)),
    *((rf"{BLOCK}(?:residual_function|left)\.{3 * i}(?=\.)", f"conv{i + 1}") for i in (0, 1, 2)),
    *((rf"{BLOCK}(?:residual_function|left)\.{3 * i + 1}(?=\.)", f"bn{i + 1}") for i in (0, 1, 2)),
    # transformers, ResNetForImageClassification
    (r"^resnet\.embedder\.embedder\.convolution(?=\.)", "conv1"),
    (r"^resnet\.embedder\.embedder\.normalization(?=\.)", "bn1"),
    *((rf"^resnet\.encoder\.stages\.{stage - 1}\.layers(?=\.)", f"layer{stage}") for stage in (1, 2, 3, 4)),
    *((rf"{BLOCK}layer\.{i}\.convolution(?=\.)", f"conv{i + 1}") for i in (0, 1, 2)),
    *((rf"{BLOCK}layer\.{i}\.normalization(?=\.)", f"bn{i + 1}") for i in (0, 1, 2)),
    (rf"{BLOCK}shortcut\.convolution(?=\.)", "downsample.0"),
    (rf"{BLOCK}shortcut\.normalization(?=\.)", "downsample.1"),
    (r"^classifier\.1(?=\.)", "fc"),
)
COUNTERS = ("num_batches_tracked", "n_averaged")  # of nn.BatchNorm2d (PyTorch before 0.4.1 had none); of AveragedModel


@dataclass(frozen=True)
class Matching:
    """The names of a file matched with those of a model.

    Args:
        pairs: the file's name by the model's, in the model's order.
        missing: names of the model, counters aside, that the file does not have.
        unexpected: names of the file, counters aside, that the model does not have.
    """

    pairs: dict[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.missing and not self.unexpected

    def differences(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[str, str], ...]]:
        """Return the prefixes that only the file has, those that only the model has, and the translated parts."""
        stripped, added, translated = {}, {}, {}  # dicts for their order
        for model_name, file_name in self.pairs.items():
            in_model, in_file = Counter(model_name.split(".")), Counter(file_name.split("."))
            stripped |= dict.fromkeys(part for part in in_file - in_model if part in WRAPPERS + ROOTS)
            added |= dict.fromkeys(part for part in in_model - in_file if part in WRAPPERS + ROOTS)
            theirs, ours = _translations(file_name), _translations(model_name)
            translated |= dict.fromkeys((part, theirs[part]) for part in theirs if part not in ours)
            translated |= dict.fromkeys((ours[part], part) for part in ours if part not in theirs)
        return tuple(stripped), tuple(added), tuple(translated)


def match(in_model: Iterable[str], in_file: Iterable[str]) -> Matching:
    """Return the matching with the fewest rules under which all names agree, else the one with the fewest left over."""
    in_model, in_file = list(in_model), list(in_file)
    best = None
    for n_rules in range(len(RULES) + 1):
        for rules in itertools.combinations(RULES, n_rules):
            ours, theirs = _apply(rules, in_model), _apply(rules, in_file)
            if ours is None or theirs is None:
                continue
            matching = _compare(ours, theirs)
            if matching.fits:
                return matching
            if best is None or len(matching.missing + matching.unexpected) < len(best.missing + best.unexpected):
                best = matching
    assert best is not None  # the empty set of rules always applies
    return best


def forms(names: Collection[str]) -> dict[str, str]:
    """Return each name by its form with torchvision's parts, or by itself if two names would get the same form."""
    return _apply(RULES, names) or {name: name for name in names}


def is_counter(name: str) -> bool:
    return name.rpartition(".")[2] in COUNTERS


def _compare(ours: Mapping[str, str], theirs: Mapping[str, str]) -> Matching:
    """Return the matching of two sides, each given as names by their common form."""
    return Matching(
        pairs={name: theirs[form] for form, name in ours.items() if form in theirs},
        missing=tuple(name for form, name in ours.items() if form not in theirs and not is_counter(name)),
        unexpected=tuple(name for form, name in theirs.items() if form not in ours and not is_counter(name)),
    )


def _apply(rules: Iterable, names: Collection[str]) -> dict[str, str] | None:
    """Return each name by its form, or None if two names would get the same form."""
    formed = list(names)
    for rule in rules:
        formed = rule(formed)
    return dict(zip(formed, names, strict=True)) if len(set(formed)) == len(names) else None


def _without_wrappers(names: list[str]) -> list[str]:
    """Remove wrappers, also inside a name, because a module of a model may be wrapped or compiled by itself."""
    return [".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names]


def _without_root(names: list[str]) -> list[str]:
    """Remove the first part if all names share it."""
    while True:
        first = {name.partition(".")[0] for name in names if not is_counter(name) or "." in name}
        if len(first) != 1 or not first <= set(ROOTS) or not all("." in name or is_counter(name) for name in names):
            return names
        names = [name.partition(".")[2] or name for name in names]


def _without_sequential_stem(names: list[str]) -> list[str]:
    """Rename the layers of a stem that is a Sequential with one convolution; with several it is a deep stem."""
    if any(re.match(r"conv1\.[2-9]\.", name) for name in names):
        return names
    return [_spelled(name, STEM) for name in names]


def _translated(names: list[str]) -> list[str]:
    return [_spelled(name, SPELLINGS) for name in names]


def _spelled(name: str, spellings: tuple[tuple[str, str], ...]) -> str:
    return _spell(name, spellings)[0]


def _translations(name: str) -> dict[str, str]:
    """Return torchvision's part for each part of a name that is not torchvision's."""
    return _spell(_without_root(_without_wrappers([name]))[0], (*STEM, *SPELLINGS))[1]


@lru_cache(maxsize=4096)  # match() tries the rules in all combinations
def _spell(name: str, spellings: tuple[tuple[str, str], ...]) -> tuple[str, dict[str, str]]:
    """Return the name with torchvision's parts, and the replacement of each replaced part."""
    replaced = {}
    for pattern, part in spellings:
        if found := re.search(pattern, name):
            replaced[found[0]] = part
            name = name[: found.start()] + part + name[found.end() :]
    return name, replaced


# In the order in which they are applied.
RULES = (_without_wrappers, _without_root, _without_sequential_stem, _translated)
