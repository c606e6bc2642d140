"""Hands the times that were measured in turn over to pytest-benchmark, whose tables, JSON and comparisons then hold.

pytest-benchmark runs one test after the other; the providers of a setting are timed alternately instead, for the
machine's drift to touch all alike (timing.alternate). Each test then tells pytest-benchmark the times of its provider.
"""

from collections.abc import Iterator


class ReplayClock:
    """A clock that stands still, but for the next recorded time between every other reading and the one after it."""

    def __init__(self) -> None:
        self.now, self.running = 0.0, False
        self.seconds: Iterator[float] = iter(())

    def __call__(self) -> float:
        if self.running:
            self.now += next(self.seconds)
        self.running = not self.running
        return self.now

    def replay(self, benchmark, milliseconds: list[float]) -> None:
        """Let a `benchmark` fixture, whose timer this clock is, have these times."""
        self.seconds, self.running = (1e-3 * ms for ms in milliseconds), False
        benchmark.pedantic(lambda: None, rounds=len(milliseconds), iterations=1)


CLOCK = ReplayClock()
