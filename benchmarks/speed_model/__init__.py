"""Predict kernels' times from their machine code, without a GPU."""
