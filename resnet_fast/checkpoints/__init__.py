"""Load weights that were trained elsewhere: match their names in the file with the model's and check that they fit."""

from .load import Loaded, load_checkpoint
from .mismatch import CheckpointMismatch

__all__ = ["CheckpointMismatch", "Loaded", "load_checkpoint"]
