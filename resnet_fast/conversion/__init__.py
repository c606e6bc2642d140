"""Fuse the batch norms of existing models: `convert`, `restore`, `fold_batch_norm`."""

from .convert import convert, restore
from .fold import FoldedConv2d, fold_batch_norm
from .report import Outcome, Report

__all__ = ["FoldedConv2d", "Outcome", "Report", "convert", "fold_batch_norm", "restore"]
