"""Measurements, each against eager PyTorch in the same process; see README.md in this folder."""
