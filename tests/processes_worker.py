"""Runs of several processes for test_several_processes.py, forked from here: to import torch takes longer than all.

    python processes_worker.py FOLDER    # FOLDER/<case>/ holds what each process returned, printed and wrote

`launch` does what torchrun does: it sets the environment, and ends the others when one has failed.
"""

import faulthandler
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import sync_worker
import tiny_run
import torch
import torch.nn.functional as F
from stand_in import stand_in
from torch import Tensor, nn

from resnet_fast.cli import app
from resnet_fast.data import DataError, TensorSplit
from resnet_fast.models import resnet
from resnet_fast.models.registry import MODELS
from resnet_fast.training import Reporter, Result, network, prepare, resume, step, train
from resnet_fast.training.step import StepOutput, TrainingStep

N_TRAIN = 41  # a last batch of 5 with batches of 9 and of 12, of 6 with 7; 19 images to test

# Processes, whether the batch norms are synchronized, settings. Shares and parts are of unequal sizes everywhere.
EQUAL: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "adam and all else": (
        2,
        True,
        {
            "batch_size": 9,
            "weights": "../../weights.pt",
            "optimizer": "adam",
            "lr": 1e-3,
            "label_smoothing": 0.1,
            "clip_norm": 0.5,
            "ema": 0.9,
        },
    ),
    "mixed in each part of a share": (
        2,
        False,
        {
            "batch_size": 12,
            "accumulate": 3,
            "label_smoothing": 0.1,
            "trivial_augment": True,
            "random_erasing": 0.5,
            "mixup": 0.4,
            "cutmix": 1.0,
        },
    ),
    "accumulated, where the larger share has more parts": (2, True, {"batch_size": 7, "accumulate": 2}),
    "frozen stages": (
        2,
        True,
        {"batch_size": 9, "weights": "../../weights.pt", "freeze": "network.0,network.1,network.2", "body_lr": 0.5},
    ),
    "statistics of each part of a share": (
        2,
        False,
        {"batch_size": 12, "accumulate": 3, "clip_norm": 0.5, "ema": 0.9},
    ),
}
AT_STEP = 7  # of 5 steps an epoch: in the second


class Double(nn.Module):
    """Every kind of block, in fp64, so that sums in another order show as 1e-15."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.network = sync_worker.network()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.double())


class Tiny(tiny_run.Tiny):
    """Does something at its seventh training step."""

    def __init__(self, num_classes: int, action: Callable[[Tensor], Tensor]) -> None:
        super().__init__(num_classes)
        self.action, self.n_calls = action, 0

    def forward(self, x: Tensor) -> Tensor:
        self.n_calls += self.training
        logits = super().forward(x)
        return self.action(logits) if self.training and self.n_calls == AT_STEP else logits


class Killed(Reporter):
    """Kills its process in the second epoch, when the checkpoint of the first is written."""

    def __init__(self, out: Path) -> None:
        self.epoch, self.checkpoint = 0, out / "checkpoint.pt"

    def start_epoch(self, epoch: int, n_steps: int) -> None:
        self.epoch = epoch

    def step(self, done: int, progress: object) -> None:
        if (self.epoch, done) == (2, 3):
            while not self.checkpoint.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)


def launch(folder: Path, n_processes: int, work: Callable[[int], object], end: int = signal.SIGTERM) -> list[int]:
    """Run `work(rank)` in processes of their own; leave RANK.pt, RANK.out, RANK.err and, in codes, the exit codes."""
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    numbers = []
    for rank in range(n_processes):
        number = os.fork()
        if number == 0:
            os._exit(_process(folder, rank, n_processes, port, work))
        numbers.append(number)
    codes: dict[int, int] = {}
    deadline, is_ending = time.monotonic() + 60, False
    while len(codes) < n_processes:
        time.sleep(0.02)
        for number in set(numbers) - set(codes):
            ended, status = os.waitpid(number, os.WNOHANG)
            if ended:
                codes[number] = os.waitstatus_to_exitcode(status)
        alive = set(numbers) - set(codes)
        if any(codes.values()) and not is_ending:
            is_ending, deadline = True, time.monotonic() + 30
            time.sleep(0.1)
            for number in alive:
                os.kill(number, end)
        if time.monotonic() > deadline:
            for number in alive:
                os.kill(number, signal.SIGKILL)
    found = [codes[number] for number in numbers]
    (folder / "codes").write_text(" ".join(map(str, found)))
    return found


def _process(folder: Path, rank: int, n_processes: int, port: int, work: Callable[[int], object]) -> int:
    """Be one of the processes; return its exit code."""
    if n_processes > 1:
        size = str(n_processes)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.chdir(folder)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
    code = 0
    try:
        faulthandler.dump_traceback_later(50)  # what hangs is killed after 60
        torch.save(work(rank), f"{rank}.pt")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def use_double(n_train: int = N_TRAIN) -> None:
    MODELS["resnet18"] = replace(stand_in(Double), stages=tuple(f"network.{i}" for i in range(4)))
    network.MODELS = MODELS
    prepare.load_dataset = lambda *args, **kwargs: tiny_run.make_dataset(n_train)
    step.forward_loss = double_loss


def double_loss(
    model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, precision: str, smoothing: float, mixture: Any
) -> tuple[Tensor, Tensor]:
    logits = model(images)
    return step.cross_entropy(logits, labels, smoothing, mixture), logits


def reference_step(n_processes: int, sync_bn: bool) -> Callable[[TrainingStep, Any, int], StepOutput]:
    """The step of several processes, by its definition, in one: the mean loss over the joint batch.

    Batch norm sees the parts of each share or, synchronized, those of all shares together; running statistics are the
    first process's.
    """

    def run(self: TrainingStep, batch: Any, n_images: int) -> StepOutput:
        self.optimizer.zero_grad()
        least = n_images // n_processes
        n_parts = self.accumulate if least >= 2 * self.accumulate else least // 2
        shares = [share.tensor_split(n_parts) for share in batch.plan.tensor_split(n_processes)]
        groups = [torch.cat(parts) for parts in zip(*shares, strict=True)] if sync_bn else sum(shares, ())
        loss, n_correct, buffers = 0.0, 0, []
        for i, group in enumerate(groups):
            if i == n_parts:
                buffers = [buffer.clone() for buffer in self.model.buffers()]
            images, labels, mixture = batch._replace(plan=group).mixed(self.augmentation)
            logits = self.model(images)
            n_classes = logits.shape[1]
            targets = F.one_hot(labels, n_classes).double()
            if mixture is not None:
                share = mixture.share[:, None].double()
                targets = share * targets + (1 - share) * F.one_hot(mixture.others, n_classes)
            smoothing = self.recipe.label_smoothing
            part = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing) / n_images
            part.backward()
            loss = loss + part.detach()
            n_correct = n_correct + (logits.argmax(1) == targets.argmax(1)).sum()
        if buffers:
            for buffer, value in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(value)
        if self.recipe.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        return StepOutput(loss, n_correct)  # type: ignore[arg-type]

    return run


def returned(result: Result) -> dict[str, Any]:
    history = [vars(metrics) for metrics in tiny_run.without_times(result.history)]
    mirrored = result.mirrored_accuracy
    return {"history": history, "mirrored": mirrored, "weights": result.model.state_dict(), "out": str(result.out)}


def run_equal(folder: Path) -> None:
    """Each case in its processes, and in one."""
    folder.mkdir()
    torch.save({name: value + 1 for name, value in Double().state_dict().items()}, folder / "weights.pt")
    for name, (n_processes, sync_bn, settings) in EQUAL.items():

        def several(rank: int, sync_bn: bool = sync_bn, settings: dict = settings) -> object:
            use_double()
            # Each has another idea of the folder, as of two seconds; the first one's counts.
            return returned(train(tiny_run.config_for(Path(f"run-{rank}"), epochs=1, sync_bn=sync_bn, **settings)))

        def one(rank: int, n: int = n_processes, sync_bn: bool = sync_bn, settings: dict = settings) -> object:
            use_double()
            if not sync_bn or "accumulate" in settings:
                TrainingStep._run = reference_step(n, sync_bn)  # type: ignore[method-assign]
            return returned(train(tiny_run.config_for(Path("run-0"), epochs=1, **settings)))

        launch(folder / name / "several", n_processes, several)
        launch(folder / name / "one", 1, one)


def run_resumed(folder: Path) -> None:
    """Runs that are killed and go on with as many processes or with others; "straight" are never killed."""

    def begin(out: Path, reporter: Reporter | None, **settings: Any) -> object:
        return returned(train(tiny_run.config_for(out, **settings), reporter))

    for name, n_first, n_then in (("2 straight", 2, 0), ("2 then 2", 2, 2)):
        out = folder / name / "run"
        launch(folder / name / "first", n_first, lambda _, out=out, n=n_then: begin(out, Killed(out) if n else None), 9)
        if n_then:
            launch(folder / name / "then", n_then, lambda _, out=out: returned(resume(out)))

    # 43: a last batch of 3 images, which is none for two processes.
    for n_train, cases in ((N_TRAIN, ((2, 0), (2, 1))), (N_TRAIN + 2, ((1, 2),))):

        def begin_double(out: Path, killed: bool, n_train: int = n_train) -> object:
            use_double(n_train)
            return begin(out, Killed(out) if killed else None, sync_bn=True, ema=0.9)

        def go_on(out: Path, n_train: int = n_train) -> object:
            use_double(n_train)
            return returned(resume(out))

        for n_first, n_then in cases:
            case = folder / f"{n_train} images, {n_first} then {n_then}"
            out = case / "run"
            launch(case / "first", n_first, lambda _, out=out, n=n_then, begin=begin_double: begin(out, n > 0), 9)
            if n_then:
                launch(case / "then", n_then, lambda _, out=out, go_on=go_on: go_on(out))


def run_commands(folder: Path) -> None:
    """The command line in two processes, in good and in bad times."""

    def act(rank: int, action: Callable[[], object]) -> Callable[[int], None]:
        """Let the model of that process do something in its seventh training step, the second of epoch 2."""

        def change(of: int) -> None:
            if of == rank:
                network.MODELS = {
                    "resnet18": stand_in(lambda num_classes, stem: Tiny(num_classes, lambda y: action() or y))
                }

        return change

    def diverge(rank: int) -> None:
        if rank == 1:
            network.MODELS = {
                "resnet18": stand_in(lambda num_classes, stem: Tiny(num_classes, lambda y: y * float("nan")))
            }

    def fail(error: Exception) -> None:
        raise error

    def miss_data_on_second(rank: int) -> None:
        if rank == 1:
            prepare.load_dataset = lambda *args, **kwargs: fail(DataError("no data there"))

    def other_data(rank: int) -> None:
        if rank == 1:
            prepare.load_dataset = lambda *args, **kwargs: tiny_run.make_dataset(N_TRAIN + 1)

    def break_image(rank: int) -> None:
        planned, epochs = TensorSplit.planned, []

        def broken(*args: Any) -> Any:
            epochs.append(1)
            if rank == 1 and len(epochs) == 2:
                raise DataError("cannot read the image 7.png")
            return planned(*args)

        TensorSplit.planned = broken  # type: ignore[method-assign]

    def occupy(rank: int) -> None:
        Path("run").mkdir(exist_ok=True)
        Path("run/file").touch()

    digits = ["--dataset", "digits", "--epochs", "3", "--batch-size", "8", "--device", "cpu", "--precision", "fp32"]
    cases: dict[str, tuple[list[str], Callable[[int], None]]] = {
        "repeat": (["--repeat", "2"], lambda rank: None),
        "time budget": (["--time-budget", "0.000001s"], lambda rank: None),
        "occupied": ([], occupy),
        "no data on the second": ([], miss_data_on_second),
        "other data": ([], other_data),
        "diverged": ([], diverge),
        "broken image": ([], break_image),
        "interrupted": ([], act(1, lambda: signal.raise_signal(signal.SIGINT))),
        "killed": ([], act(1, lambda: os.kill(os.getpid(), signal.SIGKILL))),
    }
    for name, (arguments, change) in cases.items():

        def command(rank: int, given: list[str] = arguments, change: Any = change) -> None:
            change(rank)
            app(["train", *digits, "--out", "run", *given])

        launch(folder / name, 2, command)


def run_resnet(folder: Path) -> None:
    """Two steps of a network of ours; the warnings are in its output. In fp16 the first one overflows in a process."""
    import thin_resnet  # and torchvision, after resnet_fast

    for precision in ("fp32", "fp16"):

        def work(rank: int, precision: str = precision) -> object:
            def make(**options: object) -> nn.Module:
                model, factors = thin_resnet.thin_resnet(resnet), [float("inf")]
                if (rank, precision) == (1, "fp16"):
                    model.fc.bias.register_hook(lambda gradient: gradient * (factors.pop() if factors else 1))
                return model

            network.MODELS = {"resnet18": stand_in(make)}
            prepare.load_dataset = lambda *args, **kwargs: tiny_run.make_dataset(8)
            config = tiny_run.config_for(Path("run"), epochs=1, batch_size=4, sync_bn=True, precision=precision)
            return returned(train(config))

        launch(folder / precision, 2, work)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tiny_run.use_tiny(setattr)
    folder = Path(sys.argv[1])
    groups = {"equal": run_equal, "resumed": run_resumed, "commands": run_commands, "resnet": run_resnet}
    for name in sys.argv[2:] or groups:
        groups[name](folder / name)
