"""Measurements against eager PyTorch in the same process; see README.md in this folder."""

from time import perf_counter

STARTED = perf_counter()  # before torch is imported, because imports count toward the time of a quick run
