"""Several processes train as one does on their joint batch, write one set of files and messages, and end together."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes_worker import EQUAL, N_TRAIN
from test_cli_train import TINY_RUN, environment
from tiny_run import EPOCHS, equal, same_bits

from resnet_fast.training.console import HEADER
from resnet_fast.training.processes import connect
from resnet_fast.training.torchrun import command

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="fork and signals are POSIX"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed"),
]
# Of sums in another order, in fp64, through five steps; a wrong weight of one image is 1e-3.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
HOW = "to resume: torchrun --nproc-per-node 2 -m resnet_fast.cli train --resume run"


def run_worker(folder: Path, *groups: str) -> Path:
    """What processes_worker.py leaves."""
    worker = Path(__file__).with_name("processes_worker.py")
    command = [sys.executable, str(worker), str(folder), *groups]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    return run_worker(tmp_path_factory.mktemp("several"), "equal", "resumed", "resnet")


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> Path:
    return run_worker(tmp_path_factory.mktemp("several"), "commands") / "commands"


def results(folder: Path) -> list[dict[str, Any]]:
    """What each process of a good run returned."""
    codes, errors = read(folder)
    assert not any(codes) and not any(errors), errors
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(len(codes))]


def read(folder: Path) -> tuple[list[int], list[str]]:
    """Exit codes, and what each process wrote to standard error."""
    codes = [int(code) for code in (folder / "codes").read_text().split()]
    return codes, [(folder / f"{rank}.err").read_text() for rank in range(len(codes))]


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Weights and running statistics in fp64; losses are added up in fp32; as many images are right."""
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, **CLOSE, msg=name)
    assert len(found["history"]) == len(expected["history"])
    for ours, theirs in zip(found["history"], expected["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert found["mirrored"] == expected["mirrored"]


@pytest.mark.parametrize("case", EQUAL)
def test_equals_one_process_on_the_joint_batch(case: str, ran: Path):
    [one], several = results(ran / "equal" / case / "one"), results(ran / "equal" / case / "several")
    assert_close(several[0], one)
    for other in several[1:]:
        assert other["history"] == several[0]["history"] and other["mirrored"] == several[0]["mirrored"]
        assert equal(other["weights"], several[0]["weights"])


def test_the_first_process_alone_writes_what_one_would(ran: Path):
    case = ran / "equal" / "adam and all else"
    assert {result["out"] for result in results(case / "several")} == {"run-0"}  # they were given run-0 and run-1
    names = {path.name for path in (case / "one" / "run-0").iterdir()}
    assert {path.name for path in (case / "several" / "run-0").iterdir()} == names
    assert [path.name for path in (case / "several").iterdir() if path.is_dir()] == ["run-0"]
    state = torch.load(case / "several" / "run-0" / "checkpoint.pt", weights_only=True)
    assert list(state["model"]) == list(results(case / "one")[0]["weights"])  # no "module." before the names
    random = [one["torch"] for one in state["random"]]
    assert len(random) == 2 and not torch.equal(*random)  # each draws its own dropout


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_network_of_ours_trains_without_a_warning(precision: str, ran: Path):
    # Nothing on standard error: no stride that DistributedDataParallel copies.
    first, second = results(ran / "resnet" / precision)
    skipped = [[metrics["skipped_steps"] for metrics in one["history"]] for one in (first, second)]
    assert skipped == [[1], [1]] if precision == "fp16" else [[0], [0]]
    assert equal(first["weights"], second["weights"])
    assert all(value.isfinite().all() for value in first["weights"].values())


# Resumed.


def test_a_killed_run_goes_on_to_the_same_bits(ran: Path):
    assert read(ran / "resumed" / "2 then 2" / "first")[0][0] == -signal.SIGKILL
    straight, then = (results(ran / "resumed" / part) for part in ("2 straight/first", "2 then 2/then"))
    assert equal(then, [{**result, "out": then[0]["out"]} for result in straight])
    assert same_bits(ran / "resumed" / "2 then 2" / "run", ran / "resumed" / "2 straight" / "run")


def test_a_run_goes_on_with_another_number_of_processes(ran: Path):
    straight = results(ran / "resumed" / f"{N_TRAIN} images, 2 then 0" / "first")[0]
    (then,) = results(ran / "resumed" / f"{N_TRAIN} images, 2 then 1" / "then")
    assert_close(then, straight)


def test_and_with_another_number_of_steps(ran: Path):
    """The last batch of 3 images is one for one process, and too small for two: 6 steps, and then 5."""
    case = ran / "resumed" / f"{N_TRAIN + 2} images, 1 then 2"
    assert len(results(case / "then")[0]["history"]) == EPOCHS
    state = torch.load(case / "run" / "checkpoint.pt", weights_only=True)["step"]
    assert state["n_done"] == EPOCHS * 5  # the place in the schedule
    n_averaged = 6 + (EPOCHS - 1) * 5
    assert float(state["average"]["weight"]) == pytest.approx(1 - 0.9**n_averaged, rel=1e-5)


# The command.


@pytest.mark.parametrize(
    ("case", "code", "message"),
    [
        ("occupied", 2, "out must be a new or empty folder, run already holds file; name another one"),
        ("no data on the second", 1, "no data there"),
        ("other data", 1, "the data of process 1 differ from those of process 0"),
        ("diverged", 1, r"the loss became nan at epoch 2, step 2; suspects: .* up to epoch 1; --resume would .*"),
        ("killed", 1, rf"another process of this run is gone; it, or torchrun, says why; run keeps .* epoch 1; {HOW}"),
    ],
)
@pytest.mark.slow
def test_one_process_says_what_is_wrong(case: str, code: int, message: str, commands: Path):
    codes, errors = read(commands / case)
    speaker = 1 if case in ("no data on the second", "other data") else 0
    # The other one was ended as torchrun would, or has killed itself.
    assert codes[speaker] == code and codes[1 - speaker] in (-signal.SIGTERM, -signal.SIGKILL)
    assert re.fullmatch(f"resnet-fast: error: {message}\n", errors[speaker])
    assert errors[1 - speaker] == "" and (commands / case / "1.out").read_text() == ""


@pytest.mark.slow
def test_an_image_that_one_cannot_read_ends_both(commands: Path):
    codes, (first, second) = read(commands / "broken image")
    assert codes == [1, 1]
    assert second == "resnet-fast: error: cannot read the image 7.png\n"
    assert re.fullmatch(rf"resnet-fast: error: another process .* is gone; .* up to epoch 1; {HOW}\n", first)


@pytest.mark.slow
def test_a_signal_to_one_ends_both_at_the_same_step(commands: Path):
    codes, errors = read(commands / "interrupted")
    assert codes == [130, 130]
    kept = "run keeps the checkpoint, metrics and curves up to epoch 1"
    assert errors == [f"resnet-fast: interrupted; {kept}; {HOW}\n", ""]


@pytest.mark.slow
def test_the_first_process_alone_prints(commands: Path):
    for case, rows in (
        ("repeat", 2 * ["1/3", "2/3", "3/3"]),
        ("time budget", ["1/3"]),
    ):
        codes, errors = read(commands / case)
        assert codes == [0, 0] and errors == ["", ""]
        assert (commands / case / "1.out").read_text() == ""
        assert re.findall(r"\n +(\d/3) ", (commands / case / "0.out").read_text()) == rows
    assert (commands / "time budget" / "0.out").read_text().endswith(f"epoch 2 of 3; {HOW}\n")
    seeds = {"seed-0", "seed-1", "summary.csv"}
    assert {path.name for path in (commands / "repeat" / "run").iterdir()} == seeds


@pytest.mark.slow
def test_torchrun_shows_one_table_and_sigterm_ends_all(tmp_path: Path):
    """A command as users give it."""
    (tmp_path / "tiny_command.py").write_text(TINY_RUN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = ["-m", "tiny_command", "train", "--dataset", "digits", "--device", "cpu", "--out", "run"]
    process = subprocess.Popen(
        [*torchrun, *train, "--epochs", "999"],
        cwd=tmp_path,
        env=environment(PYTHONPATH=f"{tmp_path}:{environment()['PYTHONPATH']}", OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "run" / "metrics.csv").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    finally:
        process.terminate()  # torchrun ends its own processes, which it would leave if it were killed
    assert time.monotonic() - began < 30  # after which torchrun would kill
    lines = output.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].startswith("2 x cpu, ") and lines.count(HEADER) == 1
    assert sum(line.startswith("  1/999 ") for line in lines) == 1
    ours = [line for line in errors.splitlines() if line.startswith("resnet-fast: ")]
    kept = r"resnet-fast: terminated; run keeps the checkpoint, metrics and curves up to epoch \d+"
    assert len(ours) == 1 and re.fullmatch(f"{kept}; {HOW}", ours[0]), errors
    assert "/resnet_fast/" not in errors  # the only traceback is torchrun's own
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"config.json", "checkpoint.pt", "metrics.csv"}


# The environment.


def test_a_gpu_is_named_for_one_process_only(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="device must be cuda or auto with several processes, got cuda:1"):
        with connect("cuda:1"):
            pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="each process needs a GPU of its own, got 1 for 2 processes"):
        with connect("cuda"):
            pass


@pytest.mark.parametrize(
    ("size", "here", "expected"),
    [
        ("1", "1", "resnet-fast"),
        ("2", "2", "torchrun --nproc-per-node 2 -m resnet_fast.cli"),
        (
            "16",
            "8",
            "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --nproc-per-node 8 -m resnet_fast.cli",
        ),
    ],
)
def test_the_command_to_go_on_starts_as_many(size: str, here: str, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert command() == expected
