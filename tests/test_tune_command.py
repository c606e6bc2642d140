"""`resnet-fast tune` refuses if there is nothing to choose, never chooses a wrong kernel, and keeps its measurements.

Candidates and clock are made up, but for the last tests, which run the real candidates of a batch norm and of the
convolutions, interpreted, against their exact results.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from made_up_gpu import ENVIRONMENT, conv3x3, entries, make_up_gpu
from typer.testing import CliRunner

from resnet_fast.cli import app
from resnet_fast.cli import tune as command
from resnet_fast.ops import choices, launch
from resnet_fast.ops import conv3x3 as conv3x3_launches
from resnet_fast.ops.choices import add, read
from resnet_fast.ops.implementations import DEFAULTS, IMPLEMENTATIONS, Choice, Problem, tiles_of
from resnet_fast.tuning import Candidate, Outcome, Prepared, find_problems, inputs, measure, why_not
from resnet_fast.tuning.candidates import candidates, has_choice, tiles_on
from resnet_fast.tuning.measurement import choose_fastest
from resnet_fast.tuning.report import format_outcome
from resnet_fast.tuning.timing import NotHiddenError

CPU = torch.device("cpu")
EXACT = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
TWO_PASSES, REVERSED, SINGLE_READ = (Choice(name) for name in IMPLEMENTATIONS["batch norm"])
NORM = Problem("batch norm", "bf16", 128, 64, 64, 32)


def candidate(result: torch.Tensor | Exception, ran: Callable[[], object] = lambda: None) -> Candidate:
    def results() -> dict[str, torch.Tensor]:
        if isinstance(result, Exception):
            raise result
        return {"y": result}

    return Candidate(ran, results)


def made_up(problem: Problem, device: torch.device) -> Prepared:
    """Of a batch norm all implementations, of a convolution one conv3x3; all right, in bf16."""
    right = candidate(EXACT.bfloat16())
    default = DEFAULTS[problem.operation]
    others = (REVERSED, SINGLE_READ) if problem.operation.startswith("batch norm") else (conv3x3(problem),)
    return Prepared({"y": EXACT}, {choice: right for choice in (default, *others)})


def prepared(**others: torch.Tensor | Exception) -> Callable[[Problem, torch.device], Prepared]:
    """The right default of a batch norm, and what else is given by name."""
    names = {"reversed": REVERSED, "single_read": SINGLE_READ}
    found = {TWO_PASSES: candidate(EXACT.bfloat16())}
    return lambda problem, device: Prepared(
        {"y": EXACT}, found | {names[name]: candidate(result) for name, result in others.items()}
    )


def clock(**milliseconds: float):
    """Tells these times by implementation, and 1 ms of others."""

    def tell(calls, device, rounds, warm_up, hide_launches=False, refused=None):
        return {choice: [milliseconds.get(choice.implementation.split()[-1], 1.0)] * rounds for choice in calls}

    return tell


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU that is not there, on which all is measured: conv3x3 in half of the time, a single read in 0.9 of it."""
    monkeypatch.setattr(command, "choose_device", lambda name: CPU)
    monkeypatch.setattr(command, "choose_precision", lambda device: "bf16")
    monkeypatch.setattr("resnet_fast.tuning.why_not", lambda device: None)
    monkeypatch.setattr("resnet_fast.tuning.candidates.candidates", made_up)
    times = clock(conv3x3=0.5, read=0.9)
    monkeypatch.setattr("resnet_fast.tuning.measure", lambda *arguments: measure(*arguments, clock=times))
    return make_up_gpu(tmp_path, monkeypatch)


def run(*args: object):
    return CliRunner().invoke(app, ["tune", *map(str, args)])


def test_everything_is_measured_chosen_written_and_shown(own: Path):
    done = run()
    assert done.exit_code == 0 and done.stderr == ""
    found = read(own, ENVIRONMENT)
    assert list(found) == sorted(find_problems("resnet18", "cifar", [128, 512, 1024], 32, "bf16"))
    for problem, choice in found.items():
        assert choice == (SINGLE_READ if problem.operation.startswith("batch norm") else conv3x3(problem))
    lines = done.stdout.splitlines()
    assert max(len(line) for line in lines if str(own) not in line) <= 80
    assert "\x1b" not in done.stdout and "\r" not in done.stdout
    assert "  convolution 64                   1 ms    0.5 ms   2.00x  conv3x3 128x64x64" in lines
    assert "  norm backward 128 bn fork        1 ms    0.9 ms   1.11x  single read" in lines
    assert lines.count("bf16, batch 512, maps of 16x16") == 1
    n = len(found)
    assert lines[-2:] == [
        f"{n} of {n} differ from the default; a gain of 2% or less changes nothing.",
        f"Written: {own}",
    ]


def test_options_reach_the_problems(own: Path):
    done = run(*"--model resnet20 --batch-size 64 --batch-size 96 --image-size 16 --precision fp16".split())
    assert done.exit_code == 0
    assert set(read(own, ENVIRONMENT)) == set(find_problems("resnet20", None, [64, 96], 16, "fp16"))


@pytest.mark.parametrize("taken", ("bf16", "fp16"))
def test_the_precision_is_that_of_training(own: Path, taken: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "choose_precision", lambda device: taken)
    assert run("--batch-size", 64).exit_code == 0
    assert {problem.dtype for problem in read(own, ENVIRONMENT)} == {taken}


def test_where_training_takes_fp32_there_is_nothing_to_choose(own: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "choose_precision", lambda device: "fp32")
    done = run("--batch-size", 64)
    assert done.exit_code == 2 and not own.exists()
    assert "precision must be bf16 or fp16 to tune, got fp32, which training uses on cpu" in done.stderr
    assert run("--batch-size", 64, "--precision", "fp16").exit_code == 0


def test_the_time_budget_is_kept_and_another_run_goes_on(own: Path, monkeypatch: pytest.MonkeyPatch):
    """Each problem takes 25 s. The third would end behind 60 s, so it is not begun."""
    seconds, seen = [0.0], []

    def slow(*arguments):
        seconds[0] += 25
        seen.append(choices.table(CPU))
        return measure(*arguments, clock=clock(conv3x3=0.5))

    monkeypatch.setattr(command.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr("resnet_fast.tuning.measure", slow)
    problems = find_problems("resnet18", None, [64], 32, "bf16")
    for n_kept in (2, 4):
        done = run("--batch-size", 64, "--time-budget", "1m")
        assert done.exit_code == 0 and f"{36 - n_kept} problems are left after 1m: run it again" in done.stdout
        assert set(read(own, ENVIRONMENT)) == set(problems[:n_kept])
    assert [len(entries) for entries in seen] == [0, 1, 2, 3]  # what is compared with runs as the table says so far
    assert run("--batch-size", 64, "--time-budget", "1h").exit_code == 0
    assert set(read(own, ENVIRONMENT)) == set(problems)


def test_a_second_run_adds_to_the_first(own: Path):
    add(own, ENVIRONMENT, entries(7))
    assert run("--batch-size", 64).exit_code == 0
    assert entries(7).items() <= read(own, ENVIRONMENT).items()


@pytest.mark.parametrize(
    ("field", "reason"),
    [("", "it must be JSON in UTF-8"), ("torch", "it must have been measured with torch '2.13.0+cu130', got '2.11.0'")],
)
def test_a_table_that_does_not_count_is_replaced(own: Path, field: str, reason: str):
    own.write_text("{")
    if field:
        add(own, ENVIRONMENT | {field: "2.11.0"}, entries(7))
    done = run("--batch-size", 64)
    assert done.exit_code == 0
    assert f"The existing table is not used: {reason}" in " ".join(done.stdout.split())
    assert set(read(own, ENVIRONMENT)) == set(find_problems("resnet18", None, [64], 32, "bf16"))


# What is refused.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "resnet19"], "model must be one of resnet18"),
        (["--rounds", "0"], "rounds must be an integer of at least 1, got 0"),
        (["--precision", "fp32"], "precision must be one of auto, bf16, fp16, got 'fp32'"),
        (["--time-budget", "0"], "time_budget must be a time such as 90, 15m or 2h, got '0'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_arguments_exit_with_2(own: Path, args: list[str], message: str):
    done = run(*args)
    assert done.exit_code == 2 and message in done.stderr and done.stdout == "" and not own.exists()


def test_a_folder_that_cannot_be_written_exits_with_1_before_anything_is_measured(own: Path):
    own.parent.rmdir()
    own.parent.write_text("a file in its place")
    done = run()
    assert done.exit_code == 1 and "no table can be written" in done.stderr and done.stdout == ""


def test_without_a_home_a_folder_is_asked_for(own: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choices, "find_table", lambda environment: (None, {}, ""))
    done = run()
    assert done.exit_code == 2 and "set XDG_CACHE_HOME to a folder" in done.stderr


def test_on_a_cpu_the_command_says_in_a_sentence_that_there_is_nothing_to_choose(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = run("--device", "cpu")
    assert done.exit_code == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "a CPU cannot be tuned" in done.stderr and not (tmp_path / "resnet_fast").exists()


def test_interpreted_kernels_are_not_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("resnet_fast.tuning.measurement.is_interpreted", lambda: True)
    assert "unset TRITON_INTERPRET" in str(why_not(torch.device("cuda")))
    monkeypatch.setattr("resnet_fast.tuning.measurement.is_interpreted", lambda: False)
    monkeypatch.setattr("resnet_fast.tuning.measurement.why_not_triton", lambda device: "triton cannot be imported")
    assert "no kernel is used here: triton cannot be imported" in str(why_not(torch.device("cuda")))
    monkeypatch.setattr("resnet_fast.tuning.measurement.why_not_triton", lambda device: None)
    assert why_not(torch.device("cuda")) is None


# What is stopped, and what fails.


def failing_at(number: int, error: BaseException):
    """Measures, but for one problem."""
    count = iter(range(1000))
    times = clock(conv3x3=0.5)

    def run_measure(problem: Problem, *arguments) -> Outcome:
        if next(count) == number:
            raise error
        return measure(problem, *arguments, clock=times)

    return run_measure


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; "),
        (RuntimeError("an illegal memory access"), 1, "error: an illegal memory access; "),
    ],
)
def test_what_was_measured_is_kept(own: Path, error: BaseException, code: int, message: str, monkeypatch):
    monkeypatch.setattr("resnet_fast.tuning.measure", failing_at(3, error))
    done = run("--batch-size", 64)
    assert done.exit_code == code and f"{message}{own} keeps 3 of 36 problems" in done.stderr
    assert list(read(own, ENVIRONMENT)) == sorted(find_problems("resnet18", None, [64], 32, "bf16")[:3])


def test_an_interrupt_before_anything_was_measured(own: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("resnet_fast.tuning.measure", failing_at(0, KeyboardInterrupt()))
    done = run("--batch-size", 64)
    assert done.exit_code == 130 and "interrupted; nothing was written" in done.stderr and not own.exists()


def test_a_full_disk_exits_with_1_and_says_what_is_kept(own: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(choices, "add", full)
    done = run("--batch-size", 64)
    assert done.exit_code == 1 and "No space left on device; nothing was written" in done.stderr


def test_a_problem_without_the_memory_for_it_is_skipped(own: Path, monkeypatch: pytest.MonkeyPatch):
    def large(problem: Problem, device: torch.device) -> Prepared:
        if problem.width == 32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return made_up(problem, device)

    monkeypatch.setattr("resnet_fast.tuning.candidates.candidates", large)
    done = run("--batch-size", 64)
    assert done.exit_code == 0 and "  convolution 64             skipped: not enough memory" in done.stdout.splitlines()
    n_skipped = done.stdout.count("skipped: not enough memory")
    assert f"{n_skipped} skipped; problems that are not measured run as the default." in done.stdout.splitlines()
    assert len(read(own, ENVIRONMENT)) == 36 - n_skipped and all(
        problem.width < 32 for problem in read(own, ENVIRONMENT)
    )


# What is chosen.


@pytest.mark.parametrize(("single_read", "chosen"), [(0.979, SINGLE_READ), (0.98, TWO_PASSES), (1.5, TWO_PASSES)])
def test_a_gain_of_two_hundredths_or_less_changes_nothing(single_read: float, chosen: Choice):
    assert choose_fastest(TWO_PASSES, {TWO_PASSES: 1.0, REVERSED: 1.2, SINGLE_READ: single_read}) == chosen


def test_the_median_counts():
    def noisy(calls, device, rounds, warm_up, hide_launches=False, refused=None):
        return {choice: [1.0, 1.0, 9.0] if choice == TWO_PASSES else [0.1, 2.0, 2.0] for choice in calls}

    outcome = measure(NORM, prepared(reversed=EXACT.bfloat16()), CPU, 3, noisy)
    assert outcome.measured is not None and outcome.measured.choice == TWO_PASSES
    assert outcome.measured.milliseconds == {TWO_PASSES: 1.0, REVERSED: 2.0}


@pytest.mark.parametrize(
    ("result", "complaint"),
    [
        (EXACT.bfloat16() * 1.1, "y is off by"),
        (torch.tensor([1.0, 2.0, float("nan")]).bfloat16(), "y is off by nan"),
        (torch.tensor([1.0, 2.0, float("inf")]).bfloat16(), "y is off by inf"),
        (EXACT.bfloat16()[:2], r"y must have shape (3,), got (2,)"),
    ],
)
def test_a_wrong_candidate_is_never_chosen_and_loudly_reported(own: Path, result, complaint: str, monkeypatch):
    outcome = measure(NORM, prepared(reversed=result, single_read=EXACT.bfloat16()), CPU, 3, clock(reversed=0.01))
    assert outcome.measured is not None and outcome.measured.choice == TWO_PASSES
    assert set(outcome.measured.milliseconds) == {TWO_PASSES, SINGLE_READ}  # the wrong one has no time
    assert complaint in outcome.wrong[REVERSED]
    monkeypatch.setattr("resnet_fast.tuning.find_problems", lambda *arguments: [NORM])
    monkeypatch.setattr("resnet_fast.tuning.candidates.candidates", prepared(reversed=result))
    done = run()
    assert done.exit_code == 1 and "1 candidates are wrong and were not chosen" in done.stderr
    assert "BUG: two passes, reversed is wrong and is not chosen" in " ".join(done.stdout.split())
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80


def test_memory_that_a_candidate_leaves_out_is_not_right_by_chance():
    def leaves_out() -> dict[str, torch.Tensor]:
        return {"y": torch.empty(3, dtype=torch.bfloat16)}

    found = prepared()(NORM, CPU)
    found = found._replace(candidates={**found.candidates, REVERSED: Candidate(lambda: None, leaves_out)})
    outcome = measure(NORM, lambda problem, device: found, CPU, 3, clock())
    assert outcome.wrong[REVERSED].startswith("y is off by nan")
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_candidate_that_cannot_run_is_named_and_the_others_go_on():
    error = RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448. " + "x" * 500)
    outcome = measure(NORM, prepared(reversed=error, single_read=EXACT.bfloat16()), CPU, 3, clock(read=0.5))
    assert outcome.measured is not None and outcome.measured.choice == SINGLE_READ and not outcome.wrong
    lines = format_outcome(outcome)
    assert "1 cannot run here, such as two passes, reversed: RuntimeError: out of resource" in " ".join(
        " ".join(lines).split()
    )
    assert max(map(len, lines)) <= 80


def test_a_candidate_whose_launches_cannot_be_hidden_has_no_time_and_the_others_go_on():
    def shows(name: Choice):
        def tell(calls, device, rounds, warm_up, hide_launches=False, refused=None):
            refused[name] = NotHiddenError("launches took longer")
            return clock(read=0.5)(calls.keys() - {name}, device, rounds, warm_up)

        return tell

    found = prepared(reversed=EXACT.bfloat16(), single_read=EXACT.bfloat16())
    outcome = measure(NORM, found, CPU, 3, shows(REVERSED))
    assert outcome.measured is not None and set(outcome.measured.milliseconds) == {TWO_PASSES, SINGLE_READ}
    assert outcome.measured.choice == SINGLE_READ and "launches took longer" in outcome.failed[REVERSED]
    with pytest.raises(NotHiddenError):
        measure(NORM, found, CPU, 3, shows(TWO_PASSES))


def test_a_wrong_default_stops_it_all():
    found = Prepared({"y": EXACT}, {TWO_PASSES: candidate(EXACT.bfloat16() * 1.1)})
    with pytest.raises(RuntimeError, match="the default's y is off by"):
        measure(NORM, lambda problem, device: found, CPU, 3, clock())


@pytest.mark.parametrize(
    "problem",
    [
        Problem("convolution", "bf16", 100_000, 2048, 2048, 32),
        Problem("batch norm backward", "bf16", 100_000, 2048, 2048, 32, "add", True),
    ],
    ids=["convolution", "batch norm"],
)
def test_lines_fit_80_columns(problem: Problem):
    outcome = measure(problem, made_up, CPU, 3, clock(conv3x3=12345.678, reversed=12345.678))
    assert max(map(len, format_outcome(outcome))) <= 80


# Which problems there are.


def test_the_problems_of_resnet18():
    found = find_problems("resnet18", None, [128], 32, "bf16")

    def of(operation: str, width: int) -> list[tuple]:
        return [(p.in_channels, p.join, p.fork) for p in found if p.operation == operation and p.width == width]

    expected = [[(channels, "none", False)] for channels in (64, 128, 256, 512)]
    assert [of("convolution", width) for width in (32, 16, 8, 4)] == expected
    # The stem's batch norm, a block's first, and its last, which the next block's convolution reads.
    assert of("data gradient", 32) == [(64, "none", True), (64, "none", False), (64, "add", True)]
    assert of("data gradient", 4) == [(512, "none", False), (512, "bn", True)]
    assert of("batch norm", 32) == [(64, "none", False), (64, "add", False)]
    assert of("batch norm backward", 16) == [(128, "none", False), (128, "bn", True), (128, "add", True)]
    assert of("batch norm backward", 4) == [(512, "none", False), (512, "bn", True), (512, "add", False)]
    assert len(found) == len(set(found)) == 36


@pytest.mark.parametrize(
    ("model", "stem", "image_size"),
    [
        ("resnet18", "cifar", 56),  # 56, 28, 14 and 7 wide
        ("resnet18", "imagenet", 128),  # the stem pools
        ("resnet50", "cifar", 32),
        ("plain20", "cifar", 32),
    ],
)
def test_where_nothing_runs_in_pairs_convolutions_are_cudnns(model: str, stem: str, image_size: int):
    assert all("batch norm" in p.operation for p in find_problems(model, stem, [2], image_size, "bf16"))


def test_the_largest_operations_of_the_first_batch_size_come_first():
    found = find_problems("resnet18", None, [512, 128], 32, "bf16")
    assert [(p.n_images, p.width) for p in found] == sorted([(p.n_images, p.width) for p in found], reverse=True)
    of_stage = [p.operation for p in found if (p.n_images, p.width) == (512, 32)]
    assert list(dict.fromkeys(of_stage)) == list(IMPLEMENTATIONS)  # batch norms before the convolutions beside them


def test_strides_and_few_channels_are_for_cudnn():
    assert all(p.in_channels > 3 for p in find_problems("resnet20", None, [2], 32, "bf16"))


# The real candidates.


def pretend(monkeypatch: pytest.MonkeyPatch, capability: int | None, shared_memory: int) -> torch.device:
    monkeypatch.setattr(launch, "nvidia_capability", lambda device: capability)
    properties = SimpleNamespace(shared_memory_per_block_optin=shared_memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return torch.device("cuda:0")


CONVOLUTION = Problem("convolution", "bf16", 128, 128, 128, 16)


@pytest.mark.parametrize(
    ("gpu", "capability", "kilobytes", "blocks"),
    [
        ("H200", 90, 227, [(128, 64), (256, 64), (256, 128)]),
        ("RTX 5090", 120, 99, [(128, 64)]),
        ("A100", 80, 163, []),  # nothing is pipelined there
        ("T4", 75, 64, []),
        ("MI300", None, 64, []),
    ],
)
def test_block_sizes_that_cannot_run_well_are_no_candidates(gpu, capability, kilobytes, blocks, monkeypatch):
    device = pretend(monkeypatch, capability, kilobytes << 10)
    assert [(tiles.block_m, tiles.block_n) for tiles in tiles_on(CONVOLUTION, device)] == blocks
    assert has_choice(CONVOLUTION, device) == bool(blocks) and has_choice(NORM, device)


def test_what_has_one_candidate_is_no_problem(own: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conv3x3_launches, "is_pipelined", lambda device: False)
    assert run("--batch-size", 64).exit_code == 0
    assert {problem.operation for problem in read(own, ENVIRONMENT)} == {"batch norm", "batch norm backward"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there, the command itself runs them")
@pytest.mark.parametrize(
    ("operation", "join", "fork"),
    [("convolution", "none", False), ("data gradient", "add", True), ("batch norm backward", "add", True)],
)
def test_candidates_are_right(operation, join: str, fork: bool, monkeypatch):
    monkeypatch.setattr(inputs, "rotation", lambda size, device: 2)
    is_norm = operation.startswith("batch norm")
    problem = Problem(operation, "bf16", 2, 16, 16 if is_norm else 32, 4, join, fork)
    outcome = measure(problem, candidates, CPU, 2, clock())
    assert outcome.measured is not None and not outcome.wrong
    expected = {Choice("conv3x3", tiles) for tiles in tiles_of(problem)} | {Choice("cudnn")}
    assert set(outcome.measured.milliseconds) >= ({TWO_PASSES, REVERSED} if is_norm else expected)
