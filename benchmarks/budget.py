"""The time of a quick run, divided among its settings."""

from time import perf_counter

from benchmarks import STARTED

# Of a quick run's 3 minutes. The rest is for the time before this package is imported, and for a last setting that
# exceeds its share.
QUICK_SECONDS = 150.0
# Of the remaining time, for the next setting. Heavy settings come first, and a setting may need twice its share.
SHARE = 1 / 3


def elapsed() -> float:
    """Return the seconds since the start."""
    return perf_counter() - STARTED


class Budget:
    """Divides the time of a run among its settings.

    Args:
        seconds: time of the whole run, from the start.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.needed: dict[str, float] = {}

    def share(self, level: str) -> float | None:
        """Return the seconds for the next setting, or None if its level has needed more than what is left."""
        left = self.seconds - elapsed()
        return SHARE * left if left > self.needed.get(level, 0.0) else None

    def note(self, level: str, seconds: float) -> None:
        """Record the seconds that a setting of the level needed for the fewest rounds."""
        self.needed[level] = max(seconds, self.needed.get(level, 0.0))
