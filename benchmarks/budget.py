"""The time of a quick run, shared out among its settings."""

from time import perf_counter

from benchmarks import STARTED

# Of 3 minutes for a quick run. The rest is for what comes before this package is imported, and
# for a last setting that takes longer than its share.
QUICK_SECONDS = 150.0
# Of what is left, for the next setting: the heavy ones come first, and a setting may need twice its share.
SHARE = 1 / 3


def elapsed() -> float:
    """Return the seconds since the start."""
    return perf_counter() - STARTED


class Budget:
    """Seconds for one setting after the other.

    Args:
        seconds: of the whole run, from the start.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.needed: dict[str, float] = {}

    def share(self, level: str) -> float | None:
        """Return the seconds for the next setting, or None if less time is left than its level has needed."""
        left = self.seconds - elapsed()
        return SHARE * left if left > self.needed.get(level, 0.0) else None

    def note(self, level: str, seconds: float) -> None:
        """Record what a setting of the level needs at least, with the fewest rounds."""
        self.needed[level] = max(seconds, self.needed.get(level, 0.0))
