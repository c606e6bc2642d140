"""Pass measured times to pytest-benchmark, for its tables, JSON and comparisons.

pytest-benchmark runs one test after the other. The providers of a setting are timed alternately instead, so that drift
of the machine affects all of them equally (timing.alternate). Each test then passes on its provider's times.
"""

from collections.abc import Iterator


class ReplayClock:
    """A clock that advances by the next recorded time at every second reading, and stands still otherwise."""

    def __init__(self) -> None:
        self.now, self.running = 0.0, False
        self.seconds: Iterator[float] = iter(())

    def __call__(self) -> float:
        if self.running:
            self.now += next(self.seconds)
        self.running = not self.running
        return self.now

    def replay(self, benchmark, milliseconds: list[float]) -> None:
        """Make a `benchmark` fixture that uses this clock as its timer measure these times."""
        self.seconds, self.running = (1e-3 * ms for ms in milliseconds), False
        benchmark.pedantic(lambda: None, rounds=len(milliseconds), iterations=1)


CLOCK = ReplayClock()
