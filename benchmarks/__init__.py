"""Measurements, each against eager PyTorch in the same process; see README.md in this folder."""

from time import perf_counter

STARTED = perf_counter()  # before torch is imported: a quick run has a limited time, and imports count
