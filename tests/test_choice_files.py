"""Tables of choices on the disk: read back as written, never lost, and whatever a file holds, training goes on."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from made_up_gpu import ENVIRONMENT, GPU, conv3x3, entries, make_up_gpu

from resnet_fast.ops import choice_files, choice_format, choices
from resnet_fast.ops.choice_files import add, check_can_add, find_tables, read_file
from resnet_fast.ops.choices import choose
from resnet_fast.ops.implementations import Choice

ROOT = Path(__file__).parents[1]
CONVOLUTION = next(iter(entries()))
CHOSEN = conv3x3(CONVOLUTION)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_up_gpu(tmp_path, monkeypatch)


def write(path: Path, environment=ENVIRONMENT, found=None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(choice_format.write(environment, entries() if found is None else found))


def test_what_is_added_is_chosen_and_read_back(own: Path):
    assert choose(CONVOLUTION, GPU) == Choice("cudnn")
    choices._tables.clear()
    add(own, ENVIRONMENT, entries())
    assert read_file(own) == (ENVIRONMENT, entries())
    assert choose(CONVOLUTION, GPU) == CHOSEN
    assert choose(CONVOLUTION._replace(n_images=7), GPU) == Choice("cudnn")


def test_adding_keeps_what_is_there_and_replaces_the_same_problems(own: Path):
    add(own, ENVIRONMENT, entries())
    measured = entries()[CONVOLUTION]._replace(choice=Choice("cudnn"))
    add(own, ENVIRONMENT, {CONVOLUTION: measured} | entries(512))
    assert read_file(own)[1] == entries() | {CONVOLUTION: measured} | entries(512)


def test_the_text_does_not_depend_on_the_order_of_measuring():
    backwards = dict(reversed(entries().items()))
    assert choice_format.write(ENVIRONMENT, entries()) == choice_format.write(ENVIRONMENT, backwards)


def test_the_table_is_read_once_and_not_for_a_cpu(own: Path, monkeypatch: pytest.MonkeyPatch):
    add(own, ENVIRONMENT, entries())
    assert choose(CONVOLUTION, torch.device("cpu")) == Choice("cudnn")
    choose(CONVOLUTION, GPU)
    monkeypatch.setattr(choice_files, "read_table", lambda device: pytest.fail("read again"))
    assert choose(CONVOLUTION, GPU) == CHOSEN


@pytest.mark.parametrize("value", ["0", "1", ""])
def test_an_environment_variable_turns_tables_off(own: Path, value: str, monkeypatch: pytest.MonkeyPatch):
    add(own, ENVIRONMENT, entries())
    monkeypatch.setenv("RESNET_FAST_TUNED", value)
    assert choose(CONVOLUTION, GPU) == (Choice("cudnn") if value == "0" else CHOSEN)


# Versions.


@pytest.mark.parametrize("field", ENVIRONMENT._fields)
def test_other_versions_have_files_of_their_own_that_stay(own: Path, field: str, monkeypatch: pytest.MonkeyPatch):
    other = ENVIRONMENT._replace(**{field: 90000 if field == "cudnn" else "other"})
    path = choice_files.own_path(other)
    assert path is not None and path != own
    add(path, other, entries())
    before = path.read_bytes()
    assert choose(CONVOLUTION, GPU) == Choice("cudnn")
    add(own, ENVIRONMENT, entries(512))
    assert path.read_bytes() == before
    assert find_tables(ENVIRONMENT).others == (() if field == "gpu" else (path,))


def test_a_renamed_table_of_other_versions_does_not_count(own: Path):
    write(own, ENVIRONMENT._replace(torch="2.11.0"))
    with pytest.warns(UserWarning, match=r"measured with torch '2\.11\.0', here it is '2\.13\.0\+cu130'"):
        assert choose(CONVOLUTION, GPU) == Choice("cudnn")


def test_the_hash_tells_kernels_apart_and_not_their_line_ends(tmp_path: Path):
    def hashed(name: str, files: dict[str, bytes]) -> str:
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_bytes(content)
        return choice_files.hash_of_kernels(tmp_path / name)

    first = hashed("a", {"one.py": b"x\ny\n", "augment.py": b"1"})
    assert hashed("b", {"one.py": b"x\r\ny\r\n", "augment.py": b"2"}) == first
    assert len({first, hashed("c", {"one.py": b"x\nz\n"}), hashed("d", {"two.py": b"x\ny\n"})}) == 3
    assert len(choice_files.hash_of_kernels()) == 16


# Built-in tables.


def test_a_built_in_table_counts_whatever_the_versions_and_ones_own_goes_before_it(own: Path):
    built_in = choice_files.TUNED / "nvidia-made-up-80gb.json"
    write(
        built_in, ENVIRONMENT._replace(torch="9.9", triton="9", cudnn=None, resnet_fast="9"), entries() | entries(512)
    )
    assert choose(CONVOLUTION, GPU) == CHOSEN
    choices._tables.clear()
    add(own, ENVIRONMENT, {CONVOLUTION: entries()[CONVOLUTION]._replace(choice=Choice("cudnn"))})
    assert choose(CONVOLUTION, GPU) == Choice("cudnn")
    larger = CONVOLUTION._replace(n_images=512)
    assert choose(larger, GPU) == conv3x3(larger)


@pytest.mark.parametrize("field", ["gpu", "kernels"])
def test_a_built_in_table_of_other_kernels_or_another_gpu_does_not(own: Path, field: str):
    write(choice_files.TUNED / "nvidia-made-up-80gb.json", ENVIRONMENT._replace(**{field: "other"}))
    assert choose(CONVOLUTION, GPU) == Choice("cudnn")
    assert field in find_tables(ENVIRONMENT).built_in_problem


def test_the_tables_that_ship_are_of_the_kernels_that_ship():
    for path in (ROOT / "resnet_fast/ops/tuned").glob("*.json"):
        environment, found = read_file(path)
        assert environment.kernels == choice_files.hash_of_kernels(), f"{path.name} was measured with other kernels"
        assert path.stem == choice_files._short(environment) and found


# Whatever a file holds.


def table(**changes: object) -> dict:
    """A table of one entry; `changes` by dotted path."""
    found = json.loads(choice_format.write(ENVIRONMENT, {CONVOLUTION: entries()[CONVOLUTION]}))
    for path, value in changes.items():
        *parents, name = path.split("__")
        at = found
        for parent in parents:
            at = at[int(parent)] if parent.isdigit() else at[parent]
        if value is None and name not in ("cudnn", "tiles"):
            del at[name]
        else:
            at[name] = value
    return found


WRONG_TABLES = {
    "format must be 1": {"format": 2},
    "format must be 1, got True": {"format": True},
    "the table must have the fields": {"entries": None},
    "the table must have the fields format, environment, entries, got": {"extra": 1},
    "entries must be a list": {"entries": {}},
    "environment must have": {"environment": []},
    "environment.gpu must be text": {"environment__gpu": 7},
    "environment.cudnn must be an integer": {"environment__cudnn": True},
    "entry 1: an entry must have": {"entries": [None]},
    "operation must be one of": {"entries__0__problem__operation": "attention"},
    "operation must be one of batch norm": {"entries__0__problem__operation": ["convolution"]},
    "dtype must be one of": {"entries__0__problem__dtype": "fp32"},
    "join must be one of": {"entries__0__problem__join": "mul"},
    "fork must be true or false": {"entries__0__problem__fork": 1},
    "n_images must be an integer from 1": {"entries__0__problem__n_images": 0},
    "in_channels must be an integer": {"entries__0__problem__in_channels": 64.0},
    "out_channels must be an integer": {"entries__0__problem__out_channels": True},
    "width must be an integer from 1 to": {"entries__0__problem__width": 10**30},
    "problem must have the fields": {"entries__0__problem__width": None},
    "implementation of convolution must be one of cudnn; conv3x3": {
        "entries__0__choice__implementation": "single read"
    },
    "tiles must have the fields": {"entries__0__choice__tiles": None},
    "tiles are those of conv3x3": {"entries__0__choice__implementation": "cudnn"},
    "tiles must be among those of kernels/conv_tiles.py": {"entries__0__choice__tiles__block_m": 96},
    "tiles must be among those of kernels/conv_tiles.py for": {"entries__0__choice__tiles__block_n": 2**40},
    "tiles must be among those of kernels/conv_tiles.py for the": {"entries__0__choice__tiles__block_k": -64},
    "tiles must be among those of kernels/conv_tiles.py for the problem": {"entries__0__choice__tiles__num_warps": "4"},
    "tiles must be among those of kernels/conv_tiles.py for the problem, got": {
        "entries__0__choice__tiles__num_stages": []
    },
    "conv3x3 was not": {"entries__0__measured": table()["entries"][0]["measured"][:1]},
    "cudnn was not": {"entries__0__measured": [table()["entries"][0]["measured"][1]]},
    "measured must be a list": {"entries__0__measured": 1},
    "milliseconds must be positive and at most 1e+09, got 0": {"entries__0__measured__0__milliseconds": 0},
    "milliseconds must be positive and at most 1e+09, got nan": {"entries__0__measured__0__milliseconds": float("nan")},
    "milliseconds must be positive and at most 1e+09, got inf": {"entries__0__measured__0__milliseconds": float("inf")},
    "milliseconds must be positive and at most 1e+09, got 1000000": {"entries__0__measured__0__milliseconds": 10**400},
    "milliseconds must be positive and at most 1e+09, got True": {"entries__0__measured__0__milliseconds": True},
    "entry 2: its problem is that of an entry before it": {"entries": table()["entries"] * 2},
}


def test_every_field_is_checked():
    for message, changes in WRONG_TABLES.items():
        with pytest.raises(ValueError) as caught:
            choice_format.read(json.dumps(table(**changes)))
        assert message in str(caught.value) and len(str(caught.value)) < 300


WHOLE = choice_format.write(ENVIRONMENT, entries())
DAMAGED = {
    "empty": b"",
    "cut short": WHOLE[: len(WHOLE) // 2].encode(),
    "another list": b"[1, 2]",
    "null": b"null",
    "no text": bytes(range(256)),
    "zeros": bytes(4096),
    "nested deeply": b"[" * 200_000 + b"]" * 200_000,
    "a huge number": b'{"format": ' + b"9" * 10_000 + b"}",
    "not a number": b'{"format": NaN, "environment": 1, "entries": []}',
    "too large": b" " * (choice_files.MAX_BYTES + 1),
    "control characters": json.dumps(table(environment__gpu="\x1b[2J" * 100)).encode(),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_warning_and_the_defaults(own: Path, name: str):
    own.write_bytes(DAMAGED[name])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert choose(CONVOLUTION, GPU) == Choice("cudnn")
    (warning,) = caught
    text = str(warning.message)
    assert str(own) in text and "run `resnet-fast tune` again" in text and len(text) < 600 and text.isprintable()
    assert check_can_add(own, ENVIRONMENT, is_own=True) in text  # and so it says to him who tunes again
    add(own, ENVIRONMENT, entries())
    choices._tables.clear()
    assert choose(CONVOLUTION, GPU) == CHOSEN


def make_folder(path: Path) -> None:
    path.mkdir()


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [make_folder, make_pipe, make_loop])
def test_what_is_no_file_is_a_warning_too(own: Path, make):
    make(own)
    with pytest.warns(UserWarning, match="is not used: it (is no file|cannot be read)"):
        assert choose(CONVOLUTION, GPU) == Choice("cudnn")


def test_a_folder_that_cannot_be_read_is_a_warning_and_nothing_is_overwritten(own: Path, monkeypatch):
    write(own)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")  # to root, as whom tests may run, nothing is

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.warns(UserWarning, match=r"cannot be read \(Permission denied\)"):
        assert choose(CONVOLUTION, GPU) == Choice("cudnn")
    with pytest.raises(PermissionError):
        add(own, ENVIRONMENT, entries(512))
    monkeypatch.undo()
    assert read_file(own)[1] == entries()


def test_a_broken_driver_is_a_warning_too(own: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(device):
        raise RuntimeError("driver on fire")

    monkeypatch.setattr(choice_files, "environment_of", fails)
    with pytest.warns(UserWarning, match="driver on fire"):
        assert choose(CONVOLUTION, GPU) == Choice("cudnn")


def test_a_home_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        check_can_add(tmp_path / "file" / "resnet_fast" / "a.json", ENVIRONMENT, is_own=True)


def test_where_there_is_no_home_there_is_no_table(monkeypatch: pytest.MonkeyPatch, own: Path):
    def fails():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative/does/not/count")
    monkeypatch.setattr(Path, "home", fails)
    assert choice_files.own_path(ENVIRONMENT) is None
    assert choose(CONVOLUTION, GPU) == Choice("cudnn")


def test_a_name_is_no_path(own: Path):
    path = choice_files.own_path(ENVIRONMENT._replace(gpu="../../" + 300 * "x"))
    assert path is not None and path.parent == own.parent and len(path.name) < 100


def test_somebody_elses_file_is_not_replaced(tmp_path: Path, own: Path):
    for name, content in (("notes.json", "mine"), ("older.json", WHOLE.replace("2.13.0", "2.11.0"))):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name} must be a new file or a table"):
            check_can_add(tmp_path / name, ENVIRONMENT, is_own=False)
        assert (tmp_path / name).read_text() == content
    own.mkdir()
    with pytest.raises(ValueError, match="no file"):
        check_can_add(own, ENVIRONMENT, is_own=True)


# Two processes, and one that is killed.

ADD = """
import sys, time
from pathlib import Path
from made_up_gpu import ENVIRONMENT, entries
from resnet_fast.ops import choice_files
path, first = Path(sys.argv[1]), int(sys.argv[2])
{before}
path.with_suffix(f".ready-{{first}}").touch()
while len(list(path.parent.glob("*.ready-*"))) < {n_processes}:
    time.sleep(0.001)
for n_images in range(first, first + {n}):
    choice_files.add(path, ENVIRONMENT, entries(n_images))
"""
KILLED = "import os, signal; os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)"


def start(path: Path, first: int, n: int, n_processes: int = 1, before: str = "") -> subprocess.Popen:
    """Add `n` times, once `n_processes` are there."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    code = ADD.format(n=n, n_processes=n_processes, before=before)
    return subprocess.Popen([sys.executable, "-c", code, str(path), str(first)], env=env)


@pytest.mark.slow
def test_two_processes_at_once_lose_nothing_of_each_other(own: Path):
    processes = [start(own, first, 15, 2) for first in (1, 101)]
    assert [process.wait(60) for process in processes] == [0, 0]
    expected = [entries(first + i) for first in (1, 101) for i in range(15)]
    assert read_file(own)[1] == {problem: measured for found in expected for problem, measured in found.items()}


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_writes_leaves_the_table_whole(own: Path):
    add(own, ENVIRONMENT, entries())
    assert start(own, 512, 1, before=KILLED).wait(60) == -9
    assert read_file(own)[1] == entries()
    add(own, ENVIRONMENT, entries(1024))  # the lock went with the process
    assert read_file(own)[1] == entries() | entries(1024)


def test_a_full_disk_leaves_the_table_whole(own: Path, monkeypatch: pytest.MonkeyPatch):
    add(own, ENVIRONMENT, entries())

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        add(own, ENVIRONMENT, entries(512))
    assert read_file(own)[1] == entries() and [path.name for path in own.parent.iterdir()] == [own.name]
