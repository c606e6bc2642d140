"""Weights that were trained elsewhere, into a model: what the file calls them, and whether they fit, is found out."""

from .load import Loaded, load_checkpoint
from .mismatch import CheckpointMismatch

__all__ = ["CheckpointMismatch", "Loaded", "load_checkpoint"]
