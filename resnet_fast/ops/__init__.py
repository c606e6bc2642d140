"""Batch norm + residual + ReLU as operators: the reference, two backends, and the choice between them."""

from .arguments import BatchNormArgs
from .backend import Backend, choose_backend, why_not_triton

__all__ = ["Backend", "BatchNormArgs", "choose_backend", "why_not_triton"]
