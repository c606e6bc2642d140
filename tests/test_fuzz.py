"""Any other run folder, option or argument is refused in a line: no traceback, no hang (5 s), at most 500 MB.

30 mutations of each kind, the same ones every time; with `--hypothesis-profile=long` 1,000.
"""

import copy
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import settings
from test_broken_run_folders import write_config, write_signed
from tiny_run import Tiny, make_dataset, stop, use_tiny
from torch import nn
from trained_run import invoke, make_image_folder

import resnet_fast
from resnet_fast import data, inference, models, training
from resnet_fast.inference import trained
from resnet_fast.training import network

N = 1000 if settings().max_examples > 500 else 30
SECONDS, MEGABYTES = 5, 500


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 10**9, -(2**63), 2**64, 10**400, 0.5, -1.5, 1e308, float("nan"), float("inf")),
    *("", "x", "0", "auto", "cuda:99", "../..", "\x1b[31m\n", "\x9b2J\x07", "\u202e", "\ud800", "\0", "9" * 400),
    *("a" * 10**5, [], [0.5, 0.5], ["a", "a"], [None], {}, {"a": 1}, {"": {}}, nested(90)),
)
TENSORS: tuple[Any, ...] = (
    *(torch.zeros(()), torch.zeros(0), torch.zeros(3, dtype=torch.int64), torch.full((4,), torch.nan)),
    *(torch.zeros(2) * 1j, torch.zeros(1).expand(2**40), torch.eye(3).to_sparse(), (1, 2, 3)),
)
OBJECTS: tuple[Any, ...] = (
    *(object(), dict, len, b"\0", (), {1}, range(3), 2j, nn.ReLU(), torch.device("meta")),
    *(torch.zeros(3, device="meta"), *TENSORS),
)


@contextmanager
def limits() -> Iterator[None]:
    """Raise AssertionError where the block takes more than 5 s, or 500 MB more than is used before it."""

    def too_long(number: int, frame: Any) -> None:
        raise AssertionError(f"no answer within {SECONDS} s")

    handler = signal.signal(signal.SIGALRM, too_long)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    grown = _memory("VmHWM") - before
    assert grown < MEGABYTES, f"{grown} MB"


def _memory(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) // 1024


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(min(len(value), 3)):
            yield from places(value[key], (*path, key))


def mutated(content: dict, values: tuple, generator: random.Random) -> dict:
    """Change, drop or add an entry; each at the top is as likely, however much it holds."""
    top = generator.choice(list(content))
    *way, last = generator.choice([path for path in places(content) if path[:1] == (top,)])
    content = copy.deepcopy(content)
    holder: Any = content
    for key in way:
        holder = holder[key]
    kind = generator.randrange(5)
    if kind == 0:
        del holder[last]
    elif kind == 1 and isinstance(holder, dict):
        holder["extra"] = holder.pop(last)
    elif isinstance(old := holder[last], torch.Tensor) and kind == 2:
        others = (old.double(), old[None], torch.cat([old.flatten()] * 2), torch.full_like(old, 7))
        holder[last] = generator.choice(others)
    else:
        holder[last] = generator.choice(values)
    return content


def assert_all(attempt: Callable[[random.Random], object]) -> None:
    """Make every attempt; raise AssertionError with each that broke the rule."""
    broken = []
    for seed in range(N):
        try:
            attempt(random.Random(seed))
        except AssertionError as error:
            broken.append(f"{seed}: {str(error)[:500]}")
    assert not broken, "\n".join([f"{len(broken)} of {N}", *broken])


def assert_is_one_line(*command: object) -> None:
    """The command works, or ends with one clean line."""
    with limits():
        result = invoke(*command)
    assert result.exception is None or isinstance(result.exception, SystemExit), (command, result.exception)
    assert result.exit_code in (0, 1, 2, 130), (command, result.output)
    assert result.output.replace("\n", "").replace("█", "").isprintable(), (command, result.output)
    if result.exit_code == 1 or "resnet-fast: error" in result.stderr:
        assert len(result.stderr.splitlines()) == 1 and len(result.stderr) < 1500, (command, result.stderr)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of a tiny network that was stopped in its last epoch, in a folder with images; long work is left out."""
    home = tmp_path_factory.mktemp("fuzz")
    make_image_folder(home / "images", n_train=2)

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        use_tiny(patch.setattr)
        patch.setattr(trained, "MODELS", network.MODELS)
        patch.setattr("resnet_fast.data.load_dataset", lambda *args, **kwargs: make_dataset())
        patch.setattr("resnet_fast.evaluation.write_pictures", lambda *args: [])
        for work in ("inference.export_onnx", "inference.export_program", "cli.run.run_training"):
            patch.setattr(f"resnet_fast.{work}", interrupt)
        for work in ("profiling.profile_steps", "study.run_study", "doctor.diagnose"):
            patch.setattr(f"resnet_fast.{work}", interrupt)
        patch.chdir(home)
        yield stop(home / "run", 3, ema=0.5)


def in_a_copy(run: Path, write: Callable[[Path, dict], None], content: dict) -> Path:
    copied = run.with_name("copy")
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(run, copied)
    write(copied, content)
    return copied


def test_any_other_config(run: Path):
    content = json.loads((run / "config.json").read_text())

    def attempt(generator: random.Random) -> None:
        broken = in_a_copy(run, write_config, mutated(content, VALUES, generator))
        assert_is_one_line("train", "--resume", broken)

    assert_all(attempt)


def test_any_other_bytes_of_a_config(run: Path):
    content = (run / "config.json").read_bytes()

    def attempt(generator: random.Random) -> None:
        place, n_lost = generator.randrange(len(content)), generator.choice((0, 1, 1, len(content)))
        new = generator.choice((b"", b"\0", b"\xff", b'"', b"{", b"[" * 10**5, b"9" * 5000))
        broken = in_a_copy(run, lambda copied, _: None, {})
        (broken / "config.json").write_bytes(content[:place] + new + content[place + n_lost :])
        assert_is_one_line("train", "--resume", broken)

    assert_all(attempt)


def test_any_other_signed_checkpoint(run: Path):
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    del content["format"]
    image = run.parent / "images/test/ape/0.png"
    commands = (("train", "--resume"), ("eval",), ("predict", image), ("export", "--format", "torch"))
    commands = (*commands, ("train", "--epochs", "1", "--weights"))

    def attempt(generator: random.Random) -> None:
        broken = in_a_copy(run, write_signed, mutated(content, VALUES + TENSORS, generator))
        name, *rest = generator.choice(commands)
        assert_is_one_line(name, *([broken, *rest] if name == "predict" else [*rest, broken]))

    assert_all(attempt)


ARGUMENTS = {
    **{"train": (), "eval": ("run",), "predict": ("run", "images/test/ape/0.png"), "export": ("run",), "profile": ()},
    **{"convert": ("torchvision.models:resnet18",), "study skip": (), "summary": (), "tune": (), "doctor": ()},
}
WORDS = (
    *(str(value) for value in VALUES if not isinstance(value, list | dict)),
    *("cpu", "cuda:7", "1e-5", "3", "1024", "images", "images/test/ape/0.png", "run", "run/checkpoint.pt", "nowhere/x"),
)


@cache
def options_of(name: str) -> tuple[str, ...]:
    """The command's options, by its help."""
    words = invoke(*name.split(), "--help").stdout.split()
    return tuple(dict.fromkeys(word.strip(",[]()") for word in words if word.startswith("--")))


def test_any_options(run: Path):
    def attempt(generator: random.Random) -> None:
        name = generator.choice(list(ARGUMENTS))
        words = [word if generator.random() < 0.8 else generator.choice(WORDS) for word in ARGUMENTS[name]]
        for _ in range(generator.randrange(1, 4)):
            option, value = generator.choice(options_of(name)), generator.choice(WORDS)
            words += generator.choice(([option, value], [option, value], [f"{option}={value}"], [option]))
        assert_is_one_line(*name.split(), *words)

    assert_all(attempt)


def calls(run: Path) -> dict[Callable, dict[str, Any]]:
    """Public calls, each with arguments that are right."""
    dataset, augmentation = make_dataset(), data.Augmentation((0.5,) * 3, (0.2,) * 3)
    x, c, images = torch.randn(2, 4, 3, 3), torch.ones(4), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    norm = {"num_features": 4, "eps": 1e-5, "momentum": 0.1, "affine": True, "track_running_stats": True, "relu": True}
    settings = training.TrainConfig(dataset="digits", device="cpu", out=run.with_name("new"))
    network = inference.load_trained(run)
    folder = {"data_dir": run.parent / "images", "image_size": 16, "workers": 0, "skip_unreadable": False}
    step = {"precision": "fp32", "graph": False, "accumulate": 1, "world_size": 1, "n_steps": 3}
    return {
        resnet_fast.batch_norm_add_relu: {
            **{"x": x, "running_mean": c, "running_var": c, "weight": c, "bias": c, "training": True, "momentum": 0.1},
            **{"eps": 1e-5, "residual": x, "residual_norm": None, "relu": True, "fork": False, "backend": None},
            "ghost_batch_size": None,
        },
        resnet_fast.FusedBatchNorm2d: {**norm, "ghost_batch_size": None},
        resnet_fast.FusedSyncBatchNorm2d: {**norm, "process_group": None},
        resnet_fast.resnet20: {"num_classes": 3, "shortcut": "A", "width": 4},
        resnet_fast.resnet18: {"num_classes": 3, "stem": "cifar", "weights": None},
        resnet_fast.convert: {"model": model, "report": False},
        resnet_fast.restore: {"model": model},
        resnet_fast.fold_batch_norm: {"model": copy.deepcopy(model).eval()},
        resnet_fast.convert_sync_batchnorm: {"module": copy.deepcopy(model), "process_group": None},
        resnet_fast.load_checkpoint: {"model": Tiny(3), "path": run / "checkpoint.pt", "entry": None},
        models.get_model: {"name": "resnet20", "num_classes": 3},
        data.load_dataset: {"name": "folder", **folder},
        data.Augmentation: {**vars(augmentation)},
        data.epoch_plan: {"n_images": 9, "size": (8, 8), "augmentation": augmentation, "seed": 0, "epoch": 1},
        data.normalize: {"images": images, "mean": (0.5,) * 3, "std": (0.2,) * 3},
        data.TensorSplit: {"images": images, "labels": torch.zeros(2, dtype=torch.int64)},
        data.Loader: {
            **{"split": dataset.train, "augmentation": augmentation, "batch_size": 4, "seed": 0, "rank": 0},
            "world_size": 1,
        },
        training.TrainConfig: vars(settings),
        training.TrainingStep: {
            **{"model": Tiny(3), "recipe": training.RECIPES["digits"], "augmentation": augmentation, **step},
        },
        training.evaluate: {
            **{"model": Tiny(3), "split": dataset.test, "augmentation": augmentation, "batch_size": 4},
            "precision": "fp32",
        },
        training.load_run: {"path": run, "device": "cpu", "workers": 0},
        training.choose_device: {"name": "cpu"},
        training.choose_precision: {"device": "cpu"},
        inference.load_trained: {"path": run, "device": "cpu"},
        inference.read_image: {"path": run.parent / "images/test/ape/0.png", "image_size": 16},
        inference.classify: {"trained": network, "image": images[0]},
    }


OF_TORCH = ("num_features", "affine", "track_running_stats", "num_classes", "weights")
PEERS = {
    resnet_fast.resnet18: torchvision.models.resnet18,
    resnet_fast.FusedBatchNorm2d: nn.BatchNorm2d,
    resnet_fast.FusedSyncBatchNorm2d: nn.SyncBatchNorm,
}


def _of_torch(function: Callable, arguments: dict[str, Any]) -> str:
    """The message of the function that ours takes the place of: its users know it."""
    theirs = {name: arguments[name] for name in OF_TORCH if name in arguments}
    try:
        PEERS[function](**theirs)
    except Exception as error:
        return str(error)
    return ""


def test_any_argument_of_a_public_call(run: Path):
    def attempt(generator: random.Random) -> None:
        function, arguments = generator.choice(list(right.items()))
        name = generator.choice(list(arguments))
        value = generator.choice(VALUES + OBJECTS)
        with limits():
            try:
                function(**{**arguments, name: value})
            except (ValueError, TypeError, RuntimeError, OSError) as error:
                said = str(error)
                is_named = any(word in said for word in (*arguments, repr(value)[:20], str(value)[:20], "memory"))
                assert is_named or said == _of_torch(function, {**arguments, name: value}), (name, value, error)
            except Exception as error:
                raise AssertionError((function, name, value, error)) from error

    right = calls(run)
    assert_all(attempt)
