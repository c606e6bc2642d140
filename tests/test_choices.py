"""Tables of choices on disk are read back as written and never broken; training continues whatever a file holds."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from made_up_gpu import ENVIRONMENT, GPU, conv3x3, entries, make_up_gpu

from resnet_fast.ops import choices
from resnet_fast.ops.choices import add, choose, read
from resnet_fast.ops.implementations import Choice

ROOT = Path(__file__).parents[1]
CONVOLUTION = next(iter(entries()))
CHOSEN, DEFAULT = conv3x3(CONVOLUTION), Choice("cudnn")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_up_gpu(tmp_path, monkeypatch)


def complaint(path: Path) -> str:
    """The one warning about a table, whose entries do not count, however often it is asked."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [choose(CONVOLUTION, GPU) for _ in range(2)] == [DEFAULT, DEFAULT]
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith(f"{path} is not used, the defaults run: ") and text.endswith("`resnet-fast tune` again")
    assert text.isprintable() and len(text) < 600
    return text


def test_what_is_added_is_chosen_and_read_back(own: Path):
    add(own, ENVIRONMENT, dict(reversed(entries().items())))
    assert read(own, ENVIRONMENT) == entries()
    assert list(read(own, ENVIRONMENT)) == sorted(entries())  # whatever was measured first
    assert choose(CONVOLUTION, GPU) == CHOSEN and not choices.is_empty(GPU)
    assert choose(CONVOLUTION._replace(n_images=7), GPU) == DEFAULT


def test_adding_keeps_what_is_there_and_replaces_the_same_problems(own: Path):
    add(own, ENVIRONMENT, entries())
    add(own, ENVIRONMENT, {CONVOLUTION: DEFAULT} | entries(512))
    assert read(own, ENVIRONMENT) == entries() | {CONVOLUTION: DEFAULT} | entries(512)


def test_without_a_table_the_defaults_run_and_nothing_is_warned_of(own: Path, recwarn):
    assert choose(CONVOLUTION, GPU) == DEFAULT and choices.is_empty(GPU) and not recwarn


def test_the_table_is_read_once_and_not_for_a_cpu(own: Path, monkeypatch: pytest.MonkeyPatch):
    add(own, ENVIRONMENT, entries())
    assert choose(CONVOLUTION, GPU) == CHOSEN
    monkeypatch.setattr(choices, "find_table", lambda environment: pytest.fail("read again"))
    assert choose(CONVOLUTION, GPU) == CHOSEN
    assert choices.is_empty(torch.device("cpu"))


@pytest.mark.parametrize("value", ["0", "1", ""])
def test_an_environment_variable_turns_tables_off(own: Path, value: str, monkeypatch: pytest.MonkeyPatch):
    add(own, ENVIRONMENT, entries())
    monkeypatch.setenv("RESNET_FAST_TUNED", value)
    assert choose(CONVOLUTION, GPU) == (DEFAULT if value == "0" else CHOSEN)


def test_entries_in_use_count_instead_of_the_table(own: Path):
    add(own, ENVIRONMENT, entries())
    with choices.using({}):
        assert choices.is_empty(GPU)
    assert choose(CONVOLUTION, GPU) == CHOSEN


@pytest.mark.parametrize("field", ENVIRONMENT)
def test_a_table_of_another_environment_does_not_count_and_is_replaced(own: Path, field: str):
    add(own, ENVIRONMENT | {field: None}, entries())
    assert f"it must have been measured with {field} {ENVIRONMENT[field]!r}, got None" in complaint(own)
    add(own, ENVIRONMENT, entries(512))
    assert read(own, ENVIRONMENT) == entries(512)


def test_the_environment_tells_kernels_apart_and_not_their_line_ends(tmp_path: Path, monkeypatch):
    def hashed(**files: bytes) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, content in files.items():
            (folder / f"{name}.py").write_bytes(content)
        monkeypatch.setattr(choices, "KERNELS", folder)
        return choices.environment_of(torch.device("cpu"))["kernels"]

    assert "conv3x3.py" in {path.name for path in choices.KERNELS.iterdir()}
    first = hashed(one=b"x\ny\n")
    assert hashed(one=b"x\r\ny\r\n") == first
    assert len({first, hashed(one=b"x\nz\n"), hashed(two=b"x\ny\n")}) == 3


# Whatever a file holds.


def table(path: str = "", value: object = None) -> str:
    """The text of a table of one entry, in which another value stands at a dotted path."""
    tiles = CHOSEN.tiles and CHOSEN.tiles._asdict()
    choice = {"implementation": "conv3x3", "tiles": tiles}
    found = {"environment": {**ENVIRONMENT}, "entries": [{"problem": CONVOLUTION._asdict(), "choice": choice}]}
    *parents, name = path.split(".")
    at = found
    for parent in parents:
        at = at[int(parent) if parent.isdigit() else parent]  # type: ignore[index]
    if name:
        at[name] = value  # type: ignore[index]
    return json.dumps(found)


WRONG_VALUES = [
    ("extra", 1, "the table must have the fields environment, entries, got {"),
    ("environment", [], "environment must have the fields gpu, torch, triton, cudnn, resnet_fast, kernels, got []"),
    ("environment.gpu", "\x1b[2J" * 100, r"got '\x1b[2J\x1b"),
    ("environment.torch", {"2": 13}, "it must have been measured with torch '2.13.0+cu130', got {'2': 13}"),
    ("entries", {}, "entries must be a list, got {}"),
    ("entries", [None], "an entry must have the fields problem, choice, got None"),
    ("entries.0.problem.extra", 1, "problem must have the fields operation, dtype"),
    ("entries.0.problem.operation", "attention", "operation must be one of batch norm, "),
    ("entries.0.problem.operation", ["convolution"], "operation must be one of batch norm, "),
    ("entries.0.problem.dtype", "fp32", "dtype must be one of bf16, fp16, got 'fp32'"),
    ("entries.0.problem.join", "mul", "join must be one of none, add, bn, got 'mul'"),
    ("entries.0.problem.fork", 1, "fork must be true or false, got 1"),
    ("entries.0.problem.n_images", 0, "n_images must be an integer of at least 1, got 0"),
    ("entries.0.problem.in_channels", 64.0, "in_channels must be an integer of at least 1, got 64.0"),
    ("entries.0.problem.out_channels", True, "out_channels must be an integer of at least 1, got True"),
    ("entries.0.problem.width", 10**30, "width must be below 2,147,483,648, got 1000000"),
    ("entries.0.choice", [], "choice must be a known implementation of convolution, got []"),
    ("entries.0.choice.extra", 1, "choice must be a known implementation of convolution, got {"),
    ("entries.0.choice.implementation", "single read", "of convolution, got {'implementation': 'single read'"),
    ("entries.0.choice.implementation", "cudnn", "of convolution, got {'implementation': 'cudnn', 'tiles': {"),
    ("entries.0.choice.tiles", None, "got {'implementation': 'conv3x3', 'tiles': None}"),
    ("entries.0.choice.tiles.block_m", 96, "got {'implementation': 'conv3x3', 'tiles': {'block_m': 96, "),
    ("entries.0.choice.tiles.block_n", 2**40, "choice must be a known implementation of convolution"),
    ("entries.0.choice.tiles.num_warps", "4", "choice must be a known implementation of convolution"),
]


def test_every_field_is_checked(own: Path):
    own.write_text(table())
    assert read(own, ENVIRONMENT) == {CONVOLUTION: CHOSEN}
    for path, value, message in WRONG_VALUES:
        own.write_text(table(path, value))
        choices._load.cache_clear()
        assert message in complaint(own), path


DAMAGED = {
    "empty": (b"", "it must be JSON in UTF-8, got Expecting value"),
    "cut short": (table()[:99].encode(), "it must be JSON in UTF-8, got "),
    "no text": (bytes(range(256)), "it must be JSON in UTF-8, got 'utf-8' codec can't decode byte 0x80"),
    "another list": (b"[1, 2]", "the table must have the fields environment, entries, got [1, 2]"),
    "nested deeply": (b"[" * 200_000 + b"]" * 200_000, "it must be JSON in UTF-8, got "),
    "a huge number": (b'{"entries": ' + b"9" * 10_000 + b"}", "it must be JSON in UTF-8, got "),
    "too large": (b" " * (choices.MAX_BYTES + 1), "it must have at most 16,777,216 bytes, got more"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_warning_and_is_replaced(own: Path, name: str):
    content, message = DAMAGED[name]
    own.write_bytes(content)
    assert message in complaint(own)
    add(own, ENVIRONMENT, entries())
    assert read(own, ENVIRONMENT) == entries()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Path.mkdir, "it must be a regular file, got d"),
        (os.mkfifo, "it must be a regular file, got p"),  # a read of it would wait for ever
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    ],
    ids=["folder", "pipe", "loop"],
)
def test_what_is_no_file_is_a_warning_too(own: Path, make, message: str):
    make(own)
    assert message in complaint(own)


def test_a_file_that_cannot_be_read_is_a_warning_and_is_not_replaced(own: Path, monkeypatch):
    add(own, ENVIRONMENT, entries())

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")  # to root, as whom tests may run, nothing is

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", refuse)
        assert "Permission denied" in complaint(own)
        with pytest.raises(PermissionError):
            add(own, ENVIRONMENT, entries(512))
    assert read(own, ENVIRONMENT) == entries()


def test_a_broken_driver_is_a_warning_too(own: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(device):
        raise RuntimeError("driver on fire")

    monkeypatch.setattr(choices, "environment_of", fails)
    assert "driver on fire" in complaint(Path("the table of choices"))


def test_where_there_is_no_home_there_is_no_table(own: Path, monkeypatch: pytest.MonkeyPatch, recwarn):
    def fails():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative/does/not/count")
    monkeypatch.setattr(Path, "home", fails)
    assert choices.find_table(ENVIRONMENT)[0] is None
    assert choose(CONVOLUTION, GPU) == DEFAULT and not recwarn


def test_the_name_of_a_gpu_is_no_path(own: Path):
    path, _, _ = choices.find_table(ENVIRONMENT | {"gpu": "../../" + 300 * "x"})
    assert path is not None and path.parent == own.parent and path != own and len(path.name) < 100


# Two processes, one that is killed, and a full disk.

ADD = """
import os, signal, sys
from pathlib import Path
from made_up_gpu import ENVIRONMENT, entries
from resnet_fast.ops.choices import add
{before}
for n_images in range({first}, {first} + 100):
    add(Path(sys.argv[1]), ENVIRONMENT, entries(n_images))
"""


def start(path: Path, first: int, before: str = "") -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.Popen([sys.executable, "-c", ADD.format(first=first, before=before), str(path)], env=env)


@pytest.mark.slow
def test_two_processes_at_once_leave_a_whole_table(own: Path):
    processes = [start(own, first) for first in (1, 1001)]
    while any(process.poll() is None for process in processes):
        read(own, ENVIRONMENT)  # raises if it is not whole
    assert [process.returncode for process in processes] == [0, 0]
    found = read(own, ENVIRONMENT)
    assert entries(100).items() <= found.items() or entries(1100).items() <= found.items()


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_writes_leaves_the_table_whole(own: Path):
    add(own, ENVIRONMENT, entries())
    killed = start(own, 512, "os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.wait(60) == -9
    assert read(own, ENVIRONMENT) == entries()


def test_a_full_disk_leaves_the_table_whole(own: Path, monkeypatch: pytest.MonkeyPatch):
    add(own, ENVIRONMENT, entries())

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        add(own, ENVIRONMENT, entries(512))
    assert read(own, ENVIRONMENT) == entries() and [path.name for path in own.parent.iterdir()] == [own.name]
