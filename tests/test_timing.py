"""Launches are hidden behind a long enough spin; a callable whose launches cannot be hidden does not stop the others.

On a pretended GPU, whose clock and the host's are numbers.
"""

from collections.abc import Callable

import pytest
import torch

from resnet_fast.tuning.timing import MAX_SPIN_CYCLES, SPIN_CYCLES, NotHiddenError, alternate

GPU = torch.device("cuda:0")


class PretendedGpu:
    """In the place of torch.cuda; times are in cycles, and what an event tells is, too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.idle_from = 0
        self.spins: list[int] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0

            def record(self, stream: object) -> None:
                self.at = max(gpu.now, gpu.idle_from)

            def query(self) -> bool:
                return gpu.now >= self.at

            def synchronize(self) -> None:
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, other: "Event") -> float:
                return other.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.wait())
        monkeypatch.setattr(torch.cuda, "_sleep", self.spin)

    def wait(self) -> None:
        self.now = max(self.now, self.idle_from)

    def spin(self, cycles: int) -> None:
        self.spins.append(cycles)
        self.idle_from = max(self.now, self.idle_from) + cycles

    def launches(self, host: int, device: int, waits: bool = False) -> Callable[[], None]:
        """What takes the host so long to launch, and the device to run."""

        def run() -> None:
            self.now += host
            self.idle_from = max(self.now, self.idle_from) + device
            if waits:
                self.wait()

        return run


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PretendedGpu:
    return PretendedGpu(monkeypatch)


def test_a_spin_grows_until_it_is_longer_than_the_launches_and_stays_so(gpu: PretendedGpu):
    calls = {"short": gpu.launches(SPIN_CYCLES // 10, 7), "long": gpu.launches(5 * SPIN_CYCLES, 9)}
    times = alternate(calls, GPU, rounds=3, warm_up=1, hide_launches=True)
    assert times == {"short": [7, 7, 7], "long": [9, 9, 9]}
    grown = [2 * SPIN_CYCLES, 4 * SPIN_CYCLES, 8 * SPIN_CYCLES]
    short, longest = [SPIN_CYCLES], grown[-1:]
    assert gpu.spins == [*short, *short, *grown, *longest, *short, *short, *longest, *longest, *short]


def test_what_waits_for_the_gpu_is_refused_and_the_others_are_timed(gpu: PretendedGpu):
    calls = {"first": gpu.launches(5, 7), "waits": gpu.launches(5, 8, waits=True), "last": gpu.launches(5, 9)}
    refused: dict[str, Exception] = {}
    times = alternate(calls, GPU, 3, 1, hide_launches=True, refused=refused)
    assert times == {"first": [7, 7, 7], "last": [9, 9, 9]}
    assert list(refused) == ["waits"] and isinstance(refused["waits"], NotHiddenError)
    assert max(gpu.spins) <= MAX_SPIN_CYCLES
    with pytest.raises(NotHiddenError, match=r"while the GPU spins for 1,024,000,000 cycles, and took longer"):
        alternate(calls, GPU, 3, 1, hide_launches=True)


def test_shown_launches_count(gpu: PretendedGpu):
    times = alternate({"": gpu.launches(5, 7, waits=True)}, GPU, 2, 0)
    assert times == {"": [12, 12]} and gpu.spins == []
