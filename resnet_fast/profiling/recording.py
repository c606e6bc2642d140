"""Turn the profiler's events into the parts of a step, which add up to its time.

    GPU:  time of the kernels, by the operator that launched them + idle = from the first kernel to the end of the last
    CPU:  self time of the operators + the time between operators        = wall time

Both are means per step over the profiled steps.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, record_function

from resnet_fast.profiling.categories import OPTIMIZER, category_of, is_operator

STEP = "training step"
IDLE = "idle"
BETWEEN = "between operators"
# Names of waiting in libkineto, which some versions put on the GPU's time line.
WAITS = ("Context Sync", "Stream Sync", "Event Sync", "Stream Wait Event")


class ProfileError(RuntimeError):
    """Raised if a step cannot be profiled, or its results are wrong."""


@dataclass(frozen=True)
class Part:
    """The time of one operator (CPU), or one kernel of one operator (GPU), in a step.

    Args:
        category: one of CATEGORIES, or "idle", or "between operators".
        operator: the operator that ran or launched it; empty for idle.
        kernel: full name of the kernel; empty on a CPU.
        ms: milliseconds per step.
        calls: calls per step; on a GPU, launches of kernels, copies and fills.
    """

    category: str
    operator: str
    kernel: str
    ms: float
    calls: float


@dataclass(frozen=True)
class StepProfile:
    """The step of one provider.

    Args:
        provider: "eager" or "fused".
        parts: the parts of the step; their times add up to `ms`.
        ms: milliseconds of a profiled step.
        unprofiled_ms: median milliseconds of a step without the profiler, which itself takes time.
        trace: the profiler that recorded the steps, or the last one.
    """

    provider: str
    parts: tuple[Part, ...]
    ms: float
    unprofiled_ms: float
    trace: torch.profiler.profile

    def ms_of(self, category: str) -> float:
        return sum(part.ms for part in self.parts if part.category == category)

    def calls_of(self, category: str) -> float:
        return sum(part.calls for part in self.parts if part.category == category)


def rest_of(device: torch.device) -> str:
    """Return the name of the time in which no kernel (GPU) or operator (CPU) runs."""
    return BETWEEN if device.type == "cpu" else IDLE


def record(step: Callable[[], object], device: torch.device, n_steps: int) -> torch.profiler.profile:
    """Run steps under the profiler, each annotated as "training step"."""
    # libkineto prints its stages as warnings. If it fails, no kernels are recorded, which is an error below.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    synchronize(device)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(n_steps):
            with record_function(STEP):
                step()
        synchronize(device)
    return profiler


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parts_of(events: Sequence[FunctionEvent], device: torch.device, n_steps: int) -> tuple[tuple[Part, ...], float]:
    """Return the parts of a step, largest first, and their sum, the step's time in milliseconds.

    Args:
        events: as returned by `profiler.events()`, with parents and kernels filled in.
        device: where the step ran.
        n_steps: number of steps recorded.

    Raises:
        ProfileError: the events contain no steps or, on a GPU, no kernels.
    """
    parts = _cpu_parts(events) if device.type == "cpu" else _gpu_parts(events, device)
    if not parts:
        raise ProfileError(f"the profiler recorded no {STEP!r}")
    us: defaultdict[tuple[str, str, str], float] = defaultdict(float)
    calls: Counter[tuple[str, str, str]] = Counter()
    for *key, time_us, n_calls in parts:
        us[tuple(key)] += time_us  # type: ignore[index]
        calls[tuple(key)] += n_calls  # type: ignore[index]
    parts = [Part(*key, ms=us[key] / 1000 / n_steps, calls=calls[key] / n_steps) for key in us]
    parts.sort(key=lambda part: -part.ms)
    return tuple(parts), sum(us.values()) / 1000 / n_steps


def _cpu_parts(events: Sequence[FunctionEvent]) -> list[tuple[str, str, str, float, int]]:
    """Return category, operator, "", self time in µs, and 1 for a call, for each event of a step."""
    parts = []
    for event in events:
        names = list(_names(event))
        if event.device_type != DeviceType.CPU or event.is_async or names[-1] != STEP:
            continue
        category = category_of(names)
        if category != OPTIMIZER and not is_operator(event.name):
            parts.append((BETWEEN, "Python and autograd", "", event.self_cpu_time_total, 0))
        else:
            parts.append((category, event.name, "", event.self_cpu_time_total, 1))
    return parts


def _gpu_parts(events: Sequence[FunctionEvent], device: torch.device) -> list[tuple[str, str, str, float, int]]:
    """Return category, operator, kernel, time in µs, and 1 for a launch, for each kernel and the idle time."""
    on_cpu = [event for event in events if event.device_type == DeviceType.CPU]
    # Copies of annotations on the GPU's time line, from their first kernel to their last, are not kernels.
    no_kernels = {*WAITS, *(event.name for event in on_cpu if event.is_user_annotation)}
    kernels = [event for event in events if event.device_type != DeviceType.CPU and event.name not in no_kernels]
    if not kernels:
        raise ProfileError(
            f"the profiler recorded no kernel on {device}: it needs CUPTI, and no other profiler may run; "
            "KINETO_LOG_LEVEL=0 shows its messages"
        )
    # An operator knows its kernels only by name and duration. Two kernels equal in both may be exchanged, if each is
    # assigned once.
    launched_by: defaultdict[tuple[str, float], list[FunctionEvent]] = defaultdict(list)
    for event in on_cpu:
        for launched in event.kernels:
            launched_by[launched.name, launched.duration].append(event)
    spans = [(kernel.time_range.start, kernel.time_range.end) for kernel in kernels]
    busy = exclusive_times(spans)
    parts = []
    for kernel, (start, end), time_us in zip(kernels, spans, busy, strict=True):
        operators = launched_by[kernel.name, end - start]
        names = list(_names(operators.pop())) if operators else []
        parts.append((category_of([kernel.name, *names]), names[0] if names else "", kernel.name, time_us, 1))
    span = max(end for _, end in spans) - min(start for start, _ in spans)
    return [*parts, (IDLE, "", "", span - sum(busy), 0)]


def exclusive_times(spans: Sequence[tuple[float, float]]) -> list[float]:
    """Return the time of each span (start, end) that no earlier span covers.

    The times add up to the length of the union, so that overlapping kernels are not counted twice.
    """
    times = [0.0] * len(spans)
    covered = float("-inf")
    for i in sorted(range(len(spans)), key=lambda i: spans[i]):
        start, end = spans[i]
        times[i] = max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return times


def _names(event: FunctionEvent) -> Iterator[str]:
    """Yield the names of the event, its parent and so on, up to the step."""
    ancestor: FunctionEvent | None = event
    while ancestor is not None:
        yield ancestor.name
        ancestor = ancestor.cpu_parent
