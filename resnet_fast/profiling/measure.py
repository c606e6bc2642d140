"""Warm up, time a few steps without the profiler, then profile a few."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

from resnet_fast.common.checks import check_integer
from resnet_fast.profiling.check import refuse_interpreter
from resnet_fast.profiling.providers import PROVIDERS, checked_steps
from resnet_fast.profiling.recording import StepProfile, parts_of, record, synchronize
from resnet_fast.training.config import TrainConfig

# By device. A GPU needs more steps for cuDNN to choose algorithms, kernels to compile and the clock to rise.
WARM_UP = {"cpu": 2, "cuda": 20}
N_STEPS = 10
MIN_TIMED = 3


def profile_steps(
    config: TrainConfig,
    n_steps: int | None = None,
    providers: Mapping[str, Callable[[TrainConfig], nn.Module]] = PROVIDERS,
) -> list[StepProfile]:
    """Profile the training step of every provider.

    Args:
        config: only model, stem, batch_size, image_size, precision, device, seed and the optimizer's settings are used.
        n_steps: number of profiled steps of each, averaged; None: 10.
        providers: functions that make the networks; the first is the baseline.

    Returns:
        A profile for each provider, in their order.

    Raises:
        ValueError: n_steps is not an integer of at least 1.
        ProfileError: a provider computes wrong results, kernels are interpreted, or the profiler recorded nothing.
    """
    device = torch.device(config.device)
    if n_steps is None:
        n_steps = N_STEPS
    check_integer("steps", n_steps)
    refuse_interpreter()
    steps = checked_steps(config, providers)
    for step in steps.values():
        for _ in range(WARM_UP[device.type]):
            step()
    times = _time(steps, device, max(n_steps, MIN_TIMED))
    traces = _record(steps, device, n_steps)
    profiles = []
    for name, recorded in traces.items():
        events = [event for trace in recorded for event in trace.events() or []]
        parts, ms = parts_of(events, device, n_steps)
        profiles.append(StepProfile(name, parts, ms, times[name], recorded[-1]))
    return profiles


def _record(
    steps: Mapping[str, Callable[[], object]], device: torch.device, n_steps: int
) -> dict[str, list[torch.profiler.profile]]:
    """Record the steps of each provider.

    On a CPU, single steps alternate (A B, B A, ...), so that a change of speed affects both. On a GPU, all
    steps of a provider run in a row, because the time between two of them counts as idle.
    """
    n_rounds = n_steps if device.type == "cpu" else 1
    traces: dict[str, list[torch.profiler.profile]] = {name: [] for name in steps}
    order = list(steps)
    record(steps[order[0]], device, 1)  # the first recording of a process sets up the profiler
    for _ in range(n_rounds):
        for name in order:
            traces[name].append(record(steps[name], device, n_steps // n_rounds))
        order.reverse()
    return traces


def _time(steps: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Return the median time of each step in milliseconds; steps alternate, so that a change of speed affects both.

    On a GPU it is the time between two events of its stream: the program runs ahead, as in training.
    """
    times: dict[str, list[Callable[[], float]]] = {name: [] for name in steps}
    synchronize(device)
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(_time_gpu(step) if device.type == "cuda" else _time_cpu(step))
    synchronize(device)
    return {name: statistics.median(read() for read in reads) for name, reads in times.items()}


def _time_cpu(step: Callable[[], object]) -> Callable[[], float]:
    began = time.perf_counter()
    step()
    ms = 1000 * (time.perf_counter() - began)
    return lambda: ms


def _time_gpu(step: Callable[[], object]) -> Callable[[], float]:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    step()
    ended.record()
    return lambda: began.elapsed_time(ended)
