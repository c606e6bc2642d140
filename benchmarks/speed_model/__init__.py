"""Predicts kernels' times from their machine code: no GPU is needed."""
