"""Time callables alternately, so that a change of the machine's speed affects all of them alike."""

import gc
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch

# Cycles of the GPU's clock. A spin starts below a millisecond, longer than the launches of most operations. For a
# callable with longer launches it doubles, to at most about half a second.
SPIN_CYCLES, MAX_SPIN_CYCLES = 1_000_000, 2**10 * 1_000_000

Name = TypeVar("Name", bound=Hashable)


class NotHiddenError(RuntimeError):
    """Raised if a callable's launches cannot be hidden: it waits for the GPU, or overfills the launch queue."""


def alternate(
    calls: Mapping[Name, Callable[[], object]],
    device: torch.device,
    rounds: int,
    warm_up: int,
    hide_launches: bool = False,
    refused: dict[Name, Exception] | None = None,
) -> dict[Name, list[float]]:
    """Run every callable once per round, in the reverse order of the previous round, and time each run.

    The order A B, B A, A B, ... spreads a slowdown over all callables, and none always comes second. Each run is timed
    from an idle device until its last kernel ends, so none overlaps another.

    Args:
        calls: what to time, by name.
        device: where it runs; a GPU is timed with CUDA events.
        rounds: timed runs of each.
        warm_up: untimed rounds before them.
        hide_launches: let a GPU spin while the launches queue up, so that only the time of the kernels counts.
        refused: receives the error of each callable whose launches cannot be hidden; the others continue.

    Returns:
        Milliseconds by name, without refused names; position i of each list belongs to round i.

    Raises:
        NotHiddenError: launches cannot be hidden, and `refused` is None.
    """
    times: dict[Name, list[float]] = {name: [] for name in calls}
    order, spins = list(calls), dict.fromkeys(calls, SPIN_CYCLES if hide_launches else 0)
    collects = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would add to the time of some run
    try:
        for number in range(-warm_up, rounds):
            for name in order:
                if device.type == "cuda":
                    try:
                        milliseconds, spins[name] = _time_on_gpu(calls[name], device, spins[name])
                    except NotHiddenError as error:
                        if refused is None:
                            raise
                        refused[name] = error
                        del times[name]
                        continue
                else:
                    milliseconds = _time_on_cpu(calls[name])
                if number >= 0:
                    times[name].append(milliseconds)
            order = [name for name in reversed(order) if name in times]
    finally:
        if collects:
            gc.enable()
    return times


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile."""
    p20, p50, p80 = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return p20, p50, p80


def _time_on_cpu(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def rotation(size: int, device: torch.device) -> int:
    """Return how many sets of inputs, of `size` bytes each, must rotate so that none is cached.

    On a GPU, together they exceed three times the L2 cache; on a CPU there are 4.
    """
    if device.type == "cpu":
        return 4
    return 1 + math.ceil(3 * torch.cuda.get_device_properties(device).L2_cache_size / size)


def _time_on_gpu(call: Callable[[], object], device: torch.device, spin: int) -> tuple[float, int]:
    """Return the milliseconds, and the cycles of a spin that was long enough; a `spin` of 0 means none."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stream = torch.cuda.current_stream(device)
    while True:
        torch.cuda.synchronize(device)
        if spin:
            torch.cuda._sleep(spin)  # private, but used by torch's own tests
        begin.record(stream)
        call()
        end.record(stream)
        is_hidden = not begin.query()  # the GPU still spins
        end.synchronize()
        if is_hidden or not spin:
            return begin.elapsed_time(end), spin
        if 2 * spin > MAX_SPIN_CYCLES:
            raise NotHiddenError(f"launches must be queued while the GPU spins for {spin:,} cycles, and took longer")
        spin *= 2
